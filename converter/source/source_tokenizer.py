"""The tokenizer as the checkpoint's files describe it: tokenizer.json itself, special tokens and chat templates.

transformers rebuilds some tokenizers by the name of their class, with other ids than tokenizer.json gives. So it is
asked only where there is no tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pyggml_bridge import tokenizer_ggml
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key

from ..console import warn
from .pre_tokenizer import SITUATIONS

Json = dict[str, Any]  # a document, here tokenizer.json or tokenizer_config.json

SPECIAL = ("bos", "eos", "unk", "pad")
MODEL_FILE = "tokenizer.model"


@dataclass(frozen=True)
class SourceTokenizer:
    """text: a tokenizer.json without truncation and padding. special: ids of "bos", "eos", "unk" and "pad", where there
    is such a token. templates: Jinja by name, "default" first. adds_bos, adds_eos: what a text begins and ends with."""

    text: str
    special: dict[str, int]
    templates: dict[str, str]
    adds_bos: bool
    adds_eos: bool

    @cached_property
    def backend(self) -> Tokenizer:
        """What text describes, without truncation and padding, which a GGUF file's may have."""
        backend = Tokenizer.from_str(self.text)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @property
    def bos(self) -> list[int]:
        """What the runner puts before a text: one token or none."""
        return [self.special["bos"]] if self.adds_bos else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone; special tokens written in it become those tokens."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def read_tokenizer(folder: Path, vocab_size: int) -> SourceTokenizer:
    """The tokenizer of a directory; CQError if there is none or one that cannot be read.

    vocab_size: rows of the embedding. Added tokens beyond it are left out, with a warning.
    """
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _converted(folder, config, vocab_size)
    text = _without_far_tokens(file, _decode(file), vocab_size)
    backend = _parse(file, text)
    special = _special_ids(folder, config, backend)
    return _assemble(folder, config, text, backend, special)


def tokenizer_of_gguf(path: Path, keys: dict[str, Any]) -> SourceTokenizer:
    """The tokenizer of a GGUF file by its tokenizer.* keys, as the runner reads them; CQError if they do not do."""
    stored = keys.get(Key.TOKENIZER_JSON)
    try:
        text = stored or tokenizer_ggml.build(keys).to_str()
    except CQError as error:
        raise CQError(f"{path}: no usable tokenizer: {error}") from error
    if stored:
        _parse(path, text)
    names = dict(zip(SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True))
    ids = {short: keys.get(f"tokenizer.ggml.{name}_token_id") for short, name in names.items()}
    special = {name: int(i) for name, i in ids.items() if i is not None}
    prefix = f"{Key.CHAT_TEMPLATE}."
    templates = {"default": keys[Key.CHAT_TEMPLATE]} if Key.CHAT_TEMPLATE in keys else {}
    templates |= {name.removeprefix(prefix): keys[name] for name in keys if name.startswith(prefix)}
    adds_bos = "bos" in special and tokenizer_ggml.adds_bos(keys)
    return SourceTokenizer(text, special, templates, adds_bos, bool(keys.get(Key.ADD_EOS_TOKEN)))


def _converted(folder: Path, config: Json, vocab_size: int) -> SourceTokenizer:
    """What transformers makes of other files, such as SentencePiece's."""
    if (folder / MODEL_FILE).is_file() and find_spec("sentencepiece") is None:
        raise CQError(
            f"{folder}: there is no tokenizer.json, and {MODEL_FILE} takes the packages sentencepiece and protobuf "
            "(pip install sentencepiece protobuf)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers raises many exception types here
        raise CQError(f"{folder}: no usable tokenizer: {' '.join(str(error).split())}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CQError(f"{folder}: no usable tokenizer: transformers makes no tokenizer.json of it")
    text = _without_far_tokens(folder, tokenizer.backend_tokenizer.to_str(), vocab_size)
    backend = _parse(folder, text)
    if (folder / MODEL_FILE).is_file():
        _check_against_sentencepiece(folder / MODEL_FILE, backend)
    texts = {name: getattr(tokenizer, f"{name}_token", None) for name in SPECIAL}
    ids = {name: backend.token_to_id(str(token)) for name, token in texts.items() if token is not None}
    return _assemble(folder, config, text, backend, {name: i for name, i in ids.items() if i is not None})


def _check_against_sentencepiece(file: Path, backend: Tokenizer) -> None:
    """CQError if transformers, which goes by the name of a class, made something else of the file.

    At the start of a text it may take a space less than SentencePiece, so the texts start with none.
    """
    try:
        processor = import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))
    except Exception:  # some files of this name are tiktoken's, which transformers reads as well
        return
    for text in (text for text in SITUATIONS if not text[0].isspace()):
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise CQError(f"{file}: transformers' tokenizer gives other ids than SentencePiece: save a tokenizer.json")


