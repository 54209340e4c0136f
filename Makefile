# Every target makes `.venv` first if it is absent; run any of them again at no cost.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check tests docs test-faults test-slow test-external demo-model results results-training results-analysis scale reliability

demo: .venv/installed
	$(BIN)/mlsae demo --out demo-run

# Both at once: mypy keeps one processor busy, and speaks before tests end.
test: .venv/installed
	$(MAKE) --jobs 2 check tests

# One worker more than processors: some tests wait for a hub or a child. Compiled modules are kept
# whatever the environment says, since most tests are of processes. Plugins are named, because
# pytest rewrites every module of a package that has one, zarr's and hypothesis' in every worker.
tests: export PYTHONDONTWRITEBYTECODE :=
tests: export PYTEST_DISABLE_PLUGIN_AUTOLOAD := 1
tests: .venv/installed
	$(BIN)/python -m pytest -p xdist -p pytest_timeout \
		-n $$($(BIN)/python -c 'import os; print(min(8, os.cpu_count() + 1))') \
		--dist loadfile \
		-m "not slow and not external and not faults"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/house/typecheck.py

# Not before every merge: it takes a quarter of an hour.
test-faults: .venv/installed
	$(BIN)/python -m pytest tests/faults -m faults -o faulthandler_timeout=1200

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

test-external: .venv/installed
	$(BIN)/python -m pytest -m external

# The pages of docs/reference, from docstrings, columns and settings.
docs: .venv/installed
	$(BIN)/python docs/make.py

demo-model: .venv/installed
	GOMP_SPINCOUNT=5000 $(BIN)/python -m mlsae.demo.make_model

results: .venv/installed
	$(BIN)/python -m benchmarks.results

# From docs/evidence/training.json, which `python -m benchmarks.training` writes.
results-training: .venv/installed
	$(BIN)/python -m benchmarks.training_page

# From docs/evidence/analysis.json, which `python -m benchmarks.analysis` writes; figures too.
results-analysis: .venv/installed
	$(BIN)/python -m benchmarks.analysis_page

scale: .venv/installed
	$(BIN)/python benchmarks/scale.py

# All of test-faults, and docs/evidence/reliability.md from what it counted.
reliability: .venv/installed
	$(BIN)/python -m pytest tests/faults -m faults -o faulthandler_timeout=1200 \
		--counts docs/evidence/reliability.json
	$(BIN)/python -m benchmarks.reliability

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "mlsae needs Python >= 3.11, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11 (or newer)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
