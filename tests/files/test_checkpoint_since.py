"""Deltas: what is saved `since` another archive has what changed, and opens as what was saved.

The bugs that this hunts: a change that is not noticed, because an optimizer made it in place, or the row moved, or the
table grew; a delta that writes nearly everything; a chain that is read though one of its files is another one by now; a
file that is replaced though others need it; a chain that can be saved and not opened.
"""

from __future__ import annotations

import inspect
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pdrs
from archives import Parts
from console import run
from pdrs.checkpoint import verify

COUNT = 5000


def _names(count: int = COUNT) -> list[str]:
    return [f"word.{n}" for n in range(count)]


def _stacked() -> pdrs.StackedParameterDict:
    torch.manual_seed(0)
    return pdrs.StackedParameterDict.from_tensor(_names(), torch.randn(COUNT, 16))


def _entries() -> pdrs.ParameterDict:
    return _stacked().unstack()


def _assert_opens_as(path: Path, expected: object) -> None:
    opened = pdrs.open(path, verify=True)
    assert list(opened) == list(expected)
    for name in opened:
        assert torch.equal(opened[name], expected[name]), name


BOTH = pytest.mark.parametrize("make", [_stacked, _entries])


@BOTH
def test_one_percent_of_the_rows_is_three_percent_of_the_bytes_at_most(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    saved = make()
    full = pdrs.save(saved, tmp_path / "0")
    for name in torch.randperm(COUNT)[: COUNT // 100].tolist():
        with torch.no_grad():
            saved[f"word.{name}"].add_(1)
    assert pdrs.save(saved, tmp_path / "1", since=tmp_path / "0") <= 0.03 * full
    _assert_opens_as(tmp_path / "1", saved)


@BOTH
def test_names_that_come_and_go_cost_little(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    saved = make()
    full = pdrs.save(saved, tmp_path / "0")
    saved.popitem(last=False)
    saved.pop("word.77")
    del saved["word.4000"]
    saved["new"] = torch.ones(16)
    saved["other"] = torch.ones(16)
    assert pdrs.save(saved, tmp_path / "1", since=tmp_path / "0") <= 0.03 * full
    _assert_opens_as(tmp_path / "1", saved)


def test_a_table_that_has_doubled_for_one_name_costs_little(tmp_path: Path) -> None:
    sd = _stacked()
    full = pdrs.save(sd, tmp_path / "0")
    sd["new"] = torch.ones(16)
    assert len(sd.table((16,))) == 2 * COUNT
    assert pdrs.save(sd, tmp_path / "1", since=tmp_path / "0") <= 0.03 * full
    _assert_opens_as(tmp_path / "1", sd)
    assert len(pdrs.open(tmp_path / "1").table((16,))) == 2 * COUNT


@pytest.mark.parametrize("sparse", [False, True])
def test_what_an_optimizer_changed_in_place_is_seen(sparse: bool, tmp_path: Path) -> None:
    sd = _stacked()
    pdrs.save(sd, tmp_path / "0")
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        sd.gather([f"word.{step}", f"word.{10 * step}"], sparse=sparse).sum().backward()
        optimizer.step()
        pdrs.save(sd, tmp_path / str(step), since=tmp_path / str(step - 1))
        _assert_opens_as(tmp_path / str(step), sd)


CHANGES: dict[str, Callable[[pdrs.StackedParameterDict], object]] = {
    "nothing": lambda sd: None,
    "a table that grows": lambda sd: sd.update({f"new.{n}": torch.randn(16) for n in range(COUNT)}),
    "rows that move": lambda sd: (sd.drop(_names()[: COUNT // 2]), sd.compact()),
    "one row that moves": lambda sd: (sd.pop("word.4999"), sd.pop("word.3"), sd.compact()),
    "all names gone": lambda sd: sd.clear(),
    "another table": lambda sd: sd.update({"x": torch.ones(3), "y": torch.ones(2, 2)}),
    "another shape for a name": lambda sd: sd.update({"word.5": torch.ones(3)}),
    "another order": lambda sd: sd.update([(name, sd.pop(name)) for name in _names()[:100]]),
    "another dtype": lambda sd: sd.double(),
    "a value that is not a number": lambda sd: sd.table((16,)).data[7].fill_(float("nan")),
    "the sign of zero": lambda sd: sd.table((16,)).data[7].fill_(-0.0),
    "frozen": lambda sd: sd.update({"f": nn.Parameter(torch.ones(16), requires_grad=False)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_comes_through(change: str, tmp_path: Path) -> None:
    sd = _stacked()
    sd.table((16,)).data[7].zero_()
    pdrs.save(sd, tmp_path / "0")
    CHANGES[change](sd)
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    opened = pdrs.open(tmp_path / "1", verify=True)
    assert list(opened) == list(sd)
    state, expected = opened.state_dict(), sd.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        assert state[name].dtype == expected[name].dtype
        assert state[name].view(torch.uint8).tolist() == expected[name].view(torch.uint8).tolist(), name
    # The table goes to a full archive, and to the next delta, as any.
    pdrs.save(opened, tmp_path / "2", since=tmp_path / "1")
    pdrs.save(opened, tmp_path / "full")
    assert pdrs.open(tmp_path / "full").state_dict()["_extra_state"].tolist() == expected["_extra_state"].tolist()


def test_a_change_back_to_what_was_is_a_change(tmp_path: Path) -> None:
    sd = _stacked()
    pdrs.save(sd, tmp_path / "0")
    before = sd["word.9"].detach().clone()
    sd["word.9"] = torch.ones(16)
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    sd["word.9"] = before
    pdrs.save(sd, tmp_path / "2", since=tmp_path / "1")
    _assert_opens_as(tmp_path / "2", sd)


def test_a_module_with_buffers_and_scalars_has_deltas(tmp_path: Path) -> None:
    model = nn.ModuleDict({"w": _entries(), "n": nn.BatchNorm1d(3), "l": nn.Linear(3, 2)})
    pdrs.save(model, tmp_path / "0")
    model["n"](torch.randn(4, 3))
    pdrs.save(model, tmp_path / "1", since=tmp_path / "0")
    other = nn.ModuleDict({"w": pdrs.ParameterDict(), "n": nn.BatchNorm1d(3), "l": nn.Linear(3, 2)})
    pdrs.load(tmp_path / "1", other, verify=True)
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_training_what_a_chain_opened_leaves_the_chain_alone(tmp_path: Path) -> None:
    sd = _stacked()
    pdrs.save(sd, tmp_path / "0")
    sd["word.3"] = torch.ones(16)
    pdrs.save(sd, tmp_path / "1", since=tmp_path / "0")
    before = [(tmp_path / name).read_bytes() for name in "01"]
    opened = pdrs.open(tmp_path / "1")
    with torch.no_grad():
        opened.table((16,)).add_(1)
    pdrs.save(opened, tmp_path / "2", since=tmp_path / "1")
    assert [(tmp_path / name).read_bytes() for name in "01"] == before
    _assert_opens_as(tmp_path / "2", opened)


def _chain(folder: Path) -> pdrs.StackedParameterDict:
    sd = _stacked()
    pdrs.save(sd, folder / "0")
    for step in range(1, 4):
        sd[f"word.{step}"] = torch.full((16,), float(step))
        sd[f"new.{step}"] = torch.ones(16)
        pdrs.save(sd, folder / str(step), since=folder / str(step - 1))
    return sd


def test_a_chain_opens_wherever_its_folder_is_and_a_full_save_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    sd = _chain(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    _assert_opens_as(tmp_path / "b" / "3", sd)
    assert "new.1" not in pdrs.open(tmp_path / "b" / "0")
    pdrs.save(pdrs.open(tmp_path / "b" / "3"), tmp_path / "b" / "whole")
    for step in range(4):
        (tmp_path / "b" / str(step)).unlink()
    _assert_opens_as(tmp_path / "b" / "whole", sd)


def test_a_missing_or_replaced_predecessor_is_told(tmp_path: Path) -> None:
    sd = _chain(tmp_path)
    kept = (tmp_path / "1").read_bytes()
    (tmp_path / "1").unlink()
    with pytest.raises(pdrs.CheckpointError, match=r"2: it continues .*1, which is not there"):
        pdrs.open(tmp_path / "3")
    pdrs.save(sd, tmp_path / "1")
    with pytest.raises(pdrs.CheckpointError, match=r"2: it continues .*1, which has been replaced"):
        pdrs.open(tmp_path / "3")
    (tmp_path / "1").write_bytes(kept)
    _assert_opens_as(tmp_path / "3", sd)


def test_a_chain_without_a_beginning_is_refused(tmp_path: Path) -> None:
    _chain(tmp_path)
    shutil.copy(tmp_path / "3", tmp_path / "0")
    with pytest.raises(pdrs.CheckpointError, match=r"replaced|no beginning"):
        pdrs.open(tmp_path / "3")


def test_what_would_break_a_chain_is_refused(tmp_path: Path) -> None:
    sd = _chain(tmp_path)
    for path in ("0", "2", "3"):
        with pytest.raises(ValueError, match="cannot be replaced"):
            pdrs.save(sd, tmp_path / path, since=tmp_path / "3")
    (tmp_path / "link").symlink_to(tmp_path / "1")
    with pytest.raises(ValueError, match="cannot be replaced"):
        pdrs.save(sd, tmp_path / "link", since=tmp_path / "3")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="in the folder of the new file"):
        pdrs.save(sd, tmp_path / "elsewhere" / "4", since=tmp_path / "3")
    with pytest.raises(FileNotFoundError):
        pdrs.save(sd, tmp_path / "4", since=tmp_path / "missing")
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "elsewhere", "link"]
    _assert_opens_as(tmp_path / "3", sd)


def test_a_save_that_fails_leaves_what_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd = _chain(tmp_path)
    (tmp_path / "4").write_bytes(b"old")
    sd["word.9"] = torch.zeros(16)
    write, calls, fails_at = os.write, 0, -1

    def failing(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    pdrs.save(sd, tmp_path / "5", since=tmp_path / "3")
    monkeypatch.undo()
    total = calls
    for at in range(1, total + 1):
        calls, fails_at = 0, at
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(OSError, match="No space left"):
            pdrs.save(sd, tmp_path / "4", since=tmp_path / "3")
        monkeypatch.undo()
        assert (tmp_path / "4").read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "4", "5"]
    assert total >= 3


def test_a_table_that_only_became_shorter_has_a_delta(tmp_path: Path) -> None:
    stacked = _stacked()
    pdrs.save(stacked, tmp_path / "a")
    for name in _names()[3000:]:
        del stacked[name]
    stacked.compact()
    assert pdrs.save(stacked, tmp_path / "b", since=tmp_path / "a") < 100_000
    _assert_opens_as(tmp_path / "b", stacked)


def test_chains_are_saved_and_opened_through_symbolic_links(tmp_path: Path) -> None:
    stacked = _stacked()
    links = tmp_path / "links"
    links.mkdir()
    pdrs.save(stacked, tmp_path / "a")
    (links / "first").symlink_to(tmp_path / "a")
    with torch.no_grad():
        stacked["word.7"].fill_(1)
    pdrs.save(stacked, tmp_path / "b", since=links / "first")
    _assert_opens_as(tmp_path / "b", stacked)
    (links / "second").symlink_to(tmp_path / "b")
    _assert_opens_as(links / "second", stacked)


# -- long chains -------------------------------------------------------------------------------------------------------


def _long_chain(folder: Path, count: int) -> pdrs.StackedParameterDict:
    """Save a dictionary, and so many deltas, in which one row and the names change in turn."""
    sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(40)], torch.zeros(40, 3))
    pdrs.save(sd, folder / "0", sync=False)
    for number in range(1, count):
        if number % 2:
            sd["n0"] = torch.full((3,), float(number))
        else:
            sd.pop(f"n{number}", None)
        pdrs.save(sd, folder / str(number), since=folder / str(number - 1), sync=False)
    return sd


@contextmanager
def _limited(frames: int, files: int) -> Iterator[None]:
    """Let Python go only so much deeper, and open only so many files more."""
    depth = len(inspect.stack())
    recursion, descriptors = sys.getrecursionlimit(), resource.getrlimit(resource.RLIMIT_NOFILE)
    sys.setrecursionlimit(depth + frames)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + files, descriptors[1]))
    try:
        yield
    finally:
        sys.setrecursionlimit(recursion)
        resource.setrlimit(resource.RLIMIT_NOFILE, descriptors)


def test_a_chain_that_was_saved_opens_however_deep_and_however_few_files_may_be_open(tmp_path: Path) -> None:
    expected = _long_chain(tmp_path, 60)
    with _limited(frames=90, files=40):
        opened = pdrs.open(tmp_path / "59")
        read = pdrs.open(tmp_path / "59", device="cpu", verify=True)
        verify(tmp_path / "59")
        module = pdrs.ParameterDict()
        pdrs.load(tmp_path / "59", module)
        pdrs.save(expected, tmp_path / "60", since=tmp_path / "59", sync=False)
    assert run(["inspect", str(tmp_path / "59")]) == 0
    for found in (opened, read, module):
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_of_a_long_chain_that_is_replaced_while_it_is_read_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _long_chain(tmp_path, 30)
    first, really, opened = tmp_path / "0", os.open, 0

    def replacing(path: Any, *arguments: Any) -> int:
        nonlocal opened
        opened += path == str(first)
        if opened == 2:
            data = first.read_bytes()
            first.unlink()
            first.write_bytes(data)
            opened += 1
        return really(path, *arguments)

    monkeypatch.setattr(os, "open", replacing)
    with pytest.raises(pdrs.CheckpointError, match="0: the file has been replaced while it was read"):
        pdrs.open(tmp_path / "29")
    assert opened > 2


@pytest.mark.parametrize("damage", ["gone", "a folder", "a cycle"])
def test_what_is_wrong_deep_in_a_long_chain_is_told_of_the_file_where_it_is(damage: str, tmp_path: Path) -> None:
    _long_chain(tmp_path, 30)
    (tmp_path / "4").unlink()
    message = "5: it continues .*4, which is not there"
    if damage == "a folder":
        (tmp_path / "4").mkdir()
    if damage == "a cycle":
        (tmp_path / "4").symlink_to("20")
        message = "5: the archives that continue each other have no beginning"
    with pytest.raises(pdrs.CheckpointError, match=message):
        pdrs.open(tmp_path / "29")


def test_a_chain_that_could_not_be_read_is_not_made_longer(tmp_path: Path) -> None:
    sd = _long_chain(tmp_path, 2)
    # To save a thousand files takes half a minute.
    parts = Parts.of(tmp_path / "1")
    parts.tensors.clear()
    fields = parts.metadata()
    parts.header = {"__metadata__": {}}
    for name, (_, shape, total) in fields["tensors"].items():
        fields["tensors"][name] = ["same", shape, total]
    fields["sums"] = {}
    before = Parts.of(tmp_path / "1").metadata()["id"]
    for number in range(2, 1001):
        fields["since"] = {"file": str(number - 1), "id": before}
        before = fields["id"] = f"{number:032}"
        (tmp_path / str(number)).write_bytes(parts.put_together(fields))
    assert len(pdrs.open(tmp_path / "999")) == len(sd)
    with pytest.raises(ValueError, match="continues 999 archives, which is the most: save without since"):
        pdrs.save(sd, tmp_path / "new", since=tmp_path / "999")
    assert not (tmp_path / "new").exists()
    with pytest.raises(pdrs.CheckpointError, match="1000: it continues 1000 archives or more: save without since"):
        pdrs.open(tmp_path / "1000")
