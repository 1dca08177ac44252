"""Who sends which rows to whom in a gather: found out once, from the names that all ranks ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import KnownRows, Request, answer_asked, asked_bytes, asked_names
from pdrs._ranks.exchange import Call, Line, Mail
from pdrs._rows.gather import Missing
from pdrs._torch.errors import MissingEntryError

__all__ = ["GENERATION", "Answer", "Plan", "exchange_requests", "meet_with_request"]

# What a header has for each peer: known and new names, the bytes of these, and the generation of the sender's rows.
_KNOWN, GENERATION = 1, 4
# The status of a rank that asks for new names, of any rank.
_ASKS = 1
_NO_ROW = 2**32 - 1
_LISTED = 5

_Ints = NDArray[np.int64]


class Plan:
    """Names whose owners and rows all ranks have found out together. :meth:`ShardedParameterDict.plan` makes it.

    Attributes
    ----------
    names
        The names, in order.
    """

    __slots__ = (
        "any_new",
        "counts",
        "dictionary",
        "generations",
        "give",
        "has_absent",
        "length",
        "missing",
        "names",
        "number",
        "of_replicas",
        "place",
        "rows",
        "shape",
        "take",
    )

    dictionary: int
    names: Sequence[str]
    missing: Missing
    # The shape of a row.
    shape: tuple[int, ...]
    # Whether any rank has asked for names whose rows it does not know.
    any_new: bool
    # Which plan of the dictionary this is: all ranks must use the same.
    number: int
    # The generation of each rank's rows: if one changes, row numbers are void.
    generations: list[int]
    # The own rows that go to the ranks, those for rank 0 first, and how many to each.
    rows: Tensor
    give: list[int]
    # The own rows that all replicas ask for, and how many each rank does; None if there is one replica.
    of_replicas: Tensor
    counts: list[int] | None
    # How many rows come from each rank, and which of them each name has; None if its number. The row after the last one
    # is of zeros.
    take: list[int]
    place: Tensor | None
    has_absent: bool
    # How many rows the result has.
    length: int

    def __len__(self) -> int:
        """Return the number of rows of the result."""
        return self.length

    def __repr__(self) -> str:
        return f"Plan({len(self.names)} names, missing={self.missing!r})"


Answer = Callable[[list[str]], _Ints]


def meet_with_request(line: Line, call: Call, request: Request, generation: int, shape: int) -> Mail:
    """Meet the other ranks, and tell each what this one asks for, and all the number of the shape of the rows."""
    payload, give = request.payload(generation)
    return line.meet_with(request.message(), give, call, payload, int(request.asks) | shape << 1)


def exchange_requests(
    line: Line, request: Request, mail: Mail, known: KnownRows, missing: Missing, answer: Answer | None, call: Call
) -> Plan:
    """Answer what all ranks ask for, after they have met, and return the plan of this rank.

    Parameters
    ----------
    line, call
        The way to the other ranks, and the call that they have met for.
    request
        What this rank asks for.
    mail
        What the ranks have told and sent in :func:`meet_with_request`.
    known
        Where the rows of new names are remembered.
    missing
        ``"error"`` raises if a name has no row, on all ranks.
    answer
        Returns the own row of each name, or -1. If it raises, all ranks do. None if no rank asks for new names.
    """
    told = mail.told
    come = mail.receive(asked_bytes(told[:, _KNOWN:GENERATION]), call)
    plan = Plan()
    plan.any_new = answer is not None
    if answer is None:
        rows = come.view(np.uint32).astype(np.int64)
        plan.give = told[:, _KNOWN].tolist()
        new_rows = np.empty(0, np.uint32)
    else:
        counts = told[:, _KNOWN:GENERATION]
        failure: Exception | None = None
        found = np.empty(0, np.int64)
        try:
            found = answer(asked_names(come, counts))
            reply, rows, plan.give = answer_asked(come, counts, found)
        except Exception as error:
            failure, reply, rows = error, np.empty(0, np.uint32), found
        give = (4 * counts[:, 1]).tolist() if failure is None else None
        replies = line.call(f"answers to {call.operation}", call.number)
        answers = line.meet_with(reply.view(np.uint8), give, replies, failure=failure)
        new_rows = answers.receive((4 * request.counts()[:, 1]).tolist(), call).view(np.uint32)
        if missing == "error":
            _agree(line, request, new_rows, call)
        known.add(request, new_rows)
    place, plan.take, plan.has_absent = request.place(new_rows)
    if place is not None and plan.has_absent:
        lacking = place < 0
        if missing == "skip":
            place, plan.has_absent = place[~lacking], False
        else:
            place[lacking] = sum(plan.take)
    plan.rows = torch.from_numpy(rows)
    plan.place = None if place is None else torch.from_numpy(place)
    plan.length = len(request) if place is None else len(place)
    plan.missing, plan.number = missing, 0
    plan.dictionary = line.dictionary
    return plan


def _agree(line: Line, request: Request, rows: NDArray[np.uint32], call: Call) -> None:
    """Raise on all ranks if a name is missing on one."""
    lacking = np.flatnonzero(rows == _NO_ROW)
    told = line.meet(line.call(f"end of answers to {call.operation}", call.number), [len(lacking), 0, 0, 0])
    if not told[:, 1].any():
        return
    some = ""
    if len(lacking):
        names = request.new_names()
        some = ", ".join(repr(names[at][:100]) for at in lacking[:_LISTED].tolist())
    said = line.texts(call, f"{some}{', ...' if len(lacking) > _LISTED else ''}")
    listing = "; ".join(
        f"{count} of rank {line.ranks.global_rank(rank)}: {text}"
        for rank, (count, text) in enumerate(zip(told[:, 1].tolist(), said, strict=True))
        if count
    )
    raise line.ranks.agreed(MissingEntryError(f"names are not in the dictionary: {listing}"))
