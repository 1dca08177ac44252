"""Views of an IndexMap and of a ParameterDict: what ``collections.abc`` offers, iterated in Rust."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pdrs._core import EntryIterator, EntryKeys, IndexMap
from pdrs._torch.own_functions import ITEMS, VALUES, is_own

if TYPE_CHECKING:
    from pdrs.parameter_dict import ParameterDict

abc.MutableMapping.register(IndexMap)

# The names of a longer view are shown at its two ends only.
_REPR_WHOLE = 20
_REPR_END = 5


class KeysView(abc.KeysView[str]):
    """The names of an IndexMap or the keys of a ParameterDict, in order; a set."""

    _mapping: IndexMap | EntryKeys

    def __repr__(self) -> str:
        if len(self) <= _REPR_WHOLE:
            return f"KeysView({list(self)})"
        first = ", ".join(map(repr, islice(self, _REPR_END)))
        last = ", ".join(map(repr, reversed(list(islice(reversed(self), _REPR_END)))))
        return f"KeysView([{first}, ..., {last}])"

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._mapping)


class ValuesView(abc.ValuesView[int]):
    """The rows of an IndexMap, in the order of their names."""

    _mapping: IndexMap

    def __iter__(self) -> Iterator[int]:
        return self._mapping._iterate(1, False)

    def __reversed__(self) -> Iterator[int]:
        return self._mapping._iterate(1, True)


class ItemsView(abc.ItemsView[str, int]):
    """The names and rows of an IndexMap, in order."""

    _mapping: IndexMap

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return self._mapping._iterate(2, False)

    def __reversed__(self) -> Iterator[tuple[str, int]]:
        return self._mapping._iterate(2, True)


class _EntriesView:
    """What the values and the items of a ParameterDict have in common."""

    def __init__(self, entries: ParameterDict) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries._keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries!r})"

    def _iterate(self, yields: Literal["values", "items"], backwards: bool) -> Iterator[Any]:
        entries = self._entries
        parameters = entries._parameters
        # What hides a Parameter, as FSDP hides them, lies in `__dict__`.
        if is_own(entries, VALUES if yields == "values" else ITEMS) and vars(entries).keys().isdisjoint(
            parameters.keys()
        ):
            return EntryIterator(entries, entries._keys, parameters, yields, backwards)
        names = reversed(entries._keys) if backwards else iter(entries._keys)
        # Generators, which let go of everything at their end.
        if yields == "values":
            return (entries[name] for name in names)
        return ((name, entries[name]) for name in names)


class EntryValuesView(_EntriesView, abc.ValuesView[Any]):
    """The values of a ParameterDict, in order."""

    def __contains__(self, value: object) -> bool:
        # Not `==`: that of tensors compares their elements.
        return any(value is one for one in self)

    def __iter__(self) -> Iterator[Any]:
        return self._iterate("values", False)

    def __reversed__(self) -> Iterator[Any]:
        return self._iterate("values", True)


class EntryItemsView(_EntriesView, abc.ItemsView[str, Any]):
    """The names and values of a ParameterDict, in order."""

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2) or item[0] not in self._entries._keys:
            return False
        return self._entries[item[0]] is item[1]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._iterate("items", False)

    def __reversed__(self) -> Iterator[tuple[str, Any]]:
        return self._iterate("items", True)
