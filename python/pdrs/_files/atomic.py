"""Atomic writes: a reader finds the old file or the new one, whatever happens to the writer.

The new file is written under a temporary name in the same folder. After an fsync, an atomic rename replaces the old
file, and the folder is synced. A killed process leaves the old file, and a temporary file whose name begins with a dot
and ends in ``.tmp``. The writer holds a lock (``flock``) on its temporary file. So the next save of the same file knows
which temporary files have been left behind, and removes them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pdrs._files.freed_later import freed_later
from pdrs._files.progress import progress

if sys.platform != "win32":
    import fcntl

__all__ = ["AtomicFile", "refuse_folder", "remove_left_behind", "replacing", "sync_folder", "temporary_name"]

# The bytes of one call of the system. Between two calls the progress bar moves.
_CHUNK = 16 << 20

# The disk begins to write when there are so many bytes.
_AT_ONCE = 8 << 20

_SYNC_FILE_RANGE_WRITE = 2

_LONGEST_NAME = 255


class AtomicFile:
    """The new file while it is written; see :func:`replacing`."""

    def __init__(self, descriptor: int, count: Callable[[int], object], *, sync: bool = False) -> None:
        self._descriptor = descriptor
        self._count = count
        self._sync = sync
        # Up to where the system has begun to write to the disk.
        self._begun = 0
        self.position = 0

    def write(self, data: Any) -> int:
        """Append contiguous memory with the buffer protocol, and return its size. Nothing is copied."""
        left = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        size = len(left)
        while left:
            done = os.write(self._descriptor, left[:_CHUNK])
            self._count(done)
            self.position += done
            left = left[done:]
            if self._sync and self.position - self._begun >= _AT_ONCE:
                _begin_to_sync(self._descriptor, self._begun, self.position - self._begun)
                self._begun = self.position
        return size

    def flush(self) -> None:
        """Do nothing, because nothing is buffered: ``torch.save`` calls it."""

    def write_again(self, data: bytes) -> None:
        """Overwrite the first bytes of the file."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], done)


def _begin_to_sync(descriptor: int, begin: int, size: int) -> None:
    """Let the system begin to write a part of a file to the disk, without waiting for it, if it can (Linux).

    It writes while the rest of the file is computed, and the fsync at the end has less to wait for.
    """
    begins = _sync_file_range()
    if begins is not None:
        begins(descriptor, begin, size, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        found = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return found


@contextmanager
def replacing(path: str | os.PathLike[str], size: int, *, sync: bool = True) -> Iterator[AtomicFile]:
    """Give a new file, which replaces ``path`` at the end of the block. If the block fails, ``path`` is unchanged.

    Parameters
    ----------
    path
        If it is a symbolic link, the file that it points to is replaced. The new file gets the permissions of the old
        one.
    size
        The expected number of bytes, for the progress bar.
    sync
        Whether to wait until the bytes are on the disk. Without it, the file may be empty after a crash of the machine.

    Raises
    ------
    OSError
        If the file cannot be written. ``filename`` is ``path``.
    """
    shown = os.fspath(path)
    with _naming(shown):
        target = Path(os.path.realpath(shown))
        mode = _mode_of(target)
        remove_left_behind(target)
        descriptor, temporary = _create_beside(target)
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)
            with progress(size, target) as count:
                yield AtomicFile(descriptor, count, sync=sync)
            if sync:
                os.fsync(descriptor)
            # Before the file is closed: until then its lock keeps others from removing it.
            with freed_later(target):
                os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
    if sync:
        sync_folder(target.parent)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let errors of the system name the path that the caller knows."""
    try:
        yield
    except OSError as error:
        other = error.filename if isinstance(error.filename, str) else path
        if not other.endswith(".tmp") and os.path.realpath(other) != os.path.realpath(path):
            raise
        # OSError chooses the class by the number.
        raise OSError(error.errno, error.strerror or str(error), path) from error


def refuse_folder(path: str) -> None:
    """Raise if a path ends in a slash: without it, it would be the path of a file."""
    if path.endswith(("/", os.sep)):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def temporary_name(target: Path) -> Path:
    """Return a name in the folder of a file that :func:`remove_left_behind` finds."""
    return target.with_name(f".{_shortened(target)}.{secrets.token_hex(8)}.tmp")


def _create_beside(target: Path) -> tuple[int, Path]:
    """Make a temporary file in the same folder, and lock it."""
    while True:
        temporary = temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        # Another process may have removed it before it was locked.
        if _is_free(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def remove_left_behind(target: Path, look: Callable[[Path], None] = lambda _: None) -> None:
    """Remove the temporary files that killed processes left, after calling ``look`` with each path."""
    if sys.platform == "win32":
        return
    pattern = re.compile(rf"\.{re.escape(_shortened(target))}\.[0-9a-f]{{16}}\.tmp")
    names: list[str] = []
    with suppress(OSError):  # A folder that cannot be listed may still be written to.
        names = list(filter(pattern.fullmatch, os.listdir(target.parent)))
    for name in names:
        # Another process may remove it at the same time, and anything may have this name.
        with suppress(OSError):
            path = target.with_name(name)
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _is_free(descriptor):
                    look(path)
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _is_free(descriptor: int) -> bool | None:
    """Lock a file unless another process has locked it. None if files cannot be locked."""
    if sys.platform == "win32":
        return None  # Temporary files stay.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _shortened(target: Path) -> str:
    """Return as much of the name of a file as leaves room for the rest of a temporary name."""
    return target.name.encode()[: _LONGEST_NAME - 32].decode(errors="ignore")


def _mode_of(target: Path) -> int | None:
    """Return the permissions of the file that will be replaced, if there is one; refuse what is not a file."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file, so it cannot be replaced")
    if not os.access(target, os.W_OK):
        # Another process may have removed or replaced it since `stat`: then it was not this file that was refused.
        with suppress(FileNotFoundError):
            if os.path.samestat(found, target.stat()):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return _mode_of(target)
    return stat.S_IMODE(found.st_mode)


def sync_folder(folder: Path) -> None:
    """Write a folder to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
