# make demo: a real model through the whole pipeline. make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := converter pyggml_bridge scripts tests native/build_ffi.py setup.py
NATIVE := $(shell find native/src native/include -name "*.[ch]")
C_SOURCES := $(NATIVE) $(wildcard native/tests/*.[ch] native/cuda/*.cu native/cuda/*.cuh tests/cuda/*.h)
CROSS := aarch64-linux-gnu-gcc
QEMU := qemu-aarch64-static
KERNEL_TEST := $(wildcard native/tests/*.c native/src/isa/*.c) native/src/dispatch.c
KERNEL_FLAGS := -std=gnu11 -fopenmp-simd -fno-math-errno -Wall -Wextra -Wno-psabi -Inative/include -Inative/src

.PHONY: setup demo test test-neon test-asan cuda-table bench lint fmt clean

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

# The NEON kernels against the C oracle, under an emulator with and without dotprod.
test-neon:
	@for tool in $(CROSS) $(QEMU); do command -v $$tool >/dev/null || { echo "test-neon needs $$tool (Debian: \
	gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)" >&2; exit 1; }; done
	mkdir -p build
	$(CROSS) $(KERNEL_FLAGS) -O3 -static $(KERNEL_TEST) -o build/test_neon -lm
	$(QEMU) -cpu max build/test_neon neon-dotprod neon
	$(QEMU) -cpu cortex-a53 build/test_neon neon

# The same program for this machine, every array ending at an unreadable page.
test-asan:
	mkdir -p build
	$(CC) $(KERNEL_FLAGS) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined $(KERNEL_TEST) \
	  -o build/test_asan -lm
	build/test_asan

# Every CUDA kernel compiled for every target, four to five minutes; the tests hold the sources to it.
cuda-table: setup
	$(BIN)/python -m tests.cuda.table

bench: setup
	$(BIN)/cq-bench demo/smol.cq.gguf && $(BIN)/cq-bench demo/smol.cq.gguf --kernels

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

fmt: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(C_SOURCES)

clean:
	rm -rf build demo $(VENV) pyggml_bridge/*.so pyggml_bridge/_native.c *.egg-info
