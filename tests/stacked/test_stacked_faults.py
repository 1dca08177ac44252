"""What fails half-way in a StackedParameterDict leaves it as it was, or loses nothing but room.

The bugs that this hunts: a state dict that is refused when some tables have its rows and others do not, so that names
give rows of other names; a free row that still has a name, or two names of one row, after an error between two
steps; a table that nobody asked for, left by what failed.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import pdrs
from observed import NoMemory, assert_consistent, frozen_names

SD = pdrs.StackedParameterDict
ENTRIES = [("a", (2,)), ("b", (2,)), ("c", (3,)), ("d", (3,)), ("e", (4,))]


def numbered(entries: list[tuple[str, tuple[int, ...]]], first: int = 1) -> pdrs.StackedParameterDict:
    return SD([(name, torch.full(shape, float(at))) for at, (name, shape) in enumerate(entries, first)])


def trained() -> tuple[pdrs.StackedParameterDict, torch.optim.Optimizer]:
    """Return a dictionary whose names differ in value, gradient, moments and mask, and its optimizer."""
    sd = numbered(ENTRIES)
    optimizer = torch.optim.Adam(sd.parameters(), lr=0.0)
    sd.attach_optimizer(optimizer)
    for _ in range(2):
        sum((sd[name].sum() * at for at, name in enumerate(sd, 1)), torch.zeros(())).backward()
        optimizer.step()
    sd.freeze(["b", "d"])
    return sd, optimizer


def seen(sd: pdrs.StackedParameterDict, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that there is to see of every name, and of the store."""
    found: dict[str, Any] = {"tables": [(name, id(table), len(table)) for name, table in sd.named_parameters()]}
    found["held"] = [[id(table) for table in group["params"]] for group in optimizer.param_groups]
    names = assert_consistent(sd)
    found["groups"] = [table.group for table in names.tables], names.patterns
    frozen = frozen_names(sd)
    for name, gradient in sd.named_grads():
        table = sd[name]._base
        row = int(sd.indices([name]))
        moments = [value[row].tolist() for value in optimizer.state[table].values() if value.dim()]
        found[f"name {name}"] = sd[name].tolist(), gradient.tolist(), moments, name in frozen
    assert len(found) == 3 + len(sd)
    return found


# What has rows of the same tables in another order, fewer of one and more of another, and a table that is new.
OTHERS = [("b", (2,)), ("d", (3,)), ("c", (3,)), ("f", (3,)), ("g", (5,))]


@pytest.mark.parametrize(
    ("table", "what"),
    [("float32_2", "too short"), ("float32_3", "too short"), ("float32_5", "too short"), ("float32_5", "missing")],
)
def test_a_state_dict_with_a_table_that_does_not_fit_changes_nothing(table: str, what: str) -> None:
    sd, optimizer = trained()
    before = seen(sd, optimizer)
    state = numbered(OTHERS, 50).state_dict()
    if what == "too short":
        state[table] = state[table][:0]
        message = f"the table '{table}' has 0 rows"
    else:
        del state[table]
        message = f"the table '{table}' is missing"
    with pytest.raises(RuntimeError, match=message):
        sd.load_state_dict(state)
    assert seen(sd, optimizer) == before


def test_loading_without_memory_for_one_of_the_tables_changes_nothing() -> None:
    state = numbered(OTHERS, 50).state_dict()
    expected = {name: [float(at)] * shape[0] for at, (name, shape) in enumerate(OTHERS, 50)}
    failures = 0
    while True:
        sd, optimizer = trained()
        before = seen(sd, optimizer)
        with NoMemory(failures) as memory, contextlib.suppress(RuntimeError):
            sd.load_state_dict(state)
        if list(sd) != [name for name, _ in ENTRIES]:
            break  # the names have been loaded
        assert seen(sd, optimizer) == before, failures
        assert memory.made > failures
        failures += 1
    assert failures > 6, "data, gradients, moments and masks of two tables, and a new table"
    sd.load_state_dict(state)
    assert {name: row.tolist() for name, row in sd.items()} == expected


def test_clearing_that_fails_leaves_no_name_with_a_free_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sd = numbered([("a", (2,)), ("b", (2,))])
    sd.gather(["a"], sparse=True).sum().backward()

    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "sort", fails)
    with pytest.raises(torch.OutOfMemoryError):
        sd.clear()
    monkeypatch.undo()
    sd.update([("x", torch.zeros(2)), ("y", torch.ones(2))])
    rows = sd.indices(list(sd)).tolist()
    assert len(set(rows)) == len(rows), "two names have one row"
    assert sd["y"].tolist() == [1.0, 1.0]


def test_room_that_cannot_be_had_leaves_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sd, optimizer = trained()
    before = seen(sd, optimizer)

    def fails(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Tensor, "new_empty", fails)
    with pytest.raises(torch.OutOfMemoryError):
        sd.reserve(10, shape=(7,))
    monkeypatch.undo()
    assert seen(sd, optimizer) == before


@pytest.mark.parametrize("by", [["b"], {"b": 0.1}, {"(": {}}])
def test_groups_that_are_none_move_no_name(by: Any) -> None:
    sd, optimizer = trained()
    before = seen(sd, optimizer)
    with pytest.raises((TypeError, ValueError), match=r"mapping|unterminated"):
        sd.param_groups(by=by)
    assert seen(sd, optimizer) == before


