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
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from pdrs._rows.names_codec import unpack

# What is raised while a generator is closed goes no further, as anywhere in Python.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SD = pdrs.StackedParameterDict
OURS = str(Path(pdrs.__file__).parent)


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
        tables = [parameter for _, parameter in sd.named_parameters()]
        assert [sd._parameter(table) for table in sd._tables] == tables
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        assert set(map(id, state)) <= set(map(id, held)), "state of what the optimizer does not have"
        found: dict[str, Any] = {
            "tables": [name for name, _ in sd.named_parameters()],
            "held": [next((name for name, one in sd.named_parameters() if one is table), "?") for table in held],
            "options": ([table.group for table in sd._tables], sd._patterns),
            "names": list(sd),
        }
        for table, parameter in zip(sd._tables, tables, strict=True):
            rows = sorted(sd.indices([name]).item() for name in sd if sd[name]._base is parameter)
            free = table.rows.free().tolist()
            assert len({*rows, *free}) == len(rows) + len(free), "two names have one row, or a free one has a name"
            assert max([*rows, *free], default=-1) < table.rows.used <= len(parameter)
            assert table.frozen is None or len(table.frozen) == len(parameter)
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
            assert all(value.shape == parameter.shape for value in state.get(parameter, {}).values() if value.dim())
        gradients = dict(sd.named_grads())
        for name, row in sd.items():
            at, parameter = int(sd.indices([name])), row._base
            moments = [value[at].tolist() for value in state.get(parameter, {}).values() if value.dim()]
            mask = next(table.frozen for table in sd._tables if sd._parameter(table) is parameter)
            gradient = gradients[name].tolist() if name in gradients else None
            found[f"name {name}"] = row.tolist(), gradient, moments, mask is not None and bool(mask[at])
        assert list(unpack(sd.get_extra_state())[0]) == list(sd), "packed names are not up to date"
        for name, handle in self.handles.items():
            if name in sd:
                assert torch.equal(sd.gather(handle)[0], sd[name]), "a handle is not up to date"
            else:
                with pytest.raises(KeyError):
                    sd.gather(handle)
        return found

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
    """Return the numbers of the lines in ``finally`` blocks, and of those of ``try`` and ``with`` themselves."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.With):
            lines.add(node.lineno)
        elif isinstance(node, ast.Try):
            lines.add(node.lineno)
            for last in node.finalbody:
                lines.update(range(last.lineno, (last.end_lineno or last.lineno) + 1))
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


def make(change: Callable[[Scene], None], stop: Stop, sparse: bool) -> Scene:
    """Return what has been left by a change that was stopped."""
    scene = Scene(sparse)
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
    return scene


def but_values(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value[1:] if key.startswith("name ") else value for key, value in seen.items()}


def whole(seen: dict[str, Any]) -> dict[str, Any]:
    return seen


def failures(change: Callable[[Scene], None], kind: type[Stop], sparse: bool) -> list[str]:
    """Stop a change everywhere, and return where it was neither made nor not made, or could not be gone on from."""
    compared = but_values if change in BY_TABLE else whole
    make(change, Stop(), sparse)  # what is done only once has been done
    before, everywhere = compared(Scene(sparse).seen()), kind()
    after = compared(make(change, everywhere, sparse).seen())
    found, known = [], []
    for at in everywhere.chosen():
        stop = kind(at)
        try:
            scene = make(change, stop, sparse)
            with pytest.raises(RuntimeError, match="does not hold"):  # it has been given back
                scene.sd._lock.__exit__(None, None, None)
            with scene.sd._lock.change():
                pass
            seen = compared(scene.seen())
            assert seen in (before, after), "neither before nor after"
            left = seen, [(table.rows.used, len(table.handles), table.resized) for table in scene.sd._tables]
            if left not in known:
                scene.goes_on()
                known.append(left)
        except Exception as error:
            found.append(f"{everywhere.places[at]}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    assert len(everywhere.places) >= 3
    return found


@pytest.mark.parametrize("kind", [AtLines, AtCalls, OutOfMemory])
@pytest.mark.parametrize("change", [*WHOLE, *BY_TABLE], ids=lambda change: change.__name__)
def test_a_change_that_is_stopped_anywhere_was_made_or_was_not(
    change: Callable[[Scene], None], kind: type[Stop]
) -> None:
    assert failures(change, kind, sparse=False) == []


@pytest.mark.parametrize("kind", [AtLines, AtCalls])
@pytest.mark.parametrize(
    "change", [update, drop, pop, freeze, compact, load_others], ids=lambda change: change.__name__
)
def test_with_sparse_gradients_too(change: Callable[[Scene], None], kind: type[Stop]) -> None:
    assert failures(change, kind, sparse=True) == []
