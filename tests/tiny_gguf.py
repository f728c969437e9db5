"""Small CQ files of random weights, written through gguf-py, for tests of the reader and the runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from pyggml_bridge.format import VERSION, Clustered, Companions, CQType, pack, register, section_name
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


class TinyFile:
    """A file being written; `dense` has the dequantized float32 weights by name."""

    def __init__(self, path: Path, t: Tiny, keys: dict[str, Any] | None = None) -> None:
        self.t, self.rng = t, np.random.default_rng(t.seed)
        self.dense: dict[str, np.ndarray] = {}
        self._writer = GGUFWriter(path, t.arch)
        _write_keys(self._writer, t)
        for key, value in (keys or {}).items():
            kind = GGUFValueType.get_type(value)
            item = GGUFValueType.get_type(value[0]) if kind is GGUFValueType.ARRAY else None
            self._writer.add_key_value(key, value, kind, item)

    def clustered(self, name: str, *shape: int, cq: CQType | None = None) -> None:
        cq = cq or self.t.cq
        weight = random_clustered(self.rng, shape, self.t, cq)
        names = Companions.of(name)
        self._writer.add_tensor(name, weight.packed, raw_dtype=GGMLQuantizationType(int(cq)))
        self._writer.add_tensor(names.centroids, weight.centroids)
        self._writer.add_tensor(names.scales, weight.scales)
        if weight.group_scales is not None:
            self._writer.add_tensor(names.group_scales, weight.group_scales)
        self.dense[name] = weight.dequantize()

    def experts(self, name: str, *shape: int) -> None:
        t = self.t
        if not t.expert_cqs:
            self.clustered(name, t.n_experts, *shape)
            return
        whole = np.empty((t.n_experts, *shape), np.float32)
        for i, cq in enumerate(sorted(set(t.expert_cqs))):
            section, ids = section_name(name, i), [e for e, own in enumerate(t.expert_cqs) if own is cq]
            self.clustered(section, len(ids), *shape, cq=cq)
            self._writer.add_tensor(Companions.of(section).experts, np.array(ids, np.int32))
            whole[ids] = self.dense.pop(section)
        self.dense[name] = whole

    def plain(self, name: str, array: np.ndarray, dtype: type = np.float32) -> None:
        self._writer.add_tensor(name, array.astype(dtype))
        self.dense[name] = array.astype(dtype).astype(np.float32)

    def q8_0(self, name: str, array: np.ndarray) -> None:
        blocks = quantize(array.astype(np.float32), GGMLQuantizationType.Q8_0)
        self._writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        self.dense[name] = dequantize(blocks, GGMLQuantizationType.Q8_0)

    def norm(self, name: str, width: int) -> None:
        self.plain(name, self.rng.uniform(0.5, 1.5, width))

    def bias(self, name: str, width: int) -> None:
        self.plain(name, self.rng.normal(0, 0.5, width))

    def expert_ffn(self, block: str, width: int) -> None:
        """Router and experts."""
        t = self.t
        self.plain(f"{block}.ffn_gate_inp.weight", self.rng.normal(0, 0.2, (t.n_experts, t.hidden)))
        self.experts(f"{block}.ffn_gate_exps.weight", width, t.hidden)
        self.experts(f"{block}.ffn_up_exps.weight", width, t.hidden)
        self.experts(f"{block}.ffn_down_exps.weight", t.hidden, width)

    def dense_ffn(self, block: str, width: int, suffix: str = "") -> None:
        self.clustered(f"{block}.ffn_gate{suffix}.weight", width, self.t.hidden)
        self.clustered(f"{block}.ffn_up{suffix}.weight", width, self.t.hidden)
        self.clustered(f"{block}.ffn_down{suffix}.weight", self.t.hidden, width)

    def embedding(self) -> None:
        self.plain("token_embd.weight", self.rng.normal(0, 1, (self.t.vocab, self.t.hidden)), np.float16)

    def output(self) -> None:
        """Norm and head, without which the embedding is it."""
        self.norm("output_norm.weight", self.t.hidden)
        if not self.t.tied:
            self.plain("output.weight", self.rng.normal(0, 0.3, (self.t.vocab, self.t.hidden)))

    def close(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()


def write_tiny(path: Path, t: Tiny, keys: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Write a file with these further keys; returns the dequantized float32 weights by name."""
    file = TinyFile(path, t, keys)
    file.embedding()
    for layer in range(t.n_layers):
        b = f"blk.{layer}"
        q_out, kv_out = t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim
        file.norm(f"{b}.attn_norm.weight", t.hidden)
        for name, n_out in (("attn_q", q_out), ("attn_k", kv_out), ("attn_v", kv_out)):
            file.clustered(f"{b}.{name}.weight", n_out, t.hidden)
            if t.biases:
                file.bias(f"{b}.{name}.bias", n_out)
        file.clustered(f"{b}.attn_output.weight", t.hidden, q_out)
        file.norm(f"{b}.ffn_norm.weight", t.hidden)
        if t.n_experts:
            file.expert_ffn(b, t.ffn)
            if t.shared_ffn:
                file.plain(f"{b}.ffn_gate_inp_shexp.weight", file.rng.normal(0, 0.2, (1, t.hidden)))
                file.dense_ffn(b, t.shared_ffn, "_shexp")
        else:
            file.dense_ffn(b, t.ffn)
    file.output()
    file.close()
    return file.dense


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
