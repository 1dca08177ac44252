"""Averages of a dictionary by its tables: they are of names only while each name has the same row in both.

``torch.optim.swa_utils.AveragedModel`` makes a deep copy of a model, and averages parameter by parameter. It sees
tables and no names. So the row of a removed name is not given to another one while an average has a name there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from pdrs._core import Places
    from pdrs.stacked import StackedParameterDict

__all__ = ["averages_with", "note_copy", "refuse_mixing"]

_CODE = AveragedModel.__init__.__code__


def note_copy(original: StackedParameterDict, made: StackedParameterDict) -> None:
    """Note that a dictionary is a deep copy of another, if it is made to be averaged with it."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _CODE:
        frame = frame.f_back
    if frame is None:
        return
    family = original.__dict__.setdefault("_averages", [ref(original)])
    family.append(ref(made))
    made.__dict__.update(_averages=family, _is_average=True)


def averages_with(stacked: StackedParameterDict) -> list[StackedParameterDict]:
    """Return the dictionaries that are averaged with this one: its averages, or, of an average, what it is of."""
    family = stacked.__dict__.get("_averages")
    if family is None:
        return []
    alive = [one for each in family if (one := each()) is not None]
    if len(alive) < 2:
        stacked.__dict__.pop("_averages")
    is_average = "_is_average" in stacked.__dict__
    return [one for one in alive if one is not stacked and ("_is_average" in one.__dict__) != is_average]


def refuse_mixing(stacked: StackedParameterDict, names: list[str], places: Places, tables: int) -> None:
    """Raise if names would get rows that other names have in an average; ``tables`` is how many there were before."""
    for other in averages_with(stacked):
        if len(stacked._tables) > tables:
            raise RuntimeError(
                "cannot make a new table: the parameters of an average (AveragedModel) would no longer be those of the "
                "model. Make the average anew when all tables are there: reserve(n, shape=...) makes one"
            )
        theirs = other._index.places(names)
        their_tables, their_rows = theirs.tables, theirs.rows
        for number, there, rows in places.by_table():
            if number >= len(other._tables):
                continue
            is_same = (their_tables[there] == number) & (their_rows[there] == rows)
            mixed = there[other._index.is_taken(number, rows) & ~is_same]
            if len(mixed):
                raise RuntimeError(
                    f"cannot give '{names[mixed[0]]}' the row of a removed name: an average (AveragedModel) has "
                    "another name in this row, and averages row by row. Drop the removed names from the "
                    "dictionary of the average, too, before new names come"
                )
