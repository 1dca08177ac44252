"""A process that is forked while other threads are inside methods of a StackedParameterDict.

The bugs that this hunts: a child that waits for ever for a lock of a thread that it has not; one that uses a dictionary
which was caught half-way through a change; one that takes the lock away from the very thread that forked it; one that
copies the names of its parent because it looks them up.
"""

from __future__ import annotations

import gc
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pdrs
from observed import StateKey

SD = pdrs.StackedParameterDict

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def numbered() -> SD:
    return SD.from_tensor(["a", "b", "c"], torch.arange(6.0).reshape(3, 2))


def in_child(check: Callable[[], object]) -> bool:
    """Whether a check in a forked process is true; one that hangs is ended by the system."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are what is tested
        process = os.fork()
    if process == 0:
        signal.alarm(20)
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@contextmanager
def inside(sd: SD) -> Iterator[None]:
    """Keep another thread inside an insertion that it has planned and not made."""
    held, done = threading.Event(), threading.Event()

    def init(_: Tensor) -> None:
        held.set()
        done.wait(60)

    thread = threading.Thread(target=lambda: sd.gather(["new"], missing="insert", init=init))
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "use",
    [
        lambda sd: sd["b"].tolist() == [2.0, 3.0],
        lambda sd: list(sd.state_dict()) == ["float32_2", "_extra_state"],
        lambda sd: sd.pop("c").tolist() == [4.0, 5.0] and list(sd) == ["a", "b"],
        lambda sd: sd.update({"new": torch.ones(2)}) is None and sd["new"].tolist() == [1.0, 1.0],
        lambda sd: list(sd.copy()) == ["a", "b", "c"],
    ],
    ids=["getitem", "state_dict", "pop", "update", "copy"],
)
def test_a_child_uses_a_dictionary_that_another_thread_was_inside_of(use: Callable[[SD], bool]) -> None:
    sd = numbered()
    with inside(sd):
        assert in_child(lambda: use(sd))
    assert list(sd) == ["a", "b", "c", "new"]


def test_threads_of_a_child_take_turns_as_ever() -> None:
    sd = numbered()

    def check() -> bool:
        def work(at: int) -> None:
            for turn in range(20):
                sd[f"{at}.{turn}"] = torch.full((2,), float(at))

        threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(sd) == 83 and all(row[0] == float(name.split(".")[0]) for name, row in list(sd.items())[3:])

    with inside(sd):
        assert in_child(check)


def test_a_child_of_a_child_is_not_stopped_by_what_either_left() -> None:
    sd, other = numbered(), numbered()

    def check() -> bool:
        with inside(other):
            return in_child(lambda: [sd["a"], other["a"]]) and sd["a"].tolist() == [0.0, 1.0]

    with inside(sd):
        assert in_child(check)


def test_a_dictionary_that_was_caught_half_way_says_so_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    sd, other = numbered(), numbered()
    keys = [StateKey(), StateKey()]
    optimizer = torch.optim.SGD(sd.parameters())
    sd.attach_optimizer(optimizer, initial_state=dict.fromkeys(keys, 0.0))
    optimizer.state[sd.table((2,))] = {key: torch.ones(3, 2) for key in keys}
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        try:
            sd["a"]
        except RuntimeError:  # nobody is let in, because the change is being made
            begun.set()
            go.wait(60)

    monkeypatch.setattr(StateKey, "asked", wait)
    thread = threading.Thread(target=sd.update, args=({"new": torch.ones(2)},))  # for which the table grows
    thread.start()
    assert begun.wait(60)

    def check() -> bool:
        for use in (lambda: sd["a"], lambda: sd.pop("a"), lambda: sd.state_dict(), lambda: sd.copy()):
            with pytest.raises(RuntimeError, match="was being changed by another thread when this process was forked"):
                use()
        return other["a"].tolist() == [0.0, 1.0]

    try:
        assert in_child(check)
    finally:
        go.set()
        thread.join()
    assert list(sd) == ["a", "b", "c", "new"]  # in the parent, the change was made


def test_the_thread_that_forks_goes_on_with_what_it_was_at() -> None:
    sd, is_fine = numbered(), []

    def init(new: Tensor) -> None:
        new.fill_(7)
        is_fine.append(in_child(lambda: [other_thread_waits(sd), sd["a"]]))

    def other_thread_waits(sd: SD) -> None:
        waiting = threading.Thread(target=lambda: sd.pop("a"), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()

    sd.gather(["new"], missing="insert", init=init)
    assert is_fine == [True]
    assert in_child(lambda: sd["new"].tolist() == [7.0, 7.0])


def test_a_fork_comes_through_while_threads_wait() -> None:
    sd = numbered()
    with inside(sd):
        waiting = [threading.Thread(target=lambda: sd["a"]) for _ in range(4)]
        for thread in waiting:
            thread.start()
        assert all(in_child(lambda: sd["b"].tolist() == [2.0, 3.0]) for _ in range(5))
    for thread in waiting:
        thread.join()


def test_optimizers_are_watched_in_a_child_that_was_forked_while_another_thread_began_to() -> None:
    from pdrs._rows import optimizer_state

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with optimizer_state._hook_lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(lambda: numbered()["a"].tolist() == [0.0, 1.0])
    finally:
        done.set()
        thread.join()


def test_a_fork_whose_hooks_run_python_code_comes_through_while_threads_give_the_lock_back() -> None:
    program = """
import os, sys, threading, time
import torch
os.register_at_fork(after_in_parent=lambda: time.sleep(0.01))  # before our own, which is registered later
import pdrs
sys.setswitchinterval(1e-5)
sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(100)], torch.ones(100, 2))
going = True
def use():
    while going:
        sd["n1"] = torch.zeros(2)
        sd.norms()
threads = [threading.Thread(target=use, daemon=True) for _ in range(3)]
for one in threads:
    one.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
going = False
for one in threads:
    one.join()  # Python ends threads that are in C++ code by ending the process
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux counts the pages of a process")
@pytest.mark.parametrize("is_opened", [True, False], ids=["opened", "in memory"])
def test_a_child_that_looks_each_name_up_copies_no_pages_of_names(is_opened: bool, tmp_path: Path) -> None:
    count, batch = 200_000, 4_000
    made = SD.from_tensor([f"name.{at:09d}" for at in range(count)], torch.zeros(count, 1))
    pdrs.save(made, tmp_path / "names", sync=False)
    sd = pdrs.open(tmp_path / "names") if is_opened else made

    def look(names: list[str]) -> None:
        for start in range(0, len(names), batch):
            assert len(sd.indices(names[start : start + batch])) == batch
        assert all(name in sd for name in names)

    def check() -> bool:
        gc.disable()
        names = [f"name.{at:09d}" for at in range(count)]
        look(names[:batch])  # the first time copies pages of other things
        before = pages_of_its_own()
        look(names)
        copied = pages_of_its_own() - before
        before = pages_of_its_own()
        deque(sd, maxlen=0)
        # The `str` objects of all names would have 3,100 pages, and reference counts that a walk writes to.
        return copied < 1_000 and pages_of_its_own() - before < 1_000

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert in_child(check)
    finally:
        torch.set_num_threads(threads)


def pages_of_its_own() -> int:
    """Count the pages that this process has written to since it was forked."""
    (line,) = re.findall(r"^Private_Dirty: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(line) * 1024 // mmap.PAGESIZE
