"""One process of the tests of checkpoint sets: runs cases and writes what became of each to a file.

``python checkpoint_worker.py FOLDER CASE:RANKS...``, with ``RANK`` and ``WORLD_SIZE`` in the environment. The first
RANKS processes are in a case, in a group of their own.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharded_worker as sharded
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import pdrs
import pdrs.distributed
import pdrs.optim
from pdrs._core import hash_names
from pdrs._files.set_manifest import MANIFEST
from pdrs._ranks.checkpoint_load import read_bytes
from pdrs._ranks.initial_values import values_of
from pdrs.distributed import ShardedParameterDict

WIDTH = 4
HANGS = 280
GROUPS: list[Any] = []
# Steps before the checkpoint and after it.
BEFORE, AFTER = 6, 5

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda of: torch.optim.SGD(of, lr=0.5, momentum=0.9),
    "adam": lambda of: torch.optim.Adam(of, lr=0.05),
    "adagrad": lambda of: torch.optim.Adagrad(of, lr=0.3),
    "row_adam": lambda of: pdrs.optim.Adam(of, lr=0.05, per_row_steps=True),
    "row_adamw": lambda of: pdrs.optim.AdamW(of, lr=0.05, weight_decay=0.1, lazy_decay=True),
    "row_adagrad": lambda of: pdrs.optim.RowWiseAdagrad(of, lr=0.3),
}


class Model(torch.nn.Module):
    """Names in front of a dense layer; its words are sharded, or those of one process."""

    def __init__(self, words: torch.nn.Module) -> None:
        super().__init__()
        self.words = words
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(torch.eye(WIDTH) + 0.01)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        self.seen += 1
        return self.out(rows)


def sharded_model(seed: int = sharded.SEED, shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Model:
    group = GROUPS[-1] if GROUPS else None
    words = ShardedParameterDict(shape, group, seed=seed, init=sharded.INIT, timeout=120.0, **options)
    words._wrappers._looked_for_ddp = True  # among all objects, which takes most of the time
    return Model(words)


def wrapped(model: Model, world: int) -> Any:
    if world == 1:
        return model
    return DistributedDataParallel(pdrs.distributed.leave_out(model), process_group=GROUPS[-1])


def barrier() -> None:
    dist.barrier(GROUPS[-1])


def made(which: str) -> tuple[Model, torch.optim.Optimizer]:
    model = sharded_model()
    optimizer = OPTIMIZERS[which](model.parameters())
    model.words.attach_optimizer(optimizer)
    return model, optimizer


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range, rank: int, world: int) -> None:
    whole = wrapped(model, world)
    for step in steps:
        names = sharded.batch(step, rank, world)
        # Ranks that do not share a batch evenly weigh names equally.
        scale = world * len(names) / len(sharded.batch(step))
        optimizer.zero_grad()
        rows = whole(model.words.gather(names, "insert"))
        (sharded.loss_of(rows, names) * scale).backward()
        optimizer.step()


@functools.cache
def reference(which: str, steps: int) -> tuple[Model, torch.optim.Optimizer]:
    """Train in one process, without an interruption."""

    def begin(rows: Tensor, names: list[str]) -> None:
        rows.copy_(values_of(sharded.INIT, hash_names(names), sharded.SEED, (WIDTH,), rows.dtype))

    model = Model(sharded.plain())
    optimizer = OPTIMIZERS[which](model.parameters())
    model.words.attach_optimizer(optimizer)
    for step in range(steps):
        names = sharded.batch(step)
        optimizer.zero_grad()
        sharded.loss_of(model(model.words.gather(names, missing="insert", init=begin)), names).backward()
        optimizer.step()
    return model, optimizer


def apart(model: Model, optimizer: Any, expected: Any, of_expected: Any) -> float:
    """Return how far rows, states and the dense layer are from what is expected."""
    found = sharded.largest_difference(model.words, optimizer, expected.words, of_expected)
    found = max(found, float((model.out.weight - expected.out.weight).abs().max()))
    for key, value in optimizer.state[model.out.weight].items():
        other = of_expected.state[expected.out.weight][key]
        found = max(found, float((torch.as_tensor(value) - torch.as_tensor(other)).abs().max()))
    return found


def bits_of(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that a rank has, by name, as JSON."""
    table = model.words.local.table((WIDTH,))
    found: dict[str, Any] = {"out": model.out.weight.tolist(), "seen": model.seen.item()}
    rows = {name: int(row) for name, row in zip(model.words, model.words.local.indices().tolist(), strict=True)}
    ages = model.words._last_seen()
    for name, row in rows.items():
        states = [
            value[row].tolist() if torch.is_tensor(value) and value.dim() else float(value)
            for _, value in sorted(optimizer.state[table].items())
        ]
        found[name] = [table[row].tolist(), states, int(ages["float32_4"][row])]
    found["state"] = {
        key: torch.as_tensor(value).tolist() for key, value in sorted(optimizer.state[model.out.weight].items())
    }
    found["options"] = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return found


