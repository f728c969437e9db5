"""cq-convert: arguments -> one frozen Settings -> the pipeline -> the report."""

from __future__ import annotations

import json

from pyggml_bridge.cli.common import print_json, run_main
from pyggml_bridge.errors import CQError

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
    if arguments.report and not arguments.report.resolve().parent.is_dir():
        raise CQError(f"--report {arguments.report}: no such directory")
    if arguments.dry_run:
        dry_run(settings, arguments.json)
        return
    report = convert(settings)
    document = report.document()
    if arguments.report:
        arguments.report.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(document)
    report.print()


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
