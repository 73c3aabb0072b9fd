# Needs Python 3.10+ and make. Everything lives in .venv; `make clean` removes it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test gpu check bench clean

demo: $(VENV)/ready  ## digits, uncached and cached, side by side: demo.png
	$(VENV)/bin/toca-fx demo

test: $(VENV)/ready  ## all tests
	$(RUN) -m pytest -n 2 --dist worksteal

gpu:  ## what needs a GPU, in under five minutes; with the Python that has a CUDA build of torch: make gpu PYTHON=...
	$(PYTHON) -m pytest tests/gpu

check: $(VENV)/ready  ## lint, types, tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) tools/policy_reference.py --check
	$(RUN) -m pytest -n 2 --dist worksteal

bench: $(VENV)/ready  ## time saved against work saved, on this machine
	$(VENV)/bin/toca-fx bench

# torch first and by itself: what follows must not replace it by another build.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
