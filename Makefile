# CapRL from images to tables. `make` alone prints what there is to make.
#   make reproduce PROFILE=smoke     PROFILE is smoke, mini (default), one_gpu or paper
# A notebook is out of date when its source, the package, a config or the notebook before it in the chain is newer than
# its executed copy, or when a record or report that it made is gone. Running it again is cheap: each run in it goes on
# from its own rows, or is found complete.

PROFILE ?= mini
PY ?= .venv/bin/python
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export CAPRL_SET := $(or $(SET),$(CAPRL_SET))

# A misspelt variable (PROFIL=smoke) would be passed over without a word, and the wrong thing made for half an hour.
VARIABLES := PROFILE SET PY CAPRL_RUNS CAPRL_SET MODEL PORT ARGS ITEM LAB_ARGS BENCH TESTS SIZE PYTHON PYTHONPATH
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
UNKNOWN := $(firstword $(filter-out $(VARIABLES) MAKEFLAGS MAKEOVERRIDES -*-%,$(GIVEN)))
ifneq ($(UNKNOWN),)
MEANT := $(shell python3 -c "from caprl_utils.errors import did_you_mean as d; print(d('$(UNKNOWN)', '$(VARIABLES)'.split()))" 2> /dev/null)
$(error unknown variable $(UNKNOWN)$(MEANT); known: $(VARIABLES); a setting of the profile: SET="rl.steps=10")
endif

