"""Rows that are read and written by name: looked up, gathered, scattered, and put in order, many in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pdrs._core import TableRows, find_rows, replace_ids
from pdrs._rows.averages import averages_with
from pdrs._rows.gather_op import gather_rows, gather_tables
from pdrs._rows.insert import Initialiser, NamedRows, as_shape, refuse_integers
from pdrs._rows.row_ids import id_of, row_of, table_of
from pdrs._rows.store import Kind, Rows, Table
from pdrs._rows.write import note_rows, share_memory
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.names import Names, as_list, listed
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

__all__ = ["GatheredRows", "Lookup", "Missing"]

Missing = Literal["error", "skip", "zero", "insert"]

# How many of many names an error lists.
_LISTED = 5


class Lookup:
    """Names that have been looked up, to be gathered in every step; made by :meth:`StackedParameterDict.lookup`.

    It notices when rows have moved or names have gone, and looks its names up again; a name that has gone is a KeyError
    then. What its use costs else is that of ``torch.nn.functional.embedding``.

    Attributes
    ----------
    names
        The names, in order.
    """

    def __init__(self, owner: GatheredRows, names: list[str]) -> None:
        self.names = names
        self._owner = owner
        self._moves = -1
        self._ids: Rows = np.empty(0, np.int64)
        self._table: Table | None = None
        self._rows = torch.empty(0, dtype=torch.int64, device="cpu")
        self._on_cpu = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the tables of this very owner."""
        return self.__dict__ | {"_moves": -1, "_table": None}

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)


