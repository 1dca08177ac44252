"""Bytes that a container takes: counted by the C allocator, in a process of its own.

``python benchmarks/memory.py WHAT ENTRIES`` prints bytes per entry. Every object is on the C heap there
(``PYTHONMALLOC=malloc``), and the allocator is asked before and after (``mallinfo2`` of glibc), so that what is counted
is what was handed out: Python's objects and Rust's alike, whether or not their pages were touched.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fresh_process import figures


class _MallInfo(ctypes.Structure):
    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def bytes_per_entry(what: str, entries: int) -> float:
    """Measure in a fresh process.

    Parameters
    ----------
    what
        A key of ``MEASURES``.
    """
    return all_bytes_per_entry(what, entries)[0]


def all_bytes_per_entry(what: str, entries: int) -> tuple[float, ...]:
    """Measure in a fresh process what gives several figures."""
    return figures(__file__, what, entries, PYTHONMALLOC="malloc")


def allocated() -> int:
    """Return the bytes that are handed out at the moment."""
    libc = ctypes.CDLL(None)
    try:
        mallinfo2 = libc.mallinfo2
    except AttributeError:
        raise NotImplementedError("counting bytes needs mallinfo2, which glibc has from 2.33 on") from None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    # In the heaps of all threads, and in mappings of their own.
    return int(info.uordblks) + int(info.hblkhd)


def peak_beyond(run: Callable[[], Any]) -> int:
    """Return how far the memory of this process grows at most while something runs, and what it returns is there."""
    trim()
    forget_peak()
    before = bytes_of("VmRSS")
    result = run()
    peak = bytes_of("VmHWM")
    del result
    return peak - before


def trim() -> None:
    """Give what has been freed, and could be used again, back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Have the peak of this process (``VmHWM``) counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def bytes_of(field: str, file: str = "status", process: int | str = "self") -> int:
    """Return a figure that Linux keeps of a process: such as ``VmRSS``, or ``Pss`` in ``smaps_rollup``."""
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"this needs {field} in /proc/{process}/{file}, which Linux has")


def names_of(entries: int) -> list[str]:
    """Make names of 14 characters, in sorted order."""
    return [f"entity_{at:07d}" for at in range(entries)]


def _parameter_dict(make: Callable[[Any], Any], entries: int) -> int:
    """Count what a container of existing names and Parameters takes."""
    import torch

    data = torch.zeros(16)
    source = OrderedDict((name, torch.nn.Parameter(data)) for name in names_of(entries))
    make(OrderedDict(warm=torch.nn.Parameter(data)))
    gc.collect()
    before = allocated()
    container = make(source)
    gc.collect()
    taken = allocated() - before
    assert len(container) == entries
    return taken


def _stacked(subject: str, entries: int) -> int:
    """Count what a container takes beyond names and rows that exist."""
    import torch

    from cases_stacked import BUILD

    names, rows = names_of(entries), torch.zeros(entries, 16)
    # The first of its kind loads what is needed.
    BUILD[subject](["warm"], torch.zeros(1, 16))
    gc.collect()
    before = allocated()
    container = BUILD[subject](names, rows)
    gc.collect()
    taken = allocated() - before
    assert len(container) == entries
    return taken


def _checkpoint(subject: str, entries: int) -> tuple[int, ...]:
    """Count what saving and loading take at their peaks."""
    from cases_checkpoint import extra_memory

    return extra_memory(subject, entries)


def _map(make: Callable[[list[str]], Any], entries: int) -> int:
    """Count what a map takes with all that only it keeps alive: its names, its rows."""
    make(names_of(2))
    gc.collect()
    before = allocated()
    names = names_of(entries)
    container = make(names)
    del names
    gc.collect()
    taken = allocated() - before
    assert len(container) == entries
    return taken


def _torch_parameter_dict(source: Any) -> Any:
    import torch

    return torch.nn.ParameterDict(source)


def _pdrs_parameter_dict(source: Any) -> Any:
    import pdrs

    return pdrs.ParameterDict(source)


def _index_map(names: list[str]) -> Any:
    import pdrs

    return pdrs.IndexMap.from_names(names)


MEASURES: dict[str, Callable[[int], int | tuple[int, ...]]] = {
    "parameter_dict/dict": lambda entries: _parameter_dict(dict, entries),
    "parameter_dict/torch": lambda entries: _parameter_dict(_torch_parameter_dict, entries),
    "parameter_dict/pdrs": lambda entries: _parameter_dict(_pdrs_parameter_dict, entries),
    "stacked/by hand": lambda entries: _stacked("by hand", entries),
    "stacked/torch": lambda entries: _stacked("torch", entries),
    "stacked/pdrs": lambda entries: _stacked("pdrs", entries),
    **{f"checkpoint/{subject}": partial(_checkpoint, subject) for subject in ("torch", "safetensors", "pdrs")},
    "index_map/dict": lambda entries: _map(lambda names: dict(zip(names, range(entries), strict=False)), entries),
    "index_map/OrderedDict": lambda entries: _map(
        lambda names: OrderedDict(zip(names, range(entries), strict=False)), entries
    ),
    "index_map/IndexMap": lambda entries: _map(_index_map, entries),
}


def main() -> None:
    """Measure what the command line asks for."""
    what, entries = sys.argv[1], int(sys.argv[2])
    gc.disable()
    counted = MEASURES[what](entries)
    print(*(each / entries for each in (counted if isinstance(counted, tuple) else (counted,))))


if __name__ == "__main__":
    main()
