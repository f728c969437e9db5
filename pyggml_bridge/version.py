"""The installed package's version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """As pyproject.toml has it; "unknown" where the package runs without being installed."""
    try:
        return version("codequant-gguf")
    except PackageNotFoundError:
        return "unknown"
