"""The Python interface: a loaded model that continues texts, chats and scores tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.chat import ChatTemplate, Message
from pyggml_bridge.errors import CQError
from pyggml_bridge.generate import Chunk, Context, Event, StopFilter, generate
from pyggml_bridge.measure.perplexity import log_softmax
from pyggml_bridge.models import load_model
from pyggml_bridge.sampling import Sampler, SamplingConfig
from pyggml_bridge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn; what is left out or None is the file's recommendation, else llama.cpp's default.

    temperature: 0 always takes the most likely token. top_k: only so many candidates, 0: all. top_p: only the most
    likely tokens up to this probability. min_p: only tokens within this factor of the best. repeat_penalty: divides the
    scores of the last 64 tokens, 1: none. seed: the same seed gives the same text, None: a random one.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None


class LLM:
    """A model from a GGUF file. All methods raise CQError, with a message of one line, for bad input.

    One sequence of tokens is in memory at a time: a call that starts with the tokens of the call before computes only
    the rest. An LLM serves one thread.
    """

    def __init__(
        self,
        path: str | Path,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        cuda: bool = False,
        gpu_layers: int | None = None,
    ) -> None:
        """Load the file; CQError if it is damaged, not supported or does not fit in memory.

        n_ctx: tokens of a prompt and its answer together (None: the model's own length, at most 8192). n_threads: None
        for the physical cores. cuda: run on an NVIDIA GPU, gpu_layers: with at most so many layers wholly on it (None:
        all).
        """
        for name, value, least in (("n_ctx", n_ctx, 1), ("n_threads", n_threads, 1), ("gpu_layers", gpu_layers, 0)):
            if value is not None and value < least:
                raise CQError(f"{name}: {value} is below {least}")
        if gpu_layers is not None and not cuda:
            raise CQError("gpu_layers: only with cuda=True")
        self._path = path
        self._model = load_model(path, n_ctx=n_ctx, n_threads=n_threads, cuda=cuda, gpu_layers=gpu_layers)
        self._context = Context(self._model)
        self._tokenizer = Tokenizer.from_metadata(self._model.metadata)
        self._n_calls = 0

    @property
    def n_ctx(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self._model.n_ctx

    def generate(
        self, prompt: str, max_tokens: int = -1, stop: str | Sequence[str] = (), **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """Continue the prompt: pieces of text as they come, whose sum is what `cq-run --raw` prints.

        max_tokens -1: until the model ends its text or the context is full. stop: text, or several, before which the
        answer ends. sampling: see SamplingOptions.
        """
        return self._pieces(self.tokenize(prompt), False, max_tokens, stop, sampling)

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = -1,
        stop: str | Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """The assistant's answer to messages of {"role": ..., "content": ...}, by the file's chat template.

        Special tokens that a message spells out are ordinary text. Other arguments are those of generate().
        """
        if not all(isinstance(m, dict) and {str} == {type(m.get("role")), type(m.get("content"))} for m in messages):
            raise CQError('messages: expected dictionaries {"role": text, "content": text}')
        template = ChatTemplate.from_metadata(self._model.metadata, self._tokenizer)
        if template is None:
            raise CQError(f"{self._path}: no chat template in the file")
        return "".join(self._pieces(template.encode(messages).tolist(), True, max_tokens, stop, sampling))

    def logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Natural log-probabilities float32 [n, vocab] of the token that follows each of the n token ids."""
        return log_softmax(self._logits(self._checked(ids)))

    def logits(self, text: str) -> NDArray[np.float32]:
        """Logits float32 [n, vocab] of the token that follows each of the n tokens of tokenize(text)."""
        return self._logits(self.tokenize(text))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text from its start: BOS comes first where the model expects one."""
        ids: list[int] = self._tokenizer.encode(text, add_special=True).tolist()
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(self._checked(ids) if len(ids) else [])

    def _checked(self, ids: Sequence[int]) -> list[int]:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise CQError("token ids: expected a list of integers, at least one")
        if tokens.min() < 0 or tokens.max() >= self._model.vocab_size:
            raise CQError(f"token ids: expected 0 .. {self._model.vocab_size - 1}")
        checked: list[int] = tokens.tolist()
        return checked

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._n_calls += 1
        return self._context.evaluate_all(tokens)

    def _pieces(
        self,
        prompt: list[int],
        at_start: bool,
        max_tokens: int,
        stop: str | Sequence[str],
        sampling: SamplingOptions,
    ) -> Iterator[str]:
        if max_tokens < -1:
            raise CQError(f"max_tokens: {max_tokens} is neither a number of tokens nor -1")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        StopFilter(stops)  # refuses an empty text
        sampler = self._sampler(**sampling)
        return self._texts(generate(self._context, self._tokenizer, prompt, sampler, max_tokens, stops, at_start))

    def _texts(self, events: Iterator[Event]) -> Iterator[str]:
        """The events' texts, as long as no later call has put other tokens into the context."""
        self._n_calls += 1
        call = self._n_calls
        for event in events:
            if isinstance(event, Chunk):
                yield event.text
            if call != self._n_calls:
                raise CQError("the text cannot go on: a later call has used the model")

    def _sampler(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        seed: int | None = None,
    ) -> Sampler:
        if seed is not None and seed < 0:
            raise CQError(f"seed: {seed} is below 0")
        config = SamplingConfig.resolve(
            self._model.metadata, temp=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty
        )
        return Sampler(config, seed)
