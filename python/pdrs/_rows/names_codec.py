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

from pdrs._core import (
    IndexMap,
    Places,
    RowIndex,
    check_words,
    names_without_words,
    pack_names,
    searchable_size,
    unpack_header,
    unpack_names,
    words_behind,
)

__all__ = [
    "MOST_TIMES",
    "Header",
    "TableHeader",
    "add_words",
    "byte_view",
    "bytes_in",
    "bytes_of",
    "check_header",
    "check_search",
    "claims_too_much",
    "is_packed",
    "names_in",
    "pack",
    "refuse_claim",
    "same_bytes",
    "search",
    "size_with_words",
    "unpack",
    "used_rows",
    "without_words",
]

_MAGIC = b"pdrs\x00\x00\x00"
_VERSION = 2
_EXTRA_STATE = "_extra_state"
# The bytes of the magic number and the counts.
_START = 56
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
    _, _, tables, patterns, *_ = data[8:_START].view(np.int64).tolist()
    records = data[_START : _START + 32 * tables].view(np.int64).reshape(tables, 4).tolist()
    at, used = _START + 32 * tables + 8 * patterns, {}
    for size, _, _, rows in records:
        used[data[at : at + size].tobytes().decode("utf-8", "surrogatepass")] = rows
        at += size
    return used


def names_in(packed: Tensor) -> NDArray[np.uint8]:
    """Return the names, in order, from the result of :func:`pack`: without the header and the places. **O(1)**."""
    data = bytes_of(packed)
    _, ids, tables, patterns, labels, _ = data[8:_START].view(np.int64).tolist()
    return data[_START + 32 * tables + 8 * (patterns + ids) + (labels + 7) // 8 * 8 :]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, uint8 ``[bytes]`` on the CPU, are equal. torch compares eight times as fast by eights."""
    whole = len(one) - len(one) % 8
    if len(one) != len(other) or one.storage_offset() % 8 or other.storage_offset() % 8:
        return torch.equal(one, other)
    words = (each[:whole].view(torch.int64) for each in (one.contiguous(), other.contiguous()))
    return torch.equal(*words) and torch.equal(one[whole:], other[whole:])


def pack(index: RowIndex | list[str], header: Header, places: Places | None = None) -> Tensor:
    """Return the names of an index, their places and a header: uint8 ``[bytes]``. **O(n)**.

    The places are those of a :class:`RowIndex`, or, for a list of distinct names, one for each.
    """
    return torch.from_numpy(pack_names(index, list(header.tables), list(header.patterns), places))


def size_with_words(packed: Tensor) -> int:
    """Return how many bytes packed names have with a table of words. **O(tables)**."""
    return searchable_size(_bytes_of_names(packed))


def add_words(packed: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return packed names with a table of words, by which :func:`search` finds them, in three pieces. **O(n)**."""
    data = _bytes_of_names(packed)
    behind, count = words_behind(data)
    head = data[:_START].copy()
    head[-8:] = np.frombuffer(count.to_bytes(8, "little"), np.uint8)
    return head, data[_START : searchable_size(data) - len(behind)], behind


def without_words(packed: Tensor) -> Tensor:
    """Return packed names without a table of words. **O(n)**, or **O(1)** if they have none."""
    data = _bytes_of_names(packed)
    has_words = len(data) >= _START and data[_START - 8 : _START].any()
    return torch.from_numpy(names_without_words(data)) if has_words else packed


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
    names, tables, patterns = unpack_names(_bytes_of_names(packed), prefix)
    return names, Header(tuple(TableHeader(*table) for table in tables), tuple(patterns))


def search(packed: Tensor, error: type[Exception], path: str, origin: str) -> tuple[RowIndex | None, int, Header]:
    """Return an index that looks names up where they were packed, how many there are, and the header. **O(tables)**.

    Nothing but the header is read. There is no index if the names have no table of words. If the names turn out to be
    damaged later, an ``error(path, message)`` is raised, whose message begins with ``origin``.

    Raises
    ------
    ValueError
        As :func:`unpack`, for the header.
    """
    data = _bytes_of_names(packed)
    count, tables, patterns = unpack_header(data)
    header = Header(tuple(TableHeader(*table) for table in tables), tuple(patterns))
    return RowIndex.of_packed(data, error, path, origin), count, header


def check_search(packed: Tensor) -> None:
    """Refuse names whose table of words does not find them: ValueError. **O(n)**."""
    check_words(_bytes_of_names(packed))


def _bytes_of_names(packed: Tensor) -> NDArray[np.uint8]:
    if packed.device.type == "meta":
        raise ValueError("the packed names lie on the meta device, and so have no values")
    data = bytes_of(packed)
    version = int(data[7]) if len(data) > 7 else _VERSION
    if version != _VERSION and bytes(data[:7]) == _MAGIC:
        what = "a later" if version > _VERSION else "an earlier"
        raise ValueError(
            f"the names were packed by {what} version of pdrs (format version {version}, this one reads {_VERSION})"
        )
    return data


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
    array: NDArray[np.uint8] = byte_view(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()).numpy()
    return array


def byte_view(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as its bytes, ``[nbytes]``.

    Dimensions of length 1 may have any strides. torch calls that contiguous, and yet makes no view of bytes of it.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
