"""One tensor a name, for other tools: ordinary safetensors files, cut into shards where one would be too large.

Shards are those of the Hugging Face tools: ``model-00001-of-00003.safetensors`` and so on, beside an index
``model.safetensors.index.json`` that says which name is in which file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from pdrs._core import IndexMap, safetensors_entries, safetensors_shards, sort_tensors
from pdrs._files.atomic import replacing
from pdrs._files.safetensors_file import (
    BLOCK,
    CODES,
    MAX_HEADER,
    MOST_EXPANDED,
    PAGE,
    has_surrogate,
    pieces_of,
    refuse_expanded,
)
from pdrs._files.shards import PIECE, remove_interrupted, replacing_file, replacing_shards
from pdrs._rows.insert import partition
from pdrs._rows.room import lent_whole
from pdrs._rows.write import stack
from pdrs.stacked import StackedParameterDict

__all__ = ["MAX_SHARD", "write_named"]

# What the Hugging Face tools write at most into one file, unless they are told otherwise.
MAX_SHARD = 5_000_000_000


class _Rows:
    """Names whose tensors are of one dtype and shape, and what gives their values, a block at a time.

    Parameters
    ----------
    names
        In the order in which they are to be written.
    dtype, shape
        Of each tensor.
    block
        Gives the tensors from one place to another, as ``[count, *shape]``.
    origin
        Where the names come from: those of one origin differ.
    """

    def __init__(
        self,
        names: list[str],
        dtype: torch.dtype,
        shape: Sequence[int],
        block: Callable[[int, int], Tensor],
        origin: object,
    ) -> None:
        self.names, self.dtype, self.shape, self.block, self.origin = names, dtype, list(shape), block, origin
        if dtype not in CODES:
            raise TypeError(f"safetensors has no dtype like {dtype}, of which {names[0]!r} is")
        self.nbytes = prod(self.shape) * dtype.itemsize

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the tensors from one place to another, in blocks of 64 MB or of one tensor."""
        step = max(1, BLOCK // max(self.nbytes, 1))
        for first in range(start, stop if self.nbytes else start, step):
            yield self.block(first, min(first + step, stop))


def write_named(
    path: str | os.PathLike[str],
    source: Mapping[str, Tensor] | Module,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int = MAX_SHARD,
    sync: bool = True,
) -> dict[Path, int]:
    """Write a tensor for each name, as one safetensors file or in shards.

    Parameters
    ----------
    path
        The file, such as ``model.safetensors``. If it would be too large, ``model-00001-of-00003.safetensors`` and so
        on, and ``model.safetensors.index.json``, are written in its place.
    source
        A StackedParameterDict, whose rows are written by name; another module, whose state dict is written, with the
        rows by name of each StackedParameterDict in it; or a mapping from names to tensors.
    metadata
        Texts for the headers; ``{"format": "pt"}`` is there unless they have another format.
    max_shard_size
        The bytes of tensors in a file, at most, unless a single tensor is larger. A header is cut off at 100 MB, beyond
        which safetensors does not read it.
    sync
        Whether to wait until the files are on the disk.

    Returns
    -------
    dict
        The files that hold tensors, and the bytes of each.

    Raises
    ------
    TypeError
        If something is no tensor, or of a dtype that safetensors does not have.
    ValueError
        If two tensors would have one name, or a name is ``__metadata__``, or no UTF-8.
    OSError
        If a file cannot be written.

    Notes
    -----
    Whenever the process dies, a reader finds the old file or files, or the new ones: shards get names that no file
    has, and the index, or the one file, is replaced in one step. What it replaces is deleted only then.
    The order is that of the names, tensors with wider elements first, which keeps all of them aligned. Tensors that
    share memory are written each. Extra memory: a block of 64 MB at most. Headers and the index are written in pieces.

    """
    # Wider elements first: each tensor then begins at a multiple of the size of its elements.
    parts = sorted(_parts(source), key=lambda part: -part.dtype.itemsize)
    names = parts[0].names if len(parts) == 1 else [name for part in parts for name in part.names]
    _check(names, parts)
    target = Path(os.fspath(path))
    texts = {"format": "pt", **(metadata or {})}
    kinds = [(CODES[part.dtype], part.shape) for part in parts]
    kind_of = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part.names) for part in parts])
    # Entries of tensors begin with commas.
    beginning = f'{{"__metadata__":{json.dumps(texts, ensure_ascii=False, separators=(",", ":"))}'.encode()
    try:
        shards = safetensors_shards(names, kinds, kind_of, MAX_HEADER - PAGE - len(beginning), max_shard_size)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected names of valid Unicode, got {next(filter(has_surrogate, names))!r}, which has a surrogate"
        ) from error
    shards = shards or [(0, 0)]

    def write(file: Path, first: int, count: int, entry_bytes: int, complete: Callable[[], None] | None = None) -> int:
        end = first + count
        size = -(-(len(beginning) + entry_bytes + 9) // PAGE) * PAGE
        chosen = list(_overlaps(parts, first, end))
        with replacing(file, size + sum(part.nbytes * count for part, _, count in chosen), sync=sync) as out:
            out.write((size - 8).to_bytes(8, "little"))
            out.write(beginning)
            at = 0
            for start in range(first, end, PIECE):
                entries, at = safetensors_entries(names, kinds, kind_of, (start, min(start + PIECE, end)), at)
                out.write(entries)
            out.write(b"}" + b" " * (size - out.position - 1))
            for part, start, count in chosen:
                for block in part.blocks(start, start + count):
                    for piece in pieces_of(block):
                        out.write(piece)
            if complete is not None:
                complete()
        return out.position

    remove_interrupted(target)
    if len(shards) == 1:
        with replacing_file(target) as complete:
            return {target: write(target, 0, *shards[0], complete)}
    counts = [count for count, _ in shards]
    total = sum(part.nbytes * len(part.names) for part in parts)
    with replacing_shards(target, names, counts, total, sync=sync) as files:
        ends = np.cumsum(counts).tolist()
        return {
            file: write(file, end - count, count, entry_bytes)
            for file, end, (count, entry_bytes) in zip(files, ends, shards, strict=True)
        }


def _check(names: list[str], parts: list[_Rows]) -> None:
    if len({id(part.origin) for part in parts}) < 2:
        return
    # A row of a dictionary may have the name of another module's tensor.
    index = IndexMap.from_names(names)
    if len(index) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"two tensors have the name {twice!r}")


