"""Python code that runs in the midst of a method: finalizers, comparisons of keys, methods of unusual tensors.

The bugs that this hunts: keys and Parameters that are at odds for good because a finalizer changed the dictionary
half-way, memory that is written after it was given back, a panic because a dict changed while it was walked.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

Kind = type[nn.ParameterDict]
NAMES = "abcdefgh"

CHANGES: dict[str, Callable[[Any], Any]] = {
    "update, Parameters": lambda pd: pd.update({name: Parameter(torch.ones(2)) for name in NAMES}),
    "update, tensors": lambda pd: pd.update([(name, torch.ones(2)) for name in NAMES]),
    "update, its like": lambda pd: pd.update(type(pd)([(name, torch.ones(2)) for name in NAMES])),
    "|=": lambda pd: pd.__ior__({name: torch.ones(2) for name in NAMES}),
    "pd[k] =": lambda pd: [pd.__setitem__(name, torch.ones(2)) for name in NAMES],
    "pd[k] = Parameter": lambda pd: set_all(pd),
    "pd.k =": lambda pd: [setattr(pd, name, Parameter(torch.ones(2))) for name in NAMES],
    "clear": lambda pd: pd.clear(),
    "pop": lambda pd: [pd.pop(name, None) for name in NAMES] and None,
    "del": lambda pd: [pd.__delitem__(name) for name in NAMES if name in pd],
    "popitem": lambda pd: [pd.popitem() for name in NAMES if pd] and None,
    "popitem, first": lambda pd: [pd.popitem(last=False) for name in NAMES if pd] and None,
}
FINALIZERS: dict[str, Callable[[Any], Any]] = {
    "pops a later one": lambda pd: pd.pop("d", None),
    "pops an earlier one": lambda pd: pd.pop("a", None),
    "deletes": lambda pd: "d" in pd and pd.__delitem__("d"),
    "inserts": lambda pd: pd.__setitem__("new", Parameter(torch.zeros(2))),
    "inserts a later one": lambda pd: pd.__setitem__("e", Parameter(torch.zeros(2))),
    "updates": lambda pd: pd.update([("d", torch.zeros(2)), ("new", torch.zeros(2))]),
    "clears": lambda pd: pd.clear(),
    "takes the last": lambda pd: pd and pd.popitem(),
}


def set_all(pd: Any) -> None:
    for name in NAMES:
        pd[name] = Parameter(torch.ones(2))


@pytest.mark.parametrize("finalizer", FINALIZERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", [(), (type("Mixin", (), {}),)], ids=["the class", "a subclass"])
def test_a_finalizer_of_what_is_replaced_or_removed_may_change_the_dictionary(
    change: str, finalizer: str, base: tuple[type, ...]
) -> None:
    kind = type("Sub", (pdrs.ParameterDict, *base), {}) if base else pdrs.ParameterDict
    pd = kind([(name, torch.zeros(2)) for name in NAMES])
    finalize = [weakref.finalize(pd[name], FINALIZERS[finalizer], pd) for name in "bc"]
    CHANGES[change](pd)
    assert not any(one.alive for one in finalize)
    values = {**pd._parameters, **pd._modules}
    # By `pd.k =` what a finalizer has removed comes back beside the entries.
    assert sorted(pd) == sorted(values) or (change == "pd.k =" and set(pd) < set(values))
    assert all(pd[name] is values[name] for name in pd)
    assert [name for name, _ in pd.items()] == list(pd)


def test_a_finalizer_of_a_plain_value_may_change_the_dictionary() -> None:
    class Value:
        def __del__(self) -> None:
            pd.pop("a", None)
            pd["b"] = torch.zeros(2)

    for new in (Parameter(torch.ones(2)), nn.ReLU(), 5):
        pd = pdrs.ParameterDict([("a", Value()), ("z", torch.zeros(2))])
        pd["a"] = new
        assert list(pd) == ["z", "b"]
        assert not {"a"} & {*pd._parameters, *pd._values, *pd._modules}


# -- loading -----------------------------------------------------------------------------------------------------------


def with_new_data(pd: nn.ParameterDict, victims: list[torch.Tensor]) -> None:
    """Replace the memory of all entries, so that what lay there is given back, and taken by others."""
    for value in pd._parameters.values():
        value.data = torch.full_like(value, -1.0)
    victims += [torch.full((64,), 7.0) for _ in range(2 * len(pd))]


@pytest.mark.parametrize("model", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_a_key_may_replace_the_data_when_it_is_compared(kind: Kind, at: int, model: bool) -> None:
    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            if not victims:
                with_new_data(pd, victims)
            return str.__eq__(self, other)

    victims: list[torch.Tensor] = []
    pd = kind((f"k{n}", torch.zeros(64)) for n in range(100))
    names: list[str] = [("0." if model else "") + f"k{n}" for n in range(100)]
    names[at] = Key(names[at])
    (nn.Sequential(pd) if model else pd).load_state_dict({name: torch.full((64,), 2.0) for name in names})
    assert victims
    assert all((value == 7).all() for value in victims), "memory was written that had been given back"
    assert all((value == 2).all() for value in list(pd.values())[at:])


@pytest.mark.parametrize("place", ["the state dict", "the module"])
def test_an_unusual_tensor_may_replace_the_data_when_it_is_asked(place: str) -> None:
    class Odd(torch.Tensor):
        def untyped_storage(self) -> Any:
            if pd:
                with_new_data(pd, victims)
            return super().untyped_storage()

    pd: Any = None
    victims: list[torch.Tensor] = []
    pd = pdrs.ParameterDict((f"k{n}", torch.zeros(64)) for n in range(100))
    state = {f"0.k{n}": torch.full((64,), 2.0) for n in range(100)}
    if place == "the state dict":
        state["0.k99"] = state["0.k99"].as_subclass(Odd)
    else:
        pd._parameters["k99"] = Parameter(torch.zeros(64).as_subclass(Odd))
    nn.Sequential(pd).load_state_dict(state)
    assert victims
    assert all((value == 7).all() for value in victims), "memory was written that had been given back"
    assert all((value == 2).all() for value in pd.values())


def test_a_dict_may_change_while_it_is_copied_or_loaded(kind: Kind) -> None:
    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            state.setdefault("more", torch.zeros(1))
            return str.__eq__(self, other)

    pd = kind((f"k{n}", torch.zeros(4)) for n in range(10))
    state: dict[str, Any] = {Key(f"k{n}"): torch.ones(4) for n in range(10)}
    # That an error is raised is all that torch promises; a panic of Rust is none.
    with suppress(RuntimeError):
        pd.load_state_dict(state, strict=False)

    class Copied:
        def __hash__(self) -> int:
            return hash(id(pd["k3"]))

        def __eq__(self, other: object) -> bool:
            pd._parameters.pop("k5", None)
            return False

    pd = kind((f"k{n}", torch.zeros(4)) for n in range(10))
    with suppress(RuntimeError):
        assert copy.deepcopy(pd, {Copied(): 1})["k3"].tolist() == [0, 0, 0, 0]


# -- iterators ---------------------------------------------------------------------------------------------------------

ITERATORS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "iter": iter,
    "reversed": reversed,
    "keys": lambda pd: iter(pd.keys()),
    "keys, reversed": lambda pd: reversed(pd.keys()),
    "values": lambda pd: iter(pd.values()),
    "items": lambda pd: iter(pd.items()),
}


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("iterator", ITERATORS)
@pytest.mark.parametrize("override", [False, True], ids=["the class", "a subclass that computes its values"])
def test_an_iterator_at_its_end_lets_the_module_go(kind: Kind, iterator: str, count: int, override: bool) -> None:
    if override:
        kind = type("Sub", (kind,), {"__getitem__": lambda self, key: super(kind, self).__getitem__(key)})
    pd = kind((f"k{n}", torch.zeros(2)) for n in range(count))
    gone = [weakref.ref(each) for each in (pd, *pd.parameters())]
    ended = ITERATORS[iterator](pd)
    assert len(list(ended)) == count
    del pd
    assert not any(each() for each in gone)
    assert list(ended) == []


@pytest.mark.parametrize("view", ["values", "items"])
def test_reversed_views_at_their_end_let_the_module_go(view: str) -> None:
    pd = pdrs.ParameterDict((f"k{n}", torch.zeros(2)) for n in range(3))
    gone = [weakref.ref(each) for each in (pd, *pd.parameters())]
    ended = reversed(getattr(pd, view)())
    assert len(list(ended)) == 3
    del pd
    assert not any(each() for each in gone)
    assert list(ended) == []


@pytest.mark.parametrize("iterate", [iter, reversed])
@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_an_iterator_at_its_end_lets_a_stacked_dictionary_go(
    view: str, iterate: Callable[[Any], Iterator[Any]]
) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)})
    gone = [weakref.ref(each) for each in (sd, *sd.parameters())]
    ended = iterate(getattr(sd, view)())
    assert len(list(ended)) == 2
    del sd
    assert not any(each() for each in gone)
    assert list(ended) == []


@pytest.mark.parametrize("view", ["keys", "values", "items", "__iter__", "__reversed__"])
def test_an_iterator_of_names_at_its_end_lets_the_map_go(view: str) -> None:
    index = pdrs.IndexMap({"a": 1, "b": 2})
    before = sys.getrefcount(index)
    iterator = iter(getattr(index, view)())
    assert len(list(iterator)) == 2
    assert sys.getrefcount(index) == before
    index["late"] = 3
    assert list(iterator) == [], "it has ended, whatever comes"


@pytest.mark.parametrize("last", [42, "first", None, 0.0], ids=repr)
def test_popitem_takes_nothing_but_a_bool(last: Any) -> None:
    for kind in (pdrs.ParameterDict, type("Sub", (pdrs.ParameterDict,), {"__getitem__": lambda self, key: 1})):
        pd = kind({"a": torch.zeros(1)})
        with pytest.raises(TypeError, match=r"popitem\(\): expected last to be True or False, got "):
            pd.popitem(last)
        assert list(pd) == ["a"]
        with pytest.raises(TypeError):
            nn.ParameterDict({"a": torch.zeros(1)}).popitem(last)
        assert pd.popitem(False)[0] == "a"
