"""Tables that are read into memory: ``pdrs.open(device="cpu")``, ``pdrs.load``, and what verifies on the way.

The bugs that this hunts: a table that still is a map of its file, and changes or dies with it; a part that is read to
the wrong place, or twice; a file that shrinks meanwhile and leaves rows with whatever was in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pdrs
from observed import Calls

# Tables of this many rows are mapped by default.
ROWS = 70_000
# The data of an archive begin here.
PAGE = 4096


@pytest.fixture(scope="module")
def sd() -> pdrs.StackedParameterDict:
    rows = torch.arange(ROWS * 8.0).reshape(ROWS, 8)
    sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(ROWS)], rows)
    sd["other"] = torch.ones(3)
    return sd


def _archive(sd: pdrs.StackedParameterDict, folder: Path) -> Path:
    pdrs.save(sd, folder / "a")
    return folder / "a"


def _named(sd: pdrs.StackedParameterDict, folder: Path) -> Path:
    pdrs.save(sd, folder / "a", layout="named")
    return folder / "a"


def _sharded(sd: pdrs.StackedParameterDict, folder: Path) -> Path:
    pdrs.save(sd, folder / "a", layout="named", max_shard_size=(ROWS * 32) // 2 + 32)
    return folder / "a"


def _delta(sd: pdrs.StackedParameterDict, folder: Path) -> Path:
    old = sd.copy()
    with torch.no_grad():
        old["n5"].zero_()
    pdrs.save(old, folder / "before")
    pdrs.save(sd, folder / "a", since=folder / "before")
    return folder / "a"


def _of_torch(sd: pdrs.StackedParameterDict, folder: Path) -> Path:
    torch.save(sd.named_state_dict(), folder / "a")
    return folder / "a"


def _overwrite(folder: Path) -> None:
    """Write to the files in place, which whoever has mapped them sees where he has not looked yet."""
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.seek(PAGE)
            file.write(b"\xff" * (path.stat().st_size - PAGE))


def _is_same(found: Any, expected: pdrs.StackedParameterDict) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in ("n5", "other"))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("write", [_archive, _named, _sharded, _delta, _of_torch])
@pytest.mark.slow
def test_what_was_read_into_memory_does_not_change_with_its_file(
    write: Callable[[pdrs.StackedParameterDict, Path], Path],
    verify: bool,
    sd: pdrs.StackedParameterDict,
    tmp_path: Path,
) -> None:
    opened = pdrs.open(write(sd, tmp_path), device="cpu", verify=verify)
    _overwrite(tmp_path)
    assert list(opened) == list(sd)
    assert torch.equal(opened.table((8,)), sd.table((8,)))
    assert torch.equal(opened["other"], sd["other"])
    with torch.no_grad():
        opened["n5"].fill_(-1)


def test_an_empty_dictionary_that_was_loaded_is_no_map_of_the_file(
    sd: pdrs.StackedParameterDict, tmp_path: Path
) -> None:
    path = _archive(sd, tmp_path)
    loaded: list[nn.Module] = [pdrs.ParameterDict(), pdrs.StackedParameterDict()]
    for module in loaded:
        pdrs.load(path, module)
    _overwrite(tmp_path)
    assert all(_is_same(module, sd) for module in loaded)


@pytest.mark.parametrize("options", [{"prefix": "w."}, {"names": ["w.n5", "w.other"]}, {"dtype": torch.float64}])
def test_part_of_a_file_and_other_dtypes_are_read_and_verified(
    options: dict[str, Any], sd: pdrs.StackedParameterDict, tmp_path: Path
) -> None:
    pdrs.save(nn.ModuleDict({"w": sd, "v": nn.Linear(2, 2)}), tmp_path / "a")
    for verify in (False, True):
        mapped = pdrs.open(tmp_path / "a", **options)
        loaded = pdrs.open(tmp_path / "a", device="cpu", verify=verify, **options)
        assert list(loaded) == list(mapped)
        for one, other in zip(loaded.parameters(), mapped.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


class _Reads:
    """Counts what is read of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        really = os.preadv

        def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
            self.sizes.append(sum(memoryview(buffer).nbytes for buffer in buffers))
            return really(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture(scope="module")
def large() -> pdrs.StackedParameterDict:
    """Give one of 20 MB, which is read in several steps."""
    rows = torch.arange(5_000_000.0).reshape(-1, 5000)
    return pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(len(rows))], rows)


