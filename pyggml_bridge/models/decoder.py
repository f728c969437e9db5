"""The decoder that most architectures are: RMS norms, rope, grouped-query attention, SwiGLU, dense or with experts."""

from __future__ import annotations

from pyggml_bridge.errors import CQError
from pyggml_bridge.models.hparams import HParams
from pyggml_bridge.models.rope import long_rope, rope_table
from pyggml_bridge.operations import Routing, Value
from pyggml_bridge.program import Program
from pyggml_bridge.weights import Matrix, Weights


def build_decoder(
    weights: Weights,
    n_ctx: int,
    *,
    interleaved_rope: bool,
    normalize_top_k: bool = True,
    jitter: float | None = None,
    window: int = 0,
) -> Program:
    """Record the forward pass for up to n_ctx positions.

    Biases and norms of queries and keys (per head, or over all heads) take part where the file has them.
    interleaved_rope: pairs (2i, 2i + 1), else halves; normalize_top_k: the chosen experts' weights sum to 1.
    jitter: of SparseMixer routing, softmax without; window: keys that attention sees, 0 for all.
    """
    h = HParams.read(weights)
    if h.value_dim != h.head_dim:
        raise CQError(f"{weights.file.path}: attention.key_length and attention.value_length differ")
    if h.n_rot > h.head_dim:
        raise CQError(f"{weights.file.path}: rope over {h.n_rot} of {h.head_dim} dimensions")
    p = Program(n_ctx, h.n_layers, h.n_kv_heads, h.head_dim, h.vocab_size, weights.activation_bits)
    if weights.has("rope_factors_long.weight"):
        p.long_rope = long_rope(weights, h.arch, n_ctx, h.n_rot)
    cos_sin = p.long_rope.table if p.long_rope else rope_table(weights, h.arch, n_ctx, h.n_rot)
    x = p.embed(embedding := weights.matrix("token_embd.weight", h.vocab_size, h.hidden))
    for layer in range(h.n_layers):
        block = f"blk.{layer}"
        p.begin_layer()

        normed = _norm(p, weights, h, x, f"{block}.attn_norm")
        q = _projection(p, weights, normed, f"{block}.attn_q", h.n_heads * h.head_dim)
        k = _projection(p, weights, normed, f"{block}.attn_k", h.n_kv_heads * h.head_dim)
        v = _projection(p, weights, normed, f"{block}.attn_v", h.n_kv_heads * h.head_dim)
        q, k = (_head_norm(p, weights, h, x, f"{block}.attn_{name}_norm.weight") for x, name in ((q, "q"), (k, "k")))
        p.rope(q, h.head_dim, cos_sin, interleaved=interleaved_rope)
        p.rope(k, h.head_dim, cos_sin, interleaved=interleaved_rope)
        attended = p.attention(layer, q, k, v, scale=h.head_dim**-0.5, window=window)
        _projection(p, weights, attended, f"{block}.attn_output", h.hidden, add_to=x)

        normed = _norm(p, weights, h, x, f"{block}.ffn_norm")
        feed_forward(p, weights, h, layer, normed, x, normalize=normalize_top_k, jitter=jitter)

    p.logits = output_logits(p, weights, h, x, embedding)
    return p


def feed_forward(
    p: Program,
    weights: Weights,
    h: HParams,
    layer: int,
    normed: Value,
    residual: Value,
    *,
    normalize: bool,
    jitter: float | None = None,
) -> None:
    """Add the layer's FFN of normed [tokens, hidden] to the residual stream: with experts if h has any, else dense."""
    if h.n_experts:
        _experts(p, weights, h, layer, normed, residual, normalize, jitter)
        if h.shared_ffn_width:
            _shared_expert(p, weights, h, layer, normed, residual)
    else:
        hidden = _gated_units(p, weights, normed, layer, "", h.ffn_width)
        _projection(p, weights, hidden, f"blk.{layer}.ffn_down", h.hidden, add_to=residual)


