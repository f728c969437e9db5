"""A list on disk: what is taken is what was put, from any thread, and nothing is left in the folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from codequant_converter.quantize.spill_file import SpillFile

N = 40


def item(number: int) -> dict[str, np.ndarray | int]:
    return {"number": number, "values": np.random.default_rng(number).integers(0, 256, 1000 * number, dtype=np.uint8)}


def test_what_was_put_in_any_order_from_any_thread(tmp_path: Path):
    spill_file: SpillFile[dict[str, np.ndarray | int]] = SpillFile(tmp_path, N)
    order = np.random.default_rng(0).permutation(N).tolist()

    def put_and_take(number: int) -> None:
        spill_file[number] = item(number)
        assert spill_file[number]["number"] == number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_take, order))
    assert len(spill_file) == N and [taken["number"] for taken in spill_file] == list(range(N))
    for number in (0, 1, N - 1):
        np.testing.assert_array_equal(spill_file[number]["values"], item(number)["values"])
    assert not list(tmp_path.iterdir())


def test_a_copy_is_taken(tmp_path: Path):
    spill_file: SpillFile[list[int]] = SpillFile(tmp_path, 1)
    spill_file[0] = [1]
    spill_file[0].append(2)
    assert spill_file[0] == [1]
    spill_file[0] = [3]
    assert list(spill_file) == [[3]]


def test_an_empty_place(tmp_path: Path):
    with pytest.raises(IndexError, match="place 1"):
        _ = SpillFile[int](tmp_path, 2)[1]
