"""The manifest of a checkpoint set: which archives of several ranks belong together, and what is in which.

docs/distributed.md describes the format. The manifest is renamed into place when all files are there, so a folder has
the old set or the new one, whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdrs._files.archive_read import sum_of_text
from pdrs._files.atomic import remove_left_behind, replacing
from pdrs._files.checkpoint_file import CheckpointError
from pdrs._files.freed_later import freed_later

__all__ = ["HIDDEN", "MANIFEST", "FileOfSet", "Manifest", "file_name", "is_manifest", "remove_others"]

MANIFEST = "manifest.json"
# Names of tensors that are no part of the model begin with this: the state of optimizers, and what belongs to rows.
HIDDEN = "__pdrs__."

_FORMAT, _VERSION = "pdrs set", 1
_BEGIN = f'{{"format":"{_FORMAT}"'
_OURS = re.compile(r"[0-9a-f]{32}-(\d{5})-of-\d{5}\.safetensors")
_LEFT = re.compile(r"\.([0-9a-f]{32}-\d{5}-of-\d{5}\.safetensors)\.[0-9a-f]{16}\.tmp")


def file_name(set_id: str, rank: int, world_size: int) -> str:
    """Return the name of the file of a rank in a set."""
    return f"{set_id}-{rank:05}-of-{world_size:05}.safetensors"


@dataclass(frozen=True)
class FileOfSet:
    """What a manifest says of the archive of one rank.

    Parameters
    ----------
    name
        The name in the folder.
    id
        The ``id`` of the archive.
    crc32
        The checksum of its metadata, which have the checksums of all tensors.
    size
        In bytes.
    before
        The names of the archives that it continues.
    sorted
        For the prefix of each dictionary, how many names each bucket of this rank has in the first archive of the
        chain. There they are in the order of their buckets.
    names
        How many names each dictionary has, by its prefix.
    """

    name: str
    id: str
    crc32: str
    size: int
    before: tuple[str, ...]
    sorted: dict[str, list[int]]
    names: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What is known of a set beside its files.

    Parameters
    ----------
    id
        32 hexadecimal digits, drawn for each set.
    hash, hash_seed, buckets
        What says which rank owns a name.
    files
        One for each rank.
    dictionaries
        Of each sharded dictionary, by its prefix, what it was made with, and its tables.
    optimizers
        Their classes, groups of parameters with options, and states.
    texts
        The metadata of the user.
    """

    id: str
    hash: str
    hash_seed: int
    buckets: int
    files: tuple[FileOfSet, ...]
    dictionaries: dict[str, Any]
    optimizers: list[Any]
    texts: dict[str, str]

    def to_text(self) -> str:
        """Return it as JSON, with its own checksum."""
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "id": self.id,
            "hash": self.hash,
            "hash_seed": self.hash_seed,
            "buckets": self.buckets,
            "world_size": len(self.files),
            "files": [
                {
                    "file": one.name,
                    "id": one.id,
                    "crc32": one.crc32,
                    "bytes": one.size,
                    "before": list(one.before),
                    "sorted": one.sorted,
                    "names": one.names,
                }
                for one in self.files
            ],
            "dictionaries": self.dictionaries,
            "optimizers": self.optimizers,
            "texts": self.texts,
        }
        text = json.dumps(fields, separators=(",", ":"))
        return f'{text[:-1]},"crc32":"{sum_of_text(text)}"}}\n'

    @classmethod
    def of_text(cls, text: str, path: str) -> Manifest:
        """Read what :meth:`to_text` returned; CheckpointError, with the path, if it is anything else."""
        body, _, end = text.rstrip("\n").rpartition(',"crc32":"')
        if end != f'{sum_of_text(body + "}")}"}}':
            raise CheckpointError(path, "the manifest is damaged: its checksum differs")
        try:
            fields = json.loads(body + "}")
            version = int(fields["version"])
            if fields["format"] != _FORMAT or version > _VERSION:
                raise CheckpointError(
                    path, f"it was written by a later version of pdrs (set {version}, this one reads {_VERSION})"
                )
            files = tuple(
                FileOfSet(
                    str(one["file"]),
                    str(one["id"]),
                    str(one["crc32"]),
                    int(one["bytes"]),
                    tuple(map(str, one["before"])),
                    {str(prefix): list(map(int, counts)) for prefix, counts in one["sorted"].items()},
                    {str(prefix): int(count) for prefix, count in one["names"].items()},
                )
                for one in fields["files"]
            )
            made = cls(
                str(fields["id"]),
                str(fields["hash"]),
                int(fields["hash_seed"]),
                int(fields["buckets"]),
                files,
                dict(fields["dictionaries"]),
                list(fields["optimizers"]),
                {str(key): str(value) for key, value in fields["texts"].items()},
            )
            is_whole = len(files) == int(fields["world_size"]) > 0
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(path, "the manifest cannot be read") from error
        names = [name for one in files for name in (one.name, *one.before)]
        wrong = next((name for name in names if not _OURS.fullmatch(name)), None)
        if not is_whole or wrong is not None:
            what = "it does not list a file for each rank" if wrong is None else f"{wrong!r} is no file of a set"
            raise CheckpointError(path, what)
        return made

    @classmethod
    def read(cls, folder: str) -> Manifest:
        """Read the manifest of a folder.

        Raises
        ------
        CheckpointError
            If there is none, or it is damaged.
        OSError
            If it cannot be read.
        """
        path = os.path.join(folder, MANIFEST)
        if not os.path.exists(path):
            raise CheckpointError(
                folder, f"the folder has no {MANIFEST}, so it is no set that pdrs.distributed.save wrote"
            )
        try:
            text = Path(path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(path, "the manifest is damaged: it is no text") from error
        return cls.of_text(text, path)

    def write(self, folder: str, *, sync: bool) -> None:
        """Put it into a folder by one rename, which makes the set valid."""
        data = self.to_text().encode()
        with replacing(os.path.join(folder, MANIFEST), len(data), sync=sync) as file:
            file.write(data)

    def needed(self) -> set[str]:
        """Return the names of all files that the set needs."""
        return {name for one in self.files for name in (one.name, *one.before)}


def is_manifest(path: str) -> bool:
    """Whether a file is the manifest of a set, and not that of another tool."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN.encode()
    return False


def remove_others(folder: str, needed: Iterable[str], rank: int = 0, ranks: int = 1) -> None:
    """Remove the files of sets, and what killed processes left of them, that a folder does not need.

    If several ranks call it, each removes its share.
    """
    kept = set(needed)
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(folder)
    for name in names:
        left, own = _LEFT.fullmatch(name), _OURS.fullmatch(name)
        if left is not None and rank == 0:
            remove_left_behind(Path(folder, left[1]))
        elif own is not None and name not in kept and int(own[1]) % ranks == rank:
            path = os.path.join(folder, name)
            with suppress(OSError), freed_later(path):
                os.unlink(path)
    if rank == 0:
        remove_left_behind(Path(folder, MANIFEST))
