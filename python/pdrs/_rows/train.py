"""What training asks of names: their gradients, their norms, and rows that are frozen.

The functions do what the methods of the same names of ``StackedParameterDict`` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdrs._rows import optimizer_state
from pdrs._rows.gather import Lookup, look_up
from pdrs._rows.optimizers import attached
from pdrs._rows.room import clear_gradient_rows
from pdrs._rows.store import device_of
from pdrs._rows.table import Rows, Table, mask_device, parameter_of, refuse_foreign, whole
from pdrs._torch.names import Names, is_mask
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["freeze", "named_grads", "norms", "unfreeze"]


def named_grads(self: StackedParameterDict) -> Iterator[tuple[str, Tensor]]:
    """Iterate over names and gradients, in order. Names whose table has no gradient are left out. **O(n)**.

    With a dense gradient, each is a view of the gradient of the table. With a sparse gradient, only names in it are
    returned, and may be copies. If rows move meanwhile, the iteration raises RuntimeError.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.gather(["b"]).sum().backward()
    >>> {name: gradient.tolist() for name, gradient in sd.named_grads()}
    {'a': [0.0, 0.0], 'b': [1.0, 1.0]}

    """
    rows: list[Mapping[int, Tensor] | tuple[Tensor, ...]] = []
    index = self._index
    version = index.moves
    for table in self._tables:
        gradient = parameter_of(self, table).grad
        gradient = None if gradient is None else whole(gradient)
        if gradient is None:
            rows.append({})
        elif gradient.is_sparse:
            gradient = gradient.coalesce()
            rows.append(dict(zip(gradient.indices()[0].tolist(), gradient.values().unbind(), strict=True)))
        else:
            rows.append(gradient.unbind())
    for name, number, row in index.entries():
        if self._index.moves != version:
            raise RuntimeError("rows of the dictionary moved during iteration")
        of_table = rows[number]
        if not isinstance(of_table, dict) or row in of_table:
            yield name, of_table[row]


@torch.no_grad()
def norms(self: StackedParameterDict, p: float = 2.0) -> Tensor:
    """Return the norm of each entry, in order. **O(n)**, in a few operations per table.

    Parameters
    ----------
    p
        The order of the norm, as for ``torch.linalg.vector_norm``.

    Returns
    -------
    torch.Tensor
        ``[len(self)]``, on the device of the first table.
    """
    with self._lock.read():
        places, device = self._index.places(), device_of(self)
        norms = torch.zeros(len(places), device=device)
        for number, there, rows in places.by_table():
            table = whole(parameter_of(self, self._tables[number]))
            if not (table.is_floating_point() or table.is_complex()) or table.itemsize == 1:
                table = table.to(torch.get_default_dtype())
            of_table: Tensor = torch.linalg.vector_norm(table.reshape(len(table), -1), p, dim=1)
            of_names = of_table[torch.from_numpy(rows).to(table.device)].to(device)
            if len(there) == len(places):
                return of_names
            norms = norms.to(torch.promote_types(norms.dtype, of_names.dtype))
            norms[torch.from_numpy(there).to(device)] = of_names.to(norms.dtype)
        return norms


@untraced
def freeze(self: StackedParameterDict, names: Names | Lookup) -> None:
    """Mask the gradients of names until they are unfrozen. **O(m)** for ``m`` names, and **O(capacity)** once.

    ``backward`` then gives these rows zero gradients, dense or sparse. Their present gradient, and their state in
    attached optimizers, become zero. So the rows do not change under optimizers without weight decay that are attached.
    Momentum of other optimizers still moves them, and weight decay moves each row of a table. Names that must never
    change belong into a table without gradients: insert them as ``Parameter(..., requires_grad=False)``.

    ``torch.autograd.grad`` ignores the mask. A name that gets a value of another shape is no longer frozen. The mask is
    pickled and copied with the dictionary. It is not part of a state dict.

    Raises
    ------
    KeyError
        If a name is missing.
    TypeError
        If ``names`` are not names. Of a mask, pass ``sd.select(mask)``.
    RuntimeError
        If the table is sharded or parametrized. Names that were frozen before stay frozen.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.freeze(["a"])
    >>> sd.gather(["a", "b"]).sum().backward()
    >>> sd.table((2,)).grad.tolist()
    [[0.0, 0.0], [1.0, 1.0]]

    """
    with self._lock.change():
        parts = _by_table(self, names)
        for table, _ in parts:
            refuse_foreign(self, table, "freeze names")
        changes, optimizers = Changes(), attached(self)
        for table, rows in parts:
            parameter = parameter_of(self, table)
            table.hook(parameter, wanted=True)
            for optimizer in optimizers:
                optimizer_state.forget_rows(changes, optimizer, parameter, rows)
            clear_gradient_rows(self, changes, table, rows)
            mask, index = table.frozen, torch.from_numpy(rows).to(mask_device(parameter.device))
            if mask is None:
                mask = torch.zeros(len(parameter), dtype=torch.bool, device=index.device)
                changes.set_attributes(table, frozen=mask)
            changes.call(mask.index_fill_, 0, index, True)
        changes.make()


@untraced
def unfreeze(self: StackedParameterDict, names: Names | Lookup | None = None) -> None:
    """Let names, or all names, have gradients again. Names that are not frozen are ignored. **O(m + capacity)**."""
    with self._lock.change():
        changes = Changes()
        if names is None:
            for table in self._tables:
                changes.set_attributes(table, frozen=None)
        else:
            for table, rows in _by_table(self, names):
                if table.frozen is not None:
                    mask = table.frozen.index_fill(0, torch.from_numpy(rows).to(table.frozen.device), False)
                    is_left = mask.view(torch.uint8).any()  # ten times as fast as for bool
                    changes.set_attributes(table, frozen=mask if is_left else None)
        changes.make()
        for table in self._tables:
            table.hook(parameter_of(self, table))


def _by_table(sd: StackedParameterDict, names: Names | Lookup) -> list[tuple[Table, Rows]]:
    if not isinstance(names, Lookup) and is_mask(names):
        raise TypeError("expected names, got a mask: pass sd.select(mask)")
    return [(sd._tables[number], rows) for number, _, rows in look_up(sd, names).by_table()]
