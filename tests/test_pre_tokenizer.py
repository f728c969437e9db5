"""tokenizer.ggml.pre from the pre-tokenizer's definition; a conversion whose pre-tokenizer llama.cpp does not have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from codequant_converter.source.pre_tokenizer import llama_cpp_name
from codequant_converter.source.tokenizer import _adds_space_prefix
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.stock import differences
from pyggml_bridge.tokenizer import Tokenizer as Runner
from pyggml_bridge.tokenizer_ggml import PRE_TOKENIZERS, WHOLE_WORDS_FIRST
from tests.models import MODELS, TEXT, VOCAB
from tests.test_converter_files import convert


def backend(*steps: Any, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


TO_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPELLED_OUT = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}|" + TAIL


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_definition_is_found_by_what_it_does(name):
    """As the first name that has the same definition."""
    whole_words = name in WHOLE_WORDS_FIRST
    steps = [split(pattern) for pattern in PRE_TOKENIZERS[name]]
    found, difference = llama_cpp_name(backend(*steps, TO_BYTES, ignore_merges=whole_words))
    assert found is not None and not difference
    assert PRE_TOKENIZERS[found] == PRE_TOKENIZERS[name] and (found in WHOLE_WORDS_FIRST) == whole_words


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ((GPT2,), False, "gpt-2"),
        ((pre_tokenizers.Digits(True), GPT2), False, "smollm"),
        ((split(r"\d"), GPT2), False, None),  # in the library's expressions only some digits
        ((split(QWEN2_SPELLED_OUT), TO_BYTES), False, "qwen2"),
        ((split(PRE_TOKENIZERS["gpt-4o"][0], "removed", invert=True), TO_BYTES), False, "gpt-4o"),
        ((split(PRE_TOKENIZERS["llama-bpe"][0]), TO_BYTES), False, "dbrx"),  # which keeps to the merges
        (
            (*map(split, PRE_TOKENIZERS["deepseek-llm"][:-1]), pre_tokenizers.Digits(True), TO_BYTES),
            False,
            "deepseek-llm",
        ),
        ((pre_tokenizers.ByteLevel(add_prefix_space=True),), False, None),
        ((split(r"\p{L}+"), TO_BYTES), False, None),
    ],
)
def test_other_spellings(steps, ignore_merges, name):
    found, difference = llama_cpp_name(backend(*steps, ignore_merges=ignore_merges))
    assert found == name and bool(difference) == (name is None)


def test_merges_that_are_taken_otherwise_are_told():
    found, difference = llama_cpp_name(backend(split(PRE_TOKENIZERS["qwen2"][0]), TO_BYTES, ignore_merges=True))
    assert found == "qwen2" and "ignore_merges False, the tokenizer True" in difference
    assert llama_cpp_name(Tokenizer(models.BPE())) == (None, "there is none")


@pytest.mark.parametrize(
    ("document", "adds"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}}, True),
        ({"normalizer": {"type": "Replace"}, "pre_tokenizer": None}, False),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
    ],
)
def test_space_before_a_text(document, adds):
    assert _adds_space_prefix(document) == adds


def test_unknown_pre_tokenizer_converts_with_a_warning(tmp_path, capsys):
    """The runner reads the tokenizer itself; llama.cpp gets no name rather than a wrong one."""
    MODELS["qwen3-tied"].save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    odd = [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(odd)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path))
    convert(tmp_path / "model", tmp_path / "m.cq.gguf", "--no-check")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "pre-tokenizer" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ") and "aeiou" in warnings[0]
    file = GGUFFile(tmp_path / "m.cq.gguf")
    assert "tokenizer.ggml.pre" not in file.metadata
    ids = Runner.from_metadata(file.metadata).encode(TEXT, add_special=False).tolist()
    assert ids == tokenizer.encode(TEXT, add_special_tokens=False)
    assert differences(file) == ["does not know the pre-tokenizer: its tokens may differ"]


def test_tokens_beyond_the_embedding_are_refused(tmp_path):
    MODELS["llama-tied"].save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {f"x{i}": i for i in range(len(document["model"]["vocab"]), VOCAB + 1)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CQError, match=f"token {VOCAB}"):
        convert(tmp_path, tmp_path / "m.gguf", "--no-check")
