"""Safetensors files: written wholly or not at all, mapped privately, and refused when they are damaged.

The bugs that this hunts: a failure that costs the old file, a temporary file that stays, a tensor that is written in
another order than that of its elements, a write that reaches the file through a map, a tensor that keeps all others in
memory or in a checkpoint, a save that copies everything once more.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pdrs._files import atomic, safetensors_file
from pdrs._files.safetensors_file import DTYPES, PAGE, CheckpointError, NewTensor, TensorFile, write_tensors


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(count).to(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> int:
    return write_tensors(path, {"format": "pt"}, [NewTensor.of(*one) for one in tensors.items()], **options)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        raw = [
            side.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            for side in (tensor, other[name])
        ]
        assert torch.equal(*raw), name


# -- written and read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it_and_the_other_way_round(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {"x": torch.arange(24, dtype=torch.uint8).view(torch.bool if dtype is torch.bool else dtype)}
    if dtype is torch.bool:
        tensors["x"] = torch.arange(24) % 3 == 0
    write(tmp_path / "ours", tensors)
    same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    with TensorFile(tmp_path / "theirs") as file:
        same({"x": file.tensor("x")}, tensors)
        same(file.tensors(), tensors)


def test_shapes_strides_and_names_of_all_kinds_survive(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "": numbers(2, 3).t(),
        "none": torch.empty(0, 7),
        'a"b\\c\n\u20ac\U0001f600': numbers(8)[::2],
        "expanded": torch.ones(1).expand(3, 4),
        "conjugate": torch.complex(numbers(4), numbers(4)).conj(),
        "negative": torch.complex(numbers(4), numbers(4)).conj().imag,
        "parameter": torch.nn.Parameter(numbers(3)),
        "odd": numbers(3, dtype=torch.uint8),
        "behind odd": numbers(5, dtype=torch.float64),
    }
    path = tmp_path / "a.safetensors"
    size = write(path, tensors)
    assert size == path.stat().st_size
    with TensorFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert file.names == list(tensors)
        same({name: file.tensor(name) for name in file}, {name: t.detach() for name, t in tensors.items()})
        same(file.tensors(), {name: t.detach() for name, t in tensors.items()})
        same(file.tensors(["odd", "none"]), {name: tensors[name] for name in ("odd", "none")})


def test_parts_are_made_one_after_another_and_may_be_any_buffer(tmp_path: Path) -> None:
    written = []

    def parts() -> Iterator[Any]:
        for part in (numbers(4), b"\0\0\x80?", bytearray(8), numbers(2, 2).t().numpy().copy()):
            written.append(os.path.getsize(next(tmp_path.glob(".*.tmp"))))
            yield part

    write_tensors(tmp_path / "f", {}, [("x", torch.float32, (11,), parts())])
    assert written == [PAGE, PAGE + 16, PAGE + 20, PAGE + 28]
    assert TensorFile(tmp_path / "f").tensor("x").tolist() == [0, 1, 2, 3, 1, 0, 0, 0, 2, 1, 3]


def test_what_does_not_lie_in_one_piece_is_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "BLOCK", 256)
    tensors = {"a": numbers(40, 7).t(), "b": numbers(1, 30, 9).transpose(1, 2), "c": numbers(100)[::2]}
    sizes = [memoryview(piece).nbytes for tensor in tensors.values() for piece in safetensors_file.pieces_of(tensor)]
    assert max(sizes) <= 256
    write(tmp_path / "f", tensors)
    same(TensorFile(tmp_path / "f").tensors(), tensors)


def test_metadata_can_be_completed_when_all_data_are_written(tmp_path: Path) -> None:
    parts = iter([numbers(4)])
    tensor = ("x", torch.float32, (4,), parts)
    write_tensors(tmp_path / "f", {"sum": "00", "a": "b"}, [tensor], finish=lambda: {"sum": f"{len(list(parts)):02}"})
    assert TensorFile(tmp_path / "f").metadata == {"sum": "00", "a": "b"}
    write_tensors(tmp_path / "f", {"sum": "00"}, [("x", torch.float32, (), [b"1234"])], finish=lambda: {"sum": "42"})
    with TensorFile(tmp_path / "f") as file:
        assert file.metadata == {"sum": "42"}
        assert file.view(*file.offsets("x")).tolist() == list(b"1234")


# -- private maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 1 << 20], ids=["read", "mapped"])
def test_writing_to_a_tensor_changes_neither_the_file_nor_another_call(tmp_path: Path, count: int) -> None:
    path = tmp_path / "f"
    write(path, {"small": numbers(3, dtype=torch.uint8), "x": numbers(count)})
    before = path.read_bytes()
    with TensorFile(path) as file:
        first, second = file.tensor("x"), file.tensor("x")
        together = file.tensors()["x"]
    for tensor in (first, together):
        tensor.fill_(-1)
    assert torch.equal(second, numbers(count))
    assert path.read_bytes() == before
    assert first.untyped_storage().nbytes() == 4 * count


def test_tensors_outlive_the_file_and_its_replacement(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": numbers(1 << 19)})
    with TensorFile(tmp_path / "f") as file:
        mapped, read = file.tensor("x"), file.tensors()["x"]
    write(tmp_path / "f", {"x": torch.zeros(1 << 19)})
    assert torch.equal(mapped, numbers(1 << 19))
    assert torch.equal(read, numbers(1 << 19))
    with pytest.raises(ValueError, match="has been closed"):
        file.tensor("x")


def test_a_file_that_was_cut_off_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, {"small": numbers(3), "large": numbers(1 << 20)})
    with TensorFile(path) as file:
        os.truncate(path, PAGE + 4)
        for take in (lambda: file.tensor("small"), lambda: file.tensor("large"), file.tensors):
            with pytest.raises(
                CheckpointError, match=rf"f: the file has been cut off: it had \d+ bytes and has {PAGE + 4}"
            ):
                take()


def test_errors_of_files_can_be_pickled_and_are_value_errors() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("a/b", "is damaged")))
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


def test_parts_that_do_not_fit_are_refused_and_leave_no_trace(saved: Path) -> None:
    for parts, said in (([numbers(3)], "'x' have 4 bytes less than its 16"), ([numbers(3)] * 2, "more than its 16")):
        with pytest.raises(ValueError, match=said):
            write_tensors(saved, {}, [("x", torch.float32, (4,), parts)])


def test_names_and_dtypes_that_the_format_does_not_allow_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="two tensors have the name 'x'"):
        write_tensors(saved, {}, [NewTensor.of("x", numbers(1)), NewTensor.of("x", numbers(1))])
    with pytest.raises(ValueError, match="'__metadata__'"):
        write(saved, {"__metadata__": numbers(1)})
    with pytest.raises(TypeError, match=r"no dtype like torch.complex128, of which 'z' is"):
        write(saved, {"z": numbers(1, dtype=torch.complex128)})


@pytest.mark.parametrize("function", ["write", "fsync", "replace", "fchmod"])
def test_an_error_of_the_system_leaves_no_trace_and_names_the_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, function, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write(saved, {"x": numbers(3)})
    monkeypatch.undo()
    assert caught.value.filename == str(saved)


def test_an_interrupt_leaves_no_trace(saved: Path) -> None:
    def parts() -> Iterator[Any]:
        yield numbers(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(saved, {}, [("x", torch.float32, (4,), parts())])


def test_a_system_that_writes_less_than_it_was_asked_to_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.write
    monkeypatch.setattr(atomic.os, "write", lambda descriptor, data: really(descriptor, data[:1000]))
    write(tmp_path / "f", {"x": numbers(5000)})
    monkeypatch.undo()
    same(TensorFile(tmp_path / "f").tensors(), {"x": numbers(5000)})


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
        assert len(TensorFile(tmp_path / "there" / "f").tensor("x")) == count
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

    monkeypatch.setattr(atomic.os, "fsync", note_fsync)
    monkeypatch.setattr(atomic.os, "replace", note_replace)
    write(tmp_path / "f", {"x": numbers(1)})
    assert seen == ["file", "rename", "folder"]
    write(tmp_path / "f", {"x": numbers(1)}, sync=False)
    assert seen[3:] == ["rename"]


def test_names_are_chosen_by_their_end(tmp_path: Path) -> None:
    write(tmp_path / "f", {name: numbers(1) for name in ("a.end", "end", "end.b", "\u00e9end")})
    with TensorFile(tmp_path / "f") as file:
        assert file.names_ending("end") == ["a.end", "end", "\u00e9end"]
        assert file.names_ending("") == file.names
