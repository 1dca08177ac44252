"""Many rows by name in one call: looked up, gathered and scattered.

The functions do what the methods of the same names of ``StackedParameterDict`` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pdrs._core import Places, RowIndex
from pdrs._rows.by_row import ByRow
from pdrs._rows.gather_op import gather_rows, gather_tables
from pdrs._rows.in_ddp import is_reduced
from pdrs._rows.insert import (
    Initialiser,
    as_shape,
    insert_missing,
    kind_to_insert,
    missing_error,
    refuse_other,
    refuse_uncallable,
)
from pdrs._rows.layout import table_number
from pdrs._rows.same_names import refuse_other_names
from pdrs._rows.store import device_of, numbers_by_kind
from pdrs._rows.table import Kind, Rows, Table, is_sharded, kind_of, parameter_of, refuse_foreign
from pdrs._rows.write import note_rows, share_memory
from pdrs._torch.modes import refuse_symbolic_trace
from pdrs._torch.names import Names, as_list, listed
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = [
    "Lookup",
    "Missing",
    "check_missing",
    "gather",
    "in_order",
    "indices",
    "isin",
    "look_up",
    "lookup",
    "names_of",
    "scatter",
    "takes_rows",
]

Missing = Literal["error", "skip", "zero", "insert"]


class Lookup:
    """Names that have been looked up, to be used in many steps. :meth:`StackedParameterDict.lookup` makes it.

    It notices when rows have changed places or names have gone, and looks its names up again. A removed name then
    raises KeyError. ``missing=`` has no effect on a Lookup. Otherwise gathering costs what
    ``torch.nn.functional.embedding`` costs.
    """

    def __init__(self, owner: StackedParameterDict, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._owner = owner
        self._version = -1
        self._places = Places.of(np.empty(0, np.int64), np.empty(0, np.int64))
        self._table: Table | None = None
        self._rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self._on_cpu = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the owner and the names. All else belongs to the tables of this very owner."""
        return {"_owner": self._owner, "names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled or copied; the names are looked up when they are used."""
        self.__init__(state["_owner"], state["names"])  # type: ignore[misc]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return self._names

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self._names[:3]))
        return f"Lookup({len(self._names)} names: {first}{', ...' if len(self._names) > 3 else ''})"


# -- looking up --------------------------------------------------------------------------------------------------------


