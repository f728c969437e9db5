"""The tokenizer of a converted file is the checkpoint's tokenizer.json, whatever transformers would make of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from codequant_converter.calibrate.tokens import read_tokens
from codequant_converter.source.open_checkpoint import open_checkpoint
from tokenizers import Tokenizer

from pyggml_bridge.tokenizer import Tokenizer as Runner
from tests.byte_tokenizer import TEXT
from tests.tokenizer_kinds import CLASSES, KINDS, ROWS, byte_level, converted, save, texts, update, write


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Checkpoints by model type, whose tokenizer each test writes."""
    saved: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in saved:
            saved[model_type] = save(tmp_path_factory.mktemp(model_type), model_type, vocab_size=ROWS)
        return saved[model_type]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizer_json(bare, kind):
    """10,000 texts, through files of checkpoints whose classes transformers rebuilds in its own way."""
    for model_type, name in zip(("qwen2", "llama", "qwen3"), random.Random(kind).sample(CLASSES, 3), strict=True):
        folder = bare(model_type)
        backend = KINDS[kind]()
        backend.save(str(folder / "tokenizer.json"), pretty=name is not None)
        write(folder, "tokenizer_config.json", {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"})
        metadata = converted(folder).metadata
        assert metadata["tokenizer.huggingface.json"] == (folder / "tokenizer.json").read_text(encoding="utf-8")
        reference, runner = Tokenizer.from_file(str(folder / "tokenizer.json")), Runner.from_metadata(metadata)
        for text in texts(10_000 if model_type == "llama" else 500):
            assert (
                runner.encode(text, add_special=False).tolist() == reference.encode(text, add_special_tokens=False).ids
            )
        around = reference.encode("a", add_special_tokens=True).ids
        assert runner.encode("a", add_special=True).tolist() == around
        tokens = metadata["tokenizer.ggml.tokens"]
        assert all(tokens[i] == token for token, i in reference.get_vocab().items()) and len(tokens) == ROWS


@pytest.mark.parametrize("cut", [8, 512])
def test_truncation_and_padding_do_not_reach_any_consumer(tmp_path, cut):
    folder = save(tmp_path / "m", vocab_size=ROWS)
    backend = byte_level()
    backend.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT * 20)
    expected = read_tokens(open_checkpoint(str(folder)), tmp_path / "text.txt", 2048)
    plain = converted(folder).metadata
    truncation = {"direction": "Right", "max_length": cut, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 4096}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    update(folder, "tokenizer.json", truncation=truncation, padding=padding | {"pad_type_id": 0, "pad_token": "<s>"})
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids) == 4096
    assert read_tokens(open_checkpoint(str(folder)), tmp_path / "text.txt", 2048).equal(expected)
    metadata = converted(folder).metadata
    document = json.loads(metadata["tokenizer.huggingface.json"])
    assert document == json.loads(plain["tokenizer.huggingface.json"]) and document["truncation"] is None
    assert (
        Runner.from_metadata(metadata).encode(TEXT, False).tolist()
        == backend.encode(TEXT, add_special_tokens=False).ids
    )
