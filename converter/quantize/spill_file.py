"""A list on disk, for finished experts that wait for the rest of their layer: they are most of what a layer holds."""

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

    They lie in a file without a name, which is gone when the object is. Any thread may write and read items.
    """

    def __init__(self, folder: Path, n: int) -> None:
        """No items yet; OSError where no file can be made in the folder, or later written."""
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this object lives)
        self._lock = Lock()
        self._places: list[int | None] = [None] * n

    def __len__(self) -> int:
        """How many items there will be."""
        return len(self._places)

    def __setitem__(self, number: int, item: Item) -> None:
        """Write an item; a second one of the same number does not reuse the room of the first."""
        with self._lock:
            place = self._file.seek(0, 2)
            pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)
            self._places[number] = place

    def __getitem__(self, number: int) -> Item:
        """A copy of the item; IndexError before it is written."""
        with self._lock:
            place = self._places[number]
            if place is None:
                raise IndexError(f"nothing is on place {number} of the spill file")
            self._file.seek(place)
            item: Item = pickle.load(self._file)
            return item

    def __iter__(self) -> Iterator[Item]:
        """Copies of all items, in order."""
        return (self[number] for number in range(len(self)))
