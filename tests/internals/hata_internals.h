#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

void add_page_table(py::module_& m);
void add_cpu_loops(py::module_& m);
