"""The names of a StackedParameterDict as bytes: what a state dict holds.

The bugs that this hunts: names that are written as docs/archive.md says, and are not read; a header whose fields come
back as others; damaged names that load as other names, change the dictionary that refuses them, or ask for memory
without bounds.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import pdrs
from pdrs._core import IndexMap, apply_names, changed_rows, crc32, diff_names
from pdrs._rows.names_codec import Header, Slab, TableHeader, bytes_of, is_packed, pack, unpack

NAMES = ["b\ud800é😀", "a", "d", "\ud83d\ude00", "日本"]


def _written(names: list[str], ids: list[int] | None, tables: list[tuple[str, int, int, int]]) -> torch.Tensor:
    """Write names as docs/archive.md says, whatever they are; tables are attribute, group, flags and rows used."""
    labels = b"".join(attribute.encode() for attribute, *_ in tables)
    counts = [len(names), len(ids or []), len(tables), 0, 0, len(labels)]
    records = [struct.pack("<7Q", len(attribute.encode()), *rest, 0, 0, 0) for attribute, *rest in tables]
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    lengths = struct.pack(f"<{len(texts)}I", *map(len, texts))
    parts = [b"pdrs\0\0\0\1", struct.pack("<6Q", *counts), *records, labels, bytes(-len(labels) % 8)]
    parts += [np.array(ids or [], "<i8").tobytes(), lengths, bytes(-len(lengths) % 8), *texts]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def test_what_is_written_from_the_document_loads() -> None:
    tables = [("float32_2", 0, 1, 3), ("float32_3", 0, 0, 1)]
    packed = _written(NAMES[:3], [1, 1 << 40, 2], tables)
    headers = TableHeader("float32_2", 0, True, 3), TableHeader("float32_3", 0, False, 1)
    assert torch.equal(packed, pack(IndexMap(zip(NAMES, [1, 1 << 40, 2], strict=False)), Header(headers)))
    sd = pdrs.StackedParameterDict()
    sd.load_state_dict(
        {"float32_2": torch.arange(6.0).view(3, 2), "float32_3": torch.ones(1, 3), "_extra_state": packed}
    )
    assert list(sd) == NAMES[:3]
    assert [sd[name].tolist() for name in sd] == [[2.0, 3.0], [1.0, 1.0, 1.0], [4.0, 5.0]]
    plain = _written(["x", "y"], None, [("float32_2", 0, 1, 2)])
    assert dict(unpack(plain)[0]) == {"x": 0, "y": 1}


def test_names_ids_and_header_come_back() -> None:
    tables = (
        TableHeader("float32_2", 1, False, 9),
        TableHeader("é", 0, True, 3, Slab("slab", 7, [2, 3])),
        TableHeader("int8_scalar", 0, True, 1, Slab("slab", 9, [])),
    )
    header = Header(tables, ("bias$", "\ud800"))
    ids = [8, 1 << 40, 2 << 40, 0, (1 << 40) + 2]
    packed = pack(IndexMap(zip(NAMES, ids, strict=True)), header)
    index, found, again = unpack(packed)
    assert (list(index.items()), found.tolist(), again) == (list(zip(NAMES, ids, strict=True)), ids, header)
    assert is_packed(packed)
    assert torch.equal(packed, pack(IndexMap.from_names(NAMES), header, np.array(ids)))
    assert list(unpack(packed, "w\ud800.")[0]) == ["w\ud800." + name for name in NAMES]
    with pytest.raises(ValueError, match="5 names and 1 ids"):
        pack(IndexMap.from_names(NAMES), header, np.array([1]))


def test_rows_in_slabs_load_as_tables() -> None:
    tables = (TableHeader("a", 0, True, 2, Slab("slab", 1, [2])), TableHeader("b", 0, False, 1, Slab("slab", 5, [])))
    packed = pack(IndexMap({"x": 1, "y": 1 << 40, "z": 0}), Header(tables))
    sd = pdrs.StackedParameterDict()
    sd.load_state_dict({"slab": torch.arange(6.0), "_extra_state": packed, "__padding__.0": torch.zeros(3)})
    assert {name: row.tolist() for name, row in sd.items()} == {"x": [3.0, 4.0], "y": 5.0, "z": [1.0, 2.0]}
    assert [(name, table.requires_grad) for name, table in sd.named_parameters()] == [("a", True), ("b", False)]
    with pytest.raises(RuntimeError, match="its slab 'slab' at 5"):
        pdrs.StackedParameterDict().load_state_dict({"slab": torch.arange(5.0), "_extra_state": packed})
    with pytest.raises(RuntimeError, match=r"'slab'.* is missing"):
        pdrs.StackedParameterDict().load_state_dict({"_extra_state": packed})


@pytest.mark.parametrize(
    ("names", "ids", "used", "message"),
    [
        (["x", "x"], [0, 1], 2, '"x" is listed twice'),
        (["x", ""], [0, 1], 2, "a name is empty"),
        (["x", "y"], [0, 0], 2, "two names have one row"),
        (["x", "y"], [0, 2], 2, "a row that is not there"),
        (["x", "y"], [0, 1 << 40], 2, "a row that is not there"),
        (["x", "y"], [0, 1], 1 << 39, "are in use"),
        (["x", "y"], [0, -1], 2, "a row that is not there"),
    ],
)
def test_names_that_contradict_themselves_change_nothing(
    names: list[str], ids: list[int], used: int, message: str
) -> None:
    sd = pdrs.StackedParameterDict({"old": torch.ones(2)})
    packed = _written(names, ids, [("float32_2", 0, 1, used)])
    with pytest.raises(RuntimeError, match=message):
        sd.load_state_dict({"float32_2": torch.zeros(2, 2), "_extra_state": packed})
    assert {name: row.tolist() for name, row in sd.items()} == {"old": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (16, 2, "there are not as many ids as names"),
        (24, 1 << 60, "they end where"),
        (56, 9, "they end where"),
        (56, 0, "what is told of a table"),
        (72, 4, "what is told of a table"),
        (80, (1 << 40) + 1, "what is told of a table"),
        (96, 1, "what is told of a table"),
        (112, 0x161, "what should be zero"),
    ],
    ids=["ids", "tables", "label too long", "label too short", "flags", "rows used", "offset without slab", "padding"],
)
def test_a_broken_header_is_refused(at: int, value: int, message: str) -> None:
    packed = _written(["x"], None, [("a", 0, 1, 1)])
    assert dict(unpack(packed)[0]) == {"x": 0}
    packed[at : at + 8] = torch.tensor(list(value.to_bytes(8, "little")), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"damaged at byte \d+: {message}"):
        unpack(packed)


def test_another_version_is_refused() -> None:
    packed = _written(["x"], None, [("a", 0, 1, 1)])
    for version, message in [
        (2, r"later version of pdrs \(layout 2, this one reads 1\)"),
        (0, "a version that is known"),
    ]:
        packed[7] = version
        with pytest.raises(ValueError, match=message):
            unpack(packed)


def test_a_delta_of_names_gives_the_new_names() -> None:
    header = Header((TableHeader("float32_2", 0, True, 10),))
    old = bytes_of(pack(IndexMap(zip("abcdefg", range(7), strict=True)), header))
    new = bytes_of(pack(IndexMap(zip("acdfgé", [0, 9, 3, 5, 6, 1], strict=True)), header))
    assert apply_names(old, diff_names(old, new)).tobytes() == new.tobytes()
    with pytest.raises(ValueError, match="damaged"):
        apply_names(old, new)


def test_checksums_are_those_of_zlib_and_changed_rows_are_found() -> None:
    assert crc32(np.frombuffer(b"123456789", np.uint8)) == 0xCBF43926
    assert crc32(np.frombuffer(b"6789", np.uint8), crc32(np.frombuffer(b"12345", np.uint8))) == 0xCBF43926
    one = np.zeros(12, np.uint8)
    other = one.copy()
    other[[4, 11]] = 1
    assert changed_rows(one, other, 4).tolist() == [1, 2]
    assert changed_rows(one, one, 4).tolist() == []
    with pytest.raises(ValueError, match="rows of 5 bytes"):
        changed_rows(one, other, 5)
