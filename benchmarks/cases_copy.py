"""What moves many small Parameters in one call, beside torch's own functions."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from measure import Case, Suite, Target, Task, timed
from pdrs._core import TensorGroup, group_tensors, slab_views

FLOATS = 16
# parameters_to_vector and vector_to_parameters loop in Python; cat and _foreach_copy_ do not.
LOOP, NATIVE, OURS = "a loop in torch", "one call of torch", "pdrs"


class Data:
    """Parameters of one size, which all share."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.rows = torch.randn(entries, FLOATS)
        self.parameters = [Parameter(row.clone()) for row in self.rows]
        self.flat = self.rows.flatten()

    @cached_property
    def shuffled(self) -> list[Parameter]:
        """The same Parameters in an order that is not that of their memory."""
        return random.Random(0).sample(self.parameters, self.entries)

    @cached_property
    def shuffled_flat(self) -> torch.Tensor:
        """Their values."""
        return torch.cat([parameter.detach() for parameter in self.shuffled])


def group_of(tensors: list[Any]) -> TensorGroup:
    """Group Parameters of one dtype and device."""
    (group,), _ = group_tensors(tensors)
    return group


def gather(tensors: list[Parameter]) -> torch.Tensor:
    """Copy all into one new tensor."""
    group = group_of(tensors)
    out = torch.empty(group.length)
    group.gather(out)
    return out


def cat(tensors: list[Any]) -> torch.Tensor:
    """Copy all into one new tensor."""
    with torch.no_grad():
        return torch.cat(tensors)


def to_vector(tensors: list[Parameter]) -> torch.Tensor:
    """Copy all into one new tensor."""
    with torch.no_grad():
        return parameters_to_vector(tensors)


def foreach_copy(flat: torch.Tensor, tensors: list[Any]) -> None:
    """Copy one tensor into all."""
    with torch.no_grad():
        torch._foreach_copy_(tensors, list(flat.view(-1, FLOATS).unbind()))


def rebind_each(flat: torch.Tensor, tensors: list[Parameter]) -> None:
    """Make all of them views of one tensor."""
    for parameter, row in zip(tensors, flat.view(-1, FLOATS).unbind(), strict=True):
        parameter.data = row


def views_each(flat: torch.Tensor) -> list[Parameter]:
    """Make Parameters that are views of one tensor."""
    return [Parameter(row) for row in flat.view(-1, FLOATS).unbind()]


def views_of(flat: torch.Tensor) -> list[torch.Tensor]:
    """Make Parameters that are views of one tensor."""
    count = flat.numel() // FLOATS
    return slab_views(flat, list(range(0, flat.numel(), FLOATS)), [(FLOATS,)] * count, requires_grad=True)


def _gather(subject: str, data: Data) -> Task:
    function: Callable[[list[Parameter]], torch.Tensor] = {LOOP: to_vector, NATIVE: cat, OURS: gather}[subject]
    return Task(lambda: function(data.parameters), data.entries, lambda flat: torch.equal(flat, data.flat))


def _gather_shuffled(subject: str, data: Data) -> Task:
    function: Callable[[list[Parameter]], torch.Tensor] = {LOOP: to_vector, NATIVE: cat, OURS: gather}[subject]
    return Task(lambda: function(data.shuffled), data.entries, lambda flat: torch.equal(flat, data.shuffled_flat))


def _fresh(data: Data) -> list[Parameter]:
    return [Parameter(torch.zeros(FLOATS)) for _ in range(data.entries)]


def _holds_rows(data: Data, tensors: list[Any]) -> bool:
    with torch.no_grad():
        return torch.equal(torch.stack(tensors), data.rows)


def _scatter(subject: str, data: Data) -> Task:
    tensors = _fresh(data)
    run = {
        LOOP: lambda: vector_to_parameters(data.flat.clone(), tensors),
        NATIVE: lambda: foreach_copy(data.flat, tensors),
        OURS: lambda: group_of(tensors).scatter(data.flat),
    }[subject]
    return Task(run, data.entries, lambda _: _holds_rows(data, tensors))


def _rebind(subject: str, data: Data) -> Task:
    tensors = _fresh(data)
    run = {
        LOOP: lambda: rebind_each(data.flat, tensors),
        OURS: lambda: group_of(tensors).rebind(data.flat),
    }[subject]
    return Task(run, data.entries, lambda _: _holds_rows(data, tensors))


def _views(subject: str, data: Data) -> Task:
    run = {LOOP: lambda: views_each(data.flat), OURS: lambda: views_of(data.flat)}[subject]
    return Task(run, data.entries, lambda made: type(made[0]) is Parameter and _holds_rows(data, made))


CASES: tuple[Case[Data], ...] = (
    Case(
        "gather",
        timed(_gather),
        targets=(Target("ratio", LOOP, 15), Target("ratio", NATIVE, 1.5)),
        most_runs=3,
        note="`parameters_to_vector`; `torch.cat`; grouping, allocation and gather. All without gradients.",
    ),
    Case("gather, random order in memory", timed(_gather_shuffled), targets=(Target("ratio", NATIVE, 2),), most_runs=3),
    Case(
        "scatter",
        timed(_scatter),
        targets=(Target("ratio", LOOP, 10), Target("ratio", NATIVE, 3)),
        most_runs=3,
        note="`vector_to_parameters`, which makes views; `_foreach_copy_`; grouping and scatter.",
    ),
    Case(
        "make Parameters views of a tensor",
        timed(_rebind),
        subjects=(LOOP, OURS),
        most_runs=3,
        note="`p.data = row` in a loop; grouping and `rebind`, which checks first that torch will refuse none.",
    ),
    Case(
        "new Parameters that are views of a tensor",
        timed(_views),
        subjects=(LOOP, OURS),
        targets=(Target("ratio", LOOP, 2),),
        most_runs=3,
    ),
)

SUITE = Suite(
    name="copy",
    title="Many small Parameters",
    subjects=(LOOP, NATIVE, OURS),
    baselines=(LOOP, NATIVE),
    cases=CASES,
    make_data=Data,
    intro=f"What moves Parameters of {FLOATS} float32 in one call, beside torch's own functions.",
)
