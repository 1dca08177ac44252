"""What a user of a dict of ids and an Embedding relies on, and the mistakes that such a user makes first.

The bugs that this hunts: a run that was saved and resumed which differs, in the last bits, from one that was not;
values of new rows that are lost without a word; errors that do not tell what to write instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs

SD = pdrs.StackedParameterDict
Run = tuple[SD, torch.optim.Optimizer]


def optimizer_of(sd: SD, kind: str) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(sd.parameters()) if kind == "Adagrad" else torch.optim.SparseAdam(sd.parameters())


def train(run: Run, first: int, last: int) -> None:
    """Insert, train and drop names; what a step does depends on its number only."""
    sd, optimizer = run
    for step in range(first, last):
        draw = random.Random(step)
        batch = [f"user.{draw.randrange(step, step + 40)}" for _ in range(64)]
        optimizer.zero_grad()
        weights = torch.randn(64, 3, generator=torch.Generator().manual_seed(step))
        (sd.gather(batch, sparse=True, missing="insert") * weights).sin().sum().backward()
        with torch.sparse.check_sparse_tensor_invariants(False):  # torch's Adagrad does not say, which torch warns of
            optimizer.step()
        sd.drop(draw.sample(list(sd), 5))


def by_state_dict(run: Run, kind: str, path: str) -> Run:
    torch.save((run[0].state_dict(), run[1].state_dict()), path)
    state = torch.load(path)
    sd = SD()
    sd.load_state_dict(state[0])
    optimizer = optimizer_of(sd, kind)
    optimizer.load_state_dict(state[1])
    sd.attach_optimizer(optimizer)
    return sd, optimizer


def by_archive(run: Run, kind: str, path: str) -> Run:
    pdrs.save(run[0], path)
    sd = pdrs.open(path)
    optimizer = optimizer_of(sd, kind)
    optimizer.load_state_dict(run[1].state_dict())
    sd.attach_optimizer(optimizer)
    return sd, optimizer


def by_pickle(run: Run, kind: str, path: str) -> Run:
    torch.save(run, path)
    sd, optimizer = torch.load(path, weights_only=False)
    sd.attach_optimizer(optimizer)
    return sd, optimizer


@pytest.mark.parametrize("resume", [by_state_dict, by_archive, by_pickle])
@pytest.mark.parametrize("kind", ["Adagrad", "SparseAdam"])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(
    resume: Callable[[Run, str, str], Run], kind: str, tmp_path: Any
) -> None:
    sd = SD()
    sd.reserve(8, shape=(3,))
    run = sd, optimizer_of(sd, kind)
    sd.attach_optimizer(run[1])
    train(run, 0, 20)
    resumed = resume(run, kind, str(tmp_path / "saved"))
    for each in (run, resumed):
        train(each, 20, 60)
    assert list(resumed[0]) == list(sd)
    assert torch.equal(resumed[0].indices(list(sd)), sd.indices(list(sd)))
    assert torch.equal(resumed[0].table((3,)), sd.table((3,)))


def new_rows(init: Callable[[Tensor], Any]) -> SD:
    sd = SD.from_tensor(["a"], torch.ones(1, 3))
    sd.gather(["a", "b", "c"], missing="insert", init=init)
    return sd


@pytest.mark.parametrize("init", [torch.ones_like, lambda new: new + 1, lambda new: new.fill_(1) * 2])
@pytest.mark.parametrize("make", [new_rows, lambda init: SD.from_shapes({"a": (3,)}, init=init)])
def test_an_initialiser_that_returns_values_instead_of_writing_them_is_refused(
    make: Callable[[Callable[[Tensor], Any]], SD], init: Callable[[Tensor], Any]
) -> None:
    with pytest.raises(ValueError, match=r"init must give the new rows their values in place .*, as .*normal_"):
        make(init)


@pytest.mark.parametrize("init", [torch.nn.init.ones_, lambda new: new[:, 0].fill_(1), torch.nn.init.zeros_])
def test_an_initialiser_that_writes_may_return_what_it_has_written_to(init: Callable[[Tensor], Any]) -> None:
    assert list(new_rows(init)) == ["a", "b", "c"]


def test_an_initialiser_that_is_refused_leaves_no_trace() -> None:
    sd = SD.from_tensor(["a"], torch.ones(1, 3))
    with pytest.raises(ValueError, match="in place"):
        sd.gather(["b"], missing="insert", init=torch.ones_like)
    assert list(sd) == ["a"]


@pytest.mark.parametrize(
    "call",
    [
        lambda sd: sd.table(16),
        lambda sd: sd.reserve(4, shape=16),
        lambda sd: sd.gather(["new"], missing="insert", shape=16),
    ],
)
def test_a_number_in_place_of_a_shape_is_refused_with_the_shape_that_is_meant(call: Callable[[SD], Any]) -> None:
    with pytest.raises(TypeError, match=r"expected the shape of an entry, such as \(16,\), got the number 16"):
        call(SD.from_tensor(["a"], torch.ones(1, 16)))


@pytest.mark.parametrize(
    "call",
    [
        lambda sd: sd.scatter(["a"], torch.tensor([[1, 2]]), missing="insert"),
        lambda sd: sd.gather(["a"], missing="insert", shape=(2,), dtype=torch.int64),
        lambda sd: sd.reserve(4, shape=(2,), dtype=torch.int64),
    ],
)
def test_integers_are_refused_with_what_to_insert_instead(call: Callable[[SD], Any]) -> None:
    sd = SD()
    with pytest.raises(RuntimeError, match=r"int64: insert torch.nn.Parameter\(tensor, requires_grad=False\)"):
        call(sd)
    assert (len(sd), len(list(sd.parameters()))) == (0, 0)
