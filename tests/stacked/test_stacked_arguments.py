"""Arguments of ``StackedParameterDict`` that contradict each other, what is there, or what they are for.

The bugs that this hunts: an argument that is ignored without a word, -1 as a row number, which is the last row, a
Lookup whose names are changed behind its back, an initialiser whose values are lost, and an error that does not say
what to do.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pdrs

SD = pdrs.StackedParameterDict


@pytest.fixture
def sd() -> SD:
    return SD.from_tensor(["a", "b", "c"], torch.eye(3))


@pytest.fixture
def mixed() -> SD:
    return SD([("a", torch.ones(3)), ("b", torch.ones(2)), ("c", torch.zeros(3))])


# -- row numbers -------------------------------------------------------------------------------------------------------


def test_a_missing_name_has_no_row_number(sd: SD) -> None:
    with pytest.raises(ValueError, match=r"isin\(\) .* missing=\"skip\""):
        sd.indices(["nope"], missing="zero")
    with pytest.raises(ValueError, match=r"isin\(\)"):
        sd.indices(["a"], missing="zero")
    assert sd.indices(["nope", "c"], missing="skip").tolist() == [2]


# -- a Lookup ----------------------------------------------------------------------------------------------------------


def test_the_names_of_a_lookup_cannot_be_changed(sd: SD) -> None:
    names = ["c", "a"]
    batch = sd.lookup(names)
    names.append("b")
    assert batch.names == ("c", "a")
    assert list(batch) == ["c", "a"]
    assert len(batch) == 2
    with pytest.raises(AttributeError):
        batch.names = ("a",)
    with pytest.raises(AttributeError):
        batch.names.append("b")
    sd.scatter(batch, torch.zeros(2, 3))
    assert sd.gather(["a", "c"]).abs().sum() == 0


def test_copies_and_pickles_of_a_lookup_have_its_names(sd: SD) -> None:
    module = nn.Module()
    module.words, module.batch = sd, sd.lookup(["c", "a"])
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert made.batch.names == ("c", "a")
        assert made.words.gather(made.batch).argmax(1).tolist() == [2, 0]


# -- initialisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init",
    [
        lambda rows: torch.ones_like(rows),
        lambda rows: torch.ones(3),
        lambda rows: np.ones(rows.shape, np.float32),
        lambda rows: rows.tolist(),
        lambda rows: 1.0,
        lambda rows, names: [[1.0] * 3 for _ in names],
        lambda rows: rows.fill_(1.0) + 1,
    ],
)
def test_an_initialiser_that_returns_values_is_refused(sd: SD, init: Any) -> None:
    for use in (
        lambda: sd.insert(["new"], init=init),
        lambda: sd.gather(["new"], missing="insert", init=init),
        lambda: SD.from_shapes({"new": (3,)}, init=init),
    ):
        with pytest.raises(ValueError, match=r"init must give the new rows their values in place .* returned a"):
            use()
    assert list(sd) == ["a", "b", "c"]


def test_an_initialiser_may_return_nothing_or_what_it_got(sd: SD) -> None:
    def fill(rows: Tensor) -> None:
        rows.fill_(2.0)

    sd.insert(["d"], init=fill)
    sd.insert(["e"], init=nn.init.ones_)
    assert [sd["d"].sum().item(), sd["e"].sum().item()] == [6.0, 3.0]


def test_what_is_no_initialiser_is_refused(sd: SD) -> None:
    for names in (["new"], ["a"]):
        for use in (
            lambda names: sd.insert(names, init=1.0),
            lambda names: sd.gather(names, missing="insert", init=1.0),
            lambda names: sd.indices(names, missing="insert", init=1.0),
        ):
            with pytest.raises(TypeError, match=r"init must be a function .* such as torch.nn.init.normal_, got 1.0"):
                use(names)
    with pytest.raises(TypeError, match=r"lambda rows: torch.nn.init.constant_\(rows, "):
        sd.insert(["new"], init=nn.init.constant_)
    assert list(sd) == ["a", "b", "c"]


# -- arguments that contradict what is there ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["error", "skip", "zero"])
def test_an_initialiser_without_names_to_insert_is_refused(sd: SD, missing: Any) -> None:
    for names in (["a"], ["new"], sd.lookup(["a"]), ...):
        with pytest.raises(ValueError, match=r"init= needs missing=\"insert\""):
            sd.gather(names, missing=missing, init=nn.init.ones_)
        if missing != "zero":
            with pytest.raises(ValueError, match=r"init= needs missing=\"insert\""):
                sd.indices(names, missing=missing, init=nn.init.ones_)


@pytest.mark.parametrize("other", [{"shape": (7,)}, {"dtype": torch.float64}, {"shape": (3,), "dtype": torch.int8}])
def test_a_shape_or_dtype_that_names_do_not_have_is_refused(sd: SD, other: dict[str, Any]) -> None:
    for missing in ("error", "skip", "zero", "insert"):
        for names in (["a"], ["c", "a"], sd.lookup(["a"]), ["a", "new"]):
            if missing == "error" and names == ["a", "new"]:
                continue
            with pytest.raises(ValueError, match=r"float32 of shape \[3\]"):
                sd.gather(names, missing=missing, **other)
            if missing != "zero":
                with pytest.raises(ValueError, match=r"float32 of shape \[3\]"):
                    sd.indices(names, missing=missing, **other)
    with pytest.raises(ValueError, match=r"'a' .* float32 of shape \[3\]"):
        sd.insert(["new", "a"], **other)
    assert list(sd) == ["a", "b", "c"]
    assert len(sd.tables()) == 1


def test_the_shape_and_dtype_that_names_have_are_taken(mixed: SD) -> None:
    for same in ({"shape": (3,)}, {"shape": torch.Size([3])}, {"shape": [3], "dtype": torch.float32}):
        assert mixed.gather(["a", "c"], **same).shape == (2, 3)
        assert mixed.indices(["a", "c"], **same).tolist() == [0, 1]
        assert mixed.gather(["none"], missing="zero", **same).shape == (1, 3)
        assert mixed.insert(["a"], **same) == []
    with pytest.raises(TypeError, match="the number 3"):
        mixed.gather(["a"], shape=3)


def test_everything_of_one_shape_is_gathered(mixed: SD) -> None:
    assert mixed.gather(shape=(2,)).tolist() == [[1.0, 1.0]]
    assert mixed.gather(shape=(3,), sparse=True).tolist() == [[1.0] * 3, [0.0] * 3]
    assert mixed.indices(shape=(3,)).tolist() == [0, 1]
    assert mixed.gather(shape=(5,)).shape == (0, 5)
    mixed["d"] = torch.ones(2, dtype=torch.float64)
    assert mixed.gather(dtype=torch.float64).tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="expected names of one shape and dtype"):
        mixed.gather()


@pytest.mark.parametrize("method", ["gather", "indices"])
def test_names_of_several_shapes_are_refused_before_new_ones_are_inserted(mixed: SD, method: str) -> None:
    names = list(mixed)
    with pytest.raises(ValueError, match=r"expected names of one shape and dtype|more than one table"):
        getattr(mixed, method)([*names, "new"], missing="insert")
    assert list(mixed) == names


def test_row_numbers_of_several_tables_are_refused_before_new_names_are_inserted() -> None:
    sd = SD({"a": torch.zeros(2), "b.bias": torch.zeros(2)})
    sd.param_groups(by={"bias$": {"weight_decay": 0.0}})
    with pytest.raises(ValueError, match="more than one table"):
        sd.indices(["a", "b.bias", "new"], missing="insert")
    assert list(sd) == ["a", "b.bias"]


# -- optimizers --------------------------------------------------------------------------------------------------------


def stepped(sd: SD) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather().sum().backward()
    optimizer.step()
    return optimizer


def test_a_state_that_the_optimizer_lacks_is_refused(sd: SD) -> None:
    optimizer = stepped(sd)
    with pytest.raises(ValueError, match=r"Adam.* has no state 'exp_averag'; it has 'exp_avg', 'exp_avg_sq'"):
        sd.attach_optimizer(optimizer, initial_state={"exp_avg": 0.0, "exp_averag": "value"})
    with pytest.raises(ValueError, match="not attached"):
        sd.detach_optimizer(optimizer)
    sd.attach_optimizer(optimizer, initial_state={"exp_avg": 0.0})
    sd.detach_optimizer(optimizer)


def test_an_optimizer_without_state_may_be_told_of_any(sd: SD) -> None:
    sd.attach_optimizer(torch.optim.Adam(sd.parameters()), initial_state={"later": 1.0})


@pytest.mark.parametrize("given", [5, "value", [("exp_avg", 0.0)]])
def test_an_initial_state_that_is_no_mapping_is_refused(sd: SD, given: Any) -> None:
    with pytest.raises(TypeError, match=r"expected initial_state as a mapping .*, got "):
        sd.attach_optimizer(stepped(sd), initial_state=given)


def test_what_is_not_attached_cannot_be_detached(sd: SD) -> None:
    optimizer = stepped(sd)
    for none in (None, sd):
        with pytest.raises(TypeError, match="expected an optimizer, got "):
            sd.detach_optimizer(none)
    with pytest.raises(ValueError, match=r"Adam.* is not attached"):
        sd.detach_optimizer(optimizer)
    sd.attach_optimizer(optimizer)
    sd.detach_optimizer(optimizer)
    with pytest.raises(ValueError, match=r"Adam.* is not attached"):
        sd.detach_optimizer(optimizer)


# -- names of rows -----------------------------------------------------------------------------------------------------


def test_names_of_chooses_a_table_as_table_does() -> None:
    sd = SD([("a", torch.ones(2)), ("b", nn.Parameter(torch.ones(2), requires_grad=False)), ("c", torch.ones(2))])
    sd["d"] = torch.ones(3)
    assert sd.names_of(sd.indices(["c", "a"]), shape=(2,), requires_grad=True) == ["c", "a"]
    assert sd.names_of(sd.indices(["b"]), shape=(2,), requires_grad=False) == ["b"]
    assert sd.names_of(sd.indices(["b"]), requires_grad=False) == ["b"]  # the only table without gradients
    with pytest.raises(ValueError, match=r"float32_2', 'float32_2_no_grad'.* requires_grad="):
        sd.names_of([0], shape=(2,))
    with pytest.raises(ValueError, match=r"pass shape=, .* \[2\] and \[3\]"):
        sd.names_of([0], requires_grad=True)
    with pytest.raises(KeyError, match="no table"):
        sd.names_of([0], shape=(5,))
    with pytest.raises(KeyError, match="no table"):
        sd.names_of([0], dtype=torch.int8)


def test_no_rows_have_no_names(sd: SD, mixed: SD) -> None:
    for one in (SD(), sd, mixed):
        assert one.names_of([]) == []
        assert one.names_of(torch.tensor([], dtype=torch.int64)) == []
        assert one.names_of(one.indices([])) == []
    with pytest.raises(KeyError, match="no table"):
        SD().names_of([0])


def test_an_error_about_rows_has_the_name_of_the_table(sd: SD) -> None:
    with pytest.raises(IndexError, match=r"table 'float32_3' has 3 rows, got row 7"):
        sd.names_of([0, 7])
    with pytest.raises(IndexError, match=r"table 'float32_3' has 3 rows, got row -1"):
        sd.names_of(torch.tensor([-1]))


# -- errors that say what to do ----------------------------------------------------------------------------------------


def test_last_is_a_bool(sd: SD) -> None:
    for given in (0, 1, None, "yes"):
        for use in (lambda given: sd.move_to_end("a", last=given), lambda given: sd.popitem(last=given)):
            with pytest.raises(TypeError, match=f"last must be a bool, got {given!r}"):
                use(given)
    assert list(sd) == ["a", "b", "c"]


def test_an_error_about_pairs_has_the_name_of_the_class() -> None:
    with pytest.raises(ValueError, match=r"^StackedParameterDict update sequence element #0 has length 1"):
        SD(["a", "b"])
    with pytest.raises(TypeError, match=r"^StackedParameterDict update sequence element #0 should be Iterable"):
        SD([1])
    with pytest.raises(ValueError, match=r"^ParameterDict update sequence element #0 has length 1"):
        pdrs.ParameterDict(["a", "b"])


def test_scattered_values_are_one_for_each_name(sd: SD) -> None:
    with pytest.raises(ValueError, match="expected one value for each name, got 1 values for 2 names"):
        sd.scatter(["a", "b"], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected one value for each name, got a single number"):
        sd.scatter(["a"], torch.tensor(1.0))


def test_a_shape_that_cannot_be_inferred_is_asked_for(sd: SD, mixed: SD) -> None:
    for use in (lambda: SD().reserve(3), lambda: SD().insert(["f"]), lambda: SD().gather(["f"], missing="insert")):
        with pytest.raises(ValueError, match="pass shape=, the shape of an entry, because there is no table yet"):
            use()
    for use in (lambda: mixed.reserve(3), lambda: mixed.insert(["f"]), lambda: mixed.gather([])):
        with pytest.raises(ValueError, match="pass shape=, the shape of an entry, because 2 tables could be meant"):
            use()
    sd.requires_grad_(False)
    for use in (lambda: sd.reserve(3), lambda: sd.insert(["f"])):
        with pytest.raises(ValueError, match=r"no table requires gradients: pass shape= .* requires_grad=False\)"):
            use()
    assert sd.insert(["f"], shape=(3,)) == ["f"]


def test_options_by_patterns_are_checked(sd: SD) -> None:
    with pytest.raises(ValueError, match=r"expected a regular expression, got '\(': "):
        sd.param_groups(by={"(": {}})
    for key in ("params", "pattern"):
        with pytest.raises(ValueError, match=f"'{key}' is not an option"):
            sd.param_groups(by={"a": {key: 1}})
        with pytest.raises(ValueError, match=f"'{key}' is not an option"):
            sd.param_groups({"a": {}}, **{key: 1})
    assert len(sd.tables()) == 1


def test_a_name_that_is_no_str_is_refused_in_the_same_words(sd: SD) -> None:
    row = torch.zeros(3)
    for use in (
        lambda: sd[5],
        lambda: sd.get(5),
        lambda: sd.pop(5),
        lambda: sd.__delitem__(5),
        lambda: sd.rename(5, "x"),
        lambda: sd.rename("a", 5),
        lambda: sd.move_to_end(5),
        lambda: sd.__setitem__(5, row),
        lambda: pdrs.IndexMap().get(5),
        lambda: pdrs.ParameterDict().__delitem__(5),
    ):
        with pytest.raises(TypeError, match=r"^names must be str, got int"):
            use()


def test_a_missing_name_raises_the_same_error_everywhere(sd: SD) -> None:
    for use in (
        lambda: sd["x"],
        lambda: sd.__delitem__("x"),
        lambda: sd.pop("x"),
        lambda: sd.drop(["x"]),
        lambda: sd.rename("x", "y"),
        lambda: sd.move_to_end("x"),
    ):
        with pytest.raises(pdrs.MissingEntryError, match="'x'"):
            use()


def test_a_name_that_is_listed_twice_is_a_value_error(sd: SD) -> None:
    with pytest.raises(ValueError, match="'a' is listed twice"):
        sd.drop(["a", "b", "a"])
    with pytest.raises(ValueError, match="'a' is listed twice"):
        sd.drop(["a", "x", "a"], missing="skip")
    with pytest.raises(ValueError, match="'a' is listed twice"):
        SD.from_tensor(["a", "b", "a"], torch.eye(3))
    assert list(sd) == ["a", "b", "c"]


def test_a_name_does_not_move_between_groups_by_its_new_name(sd: SD) -> None:
    sd.param_groups(by={"^b": {"lr": 0.1}})
    with pytest.raises(ValueError, match=r"'a2'.* pop .* begins its optimizer state anew"):
        sd.rename("b", "a2")


def test_a_mask_is_no_list_of_names(sd: SD) -> None:
    mask = [True, False, True]
    for given in (mask, np.array(mask), torch.tensor(mask)):
        for method in (sd.freeze, sd.unfreeze):
            with pytest.raises(TypeError, match=r"got a mask: pass sd\.select\(mask\)"):
                method(given)
    sd.freeze(sd.select(mask))


def test_views_of_names_show_names() -> None:
    names = [f"n{at}" for at in range(1000)]
    for made in (SD.from_tensor(names, torch.zeros(1000, 1)), pdrs.IndexMap.from_names(names)):
        assert (
            repr(made.keys()) == "KeysView(['n0', 'n1', 'n2', 'n3', 'n4', ..., 'n995', 'n996', 'n997', 'n998', 'n999'])"
        )
    for small in (SD(mapping := {"a": torch.zeros(2), "b": torch.ones(2)}), pdrs.ParameterDict(mapping)):
        assert repr(small.keys()) == "KeysView(['a', 'b'])"
    assert repr(SD().keys()) == "KeysView([])"


@pytest.mark.parametrize("change", ["set", "gather", "update", "pop and set"])
def test_what_is_said_of_the_state_of_torchs_own_optimizers_is_done(change: str) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer, initial_state={"exp_avg": "value", "exp_avg_sq": 0.5})
    sd.gather(["a", "b"]).sum().backward()
    optimizer.step()
    value = torch.full((2,), 7.0)
    if change == "pop and set":
        sd.pop("a")
    if change == "gather":
        sd.gather(["new"], missing="insert", init=lambda rows: torch.nn.init.constant_(rows, 7.0))
    elif change == "update":
        sd.update({"new": value})
    else:
        sd["new"] = value
    row = int(sd.indices(["new"]))
    state = optimizer.state[sd.table((2,))]
    assert (state["exp_avg"][row].tolist(), state["exp_avg_sq"][row].tolist()) == ([7.0, 7.0], [0.5, 0.5])


TRACED: dict[str, Any] = {
    "getitem": lambda sd: sd["a"],
    "get": lambda sd: sd.get("a"),
    "gather": lambda sd: sd.gather(["a"]),
    "gather of all": lambda sd: sd.gather(),
    "gather of a lookup": lambda sd: sd.gather(sd.lookup(["a"])),
    "values": lambda sd: next(iter(sd.values())),
    "items": lambda sd: dict(sd.items())["a"],
}


class Scaled(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.rows, self.read = pdrs.StackedParameterDict({"a": torch.ones(2), "b": torch.ones(2)}), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.rows) * x


@pytest.mark.parametrize("read", TRACED)
def test_a_row_by_name_is_no_constant_of_a_symbolic_trace(read: str) -> None:
    model = Scaled(TRACED[read])
    with pytest.raises(RuntimeError, match=r"symbolic_trace would record .* read table\(shape\)\[rows\]"):
        torch.fx.symbolic_trace(model)
    expected = model(torch.ones(2))
    exported = torch.export.export(model, (torch.ones(2),), strict=False)
    assert [name for name, _ in exported.named_parameters()] == ["rows.float32_2"]
    assert torch.equal(exported.module()(torch.ones(2)), expected)


def test_a_table_with_row_numbers_is_traced() -> None:
    class Read(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.rows.table((2,))[x]

    model = Read(None)
    traced = torch.fx.symbolic_trace(model)
    assert "rows.float32_2" in dict(traced.named_parameters())
    rows = model.rows.indices(["b", "a"])
    assert torch.equal(traced(rows), model(rows))


@pytest.mark.parametrize("read", ["gather", "lookup", "indices"])
def test_a_set_of_names_has_no_order(read: str) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    for names in ({"a", "b"}, frozenset("ab")):
        with pytest.raises(TypeError, match=r"names must be in an order, got a (frozen)?set: pass a list"):
            getattr(sd, read)(names)
    with pytest.raises(TypeError, match="names must be in an order"):
        sd.scatter({"a", "b"}, torch.ones(2, 2))
    sd.drop({"a", "b"})  # where the order is of no consequence
    assert len(sd) == 0


def test_a_dtype_that_is_none_or_of_another_entry_is_named() -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2)})
    for call in (
        lambda: sd.reserve(5, shape=(3,), dtype="float32"),
        lambda: sd.insert(["x"], shape=(3,), dtype="float32"),
    ):
        with pytest.raises(TypeError, match=r"expected a torch\.dtype, such as torch\.float32, got 'float32'"):
            call()
    with pytest.raises(TypeError, match=r"expected torch\.float32 for 'a', as its row has, got torch\.int64"):
        sd["a"] = torch.ones(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="only tensors of floating point"):
        sd["new"] = torch.ones(2, dtype=torch.int64)
    assert list(sd) == ["a"]


def test_a_row_that_was_reserved_has_no_name() -> None:
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.ones(2, 2))
    sd.pop("a")
    sd.reserve(5)
    assert sd.names_of(range(len(sd.table((2,))))) == [None, "b", *[None] * (len(sd.table((2,))) - 2)]
    for row in (-1, len(sd.table((2,)))):
        with pytest.raises(IndexError, match=rf"'float32_2' has \d+ rows, got row {row}"):
            sd.names_of([1, row])
