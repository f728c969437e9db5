"""GGUF tokenizer keys for tests: a byte-level BPE trained on the spot, or one token per byte."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTROL, USER_DEFINED, NORMAL, BYTE, UNKNOWN = 3, 4, 1, 6, 2
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = """The history of the hash table begins in 1953, when H. P. Luhn wrote a memorandum on hashing with chaining.
def find(table, key):
    for name, value in table[hash(key) % len(table)]:
        if name == key:
            return value
It's what they'll do: we've 12345 items, don't we? Größe, naïve, 日本語 and русский.

"""


def train(pre_tokenizer: Any, vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE of the tokenizers library with three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 4,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return tokenizer


def ggml_keys(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """llama.cpp's description of a byte-level BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def byte_keys() -> dict[str, Any]:
    """One token per byte, its id 3 + the rank of the byte's character; no merges but one that no text reaches."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "\u0100\u0100"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["\u0100 \u0100"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
