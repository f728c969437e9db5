"""The table of keys, what a converted file has of them, and what docs/format.md says: one and the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from codequant_converter import cli
from gguf import GGUFValueType, GGUFWriter

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key, add_keys, find_key
from pyggml_bridge.reader import GGUFFile
from tests.models import MODELS, TEXT

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"
NAMES = {  # as the document writes them
    (GGUFValueType.UINT32, None): "u32",
    (GGUFValueType.INT32, None): "i32",
    (GGUFValueType.UINT64, None): "u64",
    (GGUFValueType.STRING, None): "string",
    (GGUFValueType.ARRAY, GGUFValueType.INT32): "array of i32",
}


@pytest.fixture(scope="module", params=["deepseek_v2", "llama-tied", "phimoe-longrope-long", "qwen2_moe"])
def file(request, tmp_path_factory) -> GGUFFile:
    folder = tmp_path_factory.mktemp("model")
    MODELS[request.param].save(folder)
    (folder / "text.txt").write_text(TEXT)
    options = ["--calibration", str(folder / "text.txt"), "--calibration-tokens", "64", "--method", "paper"]
    arguments = [str(folder), "--out", str(folder / "m.gguf"), "--no-check", "--no-finetune", *options]
    cli.convert(cli.settings_of(cli.parser().parse_args(arguments)))
    return GGUFFile(folder / "m.gguf")


def test_the_document_has_every_key_of_ours_with_its_type():
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Keys\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(cq\.[^`]*)` \| ([^|]*) \|", section, re.MULTILINE))
    assert documented == {key.value: NAMES[key.type, key.item] for key in Key if key.startswith("cq.")}


def test_a_converted_file_has_all_keys_of_ours_and_every_key_in_its_type(file):
    architecture = file.get(Key.GENERAL_ARCHITECTURE, str)
    for name, types in file.types.items():
        key = find_key(name, architecture)
        assert types == (key.type, key.item), name
    assert {key for key in Key if key.startswith("cq.")} <= set(file.metadata)


def test_an_unknown_key_is_refused(tmp_path):
    for name in ("cq.colour", "llama.colour", "olmoe.block_count", "colour"):
        with pytest.raises(CQError, match=name):
            add_keys(GGUFWriter(tmp_path / "m.gguf", "llama"), "llama", {name: 1})
