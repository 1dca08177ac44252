"""Functions of torch that others patch or override: what torch's class would ask, ours asks, too.

The bugs that this hunts: a fast path that goes around a patch (of ``torch.fx``, of low-memory loading, of a subclass,
of DeepSpeed's dict of Parameters), so that it has no effect and nobody says so; one that stays slow when it is gone.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

import pdrs
from observed import Calls
from pdrs._torch import own_functions

Kind = type[nn.ParameterDict]
ZERO = torch.zeros(1)

# All functions of torch around which a method of ours has a way that is faster, and all that torch's class has itself.
FUNCTIONS = [
    *("__getattr__", "__setattr__", "__delattr__", "register_parameter", "_key_to_attr"),
    *("_save_to_state_dict", "_load_from_state_dict", "load_state_dict", "state_dict", "_apply"),
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__", "__iter__", "__reversed__"),
    *("keys", "values", "items", "get", "setdefault", "pop", "popitem", "update", "clear", "copy", "fromkeys"),
    *("extra_repr", "__or__", "__ror__", "__ior__", "__init__"),
]

CALLS: dict[str, Callable[[Kind, Any], Any]] = {
    "constructor": lambda kind, pd: list(kind({"y": ZERO, "x": Parameter(ZERO)})),
    "constructor from pairs": lambda kind, pd: list(kind([("y", ZERO), ("x", ZERO)])),
    "constructor from its like": lambda kind, pd: list(kind(pd)),
    "pd[k]": lambda kind, pd: pd["a"].tolist(),
    "pd[k] = tensor": lambda kind, pd: pd.__setitem__("z", ZERO),
    "pd[k] = Parameter": lambda kind, pd: set_item(pd, "z", Parameter(ZERO)),
    "pd[k] = Parameter, again": lambda kind, pd: set_item(pd, "a", Parameter(ZERO)),
    "pd[k] = value": lambda kind, pd: set_item(pd, "z", 5),
    "pd[k] = module": lambda kind, pd: set_item(pd, "z", nn.ReLU()),
    "del pd[k]": lambda kind, pd: delete_item(pd, "a"),
    "pd.k": lambda kind, pd: pd.a.tolist(),
    "pd.k = Parameter": lambda kind, pd: setattr(pd, "a", Parameter(ZERO)),
    "del pd.k": lambda kind, pd: delattr(pd, "a"),
    "in": lambda kind, pd: ("a" in pd, "z" in pd),
    "len": lambda kind, pd: len(pd),
    "iter": lambda kind, pd: list(pd),
    "reversed": lambda kind, pd: list(reversed(pd)),
    "keys": lambda kind, pd: list(pd.keys()),
    "values": lambda kind, pd: [value.tolist() for value in pd.values()],
    "items": lambda kind, pd: [(key, value.tolist()) for key, value in pd.items()],
    "get": lambda kind, pd: pd.get("a").tolist(),
    "setdefault": lambda kind, pd: pd.setdefault("a", ZERO).tolist(),
    "setdefault, new": lambda kind, pd: pd.setdefault("z", ZERO).tolist(),
    "pop": lambda kind, pd: pd.pop("a").tolist(),
    "popitem": lambda kind, pd: pd.popitem()[0],
    "clear": lambda kind, pd: pd.clear(),
    "update, dict": lambda kind, pd: pd.update({"y": ZERO, "x": Parameter(ZERO)}),
    "update, Parameters": lambda kind, pd: pd.update({"x": Parameter(ZERO)}),
    "update, pairs": lambda kind, pd: pd.update([("y", ZERO), ("a", ZERO)]),
    "update, its like": lambda kind, pd: pd.update(kind([("y", ZERO)])),
    "copy": lambda kind, pd: list(pd.copy()._parameters),
    "fromkeys": lambda kind, pd: list(pd.fromkeys(["y"], ZERO)),
    "|": lambda kind, pd: list((pd | kind([("y", ZERO)]))._parameters),
    "|=": lambda kind, pd: list(pd.__ior__(kind([("y", ZERO)]))._parameters),
    "repr": lambda kind, pd: repr(pd),
    "state_dict": lambda kind, pd: list(pd.state_dict()),
    "state_dict of a model": lambda kind, pd: list(nn.Sequential(pd).state_dict()),
    "load_state_dict": lambda kind, pd: pd.load_state_dict({"a": ZERO + 2, "b": ZERO}),
    "load_state_dict of a model": lambda kind, pd: nn.Sequential(pd).load_state_dict({"0.a": ZERO + 2, "0.b": ZERO}),
    "load_state_dict, assigned": lambda kind, pd: pd.load_state_dict({"a": ZERO + 2, "b": ZERO}, assign=True),
    "to": lambda kind, pd: pd.double()["a"].dtype,
    "to of a model": lambda kind, pd: nn.Sequential(pd).double()[0]["a"].dtype,
}


def set_item(pd: Any, key: str, value: Any) -> None:
    pd[key] = value


def delete_item(pd: Any, key: str) -> None:
    del pd[key]


def noting(original: Any, name: str, log: list[Any]) -> Any:
    """Wrap a function so that it notes for which key it is asked."""

    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        log.append((name, arguments[0] if arguments and type(arguments[0]) is str else None))
        return original(self, *arguments, **named)

    return wrapper


def seen(call: str, kind: Kind, patched: Callable[[Kind, list[Any]], Any]) -> tuple[Any, ...]:
    """Give which functions a call asks for which keys, and what comes of it."""
    log: list[Any] = []
    with patched(kind, log) as patched_kind:
        pd = patched_kind([("b", Parameter(ZERO)), ("a", Parameter(ZERO + 1))])
        log.clear()
        result = CALLS[call](patched_kind, pd)
        # Ours has an attribute more, and looks at others in another order.
        entries = {name for name in log if name[1] not in ("_keys", "_values", "_key_to_attr")}
    return entries, str(result), list(pd), list(pd._parameters)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("place", [nn.Module, nn.ParameterDict], ids=["Module", "torch's ParameterDict"])
def test_what_is_patched_in_torch_is_asked_for_the_same_keys(place: type, function: str) -> None:
    if not hasattr(place, function):
        return

    logs: list[list[Any]] = []

    @contextmanager
    def patched(kind: Kind, log: list[Any]) -> Iterator[Kind]:
        logs[:] = [log]
        yield kind

    # Once for all calls: CPython 3.13 stops to notice patches of a class after a thousand of them.
    with pytest.MonkeyPatch.context() as patch:
        noted: Any = SimpleNamespace(append=lambda one: logs[0].append(one))
        patch.setattr(place, function, noting(getattr(place, function), function, noted))
        compare(patched)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_subclass_overrides_is_asked_for_the_same_keys(function: str) -> None:
    @contextmanager
    def patched(kind: Kind, log: list[Any]) -> Iterator[Kind]:
        yield type("ParameterDict", (kind,), {function: noting(getattr(kind, function), function, log)})

    compare(patched)


@pytest.mark.parametrize("function", FUNCTIONS[:3])
def test_what_a_base_between_ours_and_module_has_is_asked(function: str) -> None:
    @contextmanager
    def patched(kind: Kind, log: list[Any]) -> Iterator[Kind]:
        mixin = type("Mixin", (nn.Module,), {function: noting(getattr(nn.Module, function), function, log)})
        yield type("ParameterDict", (kind, mixin), {})

    compare(patched)


def test_a_look_up_of_attributes_of_its_own_is_asked(kind: Kind) -> None:
    class Tripled(kind):
        def __getattribute__(self, name: str) -> Any:
            if name == "made_up":
                return 7
            if name == "a":
                return super().__getattr__(name) * 3
            return super().__getattribute__(name)

    pd = Tripled([("b", torch.ones(1)), ("a", torch.ones(1))])
    assert pd["made_up"] == 7
    assert [value.item() for value in pd.values()] == [value.item() for _, value in pd.items()] == [1, 3]
    assert pd["a"].item() == pd.get("a").item() == pd.a.item() == pd.copy()["a"].item() == kind(pd)["a"].item() == 3
    assert pd.popitem()[1].item() == 3
    assert list(pd) == list(pd._parameters) == ["b"]


@pytest.mark.parametrize(
    "function", ["_key_to_attr", "register_parameter", "_save_to_state_dict", "_load_from_state_dict"]
)
def test_what_is_patched_on_an_instance_is_asked_for_the_same_keys(function: str) -> None:
    @contextmanager
    def patched(kind: Kind, log: list[Any]) -> Iterator[Any]:
        def make(*arguments: Any) -> Any:
            pd = kind(*arguments)
            pd.__dict__[function] = noting(getattr(kind, function), function, log).__get__(pd)
            return pd

        yield make

    compare(patched)


def compare(patched: Callable[[Kind, list[Any]], Any]) -> None:
    for call in CALLS:
        theirs, ours = (seen(call, kind, patched) for kind in (nn.ParameterDict, pdrs.ParameterDict))
        assert ours == theirs, call


def test_every_function_of_the_table_is_patched_here() -> None:
    named = {name for method, called in own_functions.CALLED.items() for name in (method, *called)}
    assert named - {"source", "__getattribute__"} <= set(FUNCTIONS)


@pytest.mark.parametrize("function", ["__getattr__", "register_parameter"])
@pytest.mark.parametrize("place", [nn.Module, nn.ParameterDict], ids=["Module", "torch's ParameterDict"])
def test_a_patch_that_is_gone_is_asked_no_more(place: type, function: str) -> None:
    for kind in (pdrs.ParameterDict, type("Sub", (pdrs.ParameterDict,), {"forward": lambda self: None})):
        pd = kind({"a": ZERO})

        def use(pd: Any = pd) -> int:
            with Calls() as calls:
                pd["b"] = Parameter(ZERO)
                pd.update([("c", Parameter(ZERO))])
                assert pd["b"].shape == (1,)
            return calls.count

        use()
        before = use()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, function, noting(getattr(place, function), function, []))
            assert use() > before, "the patch was not asked"
        use()  # what has become of the classes is looked up once
        assert use() == before, "slow for ever"


def test_a_patch_in_the_midst_of_an_iteration_is_asked_from_then_on(kind: Kind) -> None:
    pd = kind({name: ZERO for name in "abcd"})
    log: list[Any] = []
    values, items = iter(pd.values()), iter(pd.items())
    next(values), next(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", noting(nn.Module.__getattr__, "__getattr__", log))
        next(values), next(items)
        assert [name for _, name in log] == ["b", "b"]
    next(values), next(items)
    assert len(log) == 2


def test_a_patch_with_the_name_of_what_it_wraps_is_seen() -> None:
    log: list[Any] = []

    @functools.wraps(nn.Module.register_parameter)
    def register_parameter(self: nn.Module, name: str, param: Any) -> None:
        log.append(name)
        functools.partial(original, self)(name, param)

    original = nn.Module.register_parameter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_parameter)
        pdrs.ParameterDict({"a": ZERO})
    assert log == ["a"]


def test_a_subclass_made_under_a_patch_of_len_asks_the_patch() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdrs.ParameterDict, "__len__", MagicMock(return_value=7))

        class Late(pdrs.ParameterDict):
            pass

        assert len(Late()) == 7
    assert len(Late({"a": ZERO})) == 1


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Do what the low-memory loading of accelerate and PEFT does."""
    original = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: Any) -> None:
        original(module, name, param)
        if param is not None:
            made = type(module._parameters[name])
            module._parameters[name] = made(module._parameters[name].to("meta"), requires_grad=param.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_empty)
        yield


