"""Timing: what a case is, and how its runs are interleaved, kept apart and checked."""

from __future__ import annotations

import faulthandler
import gc
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from types import FunctionType
from typing import Any, Generic, Literal, TypeVar

from tqdm import tqdm

DataT = TypeVar("DataT")

# A run that takes longer has stalled: the process ends with a traceback, even if it hangs in native code.
STALLED_AFTER_SECONDS = 300
# From this size on a case may have fewer runs than asked for.
LARGE_FROM_ENTRIES = 80_000


@dataclass(frozen=True)
class Target:
    """What is required of the measured container at one size.

    Parameters
    ----------
    kind
        ``"ratio"``: the baseline's cost over ours is at least ``bound``. ``"beyond"``: ours is at most the baseline's
        and ``bound`` more. ``"total"``: ours is at most ``bound``. ``"growth"``: ours, an entry, is at most ``bound``
        times what it is at the smallest size.
    baseline
        The container to compare with; of growth, ours.
    """

    kind: Literal["ratio", "beyond", "total", "growth"]
    baseline: str
    bound: float
    entries: int = 1_000_000

    def met(self, baseline: float, ours: float) -> bool:
        """Whether the medians of both fulfil the requirement."""
        if self.kind == "ratio":
            return baseline / ours >= self.bound
        if self.kind == "growth":
            return ours <= baseline * self.bound
        return ours <= self.bound + (baseline if self.kind == "beyond" else 0)


@dataclass(frozen=True)
class Task:
    """One run, ready to be timed: everything it needs exists, and everything it makes is freed after the clock stops.

    Parameters
    ----------
    run
        What is timed.
    operations
        By how many entries or calls the time is divided.
    holds
        Whether the result of ``run`` is right.
    """

    run: Callable[[], Any]
    operations: int
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Case(Generic[DataT]):
    """A row of the table.

    Parameters
    ----------
    sample
        Takes a container's name and the data, and returns one figure: nanoseconds or bytes, per entry.
    subjects
        The containers to measure, of the suite's; none means all.
    targets
        What is required.
    most_runs
        The most runs at large sizes, for what takes seconds with a million entries.
    once
        Gives the same figure every time (memory).
    slow
        From which size on a container runs only once.
    up_to
        The largest size for a container that would take too long at larger ones.
    extra_sizes
        Sizes to measure besides those asked for, where they are smaller than the largest of these.
    larger_sizes
        Sizes to measure besides those asked for, where the largest of these is a tenth of them or more.
    only_sizes
        Sizes to measure instead of those asked for, of a case with data of its own.
    beside_smallest
        Measures the smallest size again in turns with each larger one: between sizes lie minutes, in which a shared
        machine changes its pace.
    needs
        Whether this machine has what the case needs.
    note
        A remark below the table.
    """

    title: str
    sample: Callable[[str, DataT], float]
    subjects: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    most_runs: int = 5
    once: bool = False
    unit: Literal["ns", "B"] = "ns"
    slow: Mapping[str, int] = field(default_factory=dict)
    up_to: Mapping[str, int] = field(default_factory=dict)
    extra_sizes: tuple[int, ...] = ()
    larger_sizes: tuple[int, ...] = ()
    only_sizes: tuple[int, ...] = ()
    beside_smallest: bool = False
    needs: Callable[[], bool] = lambda: True
    note: str = ""

    def repeats(self, entries: int, wanted: int, subject: str) -> int:
        """Return how often to run a container at this size."""
        if self.once or entries >= self.slow.get(subject, entries + 1):
            return 1
        return min(wanted, self.most_runs) if entries >= LARGE_FROM_ENTRIES else wanted

    def largest(self, entries: int, subject: str) -> int:
        """Return the largest size, up to ``entries`` if it is not the case's own, that is measured of a container."""
        return self.only_sizes[-1] if self.only_sizes else min(entries, self.up_to.get(subject, entries))

    def is_planned(self, entries: int, sizes: Sequence[int]) -> bool:
        """Whether to measure at a size, of those asked for or not."""
        planned = self.only_sizes or (*sizes, *self.extra_sizes, *self.larger_sizes)
        return entries in planned and self.needs()


@dataclass(frozen=True)
class Claim:
    """A row of the README's table: what a case costs at the largest size, in all.

    Parameters
    ----------
    title
        The title of the case.
    words
        What the README calls it.
    together
        The container that keeps everything in one tensor, or one file, if there is one.
    apart
        The container that keeps a tensor for each name, if it was measured.
    names
        How many names the case is about; none means all.
    """

    title: str
    words: str
    together: str = ""
    apart: str = ""
    names: int | None = None


@dataclass(frozen=True)
class Suite(Generic[DataT]):
    """A table: containers side by side, the last of ``subjects`` being ours.

    Parameters
    ----------
    marker
        What marks the place of the short table in ``page`` of docs; none for a suite that has no place there.
    turns
        How the containers took turns, in words.
    growth_at_most
        How much the cost an entry may grow from the smallest size on.
    appendix
        Writes what else the full report says, from all results.
    blocks
        What marks other places of ``page``, and what writes the text there, from all results.
    claims
        The rows that the suite has in the table of the README.
    """

    name: str
    title: str
    subjects: tuple[str, ...]
    baselines: tuple[str, ...]
    cases: tuple[Case[DataT], ...]
    make_data: Callable[[int], DataT]
    intro: str
    turns: str = (
        "the containers took turns in one process, with the garbage collector off, and what they made was freed after"
        " the clock had stopped"
    )
    marker: str = ""
    page: str = "performance.md"
    growth_at_most: float = 2
    appendix: Callable[[Any], str] | None = None
    blocks: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()

    @property
    def ours(self) -> str:
        """The container that is compared with the others."""
        return self.subjects[-1]


