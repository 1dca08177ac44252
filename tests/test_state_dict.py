"""State dicts of ``pdrs.ParameterDict``: written, read and refused as torch's class does it.

The bugs that this hunts: a name or an order that changes in a checkpoint, a saved tensor that is not the Parameter's
memory, a missing or unexpected key that goes unreported, a hook that is skipped on the fast path.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

Kind = type[nn.ParameterDict]


def filled(kind: Kind) -> nn.ParameterDict:
    return kind([("right", torch.ones(2)), ("left", torch.zeros(2, 3))])


class Outer(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.weights = filled(kind)
        self.last = nn.Linear(1, 1)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_state_dict_has_the_keys_in_order_and_the_memory_of_the_parameters(kind: Kind) -> None:
    pd = filled(kind)
    state = pd.state_dict()
    assert type(state) is OrderedDict
    assert list(state) == ["right", "left"]
    assert state["left"].data_ptr() == pd["left"].data_ptr()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in state.values())
    with torch.no_grad():
        pd["left"].add_(1)
    assert state["left"].min() == 1
    assert state["left"]._version == pd["left"]._version, "a view shares the version counter"
    assert state._metadata == OrderedDict({"": {"version": 1}})


def test_keep_vars_gives_the_parameters_themselves(kind: Kind) -> None:
    pd = filled(kind)
    state = pd.state_dict(keep_vars=True)
    assert state["left"] is pd["left"]
    assert list(state) == ["right", "left"]


def test_a_prefix_and_a_destination_are_used(kind: Kind) -> None:
    destination = {"before": 1}
    state = filled(kind).state_dict(destination=destination, prefix="p.")
    assert state is destination
    assert list(state) == ["before", "p.right", "p.left"]


def test_only_tensors_and_children_are_saved(kind: Kind) -> None:
    pd = filled(kind)
    pd["plain"] = 5
    pd["none"] = None
    pd["child"] = nn.Linear(1, 1, bias=False)
    pd.register_buffer("mean", torch.ones(1))
    pd.register_buffer("scratch", torch.ones(1), persistent=False)
    assert list(pd.state_dict()) == ["right", "left", "mean", "child.weight"]


def test_a_state_dict_of_a_model_is_the_same_for_both_classes() -> None:
    one, other = (Outer(kind).state_dict() for kind in (nn.ParameterDict, pdrs.ParameterDict))
    assert list(one) == list(other) == ["weights.right", "weights.left", "last.weight", "last.bias"]
    assert one._metadata == other._metadata


def test_saving_calls_hooks_before_and_after(kind: Kind) -> None:
    pd = filled(kind)
    seen: list[Any] = []
    pd.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append((module, prefix, keep_vars)))
    pd.register_state_dict_post_hook(lambda module, state, prefix, _: seen.append((list(state), prefix)))

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        state[f"{prefix}renamed"] = state.pop(f"{prefix}left")
        metadata["note"] = "renamed"

    pd.register_state_dict_post_hook(rename)
    model = nn.Sequential(pd)
    state = model.state_dict()
    assert seen == [(pd, "0.", False), (["0.right", "0.left"], "0.")]
    assert list(state) == ["0.right", "0.renamed"]
    assert state._metadata["0"] == {"version": 1, "note": "renamed"}


def test_a_subclass_of_parameter_saves_what_its_detach_gives(kind: Kind) -> None:
    class Doubled(Parameter):
        def detach(self) -> torch.Tensor:
            return super().detach() * 2

    pd = kind({"x": Doubled(torch.ones(2)), "y": torch.ones(2)})
    assert type(pd["x"]) is Doubled
    state = pd.state_dict()
    assert state["x"].tolist() == [2, 2]
    assert state["y"].tolist() == [1, 1]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [nn.ParameterDict, pdrs.ParameterDict], ids=["into torch", "into pdrs"])
def test_each_class_reads_what_the_other_wrote(kind: Kind, reader: Kind, tmp_path: Path) -> None:
    model = Outer(kind)
    with torch.no_grad():
        model.weights["left"].fill_(4)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Outer(reader)
    objects = list(other.weights.values())
    result = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert result == ([], [])
    assert other.weights["left"].min() == 4
    assert all(one is other for one, other in zip(other.weights.values(), objects, strict=True)), "filled in place"
    assert list(other.weights) == ["right", "left"]


def test_loading_copies_and_bumps_the_version_counter(kind: Kind) -> None:
    pd = filled(kind)
    new = torch.full((2,), 3.0)
    before = pd["right"]._version
    pd.load_state_dict({"right": new, "left": torch.zeros(2, 3)})
    assert pd["right"]._version > before
    new.zero_()
    assert pd["right"].tolist() == [3, 3]


def test_a_stale_graph_is_noticed_after_loading(kind: Kind) -> None:
    pd = filled(kind)
    loss = pd["right"].square().sum()
    pd.load_state_dict({"right": torch.zeros(2), "left": torch.zeros(2, 3)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loading_keeps_the_order_of_the_dictionary(kind: Kind) -> None:
    pd = filled(kind)
    pd.load_state_dict({"left": torch.ones(2, 3), "right": torch.zeros(2)})
    assert list(pd) == ["right", "left"]
    assert [name for name, _ in pd.named_parameters()] == ["right", "left"]


def test_assign_takes_the_tensors_themselves(kind: Kind) -> None:
    pd = filled(kind)
    pd["right"].requires_grad_(False)
    state = {"left": torch.ones(2, 3, dtype=torch.float64), "right": Parameter(torch.zeros(2))}
    pd.load_state_dict(state, assign=True)
    assert pd["left"].dtype == torch.float64
    assert pd["left"].data_ptr() == state["left"].data_ptr()
    assert type(pd["left"]) is Parameter
    assert pd["right"] is state["right"]
    assert not pd["right"].requires_grad
    assert list(pd) == ["right", "left"]
    assert next(iter(pd.items())) == ("right", state["right"])


def test_assign_fills_a_dictionary_from_the_meta_device(kind: Kind) -> None:
    with torch.device("meta"):
        pd = filled(kind)
    pd.load_state_dict(filled(kind).state_dict(), assign=True)
    assert pd["right"].tolist() == [1, 1]
    with torch.device("meta"):
        pd = filled(kind)
    with pytest.warns(UserWarning, match="which is a no-op"):
        pd.load_state_dict(filled(kind).state_dict())


def report(model: nn.Module, state: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """Return what loading gives: the keys that do not fit, or the error's text."""
    try:
        result = model.load_state_dict(state, **options)
    except RuntimeError as error:
        return ("error", str(error).replace("pdrs.parameter_dict.", ""))
    return sorted(result.missing_keys), sorted(result.unexpected_keys)


