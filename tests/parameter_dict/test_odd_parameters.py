"""Parameters whose elements are more than their memory, or that have no shape: expanded and nested ones.

The bugs that this hunts: a file of 4 TiB that is written for 4 bytes; an error about the insides of torch where torch's
class pickles what it holds.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "double": lambda module: module.double(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [nn.ParameterDict, pdrs.ParameterDict])
def test_nested_tensors_are_kept(kind: type[nn.ParameterDict], way: str, layout: torch.layout) -> None:
    parts = [torch.arange(2.0), torch.arange(3.0)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    module = WAYS[way](kind({"n": Parameter(nested), "b": torch.zeros(3)}))
    assert [each.tolist() for each in module["n"].unbind()] == [each.tolist() for each in parts]
    assert module["n"].dtype == (torch.float64 if way == "double" else torch.float32)
    assert module["b"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", ["archive", "named"])
@pytest.mark.parametrize("where", ["ParameterDict", "model", "buffer"])
def test_a_tensor_expanded_beyond_measure_is_not_written(where: str, layout: Any, tmp_path: Path) -> None:
    wide = torch.ones(1).expand(2**40)
    module: nn.Module = pdrs.ParameterDict({"b": torch.zeros(3)})
    if where == "buffer":
        module.register_buffer("wide", wide)
    else:
        module.register_parameter("wide", Parameter(wide))
        if where == "ParameterDict":
            module = pdrs.ParameterDict({"wide": Parameter(wide), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"wide' is expanded from 4 to 4,398,046,511,104 bytes.*torch\.save"):
        pdrs.save(module, tmp_path / "file.safetensors", layout=layout)
    assert list(tmp_path.iterdir()) == []
    assert len(pickle.dumps(module)) < 5000


def test_a_tensor_expanded_a_little_is_written_in_full(tmp_path: Path) -> None:
    pdrs.save(pdrs.ParameterDict({"a": Parameter(torch.ones(1).expand(100))}), tmp_path / "file.safetensors")
    assert pdrs.open(tmp_path / "file.safetensors")["a"].tolist() == [1.0] * 100
