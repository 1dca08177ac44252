"""A table: what is known of it beside its Parameter ``[capacity, *shape]``, and the hooks of that.

A table stays the same Parameter when it grows (its ``.data`` is replaced), so optimizers keep their reference. Hooks
resize gradients that are of the old size, and mask those of frozen rows. Which rows have names is not known here.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._rows.accumulation import Accumulation
from pdrs._rows.sparse_gradient import GradientRows
from pdrs._rows.unsharded import is_unsharded, unsharded_error
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = [
    "Kind",
    "PlainTable",
    "Rows",
    "Table",
    "clear_gradient",
    "is_sharded",
    "kind_of",
    "mask_device",
    "parameter_of",
    "refuse_foreign",
    "resized",
    "resized_gradient",
    "whole",
]

Rows = NDArray[np.int64]


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


# The name of the Parameter, the group, and the mask.
PlainTable = tuple[str, int, Tensor | None]


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
    # Where the table lay when its memory was moved to huge pages.
    moved_to_huge_pages: int | None = None
    # Where the table lay, and what torch had counted, when its free rows were last seen to be zero.
    cleared: tuple[int, int] | None = None

    def __init__(self, attribute: str, group: int = 0) -> None:
        self.attribute = attribute
        self.group = group
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
    def to_plain(self) -> PlainTable:
        """Return what is pickled and copied of it: nothing that belongs to this very Parameter."""
        return self.attribute, self.group, None if self.frozen is None else self.frozen.clone()

    @classmethod
    def from_plain(cls, plain: PlainTable) -> Table:
        """Return the table of which :meth:`to_plain` returned this."""
        attribute, group, frozen = plain
        made = cls(attribute, group)
        made.frozen = frozen
        made.loaded = True  # whoever copies the optimizer, too, has one with state for the copy
        return made

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


# -- the Parameter of a table -----------------------------------------------------------------------------------------


def parameter_of(sd: StackedParameterDict, table: Table) -> Tensor:
    """Return the Parameter of a table, or what has taken its place: the tensor of a replica, a parametrization."""
    parameter = sd._parameters.get(table.attribute)
    if parameter is None:
        return getattr(sd, table.attribute)  # type: ignore[no-any-return]
    if table.frozen is not None:
        table.hook(parameter)  # it may be another than before
    return parameter


def refuse_foreign(sd: StackedParameterDict, table: Table, what: str) -> None:
    """Raise if what is written to a table would be lost, or would reach a part of it only."""
    parameter = sd._parameters.get(table.attribute)
    if parameter is None:
        raise RuntimeError(
            f"the table '{table.attribute}' is computed from other tensors (by a parametrization, by pruning, for "
            f"a replica): {what} before that"
        )
    if is_sharded(parameter):
        raise RuntimeError(f"the table '{table.attribute}' is sharded: {what} before the model is sharded")
    if is_unsharded(parameter):
        raise unsharded_error(table.attribute, f"{what} before the model is sharded")
    if not isinstance(parameter, Parameter):
        raise RuntimeError(
            f"another tensor stands in for the table '{table.attribute}', as in functional_call: {what} before that"
        )


def kind_of(sd: StackedParameterDict, table: Table) -> Kind:
    parameter = parameter_of(sd, table)
    return Kind(tuple(parameter.shape[1:]), parameter.dtype, parameter.requires_grad, table.group)
