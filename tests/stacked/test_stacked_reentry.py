"""What runs in the middle of a method of a StackedParameterDict, on the same thread, and uses the same dictionary.

The bugs that this hunts: a finalizer, a callback or a hook that finds names and rows at odds, or changes them under a
change that has been planned already: two names of one row, a name that is lost, a row of another name; a collector that
is off after `gc.disable()` and `gc.enable()` of other threads; a read that is refused though nothing is half-way.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from observed import At, StateKey, assert_consistent

SD = pdrs.StackedParameterDict


def numbered(count: int = 4) -> SD:
    return SD.from_tensor([f"k{at}" for at in range(count)], torch.arange(2.0 * count).reshape(count, 2))


def fits(sd: SD) -> None:
    """Fail if names do not have rows of their own, or the numbers that they began with."""
    assert_consistent(sd)
    for name, row in sd.items():
        if name.startswith("k"):
            number = 2.0 * int(name[1:])
            assert row.tolist() == [number, number + 1], name


READS: dict[str, Callable[[SD], Any]] = {
    "getitem": lambda sd: sd["k0"].tolist(),
    "get": lambda sd: sd.get("k0"),
    "in": lambda sd: "k0" in sd,
    "items": lambda sd: [(name, row.tolist()) for name, row in sd.items()],
    "gather rows": lambda sd: sd.gather(["k0", "k2"]),
    "rows": lambda sd: sd.indices(["k0"]),
    "state_dict": lambda sd: sd.state_dict(),
    "named_state_dict": lambda sd: sd.named_state_dict(),
    "norms": lambda sd: sd.norms(),
    "repr": repr,
    "copy": lambda sd: sd.copy(),
}
CHANGES: dict[str, Callable[[SD], Any]] = {
    "set": lambda sd: sd.__setitem__("x", torch.ones(2)),
    "set an old one": lambda sd: sd.__setitem__("k1", sd["k1"].detach().clone()),
    "set of another shape": lambda sd: sd.__setitem__("x", torch.ones(3)),
    "update": lambda sd: sd.update({"x": torch.ones(2)}),
    "setdefault": lambda sd: sd.setdefault("x", torch.ones(2)),
    "del": lambda sd: sd.__delitem__("k1"),
    "pop": lambda sd: sd.pop("k1"),
    "popitem": lambda sd: sd.popitem(),
    "drop": lambda sd: sd.drop(["k1"]),
    "clear": lambda sd: sd.clear(),
    "insert": lambda sd: sd.gather(["x"], missing="insert"),
    "scatter": lambda sd: sd.scatter(["k1"], sd["k1"].detach().clone()[None]),
    "reserve": lambda sd: sd.reserve(9),
    "compact": lambda sd: sd.compact(),
    "freeze": lambda sd: sd.freeze(["k1"]),
    "unfreeze": lambda sd: sd.unfreeze(),
    "groups": lambda sd: sd.param_groups(by={"k1": {}}),
    "load": lambda sd: sd.load_state_dict(numbered(5).state_dict()),
    "load named": lambda sd: sd.load_state_dict(numbered(4).named_state_dict()),
    "move": lambda sd: sd.double(),
    "attach": lambda sd: sd.attach_optimizer(torch.optim.SGD(sd.parameters())),
}


ALL = READS | CHANGES


@pytest.mark.parametrize("read", READS)
def test_init_may_read_the_dictionary(read: str) -> None:
    sd, seen = numbered(), []
    sd.gather(["new"], missing="insert", init=lambda _: seen.append(READS[read](sd)))
    assert len(seen) == 1
    assert list(sd) == ["k0", "k1", "k2", "k3", "new"]
    fits(sd)


@pytest.mark.parametrize("change", CHANGES)
def test_init_cannot_change_the_dictionary(change: str) -> None:
    sd = numbered()
    with pytest.raises(RuntimeError, match="the dictionary is being changed"):
        sd.gather(["new"], missing="insert", init=lambda _: CHANGES[change](sd))
    assert list(sd) == ["k0", "k1", "k2", "k3"]
    fits(sd)
    CHANGES[change](sd)  # afterwards it can be changed


@pytest.mark.parametrize("use", sorted(ALL.keys() - {"in"}))  # which asks one thing, and is always answered
def test_python_code_in_the_middle_of_a_step_gets_an_error_and_the_change_is_made(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd, errors = numbered(), list[str]()
    optimizer = torch.optim.SGD(sd.parameters())
    sd.attach_optimizer(optimizer, initial_state=dict.fromkeys(keys := [StateKey(), StateKey()], 0.0))
    optimizer.state[sd.table((2,))] = {key: torch.ones(4, 2) for key in keys}

    def intrude() -> None:
        try:
            ALL[use](sd)
        except RuntimeError as error:
            if "what runs in the middle of a change" in str(error):
                errors.append(use)

    monkeypatch.setattr(StateKey, "asked", intrude)
    sd.update({"new": torch.ones(2), "newer": torch.ones(2)})  # the table grows, and the state with it
    monkeypatch.undo()
    assert errors
    assert [*sd][-2:] == ["new", "newer"]
    fits(sd)


class Cycle:
    """What only the garbage collector frees, and what it does then."""

    def __init__(self, last_words: Callable[[], object]) -> None:
        self.itself, self.last_words = self, last_words

    def __del__(self) -> None:
        self.last_words()


@pytest.fixture
def collecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Give what finalizers raise, and let the collector come as often as it can."""
    refused: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: refused.append(what.exc_value))
    thresholds, enabled = gc.get_threshold(), gc.isenabled()
    gc.collect(0)
    gc.freeze()
    try:
        yield refused
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("last_words", ["compact", "pop", "set", "groups", "load"])
@pytest.mark.parametrize("use", ["getitem", "gather rows", "items", "set", "set an old one", "pop", "drop"])
def test_whenever_the_collector_comes_names_have_their_rows(use: str, last_words: str, collecting: list[Any]) -> None:
    before = {"pop": lambda sd: sd.pop("k7", None)}.get(last_words, CHANGES[last_words])
    for tracked in range(1, 30, 2):
        gc.disable()
        sd = numbered(8)
        sd.pop("k0" if use not in ("getitem", "gather rows") else "k4")
        Cycle(lambda sd=sd: before(sd))
        gc.set_threshold(tracked, 1000, 1000)
        gc.enable()
        found = []
        try:
            found = ALL[use](sd)
        except RuntimeError as error:
            if use != "items" or "during iteration" not in str(error):  # as that of any dict
                raise
        gc.disable()
        gc.collect()
        if use == "getitem":
            assert found == [0.0, 1.0]
        elif use == "gather rows":
            assert found.tolist() == [[0.0, 1.0], [4.0, 5.0]]
        elif use == "items":
            assert all(row == [2.0 * int(name[1:]), 2.0 * int(name[1:]) + 1] for name, row in found if name[0] == "k")
        fits(sd)
    assert all("the dictionary is being changed" in str(error) for error in collecting), collecting


