"""Steps of a table that is sharded by name, beside TorchRec's row-wise sharded EmbeddingCollection on the CPU with ids.

It needs a Python of its own: TorchRec's operators are built for one version of torch. With pdrs built for the same
version of Python, and the folder `pdrs_torch-*.dist-info` of its installation copied into the new one::

    python -m venv tbe
    tbe/bin/pip install torch==2.14.1 torchrec==1.9.2 numpy tqdm
    tbe/bin/pip uninstall --yes fbgemm-gpu
    tbe/bin/pip install --no-deps fbgemm-gpu-cpu==1.9.0
    PYTHONPATH=python tbe/bin/python benchmarks/torchrec_sharded.py

It prints the tables and writes them to ``benchmarks/results/torchrec.md``.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

import sharded_steps
from machine import describe
from measure import Case, Measurement, Suite, Target, measure
from report import Results, figure, report, table
from sharded_steps import (
    BATCH,
    BY_HAND,
    FLOATS,
    NAMES,
    PLANNED,
    RATE,
    STEPS,
    Batches,
    Sharded,
    Way,
    send_back,
    take_turns,
)

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (100_000,)
REPEATS = 10
WORLDS = (2, 4)
# How many steps lie between two evictions of ZCH.
EVICTION_INTERVAL = 20

PLAIN, UNIQUE = "EC", "EC, unique"
ZCH, ZCH_UNIQUE = "EC + ZCH", "EC + ZCH, unique"
PDRS = "pdrs"
TORCHREC = {PLAIN: (False, False), UNIQUE: (False, True), ZCH: (True, False), ZCH_UNIQUE: (True, True)}


# -- one process -------------------------------------------------------------------------------------------------------


def spread(ids: Tensor) -> Tensor:
    """Return ids of 62 bits, as hashes of names are: splitmix64, whose products wrap around."""
    state = ids + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * (factor - (1 << 64))
    return (state ^ (state >> 31 & (1 << 33) - 1)) >> 2 & (1 << 62) - 1


def torchrec_way(batches: Batches, has_zch: bool, is_unique: bool) -> Way:
    """Make an EmbeddingCollection whose rows are spread over the ranks, with a fused SGD."""
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
    from torchrec.distributed.shard import _shard_modules
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
    from torchrec.modules.mc_modules import (
        DistanceLFU_EvictionPolicy,
        ManagedCollisionCollection,
        MCHManagedCollisionModule,
    )
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    world, entries, meta = dist.get_world_size(), len(batches.names), torch.device("meta")
    config = EmbeddingConfig(name="t", embedding_dim=FLOATS, num_embeddings=entries, feature_names=["f"])
    collection: Any = EmbeddingCollection(tables=[config], device=meta)
    apply_optimizer_in_backward(torch.optim.SGD, [collection.embeddings["t"].weight], {"lr": RATE})
    sharder: Any = EmbeddingCollectionSharder()
    if has_zch:
        module = MCHManagedCollisionModule(
            zch_size=entries,
            input_hash_size=1 << 62,
            device=meta,
            eviction_interval=EVICTION_INTERVAL,
            eviction_policy=DistanceLFU_EvictionPolicy(),
        )
        managed = ManagedCollisionCollection(managed_collision_modules={"t": module}, embedding_configs=[config])
        collection = ManagedCollisionEmbeddingCollection(collection, managed, return_remapped_features=False)
        sharder = ManagedCollisionEmbeddingCollectionSharder(sharder)

    class Model(Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = collection

        def forward(self, ids: Any) -> Any:
            return self.rows(ids)

    model = Model()
    plan = construct_module_sharding_plan(
        model.rows,
        per_param_sharding={"t": row_wise()},
        local_size=world,
        world_size=world,
        device_type="cpu",
        sharder=sharder,
    )
    sharded = _shard_modules(
        module=model,
        plan=ShardingPlan({"rows": plan}),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        sharders=[sharder],
        device=torch.device("cpu"),
    )

    def step(number: int) -> None:
        ids, which = torch.from_numpy(batches.ids[number]), None
        if has_zch:
            ids = spread(ids)
        lengths = torch.ones(BATCH, dtype=torch.int64)
        if is_unique:
            ids, which = torch.unique(ids, return_inverse=True)
            lengths[len(ids) :] = 0
        found = sharded(KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths))
        rows = (found[0] if has_zch else found)["f"].values()
        send_back(rows if which is None else rows.index_select(0, which))

    def weights() -> Tensor:
        (shards,) = (each for name, each in sharded.state_dict().items() if name.endswith("embeddings.t.weight"))
        shard: Tensor = shards.local_shards()[0].tensor
        return shard

    before = weights().clone()
    return Way(step, lambda: 0.0, lambda: weights() - before)


def times(entries: int) -> dict[str, list[float]]:
    """Return nanoseconds of a step, a figure for each round; all ways take turns."""
    batches = Batches(entries, dist.get_rank(), STEPS)
    dictionaries = Sharded(batches)
    made = {what: torchrec_way(batches, *options) for what, options in TORCHREC.items()}
    made[BY_HAND] = sharded_steps.by_hand(batches, True)
    made |= {what: dictionaries.way(what) for what in (NAMES, PLANNED)}
    found = take_turns(made)
    _check({what: way.values() for what, way in made.items()})
    return found


def _check(tables: dict[str, Tensor]) -> None:
    """Raise unless all have trained the same. ZCH resets rows, so that its sums are others."""
    sums = torch.stack([each.double().sum() for each in tables.values()])
    dist.all_reduce(sums)
    totals = dict(zip(tables, sums.tolist(), strict=True))
    for what, turns in ((PLAIN, 1), (UNIQUE, 1), (NAMES, 2), (PLANNED, 2)):
        if abs(totals[what] / totals[BY_HAND] / turns - 1) > sharded_steps.TOLERANCE:
            raise ValueError(f"what was timed gave wrong rows: {totals}")


# -- the tables --------------------------------------------------------------------------------------------------------


class Data:
    """What launches of processes have measured."""

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self._rounds: dict[int, dict[str, list[float]]] = {}
        self._taken: Counter[tuple[str, str]] = Counter()

    def nanoseconds(self, world: int, title: str, what: str) -> float:
        """Return what a step took in the next round that this case has not had."""
        number = self._taken[title, what]
        self._taken[title, what] += 1
        found = self._rounds.setdefault(world, {})
        if number >= len(found.get(what, ())):
            for each, figures in sharded_steps.launched(world, "times", self.entries, script=__file__).items():
                found.setdefault(each, []).extend(figures)
        return found[what][number]


SUBJECTS = (*TORCHREC, BY_HAND, PDRS)


def _case(title: str, world: int, ours: str, targets: tuple[Target, ...] = (), kind: str = "") -> Case[Data]:
    title = f"{title}, {world} processes"

    def sample(subject: str, data: Data) -> float:
        return data.nanoseconds(world, title, (ours if subject == PDRS else subject) + kind)

    return Case(title, sample, SUBJECTS, targets, most_runs=REPEATS)


def ratios_by_round(results: Results) -> str:
    """Write the ratios of one round to the others: medians, the least and the most."""
    of = {(each.case, each.subject): each.runs for each in results.measurements if each.entries == results.sizes[-1]}
    rows = []
    for case in CASES:
        for other in SUBJECTS[:-1]:
            pairs = zip(of[case.title, PDRS], of[case.title, other], strict=True)
            shares = sorted(mine / theirs for mine, theirs in pairs)
            rows.append([case.title, other, *map(figure, (median(shares), shares[0], shares[-1]))])
    return "## Ratios of one round\n\n" + table(["", "beside", "pdrs / it", "least", "most"], rows)


CASES = tuple(
    case
    for world in WORLDS
    for case in (
        _case("step, names known", world, NAMES, (Target("ratio", ZCH, 1 / 0.55, SIZES[-1]),)),
        _case("step, planned before", world, PLANNED),
        _case("CPU time of a step, names known", world, NAMES, kind=sharded_steps.CPU),
        _case("CPU time of a step, planned before", world, PLANNED, kind=sharded_steps.CPU),
    )
)

SUITE = Suite(
    name="torchrec",
    title="Sharded tables beside TorchRec",
    subjects=SUBJECTS,
    baselines=SUBJECTS[:-1],
    cases=CASES,
    make_data=Data,
    intro="Whole steps with gloo on one machine, one thread a process: look-up, exchange, backward, update. *EC* is"
    " TorchRec's `EmbeddingCollection`, row-wise sharded, with int64 ids and a fused SGD. *ZCH* looks ids of 62 bits up"
    f" in an `MCHManagedCollisionModule` with room for all, which evicts every {EVICTION_INTERVAL} steps. *Unique* has"
    " the ids of a batch made unique by `torch.unique` before. TorchRec is made for GPUs, and removes repeated ids only"
    f" there. *pdrs* is given names. Rows are {FLOATS} float32, batches {BATCH:,} for each rank; how often a name comes"
    f" is its rank to the power of -{sharded_steps.ZIPF_EXPONENT:g}. Figures are those of a step, not per name. CPU"
    " time is that of all processes together.",
    turns="all ways took turns in the same processes, round by round",
    appendix=ratios_by_round,
)


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of names, with commas between")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of each case (default: %(default)s)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=RESULTS, help="where to write torchrec.md")
    options = parser.parse_args(arguments)
    sizes = tuple(sorted(map(int, options.sizes.split(","))))
    gc.disable()
    measured: list[Measurement] = []
    for of_case in measure(SUITE, sizes, options.repeats, re.compile("")):
        measured += of_case
    command = "python benchmarks/torchrec_sharded.py"
    if sizes != SIZES:
        command += f" --sizes {options.sizes}"
    if options.repeats != REPEATS:
        command += f" --repeats {options.repeats}"
    text = report(Results(describe(command), sizes, tuple(measured)), SUITE)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "torchrec.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "RANK" in os.environ:
        sharded_steps.measure_here({"times": times})
    else:
        main(sys.argv[1:])
