"""Reads a part of an archive: some names of a dictionary, and their rows, without the rest of the file.

The names of the first archive of a chain lie in the order of their buckets. So those of some buckets are one range, and
so are their rows. What later archives of the chain have changed is read beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import Places, RowIndex, hash_names, unpack_header
from pdrs._files.archive_read import NAMES, ROWS, Archive
from pdrs._files.checkpoint_file import EXTRA_STATE, STEP, CheckpointError
from pdrs._files.safetensors_file import SafetensorsFile
from pdrs._rows.names_codec import Header, TableHeader, bytes_of, pack

__all__ = ["Names", "Part", "as_range", "joined", "packed_of", "unpacked"]

# Rows between those that are asked for are read, too, if they have at most so many bytes.
_GAP = 4096
_START = 56

_Ints = NDArray[np.int64]


class Names(NamedTuple):
    """Names as they are packed: the bytes of each, their text, and the table and row of each."""

    lengths: _Ints
    text: NDArray[np.uint8]
    tables: _Ints
    rows: _Ints

    def kept(self, mask: NDArray[np.bool_]) -> Names:
        """Return those for which a mask is true."""
        if mask.all():
            return self
        ends = np.cumsum(self.lengths)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        begins = ends - self.lengths
        runs = [self.text[begins[first] : ends[stop - 1]] for first, stop in edges.reshape(-1, 2).tolist()]
        text = np.concatenate(runs) if runs else np.empty(0, np.uint8)
        return Names(self.lengths[mask], text, self.tables[mask], self.rows[mask])

    def texts(self, places: Sequence[int]) -> list[str]:
        """Return some of the names."""
        ends = np.cumsum(self.lengths)
        return [
            self.text[ends[at] - self.lengths[at] : ends[at]].tobytes().decode("utf-8", "surrogatepass")
            for at in places
        ]


def as_range(rows: _Ints) -> _Ints | range:
    """Return row numbers as a range, if each follows on the one before."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return range(int(rows[0]), int(rows[-1]) + 1)
    return rows


