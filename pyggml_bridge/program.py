"""A forward pass as data: the operations of one batch of tokens, recorded once per model and run by a backend.

A model file (models/<architecture>.py) calls Program's methods in the order of the computation. Nothing is computed
while recording. Quantizing activations, placing buffers and choosing kernels are the backend's business, so one
recording serves every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.weights import Matrix


class Rows(Enum):
    """Rows of a value: the batch's tokens, their expert slots (tokens * top_k), or the rows whose logits are wanted."""

    TOKENS = 0
    SLOTS = 1
    OUTPUTS = 2


class Scoring(Enum):
    """Scores of a router's logits: softmax over all experts, each one's sigmoid, or SparseMixer's.

    SparseMixer (arXiv 2409.12136, at inference) chooses one expert after the other. Each is weighted by its softmax
    over those not yet chosen whose logits are at most 2 * jitter below its own, relative to their own magnitude or it.
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
    """out = x / sqrt(mean(x^2) + eps) * weight + bias, over each of a row's parts of len(weight) columns."""

    x: Value
    weight: NDArray[np.float32]
    eps: float
    out: Value
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Linear:
    """out = x W^T + bias, or out += ... if accumulate. With a routing each slot uses its expert's matrix.

    Slots whose expert w does not hold are left to the other parts of a weight cut by type.
    Without one, a weight of n_experts matrices [n_rows, n_cols] multiplies so many parts of every row of x, each part
    with the matrix of its own: x is [rows, n_experts * n_cols], out [rows, n_experts * n_rows].
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

    cos_sin: float32 [n_ctx, n_rot / 2, 2]. interleaved: pairs (2i, 2i+1), else (i, i + n_rot/2). first: where in each
    head its n_rot columns are.
    """

    x: Value
    head_dim: int
    cos_sin: NDArray[np.float32]
    interleaved: bool
    first: int = 0


@dataclass(frozen=True)
class Attention:
    """Appends k and v to the layer's cache, then causal attention of q. window: keys seen, 0 for all.

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
    """gate = silu(gate) * up; hadamard: then each block of that many columns by the Hadamard matrix (0: none)."""

    gate: Value
    up: Value
    hadamard: int


@dataclass(frozen=True)
class Route:
    """The top_k experts by their scores, which become their weights; normalize: these then sum to 1.

    top_groups: only experts of so many of the n_groups groups of consecutive experts, those with the best expert; 0: of
    all. scale: the weights times this at last. jitter: SparseMixer leaves out what lies so far below its choice.
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
    """x goes to the other partition of a program that was cut in two (split.py)."""

    x: Value


@dataclass(frozen=True)
class Recv:
    """out comes from the other partition."""

    out: Value


@dataclass(frozen=True)
class CopyColumns:
    """n columns of each of `parts` equal parts of a row: from `first` on in x, to `at` on in out."""

    x: Value
    first: int
    out: Value
    at: int
    n: int
    parts: int


@dataclass(frozen=True, eq=False)
class LongRope:
    """Rope whose angles depend on the length of the sequence: the backend's operations read `table`, its user fills it
    and says so (Backend.refresh).

    table float32 [n_ctx, n_rot / 2, 2]: its first rows are those of `short` for sequences of up to len(short) tokens,
    as at the start, and those of `long` for longer ones.
    """

    table: NDArray[np.float32]
    short: NDArray[np.float32]
    long: NDArray[np.float32]


Op = Embed | RmsNorm | Linear | Rope | Attention | SwiGLU | Route | Combine | SelectOutputs | CopyColumns | Send | Recv


