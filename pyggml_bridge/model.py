"""A loaded model: tokens in, logits out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Backend
from pyggml_bridge.cpu.backend import CPUBackend
from pyggml_bridge.errors import CQError
from pyggml_bridge.machine import require_memory
from pyggml_bridge.program import LongRope, Program
from pyggml_bridge.reader import GGUFFile, Metadata


class Model:
    """A program on a backend, with its KV cache.

    n_ctx: positions the cache holds. gpu_layers: layers that are wholly on the GPU.
    """

    def __init__(
        self,
        file: GGUFFile,
        program: Program,
        n_batch: int,
        n_threads: int,
        *,
        cuda: bool = False,
        gpu_layers: int | None = None,
    ) -> None:
        """Place the program on the CPU or the GPU; CQError if the buffers do not fit in memory.

        gpu_layers: with cuda at most so many layers are wholly on the GPU, None: all.
        """
        self.file = file
        self.metadata: Metadata = file.metadata
        self.n_ctx, self.vocab_size = program.n_ctx, program.vocab_size
        try:
            if cuda:
                from pyggml_bridge.split import gpu_backend  # here: a start on the CPU need not wait for it

                self.gpu_layers = program.n_layers if gpu_layers is None else min(gpu_layers, program.n_layers)
                self._backend: Backend = gpu_backend(program, n_batch, n_threads, self.gpu_layers)
            else:
                self.gpu_layers, self._backend = 0, CPUBackend(program, n_batch, n_threads)
        except MemoryError as error:
            raise CQError(f"{file.path}: no memory for batches of {n_batch} tokens") from error
        self.backend = self._backend.name
        self._long_rope = program.long_rope
        self._history = np.zeros(program.n_ctx if program.long_rope else 0, np.int32)  # tokens that the cache holds
        self._is_long = False  # which of the two the table holds
        self.n_batch, self.n_threads = n_batch, n_threads

    @property
    def routing_ids(self) -> list[NDArray[np.int32]]:
        """Per MoE layer the int32 [n_batch, top_k] experts of the last batch."""
        return self._backend.routing_ids

    def forward(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """Run tokens (int32 [n]) at positions position .. position + n - 1; logits float32 [n_outputs, vocab_size].

        The logits are those of the last n_outputs tokens. Long inputs run in batches of n_batch. CQError if the tokens
        do not fit the context or the vocabulary, or the model computes something that is not finite.
        """
        n = len(tokens)
        if not 0 < n <= self.n_ctx - position or position < 0:
            raise CQError(f"{n} tokens at position {position} do not fit a context of {self.n_ctx}: try a larger --ctx")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise CQError(f"{self.file.path}: a token is outside the vocabulary of {self.vocab_size}")
        tokens = np.ascontiguousarray(tokens, np.int32)
        if self._long_rope:
            self._fit_rope(self._long_rope, tokens, position)
        if n_outputs > self.n_batch:  # logits of a batch are counted with its buffers
            require_memory(4 * n_outputs * self.vocab_size, f"logits of {n_outputs} tokens")
        logits = np.empty((n_outputs, self.vocab_size), np.float32)
        for start in range(0, n, self.n_batch):
            batch = tokens[start : start + self.n_batch]
            wanted = max(0, min(len(batch), start + len(batch) - (n - n_outputs)))
            first = start + len(batch) - wanted - (n - n_outputs)
            logits[first : first + wanted] = self._backend.run(batch, position + start, wanted)
        if not np.isfinite(logits).all():
            raise CQError(f"{self.file.path}: the model computes values that are not finite: the file is damaged")
        return logits

    def _fit_rope(self, rope: LongRope, tokens: NDArray[np.int32], position: int) -> None:
        """Choose the angles by the length of the sequence; if they change, the cache before `position` is renewed."""
        end = position + len(tokens)
        self._history[position:end] = tokens
        is_long = end > len(rope.short)
        if is_long == self._is_long:
            return
        rope.table[: len(rope.short)] = rope.long if is_long else rope.short
        self._backend.refresh(rope.table)
        self._is_long = is_long
        for start in range(0, position, self.n_batch):
            batch = self._history[start : min(position, start + self.n_batch)]
            self._backend.run(batch, start, 0)
