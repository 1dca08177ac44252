"""What ``pdrs.save``, ``open`` and ``load`` say of arguments that are wrong, or unusual and right.

The bugs that this hunts: a TypeError from the depths that does not say what was expected; an error that names a class
nobody has used; a prefix that is a name, and is damage in one kind of file and nothing in another.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pdrs


@pytest.fixture(params=["archive", "named", "sharded", "torch"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2), "a.x": torch.zeros(2), "b": torch.ones(3)})
    path = tmp_path / "f"
    if request.param == "torch":
        torch.save(sd.named_state_dict(), path)
    elif request.param == "archive":
        pdrs.save(sd, path)
    else:
        pdrs.save(sd, path, layout="named", max_shard_size=1 << 20 if request.param == "named" else 8)
    return path


def test_paths_of_bytes_are_paths(path: Path) -> None:
    raw = os.fsencode(path)
    opened = pdrs.open(raw)
    assert sorted(opened) == ["a", "a.x", "b"]
    pdrs.load(raw, pdrs.StackedParameterDict())
    for options in ({"layout": "named"}, {}):
        pdrs.save(opened, raw + b"2", **options)
        assert sorted(pdrs.open(raw + b"2")) == ["a", "a.x", "b"]
    pdrs.save(opened, raw + b"3", since=raw + b"2")
    assert sorted(pdrs.open(os.fsdecode(raw) + "3")) == ["a", "a.x", "b"]


@pytest.mark.parametrize("wrong", [3, None, ["f"]])
@pytest.mark.parametrize(
    "call",
    [pdrs.open, lambda path: pdrs.load(path, pdrs.ParameterDict()), lambda path: pdrs.save(pdrs.ParameterDict(), path)],
    ids=["open", "load", "save"],
)
def test_what_is_no_path_is_refused(call: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected str, bytes or os.PathLike object, not {type(wrong).__name__}"):
        call(wrong)


@pytest.mark.parametrize("wrong", [{}, {"a": torch.ones(1)}, None, torch.ones(1)])
def test_what_is_no_module_is_not_filled(path: Path, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a torch.nn.Module to fill, .* got {type(wrong).__name__}"):
        pdrs.load(path, wrong)


def test_names_that_are_not_there_are_missing_in_the_checkpoint(path: Path) -> None:
    names = ["a", *(f"n{n}" for n in range(7))]
    with pytest.raises(pdrs.MissingEntryError) as caught:
        pdrs.open(path, names=names)
    assert caught.value.args == ("7 of 8 names are not in the checkpoint: 'n0', 'n1', 'n2', 'n3', 'n4', ...",)
    with pytest.raises(KeyError, match="1 of 2 names are not in the checkpoint: 'c'"):
        pdrs.open(path, names=["c", "b"])


def test_a_name_that_is_to_be_opened_twice_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ValueError, match="'b' is listed twice"):
        pdrs.open(path, names=["b", "a", "b"])


def test_a_name_that_is_the_prefix_itself_has_none_left_and_is_not_taken(path: Path) -> None:
    assert {name: row.tolist() for name, row in pdrs.open(path, prefix="a").items()} == {".x": [0.0, 0.0]}
    for prefix in ("b", "a.x", "c"):
        with pytest.raises(KeyError, match=rf"longer than '{prefix}' and .*; names=\['{prefix}'\] opens one"):
            pdrs.open(path, prefix=prefix)


def test_the_error_has_the_name_by_which_it_is_caught(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"nothing that is a checkpoint")
    with pytest.raises(pdrs.CheckpointError) as caught:
        pdrs.open(tmp_path / "f")
    assert f"{type(caught.value).__module__}.{type(caught.value).__qualname__}" == "pdrs.CheckpointError"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.path) == (pdrs.CheckpointError, str(caught.value), caught.value.path)
    assert b"tensor_file" not in pickle.dumps(caught.value)
