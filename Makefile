# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# the lower bound of setup.cfg for torch, 2.9, is several GB with CUDA: OLDEST="torch==2.9.1 transformers==5.4.0" tests it
OLDEST ?= torch==2.13.0 transformers==5.4.0
OUT ?= regcache-out
# the extra "docs" of setup.cfg, without the package and its requirements
DOCS_TOOLS = $(shell sed -n '/^docs =/,/^[a-z]/p' setup.cfg | sed -n 's/^    //p')
DIST_TOOLS = build==1.6.1 twine==7.0.0 readme_renderer[md]==46.0 setuptools==84.2.1 pip
BENCH_OUT ?= bench-cpu-int8.json

.PHONY: demo campaign recipes examples test oldest coverage slow lint types docs dist bench bench-profile bench-methods clean
demo: $(VENV)/ready
	$(BIN)/optimum-cli regcache quantize --preset w8a8 w6a6 w4a4 --output $(OUT)

# two processes; the tests of one file stay together, the longest files begin (tests/conftest.py)
test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# what shows that a combination of versions works, with the oldest transformers, in an environment of its own
oldest: $(VENV)-oldest/ready
	$(VENV)-oldest/bin/python -m pytest -q -n 2 --dist loadfile -m "core and not slow"

# branch coverage of the package by the default tests: the files below 90 %, then the total, which must reach 90 %
coverage: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report= --cov-fail-under=0
	$(BIN)/python -m coverage report --fail-under=0 | awk 'NR <= 2 || $$NF + 0 < 90'
	$(BIN)/python -m coverage report --format=total

# the recipes of the embedded encoders with something to repair: each must reach what it expects
recipes: $(VENV)/ready
	for name in planted-outlier-w8a8 clip-scenes-induced-w8a8 siglip-scenes-induced-w4a4; do \
	    $(BIN)/optimum-cli regcache run $$name --overwrite --no-recommend --output $(OUT)/recipes/$$name || exit; done

# the notebooks, one after the other; nothing is written
examples: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/jupyter execute --timeout=300 examples/*.ipynb

# thousands of mutated checkpoints; none may be wrong in silence
campaign: $(VENV)/ready
	$(BIN)/python scripts/campaign.py --mutants 108

slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror optimum_regcache/kernels/native/*.cpp optimum_regcache/kernels/native/*.h

types: $(VENV)/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

# the site, from docs/ and the docstrings, into site/; every warning is an error. In an environment of its own: it reads the
# package and imports nothing of it
docs: $(VENV)-docs/ready
	$(VENV)-docs/bin/mkdocs build --strict

# archive and wheel into dist/: complete, equal to the checkout, no path of this machine, and the installed wheel quantizes
dist: $(VENV)/ready $(VENV)-dist/ready
	$(VENV)-dist/bin/python scripts/check_distribution.py --environment $(VENV)

# CPU time and memory against other runtimes; most of an hour on two idle cores
bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python benchmarks/bench_cpu_int8.py --output $(BENCH_OUT)

# where the time of the fused int8 model goes
bench-profile: $(VENV)/ready
	$(BIN)/python benchmarks/profile_cpu_int8.py

# every method alone and under registers; hours on two cores, continues where it was interrupted
bench-methods: $(VENV)/ready
	$(BIN)/python benchmarks/bench_methods.py --output docs/results/methods.json

# torch first and pinned: an unpinned requirement may pull a build with CUDA
$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)-oldest/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST)
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e ".[test]"
	touch $@

$(VENV)-docs/ready: setup.cfg
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS_TOOLS)
	touch $@

$(VENV)-dist/ready: Makefile
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(DIST_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-dist $(VENV)-docs $(VENV)-oldest .version-matrix site $(OUT) build dist *.egg-info
