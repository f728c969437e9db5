"""The emulated kernels under the address and undefined-behaviour sanitizers: one of each kind, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CASES = (
    "test_linear.py::test_integers_of_every_tail[8-17213]",
    "test_linear.py::test_experts_multiply_their_slots",
    "test_linear.py::test_q8_0[True-131-96-65]",
    "test_linear.py::test_float_matrices[67-33-66-float16]",
    "test_linear.py::test_float_matrices[64-160-4-float16]",
    "test_rows.py",
    "test_attention.py::test_attention[90-20-33-1-81]",
    "test_attention.py::test_attention[200-1-33-2-81]",
)


def test_no_kernel_reads_or_computes_what_it_must_not() -> None:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "halt_on_error=1",
        "CQ_EMULATE_FLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / case) for case in CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
