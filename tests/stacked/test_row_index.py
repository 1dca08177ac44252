"""``RowIndex`` against a dict of places and sets of free rows, and what it refuses.

The bugs that this hunts: a name that has the row of another after plans that are right alone; a refusal, or a plan that
comes too late, which has changed something; arguments that are taken for what they are not; an entry that is written to
a row that has moved while Python code ran.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from itertools import repeat
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch.nn import Module, Parameter

from pdrs import IndexMap, _pickle
from pdrs._core import (
    Lock,
    Places,
    RowIndex,
    pack_names,
    pop_end_entry_row,
    pop_entry_row,
    set_entry_row,
    unpack_names,
)

NAMES = st.sampled_from([*"abcdefgh", "x" * 300, "名前", "\ud800", "a.b"])


def places_of(pairs: list[tuple[int, int]]) -> Places:
    tables, rows = np.array(pairs, np.int64).reshape(-1, 2).T
    return Places.of(tables.copy(), rows.copy())


def plain(places: Places) -> list[tuple[int, int]]:
    return list(zip(places.tables.tolist(), places.rows.tolist(), strict=True))


def index_of(names: str, tables: int = 1) -> RowIndex:
    """Make an index of names of one character, which take turns in the tables."""
    index = RowIndex()
    for _ in range(tables):
        index.add_table()
    index.commit(index.plan_insert(list(names), np.arange(len(names)) % tables))
    return index


class Indexed(RuleBasedStateMachine):
    """An index, and a model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.index = index_of("", 2)
        self.model: dict[str, tuple[int, int]] = {}
        self.used = [0, 0]

    def free(self, table: int) -> list[int]:
        taken = set(self.model.values())
        return [row for row in range(self.used[table]) if (table, row) not in taken]

    @precondition(lambda self: len(self.used) < 4)
    @rule()
    def add_table(self) -> None:
        assert self.index.add_table() == len(self.used)
        self.used.append(0)

    @rule(names=st.lists(NAMES, unique=True), tables=st.lists(st.integers(0, 1), min_size=12, max_size=12))
    def insert(self, names: list[str], tables: list[int]) -> None:
        plan = self.index.plan_insert(names, np.array(tables[: len(names)], np.int64))
        free, new, freed = [self.free(table) for table in range(len(self.used))], [], []
        model = dict(self.model)
        for at, (name, table) in enumerate(zip(names, tables, strict=False)):
            held = model.get(name)
            if held is not None and held[0] == table:
                continue
            if not free[table]:
                free[table].append(self.used[table])
                self.used[table] += 1
            model[name] = table, free[table].pop(0)
            new.append(at)
            freed += [] if held is None else [held]
        moves, inserts = self.index.moves, self.index.inserts
        self.index.commit(plan)
        assert (self.index.moves != moves) == bool(freed)
        assert self.index.inserts != inserts
        assert (plan.new.tolist(), plain(plan.freed)) == (new, freed)
        assert plain(plan.places) == [model[name] for name in names]
        self.model = model

    @rule(names=st.lists(NAMES, unique=True, max_size=4))
    def remove(self, names: list[str]) -> None:
        missing = [name for name in names if name not in self.model]
        if missing:
            with pytest.raises(KeyError) as refused:
                self.index.plan_remove(names)
            assert refused.value.args == (missing[0],)
            return
        plan = self.index.plan_remove(names)
        self.index.commit(plan)
        assert plain(plan.freed) == [self.model.pop(name) for name in names]

    @rule()
    def clear(self) -> None:
        plan = self.index.plan_clear()
        self.index.commit(plan)
        assert plain(plan.freed) == list(self.model.values())
        self.model = {}

    @rule()
    def turn_around(self) -> None:
        counts = [0] * len(self.used)
        for name, (table, _) in reversed(self.model.items()):
            other = (table + 1) % len(self.used)
            self.model[name] = other, counts[other]
            counts[other] += 1
        self.used = [count + 1 for count in counts]
        self.index.commit(self.index.plan_places(places_of(list(self.model.values())), self.used))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        if old in self.model and new not in self.model:
            self.index.commit(self.index.plan_rename(old, new))
            self.model = {new if name == old else name: place for name, place in self.model.items()}
            return
        with pytest.raises(KeyError if old not in self.model else ValueError):
            self.index.plan_rename(old, new)

    @rule(name=NAMES, last=st.booleans())
    def move_to_end(self, name: str, last: bool) -> None:
        if name in self.model:
            self.index.commit(self.index.plan_move_to_end(name, last))
            moved = {name: self.model.pop(name)}
            self.model = self.model | moved if last else moved | self.model

    @rule(protocol=st.integers(-1, pickle.HIGHEST_PROTOCOL))
    def take_a_copy(self, protocol: int) -> None:
        moves = self.index.moves
        made = copy.deepcopy(self.index) if protocol < 0 else pickle.loads(pickle.dumps(self.index, protocol))
        assert made.moves != moves
        self.index = made

    @rule()
    def make_it_of_its_parts(self) -> None:
        if "" not in self.model:
            self.index = RowIndex.of(list(self.model), places_of(list(self.model.values())), self.used)

    @rule()
    def make_it_of_packed_names(self) -> None:
        tables: Any = [(f"table {number}", 0, True, used) for number, used in enumerate(self.used)]
        names, _, _ = unpack_names(pack_names(self.index, tables, []))
        self.index = RowIndex.of_ids(names, self.used)

    @invariant()
    def has_names_places_and_free_rows_of_the_model(self) -> None:
        index, model = self.index, self.model
        assert list(index.entries()) == [(name, *place) for name, place in model.items()]
        assert list(index.entries(reverse=True)) == list(index.entries())[::-1]
        assert list(index) == index.names() == list(model) == list(reversed(index))[::-1]
        assert (len(index), index.table_count) == (len(model), len(self.used))
        asked = [*model, "none", *model]
        assert plain(index.places(asked)) == [model.get(name, (-1, -1)) for name in asked]
        assert [index.find(name) for name in asked] == [model.get(name) for name in asked]
        assert plain(index.places()) == list(model.values())
        assert index.missing([*asked, "other", "none"]) == ["none", "other"]
        for table, used in enumerate(self.used):
            assert (index.used(table), index.free(table).tolist()) == (used, self.free(table))
            rows = np.arange(-1, used + 1)
            names = {place: name for name, place in model.items()}
            assert index.is_taken(table, rows).tolist() == [(table, row) in names for row in rows.tolist()]
            assert index.names_of(table, rows[1:-1]) == [names.get((table, row)) for row in range(used)]
            assert index.count(table) == used - len(self.free(table))
            assert index.next(table, 3).tolist() == [*self.free(table), used, used + 1, used + 2][:3]


