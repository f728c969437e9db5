"""The chat template stored in the file: messages -> prompt text, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key
from pyggml_bridge.reader import Metadata
from pyggml_bridge.tokenizer import Tokenizer


class Message(TypedDict):
    """One message of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template; CQError if it does not compile."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """source: Jinja, from a file that nobody vouches for, so it runs in a sandbox."""
        import jinja2.ext  # only chats need it, and it takes a while to load
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.LoopControlExtension, _generation_extension()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CQError(f"tokenizer.chat_template: {error}") from error
        self._special = {
            "bos_token": tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(tokenizer.eos_id),
        }

    @classmethod
    def from_metadata(cls, metadata: Metadata, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The file's template, the first of those with names if none is the default; None for a base model."""
        names = (f"{Key.CHAT_TEMPLATE}.{name}" for name in metadata.get(Key.CHAT_TEMPLATES, ()))
        sources = (metadata.get(name) for name in (Key.CHAT_TEMPLATE, *names))
        source = next((source for source in sources if isinstance(source, str)), None)
        return None if source is None else cls(source, tokenizer)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt, special tokens spelled out, BOS too where the template wants it.

        CQError if the template refuses the messages, for instance a system message where the model knows none.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise CQError(f"tokenizer.chat_template: {error}") from error


def _generation_extension() -> type[Any]:
    """{% generation %} marks the assistant's words for training; here it only renders its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 jinja's declaration

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
