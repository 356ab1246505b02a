PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread: the demo's matrices are small, and OpenMP threads that wait for a busy core make it many times slower.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: run test check clean

run: $(STAMP)
	$(ONE_THREAD) $(BIN)/q3n train examples/tiny.toml --resume

# Files stay together: their tests share models that were trained for them.
test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
