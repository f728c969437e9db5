"""cffi builder of pyggml_bridge._native: declared by native/include/cq.h itself, made of all sources in native/src.

Each source selects its own instruction set by a target pragma, so one compiler call without special flags builds all.
CQ_CFLAGS adds flags, for instance -fsanitize=address (see `make test-asan`).
"""

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent
header = (ROOT / "include" / "cq.h").read_text(encoding="utf-8")

ffibuilder = FFI()
ffibuilder.cdef(re.sub(r"^#.*$", "", header, flags=re.MULTILINE))
extra = os.environ.get("CQ_CFLAGS", "").split()
ffibuilder.set_source(
    "pyggml_bridge._native",
    '#include "cq.h"',
    sources=sorted(str(path.relative_to(ROOT.parent)) for path in (ROOT / "src").rglob("*.c")),
    include_dirs=[str(ROOT / "include"), str(ROOT / "src")],
    depends=[str(path) for path in (*ROOT.glob("src/**/*.h"), *ROOT.glob("include/*.h"))],
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",  # vectors wider than registers pass between inlined functions only
        *extra,
    ],
    extra_link_args=["-fopenmp", *extra],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
