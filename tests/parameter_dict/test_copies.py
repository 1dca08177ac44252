"""Copies of a ParameterDict: deepcopy, copy, pickle, files, shared memory, replicas; as of torch's class.

The bugs that this hunts: a copy that shares what it should not, or has lost its order, a tie, a gradient switch or a
value; an index that two dictionaries write to.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

import pdrs

Kind = type[nn.ParameterDict]
PD = nn.ParameterDict


def through_a_file(pd: PD) -> PD:
    file = io.BytesIO()
    torch.save(pd, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[PD], PD]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy in a model": lambda pd: copy.deepcopy(nn.Sequential(pd))[0],
    **{f"pickle {n}": lambda pd, n=n: pickle.loads(pickle.dumps(pd, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)},
    "torch.save": through_a_file,
}


def various(kind: Kind) -> PD:
    """Make a dictionary with a tie, a frozen entry, a hole where one was, and values of other kinds."""
    shared = Parameter(torch.full((2,), 3.0))
    pd = kind([("z", shared), ("gone", torch.zeros(1)), ("a", torch.ones(2, 2)), ("tied", shared)])
    pd["frozen"] = Parameter(torch.ones(1), requires_grad=False)
    pd["plain"] = {"x": [1, 2]}
    pd["child"] = nn.Linear(1, 1)
    pd["none"] = None
    del pd["gone"]
    pd.beside = Parameter(torch.zeros(1))
    pd.register_buffer("mean", torch.ones(1))
    pd.note = "hello"
    return pd


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_all_and_shares_nothing(kind: Kind, way: str) -> None:
    pd = various(kind)
    other = COPIES[way](pd)
    assert type(other) is kind
    assert list(other) == list(pd) == ["z", "a", "tied", "frozen", "plain", "child", "none"]
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in pd.named_parameters()]
    assert other["z"] is other["tied"]
    assert other["z"] is not pd["z"]
    assert other["z"].tolist() == [3, 3]
    assert [value.requires_grad for value in (other["a"], other["frozen"])] == [True, False]
    assert other["plain"] == pd["plain"]
    assert other["plain"] is not pd["plain"]
    assert other["none"] is None
    assert other.child.weight is not pd.child.weight
    assert (other.note, other.mean.item()) == ("hello", 1)
    with torch.no_grad():
        other["a"].zero_()
    other["new"] = torch.zeros(1)
    other.pop("z")
    assert pd["a"].min() == 1
    assert next(iter(pd)) == "z"
    assert "new" not in pd
    assert list(other) == ["a", "tied", "frozen", "plain", "child", "none", "new"]


def test_deepcopy_keeps_ties_across_modules(kind: Kind) -> None:
    pd = kind({"x": torch.ones(2)})
    other = copy.deepcopy(nn.ModuleList([pd, kind({"y": pd["x"]})]))
    assert other[0]["x"] is other[1]["y"]


def test_a_shallow_copy_shares_everything(kind: Kind) -> None:
    pd = kind({"x": torch.ones(2)})
    other = copy.copy(pd)
    assert type(other) is kind
    other["new"] = torch.ones(1)
    assert list(pd) == list(other) == ["x", "new"]
    assert pd["new"] is other["new"]


def test_a_copy_made_by_the_method_shares_parameters_and_no_keys(kind: Kind) -> None:
    pd = various(kind)
    other = pd.copy()
    assert type(other) is kind
    assert list(other) == list(pd)
    assert all(one is two for one, two in zip(other.values(), pd.values(), strict=True))
    other.pop("z")
    assert "z" in pd


def test_a_large_dictionary_is_pickled_without_recursion(kind: Kind) -> None:
    pd = kind([(f"k{n}", torch.zeros(1)) for n in range(3000)])
    other = pickle.loads(pickle.dumps(pd))
    assert list(other) == list(pd)
    assert list(copy.deepcopy(pd)) == list(pd)


def test_state_dicts_are_loaded_as_weights_only(kind: Kind, tmp_path: Path) -> None:
    pd = various(kind)
    torch.save(pd.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == list(pd.state_dict())
    other = various(kind)
    other.load_state_dict(state)
    assert other["z"].tolist() == [3, 3]


def test_a_replica_finds_its_tensors(kind: Kind) -> None:
    # What nn.DataParallel does: a replica has no Parameters, but tensors among its attributes.
    pd = kind([("b", torch.ones(2)), ("a", torch.zeros(2))])
    replica = pd._replicate_for_data_parallel()
    assert replica._parameters == {}
    for name, parameter in pd.named_parameters():
        setattr(replica, name, parameter * 2)
    assert replica["b"].grad_fn is not None
    assert [value.sum().item() for value in replica.values()] == [4, 0]
    assert [key for key, _ in replica.items()] == ["b", "a"]
    assert replica.get("a") is replica.a
    assert [type(value) for value in pd.values()] == [Parameter, Parameter]
    replica["b"].sum().backward()
    assert pd["b"].grad.tolist() == [2, 2]


def test_a_replica_of_a_module_within_works(kind: Kind) -> None:
    pd = kind({"child": nn.Linear(1, 1), "plain": 5})
    replica = pd._replicate_for_data_parallel()
    replica._modules["child"] = nn.Identity()
    assert isinstance(replica["child"], nn.Identity)
    assert isinstance(pd["child"], nn.Linear)
    assert replica["plain"] == 5


def write_sevens(pd: PD) -> None:
    with torch.no_grad():
        for value in pd.values():
            value.fill_(7)
    pd["only here"] = 1


@pytest.mark.slow
def test_another_process_writes_to_shared_entries(kind: Kind) -> None:
    pd = kind([("b", torch.zeros(2)), ("a", torch.zeros(3))])
    assert pd.share_memory() is pd
    assert all(value.is_shared() for value in pd.values())
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=write_sevens, args=(pd,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [value.min().item() for value in pd.values()] == [7, 7]
    assert list(pd) == ["b", "a"]


def test_each_class_converts_to_the_other(kind: Kind) -> None:
    pd = various(kind)
    for other in (nn.ParameterDict(pd), pdrs.ParameterDict(pd)):
        assert list(other) == list(pd)
        assert all(one is two for one, two in zip(other.values(), pd.values(), strict=True))


def test_a_state_of_attributes_may_be_given_to_a_bare_object(kind: Kind) -> None:
    # How frameworks rebuild modules: `__new__`, then `__dict__` or `__setstate__`.
    pd = various(kind)
    other: Any = kind.__new__(kind)
    other.__setstate__(copy.copy(pd.__dict__))
    assert next(iter(other.items())) == ("z", pd["z"])
    assert len(other) == len(pd)


def test_what_could_not_be_parametrized_is_copied_still(kind: Kind) -> None:
    pd = kind({"a": torch.ones(2)})
    pd.__dict__["a"] = torch.zeros(2)
    with pytest.raises(AssertionError):
        parametrize.register_parametrization(pd, "a", nn.Identity())
    assert "parametrizations" in pd._modules
    assert copy.deepcopy(pd)["a"].tolist() == [0, 0]
