"""Two things that training does to tables without a word, and that are said once.

A dense gradient is one for all rows of a table. So an optimizer with momentum or weight decay moves names that were not
in the batch. Parameters of their own would stay as they are. SGD with momentum does so with sparse gradients, too. And
a table that no optimizer has is not trained at all.

Both are found by checks, in some steps and of some rows. The checks ask whether a row without a gradient has moved, and
whether one with a gradient has not. Each step costs a look-up in a dict.
"""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from pdrs._rows.by_row import ByRow

if TYPE_CHECKING:
    from pdrs._rows.table import Table
    from pdrs.stacked import StackedParameterDict

__all__ = [
    "AbsentNamesWarning",
    "UntrainedTableWarning",
    "after_step",
    "before_step",
    "hold",
    "owner_of",
    "warn",
    "watch",
]

# It looks more and more seldom, and at no more rows than these.
_ROWS = 1024
# So many steps with new gradients make a table one that nothing trains.
_UNTRAINED = 3
_HERE = str(Path(__file__).parent.parent)


class AbsentNamesWarning(UserWarning):
    """An optimizer has moved names that were not in the batch. Separate Parameters would have stayed."""


class UntrainedTableWarning(UserWarning):
    """A table has gradients, but no optimizer trains it."""


class _Watch:
    """A table of a dictionary, and what was seen of it."""

    def __init__(self, owner: StackedParameterDict, table: Table) -> None:
        # Not the Parameter: torch swaps none that something refers to weakly.
        self._owner, self._table = ref(owner), ref(table)
        self.steps = 0
        self.row: tuple[int, Tensor] | None = None

    def find(self) -> tuple[StackedParameterDict, Table, Tensor] | None:
        owner, table = self._owner(), self._table()
        parameter = owner._parameters.get(table.attribute) if owner is not None and table is not None else None
        if owner is None or table is None or parameter is None or type(parameter.data) is not Tensor:
            return None
        return owner, table, parameter


class _Plan:
    """When to look at the tables of an optimizer, and what they were before the step."""

    def __init__(self, watches: list[_Watch]) -> None:
        self.watches = watches
        self.steps, self.next = 0, 1
        self.before: list[tuple[_Watch, Tensor, Tensor]] = []


# By the `id` of the Parameter.
_watches: dict[int, _Watch] = {}
_untrained: dict[int, _Watch] = {}
_plans: WeakKeyDictionary[Any, _Plan] = WeakKeyDictionary()


def watch(owner: StackedParameterDict, table: Table, parameter: Tensor) -> None:
    """Look at a table from now on."""
    known = _watches.get(id(parameter))
    found = known.find() if known is not None else None
    if found is None or found[2] is not parameter or found[0] is not owner:
        _watches[id(parameter)] = made = _Watch(owner, table)
        if parameter.requires_grad:
            _untrained[id(parameter)] = made


def owner_of(parameter: Tensor) -> tuple[StackedParameterDict, Table] | None:
    """Return the dictionary that a Parameter is a table of, and the table."""
    known = _watches.get(id(parameter))
    found = known.find() if known is not None else None
    return found[:2] if found is not None and found[2] is parameter else None


def hold(optimizer: Any) -> None:
    """Note which tables an optimizer has."""
    held = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            one = _watches.get(id(parameter))
            found = one.find() if one is not None else None
            if one is not None and found is not None and found[2] is parameter:
                held.append(one)
                _untrained.pop(id(parameter), None)
    if held:
        plan = _plans.setdefault(optimizer, _Plan(held))
        plan.watches = held


