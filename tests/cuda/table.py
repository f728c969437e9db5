"""What the compiler makes of every kernel for every target: registers, shared memory, spills, instruction counts.

`python -m tests.cuda.table` compiles all and writes docs/cuda-kernels.csv; test_table.py holds the sources to it.
"""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pyggml_bridge.cuda import nvrtc
from pyggml_bridge.cuda.kernels import AROUND_ATTENTION, ROWS, Module, decode_module
from pyggml_bridge.cuda.linear import ROUTE, linear_module
from pyggml_bridge.format import CQType

TABLE = Path(__file__).resolve().parents[2] / "docs" / "cuda-kernels.csv"
TARGETS = (75, 80, 86, 89, 90, 100, 120)
F32, F16, Q8_0 = 0, 1, 8
COLUMNS = (
    "kernel", "type", "variant", "sm", "registers", "shared_bytes", "spill_bytes", "instructions",
    "load_128", "load_64", "prmt", "dp4a", "mma", "ldmatrix", "cp_async", "loop", "loop_alu", "hash",
)  # fmt: skip
HOT = ("gemv", "gemm", "latent_attention")
LATENT = Module("latent.cu", (("CQ_HEAD_DIM", 576), ("CQ_VALUE_DIM", 512)))
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_LABEL_OR_INSTRUCTION = re.compile(
    rf"^(?P<label>\.L_\w+):|{_INSTRUCTION.pattern}(?:[^\n]*?`\((?P<target>\.L_\w+)\))?", re.MULTILINE
)
# What Nsight Compute's documentation gives the ALU pipe: logic and integers, but not multiplications and dot products.
_ALU = r"PRMT|LOP|P?LOP3|V?IADD|SHF|SEL|FSEL|[IF]SETP|LEA|V?IMNMX|FMNMX|IABS|SGXT|MOV|BMSK|FLO|ISCADD"


def modules() -> Iterator[Module]:
    """Everything that the backend can load; of attention, two usual widths of a head, and DeepSeek-V2's of a latent."""
    for kind in CQType:
        yield linear_module("gemv.cu", kind)
    for kind in (*CQType, Q8_0):
        yield linear_module("gemm.cu", kind)
    for kind in (F32, F16, Q8_0):
        yield linear_module("stock.cu", kind)
    yield from (ROWS, AROUND_ATTENTION, ROUTE)
    yield from (Module("attention.cu", (("CQ_HEAD_DIM", width),)) for width in (64, 128))
    yield from (decode_module(width, 8) for width in (64, 128))
    yield LATENT


def jobs() -> list[tuple[Module, int]]:
    """Modules and targets; the GEMM without tensor cores only where such chips exist."""
    everywhere = [(module, sm) for module in modules() for sm in TARGETS]
    return everywhere + [(linear_module("gemm.cu", kind, tensor_cores=False), 75) for kind in (*CQType, Q8_0)]


@cache
def source_hash(source: str) -> str:
    """Of a source and what it may include."""
    texts = [path.read_bytes() for path in (nvrtc.SOURCES / source, *sorted(nvrtc.SOURCES.glob("*.cuh")))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _disassembled(code: bytes) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Instructions per kernel and those of its longest loop, by nvdisasm."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    tool = next(path for folder in folders for path in folder.glob("*/bin/nvdisasm"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.section\s+\.text\.|^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]
    return {
        re.split(r"[,\s]", part)[0]: (Counter(_INSTRUCTION.findall(part)), _longest_loop(part)) for part in sections
    }


def _longest_loop(text: str) -> Counter[str]:
    """What lies between a label and a branch back to it, where that is most."""
    labels: dict[str, int] = {}
    names: list[str] = []
    longest = range(0)
    for found in _LABEL_OR_INSTRUCTION.finditer(text):
        if found["label"]:
            labels[found["label"]] = len(names)
            continue
        names.append(found[2])
        back = labels.get(found["target"], len(names)) if found[2].startswith("BRA") else len(names)
        loop = range(back, len(names))
        longest = max(longest, loop, key=len)
    return Counter(names[i] for i in longest)


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(n for name, n in instructions.items() if re.match(pattern, name))


def measure(module: Module, sm: int) -> list[dict[str, str]]:
    """A row of the table per kernel of the module."""
    code, log = nvrtc.compile_module(module, sm, ["--ptxas-options=-v"])
    assert "warning" not in log, log
    kernels, rows = _disassembled(code), []
    for part in log.split("Compiling entry function '")[1:]:
        kernel = part.split("'")[0]
        spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert spill and used
        (found, loop), defines = kernels[kernel], dict(module.defines)
        kind = defines.get("CQ_TYPE", defines.get("CQ_HEAD_DIM"))
        patterns = (r"LDG\.E\.(\w+\.)*128", r"LDG\.E\.(\w+\.)*64", "PRMT", "IDP", "IMMA", "LDSM", "LDGSTS")
        counts = (sum(found.values()), *(_count(found, pattern) for pattern in patterns))
        values = (
            kernel, _type_name(kind), "dp4a" if "CQ_DP4A" in defines else "", sm, used[1], shared[1] if shared else 0,
            sum(map(int, spill.groups())), *counts, sum(loop.values()), _count(loop, _ALU), source_hash(module.source),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def _type_name(kind: int | None) -> str:
    names = {None: "", F32: "F32", F16: "F16", Q8_0: "Q8_0"} | {int(cq): cq.name for cq in CQType}
    return names.get(kind, f"head_dim {kind}")


def recorded() -> list[dict[str, str]]:
    """The rows of docs/cuda-kernels.csv."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def recorded_version() -> str:
    """The compiler that made them."""
    return TABLE.read_text().splitlines()[0].removeprefix("# NVRTC ")


def compiler_version() -> str:
    return ".".join(map(str, nvrtc.version()))


def main() -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# NVRTC {compiler_version()}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for module, sm in jobs():
            writer.writerows(measure(module, sm))


if __name__ == "__main__":
    main()
