"""Tables that grow: a Module whose parameters are tensors ``[capacity, *shape]``, and whose rows are given and freed.

A table stays the same Parameter when it grows (its ``.data`` is replaced), so optimizers keep their reference. What
belongs to its rows goes along: the gradient, the mask of frozen rows, and the state of attached optimizers. Rows that
have no name are zero: removal clears them, and so does the next use, if anything has written to them meanwhile.

This layer knows rows and no names.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, Parameter

from pdrs._core import Lock, TableRows, zero_row
from pdrs._rows import optimizer_state, step_warnings
from pdrs._rows.accumulation import Accumulation
from pdrs._rows.initial_state import Beginning, declare
from pdrs._rows.sparse_gradient import GradientRows, moved_rows
from pdrs._rows.write import by_bits, note_zeros
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Kind", "Rows", "Table", "Tables", "is_sharded", "mask_device", "whole"]

Rows = NDArray[np.int64]

# How many free rows are looked at at a time.
_PIECE = 1 << 15

if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(
        before=Lock.before_fork,
        after_in_parent=Lock.after_fork_in_parent,
        after_in_child=Lock.after_fork_in_child,
    )


class Kind(NamedTuple):
    """What the rows of one table have in common."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    group: int = 0

    def attribute(self) -> str:
        """Return the name under which the table is registered, if that is free."""
        size = "x".join(map(str, self.shape)) or "scalar"
        name = f"{str(self.dtype).removeprefix('torch.')}_{size}"
        if self.group:
            name += f"_group{self.group}"
        return name if self.trainable else f"{name}_no_grad"

    def __str__(self) -> str:
        """Describe it in an error."""
        return f"{str(self.dtype).removeprefix('torch.')} of shape {list(self.shape)}"


# The name of the Parameter, the group, how many rows were ever given, the free ones of them as int64, and the mask.
_PlainTable = tuple[str, int, int, bytes | None, Tensor | None]


class Table:
    """What is known of a table beside its Parameter.

    Parameters
    ----------
    attribute
        The name under which the Parameter is registered.
    group
        The number of the group of options that an optimizer has for its rows.
    """

    # Where rows lie in the sparse gradient that was last looked through.
    gradient_rows: GradientRows | None = None
    # The number of the hooks that count: others were left by what stopped :meth:`hook` half-way.
    hooks_made = 0
    # What shares the memory of the table, and was given to others together with the names as they were then.
    lent: list[weakref.ref[Tensor]] | None = None
    # Where the table lay, and what torch had counted, when its free rows were last seen to be zero.
    cleared: tuple[int, int] | None = None

    def __init__(self, attribute: str, group: int = 0) -> None:
        self.attribute = attribute
        self.group = group
        self.rows = TableRows()
        # bool [capacity]: rows whose gradient is masked, if there are any.
        self.frozen: Tensor | None = None
        # The Parameter that has hooks, and what removes them.
        self.hooked: weakref.ref[Tensor] | None = None
        self.handles: list[Any] = []
        # Set when the table has changed its size: a graph from before may still bring a gradient of the old size.
        self.resized = False
        self.accumulation = Accumulation(resized_gradient)
        # Whether it has been loaded since optimizers were last looked for, which may have been loaded, too.
        self.loaded = False

    @untraced
    def to_plain(self) -> _PlainTable:
        """Return what is pickled and copied of it: nothing that belongs to this very Parameter."""
        free = self.rows.free().astype("<i8").tobytes()
        frozen = None if self.frozen is None else self.frozen.clone()
        return self.attribute, self.group, self.rows.used, free or None, frozen

    @untraced
    def restore(self, plain: _PlainTable, capacity: int) -> None:
        """Take what :meth:`to_plain` returned; ValueError if a Parameter of this capacity has no such rows."""
        _, _, used, free_bytes, frozen = plain
        free = np.frombuffer(free_bytes or b"", "<i8")
        ascending = not len(free) or (free[0] >= 0 and free[-1] < used and (np.diff(free) > 0).all())
        if not 0 <= used <= capacity or not ascending:
            raise ValueError(f"the table '{self.attribute}' has {capacity} rows, but not those that were pickled")
        self.rows, self.frozen = TableRows(used), frozen
        self.rows.give_back_many(free.astype(np.int64))
        self.loaded = True  # whoever copies the optimizer, too, has one with state for the copy

    # -- the hooks of the Parameter ------------------------------------------------------------------------------------

    def hook(self, parameter: Tensor, wanted: bool = False) -> None:
        """Make the Parameter mask and resize its gradients, where that is needed, or ``wanted`` because it will be."""
        wanted = wanted or self.frozen is not None or self.resized
        there = self.hooked is not None and self.hooked() is parameter
        if wanted == there or (wanted and not _can_be_hooked(parameter)):
            return
        self.unhook()
        if wanted:
            self.hooks_made += 1
            which = weakref.ref(self), self.hooks_made
            trainable = parameter.requires_grad
            try:
                parameter.requires_grad_()  # torch asks for it; whoever has taken it away may give it back
                before = parameter.register_hook(partial(_before_accumulation, which))  # type: ignore[no-untyped-call]
                after = parameter.register_post_accumulate_grad_hook(partial(_after_accumulation, which))  # type: ignore[no-untyped-call]
                self.handles = [before, after]
                self.hooked = weakref.ref(parameter)
            finally:
                parameter.requires_grad_(trainable)
            # In front of the user's, such as one that steps an optimizer, which are to see the gradient that counts.
            # torch goes through them as through a dict, past `move_to_end` of an OrderedDict.
            changes = Changes()
            for handle in self.handles:
                hooks = handle.hooks_dict_ref()
                changes.replace_all(hooks, {handle.id: hooks[handle.id], **hooks})
            changes.make()

    def keep_node(self, parameter: Tensor) -> None:
        """Be ready for gradients of the size that the Parameter has now, and loses."""
        self.resized = True
        self.hook(parameter)
        if self.hooked is not None and self.hooked() is parameter:
            self.accumulation.keep_node(parameter)
            self.accumulation.gate_hooks(parameter, self._hooks())

    def _hooks(self) -> list[Any]:
        return [handle.hooks_dict_ref()[handle.id] for handle in self.handles]

    def unhook(self) -> None:
        """Remove the hooks of the Parameter that has them."""
        self.hooked = None
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.accumulation = Accumulation(resized_gradient)  # whose nodes refer to the Parameter


