"""Files that hold tensors by name, whoever wrote them: safetensors in one file or in shards, and torch's own.

What kind of file it is, its first bytes say, not its name.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import IndexMap, Places, RowIndex, ShardIndex, sort_tensors
from pdrs._files.formats import file_in, is_of_torch, what_it_is
from pdrs._files.safetensors_file import NO_FILE, STEP, CheckpointError, TensorFile, counting
from pdrs._files.shards import index_of
from pdrs._rows.names_codec import bytes_of
from pdrs._rows.write import stack
from pdrs._torch.huge_pages import empty

__all__ = ["METADATA", "VERSIONS", "Key", "ShardedFile", "StateFile", "TorchFile", "TorchShards", "open_state"]

# Where in a file of torch's the state dict is: under one key, or one key in what is under another.
Key = str | Sequence[str]

# The attribute of a state dict, an OrderedDict, in which a file of torch's has what others have in the header.
METADATA = "__metadata__"

# The attribute of a state dict in which torch itself has the versions of the modules.
VERSIONS = "_metadata"


# How deep in a file of torch's, and how many, state dicts are looked for that an error lists.
_DEPTH, _LISTED = 4, 5

# What the index of shards counts, which is another number in the next.
_COUNTS = ("total_size", "total_parameters")


# What the system says for reasons of its own, whatever is in a file.
_OF_THE_SYSTEM = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EINTR)
# The tensors of a file may share memory, and be views that repeat it: but only so often, and by so many bytes.
_SHARED, _UNPAID = 16, 256 << 20


class StateFile(Protocol):
    """Tensors by name in a file, or in several."""

    @property
    def path(self) -> str:
        """The file that was opened."""

    @property
    def metadata(self) -> dict[str, str]:
        """Texts that the file has beside the tensors."""

    @property
    def names(self) -> list[str]:
        """All names, in order."""

    def names_ending(self, ending: str) -> list[str]:
        """Return those names that end so."""

    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; KeyError if there is none of that name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; KeyError if there is none of that name."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of its own; KeyError if there is none of that name."""

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all."""

    def load(self, name: str) -> Tensor:
        """Return a tensor of its own that lies in memory; KeyError if there is none of that name."""

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return tensors as rows of tables: see :meth:`pdrs._files.safetensors_file.TensorFile.stacked`."""

    def close(self) -> None:
        """Close what is open; tensors stay valid."""


def open_state(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], key: Key | None = None
) -> TensorFile | ShardedFile | TorchFile:
    """Open a file of tensors by name, of any kind.

    Parameters
    ----------
    path
        A safetensors file; the index of a sharded one (``model.safetensors.index.json``), or the file that was cut into
        shards (``model.safetensors``, which then is not there); what ``torch.save`` wrote of a state dict; the index of
        shards that are such files; or a folder that has one of these.
    key
        Under which key a file of torch's has the state dict; several, if it is in what is under the first.

    Raises
    ------
    CheckpointError
        If the file is damaged, or of another kind, or a folder has no such file, or several.
    KeyError
        If there is nothing under ``key``.
    OSError
        If it cannot be opened.
    TypeError
        If it is no path, or ``key`` is no ``str``, nor some of them.
    ValueError
        If ``key`` is given for a file of another kind.
    """
    shown = os.fsdecode(path)
    keys = _as_keys(key)
    version = _version(shown)
    try:
        return _open(shown, keys)
    except (CheckpointError, FileNotFoundError):
        if _version(shown) == version:
            raise
    # Somebody has replaced the file or the shards meanwhile, and removed what was there.
    return open_state(shown, key)


def _as_keys(key: Key | None) -> tuple[str, ...]:
    keys = () if key is None else (key,) if isinstance(key, str) else key
    if not isinstance(keys, Sequence) or not all(isinstance(one, str) for one in keys):
        raise TypeError(f"expected key as a str or a sequence of str, got {key!r}")
    return tuple(keys)


