"""Opens a checkpoint as a StackedParameterDict, whose tables are maps of the file if possible."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import Places, RowIndex, group_tensors
from pdrs._files.archive_read import Archive
from pdrs._files.checkpoint_file import CheckpointError, CheckpointFile
from pdrs._files.saved_dictionary import PackedDictionary, PlainTensors, SavedDictionary
from pdrs._moves.staging import upload
from pdrs._rows.names_codec import Header, TableHeader, add_words, pack
from pdrs._rows.store import add_table
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.huge_pages import empty
from pdrs.stacked import StackedParameterDict

__all__ = ["continues", "is_loaded", "open_dictionary"]

# How many missing names an error lists.
_LISTED = 5


def open_dictionary(
    checkpoint: CheckpointFile,
    prefix: str,
    names: list[str] | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> StackedParameterDict:
    """Return a StackedParameterDict of everything below a prefix; see :func:`pdrs.open`."""
    prefixes = checkpoint.prefixes()
    below = {
        one: PackedDictionary(checkpoint, one, one.removeprefix(prefix), loads=device is not None)
        for one in prefixes
        if one.startswith(prefix)
    }
    around = {one: PackedDictionary(checkpoint, one) for one in prefixes if prefix.startswith(one) and one not in below}
    parts: list[SavedDictionary]
    within = False
    if not below and not around and not continues(checkpoint):
        parts = [PlainTensors.stacked(checkpoint, prefix, loads=names is None and is_loaded(device, dtype))]
        is_there = len(parts[0].index) > 0
    else:
        members = {name: saved for saved in (below | around).values() for name in saved.members()}
        # The prefix may end within the names of a dictionary.
        narrowed = [saved for one, saved in around.items() if saved.narrow(prefix.removeprefix(one), names)]
        chosen, within = [*below.values(), *narrowed], bool(narrowed)
        parts = list(_in_order(checkpoint, prefix, members, chosen))
        is_there = bool(parts)
    if prefix and not is_there:
        raise KeyError(
            f"no name in the checkpoint is longer than {prefix!r} and begins with it; "
            f"names=[{prefix!r}] opens one entry"
        )
    index = _index_of_all(checkpoint, parts)
    if names is None and within:
        names = index.names()
    sd = StackedParameterDict()
    if len(parts) == 1:
        sd.__dict__["_patterns"] = parts[0].header.patterns
    places = None if names is None else _chosen(index, names)
    of_tables = {} if places is None else {number: (there, rows) for number, there, rows in places.by_table()}
    numbered = [(part, number) for part in parts for number in range(len(part.header.tables))]
    for at, (part, number) in enumerate(numbered):
        if places is not None and at not in of_tables:
            continue
        header = part.header.tables[number]
        rows = part.table(number, loads=places is None and is_loaded(device, dtype))
        if places is not None:
            rows = rows[torch.from_numpy(of_tables[at][1])]
        data = _moved(rows, device, dtype)
        trainable = header.trainable and (data.is_floating_point() or data.is_complex())
        group = header.group if len(parts) == 1 else 0
        add_table(sd, header.attribute, Parameter(data, requires_grad=trainable), group)
    if names is not None:
        index = _index_of(names, [there for _, (there, _) in sorted(of_tables.items())])
    sd.__dict__["_index"] = index
    return sd


def continues(checkpoint: CheckpointFile) -> bool:
    """Whether a checkpoint is a delta."""
    return isinstance(checkpoint, Archive) and checkpoint.previous is not None


def is_loaded(device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether tables are read into memory. By default they are mapped, also to be converted or sent to a device."""
    return device is not None and device.type == "cpu" and dtype is None


def _in_order(
    checkpoint: CheckpointFile, prefix: str, members: dict[str, PackedDictionary], chosen: list[PackedDictionary]
) -> Iterator[SavedDictionary]:
    """Yield dictionaries and the tensors between them, in the order of their names."""
    seen = set()
    for saved, names in groupby(checkpoint.names, members.get):
        if saved is None:
            single = [name for name in names if name.startswith(prefix) and len(name) > len(prefix)]
            if single:
                yield PlainTensors.single(checkpoint, single, prefix)
        elif saved in chosen and saved not in seen:
            seen.add(saved)
            yield saved


