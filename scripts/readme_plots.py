"""The README's two plots, docs/readme-size.png and docs/readme-speed.png, from the figures in docs/readme-figures.json.

    python scripts/readme_plots.py

Every figure in that file names its machine and the command that measured it. The colours are those of Okabe and Ito,
which readers with any colour vision can tell apart; the markers differ too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {"ours": "#0072B2", "llama.cpp": "#D55E00", "ik_llama.cpp": "#E69F00"}
MARKERS = {"ours": "o", "llama.cpp": "s"}
# Where a point's label goes, in points of print: a falling curve leaves room above it on the right, below on the left.
LABELS = {"ours": ((7, 5), "left"), "llama.cpp": ((-7, -14), "right")}
KLD_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2)
WIDTH, HEIGHT, DPI = 8.0, 3.5, 130  # inches, and pixels per inch
GAP = 0.7  # between the bars of two models, in units of a bar's row


def main() -> None:
    """Draw both."""
    pyplot.rcParams |= {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    figures = json.loads((DOCS / "readme-figures.json").read_text(encoding="utf-8"))
    draw(figures["size"], plot_size, DOCS / "readme-size.png")
    draw(figures["speed"], plot_speed, DOCS / "readme-speed.png")


def draw(panels: list[dict[str, Any]], plot: Any, file: Path) -> None:
    """Panels side by side; plot(axes, panel) fills one."""
    figure, row = pyplot.subplots(1, len(panels), figsize=(WIDTH, HEIGHT), layout="constrained")
    for i, (axes, panel) in enumerate(zip(row, panels, strict=True)):
        plot(axes, panel)
        if i:
            axes.set_ylabel("")
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)


def plot_size(axes: Axes, panel: dict[str, Any]) -> None:
    """Mean KLD (log scale) over the size of the whole file: towards the lower left is better."""
    for engine, marker in MARKERS.items():
        points = sorted((p["megabytes"], p["mean_kld"], p["label"]) for p in panel["points"] if p["engine"] == engine)
        sizes, divergences, labels = zip(*points, strict=True)
        axes.plot(sizes, divergences, marker=marker, color=COLOURS[engine], linewidth=1.2, markersize=7)
        for point in zip(sizes, divergences, labels, strict=True):
            offset, side = LABELS[engine]
            axes.annotate(
                point[2], point[:2], offset, textcoords="offset points", color=COLOURS[engine], weight="bold", ha=side
            )
        if engine != "ours":
            axes.annotate(engine, (sizes[0], divergences[0]), (9, 2), textcoords="offset points", color=COLOURS[engine])
    axes.margins(x=0.46)
    axes.set(yscale="log", ylim=(0.01, 0.25), title=panel["model"], xlabel="whole file, MB", ylabel="mean KLD, nats")
    axes.yaxis.set_major_locator(FixedLocator(KLD_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([f"{tick:g}" for tick in KLD_TICKS])
    axes.grid(alpha=0.3)


def plot_speed(axes: Axes, panel: dict[str, Any]) -> None:
    """A bar per engine, in one group per model."""
    position, model = 0.0, ""
    for bar in panel["bars"]:
        if bar["model"] != model:
            position -= GAP if not model else 2 * GAP
            model = bar["model"]
            axes.text(0, position + GAP, model, weight="bold", verticalalignment="center")
        axes.barh(position, bar["rate"], height=0.8, color=COLOURS[bar["engine"]])
        axes.text(bar["rate"], position, f" {bar['rate']:g}", verticalalignment="center")
        axes.text(0, position, f"{bar['engine']} ", verticalalignment="center", horizontalalignment="right")
        position -= 1
    axes.set(title=panel["test"], xlabel="tokens per second")
    axes.margins(x=0.14)
    axes.set_ylim(position + 0.4, 0.7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


if __name__ == "__main__":
    main()
