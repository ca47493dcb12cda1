# Every target sets up what it needs and nothing twice; see `make help`.
# Paths are relative: the clone may lie in a folder with spaces in its name.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXPERIMENT ?= experiments/tokenizer/openmoji-32.yaml
EXPERIMENT_T2I ?= experiments/t2i/openmoji-32-gemma270m.yaml
SUITE ?= experiments/benchmark/quick.yaml
PROCESSES ?= 2
ARGS ?=

PY := $(VENV)/bin/python
V2FLOW := $(PY) -m v2flow
# One thread each: most tests are too small for more. A file's fixtures are made once; tests/conftest.py orders the files.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
NAME := $(basename $(notdir $(EXPERIMENT)))

# The default pictures are built only for an experiment that reads them; their manifest is written last.
OPENMOJI := data/openmoji/manifest.json
SHAPES := data/shapes/manifest.json
DATA := $(strip $(shell grep -qs data/openmoji "$(EXPERIMENT)" && echo $(OPENMOJI)) \
  $(shell grep -qs data/shapes "$(EXPERIMENT)" && echo $(SHAPES)))
# The tokenizer of a text-to-image experiment, if it is one that is trained here, and the token shards made with it.
tokenizers_of = $(sort $(shell sed -n 's|^ *tokenizer: *checkpoints/tokenizers/\([^ ]*\).*|\1|p' $(1) 2>/dev/null))
READY_T2I := $(patsubst %,data/tokens/%/manifest.json,$(call tokenizers_of,"$(EXPERIMENT_T2I)"))

# What a suite reads: pictures that it names, and the token shards of its text-to-image experiments, if it has any.
SUITE_T2I := $(sort $(shell sed -n 's|^[ -]*experiment: *\(experiments/t2i/[^ ]*\).*|\1|p' "$(SUITE)" 2>/dev/null))
SUITE_DATA := $(shell grep -qs data/openmoji "$(SUITE)" && echo $(OPENMOJI)) \
  $(shell grep -qs data/shapes "$(SUITE)" && echo $(SHAPES)) \
  $(if $(SUITE_T2I),$(VENV)/.installed-t2i $(patsubst %,data/tokens/%/manifest.json,$(call tokenizers_of,$(SUITE_T2I))))
# Test pictures of other domains, for a suite that asks for them.
DOMAINS := data/domains/faces/manifest.json
SUITE_DATA += $(shell grep -qs "probes:.*domains" "$(SUITE)" && echo $(DOMAINS))

# The last checkpoint of the newest run in a folder, by the run's number: a clock may be set back.
newest = ls -d checkpoints/$(1)/version_*/checkpoints/last.ckpt 2>/dev/null | sort -V | tail -n 1
# What `make evaluate` scores: the newest run of the experiment, on the test shards of its data.
CHECKPOINT ?= $(shell $(call newest,$(NAME)))
# What `make demo` draws captions with: the newest run of the text-to-image experiment, if there is one.
PAINTER ?= $(shell $(call newest,t2i/$(basename $(notdir $(EXPERIMENT_T2I)))))
# What `make demo` sets beside the tokenizer: the newest VQ autoencoder of the same pictures, if there is one.
BASELINE ?= $(shell $(call newest,$(NAME)-vq))
PICTURES := $(or $(V2FLOW_DATA),$(if $(wildcard ../shared/data),../shared/data,data))
SHARDS ?= $(if $(DATA),$(dir $(DATA))test-*.tar,$(if $(findstring cifar10,$(NAME)),$(PICTURES)/cifar10/test-{000000..000001}.tar))

START := $(shell date +%s)
# $(call minutes,from,to): a shell expression.
minutes = $$(( ($(2) - $(1)) / 60 )) min $$(( ($(2) - $(1)) % 60 )) s

.DEFAULT_GOAL := help
.PHONY: help train-tokenizer train-t2i evaluate demo benchmark test test-faults test-fuzz test-gpu coverage lint docs format experiment-exists checkpoint-exists experiment-t2i-exists suite-exists
.DELETE_ON_ERROR:
# One data set is built by one command, and packages are installed by one; trainings use all cores as it is.
.NOTPARALLEL:

