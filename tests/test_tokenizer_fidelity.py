"""The tokenizer of a converted file is the checkpoint's tokenizer.json, whatever transformers would make of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from codequant_converter.calibrate.tokens import read_tokens
from codequant_converter.source import source_tokenizer
from codequant_converter.source.open_checkpoint import open_checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing

from pyggml_bridge.chat import ChatTemplate
from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.tokenizer import Tokenizer as Runner
from tests.byte_tokenizer import TEXT
from tests.models import MODELS, VOCAB, TinyModel
from tests.test_converter_files import convert

ROWS = 640  # of the embedding
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<｜User｜>"]
CORPUS = [
    TEXT,
    "a  b   c\n\n\n\td e1f22g333 don't I'LL x_y(z)[0]; 日本語 한국어 ру́сский é ê ﬁ ½ ÀÉ " * 3,
    "x = 1;\r\n" * 9,
]


def byte_level(*steps: Any, bos: bool = False) -> Tokenizer:
    """Trained with these cuts before bytes are written as characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=not steps)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)]) if bos else ByteLevel()
    train(backend, sorted(pre_tokenizers.ByteLevel.alphabet()))
    return backend


def sentencepiece(normalizer: Any, pre: Any, bos: bool = True) -> Tokenizer:
    """In SentencePiece's manner: spaces as "▁", unknown characters as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    train(backend, ["▁"], ["<unk>", *bytes_])
    document = json.loads(backend.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in bytes_]
    backend = Tokenizer.from_str(json.dumps(document))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    begin = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing("<s> $A" if bos else "$A", special_tokens=[("<s>", begin)])
    return backend


def train(backend: Tokenizer, alphabet: list[str], first: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 32,
        special_tokens=[*(first or []), *SPECIAL[:4]],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet) + 40,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(SPECIAL[4], normalized=False)])
    backend.add_tokens([AddedToken("<think>", normalized=True), AddedToken("<|pad|>", rstrip=True, normalized=False)])


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def prepend() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


DEEPSEEK = (split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), pre_tokenizers.Digits(True))
KINDS = {
    "gpt-2": lambda: byte_level(),
    "gpt-2, begins with a token": lambda: byte_level(bos=True),
    "digits": lambda: byte_level(pre_tokenizers.Digits(True), split(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")),
    "triples": lambda: byte_level(split(r"\p{N}{1,3}"), split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+")),
    "vowels": lambda: byte_level(split("[aeiou]")),
    "deepseek": lambda: byte_level(*DEEPSEEK),
    "llama, legacy": lambda: sentencepiece(prepend(), None),
    "metaspace, first": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace, always": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace, never": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False
    ),
    "no space, no pre-tokenizer": lambda: sentencepiece(normalizers.Replace(" ", "▁"), None),
}
CLASSES = ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "GPTNeoXTokenizer", "CohereTokenizer", None]
PIECES = [
    *("the", " hash", "table", " 12345", "7", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "'s", "'LL", "don't"),
    *(
        "é",
        "e\u0301",
        "日本語",
        " 한국어",
        "ру́сский",
        "👩‍👩‍👧",
        "ß",
        "\u00a0",
        "\u200b",
        "\u3000",
        "½",
        "ﬁ",
        "▁",
        "Ġ",
        "\x00",
    ),
    *("{", "}", "();", "//", "<", ">", "<|", "|>", "_", "-", "...", "<think>", "</think>", "<|pad|>", *SPECIAL),
]


def texts(count: int) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices(PIECES, k=rng.randint(0, 12))) for _ in range(count)]


def save(folder: Path, model_type: str = "llama", **fields: Any) -> Path:
    """A checkpoint without tokenizer."""
    TinyModel(model_type, {"num_hidden_layers": 1, "vocab_size": VOCAB} | fields).save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def write(folder: Path, name: str, document: object) -> None:
    (folder / name).write_text(json.dumps(document, indent=1), encoding="utf-8")


def update(folder: Path, name: str, **fields: object) -> None:
    file = folder / name
    write(folder, name, (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}) | fields)


def converted(folder: Path) -> GGUFFile:
    convert(folder, folder / "m.gguf", "--rotated-only", "f32", "--no-check")
    return GGUFFile(folder / "m.gguf")


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


def test_a_sentencepiece_model_alone_names_what_reads_it(tmp_path, monkeypatch):
    save(tmp_path, vocab_size=ROWS)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr(source_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(CQError, match="sentencepiece"):
        converted(tmp_path)


def test_a_sentencepiece_model_alone(tmp_path):
    """transformers converts it; if that is not the same tokenizer, this is an error."""
    library = pytest.importorskip("sentencepiece")
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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"added_tokens": [{}]}', '{"model": {"type": "BPE"}}'])
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
