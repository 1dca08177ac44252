"""State dicts of ``pdrs.ParameterDict``: written, read and refused as torch's class does it.

The bugs that this hunts: a name or an order that changes in a checkpoint, a saved tensor that is not the Parameter's
memory, a missing or unexpected key that goes unreported, a hook that is skipped on the fast path, tensors that share
memory and are copied in another order than torch's.
"""

from __future__ import annotations

import gc
import random
import re
import subprocess
import sys
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

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
    class Growing(kind):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name, tensor in state_dict.items():
                self[name.removeprefix(prefix)] = torch.empty_like(tensor)
            super()._load_from_state_dict(state_dict, prefix, *rest)

    pd = Growing()
    pd.load_state_dict(filled(kind).state_dict())
    assert list(pd) == ["right", "left"]
    assert pd["right"].tolist() == [1, 1]


def test_extra_state_goes_there_and_back(kind: Kind) -> None:
    class Counting(kind):
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

    class Second(kind):
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
    class Quiet(kind):
        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}left")

    assert list(nn.Sequential(filled(Quiet)).state_dict()) == ["0.right"]


# -- loading what is unusual, beside what is not -----------------------------------------------------------------------

KINDS = (nn.ParameterDict, pdrs.ParameterDict)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
SHAPES = [(), (1,), (3,), (2, 3), (3, 2), (0,), (2, 0), (20_000,)]
LAYOUTS = ["plain", "transposed", "strided", "expanded", "sparse", "conjugate", "meta", "inference"]
TENSORS = st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS))
ENTRIES = st.lists(
    st.tuples(
        st.one_of(TENSORS, st.sampled_from(["tie", "view", "none"])),
        st.one_of(
            st.sampled_from(["alike", "alike", "alike", "missing", "5", "itself", "the next", "the last source"]),
            TENSORS,
        ),
    ),
    max_size=10,
)


