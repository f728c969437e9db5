"""The original in float32 through transformers: what cq-perplexity --base compares with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .source.open_checkpoint import open_checkpoint


class Reference:
    """Logits, and for MoE the selected experts, of an unquantized checkpoint."""

    def __init__(self, path: str) -> None:
        """Open the checkpoint; CQError if cq-convert does not accept it. The weights are loaded by the first logits."""
        self._checkpoint = open_checkpoint(path)
        self._chosen: list[NDArray[np.int64]] = []
        self._routed: NDArray[np.int64] | None = None

    @cached_property
    def _model(self) -> torch.nn.Module:
        """The whole model, with hooks that keep what its routers choose."""
        model = self._checkpoint.model()
        for i in range(self._checkpoint.config.num_hidden_layers):
            layer = model.get_decoder().layers[i]
            for linear in self._checkpoint.arch_of(i).linears:
                if linear.router:
                    layer.get_submodule(linear.parameter.removesuffix(".weight")).register_forward_hook(
                        self._keep_choice
                    )
        return model

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        size: int = self._checkpoint.config.vocab_size
        return size

    def token_texts(self, ids: list[int]) -> list[str] | None:
        """The vocabulary's texts of these ids, None where the checkpoint has no tokenizer or lacks one of them."""
        return self._checkpoint.token_texts(ids)

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 [n, vocab] of one sequence of tokens int32 [n]."""
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        self._chosen.clear()
        with torch.no_grad():
            output = self._model(input_ids=ids, use_cache=False)
        self._routed = np.stack(self._chosen) if self._chosen else None
        return output.logits[0].float().numpy()

    def _keep_choice(self, router: Any, arguments: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._chosen.append(output[-1].numpy())  # transformers' routers give the chosen experts last

    def router_top_k(self) -> NDArray[np.int64] | None:
        """Experts [layers, n, top_k] that the last call of logits selected; None for a dense model."""
        return self._routed


def load(path: str) -> Reference:
    """Entry point `codequant.reference`: directory, GGUF file or hub id."""
    return Reference(path)
