"""The tables of a dictionary: which there are, which one fits, and what makes, moves and removes one.

The functions take the dictionary whose tables they are about.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import Lock
from pdrs._rows import optimizer_state, step_warnings
from pdrs._rows.optimizers import attached
from pdrs._rows.table import Kind, Table, kind_of, mask_device, parameter_of
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(
        before=Lock.before_fork,
        after_in_parent=Lock.after_fork_in_parent,
        after_in_child=Lock.after_fork_in_child,
    )

_Target = Callable[[torch.dtype, torch.device], tuple[torch.dtype, torch.device]]

__all__ = [
    "add_table",
    "adopt",
    "device_of",
    "moved_masks",
    "numbers_by_kind",
    "pattern_of",
    "remove_last_table",
    "swappable",
    "table_for",
]


def device_of(sd: StackedParameterDict) -> torch.device:
    """Return where the first table lies, or, if there is none, where torch makes new tensors."""
    return parameter_of(sd, sd._tables[0]).device if sd._tables else torch.get_default_device()


def pattern_of(patterns: tuple[str, ...], group: int) -> str | None:
    """Return what marks the parameter group of an optimizer that is to have the tables of a group."""
    return patterns[group - 1] if 0 < group <= len(patterns) else None


def adopt(sd: StackedParameterDict) -> None:
    """Follow Parameters that may be others than before: their hooks, and the optimizers that will step on them."""
    for table in sd._tables:
        parameter = parameter_of(sd, table)
        table.hook(parameter)
        if table.frozen is not None:
            table.frozen = table.frozen.to(mask_device(parameter.device))
        _watch(sd, table, parameter)


def _watch(sd: StackedParameterDict, table: Table, parameter: Tensor) -> None:
    optimizer_state.watch(parameter)
    step_warnings.watch(sd, table, parameter)


@contextmanager
def swappable(sd: StackedParameterDict) -> Iterator[None]:
    """Let torch swap tables where it has been told to, which it refuses where something refers to them weakly."""
    if not torch.__future__.get_swap_module_params_on_conversion():
        yield
        return
    tables = []
    for table in sd._tables:
        parameter: Any = parameter_of(sd, table)
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
            parameter = parameter_of(sd, table)
            table.hook(parameter)
            optimizer_state.watch(parameter, steppers)


def numbers_by_kind(sd: StackedParameterDict) -> dict[Kind, int]:
    """Return the number of the table of each kind; moves to another dtype may leave several, then the first.

    Looked up anew for each call of the user's: whoever has a table may change what it is.
    """
    numbers: dict[Kind, int] = {}
    for number, table in enumerate(sd._tables):
        numbers.setdefault(kind_of(sd, table), number)
    return numbers


def table_for(sd: StackedParameterDict, kind: Kind, device: torch.device, numbers: dict[Kind, int]) -> int:
    """Return the number of the table of a kind; make an empty one if there is none."""
    if kind in numbers:
        return numbers[kind]
    with torch.inference_mode(False):
        data = torch.zeros((0, *kind.shape), dtype=kind.dtype, device=device)
        parameter = Parameter(data, requires_grad=kind.trainable)
    numbers[kind] = add_table(sd, kind.attribute(), parameter, kind.group)
    return numbers[kind]


@untraced
def add_table(sd: StackedParameterDict, attribute: str, parameter: Parameter, group: int) -> int:
    taken, wanted = 1, attribute
    while hasattr(sd, attribute):
        taken += 1
        attribute = f"{wanted}_{taken}"
    table = Table(attribute, group)
    try:
        sd.register_parameter(attribute, parameter)
        _watch(sd, table, parameter)
        optimizers = attached(sd)
        if parameter.requires_grad and optimizers:
            tables = {one.attribute: parameter_of(sd, one) for one in [*sd._tables, table]}
            pattern = pattern_of(sd._patterns, group)
            for optimizer in optimizer_state.takers(optimizers, pattern, tables.values()):
                optimizer_state.join(optimizer, attribute, pattern, tables)
        changes = Changes()
        changes.call(sd._index.add_table)
        changes.call(sd._tables.append, table)
        changes.make()
    except BaseException:
        if table not in sd._tables:  # whoever asked for it removes it where it is
            _discard_table(sd, attribute)
        raise
    return len(sd._tables) - 1


@untraced
def remove_last_table(sd: StackedParameterDict) -> None:
    attribute, changes = sd._tables[-1].attribute, Changes()
    changes.call(sd._index.pop_table)
    changes.call(sd._tables.pop)
    changes.make()
    _discard_table(sd, attribute)


def _discard_table(sd: StackedParameterDict, attribute: str) -> None:
    parameter = sd._parameters.pop(attribute, None)
    for optimizer in attached(sd):
        optimizer_state.leave(optimizer, parameter)


def moved_masks(sd: StackedParameterDict, target: _Target) -> list[tuple[Table, Tensor]]:
    """Return the masks of frozen rows where their tables will be, made before anything moves.

    ``target`` gives the dtype and the device that a tensor will have, by those that it has.
    """
    masks: list[tuple[Table, Tensor]] = []
    for table in sd._tables:
        if table.frozen is not None:
            parameter = parameter_of(sd, table)
            _, device = target(parameter.dtype, parameter.device)
            masks.append((table, table.frozen.to(mask_device(device))))
    return masks
