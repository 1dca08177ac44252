"""The lock of a StackedParameterDict: threads take turns, and the code that runs inside a change gets an error.

The bugs that this hunts: two threads inside at a time, a lock that is free after its holder has left only the inner of
two blocks, a thread that waits with the GIL (nothing else would run), a waiting thread that is not told, one that
cannot be interrupted, code on the thread of the holder that changes what is being read or changed, a collector that is
left off, and a reference to the lock that is never given back.

``init`` of ``gather`` runs while its thread holds the lock, so the tests look from there.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pdrs

SD = pdrs.StackedParameterDict


def pair() -> SD:
    return SD.from_tensor(["a", "b"], torch.eye(2))


def insert(sd: SD, name: str, init: Callable[[], object]) -> None:
    """Insert a name, and call ``init`` while the dictionary is being changed."""

    def call(_: torch.Tensor) -> None:
        init()

    sd.gather([name], missing="insert", init=call)


def test_one_thread_at_a_time_is_inside() -> None:
    sd, inside, seen = pair(), [], []

    def enter() -> None:
        inside.append(None)
        time.sleep(0)  # lets others run
        seen.append(len(inside))
        inside.pop()

    def work(number: int) -> None:
        for at in range(50):
            insert(sd, f"{number}.{at}", enter)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 200
    assert len(sd) == 202


def test_a_waiting_thread_gets_in_when_the_holder_has_left_its_outer_block() -> None:
    sd, order = pair(), []
    started = threading.Event()

    def wait() -> None:
        started.set()
        sd.pop("a")
        order.append("waiting")

    thread = threading.Thread(target=wait)

    def hold() -> None:
        sd.gather(["b"])  # an inner block, which is left at once
        thread.start()
        started.wait()
        time.sleep(0.02)  # so that it does wait
        order.append("holding")

    insert(sd, "c", hold)
    thread.join(10)
    assert order == ["holding", "waiting"]
    assert list(sd) == ["b", "c"]


def test_the_lock_is_given_back_when_an_error_leaves_the_block() -> None:
    sd = pair()

    def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        insert(sd, "c", fail)
    thread = threading.Thread(target=sd.pop, args=("a",), daemon=True)
    thread.start()
    thread.join(10)
    assert list(sd) == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_a_signal_interrupts_a_thread_that_waits() -> None:
    sd, held, done = pair(), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        done.wait(30)

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    thread = threading.Thread(target=insert, args=(sd, "c", hold))
    thread.start()
    held.wait()
    before = signal.signal(signal.SIGINT, interrupt)
    later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    later.start()
    try:
        with pytest.raises(InterruptedError):
            sd.pop("a")
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
        thread.join()
    sd.pop("b")  # nobody holds the lock now
    assert list(sd) == ["a", "c"]


class Changing:
    """Changes a dictionary when it is copied."""

    def __init__(self, sd: SD) -> None:
        self.sd = sd

    def __deepcopy__(self, memo: Any) -> Changing:
        self.sd.pop("a")
        return self


def test_a_dictionary_that_is_read_as_a_whole_cannot_be_changed_meanwhile() -> None:
    sd = pair()
    sd.extra = Changing(sd)
    with pytest.raises(RuntimeError, match="read as a whole"):
        copy.deepcopy(sd)
    assert list(sd) == ["a", "b"]
    sd.pop("a")  # afterwards it can be
    assert list(sd) == ["b"]


@pytest.mark.parametrize("switch", [gc.enable, gc.disable])
def test_a_change_leaves_the_collector_alone(switch: Callable[[], None]) -> None:
    was_on, seen = gc.isenabled(), []

    def switch_back() -> None:
        seen.append(gc.isenabled())
        (gc.disable if switch is gc.enable else gc.enable)()

    try:
        switch()
        insert(pair(), "c", switch_back)
        assert seen == [switch is gc.enable]
        assert gc.isenabled() == (switch is not gc.enable), "what was switched meanwhile is lost"
    finally:
        (gc.enable if was_on else gc.disable)()


def test_nothing_that_a_dictionary_holds_is_referred_to_for_ever() -> None:
    sd = pair()
    held = dict(vars(sd))

    def use() -> None:
        for name in ("c", "d"):
            insert(sd, name, lambda: sd["a"])
            sd["e"] = torch.ones(2)
            sd.named_state_dict()
            assert len(copy.deepcopy(sd)) == len(sd)
            sd.drop(["e", name])
            with pytest.raises(RuntimeError, match="being changed"):
                insert(sd, name, lambda: sd.pop("a"))

    def counts() -> dict[str, int]:
        gc.collect()
        # Small numbers and None are everybody's.
        return {key: sys.getrefcount(one) for key, one in held.items() if not isinstance(one, int | bool | None)}

    use()
    before = counts()
    use()
    assert counts() == before
