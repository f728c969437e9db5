"""docs/quality.md and its plots, from the results that scripts/ablate.py measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

INTRODUCTION = """# Quality, measured

`scripts/ablate.py` measures what is in these tables and writes the page from [quality.json](quality.json).

| column | meaning |
|---|---|
| bpw | bits per weight of all tensors but the embedding and the output, with centroids and scales |
| tokens | calibration tokens |
| chunks | chunks of 512 tokens measured, of text that calibration has not seen |
| perplexity | of the file as the runner runs it, with int8 activations unless said otherwise |
| original's | perplexity of the F32 original |
| mean KLD | mean KL divergence of the next-token distribution from that of the F32 original, in nats |
| same top | share of tokens for which the most probable next token is that of the original |
| routing changed | share of tokens and layers whose set of experts is not that of the original |

SmolLM2 is SmolLM2-135M-Instruct. SmolMoE is a Mixture of Experts of Mixtral's architecture that
`scripts/make_smolmoe.py` makes from SmolLM2: 8 experts of width 1088, 2 per token.

How to read the figures:

- Two conversions that differ only in `--seed` differ by about 1% of mean KLD for SmolLM2 and 5% for SmolMoE. Smaller
  differences mean nothing ([decisions/clustering.md](decisions/clustering.md)).
- Only the first table has the output layer as `cq-convert` writes it (CQ5). The other tables keep it in Q8_0, as the
  files of llama.cpp beside them do, so that only the linear layers differ.
- bpw says nothing about the size of a whole file. Of SmolLM2's 110.2 MB by default settings, 30.1 MB are the embedding
  in Q8_0 and 18.5 MB the output in CQ5; in the checkpoint these two are one tensor.
- At 576 columns llama.cpp replaces many K- and I-quants by other types, so its files of SmolLM2 are larger than their
  names say, and two of them are the same. A model with wider rows compares otherwise.
- All results are of November 2026. The rows of 4096 calibration tokens include coordinate descent, except those that
  say otherwise. The converter leaves it out below eight calibration tokens per column, which is where 4096 tokens are
  for both models; the rows "no coordinate descent" come closest to what the converter does today.
- Both models are small. No large Mixture of Experts has been converted.
"""

TABLES = {
    "acceptance": "Default settings and 3.5 bits per weight",
    "stages": "SmolLM2: one stage off at a time",
    "size": "SmolLM2: size against quality",
    "peer": "SmolLM2: llama.cpp's types, importance matrix from the same calibration text",
    "tokens": "SmolLM2: calibration tokens, default settings",
    "moe stages": "SmolMoE: one stage off at a time",
    "rotation": "`--method paper`, 4-bit activations, SmolLM2: the rotation (the paper's Table 4)",
    "moe rotation": "`--method paper`, 4-bit activations, SmolMoE: the rotation, centroids not fine-tuned",
    "grouping": "`--method paper`, 4-bit activations, SmolLM2: codebooks of 64 columns, with POG or without",
    "tuning": "`--method paper`, SmolMoE: centroid fine-tuning",
}


def render(cases: Iterable[Any], results: dict[str, dict[str, Any]], docs: Path) -> None:
    """Write quality.md and the plots of those cases that have results."""
    done = [(case, results[case.key]) for case in cases if case.key in results]
    parts = [INTRODUCTION]
    for group, title in TABLES.items():
        rows = [(case, result) for case, result in done if case.group == group]
        if group in ("size", "peer"):
            rows.sort(key=lambda row: row[1]["bpw"])
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
    columns = ["bpw", "tokens", "chunks", "perplexity", "original's", "mean KLD", "same top"]
    routed = any(r["router_top_k_change"] is not None for _, r in rows)
    head = ["", *columns, *(["routing changed"] if routed else [])]
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for case, r in rows:
        cells = [case.name, f"{r['bpw']:.3f}", str(case.tokens), str(case.chunks), f"{r['ppl']:.3f}"]
        cells += [f"{r['base_ppl']:.3f}", f"{r['mean_kld']:.4f}", f"{100 * r['same_top_p']:.2f}%"]
        if routed:
            cells.append("" if r["router_top_k_change"] is None else f"{100 * r['router_top_k_change']:.2f}%")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
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
    default = [(c, r) for c, r in done if (c.group, c.name) == ("stages", "all stages")]
    points["cq, types mixed by sensitivity"][1].extend(default)
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
