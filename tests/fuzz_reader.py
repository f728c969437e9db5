"""Mutates a tiny CQ file and runs what still loads: `python -m tests.fuzz_reader COUNT SEED`.

Every mutation must either run or raise CQError. Under AddressSanitizer (make test-asan) a read outside the map aborts.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from tests.tiny_gguf import Tiny, write_tiny

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
MAX_CTX = 64


def header_bytes(path: Path) -> int:
    """Where the tensor data begins."""
    from pyggml_bridge.reader import GGUFFile

    file = GGUFFile(path)
    return min(t.data.ctypes.data for t in file.tensors.values()) - file._bytes.ctypes.data


def mutate(data: bytes, n_header: int, rng: np.random.Generator) -> bytes:
    """One random mutation, mostly of the header."""
    kind = rng.integers(6)
    if kind == 0:  # truncate anywhere
        return data[: rng.integers(len(data))]
    out = bytearray(data)
    at = int(rng.integers(n_header if kind != 5 else len(data)))
    if kind in (1, 5):  # flip bits of a byte
        out[at] ^= int(rng.integers(1, 256))
    elif kind == 2:  # an extreme byte
        out[at] = EXTREMES[rng.integers(len(EXTREMES))]
    elif kind == 3:  # a huge 64-bit number
        out[at : at + 8] = (2 ** int(rng.integers(20, 64)) - 1).to_bytes(8, "little")
    else:  # move a slice of the header onto another place
        length, source = int(rng.integers(1, 40)), int(rng.integers(n_header))
        out[at : at + length] = data[source : source + length]
    return bytes(out)


def try_file(path: Path) -> str:
    """ "ran" or "refused"; anything else is a failure and propagates."""
    try:
        model = load_model(path, n_ctx=MAX_CTX, n_threads=2, n_batch=16)
        model.forward(np.arange(9, dtype=np.int32), 0, 3)
        model.forward(np.arange(1, dtype=np.int32), 9, 1)
    except CQError as error:
        assert "\n" not in str(error), "an error message of several lines"
        return "refused"
    return "ran"


def main(count: int, seed: int) -> Counter[str]:
    """Run `count` mutations of five small models; returns how many ran and were refused."""
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        originals = []
        for i, t in enumerate(
            (
                Tiny(hidden=64, ffn=64, head_dim=16, vocab=64),
                Tiny(hidden=64, ffn=64, head_dim=16, vocab=64, n_experts=3, cq=CQType.CQ3, group_size=64),
                Tiny(hidden=64, ffn=64, head_dim=32, vocab=64, cq=CQType.CQ4T, codebook_rows=8),
                Tiny(hidden=128, ffn=64, head_dim=32, vocab=64, cq=CQType.CQ2, scale_group=-1, biases=True),
                Tiny(hidden=64, ffn=128, head_dim=16, vocab=64, n_experts=2, activation_bits=4, tied=True),
            )
        ):
            path = Path(folder, f"original-{i}.gguf")
            write_tiny(path, t)
            assert try_file(path) == "ran"
            originals.append((path.read_bytes(), header_bytes(path)))
        for i in range(count):
            data, n_header = originals[i % len(originals)]
            path = Path(folder, f"mutant-{i}.gguf")
            path.write_bytes(mutate(data, n_header, rng))
            outcomes[try_file(path)] += 1
            path.unlink()
    return outcomes


if __name__ == "__main__":
    print(dict(main(int(sys.argv[1]), int(sys.argv[2]))))