@pytest.mark.parametrize("pop", [lambda sd: sd.pop("b"), lambda sd: sd.popitem()], ids=["pop", "popitem"])
def test_a_name_whose_row_cannot_be_copied_stays(pop: Callable[[SD], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sd = SD.from_tensor(["a", "b"], torch.ones(2, 1 << 15))  # so large that torch makes the copy

    def fail(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "clone", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pop(sd)
    assert list(sd) == ["a", "b"]
    assert_consistent(sd)
    pop(sd)
    assert list(sd) == ["a"]


def test_an_update_that_cannot_write_to_one_table_changes_nothing() -> None:
    with torch.inference_mode():
        sd = SD.from_tensor(["a", "b", "c"], torch.zeros(3, 3))
    sd["t"] = torch.zeros(5)
    with pytest.raises(
        RuntimeError, match="Inplace update to inference tensor: a table that was made in inference mode"
    ):
        sd.update([("a", torch.ones(3)), ("new", torch.ones(5)), ("c", torch.ones(3))])
    assert list(sd) == ["a", "b", "c", "t"]
    sd["u"] = torch.full((5,), 2.0)
    assert sd.indices(["t", "u"]).tolist() == [0, 1]
    assert not sd.gather(["a", "c"]).any()


class Cycle:
    """What only the garbage collector frees, and what it does then."""

    def __init__(self, last_words: Callable[[], object]) -> None:
        self.itself, self.last_words = self, last_words

    def __del__(self) -> None:
        self.last_words()


@pytest.mark.parametrize(
    "change",
    [
        lambda sd: sd.__setitem__("new", torch.full((2,), 100.0)),
        lambda sd: sd.update({"new": torch.full((2,), 100.0), "k1": torch.ones(2)}),
        lambda sd: sd.drop(["k1", "k5"]),
        lambda sd: sd.pop("k1"),
        lambda sd: sd.compact(),
        lambda sd: sd.gather(["k1", "new", "newer"], missing="insert"),
        lambda sd: sd.param_groups(by={"k[1-3]": {}}),
    ],
    ids=["set", "update", "drop", "pop", "compact", "insert", "groups"],
)
@pytest.mark.parametrize(
    "last_words",
    [lambda sd: sd.__setitem__("late", torch.full((2,), 7.0)), lambda sd: sd.pop("k6", None), lambda sd: sd.compact()],
    ids=["set", "pop", "compact"],
)
@pytest.mark.slow
def test_a_finalizer_that_changes_the_dictionary_does_so_before_a_change_or_after_it_or_gets_an_error(
    change: Callable[[SD], Any], last_words: Callable[[SD], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: refused.append(what.exc_value))
    thresholds = gc.get_threshold()
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    try:
        for tracked in range(1, 40):
            gc.disable()
            sd = SD.from_tensor([f"k{n}" for n in range(8)], torch.arange(16.0).reshape(8, 2))
            sd.attach_optimizer(torch.optim.Adam(sd.parameters()))
            sd.pop("k3")
            Cycle(partial(last_words, sd))
            gc.set_threshold(tracked, 1000, 1000)
            gc.enable()
            change(sd)
            gc.disable()
            gc.collect()
            assert_consistent(sd)
            for name, row in sd.items():
                expected = {
                    "late": [7.0, 7.0],
                    "new": [sd["new"][0].item()] * 2 if "new" in sd else [],
                    "newer": [0, 0],
                }
                number = 2.0 * int(name[1:]) if name[1:].isdigit() else 0.0
                assert row.tolist() in (expected.get(name, [number, number + 1]), [1.0, 1.0] if name == "k1" else None)
        assert all("the dictionary is being changed" in str(error) for error in refused), refused
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        if enabled:
            gc.enable()


def test_no_python_function_begins_between_a_write_and_its_being_told() -> None:
    sd = numbered(ENTRIES)
    sd.attach_optimizer(torch.optim.Adam(sd.parameters()))
    begun: list[str] = []
    version, value = sd.table((2,))._version, torch.zeros(2)
    sys.setprofile(lambda frame, event, _: begun.append(frame.f_code.co_name) if event == "call" else None)
    try:
        sd["a"] = value
    finally:
        sys.setprofile(None)
    assert sd.table((2,))._version > version
    assert "increment_version" not in begun


class WhenAsked(TorchFunctionMode):
    """Does something when torch is asked for the time of this number."""

    def __init__(self, time: int, then: Callable[[], Any]) -> None:
        self.time, self.then = time, then
        self.asked = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += 1
        if self.asked == self.time:
            self.then()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("time", [1, 2])
def test_a_row_is_popped_from_where_it_lies_after_a_mode_has_moved_it(time: int) -> None:
    rows = torch.arange(100_000.0).reshape(-1, 2).to(torch.complex64)
    sd = SD.from_tensor([f"k{n}" for n in range(len(rows))], rows.clone())
    with WhenAsked(time, lambda: sd.reserve(10 * len(rows))) as mode:
        popped = sd.pop("k7")
    assert mode.asked >= time
    assert torch.equal(popped, rows[7])
    assert "k7" not in sd
    assert torch.equal(sd["k8"], rows[8])


def test_a_name_is_popped_though_to_ask_for_its_gradient_would_warn() -> None:
    sd = numbered(ENTRIES)
    stand_ins = {name: table * 2 for name, table in sd.named_parameters()}
    popped = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sd = sd

        def forward(self) -> None:
            popped.append(self.sd.pop("b"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.functional_call(Model(), {f"sd.{name}": tensor for name, tensor in stand_ins.items()}, ())
    assert popped[0].tolist() == [4.0, 4.0]
    assert list(sd) == ["a", "c", "d", "e"]


def test_a_number_of_names_that_is_wrong_is_not_believed() -> None:
    for names in (range(1 << 45), range(1 << 60)):
        with pytest.raises(TypeError, match="names must be str, got int"):
            SD.from_tensor(names, torch.zeros(3, 2))
