"""Dictionaries that are trained by row, and what a name has of it, for tests of ``pdrs.optim``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import pdrs
from pdrs.optim import SGD, Adagrad, Adam, AdamW, RMSprop, RowWiseAdagrad

__all__ = [
    "KINDS",
    "NAMES",
    "Make",
    "assert_near",
    "batch_of",
    "bits",
    "loss_of",
    "rows",
    "stacked",
    "table_of",
    "train",
]

SD = pdrs.StackedParameterDict
Make = Callable[[Any], Optimizer]
NAMES = [f"name.{n}" for n in range(12)]


def rows(count: int = len(NAMES), *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, *(shape or (3,)), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stacked(dtype: torch.dtype = torch.float32, count: int = len(NAMES)) -> SD:
    return SD.from_tensor(NAMES[:count], rows(count, dtype=dtype))


def table_of(sd: SD) -> Tensor:
    (table,) = sd.parameters()
    return table


def loss_of(taken: Tensor, step: int) -> Tensor:
    """Return a loss whose gradient for each place differs, of repeated rows, too."""
    weight = torch.linspace(0.2, 1, taken.numel(), dtype=taken.dtype).view_as(taken)
    return (weight * (taken - math.sin(step)).pow(2)).sum()


def batch_of(names: Sequence[str], step: int) -> list[str]:
    """Return names, of which some are there twice and some are not."""
    generator = torch.Generator().manual_seed(step)
    return [names[at] for at in torch.randint(len(names), (8,), generator=generator).tolist()]


def train(sd: SD, optimizer: Optimizer, steps: range, **options: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(sd.gather(batch_of(list(sd), step), **options), step).backward()
        optimizer.step()


def assert_near(got: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Compare with a tolerance relative to the largest number: sums of numbers of both signs may be near zero."""
    got, expected = got.detach(), expected.detach()
    torch.testing.assert_close(got, expected, rtol=relative, atol=relative * float(expected.abs().max()))


def bits(sd: SD, optimizer: Optimizer) -> dict[str, Any]:
    """Return all that a name has, name by name, and what optimizers have for all."""
    found: dict[str, Any] = {}
    for name, row in sd.items():
        state = optimizer.state.get(row._base, {})
        at = sd.indices([name])
        found[name] = row.tolist(), {key: one[at].tolist() for key, one in state.items() if one.dim()}
    for number, table in enumerate(sd.parameters()):
        state = optimizer.state.get(table, {})
        found[f"table {number}"] = {key: one.item() for key, one in state.items() if one.dim() == 0}
    return found


# What is made of each class, to run through the same: with states of all kinds.
KINDS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.05, weight_decay=0.1),
    "SGD-lazy": lambda p: SGD(p, lr=0.05, weight_decay=0.1, lazy_decay=True),
    "SGD-momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    "RowWiseAdagrad": lambda p: RowWiseAdagrad(
        p, lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.1
    ),
    "Adam": lambda p: Adam(p, lr=0.05, weight_decay=0.1),
    "Adam-per-row": lambda p: Adam(p, lr=0.05, amsgrad=True, per_row_steps=True),
    "AdamW-lazy": lambda p: AdamW(p, lr=0.05, weight_decay=0.1, per_row_steps=True, lazy_decay=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
}
