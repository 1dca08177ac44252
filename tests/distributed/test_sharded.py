"""A table sharded by name over ranks is the table of one process.

The bugs that this hunts: rows, gradients or states that go to another name or another rank, are counted twice or get
lost; initial values that depend on the number of ranks; ranks that hang, die or silently differ because one of them
does something else.

Each number of ranks is one launch of processes with interpreters of their own, which run all cases (sharded_worker.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import sharded_worker as worker
import torch

import pdrs
import pdrs.distributed
import pdrs.optim
from pdrs._core import Headers, hash_names
from pdrs._ranks.exchange import HEADER_BYTES, PAYLOAD
from pdrs._ranks.initial_values import values_of
from pdrs._ranks.owners import buckets_of, owners_of

WORKER = Path(worker.__file__)
# A launch that hangs fails after so many seconds.
LIMIT = 200
OUT_OF_STEP = sorted(name for name in worker.CASES if name.startswith("out_of_step_"))
ALONE = ["a_rank_is_killed"]
# What needs a second rank.
TOGETHER = [
    *OUT_OF_STEP,
    "dictionaries_with_other_seeds",
    "a_call_is_interrupted",
    "memory_runs_out_while_ranks_wait",
    "a_rank_that_does_not_come",
    "fsdp2_that_was_not_told",
    "beside_fsdp2",
]
NAMES = [
    "an_optimizer_that_is_not_attached",
    "names_that_are_missing",
    "data_that_does_not_fit_into_a_window",
    "rows_of_other_kinds",
    "odd_names_are_sent_as_text",
    "scatter_and_drop",
    "rows_of_several_shapes",
    "names_of_a_call_that_fails_are_removed",
    "batches_are_planned_ahead",
]
TRAINING = [f"train_{name}" for name in (*worker.OPTIMIZERS, "ahead", "with_replicas", "with_whole_replicas")]

# They are part of the format: what is saved depends on them.
GOLDEN_BUCKETS = [3291, 849, 2512, 883, 3251, 1448, 446, 142, 1999, 1886]
GOLDEN_NORMAL = ["0x1.cf1c82aa89f2fp-1", "0x1.7843be944f870p-1", "0x1.fcb637d8a753bp-1", "0x1.0e802c9b51646p+0"]
GOLDEN_UNIFORM = ["0x1.1781f7e25e6eap-1", "-0x1.3d99447519cf6p-1", "0x1.76e6a3841a244p-2", "-0x1.56f7962c9167cp-2"]

Results = dict[str, list[dict[str, Any]]]


def launch(folder: Path, world: int, cases: list[str]) -> Results:
    """Run cases on so many ranks, and return what each rank says of each case."""
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder), *cases]
    outputs = [folder / f"output-{rank}.txt" for rank in range(world)]
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
    results: Results = {}
    for name in cases:
        files = [folder / f"{name}-{rank}.json" for rank in range(world)]
        results[name] = [
            json.loads(file.read_text())
            if file.exists()
            else {"error": f"rank {rank} has ended or hangs: {outputs[rank].read_text()[-3000:]}"}
            for rank, file in enumerate(files)
        ]
    return results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, Any]]]:
    """Return what runs a case on so many ranks, all cases at once, and returns what each rank has found."""
    known: dict[int, Results] = {}

    def run(world: int, name: str) -> list[dict[str, Any]]:
        if world not in known:
            cases = [each for each in worker.CASES if each not in ALONE and (world > 1 or each not in TOGETHER)]
            known[world] = launch(tmp_path_factory.mktemp(f"ranks-{world}"), world, cases)
        return [found(one) for one in known[world][name]]

    return run


def found(result: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in result, result["error"]
    return result["ok"]


Run = Callable[[int, str], list[dict[str, Any]]]
WORLDS = [pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 3, 4)]
SEVERAL = WORLDS[1:]


# -- the same as one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TRAINING)
def test_rows_and_states_are_those_of_one_process(run: Run, world: int, name: str) -> None:
    told = run(world, name)
    assert max(each["apart"] for each in told) <= (0.0 if world == 1 else 1e-6)
    assert sum(each["evicted"] for each in told) > 3
    assert all(each["names"] for each in told)


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_have_the_same_rows_to_the_bit(run: Run, world: int) -> None:
    for each in run(world, "replicas_have_the_same_bits"):
        assert each["same"]
        assert each["compared"] == (2 if world % 2 else world)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_may_ask_for_nothing(run: Run, world: int) -> None:
    assert max(each["apart"] for each in run(world, "whole_batch_on_one_rank")) <= 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_an_owner_that_nobody_asks_counts_the_step(run: Run, world: int) -> None:
    for each in run(world, "owners_that_nobody_asks_count_steps"):
        assert each["steps"] == [3.0] * len(worker.OPTIMIZERS)


@pytest.mark.parametrize("world", WORLDS)
def test_initial_values_depend_on_the_name_and_the_seed_only(run: Run, world: int) -> None:
    names = sorted([*(f"name/{number}" for number in range(50)), *worker.ODD_NAMES[:-1]])
    init = pdrs.distributed.normal(0.5, mean=1.0)
    expected = values_of(init, hash_names(names), worker.SEED, (worker.WIDTH,), torch.float32)
    for each in run(world, "initial_values"):
        assert each["bits"] == expected.view(torch.int32).tolist()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_handled_on_all_ranks(run: Run, world: int, name: str) -> None:
    told = run(world, name)
    assert len({each.get("said") for each in told}) == 1  # An error on one rank is the same on all.


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["bytes_are_those_of_the_formula", "bytes_with_replicas_are_those_of_the_formula"])
def test_a_step_sends_the_bytes_of_the_formula(run: Run, world: int, name: str) -> None:
    told = run(world, name)
    assert all((each["sent"]["4"] > 0) == (world > 1) for each in told)


@pytest.mark.parametrize("world", WORLDS)
def test_rows_and_gradients_are_rounded_on_the_wire_only(run: Run, world: int) -> None:
    assert max(each["apart"] for each in run(world, "rows_on_the_wire_are_bfloat16")) < 1e-2


# -- beside what torch does with the rest of a model -------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["beside_ddp", "clipped_beside_ddp"])
def test_the_rest_of_a_model_is_in_ddp(run: Run, world: int, name: str) -> None:
    for each in run(world, name):
        assert each["apart"] <= 1e-6
        assert each["norms"] <= 1e-5


@pytest.mark.parametrize("world", SEVERAL)
def test_the_rest_of_a_model_is_in_fsdp2(run: Run, world: int) -> None:
    assert max(each["apart"] for each in run(world, "beside_fsdp2")) <= 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_of_any_layout_go_to_the_owners(run: Run, world: int) -> None:
    assert max(each["apart"] for each in run(world, "gradients_of_any_layout")) <= 1e-4


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_of_names_that_come_again_are_added(run: Run, world: int) -> None:
    assert [each["differ"] for each in run(world, "gradients_of_names_that_come_again")] == [[]] * world


def test_the_bytes_of_a_header_are_counted_as_they_are_sent() -> None:
    message, sizes, told = Headers(0, 3).message((1, 2, 3), 0, False, (0,) * PAYLOAD, None, None, 1 << 10)
    assert sizes == [0, HEADER_BYTES, HEADER_BYTES]
    assert len(message) == 2 * HEADER_BYTES
    assert told.shape == (3, 1 + PAYLOAD)


def test_the_result_of_a_gather_may_be_changed_in_place() -> None:
    words = pdrs.distributed.ShardedParameterDict((2,))
    words.gather(["a", "b"], missing="insert").add_(1).sum().backward()
    table = words.local.table((2,))
    assert table.detach().sum() == 0
    assert table.grad is not None
    assert table.grad.sum() == 4


@pytest.mark.parametrize("world", WORLDS)
def test_the_norm_of_sparse_gradients_is_that_of_all_ranks(run: Run, world: int) -> None:
    assert max(each["apart"] for each in run(world, "clipped_sparse_gradients")) <= 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_ddp_that_was_not_told_is_refused(run: Run, world: int) -> None:
    for each in run(world, "ddp_that_was_not_told"):
        assert all("leave_out" in said for said in each["said"])


@pytest.mark.parametrize("world", SEVERAL)
def test_fsdp2_that_was_not_told_is_refused(run: Run, world: int) -> None:
    assert all("ignored_params" in each["said"] for each in run(world, "fsdp2_that_was_not_told"))


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_skip_a_step_if_rows_of_one_overflow(run: Run, world: int) -> None:
    assert [each["said"] for each in run(world, "a_scaler_over_ranks")] == [2.0] * world


@pytest.mark.parametrize("world", WORLDS)
def test_keys_of_a_state_dict_say_whose_shard_it_is(run: Run, world: int) -> None:
    run(world, "state_dicts_name_the_shard")


# -- ranks that do different things ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("name", OUT_OF_STEP)
def test_ranks_out_of_step_are_told_who_does_what(run: Run, world: int, name: str) -> None:
    told = run(world, name)
    assert len({each["said"] for each in told}) == 1


@pytest.mark.parametrize("world", SEVERAL)
def test_ranks_with_other_options_are_told(run: Run, world: int) -> None:
    for each in run(world, "dictionaries_with_other_seeds"):
        assert "seed=0" in each["said"]
        assert "seed=1" in each["said"]


@pytest.mark.parametrize("world", SEVERAL)
def test_a_rank_that_does_not_come_is_named(run: Run, world: int) -> None:
    told = run(world, "a_rank_that_does_not_come")
    for rank, each in enumerate(told):
        assert each["took"] < 5
        if rank != 1:
            assert "rank 1 did not come within 2 s" in each["said"]


@pytest.mark.parametrize("world", SEVERAL)
@pytest.mark.parametrize("name", ["a_call_is_interrupted", "memory_runs_out_while_ranks_wait"])
def test_a_call_that_fails_on_one_rank_ends_all(run: Run, world: int, name: str) -> None:
    for rank, each in enumerate(run(world, name)):
        assert each["took"] < 5
        assert ("rank 1 failed in the middle" if rank == 1 else "rank 1 did not come") in each["said"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_is_killed_is_an_error_on_the_others(tmp_path: Path, world: int) -> None:
    told = launch(tmp_path, world, ["a_rank_is_killed"])["a_rank_is_killed"]
    for rank, each in enumerate(told):
        if rank != 1:
            assert found(each)["took"] < 5
            assert "rank 1 did not come" in found(each)["said"]


@pytest.mark.slow
def test_it_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cases = ["train_adam", "out_of_step_a_step_is_skipped"]
    subprocess.run([*command, str(WORKER), str(tmp_path), *cases], check=True, timeout=LIMIT, capture_output=True)
    for name in cases:
        for rank in range(2):
            found(json.loads((tmp_path / f"{name}-{rank}.json").read_text()))


def example() -> str:
    """Return the code in docs/distributed.md."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_the_example_of_the_docs_runs_under_torchrun(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(example(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    finished = subprocess.run(
        command, check=False, timeout=LIMIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert finished.returncode == 0, finished.stdout


