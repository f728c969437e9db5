"""The CUDA kernels as Python sees them: modules to compile, arguments, and the geometry of each launch.

Pure data: nothing here touches a device. Addresses are device addresses; shapes are those of native/cuda/*.cu. Linear
layers and experts are in linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDE_HEAD = 256  # with wider heads a block of attention.cu has 16 rows instead of 32: CQ_ROWS_EACH
DECODE_HEADS, DECODE_KEYS = 8, 32  # most heads of a block and keys of a tile of decode.cu
WIDE_LATENT = 576  # with wider keys a block of latent.cu has 8 rows instead of 16: CQ_WIDE
MAX_HEAD_DIM = 600  # of attention.cu, whose queries and keys fill 48 KB of shared memory at 602
Q8_0_BLOCK = 32
ROW_THREADS = 256
PART = 4 * ROW_THREADS  # columns that a block computes at once, four a thread: CQ_PART


@dataclass(frozen=True)
class Module:
    """One compilation: a file of native/cuda and its macros as (name, value)."""

    source: str
    defines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments: NumPy scalars, or arrays of one struct, which are passed by value."""

    module: Module
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    args: tuple[Any, ...]
    shared_bytes: int = 0


@dataclass(frozen=True)
class DeviceInfo:
    """What launches depend on. n_processors: streaming multiprocessors."""

    n_processors: int
    tensor_cores: bool = True


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# ---- rows ----

ROWS, AROUND_ATTENTION = Module("rows.cu"), Module("heads.cu")


def rows_launch(kernel: str, grid: tuple[int, int], *args: Any) -> Launch:
    """A kernel of rows.cu on a grid (x, y)."""
    return Launch(ROWS, kernel, (*grid, 1), ROW_THREADS, args)


def heads_launch(kernel: str, grid: tuple[int, int], *args: Any, shared_bytes: int = 0) -> Launch:
    """A kernel of heads.cu on a grid (x, y)."""
    return Launch(AROUND_ATTENTION, kernel, (*grid, 1), ROW_THREADS, args, shared_bytes)


@dataclass(frozen=True)
class Quantized:
    """Addresses of activations as int8 with a scale per row; bits: 8, or 4 in whole bytes."""

    q: int
    scales: int
    bits: int

    @property
    def top(self) -> np.float32:
        """The largest value."""
        return np.float32((1 << self.bits - 1) - 1)


NORM = np.dtype(
    [(name, "u8") for name in ("weight", "bias", "out", "q", "scales")] + [("n", "i4"), ("eps", "f4"), ("top", "f4")],
    align=True,
)


def norm(
    weight: int, out: int, n: int, eps: float, bias: int = 0, quantized: Quantized | None = None
) -> NDArray[np.void]:
    """cq_norm of rows.cu, an array of one, for rows [n]. bias 0: none. quantized: where the int8 form goes, if any."""
    struct = np.zeros(1, NORM)
    for name, value in (("weight", weight), ("bias", bias), ("out", out), ("n", n), ("eps", eps)):
        struct[name] = value
    if quantized:
        struct["q"], struct["scales"], struct["top"] = quantized.q, quantized.scales, quantized.top
    return struct


def rms_norm(x: int, to: NDArray[np.void], n_rows: int) -> Launch:
    """Norm of n_rows rows."""
    return rows_launch("rms_norm", (n_rows, 1), np.uint64(x), to)


def quantize(x: int, to: Quantized, n: int, n_rows: int) -> Launch:
    """Activations [n_rows, n] per row."""
    args = (np.uint64(x), np.uint64(to.q), np.uint64(to.scales), np.int32(n), to.top)
    return rows_launch("quantize", (n_rows, 1), *args)


def quantize_blocks(x: int, q: int, scales: int, n: int, n_rows: int) -> Launch:
    """Activations [n_rows, n] per 32 columns, for Q8_0."""
    n_blocks = n_rows * n // Q8_0_BLOCK
    args = (np.uint64(x), np.uint64(q), np.uint64(scales), np.int32(n_blocks))
    return rows_launch("quantize_blocks", (ceil_div(n_blocks, 8), 1), *args)


