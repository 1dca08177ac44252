"""Which modules a move takes along, and in which order: a native walk, as torch's own recursion in Python.

The bugs that this hunts: a module that moves twice or not at all; one whose own ``_apply`` or ``children`` is passed
over, be it of the class or of the module; one that hides what it holds; a class taken for another.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Module

import pdrs

USUAL = (Module._apply, pdrs.ParameterDict._apply)


class Own(nn.Linear):
    """A module that moves itself."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls = 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.calls += 1
        return super()._apply(fn, recurse)


class Hides(nn.Sequential):
    """A module that does not tell of its first child."""

    def children(self) -> Iterator[Module]:
        return iter(list(super().children())[1:])


class HidesNames(nn.Sequential):
    """The same, by names."""

    def named_children(self) -> Iterator[tuple[str, Module]]:
        return iter(list(super().named_children())[1:])


class Computed(Module):
    """A module whose Parameters lie where its class says."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: dict[str, Any] = {"weight": nn.Parameter(torch.randn(3))}

    @property
    def _parameters(self) -> dict[str, Any]:
        return self.__dict__.setdefault("elsewhere", {})

    @_parameters.setter
    def _parameters(self, value: dict[str, Any]) -> None:
        pass


def shared() -> Module:
    layer, own = nn.Linear(2, 2), Own()
    return nn.Sequential(layer, nn.Sequential(own, layer), own, nn.Sequential(layer))


def with_none() -> Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_module("nothing", None)
    return model


def by_attributes() -> Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2), nn.ReLU())
    apply = model[1]._apply
    model[1].__dict__["_apply"] = lambda fn, recurse=True: apply(fn, recurse)
    hidden = model[0][1]
    model[0].__dict__["children"] = lambda: iter([hidden])
    return model


def deep() -> Module:
    model: Module = nn.Linear(2, 2)
    for _ in range(200):
        model = nn.Sequential(nn.ReLU(), model, nn.BatchNorm1d(2))
    return model


MODELS: dict[str, Callable[[], Module]] = {
    "alone": lambda: nn.Linear(2, 2),
    "transformer": lambda: nn.Transformer(4, 2, 1, 2, 8, batch_first=True),
    "shared": shared,
    "none": with_none,
    "own": lambda: nn.Sequential(Own(), nn.Sequential(nn.LSTM(2, 2), nn.Linear(2, 2))),
    "hides": lambda: nn.Sequential(Hides(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)),
    "hides names": lambda: nn.Sequential(HidesNames(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)),
    "by attributes": by_attributes,
    "deep": deep,
    "dictionary": lambda: nn.ModuleDict({"a": pdrs.ParameterDict({"children": torch.ones(2)}), "own": Own()}),
    "parametrized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.ReLU()),
}


def as_torch_walks(module: Module) -> tuple[list[Module], list[Module]]:
    """Walk as torch's ``_apply`` does, parents first; each module once."""
    usual: dict[Module, None] = {}
    others: dict[Module, None] = {}

    def visit(one: Module) -> None:
        if one is not module and (type(one)._apply not in USUAL or "_apply" in vars(one)):
            others[one] = None
        elif one not in usual:
            usual[one] = None
            for child in one.children():
                visit(child)

    visit(module)
    return list(usual), list(others)


@pytest.mark.parametrize("model", MODELS)
def test_modules_that_move_themselves_do_so_and_torch_moves_no_other(model: str) -> None:
    module = MODELS[model]()
    usual, others = as_torch_walks(module)
    moved: list[Module] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "_apply" and isinstance(frame.f_locals.get("self"), Module):
            moved.append(frame.f_locals["self"])

    sys.setprofile(profile)
    try:
        pdrs.to(module, torch.float64)
    finally:
        sys.setprofile(None)
    inside = {id(one) for other in others for one in other.modules()}
    assert [id(one) for one in dict.fromkeys(moved) if id(one) in set(map(id, others))] == list(map(id, others))
    asked = {id(one) for one in moved if one in usual}
    assert asked <= inside, "torch was asked to move a module that does not move itself"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_moves_as_torch_moves_it(model: str) -> None:
    torch.manual_seed(0)
    theirs = MODELS[model]().to(torch.float64)
    torch.manual_seed(0)
    ours = pdrs.to(MODELS[model](), torch.float64)
    for one, two in zip(theirs.modules(), ours.modules(), strict=True):
        for left, right in ((one._parameters, two._parameters), (one._buffers, two._buffers)):
            assert {name: value is None or value.dtype for name, value in left.items()} == {
                name: value is None or value.dtype for name, value in right.items()
            }


def test_a_module_that_moves_itself_does_so_once() -> None:
    model = shared()
    pdrs.to(model, torch.float64)
    assert model[2].calls == 1


def test_a_ring_of_modules_ends() -> None:
    one, two = nn.Sequential(nn.Linear(2, 2)), nn.Sequential()
    one.append(two)
    two.append(one)
    assert pdrs.to(one, torch.float64)[0].weight.dtype == torch.float64


def test_parameters_are_where_the_class_says() -> None:
    model = pdrs.to(nn.Sequential(Computed(), nn.Linear(1, 1)), torch.float64)
    assert model[0].elsewhere["weight"].dtype == torch.float64


def test_what_a_move_does_not_change_costs_torch_a_question_for_each_dtype() -> None:
    counts = []
    for size in (1, 100):
        layers = [nn.Linear(2, 2), nn.BatchNorm1d(2).half(), nn.Linear(2, 2).bfloat16()]
        model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(size) for layer in layers))
        places = [one.data_ptr() for one in model.state_dict().values()]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            pdrs.to(model, "cpu")
        counts.append(sum(event.name == "aten::empty" for event in profile.events()))
        assert [one.data_ptr() for one in model.state_dict().values()] == places
    assert counts[0] == counts[1] <= 8


def test_a_sparse_parameter_is_moved_though_all_others_are_there() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.eye(2, dtype=torch.float64).to_sparse())])
    pdrs.to(model, torch.float32)
    assert [one.dtype for one in model] == [torch.float32] * 2
