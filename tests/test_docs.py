"""What docs/ quotes is what the files say: code blocks that name a file, and paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
QUOTE = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # ```python path/of/a/file.py
PAGE = ROOT / "docs" / "adding-a-model.md"


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_code_is_in_the_file(page):
    for name, code in QUOTE.findall(page.read_text()):
        assert code in (ROOT / name).read_text(), f"{page.name} quotes {name} otherwise than it is"


@pytest.mark.parametrize("name", ["converter/source/arch/qwen3_moe.py", "pyggml_bridge/models/qwen3moe.py"])
def test_the_example_is_quoted_whole(name):
    quoted = "".join(code for file, code in QUOTE.findall(PAGE.read_text()) if file == name)
    assert lines(quoted) == lines((ROOT / name).read_text())


def test_named_files_exist():
    names = re.findall(r"`([\w./]+/[\w.]+\.(?:py|c|h|md))`", PAGE.read_text())
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).is_file(), name
