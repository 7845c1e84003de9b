# The front door. From a bare clone and a plain Python:
#
#   make demo    the whole pipeline in miniature, a few minutes on two cores
#   make test    all tests, except GPU tests, make test-realshape and part of make test-faults;
#                make test-fast, the fast ones
#
# PYTHON picks the interpreter, VENV the virtual environment; one that is already active is not touched.

PYTHON ?= python3
VENV   ?= .venv
LOWEST ?= .venv-lowest
OUT    ?= demo
TORCH  ?= torch==2.13.0
# Processes that run tests: many of them wait for servers, jobs and other processes.
TEST_WORKERS ?= 2
PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
BIN    := $(VENV)/bin
# The package as it is installed, of links: mypy finds shards/ and launch/ under their real names only there.
TYPED  := build/typed/lavic

.PHONY: demo install test test-external test-fast test-faults test-lowest test-realshape lint format clean help
.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(VENV)/.installed  ## set the virtual environment up

demo: $(VENV)/.installed  ## run the whole pipeline in miniature; writes OUT (default: demo/)
	$(BIN)/lavic demo --out $(OUT)

test-faults: $(VENV)/.installed  ## the whole fault matrix (full disk, SIGKILL, ...): 14 of 19 commands
	LAVIC_ALL_FAULTS=1 $(BIN)/python -m pytest tests/faults

test: $(VENV)/.installed  ## run all tests, except GPU tests, test-realshape and part of test-faults
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not realshape and not external"

test-fast: $(VENV)/.installed  ## run the fast tests: no ranks, no Ray, no SLURM, none marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not realshape and not external and not dist and not ray and not slurm and not slow"

test-realshape: $(VENV)/.installed  ## every stage on a model of the 7B model's widths, against Hugging Face code
	$(BIN)/python -m pytest -m realshape -s tests/realshape

# LAVIC_TEST_DATA=FOLDER, see tests/external.py.
test-external: $(VENV)/.installed  ## run the tests of inputs from bug reports and of real photos, which you must have
	test -d "$(LAVIC_TEST_DATA)" || { echo "make test-external LAVIC_TEST_DATA=FOLDER: no such folder" >&2; exit 2; }
	LAVIC_TEST_DATA="$(LAVIC_TEST_DATA)" $(BIN)/python -m pytest -m external

# A virtual environment of its own, with direct requirements at their lower bounds and what they need at its newest.
test-lowest:  ## run the tests of crawl and reddit on the lowest releases that setup.py allows
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q "setuptools>=77"
	$(LOWEST)/bin/python tests/lowest.py crawl reddit > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -r $(LOWEST)/lowest.txt hypothesis "moto[server]" pytest trustme
	$(LOWEST)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	$(LOWEST)/bin/python -m pytest tests/shards --ignore tests/shards/test_describe.py --ignore-glob 'tests/shards/test_embed*' --ignore tests/shards/retrieval --ignore tests/shards/cluster/test_rank_actors.py

lint: $(VENV)/.installed  ## ruff, its format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/lavic/* $(CURDIR)/shards $(CURDIR)/launch $(TYPED)/
	$(BIN)/mypy $(TYPED)

format: $(VENV)/.installed  ## let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and what tools leave behind
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch comes first and only when there is none, so that a build for your GPU, installed before, is kept.
$(VENV)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[dev]"
	# Only its loader is tested; its dependencies bring a torchvision that does not fit every torch.
	$(BIN)/python -m pip install -q --no-deps "open_clip_torch>=3.3,<4"
	# Only its vocabulary is used. It is kept apart: without its dependencies it would break transformers' processors.
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/mistral-common "mistral-common>=1.13,<2"
	touch $@
