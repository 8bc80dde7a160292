#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cpu/hot_loops.h"

namespace hata {

// The instruction sets that the loops are compiled for and this CPU has, the best one last:
// "scalar", and on x86-64 "avx2" and "avx512" (with VPOPCNTDQ and VNNI).
std::vector<std::string> supported_isas();

// The loops for one of them. Throws std::runtime_error for any other name.
const HotLoops& loops_of_isa(std::string_view isa);

}  // namespace hata