def rope(
    x: int, cos_sin: int, position: int, heads: tuple[int, int], n_rot: int, n_tokens: int, *, interleaved: bool
) -> Launch:
    """x [n_tokens, *heads = (n_heads, head_dim)] in place; position: address of the first token's position."""
    sizes = map(np.int32, (*heads, n_rot, interleaved))
    return heads_launch("rope", (n_tokens, 1), np.uint64(x), np.uint64(cos_sin), np.uint64(position), *sizes)


HEADS = np.dtype(
    [
        (name, "u8")
        for name in ("q", "k", "v", "q_weight", "k_weight", "cos_sin", "position", "q_out", "k_cache", "v_cache")
    ]
    + [(name, "i4") for name in ("n_heads", "n_kv_heads", "head_dim", "n_rot", "interleaved", "n_ctx")]
    + [("q_eps", "f4"), ("k_eps", "f4")],
    align=True,
)


def prepare_heads(n_tokens: int, **fields: float) -> Launch:
    """Norms and rope of queries and keys, and both caches' new rows; fields: those of cq_heads in heads.cu."""
    struct = np.zeros(1, HEADS)
    for name, value in fields.items():
        struct[name] = value
    n_heads = fields["n_heads"] + 2 * fields["n_kv_heads"]
    return heads_launch("prepare_heads", (n_tokens, ceil_div(int(n_heads), 8)), struct)


def swiglu(gate: int, up: int, n: int, hadamard: int, n_rows: int) -> Launch:
    """gate [n_rows, n] in place."""
    grid = (ceil_div(n, max(PART, hadamard)), n_rows)
    return rows_launch("swiglu", grid, np.uint64(gate), np.uint64(up), np.int32(n), np.int32(hadamard))


def swiglu_quantize(gate: int, up: int, to: Quantized, n: int, hadamard: int, n_rows: int) -> Launch:
    """swiglu, and then the result's int8 form; only for rows that fits_swiglu_quantize accepts."""
    addresses = map(np.uint64, (gate, up, to.q, to.scales))
    return rows_launch("swiglu_quantize", (n_rows, 1), *addresses, np.int32(n), np.int32(hadamard), to.top)


def fits_swiglu_quantize(n: int, hadamard: int) -> bool:
    """Whether a block of threads can hold a row of n columns in registers."""
    return n % 4 == 0 and n <= 4 * PART and hadamard <= PART


def select_rows(x: int, out: int, n: int, first: int, n_rows: int) -> Launch:
    """out [n_rows, n] = rows of x from `first` on."""
    grid = (ceil_div(n, ROW_THREADS), n_rows)
    return rows_launch("select_rows", grid, np.uint64(x), np.uint64(out), np.int32(n), np.int32(first))


def copy_columns(x: int, out: int, widths: tuple[int, int], n: int, n_rows: int) -> Launch:
    """n columns of each of n_rows rows of x; widths: of rows of x and of out, in floats."""
    sizes = map(np.int32, (*widths, n, n_rows * n))
    return rows_launch("copy_columns", (ceil_div(n_rows * n, ROW_THREADS), 1), np.uint64(x), np.uint64(out), *sizes)


# ---- attention ----


ATTENTION = np.dtype(
    [(name, "u8") for name in ("q", "k_cache", "v_cache", "out", "partial", "position")]
    + [(name, "i4") for name in ("n_tokens", "n_heads", "n_kv_heads", "n_ctx", "window")]
    + [("scale", "f4")],
    align=True,
)