TestIndexed = Indexed.TestCase
TestIndexed.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_places_are_sorted_by_table_and_know_what_is_missing() -> None:
    places = places_of([(3, 5), (-1, -1), (0, 2), (3, 1)])
    sorted_places = [(table, at.tolist(), rows.tolist()) for table, at, rows in places.by_table()]
    assert sorted_places == [(0, [2], [2]), (3, [0, 3], [5, 1])]
    assert (places.missing().tolist(), places.is_complete(), places.only_table()) == ([1], False, -1)
    assert plain(places.found()) == [(3, 5), (0, 2), (3, 1)]
    assert (list(places), places[-1], len(places)) == ([(3, 5), (-1, -1), (0, 2), (3, 1)], (3, 1), 4)
    assert [places_of(one).only_table() for one in ([], [(2, 1), (2, 0)], [(2, 1), (-1, -1)])] == [-1, 2, -1]


@pytest.mark.parametrize("change", ["insert", "remove", "add_table", "other index"])
def test_a_plan_that_comes_too_late_changes_nothing(change: str) -> None:
    index = index_of("abc", 2)
    plans = [
        index.plan_insert(["a", "new"], np.array([1, 1])),
        index.plan_remove(["a"]),
        index.plan_clear(),
        index.plan_places(index.places(), [2, 1]),
        index.plan_rename("a", "new"),
        index.plan_move_to_end("a", True),
    ]
    match change:
        case "insert":
            index.commit(index.plan_insert(["d"], np.array([0])))
        case "remove":
            index.commit(index.plan_remove(["c"]))
        case "add_table":
            index.add_table()
        case _:
            index = index.copy()
    before = list(index.entries())
    for plan in plans:
        with pytest.raises(RuntimeError, match="has changed since"):
            index.commit(plan)
    assert list(index.entries()) == before


