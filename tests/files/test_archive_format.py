"""Archives, read by a reader that was written from docs/archive.md alone: plain Python and its standard library.

The bugs that this hunts: a document that says something else than the code does.
"""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import xxhash

import pdrs

SIZES = {"F32": ("f", 4), "I64": ("q", 8), "I32": ("i", 4), "U8": ("B", 1)}


class Reader:
    """An archive and those that it continues."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
        assert (8 + size) % 4096 == 0
        assert metadata["pdrs.crc32"] == f"{zlib.crc32(metadata['pdrs'].encode()):08x}"
        self.fields = json.loads(metadata.pop("pdrs"))
        del metadata["pdrs.crc32"]
        assert self.fields["version"] == 1
        texts = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
        assert self.fields["texts"] == f"{zlib.crc32(texts.encode()):08x}"
        self.texts = metadata
        self.own: dict[str, tuple[str, list[int], bytes]] = {}
        for name, one in header.items():
            start, stop = one["data_offsets"]
            part = data[8 + size + start : 8 + size + stop]
            said = f"{name}\0{one['dtype']}\0{','.join(map(str, one['shape']))}\0"
            assert self.fields["sums"].pop(name) == f"{zlib.crc32(said.encode() + part):08x}"
            self.own[name] = (one["dtype"], one["shape"], part)
            assert start % SIZES[one["dtype"]][1] == 0
        assert self.fields["sums"] == {}
        self.before = None
        if "since" in self.fields:
            self.before = Reader(path.parent / self.fields["since"]["file"])
            assert self.before.fields["id"] == self.fields["since"]["id"]

    def names(self) -> list[str]:
        return list(self.fields["tensors"] if self.before else self.own)

    def tensor(self, name: str) -> tuple[str, list[int], bytes]:
        if not self.before:
            return self.own[name]
        how, shape, total = self.fields["tensors"][name]
        if how == "whole":
            found = self.own[name]
        elif how == "same":
            found = self.before.tensor(name)
        elif how == "names":
            found = ("U8", shape, _apply(self.before.tensor(name)[2], self.own[name + ".__names__"][2]))
        else:
            assert how == "rows"
            dtype, _, data = self.before.tensor(name)
            row = prod(shape[1:]) * SIZES[dtype][1]
            made = bytearray(data[: shape[0] * row].ljust(shape[0] * row, b"\0"))
            numbers, values = self.own[name + ".__rows__"], self.own[name + ".__values__"][2]
            for at, number in enumerate(array(SIZES[numbers[0]][0], numbers[2])):
                made[number * row : (number + 1) * row] = values[at * row : (at + 1) * row]
            found = (dtype, shape, bytes(made))
        assert found[1] == shape
        assert f"{zlib.crc32(found[2]):08x}" == total
        return found

    def capacity(self, name: str) -> int:
        rows = self.tensor(name)[1][0]
        capacity = self.fields.get("capacities", {}).get(name)
        assert capacity is None or rows < capacity <= 16 * rows
        return capacity or rows

    def entries(self, prefix: str) -> dict[str, list[float]]:
        tables, patterns, names = _unpack(self.tensor(prefix + "_extra_state")[2])
        assert patterns == []
        found = {}
        for name, id_ in names:
            table, row = tables[id_ >> 40], id_ & (1 << 40) - 1
            assert row < table["used"]
            dtype, shape, data = self.tensor(prefix + table["attribute"])
            assert table["used"] <= shape[0]
            size = prod(shape[1:])
            code, width = SIZES[dtype]
            first = row * size * width
            found[name] = array(code, data[first : first + size * width]).tolist()
        assert len(found) == len(names)
        return found


def _unpack(data: bytes) -> tuple[list[dict], list[str], list[tuple[str, int]]]:
    assert data[:8] == b"pdrs\0\0\0\2"
    names, ids, tables, patterns, labels, words = struct.unpack_from("<6Q", data, 8)
    at = 56
    records = [struct.unpack_from("<4Q", data, at + 32 * n) for n in range(tables)]
    at += 32 * tables
    pattern_sizes = struct.unpack_from(f"<{patterns}Q", data, at)
    at += 8 * patterns
    end = at + labels

    def text(size: int) -> str:
        nonlocal at
        at += size
        return data[at - size : at].decode("utf-8", "surrogatepass")

    made = []
    for attribute, group, trainable, used in records:
        assert trainable in (0, 1)
        made.append({"attribute": text(attribute), "group": group, "trainable": trainable, "used": used})
    found = [text(size) for size in pattern_sizes]
    assert at == end
    at += -at % 8
    numbers = struct.unpack_from(f"<{ids}Q", data, at) if ids else range(names)
    at += 8 * ids
    ends = struct.unpack_from(f"<{names}Q", data, at)
    at += 8 * names
    entries = [(text(end - begin), number) for (begin, end), number in zip(pairwise([0, *ends]), numbers, strict=True)]
    if words:
        at += -at % 8
        _check_words([name for name, _ in entries], struct.unpack_from(f"<{words}Q", data, at))
        at += 8 * words
    assert at == len(data)
    return made, found, entries


def _check_words(names: list[str], words: tuple[int, ...]) -> None:
    """Fail unless a search among the words finds each name."""
    assert len(words) == len(names) + len(names) // 3 + 1
    for number, name in enumerate(names):
        hash_ = xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
        at = (hash_ % (1 << 32)) * len(words) >> 32
        seen = 0
        while words[at] != (hash_ >> 32 << 32) + number + 1:
            assert words[at] != 0, name
            at, seen = (at + 1) % len(words), seen + 1
        assert seen < 1024
    assert sum(word != 0 for word in words) == len(names)


def _apply(old: bytes, delta: bytes) -> bytes:
    assert delta[:8] == b"pdrd\0\0\0\2"
    removed, moved = struct.unpack_from("<2Q", delta, 8)
    at = 24
    gone = set(struct.unpack_from(f"<{removed}I", delta, at))
    at += 4 * removed + -4 * removed % 8
    places = struct.unpack_from(f"<{moved}I", delta, at)
    at += 4 * moved + -4 * moved % 8
    new_ids = dict(zip(places, struct.unpack_from(f"<{moved}Q", delta, at), strict=True))
    at += 8 * moved
    _, _, before = _unpack(old)
    _, _, added = _unpack(delta[at:])
    entries = [(name, new_ids.get(n, id_)) for n, (name, id_) in enumerate(before) if n not in gone] + added
    # The header is that of the delta, with the counts of the whole.
    _, _, tables, patterns, labels, _ = struct.unpack_from("<6Q", delta, at + 8)
    plain = all(id_ == n for n, (_, id_) in enumerate(entries))
    counts = struct.pack("<6Q", len(entries), 0 if plain else len(entries), tables, patterns, labels, 0)
    head = delta[at + 56 : at + 56 + 32 * tables + 8 * patterns + labels + -labels % 8]
    texts = [name.encode("utf-8", "surrogatepass") for name, _ in entries]
    listed = b"" if plain else struct.pack(f"<{len(entries)}Q", *(id_ for _, id_ in entries))
    ends = struct.pack(f"<{len(texts)}Q", *accumulate(map(len, texts)))
    return b"pdrs\0\0\0\2" + counts + head + listed + ends + b"".join(texts)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_reader_from_the_document_finds_every_name(stacked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = [(2,), (), (3, 2), (2,), (5,), (1, 2, 3), (400, 60)]
    pd = pdrs.ParameterDict([(f"é.{n}.\ud800", torch.randn(shape)) for n, shape in enumerate(shapes * 3)])
    module = torch.nn.ModuleDict({"w": pd.stack() if stacked else pd, "l": torch.nn.Linear(2, 2)})
    pdrs.save(module, tmp_path / "0")
    held = module["w"]
    with torch.no_grad():
        held["é.3.\ud800"].add_(1)
        held["é.6.\ud800"][7].add_(1)
    held.pop("é.4.\ud800")
    held["new"] = torch.ones(2)
    held["other"] = torch.randn(9)
    pdrs.save(module, tmp_path / "1", since=tmp_path / "0")
    held["new"] = torch.zeros(2)
    pdrs.save(module, tmp_path / "2", since=tmp_path / "1")
    reader = Reader(tmp_path / "2")
    assert reader.entries("w.") == {name: value.reshape(-1).tolist() for name, value in held.items()}
    assert list(reader.entries("w.")) == list(held)
    assert array("f", reader.tensor("l.weight")[2]).tolist() == module["l"].weight.reshape(-1).tolist()


def test_a_reader_from_the_document_knows_spare_rows_and_metadata(tmp_path: Path) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2), "b": torch.zeros(3)})
    sd.reserve(40, shape=(2,))
    pdrs.save(sd, tmp_path / "0", metadata={"ключ": "значение", "a": "1"})
    full = Reader(tmp_path / "0")
    sd["c"] = torch.full((2,), 2.0)
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    delta = Reader(tmp_path / "1")
    capacity = len(sd.table((2,)))
    assert capacity >= 40
    for reader in (full, delta):
        assert reader.texts == {"format": "pt", "ключ": "значение", "a": "1"}
        assert reader.tensor("float32_2")[1][0] < capacity == reader.capacity("float32_2")
        assert reader.capacity("float32_3") == len(sd.table((3,)))
        assert not any(reader.tensor("float32_2")[2][8 * 2 :]), "rows without a name are zero"
    assert full.entries("") == {"a": [1, 1], "b": [0, 0, 0]}
    assert delta.entries("") == full.entries("") | {"c": [2, 2]}
    assert len(pdrs.open(tmp_path / "1").table((2,))) == capacity
