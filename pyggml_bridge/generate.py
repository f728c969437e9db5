"""The generation loop: prompt tokens in, text out as it appears."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.sampling import Sampler
from pyggml_bridge.tokenizer import TextStream, Tokenizer

StopReason = Literal["eos", "length", "stop"]


class LanguageModel(Protocol):
    """What generation needs of a model."""

    n_ctx: int

    def forward(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """Append tokens to the KV cache from `position` on; logits [n_outputs, vocab] of the last n_outputs."""


class PromptTooLong(CQError):
    """A prompt that has more tokens than the context holds."""


class Context:
    """A model and the tokens that its KV cache holds."""

    def __init__(self, model: LanguageModel) -> None:
        """Starts empty."""
        self.model = model
        self.tokens: list[int] = []

    def evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [vocab] after `tokens`, a whole sequence from position 0; only what the cache lacks is computed.

        CQError for an empty sequence or one that is longer than the context.
        """
        self.check_length(len(tokens))
        kept = self.common_prefix(tokens)
        del self.tokens[kept:]  # an interrupted evaluation must not leave the cache described as fuller than it is
        logits = self.model.forward(np.array(tokens[kept:], np.int32), kept, 1)
        self.tokens.extend(tokens[kept:])
        return logits[-1]

    def evaluate_all(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, vocab] after each of `tokens`, a whole sequence from position 0, all of it computed.

        CQError for an empty sequence, one that is longer than the context, or ids outside the vocabulary.
        """
        self.check_length(len(tokens))
        self.tokens.clear()
        logits = self.model.forward(np.array(tokens, np.int64), 0, len(tokens))
        self.tokens.extend(tokens)
        return logits

    def append(self, token: int) -> NDArray[np.float32]:
        """Logits [vocab] after one more token."""
        logits = self.model.forward(np.array([token], np.int32), len(self.tokens), 1)
        self.tokens.append(token)
        return logits[-1]

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many tokens of a new sequence the cache serves; never all, as the last one's logits are wanted."""
        limit = min(len(self.tokens), len(tokens) - 1)
        return next((i for i in range(limit) if self.tokens[i] != tokens[i]), limit)

    def check_length(self, n_tokens: int) -> None:
        """CQError, or PromptTooLong, unless a sequence of so many tokens can be evaluated."""
        if not n_tokens:
            raise CQError("the prompt is empty")
        if n_tokens > self.model.n_ctx:
            raise PromptTooLong(f"the prompt has {n_tokens} tokens, the context holds {self.model.n_ctx} (--ctx)")


@dataclass(frozen=True)
class Chunk:
    """Text to show."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The last event. prompt_evaluated leaves out what the cache already held; tokens and times are of this call.

    generated_tokens counts the answer's tokens, without the EOS that ends it; decode_steps the evaluations that
    generation_seconds holds (the first token comes out of the prompt's).
    """

    stop_reason: StopReason
    prompt_tokens: int
    prompt_evaluated: int
    generated_tokens: int
    decode_steps: int
    prompt_seconds: float
    generation_seconds: float

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens evaluated per second."""
        return self.prompt_evaluated / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def gen_tps(self) -> float:
        """Decode evaluations per second; 0 if there was none."""
        return self.decode_steps / self.generation_seconds if self.decode_steps else 0.0


Event = Chunk | Finish


class StopFilter:
    """Cuts text at the first stop text, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: non-empty texts, possibly none."""
        if not all(stops):
            raise CQError("--stop: an empty text would stop at once")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be shown now, whether a stop text was reached)."""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        n_held = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - n_held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back and did not become a stop text."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def generate(
    context: Context,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampler: Sampler,
    max_new: int = -1,
    stops: Sequence[str] = (),
    at_start: bool = False,
) -> Iterator[Event]:
    """Yield Chunks and at the end one Finish. max_new -1: until EOS or the context is full.

    at_start: the answer is a text of its own (a message of a chat), not the prompt's continuation. CQError for a prompt
    that is empty or longer than the context, before anything is yielded.
    """
    text_filter = StopFilter(stops)
    evaluated = len(prompt) - context.common_prefix(prompt)
    started = time.perf_counter()
    logits = context.evaluate(prompt)
    decoding = time.perf_counter()
    stream = tokenizer.stream(at_start)
    history = list(prompt)
    reason: StopReason = "length"
    while len(history) - len(prompt) != max_new and len(history) <= context.model.n_ctx:
        if len(history) > len(prompt):
            logits = context.append(history[-1])
        token = sampler.sample(logits, history)
        if token in tokenizer.eos_ids:
            reason = "eos"
            break
        history.append(token)
        text, stopped = text_filter.push(stream.push(token))
        if text:
            yield Chunk(text)
        if stopped:
            reason = "stop"
            break
    if reason != "stop" and (rest := _rest(text_filter, stream, reason)):
        yield Chunk(rest)
    ended = time.perf_counter()
    steps = len(context.tokens) - len(prompt)
    generated = len(history) - len(prompt)
    yield Finish(reason, len(prompt), evaluated, generated, steps, decoding - started, ended - decoding)


def _rest(text_filter: StopFilter, stream: TextStream, reason: StopReason) -> str:
    """What was held back. A character cut off by the length is left out; one cut off by EOS is U+FFFD."""
    if reason == "eos":
        text, stopped = text_filter.push(stream.flush())
        return text if stopped else text + text_filter.flush()
    return text_filter.flush()
