"""What a rank asks the owners for, as Python has it: names of any kind, and arguments that cannot be.

The bugs that this hunts: characters that are sent as others; names in something else than a list of exact ``str`` that
are looked up otherwise; an owner that is not the one that hashes say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pdrs._core import KnownRows, Request, answer_asked, asked_names
from pdrs._ranks.owners import owners_of

ODD_NAMES = ["\0", "a\0b", "\ud800", "x\udfff", "é", "e\u0301", "名前", "\U0001f600", " ", "long" * 2_000, "é" * 5_000]


class Text(str):
    """A ``str`` whose class says that it is equal to nothing."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def no_rows() -> Any:
    return np.empty(0, np.uint32)


@pytest.mark.parametrize("hold", [list, tuple, iter, lambda names: [*map(Text, names)]])
@pytest.mark.parametrize(("first", "shards", "world"), [(0, 1, 1), (0, 3, 3), (2, 2, 5)])
def test_names_are_sent_as_they_are(hold: Callable[[list[str]], Any], first: int, shards: int, world: int) -> None:
    known = KnownRows(100)
    names = [*ODD_NAMES, *ODD_NAMES[::-1]]
    request = Request(hold(names), known, world, first, shards)
    assert len(request) == len(names)
    assert request.asks
    counts, message = request.counts(), request.message()
    sent = asked_names(message, counts)
    assert sent == request.new_names()
    assert sorted(sent) == sorted(ODD_NAMES)
    owners = first + owners_of(sent, shards)
    assert owners.tolist() == np.repeat(np.arange(world), counts[:, 1]).tolist()
    rows = np.arange(len(sent))
    reply, given, give = answer_asked(message, counts, rows)
    assert reply.tolist() == given.tolist() == rows.tolist()
    assert give == counts[:, 1].tolist()
    place, take, has_absent = request.place(reply)
    assert place is not None
    assert [sent[at] for at in place] == names
    assert take == give
    assert not has_absent
    known.add(request, reply)
    again = Request(hold(names), known, world, first, shards)
    assert not again.asks
    order = {name: at for at, name in enumerate(sent)}
    place, take, has_absent = again.place(no_rows())
    assert place is not None
    rows_that_come = again.message().view(np.uint32)
    assert rows_that_come[place].tolist() == [order[name] for name in names]
    known.forget(first)
    rest = Request(hold(names), known, world, first, shards)
    assert sorted(rest.new_names()) == sorted(name for name, one in zip(sent, owners, strict=True) if one == first)


def test_an_array_holds_names() -> None:
    request = Request(np.array(["a", "b", "a"]), KnownRows(2), 1)
    assert request.new_names() == ["a", "b"]
    assert request.place(np.array([5, 6], np.uint32))[0].tolist() == [0, 1, 0]


def test_distinct_names_in_order_need_no_place() -> None:
    assert Request(["a", "b"], KnownRows(2), 1).place(np.array([5, 6], np.uint32)) == (None, [2], False)
    assert Request([], KnownRows(2), 3).place(no_rows()) == (None, [0, 0, 0], False)


def test_names_without_a_row_have_no_place() -> None:
    known = KnownRows(10)
    request = Request(["a", "b", "a"], known, 1)
    rows = np.array([2**32 - 1, 4], np.uint32)
    place, take, has_absent = request.place(rows)
    assert (place.tolist(), take, has_absent) == ([-1, 0, -1], [1], True)
    known.add(request, rows)
    assert Request(["a", "b"], known, 1).new_names() == ["a"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", ""], KeyError, "empty string"),
        ([""], KeyError, "empty string"),
        ([Text("")], KeyError, "empty string"),
        (["a", 3], TypeError, "names must be str, got int at position 1"),
        (["a", None], TypeError, "got NoneType at position 1, a missing value"),
        (["a", b"b"], TypeError, "got bytes at position 1"),
        ("ab", TypeError, "got a single str"),
        (3, TypeError, "got int"),
    ],
)
def test_what_is_no_name_is_refused(names: Any, error: type[Exception], message: str) -> None:
    known = KnownRows(10)
    with pytest.raises(error, match=message):
        Request(names, known, 2)
    assert len(known) == 0


@pytest.mark.parametrize(("world", "first", "shards"), [(0, 0, None), (2, 1, 2), (2, 0, 0), (5000, 0, None)])
def test_ranks_that_cannot_be_are_refused(world: int, first: int, shards: int | None) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4096 shards"):
        Request(["a"], KnownRows(1), world, first, shards)


def test_messages_that_cannot_be_are_refused() -> None:
    request = Request(["é"], KnownRows(1), 1)
    message, counts = request.message(), request.counts()
    with pytest.raises(ValueError, match="expected a length of 6, got 5"):
        asked_names(message[:-1], counts)
    with pytest.raises(ValueError, match="expected three numbers for each rank, got 2"):
        asked_names(message, counts[:, :2])
    with pytest.raises(ValueError, match="a rank asks for -1 names"):
        asked_names(message, -counts)
    with pytest.raises(ValueError, match="expected a length of 1, got 2"):
        answer_asked(message, counts, np.arange(2))
    message[-1] = 0
    with pytest.raises(ValueError, match="not UTF-8"):
        asked_names(message, counts)


def test_the_cache_has_a_bound() -> None:
    known = KnownRows(1000)
    sizes = []
    for start in range(0, 50_000, 100):
        request = Request([f"name/{number:07}" for number in range(start, start + 100)], known, 2)
        known.add(request, np.arange(100, dtype=np.uint32))
        assert len(known) <= 1000
        sizes.append(sys.getsizeof(known))
    assert max(sizes) == max(sizes[:20])
