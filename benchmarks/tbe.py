"""A whole training step of pdrs with names, beside TorchRec's table batched embeddings (TBE) on the CPU with ids.

It needs a Python of its own: fbgemm's wheels are built for one version of torch. With pdrs built for the same version
of Python, and the folder `pdrs_torch-*.dist-info` of its installation copied into the new one::

    python -m venv tbe
    tbe/bin/pip install torch==2.14.1 fbgemm-gpu-cpu==1.9.0 numpy tqdm
    PYTHONPATH=python tbe/bin/python benchmarks/tbe.py

It prints the tables and writes them to ``benchmarks/results/tbe.md``.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from machine import describe
from measure import Case, Measurement, Suite, measure
from report import Results, report
from training import BATCH, BUILD, FLOATS, PDRS, RATES, WARMED_AT_ONCE, Data, Setup, Trainer, whole_step

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (100_000, 1_000_000)
REPEATS = 5
LARGE_BATCH = 65_536
EPS = 1e-10

WITH_IDS, WITH_NAMES = "TBE", "dict and TBE"
OPTIMIZERS = {
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
    "RowWiseAdagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "SGD": EmbOptimType.EXACT_SGD,
}


def _tbe(data: Data, setup: Setup, takes_ids: bool) -> Trainer:
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(data.entries, setup.columns, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=OPTIMIZERS[setup.optimizer],
        learning_rate=RATES[setup.optimizer],
        eps=EPS,
        weights_precision=SparseType.FP32,
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
    )
    with torch.no_grad():
        table.split_embedding_weights()[0].copy_(data.rows(setup.columns))
    # One id in a bag.
    offsets = torch.arange(1 + max(WARMED_AT_ONCE, setup.batch))
    if takes_ids:
        return Trainer(lambda ids: table(ids, offsets[: len(ids) + 1]), takes_ids=True)
    numbers = data.numbers
    return Trainer(lambda names: table(torch.tensor([numbers[name] for name in names]), offsets[: len(names) + 1]))


BUILD_ALL: dict[str, Callable[[Data, Setup], Trainer]] = {
    WITH_IDS: partial(_tbe, takes_ids=True),
    WITH_NAMES: partial(_tbe, takes_ids=False),
    PDRS: BUILD[PDRS],
}


def _case(title: str, setup: Setup, note: str = "") -> Case[Data]:
    return Case(title, lambda subject, data: whole_step(subject, data, title, setup), note=note)


CASES = (
    _case("Adagrad", Setup("Adagrad", clipped=False), "TBE: `EXACT_ADAGRAD`."),
    _case("row-wise Adagrad", Setup("RowWiseAdagrad", clipped=False), "TBE: `EXACT_ROWWISE_ADAGRAD`."),
    _case("SGD", Setup("SGD", clipped=False), "TBE: `EXACT_SGD`. On a CPU it refuses Adam."),
    _case("Adagrad, 64 columns", Setup("Adagrad", columns=64, clipped=False, steps=5)),
    _case(f"Adagrad, {LARGE_BATCH:,} names", Setup("Adagrad", batch=LARGE_BATCH, clipped=False, steps=2)),
    _case(
        f"row-wise Adagrad, {LARGE_BATCH:,} names", Setup("RowWiseAdagrad", batch=LARGE_BATCH, clipped=False, steps=2)
    ),
    _case(
        f"Adagrad, {LARGE_BATCH:,} names, two threads",
        Setup("Adagrad", batch=LARGE_BATCH, clipped=False, threads=2, steps=2),
    ),
)

SUITE = Suite(
    name="tbe",
    title="Training steps beside TorchRec's table batched embeddings",
    subjects=(WITH_IDS, WITH_NAMES, PDRS),
    baselines=(WITH_IDS, WITH_NAMES),
    cases=CASES,
    make_data=partial(Data, build=BUILD_ALL),
    intro="Whole steps on a CPU: look-up, forward, backward, update. *TBE* is fbgemm's"
    " `SplitTableBatchedEmbeddingBagsCodegen` with one id in a bag, whose backward pass updates the rows; it is given"
    " the ids as a tensor and knows no names. *dict and TBE* looks the ids up in a `dict`. *pdrs* is given names, which"
    f" are new `str` objects in each batch. Entries are {FLOATS} float32 and batches {BATCH:,} random names unless a"
    " title says otherwise. The loss is the sum of squares, and gradients are not clipped. torch uses one thread unless"
    " a title says otherwise. Each name was trained before, and one step goes ahead of the clock. All figures are per"
    " name of a batch.",
    growth_at_most=4,
)


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of names, with commas between")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of each case (default: %(default)s)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=RESULTS, help="where to write tbe.md")
    options = parser.parse_args(arguments)
    sizes = tuple(sorted(map(int, options.sizes.split(","))))
    gc.disable()
    measured: list[Measurement] = []
    for of_case in measure(SUITE, sizes, options.repeats, re.compile("")):
        measured += of_case
    command = "python benchmarks/tbe.py"
    if sizes != SIZES:
        command += f" --sizes {options.sizes}"
    if options.repeats != REPEATS:
        command += f" --repeats {options.repeats}"
    text = report(Results(describe(command), sizes, tuple(measured)), SUITE)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tbe.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
