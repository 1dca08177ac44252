"""Old files lose their name before a save returns, and their blocks go back to the disk while the program goes on.

The bugs that this hunts: a file that stays open; a child that has it open for as long as it lives; no threads left.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pdrs
import pdrs.distributed
from pdrs._files.freed_later import freed_later, wait_until_freed

# Other systems do not tell which files a process has open without a name.
if sys.platform != "linux":
    pytest.skip("/proc says which files are open", allow_module_level=True)


@pytest.fixture(autouse=True)
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    close = os.close

    def slow(descriptor: int) -> None:
        if threading.current_thread().name == "pdrs-close":
            time.sleep(0.2)
        close(descriptor)

    monkeypatch.setattr(os, "close", slow)
    monkeypatch.setattr("pdrs._files.freed_later._LARGE", 1)
    yield
    wait_until_freed()


def open_without_a_name(folder: Path) -> int:
    """Return how many files of a folder this process has open that have no name any more."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(one)
        except OSError:  # That of the list itself
            continue
        found += target.startswith(str(folder)) and target.endswith(" (deleted)")
    return found


def stacked(value: float) -> pdrs.StackedParameterDict:
    return pdrs.StackedParameterDict({"a": torch.full((2,), value)})


def test_save_returns_before_the_old_file_is_freed(tmp_path: Path) -> None:
    pdrs.save(stacked(1.0), tmp_path / "model")
    assert open_without_a_name(tmp_path) == 0
    pdrs.save(stacked(2.0), tmp_path / "model")
    assert pdrs.open(tmp_path / "model")["a"].tolist() == [2.0, 2.0]
    assert open_without_a_name(tmp_path) == 1
    wait_until_freed()
    assert open_without_a_name(tmp_path) == 0


def test_a_set_that_is_replaced_is_freed(tmp_path: Path) -> None:
    words = pdrs.distributed.ShardedParameterDict((2,))
    words.plan(["a", "b"], "insert")
    for _ in range(2):
        pdrs.distributed.save(words, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert open_without_a_name(tmp_path) > 0
    wait_until_freed()
    assert open_without_a_name(tmp_path) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_has_no_file_open_that_lost_its_name(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("text")
    with freed_later(tmp_path / "old"):
        os.unlink(tmp_path / "old")
    assert open_without_a_name(tmp_path) == 1
    child = os.fork()
    if child == 0:
        os._exit(open_without_a_name(tmp_path))
    assert os.waitpid(child, 0)[1] == 0


def test_a_file_is_freed_at_once_if_there_are_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pdrs.save(stacked(1.0), tmp_path / "model")
    pdrs.save(stacked(2.0), tmp_path / "model")
    assert open_without_a_name(tmp_path) == 0


def test_small_files_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdrs._files.freed_later._LARGE", 1 << 20)
    for _ in range(2):
        pdrs.save(stacked(1.0), tmp_path / "model")
    assert open_without_a_name(tmp_path) == 0


def test_what_is_no_file_stays_as_it_is(tmp_path: Path) -> None:
    with freed_later(tmp_path / "nothing"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with freed_later(tmp_path / "link"):
        os.unlink(tmp_path / "link")
    with pytest.raises(ValueError, match="stop"), freed_later(tmp_path):
        raise ValueError("stop")
    wait_until_freed()
    assert list(tmp_path.iterdir()) == []