@dataclass(frozen=True)
class AttentionShape:
    """What attention depends on besides addresses and the number of tokens.

    window 0: all keys are visible. value_dim: columns of values; latent: the values are the first columns of each key.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ctx: int
    window: int
    scale: float
    value_dim: int
    latent: bool = False

    @property
    def module(self) -> Module:
        """attention.cu or latent.cu for these widths."""
        if self.latent:
            return Module("latent.cu", (("CQ_HEAD_DIM", self.head_dim), ("CQ_VALUE_DIM", self.value_dim)))
        return Module("attention.cu", (("CQ_HEAD_DIM", self.head_dim),))

    def tiles(self, n_tokens: int) -> int:
        """Blocks that the queries of one key-value head fill."""
        most, widest = (16, WIDE_LATENT) if self.latent else (32, WIDE_HEAD)
        rows = most if self.head_dim <= widest else most // 2
        return ceil_div(n_tokens * (self.n_heads // self.n_kv_heads), rows)

    @property
    def decode_heads(self) -> int:
        """Heads of a block of decode.cu: those of a key-value head are dealt to the fewest blocks of up to eight."""
        heads = self.n_heads // self.n_kv_heads
        return ceil_div(heads, ceil_div(heads, DECODE_HEADS))

    def splits(self, n_tokens: int, n_processors: int) -> int:
        """Ranges that the keys are split into, one block each, for a single token; 1 for more tokens.

        As many as give each processor two blocks, of at least 128 keys; without latents four blocks, of 32 keys.
        """
        if n_tokens > 1:
            return 1
        if self.latent:
            return max(1, min(2 * n_processors // (self.n_kv_heads * self.tiles(n_tokens)), self.n_ctx // 128))
        blocks = self.n_kv_heads * ceil_div(self.n_heads // self.n_kv_heads, self.decode_heads)
        return max(1, min(4 * n_processors // blocks, ceil_div(self.n_ctx, DECODE_KEYS)))

    def partial_floats(self, n_tokens: int, splits: int) -> int:
        """float32 elements of what the splits leave for the merge."""
        return splits * n_tokens * self.n_heads * (self.value_dim + 2) if splits > 1 else 1


def decode_module(head_dim: int, heads: int) -> Module:
    """decode.cu for so many heads a block."""
    return Module("decode.cu", (("CQ_HEAD_DIM", head_dim), ("CQ_HEADS", heads)))


def append(new: int, cache: int, position: int, heads: tuple[int, int], n_ctx: int, n_tokens: int) -> Launch:
    """Keys or values [n_tokens, *heads = (n_kv_heads, head_dim)] to the cache [n_kv_heads, n_ctx, head_dim] as F16."""
    args = (np.uint64(new), np.uint64(cache), np.uint64(position), np.int32(n_ctx), np.int32(heads[1]))
    return heads_launch("append", (n_tokens, heads[0]), *args)


def attention(
    shape: AttentionShape, addresses: tuple[int, int, int, int, int, int], n_tokens: int, splits: int
) -> list[Launch]:
    """addresses: q, k cache, v cache (0 if latent), out, partial (partial_floats) and position."""
    struct = np.zeros(1, ATTENTION)
    for name, address in zip(("q", "k_cache", "v_cache", "out", "partial", "position"), addresses, strict=True):
        struct[name] = address
    for name in ("n_heads", "n_kv_heads", "n_ctx", "window", "scale"):
        struct[name] = getattr(shape, name)
    struct["n_tokens"] = n_tokens
    kernel, threads = ("latent_attention", 256) if shape.latent else ("attention", 128)
    launches = [Launch(shape.module, kernel, (shape.tiles(n_tokens), shape.n_kv_heads, splits), threads, (struct,))]
    if n_tokens == 1 and not shape.latent:
        heads = shape.decode_heads
        grid = (ceil_div(shape.n_heads // shape.n_kv_heads, heads), shape.n_kv_heads, splits)
        launches = [Launch(decode_module(shape.head_dim, heads), "attention_decode", grid, 128, (struct,))]
    if splits > 1:
        args = (np.uint64(addresses[4]), np.uint64(addresses[3]), np.int32(splits), np.int32(shape.value_dim))
        rows = n_tokens * shape.n_heads
        launches.append(heads_launch("attention_merge", (rows, 1), *args, shared_bytes=4 * splits))
    return launches