def _overlaps(parts: list[_Rows], first: int, end: int) -> Iterator[tuple[_Rows, int, int]]:
    """Yield what of each part lies between two places of the whole: the part, its first place, and how many."""
    begin = 0
    for part in parts:
        start, stop = max(first - begin, 0), min(end - begin, len(part.names))
        if start < stop:
            yield part, start, stop - start
        begin += len(part.names)


# -- what there is to write --------------------------------------------------------------------------------------------


def _parts(source: Mapping[str, Tensor] | Module) -> list[_Rows]:
    if not isinstance(source, Module):
        return _of_tensors(list(source), list(source.values()))
    parts: list[_Rows] = []
    stacked = {
        prefix + "." if prefix else "": module
        for prefix, module in source.named_modules()
        if isinstance(module, StackedParameterDict)
    }
    owned = set()
    for prefix, module in stacked.items():
        parts += _of_stacked(module, prefix)
        owned.update([prefix + key for key in (*(table.attribute for table in module._tables), "_extra_state")])
    if isinstance(source, StackedParameterDict) and not _has_more(source):
        return parts  # its state dict would pack the names
    state = source.state_dict(keep_vars=True)
    kept = [key for key in state if key not in owned]
    return parts + _of_tensors(kept, [state[key] for key in kept])


def _has_more(sd: StackedParameterDict) -> bool:
    """Whether a StackedParameterDict, of a subclass then, has other state than its tables."""
    return bool(sd._buffers or sd._modules) or len(sd._parameters) > len(sd._tables)


def _of_stacked(sd: StackedParameterDict, prefix: str) -> list[_Rows]:
    """Describe the rows of a StackedParameterDict, a part for each of its tables."""
    with sd._lock.read():
        names = [prefix + name for name in sd] if prefix else list(sd)
        places = sd._index.places()
        tables = [
            lent_whole(sd, table) for table in sd._tables
        ]  # the rows are read later, and stay those of these names
    parts = []
    for number, there, rows in places.by_table():
        table = tables[number]
        chosen = names if len(there) == len(names) else [names[at] for at in there.tolist()]
        parts.append(_Rows(chosen, table.dtype, table.shape[1:], _TableBlocks(table, rows), sd))
    return parts


class _TableBlocks:
    """Gives rows of a table: where they follow each other, a view of it."""

    def __init__(self, table: Tensor, rows: NDArray[np.int64]) -> None:
        self.table = table
        self.first = int(rows[0]) if _follow_each_other(rows) else None
        self.rows = torch.from_numpy(rows if self.first is None else rows[:0].copy())

    def __call__(self, start: int, stop: int) -> Tensor:
        if self.first is not None:
            return self.table[self.first + start : self.first + stop]
        return self.table.index_select(0, self.rows[start:stop].to(self.table.device))


def _follow_each_other(rows: NDArray[np.int64]) -> bool:
    # A part at a time: the difference of all would take as much memory as they do.
    return all(bool((np.diff(rows[at : at + PIECE + 1]) == 1).all()) for at in range(0, len(rows), PIECE))


def _of_tensors(names: list[str], values: list[Any]) -> list[_Rows]:
    """Describe tensors that lie by themselves, a part for each dtype, shape and device."""
    if not names:
        return []
    classes = sort_tensors(values)[0]
    kinds: dict[Any, int] = {}
    for at in np.flatnonzero(classes < 0).tolist():
        value = values[at]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            what = type(value).__name__ if not isinstance(value, Tensor) else f"one of {value.layout} on {value.device}"
            raise TypeError(f"expected a dense tensor for {names[at]!r}, got {what}")
        kind = (value.dtype, tuple(value.shape), value.device)
        classes[at] = -1 - kinds.setdefault(kind, len(kinds))
    parts = []
    for _, there in partition([classes]):
        places = there.tolist()
        if values[places[0]].nbytes > MOST_EXPANDED:
            for at in places:
                refuse_expanded(names[at], values[at])
        first = values[places[0]]
        chosen = [values[at] for at in places]
        parts.append(_Rows([names[at] for at in places], first.dtype, first.shape, _ListBlocks(chosen), None))
    return parts


class _ListBlocks:
    """Gives tensors of a list, stacked; one alone is not copied."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values

    def __call__(self, start: int, stop: int) -> Tensor:
        chosen = self.values[start:stop]
        return stack(chosen, chosen[0].detach()[None])
