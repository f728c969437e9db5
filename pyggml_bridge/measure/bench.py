"""Speed: tokens per second as llama-bench measures them, and the kernels alone against this machine's limits."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.cpu.memory import native_matrix
from pyggml_bridge.cpu.program import NativeOp
from pyggml_bridge.format import Clustered, CQType, Grouping, weight_tensors
from pyggml_bridge.model import Model
from pyggml_bridge.native import aligned_empty, ffi, lib, pointer
from pyggml_bridge.operations import Value
from pyggml_bridge.weights import Matrix

STREAM_BYTES = 192 << 20  # several times any laptop's last-level cache
MIN_SECONDS = 0.3


@dataclass(frozen=True)
class BenchResult:
    """One test of llama-bench: tokens per second, mean, standard deviation and each repetition's."""

    test: str
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]


@dataclass(frozen=True)
class KernelResult:
    """A kernel on one matrix: weight bytes (1e9) and multiply-adds (1e9) per second, and their shares of the limits."""

    kernel: str
    shape: str
    gbps: float
    gmacs: float
    frac_bandwidth: float
    frac_peak: float


def cpu_name() -> str:
    """The processor's marketing name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model", "Processor"))]
    return names[0] if names else platform.machine()


def measure_tests(
    model: Model, n_prompt: int, n_gen: int, depth: int, repetitions: int, seed: int = 0
) -> list[BenchResult]:
    """llama-bench's pp (one prompt of n_prompt tokens) and tg (n_gen single tokens) tests after `depth` tokens."""
    rng = np.random.default_rng(seed)
    results, after = [], f" @ d{depth}" if depth else ""
    if depth:
        model.forward(_random_tokens(rng, model, depth), 0, 0)
    if n_prompt:
        prompt = _random_tokens(rng, model, n_prompt)
        name = f"pp{n_prompt}{after}"
        results.append(_time_test(name, n_prompt, repetitions, lambda: model.forward(prompt, depth, 1)))
    if n_gen:
        tokens = _random_tokens(rng, model, n_gen)

        def generate() -> None:
            for i in range(n_gen):
                model.forward(tokens[i : i + 1], depth + i, 1)

        results.append(_time_test(f"tg{n_gen}{after}", n_gen, repetitions, generate))
    return results


def _random_tokens(rng: np.random.Generator, model: Model, n: int) -> NDArray[np.int32]:
    return rng.integers(0, model.vocab_size, n, dtype=np.int32)


def _time_test(name: str, n_tokens: int, repetitions: int, run: Callable[[], object]) -> BenchResult:
    run()  # warm-up: page faults, caches
    samples = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        samples.append(n_tokens / (time.perf_counter() - start))
    spread = float(np.std(samples, ddof=1)) if repetitions > 1 else 0.0
    return BenchResult(name, float(np.mean(samples)), spread, samples)


# ---- kernels ----


@dataclass(frozen=True)
class Limits:
    """What this machine can do: bytes read from memory and int8 multiply-adds per second."""

    bandwidth: float
    peak: float

    @classmethod
    def measure(cls, n_threads: int) -> Limits:
        """On n_threads threads, now."""
        buffer = aligned_empty(STREAM_BYTES)
        buffer[:] = 1
        bandwidth = lib.cq_measure_bandwidth(pointer(buffer, "const uint8_t *"), buffer.nbytes, n_threads)
        return cls(bandwidth, lib.cq_measure_peak(n_threads))


def measure_kernels(
    shapes: list[tuple[CQType, int, int]],
    n_threads: int,
    grouping: Grouping,
    n_tokens: int = 512,
) -> list[KernelResult]:
    """Time GEMV and GEMM on matrices [rows, cols]; rates beside the limits measured in the same run.

    GEMV: rows are repeated until the matrix is several caches large, so that it streams from memory as in a model.
    """
    results = []
    for cq, rows, cols in shapes:
        limits = Limits.measure(n_threads)
        wide = random_matrix(cq, rows, cols, grouping)
        assert wide.clustered is not None
        tall = random_matrix(cq, -(-STREAM_BYTES // wide.clustered.nbytes) * rows, cols, grouping)
        for kernel, matrix, tokens in (("gemv", tall, 1), (f"gemm{n_tokens}", wide, n_tokens)):
            assert matrix.clustered is not None
            seconds = _time_linear(matrix, tokens, n_threads)
            read, macs = matrix.clustered.nbytes / seconds, matrix.n_rows * cols * tokens / seconds
            fractions = read / limits.bandwidth, macs / limits.peak
            results.append(KernelResult(kernel, f"{cq.name} {rows}x{cols}", read / 1e9, macs / 1e9, *fractions))
    return results


def random_matrix(cq: CQType, rows: int, cols: int, grouping: Grouping, seed: int = 0) -> Matrix:
    """A clustered [rows, cols] matrix of random bytes with unit row scales."""
    rng = np.random.default_rng(seed)
    packed, centroids, scales, *groups = weight_tensors("random.weight", (rows, cols), cq, grouping)
    clustered = Clustered(
        cq,
        rng.integers(0, 256, packed.shape, dtype=np.uint8),
        rng.integers(-127, 128, centroids.shape, dtype=np.int8),
        np.ones(scales.shape, np.float32),
        rng.integers(1, 128, groups[0].shape, dtype=np.int8) if groups else None,
        grouping.codebook_cols(cols),
        grouping.scale_cols(cols),
        grouping.codebook_rows,
    )
    return Matrix("random", packed.type, 1, rows, cols, clustered.packed.reshape(-1), clustered)


def _time_linear(matrix: Matrix, n_tokens: int, n_threads: int) -> float:
    """Best seconds of the linear layer as a model runs it: from int8 activations to scaled floats."""
    x = np.random.default_rng(1).integers(-127, 128, (n_tokens, matrix.n_cols), dtype=np.int8)
    sums, scales = x.sum(axis=1, dtype=np.int32), np.ones(n_tokens, np.float32)
    out = np.empty((n_tokens, matrix.n_rows), np.float32)
    weight, activation = native_matrix(matrix), ffi.new("cq_activation *", {"bits": 8})
    activation.q, activation.sums = pointer(x, "int8_t *"), pointer(sums, "int32_t *")
    activation.scales = pointer(scales, "float *")
    arguments = {"w": weight, "act": activation, "out": pointer(out, "float *")}
    ops = ffi.new("cq_op[]", [NativeOp("linear", Value(matrix.n_rows), arguments).struct])
    scratch = aligned_empty(lib.cq_scratch_bytes(ops, 1, n_threads))
    step = ffi.new("cq_step *", {"n_tokens": n_tokens, "n_threads": n_threads})
    step.scratch = pointer(scratch, "uint8_t *")

    def call() -> None:
        if lib.cq_run(ops, 1, step) != lib.CQ_OK:
            raise ValueError("cq_run refused a linear layer")

    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MIN_SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    assert weight and activation, "what C points to lives until here"
    return best
