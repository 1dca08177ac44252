"""Checkpoints: a million names in a valid safetensors file, saved and opened at the speed of the disk.

docs/checkpoints.md shows how to use them. docs/archive.md describes the format.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys

from pdrs._core import RowIndex
from pdrs._entries.checkpointing import NamedSource, changes_what_is_loaded, giving, prefixes_where
from pdrs._files.archive import Archive, packed_before, refuse_long_chain, same_file, write_archive
from pdrs._files.atomic import refuse_folder
from pdrs._files.collect import EXTRA_STATE, collect
from pdrs._files.into_modules import add_tied, with_memory
from pdrs._files.named_layout import MAX_SHARD, write_named
from pdrs._files.open import (
    Checkpoint,
    NamedTensors,
    SavedDictionary,
    continues,
    is_loaded,
    load_named,
    open_dictionary,
)
from pdrs._files.safetensors_file import CheckpointError, TensorFile, as_texts, texts_of
from pdrs._files.shards import remove_interrupted
from pdrs._files.state_file import VERSIONS, Key, StateFile, TorchFile, open_state
from pdrs._rows.names_codec import is_packed, refuse_unpaid
from pdrs._torch.gc_pause import collector_paused
from pdrs._torch.names import Names
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict

__all__ = ["CheckpointError", "load", "open", "save", "verify"]

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def save(
    obj: Module,
    path: _Path,
    *,
    layout: Literal["archive", "named"] = "archive",
    since: _Path | None = None,
    max_shard_size: int = MAX_SHARD,
    metadata: Mapping[str, str] | None = None,
    sync: bool = True,
) -> int:
    """Save a dictionary, or any module that contains dictionaries, as one safetensors file. Atomic. **O(n)**.

    There is one tensor for each table and one for all names. A :class:`pdrs.ParameterDict` is saved as its ``stack()``
    would be, but no such copy is made. Other tensors of a module are saved under their names in the state dict.

    Parameters
    ----------
    obj
        A module. Its state dict must contain dense tensors only.
    path
        The file. An existing file is replaced when the new one is complete. It stays as it is if anything fails or the
        process dies.
    layout
        ``"archive"``, or ``"named"``: one tensor for each name, for other tools. The named layout is slower and
        larger. It is split into shards with an index, as Hugging Face tools read them, if one file would be too large.
    since
        An archive in the same folder. Only changes are written: rows whose bytes differ, and names that came, went or
        moved. All bytes are compared, so changes need not be tracked. Opening the new file needs both files. A chain
        has at most 1000 files; saving without ``since`` ends it.
    max_shard_size
        The largest number of tensor bytes in one file of the named layout.
    metadata
        Texts by name for the header of the file, or of each shard. The default is ``sd.metadata`` of a
        StackedParameterDict that :func:`open` returned, else the metadata of ``since``. ``"format"`` is ``"pt"`` by
        default.
    sync
        Whether to wait until the file is on the disk.

    Returns
    -------
    int
        The size of the file, or of all shards, in bytes.

    Raises
    ------
    TypeError
        If the state dict contains anything except dense tensors with memory, of a dtype that safetensors has. Also if
        ``metadata`` contains anything except texts.
    ValueError
        If ``since`` is in another folder, is no archive, would be replaced by ``path``, or is the thousandth archive
        of a chain. Also if ``max_shard_size`` is not a positive number, if a key of ``metadata`` begins with
        ``"pdrs."``, or if ``metadata`` have more than 50 MB.
    CheckpointError
        If ``since`` is damaged.
    OSError
        If the file cannot be written.

    Notes
    -----
    Saving needs memory for the packed names, and 64 MB for blocks of data. Other threads may use and change a
    StackedParameterDict meanwhile. Names and rows in the file fit together. Values are those at the time when their
    block is written.

    Examples
    --------
    >>> import os, tempfile, torch, pdrs
    >>> path = os.path.join(tempfile.mkdtemp(), "words.safetensors")
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
    >>> pdrs.save(sd, path)
    4247
    >>> pdrs.open(path)["b"].tolist()
    [0.0, 1.0, 0.0]
    >>> _ = pdrs.save(sd, path, metadata={"source": "first run"})
    >>> pdrs.open(path).metadata
    {'format': 'pt', 'source': 'first run'}

    """
    path = os.fsdecode(path)
    refuse_folder(path)
    texts = _texts(obj, metadata)
    if layout == "named":
        if since is not None:
            raise ValueError("expected layout 'archive' with since, got 'named'")
        if not isinstance(max_shard_size, int) or max_shard_size < 1:
            raise ValueError(f"expected max_shard_size in bytes, got {max_shard_size!r}")
        return sum(write_named(path, obj, metadata=texts, max_shard_size=max_shard_size, sync=sync).values())
    if layout != "archive":
        raise ValueError(f"expected layout 'archive' or 'named', got {layout!r}")
    remove_interrupted(Path(path))
    for module in obj.modules() if isinstance(obj, Module) else ():
        if isinstance(module, StackedParameterDict):
            for attribute, table in module.tables().items():
                refuse_unpaid(attribute, table.detach(), len(module))
    if since is None:
        return write_archive(path, collect(obj), metadata=texts, sync=sync)
    since = os.fsdecode(since)
    with _read(since) as before:
        if not isinstance(before, Archive) or before.id is None:
            raise ValueError(f"{since} was not written by pdrs.save, and cannot be continued")
        since = before.file.path  # it may be in the folder that was given
        here, there = (os.path.dirname(os.path.realpath(one)) for one in (path, since))
        if here != there:
            raise ValueError(f"expected since in the folder of the new file, {here}, got one in {there}")
        if same_file(path, before.files()):
            raise ValueError(f"{path} is needed to read {since}, and cannot be replaced by it")
        if metadata is None and not texts:
            texts = texts_of(before.file.metadata)
        refuse_long_chain(before)
        return write_archive(path, collect(obj, packed_before(before)), before, metadata=texts, sync=sync)


def _texts(obj: Module, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the texts that are to be saved with a module: what is given, or those of the file that it comes from."""
    if metadata is not None:
        return as_texts(metadata)
    own = obj.metadata if isinstance(obj, StackedParameterDict) else None
    return as_texts(own) if own else {}