def test_the_example_of_the_docs_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    exec(compile(example(), "docs/distributed.md", "exec"), {"__name__": "__main__"})


# -- what needs no other rank ------------------------------------------------------------------------------------------


def test_owners_are_the_same_for_ever() -> None:
    assert buckets_of(hash_names(worker.ODD_NAMES)).tolist() == GOLDEN_BUCKETS
    for world in (1, 2, 3, 5, 4096):
        assert owners_of(worker.ODD_NAMES, world).tolist() == [bucket * world // 4096 for bucket in GOLDEN_BUCKETS]


def test_initial_values_are_the_same_for_ever() -> None:
    names = ["a", "\ud800"]
    normal = values_of(pdrs.distributed.normal(), hash_names(names), 0, (2,), torch.float64)
    assert [each.hex() for each in normal.flatten().tolist()] == GOLDEN_NORMAL
    uniform = values_of(pdrs.distributed.uniform(-1.0, 1.0), hash_names(names), -1, (2,), torch.float64)
    assert [each.hex() for each in uniform.flatten().tolist()] == GOLDEN_UNIFORM


def test_initial_values_are_distributed_as_they_should_be() -> None:
    hashes = hash_names([str(number) for number in range(20_000)])
    normal = np.sort(values_of(pdrs.distributed.normal(2.0, 1.0), hashes, 3, (), torch.float64).numpy())
    shares = np.arange(1, 20_001) / 20_001
    expected = np.array([NormalDist(1.0, 2.0).inv_cdf(share) for share in shares.tolist()])
    assert np.abs(normal - expected)[200:-200].max() < 0.1
    uniform = np.sort(values_of(pdrs.distributed.uniform(2.0, 5.0), hashes, 3, (), torch.float64).numpy())
    assert np.abs(uniform - (2 + 3 * shares)).max() < 0.05
    pairs = values_of(pdrs.distributed.normal(), hashes, 3, (2,), torch.float64).numpy()
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.03


def test_without_a_process_group_it_is_one_rank() -> None:
    words = pdrs.distributed.ShardedParameterDict((2, 3), init=pdrs.distributed.uniform(-1, 1), dtype=torch.float64)
    rows = words.gather(["a", "b", "a"], "insert")
    assert rows.shape == (3, 2, 3)
    assert rows.dtype == torch.float64
    assert torch.equal(rows[0], words.local["a"])
    rows.sum().backward()
    assert words.local.table((2, 3)).grad is not None
    assert (len(words), words.total(), words.world_size, words.rank, words.sent_bytes) == (2, 2, 1, 0, 0)
    assert "b" in words
    assert words


def test_rows_may_be_numbers() -> None:
    words = pdrs.distributed.ShardedParameterDict(())
    words.scatter(["a", "b"], torch.tensor([1.0, 2.0]), missing="insert")
    assert words.gather(["b", "a", "b"]).tolist() == [2.0, 1.0, 2.0]


def test_options_that_cannot_be_are_refused() -> None:
    make = pdrs.distributed.ShardedParameterDict
    with pytest.raises(TypeError, match=r"pdrs\.distributed\.normal"):
        make((2,), init=torch.nn.init.ones_)
    with pytest.raises(TypeError, match="wire"):
        make((2,), wire=torch.int8)
    with pytest.raises(TypeError, match="seed"):
        make((2,), seed=1.5)
    with pytest.raises(TypeError, match="shape"):
        make(2)
    with pytest.raises(ValueError, match="different shapes"):
        make([(2,), (2,)])
    with pytest.raises(ValueError, match="std"):
        pdrs.distributed.normal(-1.0)
    with pytest.raises(ValueError, match="low"):
        pdrs.distributed.uniform(2.0, 1.0)
    words = make((2,))
    with pytest.raises(ValueError, match="missing"):
        words.gather(["a"], "ignore")
    with pytest.raises(ValueError, match="older_than"):
        words.evict(older_than=0)
    with pytest.raises(ValueError, match="another dictionary"):
        make((2,)).gather(words.plan([]))
    with pytest.raises(TypeError, match="copied"):
        __import__("copy").deepcopy(words)
