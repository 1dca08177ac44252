"""Reads a checkpoint set in one process: the names of all ranks as if they had been saved together."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pdrs._core import Places, RowIndex
from pdrs._files.archive_read import CHECK, Archive
from pdrs._files.checkpoint_file import EXTRA_STATE, NO_FILE, STEP, CheckpointError, CheckpointFile
from pdrs._files.partial_read import joined, packed_of, unpacked
from pdrs._files.safetensors_file import SafetensorsFile
from pdrs._files.set_manifest import HIDDEN, MANIFEST, FileOfSet, Manifest
from pdrs._rows.names_codec import Header, TableHeader, bytes_of
from pdrs._torch.huge_pages import empty

__all__ = ["SetFile", "open_archive"]


def open_archive(folder: str, one: FileOfSet) -> Archive:
    """Open a file of a set.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or of another set.
    OSError
        If it cannot be opened.
    """
    path = os.path.join(folder, one.name)
    try:
        file = SafetensorsFile(path)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise CheckpointError(path, "the file of the set is missing") from error
    if not {"pdrs", CHECK} & set(file.metadata):
        file.close()
        raise CheckpointError(path, "it is no archive of pdrs, and the set has one of this name")
    archive = Archive(file)
    what = None
    if archive.id != one.id:
        what = f"it is a file of another set: its id is {archive.id}, and the manifest says {one.id}"
    elif archive.metadata.get(CHECK) != one.crc32:
        what = "it is not the file that was saved: the checksum of its metadata differs from that in the manifest"
    elif file.size != one.size:
        what = f"it has {file.size} bytes, and the manifest says {one.size}"
    if what is not None:
        archive.close()
        raise CheckpointError(path, what)
    return archive


class SetFile(CheckpointFile):
    """An open set. The tables of all ranks are put together when they are asked for: **O(n)**.

    Parameters
    ----------
    folder
        Where it is.
    manifest
        Its manifest, if that has been read.
    dense
        Whether to leave out the sharded dictionaries, and to open the file of the first rank alone.

    Raises
    ------
    CheckpointError
        If the manifest or a file is missing, damaged, or of another set.
    OSError
        If a file cannot be opened.
    """

    format = "checkpoint set"

    def __init__(self, folder: str, manifest: Manifest | None = None, *, dense: bool = False) -> None:
        self.path = os.path.join(folder, MANIFEST)
        self.manifest = Manifest.read(folder) if manifest is None else manifest
        self._archives: list[Archive] = []
        self._packed: dict[str, Tensor] = {}
        try:
            for one in self.manifest.files[: 1 if dense else None]:
                self._archives.append(open_archive(folder, one))
        except BaseException:
            self.close()
            raise
        first = self._archives[0]
        self.metadata = first.metadata
        self._sharded = [] if dense else list(self.manifest.dictionaries)
        # The prefix of the dictionary that each of its tensors belongs to.
        self._members: dict[str, str] = {}
        left_out: set[str] = set()
        for prefix, about in self.manifest.dictionaries.items():
            own = [prefix + EXTRA_STATE, *(prefix + table for table in about["tables"])]
            left_out.update(own)
            self._members.update({} if dense else dict.fromkeys(own, prefix))
        kept = [name for name in first.names if not name.startswith(HIDDEN) and name not in left_out]
        self._names = [*self._members, *kept]
        self._known = frozenset(self._names)
        self.dictionaries = {
            prefix: name for prefix, name in first.dictionaries.items() if not dense or prefix + EXTRA_STATE in kept
        }

    @property
    def names(self) -> list[str]:
        """The names of the tensors: those of sharded dictionaries, and then all others."""
        return self._names

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def files(self) -> list[str]:
        """Return the paths of the manifest, and of all archives."""
        found = [path for one in self._archives for path in one.files()]
        return [self.path, *dict.fromkeys(found)]

    def close(self) -> None:
        """Close all files."""
        for one in self._archives:
            one.close()

    def prefixes(self) -> list[str]:
        """Return the prefixes of the dictionaries, sharded ones first."""
        others = [one for one in self._archives[0].prefixes() if one + EXTRA_STATE in self]
        return [*self._sharded, *(one for one in others if one not in self._sharded)]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._one_with(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if name not in self._members:
            return self._archives[0].shape(name)
        if name.endswith(EXTRA_STATE):
            return tuple(self.tensor(name).shape)
        rows = sum(one.shape(name)[0] for one in self._archives if name in one)
        return rows, *self._one_with(name).shape(name)[1:]

    def _one_with(self, name: str) -> Archive:
        for one in self._archives:
            if name in one:
                return one
        raise KeyError(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: put together if it is sharded, else as the archive of the first rank has it."""
        return self._whole(name) if name in self._members else self._archives[0].tensor(name)

    def load(self, name: str) -> Tensor:
        """Return a tensor in memory."""
        return self._whole(name) if name in self._members else self._archives[0].load(name)

    def table(self, name: str, *, loads: bool) -> Tensor:
        """Return the table of a dictionary."""
        return self._whole(name) if name in self._members else self._archives[0].table(name, loads=loads)

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables."""
        kinds: dict[tuple[torch.dtype, tuple[int, ...]], list[str]] = {}
        for name in self._names:
            if name.startswith(prefix) and len(name) > len(prefix):
                kinds.setdefault((self.dtype(name), self.shape(name)), []).append(name)
        counts = list(map(len, kinds.values()))
        places = Places.of(
            np.repeat(np.arange(len(counts)), counts), np.concatenate([*map(np.arange, counts), []]).astype(np.int64)
        )
        shown = [name[len(prefix) :] for alike in kinds.values() for name in alike]
        tables = [torch.stack([self.load(name) for name in alike]) for alike in kinds.values()]
        return RowIndex.of(shown, places, counts), tables

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Read all data of all files and compare checksums."""
        for one in self._archives:
            one.verify()
        return True

    # -- putting together ----------------------------------------------------------------------------------------------

    def _whole(self, name: str) -> Tensor:
        if name.endswith(EXTRA_STATE):
            if name not in self._packed:
                self._packed[name] = self._joined_names(name)
            return self._packed[name]
        parts = [one for one in self._archives if name in one]
        shape, dtype = self.shape(name), self.dtype(name)
        made, at = empty(shape, dtype=dtype), 0
        memory = bytes_of(made)
        for one in parts:
            if one.shape(name)[1:] != shape[1:] or one.dtype(name) != dtype:
                raise one.error(f"the tensor {name!r} has another shape or dtype than that of the first rank")
            data = bytes_of(one.tensor(name))
            for start in range(0, len(data), STEP):
                part = data[start : start + STEP]
                memory[at : at + len(part)] = part
                at += len(part)
        return made

    def _joined_names(self, name: str) -> Tensor:
        prefix = self._members[name]
        tables: dict[str, TableHeader] = {}
        numbers = {attribute: number for number, attribute in enumerate(self.manifest.dictionaries[prefix]["tables"])}
        before = np.zeros(len(numbers), np.int64)
        parts = []
        for one in self._archives:
            try:
                names, header = unpacked(bytes_of(one.tensor(name)))
                which = np.array([numbers[table.attribute] for table in header.tables], np.int64)
                parts.append(names._replace(tables=which[names.tables], rows=names.rows + before[which][names.tables]))
            except (ValueError, KeyError, IndexError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise one.error(f"the tensor {name!r} of packed names is damaged: {error}") from error
            for table, number in zip(header.tables, which.tolist(), strict=True):
                key = prefix + table.attribute
                before[number] += one.shape(key)[0] if key in one else 0
                tables[table.attribute] = table
        made = [
            tables.get(attribute, TableHeader(attribute, 0, True, 0))._replace(used=int(before[number]))
            for attribute, number in numbers.items()
        ]
        return torch.from_numpy(packed_of(joined(parts), Header(tuple(made))))
