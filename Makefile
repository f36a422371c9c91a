# make demo   installs, then trains, evaluates and predicts on a generated catalog
# make test   installs what tests need, then lint, types, import contract and all tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint lint-manifests clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.run
	$(BIN)/python -m fusion.demo

test: lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/.test lint-manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-manifests: $(VENV)/.test $(VENV)/checkov/.done
	rm -rf $(VENV)/manifests && mkdir $(VENV)/manifests && cp k8s/*.yaml $(VENV)/manifests
	for overlay in k8s/overlays/*/; do \
	  $(BIN)/kubectl kustomize $$overlay > $(VENV)/manifests/overlay-$$(basename $$overlay).yaml || exit; done
	$(VENV)/checkov/bin/checkov --config-file .checkov.yaml --directory $(VENV)/manifests

clean:
	rm -rf $(VENV) demo .coverage* .*_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# checkov pins old versions of what the product uses, so it lives alone.
$(VENV)/checkov/.done: Makefile
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install --quiet checkov==3.3.30
	touch $@
