# Every target makes the environment it needs, once; `make help` lists them.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?=
NEWEST_PYTHON ?=
WORKERS ?= 2
PYTEST ?=
ARGS ?=

VENV := .venv
NEWEST := .venv-newest
PARITY := .venv-parity
CODE := $(wildcard diffusion hopjax theory_checks tests benchmarks)
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input
# Tests of a module share what is compiled, so one worker has them all.
SHARED := -n $(WORKERS) --dist loadscope
PYENV_PYTHONS := $(wildcard $(HOME)/.pyenv/versions/*/bin/python)

# A usable Python: 3.11 or later, and able to make environments.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# Its version and path, if it is a release with the usual interpreter lock.
DESCRIBE := import sys, sysconfig, venv, ensurepip; v = sys.version_info; \
	v >= (3, 11) and v.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED") \
	and print("%d.%d.%d" % v[:3], sys.executable)
VERSIONS := import sys, jax; print("Python %d.%d, jax" % sys.version_info[:2], jax.__version__)

.PHONY: help
help: ## list the targets
	@echo 'usage: make TARGET [NAME=VALUE ...]'
	echo
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	echo
	echo 'The first call makes .venv and installs into it; later calls install nothing. There is nothing to activate.'
	echo
	echo '  make verify ARGS="--preset paper"   pass arguments on (bench takes them too)'
	echo '  make test PYTEST="-k energy"        narrow the tests; WORKERS=8 runs more at once (default 2)'
	echo '  make test PYTHON=python3.13         use this Python for .venv (remade if it held another version)'
	echo '  make test-slow NEWEST_PYTHON=...    use this Python for .venv-newest'

.PHONY: verify
verify: $(VENV)/.theory ## check the theory's claims numerically (python -m theory_checks)
	@$(VENV)/bin/python -m theory_checks --readme README.md $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## run the fast tests, with the coverage of hopjax
ifneq ($(strip $(PYTEST)),)
	@$(VENV)/bin/python -m pytest $(SHARED) $(PYTEST)
else
	@# Where coverage is measured Python takes half as long again: of hopjax, by its own tests.
	$(VENV)/bin/python -m pytest $(SHARED) --ignore=tests/hopjax
	$(VENV)/bin/python -m pytest $(SHARED) tests/hopjax --cov=hopjax --cov-report=term --cov-fail-under=95
endif

.PHONY: test-all
test-all: test test-slow ## run all tests: fast, slow, and the kernels on the newest Python

.PHONY: test-slow
test-slow: $(VENV)/.dev $(NEWEST)/.test ## run the slow tests, then the kernels' on the newest Python and jax
	@# 5 is pytest's "nothing selected": there may be no slow test.
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m slow $(PYTEST) || [ $$? -eq 5 ]
	here=$$($(VENV)/bin/python -c '$(VERSIONS)')
	newest=$$($(NEWEST)/bin/python -c '$(VERSIONS)')
	if [ "$$here" = "$$newest" ]; then
		echo "the newest here is $$newest, which is what .venv has: nothing more to run"
	else
		echo "tests/hopjax under $$newest (.venv has $$here)"
		$(NEWEST)/bin/python -m pytest -n $(WORKERS) tests/hopjax $(PYTEST)
	fi

.PHONY: parity
parity: $(PARITY)/.parity ## hold networks and their files against torch and diffusers, at full size (installs torch)
	@$(PARITY)/bin/python -m pytest -m parity $(PYTEST)

.PHONY: lint
lint: $(VENV)/.dev ## check style and formatting
	@$(VENV)/bin/python -m ruff check $(CODE)
	$(VENV)/bin/python -m ruff format --check $(CODE)

.PHONY: format
format: $(VENV)/.dev ## repair style and formatting where that is mechanical
	@$(VENV)/bin/python -m ruff check --fix-only $(CODE)
	$(VENV)/bin/python -m ruff format $(CODE)

.PHONY: types
types: $(VENV)/.dev ## check the types
	@$(VENV)/bin/python -m mypy $(CODE)

.PHONY: bench
bench: $(VENV)/.dev ## measure time, memory and error of the kernels (python -m benchmarks)
	@$(VENV)/bin/python -m benchmarks $(ARGS)

.PHONY: clean
clean: ## remove the environments, caches and build artefacts; results stay
	@rm -rf $(VENV) $(NEWEST) $(PARITY) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: a stamp inside each says what it holds ---

# A PYTHON named by the caller wins over whatever .venv was made with.
ifneq ($(strip $(PYTHON)),)
MINOR := -c 'import sys; print(*sys.version_info[:2])' </dev/null 2>/dev/null
ifneq ($(shell $(PYTHON) $(MINOR)),$(shell $(VENV)/bin/python $(MINOR)))
$(VENV)/.created: REMAKE
endif
endif

.PHONY: REMAKE
REMAKE:

$(VENV)/.created:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 $(PYENV_PYTHONS)); do
		if "$$python" -c '$(USABLE)' </dev/null >/dev/null 2>&1; then
			"$$python" -m venv --clear $(VENV)
			touch $@
			exit 0
		fi
	done
	echo 'error: $(if $(PYTHON),PYTHON=$(PYTHON) is not a Python >= 3.11 with its venv module,no Python >= 3.11 with its venv module found); install python3 and python3-venv (3.11 or later), or name one: make PYTHON=/path/to/python3' >&2
	exit 1

$(VENV)/.theory: $(VENV)/.created pyproject.toml
	@echo 'installing hopjax[theory] into $(VENV)'
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[theory]'
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	@echo 'installing hopjax[dev] into $(VENV)'
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	touch $(VENV)/.theory $@

$(PARITY)/.parity: $(VENV)/.created pyproject.toml
	@echo 'installing hopjax[test,parity] into $(PARITY)'
	[ -x $(PARITY)/bin/python ] || $(VENV)/bin/python -m venv $(PARITY)
	$(PARITY)/bin/python $(PIP_INSTALL) -e '.[test,parity]'
	touch $@

$(NEWEST)/.created:
	@newest=$$(for python in $(or $(NEWEST_PYTHON),python3 python3.15 python3.14 python3.13 python3.12 python3.11 $(PYENV_PYTHONS)); do
		"$$python" -c '$(DESCRIBE)' </dev/null 2>/dev/null || true
	done | sort -V | tail -n 1)
	if [ -z "$$newest" ]; then
		echo 'error: no released Python >= 3.11 with its venv module found; name one: make test-slow NEWEST_PYTHON=/path/to/python3' >&2
		exit 1
	fi
	"$${newest#* }" -m venv --clear $(NEWEST)
	touch $@

$(NEWEST)/.test: $(NEWEST)/.created pyproject.toml
	@echo 'installing hopjax[test] into $(NEWEST)'
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
	touch $@
