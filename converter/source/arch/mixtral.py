"""Mixtral: Llama's attention; a softmax router over experts, the weights of the chosen ones renormalized to 1.

Checkpoints hold w1 (gate), w3 (up) and w2 (down) of each expert below block_sparse_moe. llama.cpp calls this
architecture llama, told apart by its expert count.
"""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Mixtral model, below `llama.`."""
    return blocks.dimensions(config) | rope_hparams(config) | blocks.expert_hparams(config, config.num_local_experts)


ARCHITECTURE = Architecture(
    model_type="mixtral",
    gguf_name="llama",
    norms=blocks.NORMS,
    linears=(
        *blocks.attention("attn_norm", rope_pairs=True),
        *blocks.experts("ffn_norm", "block_sparse_moe", ("w1", "w3", "w2")),
    ),
    channels=(blocks.EXPERT_CHANNELS,),
    heads=blocks.VALUE_HEADS,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_local_experts,
)