def test_a_finalizer_that_pops_while_names_are_read_is_heard(collecting: list[Any]) -> None:
    sd = numbered(200)
    gc.set_threshold(7, 1000, 1000)
    gc.enable()
    for at in range(100):
        Cycle(lambda name=f"k{at}": sd.pop(name))
        sd["k150"], sd.gather(["k151", "k152"]), sd.get("k153")
    gc.collect()
    assert collecting == []
    assert len(sd) == 100


@pytest.mark.parametrize(
    ("read", "move"),
    [
        (lambda sd: sd["k7"], SD.compact),
        (lambda sd: sd.get("k7"), SD.compact),
        (lambda sd: sd.gather(["k7"])[0], lambda sd: sd.param_groups(by={"k7": {}})),
        (lambda sd: sd.gather(["k7"])[0], SD.compact),
        (lambda sd: sd.gather(sd.lookup(["k7"]))[0], SD.compact),
    ],
    ids=["getitem", "get", "gather", "gather of a shorter table", "lookup"],
)
def test_a_row_that_moves_while_it_is_looked_up_is_looked_up_again(
    read: Callable[[SD], Tensor], move: Callable[[SD], Any]
) -> None:
    def dropped() -> SD:
        sd = numbered(8)
        sd.drop(["k0", "k1"])
        return sd

    sd = dropped()
    with At() as steps:
        read(sd)
    assert len(steps.places) > 3
    for step, place in enumerate(steps.places):
        sd = dropped()
        with At(step, partial(move, sd)):
            row = read(sd)
        assert row.tolist() == [14.0, 15.0], place
        assert sd.indices(["k7"]).tolist() != [7]
        fits(sd)


@pytest.mark.parametrize("change", ["set", "set an old one", "pop", "popitem"])
def test_names_that_are_loaded_in_the_middle_of_a_change_keep_their_rows(change: str) -> None:
    def prepared() -> SD:
        sd = numbered(6)
        sd.attach_optimizer(torch.optim.SGD(sd.parameters()))
        sd.pop("k0")
        return sd

    other = prepared()
    other.drop(["k1", "k5"])  # else who loads names alone would find them with rows of zeros
    other.compact()
    names_in_other_rows = other.get_extra_state()
    sd = prepared()
    with At() as steps:
        CHANGES[change](sd)
    assert steps.places
    for step in range(len(steps.places)):
        sd = prepared()
        with contextlib.suppress(RuntimeError, KeyError), At(step, partial(sd.set_extra_state, names_in_other_rows)):
            CHANGES[change](sd)
        fits(sd)
