"""One rank of the tests of ShardedParameterDict: runs cases and writes what became of each to a file.

``python sharded_worker.py FOLDER CASE...``, with ``RANK`` and ``WORLD_SIZE`` in the environment. Cases have groups of
their own, so that one that breaks its group leaves the others alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import pdrs._ranks.sharded
import pdrs.distributed
import pdrs.optim
from pdrs import StackedParameterDict
from pdrs._core import hash_names
from pdrs._ranks import exchange
from pdrs._ranks.initial_values import values_of
from pdrs._ranks.owners import owners_of
from pdrs.distributed import OutOfStepError, ShardedParameterDict, normal

WIDTH = 4
SEED = 7
INIT = normal(0.1)
# A case that takes so many seconds hangs, and ends its rank.
HANGS = 50
# A batch is cut into so many parts, which 1, 2, 3 and 4 ranks share evenly.
PARTS = 12
ODD_NAMES = ["\0", "a\0b", "\ud800", "x\udfff", "é", "e\u0301", "名前", "\U0001f600", " ", "long" * 250_000]

CASES: dict[str, Callable[[int, int], Any]] = {}


def case(run: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    CASES[run.__name__] = run
    return run


def new(**options: Any) -> ShardedParameterDict:
    """Return a dictionary with a group of its own."""
    options = {"seed": SEED, "init": INIT, "timeout": 10.0, **options}
    return ShardedParameterDict((WIDTH,), dist.new_group(), **options)


def part_of_batch(step: int, part: int) -> list[str]:
    """Return names of a vocabulary that grows."""
    generator = random.Random(1000 * step + part)
    return [f"name/{min(int(generator.paretovariate(0.6)), 20 + 12 * step)}" for _ in range(6)]


def batch(step: int, rank: int = 0, world: int = 1) -> list[str]:
    """Return the names of a rank, or of the whole batch."""
    return [name for part in range(rank, PARTS, world) for name in part_of_batch(step, part)]


def loss_of(rows: Tensor, names: list[str]) -> Tensor:
    """Return the mean over names of how far rows are from targets. Without names it is zero, and still has a graph."""
    if not names:
        return rows.sum()
    targets = torch.tensor([[float(int(name.rpartition("/")[2]) % (5 + at)) for at in range(WIDTH)] for name in names])
    return ((rows - 0.1 * targets) ** 2).sum(1).mean()


def plain() -> StackedParameterDict:
    words = StackedParameterDict()
    words.reserve(1, shape=(WIDTH,))
    return words


def begin(rows: Tensor, names: list[str]) -> None:
    rows.copy_(values_of(INIT, hash_names(names), SEED, (WIDTH,), rows.dtype))


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], bool | None]] = {
    "sgd": (lambda of: torch.optim.SGD(of, lr=0.5, momentum=0.9), False),
    "adam": (lambda of: torch.optim.Adam(of, lr=0.05), False),
    "adamw": (lambda of: torch.optim.AdamW(of, lr=0.05, weight_decay=0.1), False),
    "adagrad": (lambda of: torch.optim.Adagrad(of, lr=0.3), False),
    "sparse_adam": (lambda of: torch.optim.SparseAdam(of, lr=0.05), True),
    "row_adam": (lambda of: pdrs.optim.Adam(of, lr=0.05), None),
    "row_adagrad": (lambda of: pdrs.optim.RowWiseAdagrad(of, lr=0.3), None),
}
DROPPED = ["name/1", "name/2", "name/5", "name/9999"]
FROZEN = ["name/3", "name/4", "name/7"]
DROP_AT, FREEZE_AT, EVICT_AT, OLD, STEPS = 7, 10, 13, 4, 20


def reference(which: str) -> tuple[StackedParameterDict, torch.optim.Optimizer]:
    """Train a plain dictionary in one process on whole batches."""
    make, sparse = OPTIMIZERS[which]
    words = plain()
    optimizer = make(words.parameters())
    words.attach_optimizer(optimizer)
    last: dict[str, int] = {}
    for step in range(STEPS):
        names = batch(step)
        optimizer.zero_grad()
        loss_of(words.gather(names, missing="insert", init=begin, sparse=sparse), names).backward()
        optimizer.step()
        last.update(dict.fromkeys(names, step))
        if step == DROP_AT:
            words.drop(DROPPED, missing="skip")
        if step == FREEZE_AT:
            words.freeze(FROZEN)
        if step == EVICT_AT:
            words.drop([name for name in words if last[name] <= step - OLD])
    return words, optimizer


def mesh_of(world: int, shards: int) -> Any:
    """Return a mesh of replicas, each of so many ranks; or all in one, if they are not a multiple."""
    shards = world if world % shards else shards
    return init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def train(which: str, rank: int, world: int, ahead: bool = False, shards: int | None = None) -> dict[str, Any]:
    make, sparse = OPTIMIZERS[which]
    if shards is None:
        words = new(known_names=64)
    else:
        words = ShardedParameterDict((WIDTH,), mesh_of(world, shards), seed=SEED, init=INIT, known_names=64, timeout=10)
    optimizer = make(words.parameters())
    words.attach_optimizer(optimizer)
    plan, evicted = None, 0
    for step in range(STEPS):
        names = batch(step, rank, world)
        optimizer.zero_grad()
        if ahead:
            plan = words.plan(names, "insert") if plan is None else plan
            rows = words.gather(plan, sparse=sparse)
            # Between the passes, and before the names that it has go.
            plan = words.plan(batch(step + 1, rank, world), "insert") if step + 1 < STEPS else None
        else:
            rows = words.gather(names, "insert", sparse=sparse)
        loss_of(rows, names).backward()
        optimizer.step()
        if step == DROP_AT:
            words.drop(DROPPED[rank:] if rank < len(DROPPED) - 1 else [], missing="skip")
        if step == FREEZE_AT:
            words.local.freeze([name for name in FROZEN if name in words.local])
        if step == EVICT_AT:
            evicted = words.evict(older_than=OLD)
    expected, of_expected = reference(which)
    assert words.total() == len(expected), (words.total(), len(expected))
    return {
        "apart": largest_difference(words, optimizer, expected, of_expected),
        "names": len(words),
        "evicted": evicted,
    }


def largest_difference(
    words: ShardedParameterDict,
    optimizer: torch.optim.Optimizer,
    expected: StackedParameterDict,
    of_expected: torch.optim.Optimizer,
) -> float:
    """Return how far rows and states are from what is expected, by name."""
    names = list(words)
    rows, others = words.local.indices(names), expected.indices(names) if names else torch.empty(0, dtype=torch.int64)
    table, other = words.local.table((WIDTH,)), expected.table((WIDTH,))
    pairs = [(table.detach()[rows], other.detach()[others])]
    state, of_other = optimizer.state[table], of_expected.state[other]
    assert set(state) == set(of_other), (set(state), set(of_other))
    for key, value in state.items():
        if torch.is_tensor(value) and value.dim():
            pairs.append((value[rows], of_other[key][others]))
        else:
            assert float(value) == float(of_other[key]), (key, value, of_other[key])
    return max((float((one - two).abs().max()) for one, two in pairs if one.numel()), default=0.0)


for _name in OPTIMIZERS:
    CASES[f"train_{_name}"] = lambda rank, world, which=_name: train(which, rank, world)
CASES["train_with_replicas"] = lambda rank, world: train("adam", rank, world, shards=2)
CASES["train_with_whole_replicas"] = lambda rank, world: train("row_adagrad", rank, world, shards=1)
CASES["train_ahead"] = lambda rank, world: train("adam", rank, world, ahead=True)


@case
def replicas_have_the_same_bits(rank: int, world: int) -> dict[str, Any]:
    bits = []
    for wire in (None, torch.bfloat16):
        words = ShardedParameterDict((WIDTH,), mesh_of(world, 2), seed=SEED, init=INIT, wire=wire, timeout=10)
        optimizer = pdrs.optim.Adam(words.parameters(), lr=0.1)
        words.attach_optimizer(optimizer)
        for step in range(6):
            names = batch(step, rank, world)
            optimizer.zero_grad()
            loss_of(words.gather(names, "insert"), names).backward()
            pdrs.distributed.clip_grad_norm_(words.parameters(), 0.01)
            optimizer.step()
        words.scatter([f"mine/{rank}", "all"], torch.full((2, WIDTH), float(rank)), missing="insert")
        assert words.gather([*(f"mine/{each}" for each in range(world)), "all"])[:, 0].tolist() == [
            *map(float, range(world)),
            world - 1.0,
        ]
        before = words.total()
        words.drop([f"mine/{rank}", "all"])
        assert words.total() == before - world - 1
        assert "all" not in words
        mine: list[Any] = [None] * world
        names = list(words)
        dist.all_gather_object(mine, (names, words.local.gather(names).detach().view(torch.int32).tolist()))
        shards = world if world % 2 else 2
        bits += [mine[rank] == mine[peer] for peer in range(rank % shards, world, shards)]
        assert sum(len(one) for one, _ in mine[:shards]) == words.total()
    return {"same": all(bits), "compared": len(bits)}


@case
def rows_of_several_shapes(rank: int, world: int) -> dict[str, Any]:
    words = ShardedParameterDict([(2,), (), (3, 2)], dist.new_group(), seed=SEED, init=INIT, timeout=10)
    optimizer = torch.optim.SGD(words.parameters(), lr=1.0)
    words.attach_optimizer(optimizer)
    rows = [
        words.gather([f"a/{rank}", "a"], "insert"),
        words.gather(words.plan(["b", f"b/{rank}"], "insert", shape=())),
        words.gather(["c"], "insert", shape=(3, 2)),
    ]
    assert [tuple(each.shape) for each in rows] == [(2, 2), (2,), (1, 3, 2)]
    before = [each.detach().clone() for each in rows]
    sum(each.sum() for each in rows).backward()
    optimizer.step()
    shares = [torch.tensor([[1 / world], [1.0]]), torch.tensor([1.0, 1 / world]), torch.ones(1, 1, 1)]
    after = [
        words.gather([f"a/{rank}", "a"]),
        words.gather(["b", f"b/{rank}"], shape=()),
        words.gather(["c"], shape=(3, 2)),
    ]
    for one, two, share in zip(before, after, shares, strict=True):
        torch.testing.assert_close(two, one - share)
    assert words.total() == 3 + 2 * world
    # A name has one shape, whoever asks.
    said = error_of(lambda: words.gather(["a"], "insert", shape=()), (ValueError, RuntimeError))
    assert "shape" in said, said
    said = error_of(lambda: words.gather(["a"], shape=(5,)), ValueError)
    assert "expected a shape of the dictionary" in said
    values = torch.zeros(1, 3, 2) if rank else torch.zeros(1, 2)
    if world > 1:
        error_of(lambda: words.scatter(["x"], values, missing="insert"), ValueError)
    assert words.total() == 3 + 2 * world
    words.scatter(["b"], torch.tensor([5.0]))
    assert words.gather(["b"], shape=()).tolist() == [5.0]
    words.drop(["a", "b", "c"] if rank == 0 else ["c"])
    assert words.total() == 2 * world
    words.gather([], shape=(3, 2)).sum().backward()
    for _ in range(3):
        words.gather([f"a/{each}" for each in range(world)])
    words.evict(older_than=2)
    assert words.total() == world
    return {}


@case
def names_of_a_call_that_fails_are_removed(rank: int, world: int) -> dict[str, Any]:
    words = new()
    optimizer = torch.optim.Adam(words.parameters())
    words.gather(batch(0), "insert").sum().backward()
    optimizer.step()
    if rank < world - 1:
        words.attach_optimizer(optimizer)
    before = list(words)
    # The table of the last rank cannot grow, because nobody has told it of its optimizer.
    more = [f"more/{number}" for number in range(300)]
    said = error_of(lambda: words.gather(more, "insert"), RuntimeError)
    assert list(words) == before, said
    if rank == world - 1:
        words.attach_optimizer(optimizer)
    words.gather(more, "insert").sum().backward()
    optimizer.step()
    assert words.total() == len(set(batch(0))) + 300
    return {}


@case
def batches_are_planned_ahead(rank: int, world: int) -> dict[str, Any]:
    words = new()
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)
    words.attach_optimizer(optimizer)
    batches = [(step, batch(step, rank, world)) for step in range(5)]
    seen = []
    for (step, names), plan in words.ahead(batches, "insert", names=lambda one: one[1]):
        assert list(plan.names) == names
        assert torch.equal(words.gather(plan), words.gather(names))
        loss_of(words.gather(plan), names).backward()
        optimizer.step()
        if step == 2:
            words.evict(older_than=1)  # also names of the next batch, which come again
        seen.append(step)
    assert seen == list(range(5))
    assert list(words.ahead([], "insert")) == []
    return {}


@case
def out_of_step_a_rank_has_fewer_batches(rank: int, world: int) -> dict[str, Any]:
    words = new()
    batches = [batch(step, rank, world) for step in range(2 if rank == 1 else 3)]

    def train_all() -> None:
        for names, plan in words.ahead(batches, "insert"):
            loss_of(words.gather(plan), names).backward()

    said = error_of(train_all, OutOfStepError)
    assert "the end of its batches" in said, said
    return {"said": said, "took": 0}


@case
def whole_batch_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    words, expected = new(), plain()
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.05) for each in (words, expected)]
    words.attach_optimizer(optimizers[0])
    expected.attach_optimizer(optimizers[1])
    for step in range(4):
        names = batch(step) if rank == world - 1 else []
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss_of(words.gather(names, "insert"), names) * world).backward()
        loss_of(expected.gather(batch(step), missing="insert", init=begin), batch(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {"apart": largest_difference(words, optimizers[0], expected, optimizers[1])}


@case
def owners_that_nobody_asks_count_steps(rank: int, world: int) -> dict[str, Any]:
    of_first = [name for name in map(str, range(100)) if owners_of([name], world)[0] == 0][:3]
    steps = []
    for make, sparse in OPTIMIZERS.values():
        words = new()
        optimizer = make(words.parameters())
        words.attach_optimizer(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            words.gather(of_first, "insert", sparse=sparse).sum().backward()
            optimizer.step()
        steps.append(float(optimizer.state[words.local.table((WIDTH,))].get("step", 3)))
    return {"steps": steps}


@case
def initial_values(rank: int, world: int) -> dict[str, Any]:
    words = new(init=normal(0.5, mean=1.0))
    names = [*(f"name/{number}" for number in range(50)), *ODD_NAMES[:-1]]
    random.Random(rank).shuffle(names)
    words.gather(names[rank::world], "insert")
    words.gather(names, "insert")
    ordered = sorted(names)
    return {"bits": words.gather(ordered).detach().view(torch.int32).tolist()}


@case
def odd_names_are_sent_as_text(rank: int, world: int) -> dict[str, Any]:
    words = new(known_names=4)
    values = torch.arange(len(ODD_NAMES) * WIDTH, dtype=torch.float32).view(-1, WIDTH)
    words.scatter(ODD_NAMES if rank == 0 else [], values if rank == 0 else values[:0], missing="insert")
    for _ in range(3):
        assert torch.equal(words.gather(ODD_NAMES[::-1]), values.flip(0))
    owned = [name for name, one in zip(ODD_NAMES, owners_of(ODD_NAMES, world), strict=True) if one == rank]
    assert sorted(words) == sorted(owned)
    return {}


@case
def data_that_does_not_fit_into_a_window(rank: int, world: int) -> dict[str, Any]:
    before, exchange._WINDOW = exchange._WINDOW, exchange.HEADER_BYTES + 1024
    try:
        words = new()
    finally:
        exchange._WINDOW = before
    other = new()
    # Of some ranks the names fit, the rows and the gradients do not; of others all fit, or nothing does.
    for count in (3 if rank == 0 else 200, 200, 0 if rank == 0 else 5, 3):
        names = [f"{rank % 2}/{number}/{'x' * (number % 7)}" for number in range(count)]
        for planned in (False, True):
            found = []
            for each in (words, other):
                each.local.zero_grad()
                each.gather(names, "insert")
                rows = each.gather(each.plan(names) if planned else names)
                rows.square().sum().backward()
                gradients = each.local.table((WIDTH,)).grad[each.local.indices(list(words))]
                found.append((rows.detach(), gradients))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1], found[1][1])
    return {}


@case
def rows_of_other_kinds(rank: int, world: int) -> dict[str, Any]:
    group = dist.new_group()
    for dtype in (torch.complex64, torch.float64, torch.bfloat16):
        for shape in ((), (2, 3), (0,)):
            words = ShardedParameterDict(shape, group, dtype=dtype, timeout=10.0)
            values = (torch.arange(3).view(3, *[1] * len(shape)) + 1).expand(3, *shape).to(dtype)
            words.scatter(["a", "b", "c"], values, missing="insert")
            for planned in (False, True):
                names = ["c", "a", "c", "b"][: 4 - rank % 2]
                rows = words.gather(words.plan(names) if planned else names)
                assert torch.equal(rows, values[[2, 0, 2, 1][: len(names)]])
                rows.abs().sum().backward()
    return {}


@case
def names_that_are_missing(rank: int, world: int) -> dict[str, Any]:
    words = new()
    words.gather(["a", "b", "c"], "insert")
    said = error_of(lambda: words.gather(["a", "nobody"] if rank == world - 1 else ["b"]), KeyError)
    zeros = words.gather(["x", "a", "x", "b"], "zero")
    assert zeros.any(1).tolist() == [False, True, False, True]
    zeros.sum().backward()
    skipped = words.gather(["x", "a", "y", "b", "a"], "skip")
    assert torch.equal(skipped, words.gather(["a", "b", "a"]))
    assert words.gather(["x"], "skip").shape == (0, WIDTH)
    for bad, kind in ((["a", ""], KeyError), (["a", 3], TypeError), ("ab", TypeError)):
        mine = rank == world - 1
        caught = error_of(
            lambda bad=bad, mine=mine: words.gather(bad if mine else ["a"], "insert"), kind if mine else RuntimeError
        )
        assert mine or f"rank {world - 1}: {kind.__name__}" in caught, caught
    assert words.total() == 3
    return {"said": said}


@case
def scatter_and_drop(rank: int, world: int) -> dict[str, Any]:
    words = new()
    values = torch.full((3, WIDTH), float(rank))
    values[2] += 0.5
    words.scatter(["all", f"mine/{rank}", f"mine/{rank}"], values, missing="insert")
    got = words.gather(["all", f"mine/{rank}"])
    assert got.tolist() == [[world - 1.0] * WIDTH, [rank + 0.5] * WIDTH]
    plan = words.plan([f"mine/{each}" for each in range(world)])
    words.drop(["all"] if rank == 0 else ["all", "nobody"], missing="skip")
    words.gather([f"new/{number}" for number in range(20)], "insert")
    assert words.gather(plan)[:, 0].tolist() == [each + 0.5 for each in range(world)]
    assert words.gather(plan)[:, 0].tolist() == [each + 0.5 for each in range(world)]
    error_of(lambda: words.drop(["nobody"] if rank == 0 else []), KeyError)
    if world > 1:
        error_of(
            lambda: words.scatter(["all"], torch.zeros(2, WIDTH) if rank else torch.zeros(1, WIDTH)),
            (ValueError, RuntimeError),
        )
    assert words.total() == world + 20
    words.drop(list(words))
    assert (words.total(), len(words), list(words), "all" in words) == (0, 0, [], False)
    words.gather([]).sum().backward()
    return {}


@case
def an_optimizer_that_is_not_attached(rank: int, world: int) -> dict[str, Any]:
    words = new()
    optimizer = torch.optim.Adam(words.parameters())
    words.gather(batch(0), "insert").sum().backward()
    optimizer.step()
    error_of(lambda: words.gather([f"more/{number}" for number in range(300)], "insert"), RuntimeError)
    words.attach_optimizer(optimizer)
    words.gather([f"more/{number}" for number in range(300)], "insert").sum().backward()
    optimizer.step()
    assert words.total() == len(set(batch(0))) + 300
    return {}


@case
def bytes_are_those_of_the_formula(rank: int, world: int) -> dict[str, Any]:
    sent = {}
    for wire, size in ((None, 4), (torch.bfloat16, 2)):
        words = new(wire=wire)
        names = batch(3, rank, world)
        words.gather(names, "insert")
        before = words.sent_bytes
        words.gather(names).sum().backward()
        here = [(name, int(one)) for name, one in zip(names, owners_of(names, world), strict=True)]
        asked = len({name for name, one in here if one != rank})
        told: list[Any] = [None] * world
        dist.all_gather_object(told, [sorted({name for name, one in here if one == owner}) for owner in range(world)])
        given = sum(len(told[other][rank]) for other in range(world) if other != rank)
        # Two headers; row numbers and gradients of what is asked for; rows of what others ask for.
        formula = 2 * 64 * (world - 1) + asked * (4 + WIDTH * size) + given * WIDTH * size
        assert words.sent_bytes - before == formula, (words.sent_bytes - before, formula)
        sent[size] = formula
    return {"sent": sent}


@case
def bytes_with_replicas_are_those_of_the_formula(rank: int, world: int) -> dict[str, Any]:
    mesh = mesh_of(world, 2)
    words = ShardedParameterDict((WIDTH,), mesh, seed=SEED, init=INIT, timeout=10)
    names = batch(3, rank, world)
    words.gather(names, "insert")
    before = words.sent_bytes
    words.gather(names).sum().backward()
    owners = owners_of(sorted(set(names)), mesh.size(1))
    sent = words.sent_bytes - before
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (sent, len(owners), int((owners != rank % mesh.size(1)).sum())))
    total, asked, of_others = (sum(column) for column in zip(*told, strict=True))
    of_replicas = asked * (mesh.size(0) - 1) * (4 + WIDTH * 4)
    headers = 3 if mesh.size(0) > 1 else 2
    formula = headers * 64 * world * (world - 1) + of_others * (4 + 2 * WIDTH * 4) + of_replicas
    assert total == formula, (total, formula)
    return {"sent": {"4": total}}


@case
def rows_on_the_wire_are_bfloat16(rank: int, world: int) -> dict[str, Any]:
    words, exact = new(wire=torch.bfloat16), new()
    names = batch(3, rank, world)
    for each in (words, exact):
        loss_of(each.gather(names, "insert"), names).backward()
    table, other = words.local.table((WIDTH,)), exact.local.table((WIDTH,))
    assert torch.equal(table, other)
    got = words.gather(names)
    assert torch.equal(got, exact.gather(names).bfloat16().float())
    return {"apart": float((table.grad - other.grad).abs().max() / other.grad.abs().max().clamp(min=1e-9))}


class Model(torch.nn.Module):
    def __init__(self, words: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = words
        self.dense = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Linear(8, WIDTH))

    def forward(self, names: list[str]) -> Tensor:
        if isinstance(self.words, ShardedParameterDict):
            return self.dense(self.words.gather(names, "insert"))
        return self.dense(self.words.gather(names, missing="insert", init=begin))


def train_models(model: torch.nn.Module, rank: int, world: int, clip: float | None = None) -> dict[str, Any]:
    """Train beside a model in one process, and return how far both are apart."""
    own = model.module if isinstance(model, DistributedDataParallel) else model
    expected = Model(plain())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.2, momentum=0.9) for each in (model, expected)]
    own.words.attach_optimizer(optimizers[0])
    expected.words.attach_optimizer(optimizers[1])
    norms = []
    for step in range(6):
        mine, whole = batch(step, rank, world), batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model(mine), mine).backward()
        loss_of(expected(whole), whole).backward()
        if clip is not None:
            one = pdrs.distributed.clip_grad_norm_(model.parameters(), clip)
            two = torch.nn.utils.clip_grad_norm_(expected.parameters(), clip)
            norms.append(abs(float(one) - float(two)))
        for optimizer in optimizers:
            optimizer.step()
    dense = [
        float((getattr(one, "full_tensor", lambda one=one: one)().detach() - two.detach()).abs().max())
        for one, two in zip(own.dense.parameters(), expected.dense.parameters(), strict=True)
    ]
    return {
        "apart": max(*dense, largest_difference(own.words, optimizers[0], expected.words, optimizers[1])),
        "norms": max(norms, default=0.0),
    }


@case
def beside_ddp(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(pdrs.distributed.leave_out(Model(new())))
    with warnings.catch_warnings():
        # Ranks may insert what they like: DDP leaves these tables alone.
        warnings.filterwarnings("error", "names are inserted in the forward pass of DDP")
        return train_models(model, rank, world)


@case
def clipped_beside_ddp(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(pdrs.distributed.leave_out(Model(new())))
    return train_models(model, rank, world, clip=0.05)


@case
def gradients_of_any_layout(rank: int, world: int) -> dict[str, Any]:
    """Gradients of one name, of a transposed matrix, of a sum, conjugate and negated ones, on some of the ranks."""
    apart = 0.0
    for shape, dtype in (((), torch.float32), ((1,), torch.float32), ((3,), torch.float32), ((2,), torch.complex64)):
        options: dict[str, Any] = {"seed": SEED, "init": INIT, "dtype": dtype, "timeout": 10.0}
        words = ShardedParameterDict(shape, dist.new_group(), average=False, **options)
        for names in (["a"] if rank == 0 else ["b", "b", "c"], [f"n{at}" for at in range(4)], ["a"], []):
            words.zero_grad()
            rows = words.gather(names, "insert")
            (rows.mT if rows.dim() == 2 else rows).conj().mul(2.0).sum().abs().backward()
            gradient = words.local.table(shape).grad
            total = torch.tensor(0.0 if gradient is None else float(gradient.abs().sum()))
            dist.all_reduce(total)
            # Each element of a row has a gradient of length 2.
            asked = torch.tensor(float(len(names) * max(1, shape[0] if shape else 1)))
            dist.all_reduce(asked)
            apart = max(apart, abs(float(total) - 2 * float(asked)))
    # One rank's gradient has the negative bit, as the imaginary part of a conjugate number has.
    words = ShardedParameterDict((2,), dist.new_group(), average=False, timeout=10.0)
    rows = words.gather(["a"], "insert")
    numbers = torch.ones_like(rows)
    rows.backward(torch._neg_view(-numbers) if rank == 0 else numbers)  # type: ignore[no-untyped-call]
    total = torch.tensor(sum(float(table.grad.sum()) for table in words.parameters() if table.grad is not None))
    dist.all_reduce(total)
    return {"apart": max(apart, abs(float(total) - 2 * world))}


@case
def gradients_of_names_that_come_again(rank: int, world: int) -> dict[str, Any]:
    """Add up small whole numbers of any dtype, with names that are missing, and with a plan and without."""
    differ = []
    names = ["a", f"own{rank}", "b", "a", "not there", "a", "b"]
    every = [f"own{each}" for each in range(world)]
    for elements, dtype, wire, missing in (
        (3, torch.float32, None, "zero"),
        (16, torch.float32, None, "zero"),
        (2, torch.float64, None, "zero"),
        (4, torch.bfloat16, None, "skip"),
        (1, torch.float16, None, "zero"),
        (5, torch.float32, torch.bfloat16, "zero"),
        (2, torch.complex64, None, "zero"),
        (0, torch.float32, None, "zero"),
    ):
        words = ShardedParameterDict((elements,), dist.new_group(), average=False, dtype=dtype, wire=wire, timeout=10.0)
        words.plan(["a", "b", *every], "insert")
        own = list(words)
        values = {name: torch.full((elements,), float(at + 2)) for at, name in enumerate(["a", "b", *every])}
        for name in own:
            words.local[name] = values[name].to(dtype)
        asked: Any
        for asked in (names, words.plan(names, missing)):
            words.zero_grad()
            rows = words.gather(asked, missing)
            wanted = [name for name in names if name in values or missing == "zero"]
            nothing = torch.zeros(elements)
            expected = torch.stack([values.get(name, nothing) for name in wanted]).to(dtype)
            gradient = torch.arange(1.0, len(rows) + 1).repeat_interleave(elements).view(expected.shape).to(dtype)
            # Of each rank one of another layout, and one that has a graph itself.
            gradient = torch._neg_view(-gradient) if rank == 0 and not dtype.is_complex else gradient
            gradient = gradient.T.contiguous().T if rank == 1 else gradient
            rows.backward(gradient.requires_grad_(rank == 2), create_graph=rank == 2)
            # Names of one rank come once, at the second place.
            sums = dict.fromkeys(every, 2.0)
            for name in ("a", "b"):
                sums[name] = world * sum(at + 1.0 for at, one in enumerate(wanted) if one == name)
            table = words.local.table((elements,))
            found = [] if table.grad is None else table.grad[words.local.indices(own)].tolist()
            differ += [] if torch.equal(rows, expected) else [f"rows: {rows.tolist()}"]
            want = [[complex(sums[name])] * elements for name in own]
            differ += [] if [[*map(complex, row)] for row in found] == want else [f"gradients: {found} {want}"]
    return {"differ": differ}


@case
def clipped_sparse_gradients(rank: int, world: int) -> dict[str, Any]:
    norms = []
    for norm_type in (2.0, 1.0, float("inf")):
        words = new()
        names = batch(2, rank, world)
        whole = batch(2)
        loss_of(words.gather(names, "insert", sparse=True), names).backward()
        expected = plain()
        loss_of(expected.gather(whole, missing="insert", init=begin), whole).backward()
        one = pdrs.distributed.clip_grad_norm_(words.parameters(), 0.01, norm_type)
        two = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01, norm_type)
        norms.append(abs(float(one) - float(two)))
        own = list(words)
        if own:
            gradient = words.local.table((WIDTH,)).grad.to_dense()[words.local.indices(own)]
            norms.append(float((gradient - expected.table((WIDTH,)).grad[expected.indices(own)]).abs().max()))
    words.local.table((WIDTH,)).grad = torch.full_like(words.local.table((WIDTH,)), float("inf") if rank == 0 else 0.0)
    error_of(lambda: pdrs.distributed.clip_grad_norm_(words.parameters(), 1.0, error_if_nonfinite=True), RuntimeError)
    return {"apart": max(norms)}


@case
def ddp_that_was_not_told(rank: int, world: int) -> dict[str, Any]:
    model = DistributedDataParallel(Model(new()))
    said = [
        error_of(lambda: model(["a"]), RuntimeError),
        error_of(lambda: model.module.words.plan(["a"]), RuntimeError),
    ]
    return {"said": said}


@case
def beside_fsdp2(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    model = Model(ShardedParameterDict((WIDTH,), mesh, seed=SEED, init=INIT))
    fully_shard(model, mesh=mesh, ignored_params=pdrs.distributed.ignored_params(model))
    return train_models(model, rank, world)


@case
def fsdp2_that_was_not_told(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    model = Model(new(reserve=world))
    fully_shard(model, mesh=mesh)
    return {"said": error_of(lambda: model(["a"]), RuntimeError)}


@case
def a_scaler_over_ranks(rank: int, world: int) -> dict[str, Any]:
    words = new()
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)
    words.attach_optimizer(optimizer)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=words.group)
    for number in range(2):
        optimizer.zero_grad()
        scaler.scale(words.gather(batch(0), "insert").sum()).backward()
        table = words.local.table((WIDTH,))
        before = table.detach().clone()
        if number == 0 and rank == 0:
            table.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, table) == (number == 0 or not len(words))
    return {"said": scaler.get_scale()}


@case
def state_dicts_name_the_shard(rank: int, world: int) -> dict[str, Any]:
    words = new()
    words.gather(["a", "b", "c", "d", "e"], "insert")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.nn.ModuleDict({"words": words}).state_dict()
        words.state_dict()
    said = [str(one.message) for one in caught if "pdrs.distributed.save" in str(one.message)]
    assert len(said) == (world > 1), said
    state = {key: value.clone() for key, value in words.state_dict().items()}
    assert all(key.startswith(f"rank_{rank}_of_{world}.") for key in state), list(state)
    before = words.gather(["e", "a"]).detach()
    words.scatter(["a", "e"], torch.zeros(2, WIDTH))
    words.load_state_dict(state)
    assert torch.equal(words.gather(["e", "a"]), before)
    error_of(lambda: words.load_state_dict({f"other.{key}": value for key, value in state.items()}), RuntimeError)
    return {}


# -- ranks out of step -------------------------------------------------------------------------------------------------


def error_of(run: Callable[[], Any], kind: Any) -> str:
    """Return the text of the error that a function must raise."""
    try:
        run()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected {kind}")


def out_of_step(run: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    """Let a case be one in which all ranks must raise OutOfStepError soon, and go on raising it."""

    def checked(rank: int, world: int) -> dict[str, Any]:
        words = new()
        words.gather(batch(0), "insert")
        begun = time.monotonic()
        said = error_of(lambda: run_with(words, rank), OutOfStepError)
        took = time.monotonic() - begun
        assert took < 5, took
        assert all(f"rank {each}: " in said for each in range(world)), said
        assert error_of(lambda: words.plan([]), OutOfStepError) == said
        return {"said": said}

    def run_with(words: ShardedParameterDict, rank: int) -> None:
        run(words, rank)

    CASES[f"out_of_step_{run.__name__}"] = checked
    return run


def step(words: ShardedParameterDict, names: list[str]) -> None:
    words.gather(names, "insert").sum().backward()


@out_of_step
def a_step_is_skipped(words: Any, rank: int) -> None:
    for number in range(3):
        if number != 1 or rank != 1:
            step(words, batch(number))
    words.total()


@out_of_step
def one_rank_evaluates(words: Any, rank: int) -> None:
    step(words, batch(1))
    if rank == 0:
        with torch.no_grad():
            words.gather(batch(2))
    step(words, batch(2))


@out_of_step
def one_rank_has_no_gradients(words: Any, rank: int) -> None:
    with torch.set_grad_enabled(rank != 1):
        words.gather(batch(0))


@out_of_step
def plans_in_another_order(words: Any, rank: int) -> None:
    plans = words.plan(batch(0)), words.plan(batch(0)[::-1])
    words.gather(plans[rank == 1])


@out_of_step
def a_plan_is_not_used(words: Any, rank: int) -> None:
    plan = words.plan(batch(0))
    if rank != 1:
        words.gather(plan)
    words.plan(batch(0))


@out_of_step
def an_empty_batch_is_left_out_of_the_loss(words: Any, rank: int) -> None:
    for number in range(2):
        rows = words.gather([] if rank == 1 else batch(number), "insert")
        if len(rows):
            rows.sum().backward()


@out_of_step
def one_rank_has_another_option(words: Any, rank: int) -> None:
    words.gather(batch(0), "zero" if rank == 1 else "insert")


@out_of_step
def one_rank_fails_and_goes_on(words: Any, rank: int) -> None:
    for number in range(2):
        try:
            rows = words.gather(batch(number), "insert")
            if rank == 1 and number == 0:
                raise ArithmeticError
            rows.sum().backward()
        except ArithmeticError:
            pass


@out_of_step
def passes_in_another_order(words: Any, rank: int) -> None:
    others = ShardedParameterDict((WIDTH,), words.group, seed=SEED, init=INIT, timeout=10.0)
    step(others, batch(0))
    rows, more = words.gather(batch(0)), others.gather(batch(0))
    first, second = (rows, more) if rank == 0 else (more, rows)
    first.sum().backward()
    second.sum().backward()


@case
def dictionaries_with_other_seeds(rank: int, world: int) -> dict[str, Any]:
    return {"said": error_of(lambda: new(seed=rank), OutOfStepError)}


@case
def a_rank_that_does_not_come(rank: int, world: int) -> dict[str, Any]:
    words = new(timeout=2.0)
    words.gather(batch(0), "insert")
    dist.barrier()
    if rank == 1:
        time.sleep(4)
    begun = time.monotonic()
    said = error_of(lambda: step(words, batch(0)), OutOfStepError)
    took = time.monotonic() - begun
    dist.barrier()
    return {"said": said, "took": took}


@case
def a_call_is_interrupted(rank: int, world: int) -> dict[str, Any]:
    words = new(timeout=2.0)
    words.gather(batch(0), "insert")
    original = pdrs._ranks.sharded.gather_rows

    def interrupt(*arguments: Any) -> Tensor:
        raise KeyboardInterrupt

    if rank == 1:  # between the header and the rows
        pdrs._ranks.sharded.gather_rows = interrupt
    begun = time.monotonic()
    try:
        said = error_of(lambda: words.gather(batch(0)), KeyboardInterrupt if rank == 1 else OutOfStepError)
    finally:
        pdrs._ranks.sharded.gather_rows = original
    took = time.monotonic() - begun
    again = error_of(lambda: words.gather(batch(0)), OutOfStepError)
    dist.barrier()
    return {"said": again if rank == 1 else said, "took": took}


@case
def memory_runs_out_while_ranks_wait(rank: int, world: int) -> dict[str, Any]:
    words = new(timeout=2.0)
    plan = words.plan(batch(0), "insert")

    def refuse(*arguments: Any) -> Tensor:
        raise RuntimeError("there is no memory")

    if rank == 1:
        # Nothing but the room for rows asks for memory so; mypy lets nobody replace a method.
        torch.Tensor.new_empty = refuse  # type: ignore[method-assign]
        try:
            assert error_of(lambda: words.gather(plan), RuntimeError) == "there is no memory"
        finally:
            del torch.Tensor.new_empty
    else:
        assert len(words.gather(plan)) == len(batch(0))
    said = error_of(lambda: words.plan(batch(0)), OutOfStepError)
    dist.barrier()
    return {"said": said, "took": 0}


@case
def a_rank_is_killed(rank: int, world: int) -> dict[str, Any]:
    words = new()
    for number in range(3):
        if number == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            kept, begun = words.local["name/1"].tolist() if "name/1" in words else None, time.monotonic()
            said = error_of(lambda: step(words, batch(2)), OutOfStepError)
            now = words.local["name/1"].tolist() if "name/1" in words else None
            assert kept == now
            return {"said": said, "took": time.monotonic() - begun}
        step(words, batch(number))
    raise AssertionError("unreachable")


@contextmanager
def group(folder: str) -> Iterator[tuple[int, int]]:
    """Let this process be a rank; under torchrun if there is no folder for the store."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    init = "env://" if by_torchrun else f"file://{folder}/store"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    yield rank, world


def main(folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    with group(folder) as (rank, world):
        for name in names:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            begun = time.monotonic()
            try:
                became = {"ok": CASES[name](rank, world)}
            except Exception:
                became = {"error": traceback.format_exc()}
            Path(folder, f"{name}-{rank}.json").write_text(json.dumps(became))
            print(f"{name}: {time.monotonic() - begun:.2f} s", flush=True)
        if "a_rank_is_killed" not in names:
            dist.barrier()
        # Groups with broken connections take long to close, and have nothing to say.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