def look_up(
    sd: StackedParameterDict,
    names: Names | Lookup,
    missing: Missing = "error",
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Places:
    """Return the places of names; those that are missing and count as zeros have none."""
    check_missing(missing, init)
    if isinstance(names, Lookup):
        _refresh(sd, names)
        return names._places
    names = in_order(names)
    return _without_missing(sd, names, sd._index.places(names), missing, init, shape, dtype)


def _without_missing(
    sd: StackedParameterDict,
    names: Sequence[str],
    places: Places,
    missing: Missing,
    init: Initialiser | None,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> Places:
    """Return the places of names of which those that are missing have been treated as is asked for."""
    if missing == "zero" or places.is_complete():
        return places
    if missing == "skip":
        return places.found()
    if missing == "error":
        raise missing_error(names, places.missing())
    kinds = [kind_of(sd, sd._tables[number]) for number, _, _ in places.by_table()]
    if kinds:
        _refuse_several(kinds)
        found = kinds[0]
        if (shape is not None and as_shape(shape) != found.shape) or dtype not in (None, found.dtype):
            wanted = Kind(found.shape if shape is None else tuple(shape), dtype or found.dtype)
            raise ValueError(f"expected names of one shape and dtype, got {found}, and new ones of {wanted}")
        shape, dtype = found.shape, found.dtype
    with sd._lock.change():
        insert_missing(sd, names, init, shape, dtype)
        return sd._index.places(names)


def _refresh(sd: StackedParameterDict, names: Lookup) -> None:
    if names._owner is not sd:
        raise ValueError("the Lookup belongs to another dictionary")
    version = sd._index.moves
    if names._version != version:
        names._places = places = look_up(sd, names._names)
        number = places.only_table()
        names._table = sd._tables[number] if number >= 0 else None
        names._rows = torch.from_numpy(places.rows)
        names._version = version  # at last: whoever stops this has a Lookup that is looked up again
    if names._table is not None:
        device = parameter_of(sd, names._table).device
        if names._rows.device != device and device.type != "meta":
            names._rows = names._rows.to(device)
        names._on_cpu = names._rows.is_cpu


def lookup(self: StackedParameterDict, names: Names) -> Lookup:
    """Look names up once, to use them in many steps. **O(m)** for ``m`` names.

    Parameters
    ----------
    names
        Names of entries.

    Returns
    -------
    Lookup
        Pass it to ``gather``, ``indices``, ``scatter`` and the other methods for many names.

    Raises
    ------
    KeyError
        If a name is missing.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
    >>> batch = sd.lookup(["c", "a"])
    >>> del sd["b"]                         # the Lookup looks its names up again
    >>> sd.gather(batch).argmax(1)
    tensor([2, 0])

    """
    with self._lock:
        made = Lookup(self, as_list(in_order(names)))
        _refresh(self, made)
        return made


def isin(self: StackedParameterDict, names: Names) -> Tensor:
    """Return which of the names are entries: bool ``[len(names)]``, on the CPU. **O(m)** for ``m`` names."""
    return torch.from_numpy(self._index.places(names).tables >= 0)


def indices(
    self: StackedParameterDict,
    names: Names | Lookup | EllipsisType = ...,
    *,
    missing: Literal["error", "skip", "insert"] = "error",
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the row numbers of names in their table, such as for ``embedding_bag``. **O(m)** for ``m`` names.

    They stay valid while :attr:`StackedParameterDict.layout_version` stays the same. All names must be in one table.
    Names without gradients (``requires_grad=False``) and parameter groups have tables of their own. ``freeze`` moves no
    name. :meth:`StackedParameterDict.gather` finds the table of each name.

    Parameters
    ----------
    names, missing, init, shape, dtype
        As for :meth:`StackedParameterDict.gather`, except that ``missing="zero"`` is refused: a missing name has no
        row. :meth:`StackedParameterDict.isin` returns which names are there.

    Returns
    -------
    torch.Tensor
        int64 of shape ``[len(names)]``, on the device of the table. With ``missing="skip"`` there may be fewer.

    Raises
    ------
    KeyError
        If names are missing and ``missing`` is ``"error"``.
    ValueError
        If the names are in more than one table, or if ``missing`` is ``"zero"``. Also as for
        :meth:`StackedParameterDict.gather`.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
    >>> rows = sd.indices(["c", "a", "a"])
    >>> torch.nn.functional.embedding_bag(rows, sd.table((3,)), torch.tensor([0, 1]), mode="sum").tolist()
    [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]

    """
    if missing not in ("error", "skip", "insert"):
        raise ValueError(
            f"missing must be 'error', 'skip' or 'insert', got {missing!r}: a missing name has no row. Use isin() "
            'to see which are there, or missing="skip"'
        )
    with self._lock:
        if names is ...:
            check_missing(missing, init)
            places = _all_places(self, self._index, shape, dtype)
        else:
            if missing == "insert" and not isinstance(names, Lookup):
                names = in_order(names)
                _refuse_tables(self._index.places(names))
            places = look_up(self, names, missing, init, shape, dtype)
        numbers = [number for number, _, _ in places.by_table()]
        if shape is not None or dtype is not None:
            for number in numbers:
                refuse_other(kind_of(self, self._tables[number]), shape, dtype)
        if isinstance(names, Lookup) and names._table is not None:
            return names._rows.clone()  # what a Lookup knows is not for others to change
        _refuse_tables(places)
        rows = torch.from_numpy(places.rows)
        device = parameter_of(self, self._tables[numbers[0]]).device if numbers else rows.device
        return rows if device.type == "meta" else rows.to(device)


def _refuse_tables(places: Places) -> None:
    if len(places.by_table()) > 1:
        raise ValueError("the names lie in more than one table: gather them, or ask for those of one at a time")


def names_of(
    self: StackedParameterDict,
    indices: Tensor | Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    requires_grad: bool | None = None,
) -> list[str | None]:
    """Return the names of rows, the reverse of :meth:`StackedParameterDict.indices`. **O(n + m)**.

    Parameters
    ----------
    indices
        Row numbers of one table, ``[m]``: a tensor, an array or a list of int.
    shape, dtype, requires_grad
        They choose the table as for :meth:`StackedParameterDict.table`. Needed only if there are several tables.

    Returns
    -------
    list
        The name of each row, or None for a free row. Of no row numbers, an empty list.

    Raises
    ------
    IndexError
        If a row number is outside the table.
    TypeError
        If ``indices`` are not integers, or not one-dimensional.
    KeyError, ValueError
        As for :meth:`StackedParameterDict.table`.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
    >>> sd.names_of(torch.tensor([2, 0]))
    ['c', 'a']

    """
    with self._lock:
        given = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise TypeError(f"expected a list of rows of a table, got {given.dtype} with {given.ndim} dimensions")
        if given.size == 0:
            return []
        if shape is None:
            shape = _only_shape(self, dtype, requires_grad)
        number = table_number(self, shape, dtype, requires_grad)
        table, rows = self._tables[number], given.astype(np.int64)
        capacity = len(parameter_of(self, table))
        outside = np.flatnonzero((rows < 0) | (rows >= capacity))
        if len(outside):
            raise IndexError(f"the table '{table.attribute}' has {capacity} rows, got row {rows[outside[0]]}")
        # Rows that were never given are free, and the index does not know them.
        known = rows < self._index.used(number)
        found = np.full(len(rows), None, object)
        found[known] = self._index.names_of(number, rows[known])
        names: list[str | None] = found.tolist()
        return names


def _only_shape(sd: StackedParameterDict, dtype: torch.dtype | None, requires_grad: bool | None) -> tuple[int, ...]:
    """Return the only shape of the tables that fit: of those that require gradients, if there are any."""
    kinds = [kind_of(sd, table) for table in sd._tables]
    fitting = [one for one in kinds if dtype in (None, one.dtype) and requires_grad in (None, one.trainable)]
    shapes = sorted({one.shape for one in fitting if one.trainable} or {one.shape for one in fitting})
    if not shapes:
        raise KeyError("no table of this dtype and requires_grad" if kinds else "no table: the dictionary is empty")
    if len(shapes) > 1:
        listing = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"pass shape=, that of an entry: there are tables of the shapes {listing}")
    return shapes[0]


# -- gathering and scattering ------------------------------------------------------------------------------------------


def gather(
    self: StackedParameterDict,
    names: Names | Lookup | EllipsisType = ...,
    *,
    sparse: bool | None = None,
    missing: Missing = "error",
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the rows of many names as one differentiable tensor. **O(m)** for ``m`` names.

    The backward pass costs **O(capacity)** with a dense gradient, as for any embedding, and **O(m)** with
    ``sparse=True``.

    Parameters
    ----------
    names
        A list, tuple, NumPy array or other iterable of ``str``, or a Lookup. All names need one shape and dtype. The
        gradients of a name that is listed twice add up. By default all names, in order. The result is then a slice of
        the table if the rows are in this order, as after :meth:`StackedParameterDict.compact`.
    sparse
        Whether the table gets a sparse gradient, which the optimizers of :mod:`pdrs.optim` take, and SparseAdam, SGD
        and Adagrad of torch. By default it does if an attached optimizer of :mod:`pdrs.optim` has the table, except in
        the forward pass of DDP, which takes dense ones only.
    missing
        What to do with missing names. ``"error"`` raises. ``"skip"`` leaves them out. ``"zero"`` returns rows of zeros
        without a gradient. ``"insert"`` first inserts them at the end, in order. Under DDP, call
        ``pdrs.distributed.insert`` before the forward pass instead.
    init
        Writes the values of new rows in place, as ``torch.nn.init.normal_`` does. It is called with one tensor
        ``[new names, *shape]`` of zeros: ``init(rows)``. If it has two parameters without defaults, it is called as
        ``init(rows, names)``. Without it, new rows are zeros.
    shape, dtype
        The shape and dtype of an entry. Needed only if they cannot be inferred from existing names or the only table.
        Without ``names``, only the entries of this shape and dtype are returned.

    Returns
    -------
    torch.Tensor
        ``[len(names), *shape]``. With ``"skip"``, missing names have no row.

    Raises
    ------
    KeyError
        If names are missing and ``missing`` is ``"error"``. The message counts them and lists some.
    ValueError
        If the names have different shapes or dtypes, or others than ``shape`` and ``dtype``. If the shape of new names
        is unknown. If ``init`` is given without ``missing="insert"``, or returned values instead of writing them.
    RuntimeError
        If an optimizer that is not attached has stepped on the table, and new names make it grow or use old rows again.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> sd.gather(["b", "a", "b"]).sum().backward()
    >>> sd.table((2,)).grad.tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    >>> sd.gather(["b", "c"], missing="insert", init=torch.nn.init.ones_).tolist()
    [[3.0, 4.0], [1.0, 1.0]]

    """
    if missing != "error" or init is not None:
        check_missing(missing, init)
    with self._lock:
        refuse_symbolic_trace()
        refuse_other_names(self)
        if not isinstance(names, Lookup) and names is not ...:
            names = in_order(names)
        while True:
            index = self.__dict__["_index"]
            version = index.moves
            try:
                gathered = _gather(self, index, names, sparse, missing, init, shape, dtype)
            except Exception:
                if self.__dict__["_index"].moves == version:
                    raise
                continue  # The table may be shorter than it was, or the names may lie in another one.
            # Else a finalizer has moved rows on this very thread, after they were looked up.
            if self.__dict__["_index"].moves == version:
                if shape is not None or dtype is not None:
                    refuse_other(Kind(tuple(gathered.shape[1:]), gathered.dtype), shape, dtype)
                return gathered


def _gather(
    sd: StackedParameterDict,
    index: RowIndex,
    names: Sequence[str] | Lookup | EllipsisType,
    sparse: bool | None,
    missing: Missing,
    init: Initialiser | None,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if isinstance(names, Lookup):
        table = _table_of_all(sd, names)
        if table is not None:
            return gather_rows(table, names._rows, takes_rows(sd, table) if sparse is None else sparse)
        return _gather_places(sd, names._places, sparse, shape, dtype)
    if names is ...:
        places = _all_places(sd, index, shape, dtype)
        number = places.only_table()
        if number >= 0 and not sparse:
            rows = places.rows
            table = parameter_of(sd, sd._tables[number])
            if (rows == np.arange(len(rows))).all() and (sparse is False or not takes_rows(sd, table)):
                return table[: len(rows)]
    else:
        places = index.places(names)
        number = places.only_table()
        if number < 0:
            places = _without_missing(sd, names, places, missing, init, shape, dtype)
    if number >= 0:
        table = parameter_of(sd, sd._tables[number])
        found = torch.from_numpy(places.rows)
        if sparse is None:
            sparse = takes_rows(sd, table)
        return gather_rows(table, found if table.is_cpu else found.to(table.device), sparse)
    return _gather_places(sd, places, sparse, shape, dtype)


def takes_rows(sd: StackedParameterDict, table: Tensor) -> bool:
    """Whether an attached optimizer has a table, and takes its gradient by row."""
    for reference in sd.__dict__["_optimizers"]:
        optimizer = reference()
        if isinstance(optimizer, ByRow) and optimizer.holds(table):
            return not is_sharded(table) and not is_reduced(table)
    return False


def _gather_places(
    sd: StackedParameterDict,
    places: Places,
    sparse: bool | None,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> Tensor:
    parts = [(parameter_of(sd, sd._tables[number]), there, rows) for number, there, rows in places.by_table()]
    if not parts:
        kind = kind_to_insert(sd, shape, dtype, also_no_grad=True)
        fitting = [number for one, number in numbers_by_kind(sd).items() if one._replace(group=0) == kind]
        if not fitting or device_of(sd).type == "meta":
            return torch.zeros((len(places), *kind.shape), dtype=kind.dtype, device=device_of(sd))
        # Of no rows of a table, so that a batch without a known name has a backward pass like any other.
        none = np.empty(0, np.int64)
        parts = [(parameter_of(sd, sd._tables[fitting[0]]), none, none)]
    if sparse is None:
        sparse = all(takes_rows(sd, table) for table, _, _ in parts)
    if len(parts) == 1 and 0 < len(places) == len(parts[0][1]):
        table, _, rows = parts[0]
        return gather_rows(table, torch.from_numpy(rows).to(table.device), sparse)
    _refuse_several([Kind(tuple(table.shape[1:]), table.dtype) for table, _, _ in parts])
    return gather_tables(parts, len(places), sparse)


def _refuse_several(kinds: Sequence[Kind]) -> None:
    """Raise ValueError if entries are of several shapes or dtypes."""
    if len({kind[:2] for kind in kinds}) > 1:
        listing = " and ".join(sorted({str(kind) for kind in kinds}))
        raise ValueError(f"expected names of one shape and dtype, got {listing}")


@torch.no_grad()
@untraced
def scatter(
    self: StackedParameterDict, names: Names | Lookup, values: Tensor, *, missing: Literal["error", "insert"] = "error"
) -> None:
    """Copy values into the rows of many names. **O(m)** for ``m`` names.

    Parameters
    ----------
    names
        As for :meth:`StackedParameterDict.gather`. If a name is listed twice, one of its values is kept.
    values
        ``[len(names), *shape]``.
    missing
        ``"error"`` raises if names are missing. ``"insert"`` inserts them at the end, in order.

    Raises
    ------
    KeyError
        If names are missing and ``missing`` is ``"error"``.
    TypeError
        If ``values`` are not a dense tensor, or have another dtype than the rows.
    ValueError
        If the numbers of names and values differ, or if the shapes do not fit. Then nothing has changed.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.scatter(["b", "c"], torch.ones(2, 2), missing="insert")
    >>> {name: row.tolist() for name, row in sd.items()}
    {'a': [0.0, 0.0], 'b': [1.0, 1.0], 'c': [1.0, 1.0]}

    """
    if missing not in ("error", "insert"):
        raise ValueError(f"missing must be 'error' or 'insert', got {missing!r}")
    if not isinstance(values, Tensor):
        raise TypeError(f"expected a tensor of values, got {type(values).__name__}")
    if values.layout != torch.strided:
        raise TypeError(f"expected a dense tensor of values, got one with the layout {values.layout}")
    if values.dim() == 0:
        raise ValueError("expected one value for each name, got a single number")
    if not isinstance(names, Lookup):
        names = as_list(in_order(names))
    if len(names) != len(values):
        raise ValueError(f"expected one value for each name, got {len(values)} values for {len(names)} names")
    with self._lock.change():
        places = look_up(self, names, "error" if isinstance(names, Lookup) or missing == "error" else "zero")
        parts = places.by_table()
        for number, _, _ in parts:
            refuse_foreign(self, self._tables[number], "write rows")
            kind = kind_of(self, self._tables[number])
            if kind.shape != tuple(values.shape[1:]):
                raise ValueError(f"expected rows of shape {list(kind.shape)}, got {list(values.shape[1:])}")
            if kind.dtype != values.dtype:
                raise TypeError(f"expected values of {kind.dtype}, as the rows have, got {values.dtype}")
        if any(share_memory(values, parameter_of(self, table)) for table in self._tables):
            values = values.clone()  # of which a row may be written before it is read

        def note(changes: Changes) -> None:
            for number, there, rows in parts:
                part = values if len(there) == len(values) else values[torch.from_numpy(there).to(values.device)]
                note_rows(changes, parameter_of(self, self._tables[number]), rows, part)

        absent = places.missing()
        if isinstance(names, list) and len(absent):

            def fill(new: Tensor) -> None:
                chosen = absent if len(new) == len(absent) else _each_once(names, absent)
                whole = len(chosen) == len(values)
                new.copy_(values if whole else values[torch.from_numpy(chosen).to(values.device)])

            insert_missing(self, names, fill, tuple(values.shape[1:]), values.dtype, note)
        else:
            changes = Changes()
            note(changes)
            changes.make()


def in_order(names: Names) -> list[Any] | tuple[Any, ...]:
    """Return names as a list or tuple; TypeError for a set, whose rows would come in any order."""
    if isinstance(names, set | frozenset):
        raise TypeError(f"names must be in an order, got a {type(names).__name__}: pass a list, such as sorted(names)")
    return listed(names)


def _each_once(names: list[str], places: Rows) -> Rows:
    """Return a place of each of the names at some places, in the order in which they come first."""
    chosen = dict(zip(map(names.__getitem__, places), places.tolist(), strict=True))
    return np.fromiter(chosen.values(), np.int64, len(chosen))


def check_missing(missing: str, init: Initialiser | None) -> None:
    """Raise ValueError for an unknown ``missing``, or for an ``init`` that it has no use for."""
    if missing not in ("error", "skip", "zero", "insert"):
        raise ValueError(f"missing must be 'error', 'skip', 'zero' or 'insert', got {missing!r}")
    if init is not None:
        refuse_uncallable(init)
        if missing != "insert":
            raise ValueError(f'init= needs missing="insert", got missing={missing!r}, which makes no new rows')


def _all_places(
    sd: StackedParameterDict, index: RowIndex, shape: Sequence[int] | None, dtype: torch.dtype | None
) -> Places:
    """Return the places of all entries, or of those of a shape and dtype."""
    places = index.places()
    if shape is None and dtype is None:
        return places
    size = None if shape is None else as_shape(shape)
    kinds = [kind_of(sd, table) for table in sd._tables]
    fits = np.array([size in (None, kind.shape) and dtype in (None, kind.dtype) for kind in kinds], np.bool_)
    there = fits[places.tables]
    return Places.of(places.tables[there], places.rows[there])


def _table_of_all(sd: StackedParameterDict, names: Lookup) -> Tensor | None:
    """Return the table that all names of a Lookup lie in, whose rows are up to date then; None if there are several.

    This is all that a Lookup costs in every step. It looks up no attribute through ``Module.__getattr__``, which takes
    several times as long as in a dict, and makes no ``torch.device``.
    """
    state = sd.__dict__
    if names._owner is not sd or names._version != state["_index"].moves:
        _refresh(sd, names)
    table = names._table
    if table is None:
        return None
    parameter: Tensor | None = state["_parameters"].get(table.attribute)
    if parameter is None or table.frozen is not None:
        parameter = parameter_of(sd, table)
    if not (names._on_cpu and parameter.is_cpu):
        _refresh(sd, names)
    return parameter
