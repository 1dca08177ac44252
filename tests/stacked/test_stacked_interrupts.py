"""Whatever stops a change of a StackedParameterDict half-way, the dictionary is as before it, or as after it.

The bugs that this hunts: names that give rows, gradients, moments or masks of other names, because Ctrl-C or a want of
memory came between two steps that belong together; a name that is lost; a table, or a place in an optimizer, that
nobody asked for; a handle or packed names that are taken for up to date. Nothing here depends on time: each change is
made again and again, and stopped at one place after another.
"""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from observed import OURS, assert_consistent, frozen_names, read_names

# What is raised while a generator is closed goes no further, as anywhere in Python.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SD = pdrs.StackedParameterDict


class Scene:
    """A dictionary that is trained: its names differ in value, gradient, moments and mask; some rows are free."""

    def __init__(self, sparse: bool) -> None:
        entries = {"a": 2, "b": 2, "gone": 2, "c": 2, "d": 3, "lost": 3, "e": 3, "f": 4}
        self.sd = SD([(name, torch.full((size,), float(at))) for at, (name, size) in enumerate(entries.items(), 1)])
        self.optimizer = torch.optim.Adam(self.sd.parameters(), lr=0.0)
        self.sd.attach_optimizer(self.optimizer)
        for _ in range(2):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()
        if sparse:
            self.optimizer.zero_grad()
            self.backward(sparse=True)
        self.sd.freeze(["b", "d"])
        self.sd.drop(["gone", "lost"])
        self.handles = {name: self.sd.lookup([name]) for name in ("a", "c")}
        self.sd.state_dict()  # from now on packed names are kept

    def backward(self, sparse: bool = False) -> None:
        terms = [self.sd.gather([name], sparse=sparse).sum() * at for at, name in enumerate(self.sd, 1)]
        torch.stack(terms).sum().backward()

    def seen(self) -> dict[str, Any]:
        """Return all that there is to see, name by name; fails if it does not fit together."""
        sd, state = self.sd, self.optimizer.state
        names = assert_consistent(sd)
        tables = dict(sd.named_parameters())
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        assert set(map(id, state)) <= set(map(id, held)), "state of what the optimizer does not have"
        attributes = {id(table): name for name, table in tables.items()}
        found: dict[str, Any] = {
            "tables": list(tables),
            "held": [attributes.get(id(table), "?") for table in held],
            "options": ([table.group for table in names.tables], names.patterns),
            "names": list(sd),
        }
        assert [table.attribute for table in names.tables] == list(tables)
        for parameter in tables.values():
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            assert all(value.shape == parameter.shape for value in state.get(parameter, {}).values() if value.dim())
        gradients, frozen = dict(sd.named_grads()), frozen_names(sd)
        for name, row in sd.items():
            at, parameter = int(sd.indices([name])), row._base
            moments = [value[at].tolist() for value in state.get(parameter, {}).values() if value.dim()]
            gradient = gradients[name].tolist() if name in gradients else None
            found[f"name {name}"] = row.tolist(), gradient, moments, name in frozen
        for name, handle in self.handles.items():
            if name in sd:
                assert torch.equal(sd.gather(handle)[0], sd[name]), "a handle is not up to date"
            else:
                with pytest.raises(KeyError):
                    sd.gather(handle)
        return found

    def room(self) -> list[Any]:
        """Return what else may have been left: rows that were ever given, others that are spare, and hooks."""
        used = {table.attribute: table.used for table in read_names(self.sd.get_extra_state()).tables}
        tables = self.sd.named_parameters()
        return [(used[name], len(table), len(table._backward_hooks or ())) for name, table in tables]

    def goes_on(self) -> None:
        """Use it: fails if what was left cannot be used, or other names change."""
        sd = self.sd
        before = {name: row.tolist() for name, row in sd.items()}
        frozen = {name for name, (*_, is_frozen) in list(self.seen().items())[4:] if is_frozen}
        sd.update([(f"new {at}", torch.full((size,), -1.0 - at)) for at, size in enumerate([2, 2, 2, 3, 3, 5])])
        self.optimizer.zero_grad()
        self.backward()
        for name, gradient in sd.named_grads():
            assert bool(gradient.any()) == (f"name {name}" not in frozen), name
        self.optimizer.step()
        sd.compact()
        self.seen()
        assert {name: sd[name].tolist() for name in before} == before


def as_archive(names: dict[str, int]) -> dict[str, Tensor]:
    entries = [(name, torch.full((size,), 50.0 + at)) for at, (name, size) in enumerate(names.items())]
    return dict(SD(entries).state_dict())


