"""The order in which a checkpoint has the rows of a rank: sorted by bucket, without moving them in the table.

Any other number of ranks then reads ranges. What is written is put in order a block at a time. A file that continues
another one keeps the rows of the names that this has, so that few rows differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import IndexMap, Places, RowIndex, hash_names
from pdrs._files.safetensors_write import NewTensor
from pdrs._ranks.owners import BUCKETS, buckets_of
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
        In the order of the file.
    header
        Of the file.
    counts
        How many names each bucket has.
    is_sorted
        Whether names and rows are in the order of their buckets: not if a file is continued.
    """

    def __init__(self, local: StackedParameterDict, before: Tensor | None = None) -> None:
        names = local._index.names()
        places = local._index.places()
        header = header_of(local)
        self.buckets = buckets_of(hash_names(names))
        self.counts = np.bincount(self.buckets, minlength=BUCKETS)
        self.is_sorted = before is None
        tables, rows = places.tables, places.rows
        order = np.argsort(self.buckets, kind="stable")
        used = np.zeros(len(header.tables), np.int64)
        new = np.ones(len(names), np.bool_)
        of_file = np.full(len(names), -1)
        if before is not None:
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
        for number in range(len(header.tables)):
            there = order[(tables[order] == number) & new[order]]
            of_file[there] = used[number] + np.arange(len(there))
            used[number] += len(there)
        self.order = order
        self.names = [names[at] for at in order.tolist()]
        self._tables, self._rows = tables[order], of_file[order]
        self._sources: list[_Ints] = []
        for number, count in enumerate(used.tolist()):
            there = tables == number
            source = np.full(count, -1)
            source[of_file[there]] = rows[there]
            self._sources.append(source)
        self.header = Header(
            tuple(table._replace(used=int(count)) for table, count in zip(header.tables, used, strict=True)),
            header.patterns,
        )

    def is_loose(self) -> bool:
        """Whether so many rows have no name any more that the file should be written anew."""
        return sum(map(len, self._sources)) > _MOST_TIMES * len(self.names) + _ALLOWANCE

    def packed(self, name: str) -> NewTensor:
        """Describe the packed names."""
        places = Places.of(self._tables, self._rows)
        return NewTensor.of(name, pack(IndexMap.from_names(self.names), self.header, places))

    def rows(self, number: int, name: str, tensor: Tensor) -> NewTensor:
        """Describe what a tensor has for the rows of a table, as the file has it. Rows without a name are zero."""
        source = self._sources[number]

        def blocks() -> Iterator[NDArray[np.uint8]]:
            values = by_bits(tensor.detach())
            width = max(1, values[:1].nbytes)
            if not values[:1].numel():
                return
            step = max(1, _BLOCK // width)
            for start in range(0, len(source), step):
                rows = source[start : start + step]
                index = torch.from_numpy(np.maximum(rows, 0)).to(values.device)
                part = values.index_select(0, index)
                if rows.min() < 0:
                    part[torch.from_numpy(rows < 0).to(values.device)] = 0
                yield bytes_of(part)

        return NewTensor(name, tensor.dtype, (len(source), *tensor.shape[1:]), blocks)

    def by_bucket(self) -> Mapping[tuple[int, int], tuple[list[str], _Ints]]:
        """Return the names and the rows of the dictionary that each bucket has in each table."""
        assert self.is_sorted
        found: dict[tuple[int, int], tuple[list[str], _Ints]] = {}
        buckets = self.buckets[self.order]
        for number, source in enumerate(self._sources):
            there = np.flatnonzero(self._tables == number)
            of_table = buckets[there]
            edges = np.flatnonzero(np.diff(of_table, prepend=-1, append=-1)) if len(there) else np.empty(0, np.int64)
            for begin, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                names = [self.names[at] for at in there[begin:stop].tolist()]
                found[int(of_table[begin]), number] = names, source[begin:stop]
        return found


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
