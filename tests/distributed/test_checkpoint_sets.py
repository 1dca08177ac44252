"""A model on several ranks is saved as one set of files, and goes on on any number of ranks.

The bugs that this hunts: rows, states or numbers that come to another name or get lost on the way; ranks that read
files which they do not need; a set of which a part is old and another new; damage that nobody notices.

One launch of processes with interpreters of their own runs all cases, in groups of 1 to 5 (checkpoint_worker.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_worker as worker
import pytest
import torch
import torch.distributed as dist
from test_sharded import found

import pdrs
import pdrs.distributed
from pdrs._cli import main
from pdrs._core import hash_names
from pdrs._files.checkpoint_file import CheckpointError
from pdrs._files.set_manifest import MANIFEST, Manifest, file_name
from pdrs._ranks.owners import BUCKETS, buckets_of
from pdrs._ranks.row_order import buckets_of_rank

slow = pytest.mark.slow
# Adam has dense gradients here, as in the cases of several ranks.
pytestmark = pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")
# From how many ranks to how many.
PAIRS = [(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (3, 5), (4, 3), (4, 4), (5, 1), (5, 3), (5, 4)]
BY_BUCKET = [(1, 2), (2, 2), (2, 3), (3, 1), (3, 2)]
# Each with the number of ranks that are in it.
CASES = [
    *(f"save_all:{world}" for world in range(1, 6)),
    *(f"continue_from_{before}:{after}" for before, after in PAIRS),
    "damage:2",
    "damage:3",
    "ranks_that_differ:2",
    "ranks_that_verify_differently:2",
    "a_rank_that_cannot_write:2",
    "deltas:2",
    "deltas:3",
    *(f"load_deltas:{world}" for world in (1, 2, 3, 4)),
    "frozen_names_and_ages:2",
    "replicas_and_shapes:4",
    *(f"async_save:{world}" for world in (1, 2, 3)),
    *(f"load_buckets_{before}:{after}" for before, after in BY_BUCKET),
]
LIMIT = 280
PATIENCE = 120


class Launch:
    """All cases, run when the first one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._output = ""

    def run(self) -> None:
        environment = {**os.environ, "WORLD_SIZE": "5", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", worker.__file__, str(self.folder), *CASES]
        outputs = [self.folder / f"output-{rank}.txt" for rank in range(5)]
        running = []
        try:
            for rank, output in enumerate(outputs):
                with output.open("w") as file:
                    running.append(
                        subprocess.Popen(
                            command, env={**environment, "RANK": str(rank)}, stdout=file, stderr=subprocess.STDOUT
                        )
                    )
            until = time.monotonic() + LIMIT
            for each in running:
                try:
                    each.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
        finally:
            for each in running:
                each.kill()
                each.wait()
        self._output = "\n".join(output.read_text()[-2000:] for output in outputs)

    def of(self, name: str, world: int) -> list[dict[str, Any]]:
        if not self._output:
            self.run()
        results = []
        for rank in range(world):
            file = self.folder / f"{name}-{world}-{rank}.json"
            assert file.exists(), f"rank {rank} has ended or hangs: {self._output}"
            results.append(found(json.loads(file.read_text())))
        return results


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("sets"))


# -- on any number of ranks --------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_training_goes_on_on_any_number_of_ranks_as_in_one_process(launch: Launch, before: int, after: int) -> None:
    told = launch.of(f"continue_from_{before}", after)
    assert max(one["apart"] for one in told) <= 1e-6
    assert all(one["same"] for one in told), "on as many ranks, rows, states, numbers and ages have the same bits"


@slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_rank_reads_what_it_owns_and_little_more(launch: Launch, before: int, after: int) -> None:
    assert max(one["ratio"] for one in launch.of(f"continue_from_{before}", after)) <= 1.2


@slow
def test_frozen_names_and_the_ages_of_names_are_saved(launch: Launch) -> None:
    told = launch.of("frozen_names_and_ages", 2)
    assert all(one["same"] for one in told)
    assert sum(one["frozen"] for one in told) == 3
    assert sum(one["gone"] for one in told) > 0


