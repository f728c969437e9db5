"""Linear layers and experts on the GPU: matrices and routings as the kernels take them, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from pyggml_bridge.cuda.kernels import ROW_THREADS, Launch, Module, ceil_div, rows_launch
from pyggml_bridge.format import CQType

GEMV_MAX_TOKENS = 4  # up to so many tokens every token (or slot of an expert) reads the weights on its own
TILE_TOKENS = 64  # of the GEMM kernels: CQ_TILE_TOKENS

_MATRIX_FIELDS = ("type", "n_experts", "n_rows", "n_cols", "codebook_rows", "codebook_cols", "scale_cols", "unused")
MATRIX = np.dtype(
    [(name, "i4") for name in _MATRIX_FIELDS]
    + [(name, "u8") for name in ("data", "centroids", "group_scales", "scales")],
    align=True,
)
LINEAR = np.dtype(
    [("w", MATRIX)]
    + [(name, "u8") for name in ("x", "q", "scales", "bias", "ids", "order", "offsets", "tiles", "places", "out")]
    + [(name, "i4") for name in ("n_items", "top_k", "gather", "accumulate")],
    align=True,
)

MOST_LAYERS = 3  # of one launch
LINEARS = np.dtype([("of", LINEAR, MOST_LAYERS)], align=True)

CHOICE = np.dtype(
    [(name, "u8") for name in ("logits", "ids", "weights")]
    + [(n, "i4") for n in ("n_tokens", "n_experts", "top_k", "scoring", "normalize", "n_groups", "top_groups")]
    + [(name, "f4") for name in ("scale", "jitter")],
    align=True,
)


@dataclass(frozen=True)
class DeviceMatrix:
    """A weight on the device: its sizes, and addresses of its data and companions, 0 for companions it lacks."""

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
    """What a linear layer reads and writes.

    n_tokens: rows, with a routing tokens of top_k slots each. q and scales: quantized x, for CQ types and Q8_0. places:
    int32 [n_experts], each expert's matrix in this section of a weight cut by type. parts: without a routing, the equal
    parts of a row, each multiplied by its own matrix of the weight.
    """

    n_tokens: int
    out: int
    x: int = 0
    q: int = 0
    scales: int = 0
    bias: int = 0
    routing: DeviceRouting | None = None
    gather: bool = False
    accumulate: bool = False
    places: int = 0
    parts: int = 1

    def struct(self, w: DeviceMatrix) -> NDArray[Any]:
        """cq_linear of common.cuh, an array of one."""
        out = np.zeros(1, LINEAR)
        out["w"] = w.struct
        for name in ("out", "x", "q", "scales", "bias", "places", "gather", "accumulate"):
            out[name] = getattr(self, name)
        out["n_items"] = self.n_items
        if self.routing is not None:
            for name in ("ids", "order", "offsets", "tiles", "top_k"):
                out[name] = getattr(self.routing, name)
        return out

    @property
    def n_items(self) -> int:
        """Rows of out."""
        return self.n_tokens * (self.routing.top_k if self.routing else self.parts)

    @property
    def n_tiles(self) -> int:
        """Tiles of items."""
        if self.routing is not None:
            return self.routing.max_tiles(self.n_tokens)
        return self.parts * ceil_div(self.n_tokens, TILE_TOKENS)


def is_clustered(kind: int) -> bool:
    """Whether a tensor type is one of ours."""
    return kind in list(CQType)


# ---- linear layers ----


Layer = tuple[DeviceMatrix, Operands]


def linear(
    w: DeviceMatrix, operands: Operands, *others: Layer, tensor_cores: bool = True, n_processors: int = 1
) -> Launch:
    """gemv for few tokens, else gemm. others: as gemv's and gemm's."""
    if operands.n_tokens <= GEMV_MAX_TOKENS:
        return gemv(w, operands, *others, n_processors=n_processors)
    return gemm(w, operands, *others, tensor_cores=tensor_cores)


def gemv(w: DeviceMatrix, operands: Operands, *others: Layer, n_processors: int = 1) -> Launch:
    """The launch in which each row of the output is computed on its own, without sorting slots by expert.

    n_processors: the processors that share the work. others: further layers of the same launch, whose quantized x,
    type, n_cols and routing are the first layer's.
    """
    if not is_clustered(w.type):
        grid = (ceil_div(w.n_rows, 4), operands.n_items, 1)
        return Launch(linear_module("stock.cu", w.type), "stock_gemv", grid, 128, (operands.struct(w),))
    layers, most_rows = _layers(w, operands, *others)
    n_rows = w.n_rows + sum(matrix.n_rows for matrix, _ in others)
    team = gemv_team(w.n_cols, ceil_div(n_rows, 8) * operands.n_items, n_processors)
    grid = (ceil_div(most_rows, 8 * (128 // team)), operands.n_items, 1 + len(others))
    return Launch(linear_module("gemv.cu", w.type), "gemv", grid, 128, (layers, np.int32(team)))


def _layers(w: DeviceMatrix, operands: Operands, *others: Layer) -> tuple[NDArray[Any], int]:
    """cq_linears of common.cuh, an array of one, and the most rows of a matrix."""
    out, layers = np.zeros(1, LINEARS), [(w, operands), *others]
    for i, (matrix, of) in enumerate(layers):
        out["of"][0, i] = of.struct(matrix)[0]
    return out, max(matrix.n_rows for matrix, _ in layers)


def gemv_team(n_cols: int, n_groups: int, n_processors: int) -> int:
    """Threads that share eight rows of the weight, for n_groups groups of eight rows: those that should end first.

    In an iteration of the GEMV's loop each of these threads has 32 columns of its rows. For most of an iteration a warp
    waits for its own instructions: up to 2.5 warps on each of a processor's four schedulers take as long as one warp.
    """
    n_pieces = n_cols // 32

    def time(team: int) -> float:
        warps = n_groups * team / 32 / (4 * n_processors)
        return ceil_div(n_pieces, team) * max(2.5, warps)

    return min((32, 16, 8, 64, 128), key=time)


def gemm(w: DeviceMatrix, operands: Operands, *others: Layer, tensor_cores: bool = True) -> Launch:
    """The launch over tiles of rows; with a routing, group() must have run. others: as gemv's."""
    if w.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        grid = (operands.n_tiles, ceil_div(w.n_rows, 32), 2)
        return Launch(linear_module("stock.cu", w.type), "stock_gemm", grid, 256, (operands.struct(w),))
    module = linear_module("gemm.cu", w.type, tensor_cores=tensor_cores)
    layers, most_rows = _layers(w, operands, *others)
    return Launch(module, "gemm", (operands.n_tiles, ceil_div(most_rows, 128), 1 + len(others)), 256, (layers,))