def _open(path: str, keys: tuple[str, ...]) -> TensorFile | ShardedFile | TorchFile:
    if os.path.isdir(path):
        path = file_in(path)
    elif not os.path.exists(path) and index_of(path).exists():
        path = os.fspath(index_of(path))
    if path.endswith(".json"):
        index = _read_index(path)
        if index.shards and _is_of_torch(_path_of(path, index.shards[0])):
            return TorchShards(path, index, keys)
        _refuse_key(path, keys)
        return ShardedFile(path, index)
    if _is_of_torch(path):
        return TorchFile(path, keys)
    _refuse_key(path, keys)
    return TensorFile(path)


def _is_of_torch(path: str) -> bool:
    """Whether a file is one of torch's, or else may be one of safetensors."""
    with open(path, "rb") as file:
        beginning = file.read(512)
    what = what_it_is(beginning)
    if what is not None:
        raise CheckpointError(path, what)
    return is_of_torch(beginning)


def _refuse_key(path: str, keys: tuple[str, ...]) -> None:
    if keys:
        raise ValueError(
            f"key= is for what torch.save wrote, and {path} is of safetensors, in which prefix= chooses names"
        )


def _read_index(path: str) -> ShardIndex:
    text = Path(path).read_bytes()
    try:
        index = ShardIndex(text)
    except ValueError as error:
        what = None if text.lstrip().startswith(b"{") else what_it_is(text[:512])
        raise CheckpointError(path, f"{error}{f': {what}' if what else ''}") from None
    for shard in index.shards:
        # Whoever wrote the index must not choose files elsewhere.
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\0" in shard or "\\" in shard:
            raise CheckpointError(path, f"{shard!r} is no file in the folder of the index")
    return index


def _path_of(index: str, shard: str) -> str:
    path = os.path.join(os.path.dirname(index), shard)
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        is_file = False
    if not is_file:
        raise CheckpointError(index, f"the shard {shard!r} is not there")
    return path


def _metadata_of(path: str, index: ShardIndex, shards: Iterable[StateFile]) -> dict[str, str]:
    """Return the texts of all shards, and those of the index; where two differ, the first one counts."""
    found: dict[str, str] = {}
    for shard in shards:
        found = shard.metadata | found
    try:
        listed = json.loads(index.metadata or "{}")
    except (ValueError, RecursionError):
        listed = {}
    # Beside them, it counts what is in the shards.
    texts = listed.items() if isinstance(listed, dict) else ()
    return {key: text for key, text in texts if isinstance(text, str) and key not in _COUNTS} | found


