"""Optimizers in wrappers: what has the same state is the same optimizer.

The bugs that this hunts: a wrapper that is attached, and whose inside is then taken for a stranger, or the other way
round; two that are attached for one, so that a new table is in it twice; a wrapper with a state of its own, of which
one half is forgotten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Adam, Optimizer

import pdrs

SD = pdrs.StackedParameterDict


class Showing(Optimizer):
    """Shows the state of what it wraps, as accelerate's does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


class Delegating:
    """Has the class of what it wraps, and asks it for everything, as Lightning's does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Of" + type(optimizer).__name__, (Delegating, type(optimizer)), {})  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        self._optimizer.load_state_dict(state_dict)


class Copying(Optimizer):
    """Has the attributes of what it wraps, as Fabric's has."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer
        self.copy_attributes()

    def copy_attributes(self) -> None:
        self.__dict__.update({key: value for key, value in vars(self.inner).items() if key != "step"})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)
        self.copy_attributes()


class Slow(Optimizer):
    """Has slow weights beside the state of what it wraps, as Lookahead."""

    def __init__(self, optimizer: Optimizer, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.defaults = optimizer.defaults
        self.param_groups = optimizer.param_groups
        self.state = defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.optimizer.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                if self.count % self.k == 0:
                    p.copy_(slow.lerp_(p, 0.5))


WRAPPERS: list[Callable[[Optimizer], Any]] = [
    Showing,
    Delegating,
    Copying,
    lambda one: Showing(Delegating(one)),
]


def train(sd: SD, optimizer: Any, names: list[str]) -> None:
    optimizer.zero_grad()
    sd.gather(names).pow(2).sum().backward()
    optimizer.step()


def use(sd: SD, optimizer: Any) -> None:
    train(sd, optimizer, ["a", "b"])
    sd["c"] = torch.ones(2)
    train(sd, optimizer, ["c", "a", "b"])
    sd.drop(["a"])
    sd["d"] = torch.ones(2)
    sd["e"] = torch.ones(3)
    train(sd, optimizer, ["b", "c", "d"])
    train(sd, optimizer, ["e"])
    sd.compact()
    train(sd, optimizer, ["b", "c", "d"])


def begun() -> tuple[SD, Adam]:
    sd = SD({"a": torch.ones(2), "b": torch.full((2,), 2.0)})
    return sd, Adam(sd.parameters(), lr=0.1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("attached", ["wrapper", "inside", "both", "both, otherwise"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_wrapper_and_what_it_wraps_are_one_optimizer(
    wrapper: Callable[[Optimizer], Any], attached: str, resumed: bool
) -> None:
    sd, inner = begun()
    train(sd, inner, ["a"])
    expected, plain = begun()
    train(expected, plain, ["a"])
    if resumed:
        saved, state = inner.state_dict(), sd.state_dict()
        sd = SD()
        sd.load_state_dict(state)
        inner = Adam(sd.parameters(), lr=0.1)
        wrapped = wrapper(inner)
        wrapped.load_state_dict(saved)
    else:
        wrapped = wrapper(inner)
        wrapped.load_state_dict(inner.state_dict())  # which replaces the state
    for one in {"wrapper": [wrapped], "inside": [inner], "both": [inner, wrapped]}.get(attached, [wrapped, inner]):
        sd.attach_optimizer(one)
    expected.attach_optimizer(plain)
    use(sd, wrapped)
    use(expected, plain)
    assert {name: row.tolist() for name, row in sd.items()} == {name: row.tolist() for name, row in expected.items()}
    assert len(inner.param_groups[0]["params"]) == 2
    sd.detach_optimizer(inner if attached == "wrapper" else wrapped)
    with pytest.raises(RuntimeError, match="attach"):
        sd.update({f"f{n}": torch.ones(2) for n in range(40)})


def test_a_wrapper_with_a_state_of_its_own_is_followed_with_what_it_wraps() -> None:
    sd, inner = begun()
    wrapped = Slow(inner)
    sd.attach_optimizer(wrapped)
    use(sd, wrapped)
    table = sd.table((2,))
    assert len(wrapped.state[table]["slow"]) == len(inner.state[table]["exp_avg"]) == len(table)
    assert [len(group["params"]) for group in inner.param_groups] == [2]
    sd.drop(["b"])
    sd["new"] = torch.tensor([8.0, 9.0])
    row = sd.indices(["new"])[0]
    assert wrapped.state[table]["slow"][row].tolist() == [8.0, 9.0]
    assert inner.state[table]["exp_avg"][row].tolist() == [0.0, 0.0]


def test_half_of_a_wrapper_is_not_enough() -> None:
    sd, inner = begun()
    wrapped = Slow(inner)
    wrapped._optimizer_step_pre_hooks = wrapped._optimizer_step_post_hooks = {}  # as of one that was made by Optimizer
    wrapped._patch_step_function()
    sd.attach_optimizer(inner)
    train(sd, wrapped, ["a"])
    sd.drop(["a"])
    with pytest.raises(RuntimeError, match="Slow"):
        sd["c"] = torch.ones(2)
    sd.attach_optimizer(wrapped)
    sd["c"] = torch.ones(2)


def test_an_optimizer_that_refers_to_another_is_no_wrapper_of_it() -> None:
    sd, inner = begun()
    # What has groups by pattern is the first to get new tables of its own dictionary, and of no other.
    other = Adam(begun()[0].param_groups(by={}))
    inner.partner = other  # type: ignore[attr-defined]
    sd.attach_optimizer(inner)
    sd["late"] = torch.ones(3)
    assert [group["params"] for group in inner.param_groups] == [list(sd.parameters())]
    assert [len(group["params"]) for group in other.param_groups] == [1]