def open(  # noqa: A001  # read as pdrs.open
    path: _Path,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    names: Names | None = None,
    prefix: str = "",
    key: Key | None = None,
    verify: bool = False,
) -> StackedParameterDict:
    """Open a checkpoint as a StackedParameterDict whose tables are memory maps of the file. **O(n)** in the names.

    Parameters
    ----------
    path
        An archive, another safetensors file, or a state dict that ``torch.save`` wrote. Also the index of one of these
        in shards, or a folder with one of them, as Hugging Face tools write it.
    device
        Where the tables will be. By default they are copy-on-write maps of the file: data are read when they are used,
        writes stay in memory, and the file never changes. ``"cpu"`` reads all tables into memory. A CUDA device reads
        through page-locked blocks.
    dtype
        The dtype of floating point tables. The default is that of the file.
    names
        Take only these names, in this order. Their rows are read.
    prefix
        Take only names that begin with this text and are longer, and remove the text from them. ``"weights."`` opens
        the dictionary ``weights`` of a module. ``"weights.a."`` reads the rows of it whose names begin with ``"a."``.
        Without a prefix, each name of the state dict is an entry.
    key
        Where the state dict is, if ``torch.save`` wrote it inside a dict, such as ``"state_dict"`` or ``"model"``. For
        a dict in a dict, ``("ema", "model")``.
    verify
        Whether to read everything first and compare checksums.

    Returns
    -------
    StackedParameterDict
        Its attribute ``metadata`` has the texts in the header of the file. :func:`save` writes them again.

    Raises
    ------
    CheckpointError
        If the file is damaged or is no checkpoint, or if a folder has none or several.
    KeyError
        If one of ``names`` or ``key`` is missing, or if no name begins with ``prefix``.
    OSError
        If the file cannot be opened.
    TypeError
        If ``dtype`` is neither floating point nor complex.
    ValueError
        If ``key`` is given for a safetensors file.

    Notes
    -----
    The file may be replaced, such as by ``pdrs.save``, or removed meanwhile: the opened values stay. Do not write to
    it. Truncating it kills its readers with SIGBUS, as for any memory map.

    Examples
    --------
    >>> import os, tempfile, torch, pdrs
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> weights = pdrs.ParameterDict({"a.x": torch.zeros(2), "b": torch.ones(2)})
    >>> model = torch.nn.ModuleDict({"weights": weights, "head": torch.nn.Linear(2, 1)})
    >>> _ = pdrs.save(model, path)
    >>> list(pdrs.open(path))
    ['weights.a.x', 'weights.b', 'head.weight', 'head.bias']
    >>> pdrs.open(path, prefix="weights.")["b"].tolist()
    [1.0, 1.0]

    """
    device = None if device is None else torch.device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"expected a dtype of floating point, or a complex one, got {dtype!r}")
    loads = names is None and is_loaded(device, dtype)
    with _read(path, key) as checkpoint:
        if verify:
            checkpoint.verify(keeps=lambda name: loads and name.startswith(prefix))
        with collector_paused():
            sd = open_dictionary(checkpoint, prefix, names, device, dtype)
            sd.metadata = texts_of(checkpoint.file.metadata)
            return sd