REFUSED: dict[str, tuple[type[Exception], str, Callable[[RowIndex], Any]]] = {
    "empty": (KeyError, "empty string", lambda index: index.plan_insert([""], np.array([0]))),
    "empty in a table": (KeyError, "empty string", lambda index: RowIndex.of_one_table(["a", ""])),
    "empty in parts": (KeyError, "empty string", lambda index: RowIndex.of([""], places_of([(0, 0)]), [1])),
    "empty rename": (KeyError, "empty string", lambda index: index.plan_rename("a", "")),
    "twice": (ValueError, "'x' is listed twice", lambda index: index.plan_insert(["x", "x"], np.array([0, 0]))),
    "old twice": (ValueError, "'a' is listed twice", lambda index: index.plan_insert(["a", "a"], np.array([0, 0]))),
    "twice in a table": (ValueError, "'a' is listed twice", lambda index: RowIndex.of_one_table(["a", "b", "a"])),
    "twice in parts": (ValueError, "'a' is", lambda index: RowIndex.of(["a", "a"], places_of([(0, 0), (0, 1)]), [2])),
    "removed twice": (KeyError, "'a' is listed twice", lambda index: index.plan_remove(["a", "b", "a"])),
    "removed before": (KeyError, "none", lambda index: index.plan_remove(["a", "none"])),
    "one place for two": (ValueError, "name 1", lambda index: RowIndex.of(["a", "b"], places_of([(0, 0)] * 2), [2])),
    "outside": (ValueError, "name 0", lambda index: RowIndex.of(["a"], places_of([(0, 1)]), [1])),
    "no place": (ValueError, "name 0", lambda index: RowIndex.of(["a"], places_of([(-1, -1)]), [1])),
    "too many rows": (ValueError, "at most", lambda index: RowIndex.of([], places_of([]), [1 << 40])),
    "negative rows": (ValueError, "0 or more", lambda index: RowIndex.of([], places_of([]), [-1])),
    "tables without end": (ValueError, "at most 8388608 t", lambda index: RowIndex.of([], places_of([]), repeat(0))),
    "fewer places": (ValueError, "got 3 names and 1 places", lambda index: index.plan_places(places_of([(0, 0)]), [3])),
    "more tables": (ValueError, "for 1 tables", lambda index: index.plan_places(index.places(), [3, 0])),
    "no table": (IndexError, "no table 7", lambda index: index.plan_insert(["x"], np.array([7]))),
    "table -1": (IndexError, "no table -1", lambda index: index.plan_insert(["x"], np.array([-1]))),
    "rows of no table": (IndexError, "no table 1", lambda index: index.used(1)),
    "row outside": (IndexError, "3 rows, got row 3", lambda index: index.names_of(0, np.array([0, 3]))),
    "row -1": (IndexError, "got row -1", lambda index: index.names_of(0, np.array([-1]))),
    "last table": (ValueError, "has names", lambda index: index.pop_table()),
    "None": (TypeError, "iterable of str", lambda index: index.places(None)),
    "number": (TypeError, "must be str, got int", lambda index: index.find(3)),
    "numbers": (TypeError, "must be str, got int at position 1", lambda index: index.places(["a", 3])),
    "numbers in a table": (TypeError, "got int at position 1", lambda index: RowIndex.of_one_table(["a", 3])),
    "unhashable": (TypeError, "unhashable", lambda index: [] in index),
    "short mask": (ValueError, "3 names", lambda index: index.select([True])),
    "places of other lengths": (
        ValueError,
        "1 tables and 2 rows",
        lambda index: Places.of(np.zeros(1, int), np.ones(2, int)),
    ),
    "negative place": (ValueError, "no row 0 of a table -1", lambda index: places_of([(-1, 0)])),
    "large place": (ValueError, "no row", lambda index: places_of([(0, 1 << 40)])),
    "position": (IndexError, "there are 3", lambda index: index.places()[-4]),
    "capacity": (OverflowError, "rows more", lambda index: index.capacity_for(0, (1 << 64) - 1, 3)),
    "next": (OverflowError, "rows more", lambda index: index.next(0, 1 << 63)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(what: str) -> None:
    index = index_of("abc")
    error, message, call = REFUSED[what]
    with pytest.raises(error, match=message):
        call(index)
    assert list(index.entries()) == [("a", 0, 0), ("b", 0, 1), ("c", 0, 2)]
    index.commit(index.plan_insert(["d"], np.array([0])))
    assert index.find("d") == (0, 3)


def test_a_walk_ends_where_names_change_and_goes_on_where_rows_move() -> None:
    index = index_of("abc", 2)
    walks = [iter(index), reversed(index), index.entries()]
    for walk in walks:
        next(walk)
    index.commit(index.plan_insert(["b"], np.array([0])))
    assert [next(walk) for walk in walks] == ["b", "b", ("b", 0, 2)]
    index.commit(index.plan_remove(["c"]))
    for walk in walks:
        with pytest.raises(RuntimeError, match="changed during iteration"):
            next(walk)


def test_names_are_selected_by_mask_and_by_prefix() -> None:
    index = RowIndex.of_one_table(["a.x", "b.x", "a.", "a", "名a.", "名前"])
    assert index.select(np.array([True, False, True, False, False, True])) == ["a.x", "a.", "名前"]
    assert [index.with_prefix(prefix) for prefix in ("a.", "名", "")] == [
        ["a.x", "a."],
        ["名a.", "名前"],
        index.names(),
    ]


def test_names_below_a_prefix_have_the_rows_that_they_had() -> None:
    index = index_of("", 2)
    index.commit(index.plan_insert(["a.x", "b.x", "a.", "a.名"], np.array([0, 0, 1, 1])))
    below = index.below("a.")
    assert list(below.entries()) == [("x", 0, 0), ("名", 1, 1)]
    assert [below.free(table).tolist() for table in (0, 1)] == [[1], [0]]


@pytest.mark.parametrize(
    "arguments",
    [
        (["a"], b"", b"", (1,)),
        (["a"], b"\0" * 8, b"\1" + b"\0" * 7, (1,)),
        (["a", "a"], b"\0" * 16, b"\0" * 8 + b"\1" + b"\0" * 7, (2,)),
        ([""], b"\0" * 8, b"\0" * 8, (1,)),
        (["a"], b"\xff" * 8, b"\0" * 8, (1,)),
        ([], None, None, (1 << 31,) * 100),
        ([], None, None, (-1,)),
        ([], None, None, [1]),
        ([3], b"\0" * 8, b"\0" * 8, (1,)),
        ("a", b"\0" * 8, b"\0" * 8, (1,)),
        (["a"], "\0" * 8, b"\0" * 8, (1,)),
        (["a"], bytearray(8), b"\0" * 8, (1,)),
    ],
)
def test_a_damaged_pickle_is_refused(arguments: Any) -> None:
    with pytest.raises(UnpicklingError):
        _pickle.row_index(*arguments)


# -- one entry ---------------------------------------------------------------------------------------------------------


class Table:
    """What native code knows of a table."""

    def __init__(self, attribute: str) -> None:
        self.attribute, self.group = attribute, 0
        self.frozen: Tensor | None = None
        self.lent: list[Any] | None = None


class Owner(Module):
    """What native code knows of a StackedParameterDict; ``meanwhile`` is called where Python code may run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Parameter(torch.zeros(4, 2)), Parameter(torch.zeros(2, 3))
        self.meanwhile: Callable[[], object] = int
        self.called: list[str] = []
        tables = [Table("first"), Table("second")]
        self.__dict__.update(_index=index_of("", 2), _tables=tables, _lock=Lock(), _optimizers=[])

    def set(self, name: str, value: Tensor, group: int = 0) -> bool:
        with self.__dict__["_lock"]:
            return set_entry_row(self, name, value, group)

    def _make_ready(self, number: int, row: int) -> bool:
        self.called.append(f"make ready {number} {row}")
        self.meanwhile()
        return False

    def _copy_of_row(self, number: int, row: int) -> Tensor:
        self.called.append(f"copy {number} {row}")
        self.meanwhile()
        table: Tensor = getattr(self, self.__dict__["_tables"][number].attribute)
        return table[row].detach().clone()

    def _clearing(self, number: int, row: int) -> Any:
        self.called.append(f"clear {number} {row}")

        return SimpleNamespace(calls=[])

    @property
    def called_but_copies(self) -> list[str]:
        # torch before 2.14 has no native way to make the copy of a row.
        is_old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
        return [call for call in self.called if not (is_old and call.startswith("copy"))]

    @property
    def index(self) -> RowIndex:
        index: RowIndex = self.__dict__["_index"]
        return index


def test_entries_are_set_and_removed_natively() -> None:
    owner = Owner()
    assert owner.set("a", torch.ones(2))
    assert owner.set("b", torch.full((2,), 2.0))
    assert owner.set("c", torch.ones(3))
    inserts = owner.index.inserts
    assert owner.set("a", torch.full((2,), 3.0))
    assert owner.index.inserts != inserts
    assert list(owner.index.entries()) == [("a", 0, 0), ("b", 0, 1), ("c", 1, 0)]
    assert owner.first[:2].tolist() == [[3.0, 3.0], [2.0, 2.0]]
    moves = owner.index.moves
    row = pop_entry_row(owner, "a")
    assert row is not None
    assert (row.tolist(), owner.first[0].tolist()) == ([3.0, 3.0], [0.0, 0.0])
    assert (owner.index.moves != moves, owner.index.free(0).tolist()) == (True, [0])
    end = pop_end_entry_row(owner, True)
    assert end is not None
    assert (end[0], end[1].tolist()) == ("c", [1.0] * 3)
    assert (pop_entry_row(owner, "a"), owner.called_but_copies) == (None, [])
    owner.called.clear()
    # The row of a removed name is made ready by Python.
    assert owner.set("d", torch.ones(2))
    assert (owner.called, owner.index.find("d")) == (["make ready 0 0"], (0, 0))
    assert pop_end_entry_row(owner, False) is not None
    assert pop_end_entry_row(owner, False) is not None
    assert pop_end_entry_row(owner, False) is None


def test_what_is_unusual_is_left_to_python() -> None:
    owner = Owner()
    values = [torch.ones(5), torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta"), 3, None]
    assert not any(owner.set("a", value) for value in values)
    assert not owner.set("a", torch.ones(2), 1)
    assert not owner.set("", torch.ones(2))
    assert all(owner.set(name, torch.ones(3)) for name in "ab")
    assert not owner.set("c", torch.ones(3))  # the table must grow
    assert not owner.set("a", torch.ones(2))  # of another table
    owner.__dict__["_tables"][1].lent = []
    assert pop_entry_row(owner, "b") is not None
    assert owner.called_but_copies == ["clear 1 1"]


@pytest.fixture(params=["remove", "insert", "other index"])
def interrupted(request: pytest.FixtureRequest) -> tuple[Owner, str]:
    """Give an owner of "b" and "c" in the rows 1 and 2 that changes, once, where Python code may run."""
    owner, change = Owner(), request.param
    assert all(owner.set(name, torch.ones(2)) for name in "abc")
    pop_entry_row(owner, "a")

    def meanwhile() -> None:
        owner.meanwhile = int
        if change == "remove":
            owner.index.commit(owner.index.plan_remove(["b"]))
        elif change == "insert":
            owner.index.commit(owner.index.plan_insert(["new"], np.array([0])))
        else:
            owner.__dict__["_index"] = index_of("b", 2)

    owner.meanwhile = meanwhile
    return owner, change


def test_an_entry_is_not_set_where_python_code_has_changed_rows_meanwhile(interrupted: tuple[Owner, str]) -> None:
    owner, _ = interrupted
    assert not owner.set("d", torch.ones(2))
    assert owner.first[0].tolist() == [0.0, 0.0]
    assert "d" not in owner.index


def test_an_entry_is_copied_again_where_python_code_has_moved_rows_meanwhile(interrupted: tuple[Owner, str]) -> None:
    owner, change = interrupted
    owner.first.data = torch.ones(2, 4).t()  # which torch is to copy
    popped = pop_entry_row(owner, "c")
    assert (popped is None) == (change == "other index")
    assert owner.called.count("copy 0 2") == (2 if change == "remove" else 1)
    assert owner.index.find("c") is None


def test_an_iterator_that_has_ended_keeps_no_names() -> None:
    index = RowIndex.of_one_table([f"name.{n}" for n in range(10)])
    walk = iter(index)
    assert len(list(walk)) == 10
    del index
    gc.collect()
    assert list(walk) == []
    assert not any(isinstance(one, RowIndex | IndexMap) for one in gc.get_referents(walk))


def test_names_with_surrogates_are_made_without_running_code_while_the_index_is_locked() -> None:
    index = RowIndex.of_one_table([f"a\udc80{n}" for n in range(100)])
    finalized = 0

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            nonlocal finalized
            finalized += len(index) == 100 and "a\udc807" in index

    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()  # each collection looks at little then
    try:
        for first in range(2, 120):
            Cycle()
            gc.set_threshold(first, 1000, 1000)
            assert len(list(index)) == len(index.names()) == len(index.with_prefix("a\udc80")) == 100
            gc.set_threshold(*threshold)
            gc.collect()
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    assert finalized == 118
    assert index.names()[0] == "a\udc800"


@pytest.mark.parametrize("text", ["\udfff", "é\ud800", "\U0010ffff\udc00é a", "中\udcff\U00010000", "\ud83d\ude00"])
def test_names_with_surrogates_come_back_as_they_were(text: str) -> None:
    index = RowIndex.of_one_table(["a", text, text + "b"])
    assert index.names() == ["a", text, text + "b"] == list(index)
    assert text in index
    assert text[:-1] not in index
    assert index.with_prefix(text) == [text, text + "b"]


def test_what_is_no_str_is_never_taken_for_a_name() -> None:
    index = RowIndex.of_one_table(["a", "\xff"])
    with pytest.raises(TypeError, match="names must be str, got int at position 1"):
        index.places(["a", 3])
    with pytest.raises(TypeError, match="names must be str, got int at position 1"):
        RowIndex.of_one_table(["a", 3, ""])
    with pytest.raises(KeyError, match="empty"):
        RowIndex.of_one_table(["a", ""])
    with pytest.raises(KeyError, match="empty"):
        RowIndex.of_ids(IndexMap({"": 0}), [1])
