"""Reads safetensors files in shards, with an index that says which name is in which, as Hugging Face tools do."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import IndexMap, RowIndex, ShardIndex
from pdrs._files.checkpoint_file import NO_FILE, CheckpointError, CheckpointFile
from pdrs._files.formats import what_it_is
from pdrs._files.safetensors_file import SafetensorsFile, in_words
from pdrs._rows.names_codec import bytes_of
from pdrs._torch.huge_pages import empty

__all__ = ["ShardedFile", "metadata_of", "read_index", "shard_paths"]

# The metadata of an index that count something, and that a new index would not have in common.
_COUNTS = ("total_size", "total_parameters")


class ShardedFile(CheckpointFile):
    """Open shards, and their index.

    Parameters
    ----------
    path
        The index.
    index
        Its contents.
    paths
        The shards, in its order.
    """

    format = "sharded safetensors"

    def __init__(self, path: str, index: ShardIndex, paths: Iterable[str]) -> None:
        self.path, self._index = path, index
        self.shards: list[SafetensorsFile] = []
        try:
            for shard in paths:
                self.shards.append(SafetensorsFile(shard))
            missing = index.missing([file.header for file in self.shards])
            if missing is not None:
                number, name = missing
                raise self.error(f"the shard {index.shards[number]!r} has no tensor {name!r}")
        except BaseException:
            self.close()
            raise
        self.metadata = metadata_of(index, self.shards)

    @property
    def names(self) -> list[str]:
        """The names, in the order of the index."""
        return self._index.names()

    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending. **O(n)**."""
        return self._index.names_ending(ending)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._index.find(name) is not None

    def _shard(self, name: str) -> SafetensorsFile:
        number = self._index.find(name)
        if number is None:
            raise KeyError(name)
        return self.shards[number]

    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the distinct pairs of dtype and shape, and the number of each tensor's, in order."""
        return in_words(self._index.kinds([file.header for file in self.shards]))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; CheckpointError if torch does not have it."""
        return self._shard(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return self._shard(name).shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped if it is large; KeyError if there is no such tensor."""
        return self._shard(name).tensor(name)

    def load(self, name: str) -> Tensor:
        """Return a tensor in memory; KeyError if there is no such tensor."""
        return self._shard(name).load(name)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all. Those of a shard share one map."""
        chosen = self.names if names is None else list(names)
        by_shard: dict[SafetensorsFile, list[str]] = {}
        for name in chosen:
            by_shard.setdefault(self._shard(name), []).append(name)
        found: dict[str, Tensor] = {}
        for shard, of_shard in by_shard.items():
            found.update(shard.tensors(of_shard))
        return {name: found[name] for name in chosen}

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables, in the order of the shards. A table in several shards is copied."""
        numbers: dict[tuple[torch.dtype, torch.Size], int] = {}
        parts: list[list[Tensor]] = []
        index = IndexMap()
        for shard, (file, count) in enumerate(zip(self.shards, self._index.counts(), strict=True)):
            stack, of_shard = file.stack(prefix, loads=loads)
            merged, first_rows = [], []
            for table in of_shard:
                number = numbers.setdefault((table.dtype, table.shape[1:]), len(numbers))
                if number == len(parts):
                    parts.append([])
                merged.append(number)
                first_rows.append(sum(map(len, parts[number])))
                parts[number].append(table)
            # Tensors that the index does not list are left out.
            stack.add_names(index, merged, first_rows, (self._index, shard) if len(file) > count else None)
        self.refuse_empty(index)
        tables = [part[0] if len(part) == 1 else _joined(part) for part in parts]
        return RowIndex.of_ids(index, list(map(len, tables))), tables

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Return false: the format has no checksums."""
        return False

    def close(self) -> None:
        """Close all shards."""
        for file in self.shards:
            file.close()


def _joined(parts: list[Tensor]) -> Tensor:
    """Return tables of one dtype and shape as one."""
    joined = empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    # As bytes: torch would wake its threads for each part.
    np.concatenate([bytes_of(part) for part in parts], out=bytes_of(joined))
    return joined


# -- the index ---------------------------------------------------------------------------------------------------------


def read_index(path: str) -> ShardIndex:
    """Read an index, whose shards must be in its folder."""
    text = Path(path).read_bytes()
    try:
        index = ShardIndex(text)
    except ValueError as error:
        what = None if text.lstrip().startswith(b"{") else what_it_is(text[:512])
        raise CheckpointError(path, f"{error}{f': {what}' if what else ''}") from None
    for shard in index.shards:
        # An index may come from an attacker, who must not choose files elsewhere.
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\0" in shard or "\\" in shard:
            raise CheckpointError(path, f"{shard!r} is no file in the folder of the index")
    return index


def shard_paths(index_path: str, index: ShardIndex) -> list[str]:
    """Return the paths of the shards; CheckpointError if one is not there."""
    paths = []
    for shard in index.shards:
        path = os.path.join(os.path.dirname(index_path), shard)
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            is_file = False
        if not is_file:
            raise CheckpointError(index_path, f"the shard {shard!r} is not there")
        paths.append(path)
    return paths


def metadata_of(index: ShardIndex, shards: Iterable[CheckpointFile]) -> dict[str, str]:
    """Return the texts of all shards and of the index. If two differ, the first shard's is taken."""
    found: dict[str, str] = {}
    for shard in shards:
        found = {**shard.metadata, **found}
    try:
        listed = json.loads(index.metadata or "{}")
    except (ValueError, RecursionError):
        listed = {}
    texts = listed.items() if isinstance(listed, dict) else ()
    return {key: text for key, text in texts if isinstance(text, str) and key not in _COUNTS} | found
