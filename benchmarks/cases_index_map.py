"""``pdrs.IndexMap`` beside ``dict`` and ``collections.OrderedDict``."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from itertools import repeat
from typing import Any

import torch

import pdrs
from loops import (
    contains_each,
    get_each,
    move_each,
    pop_each,
    popitem_first,
    popitem_last,
    set_each,
    sweep,
)
from measure import Case, Suite, Target, Task, own, timed
from memory import bytes_per_entry, names_of

HOT_CALLS = 200_000
BATCH = 4096
BATCHES = 16
# A single operation may take 1.3 times as long as a dict's, but no longer than an OrderedDict's.
SINGLE = (Target("ratio", "dict", 0.77), Target("ratio", "OrderedDict", 1))
ORDERED = ("OrderedDict", "IndexMap")

CONTAINERS: dict[str, Callable[..., Any]] = {"dict": dict, "OrderedDict": OrderedDict, "IndexMap": pdrs.IndexMap}


class Data:
    """Names of one size, which all containers share."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.names = names_of(entries)
        order = random.Random(0)
        self.shuffled = order.sample(self.names, entries)
        self.batches = [order.choices(self.names, k=BATCH) for _ in range(BATCHES)]
        self._built: dict[tuple[str, bool], Any] = {}

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row that belongs to each name."""
        return {name: row for row, name in enumerate(self.names)}

    def new(self, subject: str) -> Any:
        """Build a container to change."""
        return build(subject, self.names)

    def shared(self, subject: str, scattered: bool = False) -> Any:
        """Return a container to read; the order of its names is that in which they lie in memory, or is not."""
        if (subject, scattered) not in self._built:
            self._built[subject, scattered] = build(subject, self.shuffled if scattered else self.names)
        return self._built[subject, scattered]

    def is_whole(self, container: Any) -> bool:
        """Whether a container has all names in order, and their rows."""
        return list(container.items()) == list(self.row_of.items())

    def task(self, run: Callable[[], Any], holds: Callable[[Any], bool], operations: int | None = None) -> Task:
        """Make a task of one operation a name, unless told otherwise."""
        return Task(run, self.entries if operations is None else operations, holds)


def build(subject: str, names: list[str]) -> Any:
    """Give row 0 to the first name, 1 to the next, and so on."""
    if subject == "IndexMap":
        return pdrs.IndexMap.from_names(names)
    return CONTAINERS[subject](zip(names, range(len(names)), strict=False))


def look_up(container: Any, batches: list[list[str]]) -> torch.Tensor:
    """Turn names into rows, a call a batch."""
    ids = torch.empty(0)
    for names in batches:
        ids = torch.from_numpy(container.indices(names))
    return ids


def look_up_one_by_one(container: Any, batches: list[list[str]]) -> torch.Tensor:
    """Turn names into rows with a mapping that has no such call."""
    ids = torch.empty(0)
    for names in batches:
        ids = torch.tensor([container[name] for name in names])
    return ids


def _build(subject: str, data: Data) -> Task:
    names = data.names
    return data.task(lambda: build(subject, names), data.is_whole)


def _set_each(subject: str, data: Data) -> Task:
    return data.task(own(set_each, CONTAINERS[subject](), data.names, range(data.entries)), data.is_whole)


def _get_hot(subject: str, data: Data) -> Task:
    row = data.entries // 2
    run = own(get_each, data.shared(subject), repeat(data.names[row], HOT_CALLS))
    return data.task(run, lambda got: got == row, HOT_CALLS)


def _get_random(subject: str, data: Data) -> Task:
    last = data.row_of[data.shuffled[-1]]
    return data.task(own(get_each, data.shared(subject), data.shuffled), lambda got: got == last)


def _get_fresh(subject: str, data: Data) -> Task:
    last = data.row_of[data.shuffled[-1]]
    names = [f"{name}."[:-1] for name in data.shuffled]
    return data.task(own(get_each, data.shared(subject), names), lambda got: got == last)


def _contains_random(subject: str, data: Data) -> Task:
    return data.task(own(contains_each, data.shared(subject), data.shuffled), bool)


def _pop_random(subject: str, data: Data) -> Task:
    return data.task(own(pop_each, data.new(subject), data.shuffled), lambda left: not len(left))


def _popitem_last(subject: str, data: Data) -> Task:
    return data.task(own(popitem_last, data.new(subject), data.entries), lambda left: not len(left))


def _popitem_first(subject: str, data: Data) -> Task:
    return data.task(own(popitem_first, data.new(subject), data.entries), lambda left: not len(left))


def _move_last(subject: str, data: Data) -> Task:
    return data.task(own(move_each, data.new(subject), data.shuffled, True), lambda left: list(left) == data.shuffled)


def _move_first(subject: str, data: Data) -> Task:
    return data.task(
        own(move_each, data.new(subject), data.shuffled, False), lambda left: list(left) == data.shuffled[::-1]
    )


def _look_up(subject: str, data: Data) -> Task:
    loop = look_up if subject == "IndexMap" else look_up_one_by_one
    last = [data.row_of[name] for name in data.batches[-1]]
    return data.task(own(loop, data.shared(subject), data.batches), lambda ids: ids.tolist() == last, BATCH * BATCHES)


def _keys(subject: str, data: Data) -> Task:
    return data.task(own(sweep, data.shared(subject).keys), lambda last: last == data.names[-1])


def _keys_scattered(subject: str, data: Data) -> Task:
    keys = data.shared(subject, scattered=True).keys
    return data.task(own(sweep, keys), lambda last: last == data.shuffled[-1])


def _size(subject: str, data: Data) -> float:
    return sys.getsizeof(data.shared(subject)) / data.entries


def _memory(subject: str, data: Data) -> float:
    return bytes_per_entry(f"index_map/{subject}", data.entries)


CASES: tuple[Case[Data], ...] = (
    Case(
        "bulk build",
        timed(_build),
        targets=(Target("ratio", "dict", 3), Target("ratio", "OrderedDict", 1)),
        note="`IndexMap.from_names(names)`; `dict(zip(names, range(n)))`.",
    ),
    Case("`m[k] = row`, new keys", timed(_set_each), targets=SINGLE, most_runs=3),
    Case("`m[k]`, same key", timed(_get_hot)),
    Case(
        "`m[k]`, random",
        timed(_get_random),
        targets=SINGLE,
        note="All keys in random order; they are the very `str` objects.",
    ),
    Case(
        "`m[k]`, random, new strings",
        timed(_get_fresh),
        note="Equal `str` objects that were never hashed, as from a file.",
    ),
    Case("`k in m`, random", timed(_contains_random), targets=SINGLE),
    Case("`pop(k)`, random", timed(_pop_random), targets=SINGLE, most_runs=3),
    Case("`popitem()`", timed(_popitem_last), targets=SINGLE, most_runs=3),
    Case(
        "`popitem(last=False)`",
        timed(_popitem_first),
        ORDERED,
        SINGLE[1:],
        most_runs=3,
        note="A dict has neither this nor `move_to_end`.",
    ),
    Case("`move_to_end(k)`, random", timed(_move_last), ORDERED, SINGLE[1:], most_runs=3),
    Case("`move_to_end(k, last=False)`, random", timed(_move_first), ORDERED, SINGLE[1:], most_runs=3),
    Case(
        f"{BATCH} random names to row ids",
        timed(_look_up),
        targets=(Target("ratio", "dict", 5), Target("ratio", "OrderedDict", 1)),
        note="Per name. `torch.from_numpy(m.indices(names))`; `torch.tensor([d[name] for name in names])`.",
    ),
    Case("`keys()`", timed(_keys)),
    Case(
        "`keys()`, scattered",
        timed(_keys_scattered),
        note="The names lie in memory in another order than in the container.",
    ),
    Case(
        "size of the map",
        _size,
        targets=(Target("total", "dict", 45),),
        once=True,
        unit="B",
        note="`sys.getsizeof`: of dict and OrderedDict this leaves out the `str` and `int` objects, of which"
        " IndexMap needs none: it has the names' characters inside.",
    ),
    Case(
        "memory with names and rows",
        _memory,
        once=True,
        unit="B",
        note="The C allocator's own count (`mallinfo2`), in a process of its own, of the map and all that only it keeps"
        " alive.",
    ),
)

SUITE = Suite(
    name="index_map",
    title="IndexMap",
    subjects=("dict", "OrderedDict", "IndexMap"),
    baselines=("dict", "OrderedDict"),
    cases=CASES,
    make_data=Data,
    intro="`pdrs.IndexMap` beside `dict` and `collections.OrderedDict`. Names have 14 characters.",
)
