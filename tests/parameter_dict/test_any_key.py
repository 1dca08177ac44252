"""Keys that torch's class refuses: what holds for "weight" must hold for "layer.0.weight", "type", "to" and any other.

The bugs that this hunts: a key that hides an attribute of the module, a sweep that stumbles over an entry named like
one, a name that changes on its way through a file.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs
from pdrs._core import EntryKeys

KEYS = [
    *("type", "to", "keys", "items", "training", "forward", "state_dict", "zero_grad", "parameters", "half", "update"),
    *("_parameters", "_buffers", "_modules", "_keys", "_values", "_apply", "__dict__", "__class__", "__init__", "T"),
    *("a.b", "a.b.c", ".", "..", "a.", ".a", "0", " ", "\n", "\0", "a\tb", "Übergröße", "名前", "🎲", "é", "e\u0301"),
    "x" * 10_000,
]
MODULE_METHODS = ["type", "to", "keys", "items", "forward", "state_dict", "zero_grad", "half", "update", "_apply"]


@pytest.fixture
def pd() -> pdrs.ParameterDict:
    return pdrs.ParameterDict((key, torch.full((2,), float(n))) for n, key in enumerate(KEYS))


def check(pd: pdrs.ParameterDict) -> None:
    """Check that all keys are there, with their values, and have hidden nothing."""
    assert list(pd) == KEYS
    assert [name for name, _ in pd.named_parameters()] == KEYS
    assert [value[0].item() for value in pd.values()] == list(range(len(KEYS)))
    assert all(pd[key] is pd._parameters[key] for key in KEYS)
    assert pd.training is True
    assert all(callable(getattr(pd, name)) for name in MODULE_METHODS)
    assert type(pd._keys) is EntryKeys
    assert type(pd._parameters) is dict


def test_every_key_is_taken_and_hides_nothing(pd: pdrs.ParameterDict) -> None:
    check(pd)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda pd: copy.deepcopy(nn.Sequential(pd))[0],
        lambda pd: pickle.loads(pickle.dumps(pd)),
        copy.copy,
        lambda pd: pd.copy(),
        pdrs.ParameterDict,
        lambda pd: pd.double().float(),
        lambda pd: pd.to("cpu"),
        lambda pd: pd.to("meta").to_empty(device="cpu").requires_grad_() and pdrs.ParameterDict(numbered()),
    ],
    ids=["deepcopy", "in a model", "pickle", "copy.copy", "copy", "constructor", "dtype", "to", "meta"],
)
def test_every_key_survives_a_copy_and_a_move(pd: pdrs.ParameterDict, copied: object) -> None:
    check(copied(pd))


def numbered() -> list[tuple[str, torch.Tensor]]:
    return [(key, torch.full((2,), float(n))) for n, key in enumerate(KEYS)]


@pytest.mark.parametrize("assign", [False, True])
def test_every_key_goes_through_a_file(pd: pdrs.ParameterDict, tmp_path: Path, assign: bool) -> None:
    model = nn.ModuleDict({"inner": pd})
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(pd, tmp_path / "module.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == [f"inner.{key}" for key in KEYS]
    empty = pdrs.ParameterDict((key, torch.zeros(2)) for key in KEYS)
    assert nn.ModuleDict({"inner": empty}).load_state_dict(state, assign=assign) == ([], [])
    check(empty)
    check(torch.load(tmp_path / "module.pt", weights_only=False))


def test_missing_and_unexpected_keys_with_dots_are_told(pd: pdrs.ParameterDict) -> None:
    state = pd.state_dict()
    del state["a.b"], state["type"]
    state["a.b.c.d"] = state["new"] = state["x.y"] = torch.zeros(1)
    result = pd.load_state_dict(state, strict=False)
    assert result.missing_keys == ["type", "a.b"]
    assert result.unexpected_keys == ["a.b.c.d", "new", "x.y"]
    state = {**numbered_state(), "a.b": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for a\.b: copying a param with shape torch.Size\(\[3\]\)"):
        pd.load_state_dict(state)


def numbered_state() -> dict[str, torch.Tensor]:
    return dict(numbered())


def test_a_child_with_a_dot_in_its_name_is_loaded() -> None:
    pd, other = (pdrs.ParameterDict([("b", torch.ones(1)), ("b.c", nn.Linear(1, 1))]) for _ in range(2))
    state = pd.state_dict()
    assert list(state) == ["b", "b.c.weight", "b.c.bias"]
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other["b.c"].weight, pd["b.c"].weight)
    state["b.c.other"] = state["b.x"] = torch.zeros(1)
    assert other.load_state_dict(state, strict=False).unexpected_keys == ["b.x", "b.c.other"]


def test_an_optimizer_steps_every_entry(pd: pdrs.ParameterDict) -> None:
    optimizer = torch.optim.SGD(pd.named_parameters(), lr=1.0)
    torch.stack(list(pd.values())).sum().backward()
    optimizer.step()
    assert [value[0].item() for value in pd.values()] == [n - 1 for n in range(len(KEYS))]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == KEYS
    pd.zero_grad()
    pd.requires_grad_(False)
    assert not any(value.requires_grad or value.grad is not None for value in pd.values())


def test_plain_values_and_modules_hide_nothing_either(pd: pdrs.ParameterDict) -> None:
    plain = pdrs.ParameterDict({key: n for n, key in enumerate(KEYS)})
    assert sorted(plain) == sorted(KEYS)
    assert plain.training is True
    assert all(callable(getattr(plain, name)) for name in MODULE_METHODS)
    assert plain["training"] == KEYS.index("training")
    modules = pdrs.ParameterDict((key, nn.Linear(1, 1)) for key in KEYS)
    assert [name for name, _ in modules.named_children()] == KEYS
    assert modules.eval().training is False
    assert not any(child.training for child in modules.values())
    assert len(list(copy.deepcopy(modules).double().parameters())) == 2 * len(KEYS)


def test_attributes_named_like_entries_are_set_and_deleted_as_attributes(pd: pdrs.ParameterDict) -> None:
    pd.eval()
    assert pd.training is False
    assert pd["training"][0].item() == KEYS.index("training")
    pd.train()
    pd.half = 5
    assert pd.half == 5
    assert type(pd["half"]) is Parameter
    del pd.half
    with pytest.raises(AttributeError):
        del pd.keys
    check(pd)
    pd.half = Parameter(torch.full((2,), -1.0))
    assert pd["half"].tolist() == [-1, -1]
    assert callable(pd.half)


def test_popped_keys_leave_the_attributes(pd: pdrs.ParameterDict) -> None:
    for n, key in enumerate(KEYS):
        assert pd.pop(key)[0].item() == n
    assert not pd
    assert all(callable(getattr(pd, name)) for name in MODULE_METHODS)
    assert pd.training is True
