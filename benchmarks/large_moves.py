"""Moves of large entries, each timed in a process of its own: what one container frees, no other gets.

``python benchmarks/large_moves.py KIND SUBJECT ENTRIES`` prints nanoseconds per 64 bytes of float32 made float64.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator

import torch

import pdrs
from fresh_process import figures
from measure import Task, nanoseconds

# What an entry of the other cases has.
FLOATS = 16

_SMALLEST_KIB, _LARGEST_KIB = 64, 32 << 10


def _equal(entries: int) -> Iterator[int]:
    """Give the numbers of elements of entries of 8 MB each."""
    yield from [2_000_000] * entries


def _mixed(entries: int) -> Iterator[int]:
    """Give those of entries of 64 KiB to 32 MiB, as many of each order of magnitude, large and small by turns."""
    octaves = math.log2(_LARGEST_KIB / _SMALLEST_KIB)
    for at in range(entries):
        # Seven has no divisor in common with a hundred: each size comes once.
        kib = _SMALLEST_KIB * 2 ** (octaves * (at * 7 % entries) / max(1, entries - 1))
        yield int(kib * 1024) // 4


SIZES: dict[str, Callable[[int], Iterator[int]]] = {"equal": _equal, "mixed": _mixed}


def large_move(kind: str, subject: str, entries: int) -> float:
    """Time one move in a fresh process: ``torch`` moves a module by its own method, ``pdrs`` by ``pdrs.to``."""
    return figures(__file__, kind, subject, entries)[0]


def _to_double(subject: str, module: torch.nn.Module) -> torch.nn.Module:
    return pdrs.to(module, torch.float64) if subject == "pdrs" else module.to(torch.float64)


def _is_right(moved: torch.nn.ParameterList) -> bool:
    return all(
        entry.dtype == torch.float64 and entry[0].item() == entry[-1].item() == at for at, entry in enumerate(moved)
    )


def main() -> None:
    """Measure what the command line asks for."""
    kind, subject, entries = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # The first of its kind loads what is needed.
    _to_double(subject, torch.nn.Linear(4, 4))
    sizes = list(SIZES[kind](entries))
    module = torch.nn.ParameterList(torch.full((size,), float(at)) for at, size in enumerate(sizes))
    gc.collect()
    gc.disable()
    print(nanoseconds(Task(lambda: _to_double(subject, module), sum(sizes) // FLOATS, _is_right)))


if __name__ == "__main__":
    main()
