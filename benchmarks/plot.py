"""The pictures of the results: every operation at the largest size, and one of them at all sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

import cases_transfer
from cases_checkpoint import LOADED, SAVED
from cases_stacked import GATHERED, INSERTED, POPPED
from cases_training import EVERY_SIZE
from report import TIMES, Results, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from measure import Suite

COLOURS = {
    "torch": "#d1495b",
    "by hand": "#d1495b",
    "dense": "#edae49",
    "safetensors": "#edae49",
    "pdrs": "#00798c",
    "dict": "#8d99ae",
    "tensordict": "#8d99ae",
    "cp": "#8d99ae",
}


@dataclass(frozen=True)
class Line:
    """One container's cost of one case at all sizes.

    Parameters
    ----------
    label
        What stands at its last point, above the cost there.
    offset, across, along
        Of the label from that point: points, and horizontal and vertical alignment.
    """

    case: str
    subject: str
    label: str
    offset: tuple[int, int]
    across: str
    along: str
    style: str = "o-"


@dataclass(frozen=True)
class Picture:
    """What differs between the pictures of suites.

    Parameters
    ----------
    lines_title
        The operation at all sizes.
    per
        What its cost is counted for: ``"pop"``; none to show that of all entries together.
    room
        By what factor the axis of entries goes on behind the last point, for a label there.
    beside
        The containers that stand beside ours in each operation; the ratio is that of the first.
    """

    title: str
    lines_title: str
    per: str
    lines: tuple[Line, ...]
    room: float = 1
    beside: tuple[str, ...] = ("torch",)


DRAIN = "drain from the front"
PICTURES = {
    "parameter_dict": Picture(
        "pdrs.ParameterDict beside torch.nn.ParameterDict",
        DRAIN,
        "pop",
        (
            Line(DRAIN, "dict", "dict", (9, -3), "left", "top"),
            Line(DRAIN, "torch", "torch.nn.ParameterDict", (0, 8), "center", "bottom"),
            Line(DRAIN, "pdrs", "pdrs.ParameterDict", (4, -24), "right", "top"),
        ),
    ),
    "stacked": Picture(
        "pdrs.StackedParameterDict beside torch.nn.ParameterDict",
        "as the names grow",
        "name",
        (
            Line(POPPED, "pdrs", "pop", (0, 8), "right", "bottom"),
            Line(INSERTED, "pdrs", "insert in batches", (0, 8), "right", "bottom", "s-"),
            Line(GATHERED, "pdrs", "gather in batches", (0, -8), "right", "top", "o--"),
        ),
    ),
    "training": Picture(
        "Training steps of pdrs beside a dict, an embedding and torch's optimizers",
        "a whole step with Adam",
        "name",
        (
            Line(EVERY_SIZE, "by hand", "by hand", (0, 8), "right", "bottom"),
            Line(EVERY_SIZE, "pdrs", "pdrs", (0, 8), "right", "bottom"),
        ),
        beside=("by hand", "dense"),
    ),
    "transfer": Picture(
        "Moves by pdrs beside moves by torch",
        ".to(torch.float64), in all",
        "",
        (
            Line(cases_transfer.LOOSE, "tensordict", "tensordict", (-8, 6), "right", "bottom"),
            Line(cases_transfer.LOOSE, "torch", "torch", (4, 8), "right", "bottom"),
            Line(cases_transfer.LOOSE, "pdrs", "pdrs", (4, 7), "right", "bottom"),
            Line(cases_transfer.IN_A_SLAB, "pdrs", "in a slab", (2, -8), "left", "top", "o--"),
        ),
        room=2.4,
    ),
    "checkpoint": Picture(
        "Checkpoints of pdrs beside those of torch and safetensors",
        "all entries together",
        "",
        (
            Line(SAVED, "torch", "torch.save", (8, 6), "left", "center"),
            Line(LOADED, "torch", "torch.load", (8, 2), "left", "center", "o--"),
            Line(SAVED, "safetensors", "save_file", (8, 0), "left", "center"),
            Line(LOADED, "safetensors", "load_file", (8, -24), "left", "center", "o--"),
            Line(SAVED, "cp", "cp", (8, -6), "left", "center"),
            Line(SAVED, "pdrs", "pdrs.save", (4, -10), "right", "top"),
            Line(LOADED, "pdrs", "pdrs.open, all read", (4, -10), "right", "top", "o--"),
        ),
        room=4,
        beside=("safetensors", "torch"),
    ),
}


def draw(results: Results, suite: Suite[Any], path: Path) -> None:
    """Write the picture as a PNG."""
    picture = PICTURES[suite.name]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        chart, (left, right) = plt.subplots(
            1, 2, figsize=(13.5, 8.4), width_ratios=(1.6, 1), layout="constrained", gridspec_kw={"wspace": 0.05}
        )
        _draw_operations(left, results, suite, picture)
        _draw_lines(right, results, suite, picture)
        machine = results.machine
        chart.suptitle(picture.title, fontsize=14, fontweight="bold")
        chart.supxlabel(
            f"Medians, garbage collector off. {machine['CPU']}, {machine['memory']}; {machine['OS']};"
            f" Python {machine['Python']}, torch {machine['torch']}.  {machine['command']}",
            fontsize=8,
            color="0.35",
        )
        chart.savefig(path, dpi=130)
        plt.close(chart)


def _draw_operations(axes: Axes, results: Results, suite: Suite[Any], picture: Picture) -> None:
    entries, first = results.sizes[-1], picture.beside[0]
    rows = _rows(results, suite, entries, picture.beside)
    if not rows:
        axes.set_axis_off()
        return
    for at, (_, medians) in enumerate(rows):
        theirs, ours = medians[first], medians[suite.ours]
        ends = [min(medians.values()), max(medians.values())]
        axes.plot(ends, [at, at], color="0.82", linewidth=3, zorder=1, solid_capstyle="round")
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
    for subject in (*picture.beside, suite.ours):
        points = [(medians[subject], at) for at, (_, medians) in enumerate(rows) if subject in medians]
        if points:
            figures, heights = zip(*points, strict=True)
            axes.scatter(figures, heights, s=55, color=COLOURS[subject], zorder=2, label=subject)
    axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(_nanoseconds))
    axes.set_xlabel("time per entry or call (log scale)")
    axes.set_title(f"{entries:,} entries", loc="left")
    axes.annotate(f"{first} / {suite.ours}", (1.1, 1), xycoords="axes fraction", ha="right", va="bottom")
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.58, 0.985),
        ncols=1 + len(picture.beside),
        frameon=False,
        handletextpad=0.1,
    )


def _rows(
    results: Results, suite: Suite[Any], entries: int, beside: tuple[str, ...]
) -> list[tuple[str, dict[str, float]]]:
    """Return the title and the medians of each operation that was measured of the first container beside ours."""
    rows = []
    for case in suite.cases:
        size = case.largest(entries, beside[0])
        found = {each: results.median(suite, case, each, size) for each in (*beside, suite.ours)}
        medians = {each: median for each, median in found.items() if median is not None}
        if beside[0] in medians and suite.ours in medians and case.unit == "ns":
            title = case.title.replace("`", "")
            rows.append((title if size == entries else f"{title}\n({size:,} entries)", medians))
    return sorted(rows, key=lambda row: row[1][suite.ours] / row[1][beside[0]])


def _draw_lines(axes: Axes, results: Results, suite: Suite[Any], picture: Picture) -> None:
    for line in picture.lines:
        points = _by_size(results, suite, line)
        if not points:
            continue
        if not picture.per:
            points = [(entries, entries * cost) for entries, cost in points]
        colour = COLOURS[line.subject]
        axes.plot(*zip(*points, strict=True), line.style, color=colour, linewidth=2, zorder=3)
        last = points[-1]
        axes.annotate(
            f"{line.label}\n{_nanoseconds(last[1])}{picture.per and f' a {picture.per}'}",
            last,
            xytext=line.offset,
            textcoords="offset points",
            ha=line.across,
            va=line.along,
            color=colour,
            fontweight="bold",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2.2, high * 2)
    axes.set_xlim(right=axes.get_xlim()[1] * picture.room)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(_nanoseconds))
    axes.set_xlabel("entries (log scale)")
    axes.set_ylabel(f"time{picture.per and f' per {picture.per}'} (log scale)")
    axes.set_title(picture.lines_title, loc="left")


def _by_size(results: Results, suite: Suite[Any], line: Line) -> list[tuple[int, float]]:
    return sorted(
        (each.entries, each.median)
        for each in results.measurements
        if (each.suite, each.case, each.subject) == (suite.name, line.case, line.subject)
    )


def _nanoseconds(value: float, _: Any = None) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if value >= size:
            return f"{float(f'{value / size:.3g}'):g} {unit}"
    return f"{float(f'{value:.3g}'):g} ns"