def _can_be_hooked(parameter: Tensor) -> bool:
    # Not what stands in for it: a shard of FSDP2, which comes back as a Parameter for each forward pass, or a tensor of
    # `functional_call`.
    if not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor:
        return False
    return parameter.is_floating_point() or parameter.is_complex()


def mask_device(device: torch.device) -> torch.device:
    """Return where the mask of frozen rows lies: with its table, but not on the meta device, which would forget it."""
    return torch.device("cpu") if device.type == "meta" else device


def is_sharded(tensor: Tensor) -> bool:
    """Whether a table, or its gradient, is one that FSDP2 has sharded."""
    return type(tensor.data) is not Tensor and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a table, or its gradient; one that is sharded is put together, for which all processes must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _shard_of(parameter: Any, rows: Rows) -> tuple[Tensor, Rows]:
    """Return what this process has of a sharded table, and which rows of it are some rows of the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    own = rows - offset[0]
    return parameter.to_local(), own[(own >= 0) & (own < shape[0])]


def _hooked_table(which: tuple[weakref.ref[Table], int]) -> Table | None:
    table = which[0]()
    return table if table is not None and table.hooks_made == which[1] else None


def _before_accumulation(which: tuple[weakref.ref[Table], int], gradient: Tensor) -> Tensor | None:
    table = _hooked_table(which)
    parameter = table.hooked() if table is not None and table.hooked is not None else None
    if table is None or parameter is None:
        return None
    return table.accumulation.before(parameter, gradient, table._hooks())


def _after_accumulation(which: tuple[weakref.ref[Table], int], parameter: Tensor) -> None:
    table = _hooked_table(which)
    if table is None or not table.accumulation.after(parameter):
        return
    gradient = parameter.grad
    if gradient is not None and gradient.shape != parameter.shape:  # a hook has made the table grow
        parameter.grad = None  # torch looks at the size of what it replaces
        gradient = parameter.grad = resized_gradient(gradient, len(parameter))
    if table.frozen is not None and gradient is not None and not gradient.is_meta:
        clear_gradient(gradient, table.frozen)


def resized_gradient(gradient: Tensor, capacity: int) -> Tensor:
    """Return the gradient of a table for another capacity: rows are cut off at the end, or zeros are added there."""
    size = (capacity, *gradient.shape[1:])
    if gradient.is_sparse:
        indices, values = gradient._indices(), gradient._values()
        if capacity < len(gradient):
            inside = indices[0] < capacity
            indices, values = indices[:, inside], values[inside]
        return torch.sparse_coo_tensor(
            indices,
            values,
            size,
            device=gradient.device,  # which torch.device as a context would decide
            is_coalesced=gradient.is_coalesced(),
            check_invariants=False,
        )
    return resized(gradient, capacity)


def resized(tensor: Tensor, capacity: int, fill: complex = 0) -> Tensor:
    """Return a copy of a tensor with so many rows: of the first ones, with new ones full of ``fill``."""
    made = huge_pages.full_like(tensor, capacity, None)
    kept = min(capacity, len(tensor))
    made[:kept].copy_(tensor[:kept])
    made[kept:].fill_(fill)
    return made


def clear_gradient(gradient: Tensor, mask: Tensor) -> None:
    """Set the rows of a gradient that a mask ``[capacity]`` shows to zero, in place."""
    with torch.no_grad():
        if gradient.is_sparse:
            gradient._values()[mask[gradient._indices()[0]]] = 0
        else:
            gradient[mask] = 0


def _gradient_of(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a table, which what is computed from a parametrized one does not have."""
    return parameter.grad if parameter.is_leaf else None


