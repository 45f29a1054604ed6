# CapRL from images to tables. `make` alone prints what there is to make.
#   make reproduce PROFILE=smoke     PROFILE is smoke, mini (default), one_gpu or paper
# What is out of date is decided by content (caprl_utils/runner/stamps.py), so the targets always ask the runner.

PROFILE ?= mini
PY ?= .venv/bin/python
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

PROFILES := $(basename $(notdir $(wildcard configs/profiles/*.yaml)))
ifeq ($(filter $(PROFILE),$(PROFILES)),)
$(error unknown profile '$(PROFILE)'; known profiles: $(PROFILES))
endif

RUNS := $(or $(CAPRL_RUNS),runs)
REPORT := $(if $(filter smoke,$(PROFILE)),$(RUNS)/smoke/reports,reports/$(PROFILE))
LOCK := requirements/main-$(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu).lock
UV := .tools/bin/uv
RUN := $(PY) -m caprl_utils.runner --profile $(PROFILE)

# The notebooks in the order in which each needs the ones before it.
CHAIN := 01_qa_curation 03_caprl_rl_training 05_prism_evaluation 06_tables_and_figures
# The same with the trainings of every table: what `make reproduce` runs.
WHOLE := $(CHAIN:03_caprl_rl_training=03_caprl_rl_training:with_ablations=True)
# Notebooks that no table needs.
EXTRA := 00_quickstart_captioning 02_initialize_vlm_3b

##@ Set up
setup: ## build the main environment (.venv) from its lock file
	@requirements/install.sh .venv $(LOCK)

setup-llamafactory: ## build LLaMA-Factory's own environment (.venv-llamafactory)
	@requirements/install.sh .venv-llamafactory requirements/llamafactory.lock

setup-all: setup setup-llamafactory ## both environments

lock: ## resolve requirements/*.in again into the lock files
	@test -x $(UV) || { echo "no uv yet: run \`make setup\`" >&2; exit 1; }
	$(UV) pip compile --python-version 3.11 requirements/main-gpu.in -o requirements/main-gpu.lock
	$(UV) pip compile --python-version 3.11 --override requirements/overrides-cpu.txt \
		requirements/main-cpu.in -o requirements/main-cpu.lock
	$(UV) pip compile --python-version 3.11 requirements/llamafactory.in -o requirements/llamafactory.lock

##@ Reproduce
reproduce: environment ## from images to Table 3, with its figures
	@$(RUN) $(CHAIN)
	@$(if $(filter smoke,$(PROFILE)),true,$(PY) -m caprl_utils.reporting.readme_map)  # README's map, from results

$(CHAIN): environment ## one notebook by its name, e.g. make 01_qa_curation
	@$(RUN) $@

$(EXTRA): environment
	@$(RUN) $@

table3: $(REPORT)/table3.md ## Table 3: caption quality in the Prism framework

$(REPORT)/table3.md: environment FORCE
	@$(RUN) $(CHAIN)

ablations: environment ## all trainings behind Tables 4 to 6 and Figures 1c and 5, then their tables
	@$(RUN) 01_qa_curation 03_caprl_rl_training:with_ablations=True 05_prism_evaluation 06_tables_and_figures

table1: later ## Table 1: benchmarks after pretraining (not yet)
table2: later ## Table 2: the same images with other captions (not yet)
table4: ## Table 4: questions per image, trained and evaluated as needed
table5: ## Table 5: answer rounds in the reward
table6: ## Table 6: leaking questions
figures: ## Figures 1c and 5: three rewards, kinds and number of training images (Figure 4: not yet)
extras: ## our own tables: dice in the reward, length term, swap of readers

figures_ITEMS := figure1c figure5_left figure5_right
extras_ITEMS := extra_dice extra_length extra_readers
table4 table5 table6 figures extras: environment
	@$(RUN) 01_qa_curation
	@$(PY) -m caprl_utils.reporting.ablations $(or $($@_ITEMS),$@) --train --profile $(PROFILE)
plan: environment ## what PROFILE needs before it starts: commands, hardware, hours, disk, cost, and what is missing
	@$(PY) -m caprl_utils.planning --profile $(PROFILE) $(WHOLE)

later:
	@echo "not part of the repository yet: $(MAKECMDGOALS)" >&2; exit 1

config: environment ## all settings of PROFILE, each with its source
	@$(PY) -m caprl_utils.config show $(PROFILE)

zoo: environment ## train the small models of the mini world from nothing
	$(PY) -m caprl_utils.mini.zoo

trace: environment ## a printed number back to its run: make trace ITEM="table3 CapRL mini-chart"
	@$(PY) -m caprl_utils.reporting.trace "$(ITEM)" --profile $(PROFILE)

##@ Use
serve: environment ## serve MODEL (zoo:NAME, a folder, a hub id) with vLLM at PORT until Ctrl-C
	@test -n "$(MODEL)" || { echo "error: name a model, for example: make serve MODEL=zoo:vlm-3b" >&2; exit 1; }
	@$(PY) -m caprl_utils.backends.server "$(MODEL)" $(if $(PORT),--port $(PORT))

##@ Look and check
lab: environment ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab --ServerApp.root_dir=$(CURDIR) --LabApp.default_url=/lab/tree/notebooks

bench: environment ## speed against the baselines (BENCH="client scoring": only these)
	@$(PY) -m caprl_utils.bench $(BENCH)

test: lint test-fast test-notebooks ## all checks: style, unit tests, smoke chain and notebooks

lint: environment ## style, also of the notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test-fast: environment ## unit tests, offline
	$(PY) -m pytest

test-integration: environment ## tests that train or start servers
	$(PY) -m pytest -m integration

# The chain from nothing in a folder of its own, then nbval: every cell again, saved outputs compared where marked.
test-notebooks: export CAPRL_RUNS := $(CURDIR)/runs/test
test-notebooks: environment ## the smoke chain from nothing, then nbval over the notebooks
	rm -rf "$$CAPRL_RUNS"
	$(MAKE) --no-print-directory reproduce PROFILE=smoke
	$(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -o timeout=900 \
		$(EXTRA:%=notebooks/%.ipynb) $(CHAIN:%=notebooks/%.ipynb)

clean: ## remove what PROFILE computed (reports stay)
	rm -rf "$(RUNS)/$(PROFILE)"

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9_$$()A-Z-]+:.*## / { sub(/^\$$\(CHAIN\)/, "NN_notebook"); printf "  make %-20s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))
	@printf '\nProfiles: %s (PROFILE=%s)\n' "$(PROFILES)" "$(PROFILE)"

environment:
	@test -x "$$(command -v $(PY))" || { echo "error: no environment yet ($(PY)); run \`make setup\`" >&2; exit 1; }

FORCE:

.PHONY: setup setup-llamafactory setup-all lock reproduce ablations $(CHAIN) $(EXTRA) table1 table2 table3 table4 table5 table6 \
	figures extras plan serve bench later config trace zoo lab test lint test-fast test-integration test-notebooks clean help \
	environment FORCE
