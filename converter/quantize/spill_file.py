"""What is done and waits for the rest of its layer lies on disk: a layer's experts are most of what it would hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Generic, TypeVar

Item = TypeVar("Item")


class SpillFile(Generic[Item]):
    """A list of n items that are in memory only while they are used: each access reads a copy.

    They lie in a file without a name, which goes with the spill file. Any thread may put and take.
    """

    def __init__(self, folder: Path, n: int) -> None:
        """Nothing on it yet; OSError where no file can be made in the folder, or later written."""
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the spill file is there)
        self._lock = Lock()
        self._places: list[int | None] = [None] * n

    def __len__(self) -> int:
        """Items that there will be."""
        return len(self._places)

    def __setitem__(self, number: int, item: Item) -> None:
        """Put it there; a later item does not take the room of an earlier one."""
        with self._lock:
            place = self._file.seek(0, 2)
            pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)
            self._places[number] = place

    def __getitem__(self, number: int) -> Item:
        """The item as it was put there; IndexError before that."""
        with self._lock:
            place = self._places[number]
            if place is None:
                raise IndexError(f"nothing is on place {number} of the spill file")
            self._file.seek(place)
            item: Item = pickle.load(self._file)
            return item

    def __iter__(self) -> Iterator[Item]:
        """One after the other."""
        return (self[number] for number in range(len(self)))
