"""Rows of a table that were never given: they are not written, and are there again when the file is opened.

The bugs that this hunts: a file that is twice as large for one name more; a dictionary that comes back with fewer rows,
so that the state of its optimizer does not fit; bytes of the next tensor in rows that should be zero; a number in a
file that makes pdrs ask for memory.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import pdrs
from archives import Parts
from console import run

SD = pdrs.StackedParameterDict
MANY = 30_001  # rows of 64 bytes: a table that is mapped


def grown(count: int) -> SD:
    sd = SD.from_tensor([f"u{at}" for at in range(count)], torch.randn(count, 16))
    sd["one more"] = torch.ones(16)
    sd["other"] = torch.ones(400_000)  # behind it in the file
    return sd


@pytest.mark.parametrize("count", [5, MANY])
@pytest.mark.parametrize("way", ["open", "open in memory", "load", "load of a module", "open verified"])
def test_rows_that_were_never_given_are_not_written_and_come_back(count: int, way: str, tmp_path: Path) -> None:
    sd = grown(count)
    path = tmp_path / "file"
    assert pdrs.save(sd, path) < (count + 1) * 64 + 1_600_000 + 4096 * 4 + 34 * count
    assert len(sd.table((16,))) == 2 * count
    made = SD()
    if way == "load":
        pdrs.load(path, made)
    elif way == "load of a module":
        pdrs.save(torch.nn.ModuleDict({"w": sd}), path)
        pdrs.load(path, torch.nn.ModuleDict({"w": made}))
    else:
        options: dict[str, Any] = {"open in memory": {"device": "cpu"}, "open verified": {"device": "cpu"}}.get(way, {})
        made = pdrs.open(path, verify=way == "open verified", **options)
    assert torch.equal(made.table((16,)), sd.table((16,)))
    assert list(made) == list(sd)
    address = made.table((16,)).data_ptr()
    made["next"] = torch.full((16,), 2.0)
    assert made.table((16,)).data_ptr() == address, "it had room"
    assert torch.equal(made["other"], sd["other"])
    assert torch.equal(made.table((16,))[: count + 1], sd.table((16,))[: count + 1])
    assert len(pdrs.open(path)) == count + 2  # the file is as it was


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # what is trained is dense on purpose
def test_a_resumed_optimizer_fits(tmp_path: Path) -> None:
    sd = grown(9)
    optimizer = torch.optim.Adam(sd.parameters())
    sd.gather(["u1", "one more"]).sum().backward()
    optimizer.step()
    pdrs.save(sd, tmp_path / "file")
    made = pdrs.open(tmp_path / "file")
    again = torch.optim.Adam(made.parameters())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for one in (sd, made):
        one.zero_grad()
        one.gather(["u2", "one more"]).sum().backward()
    optimizer.step()
    again.step()
    assert torch.equal(made.table((16,)), sd.table((16,)))


@pytest.mark.parametrize(("used", "room"), [(0, 100), (1, 1000), (3, 4)])
def test_much_room_is_kept_too(used: int, room: int, tmp_path: Path) -> None:
    sd = SD()
    sd.reserve(room, shape=(8,))
    sd.update([(f"n{at}", torch.ones(8)) for at in range(used)])
    size = pdrs.save(sd, tmp_path / "file")
    assert size < 4096 + 1000 + room * 32 // 4 + 32
    made = pdrs.open(tmp_path / "file")
    assert made.table((8,)).shape == (room, 8)
    assert torch.equal(made.table((8,)), sd.table((8,)))


def test_a_delta_keeps_the_room(tmp_path: Path) -> None:
    sd = SD.from_tensor([f"u{at}" for at in range(100)], torch.ones(100, 16))
    pdrs.save(sd, tmp_path / "0")
    sd["one more"] = torch.ones(16)
    assert pdrs.save(sd, tmp_path / "1", since=tmp_path / "0") < 6000
    sd.drop(["u3"])
    pdrs.save(sd, tmp_path / "2", since=tmp_path / "1")
    for name in ("1", "2"):
        assert pdrs.open(tmp_path / name).table((16,)).shape == (200, 16)
        pdrs.open(tmp_path / name, verify=True)
    assert torch.equal(pdrs.open(tmp_path / "2").table((16,)), sd.table((16,)))
    sd.compact()
    pdrs.save(sd, tmp_path / "3", since=tmp_path / "2")
    assert pdrs.open(tmp_path / "3").table((16,)).shape == (100, 16)


def test_a_converted_file_keeps_the_room(tmp_path: Path) -> None:
    pdrs.save(grown(5), tmp_path / "file")
    assert run(["convert", tmp_path / "file", tmp_path / "again"]) == 0
    assert pdrs.open(tmp_path / "again").table((16,)).shape == (10, 16)


@pytest.mark.parametrize("rows", [0, 6, 1 << 22, 1 << 40, -1, "many", None])
def test_a_number_of_rows_that_is_wrong_is_not_believed(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    sd = SD.from_tensor([f"u{at}" for at in range(5)], torch.ones(5, 16))
    sd["one more"] = torch.ones(16)
    pdrs.save(sd, path)
    parts = Parts.of(path)
    fields = parts.metadata()
    assert fields["capacities"] == {"float32_16": 10}
    path.write_bytes(parts.put_together(fields | {"capacities": {"float32_16": rows}}))
    for act in (pdrs.open, lambda path: pdrs.load(path, SD())):
        with pytest.raises(pdrs.CheckpointError, match=r"cannot be of a table of|cannot become of|cannot be read"):
            act(path)


def test_many_tables_together_claim_no_more_than_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sd = SD({f"n{size}": torch.ones(size) for size in range(1, 30)})
    for size in range(1, 30):
        sd.reserve(15, shape=(size,))
    pdrs.save(sd, path)
    parts = Parts.of(path)
    fields = parts.metadata()
    fields["capacities"] = {name: (8 << 20) // (4 * size) for size, name in enumerate(fields["capacities"], 1)}
    assert len(fields["capacities"]) == 29
    path.write_bytes(parts.put_together(fields))
    with pytest.raises(pdrs.CheckpointError, match=r"would have \d+ bytes, and the files have \d+"):
        pdrs.open(path)
