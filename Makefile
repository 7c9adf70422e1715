# Two commands for a newcomer, each from nothing: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

.PHONY: demo test check report help clean

help:            ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  .*##' $(MAKEFILE_LIST) | sed 's/:.*##/ :/'

demo: $(READY)   ## fine-tune, trace, predict, serve, and print what it bought (about 8 minutes on two cores)
	$(BIN)/melinoe demo --out runs/demo

test: $(DEV)   ## run the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $${TEST_WORKERS:-2} --dist worksteal

PAGES = README.md docs/method.md docs/benchmarks.md docs/finetuning.md docs/serving.md docs/findings.md

check: $(DEV)  ## style, types, and whether tables and lists of README and docs are up to date
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes
	$(BIN)/mypy
	$(BIN)/python recipes/file_index.py --check
	$(BIN)/python -m benchmarks.tables --check $(PAGES)
	$(BIN)/python -m benchmarks.study.tables --check

report: $(READY) ## write the tables and lists of README and docs again
	$(BIN)/melinoe plan --cards --out benchmarks/results/plan_cards.json
	$(BIN)/melinoe plan --finetune --cards --out benchmarks/results/finetune_cards.json
	$(BIN)/python recipes/file_index.py
	$(BIN)/python -m benchmarks.tables --figures docs/figures $(PAGES)
	$(BIN)/python -m benchmarks.study.tables

# torch goes first and alone: asked for together with the rest, other packages may pull another build.
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (about a minute)" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV): $(READY)
	@echo "adding what tests and checks need to $(VENV)" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:           ## remove the environment and all runs
	rm -rf $(VENV) runs
