"""Averages of a dictionary by its tables: they are of names only while each name has the same row in both.

``torch.optim.swa_utils.AveragedModel`` makes a deep copy of a model, and averages parameter by parameter. It sees
tables and no names. So the row of a removed name is not given to another one while an average has a name there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
from torch.optim.swa_utils import AveragedModel

from pdrs._rows.row_ids import row_of, table_of

if TYPE_CHECKING:
    from pdrs._rows.insert import NamedRows

__all__ = ["averages_with", "note_copy", "refuse_mixing"]

_CODE = AveragedModel.__init__.__code__


def note_copy(original: NamedRows, made: NamedRows) -> None:
    """Note that a dictionary is a deep copy of another, if it is made to be averaged with it."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _CODE:
        frame = frame.f_back
    if frame is None:
        return
    family = original.__dict__.setdefault("_averages", [ref(original)])
    family.append(ref(made))
    made.__dict__.update(_averages=family, _is_average=True)


def averages_with(stacked: NamedRows) -> list[NamedRows]:
    """Return the dictionaries that are averaged with this one: its averages, or, of an average, what it is of."""
    family = stacked.__dict__.get("_averages")
    if family is None:
        return []
    alive = [one for each in family if (one := each()) is not None]
    if len(alive) < 2:
        stacked.__dict__.pop("_averages")
    is_average = "_is_average" in stacked.__dict__
    return [one for one in alive if one is not stacked and ("_is_average" in one.__dict__) != is_average]


def refuse_mixing(stacked: NamedRows, names: list[str], ids: Any, tables: int) -> None:
    """Raise if names would get rows that other names have in an average; ``tables`` is how many there were before."""
    for other in averages_with(stacked):
        if len(stacked._tables) > tables:
            raise RuntimeError(
                "cannot make a new table: the parameters of an average (AveragedModel) would no longer be those of the "
                "model. Make the average anew when all tables are there: reserve(n, shape=...) makes one"
            )
        theirs = other._index.indices(names, missing=-1)
        numbers, rows = table_of(ids), row_of(ids)
        for number in np.unique(numbers):
            if number >= len(other._tables):
                continue
            there = numbers == number
            table = other._tables[number].rows
            taken = (rows[there] < table.used) & ~np.isin(rows[there], table.free())
            mixed = np.flatnonzero(there)[taken & (theirs[there] != ids[there])]
            if len(mixed):
                raise RuntimeError(
                    f"cannot give '{names[mixed[0]]}' the row of a removed name: an average (AveragedModel) has "
                    "another name in this row, and averages row by row. Drop the removed names from the "
                    "dictionary of the average, too, before new names come"
                )