def joined(parts: Sequence[Names]) -> Names:
    """Return the names of several parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = np.empty(0, np.int64)
        return Names(none, np.empty(0, np.uint8), none, none)
    return Names(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def packed_of(names: Names, header: Header) -> NDArray[np.uint8]:
    """Return names as they stand in an archive, without words."""
    head = bytes_of(pack(RowIndex(), header)).copy()
    counts = np.array([len(names.lengths), len(names.lengths)], "<u8")
    head[8:24] = counts.view(np.uint8)
    ids = Places.of(names.tables, names.rows).ids
    ends = np.cumsum(names.lengths).astype("<u8")
    if not len(ends):
        return head
    if np.array_equal(ids, np.arange(len(ids))):
        head[16:24] = 0
        ids = ids[:0]
    return np.concatenate([head, ids.view(np.uint8), ends.view(np.uint8), names.text])


def unpacked(packed: NDArray[np.uint8]) -> tuple[Names, Header]:
    """Return what :func:`packed_of` was given; ValueError if the bytes are anything else."""
    count, tables, patterns = unpack_header(packed)
    header = Header(tuple(TableHeader(*table) for table in tables), tuple(patterns))
    _, ids, of_tables, of_patterns, labels, _ = packed[8:_START].view(np.int64).tolist()
    at = _START + 32 * of_tables + 8 * of_patterns + (labels + 7) // 8 * 8
    own = packed[at : at + 8 * ids].view(np.uint64) if ids else np.arange(count, dtype=np.uint64)
    at += 8 * ids
    lengths = _lengths(packed[at : at + 8 * count].view(np.int64), 0)
    if count and lengths.min() < 1:
        raise ValueError("the packed names are damaged: the ends do not ascend")
    at += 8 * count
    text = packed[at : at + int(lengths.sum())]
    return Names(lengths, text, *_tables_and_rows(own)), header


def _lengths(ends: _Ints, begin: int) -> _Ints:
    lengths: _Ints = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[:1] -= begin
    return lengths


def _tables_and_rows(ids: NDArray[np.uint64]) -> tuple[_Ints, _Ints]:
    places = Places.of_ids(np.require(ids, requirements="A"))
    return places.tables, places.rows


class Part:
    """Reads a part of an archive, and counts what it asks the system for.

    Parameters
    ----------
    archive
        The last of a chain.

    Attributes
    ----------
    asked
        How many bytes were asked for.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.asked = 0

    # -- names ---------------------------------------------------------------------------------------------------------

    def names(
        self, prefix: str, buckets: int, wanted: range, first: int, counts: Sequence[int]
    ) -> tuple[Names, Header]:
        """Return the names of a dictionary that are in some buckets, and the header. **O(m)** for ``m`` names.

        Parameters
        ----------
        prefix
            Of the dictionary.
        buckets
            How many buckets there are.
        wanted
            Which are asked for.
        first, counts
            The first bucket of the archive, and how many names each has in the first archive of the chain.
        """
        try:
            return self._names(prefix + EXTRA_STATE, buckets, wanted, first, counts)
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise self.archive.error(f"the tensor {prefix + EXTRA_STATE!r}: {error}") from error

    def _names(self, name: str, buckets: int, wanted: range, first: int, counts: Sequence[int]) -> tuple[Names, Header]:
        history = self.archive._history(name)
        holder = history[-1]
        if holder.previous is None and counts:
            place = np.concatenate([[0], np.cumsum(counts)])
            begin, stop = (int(place[np.clip(at - first, 0, len(counts))]) for at in (wanted.start, wanted.stop))
            found, header, total = self._range(holder, name, begin, stop)
            if total != place[-1]:
                raise holder.error(f"it has {total} names in {name!r}, and the manifest says {int(place[-1])}")
            places = np.arange(begin, stop)
            ends = [at for at in (0, len(places) - 1) if len(places)]
            if any(int(one) % buckets not in wanted for one in hash_names(found.texts(ends))):
                raise holder.error(f"the names in {name!r} are not in the order of their buckets")
        else:
            found, header = unpacked(bytes_of(self.whole(holder, name)))
            total = len(found.lengths)
            places = np.arange(total)
            found, places = _in_buckets(found, places, buckets, wanted)
        for one in reversed(history[:-1]):
            if one._how[name][0] == NAMES:
                found, places, header, total = self._changed(one, name, found, places, total, buckets, wanted)
        return found, header

    def _range(self, archive: Archive, name: str, begin: int, stop: int) -> tuple[Names, Header, int]:
        """Read the names from one number to another."""
        start, end = archive.file.offsets(name)

        def read(first: int, count: int) -> NDArray[np.uint8]:
            if first < 0 or count < 0 or start + first + count > end:
                raise archive.error(f"the tensor {name!r}: the sizes do not add up")
            return self._read(archive.file, start + first, start + first + count)

        head = read(0, _START)
        total, ids, tables, patterns, labels, _ = head[8:].view(np.int64).tolist()
        if ids not in (0, total) or min(total, tables, patterns, labels) < 0 or stop > total:
            raise archive.error(f"the tensor {name!r} of packed names is damaged, or is not what the manifest says")
        at = _START + 32 * tables + 8 * patterns
        described = read(_START, 32 * tables).view(np.int64).reshape(tables, 4).tolist()
        text = read(at, labels).tobytes()
        found, used = [], 0
        for size, group, trainable, rows in described:
            found.append(TableHeader(text[used : used + size].decode("utf-8", "replace"), group, bool(trainable), rows))
            used += size
        at += (labels + 7) // 8 * 8
        if ids:
            own = read(at + 8 * begin, 8 * (stop - begin)).view(np.uint64)
            at += 8 * total
        else:
            own = np.arange(begin, stop, dtype=np.uint64)
        before = 0 if begin == 0 else int(read(at + 8 * (begin - 1), 8).view(np.int64)[0])
        ends = read(at + 8 * begin, 8 * (stop - begin)).view(np.int64)
        lengths = _lengths(ends, before)
        if len(lengths) and lengths.min() < 1:
            raise archive.error(f"the tensor {name!r} of packed names is damaged: ends do not ascend")
        names = read(at + 8 * total + before, int(lengths.sum()))
        return Names(lengths, names, *_tables_and_rows(own)), Header(tuple(found)), total

    def _changed(
        self, archive: Archive, name: str, found: Names, places: _Ints, total: int, buckets: int, wanted: range
    ) -> tuple[Names, _Ints, Header, int]:
        """Return the names after a delta, and their places among all, given those before it."""
        delta = bytes_of(self.whole(archive, f"{name}.__{NAMES}__"))
        if delta[:4].tobytes() != b"pdrd" or len(delta) < 24:
            raise ValueError("it is no change of packed names")
        of_removed, of_moved = delta[8:24].view(np.int64).tolist()
        at = 24
        removed = delta[at : at + 4 * of_removed].view(np.uint32).astype(np.int64)
        at += (4 * of_removed + 7) // 8 * 8
        moved = delta[at : at + 4 * of_moved].view(np.uint32).astype(np.int64)
        at += (4 * of_moved + 7) // 8 * 8
        ids = delta[at : at + 8 * of_moved].view(np.uint64)
        added, header = unpacked(delta[at + 8 * of_moved :])
        if len(removed) != of_removed or len(ids) != of_moved or (len(removed) and removed[-1] >= total):
            raise ValueError("the sizes do not add up")
        if len(moved):
            tables, rows = found.tables.copy(), found.rows.copy()
            which = np.searchsorted(moved, places)
            own = which < len(moved)
            own[own] = moved[which[own]] == places[own]
            tables[own], rows[own] = (column[which[own]] for column in _tables_and_rows(ids))
            found = found._replace(tables=tables, rows=rows)
        stays = np.isin(places, removed, assume_unique=True, invert=True)
        found, places = found.kept(stays), places[stays]
        places = places - np.searchsorted(removed, places)
        left = total - len(removed)
        count = len(added.lengths)
        new, new_places = _in_buckets(added, np.arange(left, left + count), buckets, wanted)
        return joined([found, new]), np.concatenate([places, new_places]), header, left + count

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, name: str, rows: _Ints | range, out: Tensor) -> None:
        """Read some rows of a tensor, which may be in any order, into ``out``, ``[len(rows), *shape]``.

        A range is read without a look at each row; see :func:`as_range`.

        Raises
        ------
        CheckpointError
            If there is no such tensor, of the dtype and shape of ``out`` and with so many rows.
        """
        archive = self.archive
        if name not in archive:
            raise archive.error(f"the tensor {name!r} is missing")
        shape, dtype = archive.shape(name), archive.dtype(name)
        if dtype != out.dtype or not shape or shape[1:] != tuple(out.shape[1:]):
            raise archive.error(
                f"the tensor {name!r} is {dtype} {list(shape)}, and should be {out.dtype} [rows"
                f"{''.join(f', {one}' for one in out.shape[1:])}]"
            )
        if len(rows) == 0 or out.numel() == 0:
            return
        low, high = (rows[0], rows[-1]) if isinstance(rows, range) else (int(rows.min()), int(rows.max()))
        if low < 0 or high >= shape[0]:
            raise archive.error(f"the tensor {name!r} has {shape[0]} rows, and a name has another")
        if not isinstance(rows, range) and (np.diff(rows) <= 0).any():
            order = np.argsort(rows, kind="stable")
            made = torch.empty_like(out)
            self.rows(name, rows[order], made)
            bytes_of(out).reshape(len(rows), -1)[order] = bytes_of(made).reshape(len(rows), -1)
            return
        memory = bytes_of(out).reshape(len(rows), -1)
        history = archive._history(name)
        self._rows_in(history[-1].file, name, rows, memory)
        for one in reversed(history[:-1]):
            if one._how[name][0] == ROWS:
                self._overlay(one, name, np.asarray(rows), memory)

    def _rows_in(self, file: SafetensorsFile, name: str, rows: _Ints | range, memory: NDArray[np.uint8]) -> None:
        """Read ascending rows of a tensor in a file; those that it does not have are zero."""
        start, stop = file.offsets(name)
        width = memory.shape[1]
        there = (stop - start) // width
        if isinstance(rows, range):
            count = min(len(rows), max(0, there - rows.start))
            memory[count:] = 0
            self._read_into(file, memory[:count].reshape(-1), start + rows.start * width)
            return
        count = int(np.searchsorted(rows, there))
        memory[count:] = 0
        rows = rows[:count]
        breaks = np.flatnonzero((np.diff(rows) - 1) * width > _GAP) + 1
        edges = [0, *breaks.tolist(), count] if count else []
        most = max(1, STEP // width)
        for begin, end in pairwise(edges):
            # A piece at a time, so that rows between those that are asked for take little memory.
            at = begin
            while at < end:
                upto = min(end, int(np.searchsorted(rows, rows[at] + most)))
                first, last = int(rows[at]), int(rows[upto - 1]) + 1
                if last - first == upto - at:
                    self._read_into(file, memory[at:upto].reshape(-1), start + first * width)
                else:
                    block = self._read(file, start + first * width, start + last * width).reshape(-1, width)
                    memory[at:upto] = block[rows[at:upto] - first]
                at = upto

    def _overlay(self, archive: Archive, name: str, rows: _Ints, memory: NDArray[np.uint8]) -> None:
        """Put what a delta has of ascending rows in place of what was before."""
        changed = self.whole(archive, f"{name}.__{ROWS}__").numpy().astype(np.int64)
        low, high = (int(one) for one in np.searchsorted(changed, [rows[0], rows[-1] + 1]))
        places = np.searchsorted(rows, changed[low:high])
        own = np.flatnonzero(rows[np.minimum(places, len(rows) - 1)] == changed[low:high])
        if len(own):
            values = np.empty((len(own), memory.shape[1]), np.uint8)
            self._rows_in(archive.file, f"{name}.__values__", own + low, values)
            memory[places[own]] = values

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def whole(self, archive: Archive, name: str) -> Tensor:
        """Return a tensor of one file of the chain in memory."""
        archive._require(name)
        start, stop = archive.file.offsets(name)
        if start == stop:
            return torch.empty(archive.file.shape(name), dtype=archive.file.dtype(name), device="cpu")
        made = self._read(archive.file, start, stop)
        return torch.from_numpy(made).view(archive.file.dtype(name)).view(archive.file.shape(name))

    def load(self, name: str) -> Tensor:
        """Return a tensor of the chain in memory."""
        made = self.archive.load(name)
        self.asked += made.nbytes
        return made

    def _read(self, file: SafetensorsFile, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.empty(stop - start, np.uint8)
        self._read_into(file, data, start)
        return data

    def _read_into(self, file: SafetensorsFile, data: NDArray[np.uint8], start: int) -> None:
        self.asked += len(data)
        file.read_into(data, start)


def _in_buckets(names: Names, places: _Ints, buckets: int, wanted: range) -> tuple[Names, _Ints]:
    """Return those names that are in some buckets, and their places."""
    of_names = (hash_names(names.texts(range(len(names.lengths)))) % np.uint64(buckets)).astype(np.int64)
    mask = (of_names >= wanted.start) & (of_names < wanted.stop)
    return names.kept(mask), places[mask]
