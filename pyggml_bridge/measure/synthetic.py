"""Models of random weights in the shapes of well-known ones, for measuring speed without their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.format import VERSION, CQType, FileTensor, Grouping, Key, Keys, add_keys, weight_tensors

GROUPING, HADAMARD, HEAD = Grouping(-1, 64, 8), 64, CQType.CQ5  # as cq-convert sets them
POOL_BYTES = 64 << 20  # random bytes, from which every tensor takes its own from another place
Q8_0_BLOCK = np.dtype([("scale", np.float16), ("values", np.int8, 32)])


@dataclass(frozen=True)
class Latent:
    """DeepSeek-V2's attention. rank: of the latent; nope, rope: columns of a query head; value: of a head's values."""

    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Mixture of Experts, by llama.cpp's names; ffn: of one expert.

    shared: experts that every token goes to, beside the others; dense_layers: without experts, dense_ffn wide; latent:
    in place of kv_heads and head_dim.
    """

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
    shared: int = 0
    dense_layers: int = 0
    dense_ffn: int = 0
    latent: Latent | None = None
    biases: bool = False  # of norms, attention and head
    window: int = 0
    jitter: float | None = None  # of SparseMixer routing


SHAPES = {
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 128, 8, 151936, 1e6, head_norms=True),
    "mixtral-8x7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000, 1e6),
    "deepseek-v2-lite": Shape(
        "deepseek2",
        27,
        2048,
        16,
        1,
        576,
        1408,
        64,
        6,
        102400,
        1e4,
        shared=2,
        dense_layers=1,
        dense_ffn=10944,
        latent=Latent(512, 128, 64, 128),
    ),
    "phi-mini-moe": Shape(
        "phimoe", 32, 4096, 32, 8, 128, 960, 16, 2, 32064, 1e4, biases=True, window=2047, jitter=0.01
    ),
}


def synthetic_bytes(shape: Shape, layers: int, cq: CQType = CQType.CQ4) -> int:
    """Size of the file's tensors."""
    return sum(tensor.nbytes for tensor in _tensors(shape, layers, cq))


def write_synthetic(path: Path, shape: Shape, layers: int, cq: CQType = CQType.CQ4) -> None:
    """Write a GGUF file of so many layers: linears of a clustered type, embedding Q8_0, head CQ5, router F32.

    Of a latent attention the expansions attn_k_b and attn_v_b are Q8_0, as cq-convert writes them.

    Weights are small enough for finite activations and mean nothing; there is no tokenizer.
    """
    writer = GGUFWriter(path, shape.arch)
    add_keys(writer, shape.arch, _keys(shape, layers, cq))
    tensors = list(_tensors(shape, layers, cq))
    for tensor in tensors:
        tensor.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, rng, pool))
    writer.close()


def _keys(s: Shape, layers: int, cq: CQType) -> Keys:
    keys: Keys = {
        Key.GENERAL_NAME: "synthetic",
        Key.BLOCK_COUNT: layers,
        Key.CONTEXT_LENGTH: 32768,
        Key.EMBEDDING_LENGTH: s.hidden,
        Key.FEED_FORWARD_LENGTH: s.dense_ffn or s.ffn,
        Key.EXPERT_FEED_FORWARD_LENGTH: s.ffn,
        Key.HEAD_COUNT: s.heads,
        **_head_keys(s),
        Key.ROPE_FREQ_BASE: s.rope_base,
        Key.LAYER_NORM_RMS_EPSILON: 1e-6,
        Key.EXPERT_COUNT: s.experts,
        Key.EXPERT_USED_COUNT: s.top_k,
        Key.CQ_VERSION: VERSION,
        Key.CQ_BITS: cq.bits,
        Key.CQ_GROUP_SIZE: GROUPING.group_size,
        Key.CQ_CODEBOOK_ROWS: GROUPING.codebook_rows,
        Key.CQ_SCALE_GROUP: GROUPING.scale_group,
        Key.CQ_ACTIVATION_BITS: 8,
        Key.CQ_HADAMARD_FFN_DOWN: HADAMARD,
    }
    optional = {
        Key.EXPERT_SHARED_COUNT: s.shared,
        Key.LEADING_DENSE_BLOCK_COUNT: s.dense_layers,
        Key.SLIDING_WINDOW: s.window,
    }
    keys |= {key: value for key, value in optional.items() if value}
    return keys if s.jitter is None else keys | {Key.ROUTER_JITTER_NOISE: s.jitter}


