"""The recorder of a forward pass: the operations of one batch of tokens, recorded once per model, run by a backend.

A model file (models/<architecture>.py) calls Program's methods in the order of the computation. Nothing is computed
while recording, so one recording serves every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.operations import (
    Attention,
    Combine,
    CopyColumns,
    Embed,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Route,
    Routing,
    Rows,
    Scoring,
    SelectOutputs,
    SwiGLU,
    Value,
)
from pyggml_bridge.weights import Matrix


@dataclass(frozen=True, eq=False)
class LongRope:
    """Rope whose angles depend on the length of the sequence.

    The program's operations read `table`, float32 [n_ctx, n_rot / 2, 2]. Its first len(short) rows are `short` for
    sequences of up to len(short) tokens, as at the start, and the first rows of `long` for longer sequences. Whoever
    changes the table tells the backend (Backend.refresh).
    """

    table: NDArray[np.float32]
    short: NDArray[np.float32]
    long: NDArray[np.float32]


@dataclass
class Program:
    """Recorder of operations. n_ctx: positions of the KV cache; n_kv_heads, head_dim: a layer's keys per position."""

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
        """Begin the next layer: operations belong to it until the next begin_layer or select_outputs."""
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

        A weight of several matrices (one per attention head) multiplies as many equal parts of each row.
        """
        out = add_to or Value(w.n_experts * w.n_rows, x.rows, x.top_k)
        self.ops.append(Linear(x, w, bias, out, add_to is not None, None))
        return out

    def expert_linear(self, x: Value, sections: Sequence[Matrix], routing: Routing) -> Value:
        """Each slot's row of x (of the slot's token, if x has a row per token) times its expert's matrix.

        sections: the experts' matrices, one section per tensor type (Weights.experts).
        """
        out = Value(sections[0].n_rows, Rows.SLOTS, routing.top_k)
        self.ops += [Linear(x, w, None, out, False, routing) for w in sections]
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
        """n columns from `first` on of each of the `parts` equal parts of a row of x, as a new value [parts * n].

        to: an existing value whose equal parts take the columns instead, from column `at` on.
        """
        out = to or Value(parts * n)
        self.ops.append(CopyColumns(x, first, out, at, n, parts))
        return out

    def swiglu(self, gate: Value, up: Value, hadamard: int = 0) -> Value:
        """silu(gate) * up (arXiv 2002.05202), then the Hadamard transform of blocks of `hadamard` columns (0: none).

        The result overwrites `gate`, whose memory is in the processor's cache, and is returned.
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
        """Every token goes to the one shared expert, weighted by the sigmoid of its logit [tokens, 1].

        Nothing is chosen, so the routing returned is not among `routings`.
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