def test_a_table_is_read_once_also_when_it_is_verified_and_in_steps(
    large: pdrs.StackedParameterDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _archive(large, tmp_path)
    reads = _Reads(monkeypatch)
    for verify in (False, True):
        reads.sizes.clear()
        opened = pdrs.open(path, device="cpu", verify=verify)
        assert torch.equal(opened.table((5000,)), large.table((5000,)))
        # The header, and the packed names twice.
        assert 20_000_000 < sum(reads.sizes) < path.stat().st_size + 30_000
        assert max(reads.sizes) < 10_000_000


def test_damage_is_found_while_a_table_is_read(sd: pdrs.StackedParameterDict, tmp_path: Path) -> None:
    path = _archive(sd, tmp_path)
    with path.open("r+b") as file:
        file.seek(PAGE + ROWS * 32 - 1)
        file.write(b"\x55")
    assert len(pdrs.open(path, device="cpu")) == len(sd)
    with pytest.raises(pdrs.CheckpointError, match=r"'float32_8'.* is damaged"):
        pdrs.open(path, device="cpu", verify=True)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "cpu", "verify": True}, {"verify": True}])
def test_a_file_that_shrinks_while_it_is_read_is_refused(
    options: dict[str, Any], large: pdrs.StackedParameterDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _archive(large, tmp_path)
    really = os.preadv

    def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        count = really(descriptor, buffers, offset)
        if count > 1_000_000:
            os.truncate(path, PAGE + 10_000_000)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(pdrs.CheckpointError, match="has been truncated"):
        pdrs.open(path, **options)


def test_tensors_of_any_size_are_read_whole(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(0, 3), (), (1,), (2,), (3, 3), (3_000_001,)]
    module = nn.Module()
    for n, shape in enumerate(shapes):
        module.register_buffer(f"b{n}", torch.randn(shape).double())
    pdrs.save(module, tmp_path / "f")
    for options in ({}, {"device": "cpu"}, {"device": "cpu", "verify": True}):
        found = pdrs.open(tmp_path / "f", **options)
        assert all(torch.equal(found[name], value) for name, value in module.named_buffers())


@pytest.mark.parametrize("write", [_named, _sharded, _of_torch])
@pytest.mark.slow
def test_a_dictionary_of_the_same_names_is_filled_without_a_tensor_for_each(
    write: Callable[[pdrs.StackedParameterDict, Path], Path],
    sd: pdrs.StackedParameterDict,
    tmp_path: Path,
) -> None:
    path = write(sd, tmp_path)
    names = list(sd)
    # Other rows, another order, and another dtype.
    mine = pdrs.StackedParameterDict({name: torch.zeros_like(sd[name]).half() for name in (*names[-2:], *names[9::-1])})
    part = pdrs.StackedParameterDict.from_tensor(names[10:-2], torch.zeros(len(names) - 12, 8))
    mine.update(part)
    tables = list(mine.parameters())
    versions = [table._version for table in tables]
    with Calls() as calls:
        result = pdrs.load(path, mine)
    assert calls.count < len(sd) / 10 or write is _of_torch, "torch.save wrote a tensor for each"
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert [id(table) for table in mine.parameters()] == [id(table) for table in tables]
    assert all(table._version > version for table, version in zip(tables, versions, strict=True))
    for name in (*names[:12], *names[5000::999], *names[-3:]):
        assert torch.equal(mine[name], sd[name].to(mine[name].dtype)), name


def test_a_dictionary_that_differs_is_refused_with_the_messages_of_torch(
    sd: pdrs.StackedParameterDict, tmp_path: Path
) -> None:
    rows = {"a": torch.ones(2), "b": torch.ones(3)}
    pdrs.save(pdrs.StackedParameterDict(rows), tmp_path / "f", layout="named")
    for wrong, said in (
        ({"a": torch.zeros(2)}, "Unexpected key"),
        ({"a": torch.zeros(2), "c": torch.zeros(3)}, "Missing key"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, "size mismatch for b"),
    ):
        module = pdrs.StackedParameterDict(wrong)
        with pytest.raises(RuntimeError, match=said):
            pdrs.load(tmp_path / "f", module)
    seen: list[str] = []
    hooked = pdrs.StackedParameterDict({name: torch.zeros_like(row) for name, row in rows.items()})
    hooked.register_load_state_dict_post_hook(lambda module, keys: seen.append("hook"))
    pdrs.load(tmp_path / "f", hooked)
    assert seen == ["hook"]
    assert torch.equal(hooked["b"], rows["b"])


def test_a_parameter_that_cannot_be_written_to_is_named_and_the_others_are_loaded(
    kind: type[nn.ParameterDict], tmp_path: Path
) -> None:
    pdrs.save(pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.ones(3, 2)), tmp_path / "a")
    pd = kind({"a": torch.zeros(2), "c": torch.zeros(2)})
    pd["b"] = nn.Parameter(torch.zeros(1).expand(2), requires_grad=False)
    with pytest.raises(
        RuntimeError, match=r'(?s)copying the parameter named "b".*\[2\].*\[2\].*single memory location'
    ):
        pdrs.load(tmp_path / "a", pd)
    assert [row.tolist() for row in pd.values()] == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
