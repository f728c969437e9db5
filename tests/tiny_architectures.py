"""Small CQ files of the architectures that need more than tests/tiny_gguf.py: deepseek2 and phimoe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyggml_bridge.format import Key
from tests.tiny_gguf import Tiny, TinyFile, write_tiny


@dataclass(frozen=True)
class TinyDeepSeek(Tiny):
    """ffn is the dense layers', expert_ffn an expert's; head_dim and n_kv_heads are not used.

    groups: of experts, and those a token's may come from; q_rank 0: queries without a latent.
    """

    arch: str = "deepseek2"
    n_layers: int = 3
    n_dense: int = 1
    n_experts: int = 6
    expert_ffn: int = 64
    n_shared: int = 2
    groups: tuple[int, int] = (1, 1)
    scale: float = 1.0
    normalize: bool = False
    q_rank: int = 0
    kv_rank: int = 64
    n_rot: int = 16
    nope: int = 32
    value: int = 24
    clustered_heads: bool = False  # attn_k_b in a CQ type and attn_v_b in F16, else both Q8_0


@dataclass(frozen=True)
class TinyPhi(Tiny):
    """original: tokens at most with the short factors of longrope, 0: another rope. window 0: none."""

    arch: str = "phimoe"
    n_layers: int = 3
    n_experts: int = 5
    ffn: int = 64
    jitter: float = 0.1
    window: int = 0
    original: int = 0


def write(path: Path, t: Tiny) -> None:
    """A file of any of these."""
    if isinstance(t, TinyDeepSeek):
        _write_deepseek(path, t)
    elif isinstance(t, TinyPhi):
        _write_phi(path, t)
    else:
        write_tiny(path, t)


def _deepseek_keys(t: TinyDeepSeek) -> dict[str, Any]:
    return {
        Key.HEAD_COUNT_KV: 1,
        Key.KEY_LENGTH: t.kv_rank + t.n_rot,
        Key.VALUE_LENGTH: t.kv_rank,
        Key.KEY_LENGTH_MLA: t.nope + t.n_rot,
        Key.VALUE_LENGTH_MLA: t.value,
        Key.KV_LORA_RANK: t.kv_rank,
        Key.Q_LORA_RANK: t.q_rank,
        Key.ROPE_DIMENSION_COUNT: t.n_rot,
        Key.LEADING_DENSE_BLOCK_COUNT: t.n_dense,
        Key.EXPERT_FEED_FORWARD_LENGTH: t.expert_ffn,
        Key.EXPERT_SHARED_COUNT: t.n_shared,
        Key.EXPERT_WEIGHTS_SCALE: t.scale,
        Key.EXPERT_WEIGHTS_NORM: t.normalize,
        Key.EXPERT_GROUP_COUNT: t.groups[0],
        Key.EXPERT_GROUP_USED_COUNT: t.groups[1],
        Key.ROPE_SCALING_TYPE: "yarn",
        Key.ROPE_SCALING_FACTOR: 4.0,
        Key.ROPE_SCALING_ORIGINAL: 16,
        Key.YARN_LOG_MULTIPLIER: 0.1,
        Key.ROPE_SCALING_ATTN_FACTOR: 1.1,
    }


def _write_deepseek(path: Path, t: TinyDeepSeek) -> None:
    file = TinyFile(path, t, _deepseek_keys(t))
    file.embedding()
    for layer in range(t.n_layers):
        b, q_in, q_out = f"blk.{layer}", t.q_rank or t.hidden, t.n_heads * (t.nope + t.n_rot)
        file.norm(f"{b}.attn_norm.weight", t.hidden)
        if t.q_rank:
            file.clustered(f"{b}.attn_q_a.weight", t.q_rank, t.hidden)
            file.norm(f"{b}.attn_q_a_norm.weight", t.q_rank)
        file.clustered(f"{b}.attn_q{'_b' if t.q_rank else ''}.weight", q_out, q_in)
        file.clustered(f"{b}.attn_kv_a_mqa.weight", t.kv_rank + t.n_rot, t.hidden)
        file.norm(f"{b}.attn_kv_a_norm.weight", t.kv_rank)
        values = file.rng.normal(0, t.kv_rank**-0.5, (t.n_heads, t.value, t.kv_rank))
        if t.clustered_heads:
            file.clustered(f"{b}.attn_k_b.weight", t.n_heads, t.kv_rank, t.nope)
            file.plain(f"{b}.attn_v_b.weight", values, np.float16)
        else:
            file.q8_0(f"{b}.attn_k_b.weight", file.rng.normal(0, t.nope**-0.5, (t.n_heads, t.kv_rank, t.nope)))
            file.q8_0(f"{b}.attn_v_b.weight", values)
        file.plain(f"{b}.attn_output.weight", file.rng.normal(0, 0.1, (t.hidden, t.n_heads * t.value)))
        file.norm(f"{b}.ffn_norm.weight", t.hidden)
        if layer < t.n_dense:
            file.dense_ffn(b, t.ffn)
        else:
            file.expert_ffn(b, t.expert_ffn)
            file.dense_ffn(b, t.n_shared * t.expert_ffn, "_shexp")
    file.output()
    file.close()


def _phi_keys(t: TinyPhi) -> dict[str, Any]:
    keys = {Key.ROUTER_JITTER_NOISE: t.jitter, Key.SLIDING_WINDOW: t.window, Key.ROPE_FREQ_BASE: 10000.0}
    if t.original:
        keys |= {Key.ROPE_SCALING_ORIGINAL: t.original, Key.ROPE_SCALING_ATTN_FACTOR: 1.2}
        keys[Key.ROPE_SCALING_ATTN_FACTOR_LONG] = 1.4
    return keys


def _write_phi(path: Path, t: TinyPhi) -> None:
    file = TinyFile(path, t, _phi_keys(t))
    file.embedding()
    q_out, kv_out = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
    for layer in range(t.n_layers):
        b = f"blk.{layer}"
        for name, n_out in (("attn_q", q_out), ("attn_k", kv_out), ("attn_v", kv_out)):
            file.clustered(f"{b}.{name}.weight", n_out, t.hidden)
            file.bias(f"{b}.{name}.bias", n_out)
        file.clustered(f"{b}.attn_output.weight", t.hidden, q_out)
        file.bias(f"{b}.attn_output.bias", t.hidden)
        for norm in ("attn_norm", "ffn_norm"):
            file.norm(f"{b}.{norm}.weight", t.hidden)
            file.bias(f"{b}.{norm}.bias", t.hidden)
        file.expert_ffn(b, t.ffn)
    if t.original:
        for name in ("short", "long"):
            file.plain(f"rope_factors_{name}.weight", file.rng.uniform(1, 4, t.head_dim // 2))
    file.output()
    file.bias("output_norm.bias", t.hidden)
    file.bias("output.bias", t.vocab)
    file.close()
