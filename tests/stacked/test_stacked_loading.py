"""The short way by which a StackedParameterDict loads what a ParameterDict saved, beside the long one: torch's.

The bugs that this hunts: a row that gets the value of another name, a message, a hook or an override that the short way
passes over, a dictionary that is half loaded when the state dict does not fit after all.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pdrs
from observed import assert_consistent, read_names

SD = pdrs.StackedParameterDict
NAMES = [f"n{at}" for at in range(40)]


def dictionary() -> pdrs.StackedParameterDict:
    return SD.from_tensor(NAMES, torch.zeros(40, 3))


def saved() -> OrderedDict[str, Tensor]:
    return OrderedDict((name, torch.full((3,), float(at))) for at, name in enumerate(NAMES))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for each load whether torch was not asked for it."""
    taken: list[bool] = []
    load, long = SD.load_state_dict, nn.Module.load_state_dict

    def by_torch(*arguments: Any) -> Any:
        taken[-1] = False
        return long(*arguments)

    def watched(*arguments: Any, **keywords: Any) -> Any:
        taken.append(True)
        return load(*arguments, **keywords)

    monkeypatch.setattr(nn.Module, "load_state_dict", by_torch)
    monkeypatch.setattr(SD, "load_state_dict", watched)
    return taken


def first_numbers(sd: pdrs.StackedParameterDict) -> dict[str, float]:
    return {name: row[0].item() for name, row in sd.items()}


@pytest.mark.parametrize("order", ["same", "reversed", "moved"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_values_go_to_their_names_in_any_order(kind: Any, order: str, ways: list[bool]) -> None:
    state = kind(saved() if order != "reversed" else reversed(saved().items()))
    if order == "moved" and kind is OrderedDict:
        state.move_to_end("n3")
        state.move_to_end("n5", last=False)
    sd = dictionary()
    del sd["n7"]
    sd["n7"] = torch.ones(3)
    sd["gone"] = torch.ones(3)
    sd.popitem()
    assert str(sd.load_state_dict(state)) == "<All keys matched successfully>"
    assert ways == [True]
    assert first_numbers(sd) == {name: float(name[1:]) for name in sd}


def test_another_dtype_is_converted(ways: list[bool]) -> None:
    sd = dictionary()
    sd.load_state_dict({name: value.double() for name, value in saved().items()})
    assert ways == [True]
    assert sd.table((3,)).dtype == torch.float32
    assert first_numbers(sd)["n39"] == 39


def spoil_shape(state: dict[str, Any]) -> None:
    state["n20"] = torch.zeros(4)


def spoil_name(state: dict[str, Any]) -> None:
    state["other"] = state.pop("n20")


def spoil_value(state: dict[str, Any]) -> None:
    state["n20"] = "nothing"


def drop_name(state: dict[str, Any]) -> None:
    del state["n20"]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_shape, "size mismatch for n20"),
        (spoil_name, r"Missing key\(s\) in state_dict: \"n20\".*\n.*Unexpected key\(s\) in state_dict: \"other\""),
        (spoil_value, r'parameter named "n20", expected torch\.Tensor'),
        (drop_name, r"Missing key\(s\) in state_dict: \"n20\""),
    ],
)
def test_what_does_not_fit_is_reported_by_the_long_way(spoil: Any, match: str, ways: list[bool]) -> None:
    state = dict(saved())
    spoil(state)
    with pytest.raises(RuntimeError, match=match):
        dictionary().load_state_dict(state)
    assert ways == [False]


def test_hooks_and_overrides_are_called(ways: list[bool]) -> None:
    called = []
    sd = dictionary()
    sd.register_load_state_dict_post_hook(lambda *_: called.append("after"))
    sd.load_state_dict(saved())
    assert first_numbers(sd)["n39"] == 39

    class Own(SD):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            called.append("own")
            super()._load_from_state_dict(*arguments)

    own = Own.from_tensor(NAMES, torch.zeros(40, 3))
    own.load_state_dict(saved())
    assert first_numbers(own)["n39"] == 39
    assert called == ["after", "own"]
    assert True not in ways


def test_tables_of_two_kinds_and_children_take_the_long_way(ways: list[bool]) -> None:
    sd = dictionary()
    sd["matrix"] = torch.zeros(2, 2)
    sd.load_state_dict({**saved(), "matrix": torch.ones(2, 2)})
    assert sd["matrix"].sum() == 4
    assert first_numbers(dictionary())["n39"] == 0
    assert ways == [False]


class WithScale(pdrs.StackedParameterDict):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))


