# Every target makes the environment it needs. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# test-fast: identities, one step of each kind, twins of the rollouts and log-probs, bad input.
FAST := $(addprefix tests/test_,$(addsuffix .py,losses kl advantages weights selectors types imports \
  config step step_options golden_steps one_step rollout logprobs optim readme))
# One thread a test process, nothing from the network.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONPATH=.

.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast check first-result examples question question-quick figures real crash measure golden mutants compat bench gpu

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

$(BIN)/.run: pyproject.toml constraints.txt
	@echo "installing rlkl into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[plots,wandb]'
	@touch $@

$(BIN)/.dev: $(BIN)/.run
	@echo "installing the test tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(BIN)/.real: $(BIN)/.dev
	@echo "installing what reads GGUF files into $(VENV)"
	@$(PIP) gguf
	@touch $@

setup: $(BIN)/.dev  ## the environment, test tools included

train: $(BIN)/.run  ## train the tiny model by reinforcement learning: about 3 minutes on 2 cores, no download
	@$(BIN)/python train.py configs/tiny-grpo.yaml

test: $(BIN)/.dev  ## all tests, one process a core: about 5 minutes on 2 cores
	@$(TEST) $(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(BIN)/.dev  ## what one runs after each change: within a minute
	@$(TEST) $(BIN)/python -m pytest -n auto --dist worksteal $(FAST)

check: $(BIN)/.dev  ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

first-result: $(BIN)/.run  ## GRPO and PPO from 10 base models on 3 kinds of CPU, and controls: about an hour on 2 cores; resumable
	@$(BIN)/python -m benchmarks.first_result

question: $(BIN)/.run  ## KL or trust region? 44 settings of 3 seeds each, half an hour on 2 cores; resumable
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.question.grid

question-quick: $(BIN)/.run  ## its four corners at 16 epochs, one seed: 3 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.question.grid --quick

figures: $(BIN)/.run  ## the pictures and tables of docs/question-results.md: make figures RESULTS=runs/question/arms.jsonl
	@$(BIN)/python -m benchmarks.question.figures $(RESULTS)
	@$(BIN)/python -m benchmarks.question.tables $(RESULTS)

examples: $(BIN)/.dev  ## every config for a CPU, end to end, in one table: about 20 minutes
	@$(BIN)/python -m benchmarks.examples

measure: $(BIN)/.dev  ## every config for a CPU as it stands, and the tables of the pages from it: about 40 minutes
	@$(BIN)/python -m benchmarks.measured

real: $(BIN)/.real  ## PPO and GRPO on a pre-trained model from the package index, 3 seeds and a control; resumable, 40 minutes on 2 cores
	@$(BIN)/python -m benchmarks.real.runs

crash: $(BIN)/.dev  ## kill -9 at 20 random moments, resumed each time, against an uninterrupted run
	@$(TEST) $(BIN)/python tests/crash.py

golden: $(BIN)/.dev  ## the numbers of TRL, verl and NeMo-RL in tests/golden again: make golden ORACLES=folder
	@$(TEST) $(BIN)/python tests/golden/freeze.py $(ORACLES)

mutants: $(BIN)/.dev  ## one-line bugs, each of which a test must notice
	@$(TEST) $(BIN)/python tests/mutants.py

compat:  ## the tests on the oldest supported versions, in an environment of their own
	@$(PYTHON) -m venv $(VENV)-compat
	@$(VENV)-compat/bin/python -m pip install -q --disable-pip-version-check -c tests/compat.txt -e '.[plots,wandb,lora,tasks]' pytest hypothesis
	@$(TEST) $(VENV)-compat/bin/python -m pytest

bench: $(BIN)/.run  ## seconds of each phase of a step; log-probs: time, memory and error; rollouts against generate
	@$(BIN)/python -m benchmarks.step
	@$(BIN)/python -m benchmarks.logprobs
	@$(BIN)/python -m benchmarks.rollout

gpu:  ## what only a GPU can measure, 30 minutes, with the python3 at hand; resumable, installs nothing
	@PYTHONPATH=wheels python3 -m benchmarks.gpu_day all --minutes 30
