"""The names of a StackedParameterDict as one tensor of bytes, as it stands in a state dict.

magic    8 bytes   b"pdrs" and the version of the layout
size     8 bytes   the size of the header, a multiple of 8
header   JSON      the number of names; what there is to know of each table; the patterns of groups
ids      int64     the table and row of each name, in order; left out where the n-th name has row n of table 0
lengths  uint32    the bytes of each name, in UTF-8 with surrogates; padded to 8 bytes
text     bytes     the names, one behind another
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import IndexMap, pack_names, unpack_names

__all__ = ["Header", "is_packed", "pack", "same_bytes", "unpack"]

_MAGIC = b"pdrs\x00\x00\x00\x01"


@dataclass(frozen=True)
class Header:
    """What is packed beside the names.

    Parameters
    ----------
    tables
        Of each table, in the order of their numbers: attribute, group, trainability, and how many rows were ever given.
    patterns
        The patterns of names that have groups of options of their own.
    """

    tables: tuple[tuple[str, int, bool, int], ...]
    patterns: tuple[str, ...]


def is_packed(value: Any) -> bool:
    """Whether a value of a state dict is a tensor of packed names."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or len(value) < 16:
        return False
    return value.device.type == "meta" or bytes(value[:8].tolist()) == _MAGIC


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, uint8 ``[bytes]`` on the CPU, are equal. torch compares eight times as fast by eights."""
    whole = len(one) - len(one) % 8
    if len(one) != len(other) or one.storage_offset() % 8 or other.storage_offset() % 8:
        return torch.equal(one, other)
    words = (each[:whole].view(torch.int64) for each in (one.contiguous(), other.contiguous()))
    return torch.equal(*words) and torch.equal(one[whole:], other[whole:])


def pack(index: IndexMap, header: Header) -> Tensor:
    """Return the names of an index, their ids and a header: uint8 ``[bytes]``. **O(n)**."""
    ids = index.rows()
    plain = bool((ids == np.arange(len(ids))).all())
    fields = {"names": len(ids), "ids": not plain, "tables": header.tables, "patterns": header.patterns}
    encoded = json.dumps(fields).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = _MAGIC + len(encoded).to_bytes(8, "little") + encoded
    return torch.from_numpy(pack_names(index, head if plain else head + ids.astype("<i8", copy=False).tobytes()))


def unpack(packed: Tensor) -> tuple[IndexMap, NDArray[np.int64], Header]:
    """Return the index, its ids in order, and the header that were packed. **O(n)**.

    Raises
    ------
    ValueError
        If the bytes are damaged.
    """
    data = packed.detach().cpu().contiguous().numpy()
    size = int.from_bytes(data[8:16].tobytes(), "little")
    try:
        fields = json.loads(data[16 : 16 + size].tobytes())
        count, start = int(fields["names"]), 16 + size
        tables = tuple((str(name), int(group), bool(flag), int(used)) for name, group, flag, used in fields["tables"])
        patterns = tuple(map(str, fields["patterns"]))
        has_ids = bool(fields["ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("the packed names are damaged: their header cannot be read") from error
    ids = np.arange(count)
    if has_ids:
        ids = _part(data, start, 8 * count).view("<i8").astype(np.int64)
        start += 8 * count
    lengths = _part(data, start, 4 * count).view("<u4").astype(np.uint32)
    start += 4 * count + (-4 * count % 8)
    if (ids < 0).any():
        raise ValueError("the packed names are damaged: an id is negative")
    return unpack_names(data[start:].copy(), lengths, ids), ids, Header(tables, patterns)


def _part(data: NDArray[np.uint8], start: int, size: int) -> NDArray[np.uint8]:
    part = data[start : start + size]
    if len(part) != size:
        raise ValueError("the packed names are damaged: they end too early")
    return part.copy()
