# Every target does its own set-up: on a fresh machine `make demo` and `make test` need only Python and make.
PYTHON ?= python3
SEEDS  ?= 200
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# Tests and measurements send no usage reports from the machine that runs them.
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help test test-fast check format demo sim bench kill-runs delivery nexmark bench-nexmark clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("rayflow needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

test: $(READY) ## every test, as in CI
	$(BIN)/pytest -q -n auto --maxprocesses 4 -m "not ray" --durations=15
	$(BIN)/pytest -q -m ray --durations=15

test-fast: $(READY) ## the tests that need no cluster and no patience
	$(BIN)/pytest -q -n auto --maxprocesses 4 -m "not slow and not ray" --durations=5

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## rewrite the sources in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY) ## real flights, a worker killed in the middle, the same answer as DuckDB
	$(BIN)/python examples/flights.py

sim: $(READY) ## the simulator: SEEDS=200 runs, or SEED=42 replays one
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

bench: $(READY) ## every figure, as JSON lines and a table
	$(BIN)/python -m benchmarks

kill-runs: $(READY) ## runs with SIGKILL at random moments, compared with DuckDB
	$(BIN)/python -m benchmarks.kill_runs

delivery: $(READY) ## Kafka to every sink with SIGKILL in turn and servers away, read back exactly: ROUNDS=20
	$(BIN)/python -m benchmarks.delivery_kills --rounds $(or $(ROUNDS),20) --outage 10

nexmark: $(READY) ## every Nexmark query through a kill, equal to DuckDB
	$(BIN)/python -m examples.nexmark --events 200000 --out-of-order 1s --kill

bench-nexmark: $(READY) ## every Nexmark query beside DuckDB and, with a Java, Flink: EVENTS=2000000
	$(BIN)/python -m benchmarks.nexmark --events $(or $(EVENTS),2000000)

clean: ## remove what the targets made, the environment too
	rm -rf $(VENV) build dist out checkpoints *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