def before_step(optimizer: Any, _arguments: Any = None, _keywords: Any = None) -> None:
    """Remember some rows, if this is a step to look at."""
    plan = _plans.get(optimizer)
    if plan is None:
        return
    plan.steps += 1
    if plan.steps < plan.next or torch.compiler.is_compiling():
        return
    plan.next = plan.steps + 1 + plan.steps // 8
    plan.before = []
    if _trains_the_batch_alone(optimizer):
        return
    by_row = isinstance(optimizer, ByRow)
    for one in plan.watches:
        found = one.find()
        if found is None or found[0].__dict__.get("_warned_of_absent"):
            continue
        owner, table, parameter = found
        if by_row and parameter.grad is not None and parameter.grad.is_sparse:
            continue
        if (
            table not in owner._tables
            or parameter.is_meta
            or (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            continue
        number = owner._tables.index(table)
        used = owner._index.used(number)
        stride = max(1, used // _ROWS)
        rows = np.arange(plan.steps % stride, used, stride)
        rows = rows[owner._index.is_taken(number, rows)]
        index = torch.from_numpy(rows).to(parameter.device)
        if table.frozen is not None:
            index = index[~table.frozen[index]]
        if len(index):
            plan.before.append((one, index, parameter.detach().index_select(0, index)))


def _trains_the_batch_alone(optimizer: Any) -> bool:
    """Whether it is known of an optimizer that rows without a gradient stay."""
    if type(optimizer) not in (SGD, Adagrad):
        return type(optimizer) is SparseAdam
    return not any(group["weight_decay"] or group.get("momentum") for group in optimizer.param_groups)


def after_step(optimizer: Any) -> None:
    """Look at what a step has done to the rows that are remembered, and at the tables that it has not."""
    if _untrained and not torch.compiler.is_compiling():
        for key in list(_untrained):
            _look_at_untrained(key)
    plan = _plans.get(optimizer)
    if plan is None or not plan.before:
        return
    looked, plan.before = plan.before, []
    for one, index, before in looked:
        found = one.find()
        gradient = found[2].grad if found is not None else None
        if found is None or gradient is None or gradient.layout not in (torch.strided, torch.sparse_coo):
            continue
        owner, _, parameter = found
        if (
            gradient.shape != parameter.shape
            or len(parameter) <= int(index[-1])
            or before[0].shape != parameter[0].shape
        ):
            continue
        if gradient.is_sparse:
            absent = ~torch.isin(index, gradient._indices()[0])
        else:
            absent = ~gradient.index_select(0, index).reshape(len(index), -1).any(1)
        moved = _differs(parameter.detach().index_select(0, index), before).reshape(len(index), -1).any(1)
        # Where no row has a gradient, the batch has not asked for a name that could have one.
        some = gradient._values() if gradient.is_sparse else gradient
        if bool((absent & moved).any()) and bool(some.any()) and not owner.__dict__.get("_warned_of_absent"):
            owner.__dict__["_warned_of_absent"] = True
            warn(
                f"{type(optimizer).__name__} has moved names whose gradient is zero, as of names outside the batch: "
                "momentum and weight decay are for all rows of a table. Parameters of their own would have stayed. "
                "To train the names of the batch alone, gather(names, sparse=True) and take an optimizer of pdrs.optim",
                AbsentNamesWarning,
            )


def _look_at_untrained(key: int) -> None:
    one = _untrained.get(key)
    found = one.find() if one is not None else None
    if one is None or found is None or id(found[2]) != key:
        _untrained.pop(key, None)
        return
    _, table, parameter = found
    gradient = parameter.grad if parameter.is_leaf and parameter.requires_grad else None
    if gradient is None or gradient.is_meta or gradient.is_inference():
        return
    if getattr(gradient, "_pdrs_seen", None) == gradient._version:
        return  # the one that was there before
    gradient._pdrs_seen = gradient._version  # type: ignore[attr-defined]
    if one.row is not None and one.row[0] < len(parameter):
        at, before = one.row
        if before.shape != parameter[at].shape or bool(_differs(parameter.detach()[at], before).any()):
            del _untrained[key]  # somebody trains it, without an optimizer
            return
    with_gradient = (
        gradient._indices()[0] if gradient.is_sparse else gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
    )
    if len(with_gradient) == 0:
        return
    one.steps += 1
    one.row = int(with_gradient[0]), parameter.detach()[with_gradient[0]].clone()
    if one.steps < _UNTRAINED:
        return
    del _untrained[key]
    if not _is_held(parameter):
        warn(
            f"the table '{table.attribute}' of a StackedParameterDict has had gradients in {_UNTRAINED} steps, and no "
            "optimizer has it, so nothing trains it. A dictionary that is empty has no table for an optimizer: "
            "call attach_optimizer(optimizer) before names come, or reserve(n, shape=...) before the optimizer is made",
            UntrainedTableWarning,
        )


def _differs(now: Tensor, before: Tensor) -> Tensor:
    # What was NaN, and is, has not moved.
    return (now != before) & ((now == now) | (before == before))


def _is_held(parameter: Tensor) -> bool:
    for one in gc.get_objects():
        if issubclass(type(one), Optimizer):
            try:
                if any(each is parameter for group in one.param_groups for each in group["params"]):
                    return True
            except Exception:  # of a wrapper that is half made
                continue
    return False


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of pdrs and of torch's optimizers that has come here."""
    frame, level = sys._getframe(), 1
    while frame is not None and (
        frame.f_code.co_filename.startswith(_HERE) or f"{Path('torch', 'optim')}" in frame.f_code.co_filename
    ):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)
