# make demo         sets up, makes the built-in data, trains `tiny` with gated fusion, reports
# make demo-fashioniq   the same in FashionIQ's format, without the report
# make ablation     compares fusion off and its strategies on the built-in data, ten seeds each: an hour
# make ablation-switches   the same for gated fusion's switches, one at a time: about an hour
# make ablation-tokens     the same for fusion that edits each token in its own way: 104 trainings, two hours
# make ablation-negatives  SPRC with and without fusion against its batch, a bank, mined images, both: half an hour
# make ablation-noise      the same with 0, 20 and 50 % of wrong targets under two losses: 45 minutes
# make ablation-rerank     a re-ranker behind SPRC with and without fusion: half an hour
# make ablation-shares     plain SPRC and three strategies on 10 and 30 % of the training triplets: half an hour
# make app          a page to search pictures: an index of your own, or the demo's pictures
# make test         sets up the same and runs all tests (LAVIS's included)
# make test-quick   the same without the slow tests
# make test-numeric  runs the numeric tests as on other processors, and with two threads: a minute and a half
# make test-browser  clicks on the page in Chromium, which must be there (apt-get install chromium)
# make test-checkout  makes the calls of SPRC's scripts in SPRC's own environment (Python 3.9, torch 2.0.1)
# make test-modern  runs the tests on a newer Python, without LAVIS, with today's torch and transformers
# make test-gpu   runs the tests of a GPU, by the python3 that has torch: no network, no environment of its own
# make bench        measures speed and memory in 20 minutes: leave the machine alone meanwhile
# make setup        only the virtual environment

MODERN_PYTHON ?= 3.12
PYTHON ?= python3
CHECKOUT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.9.*/bin/python) 3.9)
UV := $(or $(shell command -v uv),.tools/bin/uv)

.PHONY: setup demo demo-fashioniq ablation ablation-switches ablation-tokens ablation-negatives \
	ablation-noise ablation-rerank ablation-shares app test test-quick test-numeric test-browser test-checkout \
	test-modern test-gpu bench
.DELETE_ON_ERROR:

setup: .venv/ready

# uv comes through pip into a folder of this project: nothing of the system is touched.
.tools/bin/uv:
	python3 -m pip install --quiet --disable-pip-version-check --target .tools uv

.venv/ready: requirements.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python 3.11 .venv
	$(UV) pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.txt
	touch $@

.venv-modern/ready: pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(MODERN_PYTHON) .venv-modern
	$(UV) pip install --quiet --compile-bytecode --python .venv-modern/bin/python -e '.[dev]'
	touch $@

.venv-checkout/ready: tests/requirements-checkout.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(CHECKOUT_PYTHON) .venv-checkout
	$(UV) pip install --quiet --compile-bytecode --python .venv-checkout/bin/python --no-deps -r tests/requirements-checkout.txt
	touch $@

demo: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/blip_fine_tune_2.py --dataset CIRR --backbone tiny --data-path demo \
		--feature-cache demo/features --cache-dtype float32 --num-epochs 8 --batch-size 64 --learning-rate 5e-4 \
		--num-workers 0 --save-training --save-best
	.venv/bin/python src/report_run.py

demo-fashioniq: .venv/ready
	.venv/bin/python src/make_demo_data.py --dataset FashionIQ --out demo
	.venv/bin/python src/blip_fine_tune_2.py --dataset FashionIQ --backbone tiny --data-path demo \
		--feature-cache demo/features --cache-dtype float32 --num-epochs 8 --batch-size 64 --learning-rate 5e-4 \
		--num-workers 0 --save-training --save-best

# Two cells at once, one core each.
ablation: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation.yaml --devices cpu cpu

ablation-switches: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation_switches.yaml --devices cpu cpu

ablation-tokens: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation_tokens.yaml --devices cpu cpu

ablation-negatives: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation_negatives.yaml --devices cpu cpu

ablation-noise: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation_noise.yaml --devices cpu cpu

ablation-rerank: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation --config configs/ablation_rerank.yaml --devices cpu cpu

ablation-shares: .venv/ready
	.venv/bin/python src/make_demo_data.py --out demo
	.venv/bin/python src/run_ablation.py --out ablation_share10 --config configs/ablation_share10.yaml --devices cpu cpu
	.venv/bin/python src/run_ablation.py --out ablation_share30 --config configs/ablation_share30.yaml --devices cpu cpu

app: .venv/ready
	.venv/bin/python src/app.py

test: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-quick: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not browser and not gpu'

# With ATen's kernels for processors without AVX-512 and without AVX2, and with a second thread. `test` has run the
# machine's own kernels with one thread. TorchDynamo is left out ("compiled"): its import is slow, and what it makes
# runs the same kernels.
NUMERIC := .venv/bin/python -m pytest -q -m numeric -k 'not compiled' tests/models/test_fusion.py tests/models/test_model_calls.py \
	tests/models/test_losses.py tests/models/test_vision_groups.py tests/training/test_grad_cache.py \
	tests/scoring/test_feature_cache.py
# Two passes at a time, a core each; threads and kernels of each are in its name.
test-numeric: .venv/ready
	$(MAKE) --no-print-directory -j 2 $(addprefix numeric-,1-default 1-avx2 2-default 2-avx2 2-own)

numeric-%:
	env $(if $(findstring own,$*),-u ATEN_CPU_CAPABILITY,ATEN_CPU_CAPABILITY=$(word 2,$(subst -, ,$*))) \
		OMP_NUM_THREADS=$(word 1,$(subst -, ,$*)) $(NUMERIC) $(if $(findstring 1-,$*),tests/models/test_against_lavis.py)

test-browser: .venv/ready
	.venv/bin/python -m pytest -m browser tests/search/test_browser.py

# Skipped, and counted as that, where there is no Python 3.9.
test-checkout: .venv/ready | $(UV)
	@if $(UV) python find --no-project $(CHECKOUT_PYTHON) > /dev/null 2>&1; then $(MAKE) .venv-checkout/ready; \
	else echo "no Python 3.9 here: fetch one with $(UV) python install 3.9, or give CHECKOUT_PYTHON=PATH"; fi
	.venv/bin/python -m pytest tests/models/test_sprc_checkout.py -k theirs

test-modern: .venv-modern/ready
	.venv-modern/bin/python -m pytest -n 2 --dist loadfile

# It takes torch, transformers, pandas, matplotlib, pytest and hypothesis as they are installed, and nothing else.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/machine/test_gpu.py

bench: .venv/ready
	.venv/bin/python benchmarks/run.py
