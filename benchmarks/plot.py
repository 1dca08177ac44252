"""The picture of the results: every operation at the largest size, and draining from the front at all sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from report import TIMES, Results, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from measure import Case, Suite

COLOURS = {"torch": "#d1495b", "pdrs": "#00798c", "dict": "#8d99ae"}
LABELS = {"torch": "torch.nn.ParameterDict", "pdrs": "pdrs.ParameterDict", "dict": "dict"}
# Of the labels at the ends of the lines: offset in points, alignment.
PLACES = {
    "torch": ((0, 8), "center", "bottom"),
    "dict": ((9, -3), "left", "top"),
    "pdrs": ((4, -24), "right", "top"),
}
DRAIN = "drain from the front"


def draw(results: Results, suite: Suite[Any], path: Path) -> None:
    """Write the picture as a PNG."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        chart, (left, right) = plt.subplots(
            1, 2, figsize=(13.5, 8.4), width_ratios=(1.6, 1), layout="constrained", gridspec_kw={"wspace": 0.05}
        )
        _draw_operations(left, results, suite)
        _draw_drain(right, results, suite)
        machine = results.machine
        chart.suptitle("pdrs.ParameterDict beside torch.nn.ParameterDict", fontsize=14, fontweight="bold")
        chart.supxlabel(
            f"Medians, garbage collector off. {machine['CPU']}, {machine['memory']}; {machine['OS']};"
            f" Python {machine['Python']}, torch {machine['torch']}.  {machine['command']}",
            fontsize=8,
            color="0.35",
        )
        chart.savefig(path, dpi=130)
        plt.close(chart)


def _draw_operations(axes: Axes, results: Results, suite: Suite[Any]) -> None:
    entries = results.sizes[-1]
    rows = _rows(results, suite, entries)
    for at, (_, theirs, ours) in enumerate(rows):
        axes.plot([theirs, ours], [at, at], color="0.82", linewidth=3, zorder=1, solid_capstyle="round")
        faster = theirs >= ours
        axes.annotate(
            f"{figure(theirs / ours)}{TIMES}",
            (1.1, at),
            xycoords=("axes fraction", "data"),
            va="center",
            ha="right",
            color=COLOURS["pdrs"] if faster else "0.45",
            fontweight="bold" if faster else "normal",
        )
    for column, subject in ((1, "torch"), (2, "pdrs")):
        figures = [row[column] for row in rows]
        axes.scatter(figures, range(len(rows)), s=55, color=COLOURS[subject], zorder=2, label=subject)
    axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(_nanoseconds))
    axes.set_xlabel("time per entry or call (log scale)")
    axes.set_title(f"{entries:,} entries", loc="left")
    axes.annotate("torch / pdrs", (1.1, 1), xycoords="axes fraction", ha="right", va="bottom")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.985), ncols=2, frameon=False, handletextpad=0.1)


def _rows(results: Results, suite: Suite[Any], entries: int) -> list[tuple[str, float, float]]:
    rows = []
    for case in suite.cases:
        size = min(entries, case.up_to.get("torch", entries))
        theirs, ours = (results.median(suite, case, subject, size) for subject in ("torch", "pdrs"))
        if theirs is not None and ours is not None and case.unit == "ns":
            title = case.title.replace("`", "")
            rows.append((title if size == entries else f"{title}\n({size:,} entries)", theirs, ours))
    return sorted(rows, key=lambda row: row[2] / row[1])


def _draw_drain(axes: Axes, results: Results, suite: Suite[Any]) -> None:
    case = next(case for case in suite.cases if case.title == DRAIN)
    for subject in suite.subjects:
        points = _by_size(results, suite, case, subject)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[subject], linewidth=2, zorder=3)
        size, cost = points[-1]
        offset, across, along = PLACES[subject]
        axes.annotate(
            f"{LABELS[subject]}\n{_nanoseconds(cost)} a pop",
            (size, cost),
            xytext=offset,
            textcoords="offset points",
            ha=across,
            va=along,
            color=COLOURS[subject],
            fontweight="bold",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2.2, high * 2)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_nanoseconds))
    axes.set_xlabel("entries (log scale)")
    axes.set_ylabel("time per pop (log scale)")
    axes.set_title("drain from the front", loc="left")


def _by_size(results: Results, suite: Suite[Any], case: Case[Any], subject: str) -> list[tuple[int, float]]:
    return sorted(
        (each.entries, each.median)
        for each in results.measurements
        if (each.suite, each.case, each.subject) == (suite.name, case.title, subject)
    )


def _nanoseconds(value: float, _: Any = None) -> str:
    for unit, size in (("ms", 1e6), ("µs", 1e3)):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):g} {unit}"
    return f"{float(f'{value:.3g}'):g} ns"
