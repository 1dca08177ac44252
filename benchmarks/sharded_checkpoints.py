"""Save and load a sharded dictionary beside copying and reading the same bytes.

``torchrun --nproc-per-node 2 benchmarks/sharded_checkpoints.py`` prints tables; ``--output`` writes them to a file. All
runs are in turn, so that what disturbs one disturbs the others. A ratio is the median over the rounds of ours over the
other's. Times are those of the slowest rank. A save waits for the disk, and so does the copy. Those in memory do not.
The page cache is warm. Before all that is measured, the benchmark has used as much memory and given it back. For the
first use of memory may wait for the host of a virtual machine, for several times as long as the reading takes.

Each save replaces the one before it, and each copy the one before it. A save gives back what old files took after it
has returned, and the copy before it begins. So there is also a ratio with the time until then.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import pdrs.distributed
from machine import describe
from pdrs._files.freed_later import wait_until_freed
from pdrs._ranks.checkpoint_load import read_bytes
from pdrs._rows.names_codec import bytes_of
from pdrs._torch.huge_pages import empty
from pdrs.distributed import ShardedParameterDict

# The most that a save and a load may take of what copying and reading take, and a rank may read of its own bytes.
TARGETS = {
    "save / cp": 1.3,
    "save until old files are freed / cp": 1.3,
    "load / read": 1.5,
    "load on one rank / read": 1.5,
    "bytes read / own bytes": 1.2,
}
_OTHERS = ("save / cp in memory", "load / read into huge pages", "load on one rank / read into huge pages")
_BLOCK = 8 << 20


def measure(names: int, width: int, rounds: int, folder: Path, group: Any = None) -> dict[str, Any]:
    """Measure on all ranks of a group, and return ratios on each.

    Parameters
    ----------
    names
        How many there are on all ranks together.
    width
        How many numbers a row has.
    rounds
        How often each is measured.
    folder
        An empty folder that all ranks see.
    group
        The process group; the default is that of all ranks.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    model, optimizer = _trained(names, width, rank, world, group)
    alone = dist.new_group([0])
    saved, copied = folder / "saved", folder / f"copied-{rank}"
    times: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        dist.barrier(group)
        begun = perf_counter()
        work(*arguments, **options)
        took = torch.tensor([perf_counter() - begun], dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX, group)
        times.setdefault(what, []).append(float(took))

    share = 0.0
    pdrs.distributed.save(model, saved, optimizer)
    files = sorted(saved.glob("*.safetensors"))
    for turn in range(rounds + 1):
        for sync, how in ((True, ""), (False, " in memory")):
            _make_ready(files[rank].stat().st_size)
            timed(f"save{how}", pdrs.distributed.save, model, saved, optimizer, sync=sync)
            timed(f"free old files{how}", wait_until_freed)
            files = sorted(saved.glob("*.safetensors"))
            _make_ready(files[rank].stat().st_size)
            timed(f"cp{how}", _copy, files[rank], copied, sync)
        fresh, of_fresh = _new(width, group)
        size, all_bytes = files[rank].stat().st_size, sum(file.stat().st_size for file in files)
        _use_memory(size, huge=True)
        timed("load", pdrs.distributed.load, saved, fresh, of_fresh)
        share = read_bytes() / size
        del fresh, of_fresh
        for huge, where in ((False, ""), (True, " into huge pages")):
            _use_memory(size, huge)
            timed(f"read{where}", _read, [files[rank]], huge)
        _use_memory(all_bytes if rank == 0 else 0, huge=True)
        if rank == 0:
            one, of_one = _new(width, alone)
            timed("load on one rank", pdrs.distributed.load, saved, one, of_one)
            del one, of_one
        else:
            timed("load on one rank", lambda: None)
        for huge, where in ((False, ""), (True, " into huge pages")):
            _use_memory(all_bytes if rank == 0 else 0, huge)
            timed(f"read on one rank{where}", _read, files if rank == 0 else [], huge)
        if turn == 0:
            times.clear()  # the first round makes files and fills caches

    def ratio(ours: str, other: str) -> float:
        return statistics.median(one / two for one, two in zip(times[ours], times[other], strict=True))

    times["until freed"] = [sum(both) for both in zip(times["save"], times["free old files"], strict=True)]

    shares: list[Any] = [0.0] * world
    dist.all_gather_object(shares, share, group)
    return {
        "names": names,
        "width": width,
        "ranks": world,
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": {what: statistics.median(found) for what, found in times.items()},
        "save / cp": ratio("save", "cp"),
        "save until old files are freed / cp": ratio("until freed", "cp"),
        "save / cp in memory": ratio("save in memory", "cp in memory"),
        "load / read": ratio("load", "read"),
        "load on one rank / read": ratio("load on one rank", "read on one rank"),
        "load / read into huge pages": ratio("load", "read into huge pages"),
        "load on one rank / read into huge pages": ratio("load on one rank", "read on one rank into huge pages"),
        "bytes read / own bytes": max(shares),
    }


