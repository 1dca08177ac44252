"""``pdrs.IndexMap`` against an OrderedDict.

The bugs that this hunts: a bulk call that disagrees with the loop it stands for, a key that is found under one guise of
``str`` and not under another, an order lost in a copy or a pickle, a race that loses an entry.
"""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import MutableMapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pdrs
from pdrs import IndexMap


class Weekday(str, Enum):
    MONDAY = "mon"


NAMES = st.text(max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), NAMES, st.integers(0, 2**63 - 2)),
        st.tuples(st.sampled_from(["pop", "pop_default", "move_last", "move_first", "get"]), NAMES),
        st.tuples(st.sampled_from(["popitem_last", "popitem_first", "copy", "pickle"])),
        st.tuples(st.sampled_from(["update", "indices"]), st.lists(NAMES)),
    ),
    max_size=60,
)


def result_of(call: Any, *arguments: Any) -> Any:
    """Return what a call gives, or the error that it raises."""
    try:
        return call(*arguments)
    except KeyError as error:
        return type(error), error.args


def apply(index: IndexMap, model: OrderedDict[str, int], operation: tuple[Any, ...]) -> IndexMap:
    match operation:
        case ("set", name, row):
            index[name] = row
            model[name] = row
        case ("pop", name):
            assert result_of(index.pop, name) == result_of(model.pop, name)
        case ("pop_default", name):
            assert index.pop(name, -1) == model.pop(name, -1)
        case ("move_last" | "move_first" as where, name):
            last = where == "move_last"
            assert result_of(index.move_to_end, name, last) == result_of(model.move_to_end, name, last)
        case ("get", name):
            assert index.get(name) == model.get(name)
            assert index.get(name, "no") == model.get(name, "no")
            assert result_of(index.__getitem__, name) == result_of(model.__getitem__, name)
        case ("popitem_last" | "popitem_first" as where,):
            if model:
                assert index.popitem(last=where == "popitem_last") == model.popitem(last=where == "popitem_last")
            else:
                with pytest.raises(KeyError, match="is empty"):
                    index.popitem()
        case ("copy",):
            index = copy.deepcopy(index) if len(model) % 2 else copy.copy(index)
        case ("pickle",):
            index = pickle.loads(pickle.dumps(index))
        case ("update", names):
            index.update((name, row) for row, name in enumerate(names))
            model.update((name, row) for row, name in enumerate(names))
        case ("indices", names):
            assert index.indices(names, missing=7).tolist() == [model.get(name, 7) for name in names]
    return index


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_any_operations_do_what_an_ordered_dict_does(operations: list[tuple[Any, ...]]) -> None:
    index, model = IndexMap(), OrderedDict[str, int]()
    for operation in operations:
        index = apply(index, model, operation)
        assert len(index) == len(model)
        assert list(index.items()) == list(model.items())
        assert list(index) == list(index.keys()) == list(model)
        assert list(index.values()) == index.indices().tolist() == list(model.values())
        assert list(reversed(index)) == list(reversed(index.keys())) == list(reversed(model))
        assert list(reversed(index.items())) == list(reversed(model.items()))
        assert list(reversed(index.values())) == list(reversed(model.values()))
        assert index == model
        assert all(name in index for name in model)


@given(st.lists(NAMES))
def test_extend_gives_new_names_the_next_rows_and_old_names_their_own(names: list[str]) -> None:
    index = IndexMap({"a": 5})
    rows = index.extend(names)
    expected: dict[str, int] = {"a": 5}
    assert rows.tolist() == [expected.setdefault(name, 5 + len(expected)) for name in names]
    assert list(index.items()) == list(expected.items())


def test_rows_of_popped_names_are_not_given_again() -> None:
    index = IndexMap.from_names(["a", "b", "c"])
    index.popitem()
    assert index.extend(["d", "a"]).tolist() == [3, 0]
    index.clear()
    assert index.extend(["e"]).tolist() == [0]


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, dict.fromkeys], ids=lambda make: make.__name__)
def test_bulk_calls_take_any_iterable_of_names(make: Any) -> None:
    names = ["one", "two", "drei", "четыре", "五", "🎲"]
    assert list(IndexMap.from_names(make(names))) == names
    index = IndexMap.from_names(names)
    rows = index.indices(make(names[::-1]))
    assert rows.dtype == np.int64
    assert rows.tolist() == [5, 4, 3, 2, 1, 0]
    assert torch.from_numpy(rows).tolist() == rows.tolist()


class Text(str):
    """A ``str`` like others, but for its class."""


