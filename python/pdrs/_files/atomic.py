"""A file that is replaced as a whole: whoever looks, at any instant, finds the old one or the new one.

The new file grows under another name in the same folder. It gets its name when all its bytes are on the disk, and the
folder is brought to the disk then, too. A process that is killed before leaves the old file, and the beginning of the
new one under a name that begins with a dot and ends in ``.tmp``. Who writes to such a file has a lock on it
(``flock``), so the next save of the same file sees which ones have been left behind, and removes them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Progress",
    "WholeFile",
    "being_written",
    "folder_locked",
    "put_aside",
    "refuse_folder",
    "remove_left_behind",
    "replacing",
]

# Seconds after which a save is long enough for a progress bar.
_PATIENCE = 2.0

# What is written in one call: between two calls the progress bar moves.
_CHUNK = 16 << 20

_LONGEST_NAME = 255


class Progress:
    """A progress bar over bytes: on a terminal, for what takes longer than two seconds, if tqdm is installed."""

    def __init__(self, total: int, what: str) -> None:
        self._bar: Any = None
        if sys.stderr is None or not sys.stderr.isatty():
            # Not even a bar that is disabled: to make one takes a lock that tqdm shares with the processes that were
            # forked, and that would stay locked for all if one were killed meanwhile.
            return
        with suppress(ImportError):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=_PATIENCE, leave=False)

    def add(self, count: int) -> None:
        """Count bytes that are done."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


class WholeFile:
    """The new file while it is written; see :func:`replacing`.

    Parameters
    ----------
    descriptor
        Of the file, open for writing.
    path
        What errors call it.
    progress
        Is told of the bytes that are written.
    """

    def __init__(self, descriptor: int, path: str, progress: Progress) -> None:
        self._descriptor = descriptor
        self._path = path
        self._progress = progress
        self.position = 0

    def write(self, data: Any) -> int:
        """Append what has the buffer protocol and lies in one piece, and return its size. Nothing is copied."""
        size = self._write(data, None)
        self.position += size
        return size

    def flush(self) -> None:
        """Do nothing, as nothing is kept back: ``torch.save`` asks for it."""

    def rewrite(self, data: Any, start: int) -> None:
        """Overwrite bytes that were written before."""
        if start + memoryview(data).nbytes > self.position:
            raise ValueError(f"only {self.position} bytes have been written")
        self._write(data, start)

    def _write(self, data: Any, start: int | None) -> int:
        left = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        size = len(left)
        try:
            while left:
                part = left[:_CHUNK]
                if start is None:
                    done = os.write(self._descriptor, part)
                    self._progress.add(done)
                else:
                    done = os.pwrite(self._descriptor, part, start)
                    start += done
                left = left[done:]
        except OSError as error:
            raise _with_path(error, self._path) from error
        return size


@contextmanager
def replacing(path: str | os.PathLike[str], size: int, *, sync: bool = True) -> Iterator[WholeFile]:
    """Give a new file to write to, which takes the place of ``path`` at the end of the block, or goes if that fails.

    Parameters
    ----------
    path
        The file to be. If it is a symbolic link, the file that it points to is replaced and the link stays. The new
        file gets the permissions of the old one, or those that the process gives to new files.
    size
        The number of bytes to come, for the progress bar.
    sync
        Whether to wait until the bytes are on the disk. Without it, a crash of the machine (not one of the process) may
        leave a file without its contents.

    Raises
    ------
    OSError
        If the folder is missing or cannot be written to, the disk is full, and so on; the old file is as it was.
        ``filename`` is the ``path``.
    """
    shown = os.fspath(path)
    target = Path(os.path.realpath(shown))
    mode = _mode_of(target, shown)
    try:
        remove_left_behind(target)
        descriptor, temporary = _create_beside(target)
    except OSError as error:
        raise _with_path(error, shown) from error
    progress = Progress(size, target.name)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        yield WholeFile(descriptor, shown, progress)
        if sync:
            os.fsync(descriptor)
        # Before it is closed: until then the lock keeps others from removing it.
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temporary)):
            raise _with_path(error, shown) from error
        raise
    finally:
        progress.close()
        os.close(descriptor)
    if sync:
        _sync_folder(target.parent)


def refuse_folder(path: str) -> None:
    """Raise if a path is written as that of a folder: without its end, it would be that of a file."""
    if path.endswith(("/", os.sep)):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def _create_beside(target: Path) -> tuple[int, Path]:
    """Make a new file in the same folder, and lock it."""
    while True:
        temporary = _temporary(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        # Another process may have seen it, and removed it, before it was locked.
        if _is_free(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{_shortened(target)}.{secrets.token_hex(8)}.tmp")


@contextmanager
def put_aside(path: Path) -> Iterator[None]:
    """Take a file away at once, and remove it for good at the end of the block.

    In between it has the name of a file that is being written, and a lock. If the process is killed there, the next
    save finds it as it finds any file that was left behind.
    """
    with ExitStack() as end:
        aside = path
        try:
            # Not what a link points to: that would keep its name.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            end.callback(os.close, descriptor)
            _is_free(descriptor)
            aside = _temporary(path)
            os.replace(path, aside)
        except OSError:
            aside = path
            with suppress(OSError):
                path.unlink()
        yield
        with suppress(OSError):
            aside.unlink()


def remove_left_behind(target: Path, look: Callable[[Path], None] | None = None) -> None:
    """Remove what killed processes have left in the folder of a file on their way to write it.

    Parameters
    ----------
    look
        Is called with the path of each before it is removed.
    """
    if sys.platform == "win32":
        return
    for path in _beside(target):
        # Others may remove it at the same time, and may have put anything there.
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _is_free(descriptor):
                    if look is not None:
                        look(path)
                    os.unlink(path)
            finally:
                os.close(descriptor)


def being_written(target: Path) -> int:
    """Return how many new files are there that are to take the place of a file, or have been left behind."""
    return len(_beside(target))


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Keep out all others that lock the folder, threads or processes, where the system can lock folders."""
    if sys.platform == "win32":
        yield
        return
    descriptor = -1
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor >= 0:
            with suppress(OSError):
                # Processes that were forked meanwhile have the lock, too, until somebody gives it back.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _beside(target: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(_shortened(target))}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):  # A folder that cannot be listed may still be written to.
        return [target.with_name(name) for name in filter(pattern.fullmatch, os.listdir(target.parent))]
    return []


def _is_free(descriptor: int) -> bool | None:
    """Lock a file unless another process has locked it; None where files cannot be locked."""
    if sys.platform == "win32":
        return None  # What is left behind stays there.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _shortened(target: Path) -> str:
    """Return as much of the name of a file as leaves room for what makes it another."""
    return target.name.encode()[: _LONGEST_NAME - 32].decode(errors="ignore")


def _mode_of(target: Path, shown: str) -> int | None:
    """Return the permissions of the file that is to be replaced, if there is one; refuse what is no file."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _with_path(error, shown) from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file, so it cannot be replaced", shown)
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), shown)
    return stat.S_IMODE(found.st_mode)


def _sync_folder(folder: Path) -> None:
    """Bring a folder to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _with_path(error: OSError, path: str) -> OSError:
    """Return the error with the path that the caller knows; OSError chooses the class by the number."""
    return OSError(error.errno, error.strerror or str(error), path)
