# make demo   installs, then trains, evaluates and predicts on a generated catalog
# make test   installs what tests need, then lint, types, import contract and all tests; as root on Debian it installs
#             Slurm and Chromium, and adds two names to /etc/hosts while it runs
# make docs   builds the pages of the documentation in site/, and fails at a broken link
# make image  builds the container image with docker, podman or buildah; IMAGE_FLAGS="…" is passed to the build
# make lock   updates the lists of the image's packages, with versions and hashes, in requirements/; LOCKED="cpu cu126"
#             selects builds of torch, by uv's names (cuda: the build on PyPI)
# make test-image  builds the image, and runs the jobs of k8s/ in it with podman; as root on Debian it installs podman
# make test-cluster  runs the jobs of k8s/ on the Kubernetes of KUBECONFIG, else on one that it starts, as root on Debian,
#             from the folder that FUSION_KUBERNETES names; without either it is skipped

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' fusion/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
CREATED = $(shell git log -1 --format=%cI 2>/dev/null)
BASE ?= $(shell sed -n 's/^ARG BASE=//p' Dockerfile)
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info >/dev/null 2>&1 && echo $(tool))))
IMAGE ?= fusion:$(VERSION)
# The number of test processes: one more than there are cores, because tests of Slurm and of stores mostly wait.
TEST_PROCESSES ?= $(shell expr $$(nproc) + 1)

# Waiting OpenMP threads spin less than in Fusion's commands, see fusion/environment.py: several tests share the cores.
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-image test-cluster lint lint-code lint-manifests image lock clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

demo: $(VENV)/.run
	$(BIN)/python -m fusion.demo

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-image: $(VENV)/.test
	$(BIN)/pytest -m image tests/image

test-cluster: $(VENV)/.test
	$(BIN)/python -m tests.cluster

# All files in the image get the same fixed date, 1980-01-01, the earliest that zip files support. Layers are then equal for
# all commits that do not change their content. Labels have the date of the commit. docker keeps the files' own times.
EPOCH = 315532800
SAME_podman = --timestamp $(EPOCH)
SAME_buildah = --timestamp $(EPOCH)
DIGEST_docker = docker image inspect --format '{{index .RepoDigests 0}}' $(BASE)
DIGEST_podman = podman image inspect --format '{{index .RepoDigests 0}}' $(BASE)
DIGEST_buildah = echo $(BASE)@$$(buildah inspect --type image --format '{{.FromImageDigest}}' $(BASE))

image:
	@test -n "$(BUILDER)" || { echo "docker, podman or buildah is needed, and none of them answers"; exit 69; }
	-$(BUILDER) pull --quiet $(BASE)
	base=$$($(DIGEST_$(BUILDER))); digest=$${base##*@}; \
	case $$digest in sha256:*) ;; *) base=$(BASE); digest=;; esac; \
	$(BUILDER) build --file Dockerfile --tag $(IMAGE) $(SAME_$(BUILDER)) --build-arg SOURCE_DATE_EPOCH=$(EPOCH) \
	  --build-arg BASE=$$base --build-arg BASE_DIGEST=$$digest --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$(REVISION) --build-arg CREATED=$(CREATED) $(IMAGE_FLAGS) .

LOCKED ?= cpu cuda
LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header --constraint constraints.txt \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: $(BIN)/python
	$(BIN)/pip install --quiet uv==0.13.9
	$(LOCK) --torch-backend cpu --no-emit-package torch pyproject.toml --output-file requirements/run.txt
	for extra in gcs prepare ray; do \
	  $(LOCK) --torch-backend cpu --no-emit-package torch --extra $$extra pyproject.toml \
	    --output-file requirements/$$extra.txt || exit; done
	for torch in $(LOCKED); do echo torch | $(LOCK) $$(test $$torch = cuda || echo --torch-backend $$torch) \
	  $$(sed -n 's/==.*//; s/^[a-z]/--no-emit-package &/p' requirements/run.txt) - \
	  --output-file requirements/torch-$$torch.txt || exit; done

# Runs both in parallel, installations included.
lint:
	$(MAKE) --no-print-directory --jobs 2 lint-code lint-manifests

lint-code: $(VENV)/.test
	$(BIN)/hadolint Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --dictionary - --dictionary docs/plain_words.txt
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-manifests: $(VENV)/.test $(VENV)/checkov/.done
	rm -rf $(VENV)/manifests && mkdir $(VENV)/manifests && cp k8s/*.yaml $(VENV)/manifests
	for overlay in k8s/overlays/*/; do \
	  $(BIN)/kubectl kustomize $$overlay > $(VENV)/manifests/overlay-$$(basename $$overlay).yaml || exit; done
	$(VENV)/checkov/bin/checkov --config-file .checkov.yaml --directory $(VENV)/manifests

clean:
	rm -rf $(VENV) demo site .coverage* .*_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# checkov pins old versions of packages that the project uses, so it has a virtual environment of its own.
$(VENV)/checkov/.done: Makefile | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install --quiet checkov==3.3.30
	touch $@
