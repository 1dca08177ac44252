"""Views of a StackedParameterDict: its rows, and its names and rows, in order."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from pdrs._rows.table import kind_of, parameter_of
from pdrs._torch.modes import refuse_symbolic_trace

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["ItemsView", "RowsView", "described"]

# A repr longer than this shows its two ends only.
_REPR_WHOLE = 20
_REPR_END = 5


class RowsView(abc.ValuesView[Tensor]):
    """The rows of a StackedParameterDict, in order."""

    _mapping: StackedParameterDict

    def __init__(self, mapping: StackedParameterDict) -> None:
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self._mapping)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"

    def __contains__(self, value: object) -> bool:
        return any(_is_same_row(value, row) for row in self)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator lets go of the dictionary at its end, and `map` does not.
        return (row for _, row in _items(self._mapping, False))

    def __reversed__(self) -> Iterator[Tensor]:
        return (row for _, row in _items(self._mapping, True))


class ItemsView(abc.ItemsView[str, Tensor]):
    """The names and rows of a StackedParameterDict, in order."""

    _mapping: StackedParameterDict

    def __init__(self, mapping: StackedParameterDict) -> None:
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self._mapping)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2) or item[0] not in self._mapping:
            return False
        return _is_same_row(item[1], self._mapping[item[0]])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return _items(self._mapping, False)

    def __reversed__(self) -> Iterator[tuple[str, Tensor]]:
        return _items(self._mapping, True)


def _items(sd: StackedParameterDict, backwards: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield names and rows; what another thread moves between the look-up of a row and the row is looked up again."""
    state = sd.__dict__
    with sd._lock:  # not in the middle of a change
        refuse_symbolic_trace()
        index = state["_index"]
        version = index.moves
    for name, number, row in index.entries(reverse=backwards):
        try:
            found = parameter_of(sd, state["_tables"][number])[row]
        except IndexError:
            if state["_index"].moves == version:
                raise
        if state["_index"].moves != version:
            version = state["_index"].moves
            if state["_index"] is not index or name not in index:
                raise RuntimeError("the dictionary was changed during iteration")
            found = sd[name]
        yield name, found


def _is_same_row(value: object, row: Tensor) -> bool:
    # Each look at an entry makes a new view, so identity is that of the memory.
    if not isinstance(value, Tensor) or value.shape != row.shape or value.dtype != row.dtype:
        return False
    return value.device == row.device and value.data_ptr() == row.data_ptr() and value.numel() > 0


def described(sd: StackedParameterDict) -> str:
    """Return what ``repr`` shows: a line a table, and the names, or, of many, the first and the last."""
    with sd._lock:
        lines = [
            f"{table.attribute}: {sd._index.count(number)} of {len(parameter_of(sd, table))} rows, {kind_of(sd, table)}"
            for number, table in enumerate(sd._tables)
        ]
        hidden = len(sd) - 2 * _REPR_END
        names = list(islice(sd._index, _REPR_END if len(sd) > _REPR_WHOLE else None))
        if len(sd) > _REPR_WHOLE:
            last = list(islice(reversed(sd._index), _REPR_END))[::-1]
            lines.append(f"{len(sd)} names: {', '.join(map(repr, names))}, ... {hidden} more ...,")
            return "\n".join([*lines, f"  {', '.join(map(repr, last))}"])
        return "\n".join([*lines, f"{len(sd)} names: {', '.join(map(repr, names))}".rstrip(": ")])
