"""The self-check at the end: the written file, loaded by the runner, still says what the original says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyggml_bridge.errors import CQError
from pyggml_bridge.models import load_model

from ..results import CheckResult

SAMPLE_TOKENS = 16
PROMPT_TOKENS = 32


def check_file(path: Path, tokens: Tensor, logits: Tensor, tokenizer: Any, n_threads: int) -> CheckResult:
    """Compare with the original's logits [n, vocab] on tokens [n]; CQError if the file does not load or is not finite.

    kld: mean divergence of the second half of the positions; sample: greedy continuation of the first tokens.
    """
    model = load_model(str(path), n_ctx=len(tokens) + SAMPLE_TOKENS, n_threads=n_threads)
    ids = tokens.numpy().astype(np.int32)
    scored = len(ids) - len(ids) // 2
    ours = torch.from_numpy(np.array(model.forward(ids, 0, scored)))
    if not torch.isfinite(ours).all():
        raise CQError(f"{path}: the converted model computes values that are not finite")
    log_p, log_q = (x.double().log_softmax(dim=-1) for x in (logits[-scored:], ours))
    kld = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    return CheckResult(True, kld, tokenizer.decode(_greedy(model, ids[:PROMPT_TOKENS])))


def _greedy(model: Any, prompt: np.ndarray) -> list[int]:
    step, position, generated = prompt, 0, []
    for _ in range(SAMPLE_TOKENS):
        token = int(model.forward(step, position, 1)[-1].argmax())
        position += len(step)
        step = np.array([token], np.int32)
        generated.append(token)
    return generated
