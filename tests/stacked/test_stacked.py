"""StackedParameterDict as a dictionary: names, order and rows.

The bugs that this hunts: a row that two names share, a name that is lost or changes its place when its row moves, a
refused insertion that leaves something behind, an error that does not say what to do.
"""

from __future__ import annotations

import copy
import enum
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pdrs
from observed import Calls

SD = pdrs.StackedParameterDict


def full(*numbers: float) -> list[torch.Tensor]:
    return [torch.full((2,), float(number)) for number in numbers]


def firsts(sd: pdrs.StackedParameterDict) -> dict[str, float]:
    return {name: row.flatten()[0].item() for name, row in sd.items()}


@pytest.fixture
def sd() -> pdrs.StackedParameterDict:
    return SD(zip("abc", full(0, 1, 2), strict=True))


# -- entries -----------------------------------------------------------------------------------------------------------


def test_plain_dicts_are_sorted_and_everything_else_keeps_its_order() -> None:
    pairs = list(zip("zyx", full(0, 1, 2), strict=True))
    assert list(SD(dict(pairs))) == ["x", "y", "z"]
    for source in (
        pairs,
        iter(pairs),
        OrderedDict(pairs),
        SD(pairs),
        pdrs.ParameterDict(pairs),
        nn.ParameterDict(pairs),
    ):
        assert firsts(SD(source)) == {"z": 0.0, "y": 1.0, "x": 2.0}


def test_a_row_is_a_differentiable_view_that_can_be_written(sd: pdrs.StackedParameterDict) -> None:
    sd["b"].sum().backward()
    assert sd.table((2,)).grad.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    with torch.no_grad():
        sd["b"].fill_(5)
        sd["c"][0] = 7
    assert sd.gather(["b", "c"]).tolist() == [[5.0, 5.0], [7.0, 2.0]]


def test_setting_copies_and_an_old_name_keeps_its_place(sd: pdrs.StackedParameterDict) -> None:
    value = torch.full((2,), 9.0)
    sd["a"] = value
    value.fill_(0)
    sd["d"] = sd["a"]
    assert firsts(sd) == {"a": 9.0, "b": 1.0, "c": 2.0, "d": 9.0}


def test_another_shape_moves_a_name_to_another_table_and_keeps_its_place(sd: pdrs.StackedParameterDict) -> None:
    sd["b"] = torch.full((3,), 7.0)
    sd["c"] = nn.Parameter(torch.full((2,), 8.0), requires_grad=False)
    assert firsts(sd) == {"a": 0.0, "b": 7.0, "c": 8.0}
    assert [name for name, _ in sd.named_parameters()] == ["float32_2", "float32_3", "float32_2_no_grad"]
    sd.update(zip("de", full(3, 4), strict=True))  # into the rows that are free now
    assert firsts(sd) == {"a": 0.0, "b": 7.0, "c": 8.0, "d": 3.0, "e": 4.0}
    assert len(sd.table((2,), requires_grad=True)) == 3


def test_entries_can_change_places_in_one_update(sd: pdrs.StackedParameterDict) -> None:
    sd.update([("a", sd["c"]), ("c", sd["a"]), ("new", sd["b"])])
    assert firsts(sd) == {"a": 2.0, "b": 1.0, "c": 0.0, "new": 1.0}
    sd["frozen"] = nn.Parameter(torch.full((2,), 5.0), requires_grad=False)
    sd.update([("a", sd["frozen"]), ("frozen", sd["a"])])  # of two tables
    assert firsts(sd) == {"a": 5.0, "b": 1.0, "c": 0.0, "new": 1.0, "frozen": 2.0}


def test_of_equal_names_the_first_gives_the_place_and_the_last_the_value(sd: pdrs.StackedParameterDict) -> None:
    sd.update(
        [("x", torch.zeros(3)), ("b", torch.zeros(2)), ("x", torch.full((2,), 4.0)), ("b", torch.full((2,), 5.0))]
    )
    assert firsts(sd) == {"a": 0.0, "b": 5.0, "c": 2.0, "x": 4.0}
    assert [name for name, _ in sd.named_parameters()] == ["float32_2"]


