# Needs Python 3.10+ and GNU make 4+. Everything lives in .venv; `make clean` removes it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The time of each test is kept in .times/, the ten slowest are printed.
PYTEST = $(RUN) -m pytest --quiet --durations=10 --durations-min=0.1 --junitxml=.times/$@.xml
SIDE_BY_SIDE := -n 2 --dist worksteal

.PHONY: demo quick test test-all gpu check bench clean lint types unit graph system

demo: $(VENV)/ready  ## digits, uncached and cached, side by side: demo.png
	$(VENV)/bin/toca-fx demo

quick: $(VENV)/ready  ## what to run after every change: check, tests/unit and tests/graph, side by side
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target graph types unit lint

test: quick system  ## quick, then tests/system; what is marked slow is left out, and named at the end

test-all: check  ## everything, as slow as it has to be
	$(PYTEST) $(SIDE_BY_SIDE) --slow

check: lint types  ## lint, types, and whether the policy reference is current

gpu:  ## what needs a GPU, in under five minutes; with the Python that has a CUDA build of torch: make gpu PYTHON=...
	$(PYTHON) -m pytest tests/gpu

bench: $(VENV)/ready  ## time saved against work saved, on this machine
	$(VENV)/bin/toca-fx bench

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/policy_reference.py --check

types: $(VENV)/ready
	$(RUN) -m mypy

unit graph: $(VENV)/ready
	$(PYTEST) tests/$@

system: $(VENV)/ready
	$(PYTEST) $(SIDE_BY_SIDE) tests/$@

# torch first and by itself: what follows must not replace it by another build.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .times
