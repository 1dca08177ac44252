"""Single files: written atomically, mapped copy-on-write, and read as safetensors reads them.

The bugs that this hunts: a failure that costs the old file, a temporary file that stays, a tensor that is written in
another order than that of its elements, a write that reaches the file through a map, a tensor that keeps all others in
memory or in a checkpoint.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import pdrs
from states import State

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(count).to(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> int:
    return pdrs.save(State(tensors), path, **options)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        raw = [
            side.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            for side in (tensor, other[name])
        ]
        assert torch.equal(*raw), name


# -- written and read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_as_safetensors_reads_it_and_the_other_way_round(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {"x": torch.arange(24, dtype=torch.uint8).view(torch.bool if dtype is torch.bool else dtype)}
    if dtype is torch.bool:
        tensors["x"] = torch.arange(24) % 3 == 0
    write(tmp_path / "ours", tensors)
    same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    same(dict(pdrs.open(tmp_path / "theirs")), tensors)


def test_shapes_strides_and_names_of_all_kinds_survive(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "turned": numbers(2, 3).t(),
        "none": torch.empty(0, 7),
        'a"b\\c\n\u20ac\U0001f600': numbers(8)[::2],
        "expanded": torch.ones(1).expand(3, 4),
        "conjugate": torch.complex(numbers(4), numbers(4)).conj(),
        "negative": torch.complex(numbers(4), numbers(4)).conj().imag,
        "parameter": nn.Parameter(numbers(3)),
        "odd": numbers(3, dtype=torch.uint8),
        "after odd": numbers(5, dtype=torch.float64),
        "not an _extra_state": numbers(40, dtype=torch.uint8),
        "x._extra_state": numbers(40, dtype=torch.uint8),
    }
    path = tmp_path / "a.safetensors"
    assert write(path, tensors) == path.stat().st_size
    for options in ({}, {"device": "cpu"}, {"verify": True}):
        same(dict(pdrs.open(path, **options)), tensors)
    same(dict(pdrs.open(path, names=["odd", "none"])), {name: tensors[name] for name in ("odd", "none")})


def test_large_tensors_that_are_not_contiguous_are_written_in_c_order(tmp_path: Path) -> None:
    # More than the 64 MB that are copied at once.
    tensors = {"a": numbers(5000, 4000).t(), "b": numbers(1, 3000, 6000).transpose(1, 2), "c": numbers(40_000_000)[::2]}
    write(tmp_path / "f", tensors)
    found = pdrs.open(tmp_path / "f")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# -- copy-on-write maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 1 << 20], ids=["read", "mapped"])
def test_writing_to_a_tensor_changes_neither_the_file_nor_what_is_opened_later(tmp_path: Path, count: int) -> None:
    path = tmp_path / "f"
    write(path, {"small": numbers(3, dtype=torch.uint8), "x": numbers(count)})
    before = path.read_bytes()
    first, second = pdrs.open(path), pdrs.open(path)
    with torch.no_grad():
        first["x"].fill_(-1)
    assert torch.equal(second["x"], numbers(count))
    assert torch.equal(pdrs.open(path)["x"], numbers(count))
    assert path.read_bytes() == before
    alone = io.BytesIO()
    torch.save(first.get_parameter(f"float32_{count}"), alone)
    assert len(alone.getvalue()) < 4 * count + 10_000, "it keeps no other tensor"


def test_errors_of_files_can_be_pickled_and_are_value_errors() -> None:
    error = pickle.loads(pickle.dumps(pdrs.CheckpointError("a/b", "is damaged")))
    assert isinstance(error, ValueError)
    assert (str(error), error.path) == ("a/b: is damaged", "a/b")


# -- all or nothing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """Give a file that must be there unchanged when the test ends, with nothing beside it."""
    path = tmp_path / "f.safetensors"
    write(path, {"x": numbers(100)})
    before = path.read_bytes()
    yield path
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_names_and_dtypes_that_the_format_does_not_allow_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="'__metadata__'"):
        write(saved, {"__metadata__": numbers(1)})
    with pytest.raises(ValueError, match=r"valid Unicode, got 'a\\ud800'"):
        write(saved, {"a\ud800": numbers(1)})
    with pytest.raises(TypeError, match=r"no dtype like torch.complex128, of which 'z' is"):
        write(saved, {"z": numbers(1, dtype=torch.complex128)})


@pytest.mark.parametrize("layout", ["archive", "named"])
@pytest.mark.parametrize("function", ["write", "fsync", "replace", "fchmod", "open"])
def test_an_error_of_the_system_leaves_no_trace_and_names_the_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, function: str, layout: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write(saved, {"x": numbers(3)}, layout=layout)
    monkeypatch.undo()
    assert caught.value.filename == str(saved)


@pytest.mark.parametrize("calls", range(3))
def test_an_interrupt_leaves_no_trace(saved: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    really, left = os.write, calls

    def interrupted(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(saved, {"x": numbers(3), "y": numbers(3)})


def test_a_system_that_writes_less_than_it_was_asked_to_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, again = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda descriptor, data: really(descriptor, data[:1000]))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: again(descriptor, data[:100], at))
    write(tmp_path / "f", {"x": numbers(5000)})
    monkeypatch.undo()
    assert torch.equal(pdrs.open(tmp_path / "f", verify=True)["x"], numbers(5000))


def test_a_tensor_that_grows_while_it_is_saved_costs_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, grown = os.write, nn.Parameter(numbers(10))

    def write_and_grow(*arguments: Any) -> int:
        grown.data = numbers(20)
        return really(*arguments)

    monkeypatch.setattr(os, "write", write_and_grow)
    with pytest.raises(RuntimeError, match="the size of 'x' was changed while it was saved"):
        write(saved, {"x": grown})


def test_folders_and_missing_folders_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path, {"x": numbers(1)})
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError) as missing:
        write(tmp_path / "no" / "f", {"x": numbers(1)})
    assert missing.value.filename == str(tmp_path / "no" / "f")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not an ordinary file"):
        write(tmp_path / "pipe", {"x": numbers(1)})


def test_a_new_file_gets_the_usual_permissions_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "f"
    before = os.umask(0o027)
    try:
        write(path, {"x": numbers(1)})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write(path, {"x": numbers(2)})
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(Path("there") / "f")
    for count in (1, 2):
        write(link, {"x": numbers(count)})
        assert link.is_symlink()
        assert len(pdrs.open(tmp_path / "there" / "f")["x"]) == count
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_a_name_as_long_as_the_system_allows_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / ("\u00e9" * 127)
    write(path, {"x": numbers(1)})
    assert os.listdir(tmp_path) == [path.name]


def test_the_file_and_then_its_folder_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(*paths: Any) -> None:
        seen.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write(tmp_path / "f", {"x": numbers(1)})
    assert seen == ["file", "rename", "folder"]
    write(tmp_path / "f", {"x": numbers(1)}, sync=False)
    assert seen[3:] == ["rename"]
