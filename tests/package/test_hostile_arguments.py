"""Arguments that claim to be lists of names, arrays or mappings, and are anything.

The bugs that this hunts: a call that never returns, or ends the process, because what it asks gives itself; a read of
memory that Python code has given back meanwhile; a panic, which is no Exception, in the place of an error.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

import pdrs

INDEX, SD = pdrs.IndexMap, pdrs.StackedParameterDict


def dictionary() -> pdrs.StackedParameterDict:
    return SD.from_tensor(["a", "b", "c"], torch.ones(3, 2))


class GivesItself:
    def tolist(self) -> GivesItself:
        return self


class GivesAnother:
    def tolist(self) -> GivesAnother:
        return GivesAnother()


class GivesText:
    def tolist(self) -> str:
        return "abc"


class Raises:
    def tolist(self) -> list[str]:
        raise RuntimeError("no")


NAMES_OF: dict[str, Callable[[Any], Any]] = {
    "lookup": lambda names: INDEX().indices(names),
    "lookup with default": lambda names: INDEX().indices(names, missing=-1),
    "extend": lambda names: INDEX().extend(names),
    "from_names": lambda names: INDEX.from_names(names),
    "from_names with rows": lambda names: INDEX.from_names(names, np.arange(3)),
    "gather": lambda names: dictionary().gather(names),
    "gather and insert": lambda names: dictionary().gather(names, missing="insert"),
    "scatter": lambda names: dictionary().scatter(names, torch.ones(3, 2), missing="insert"),
    "lookup of rows": lambda names: dictionary().lookup(names),
    "indices": lambda names: dictionary().indices(names),
    "isin": lambda names: dictionary().isin(names),
    "drop": lambda names: dictionary().drop(names),
    "freeze": lambda names: dictionary().freeze(names),
    "from_tensor": lambda names: SD.from_tensor(names, torch.ones(3, 2)),
}


HOSTILE = [GivesItself, GivesAnother, GivesText, Mock]


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("call", NAMES_OF)
def test_what_gives_no_list_is_no_list_of_names(call: str, make: type) -> None:
    whose = "" if make is Mock else r", whose tolist\(\) returned"  # a Mock's class has no such method
    with pytest.raises(TypeError, match=f"got {make.__name__}{whose}"):
        NAMES_OF[call](make())


@pytest.mark.parametrize("call", NAMES_OF)
def test_what_an_array_raises_goes_through(call: str) -> None:
    with pytest.raises(RuntimeError, match="no"):
        NAMES_OF[call](Raises())


@pytest.mark.parametrize("make", [*HOSTILE, MagicMock])
def test_a_stacked_dictionary_refuses_them_too_and_stays_as_it_is(make: type) -> None:
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 3))
    for call in (sd.indices, sd.gather, sd.drop, sd.freeze, lambda names: sd.from_tensor(names, torch.zeros(1, 3))):
        try:
            call(make())
        except (TypeError, ValueError, AttributeError):
            continue
        assert make is MagicMock  # which has no names
    assert list(sd) == ["a", "b"]


@pytest.mark.parametrize("call", NAMES_OF)
def test_a_list_that_changes_while_it_is_read_is_read_as_it_is_then(call: str) -> None:
    names: list[Any] = ["a", "b"] * 200
    given: list[str] = []

    class Shrinks:
        def __iter__(self) -> Iterator[str]:
            for at, name in enumerate(list(names)):
                given.append(name)
                if at == 50:
                    names.clear()
                yield name

        def __len__(self) -> int:
            names.clear()
            return 1 << 60

    with contextlib.suppress(KeyError, ValueError):
        NAMES_OF[call](Shrinks())
    assert given in ([], ["a", "b"] * 200), "read in part"


class Liar(str):
    """A name whose every method does something to the list that it lies in."""

    listed: list[Any]

    def __hash__(self) -> int:
        self.listed.clear()
        return 0

    def __eq__(self, other: object) -> bool:
        self.listed.clear()
        return True

    def __str__(self) -> str:
        self.listed.clear()
        return "other"


@pytest.mark.parametrize("call", NAMES_OF)
def test_methods_of_names_are_not_asked(call: str) -> None:
    names: list[Any] = ["a", "b", "c"]
    names[1] = Liar("b")
    names[1].listed = names
    with contextlib.suppress(KeyError):
        NAMES_OF[call](names)
    assert len(names) == 3


def test_rows_that_are_none_run_their_code_before_anything_is_changed() -> None:
    index = INDEX.from_names(["a", "b"])

    class Row:
        def __index__(self) -> int:
            index.clear()
            index.extend([f"n{n}" for n in range(1000)])
            return 7

    index["new"] = Row()  # type: ignore[assignment]
    assert index["new"] == 7
    assert len(index) == 1001
    index.update([(f"n{n}", Row()) for n in range(3)])  # type: ignore[list-item]
    assert [index[f"n{n}"] for n in range(3)] == [7, 7, 7]


def test_a_walk_over_what_changes_is_an_error_of_python() -> None:
    index = INDEX.from_names([f"n{n}" for n in range(50)])
    pd = pdrs.ParameterDict({f"n{n}": torch.zeros(1) for n in range(50)})
    for walk, change in ((iter(index), index.popitem), (iter(pd.items()), pd.popitem)):
        next(walk)
        change()
        with pytest.raises(RuntimeError, match="changed"):
            next(walk)


@pytest.mark.parametrize("count", [1 << 40, 1 << 62, 1 << 70])
def test_a_number_of_rows_that_cannot_be_held_is_an_error(count: int) -> None:
    sd = dictionary()
    with pytest.raises((MemoryError, OverflowError, RuntimeError, ValueError)):
        sd.reserve(count)
    sd["d"] = torch.zeros(2)
    assert sd.indices(["a", "d"]).tolist() == [0, 3]


def test_deep_copies_stand_a_memo_that_changes_what_is_copied() -> None:
    pd = pdrs.ParameterDict({f"n{n}": torch.zeros(1) for n in range(40)})

    class Key:
        def __init__(self, value: int) -> None:
            self.value = value

        def __hash__(self) -> int:
            return self.value

        def __eq__(self, other: object) -> bool:
            pd._parameters.clear()
            return False

    memo: dict[Any, Any] = {Key(id(value)): None for value in pd.values()}
    with contextlib.suppress(RuntimeError, KeyError, AttributeError):
        assert len(copy.deepcopy(pd, memo)) in (0, 40)
    assert len(pd._parameters) == 0


def test_names_that_never_end_can_be_interrupted_or_run_out_of_memory() -> None:
    code = """
import itertools, resource, pdrs
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
try:
    pdrs.IndexMap().extend(itertools.repeat("a"))
except MemoryError:
    print("alive")
"""
    if sys.platform == "linux":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-1000:]