def _index_of_all(checkpoint: CheckpointFile, parts: list[SavedDictionary]) -> RowIndex:
    """Return the names of all parts, whose tables are numbered one part after another."""
    if len(parts) > 1 or (isinstance(parts[0], PackedDictionary) and parts[0].shown):
        index = _searched(parts)
        if index is not None:
            return index
    return parts[0].index if len(parts) == 1 else _joined(checkpoint, parts)


def _searched(parts: list[SavedDictionary]) -> RowIndex | None:
    """Return an index that looks the names of all parts up in the file; None if that cannot be. **O(tensors)**."""
    dictionaries: list[tuple[RowIndex, str, int, int]] = []
    names: list[str] = []
    numbers: list[int] = []
    used: list[int] = []
    before = 0
    for part in parts:
        if not isinstance(part, PackedDictionary):
            names += part.index.names()
            numbers += range(len(used), len(used) + len(part.header.tables))
            before += len(part.header.tables)
        elif part.searched is None:
            return None
        elif len(part.searched):
            dictionaries.append((part.searched, part.shown, len(used), before))
            before = 0
        used += [table.used for table in part.header.tables]
    singles = _packed(names, numbers, used)
    return None if singles is None else RowIndex.joined(dictionaries, singles)


def _packed(names: list[str], numbers: list[int], used: list[int]) -> RowIndex | None:
    """Return an index of tensors, each of which is the only row of a table, as if they had been packed."""
    header = Header(tuple(TableHeader("", 0, False, rows) for rows in used))
    places = Places.of(np.array(numbers, np.int64), np.zeros(len(numbers), np.int64))
    packed = np.concatenate(add_words(pack(names, header, places)))
    return RowIndex.of_packed(packed, CheckpointError, "", "")


def _joined(checkpoint: CheckpointFile, parts: list[SavedDictionary]) -> RowIndex:
    """Return the names of all parts, whose tables are numbered one part after another."""
    names: list[str] = []
    used: list[int] = []
    numbers, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        places = part.index.places()
        names += part.index.names()
        numbers.append(places.tables + len(used))
        rows.append(places.rows)
        used += [table.used for table in part.header.tables]
    try:
        return RowIndex.of(names, Places.of(np.concatenate(numbers), np.concatenate(rows)), used)
    except ValueError as error:
        raise checkpoint.error(f"{error}: as that of a tensor, or in two dictionaries") from error


def _chosen(index: RowIndex, names: list[str]) -> Places:
    """Return the places of some names; MissingEntryError if one is missing."""
    places = index.places(names)
    missing = places.missing()
    if len(missing):
        listed = ", ".join(repr(names[at]) for at in missing[:_LISTED].tolist())
        more = ", ..." if len(missing) > _LISTED else ""
        raise MissingEntryError(f"{len(missing)} of {len(names)} names are not in the checkpoint: {listed}{more}")
    return places


def _index_of(names: list[str], tables: list[NDArray[np.int64]]) -> RowIndex:
    """Return an index of names, given the positions of those in each table."""
    numbers, rows = np.empty(len(names), np.int64), np.empty(len(names), np.int64)
    for number, there in enumerate(tables):
        numbers[there], rows[there] = number, np.arange(len(there))
    try:
        return RowIndex.of(names, Places.of(numbers, rows), list(map(len, tables)))
    except ValueError as error:
        raise ValueError(f"expected each name once: {error}") from error


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of another device and dtype."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if device is None or device.type == "cpu":
        return tensor if tensor.dtype == wanted else empty(tensor.shape, dtype=wanted).copy_(tensor)
    if device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device, wanted)
    # What is read from the file goes through page-locked memory, a block at a time.
    groups, unusual = group_tensors([tensor], keep_strides=False)
    if unusual:
        return tensor.to(device, wanted)
    slab = torch.empty(groups[0].length, dtype=wanted, device=device)
    upload(groups[0], slab, wait=True)
    return slab[: tensor.numel()].view(tensor.shape)
