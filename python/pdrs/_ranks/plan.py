"""Who sends which rows to whom in a gather: found out once, from the names that all ranks ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import IndexMap
from pdrs._ranks.exchange import Call, Line
from pdrs._ranks.known_rows import OWNER_BITS, KnownRows
from pdrs._ranks.owners import Owners
from pdrs._rows.gather import Missing
from pdrs._torch.errors import MissingEntryError

__all__ = ["GENERATION", "Answer", "Plan", "Request", "exchange_requests"]

# What a header has for each peer: known and new names, the bytes of these, and the generation of the sender's rows.
_KNOWN, _NEW, _TEXT, GENERATION = 1, 2, 3, 4
# The status of a rank that asks for new names, of any rank.
_ASKS = 1
_ROW_MASK = (1 << OWNER_BITS) - 1
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
    generations: _Ints
    # The own rows that go to the ranks, those for rank 0 first, and how many to each.
    rows: Tensor
    give: list[int]
    # The own rows that all replicas ask for, and how many each rank does; None if there is one replica.
    of_replicas: Tensor
    counts: list[int] | None
    # How many rows come from each rank, and which of them each name has. The row after the last one is of zeros.
    take: list[int]
    place: Tensor
    has_absent: bool

    def __len__(self) -> int:
        """Return the number of rows of the result."""
        return len(self.place)

    def __repr__(self) -> str:
        return f"Plan({len(self.names)} names, missing={self.missing!r})"


class Request:
    """What one rank asks for, in the order of owners: rows of known names, then new names as text.

    Parameters
    ----------
    names
        Names in order; some may be listed many times.
    known
        What is known of them.
    owners
        Which ranks share the names.

    Raises
    ------
    TypeError
        If a name is not a ``str``.
    KeyError
        If a name is empty.
    """

    def __init__(self, names: Sequence[str], known: KnownRows, owners: Owners) -> None:
        ids = known.find(names)
        there = ids >= 0
        self._complete = bool(there.all())
        distinct, self._known_of = np.unique(ids if self._complete else ids[there], return_inverse=True)
        owners_of_known = distinct >> OWNER_BITS
        self.rows = (distinct & _ROW_MASK).astype(np.uint32)
        self.known = np.bincount(owners_of_known, minlength=owners.ranks)
        self.new_names: list[str] = []
        self.new = np.zeros(owners.ranks, np.int64)
        self._there = there
        self._new_of = np.empty(0, np.int64)
        self._texts: list[bytes] = []
        if not self._complete:
            self._add_new([names[at] for at in np.flatnonzero(~there).tolist()], owners)
        ends = np.cumsum(self.new)
        text = [sum(map(len, self._texts[end - count : end])) for end, count in zip(ends, self.new, strict=True)]
        self.text = np.array(text, np.int64)

    def _add_new(self, names: list[str], owners: Owners) -> None:
        index = IndexMap()
        places = index.extend(names)
        distinct = list(index)
        if "" in index:
            raise KeyError('parameter name can\'t be empty string ""')
        owners_of_new = owners.of(distinct)
        order = np.argsort(owners_of_new, kind="stable")
        self.new_names = [distinct[at] for at in order.tolist()]
        self.new = np.bincount(owners_of_new, minlength=owners.ranks)
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        self._new_of = position[places]
        self._texts = [name.encode("utf-8", "surrogatepass") for name in self.new_names]

    def payload(self, generation: int) -> _Ints:
        """Return what the header has for each peer."""
        return np.stack([self.known, self.new, self.text, np.full_like(self.known, generation)], 1)

    def message(self) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the message, and how many bytes of it are for each rank."""
        sizes = 4 * self.known + 4 * self.new + self.text
        if not self.new_names:
            return self.rows.view(np.uint8), sizes.tolist()
        lengths = np.array(list(map(len, self._texts)), np.uint32)
        parts: list[Any] = []
        known = new = 0
        for of_known, of_new in zip(self.known.tolist(), self.new.tolist(), strict=True):
            parts += [self.rows[known : known + of_known].tobytes(), lengths[new : new + of_new].tobytes()]
            parts += self._texts[new : new + of_new]
            known, new = known + of_known, new + of_new
        return np.frombuffer(bytearray(b"".join(parts)), np.uint8), sizes.tolist()

    def place(self, found: NDArray[np.bool_]) -> tuple[_Ints, list[int]]:
        """Return which row that comes each name has, or -1, and how many rows come from each rank.

        ``found`` says which of the new names have a row.
        """
        owners_of_new = np.repeat(np.arange(len(self.new)), self.new)
        coming = np.bincount(owners_of_new[found], minlength=len(self.new))
        take = (self.known + coming).tolist()
        known = np.arange(len(self.rows)) + np.repeat(np.cumsum(coming) - coming, self.known)
        if self._complete:
            return known[self._known_of], take
        new = np.where(found, np.cumsum(self.known)[owners_of_new] + np.cumsum(found) - 1, -1)
        place = np.empty(len(self._there), np.int64)
        place[self._there] = known[self._known_of]
        place[~self._there] = new[self._new_of]
        return place, take