PROFILES := $(basename $(notdir $(wildcard configs/profiles/*.yaml)))
ifneq ($(words $(PROFILE)) $(filter-out $(PROFILES),$(PROFILE)),1 )
$(error unknown profile '$(PROFILE)'; known profiles: $(PROFILES))
endif

quoted = '$(subst ','\'',$(1))'
RUNS := $(or $(CAPRL_RUNS),runs)
ifneq ($(words $(RUNS)),1)  # make splits names at spaces: a link without them stands for such a folder
RUNS := $(shell folder="$$(realpath -m $(call quoted,$(CAPRL_RUNS)))"; link=.tools/runs-$$(cksum <<< "$$folder" | cut -d' ' -f1); \
	mkdir -p .tools "$$folder"; ln -sfn "$$folder" $$link; echo $$link)
endif
REPORT := $(RUNS)/$(PROFILE)/reports
COPIES := $(RUNS)/$(PROFILE)/notebooks
LOCK := requirements/main-$(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu).lock
UV := .tools/bin/uv
CAPRL := $(PY) -m caprl_utils
RUN := $(CAPRL) run --profile $(PROFILE)

# The notebooks in the order in which each needs the ones before it; 03-all is 03 with the trainings of every table.
CHAIN := 01_qa_curation 03_caprl_rl_training 04_prism_evaluation 05_llamafactory_pretraining 06_tables_and_figures
WHOLE := $(CHAIN:03_caprl_rl_training=03_caprl_rl_training-with_ablations-True)
SLICE := $(filter-out 05_%,$(CHAIN))
# Notebooks that no table needs; SHOWN of them are published too.
SHOWN := 00_quickstart_captioning 02_initialize_vlm_3b
EXTRA := $(SHOWN) colab_caption_your_images 07_rewards_on_one_footing
# `make reproduce` goes along the whole chain, `make table3` along its slice; a notebook asked for by name runs alone.
ORDER := $(if $(filter reproduce,$(MAKECMDGOALS)),$(WHOLE),$(if $(filter slice,$(MAKECMDGOALS)),$(SLICE)))
# SET="rl.steps=10 ..." overrides settings; a change of it is a change of the inputs.
$(shell test "$$(cat $(COPIES)/.set 2> /dev/null)" = $(call quoted,$(CAPRL_SET)) || \
	{ mkdir -p $(COPIES); echo $(call quoted,$(CAPRL_SET)) > $(COPIES)/.set; })
INPUTS := $(wildcard $(COPIES)/.set) $(shell find caprl_utils configs reports/paper -type f -not -name '*.pyc')

# $(call before,NAME): the executed copy before NAME in ORDER. $(call lost,NAME): FORCE when a file that it made is gone.
before = $(firstword $(subst :, ,$(filter %:$(1),$(join $(addprefix $(COPIES)/,$(addsuffix .ipynb:,$(ORDER))),$(wordlist 2,9,$(ORDER))))))
lost = $(shell test ! -s $(COPIES)/$(1).files || xargs -d '\n' ls < $(COPIES)/$(1).files > /dev/null 2>&1 || echo FORCE)

##@ Set up
setup: setup-main setup-llamafactory setup-tokenizer ## build both environments from their lock files

setup-main: ## only the main environment (.venv)
	@requirements/install.sh .venv $(LOCK)

setup-llamafactory: ## only LLaMA-Factory's own (.venv-llamafactory)
	@requirements/install.sh .venv-llamafactory requirements/llamafactory.lock

setup-tokenizer: ## only what tests fetch: a tokenizer, a small reader
	@requirements/tokenizer.sh

lock: ## resolve requirements/*.in again into the lock files
	@test -x $(UV) || { echo "no uv yet: run \`make setup\`" >&2; exit 1; }
	$(UV) pip compile --python-version 3.11 requirements/main-gpu.in -o requirements/main-gpu.lock
	$(UV) pip compile --python-version 3.11 --override requirements/overrides-cpu.txt \
		requirements/main-cpu.in -o requirements/main-cpu.lock
	$(UV) pip compile --python-version 3.11 requirements/llamafactory.in -o requirements/llamafactory.lock

##@ Reproduce
reproduce: $(WHOLE:%=$(COPIES)/%.ipynb) ## every table and figure of the paper, from images to the report
	@echo "$(PROFILE): everything is up to date. Tables, figures and verdicts: $(REPORT)/report.html (one page, any browser)"

$(CHAIN) $(EXTRA): %: $(COPIES)/%.ipynb ## one notebook by its name, e.g. make 01_qa_curation

# One rule a notebook: NAME, executed copy, parameters.
define notebook
$(COPIES)/$(2).ipynb: notebooks/$(1).ipynb $(INPUTS) $(call before,$(2)) $(call lost,$(2)) | environment
	@$(RUN) $(1)$(3:%=:%) --chain "$(ORDER)"
endef
$(foreach name,$(CHAIN) $(EXTRA),$(eval $(call notebook,$(name),$(name))))
$(eval $(call notebook,03_caprl_rl_training,03_caprl_rl_training-with_ablations-True,with_ablations=True))

table1: ## Table 1: VLMs pretrained on caption sets
table2: ## Table 2: the same images with other captions
table3: $(REPORT)/table3.md ## Table 3: caption quality in the Prism framework
table4: ## Table 4: questions per image
table5: ## Table 5: answer rounds in the reward
table6: ## Table 6: leaking questions
figure4: ## Figure 4: growing caption sets
figures: figure4 ## Figures 1c, 4 and 5
extras: ## our own tables: length term, swap of readers, other starts, a reader from outside
rewards: ## eight rewards on one footing: CapRL's and those of papers after it

$(REPORT)/table3.md: $(COPIES)/01_qa_curation.ipynb FORCE
	@$(PY) -m caprl_utils train --table3 --profile $(PROFILE)
	@$(MAKE) --no-print-directory slice

slice: $(SLICE:%=$(COPIES)/%.ipynb)

table1 table2 figure4: $(COPIES)/01_qa_curation.ipynb $(COPIES)/03_caprl_rl_training.ipynb
	@$(CAPRL) train $@ --profile $(PROFILE)
	@$(CAPRL) report $@ --profile $(PROFILE)

figures_ITEMS := figure1c figure5_left figure5_right
# other captioners to start from are the mini world's: one_gpu has no model of 72B
extras_ITEMS := extra_length extra_readers $(if $(filter mini,$(PROFILE)),extra_start) extra_outside
table4 table5 table6 figures extras: $(COPIES)/01_qa_curation.ipynb
	@$(CAPRL) report $(or $($@_ITEMS),$@) --train --profile $(PROFILE)

rewards: $(COPIES)/01_qa_curation.ipynb
	@$(CAPRL) report extra_rewards --train --profile $(PROFILE)
	@$(MAKE) --no-print-directory 07_rewards_on_one_footing

report: environment ## tables, figures, claims, the one HTML page, and model and data cards, from what is there
	@$(CAPRL) report --profile $(PROFILE)

publish: $(SHOWN:%=$(COPIES)/%.ipynb) ## copy reports and executed notebooks of PROFILE into reports/, its results into README's map
	@$(CAPRL) report --publish --profile $(PROFILE)

plan: environment ## what PROFILE needs before it starts: hardware, hours, disk, and what is missing
	@$(CAPRL) plan --profile $(PROFILE)

config: environment ## all settings of PROFILE, each with its source
	@$(CAPRL) config $(PROFILE)

zoo: environment ## train the small models of the mini world from nothing
	$(PY) -m caprl_utils.mini.zoo.train

trace: environment ## a printed number back to its run: make trace ITEM="table3 CapRL mini-chart"
	@$(CAPRL) trace "$(ITEM)" --profile $(PROFILE)

##@ Use
serve: environment ## serve MODEL (zoo:NAME, a folder, a hub id) with vLLM at PORT until Ctrl-C (ARGS: more options)
	@test -n "$(MODEL)" || { echo "error: name a model, for example: make serve MODEL=zoo:base" >&2; exit 1; }
	@$(PY) -m caprl_utils serve "$(MODEL)" $(if $(PORT),--port $(PORT)) $(ARGS)

##@ Look and check
lab: environment ## open the notebooks in JupyterLab (LAB_ARGS="--no-browser --port 8889": its options)
	JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter" "$(PY)" -m jupyterlab --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks/start.md $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

bench: environment ## speed against the baselines (BENCH="client reward": only these)
	@$(PY) tests/bench $(BENCH)

check-gpu: environment ## what only a GPU can tell, in minutes: random weights at true 3B sizes (SIZE=tiny: on a CPU)
	@$(PY) tests/bench/check_gpu.py --size $(or $(SIZE),3b)

test: lint test-fast test-notebooks ## all checks: style, unit tests, smoke chain and notebooks

lint: environment ## style, also of the notebooks, and which room imports which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(dir $(PY))lint-imports --no-cache

test-fast: environment ## unit tests, offline
	$(PY) -m pytest -n 2 --dist loadfile -p no:nbval -m "not integration and not notebooks"

test-integration: environment ## tests that train or start servers (TESTS="tests/rl ...": only these)
	$(PY) -m pytest -m integration -p no:nbval $(WORKERS) $(TESTS)

test-engines: TESTS := tests/models tests/pretraining/test_llamafactory.py tests/pretraining/test_notebook_05.py tests/rl \
	tests/vlm_init tests/curation/test_pipeline.py tests/bench/test_check_gpu.py
test-engines: WORKERS := -n 2 --dist loadfile
test-engines: test-integration ## of these, the real vLLM, LLaMA-Factory and TRL, and what the sizes that need GPUs run

# The chain from nothing in a folder of its own, then nbval: every cell again, saved outputs compared where marked.
test-notebooks: export CAPRL_RUNS := $(CURDIR)/runs/test
test-notebooks: environment ## the runner, the smoke chain from nothing, then nbval over the notebooks
	$(PY) -m pytest -n 2 --dist loadfile -p no:nbval -m notebooks tests/notebooks
	rm -rf "$$CAPRL_RUNS"
	$(MAKE) --no-print-directory reproduce PROFILE=smoke
	$(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -o timeout=900 \
		$(EXTRA:%=notebooks/%.ipynb) $(CHAIN:%=notebooks/%.ipynb)

clean: ## remove what PROFILE computed (published reports stay)
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

.PHONY: slice setup setup-main setup-llamafactory setup-tokenizer lock reproduce $(CHAIN) $(EXTRA) table1 table2 table3 table4 table5 table6 figure4 \
	figures extras rewards report publish plan serve bench check-gpu config trace zoo lab test lint test-fast test-integration test-engines test-notebooks clean help \
	environment FORCE