def load(
    path: _Path,
    module: Module,
    strict: bool = True,
    *,
    device: torch.device | str | int | None = None,
    key: Key | None = None,
    verify: bool = False,
) -> Any:
    """Fill a module with the values of a checkpoint, as ``load_state_dict`` does. **O(n)**.

    Parameters
    ----------
    path
        What :func:`open` takes.
    module
        A torch.nn.Module. Its dictionaries may have another class than the saved ones. An empty dictionary takes the
        names of the file. Parameters and buffers on the meta device are replaced by new ones with memory. Their
        attributes and ties stay. Make optimizers afterwards.
    strict
        Whether missing and unexpected names are errors. If the module has a parameter under several names, the file
        needs only one of them.
    device
        Where tensors on the meta device get memory. The default is where the rest of the module is, else the CPU.
        Tensors with memory stay where they are.
    key
        As for :func:`open`.
    verify
        Whether to read everything first and compare checksums.

    Returns
    -------
    NamedTuple
        ``missing_keys`` and ``unexpected_keys``, as from ``load_state_dict``.

    Raises
    ------
    RuntimeError
        If names or shapes do not fit, with torch's message.
    CheckpointError
        If the file is damaged or is no checkpoint, or if a folder has none or several.
    KeyError
        If ``key`` is missing.
    OSError
        If the file cannot be opened.
    TypeError
        If ``module`` is not a module, such as a dict.
    ValueError
        If ``device`` is the meta device, or if ``key`` is given for a safetensors file.

    Warns
    -----
    UserWarning
        If parameters or buffers stay on the meta device although their names are not missing. The file has no values
        for them.

    Examples
    --------
    >>> import os, tempfile, torch, pdrs
    >>> path = os.path.join(tempfile.mkdtemp(), "words.safetensors")
    >>> _ = pdrs.save(pdrs.StackedParameterDict({"a": torch.ones(2)}), path)
    >>> pd = pdrs.ParameterDict({"a": torch.zeros(2)})
    >>> pdrs.load(path, pd)
    <All keys matched successfully>
    >>> pd["a"].tolist()
    [1.0, 1.0]

    """
    if not isinstance(module, Module):
        raise TypeError(f"expected a torch.nn.Module to fill, such as a ParameterDict, got {type(module).__name__}")
    device = None if device is None else torch.device(device)
    if device is not None and device.type == "meta":
        raise ValueError("expected a device with memory for what is loaded, got the meta device")
    with _read(path, key) as checkpoint:
        if verify:
            checkpoint.verify()
        with with_memory(module, device) as missing:
            result = _fill(module, checkpoint, strict)
            missing += getattr(result, "missing_keys", [])  # whose own method may return nothing
            return result


def _fill(module: Module, checkpoint: Archive | _States, strict: bool) -> Any:
    """Load what a checkpoint holds into a module all of which has memory."""
    is_plain = not checkpoint.prefixes() and not continues(checkpoint)
    if is_plain and isinstance(module, StackedParameterDict) and load_named(checkpoint, module):
        return _IncompatibleKeys([], [])
    state, given = _state_for(module, checkpoint)
    with giving(given):
        if given and isinstance(module, ParameterDict):
            # Its own method has a way round for state dicts that fit as they are.
            return Module.load_state_dict(module, state, strict)
        return module.load_state_dict(state, strict)


def verify(path: _Path, *, key: Key | None = None) -> None:
    """Read all data of a checkpoint, and of the archives that it needs, and compare the checksums. **O(bytes)**.

    Raises
    ------
    CheckpointError
        If the file is damaged. The message says where.
    OSError
        If the file cannot be opened.
    """
    with _read(path, key) as checkpoint:
        checkpoint.verify()
        for prefix in checkpoint.prefixes():
            saved = SavedDictionary(checkpoint, prefix)
            for table in saved.header.tables:
                saved.table(table)


