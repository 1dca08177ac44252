"""Files that the page cache of the system forgets, so that the next one to read them waits for the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_ATTEMPTS = 20


def drop(path: Path) -> bool:
    """Have the pages of a file forgotten, and tell whether they are."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # What is not on the disk yet cannot be forgotten.
        os.fsync(descriptor)
        # Pages that another processor has just read, and not yet put in order, stay the first time.
        for _ in range(_ATTEMPTS):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                if _resident(mapped) == 0:
                    return True
            time.sleep(0.1)
        return False
    finally:
        os.close(descriptor)


@cache
def can_drop() -> bool:
    """Whether files in the folder for temporary files can be forgotten; those of a file system in memory cannot."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(1 << 20))
        file.flush()
        return drop(Path(file.name))


def _resident(mapped: mmap.mmap) -> int:
    """Count the pages of a mapped file that are in memory."""
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    data = np.frombuffer(mapped, np.uint8)
    address, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(mapped))
    del data
    if _libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((pages & 1).sum())
