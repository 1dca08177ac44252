"""IndexMap where a dict is expected: as a MutableMapping, as a base class, and made of what a dict is made of.

The bugs that this hunts: a method that ``isinstance(index, MutableMapping)`` promises and that is not there; entries
that a dict takes and the index refuses; a subclass that is skipped, or whose constructor, ``__missing__`` or attributes
are lost. Modelled on the tests that CPython has for mappings.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, UserDict
from collections.abc import MutableMapping
from typing import Any

import pytest

from pdrs import IndexMap


class Sub(IndexMap):
    pass


KINDS = [dict, IndexMap, Sub]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """Give the class under test: dict, and ours, which must do the same."""
    return request.param


class OnlyKeys:
    """Has what ``dict.update`` asks for, and no more; it writes down what it is asked for."""

    def __init__(self, **rows: int) -> None:
        self.rows, self.calls = rows, []

    def keys(self) -> Any:
        self.calls.append("keys")
        return self.rows.keys()

    def items(self) -> Any:
        self.calls.append("items")
        return ()

    def __getitem__(self, name: str) -> int:
        return self.rows[name]


def test_it_has_every_method_of_a_mutable_mapping_and_of_a_dict() -> None:
    assert isinstance(IndexMap(), MutableMapping)
    promised = {name for name in dir(MutableMapping) if not name.startswith("_")} | set(dir(dict))
    assert sorted(promised - set(dir(IndexMap)) - {"__class_getitem__"}) == []


SOURCES: dict[str, Any] = {
    "dict": {"b": 1, "a": 2},
    "OrderedDict": OrderedDict(b=1, a=2),
    "UserDict": UserDict(b=1, a=2),
    "IndexMap": IndexMap({"b": 1, "a": 2}),
    "subclass": Sub({"b": 1, "a": 2}),
    "keys and getitem": OnlyKeys(b=1, a=2),
    "tuples": [("b", 1), ("a", 2)],
    "lists": [["b", 1], ["a", 2]],
    "nothing": None,
}


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_made_and_updated_of_what_a_dict_is_made_of(source: str) -> None:
    expected = [] if source == "nothing" else [("b", 1), ("a", 2)]
    arguments = () if source == "nothing" else (SOURCES[source],)
    for made in (IndexMap(*arguments), Sub(*arguments)):
        assert list(made.items()) == expected
    index = IndexMap(a=7, z=0)
    index.update(*arguments, c=3)
    assert dict(index) == {"a": 7, "z": 0} | dict(expected) | {"c": 3}
    assert dict(IndexMap(*arguments, entries=5)) == {**dict(expected), "entries": 5}


def test_keys_are_asked_for_as_a_dict_asks(kind: Any) -> None:
    source = OnlyKeys()
    assert len(kind(source)) == 0
    assert source.calls == ["keys"]


class Failing:
    """Fails at some point when it is asked for its entries."""

    def __init__(self, where: str) -> None:
        self.where = where

    def keys(self) -> Any:
        if self.where == "keys":
            raise ZeroDivisionError
        return self if self.where in ("iter", "next") else iter("xyz")

    def __iter__(self) -> Any:
        if self.where == "iter":
            raise ZeroDivisionError
        return self

    def __next__(self) -> str:
        raise ZeroDivisionError

    def __getitem__(self, name: str) -> int:
        if name == "z":
            raise ZeroDivisionError
        return 1


@pytest.mark.parametrize("where", ["keys", "iter", "next", "getitem"])
def test_what_fails_half_way_changes_nothing(where: str) -> None:
    index = IndexMap(a=1)
    for call in (index.update, lambda it: index.__ior__(it), IndexMap):
        with pytest.raises(ZeroDivisionError):
            call(Failing(where))
    assert list(index.items()) == [("a", 1)]


@pytest.mark.parametrize("bad", [[("a", 1), ("b",)], [("a", 1), ("b", 2, 3)], [["a", 1], "b"]], ids=repr)
def test_a_pair_that_is_none_is_named_by_its_place(bad: Any) -> None:
    for make in (dict, IndexMap):
        with pytest.raises(ValueError, match=r"update sequence element #1 has length [13]; 2 is required"):
            make(bad)


def test_a_row_whose_number_changes_the_source_is_no_trap() -> None:
    class Row:
        def __index__(self) -> int:
            source.clear()
            return 3

    source: dict[str, Any] = {"a": Row(), "b": 1, "c": Row()}
    assert list(IndexMap(source).items()) == [("a", 3), ("b", 1), ("c", 3)]


def test_setdefault_sets_what_is_not_there(kind: Any) -> None:
    mapping = kind({"a": 1})
    assert mapping.setdefault("a", 5) == 1
    assert mapping.setdefault("a") == 1
    assert mapping.setdefault("b", 2) == 2
    assert list(mapping.items()) == [("a", 1), ("b", 2)]


def test_setdefault_refuses_what_is_no_row_and_counts_what_is() -> None:
    index = IndexMap()
    for bad in ((), (None,), (-1,), ("x",)):
        with pytest.raises((TypeError, ValueError)):
            index.setdefault("a", *bad)
    assert list(index) == []
    index.setdefault("a", 7)
    assert index.extend(["b"]).tolist() == [8]


def test_it_is_united_as_a_dict_is(kind: Any) -> None:
    one, other = kind({"a": 1, "b": 2}), {"b": 3, "c": 4}
    assert list((one | other).items()) == [("a", 1), ("b", 3), ("c", 4)]
    assert list((other | one).items()) == [("b", 2), ("c", 4), ("a", 1)]
    assert list(one.items()) == [("a", 1), ("b", 2)]
    before = one
    one |= [("c", 5)]
    assert one is before
    assert list(one.items()) == [("a", 1), ("b", 2), ("c", 5)]
    for call in (lambda: one | 5, lambda: 5 | one, lambda: one | [("a", 1)]):
        with pytest.raises(TypeError):
            call()


def test_fromkeys_makes_the_class_that_is_asked(kind: Any) -> None:
    made = kind.fromkeys(["a", "b", "a"], 3)
    assert type(made) is kind
    assert list(made.items()) == [("a", 3), ("b", 3)]


# -- as a base class ---------------------------------------------------------------------------------------------------


class Counted(IndexMap):
    def __init__(self, label: str, entries: Any = ()) -> None:
        super().__init__(entries)
        self.label = label

    def __missing__(self, name: str) -> int:
        return len(name)


def test_a_subclass_has_its_own_constructor_attributes_and_missing() -> None:
    counted = Counted("x", [("a", 9)])
    assert (counted.label, counted["a"], counted["four"], counted.get("four")) == ("x", 9, 4, None)
    assert "four" not in counted
    assert repr(counted) == "Counted({'a': 9})"
    assert counted == IndexMap(a=9) == {"a": 9}
    assert weakref.ref(counted)() is counted
    assert counted.indices(["a"]).tolist() == [9]
    with pytest.raises(TypeError, match="names must be str"):
        counted[3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sub.from_names(["a", "b"]),
        lambda: Sub.from_names(["a", "b", "a"]),
        lambda: Sub(a=0, b=1).copy(),
        lambda: Sub(a=0) | {"b": 1},
        lambda: {"a": 0} | Sub(b=1),
    ],
)
def test_what_a_subclass_makes_is_of_the_subclass(make: Any) -> None:
    made = make()
    assert type(made) is Sub
    assert list(made.items()) == [("a", 0), ("b", 1)]
    assert made.extend(["c"]).tolist() == [2]


def test_what_a_subclass_overrides_is_asked_when_it_is_taken_for_a_mapping() -> None:
    class Doubled(IndexMap):
        def __getitem__(self, name: str) -> int:
            return 2 * super().__getitem__(name)

    assert dict(IndexMap(Doubled(a=1, b=2))) == {"a": 2, "b": 4}


def test_a_subclass_is_collected_with_what_refers_to_it() -> None:
    sub = Sub(a=1)
    sub.me = sub
    alive = weakref.ref(sub)
    del sub
    gc.collect()
    assert alive() is None
