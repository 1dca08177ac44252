"""Saving when the process is killed, the disk is full, the folder is read-only, or others save the same file.

The bugs that this hunts: a file that is neither the old nor the new one, an old one that is gone though the new one
failed, what killed processes leave behind and nobody removes, a save that removes what another is writing.
"""

from __future__ import annotations

import errno
import os
import pathlib
import random
import resource
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import pdrs
from pdrs._files import atomic

# Children are forked: to import torch anew would take seconds a child. They do nothing but save, on one thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

ENTRIES = 3000
FLOATS = 16
NOBODY = 65534
# Seconds that a child may take.
PATIENCE = 60


def version(number: int) -> pdrs.StackedParameterDict:
    """Return a dictionary all of which says which version it is."""
    names = [f"v{number}.{at}" for at in range(ENTRIES)]
    return pdrs.StackedParameterDict.from_tensor(names, torch.full((ENTRIES, FLOATS), float(number)))


def save(saved: pdrs.StackedParameterDict, path: Path) -> None:
    pdrs.save(saved, path)


def version_in(path: Path) -> int:
    """Return the number of the version in a file; it must be whole."""
    sd = pdrs.open(path, verify=True)
    table = sd.table((FLOATS,))
    number = int(table[0, 0])
    assert torch.equal(table, torch.full((ENTRIES, FLOATS), float(number)))
    assert list(sd) == [f"v{number}.{at}" for at in range(ENTRIES)]
    return number


