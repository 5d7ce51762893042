# Two commands for a fresh machine that has only Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
# One more than the two cores of a small machine: tests wait for child processes and the disk.
WORKERS ?= 3
RUN = $(VENV)/bin/python

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(RUN) train.py --config=configs/quickstart.py $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n $(WORKERS) --dist=worksteal -m "not gpu" $(ARGS)

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Sheaf needs Python 3.11 or newer: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -e ".[test]"
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -e ".[lint]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