def tensor_of(recipe: tuple[torch.dtype, tuple[int, ...], str], start: int) -> torch.Tensor:
    dtype, shape, layout = recipe
    with torch.inference_mode(layout == "inference"):
        values = (torch.arange(torch.Size(shape).numel()) + start).reshape(shape).to(dtype)
    if layout == "transposed":
        values = values.reshape(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    elif layout == "strided":
        values = torch.stack([values, values], -1)[..., 0]
    elif layout == "expanded":
        values = values.flatten()[:1].sum().to(dtype).expand(shape)
    elif layout == "sparse":
        values = values.to_sparse()
    elif layout == "conjugate":
        values = values.conj()
    elif layout == "meta":
        values = values.to("meta")
    return values


def parameter_of(values: torch.Tensor) -> Parameter:
    with torch.inference_mode(values.is_inference()):
        return Parameter(values, requires_grad=values.is_floating_point() or values.is_complex())


def scene(kind: Kind, entries: list[Any], seed: int) -> tuple[nn.ParameterDict, dict[str, Any]]:
    """Make a dictionary and a state dict for it."""
    pd = kind()
    state: dict[str, Any] = {}
    for at, (recipe, _) in enumerate(entries):
        before = [value for value in pd.values() if value is not None and value.layout is torch.strided]
        if recipe == "none":
            pd[f"k{at}"] = torch.zeros(1)
            pd._parameters[f"k{at}"] = None
        elif isinstance(recipe, str):
            value = before[-1] if before else Parameter(torch.zeros(3))
            pd[f"k{at}"] = value if recipe == "tie" else parameter_of(value.detach().flatten()[1:])
        else:
            pd[f"k{at}"] = parameter_of(tensor_of(recipe, 100))
    values = list(pd._parameters.values())
    for at, (_, source) in enumerate(entries):
        value = values[at]
        if source == "5":
            state[f"k{at}"] = 5
        elif source == "missing" or value is None:
            continue
        elif source == "alike":
            state[f"k{at}"] = torch.full(value.shape, at).to(value.dtype)
        elif source == "itself":
            state[f"k{at}"] = value.detach()
        elif source in ("the next", "the last source"):
            others = [values[(at + 1) % len(values)], *state.values()]
            other = others[0 if source == "the next" else -1]
            state[f"k{at}"] = other.detach() if isinstance(other, torch.Tensor) else other
        else:
            state[f"k{at}"] = tensor_of(source, 200)
    order = random.Random(seed).sample(list(state), len(state)) if seed else list(state)
    return pd, {name: state[name] for name in order}


def contents(pd: nn.ParameterDict) -> list[Any]:
    return [
        value if value is None or value.is_meta else (value.dtype, value.detach().to_dense().tolist())
        for value in pd._parameters.values()
    ]


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@settings(deadline=None, max_examples=300)
@given(entries=ENTRIES, seed=st.integers(0, 3), strict=st.booleans(), nested=st.booleans(), extra=st.booleans())
def test_any_mixture_is_loaded_as_by_torchs_class(
    entries: list[Any], seed: int, strict: bool, nested: bool, extra: bool
) -> None:
    results = []
    for kind in KINDS:
        pd, state = scene(kind, entries, seed)
        versions = {
            name: value._version for name, value in pd.items() if value is not None and not value.is_inference()
        }
        if extra:
            state = {"unexpected": TENSOR, **state, "k1.x": TENSOR}
        model: nn.Module = pd
        if nested:
            model, state = nn.Sequential(pd), {f"0.{name}": value for name, value in state.items()}
        outcome = report(model, state, strict=strict)
        bumped = {name for name, version in versions.items() if pd[name]._version > version}
        results.append((outcome, str(contents(pd)), bumped))
    assert results[0] == results[1]


def many(kind: Kind, entries: int = 100) -> nn.ParameterDict:
    return kind([(f"n{n}", torch.full((3,), float(n))) for n in range(entries)])


@pytest.mark.parametrize("change", ["none", "shuffled", "gaps", "more", "reversed"])
def test_the_order_of_a_state_dict_does_not_matter(kind: Kind, change: str) -> None:
    pd, names = many(kind), [f"n{n}" for n in range(100)]
    if change == "shuffled":
        random.Random(0).shuffle(names)
    elif change == "gaps":
        names = names[::3]
    elif change == "more":
        names = [each for name in names for each in (f"x{name}", f"y{name}", name)]
    elif change == "reversed":
        names.reverse()
    result = pd.load_state_dict({name: torch.full((3,), float(at)) for at, name in enumerate(names)}, strict=False)
    assert [pd[name][0].item() for name in names if name in pd] == [at for at, name in enumerate(names) if name in pd]
    assert result.missing_keys == [name for name in pd if name not in names]
    assert result.unexpected_keys == [name for name in names if name not in pd]


def test_loading_counts_every_version_up(kind: Kind) -> None:
    pd = many(kind)
    before = [value._version for value in pd.values()]
    pd.load_state_dict(many(kind, 99).state_dict() | {"n99": torch.zeros(3, dtype=torch.float64)})
    assert all(value._version > version for value, version in zip(pd.values(), before, strict=True))


def test_entries_that_exchange_their_memory_are_loaded_one_after_another(kind: Kind) -> None:
    pd = many(kind)
    state = pd.state_dict()
    state["n3"], state["n7"] = state["n7"], state["n3"]
    pd.load_state_dict(state)
    assert (pd["n3"].tolist(), pd["n7"].tolist(), pd["n8"].tolist()) == ([7] * 3, [7] * 3, [8] * 3)


def test_a_tie_ends_as_its_last_entry_whoever_copied_that(kind: Kind) -> None:
    pd = many(kind)
    pd["first"] = pd["last"] = Parameter(torch.zeros(3))
    ordinary, other_dtype = torch.ones(3), torch.full((3,), 2.0, dtype=torch.float64)
    for first, last in ((ordinary, other_dtype), (other_dtype, ordinary)):
        pd.load_state_dict({**many(kind).state_dict(), "first": first, "last": last})
        assert pd["last"].tolist() == last.tolist()


def test_a_state_dict_of_its_own_changes_nothing(kind: Kind) -> None:
    pd = many(kind)
    before = [value._version for value in pd.values()]
    assert pd.load_state_dict(pd.state_dict()) == ([], [])
    assert [value[0].item() for value in pd.values()] == list(range(100))
    assert all(value._version > version for value, version in zip(pd.values(), before, strict=True))


def test_what_does_not_fit_is_reported_before_anything_is_said_to_be_loaded(kind: Kind) -> None:
    pd = many(kind)
    state = dict.fromkeys(pd, torch.zeros(3)) | {"n98": torch.zeros(4), "n99": 5}
    with pytest.raises(RuntimeError, match=r"size mismatch for n98(.|\n)*named \"n99\", expected torch.Tensor"):
        pd.load_state_dict(state)
    assert [value.sum().item() for value in pd.values()][-3:] == [0, 98 * 3, 99 * 3]
    assert gc.isenabled()


def test_a_none_in_place_of_a_parameter_makes_its_key_unexpected(kind: Kind) -> None:
    pd = filled(kind)
    pd.register_parameter("bias", None)
    assert pd.load_state_dict(pd.state_dict()) == ([], [])
    state = {**pd.state_dict(), "bias": TENSOR}
    assert pd.load_state_dict(state, strict=False).unexpected_keys == ["bias"]


def test_keys_with_dots_belong_to_entries_or_to_children() -> None:
    pd = pdrs.ParameterDict({"a.b": torch.ones(1), "c": torch.ones(1)})
    pd["child.one"] = nn.Linear(1, 1, bias=False)
    pd["plain"] = nn.Linear(1, 1, bias=False)
    state = {**pd.state_dict(), "a.x": TENSOR, "a": TENSOR, "child.x": TENSOR, "plain.x": TENSOR, "c.d": TENSOR}
    for model, prefix in ((pd, ""), (nn.Sequential(pd), "0.")):
        shown = {f"{prefix}{name}": value for name, value in state.items()}
        result = model.load_state_dict(shown, strict=False)
        # torch looks for children of a child by its name and a dot.
        assert result.unexpected_keys == [f"{prefix}{name}" for name in ("a.x", "a", "child.x", "c.d", "plain.x")]
        assert result.missing_keys == []


def test_buffers_are_loaded_beside_the_entries(kind: Kind) -> None:
    pd = many(kind)
    pd.register_buffer("mean", torch.zeros(2))
    pd.register_buffer("scratch", torch.zeros(2), persistent=False)
    state = {**many(kind).state_dict(), "mean": torch.ones(2), "scratch": torch.ones(2)}
    result = pd.load_state_dict(state, strict=False)
    assert result == ([], ["scratch"])
    assert pd.mean.tolist() == [1, 1]
    assert pd.scratch.tolist() == [0, 0]
    del state["mean"]
    assert pd.load_state_dict(state, strict=False).missing_keys == ["mean"]


def test_an_entry_of_the_name_of_extra_state_is_one_all_the_same(kind: Kind) -> None:
    pd = kind({"_extra_state": torch.zeros(1), "x": torch.zeros(1)})
    state = {"_extra_state": torch.ones(1), "x": torch.ones(1), "y": TENSOR}
    assert pd.load_state_dict(state, strict=False).unexpected_keys == ["_extra_state", "y"]
    del state["y"]
    assert pd.load_state_dict(state, strict=False).unexpected_keys == ["_extra_state"]
    assert (pd["_extra_state"].item(), pd["x"].item()) == (1, 1)


def test_a_hook_may_ask_for_assignment(kind: Kind) -> None:
    pd = filled(kind)

    def assign(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        metadata["assign_to_params_buffers"] = True

    pd.register_load_state_dict_pre_hook(assign)
    state = {"right": Parameter(torch.zeros(2)), "left": torch.ones(2, 3)}
    pd.load_state_dict(state)
    assert pd["right"] is state["right"]
    assert pd["left"].data_ptr() == state["left"].data_ptr()
    assert list(pd) == ["right", "left"]


def test_a_hook_that_raises_leaves_everything_as_it_was(kind: Kind) -> None:
    pd = filled(kind)

    def refuse(*_: Any) -> None:
        raise ValueError("no")

    pd.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        pd.load_state_dict({"right": torch.zeros(2), "left": torch.ones(2, 3)})
    assert pd["right"].tolist() == [1, 1]
    assert gc.isenabled()


def test_a_hook_is_called_once_and_sees_a_copy_of_the_state_dict(kind: Kind) -> None:
    pd, seen = filled(kind), []
    state = filled(kind).state_dict()
    pd.register_load_state_dict_pre_hook(lambda module, given, *_: seen.append(given))
    pd.load_state_dict(state)
    assert len(seen) == 1
    assert seen[0] is not state
    assert (seen[0], type(seen[0]), seen[0]._metadata) == (state, OrderedDict, state._metadata)


def test_tensors_are_swapped_where_torch_is_told_to(kind: Kind) -> None:
    pd = filled(kind)
    right = pd["right"]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        pd.load_state_dict({"right": torch.zeros(2), "left": torch.ones(2, 3)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert pd["right"] is right
    assert right.tolist() == [0, 0]
    assert right.requires_grad


def test_other_mappings_are_loaded(kind: Kind) -> None:
    state = filled(kind).state_dict()
    for mapping in (MappingProxyType(state), UserDict(state), ChainMap(state), defaultdict(list, state)):
        assert many(kind).load_state_dict(mapping, strict=False).unexpected_keys == ["right", "left"]
        pd = filled(kind)
        torch.nn.init.zeros_(pd["right"])
        pd.load_state_dict(mapping)
        assert pd["right"].tolist() == [1, 1]
        pd._load_from_state_dict(mapping, "", {}, True, missing := [], unexpected := [], errors := [])
        assert (missing, unexpected, errors) == ([], [], [])


def test_another_base_class_may_have_its_own_loading(kind: Kind) -> None:
    class Renaming(nn.Module):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            state_dict[f"{prefix}left"] = state_dict.pop(f"{prefix}old")
            super()._load_from_state_dict(state_dict, prefix, *rest)

    class Both(kind, Renaming):
        pass

    pd = Both(filled(kind).items())
    assert pd.load_state_dict({"right": torch.zeros(2), "old": torch.ones(2, 3)}) == ([], [])
    assert pd["left"].min() == 1


def test_somebody_who_listens_hears_every_copy(kind: Kind) -> None:
    class Listening(TorchDispatchMode):
        heard = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard += function is torch.ops.aten.copy_.default
            return function(*args, **(kwargs or {}))

    pd, state = many(kind), many(kind).state_dict()
    with Listening() as mode:
        pd.load_state_dict(state)
        nn.Sequential(pd).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert mode.heard == 200


def test_loading_in_inference_mode_writes_what_torch_writes(kind: Kind) -> None:
    with torch.inference_mode():
        born_there = many(kind)
        born_there.load_state_dict(dict.fromkeys(born_there, torch.zeros(3)))
        pd = many(kind)
    assert born_there["n5"].tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        pd.load_state_dict(dict.fromkeys(pd, torch.zeros(3)))


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_the_collector_as_it_was(kind: Kind, enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        many(kind).load_state_dict(many(kind).state_dict())
        nn.Sequential(many(kind)).load_state_dict({}, strict=False)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_is_copied_does_not_depend_on_an_unusual_entry_before():
    # The second source looks like the first, but is a conjugate view; the third is as the first again.
    shapes = {"a": 4, "b": 9, "c": 9}
    target = pdrs.ParameterDict({name: torch.zeros(size, dtype=torch.complex64) for name, size in shapes.items()})
    state = {name: torch.ones(4, dtype=torch.complex64) for name in shapes}
    state["b"] = state["b"].conj()
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(state)
    assert str(caught.value).count("size mismatch") == 2
    assert not target["c"].any()


CHANGES_MEANWHILE = """
import sys, torch
count, pending = torch._C._increment_version, []

def meanwhile(tensors):
    if pending:
        pending.pop()()
    return count(tensors)

torch._C._increment_version = meanwhile
import pdrs

for change in ("grows", "shrinks", "is emptied"):
    pd = pdrs.ParameterDict((f"n{at}", torch.zeros(1)) for at in range(2000))
    state = {name: torch.ones(1) for name in pd}
    pending.append({
        "grows": lambda: state.update((f"new{at}", torch.ones(1)) for at in range(5000)),
        "shrinks": lambda: [state.pop("n0"), state.pop("n1999")],
        "is emptied": state.clear,
    }[change])
    missing, unexpected = pd.load_state_dict(state, strict=False)
    assert not pending
    assert all(pd[name].item() == (name not in missing) for name in pd)
    assert len(missing) == {"grows": 0, "shrinks": 2, "is emptied": 2000}[change], missing
    assert not unexpected
"""


def test_a_state_dict_that_changes_its_size_while_it_is_loaded_ends_the_load_with_what_is_there():
    # As another thread may do, wherever torch counts what was written in Python.
    done = subprocess.run([sys.executable, "-c", CHANGES_MEANWHILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
