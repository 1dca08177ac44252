"""Writes safetensors files with one tensor for each name, for other tools, in shards if one file would be too large.

Shards are those of the Hugging Face tools: ``model-00001-of-00003.safetensors`` and so on, and an index
``model.safetensors.index.json`` that says which name is in which file. Headers and the index are written in pieces, and
tensors in blocks, so that saving needs little memory.
"""

from __future__ import annotations

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

from pdrs._core import IndexMap, safetensors_entries, safetensors_shards
from pdrs._files.atomic import replacing
from pdrs._files.checkpoint_file import EXTRA_STATE
from pdrs._files.collect import sort_alike
from pdrs._files.safetensors_file import CODES, PAGE
from pdrs._files.safetensors_write import (
    BLOCK,
    MAX_HEADER,
    MOST_EXPANDED,
    blocks_of,
    has_surrogate,
    json_bytes,
    on_host,
    refuse_dtype,
    refuse_expanded,
    refuse_unusual,
)
from pdrs._files.shards import PIECE, remove_interrupted, replacing_file, replacing_shards
from pdrs._rows.room import lent_whole
from pdrs.stacked import StackedParameterDict

__all__ = ["MAX_SHARD", "write_named"]

# What the Hugging Face tools write at most into one file, unless they are told otherwise.
MAX_SHARD = 5_000_000_000

# Gives the tensors from one position to another, as ``[count, *shape]``.
_Values = Callable[[int, int], Tensor]


class _Rows:
    """Names whose tensors are of one dtype and shape, and where their values come from.

    Parameters
    ----------
    names
        In the order in which they are written.
    dtype, shape
        Of each tensor.
    values
        Of the tensors.
    origin
        The dictionary that the names come from. Those of one dictionary differ.
    """

    def __init__(
        self,
        names: list[str],
        dtype: torch.dtype,
        shape: Sequence[int],
        values: _Values,
        origin: object,
    ) -> None:
        refuse_dtype(names[0], dtype)
        self.names, self.dtype, self.shape, self.values, self.origin = names, dtype, list(shape), values, origin
        self.nbytes = prod(self.shape) * dtype.itemsize

    def blocks(self, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of the tensors from one position to another."""
        step = max(1, BLOCK // max(self.nbytes, 1))
        for first in range(start, stop if self.nbytes else start, step):
            yield from blocks_of(self.values(first, min(first + step, stop)))


def write_named(
    path: str | os.PathLike[str],
    source: Module,
    texts: Mapping[str, str],
    *,
    max_shard_size: int = MAX_SHARD,
    sync: bool = True,
) -> dict[Path, int]:
    """Write a tensor for each name, as one safetensors file or in shards; return the sizes of the files.

    Parameters
    ----------
    path
        The file. If it would be too large, shards and their index are written instead.
    source
        Its state dict is written, and the rows of each StackedParameterDict by name.
    texts
        The metadata for the headers.
    max_shard_size
        The bytes of tensors in a file, at most, unless a single tensor is larger.
    sync
        Whether to wait until the files are on the disk.

    Raises
    ------
    TypeError
        If something is not a dense tensor, or of a dtype that safetensors does not have.
    ValueError
        If two tensors would have one name, or a name is ``__metadata__``, or UTF-8 cannot represent it.
    OSError
        If a file cannot be written.
    """
    # Wider elements first, which aligns all of them.
    parts = sorted(_parts(source), key=lambda part: -part.dtype.itemsize)
    names = parts[0].names if len(parts) == 1 else [name for part in parts for name in part.names]
    _refuse_repeated(names, parts)
    target = Path(os.fspath(path))
    kinds = [(CODES[part.dtype], part.shape) for part in parts]
    kind_of = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part.names) for part in parts])
    # The entries of tensors begin with commas.
    beginning = json_bytes({"__metadata__": {"format": "pt", **texts}})[:-1]
    try:
        shards = safetensors_shards(names, kinds, kind_of, MAX_HEADER - PAGE - len(beginning), max_shard_size)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected names of valid Unicode, got {next(filter(has_surrogate, names))!r}, which has a surrogate"
        ) from error

    def write(file: Path, first: int, count: int, entry_bytes: int) -> int:
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
                    out.write(block)
        return out.position

    remove_interrupted(target)
    if len(shards) < 2:
        with replacing_file(target):
            return {target: write(target, 0, *(shards[0] if shards else (0, 0)))}
    counts = [count for count, _ in shards]
    total = sum(part.nbytes * len(part.names) for part in parts)
    with replacing_shards(target, names, counts, total, sync=sync) as files:
        ends = np.cumsum(counts).tolist()
        return {
            file: write(file, end - count, count, entry_bytes)
            for file, end, (count, entry_bytes) in zip(files, ends, shards, strict=True)
        }


def _refuse_repeated(names: list[str], parts: list[_Rows]) -> None:
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


def _parts(source: Module) -> list[_Rows]:
    parts: list[_Rows] = []
    stacked = {
        prefix + "." if prefix else "": module
        for prefix, module in source.named_modules()
        if isinstance(module, StackedParameterDict)
    }
    owned = set()
    for prefix, module in stacked.items():
        parts += _of_stacked(module, prefix)
        owned.update([prefix + key for key in (*(table.attribute for table in module._tables), EXTRA_STATE)])
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
        # They are read later, and stay those of these names.
        tables = [lent_whole(sd, table) for table in sd._tables]
    parts = []
    for number, there, rows in places.by_table():
        table = tables[number]
        chosen = names if len(there) == len(names) else [names[at] for at in there.tolist()]
        parts.append(_Rows(chosen, table.dtype, table.shape[1:], _from_table(table, rows), sd))
    return parts


def _from_table(table: Tensor, rows: NDArray[np.int64]) -> _Values:
    """Return what gives rows of a table, as a view if they are adjacent."""
    if _are_adjacent(rows):
        first = int(rows[0])
        return lambda start, stop: table[first + start : first + stop]
    chosen = torch.from_numpy(rows)
    return lambda start, stop: table.index_select(0, chosen[start:stop].to(table.device))


def _are_adjacent(rows: NDArray[np.int64]) -> bool:
    # A part at a time: the difference of all would take as much memory as they do.
    return all(bool((np.diff(rows[at : at + PIECE + 1]) == 1).all()) for at in range(0, len(rows), PIECE))


def _of_tensors(names: list[str], values: list[Any]) -> list[_Rows]:
    """Describe tensors, a part for those of each dtype, shape and device."""

    def refuse(at: int) -> None:
        if not isinstance(values[at], Tensor):
            raise TypeError(f"expected a dense tensor for {names[at]!r}, got {type(values[at]).__name__}")
        refuse_unusual(names[at], values[at])

    parts = []
    for kind, there in sort_alike(values, refuse):
        chosen = [values[at] for at in there.tolist()]
        if chosen[0].nbytes > MOST_EXPANDED:
            for at in there.tolist():
                refuse_expanded(names[at], values[at])
        parts.append(_Rows([names[at] for at in there.tolist()], kind.dtype, kind.shape, _from_list(chosen), None))
    return parts


def _from_list(values: list[Tensor]) -> _Values:
    """Return what gives tensors of a list, stacked. A single one is not copied."""
    return lambda start, stop: on_host(values[start:stop])
