"""Which operations of a program wait for those before them; threads begin all others without a barrier."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """What an operation reads and writes, as buffers' addresses or anything else that tells buffers apart.

    rows: None, or, for operations that compute each row from the same row of what they read, a name of how many rows
    there are: operations with the same name share out rows among threads in the same way.
    """

    reads: frozenset[Hashable]
    writes: frozenset[Hashable]
    rows: Hashable | None = None

    def must_follow(self, earlier: Access) -> bool:
        """Whether all threads must have finished the earlier operation before a thread starts this one."""
        if self.rows is not None and self.rows == earlier.rows:
            return False  # each thread computes the same rows of both
        return bool(self.writes & (earlier.reads | earlier.writes) or self.reads & earlier.writes)


class Ordering:
    """Decides for a program's operations, which it is given one after the other."""

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
