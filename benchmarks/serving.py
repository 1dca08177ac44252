"""What processes that serve a file take: time until they answer, and memory.

``python benchmarks/serving.py WHAT SUBJECT FOLDER ENTRIES`` prints the figures of one process, which has made nothing
but what it opens. ``proportional_share`` starts several that serve one file. Memory is what Linux says in ``/proc``.
"""

from __future__ import annotations

import gc
import math
import mmap
import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import pdrs
from fresh_process import figures
from memory import bytes_of, trim
from page_cache import drop

TORCH, SAFETENSORS, IN_MEMORY, PDRS = "torch", "safetensors", "in memory", "pdrs"
FLOATS = 16
BATCH = 4_096
BELOW_PREFIX = 1_000
PROCESSES = 8
# So many names at most are looked up where each is.
LOOKED_UP = 1_000_000
LATER_RUNS = 7
WARM_ENTRIES = 2 * BELOW_PREFIX

FILES = {TORCH: "torch", SAFETENSORS: "peer.safetensors"}

# The places of the figures of `alone`.
OPENED, ANSWERED, OWN_OPENED, FIRST_BATCH, OWN_AFTER_BATCH, SOME_NAMES, A_PREFIX, LATER_BATCH = range(8)


def name_of(row: int) -> str:
    """Make a name of 14 characters."""
    return f"entity_{row:07d}"


def values_of(entries: int) -> Tensor:
    """Make rows whose numbers say which row it is."""
    return torch.arange(entries, dtype=torch.float32)[:, None].expand(entries, FLOATS).contiguous()


def folder_of(folder: Path, entries: int) -> Path:
    """Return the folder of the files with so many names."""
    return folder / str(entries)


def file_of(subject: str, folder: Path, entries: int) -> Path:
    """Return the file that a container opens."""
    return folder_of(folder, entries) / FILES.get(subject, "archive.safetensors")


def _make_in_memory(path: Path) -> pdrs.StackedParameterDict:
    """Make what lies in a file as training makes it: with an index in memory, and no part of the file."""
    entries = int(path.parent.name)
    return pdrs.StackedParameterDict.from_tensor([name_of(row) for row in range(entries)], values_of(entries))


OPEN: dict[str, Callable[[Path], Any]] = {
    TORCH: lambda path: torch.load(path, weights_only=True, mmap=True),
    SAFETENSORS: lambda path: safe_open(path, "pt"),
    IN_MEMORY: _make_in_memory,
    PDRS: pdrs.open,
}


# -- one process -------------------------------------------------------------------------------------------------------


def alone(subject: str, folder: Path, entries: int, forgotten: bool = False) -> tuple[float, ...]:
    """Open a file as a server does and answer; give nanoseconds and bytes, each in all, and nan for what it cannot."""
    # Whatever is done for the first time loads libraries.
    _serve(subject, file_of(subject, folder, WARM_ENTRIES), WARM_ENTRIES)
    gc.collect()
    path = file_of(subject, folder, entries)
    if forgotten and not drop(path):
        raise RuntimeError(f"{path} is still in the page cache")
    return _serve(subject, path, entries)