def _state_for(module: Module, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, NamedSource]]:
    """Return a state dict for a module, and what its ParameterDicts load their entries from, by their prefixes."""
    modules = {name + "." if name else "": one for name, one in module.named_modules(remove_duplicate=False)}
    state: dict[str, Tensor] = OrderedDict()
    if isinstance(checkpoint, _States) and isinstance(checkpoint.file, TorchFile) and checkpoint.file.versions:
        setattr(state, VERSIONS, checkpoint.file.versions)
    given: dict[str, NamedSource] = {}
    members: set[str] = set()
    asked = prefixes_where(module, changes_what_is_loaded)
    for prefix in checkpoint.prefixes():
        saved = SavedDictionary(checkpoint, prefix)
        target = modules.get(prefix)
        members |= saved.members()
        sees_names = any(map(prefix.startswith, asked))
        if isinstance(target, ParameterDict) and not (sees_names and len(target)):
            # Its entries are filled table by table: all must be right before anything is changed.
            for table in saved.header.tables:
                saved.table(table)
            given[prefix] = saved
        elif isinstance(target, StackedParameterDict) and not _needs_names(target, saved, sees_names):
            # Names and tables must agree before anything is changed.
            state.update((prefix + table.attribute, saved.table(table)) for table in saved.header.tables)
            state[prefix + EXTRA_STATE] = checkpoint.tensor(prefix + EXTRA_STATE)
        else:
            state.update(saved.state(prefix))
    state.update(checkpoint.tensors([name for name in checkpoint.names if name not in members]))
    empty = [
        prefix
        for prefix, one in modules.items()
        if isinstance(one, ParameterDict) and not one._parameters and prefix not in given
    ]
    given.update(_taken_over(modules, [one for one in empty if not any(map(one.startswith, asked))], state))
    add_tied(state, modules, given)
    return state, given


def _taken_over(modules: dict[str, Module], empty: list[str], state: dict[str, Tensor]) -> dict[str, NamedTensors]:
    """Take from a state dict what empty ParameterDicts take over, given and returned by their prefixes."""
    found = {prefix: NamedTensors({}) for prefix in empty}
    if not found:
        return {}
    for key in list(state):
        ends = [0, *(at + 1 for at, character in enumerate(key) if character == ".")]
        # The innermost module whose prefix it has: a name in a ParameterDict may have dots, that of a Module, too.
        prefix = next((key[:end] for end in reversed(ends) if key[:end] in modules), None)
        if prefix not in found:
            continue
        name, module = key[len(prefix) :], modules[prefix]
        if name not in module._buffers and name not in module._modules:
            found[prefix].tensors[name] = state.pop(key)
    return {prefix: one for prefix, one in found.items() if one.tensors}


def _needs_names(target: StackedParameterDict, saved: SavedDictionary, sees_names: bool) -> bool:
    """Return whether a dictionary must load a ParameterDict's entries by name, as from a state dict of one.

    Otherwise it takes the tables. The result is the same if there are no hooks, and if dtype, shape and flag of each
    name are those of the file.
    """
    if not len(target) or saved.checkpoint.dictionaries.get(saved.prefix) != "ParameterDict":
        return False
    if sees_names or len(target) != len(saved.index):
        return True
    own_places, saved_places = target._index.places(saved.index.names()), saved.index.places()
    if not own_places.is_complete():
        return True
    kinds: dict[tuple[torch.dtype, torch.Size, bool], int] = {}
    own, others = (
        np.array([kinds.setdefault((one.dtype, one.shape[1:], trainable), len(kinds)) for one, trainable in tables])
        for tables in (
            [(one, one.requires_grad) for one in target.tables().values()],
            [(saved.table(header), header.trainable) for header in saved.header.tables],
        )
    )
    return bool((own[own_places.tables] != others[saved_places.tables]).any())


# -- which kind of file ------------------------------------------------------------------------------------------------


class _States:
    """Shards, or a state dict that ``torch.save`` wrote, as a checkpoint."""

    def __init__(self, file: StateFile) -> None:
        self.file = file
        self.dictionaries: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return self.file.names

    def prefixes(self) -> list[str]:
        found = [name for name in self.file.names_ending(EXTRA_STATE) if is_packed(self.file.tensor(name))]
        return [name[: -len(EXTRA_STATE)] for name in found]

    def dtype(self, name: str) -> torch.dtype:
        return self.file.tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        return self.file.tensor(name)

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        return self.file.tensors(names)

    def load(self, name: str) -> Tensor:
        return self.file.load(name)

    def stacked(self, prefix: str, *, loads: bool) -> tuple[RowIndex, list[Tensor]]:
        return self.file.stacked(prefix, loads=loads)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(self.file.path, what)

    def verify(self, *, keeps: Callable[[str], bool] = lambda name: False) -> None:
        """Compare the checksums that torch has written, if it has; safetensors has none."""
        if isinstance(self.file, TorchFile):
            self.file.verify()

    def __enter__(self) -> _States:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _read(path: _Path, key: Key | None = None) -> Archive | _States:
    file = open_state(path, key)
    return Archive(file) if isinstance(file, TensorFile) else _States(file)
