"""``python -m pdrs``: what it prints, what it writes, and what it returns.

The bugs that this hunts: a conversion that loses a name or a dtype, a damaged file that is called good, a name from a
file that moves the cursor, a million lines that nobody asked for, an error that is a traceback, exit codes that lie.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import pdrs
from console import run


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].detach(), tensor.detach()), name


@pytest.fixture
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Give a model of 200 words, or of as many as a test asks for."""
    count = getattr(request, "param", 200)
    names = [f"word.{n}" for n in range(count)]
    words = pdrs.StackedParameterDict.from_tensor(names, torch.arange(4.0 * count).view(count, 4))
    return nn.ModuleDict({"words": words, "head": nn.Linear(4, 2, dtype=torch.bfloat16)})


@pytest.fixture
def named(model: nn.Module) -> dict[str, torch.Tensor]:
    head = {f"head.{name}": tensor for name, tensor in model["head"].state_dict().items()}
    return head | {f"words.{name}": row for name, row in model["words"].named_state_dict().items()}


@pytest.fixture
def archive(tmp_path: Path, model: nn.Module) -> Path:
    path = tmp_path / "model.safetensors"
    pdrs.save(model, path)
    return path


def inspected(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert run(["inspect", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_names_that_are_not_printed_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, long = 20_000, "x" * 200
    words = pdrs.StackedParameterDict.from_tensor([f"{n}{long}" for n in range(count)], torch.zeros(count, 1))
    pdrs.save(nn.ModuleDict({"words": words, "head": nn.Linear(1, 1)}), tmp_path / "f", sync=False)
    for command in (["inspect", "--no-verify", str(tmp_path / "f")], ["get", str(tmp_path / "f"), f"words.7{long}"]):
        assert run(command) == 0
        tracemalloc.start()
        assert run(command) == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Numbers for each name, and not its text.
        assert peak < 50 * count
    assert f"{count + 2:,} names" in capsys.readouterr().out


def test_inspect_shows_tables_kinds_and_the_first_names(capsys: pytest.CaptureFixture[str], archive: Path) -> None:
    assert run(["inspect", str(archive)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{archive}: archive, ")
    assert lines[1] == "202 names, 3.2 KB of values"
    assert "checksums: good" in lines
    assert "  words.float32_4  float32 [200, 4]" in lines
    assert any(line.split() == ["200", "float32", "[4]", "3.2", "KB"] for line in lines)
    assert lines[-1] == "  ... and 182 more: --all lists them, --prefix and --match choose some"
    assert len(lines) < 40


def test_inspect_prints_json_of_every_format(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path, named: dict[str, torch.Tensor]
) -> None:
    safetensors.torch.save_file(named, tmp_path / "one")
    torch.save(named, tmp_path / "t.pt")
    assert run(["convert", str(archive), str(tmp_path / "s.st"), "--layout", "named", "--max-shard-size", "1KB"]) == 0
    capsys.readouterr()
    for file, kind in (
        (archive, "archive"),
        (tmp_path / "one", "safetensors"),
        (tmp_path / "t.pt", "torch"),
        (tmp_path / "s.st", "sharded safetensors"),
    ):
        found = inspected(capsys, file, "--all")
        assert found["format"] == kind
        assert (found["names"], found["value_bytes"]) == (202, 3220)
        assert {entry["name"]: (entry["dtype"], entry["shape"]) for entry in found["entries"]} == {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in named.items()
        }
        assert {(kind["dtype"], *kind["shape"]): kind["names"] for kind in found["kinds"]} == {
            ("float32", 4): 200,
            ("bfloat16", 2, 4): 1,
            ("bfloat16", 2): 1,
        }
        assert found["verified"] is (True if kind in ("archive", "torch") else None)
        assert len(inspected(capsys, file)["entries"]) == 20


def test_json_has_an_entry_a_line(capsys: pytest.CaptureFixture[str], archive: Path) -> None:
    assert run(["inspect", "--json", "--match", "head.*", str(archive)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '    {"name": "head.weight", "dtype": "bfloat16", "shape": [2, 4]},' in lines
    assert '    {"name": "head.bias", "dtype": "bfloat16", "shape": [2]}' in lines


def test_names_are_chosen_by_prefix_and_by_pattern(capsys: pytest.CaptureFixture[str], archive: Path) -> None:
    for arguments, names in (
        (["--prefix", "head."], ["head.bias", "head.weight"]),
        (["--match", "*.9?"], [f"words.word.{n}" for n in range(90, 100)]),
        (["--prefix", "words", "--match", "*7"], [f"words.word.{n}" for n in range(7, 200, 10)]),
        (["--match", "nothing"], []),
    ):
        found = inspected(capsys, archive, "--all", *arguments)
        assert sorted(entry["name"] for entry in found["entries"]) == sorted(names)
        assert found["names"] == len(names)


def test_names_that_could_move_the_cursor_are_printed_as_python_writes_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    safetensors.torch.save_file({"\x1b[2Jgone": torch.zeros(1), "\u00fc": torch.zeros(1)}, tmp_path / "f")
    assert run(["inspect", str(tmp_path / "f")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "  '\\x1b[2Jgone'  float32 [1]" in shown
    assert "  \u00fc  float32 [1]" in shown


def test_dtypes_that_torch_does_not_have_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"123")
    found = inspected(capsys, tmp_path / "f")
    assert found["kinds"] == [{"dtype": "F6_E2M3", "shape": [4], "names": 1, "bytes": 3}]
    assert run(["verify", str(tmp_path / "f")]) == 0


@pytest.mark.parametrize("how", ["t.pt", "s.safetensors"])
def test_names_in_files_that_others_wrote_of_stacked_dictionaries_are_seen(
    how: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: nn.Module, named: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / how
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_model(model, str(path))
    found = inspected(capsys, path, "--all")
    assert {entry["name"] for entry in found["entries"]} == set(named)
    assert run(["convert", str(path), str(tmp_path / "out"), "--layout", "named"]) == 0
    same(safetensors.torch.load_file(tmp_path / "out"), named)


# -- get ---------------------------------------------------------------------------------------------------------------


def test_get_prints_values_by_name(capsys: pytest.CaptureFixture[str], archive: Path, named: dict[str, Any]) -> None:
    assert run(["get", str(archive), "words.word.7", "head.bias", "words.word.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    bias = json.dumps(named["head.bias"].tolist())
    assert lines == ["words.word.7\t[28.0, 29.0, 30.0, 31.0]", f"head.bias\t{bias}", lines[0]]
    assert run(["get", str(archive), "head.bias", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"name": "head.bias", "dtype": "bfloat16", "shape": [2], "values": named["head.bias"].tolist()}


def test_get_reads_names_from_a_pipe_and_goes_on_behind_one_that_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "words"
    pdrs.save(
        pdrs.StackedParameterDict({"é x": torch.ones(()), "c": torch.tensor([1 + 2j]), "\t": torch.ones(2)}), path
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("é x\nnope\n\nc\n\t\n"))
    assert run(["get", str(path)]) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines() == ["é x\t1.0", "c\t[[1.0, 2.0]]", "'\\t'\t[1.0, 1.0]"]
    assert errors.splitlines() == [f"pdrs: nope is not in {path}", f"pdrs:  is not in {path}"]


# -- convert -----------------------------------------------------------------------------------------------------------


# Files of many names are converted without a tensor for each.
@pytest.mark.parametrize("model", [200, 10_050], indirect=True)
@pytest.mark.slow
def test_every_format_becomes_every_other(
    tmp_path: Path, archive: Path, named: dict[str, torch.Tensor], model: nn.Module
) -> None:
    sources = {"archive": archive}
    for kind, name, options in (
        ("torch", "t.pt", []),
        ("named", "n.safetensors", ["--layout", "named"]),
        ("sharded", "s.safetensors", ["--layout", "named", "--max-shard-size", "40kb"]),
    ):
        sources[kind] = tmp_path / name
        assert run(["convert", str(archive), str(tmp_path / name), *options]) == 0
        same(dict(pdrs.open(sources[kind]).items()), named)
    for kind, source in sources.items():
        for layout in ("archive", "named", "torch"):
            target = tmp_path / f"{kind}-to-{layout}"
            assert run(["convert", str(source), str(target), "--layout", layout]) == 0
            same(dict(pdrs.open(target).items()), named)
            if layout != "archive":
                continue
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            pdrs.load(target, model)
            same({name: tensor for name, tensor in model.state_dict().items()}, before)


def test_an_archive_that_continues_others_becomes_one_in_its_own_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path, model: nn.Module
) -> None:
    with torch.no_grad():
        model["words"]["word.7"].fill_(-1)
    delta = tmp_path / "delta.safetensors"
    pdrs.save(model, delta, since=archive)
    found = inspected(capsys, delta)
    assert [os.path.basename(file) for file in found["files"]] == ["delta.safetensors", "model.safetensors"]
    assert run(["convert", str(delta), str(delta)]) == 0
    archive.unlink()
    assert run(["verify", str(delta)]) == 0
    opened = pdrs.open(delta)
    assert opened["words.word.7"].tolist() == [-1] * 4
    assert opened["words.word.8"].tolist() == [32, 33, 34, 35]


@pytest.mark.parametrize("layout", ["archive", "named", "torch"])
@pytest.mark.parametrize("through", ["itself", "symbolic link", "hard link"])
def test_what_the_input_continues_is_not_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path, model: nn.Module, through: str, layout: str
) -> None:
    middle, last = tmp_path / "middle", tmp_path / "last"
    with torch.no_grad():
        for before, after in ((archive, middle), (middle, last)):
            model["words"]["word.7"].add_(1)
            pdrs.save(model, after, since=before)
    for number, needed in enumerate((archive, middle)):
        target = needed if through == "itself" else tmp_path / f"link{number}"
        if target != needed:
            (target.symlink_to if through == "symbolic link" else target.hardlink_to)(needed)
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert run(["convert", str(last), str(target), "--layout", layout]) == 1
        said = f"pdrs: {target} is {needed}, which is needed to open {last}, and cannot be replaced\n"
        assert capsys.readouterr().err == said
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert pdrs.open(last, verify=True)["words.word.7"].tolist() == [30, 31, 32, 33]


def test_a_shard_of_the_input_is_not_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path, named: dict[str, torch.Tensor]
) -> None:
    index = tmp_path / "m.safetensors.index.json"
    options = ["--layout=named", "--max-shard-size=2KB"]
    assert run(["convert", str(archive), str(tmp_path / "m.safetensors"), *options]) == 0
    shard = next(tmp_path.glob("m-00001-of-*"))
    assert run(["convert", str(index), str(shard)]) == 1
    assert "which is needed to open" in capsys.readouterr().err
    same(dict(pdrs.open(index)), named)


def test_an_archive_of_many_tables_stays_what_it_is(tmp_path: Path) -> None:
    words = pdrs.ParameterDict({f"word.{n}": torch.full((n + 1,), float(n)) for n in range(300)})
    pdrs.save(words, tmp_path / "in")
    assert run(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    same(dict(pdrs.open(tmp_path / "out", verify=True)), dict(words))


def test_an_archive_that_is_converted_to_one_says_which_classes_were_saved(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = nn.ModuleDict({"p": pdrs.ParameterDict({"x": torch.ones(2)}), "s": pdrs.StackedParameterDict()})
    pdrs.save(model, tmp_path / "in")
    pdrs.save(model, tmp_path / "delta", since=tmp_path / "in")
    for name in ("in", "delta"):
        assert run(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 0
        capsys.readouterr()
        expected = {"p.": "ParameterDict", "s.": "StackedParameterDict"}
        assert inspected(capsys, tmp_path / "out")["dictionaries"] == expected


# -- errors ------------------------------------------------------------------------------------------------------------


def test_damaged_and_missing_files_are_said_in_one_line_with_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path
) -> None:
    data = bytearray(archive.read_bytes())
    data[4096 + 100] ^= 1  # in the table
    flipped, cut, out = tmp_path / "flipped", tmp_path / "cut", tmp_path / "out"
    flipped.write_bytes(data)
    cut.write_bytes(data[:-10])
    pickle, archived = tmp_path / "pickle.safetensors", tmp_path / "zip.safetensors"
    pickle.write_bytes(b"\x80\x02garbage......")
    archived.write_bytes(b"PK\x03\x04garbage......")
    folder = tmp_path / "folder"
    folder.mkdir()
    state, broken = tmp_path / "state.pt", tmp_path / "broken.pt"
    torch.save({"x": torch.zeros(1000)}, state)
    data = state.read_bytes()
    assert data.count(bytes(4000)) == 1
    broken.write_bytes(data.replace(bytes(4000), bytes(3999) + b"\1"))
    for arguments, said in (
        (["inspect", str(pickle)], "torch.load"),
        (["inspect", str(archived)], "torch.load"),
        (["verify", str(flipped)], "is damaged: its checksum is"),
        (["inspect", str(flipped)], "is damaged: its checksum is"),
        *((["convert", str(flipped), str(out), "--layout", to], "is damaged") for to in ("archive", "named", "torch")),
        (["verify", str(broken)], "data/0' is damaged: its checksum differs"),
        (["inspect", str(broken)], "data/0' is damaged: its checksum differs"),
        (["convert", str(broken), str(out)], "data/0' is damaged: its checksum differs"),
        (["verify", str(cut)], "of which the file has only"),
        (["convert", str(cut), str(out)], "of which the file has only"),
        (["inspect", str(tmp_path / "no")], "No such file or directory"),
        (["convert", str(archive), str(tmp_path / "no" / "out")], "No such file or directory"),
        (["inspect", str(folder)], "the folder has no checkpoint"),
        (["convert", str(archive), str(folder)], "Is a directory"),
        (["convert", str(archive), f"{out}/"], "Is a directory"),
    ):
        assert run(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"pdrs: {tmp_path}")
        assert printed.err.count("\n") == 1
        assert said in printed.err
    assert not out.exists()
    assert run(["inspect", "--no-verify", str(flipped)]) == 0
    assert "checksums: good" not in capsys.readouterr().out


def test_what_has_no_checksums_is_read_through(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "f")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    for name in ("f", "old.pt", "without.pt"):
        assert run(["verify", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}: can be read; it has no checksums\n"
    torch.save(tensors, tmp_path / "with.pt")
    assert run(["verify", str(tmp_path / "with.pt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'with.pt'}: good, all checksums are right\n"


@pytest.mark.parametrize("text", ["1000", "1000B", "1KB", "1kb", "1k", "0.001 MB", " 1e3"])
def test_sizes_are_understood(text: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", archive, tmp_path / "out", "--layout", "named", "--max-shard-size", text]
    if "e" in text:
        assert run(command) == 2
        assert "expected a size such as 500MB" in capsys.readouterr().err
        return
    assert run(command) == 0
    assert len(list(tmp_path.glob("out-*-of-00004"))) == 4, "3,200 bytes of words, and 20 of the head"


@pytest.mark.parametrize("arguments", [[], ["frob"], ["inspect"], ["convert", "a", "b", "--max-shard-size", "0"]])
def test_commands_that_are_not_understood_have_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(arguments) == 2
    assert "usage: python -m pdrs" in capsys.readouterr().err


def test_the_module_can_be_run_and_a_reader_may_stop_reading(tmp_path: Path) -> None:
    names = [f"name.{n}" for n in range(100_000)]
    pdrs.save(pdrs.StackedParameterDict.from_tensor(names, torch.zeros(100_000, 1)), tmp_path / "f")
    command = [sys.executable, "-m", "pdrs", "inspect", "--all", str(tmp_path / "f")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"{tmp_path / 'f'}: archive, ")
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"pdrs {pdrs.__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_an_interrupt_ends_each_command_without_a_traceback_and_writes_nothing(
    command: str,
    capsys: pytest.CaptureFixture[str],
    archive: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", interrupted)
    assert run([command, str(archive), *([str(archive.parent / "out")] if command == "convert" else [])]) == 130
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "pdrs: interrupted\n")
    assert os.listdir(archive.parent) == [archive.name]


def test_output_may_be_closed(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run(["inspect", str(archive)]) == 0
    assert run(["inspect", "--json", str(archive)]) == 0