def output_logits(p: Program, weights: Weights, h: HParams, x: Value, embedding: Matrix) -> Value:
    """Logits [outputs, vocab] of the residual stream; the embedding is the head where the file has no other."""
    last = _norm(p, weights, h, p.select_outputs(x), "output_norm")
    tied = not weights.has("output.weight")
    return p.linear(last, embedding) if tied else _projection(p, weights, last, "output", h.vocab_size)


def _norm(p: Program, weights: Weights, h: HParams, x: Value, name: str) -> Value:
    bias = weights.vector(f"{name}.bias", h.hidden) if weights.has(f"{name}.bias") else None
    return p.rms_norm(x, weights.vector(f"{name}.weight", h.hidden), h.eps, bias)


def _projection(p: Program, weights: Weights, x: Value, name: str, n_out: int, add_to: Value | None = None) -> Value:
    bias = weights.vector(f"{name}.bias", n_out) if weights.has(f"{name}.bias") else None
    return p.linear(x, weights.matrix(f"{name}.weight", n_out, x.width), bias, add_to=add_to)


def _gated_units(p: Program, weights: Weights, x: Value, layer: int, suffix: str, width: int) -> Value:
    """silu(gate) * up [tokens, width], as ffn_down reads it; suffix: of the tensors' names."""
    gate = _projection(p, weights, x, f"blk.{layer}.ffn_gate{suffix}", width)
    up = _projection(p, weights, x, f"blk.{layer}.ffn_up{suffix}", width)
    return p.swiglu(gate, up, weights.hadamard("ffn_down", width))


def _head_norm(p: Program, weights: Weights, h: HParams, x: Value, name: str) -> Value:
    """Queries or keys after their norm, as wide as a head or as all of them; x itself where the file has none."""
    tensor = weights.file.tensors.get(name)
    if tensor is None:
        return x
    width = h.head_dim if tensor.shape == (h.head_dim,) else x.width
    return p.rms_norm(x, weights.vector(name, width), h.eps)


def _experts(
    p: Program,
    weights: Weights,
    h: HParams,
    layer: int,
    normed: Value,
    residual: Value,
    normalize: bool,
    jitter: float | None,
) -> None:
    """Sparse FFN: softmax over all experts, the top_k weighted by it; or SparseMixer's choice and weights."""
    block = f"blk.{layer}"
    logits = p.linear(normed, weights.matrix(f"{block}.ffn_gate_inp.weight", h.n_experts, h.hidden))
    routing: Routing
    if jitter is None:
        routing = p.route(logits, layer, h.top_k, normalize=normalize, groups=h.expert_groups, scale=h.expert_scale)
    else:
        routing = p.sparsemixer(logits, layer, h.top_k, jitter)
    gate_w = weights.experts(f"{block}.ffn_gate_exps.weight", h.expert_ffn_width, h.hidden, h.n_experts)
    up_w = weights.experts(f"{block}.ffn_up_exps.weight", h.expert_ffn_width, h.hidden, h.n_experts)
    down_w = weights.experts(f"{block}.ffn_down_exps.weight", h.hidden, h.expert_ffn_width, h.n_experts)
    gate = p.expert_linear(normed, gate_w, routing)
    up = p.expert_linear(normed, up_w, routing)
    hidden = p.swiglu(gate, up, weights.hadamard("ffn_down", h.expert_ffn_width))
    p.combine(p.expert_linear(hidden, down_w, routing), routing, add_to=residual)


def _shared_expert(p: Program, weights: Weights, h: HParams, layer: int, normed: Value, residual: Value) -> None:
    """The expert that every token goes to, times the sigmoid of its gate where the file has one."""
    block = f"blk.{layer}"
    hidden = _gated_units(p, weights, normed, layer, "_shexp", h.shared_ffn_width)
    if not weights.has(f"{block}.ffn_gate_inp_shexp.weight"):
        _projection(p, weights, hidden, f"{block}.ffn_down_shexp", h.hidden, add_to=residual)
        return
    gate = p.gate(_projection(p, weights, normed, f"{block}.ffn_gate_inp_shexp", 1), layer)
    p.combine(_projection(p, weights, hidden, f"{block}.ffn_down_shexp", h.hidden), gate, add_to=residual)
