"""Tables whose rows have names: inserted and removed, many in one call, all of them or none.

An *id* is what the index keeps for a name: the number of its table in the upper bits, and its row in the lower 40. So
one native call turns a batch of names into tables and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import IndexMap, insert_ids, missing_names, remove_names, sort_tensors
from pdrs._rows.averages import refuse_mixing
from pdrs._rows.row_ids import ROW_BITS, ROW_MASK, id_of, row_of, table_of
from pdrs._rows.store import Kind, Rows, Tables
from pdrs._rows.write import note_rows, stack, write_rows
from pdrs._torch import huge_pages
from pdrs._torch.names import Mask, Names, as_list, is_mask
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

__all__ = [
    "Initialiser",
    "NamedRows",
    "as_shape",
    "initialise",
    "partition",
    "refuse_integers",
]

Initialiser = Callable[[Tensor], Any]

_EMPTY = 'parameter name can\'t be empty string ""'


def as_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; TypeError for what is none, such as a number, which an embedding takes as its size."""
    if isinstance(shape, int):
        raise TypeError(f"expected the shape of an entry, such as ({shape},), got the number {shape}")
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"expected the shape of an entry as a sequence of int, got {shape!r}")
    return tuple(shape)


def refuse_integers(
    dtype: torch.dtype, instead: str = "insert torch.nn.Parameter(tensor, requires_grad=False)"
) -> None:
    """Raise RuntimeError if entries of a dtype cannot require gradients; ``instead`` is what to do then."""
    if not (dtype.is_floating_point or dtype.is_complex):
        raise RuntimeError(
            f"only tensors of floating point or complex dtype can require gradients, got {dtype}: {instead}"
        )


def initialise(values: Tensor, init: Initialiser) -> None:
    """Call ``init`` on zeros; ValueError if it has made a tensor of its own instead, which would be lost."""
    made = init(values)
    if (
        isinstance(made, Tensor)
        and made.shape == values.shape
        and made.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
        and not values.any()
    ):
        raise ValueError(
            "init must give the new rows their values in place, as torch.nn.init.normal_ does; it returned another "
            "tensor and left them zero"
        )


