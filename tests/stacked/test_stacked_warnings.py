"""What training does to tables without a word: it is said once, where it is so, and nowhere else.

The bugs that this hunts: a warning that does not come where names move, or nothing trains them; one that comes where
all is as with Parameters, or comes again and again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop, SparseAdam

import pdrs

SD = pdrs.StackedParameterDict
Make = Callable[[Any], Optimizer]


def step(
    sd: SD, optimizer: Optimizer, names: list[str], *, sparse: bool = False, closure: bool = False, times: int = 1
) -> None:
    for _ in range(times):
        _step(sd, optimizer, names, sparse, closure)


def _step(sd: SD, optimizer: Optimizer, names: list[str], sparse: bool, closure: bool) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (sd.gather(names, sparse=sparse) - 3).pow(2).sum()
        value.backward()
        return value

    if closure:
        optimizer.step(loss)
    else:
        loss()
        optimizer.step()


MOVING: dict[str, Make] = {
    "Adam": Adam,
    "AdamW": AdamW,
    "NAdam": NAdam,
    "SGD with momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD with decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "RMSprop with momentum": lambda p: RMSprop(p, momentum=0.5),
    "Adagrad with decay": lambda p: Adagrad(p, weight_decay=0.1),
}
STAYING: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "Adagrad": Adagrad,
    "RMSprop": RMSprop,
    "Rprop": Rprop,
    "Adadelta": Adadelta,
}


@contextmanager
def silence() -> Iterator[None]:
    """Fail if a warning of ours is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = pdrs.AbsentNamesWarning, pdrs.UntrainedTableWarning
    assert [str(one.message) for one in caught if issubclass(one.category, ours)] == []


def made(names: str = "abcd", capacity: int = 0) -> SD:
    sd = SD.from_tensor(list(names), torch.ones(len(names), 3))
    sd.reserve(capacity, shape=(3,))
    return sd


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", MOVING)
def test_it_is_said_once_that_names_move_that_are_not_in_the_batch(kind: str, attached: bool, closure: bool) -> None:
    sd = made(capacity=8)
    optimizer = MOVING[kind](sd.parameters())
    if attached:
        sd.attach_optimizer(optimizer)
    step(sd, optimizer, list("abcd"), closure=closure)
    with pytest.warns(pdrs.AbsentNamesWarning, match=r"sparse=True") as caught:
        step(sd, optimizer, list("ab"), closure=closure, times=40)
    assert [one.filename for one in caught] == [__file__]


def test_it_is_said_of_each_dictionary_and_when_a_name_is_absent_late() -> None:
    sd, other = pdrs.ParameterDict({name: torch.ones(3) for name in "ab"}).stack(), made()
    optimizer = Adam([*sd.parameters(), *other.parameters()])

    def train(times: int, names: str, others: str) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            (sd.gather(list(names)).sum() + other.gather(list(others)).sum()).backward()
            optimizer.step()

    train(20, "ab", "abcd")
    with pytest.warns(pdrs.AbsentNamesWarning) as caught:
        train(5, "a", "ab")
    assert len(caught) == 2


@pytest.mark.parametrize("kind", STAYING)
def test_nothing_is_said_where_absent_names_stay(kind: str) -> None:
    sd = made(capacity=8)
    optimizer = STAYING[kind](sd.parameters())
    with silence():
        for names in ("abcd", "ab", "cd", "a", "b"):
            step(sd, optimizer, list(names))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad leaves them open
@pytest.mark.parametrize("kind", [SparseAdam, Adagrad, lambda p: SGD(p, lr=0.1)])
def test_nothing_is_said_of_sparse_gradients(kind: Make) -> None:
    sd = made()
    optimizer = kind(sd.parameters())
    with silence():
        for names in ("abcd", "ab", "cd", "a", "b"):
            step(sd, optimizer, list(names), sparse=True)


def test_it_is_said_of_momentum_that_sparse_gradients_have_too() -> None:
    sd = made()
    optimizer = SGD(sd.parameters(), lr=0.1, momentum=0.9)
    step(sd, optimizer, list("abcd"), sparse=True)
    with pytest.warns(pdrs.AbsentNamesWarning, match="optimizer of pdrs.optim") as caught:
        step(sd, optimizer, list("ab"), sparse=True, times=5)
    assert len(caught) == 1


