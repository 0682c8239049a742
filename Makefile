# qlora-kit: `make demo` runs the main job, `make test` passes the tests. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?=
TASKS ?=
TASK_DATA ?=
RECIPE ?= smollm2-sentiment

.PHONY: setup demo demo-data train eval export bench test test-all lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml export/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ./export -e ".[test,lint]"
	touch $@

demo-data: setup
	$(BIN)/python scripts/fetch_demo.py

demo: demo-data
	$(BIN)/python scripts/demo.py

train: demo-data
	$(BIN)/qlora-kit train $(RECIPE)

eval: setup
	$(BIN)/qlora-kit eval $(RUN) $(if $(TASKS),--tasks $(TASKS)) $(if $(TASK_DATA),--task-data $(TASK_DATA))

export: setup
	$(BIN)/qlora-kit export $(RUN)

bench: demo-data
	$(BIN)/python scripts/bench_all.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --cov=qlora_kit --cov-report=term --cov-fail-under=90

test-all: demo-data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qlora_kit scripts export/qlora_runtime

clean:
	rm -rf $(VENV) demo runs build
