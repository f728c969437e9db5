"""The CUDA kernels as Python sees them: modules to compile, argument structs, and the geometry of each launch.

Pure data: nothing here touches a device. Addresses are device addresses; shapes are those of native/cuda/*.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge.format import CQType

GEMV_MAX_TOKENS = 4  # up to here every token (or slot of an expert) reads the weights itself
TILE_TOKENS = 64  # of the GEMM kernels: CQ_TILE_TOKENS
QUERY_ROWS = 16  # of attention.cu
Q8_0_BLOCK = 32
ROW_THREADS = 256

_MATRIX_FIELDS = ("type", "n_experts", "n_rows", "n_cols", "codebook_rows", "codebook_cols", "scale_cols", "unused")
MATRIX = np.dtype(
    [(name, "i4") for name in _MATRIX_FIELDS] + [(name, "u8") for name in ("data", "centroids", "group_scales", "scales")],
    align=True,
)
LINEAR = np.dtype(
    [("w", MATRIX)]
    + [(name, "u8") for name in ("x", "q", "scales", "bias", "ids", "order", "offsets", "tiles", "out")]
    + [(name, "i4") for name in ("n_items", "top_k", "gather", "accumulate")],
    align=True,
)
ATTENTION = np.dtype(
    [(name, "u8") for name in ("q", "k_cache", "v_cache", "out", "partial", "position")]
    + [(name, "i4") for name in ("n_tokens", "n_heads", "n_kv_heads", "n_ctx", "window")]
    + [("scale", "f4")],
    align=True,
)


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
class DeviceMatrix:
    """A weight on the device: addresses of its parts, 0 where it has none."""

    type: int
    n_experts: int
    n_rows: int
    n_cols: int
    data: int
    centroids: int = 0
    group_scales: int = 0
    scales: int = 0
    codebook_rows: int = 1
    codebook_cols: int = 64
    scale_cols: int = 0

    @property
    def struct(self) -> NDArray[Any]:
        """cq_matrix of common.cuh, an array of one."""
        out = np.zeros(1, MATRIX)
        for name in out.dtype.names or ():
            out[name] = getattr(self, name, 0)
        return out


@dataclass(frozen=True)
class DeviceRouting:
    """Addresses of a routing's arrays: as cq_routing of cq.h, and tiles int32 [max_tiles][2]."""

    n_experts: int
    top_k: int
    ids: int
    weights: int
    order: int
    offsets: int
    tiles: int

    def max_tiles(self, n_tokens: int) -> int:
        """Tiles that any distribution of so many tokens fits in: each expert may begin one more."""
        n_slots = n_tokens * self.top_k
        return n_slots // TILE_TOKENS + min(self.n_experts, n_slots)


@dataclass(frozen=True)
class Operands:
    """What a linear layer reads and writes. q and scales: quantized x, for CQ types and Q8_0. n_tokens: rows of x, of
    whose slots there are n_tokens * top_k where it is routed."""

    n_tokens: int
    out: int
    x: int = 0
    q: int = 0
    scales: int = 0
    bias: int = 0
    routing: DeviceRouting | None = None
    gather: bool = False
    accumulate: bool = False

    def struct(self, w: DeviceMatrix) -> NDArray[Any]:
        """cq_linear of common.cuh, an array of one."""
        out = np.zeros(1, LINEAR)
        out["w"] = w.struct
        for name in ("out", "x", "q", "scales", "bias", "gather", "accumulate"):
            out[name] = getattr(self, name)
        out["n_items"] = self.n_items
        if self.routing is not None:
            for name in ("ids", "order", "offsets", "tiles", "top_k"):
                out[name] = getattr(self.routing, name)
        return out

    @property
    def n_items(self) -> int:
        """Rows of out."""
        return self.n_tokens * (self.routing.top_k if self.routing else 1)

    @property
    def n_tiles(self) -> int:
        """Tiles of items."""
        return self.routing.max_tiles(self.n_tokens) if self.routing else ceil_div(self.n_tokens, TILE_TOKENS)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def is_clustered(kind: int) -> bool:
    """Whether a tensor type is one of ours."""
    return kind in list(CQType)


# ---- linear layers ----


def linear(w: DeviceMatrix, operands: Operands, *, tensor_cores: bool = True) -> Launch:
    """The launch that suits the number of tokens."""
    few = operands.n_tokens <= GEMV_MAX_TOKENS
    return gemv(w, operands) if few else gemm(w, operands, tensor_cores=tensor_cores)


