"""Tokenizers of several kinds trained on the spot, and checkpoints whose tokenizer's files a test writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing

from pyggml_bridge.reader import GGUFFile
from tests.byte_tokenizer import TEXT
from tests.models import VOCAB, TinyModel
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
