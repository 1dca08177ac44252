"""Files that are truncated, changed, forged or foreign: an error that says what is wrong, or the data that were saved.

The bugs that this hunts: a crash; memory for sizes that a file only claims; a tensor, a name or a row that is silently
another; an error that does not name the file; a module that is half loaded from a file that is refused.
"""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pdrs
from archives import Parts, Table, checksum, delta_of, forge, pack
from pdrs.checkpoint import verify


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Let a size that a file claims and does not have fail at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _saved() -> pdrs.StackedParameterDict:
    torch.manual_seed(0)
    sd = pdrs.StackedParameterDict({f"name.{n}": torch.randn(3) for n in range(8)})
    sd.update({"é": torch.randn(2, 2), "int": torch.nn.Parameter(torch.arange(3), requires_grad=False)})
    sd.pop("name.3")
    return sd


def _delta(folder: Path) -> Path:
    sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(300)], torch.randn(300, 4))
    pdrs.save(sd, folder / "base")
    sd["n7"] = torch.ones(4)
    sd.pop("n9")
    sd["new"] = torch.ones(4)
    pdrs.save(sd, folder / "delta", since=folder / "base")
    return folder / "delta"


def _content(path: Path) -> dict[str, list[float]]:
    return {name: row.reshape(-1).tolist() for name, row in pdrs.open(path).items()}


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    pdrs.save(_saved(), tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    for size in [*range(0, 40), *range(40, len(data), 37), *range(len(data) - 40, len(data))]:
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(pdrs.CheckpointError, match="cut: "):
            pdrs.open(tmp_path / "cut")
    (tmp_path / "long").write_bytes(data + b"\0")
    with pytest.raises(pdrs.CheckpointError, match="long: "):
        pdrs.open(tmp_path / "long")


@pytest.mark.parametrize("which", ["full", "delta"])
@pytest.mark.slow
def test_a_changed_byte_of_header_or_names_is_refused_or_changes_nothing(which: str, tmp_path: Path) -> None:
    path = tmp_path / "full"
    if which == "full":
        pdrs.save(_saved(), path)
    else:
        path = _delta(tmp_path)
    expected = _content(path)
    data = bytearray(path.read_bytes())
    parts = Parts.of(path)
    places = [at for at in range(parts.data_start) if data[at] != 0x20 or at < 300]
    for name in parts.names:
        if "_extra_state" in name:
            places += range(*parts.offsets(name))
    generator = random.Random(0)
    bad = tmp_path / "bad"
    seen = {"refused": 0, "found by verify": 0}
    for at in places:
        for flip in {1 << generator.randrange(8), generator.randrange(1, 256)}:
            data[at] ^= flip
            bad.write_bytes(data)
            data[at] ^= flip
            try:
                found = _content(bad)
            except pdrs.CheckpointError as error:
                seen["refused"] += str(error).startswith(str(tmp_path))
                continue
            if found == expected:
                continue
            # Names may be others without contradicting anything: then the checksum tells.
            with pytest.raises(pdrs.CheckpointError):
                verify(bad)
            seen["found by verify"] += 1
    assert seen["refused"] > 100


def test_a_changed_byte_of_a_table_is_found_by_verify_and_named(tmp_path: Path) -> None:
    pdrs.save(_saved(), tmp_path / "good")
    data = bytearray((tmp_path / "good").read_bytes())
    parts = Parts(bytes(data))
    for name, (start, stop) in ((name, parts.offsets(name)) for name in parts.names):
        for at in range(start, stop):
            data[at] ^= 0x40
            (tmp_path / "bad").write_bytes(data)
            data[at] ^= 0x40
            with pytest.raises(pdrs.CheckpointError, match=rf"bad: the tensor '{name}' \(bytes {start} to {stop}\)"):
                verify(tmp_path / "bad")


def test_damage_in_a_chain_is_found_where_it_is(tmp_path: Path) -> None:
    path = _delta(tmp_path)
    for one in (tmp_path / "base", path):
        good = one.read_bytes()
        one.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(pdrs.CheckpointError, match=f"{one.name}: the tensor"):
            pdrs.open(path, verify=True)
        one.write_bytes(good)
    verify(path)


def test_another_file_that_says_it_is_the_one_before_is_found_by_verify(tmp_path: Path) -> None:
    path, base = _delta(tmp_path), tmp_path / "base"
    pdrs.save(pdrs.open(path), tmp_path / "last", since=path)
    verify(tmp_path / "last")
    known = Parts.of(base).metadata()["id"]
    pdrs.save(pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(300)], torch.zeros(300, 4)), base)
    parts = Parts.of(base)
    base.write_bytes(parts.put_together(parts.metadata() | {"id": known}))
    verify(base)  # by itself it is whole
    for one in (path, tmp_path / "last"):
        with pytest.raises(pdrs.CheckpointError, match="is not what it was: the checksum differs"):
            pdrs.open(one, verify=True)


