"""The original in float32 through transformers: what cq-perplexity --base compares with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import open_checkpoint


class Reference:
    """Logits, and for MoE the selected experts, of an unquantized checkpoint."""

    def __init__(self, path: str) -> None:
        """Load the whole model; CQError if it is not a checkpoint that cq-convert accepts."""
        checkpoint = open_checkpoint(path)
        self._model = checkpoint.model()
        self._top_k = getattr(checkpoint.config, "num_experts_per_tok", None)
        self._routed: NDArray[np.int64] | None = None

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 [n, vocab] of one sequence of tokens int32 [n]."""
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        options = {"output_router_logits": True} if self._top_k else {}
        with torch.no_grad():
            output = self._model(input_ids=ids, use_cache=False, **options)
        if self._top_k:
            layers = [layer.topk(self._top_k, dim=-1).indices.numpy() for layer in output.router_logits]
            self._routed = np.stack(layers)
        return output.logits[0].float().numpy()

    def router_top_k(self) -> NDArray[np.int64] | None:
        """Experts [layers, n, top_k] that the last call of logits selected; None for a dense model."""
        return self._routed


def load(path: str) -> Reference:
    """Entry point `codequant.reference`: directory, GGUF file or hub id."""
    return Reference(path)