@dataclass(frozen=True)
class Measurement:
    """The figures of one case, container and size."""

    suite: str
    case: str
    subject: str
    entries: int
    unit: str
    runs: tuple[float, ...]
    # The same at the smallest size, in turns with these; none if it was not measured again.
    smallest_runs: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.runs)

    @property
    def growth(self) -> float | None:
        """How many times what the same cost at the smallest size, if that was measured in turns."""
        return self.median / statistics.median(self.smallest_runs) if self.smallest_runs else None


def timed(make_task: Callable[[str, DataT], Task]) -> Callable[[str, DataT], float]:
    """Make the ``sample`` of a case from a function that prepares a task."""

    def sample(subject: str, data: DataT) -> float:
        return nanoseconds(make_task(subject, data))

    return sample


def nanoseconds(task: Task) -> float:
    """Run a task once and return nanoseconds per operation; a wrong result raises."""
    faulthandler.dump_traceback_later(STALLED_AFTER_SECONDS, exit=True)
    # What ran before may have freed millions of small blocks. The allocator puts some thousands of them in order each
    # time that it is asked for a larger one, and whoever comes next would pay for it.
    del [bytearray(1 << 16) for _ in range(512)][:]
    begin = perf_counter_ns()
    result = task.run()
    elapsed = perf_counter_ns() - begin
    faulthandler.cancel_dump_traceback_later()
    if not task.holds(result):
        raise ValueError("what was timed gave a wrong result")
    return elapsed / task.operations


def own(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Bind arguments to a copy of a Python function with its own code.

    CPython specialises bytecode for the types that it meets, so containers that share a loop would slow down each
    other.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return partial(copy, *arguments)


def measure(
    suite: Suite[DataT], sizes: Sequence[int], repeats: int, pattern: re.Pattern[str]
) -> Iterator[list[Measurement]]:
    """Measure the cases whose title matches, size by size; the containers of a case take turns."""
    cases = [case for case in suite.cases if pattern.search(case.title)]
    plan = {
        entries: planned
        for entries in all_sizes(cases, sizes)
        if (planned := [case for case in cases if case.is_planned(entries, sizes) and _subjects(suite, case, entries)])
    }
    total = sum(
        case.repeats(entries, repeats, subject)
        for entries, planned in plan.items()
        for case in planned
        for subject in _subjects(suite, case, entries)
    )
    smallest: DataT | None = None
    with tqdm(total=total, disable=None, unit="run", leave=False) as bar:
        for entries, planned in plan.items():
            bar.set_description(f"{suite.title}, {entries:,} entries")
            data = suite.make_data(entries)
            for case in planned:
                bar.set_postfix_str(case.title)
                beside = smallest if case.beside_smallest else None
                yield _measure_case(suite, case, entries, data, beside, repeats, bar)
            if entries == min(sizes) and any(case.beside_smallest for case in cases):
                smallest = data
            del data
            gc.collect()


def all_sizes(cases: Sequence[Case[Any]], sizes: Sequence[int]) -> list[int]:
    """Return the sizes asked for and those of cases, ascending."""
    extra = {size for case in cases for size in case.extra_sizes if size < max(sizes)}
    extra |= {size for case in cases for size in case.larger_sizes if size <= 10 * max(sizes)}
    own_sizes = {size for case in cases for size in case.only_sizes}
    return sorted(extra | own_sizes | set(sizes))


def _subjects(suite: Suite[Any], case: Case[Any], entries: int) -> list[str]:
    return [subject for subject in case.subjects or suite.subjects if entries <= case.up_to.get(subject, entries)]


def _measure_case(
    suite: Suite[DataT],
    case: Case[DataT],
    entries: int,
    data: DataT,
    smallest: DataT | None,
    repeats: int,
    bar: tqdm[Any],
) -> list[Measurement]:
    runs: dict[str, list[float]] = {subject: [] for subject in _subjects(suite, case, entries)}
    smallest_runs: dict[str, list[float]] = {subject: [] for subject in runs}
    wanted = {subject: case.repeats(entries, repeats, subject) for subject in runs}
    subjects = deque(runs)
    for _ in range(max(wanted.values())):
        for subject in subjects:
            if len(runs[subject]) < wanted[subject]:
                if smallest is not None:
                    # Twice: the first fills the cache, as the runs at one size do for each other.
                    again = [_sample(case, subject, entries, smallest) for _ in range(2)]
                    smallest_runs[subject].append(again[-1])
                runs[subject].append(_sample(case, subject, entries, data))
                bar.update()
        # Each comes first once: what runs before it may leave it a warm cache.
        subjects.rotate(-1)
    return [
        Measurement(suite.name, case.title, subject, entries, case.unit, tuple(figures), tuple(smallest_runs[subject]))
        for subject, figures in runs.items()
    ]


def _sample(case: Case[DataT], subject: str, entries: int, data: DataT) -> float:
    try:
        # More digits than are real make the stored results long.
        return float(f"{case.sample(subject, data):.5g}")
    except Exception as error:
        raise RuntimeError(f"{case.title} failed for {subject}, measuring {entries:,} entries") from error