help:
	@echo "make train-tokenizer   train a tokenizer: data, training, figures, grid (no GPU needed)"
	@echo "make train-t2i         train an LLM to draw: tokenizer if there is none, data, token shards, training"
	@echo "make evaluate          score the newest run of EXPERIMENT, or CHECKPOINT=..., on SHARDS=..."
	@echo "make benchmark         train and score the rows of SUITE that have no result yet, and report on all"
	@echo "make demo              a web page to try the newest runs of EXPERIMENT and EXPERIMENT_T2I, or CHECKPOINT=file"
	@echo "make test              run the tests"
	@echo "make test-faults       kill and resume many small trainings; ARGS=\"--kills 50 --out FILE\""
	@echo "make test-fuzz         10,000 random inputs for each reader; an hour; ARGS=\"-k captions\""
	@echo "make test-gpu          run the tests that need a CUDA GPU"
	@echo "make coverage          what the tests do not reach: build/coverage/html; ARGS=\"-m 'not slow'\""
	@echo "make lint              check style and types"
	@echo "make docs              build the documents: docs/_build/html/index.html"
	@echo "make format            put the code into the project's style"
	@echo
	@echo "EXPERIMENT=file.yaml   the experiment file; now $(EXPERIMENT)"
	@echo "EXPERIMENT_T2I=file    that of train-t2i; now $(EXPERIMENT_T2I)"
	@echo "SUITE=file.yaml        the benchmark suite; now $(SUITE)"
	@echo "ARGS=\"...\"             more words for the command, such as --trainer.max_steps=100"
	@echo "PROCESSES=n            that run the tests at once; now $(PROCESSES)"
	@echo "VENV=folder            the virtual environment; now $(VENV)"
	@echo
	@echo "Each target sets up what it needs: virtual environment, packages, data."

train-tokenizer: experiment-exists $(VENV)/.installed-cli $(DATA)
	@ready=$$(date +%s); \
	echo "v2flow: set-up took $(call minutes,$(START),ready)"; \
	$(V2FLOW) fit --config "$(EXPERIMENT)" $(ARGS); status=$$?; \
	finished=$$(date +%s); \
	echo "v2flow: set-up took $(call minutes,$(START),ready), training $(call minutes,ready,finished)"; \
	exit $$status

train-t2i: experiment-t2i-exists $(VENV)/.installed-t2i $(READY_T2I)
	@ready=$$(date +%s); \
	echo "v2flow: set-up took $(call minutes,$(START),ready)"; \
	$(V2FLOW) fit --config "$(EXPERIMENT_T2I)" $(ARGS); status=$$?; \
	finished=$$(date +%s); \
	echo "v2flow: set-up took $(call minutes,$(START),ready), training $(call minutes,ready,finished)"; \
	exit $$status

evaluate: experiment-exists checkpoint-exists $(VENV)/.installed-cli $(DATA)
	@if [ -z "$(SHARDS)" ]; then \
	  echo "v2flow: error: no test shards known for $(EXPERIMENT); name them with SHARDS=..." >&2; exit 2; fi
	$(V2FLOW) evaluate "$(CHECKPOINT)" --data "$(SHARDS)" --json "checkpoints/$(NAME)/evaluation.json" \
	  $(if $(DATA),--floors-train "$(dir $(DATA))train-*.tar") $(ARGS)

demo: checkpoint-exists $(VENV)/.installed-demo
	$(V2FLOW) demo "$(CHECKPOINT)" $(if $(PAINTER),--text-to-image "$(PAINTER)") \
	  $(if $(BASELINE),--baseline "$(BASELINE)") $(ARGS)

benchmark: suite-exists $(VENV)/.installed-benchmark $(SUITE_DATA)
	$(V2FLOW) benchmark "$(SUITE)" $(ARGS)

test: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

# Trainings are killed at random moments and resumed, two ranks too, and each fault of data, disk, memory and clock is
# tried; a seed is drawn and printed (ARGS="--seed N" repeats it).
test-faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) tests/faults/run.py --ranks $(ARGS)

# Mutated shards, captions, ids and configurations; the short form is part of `make test`.
test-fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 V2FLOW_FUZZ=long $(PY) -m pytest tests/test_fuzz.py $(ARGS)

