"""What is to be seen of a StackedParameterDict through its public interface, for tests that compare it.

Rows are read from the packed names, as docs/archive.md describes them, and from the repr. Frozen names are those that
get no gradient.
"""

from __future__ import annotations

import copy
import gc
import re
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs

__all__ = [
    "At",
    "Calls",
    "NoMemory",
    "PackedNames",
    "PackedTable",
    "StateKey",
    "assert_consistent",
    "frozen_names",
    "held_tensors",
    "read_names",
    "rows_in_use",
]

OURS = str(Path(pdrs.__file__).parent)


class PackedTable(NamedTuple):
    """What packed names tell of a table."""

    attribute: str
    group: int
    trainable: bool
    used: int


class PackedNames(NamedTuple):
    """Packed names, taken apart."""

    rows: dict[str, tuple[int, int]]
    """The number of the table and the row of each name."""
    tables: list[PackedTable]
    patterns: list[str]


def read_names(packed: Tensor) -> PackedNames:
    """Read what ``get_extra_state`` returns."""
    data = packed.numpy().tobytes()
    assert data[:8] == b"pdrs\0\0\0\2"
    count, ids_count, table_count, pattern_count, label_bytes, words = struct.unpack_from("<6Q", data, 8)
    assert words == 0
    at = 56
    records = [struct.unpack_from("<4Q", data, at + 32 * number) for number in range(table_count)]
    at += 32 * table_count
    pattern_sizes = struct.unpack_from(f"<{pattern_count}Q", data, at)
    labels = at + 8 * pattern_count
    texts = []
    for size in (*(record[0] for record in records), *pattern_sizes):
        texts.append(data[labels : labels + size].decode("utf-8", "surrogatepass"))
        labels += size
    at += 8 * pattern_count + label_bytes + -label_bytes % 8
    ids = struct.unpack_from(f"<{ids_count}Q", data, at) if ids_count else range(count)
    at += 8 * ids_count
    ends = struct.unpack_from(f"<{count}Q", data, at)
    text = data[at + 8 * count :]
    names = [text[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairwise([0, *ends])]
    assert len(text) == max(ends, default=0)
    tables = [PackedTable(texts[n], group, flag == 1, used) for n, (_, group, flag, used) in enumerate(records)]
    rows = {name: (id_ >> 40, id_ % (1 << 40)) for name, id_ in zip(names, ids, strict=True)}
    return PackedNames(rows, tables, texts[table_count:])


def rows_in_use(sd: pdrs.StackedParameterDict) -> dict[str, int]:
    """Return how many rows of each table are neither free nor spare, as its repr tells."""
    return {
        name: int(count) for name, count in re.findall(r"^(\w+): (\d+) of \d+ rows, ", sd.extra_repr(), re.MULTILINE)
    }


def assert_consistent(sd: pdrs.StackedParameterDict) -> PackedNames:
    """Fail if two names have one row, a free row has a name, or packed names are not up to date."""
    names = read_names(sd.get_extra_state())
    assert list(names.rows) == list(sd)
    assert len(set(names.rows.values())) == len(sd), "two names have one row"
    counts = dict.fromkeys((table.attribute for table in names.tables), 0)
    for name, (number, row) in names.rows.items():
        table = names.tables[number]
        counts[table.attribute] += 1
        assert row < table.used <= len(sd.get_parameter(table.attribute)), name
        assert sd.indices([name]).tolist() == [row], name
    assert rows_in_use(sd) == counts, "a row without a name is not free, or a free one has a name"
    return names


def frozen_names(sd: pdrs.StackedParameterDict) -> set[str]:
    """Return the names that get no gradient. The dictionary stays as it is: its copy has the same masks."""
    other = copy.deepcopy(sd)
    other.zero_grad()
    trained = [name for name, row in other.items() if row.requires_grad and row.numel()]
    if trained:
        torch.stack([other[name].sum() for name in trained]).sum().backward()
    return {name for name, gradient in other.named_grads() if name in set(trained) and not gradient.any()}


def held_tensors(holder: object) -> list[Tensor]:
    """Return the tensors that an object refers to, directly or through others, other than by weak references."""
    seen, left, found = {id(holder): holder}, [holder], []
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            found.append(one)
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, type | ModuleType | FunctionType):
                seen[id(other)] = other
                left.append(other)
    return found


class Calls:
    """Counts the calls that this package makes, of Python and of native functions, in a ``with`` block."""

    count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(OURS):
            self.count += 1


class At:
    """Does something at the event of a number: where this package is called, or has called native code, on this thread.

    Parameters
    ----------
    number
        Which of the events, from 0; none if it is -1.
    act
        What is done then. It is no event itself.
    events
        What counts, in the words of ``sys.setprofile``.
    """

    def __init__(
        self,
        number: int = -1,
        act: Callable[[], object] = lambda: None,
        events: tuple[str, ...] = ("call", "c_return"),
    ) -> None:
        self.number, self.act, self.events = number, act, events
        self.places: list[tuple[str, int]] = []

    def __enter__(self) -> At:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event in self.events and called is not sys.setprofile and frame.f_code.co_filename.startswith(OURS):
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) == self.number + 1:
                self.act()

    def firsts(self) -> list[int]:
        """Return the first event of each place."""
        return sorted(dict(zip(reversed(self.places), reversed(range(len(self.places))), strict=True)).values())

    def chosen(self) -> list[int]:
        """Return the first and the last event of each place."""
        lasts = dict(zip(self.places, range(len(self.places)), strict=True))
        return sorted({*self.firsts(), *lasts.values()})


class StateKey:
    """A key of the state of an optimizer, with which Python code runs in the midst of a change that was planned.

    All have one hash, so that Python asks them whether they are equal when the state is exchanged.
    """

    asked: Callable[[], object] | None = None

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if StateKey.asked is not None:
            StateKey.asked()
        return self is other


class NoMemory(TorchDispatchMode):
    """Lets torch make some new tensors, and then no more.

    Parameters
    ----------
    allowed
        How many operations may make new tensors; ``made`` tells how many have wanted to.
    """

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.allowed, self.made = allowed, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(returned.alias_info is None and "Tensor" in str(returned.type) for returned in func._schema.returns):
            self.made += 1
            if self.made > self.allowed:
                raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))
