# `make demo` and `make test` need nothing but git, make and Python on Debian 12 or 13: what is missing is
# installed by tools/install-system (apt) and into a virtual environment. See CONTRIBUTING.md.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On two cores: tests with real servers mostly wait, for a guest, a TTL or a process, so five keep both busy.
WORKERS ?= 5
# For `make chaos`. Without a seed each run draws its own, and prints it.
SEED ?=
MINUTES ?= 30
# For `make simulate`.
SEEDS ?= 500
STEPS ?= 16

# Programs of packages that would start a service when installed (etcd, promtool) are unpacked here instead.
export PATH := $(CURDIR)/.cache/tools:$(PATH)
# Without bytecode on the disk each worker would compile all tests anew, for 15 s of a processor.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test compiled lint quick soak browser chaos simulate container upgrade bench lowest wheel deb lock ignition settings
.PHONY: schemas stories format clean cluster-demo as-root

help:
	@echo 'make demo    etcd, a supervisor and a guest that boots, on this machine; Ctrl-C ends it'
	@echo 'make cluster-demo  three hosts on this machine: a guest moves live, a host is drained, one loses its power; root'
	@echo 'make test    lint, then all tests but the soaks'
	@echo 'make lint    ruff, mypy, import directions'
	@echo 'make quick   the tests that boot no guest'
	@echo 'make soak    the slow tests'
	@echo 'make browser  the tests that drive a real Chromium'
	@echo 'make chaos   faults at random, for MINUTES=30, drawn from SEED=…; the disks tell who wrote'
	@echo 'make simulate  a cluster in one process, deterministic: SEEDS=500 histories (or 501-900), STEPS=16 acts each'
	@echo 'make container  the image built and run, hosts booted with systemd; needs root'
	@echo 'make upgrade  twenty guests, their supervisor replaced ten times; needs root'
	@echo 'make bench   the budgets, measured; writes bench/RESULTS.md'
	@echo 'make lowest  the quick tests with the oldest versions that pyproject.toml allows'
	@echo 'make wheel   wheel and sdist, each tried in an environment of its own, with pip alone'
	@echo 'make deb     a package for the Debian that this is, in dist/'
	@echo 'make lock    renews deploy/requirements.lock, the packages of the image'
	@echo 'make ignition  renews deploy/coreos/*.ign'
	@echo 'make settings  renews the table in docs/settings.md and config/kvmsupervisor.toml'
	@echo 'make schemas  renews the JSON schemas and the OpenAPI description in kvmsupervisor/web/schemas'
	@echo 'make stories  plays the stories of docs/reliability.md, and writes down what happens now'
	@echo 'make format  what ruff can mend by itself'
	@echo 'make clean   removes all that these made'

demo: $(VENV)/.run
	@$(BIN)/kvmsupervisor demo --cache .cache/guest

cluster-demo: as-root $(VENV)/.dev
	@$(BIN)/python -m tests.cluster_demo

as-root:
	@[ "$$(id -u)" = 0 ] || { echo 'make cluster-demo makes network namespaces, which takes root: sudo make cluster-demo'; exit 2; }

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory -j2 lint compiled
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m 'not soak and not docker'

# In a fresh checkout the tests are compiled once, while mypy works, not by each worker. What is wrong with them is shown
# by the run itself.
compiled: $(VENV)/.dev
	@ls tests/__pycache__/test_house.*-pytest-*.pyc >/dev/null 2>&1 || $(BIN)/pytest --collect-only -q >/dev/null || true

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

quick: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) -m 'not soak and not guest and not docker'

soak: $(VENV)/.dev
	@tools/install-system browser
	$(BIN)/pytest -m 'soak and not docker' --timeout 3600

browser: $(VENV)/.dev
	@tools/install-system browser
	$(BIN)/pytest -m browser

chaos: $(VENV)/.dev
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --minutes $(MINUTES) \
	    --keep .cache/chaos --json .cache/chaos/report.json

simulate: $(VENV)/.dev
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --steps $(STEPS) --workers 2

container: $(VENV)/.dev
	@tools/install-system container
	$(BIN)/pytest -m 'docker and not soak' --timeout 1800

upgrade: $(VENV)/.dev
	@tools/install-system container
	$(BIN)/pytest -m 'docker and soak' -rP --show-capture=stdout tests/container

bench: $(VENV)/.dev
	$(BIN)/python -m bench

lowest: .venv-lowest/.dev
	.venv-lowest/bin/pytest -n $(WORKERS) -m 'not soak and not guest and not docker'

# A wheel needs `build` only: none of what tests need is installed for it.
wheel:
	@tools/install-system wheel
	rm -rf dist/*.whl dist/*.tar.gz .venv-wheel
	@$(PYTHON) -m venv .venv-wheel && .venv-wheel/bin/pip install --quiet build
	.venv-wheel/bin/python -m build --quiet
	@for one in dist/*.whl dist/*.tar.gz; do \
	    echo "trying $$one"; \
	    rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel && .venv-wheel/bin/pip install --quiet $$one && \
	    (cd / && $(CURDIR)/.venv-wheel/bin/kvmsupervisor --version && \
	        KVM_CONFIG=/dev/null KVM_QEMU=/bin/true $(CURDIR)/.venv-wheel/bin/kvmsupervisor check-config >/dev/null) || exit 1; \
	done
	@rm -rf .venv-wheel
	@ls -l dist

deb:
	@tools/install-system deb
	tools/make-deb
	@ls -l dist

# Every version that Python 3.11 and newer get, with hashes and without the name of any registry.
lock: $(VENV)/.dev
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv; }
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	    --no-emit-index-url --no-header --no-annotate pyproject.toml -o deploy/requirements.lock

ignition: $(VENV)/.dev
	for one in flatcar fcos; do $(BIN)/python tools/ignition deploy/coreos/$$one.bu >deploy/coreos/$$one.ign; done

settings: $(VENV)/.dev
	$(BIN)/python tools/settings-pages

schemas: $(VENV)/.dev
	$(BIN)/python tools/schemas

stories: $(VENV)/.dev
	$(BIN)/python -m tests.simulation.stories

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest .venv-wheel .venv-lock .cache build dist *.egg-info .coverage .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# System packages are looked at each time: it takes a moment, and they can be removed behind a stamp's back.
.PHONY: system-run system-dev
system-run:
	@tools/install-system run
system-dev:
	@tools/install-system dev

$(VENV)/.run: pyproject.toml | system-run
	@echo 'Python packages: installing into $(VENV)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml tools/install-etcds | system-dev
	@echo 'Python packages: installing into $(VENV), with those for development'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@tools/install-etcds $(BIN)/pip
	@touch $(VENV)/.run $@

.venv-lowest/.dev: pyproject.toml tools/lowest-constraints | system-dev
	@echo 'Python packages: installing the oldest that are allowed into .venv-lowest'
	@test -x .venv-lowest/bin/pip || $(PYTHON) -m venv .venv-lowest
	@$(PYTHON) tools/lowest-constraints >.venv-lowest/constraints.txt
	@.venv-lowest/bin/pip install --quiet --editable '.[dev]' --constraint .venv-lowest/constraints.txt
	@touch $@
