"""From the first entry to the end of the interpreter: garbage, threads, forks, and errors that come midway.

The bugs that this hunts: a reference that the garbage collector does not see, a race that loses an entry or crashes, a
key without a value after an error in the middle of a bulk call, a garbage collector that stays switched off.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules import module as registration

import pdrs

Kind = type[nn.ParameterDict]


class Held:
    """Something that can be asked whether it is gone."""


def filled(kind: Kind, count: int = 3) -> nn.ParameterDict:
    return kind([(f"k{n}", torch.zeros(1)) for n in range(count)])


def in_step(pd: nn.ParameterDict) -> bool:
    """Whether the keys have values, in the order of torch's dict, and the other way round."""
    return list(pd._parameters) == list(pd.keys()) == [key for key, _ in pd.items()]


def run(program: str) -> None:
    """Run a program in an interpreter of its own, which must end well and say nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- garbage -----------------------------------------------------------------------------------------------------------


def test_a_dictionary_and_its_entries_go_with_the_last_reference(kind: Kind) -> None:
    pd = filled(kind)
    pd["held"] = Held()
    pd["child"] = nn.Identity()
    gone = [weakref.ref(one) for one in (pd, *pd.values())]
    gc.collect()
    gc.disable()
    try:
        del pd
        assert not any(ref() for ref in gone), "a cycle where there need be none"
    finally:
        gc.enable()


@pytest.mark.parametrize("remove", ["pop", "popitem", "clear", "del", "replace", "update"])
def test_a_removed_entry_is_not_kept(kind: Kind, remove: str) -> None:
    pd = kind([("x", torch.zeros(1))])
    gone = weakref.ref(pd["x"])
    match remove:
        case "pop":
            pd.pop("x")
        case "popitem":
            pd.popitem()
        case "clear":
            pd.clear()
        case "del":
            del pd["x"]
        case "replace":
            pd["x"] = torch.zeros(1)
        case "update":
            pd.update({"x": torch.zeros(1)})
    assert gone() is None


WALKS: dict[str, Callable[[nn.ParameterDict], Any]] = {
    "iter": iter,
    "reversed": reversed,
    "keys": lambda pd: iter(pd.keys()),
    "values": lambda pd: iter(pd.values()),
    "items": lambda pd: iter(pd.items()),
    "views": lambda pd: (pd.keys(), pd.values(), pd.items()),
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.slow
def test_an_iterator_in_a_cycle_is_collected(kind: Kind, walk: str) -> None:
    pd = filled(kind)
    pd["walk"] = WALKS[walk](pd)
    gone = weakref.ref(pd)
    del pd
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.slow
def test_an_iterator_outlives_its_dictionary(kind: Kind, walk: str) -> None:
    pd = filled(kind)
    kept = WALKS[walk](pd)
    if walk != "views":
        next(kept)
    del pd
    gc.collect()
    assert len(list(kept)) in (2, 3)


def test_a_dictionary_that_holds_itself_is_collected(kind: Kind) -> None:
    pd = filled(kind)
    pd["self"] = [pd]
    gone = [weakref.ref(pd), weakref.ref(pd["k0"])]
    del pd
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def refuse_much(pd: nn.ParameterDict) -> None:
    for refused in (lambda: pd["missing"], lambda: pd.update({"x": Held(), 5: 1}), lambda: pd.update([("x",)])):
        with pytest.raises((KeyError, AttributeError, TypeError, ValueError)):
            refused()


def test_an_exception_keeps_nothing(kind: Kind) -> None:
    pd = filled(kind)
    refuse_much(pd)
    gone = weakref.ref(pd)
    del pd
    gc.collect()
    assert gone() is None


def test_the_work_of_a_collection_in_the_middle_of_an_update_is_allowed(kind: Kind) -> None:
    pd = filled(kind)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for n in range(20):
            gc.collect(1)
            yield f"n{n}", torch.zeros(1)

    pd.update(pairs())
    assert len(pd) == 23
    assert in_step(pd)


# -- errors midway -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["gc on", "gc off"])
def collector(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Switch the garbage collector on or off; the test asks whether it still is."""
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def failing_pairs() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.zeros(1)
    yield "b", torch.zeros(1)
    raise ZeroDivisionError


class Unready:
    def __iter__(self) -> Iterator[Any]:
        raise ZeroDivisionError


class HalfMapping(dict[str, Any]):
    def items(self) -> Any:
        return failing_pairs()


class Unorderable(str):
    def __lt__(self, other: object) -> bool:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "source", [failing_pairs, Unready, HalfMapping, lambda: {Unorderable("z"): 1, "y": 2, Unorderable("x"): 3}]
)
def test_an_iterable_that_raises_midway_leaves_no_key_without_a_value(
    kind: Kind, source: Callable[[], Any], collector: bool
) -> None:
    pd = filled(kind)
    for call in (lambda: pd.update(source()), lambda: kind(source())):
        with pytest.raises(ZeroDivisionError):
            call()
    assert in_step(pd)
    if kind is pdrs.ParameterDict:
        assert len(pd) == 3, "all or nothing"
    assert gc.isenabled() is collector


def test_an_override_that_raises_midway_keeps_what_came_before(kind: Kind, collector: bool) -> None:
    class Fussy(kind):
        def __setitem__(self, key: str, value: Any) -> None:
            if key == "c":
                raise ZeroDivisionError
            super().__setitem__(key, value)

    pd = Fussy({"k": torch.zeros(1)})
    with pytest.raises(ZeroDivisionError):
        pd.update((key, torch.zeros(1)) for key in "abcd")
    assert list(pd) == ["k", "a", "b"]
    assert in_step(pd)
    assert gc.isenabled() is collector


def test_a_registration_hook_that_raises_midway_leaves_no_key_without_a_value(collector: bool) -> None:
    def hook(module: nn.Module, name: str, parameter: Parameter) -> None:
        if name == "b":
            raise ZeroDivisionError

    pd = filled(pdrs.ParameterDict)
    with registration.register_module_parameter_registration_hook(hook):
        for call in (
            lambda: pd.__setitem__("b", torch.zeros(1)),
            lambda: pd.update([("a", torch.zeros(1)), ("b", torch.zeros(1)), ("c", torch.zeros(1))]),
        ):
            with pytest.raises(ZeroDivisionError):
                call()
            assert in_step(pd)
            assert "b" not in pd
            assert gc.isenabled() is collector


def test_a_getitem_that_raises_midway_ends_the_walk(kind: Kind) -> None:
    class Fussy(kind):
        def __getitem__(self, key: str) -> Any:
            if key == "k1":
                raise ZeroDivisionError
            return super().__getitem__(key)

    pd = filled(Fussy)
    for call in (lambda: list(pd.values()), lambda: list(pd.items()), lambda: pd.copy(), lambda: pd.pop("k1")):
        with pytest.raises(ZeroDivisionError):
            call()
    assert list(pd) == list(pd._parameters) == ["k0", "k1", "k2"]


def test_a_finalizer_may_use_the_dictionary(kind: Kind) -> None:
    pd = filled(kind)

    class Last(Held):
        def __del__(self) -> None:
            pd[f"late{len(pd)}"] = torch.zeros(1)
            pd.pop("k0", None) if kind is pdrs.ParameterDict else pd.pop("k0")

    pd["held"] = Last()
    del pd["held"]
    assert list(pd) == ["k1", "k2", "late3"]
    assert in_step(pd)


def test_a_source_that_changes_the_dictionary_meanwhile_is_still_all_taken() -> None:
    pd = filled(pdrs.ParameterDict)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        pd.clear()
        yield "a", torch.zeros(1)
        pd["b"] = torch.zeros(1)
        yield "b", torch.ones(1)

    pd.update(pairs())
    assert list(pd) == ["b", "a"]
    assert pd["b"].item() == 1
    assert in_step(pd)


