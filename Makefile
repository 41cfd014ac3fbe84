# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-newest test-wheel lint types tutorials bench docs clean

# torch first and pinned: any later request is then satisfied and pulls no other build
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch pyro-ppl numpy
	$(INSTALL) --editable .
	touch $@

# one stamp an extra: test, tutorials, bench, docs, dev
$(VENV)/.%: $(VENV)/.core
	$(INSTALL) --editable ".[$*]"
	touch $@

demo: $(VENV)/.tutorials
	$(BIN)/python tutorials/quickstart.py
	$(BIN)/python tutorials/two_dimensions.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -q --numprocesses 2

# the newest torch that pip finds, in an environment of its own: on Linux that is a CUDA build of several GB
NEWEST := .venv-newest
$(NEWEST)/.test: pyproject.toml constraints.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -v '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(NEWEST)/constraints.txt \
		--upgrade --editable ".[test]"
	touch $@

test-newest: $(NEWEST)/.test
	$(NEWEST)/bin/python -m pytest -q --numprocesses 2

# the built wheel in a clean environment, away from the sources; compiling does not depend on how it was installed
WHEEL := build/wheel
test-wheel: $(VENV)/.core
	rm -rf $(WHEEL) build/lib && mkdir -p $(WHEEL)/tree
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch pyro-ppl numpy
	$(WHEEL)/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$(ls $(WHEEL)/*.whl)[test]"
	cp -r tests docs README.md CONTRIBUTING.md pyproject.toml $(WHEEL)/tree
	cd $(WHEEL)/tree && ../venv/bin/python -m pytest -q --numprocesses 2 --ignore tests/test_compile.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tutorials: $(VENV)/.tutorials
	for script in tutorials/*.py; do $(BIN)/python $$script --short --output tutorials/output/short || exit 1; done

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py --output benchmarks/results
	$(BIN)/python benchmarks/energy_potentials.py --output benchmarks/results
	$(BIN)/python benchmarks/bench_sylvester.py --output benchmarks/results/sylvester.md
	$(BIN)/python benchmarks/checkerboard.py --output benchmarks/results
	$(BIN)/python benchmarks/bench_residual.py --output benchmarks/results/residual.md
	$(BIN)/python benchmarks/splines.py --output benchmarks/results/splines.md
	$(BIN)/python benchmarks/autoregressive.py --output benchmarks/results/autoregressive.md
	$(BIN)/python benchmarks/posteriors.py --output benchmarks/results/posteriors.json --seconds 10
	$(BIN)/python benchmarks/bench_whitening.py --output benchmarks/results/whitening.md

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info site tutorials/output
