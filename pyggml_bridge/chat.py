"""The chat template stored in the file: messages -> prompt text, rendered as transformers renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key
from pyggml_bridge.reader import Metadata, StringArray
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
        self._source, self._tokenizer = source, tokenizer
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
        stored = metadata.get(Key.CHAT_TEMPLATES)
        names = (f"{Key.CHAT_TEMPLATE}.{name}" for name in (stored if isinstance(stored, list | StringArray) else ()))
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

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> NDArray[np.int32]:
        """Token ids int32 [n] of the prompt. Special tokens come from the template alone: what a message writes like
        one is ordinary text. CQError as render()."""
        marks = self._marks_in(messages)
        if not any(marks):
            return self._tokenizer.encode(self.render(messages, add_generation_prompt), add_special=False)
        texts = [text for message in messages for text in (message["role"], message["content"])]
        start, end = _unused_characters("".join([self._source, *texts]))
        of_others, of_assistant = map(_any_of, marks)

        def marked(message: Message) -> Message:
            pattern = of_assistant if message["role"] == "assistant" else of_others
            role, content = (pattern.sub(f"{start}\\g<0>{end}", message[key]) for key in ("role", "content"))
            return Message(role=role, content=content)

        prompt = self.render([marked(message) for message in messages], add_generation_prompt)
        return self._tokenizer.encode_parts(_parts(prompt, _any_of(marks[0] | marks[1]), start, end))

    def _marks_in(self, messages: Sequence[Message]) -> tuple[set[str], set[str]]:
        """What is to be text in messages of others, and in the assistant's: special tokens, and of others those that
        the template uses, which in the model's own words are its own."""
        found: dict[str, bool] = {}
        for message in messages:
            found |= self._tokenizer.added_tokens_in(message["content"])
            found |= self._tokenizer.added_tokens_in(message["role"])
        special = {literal for literal, is_special in found.items() if is_special}
        others = found.keys() - special
        if not others:
            return special, special
        try:
            around = self.render([Message(role=m["role"], content="x") for m in messages])
        except CQError:  # a template may refuse these contents
            around = ""
        return special | {literal for literal in others if literal in self._source or literal in around}, special


def _unused_characters(texts: str) -> tuple[str, str]:
    """Two private characters that none of the texts holds, so that no message can imitate what marks its parts."""
    unused = (chr(code) for code in (*range(0xE001, 0xF900), *range(0xF0000, 0xFFFFE)) if chr(code) not in texts)
    start, end = next(unused, ""), next(unused, "")
    if not end:
        raise CQError("messages: every private Unicode character is in use")
    return start, end


def _any_of(literals: set[str]) -> re.Pattern[str]:
    """The longest of them first; matches nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or "(?!)")


def _parts(prompt: str, literal: re.Pattern[str], start: str, end: str) -> Iterator[tuple[str, bool]]:
    """The prompt cut at the marks, which are dropped; with each part whether it may hold special tokens.

    A template may have cut off one of a literal's two marks, for instance by split(); one is enough.
    """
    cut = re.compile(f"{start}({literal.pattern}){end}?|({literal.pattern}){end}|[{start}{end}]")
    at = 0
    for match in cut.finditer(prompt):
        yield prompt[at : match.start()], True
        yield match[1] or match[2] or "", False
        at = match.end()
    yield prompt[at:], True


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