@slow
def test_one_replica_is_saved_and_all_load_it(launch: Launch) -> None:
    for one in launch.of("replicas_and_shapes", 4):
        assert one["same"]
        assert one["apart"] <= 1e-6
        assert one["files"] == 3, "a manifest, and a file of each rank of the first replica"
        assert one["total"] == one["expected"]


@slow
@pytest.mark.parametrize(("before", "after"), BY_BUCKET)
def test_torch_saves_and_loads_state_dicts_by_bucket(launch: Launch, before: int, after: int) -> None:
    launch.of("async_save", before)
    told = launch.of(f"load_buckets_{before}", after)
    assert max(one["apart"] for one in told) <= 1e-6
    assert all(one["same"] for one in told), "though all tables were changed while they were written"


# -- what is refused ---------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_what_is_wrong_is_refused_on_all_ranks_by_name_and_nothing_has_changed(launch: Launch, world: int) -> None:
    told = launch.of("damage", world)
    file, folder = told[0]["files"]
    for one in told:
        said = one["said"]
        for what, part in (
            ("missing", "the file of the set is missing"),
            ("other set", "it is a file of another set"),
            ("truncated", ""),
            ("flipped", "is damaged"),
        ):
            assert "CheckpointError" in said[what]
            assert f"{folder}/{file}: " in said[what], said[what]
            assert part in said[what]
        assert f"{folder}/{MANIFEST}: the manifest is damaged" in said["manifest"]
        assert f"{folder}: the folder has no {MANIFEST}" in said["no manifest"]
        assert "was saved with seed=7" in said["seed"]
        assert "expected rows of torch.float64 [4]" in said["dtype"]
        assert "expected rows of torch.float32 [5]" in said["shape"]
        assert "was saved as Adam, got SGD" in said["class"]
        assert "Unexpected key(s): 'seen', 'out.weight'" in said["dense"]


@slow
def test_ranks_that_differ_are_refused(launch: Launch) -> None:
    for one in launch.of("ranks_that_differ", 2):
        assert "have different values of parameters that are not sharded, first in out.weight" in one["said"]["values"]
        assert "optimizers[0].groups[0].options.lr (0.05 and 1.05)" in one["said"]["options"]
        assert "numbers.optimizer.0.step" in one["said"]["steps"]
        assert "metadata={'step': '2'}); rank 1: save 0 (since is None, metadata=None)" in one["said"]["metadata"]
    for one in launch.of("ranks_that_verify_differently", 2):
        assert "verify=True); rank 1: load 0 (strict=True, verify=False)" in one["said"]


@slow
def test_a_rank_that_cannot_write_stops_all_and_the_old_set_stays(launch: Launch) -> None:
    for one in launch.of("a_rank_that_cannot_write", 2):
        assert "No space left on device" in one["said"]
        assert one["after"] == one["before"]


# -- changes -----------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_only_changes_are_written_also_into_another_folder(launch: Launch, world: int) -> None:
    for one in launch.of("deltas", world):
        first, *rest = one["sizes"]
        assert max(rest) < first / 4
        assert one["files"] == 4 * world + 1, "the files of the chain are linked into the other folder"
        assert one["same"]
    folder = launch.folder / f"chain-other-{world}"
    for name in os.listdir(folder):
        if name != MANIFEST and (launch.folder / f"chain-{world}" / name).exists():
            assert os.path.samefile(folder / name, launch.folder / f"chain-{world}" / name)
    sd = pdrs.open(folder, verify=True)
    assert sd.metadata["run"] == "one"
    names = [name for name in sd if name.startswith("words.")]
    for rank in range(world):
        bits = torch.load(launch.folder / f"chain-other-{world}.{rank}.bits")
        for name, kept in bits.items():
            if f"words.{name}" in sd and isinstance(kept, list):
                assert sd[f"words.{name}"].tolist() == kept[0]
                names.remove(f"words.{name}")
    assert names == []


@slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_chain_of_changes_is_loaded_by_any_number_of_ranks(launch: Launch, world: int) -> None:
    launch.of("deltas", 2), launch.of("deltas", 3)
    for one in launch.of("load_deltas", world):
        assert one["same"]
        assert one["ratio"] <= 1.2
        if world != 2:
            assert f"was saved by 2 ranks, and there are {world}: save without since" in one["said"]


# -- one process -------------------------------------------------------------------------------------------------------


def model_of(number: float, count: int = 40, **options: Any) -> tuple[worker.Model, torch.optim.Optimizer]:
    """Return a model all of which says which version it is."""
    model = worker.sharded_model(**options)
    optimizer = torch.optim.Adam(model.parameters())
    model.words.attach_optimizer(optimizer)
    names = [f"v{number:g}.{at}" for at in range(model.words.rank, count, model.words.world_size)]
    model.words.scatter(names, torch.full((len(names), worker.WIDTH), float(number)), missing="insert")
    torch.nn.init.constant_(model.out.weight, float(number))
    return model, optimizer


@slow
def test_one_process_opens_the_names_of_all_ranks(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    launch.of("save_all", 3)
    folder = launch.folder / "adam-3"
    bits: dict[str, Any] = {}
    for rank in range(3):
        bits |= torch.load(launch.folder / f"adam-3.{rank}.bits")
    rows = {name: kept[0] for name, kept in bits.items() if name.startswith("name/")}
    sd = pdrs.open(folder, prefix="words.")
    assert sorted(sd) == sorted(rows)
    assert {name: row.tolist() for name, row in sd.items()} == rows
    assert list(sd.tables()) == ["float32_4"]
    assert pdrs.open(folder, verify=True)["out.weight"].tolist() == bits["out"]
    chosen = pdrs.open(folder, prefix="words.", names=["name/3", "name/1"])
    assert {name: row.tolist() for name, row in chosen.items()} == {name: rows[name] for name in ("name/3", "name/1")}
    assert not [name for name in pdrs.open(folder) if name.startswith("__pdrs__")]
    plain = worker.Model(pdrs.StackedParameterDict())
    assert not pdrs.load(folder, plain, verify=True).missing_keys
    assert {name: row.tolist() for name, row in plain.words.items()} == rows
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "checkpoint set" in said
    assert f"{len(rows) + 2} names" in said
    assert main(["get", str(folder), "words.name/1"]) == 0
    assert json.loads(capsys.readouterr().out.split("\t")[1]) == rows["name/1"]
    assert main(["verify", str(folder)]) == 0
    pdrs.checkpoint.verify(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(last.read_bytes())
    data[-3] ^= 1
    damaged = launch.folder / "opened-and-damaged"
    shutil.copytree(folder, damaged)
    (damaged / last.name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{last.name}: .* is damaged"):
        pdrs.open(damaged, verify=True)
    (damaged / last.name).unlink()
    with pytest.raises(CheckpointError, match=rf"{last.name}: the file of the set is missing"):
        pdrs.open(damaged)


def test_a_folder_with_the_manifest_of_another_tool_is_opened_as_before(tmp_path: Path) -> None:
    pdrs.save(pdrs.StackedParameterDict({"a": torch.ones(2)}), tmp_path / "model.safetensors")
    (tmp_path / MANIFEST).write_text('{"name": "an app"}')
    assert list(pdrs.open(tmp_path)) == ["a"]


def test_rows_in_a_file_are_in_the_order_of_buckets_and_those_in_memory_stay(tmp_path: Path) -> None:
    model, optimizer = model_of(1)
    rows, before = model.words.local.indices().tolist(), model.words.local.layout_version
    pdrs.distributed.save(model, tmp_path, optimizer)
    assert model.words.local.indices().tolist() == rows
    assert model.words.local.layout_version == before
    opened = pdrs.open(next(tmp_path.glob("*.safetensors")), prefix="words.")
    names = list(opened)
    buckets = buckets_of(hash_names(names)).tolist()
    assert buckets == sorted(buckets)
    assert opened.indices().tolist() == list(range(len(names)))
    assert {name: row.tolist() for name, row in opened.items()} == {
        name: row.tolist() for name, row in model.words.local.items()
    }


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 4096])
def test_ranks_own_all_buckets(world: int) -> None:
    owned = [bucket for rank in range(world) for bucket in buckets_of_rank(rank, world)]
    assert owned == list(range(BUCKETS))
    for rank in range(world):
        assert all(bucket * world // BUCKETS == rank for bucket in buckets_of_rank(rank, world))


def test_several_optimizers_and_rows_of_bfloat16(tmp_path: Path) -> None:
    def pair() -> tuple[worker.Model, list[Any]]:
        model = worker.sharded_model(dtype=torch.bfloat16)
        rows = pdrs.optim.Adam(model.words.parameters(), lr=torch.tensor(0.1), per_row_steps=True)
        return model, [rows, torch.optim.SGD(model.out.parameters(), lr=0.1, momentum=0.9)]

    def step(model: worker.Model, optimizers: list[Any], number: int) -> None:
        names = [f"name/{number + at}" for at in range(5)]
        model(model.words.gather(names, "insert").float()).square().mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()

    model, optimizers = pair()
    for number in range(3):
        step(model, optimizers, number)
    pdrs.distributed.save(model, tmp_path, optimizers)
    fresh, of_fresh = pair()
    pdrs.distributed.load(tmp_path, fresh, of_fresh)
    for number in range(3, 5):
        step(model, optimizers, number)
        step(fresh, of_fresh, number)
    assert {name: row.tolist() for name, row in model.words.local.items()} == {
        name: row.tolist() for name, row in fresh.words.local.items()
    }
    assert torch.equal(model.out.weight, fresh.out.weight)
    with pytest.raises(ValueError, match="expected 2 optimizers, as were saved, got 1"):
        pdrs.distributed.load(tmp_path, fresh, of_fresh[0])


def test_an_attached_optimizer_that_is_not_loaded_begins_anew(tmp_path: Path) -> None:
    model, optimizer = worker.made("adam")
    worker.train(model, optimizer, range(2), 0, 1)
    pdrs.distributed.save(model, tmp_path)
    worker.train(model, optimizer, range(2, 4), 0, 1)
    pdrs.distributed.load(tmp_path, model)
    table = model.words.local.table((worker.WIDTH,))
    assert not optimizer.state[table]["exp_avg"].any()
    assert optimizer.state[table]["exp_avg"].shape == table.shape
    worker.train(model, optimizer, range(4, 5), 0, 1)


def test_a_state_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    model = worker.sharded_model()
    optimizer = torch.optim.Adafactor(model.parameters())
    model.words.gather(["a", "b"], "insert").sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"Adafactor, words\.float32_4, col_var: expected .* cannot be divided among"):
        pdrs.distributed.save(model, tmp_path / "set", optimizer)
    assert not (tmp_path / "set").exists()


def test_a_parameter_that_is_not_in_the_model_is_refused(tmp_path: Path) -> None:
    model, _ = model_of(1)
    with pytest.raises(ValueError, match=r"an optimizer has a parameter of shape .* that is not in the model"):
        pdrs.distributed.save(model.words, tmp_path, torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_set_that_cannot_be_linked_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_of(1)
    pdrs.distributed.save(model, tmp_path / "one", optimizer)

    def link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match=r"Invalid cross-device link.*save without since, or into the same folder"):
        pdrs.distributed.save(model, tmp_path / "two", optimizer, since=tmp_path / "one")
    assert not (tmp_path / "two" / MANIFEST).exists()
    assert version_in(tmp_path / "one") == 1


def test_a_file_with_many_rows_without_names_is_written_anew(tmp_path: Path) -> None:
    model, optimizer = model_of(1, 2000)
    pdrs.distributed.save(model, tmp_path, optimizer)
    model.words.drop([f"v1.{at}" for at in range(1900)])
    pdrs.distributed.save(model, tmp_path, optimizer, since=tmp_path)
    assert Manifest.read(str(tmp_path)).files[0].before == ()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert sorted(pdrs.open(tmp_path, prefix="words.")) == sorted(model.words)


# -- kill -9 -----------------------------------------------------------------------------------------------------------

STEPS = ("open", "write", "pwrite", "fsync", "replace", "link", "unlink")


def version_in(folder: Path) -> int:
    """Return the number of the version in a folder; it must be whole."""
    sd = pdrs.open(folder, verify=True)
    number = int(sd["out.weight"][0, 0])
    names = {name.removeprefix("words."): row for name, row in sd.items() if name.startswith("words.")}
    assert set(names) == {f"v{number}.{at}" for at in range(40)}
    assert all(row.tolist() == [float(number)] * worker.WIDTH for row in names.values())
    return number


def fork(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except pdrs.distributed.OutOfStepError:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    for _ in range(PATIENCE * 200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int) -> None:
    """Let this process be killed before so many calls to the system; one that writes is in the middle of it."""
    left = step

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if function.__name__ in ("write", "pwrite"):
                    descriptor, data, *place = arguments
                    function(descriptor, data[: len(data) // 2], *place)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, counting(getattr(os, name)))


def save_killed(folder: Path, store: Path, rank: int, world: int, which: int, step: int, since: Path | None) -> None:
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, optimizer = model_of(2)
    if rank == which:
        killed_at(step)
    pdrs.distributed.save(model, folder, optimizer, since=since)


@slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize(("world", "which"), [(1, 0), (2, 0), (2, 1)])
def test_a_save_that_is_killed_at_any_step_leaves_the_old_set_or_the_new_one(
    world: int, which: int, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    children = [fork(lambda rank=rank: _save_first(first, tmp_path / "store", rank, world)) for rank in range(world)]
    assert [ended(child) for child in children] == [0] * world
    versions, step = [], 0
    while True:
        folder = tmp_path / "folder"
        shutil.copytree(first, folder)
        store = tmp_path / f"store-{step}"
        children = [fork(partial(save_killed, folder, store, rank, world, which, step, None)) for rank in range(world)]
        codes = [ended(child) for child in children]
        versions.append(version_in(folder))
        if codes == [0] * world:
            break
        assert codes[which] == -signal.SIGKILL
        assert all(code == 3 for rank, code in enumerate(codes) if rank != which), codes
        shutil.rmtree(folder)
        step += 1
    assert len(os.listdir(folder)) == world + 1, "what was there before is removed"
    assert versions == sorted(versions)
    assert versions.count(1) > 5
    assert versions[-1] == 2


def _save_first(folder: Path, store: Path, rank: int, world: int) -> None:
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, optimizer = model_of(1)
    pdrs.distributed.save(model, folder, optimizer)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_changes_that_are_killed_at_any_step_leave_both_folders_whole_and_the_next_save_clears_up(
    tmp_path: Path,
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    _save_first(first, tmp_path, 0, 1)
    model, optimizer = model_of(3)
    pdrs.distributed.save(model, other, optimizer)
    step, code = 0, -signal.SIGKILL
    while code:
        code = ended(fork(lambda step=step: save_killed(other, tmp_path, 0, 1, 0, step, first)))
        assert version_in(first) == 1
        assert version_in(other) == (2 if code == 0 else version_in(other))
        assert version_in(other) in (2, 3)
        if code:
            assert code == -signal.SIGKILL
            pdrs.distributed.save(model, other, optimizer)
            assert len(os.listdir(other)) == 2, "what killed processes left is removed"
        step += 1
    assert step > 10
    assert len(os.listdir(other)) == 3


def test_files_that_are_not_of_sets_stay(tmp_path: Path) -> None:
    kept = ["notes.txt", "model.safetensors", "0-00000-of-00001.safetensors"]
    for name in kept:
        (tmp_path / name).touch()
    left = file_name("0" * 32, 0, 2)
    (tmp_path / left).touch()
    (tmp_path / f".{left}.{'1' * 16}.tmp").touch()
    model, optimizer = model_of(1)
    pdrs.distributed.save(model, tmp_path, optimizer)
    names = os.listdir(tmp_path)
    assert set(kept) < set(names)
    assert len(names) == len(kept) + 2
