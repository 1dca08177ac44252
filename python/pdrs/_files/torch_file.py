"""Reads state dicts that ``torch.save`` wrote, with ``weights_only=True``: nothing in a pickle is run."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdrs._core import Places, RowIndex, ShardIndex
from pdrs._files.checkpoint_file import STEP, CheckpointError, CheckpointFile
from pdrs._files.collect import sort_by_kind
from pdrs._files.progress import progress
from pdrs._files.sharded_file import metadata_of
from pdrs._rows.names_codec import claims_too_much
from pdrs._rows.write import stack

__all__ = ["METADATA", "VERSIONS", "TorchFile", "TorchShards"]

# The attribute of a state dict that holds what other formats have in the header.
METADATA = "__metadata__"

# The attribute of a state dict in which torch itself keeps the versions of modules.
VERSIONS = "_metadata"

# How deep an error looks for state dicts in a dict, and how many it lists.
_DEPTH, _LISTED = 4, 5

# What the system reports for reasons of its own, whatever is in a file.
_OF_THE_SYSTEM = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EINTR)


class TorchFile(CheckpointFile):
    """A state dict that ``torch.save`` wrote. It is mapped copy-on-write if it has the format of torch 1.6 or later.

    Parameters
    ----------
    path
        The file.
    keys
        The keys that lead to the state dict, if it is in another dict.
    """

    format = "torch"

    def __init__(self, path: str, keys: tuple[str, ...] = ()) -> None:
        self.path = path
        with self._reading():
            try:
                state = self._unpickled()
            except pickle.UnpicklingError as error:
                raise self.error(f"torch.load(weights_only=True) refuses it: {_reason(error)}") from error
        found = self._under(state, keys)
        claimed = 0
        for name, value in found.items():
            claimed += value.nbytes if value.layout == torch.strided and not value.is_meta else 0
            if claims_too_much(claimed, os.path.getsize(path)):
                raise self.error(
                    f"the tensors up to {name!r} would have {claimed} bytes, and the file has "
                    f"{os.path.getsize(path)}: call contiguous() before they are saved"
                )
        self._state = {name: _resolved(value) for name, value in found.items()}
        texts = getattr(found, METADATA, None)
        texts = texts.items() if isinstance(texts, dict) else ()
        self.metadata = {key: text for key, text in texts if isinstance(key, str) and isinstance(text, str)}
        versions = getattr(found, VERSIONS, None)
        versions = versions.items() if isinstance(versions, dict) else ()
        self.versions = {key: of_one for key, of_one in versions if _is_version(of_one)}

    def _unpickled(self) -> Any:
        if self.path.endswith(".safetensors"):
            # torch would have it read by safetensors because of its name.
            with open(self.path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))

    def _under(self, state: Any, keys: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Return the state dict that keys lead to, or raise an error that says what may be meant instead."""
        found = state
        for at, key in enumerate(keys):
            if not isinstance(found, Mapping) or key not in found:
                raise KeyError(f"there is nothing at key={_shown(keys[: at + 1])} in {self.path}{_hint(state)}")
            found = found[key]
        where = f" at key={_shown(keys)}" if keys else ""
        if not isinstance(found, Mapping):
            noun = type(found).__name__
            article = "an" if noun[0] in "aeiouAEIOU" else "a"
            raise self.error(f"expected a state dict{where}, found {article} {noun}{_hint(state)}")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise self.error(
                    f"expected a state dict of tensors by name{where}, found {type(value).__name__} at {name!r}"
                    f"{_hint(state)}"
                )
        return found

    @contextmanager
    def _reading(self, what: str | None = None) -> Iterator[None]:
        """Turn the errors of torch's readers into CheckpointErrors: damaged bytes may cause any of them.

        Errors of the system, and those for want of memory, go through.
        """
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
                raise
            is_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
            if is_memory and not _can_have(2 * os.path.getsize(self.path)):
                raise MemoryError(f"out of memory while {self.path} was read") from error
            said = _what_torch_says(self.path, error) if what is None else f"{what}: {error or type(error).__name__}"
            raise self.error(said) from error

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return list(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; KeyError if there is no such tensor."""
        return self._state[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return tuple(self._state[name].shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; calls for one name share their memory."""
        return self._state[name]

    def load(self, name: str) -> Tensor:
        """Return a copy of a tensor; KeyError if there is no such tensor."""
        return self._state[name].clone()

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables. **O(n)**."""
        keys = [name for name in self._state if name.startswith(prefix) and (name != prefix or not prefix)]
        values: list[Any] = [self._state[name] for name in keys]

        def refuse(at: int) -> None:
            raise self.error(f"the tensor {keys[at]!r} is {type(values[at]).__name__}, not dense")

        names = [key[len(prefix) :] for key in keys]
        self.refuse_empty(names)
        numbers, rows = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        tables: list[Tensor] = []
        for there, _ in sort_by_kind(values, refuse).values():
            numbers[there], rows[there] = len(tables), np.arange(len(there))
            chosen = [values[at] for at in there.tolist()]
            table = stack(chosen, chosen[0].detach()[None])
            # A single one has not been copied.
            tables.append(table.clone() if loads and len(chosen) == 1 else table)
        return RowIndex.of(names, Places.of(numbers, rows), list(map(len, tables))), tables

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Read all of the file and compare its checksums, which torch ignores; return whether there are any.

        Raises
        ------
        CheckpointError
            If one differs; it names the record of the file.
        """
        with self._reading("its records cannot be read"):
            if not zipfile.is_zipfile(self.path):
                return False
            with zipfile.ZipFile(self.path) as records:
                found = records.infolist()
                if not any(record.CRC for record in found):
                    return False  # see torch.serialization.set_crc32_options
                with progress(sum(record.file_size for record in found), self.path) as count:
                    damaged = next((record.filename for record in found if not _is_whole(records, record, count)), None)
        if damaged is not None:
            raise self.error(f"the record {damaged!r} is damaged: its checksum differs")
        return True

    def close(self) -> None:
        """Do nothing: torch has read the file."""


class TorchShards(TorchFile):
    """Such files, with an index that says where tensors are.

    Parameters
    ----------
    path
        The index.
    index
        Its contents.
    paths
        The shards, in its order.
    keys
        As for each file.
    """

    format = "sharded torch"

    def __init__(self, path: str, index: ShardIndex, paths: Iterable[str], keys: tuple[str, ...] = ()) -> None:
        self.path = path
        self.shards = [TorchFile(shard, keys) for shard in paths]
        self.versions = {key: of_one for shard in self.shards for key, of_one in shard.versions.items()}
        self._state = {}
        for name in index.names():
            number = index.find(name)
            assert number is not None
            if name not in self.shards[number]:
                raise self.error(f"the shard {index.shards[number]!r} has no tensor {name!r}")
            self._state[name] = self.shards[number].tensor(name)
        self.metadata = metadata_of(index, self.shards)

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Read all files and compare their checksums; return whether all have some."""
        return all([shard.verify() for shard in self.shards])


def _is_whole(records: zipfile.ZipFile, record: zipfile.ZipInfo, count: Callable[[int], object]) -> bool:
    """Read a record to its end, where its checksum is compared, as ``testzip`` does with all of them."""
    try:
        with records.open(record) as raw:
            while part := raw.read(STEP):
                count(len(part))
    except zipfile.BadZipFile:
        return False
    return True


def _resolved(tensor: Tensor) -> Tensor:
    """Return a tensor that is no conjugated or negative view: torch saves these as such."""
    tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _is_version(noted: object) -> bool:
    """Whether it is what torch notes of a module, which modules compare with numbers."""
    return isinstance(noted, dict) and isinstance(noted.get("version"), int | None)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _hint(state: Any) -> str:
    """Return what an error says of the state dicts in a dict: of the outermost ones."""
    seen = {id(state)}
    level: list[tuple[tuple[str, ...], Any]] = [((), state)]
    for _ in range(_DEPTH):
        inner_ones = []
        for keys, outer in level:
            for key, inner in outer.items() if isinstance(outer, Mapping) else ():
                # A pickle may hold a dict that is in itself.
                if isinstance(key, str) and isinstance(inner, Mapping) and id(inner) not in seen:
                    seen.add(id(inner))
                    inner_ones.append(((*keys, key), inner))
        level = inner_ones
        found = [_shown(keys) for keys, inner in level if _is_state_dict(inner)]
        if found:
            listed = " or ".join(f"key={keys}" for keys in found[:_LISTED])
            return f"; to read a state dict that is in it, give {listed}{', ...' if len(found) > _LISTED else ''}"
    return ""


def _is_state_dict(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(key, str) and isinstance(one, Tensor) for key, one in found.items())


def _shown(keys: tuple[str, ...]) -> str:
    return repr(keys[0]) if len(keys) == 1 else repr(keys)


def _can_have(size: int) -> bool:
    """Whether so much memory can be mapped; nothing is written to it."""
    try:
        mmap.mmap(-1, max(size, mmap.PAGESIZE)).close()
    except (OSError, MemoryError):
        return False
    return True


def _reason(error: pickle.UnpicklingError) -> str:
    """Return what torch says is wrong, without its advice for those who trust the file, and a cure."""
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\. Please|\n|$)", str(error))
    if found and "global" in found[1].lower():
        return (
            f"{found[1]}; save a state dict, and nothing else with it. If you trust the file, allow what it needs by "
            "torch.serialization.add_safe_globals, or load it with torch.load(weights_only=False) and save its "
            "state_dict()"
        )
    return found[1] if found else str(error).partition("\n")[0] or "it cannot be unpickled"


def _what_torch_says(path: str, error: Exception) -> str:
    """Return why torch cannot read a file, in one line, and what else the file may be."""
    if "TorchScript" in str(error):
        return (
            "it is a TorchScript archive, which holds a program: load it with torch.jit.load, and save its state_dict()"
        )
    with suppress(Exception), zipfile.ZipFile(path) as records:
        names = records.namelist()
        if not any(os.path.basename(name) == "data.pkl" for name in names):
            what = " (as numpy.savez writes them)" if any(name.endswith(".npy") for name in names) else ""
            return f"it is a zip archive{what}, but none that torch.save wrote: it has no data.pkl"
    said = str(error).partition("\n")[0].partition(". This is an internal")[0]
    return f"torch.load cannot read it: {said or type(error).__name__}; it is truncated, damaged, or of another kind"
