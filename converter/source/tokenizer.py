"""tokenizer.* keys of the output: the text of tokenizer.json, llama.cpp's description of it, and chat templates."""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import TokenType

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key, Keys
from pyggml_bridge.tokenizer import is_ordinary_text

from ..console import warn
from .checkpoint import Checkpoint
from .pre_tokenizer import llama_cpp_name
from .source_tokenizer import Json, SourceTokenizer

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


def tokenizer_keys(checkpoint: Checkpoint) -> Keys:
    """All tokenizer.* keys, and cq.eos_token_ids: every id that ends an answer."""
    tokenizer = checkpoint.tokenizer
    # A GGUF's own description is exact; a tokenizer.json that is rebuilt from it may lose rules.
    keys = checkpoint.stored_tokenizer_keys()
    if not keys:
        keys = _describe(json.loads(tokenizer.text), checkpoint) | {Key.TOKENIZER_JSON: tokenizer.text}
    keys |= _template_keys(tokenizer.templates)
    eos = _eos_ids(checkpoint)
    return {Key.EOS_TOKEN_ID: eos[0]} | keys | {Key.CQ_EOS_TOKEN_IDS: eos} if eos else keys


def _template_keys(templates: dict[str, str]) -> Keys:
    """As gguf-py names them."""
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    keys: Keys = {Key.CHAT_TEMPLATE: named.pop("default")} if "default" in named else {}
    keys |= {f"{Key.CHAT_TEMPLATE}.{name}": text for name, text in named.items()}
    return keys | ({Key.CHAT_TEMPLATES: list(named)} if named else {})


def _eos_ids(checkpoint: Checkpoint) -> list[int]:
    """Those of the generation configuration if it has any, else the model's and the tokenizer's; never a text's."""
    tokenizer, decided = checkpoint.tokenizer, list[int]()
    others = _token_ids(checkpoint.config.eos_token_id, f"{checkpoint.path}: the configuration's")
    others += [tokenizer.special["eos"]] if "eos" in tokenizer.special else []
    if checkpoint.has_generation_config:
        file = checkpoint.path / "generation_config.json"
        decided = _token_ids(checkpoint.generation_config.eos_token_id, f"{file}:")
    return _ends(checkpoint, decided) or _ends(checkpoint, [i for i in others if i not in decided])


def _token_ids(value: Any, where: str) -> list[int]:
    values: list[int] = [*value] if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in values):
        raise CQError(f"{where} eos_token_id is {value!r}, not an id or a list of ids")
    return values


def _ends(checkpoint: Checkpoint, ids: list[int]) -> list[int]:
    """Those that are tokens of the model and not ordinary text; a warning for the others."""
    backend, size = checkpoint.tokenizer.backend, checkpoint.config.vocab_size
    ends = [i for i in ids if 0 <= i < size and not is_ordinary_text(backend, i)]
    for i in sorted({*ids} - {*ends}):
        token = backend.id_to_token(i) if 0 <= i < size else None
        what = "no token" if token is None else f"ordinary text ({token!r})"
        warn(f"{checkpoint.path}: eos_token_id {i} is {what}: it ends no answer")
    return sorted(set(ends))


def _describe(document: Json, checkpoint: Checkpoint) -> Keys:
    """llama.cpp's keys for a byte-level ("gpt2") or byte-fallback ("llama") BPE; CQError for other tokenizers."""
    model, tokenizer = document["model"], checkpoint.tokenizer
    kind = type(tokenizer.backend.model).__name__  # some documents do not name it
    if kind != "BPE":
        raise CQError(f"{checkpoint.path}: tokenizer model {kind} is not supported (only BPE)")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _vocabulary(document, checkpoint)
    keys: Keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys |= _special_keys(tokenizer)
    if model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
        keys["tokenizer.ggml.scores"] = [-float(rank.get(token, len(rank))) for token in tokens]
        keys["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(document)
        return keys | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    return keys | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges} | _pre_key(tokenizer)


def _pre_key(tokenizer: SourceTokenizer) -> Keys:
    """tokenizer.ggml.pre; without a name llama.cpp says itself that it takes a default, so none is invented here."""
    name, difference = llama_cpp_name(tokenizer.backend)
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
    ids: dict[str, int] = checkpoint.tokenizer.backend.get_vocab()
    added = document.get("added_tokens") or []
    top = max(ids.values(), default=0)
    if top >= size:
        raise CQError(f"{checkpoint.path}: the tokenizer has token {top}, the configuration's vocab_size is {size}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    fallback = model.get("byte_fallback")
    for text, i in model["vocab"].items():
        is_byte = fallback and len(text) == 6 and text.startswith("<0x")
        tokens[i], types[i] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in added:
        if (i := ids.get(token["content"])) is None:
            continue  # the library leaves out an empty one
        if i != token["id"]:
            stated = f"{token['content']!r} has id {token['id']} in tokenizer.json"
            warn(f"{checkpoint.path}: {stated} and {i} by the tokenizers library: the latter is used")
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if fallback and token["content"] == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[i], types[i] = token["content"], int(kind)
    return tokens, types


def _special_keys(tokenizer: SourceTokenizer) -> Keys:
    special, added = tokenizer.special, tokenizer.backend.get_added_tokens_decoder()
    texts = {token.content: i for i, token in added.items()}
    ids = {"bos": special.get("bos"), "eos": special.get("eos"), "unknown": special.get("unk")}
    ids["padding"] = special.get("pad")
    ids["eot"] = next((texts[token] for token in END_OF_TURN if token in texts), None)
    keys: Keys = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    return keys | {Key.ADD_BOS_TOKEN: tokenizer.adds_bos, Key.ADD_EOS_TOKEN: tokenizer.adds_eos}
