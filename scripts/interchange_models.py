"""Small seeded checkpoints of every architecture, each with a tokenizer of its family trained on a given text.

Random weights, of which the head is large enough that predictions are sharp: a wrong row order, key or routing then
moves the perplexity by percents and the divergence to about 1. Embeddings are as large as what the layers add and
routers are decided, as in trained models: otherwise a rounding that swaps two experts that are all but equal, rare as
it is, would be the largest difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from codequant_converter.source import arch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pyggml_bridge.tokenizer_ggml import PRE_TOKENIZERS

VOCAB = 2048
UNUSED = 16  # rows of the embedding without a token, as most checkpoints have; transformers may add some
HEAD_SPREAD = 2.0  # standard deviation of the logits
ROUTER_SPREAD = 4.0  # of the routers'
SPECIAL = ["<unk>", "<s>", "</s>"]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
DEEPSEEK = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 128,
    "routed_scaling_factor": 1.5,
    "rope_parameters": YARN,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "short_mscale": 1.1,
    "long_mscale": 1.1,
    "original_max_position_embeddings": 2048,
}
PHIMOE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "rope_parameters": LONGROPE,
}
# Name -> model_type, what differs from COMMON, and the pre-tokenizer of the family ("spm": SentencePiece).
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}, "llama-bpe"),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 64}, "smollm"),
    "mistral": ("mistral", {"sliding_window": None}, "tekken"),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, "spm"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen3": ("qwen3", {"head_dim": 64}, "qwen2"),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 64}, "qwen2"),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 256}, "qwen2"),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8}, "gpt-2"),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK, "deepseek-llm"),
    "deepseek_v2, q_lora": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": 64}, "deepseek-llm"),
    "phimoe": ("phimoe", PHIMOE, "spm"),
}


def save(name: str, folder: Path, text: str, seed: int = 0) -> None:
    """Write the checkpoint of MODELS[name] with its tokenizer."""
    model_type, fields, family = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(COMMON | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            if "bias" in parameter_name:
                parameter.uniform_(-0.5, 0.5)
            if parameter_name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                parameter.normal_(0, ROUTER_SPREAD / config.hidden_size**0.5)
        model.get_input_embeddings().weight.normal_(0, 1)
        model.get_output_embeddings().weight.normal_(0, HEAD_SPREAD / config.hidden_size**0.5)
    arch.find(model_type).correct_rope(model.get_decoder().rotary_emb)
    model.save_pretrained(folder)
    tokenizer(family, text).save_pretrained(folder)


def tokenizer(family: str, text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB tokens trained on the text."""
    backend = _sentencepiece(text) if family == "spm" else _byte_level(family, text)
    with_bos = family in ("spm", "llama-bpe", "tekken", "deepseek-llm")
    if with_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level(family: str, text: str) -> Tokenizer:
    ignore_merges = family in ("llama-bpe", "tekken")
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = _pre_tokenizer(family)
    backend.decoder = decoders.ByteLevel()
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - UNUSED, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return backend


def _pre_tokenizer(family: str) -> Any:
    """As the family's own tokenizer.json has it, where that is other than a list of patterns."""
    if family == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[family]]
    if family == "deepseek-llm":
        steps[-1] = pre_tokenizers.Digits(True)
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(text: str) -> Tokenizer:
    """A BPE with byte fallback whose merges are every split of every token, as those taken from SentencePiece are."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    n_free = VOCAB - UNUSED - len(SPECIAL) - 256
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=n_free, show_progress=False))
    learned = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend
