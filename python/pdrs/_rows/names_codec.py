"""The names of a StackedParameterDict as one tensor of bytes, as it stands in a state dict and in an archive.

The layout is described, written and checked in ``rust/core/src/names/codec.rs``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import IndexMap, has_packed, pack_names, unpack_names

__all__ = [
    "Header",
    "Slab",
    "TableHeader",
    "bytes_of",
    "check_header",
    "is_packed",
    "is_packed_from",
    "pack",
    "refuse_unpaid",
    "same_bytes",
    "table_in_slab",
    "unpack",
    "used_rows",
]

_MAGIC = b"pdrs\x00\x00\x00"
_VERSION = 1
_EXTRA_STATE = "_extra_state"
# Rows without elements take no bytes of a file: a table may have so many, and so many more for each name.
_EMPTY_ROWS, _EMPTY_ROWS_PER_NAME = 1 << 16, 64
# A table may be a view that repeats its memory, if it is small.
_UNPAID_BYTES = 64 << 20
# Groups are as many as patterns, which take bytes; a larger number is no number of a group.
_MOST_GROUPS = 1 << 31


class Slab(NamedTuple):
    """Where the rows of a table lie that has no tensor of its own.

    Parameters
    ----------
    tensor
        The name of a one-dimensional tensor, behind the prefix of the dictionary.
    offset
        The element at which the first row begins.
    shape
        The shape of a row.
    """

    tensor: str
    offset: int
    shape: list[int]


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
    slab
        Where its rows lie, if it has no tensor of its own.
    """

    attribute: str
    group: int
    trainable: bool
    used: int
    slab: Slab | None = None


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
    """Return how many rows were ever given of each table that has a tensor of its own. **O(tables)**.

    The bytes are those of :func:`pack`.
    """
    data = bytes_of(packed)
    _, _, tables, patterns, dims, _ = data[8:56].view(np.int64).tolist()
    records = data[56 : 56 + 56 * tables].view(np.int64).reshape(tables, 7).tolist()
    at, used = 56 + 56 * tables + 8 * (patterns + dims), {}
    for attribute, _, _, rows, slab, _, _ in records:
        if not slab:
            used[data[at : at + attribute].tobytes().decode("utf-8", "surrogatepass")] = rows
        at += attribute + slab
    return used


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, uint8 ``[bytes]`` on the CPU, are equal. torch compares eight times as fast by eights."""
    whole = len(one) - len(one) % 8
    if len(one) != len(other) or one.storage_offset() % 8 or other.storage_offset() % 8:
        return torch.equal(one, other)
    words = (each[:whole].view(torch.int64) for each in (one.contiguous(), other.contiguous()))
    return torch.equal(*words) and torch.equal(one[whole:], other[whole:])


def pack(index: IndexMap, header: Header, ids: NDArray[np.int64] | None = None) -> Tensor:
    """Return the names of an index, their ids and a header: uint8 ``[bytes]``. **O(n)**.

    The ids are the index's rows, or others, one for each name.
    """
    return torch.from_numpy(pack_names(index, list(header.tables), list(header.patterns), ids))


def is_packed_from(packed: Tensor, index: IndexMap, header: Header) -> bool:
    """Whether :func:`pack` would return the same; nothing is packed for it. **O(n)**."""
    return has_packed(bytes_of(packed), index, list(header.tables), list(header.patterns))


def unpack(packed: Tensor, prefix: str | None = None) -> tuple[IndexMap, NDArray[np.int64], Header]:
    """Return the index, its ids in order, and the header that were packed. **O(n)**.

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
            f"the names were packed by a later version of pdrs (layout {version}, this one reads {_VERSION})"
        )
    index, ids, tables, patterns = unpack_names(data, prefix)
    headers = (TableHeader(*table[:4], None if table[4] is None else Slab(*table[4])) for table in tables)
    return index, ids, Header(tuple(headers), tuple(patterns))


def check_header(header: Header) -> None:
    """Refuse what no dictionary has: ValueError."""
    attributes = [table.attribute for table in header.tables]
    slabs = [table.slab.tensor for table in header.tables if table.slab is not None]
    for name in (*attributes, *slabs):
        if not name.isidentifier() or name == _EXTRA_STATE:
            raise ValueError(f"the packed names are damaged: a table cannot be called {name!r}")
    if len(set(attributes)) < len(attributes) or not set(slabs).isdisjoint(attributes):
        raise ValueError("the packed names are damaged: they name a table twice")
    places = sorted(
        (table.slab.tensor, table.slab.offset, table.slab.offset + table.used * prod(table.slab.shape))
        for table in header.tables
        if table.slab is not None
    )
    for (slab, start, stop), (other, begin, end) in pairwise(place for place in places if place[1] < place[2]):
        if slab == other and begin < stop:
            raise ValueError(
                f"the packed names are damaged: two tables overlap in {slab!r}, {start} to {stop} and {begin} to {end}"
            )
    if any(table.group > _MOST_GROUPS for table in header.tables):
        raise ValueError("the packed names are damaged: a table is in a group that cannot be")
    for pattern in header.patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, RuntimeError, ValueError) as error:
            raise ValueError(f"the packed names are damaged: {pattern!r} is no regular expression: {error}") from error


def refuse_unpaid(attribute: str, table: Tensor, names: int) -> None:
    """Refuse a table that claims more memory than its bytes: ValueError. ``names`` are those of its dictionary.

    What grows with the number of rows would take as much memory as a file says, however short the file is.
    """
    if type(table) not in (Tensor, Parameter) or table.is_meta:
        return
    if table.layout != torch.strided:
        raise ValueError(f"the table '{attribute}' is of layout {table.layout}, and not dense")
    if table[:1].numel() == 0 and len(table) > _EMPTY_ROWS + _EMPTY_ROWS_PER_NAME * names:
        raise ValueError(
            f"the table '{attribute}' has {len(table)} rows without elements, for {names} names: call compact() before "
            "the dictionary is saved"
        )
    if table.nbytes > table.untyped_storage().nbytes() + _UNPAID_BYTES:
        raise ValueError(
            f"the table '{attribute}' should have {table.nbytes} bytes, and there are "
            f"{table.untyped_storage().nbytes()}: call contiguous() before it is saved"
        )


def table_in_slab(table: TableHeader, slab: Any) -> Tensor:
    """Return the rows of a table, ``[used, *shape]``, as a view of the slab in which they lie.

    Raises
    ------
    ValueError
        If the slab is not there, or too short.
    """
    assert table.slab is not None
    name, offset, shape = table.slab
    size = table.used * prod(shape)
    if not isinstance(slab, Tensor) or slab.dim() != 1:
        raise ValueError(f"the tensor '{name}', in which the table '{table.attribute}' lies, is missing")
    if offset + size > len(slab):
        raise ValueError(f"the table '{table.attribute}' ends at {offset + size}, and its slab '{name}' at {len(slab)}")
    return slab[offset : offset + size].view(table.used, *shape)


def bytes_of(packed: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, without a copy if it lies on the CPU in one piece."""
    if packed.numel() == 0:
        # One that came from numpy may have strides of which torch makes no view of another dtype.
        return np.empty(0, np.uint8)
    array: NDArray[np.uint8] = packed.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array
