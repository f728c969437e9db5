"""Tiny seeded transformers models with a byte-level tokenizer, saved as checkpoints; every feature is on somewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from codequant_converter.source import arch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 288
TEXT = "The quick brown fox jumps over the lazy dog; 1953 was the year, wasn't it? " * 40


@dataclass(frozen=True)
class TinyModel:
    """A configuration: model_type and the fields that differ from `COMMON`."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    head_dim: int | None = None

    def config(self) -> Any:
        common = {
            "vocab_size": VOCAB,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 256,
            "eos_token_id": [257, 258],
            "initializer_range": 0.08,
        }
        if self.head_dim:
            common["head_dim"] = self.head_dim
        return AutoConfig.for_model(self.model_type, **(common | self.fields))

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model in float32, norm scales far from 1."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                if "bias" in name:
                    parameter.uniform_(-0.5, 0.5)
        arch.find(self.model_type).correct_rope(model.get_decoder().rotary_emb)
        return model

    def save(self, folder: Path, seed: int = 0) -> torch.nn.Module:
        """Write the checkpoint with its tokenizer; returns the model."""
        model = self.build(seed)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens, two merges."""
    special = ["<s>", "</s>", "<|im_end|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special, "th", "the"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 12.0, 20.0, 30.0],
    "short_mscale": 1.1,
    "long_mscale": 1.25,
    "original_max_position_embeddings": 24,  # tests run 32 tokens and more
}

PHIMOE = {"num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}

QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

QWEN2_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}

# Dense first layer, experts and two shared ones after it; narrow heads whose keys, values and rope differ in width.
DEEPSEEK_V2 = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

MODELS = {
    "llama-tied": TinyModel("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads-llama3": TinyModel("llama", {"rope_parameters": LLAMA3_ROPE}, head_dim=32),
    "llama-mha-linear": TinyModel(
        "llama",
        {
            "num_key_value_heads": 6,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            "intermediate_size": 256,
        },
    ),
    "mixtral": TinyModel("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-tied-wide-heads": TinyModel(
        "mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True}, head_dim=64
    ),
    "mixtral-top-1": TinyModel("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "hidden_size": 192}),
    "mixtral-mha": TinyModel("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 6}),
    "mistral": TinyModel("mistral", {"sliding_window": None}, head_dim=32),
    "mistral-tied": TinyModel("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral-mha": TinyModel("mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    "qwen2": TinyModel("qwen2"),
    "qwen2-tied": TinyModel("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen2-wide-linear": TinyModel(
        "qwen2", {"hidden_size": 192, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}
    ),
    "qwen3-tied": TinyModel("qwen3", {"tie_word_embeddings": True}, head_dim=16),
    "qwen3-wide-heads": TinyModel("qwen3", {"num_key_value_heads": 1}, head_dim=64),
    "qwen3-narrow-heads": TinyModel("qwen3", {"num_key_value_heads": 6}, head_dim=12),
    "qwen3_moe": TinyModel("qwen3_moe", QWEN3_MOE, head_dim=32),
    "qwen3_moe-tied": TinyModel("qwen3_moe", QWEN3_MOE | {"tie_word_embeddings": True, "num_experts": 5}, head_dim=16),
    "qwen3_moe-top-1": TinyModel(
        "qwen3_moe",
        QWEN3_MOE | {"num_experts_per_tok": 1, "hidden_size": 192, "num_key_value_heads": 1},
        head_dim=32,
    ),
    "qwen2_moe": TinyModel("qwen2_moe", QWEN2_MOE, head_dim=32),
    "qwen2_moe-tied": TinyModel("qwen2_moe", QWEN2_MOE | {"tie_word_embeddings": True, "norm_topk_prob": True}),
    "qwen2_moe-top-1": TinyModel(
        "qwen2_moe",
        QWEN2_MOE | {"num_experts_per_tok": 1, "hidden_size": 192, "shared_expert_intermediate_size": 64},
    ),
    "deepseek_v2": TinyModel("deepseek_v2", DEEPSEEK_V2 | {"rope_parameters": YARN}),
    "deepseek_v2-q-lora-groups": TinyModel(
        "deepseek_v2",
        DEEPSEEK_V2
        | {
            "q_lora_rank": 64,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8, "factor": 8.0},
        },
    ),
    "deepseek_v2-tied": TinyModel(
        "deepseek_v2",
        DEEPSEEK_V2
        | {
            "tie_word_embeddings": True,
            "q_lora_rank": 64,
            "hidden_size": 192,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_routed_experts": 5,
        },
    ),
    "deepseek_v2-top-1": TinyModel(
        "deepseek_v2", DEEPSEEK_V2 | {"num_experts_per_tok": 1, "rope_parameters": YARN | {"mscale_all_dim": 0.0}}
    ),
    "olmoe": TinyModel("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe-tied": TinyModel("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}),
    "phimoe": TinyModel("phimoe", PHIMOE),
    "phimoe-longrope-long": TinyModel("phimoe", PHIMOE | {"rope_parameters": LONGROPE, "router_jitter_noise": 0.2}),
    "phimoe-longrope-short": TinyModel(
        "phimoe",
        PHIMOE
        | {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 200},
            "attention_bias": False,
            "num_key_value_heads": 6,
        },
    ),
    "phimoe-window-wide-heads": TinyModel(
        "phimoe",
        PHIMOE | {"sliding_window": 17, "lm_head_bias": False, "num_local_experts": 4, "hidden_size": 192},
        head_dim=64,
    ),
    "phimoe-tied-no-biases": TinyModel(
        "phimoe",
        PHIMOE
        | {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "lm_head_bias": False,
            "hidden_size": 192,
        },
    ),
    "olmoe-mha": TinyModel("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 6}),
}