def update(scene: Scene) -> None:
    scene.sd.update([("a", torch.ones(2)), ("x", torch.ones(2)), ("f", torch.ones(4)), ("y", torch.ones(2)),
                     ("z", torch.ones(5)), ("d", torch.ones(2))])  # fmt: skip


def update_with_growth(scene: Scene) -> None:
    scene.sd.update([(f"x{at}", torch.full((2 + at % 2,), 1.0 + at)) for at in range(12)])


def set_one(scene: Scene) -> None:
    scene.sd["x"] = torch.ones(2)


def move_one(scene: Scene) -> None:
    scene.sd["a"] = torch.ones(6)


def scatter(scene: Scene) -> None:
    scene.sd.scatter(["x", "a", "y", "b"], torch.full((4, 2), 9.0), missing="insert")


def gather(scene: Scene) -> None:
    scene.sd.gather([f"x{at}" for at in range(7)] + ["a"], missing="insert")


def gather_of_a_new_shape(scene: Scene) -> None:
    scene.sd.gather(["x"], missing="insert", shape=(6,))


def drop(scene: Scene) -> None:
    scene.sd.drop(["e", "a"])


def delete(scene: Scene) -> None:
    del scene.sd["a"]


def pop(scene: Scene) -> None:
    scene.sd.pop("a")


def popitem(scene: Scene) -> None:
    scene.sd.popitem(last=False)


def clear(scene: Scene) -> None:
    scene.sd.clear()


def freeze(scene: Scene) -> None:
    scene.sd.freeze(["a", "e", "f"])


def unfreeze(scene: Scene) -> None:
    scene.sd.unfreeze(["b", "d", "e"])


def reserve(scene: Scene) -> None:
    scene.sd.reserve(20, shape=(2,))


def reserve_a_table(scene: Scene) -> None:
    scene.sd.reserve(20, shape=(7,))


def compact(scene: Scene) -> None:
    scene.sd.compact()


def regroup(scene: Scene) -> None:
    scene.sd.param_groups(by={"[ae]": {"lr": 0.0}})


def load_own(scene: Scene) -> None:
    state = scene.sd.state_dict()
    scene.sd.load_state_dict({key: value if key == "_extra_state" else value + 100 for key, value in state.items()})


def load_others(scene: Scene) -> None:
    scene.sd.load_state_dict(as_archive({"c": 2, "b": 2, "x": 2, "e": 3, "z": 5, "d": 3}))


def load_named(scene: Scene) -> None:
    scene.sd.load_state_dict({name: value + 100 for name, value in scene.sd.named_state_dict().items()})


WHOLE = [
    update, update_with_growth, set_one, move_one, scatter, gather, gather_of_a_new_shape, drop, delete, pop, popitem,
    clear, freeze, unfreeze, reserve, reserve_a_table, compact, regroup,
]  # fmt: skip
# The values of names are loaded a table at a time, as torch does; what else there is of them changes in one step.
BY_TABLE = [load_own, load_others, load_named]


class Stop:
    """Raises an error at the event of a number, of those that happen inside, and notes where each of them is."""

    error: type[BaseException] = KeyboardInterrupt

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.places: list[tuple[Any, ...]] = []

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _note(self, *place: Any) -> None:
        self.places.append(place)
        if len(self.places) == self.at + 1:
            raise self.error

    def chosen(self) -> list[int]:
        """Return the events to stop at: of each place the first two and the last, for the sake of loops."""
        visits: dict[tuple[Any, ...], list[int]] = {}
        for at, place in enumerate(self.places):
            visits.setdefault(place, []).append(at)
        return sorted({at for each in visits.values() for at in (*each[:2], each[-1])})


class AtLines(Stop):
    """A KeyboardInterrupt in front of a line of ours.

    Not of one in a ``finally`` block, nor where a ``with`` block ends, nor of ``try`` itself: Python begins these
    without a look at signals, and what is raised at ``try`` leaves a ``with`` around it without its end.
    """

    def __enter__(self) -> Stop:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line" and frame.f_lineno not in shielded(frame.f_code.co_filename):
            self._note(frame.f_code.co_filename, frame.f_lineno)
        return self._trace


@cache
def shielded(file: str) -> frozenset[int]:
    """Return the numbers of the lines in ``finally`` blocks, and of those of ``try`` and ``with`` themselves.

    And, from Python 3.12 on, of comprehensions, which run in the function around them: what a trace function raises in
    one passes the handlers of that function.
    """
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.With):
            lines.add(node.lineno)
        elif isinstance(node, ast.Try):
            lines.add(node.lineno)
            for last in node.finalbody:
                lines.update(range(last.lineno, (last.end_lineno or last.lineno) + 1))
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp) and sys.version_info >= (3, 12):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


