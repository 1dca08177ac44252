"""Which modules a move takes along, and in which order: a native walk, as torch's own recursion in Python.

The bugs that this hunts: a module that moves twice or not at all; one whose own ``_apply`` or ``children`` is passed
over, be it of the class or of the module; one that hides what it holds; a class taken for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module

import pdrs
from pdrs._core import all_kept, walk_modules

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
def test_the_walk_is_torchs(model: str) -> None:
    module = MODELS[model]()
    usual, others, parameters, buffers = walk_modules([module], USUAL)
    expected, expected_others = as_torch_walks(module)
    assert list(map(id, usual)) == list(map(id, expected))
    assert list(map(id, others)) == list(map(id, expected_others))
    assert list(map(id, parameters)) == [id(one._parameters) for one in expected if one._parameters]
    assert [(id(one), id(held)) for one, held in buffers] == [
        (id(one), id(one._buffers)) for one in expected if one._buffers
    ]


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
    usual, others, *_ = walk_modules([one], USUAL)
    assert (usual, others) == ([one, one[0], two], [])
    assert pdrs.to(one, torch.float64)[0].weight.dtype == torch.float64


def test_parameters_are_where_the_class_says() -> None:
    model = pdrs.to(nn.Sequential(Computed(), nn.Linear(1, 1)), torch.float64)
    assert model[0].elsewhere["weight"].dtype == torch.float64


def test_modules_that_are_given_are_all_that_is_taken() -> None:
    model = nn.Sequential(Own(), nn.Sequential(nn.Linear(1, 1)))
    assert walk_modules([model[1], model[0]])[:2] == ([model[1], model[0]], [])
    assert walk_modules([]) == ([], [], [], [])


def test_what_is_kept_is_asked_once_a_kind_until_something_is_not() -> None:
    asked: list[tuple[str, torch.dtype]] = []

    def keeps(tensor: Tensor) -> bool:
        asked.append((str(tensor.device), tensor.dtype))
        return tensor.dtype != torch.int64

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half(), nn.BatchNorm1d(2), nn.Linear(2, 2).double())
    _, _, parameters, buffers = walk_modules([model], USUAL)
    assert not all_kept(parameters, [held for _, held in buffers], keeps)
    assert asked == [("cpu", each) for each in (torch.float32, torch.float16, torch.float64, torch.int64)]
    assert all_kept(parameters, [], keeps)
    assert not all_kept([{"sparse": nn.Parameter(torch.eye(2).to_sparse())}], [], lambda tensor: True)
