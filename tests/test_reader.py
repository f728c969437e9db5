"""The reader on damaged, truncated and foreign files: always CQError, never a crash, never a guess."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from pyggml_bridge.cli.info import describe
from pyggml_bridge.errors import CQError
from pyggml_bridge.format import CQType
from pyggml_bridge.models import load_model
from pyggml_bridge.reader import GGUFFile
from tests.fuzz_reader import header_bytes, main
from tests.tiny_gguf import Tiny, write_tiny

ROOT = Path(__file__).resolve().parent.parent
SMALL = Tiny(hidden=64, ffn=64, head_dim=16, vocab=64, n_layers=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "tiny.gguf"
    write_tiny(path, SMALL)
    return path


def damaged(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    return path


def test_metadata_and_tensors_equal_gguf_pys(tiny):
    from gguf import GGUFReader

    ours, theirs = GGUFFile(tiny), GGUFReader(tiny)
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF."):
            assert ours.metadata[field.name] == field.contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensors[tensor.name].data, np.asarray(tensor.data).view(np.uint8).reshape(-1))


def test_truncated_at_every_length_of_the_header(tiny, tmp_path):
    data, end = tiny.read_bytes(), header_bytes(tiny)
    for length in [*range(end), *range(end, len(data), 997), len(data) - 1]:
        with pytest.raises(CQError):
            load_model(damaged(tmp_path, data[:length]))


def test_every_header_byte_flipped_is_refused_or_harmless(tiny, tmp_path):
    data, end = tiny.read_bytes(), header_bytes(tiny)
    for at in range(end):
        flipped = bytearray(data)
        flipped[at] ^= 0xFF
        try:
            load_model(damaged(tmp_path, bytes(flipped)), n_ctx=16, n_batch=4)
        except CQError as error:
            assert "damaged.gguf" in str(error) and "\n" not in str(error)


def rewrite(tiny: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    data = tiny.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    return damaged(tmp_path, data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGUF\x09", "version 9"),
        (b"GGUF", b"GGML", "not a GGUF file"),
        (struct.pack("<I", 17204), struct.pack("<I", 17999), "unknown type 17999"),
        (b"llama", b"lambs", "'lambs' is not supported"),
        (b"blk.0.attn_q.centroids", b"blk.0.attn_q.centroidz", "attn_q.centroids is missing"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_op.weight", "ffn_up.weight is missing"),
        (b"cq.version", b"cq.vers10n", "cq.version is missing"),
        (b"llama.block_count", b"llama.block_cound", "llama.block_count is missing"),
    ],
)
def test_message_names_what_is_wrong(tiny, tmp_path, old, new, message):
    with pytest.raises(CQError, match=message):
        load_model(rewrite(tiny, tmp_path, old, new))


@pytest.mark.parametrize("version", [0, 1, 3])
def test_other_versions_of_the_format_are_refused(tiny, tmp_path, version):
    data = tiny.read_bytes()
    at = data.index(b"cq.version") + len(b"cq.version") + 4
    with pytest.raises(CQError, match=f"CQ format version {version} is not supported"):
        load_model(damaged(tmp_path, data[:at] + struct.pack("<I", version) + data[at + 4 :]))


@pytest.mark.parametrize("rows", [0, 3, 16])
def test_codebooks_of_impossible_rows_are_refused(tmp_path, rows):
    path = tmp_path / "rows.gguf"
    write_tiny(path, replace(SMALL, codebook_rows=2))
    data = path.read_bytes()
    at = data.index(b"cq.codebook_rows") + len(b"cq.codebook_rows") + 4
    with pytest.raises(CQError, match=f"cq.codebook_rows is {rows}"):
        load_model(damaged(tmp_path, data[:at] + struct.pack("<I", rows) + data[at + 4 :]))
    with pytest.raises(CQError, match="centroids has shape"):
        load_model(damaged(tmp_path, data[:at] + struct.pack("<I", 4) + data[at + 4 :]))


def test_absurd_dimensions_are_refused_before_anything_is_allocated(tiny, tmp_path):
    data = tiny.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    for dim in (0, 2**31, 2**62, 2**64 - 1):
        with pytest.raises(CQError):
            GGUFFile(damaged(tmp_path, data[:at] + struct.pack("<Q", dim) + data[at + 8 :]))
    for count_at in (8, 16):  # numbers of tensors and keys
        with pytest.raises(CQError, match="do not fit"):
            GGUFFile(damaged(tmp_path, data[:count_at] + struct.pack("<Q", 2**60) + data[count_at + 8 :]))


def test_strings_are_decoded_when_they_are_read(tmp_path):
    path = tmp_path / "strings.gguf"
    words = ["", "näher", "last"]
    writer = GGUFWriter(path, "llama")
    writer.add_array("words", words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    strings = GGUFFile(path).metadata["words"]
    assert (list(strings), len(strings), strings[-1], strings[:2]) == (words, 3, "last", words[:2])
    assert strings == words and strings != words[:2]
    data = path.read_bytes()
    broken = damaged(tmp_path, data.replace("ä".encode(), b"\xc3\x28"))
    with pytest.raises(CQError, match="damaged string near byte"):
        describe(GGUFFile(broken))
    longer = data.replace(struct.pack("<Q", 4) + b"last", struct.pack("<Q", 2**40) + b"last")
    with pytest.raises(CQError, match="the file ends at"):
        GGUFFile(damaged(tmp_path, longer))


def test_overlapping_tensors_are_refused(tmp_path):
    path = tmp_path / "overlap.gguf"
    writer = GGUFWriter(path, "llama")
    for name in ("first", "second"):
        writer.add_tensor(name, np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    at = data.index(b"second") + len(b"second") + 4 + 8 + 4
    with pytest.raises(CQError, match="overlap"):
        GGUFFile(damaged(tmp_path, data[:at] + struct.pack("<Q", 32) + data[at + 8 :]))


def test_nan_weights_are_reported_not_returned(tmp_path):
    path = tmp_path / "nan.gguf"
    write_tiny(path, SMALL)
    data = path.read_bytes()
    at = data.index(GGUFFile(path).tensors["blk.0.ffn_down.scales"].data.tobytes())
    damaged_path = damaged(tmp_path, data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :])
    with pytest.raises(CQError, match="not finite"):
        load_model(damaged_path).forward(np.arange(4, dtype=np.int32), 0, 1)


@pytest.mark.parametrize("ids", [[0, 1], [3, 2], [2, -1], [2, 4], [2, 2**31 - 1]])
def test_each_expert_is_in_one_part(tmp_path, ids):
    path = tmp_path / "experts.gguf"
    write_tiny(path, replace(SMALL, n_experts=4, expert_cqs=(CQType.CQ3, CQType.CQ3, CQType.CQ4, CQType.CQ4)))
    data = path.read_bytes()
    at = data.index(struct.pack("<2i", 2, 3), data.index(struct.pack("<2i", 0, 1)))
    path.write_bytes(data[:at] + struct.pack("<2i", *ids) + data[at + 8 :])
    if sorted(ids) == [2, 3]:
        load_model(path)  # any order
        return
    with pytest.raises(CQError, match=r"the parts of blk\.0\.ffn_gate_exps\.weight do not hold each of 4 experts once"):
        load_model(path)


@pytest.mark.parametrize("path", ["/nonexistent/model.gguf", "/", "/dev/null"])
def test_what_is_not_a_readable_file(path):
    with pytest.raises(CQError, match=path):
        GGUFFile(path)


def test_seeded_mutations():
    outcomes = main(1000, seed=0)
    assert outcomes["ran"] > 20 and outcomes["refused"] > 150


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's runtime")
def test_mutations_under_address_sanitizer(tmp_path):
    """The native library rebuilt with -fsanitize=address,undefined runs the same fuzz, in a process of its own."""
    compiler = shutil.which("gcc")
    assert compiler, "the native library needs a C compiler, so does this test"
    for folder in ("native", "pyggml_bridge", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
    build = [sys.executable, "native/build_ffi.py"]
    subprocess.run(build, cwd=tmp_path, env=os.environ | {"CQ_CFLAGS": flags}, check=True, capture_output=True)
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    fuzz = [sys.executable, "-m", "tests.fuzz_reader", "1000", "1"]
    done = subprocess.run(fuzz, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'ran'" in done.stdout
