"""Rows of tables: room for new ones, and what belongs to a row when its name comes, goes or moves.

A gradient, the mask of frozen rows and the state of attached optimizers belong to the rows, and go along. Rows without
a name are zero: removal clears them, and so does the next use, if anything has written to them meanwhile.

The functions take the dictionary whose rows they are about, and the number of the table.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import zero_row
from pdrs._rows import optimizer_state
from pdrs._rows.optimizers import attached, refuse_strangers
from pdrs._rows.sparse_gradient import GradientRows, moved_rows
from pdrs._rows.table import (
    Rows,
    Table,
    is_sharded,
    mask_device,
    parameter_of,
    refuse_foreign,
    resized,
    resized_gradient,
    whole,
)
from pdrs._rows.unsharded import is_unsharded, refuse_unsharded, unsharded_error
from pdrs._rows.write import by_bits, note_zeros
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pdrs.stacked import StackedParameterDict

__all__ = [
    "begin_state",
    "clear_free",
    "clear_rows",
    "lend",
    "lent_whole",
    "make_ready",
    "make_room",
    "poppable",
    "rearrange",
    "resize",
    "take_back",
]

# What to do with names of a sharded table.
_REMOVE_LATER = "remove names between the passes, when the table is sharded"

# How many free rows are looked at at a time.
_PIECE = 1 << 15


def make_room(sd: StackedParameterDict, number: int, count: int) -> Rows:
    """Grow a table if it must, clear what belonged to the rows to come, and show these. They are not taken yet.

    Raises
    ------
    RuntimeError
        If there is no memory, or an optimizer that is not attached would go on with state of other rows. Then
        nothing has changed.
    """
    table = sd._tables[number]
    resize(sd, table, sd._index.capacity_for(number, count, len(parameter_of(sd, table))))
    refuse_foreign(sd, table, "insert names")
    rows = sd._index.next(number, count)
    make_ready(sd, number, rows)
    return rows


@untraced
def make_ready(sd: StackedParameterDict, number: int, rows: Rows | int) -> bool:
    """Clear what belonged to the rows, or the one, that will be given next, or refuse it.

    Tell whether there is more to do: see :func:`begin_state`, and what is averaged with this.
    """
    table, optimizers = sd._tables[number], attached(sd)
    parameter = parameter_of(sd, table)
    if sd._index.reused(number, 1 if isinstance(rows, int) else len(rows)):
        refuse_strangers(sd, table, parameter, optimizers, "give the row of a removed name to a new one")
    _forget(sd, table, parameter, optimizers, rows)
    if "_averages" in sd.__dict__:
        return True
    for optimizer in optimizers:  # noqa: SIM110 - `any` of a generator costs each insertion more
        if optimizer_state.begins_with_values(optimizer, parameter):
            return True
    return False


def begin_state(sd: StackedParameterDict, table: Table, rows: Rows) -> None:
    """Let the state of optimizers that begins with the values of rows do so."""
    parameter, changes = parameter_of(sd, table), Changes()
    for optimizer in attached(sd):
        if optimizer_state.begins_with_values(optimizer, parameter):
            optimizer_state.forget_rows(changes, optimizer, parameter, rows)
    changes.make()


def resize(sd: StackedParameterDict, table: Table, capacity: int) -> None:
    """Change the capacity; all rows stay what they are, and zeros are added."""
    if capacity != len(parameter_of(sd, table)):
        changes = Changes()
        rearrange(sd, changes, table, capacity, None)
        changes.make()


@untraced
def rearrange(sd: StackedParameterDict, changes: Changes, table: Table, capacity: int, source: Tensor | None) -> None:
    """Give a table another capacity and, where ``source`` is given, other rows: the old row of each, -1 for none.

    ``source`` lies on the CPU. What belongs to the rows goes along.
    """
    refuse_foreign(sd, table, "insert names, reserve rows or compact")
    parameter = parameter_of(sd, table)
    if not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor:
        raise RuntimeError(
            f"the table '{table.attribute}' is a {type(parameter.data).__name__} and cannot change its size: "
            "insert names before it becomes one"
        )
    what = "change the size of a table" if source is None else "move the rows of a table"
    refuse_strangers(sd, table, parameter, attached(sd), what)
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
        for optimizer in attached(sd):
            for state, key, begin in optimizer_state.rows_and_beginnings(optimizer, parameter):
                if begin == "value" and source is not None and bool((source < 0).any()):
                    raise RuntimeError(
                        f"cannot {what}: the state '{key}' of {type(optimizer).__name__} begins with the values of "
                        "new rows, which are still to come. Load the dictionary first, and make the optimizer of it"
                    )
                value, fill = state[key], optimizer_state.fill_of(begin)
                # Sparse is the momentum of SGD, if gradients are.
                changes.update(state, {key: arranged.sparse(value) if value.is_sparse else arranged(value, fill)})


def _forget(
    sd: StackedParameterDict, table: Table, parameter: Tensor, optimizers: list[Optimizer], rows: Rows | int
) -> None:
    """Clear what belonged to rows, or one, that get new names: gradients, state of optimizers, masks."""
    if isinstance(rows, int):  # several times faster than with a tensor of rows
        for optimizer in optimizers:
            optimizer_state.forget_row(optimizer, parameter, rows)
        if table.frozen is not None:
            table.frozen[rows] = False
        _clear_gradient_row(sd, table, parameter, rows)
        return
    changes = Changes()
    _note_forgotten(sd, changes, table, parameter, optimizers, rows)
    changes.make()


def _note_forgotten(
    sd: StackedParameterDict,
    changes: Changes,
    table: Table,
    parameter: Tensor,
    optimizers: list[Optimizer],
    rows: Rows,
    gone: bool = False,
) -> None:
    for optimizer in optimizers:
        optimizer_state.forget_rows(changes, optimizer, parameter, rows, gone)
    clear_gradient_rows(sd, changes, table, rows)
    if table.frozen is not None:
        changes.call(table.frozen.index_fill_, 0, torch.from_numpy(rows).to(table.frozen.device), False)


def clear_rows(sd: StackedParameterDict, changes: Changes, table: Table, rows: Rows) -> None:
    """Note that rows, whose names go, become zero, and that what belongs to them goes, too."""
    parameter = sd._parameters.get(table.attribute)
    if is_unsharded(parameter):
        raise unsharded_error(table.attribute, _REMOVE_LATER)
    take_back(sd, table)
    # What stands in for the table, or what it is computed from, is not ours to write to.
    if parameter is not None and is_sharded(parameter):
        note_zeros(changes, *_shard_of(parameter, rows))
    elif isinstance(parameter, Parameter):
        note_zeros(changes, parameter, rows)
    _note_forgotten(sd, changes, table, parameter_of(sd, table), attached(sd), rows, gone=True)


def poppable(sd: StackedParameterDict) -> StackedParameterDict:
    """Return a dictionary, if the rows of names that go may be cleared."""
    refuse_unsharded(sd, _REMOVE_LATER)
    return sd


def clear_free(sd: StackedParameterDict, number: int, *, spare: bool = False) -> None:
    """Set free rows to zero that are not: a gradient that came late, or an optimizer, may have moved them.

    They were zero when they became free. **O(free rows)** if the table was written to since; with ``spare``, also
    rows that were never given.
    """
    table, index = sd._tables[number], sd._index
    used = index.used(number)
    free = used - index.count(number)
    if not (free or spare):
        return
    parameter = sd._parameters.get(table.attribute)
    if not isinstance(parameter, Parameter) or type(parameter.data) is not Tensor:
        return
    if parameter.is_meta:
        return
    counted = -1 if parameter.is_inference() else parameter._version
    if (parameter.data_ptr(), counted) != table.cleared or counted < 0 or spare:
        changes, values = Changes(), by_bits(parameter.detach())
        rows = index.free(number)
        for start in range(0, free, _PIECE):
            piece = rows[start : start + _PIECE]
            if values.index_select(0, torch.from_numpy(piece).to(values.device)).any():
                note_zeros(changes, parameter, piece)
        if spare and used < len(values) and values[used:].any():
            changes.call(values[used:].zero_)
        changes.make()
        counted = -1 if counted < 0 else parameter._version
    table.cleared = parameter.data_ptr(), counted


def lend(sd: StackedParameterDict, table: Table, tensor: Tensor) -> None:
    """Note that a tensor that shares the memory of a table is given away with the names as they are now."""
    alive = [one for one in table.lent if one() is not None] if table.lent else []
    table.lent = [*alive, weakref.ref(tensor)]


def lent_whole(sd: StackedParameterDict, table: Table) -> Tensor:
    """Return a table, detached, to be given away with the names as they are now."""
    tensor = whole(parameter_of(sd, table).detach())
    lend(sd, table, tensor)
    return tensor


def take_back(sd: StackedParameterDict, table: Table) -> None:
    """Give a table other memory, if what was given away with names that it has now shares that which it has.

    So a state dict keeps the rows that fit to its names, whatever happens before it is written. Copy-on-write:
    **O(capacity)** once for each that is alive when a name goes.
    """
    lent, table.lent = table.lent, None
    parameter = sd._parameters.get(table.attribute)
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


def clear_gradient_rows(sd: StackedParameterDict, changes: Changes, table: Table, rows: Rows) -> None:
    """Set rows of the gradient to zero, in place."""
    gradient = _gradient_of(parameter_of(sd, table))
    if gradient is None or is_sharded(gradient):  # the rows of a sharded table are not given again
        return
    if not gradient.is_sparse:
        note_zeros(changes, gradient, rows)
    elif not gradient.is_meta:
        _rows_of(table, gradient).note(changes, gradient, rows)


def _clear_gradient_row(sd: StackedParameterDict, table: Table, parameter: Tensor, row: int) -> None:
    """Do the same for one row, several times faster."""
    gradient = _gradient_of(parameter)
    if gradient is None or is_sharded(gradient):
        return
    if not gradient.is_sparse:
        for tensor in zero_row([gradient.detach()], row):
            by_bits(tensor).index_fill_(0, torch.tensor([row], device=tensor.device), 0)
    elif not gradient.is_meta:
        _rows_of(table, gradient).clear_row(gradient, row)


def _shard_of(parameter: Any, rows: Rows) -> tuple[Tensor, Rows]:
    """Return what this process has of a sharded table, and which rows of it are some rows of the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    own = rows - offset[0]
    return parameter.to_local(), own[(own >= 0) & (own < shape[0])]


def _gradient_of(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a table, which what is computed from a parametrized one does not have."""
    return parameter.grad if parameter.is_leaf else None


def _rows_of(table: Table, gradient: Tensor) -> GradientRows:
    """Return where the rows of a table lie in its sparse gradient, looked for anew if that has changed."""
    known = table.gradient_rows
    if known is None or not known.is_of(gradient):
        known = table.gradient_rows = GradientRows(gradient)
    return known


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
