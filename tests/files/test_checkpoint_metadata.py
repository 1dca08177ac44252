"""The texts that a file has beside its tensors: kept by every way from one file to another.

The bugs that this hunts: a scale that stood in the header and is gone after a conversion, so that a model computes
something else; a text that cannot be written, found out after the old file is gone; texts of one dictionary that change
with those of another.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import pdrs
from console import run

TEXTS = {
    "format": "mlx",
    "alpha": "16",
    "": "empty",
    "né\u00e9\U0001f600": "line\n\x00\"quoted\" 'ü'",
    "json": '{"r": 2}',
}
TENSORS = {"a.x": torch.ones(2, 4), "b": torch.zeros(3), "c": torch.zeros(3)}


def texts_in(path: Path) -> dict[str, str]:
    """Return what safetensors, or torch, finds."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True).__metadata__
    if path.name.endswith(".json"):
        texts = [texts_in(shard) for shard in sorted(path.parent.glob(path.name.split(".")[0] + "-*"))]
        assert len(texts) > 1
        assert all(one == texts[0] for one in texts)
        return texts[0]
    with safetensors.safe_open(path, "pt") as file:
        return {key: text for key, text in (file.metadata() or {}).items() if not key.startswith("pdrs")}


@pytest.fixture(params=["safetensors", "named", "shards", "archive", "torch", "delta"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Give a file of each kind that has the texts."""
    path = tmp_path / "source.safetensors"
    sd = pdrs.StackedParameterDict(TENSORS)
    if request.param == "safetensors":
        safetensors.torch.save_file(TENSORS, path, metadata=TEXTS)
    elif request.param == "named":
        pdrs.save(sd, path, layout="named", metadata=TEXTS)
    elif request.param == "shards":
        pdrs.save(sd, path, layout="named", metadata=TEXTS, max_shard_size=32)
        path = tmp_path / "source.safetensors.index.json"
    elif request.param == "archive":
        pdrs.save(sd, path, metadata=TEXTS)
    elif request.param == "delta":
        pdrs.save(sd, tmp_path / "before", metadata=TEXTS)
        sd["b"] = torch.ones(3)
        pdrs.save(sd, path, since=tmp_path / "before")
    else:
        safetensors.torch.save_file(TENSORS, tmp_path / "first", metadata=TEXTS)
        path = tmp_path / "source.pt"
        assert run(["convert", str(tmp_path / "first"), str(path)]) == 0
    return path


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("t.safetensors", ["--layout", "archive"]),
        ("t.safetensors", ["--layout", "named"]),
        ("t.safetensors", ["--layout", "named", "--max-shard-size", "32"]),
        ("t.pt", []),
    ],
    ids=["archive", "named", "shards", "torch"],
)
def test_a_conversion_keeps_all_texts(source: Path, target: str, options: list[str]) -> None:
    path = source.parent / target
    assert run(["convert", str(source), str(path), *options]) == 0
    assert texts_in(path if path.exists() else source.parent / f"{target}.index.json") == TEXTS
    assert pdrs.open(path).metadata == TEXTS


def test_what_is_opened_has_the_texts_and_saves_them_again(source: Path) -> None:
    sd = pdrs.open(source)
    assert sd.metadata == TEXTS
    assert pdrs.open(source, names=["b"], prefix="").metadata == TEXTS
    assert pdrs.open(source, prefix="a.", device="cpu").metadata == TEXTS
    path = source.parent / "again.safetensors"
    layouts: list[Literal["archive", "named"]] = ["archive", "named"]
    for layout in layouts:
        pdrs.save(sd, path, layout=layout)
        assert texts_in(path) == TEXTS
        for made in (sd.copy(), copy.deepcopy(sd), pickle.loads(pickle.dumps(sd)), sd | {}):
            pdrs.save(made, path, layout=layout)
            assert texts_in(path) == TEXTS
            made.metadata["alpha"] = "32"
        assert sd.metadata == TEXTS
        pdrs.save(sd, path, layout=layout, metadata={})
        assert texts_in(path) == {"format": "pt"}
    assert not any("metadata" in key for key in sd.state_dict())


def test_inspect_shows_the_texts(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["inspect", "--json", str(source)]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == TEXTS
    assert run(["inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "metadata alpha: 16" in shown
    assert "\x00" not in shown


def test_a_long_text_is_shown_as_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pdrs.save(pdrs.ParameterDict(), tmp_path / "f", metadata={"long": "x" * 1000})
    assert run(["inspect", str(tmp_path / "f")]) == 0
    assert f"metadata long: {'x' * 200}... (1,000 characters: --json shows all)" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["archive", "named"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([("a", "b")], TypeError, "metadata as a mapping from str to str, got list"),
        ("text", TypeError, "metadata as a mapping from str to str, got str"),
        ({"rank": 16}, TypeError, "metadata of str to str, got int at 'rank'"),
        ({"a": None}, TypeError, "metadata of str to str, got NoneType at 'a'"),
        ({1: "a"}, TypeError, "metadata of str to str, got the key 1"),
        ({"pdrs": "a"}, ValueError, "the key 'pdrs' of metadata is kept for pdrs"),
        ({"pdrs.crc32": "a"}, ValueError, "the key 'pdrs.crc32' of metadata is kept for pdrs"),
        ({"a": "\ud800"}, ValueError, "metadata of valid Unicode, got a surrogate at 'a'"),
        ({"a": "x" * 50_000_001}, ValueError, "metadata of at most 50,000,000 bytes"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_in_a_header_is_refused_and_the_old_file_stays(
    layout: Literal["archive", "named"], wrong: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    pdrs.save(pdrs.StackedParameterDict(TENSORS), path, layout=layout, metadata=TEXTS)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        pdrs.save(pdrs.ParameterDict(), path, layout=layout, metadata=wrong)
    assert path.read_bytes() == before
    assert [path] == list(tmp_path.iterdir())
    if error is TypeError:
        sd = pdrs.StackedParameterDict(TENSORS)
        sd.metadata = wrong
        with pytest.raises(error, match=message):
            pdrs.save(sd, path, layout=layout)


def test_a_delta_has_the_texts_of_the_one_before_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": pdrs.ParameterDict(TENSORS), "b": nn.Linear(2, 2)})
    pdrs.save(model, tmp_path / "0", metadata=TEXTS)
    pdrs.save(model, tmp_path / "1", since=tmp_path / "0")
    pdrs.save(model, tmp_path / "2", since=tmp_path / "1", metadata={"step": "2"})
    pdrs.save(model, tmp_path / "3", since=tmp_path / "2", metadata={})
    expected = [TEXTS, TEXTS, {"format": "pt", "step": "2"}, {"format": "pt"}]
    assert [texts_in(tmp_path / str(number)) for number in range(4)] == expected
    pdrs.open(tmp_path / "3", verify=True)


def test_texts_of_other_shards_and_of_the_index_are_there_too(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors.index.json"
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "1", metadata={"format": "pt", "x": "first"})
    safetensors.torch.save_file({"b": torch.ones(2)}, tmp_path / "2", metadata={"x": "second", "y": "second"})
    index = {"total_size": 16, "total_parameters": "4", "x": "index", "merged_by": "a tool", "depth": 3}
    path.write_text(json.dumps({"metadata": index, "weight_map": {"a": "1", "b": "2"}}))
    assert pdrs.open(path).metadata == {"format": "pt", "x": "first", "y": "second", "merged_by": "a tool"}
    for odd in ("[]", "3", '"text"'):
        path.write_text(f'{{"metadata": {odd}, "weight_map": {{"a": "1"}}}}')
        assert pdrs.open(path).metadata == {"format": "pt", "x": "first"}


def test_a_text_that_was_changed_in_an_archive_is_found(tmp_path: Path) -> None:
    pdrs.save(pdrs.StackedParameterDict(TENSORS), tmp_path / "f", metadata={"alpha": "16"})
    shutil.copy(tmp_path / "f", tmp_path / "g")
    data = (tmp_path / "f").read_bytes()
    assert data.count(b'"16"') == 1
    (tmp_path / "g").write_bytes(data.replace(b'"16"', b'"61"'))
    with pytest.raises(pdrs.CheckpointError, match="the metadata are damaged"):
        pdrs.open(tmp_path / "g", verify=True)
    assert run(["verify", str(tmp_path / "g")]) == 1
    assert run(["verify", str(tmp_path / "f")]) == 0