def _assemble(folder: Path, config: Json, text: str, backend: Tokenizer, special: dict[str, int]) -> SourceTokenizer:
    """With what tokenizer.json's post-processor puts around a text, which decides in transformers too."""
    bare, whole = (backend.encode("a", add_special_tokens=around).ids for around in (False, True))
    adds_bos, adds_eos = whole[:1] != bare[:1], whole[-1:] != bare[-1:]
    if adds_bos:
        special = {"bos": whole[0], **special}
        adds_bos = special["bos"] == whole[0]
    asked = config.get("add_bos_token")
    if isinstance(asked, bool) and asked != adds_bos and "bos" in special:
        warn(
            f"{folder}: tokenizer_config.json says add_bos_token {str(asked).lower()}, tokenizer.json's post-processor "
            f"{'adds' if adds_bos else 'does not add'} the token: the latter decides, as in transformers"
        )
    adds_eos = adds_eos and special.get("eos") == whole[-1]
    described = [*(whole[:1] if adds_bos else []), *bare, *(whole[-1:] if adds_eos else [])]
    if described != whole:
        around = ", ".join(repr(backend.id_to_token(i)) for i in whole if i not in bare)
        warn(
            f"{folder}: tokenizer.json puts {around} around a text; the output can only say BOS before and EOS after it"
        )
    return SourceTokenizer(text, special, _templates(folder, config), adds_bos, adds_eos)


def _decode(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CQError(f"{file}: not UTF-8 text (byte {error.start})") from error
    if text.startswith("version https://git-lfs.github.com/"):
        raise CQError(f"{file}: a Git LFS pointer, not the file itself (git lfs pull)")
    return text


def _read_json(file: Path) -> Json:
    """An object, {} if there is no file."""
    if not file.is_file():
        return {}
    try:
        document = json.loads(_decode(file))
    except ValueError as error:
        raise CQError(f"{file}: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise CQError(f"{file}: not an object")
    return document


def _parse(source: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare exceptions
        raise CQError(f"{source}: not a tokenizer: {error}") from error


def _without_far_tokens(source: Path, text: str, vocab_size: int) -> str:
    """The text itself, or where it truncates, pads or has added tokens without an embedding, a text without these."""
    try:
        document = json.loads(text)
        added = document.get("added_tokens") or []
        far = {token["id"]: token["content"] for token in added if token["id"] >= vocab_size}
        if not far and document.get("truncation") is None and document.get("padding") is None:
            return text
        vocabulary = document["model"]["vocab"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CQError(f"{source}: not a tokenizer: {error!r}") from error
    if far:
        names = ", ".join(f"{content!r} ({i})" for i, content in sorted(far.items())[:8])
        more = f" and {len(far) - 8} more" if len(far) > 8 else ""
        warn(f"{source}: added tokens beyond the {vocab_size} of the model are left out: {names}{more}")
        document["added_tokens"] = [token for token in added if token["id"] not in far]
        if isinstance(vocabulary, dict):
            contents = set(far.values())
            document["model"]["vocab"] = {t: i for t, i in vocabulary.items() if i < vocab_size or t not in contents}
    return json.dumps(document | {"truncation": None, "padding": None}, ensure_ascii=False)


def _special_ids(folder: Path, config: Json, backend: Tokenizer) -> dict[str, int]:
    """By tokenizer_config.json, or as in transformers by special_tokens_map.json where that has no list of tokens."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named |= _read_json(folder / "special_tokens_map.json")
    texts = {name: _token_text(named.get(f"{name}_token")) for name in SPECIAL}
    if texts["unk"] is None and "unk_token" not in named:
        texts["unk"] = getattr(backend.model, "unk_token", None)
    ids = {name: backend.token_to_id(text) for name, text in texts.items() if text is not None}
    lacking = [f"{name}_token {texts[name]!r}" for name, i in ids.items() if i is None]
    if lacking:
        warn(f"{folder}: tokenizer.json does not have {', '.join(lacking)}: left out")
    return {name: i for name, i in ids.items() if i is not None}


def _token_text(value: object) -> str | None:
    """A token is written as its text or as an object with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _templates(folder: Path, config: Json) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/ first, as in transformers, then tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _decode(file) for name, file in files.items() if file.is_file()}
    if "default" in found:
        return found
    given = config.get("chat_template")
    if given is None and not found:
        given = _read_json(folder / "chat_template.json").get("chat_template")
    return _named(folder, given) | found


def _named(folder: Path, given: object) -> dict[str, str]:
    """One text, a list of {"name", "template"} or an object of texts by name."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    entries: list[tuple[object, object]] = []
    if isinstance(given, dict):
        entries = list(given.items())
    elif isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        entries = [(entry.get("name"), entry.get("template")) for entry in given]
    if not entries or not all(isinstance(name, str) and isinstance(text, str) for name, text in entries):
        raise CQError(f"{folder}: chat_template is neither a text nor texts with names")
    return {str(name): str(text) for name, text in sorted(entries, key=lambda entry: entry[0] != "default")}
