"""Small CQ files of random weights, written through gguf-py, for tests of the reader and the runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from pyggml_bridge.format import VERSION, Clustered, CQType, Sidecars, pack, register, section_name
from tests.oracle import random_indices

register()


@dataclass(frozen=True)
class Tiny:
    """Dimensions of a tiny model; n_experts 0: dense. expert_cqs: each expert's type where they differ; shared_ffn:
    width of an expert for all tokens behind a gate."""

    arch: str = "llama"
    cq: CQType = CQType.CQ4
    n_experts: int = 0
    expert_cqs: tuple[CQType, ...] = ()
    top_k: int = 2
    shared_ffn: int = 0
    vocab: int = 320
    hidden: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 48
    ffn: int = 192
    group_size: int = -1
    codebook_rows: int = 1
    scale_group: int = 64
    activation_bits: int = 8
    biases: bool = False
    tied: bool = False
    hadamard: int = 0
    seed: int = 0


def random_clustered(rng: np.random.Generator, shape: tuple[int, ...], t: Tiny, cq: CQType) -> Clustered:
    *lead, cols = shape
    codebook_cols = min(cols, t.group_size) if t.group_size > 0 else cols
    n_codebooks = -(-cols // codebook_cols)
    indices = random_indices(rng, shape, cq, t.codebook_rows)
    books = (*lead[:-1], -(-lead[-1] // t.codebook_rows))
    centroids = rng.integers(-127, 128, (*books, n_codebooks * cq.n_centroids)).astype(np.int8)
    scales = (rng.uniform(0.5, 2.0, lead) / (127 * np.sqrt(cols))).astype(np.float32)
    groups, scale_cols = None, 0
    if t.scale_group > 0:
        scale_cols = min(cols, t.scale_group)
        groups = rng.integers(30, 128, (*lead, -(-cols // scale_cols))).astype(np.int8)
    sizes = codebook_cols, scale_cols, t.codebook_rows
    return Clustered(cq, pack(indices, cq, t.codebook_rows), centroids, scales, groups, *sizes)


def write_tiny(path: Path, t: Tiny, keys: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Write a file with these further keys; returns the dequantized float32 weights by name."""
    rng = np.random.default_rng(t.seed)
    writer = GGUFWriter(path, t.arch)
    _write_keys(writer, t)
    for key, value in (keys or {}).items():
        kind = GGUFValueType.get_type(value)
        item = GGUFValueType.get_type(value[0]) if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, item)
    dense: dict[str, np.ndarray] = {}

    def clustered(name: str, *shape: int, cq: CQType = t.cq) -> None:
        weight = random_clustered(rng, shape, t, cq)
        names = Sidecars.of(name)
        writer.add_tensor(name, weight.packed, raw_dtype=GGMLQuantizationType(int(cq)))
        writer.add_tensor(names.centroids, weight.centroids)
        writer.add_tensor(names.scales, weight.scales)
        if weight.group_scales is not None:
            writer.add_tensor(names.group_scales, weight.group_scales)
        dense[name] = weight.dequantize()

    def experts(name: str, *shape: int) -> None:
        if not t.expert_cqs:
            clustered(name, t.n_experts, *shape)
            return
        whole = np.empty((t.n_experts, *shape), np.float32)
        for i, cq in enumerate(sorted(set(t.expert_cqs))):
            section, ids = section_name(name, i), [e for e, own in enumerate(t.expert_cqs) if own is cq]
            clustered(section, len(ids), *shape, cq=cq)
            writer.add_tensor(Sidecars.of(section).experts, np.array(ids, np.int32))
            whole[ids] = dense.pop(section)
        dense[name] = whole

    def plain(name: str, array: np.ndarray, dtype: type = np.float32) -> None:
        writer.add_tensor(name, array.astype(dtype))
        dense[name] = array.astype(dtype).astype(np.float32)

    plain("token_embd.weight", rng.normal(0, 1, (t.vocab, t.hidden)), np.float16)
    for layer in range(t.n_layers):
        b = f"blk.{layer}"
        q_out, kv_out = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
        plain(f"{b}.attn_norm.weight", rng.uniform(0.5, 1.5, t.hidden))
        for name, n_out in (("attn_q", q_out), ("attn_k", kv_out), ("attn_v", kv_out)):
            clustered(f"{b}.{name}.weight", n_out, t.hidden)
            if t.biases:
                plain(f"{b}.{name}.bias", rng.normal(0, 0.5, n_out))
        clustered(f"{b}.attn_output.weight", t.hidden, q_out)
        plain(f"{b}.ffn_norm.weight", rng.uniform(0.5, 1.5, t.hidden))
        if t.n_experts:
            plain(f"{b}.ffn_gate_inp.weight", rng.normal(0, 0.2, (t.n_experts, t.hidden)))
            experts(f"{b}.ffn_gate_exps.weight", t.ffn, t.hidden)
            experts(f"{b}.ffn_up_exps.weight", t.ffn, t.hidden)
            experts(f"{b}.ffn_down_exps.weight", t.hidden, t.ffn)
            if t.shared_ffn:
                plain(f"{b}.ffn_gate_inp_shexp.weight", rng.normal(0, 0.2, (1, t.hidden)))
                clustered(f"{b}.ffn_gate_shexp.weight", t.shared_ffn, t.hidden)
                clustered(f"{b}.ffn_up_shexp.weight", t.shared_ffn, t.hidden)
                clustered(f"{b}.ffn_down_shexp.weight", t.hidden, t.shared_ffn)
        else:
            clustered(f"{b}.ffn_gate.weight", t.ffn, t.hidden)
            clustered(f"{b}.ffn_up.weight", t.ffn, t.hidden)
            clustered(f"{b}.ffn_down.weight", t.hidden, t.ffn)
    plain("output_norm.weight", rng.uniform(0.5, 1.5, t.hidden))
    if not t.tied:
        plain("output.weight", rng.normal(0, 0.3, (t.vocab, t.hidden)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def _write_keys(writer: GGUFWriter, t: Tiny) -> None:
    writer.add_uint32("cq.version", VERSION)
    writer.add_uint32("cq.bits", t.cq.bits)
    writer.add_int32("cq.group_size", t.group_size)
    writer.add_uint32("cq.codebook_rows", t.codebook_rows)
    writer.add_int32("cq.scale_group", t.scale_group)
    writer.add_uint32("cq.activation_bits", t.activation_bits)
    writer.add_uint32("cq.hadamard.ffn_down", t.hadamard)
    writer.add_context_length(1024)
    writer.add_embedding_length(t.hidden)
    writer.add_block_count(t.n_layers)
    writer.add_feed_forward_length(t.ffn)
    writer.add_head_count(t.n_heads)
    writer.add_head_count_kv(t.n_kv_heads)
    writer.add_key_length(t.head_dim)
    writer.add_value_length(t.head_dim)
    writer.add_rope_dimension_count(t.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if t.n_experts:
        writer.add_expert_count(t.n_experts)
        writer.add_expert_used_count(t.top_k)
    if t.shared_ffn:
        writer.add_expert_shared_feed_forward_length(t.shared_ffn)