def _version(path: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Return what tells a file, or the index of shards, from one that takes its place."""
    found = []
    for one in (path, index_of(path)):
        with suppress(OSError, ValueError):
            now = os.stat(one)
            found.append((now.st_ino, now.st_mtime_ns))
    return found


class ShardedFile:
    """Safetensors files, of whose tensors an index of the Hugging Face layout says where they are.

    Parameters
    ----------
    path
        The index.
    index
        What it says.
    """

    def __init__(self, path: str, index: ShardIndex) -> None:
        self.path = path
        self.shards: list[TensorFile] = []
        """The files, in the order of their first names in the index."""
        self._index = index
        try:
            for shard in index.shards:
                file = _path_of(path, shard)
                if _is_of_torch(file):
                    raise CheckpointError(path, f"the shard {shard!r} is of torch.save, and others are of safetensors")
                self.shards.append(TensorFile(file))
            missing = index.missing([file.header for file in self.shards])
            if missing is not None:
                number, name = missing
                raise CheckpointError(path, f"the shard {index.shards[number]!r} has no tensor {name!r}")
        except BaseException:
            self.close()
            raise
        self.metadata = _metadata_of(path, index, self.shards)

    @property
    def names(self) -> list[str]:
        """The names, in the order of the index."""
        return self._index.names()

    def names_ending(self, ending: str) -> list[str]:
        """Return those names that end so. **O(n)**."""
        return self._index.names_ending(ending)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._index.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def _shard(self, name: str) -> int:
        number = self._index.find(name)
        if number is None:
            raise KeyError(name)
        return number

    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the dtypes (as the file names them) and shapes that there are, and the number of each tensor's."""
        return self._index.kinds([file.header for file in self.shards])

    def code(self, name: str) -> str:
        """Return the dtype as the file names it; KeyError if there is no such tensor."""
        return self.shards[self._shard(name)].code(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; CheckpointError if torch has none like it."""
        return self.shards[self._shard(name)].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return self.shards[self._shard(name)].shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: see :meth:`pdrs._files.safetensors_file.TensorFile.tensor`."""
        return self.shards[self._shard(name)].tensor(name)

    def load(self, name: str) -> Tensor:
        """Return a tensor that lies in memory; KeyError if there is no such tensor."""
        return self.shards[self._shard(name)].load(name)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all, in the order of the index."""
        chosen = self.names if names is None else list(names)
        by_shard: dict[int, list[str]] = {}
        for name in chosen:
            by_shard.setdefault(self._shard(name), []).append(name)
        found: dict[str, Tensor] = {}
        for shard, of_shard in by_shard.items():
            found.update(self.shards[shard].tensors(of_shard))
        return {name: found[name] for name in chosen}

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return tensors as rows of tables: see :meth:`pdrs._files.safetensors_file.TensorFile.stacked`.

        Names are in the order of the shards. Where tensors of one kind are in several shards, they are copied.
        """
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
            # What the index does not list is not there.
            stack.add_names(index, merged, first_rows, (self._index, shard) if len(file) > count else None)
        tables = [part[0] if len(part) == 1 else _joined(part) for part in parts]
        return RowIndex.of_ids(index, list(map(len, tables))), tables

    def close(self) -> None:
        """Close the files; tensors stay valid."""
        for file in self.shards:
            file.close()

    def __enter__(self) -> ShardedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TorchFile:
    """A state dict that ``torch.save`` wrote, loaded with ``weights_only=True``: nothing in it is run.

    Parameters
    ----------
    path
        The file. Its tensors are mapped, privately, if it is of the format that torch has written since 1.6.
    keys
        What leads to the state dict, if it is in another.
    """

    def __init__(self, path: str | os.PathLike[str], keys: tuple[str, ...] = ()) -> None:
        self.path = os.fspath(path)
        with self._reading():
            try:
                state = self._load()
            except pickle.UnpicklingError as error:
                what = f"torch.load(weights_only=True) refuses it: {_reason(error)}"
                raise CheckpointError(self.path, what) from error
        found = self._under(state, keys)
        self._refuse_unpaid(found)
        self._state: dict[str, Tensor] = {name: _as_it_lies(value) for name, value in found.items()}
        texts = getattr(found, METADATA, None)
        texts = texts.items() if isinstance(texts, dict) else ()
        self.metadata = {key: text for key, text in texts if isinstance(key, str) and isinstance(text, str)}
        versions = getattr(found, VERSIONS, None)
        versions = versions.items() if isinstance(versions, dict) else ()
        self.versions = {key: of_one for key, of_one in versions if _is_version(of_one)}
        """What torch notes of each module beside a state dict, such as its version."""

    def _under(self, state: Any, keys: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Return the state dict that some keys lead to, or say why there is none, and what may be meant instead."""
        found = state
        for at, key in enumerate(keys):
            if not isinstance(found, Mapping) or key not in found:
                there = _shown(keys[: at + 1])
                raise KeyError(f"there is nothing at key={there} in {self.path}{_hint(state)}")
            found = found[key]
        where = f" at key={_shown(keys)}" if keys else ""
        if not isinstance(found, Mapping):
            raise CheckpointError(
                self.path, f"expected a state dict{where}, found {_article(type(found).__name__)}{_hint(state)}"
            )
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    self.path,
                    f"expected a state dict of tensors by name{where}, found {type(value).__name__} at {name!r}"
                    f"{_hint(state)}",
                )
        return found

    @contextmanager
    def _reading(self, what: str | None = None) -> Iterator[None]:
        """Take whatever damaged bytes make torch's readers do for damage: AssertionError, struct.error and so on.

        What the system refuses, and what a sound file would meet, too, for want of memory, goes through.
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
            raise CheckpointError(self.path, said) from error

    def _refuse_unpaid(self, state: Mapping[str, Tensor]) -> None:
        """Refuse tensors that share so much memory that copies of them would be much larger than the file."""
        claimed, most = 0, _UNPAID + _SHARED * os.path.getsize(self.path)
        for name, value in state.items():
            claimed += value.nbytes if value.layout == torch.strided and not value.is_meta else 0
            if claimed > most:
                raise CheckpointError(
                    self.path,
                    f"the tensors up to {name!r} would have {claimed} bytes, and the file has "
                    f"{os.path.getsize(self.path)}: call contiguous() before they are saved",
                )

    def _load(self) -> Any:
        if self.path.endswith(".safetensors"):
            # torch would go by the name of the file, and have it read by safetensors.
            with open(self.path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return list(self._state)

    def names_ending(self, ending: str) -> list[str]:
        """Return those names that end so. **O(n)**."""
        return [name for name in self._state if name.endswith(ending)]

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; KeyError if there is no such tensor."""
        return self._state[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return tuple(self._state[name].shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; calls for one name share their memory."""
        return self._state[name]

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all."""
        return dict(self._state) if names is None else {name: self._state[name] for name in names}

    def load(self, name: str) -> Tensor:
        """Return a copy of a tensor; KeyError if there is no such tensor."""
        return self._state[name].clone()

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return tensors as rows of tables: see :meth:`pdrs._files.safetensors_file.TensorFile.stacked`."""
        keys = [name for name in self._state if name.startswith(prefix) and (name != prefix or not prefix)]
        values: list[Any] = [self._state[name] for name in keys]
        classes, firsts = sort_tensors(values)
        odd = np.flatnonzero(classes < 0)
        if len(odd):
            raise CheckpointError(
                self.path, f"the tensor {keys[odd[0]]!r} is {type(values[odd[0]]).__name__}, not dense"
            )
        rows = np.empty(len(keys), np.int64)
        tables = []
        # Tensors that lie otherwise in memory, or are of another class, are rows of one table all the same.
        numbers: dict[tuple[torch.dtype, torch.Size], int] = {}
        kinds = np.array([numbers.setdefault((values[at].dtype, values[at].shape), len(numbers)) for at in firsts], int)
        for kind in range(len(numbers)):
            there = np.flatnonzero(kinds[classes] == kind)
            rows[there] = np.arange(len(there))
            chosen = [values[at] for at in there.tolist()]
            table = stack(chosen, chosen[0].detach()[None])
            # One alone has not been copied.
            tables.append(table.clone() if loads and len(chosen) == 1 else table)
        names = [key[len(prefix) :] for key in keys]
        if "" in names:
            raise CheckpointError(self.path, "a tensor has the empty name, which no entry can have")
        places = Places.of(kinds[classes] if len(keys) else rows, rows)
        return RowIndex.of(names, places, list(map(len, tables))), tables

    def verify(self) -> bool:
        """Read all of the file and compare its checksums, at which torch does not look; whether it has some.

        Raises
        ------
        CheckpointError
            If one differs; it names the record of the file.
        """
        with self._reading("its records cannot be read"):
            if not zipfile.is_zipfile(self.path):
                return False
            with zipfile.ZipFile(self.path) as records:
                if not any(record.CRC for record in records.infolist()):
                    return False  # see torch.serialization.set_crc32_options
                found = records.infolist()
                with counting(sum(record.file_size for record in found), self.path) as count:
                    damaged = next((record.filename for record in found if not _is_whole(records, record, count)), None)
        if damaged is not None:
            raise CheckpointError(self.path, f"the record {damaged!r} is damaged: its checksum differs")
        return True

    def close(self) -> None:
        """Do nothing: all is loaded."""

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TorchShards(TorchFile):
    """Such files, of whose tensors an index of the Hugging Face layout says where they are.

    Parameters
    ----------
    path
        The index.
    index
        What it says.
    keys
        As of each file.
    """

    def __init__(self, path: str, index: ShardIndex, keys: tuple[str, ...] = ()) -> None:
        self.path = path
        self.shards: list[TorchFile] = []
        """The files, in the order of their first names in the index."""
        for name in index.shards:
            file = _path_of(path, name)
            if not _is_of_torch(file):
                raise CheckpointError(path, f"the shard {name!r} is of safetensors, and others are of torch.save")
            self.shards.append(TorchFile(file, keys))
        self._state, self.versions = {}, {}
        for shard in self.shards:
            self.versions.update(shard.versions)
        for name in index.names():
            number = index.find(name)
            assert number is not None
            if name not in self.shards[number]:
                raise CheckpointError(path, f"the shard {index.shards[number]!r} has no tensor {name!r}")
            self._state[name] = self.shards[number].tensor(name)
        self.metadata = _metadata_of(path, index, self.shards)

    def verify(self) -> bool:
        """Read all files and compare their checksums; whether all have some."""
        return all([shard.verify() for shard in self.shards])


def _is_whole(records: zipfile.ZipFile, record: zipfile.ZipInfo, count: Callable[[int], None]) -> bool:
    """Read a record to its end, where its checksum is compared, as ``testzip`` does with all of them."""
    try:
        with records.open(record) as raw:
            while part := raw.read(STEP):
                count(len(part))
    except zipfile.BadZipFile:
        return False
    return True


def _hint(state: Any) -> str:
    """Return what an error says of the state dicts that are somewhere in what was loaded: of the outermost ones."""
    seen = {id(state)}
    level: list[tuple[tuple[str, ...], Any]] = [((), state)]
    for _ in range(_DEPTH):
        level = [
            ((*keys, key), inner)
            for keys, outer in level
            if isinstance(outer, Mapping)
            for key, inner in outer.items()
            # A pickle may hold a dict that is in itself.
            if isinstance(key, str) and isinstance(inner, Mapping) and not (id(inner) in seen or seen.add(id(inner)))  # type: ignore[func-returns-value]
        ]
        found = [_shown(keys) for keys, inner in level if _is_state_dict(inner)]
        if found:
            listed = " or ".join(f"key={keys}" for keys in found[:_LISTED])
            return f"; to read a state dict that is in it, give {listed}{', ...' if len(found) > _LISTED else ''}"
    return ""


def _is_state_dict(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(key, str) and isinstance(one, Tensor) for key, one in found.items())


def _is_version(noted: object) -> bool:
    """Whether it is what torch notes of a module, which modules compare with numbers."""
    return isinstance(noted, dict) and isinstance(noted.get("version"), int | None)


def _shown(keys: tuple[str, ...]) -> str:
    return repr(keys[0]) if len(keys) == 1 else repr(keys)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _can_have(size: int) -> bool:
    """Whether there is so much memory; nothing is written to it."""
    try:
        mmap.mmap(-1, max(size, mmap.PAGESIZE)).close()
    except (OSError, MemoryError):
        return False
    return True


def _reason(error: pickle.UnpicklingError) -> str:
    """Return what torch says is wrong, without what it says to those who trust the file, and what is to be done."""
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\. Please|\n|$)", str(error))
    if found and "global" in found[1].lower():
        return (
            f"{found[1]}; save a state dict, and nothing else with it. If you trust the file, allow what it needs by "
            "torch.serialization.add_safe_globals, or load it with torch.load(weights_only=False) and save its "
            "state_dict()"
        )
    return found[1] if found else str(error).partition("\n")[0] or "it cannot be unpickled"


def _what_torch_says(path: str, error: Exception) -> str:
    """Return why torch cannot read a file, in one line, and what else it may be."""
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
    return f"torch.load cannot read it: {said or type(error).__name__}; it is cut off, damaged, or of another kind"


def _as_it_lies(tensor: Tensor) -> Tensor:
    """Return a plain tensor whose elements stand in memory as they are: torch saves conjugated views as such."""
    tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _joined(parts: list[Tensor]) -> Tensor:
    """Return tables of one kind, one behind another."""
    joined = empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    # As bytes: torch would wake its threads for each part.
    np.concatenate([bytes_of(part) for part in parts], out=bytes_of(joined))
    return joined