@pytest.mark.parametrize("make", [list, tuple])
def test_names_of_any_class_are_found_beside_each_other(make: Any) -> None:
    index = IndexMap.from_names(["a", "b", "c", ""])
    assert index.indices(make(["c", Text("b"), "a"])).tolist() == [2, 1, 0]
    assert index.indices(make([Text("x"), "y", Text("b"), "c"]), missing=-7).tolist() == [-7, -7, 1, 2]
    with pytest.raises(KeyError, match="1 of 3 names are not in the IndexMap: 'x'"):
        index.indices(make(["a", Text("b"), Text("x")]))
    with pytest.raises(TypeError, match="names must be str, got int"):
        index.indices(make(["a", "x", 1]), missing=0)
    assert index.indices(make([])).tolist() == []


def test_looking_names_up_leaves_no_reference() -> None:
    names = [f"name {n}" for n in range(200)]
    index = IndexMap.from_names(names)
    asked = ["".join(name) for name in names]
    before = [sys.getrefcount(name) for name in (*names, *asked)]
    for missing in ([], ["other"], [Text("name 1")]):
        index.indices(asked + missing, missing=0)
    assert [sys.getrefcount(name) for name in (*names, *asked)] == before


def test_a_million_names_are_looked_up_in_one_call() -> None:
    names = [f"layer.{n}" for n in range(1_000_000)]
    index = IndexMap.from_names(names)
    order = np.random.default_rng(0).permutation(len(names))
    assert np.array_equal(index.indices([names[n] for n in order]), order)
    assert index.__sizeof__() <= 45 * len(names)


@pytest.mark.parametrize("name", ["", "a.b", "\ud800", "\0", "名", "x" * 10_000], ids=ascii)
def test_any_str_is_a_name(name: str) -> None:
    index = IndexMap({"first": 0, name: 1})
    fresh = "".join(list(name))
    assert index[fresh] == 1
    assert fresh in index
    assert list(pickle.loads(pickle.dumps(index))) == ["first", name]


def test_a_str_of_a_subclass_is_taken_for_its_characters() -> None:
    index = IndexMap({Weekday.MONDAY: 1})
    assert index["mon"] == index[Weekday.MONDAY] == 1
    assert [type(name) for name in index] == [str]


@pytest.mark.parametrize("bad", [1, None, b"a", 1.5, ("a",)], ids=repr)
def test_a_name_that_is_no_str_is_a_type_error_that_says_what_came(bad: Any) -> None:
    index = IndexMap({"a": 0})
    message = f"names must be str, got {type(bad).__name__}"
    calls = (
        lambda: index[bad],
        lambda: index.__setitem__(bad, 1),
        lambda: index.__delitem__(bad),
        lambda: index.pop(bad),
        lambda: index.move_to_end(bad),
        lambda: index.indices(["a", bad]),
        lambda: index.extend(["b", bad]),
        lambda: index.update([("b", 1), (bad, 2)]),
    )
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()
        assert list(index.items()) == [("a", 0)]
    assert bad not in index


def test_what_cannot_be_hashed_cannot_be_asked_for() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        [] in IndexMap()  # noqa: B015 - the question is what it raises


def test_one_str_is_not_taken_for_a_list_of_names() -> None:
    with pytest.raises(TypeError, match="single str"):
        IndexMap.from_names("abc")


@pytest.mark.parametrize("row", [-1, 2**63, 1.5, "1", None], ids=repr)
def test_a_row_that_is_none_is_refused_and_leaves_no_trace(row: Any) -> None:
    index = IndexMap({"a": 0})
    for call in (lambda: index.__setitem__("b", row), lambda: index.update({"b": 1, "c": row})):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            call()
        assert list(index.items()) == [("a", 0)]


def test_the_last_row_can_be_given_and_then_there_is_no_next() -> None:
    index = IndexMap({"a": 2**63 - 1})
    with pytest.raises(OverflowError, match="no 1 rows are left"):
        index.extend(["b"])
    assert list(index) == ["a"]


def test_rows_must_be_as_many_as_names() -> None:
    with pytest.raises(ValueError, match="got 2 names and 3 rows"):
        IndexMap.from_names(["a", "b"], np.arange(3))
    assert IndexMap.from_names(["a", "b"], np.array([7, 3]))["a"] == 7


def test_missing_names_are_counted_and_some_are_listed() -> None:
    index = IndexMap.from_names(["a"])
    with pytest.raises(KeyError) as caught:
        index.indices(["a", *"bcdefgh"])
    assert caught.value.args == ("7 of 8 names are not in the IndexMap: 'b', 'c', 'd', 'e', 'f', ...",)


