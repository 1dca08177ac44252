"""What a path leads to: folders as other tools write them, shards of torch's files, dicts around a state dict, and no
checkpoint at all.

The bugs that this hunts: weights of another file than the one that was meant, an error that tells of bytes where it
should say what the file is, a way in that one command has and another lacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import pdrs
from console import run


def write(path: Path, value: float = 1.0, name: str = "w") -> None:
    """Write a file that is as its name says: a single one, or an index with its shards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{n}": torch.full((2,), value) for n in range(2)}
    if ".index." not in path.name:
        save_one(tensors, path)
        return
    stem, ending = path.name.split(".")[:2]
    shards = {key: f"{stem}-{n:05}-of-00002.{ending}" for n, key in enumerate(tensors, 1)}
    for key, shard in shards.items():
        save_one({key: tensors[key]}, path.with_name(shard))
    path.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": shards}))


def save_one(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def value_in(path: Path | str) -> float:
    """Return the value that all tensors have, as every way to read a checkpoint finds it."""
    sd = pdrs.open(path, verify=True)
    assert list(sd) == ["w.0", "w.1"]
    module = pdrs.ParameterDict({"w.0": torch.zeros(2), "w.1": torch.zeros(2)})
    assert not any(pdrs.load(path, module, verify=True))
    assert all(torch.equal(module[name], sd[name]) for name in sd)
    return float(sd["w.0"].detach()[0])


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.bin.index.fp16.json",
        "pytorch_lora_weights.safetensors",
        "open_clip_pytorch_model.bin",
        "words.safetensors",
        "words.safetensors.index.json",
        "epoch=3.ckpt",
        "weights.pth",
    ],
)
def test_the_checkpoint_of_a_folder_is_found_whatever_tool_wrote_it(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    for other in ("config.json", "tokenizer.json", "README.md", "vocab.txt", "adapter_config.json", ".gitattributes"):
        (tmp_path / other).write_text("{}")
    for other in (
        "optimizer.pt",
        "scheduler.bin",
        "rng_state_0.pth",
        "training_args.bin",
        "scaler.pt",
        "optimizer_1.bin",
    ):
        torch.save({"other": torch.ones(1)}, tmp_path / other)
    for path in (tmp_path, f"{tmp_path}/", os.fsencode(tmp_path)):
        assert value_in(path) == 1.0
    for command in ("inspect", "verify"):
        assert run([command, str(tmp_path)]) == 0
    for layout in ("archive", "named", "torch"):
        out = tmp_path / "out" / layout
        out.parent.mkdir(exist_ok=True)
        assert run(["convert", str(tmp_path), str(out), "--layout", layout]) == 0
        assert value_in(out) == 1.0


@pytest.mark.parametrize(
    ("meant", "others"),
    [
        ("model.safetensors", ["pytorch_model.bin", "model.fp16.safetensors", "other.safetensors", "consolidated.pth"]),
        ("model.safetensors", ["pytorch_model.bin.index.json"]),
        ("model.safetensors.index.json", ["pytorch_model.bin.index.json", "consolidated.safetensors"]),
        ("pytorch_model.bin", ["pytorch_model.fp16.bin"]),
        ("adapter_model.safetensors", ["adapter_model.bin", "checkpoint-5/adapter_model.safetensors"]),
        ("words.safetensors", ["words.pt", "other.pt"]),
        ("unet.safetensors.index.json", ["unet.safetensors.index.fp16.json"]),
    ],
)
def test_of_several_files_that_is_taken_which_the_tools_take(meant: str, others: list[str], tmp_path: Path) -> None:
    for other in others:
        write(tmp_path / other, 2.0)
    write(tmp_path / meant)
    assert value_in(tmp_path) == 1.0


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "adapter_model.safetensors"),
        ("model.safetensors", "model_1.safetensors"),
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.fp16.safetensors", "model.bf16.safetensors"),
        ("a.safetensors", "b.safetensors"),
        ("a.pt", "b.pth"),
        ("step-0.ckpt", "step-1.ckpt"),
    ],
)
def test_a_folder_with_several_checkpoints_is_refused_and_says_which(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(pdrs.CheckpointError, match="more than one checkpoint") as caught:
        pdrs.open(tmp_path)
    assert all(repr(name) in str(caught.value) for name in names)


def test_an_index_of_the_one_file_beside_it_is_no_other_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(("w.0", "w.1"), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert value_in(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no safetensors, no index of shards, and no state dict of torch"),
        (["model.gguf"], "it has 'model.gguf'"),
        (["model-00001-of-00002.safetensors"], "shards, such as 'model-00001-of-00002.safetensors', but no index"),
        (["unet/diffusion_pytorch_model.safetensors", "vae/model.bin"], "there are some in 'unet', 'vae'"),
        (["snapshots/0f3a/model.safetensors", "refs/main"], "there are some in 'snapshots/0f3a'"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch_save"),
        (["training_args.bin", "optimizer.pt"], "no state dict of torch"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_has(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(pdrs.CheckpointError, match="the folder has no checkpoint") as caught:
        pdrs.open(tmp_path)
    assert said in str(caught.value)


def test_a_cache_of_links_is_a_folder_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "model.safetensors.index.json")
    (tmp_path / "snapshot").mkdir()
    for number, blob in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / blob.name).symlink_to(f"../blobs/{number}")
    assert value_in(tmp_path / "snapshot") == 1.0


def test_an_archive_in_a_folder_can_be_continued(tmp_path: Path) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2)})
    pdrs.save(sd, tmp_path / "model.safetensors")
    pdrs.save(sd, tmp_path / "later", since=tmp_path)
    assert pdrs.open(tmp_path / "later")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("layout", ["archive", "named"])
def test_a_path_that_ends_like_that_of_a_folder_is_not_written(layout: Any, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        pdrs.save(pdrs.ParameterDict({"a": torch.ones(2)}), f"{tmp_path}/new/", layout=layout)
    assert list(tmp_path.iterdir()) == []


# -- shards of torch's files -------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin.index.json"
    write(path)
    return path


def test_shards_of_torch_are_read_like_one_file(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (shards, shards.parent / "pytorch_model.bin"):
        assert value_in(path) == 1.0
        assert run(["inspect", "--json", str(path)]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["format"], shown["names"], shown["verified"]) == ("sharded torch", 2, True)
        assert [shard["names"] for shard in shown["shards"]] == [1, 1]
    first = shards.parent / "pytorch_model-00001-of-00002.bin"
    assert run(["convert", str(shards), str(first)]) == 1
    data = first.read_bytes()
    ones = torch.ones(2).numpy().tobytes()
    assert data.count(ones) == 1
    first.write_bytes(data.replace(ones, bytes(8)))
    with pytest.raises(pdrs.CheckpointError, match="checksum differs"):
        pdrs.open(shards, verify=True)


def test_an_index_that_does_not_fit_its_shards_of_torch_is_refused(shards: Path) -> None:
    first, second = sorted(shards.parent.glob("*.bin"))
    good = json.loads(shards.read_text())["weight_map"]
    for weight_map, said in (
        (good | {"w.2": first.name}, f"the shard '{first.name}' has no tensor 'w.2'"),
        (good | {"w.2": "gone.bin"}, "the shard 'gone.bin' is not there"),
        (good | {"w.2": "../x.bin"}, "is no file in the folder of the index"),
        (good | {"w.2": "s"}, "some of its shards are of torch.save, and others of safetensors"),
        ({"w.2": "s"} | good, "some of its shards are of torch.save, and others of safetensors"),
    ):
        safetensors.torch.save_file({"w.2": torch.ones(1)}, shards.parent / "s")
        shards.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(pdrs.CheckpointError) as caught:
            pdrs.open(shards)
        assert said in str(caught.value)
    torch.save({"w.0": torch.ones(2), "unlisted": torch.ones(1)}, first)
    shards.write_text(json.dumps({"weight_map": good}))
    assert value_in(shards) == 1.0
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(pdrs.CheckpointError, match=rf"{second.name}: it is a pointer of Git LFS"):
        pdrs.open(shards)


# -- a dict around a state dict ----------------------------------------------------------------------------------------

STATE = {"w.0": torch.ones(2), "w.1": torch.ones(2)}


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        ({"state_dict": STATE, "epoch": 3, "callbacks": {}}, "state_dict"),
        ({"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{}]}}, "model"),
        ({"ema": {"model": STATE, "decay": 0.9}}, ("ema", "model")),
        ({"ema": {"model": STATE}}, ["ema", "model"]),
        ({"a.b": {"": STATE}}, ("a.b", "")),
    ],
)
def test_a_state_dict_in_a_dict_is_read_by_its_key_and_the_error_without_names_it(
    saved: dict[str, Any], key: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(saved, path)
    shown = key if isinstance(key, str) else tuple(key)
    for refused in (lambda: pdrs.open(path), lambda: pdrs.load(path, pdrs.ParameterDict())):
        with pytest.raises(pdrs.CheckpointError, match="expected a state dict of tensors by name") as caught:
            refused()
        assert f"give key={shown!r}" in str(caught.value)
    options = [part for one in ([key] if isinstance(key, str) else key) for part in ("--key", one)]
    for at in (path, tmp_path):
        assert {name: row.tolist() for name, row in pdrs.open(at, key=key).items()} == {"w.0": [1, 1], "w.1": [1, 1]}
        module = pdrs.ParameterDict()
        assert not any(pdrs.load(at, module, key=key, verify=True))
        assert list(module) == ["w.0", "w.1"]
        for command in ("inspect", "verify"):
            assert run([command, str(at), *options]) == 0
    capsys.readouterr()
    for layout in ("archive", "named", "torch"):
        assert run(["convert", str(path), str(tmp_path / "out"), "--layout", layout, *options]) == 0
        assert value_in(tmp_path / "out") == 1.0
    assert run(["inspect", str(path)]) == 1
    assert "give key=" in capsys.readouterr().err


def test_a_key_that_leads_nowhere_is_refused_with_those_that_lead_somewhere(tmp_path: Path) -> None:
    path, other = tmp_path / "f.pt", tmp_path / "f.safetensors"
    looped: dict[str, Any] = {"model": STATE, "n": 3, "list": [STATE]}
    looped["self"] = looped
    torch.save(looped, path)
    for key in ("module", ("model", "w.0", "x"), ("n", "x"), ("model", "x")):
        with pytest.raises(KeyError, match=r"there is nothing at key=.*give key='model'"):
            pdrs.open(path, key=key)
    for key, said in (("n", "found an int"), ("list", "found a list"), (("self", "n"), "found an int")):
        with pytest.raises(pdrs.CheckpointError, match=f"expected a state dict at key=.*, {said}.*give key='model'"):
            pdrs.open(path, key=key)
    for wrong in (3, ["model", 3], b"model"):
        with pytest.raises(TypeError, match="expected key as a str or a sequence of str"):
            pdrs.open(path, key=wrong)  # type: ignore[arg-type]  # that is what is tried
    save_one(STATE, other)
    for file in (other, tmp_path / "archive"):
        pdrs.save(pdrs.ParameterDict(STATE), tmp_path / "archive")
        with pytest.raises(ValueError, match=r"key= is for what torch\.save wrote"):
            pdrs.open(file, key="model")
    torch.save({"w.0": torch.ones(2), "extra": None}, path)
    with pytest.raises(pdrs.CheckpointError, match=r"found NoneType at 'extra'$"):
        pdrs.open(path)


# -- what is no checkpoint ---------------------------------------------------------------------------------------------


def saved_by(save: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        save(folder / "made")
        (made,) = folder.glob("made*")
        return made.read_bytes()

    return make


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "it is a page of HTML"),
        (b"\xef\xbb\xbf\r\n<HTML><body>503", "it is a page of HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "HTML or XML"),
        (b"Entry not found", "it is a text, which begins 'Entry not found'"),
        (b"Invalid username or password.\n", "it is a text, which begins 'Invalid username"),
        (b'{"error": "gone"}', "it is JSON"),
        (b"GGUF\x03\0\0\0" + bytes(90), "the format GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "the format HDF5"),
        (b"\x1f\x8b\x08\0" + bytes(90), "compressed by gzip"),
        (bytes(257) + b"ustar" + bytes(250), "an archive of tar"),
        (saved_by(lambda path: np.save(path, np.ones(2))), "numpy.save"),
        (saved_by(lambda path: np.savez(path, a=np.ones(2))), "numpy.savez"),
        (saved_by(lambda path: torch.jit.script(nn.Linear(2, 2)).save(path)), "TorchScript"),
        (
            saved_by(lambda path: torch.save(nn.Linear(2, 2), path)),
            "Linear was not an allowed.*add_safe_globals.*state_dict",
        ),
        (saved_by(lambda path: torch.save([1], path)), "found a list"),
        (b"PK\x03\x04" + bytes(90), "torch.load cannot read it.*truncated, damaged, or of another kind"),
    ],
)
@pytest.mark.parametrize("name", ["f.safetensors", "f.bin", "f"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_what_a_file_is_that_is_no_checkpoint_is_said(
    content: bytes | Callable[[Path], bytes], said: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(pdrs.CheckpointError, match=said) as caught:
        pdrs.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "header" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(pdrs.CheckpointError, match="a pointer of Git LFS"):
        pdrs.open(tmp_path)
