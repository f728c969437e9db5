# make demo: a real model through the whole pipeline. make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := converter pyggml_bridge scripts tests native/build_ffi.py setup.py
NATIVE := $(wildcard native/src/*.[ch] native/include/*.h)

.PHONY: setup demo test test-neon test-asan bench lint fmt clean

setup: $(VENV)/.installed

# torch first and pinned: an unpinned requirement would pull gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml setup.py native/build_ffi.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[convert,dev]'
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/pytest

bench: setup
	$(BIN)/cq-bench demo/smol.cq.gguf && $(BIN)/cq-bench demo/smol.cq.gguf --kernels

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(wildcard native/tests/*.c)

fmt: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(NATIVE) $(wildcard native/tests/*.c)

clean:
	rm -rf build demo $(VENV) pyggml_bridge/*.so pyggml_bridge/_native.c *.egg-info
