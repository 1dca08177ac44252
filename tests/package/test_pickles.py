"""What stands in pickles: functions and classes of modules, called with plain values, which ``weights_only`` can load.

The bugs that this hunts: a file that ``torch.load(weights_only=True)`` refuses although all that it names is allowed,
because it names a method, or a builtin that scanners take for an attack; a pickle that has lost the next row of an
index, or what a subclass has; damaged pickles that are believed.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs
from pdrs import IndexMap, _pickle

SD = pdrs.StackedParameterDict
PD = pdrs.ParameterDict

# What torch allows by itself, and, in a pickle without a file of its own, calls to read its storages.
OF_TORCH = {"collections OrderedDict", "_codecs encode", "__builtin__ set", "torch.storage _load_from_bytes"}


def with_everything(make: Any) -> Any:
    made = make({"a.b": torch.ones(3), "type": torch.zeros(2, 2), "\ud800": torch.ones(3)})
    made["gone"] = torch.ones(3)
    made["frozen"] = Parameter(torch.full((3,), 2.0), requires_grad=False)
    made["large"] = torch.ones(1 << 15)
    made["integers"] = Parameter(torch.arange(3), requires_grad=False)
    del made["gone"]
    return made


def frozen_and_attached() -> SD:
    sd = SD.from_tensor([f"n{n}" for n in range(5)], torch.arange(10.0).view(5, 2))
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(["n1", "n2"]).sum().backward()
    optimizer.step()
    sd.freeze(["n1"])
    sd.drop(["n0", "n3"])
    return sd


def with_others() -> PD:
    pd = PD({"a": torch.ones(2), "b": torch.ones(2)})
    pd["child"] = nn.Linear(2, 1)
    pd["plain"] = {"x": [1, 2.5, None, True, (b"", "text")]}
    pd["tied"] = pd["a"]
    pd.register_buffer("mean", torch.ones(1))
    pd["strided"] = Parameter(torch.arange(6.0).view(2, 3).t())
    return pd


def within_a_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), with_others(), frozen_and_attached())
    model.alias = model[1]["a"]
    return model


MADE: dict[str, Callable[[], nn.Module]] = {
    "ParameterDict": lambda: with_everything(PD),
    "StackedParameterDict": lambda: with_everything(SD),
    "empty ParameterDict": PD,
    "empty StackedParameterDict": SD,
    "emptied ParameterDict": lambda: _emptied(with_everything(PD)),
    "emptied StackedParameterDict": lambda: _emptied(with_everything(SD)),
    "frozen and attached": frozen_and_attached,
    "with others": with_others,
    "within a model": within_a_model,
    "frozen entries": lambda: PD({"a": torch.ones(2), "b": torch.ones(2)}).requires_grad_(False),
    "frozen tables": lambda: SD({"a": torch.ones(2), "b": torch.ones(2)}).requires_grad_(False),
    "groups of options": lambda: _with_groups(with_everything(SD)),
    "half": lambda: with_everything(PD).bfloat16(),
}


def _emptied(made: Any) -> Any:
    made.clear()
    return made


def _with_groups(sd: SD) -> SD:
    sd.param_groups({"a": {"lr": 0.5}})
    return sd


def flat(module: nn.Module) -> dict[str, Any]:
    """Return all that a module is to keep."""
    state: dict[str, Any] = {}
    for prefix, child in module.named_modules():
        if isinstance(child, PD | SD):
            state[f"{prefix}:keys"] = list(child)
            for key, value in child.items():
                state[f"{prefix}:{key}"] = (
                    (value.tolist(), value.dtype, value.stride(), value.requires_grad)
                    if isinstance(value, Tensor)
                    else str(value)
                )
        else:
            state[prefix] = type(child)
    return state | {f"parameter {name}": list(value.shape) for name, value in module.named_parameters()}


def find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def globals_in(data: bytes) -> Iterator[str]:
    """Yield the globals of a pickle of protocol 2, as ``module name``."""
    return (str(argument) for operation, argument, _ in pickletools.genops(data) if operation.name == "GLOBAL")


@pytest.mark.parametrize("case", MADE)
def test_a_saved_module_is_loaded_as_weights_only_if_what_it_names_is_allowed(case: str) -> None:
    module = MADE[case]()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    allowed = [find(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)]
    file.seek(0)
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(module)
    assert flat(loaded) == flat(module)
    if case == "within a model":
        assert loaded.alias is loaded[1]["a"] is loaded[1]["tied"]


@pytest.mark.parametrize("case", MADE)
def test_a_pickle_names_nothing_but_public_classes_one_module_and_what_torch_allows(case: str) -> None:
    data = pickle.dumps(MADE[case](), 2)
    ours = {name for name in globals_in(data) if name.startswith("pdrs")}
    public = {"pdrs IndexMap", "pdrs.parameter_dict ParameterDict", "pdrs.stacked StackedParameterDict"}
    called = [name.split(" ") for name in ours - public]
    assert len({module for module, _ in called}) <= 1
    assert all(attribute in importlib.import_module(module).__all__ for module, attribute in called)
    others = {name for name in set(globals_in(data)) - ours if not name.startswith(("torch._utils ", "torch.nn."))}
    assert others <= OF_TORCH | ({"__builtin__ bytes"} if "others" in case or "model" in case else set())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("case", MADE)
def test_each_protocol_and_a_deep_copy_keep_everything(case: str, protocol: int) -> None:
    module = MADE[case]()
    for made in (pickle.loads(pickle.dumps(module, protocol)), copy.deepcopy(module)):
        assert flat(made) == flat(module)
    # Written by Python's own pickler, and by the one in C.
    file = io.BytesIO()
    pickle._Pickler(file, protocol).dump(module)
    assert flat(pickle.loads(file.getvalue())) == flat(module)


def test_a_loaded_dictionary_goes_on_as_the_one_that_was_saved() -> None:
    sd = frozen_and_attached()
    loaded = pickle.loads(pickle.dumps(sd, 2))
    for each in (sd, loaded):
        each["new"], each["newer"], each["newest"] = torch.ones(2), torch.zeros(2), torch.ones(2)
        each.gather(["n1", "n2"]).sum().backward()
    assert loaded.table((2,)).tolist() == sd.table((2,)).tolist()
    gradient = dict(loaded.named_grads())
    assert (gradient["n1"].tolist(), gradient["n2"].tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_keeps_its_order_rows_and_next_row(protocol: int) -> None:
    index = IndexMap({"b": 2**62, "a": 0, "": 255, "\ud800": 7})
    index.popitem()
    index["gone"] = 2**62 + 5
    del index["gone"]
    for made in (pickle.loads(pickle.dumps(index, protocol)), copy.deepcopy(index), copy.copy(index)):
        assert list(made.items()) == [("b", 2**62), ("a", 0), ("", 255)]
        assert made.extend(["c"]).tolist() == [2**62 + 6]
    assert list(pickle.loads(pickle.dumps(IndexMap(), protocol))) == []


class Named(IndexMap):
    """What a user makes of an IndexMap."""

    __slots__ = ("__dict__", "slot")

    def __init__(self, name: str, **rows: int) -> None:
        super().__init__(rows)
        self.name, self.slot, self.me = name, [1], self


WAYS = [copy.copy, copy.deepcopy, lambda it: it.copy(), lambda it: pickle.loads(pickle.dumps(it))]


@pytest.mark.parametrize("way", WAYS, ids=["copy", "deepcopy", "method", "pickle"])
def test_a_copy_of_a_subclass_has_what_the_subclass_has(way: Any) -> None:
    named = Named("first", a=3, b=1)
    made = way(named)
    assert type(made) is Named
    assert (made.name, made.slot, list(made.items())) == ("first", [1], [("a", 3), ("b", 1)])
    is_deep = way in (WAYS[1], WAYS[3])
    assert (made.me is made, made.slot is named.slot) == (is_deep, not is_deep)
    made["c"] = 1
    assert "c" not in named


@pytest.mark.parametrize(
    "state",
    [
        (),
        (["a"], None, 0),
        (["a", "a"], bytes(16), 0),
        ([1], bytes(8), 0),
        (["a"], b"\xff" * 8, 0),
        (["a"], "12345678", 0),
        (None, None, 0),
        (["a"], bytes(8), "x"),
        (["a"], bytes(8), 0, 0, 0),
    ],
    ids=repr,
)
def test_a_damaged_state_of_an_index_is_refused(state: tuple[Any, ...]) -> None:
    index = IndexMap.__new__(IndexMap)
    with pytest.raises((TypeError, ValueError)):
        index.__setstate__(state)
    assert list(index) == []
    used = IndexMap({"a": 1})
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        used.__setstate__((["b"], bytes(8), 0))
    assert list(used) == ["a"]


@pytest.mark.parametrize("names", [None, ("a",), ["a", "a"], ["a", 1], "ab"], ids=repr)
def test_damaged_keys_of_a_dictionary_are_refused(names: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no list of distinct str"):
        _pickle.entry_keys(names)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_keys_of_a_dictionary_come_back_in_order(protocol: int) -> None:
    pd = pdrs.ParameterDict([(name, torch.zeros(1)) for name in ("b", "a", "\ud800", "c")])
    pd.popitem(last=False)
    for keys in (pickle.loads(pickle.dumps(pd._keys, protocol)), copy.copy(pd._keys), copy.deepcopy(pd._keys)):
        assert list(keys) == ["a", "\ud800", "c"]
        assert keys._fingerprint == pd._keys._fingerprint
        keys["d"] = None
        assert keys.popitem() == ("d", None)
        assert list(reversed(keys)) == ["c", "\ud800", "a"]
    assert len(pd) == 3


def test_a_table_with_fewer_rows_than_names_have_is_refused() -> None:
    state = SD({"a": torch.ones(2), "b": torch.ones(2)}).__getstate__()
    state["_index"] = _pickle.row_index(["a"], bytes(8), bytes(8), (5,))
    with pytest.raises(ValueError, match="has fewer rows than the names that were pickled"):
        SD.__new__(SD).__setstate__(state)


@pytest.mark.parametrize(
    "damaged",
    [
        (["a", "a"], bytes(16), bytes(16), (2,)),
        (["a", "b"], bytes(16), bytes(16), (2,)),  # in one row
        (["a"], bytes(8), bytes(8), ()),
        (["a"], bytes(8), bytes(8), (0,)),
        (["a"], bytes(8), bytes(8), (-1,)),
        (["a"], bytes(8), bytes(8), (2**60,)),
        (["a"], bytes(7), bytes(8), (1,)),
        (["a"], bytes(8), b"\xff" * 8, (1,)),
        ([""], bytes(8), bytes(8), (1,)),
    ],
    ids=repr,
)
def test_damaged_rows_of_names_are_refused(damaged: tuple[Any, ...]) -> None:
    with pytest.raises(pickle.UnpicklingError):
        _pickle.row_index(*damaged)


@pytest.mark.parametrize("arguments", [([], 0), (((),), 0), ([1], 1), ([1], -1), ([1], True), ("ab", 0)], ids=repr)
def test_a_place_that_is_none_is_refused(arguments: tuple[Any, ...]) -> None:
    (name,) = {name for name in globals_in(pickle.dumps(with_everything(PD), 2)) if name.endswith(" entry")}
    entry = find(name.replace(" ", "."))
    with pytest.raises(pickle.UnpicklingError, match="not in its block"):
        entry(*arguments)
