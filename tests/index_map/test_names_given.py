"""Names that are given in something else than a list: arrays, columns of other libraries, views, generators; and masks.

The bugs that this hunts: a column that is iterated over one by one, which takes a hundred times as long, or whose
elements are no ``str``; missing values that become names; an object that gives itself for its list, and so never ends;
a method that takes what another refuses.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from torch import nn

import pdrs
from pdrs import IndexMap

SD = pdrs.StackedParameterDict
NAMES = ["one", "zwei", "три", "四", "🎲", "a.b"]


class Refusing:
    """Stands for a column whose elements must not be asked for one by one."""

    def __init__(self, names: list[Any]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("iterated over one by one")

    def __getitem__(self, at: int) -> Any:
        raise AssertionError("asked for one by one")


class Series(Refusing):
    """As those of pandas and Polars: ``tolist`` may be slow, and ``__array__`` without a dtype may cut names off."""

    dtype = "str"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        assert np.dtype(dtype).kind == "O"
        return np.array(self._names, dtype=dtype)

    def tolist(self) -> list[Any]:
        raise AssertionError("asked for the slower way")

    to_list = to_pylist = to_numpy = tolist


class PyList(Refusing):
    """As an Arrow array in a library that knows no NumPy."""

    def to_pylist(self) -> list[Any]:
        return list(self._names)


class ToList(Refusing):
    def to_list(self) -> list[Any]:
        return list(self._names)


class Sub(list):
    """What it answers is not what lies in it."""

    def __iter__(self) -> Iterator[Any]:
        return iter(NAMES)


class StringLike(str, enum.Enum):
    ONE = "one"
    TWO = "zwei"


HOLDERS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": dict.fromkeys,
    "keys of a dict": lambda names: dict.fromkeys(names).keys(),
    "values of a dict": lambda names: dict(enumerate(names)).values(),
    "keys of an index": lambda names: IndexMap.from_names(names).keys(),
    "index": IndexMap.from_names,
    "deque": deque,
    "generator": lambda names: (name for name in names),
    "map": lambda names: map(str, names),
    "array of str": np.array,
    "array of objects": lambda names: np.array(names, dtype=object),
    "array of StringDType": lambda names: np.array(names, dtype=np.dtypes.StringDType()),
    "strided array": lambda names: np.array([names, names]).T[:, 1],
    "list of numpy.str_": lambda names: list(np.array(names)),
    "series": Series,
    "column with to_pylist": PyList,
    "column with to_list": ToList,
    "subclass of list": lambda names: Sub(["other"]),
}


@pytest.fixture(params=HOLDERS)
def holder(request: pytest.FixtureRequest) -> Callable[[list[str]], Any]:
    return HOLDERS[request.param]


def test_every_method_takes_names_from_whatever_holds_them(holder: Callable[[list[str]], Any]) -> None:
    def names() -> Any:
        return holder(NAMES)

    index = IndexMap.from_names(names())
    assert list(index.items()) == list(zip(NAMES, range(6), strict=True))
    assert [type(name) for name in index] == [str] * 6
    assert index.indices(names()).tolist() == index.extend(names()).tolist() == list(range(6))
    assert IndexMap().indices(names(), missing=3).tolist() == [3] * 6
    assert IndexMap.from_names(names(), np.arange(6)) == index
    assert list(IndexMap.fromkeys(names(), 2).values()) == [2] * 6

    rows = torch.arange(12.0).view(6, 2)
    sd = SD.from_tensor(names(), rows.clone())
    assert list(sd) == NAMES
    assert torch.equal(sd.gather(names()), rows)
    assert sd.indices(names()).tolist() == list(range(6))
    assert sd.isin(names()).tolist() == [True] * 6
    assert torch.equal(sd.gather(sd.lookup(names())), rows)
    sd.scatter(names(), rows + 1)
    assert torch.equal(sd.gather(NAMES), rows + 1)
    sd.freeze(names())
    sd.unfreeze(names())
    assert list(SD.fromkeys(names(), torch.zeros(2))) == NAMES
    assert list(pdrs.ParameterDict().fromkeys(names(), torch.zeros(2))) == NAMES
    sd.drop(names())
    assert list(sd) == []
    sd.gather(names(), missing="insert")
    assert list(sd) == NAMES


def test_a_checkpoint_gives_those_names_that_a_column_holds(tmp_path: Any) -> None:
    sd = SD.from_tensor(NAMES, torch.arange(12.0).view(6, 2))
    pdrs.save(sd, tmp_path / "sd.safetensors")
    for make in (Series, PyList, np.array):
        opened = pdrs.open(tmp_path / "sd.safetensors", names=make(NAMES[2:4]))
        assert list(opened) == NAMES[2:4]


CALLS: dict[str, Callable[[Any], Any]] = {
    "lookup": lambda names: IndexMap({"a": 0}).indices(names),
    "lookup with a default": lambda names: IndexMap({"a": 0}).indices(names, missing=1),
    "extend": lambda names: IndexMap({"a": 0}).extend(names),
    "from_names": IndexMap.from_names,
    "fromkeys": IndexMap.fromkeys,
    "gather": lambda names: SD({"a": torch.zeros(2)}).gather(names),
    "gather and insert": lambda names: SD({"a": torch.zeros(2)}).gather(names, missing="insert"),
    "contains": lambda names: SD({"a": torch.zeros(2)}).isin(names),
    "sd.lookup": lambda names: SD({"a": torch.zeros(2)}).lookup(names),
    "drop": lambda names: SD({"a": torch.zeros(2)}).drop(names),
    "freeze": lambda names: SD({"a": torch.zeros(2)}).freeze(names),
    "from_tensor": lambda names: SD.from_tensor(names, torch.zeros(2, 2)),
    "fromkeys of tables": lambda names: SD.fromkeys(names, torch.zeros(2)),
    "scatter_": lambda names: SD({"a": torch.zeros(2)}).scatter(names, torch.zeros(2, 2)),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return CALLS[request.param]


class NAType:
    """As of pandas: nobody can tell whether it equals anything."""

    def __eq__(self, other: object) -> Any:
        return self

    __ne__ = __eq__
    __hash__ = None

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize("missing", [None, float("nan"), NAType()], ids=["None", "nan", "NA"])
@pytest.mark.parametrize("make", [list, tuple, iter, Series, PyList, lambda names: np.array(names, dtype=object)])
def test_a_missing_value_is_refused_and_said_where(call: Callable[[Any], Any], make: Any, missing: Any) -> None:
    with pytest.raises(TypeError, match=rf"^names must be str, got {type(missing).__name__} at position 1, a missing"):
        call(make(["a", missing, "b"]))


class GivesItself:
    def tolist(self) -> GivesItself:
        return self


class GivesItselfAsAnArray:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self


NO_NAMES: dict[str, tuple[Any, str]] = {
    "a str": ("ab", "got a single str"),
    "bytes": (b"ab", "got int at position 0$"),
    "a number": (3, "an iterable of str, got int$"),
    "None": (None, "an iterable of str, got NoneType$"),
    "gives itself": (GivesItself(), r"GivesItself, whose tolist\(\) returned GivesItself instead of a list"),
    "a mock": (Mock(), "an iterable of str, got Mock$"),
    "an array of itself": (GivesItselfAsAnArray(), "array"),
    "numbers": (np.arange(3), "got int at position 0$"),
    "a range without end": (range(1 << 60), "got int at position 0$"),
    "a count without end": (itertools.count(), "got int at position 0$"),
    "no dimension": (np.array("ab"), "ndarray with 0 dimensions"),
    "two dimensions": (np.array([["ab"]]), "ndarray with 2 dimensions"),
    "a masked array": (np.ma.masked_array(["a", "b"], mask=[False, True]), "position 1, a missing value"),
    "bytes in an array": (np.array([b"a"]), "got bytes at position 0$"),
    "a type": (list, "an iterable of str, got type$"),
}


@pytest.mark.parametrize("what", NO_NAMES)
def test_what_holds_no_names_is_refused_by_every_method(call: Callable[[Any], Any], what: str) -> None:
    given, message = NO_NAMES[what]
    with pytest.raises((TypeError, ValueError), match=message):
        call(given)


def test_tensors_hold_no_names_and_a_magic_mock_holds_none() -> None:
    for given in (torch.arange(2), torch.ones(2, requires_grad=True)):
        with pytest.raises(TypeError, match="an iterable of str, got a Tensor"):
            IndexMap().indices(given)
    assert IndexMap().indices(MagicMock()).tolist() == []
    # Its entries are attributes, and some of them could be taken for methods.
    pd = pdrs.ParameterDict([("tolist", torch.ones(1)), ("to_list", torch.ones(1))])
    assert IndexMap.from_names(pd) == {"tolist": 0, "to_list": 1}
    assert list(IndexMap.from_names(StringLike)) == ["one", "zwei"]


def test_names_that_are_refused_leave_everything_as_it_was() -> None:
    index = IndexMap({"a": 5})
    with pytest.raises(TypeError):
        index.extend(Series(["b", None]))
    assert list(index.items()) == [("a", 5)]
    assert index.extend(["b"]).tolist() == [6]


def test_a_list_that_is_given_is_not_changed_and_not_kept() -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
    names = [np.str_("a"), StringLike.ONE]
    sd.gather(names, missing="zero")
    handle = sd.lookup(kept := ["a"])
    kept.append("other")
    assert [type(name) for name in names] == [np.str_, StringLike]
    assert handle.names == ("a",)


# -- masks -------------------------------------------------------------------------------------------------------------


class BooleanSeries(Refusing):
    """As of pandas, where values could be missing."""

    dtype = "boolean"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._names, dtype=object)


MASKS = [
    torch.tensor,
    np.array,
    list,
    tuple,
    BooleanSeries,
    lambda mask: np.array(mask, dtype=object),
    lambda mask: torch.tensor([mask, mask]).t()[:, 0],
]


@pytest.mark.parametrize("make", MASKS)
def test_names_are_selected_and_dropped_by_a_mask(make: Any) -> None:
    sd = SD({"a": torch.zeros(2), "b": torch.ones(3), "gone": torch.zeros(2), "c": torch.full((2,), 5.0)})
    del sd["gone"]
    mask = make([True, False, True])
    assert sd.select(mask) == IndexMap.from_names(["a", "b", "c"]).select(mask) == ["a", "c"]
    if not (isinstance(mask, np.ndarray) and mask.dtype == object):
        sd.drop(mask)
        assert list(sd) == ["b"]
        sd.drop(make([False]))
        assert list(sd) == ["b"]


def test_the_smallest_are_pruned_by_their_norms() -> None:
    sd = SD.from_tensor([f"n{n}" for n in range(100)], torch.arange(200.0).view(100, 2))
    sd.drop(sd.norms() < 100)
    assert list(sd) == [f"n{n}" for n in range(36, 100)]
    assert sd["n36"].tolist() == [72, 73]
    assert SD().select(torch.zeros(0, dtype=torch.bool)) == []
    SD().drop(SD().norms() < 1)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.tensor([True]), ValueError, r"a bool for each of 2 names, got shape \[1\]"),
        (np.array([[True], [False]]), ValueError, r"got shape \[2, 1\]"),
        (torch.tensor([1, 0]), TypeError, "a mask of bool, got Tensor of int64"),
        (torch.tensor([0.5, 0.1]), TypeError, "a mask of bool, got Tensor of float32"),
        (BooleanSeries([True, None]), TypeError, "a mask of bool, got BooleanSeries of object"),
        ([True, "a"], TypeError, "a mask of bool, got list of"),
        (np.ma.masked_array([True, True, False], mask=[False, True, False]), TypeError, "a mask of bool, got"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_nothing_is_dropped(mask: Any, error: Any, message: str) -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
    for call in (sd.drop, sd.select, IndexMap.from_names(["a", "b"]).select):
        with pytest.raises(error, match=message):
            call(mask)
    assert list(sd) == ["a", "b"]


def test_names_of_torchs_class_are_still_characters_of_a_str() -> None:
    for kind in (nn.ParameterDict, pdrs.ParameterDict):
        assert list(kind().fromkeys("ab", torch.zeros(1))) == ["a", "b"]
