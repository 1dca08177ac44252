"""Archives: what is saved opens and loads as it was, by names, from a file that any safetensors reader understands.

The bugs that this hunts: a value, a name, an order or a flag that comes back as another; an entry that lies otherwise
in memory and is saved scrambled; training that writes to the file; a file that a reader of safetensors refuses; memory,
or a header, that grows with the number of names; a save that replaces a good file by a broken one.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import pdrs

NAMES = ["a", "layer.0.weight", "type", "é\ud800", "日本", "b"]


def _values() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3),
        "layer.0.weight": torch.randn(4, 2).t(),
        "type": torch.randn(2, 4),
        "é\ud800": torch.randn(3),
        "日本": torch.tensor(2.5),
        "short": torch.randn(5).bfloat16(),
        "empty": torch.empty(0, 3),
        "frozen": nn.Parameter(torch.randn(3), requires_grad=False),
        "gaps": torch.randn(8, 6)[::2, ::3],
        "counts": nn.Parameter(torch.arange(4), requires_grad=False),
    }


def _dictionary(cls: type[pdrs.ParameterDict | pdrs.StackedParameterDict]) -> nn.Module:
    return cls(list(_values().items()))


def _assert_same(found: object, expected: object) -> None:
    """Compare names, order, values, dtypes and flags of two dictionaries of any class."""
    assert list(found) == list(expected)
    for name in expected:
        one, other = found[name], expected[name]
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad), name
        assert torch.equal(one, other), name


BOTH = pytest.mark.parametrize("cls", [pdrs.ParameterDict, pdrs.StackedParameterDict])


@BOTH
def test_what_was_saved_opens_as_it_was(cls: type[nn.Module], tmp_path: Path) -> None:
    saved = _dictionary(cls)
    size = pdrs.save(saved, tmp_path / "a.safetensors")
    assert size == (tmp_path / "a.safetensors").stat().st_size
    _assert_same(pdrs.open(tmp_path / "a.safetensors", verify=True), saved)


@BOTH
@pytest.mark.parametrize("target", [pdrs.ParameterDict, pdrs.StackedParameterDict, nn.ParameterDict])
def test_any_class_loads_what_any_class_saved(cls: type[nn.Module], target: type[nn.Module], tmp_path: Path) -> None:
    saved = _dictionary(cls)
    if target is nn.ParameterDict:  # It takes neither dots nor the names of attributes.
        for name in ("layer.0.weight", "type"):
            del saved[name]
    pdrs.save(saved, tmp_path / "a.safetensors")
    filled = target({name: nn.Parameter(torch.zeros_like(saved[name]), saved[name].requires_grad) for name in saved})
    assert str(pdrs.load(tmp_path / "a.safetensors", filled)) == "<All keys matched successfully>"
    expected = {name: saved[name] for name in filled}
    _assert_same(filled, expected)


@BOTH
@pytest.mark.parametrize("target", [pdrs.ParameterDict, pdrs.StackedParameterDict])
def test_an_empty_dictionary_takes_the_names_over(
    cls: type[nn.Module], target: type[nn.Module], tmp_path: Path
) -> None:
    saved = _dictionary(cls)
    pdrs.save(saved, tmp_path / "a.safetensors")
    filled = target()
    pdrs.load(tmp_path / "a.safetensors", filled)
    _assert_same(filled, saved)


@pytest.mark.parametrize("target", [pdrs.ParameterDict, pdrs.StackedParameterDict])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_an_empty_dictionary_takes_over_names_that_have_a_tensor_each(
    target: type[nn.Module], name: str, tmp_path: Path
) -> None:
    words = pdrs.ParameterDict([("x.y", torch.randn(2)), ("é", torch.randn(3)), ("z", torch.arange(2.0))])
    saved = nn.ModuleDict({"words": words, "head": nn.Linear(2, 2)})
    if name == "a.pt":
        torch.save(saved.state_dict(), tmp_path / name)
    else:
        pdrs.save(saved, tmp_path / name, layout="named")
    filled = nn.ModuleDict({"words": target(), "head": nn.Linear(2, 2)})
    assert str(pdrs.load(tmp_path / name, filled)) == "<All keys matched successfully>"
    _assert_same(filled["words"], {key: words[key] for key in filled["words"]})
    assert set(filled["words"]) == set(words)
    assert torch.equal(filled["head"].weight, saved["head"].weight)
    filled["words"] = pdrs.ParameterDict({"x.y": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        pdrs.load(tmp_path / name, filled)


class _WithMore(pdrs.ParameterDict):
    def __init__(self, entries: dict[str, torch.Tensor], number: float) -> None:
        super().__init__(entries)
        self.register_buffer("steps", torch.tensor(number))
        self.register_buffer("passing", torch.tensor(number), persistent=False)
        self.head = nn.Linear(1, 1)


@pytest.mark.parametrize("layout", ["archive", "named"])
@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("is_root", [False, True])
def test_what_a_dictionary_has_beside_entries_is_loaded(
    layout: Any, is_empty: bool, is_root: bool, tmp_path: Path
) -> None:
    saved = _WithMore({"a": torch.ones(2)}, 5)
    filled = _WithMore({} if is_empty else {"a": torch.zeros(2)}, 1)
    pdrs.save(saved if is_root else nn.ModuleDict({"w": saved}), tmp_path / "a", layout=layout)
    pdrs.load(tmp_path / "a", filled if is_root else nn.ModuleDict({"w": filled}))
    assert (filled["a"].tolist(), filled.steps.item(), filled.passing.item()) == ([1, 1], 5, 1)
    assert torch.equal(filled.head.weight, saved.head.weight)
    other = pdrs.ParameterDict({"a": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"(w\.)?head\.weight", "(w\.)?head\.bias"|"(w\.)?steps"'):
        pdrs.load(tmp_path / "a", other if is_root else nn.ModuleDict({"w": other}))


def test_a_file_has_the_tensors_of_the_state_dict_and_all_are_aligned(tmp_path: Path) -> None:
    saved = nn.Module()
    saved.flags = nn.Buffer(torch.tensor([True, False, True]))
    saved.layer = nn.Linear(200, 200, dtype=torch.float64)
    saved.halves = pdrs.ParameterDict({"a": torch.ones(3).half()})
    pdrs.save(saved, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    assert list(header) == ["halves.float16_3", "halves._extra_state", "flags", "layer.weight", "layer.bias"]
    assert all(header[name]["data_offsets"][0] % 8 == 0 for name in ("layer.weight", "layer.bias"))
    assert header["halves.float16_3"]["data_offsets"][0] % 2 == 0
    opened = pdrs.open(tmp_path / "a")
    assert list(opened) == ["halves.a", "flags", "layer.weight", "layer.bias"]
    assert torch.equal(opened["layer.weight"], saved.layer.weight)


def _model() -> nn.Module:
    model = nn.Module()
    model.words = pdrs.ParameterDict({"x.y": torch.randn(2), "z": torch.randn(3)})
    model.words["child"] = pdrs.StackedParameterDict({"deep": torch.randn(2, 2)})
    model.stacked = pdrs.StackedParameterDict({f"n{n}": torch.randn(4) for n in range(5)})
    model.head = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.tied = model.head[0]
    model.words.register_buffer("steps", torch.randn(()))
    return model


def test_a_module_is_saved_whole_and_loads_whole(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, other = _model(), _model()
    pdrs.save(model, tmp_path / "m.safetensors")
    assert not torch.equal(other.words["z"], model.words["z"])
    pdrs.load(tmp_path / "m.safetensors", other, verify=True)
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    opened = pdrs.open(tmp_path / "m.safetensors")
    for name in ("words.x.y", "words.child.deep", "stacked.n3", "head.0.weight", "tied.bias", "words.steps"):
        assert name in opened, name
    assert torch.equal(opened["words.child.deep"], model.words["child"]["deep"])
    assert torch.equal(opened["head.1.num_batches_tracked"], torch.tensor(0))
    assert not opened["head.1.num_batches_tracked"].requires_grad
    _assert_same(pdrs.open(tmp_path / "m.safetensors", prefix="stacked."), model.stacked)
    assert list(pdrs.open(tmp_path / "m.safetensors", prefix="words.")) == ["x.y", "z", "steps", "child.deep"]
    with pytest.raises(KeyError, match="no name in the checkpoint is longer than 'wrong' and begins with it"):
        pdrs.open(tmp_path / "m.safetensors", prefix="wrong")


@BOTH
def test_what_does_not_fit_is_told_as_torch_tells_it(cls: type[nn.Module], tmp_path: Path) -> None:
    pdrs.save(pdrs.ParameterDict({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(2)}), tmp_path / "a")
    module = nn.ModuleDict({"w": cls({"a": torch.zeros(2)})})
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key"):
        pdrs.load(tmp_path / "a", module)
    other = pdrs.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)})
    with pytest.raises(RuntimeError) as raised:
        pdrs.load(tmp_path / "a", other)
    for part in ('Missing key(s) in state_dict: "d"', 'Unexpected key(s) in state_dict: "c"', "size mismatch for b"):
        assert part in str(raised.value)
    del other["b"]
    result = pdrs.load(tmp_path / "a", other, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["d"], ["b", "c"])
    assert other["a"].tolist() == [1.0, 1.0]


def test_a_filled_stacked_dictionary_keeps_names_and_dtypes_when_a_parameter_dict_is_loaded(tmp_path: Path) -> None:
    pdrs.save(pdrs.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)}), tmp_path / "a")
    stacked = pdrs.StackedParameterDict({"b": torch.zeros(2), "c": torch.zeros(2)})
    result = pdrs.load(tmp_path / "a", stacked, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["c"], ["a"])
    assert (stacked["b"].tolist(), stacked["c"].tolist()) == ([1, 1], [0, 0])
    with pytest.raises(RuntimeError, match="Missing key"):
        pdrs.load(tmp_path / "a", stacked)
    half = pdrs.StackedParameterDict({"a": torch.zeros(2).half(), "b": torch.zeros(2).half()})
    pdrs.load(tmp_path / "a", half)
    assert (half["b"].dtype, half["b"].tolist()) == (torch.float16, [1, 1])
    frozen = pdrs.StackedParameterDict({"a": nn.Parameter(torch.zeros(2), requires_grad=False), "b": torch.zeros(2)})
    pdrs.load(tmp_path / "a", frozen)
    assert (frozen["a"].requires_grad, frozen["b"].requires_grad, frozen["a"].tolist()) == (False, True, [1, 1])
    pdrs.save(pdrs.ParameterDict({"a": torch.ones(2), "b": torch.ones(3)}), tmp_path / "b")
    with pytest.raises(RuntimeError, match="size mismatch"):
        pdrs.load(tmp_path / "b", pdrs.StackedParameterDict({"a": torch.ones(3), "b": torch.ones(2)}))


@BOTH
def test_part_of_a_file_opens_in_the_order_asked_for(cls: type[nn.Module], tmp_path: Path) -> None:
    saved = _dictionary(cls)
    pdrs.save(saved, tmp_path / "a")
    names = ["frozen", "日本", "a", "counts"]
    _assert_same(pdrs.open(tmp_path / "a", names=names), {name: saved[name] for name in names})
    assert list(pdrs.open(tmp_path / "a", names=np.array(["a"]))) == ["a"]
    with pytest.raises(KeyError, match="missing"):
        pdrs.open(tmp_path / "a", names=["a", "missing"])
    with pytest.raises(ValueError, match="each name once"):
        pdrs.open(tmp_path / "a", names=["a", "a"])
    converted = pdrs.open(tmp_path / "a", dtype=torch.float64)
    assert (converted["short"].dtype, converted["counts"].dtype) == (torch.float64, torch.int64)
    assert torch.equal(converted["a"], saved["a"].double())


@BOTH
def test_a_prefix_may_end_within_the_names_of_a_dictionary(cls: type[nn.Module], tmp_path: Path) -> None:
    words = cls({"de.a": torch.ones(2), "en.a": torch.zeros(2), "de.b": torch.ones(3), "de.": torch.ones(1)})
    pdrs.save(words, tmp_path / "a")
    pdrs.save(nn.ModuleDict({"words": words, "head": nn.Linear(1, 1)}), tmp_path / "m")
    for path, prefix in ((tmp_path / "a", "de."), (tmp_path / "m", "words.de.")):
        found = pdrs.open(path, prefix=prefix)
        _assert_same(found, {"a": words["de.a"], "b": words["de.b"]})
        _assert_same(pdrs.open(path, prefix=prefix, names=["b"]), {"b": words["de.b"]})
    for prefix in ("words.float32", "words._extra", "words.fr."):
        with pytest.raises(KeyError, match="no name in the checkpoint is longer than"):
            pdrs.open(tmp_path / "m", prefix=prefix)


def test_popped_rows_patterns_and_groups_survive(tmp_path: Path) -> None:
    sd = pdrs.StackedParameterDict({f"{n}.bias": torch.full((2,), float(n)) for n in range(6)})
    sd.param_groups(by={r"^[0-2]": {"weight_decay": 0.0}})
    sd.pop("1.bias")
    sd.popitem()
    pdrs.save(sd, tmp_path / "a")
    opened = pdrs.open(tmp_path / "a")
    _assert_same(opened, sd)
    assert repr(opened) == repr(sd)  # It tells how many rows are free.
    assert [name for name, _ in opened.named_parameters()] == [name for name, _ in sd.named_parameters()]
    assert opened.state_dict()["_extra_state"].tolist() == sd.state_dict()["_extra_state"].tolist()
    opened["0.new"] = torch.zeros(2)
    opened["9.new"] = torch.zeros(2)
    sd["0.new"] = torch.zeros(2)
    sd["9.new"] = torch.zeros(2)
    _assert_same(opened, sd)


def test_training_an_opened_dictionary_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    rows = torch.randn(20_000, 16)
    names = [f"n{n}" for n in range(20_000)]
    pdrs.save(pdrs.StackedParameterDict.from_tensor(names, rows), path)
    before = path.read_bytes()
    opened = pdrs.open(path)
    optimizer = torch.optim.Adam(opened.parameters())
    opened.attach_optimizer(optimizer)
    opened.gather(["n3", "n19999"]).sum().backward()
    optimizer.step()
    opened["new"] = torch.ones(16)
    opened.pop("n7")
    assert path.read_bytes() == before
    assert not torch.equal(opened["n3"], rows[3])
    assert torch.equal(opened["n5"], rows[5])
    # Two that were opened from one file are two.
    assert torch.equal(pdrs.open(path)["n3"], rows[3])


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_opened_dictionary_outlives_its_file(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    rows = torch.randn(20_000, 16)
    pdrs.save(pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(20_000)], rows), path)
    opened = pdrs.open(path)
    if how == "removed":
        path.unlink()
    else:
        pdrs.save(pdrs.StackedParameterDict({"other": torch.ones(2)}), path)
    assert torch.equal(opened.table((16,)), rows)


def test_an_opened_dictionary_is_copied_and_pickled_by_value(tmp_path: Path) -> None:
    rows = torch.randn(20_000, 16)
    sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(20_000)], rows)
    sd["x"] = torch.ones(3)
    pdrs.save(sd, tmp_path / "a")
    opened = pdrs.open(tmp_path / "a")
    _assert_same(copy.deepcopy(opened), sd)
    file = io.BytesIO()
    torch.save(opened, file)
    file.seek(0)
    _assert_same(torch.load(file, weights_only=False), sd)
    one = io.BytesIO()
    torch.save(opened.table((3,)), one)
    assert len(one.getvalue()) < 10_000


def test_a_save_over_the_file_that_is_open_is_right(tmp_path: Path) -> None:
    pdrs.save(
        pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(20_000)], torch.randn(20_000, 16)), tmp_path / "a"
    )
    opened = pdrs.open(tmp_path / "a")
    with torch.no_grad():
        opened["n77"].fill_(1)
    pdrs.save(opened, tmp_path / "a")
    _assert_same(pdrs.open(tmp_path / "a", verify=True), opened)


# -- the file ----------------------------------------------------------------------------------------------------------


@BOTH
def test_readers_of_safetensors_see_the_tables(cls: type[nn.Module], tmp_path: Path) -> None:
    module = nn.ModuleDict({"w": _dictionary(cls), "l": nn.Linear(2, 2)})
    pdrs.save(module, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert {"w.float32_3", "w._extra_state", "l.weight"} < set(file.keys())
        assert file.metadata()["format"] == "pt"
        fields = json.loads(file.metadata()["pdrs"])
        assert fields["dictionaries"] == {"w.": cls.__name__}
    state = load_file(tmp_path / "a.safetensors")
    loaded = nn.ModuleDict({"w": pdrs.StackedParameterDict(), "l": nn.Linear(2, 2)})
    loaded.load_state_dict(state)
    _assert_same(loaded["w"], module["w"])


def test_what_safetensors_wrote_opens(tmp_path: Path) -> None:
    sd = pdrs.StackedParameterDict({"x": torch.ones(2), "y": torch.zeros(3)})
    save_model(sd, str(tmp_path / "model"))
    _assert_same(pdrs.open(tmp_path / "model"), sd)
    save_file({"x": torch.ones(2), "n": torch.tensor([1, 2])}, tmp_path / "plain")
    opened = pdrs.open(tmp_path / "plain", verify=True)
    assert {name: value.tolist() for name, value in opened.items()} == {"x": [1.0, 1.0], "n": [1, 2]}
    filled = pdrs.ParameterDict({"x": torch.zeros(2), "n": nn.Parameter(torch.zeros(2, dtype=torch.int64), False)})
    pdrs.load(tmp_path / "plain", filled)
    assert filled["n"].tolist() == [1, 2]


def test_what_torch_wrote_opens(tmp_path: Path) -> None:
    model = _model()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    opened = pdrs.open(tmp_path / "m.pt")
    assert torch.equal(opened["stacked.n3"], model.stacked["n3"])
    other = _model()
    pdrs.load(tmp_path / "m.pt", other)
    assert torch.equal(other.words["z"], model.words["z"])
    torch.save({"x": [1]}, tmp_path / "odd.pt")
    with pytest.raises(pdrs.CheckpointError, match="found list at 'x'"):
        pdrs.open(tmp_path / "odd.pt")
    (tmp_path / "odd.pt").write_bytes(b"PK\3\4 no archive at all")
    with pytest.raises(pdrs.CheckpointError, match=r"odd\.pt: torch.load cannot read it"):
        pdrs.open(tmp_path / "odd.pt")


def test_conjugated_tensors_that_torch_wrote_open(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, dtype=torch.complex64).conj(), "b": torch.randn(3, dtype=torch.complex64)}
    torch.save(values, tmp_path / "m.pt")
    opened = pdrs.open(tmp_path / "m.pt")
    assert all(torch.equal(opened[name], value) for name, value in values.items())


def test_a_dictionary_of_many_shapes_costs_a_short_header(tmp_path: Path) -> None:
    torch.manual_seed(2)
    values = {f"n{n}": torch.randn(n % 50 + 1, n // 50 + 1) for n in range(350)}
    values |= {f"h{n}": torch.randn(n + 1).half() for n in range(20)}
    pd = pdrs.ParameterDict(list(values.items()))
    for saved, name in ((pd, "pd"), (pd.stack(), "sd")):
        pdrs.save(saved, tmp_path / name)
        assert int.from_bytes((tmp_path / name).read_bytes()[:8], "little") < 130 * 370
        opened = pdrs.open(tmp_path / name, verify=True)
        _assert_same(opened, pd)
        filled = pdrs.ParameterDict({one: torch.zeros_like(value) for one, value in values.items()})
        pdrs.load(tmp_path / name, filled)
        assert all(torch.equal(filled[one], pd[one]) for one in pd)
        loaded = pdrs.StackedParameterDict()
        loaded.load_state_dict(load_file(tmp_path / name))
        _assert_same(loaded, pd)


def test_names_cost_few_bytes(tmp_path: Path) -> None:
    count = 20_000
    sd = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(count)], torch.randn(count, 15))
    sd.update({f"m{n}": torch.randn(7) for n in range(count)})
    pdrs.save(sd, tmp_path / "a")
    data = count * 4 * 15 + len(sd.table((7,))) * 4 * 7
    assert (tmp_path / "a").stat().st_size <= data + sum(map(len, sd)) + 28 * len(sd)


@BOTH
def test_extra_memory_is_a_block_at_most(cls: type[nn.Module], tmp_path: Path) -> None:
    pd = pdrs.ParameterDict([(str(n), torch.zeros(1 << 18)) for n in range(100)])
    saved = pd if cls is pdrs.ParameterDict else pd.stack()
    largest = 0
    empty = torch.empty

    def counting(*args: object, **kwargs: object) -> Tensor:
        nonlocal largest
        made = empty(*args, **kwargs)
        largest = max(largest, made.nbytes)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counting)
        tracemalloc.start()
        pdrs.save(saved, tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest <= 64 << 20
    assert peak <= 64 << 20


# -- what cannot be saved ----------------------------------------------------------------------------------------------


class _WithState(nn.Module):
    def get_extra_state(self) -> object:
        return {"steps": 3}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ModuleDict({"m": _WithState()}), "'m._extra_state' of the state dict is of type dict"),
        (pdrs.ParameterDict({"s": torch.eye(2).to_sparse()}), "'s' is of layout torch.sparse_coo"),
        (nn.Linear(2, 2, device="meta"), "'weight' is a Tensor on the meta device"),
        ({"a": torch.ones(2)}, "expected a torch.nn.Module"),
        (nn.ModuleDict({"m": pdrs.ParameterDict({"c": torch.ones(1).cdouble()})}), r"complex128, of which 'm\.c' is"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_lost(module: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TypeError, match=message):
        pdrs.save(module, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, "float16"])
def test_a_dtype_in_which_values_would_be_lost_is_refused(dtype: Any, tmp_path: Path) -> None:
    pdrs.save(pdrs.ParameterDict({"a": torch.ones(2)}), tmp_path / "a")
    with pytest.raises(TypeError, match=rf"expected a dtype of floating point.* got '?{dtype}"):
        pdrs.open(tmp_path / "a", dtype=dtype)
    assert pdrs.open(tmp_path / "a", dtype=torch.complex64)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("size", [0, -1, "5GB", 5e9])
def test_a_size_of_shards_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected max_shard_size in bytes, got '?{size}"):
        pdrs.save(pdrs.ParameterDict({"a": torch.ones(2)}), tmp_path / "a", layout="named", max_shard_size=size)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_missing_file_are_ordinary_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        pdrs.save(pdrs.ParameterDict(), tmp_path / "missing" / "a")
    with pytest.raises(FileNotFoundError):
        pdrs.open(tmp_path / "missing")


def test_an_empty_dictionary_and_a_module_without_one_are_saved(tmp_path: Path) -> None:
    for module in (pdrs.ParameterDict(), pdrs.StackedParameterDict()):
        pdrs.save(module, tmp_path / "a")
        assert len(pdrs.open(tmp_path / "a", verify=True)) == 0
        pdrs.load(tmp_path / "a", type(module)())
    linear = nn.Linear(2, 3)
    pdrs.save(linear, tmp_path / "a")
    assert torch.equal(pdrs.open(tmp_path / "a")["weight"], linear.weight)


def test_hooks_and_subclasses_are_asked(tmp_path: Path) -> None:
    pd = pdrs.ParameterDict({"a": torch.ones(2)})
    pd.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "b": torch.zeros(1)}))
    pdrs.save(nn.ModuleDict({"w": pd}), tmp_path / "a")
    assert list(pdrs.open(tmp_path / "a")) == ["w.a", "w.b"]


def test_hooks_of_the_modules_around_a_dictionary_see_its_entries(tmp_path: Path) -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"w": pdrs.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})})

    def without_b(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        del state["w.b"]

    saved, loaded = model(), model()
    saved.register_state_dict_post_hook(without_b)
    pdrs.save(saved, tmp_path / "a")
    assert list(pdrs.open(tmp_path / "a")) == ["w.a"]

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name in [name for name in state if name.startswith("old.")]:
            state["w." + name.removeprefix("old.")] = state.pop(name)

    old = pdrs.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)})
    pdrs.save(nn.ModuleDict({"old": old}), tmp_path / "old")
    loaded.register_load_state_dict_pre_hook(rename)
    pdrs.load(tmp_path / "old", loaded)
    assert loaded["w"]["b"].tolist() == [0, 0]


@BOTH
def test_a_hook_of_a_dictionary_renames_what_it_loads(cls: type[nn.Module], tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        state[prefix + "new"] = state.pop(prefix + "old")

    pdrs.save(pdrs.ParameterDict({"old": torch.ones(2)}), tmp_path / "a")
    module = cls({"new": torch.zeros(2)})
    module.register_load_state_dict_pre_hook(rename)
    pdrs.load(tmp_path / "a", module)
    assert module["new"].tolist() == [1, 1]


def test_a_module_that_has_its_own_state_dict_is_asked(tmp_path: Path) -> None:
    class Chosen(nn.ModuleDict):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            found = super().state_dict(*arguments, **options)
            return {name: tensor for name, tensor in found.items() if not name.endswith("b")}

    words = pdrs.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    pdrs.save(Chosen({"w": words}), tmp_path / "a")
    assert list(pdrs.open(tmp_path / "a")) == ["w.a"]
