"""Mixtral: Llama's attention; a softmax router over experts, the weights of the chosen ones renormalized to 1.

transformers holds gate and up of all experts in one parameter; checkpoints hold w1 (gate), w3 (up) and w2 (down) of
each expert below block_sparse_moe. llama.cpp calls this architecture llama, told apart by its expert count.
"""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture, ChannelGroup, HeadGroup, HParams, Linear
from . import llama


def moe(router: str, gate: str, up: str, down: str) -> tuple[Linear, ...]:
    """Router and experts of a layer, by their names in checkpoints: `{}` stands for the expert, without `.weight`."""
    gate_up, experts = "mlp.experts.gate_up_proj", "mlp.experts"
    return (
        Linear("ffn_gate_inp", "mlp.gate.weight", "mlp.gate", "ffn_norm", on_disk=router, float32=True, router=True),
        Linear("ffn_gate_exps", gate_up, experts, "ffn_norm", part=(0, 2), experts=True, on_disk=f"{gate}.weight"),
        Linear("ffn_up_exps", gate_up, experts, "ffn_norm", part=(1, 2), experts=True, on_disk=f"{up}.weight"),
        Linear(
            "ffn_down_exps",
            "mlp.experts.down_proj",
            "mlp.experts.hidden",
            writes_residual=True,
            hadamard=True,
            experts=True,
            on_disk=f"{down}.weight",
        ),
    )


EXPERT = "block_sparse_moe.experts.{}"
CHANNELS = (ChannelGroup(("ffn_gate_exps", "ffn_up_exps"), "ffn_down_exps"),)
MOE = moe("block_sparse_moe.gate.weight", f"{EXPERT}.w1", f"{EXPERT}.w3", f"{EXPERT}.w2")


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.check(config)
    llama.require(config, sliding_window=None)


def expert_hparams(config: Any, n_experts: int) -> HParams:
    """llama.cpp's keys of a Mixture of Experts."""
    return {"expert_count": n_experts, "expert_used_count": config.num_experts_per_tok}


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Mixtral model, below `llama.`."""
    return {**llama.hparams(config), **expert_hparams(config, config.num_local_experts)}


ARCHITECTURE = Architecture(
    model_type="mixtral",
    gguf_name="llama",
    norms=llama.NORMS,
    linears=llama.ATTENTION + MOE,
    channels=CHANNELS,
    heads=HeadGroup("attn_v", "attn_output"),
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_local_experts,
    gguf_input=False,
)
