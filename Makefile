# make demo    install, fetch two real models, compress both, and say where the reports are
# make test    install, then formatting, lint, types, imports and all tests
#
# Both make their own virtual environment first. VENV=PATH puts it elsewhere.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo

bin := $(VENV)/bin
# Touched when the environment holds what pyproject.toml and constraints.txt ask for.
run_ready := $(VENV)/.ready-run
test_ready := $(VENV)/.ready-test
sources := pyproject.toml constraints.txt
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean
.DEFAULT_GOAL := demo

$(bin)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(run_ready): $(bin)/python $(sources)
	@echo 'installing (torch for the CPU is 200 MB; this is done once)'
	$(pip) --editable '.[language,vision,speech]'
	touch $@

$(test_ready): $(bin)/python $(sources)
	@echo 'installing (torch for the CPU is 200 MB; this is done once)'
	$(pip) --editable '.[language,vision,speech,onnx,test]'
	touch $@

# Tables are kept until both models are done, so that they stand together at the end; progress is
# shown meanwhile. A demo that ruined a model, or does not know, fails as the command does.
demo: $(run_ready)
	@mkdir -p $(DEMO)
	$(bin)/attar models get smollm2
	$(bin)/attar models get efficientnet-lite0
	$(call compress,smollm2,56MB)
	$(call compress,efficientnet-lite0,4.5MB)
	@cat $(DEMO)/smollm2.txt; echo; cat $(DEMO)/efficientnet-lite0.txt

compress = $(bin)/attar compress $(1) --size $(2) --out $(DEMO)/$(1) --force >$(DEMO)/$(1).txt \
	|| { code=$$?; cat $(DEMO)/$(1).txt; exit $$code; }

# pytest comes last, so that its closing line is the last line. A file's tests stay in one process,
# for what they share is made once.
test: $(test_ready)
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/mypy --config-file bench/mypy.ini
	$(bin)/lint-imports
	$(bin)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv demo build
