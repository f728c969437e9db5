"""Text to token ids and back, from the file alone."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pyggml_bridge import tokenizer_ggml
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key
from pyggml_bridge.reader import Metadata

_NEVER_MERGED = "\ue000"  # a private character, so that a tokenizer has no token that joins it with text
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Tokenizer:
    """A model's tokenizer. `eos_ids` holds every token that ends an answer; `bos_id` may be None."""

    def __init__(self, backend: tokenizers.Tokenizer, metadata: Metadata) -> None:
        """`backend` does the work; `metadata` says which tokens are special."""
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._byte_level = backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()
        self.bos_id = self._token_id(metadata, "tokenizer.ggml.bos_token_id")
        self.eos_id = self._token_id(metadata, "tokenizer.ggml.eos_token_id")
        ends = {self._token_id(metadata, f"tokenizer.ggml.{key}") for key in _END_KEYS}
        stored = metadata.get(Key.CQ_EOS_TOKEN_IDS)
        ends.update(end for end in (stored if isinstance(stored, list) else ()) if self._is_token(end))
        self.eos_ids = frozenset(int(end) for end in ends if end is not None and not is_ordinary_text(backend, end))
        self.add_bos = tokenizer_ggml.adds_bos(metadata)
        self._strips_space = not self._byte_level and tokenizer_ggml.adds_space_prefix(metadata)

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Tokenizer:
        """From tokenizer.huggingface.json if the file holds it, else from tokenizer.ggml.*; CQError if that fails."""
        stored = metadata.get(Key.TOKENIZER_JSON)
        if stored is None:
            return cls(tokenizer_ggml.build(metadata), metadata)
        try:
            backend = tokenizers.Tokenizer.from_str(stored)
        except Exception as error:  # the library raises bare exceptions
            raise CQError(f"tokenizer.huggingface.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, metadata)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id and one; there may be fewer tokens."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, add_special: bool, parse_special: bool = True) -> NDArray[np.int32]:
        """Token ids int32 [n]. add_special: BOS first, if the model wants one; parse_special: special tokens written in
        the text become those tokens, else they are ordinary text. CQError if the text holds lone surrogates."""
        bos = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        return np.array(bos + self._ids(text, parse_special), np.int32)

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> NDArray[np.int32]:
        """Token ids int32 [n] of a text in parts, BOS not added. Each part comes with whether added tokens, special or
        not, that are written in it become those tokens. Nothing is merged across the parts' borders."""
        ids: list[int] = []
        for text, parse in parts:
            ids += self._continued(text, parse) if parse else self._as_text(text)
        return np.array(ids, np.int32)

    def added_tokens_in(self, text: str) -> dict[str, bool]:
        """What is written in the text and would become an added token; whether the token is special."""
        _check_utf8(text)
        self._backend.encode_special_tokens = False
        encoding = self._backend.encode(text, add_special_tokens=False)
        found = [(text[start:end].strip(), i) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]
        return {literal: self._added[i].special for literal, i in found if literal and i in self._added}

    def _ids(self, text: str, parse_special: bool) -> list[int]:
        _check_utf8(text)
        self._backend.encode_special_tokens = not parse_special
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []
        return ids

    def _continued(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text that stands after another, so without the space that some tokenizers put before a text."""
        if self._adds_prefix:
            before = self._ids(_NEVER_MERGED, False)
            both = self._ids(_NEVER_MERGED + text, parse_special)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text, parse_special)

    def _as_text(self, text: str) -> list[int]:
        """Ids without any added token, which are always recognised where they are not special."""
        ids = self._continued(text, False)
        if len(text) > 1 and not self._added.keys().isdisjoint(ids):
            return [i for char in text for i in self._continued(char, False)]
        return ids

    @cached_property
    def _adds_prefix(self) -> bool:
        return self.token_text(next(iter(self._ids("a", False)), None)).startswith(("▁", "Ġ"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, special tokens left out, bytes that are not UTF-8 as U+FFFD."""
        stream = self.stream(at_start=True)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, at_start: bool = False) -> TextStream:
        """A decoder for one token at a time. at_start: the text starts here, so that the space which the tokenizer puts
        before a text is taken off again; otherwise it continues a prompt and keeps it."""
        return TextStream(self, strip_space=at_start and self._strips_space)

    def token_text(self, token_id: int | None) -> str:
        """The token as it is written in templates ("" for None)."""
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""

    @lru_cache(maxsize=65536)  # noqa: B019 a process has one tokenizer
    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to the text: nothing for special tokens and ids outside the vocabulary."""
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return b"".join(_CHAR_BYTES.get(char) or char.encode() for char in token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def _token_id(self, metadata: Metadata, key: str) -> int | None:
        token_id = metadata.get(key)
        if token_id is not None and not self._is_token(token_id):
            raise CQError(f"{key}: {token_id} is outside the vocabulary")
        return token_id

    def _is_token(self, token_id: object) -> bool:
        """Ids may have gaps."""
        return isinstance(token_id, int) and 0 <= token_id < 1 << 31 and self._backend.id_to_token(token_id) is not None


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CQError("text: not valid UTF-8") from error


def is_ordinary_text(backend: tokenizers.Tokenizer, token_id: int) -> bool:
    """Whether a token is a piece of text like "the" or <0x20>: neither an added one nor written like </s> or [EOS].

    Some files say of their marks that they are ordinary; a text that ended at an ordinary token would end anywhere.
    """
    token = backend.id_to_token(token_id)
    if token is None or token_id in backend.get_added_tokens_decoder():
        return False
    return not re.fullmatch(r"<(?!0x..>).+>|\[.+\]", token)


class TextStream:
    """Incremental decoding that emits whole characters only."""

    def __init__(self, tokenizer: Tokenizer, strip_space: bool) -> None:
        """strip_space: drop one space at the very start."""
        self._tokenizer = tokenizer
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete after this token, often "" inside a multi-byte character."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._strip_space and piece:
            self._strip_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


def _char_bytes() -> dict[str, bytes]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)
    }


_CHAR_BYTES = _char_bytes()
