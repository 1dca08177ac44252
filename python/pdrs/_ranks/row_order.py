"""The order in which a checkpoint has the rows of a rank: sorted by bucket, without moving them in the table.

Any other number of ranks then reads ranges. What is written is put in order a block at a time. A file that continues
another one keeps the rows of the names that this has, so that few rows differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import Places, RowIndex, copy_rows, names_by_bucket, reorder_names
from pdrs._files.partial_read import Names, unpacked
from pdrs._files.safetensors_write import NewTensor
from pdrs._ranks.owners import BUCKETS
from pdrs._rows.names_codec import Header, bytes_of, pack, unpack
from pdrs._rows.state_dict import header_of
from pdrs._rows.write import by_bits
from pdrs.stacked import StackedParameterDict

__all__ = ["RowOrder", "buckets_of_rank"]

# The bytes that are put in order at once: they are still in the cache when they are written.
_BLOCK = 1 << 21
# A file has at most so many rows for each name, and so many more: then it is written anew.
_MOST_TIMES, _ALLOWANCE = 2, 64

_Ints = NDArray[np.int64]


def buckets_of_rank(rank: int, world_size: int) -> range:
    """Return the buckets that a rank owns."""
    return range(-(-rank * BUCKETS // world_size), -(-(rank + 1) * BUCKETS // world_size))


class RowOrder:
    """Which row of a file has which row of a dictionary.

    Parameters
    ----------
    local
        The dictionary, whose names must not change as long as this is used.
    before
        The packed names of the file that is continued, if there is one.

    Attributes
    ----------
    names
        The packed names, as the file has them.
    counts
        How many names each bucket has.
    is_sorted
        Whether names and rows are in the order of their buckets: not if a file is continued.
    """

    def __init__(self, local: StackedParameterDict, before: Tensor | None = None) -> None:
        header = header_of(local)
        self.is_sorted = before is None
        # The rows of each table in the file, as numbers of rows of the dictionary; -1 if no name has one.
        self._sources: list[_Ints] = []
        if before is None:
            tables, patterns = list(header.tables), list(header.patterns)
            packed, counts, self._sources = local._index.sorted_by_bucket(tables, patterns, BUCKETS)
        else:
            packed, counts = self._continued(local, header, before)
        self.counts = counts.view(np.int64)
        self.names = torch.from_numpy(packed)
        self._count = len(local)

    def _continued(
        self, local: StackedParameterDict, header: Header, before: Tensor
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Return the packed names, in the order of a file and new ones behind, and the counts of buckets."""
        places, names = local._index.places(), local._index.names()
        own = bytes_of(pack(local._index, header))
        by_bucket, counts = names_by_bucket(own, BUCKETS)
        order = by_bucket.view(np.int64)
        tables, rows = places.tables, places.rows
        used = np.zeros(len(header.tables), np.int64)
        new = np.ones(len(order), np.bool_)
        of_file = np.full(len(order), -1)
        old, old_header = unpack(before)
        numbers = {table.attribute: number for number, table in enumerate(old_header.tables)}
        held = RowIndex.of_ids(old, [table.used for table in old_header.tables])
        was, place = held.places(names), _places_in(held, names)
        for number, table in enumerate(header.tables):
            if table.attribute in numbers:
                used[number] = old_header.tables[numbers[table.attribute]].used
                kept = (tables == number) & (was.tables == numbers[table.attribute]) & (was.rows >= 0)
                of_file[kept], new[kept] = was.rows[kept], False
        # Names that stay are in the order of the file, and others come behind them.
        kept_order = np.flatnonzero(~new)
        kept_order = kept_order[np.argsort(place[kept_order], kind="stable")]
        order = np.concatenate([kept_order, order[new[order]]])
        for number, count in enumerate(used.tolist()):
            there = tables == number
            added = order[there[order] & new[order]]
            of_file[added] = count + np.arange(len(added))
            used[number] += len(added)
            source = np.full(int(used[number]), -1)
            source[of_file[there]] = rows[there]
            self._sources.append(source)
        of_tables = [table._replace(used=count) for table, count in zip(header.tables, used.tolist(), strict=True)]
        ids = Places.of(tables[order], of_file[order]).ids
        return reorder_names(own, order.view(np.uint64), of_tables, list(header.patterns), ids), counts

    def __len__(self) -> int:
        """Return the number of names."""
        return self._count

    def is_loose(self) -> bool:
        """Whether so many rows have no name any more that the file should be written anew."""
        return sum(map(len, self._sources)) > _MOST_TIMES * len(self) + _ALLOWANCE

    def rows(self, number: int, name: str, tensor: Tensor) -> NewTensor:
        """Describe what a tensor has for the rows of a table, as the file has it. Rows without a name are zero."""
        source = self._sources[number]

        def blocks() -> Iterator[NDArray[np.uint8]]:
            values = by_bits(tensor.detach())
            # There may be no rows to take it from.
            width = math.prod(tensor.shape[1:]) * tensor.itemsize
            if not width:
                return
            step = max(1, _BLOCK // width)
            # It is written before the next block takes its place.
            out = np.empty(min(step, len(source)) * width, np.uint8)
            for start in range(0, len(source), step):
                rows = source[start : start + step]
                if values.is_cpu and values.is_contiguous():
                    block = out[: len(rows) * width]
                    copy_rows(bytes_of(values), width, rows, block)
                    yield block
                    continue
                part = values.new_zeros((len(rows), *values.shape[1:]))
                there = np.flatnonzero(rows >= 0)
                to, of = (torch.from_numpy(one).to(values.device) for one in (there, rows[there]))
                yield bytes_of(part.index_copy_(0, to, values.index_select(0, of)))

        return NewTensor(name, tensor.dtype, (len(source), *tensor.shape[1:]), blocks)

    def by_bucket(self) -> Iterator[tuple[int, int, Names, _Ints]]:
        """Yield each bucket and table with names: these, and the rows of the dictionary that they have."""
        assert self.is_sorted
        names, _ = unpacked(bytes_of(self.names))
        buckets = np.repeat(np.arange(BUCKETS), self.counts)
        for number, source in enumerate(self._sources):
            there = names.tables == number
            of_table, own = names.kept(there), buckets[there]
            begins = np.flatnonzero(np.diff(own, prepend=-1))
            ends = np.cumsum(of_table.lengths)
            for begin, stop in zip(begins.tolist(), [*begins[1:].tolist(), len(own)], strict=False):
                lengths = of_table.lengths[begin:stop]
                text = of_table.text[ends[begin] - lengths[0] : ends[stop - 1]]
                part = Names(lengths, text, of_table.tables[begin:stop], of_table.rows[begin:stop])
                yield int(own[begin]), number, part, source[begin:stop]


def _places_in(index: RowIndex, names: list[str]) -> _Ints:
    """Return the place of each name among all names of an index, or -1."""
    all_places, own = index.places(), index.places(names)
    found = np.full(len(names), -1)
    for number, there, rows in own.by_table():
        place = np.empty(index.used(number), np.int64)
        of_table = all_places.tables == number
        place[all_places.rows[of_table]] = np.flatnonzero(of_table)
        found[there] = place[rows]
    return found
