# `make demo` and `make test` set up whatever is missing by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-from-scratch test test-all lint clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml third_party/detectron2/repack.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m bags_d2 demo

demo-from-scratch: setup
	$(BIN)/python -m bags_d2 demo --from-scratch

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pip check

clean:
	rm -rf .venv build *.egg-info
