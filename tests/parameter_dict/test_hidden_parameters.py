"""Tensors that stand where a Parameter stood: as FSDP, weight norm and pruning put them, and take them away again.

The bugs that this hunts: a Parameter that is set, and stays hidden behind the tensor; a tensor that is gone around; an
attribute of the module that goes with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

import pdrs

Kind = type[nn.ParameterDict]

SETS: dict[str, Callable[[Any, Parameter], Any]] = {
    "pd.k =": lambda pd, new: setattr(pd, "a", new),
    "pd[k] =": lambda pd, new: pd.__setitem__("a", new),
    "pd[k] = by the operator": lambda pd, new: set_item(pd, "a", new),
    "update": lambda pd, new: pd.update({"a": new}),
    "update with more": lambda pd, new: pd.update([("x", torch.zeros(1)), ("a", new)]),
    "update with its like": lambda pd, new: pd.update(type(pd)({"a": new})),
    "|=": lambda pd, new: pd.__ior__(type(pd)({"a": new})),
    "load_state_dict": lambda pd, new: (
        (not isinstance(pd.a, torch.Tensor) and delattr(pd, "a"))
        or pd._parameters.update(a=new)
        or pd.load_state_dict({"a": new}, assign=True)
    ),
}
HIDES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "the Parameter is gone": lambda pd, value: (pd._parameters.pop("a"), setattr(pd, "a", value)),
    "deleted as an attribute": lambda pd, value: (delattr(pd, "a"), setattr(pd, "a", value)),
    "beside the Parameter": lambda pd, value: pd.__dict__.__setitem__("a", value),
    "no entry": lambda pd, value: (pd.__delitem__("a"), setattr(pd, "a", value)),
    "no tensor": lambda pd, value: (delattr(pd, "a"), setattr(pd, "a", 5)),
    "nothing": lambda pd, value: (delattr(pd, "a"), setattr(pd, "a", None)),
    "one after the other": lambda pd, value: (delattr(pd, "a"), setattr(pd, "a", value), setattr(pd, "a", 5)),
}


def set_item(pd: Any, key: str, value: Any) -> None:
    pd[key] = value


@pytest.mark.parametrize("hide", HIDES)
@pytest.mark.parametrize("how", SETS)
@pytest.mark.parametrize("base", ["the class", "a subclass"])
def test_a_parameter_that_is_set_is_shown(kind: Kind, how: str, hide: str, base: str) -> None:
    kind = kind if base == "the class" else type("Sub", (kind,), {})
    pd = kind({"a": torch.zeros(2)})
    HIDES[hide](pd, torch.full((2,), 5.0))
    new = Parameter(torch.ones(2))
    SETS[how](pd, new)
    shown = pd._parameters["a"]
    assert pd.a is pd["a"] is pd.get("a", shown) is shown
    assert dict(pd.items()).get("a", shown) is dict(pd).get("a", shown) is shown
    assert torch.equal(shown, new)
    assert "a" not in pd.__dict__


@pytest.mark.parametrize("hide", ["the Parameter is gone", "beside the Parameter"])
def test_a_tensor_that_hides_a_parameter_is_what_is_read(kind: Kind, hide: str) -> None:
    pd = kind([("b", torch.zeros(2)), ("a", torch.zeros(2))])
    value = torch.full((2,), 5.0)
    HIDES[hide](pd, value)
    assert pd["a"] is pd.a is pd.get("a") is value
    assert list(pd.values())[1] is list(pd.items())[1][1] is value
    assert pd.copy()["a"].tolist() == [5, 5]
    assert kind(pd)["a"].tolist() == [5, 5]
    assert "a" in pd
    assert copy.copy(pd)["a"] is value
    with_params = list(pd.state_dict())
    assert with_params == (["b"] if hide == "the Parameter is gone" else ["b", "a"])
    assert pd.popitem() == ("a", value)
    assert list(pd) == list(pd._parameters) == ["b"]


PLAIN: list[Any] = [5, None, "text", nn.ReLU()]


@pytest.mark.parametrize("how", [name for name in SETS if name != "load_state_dict"])
@pytest.mark.parametrize("hide", [name for name in HIDES if name != "beside the Parameter"])
@pytest.mark.parametrize("new", PLAIN, ids=lambda new: type(new).__name__)
def test_what_is_no_parameter_is_shown_where_a_tensor_stood(kind: Kind, hide: str, how: str, new: Any) -> None:
    pd = kind({"a": torch.zeros(2)})
    HIDES[hide](pd, torch.full((2,), 5.0))
    SETS[how](pd, new)
    assert pd.a is new
    if "a" not in pd:
        return  # an attribute that is no entry
    assert pd["a"] is new
    assert next(value for key, value in pd.items() if key == "a") is new
    assert pd.pop("a") is new
    assert not hasattr(pd, "a")


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("how", [name for name in SETS if name not in ("pd.k =", "load_state_dict")])
def test_a_module_takes_the_place_of_a_buffer(kind: Kind, how: str, persistent: bool) -> None:
    pd = kind()
    pd.register_buffer("a", torch.zeros(2), persistent=persistent)
    new = nn.Linear(1, 1)
    SETS[how](pd, new)
    assert pd["a"] is pd.a is pd.get("a") is new
    assert list(pd._buffers) == list(pd._non_persistent_buffers_set) == []
    assert {"a.bias", "a.weight"} <= pd.state_dict().keys()
    assert "a" not in pd.state_dict()


def test_an_entry_that_is_a_buffer_goes_as_a_whole(kind: Kind) -> None:
    pd = kind({"a": torch.zeros(2)})
    del pd.a
    pd.register_buffer("a", torch.ones(2), persistent=False)
    assert pd["a"].tolist() == [1, 1]
    del pd["a"]
    assert list(pd._buffers) == list(pd._non_persistent_buffers_set) == []


def test_a_buffer_is_refused_where_a_plain_value_is(kind: Kind) -> None:
    pd = kind({"a": 5})
    with pytest.raises(KeyError, match="attribute 'a' already exists"):
        pd.a = nn.Buffer(torch.ones(2))
    assert pd["a"] == pd.a == 5
    assert not pd._buffers


@pytest.mark.parametrize("again", range(1, 4))
def test_a_shared_module_is_hidden_and_shown_as_often_as_fsdp_does(kind: Kind, again: int) -> None:
    def hide(tensor: torch.Tensor) -> None:
        if hasattr(pd, "a"):
            delattr(pd, "a")
        pd.a = tensor
        pd._parameters["a"] = tensor

    pd = kind([("a", torch.zeros(2)), ("b", torch.zeros(2))])
    tensor, parameter = torch.ones(2), Parameter(torch.full((2,), 2.0))
    for _ in range(again):
        hide(tensor)
        assert pd["a"] is pd.a is tensor
    for _ in range(again):
        if hasattr(pd, "a"):
            delattr(pd, "a")
        pd.a = parameter
        assert pd["a"] is pd.a is pd._parameters["a"] is parameter
    assert list(pd) == ["a", "b"]


def test_attributes_are_deleted_in_the_order_of_torch(kind: Kind) -> None:
    pd = kind({"a": torch.zeros(2)})
    pd.__dict__["a"] = pd.__dict__["beside"] = torch.ones(2)
    pd._parameters["beside"] = Parameter(torch.zeros(1))
    for name in ("a", "beside"):
        delattr(pd, name)
        assert name not in pd._parameters
        assert name in pd.__dict__
        delattr(pd, name)
        assert name not in pd.__dict__
        with pytest.raises(AttributeError):
            delattr(pd, name)


def test_attributes_of_the_module_stay_where_an_entry_has_their_name() -> None:
    pd = pdrs.ParameterDict({"training": torch.zeros(1), "half": torch.zeros(1), "rows": torch.zeros(1)})
    pd.__dict__["rows"] = 3
    for key in list(pd):
        pd[key] = Parameter(torch.ones(1))
        del pd._parameters[key]
        pd[key] = torch.ones(1)
        assert pd[key] is pd._parameters[key]
        del pd._parameters[key]
    assert pd.training is True
    assert callable(pd.half)
    for key in list(pd):
        del pd[key]
    assert pd.training is True
    assert callable(pd.half)


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, pd: nn.ParameterDict) -> None:
        super().__init__()
        self.w = pd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key in self.w:
            x = x * self.w[key]
        return x + torch.stack(list(self.w.values())).sum(0)


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4)).sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_fsdp_and_distribute_module_train_a_dictionary_with_dots_in_its_keys(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, distribute_module

    keys = ["plain", "a.b", "layer.0.weight"]
    expected = Model(nn.ParameterDict([(key.replace(".", "_"), torch.ones(4)) for key in keys]))
    trained(expected)
    values = [value.tolist() for value in expected.parameters()]
    with process_group(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        first = Model(pdrs.ParameterDict([(key, torch.ones(4)) for key in keys]))
        model = FullyShardedDataParallel(
            nn.Sequential(first, Model(first.w)), use_orig_params=True, device_id=torch.device("cpu")
        )
        model(torch.ones(4)).sum().backward()
        del model

        model = FullyShardedDataParallel(
            Model(pdrs.ParameterDict([(key, torch.ones(4)) for key in keys])),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        trained(model)
        assert [value.tolist() for value in model.parameters()] == values

        sharded = Model(pdrs.ParameterDict([(key, torch.ones(4)) for key in keys]))
        fully_shard(sharded, mesh=mesh)
        trained(sharded)
        assert [value.full_tensor().tolist() for value in sharded.parameters()] == values
        assert list(sharded.state_dict()) == [f"w.{key}" for key in keys]

        pd = pdrs.ParameterDict([(key, torch.ones(4)) for key in keys])
        distribute_module(Model(pd), mesh)
        assert list(pd) == list(pd._parameters) == keys
        assert all(type(key) is str for key in pd._parameters)
        assert all(isinstance(value, DTensor) for value in pd.values())