@dataclass
class Program:
    """Recorder of operations. n_ctx: positions of the KV cache; head_dim and n_kv_heads: its width per layer."""

    n_ctx: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    activation_bits: int = 8
    ops: list[Op] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)  # of the layers that choose experts
    logits: Value | None = None
    long_rope: LongRope | None = None
    layer_starts: list[int] = field(default_factory=list)  # each layer's first operation

    def begin_layer(self) -> None:
        """The operations that follow are the next layer's, up to the output's select_outputs."""
        self.layer_starts.append(len(self.ops))

    def embed(self, table: Matrix) -> Value:
        """Token embeddings [tokens, table.n_cols]."""
        out = Value(table.n_cols)
        self.ops.append(Embed(table, out))
        return out

    def rms_norm(
        self, x: Value, weight: NDArray[np.float32], eps: float, bias: NDArray[np.float32] | None = None
    ) -> Value:
        """RMSNorm (arXiv 1910.07467) of each row, or of each of its heads if the weight is only as wide as one."""
        out = Value(x.width, x.rows, x.top_k)
        self.ops.append(RmsNorm(x, weight, eps, out, bias))
        return out

    def linear(
        self, x: Value, w: Matrix, bias: NDArray[np.float32] | None = None, *, add_to: Value | None = None
    ) -> Value:
        """x W^T + bias as a new value, or added to `add_to` (the residual stream).

        A weight of several matrices (one per attention head) multiplies as many parts of each row.
        """
        out = add_to or Value(w.n_experts * w.n_rows, x.rows, x.top_k)
        self.ops.append(Linear(x, w, bias, out, add_to is not None, None))
        return out

    def expert_linear(self, x: Value, parts: Sequence[Matrix], routing: Routing) -> Value:
        """Each slot's row of x (of the slot's token, if x has a row per token) times its expert's matrix.

        parts: the experts' matrices, of several types or of one (Weights.experts).
        """
        out = Value(parts[0].n_rows, Rows.SLOTS, routing.top_k)
        self.ops += [Linear(x, w, None, out, False, routing) for w in parts]
        return out

    def rope(self, x: Value, head_dim: int, cos_sin: NDArray[np.float32], *, interleaved: bool, first: int = 0) -> None:
        """Rotate the heads of x in place (arXiv 2104.09864), each head's columns from `first` on."""
        self.ops.append(Rope(x, head_dim, cos_sin, interleaved, first))

    def attention(self, layer: int, q: Value, k: Value, v: Value, *, scale: float, window: int = 0) -> Value:
        """Grouped-query attention over the layer's KV cache; returns [tokens, q.width]."""
        out = Value(q.width)
        self.ops.append(Attention(layer, q, k, v, self.head_dim, self.head_dim, scale, window, out))
        return out

    def latent_attention(self, layer: int, q: Value, k: Value, value_dim: int, *, scale: float) -> Value:
        """Attention whose values are the first value_dim columns of the keys; returns [tokens, n_heads * value_dim]."""
        out = Value(q.width // self.head_dim * value_dim)
        self.ops.append(Attention(layer, q, k, None, self.head_dim, value_dim, scale, 0, out))
        return out

    def copy_columns(
        self, x: Value, first: int, n: int, parts: int = 1, *, to: Value | None = None, at: int = 0
    ) -> Value:
        """n columns from `first` on of each of x's parts [x.width / parts], as a new value [parts * n].

        to: the value whose parts take them instead, from column `at` on.
        """
        out = to or Value(parts * n)
        self.ops.append(CopyColumns(x, first, out, at, n, parts))
        return out

    def swiglu(self, gate: Value, up: Value, hadamard: int = 0) -> Value:
        """silu(gate) * up (arXiv 2002.05202), then the Hadamard transform of each block of columns (0: none).

        Takes gate's place, whose lines are in the cache.
        """
        self.ops.append(SwiGLU(gate, up, hadamard))
        return gate

    def route(
        self,
        logits: Value,
        layer: int,
        top_k: int,
        *,
        normalize: bool,
        groups: tuple[int, int] = (1, 0),
        scale: float = 1.0,
    ) -> Routing:
        """Choose each token's experts from the router's logits [tokens, n_experts]. groups: n_groups and top_groups."""
        routing = Routing(layer, logits.width, top_k)
        self.routings.append(routing)
        self.ops.append(Route(logits, routing, Scoring.SOFTMAX, normalize, *groups, scale))
        return routing

    def sparsemixer(self, logits: Value, layer: int, top_k: int, jitter: float) -> Routing:
        """Choose each token's experts from the router's logits [tokens, n_experts], as Scoring says."""
        routing = Routing(layer, logits.width, top_k)
        self.routings.append(routing)
        self.ops.append(Route(logits, routing, Scoring.SPARSEMIXER, normalize=False, jitter=jitter))
        return routing

    def gate(self, logit: Value, layer: int) -> Routing:
        """Every token goes to the one expert there is, weighted by the sigmoid of its logit [tokens, 1].

        No choice, so it is not among the routings.
        """
        routing = Routing(layer, logit.width, top_k=1)
        self.ops.append(Route(logit, routing, Scoring.SIGMOID, normalize=False))
        return routing

    def combine(self, y: Value, routing: Routing, *, add_to: Value) -> None:
        """Add the weighted sum of the experts' outputs to `add_to`."""
        self.ops.append(Combine(y, routing, add_to))

    def select_outputs(self, x: Value) -> Value:
        """Keep only the rows whose logits are wanted."""
        out = Value(x.width, Rows.OUTPUTS)
        self.ops.append(SelectOutputs(x, out))
        return out