def test_checksums_are_those_that_the_documentation_says(tmp_path: Path) -> None:
    pdrs.save(_saved(), tmp_path / "a")
    parts = Parts.of(tmp_path / "a")
    assert parts.metadata()["sums"] == {name: checksum(parts.described(name)) for name in parts.names}
    metadata = parts.header["__metadata__"]
    assert metadata["pdrs.crc32"] == checksum(metadata["pdrs"].encode())


# -- forged ------------------------------------------------------------------------------------------------------------


FLOATS = Table("t", 2)
CONTRADICTIONS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no table": ({"_extra_state": pack({"x": 0}, FLOATS)}, "there is no tensor 't'"),
    "too few rows": ({"t": torch.ones(1, 2), "_extra_state": pack({"x": 0}, FLOATS)}, "2 rows are in use"),
    "a scalar": ({"t": torch.ones(()), "_extra_state": pack({"x": 0}, FLOATS)}, "2 rows are in use"),
    "integers to train": (
        {"t": torch.ones(2, 2, dtype=torch.int32), "_extra_state": pack({"x": 0}, FLOATS)},
        "cannot be trained",
    ),
    "one table twice": ({"t": torch.ones(2, 2), "_extra_state": pack({"x": 0}, FLOATS, FLOATS)}, "a table twice"),
    "rows by the billion": (
        {"t": torch.ones(2, 2), "_extra_state": pack({"x": 1 << 39}, FLOATS._replace(used=1 << 40))},
        "1099511627776 rows are in use",
    ),
    "a later version": (
        {"t": torch.ones(2, 2), "_extra_state": torch.tensor([*b"pdrs\0\0\0\x09", *bytes(48)], dtype=torch.uint8)},
        "later version",
    ),
    "nothing behind the version": (
        {"t": torch.ones(2, 2), "_extra_state": torch.tensor([*b"pdrs\0\0\0\x02", *bytes(8)], dtype=torch.uint8)},
        "they end",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize("target", [pdrs.ParameterDict, pdrs.StackedParameterDict])
def test_names_and_tables_that_disagree_are_refused(case: str, target: type, tmp_path: Path) -> None:
    tensors, message = CONTRADICTIONS[case]
    path = forge(tmp_path / "bad", tensors)
    with pytest.raises(pdrs.CheckpointError, match=f"bad: .*{message}"):
        pdrs.open(path)
    filled = target({"x": torch.full((2,), 7.0)})
    with pytest.raises(pdrs.CheckpointError, match=message):
        pdrs.load(path, filled)
    assert {name: row.tolist() for name, row in filled.items()} == {"x": [7.0, 7.0]}


TEXTS = checksum(b'{"format":"pt"}')
FIELDS = {"version": 1, "id": "i", "dictionaries": {}, "sums": {}, "texts": TEXTS}
SINCE = FIELDS | {"since": {"file": "base", "id": "i"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ({}, "cannot be read"),
        (FIELDS | {"version": 2}, "later version"),
        (FIELDS | {"sums": 3}, "cannot be read"),
        (SINCE, "cannot be read"),
        (SINCE | {"tensors": {"x": ["same", [2]]}}, "cannot be read"),
        (SINCE | {"tensors": {"x": ["odd", [2], "0"]}}, "which is unknown"),
        (SINCE | {"tensors": {"x": ["same", [3], "0"]}}, r"should have the shape \[3\]"),
        (SINCE | {"tensors": {"y": ["same", [2], "0"]}}, "'y' is missing in .*base"),
        (SINCE | {"tensors": {"y": ["whole", [2], "0"]}}, "the tensor 'y' is missing"),
        (SINCE | {"tensors": {"x": ["rows", [2], "0"]}}, "missing"),
        (SINCE | {"tensors": {}, "since": {"file": "base", "id": "j"}}, "replaced"),
        (SINCE | {"tensors": {}, "since": {"file": "../base", "id": "i"}}, "no name of a file"),
        (SINCE | {"tensors": {}, "since": {"file": "/etc/passwd", "id": "i"}}, "no name of a file"),
        (SINCE | {"tensors": {}, "since": {"file": "", "id": "i"}}, "no name of a file"),
        (SINCE | {"tensors": {}, "since": {"file": "bad", "id": "i"}}, "no beginning"),
        (SINCE | {"tensors": {}, "since": {"file": "none", "id": "i"}}, "not there"),
    ],
)
def test_forged_metadata_are_refused(fields: object, message: str, tmp_path: Path) -> None:
    forge(tmp_path / "base", {"x": torch.ones(2)}, FIELDS)
    with pytest.raises(pdrs.CheckpointError, match=message):
        pdrs.open(forge(tmp_path / "bad", {"z": torch.ones(2)}, fields))


def test_names_that_do_not_come_out_as_they_were_are_refused(tmp_path: Path) -> None:
    table = Table("t", 2)
    old, new = pack({"a": 0, "b": 1}, table), pack({"b": 1, "c": 0}, table)
    delta = delta_of([0], {}, pack({"c": 0}, table))
    forge(tmp_path / "base", {"t": torch.ones(2, 2), "_extra_state": old}, FIELDS)
    for total, message in ((checksum(bytes(new.tolist())), None), ("0", "are not what they were")):
        how = {"t": ["same", [2, 2], "0"], "_extra_state": ["names", list(new.shape), total]}
        path = forge(tmp_path / "delta", {"_extra_state.__names__": delta}, SINCE | {"tensors": how})
        if message is None:
            assert list(pdrs.open(path)) == ["b", "c"]
            continue
        with pytest.raises(pdrs.CheckpointError, match=message):
            pdrs.open(path)


def test_metadata_whose_checksum_differs_or_that_are_half_gone_are_refused(tmp_path: Path) -> None:
    text = json.dumps(FIELDS)
    good = checksum(text.encode())
    cases = (
        {"pdrs": text},
        {"pdrs.crc32": good},
        {"pdrs": text, "pdrs.crc32": "00000000"},
        {"pdrs": text + " ", "pdrs.crc32": good},
    )
    for metadata in cases:
        save_file({"x": torch.ones(2)}, tmp_path / "bad", metadata)
        with pytest.raises(pdrs.CheckpointError, match=r"bad: the metadata 'pdrs' are (missing|damaged)"):
            pdrs.open(tmp_path / "bad")


ROWS: list[tuple[list[int], tuple[int, ...], list[int]]] = [
    ([1, 0], (2, 2), [3, 2]),
    ([1, 1], (2, 2), [3, 2]),
    ([0, 3], (2, 2), [3, 2]),
    ([-1, 0], (2, 2), [3, 2]),
    ([0, 4], (2, 2), [4, 2]),
    ([0, 1], (2, 3), [3, 2]),
    ([0, 1], (1, 2), [3, 2]),
    ([0, 1], (2, 2), [3, 1]),
    ([0, 1], (2, 2), [1 << 50, 2]),
    ([0, 1], (2, 2), [-1, 2]),
]


@pytest.mark.parametrize(("rows", "values", "shape"), ROWS)
def test_forged_rows_are_refused(rows: list[int], values: tuple[int, ...], shape: list[int], tmp_path: Path) -> None:
    forge(tmp_path / "base", {"x": torch.ones(3, 2)}, FIELDS)
    tensors = {"x.__rows__": torch.tensor(rows), "x.__values__": torch.zeros(values)}
    path = forge(tmp_path / "bad", tensors, SINCE | {"tensors": {"x": ["rows", shape, "0"]}})
    with pytest.raises(pdrs.CheckpointError, match="bad: "):
        pdrs.open(path)


def test_one_name_in_two_places_is_refused(tmp_path: Path) -> None:
    inner = pack({"b": 0}, Table("t", 1))
    outer = pack({"a.b": 0}, Table("u", 1))
    tensors = {"a._extra_state": inner, "a.t": torch.ones(1, 2), "_extra_state": outer, "u": torch.ones(1, 2)}
    with pytest.raises(pdrs.CheckpointError, match="listed twice"):
        pdrs.open(forge(tmp_path / "bad", tensors))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"hello, world",
        b"{}",
        b"\xff" * 100,
        (1 << 60).to_bytes(8, "little") + b"{}",
        b"\x93NUMPY\x01\0" + bytes(100),
    ],
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(content)
    for read in (pdrs.open, verify, lambda path: pdrs.load(path, torch.nn.Linear(2, 2))):
        with pytest.raises(pdrs.CheckpointError, match="foreign: "):
            read(tmp_path / "foreign")
    with pytest.raises(pdrs.CheckpointError, match="the folder has no checkpoint"):
        pdrs.open(tmp_path)


def test_a_file_that_shrinks_before_it_is_mapped_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    pdrs.save(pdrs.StackedParameterDict.from_tensor([f"{n}" for n in range(70_000)], torch.ones(70_000, 8)), path)
    really, reads = os.preadv, 0

    def shrinking(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        count = really(*arguments)
        if reads == 2:  # the size of the header, and the header
            os.truncate(path, 1 << 20)
        return count

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(pdrs.CheckpointError, match=r"a: the file has been truncated: it had \d+ bytes and has 1048576"):
        pdrs.open(path)