def test_low_memory_loading_reaches_every_entry(kind: Kind) -> None:
    with parameters_on_meta():
        model = nn.ModuleDict({"pd": kind({"a": torch.ones(3)}), "linear": nn.Linear(2, 2)})
        model["pd"]["b"] = torch.ones(2)
        model["pd"].update({"c": torch.ones(1)})
        model["pd"].setdefault("d", Parameter(torch.ones(1), requires_grad=False))
        model["pd"].e = Parameter(torch.ones(1))
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == dict.fromkeys(
        ["pd.a", "pd.b", "pd.c", "pd.d", "pd.e", "linear.weight", "linear.bias"], "meta"
    )
    assert not model["pd"]["d"].requires_grad
    assert list(model["pd"]) == ["a", "b", "c", "d"]


def test_checkpoints_ask_what_is_patched_in_torch(tmp_path: Path) -> None:
    save, load = nn.Module._save_to_state_dict, nn.Module._load_from_state_dict

    @functools.wraps(save)
    def doubled(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        save(self, destination, prefix, keep_vars)
        destination.update({key: value * 2 for key, value in destination.items() if key.startswith(prefix)})

    @functools.wraps(load)
    def five_more(self: nn.Module, state_dict: dict[str, Any], *others: Any) -> None:
        state_dict.update({key: value + 5 for key, value in state_dict.items()})
        load(self, state_dict, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_save_to_state_dict", doubled)
        pdrs.save(pdrs.ParameterDict({"a.b": torch.ones(2)}), tmp_path / "doubled")
    pd = pdrs.ParameterDict({"a.b": torch.zeros(2)})
    assert pdrs.load(tmp_path / "doubled", pd) == ([], [])
    assert pd["a.b"].tolist() == [2, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_load_from_state_dict", five_more)
        assert pdrs.load(tmp_path / "doubled", pd) == ([], [])
        assert pd["a.b"].tolist() == [7, 7]
        assert pd.load_state_dict({"a.b": torch.ones(2)}) == ([], [])
        assert pd["a.b"].tolist() == [6, 6]
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "c.d"'):
            pd.load_state_dict({"a.b": torch.ones(2), "c.d": torch.ones(2)})


ODD = ["a.b", "type", "training", "_parameters", "T", "keys", "", "."]


def test_low_memory_loading_takes_keys_that_torch_refuses() -> None:
    keys = [key for key in ODD if key]
    with parameters_on_meta():
        pd = pdrs.ParameterDict((key, torch.ones(1)) for key in keys)
        pd["a.b"] = torch.ones(2)
        with pytest.raises(KeyError, match="empty string"):
            pd[""] = torch.ones(1)
        with pytest.raises(RuntimeError, match="can require gradients"):
            pd["new.one"] = torch.ones(1, dtype=torch.int64)
        with pytest.raises(TypeError, match="cannot assign"):
            pd["type"] = 5
    assert list(pd) == list(pd._parameters) == keys
    assert all(type(key) is str for key in pd._parameters)
    assert all(value.is_meta for value in pd.values())
    assert pd.training is True
    assert callable(pd.type)
    assert pd["a.b"].shape == (2,)
    assert [key for key, _ in pickle.loads(pickle.dumps(pd)).items()] == keys


@pytest.mark.parametrize("function", FUNCTIONS[:5])
def test_keys_that_torch_refuses_are_taken_whatever_is_patched(function: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, function, noting(getattr(nn.Module, function, str), function, []), raising=False)
        keys = [key for key in ODD if key]
        pd = pdrs.ParameterDict((key, torch.full((1,), float(n))) for n, key in enumerate(keys))
        assert [value.item() for value in pd.values()] == list(range(len(keys)))
        for key in keys:
            pd[key] = pd[key].detach() + 1
            pd[key] = Parameter(pd[key] + 1)
            assert pd[key] is pd._parameters[key]
        for key in keys:
            plain = pdrs.ParameterDict({key: 5})
            assert plain[key] == plain.pop(key) == 5
            assert list(plain.items()) == []
            plain[key] = module = nn.ReLU()
            assert plain[key] is module
            assert plain.popitem() == (key, module)
        assert pd.training is True
        while pd:
            key, value = pd.popitem()
            assert value.item() == ODD[:-2].index(key) + 2 if key in ODD[:-2] else True
        assert not pd._parameters


def test_a_patch_that_raises_leaves_no_trace(kind: Kind) -> None:
    def refuse(self: nn.Module, name: str, param: Any) -> None:
        raise ZeroDivisionError

    pd = pdrs.ParameterDict([("a", ZERO), ("plain", 5), ("module", nn.ReLU())])
    before = list(pd.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", refuse)
        for key in ("a", "plain", "module", "new", "new.one", "type", "training"):
            with pytest.raises(ZeroDivisionError):
                pd[key] = ZERO
    assert list(pd.items()) == before
    assert list(pd._parameters) == ["a"]
    assert pd.training is True


def test_a_patch_is_asked_for_plain_values_that_are_set_as_attributes(kind: Kind) -> None:
    original = nn.Module.__setattr__

    def one_more(self: nn.Module, name: str, value: Any) -> None:
        if value == 0:
            raise ZeroDivisionError
        original(self, name, value + 1 if type(value) is int else value)

    pd = kind([("a", 1), ("m", nn.ReLU())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", one_more)
        pd.a = 5
        with pytest.raises(ZeroDivisionError):
            pd.a = 0
    assert pd["a"] == pd.a == 6
    pd["a"] = 7
    assert pd["a"] == pd.a == pd.pop("a") == 7
    assert not hasattr(pd, "a")


@pytest.mark.parametrize("function", ["__setitem__", "__getattr__", "__setattr__", "register_parameter"])
def test_values_of_any_kind_follow_each_other_whatever_is_patched(kind: Kind, function: str) -> None:
    place = nn.Module if hasattr(nn.Module, function) else nn.ParameterDict
    for before in (5, None, nn.ReLU()):
        for after in (nn.Linear(1, 1), Parameter(ZERO), None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, function, noting(getattr(place, function), function, []))
                pd = kind([("a", before)])
                pd["a"] = after
                assert pd["a"] is pd.a is after
            assert pd["a"] is pd.a is after
            assert len(list(pd.parameters())) == (0 if after is None else 2 if isinstance(after, nn.Linear) else 1)


def test_a_tensor_that_hides_what_has_become_none_stays(kind: Kind) -> None:
    pd = kind({"a": ZERO})
    pd.__dict__["a"] = torch.ones(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", noting(nn.Module.register_parameter, "register_parameter", []))
        pd["a"] = None
    assert pd["a"] is pd.a is pd.__dict__["a"] is next(iter(pd.values()))
    assert pd._parameters == {"a": None}


class Gathering(OrderedDict):
    """Do what DeepSpeed's dict of Parameters does: note, or fetch, what is asked for."""

    def __init__(self, *arguments: Any) -> None:
        self.log: list[str] = []
        super().__init__(*arguments)

    def __getitem__(self, name: str) -> Any:
        self.log.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("dictionary", [OrderedDict, Gathering], ids=["OrderedDict", "with a look-up of its own"])
@pytest.mark.parametrize("call", CALLS)
def test_parameters_in_another_dict_are_reached_by_its_methods(call: str, dictionary: type) -> None:
    results = []
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        pd = kind([("b", Parameter(ZERO)), ("a", Parameter(ZERO + 1))])
        pd._parameters = dictionary(pd._parameters)
        result = str(CALLS[call](kind, pd))
        log = sorted(set(getattr(pd._parameters, "log", [])))
        # OrderedDict is a list of keys beside a dict: one that was changed as a plain dict says so here.
        results.append((result, list(pd), list(pd._parameters.items()) and list(pd._parameters), log, len(pd)))
    assert results[0] == results[1]


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda pd: pickle.loads(pickle.dumps(pd))])
def test_another_dict_of_parameters_is_copied_as_torch_copies_it(kind: Kind, how: Callable[[Any], Any]) -> None:
    pd = kind({"a": torch.ones(2), "b": torch.zeros(2)})
    pd._parameters = OrderedDict(pd._parameters)
    other = how(pd)
    assert type(other._parameters) is OrderedDict
    assert [(key, value.tolist()) for key, value in other.items()] == [("a", [1, 1]), ("b", [0, 0])]
    assert other.pop("a").tolist() == [1, 1]
    assert next(iter(other._parameters.items()))[0] == "b"


def test_a_subclass_may_give_attributes_other_names_than_keys(kind: Kind) -> None:
    class Prefixed(kind):
        def _key_to_attr(self, key: str) -> str:
            return "p_" + key

    pd = Prefixed([("b", torch.ones(1)), ("a", torch.zeros(1))])
    pd["c"] = Parameter(torch.full((1,), 2.0))
    assert list(pd) == ["b", "a", "c"]
    assert list(pd._parameters) == list(pd.state_dict()) == ["p_b", "p_a", "p_c"]
    assert [value.item() for value in pd.values()] == [1, 0, 2]
    assert pd.p_a is pd["a"]
    assert pd.pop("b").item() == 1
    assert pd.popitem()[0] == "c"
    del pd["a"]
    assert list(pd) == list(pd._parameters) == []
    with pytest.raises(AttributeError):
        pd["missing"]


@pytest.mark.parametrize("value", [7, None, nn.ReLU(), torch.ones(1), Parameter(torch.ones(1))], ids=lambda v: type(v))
@pytest.mark.parametrize("before", [5, None, nn.ReLU(), torch.zeros(1)], ids=lambda before: type(before))
@pytest.mark.parametrize("how", ["pd[k] =", "update", "pd.k ="])
def test_values_of_any_kind_follow_each_other_under_other_attribute_names(
    kind: Kind, before: Any, value: Any, how: str
) -> None:
    if isinstance(before, torch.Tensor) and not (value is None or isinstance(value, torch.Tensor)):
        return  # refused
    if isinstance(before, nn.ReLU) and value == 7:
        return  # refused
    if how == "pd.k =" and type(value) is torch.Tensor:
        return  # refused, or a plain value

    class Prefixed(kind):
        def _key_to_attr(self, key: str) -> str:
            return "p_" + key

    pd = Prefixed([("b", 1), ("a", before)])
    if how == "pd[k] =":
        pd["a"] = value
    elif how == "update":
        pd.update([("a", value)])
    else:
        pd.p_a = value
    assert list(pd) == ["b", "a"]
    shown = Parameter(value) if type(value) is torch.Tensor else value
    assert all(type(found) is type(shown) for found in (pd["a"], pd.p_a, list(pd.values())[1]))
    assert ("p_a" in dict(pd.named_parameters())) == isinstance(value, torch.Tensor)
    pd.pop("a")
    assert not hasattr(pd, "p_a")


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value / 2


@pytest.mark.parametrize("function", [None, *FUNCTIONS[:5], "__getitem__", "__setitem__"])
def test_what_is_parametrized_stays_so_whatever_is_patched(kind: Kind, function: str | None) -> None:
    log: list[Any] = []
    pd = kind([("b", torch.zeros(1)), ("a", torch.ones(1))])
    parametrize.register_parametrization(pd, "a", Doubled())
    with pytest.MonkeyPatch.context() as patch:
        if function:
            place = nn.Module if hasattr(nn.Module, function) else nn.ParameterDict
            patch.setattr(place, function, noting(getattr(place, function), function, log))
        for new in (torch.zeros(1), Parameter(torch.zeros(1))):
            with pytest.raises(KeyError, match="attribute 'a' already exists"):
                pd["a"] = new
            with pytest.raises(KeyError, match="attribute 'a' already exists"):
                pd.update([("b", torch.ones(1)), ("a", new)])
        for plain in (5, None, "text"):
            with pytest.raises((TypeError, ValueError)):
                pd["a"] = plain
            with pytest.raises((TypeError, ValueError)):
                pd.update([("a", plain)])
        log.clear()
        assert pd["a"].tolist() == [1]
        if function == "__getitem__":
            assert log == [("__getitem__", "a")]
        pd.a = torch.full((1,), 6.0)
        if function == "__setattr__":
            assert log[-1] == ("__setattr__", "a")
    assert [value.item() for value in pd.values()][1] == 6
    assert sorted(pd.state_dict()) == ["b", "parametrizations.a.original"]


def test_attributes_of_entries_can_be_made_up_by_a_patch(kind: Kind) -> None:
    original = nn.Module.__getattr__
    pd = kind({"a": ZERO})

    def made_up(self: nn.Module, name: str) -> Any:
        return 7 if name == "made_up" else original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", made_up)
        assert pd["made_up"] == 7
        assert pd.get("made_up", 5) == 5
        with pytest.raises(AttributeError):
            pd["missing"]
    with pytest.raises(AttributeError):
        pd["made_up"]