def _serve(subject: str, path: Path, entries: int) -> tuple[float, ...]:
    found = [math.nan] * 8
    drawn = random.Random(entries)
    row, rows = drawn.randrange(entries), drawn.choices(range(entries), k=BATCH)
    name, names = name_of(row), [name_of(row) for row in rows]
    some = drawn.sample(range(entries), min(BATCH, entries))
    some_names = [name_of(row) for row in some]
    gather = _gather(subject)
    own = own_bytes()
    begin = perf_counter_ns()
    opened = OPEN[subject](path)
    found[OPENED] = perf_counter_ns() - begin
    answer = _get(subject, opened, name)[0].item()
    found[ANSWERED] = perf_counter_ns() - begin
    assert answer == row
    found[OWN_OPENED] = _at_least_a_page(own_bytes() - own)
    found[FIRST_BATCH], answers = _timed(lambda: gather(opened, names))
    assert answers[:, 0].tolist() == rows
    del answers
    found[OWN_AFTER_BATCH] = _at_least_a_page(own_bytes() - own)
    if subject in (SAFETENSORS, PDRS):
        found[SOME_NAMES], chosen = _timed(lambda: _open_names(subject, path, some_names))
        assert chosen[some_names[-1]][0].item() == some[-1]
        found[A_PREFIX], below = _timed(lambda: _open_prefix(subject, path, name_of(0)[:-3]))
        assert len(below) == min(entries, BELOW_PREFIX)
    if subject in (IN_MEMORY, PDRS):
        # A server has mapped each page after some time.
        for start in range(0, entries, BATCH):
            gather(opened, [name_of(row) for row in range(start, min(start + BATCH, entries))])
        found[LATER_BATCH] = median(_timed(lambda: gather(opened, names))[0] for _ in range(LATER_RUNS))
    return tuple(found)


def _get(subject: str, opened: Any, name: str) -> Tensor:
    found: Tensor = opened.get_tensor(name) if subject == SAFETENSORS else opened[name]
    return found


def _gather(subject: str) -> Callable[[Any, Sequence[str]], Tensor]:
    if subject in (IN_MEMORY, PDRS):
        return lambda opened, names: opened.gather(names).detach()
    return lambda opened, names: torch.stack([_get(subject, opened, name) for name in names])


def _open_names(subject: str, path: Path, names: Sequence[str]) -> Any:
    if subject == PDRS:
        return pdrs.open(path, names=names)
    opened = OPEN[subject](path)
    return {name: opened.get_tensor(name) for name in names}


def _open_prefix(subject: str, path: Path, prefix: str) -> Any:
    if subject == PDRS:
        return pdrs.open(path, prefix=prefix)
    opened = OPEN[subject](path)
    below = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 - it cannot be iterated over
    return {name: opened.get_tensor(name) for name in below}


def _timed(run: Callable[[], Any]) -> tuple[int, Any]:
    begin = perf_counter_ns()
    result = run()
    return perf_counter_ns() - begin, result


# -- a forked child ----------------------------------------------------------------------------------------------------


def forked(subject: str, folder: Path, entries: int) -> tuple[float, ...]:
    """Let a forked child look names up, then walk over all; give the bytes a name of pages that it had to copy."""
    small = OPEN[subject](file_of(subject, folder, WARM_ENTRIES))
    opened = OPEN[subject](file_of(subject, folder, entries))
    gather, count = _gather(subject), min(entries, LOOKED_UP)
    gather(opened, [name_of(0)])
    gc.collect()
    gc.freeze()
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with open(reader) as pipe:
            answer = pipe.read()
        if os.waitpid(child, 0)[1] or not answer:
            raise RuntimeError("the forked child failed")
        looked_up, walked = map(float, answer.split())
        return looked_up / count, walked / entries
    # The names are of the child, as those that a client asks for.
    rows = list(range(entries))
    random.Random(1).shuffle(rows)
    names = [name_of(row) for row in rows[:count]]
    # What is done for the first time in a child copies pages that have nothing to do with names.
    few = [name_of(row % WARM_ENTRIES) for row in rows[:BATCH]]
    for _ in range(3):
        _look_up(gather, small, few)
        _walk(small)
        _written()
    copied = []
    runs: tuple[Callable[[], None], ...] = (lambda: _look_up(gather, opened, names), lambda: _walk(opened))
    for run in runs:
        before = _written()
        run()
        copied.append(_at_least_a_page(_written() - before))
    os.write(writer, " ".join(map(str, copied)).encode())
    os._exit(0)


def _look_up(gather: Callable[[Any, Sequence[str]], Tensor], opened: Any, names: Sequence[str]) -> None:
    """Look each name up twice: in a batch, and by itself."""
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        assert name_of(int(gather(opened, batch)[-1, 0].item())) == batch[-1]
    for name in names:
        assert name in opened


