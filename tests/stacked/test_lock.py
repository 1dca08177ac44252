"""The lock of a StackedParameterDict.

The bugs that this hunts: two threads inside at a time, a lock that is free after its holder has left only the inner of
two blocks, a thread that waits with the GIL (nothing else would run), a waiting thread that is not told, one that
cannot be interrupted, a lock that a stranger gives back, code on the thread of the holder that gets in while a change
is half-way, and a collector that is left off.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest

from pdrs._core import Lock, in_one_step


def test_one_thread_at_a_time_is_inside():
    lock, inside, seen = Lock(), [], []

    def work() -> None:
        for _ in range(200):
            with lock, lock:
                inside.append(None)
                time.sleep(0)  # lets others run
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 800


def test_who_waits_gets_the_lock_when_its_holder_has_left_the_outer_block():
    lock, order = Lock(), []
    started = threading.Event()

    def wait() -> None:
        started.set()
        with lock:
            order.append("waiting")

    thread = threading.Thread(target=wait)
    with lock:
        with lock:
            thread.start()
            started.wait()
        time.sleep(0.02)  # so that it does wait
        order.append("holding")
    thread.join()
    assert order == ["holding", "waiting"]


def test_a_lock_is_given_back_when_an_error_leaves_the_block():
    lock = Lock()
    with pytest.raises(KeyError), lock:
        raise KeyError("inside")
    thread = threading.Thread(target=lock.__enter__)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_lock_that_is_not_held_cannot_be_given_back():
    lock = Lock()
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.__exit__(None, None, None)
    thread = threading.Thread(target=lock.__enter__)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.__exit__(None, None, None)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_a_signal_interrupts_a_thread_that_waits():
    lock, held, done = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    def interrupt(number: int, frame: object) -> None:
        raise InterruptedError

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    before = signal.signal(signal.SIGINT, interrupt)
    later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    later.start()
    try:
        with pytest.raises(InterruptedError), lock:
            pass
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
        thread.join()
    with lock:  # which nobody holds now
        pass


def test_who_plans_a_change_lets_readers_in_on_its_thread_and_no_other_change():
    lock = Lock()
    with lock.change():
        with lock, lock.read():
            pass
        with pytest.raises(RuntimeError, match="the dictionary is being changed"), lock.change():
            pass
    with lock.read():
        with lock.read():
            pass
        with pytest.raises(RuntimeError, match="read as a whole"), lock.change():
            pass
    with lock.change():  # which is free again
        pass


@pytest.mark.parametrize("way", [lambda lock: lock, Lock.read, Lock.change], ids=["lock", "read", "change"])
def test_nobody_gets_in_while_a_change_is_made(way):
    lock, other, found = Lock(), Lock(), []

    def get_in() -> None:
        with other:
            pass
        try:
            with way(lock):
                found.append("in")
        except RuntimeError as error:
            found.append(str(error))

    with lock.change():
        in_one_step([get_in])
        with lock:  # and afterwards everybody does
            pass
    assert found == [
        "the dictionary is being changed: what runs in the middle of a change, such as a finalizer, cannot use it"
    ]


def test_the_collector_is_left_alone():
    collects, lock = gc.isenabled(), Lock()
    try:
        for switch in (gc.enable, gc.disable):
            switch()
            with lock.change():
                assert gc.isenabled() == (switch is gc.enable)
                (gc.disable if switch is gc.enable else gc.enable)()
            assert gc.isenabled() == (switch is not gc.enable), "what was switched meanwhile is lost"
    finally:
        (gc.enable if collects else gc.disable)()


def test_a_lock_goes_with_its_dictionary_though_changes_were_made_in_it() -> None:
    lock = Lock()
    held = sys.getrefcount(lock)
    for context in (lock, lock.change(), lock.read()):
        for _ in range(3):
            with context:
                pass
    with lock.read(), pytest.raises(RuntimeError), lock.change():
        pass
    del context
    assert sys.getrefcount(lock) == held
