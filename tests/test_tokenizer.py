"""Token ids and text against the library that trained the tokenizer, and against SentencePiece's rule."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from pyggml_bridge.errors import CQError
from pyggml_bridge.tokenizer import Tokenizer
from tests.byte_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    SPECIAL,
    TEXT,
    UNKNOWN,
    USER_DEFINED,
    byte_keys,
    ggml_keys,
    train,
)  # fmt: skip

REFERENCES = {"gpt-2": GPT2, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])}
PIECES = [
    "the",
    " hash",
    "12345",
    "  ",
    "\n",
    "\t",
    "'s",
    "'LL",
    "é",
    "日本語",
    "ру",
    "👩‍👩‍👧",
    "ß",
    "\u00a0",
    "\u200b",
    "{",
]


def random_texts(pieces: list[str], count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=REFERENCES)
def trained(request):
    reference = train(REFERENCES[request.param])
    return reference, ggml_keys(reference, request.param)


def test_ids_equal_the_library_that_trained_the_tokenizer(trained):
    reference, keys = trained
    from_keys = Tokenizer.from_metadata(keys)
    from_json = Tokenizer.from_metadata(keys | {"tokenizer.huggingface.json": reference.to_str()})
    for text in [TEXT, *random_texts([*PIECES, *SPECIAL], 500)]:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert from_keys.encode(text, add_special=False).tolist() == expected
        assert from_json.encode(text, add_special=False).tolist() == expected


def test_decode_inverts_encode_and_streaming_agrees(trained):
    tokenizer = Tokenizer.from_metadata(trained[1])
    for text in random_texts(PIECES, 500):
        ids = tokenizer.encode(text, add_special=False).tolist()
        assert tokenizer.decode(ids) == text
        stream, shown = tokenizer.stream(), ""
        for token in ids:
            shown += stream.push(token)
            assert text.startswith(shown)  # never half a character, nothing taken back
        assert shown + stream.flush() == text


def test_special_tokens_are_plain_text_on_request_and_never_shown():
    tokenizer = Tokenizer.from_metadata(byte_keys())
    text = "a<|im_end|>b"
    assert tokenizer.encode(text, add_special=False).tolist()[1] == 2
    plain = tokenizer.encode(text, add_special=False, parse_special=False).tolist()
    assert len(plain) == len(text)
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == "ab"


def test_user_defined_tokens_are_always_recognised_and_shown():
    keys = byte_keys()
    keys["tokenizer.ggml.tokens"].append("<think>")
    keys["tokenizer.ggml.token_type"].append(USER_DEFINED)
    tokenizer = Tokenizer.from_metadata(keys)
    ids = tokenizer.encode("x<think>", add_special=False, parse_special=False).tolist()
    assert ids[1:] == [len(keys["tokenizer.ggml.tokens"]) - 1]
    assert tokenizer.decode(ids) == "x<think>"


def test_invalid_utf8_from_the_model_becomes_replacement_characters():
    tokenizer = Tokenizer.from_metadata(byte_keys())
    first, second, third = tokenizer.encode("€", add_special=False).tolist()
    assert tokenizer.decode([first, second]) == "\ufffd"
    assert tokenizer.decode([first, third, *tokenizer.encode("x", add_special=False)]) == "\ufffdx"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", " ", " dollars", "\n\n", " now", "!!", "\n"]),
        ("smollm", ["I", "'", "LL", " pay", " ", *"12345", " ", " dollars", "\n\n", " now", "!!", "\n"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", " ", " dollars", "\n\n", " now", "!!\n"]),
        ("qwen2", ["I", "'LL", " pay", " ", *"12345", " ", " dollars", "\n\n", " now", "!!\n"]),
        ("tekken", ["I", "'LL", " pay", " ", *"12345", " ", " dollars", "\n\n", " now", "!!\n"]),
        ("deepseek-llm", ["I", "'", "LL", " pay", " ", "12345", " ", " dollars", "\n", "\n", " now", "!!", "\n"]),
    ],
)
def test_pre_tokenizers_cut_as_the_models_do(pre, expected):
    """A token per expected piece, so that a text becomes exactly those where it is cut there and nowhere else."""
    text = "".join(expected)
    keys = _whole_word_keys(sorted(set(expected)), pre)
    tokenizer = Tokenizer.from_metadata(keys)
    ids = tokenizer.encode(text, add_special=False).tolist()
    assert [tokenizer.decode([token]) for token in ids] == expected


def _whole_word_keys(words: list[str], pre: str) -> dict[str, Any]:
    """Byte tokens, and for each word the chain of merges that builds it from the left."""
    keys = byte_keys() | {"tokenizer.ggml.pre": pre}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    for word in [*words, "!!\n", "  dollars", "\n\n now", " 12345", "12345"]:  # and what a wrong cut would make
        ((chars, _),) = level.pre_tokenize_str(word)
        for end in range(2, len(chars) + 1):
            if chars[:end] not in tokens:
                tokens.append(chars[:end])
                merges.append(f"{chars[: end - 1]} {chars[end - 1]}")
    keys["tokenizer.ggml.token_type"] = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3)
    return keys


def test_bos_and_every_end_token():
    keys = byte_keys()
    keys |= {"tokenizer.ggml.eot_token_id": 0, "cq.eos_token_ids": [2, 7, 8, -1, 1 << 20]}
    keys["tokenizer.ggml.token_type"][7] = CONTROL
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.eos_ids == {0, 2, 7}  # 8 is the text of a byte
    assert Tokenizer.from_metadata(spm_keys() | {"cq.eos_token_ids": [3 + 0x20]}).eos_ids == {2}
    assert not tokenizer.add_bos
    with_bos = Tokenizer.from_metadata(keys | {"tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("", add_special=True).tolist() == [1]
    assert with_bos.encode("", add_special=False).tolist() == []
    assert Tokenizer.from_metadata(keys | {"tokenizer.ggml.pre": "llama-bpe"}).add_bos


def test_six_hundred_kilobytes_take_about_a_second():
    tokenizer = Tokenizer.from_metadata(ggml_keys(train(GPT2), "gpt-2"))
    text = TEXT * (600_000 // len(TEXT))
    started = time.perf_counter()
    tokenizer.encode(text, add_special=True)
    assert time.perf_counter() - started < 5


SPM_WORDS = [
    "▁",
    "a",
    "b",
    "c",
    "é",
    "ab",
    "▁a",
    "bc",
    "abc",
    "▁ab",
    "▁abc",
    "aa",
    "aaa",
    "aaaa",
    "▁▁",
    "▁▁▁▁",
    "cc",
    "bcc",
]


def spm_keys() -> dict[str, Any]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *SPM_WORDS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i * 7 % len(SPM_WORDS)) for i in range(len(SPM_WORDS))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(SPM_WORDS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentencepiece_ids(keys: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's rule as it is stated: merge the adjacent pair whose union scores best, the leftmost of equals."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    pieces = list(("▁" + text).replace(" ", "▁"))
    while True:
        unions = [a + b for a, b in itertools.pairwise(pieces)]
        candidates = [(-scores[tokens.index(union)], i) for i, union in enumerate(unions) if union in SPM_WORDS]
        if not candidates:
            break
        at = min(candidates)[1]
        pieces[at : at + 2] = [unions[at]]
    known = lambda piece: [tokens.index(piece)] if piece in tokens else [3 + byte for byte in piece.encode()]  # noqa: E731
    return [token for piece in pieces for token in known(piece)]


def test_sentencepiece_models_merge_by_score():
    keys = spm_keys()
    tokenizer = Tokenizer.from_metadata(keys)
    for text in random_texts(["a", "b", "c", " ", "é", "日"], 500, seed=1):
        if text:
            ids = tokenizer.encode(text, add_special=False).tolist()
            assert ids == sentencepiece_ids(keys, text)
            assert tokenizer.decode(ids) == text


def test_sentencepiece_spaces_and_bos():
    tokenizer = Tokenizer.from_metadata(spm_keys())
    assert tokenizer.encode("a", add_special=True).tolist()[0] == 1
    ids = tokenizer.encode("abc", add_special=False).tolist()
    continuation, turn = tokenizer.stream(), tokenizer.stream(at_start=True)
    assert "".join(map(continuation.push, ids)) == " abc"
    assert "".join(map(turn.push, ids)) == "abc"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "martian"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["zz q"]}, "tokenizer.ggml"),
        ({"tokenizer.ggml.eos_token_id": 100000}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
        ({"tokenizer.huggingface.json": "{"}, "tokenizer.huggingface.json"),
    ],
)
def test_damaged_keys_are_named(change, named):
    with pytest.raises(CQError, match=named):
        Tokenizer.from_metadata(byte_keys() | change)


def test_ids_may_have_gaps():
    """Ids are counted, not entries of the vocabulary."""
    document = json.loads(train(GPT2).to_str())
    document["model"]["vocab"]["</s>"] = 1000
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": 1000, "content": "</s>", "special": True, **flags})
    keys = {"tokenizer.huggingface.json": json.dumps(document), "tokenizer.ggml.eos_token_id": 1000}
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.vocab_size == 1001 and tokenizer.eos_ids == {1000}
    assert tokenizer.encode("</s>", add_special=False).tolist() == [1000]
    with pytest.raises(CQError, match="eos_token_id: 999 is outside"):
        Tokenizer.from_metadata(keys | {"tokenizer.ggml.eos_token_id": 999})


def test_truncation_and_padding_of_a_stored_tokenizer_are_off():
    backend = train(GPT2)
    keys = {"tokenizer.huggingface.json": backend.to_str()}
    expected = Tokenizer.from_metadata(keys).encode(TEXT, add_special=False).tolist()
    backend.enable_truncation(8)
    backend.enable_padding(length=4096)
    cut = Tokenizer.from_metadata({"tokenizer.huggingface.json": backend.to_str()})
    assert len(expected) > 8 and cut.encode(TEXT, add_special=False).tolist() == expected


def test_lone_surrogates_are_refused():
    with pytest.raises(CQError, match="UTF-8"):
        Tokenizer.from_metadata(byte_keys()).encode("\udcff", add_special=False)
