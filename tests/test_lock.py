"""The lock of a StackedParameterDict.

The bugs that this hunts: two threads inside at a time, a lock that is free after its holder has left only the inner of
two blocks, a thread that waits with the GIL (nothing else would run), a waiting thread that is not told, one that
cannot be interrupted, and a lock that a stranger gives back.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest

from pdrs._core import Lock


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


def test_a_lock_that_goes_while_a_thread_that_has_ended_holds_it_lets_the_collector_go_on():
    collects = gc.isenabled()
    gc.enable()
    try:
        lock = Lock()
        thread = threading.Thread(target=lock.__enter__)
        thread.start()
        thread.join()
        assert not gc.isenabled()
        del lock, thread
        assert gc.isenabled()
    finally:
        if not collects:
            gc.disable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_lock_from_before_a_fork_leaves_the_collector_alone_when_it_goes():
    collects = gc.isenabled()
    gc.enable()
    try:
        lock = Lock()
        thread = threading.Thread(target=lock.__enter__)
        thread.start()
        thread.join()
        process = os.fork()
        if process == 0:
            went_on = gc.isenabled()
            gc.disable()
            del lock, thread
            os._exit(0 if went_on and not gc.isenabled() else 1)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        del lock, thread
        assert gc.isenabled()
    finally:
        if not collects:
            gc.disable()
