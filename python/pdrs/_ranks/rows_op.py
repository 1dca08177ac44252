"""Rows that go from their owners to the ranks that asked for them, and their gradients, which go back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pdrs._ranks.exchange import BYTES_AT, Call, Data, Line, Mail, Room, Sums
from pdrs._ranks.mesh import of_replicas, own_part
from pdrs._ranks.owners import Owners
from pdrs._rows.names_codec import bytes_of

__all__ = ["Come", "Route", "RowsMail", "can_add", "exchange_rows", "meet_with_rows", "received_rows"]


class Route(NamedTuple):
    """Where rows go, and where their gradients come back from."""

    line: Line
    # Which gather this is.
    number: int
    # How many rows go to each rank, and how many come from it.
    give: list[int]
    take: list[int]
    # The dtype in which rows and gradients are sent; None for their own.
    wire: torch.dtype | None
    # What gradients are divided by.
    divisor: int
    owners: Owners
    # How many of the own rows are asked for in the replica of each rank; None if there is one replica.
    counts: list[int] | None
    # Which of the rows that come is each row of the result; None if its number.
    place: Tensor | None
    # Whether there is one more row, of zeros.
    has_absent: bool


class Come(NamedTuple):
    """Rows that have come from the ranks."""

    rows: Tensor
    # Whether they lie as the result has them, and not yet as they have come.
    in_place: bool


def exchange_rows(rows: Tensor, route: Route, come: Come | None = None) -> Tensor:
    """Send rows ``[sum(give), elements]`` to the ranks, and return those that come, in their places.

    Parameters
    ----------
    rows
        The rows that this rank owns, those for rank 0 first. With replicas, those that all of them ask for: only those
        of the own replica are sent, and the gradients of all come.
    route
        All ranks have met before this call. They meet again before gradients go back.
    come
        The rows that have come, if they have been exchanged already.
    """
    return _Exchange.apply(rows, route, [come])  # type: ignore[no-any-return]


class RowsMail(NamedTuple):
    """What :func:`meet_with_rows` returns."""

    mail: Mail
    # The rows that were sent, or what they are sums of, and how many go to each rank and come from it.
    rows: Tensor
    give: list[int]
    take: list[int]
    # Where rows come to, if they come with the headers, and there are other ranks.
    come: list[Come]


def meet_with_rows(
    rows: Tensor,
    line: Line,
    give: list[int],
    take: list[int],
    call: Call,
    payload: int = 0,
    *,
    place: Tensor | None = None,
    add_to: Tensor | None = None,
) -> RowsMail:
    """Meet the other ranks, send ``give[r]`` rows to each rank ``r``, and expect ``take[r]`` of it.

    Rows that the host does not have are sent later.

    Parameters
    ----------
    payload
        The last number of the header.
    place
        Which of the rows that come is wanted where. They are put there if all come with the headers.
    add_to
        To which of the rows that are sent each of ``rows`` is added. :func:`can_add` must hold.
    """
    elements = rows.shape[1]
    width = elements * rows.element_size()
    sizes = [count * width for count in give]
    head = (0, 0, 0, payload)
    if not rows.is_cpu:
        return RowsMail(line.meet_with(None, sizes, call, head), rows, give, take, [])
    come: list[Come] = []

    def make_room() -> Room:
        made = rows.new_empty(sum(take) if place is None else len(place), elements)
        come.append(Come(made, place is not None))
        which = None if place is None else (width, place.numpy())
        return Room(made.view(torch.uint8).numpy(), [count * width for count in take], which)

    data: Data
    if add_to is not None:
        data = Sums(add_to.numpy(), rows.numpy())
    # A step is as short as a few milliseconds. These two calls take a fifth of what `bytes_of` does.
    elif rows.is_contiguous() and rows.stride(1) == 1 and not rows.is_complex() and not rows.is_neg():
        data = rows.view(torch.uint8).numpy()
    else:
        data = bytes_of(rows)
    return RowsMail(line.meet_with(data, sizes, call, head, make_room=make_room), rows, give, take, come)


def can_add(rows: Tensor, line: Line, give: list[int]) -> bool:
    """Whether :func:`meet_with_rows` can send sums of these rows."""
    if not rows.is_cpu or rows.dtype not in (torch.float32, torch.float64):
        return False
    width = rows.shape[1] * rows.element_size()
    return line.ranks.fits([count * width for count in give])


def received_rows(arriving: RowsMail, line: Line, call: Call) -> Come:
    """Return the rows that come after :func:`meet_with_rows`, those of rank 0 first unless they are in place."""
    mail, rows, give, take, come = arriving
    if mail.have_come:
        return come[0]
    if line.ranks.size == 1:
        return Come(rows, False)
    if not come:
        return Come(line.exchange(rows, give, take, call), False)
    width = rows.shape[1] * rows.element_size()
    sizes = [count * width for count in take]
    if (told := mail.told[:, BYTES_AT].tolist()) != sizes:
        raise RuntimeError(f"expected {sizes} bytes of rows from the ranks, got {told}")
    received = rows.new_empty(sum(take), rows.shape[1])
    mail.receive_into(bytes_of(received), sizes, call)
    return Come(received, False)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, come: list[Come | None]) -> Tensor:
        ctx.route = route
        if come[0] is not None:
            found, in_place = come[0]
            if in_place:
                return found
        else:
            sent = own_part(route.line, rows, route.counts)
            sent = sent if route.wire is None else sent.to(route.wire)
            found = route.line.exchange(sent, route.give, route.take, route.line.call("rows of gather", route.number))
        found = found.to(rows.dtype)
        if route.has_absent:
            found = torch.cat([found, found.new_zeros(1, found.shape[1])])
        if route.place is not None:
            return found.index_select(0, route.place)
        # A Function must not return what it was given, and the caller may change what a view must not.
        return found.clone() if found is rows else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        line, number, give, take, wire, divisor, owners, counts, place, has_absent = ctx.route
        call = line.call("backward of gather", number)
        with line.ranks.in_step():
            add_to = None
            sent = gradient
            if place is not None and wire in (None, gradient.dtype) and can_add(gradient, line, take):
                sent, add_to = gradient.resolve_neg().contiguous(), place
            elif place is not None:
                count = sum(take)
                # index_add_ is several times slower for an expanded gradient, which a sum has.
                sent = gradient.new_zeros(count + has_absent, gradient.shape[1])
                sent = sent.index_add_(0, place, gradient.contiguous())[:count]
            sent = sent if wire is None else sent.to(wire)
            own = received_rows(meet_with_rows(sent, line, take, give, call, add_to=add_to), line, call).rows
            if counts is not None:
                own = of_replicas(line, owners, own, counts, call)
            own = own.to(gradient.dtype)
        if divisor != 1:
            own = own.div_(divisor)
        return own, None, None
