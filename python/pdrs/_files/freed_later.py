"""Files that lose their name at once, and whose blocks go back to the disk while the program goes on.

A file takes its blocks until it has no name and nobody has it open. To give them back, disks that are told of it
(``discard``) and those of other machines take a second for a few GB. So the file is opened first, and another thread
closes it. If the process ends before, the system closes it.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["freed_later", "wait_until_freed"]

# Smaller files are not worth a thread.
_LARGE = 8 << 20

_closing: set[threading.Thread] = set()


@contextmanager
def freed_later(path: str | os.PathLike[str]) -> Iterator[None]:
    """Remove or replace a file in the block: if it is large, another thread gives its blocks back afterwards."""
    held = _held(path)
    try:
        yield
    finally:
        if held is not None:
            _close(held)


def wait_until_freed() -> None:
    """Wait until the blocks of all files are given back."""
    for thread in list(_closing):
        thread.join()


def _held(path: str | os.PathLike[str]) -> int | None:
    """Open a file, if there is a large one, and if a file that is open can be removed."""
    if sys.platform == "win32":
        return None
    try:
        found = os.lstat(path)
        is_large = stat.S_ISREG(found.st_mode) and found.st_size >= _LARGE
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if is_large else None
    except OSError:
        return None


def _close(descriptor: int) -> None:
    thread = threading.Thread(target=os.close, args=(descriptor,), name="pdrs-close")
    try:
        thread.start()
    except RuntimeError:  # There is no room for a thread, or Python is about to end.
        os.close(descriptor)
        return
    _closing.difference_update([one for one in list(_closing) if not one.is_alive()])
    _closing.add(thread)


if hasattr(os, "register_at_fork"):  # Windows has none
    # A child would have the files open for as long as it lives.
    os.register_at_fork(before=wait_until_freed)
