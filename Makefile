# Every target sets up .venv by itself; all it needs is Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_DIR ?= runs/tiny
# Processes of a test run; each takes up to 4 GB.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile
# Versions that were tested together, one file a Python version.
CONSTRAINTS = constraints/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt

.PHONY: venv train test test-slow test-plan lint bench wheel clean

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else "bloomjax needs Python 3.11 to 3.13, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[data,test]' --constraint $(CONSTRAINTS)
	touch $@

train: venv  ## the tiny BLOOM on the demo corpus, and a Hugging Face folder of it
	$(BIN)/python -m bloomjax.train --gin_file=tiny.gin --gin.MODEL_DIR="'$(MODEL_DIR)'"
	$(BIN)/python -m bloomjax.export --checkpoint="$(MODEL_DIR)"

test: venv  ## the default suite
	$(PYTEST) -m 'not slow'

test-slow: venv
	$(PYTEST) -m slow

test-plan: venv  ## compiling for absent TPUs and GPUs; downloads their compilers, 1 GB
	$(BIN)/pip install --quiet --editable '.[plan]' --constraint $(CONSTRAINTS)
	$(PYTEST) tests/test_plan.py tests/test_hlo.py tests/test_targets.py
	$(PYTEST) -k 'compile or refused or slots' tests/test_flash_attention_*.py tests/test_losses.py tests/test_step_programs.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck tools/*.sh

bench: venv  ## CPU figures; see benchmarks/NOTES.md
	$(BIN)/python benchmarks/bench_startup.py
	$(BIN)/python benchmarks/bench_peers.py
	$(BIN)/python benchmarks/bench_loss.py

wheel: venv
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) dist build
