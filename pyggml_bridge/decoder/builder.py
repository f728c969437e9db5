"""Blocks that decoders are made of, recorded one after the other: a model file calls them in its model's order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.decoder.hparams import HParams
from pyggml_bridge.decoder.rope import long_rope, rope_table
from pyggml_bridge.errors import CQError
from pyggml_bridge.operations import Routing, Value
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Matrix, Weights


class DecoderBuilder:
    """Records operations into `program`, with the widths of `h` and the tensors of `weights`.

    `stem` is the name of a tensor in the current layer: attn_q for blk.N.attn_q.weight. Norms and projections also take
    the bias (blk.N.attn_q.bias) where the file has one. Values are float32 [tokens, width]. A block with `add_to` adds
    its result to that value, the residual stream; every other block returns a new one. CQError names a tensor that is
    missing or has another shape.
    """

    def __init__(self, program: Program, weights: Weights, h: HParams) -> None:
        """Start before the first layer."""
        self.program, self.weights, self.h = program, weights, h
        self.layer = -1
        self._embedding = weights.matrix("token_embd.weight", h.vocab_size, h.hidden)

    @classmethod
    def of_file(cls, weights: Weights, n_ctx: int) -> DecoderBuilder:
        """A decoder with keys and values of one width, for up to n_ctx positions; CQError where the keys say others."""
        h, path = HParams.read(weights), weights.file.path
        if h.value_dim != h.head_dim:
            raise CQError(f"{path}: attention.key_length and attention.value_length differ")
        if h.n_rot > h.head_dim:
            raise CQError(f"{path}: rope over {h.n_rot} of {h.head_dim} dimensions")
        program = Program(n_ctx, h.n_layers, h.n_kv_heads, h.head_dim, h.vocab_size, weights.activation_bits)
        if weights.has("rope_factors_long.weight"):
            program.long_rope = long_rope(weights, h.arch, n_ctx, h.n_rot)
        return cls(program, weights, h)

    # ---- begin and end ----

    def embed(self) -> Value:
        """The residual stream [tokens, hidden] before the first layer."""
        return self.program.embed(self._embedding)

    def layers(self) -> Iterator[int]:
        """Begin each layer in turn: what is recorded before the next one belongs to it, and stems are its names."""
        for layer in range(self.h.n_layers):
            self.layer = layer
            self.program.begin_layer()
            yield layer

    def finish(self, x: Value) -> Program:
        """Record the final norm and the head, which is the embedding where the file has no other."""
        last = self._norm(self.program.select_outputs(x), "output_norm", self.h.hidden)
        if self.weights.has("output.weight"):
            self.program.logits = self._projection(last, "output", self.h.vocab_size)
        else:
            self.program.logits = self.program.linear(last, self._embedding)
        return self.program

    # ---- parts of every block ----

    def matrix(self, stem: str, n_out: int, n_in: int, n_heads: int | None = None) -> Matrix:
        """The weight [n_out, n_in], or [n_heads, n_out, n_in], of the current layer."""
        return self.weights.matrix(f"{self._name(stem)}.weight", n_out, n_in, n_heads)

    def norm(self, x: Value, stem: str, width: int | None = None) -> Value:
        """RMS norm of each row, or of each of its heads of `width` columns."""
        return self._norm(x, self._name(stem), width or x.width)

    def projection(self, x: Value, stem: str, n_out: int, *, add_to: Value | None = None) -> Value:
        """x W^T [tokens, n_out]."""
        return self._projection(x, self._name(stem), n_out, add_to)

    def _name(self, stem: str) -> str:
        return f"blk.{self.layer}.{stem}"

    def _norm(self, x: Value, name: str, width: int) -> Value:
        weight = self.weights.vector(f"{name}.weight", width)
        return self.program.rms_norm(x, weight, self.h.eps, self._bias(name, width))

    def _projection(self, x: Value, name: str, n_out: int, add_to: Value | None = None) -> Value:
        weight = self.weights.matrix(f"{name}.weight", n_out, x.width)
        return self.program.linear(x, weight, self._bias(name, n_out), add_to=add_to)

    def _bias(self, name: str, width: int) -> NDArray[np.float32] | None:
        return self.weights.vector(f"{name}.bias", width) if self.weights.has(f"{name}.bias") else None

    # ---- attention ----

    def rope_angles(self) -> NDArray[np.float32]:
        """cos and sin [n_ctx, n_rot / 2, 2] by the file's keys; with longrope they follow the sequence's length."""
        p = self.program
        return p.long_rope.table if p.long_rope else rope_table(self.weights, self.h.arch, p.n_ctx, self.h.n_rot)

    def queries_keys_values(self, normed: Value) -> tuple[Value, Value, Value]:
        """Queries [tokens, n_heads * head_dim], keys and values [tokens, n_kv_heads * head_dim]."""
        h = self.h
        q = self.projection(normed, "attn_q", h.n_heads * h.head_dim)
        k = self.projection(normed, "attn_k", h.n_kv_heads * h.head_dim)
        return q, k, self.projection(normed, "attn_v", h.n_kv_heads * h.head_dim)

    def rope(self, q: Value, k: Value, angles: NDArray[np.float32], *, interleaved: bool) -> None:
        """Rotate queries and keys in place. interleaved: columns (2i, 2i + 1) of a head, else (i, i + n_rot / 2)."""
        for x in (q, k):
            self.program.rope(x, self.h.head_dim, angles, interleaved=interleaved)

    def attention(self, q: Value, k: Value, v: Value, *, window: int = 0) -> Value:
        """Causal grouped-query attention [tokens, n_heads * head_dim]. window: keys that are seen, 0 for all."""
        return self.program.attention(self.layer, q, k, v, scale=self.h.head_dim**-0.5, window=window)

    def attention_output(self, attended: Value, *, add_to: Value) -> None:
        """Add the projection of the heads' outputs."""
        self.projection(attended, "attn_output", self.h.hidden, add_to=add_to)

    # ---- feed-forward ----

    def dense_ffn(self, normed: Value, *, add_to: Value) -> None:
        """SwiGLU that every token passes through."""
        self.projection(self._gated_units(normed, "", self.h.ffn_width), "ffn_down", self.h.hidden, add_to=add_to)

    def router_logits(self, normed: Value) -> Value:
        """[tokens, n_experts]."""
        return self.program.linear(normed, self.matrix("ffn_gate_inp", self.h.n_experts, self.h.hidden))

    def route(self, normed: Value, *, normalize: bool) -> Routing:
        """The top_k experts by a softmax over all. normalize: the weights of the chosen ones sum to 1."""
        h, logits = self.h, self.router_logits(normed)
        return self.program.route(
            logits, self.layer, h.top_k, normalize=normalize, groups=h.expert_groups, scale=h.expert_scale
        )

    def experts(self, normed: Value, routing: Routing, *, add_to: Value) -> None:
        """SwiGLU by each token's experts, weighted as the routing says."""
        p, h = self.program, self.h
        gate_w = self._expert_matrices("ffn_gate_exps", h.expert_ffn_width, h.hidden)
        up_w = self._expert_matrices("ffn_up_exps", h.expert_ffn_width, h.hidden)
        down_w = self._expert_matrices("ffn_down_exps", h.hidden, h.expert_ffn_width)
        gate = p.expert_linear(normed, gate_w, routing)
        up = p.expert_linear(normed, up_w, routing)
        hidden = p.swiglu(gate, up, self.weights.hadamard("ffn_down", h.expert_ffn_width))
        p.combine(p.expert_linear(hidden, down_w, routing), routing, add_to=add_to)

    def shared_expert(self, normed: Value, *, add_to: Value) -> None:
        """SwiGLU of the expert that every token goes to."""
        hidden = self._gated_units(normed, "_shexp", self.h.shared_ffn_width)
        self.projection(hidden, "ffn_down_shexp", self.h.hidden, add_to=add_to)

    def gated_shared_expert(self, normed: Value, *, add_to: Value) -> None:
        """SwiGLU of the expert that every token goes to, times the sigmoid of its gate."""
        hidden = self._gated_units(normed, "_shexp", self.h.shared_ffn_width)
        gate = self.program.gate(self.projection(normed, "ffn_gate_inp_shexp", 1), self.layer)
        self.program.combine(self.projection(hidden, "ffn_down_shexp", self.h.hidden), gate, add_to=add_to)

    def _gated_units(self, x: Value, suffix: str, width: int) -> Value:
        """silu(gate) * up [tokens, width], as ffn_down reads it. suffix: of the tensors' names."""
        gate = self.projection(x, f"ffn_gate{suffix}", width)
        up = self.projection(x, f"ffn_up{suffix}", width)
        return self.program.swiglu(gate, up, self.weights.hadamard("ffn_down", width))

    def _expert_matrices(self, stem: str, n_out: int, n_in: int) -> tuple[Matrix, ...]:
        return self.weights.experts(f"{self._name(stem)}.weight", n_out, n_in, self.h.n_experts)
