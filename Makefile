# Commands for people; each builds what it needs in .venv. TORCH may name another build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# What is run as Triton compiles it, too: a minute's worth.
EMULATED := $(addprefix tests/test_,emulator.py traffic.py walk.py scatter.py tiling.py)
EMULATED += -k "not small_images and not change_nothing"

.PHONY: demo test lint format bench clean

demo: .venv/demo.stamp  ## train a CNN with and without a spatial transformer; writes demo.png
	$(BIN)/python -m bench.demo

test: .venv/test.stamp  ## everything that needs no GPU, and what needs one where there is one
	$(BIN)/python -m pytest -n 2 --ignore tests/test_resources.py
	EMULATE=sm_90 $(BIN)/python -m pytest -n 2 $(EMULATED)
	$(BIN)/python -m pytest tests/test_resources.py

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/bench.stamp  ## workloads against torch, on whatever this machine has
	$(BIN)/python -m bench

# torch comes first and pinned: left to a range, pip may replace a CPU build by gigabytes of CUDA.
.venv/torch.stamp:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/%.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

.PRECIOUS: .venv/%.stamp

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png
