"""Copies of ``pdrs.ParameterDict``: ``copy.copy``, ``copy.deepcopy``, ``pickle`` and ``torch.save`` of the module.

The bugs that this hunts: a Parameter that becomes two, or two that become one; strides, ``requires_grad``, order or
attributes that differ from those of a copy of torch's class; a pickle that reads outside its block, or that changes how
Parameters are pickled elsewhere; a collector that stays off.
"""

from __future__ import annotations

import copy
import copyreg
import gc
import importlib
import io
import pickle
import pickletools
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pdrs
from tensors import blocks

Kind = type[nn.ParameterDict]
KINDS: tuple[Kind, Kind] = (nn.ParameterDict, pdrs.ParameterDict)


def saved_and_loaded(module: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda module, protocol=protocol: pickle.loads(pickle.dumps(module, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "torch.save": saved_and_loaded,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return WAYS[request.param]


def filled(kind: Kind, entries: int = 20) -> nn.ParameterDict:
    pd = kind([(f"n{n}", torch.full((n % 3 + 1,), float(n))) for n in range(entries)])
    pd["n1"].requires_grad_(False)
    return pd


def described(pd: nn.ParameterDict) -> list[Any]:
    """Tell all that can be compared of the entries, and which of them are one object."""
    first: dict[int, str] = {}
    return [(name, first.setdefault(id(value), name), described_value(value)) for name, value in pd.items()]


def described_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        numbers = value.detach().to_dense().flatten().tolist()
        facts = (value.dtype, value.shape, value.layout, value.requires_grad, value.is_leaf, value.grad is None)
        strides = value.stride() if value.layout is torch.strided else None
        return type(value), facts, strides, numbers, {**value.__dict__}
    if isinstance(value, nn.ParameterDict):
        return described(value)
    return value.state_dict() and [type(value), len(value.state_dict())] if isinstance(value, nn.Module) else value


# -- what is copied ----------------------------------------------------------------------------------------------------


def test_a_copy_has_equal_entries_of_its_own_in_the_same_order(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    copied = way(pd)
    assert type(copied) is kind
    assert described(copied) == described(pd)
    assert all(copied[name] is not pd[name] for name in pd)
    with torch.no_grad():
        for value in copied.values():
            value.fill_(-1)
    assert pd["n4"].tolist() == [4, 4]
    copied["new"] = torch.zeros(1)
    assert list(copied)[-2:] == ["n19", "new"]
    assert "new" not in pd


def test_a_copy_is_trained_by_itself(kind: Kind, way: Callable[[Any], Any]) -> None:
    copied = way(filled(kind))
    optimizer = torch.optim.SGD(copied.parameters(), lr=1)
    sum(value.sum() for value in copied.values() if value.requires_grad).backward()
    optimizer.step()
    assert copied["n4"].tolist() == [3, 3]
    assert copied["n1"].tolist() == [1, 1]


def test_gradients_and_hooks_of_parameters_stay_behind(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    pd["n2"].sum().backward()
    pd["n4"].register_hook(lambda gradient: gradient * 100)
    copied = way(pd)
    assert copied["n2"].grad is None
    copied["n4"].sum().backward()
    assert copied["n4"].grad.tolist() == [1, 1]


def test_attributes_of_parameters_are_pickled_but_not_copied_deeply(kind: Kind) -> None:
    pd = filled(kind)
    pd["n2"].tag = "kept"
    assert pickle.loads(pickle.dumps(pd))["n2"].tag == "kept"
    assert saved_and_loaded(pd)["n2"].tag == "kept"
    assert not hasattr(copy.deepcopy(pd)["n2"], "tag")


class Doubled(Parameter):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return Doubled, (self.data * 2, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Doubled:
        memo[id(self)] = made = Doubled(self.data * 2, self.requires_grad)
        return made


def test_a_subclass_of_parameter_copies_itself(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    pd["doubled"] = Doubled(torch.ones(2))
    copied = way(pd)
    assert type(copied["doubled"]) is Doubled
    assert copied["doubled"].tolist() == [2, 2]
    assert copied["n4"].tolist() == [4, 4]


class Counting(nn.Module):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.weight = Parameter(torch.ones(1))


class TorchSubclass(nn.ParameterDict):
    made = 0

    def __init__(self, label: str) -> None:
        super().__init__({"a": torch.ones(2), "b": torch.zeros(2)})
        type(self).made += 1
        self.label = [label]


class PdrsSubclass(pdrs.ParameterDict):
    made = 0

    def __init__(self, label: str) -> None:
        super().__init__({"a": torch.ones(2), "b": torch.zeros(2)})
        type(self).made += 1
        self.label = [label]


class TorchStateful(TorchSubclass):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "label": None, "extra": 5}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "extra": state["extra"] + 1})


class PdrsStateful(PdrsSubclass):
    __getstate__ = TorchStateful.__getstate__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "extra": state["extra"] + 1})


@pytest.mark.parametrize("subclass", [TorchSubclass, PdrsSubclass])
def test_a_subclass_is_copied_with_its_attributes_and_without_its_init(
    subclass: Any, way: Callable[[Any], Any]
) -> None:
    pd = subclass("x")
    pd.eval()
    made = subclass.made
    copied = way(pd)
    assert type(copied) is subclass
    assert subclass.made == made
    assert copied.label == ["x"]
    assert copied.label is not pd.label
    assert not copied.training
    assert described(copied) == described(pd)


@pytest.mark.parametrize("subclass", [TorchStateful, PdrsStateful])
def test_a_subclass_decides_about_its_state(subclass: Any, way: Callable[[Any], Any]) -> None:
    copied = way(subclass("x"))
    assert (copied.label, copied.extra) == (None, 6)
    assert list(copied) == ["a", "b"]
    shallow = copy.copy(subclass("x"))
    assert (shallow.label, shallow.extra) == (None, 6)


def test_a_subclass_may_add_to_what_is_copied() -> None:
    class Noting(pdrs.ParameterDict):
        def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
            copied = super().__deepcopy__(memo)
            copied.note = "copied"
            return copied

    copied = copy.deepcopy(Noting({"x": torch.ones(1)}))
    assert (copied.note, copied["x"].item()) == ("copied", 1)


def test_hooks_children_buffers_and_plain_values_go_along(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    pd["child"] = nn.Linear(2, 2)
    pd["inner"] = filled(kind, 3)
    pd["plain"] = [1, 2]
    pd["none"] = None
    pd.beside = Parameter(torch.ones(1))
    pd.register_buffer("mean", torch.ones(2))
    pd.register_buffer("scratch", torch.ones(2), persistent=False)
    pd.register_forward_pre_hook(noted)
    copied = way(pd)
    assert described(copied) == described(pd)
    assert copied["plain"] is not pd["plain"]
    assert copied["inner"]["n1"] is not pd["inner"]["n1"]
    assert list(copied.state_dict()) == list(pd.state_dict())
    assert dict(copied.named_buffers()).keys() == {"mean", "scratch"}
    assert list(copied._forward_pre_hooks.values()) == [noted]


def noted(*_: Any) -> None:
    """Stand in for a hook."""


def test_a_module_that_a_hook_refers_to_is_the_copy(kind: Kind) -> None:
    pd = filled(kind)
    pd.register_load_state_dict_pre_hook(noted)
    pd.itself = [pd]
    copied = copy.deepcopy(pd)
    assert copied.itself[0] is copied
    (hook,) = copied._load_state_dict_pre_hooks.values()
    assert hook.module() is copied


def test_keys_with_dots_and_of_attributes_are_copied(way: Callable[[Any], Any]) -> None:
    names = ["a.b", "type", "keys", "training", "\ud800", "ü", "_parameters"]
    pd = pdrs.ParameterDict([(name, torch.full((1,), float(at))) for at, name in enumerate(names)])
    copied = way(pd)
    assert list(copied) == names
    assert [value.item() for value in copied.values()] == list(range(len(names)))


# -- ties --------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, kind: Kind, first: bool) -> None:
        super().__init__()
        weights = filled(kind)
        weights["again"] = weights["n4"]
        if first:
            self.head = nn.Linear(1, 2, bias=False)
            self.weights = weights
        else:
            self.weights = weights
            self.head = nn.Linear(1, 2, bias=False)
        self.head.weight = weights["n4"]


@pytest.mark.parametrize("first", [True, False], ids=["met before", "met after"])
def test_a_parameter_that_is_also_elsewhere_stays_one(kind: Kind, first: bool, way: Callable[[Any], Any]) -> None:
    copied = way(Tied(kind, first))
    assert copied.head.weight is copied.weights["n4"]
    assert copied.weights["again"] is copied.weights["n4"]
    assert len(list(copied.parameters())) == 20


@pytest.mark.parametrize("first", [True, False], ids=["met before", "met after"])
def test_an_optimizer_that_is_copied_along_optimizes_the_copy(
    kind: Kind, first: bool, way: Callable[[Any], Any]
) -> None:
    pd = filled(kind)
    optimizer = torch.optim.SGD(pd.parameters(), lr=1)
    both = way([optimizer, pd] if first else [pd, optimizer])
    copied, optimizer = both[::-1] if first else both
    parameters = optimizer.param_groups[0]["params"]
    assert all(one is other for one, other in zip(parameters, copied.values(), strict=True))


def test_a_memo_is_heeded_and_filled(kind: Kind) -> None:
    pd, known = filled(kind), Parameter(torch.ones(1))
    memo: dict[int, Any] = {id(pd["n3"]): known}
    copied = copy.deepcopy(pd, memo)
    assert copied["n3"] is known
    assert all(memo[id(pd[name])] is copied[name] for name in pd)
    assert memo[id(pd)] is copied
    assert memo[id(pd._parameters)] is copied._parameters
    assert copy.deepcopy(pd["n5"], memo) is copied["n5"]


def test_parameters_over_the_same_memory_are_copied_apart_and_saved_together(kind: Kind) -> None:
    memory = torch.arange(6.0)
    pd = filled(kind)
    pd.update([("x", Parameter(memory[:4])), ("y", Parameter(memory[2:])), ("z", Parameter(torch.ones(3)))])
    copied, saved = copy.deepcopy(pd), saved_and_loaded(pd)
    with torch.no_grad():
        copied["x"].fill_(-1)
        saved["x"].fill_(-1)
    assert copied["y"].tolist() == [2, 3, 4, 5]
    assert saved["y"].tolist() == [-1, -1, 4, 5]
    assert saved["z"].tolist() == [1, 1, 1]


# -- random mixtures ---------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool, torch.uint8]
TENSORS = st.tuples(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["plain", "transposed", "strided", "expanded", "offset", "large", "sparse", "conjugate"]),
    st.booleans(),
    st.sampled_from(["nothing", "gradient", "attribute"]),
)
ENTRIES = st.lists(
    st.one_of(TENSORS, TENSORS, TENSORS, st.sampled_from(["tie", "none", "value", "module"])), max_size=12
)


def made_of(recipe: Any, before: list[Any]) -> Any:
    if recipe == "tie":
        return next((value for value in before if isinstance(value, Parameter)), 7)
    if isinstance(recipe, str):
        return {"none": None, "value": {"a": [1]}, "module": Counting()}[recipe]
    dtype, shape, layout, trainable, extra = recipe
    values = torch.arange(float(np.prod(shape, dtype=int))).reshape(shape).to(dtype)
    if layout == "transposed":
        values = values.permute(tuple(reversed(range(values.ndim))))
    elif layout == "strided":
        values = torch.stack([values, values], -1)[..., 0]
    elif layout == "expanded":
        values = values.unsqueeze(0).expand(2, *shape)
    elif layout == "offset":
        values = torch.cat([values.flatten(), values.flatten()])[values.numel() :].reshape(shape)
    elif layout == "large":
        values = values.sum().expand(20_000).clone()
    elif layout == "sparse":
        values = values.to_sparse()
    elif layout == "conjugate":
        values = values.conj()
    can_train = dtype.is_floating_point or dtype.is_complex
    parameter = Parameter(values, requires_grad=trainable and can_train)
    if extra == "gradient" and parameter.requires_grad:
        parameter.grad = torch.zeros_like(parameter)
    if extra == "attribute":
        parameter.note = "noted"
    return parameter


@pytest.mark.parametrize("name", ["deepcopy", "pickle 2", "pickle 4", "torch.save"])
@settings(deadline=None, max_examples=60)
@given(recipes=ENTRIES)
def test_a_copy_of_any_mixture_is_that_of_torchs_class(name: str, recipes: list[Any]) -> None:
    values: list[Any] = []
    for recipe in recipes:
        values.append(made_of(recipe, values))
    results = []
    for kind in KINDS:
        pd = kind([(f"k{at}", value) for at, value in enumerate(values)])
        try:
            results.append(described(WAYS[name](pd)))
        except (RuntimeError, NotImplementedError) as error:
            results.append([str(error)])
    assert results[0] == results[1]


# -- as one block ------------------------------------------------------------------------------------------------------


def test_a_deep_copy_lies_in_one_block_a_dtype() -> None:
    pd = pdrs.ParameterDict([(f"n{n}", torch.full((16 * (n % 3 + 1),), float(n))) for n in range(20)])
    pd["double"] = Parameter(torch.ones(8, dtype=torch.float64))
    assert blocks(list(copy.deepcopy(pd).values())) == 2


def test_a_file_has_one_storage_a_dtype_and_those_of_large_tensors(tmp_path: Path) -> None:
    pd = filled(pdrs.ParameterDict, 100)
    pd["double"] = Parameter(torch.ones(3, dtype=torch.float64))
    pd["large"] = Parameter(torch.ones(100_000))
    torch.save(pd, tmp_path / "pd.pt")
    names = zipfile.ZipFile(tmp_path / "pd.pt").namelist()
    assert len([name for name in names if "/data/" in name]) == 3
    assert described(torch.load(tmp_path / "pd.pt", weights_only=False)) == described(pd)


def test_a_copied_entry_is_saved_without_the_others(way: Callable[[Any], Any]) -> None:
    pd = pdrs.ParameterDict([(f"n{n}", torch.ones(16)) for n in range(1000)])
    assert len(pickle.dumps(way(pd)["n5"])) < 2000


def test_a_deep_copy_goes_when_it_is_dropped() -> None:
    copied = copy.deepcopy(filled(pdrs.ParameterDict))
    gone = weakref.ref(copied["n2"])
    gc.disable()
    try:
        del copied
        assert gone() is None, "nothing of it waits for the collector"
    finally:
        gc.enable()


def test_a_file_is_mapped(kind: Kind, tmp_path: Path) -> None:
    torch.save(filled(kind), tmp_path / "pd.pt")
    loaded = torch.load(tmp_path / "pd.pt", weights_only=False, mmap=True)
    assert described(loaded) == described(filled(kind))
    with torch.no_grad():
        loaded["n4"].add_(1)
    assert torch.load(tmp_path / "pd.pt", weights_only=False)["n4"].tolist() == [4, 4]


def test_a_file_is_loaded_to_another_device(kind: Kind) -> None:
    loaded = saved_and_loaded(filled(kind), map_location="meta")
    assert {value.device.type for value in loaded.values()} == {"meta"}
    assert [(value.shape, value.requires_grad) for value in loaded.values()] == [
        (value.shape, value.requires_grad) for value in filled(kind).values()
    ]
    assert described(saved_and_loaded(filled(kind), map_location="cpu")) == described(filled(kind))


def test_a_copy_made_in_inference_mode_is_as_torchs(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    with torch.inference_mode():
        copied = way(pd)
    assert all(value.is_inference() for value in copied.values())
    with torch.inference_mode():
        born_there = filled(kind)
    assert [value.tolist() for value in way(born_there).values()] == [value.tolist() for value in pd.values()]
    assert not any(value.is_inference() for value in way(born_there).values())


def test_somebody_who_listens_hears_every_copy(kind: Kind) -> None:
    class Listening(TorchDispatchMode):
        heard = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    with Listening() as mode:
        copy.deepcopy(filled(kind))
    assert mode.heard == 20


def test_a_default_device_has_no_part_in_it(kind: Kind, way: Callable[[Any], Any]) -> None:
    pd = filled(kind)
    with torch.device("meta"):
        copied = way(pd)
    assert described(copied) == described(pd)


# -- pickles of other kinds --------------------------------------------------------------------------------------------


def test_a_pickle_written_entry_by_entry_is_read() -> None:
    pd = filled(pdrs.ParameterDict)
    assert any(name.endswith(" unpack") for name in globals_in(pd))
    with BaseTorchFunctionMode():  # which is to see every tensor
        written = pickle.dumps(pd, 2)
        assert not any(name.endswith(" unpack") for name in globals_in(pd))
    assert described(pickle.loads(written)) == described(pd)


def test_processes_share_the_memory_of_parameters(kind: Kind) -> None:
    pd = filled(kind, 3)
    received = ForkingPickler.loads(ForkingPickler.dumps(pd))
    assert described(received) == described(pd)
    with torch.no_grad():
        received["n1"].fill_(9)
    assert pd["n1"].tolist() == [9, 9]


def test_the_python_pickler_writes_what_the_native_one_reads(kind: Kind) -> None:
    file = io.BytesIO()
    pickle._Pickler(file).dump(filled(kind, 2500))
    assert described(pickle.loads(file.getvalue())) == described(filled(kind, 2500))
    assert described(pickle._loads(pickle.dumps(filled(kind)))) == described(filled(kind))


def test_a_pickler_with_its_own_way_for_parameters_uses_it(kind: Kind) -> None:
    class Zeroing(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is Parameter:
                return Parameter, (torch.zeros_like(value),)
            return NotImplemented

    file = io.BytesIO()
    Zeroing(file).dump(filled(kind))
    assert {value.sum().item() for value in pickle.loads(file.getvalue()).values()} == {0}


def test_parameters_elsewhere_are_pickled_as_before() -> None:
    before = dict(copyreg.dispatch_table)
    pd = filled(pdrs.ParameterDict)
    alone = pickle.dumps(pd["n4"])
    pickle.dumps([pd, Parameter(torch.ones(2))])
    assert copyreg.dispatch_table == before
    assert pickle.dumps(pd["n4"]) == alone


def test_a_pickle_that_fails_leaves_nothing_behind(kind: Kind) -> None:
    before = dict(copyreg.dispatch_table)
    pd = filled(kind)
    pd["n7"].note = lambda: None
    for dump in (pickle.dumps, pickle._dumps):
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            dump(pd)
    gc.collect()
    assert copyreg.dispatch_table == before
    del pd["n7"].note
    with torch.no_grad():
        pd["n3"].fill_(8)
    assert pickle.loads(pickle.dumps(pd["n3"])).item() == 8
    assert described(pickle.loads(pickle.dumps(pd))) == described(pd)


def test_threads_pickle_at_once() -> None:
    dicts = [pdrs.ParameterDict([(f"n{n}", torch.full((2,), float(which))) for n in range(500)]) for which in range(4)]
    results: dict[int, bytes] = {}

    def work(which: int) -> None:
        for _ in range(5):
            results[which] = pickle.dumps(dicts[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, pd in enumerate(dicts):
        assert described(pickle.loads(results[which])) == described(pd)
    assert Parameter not in copyreg.dispatch_table


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_a_deep_copy_without_memory_changes_nothing(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("none left")

    pd = filled(pdrs.ParameterDict)
    before = described(pd)
    monkeypatch.setattr(torch, "empty", no_memory)
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(MemoryError, match="none left"):
            copy.deepcopy(pd)
        with pytest.raises(MemoryError, match="none left"):
            pickle.dumps(pd)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    monkeypatch.undo()
    assert described(pd) == before
    assert Parameter not in copyreg.dispatch_table
    assert described(copy.deepcopy(pd)) == before


def test_an_entry_that_refuses_to_be_copied_stops_the_copy(kind: Kind) -> None:
    class Refusing(Parameter):
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("not this one")

    pd = filled(kind)
    pd["refusing"] = Refusing(torch.ones(1))
    with pytest.raises(ValueError, match="not this one"):
        copy.deepcopy(pd)
    assert gc.isenabled()
    assert len(pd) == 21


def globals_in(module: Any) -> Iterator[str]:
    """Yield what a pickle calls, as ``module name``."""
    operations = pickletools.genops(pickle.dumps(module, 2))
    return (str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL")


def what_makes_blocks() -> Callable[..., list[Parameter]]:
    """Return the function that pickles call to make many Parameters over one tensor."""
    (name,) = {name for name in globals_in(filled(pdrs.ParameterDict)) if name.endswith(" unpack")}
    module, attribute = name.split(" ")
    made: Callable[..., list[Parameter]] = getattr(importlib.import_module(module), attribute)
    return made


def numbers(*values: int, dtype: str = "<i8") -> bytes:
    return np.array(values, dtype).tobytes()


VALUES = torch.arange(10.0)
GOOD: dict[str, Any] = {
    "values": VALUES,
    "offsets": numbers(0, 4),
    "shape_numbers": numbers(0, 1, dtype="<u4"),
    "shapes": [(2, 2), (6,)],
    "trainable": b"\1\0",
}
BAD: dict[str, dict[str, Any]] = {
    "an offset behind the end": {"offsets": numbers(0, 5)},
    "a negative offset": {"offsets": numbers(-1, 4)},
    "the largest offset": {"offsets": numbers(2**63 - 1, 4)},
    "the smallest offset": {"offsets": numbers(-(2**63), 4)},
    "a number of no shape": {"shape_numbers": numbers(0, 2, dtype="<u4")},
    "the largest number": {"shape_numbers": numbers(0, 2**32 - 1, dtype="<u4")},
    "a shape that is too large": {"shapes": [(2, 2), (11,)]},
    "a shape that overflows": {"shapes": [(2, 2), (2**32, 2**32)]},
    "a shape of huge sizes and no elements": {"shapes": [(2, 2), (2**62, 2**62, 0)]},
    "a negative size": {"shapes": [(2, 2), (-1,)]},
    "two negative sizes": {"shapes": [(2, 2), (-2, -3)]},
    "a size beyond 64 bits": {"shapes": [(2, 2), (2**70,)]},
    "a size that is no int": {"shapes": [(2, 2), (6.0,)]},
    "a shape that is no tuple": {"shapes": [(2, 2), 6]},
    "no shapes": {"shapes": []},
    "shapes that are no list": {"shapes": "66"},
    "offsets that are cut": {"offsets": numbers(0, 4)[:-1]},
    "numbers that are cut": {"shape_numbers": numbers(0, dtype="<u4")},
    "flags that are too many": {"trainable": b"\1\0\0"},
    "offsets that are no bytes": {"offsets": [0, 4]},
    "values that are no tensor": {"values": [0.0] * 10},
    "values of two dimensions": {"values": torch.zeros(2, 5)},
    "values with gaps": {"values": torch.zeros(20)[::2]},
    "sparse values": {"values": torch.zeros(10).to_sparse()},
    "integers that require gradients": {"values": torch.arange(10)},
}


def test_a_block_is_unpacked() -> None:
    unpack = what_makes_blocks()
    one, other = unpack(**GOOD)
    assert one.tolist() == [[0, 1], [2, 3]]
    assert other.tolist() == [4, 5, 6, 7, 8, 9]
    assert (one.requires_grad, other.requires_grad) == (True, False)
    assert unpack(torch.empty(0), b"", b"", [], b"") == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bad", BAD)
def test_a_pickle_cannot_reach_beyond_its_block(bad: str, device: str) -> None:
    arguments = {**GOOD, **BAD[bad]}
    if device == "meta":
        if not isinstance(arguments["values"], Tensor) or arguments["values"].is_sparse:
            return
        arguments["values"] = arguments["values"].to("meta")
        if bad == "values with gaps":
            arguments["values"] = torch.zeros(20, device="meta")[::2]

    unpack = what_makes_blocks()

    class Hostile:
        def __reduce__(self) -> Any:
            return unpack, tuple(arguments.values())

    written = pickle.dumps(Hostile()) if device == "cpu" and bad != "values with gaps" else None
    with pytest.raises(pickle.UnpicklingError):
        unpack(**arguments)
    if written:
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(written)


# -- copy.copy ---------------------------------------------------------------------------------------------------------


def test_a_shallow_copy_shares_everything(kind: Kind) -> None:
    pd = filled(kind)
    pd["child"] = nn.Linear(1, 1)
    copied = copy.copy(pd)
    assert type(copied) is kind
    assert copied is not pd
    assert copied._parameters is pd._parameters
    assert all(copied[name] is pd[name] for name in pd)
    pd["new"] = torch.ones(1)
    assert list(copied) == list(pd)
    assert vars(copied).keys() == vars(pd).keys()
