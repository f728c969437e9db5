"""The calibration text as sequences of token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyggml_bridge.errors import CQError

from ..source.checkpoint import Checkpoint

SEQUENCE = 512


def read_tokens(checkpoint: Checkpoint, file: Path, n_tokens: int) -> Tensor:
    """The first n_tokens of a text as int64 [sequences, 512 or all of them]; CQError if the text has fewer than 64."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CQError(f"{file}: not UTF-8 text") from error
    ids = tokenize(checkpoint, text[: n_tokens * 16])[:n_tokens]
    if len(ids) < 64:
        raise CQError(f"{file}: {len(ids)} tokens are too few to calibrate on (at least 64)")
    length = min(SEQUENCE, len(ids))
    tokens = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    if checkpoint.tokenizer.bos:
        tokens[:, 0] = checkpoint.tokenizer.bos[0]
    return tokens


def tokenize(checkpoint: Checkpoint, text: str, special: bool = False) -> list[int]:
    """Token ids of a text, with special after BOS if the model wants it; CQError for an id that the model has not."""
    ids = [*(checkpoint.tokenizer.bos if special else []), *checkpoint.tokenizer.encode(text)]
    if ids and max(ids) >= checkpoint.config.vocab_size:
        raise CQError(
            f"{checkpoint.path}: the tokenizer gives id {max(ids)}, the model has {checkpoint.config.vocab_size}"
        )
    return ids
