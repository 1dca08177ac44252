"""What an earlier version has written: pickles, state dicts and archives are read for ever.

``written_before`` holds one model, as earlier code wrote it: a ParameterDict ``single`` and a StackedParameterDict
``stacked``, of which one name was frozen and one popped.

The bugs that this hunts: classes that are looked for where they lay once, and attributes that an earlier version did
not have, so that what was unpickled fails when it is used.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import pdrs

HERE = Path(__file__).parent / "written_before"
ROWS = {f"n{n}": torch.full((3,), float(n)) for n in (0, 1, 2, 4)}


def _assert_is_the_model(model: nn.Module) -> None:
    assert {name: value.tolist() for name, value in model.single.items()} == {"a.b": [0, 1, 2], "c": [[1, 1], [1, 1]]}
    assert list(model.stacked) == list(ROWS)
    assert all(torch.equal(model.stacked[name], row) for name, row in ROWS.items())


def _unpickled() -> nn.Module:
    return pickle.loads((HERE / "model.pkl").read_bytes())


def _loaded_by_torch() -> nn.Module:
    return torch.load(HERE / "model.pt", weights_only=False)


@pytest.mark.parametrize("read", [_unpickled, _loaded_by_torch])
def test_a_pickled_model_is_whole_and_can_be_used(read):
    model = read()
    _assert_is_the_model(model)
    assert [value.requires_grad for value in model.single.values()] == [True, False]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    _assert_is_the_model(copy.deepcopy(model))
    model.stacked.gather(list(ROWS)).sum().backward()
    gradients = dict(model.stacked.named_grads())
    assert (gradients["n1"].tolist(), gradients["n2"].tolist()) == ([0, 0, 0], [1, 1, 1])
    model.stacked["new"] = torch.ones(3)
    assert model.stacked.pop("n4").tolist() == [4, 4, 4]
    assert list(pickle.loads(pickle.dumps(model)).stacked) == ["n0", "n1", "n2", "new"]


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_saved_state_fills_a_new_model(file):
    model = nn.Module()
    model.single = pdrs.ParameterDict({"a.b": torch.zeros(3), "c": torch.zeros(2, 2)})
    model.stacked = pdrs.StackedParameterDict({name: torch.zeros(3) for name in ROWS})
    if file == "state.pt":
        model.load_state_dict(torch.load(HERE / file))
    else:
        pdrs.load(HERE / file, model, verify=True)
    _assert_is_the_model(model)
