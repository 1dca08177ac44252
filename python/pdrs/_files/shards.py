"""Safetensors files in shards, beside an index in JSON that says which name is in which, as the Hugging Face tools do.

They are replaced as one. The new index is written first, under another name (see :mod:`pdrs._files.atomic`);
then the shards that it lists, under names that no file has; then it takes the place of the old one. So who looks at any
instant finds the old index with its shards, or the new one. What a killed process leaves is listed in the index that it
left, or, if that was in its place already, as what it replaces: the next save of the same path removes it. Where one
file takes the place of shards, their index goes first, and is kept aside until they are gone.

Of several processes that save to the same path, the last one wins. They lock the folder while they choose names, and
while they replace and remove: so nobody removes what another has just written, or takes a name that another is about to
remove.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdrs._core import ShardIndex, shard_lines
from pdrs._files.atomic import being_written, folder_locked, put_aside, remove_left_behind, replacing

__all__ = ["INDEX", "PIECE", "files_of", "index_of", "remove_interrupted", "replacing_file", "replacing_shards"]

# What the index of shards has behind the name of the file that would be written without them.
INDEX = ".index.json"

_REPLACES = "pdrs_replaces"

# What tells of this many names is made, and written, at once: some megabytes.
PIECE = 1 << 16


def index_of(path: str | os.PathLike[str]) -> Path:
    """Return the path of the index that belongs to the file of this path when it is cut into shards."""
    return Path(os.fspath(path) + INDEX)


def files_of(target: Path) -> set[Path]:
    """Return what is there of saves to this path: the file itself, its index, its shards and older ones."""
    index = index_of(target)
    listed = _listed(target, index)
    # What was replaced by the last save is gone, as a rule: a list of all that ever was would grow for ever.
    return {path for path in {target} | (set() if listed is None else listed | {index}) if path.is_file()}


@contextmanager
def replacing_shards(
    target: Path, names: list[str], counts: Sequence[int], total: int, *, sync: bool = True
) -> Iterator[list[Path]]:
    """Give the paths of shards to write; at the end of the block they take the place of what was there.

    Parameters
    ----------
    target
        The file that would be written without shards.
    names, counts
        The names of all tensors in order, and how many are in each shard.
    total
        The bytes of all tensors.
    sync
        Whether to wait until the index is on the disk.
    """
    files: list[Path] = []
    with ExitStack() as end:
        try:
            with replacing(index_of(target), 0, sync=sync) as out:
                with folder_locked(target.parent):
                    files = _new_shards(target, len(counts))
                    before = files_of(target)
                for piece in _index(names, files, counts, total, before):
                    out.write(piece)
                yield files
                end.enter_context(folder_locked(target.parent))
                # Another process may have been faster.
                before |= files_of(target)
        except BaseException:
            _remove(files)
            raise
        _remove(before.difference(files, [index_of(target)]))


@contextmanager
def replacing_file(target: Path) -> Iterator[Callable[[], None]]:
    """Remove the index and the shards that are there when a single file takes their place.

    Gives a function that is to be called when the new file is complete, before it is put in its place.
    """
    before: set[Path] = set()
    with ExitStack() as end:

        def complete() -> None:
            end.enter_context(folder_locked(target.parent))
            before.update(files_of(target))

        yield complete
        index = index_of(target)
        # What the index lists goes last, and the index before it: nobody must find one whose shards are gone.
        listed = _listed(target, index, replaced=False) or set()
        _remove(before - listed - {target, index})
        with put_aside(index):
            _remove(before & listed)


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()


def remove_interrupted(target: Path) -> None:
    """Remove the shards that killed processes have left on their way to save to this path."""

    def remove_listed(left: Path) -> None:
        shards, needed = (_listed(target, index, replaced=False) or set() for index in (left, index_of(target)))
        shards -= needed
        for shard in shards:
            remove_left_behind(shard)
        _remove(shards)

    remove_left_behind(index_of(target), remove_listed)


def _new_shards(target: Path, count: int) -> list[Path]:
    """Return paths of shards that are not there yet: the usual ones if they are free."""
    # Another process that saves to the same path at the same time may have chosen those.
    tag = "" if being_written(index_of(target)) == 1 else _tag()
    # What was replaced, others may find listed and remove, though it is there no more.
    listed = _listed(target, index_of(target)) or set()
    while True:
        ending = f"-of-{count:05}{target.suffix}"
        paths = [target.with_name(f"{target.stem}{tag}-{number:05}{ending}") for number in range(1, count + 1)]
        if not any(path in listed or path.exists() or path.is_symlink() for path in paths):
            return paths
        tag = _tag()


def _tag() -> str:
    return f"-{secrets.token_hex(4)}"


def _index(
    names: list[str], files: list[Path], counts: Sequence[int], total: int, before: set[Path]
) -> Iterator[bytes | NDArray[np.uint8]]:
    """Yield the text that says which name is in which file, and what is replaced."""
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


def _listed(target: Path, index: Path, *, replaced: bool = True) -> set[Path] | None:
    """Return the shards that an index lists, if they have names that we give, or None if it cannot be read."""
    ours = re.compile(rf"{re.escape(target.stem)}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}{re.escape(target.suffix)}")
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        found = ShardIndex(index.read_bytes())
        shards = set(found.shards)
        if replaced:
            shards.update(json.loads(found.metadata).get(_REPLACES, []))
        return {target.with_name(shard) for shard in shards if ours.fullmatch(shard)}
    return None
