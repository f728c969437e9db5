"""cq-convert: arguments -> one frozen Settings -> the pipeline -> the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pyggml_bridge.cli.common import print_json, run_main
from pyggml_bridge.errors import CQError
from pyggml_bridge.output import complete_file

from .console import console, warn
from .options import parser, settings_of
from .output.gguf_file import check_output
from .pipeline import convert, needs, plan_conversion
from .report import DryRun
from .settings import Settings

LONG_SECONDS = 7200  # from here on a dry run says what is faster


def main() -> None:
    """Entry point of cq-convert."""
    run_main(command)


def command() -> None:
    """Parse, convert, report."""
    arguments = parser().parse_args()
    settings = settings_of(arguments)
    if arguments.report:
        check_report(arguments.report)
    if arguments.dry_run:
        dry_run(settings, arguments.json)
        return
    report = convert(settings)
    document = report.document()
    report.print()
    try:
        if arguments.report:
            write_report(arguments.report, document)
    except (OSError, CQError):
        arguments.json = True  # what was measured goes somewhere
        raise
    finally:
        if arguments.json:
            print_json(document)


def check_report(path: Path) -> None:
    """CQError if the report could not be written: before any long work."""
    if not path.resolve().parent.is_dir():
        raise CQError(f"--report {path}: no such directory")
    if path.is_dir() or not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise CQError(f"--report {path}: cannot be written")


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Write the document as a whole, or not at all unless the path is a device or a pipe; OSError names the path."""
    text = json.dumps(document, indent=1) + "\n"
    if path.exists() and not path.is_file():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"--report {path}") from error
        return
    with complete_file(path.resolve()) as part:
        part.write_text(text, encoding="utf-8")


def dry_run(settings: Settings, as_json: bool) -> None:
    """Print what a conversion would do; CQError if its output could not be written."""
    checkpoint, plan = plan_conversion(settings)
    needed = needs(settings, checkpoint, plan)
    check_output(settings.out, settings.overwrite, plan.nbytes)
    if settings.measures_sensitivity and settings.bits is None:
        warn("types are chosen when sensitivity is measured; these are the ones without it")
    found = DryRun(plan, str(settings.out), needed)
    if as_json:
        print_json(found.document())
    found.print()
    if settings.measures_sensitivity and needed.seconds > LONG_SECONDS:
        console.print("--fast takes a fraction of that, for a larger divergence")


if __name__ == "__main__":
    main()