TENSOR = torch.zeros(1)
MISFITS: dict[str, dict[str, Any]] = {
    "empty": {},
    "missing": {"weights.right": torch.ones(2), "last.weight": torch.ones(1, 1), "last.bias": torch.ones(1)},
    "unexpected": {"weights.other": TENSOR},
    "unexpected with a dot": {"weights.other.x": TENSOR, "weights.left.x": TENSOR, "weights.": TENSOR},
    "beside it": {"weights": TENSOR, "weightsleft": TENSOR, "other.left": TENSOR},
    "of another size": {"weights.left": torch.zeros(3, 2), "weights.right": torch.zeros(())},
    "no tensor": {"weights.left": 5, "weights.right": "x"},
    "an attribute": {"weights.training": TENSOR, "weights.keys": TENSOR, "weights._keys": TENSOR},
    "of another dtype": {"weights.left": torch.zeros(2, 3).bool(), "weights.right": torch.ones(2).double()},
    "a scalar for a vector of one": {"last.bias": torch.zeros(())},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_reported_in_the_same_words(misfit: str, strict: bool) -> None:
    models = [Outer(kind) for kind in (nn.ParameterDict, pdrs.ParameterDict)]
    reports = [report(model, MISFITS[misfit], strict=strict) for model in models]
    assert reports[0] == reports[1]
    assert [torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)][:2] == [
        True,
        True,
    ]


