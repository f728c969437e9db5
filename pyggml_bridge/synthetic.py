"""Models of random weights in the shapes of well-known ones, for measuring speed without their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.format import VERSION, CQType, Sidecars, packed_shape, register

SCALE_GROUP, CODEBOOK_ROWS, HADAMARD, HEAD = 64, 8, 64, CQType.CQ5  # as cq-convert sets them
POOL_BYTES = 64 << 20  # random bytes, from which every tensor takes its own from another place
Q8_0_BLOCK = np.dtype([("scale", np.float16), ("values", np.int8, 32)])


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Mixture of Experts, by llama.cpp's names; ffn: of one expert."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int
    top_k: int
    vocab: int
    rope_base: float
    head_norms: bool = False


SHAPES = {
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 128, 8, 151936, 1e6, head_norms=True),
    "mixtral-8x7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000, 1e6),
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # of the array that is written
    dtype: Any
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def synthetic_bytes(shape: Shape, layers: int, cq: CQType = CQType.CQ4) -> int:
    """Size of the file's tensors."""
    register()
    return sum(tensor.nbytes for tensor in _tensors(shape, layers, cq))


def write_synthetic(path: Path, shape: Shape, layers: int, cq: CQType = CQType.CQ4) -> None:
    """Write a GGUF file of so many layers: linears of a clustered type, embedding Q8_0, head CQ5, router F32.

    Weights are small enough for finite activations and mean nothing; there is no tokenizer.
    """
    register()
    writer = GGUFWriter(path, shape.arch)
    _write_keys(writer, shape, layers, cq)
    tensors = list(_tensors(shape, layers, cq))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, rng, pool))
    writer.close()


def _write_keys(writer: GGUFWriter, s: Shape, layers: int, cq: CQType) -> None:
    writer.add_name("synthetic")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(s.ffn)
    writer.add_expert_feed_forward_length(s.ffn)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(s.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    writer.add_uint32("cq.version", VERSION)
    writer.add_uint32("cq.bits", cq.bits)
    writer.add_int32("cq.group_size", -1)
    writer.add_uint32("cq.codebook_rows", CODEBOOK_ROWS)
    writer.add_int32("cq.scale_group", SCALE_GROUP)
    writer.add_uint32("cq.activation_bits", 8)
    writer.add_uint32("cq.hadamard.ffn_down", HADAMARD)


def _tensors(s: Shape, layers: int, cq: CQType) -> Iterator[_Tensor]:
    f32 = GGMLQuantizationType.F32
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    yield _q8_0("token_embd.weight", s.vocab, s.hidden)
    for i in range(layers):
        block = f"blk.{i}"
        norms = {"attn_norm": s.hidden, "ffn_norm": s.hidden}
        norms |= {"attn_q_norm": s.head_dim, "attn_k_norm": s.head_dim} if s.head_norms else {}
        for name, width in norms.items():
            yield _Tensor(f"{block}.{name}.weight", (width,), np.float32, f32)
        yield from _clustered(f"{block}.attn_q.weight", (q_width, s.hidden), cq)
        yield from _clustered(f"{block}.attn_k.weight", (kv_width, s.hidden), cq)
        yield from _clustered(f"{block}.attn_v.weight", (kv_width, s.hidden), cq)
        yield from _clustered(f"{block}.attn_output.weight", (s.hidden, q_width), cq)
        yield _Tensor(f"{block}.ffn_gate_inp.weight", (s.experts, s.hidden), np.float32, f32)
        yield from _clustered(f"{block}.ffn_gate_exps.weight", (s.experts, s.ffn, s.hidden), cq)
        yield from _clustered(f"{block}.ffn_up_exps.weight", (s.experts, s.ffn, s.hidden), cq)
        yield from _clustered(f"{block}.ffn_down_exps.weight", (s.experts, s.hidden, s.ffn), cq)
    yield _Tensor("output_norm.weight", (s.hidden,), np.float32, f32)
    yield from _clustered("output.weight", (s.vocab, s.hidden), HEAD)


def _q8_0(name: str, rows: int, cols: int) -> _Tensor:
    return _Tensor(name, (rows, cols // 32 * Q8_0_BLOCK.itemsize), np.uint8, GGMLQuantizationType.Q8_0)


def _clustered(name: str, shape: tuple[int, ...], cq: CQType) -> Iterator[_Tensor]:
    *lead, rows, cols = shape
    names, i8 = Sidecars.of(name), GGMLQuantizationType.I8
    yield _Tensor(name, packed_shape(shape, cq), np.uint8, GGMLQuantizationType(cq))
    yield _Tensor(names.centroids, (*lead, -(-rows // CODEBOOK_ROWS), cq.n_centroids), np.int8, i8)
    yield _Tensor(names.scales, (*lead, rows), np.float32, GGMLQuantizationType.F32)
    yield _Tensor(names.group_scales, (*lead, rows, cols // SCALE_GROUP), np.int8, i8)


def _values(tensor: _Tensor, rng: np.random.Generator, pool: NDArray[np.uint8]) -> NDArray[Any]:
    if tensor.name.endswith("norm.weight"):
        return np.ones(tensor.shape, np.float32)
    if tensor.name.endswith(".scales"):
        return np.full(tensor.shape, 2e-4, np.float32)
    if tensor.type == GGMLQuantizationType.F32:
        return rng.normal(0, 0.05, tensor.shape).astype(np.float32)
    raw = np.resize(np.roll(pool, int(rng.integers(POOL_BYTES))), tensor.nbytes)
    if tensor.type == GGMLQuantizationType.Q8_0:
        raw.view(Q8_0_BLOCK)["scale"] = 2e-4
    elif tensor.name.endswith(".group_scales"):
        raw &= np.uint8(127)
    return raw.view(tensor.dtype).reshape(tensor.shape)
