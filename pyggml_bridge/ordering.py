"""Which operations of a program wait for those before them; between the others threads go on without a barrier."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """What an operation touches, as buffers' addresses or anything else that tells them apart.

    rows: where each row of the buffers is computed from the same row only, how rows are shared among threads.
    """

    reads: frozenset[Hashable]
    writes: frozenset[Hashable]
    rows: Hashable | None = None

    def must_follow(self, earlier: Access) -> bool:
        """Whether another thread's part of the earlier operation has to be complete before this one starts."""
        if self.rows is not None and self.rows == earlier.rows:
            return False  # a thread has the same rows of both
        return bool(self.writes & (earlier.reads | earlier.writes) or self.reads & earlier.writes)


class Ordering:
    """Takes a program's operations in turn."""

    def __init__(self) -> None:
        """No operation yet."""
        self._since_barrier: list[Access] = []

    def waits(self, access: Access) -> bool:
        """Whether the next operation needs a barrier before it."""
        waits = any(access.must_follow(earlier) for earlier in self._since_barrier)
        if waits:
            self._since_barrier.clear()
        self._since_barrier.append(access)
        return waits
