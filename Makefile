# Everything a person or CI runs. Each target sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NODES ?= 2
SEED ?= 1
SEEDS ?= 1000
ROUNDS ?= 20
STOP_S ?= 60
WORKERS ?= 3
MINUTES ?= 60
OUT ?=
export PROMPT ?= What is the capital of France?

.PHONY: run test test-net seeds faults churn check dist lock clean format

run: $(VENV)/.runtime
	@$(BIN)/covey demo --nodes $(NODES) --prompt "$$PROMPT" $(if $(filter-out 0,$(ONCE)),--once) $(if $(PORT),--port $(PORT)) $(if $(JSON),--json)

# WORKERS at once: most tests wait for other processes.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not net and not seeds and not faults"

# Many worlds of the simulator, from SEED on: 10,000 take 20 minutes of processor time. Then the bugs that are rarely met.
seeds: $(VENV)/.test
	$(BIN)/python -m simulation --seed $(SEED) --seeds $(SEEDS)
	$(BIN)/python -m pytest -m seeds tests/simulation

# Needs root and iproute2: machines are network namespaces.
test-net: $(VENV)/.test
	$(BIN)/python -m pytest -v tests/net

# Breaks real clusters, each fault ROUNDS times; what passes by itself lasts STOP_S. Figures go to the file OUT. As root
# cables and disks are broken, too.
faults: $(VENV)/.test
	FAULTS_ROUNDS=$(ROUNDS) FAULTS_STOP_S=$(STOP_S) FAULTS_OUT=$(OUT) \
	  $(BIN)/python -m pytest -v tests/faults --ignore tests/faults/test_churn.py

# Every 20 s for MINUTES a node is killed or stands still while people ask.
churn: $(VENV)/.test
	FAULTS_MINUTES=$(MINUTES) FAULTS_SEED=$(SEED) FAULTS_OUT=$(OUT) $(BIN)/python -m pytest -s tests/faults/test_churn.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/test_tidy.py tests/test_documents.py

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.test
	$(BIN)/uv build --no-build-isolation --wheel --out-dir dist

# uv is the installer: it comes from the registry by its own pinned hashes, then everything else by theirs.
$(VENV)/bin/uv: requirements/installer.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/installer.txt
	@touch $@

$(VENV)/.runtime: $(VENV)/bin/uv requirements/runtime.txt pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/runtime.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements/test.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/test.txt
	@touch $@

# Rewrites the lock files: hashes and names, no addresses.
lock: $(VENV)/bin/uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python-version 3.11 requirements/installer.in -o requirements/installer.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python-version 3.11 pyproject.toml -o requirements/runtime.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python-version 3.11 --extra test pyproject.toml -o requirements/test.txt

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
