"""Opens the checkpoint at a path, whatever its format: the first bytes of a file decide, not its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from pdrs._files.archive_read import CHECK, Archive
from pdrs._files.checkpoint_file import CheckpointError, CheckpointFile
from pdrs._files.formats import file_in, is_of_torch
from pdrs._files.safetensors_file import SafetensorsFile
from pdrs._files.set_file import SetFile
from pdrs._files.set_manifest import MANIFEST, is_manifest
from pdrs._files.sharded_file import ShardedFile, read_index, shard_paths
from pdrs._files.shards import index_of
from pdrs._files.torch_file import TorchFile, TorchShards

__all__ = ["Key", "open_file"]

# Where in a file of torch's the state dict is: under one key, or one key in what is under another.
Key = str | Sequence[str]


def open_file(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], key: Key | None = None) -> CheckpointFile:
    """Open a checkpoint of any format.

    Parameters
    ----------
    path
        A safetensors file, or the state dict that ``torch.save`` wrote. The index of a checkpoint in shards, or the
        file that was cut into shards. Or a folder with one of these, or with a set of ``pdrs.distributed.save``.
    key
        The key of the state dict in a file of torch's, or several, if it is in a dict in a dict.

    Raises
    ------
    CheckpointError
        If the file is damaged, or of another kind, or a folder has none, or several.
    KeyError
        If there is nothing under ``key``.
    OSError
        If it cannot be opened.
    TypeError
        If it is no path, or ``key`` is neither a ``str`` nor a sequence of ``str``.
    ValueError
        If ``key`` is given for a file of another kind.
    """
    shown = os.fsdecode(path)
    keys = () if key is None else (key,) if isinstance(key, str) else key
    if not isinstance(keys, Sequence) or not all(isinstance(one, str) for one in keys):
        raise TypeError(f"expected key as a str or a sequence of str, got {key!r}")
    while True:
        version = _version(shown)
        try:
            return _open(shown, tuple(keys))
        except (CheckpointError, FileNotFoundError):
            # A save may have replaced the files meanwhile, and removed those that were there.
            if _version(shown) == version:
                raise


def _open(path: str, keys: tuple[str, ...]) -> CheckpointFile:
    if os.path.isdir(path):
        path = file_in(path)
    if os.path.basename(path) == MANIFEST and is_manifest(path):
        if keys:
            raise ValueError(
                f"key= is for what torch.save wrote, and {path} is of a set, in which prefix= chooses names"
            )
        return SetFile(os.path.dirname(path))
    if not os.path.exists(path) and index_of(path).exists():
        path = os.fspath(index_of(path))
    index = read_index(path) if path.endswith(".json") else None
    paths = [path] if index is None else shard_paths(path, index)
    formats = {is_of_torch(one) for one in paths}
    if len(formats) > 1:
        raise CheckpointError(path, "some of its shards are of torch.save, and others of safetensors")
    if True in formats:
        return TorchFile(path, keys) if index is None else TorchShards(path, index, paths, keys)
    if keys:
        raise ValueError(
            f"key= is for what torch.save wrote, and {path} is of safetensors, in which prefix= chooses names"
        )
    if index is not None:
        return ShardedFile(path, index, paths)
    file = SafetensorsFile(path)
    return Archive(file) if {"pdrs", CHECK} & set(file.metadata) else file


def _version(path: str) -> list[tuple[int, int]]:
    """Return what tells a file, and the index of its shards, from those that replace them."""
    found = []
    for one in (path, index_of(path)):
        with suppress(OSError, ValueError):
            now = os.stat(one)
            found.append((now.st_ino, now.st_mtime_ns))
    return found