def linear_module(source: str, kind: int, *, tensor_cores: bool = True) -> Module:
    """A linear layer's module for one tensor type; without tensor cores the GEMM uses dp4a."""
    dp4a = () if tensor_cores else (("CQ_DP4A", 1),)
    return Module(source, (("CQ_TYPE", int(kind)), *dp4a))


# ---- experts ----

ROUTE = Module("route.cu")
MAX_EXPERTS = 2048  # each of a warp's 32 lanes marks its 64 experts in one word of route.cu


@dataclass(frozen=True)
class Choice:
    """How experts are chosen and weighted; the fields are those of program.Route, scoring a Scoring's number."""

    scoring: int
    normalize: bool
    n_groups: int = 1
    top_groups: int = 0
    scale: float = 1.0
    jitter: float = 0.0


def route(logits: int, routing: DeviceRouting, n_tokens: int, choice: Choice) -> list[Launch]:
    """Each token's experts and, if there are too many tokens for gemv, the slots sorted by expert."""
    struct = np.zeros(1, CHOICE)
    for name in ("scoring", "normalize", "n_groups", "top_groups", "scale", "jitter"):
        struct[name] = getattr(choice, name)
    for name in ("ids", "weights", "n_experts", "top_k"):
        struct[name] = getattr(routing, name)
    struct["logits"], struct["n_tokens"] = logits, n_tokens
    launches = [Launch(ROUTE, "route", (ceil_div(n_tokens, 4), 1, 1), 128, (struct,))]
    if n_tokens > GEMV_MAX_TOKENS:
        launches.append(group(routing, n_tokens))
    return launches


def group(routing: DeviceRouting, n_tokens: int) -> Launch:
    """Order, offsets and tiles from ids."""
    sizes = (n_tokens * routing.top_k, routing.n_experts, routing.max_tiles(n_tokens))
    addresses = (routing.ids, routing.order, routing.offsets, routing.tiles)
    args = (*map(np.uint64, addresses), *map(np.int32, sizes))
    return Launch(ROUTE, "group", (routing.n_experts, 1, 1), 256, args, shared_bytes=4 * routing.n_experts)


def combine(y: int, routing: DeviceRouting, out: int, n: int, n_tokens: int) -> Launch:
    """out [n_tokens, n] += the experts' weighted outputs."""
    args = (np.uint64(y), np.uint64(routing.weights), np.uint64(out), np.int32(n), np.int32(routing.top_k))
    return rows_launch("combine", (ceil_div(n, ROW_THREADS), n_tokens), *args)


def combine_norm(y: int, routing: DeviceRouting, x: int, to: NDArray[np.void], n_tokens: int) -> Launch:
    """x [n_tokens, n] += the experts' weighted outputs, and the norm of the sum, as `to` says."""
    args = (np.uint64(y), np.uint64(routing.weights), np.uint64(x), np.int32(routing.top_k), to)
    return rows_launch("combine_norm", (n_tokens, 1), *args)


def embed(table: DeviceMatrix, tokens: int, out: int, n_tokens: int) -> Launch:
    """out [n_tokens, n_cols] = rows of an F32, F16 or Q8_0 table."""
    return rows_launch("embed", (n_tokens, 1), table.struct, np.uint64(tokens), np.uint64(out))
