"""Small CQ files of random weights, written through gguf-py, for tests of the reader and the runner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from pyggml_bridge.format import (
    VERSION,
    Clustered,
    CQType,
    FileTensor,
    Grouping,
    Key,
    add_keys,
    pack,
    section_name,
    weight_tensors,
)
from tests.oracle import random_indices


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

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.group_size, self.scale_group, self.codebook_rows)


def random_clustered(
    rng: np.random.Generator, tensors: list[FileTensor], shape: tuple[int, ...], t: Tiny, cq: CQType
) -> Clustered:
    """A weight of this shape, of which the file holds these tensors."""
    _, centroids, scales, *groups = tensors
    cols = shape[-1]
    indices = random_indices(rng, shape, cq, t.codebook_rows)
    return Clustered(
        cq,
        pack(indices, cq, t.codebook_rows),
        rng.integers(-127, 128, centroids.shape).astype(np.int8),
        (rng.uniform(0.5, 2.0, scales.shape) / (127 * np.sqrt(cols))).astype(np.float32),
        rng.integers(30, 128, groups[0].shape).astype(np.int8) if t.scale_group > 0 else None,
        t.grouping.codebook_cols(cols),
        t.grouping.scale_cols(cols),
        t.codebook_rows,
    )


class TinyFile:
    """A file being written; `dense` has the dequantized float32 weights by name."""

    def __init__(self, path: Path, t: Tiny, keys: dict[str, Any] | None = None) -> None:
        self.t, self.rng = t, np.random.default_rng(t.seed)
        self.dense: dict[str, np.ndarray] = {}
        self._writer = GGUFWriter(path, t.arch)
        add_keys(self._writer, t.arch, _keys(t) | (keys or {}))

    def clustered(self, name: str, *shape: int, cq: CQType | None = None, ids: list[int] | None = None) -> None:
        """ids: the experts of this part of a weight."""
        cq = cq or self.t.cq
        tensors = weight_tensors(name, shape, cq, self.t.grouping, is_section=ids is not None)
        weight = random_clustered(self.rng, tensors, shape, self.t, cq)
        arrays = [*weight.arrays(), *([] if ids is None else [np.array(ids, np.int32)])]
        for tensor, array in zip(tensors, arrays, strict=True):
            self._writer.add_tensor(tensor.name, array, raw_dtype=tensor.type)
        self.dense[name] = weight.dequantize()

    def experts(self, name: str, *shape: int) -> None:
        t = self.t
        if not t.expert_cqs:
            self.clustered(name, t.n_experts, *shape)
            return
        whole = np.empty((t.n_experts, *shape), np.float32)
        for i, cq in enumerate(sorted(set(t.expert_cqs))):
            section, ids = section_name(name, i), [e for e, own in enumerate(t.expert_cqs) if own is cq]
            self.clustered(section, len(ids), *shape, cq=cq, ids=ids)
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


def _keys(t: Tiny) -> dict[str, Any]:
    keys = {
        Key.CQ_VERSION: VERSION,
        Key.CQ_BITS: t.cq.bits,
        Key.CQ_GROUP_SIZE: t.group_size,
        Key.CQ_CODEBOOK_ROWS: t.codebook_rows,
        Key.CQ_SCALE_GROUP: t.scale_group,
        Key.CQ_ACTIVATION_BITS: t.activation_bits,
        Key.CQ_HADAMARD_FFN_DOWN: t.hadamard,
        Key.CONTEXT_LENGTH: 1024,
        Key.EMBEDDING_LENGTH: t.hidden,
        Key.BLOCK_COUNT: t.n_layers,
        Key.FEED_FORWARD_LENGTH: t.ffn,
        Key.HEAD_COUNT: t.n_heads,
        Key.HEAD_COUNT_KV: t.n_kv_heads,
        Key.KEY_LENGTH: t.head_dim,
        Key.VALUE_LENGTH: t.head_dim,
        Key.ROPE_DIMENSION_COUNT: t.head_dim,
        Key.LAYER_NORM_RMS_EPSILON: 1e-5,
    }
    if t.n_experts:
        keys |= {Key.EXPERT_COUNT: t.n_experts, Key.EXPERT_USED_COUNT: t.top_k}
    if t.shared_ffn:
        keys[Key.EXPERT_SHARED_FEED_FORWARD_LENGTH] = t.shared_ffn
    return keys
