# Everything a clone needs: Python >= 3.11, make, git. The virtual environment is built from the lock file.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-bench/.installed
OLDEST ?= /usr/lib/postgresql/15/bin
# Tests start hundreds of Python processes: what they import is compiled once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
IN_PROCESSES := --numprocesses $(or $(PROCESSES),2) --dist loadscope --no-loadscope-reorder

.PHONY: setup demo test unit oldest-postgres chaos fuzz peers bench bench-quick simulate cures mutants soak memory docs sbom licences vulnerabilities packages lint types layers lock clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: setup  ## a late price and a back-dated trade corrected before your eyes; KEEP=1 leaves the stack up
	$(BIN)/tidemark demo $(if $(KEEP),--keep)

test: setup lint types layers  ## lint, types, layers and all tests, in PROCESSES=2 with servers of their own
	tests/web/install-packages.sh
	tests/install-postgres.sh
	$(BIN)/pytest $(IN_PROCESSES)
	$(MAKE) oldest-postgres TESTS="$(TELLING)"

unit: setup  ## the tests that need no server, in a minute; or one: TEST=tests/unit/test_window.py
	$(BIN)/pytest $(or $(TEST),-m quick)

# What the versions differ in: statements, plans, locks. The whole of it is `make oldest-postgres`.
TELLING := $(addprefix tests/integration/test_,migrations.py prices_sql.py herd_sql.py books_sql.py offsets.py)

oldest-postgres: setup  ## every test that needs only Postgres, on Debian's version 15; TESTS="...": some of them
	tests/install-postgres.sh
	@if [ -x $(OLDEST)/postgres ]; then \
	TIDEMARK_TEST_POSTGRES_BIN=$(OLDEST) $(BIN)/pytest $(IN_PROCESSES) $(or $(TESTS),tests/integration); \
	else echo "SKIPPED: no Postgres 15 in $(OLDEST), nothing was run on it"; fi

chaos: setup  ## SEED=1 MINUTES=5: break a whole topology from seeds, one run after another; or SEEDS=1-20 TABLE=file.json
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --minutes $(or $(MINUTES),5) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(TABLE),--table $(TABLE))

fuzz: setup  ## MINUTES=5: mutated records to every topic, round after round, each with a seed of its own; or SEED=1
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED))

peers: $(PEERS)  ## what some benchmarks compare with and what draws, in an environment of its own; without it: left out

$(PEERS): tests/bench/requirements.lock
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --require-hashes -r tests/bench/requirements.lock
	touch $(PEERS)

bench: setup peers  ## NAMES="positions herd": the benchmarks, each beside its baseline, to bench.json; all: also docs/plots
	$(BIN)/python -m tests.bench $(NAMES) --json bench.json
	$(if $(NAMES),,.venv-bench/bin/python -m tests.bench.plots bench.json docs/plots && cp bench.json docs/plots/)

bench-quick: setup peers  ## a rough look: smaller loads, one round
	$(BIN)/python -m tests.bench $(NAMES) --quick --json bench.json

simulate: setup  ## SECONDS=60: explore interleavings on models of Kafka and Postgres; TRAPS=1: take the guards out
	$(BIN)/python -m tests.simulation --seconds $(or $(SECONDS),60) $(if $(TRAPS),--traps)

cures: setup  ## take one protection after another out of a copy of the code: does its test fail? ONLY=word: some
	$(BIN)/python -m tests.cures $(if $(ONLY),--only "$(ONLY)")

mutants: setup  ## change the pure parts in every small way: do the unit tests notice? at least 85 % must be
	$(BIN)/python -m tests.mutants

soak: setup  ## MINUTES=60: mixed load on a stack of its own, audited all the while; writes soak.json
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),60) --json soak.json

memory: setup  ## ROWS=1000: the peak of memory of a restatement and of the relay behind it, histories of so many rows
	ROWS=$(or $(ROWS),1000) $(BIN)/pytest -s tests/memory

docs: setup  ## this documentation as a site, in site/
	$(BIN)/mkdocs build --strict

sbom: setup  ## the parts of the image as CycloneDX, in sbom.json
	$(BIN)/cyclonedx-py requirements deploy/requirements.lock --pyproject pyproject.toml --output-reproducible -o sbom.json

licences: setup  ## of every library, as a table
	$(BIN)/pip-licenses --from mixed

vulnerabilities: setup  ## known holes in what the image is made of
	$(BIN)/pip-audit -r deploy/requirements.lock --require-hashes --disable-pip

packages: setup  ## wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

lock:  ## refresh the lock file (needs uv)
	uv pip compile pyproject.toml --extra local --extra otel --extra dev --python-version 3.11 --universal \
		--generate-hashes --no-header --no-emit-index-url --output-file requirements.lock
	uv pip compile pyproject.toml --extra dev --extra bench --python-version 3.11 --universal \
		--generate-hashes --no-header --no-emit-index-url --output-file tests/bench/requirements.lock
	uv pip compile pyproject.toml --extra otel --constraint requirements.lock --python-version 3.11 --universal \
		--generate-hashes --no-header --no-emit-index-url --output-file deploy/requirements.lock

clean:
	rm -rf $(VENV) .venv-bench build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