class NamedRows(Tables):
    """Tables, and an index of the names that their rows have."""

    if TYPE_CHECKING:
        _index: IndexMap
        # Counts what changes the row of a name that is there, and what adds names.
        _moves: int
        _inserts: int

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_index=IndexMap(), _moves=0, _inserts=0)

    def _moved(self, changes: Changes) -> None:
        changes.set_attributes(self, _moves=self._moves + 1)

    def _row(self, id_: int) -> Tensor:
        return self._parameter(self._tables[id_ >> ROW_BITS])[id_ & ROW_MASK]  # no calls: this is for each `sd[name]`

    # -- inserting -----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return self._parameter(self._tables[0]).device if self._tables else torch.get_default_device()

    def _groups_of(self, names: list[str]) -> list[int] | None:
        """Return the number of the group of options of each name; None if all are 0."""
        return None

    def _kind_to_insert(
        self,
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
        of_what: str = "names that are not there",
        frozen: bool = False,
    ) -> Kind:
        """Return the kind that is asked for, or that of the only table that can be meant: ``frozen``, also of these."""
        shape = None if shape is None else as_shape(shape)
        kinds = {self._kind(table)._replace(group=0) for table in self._tables}
        all_fitting = {kind for kind in kinds if (shape is None or kind.shape == shape) and dtype in (None, kind.dtype)}
        fitting = {kind for kind in all_fitting if kind.trainable} or (all_fitting if frozen else set())
        if len(fitting) == 1:
            return fitting.pop()
        if shape is None:
            none = "no table is trainable" if self._tables else "there is no table yet"
            which = f"{len(fitting)} tables could be meant" if fitting else none
            raise ValueError(f"expected shape=, that of {of_what}, because {which}")
        return Kind(shape, dtype or torch.get_default_dtype())

    @untraced
    def _insert_missing(
        self,
        names: Names,
        init: Initialiser | None,
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
        and_then: Callable[[Changes], None] | None = None,
    ) -> None:
        """Insert the names that are not there, in order, within a change; ``and_then`` is for :meth:`_carry_out`."""
        new = missing_names(self._index, names)
        if "" in new:
            raise KeyError(_EMPTY)
        kind = self._kind_to_insert(shape, dtype)
        refuse_integers(kind.dtype)
        values = huge_pages.full((len(new), *kind.shape), 0, dtype=kind.dtype, device=self._device())
        if init is not None:
            with torch.no_grad():
                initialise(values, init)
        groups = np.array(self._groups_of(new) or np.zeros(len(new), np.int64))
        plan = []
        for group in np.unique(groups):
            there = np.flatnonzero(groups == group)
            part = values if len(there) == len(values) else values[torch.from_numpy(there).to(values.device)]
            plan.append(_Part(kind._replace(group=int(group)), there, np.empty(0, np.int64), part))
        self._carry_out(new, np.full(len(new), -1), plan, and_then)

    @untraced
    def _insert(self, names: list[str], values: list[Any], distinct: bool = False) -> None:
        """Set entries, within a change: all, or, if one cannot be taken, none."""
        names = as_list(names)
        if "" in names:
            raise KeyError(_EMPTY)
        kinds, classes = self._classes(names, values)
        if not distinct and len(set(names)) != len(names):
            last = {name: at for at, name in enumerate(names)}
            names, kept = list(last), list(last.values())
            values, kinds = [values[at] for at in kept], kinds[kept]
        held = self._index.indices(names, missing=-1)
        groups = self._groups_of(names)
        # What decides where an entry goes: what it is, where it lies now, and its group of options.
        columns = [kinds, table_of(held)]
        if groups is not None:
            columns.append(np.array(groups))
        plan, numbers = [], self._numbers()
        devices: dict[Kind, torch.device] = {}
        for place, there in partition(columns):
            class_, number = classes[int(place[0])], int(place[1])
            group = int(place[2]) if groups is not None else 0
            kind = self._kind_for(names[there[0]], class_, number, group, numbers)
            stays = number >= 0 and self._kind(self._tables[number]) == kind
            first = devices.setdefault(kind, class_.device)
            if first != class_.device and kind not in numbers:
                raise ValueError(
                    f"expected a tensor on {first} for '{names[there[0]]}', as others that go to its new table, "
                    f"got {class_.device}"
                )
            old = held[there] if number >= 0 else np.empty(0, np.int64)
            chosen = values if len(there) == len(values) else [values[at] for at in there]
            plan.append(_Part(kind, there, old, chosen, stays))
        self._carry_out(names, held, plan)

    def _classes(self, names: list[str], values: list[Any]) -> tuple[Rows, list[_Class]]:
        """Return the class of each value, and what the classes are; TypeError if a value is no tensor."""
        kinds, firsts = sort_tensors(values)
        classes = [_Class(values[at]) for at in firsts]
        for at in np.flatnonzero(kinds < 0):
            value = values[at]
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                what = type(value).__name__ if not isinstance(value, Tensor) else f"one of layout {value.layout}"
                raise TypeError(
                    f"expected a strided tensor for '{names[at]}', got {what}: a StackedParameterDict holds rows of "
                    "tables; pdrs.ParameterDict holds Modules and other values, too"
                )
            class_ = _Class(value)
            if class_ not in classes:
                classes.append(class_)
            kinds[at] = classes.index(class_)
        for class_ in classes:
            if class_.trainable is not False:
                refuse_integers(class_.dtype)
        return kinds, classes

    def _kind_for(self, name: str, class_: _Class, number: int, group: int, numbers: dict[Kind, int]) -> Kind:
        """Return the kind of the table for a value, where ``number`` is the table that the entry lies in, or -1."""
        trainable = class_.trainable is not False
        if number >= 0:
            held = self._parameter(self._tables[number])
            if held.dtype != class_.dtype:
                raise TypeError(f"expected {held.dtype} for '{name}', as its row has, got {class_.dtype}")
            if class_.trainable is None:
                trainable = held.requires_grad
        kind = Kind(class_.shape, class_.dtype, trainable, group)
        there = numbers.get(kind)
        if there is not None:
            device = self._parameter(self._tables[there]).device
            if device != class_.device:
                raise ValueError(
                    f"expected a tensor on {device} for '{name}', where its table lies, got {class_.device}"
                )
        return kind

    def _carry_out(
        self, names: list[str], held: Rows, plan: list[_Part], and_then: Callable[[Changes], None] | None = None
    ) -> None:
        """Set entries whose names are distinct; ``held`` are their ids, -1 for new ones.

        What ``and_then`` notes, when the tables have the room that they will have, is changed in the same step.
        """
        tables, numbers, changes = len(self._tables), self._numbers(), Changes()
        try:
            for number in {table_of(int(part.held[0])) for part in plan if len(part.held) and not part.stays}:
                self._take_back(self._tables[number])  # before anything is noted that is to be written to it
            blocks, prepared = [], []
            for part in plan:
                like = part.values if isinstance(part.values, Tensor) else part.values[0].detach()[None]
                number = table_of(int(part.held[0])) if part.stays else self._table_for(part.kind, like.device, numbers)
                if part.stays:
                    self._refuse_foreign(self._tables[number], "set names")
                block = part.values if isinstance(part.values, Tensor) else stack(part.values, like)
                # That of one tensor is the tensor itself, which may be a row that another part writes to.
                blocks.append(block.clone() if len(plan) > 1 and len(block) == 1 else block)
                prepared.append((number, part.stays))
            # Several parts may go to one table.
            wanted: dict[int, int] = {}
            for part, (number, stays) in zip(plan, prepared, strict=True):
                wanted[number] = wanted.get(number, 0) + (0 if stays else len(part.there))
            rows = {number: self._make_room(self._tables[number], count) for number, count in wanted.items()}
            ids = held.copy()
            taken = dict.fromkeys(rows, 0)
            placed = []
            for part, (number, stays) in zip(plan, prepared, strict=True):
                if stays:
                    placed.append(row_of(part.held))
                else:
                    new = rows[number][taken[number] : taken[number] + len(part.there)]
                    taken[number] += len(part.there)
                    ids[part.there] = id_of(number, new)
                    placed.append(new)
            if "_averages" in self.__dict__:
                refuse_mixing(self, names, ids, tables)
            writes: list[tuple[Tensor, Rows, Tensor]] = []
            for new, block, (number, stays) in zip(placed, blocks, prepared, strict=True):
                parameter = self._parameter(self._tables[number])
                if stays:
                    writes.append((parameter, new, block))
                else:
                    write_rows(parameter, new, block)
                    self._begin(self._tables[number], new)
            changes.call(insert_ids, self._index, names, ids)
            for parameter, rows_of, block in writes:
                note_rows(changes, parameter, rows_of, block)
            for number, count in wanted.items():
                changes.call(self._tables[number].rows.take, count)
            gone = held[(held >= 0) & (held != ids)]
            if len(gone):
                self._free(changes, gone)
            changes.set_attributes(self, _inserts=self._inserts + 1)
            if and_then is not None:
                and_then(changes)
            changes.make()
        except BaseException:
            while not changes.made and len(self._tables) > tables:
                self._remove_last_table()
            raise

    # -- removing ------------------------------------------------------------------------------------------------------

    def select(self, mask: Mask) -> list[str]:
        """Return the names, in order, at whose places a mask is true. **O(n)**.

        Parameters
        ----------
        mask
            bool ``[n]``: a tensor, an array, a column of another library, or a list.

        Raises
        ------
        TypeError
            If it holds anything but bool.
        ValueError
            If it is of another length.

        Examples
        --------
        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.tensor([[3.0], [0.1], [-2.0]]))
        >>> sd.select(sd.norms() > 1)
        ['a', 'c']

        """
        with self._lock:
            return self._index.select(mask)

    @untraced
    def drop(self, names: Names | Mask) -> None:
        """Remove many entries at once; the order of the others stays. **O(m)** for ``m`` names.

        Their rows, gradients and what attached optimizers remember of them become zero.

        Parameters
        ----------
        names
            Names that are there, each once; or a mask, as :meth:`select` takes it, which is **O(n)**.

        Raises
        ------
        KeyError
            If a name is not there, or is listed twice; then none has been removed.
        TypeError, ValueError
            If these are neither names nor a mask for all names.

        Examples
        --------
        Prune the names with the smallest norms:

        >>> import torch, pdrs
        >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.tensor([[3.0], [0.1], [-2.0]]))
        >>> sd.drop(sd.norms() < 1)
        >>> list(sd)
        ['a', 'c']

        """
        with self._lock:
            gone = self._index.select(names) if is_mask(names) else as_list(names)
            with self._lock.change():
                ids = self._index.indices(gone, missing=-1)
                changes = Changes()
                changes.call(remove_names, self._index, gone)  # which refuses what cannot be removed
                self._free(changes, np.unique(ids[ids >= 0]) if ids.min(initial=0) < 0 else ids)
                changes.make()

    @untraced
    def _free(self, changes: Changes, ids: Rows) -> None:
        """Take back rows whose names are gone, and clear them, and what belongs to them."""
        self._moved(changes)
        numbers = table_of(ids)
        for number in np.unique(numbers):
            table = self._tables[number]
            rows = row_of(ids[numbers == number])
            table.rows.reserve_free()  # which may fail, and giving back must not
            changes.call(table.rows.give_back_many, rows)
            self._clear_rows(changes, table, rows)


class _Class:
    """What tensors that go to one table have in common; ``trainable`` is None for those that are no Parameters."""

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(value.shape), value.dtype, value.device
        self.trainable = value.requires_grad if isinstance(value, Parameter) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class _Part:
    """Entries that go to one table: their places in the list of names, their values, and the ids that they have."""

    def __init__(self, kind: Kind, there: Rows, held: Rows, values: list[Tensor] | Tensor, stays: bool = False) -> None:
        self.kind, self.there, self.held, self.values, self.stays = kind, there, held, values, stays


def partition(columns: list[Rows]) -> list[tuple[Rows, Rows]]:
    """Return the distinct rows of some columns, and the places where each stands, ascending."""
    if len(columns[0]) == 0:
        return []
    if all((column == column[0]).all() for column in columns):
        return [(np.array([column[0] for column in columns]), np.arange(len(columns[0])))]
    distinct, which = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(which.reshape(-1)))[:-1]
    return list(zip(distinct, np.split(order, ends), strict=True))