def test_any_string_but_the_empty_one_is_a_name() -> None:
    class Word(str, enum.Enum):
        HELLO = "hello"

    names = ["keys", "training", "float32_2", "a.b", "\ud800", "_index", "名前"]
    sd = SD(zip(names, full(*range(7)), strict=True))
    sd[Word.HELLO] = torch.ones(2)
    assert list(sd) == [*names, "hello"]
    assert all(type(name) is str for name in sd)
    assert sd.gather(np.array(["a.b", "keys"])).tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert sd.training is True
    for key, error in (("", KeyError), (5, TypeError), (None, TypeError)):
        with pytest.raises(error):
            sd[key] = torch.zeros(2)
        with pytest.raises(error):
            sd.update([("fine", torch.zeros(2)), (key, torch.zeros(2))])
    assert "fine" not in sd


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (5.0, TypeError, "got float: a StackedParameterDict holds rows of tables; pdrs.ParameterDict"),
        (nn.Linear(1, 1), TypeError, "got Linear"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(2, dtype=torch.float64), TypeError, "expected torch.float32 for 'b', as its row has"),
        (torch.zeros(2, device="meta"), ValueError, "expected a tensor on cpu for 'b'"),
        (torch.eye(2).to_sparse(), TypeError, "layout torch.sparse_coo"),
    ],
)
def test_what_is_refused_leaves_no_trace(
    sd: pdrs.StackedParameterDict, value: Any, error: type[Exception], message: str
) -> None:
    before = firsts(sd)
    with pytest.raises(error) as caught:
        sd.update([("new", torch.zeros(5)), ("a", torch.full((2,), 9.0)), ("b", value)])
    assert message in str(caught.value)
    assert firsts(sd) == before
    assert [name for name, _ in sd.named_parameters()] == ["float32_2"]


def test_tensors_of_integers_cannot_be_trained_but_held() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        SD({"n": torch.zeros(2, dtype=torch.int64)})
    sd = SD({"n": nn.Parameter(torch.arange(2), requires_grad=False)})
    assert sd["n"].tolist() == [0, 1]


def test_what_is_removed_is_given_as_a_copy(sd: pdrs.StackedParameterDict) -> None:
    popped = sd.pop("b")
    sd["new"] = torch.full((2,), 9.0)
    assert popped.tolist() == [1.0, 1.0]
    assert not popped.requires_grad
    name, last = sd.popitem()
    assert (name, last.tolist()) == ("new", [9.0, 9.0])
    assert sd.popitem(last=False)[0] == "a"
    assert firsts(sd) == {"c": 2.0}
    big = SD({"matrix": torch.ones(300, 300), "number": torch.tensor(3.0), "empty": torch.zeros(0)})
    assert big.pop("matrix").sum() == 90_000
    assert big.pop("number").shape == ()
    assert big.pop("empty").shape == (0,)


def test_a_missing_name_is_a_key_error_and_an_attribute_error(sd: pdrs.StackedParameterDict) -> None:
    for ask in (lambda: sd["z"], lambda: sd.pop("z"), lambda: sd.gather(["a", "z"]), lambda: sd.lookup(["z"])):
        with pytest.raises(KeyError):
            ask()
        with pytest.raises(AttributeError):
            ask()
    with pytest.raises(KeyError, match="z"):
        del sd["z"]
    with pytest.raises(KeyError, match="z"):
        sd.drop(["a", "z"])
    with pytest.raises(ValueError, match="'a' is listed twice"):
        sd.drop(["a", "b", "a"])
    assert list(sd) == ["a", "b", "c"]
    with pytest.raises(KeyError, match="empty"):
        SD().popitem()
    assert sd.pop("z", None) is None
    assert sd.get("z") is None
    assert sd.get("z", 5) == 5