def _walk(opened: Any) -> None:
    deque(opened, maxlen=0)


# -- several processes -------------------------------------------------------------------------------------------------


def proportional_share(subject: str, folder: Path, entries: int) -> float:
    """Return the bytes that all processes together have more once each has opened a file and gathered names.

    A page of the file that several of them share counts once in all (``Pss`` of ``smaps``). Pages of other files are
    left out: any process that loads torch, or ends, changes their share.
    """
    path = file_of(subject, folder, entries)
    command = [sys.executable, __file__, "share", subject, str(folder), str(entries)]
    with _started(command) as workers:
        before = sum(_share_of(worker.pid, path) for worker in workers)
        for worker in workers:
            _tell(worker)
        for worker in workers:
            _wait(worker)
        after = sum(_share_of(worker.pid, path) for worker in workers)
    return _at_least_a_page(after - before)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    workers: list[subprocess.Popen[str]] = []
    try:
        for seed in range(PROCESSES):
            pipe = subprocess.PIPE
            workers.append(subprocess.Popen([*command, str(seed)], stdin=pipe, stdout=pipe, text=True))
        for worker in workers:
            _wait(worker)
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _tell(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def _wait(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError("a process that serves a file failed")


def _share_of(process: int, path: Path) -> int:
    """Return the bytes of a process that are no pages of files, or are pages of this file."""
    own, is_of_file = bytes_of("Pss_Anon", "smaps_rollup", process), False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        word, *others = line.split()
        if not word.endswith(":"):  # a mapping begins
            is_of_file = others[-1] == str(path)
        elif is_of_file and word == "Pss:":
            own += 1024 * int(others[0])
        elif is_of_file and word == "Anonymous:":
            own -= 1024 * int(others[0])  # which is counted already
    return own


def _share(subject: str, folder: Path, entries: int, seed: int) -> None:
    """Serve as one of several processes, a step for each line of standard input."""
    gather = _gather(subject)
    small = OPEN[subject](file_of(subject, folder, WARM_ENTRIES))
    gather(small, [name_of(row % WARM_ENTRIES) for row in range(BATCH)])
    names = [name_of(row) for row in random.Random(seed).choices(range(entries), k=BATCH)]
    trim()
    print("ready", flush=True)
    sys.stdin.readline()
    opened = OPEN[subject](file_of(subject, folder, entries))
    gather(opened, names)
    trim()
    print("ready", flush=True)
    sys.stdin.readline()


# -- memory ------------------------------------------------------------------------------------------------------------


def own_bytes() -> int:
    """Return the bytes of this process that are no pages of files."""
    trim()
    return bytes_of("RssAnon")


def _written() -> int:
    """Return the bytes of pages that only this process has, and has written to."""
    return bytes_of("Private_Dirty", "smaps_rollup")


def _at_least_a_page(count: int) -> int:
    """Return a number of bytes that others can be divided by."""
    return max(count, mmap.PAGESIZE)


# -- the command line --------------------------------------------------------------------------------------------------


def measured(what: str, subject: str, folder: Path, entries: int) -> tuple[float, ...]:
    """Measure in a fresh process; ``what`` is ``alone``, ``from_disk`` or ``forked``."""
    return figures(__file__, what, subject, str(folder), entries)


def main() -> None:
    """Measure what the command line asks for."""
    what, subject, folder, entries = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    gc.disable()
    # There is a process for each core, or more. And threads of torch do not survive a fork.
    torch.set_num_threads(1)
    if what == "share":
        _share(subject, folder, entries, int(sys.argv[5]))
    elif what == "forked":
        print(*forked(subject, folder, entries))
    else:
        print(*alone(subject, folder, entries, forgotten=what == "from_disk"))


if __name__ == "__main__":
    main()
