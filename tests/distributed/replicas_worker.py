"""What each rank of ``test_replicas.py`` runs: all cases, one after another, under ``torchrun``.

A case that raises on a rank is noted with its trace. Ranks meet after each case, so that one that hangs ends the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pdrs
import pdrs.distributed

SD = pdrs.StackedParameterDict
CASES: list[Callable[[Path], None]] = []
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LAST = SIZE - 1


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES.append(function)
    return function


@contextlib.contextmanager
def refused(*words: str, error: type[BaseException] = RuntimeError) -> Iterator[None]:
    """Ask for an error that has the words in its message."""
    try:
        yield
    except error as raised:
        text = str(raised)
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in {text}"
    else:
        raise AssertionError("nothing was raised")


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * SIZE
    dist.all_gather_object(found, value)
    return found


def same_everywhere(value: Any) -> bool:
    found = everywhere(value)
    return all(one == found[0] for one in found)


def shown(sd: SD) -> Any:
    """Return all that replicas must have in common, and the values."""
    rows = {name: (values.tolist(), sd.get_parameter(at).shape) for name, values, at in _entries(sd)}
    return list(rows.items()), sorted(sd.tables()), packed_bytes(sd)


def _entries(sd: SD) -> Iterator[tuple[str, Tensor, str]]:
    tables = {id(table): name for name, table in sd.tables().items()}
    for name, row in sd.items():
        yield name, row.detach(), tables[id(row._base)]


def packed_bytes(sd: SD) -> bytes:
    return bytes(sd.get_extra_state().tolist())


class Model(nn.Module):
    """Scores of names, and what is done with the names in the forward pass."""

    def __init__(self, words: SD, act: Callable[[SD], object] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.act, self.options = words, act, options
        self.out = nn.Linear(4, 1)

    def forward(self, names: list[str]) -> Tensor:
        if self.act is not None:
            self.act(self.words)
        scores: Tensor = self.out(self.words.gather(names, **self.options))
        return scores


def words_of(names: list[str], room: int = 0) -> SD:
    values = torch.tensor([[float(sum(map(ord, name)))] * 4 for name in names]) / 1000
    sd = SD.from_tensor(names, values)
    if room:
        sd.reserve(room)
    return sd


# -- check -------------------------------------------------------------------------------------------------------------


@case
def the_ranks_hash_texts_differently(_: Path) -> None:
    assert len(set(everywhere(hash("a")))) == SIZE


@case
def replicas_that_are_the_same_pass_the_check(_: Path) -> None:
    names = ["a", "b", "nul\0", "\ud800", "ü" * 300]
    model = nn.ModuleDict({"x": words_of(names, 8), "y": SD(), "z": SD({"t": torch.zeros(3)})})
    model["x"].freeze(["b"])
    model["x"].param_groups({"^a": {"lr": 0.1}})
    pdrs.distributed.check(model)
    del model["x"]["b"]
    model["x"]["new"] = torch.zeros(4)
    model["x"].freeze(["a"])
    model["x"].unfreeze()
    pdrs.distributed.check(model)
    pdrs.distributed.check(nn.Linear(1, 1))
    with torch.no_grad():
        model["x"]["new"].fill_(RANK)  # values are not compared
    pdrs.distributed.check(model)
    assert pdrs.distributed.check(model["x"], dist.group.WORLD) is None


@case
def each_difference_is_found_on_all_ranks_and_named(_: Path) -> None:
    def drop_first(sd: SD) -> None:
        sd["d"] = sd.pop("a").detach()

    differences: dict[str, Callable[[SD], object]] = {
        "names, rows, tables": lambda sd: sd.insert(["late"]),
        "names": lambda sd: sd.rename("a", "other"),
        "names, rows": lambda sd: sd.move_to_end("a"),
        "frozen": lambda sd: sd.freeze(["b"]),
        "tables": lambda sd: sd.reserve(100),
        "groups": lambda sd: sd.param_groups({"^nothing$": {"lr": 0.1}}),
    }
    for part, change in differences.items():
        model = nn.Sequential(nn.Linear(1, 1), words_of(["a", "b", "c"], 2))
        if RANK == LAST:
            change(model[1])
        with refused("'1'", f"in {part}: rank {LAST}", "from rank 0", "pdrs.distributed.broadcast(module)"):
            pdrs.distributed.check(model)
        pdrs.distributed.check(nn.Linear(1, 1))  # the ranks are in step
    sd = words_of(["a", "b"])
    with torch.no_grad():
        (sd.double if RANK == LAST else sd.float)()
    with refused("the dictionary differs in tables"):
        pdrs.distributed.check(sd)
    # The same names, of which two have changed their rows.
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 4))
    if RANK == LAST:
        sd = SD.from_tensor(["b", "a"], torch.zeros(2, 4))
        sd.move_to_end("b")
    with refused("the dictionary differs in rows: rank"):
        pdrs.distributed.check(sd)


@case
def a_check_that_fails_on_one_rank_fails_on_all(_: Path) -> None:
    module: Any = "no module" if RANK == LAST else words_of(["a"])
    with refused("expected a module, got str", error=TypeError if RANK == LAST else RuntimeError):
        pdrs.distributed.check(module)
    module = nn.Sequential(words_of(["a"])) if RANK == LAST else words_of(["a"])
    with refused("different modules"):
        pdrs.distributed.check(module)
    with refused("every must be a positive int", error=ValueError):
        pdrs.distributed.check(words_of(["a"]), every=0)


@case
def ranks_in_different_functions_raise_and_do_not_hang(_: Path) -> None:
    sd = words_of(["a"], 4)
    group = dist.new_group()  # of its own: ranks that are out of step have no way back
    for words in (("the ranks are out of step", "check 0", "insert 0"), ("the ranks are out of step",)):
        with refused(*words, error=pdrs.distributed.OutOfStepError):
            if RANK == LAST:
                pdrs.distributed.check(sd, group)
            else:
                pdrs.distributed.insert(sd, ["b"], group)
    assert list(sd) == ["a"]


@case
def a_check_before_each_nth_forward_pass_finds_what_has_drifted(_: Path) -> None:
    model = DistributedDataParallel(Model(words_of(["a", "b"], 10)))
    handle = pdrs.distributed.check(model, every=2)
    assert handle is not None
    model(["a"]).sum().backward()  # checked
    if RANK == LAST:
        model.module.words.rename("b", "c")
    model(["a"]).sum().backward()  # not checked
    with refused("'module.words' differs in names"):
        model(["a"])
    handle.remove()
    model(["a"]).sum().backward()
    model(["a"]).sum().backward()


# -- broadcast ---------------------------------------------------------------------------------------------------------


@case
def a_broadcast_gives_all_ranks_names_rows_values_groups_and_masks(_: Path) -> None:
    for source in range(SIZE):
        torch.manual_seed(RANK)
        sd = SD()
        for at in range(RANK + 2):
            sd[f"rank{RANK}.{at}"] = torch.randn(4)
            sd[f"shared.{RANK - at}\0\ud800"] = torch.randn(4)
        sd[f"half{RANK}"] = torch.randn(2, 3).to(torch.bfloat16)
        sd[f"int{RANK}"] = nn.Parameter(torch.tensor([RANK]), requires_grad=False)
        sd[f"complex{RANK}"] = torch.randn(3, dtype=torch.complex64)
        sd[f"number{RANK}"] = torch.tensor(float(RANK))
        del sd[f"rank{RANK}.0"]
        sd.freeze([f"rank{RANK}.1"])
        if RANK % 2:
            sd.reserve(50, shape=(4,))
            sd.param_groups({f"^shared.{RANK}": {"lr": 0.1}})
        model = nn.Sequential(nn.Linear(1, 1), sd, SD())
        pdrs.distributed.broadcast(model, source)
        pdrs.distributed.check(model)
        assert same_everywhere(shown(sd)), shown(sd)
        assert f"rank{source}.1" in sd
        sd.gather(..., shape=(4,)).sum().backward()
        zeros = [name for name, gradient in sd.named_grads() if not gradient.any()]
        assert zeros == [f"rank{source}.1"], zeros
        assert pdrs.distributed.insert(sd, [f"new{RANK}"], shape=(4,)) == [f"new{at}" for at in range(SIZE)]
        pdrs.distributed.check(model)


@case
def ddp_after_a_broadcast_trains_each_name_with_its_own_row(_: Path) -> None:
    names = [f"n{at}" for at in range(20)]
    mixed = names if RANK == 0 else sorted(names, key=lambda name: hash((name, RANK)))
    sd = words_of(mixed)
    model = Model(sd)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sd.attach_optimizer(optimizer)
    if RANK == LAST:
        sd["a name of this rank"] = torch.zeros(4)
        sd["another table"] = torch.zeros(3)
    pdrs.distributed.broadcast(model)
    tables = list(sd.tables().values())
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert len(held) == 3, [one.shape for one in held]
    assert all(any(one is table for one in held) for table in tables)
    before = {name: row.tolist() for name, row in sd.items()}
    assert before == {name: row.tolist() for name, row in words_of(names).items()}
    ddp = DistributedDataParallel(model)
    for _step in range(3):
        optimizer.zero_grad()
        ddp([f"n{RANK}", "n7"]).sum().backward()
        optimizer.step()
    assert same_everywhere(shown(sd))
    assert sd["n7"].tolist() != before["n7"]


@case
def a_broadcast_that_one_rank_cannot_follow_changes_no_rank(_: Path) -> None:
    def stepped(sd: SD, attached: bool) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(sd.parameters())
        if attached:
            sd.attach_optimizer(optimizer)
        sd.gather(["a"]).sum().backward()
        optimizer.step()
        return optimizer

    for attached in (False, True):
        sd = words_of(["a", f"b{RANK}"])
        kept = stepped(sd, attached) if RANK == LAST else None
        before = shown(sd)
        with refused("Call attach_optimizer" if not attached else "Broadcast before the first step"):
            pdrs.distributed.broadcast(sd)
        assert shown(sd) == before
        del kept
    sd = words_of(["a", f"b{RANK}"])
    if RANK == LAST:
        sd.double()
    before = shown(sd)
    with refused("Convert the module on all ranks"):
        pdrs.distributed.broadcast(sd)
    assert shown(sd) == before
    with refused("src must be the same on all ranks", error=ValueError):
        pdrs.distributed.broadcast(sd, min(RANK, 1))


# -- insert ------------------------------------------------------------------------------------------------------------


@case
def insert_gives_the_new_names_of_all_ranks_the_same_rows_and_values(_: Path) -> None:
    torch.manual_seed(RANK)
    sd = words_of(["old"], 3)
    own = [f"rank{RANK}", "shared", "old", "nul\0" if RANK else "\ud800"]
    expected = sorted({f"rank{at}" for at in range(SIZE)} | {"shared", "nul\0", "\ud800"})
    given = pdrs.distributed.insert(sd, {*own} if RANK else own, init=nn.init.normal_)
    assert given == expected
    assert list(sd) == ["old", *expected]
    assert same_everywhere(shown(sd))
    assert sd["shared"].any()
    pdrs.distributed.check(sd)
    assert pdrs.distributed.insert(sd, own) == []
    # One rank has an empty batch; rows that became free are given again; there are groups.
    sd.param_groups({"^g": {"lr": 0.1}})
    sd.drop(["shared", "rank0"])
    assert pdrs.distributed.insert(sd, ["g", "f"] if RANK == LAST else []) == ["f", "g"]
    assert not sd["f"].any()
    assert same_everywhere(shown(sd))
    pdrs.distributed.check(sd)
    # The first of all, which makes a table; init takes the names.
    sd = SD()

    def by_name(rows: Tensor, names: list[str]) -> None:
        rows.copy_(torch.tensor([float(len(name) + 10 * RANK) for name in names])[:, None].expand_as(rows))

    assert pdrs.distributed.insert(sd, ["x" * (RANK + 1)], init=by_name, shape=(2,), dtype=torch.float64)
    assert {name: row.tolist() for name, row in sd.items()} == {"x" * at: [at, at] for at in range(1, SIZE + 1)}


@case
def an_insert_that_fails_on_one_rank_changes_no_rank(_: Path) -> None:
    def broken(rows: Tensor) -> None:
        raise OSError("no values")

    sd = words_of(["a"], 3)
    before = shown(sd)
    with refused("no values", error=OSError if RANK == 0 else RuntimeError):
        pdrs.distributed.insert(sd, ["b"], init=broken)
    with refused("names must be", error=TypeError if RANK == LAST else RuntimeError):
        pdrs.distributed.insert(sd, [1] if RANK == LAST else ["b"])
    with refused("init must be a function", error=TypeError if RANK == LAST else RuntimeError):
        pdrs.distributed.insert(sd, ["b"], init="ones" if RANK == LAST else None)
    with refused("empty", error=KeyError):
        pdrs.distributed.insert(sd, ["", "b"] if RANK == LAST else ["b"])
    with refused("shape= and dtype="):
        pdrs.distributed.insert(sd, ["b"], shape=(RANK + 1,))
    assert shown(sd) == before
    # The optimizer of one rank alone has state that cannot follow, and the table has to grow.
    sd = words_of(["a", "c"])
    optimizer = torch.optim.Adam(sd.parameters())
    if RANK == LAST:
        sd.gather(["a"]).sum().backward()
        optimizer.step()
    before = shown(sd)
    with refused("Call attach_optimizer"):
        pdrs.distributed.insert(sd, ["b"])
    assert shown(sd) == before
    pdrs.distributed.check(sd)


@case
def an_insert_into_replicas_that_differ_is_refused(_: Path) -> None:
    sd = words_of(["a"], 4)
    if RANK == LAST:
        sd["b"] = torch.zeros(4)
    before = shown(sd)
    with refused(f"rank {LAST} has 1 of 1 names that are new on another rank"):
        pdrs.distributed.insert(sd, ["b"])
    with refused("names would come into different rows", f"rank 0 on [{LAST}]"):
        pdrs.distributed.insert(sd, ["c"])
    assert shown(sd) == before
    sd = words_of(["a", "b", "c"])
    del sd["a" if RANK == LAST else "b"]
    with refused("names would come into different rows"):
        pdrs.distributed.insert(sd, ["d"])


# -- training ----------------------------------------------------------------------------------------------------------


def batch(step: int, rank: int) -> list[str]:
    return [f"n{(7 * step + 3 * rank + at * at) % (4 * step + 9)}" for at in range(6)]


@case
def the_natural_loop_with_insert_trains_as_one_process_does(_: Path) -> None:
    sd = words_of(["n0"], 60)
    model = Model(sd)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sd.attach_optimizer(optimizer)
    alone = Model(words_of(["n0"], 60))
    reference = torch.optim.Adam(alone.parameters(), lr=0.1)
    alone.words.attach_optimizer(reference)
    ddp = DistributedDataParallel(model)
    pdrs.distributed.check(ddp, every=1)
    for step in range(8):
        pdrs.distributed.insert(sd, batch(step, RANK), init=nn.init.ones_)
        optimizer.zero_grad()
        ddp(batch(step, RANK)).pow(2).mean().backward()
        optimizer.step()
        alone.words.insert(sorted({name for rank in range(SIZE) for name in batch(step, rank)}), init=nn.init.ones_)
        reference.zero_grad()
        torch.stack([alone(batch(step, rank)).pow(2).mean() for rank in range(SIZE)]).mean().backward()
        reference.step()
    assert list(sd) == list(alone.words)
    for name, row in sd.items():
        torch.testing.assert_close(row, alone.words[name], rtol=1e-4, atol=1e-5)
    assert same_everywhere(shown(sd))


@case
def ranks_with_other_names_are_refused_in_the_first_forward_pass_of_ddp(_: Path) -> None:
    names = [f"n{number}" for number in range(6)]
    for others in (names, names[::-1], [*names[:5], "other"]):
        for comes_first in (0, LAST):
            model = Model(words_of(names if RANK == 0 else others, 8))
            ddp = DistributedDataParallel(model)
            with torch.no_grad():
                if comes_first == RANK:
                    ddp(names[:2])
                dist.barrier()
                if RANK == 0:
                    ddp(names[:2])
                dist.barrier()
                if RANK == 0 or others is names:
                    ddp(names[:2])
                else:
                    for _again in range(2):
                        with refused("names", "pdrs.distributed.broadcast(module) before it is wrapped"):
                            ddp(names[:2])
    # A module that is wrapped again gets the rows of the first rank again.
    model = Model(words_of(names, 8))
    DistributedDataParallel(model)(names[:2])
    if RANK == LAST:
        model.words.move_to_end(names[0])
    again = DistributedDataParallel(model)
    with torch.no_grad():
        if RANK == 0:
            again(names[:2])
        dist.barrier()
        if RANK == LAST:
            with refused("names"):
                again(names[:2])
    # Names that have been made equal are not compared again.
    words = words_of(names if RANK == 0 else names[::-1], 8)
    model = Model(words)
    pdrs.distributed.broadcast(model)
    ddp = DistributedDataParallel(model)
    words.drop([names[RANK]])
    ddp([names[5]])


@case
def optimizers_by_row_train_in_ddp_as_those_of_torch(_: Path) -> None:
    names = [f"n{number}" for number in range(6)]
    tables = []
    for kind in (torch.optim.Adam, pdrs.optim.Adam):
        torch.manual_seed(0)
        model = Model(words_of(names, 8))
        ddp, optimizer = DistributedDataParallel(model), kind(model.parameters(), lr=0.1)
        model.words.attach_optimizer(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            ddp([names[step], names[RANK % 6], "n5"]).square().sum().backward()
            optimizer.step()
        tables.append(model.words.table((4,)).detach())
    torch.testing.assert_close(tables[1], tables[0])
    assert same_everywhere(tables[1].tolist())


@case
def names_that_are_inserted_in_the_forward_pass_of_ddp_are_warned_of_once(_: Path) -> None:
    model = Model(words_of(["n0"], 60), missing="insert")
    ddp = DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            ddp(batch(step, RANK)).sum().backward()
        model(["outside of DDP"])
    found = [one for one in caught if "pdrs.distributed.insert" in str(one.message)]
    assert len(found) == 1, [str(one.message) for one in caught]
    assert found[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = Model(words_of(["n0"], 60), lambda sd: pdrs.distributed.insert(sd, batch(1, RANK)))
        DistributedDataParallel(other)(["n0"])
    assert not [one for one in caught if "pdrs.distributed.insert" in str(one.message)]
    with refused("'module.words' differs in names"):
        pdrs.distributed.check(ddp)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[SD], object]] = {
    "set": lambda sd: sd.__setitem__("a", torch.zeros(4)),
    "set a new one": lambda sd: sd.__setitem__("new", torch.zeros(4)),
    "setdefault": lambda sd: sd.setdefault("new", torch.zeros(4)),
    "update": lambda sd: sd.update({"a": torch.zeros(4), "new": torch.zeros(4)}),
    "gather": lambda sd: sd.gather(["new"], missing="insert"),
    "gather_bag": lambda sd: sd.gather_bag(["new"], [0], missing="insert"),
    "indices": lambda sd: sd.indices(["new"], missing="insert"),
    "insert": lambda sd: sd.insert(["new"]),
    "insert on all ranks": lambda sd: pdrs.distributed.insert(sd, ["new"]),
    "broadcast": lambda sd: pdrs.distributed.broadcast(sd),
    "scatter": lambda sd: sd.scatter(["a"], torch.zeros(1, 4)),
    "scatter new ones": lambda sd: sd.scatter(["new"], torch.zeros(1, 4), missing="insert"),
    "freeze": lambda sd: sd.freeze(["a"]),
    "reserve": lambda sd: sd.reserve(100),
    "compact": lambda sd: sd.compact(),
    "groups": lambda sd: sd.param_groups({"^a": {"lr": 0.1}}),
    "drop": lambda sd: sd.drop(["a"]),
    "retain": lambda sd: sd.retain(["a"]),
    "del": lambda sd: sd.__delitem__("a"),
    "pop": lambda sd: sd.pop("a"),
    "popitem": lambda sd: sd.popitem(),
    "clear": lambda sd: sd.clear(),
}


@case
def writes_by_name_in_a_forward_pass_of_fsdp2_are_refused(_: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    not_refused = []
    for options in ({}, {"reshard_after_forward": False}):
        model = Model(words_of(["a", "b", "c"], 4))
        fully_shard(model, mesh=mesh, **options)
        before = model.words.named_state_dict()
        for what, write in WRITES.items():
            model.act = write
            try:
                with refused("FSDP2 has gathered the table 'float32_4'"):
                    model(["b"])
            except AssertionError as error:
                not_refused.append(f"{what}: {error}")
            model.act = None
            model.reshard()  # as an error has left it
            model(["b"]).sum().backward()
            after = model.words.named_state_dict()
            assert list(after) == list(before), what
            assert all(torch.equal(after[name], before[name]) for name in after), what
        assert not not_refused, not_refused
    # After a forward pass without resharding, the whole table is still there.
    model(["b"])
    with refused("FSDP2 has gathered the table"):
        model.words["a"] = torch.zeros(4)
    model.reshard()
    assert model.words.pop("a").tolist() == before["a"].tolist()  # as documented
    # Others are not held for sharded ones: those of a module beside it, and a Parameter that was put in place.
    other = words_of(["a"], 4)
    other.float32_4 = nn.Parameter(torch.zeros(5, 4))
    model.act = lambda _words: other.__setitem__("b", torch.ones(4))
    model(["b"])
    assert other["b"].tolist() == [1.0] * 4


# -- optimizers, checkpoints -------------------------------------------------------------------------------------------


@case
def zero_redundancy_optimizer_is_refused_on_all_ranks(_: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            self.state, self.param_groups, self.step = optimizer.state, optimizer.param_groups, optimizer.step

    model = Model(words_of(["a"]))
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    for optimizer in (zero, Wrapper(zero)):
        with refused("ZeroRedundancyOptimizer", "an optimizer of their own"):
            model.words.attach_optimizer(optimizer)
    model.words.attach_optimizer(torch.optim.Adam(model.words.parameters()))


@case
def a_distributed_checkpoint_of_replicas_that_differ_stores_nothing(folder: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    mine = [f"r{RANK}", "b"]
    ways: dict[str, Callable[[nn.Module, Path], Any]] = {
        "save": lambda model, path: checkpoint.save({"model": model.state_dict()}, checkpoint_id=path),
        "get": lambda model, path: checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=path),
        "async": lambda model, path: checkpoint.async_save(model.state_dict(), checkpoint_id=path).result(),
    }
    for way, save in ways.items():
        model = nn.Sequential(SD.from_tensor(mine, torch.full((2, 4), float(RANK))))
        path = folder / f"differ-{way}"
        with refused("have different names", "0._extra_state", "pdrs.distributed.broadcast", error=BaseException):
            save(model, path)
        assert not list(path.rglob("*.distcp")), "data was stored"
        assert not (path / ".metadata").exists()
        pdrs.distributed.broadcast(model)
        save(model, folder / way)
        assert b"pdrs." not in (folder / way / ".metadata").read_bytes()
        loaded = nn.Sequential(SD.from_tensor(["yy", "z"], torch.zeros(2, 4)))  # as many bytes
        state: Any = loaded.state_dict() if way == "async" else {"model": loaded.state_dict()}
        checkpoint.load(state, checkpoint_id=folder / way)
        loaded.load_state_dict(state if way == "async" else state["model"])
        assert shown(loaded[0]) == shown(model[0])
    # A planner that remembers plans sees that the names have changed.
    for at, rename in enumerate([False, True]):
        planner = checkpoint.DefaultSavePlanner(enable_plan_caching=True)
        if rename and RANK == LAST:
            model[0].rename("b", "c")
        with refused("have different names", error=BaseException) if rename else contextlib.nullcontext():
            checkpoint.save(model.state_dict(), checkpoint_id=folder / f"cached-{at}", planner=planner)
    # One rank alone, and the other ways to save a state dict, see a plain tensor.
    if RANK == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.save(model.state_dict(), checkpoint_id=folder / "alone", no_dist=True)
        assert b"pdrs." not in (folder / "alone" / ".metadata").read_bytes()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert b"names_plan" not in file.getvalue()
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == model.state_dict().keys()


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=25))
    results: dict[str, str] = {}
    wanted = sys.argv[2:]
    for number, one in enumerate(CASES):
        if wanted and one.__name__ not in wanted:
            continue
        try:
            shared = folder / str(number)
            one(shared)
            results[one.__name__] = "ok"
        except BaseException:
            results[one.__name__] = traceback.format_exc()
        (folder / f"results-{RANK}.json").write_text(json.dumps(results))
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=10))
        except RuntimeError as error:
            results[one.__name__] += f"\nthe ranks are out of step: {error}"
            (folder / f"results-{RANK}.json").write_text(json.dumps(results))
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