def test_views_and_iteration(sd: pdrs.StackedParameterDict) -> None:
    assert list(sd.keys()) == list(sd) == ["a", "b", "c"]
    assert sd.keys() & {"a", "z"} == {"a"}
    assert list(reversed(sd)) == list(reversed(sd.keys())) == ["c", "b", "a"]
    assert [row[0].item() for row in sd.values()] == [0.0, 1.0, 2.0]
    assert [row[0].item() for row in reversed(sd.values())] == [2.0, 1.0, 0.0]
    assert [name for name, _ in reversed(sd.items())] == ["c", "b", "a"]
    assert len(sd) == len(sd.values()) == len(sd.items()) == 3
    assert sd["a"] in sd.values()
    assert ("a", sd["a"]) in sd.items()
    assert ("a", sd["b"]) not in sd.items()
    assert torch.zeros(2) not in sd.values()
    assert not SD()
    names = iter(sd)
    sd[next(names) + "2"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="changed during iteration"):
        next(names)


def test_the_other_methods_of_a_dict(sd: pdrs.StackedParameterDict) -> None:
    assert sd.setdefault("a", torch.ones(2)).tolist() == [0.0, 0.0]
    assert sd.setdefault("d", torch.ones(2)).tolist() == [1.0, 1.0]
    merged = sd | {"z": torch.full((2,), 9.0), "a": torch.full((2,), 8.0)}
    assert firsts(merged) == {"a": 8.0, "b": 1.0, "c": 2.0, "d": 1.0, "z": 9.0}
    assert firsts(sd)["a"] == 0.0
    merged |= [("y", torch.full((2,), 7.0))]
    assert list(merged)[-1] == "y"
    assert type({"q": 1} | sd) is dict
    assert list({"q": 1} | sd) == ["q", "a", "b", "c", "d"]
    assert firsts(SD.fromkeys(["x", "y", "x"], torch.full((2,), 3.0))) == {"x": 3.0, "y": 3.0}
    sd.clear()
    assert list(sd) == []
    sd["again"] = torch.zeros(2)
    assert len(sd.table((2,))) == 4 + 2
    with pytest.raises(TypeError, match="iterable of key/value pairs"):
        sd.update(5)
    with pytest.raises(TypeError):
        sd.pop("a", 1, 2)
    with pytest.raises(TypeError):
        sd.pop(None)


def test_a_subclass_is_asked_where_it_is_called_itself() -> None:
    class Doubled(SD):
        def __getitem__(self, key: str) -> torch.Tensor:
            return super().__getitem__(key) * 2

    sd = Doubled({"a": torch.ones(2)})
    assert sd["a"].tolist() == [2.0, 2.0]
    assert [row.tolist() for row in (*sd.values(), *dict(sd.items()).values(), sd.get("a"))] == [[1.0, 1.0]] * 3


def test_repr_is_short() -> None:
    assert repr(SD()) == "StackedParameterDict(0 names)"
    sd = SD.from_tensor([f"n{n}" for n in range(1000)], torch.zeros(1000, 2))
    assert len(repr(sd).splitlines()) == 5
    assert "'n4', ... 990 more ...,\n    'n995'" in repr(sd)


# -- making, gathering, order of rows ----------------------------------------------------------------------------------


def test_from_rows_takes_the_tensor_as_it_is() -> None:
    rows = torch.randn(3, 2)
    sd = SD.from_tensor(list("abc"), rows)
    assert sd.table((2,)).data_ptr() == rows.data_ptr()
    parameter = nn.Parameter(rows, requires_grad=False)
    assert SD.from_tensor(list("abc"), parameter).table((2,), requires_grad=False) is parameter
    for names in (["a", "b"], ["a", "b", "a"], list("abcd")):
        with pytest.raises(ValueError, match=r"expected a row for each name|is listed twice"):
            SD.from_tensor(names, rows)
    with pytest.raises(KeyError):
        SD.from_tensor(["a", "", "b"], rows)


def test_from_shapes_makes_a_table_a_shape() -> None:
    shapes = {"w": (2, 3), "b": (3,), "v": (2, 3), "s": ()}
    sd = SD.from_shapes(shapes, dtype=torch.float64, init=lambda table: nn.init.constant_(table, 4.0))
    assert list(sd) == list(shapes)
    assert {name: tuple(row.shape) for name, row in sd.items()} == shapes
    assert set(firsts(sd).values()) == {4.0}
    assert [name for name, _ in sd.named_parameters()] == ["float64_2x3", "float64_3", "float64_scalar"]


