# make setup | demo | test | test-oldest | test-newest | test-python | test-versions | campaign | lint | bench | bench-gpu
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

.PHONY: setup demo test test-oldest test-newest test-python test-versions sample-oldest sample-newest exchange-oldest exchange-newest compatibility campaign lint bench bench-gpu clean

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

# The lowest versions that setup.cfg allows, and the newest of all but torch. Each environment is its own; all tests.
EXTRAS := plots,rewards,demo,app
TESTERS := pytest pytest-timeout pytest-xdist tensorboard selenium markdown-it-py
TORCH := "$$(grep '^torch==' constraints.txt)"
OLDEST := .venv-oldest/bin/python
NEWEST := .venv-newest/bin/python
QUIETLY := -m pip install --quiet --no-compile
SUITE := -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Fingerprints, folders and the Hub, a run of each trainer, a picture or clip of each family.
SAMPLE := tests/versions tests/hub/test_push.py tests/eraser/test_load.py \
	tests/training/test_train_nullspace_dreambooth.py::test_saved_statistics_stand_for_the_prompts \
	tests/training/test_eraser_run.py::test_a_run_is_a_function_of_its_seed \
	tests/training/test_train_npnet.py::test_npnet_learns_too \
	tests/golden_noise/test_pipelines.py::test_without_a_network_or_at_scale_zero_it_is_the_plain_pipeline

.venv-oldest/.installed-for-sample: setup.cfg constraints-oldest.txt
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) $(QUIETLY) --upgrade-strategy only-if-needed $(TORCH)
	$(OLDEST) $(QUIETLY) -c constraints-oldest.txt -e ".[demo]" pytest pytest-timeout
	touch $@

.venv-newest/.installed-for-sample: setup.cfg
	test -x $(NEWEST) || $(PYTHON) -m venv .venv-newest
	$(NEWEST) $(QUIETLY) --upgrade-strategy only-if-needed $(TORCH)
	$(NEWEST) $(QUIETLY) --upgrade --upgrade-strategy eager $(TORCH) -e ".[demo]" pytest pytest-timeout
	touch $@

.venv-oldest/.installed: .venv-oldest/.installed-for-sample
	$(OLDEST) $(QUIETLY) -c constraints-oldest.txt -e ".[$(EXTRAS)]" $(TESTERS)
	touch $@

.venv-newest/.installed: .venv-newest/.installed-for-sample
	$(NEWEST) $(QUIETLY) --upgrade --upgrade-strategy eager $(TORCH) -e ".[$(EXTRAS)]" $(TESTERS)
	touch $@

test-oldest: .venv-oldest/.installed
	-OMP_NUM_THREADS=1 $(OLDEST) $(SUITE) --junit-xml outputs/oldest.xml
	$(OLDEST) docs/compatibility_table.py oldest outputs/oldest.xml

test-newest: .venv-newest/.installed
	-OMP_NUM_THREADS=1 $(NEWEST) $(SUITE) --junit-xml outputs/newest.xml
	$(NEWEST) docs/compatibility_table.py newest outputs/newest.xml

# All tests under another Python, with the versions of constraints.txt: `make test-python PYTHON=python3.12`.
OTHER := .venv-$(notdir $(PYTHON))
test-python:
	$(MAKE) setup VENV=$(OTHER)
	-OMP_NUM_THREADS=1 $(OTHER)/bin/python $(SUITE) --junit-xml outputs/$(notdir $(PYTHON)).xml
	$(OTHER)/bin/python docs/compatibility_table.py $(notdir $(PYTHON)) outputs/$(notdir $(PYTHON)).xml

# A sample of both, and every kind of artifact written by each and read by the other. Two at a time: `make -j2`.
test-versions: exchange-oldest exchange-newest

sample-oldest: .venv-oldest/.installed-for-sample
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest -q $(SAMPLE) --junit-xml outputs/oldest-sample.xml
	rm -rf outputs/exchange/oldest
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST) -m tests.versions.exchange write outputs/exchange/oldest

sample-newest: .venv-newest/.installed-for-sample
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest -q $(SAMPLE) --junit-xml outputs/newest-sample.xml
	rm -rf outputs/exchange/newest
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(NEWEST) -m tests.versions.exchange write outputs/exchange/newest

exchange-oldest: sample-oldest sample-newest
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST) -m tests.versions.exchange read outputs/exchange/newest

exchange-newest: sample-oldest sample-newest
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(NEWEST) -m tests.versions.exchange read outputs/exchange/oldest

# Rows of the page on versions, of what `make test-versions` has run.
compatibility: test-versions
	$(OLDEST) docs/compatibility_table.py "oldest, sample" outputs/oldest-sample.xml
	$(NEWEST) docs/compatibility_table.py "newest, sample" outputs/newest-sample.xml

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
	$(BIN)/python benchmarks/training_options.py
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
	rm -rf $(VENV) .venv-* outputs build *.egg-info
