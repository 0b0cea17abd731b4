# Each target does its own set-up. `make test` is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(wildcard csrc/*.h csrc/*/*) CMakeLists.txt setup.py

TRITON := 3.6.0

.PHONY: demo test test-python test-cpp test-triton lint bench gpu-check docs format clean

demo: $(VENV)/native
	$(BIN)/embedkern demo $(ARGS)

test: lint test-cpp test-python

test-python: $(VENV)/native
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests --durations=10

test-cpp: $(VENV)/native
	cmake -S . -B $(BUILD)/release -G Ninja -DCMAKE_BUILD_TYPE=Release -DEK_TESTS=ON
	cmake --build $(BUILD)/release
	ctest --test-dir $(BUILD)/release --output-on-failure
	cmake -S . -B $(BUILD)/sanitized -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEK_TESTS=ON -DEK_SANITIZE=ON
	cmake --build $(BUILD)/sanitized
	ctest --test-dir $(BUILD)/sanitized --output-on-failure

# What the Triton kernels compile to with another version; the interpreter of versions below 3.9 needs NumPy < 2.4.
test-triton: $(VENV)/native
	$(BIN)/pip install --quiet --no-deps --target $(BUILD)/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/$(BUILD)/triton-$(TRITON) $(BIN)/python -m pytest tests/test_triton.py -k "not interpreter"

lint: $(VENV)/native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))
	$(BIN)/mypy

format: $(VENV)/native
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

bench: $(VENV)/native
	$(BIN)/embedkern bench --out benchmarks/results $(ARGS)

# With the Python, torch and nvcc that are there; needs no network.
gpu-check:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m embedkern.bench.gpu --out $(or $(OUT),gpu-check)

docs: $(VENV)/native
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# torch is pinned: without it, a CUDA build of several GB may come. An isolated build would fetch torch once more.
$(VENV)/tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy cmake ninja pybind11 setuptools wheel
	touch $@

$(VENV)/native: $(VENV)/tools pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev,demo,examples]"
	touch $@

clean:
	rm -rf $(BUILD) $(VENV) embedkern/*.so *.egg-info
