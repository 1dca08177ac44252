"""A table that is sharded over processes by name, beside ids by hand and beside a replicated table in DDP."""

from __future__ import annotations

import sys
from collections import Counter
from statistics import median
from typing import Any

import sharded_steps as sharded
from measure import Case, Suite, Target
from report import Results, figure, table
from sharded_steps import BATCH, BF16, BY_HAND, DDP, DENSE, FLOATS, NAMES, PLANNED, TEXT

OTHER, PDRS = "the other", "pdrs"
WORLDS = (2, 4)
# Larger tables take DDP seconds a step.
LARGEST = 100_000
AT = 100_000
# DDP sends so many times what names send, at that size.
DDP_OVER_NAMES = 65
MEMORY_OF = 10


class Data:
    """What launches of processes have measured. A launch gives several rounds of all ways, which cases take in turn."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._rounds: dict[tuple[int, str], dict[str, list[float]]] = {}
        self._taken: Counter[tuple[int, str, str]] = Counter()
        self._sent: dict[int, dict[str, list[float]]] = {}
        self._grown: dict[int, dict[str, float]] = {}

    def nanoseconds(self, world: int, measure: str, title: str, what: str) -> float:
        """Return what a step took in the next round of a measure that this case has not had."""
        number = self._taken[world, title, what]
        self._taken[world, title, what] += 1
        found = self._rounds.setdefault((world, measure), {})
        if number >= len(found.get(what, ())):
            for each, figures in sharded.launched(world, measure, self.entries).items():
                found.setdefault(each, []).extend(figures)
        return found[what][number]

    def bytes_of(self, world: int, what: str, place: int) -> float:
        """Return what a way sends in a step."""
        if world not in self._sent:
            self._sent[world] = sharded.launched(world, "sent", self.entries, apart=sharded.can_be_apart())
        return self._sent[world][what][place]

    def grown(self, world: int) -> dict[str, float]:
        """Return how far the memory of a rank grows."""
        if world not in self._grown:
            self._grown[world] = sharded.launched(world, "grown", MEMORY_OF * self.entries)
        return self._grown[world]


def _step(
    title: str,
    world: int,
    ours: str,
    other: str = "",
    subjects: tuple[str, ...] = (BY_HAND, PDRS),
    kind: str = "",
    **options: Any,
) -> Case[Data]:
    title = f"{title}, {world} process{'es' if world > 1 else ''}"
    ways = {PDRS: ours, OTHER: other}
    measure = "checks" if other in (sharded.NAMES_UNCHECKED, sharded.PLANNED_UNCHECKED) else "times"

    def sample(subject: str, data: Data) -> float:
        return data.nanoseconds(world, measure, title, ways.get(subject, subject) + kind)

    return Case(title, sample, subjects, most_runs=15, up_to=dict.fromkeys(subjects, LARGEST), **options)


def _bytes(title: str, world: int, ways: dict[str, tuple[str, int]], **options: Any) -> Case[Data]:
    def sample(subject: str, data: Data) -> float:
        return data.bytes_of(world, *ways[subject])

    subjects = tuple(ways)
    return Case(
        f"{title}, {world} processes", sample, subjects, once=True, unit="B", up_to=dict.fromkeys(subjects, LARGEST),
        **options,
    )  # fmt: skip


def _memory(subject: str, data: Data, world: int) -> float:
    found = data.grown(world)
    if subject == PDRS:
        return found["rank"] / (MEMORY_OF * data.entries)
    return (data.grown(1)["rank"] / world + found["cache"]) / (MEMORY_OF * data.entries)


def _target(baseline: str, bound: float) -> Target:
    return Target("ratio", baseline, bound, AT)


COUNTED, ON_LOOPBACK, FORMULA = 0, 1, 2


def _cases_of(world: int) -> list[Case[Data]]:
    return [
        _step(
            "step, names known",
            world,
            NAMES,
            subjects=(DDP, DENSE, BY_HAND, PDRS),
            targets=(_target(BY_HAND, 1 / 1.15),),
            note="In all, not per name, here and below. Look-up, exchange, backward, `step()`, `zero_grad()`."
            if world == WORLDS[0]
            else "",
        ),
        _step("step, planned before", world, PLANNED, targets=(_target(BY_HAND, 1 / 0.75),)),
        _step("step, bf16 on the wire", world, BF16, targets=(_target(BY_HAND, 1 / 1.15),)),
        _step(
            "step, all names sent as text, beside names known",
            world,
            TEXT,
            NAMES,
            subjects=(BY_HAND, OTHER, PDRS),
            targets=(_target(OTHER, 1 / 2),),
            note="`known_names=0`: as if no rank had asked for any of its names before." if world == WORLDS[0] else "",
        ),
        _step(
            "step, planned before, beside no checks",
            world,
            PLANNED,
            sharded.PLANNED_UNCHECKED,
            subjects=(OTHER, PDRS),
            targets=(_target(OTHER, 1 / 1.05),),
            note="The benchmark puts a plain all-to-all in place of the meetings of `gather(plan)` and of the backward"
            " pass, where all ranks know how many rows there are. Here and below, ways take turns step by step, and"
            f" each figure is a median of {sharded.STEPS_OF_CHECKS} steps; of CPU time, the mean."
            if world == WORLDS[0]
            else "",
        ),
        _step(
            "step, names known, beside no checks in the backward pass",
            world,
            NAMES,
            sharded.NAMES_UNCHECKED,
            subjects=(OTHER, PDRS),
            targets=(_target(OTHER, 1 / 1.05),),
        ),
        _step(
            "CPU time of a step, names known",
            world,
            NAMES,
            subjects=(DDP, BY_HAND, PDRS),
            kind=sharded.CPU,
            targets=(_target(BY_HAND, 1 / 1.15),),
            note="Of all threads of all processes together, here and below. Other programs on the machine hardly change"
            " it."
            if world == WORLDS[0]
            else "",
        ),
        _step(
            "CPU time of a step, planned before",
            world,
            PLANNED,
            kind=sharded.CPU,
            targets=(_target(BY_HAND, 1 / 0.75),),
        ),
        _step(
            "CPU time of a step, planned before, beside no checks",
            world,
            PLANNED,
            sharded.PLANNED_UNCHECKED,
            subjects=(OTHER, PDRS),
            kind=sharded.CPU,
            targets=(_target(OTHER, 1 / 1.05),),
        ),
        _step(
            "CPU time of a step, names known, beside no checks in the backward pass",
            world,
            NAMES,
            sharded.NAMES_UNCHECKED,
            subjects=(OTHER, PDRS),
            kind=sharded.CPU,
            targets=(_target(OTHER, 1 / 1.05),),
        ),
        _bytes(
            "bytes of a step, names known",
            world,
            {DDP: (DDP, COUNTED), BY_HAND: (BY_HAND, COUNTED), PDRS: (NAMES, COUNTED)},
            targets=(_target(BY_HAND, 1), _target(DDP, DDP_OVER_NAMES)),
            note="Of all processes together, here and below. DDP: `2 (W - 1)` times the table, as its all-reduce sends."
            if world == WORLDS[0]
            else "",
        ),
        _bytes(
            "bytes of a step, planned before",
            world,
            {BY_HAND: (BY_HAND, COUNTED), PDRS: (PLANNED, COUNTED)},
            targets=(_target(BY_HAND, 1 / 0.95),),
        ),
        _bytes(
            "bytes of a step, bf16 on the wire",
            world,
            {BY_HAND: (BY_HAND, COUNTED), PDRS: (BF16, COUNTED)},
            targets=(_target(BY_HAND, 1 / 0.55),),
        ),
        _bytes(
            "bytes of a step, all names sent as text",
            world,
            {BY_HAND: (BY_HAND, COUNTED), PDRS: (TEXT, COUNTED)},
        ),
        _bytes(
            "bytes of a step, names known, beside the formula",
            world,
            {OTHER: (NAMES, FORMULA), PDRS: (NAMES, COUNTED)},
            targets=(_target(OTHER, 1 / 1.01),),
        ),
        _bytes(
            "bytes of a step on the loopback interface, names known",
            world,
            {DDP: (DDP, ON_LOOPBACK), BY_HAND: (BY_HAND, ON_LOOPBACK), PDRS: (NAMES, ON_LOOPBACK)},
            needs=sharded.can_be_apart,
            note="With headers of TCP and of gloo, in a network namespace of their own." if world == WORLDS[0] else "",
        ),
        _bytes(
            "bytes of a step on the loopback interface, planned before",
            world,
            {BY_HAND: (BY_HAND, ON_LOOPBACK), PDRS: (PLANNED, ON_LOOPBACK)},
            needs=sharded.can_be_apart,
        ),
        Case(
            f"memory of a rank, beside its share, {world} processes",
            lambda subject, data: _memory(subject, data, world),
            (OTHER, PDRS),
            (_target(OTHER, 1 / 1.15),),
            once=True,
            unit="B",
            up_to=dict.fromkeys((OTHER, PDRS), LARGEST),
            needs=lambda: sys.platform == "linux",
            note=f"Peak growth of the resident memory with {MEMORY_OF} times as many names, and Adam by row; per"
            " name. The share is what one process takes, divided by the processes, and the cache of rows."
            if world == WORLDS[0]
            else "",
        ),
    ]


# -- what is written below the tables ----------------------------------------------------------------------------------


def ratios_by_round(results: Results) -> str:
    """Write the ratios to what is done by hand in the same round: medians, the least and the most."""
    rows = []
    of = {(each.case, each.subject): each.runs for each in results.measurements if each.entries == results.sizes[-1]}
    for case in CASES:
        if case.unit != "ns":
            continue
        ours = of.get((case.title, PDRS))
        for baseline in (DDP, BY_HAND, OTHER):
            theirs = of.get((case.title, baseline))
            if ours and theirs:
                shares = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
                rows.append([case.title, baseline, *map(figure, (median(shares), shares[0], shares[-1]))])
    if not rows:
        return ""
    return "## Ratios of one round\n\n" + table(["", "beside", "pdrs / it", "least", "most"], rows)


def projections() -> str:
    """Write what a step of one rank sends with more ranks, and how long that takes at least."""
    links = sharded.Links()
    head = [
        "",
        "ranks",
        "sent within a node",
        "sent to others",
        "headers",
        "at the speed of links",
        "messages to others",
        "fullest owner / mean",
    ]
    rows = []
    for title, distinct, row_bytes in PROJECTED:
        for world in PROJECTED_WORLDS:
            found = sharded.projected(world, distinct, row_bytes, links)
            rows.append(
                [
                    title,
                    f"{world:,}",
                    *(f"{figure(each / 1e6)} MB" for each in (found.within, found.between, found.headers)),
                    *(f"{figure(each * 1e6)} µs" for each in (found.seconds, found.seconds_of_messages)),
                    figure(sharded.fullest(world, distinct)),
                ]
            )
    return (
        f"Computed, not measured, for one rank and one step. Nodes have {links.ranks_of_a_node} ranks. A rank has"
        f" {links.within / 1e9:g} GB/s within a node, and {links.between * 8 / 1e9:g} Gb/s of network. A message to"
        f" another node takes {links.message * 1e6:g} µs, and each rank gets three in a step.\n\n" + table(head, rows)
    )


def costs() -> str:
    """Write what the cache of rows takes."""
    return f"The cache of rows takes {figure(sharded.cache_bytes_per_name())} bytes for a name of 14 characters."


PROJECTED_WORLDS = (8, 64, 1_024)
# The distinct names of a batch of a rank, and the bytes of a row on the wire.
PROJECTED = (
    ("1,000 names, 16 float32", 1_000, 64),
    ("100,000 names, 128 bfloat16", 100_000, 256),
)

ALONE = (
    _step("step, names known", 1, NAMES, targets=(_target(BY_HAND, 1),)),
    _step("step, planned before", 1, PLANNED, targets=(_target(BY_HAND, 1),)),
)
CASES: tuple[Case[Data], ...] = (*(case for world in WORLDS for case in _cases_of(world)), *ALONE)


def _appendix(results: Results) -> str:
    parts = (ratios_by_round(results), f"## More ranks\n\n{projections()}", f"## The cache of rows\n\n{costs()}")
    return "\n\n".join(part for part in parts if part)


SUITE = Suite(
    name="distributed",
    title="Tables sharded over processes",
    subjects=(DDP, DENSE, BY_HAND, OTHER, PDRS),
    baselines=(DDP, BY_HAND, OTHER),
    cases=CASES,
    make_data=Data,
    intro="`pdrs.distributed.ShardedParameterDict` with gloo on one machine, one thread a process. *By hand* sends"
    " int64 ids, which all ranks know without a table: `torch.unique`, an all-to-all of counts, of ids and of rows, and"
    " one of gradients, which are sparse, and `torch.optim.SGD`. Nothing is checked there. *DDP* is a"
    f" `StackedParameterDict` on each rank. Rows are {FLOATS} float32. Each rank has a batch of {BATCH:,} names of 14"
    f" characters; how often a name comes is its rank to the power of -{sharded.ZIPF_EXPONENT:g}. *The other* is what a"
    " title names. All ways have trained the same rows at the end, or there are no figures.",
    turns="all ways took turns in the same processes, round by round",
    marker="benchmark-distributed",
    page="distributed.md",
    appendix=_appendix,
    blocks={
        "benchmark-distributed-more": lambda results: projections(),
        "benchmark-distributed-cache": lambda results: costs(),
    },
)