class AtCalls(Stop):
    """A KeyboardInterrupt where Python looks at signals: where a function begins, and behind a call of native code."""

    def __enter__(self) -> Stop:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event in ("call", "c_return") and called is not sys.setprofile:
            self._note(frame.f_code.co_filename, frame.f_lineno, event, getattr(called, "__name__", None))


class OutOfMemory(AtCalls):
    """A want of memory in native code that ours calls."""

    error = MemoryError

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if (
            event == "c_call"
            and called.__name__ not in ("setprofile", "__exit__")
            and frame.f_code.co_filename.startswith(OURS)
        ):
            self._note(frame.f_code.co_filename, frame.f_lineno, called.__name__)


def run(scene: Scene, change: Callable[[Scene], None], stop: Stop) -> None:
    """Make a change that is stopped."""
    # Not where the collector has called a finalizer, in which what is raised goes nowhere: CPython 3.11 then frees the
    # profile function that raised, and calls it.
    gc.disable()
    try:
        with stop:
            change(scene)
    except (KeyboardInterrupt, Exception):
        # What numpy or torch make of it does not matter here.
        if len(stop.places) <= stop.at or stop.at < 0:
            raise
    finally:
        gc.enable()
        torch.set_grad_enabled(True)  # which torch does not put back if it is stopped in `no_grad` itself


def assert_unlocked(sd: SD) -> None:
    """Fail if another thread cannot change the dictionary."""
    thread = Thread(target=sd.drop, args=([],), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the lock has not been given back"


def but_values(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value[1:] if key.startswith("name ") else value for key, value in seen.items()}


def whole(seen: dict[str, Any]) -> dict[str, Any]:
    return seen


def failures(change: Callable[[Scene], None], kind: type[Stop], sparse: bool) -> list[str]:
    """Stop a change everywhere, and return where it was neither made nor not made, or could not be gone on from."""
    compared = but_values if change in BY_TABLE else whole
    run(Scene(sparse), change, Stop())  # what is done only once has been done
    scene, everywhere = Scene(sparse), kind()
    unchanged = scene.seen(), scene.room()
    run(scene, change, everywhere)
    before, after = compared(unchanged[0]), compared(scene.seen())
    found, known, scene = [], [], None
    for at in everywhere.chosen():
        # A scene that is as it was is used again: to make one takes several times as long as the change.
        stop, again = kind(at), scene is not None
        scene = scene or Scene(sparse)
        try:
            run(scene, change, stop)
            if again and stop.places[at:] != [everywhere.places[at]]:  # it was not as it had been after all
                stop, scene = kind(at), Scene(sparse)
                run(scene, change, stop)
            assert_unlocked(scene.sd)
            left = scene.seen(), scene.room()
            assert compared(left[0]) in (before, after), "neither before nor after"
            if left not in known:
                scene.goes_on()
                known.append(left)
                scene = None
            elif left != unchanged:
                scene = None
        except Exception as error:
            found.append(f"{everywhere.places[at]}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            scene = None
    assert len(everywhere.places) >= 3
    return found


# Those that take seconds, because they have many steps.
LONG = {
    update,
    update_with_growth,
    move_one,
    scatter,
    gather,
    gather_of_a_new_shape,
    regroup,
    compact,
    reserve,
    *BY_TABLE,
}


def cases(kinds: list[type[Stop]], changes: list[Callable[[Scene], None]]) -> list[Any]:
    made = []
    for kind, change in product(kinds, changes):
        marks = [pytest.mark.slow] if change in LONG else []
        made.append(pytest.param(change, kind, marks=marks, id=f"{change.__name__}-{kind.__name__}"))
    return made


@pytest.mark.parametrize(("change", "kind"), cases([AtLines, AtCalls, OutOfMemory], [*WHOLE, *BY_TABLE]))
def test_a_change_that_is_stopped_anywhere_was_made_or_was_not(
    change: Callable[[Scene], None], kind: type[Stop]
) -> None:
    assert failures(change, kind, sparse=False) == []


@pytest.mark.parametrize(
    ("change", "kind"), cases([AtLines, AtCalls], [update, drop, pop, freeze, compact, load_others])
)
def test_a_change_with_sparse_gradients_that_is_stopped_anywhere_was_made_or_was_not(
    change: Callable[[Scene], None], kind: type[Stop]
) -> None:
    assert failures(change, kind, sparse=True) == []
