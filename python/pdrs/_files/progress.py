"""Progress bars over bytes: on a terminal, for work of more than two seconds, if tqdm is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["progress"]

# Seconds after which a bar appears.
_DELAY = 2.0

# Less than this many bytes is read or written without a bar.
_LEAST = 64 << 20


@contextmanager
def progress(total: int, path: str | os.PathLike[str], least: int = _LEAST) -> Iterator[Callable[[int], object]]:
    """Give a function that counts bytes of a file as they are read or written. The bar goes at the end of the block."""
    bar: Any = None
    # Not even a disabled bar unless it may be seen: tqdm takes a lock that forked processes share. If one of them is
    # killed, it stays locked.
    if total >= least and sys.stderr is not None and sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            name = os.path.basename(os.fspath(path))
            bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, delay=_DELAY, leave=False)
    if bar is None:
        yield lambda _: None
        return
    try:
        yield bar.update
    finally:
        bar.close()