def _make_ready(size: int) -> None:
    """Let nobody wait for what others have left for the disk, nor for the first use of memory."""
    os.sync()
    # The page cache takes as much, and names come on top.
    _use_memory(2 * size, huge=False)


def _copy(source: Path, target: Path, sync: bool) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    if sync:
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _memory(size: int, huge: bool) -> memoryview:
    """Return memory from the system, as that of tables is, and not what the last round has left."""
    # Linux gives no pages before they are written to.
    return bytes_of(empty(size, dtype=torch.uint8)).data if huge else memoryview(mmap.mmap(-1, size))


def _use_memory(size: int, huge: bool) -> None:
    """Use memory, and give it back. The next one to ask for as much gets it."""
    if size:
        np.frombuffer(_memory(size, huge), np.uint8)[::4096] = 1


def _read(files: list[Path], huge: bool) -> None:
    for file in files:
        memory = _memory(file.stat().st_size, huge)
        with file.open("rb") as raw:
            at = 0
            while at < len(memory):
                at += os.preadv(raw.fileno(), [memory[at : at + _BLOCK]], at)


def _new(width: int, group: Any) -> tuple[ShardedParameterDict, torch.optim.Optimizer]:
    words = ShardedParameterDict((width,), group, init=pdrs.distributed.normal(0.01), known_names=2)
    optimizer = torch.optim.Adam(words.parameters())
    words.attach_optimizer(optimizer)
    return words, optimizer


def _trained(
    names: int, width: int, rank: int, world: int, group: Any
) -> tuple[ShardedParameterDict, torch.optim.Optimizer]:
    """Return a dictionary with so many names, and an optimizer that has state for them."""
    words, optimizer = _new(width, group)
    step = 100_000
    for first in range(0, names, step * world):
        batch = [f"word/{at:09}" for at in range(first + rank, min(first + step * world, names), world)]
        words.gather(batch, "insert").square().mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return words, optimizer


def _report(found: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    command = f"torchrun --nproc-per-node {found['ranks']} benchmarks/sharded_checkpoints.py"
    seconds = "".join(f"| {what} | {took * 1000:.1f} ms |\n" for what, took in found["seconds"].items())
    ratios = "".join(
        f"| {what} | {found[what]:.2f} | {bound} | {'yes' if found[what] <= bound else '**no**'} |\n"
        for what, bound in TARGETS.items()
    )
    return (
        "# Checkpoints of a sharded table\n\n"
        f"{found['names']:,} names of {found['width']} float32 with Adam, {found['ranks']} ranks with one thread each, "
        f"{found['bytes'] / 1e6:.0f} MB. Medians of the slowest rank. The page cache is warm, and memory has been used "
        "before. Tables lie on huge pages.\n\n"
        + "".join(f"- {key}: {value}\n" for key, value in describe(command).items())
        + f"\n| | time |\n| --- | ---: |\n{seconds}"
        + f"\n| | ratio | at most | met |\n| --- | ---: | ---: | --- |\n{ratios}"
        + "".join(f"| {what} | {found[what]:.2f} | | |\n" for what in _OTHERS)
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=1_000_000, help="on all ranks together")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place = [tempfile.mkdtemp(dir=options.folder)]
    dist.broadcast_object_list(place, 0)
    try:
        found = measure(options.names, options.width, options.rounds, Path(place[0]))
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(place[0])
    if dist.get_rank() == 0:
        text = _report(found)
        print(text)
        if options.output is not None:
            options.output.write_text(text, encoding="utf-8")
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
