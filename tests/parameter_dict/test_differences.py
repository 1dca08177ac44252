"""Every deliberate difference from ``torch.nn.ParameterDict``: a test for each row of the table in docs/semantics.md.

The bugs that this hunts: a difference that nobody decided, a decided one that torch has meanwhile taken away. So each
test shows both sides: what torch's class does, and what ours does.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
import resource
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

SEMANTICS = Path(__file__).parents[2] / "docs" / "semantics.md"

# Names that torch's class cannot have: with dots, and of attributes of a Module.
NOT_FOR_TORCH = [
    "a.b",
    ".",
    "layer.0.weight",
    "type",
    "to",
    "keys",
    "items",
    "training",
    "_parameters",
    "_keys",
    "forward",
]


class Side(str, Enum):
    LEFT = "left"


def ones() -> Parameter:
    """Make a Parameter to be told from zeros."""
    return Parameter(torch.ones(2))


def torch_can(key: str) -> bool:
    """Tell whether torch's class takes this key of a Parameter, and keeps the module's attribute of that name."""
    pd = nn.ParameterDict()
    before = getattr(pd, key, None)
    try:
        pd[key] = torch.zeros(2)
    except (KeyError, AttributeError):
        return False
    return getattr(pd, key, None) is before


def through_torch_save(pd: pdrs.ParameterDict) -> pdrs.ParameterDict:
    """Save and load a whole module."""
    file = io.BytesIO()
    torch.save(pd, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_the_table_has_a_row_for_each_test_and_a_test_for_each_row() -> None:
    table = SEMANTICS.read_text(encoding="utf-8").partition("## Differences")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!-|\s*\|)", table, re.MULTILINE)
    tests = [name for name in globals() if name.startswith("test_difference_")]
    assert len(rows) == len(tests), (
        "docs/semantics.md and tests/parameter_dict/test_differences.py must list the same differences"
    )


@pytest.mark.parametrize("key", NOT_FOR_TORCH)
def test_difference_any_str_is_a_key_of_a_parameter(key: str) -> None:
    assert not torch_can(key)
    value = ones()
    pd = pdrs.ParameterDict([("first", torch.zeros(2)), (key, value), ("last", torch.zeros(2))])
    assert pd[key] is value
    assert list(pd) == ["first", key, "last"]
    assert [name for name, _ in pd.named_parameters()] == ["first", key, "last"]
    assert list(pd.state_dict()) == ["first", key, "last"]
    for other in (copy.deepcopy(pd), pickle.loads(pickle.dumps(pd)), through_torch_save(pd)):
        assert list(other) == ["first", key, "last"]
        assert torch.equal(other[key], value)
    other = pdrs.ParameterDict(pd)
    other[key] = torch.zeros(2)
    other.load_state_dict(pd.state_dict())
    assert other[key].tolist() == [1, 1]
    assert pd.pop(key) is value
    assert key not in pd


def test_difference_the_empty_key_is_always_refused() -> None:
    theirs = nn.ParameterDict()
    theirs[""] = 5
    assert list(theirs) == [""]
    for value in (5, torch.zeros(1), nn.Linear(1, 1)):
        pd = pdrs.ParameterDict()
        with pytest.raises(KeyError, match="empty string"):
            pd[""] = value
        with pytest.raises(KeyError, match="empty string"):
            pd.update([("a", torch.zeros(1)), ("", value)])
        assert list(pd) == list(pd._parameters) == []


@pytest.mark.parametrize("value", [5, torch.zeros(2), nn.Linear(1, 1)], ids=["int", "tensor", "module"])
def test_difference_an_attribute_of_the_module_stays_what_it_is(value: Any) -> None:
    theirs = nn.ParameterDict()
    theirs["half"] = 5
    assert theirs.half == 5, "it hides a method of the module"
    pd = pdrs.ParameterDict()
    pd["training"] = pd["half"] = value
    assert pd.training is True
    assert callable(pd.half)
    assert pd["half"] is pd.get("half")
    pd.eval()
    assert pd.training is False
    assert list(pd) == ["training", "half"]
    if isinstance(value, int):
        assert pd["training"] == 5
    del pd["training"]
    assert pd.training is False


def test_difference_plain_values_lie_beside_the_parameters() -> None:
    theirs, ours = nn.ParameterDict({"a": 5}), pdrs.ParameterDict({"a": 5})
    assert theirs.__dict__["a"] == 5
    assert "a" not in ours.__dict__
    assert ours.a == ours["a"] == 5
    ours.a = 6
    assert ours["a"] == 6
    assert pickle.loads(pickle.dumps(ours))["a"] == copy.deepcopy(ours)["a"] == 6


def test_difference_a_look_up_does_not_read_the_attributes_of_the_module() -> None:
    assert nn.ParameterDict()["training"] is True
    with pytest.raises(KeyError, match="training"):
        pdrs.ParameterDict()["training"]
    pd = pdrs.ParameterDict()
    pd.beside = ones()
    assert pd["beside"] is pd.beside, "what is registered is found"


def test_difference_a_missing_key_is_a_key_error_and_an_attribute_error() -> None:
    with pytest.raises(AttributeError) as theirs:
        nn.ParameterDict()["missing"]
    assert not isinstance(theirs.value, KeyError)
    pd = pdrs.ParameterDict()
    for look_up in (lambda: pd["missing"], lambda: pd.pop("missing")):
        with pytest.raises(KeyError) as ours:
            look_up()
        assert isinstance(ours.value, AttributeError)
        assert ours.value.args == ("missing",)
        assert str(ours.value) == "'missing'"


def test_difference_deleting_by_a_key_that_is_no_str_is_a_type_error() -> None:
    with pytest.raises(KeyError):
        del nn.ParameterDict()[5]
    with pytest.raises(TypeError, match="names must be str, got int"):
        del pdrs.ParameterDict()[5]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", torch.zeros(2, dtype=torch.int64)),
        ("", torch.zeros(2)),
        (5, torch.zeros(2)),
    ],
    ids=["no gradients", "empty key", "no str"],
)
def test_difference_what_is_refused_leaves_no_trace(key: Any, value: torch.Tensor) -> None:
    for kind, left in ((nn.ParameterDict, 1), (pdrs.ParameterDict, 0)):
        pd = kind()
        with pytest.raises((RuntimeError, KeyError, TypeError)):
            pd[key] = value
        assert len(pd) == left
    existing = pdrs.ParameterDict({"a": ones()})
    kept = existing["a"]
    with pytest.raises(RuntimeError):
        existing["a"] = torch.zeros(2, dtype=torch.int64)
    assert existing["a"] is kept


def test_difference_update_inserts_all_or_nothing() -> None:
    refused = [("b", torch.zeros(2)), ("a", torch.zeros(2)), ("c", torch.zeros(2, dtype=torch.bool))]
    for kind, left in ((nn.ParameterDict, ["a", "b", "c"]), (pdrs.ParameterDict, ["a"])):
        pd = kind({"a": ones()})
        kept = pd["a"]
        with pytest.raises(RuntimeError, match="can require gradients"):
            pd.update(refused)
        assert list(pd) == left
        assert (pd["a"] is kept) == (kind is pdrs.ParameterDict)

    held, module = ones(), nn.Linear(1, 1)
    for pairs in (
        [("b", ones()), ("b", 5)],
        [("b", module), ("b", 5)],
        [("new", ones()), ("text", ones()), ("held", "text")],
        [("new", module), ("module", ones()), ("module", "text")],
    ):
        pd = pdrs.ParameterDict([("text", "x"), ("held", held), ("module", module)])
        with pytest.raises(TypeError, match="cannot assign"):
            pd.update(pairs)
        assert list(pd.items()) == [("text", "x"), ("held", held), ("module", module)]

    def broken() -> Any:
        yield "b", torch.zeros(2)
        raise ZeroDivisionError

    pd = pdrs.ParameterDict({"a": ones()})
    with pytest.raises(ZeroDivisionError):
        pd.update(broken())
    assert list(pd) == list(pd._parameters) == ["a"]


def test_difference_a_registration_hook_that_raises_leaves_no_trace() -> None:
    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if name == "c":
            raise ZeroDivisionError

    value, module = ones(), nn.Linear(1, 1)
    with (
        nn.modules.module.register_module_parameter_registration_hook(refuse),
        nn.modules.module.register_module_module_registration_hook(refuse),
    ):
        for kind, left in ((nn.ParameterDict, ["c", "a", "b"]), (pdrs.ParameterDict, ["c"])):
            pd = kind([("c", "text")])
            for pairs in ([("c", value)], [("a", value), ("b", module), ("c", value)], [("c", module)]):
                with pytest.raises(ZeroDivisionError):
                    pd.update(pairs)
            assert list(pd) == left
            assert getattr(pd, "c", None) == ("text" if kind is pdrs.ParameterDict else None)


def test_difference_a_str_of_a_subclass_is_taken_for_its_characters() -> None:
    assert type(next(iter(nn.ParameterDict({Side.LEFT: torch.zeros(1)})))) is Side
    pd = pdrs.ParameterDict([(Side.LEFT, torch.zeros(1))])
    pd[Side.LEFT] = torch.ones(1)
    assert [type(key) for key in pd] == [str]
    assert list(pd) == ["left"]


def test_difference_values_and_items_are_views() -> None:
    theirs, ours = (kind({"a": ones(), "b": ones()}) for kind in (nn.ParameterDict, pdrs.ParameterDict))
    with pytest.raises(TypeError):
        len(theirs.items())
    values, items, keys = ours.values(), ours.items(), ours.keys()
    ours["c"] = ones()
    assert len(values) == len(items) == len(keys) == 3
    assert list(values) == list(values) == [ours[key] for key in "abc"]
    assert [value is ours[key] for key, value in zip("cba", reversed(values), strict=True)] == [True] * 3
    assert [key for key, _ in reversed(items)] == list(reversed(keys)) == ["c", "b", "a"]
    assert "c" in keys
    assert keys & {"a", "z"} == {"a"}


def test_difference_in_compares_by_identity() -> None:
    one = ones()
    theirs, ours = nn.ParameterDict({"a": one}), pdrs.ParameterDict({"a": one})
    with pytest.raises(RuntimeError, match="ambiguous"):
        ones() in theirs.values()  # noqa: B015 - the question is what it raises
    assert one in ours.values()
    assert ones() not in ours.values()
    assert ("a", one) in ours.items()
    assert ("a", ones()) not in ours.items()
    assert ("b", one) not in ours.items()
    assert "a" not in ours.items()


def test_difference_any_insertion_or_removal_ends_a_walk() -> None:
    theirs, ours = (kind({"a": ones(), "b": ones(), "c": ones()}) for kind in (nn.ParameterDict, pdrs.ParameterDict))
    for pd, raises in ((theirs, False), (ours, True)):
        walk = iter(pd.items())
        next(walk)
        del pd["c"]
        pd["d"] = ones()
        if raises:
            with pytest.raises(RuntimeError, match="changed during iteration"):
                next(walk)
        else:
            assert next(walk)[0] == "b"


def test_difference_pop_takes_a_default() -> None:
    with pytest.raises(TypeError):
        nn.ParameterDict().pop("a", None)
    pd = pdrs.ParameterDict({"a": ones()})
    assert pd.pop("b", 5) == 5
    assert pd.pop("b", None) is None
    assert isinstance(pd.pop("a", 5), Parameter)
    assert len(pd) == 0
    with pytest.raises(TypeError, match="at most 2 arguments, got 3"):
        pd.pop("a", 1, 2)


def test_difference_popitem_takes_from_either_end() -> None:
    with pytest.raises(TypeError):
        nn.ParameterDict({"a": ones()}).popitem(last=False)
    pairs = [(name, ones()) for name in "abcd"]
    pd = pdrs.ParameterDict(pairs)
    assert pd.popitem(last=False) == pairs[0]
    assert pd.popitem(last=True) == pairs[3]
    assert pd.popitem(False) == pairs[1]
    assert pd.popitem() == pairs[2]
    for last in (False, True):
        with pytest.raises(KeyError, match=r"popitem\(\): dictionary is empty"):
            pd.popitem(last=last)


def test_difference_repr_of_many_entries_shows_both_ends() -> None:
    pairs = [(f"n{at}", torch.zeros(at % 3)) for at in range(101)]
    theirs, ours = repr(nn.ParameterDict(pairs)).split("\n"), repr(pdrs.ParameterDict(pairs)).split("\n")
    assert len(theirs) == 103
    assert ours == [*theirs[:11], "    ... 81 more ...", *theirs[-11:]]


def test_difference_moved_entries_lie_in_one_block() -> None:
    spans = []
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        pd = kind([(f"n{at}", torch.zeros(16)) for at in range(100)]).double()
        addresses = sorted(value.data_ptr() for value in pd.values())
        spans.append([two - one for one, two in itertools.pairwise(addresses)])
    assert spans[0] != spans[1] == [128] * 99


def test_difference_a_move_that_fails_changes_nothing() -> None:
    for kind, dtype in ((nn.ParameterDict, torch.float64), (pdrs.ParameterDict, torch.float32)):
        pd = kind({"a": ones()})
        pd["z"] = Parameter(torch.zeros(2, device="meta"))
        with pytest.raises(NotImplementedError, match="no data"):
            pd.to("cpu", torch.float64)
        assert pd["a"].dtype == dtype


def test_difference_a_buffer_under_two_names_stays_one() -> None:
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        pd, buffer = kind(), torch.ones(2)
        pd.register_buffer("one", buffer)
        pd.register_buffer("two", buffer)
        pd.double()
        assert (pd.one is pd.two) == (kind is pdrs.ParameterDict)
        assert pd.one.dtype == pd.two.dtype == torch.float64


def test_difference_share_memory_is_refused_as_a_whole() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for kind, is_whole in ((nn.ParameterDict, False), (pdrs.ParameterDict, True)):
        pd = kind([(f"n{at}", torch.zeros(2)) for at in range(200)])
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
        try:
            with pytest.raises(RuntimeError):
                pd.share_memory()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (sum(value.is_shared() for value in pd.values()) == 0) is is_whole


def test_difference_there_is_pin_memory() -> None:
    # What it does is in test_transfer_cuda.py.
    assert not hasattr(nn.ParameterDict(), "pin_memory")
    pd = pdrs.ParameterDict()
    if torch.cuda.is_available():
        assert pd.pin_memory() is pd
    else:
        with pytest.raises(RuntimeError, match="expected a CUDA device"):
            pd.pin_memory()


def test_difference_memory_shared_with_a_tensor_that_is_no_entry_is_not_shared_after_loading() -> None:
    for kind, shared in ((nn.ParameterDict, True), (pdrs.ParameterDict, False)):
        pd = kind({"x": torch.zeros(4), "y": torch.zeros(4)})
        pd.register_buffer("alias", pd["x"].data)
        file = io.BytesIO()
        torch.save(pd, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        loaded.alias.fill_(1)
        assert (loaded["x"].sum() == 4) == shared
        assert loaded["y"].sum() == 0