def test_missing_names_are_skipped_zero_or_inserted(sd: pdrs.StackedParameterDict) -> None:
    batch = ["c", "new", "a", "new", "other"]
    assert sd.gather(batch, missing="skip")[:, 0].tolist() == [2.0, 0.0]
    assert sd.gather(batch, missing="zero")[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert sd.indices(batch, missing="skip").tolist() == [2, 0]
    assert sd.isin(batch).tolist() == [True, False, True, False, False]
    with pytest.raises(KeyError, match="3 of 5 names are not in the dictionary: 'new', 'new', 'other'"):
        sd.gather(batch)
    assert list(sd) == ["a", "b", "c"]
    gathered = sd.gather(batch, missing="insert", init=lambda rows: nn.init.constant_(rows, 7.0))
    assert gathered[:, 0].tolist() == [2.0, 7.0, 0.0, 7.0, 7.0]
    assert list(sd) == ["a", "b", "c", "new", "other"]
    with pytest.raises(ValueError, match="missing must be"):
        sd.gather(batch, missing="ignore")


def test_an_initialiser_that_raises_leaves_no_trace(sd: pdrs.StackedParameterDict) -> None:
    def fails(rows: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sd.gather(["new"], missing="insert", init=fails)
    assert list(sd) == ["a", "b", "c"]
    assert len(sd.table((2,))) == 3


@pytest.mark.parametrize("names", [["x", "x", "y"], ["y", "a", "x", "b", "x"], ["a", "x", "a", "y"]])
def test_scattered_values_reach_names_old_and_new_and_those_that_are_listed_twice(names: list[str]) -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
    values = torch.arange(1.0, 1 + len(names))[:, None].expand(-1, 2)
    sd.scatter(names, values, missing="insert")
    assert list(sd) == list(dict.fromkeys(["a", "b", *names]))
    for name in set(names):
        assert sd[name].tolist() in [[1.0 + at] * 2 for at, one in enumerate(names) if one == name]


def test_shapes_cannot_be_mixed_or_guessed(sd: pdrs.StackedParameterDict) -> None:
    sd["long"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"float32 of shape \[2\] and float32 of shape \[3\]"):
        sd.gather(["a", "long"])
    with pytest.raises(ValueError, match="more than one table"):
        sd.indices(["a", "long"])
    with pytest.raises(ValueError, match="pass shape=, the shape of an entry, because 2 tables could be meant"):
        sd.gather(["new"], missing="insert")
    with pytest.raises(ValueError, match=r"expected rows of shape \[2\]"):
        sd.scatter(["a", "new"], torch.zeros(2, 3), missing="insert")
    with pytest.raises(ValueError, match="1 values for 2 names"):
        sd.scatter(["a", "b"], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="a single number"):
        sd.scatter(["a", "b"], torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"expected values of torch\.float32, as the rows have, got torch\.float64"):
        sd.scatter(["a", "new"], torch.zeros(2, 2, dtype=torch.float64), missing="insert")
    with pytest.raises(TypeError, match="a tensor of values, got list"):
        sd.scatter(["a"], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="0 or more, got -1"):
        sd.reserve(-1)
    with pytest.raises(TypeError, match="expected the shape of 'n' as a sequence of int, got 3"):
        SD.from_shapes({"n": 3})
    with pytest.raises(TypeError, match="expected the shape of 'n' as a sequence of int, got '23'"):
        SD.from_shapes({"n": "23"})
    with pytest.raises(TypeError, match="expected an optimizer, got int"):
        sd.attach_optimizer(3)
    with pytest.raises(ValueError, match="there is no table yet"):
        SD().gather(["new"], missing="insert")
    with pytest.raises(ValueError, match="no table requires gradients"):
        SD({"a": nn.Parameter(torch.zeros(2), requires_grad=False)}).gather(["new"], missing="insert")
    assert list(sd) == ["a", "b", "c", "long"]
    with pytest.raises(KeyError, match="no table of float64"):
        sd.table((2,), torch.float64)
    with pytest.raises(TypeError, match="a single str"):
        sd.gather("abc")
    assert sd.gather(["a", "new"], missing="insert").shape == (2, 2)
    assert sd.gather(["x"], missing="insert", shape=(4, 1)).shape == (1, 4, 1)
    assert sd.gather([], shape=(2,)).shape == (0, 2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("names", "missing"), [([], "error"), (["new"], "skip"), (["new", "other"], "zero")])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_batch_without_a_known_name_has_a_backward_pass_like_any_other(
    names: list[str], missing: Any, sparse: bool, shape: tuple[int, ...]
) -> None:
    sd = SD({"a": torch.ones(shape), "b": torch.ones(shape)})
    sd.param_groups(by={"b": {}})
    gathered = sd.gather(names, missing=missing, sparse=sparse, shape=shape)
    assert gathered.shape == (len(names) if missing == "zero" else 0, *shape)
    assert not gathered.any()
    gathered.sum().backward()
    for parameter in sd.parameters():
        assert parameter.grad is None or not parameter.grad.to_dense().any()
    assert any(parameter.grad is not None for parameter in sd.parameters())


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1.0], [2.0]], TypeError, "expected a strided tensor of values, got list"),
        (torch.eye(2).to_sparse(), TypeError, "expected a strided tensor of values, got one of layout"),
        (torch.zeros(1, 3).expand(2, 3), ValueError, "got a view in which they overlap"),
        (torch.zeros(2, 1).expand(2, 3), ValueError, "got a view in which they overlap"),
        (torch.zeros(3, 3), ValueError, "got 2 names and 3 rows"),
    ],
)
def test_rows_that_can_be_no_table_are_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SD.from_tensor(["a", "b"], rows)


