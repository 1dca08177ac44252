"""Views whose values are not what lies in memory: torch marks them as conjugate or negative, and computes when it must.

The bug that this hunts: whoever copies the memory of such a tensor loses the sign, and says nothing. A view that is
contiguous looks like any other tensor, except for its mark.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs

PD, SD = pdrs.ParameterDict, pdrs.StackedParameterDict
SHAPE = (3,)


def imaginary_parts() -> Tensor:
    return torch.tensor([1 + 2j, 3 + 4j]).conj().imag.as_strided(SHAPE, (1,))


def negative(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch._neg_view(torch.arange(1, 1 + torch.Size(shape).numel()).to(dtype).view(shape))


def conjugate(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, 1 + 2j, dtype=dtype).conj()


VIEWS: dict[str, Callable[[], Tensor]] = {
    "imaginary parts": imaginary_parts,
    "float32": lambda: negative(torch.float32, *SHAPE),
    "bfloat16": lambda: negative(torch.bfloat16, *SHAPE),
    "one element": lambda: negative(torch.float64, 1),
    "scalar": lambda: negative(torch.float32),
    "matrix": lambda: negative(torch.float32, 2, 3),
    "transposed": lambda: negative(torch.float32, 2, 3).t(),
    "integers": lambda: negative(torch.int64, *SHAPE),
    "negative complex": lambda: negative(torch.complex64, *SHAPE),
    "conjugate": lambda: conjugate(torch.complex64, *SHAPE),
    "one conjugate": lambda: conjugate(torch.complex64, 1),
    "conjugate and negative": lambda: torch._neg_view(conjugate(torch.complex64, *SHAPE)),
}


def parameter(view: Tensor) -> Parameter:
    return Parameter(view, requires_grad=view.is_floating_point() or view.is_complex())


def entries(view: Tensor) -> dict[str, Parameter]:
    """Put the view between plain tensors of its kind, as which it could be taken."""
    plain = view.resolve_conj().resolve_neg().clone()
    return {"a": parameter(plain.clone()), "b": parameter(view), "c": parameter(plain.clone())}


def reloaded(module: Any, folder: Path) -> Any:
    torch.save(module, folder / "module.pt")
    return torch.load(folder / "module.pt", weights_only=False)


def loaded_from(module: Any, folder: Path) -> Any:
    fresh = type(module)({name: parameter(torch.zeros_like(value.detach())) for name, value in module.items()})
    fresh.load_state_dict(module.state_dict())
    return fresh


def loaded_into(module: Any, folder: Path) -> Any:
    module.load_state_dict({name: value.detach().resolve_conj().resolve_neg() + 1 for name, value in module.items()})
    return module


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda module, folder: copy.deepcopy(module),
    "pickle": lambda module, folder: pickle.loads(pickle.dumps(module)),
    "torch.save": reloaded,
    "double": lambda module, folder: module.double(),
    "to": lambda module, folder: module.to(torch.complex128),
    "share_memory": lambda module, folder: module.share_memory(),
    "loaded from": loaded_from,
    "loaded into": loaded_into,
    "copy": lambda module, folder: module.copy(),
}


@pytest.mark.filterwarnings("ignore:Casting complex values", "ignore:Complex modules")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("view", VIEWS)
def test_values_are_those_of_torchs_class(view: str, way: str, tmp_path: Path) -> None:
    ours, theirs = (WAYS[way](kind(entries(VIEWS[view]())), tmp_path) for kind in (PD, nn.ParameterDict))
    assert [each.tolist() for each in ours.values()] == [each.tolist() for each in theirs.values()]


STACKED_WAYS: dict[str, Callable[[dict[str, Parameter]], SD]] = {
    "stack": lambda parts: PD(parts).stack(),
    "built": SD,
    "inserted": lambda parts: inserted({"z": parameter(torch.zeros_like(parts["a"].detach()))}, parts),
    "set again": lambda parts: inserted(
        {name: parameter(torch.zeros_like(parts["a"].detach())) for name in parts}, parts
    ),
    "set as tensors": lambda parts: inserted(parts, {name: each.detach() for name, each in parts.items()}),
}


def inserted(first: dict[str, Any], then: dict[str, Any]) -> SD:
    sd = SD(first)
    for name, value in then.items():
        sd[name] = value
    sd.update(then)
    return sd


@pytest.mark.parametrize("way", STACKED_WAYS)
@pytest.mark.parametrize("view", VIEWS)
def test_rows_have_the_values(view: str, way: str) -> None:
    if way == "set as tensors" and view == "integers":
        way = "set again"  # A plain tensor becomes a Parameter that requires gradients.
    sd = STACKED_WAYS[way](entries(VIEWS[view]()))
    assert sd["b"].tolist() == VIEWS[view]().tolist() == sd["a"].tolist()


@pytest.mark.parametrize("kind", [PD, SD])
@pytest.mark.parametrize("view", VIEWS)
def test_files_have_the_values(view: str, kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    pdrs.save(kind(entries(VIEWS[view]())), path)
    assert pdrs.open(path)["b"].tolist() == VIEWS[view]().tolist()
    fresh = kind({name: parameter(torch.zeros_like(each.detach())) for name, each in entries(VIEWS[view]()).items()})
    pdrs.load(path, fresh)
    assert fresh["b"].tolist() == VIEWS[view]().tolist()


def test_without_the_way_to_make_such_views_python_is_asked() -> None:
    program = """
import torch
view, torch._neg_view = torch._neg_view, None
import pdrs
tensors = [torch.ones(3), view(torch.ones(3)), torch.ones(3), torch.ones(3, dtype=torch.cfloat).conj()]
print([entry.tolist() for entry in pdrs.ParameterDict(list(zip("abc", tensors))).double().values()])
print(torch.view_as_real(pdrs.ParameterDict({"d": tensors[3] * 1j}).to(torch.complex128)["d"].resolve_conj()).tolist())
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == [str([[1.0] * 3, [-1.0] * 3, [1.0] * 3]), str([[0.0, 1.0]] * 3)]
