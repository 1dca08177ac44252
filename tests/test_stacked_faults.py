"""What fails half-way in a StackedParameterDict leaves it as it was, or loses nothing but room.

The bugs that this hunts: a state dict that is refused when some tables have its rows and others do not, so that names
give rows of other names; a free row that still has a name, or two names of one row, after an error between two
steps; a table that nobody asked for, left by what failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from pdrs._stacked import tables

SD = pdrs.StackedParameterDict
ENTRIES = [("a", (2,)), ("b", (2,)), ("c", (3,)), ("d", (3,)), ("e", (4,))]


def numbered(entries: list[tuple[str, tuple[int, ...]]], first: int = 1) -> pdrs.StackedParameterDict:
    return SD([(name, torch.full(shape, float(at))) for at, (name, shape) in enumerate(entries, first)])


def trained() -> tuple[pdrs.StackedParameterDict, torch.optim.Optimizer]:
    """Return a dictionary whose names differ in value, gradient, moments and mask, and its optimizer."""
    sd = numbered(ENTRIES)
    optimizer = torch.optim.Adam(sd.parameters(), lr=0.0)
    sd.attach(optimizer)
    for _ in range(2):
        sum((sd[name].sum() * at for at, name in enumerate(sd, 1)), torch.zeros(())).backward()
        optimizer.step()
    sd.freeze(["b", "d"])
    return sd, optimizer


def seen(sd: pdrs.StackedParameterDict, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that there is to see of every name, and of the tables."""
    found: dict[str, Any] = {"tables": [(name, id(table), len(table)) for name, table in sd.named_parameters()]}
    found["held"] = [[id(table) for table in group["params"]] for group in optimizer.param_groups]
    found["groups"] = [table.group for table in sd._tables], sd._patterns
    for name, gradient in sd.named_grads():
        table = sd[name]._base
        row = int(sd.rows([name]))
        moments = [value[row].tolist() for value in optimizer.state[table].values() if value.dim()]
        mask = next(one.frozen for one in sd._tables if sd._parameter(one) is table)
        frozen = mask is not None and bool(mask[row])
        found[f"name {name}"] = sd[name].tolist(), gradient.tolist(), moments, frozen
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


def test_loading_without_memory_for_one_of_the_tables_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = numbered(OTHERS, 50).state_dict()
    arrange, zeros = tables._Arranged.__call__, torch.zeros
    allowed = 0
    while True:
        sd, optimizer = trained()
        before = seen(sd, optimizer)
        calls = 0

        def limited(allocate: Callable[..., Tensor], limit: int) -> Callable[..., Tensor]:
            def counted(*arguments: Any, **keywords: Any) -> Tensor:
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise torch.OutOfMemoryError("no memory")
                return allocate(*arguments, **keywords)

            return counted

        monkeypatch.setattr(tables._Arranged, "__call__", limited(arrange, allowed))
        monkeypatch.setattr(torch, "zeros", limited(zeros, allowed))
        try:
            sd.load_state_dict(state)
            break
        except RuntimeError as error:
            message = str(error)
        finally:
            monkeypatch.undo()
        assert "no memory" in message
        assert seen(sd, optimizer) == before, allowed
        allowed += 1
    assert allowed > 6, "data, gradients, moments and masks of two tables, and a new table"
    assert {name: row.tolist() for name, row in sd.items()} == {
        name: [float(at)] * shape[0] for at, (name, shape) in enumerate(OTHERS, 50)
    }


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
    rows = sd.rows(list(sd)).tolist()
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
    with pytest.raises((TypeError, re.error), match=r"mapping|unterminated"):
        sd.optimizer_groups(by=by)
    assert seen(sd, optimizer) == before


@pytest.mark.parametrize("pop", [lambda sd: sd.pop("b"), lambda sd: sd.popitem()], ids=["pop", "popitem"])
def test_a_name_whose_row_cannot_be_copied_stays(pop: Callable[[SD], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sd = SD.from_rows(["a", "b"], torch.ones(2, 1 << 15))  # so large that torch makes the copy

    def fail(_: SD, __: object, ___: int) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SD, "_copy_of_row", fail)
        with pytest.raises(MemoryError):
            pop(sd)
    assert (list(sd), len(sd._tables[0].rows)) == (["a", "b"], 2)
    pop(sd)
    assert list(sd) == ["a"]
