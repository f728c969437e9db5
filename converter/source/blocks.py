"""Parts that decoder layers are made of, and llama.cpp's keys for them: arch/<model_type>.py puts them together.

Parts take the norm that feeds them, and their last linear writes the residual stream. Names of tensors are llama.cpp's,
names of parameters and modules are those inside transformers' decoder layer.
"""

from __future__ import annotations

from typing import Any

from pyggml_bridge.errors import CQError

from .architecture import ChannelGroup, HeadGroup, HParams, Linear, Norm, Vector, head_dim_of

NORMS = (Norm("attn_norm", "input_layernorm.weight"), Norm("ffn_norm", "post_attention_layernorm.weight"))

QKV_BIASES = tuple(Vector(f"attn_{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv")

# Between projection and rope, as wide as a head or as all heads: rope mixes rows, so the scales cannot be folded.
QK_NORMS = tuple(Vector(f"attn_{x}_norm.weight", f"self_attn.{x}_norm.weight") for x in "qk")

VALUE_HEADS = HeadGroup("attn_v", "attn_output")
BIASED_VALUE_HEADS = HeadGroup("attn_v", "attn_output", bias="attn_v.bias")

FFN_CHANNELS = ChannelGroup(("ffn_gate", "ffn_up"), "ffn_down")
EXPERT_CHANNELS = ChannelGroup(("ffn_gate_exps", "ffn_up_exps"), "ffn_down_exps")
SHARED_EXPERT_CHANNELS = ChannelGroup(("ffn_gate_shexp", "ffn_up_shexp"), "ffn_down_shexp")


# ---- linears ----


def attention(norm: str, *, rope_pairs: bool = False) -> tuple[Linear, ...]:
    """Grouped-query attention.

    rope_pairs: llama.cpp rotates the columns (2i, 2i + 1) of a head in this architecture, so its files hold the rows in
    that order; otherwise it rotates (i, i + head_dim / 2) as transformers does.
    """
    q_heads, k_heads = ("num_attention_heads", "num_key_value_heads") if rope_pairs else (None, None)
    return (
        Linear("attn_q", "self_attn.q_proj.weight", "self_attn.q_proj", norm, rope_heads=q_heads),
        Linear("attn_k", "self_attn.k_proj.weight", "self_attn.q_proj", norm, rope_heads=k_heads),
        Linear("attn_v", "self_attn.v_proj.weight", "self_attn.q_proj", norm, sensitive=True),
        Linear("attn_output", "self_attn.o_proj.weight", "self_attn.o_proj", writes_residual=True),
    )


def dense_ffn(norm: str, module: str = "mlp", suffix: str = "") -> tuple[Linear, ...]:
    """SwiGLU: down(silu(gate x) * up x). suffix: of llama.cpp's names."""
    gate, down = f"{module}.gate_proj", f"{module}.down_proj"
    return (
        Linear(f"ffn_gate{suffix}", f"{gate}.weight", gate, norm),
        Linear(f"ffn_up{suffix}", f"{module}.up_proj.weight", gate, norm),
        Linear(f"ffn_down{suffix}", f"{down}.weight", down, writes_residual=True, hadamard=True),
    )


def shared_expert(norm: str, module: str) -> tuple[Linear, ...]:
    """The expert that every token goes to. module: its name in transformers' layer."""
    return dense_ffn(norm, module, "_shexp")


def experts(
    norm: str, module: str, projections: tuple[str, str, str], *, router: str = "mlp.gate"
) -> tuple[Linear, ...]:
    """A router and SwiGLU experts.

    transformers holds gate and up of all experts in one parameter, while checkpoints hold the matrices of each expert
    by themselves: <module>.experts.N.<projection>.weight, where projections are those of gate, up and down; and the
    router as <module>.gate.weight. router: its module in transformers' layer.
    """
    gate, up, down = (f"{module}.experts.{{}}.{projection}.weight" for projection in projections)
    gate_up, inputs = "mlp.experts.gate_up_proj", "mlp.experts"
    return (
        Linear(
            "ffn_gate_inp",
            f"{router}.weight",
            router,
            norm,
            on_disk=f"{module}.gate.weight",
            float32=True,
            router=True,
        ),
        Linear("ffn_gate_exps", gate_up, inputs, norm, row_block=(0, 2), experts=True, on_disk=gate),
        Linear("ffn_up_exps", gate_up, inputs, norm, row_block=(1, 2), experts=True, on_disk=up),
        Linear(
            "ffn_down_exps",
            "mlp.experts.down_proj",
            "mlp.experts.hidden",
            writes_residual=True,
            hadamard=True,
            experts=True,
            on_disk=down,
        ),
    )


# ---- configuration ----


def require(config: Any, **expected: object) -> None:
    """CQError unless each config field has the expected value (a missing field counts as it)."""
    for field, value in expected.items():
        found = getattr(config, field, value)
        if found != value:
            raise CQError(f"{config.model_type}: {field} = {found!r} is not supported (only {value!r})")


def dimensions(config: Any) -> HParams:
    """llama.cpp's keys of every decoder, but for those of rope scaling and experts."""
    head_dim = head_dim_of(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
    }


def expert_hparams(config: Any, n_experts: int) -> HParams:
    """llama.cpp's keys of a Mixture of Experts."""
    return {"expert_count": n_experts, "expert_used_count": config.num_experts_per_tok}
