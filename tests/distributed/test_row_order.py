"""The order of rows in a file of a checkpoint set, in one process.

The bugs that this hunts: a row under the name of another, a table that the order leaves out, a number that reads beyond
a table, and rows of a width, dtype or layout that is copied another way than most.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import pdrs
import pdrs.distributed
from pdrs._core import copy_rows, hash_names
from pdrs._files.partial_read import unpacked
from pdrs._files.set_manifest import Manifest
from pdrs._ranks.owners import BUCKETS
from pdrs._ranks.row_order import RowOrder
from pdrs._rows.names_codec import bytes_of

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool)


def dictionary(shapes: list[tuple[int, ...]], count: int) -> pdrs.StackedParameterDict:
    """Return names of several shapes in turn, some of which have gone."""
    sd = pdrs.StackedParameterDict()
    for at in range(count):
        sd[f"{'n' * (at % 20)}/{at}"] = torch.full(shapes[at % len(shapes)], float(at))
    sd.drop([name for at, name in enumerate(sd) if at % 7 == 3])
    return sd


@pytest.mark.parametrize("shapes", [[(4,)], [(4,), (2, 3)], [(3,), (), (1,)]])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_each_name_has_its_row_and_buckets_ascend(shapes: list[tuple[int, ...]], count: int) -> None:
    sd = dictionary(shapes, count)
    order = RowOrder(sd)
    names, header = unpacked(bytes_of(order.names))
    texts = names.texts(range(len(names.lengths)))
    assert sorted(texts) == sorted(sd)
    assert len(order) == len(sd)
    buckets = (hash_names(texts) % np.uint64(BUCKETS)).astype(np.int64)
    assert (np.diff(buckets) >= 0).all()
    assert np.bincount(buckets, minlength=BUCKETS).tolist() == order.counts.tolist()
    # Names of one bucket keep their order.
    places = {name: at for at, name in enumerate(sd)}
    assert all(
        places[a] < places[b] for at, (a, b) in enumerate(itertools.pairwise(texts)) if buckets[at] == buckets[at + 1]
    )
    for number, (attribute, table) in enumerate(sd.tables().items()):
        assert header.tables[number].attribute == attribute
        found = order.rows(number, attribute, table)
        data = np.concatenate([*(block.copy() for block in found.blocks()), np.empty(0, np.uint8)])
        rows = torch.from_numpy(data).view(table.dtype).view(found.shape)
        own = names.tables == number
        assert names.rows[own].tolist() == list(range(int(own.sum()))) == list(range(found.shape[0]))
        for name, row in zip(np.array(texts, object)[own], rows, strict=True):
            assert torch.equal(row, sd[name].detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (2, 8), (64,), (100,)])
def test_rows_of_any_width_and_layout_come_whole(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdrs._ranks.row_order._BLOCK", 1000)
    sd = dictionary([(2,)], 300)
    order = RowOrder(sd)
    capacity = len(next(iter(sd.tables().values())))
    values = torch.randint(0, 2 if dtype is torch.bool else 100, (capacity, *shape)).to(dtype)
    names, _ = unpacked(bytes_of(order.names))
    rows = sd.indices(names.texts(range(len(sd))))
    for given in (values, values.repeat_interleave(2, 0)[::2], values.movedim(0, -1).contiguous().movedim(-1, 0)):
        data = np.concatenate([block.copy() for block in order.rows(0, "t", given).blocks()])
        assert torch.equal(torch.from_numpy(data).view(dtype).view(-1, *shape), values[rows])


def test_a_table_without_rows_is_continued_with_its_checksum(tmp_path: Path) -> None:
    words = pdrs.distributed.ShardedParameterDict([(3,), (2,)], init=pdrs.distributed.normal(1.0))
    words.gather(["a", "b"], missing="insert")
    words.gather([f"k{at}" for at in range(50)], missing="insert", shape=(2,))
    pdrs.distributed.save(words, tmp_path)
    words.drop(["a", "b"])
    words.local.compact()
    assert len(words.local.table((3,))) == 0
    for names in ([], ["c"]):
        words.gather(names, missing="insert")
        pdrs.distributed.save(words, tmp_path, since=tmp_path)
        other = pdrs.distributed.ShardedParameterDict([(3,), (2,)], init=pdrs.distributed.normal(1.0))
        assert not any(pdrs.distributed.load(tmp_path, other, verify=True))
        assert {name: other.local[name].tolist() for name in other} == {
            name: words.local[name].tolist() for name in words
        }


def test_files_stay_if_another_job_has_saved_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = pdrs.distributed.ShardedParameterDict((3,))
    words.gather(["a"], missing="insert")
    really = Manifest.write

    def write_and_wait(self: Manifest, folder: str, *, sync: bool) -> None:
        really(self, folder, sync=sync)
        if len(saved) == 0:
            saved.append(0)
            words.gather(["b"], missing="insert")
            pdrs.distributed.save(words, tmp_path)

    saved: list[int] = []
    monkeypatch.setattr(Manifest, "write", write_and_wait)
    pdrs.distributed.save(words, tmp_path)
    assert sorted(pdrs.open(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("row", [3, -2, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("width", [3, 4])
def test_a_row_that_a_table_has_not_is_refused(row: int, width: int) -> None:
    table, out = np.zeros(3 * width, np.uint8), np.zeros(width, np.uint8)
    with pytest.raises(ValueError, match="expected rows below 3, or -1"):
        copy_rows(table, width, np.array([row]), out)
    with pytest.raises(ValueError, match="room for just as many"):
        copy_rows(table, width, np.array([0, 1]), out)
    copy_rows(table, width, np.array([-1]), out)