def _head_keys(s: Shape) -> Keys:
    if s.latent is None:
        kv_heads, key_length, value_length, n_rot = s.kv_heads, s.head_dim, s.head_dim, s.head_dim
        latent: Keys = {}
    else:
        rank, n_rot = s.latent.rank, s.latent.rope
        kv_heads, key_length, value_length = 1, rank + n_rot, rank
        latent = {
            Key.KV_LORA_RANK: rank,
            Key.KEY_LENGTH_MLA: s.latent.nope + n_rot,
            Key.VALUE_LENGTH_MLA: s.latent.value,
        }
    return latent | {
        Key.HEAD_COUNT_KV: kv_heads,
        Key.KEY_LENGTH: key_length,
        Key.VALUE_LENGTH: value_length,
        Key.ROPE_DIMENSION_COUNT: n_rot,
    }


def _tensors(s: Shape, layers: int, cq: CQType) -> Iterator[FileTensor]:
    yield _q8_0("token_embd.weight", s.vocab, s.hidden)
    for i in range(layers):
        block = f"blk.{i}"
        yield _float32(f"{block}.attn_norm.weight", s.hidden)
        yield _float32(f"{block}.ffn_norm.weight", s.hidden)
        if s.biases:
            yield from _biases(s, block)
        yield from _latent_attention(s, s.latent, block, cq) if s.latent else _attention(s, block, cq)
        yield from _gated(block, "", (s.dense_ffn, s.hidden), cq) if i < s.dense_layers else _experts(s, block, cq)
    yield _float32("output_norm.weight", s.hidden)
    for name, width in (("output_norm", s.hidden), ("output", s.vocab)) if s.biases else ():
        yield _float32(f"{name}.bias", width)
    yield from _clustered("output.weight", (s.vocab, s.hidden), HEAD)


def _attention(s: Shape, block: str, cq: CQType) -> Iterator[FileTensor]:
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if s.head_norms:
        yield _float32(f"{block}.attn_q_norm.weight", s.head_dim)
        yield _float32(f"{block}.attn_k_norm.weight", s.head_dim)
    yield from _clustered(f"{block}.attn_q.weight", (q_width, s.hidden), cq)
    yield from _clustered(f"{block}.attn_k.weight", (kv_width, s.hidden), cq)
    yield from _clustered(f"{block}.attn_v.weight", (kv_width, s.hidden), cq)
    yield from _clustered(f"{block}.attn_output.weight", (s.hidden, q_width), cq)


def _biases(s: Shape, block: str) -> Iterator[FileTensor]:
    for name in ("attn_norm", "ffn_norm", "attn_output"):
        yield _float32(f"{block}.{name}.bias", s.hidden)
    for name, heads in (("attn_q", s.heads), ("attn_k", s.kv_heads), ("attn_v", s.kv_heads)):
        yield _float32(f"{block}.{name}.bias", heads * s.head_dim)


def _latent_attention(s: Shape, a: Latent, block: str, cq: CQType) -> Iterator[FileTensor]:
    yield _float32(f"{block}.attn_kv_a_norm.weight", a.rank)
    yield from _clustered(f"{block}.attn_q.weight", (s.heads * (a.nope + a.rope), s.hidden), cq)
    yield from _clustered(f"{block}.attn_kv_a_mqa.weight", (a.rank + a.rope, s.hidden), cq)
    yield _q8_0(f"{block}.attn_k_b.weight", s.heads, a.rank, a.nope)
    yield _q8_0(f"{block}.attn_v_b.weight", s.heads, a.value, a.rank)
    yield from _clustered(f"{block}.attn_output.weight", (s.hidden, s.heads * a.value), cq)


def _experts(s: Shape, block: str, cq: CQType) -> Iterator[FileTensor]:
    yield _float32(f"{block}.ffn_gate_inp.weight", s.experts, s.hidden)
    yield from _gated(block, "_exps", (s.experts, s.ffn, s.hidden), cq)
    if s.shared:
        yield from _gated(block, "_shexp", (s.shared * s.ffn, s.hidden), cq)


def _gated(block: str, suffix: str, shape: tuple[int, ...], cq: CQType) -> Iterator[FileTensor]:
    """Gate and up [..., ffn, hidden], down [..., hidden, ffn]."""
    *lead, ffn, hidden = shape
    yield from _clustered(f"{block}.ffn_gate{suffix}.weight", shape, cq)
    yield from _clustered(f"{block}.ffn_up{suffix}.weight", shape, cq)
    yield from _clustered(f"{block}.ffn_down{suffix}.weight", (*lead, hidden, ffn), cq)


def _float32(name: str, *shape: int) -> FileTensor:
    return FileTensor.of(name, shape, GGMLQuantizationType.F32)


def _q8_0(name: str, *shape: int) -> FileTensor:
    return FileTensor.of(name, shape, GGMLQuantizationType.Q8_0)


def _clustered(name: str, shape: tuple[int, ...], cq: CQType) -> list[FileTensor]:
    return weight_tensors(name, shape, cq, GROUPING)


def _values(tensor: FileTensor, rng: np.random.Generator, pool: NDArray[np.uint8]) -> NDArray[Any]:
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
