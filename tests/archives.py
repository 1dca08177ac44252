"""Archives, taken apart and written by hand as docs/archive.md describes them, for tests of damage and forgery.

What is written here has checksums that are right, whatever else is wrong with it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["Parts", "Table", "checksum", "delta_of", "forge", "pack"]


class Parts:
    """A safetensors file as its header, a dict, and the bytes of each tensor."""

    def __init__(self, data: bytes) -> None:
        (size,) = struct.unpack("<Q", data[:8])
        self.data_start = 8 + size
        self.header: dict[str, Any] = json.loads(data[8 : 8 + size])
        self.names = [name for name in self.header if name != "__metadata__"]
        self.tensors = {name: data[slice(*self.offsets(name))] for name in self.names}

    @classmethod
    def of(cls, path: Path) -> Parts:
        """Take a file apart."""
        return cls(path.read_bytes())

    def offsets(self, name: str) -> tuple[int, int]:
        """Return the first byte of a tensor in the file, and its end."""
        start, stop = self.header[name]["data_offsets"]
        return self.data_start + start, self.data_start + stop

    def metadata(self) -> Any:
        """Return the metadata of pdrs."""
        return json.loads(self.header["__metadata__"]["pdrs"])

    def described(self, name: str) -> bytes:
        """Return the bytes that a checksum of a tensor covers."""
        entry = self.header[name]
        return f"{name}\0{entry['dtype']}\0{','.join(map(str, entry['shape']))}\0".encode() + self.tensors[name]

    def put_together(self, fields: Any = None) -> bytes:
        """Return the file, with these metadata of pdrs, and checksums that fit."""
        header, at = dict(self.header), 0
        for name, data in self.tensors.items():
            header[name] = self.header[name] = {**header[name], "data_offsets": [at, at + len(data)]}
            at += len(data)
        if fields is not None:
            sums = fields.get("sums") if isinstance(fields, dict) else None
            for name in self.tensors if isinstance(sums, dict) else ():
                if name in sums:
                    sums[name] = checksum(self.described(name))
            hows = fields.get("tensors") if isinstance(fields, dict) else None
            for name in self.tensors if isinstance(hows, dict) else ():
                if isinstance(hows.get(name), list) and len(hows[name]) == 3 and hows[name][0] == "whole":
                    hows[name][2] = checksum(self.tensors[name])
            header["__metadata__"] = {"format": "pt", **_metadata(json.dumps(fields))}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + b"".join(self.tensors.values())


def forge(path: Path, tensors: dict[str, Tensor], fields: object = None) -> Path:
    """Write a file with these metadata of pdrs, which may be no JSON."""
    metadata = {"format": "pt"}
    if fields is not None:
        metadata |= _metadata(fields if isinstance(fields, str) else json.dumps(fields))
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def _metadata(text: str) -> dict[str, str]:
    return {"pdrs": text, "pdrs.crc32": checksum(text.encode("utf-8", "surrogatepass"))}


def checksum(data: bytes) -> str:
    """Return the CRC-32 in hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


class Table(NamedTuple):
    """A table in packed names."""

    attribute: str
    used: int
    group: int = 0
    trainable: int = 1


def pack(entries: Mapping[str, int], *tables: Table) -> Tensor:
    """Return packed names, given the id of each."""
    names = [name.encode("utf-8", "surrogatepass") for name in entries]
    labels = b"".join(table.attribute.encode() for table in tables)
    ids = [] if list(entries.values()) == list(range(len(entries))) else list(entries.values())
    counts = struct.pack("<6Q", len(names), len(ids), len(tables), 0, len(labels), 0)
    records = [struct.pack("<4Q", len(one.attribute.encode()), one.group, one.trainable, one.used) for one in tables]
    ends = struct.pack(f"<{len(names)}Q", *accumulate(map(len, names)))
    parts = [b"pdrs\0\0\0\2", counts, *records, labels, bytes(-len(labels) % 8), struct.pack(f"<{len(ids)}Q", *ids)]
    return torch.frombuffer(bytearray(b"".join([*parts, ends, *names])), dtype=torch.uint8)


def delta_of(removed: Sequence[int], moved: Mapping[int, int], added: Tensor) -> Tensor:
    """Return the difference of packed names: positions that go, new ids by position, and the names that come."""
    parts = [b"pdrd\0\0\0\2", struct.pack("<2Q", len(removed), len(moved))]
    for positions in (removed, list(moved)):
        data = struct.pack(f"<{len(positions)}I", *positions)
        parts += [data, bytes(-len(data) % 8)]
    parts += [struct.pack(f"<{len(moved)}Q", *moved.values()), bytes(added.tolist())]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