class GatheredRows(NamedRows):
    """Named rows, and what reads and writes many of them."""

    # -- looking up ----------------------------------------------------------------------------------------------------

    def _look_up(
        self,
        names: Names | Lookup,
        missing: Missing = "error",
        init: Initialiser | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Rows:
        """Return the ids of names; -1 for those that are missing and count as zeros."""
        _check_missing(missing)
        if isinstance(names, Lookup):
            self._refresh(names)
            return names._ids
        names = listed(names)
        return self._without_missing(names, self._index.indices(names, missing=-1), missing, init, shape, dtype)

    def _without_missing(
        self,
        names: Sequence[str],
        ids: Rows,
        missing: Missing,
        init: Initialiser | None,
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
    ) -> Rows:
        """Return ids of names of which those that are missing have been treated as is asked for."""
        if len(ids) == 0 or ids.min() >= 0 or missing == "zero":
            return ids
        if missing == "skip":
            return ids[ids >= 0]
        if missing == "insert":
            if ids.max() >= 0:
                found = self._kind(self._tables[table_of(int(ids.max()))])
                if (shape is not None and as_shape(shape) != found.shape) or dtype not in (None, found.dtype):
                    wanted = Kind(found.shape if shape is None else tuple(shape), dtype or found.dtype)
                    raise ValueError(f"expected names of one shape and dtype, got {found}, and new ones of {wanted}")
                shape, dtype = found.shape, found.dtype
            with self._lock.change():
                self._insert_missing(names, init, shape, dtype)
                return self._index.indices(names)
        absent = np.flatnonzero(ids < 0)
        some = ", ".join(repr(str(names[at])) for at in absent[:_LISTED])
        more = ", ..." if len(absent) > _LISTED else ""
        raise MissingEntryError(f"{len(absent)} of {len(ids)} names are not in the dictionary: {some}{more}")

    def _refresh(self, lookup: Lookup) -> None:
        if lookup._owner is not self:
            raise ValueError("the Lookup belongs to another dictionary")
        moves = self._moves
        if lookup._moves != moves:
            lookup._ids = self._look_up(lookup.names)
            numbers = np.unique(table_of(lookup._ids))
            lookup._table = self._tables[numbers[0]] if len(numbers) == 1 else None
            lookup._rows = torch.from_numpy(row_of(lookup._ids))
            lookup._moves = moves  # at last: whoever stops this has a Lookup that is looked up again
        if lookup._table is not None:
            device = self._parameter(lookup._table).device
            if lookup._rows.device != device and device.type != "meta":
                lookup._rows = lookup._rows.to(device)
            lookup._on_cpu = lookup._rows.is_cpu

    def lookup(self, names: Names) -> Lookup:
        """Look names up once, to gather them in every step. **O(m)** for ``m`` names.

        Parameters
        ----------
        names
            Names that are there.

        Returns
        -------
        Lookup
            What :meth:`gather`, :meth:`indices`, :meth:`scatter` and the other methods for many names take.

        Raises
        ------
        KeyError
            If a name is not there.

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
            made = Lookup(self, as_list(names))
            self._refresh(made)
            return made

    def isin(self, names: Names) -> Tensor:
        """Tell which of many names are there: bool ``[len(names)]``, on the CPU. **O(m)** for ``m`` names."""
        return torch.from_numpy(self._index.indices(names, missing=-1) >= 0)

    def indices(
        self,
        names: Names | Lookup,
        *,
        missing: Missing = "error",
        init: Initialiser | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the rows that many names have in their table, for ``embedding_bag`` and the like. **O(m)**.

        They hold until a name is removed or moved to another table, the rows are compacted or put into groups, or other
        names are loaded; not for ever. Which table they are of, they do not tell: where there are several of a shape
        (of frozen names, of groups of options), :meth:`gather` finds it for each name.

        Parameters
        ----------
        names, missing, init, shape, dtype
            As for :meth:`gather`; a missing name that counts as zeros has the row -1.

        Returns
        -------
        torch.Tensor
            int64 of shape ``[len(names)]``, on the device of the table; with ``missing="skip"`` fewer.

        Raises
        ------
        KeyError
            If names are missing and nothing else is asked for.
        ValueError
            If the names lie in more than one table.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
        >>> rows = sd.indices(["c", "a", "a"])
        >>> torch.nn.functional.embedding_bag(rows, sd.table((3,)), torch.tensor([0, 1]), mode="sum").tolist()
        [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]

        """
        with self._lock:
            ids = self._look_up(names, missing, init, shape, dtype)
            if isinstance(names, Lookup) and names._table is not None:
                return names._rows.clone()  # what a Lookup knows is not for others to change
            present = ids[ids >= 0]
            if len(present) == 0:
                return torch.from_numpy(ids)
            number = table_of(int(present[0]))
            if (table_of(present) != number).any():
                raise ValueError("the names lie in more than one table: gather them, or ask for those of one at a time")
            device = self._parameter(self._tables[number]).device
            rows = torch.from_numpy(np.where(ids < 0, ids, row_of(ids)))
            return rows if device.type == "meta" else rows.to(device)

    # -- gathering and scattering --------------------------------------------------------------------------------------

    def gather(
        self,
        names: Names | Lookup,
        *,
        sparse: bool = False,
        missing: Missing = "error",
        init: Initialiser | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the rows of many names as one differentiable tensor. **O(m)** for ``m`` names.

        The backward pass with a dense gradient is **O(capacity)**, as that of any embedding; with ``sparse=True`` it is
        **O(m)**.

        Parameters
        ----------
        names
            A list, tuple, NumPy array or other iterable of ``str``, or a Lookup; all of one shape and dtype. The
            gradients of a name that is listed twice add up.
        sparse
            Whether the table gets a sparse gradient, which SparseAdam, SGD and Adagrad take.
        missing
            What becomes of names that are not there: ``"error"``; ``"skip"``, they are left out; ``"zero"``, a row of
            zeros that gets no gradient; ``"insert"``, they are inserted first, at the end, in order.
        init
            What gives new rows their values in place, as those of ``torch.nn.init`` do: it is called with one tensor
            ``[new names, *shape]`` of zeros. Without it they stay zeros. What it returns is not used.
        shape, dtype
            Of new rows, of rows of zeros, and of a result without rows, where it cannot be told from the names that are
            there, or from the only table that there is.

        Returns
        -------
        torch.Tensor
            ``[len(names), *shape]``; with ``"skip"`` as many rows as there are names that are there.

        Raises
        ------
        KeyError
            If names are missing and nothing else is asked for; it counts them and lists some.
        ValueError
            If the names have different shapes or dtypes, or the shape of new ones is not known; or if ``init`` returned
            new values instead of writing them.
        RuntimeError
            If new names need a larger table, or old rows, and an optimizer that is not attached has stepped on it.

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
        _check_missing(missing)
        with self._lock:
            if not isinstance(names, Lookup):
                names = listed(names)
            while True:
                moves = self.__dict__["_moves"]
                gathered = self._gather(names, sparse, missing, init, shape, dtype)
                # Else a finalizer has moved rows on this very thread, after they were looked up.
                if self.__dict__["_moves"] == moves:
                    return gathered

    def _gather(
        self,
        names: Sequence[str] | Lookup,
        sparse: bool,
        missing: Missing,
        init: Initialiser | None,
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        if isinstance(names, Lookup):
            table = _table_of_all(self, names)
            if table is not None:
                return gather_rows(table, names._rows, sparse)
            return self._gather_ids(names._ids, sparse, shape, dtype)
        number, rows = find_rows(self._index, names)
        if number >= 0:
            table = self._parameter(self._tables[number])
            found = torch.from_numpy(rows)
            return gather_rows(table, found if table.is_cpu else found.to(table.device), sparse)
        ids = self._without_missing(names, rows, missing, init, shape, dtype)
        return self._gather_ids(ids, sparse, shape, dtype)

    def _gather_ids(self, ids: Rows, sparse: bool, shape: Sequence[int] | None, dtype: torch.dtype | None) -> Tensor:
        numbers = table_of(ids)
        if len(ids) and ids[0] >= 0 and (numbers == numbers[0]).all():
            table = self._parameter(self._tables[numbers[0]])
            return gather_rows(table, torch.from_numpy(row_of(ids)).to(table.device), sparse)
        present = np.unique(numbers[numbers >= 0])
        if len(present) == 0:
            what = "names that are not there" if len(ids) else "a result of no names"
            kind = self._kind_to_insert(shape, dtype, what, frozen=True)
            fitting = [number for one, number in self._numbers().items() if one._replace(group=0) == kind]
            if not fitting or self._device().type == "meta":
                return torch.zeros((len(ids), *kind.shape), dtype=kind.dtype, device=self._device())
            # Of no rows of a table, so that a batch without a known name has a backward pass like any other.
            present = np.array(fitting[:1])
        tables = [self._parameter(self._tables[number]) for number in present]
        kinds = {(tuple(table.shape[1:]), table.dtype) for table in tables}
        if len(kinds) > 1:
            listed = " and ".join(sorted(str(Kind(*kind)) for kind in kinds))
            raise ValueError(f"expected names of one shape and dtype, got {listed}")
        owners = np.searchsorted(present, numbers)
        owners[ids < 0] = -1
        return gather_tables(tables, owners, row_of(ids), sparse)

    @torch.no_grad()
    @untraced
    def scatter(self, names: Names | Lookup, values: Tensor, *, missing: Literal["error", "insert"] = "error") -> None:
        """Copy values into the rows of many names. **O(m)** for ``m`` names.

        Parameters
        ----------
        names
            As for :meth:`gather`. Of a name that is listed twice one of the values is kept.
        values
            ``[len(names), *shape]``.
        missing
            Whether missing names are an error, or are inserted at the end, in order.

        Raises
        ------
        KeyError
            If names are missing and not to be inserted.
        TypeError
            If the values are no dense tensor, or have another dtype than a row.
        ValueError
            If there are more or fewer values than names, or their shape is another. Then nothing has changed.

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
            raise ValueError("expected a value a name, got a single number")
        if not isinstance(names, Lookup):
            names = as_list(names)
        if len(names) != len(values):
            raise ValueError(f"expected a value a name, got {len(values)} values for {len(names)} names")
        with self._lock.change():
            ids = self._look_up(names, "error" if isinstance(names, Lookup) or missing == "error" else "zero")
            numbers = np.unique(table_of(ids[ids >= 0]))
            for number in numbers:
                self._refuse_foreign(self._tables[number], "write rows")
                kind = self._kind(self._tables[number])
                if kind.shape != tuple(values.shape[1:]):
                    raise ValueError(f"expected rows of shape {list(kind.shape)}, got {list(values.shape[1:])}")
                if kind.dtype != values.dtype:
                    raise TypeError(f"expected values of {kind.dtype}, as the rows have, got {values.dtype}")
            if any(share_memory(values, self._parameter(table)) for table in self._tables):
                values = values.clone()  # of which a row may be written before it is read

            def note(changes: Changes) -> None:
                for number in numbers:
                    there = np.flatnonzero(table_of(ids) == number)
                    part = values if len(there) == len(ids) else values[torch.from_numpy(there).to(values.device)]
                    note_rows(changes, self._parameter(self._tables[number]), row_of(ids[there]), part)

            absent = np.flatnonzero(ids < 0)
            if isinstance(names, list) and len(absent):

                def fill(new: Tensor) -> None:
                    places = absent if len(new) == len(absent) else _each_once(names, absent)
                    whole = len(places) == len(values)
                    new.copy_(values if whole else values[torch.from_numpy(places).to(values.device)])

                self._insert_missing(names, fill, tuple(values.shape[1:]), values.dtype, note)
            else:
                changes = Changes()
                note(changes)
                changes.make()

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, *, requires_grad: bool | None = None
    ) -> Tensor:
        """Return the Parameter whose rows are the entries of a shape and dtype. **O(tables)**.

        There may be several: of frozen entries, of groups of options, after moves to another dtype, or of a file that
        has several. Then it is the one that has names, or, if none has, the first that is trained. It is an error if
        several have names, because a row of :meth:`indices` is another name's in the wrong table.

        Parameters
        ----------
        shape
            Of an entry.
        dtype
            By default torch's default dtype, or, where no table of this shape has that, the only one that there is.
        requires_grad
            Whether it is the table of the entries that require gradients, or that of the others; by default either.

        Returns
        -------
        torch.nn.Parameter
            ``[capacity, *shape]``, with rows that have no name. :meth:`indices` returns the rows of names.

        Raises
        ------
        KeyError
            If there is none.
        ValueError
            If names lie in several. :meth:`gather` finds the table of each name; ``get_parameter`` takes the name of a
            table; ``StackedParameterDict(sd.named_state_dict())`` has one for all.
        """
        wanted = Kind(as_shape(shape), dtype or torch.get_default_dtype(), requires_grad is not False)
        parameters = [(table, self._parameter(table)) for table in self._tables]
        of_shape = [(table, one) for table, one in parameters if tuple(one.shape[1:]) == wanted.shape]
        dtypes = {one.dtype for _, one in of_shape}
        # The only one that there is, unless another is asked for.
        wanted_dtypes = dtypes if dtype is None and len(dtypes) == 1 else {wanted.dtype}
        fitting = [
            (table, one)
            for table, one in of_shape
            if one.dtype in wanted_dtypes and requires_grad in (None, one.requires_grad)
        ]
        if len(fitting) > 1:
            # A sort keeps the order of those that are alike.
            fitting = sorted(fitting, key=lambda found: not found[1].requires_grad)
            with_names = [(table, one) for table, one in fitting if len(table.rows)]
            if len(with_names) > 1:
                listed = ", ".join(repr(table.attribute) for table, _ in with_names)
                raise ValueError(
                    f"expected one table of {wanted} with names, got {listed}: a row of one is another name's in the "
                    "others. gather(names) finds the table of each name, get_parameter(table) gives the one of a name, "
                    "and requires_grad= chooses between those that require gradients and those that do not"
                )
            fitting = with_names or fitting
        for _, parameter in fitting:
            return parameter
        raise KeyError(f"no table of {wanted}")

    @untraced
    def reserve(
        self,
        count: int,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for ``count`` more names, so that they can be inserted with no growth. **O(n + count)**.

        An empty dictionary gets its first table in this way, so that an optimizer can be made of it.

        Parameters
        ----------
        count
            The number of names to come.
        shape, dtype
            Of their rows; may be left out where there is only one table.
        device
            Of a table that does not exist yet; by default that of the others.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict()
        >>> sd.reserve(1000, shape=(16,))
        >>> len(sd), sd.table((16,)).shape
        (0, torch.Size([1000, 16]))

        """
        if not isinstance(count, int):
            raise TypeError(f"expected a number of names, got {count!r}")
        if count < 0:
            raise ValueError(f"count must be 0 or more, got {count}")
        with self._lock.change():
            kind = self._kind_to_insert(shape, dtype)
            refuse_integers(kind.dtype)
            place = self._device() if device is None else torch.device(device)
            tables, changes = len(self._tables), Changes()
            try:
                table = self._tables[self._table_for(kind, place, self._numbers())]
                wanted = table.rows.used + count - table.rows.reused(count)
                if wanted > len(self._parameter(table)):
                    self._rearrange(changes, table, wanted, None)
                    changes.make()
            except BaseException:
                while not changes.made and len(self._tables) > tables:
                    self._remove_last_table()
                raise

    @untraced
    def compact(self) -> None:
        """Give the rows the order of the names, and the memory of all other rows back. **O(n)**.

        Gradients, frozen rows and the state of attached optimizers move along, and each Lookup notices it. Not for use
        between a forward pass and its backward pass: gradients that are still to come would reach other rows.

        Raises
        ------
        RuntimeError
            If an optimizer that is not attached has state for the rows.
        """
        with self._lock.change():
            ids = self._index.indices()
            numbers = table_of(ids)
            for number, table in enumerate(self._tables):
                there = np.flatnonzero(numbers == number)
                rows, parameter = row_of(ids[there]), self._parameter(table)
                packed = np.arange(len(rows))
                if len(rows) == len(parameter) and (rows == packed).all():
                    continue
                if averages_with(self):
                    raise RuntimeError(
                        "cannot compact: an average of this dictionary (AveragedModel), or what it is an average of, "
                        "has names in the same rows. Make the average after it"
                    )
                ids[there] = id_of(number, packed)
                changes = Changes()
                self._rearrange(changes, table, len(rows), torch.from_numpy(rows))
                changes.set_attributes(table, rows=TableRows(len(rows)))
                changes.call(replace_ids, self._index, ids)
                self._moved(changes)
                changes.make()


def _each_once(names: list[str], places: Rows) -> Rows:
    """Return a place of each of the names at some places, in the order in which they come first."""
    chosen = dict(zip(map(names.__getitem__, places), places.tolist(), strict=True))
    return np.fromiter(chosen.values(), np.int64, len(chosen))


def _check_missing(missing: str) -> None:
    if missing not in ("error", "skip", "zero", "insert"):
        raise ValueError(f"missing must be 'error', 'skip', 'zero' or 'insert', got {missing!r}")


def _table_of_all(stacked: GatheredRows, lookup: Lookup) -> Tensor | None:
    """Return the table that all names of a Lookup lie in, whose rows are up to date then; None if there is no such one.

    This is all that a Lookup costs in every step: it looks up no attribute through ``Module.__getattr__``, which takes
    several times as long as in a dict, and makes no ``torch.device``.
    """
    state = stacked.__dict__
    if lookup._owner is not stacked or lookup._moves != state["_moves"]:
        stacked._refresh(lookup)
    table = lookup._table
    if table is None:
        return None
    parameter: Tensor | None = state["_parameters"].get(table.attribute)
    if parameter is None or table.frozen is not None:
        parameter = stacked._parameter(table)
    if not (lookup._on_cpu and parameter.is_cpu):
        stacked._refresh(lookup)
    return parameter