def test_a_detach_that_changes_the_dictionary_breaks_no_state_dict() -> None:
    class Growing(Parameter):
        def detach(self) -> torch.Tensor:
            pd[f"new{len(pd)}"] = torch.zeros(1)
            return super().detach()

    pd = filled(pdrs.ParameterDict)
    pd["k1"] = Growing(torch.zeros(1))
    assert list(pd.state_dict()) == ["k0", "k1", "k2"]
    assert list(pd) == ["k0", "k1", "k2", "new3"]


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def often() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*works: Callable[[], None]) -> None:
    """Run all at once; raise what one of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def test_two_threads_that_pause_the_collector_leave_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go = threading.Event(), threading.Event()

    class Waits:
        def __deepcopy__(self, memo: Any) -> Waits:
            inside.set()
            go.wait(60)
            return self

    thread = threading.Thread(target=copy.deepcopy, args=(pdrs.ParameterDict({"a": torch.zeros(1), "b": Waits()}),))
    thread.start()
    inside.wait(60)
    isenabled = gc.isenabled

    def and_then_the_other_thread_goes_on() -> bool:
        found = isenabled()
        go.set()
        thread.join()
        return found

    monkeypatch.setattr(gc, "isenabled", and_then_the_other_thread_goes_on)
    copy.deepcopy(filled(pdrs.ParameterDict))
    monkeypatch.undo()
    thread.join()
    assert go.is_set(), "the collector was not paused"
    assert gc.isenabled()


@pytest.mark.usefixtures("often")
def test_threads_that_own_their_keys_lose_none(kind: Kind) -> None:
    pd = kind()
    parameter = Parameter(torch.zeros(1))

    def own(worker: int) -> Callable[[], None]:
        def work() -> None:
            for n in range(500):
                pd[f"{worker}.{n}" if kind is pdrs.ParameterDict else f"{worker}_{n}"] = parameter
                if n % 3 == 0:
                    assert pd.pop(f"{worker}.{n}" if kind is pdrs.ParameterDict else f"{worker}_{n}") is parameter
                if n % 50 == 0:
                    pd.update((f"{worker}bulk{n}x{m}", parameter) for m in range(10))

        return work

    together(*(own(worker) for worker in range(4)))
    assert len(pd) == 4 * (333 + 100)
    assert set(pd._parameters) == set(pd.keys())
    assert all(value is parameter for value in pd.values())


@pytest.mark.usefixtures("often")
def test_an_entry_is_popped_by_one_thread_only() -> None:
    pd = filled(pdrs.ParameterDict, 2000)
    popped: list[str] = []

    def from_an_end(last: bool) -> Callable[[], None]:
        def work() -> None:
            while True:
                try:
                    popped.append(pd.popitem(last)[0])
                except KeyError:
                    return

        return work

    def by_name() -> None:
        popped.extend(key for key in [f"k{n}" for n in range(0, 2000, 3)] if pd.pop(key, None) is not None)

    together(from_an_end(True), from_an_end(True), from_an_end(False), by_name)
    assert sorted(popped) == sorted(f"k{n}" for n in range(2000))
    assert not pd
    assert pd._parameters == {}


@pytest.mark.usefixtures("often")
def test_a_walk_during_changes_ends_or_raises_that_they_happened(kind: Kind) -> None:
    pd = filled(kind, 200)
    parameter = Parameter(torch.zeros(1))
    stop = threading.Event()

    def change() -> None:
        for n in range(1500):
            pd[f"new{n}"] = parameter
            if n >= 5:
                del pd[f"new{n - 5}"]
        stop.set()

    def walk() -> None:
        while not stop.is_set():
            for look in (
                list,
                lambda pd: list(reversed(pd)),
                lambda pd: list(pd.items()),
                lambda pd: list(pd.values()),
            ):
                try:
                    assert 200 <= len(look(pd)) <= 210
                except RuntimeError as error:
                    if "changed" not in str(error):
                        raise
                except (AttributeError, KeyError) as error:
                    if "new" not in str(error):  # Only an entry that is about to go may be missing.
                        raise
            assert pd["k7"] is pd.k7
            assert "k199" in pd

    together(change, walk, walk)
    assert in_step(pd)
    assert len(pd) == 205


@pytest.mark.usefixtures("often")
def test_threads_that_clear_and_fill_the_same_keys_leave_index_and_parameters_in_step() -> None:
    pd = pdrs.ParameterDict()
    parameter = Parameter(torch.zeros(1))
    keys = [f"k{n}" for n in range(20)]

    def fill() -> None:
        for _ in range(30):
            pd.update(zip(keys, [parameter] * 20, strict=True))
            for key in keys:
                pd[key] = parameter

    def empty() -> None:
        for n in range(30):
            pd.clear()
            pd.state_dict()
            pd.pop(keys[n % 20], None)
            for key in keys:
                with suppress(KeyError):
                    del pd[key]

    for _ in range(30):
        together(fill, fill, empty, empty)
        assert set(pd) == set(pd._parameters)
        assert sorted(pd) == sorted(key for key, _ in pd.items())


@pytest.mark.usefixtures("often")
def test_one_iterator_shared_by_threads_gives_each_entry_once() -> None:
    pd = filled(pdrs.ParameterDict, 3000)
    for walk in (iter(pd), iter(pd.values()), iter(pd.items()), reversed(pd.items())):
        seen: list[Any] = []

        def take(walk: Iterator[Any] = walk, seen: list[Any] = seen) -> None:
            seen.extend(walk)

        together(take, take, take)
        assert len(seen) == 3000
        assert len({id(one) if isinstance(one, Parameter) else one for one in seen}) == 3000


# -- processes and interpreters ----------------------------------------------------------------------------------------

NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


@NO_FORK
def test_a_forked_child_uses_the_dictionary() -> None:
    # In an interpreter of its own: pytest's has threads, which a fork would leave behind.
    run(
        """
        import os, torch, pdrs
        torch.set_num_threads(1)
        pd = pdrs.ParameterDict((f"k{n}", torch.ones(1)) for n in range(1000))
        index = pdrs.IndexMap.from_names(list(pd))
        child = os.fork()
        if child == 0:
            try:
                pd.update((f"n{n}", torch.ones(1)) for n in range(1000))
                assert len(list(pd.items())) == 2000
                assert index.indices(list(index)).tolist() == list(range(1000))
                pd.load_state_dict(pd.state_dict())
                pd.double().zero_grad()
                pd.popitem(last=False)
                pd.clear()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(pd) == len(index) == 1000
        """
    )


def test_the_interpreter_ends_quietly_with_live_dictionaries() -> None:
    run(
        """
        import atexit, gc, threading, time, torch, pdrs
        pd = pdrs.ParameterDict((f"k{n}", torch.ones(1)) for n in range(1000))
        pd["self"] = pd["cycle"] = [pd]
        walks = [iter(pd), iter(pd.items()), reversed(pd.values()), pd.keys(), pd.items()]
        for walk in walks[:3]:
            next(walk)
        pd["walks"] = walks

        class Late:
            def __del__(self, pd=pd):
                pd["late"] = 1
                list(pd.items())
                pd.pop("late")

        late = Late()
        pd["late one"] = late
        atexit.register(lambda: pd.update({"at exit": torch.ones(1)}))

        def work():
            while True:
                pd["thread"] = 1
                pd.pop("thread")

        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
        """
    )


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="CPython to 3.12 has subinterpreters under this name")
def test_a_subinterpreter_is_refused_in_one_line() -> None:
    run(
        """
        import sys, _xxsubinterpreters
        program = f"import sys; sys.path[:] = {sys.path}" + '''
        message = "nothing was raised"
        try:
            import pdrs
        except ImportError as error:
            message = str(error)
        # From 3.12 on CPython refuses by itself.
        assert "main interpreter only" in message or "loading in subinterpreters" in message, message
        '''
        _xxsubinterpreters.run_string(_xxsubinterpreters.create(), program)
        """
    )