def test_a_row_of_nan_that_stays_has_not_moved() -> None:
    sd, head = made(), nn.Linear(3, 1)
    sd["c"] = torch.full((3,), torch.nan)
    optimizer = SGD(sd.parameters(), lr=0.1)
    step(sd, optimizer, list("ab"), times=3)
    lost = SD.from_tensor(["c"], torch.full((1, 3), torch.nan))
    others = SGD(head.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(4):
            head(lost.gather(["c"])).sum().backward()
            others.step()

    with pytest.warns(pdrs.UntrainedTableWarning):
        train()


def test_it_is_said_where_tables_take_the_place_of_as_many_parameters() -> None:
    sd, other = made(), nn.Parameter(torch.ones(1))
    optimizer = Adam([other])
    other.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = list(sd.parameters())
    step(sd, optimizer, list("abcd"))
    with pytest.warns(pdrs.AbsentNamesWarning):
        step(sd, optimizer, list("ab"), times=2)
    with pytest.raises(RuntimeError, match=r"attach_optimizer\(optimizer\)"):
        sd.reserve(100, shape=(3,))


@pytest.mark.parametrize("kind", MOVING)
def test_nothing_is_said_where_all_names_are_in_every_batch(kind: str) -> None:
    sd = made(capacity=8)
    optimizer = MOVING[kind](sd.parameters())
    sd.attach_optimizer(optimizer)
    with silence():
        for _ in range(3):
            step(sd, optimizer, list(sd))
        sd.drop(["b"])  # whose row goes on moving, and is nobody's
        for _ in range(3):
            step(sd, optimizer, list(sd))
        sd["new"] = torch.ones(3)
        sd.freeze(["a"])
        for _ in range(3):
            step(sd, optimizer, list(sd))
        optimizer.zero_grad()
        (sd.gather(list(sd)) * 0).sum().backward()  # of which every name has a gradient, and it is zero
        optimizer.step()


def test_of_very_many_names_some_are_looked_at() -> None:
    sd = SD.from_tensor([f"n{n}" for n in range(20000)], torch.ones(20000, 2))
    optimizer = Adam(sd.parameters())
    step(sd, optimizer, list(sd))
    with pytest.warns(pdrs.AbsentNamesWarning):
        step(sd, optimizer, ["n7"], times=3)


def test_a_warning_that_is_an_error_comes_after_the_step_and_once() -> None:
    sd = made()
    optimizer = Adam(sd.parameters(), lr=0.1)
    step(sd, optimizer, list("abcd"))
    before = sd["a"].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pdrs.AbsentNamesWarning):
            step(sd, optimizer, ["b"])
        step(sd, optimizer, ["b"])
    assert sd["a"].tolist() != before


# -- tables that nothing trains ----------------------------------------------------------------------------------------


def train_beside(
    sd: SD, optimizer: Optimizer, head: nn.Module, steps: int, *, zero: bool, sparse: bool = False
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        if zero:
            sd.zero_grad()
        rows = sd.gather(["x", "y"], missing="insert", shape=(4,), init=nn.init.ones_, sparse=sparse)
        (head(rows) - 3).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_it_is_said_once_that_nothing_trains_the_tables_of_an_empty_dictionary(zero: bool, sparse: bool) -> None:
    sd, head = SD(), nn.Linear(4, 1)
    optimizer = Adam(nn.ModuleDict({"sd": sd, "head": head}).parameters(), lr=0.1)
    with pytest.warns(pdrs.UntrainedTableWarning, match=r"attach_optimizer\(optimizer\)") as caught:
        train_beside(sd, optimizer, head, 10, zero=zero, sparse=sparse)
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("how", ["attached", "reserved", "its own optimizer", "its own, seldom", "by hand", "frozen"])
def test_nothing_is_said_where_something_trains_the_tables(how: str) -> None:
    sd, head = SD(), nn.Linear(4, 1)
    if how == "reserved":
        sd.reserve(4, shape=(4,))
    optimizer = SGD(nn.ModuleDict({"sd": sd, "head": head}).parameters(), lr=0.01)
    if how == "attached":
        sd.attach_optimizer(optimizer)
    train_beside(sd, optimizer, head, 1, zero=True)
    own = SGD(sd.parameters(), lr=0.01) if how.startswith("its own") else None
    if how == "frozen":
        sd.requires_grad_(False)
    with silence():
        for number in range(8):
            train_beside(sd, optimizer, head, 1, zero=True)
            if own is not None and (number == 6 or how == "its own optimizer"):
                own.step()
            if how == "by hand":
                with torch.no_grad():
                    for table in sd.parameters():
                        table -= 0.01 * table.grad


def test_nothing_is_said_of_a_gradient_that_is_left_from_before() -> None:
    sd, head = made(), nn.Linear(4, 1)
    sd.gather(["a"]).sum().backward()
    optimizer = SGD(head.parameters(), lr=0.1)
    with silence():
        for _ in range(6):
            optimizer.zero_grad()
            head(torch.ones(1, 4)).sum().backward()
            optimizer.step()
