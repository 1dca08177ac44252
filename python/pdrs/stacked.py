"""``pdrs.StackedParameterDict``: a million names, a handful of registered parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import IndexMap, TableRows, insert_ids, missing_names, remove_names, replace_ids
from pdrs._row_gather import gather_rows, gather_tables
from pdrs._tables import Kind, Rows, Table, Tables
from pdrs._views import KeysView
from pdrs.parameter_dict import MissingEntryError, _columns

__all__ = ["Handle", "StackedParameterDict"]

Initialiser = Callable[[Tensor], Any]
Missing = Literal["error", "skip", "zero", "insert"]
Names = Sequence[str] | NDArray[Any] | Iterable[str]

# An id is the number of a table and a row of it.
_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1
# How many of many names an error lists.
_LISTED = 5
_REPR_END = 5


class Handle:
    """Names that have been looked up, to be gathered in every step: made by :meth:`StackedParameterDict.handle`.

    It notices when rows have moved or names have gone, and looks the names up again.

    Attributes
    ----------
    names
        The names, in order.
    """

    def __init__(self, owner: StackedParameterDict, names: list[str]) -> None:
        self._owner = owner
        self.names = names
        self._moves = -1
        self._ids: Rows = np.empty(0, np.int64)
        self._rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self._table: Table | None = None

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.names)


class StackedParameterDict(Tables):
    r"""An ordered dictionary of parameters that lie together: names by the million, a few registered Parameters.

    Entries of one shape and dtype are the rows of one :class:`~torch.nn.Parameter`, a *table*.

    Parameters
    ----------
    parameters
        A mapping from ``str`` to tensors, or an iterable of pairs, to begin with; see :meth:`update`.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict({"left": torch.zeros(2), "right": torch.ones(2)})
    >>> sd["layer.0.weight"] = torch.zeros(3)
    >>> list(sd)
    ['left', 'right', 'layer.0.weight']
    >>> [name for name, _ in sd.named_parameters()]
    ['float32_2', 'float32_3']
    >>> sd.gather(["right", "left", "right"]).shape
    torch.Size([3, 2])

    """

    _index: IndexMap

    def __init__(self, parameters: Any = None) -> None:
        super().__init__()
        self.__dict__["_index"] = IndexMap()
        if parameters is not None:
            self.update(parameters)

    # -- other ways to make one ----------------------------------------------------------------------------------------

    @classmethod
    def from_rows(cls, names: Names, rows: Tensor, *, trainable: bool | None = None) -> StackedParameterDict:
        """Make a dictionary of many names of one shape whose table is a given tensor. **O(n)**, nothing is copied.

        Parameters
        ----------
        names
            Distinct names.
        rows
            ``[len(names), *shape]``: the row of each. A Parameter becomes the table itself.
        trainable
            Whether the table requires gradients; by default, as the Parameter does, and otherwise it does.
        """
        made = cls()
        index = IndexMap.from_names(names)
        if len(index) != rows.shape[0] or "" in index:
            raise ValueError(f"expected a distinct, non-empty name a row, got {len(index)} and {rows.shape[0]} rows")
        if trainable is None:
            trainable = rows.requires_grad if isinstance(rows, Parameter) else True
        parameter = rows if isinstance(rows, Parameter) else Parameter(rows, requires_grad=trainable)
        parameter.requires_grad_(trainable)
        kind = Kind(tuple(rows.shape[1:]), rows.dtype, trainable)
        made._add_table(kind.attribute(), parameter, 0)
        made._tables[0].rows = TableRows(len(index))
        made.__dict__["_index"] = index
        return made

    # -- one entry -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Tensor:
        """Return the row of ``key``: a differentiable view, writable under ``torch.no_grad()``. **O(1)**."""
        try:
            number = self._index[key]
        except KeyError:
            raise MissingEntryError(key) from None
        return self._parameter(self._tables[number >> _ROW_BITS])[number & _ROW_MASK]

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Copy a tensor into the row of ``key``; a new key goes to the end, an old one keeps its place. **O(1)**."""
        self._insert([key], [value])

    def __delitem__(self, key: str) -> None:
        """Remove ``key``; the order of the others stays. Raises KeyError if it is not there. **O(1)**."""
        with self._lock:
            self._free(self._index.pop(key))

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is the key of an entry. **O(1)**."""
        return key in self._index

    def get(self, key: str, default: Any = None) -> Any:
        """Return the row of ``key``, or ``default`` if it is not there. **O(1)**."""
        return self[key] if key in self._index else default

    def setdefault(self, key: str, default: Any = None) -> Tensor:
        """Return the row of ``key``; first set it to ``default`` if it is not there. **O(1)**."""
        if key not in self._index:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return a copy of its row, or ``default`` if it is not there and one is given. **O(1)**."""
        if len(default) > 1:
            raise TypeError(f"pop expected at most 2 arguments, got {1 + len(default)}")
        with self._lock:
            number = self._index.get(key)
            if number is None:
                if default:
                    return default[0]
                raise MissingEntryError(key)
            value = self._parameter(self._tables[number >> _ROW_BITS]).detach()[number & _ROW_MASK].clone()
            del self[key]
            return value

    def popitem(self, last: bool = True) -> tuple[str, Tensor]:
        """Remove the last (or the first) entry and return its key and a copy of its row. **O(1)** at either end."""
        with self._lock:
            try:
                key = next(reversed(self._index) if last else iter(self._index))
            except StopIteration:
                raise KeyError("popitem(): dictionary is empty") from None
            return key, self.pop(key)

    # -- all entries ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of entries. **O(1)**."""
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order; RuntimeError if entries come or go meanwhile. **O(1)** a step."""
        return iter(self._index)

    def __reversed__(self) -> Iterator[str]:
        """Iterate over the keys from the last to the first. **O(1)** a step."""
        return reversed(self._index)

    def keys(self) -> KeysView:
        """Return a view of the keys: in order, reversible, a set. **O(1)**."""
        return KeysView(self._index)

    def update(self, parameters: Any) -> None:
        """Set many entries, as :meth:`__setitem__` would one after another. **O(m)** for ``m`` entries."""
        if not isinstance(parameters, Iterable):
            raise TypeError(
                "StackedParameterDict.update should be called with an iterable of key/value pairs, but got "
                f"{type(parameters).__name__}"
            )
        self._insert(*_columns(parameters))

    def clear(self) -> None:
        """Remove all entries; the tables keep their capacity. **O(n)**."""
        self.drop(list(self._index))

    def drop(self, names: Names) -> None:
        """Remove many entries at once. **O(m)** for ``m`` names.

        Raises
        ------
        KeyError
            If a name is not there, or is listed twice; then none has been removed.
        """
        with self._lock:
            ids = remove_names(self._index, names)
            for number in np.unique(ids >> _ROW_BITS):
                self._free_rows(self._tables[number], ids[ids >> _ROW_BITS == number] & _ROW_MASK)

    def extra_repr(self) -> str:
        """Return the number of entries, and a few of them."""
        return f"{len(self)} names in {len(self._tables)} tables"

    # -- many entries --------------------------------------------------------------------------------------------------

    def handle(self, names: Names) -> Handle:
        """Look names up once, to be gathered in every step. **O(m)** for ``m`` names."""
        made = Handle(self, list(names))
        self._rows_of_handle(made)
        return made

    def gather(
        self,
        names: Names | Handle,
        *,
        sparse: bool = False,
        missing: Missing = "error",
        init: Initialiser | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the rows of many names as one tensor, ``[len(names), *shape]``. **O(m)** for ``m`` names."""
        if isinstance(names, Handle):
            with self._lock:
                rows = self._rows_of_handle(names)
                if names._table is not None:
                    return gather_rows(self._parameter(names._table), rows, sparse)
                return self._gather_ids(names._ids, sparse, shape, dtype)
        with self._lock:
            return self._gather_ids(self._look_up(names, missing, init, shape, dtype), sparse, shape, dtype)

    def rows(
        self,
        names: Names | Handle,
        *,
        missing: Missing = "error",
        init: Initialiser | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the rows of many names in their table: int64 ``[len(names)]``. **O(m)** for ``m`` names."""
        with self._lock:
            if isinstance(names, Handle):
                rows = self._rows_of_handle(names)
                if names._table is not None:
                    return rows
                ids = names._ids
            else:
                ids = self._look_up(names, missing, init, shape, dtype)
            present = ids[ids >= 0]
            if len(present) == 0:
                return torch.from_numpy(ids)
            number = int(present[0]) >> _ROW_BITS
            if (present >> _ROW_BITS != number).any():
                raise ValueError("the names lie in more than one table, and rows of different tables cannot be mixed")
            device = self._parameter(self._tables[number]).device
            return torch.from_numpy(np.where(ids < 0, ids, ids & _ROW_MASK)).to(device)

    @torch.no_grad()
    def scatter_(self, names: Names | Handle, values: Tensor, *, missing: Literal["error", "insert"] = "error") -> None:
        """Copy ``values``, ``[len(names), *shape]``, into the rows of many names. **O(m)** for ``m`` names."""
        with self._lock:
            if isinstance(names, Handle):
                self._rows_of_handle(names)
                ids = names._ids
            else:
                names = list(names)
                if missing == "insert":
                    self._insert_missing(names, lambda made: None, tuple(values.shape[1:]), values.dtype)
                ids = self._look_up(names, "error", None, None, None)
            if len(ids) != len(values):
                raise ValueError(f"expected a value a name, got {len(values)} values for {len(ids)} names")
            for number in np.unique(ids >> _ROW_BITS):
                parameter = self._parameter(self._tables[number])
                there = np.flatnonzero(ids >> _ROW_BITS == number)
                rows = torch.from_numpy(ids[there] & _ROW_MASK).to(parameter.device)
                parameter[rows] = values[torch.from_numpy(there).to(values.device)]

    def table(self, shape: Sequence[int], dtype: torch.dtype | None = None, *, trainable: bool = True) -> Tensor:
        """Return the Parameter whose rows are the entries of a shape and dtype: ``[capacity, *shape]``. **O(tables)**.

        Raises
        ------
        KeyError
            If there is none.
        """
        wanted = Kind(tuple(shape), dtype or torch.get_default_dtype(), trainable)
        for table in self._tables:
            if self._kind(table) == wanted:
                return self._parameter(table)
        raise KeyError(f"no table of {wanted}")

    def reserve(
        self,
        count: int,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for ``count`` more names of a shape, so that they can be inserted with no growth. **O(n)**."""
        with self._lock:
            kind = self._kind_to_insert(shape, dtype)
            table = self._tables[self._table_for(kind, torch.device(device) if device else self._device())]
            capacity = len(self._parameter(table))
            wanted = table.rows.used + count - table.rows.reused(count)
            if wanted > capacity:
                self._resize(table, wanted)

    def compact(self) -> None:
        """Give the rows the order of the names, with no gaps, and the memory of the others back. **O(n)**."""
        with self._lock:
            ids = self._index.rows()
            new_ids = ids.copy()
            for number, table in enumerate(self._tables):
                there = np.flatnonzero(ids >> _ROW_BITS == number)
                rows = ids[there] & _ROW_MASK
                new_ids[there] = np.arange(len(rows)) | number << _ROW_BITS
                parameter = self._parameter(table)
                if len(rows) == len(parameter) and (rows == np.arange(len(rows))).all():
                    continue
                self._rearrange(table, len(rows), torch.from_numpy(rows).to(parameter.device))
                table.rows = TableRows(len(rows))
            replace_ids(self._index, new_ids)
            self._moved()

    # -- how it is done ------------------------------------------------------------------------------------------------

    def _moved(self) -> None:
        self.__dict__["_moves"] += 1

    def _device(self) -> torch.device:
        return self._parameter(self._tables[0]).device if self._tables else torch.get_default_device()

    def _free(self, number: int) -> None:
        self._free_rows(self._tables[number >> _ROW_BITS], np.array([number & _ROW_MASK]))

    def _free_rows(self, table: Table, rows: Rows) -> None:
        table.rows.give_back_many(rows)
        parameter = self._parameter(table)
        if parameter.grad is not None:
            self._clear_gradient(parameter, torch.from_numpy(rows).to(parameter.device))
        self._moved()

    def _rows_of_handle(self, handle: Handle) -> Tensor:
        if handle._owner is not self:
            raise ValueError("the handle belongs to another dictionary")
        if handle._moves != self.__dict__["_moves"]:
            handle._ids = self._look_up(handle.names, "error", None, None, None)
            handle._moves = self.__dict__["_moves"]
            numbers = np.unique(handle._ids >> _ROW_BITS)
            handle._table = self._tables[numbers[0]] if len(numbers) == 1 else None
            handle._rows = torch.from_numpy(handle._ids & _ROW_MASK)
        if handle._table is not None:
            device = self._parameter(handle._table).device
            if handle._rows.device != device:
                handle._rows = handle._rows.to(device)
        return handle._rows

    def _look_up(
        self,
        names: Names,
        missing: Missing,
        init: Initialiser | None,
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
    ) -> Rows:
        """Return the ids of names; -1 for those that are missing and count as zeros."""
        if missing not in ("error", "skip", "zero", "insert"):
            raise ValueError(f"missing must be 'error', 'skip', 'zero' or 'insert', got {missing!r}")
        if not isinstance(names, list | np.ndarray):
            names = list(names)
        ids = self._index.lookup(names, -1)
        if len(ids) == 0 or ids.min() >= 0:
            return ids
        if missing == "zero":
            return ids
        if missing == "skip":
            return ids[ids >= 0]
        if missing == "insert":
            if shape is None and dtype is None and ids.max() >= 0:
                found = self._kind(self._tables[int(ids.max()) >> _ROW_BITS])
                shape, dtype = found.shape, found.dtype
            self._insert_missing(names, init, shape, dtype)
            return self._index.lookup(names)
        absent = np.flatnonzero(ids < 0)
        listed = ", ".join(repr(str(names[at])) for at in absent[:_LISTED])
        more = ", ..." if len(absent) > _LISTED else ""
        raise MissingEntryError(f"{len(absent)} of {len(ids)} names are not in the dictionary: {listed}{more}")

    def _kind_to_insert(self, shape: Sequence[int] | None, dtype: torch.dtype | None) -> Kind:
        """Return the kind that is asked for, or that of the only table that can be meant."""
        kinds = {self._kind(table)._replace(group=0) for table in self._tables if self._parameter(table).requires_grad}
        fitting = {
            kind for kind in kinds if (shape is None or kind.shape == tuple(shape)) and dtype in (None, kind.dtype)
        }
        if len(fitting) == 1:
            return fitting.pop()
        if shape is None:
            raise ValueError(
                f"expected a shape for new names, because there are {len(fitting)} tables that could be meant"
            )
        return Kind(tuple(shape), dtype or torch.get_default_dtype())

    def _insert_missing(
        self, names: Names, init: Initialiser | None, shape: Sequence[int] | None, dtype: torch.dtype | None
    ) -> None:
        new = missing_names(self._index, names)
        if not new:
            return
        if "" in new:
            raise KeyError('parameter name can\'t be empty string ""')
        kind = self._kind_to_insert(shape, dtype)
        number = self._number_of(kind)
        device = self._device() if number is None else self._parameter(self._tables[number]).device
        values = torch.zeros((len(new), *kind.shape), dtype=kind.dtype, device=device)
        if init is not None:
            with torch.no_grad():
                init(values)
        number = self._table_for(kind, device)
        self._append(number, new, values)

    def _append(self, number: int, names: list[str], values: Tensor) -> None:
        """Insert new names of one table."""
        table = self._tables[number]
        rows = self._make_room(table, len(names))
        self._write(self._parameter(table), rows, values)
        insert_ids(self._index, names, rows | number << _ROW_BITS)
        table.rows.take(len(names))

    @torch.no_grad()
    def _write(self, parameter: Tensor, rows: Rows, values: Tensor) -> None:
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            parameter[int(rows[0]) : int(rows[-1]) + 1].copy_(values)
        else:
            parameter.index_copy_(0, torch.from_numpy(rows).to(parameter.device), values.to(parameter.device))

    def _gather_ids(self, ids: Rows, sparse: bool, shape: Sequence[int] | None, dtype: torch.dtype | None) -> Tensor:
        numbers = np.unique(ids >> _ROW_BITS)
        present = numbers[numbers >= 0]
        if len(present) == 0:
            kind = self._kind_to_insert(shape, dtype)
            return torch.zeros((len(ids), *kind.shape), dtype=kind.dtype, device=self._device())
        tables = [self._parameter(self._tables[number]) for number in present]
        rows = torch.from_numpy(ids & _ROW_MASK).to(tables[0].device)
        if len(numbers) == 1:
            return gather_rows(tables[0], rows, sparse)
        kinds = {(table.shape[1:], table.dtype) for table in tables}
        if len(kinds) > 1:
            listed = " and ".join(sorted(f"{dtype} {list(shape)}" for shape, dtype in kinds))
            raise ValueError(f"expected names of one shape and dtype, got {listed}")
        owners = np.searchsorted(present, ids >> _ROW_BITS)
        owners[ids < 0] = -1
        return gather_tables(tables, torch.from_numpy(owners).to(rows.device), rows, sparse)

    def _insert(self, names: list[Any], values: list[Any]) -> None:
        """Insert all, or, if one cannot be taken, none."""
        entries: dict[str, Tensor] = {}
        for name, value in zip(names, values, strict=True):
            entries[self._checked_key(name)] = self._checked_value(name, value)
        with self._lock:
            by_kind: dict[Kind, list[str]] = {}
            for name, value in entries.items():
                by_kind.setdefault(self._kind_of_entry(name, value), []).append(name)
            blocks = {kind: torch.stack([entries[name].detach() for name in group]) for kind, group in by_kind.items()}
            order = list(entries)
            made: dict[str, int] = {}
            freed: list[int] = []
            for kind, group in by_kind.items():
                number = self._table_for(kind, blocks[kind].device)
                table = self._tables[number]
                held = self._index.lookup(group, -1)
                stays = (held >= 0) & (held >> _ROW_BITS == number)
                freed += held[(held >= 0) & ~stays].tolist()
                ids = held.copy()
                new = self._make_room(table, int((~stays).sum()))
                ids[~stays] = new | number << _ROW_BITS
                self._write(self._parameter(table), ids & _ROW_MASK, blocks[kind])
                table.rows.take(len(new))
                made.update(zip(group, ids.tolist(), strict=True))
            insert_ids(self._index, order, np.array([made[name] for name in order], dtype=np.int64))
            for number in freed:
                self._free(number)

    def _checked_key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise TypeError(f"names must be str, got {type(key).__name__}")
        text: str = str.__str__(key)
        if not text:
            raise KeyError('parameter name can\'t be empty string ""')
        return text

    def _checked_value(self, key: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"expected a tensor for '{key}', got {type(value).__name__}: a StackedParameterDict holds rows of "
                "tables; pdrs.ParameterDict holds Modules and other values, too"
            )
        return value

    def _kind_of_entry(self, key: str, value: Tensor) -> Kind:
        number = self._index.get(key)
        trainable = value.requires_grad if isinstance(value, Parameter) else True
        kind = Kind(tuple(value.shape), value.dtype, trainable)
        if number is None:
            return kind
        held = self._kind(self._tables[number >> _ROW_BITS])
        if held.dtype != value.dtype:
            raise TypeError(f"expected {held.dtype} for '{key}', as its row has, got {value.dtype}")
        return kind if isinstance(value, Parameter) else kind._replace(trainable=held.trainable)
