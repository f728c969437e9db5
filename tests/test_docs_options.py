"""The guide explains every option of every command, and none that does not exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
EVERYWHERE = {"-h", "--help", "--version"}  # explained once, in install.md

# Command, its module, and the section of a page that explains it.
PAGES = (
    ("cq-convert", "codequant_converter.cli", "convert.md", "Options"),
    ("cq-run", "pyggml_bridge.cli.run", "run.md", "cq-run"),
    ("cq-export", "pyggml_bridge.cli.export", "run.md", "cq-export"),
    ("cq-info", "pyggml_bridge.cli.info", "run.md", "cq-info"),
    ("cq-perplexity", "pyggml_bridge.cli.perplexity", "measure.md", "cq-perplexity"),
    ("cq-bench", "pyggml_bridge.cli.bench", "measure.md", "cq-bench"),
)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def accepted(module: str) -> set[str]:
    """The options that `--help` lists, from its left column."""
    line = [sys.executable, "-m", module, "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True, env=environment)
    listed = re.findall(r"^  (-\S.*?)(?:  .*)?$", done.stdout, re.MULTILINE)
    return {option for entry in listed for option in options_in(entry)} - EVERYWHERE


def explained(page: str, heading: str) -> set[str]:
    """The options in the first cells of the tables of a section."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`-.*?`) \|", section, re.MULTILINE)
    return {option for cell in cells for option in options_in(cell)}


@pytest.mark.parametrize(("command", "module", "page", "heading"), PAGES, ids=[page[0] for page in PAGES])
def test_the_guide_explains_every_option(command, module, page, heading):
    assert explained(page, heading) == accepted(module), f"{command}: docs/{page}, section {heading}"