def gemv(w: DeviceMatrix, operands: Operands) -> Launch:
    """Each item on its own. No sorting of slots by expert is needed."""
    args: tuple[Any, ...] = (operands.struct(w),)
    if not is_clustered(w.type):
        grid = (ceil_div(w.n_rows, 4), operands.n_items, 1)
        return Launch(linear_module("plain.cu", w.type), "plain_gemv", grid, 128, args)
    lanes = gemv_lanes(w.n_cols)
    grid = (ceil_div(w.n_rows, 8 * (128 // lanes)), operands.n_items, 1)
    return Launch(linear_module("gemv.cu", w.type), "gemv", grid, 128, (*args, np.int32(lanes)))


def gemv_lanes(n_cols: int) -> int:
    """Lanes that share a ring of rows: as many as possible with the fewest idle in the last round of half blocks."""
    halves = n_cols // 32
    return min((32, 16, 8), key=lambda lanes: ceil_div(halves, lanes) * lanes)


def gemm(w: DeviceMatrix, operands: Operands, *, tensor_cores: bool = True) -> Launch:
    """Tiles of items; a routing's order, offsets and tiles must be there (group)."""
    args = (operands.struct(w),)
    if w.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        grid = (operands.n_tiles, ceil_div(w.n_rows, 64), 1)
        return Launch(linear_module("plain.cu", w.type), "plain_gemm", grid, 256, args)
    module = linear_module("gemm.cu", w.type, tensor_cores=tensor_cores)
    return Launch(module, "gemm", (operands.n_tiles, ceil_div(w.n_rows, 128), 1), 256, args)


def linear_module(source: str, kind: int, *, tensor_cores: bool = True) -> Module:
    """A linear layer's module for one tensor type; without tensor cores the GEMM uses dp4a."""
    dp4a = () if tensor_cores else (("CQ_DP4A", 1),)
    return Module(source, (("CQ_TYPE", int(kind)), *dp4a))


# ---- experts ----

ROUTE = Module("route.cu")


def route(logits: int, routing: DeviceRouting, n_tokens: int, *, normalize: bool) -> list[Launch]:
    """Each token's experts, and for more tokens than the GEMV takes the slots sorted by expert."""
    sizes = (np.int32(n_tokens), np.int32(routing.n_experts), np.int32(routing.top_k), np.int32(normalize))
    args = (np.uint64(logits), np.uint64(routing.ids), np.uint64(routing.weights), *sizes)
    launches = [Launch(ROUTE, "route", (ceil_div(n_tokens, 4), 1, 1), 128, args)]
    if n_tokens > GEMV_MAX_TOKENS:
        launches.append(group(routing, n_tokens))
    return launches


def group(routing: DeviceRouting, n_tokens: int) -> Launch:
    """Order, offsets and tiles from ids."""
    sizes = (n_tokens * routing.top_k, routing.n_experts, routing.max_tiles(n_tokens))
    addresses = (routing.ids, routing.order, routing.offsets, routing.tiles)
    args = (*map(np.uint64, addresses), *map(np.int32, sizes))
    return Launch(ROUTE, "group", (1, 1, 1), 256, args, shared_bytes=8 * (routing.n_experts + 1))


def combine(y: int, routing: DeviceRouting, out: int, n: int, n_tokens: int) -> Launch:
    """out [n_tokens, n] += the experts' weighted outputs."""
    args = (np.uint64(y), np.uint64(routing.weights), np.uint64(out), np.int32(n), np.int32(routing.top_k))
    return _rows_launch("combine", (ceil_div(n, ROW_THREADS), n_tokens), *args)


# ---- rows ----

ROWS = Module("rows.cu")


def _rows_launch(kernel: str, grid: tuple[int, int], *args: Any) -> Launch:
    return Launch(ROWS, kernel, (*grid, 1), ROW_THREADS, args)


def embed(table: DeviceMatrix, tokens: int, out: int, n_tokens: int) -> Launch:
    """out [n_tokens, n_cols] = rows of an F32, F16 or Q8_0 table."""
    return _rows_launch("embed", (n_tokens, 1), table.struct, np.uint64(tokens), np.uint64(out))


def rms_norm(x: int, weight: int, out: int, n: int, eps: float, n_rows: int) -> Launch:
    """Norm of rows [n_rows, n]."""
    args = (np.uint64(x), np.uint64(weight), np.uint64(out), np.int32(n), np.float32(eps))
    return _rows_launch("rms_norm", (n_rows, 1), *args)


def quantize(x: int, q: int, scales: int, n: int, bits: int, n_rows: int) -> Launch:
    """Activations [n_rows, n] per row."""
    args = (np.uint64(x), np.uint64(q), np.uint64(scales), np.int32(n), np.float32((1 << bits - 1) - 1))
    return _rows_launch("quantize", (n_rows, 1), *args)


def quantize_blocks(x: int, q: int, scales: int, n: int, n_rows: int) -> Launch:
    """Activations [n_rows, n] per 32 columns, for Q8_0."""
    n_blocks = n_rows * n // Q8_0_BLOCK
    args = (np.uint64(x), np.uint64(q), np.uint64(scales), np.int32(n_blocks))
    return _rows_launch("quantize_blocks", (ceil_div(n_blocks, 8), 1), *args)


def rope(
    x: int, cos_sin: int, position: int, heads: tuple[int, int], n_rot: int, n_tokens: int, *, interleaved: bool
) -> Launch:
    """x [n_tokens, *heads = (n_heads, head_dim)] in place; position: address of the first token's."""
    sizes = map(np.int32, (*heads, n_rot, interleaved))
    return _rows_launch("rope", (n_tokens, 1), np.uint64(x), np.uint64(cos_sin), np.uint64(position), *sizes)


def swiglu(gate: int, up: int, n: int, hadamard: int, n_rows: int) -> Launch:
    """gate [n_rows, n] in place."""
    grid = (ceil_div(n, hadamard or 1024), n_rows)
    return _rows_launch("swiglu", grid, np.uint64(gate), np.uint64(up), np.int32(n), np.int32(hadamard))


def select_rows(x: int, out: int, n: int, first: int, n_rows: int) -> Launch:
    """out [n_rows, n] = rows of x from `first` on."""
    grid = (ceil_div(n, ROW_THREADS), n_rows)
    return _rows_launch("select_rows", grid, np.uint64(x), np.uint64(out), np.int32(n), np.int32(first))


# ---- attention ----


@dataclass(frozen=True)
class AttentionShape:
    """What attention depends on besides addresses and the number of tokens. window 0: all keys are visible."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ctx: int
    window: int
    scale: float

    @property
    def module(self) -> Module:
        """attention.cu for this width of a head."""
        return Module("attention.cu", (("CQ_HEAD_DIM", self.head_dim),))

    def tiles(self, n_tokens: int) -> int:
        """Blocks that the queries of one key-value head fill."""
        return ceil_div(n_tokens * (self.n_heads // self.n_kv_heads), QUERY_ROWS)

    def splits(self, n_tokens: int, n_blocks: int) -> int:
        """Parts of the keys that bring a single token's blocks to n_blocks, of at least 128 keys; more tokens: one."""
        if n_tokens > 1:
            return 1
        return max(1, min(n_blocks // (self.n_kv_heads * self.tiles(n_tokens)), self.n_ctx // 128))

    def partial_floats(self, n_tokens: int, splits: int) -> int:
        """float32 elements of what the splits leave for the merge."""
        return splits * n_tokens * self.n_heads * (self.head_dim + 2) if splits > 1 else 1


def append(new: int, cache: int, position: int, heads: tuple[int, int], n_ctx: int, n_tokens: int) -> Launch:
    """Keys or values [n_tokens, *heads = (n_kv_heads, head_dim)] to the cache [n_kv_heads, n_ctx, head_dim] as F16."""
    module = Module("attention.cu", (("CQ_HEAD_DIM", heads[1]),))
    args = (np.uint64(new), np.uint64(cache), np.uint64(position), np.int32(n_ctx))
    return Launch(module, "append", (n_tokens, heads[0], 1), 128, args)


def attention(
    shape: AttentionShape, addresses: tuple[int, int, int, int, int, int], n_tokens: int, splits: int
) -> list[Launch]:
    """addresses: q, k cache, v cache, out, partial (partial_floats) and position."""
    struct = np.zeros(1, ATTENTION)
    for name, address in zip(("q", "k_cache", "v_cache", "out", "partial", "position"), addresses, strict=True):
        struct[name] = address
    for name in ("n_heads", "n_kv_heads", "n_ctx", "window", "scale"):
        struct[name] = getattr(shape, name)
    struct["n_tokens"] = n_tokens
    launches = [Launch(shape.module, "attention", (shape.tiles(n_tokens), shape.n_kv_heads, splits), 128, (struct,))]
    if splits > 1:
        args = (np.uint64(addresses[4]), np.uint64(addresses[3]), np.int32(splits))
        launches.append(Launch(shape.module, "attention_merge", (n_tokens * shape.n_heads, 1, 1), 128, args))
    return launches
