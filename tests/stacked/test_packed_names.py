"""The names of a StackedParameterDict as bytes: what a state dict holds.

The bugs that this hunts: names that are written as docs/archive.md says, and are not read; a header whose fields come
back as others; damaged names that load as other names, change the dictionary that refuses them, or ask for memory
without bounds.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import pdrs
from observed import read_names

SD = pdrs.StackedParameterDict
NAMES = ["b\ud800é😀", "a", "d", "\ud83d\ude00", "日本"]


class Table(NamedTuple):
    """What is written of a table."""

    attribute: str
    used: int
    group: int = 0
    trainable: int = 1


def _written(
    names: list[str], ids: list[int] | None, tables: list[Table], patterns: tuple[str, ...] = ()
) -> torch.Tensor:
    """Write names as docs/archive.md says, whatever they are."""
    encoded = [table.attribute.encode("utf-8", "surrogatepass") for table in tables]
    of_patterns = [pattern.encode("utf-8", "surrogatepass") for pattern in patterns]
    labels = b"".join([*encoded, *of_patterns])
    counts = [len(names), len(ids or []), len(tables), len(patterns), len(labels), 0]
    records = [
        struct.pack("<4Q", len(attribute), table.group, table.trainable, table.used)
        for table, attribute in zip(tables, encoded, strict=True)
    ]
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = struct.pack(f"<{len(texts)}Q", *accumulate(map(len, texts)))
    parts = [b"pdrs\0\0\0\2", struct.pack("<6Q", *counts), *records]
    parts += [struct.pack(f"<{len(of_patterns)}Q", *map(len, of_patterns)), labels, bytes(-len(labels) % 8)]
    parts += [np.array(ids or [], "<i8").tobytes(), ends, *texts]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _loaded(packed: Tensor, **tables: Tensor) -> SD:
    sd = SD()
    sd.load_state_dict({**tables, "_extra_state": packed})
    return sd


def test_what_is_written_from_the_document_loads_and_is_written_again() -> None:
    ids, rows = [1, 1 << 40, 2], {"float32_2": torch.arange(6.0).view(3, 2), "float32_3": torch.ones(1, 3)}
    packed = _written(NAMES[:3], ids, [Table("float32_2", 3), Table("float32_3", 1, trainable=0)])
    sd = _loaded(packed, **rows)
    assert list(sd) == NAMES[:3]
    assert [sd[name].tolist() for name in sd] == [[2.0, 3.0], [1.0, 1.0, 1.0], [4.0, 5.0]]
    assert [table.requires_grad for table in sd.parameters()] == [True, False]
    assert torch.equal(sd.get_extra_state(), packed)
    plain = _written(["x", "y"], None, [Table("float32_2", 2)])
    assert _loaded(plain, float32_2=torch.eye(2))["y"].tolist() == [0.0, 1.0]
    assert torch.equal(SD.from_tensor(["x", "y"], torch.eye(2)).get_extra_state(), plain)


def test_names_rows_and_groups_come_back() -> None:
    ids = [8, 1 << 40, 2 << 40, 0, (1 << 40) + 2]
    tables = [Table("float32_2", 9, group=1, trainable=0), Table("é", 3), Table("int8_scalar", 1, group=2, trainable=0)]
    packed = _written(NAMES, ids, tables, ("bias$", "\ud800"))
    rows = {"float32_2": torch.zeros(9, 2), "é": torch.zeros(4, 3), "int8_scalar": torch.zeros(1, dtype=torch.int8)}
    sd = _loaded(packed, **rows)
    assert torch.equal(sd.get_extra_state(), packed)
    names = read_names(packed)
    assert list(names.rows.values()) == [(0, 8), (1, 0), (2, 0), (0, 0), (1, 2)]
    assert list(names.rows) == list(sd) == NAMES
    assert names.patterns == ["bias$", "\ud800"]
    assert [(table.group, table.trainable, table.used) for table in names.tables] == [
        (1, False, 9),
        (0, True, 3),
        (2, False, 1),
    ]


def test_names_of_a_dictionary_in_a_module_come_back(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"wé": SD.from_tensor(NAMES, torch.arange(10.0).view(5, 2))})
    pdrs.save(module, tmp_path / "file")
    assert list(pdrs.open(tmp_path / "file")) == ["wé." + name for name in NAMES]
    assert list(pdrs.open(tmp_path / "file", prefix="wé.")) == NAMES


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
    packed = _written(names, ids, [Table("float32_2", used)])
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
        (72, 2, "what is told of a table"),
        (80, (1 << 40) + 1, "what is told of a table"),
        (88, 0x161, "what should be zero"),
    ],
    ids=["ids", "tables", "label too long", "label too short", "trainable", "rows used", "padding"],
)
def test_a_broken_header_is_refused(at: int, value: int, message: str) -> None:
    packed = _written(["x"], None, [Table("a", 1)])
    assert list(_loaded(packed, a=torch.ones(1, 2))) == ["x"]
    packed[at : at + 8] = torch.tensor(list(value.to_bytes(8, "little")), dtype=torch.uint8)
    sd = SD({"old": torch.ones(2)})
    with pytest.raises(RuntimeError, match=rf"damaged at byte \d+: {message}"):
        sd.load_state_dict({"a": torch.ones(1, 2), "_extra_state": packed})
    assert list(sd) == ["old"]


def test_another_version_is_refused() -> None:
    packed = _written(["x"], None, [Table("a", 1)])
    for version, message in [
        (3, r"a later version of pdrs \(format version 3, this one reads 2\)"),
        (1, r"an earlier version of pdrs \(format version 1, this one reads 2\)"),
    ]:
        packed[7] = version
        with pytest.raises(RuntimeError, match=message):
            _loaded(packed, a=torch.ones(1, 2))


def test_names_that_came_went_and_moved_since_a_save_are_written_as_a_difference(tmp_path: Path) -> None:
    sd = SD.from_tensor([f"n{at}" for at in range(1000)], torch.arange(2000.0).view(1000, 2))
    pdrs.save(sd, tmp_path / "0")
    sd.drop(["n1", "n4"])
    sd["é\ud800"] = torch.ones(2)
    sd["n5"] = torch.zeros(3)
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    assert (tmp_path / "1").stat().st_size < (tmp_path / "0").stat().st_size / 2
    opened: Any = pdrs.open(tmp_path / "1")
    assert torch.equal(opened.get_extra_state(), sd.get_extra_state())
    assert {name: row.tolist() for name, row in opened.items()} == {name: row.tolist() for name, row in sd.items()}
