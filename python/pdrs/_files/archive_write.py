"""Writes archives: all tensors of a module, or only what differs from a predecessor.

The bytes of each tensor are compared with those of the predecessor. So changes need not be tracked, and none is missed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import changed_rows, crc32, diff_names
from pdrs._files.archive_read import (
    CHECK,
    NAMES,
    ROWS,
    SAME,
    VERSION,
    WHOLE,
    Archive,
    sum_before,
    sum_of_text,
    sum_of_texts,
)
from pdrs._files.checkpoint_file import EXTRA_STATE
from pdrs._files.collect import Collected
from pdrs._files.safetensors_file import CODES
from pdrs._files.safetensors_write import NewTensor, refuse_dtype, write_tensors
from pdrs._rows.names_codec import bytes_in, bytes_of, claims_too_much, is_packed, without_words

__all__ = ["packed_before", "write_archive"]

_Change = tuple[str, tuple[int, ...], str, list[NewTensor]]


def write_archive(
    path: str | os.PathLike[str],
    collected: Collected,
    since: Archive | None = None,
    *,
    metadata: Mapping[str, str],
    sync: bool = True,
) -> int:
    """Write an archive, or, with ``since``, a delta; return the size of the file. See :func:`pdrs.save`."""
    sums: dict[str, str] = {}
    texts = {"format": "pt", **metadata}
    fields: dict[str, Any] = {
        "version": VERSION,
        "id": secrets.token_hex(16),
        "dictionaries": collected.dictionaries,
        "texts": sum_of_texts(texts),
        "sums": sums,
    }
    if collected.capacities:
        fields["capacities"] = collected.capacities
    tensors: list[NewTensor] = []
    if since is None:
        tensors += [_summed(tensor, sums) for tensor in collected.tensors]
    else:
        # Not the name of a link, which may be in another folder.
        fields["since"] = {"file": os.path.basename(os.path.realpath(since.path)), "id": since.id}
        fields["tensors"], claimed = {}, 0
        for tensor in collected.tensors:
            rows = collected.capacities.get(tensor.name, tensor.shape[0] if tensor.shape else 1)
            size = bytes_in((rows, *tensor.shape[1:]), tensor.dtype)
            # A reader refuses tensors that are much larger than the files.
            may_grow = not claims_too_much(claimed + size, since.chain_bytes())
            how, shape, total, made = _since(tensor, since, may_grow)
            entry = fields["tensors"][tensor.name] = [how, shape, total]
            claimed += size if how != WHOLE else 0
            tensors += [_summed(one, sums, entry if how == WHOLE else None) for one in made]

    def all_texts() -> dict[str, str]:
        text = json.dumps(fields, separators=(",", ":"))
        return {**texts, "pdrs": text, CHECK: sum_of_text(text)}

    return write_tensors(path, all_texts, tensors, sync=sync)


def packed_before(since: Archive) -> Callable[[str], Tensor | None]:
    """Return a function that gives the packed names of the dictionary at a prefix in a predecessor."""
    prefixes = set(since.prefixes())
    return lambda prefix: since.tensor(prefix + EXTRA_STATE) if prefix in prefixes else None


def _summed(tensor: NewTensor, sums: dict[str, str], entry: list[Any] | None = None) -> NewTensor:
    """Return a tensor whose checksum is in ``sums`` when it has been written, and that of its data in ``entry``."""
    refuse_dtype(tensor.name, tensor.dtype)
    sums[tensor.name] = "00000000"

    def blocks() -> Iterator[NDArray[np.uint8]]:
        total, of_data = sum_before(tensor.name, CODES[tensor.dtype], tensor.shape), 0
        for block in tensor.blocks():
            total = crc32(block, total)
            if entry is not None:
                of_data = crc32(block, of_data)
            yield block
        sums[tensor.name] = f"{total:08x}"
        if entry is not None:
            entry[2] = f"{of_data:08x}"

    return tensor._replace(blocks=blocks)


def _since(new: NewTensor, since: Archive, may_grow: bool) -> _Change:
    """Return how a delta makes a tensor, its shape, the checksum of its data, and what is written for it."""
    whole = WHOLE, new.shape, "00000000", [new]
    old = since.tensor(new.name) if new.name in since else None
    if old is None or old.dtype != new.dtype or old.dim() != len(new.shape) or old.shape[1:] != new.shape[1:]:
        return whole
    if new.name.endswith(EXTRA_STATE) and is_packed(old):
        return _names_since(new, old)
    row = prod(new.shape[1:]) * new.dtype.itemsize
    changed, total = _changed(new, bytes_of(old), row)
    if len(changed) == 0 and old.shape == new.shape:
        return SAME, new.shape, total, []
    numbers = torch.from_numpy(changed if len(changed) and changed[-1] >> 31 else changed.astype(np.int32))
    is_little = len(changed) * (row + numbers.itemsize) <= new.nbytes // 2
    if not new.shape or not row or not is_little or not may_grow:
        return whole
    values = NewTensor(
        f"{new.name}.__values__", new.dtype, (len(changed), *new.shape[1:]), lambda: _selected(new, changed, row)
    )
    return ROWS, new.shape, total, [NewTensor.of(f"{new.name}.__{ROWS}__", numbers), values]


def _changed(new: NewTensor, old: NDArray[np.uint8], row: int) -> tuple[NDArray[np.int64], str]:
    """Return the rows of a tensor that differ from the old ones, or from zero, and the checksum of all."""
    found, at, total = [], 0, 0
    for part in _row_blocks(new, row):
        total = crc32(part, total)
        before = old[at : at + len(part)]
        found.append(changed_rows(before, part[: len(before)], row) + at // row)
        added = part[len(before) :]
        if len(added):
            # A reader takes rows that are not listed for zero.
            found.append(changed_rows(np.zeros(len(added), np.uint8), added, row) + (at + len(before)) // row)
        at += len(part)
    return (np.concatenate(found) if found else np.empty(0, np.int64)), f"{total:08x}"


def _selected(new: NewTensor, rows: NDArray[np.int64], row: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of some rows of a tensor."""
    at = 0
    for part in _row_blocks(new, row):
        stop = at + len(part) // row
        chosen = rows[np.searchsorted(rows, at) : np.searchsorted(rows, stop)] - at
        if len(chosen):
            yield part.reshape(-1, row)[chosen].reshape(-1)
        at = stop


def _row_blocks(new: NewTensor, row: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in blocks of whole rows."""
    left = np.empty(0, np.uint8)
    for block in new.blocks():
        part = np.concatenate([left, block]) if len(left) else block
        whole = len(part) - len(part) % row
        if whole:
            yield part[:whole]
        left = part[whole:]


def _names_since(new: NewTensor, old: Tensor) -> _Change:
    """Do what :func:`_since` does, for packed names. Those that a delta makes have no table of words."""
    packed = bytes_of(without_words(torch.from_numpy(np.concatenate(list(new.blocks())))))
    before = bytes_of(without_words(old))
    if len(before) == len(packed) and changed_rows(before, packed, len(packed)).size == 0:
        return SAME, tuple(old.shape), f"{crc32(bytes_of(old)):08x}", []
    delta = torch.from_numpy(diff_names(before, packed))
    if len(delta) > len(packed) // 2:
        return WHOLE, new.shape, "00000000", [new]
    return NAMES, packed.shape, f"{crc32(packed):08x}", [NewTensor.of(f"{new.name}.__{NAMES}__", delta)]
