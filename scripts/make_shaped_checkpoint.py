"""Write a checkpoint of random bfloat16 weights in the shapes of a large Mixture of Experts, layer by layer.

    python scripts/make_shaped_checkpoint.py qwen3-30b-a3b --layers 4 --tokenizer DIRECTORY --out DIRECTORY

For measuring what a conversion takes. The vocabulary is the given tokenizer's, so that embedding and head stay small
beside the layers; with `--vocab` the model's own number of rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

DEVIATION = 0.02


def qwen3(layers: int, vocab: int) -> PretrainedConfig:
    """Qwen3-30B-A3B."""
    return Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    )


def mixtral(layers: int, vocab: int) -> PretrainedConfig:
    """Mixtral 8x7B."""
    return MixtralConfig(
        vocab_size=vocab, num_hidden_layers=layers, rope_theta=1e6, architectures=["MixtralForCausalLM"]
    )


CONFIGS = {"qwen3-30b-a3b": (qwen3, 151936), "mixtral-8x7b": (mixtral, 32000)}


def expert_names(config: PretrainedConfig) -> tuple[str, tuple[str, str, str], int, int]:
    """Prefix below a layer, names of gate, up and down below an expert, number and width of the experts."""
    if config.model_type == "mixtral":
        return "block_sparse_moe", ("w1", "w3", "w2"), config.num_local_experts, config.intermediate_size
    return "mlp", ("gate_proj", "up_proj", "down_proj"), config.num_experts, config.moe_intermediate_size


def layer_shapes(config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names below a layer and shapes of its tensors."""
    hidden, head_dim = config.hidden_size, getattr(config, "head_dim", None) or 128
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    yield from ((f"{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    if config.model_type == "qwen3_moe":
        yield from ((f"self_attn.{name}_norm.weight", (head_dim,)) for name in "qk")
    for name, rows, cols in (
        ("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries),
    ):  # fmt: skip
        yield f"self_attn.{name}_proj.weight", (rows, cols)
    prefix, (gate, up, down), n_experts, width = expert_names(config)
    yield f"{prefix}.gate.weight", (n_experts, hidden)
    for expert in range(n_experts):
        for name, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
            yield f"{prefix}.experts.{expert}.{name}.weight", shape


def main() -> None:
    """Write it."""
    p = argparse.ArgumentParser(description="a checkpoint of random weights in a large model's shapes")
    p.add_argument("shape", choices=CONFIGS)
    p.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    p.add_argument("--tokenizer", required=True, help="directory with a tokenizer")
    p.add_argument("--vocab", action="store_true", help="embedding and head with the model's own number of rows")
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    make, vocab = CONFIGS[a.shape]
    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    config = make(a.layers, vocab if a.vocab else len(tokenizer))
    a.out.mkdir(parents=True)
    config.save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    write_weights(config, a.out)


def write_weights(config: PretrainedConfig, out: Path) -> None:
    """One file per layer, one for the rest, and the index."""
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def random(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * DEVIATION).bfloat16()

    def save(file: str, shapes: Iterator[tuple[str, tuple[int, ...]]]) -> None:
        tensors = {name: random(shape) for name, shape in shapes}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    rows = (config.vocab_size, config.hidden_size)
    outside = (("model.embed_tokens.weight", rows), ("model.norm.weight", rows[1:]), ("lm_head.weight", rows))
    save("model-outside.safetensors", iter(outside))
    for layer in range(config.num_hidden_layers):
        shapes = ((f"model.layers.{layer}.{name}", shape) for name, shape in layer_shapes(config))
        save(f"model-layer-{layer:03}.safetensors", shapes)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


if __name__ == "__main__":
    main()