def test_a_parameter_of_a_subclass_is_missed(ways: list[bool]) -> None:
    sd = WithScale()
    sd.update([(name, torch.zeros(3)) for name in NAMES])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "scale"'):
        sd.load_state_dict(saved())
    assert sd.load_state_dict(saved(), strict=False).missing_keys == ["scale"]
    assert not sd.load_state_dict(saved() | {"scale": torch.tensor(2.0)}).missing_keys
    assert ways == [False] * 3
    assert sd.scale.item() == 2.0
    assert first_numbers(sd) == {name: float(at) for at, name in enumerate(NAMES)}


def test_packed_names_of_which_any_byte_differs_are_not_taken_for_the_same() -> None:
    sd = SD.from_tensor(["a", "bc", "défgh"], torch.arange(6.0).view(3, 2))
    state = sd.state_dict()
    loaded = 0
    for at in range(len(state["_extra_state"])):
        changed = state["_extra_state"].clone()
        changed[at] ^= 1
        other = copy.deepcopy(sd)
        assert len(other.get_extra_state()) % 8 == 1  # kept from now on, and compared
        with contextlib.suppress(RuntimeError):
            other.load_state_dict({**state, "_extra_state": changed})
            loaded += 1
            assert list(read_names(changed).rows.items()) == list(assert_consistent(other).rows.items()), at
            continue
        assert list(other) == list(sd), at
    assert loaded > 3, "names of other letters are names, too"


def test_packed_names_that_were_the_same_are_looked_at_again_once_either_side_has_changed():
    saved = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.eye(2)).state_dict()
    other = pdrs.StackedParameterDict.from_tensor(["a", "c"], torch.eye(2)).state_dict()
    sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    for _ in range(2):
        sd.load_state_dict(saved)
        assert list(sd) == ["a", "b"]
    sd.pop("a")
    sd.load_state_dict(saved)
    assert list(sd) == ["a", "b"]
    saved["_extra_state"].copy_(other["_extra_state"])
    sd.load_state_dict(saved)
    assert list(sd) == ["a", "c"]
    assert torch.equal(sd["c"], torch.tensor([0.0, 1.0]))


def _move_to_end(sd: pdrs.StackedParameterDict) -> None:
    row = sd.pop("a")
    sd["a"] = row


@pytest.mark.parametrize("change", [lambda sd: sd.popitem(), _move_to_end, lambda sd: sd.update({"d": torch.ones(2)})])
def test_packed_names_are_ours_only_in_the_same_order_and_rows(change):
    names = ["a", "é", "c" * 20]
    saved = pdrs.StackedParameterDict.from_tensor(names, torch.arange(6.0).view(3, 2)).state_dict()
    sd = pdrs.StackedParameterDict.from_tensor(names, torch.zeros(3, 2))
    change(sd)
    sd.load_state_dict(saved)
    assert [(name, row.tolist()) for name, row in sd.items()] == list(zip(names, [[0, 1], [2, 3], [4, 5]], strict=True))
    assert torch.equal(sd.state_dict()["_extra_state"], saved["_extra_state"])


@pytest.mark.parametrize("start", ["empty", "another dtype"])
def test_names_that_a_tool_loads_without_their_table_are_refused_with_the_way_out(start: str) -> None:
    saved = SD({"a": torch.ones(4), "b": torch.ones(4)}).state_dict()
    sd = SD() if start == "empty" else SD({"a": torch.zeros(4, dtype=torch.bfloat16)})
    before = list(sd)
    with pytest.raises(ValueError, match=r"the table 'float32_4' is missing.* load_state_dict .*reserve"):
        sd.set_extra_state(saved["_extra_state"])  # as transformers does, before the tables
    assert list(sd) == before
    sd.load_state_dict(saved)
    assert list(sd) == ["a", "b"]


def test_a_tool_that_loads_a_tensor_at_a_time_loads_into_a_table_that_is_there() -> None:
    saved = SD({"a": torch.ones(4), "b": torch.full((4,), 2.0)}).state_dict()
    sd = SD()
    sd.reserve(2, shape=(4,))
    sd.set_extra_state(saved["_extra_state"])
    with torch.no_grad():
        sd.table((4,)).copy_(saved["float32_4"])
    assert {name: row.tolist() for name, row in sd.items()} == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_the_only_table_of_a_shape_is_found_in_whatever_dtype_it_is() -> None:
    sd = SD({"a": torch.ones(3), "b": torch.ones(2)}).double()
    assert sd.table((3,)).dtype == torch.float64
    assert sd.table([3], torch.float64) is sd.table((3,))
    with pytest.raises(KeyError):
        sd.table((3,), torch.float32)
    sd["f"] = torch.ones(3)
    assert sd.table((3,)).dtype == torch.float32
    sd["h"] = torch.ones(2, dtype=torch.float16)
    with pytest.raises(KeyError, match="no table of float32"):
        sd.table((2,))
