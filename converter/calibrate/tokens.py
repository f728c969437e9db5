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
    if (
        checkpoint.tokenizer.bos_token_id is not None
        and tokenize(checkpoint, "a", True)[0] != tokenize(checkpoint, "a")[0]
    ):
        tokens[:, 0] = checkpoint.tokenizer.bos_token_id
    return tokens


def tokenize(checkpoint: Checkpoint, text: str, special: bool = False) -> list[int]:
    """Token ids of a text; CQError for an id outside the model's vocabulary."""
    ids: list[int] = checkpoint.tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids
    if ids and max(ids) >= checkpoint.config.vocab_size:
        raise CQError(
            f"{checkpoint.path}: the tokenizer gives id {max(ids)}, the model has {checkpoint.config.vocab_size}"
        )
    return ids
