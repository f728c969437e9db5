"""From logits to the next token: llama.cpp's samplers, in its order and with its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key
from pyggml_bridge.reader import Metadata

_METADATA_KEYS = {
    "temp": Key.SAMPLING_TEMP,
    "top_k": Key.SAMPLING_TOP_K,
    "top_p": Key.SAMPLING_TOP_P,
    "min_p": Key.SAMPLING_MIN_P,
    "repeat_penalty": Key.SAMPLING_PENALTY_REPEAT,
    "repeat_last_n": Key.SAMPLING_PENALTY_LAST_N,
}
# Accepted values, both ends included.
_RANGES = {
    "temp": (0.0, np.inf),
    "top_k": (0, np.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (np.nextafter(0.0, 1.0), np.inf),
    "repeat_last_n": (-1, np.inf),
}
# What leaves the step out; for the temperature, greedy.
_OFF: dict[str, float] = {
    "temp": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 0,
}
_INTEGERS = frozenset({"top_k", "repeat_last_n"})
_INT32_MAX = 2**31 - 1  # what the keys of integers hold


@dataclass(frozen=True)
class SamplingConfig:
    """temp 0 is greedy; top_k 0, top_p 1, min_p 0 and repeat_penalty 1 leave their step out.

    repeat_last_n: how many of the last tokens the penalty looks at, -1: all.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64

    @classmethod
    def resolve(cls, metadata: Metadata, **given: float | None) -> SamplingConfig:
        """What the user gave, else what the file recommends, else llama.cpp's defaults.

        CQError if what the user gave is out of range, or what the file recommends is no number. A number of the file
        that is out of range leaves its step out.
        """
        chosen: dict[str, Any] = {}
        for name, key in _METADATA_KEYS.items():
            value, recommended = given.get(name), metadata.get(key)
            if value is not None:
                chosen[name] = _checked(name, value)
            elif recommended is not None:
                if not _is_number(recommended):
                    raise CQError(f"{key}: {recommended} is not a number")
                chosen[name] = in_range_or_off(name, recommended)
        return cls(**chosen)


class Sampler:
    """Draws tokens; the same seed gives the same draws from the same logits."""

    def __init__(self, config: SamplingConfig, seed: int | None = None) -> None:
        """seed None: from the operating system."""
        self.config = config
        self._rng = np.random.default_rng(seed)

    def sample(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """Next token from logits [vocab]; history: all tokens so far, prompt included, for the repeat penalty."""
        logits = self._penalized(logits, history)
        if self.config.temp == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        draw = self._rng.random() * probabilities.sum()
        return int(ids[min(np.searchsorted(probabilities.cumsum(), draw, side="right"), len(ids) - 1)])

    def distribution(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Candidate ids and their probabilities, best first, after top_k, top_p, min_p and temperature. Each step sees
        what the one before it left; temperature comes last, so it does not change who is a candidate."""
        config = self.config
        ids = _largest(logits, config.top_k)
        kept = logits[ids].astype(np.float64)
        if config.top_p < 1:
            before = np.concatenate([[0.0], _softmax(kept).cumsum()[:-1]])
            n_kept = max(1, int(np.count_nonzero(before < config.top_p)))
            ids, kept = ids[:n_kept], kept[:n_kept]
        if config.min_p > 0:
            n_kept = int(np.count_nonzero(kept >= kept[0] + np.log(config.min_p)))
            ids, kept = ids[:n_kept], kept[:n_kept]
        return ids, _softmax((kept - kept[0]) / config.temp)

    def _penalized(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        penalty, last_n = self.config.repeat_penalty, self.config.repeat_last_n
        if penalty == 1 or last_n == 0 or not history:
            return logits
        recent = history if last_n < 0 else history[-last_n:]
        seen = np.unique(np.array(recent, np.int64))
        logits = logits.copy()
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits


def _largest(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices of the k largest (0: all), in descending order, the lower id first among equals."""
    if 0 < k < logits.size:
        threshold = np.partition(logits, -k)[-k]
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates, k = np.arange(logits.size), logits.size
    return candidates[np.argsort(-logits[candidates], kind="stable")][:k]


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def in_range_or_off(name: str, value: float) -> float:
    """A recommended value of SamplingConfig's field `name`, or what leaves the step out if the value is out of range.

    transformers and servers write -1 for all tokens, and probabilities above 1.
    """
    low, high = _RANGES[name]
    limit = min(high, _INT32_MAX) if name in _INTEGERS else high
    if not low <= value <= limit or value == np.inf:
        return _OFF[name]
    return _typed(name, value)


def _checked(name: str, value: float) -> float:
    """A value that the user gave; CQError naming its option if it is out of range."""
    low, high = _RANGES[name]
    if not _is_number(value) or not low <= value <= high or value == np.inf:
        bounds = f"at least {low:g}" if high == np.inf else f"between {low:g} and {high:g}"
        option = f"--{name.replace('_', '-')}"
        raise CQError(f"{option}: {value} is not {'above 0' if name == 'repeat_penalty' else bounds}")
    return _typed(name, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(name: str, value: float) -> float:
    return int(value) if name in _INTEGERS else float(value)
