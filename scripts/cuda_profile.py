"""Where a batch's time goes on a GPU: every kernel's launches, seconds, and rate against the card's limits.

python scripts/cuda_profile.py FILE                                # prefill of 512 tokens, then one token after them
python scripts/cuda_profile.py --synthetic qwen3-30b-a3b --layers 8
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyggml_bridge.cuda.backend import CUDABackend
from pyggml_bridge.cuda.kernels import Launch
from pyggml_bridge.cuda.linear import LINEAR, LINEARS
from pyggml_bridge.format import BLOCK, CQType
from pyggml_bridge.measure.synthetic import SHAPES, write_synthetic
from pyggml_bridge.model import Model
from pyggml_bridge.models import load_model

SPIN = 'extern "C" __global__ void spin(long long n) { for (long long t = clock64(); clock64() - t < n;) {} }'
SPIN_CLOCKS = 400_000_000  # long enough to queue a batch's launches behind: their times have no host in them
COPY_BYTES = 2 << 30
PLAIN_BITS = {0: 32.0, 1: 16.0, 8: 8.5}  # F32, F16, Q8_0


@dataclass
class Total:
    """What launches of one kind sum up to. nbytes: of weights; macs: multiply-adds with them."""

    launches: int = 0
    seconds: float = 0.0
    nbytes: float = 0.0
    macs: float = 0.0


def main() -> int:
    """Print a table for a prompt and one for a token."""
    args = _arguments()
    with _file(args) as path:
        model = load_model(path, n_ctx=args.n_prompt + 64, n_batch=args.n_prompt, cuda=True)
    backend = model._backend
    assert isinstance(backend, CUDABackend)
    print(f"{backend.name}: a copy moves {_copy_rate(backend) / 1e9:.0f} GB/s, read and written\n")
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, args.n_prompt + 1, dtype=np.int32)
    for batch, position in ((tokens[:-1], 0), (tokens[-1:], args.n_prompt)):
        print(f"{len(batch)} tokens at position {position}\n")
        _print(_totals(_timed(model, batch, position)))
    return 0


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", metavar="FILE", nargs="?")
    p.add_argument("--synthetic", choices=SHAPES, help="instead of FILE, random weights in these shapes")
    p.add_argument("--layers", type=int, default=8, metavar="N", help="with --synthetic (8)")
    p.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens of the prompt (512)")
    return p.parse_args()


@contextmanager
def _file(args: argparse.Namespace) -> Iterator[str]:
    if args.file:
        yield args.file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "synthetic.gguf")
        write_synthetic(path, SHAPES[args.synthetic], args.layers)
        yield str(path)


def _timed(model: Model, tokens: Any, position: int) -> list[tuple[Launch, float]]:
    """Every launch of a batch and its seconds, by events between them; a warm-up run loads what they need."""
    model.forward(tokens, position, 1)
    backend: Any = model._backend
    cuda = backend._cupy.cuda
    launches = backend._program.launches(0, len(tokens), 1)
    events = [cuda.Event() for _ in range(len(launches) + 1)]
    spin = backend._cupy.RawKernel(SPIN, "spin")
    with backend._stream:
        spin((1,), (1,), (np.int64(SPIN_CLOCKS),))
        events[0].record(backend._stream)
        for launch, event in zip(launches, events[1:], strict=True):
            backend._launch(launch)
            event.record(backend._stream)
    backend._stream.synchronize()
    times = [cuda.get_elapsed_time(*pair) / 1e3 for pair in itertools.pairwise(events)]
    return list(zip(launches, times, strict=True))


def _copy_rate(backend: Any) -> float:
    """Bytes a second that the device reads and writes when it copies."""
    cupy = backend._cupy
    a, b = (cupy.zeros(COPY_BYTES, cupy.uint8) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        b[:] = a
        end.record()
        end.synchronize()
        best = max(best, 2 * COPY_BYTES / cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return best


def _totals(timed: list[tuple[Launch, float]]) -> dict[str, Total]:
    totals: dict[str, Total] = defaultdict(Total)
    for launch, seconds in timed:
        kind, nbytes, macs = _describe(launch)
        total = totals[kind]
        total.launches += 1
        total.seconds += seconds
        total.nbytes += nbytes
        total.macs += macs
    return totals


def _describe(launch: Launch) -> tuple[str, float, float]:
    """Of a launch: kernel and shapes, bytes of the weights it reads, multiply-adds."""
    argument = launch.args[0]
    dtype = getattr(argument, "dtype", None)
    if dtype not in (LINEAR, LINEARS):
        return launch.kernel, 0.0, 0.0
    layers = argument["of"][0][: launch.grid[2]] if dtype == LINEARS else argument[:1]
    w, items = layers[0]["w"], int(layers[0]["n_items"])
    kind, rows, cols = int(w["type"]), int(layers["w"]["n_rows"].sum()), int(w["n_cols"])
    name = CQType(kind).name if kind in list(CQType) else f"type {kind}"
    bits = 8 * CQType(kind).block_bytes / BLOCK + 8 / BLOCK if kind in list(CQType) else PLAIN_BITS[kind]
    routed = int(layers[0]["ids"]) != 0
    matrices = min(items, int(w["n_experts"])) if routed else 1
    experts = f" of {int(w['n_experts'])}" if routed else ""
    heights = "+".join(str(layer["w"]["n_rows"]) for layer in layers)
    shape = f"{heights}x{cols}{experts}"
    return f"{launch.kernel} {name} {shape}", matrices * rows * cols * bits / 8, items * rows * cols


def _print(totals: dict[str, Total]) -> None:
    whole = sum(total.seconds for total in totals.values())
    print("| kernel | launches | us each | share | GB/s of weights | TMAC/s |\n|---|---|---|---|---|---|")
    for kind, t in sorted(totals.items(), key=lambda pair: -pair[1].seconds):
        rates = f"{t.nbytes / t.seconds / 1e9:.0f} | {t.macs / t.seconds / 1e12:.1f}" if t.macs else " | "
        print(f"| {kind} | {t.launches} | {1e6 * t.seconds / t.launches:.1f} | {t.seconds / whole:.1%} | {rates} |")
    launches = sum(t.launches for t in totals.values())
    print(f"\n{launches} launches, {1e3 * whole:.2f} ms\n")


if __name__ == "__main__":
    sys.exit(main())