def test_rows_of_one_name_or_of_no_size_may_have_any_strides() -> None:
    assert SD.from_tensor(["a"], torch.zeros(()).expand(1, 1))["a"].tolist() == [0.0]
    assert SD.from_tensor([], torch.zeros(1, 3).expand(0, 3)).gather([]).shape == (0, 3)


def test_free_rows_are_used_again_the_lowest_first(sd: pdrs.StackedParameterDict) -> None:
    del sd["a"]
    del sd["c"]
    sd.update(zip("xyz", full(7, 8, 9), strict=True))
    assert sd.indices(["x", "y", "z"]).tolist() == [0, 2, 3]
    assert firsts(sd) == {"b": 1.0, "x": 7.0, "y": 8.0, "z": 9.0}


def test_a_handle_notices_what_happens_to_its_names(sd: pdrs.StackedParameterDict) -> None:
    handle = sd.lookup(["c", "b"])
    with Calls() as first:
        sd.gather(handle)
    sd["new"] = torch.zeros(2)
    with Calls() as after_an_insertion:
        sd.gather(handle)
    assert after_an_insertion.count == first.count, "looked up again, though no row has moved"
    sd.indices(handle).add_(1)
    assert sd.indices(handle).tolist() == [2, 1], "the rows that a handle knows were given away"
    del sd["a"]
    sd.compact()
    assert sd.gather(handle)[:, 0].tolist() == [2.0, 1.0]
    sd.scatter(handle, torch.ones(2, 2))
    assert sd["c"].tolist() == [1.0, 1.0]
    assert list(handle) == ["c", "b"]
    del sd["new"]
    sd["a"] = torch.full((2,), 3.0)
    sd.setdefault("last", torch.full((2,), 4.0))
    sd.pop("a")
    late = sd.lookup(["last"])
    assert sd.indices(late).tolist() == [3]
    sd.compact()
    assert sd.indices(late).tolist() == [2], "nothing but compact() moved its row"
    assert sd.isin(handle).tolist() == [True, True]
    sd["c"] = torch.zeros(3)
    with pytest.raises(ValueError, match="shape"):
        sd.gather(handle)
    del sd["c"]
    with pytest.raises(KeyError, match="'c'"):
        sd.gather(handle)
    with pytest.raises(ValueError, match="another dictionary"):
        SD().gather(handle)


