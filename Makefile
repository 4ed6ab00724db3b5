# make setup | demo | test | campaign | lint | bench | bench-gpu
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-for-demo
# Modules are compiled when they are first imported: most never are. And then kept, also where the
# environment says otherwise: every process would compile torch and diffusers again, for 10 seconds.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test campaign lint bench bench-gpu clean

setup: $(STAMP)

# torch goes first: a looser request would bring gigabytes of CUDA packages to a CPU machine.
$(DEMO_STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade-strategy only-if-needed "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -c constraints.txt -e ".[plots,rewards,demo]"
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(INSTALL) -c constraints.txt -e ".[plots,rewards,demo,app,dev]"
	touch $@

demo: $(DEMO_STAMP)
	$(BIN)/python examples/demo.py --output_dir outputs/demo

# One thread each: the models are tiny, and tests that start several processes would fight for the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Some 2,000 altered artifacts are loaded and 24 runs killed; half an hour on two cores.
campaign: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.campaign

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/forgetting_on_digits.py
	$(BIN)/python benchmarks/forgetting_on_digits.py --model examples/digits_flux2/model
	$(BIN)/python benchmarks/debleeding_on_digits.py
	$(BIN)/python benchmarks/editing_on_digits.py
	$(BIN)/python benchmarks/near_concepts_on_digits.py
	$(BIN)/python benchmarks/editing_on_digits.py --model examples/digits_flux2/model
	$(BIN)/python benchmarks/strength_of_edits_on_digits.py
	$(BIN)/python benchmarks/cost_of_statistics.py
	$(BIN)/python benchmarks/precision_of_statistics.py --prompts 16
	$(BIN)/python benchmarks/real_sizes.py
	$(BIN)/python benchmarks/editing_real_sizes.py
	$(BIN)/python benchmarks/golden_noise_on_digits.py
	$(BIN)/python benchmarks/golden_noise_on_distilled_digits.py
	$(BIN)/python benchmarks/low_bands_on_digits.py
	$(BIN)/python benchmarks/noise_guard_on_digits.py
	$(BIN)/python benchmarks/diversity_on_digits.py
	$(BIN)/python benchmarks/cost_of_golden_noise.py
	$(BIN)/python benchmarks/cost_of_npnet.py
	$(BIN)/python benchmarks/pair_generation.py
	$(BIN)/python benchmarks/concept_mask_on_moving_digits.py
	$(BIN)/python benchmarks/erasure_on_moving_digits.py
	$(BIN)/python benchmarks/erasure_on_moving_digits.py --model examples/moving_digits_wan/model --parts erasers pairs stack table
	$(BIN)/python benchmarks/cost_of_eraser.py
	$(BIN)/python benchmarks/cost_of_eraser.py --wan
	$(BIN)/python benchmarks/cost_of_eraser.py --inference
	$(BIN)/python benchmarks/cost_of_plans.py

# At most 8 minutes, on an H100-class card; `ARGS=--toy` rehearses without one.
bench-gpu: setup
	$(BIN)/python benchmarks/on_gpu.py $(ARGS)

clean:
	rm -rf $(VENV) outputs build *.egg-info
