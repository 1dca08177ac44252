"""Checkpoints: a million names in a valid safetensors file, saved and opened at the speed of the disk.

docs/checkpoints.md shows how to use them. docs/archive.md describes the format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch.nn import Module

from pdrs._files.archive_read import Archive, refuse_long_chain
from pdrs._files.archive_write import packed_before, write_archive
from pdrs._files.atomic import refuse_folder
from pdrs._files.checkpoint_file import CheckpointError, texts_of
from pdrs._files.collect import collect
from pdrs._files.into_modules import with_memory
from pdrs._files.load_module import IncompatibleKeys, load_module
from pdrs._files.named_layout import MAX_SHARD, write_named
from pdrs._files.open_dictionary import is_loaded, open_dictionary
from pdrs._files.open_file import Key, open_file
from pdrs._files.safetensors_write import as_texts
from pdrs._files.saved_dictionary import verify_all
from pdrs._files.shards import remove_interrupted
from pdrs._rows.names_codec import refuse_claim
from pdrs._torch.gc_pause import collector_paused
from pdrs._torch.names import Names, as_list
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
    4308
    >>> pdrs.open(path)["b"].tolist()
    [0.0, 1.0, 0.0]
    >>> _ = pdrs.save(sd, path, metadata={"source": "first run"})
    >>> pdrs.open(path).metadata
    {'format': 'pt', 'source': 'first run'}

    """
    if not isinstance(obj, Module):
        raise TypeError(
            f"expected a torch.nn.Module, such as a ParameterDict, and then a path, got {type(obj).__name__}"
        )
    path = os.fsdecode(path)
    refuse_folder(path)
    own = obj.metadata if isinstance(obj, StackedParameterDict) else {}
    texts = as_texts(own if metadata is None else metadata)
    if layout == "named":
        if since is not None:
            raise ValueError("expected layout 'archive' with since, got 'named'")
        if not isinstance(max_shard_size, int) or max_shard_size < 1:
            raise ValueError(f"expected max_shard_size in bytes, got {max_shard_size!r}")
        return sum(write_named(path, obj, texts, max_shard_size=max_shard_size, sync=sync).values())
    if layout != "archive":
        raise ValueError(f"expected layout 'archive' or 'named', got {layout!r}")
    remove_interrupted(Path(path))
    for module in obj.modules():
        if isinstance(module, StackedParameterDict):
            for attribute, table in module.tables().items():
                refuse_claim(attribute, table.detach(), len(module))
    if since is None:
        return write_archive(path, collect(obj), metadata=texts, sync=sync)
    since = os.fsdecode(since)
    with open_file(since) as before:
        if not isinstance(before, Archive):
            raise ValueError(f"{since} was not written by pdrs.save, and cannot be continued")
        real, *chain = (os.path.realpath(one) for one in (path, *before.files()))
        if os.path.dirname(real) != os.path.dirname(chain[0]):
            raise ValueError(
                f"expected since in the folder of the new file, {os.path.dirname(real)}, got one in "
                f"{os.path.dirname(chain[0])}"
            )
        if real in chain:
            raise ValueError(f"{path} is needed to read {since}, and cannot be replaced by it")
        refuse_long_chain(before)
        if metadata is None and not texts:
            texts = texts_of(before.metadata)
        return write_archive(path, collect(obj, packed_before(before)), before, metadata=texts, sync=sync)


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
    """Open a checkpoint as a StackedParameterDict whose tables are memory maps of the file. **O(1)** for an archive.

    Names of an archive are found in the file, also those of a whole module. They are read into memory by the first
    change of the names, and by calls that need all of them, such as ``state_dict`` or ``copy``: **O(n)**, once.

    Opening costs **O(n)** for files of other tools, which have no table of names. It also does for a file with
    ``since`` whose names have changed, and for a dictionary that has entries and lies in another one that has some.

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
        Take only these names, in this order. Their rows are read. **O(m)** for ``m`` names where opening is **O(1)**.
    prefix
        Take only names that begin with this text and are longer, and remove the text from them. ``"weights."`` opens
        the dictionary ``weights`` of a module. ``"weights.a."`` reads the rows of it whose names begin with ``"a."``,
        and all names of the dictionary to find these, unless ``names`` is given.
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
        If the file is damaged or is no checkpoint, or if a folder has none or several. Damage of names may be found
        later, when they are read; ``verify`` finds it at once.
    KeyError
        If one of ``names`` or ``key`` is missing, or if no name is longer than ``prefix`` and begins with it.
    OSError
        If the file cannot be opened.
    TypeError
        If ``dtype`` is neither floating point nor complex.
    ValueError
        If ``key`` is given for a safetensors file, or if one of ``names`` is listed twice.

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
    with open_file(path, key) as checkpoint:
        if verify:
            verify_all(checkpoint, lambda name: loads and name.startswith(prefix))
        with collector_paused():
            sd = open_dictionary(checkpoint, prefix, None if names is None else as_list(names), device, dtype)
            sd.metadata = texts_of(checkpoint.metadata)
            return sd


def load(
    path: _Path,
    module: Module,
    strict: bool = True,
    *,
    device: torch.device | str | int | None = None,
    key: Key | None = None,
    verify: bool = False,
) -> IncompatibleKeys:
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
    with open_file(path, key) as checkpoint:
        if verify:
            verify_all(checkpoint)
        with with_memory(module, device) as missing:
            result = load_module(module, checkpoint, strict)
            missing += getattr(result, "missing_keys", [])  # whose own method may return nothing
            return result


def verify(path: _Path, *, key: Key | None = None) -> None:
    """Read all data of a checkpoint, and of the archives that it needs, and compare the checksums. **O(bytes)**.

    Raises
    ------
    CheckpointError
        If the file is damaged. The message says where.
    OSError
        If the file cannot be opened.
    """
    with open_file(path, key) as checkpoint:
        verify_all(checkpoint)
