"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import MODELS


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Directories by name of a tiny model, each saved once."""
    folder = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            MODELS[name].save(folder / name)
        return folder / name

    return get
