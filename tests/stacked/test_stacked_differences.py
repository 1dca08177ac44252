"""Every deliberate difference of a StackedParameterDict from a ParameterDict: each row of the document has a test.

The bugs that this hunts: a difference that nobody decided, and one that stands in the document and is gone. So each
test shows both classes.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import pdrs

PD, SD = pdrs.ParameterDict, pdrs.StackedParameterDict
BOTH = (PD, SD)
DOCUMENT = Path(__file__).parents[2] / "docs" / "stacked" / "differences.md"


def make(kind: Any) -> Any:
    return kind([("a", torch.zeros(2)), ("b", torch.ones(2))])


def test_the_table_has_a_row_for_each_test_and_a_test_for_each_row() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition("## Differences")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!-|\s*\|)", table, re.MULTILINE)
    tests = [name for name in globals() if name.startswith("test_difference_")]
    assert len(rows) == len(tests), f"{DOCUMENT} and {__file__} must list the same"


def test_difference_names_that_are_not_in_the_batch() -> None:
    moved = {}
    for way, optimize in (
        ("ParameterDict", torch.optim.AdamW),
        ("dense", torch.optim.AdamW),
        ("sparse", torch.optim.SparseAdam),
        ("sparse Adagrad", torch.optim.Adagrad),
        ("sparse SGD", torch.optim.SGD),
    ):
        one = make(PD if way == "ParameterDict" else SD)
        optimizer = optimize(one.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.zero_grad()
                (one["a"] if way == "ParameterDict" else one.gather(["a"], sparse="sparse" in way)).sum().backward()
                optimizer.step()
        said = [each for each in seen if each.category is pdrs.AbsentNamesWarning]
        assert len(said) == (way == "dense")
        moved[way] = one["b"].tolist() != [1, 1]
        assert one["a"].tolist() != [0, 0]
    assert [way for way, has_moved in moved.items() if has_moved] == ["dense"]


def test_difference_values_are_strided_tensors() -> None:
    sparse = torch.eye(2).to_sparse()
    for value in (torch.nn.Linear(1, 1), 5, None, Parameter(sparse)):
        assert "x" in PD({"x": value})
        with pytest.raises(TypeError):
            SD({"x": value})


def test_difference_an_entry_is_a_new_view() -> None:
    pd, sd = make(PD), make(SD)
    assert pd["a"] is pd["a"]
    assert sd["a"] is not sd["a"]
    with torch.no_grad():
        sd["a"].add_(5)
    assert sd["a"].tolist() == [5, 5]
    assert sd["a"].grad_fn is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_difference_views_have_no_gradient() -> None:
    pd, sd = make(PD), make(SD)
    for one in (pd, sd):
        one["a"].sum().backward()
    assert pd["a"].grad.tolist() == [1, 1]
    assert sd["a"].grad is None
    assert dict(sd.named_grads())["a"].tolist() == [1, 1]


def test_difference_a_view_is_of_the_table_as_it_is() -> None:
    pd, sd = make(PD), make(SD)
    held = [one["a"] for one in (pd, sd)]
    for one in (pd, sd):
        one.update([(f"n{at}", torch.zeros(2)) for at in range(9)])
        with torch.no_grad():
            one["a"].fill_(7)
    assert [each.tolist() for each in held] == [[7, 7], [0, 0]]


def test_difference_a_tensor_is_copied_into_the_row() -> None:
    value = Parameter(torch.ones(2))
    pd, sd = make(PD), make(SD)
    for one in (pd, sd):
        one["a"] = value
    assert pd["a"] is value
    with torch.no_grad():
        value.zero_()
    assert sd["a"].tolist() == [1, 1]


def test_difference_another_dtype_is_refused() -> None:
    pd, sd = make(PD), make(SD)
    pd["a"] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        sd["a"] = torch.zeros(2, dtype=torch.float64)
    for one in (pd, sd):
        one["a"] = torch.zeros(3)
        assert list(one) == ["a", "b"]
        assert one["a"].shape == (3,)


def test_difference_what_is_removed_is_a_copy() -> None:
    for remove in (lambda one: one.pop("b"), lambda one: one.popitem()[1]):
        pd, sd = make(PD), make(SD)
        kept, table = pd["b"], sd.table((2,))
        assert remove(pd) is kept
        removed = remove(sd)
        assert not removed.requires_grad
        assert removed.tolist() == [1, 1]
        assert not table[1].any(), "the row itself is zero"


def test_difference_entries_are_no_attributes() -> None:
    assert make(PD).a.tolist() == [0, 0]
    with pytest.raises(AttributeError):
        _ = make(SD).a
    assert make(SD).float32_2.shape == (2, 2)


def test_difference_named_parameters_are_tables() -> None:
    sd = make(SD)
    sd["f"] = Parameter(torch.zeros(3, 4), requires_grad=False)
    assert [name for name, _ in sd.named_parameters()] == ["float32_2", "float32_3x4_no_grad"]
    assert [name for name, _ in make(PD).named_parameters()] == ["a", "b"]


def test_difference_a_state_dict_has_tables_and_names() -> None:
    assert list(make(PD).state_dict()) == list(make(SD).named_state_dict()) == ["a", "b"]
    assert list(make(SD).state_dict()) == ["float32_2", "_extra_state"]


def test_difference_loading_takes_names_over() -> None:
    others = {"x": torch.ones(2)}
    for kind in BOTH:
        with pytest.raises(RuntimeError, match="Missing key"):
            make(kind).load_state_dict(others)
    sd = make(SD)
    sd.load_state_dict(SD(others).state_dict())
    assert list(sd) == ["x"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        PD().load_state_dict(others)
    empty = SD()
    empty.load_state_dict(others)
    assert list(empty) == ["x"]


def test_difference_assign_assigns_tables() -> None:
    pd, sd, other = make(PD), make(SD), make(SD)
    state, tables = make(PD).state_dict(), make(SD).state_dict()
    pd.load_state_dict(state, assign=True)
    assert pd["b"].data_ptr() == state["b"].data_ptr()
    sd.load_state_dict(tables, assign=True)
    assert sd.table((2,)).data_ptr() == tables["float32_2"].data_ptr()
    other.load_state_dict(state, assign=True)
    assert other["b"].data_ptr() != state["b"].data_ptr()
    with torch.device("meta"):
        on_meta = make(SD)
    on_meta.load_state_dict(state, assign=True)
    assert on_meta["b"].tolist() == [1, 1]


def test_difference_copies_have_tables_of_their_own() -> None:
    for copied in (copy.copy, lambda one: one.copy(), lambda one: one | {}):
        pd, sd = make(PD), make(SD)
        assert copied(pd)["a"] is pd["a"]
        assert copied(sd)["a"].data_ptr() != sd["a"].data_ptr()


def test_difference_a_parameter_dict_takes_none() -> None:
    for merge in (lambda pd, other: pd | other, lambda pd, other: pd.update(other), lambda pd, other: PD(other)):
        merge(make(PD), make(PD))
        with pytest.raises(TypeError):
            merge(make(PD), make(SD))
        merge(make(PD), make(SD).unstack())


def test_difference_fromkeys_is_of_the_class() -> None:
    default = Parameter(torch.ones(2))
    pd, sd = PD().fromkeys(["a", "b"], default), SD.fromkeys(["a", "b"], default)
    assert pd["a"] is pd["b"]
    assert sd["a"].data_ptr() != sd["b"].data_ptr()


def test_difference_overrides_are_asked_where_they_are_called() -> None:
    asked = []
    for kind in BOTH:

        class Sub(kind):  # type: ignore[misc, valid-type]  # one of two classes
            def __getitem__(self, key: str) -> Any:
                asked.append(type(self).__mro__[1])
                return super().__getitem__(key)

        one = make(Sub)
        list(one.values())
        one.get("a")
    assert set(asked) == {PD}
    one["a"]
    assert asked[-1] is SD


def test_difference_tied_entries_are_two_rows() -> None:
    tied = Parameter(torch.zeros(2))
    pd, sd = (kind([("a", tied), ("b", tied)]) for kind in BOTH)
    for one in (pd, sd):
        with torch.no_grad():
            one["a"].fill_(1)
    assert pd["b"].tolist() == [1, 1]
    assert sd["b"].tolist() == [0, 0]


def test_difference_a_walk_makes_the_str_of_a_name_anew() -> None:
    name = "a name of some length"
    pd, sd = (kind([(name, torch.zeros(2))]) for kind in BOTH)
    assert next(iter(pd)) is name
    assert next(iter(sd)) is not name
    assert list(sd) == list(pd) == [name]


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # the gradients are dense
def test_difference_the_state_of_optimizers_follows_names() -> None:
    pd, sd = make(PD), make(SD)
    optimizers = [torch.optim.Adam(one.parameters()) for one in (pd, sd)]
    sd.attach_optimizer(optimizers[1])
    pd["b"].sum().backward()
    sd.gather(["b"]).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    kept = pd.pop("b")
    assert optimizers[0].state[kept]["exp_avg"].any(), "it is left behind"
    sd.pop("b")
    assert not optimizers[1].state[sd.table((2,))]["exp_avg"].any()
