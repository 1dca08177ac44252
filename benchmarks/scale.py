"""A StackedParameterDict of very many names, from its making to its file: time and memory of each step.

``python benchmarks/scale.py 100_000_000 --columns 4`` prints a table. Beside it stands the same of a tenth of the
names, measured before in the same run. Each size has a process of its own. Names have 14 characters. Memory is what
Linux says in ``/proc``.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

import pdrs
from machine import describe
from memory import bytes_of, forget_peak, trim
from report import figure, table

BATCH = 1_000_000
GATHERED = 4_096
GATHERS = 9
SMALLER = 10


@dataclass(frozen=True)
class Step:
    """What a step took.

    Parameters
    ----------
    seconds
        Of one call, or of all names together.
    operations
        By how many names the time is divided.
    grown
        Bytes that the process has more after the step (``RssAnon``: without pages of files).
    peak
        Bytes that it had more at most, pages of files included (``VmHWM``).
    """

    title: str
    seconds: float
    operations: int
    grown: int
    peak: int


def name_of(row: int) -> str:
    """Make a name of 14 characters."""
    return f"n{row:013d}"


# -- one size ----------------------------------------------------------------------------------------------------------


def steps(entries: int, columns: int, path: Path) -> Iterator[Step]:
    """Do all steps, and give what each took."""
    drawn = random.Random(entries)
    _warm(path)
    sd = pdrs.StackedParameterDict()

    def gather(sd: pdrs.StackedParameterDict) -> float:
        rows = drawn.choices(range(entries), k=GATHERED)
        names = [name_of(row) for row in rows]
        begin = perf_counter()
        found = sd.gather(names)
        taken = perf_counter() - begin
        assert found[:, 0].tolist() == [row % MODULUS for row in rows]
        return taken

    def gather_often(sd: pdrs.StackedParameterDict) -> float:
        return median(gather(sd) for _ in range(GATHERS))

    def build() -> None:
        sd.reserve(entries, shape=(columns,))
        with tqdm(total=entries, disable=None, unit="name", unit_scale=True, desc=f"build {entries:,}") as bar:
            for start in range(0, entries, BATCH):
                rows = range(start, min(start + BATCH, entries))
                values = (torch.arange(rows.start, rows.stop) % MODULUS).float()[:, None].expand(-1, columns)
                sd.scatter([name_of(row) for row in rows], values, missing="insert")
                bar.update(len(rows))

    yield _step("build, in batches of a million", build, entries)
    yield _step("gather 4,096 random names, in memory", lambda: gather_often(sd), GATHERED)
    yield _step("save", lambda: pdrs.save(sd, path), entries)
    dropped = drawn.sample(range(entries), min(BATCH, entries // SMALLER))
    gone = [name_of(row) for row in dropped]
    yield _step("drop random names, a million or a tenth", lambda: sd.drop(gone), len(gone))
    assert len(sd) == entries - len(gone)
    assert gone[0] not in sd
    gone.clear()
    dropped.clear()
    # Its memory is not that of the file.
    sd = pdrs.StackedParameterDict()
    gc.collect()
    held: list[pdrs.StackedParameterDict] = []
    yield _step("open", lambda: held.append(pdrs.open(path)), 1)
    (opened,) = held
    row = drawn.randrange(entries)
    yield _step("look a name up, opened", lambda: opened[name_of(row)][0].item(), 1)
    yield _step("gather 4,096 random names, opened, first", lambda: gather(opened), GATHERED)
    yield _step("gather 4,096 random names, opened", lambda: gather_often(opened), GATHERED)


# float32 has each number below.
MODULUS = 1 << 24


def _warm(path: Path) -> None:
    """Do once what loads libraries."""
    sd = pdrs.StackedParameterDict({"warm": torch.zeros(2), "drop": torch.zeros(2)})
    pdrs.save(sd, path)
    sd.drop(["drop"])
    pdrs.open(path).gather(["warm"])


def _step(title: str, run: Callable[[], Any], operations: int) -> Step:
    """Run a step; one that returns a float has measured its time itself."""
    trim()
    forget_peak()
    own, all_pages = bytes_of("RssAnon"), bytes_of("VmRSS")
    with tqdm(total=1, disable=None, desc=title, bar_format="{desc} {elapsed}", leave=False):
        begin = perf_counter()
        result = run()
        taken = perf_counter() - begin
    peak = bytes_of("VmHWM") - all_pages
    trim()
    seconds = result if title.startswith("gather") else taken
    return Step(title, float(seconds), operations, bytes_of("RssAnon") - own, peak)


# -- all sizes ---------------------------------------------------------------------------------------------------------


def in_a_process(entries: int, columns: int) -> list[Step]:
    """Measure a size in a process of its own, which shows its progress on a terminal."""
    command = [sys.executable, __file__, str(entries), "--columns", str(columns), "--steps"]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return [Step(**json.loads(line)) for line in found.splitlines()]


def written(sizes: dict[int, list[Step]]) -> str:
    """Write the table."""
    rows = []
    for of_a_step in zip(*sizes.values(), strict=True):
        cells = [of_a_step[0].title]
        for entries, step in zip(sizes, of_a_step, strict=True):
            cells += [
                _seconds(step.seconds),
                f"{figure(step.seconds / step.operations * 1e9)} ns" if step.operations > 1 else "",
                f"{figure(step.grown / entries)} B",
                f"{figure(step.peak / entries)} B",
            ]
        rows.append(cells)
    head = [""]
    for entries in sizes:
        head += [f"{entries:,} names", "per name", "memory per name", "peak per name"]
    return table(head, rows)


def _seconds(value: float) -> str:
    return f"{figure(value)} s" if value >= 1 else f"{figure(value * 1e3)} ms"


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", type=int, help="the number of names, such as 100_000_000; a tenth is measured first")
    parser.add_argument("--columns", type=int, default=4, help="float32 numbers of each name (default: %(default)s)")
    parser.add_argument("--steps", action="store_true", help="measure only this size, and print each step as JSON")
    options = parser.parse_args(arguments)
    if options.entries < SMALLER or options.columns < 1:
        parser.error(f"at least {SMALLER} names and one column are needed")
    if options.steps:
        gc.disable()
        with tempfile.TemporaryDirectory(prefix="pdrs-benchmark-") as folder:
            for step in steps(options.entries, options.columns, Path(folder) / "archive.safetensors"):
                print(json.dumps(asdict(step)), flush=True)
        return
    sizes = {
        entries: in_a_process(entries, options.columns) for entries in (options.entries // SMALLER, options.entries)
    }
    machine = describe(f"python benchmarks/scale.py {options.entries:_} --columns {options.columns}")
    print(
        f"{options.columns} float32 for each name. {'; '.join(f'{key}: {value}' for key, value in machine.items())}\n"
    )
    print(written(sizes))


if __name__ == "__main__":
    main()
