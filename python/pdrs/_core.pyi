"""The native part of pdrs."""

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Literal, TypeVar, final, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

__all__ = [
    "EntryIterator",
    "IndexMap",
    "NameIterator",
    "can_take_over",
    "clear_entries",
    "in_step",
    "insert_all",
    "pop_end",
    "pop_entry",
    "prepare",
    "save_parameters",
    "set_entry",
    "take_over",
    "unzip",
    "use_native_slots",
]

_T = TypeVar("_T")

@final
class IndexMap:
    """An ordered map from names to rows, which can be popped anywhere in O(1).

    The names are ``str``; the rows are integers, 0 or more, that fit into 64 bits: the row of a table that belongs to
    the name, say. It answers what a dict answers, and, in one call, what a loop over a dict would take long for.
    Any number of threads may use it at once. *n* is the number of names; costs are amortised.

    Parameters
    ----------
    entries
        A mapping, or an iterable of pairs, of names and rows; their order is kept.

    Raises
    ------
    TypeError
        If a name is not a ``str`` (a ``str`` of a subclass is taken for its characters).
    ValueError
        If a row is negative.

    Examples
    --------
    >>> import pdrs
    >>> index = pdrs.IndexMap.from_names(["a", "b", "c"])
    >>> index["b"], index.popitem(last=False), list(index)
    (1, ('a', 0), ['b', 'c'])
    >>> index.lookup(["c", "b", "c"])
    array([2, 1, 2])

    """

    def __new__(cls, entries: Mapping[str, int] | IndexMap | Iterable[tuple[str, int]] | None = None) -> IndexMap: ...
    @staticmethod
    def from_names(names: Iterable[str], rows: NDArray[np.int64] | None = None) -> IndexMap:
        """Make an IndexMap of many names at once.

        Parameters
        ----------
        names
            A list, tuple, NumPy array or other iterable of ``str``. Of equal names the first gives the place.
        rows
            The rows, int64 of shape ``[len(names)]``. Without them, the first name gets row 0, the next new one row 1,
            and so on. Of equal names the last gives the row.

        Cost: **O(n)**, several times faster than ``dict(zip(names, range(n)))``.
        """
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> int: ...
    def __setitem__(self, name: str, row: int, /) -> None: ...
    def __delitem__(self, name: str, /) -> None: ...
    def __iter__(self) -> Iterator[str]: ...
    def __reversed__(self) -> Iterator[str]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __copy__(self) -> IndexMap: ...
    def __deepcopy__(self, memo: object, /) -> IndexMap: ...
    def keys(self) -> KeysView[str]:
        """Return a view of the names in order; reversible, a set. **O(1)**."""
    def values(self) -> ValuesView[int]:
        """Return a view of the rows in the order of the names; reversible. **O(1)**."""
    def items(self) -> ItemsView[str, int]:
        """Return a view of the pairs of name and row in order; reversible. **O(1)**."""
    @overload
    def get(self, name: str, default: None = None) -> int | None:
        """Return the row of ``name``, or ``default`` if it is not there. **O(1)**."""
    @overload
    def get(self, name: str, default: _T) -> int | _T: ...
    @overload
    def pop(self, name: str, /) -> int:
        """Remove ``name`` and return its row; the order of the others stays. **O(1)**.

        If it is not there, returns the default, or raises KeyError if none is given.
        """
    @overload
    def pop(self, name: str, default: _T, /) -> int | _T: ...
    def popitem(self, last: bool = True) -> tuple[str, int]:
        """Remove the last (or the first) name and return it and its row. **O(1)** at either end.

        Raises KeyError if the map is empty.
        """
    def move_to_end(self, name: str, last: bool = True) -> None:
        """Move ``name`` behind (or in front of) all others. **O(1)**. Raises KeyError if it is not there."""
    def clear(self) -> None:
        """Remove all names, and begin again at row 0. **O(n)**."""
    def update(self, entries: Mapping[str, int] | IndexMap | Iterable[tuple[str, int]]) -> None:
        """Set many rows; new names go to the end, in order. **O(m)** for ``m`` entries. A refusal changes nothing."""
    def extend(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Give each new name the next row, at the end, and return the rows of all.

        The next row is one more than the largest row that a name has had since the map was made or cleared.

        Parameters
        ----------
        names
            A list, tuple, NumPy array or other iterable of ``str``.

        Returns
        -------
        numpy.ndarray
            int64 of shape ``[len(names)]``: the rows of new and old names, in the order of ``names``.

        Cost: **O(m)** for ``m`` names.
        """
    def lookup(self, names: Iterable[str], default: int | None = None) -> NDArray[np.int64]:
        """Return the rows of many names in one call.

        Parameters
        ----------
        names
            A list, tuple, NumPy array or other iterable of ``str``; repeated names are fine.
        default
            The number for names that are not there.

        Returns
        -------
        numpy.ndarray
            int64 of shape ``[len(names)]``; ``torch.from_numpy`` makes a tensor of it without a copy.

        Raises
        ------
        KeyError
            If names are missing and there is no ``default``; it counts them and lists some.

        Cost: **O(m)** for ``m`` names, several times less than ``m`` single look-ups.
        """
    def rows(self) -> NDArray[np.int64]:
        """Return the rows of all names in order: int64 of shape ``[n]``. **O(n)**."""
    def copy(self) -> IndexMap:
        """Return another map with the same names and rows in the same order. **O(n)**, no name is hashed."""
    @property
    def _fingerprint(self) -> str: ...
    def _iterate(self, yields: int, reversed: bool) -> Iterator[Any]: ...

@final
class NameIterator(Iterator[Any]):
    def __iter__(self) -> NameIterator: ...
    def __next__(self) -> Any: ...

@final
class EntryIterator(Iterator[Any]):
    def __new__(
        cls,
        index: IndexMap,
        parameters: dict[str, Any],
        other: object,
        yields: Literal["values", "items"],
        reversed: bool,
    ) -> EntryIterator: ...
    def __iter__(self) -> EntryIterator: ...
    def __next__(self) -> Any: ...

def can_take_over(source: dict[Any, Any], parameter: type[Parameter], sorted: bool) -> bool: ...
def clear_entries(index: IndexMap, parameters: dict[str, Any]) -> list[str]: ...
def in_step(index: IndexMap, parameters: dict[str, Any]) -> bool: ...
def insert_all(index: IndexMap, parameters: dict[str, Any], names: list[str], values: list[Any]) -> None: ...
def pop_end(index: IndexMap, parameters: dict[str, Any], last: bool) -> tuple[str, Any] | None: ...
def pop_entry(index: IndexMap, parameters: dict[str, Any], key: str) -> Any | None: ...
def prepare(names: list[Any], values: list[Any], parameter: type[Parameter], tensor: type[Tensor]) -> list[int]: ...
def save_parameters(
    parameters: dict[str, Any], destination: dict[str, Any], prefix: str, parameter: type[Parameter]
) -> None: ...
def set_entry(
    index: IndexMap, parameters: dict[str, Any], key: object, value: object, parameter: type[Parameter]
) -> bool: ...
def take_over(index: IndexMap, parameters: dict[str, Any], source: dict[str, Any]) -> None: ...
def unzip(pairs: list[Any]) -> tuple[list[Any], list[Any]] | None: ...
def use_native_slots(class_: type[Module]) -> None: ...
