"""Writes sharded safetensors files and their index, which replace the old ones in one step.

1. The new index is written under a temporary name. It lists the new shards, and what they replace.
2. The new shards are written under names that no file has.
3. An atomic rename replaces the old index. From then on, readers see the new shards.
4. The old files are removed.

If the process is killed before step 3, the temporary index tells the next save which shards to remove. If it is killed
later, the new index does. If a single file replaces shards, their index is renamed to a temporary name first, so that
no reader finds an index whose shards are gone.

One process at a time may save to a path.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdrs._core import ShardIndex, shard_lines
from pdrs._files.atomic import remove_left_behind, replacing, temporary_name

__all__ = ["PIECE", "index_of", "remove_interrupted", "replacing_file", "replacing_shards"]

_REPLACES = "pdrs_replaces"

# The text about this many names is made and written at once: some megabytes.
PIECE = 1 << 16


def index_of(path: str | os.PathLike[str]) -> Path:
    """Return the path of the index that a file has if it is cut into shards."""
    return Path(os.fspath(path) + ".index.json")


@contextmanager
def replacing_shards(
    target: Path, names: list[str], counts: Sequence[int], total: int, *, sync: bool = True
) -> Iterator[list[Path]]:
    """Give the paths of the shards to write. At the end of the block they replace what is there.

    Parameters
    ----------
    target
        The file that would be written without shards.
    names, counts
        The names of all tensors in order, and how many of them each shard has.
    total
        The bytes of all tensors.
    sync
        Whether to wait until the index is on the disk.
    """
    index = index_of(target)
    old = {target, index, *(_listed(target, index) or ())}
    before = {path for path in old if path.is_file()}
    files = _new_shards(target, len(counts), old)
    try:
        with replacing(index, 0, sync=sync) as out:
            for piece in _index_text(names, files, counts, total, before):
                out.write(piece)
            yield files
    except BaseException:
        _remove(files)
        raise
    _remove(before.difference(files, [index]))


@contextmanager
def replacing_file(target: Path) -> Iterator[None]:
    """Remove the index and the shards when the block has put a single file in their place."""
    index = index_of(target)
    listed = _listed(target, index)
    yield
    if listed is None:
        return
    aside = temporary_name(index)
    try:
        # The name of a link goes, and what it points to stays.
        index.unlink() if index.is_symlink() else os.replace(index, aside)
    except OSError:
        return  # Readers find the new file first.
    _remove([*listed, aside])


def remove_interrupted(target: Path) -> None:
    """Remove the shards that killed processes left when they saved to this path."""

    def remove_listed(left: Path) -> None:
        shards = set(_listed(target, left, replaced=False) or ())
        shards.difference_update(_listed(target, index_of(target), replaced=False) or ())
        for shard in shards:
            remove_left_behind(shard)
        _remove(shards)

    remove_left_behind(index_of(target), remove_listed)


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


def _new_shards(target: Path, count: int, old: set[Path]) -> list[Path]:
    """Return paths that no file has and that the old index does not list: without a tag if they are free."""
    tag = ""
    while True:
        ending = f"-of-{count:05}{target.suffix}"
        paths = [target.with_name(f"{target.stem}{tag}-{number:05}{ending}") for number in range(1, count + 1)]
        if not any(path in old or path.exists() or path.is_symlink() for path in paths):
            return paths
        tag = f"-{secrets.token_hex(4)}"


def _index_text(
    names: list[str], files: list[Path], counts: Sequence[int], total: int, before: set[Path]
) -> Iterator[bytes | NDArray[np.uint8]]:
    """Yield the text of an index in pieces."""
    metadata: dict[str, Any] = {"total_size": total}
    if before:
        metadata[_REPLACES] = sorted(path.name for path in before)
    yield f'{{\n  "metadata": {json.dumps(metadata)},\n  "weight_map": {{'.encode()
    first = 0
    for file, count in zip(files, counts, strict=True):
        end = first + count
        for start in range(first, end, PIECE):
            lines = shard_lines(names, (start, min(start + PIECE, end)), file.name)
            yield lines if start else lines[1:]
        first = end
    yield b"\n  }\n}\n"


def _listed(target: Path, index: Path, *, replaced: bool = True) -> list[Path] | None:
    """Return the shards that an index lists and whose names we give; None if it cannot be read."""
    ours = re.compile(rf"{re.escape(target.stem)}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}{re.escape(target.suffix)}")
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        found = ShardIndex(index.read_bytes())
        shards = found.shards + (json.loads(found.metadata).get(_REPLACES, []) if replaced else [])
        return [target.with_name(shard) for shard in dict.fromkeys(shards) if ours.fullmatch(shard)]
    return None
