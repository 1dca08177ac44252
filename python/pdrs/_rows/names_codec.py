"""The names of a StackedParameterDict as one tensor of bytes, as it stands in a state dict and in an archive.

The layout is described, written and checked in ``rust/core/src/names/codec.rs``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import IndexMap, Places, RowIndex, pack_names, unpack_names

__all__ = [
    "MOST_TIMES",
    "Header",
    "TableHeader",
    "bytes_in",
    "bytes_of",
    "check_header",
    "claims_too_much",
    "is_packed",
    "pack",
    "refuse_claim",
    "same_bytes",
    "unpack",
    "used_rows",
]

_MAGIC = b"pdrs\x00\x00\x00"
_VERSION = 1
_EXTRA_STATE = "_extra_state"
# What a file may claim: this many times its bytes, and this many bytes more. A row without elements counts as so many.
MOST_TIMES, _ALLOWANCE, _EMPTY_ROW = 16, 64 << 20, 1024
# Groups are as many as patterns, which take bytes; a larger number is no number of a group.
_MOST_GROUPS = 1 << 31


class TableHeader(NamedTuple):
    """What is packed of a table.

    Parameters
    ----------
    attribute
        The name under which it is registered.
    group
        The number of its group of options.
    trainable
        Whether it requires gradients.
    used
        How many rows were ever given.
    """

    attribute: str
    group: int
    trainable: bool
    used: int


@dataclass(frozen=True)
class Header:
    """What is packed beside the names.

    Parameters
    ----------
    tables
        In the order of their numbers.
    patterns
        The patterns of names that have groups of options of their own.
    """

    tables: tuple[TableHeader, ...]
    patterns: tuple[str, ...] = ()


def is_packed(value: Any) -> bool:
    """Whether a value of a state dict is a tensor of packed names."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.layout != torch.strided:
        return False
    if value.dim() != 1 or len(value) < 16:
        return False
    return value.device.type == "meta" or bytes(value[:7].tolist()) == _MAGIC


def used_rows(packed: Tensor) -> dict[str, int]:
    """Return how many rows of each table were ever used, from the result of :func:`pack`. **O(tables)**."""
    data = bytes_of(packed)
    _, _, tables, patterns, _ = data[8:48].view(np.int64).tolist()
    records = data[48 : 48 + 32 * tables].view(np.int64).reshape(tables, 4).tolist()
    at, used = 48 + 32 * tables + 8 * patterns, {}
    for size, _, _, rows in records:
        used[data[at : at + size].tobytes().decode("utf-8", "surrogatepass")] = rows
        at += size
    return used


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, uint8 ``[bytes]`` on the CPU, are equal. torch compares eight times as fast by eights."""
    whole = len(one) - len(one) % 8
    if len(one) != len(other) or one.storage_offset() % 8 or other.storage_offset() % 8:
        return torch.equal(one, other)
    words = (each[:whole].view(torch.int64) for each in (one.contiguous(), other.contiguous()))
    return torch.equal(*words) and torch.equal(one[whole:], other[whole:])


def pack(index: IndexMap | RowIndex, header: Header, places: Places | None = None) -> Tensor:
    """Return the names of an index, their places and a header: uint8 ``[bytes]``. **O(n)**.

    The places are those of a :class:`RowIndex`, or, for an IndexMap, one for each name.
    """
    return torch.from_numpy(pack_names(index, list(header.tables), list(header.patterns), places))


def unpack(packed: Tensor, prefix: str | None = None) -> tuple[IndexMap, Header]:
    """Return the names, for :meth:`RowIndex.of_ids`, and the header that were packed. **O(n)**.

    Parameters
    ----------
    packed
        uint8 ``[bytes]``.
    prefix
        Is put in front of every name of the index.

    Raises
    ------
    ValueError
        If the bytes are damaged, or of a version that is not known.
    """
    if packed.device.type == "meta":
        raise ValueError("the packed names lie on the meta device, and so have no values")
    data = bytes_of(packed)
    version = int(data[7]) if len(data) > 7 else 0
    if version > _VERSION:
        raise ValueError(
            f"the names were packed by a later version of pdrs (format version {version}, this one reads {_VERSION})"
        )
    names, tables, patterns = unpack_names(data, prefix)
    return names, Header(tuple(TableHeader(*table) for table in tables), tuple(patterns))


def check_header(header: Header) -> None:
    """Refuse what no dictionary has: ValueError."""
    attributes = [table.attribute for table in header.tables]
    for name in attributes:
        if not name.isidentifier() or name == _EXTRA_STATE:
            raise ValueError(f"the packed names are damaged: a table cannot be called {name!r}")
    if len(set(attributes)) < len(attributes):
        raise ValueError("the packed names are damaged: they name a table twice")
    if any(table.group > _MOST_GROUPS for table in header.tables):
        raise ValueError("the packed names are damaged: a table is in a group that cannot be")
    for pattern in header.patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, RuntimeError, ValueError) as error:
            raise ValueError(f"the packed names are damaged: {pattern!r} is no regular expression: {error}") from error


def claims_too_much(claimed: int, present: int) -> bool:
    """Whether tensors take so much more memory than their bytes in a file that it is most likely an attack.

    A tensor may repeat its bytes, or have zeros that are not in the file. Then a short file may claim any memory.
    """
    return claimed > MOST_TIMES * present + _ALLOWANCE


def bytes_in(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return prod(shape) * dtype.itemsize


def refuse_claim(attribute: str, table: Tensor, names: int) -> None:
    """Refuse a table that claims too much memory, or is not dense: ValueError. Its dictionary has so many ``names``."""
    if type(table) not in (Tensor, Parameter) or table.is_meta:
        return
    if table.layout != torch.strided:
        raise ValueError(f"the table '{attribute}' is of layout {table.layout}, and not dense")
    # A row takes memory for its number, too.
    of_rows = 0 if table[:1].numel() else len(table) * _EMPTY_ROW
    if claims_too_much(table.nbytes + of_rows, table.untyped_storage().nbytes() + names * _EMPTY_ROW):
        raise ValueError(
            f"the table '{attribute}' of the shape {list(table.shape)} would take much more memory than its "
            f"{table.untyped_storage().nbytes()} bytes and {names} names: call contiguous() on its Parameter, or "
            "compact() on the dictionary, before it is saved"
        )


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor in C order. Contiguous memory on the CPU is not copied."""
    if tensor.numel() == 0:
        # One that came from numpy may have strides of which torch makes no view of another dtype.
        return np.empty(0, np.uint8)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array
