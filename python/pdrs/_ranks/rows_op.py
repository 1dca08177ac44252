"""Rows that go from their owners to the ranks that asked for them, and their gradients, which go back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdrs._ranks.exchange import Call, Line
from pdrs._ranks.mesh import of_replicas
from pdrs._ranks.owners import Owners

__all__ = ["exchange_rows"]


def exchange_rows(
    rows: Tensor,
    line: Line,
    give: list[int],
    take: list[int],
    wire: torch.dtype | None,
    divisor: int,
    forward: Call,
    backward: Call,
    owners: Owners,
    counts: list[int] | None = None,
) -> Tensor:
    """Send rows ``[sum(give), elements]`` to the ranks, and return those that come, ``[sum(take), elements]``.

    Parameters
    ----------
    rows
        The rows that this rank owns, those for rank 0 first. With ``counts``, those of all replicas: only its own are
        sent, and the gradients of all come.
    line
        The way to the other ranks. All ranks have met before this call. They meet again before gradients go back.
    give, take
        How many rows go to each rank, and how many come from it.
    wire
        The dtype in which rows and gradients are sent; None for their own.
    divisor
        What gradients are divided by.
    forward, backward
        What the two passes are named, if a rank does not come.
    owners
        Which ranks share the names.
    counts
        How many of the rows are asked for in the replica of each rank. None if there is one replica.
    """
    return _Exchange.apply(rows, line, give, take, wire, divisor, forward, backward, owners, counts)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        line: Line,
        give: list[int],
        take: list[int],
        wire: torch.dtype | None,
        divisor: int,
        forward: Call,
        backward: Call,
        owners: Owners,
        counts: list[int] | None,
    ) -> Tensor:
        ctx.options = line, give, take, wire, divisor, backward, owners, counts
        if counts is not None:
            before = sum(counts[: line.ranks.rank])
            rows = rows[before : before + sum(give)]
        return _sent(rows, line, give, take, wire, forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        line, give, take, wire, divisor, call, owners, counts = ctx.options
        with line.ranks.in_step():
            line.meet(call)
            own = _sent(gradient, line, take, give, wire, call)
            if counts is not None:  # What has been rounded for the wire once is not rounded again.
                own = of_replicas(line, owners, own if wire is None else own.to(wire), counts, call).to(own.dtype)
        if divisor != 1:
            own = own / divisor
        return own, *[None] * 9


def _sent(rows: Tensor, line: Line, give: list[int], take: list[int], wire: torch.dtype | None, call: Call) -> Tensor:
    sent = rows if wire is None else rows.to(wire)
    come = line.exchange(sent, give, take, call)
    # A Function must not return what it was given.
    return come.view_as(come) if come is rows else come.to(rows.dtype)
