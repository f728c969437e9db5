"""What the files beside tokenizer.json say: special tokens, ends of an answer, chat templates; and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from codequant_converter.source import source_tokenizer
from tokenizers.processors import TemplateProcessing

from pyggml_bridge.chat import ChatTemplate
from pyggml_bridge.errors import CQError
from pyggml_bridge.tokenizer import Tokenizer as Runner
from tests.byte_tokenizer import TEXT
from tests.models import MODELS, VOCAB
from tests.tokenizer_kinds import ROWS, byte_level, converted, save, texts, update, write


def ends(folder: Path, generation: object, config: object = None, eos: str | None = "</s>") -> tuple[list[int], Runner]:
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        write(folder, "generation_config.json", {"eos_token_id": generation} if generation != "absent" else {})
    update(folder, "config.json", eos_token_id=config)
    update(folder, "tokenizer_config.json", eos_token=eos)
    metadata = converted(folder).metadata
    return list(metadata.get("cq.eos_token_ids", [])), Runner.from_metadata(metadata)


def test_the_generation_configuration_decides_what_ends_an_answer(tmp_path, capsys):
    """In the tiny tokenizer 2 is a printable byte, 256 to 258 are <s>, </s> and <|im_end|>."""
    MODELS["llama-tied"].save(tmp_path)
    assert ends(tmp_path, 258, config=2)[0] == [258]
    assert ends(tmp_path, [258, 257], config=2)[0] == [257, 258]
    assert ends(tmp_path, "absent", config=258)[0] == [257, 258]
    assert ends(tmp_path, None, config=258)[0] == [257, 258]
    assert not capsys.readouterr().err.count("ends no answer")
    ids, runner = ends(tmp_path, None, config=[2, 258], eos=None)
    assert ids == [258] and runner.eos_ids == {258}
    assert "eos_token_id 2 is ordinary text" in capsys.readouterr().err
    ids, runner = ends(tmp_path, [2, 5000, -1, 258], config=257)
    assert ids == [258] and 2 not in runner.eos_ids
    assert "eos_token_id 5000 is no token" in capsys.readouterr().err


@pytest.mark.parametrize("document", [None, [], "2", {"eos_token_id": "257"}, {"eos_token_id": [257, "258"]}])
def test_generation_configurations_that_are_none_get_one_line(tmp_path, document):
    MODELS["llama-tied"].save(tmp_path)
    write(tmp_path, "generation_config.json", document)
    with pytest.raises(CQError, match=r"generation_config\.json") as error:
        converted(tmp_path)
    assert "\n" not in str(error.value)


def test_added_tokens_beyond_the_embedding_are_left_out(tmp_path, capsys):
    MODELS["llama-tied"].save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    used = len(document["model"]["vocab"])
    document["model"]["vocab"] |= {f"x{i}": i for i in range(used, VOCAB)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, text in enumerate(("[PAD]", "<far>")):
        document["added_tokens"].append({"id": VOCAB + i, "content": text, "special": True, **flags})
    document["model"]["vocab"]["[PAD]"] = VOCAB  # as some have it
    write(tmp_path, "tokenizer.json", document)
    update(tmp_path, "tokenizer_config.json", pad_token="[PAD]")
    metadata = converted(tmp_path).metadata
    assert "'[PAD]' (288), '<far>' (289)" in capsys.readouterr().err
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCAB and "tokenizer.ggml.padding_token_id" not in metadata
    ids = Runner.from_metadata(metadata).encode("a[PAD]b<far>", add_special=False)
    assert ids.max() < VOCAB


def test_ids_are_counted_not_entries(tmp_path):
    """Tokens whose ids leave gaps, the last ones special."""
    MODELS["llama-tied"].save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["</s>"], vocabulary["<|im_end|>"] = VOCAB - 1, VOCAB - 3
    for token in document["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    write(tmp_path, "tokenizer.json", document)
    for name in ("config.json", "generation_config.json"):
        update(tmp_path, name, eos_token_id=[VOCAB - 1, VOCAB - 3])
    metadata = converted(tmp_path).metadata
    runner = Runner.from_metadata(metadata)
    assert runner.eos_ids == {VOCAB - 1, VOCAB - 3} and runner.vocab_size == VOCAB
    assert runner.encode("</s>", add_special=False).tolist() == [VOCAB - 1]
    assert metadata["tokenizer.ggml.tokens"][VOCAB - 1] == "</s>"
    assert metadata["tokenizer.ggml.tokens"][257] == "[PAD257]"


def test_special_tokens_are_those_that_the_files_name(tmp_path, capsys):
    folder = save(tmp_path / "m", vocab_size=ROWS)
    byte_level(bos=True).save(str(folder / "tokenizer.json"))
    metadata = converted(folder).metadata  # no further file: the post-processor names what begins a text
    assert metadata["tokenizer.ggml.bos_token_id"] == 0 and metadata["tokenizer.ggml.add_bos_token"]
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "pad_token": "[PAD]"})
    metadata = converted(folder).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 1 and "tokenizer.ggml.padding_token_id" not in metadata
    assert "pad_token '[PAD]'" in capsys.readouterr().err
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>", "added_tokens_decoder": {}})
    assert converted(folder).metadata["tokenizer.ggml.eos_token_id"] == 3  # the map is not read beside such a list
    update(folder, "tokenizer_config.json", add_bos_token=False)
    assert converted(folder).metadata["tokenizer.ggml.add_bos_token"]
    assert "add_bos_token false" in capsys.readouterr().err


def test_what_comes_around_a_text_and_cannot_be_said_is_warned_of(tmp_path, capsys):
    folder = save(tmp_path / "m", vocab_size=ROWS)
    backend = byte_level()
    two = [("<s>", 0), ("<|im_start|>", 2)]
    backend.post_processor = TemplateProcessing("<s> <|im_start|> $A", special_tokens=two)
    backend.save(str(folder / "tokenizer.json"))
    assert Runner.from_metadata(converted(folder).metadata).encode("", add_special=True).tolist() == [0]
    assert "'<s>', '<|im_start|>' around a text" in capsys.readouterr().err


def test_a_document_that_does_not_name_its_model(tmp_path):
    folder = save(tmp_path / "m", vocab_size=ROWS)
    document = json.loads(byte_level().to_str())
    del document["model"]["type"]
    write(folder, "tokenizer.json", document)
    assert converted(folder).metadata["tokenizer.ggml.model"] == "gpt2"


def test_a_sentencepiece_model_alone_names_what_reads_it(tmp_path, monkeypatch):
    save(tmp_path, vocab_size=ROWS)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr(source_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(CQError, match="sentencepiece"):
        converted(tmp_path)


def test_a_sentencepiece_model_alone(tmp_path):
    """transformers converts it; if that is not the same tokenizer, this is an error."""
    import sentencepiece as library

    (tmp_path / "text.txt").write_text(TEXT * 20)
    folder = save(tmp_path / "m", vocab_size=ROWS)
    library.SentencePieceTrainer.train(
        **{"input": str(tmp_path / "text.txt"), "model_prefix": str(folder / "tokenizer"), "vocab_size": 560},
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "character_coverage": 0.99, "minloglevel": 2},
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **tokens})
    with pytest.raises(CQError, match=r"other ids than SentencePiece"):
        source_tokenizer._check_against_sentencepiece(folder / "tokenizer.model", byte_level())
    runner = Runner.from_metadata(converted(folder).metadata)
    processor = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert runner.eos_ids == {2} and runner.bos_id == 1
    for text in texts(1000):
        if text.strip() and not text[0].isspace() and not any(mark in text for mark in ("<s>", "</s>", "\x00", "▁")):
            assert runner.encode(text, add_special=False).tolist() == processor.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "",
        "{",
        "[]",
        "{}",
        '{"added_tokens": [{}]}',
        '{"model": {"type": "BPE"}}',
    ],
)
def test_tokenizers_that_are_none_get_one_line(tmp_path, text):
    save(tmp_path, vocab_size=ROWS)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CQError, match=r"tokenizer\.json") as error:
        converted(tmp_path)
    assert "\n" not in str(error.value)


PLAIN, TOOLS = "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ tools }}{{ messages[0].content }}!"
NAMED = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": PLAIN}]


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (PLAIN, {}, {"default": PLAIN}),
        (NAMED, {}, {"default": PLAIN, "tool_use": TOOLS}),
        ({entry["name"]: entry["template"] for entry in NAMED}, {}, {"default": PLAIN, "tool_use": TOOLS}),
        ("old", {"chat_template.jinja": PLAIN}, {"default": PLAIN}),
        (
            "old",
            {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS},
            {"default": PLAIN, "tool_use": TOOLS},
        ),
        (PLAIN, {"additional_chat_templates/tool_use.jinja": TOOLS}, {"default": PLAIN, "tool_use": TOOLS}),
        (None, {"chat_template.json": json.dumps({"chat_template": PLAIN})}, {"default": PLAIN}),
        (NAMED[:1], {}, {"tool_use": TOOLS}),
        (None, {}, {}),
    ],
)
def test_all_chat_templates_are_stored(tmp_path, config, files, expected):
    MODELS["llama-tied"].save(tmp_path)
    update(tmp_path, "tokenizer_config.json", chat_template=config)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    metadata = converted(tmp_path).metadata
    found = {name: text for name, text in metadata.items() if name.startswith("tokenizer.chat_template")}
    others = {f"tokenizer.chat_template.{name}": text for name, text in expected.items() if name != "default"}
    default = {"tokenizer.chat_template": expected["default"]} if "default" in expected else {}
    names = {"tokenizer.chat_templates": ["tool_use"]} if others else {}
    assert found == default | others | names
    template = ChatTemplate.from_metadata(metadata, Runner.from_metadata(metadata))
    messages = [{"role": "user", "content": "Hi"}]
    assert (template and template.render(messages)) == (("Hi" if default else "NoneHi!") if expected else None)


@pytest.mark.parametrize("given", [7, [], ["x"], [{"name": "default"}], {"default": 1}])
def test_chat_templates_that_are_none_get_one_line(tmp_path, given):
    MODELS["llama-tied"].save(tmp_path)
    update(tmp_path, "tokenizer_config.json", chat_template=given)
    with pytest.raises(CQError, match="chat_template"):
        converted(tmp_path)