def test_the_default_device_is_that_of_new_tensors_only(sd: pdrs.StackedParameterDict) -> None:
    one, other = torch.full((2,), 5.0), torch.full((2,), 6.0)
    with torch.device("meta"):
        sd.update([("c", one), ("a", other), ("b", one), ("d", other)])
        sd.freeze(["d"])
        sd.pop("c")
        sd.compact()
        assert sd.gather(["b", "none", "a"], missing="zero").tolist() == [[5.0, 5.0], [0.0, 0.0], [6.0, 6.0]]
        assert sd.gather(sd.lookup(["d"])).tolist() == [[6.0, 6.0]]
        assert sd.norms().device.type == "cpu"
        assert firsts(copy.deepcopy(sd).unstack().stack()) == {"a": 6.0, "b": 5.0, "d": 6.0}
        sd.load_state_dict(sd.state_dict())
    assert {table.device.type for table in sd.parameters()} == {"cpu"}


def test_names_that_come_in_inference_mode_can_be_trained_afterwards(sd: pdrs.StackedParameterDict) -> None:
    with torch.inference_mode():
        sd.gather(["a", "new"], missing="insert")
        sd["matrix"] = torch.ones(2, 2)
        sd.pop("b")
        sd.compact()
    optimizer = torch.optim.SGD(sd.parameters(), lr=1.0)
    (sd.gather(["a", "new"]).pow(2).sum() + sd["matrix"].pow(2).sum() + sd.gather(["c"]).sum()).backward()
    optimizer.step()
    assert firsts(sd) == {"a": 0.0, "c": 1.0, "new": 0.0, "matrix": -1.0}


def test_compacting_puts_rows_in_the_order_of_names(sd: pdrs.StackedParameterDict) -> None:
    sd.reserve(100)
    sd.pop("a")
    sd["a"] = torch.full((2,), 5.0)
    table = sd.table((2,))
    sd.compact()
    assert sd.table((2,)) is table
    assert table.tolist() == [[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]
    assert sd.indices(list(sd)).tolist() == [0, 1, 2]


def test_hundreds_of_shapes_are_not_searched_for_each() -> None:
    def calls(shapes: int) -> int:
        sizes = range(1, shapes + 1)
        with Calls() as made:
            sd = SD([(f"n{size}", torch.full((size,), float(size))) for size in sizes])
            sd.update([(f"m{size}", torch.full((size,), float(size))) for size in sizes])
            sd.update([(f"m{size}", torch.full((size,), -1.0)) for size in sizes])
        assert len(list(sd.parameters())) == shapes
        for name, row in sd.items():
            assert row.tolist() == [float(len(row) if name[0] == "n" else -1)] * len(row)
        return made.count

    assert calls(200) < 2.5 * calls(100)


def test_a_million_names() -> None:
    count = 1_000_000
    names = [f"name.{n}" for n in range(count)]
    sd = SD.from_tensor(names, torch.arange(float(count)).repeat_interleave(2).view(count, 2))
    generator = np.random.default_rng(0)
    asked = generator.permutation(count)[:100_000]
    batch = [names[n] for n in asked]
    assert np.array_equal(sd.gather(batch).detach()[:, 0].numpy(), asked)
    sd.drop(batch)
    late = [f"late.{n}" for n in range(200_000)]
    sd.scatter(late, torch.full((200_000, 2), -1.0), missing="insert")
    assert len(sd) == 1_100_000
    assert len(sd.table((2,))) == 2_000_000
    for _ in range(1000):
        sd.popitem(last=False)
        sd.popitem()
    sd.compact()
    assert len(sd.table((2,))) == len(sd) == 1_098_000
    assert sd.indices([late[198_999]]).tolist() == [1_097_999]
    other = SD()
    other.load_state_dict(sd.state_dict())
    assert list(other) == list(sd)


def test_tensors_that_lie_otherwise_in_memory_keep_their_values() -> None:
    given = {name: torch.randn(3, 4).t() for name in "abc"} | {"d": torch.randn(8, 6)[::2, ::2]}
    sd = pdrs.StackedParameterDict(given)
    assert all(torch.equal(sd[name], value) for name, value in given.items())
