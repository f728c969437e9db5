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


FOLDERS = "converter|docs|examples|native|pyggml_bridge|scripts|tests"
INSTALLED = {"pyggml_bridge/cuda/sources"}  # is native/cuda in a checkout


def test_named_files_exist():
    named = {name for page in PAGES for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text())}
    assert len(named) > 50
    for name in named - INSTALLED:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("folder", ["converter", "pyggml_bridge", "native"])
def test_the_map_of_the_code_names_what_is_there(folder):
    """Every path of a table in code.md exists; of the packages' own files and folders none is left out."""
    text = (ROOT / "docs" / "code.md").read_text()
    table = re.search(rf"^\| path in `{folder}/`.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table
    cells = [row.split("|")[1] for row in table[0].splitlines()[2:] if row.startswith("|")]
    paths = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    for path in paths:
        assert (ROOT / folder / path).exists(), path
    if folder != "native":
        listed = {path.split("/")[0] for path in paths}
        there = {p.name for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
        assert there - listed == {"__init__.py", "errors.py", "version.py"} & there
