"""GGUF files as input: what is refused by its name, what counts as absent, and how the model is called."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from codequant_converter import cli
from codequant_converter.reference import load
from codequant_converter.source.open_checkpoint import open_checkpoint
from codequant_converter.source.weight_files import GgufSource
from gguf import GGUFEndian, GGUFWriter

from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import LFS_POINTER, GGUFFile
from tests.models import MODELS

POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 4096\n"


def write_gguf(path: Path, keys: dict[str, object], endian: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    writer = GGUFWriter(path, "llama", endianess=endian)
    for key, value in keys.items():
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, str(value))
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("opened", [GGUFFile, GgufSource, lambda path: open_checkpoint(str(path))])
def test_gguf_files_that_are_not_read_are_called_what_they_are(tmp_path, opened):
    pointer = tmp_path / "pointer.gguf"
    pointer.write_bytes(POINTER)
    with pytest.raises(CQError, match=r"pointer\.gguf: a Git LFS pointer"):
        opened(pointer)
    with pytest.raises(CQError, match=r"big\.gguf: a big-endian GGUF file"):
        opened(write_gguf(tmp_path / "big.gguf", {}, GGUFEndian.BIG))
    for number in (0, 2):
        part = write_gguf(tmp_path / f"m-0000{number + 1}-of-00003.gguf", {"split.no": number, "split.count": 3})
        with pytest.raises(CQError, match=r"of-00003\.gguf: one of 3 parts of a split GGUF file"):
            opened(part)
    assert GGUFFile(write_gguf(tmp_path / "whole.gguf", {"split.count": 1})).tensors


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A float GGUF file that can be converted again."""
    folder = tmp_path_factory.mktemp("gguf")
    MODELS["llama-tied"].save(folder / "model")
    convert(folder / "model", folder / "plain.gguf")
    return folder / "plain.gguf"


def convert(model: Path, out: Path) -> None:
    options = ("--rotated-only", "f32", "--no-rotation", "--no-hadamard", "--no-check")
    cli.convert(cli.settings_of(cli.parser().parse_args([str(model), "--out", str(out), *options])))


def with_keys(source: Path, out: Path, changes: dict[str, object]) -> Path:
    """A copy with these keys; None: without this one."""
    reader, writer = gguf.GGUFReader(source), GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *changes):
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    for name, value in changes.items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value) if isinstance(value, int) else writer.add_string(name, str(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.rope.scaling.type": "none"},
        {"llama.rope.scaling.factor": 1.0},
        {"general.name": "Mistral 7B v0.3"},  # by this name transformers takes it for a model with a sliding window
    ],
)
def test_gguf_keys_that_say_there_is_none_of_it(converted, tmp_path, keys):
    same = open_checkpoint(str(with_keys(converted, tmp_path / "same.gguf", keys)))
    plain = open_checkpoint(str(converted))
    assert (same.arch.gguf_name, same.tied) == (plain.arch.gguf_name, plain.tied)
    assert torch.equal(same.head(), plain.head())
    assert all(torch.equal(same.layer(1)[name], tensor) for name, tensor in plain.layer(1).items())
    convert(tmp_path / "same.gguf", tmp_path / "again.gguf")
    tokens = np.arange(16, dtype=np.int32)
    assert np.array_equal(load(str(tmp_path / "same.gguf")).logits(tokens), load(str(converted)).logits(tokens))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.block_count", 2**31),
        ("llama.expert_count", 8),
        ("llama.attention.sliding_window", 4096),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 2.0),
        ("llama.rope.scale_linear", 4.0),
        ("llama.attention.head_count", 0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", float("inf")),
    ],
)
def test_gguf_keys_that_are_not_supported_or_impossible(converted, tmp_path, key, value):
    with pytest.raises(CQError, match=r"bad\.gguf: ") as error:
        open_checkpoint(str(with_keys(converted, tmp_path / "bad.gguf", {key: value})))
    fields = {
        "freq_base": "rope_theta",
        "layer_norm_rms_epsilon": "rms_norm_eps",
    }
    assert fields.get(key.rpartition(".")[2], key) in str(error.value)


def test_general_name_of_a_gguf_file_is_its_own_or_the_files(converted, tmp_path):
    named = with_keys(converted, tmp_path / "a.gguf", {"general.name": "Some Model 1.5B"})
    convert(named, tmp_path / "out.gguf")
    assert GGUFFile(tmp_path / "out.gguf").get("general.name", str) == "Some Model 1.5B"
    for name, expected in (("Model-1.7B.gguf", "Model-1.7B"), ("Model-1.7B.GGUF", "Model-1.7B"), ("v0.1", "v0.1")):
        assert open_checkpoint(str(with_keys(converted, tmp_path / name, {"general.name": None}))).name == expected