def _rows_of(table: Table, gradient: Tensor) -> GradientRows:
    """Return where the rows of a table lie in its sparse gradient, looked for anew if that has changed."""
    known = table.gradient_rows
    if known is None or not known.is_of(gradient):
        known = table.gradient_rows = GradientRows(gradient)
    return known


class Tables(Module):
    """A Module of tables whose rows can be taken, given back and moved."""

    if TYPE_CHECKING:  # Not at run time, nor in the classes below: torch.jit.script would read these, and fail.
        _tables: list[Table]
        _optimizers: list[weakref.ref[Optimizer]]
        _lock: Lock

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_tables=[], _optimizers=[], _lock=Lock())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, and the optimizers, which hold the Parameters of this very object."""
        with self._lock:
            state = self.__dict__.copy()
        del state["_lock"]
        state["_optimizers"] = []
        state["_tables"] = [table.to_plain() for table in self._tables]
        for key in ("_warned_of_absent", "_averages", "_is_average"):
            state.pop(key, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled or copied."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        tables = []
        for plain in state["_tables"]:
            # Frameworks rebuild modules from their own `__dict__`, too.
            table = plain if isinstance(plain, Table) else Table(plain[0], plain[1])
            if table is not plain:
                table.restore(plain, len(self._parameter(table)))
            tables.append(table)
        self.__dict__.update(_tables=tables, _lock=Lock())
        self._adopt()

    def _adopt(self) -> None:
        """Follow Parameters that may be others than before: their hooks, and the optimizers that will step on them."""
        for table in self._tables:
            parameter = self._parameter(table)
            table.hook(parameter)
            if table.frozen is not None:
                table.frozen = table.frozen.to(mask_device(parameter.device))
            self._watch(table, parameter)

    def _watch(self, table: Table, parameter: Tensor) -> None:
        optimizer_state.watch(parameter)
        step_warnings.watch(self, table, parameter)

    @contextmanager
    def _swappable(self) -> Iterator[None]:
        """Let torch swap tables where it has been told to, which it refuses where something refers to them weakly."""
        if not torch.__future__.get_swap_module_params_on_conversion():
            yield
            return
        tables = []
        for table in self._tables:
            parameter: Any = self._parameter(table)
            table.unhook()
            table.gradient_rows = None
            # torch swaps the dict of hooks, even an empty one, but not what calls the hooks that are in it.
            if not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None
            if not parameter._backward_hooks:
                parameter._backward_hooks = None
            tables.append((table, optimizer_state.unwatch(parameter)))
        try:
            yield
        finally:
            for table, steppers in tables:
                parameter = self._parameter(table)
                table.hook(parameter)
                optimizer_state.watch(parameter, steppers)

    # -- which table ---------------------------------------------------------------------------------------------------

    def _parameter(self, table: Table) -> Tensor:
        """Return the Parameter of a table, or what has taken its place: the tensor of a replica, a parametrization."""
        parameter = self._parameters.get(table.attribute)
        if parameter is None:
            return getattr(self, table.attribute)  # type: ignore[no-any-return]
        if table.frozen is not None:
            table.hook(parameter)  # it may be another than before
        return parameter

    def _refuse_foreign(self, table: Table, what: str) -> None:
        """Raise if what is written to a table would be lost, or would reach a part of it only."""
        parameter = self._parameters.get(table.attribute)
        if parameter is None:
            raise RuntimeError(
                f"the table '{table.attribute}' is computed from other tensors (by a parametrization, by pruning, for "
                f"a replica): {what} before that"
            )
        if is_sharded(parameter):
            raise RuntimeError(f"the table '{table.attribute}' is sharded: {what} before the model is sharded")
        if not isinstance(parameter, Parameter):
            raise RuntimeError(
                f"another tensor stands in for the table '{table.attribute}', as in functional_call: {what} before that"
            )

    def _kind(self, table: Table) -> Kind:
        parameter = self._parameter(table)
        return Kind(tuple(parameter.shape[1:]), parameter.dtype, parameter.requires_grad, table.group)

    def _numbers(self) -> dict[Kind, int]:
        """Return the number of the table of each kind; moves to another dtype may leave several, then the first.

        Looked up anew for each call of the user's: whoever has a table may change what it is.
        """
        numbers: dict[Kind, int] = {}
        for number, table in enumerate(self._tables):
            numbers.setdefault(self._kind(table), number)
        return numbers

    def _table_for(self, kind: Kind, device: torch.device, numbers: dict[Kind, int]) -> int:
        """Return the number of the table of a kind; make an empty one if there is none."""
        if kind in numbers:
            return numbers[kind]
        with torch.inference_mode(False):
            data = torch.zeros((0, *kind.shape), dtype=kind.dtype, device=device)
            parameter = Parameter(data, requires_grad=kind.trainable)
        numbers[kind] = self._add_table(kind.attribute(), parameter, kind.group)
        return numbers[kind]

    @untraced
    def _add_table(self, attribute: str, parameter: Parameter, group: int) -> int:
        taken, wanted = 1, attribute
        while hasattr(self, attribute):
            taken += 1
            attribute = f"{wanted}_{taken}"
        table = Table(attribute, group)
        try:
            self.register_parameter(attribute, parameter)
            self._watch(table, parameter)
            optimizers = self._attached()
            if parameter.requires_grad and optimizers:
                tables = {one.attribute: self._parameter(one) for one in [*self._tables, table]}
                pattern = self._pattern(group)
                for optimizer in optimizer_state.takers(optimizers, pattern, tables.values()):
                    optimizer_state.join(optimizer, attribute, pattern, tables)
            self._tables.append(table)
        except BaseException:
            if table not in self._tables:  # whoever asked for it removes it where it is
                self._discard_table(attribute)
            raise
        return len(self._tables) - 1

    @untraced
    def _remove_last_table(self) -> None:
        self._discard_table(self._tables.pop().attribute)

    def _discard_table(self, attribute: str) -> None:
        parameter = self._parameters.pop(attribute, None)
        for optimizer in self._attached():
            optimizer_state.leave(optimizer, parameter)

    def _pattern(self, group: int) -> str | None:
        """Return what marks the parameter group of an optimizer that is to have the tables of a group."""
        return None

    def _attached(self) -> list[Optimizer]:
        references = self._optimizers
        alive = [optimizer for reference in references if (optimizer := reference()) is not None]
        if len(alive) < len(references):
            self.__dict__["_optimizers"] = [reference for reference in references if reference() is not None]
        return alive

    @untraced
    def _refuse_strangers(self, table: Table, parameter: Tensor, optimizers: list[Optimizer], what: str) -> None:
        """Raise if an optimizer that is not attached has state by row for a table."""
        if table.loaded:
            optimizer_state.look_for_optimizers()
            table.loaded = False
        optimizer_state.refuse_strangers(parameter, optimizers, what)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _make_room(self, table: Table, count: int) -> Rows:
        """Grow a table if it must, clear what belonged to the rows to come, and show these. They are not taken yet.

        Raises
        ------
        RuntimeError
            If there is no memory, or an optimizer that is not attached would go on with state of other rows. Then
            nothing has changed.
        """
        parameter = self._parameter(table)
        capacity = table.rows.capacity_for(count, len(parameter))
        self._resize(table, capacity)
        self._refuse_foreign(table, "insert names")
        rows = table.rows.next(count)
        self._make_ready(table, rows)
        return rows

    @untraced
    def _make_ready(self, table: Table, rows: Rows | int) -> bool:
        """Clear what belonged to the rows, or the one, that will be given next, or refuse it.

        Tell whether there is more to do: see :meth:`_begin`, and what is averaged with this.
        """
        parameter, optimizers = self._parameter(table), self._attached()
        if table.rows.reused(1 if isinstance(rows, int) else len(rows)):
            self._refuse_strangers(table, parameter, optimizers, "give the row of a removed name to a new one")
        self._forget(table, parameter, optimizers, rows)
        if "_averages" in self.__dict__:
            return True
        for optimizer in optimizers:  # noqa: SIM110 - `any` of a generator costs each insertion more
            if optimizer_state.begins_with_values(optimizer, parameter):
                return True
        return False

    def _begin(self, table: Table, rows: Rows) -> None:
        """Let the state of optimizers that begins with the values of rows do so."""
        parameter, changes = self._parameter(table), Changes()
        for optimizer in self._attached():
            if optimizer_state.begins_with_values(optimizer, parameter):
                optimizer_state.forget_rows(changes, optimizer, parameter, rows)
        changes.make()

    def _resize(self, table: Table, capacity: int) -> None:
        """Change the capacity; all rows stay what they are, and zeros are added."""
        if capacity != len(self._parameter(table)):
            changes = Changes()
            self._rearrange(changes, table, capacity, None)
            changes.make()

    @untraced
    def _rearrange(self, changes: Changes, table: Table, capacity: int, source: Tensor | None) -> None:
        """Give a table another capacity and, where ``source`` is given, other rows: the old row of each, -1 for none.

        ``source`` lies on the CPU. What belongs to the rows goes along.
        """
        self._refuse_foreign(table, "insert names, reserve rows or compact")
        parameter = self._parameter(table)
        if not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor:
            raise RuntimeError(
                f"the table '{table.attribute}' is a {type(parameter.data).__name__} and cannot change its size: "
                "insert names before it becomes one"
            )
        what = "change the size of a table" if source is None else "move the rows of a table"
        self._refuse_strangers(table, parameter, self._attached(), what)
        # Before the size changes: a gradient of the old size may come from then on.
        table.keep_node(parameter)
        # A table that grows while it serves in inference mode can be trained afterwards.
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            arranged = _Arranged(parameter, capacity, source)
            data = arranged(parameter.data)
            gradient = parameter.grad
            if gradient is not None:
                gradient = arranged.sparse(gradient) if gradient.is_sparse else arranged(gradient)
            changes.set_data(parameter, data, gradient)
            if table.frozen is not None:
                changes.set_attributes(table, frozen=arranged(table.frozen))
            for optimizer in self._attached():
                for state, key, begin in optimizer_state.rows_and_beginnings(optimizer, parameter):
                    if begin == "value" and source is not None and bool((source < 0).any()):
                        raise RuntimeError(
                            f"cannot {what}: the state '{key}' of {type(optimizer).__name__} begins with the values of "
                            "new rows, which are still to come. Load the dictionary first, and make the optimizer of it"
                        )
                    value, fill = state[key], optimizer_state.fill_of(begin)
                    # Sparse is the momentum of SGD, if gradients are.
                    changes.update(state, {key: arranged.sparse(value) if value.is_sparse else arranged(value, fill)})

    def _forget(self, table: Table, parameter: Tensor, optimizers: list[Optimizer], rows: Rows | int) -> None:
        """Clear what belonged to rows, or one, that get new names: gradients, state of optimizers, masks."""
        if isinstance(rows, int):  # several times faster than with a tensor of rows
            for optimizer in optimizers:
                optimizer_state.forget_row(optimizer, parameter, rows)
            if table.frozen is not None:
                table.frozen[rows] = False
            self._clear_gradient_row(table, parameter, rows)
            return
        changes = Changes()
        self._note_forgotten(changes, table, parameter, optimizers, rows)
        changes.make()

    def _note_forgotten(
        self,
        changes: Changes,
        table: Table,
        parameter: Tensor,
        optimizers: list[Optimizer],
        rows: Rows,
        gone: bool = False,
    ) -> None:
        for optimizer in optimizers:
            optimizer_state.forget_rows(changes, optimizer, parameter, rows, gone)
        self._clear_gradient(changes, table, rows)
        if table.frozen is not None:
            changes.call(table.frozen.index_fill_, 0, torch.from_numpy(rows).to(table.frozen.device), False)

    def _clear_rows(self, changes: Changes, table: Table, rows: Rows) -> None:
        """Note that rows, whose names go, become zero, and that what belongs to them goes, too."""
        self._take_back(table)
        # What stands in for the table, or what it is computed from, is not ours to write to.
        parameter = self._parameters.get(table.attribute)
        if parameter is not None and is_sharded(parameter):
            note_zeros(changes, *_shard_of(parameter, rows))
        elif isinstance(parameter, Parameter):
            note_zeros(changes, parameter, rows)
        self._note_forgotten(changes, table, self._parameter(table), self._attached(), rows, gone=True)

    # For `pop_row`, where something else than zeros is to be written to plain tensors.

    def _clearing(self, table: Table, row: int) -> Changes:
        changes = Changes()
        self._clear_rows(changes, table, np.array([row]))
        return changes

    def _states_of_zeros(self, parameter: Tensor) -> list[dict[str, Any]] | None:
        return optimizer_state.states_of_zeros(self._optimizers, parameter)

    def _clear_free(self, table: Table, *, spare: bool = False) -> None:
        """Set free rows to zero that are not: a gradient that came late, or an optimizer, may have moved them.

        They were zero when they became free. **O(free rows)** if the table was written to since; with ``spare``, also
        rows that were never given.
        """
        free = table.rows.used - len(table.rows)
        if not (free or spare):
            return
        parameter = self._parameters.get(table.attribute)
        if not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor:
            return
        if parameter.is_meta:
            return
        counted = -1 if parameter.is_inference() else parameter._version
        if (parameter.data_ptr(), counted) != table.cleared or counted < 0 or spare:
            changes, values = Changes(), by_bits(parameter.detach())
            rows = table.rows.free()
            for start in range(0, free, _PIECE):
                piece = rows[start : start + _PIECE]
                if values.index_select(0, torch.from_numpy(piece).to(values.device)).any():
                    note_zeros(changes, parameter, piece)
            if spare and table.rows.used < len(values) and values[table.rows.used :].any():
                changes.call(values[table.rows.used :].zero_)
            changes.make()
            counted = -1 if counted < 0 else parameter._version
        table.cleared = parameter.data_ptr(), counted

    # -- what shares the memory of tables ------------------------------------------------------------------------------

    def _lend(self, table: Table, tensor: Tensor) -> None:
        """Note that a tensor that shares the memory of a table is given away with the names as they are now."""
        alive = [one for one in table.lent if one() is not None] if table.lent else []
        table.lent = [*alive, weakref.ref(tensor)]

    def _lent_whole(self, table: Table) -> Tensor:
        """Return a table, detached, to be given away with the names as they are now."""
        tensor = whole(self._parameter(table).detach())
        self._lend(table, tensor)
        return tensor

    def _take_back(self, table: Table) -> None:
        """Give a table other memory, if what was given away with names that it has now shares that which it has.

        So a state dict keeps the rows that fit to its names, whatever happens before it is written. Copy-on-write:
        **O(capacity)** once for each that is alive when a name goes.
        """
        lent, table.lent = table.lent, None
        parameter = self._parameters.get(table.attribute)
        if not lent or not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor or parameter.is_meta:
            return
        address = parameter.untyped_storage().data_ptr()
        tensors = (one() for one in lent)
        if any(one is not None and one.untyped_storage().data_ptr() == address for one in tensors):
            try:
                with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                    changes = Changes()
                    changes.replace_data(parameter, resized(parameter.data, len(parameter)))
                    changes.make()
            except BaseException:
                table.lent = lent
                raise

    def _clear_gradient(self, changes: Changes, table: Table, rows: Rows) -> None:
        """Set rows of the gradient to zero, in place."""
        gradient = _gradient_of(self._parameter(table))
        if gradient is None or is_sharded(gradient):  # the rows of a sharded table are not given again
            return
        if not gradient.is_sparse:
            note_zeros(changes, gradient, rows)
        elif not gradient.is_meta:
            _rows_of(table, gradient).note(changes, gradient, rows)

    def _clear_gradient_row(self, table: Table, parameter: Tensor, row: int) -> None:
        """Do the same for one row, several times faster."""
        gradient = _gradient_of(parameter)
        if gradient is None or is_sharded(gradient):
            return
        if not gradient.is_sparse:
            for tensor in zero_row([gradient.detach()], row):
                by_bits(tensor).index_fill_(0, torch.tensor([row], device=tensor.device), 0)
        elif not gradient.is_meta:
            _rows_of(table, gradient).clear_row(gradient, row)

    # -- the optimizers ------------------------------------------------------------------------------------------------

    @untraced
    def attach_optimizer(self, optimizer: Optimizer, *, initial_state: Mapping[str, Beginning] | None = None) -> None:
        """Let the state of an optimizer follow the names: grown, cleared and moved with the rows. **O(tables)**.

        State that has a row for each row of a table (the moments of Adam, the sums of Adagrad, momentum) belongs to the
        names from now on. It grows with the table, begins anew for a new name, and moves with :meth:`compact` and
        ``load_state_dict``. Numbers such as the count of steps stay.

        A new table joins the first attached optimizer that has the table's group of options, or else tables of this
        dictionary. It joins other optimizers only if they have the same tables.

        The optimizer is not kept alive. Copies and pickles of the dictionary have no attached optimizers. An optimizer
        and its wrapper (of accelerate, Lightning, Hugging Face) are one: either may be given.

        Parameters
        ----------
        optimizer
            One that has tables of this dictionary.
        initial_state
            What its state begins with for a new name, by the keys of the state: a number, or ``"value"`` for a copy of
            the parameter. Needed only if pdrs cannot tell. It knows torch's optimizers. For others, an optimizer of the
            same class and options takes a step on a small parameter.

        Raises
        ------
        TypeError
            If it is no optimizer.
        ValueError
            If the optimizer has none of the tables, and there are some.
        RuntimeError
            If its state cannot follow the rows: it must be numbers, and plain tensors with a row for each of a table.
            State that comes later raises at the first change. So does state whose beginning pdrs cannot tell.
        """
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise TypeError(f"expected an optimizer, got {type(optimizer).__name__}")
        with self._lock.change():
            tables = [self._parameter(table) for table in self._tables]
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if tables and not any(id(parameter) in held for parameter in tables):
                raise ValueError(
                    "the optimizer has no parameter of this dictionary: make it of dictionary.parameters()"
                )
            parts = optimizer_state.parts_of(optimizer)
            for part in parts:
                for parameter in tables:
                    for _ in optimizer_state.of_rows(part, parameter):
                        pass
            for part in parts:
                declare(part, initial_state or {})
                if not optimizer_state.is_among(part, self._attached()):
                    self._optimizers.append(weakref.ref(part))

    @untraced
    def detach_optimizer(self, optimizer: Optimizer) -> None:
        """Let the state of an attached optimizer be as it is from now on; one that is not attached is passed over."""
        with self._lock.change():
            parts = optimizer_state.parts_of(optimizer)
            attached = [one for one in self._attached() if not optimizer_state.is_among(one, parts)]
            self.__dict__["_optimizers"] = list(map(weakref.ref, attached))


class _Arranged:
    """Makes what belongs to the rows of a table as it is after the rows have been moved."""

    def __init__(self, parameter: Tensor, capacity: int, source: Tensor | None) -> None:
        self.capacity = capacity
        self.source = source
        if source is not None:
            # On the CPU: a device would have to wait to know how many there are, and the meta device never knows.
            there = (source >= 0).nonzero()[:, 0]
            device = mask_device(parameter.device)
            self.there, self.old = there.to(device), source[there].to(device)

    def __call__(self, tensor: Tensor, fill: complex = 0) -> Tensor:
        if self.source is None:
            return resized(tensor, self.capacity, fill)
        made = huge_pages.full_like(tensor, self.capacity, fill)
        # Where the rows of a state lie on another device, as torch's own optimizers never have them, this moves them.
        there, old = self.there.to(tensor.device), self.old.to(tensor.device)
        by_bits(made).index_copy_(0, there, by_bits(tensor.index_select(0, old)))
        return made

    def sparse(self, gradient: Tensor) -> Tensor:
        if self.source is None:
            return resized_gradient(gradient, self.capacity)
        return moved_rows(gradient, self.old, self.there, self.capacity)
