"""Perplexity and divergence, by llama-perplexity's definitions (tools/perplexity of llama.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.model import Model


class Reference(Protocol):
    """What the model's logits are compared with."""

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [n, vocab] of a fresh sequence int32 [n]."""
        ...

    def router_top_k(self) -> NDArray[np.int64] | None:
        """Expert ids [n_layers, n, top_k] of the last call, None for a dense model."""
        ...


class Base(Reference, Protocol):
    """The model that --base names."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    def token_texts(self, ids: list[int]) -> list[str] | None:
        """The vocabulary's texts of these ids (below vocab_size), None where the model has no vocabulary."""
        ...


class RunnerReference:
    """A GGUF base model computed by this runner."""

    def __init__(self, model: Model) -> None:
        """Wrap a model loaded with n_batch >= the chunk length."""
        self._model, self._n = model, 0

    @property
    def vocab_size(self) -> int:
        """See Base."""
        return self._model.vocab_size

    def token_texts(self, ids: list[int]) -> list[str] | None:
        """See Base."""
        return token_texts(self._model, ids)

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See Base."""
        self._n = len(tokens)
        return self._model.forward(tokens, 0, self._n)

    def router_top_k(self) -> NDArray[np.int64] | None:
        """See Base."""
        return routing_of(self._model, self._n)


def routing_of(model: Model, n: int) -> NDArray[np.int64] | None:
    """Expert ids [n_layers, n, top_k] of the model's last batch, None for a dense model."""
    return np.stack([ids[:n] for ids in model.routing_ids]).astype(np.int64) if model.routing_ids else None


def token_texts(model: Model, ids: list[int]) -> list[str] | None:
    """Texts of token ids in the file's tokenizer.ggml.tokens, None where it has no such list or a shorter one."""
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or max(ids) >= len(tokens):
        return None
    return [str(tokens[i]) for i in ids]


def require_same_vocabulary(model: Model, base: Base, tokens: NDArray[np.int32]) -> None:
    """CQError if the base has other logits than the model, or another text for one of these tokens int32 [n].

    A divergence between distributions over different vocabularies would be a number without a meaning.
    """
    if base.vocab_size != model.vocab_size:
        raise CQError(f"--base has a vocabulary of {base.vocab_size} tokens, {model.file.path} of {model.vocab_size}")
    ids = np.unique(tokens).tolist()
    ours, theirs = token_texts(model, ids), base.token_texts(ids)
    for i, our, their in zip(ids, ours or [], theirs or [], strict=False):
        if our.replace("▁", " ") != their.replace("▁", " "):  # llama.cpp's converter writes spaces in added tokens
            raise CQError(f"--base has another vocabulary: token {i} is {their!r} there, {our!r} in {model.file.path}")


def chunks_of(tokens: NDArray[np.int32], n_ctx: int, limit: int | None, bos: int | None) -> Iterator[NDArray[np.int32]]:
    """Non-overlapping chunks of n_ctx tokens; bos (if not None) replaces each chunk's first token.

    CQError if there are fewer than 2 * n_ctx tokens.
    """
    if len(tokens) < 2 * n_ctx:
        raise CQError(f"the text has {len(tokens)} tokens, fewer than two chunks of {n_ctx}")
    count = len(tokens) // n_ctx
    for i in range(count if limit is None else min(limit, count)):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx].copy()
        if bos is not None:
            chunk[0] = bos
        yield chunk


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise log-probabilities, float32 with a float64 sum."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


@dataclass(frozen=True)
class Summary:
    """The fields of cq-perplexity --json; those of the base are None without one, the last also for dense models."""

    ppl: float
    ppl_stderr: float
    tokens: int
    base_ppl: float | None = None
    ln_ppl_ratio: float | None = None
    mean_kld: float | None = None
    median_kld: float | None = None
    p99_kld: float | None = None
    p99_9_kld: float | None = None
    max_kld: float | None = None
    rms_delta_p: float | None = None
    same_top_p: float | None = None
    router_top_k_change: float | None = None