def test_errors_name_the_key_and_the_sizes(kind: Kind) -> None:
    pd = filled(kind)
    message = re.escape(
        "Error(s) in loading state_dict for ParameterDict:\n"
        '\tMissing key(s) in state_dict: "right". \n'
        '\tUnexpected key(s) in state_dict: "other". \n'
        "\tsize mismatch for left: copying a param with shape torch.Size([1]) from checkpoint, the shape in current "
        "model is torch.Size([2, 3])."
    )
    with pytest.raises(RuntimeError, match=rf"\A{message}\Z"):
        pd.load_state_dict({"other": TENSOR, "left": TENSOR})


def test_something_that_is_no_dict_is_refused(kind: Kind) -> None:
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got <class 'list'>"):
        filled(kind).load_state_dict([1])


def test_unexpected_keys_come_in_the_order_of_the_state_dict(kind: Kind) -> None:
    state = {"z": TENSOR, **filled(kind).state_dict(), "m.n": TENSOR, "a": TENSOR}
    assert filled(kind).load_state_dict(state, strict=False).unexpected_keys == ["z", "m.n", "a"]


def test_loading_calls_hooks_before_and_after(kind: Kind) -> None:
    pd = filled(kind)
    seen: list[str] = []

    def before(
        module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        assert module is pd
        assert (prefix, strict) == ("0.", True)
        seen.append("before")
        state[f"{prefix}left"] = state.pop(f"{prefix}old_left")

    def after(module: nn.Module, incompatible: Any) -> None:
        assert incompatible == ([], [])
        seen.append("after")

    pd.register_load_state_dict_pre_hook(before)
    pd.register_load_state_dict_post_hook(after)
    nn.Sequential(pd).load_state_dict({"0.right": torch.zeros(2), "0.old_left": torch.ones(2, 3)})
    assert seen == ["before", "after"]
    assert pd["left"].min() == 1


def test_a_hook_may_add_the_entries_that_a_state_dict_has(kind: Kind) -> None:
    class Growing(kind):  # type: ignore[misc, valid-type]
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name, tensor in state_dict.items():
                self[name.removeprefix(prefix)] = torch.empty_like(tensor)
            super()._load_from_state_dict(state_dict, prefix, *rest)

    pd = Growing()
    pd.load_state_dict(filled(kind).state_dict())
    assert list(pd) == ["right", "left"]
    assert pd["right"].tolist() == [1, 1]


def test_extra_state_goes_there_and_back(kind: Kind) -> None:
    class Counting(kind):  # type: ignore[misc, valid-type]
        count = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    pd = Counting({"x": torch.ones(1)})
    pd.count = 5
    state = pd.state_dict()
    assert list(state) == ["x", "_extra_state"]
    other = Counting({"x": torch.zeros(1)})
    other.load_state_dict(state)
    assert other.count == 5
    assert other["x"].item() == 1
    assert kind({"x": TENSOR}).load_state_dict(state, strict=False).unexpected_keys == ["_extra_state"]
    del state["_extra_state"]
    assert Counting({"x": TENSOR}).load_state_dict(state, strict=False).missing_keys == ["_extra_state"]


def test_a_version_of_a_subclass_is_written_and_read(kind: Kind) -> None:
    versions = []

    class Second(kind):  # type: ignore[misc, valid-type]
        _version = 2

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
            versions.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    state = filled(kind).state_dict()
    assert filled(Second).state_dict()._metadata[""] == {"version": 2}
    Second(filled(kind)).load_state_dict(state)
    Second(filled(kind)).load_state_dict(dict(state))
    assert versions == [1, None]


def test_an_override_of_saving_is_called(kind: Kind) -> None:
    class Quiet(kind):  # type: ignore[misc, valid-type]
        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}left")

    assert list(nn.Sequential(filled(Quiet)).state_dict()) == ["0.right"]
