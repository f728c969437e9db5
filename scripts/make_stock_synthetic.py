"""A large model's shapes in random weights, as Q4_0 for llama-bench and as ours, for scripts/compare_llamacpp.py.

    python scripts/make_stock_synthetic.py qwen3-30b-a3b --layers 4 --out qwen3-q4_0.gguf --ours qwen3-cq4.gguf

Types are those that llama-quantize gives for Q4_0: the output in Q6_K, all other matrices, the embedding too, in Q4_0.
With --pure the output is Q4_0 as well. There is no tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from pyggml_bridge.format import Companions
from pyggml_bridge.measure.synthetic import SHAPES, write_synthetic
from pyggml_bridge.reader import GGUFFile

Q4_0_BLOCK = np.dtype([("scale", np.float16), ("nibbles", np.uint8, 16)])
COLS = 32  # of a block
SCALE = 3e-3  # small enough for finite activations
Q6_K_BLOCK = np.dtype([("bits", np.uint8, 192), ("scales", np.int8, 16), ("scale", np.float16)])
Q6_K_COLS = 256


def main() -> None:
    """Write it, from the names, shapes and keys of ours."""
    p = argparse.ArgumentParser(description="random Q4_0 weights in a large model's shapes")
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("--layers", type=int, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--ours", type=Path, required=True, help="the same shapes in CQ4, as cq-bench --synthetic has them")
    p.add_argument("--pure", action="store_true", help="the output in Q4_0 too")
    a = p.parse_args()
    shape = SHAPES[a.shape]
    write_synthetic(a.ours, shape, a.layers)
    write(GGUFFile(a.ours), a.out, shape.arch, shape.vocab, pure=a.pure)


def write(ours: GGUFFile, out: Path, arch: str, vocab: int, *, pure: bool) -> None:
    """The same model in stock types."""
    writer = GGUFWriter(out, arch)
    for key, value in ours.metadata.items():
        if not key.startswith("cq.") and key != "general.architecture":
            writer.add_key_value(key, value, *ours.types[key])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)
    companions = {name for weight in ours.tensors for name in vars(Companions.of(weight)).values()}
    for name, tensor in ours.tensors.items():
        if name in companions:
            continue
        if tensor.type == GGMLQuantizationType.F32:
            writer.add_tensor(name, np.array(tensor.data).view(np.float32).reshape(tensor.shape))
            continue
        q6_k = name == "output.weight" and not pure
        raw = random_q6_k(tensor.shape, rng) if q6_k else random_q4_0(tensor.shape, rng)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.Q6_K if q6_k else GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_q4_0(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of a Q4_0 matrix [..., cols]."""
    *rows, cols = shape
    blocks = np.empty((*rows, cols // COLS), Q4_0_BLOCK)
    blocks["scale"] = SCALE
    blocks["nibbles"] = rng.integers(0, 256, (*blocks.shape, 16), dtype=np.uint8)
    return blocks.view(np.uint8).reshape(*rows, -1)


def random_q6_k(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of a Q6_K matrix [..., cols], in weights as large as random_q4_0's."""
    *rows, cols = shape
    blocks = np.empty((*rows, cols // Q6_K_COLS), Q6_K_BLOCK)
    blocks["scale"] = SCALE / 64
    blocks["scales"] = rng.integers(8, 24, (*blocks.shape, 16), dtype=np.int8)
    blocks["bits"] = rng.integers(0, 256, (*blocks.shape, 192), dtype=np.uint8)
    return blocks.view(np.uint8).reshape(*rows, -1)


if __name__ == "__main__":
    main()