@dataclass
class Statistics:
    """Per-token results of all chunks so far. Arrays of one float64 per scored token."""

    nll: list[NDArray[np.float64]] = field(default_factory=list)
    base_nll: list[NDArray[np.float64]] = field(default_factory=list)
    kld: list[NDArray[np.float64]] = field(default_factory=list)
    delta_p: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: list[NDArray[np.bool_]] = field(default_factory=list)
    routing_sets: int = 0
    routing_changes: int = 0

    def add(
        self, logits: NDArray[np.float32], targets: NDArray[np.int32], base: NDArray[np.float32] | None = None
    ) -> None:
        """Score logits [n, vocab] of the model (and of the base) against the next tokens int32 [n]."""
        rows = np.arange(len(targets))
        log_p = log_softmax(logits)
        self.nll.append(-log_p[rows, targets].astype(np.float64))
        if base is None:
            return
        log_q = log_softmax(base)
        self.base_nll.append(-log_q[rows, targets].astype(np.float64))
        self.kld.append((np.exp(log_q) * (log_q - log_p)).sum(axis=-1, dtype=np.float64))
        self.delta_p.append(np.exp(-self.nll[-1]) - np.exp(-self.base_nll[-1]))
        self.same_top.append(logits.argmax(axis=-1) == base.argmax(axis=-1))

    def add_routing(self, ours: NDArray[np.int64] | None, base: NDArray[np.int64] | None) -> None:
        """Compare expert sets [n_layers, n, top_k]."""
        if ours is None or base is None:
            return
        changed = (np.sort(ours, axis=-1) != np.sort(base, axis=-1)).any(axis=-1)
        self.routing_sets += changed.size
        self.routing_changes += int(changed.sum())

    def perplexity(self, which: str = "nll") -> tuple[float, float]:
        """(perplexity, its standard error) of "nll" or "base_nll"."""
        mean, error = mean_and_error(np.concatenate(getattr(self, which)))
        return float(np.exp(mean)), float(np.exp(mean) * error)

    def summary(self) -> Summary:
        """What is known so far."""
        ppl, stderr = self.perplexity()
        change = self.routing_changes / self.routing_sets if self.routing_sets else None
        known = Summary(ppl, stderr, tokens=sum(map(len, self.nll)), router_top_k_change=change)
        if not self.kld:
            return known
        kld = np.concatenate(self.kld)
        base_ppl = self.perplexity("base_nll")[0]
        return replace(
            known,
            base_ppl=base_ppl,
            ln_ppl_ratio=float(np.log(ppl / base_ppl)),
            mean_kld=float(kld.mean()),
            median_kld=float(np.median(kld)),
            p99_kld=float(np.quantile(kld, 0.99)),
            p99_9_kld=float(np.quantile(kld, 0.999)),
            max_kld=float(kld.max()),
            rms_delta_p=float(np.sqrt(np.mean(np.concatenate(self.delta_p) ** 2))),
            same_top_p=float(np.concatenate(self.same_top).mean()),
        )


def mean_and_error(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(np.sqrt(values.var() / (n - 1))) if n > 1 else 0.0


def measure(model: Model, chunks: Iterator[NDArray[np.int32]], base: Reference | None = None) -> Iterator[Statistics]:
    """Score positions c/2 .. c-2 of chunk after chunk, yielding the statistics so far."""
    statistics = Statistics()
    for chunk in chunks:
        first = len(chunk) // 2
        logits = model.forward(chunk, 0, len(chunk) - first)[:-1]
        if base is None:
            statistics.add(logits, chunk[first + 1 :])
        else:
            statistics.add(logits, chunk[first + 1 :], base.logits(chunk)[first:-1])
            statistics.add_routing(routing_of(model, len(chunk)), base.router_top_k())
        yield statistics
