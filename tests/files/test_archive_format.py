"""Archives, read by a reader that was written from docs/archive.md alone: plain Python and its standard library.

The bugs that this hunts: a document that says something else than the code does; a format that changes and keeps its
version number, so that older files, or older versions of pdrs, fail.

The golden files next to this one were written when the format was fixed. ``python tests/files/test_archive_format.py``
writes those that are missing, and leaves the others alone.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from array import array
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import xxhash
from torch.nn import Parameter

import pdrs
from pdrs.checkpoint import verify

SIZES = {"F64": ("d", 8), "I64": ("q", 8), "F32": ("f", 4), "I32": ("i", 4), "U8": ("B", 1)}
GOLDEN = Path(__file__).with_name("golden_2.safetensors")
GOLDEN_DELTA = Path(__file__).with_name("golden_2.delta.safetensors")
NEW_VERSION = """
The format of archives has changed, so it needs a new version number. That of the packed names stands in their first
eight bytes, that of the rest in the metadata. Keep the golden files: pdrs must go on reading them, or refuse them by
their version. Add golden files of the new version, and describe it in docs/archive.md."""


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
        tables, _, names = _unpack(self.tensor(prefix + "_extra_state")[2])
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


# -- golden files ------------------------------------------------------------------------------------------------------


def golden() -> pdrs.StackedParameterDict:
    """Make what the golden file has: all that the format knows of one dictionary."""
    rows = [
        ("cat", torch.tensor([1.0, -2.0])),
        ("gone", torch.tensor([8.0, 8.0])),
        ("\0", torch.tensor([3.0, 4.0])),
        ("é", torch.tensor([0.5, float("inf")])),
        ("e\u0301", torch.tensor([5.0, 6.0])),
        ("wide", torch.arange(6, dtype=torch.float64).reshape(3, 2)),
        ("frozen", Parameter(torch.tensor([2**40, -1]), requires_grad=False)),
        ("\ud800.日本", torch.tensor([7.0, 8.0])),
        ("slow.😀", torch.tensor([9.0, 10.0])),
        *((f"n{n}", torch.tensor([n, n + 0.5])) for n in range(MORE)),
    ]
    sd = pdrs.StackedParameterDict(rows)
    sd.pop("gone")
    sd.move_to_end("n0", last=False)
    sd.param_groups(by={"^slow": {"lr": 0.1}})
    sd.reserve(20, shape=(2, 2))
    sd["square"] = torch.eye(2)
    return sd


def change(sd: pdrs.StackedParameterDict) -> pdrs.StackedParameterDict:
    """Change as little as a delta of rows and of names can say."""
    sd["cat"] = torch.tensor([0.25, 0.125])
    sd.pop("é")
    sd["gnu"] = torch.tensor([13.0, 14.0])
    return sd


MORE = 40
TEXTS = {"format": "pt", "ключ": "значение"}
ROWS = {
    "n0": [0.0, 0.5],
    "cat": [1.0, -2.0],
    "\0": [3.0, 4.0],
    "é": [0.5, float("inf")],
    "e\u0301": [5.0, 6.0],
    "wide": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    "frozen": [2**40, -1],
    "\ud800.日本": [7.0, 8.0],
    "slow.😀": [9.0, 10.0],
    **{f"n{n}": [n, n + 0.5] for n in range(1, MORE)},
    "square": [1.0, 0.0, 0.0, 1.0],
}
CHANGED = {name: row for name, row in ROWS.items() if name != "é"} | {"cat": [0.25, 0.125], "gnu": [13.0, 14.0]}
# The capacity of each table, its shape without rows, its dtype, and whether it requires gradients.
TABLES = {
    "float32_2": (MORE + 7, (2,), torch.float32, True),
    "float64_3x2": (1, (3, 2), torch.float64, True),
    "int64_2_no_grad": (1, (2,), torch.int64, False),
    "float32_2_group1": (1, (2,), torch.float32, True),
    "float32_2x2": (20, (2, 2), torch.float32, True),
}
BOTH = pytest.mark.parametrize(("path", "rows"), [(GOLDEN, ROWS), (GOLDEN_DELTA, CHANGED)])


@BOTH
def test_the_golden_files_open_with_all_that_they_have(path: Path, rows: dict[str, list[float]]) -> None:
    verify(path)
    sd = pdrs.open(path, verify=True)
    assert list(sd) == list(rows)
    assert {name: row.reshape(-1).tolist() for name, row in sd.items()} == rows
    for name in rows:
        assert sd[name].reshape(-1).tolist() == rows[name], "a name is found in the file"
    assert [name in sd for name in ("gone", "n", f"n{MORE}", "", "\udfff")] == [False] * 5
    assert sd.metadata == TEXTS
    found = {name: (len(one), one.shape[1:], one.dtype, one.requires_grad) for name, one in sd.tables().items()}
    assert list(found) == list(TABLES)
    assert found == TABLES
    plain = sd.tables()["float32_2"]
    used = {sd[name].data_ptr() for name in rows}
    assert [row.tolist() for row in plain if row.data_ptr() not in used] == [[0, 0]] * (len(plain) - MORE - 5)
    assert sd["\ud800.日本"].requires_grad
    assert not sd["frozen"].requires_grad
    sd["slow.new"] = torch.ones(2)
    assert len(sd.tables()["float32_2_group1"]) > 1, "the pattern of a group is in the file"


@BOTH
def test_the_reader_from_the_document_reads_the_golden_files(path: Path, rows: dict[str, list[float]]) -> None:
    reader = Reader(path)
    assert reader.entries("") == rows
    assert list(reader.entries("")) == list(rows)
    assert reader.texts == TEXTS
    tables, patterns, _ = _unpack(reader.tensor("_extra_state")[2])
    assert patterns == ["^slow"]
    assert {one["attribute"]: one["trainable"] for one in tables} == {name: one[3] for name, one in TABLES.items()}
    assert [one["group"] for one in tables] == [0, 0, 0, 1, 0]
    assert {name: reader.capacity(name) for name in TABLES} == {name: one[0] for name, one in TABLES.items()}


def test_the_format_has_not_changed_unless_its_version_has(tmp_path: Path) -> None:
    first, second = shutil.copy(GOLDEN, tmp_path), tmp_path / "second"
    pdrs.save(golden(), tmp_path / "first", metadata=TEXTS)
    pdrs.save(change(golden()), second, since=first)
    assert {how for how, *_ in Reader(second).fields["tensors"].values()} == {"rows", "names", "same"}
    for made, stored in ((tmp_path / "first", GOLDEN), (second, GOLDEN_DELTA)):
        assert _with_id_of(stored, made) == stored.read_bytes(), NEW_VERSION


def _with_id_of(stored: Path, made: Path) -> bytes:
    """Return a file with the random id of another, and with the checksum of its metadata that fits."""
    data, (old, new) = made.read_bytes(), (_metadata(path) for path in (made, stored))
    text = old.replace(json.loads(old)["id"], json.loads(new)["id"])
    for before, after in ((_quoted(old), _quoted(text)), (_crc(old), _crc(text))):
        assert data.count(before) == 1
        data = data.replace(before, after)
    return data


def _metadata(path: Path) -> str:
    data = path.read_bytes()
    return str(json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])["__metadata__"]["pdrs"])


def _quoted(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def _crc(text: str) -> bytes:
    return f"{zlib.crc32(text.encode()):08x}".encode()


if __name__ == "__main__":
    if not GOLDEN.exists():
        pdrs.save(golden(), GOLDEN, metadata=TEXTS)
    if not GOLDEN_DELTA.exists():
        pdrs.save(change(golden()), GOLDEN_DELTA, since=GOLDEN)
