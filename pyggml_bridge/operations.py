"""The operations that a model's forward pass consists of, as data: what each reads, writes and computes.

Nothing here computes. Quantizing activations, placing buffers and choosing kernels are a backend's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.weights import Matrix


class Rows(Enum):
    """Rows of a value: the batch's tokens, their expert slots (tokens * top_k), or the rows whose logits are wanted."""

    TOKENS = 0
    SLOTS = 1
    OUTPUTS = 2


class Scoring(Enum):
    """Scores of a router's logits: softmax over all experts, each expert's sigmoid, or SparseMixer's.

    SparseMixer (arXiv 2409.12136, at inference) chooses one expert after the other, the one of the largest logit m
    first. The weight of a choice is its softmax over the experts not yet chosen whose logits l are not too far below:
    (m - l) / max(|l|, m) <= 2 * jitter.
    """

    SOFTMAX = 0
    SIGMOID = 1
    SPARSEMIXER = 2


@dataclass(frozen=True, eq=False)
class Value:
    """A float32 [rows, width] array that exists while the program runs. top_k: slots per token if rows is SLOTS."""

    width: int
    rows: Rows = Rows.TOKENS
    top_k: int = 1


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of each token, filled by Route: ids int32 and weights float32 [tokens, top_k]."""

    layer: int
    n_experts: int
    top_k: int


@dataclass(frozen=True)
class Embed:
    """out[t] = table[token t]."""

    table: Matrix
    out: Value


@dataclass(frozen=True)
class RmsNorm:
    """out = x / sqrt(mean(x^2) + eps) * weight + bias, over each of a row's equal parts of len(weight) columns."""

    x: Value
    weight: NDArray[np.float32]
    eps: float
    out: Value
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Linear:
    """out = x W^T + bias, or out += x W^T + bias if accumulate.

    With a routing each slot uses its expert's matrix. Where the experts' types differ, w is one section of the weight
    (Matrix.section), and slots of experts in other sections keep what `out` holds.
    Without a routing, a weight of n_experts matrices [n_rows, n_cols] multiplies as many equal parts of every row of x,
    each part by its own matrix: x is [rows, n_experts * n_cols], out [rows, n_experts * n_rows].
    """

    x: Value
    w: Matrix
    bias: NDArray[np.float32] | None
    out: Value
    accumulate: bool
    routing: Routing | None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of x [rows, n_heads * head_dim] in place.

    cos_sin: float32 [n_ctx, n_rot / 2, 2]. interleaved: pairs (2i, 2i+1), else (i, i + n_rot/2). first: the first of
    the n_rot columns of each head that are rotated.
    """

    x: Value
    head_dim: int
    cos_sin: NDArray[np.float32]
    interleaved: bool
    first: int = 0


@dataclass(frozen=True)
class Attention:
    """Appends k and v to the layer's cache, then causal attention of q. window: keys that a query sees, 0 for all.

    v None: the values are the first value_dim columns of each key, and only keys are cached.
    """

    layer: int
    q: Value
    k: Value
    v: Value | None
    head_dim: int
    value_dim: int
    scale: float
    window: int
    out: Value


@dataclass(frozen=True)
class SwiGLU:
    """gate = silu(gate) * up, then the Hadamard transform of each block of `hadamard` columns (0: none)."""

    gate: Value
    up: Value
    hadamard: int


@dataclass(frozen=True)
class Route:
    """Fills the routing with the top_k experts by score; the scores are their weights.

    normalize: the weights are divided by their sum. n_groups, top_groups: experts are chosen only from the top_groups
    of the n_groups groups of consecutive experts whose best scores are largest (0: from all). scale: factor of the
    weights, applied last. jitter: SparseMixer's (Scoring).
    """

    logits: Value
    routing: Routing
    scoring: Scoring
    normalize: bool
    n_groups: int = 1
    top_groups: int = 0
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True)
class Combine:
    """out[t] += sum over a token's slots of routing weight * y[slot]."""

    y: Value
    routing: Routing
    out: Value


@dataclass(frozen=True)
class SelectOutputs:
    """out = the last rows of x, those whose logits are wanted."""

    x: Value
    out: Value


@dataclass(frozen=True)
class Send:
    """x goes to the other partition of a program that is cut in two (split.py)."""

    x: Value


@dataclass(frozen=True)
class Recv:
    """out comes from the other partition."""

    out: Value


@dataclass(frozen=True)
class CopyColumns:
    """Copies n columns of each of a row's `parts` equal parts: in x from column `first`, in out from column `at`."""

    x: Value
    first: int
    out: Value
    at: int
    n: int
    parts: int


Op: TypeAlias = (
    Embed | RmsNorm | Linear | Rope | Attention | SwiGLU | Route | Combine | SelectOutputs | CopyColumns | Send | Recv
)