test-gpu: $(VENV)/.installed-test
	$(PY) -m pytest -m gpu $(ARGS)

# Lines and branches, those of commands that tests start included; what is measured is said in pyproject.toml.
coverage: $(VENV)/.installed-test
	$(PYTEST) --cov --cov-report=term --cov-report=html $(ARGS)

lint: $(VENV)/.installed-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(VENV)/.installed-docs
	$(PY) -m sphinx -E -W --keep-going -n -q docs docs/_build/html $(ARGS)
	@echo "v2flow: documents docs/_build/html/index.html"

format: $(VENV)/.installed-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

experiment-exists:
	@[ -f "$(EXPERIMENT)" ] || { \
	  echo "v2flow: error: EXPERIMENT=$(EXPERIMENT): no such file; see experiments/tokenizer/" >&2; exit 2; }

checkpoint-exists:
	@[ -n "$(CHECKPOINT)" ] || { \
	  echo "v2flow: error: no run of $(EXPERIMENT) in checkpoints/$(NAME); run 'make train-tokenizer' first" \
	    "or name one with CHECKPOINT=..." >&2; exit 2; }

experiment-t2i-exists:
	@[ -f "$(EXPERIMENT_T2I)" ] || { \
	  echo "v2flow: error: EXPERIMENT_T2I=$(EXPERIMENT_T2I): no such file; see experiments/t2i/" >&2; exit 2; }

suite-exists:
	@[ -f "$(SUITE)" ] || { \
	  echo "v2flow: error: SUITE=$(SUITE): no such file; see experiments/benchmark/" >&2; exit 2; }

$(OPENMOJI): | $(VENV)/.installed-cli
	$(V2FLOW) data openmoji --out data/openmoji

$(SHAPES): | $(VENV)/.installed-cli
	$(V2FLOW) data shapes --out data/shapes

# A tokenizer for stage 2: the newest run of its experiment, exported. It is trained now if there is none, and to its end
# if it was interrupted: the figures are written last.
checkpoints/tokenizers/%/config.json: | $(VENV)/.installed-t2i
	@run=$$($(call newest,$*)); \
	if [ -z "$$run" ]; then more=; elif [ -f "$${run%checkpoints/last.ckpt}metrics.json" ]; then exit 0; \
	else echo "v2flow: $$run is of a training that was interrupted: it goes on"; more="--ckpt_path last"; fi; \
	$(MAKE) train-tokenizer EXPERIMENT=experiments/tokenizer/$*.yaml ARGS="$$more"
	$(V2FLOW) export "$$($(call newest,$*))" checkpoints/tokenizers/$*

# Its token shards, of the pictures that it was trained on.
# OpenMoji is small enough to be learned by heart; its captions seldom say where things are, so its views may differ.
pictures_of = $$(sed -n 's|^  train: \(data/[^/]*\)/.*|\1|p' experiments/tokenizer/$*.yaml)

data/tokens/%/manifest.json: checkpoints/tokenizers/%/config.json | $(VENV)/.installed-t2i
	@$(MAKE) "$(pictures_of)/manifest.json"
	$(V2FLOW) data tokens checkpoints/tokenizers/$* --data "$(pictures_of)/*.tar" --out data/tokens/$* \
	  $(if $(findstring openmoji,$*),--views 6)
	@touch $@

.PRECIOUS: checkpoints/tokenizers/%/config.json

$(DOMAINS): | $(VENV)/.installed-domains
	$(V2FLOW) data domains --out data/domains

# One stamp for each set of extras; a change of the dependencies installs again.
EXTRAS_cli := cli
EXTRAS_t2i := cli,t2i
EXTRAS_benchmark := cli,benchmark
EXTRAS_demo := cli,t2i,demo
EXTRAS_domains := cli,benchmark,domains
EXTRAS_test := cli,test,t2i,demo,benchmark
EXTRAS_lint := cli,test,t2i,demo,benchmark,lint
EXTRAS_docs := cli,t2i,benchmark,docs

$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "v2flow: installing packages into $(VENV); the first time this takes some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS_$*)]"
	@touch $@

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "v2flow: error: no Python found; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv "$(VENV)"
