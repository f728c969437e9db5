"""llama.cpp's name of a byte-level BPE's pre-tokenizer, found by what the pre-tokenizer does.

Its definition is run on a probing text beside those that llama.cpp has, so that however it is written (a pattern, its
parts, character classes spelled out) the cuts decide, and so that a model needs no entry in any list.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from pyggml_bridge.tokenizer_ggml import PRE_TOKENIZERS, WHOLE_WORDS_FIRST, as_pre_tokenizer

# DeepSeek's own tokenizer cuts digits one by one, llama.cpp's definition keeps their runs. Its merges join no digits.
ALSO = {"deepseek-llm": (*PRE_TOKENIZERS["deepseek-llm"][:-1], r"\p{N}")}
SITUATIONS = (
    "I'll say we've 12345 items, DON'T you? It's 3.14, 1,000 or 10000000 (ten)... 'Quoted', \"too\"!\n",
    "line\r\n\r\n\tnext  line \n \n\n   x = y[0]->z;//comment\n/path/to/file\n__init__ #tag @user a_b-c",
    "CamelCase XMLHttpRequest ABC abc aB Ab Größe ÉCOLE naïve'S 日本語とカナ 한국어 русский ЭВМ",
    "हिन्दी ไทย e\u0301a\u0308 x",
    "\u00a0\u2003x\u200b\u3000y \u00bd \u0663\u0664 \u2460 \u2167 €5 $6 +7= <8> ^9 ~ | ` ¿¡ « » … — 👩‍👩‍👧 ✅ 🦙🦙  ",
    " \n  ",
)


def llama_cpp_name(backend: Tokenizer) -> tuple[str | None, str]:
    """Its name, None if llama.cpp has none; and what differs in llama.cpp nevertheless, "" if nothing does."""
    document = json.loads(backend.to_str())
    if backend.pre_tokenizer is None:
        return None, "there is none"
    cuts = _cuts(backend.pre_tokenizer.pre_tokenize_str)
    names = [name for name in PRE_TOKENIZERS if cuts in _known_cuts(name)]
    if not names:
        return None, f"{json.dumps(document['pre_tokenizer'])[:200]} is not among llama.cpp's"
    whole_words = bool(document["model"].get("ignore_merges"))
    fitting = [name for name in names if (name in WHOLE_WORDS_FIRST) == whole_words]
    if fitting:
        return fitting[0], ""
    return names[0], f"llama.cpp's {names[0]} has ignore_merges {not whole_words}, the tokenizer {whole_words}"


@cache
def _known_cuts(name: str) -> tuple[list[list[str]], ...]:
    definitions = [PRE_TOKENIZERS[name], *([ALSO[name]] if name in ALSO else [])]
    return tuple(_cuts(as_pre_tokenizer(patterns).pre_tokenize_str) for patterns in definitions)


def _cuts(pre_tokenize: Callable[[str], list[tuple[str, Any]]]) -> list[list[str]]:
    return [[piece for piece, _ in pre_tokenize(text)] for text in _probe()]


@cache
def _probe() -> tuple[str, ...]:
    """Situations, and characters of every kind between letters, digits, spaces and their like."""
    kinds: dict[tuple[str, int], str] = {}
    for code in range(0x20, 0x20000):
        category = unicodedata.category(chr(code))
        if category not in ("Cs", "Co", "Cn"):
            kinds.setdefault((category, code >> 7), chr(code))  # one of a kind in every 128
    return (*SITUATIONS, "".join(f"a{x}b {x}{x}1{x}.{x}\n" for x in kinds.values()))
