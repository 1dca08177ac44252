"""Many tensors into the rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import group_tensors, zero_rows
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes

__all__ = [
    "by_bits",
    "copy_in_pieces",
    "note_rows",
    "note_zeros",
    "rows_in",
    "scatter",
    "share_memory",
    "stack",
    "write_rows",
]

# How many tensors are gathered at a time: what was gathered is still in the cache when it is copied on.
_CHUNK = 1 << 13

# How many elements are copied at a time.
_PIECE = 1 << 15

# Integers of each size, and the dtypes that torch cannot index in place, which take their places then.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_INDEXED = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")} | {
    torch.uint16,
    torch.uint32,
    torch.uint64,
}


def stack(values: list[Tensor], like: Tensor) -> Tensor:
    """Return tensors of one shape, dtype and device as one block ``[len(values), *shape]``, on the device of ``like``.

    Does what ``torch.stack`` does, several times faster where there are many small tensors on the CPU.
    """
    shape = like.shape[1:]
    if len(values) == 1:
        return values[0].detach()[None]
    if values[0].device.type != "cpu" or shape.numel() == 0:
        return torch.stack([value.detach() for value in values])
    block = huge_pages.empty((len(values), *shape), dtype=like.dtype)
    for start in range(0, len(values), _CHUNK):
        _gather(values[start : start + _CHUNK], block[start : start + _CHUNK])
    return block


def _gather(values: list[Tensor], out: Tensor) -> None:
    # In C order, as rows of the table have it, whatever the order of a tensor in memory is.
    groups, unusual = group_tensors(values, keep_strides=False)
    if unusual or len(groups) != 1 or groups[0].dtype != out.dtype:
        torch.stack([value.detach() for value in values], out=out)
        return
    slab = torch.empty(groups[0].length, dtype=out.dtype, device="cpu")
    groups[0].gather(slab)
    copy_in_pieces(out.view(len(values), -1), rows_in(slab, groups[0].offsets, out.shape[1:].numel()))


def rows_in(slab: Tensor, offsets: NDArray[np.int64], numel: int) -> Tensor:
    """Return the tensors of ``numel`` elements that begin at some offsets of a slab, ``[len(offsets), numel]``."""
    step = int(offsets[1] - offsets[0]) if len(offsets) > 1 else numel
    if step > 0 and (np.diff(offsets) == step).all():
        return slab.as_strided((len(offsets), numel), (step, 1), int(offsets[0]))
    # A tensor that is listed twice has one place.
    return slab[torch.from_numpy(offsets)[:, None] + torch.arange(numel, device="cpu")]


def copy_in_pieces(target: Tensor, source: Tensor) -> None:
    """Copy ``[n, numel]`` a few rows at a time: so few that torch does not wake its threads, which costs more."""
    rows = max(1, _PIECE // max(1, target.shape[1]))
    for start in range(0, len(target), rows):
        target[start : start + rows].copy_(source[start : start + rows])


@torch.no_grad()
def write_rows(table: Tensor, rows: NDArray[np.int64], values: Tensor) -> None:
    """Copy ``values``, ``[len(rows), *shape]``, into rows of a table."""
    write, arguments = _write_of(table, rows, values)
    write(*arguments)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two plain tensors are views of one block of memory."""
    if not {type(one), type(other)} <= {Tensor, Parameter} or one.device != other.device or one.is_meta:
        return False
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except RuntimeError:  # torch's, of what has no memory: zeros of autograd's, and the tensors of its transforms
        return False


@torch.no_grad()
def note_rows(changes: Changes, table: Tensor, rows: NDArray[np.int64], values: Tensor) -> None:
    """Note what :func:`write_rows` does."""
    write, arguments = _write_of(table, rows, values)
    changes.call(write, *arguments)


def note_zeros(changes: Changes, tensor: Tensor, rows: NDArray[np.int64]) -> None:
    """Note that rows of a tensor become zero, in place."""
    if len(rows) == 0 or tensor.is_meta:
        return
    tensor = tensor.detach()
    if zero_rows(tensor, rows[:0]):
        changes.call(zero_rows, tensor, rows)
    else:
        changes.call(by_bits(tensor).index_fill_, 0, torch.from_numpy(rows).to(tensor.device), 0)


def by_bits(tensor: Tensor) -> Tensor:
    """Return a view of a tensor, with the same bits, that ``index_copy_`` takes: not every dtype has one."""
    return tensor.view(_INTEGERS[tensor.itemsize]) if tensor.dtype in _NOT_INDEXED else tensor


def _write_of(table: Tensor, rows: NDArray[np.int64], values: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    # What is noted must not fail when it is made.
    if table.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor: a table that was made in inference mode can be written to in "
            "inference mode only; clone it"
        )
    first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
    if last - first == len(rows) - 1 and (np.diff(rows) == 1).all():
        return table[first : last + 1].copy_, (values,)
    places = torch.from_numpy(rows).to(table.device)
    return by_bits(table).index_copy_, (0, places, by_bits(values.to(table.device, table.dtype)))


@torch.no_grad()
def scatter(table: Tensor, rows: NDArray[np.int64], values: list[Tensor]) -> list[tuple[int, Exception]]:
    """Copy rows of a table into tensors of the shape of a row; dtypes are converted as ``tensor.copy_`` does.

    Returns the places of the tensors that torch refuses to write to, and what it raises. The others are written.
    """
    numel = table.shape[1:].numel()
    refused: list[tuple[int, Exception]] = []
    for start in range(0, len(values), _CHUNK):
        chunk, of_chunk = values[start : start + _CHUNK], rows[start : start + _CHUNK]
        groups, unusual = group_tensors(chunk, keep_strides=False)
        left = [index for index, _ in unusual]
        for group in groups:
            offsets = group.offsets
            if group.device.type != "cpu" or numel == 0 or group.overlapping or len(set(offsets.tolist())) < len(group):
                left += group.indices.tolist()
                continue
            chosen = of_chunk[group.indices]
            if (np.diff(chosen) == 1).all():
                block = table[int(chosen[0]) : int(chosen[-1]) + 1]
            else:
                block = table[torch.from_numpy(chosen)]
            step = int(offsets[1] - offsets[0]) if len(offsets) > 1 else numel
            if step == numel and block.dtype == group.dtype:
                slab = block.reshape(-1)
            else:
                slab = torch.empty(max(group.length, len(offsets) * step), dtype=group.dtype, device="cpu")
                copy_in_pieces(slab.as_strided((len(offsets), numel), (step, 1)), block.reshape(-1, numel))
            try:
                group.scatter(slab[: group.length])
            except ValueError:  # One of them cannot be written to, and none was. torch says which, and why.
                left += group.indices.tolist()
        for index in sorted(left):
            try:
                chunk[index].copy_(table[int(of_chunk[index])])
            except Exception as error:
                refused.append((start + index, error))
    return refused
