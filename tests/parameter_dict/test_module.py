"""``pdrs.ParameterDict`` as a Module: each test asks torch's class the same.

The bugs that this hunts: an entry that torch sees and the dictionary does not or the other way round, an attribute that
turns into an entry, a tie or an order lost on the way through a parent, a sweep that forgets an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Buffer, Parameter

Kind = type[nn.ParameterDict]


def filled(kind: Kind) -> nn.ParameterDict:
    """Make a dictionary of two Parameters, not in the order of the alphabet."""
    return kind([("right", torch.ones(2)), ("left", torch.zeros(2, 3))])


def names(pairs: Iterator[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in pairs]


# -- attributes --------------------------------------------------------------------------------------------------------


def test_an_entry_is_an_attribute(kind: Kind) -> None:
    pd = filled(kind)
    pd["plain"] = 7
    pd["child"] = nn.Linear(1, 1)
    assert pd.left is pd["left"]
    assert pd.plain == 7
    assert pd.child is pd["child"]
    assert getattr(pd, "missing", "no") == "no"
    with pytest.raises(AttributeError, match="'ParameterDict' object has no attribute 'missing'"):
        _ = pd.missing


def test_setting_the_attribute_of_an_entry_sets_the_entry(kind: Kind) -> None:
    pd = filled(kind)
    new = Parameter(torch.full((2,), 5.0))
    pd.right = new
    assert pd["right"] is new
    assert list(pd) == ["right", "left"]
    assert names(pd.named_parameters()) == ["right", "left"]


def test_setting_an_attribute_to_what_is_no_parameter_is_refused_as_by_any_module(kind: Kind) -> None:
    pd = filled(kind)
    for refused in (torch.zeros(2), 5):
        with pytest.raises(TypeError, match="as parameter 'left'"):
            pd.left = refused
        assert pd["left"].shape == (2, 3)


def test_setting_an_attribute_to_none_keeps_the_name(kind: Kind) -> None:
    pd = filled(kind)
    pd.left = None
    assert pd["left"] is None
    assert list(pd.items())[1] == ("left", None)
    assert names(pd.named_parameters()) == ["right"]
    assert list(pd.state_dict()) == ["right"]
    pd["left"] = torch.ones(3)
    assert names(pd.named_parameters()) == ["right", "left"]
    pd.left = pd.right = None
    assert pd.pop("right") is None
    assert pd.popitem() == ("left", None)
    assert pd._parameters == {}


def test_a_parameter_set_as_an_attribute_lies_beside_the_entries(kind: Kind) -> None:
    pd = filled(kind)
    pd.extra = Parameter(torch.ones(1))
    assert "extra" not in pd
    assert list(pd.keys()) == ["right", "left"]
    assert len(pd) == 2
    assert pd["extra"] is pd.extra
    assert pd.get("extra") is None
    assert names(pd.named_parameters()) == ["right", "left", "extra"]
    assert list(pd.state_dict()) == ["right", "left", "extra"]
    with pytest.raises(KeyError, match="extra"):
        del pd["extra"]
    pd["extra"] = torch.zeros(1)
    assert list(pd) == ["right", "left", "extra"]


def test_other_attributes_stay_attributes(kind: Kind) -> None:
    pd = filled(kind)
    pd.note = "hello"
    assert "note" not in pd
    assert pd.note == "hello"
    del pd.note
    assert not hasattr(pd, "note")


def test_deleting_the_attribute_of_an_entry_leaves_its_key(kind: Kind) -> None:
    pd = filled(kind)
    del pd.left
    assert list(pd) == ["right", "left"]
    assert "left" in pd
    with pytest.raises(AttributeError):
        _ = pd["left"]
    with pytest.raises(AttributeError):
        list(pd.items())
    assert names(pd.named_parameters()) == ["right"]
    pd["left"] = torch.ones(1)
    assert list(pd) == ["right", "left"]
    assert pd["left"].shape == (1,)


def test_deleting_the_attribute_of_a_child_or_plain_value_leaves_its_key(kind: Kind) -> None:
    pd = kind({"child": nn.Linear(1, 1), "plain": 1})
    del pd.child, pd.plain
    assert list(pd) == ["child", "plain"]
    assert list(pd.children()) == []
    with pytest.raises(AttributeError):
        del pd.plain


# -- registration ------------------------------------------------------------------------------------------------------


def test_register_parameter_registers_beside_the_entries(kind: Kind) -> None:
    pd = filled(kind)
    pd.register_parameter("extra", Parameter(torch.ones(1)))
    pd.register_parameter("nothing", None)
    assert list(pd) == ["right", "left"]
    assert pd["nothing"] is None
    assert names(pd.named_parameters()) == ["right", "left", "extra"]
    pd.register_parameter("left", Parameter(torch.ones(1)))
    assert pd["left"].shape == (1,)
    for name, message in (
        ("keys", "attribute 'keys' already exists"),
        ("", "empty string"),
        ("a.b", r'can.*t contain "\."'),
    ):
        with pytest.raises(KeyError, match=message):
            pd.register_parameter(name, Parameter(torch.ones(1)))


def test_register_buffer_registers_beside_the_entries(kind: Kind) -> None:
    pd = filled(kind)
    pd.register_buffer("mean", torch.ones(1))
    pd.register_buffer("scratch", torch.ones(1), persistent=False)
    assert list(pd) == ["right", "left"]
    assert pd["mean"] is pd.mean
    assert names(pd.named_buffers()) == ["mean", "scratch"]
    assert list(pd.state_dict()) == ["right", "left", "mean"]
    with pytest.raises(KeyError, match="attribute 'left' already exists"):
        pd.register_buffer("left", torch.ones(1))


def test_add_module_adds_beside_the_entries(kind: Kind) -> None:
    pd = filled(kind)
    pd.add_module("child", nn.Linear(2, 1))
    assert list(pd) == ["right", "left"]
    assert pd["child"] is pd.child
    assert names(pd.named_children()) == ["child"]
    with pytest.raises(KeyError, match="attribute 'left' already exists"):
        pd.add_module("left", nn.Linear(2, 1))


def test_writes_to_the_dict_of_parameters_are_seen(kind: Kind) -> None:
    # Accelerate, FSDP and dynamo write there; so the dictionary must read there.
    pd = filled(kind)
    new = Parameter(torch.full((1,), 3.0))
    pd._parameters["left"] = new
    pd._parameters["extra"] = Parameter(torch.ones(1))
    assert pd["left"] is pd.left is new
    assert dict(pd.items())["left"] is new
    assert list(pd.values())[1] is new
    assert list(pd) == ["right", "left"]
    assert pd["extra"] is pd.extra
    assert names(pd.named_parameters()) == ["right", "left", "extra"]

    del pd._parameters["left"]
    assert list(pd) == ["right", "left"]
    with pytest.raises(AttributeError):
        _ = pd["left"]
    pd._parameters["left"] = new
    assert names(pd.named_parameters()) == ["right", "extra", "left"]
    assert list(pd.items()) == [("right", pd.right), ("left", new)]
    assert pd.popitem() == ("left", new)
    assert pd.pop("right") is not None
    assert list(pd._parameters) == ["extra"]


def test_another_dict_of_parameters_is_taken_for_the_dict_of_parameters(kind: Kind) -> None:
    pd = filled(kind)
    pd._parameters = {name: Parameter(value.detach() + 1) for name, value in pd.items()}
    assert pd["left"].min() == 1
    assert [value.min().item() for value in pd.values()] == [2, 1]


@pytest.mark.parametrize("write", [lambda pd, x: pd.update({"new": x}), lambda pd, x: pd.__setitem__("new", x)])
def test_global_registration_hooks_see_and_replace_every_parameter(kind: Kind, write: Any) -> None:
    seen = []

    def hook(module: nn.Module, name: str, parameter: Parameter | None) -> Parameter | None:
        seen.append((type(module), name))
        return Parameter(torch.full((1,), 9.0)) if name == "new" else None

    with nn.modules.module.register_module_parameter_registration_hook(hook):
        pd = filled(kind)
        write(pd, torch.zeros(3))
    assert seen == [(kind, "right"), (kind, "left"), (kind, "new")]
    assert pd["new"].item() == 9
    write(pd, torch.zeros(3))
    assert len(seen) == 3


def test_global_registration_hooks_see_child_modules_and_buffers(kind: Kind) -> None:
    seen = []
    registration = nn.modules.module
    with (
        registration.register_module_module_registration_hook(lambda *what: seen.append(what[1])),
        registration.register_module_buffer_registration_hook(lambda *what: seen.append(what[1])),
    ):
        pd = kind({"child": nn.Identity()})
        pd.register_buffer("mean", torch.ones(1))
    assert seen == ["child", "mean"]


# -- what an entry may be ----------------------------------------------------------------------------------------------


def test_a_module_is_a_child(kind: Kind) -> None:
    pd = kind([("a", torch.zeros(1)), ("child", nn.Linear(2, 1)), ("b", torch.zeros(1))])
    assert list(pd) == ["a", "child", "b"]
    assert names(pd.named_children()) == ["child"]
    assert names(pd.named_modules()) == ["", "child"]
    assert names(pd.named_parameters()) == ["a", "b", "child.weight", "child.bias"]
    assert list(pd.state_dict()) == ["a", "b", "child.weight", "child.bias"]
    pd["child"] = nn.Linear(1, 1, bias=False)
    assert list(pd) == ["a", "child", "b"]
    assert names(pd.named_parameters()) == ["a", "b", "child.weight"]
    assert isinstance(pd.pop("child"), nn.Linear)
    assert list(pd.children()) == []


def test_a_dictionary_may_hold_dictionaries(kind: Kind) -> None:
    pd = kind([("outer", torch.zeros(1)), ("inner", kind({"x": torch.ones(1)}))])
    assert names(pd.named_parameters()) == ["outer", "inner.x"]
    assert pd["inner"]["x"] is pd.inner.x
    assert pd.get_parameter("inner.x") is pd["inner"]["x"]
    assert pd.get_submodule("inner") is pd["inner"]


def test_a_buffer_becomes_a_parameter_as_every_tensor_does(kind: Kind) -> None:
    pd = kind({"mean": Buffer(torch.ones(2))})
    assert type(pd["mean"]) is Parameter
    assert names(pd.named_parameters()) == ["mean"]
    assert names(pd.named_buffers()) == []


def test_a_buffer_set_as_an_attribute_of_no_entry_is_a_buffer(kind: Kind) -> None:
    pd = filled(kind)
    pd.mean = Buffer(torch.ones(2))
    assert names(pd.named_buffers()) == ["mean"]
    assert list(pd) == ["right", "left"]
    assert pd["mean"] is pd.mean


def test_none_is_a_value(kind: Kind) -> None:
    pd = kind({"none": None, "x": torch.zeros(1)})
    assert pd["none"] is None
    assert list(pd) == ["none", "x"]
    assert list(pd.state_dict()) == ["x"]
    pd["none"] = torch.zeros(1)
    assert names(pd.named_parameters()) == ["x", "none"]
    assert list(pd) == ["none", "x"]
    pd["x"] = None
    assert pd["x"] is None
    assert names(pd.named_parameters()) == ["none"]


def test_a_parameter_takes_the_place_of_a_module_but_not_the_other_way_round(kind: Kind) -> None:
    pd = kind([("x", nn.Identity()), ("y", torch.ones(1))])
    pd["x"] = torch.ones(1)
    assert names(pd.named_children()) == []
    assert names(pd.named_parameters()) == ["y", "x"]
    assert list(pd) == ["x", "y"]
    message = (
        r"cannot assign 'torch.nn.modules.linear.Identity' as parameter 'x' \(torch.nn.Parameter or None expected\)"
    )
    for write in (lambda: pd.__setitem__("x", nn.Identity()), lambda: pd.update({"x": nn.Identity()})):
        with pytest.raises(TypeError, match=message):
            write()
    assert type(pd["x"]) is Parameter


def test_a_plain_value_takes_no_place_of_anything_registered(kind: Kind) -> None:
    pd = kind([("x", nn.Identity()), ("y", torch.ones(1))])
    pd.register_buffer("mean", torch.ones(1))
    for name, message in (
        ("x", r"cannot assign 'int' as child module 'x' \(torch.nn.Module or None expected\)"),
        ("y", r"cannot assign 'int' as parameter 'y' \(torch.nn.Parameter or None expected\)"),
        ("mean", r"cannot assign 'int' as buffer 'mean' \(torch.nn.Buffer, torch.Tensor or None expected\)"),
    ):
        with pytest.raises(TypeError, match=message):
            pd[name] = 5


def test_results_of_operations_are_made_leaves_and_parameters_that_are_none_are_refused(kind: Kind) -> None:
    weight = torch.ones(2, requires_grad=True)
    pd = kind({"x": weight * 2})
    assert pd["x"].is_leaf
    assert pd["x"].requires_grad
    result = weight * 2
    result.__class__ = Parameter
    for write in (lambda: pd.__setitem__("y", result), lambda: pd.update({"y": result}), lambda: pd.update(y=result)):
        with pytest.raises((ValueError, TypeError), match=r"Cannot assign non-leaf Tensor to parameter 'y'|argument"):
            write()
        assert "y" not in dict(pd.named_parameters())


def test_a_parameter_that_needs_no_gradient_stays_so(kind: Kind) -> None:
    pd = kind({"frozen": Parameter(torch.ones(1), requires_grad=False), "count": Parameter(torch.ones(1).int(), False)})
    assert [value.requires_grad for value in pd.values()] == [False, False]
    with pytest.raises(RuntimeError, match="Only Tensors of floating point and complex dtype can require gradients"):
        pd["whole"] = torch.arange(3)
    with pytest.raises(RuntimeError, match="Only Tensors of floating point and complex dtype can require gradients"):
        pd.update({"whole": torch.arange(3)})
    assert "whole" not in dict(pd.named_parameters())


def test_a_tensor_becomes_a_parameter_over_the_same_memory(kind: Kind) -> None:
    rows = torch.zeros(3, 2)
    pd = kind((f"row{n}", row) for n, row in enumerate(rows))
    with torch.no_grad():
        pd["row1"].fill_(7)
    assert rows.tolist() == [[0, 0], [7, 7], [0, 0]]
    assert pd["row1"]._version == rows._version


# -- as part of a model ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.weights = filled(kind)
        self.by_task = nn.ModuleDict({"a": filled(kind), "b": filled(kind)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.weights["right"] @ self.weights["left"] + self.by_task["a"]["left"].sum()


def test_names_in_a_model_have_prefixes(kind: Kind) -> None:
    model = Model(kind)
    expected = [
        *("first.weight", "first.bias", "weights.right", "weights.left"),
        *("by_task.a.right", "by_task.a.left", "by_task.b.right", "by_task.b.left"),
    ]
    assert names(model.named_parameters()) == expected
    assert list(model.state_dict()) == expected
    assert names(model.weights.named_parameters(prefix="w")) == ["w.right", "w.left"]
    assert names(model.named_parameters(recurse=False)) == []
    assert names(model.weights.named_parameters(recurse=False)) == ["right", "left"]
    assert names(model.named_modules()) == ["", "first", "weights", "by_task", "by_task.a", "by_task.b"]
    assert model.get_parameter("by_task.a.left") is model.by_task["a"]["left"]


def test_a_parameter_under_two_names_is_one_parameter(kind: Kind) -> None:
    shared = Parameter(torch.ones(2))
    pd = kind([("a", shared), ("b", shared), ("c", torch.zeros(1))])
    assert names(pd.named_parameters()) == ["a", "c"]
    assert names(pd.named_parameters(remove_duplicate=False)) == ["a", "b", "c"]
    assert list(pd.state_dict()) == ["a", "b", "c"]
    assert len(list(pd.parameters())) == 2
    pd.double()
    assert pd["a"] is pd["b"]
    assert pd["a"].dtype == torch.float64
    (pd["a"].sum() + pd["b"].sum()).backward()
    assert pd["a"].grad.tolist() == [2, 2]


def test_a_tensor_set_under_two_names_is_two_parameters_over_one_memory(kind: Kind) -> None:
    tensor = torch.zeros(2)
    pd = kind([("a", tensor), ("b", tensor)])
    assert pd["a"] is not pd["b"]
    assert pd["a"].data_ptr() == pd["b"].data_ptr()
    assert names(pd.named_parameters()) == ["a", "b"]


def test_a_model_that_uses_entries_learns(kind: Kind) -> None:
    torch.manual_seed(0)
    model = Model(kind)
    loss = model(torch.ones(1, 2)).square().sum()
    loss.backward()
    assert model.weights["left"].grad is not None
    assert model.by_task["a"]["left"].grad is not None
    assert model.by_task["b"]["left"].grad is None
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zero_grad_keeps_gradients_where_asked(kind: Kind) -> None:
    pd = filled(kind)
    pd["left"].sum().backward()
    grad = pd["left"].grad
    pd.zero_grad(set_to_none=False)
    assert pd["left"].grad is grad
    assert grad.count_nonzero() == 0
    pd.zero_grad()
    assert pd["left"].grad is None


def test_requires_grad_train_and_eval_reach_all(kind: Kind) -> None:
    pd = filled(kind)
    pd["child"] = nn.Linear(1, 1)
    assert pd.requires_grad_(False) is pd
    assert not any(parameter.requires_grad for parameter in pd.parameters())
    assert pd.eval() is pd
    assert not pd.training
    assert not pd["child"].training
    pd.train()
    assert pd["child"].training


def test_apply_visits_modules_and_itself(kind: Kind) -> None:
    pd = kind({"child": nn.Identity()})
    visited: list[nn.Module] = []
    assert pd.apply(visited.append) is pd
    assert visited == [pd["child"], pd]


def test_a_dictionary_is_not_called_and_hides_no_forward(kind: Kind) -> None:
    with pytest.raises(RuntimeError, match=r"^ParameterDict should not be called\.$"):
        kind()(1)
    with pytest.raises(NotImplementedError, match='missing the required "forward" function'):
        kind().forward()


def test_equality_and_hash_are_by_identity(kind: Kind) -> None:
    one, other = filled(kind), filled(kind)
    assert one != other
    assert one == one
    assert len({one, other, one}) == 2
    assert not kind()
    assert one


def test_dir_lists_the_entries(kind: Kind) -> None:
    pd = filled(kind)
    assert {"left", "right", "keys"} <= set(dir(pd))


# -- sweeps over the data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda pd: pd.to(torch.float64), torch.float64),
        (lambda pd: pd.to("cpu", torch.float16), torch.float16),
        (lambda pd: pd.to(torch.zeros(1, dtype=torch.float64)), torch.float64),
        (lambda pd: pd.half(), torch.float16),
        (lambda pd: pd.bfloat16(), torch.bfloat16),
        (lambda pd: pd.double(), torch.float64),
        (lambda pd: pd.double().float(), torch.float32),
        (lambda pd: pd.type(torch.float64), torch.float64),
        (lambda pd: pd.cpu(), torch.float32),
        (lambda pd: pd._apply(lambda tensor: tensor.to(torch.float64)), torch.float64),
    ],
)
def test_a_move_keeps_objects_values_and_order_and_moves_gradients(kind: Kind, move: Any, dtype: torch.dtype) -> None:
    pd = filled(kind)
    pd["plain"] = 5
    pd.register_buffer("mean", torch.ones(1))
    objects = list(pd.values())
    pd["left"].sum().backward()
    assert move(pd) is pd
    assert [one is other for one, other in zip(pd.values(), objects, strict=True)] == [True, True, True]
    assert list(pd) == ["right", "left", "plain"]
    assert pd["right"].tolist() == [1, 1]
    assert {tensor.dtype for tensor in (*pd.parameters(), *pd.buffers(), pd["left"].grad)} == {dtype}


def test_a_move_converts_only_floating_point(kind: Kind) -> None:
    pd = kind({"count": Parameter(torch.arange(3), requires_grad=False), "x": torch.zeros(1)})
    pd.half()
    assert pd["count"].dtype == torch.int64
    assert pd["x"].dtype == torch.float16


def test_under_the_overwrite_switch_a_move_makes_new_parameters(kind: Kind) -> None:
    pd = filled(kind)
    old = pd["left"]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        pd.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert pd["left"] is not old
    assert pd["left"].dtype == torch.float64
    assert old.dtype == torch.float32
    assert list(pd) == ["right", "left"]


def test_under_the_swap_switch_a_move_keeps_the_objects(kind: Kind) -> None:
    pd = filled(kind)
    old = pd["left"]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        pd.double()
        pd.load_state_dict({"left": torch.ones(2, 3), "right": torch.zeros(2)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert pd["left"] is old
    assert pd["left"].min() == 1
    assert list(pd) == ["right", "left"]


def test_a_dictionary_on_the_meta_device_is_made_real_by_to_empty(kind: Kind) -> None:
    with torch.device("meta"):
        pd = kind([("a", torch.zeros(2)), ("b", torch.zeros(3))])
    assert {value.device.type for value in pd.values()} == {"meta"}
    pd.to_empty(device="cpu")
    assert {value.device.type for value in pd.values()} == {"cpu"}
    pd.load_state_dict({"a": torch.ones(2), "b": torch.ones(3)})
    assert pd["b"].tolist() == [1, 1, 1]
    pd.to("meta")
    assert pd["a"].is_meta
    assert list(pd) == ["a", "b"]
