"""tokenizer.* keys of the output: transformers' tokenizer.json itself, and llama.cpp's description of it."""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key

from ..console import warn
from .architecture import Keys
from .checkpoint import Checkpoint
from .pre_tokenizer import llama_cpp_name

Json = dict[str, Any]  # a document, here tokenizer.json

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


def tokenizer_keys(checkpoint: Checkpoint) -> Keys:
    """All tokenizer.* keys, and cq.eos_token_ids: every id that ends an answer."""
    tokenizer = checkpoint.tokenizer
    # A GGUF's own description is exact; the tokenizer.json that transformers rebuilds from it may lose rules.
    keys = checkpoint.stored_tokenizer_keys()
    if not keys:
        stored = tokenizer.backend_tokenizer.to_str()
        keys = _describe(json.loads(stored), checkpoint) | {"tokenizer.huggingface.json": stored}
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    eos = _eos_ids(checkpoint)
    return keys | ({Key.CQ_EOS_TOKEN_IDS: eos} if eos else {})


def _eos_ids(checkpoint: Checkpoint) -> list[int]:
    found: list[int] = []
    for value in (
        checkpoint.generation_config.eos_token_id,
        checkpoint.config.eos_token_id,
        checkpoint.tokenizer.eos_token_id,
    ):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return sorted(set(found))


def _describe(document: Json, checkpoint: Checkpoint) -> Keys:
    """llama.cpp's keys for a byte-level ("gpt2") or byte-fallback ("llama") BPE; CQError for other tokenizers."""
    model = document["model"]
    if model["type"] != "BPE":
        raise CQError(f"{checkpoint.path}: tokenizer model {model['type']} is not supported (only BPE)")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _vocabulary(document, checkpoint)
    keys: Keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys |= _special_ids(checkpoint)
    if model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
        keys["tokenizer.ggml.scores"] = [-float(rank.get(token, len(rank))) for token in tokens]
        keys["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(document)
        return keys | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    return keys | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges} | _pre_key(checkpoint)


def _pre_key(checkpoint: Checkpoint) -> Keys:
    """tokenizer.ggml.pre; without a name llama.cpp says itself that it takes a default, so none is invented here."""
    name, difference = llama_cpp_name(checkpoint.tokenizer.backend_tokenizer)
    if difference:
        warn(f"pre-tokenizer: {difference}: after cq-export llama.cpp's tokens may differ (cq-run is unaffected)")
    return {"tokenizer.ggml.pre": name} if name else {}


def _adds_space_prefix(document: Json) -> bool:
    """Whether a text starts with a space that is not its own: a normalizer's, or of the newer Metaspace."""
    normalizer, pre = (document.get(part) or {} for part in ("normalizer", "pre_tokenizer"))
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _vocabulary(document: Json, checkpoint: Checkpoint) -> tuple[list[str], list[int]]:
    """A text and a type for each row of the embedding, those of no token included."""
    model, size = document["model"], checkpoint.config.vocab_size
    added = document.get("added_tokens") or []
    top = max([*model["vocab"].values(), *(token["id"] for token in added)])
    if top >= size:
        raise CQError(f"{checkpoint.path}: the tokenizer has token {top}, the configuration's vocab_size is {size}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    fallback = model.get("byte_fallback")
    for text, i in model["vocab"].items():
        is_byte = fallback and len(text) == 6 and text.startswith("<0x")
        tokens[i], types[i] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if fallback and token["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    return tokens, types


def _special_ids(checkpoint: Checkpoint) -> Keys:
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
