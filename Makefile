# Every target sets itself up from nothing: Python 3.11 or later is all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: run test lint kill-test bench throughput growth serving-bench fuzz crowd soak test-oldest vllm-bench vllm-test detector stability report docs package-check clean

run: $(VENV)/.installed
	$(BIN)/arskit run --strategy progressive --optimizer ars

# As many processes as cores; one thread each, or they would fight over them. A file stays in one
# process, so that what its tests share is made once; tests/conftest.py has the long ones go first.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		-m "not slow and not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# With the oldest versions that pyproject.toml allows; some warn of what newer ones have mended.
test-oldest: export OMP_NUM_THREADS ?= 1
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder -o filterwarnings=default -m "not slow and not gpu"

kill-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow tests/test_kill.py tests/test_strategy_runs.py \
		tests/test_out_of_memory.py tests/test_recovery.py

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/step_overhead.py --threads 1 --json benchmarks/results/step_overhead.json
	$(BIN)/python benchmarks/step_overhead.py --threads 1 --parts --json benchmarks/results/step_overhead.json
	$(BIN)/python benchmarks/evaluation.py --json benchmarks/results/evaluation.json

serving-bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow tests/test_benchmarks.py tests/test_exporting.py
	$(BIN)/python benchmarks/serving.py --json benchmarks/results/serving.json
	$(BIN)/python benchmarks/export.py --json benchmarks/results/export.json

throughput: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/throughput.py --threads 1 --json benchmarks/results/throughput.json
	$(BIN)/python benchmarks/kept_memory.py --json benchmarks/results/kept_memory.json

growth: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/growth.py --json benchmarks/results/growth.json

detector: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/detector.py

# At length what the tests do for seconds: 10,000 fuzzed requests, 200 clients that dawdle beside 20
# that do not, an hour under load.
fuzz: $(VENV)/.installed-dev
	ARSKIT_FUZZ_CASES=5000 $(BIN)/python -m pytest -q -s --timeout 0 tests/test_serving_fuzz.py

crowd: $(VENV)/.installed-dev
	ARSKIT_CROWD=200,20 $(BIN)/python -m pytest -q -s tests/test_serving_load.py -k crowd

SOAK_SECONDS ?= 3600
soak: $(VENV)/.installed-dev
	ARSKIT_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -q -s --timeout 0 \
		tests/test_serving_load.py -k memory

# After arskit serve --setup-vllm.
vllm-bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/serving.py --size 2M --size 55M --engine vllm --alone \
		--json benchmarks/results/serving_vllm.json

# From nothing: sets vLLM up (minutes, gigabytes), serves with it, asks, kills it. With
# ARSKIT_VLLM_TEST_HOME=folder what is set up stays there, and the next time is quick.
vllm-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -s --timeout 0 -m slow tests/test_vllm_for_real.py

# On the standard library's text; the published figures name theirs with --text.
stability: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/stability.py --full

# The default family with all its controls, and its report as the example in docs. To take a run that
# is there already: make report REPORT_RUN=folder REPORT_OPTIONS=--resume
REPORT_RUN ?= checkpoints
REPORT_OPTIONS ?= --controls scratch,no-growth,one-long-run,no-ars \
	--eval perplexity --eval bleu --eval generate --eval speed
report: $(VENV)/.installed
	$(BIN)/arskit run --out $(REPORT_RUN) $(REPORT_OPTIONS)
	cp $(REPORT_RUN)/report.md $(REPORT_RUN)/report.html docs/examples/report/

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

# With all that the wheel needs found and installed by pip, as a stranger has it done.
package-check: $(VENV)/.installed-dev
	ARSKIT_PACKAGE_WHOLE=1 $(BIN)/python -m pytest -q tests/test_package.py

# pip compiles modules one after another; on all cores it takes a fraction. Templates that a package
# ships as .py and that are no Python fail, and do not matter.
INSTALL = $(BIN)/python -m pip install -q --no-compile --constraint constraints.txt --editable
COMPILE = $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	$(COMPILE)
	touch $(VENV)/.installed $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
