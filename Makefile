# Two commands do everything: `make demo` and `make test`. Both make the environment first where there is none.
# `make test PYTHON=/path/to/python` tests the package that is installed there.

VENV := .venv
DEMO := demo
SEED := 0
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.ready
endif
BIN := $(dir $(PYTHON))
CACHE := $(BIN)mmkd-cache
STUDENT := $(BIN)mmkd-student
TESTS := $(PYTHON) -m pytest -p no:cacheprovider

.PHONY: demo seeds converged test soak lint bench clean

$(VENV)/.ready: pyproject.toml setup.py pipeline/tvl1/native.c
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --editable '.[test,lint]'
	touch $@

# Every stage skips what is already done, so a stopped demo continues where it was.
demo: $(ENVIRONMENT)
	CACHE=$(CACHE) STUDENT=$(STUDENT) sh tests/demo.sh $(DEMO) $(SEED)

# The table of the README: three seeds of experts, cache and students, then mean and spread.
seeds: $(ENVIRONMENT)
	for seed in 0 1 2; do CACHE=$(CACHE) STUDENT=$(STUDENT) sh tests/demo.sh $(DEMO) $$seed || exit 1; done
	$(STUDENT) compare --tables $(DEMO)/seed-0/table.json --tables $(DEMO)/seed-1/table.json \
		--tables $(DEMO)/seed-2/table.json --out $(DEMO)/table.json

# Does patience pay? Baseline and student at 1.5 times the steps, on further clips, after `make demo`.
converged: $(ENVIRONMENT)
	CACHE=$(CACHE) STUDENT=$(STUDENT) sh tests/converged.sh $(DEMO) $(SEED) 180

test: $(ENVIRONMENT)
	$(TESTS) -m "not slow"

# Slow soak tests, hours of a cluster's mishaps in minutes.
soak: $(ENVIRONMENT)
	$(TESTS) -m slow --timeout=3600

# mypy cannot follow an editable install of mapped folders: give it the package as a folder of links.
lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p build/lint/mmkd
	for part in data_manifests cache_tools student pipeline; do ln -sfn ../../../$$part build/lint/mmkd/$$part; done
	cd build/lint && MYPYPATH=. $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml \
		-p mmkd.data_manifests -p mmkd.cache_tools -p mmkd.student -p mmkd.pipeline

# Every benchmark once, small; what needs a GPU or the demo's experts says so where there are none.
bench: $(ENVIRONMENT)
	$(PYTHON) tests/benchmarks/quick.py

clean:
	rm -f pipeline/tvl1/*.so
	rm -rf build dist demo runs *.egg-info .mypy_cache .pytest_cache .ruff_cache
