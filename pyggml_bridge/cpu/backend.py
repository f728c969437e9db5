"""The CPU backend: runs a lowered program with the native library."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml_bridge.backend import Segments, finish, row_count
from pyggml_bridge.cpu.program import CPUProgram
from pyggml_bridge.machine import require_memory
from pyggml_bridge.native import aligned_empty, current_isa, ffi, lib, pointer
from pyggml_bridge.program import Program


class CPUBackend:
    """A program bound to buffers for batches of up to n_batch tokens."""

    def __init__(self, program: Program, n_batch: int, n_threads: int) -> None:
        """Reserve buffers and lower the program; CQError, before one is written, if they do not fit in memory."""
        self.name = f"CPU ({current_isa()})"
        self.n_batch, self.n_threads = n_batch, n_threads
        self._program = CPUProgram(program, n_batch)
        self.routing_ids = [self._program.routings[routing].ids for routing in program.routings]
        self._segments = [
            (ffi.new("cq_op[]", [op.struct for op in segment.work]), segment) for segment in self._program.segments
        ]
        scratch = max(lib.cq_scratch_bytes(ops, len(segment.work), n_threads) for ops, segment in self._segments)
        sizes = f"{program.n_ctx} positions, batches of {n_batch} tokens and {n_threads} threads"
        require_memory(self._program.nbytes + scratch, sizes)
        self._scratch = aligned_empty(scratch)
        self._step = ffi.new("cq_step *")
        self._step.n_threads = n_threads
        self._step.scratch = pointer(self._scratch, "uint8_t *")
        none = np.empty((0, program.vocab_size), np.float32)
        self._logits = self._program.values[program.logits] if program.logits else none

    def run(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> NDArray[np.float32]:
        """Logits [n_outputs, vocab] of the batch's last rows: a view that the next run overwrites.

        tokens: int32 [n], n <= n_batch, stored in the KV cache from `position` on.
        """
        return finish(self.segments(tokens, position, n_outputs))

    def refresh(self, array: NDArray[Any]) -> None:
        """As Backend.refresh: nothing to do, since operations read the array itself."""

    def segments(self, tokens: NDArray[np.int32], position: int, n_outputs: int) -> Segments:
        """As Partition.segments."""
        values = self._program.values
        self._step.tokens = pointer(tokens, "const int32_t *")
        self._step.n_tokens, self._step.position, self._step.n_outputs = len(tokens), position, n_outputs
        for ops, segment in self._segments:
            status = lib.cq_run(ops, len(segment.work), self._step)
            assert status == lib.CQ_OK, f"cq_run refused a program of {len(segment.work)} operations"
            if segment.hands_over:
                received = yield [values[v][: row_count(v, len(tokens), n_outputs)] for v in segment.sends]
                for value, array in zip(segment.recvs, received, strict=True):
                    values[value][: len(array)] = array
        return self._logits[:n_outputs]
