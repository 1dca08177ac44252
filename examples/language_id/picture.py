"""The picture of what the names are worth: accuracy against how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

PRUNED, OTHERS, QUIET = "#00798c", ("#d1495b", "#b36b00"), "0.45"


@dataclass(frozen=True)
class Point:
    """A model's accuracy on held-out words, and how many names it has."""

    names: int
    accuracy: float
    label: str = ""


def draw(curve: list[Point], others: list[Point], majority: float, title: str, path: Path) -> None:
    """Write a PNG.

    Parameters
    ----------
    curve
        One model as it is pruned. Points with a label have it written beside them.
    others
        Other models, with labels.
    majority
        The accuracy of guessing the most frequent language.
    """
    chart = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasAgg(chart)
    axes = chart.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.axhline(majority, color=QUIET, linestyle=":", zorder=1)
    axes.annotate(
        f"majority guess {majority:.1%}",
        (0.995, majority),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=QUIET,
    )
    names, accuracies = [point.names for point in curve], [point.accuracy for point in curve]
    axes.plot(names, accuracies, "o-", color=PRUNED, linewidth=2, markersize=5, zorder=3)
    for point in curve:
        if point.label:
            axes.plot([point.names], [point.accuracy], "o", color=PRUNED, markersize=9, zorder=4)
            axes.annotate(
                f"{point.label}\n{point.names:,} names, {point.accuracy:.1%}",
                (point.names, point.accuracy),
                xytext=(-4, 9),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=PRUNED,
                fontweight="bold",
            )
    for point, colour in zip(others, OTHERS, strict=False):
        label = f"{point.label}: {point.names:,} names, {point.accuracy:.1%}"
        axes.plot([point.names], [point.accuracy], "D", color=colour, markersize=9, linewidth=0, zorder=5, label=label)
    axes.legend(loc="center right", frameon=False)
    axes.set_xscale("log")
    axes.set_ylim(0, max(accuracies + [point.accuracy for point in others]) * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("named n-grams (log scale)")
    axes.set_ylabel("accuracy on held-out words")
    axes.set_title(title, loc="left", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=130)
