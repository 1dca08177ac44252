"""``pdrs.load`` into modules of every make: nested, on the meta device, with tied parameters.

The bugs that this hunts: a file whose names all match and of which nothing is loaded, a name that goes to another
module than the one that it is of, memory that nobody has written to, parameters that were one and are two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import nn

import pdrs
from console import run

LAYOUTS: list[Literal["archive", "named"]] = ["archive", "named"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inner", [pdrs.StackedParameterDict, pdrs.ParameterDict])
def test_dictionaries_in_a_dictionary_have_any_names(
    layout: Literal["archive", "named"], inner: type, tmp_path: Path
) -> None:
    keys = ("items", "type", "pop", "w.x", "training", "keys")

    def make(value: float) -> pdrs.ParameterDict:
        return pdrs.ParameterDict({key: inner({"a.b": torch.full((2,), value)}) for key in keys})

    pdrs.save(make(1.0), tmp_path / "f", layout=layout)
    filled = make(0.0)
    assert not any(pdrs.load(tmp_path / "f", filled))
    assert {key: filled[key]["a.b"].tolist() for key in keys} == {key: [1.0, 1.0] for key in keys}
    empty = pdrs.ParameterDict({key: inner() for key in keys})
    assert not any(pdrs.load(tmp_path / "f", empty))
    assert {key: empty[key]["a.b"].tolist() for key in keys} == {key: [1.0, 1.0] for key in keys}


# -- on the meta device ------------------------------------------------------------------------------------------------

KINDS = ["archive", "named", "shards", "torch"]
DICTS = [nn.ParameterDict, pdrs.ParameterDict, pdrs.StackedParameterDict]


def save(module: nn.Module, path: Path, kind: str) -> Path:
    """Save a module in one of the ways that there are, and return the path."""
    if kind == "torch":
        state = {}
        for name, one in module.named_modules():
            prefix = name + "." if name else ""
            if isinstance(one, pdrs.StackedParameterDict):
                state.update({prefix + key: value for key, value in one.named_state_dict().items()})
            else:
                own = {**one._parameters, **one._buffers}
                kept = {key: own[key] for key in own if key not in one._non_persistent_buffers_set}
                state.update({prefix + key: value for key, value in kept.items() if value is not None})
        torch.save(state, path)
    elif kind == "archive":
        pdrs.save(module, path)
    else:
        pdrs.save(module, path, layout="named", max_shard_size=1 << 30 if kind == "named" else 16)
    return path


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def rows_of(module: Any) -> dict[str, list[float]]:
    return {name: module[name].tolist() for name in module}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_", DICTS)
@pytest.mark.parametrize("saved", [pdrs.ParameterDict, pdrs.StackedParameterDict])
def test_a_dictionary_on_the_meta_device_gets_memory_and_values(
    class_: Any, saved: Any, kind: str, tmp_path: Path
) -> None:
    def make(made: Any, value: float) -> Any:
        return made({"a": torch.full((3,), value), "b": torch.full((2,), value + 1), "c": torch.full((3,), value + 2)})

    path = save(make(saved, 1.0), tmp_path / "f.safetensors", kind)
    module = on_meta(lambda: make(class_, 0.0))
    if class_ is not pdrs.StackedParameterDict:
        module["b"].requires_grad_(False)
        module["a"].mark = "kept"
    assert not any(pdrs.load(path, module))
    assert {one.device.type for one in module.parameters()} == {"cpu"}
    assert rows_of(module) == {"a": [1, 1, 1], "b": [2, 2], "c": [3, 3, 3]}
    if class_ is not pdrs.StackedParameterDict:
        assert [module[name].requires_grad for name in "abc"] == [True, False, True]
        assert module["a"].mark == "kept"
        assert len({one.untyped_storage().data_ptr() for one in module.parameters()}) == 3
    else:
        module.gather(["a", "c"]).sum().backward()
        module["d"] = torch.ones(3)
        assert rows_of(module)["d"] == [1, 1, 1]


class Model(nn.Module):
    """A module with what there is: dictionaries, layers, an RNN, buffers of both sorts, what is tied."""

    def __init__(self, dictionary: Any, *, ties: bool = True) -> None:
        super().__init__()
        self.words = dictionary(
            {f"w.{n}" if dictionary is not nn.ParameterDict else f"w{n}": torch.zeros(4) for n in range(3)}
        )
        self.rnn = nn.LSTM(2, 2)
        self.norm = nn.BatchNorm1d(4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        if ties:
            self.head.weight = self.embedding.weight
            self.again = self.norm


def filled(dictionary: Any, **options: Any) -> Model:
    model = Model(dictionary, **options)
    with torch.no_grad():
        for number, one in enumerate([*model.parameters(), model.scale, model.norm.running_mean], 1):
            one.fill_(number)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dictionary", DICTS)
def test_a_model_on_the_meta_device_is_loaded_with_its_ties_and_what_the_file_lacks_is_said(
    dictionary: Any, kind: str, tmp_path: Path
) -> None:
    model = filled(dictionary)
    path = save(model, tmp_path / "f.safetensors", kind)
    module = on_meta(lambda: Model(dictionary))
    with pytest.warns(UserWarning, match=r"^1 parameters or buffers are on the meta device .*'cache'\.") as caught:
        assert not any(pdrs.load(path, module))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_same(module, model)
    assert module.head.weight is module.embedding.weight
    assert module.again is module.norm
    assert all(one is held for one, held in zip(module.rnn.parameters(), module.rnn._flat_weights, strict=True))
    assert module.cache.is_meta
    assert module.rnn(torch.ones(1, 2))[0].shape == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_memory_keeps_it_where_the_rest_is_on_the_meta_device(kind: str, tmp_path: Path) -> None:
    model = filled(pdrs.ParameterDict)
    path = save(model, tmp_path / "f.safetensors", kind)
    module = Model(pdrs.ParameterDict)
    module.words["w.1"] = nn.Parameter(torch.zeros(4, device="meta"))
    module.norm.running_mean = module.norm.running_mean.to("meta")
    module.head.weight = module.embedding.weight = nn.Parameter(torch.zeros(5, 4, device="meta", dtype=torch.float64))
    kept = {name: one for name, one in module.named_parameters() if not one.is_meta}
    assert not any(pdrs.load(path, module))
    assert module.head.weight is module.embedding.weight
    assert module.head.weight.dtype == torch.float64
    assert all(dict(module.named_parameters())[name] is one for name, one in kept.items())
    model.embedding.weight.data = model.embedding.weight.data.double()
    assert_same(module, model)


@pytest.mark.parametrize("class_", DICTS)
def test_what_the_file_lacks_stays_on_the_meta_device_and_nothing_is_left_uninitialised(
    class_: Any, tmp_path: Path
) -> None:
    path = save(pdrs.ParameterDict({"a": torch.ones(3)}), tmp_path / "f", "named")
    module = on_meta(lambda: class_({"a": torch.zeros(3), "b": torch.zeros(2)}))
    before = dict(module.named_parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        pdrs.load(path, module)
    assert all(one.is_meta for one in module.parameters())
    assert all(one is before[name] for name, one in module.named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        missing = pdrs.load(path, module, strict=False).missing_keys
    assert missing == ["b"]
    assert module["a"].tolist() == [1, 1, 1]
    assert module["b"].is_meta
    # A table is no name of the file.
    assert len(caught) == (class_ is pdrs.StackedParameterDict)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_fit_leave_all_on_the_meta_device(kind: str, tmp_path: Path) -> None:
    path = save(pdrs.ParameterDict({"a": torch.ones(3), "b": torch.ones(2)}), tmp_path / "f.safetensors", kind)
    for class_ in DICTS:
        module = on_meta(lambda class_=class_: class_({"a": torch.zeros(3), "b": torch.zeros(5)}))
        with pytest.raises(RuntimeError, match="size mismatch for b"):
            pdrs.load(path, module)
        assert all(one.is_meta for one in module.parameters())


class Foreign(nn.Module):
    """A module that loads in its own way, past what torch counts."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.empty(2, 2))
        self.ignored = nn.Parameter(torch.empty(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.both.data.copy_(torch.stack([state_dict.pop(prefix + "q"), state_dict.pop(prefix + "k")]))


def test_what_a_module_writes_in_its_own_way_counts_and_what_it_passes_over_is_said(tmp_path: Path) -> None:
    path = save(pdrs.ParameterDict({"m.q": torch.ones(2), "m.k": torch.zeros(2)}), tmp_path / "f", "named")
    module = on_meta(lambda: nn.ModuleDict({"m": Foreign()}))
    with pytest.warns(UserWarning, match=r"'m\.ignored'\."):
        pdrs.load(path, module)
    assert module["m"].both.tolist() == [[1, 1], [0, 0]]
    assert module["m"].ignored.is_meta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_", [pdrs.ParameterDict, pdrs.StackedParameterDict])
def test_where_new_tensors_are_on_the_meta_device_by_default_files_are_read_all_the_same(
    class_: Any, kind: str, tmp_path: Path
) -> None:
    path = save(class_({"a": torch.ones(3), "b": torch.full((2,), 2.0)}), tmp_path / "f.safetensors", kind)
    with torch.device("meta"):
        full, empty = class_({"a": torch.zeros(3), "b": torch.zeros(2)}), class_()
        pdrs.load(path, full)
        pdrs.load(path, empty)
        opened = pdrs.open(path)
        some = pdrs.open(path, names=["b"])
        half = pdrs.open(path, dtype=torch.float16, device="cpu")
    for made in (full, empty, opened, half):
        assert rows_of(made) == {"a": [1, 1, 1], "b": [2, 2]}
    assert rows_of(some) == {"b": [2, 2]}
    with torch.device("meta"):
        again = save(opened, tmp_path / "g.safetensors", "archive" if kind == "torch" else kind)
    assert rows_of(pdrs.open(again)) == rows_of(opened)


def test_the_device_is_that_of_the_rest_or_that_which_is_asked_for(tmp_path: Path) -> None:
    path = save(pdrs.ParameterDict({"a": torch.ones(3)}), tmp_path / "f", "archive")
    module = on_meta(lambda: pdrs.ParameterDict({"a": torch.zeros(3)}))
    for wrong in ("meta", torch.device("meta")):
        with pytest.raises(ValueError, match="expected a device with memory"):
            pdrs.load(path, module, device=wrong)
    pdrs.load(path, module, device="cpu")
    assert module["a"].tolist() == [1, 1, 1]


def test_a_layer_without_a_shape_gets_that_of_the_file_and_memory(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), tmp_path / "f", "archive")
    module = on_meta(lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    assert not any(pdrs.load(path, module))
    assert module(torch.ones(2, 2)).shape == (2, 3)
    save(nn.ModuleDict({"1": nn.BatchNorm1d(3)}), path, "archive")
    module = on_meta(lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    assert pdrs.load(path, module, strict=False).missing_keys == ["0.weight", "0.bias"]
    assert module[0].weight.is_meta


# -- tied --------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A model whose weights are tied in every way: parameters, buffers, whole modules, dictionaries."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.entries = pdrs.ParameterDict({"e.0": self.embedding.weight, "e.1": torch.full((3,), value)})
        self.norm = nn.BatchNorm1d(2)
        self.other = self.norm
        self.words = pdrs.StackedParameterDict({"x": torch.full((5,), value), "y": torch.full((6,), value)})
        self.again = self.words
        self.view = nn.Module()
        self.view.weight = nn.Parameter(self.embedding.weight.data)
        nn.init.constant_(self.embedding.weight, value)
        nn.init.constant_(self.norm.running_mean, value)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("way", ["safetensors", "first", "last"])
def test_a_file_without_the_other_names_of_what_is_tied_is_whole(way: str, meta: bool, tmp_path: Path) -> None:
    saved, path = Tied(1.0), tmp_path / "f.safetensors"
    if way == "safetensors":
        safetensors.torch.save_model(saved, path)
    else:
        state = saved.state_dict()
        keys = list(state) if way == "first" else list(reversed(state))
        kept = {state[key].data_ptr(): key for key in reversed(keys) if state[key].numel()}
        safetensors.torch.save_file({key: state[key].clone() for key in kept.values()}, path)
    names = set(safetensors.torch.load_file(path))
    assert len(names) < len(saved.state_dict())
    module = Tied(0.0)
    if meta:
        module = module.to("meta")
        module.head.weight = module.entries["e.0"] = module.view.weight = module.embedding.weight
    assert not any(pdrs.load(path, module))
    assert_same(module, saved)
    assert module.head.weight is module.embedding.weight is module.entries["e.0"]


@pytest.mark.parametrize("missing", ["b.bias", "a.weight"])
def test_what_is_not_tied_is_missing_all_the_same(missing: str, tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    state = module.state_dict()
    state.pop(missing)
    safetensors.torch.save_file(state, tmp_path / "f")
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"'):
        pdrs.load(tmp_path / "f", module)
    assert pdrs.load(tmp_path / "f", module, strict=False).missing_keys == [missing]


def test_a_stacked_dictionary_in_two_places_is_found_by_its_names_in_either(tmp_path: Path) -> None:
    for first, second in (("a", "b"), ("b", "a")):
        safetensors.torch.save_file({f"{first}.x": torch.ones(2), f"{first}.y": torch.ones(3)}, tmp_path / "f")
        sd = pdrs.StackedParameterDict({"x": torch.zeros(2), "y": torch.zeros(3)})
        module = nn.ModuleDict({"a": sd, "b": sd})
        assert not any(pdrs.load(tmp_path / "f", module))
        assert rows_of(module[second]) == {"x": [1, 1], "y": [1, 1, 1]}


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_the_versions_that_torch_notes_decide_what_may_be_missing(
    version: int, converted: bool, tmp_path: Path
) -> None:
    model, path = nn.ModuleDict({"norm": nn.BatchNorm1d(2)}), tmp_path / "f.pt"
    state: Any = model.state_dict()
    state.pop("norm.num_batches_tracked")  # which a BatchNorm has since version 2
    state._metadata["norm"]["version"] = version
    torch.save(state, path)
    if converted:
        assert run(["convert", str(path), str(tmp_path / "g.pt")]) == 0
        path = tmp_path / "g.pt"
    for load in (lambda: model.load_state_dict(torch.load(path)), lambda: pdrs.load(path, model)):
        if version == 1:
            assert not any(load())
        else:
            with pytest.raises(RuntimeError, match=r"Missing key.*norm\.num_batches_tracked"):
                load()


def test_versions_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
    for odd in ({"norm": 3}, {"norm": {"version": "x"}}, [1], {"": None}):
        state: Any = model.state_dict()
        state._metadata = odd
        torch.save(state, tmp_path / "f.pt")
        assert not any(pdrs.load(tmp_path / "f.pt", model))


class Inner(nn.Module):
    """Has a dictionary inside of a dictionary."""

    def __init__(self, kind: type, entry: str) -> None:
        super().__init__()
        self.words = kind({entry: torch.ones(2), "float32_2": torch.ones(2)})
        self.words.sub = pdrs.StackedParameterDict({"x": torch.ones(2)})
        self.words.register_buffer("count", torch.zeros(1))


def test_a_dictionary_that_a_hook_saves_by_name_is_no_collision(tmp_path: Path) -> None:
    sd = pdrs.StackedParameterDict({"a": torch.ones(2), "b": torch.zeros(2)})

    def by_name(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        state.update({prefix + name: row for name, row in sd.named_state_dict().items()})

    sd.register_state_dict_post_hook(by_name)
    pdrs.save(nn.ModuleDict({"sd": sd}), tmp_path / "file")
    assert {name: row.tolist() for name, row in pdrs.open(tmp_path / "file").items()} == {
        "sd.a": [1.0, 1.0],
        "sd.b": [0.0, 0.0],
    }


@pytest.mark.parametrize("kind", [pdrs.ParameterDict, pdrs.StackedParameterDict])
@pytest.mark.parametrize("entry", ["count", "sub.x"])
def test_an_entry_with_the_name_of_another_tensor_is_refused_before_anything_is_written(
    kind: type, entry: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    model = Inner(pdrs.StackedParameterDict, "other")
    pdrs.save(model, path)
    assert {"words.other", "words.float32_2", "words.count", "words.sub.x"} == set(pdrs.open(path))
    before = path.read_bytes()
    broken = Inner(pdrs.StackedParameterDict, entry)
    if kind is pdrs.ParameterDict:
        broken.words = pdrs.ParameterDict({})
        broken.words.register_buffer("count", torch.zeros(1))
        broken.words.sub = pdrs.StackedParameterDict({"x": torch.ones(2)})
        broken.words._parameters[entry] = nn.Parameter(torch.ones(2))
        broken.words._keys[entry] = None
    with pytest.raises(ValueError, match=rf"an entry '{entry}' of the dictionary at 'words\.'"):
        pdrs.save(broken, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (1, 3)])
def test_tensors_whose_strides_of_length_one_are_strange_are_saved(shape: tuple[int, ...], tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("expanded", torch.full((), 3.0).expand(shape))
    module.register_buffer("turned", torch.arange(3.0).expand(1, 3).mT if 3 in shape else torch.ones(1).expand(1, 1).mT)
    path = tmp_path / "a.safetensors"
    pdrs.save(module, path)
    saved = pdrs.open(path)
    for name, value in module.named_buffers():
        assert torch.equal(saved[name].detach(), value)
    module.expanded = module.expanded.clone()
    assert not any(pdrs.load(path, module))
