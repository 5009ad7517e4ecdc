# make demo [QUICK=1] [STUDY=demo-study]   the whole path on the embedded default model
# make test                                set up what the tests need and run them
# make check                               lint, types and tests: what CI runs
# make bench [ONLY=train,record]           measure against peers, in an environment of their own (ONLY=judge: apart)

# Any pip arguments: another version, or a CPU-only build by adding --index-url.
TORCH ?= torch==2.13.0
STUDY ?= demo-study
QUICK ?=
# Tests run in as many processes as there are cores, each with one thread.
JOBS ?= auto
TESTS ?= tests

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c .venv/torch.txt

.PHONY: demo test bench lint types check format venv clean distclean

demo: .venv/made-demo
	$(BIN)/lorascope demo $(STUDY) $(if $(QUICK),--quick)

test: .venv/made-test
	@chromium=$$(sh scripts/find_chromium.sh $(BIN)/python) || exit 2; \
	LORASCOPE_CHROMIUM="$$chromium" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --cov=lorascope $(TESTS)

bench: .venv-bench/made
	.venv-bench/bin/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY))

lint: .venv/made-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/made-dev
	$(BIN)/mypy

check: lint types test

format: .venv/made-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/made-demo

# Torch comes first and is then held where it is, so that no later package replaces it by another build.
.venv/torch.txt:
	sh scripts/make_venv.sh .venv
	@echo "Installing $(TORCH) (once, some minutes)"
	$(BIN)/python -m pip --disable-pip-version-check install -q $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@.part
	@mv $@.part $@

.venv/made-demo: .venv/torch.txt pyproject.toml
	@echo "Installing lorascope and what it needs (once, about a minute)"
	$(PIP) -e '.[peft,web,math]'
	@touch $@

.venv/made-test: .venv/torch.txt pyproject.toml
	@echo "Installing what the tests need (once, about a minute)"
	$(PIP) -e '.[test]'
	@touch $@

.venv/made-dev: .venv/torch.txt pyproject.toml
	@echo "Installing the linter and the type checker (once)"
	$(PIP) -e '.[peft,web,math,dev]'
	@touch $@

# The peers bring packages that the project must not depend on. dictionary-learning asks for an old torch, but only its
# trainer is used, which needs einops alone.
.venv-bench/made: .venv/torch.txt pyproject.toml
	sh scripts/make_venv.sh .venv-bench
	@echo "Installing the peers that the benchmarks measure against (once, about two minutes)"
	.venv-bench/bin/python -m pip --disable-pip-version-check install -q $(TORCH)
	.venv-bench/bin/python -m pip --disable-pip-version-check install -q -c .venv/torch.txt -e '.[peft,judge]' trl sae-lens nnsight einops matplotlib
	.venv-bench/bin/python -m pip --disable-pip-version-check install -q --no-deps dictionary-learning
	@touch $@

clean:
	rm -rf build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-bench
