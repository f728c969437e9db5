"""tokenizer.* keys of the output: transformers' tokenizer.json itself, and llama.cpp's description of it."""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType

from pyggml_bridge.errors import CQError

from .checkpoint import Checkpoint, GgufCheckpoint
from .report import warn

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of pre-tokenizers by their definition: the steps before the byte level.
PRE_TOKENIZERS = {
    (): "gpt-2",
    ("Digits",): "smollm",
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace("{1,3}", ""),): "qwen2",
}
# DeepSeek's steps behind the two for line ends and letters; those list every cased letter.
DEEPSEEK_LLM = (
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    "Digits",
)


def tokenizer_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """All tokenizer.* keys, and cq.eos_token_ids: every id that ends an answer."""
    tokenizer = checkpoint.tokenizer
    # A GGUF's own description is exact; the tokenizer.json that transformers rebuilds from it may lose rules.
    keys = _source_keys(checkpoint)
    if not keys:
        stored = tokenizer.backend_tokenizer.to_str()
        keys = _describe(json.loads(stored), checkpoint) | {"tokenizer.huggingface.json": stored}
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    eos = _eos_ids(checkpoint)
    return keys | ({"cq.eos_token_ids": eos} if eos else {})


def _source_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """A GGUF source's own description, which its author's tokenizer determined."""
    if not isinstance(checkpoint, GgufCheckpoint):
        return {}
    fields = checkpoint.source.reader.fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.ggml.")}


def _eos_ids(checkpoint: Checkpoint) -> list[int]:
    found: list[int] = []
    for value in (
        checkpoint.generation_config.eos_token_id,
        checkpoint.config.eos_token_id,
        checkpoint.tokenizer.eos_token_id,
    ):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted(set(found))


def _describe(document: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """llama.cpp's keys for a byte-level ("gpt2") or byte-fallback ("llama") BPE; CQError for other tokenizers."""
    model = document["model"]
    if model["type"] != "BPE":
        raise CQError(f"{checkpoint.path}: tokenizer model {model['type']} is not supported (only BPE)")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _vocabulary(document, checkpoint.config.vocab_size)
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types} | _special_ids(checkpoint)
    if model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
        scores = [-float(rank.get(token, len(rank))) for token in tokens]
        return keys | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    pre = _pre_tokenizer_name(document.get("pre_tokenizer") or {})
    return keys | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _vocabulary(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    fallback = document["model"].get("byte_fallback")
    for text, i in document["model"]["vocab"].items():
        is_byte = fallback and len(text) == 6 and text.startswith("<0x")
        tokens[i], types[i] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in document.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _special_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    ids["padding"] = tokenizer.pad_token_id
    vocabulary = tokenizer.get_vocab()
    ids["eot"] = next((vocabulary[token] for token in END_OF_TURN if token in vocabulary), None)
    keys = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    encoded = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return keys | {
        "tokenizer.ggml.add_bos_token": bool(encoded) and encoded[0] == ids["bos"],
        "tokenizer.ggml.add_eos_token": bool(encoded) and encoded[-1] == ids["eos"],
    }


def _pre_tokenizer_name(pre: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer; "default" for one it has no definition of here."""
    steps = pre.get("pretokenizers", [pre])
    kinds = []
    for step in steps:
        if step.get("type") == "Split":
            kinds.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            kinds.append("Digits")
    name = "deepseek-llm" if tuple(kinds[2:]) == DEEPSEEK_LLM else PRE_TOKENIZERS.get(tuple(kinds))
    if name is None:
        warn(f"pre-tokenizer {kinds}: no llama.cpp name is known, the file says 'default' (cq-run is unaffected)")
    return name or "default"