def test_a_missing_name_is_named_once() -> None:
    for call in (lambda: IndexMap()["x"], lambda: IndexMap().pop("x"), lambda: IndexMap().move_to_end("x")):
        with pytest.raises(KeyError) as caught:
            call()
        assert caught.value.args == ("x",)


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_a_change_during_a_walk_raises_and_a_new_row_does_not(view: str) -> None:
    for change in (lambda index: index.pop("c"), lambda index: index.update({"new": 1}), IndexMap.clear):
        index = IndexMap.from_names(list("abc"))
        walk = iter(getattr(index, view)())
        next(walk)
        change(index)
        with pytest.raises(RuntimeError, match="changed during iteration"):
            next(walk)
    index = IndexMap.from_names(["a", "b"])
    for name in index:
        index[name] = 7
    assert index.indices().tolist() == [7, 7]


def test_an_exhausted_walk_stays_exhausted() -> None:
    index = IndexMap.from_names(["a"])
    walk = iter(index)
    assert list(walk) == ["a"]
    index.extend(["b"])
    assert list(walk) == []


def test_views_are_sets_where_those_of_a_dict_are() -> None:
    index = IndexMap.from_names(["a", "b"])
    assert index.keys() == {"a", "b"}
    assert index.keys() & {"b", "c"} == {"b"}
    assert ("b", 1) in index.items()
    assert 1 in index.values()
    assert len(index.items()) == len(index.values()) == 2
    assert isinstance(index, MutableMapping)


def test_equality_does_not_look_at_the_order_and_other_types_are_not_equal() -> None:
    index = IndexMap({"a": 0, "b": 1})
    assert index == IndexMap({"b": 1, "a": 0}) == {"a": 0, "b": 1}
    assert index != {"a": 0}
    assert index != ["a", "b"]


def test_a_copy_is_another_map() -> None:
    index = IndexMap.from_names(["a", "b"])
    other = index.copy()
    other.popitem()
    assert list(index) == ["a", "b"]
    assert other.extend(["c"]).tolist() == [2]


def test_repr_of_a_long_map_shows_its_ends() -> None:
    assert repr(IndexMap({"a": 1})) == "IndexMap({'a': 1})"
    names = [str(n) for n in range(1000)]
    text = repr(IndexMap.from_names(names))
    assert text.startswith("IndexMap({'0': 0, ")
    assert "... 990 more ..." in text
    assert text.endswith("'999': 999})")


def test_entries_that_are_no_pairs_are_refused() -> None:
    for entries in (["ab", "cd"], [("a",)], [("a", 1, 2)], 5):
        index = IndexMap()
        with pytest.raises((TypeError, ValueError)):
            index.update(entries)
        assert len(index) == 0


def test_threads_lose_no_entry() -> None:
    index = IndexMap()
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for n in range(3000):
            index[f"{worker}.{n}"] = n
            if n % 3 == 0:
                index.pop(f"{worker}.{n}")
            if n % 100 == 0:
                index.extend([f"{worker}.{n}.{m}" for m in range(10)])
                index.indices([f"{worker}.{n}.{m}" for m in range(10)])

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(index) == 4 * (2000 + 300)
    assert all(index[f"{worker}.{n}"] == n for worker in range(4) for n in range(3000) if n % 3)
    assert len(set(index)) == len(index)


def test_the_docstrings_are_those_of_the_stubs() -> None:
    stubs = ast.parse((Path(pdrs.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
    of_class = next(node for node in stubs.body if isinstance(node, ast.ClassDef) and node.name == "IndexMap")
    assert inspect.getdoc(pdrs.IndexMap) == ast.get_docstring(of_class)
    documented = {
        node.name: text
        for node in of_class.body
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node))
    }
    assert {"from_names", "indices", "extend", "popitem", "select"} <= documented.keys()
    assert {name: inspect.getdoc(getattr(pdrs.IndexMap, name)) for name in documented} == documented


@pytest.mark.parametrize("name", ["weight.0", "größe", "\u4e00\u4e01", "\ud800.x", "x" * 300, "\U0001f600" * 2000])
def test_the_characters_of_a_name_are_kept_and_not_its_object(name: str) -> None:
    before = sys.getrefcount(name)
    index = IndexMap({name: 5, "other": 6})
    index.extend([name])
    index[name] = 7
    index.move_to_end(name)
    assert (index[name], index.indices([name]).tolist(), name in index, index.get(name)) == (7, [7], True, 7)
    made = [next(reversed(index)), index.select([False, True])[0], index.popitem()[0]]
    assert made == [name] * 3
    assert all(type(one) is str and one is not name for one in made)
    assert name not in index
    del index
    assert sys.getrefcount(name) == before