Answer = Callable[[list[str]], _Ints]


def exchange_requests(
    line: Line, request: Request, told: _Ints, known: KnownRows, missing: Missing, answer: Answer, call: Call
) -> Plan:
    """Exchange what all ranks ask for, after they have met, and return the plan of this rank.

    Parameters
    ----------
    line, call
        The way to the other ranks, and the call that they have met for.
    request
        What this rank asks for.
    told
        The headers that the ranks have told.
    known
        Where the rows of new names are remembered.
    missing
        ``"error"`` raises if a name has no row, on all ranks.
    answer
        Returns the own row of each name, or -1. If it raises, all ranks do.
    """
    message, give = request.message()
    sizes = 4 * told[:, _KNOWN] + 4 * told[:, _NEW] + told[:, _TEXT]
    come = line.exchange_bytes(message, give, sizes.tolist(), call)
    plan = Plan()
    plan.any_new = bool((told[:, 0] & _ASKS).any())
    if not plan.any_new:
        plan.rows = torch.from_numpy(come.view(np.uint32).astype(np.int64))
        plan.give = told[:, _KNOWN].tolist()
        found = np.zeros(0, np.bool_)
    else:
        known_rows, asked = _unpacked(come, told)
        names = [name for of_rank in asked for name in of_rank]
        failure: Exception | None = None
        try:
            rows = answer(names)
        except Exception as error:
            failure, rows = error, np.full(len(names), -1)
        counts = [len(of_rank) for of_rank in asked]
        reply = np.where(rows < 0, _NO_ROW, rows).astype(np.uint32).view(np.uint8)
        back = line.exchange_bytes(reply, [4 * one for one in counts], (4 * request.new).tolist(), call)
        new_rows = back.view(np.uint32).astype(np.int64)
        found = new_rows != _NO_ROW
        _agree(line, request.new_names, found, missing, failure, call)
        owners = np.repeat(np.arange(len(request.new)), request.new)[found]
        known.add([name for name, one in zip(request.new_names, found.tolist(), strict=True) if one],
                  owners << OWNER_BITS | new_rows[found])  # fmt: skip
        parts, plan.give, at = [], [], 0
        for of_known, count in zip(known_rows, counts, strict=True):
            of_new = rows[at : at + count]
            of_new = of_new[of_new >= 0]
            parts += [of_known, of_new]
            plan.give.append(len(of_known) + len(of_new))
            at += count
        plan.rows = torch.from_numpy(np.concatenate(parts))
    place, plan.take = request.place(found)
    lacking = place < 0
    plan.has_absent = bool(lacking.any())
    if plan.has_absent and missing == "skip":
        place, plan.has_absent = place[~lacking], False
    elif plan.has_absent:
        place[lacking] = sum(plan.take)
    plan.place = torch.from_numpy(place)
    plan.missing, plan.number = missing, 0
    plan.dictionary = line.dictionary
    plan.generations = told[:, GENERATION].copy()
    return plan


def _unpacked(come: NDArray[np.uint8], told: _Ints) -> tuple[list[_Ints], list[list[str]]]:
    """Return the rows and the names that each rank asks for."""
    whole = come.tobytes()
    rows, names, at = [], [], 0
    for known, new in told[:, [_KNOWN, _NEW]].tolist():
        rows.append(np.frombuffer(whole, np.uint32, known, at).astype(np.int64))
        at += 4 * known
        lengths = np.frombuffer(whole, np.uint32, new, at).tolist()
        at += 4 * new
        of_rank = []
        for length in lengths:
            of_rank.append(whole[at : at + length].decode("utf-8", "surrogatepass"))
            at += length
        names.append(of_rank)
    return rows, names


def _agree(
    line: Line, names: list[str], found: NDArray[np.bool_], missing: Missing, failure: Exception | None, call: Call
) -> None:
    """Raise on all ranks if a name is missing on one that must not be, or if an owner has failed."""
    absent = [name for name, one in zip(names, found.tolist(), strict=True) if not one]
    told = line.meet(line.call(f"answers to {call.operation}", call.number), len(absent), 0, failure)
    if missing != "error" or not told[:, 1].any():
        return
    some = ", ".join(repr(name[:100]) for name in absent[:_LISTED])
    said = line.texts(call, f"{some}{', ...' if len(absent) > _LISTED else ''}" if absent else "")
    listing = "; ".join(
        f"{count} of rank {line.ranks.global_rank(rank)}: {text}"
        for rank, (count, text) in enumerate(zip(told[:, 1].tolist(), said, strict=True))
        if count
    )
    raise line.ranks.agreed(MissingEntryError(f"names are not in the dictionary: {listing}"))
