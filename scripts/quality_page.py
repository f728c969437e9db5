"""docs/quality.md and its plots, from the results that scripts/ablate.py measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

INTRODUCTION = """# Quality, measured

Written by `scripts/ablate.py`; nothing here is typed in. KLD is the mean divergence in nats
of the next-token distribution from the original's F32 logits, on text that calibration never saw, of the file as the
runner runs it (int8 activations where not said otherwise), in chunks of 512 tokens. `tokens` are those of calibration.
Seconds are of the conversion, on two cores that other work may have shared; with a star on a slower processor of 2019,
none where the conversion was stopped in between. Results are of the code as it was when they were measured; later
changes and what they did are in [decisions.md](decisions.md): damping by the number of tokens, and no descent where a
column has fewer than eight, which is all cases of 4096 tokens.
"""

TABLES = {
    "acceptance": "Default settings and 3.5 bits per weight",
    "stages": "SmolLM2: one stage off at a time",
    "size": "SmolLM2: size against quality",
    "peer": "SmolLM2: llama.cpp's types, importance matrix from the same calibration text",
    "tokens": "SmolLM2: calibration tokens, default settings",
    "router": "SmolMoE: what the routers' choices count in the sensitivity, a type for each expert, and descent",
    "moe stages": "SmolMoE: one stage off at a time",
    "rotation": "`--method paper`, 4-bit activations: the rotation (the paper's Table 4)",
    "moe rotation": "`--method paper`, 4-bit activations, SmolMoE: the rotation, centroids not fine-tuned",
    "grouping": "`--method paper`, 4-bit activations: codebooks of 64 columns, POG",
    "tuning": "`--method paper`, SmolMoE: centroid fine-tuning",
}


def render(cases: Iterable[Any], results: dict[str, dict[str, Any]], docs: Path) -> None:
    """Write quality.md and the plots of those cases that have results."""
    done = [(case, results[case.key]) for case in cases if case.key in results]
    parts = [INTRODUCTION]
    for group, title in TABLES.items():
        rows = [(case, result) for case, result in done if case.group == group]
        if rows:
            parts.append(f"## {title}\n\n{_table(rows)}")
        if group == "peer" and rows:
            _plot_sizes(done, docs / "quality-size.png")
            parts.append("![size against KLD](quality-size.png)\n")
        if group == "tokens" and rows:
            _plot_tokens(done, docs / "quality-tokens.png")
            parts.append("![calibration tokens against KLD](quality-tokens.png)\n")
    (docs / "quality.md").write_text("\n".join(parts), encoding="utf-8")


def _table(rows: list[tuple[Any, dict[str, Any]]]) -> str:
    lines = [
        "| | bpw | tokens | chunks | perplexity (original) | mean KLD | same top | routing changed | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, r in rows:
        seconds = "" if "seconds" not in r else f"{r['seconds']:.0f}" + ("" if "machine" in r else "*")
        routing = "" if r["router_top_k_change"] is None else f"{100 * r['router_top_k_change']:.2f}%"
        lines.append(
            f"| {case.name} | {r['bpw']:.3f} | {case.tokens} | {case.chunks} | {r['ppl']:.3f} ({r['base_ppl']:.3f}) "
            f"| {r['mean_kld']:.4f} | {100 * r['same_top_p']:.2f}% | {routing} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def _plot_sizes(done: list[tuple[Any, dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    points = {
        "cq, types mixed by sensitivity": ("o-", [(c, r) for c, r in done if c.group == "size" and "mixed" in c.name]),
        "cq, one type": ("s--", [(c, r) for c, r in done if c.group == "size" and "mixed" not in c.name]),
        "llama.cpp with an importance matrix": ("kx", peers := [(c, r) for c, r in done if c.group == "peer"]),
    }
    points["cq, types mixed by sensitivity"][1].extend((c, r) for c, r in done if c.name == "all stages")
    for label, (style, results) in points.items():
        if results:
            line = sorted((r["bpw"], r["mean_kld"]) for _, r in results)
            axes.plot(*zip(*line, strict=True), style, label=label)
    for case, r in peers:
        axes.annotate(f" {case.name}", (r["bpw"], r["mean_kld"]), fontsize="x-small")
    axes.set(yscale="log", xlabel="bits per weight of the linear layers", ylabel="mean KLD", title="SmolLM2-135M")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})


def _plot_tokens(done: list[tuple[Any, dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted(
        {(c.tokens, r["mean_kld"]) for c, r in done if c.model == "smol" and not c.options and c.chunks == 12}
    )
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(*zip(*points, strict=True), "o-")
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="mean KLD", title="SmolLM2-135M, 4.5 bits per weight")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})