CASES: dict[str, Callable[..., Any]] = {}


def case(run: Callable[..., Any]) -> Callable[..., Any]:
    CASES[run.__name__] = run
    return run


@case
def save_all(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Train with each optimizer and save."""
    for which in OPTIMIZERS:
        model, optimizer = made(which)
        train(model, optimizer, range(BEFORE), rank, world)
        whole = wrapped(model, world)
        pdrs.distributed.save(whole, place / f"{which}-{world}", optimizer)
        torch.save(bits_of(model, optimizer), place / f"{which}-{world}.{rank}.bits")
    return {}


def continue_from(before: int, rank: int, world: int, place: Path) -> dict[str, Any]:
    """Load what so many ranks have saved, go on, and compare with one process that was not interrupted."""
    found, ratios, same = 0.0, [], True
    first = before + 5 * world
    for which in [name for at, name in enumerate(OPTIMIZERS) if (at - first) % 3 == 0 or before == world - 1 == 1]:
        model, optimizer = made(which)
        torch.nn.init.zeros_(model.out.weight)
        # What was there before must be gone.
        train(model, optimizer, range(30, 32), rank, world)
        pdrs.distributed.load(place / f"{which}-{before}", model, optimizer)
        if before == world:
            saved = torch.load(place / f"{which}-{before}.{rank}.bits")
            same = same and saved == bits_of(model, optimizer)
        rows = len(model.words)
        table = model.words.local.table((WIDTH,))
        by_row = [one for one in optimizer.state[table].values() if torch.is_tensor(one) and one.dim()]
        width = sum(one[:1].nbytes for one in (table, *by_row)) + 4
        dense = model.out.weight.nbytes + sum(
            one.nbytes for one in optimizer.state[model.out.weight].values() if torch.is_tensor(one)
        )
        own = rows * (width + 8) + sum(len(name) for name in model.words) + dense + 200
        ratios.append(read_bytes() / own)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER), rank, world)
        expected, of_expected = reference(which, BEFORE + AFTER)
        assert model.words.total() == len(expected.words)
        found = max(found, apart(model, optimizer, expected, of_expected))
    return {"apart": found, "ratio": max(ratios), "same": same}


for _before in range(1, 6):
    CASES[f"continue_from_{_before}"] = lambda rank, world, place, before=_before: continue_from(
        before, rank, world, place
    )


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


@case
def damage(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Load sets that are wrong, and return what is said; nothing may have changed."""
    folder = place / f"adam-{world}"
    model, optimizer = made("adam")
    train(model, optimizer, range(3), rank, world)
    before = bits_of(model, optimizer)
    said: dict[str, Any] = {}
    files = sorted(folder.glob("*.safetensors"))
    last, other = files[-1], sorted((place / f"sgd-{world}").glob("*.safetensors"))[-1]
    data, text = last.read_bytes(), (folder / MANIFEST).read_text()

    def tried(what: str, change: Callable[[], Any], undo: Callable[[], Any], **options: Any) -> None:
        barrier()
        if rank == 0:
            change()
        barrier()
        said[what] = error_of(lambda: pdrs.distributed.load(folder, model, optimizer, **options))
        barrier()
        if rank == 0:
            undo()
        barrier()
        assert bits_of(model, optimizer) == before, what

    def flipped() -> None:
        wrong = bytearray(data)
        wrong[-5] ^= 4
        last.write_bytes(wrong)

    restore = functools.partial(last.write_bytes, data)
    tried("missing", last.unlink, restore)
    tried("other set", lambda: last.write_bytes(other.read_bytes()), restore)
    tried("truncated", lambda: last.write_bytes(data[:-9]), restore)
    tried("flipped", flipped, restore, verify=True)
    manifest = folder / MANIFEST
    tried(
        "manifest", lambda: manifest.write_text(text.replace("xxh3_64", "xxh3_65")), lambda: manifest.write_text(text)
    )
    tried("no manifest", manifest.unlink, lambda: manifest.write_text(text))
    for what, options in (("seed", {"seed": 8}), ("dtype", {"dtype": torch.float64})):
        another = sharded_model(**options)
        said[what] = error_of(lambda another=another: pdrs.distributed.load(folder, another))
    another = sharded_model(shape=(WIDTH + 1,))
    said["shape"] = error_of(lambda: pdrs.distributed.load(folder, another))
    said["class"] = error_of(lambda: pdrs.distributed.load(folder, model, torch.optim.SGD(model.parameters(), lr=1.0)))
    said["dense"] = error_of(lambda: pdrs.distributed.load(folder, torch.nn.ModuleDict({"words": model.words})))
    assert bits_of(model, optimizer) == before
    pdrs.distributed.load(folder, model, optimizer, verify=True)
    return {"said": said, "files": [last.name, str(folder)]}


@case
def replicas_and_shapes(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Save on a mesh of replicas, and load on one, and without replicas."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    shapes = [(WIDTH,), (), (2, 3)]

    def fresh(mesh_or_group: Any) -> tuple[ShardedParameterDict, torch.optim.Optimizer]:
        words = ShardedParameterDict(shapes, mesh_or_group, seed=3, init=sharded.INIT, timeout=120.0)
        words._wrappers._looked_for_ddp = True
        return words, pdrs.optim.Adam(words.parameters(), lr=0.1)

    def step(words: ShardedParameterDict, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        loss: Any = 0.0
        for at, shape in enumerate(shapes):
            names = [f"{at}/{name}" for name in (f"of {rank}", f"of {number}", "all")]
            loss = loss + (words.gather(names, "insert", shape=shape) - 1).square().sum()
        loss.backward()
        optimizer.step()

    def all_of(words: ShardedParameterDict) -> list[Any]:
        names = [*(f"of {one}" for one in range(world)), "all"]
        return [
            words.gather([f"{at}/{name}" for name in names], shape=shape).detach().tolist()
            for at, shape in enumerate(shapes)
        ]

    words, optimizer = fresh(mesh)
    for number in range(3):
        step(words, optimizer, number)
    pdrs.distributed.save(words, place / "replicas", optimizer)
    files = sorted(one.name for one in (place / "replicas").iterdir())
    before = all_of(words)
    step(words, optimizer, 4)
    after = all_of(words)
    same, apart = True, 0.0
    for mesh_or_group in (GROUPS[-1], mesh):
        others, of_others = fresh(mesh_or_group)
        others.gather(["0/all", "0/other"], "insert")  # Rows that are known must be forgotten.
        pdrs.distributed.load(place / "replicas", others, of_others)
        same = same and all_of(others) == before
        step(others, of_others, 4)
        for one, two in zip(all_of(others), after, strict=True):
            apart = max(apart, float((torch.tensor(one) - torch.tensor(two)).abs().max()))
    return {"same": same, "apart": apart, "files": len(files), "total": others.total(), "expected": words.total()}


@case
def ranks_that_differ(rank: int, world: int, place: Path) -> dict[str, Any]:
    model, optimizer = made("adam")
    train(model, optimizer, range(2), rank, world)
    said = {}
    folder = place / f"differ-{world}"
    kept = model.out.weight.detach().clone()
    with torch.no_grad():
        model.out.weight[0, 0] += rank
    said["values"] = error_of(lambda: pdrs.distributed.save(model, folder, optimizer))
    with torch.no_grad():
        model.out.weight.copy_(kept)
    for group in optimizer.param_groups:
        group["lr"] = 0.05 + rank
    said["options"] = error_of(lambda: pdrs.distributed.save(model, folder, optimizer))
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    if rank == 1:
        optimizer.state[model.words.local.table((WIDTH,))]["step"] += 1
    said["steps"] = error_of(lambda: pdrs.distributed.save(model, folder, optimizer))
    metadata = {"step": "2"} if rank == 0 else None
    said["metadata"] = error_of(lambda: pdrs.distributed.save(model, folder, metadata=metadata))
    assert not (folder / MANIFEST).exists()
    return {"said": said}


@case
def ranks_that_verify_differently(rank: int, world: int, place: Path) -> dict[str, Any]:
    model, optimizer = made("adam")
    train(model, optimizer, range(2), rank, world)
    pdrs.distributed.save(model, place / f"verified-{world}", optimizer)
    before = values(model.words)
    said = error_of(lambda: pdrs.distributed.load(place / f"verified-{world}", model, optimizer, verify=rank == 0))
    assert before == values(model.words)
    return {"said": said}


def values(words: ShardedParameterDict) -> dict[str, list[float]]:
    return {name: words.local[name].tolist() for name in words}


@case
def a_rank_that_cannot_write(rank: int, world: int, place: Path) -> dict[str, Any]:
    model, optimizer = made("adam")
    train(model, optimizer, range(2), rank, world)
    folder = place / f"full-{world}"
    pdrs.distributed.save(model, folder, optimizer)
    barrier()
    before = sorted(os.listdir(folder))
    write = os.write

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    if rank == 1:
        os.write = full
    try:
        said = error_of(lambda: pdrs.distributed.save(model, folder, optimizer))
    finally:
        os.write = write
    barrier()
    after = sorted(os.listdir(folder))
    pdrs.distributed.load(folder, model, optimizer, verify=True)
    return {"said": said, "before": before, "after": after}


@case
def deltas(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Save a chain of changes in one folder, and one in another folder; load each with what it was."""
    model, optimizer = made("row_adam")
    many = [f"many/{at}" for at in range(rank, 4000, world)]
    model.words.gather(many, "insert")
    train(model, optimizer, range(3), rank, world)
    folder, other = place / f"chain-{world}", place / f"chain-other-{world}"
    sizes = [pdrs.distributed.save(model, folder, optimizer, metadata={"run": "one"})]
    for turn in range(3):
        train(model, optimizer, range(3 + turn, 4 + turn), rank, world)
        model.words.gather([f"new/{turn}/{rank}/{at}" for at in range(20)], "insert")
        model.words.drop([f"many/{at}" for at in range(100 * turn + rank, 100 * turn + 50, world)])
        if turn == 1:
            model.words.gather(["many/0", "many/1"], "insert")
        sizes.append(pdrs.distributed.save(model, other if turn == 2 else folder, optimizer, since=folder))
    barrier()
    names = sorted(os.listdir(other))
    kept = bits_of(model, optimizer)
    fresh, of_fresh = made("row_adam")
    pdrs.distributed.load(other, fresh, of_fresh, verify=True)
    torch.save(kept, place / f"chain-other-{world}.{rank}.bits")
    return {
        "sizes": sizes,
        "files": len(names),
        "same": bits_of(fresh, of_fresh) == kept,
        "names": [len(model.words), len(fresh.words)],
    }


@case
def load_deltas(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Load the chains that other numbers of ranks have saved."""
    same, ratios = True, []
    for before in (2, 3):
        model, optimizer = made("row_adam")
        pdrs.distributed.load(place / f"chain-other-{before}", model, optimizer)
        expected: dict[str, Any] = {}
        for one in range(before):
            expected |= torch.load(place / f"chain-other-{before}.{one}.bits")
        found = bits_of(model, optimizer)
        same = same and all(expected[key] == value for key, value in found.items())
        assert model.words.total() == len([key for key in expected if "/" in key])
        rows = len(model.words)
        ratios.append(read_bytes() / (rows * (4 * (3 * WIDTH + 2) + 8) + sum(map(len, model.words))))
    said = ""
    if world != 2:
        said = error_of(lambda: pdrs.distributed.save(model, place / "other-world", optimizer, since=place / "chain-2"))
    return {"same": same, "ratio": max(ratios), "said": said}


@case
def frozen_names_and_ages(rank: int, world: int, place: Path) -> dict[str, Any]:
    model, optimizer = made("adam")
    train(model, optimizer, range(4), rank, world)
    frozen = [name for name in model.words if name in ("name/1", "name/2", "name/3")]
    model.words.local.freeze(frozen)
    old = set(model.words)
    pdrs.distributed.save(model, place / f"frozen-{world}", optimizer)
    fresh, of_fresh = made("adam")
    pdrs.distributed.load(place / f"frozen-{world}", fresh, of_fresh)
    before = {name: fresh.words.local[name].tolist() for name in frozen}
    for one, its in ((model, optimizer), (fresh, of_fresh)):
        train(one, its, range(4, 7), rank, world)
        one.words.evict(older_than=4)
    assert {name: fresh.words.local[name].tolist() for name in frozen if name in fresh.words} == {
        name: value for name, value in before.items() if name in fresh.words
    }
    return {
        "frozen": len(frozen),
        "gone": len(old - set(fresh.words)),
        "same": bits_of(model, optimizer) == bits_of(fresh, of_fresh),
    }


@case
def async_save(rank: int, world: int, place: Path) -> dict[str, Any]:
    """Save by torch.distributed.checkpoint, and change all tables while it writes."""
    for which in BY_BUCKET:
        model, optimizer = made(which)
        train(model, optimizer, range(BEFORE), rank, world)
        kept = bits_of(model, optimizer)
        state = pdrs.distributed.bucket_state_dict(model, optimizer)
        given = {key: value.clone() for key, value in state.items()}
        folder = place / f"dcp-{which}-{world}"
        if which == "sgd":
            dcp.save(state, checkpoint_id=folder, process_group=GROUPS[-1])
        else:
            writing = dcp.async_save(state, checkpoint_id=folder, process_group=GROUPS[-1])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(99)
                for held in optimizer.state.values():
                    for value in held.values():
                        if torch.is_tensor(value):
                            value.fill_(77)
            model.words.local.clear()
            writing.result()
        assert all(torch.equal(value, given[key]) for key, value in state.items()), "it shares memory with the model"
        torch.save(kept, place / f"dcp-{which}-{world}.{rank}.bits")
        barrier()
    return {}


BY_BUCKET = ("sgd", "row_adam", "adam")


def load_buckets(before: int, rank: int, world: int, place: Path) -> dict[str, Any]:
    found, same = 0.0, True
    for which in BY_BUCKET:
        model, optimizer = made(which)
        train(model, optimizer, range(30, 32), rank, world)
        folder = place / f"dcp-{which}-{before}"
        metadata = dcp.FileSystemReader(folder).read_metadata()
        state = pdrs.distributed.bucket_template(metadata, model, optimizer)
        dcp.load(state, checkpoint_id=folder, process_group=GROUPS[-1])
        pdrs.distributed.load_bucket_state_dict(state, model, optimizer)
        if before == world:
            same = same and torch.load(place / f"dcp-{which}-{before}.{rank}.bits") == bits_of(model, optimizer)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER), rank, world)
        expected, of_expected = reference(which, BEFORE + AFTER)
        assert model.words.total() == len(expected.words)
        found = max(found, apart(model, optimizer, expected, of_expected))
    return {"apart": found, "same": same}


for _before in (1, 2, 3):
    CASES[f"load_buckets_{_before}"] = lambda rank, world, place, before=_before: load_buckets(
        before, rank, world, place
    )


def _level_groups(rank: int) -> None:
    """Wait for all processes, and let all have made as many groups: torch names the next one by that number."""
    counts: list[Any] = [None] * dist.get_world_size()
    made = len(dist.distributed_c10d._world.pg_names)
    dist.all_gather_object(counts, made)
    for _ in range(max(counts) - made):
        dist.new_group([rank], use_local_synchronization=True)


def main(folder: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    with sharded.group(folder) as (rank, _):
        for one in cases:
            name, _, world = one.partition(":")
            if rank < int(world):
                GROUPS.append(dist.new_group(list(range(int(world))), use_local_synchronization=True))
                faulthandler.dump_traceback_later(HANGS, exit=True)
                begun = time.monotonic()
                try:
                    became = {"ok": CASES[name](rank, int(world), Path(folder))}
                except Exception:
                    became = {"error": traceback.format_exc()}
                Path(folder, f"{name}-{world}-{rank}.json").write_text(json.dumps(became))
                print(f"{one}: {time.monotonic() - begun:.2f} s", flush=True)
            faulthandler.dump_traceback_later(HANGS, exit=True)
            _level_groups(rank)
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