def fork(work: Callable[[], Any]) -> int:
    """Do something in a child process: its exit code is 0 if it returns, 1 if it raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(child: int) -> int:
    """Return the exit code of a child, or the negative number of the signal that ended it; one that hangs is ended."""
    for _ in range(PATIENCE * 500):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], Any]) -> int:
    return wait_for(fork(work))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file with version 1, alone in its folder."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "saved.safetensors"
    save(version(1), path)
    return path


def beside(path: Path) -> list[str]:
    """Return what else is in the folder."""
    return sorted(set(os.listdir(path.parent)) - {path.name})


# -- kill -9 -----------------------------------------------------------------------------------------------------------

STEPS = ("open", "close", "write", "pwrite", "fsync", "fchmod", "fstat", "listdir", "replace", "unlink")


def killed_at(
    step: int | str, work: Callable[[], Any], *, torn: bool = False, steps: tuple[str, ...] = STEPS
) -> Callable[[], Any]:
    """Let ``work`` be killed before a call to the system, of a number or a name, or, if it writes, in the middle."""
    left = step if isinstance(step, int) else 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= isinstance(step, int) or function.__name__ == step
            if left < 0:
                if torn and function.__name__ in ("write", "pwrite"):
                    descriptor, data, *place = arguments
                    function(descriptor, data[: len(data) // 2], *place)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def run() -> None:
        for name in steps:
            function = getattr(os, name)
            counted = counting(function)
            setattr(os, name, counted)
            # Path has its own references in Python 3.10.
            accessor = getattr(pathlib, "_NormalAccessor", None)
            if getattr(accessor, name, None) is function:
                setattr(accessor, name, staticmethod(counted))
        work()

    return run


@pytest.mark.parametrize("torn", [False, True])
def test_a_process_that_is_killed_at_any_step_leaves_the_old_file_or_the_new_one(path: Path, torn: bool) -> None:
    found = []
    for step in range(1000):
        code = in_child(killed_at(step, lambda: save(version(2), path), torn=torn))
        found.append(version_in(path))
        assert len(beside(path)) <= 1
        save(version(1), path)
        assert beside(path) == [], "what the killed process left is removed by the next save"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # It opens, writes a header and two tensors, and waits for the disk, with version 1 in the place; then comes 2.
    assert found.count(1) > 5
    assert found == sorted(found)
    assert found[-1] == 2


def test_a_process_that_is_killed_at_any_time_leaves_a_whole_file(path: Path) -> None:
    draw = random.Random(0)
    begin = time.perf_counter()
    save(version(1), path)
    duration = time.perf_counter() - begin

    def save_for_ever() -> None:
        numbers = [version(number) for number in range(2, 10)]
        os.write(ready, b".")
        while True:
            for one in numbers:
                save(one, path)

    for _ in range(20):
        begun, ready = os.pipe()
        child = fork(save_for_ever)
        os.read(begun, 1)
        time.sleep(draw.uniform(0, 3 * duration))
        os.kill(child, signal.SIGKILL)
        assert wait_for(child) == -signal.SIGKILL
        os.close(begun)
        os.close(ready)
        assert version_in(path) in range(1, 10)
        assert len(beside(path)) <= 1, "each save removes what the one before it left"
    save(version(10), path)
    assert version_in(path) == 10
    assert beside(path) == []


def test_what_is_open_stays_whole_while_its_file_is_replaced(path: Path) -> None:
    opened = pdrs.open(path)
    for number in (2, 3):
        in_child(killed_at(3 * number, lambda number=number: save(version(number), path)))
        save(version(number), path)
    with torch.no_grad():
        opened["v1.0"].fill_(5)
    assert torch.equal(opened.table((FLOATS,))[1:], torch.full((ENTRIES - 1, FLOATS), 1.0))
    assert version_in(path) == 3
    save(opened, path)
    assert pdrs.open(path)["v1.0"].tolist() == [5.0] * FLOATS


def test_a_process_that_is_killed_while_it_saves_changes_leaves_all_versions(path: Path) -> None:
    after = path.with_name("after.safetensors")
    changed = version(1)
    with torch.no_grad():
        changed["v1.7"].fill_(7)
    codes = []
    for step in range(1000):
        codes.append(in_child(killed_at(step, lambda: pdrs.save(changed, after, since=path))))
        assert version_in(path) == 1
        if after.exists():
            assert pdrs.open(after, verify=True)["v1.7"].tolist() == [7.0] * FLOATS
            after.unlink()
        if codes[-1] == 0:
            break
    assert set(codes) == {0, -signal.SIGKILL}
    pdrs.save(changed, after, since=path)
    assert beside(path) == [after.name]


def save_in_shards(saved: pdrs.StackedParameterDict, path: Path) -> None:
    # A process that is killed takes nothing away that it has written, on the disk or not.
    pdrs.save(saved, path, layout="named", max_shard_size=100_000, sync=False)


def test_a_process_that_is_killed_while_it_writes_shards_leaves_the_old_ones_or_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_in_shards(version(1), path)
    usual = sorted(os.listdir(tmp_path))
    assert len(usual) == 3
    found = []
    for step in range(1000):
        code = in_child(
            killed_at(step, lambda: save_in_shards(version(2), path), steps=("open", "write", "replace", "unlink"))
        )
        found.append(version_in(path))
        # Shards and an index that nobody needs any more: of this one, not of all before it.
        assert len(os.listdir(tmp_path)) <= 2 * len(usual)
        save_in_shards(version(1), path)
        assert len(os.listdir(tmp_path)) == len(usual)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found.count(1) > 10
    assert found.count(2) > 2, "when the new ones are there the old ones are still to be removed"
    assert found == sorted(found)


def test_one_file_takes_the_place_of_shards_and_the_other_way_round_whenever_the_process_is_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"

    def save_in_one(saved: pdrs.StackedParameterDict, path: Path) -> None:
        pdrs.save(saved, path, layout="named", sync=False)

    for before, after, count in ((save_in_one, save_in_shards, 3), (save_in_shards, save_in_one, 1)):
        for name in ("write", "replace", "unlink"):
            before(version(1), path)
            assert in_child(killed_at(name, lambda after=after: after(version(2), path))) == -signal.SIGKILL
            assert version_in(path) in (1, 2)
            after(version(3), path)
            assert version_in(path) == 3
            assert len(os.listdir(tmp_path)) == count


@pytest.mark.parametrize("again", ["archive", "named"])
def test_an_index_that_a_killed_process_leaves_lists_no_shard_that_is_gone_and_no_shard_stays_for_good(
    again: Literal["archive", "named"], tmp_path: Path
) -> None:
    path, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    removed, killed = 0, True
    while killed:
        save_in_shards(version(1), path)
        shards = sorted(tmp_path.glob("model-*"))
        save_in_one = killed_at(
            removed, lambda: pdrs.save(version(2), path, layout="named", sync=False), steps=("unlink",)
        )
        killed = in_child(save_in_one) == -signal.SIGKILL
        assert version_in(path) == 2
        assert not index.exists() or version_in(index) == 1
        removed += 1
        if again == "archive":
            kept = [path, *(shards if index.exists() else []), *([index] if index.exists() else [])]
        else:
            kept = [path]
        pdrs.save(version(3), path, layout=again, sync=False)
        assert sorted(tmp_path.iterdir()) == sorted(kept)
        path.unlink()
    assert removed > len(shards)


def test_an_index_that_is_a_link_goes_with_its_shards(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "model.safetensors", tmp_path / "elsewhere"
    save_in_shards(version(1), path)
    index = tmp_path / "model.safetensors.index.json"
    index.rename(elsewhere)
    index.symlink_to(elsewhere)
    pdrs.save(version(2), path, layout="named", sync=False)
    assert beside(path) == ["elsewhere"]


# -- several at once ---------------------------------------------------------------------------------------------------


def test_processes_that_save_the_same_file_at_once_do_not_disturb_each_other(path: Path) -> None:
    def save_often(number: int) -> None:
        saved = version(number)
        for _ in range(20):
            save(saved, path)

    children = [fork(lambda number=number: save_often(number)) for number in (2, 3, 4)]
    for _ in range(20):
        assert version_in(path) in (1, 2, 3, 4)
    assert [wait_for(child) for child in children] == [0, 0, 0]
    assert version_in(path) in (2, 3, 4)
    assert beside(path) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_goes_before_it_is_checked_is_not_one_that_must_not_be_written(
    replaced: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may = os.access
    asked = []

    def access(*arguments: Any) -> bool:
        asked.append(arguments)
        if len(asked) > 1:
            return may(*arguments)
        path.rename(path.with_suffix(".old"))
        answer = may(*arguments)
        if replaced:
            path.write_bytes(b"by another process")
        return answer

    monkeypatch.setattr(os, "access", access)
    save(version(2), path)
    assert len(asked) == 1 + replaced
    assert version_in(path) == 2


def test_what_somebody_is_writing_is_not_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, held, released = os.fsync, threading.Event(), threading.Event()

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is slow and not held.is_set():
            held.set()
            assert released.wait(PATIENCE)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    slow = threading.Thread(target=save, args=(version(3), path))
    slow.start()
    assert held.wait(PATIENCE)
    save(version(2), path)
    assert version_in(path) == 2
    assert len(beside(path)) == 1
    released.set()
    slow.join()
    assert version_in(path) == 3
    assert beside(path) == []


def test_only_what_was_left_of_this_file_is_removed(path: Path) -> None:
    others = [".saved.safetensors.tmp", f".saved.safetensors.{'g' * 16}.tmp", f".other.{'0' * 16}.tmp", "saved.tmp"]
    for name in (*others, f".saved.safetensors.{'0' * 16}.tmp"):
        (path.parent / name).touch()
    (path.parent / f".saved.safetensors.{'1' * 16}.tmp").mkdir()
    (path.parent / f".saved.safetensors.{'2' * 16}.tmp").symlink_to(others[-1])
    save(version(2), path)
    kept = [*others, f".saved.safetensors.{'1' * 16}.tmp", f".saved.safetensors.{'2' * 16}.tmp"]
    assert beside(path) == sorted(kept)


# -- no room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.9, 0.9999])
def test_a_file_that_grows_too_large_leaves_the_old_one(path: Path, part: float) -> None:
    saved, limit = version(2), int(path.stat().st_size * part)

    def try_to() -> None:
        # Python ignores the signal that would come.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large") as caught:
            save(saved, path)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(path)

    assert in_child(try_to) == 0
    assert version_in(path) == 1
    assert beside(path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], stderr=subprocess.PIPE)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_file_and_gives_the_room_back(small_disk: Path) -> None:
    path = small_disk / "saved.safetensors"
    save(version(1), path)
    for _ in range(2):
        (small_disk / "other").write_bytes(bytes(300_000))
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(version(2), path)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        assert version_in(path) == 1
        assert beside(path) == ["other"]
        (small_disk / "other").unlink()
    in_child(killed_at("replace", lambda: save(version(2), path)))
    assert len(beside(path)) == 1
    save(version(2), path)
    assert version_in(path) == 2, "there is no room but that of what was left behind"


# -- places that are no good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["a new file", "an old file"])
def test_a_read_only_folder_is_refused_and_nothing_is_lost(there: bool) -> None:
    # Not in `tmp_path`, which is closed to others: to root no folder is read-only, so the child gives its rights up.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.safetensors"
        if there:
            save(version(1), path)
            path.chmod(0o666)
        Path(folder).chmod(0o555)

        def try_to() -> None:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            with pytest.raises(PermissionError) as caught:
                save(version(2), path)
            assert caught.value.filename == str(path)

        assert in_child(try_to) == 0
        assert os.listdir(folder) == ([path.name] if there else [])
        if there:
            assert version_in(path) == 1
        Path(folder).chmod(0o755)


def test_a_file_that_must_not_be_written_is_not_replaced() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.safetensors"
        save(version(1), path)
        path.chmod(0o444)
        Path(folder).chmod(0o777)

        def try_to() -> None:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            with pytest.raises(PermissionError):
                save(version(2), path)

        assert in_child(try_to) == 0
        assert version_in(path) == 1
        assert beside(path) == []


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "saved.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save(version(1), path)
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (Path.mkdir, IsADirectoryError),
        (os.mkfifo, OSError),
        (lambda path: path.symlink_to(path.parent), IsADirectoryError),
        (lambda path: path.symlink_to(path), OSError),
        (lambda path: path.symlink_to("missing/file"), FileNotFoundError),
    ],
    ids=["folder", "fifo", "link to a folder", "link to itself", "link into a missing folder"],
)
def test_what_is_no_file_is_not_replaced(make: Callable[[Path], None], error: type[OSError], tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    make(path)
    before = path.lstat()
    with pytest.raises(error) as caught:
        save(version(1), path)
    assert caught.value.filename == str(path)
    assert path.lstat().st_ino == before.st_ino
    assert beside(path) == []


@pytest.mark.parametrize("there", [False, True], ids=["dangling", "to a file"])
def test_a_link_stays_a_link_and_its_file_is_replaced_when_it_is_whole(there: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, path = tmp_path / "elsewhere" / "file", tmp_path / "saved.safetensors"
    path.symlink_to("elsewhere/file")
    if there:
        save(version(1), target)
    in_child(killed_at("replace", lambda: save(version(2), path)))
    assert target.exists() == there
    save(version(3), path)
    assert path.is_symlink()
    assert version_in(target) == 3
    assert beside(target) == []
    assert beside(path) == ["elsewhere"]


@pytest.mark.parametrize("sync", [True, False])
def test_the_disk_writes_what_there_is_while_the_rest_is_computed(
    sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(atomic, "_CHUNK", 3000)
    monkeypatch.setattr(atomic, "_AT_ONCE", 5000)
    monkeypatch.setattr(atomic, "_begin_to_sync", lambda _, begin, size: begun.append((begin, size)))
    path = tmp_path / "a.safetensors"
    size = pdrs.save(pdrs.ParameterDict({str(at): torch.rand(3000) for at in range(20)}), path, sync=sync)
    ends = [0, *(begin + part for begin, part in begun)]
    assert [begin for begin, _ in begun] == ends[:-1]
    assert all(part >= 5000 for _, part in begun)
    assert (len(begun) > 1 and size - 8000 < ends[-1] <= size) if sync else not begun


@pytest.mark.parametrize("lacking", [None, OSError, AttributeError, TypeError])
def test_files_are_whole_on_systems_that_write_all_at_the_end(
    lacking: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def libraries(_: None) -> None:
        raise lacking or AssertionError

    monkeypatch.setattr(atomic, "_AT_ONCE", 1000)
    atomic._sync_file_range.cache_clear()
    if lacking is not None:
        monkeypatch.setattr("ctypes.CDLL", libraries)
    path, value = tmp_path / "a.safetensors", torch.rand(5000)
    try:
        pdrs.save(pdrs.ParameterDict({"a": value}), path)
    finally:
        atomic._sync_file_range.cache_clear()
    assert torch.equal(pdrs.open(path)["a"].detach(), value)
