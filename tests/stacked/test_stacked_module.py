"""StackedParameterDict as a Module: state dicts, copies, moves, and what distributed training does with Modules.

The bugs that this hunts: a checkpoint that gives names other rows, one that another class or another size cannot load,
a strict error that counts tables where the user thinks of names, a copy that is still tied to its source.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing import get_context

import pdrs

SD = pdrs.StackedParameterDict
NAMES = ["a", "b.c", "名前", "\ud800 alone", "keys", "_extra_state.x"]


def filled() -> pdrs.StackedParameterDict:
    sd = SD.from_tensor(NAMES, torch.arange(12.0).view(6, 2).clone())
    sd["matrix"] = torch.full((2, 3), 7.0)
    sd["frozen"] = nn.Parameter(torch.full((2,), 8.0), requires_grad=False)
    del sd["b.c"]
    sd["late"] = torch.full((2,), 9.0)
    return sd


def values(sd: pdrs.StackedParameterDict) -> dict[str, list[Any]]:
    return {name: row.tolist() for name, row in sd.items()}


def same(one: pdrs.StackedParameterDict, other: pdrs.StackedParameterDict) -> bool:
    return list(values(one).items()) == list(values(other).items())


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_tables_and_one_tensor_of_names() -> None:
    state = filled().state_dict()
    assert list(state) == ["float32_2", "float32_2x3", "float32_2_no_grad", "_extra_state"]
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize(
    "target",
    [
        lambda: SD(),
        filled,
        lambda: SD({"other": torch.zeros(2), "a": torch.zeros(5)}),
        lambda: SD([("m", torch.zeros(2, 3)), ("a", torch.zeros(2))]),
        lambda: SD.from_tensor([f"n.{n}" for n in range(50)], torch.zeros(50, 2)),
    ],
    ids=["empty", "the same", "other names", "another order", "larger"],
)
def test_the_own_layout_loads_into_any_dictionary(target: Any) -> None:
    sd, other = filled(), target()
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"words": sd}).state_dict(), file)
    file.seek(0)
    result = nn.ModuleDict({"words": other}).load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(sd, other)
    assert [(key, table.shape, table.requires_grad) for key, table in other.named_parameters()] == [
        (key, table.shape, table.requires_grad) for key, table in sd.named_parameters()
    ]
    other["more"] = torch.ones(2)
    other.compact()
    assert list(other) == [*sd, "more"]
    assert other["late"].tolist() == [9.0, 9.0]


def test_loading_the_same_names_keeps_handles_and_views() -> None:
    sd, other = filled(), filled()
    handle, row = other.lookup(["late", "a"]), other["a"]
    other["a"].data.fill_(5)
    other.load_state_dict(sd.state_dict())
    assert row.tolist() == sd["a"].tolist()
    assert other.gather(handle)[1].tolist() == sd["a"].tolist()


def test_names_that_came_after_a_save_are_not_in_it() -> None:
    sd = filled()
    state = copy.deepcopy(sd.state_dict())
    first = sd.state_dict()
    sd["after"] = torch.zeros(2)
    assert len(sd.state_dict()["_extra_state"]) > len(first["_extra_state"])
    other = SD()
    other.load_state_dict(state)
    assert "after" not in other
    sd.load_state_dict(state)
    assert "after" not in sd
    assert same(sd, other)


def test_a_state_dict_that_is_filled_in_place_brings_its_names() -> None:
    """As distributed checkpoints are loaded."""
    saved = SD.from_tensor(["a", "b"], torch.tensor([[1.0], [2.0]]))
    other = SD.from_tensor(["x", "y"], torch.zeros(2, 1))
    with torch.inference_mode():
        state = other.state_dict()
    for key, value in saved.state_dict().items():
        state[key].copy_(value)
    other.load_state_dict(state)
    assert values(other) == {"a": [1.0], "b": [2.0]}
    assert list(other.state_dict()["_extra_state"]) == list(saved.state_dict()["_extra_state"])


def test_reserved_rows_are_saved_and_loaded_where_there_are_no_names() -> None:
    sd, other = SD(), SD()
    sd.reserve(8, shape=(2,))
    for _ in range(2):
        other.load_state_dict(sd.state_dict())
        assert len(other.table((2,))) == 8


@pytest.mark.parametrize("kind", [nn.ParameterDict, pdrs.ParameterDict])
def test_the_layout_of_a_parameter_dict_goes_in_and_out(kind: type[nn.ParameterDict]) -> None:
    names = ["a", "b", "c", "m"]
    source = kind({"b": torch.ones(2), "a": torch.zeros(2), "m": torch.full((2, 2), 5.0), "c": torch.full((2,), 3.0)})
    sd = SD([(name, torch.zeros_like(source[name])) for name in reversed(names)])
    sd.load_state_dict(dict(reversed(source.state_dict().items())))
    assert values(sd) == {name: source[name].tolist() for name in reversed(names)}
    empty = SD()
    empty.load_state_dict(source.state_dict())
    assert list(empty) == list(source)
    back = kind({name: torch.zeros_like(source[name]) for name in names})
    back.load_state_dict(sd.named_state_dict())
    assert all(torch.equal(back[name], source[name]) for name in names)


def test_strict_messages_speak_of_names() -> None:
    sd = nn.ModuleDict({"words": SD({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(3)})})
    with pytest.raises(RuntimeError) as caught:
        sd.load_state_dict({"words.a": torch.zeros(2), "words.z": torch.zeros(2), "words.c": torch.zeros(4)})
    message = str(caught.value)
    assert 'Missing key(s) in state_dict: "words.b"' in message
    assert 'Unexpected key(s) in state_dict: "words.z"' in message
    assert "size mismatch for words.c: copying a param with shape torch.Size([4])" in message
    result = sd.load_state_dict({"words.a": torch.ones(2)}, strict=False)
    assert not result.unexpected_keys
    assert sd["words"]["a"].tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match=r'parameter named "words\.b", expected torch\.Tensor'):
        sd.load_state_dict({"words.a": torch.ones(2), "words.b": 5, "words.c": torch.zeros(3)})


def test_hooks_may_change_a_state_dict_before_it_is_loaded() -> None:
    sd, called = SD({"a": torch.zeros(2)}), []

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        called.append(module)
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[prefix + key.removeprefix(f"{prefix}old.")] = state.pop(key)

    sd.register_load_state_dict_pre_hook(rename)
    sd.load_state_dict({"old.a": torch.ones(2)})
    assert values(sd) == {"a": [1.0, 1.0]}
    model = nn.ModuleDict({"words": sd})
    model.load_state_dict({f"words.old.{key}": value for key, value in filled().state_dict().items()})
    assert same(sd, filled())
    assert called == [sd, sd]
    model.load_state_dict(filled().state_dict(prefix="words."))
    assert len(called) == 3


class WithMore(pdrs.StackedParameterDict):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1))
        self.head = nn.Linear(1, 1)


@pytest.mark.parametrize("names", [[], ["a", "b"]], ids=["empty", "with names"])
def test_a_subclass_with_parameters_buffers_and_modules_loads_both_layouts(names: list[str]) -> None:
    source = WithMore()
    source.update([("a", torch.ones(2)), ("b", torch.full((2,), 2.0))])
    with torch.no_grad():
        for tensor in (source.scale, source.count, source.head.weight):
            tensor.fill_(5)
    own = nn.ModuleDict({"words": source}).state_dict()
    others = {key: value for key, value in own.items() if "float32_2" not in key and "_extra_state" not in key}
    named = {f"words.{name}": row for name, row in source.named_state_dict().items()}
    for state in (own, named | others):
        target = WithMore()
        target.update([(name, torch.zeros(2)) for name in names])
        result = nn.ModuleDict({"words": target}).load_state_dict(state)
        assert not result.missing_keys
        assert values(target) == values(source)
        assert target.scale.item() == target.count.item() == target.head.weight.item() == 5.0
        target["more"] = torch.zeros(2)
    result = target.load_state_dict({"a": torch.zeros(2)}, strict=False)
    assert result.missing_keys == ["scale", "count", "b", "more", "head.weight", "head.bias"]


def test_damaged_names_are_refused_and_change_nothing() -> None:
    state, other = filled().state_dict(), SD({"other": torch.zeros(2)})
    packed = state["_extra_state"]
    for damaged in (packed[:-3], packed[:40], torch.cat([packed, packed[-4:]])):
        with pytest.raises(RuntimeError, match="damaged"):
            other.load_state_dict(state | {"_extra_state": damaged})
        assert values(other) == {"other": [0.0, 0.0]}


# -- copies ------------------------------------------------------------------------------------------------------------


def through_torch_save(sd: pdrs.StackedParameterDict) -> pdrs.StackedParameterDict:
    file = io.BytesIO()
    torch.save(sd, file)
    file.seek(0)
    loaded: pdrs.StackedParameterDict = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda sd: pickle.loads(pickle.dumps(sd)), through_torch_save],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_and_not_tied(duplicate: Any) -> None:
    sd = filled()
    sd.freeze(["a"])
    made = duplicate(sd)
    assert same(sd, made)
    made["new"] = torch.zeros(2)
    made.pop("late")
    with torch.no_grad():
        made["a"].fill_(5)
    assert "new" not in sd
    assert values(sd) == values(filled())
    made.gather(["a", "new"]).sum().backward()
    assert {name: float(gradient[0]) for name, gradient in made.named_grads() if gradient.any()} == {"new": 1.0}
    assert all(table.grad is None for table in sd.parameters())


def test_stack_and_unstack_are_inverse() -> None:
    sd = filled()
    pd = sd.unstack()
    assert type(pd) is pdrs.ParameterDict
    assert list(pd) == list(sd)
    assert {name: value.requires_grad for name, value in pd.items()} == {name: name != "frozen" for name in sd}
    with torch.no_grad():
        pd["a"].fill_(100)
    assert sd["a"].tolist() == [0.0, 1.0]
    again = pd.stack()
    assert again["a"].tolist() == [100.0, 100.0]
    assert not again["frozen"].requires_grad
    assert list(SD(nn.ParameterDict({"y": torch.ones(1), "x": torch.ones(1)}))) == ["x", "y"]
    elsewhere = sd.to("meta").unstack()
    assert {name: value.device.type for name, value in elsewhere.items()} == dict.fromkeys(sd, "meta")
    with pytest.raises(TypeError, match=r"expected a strided tensor for 'm', got Linear.*pdrs\.ParameterDict"):
        pdrs.ParameterDict({"m": nn.Linear(1, 1)}).stack()


# -- moves -------------------------------------------------------------------------------------------------------------


def test_dtypes_change_with_the_module_and_tables_keep_their_names() -> None:
    sd = filled()
    table = sd.table((2,), requires_grad=True)
    handle = sd.lookup(["late"])
    assert sd.double() is sd
    assert sd.table((2,), torch.float64, requires_grad=True) is table
    assert sd.gather(handle).dtype == torch.float64
    sd["new"] = torch.ones(2, dtype=torch.float64)
    assert [name for name, _ in sd.named_parameters()] == ["float32_2", "float32_2x3", "float32_2_no_grad"]
    with pytest.raises(TypeError, match=r"expected torch\.float64 for 'a'"):
        sd["a"] = torch.zeros(2)
    sd["single"] = torch.ones(2)
    sd.double()
    sd["a"] = torch.ones(2, dtype=torch.float64)
    sd["single"] = torch.zeros(2, dtype=torch.float64)
    assert sd.gather(["a", "single"]).tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_torch_may_swap_tables_when_it_converts_or_loads() -> None:
    sd, table = filled(), None
    sd.freeze(["a"])
    optimizer = torch.optim.Adam(sd.parameters(), lr=1.0)
    for dtype in (torch.float32, torch.float64):
        assert table is None or table is sd.table((2,), dtype, requires_grad=True)
        optimizer.zero_grad()
        sd.gather(["a", "late"]).sum().backward()
        optimizer.step()
        torch.testing.assert_close(sd.gather(["a", "late"]), torch.tensor([[0.0, 1.0], [8.0, 8.0]], dtype=dtype))
        optimizer.zero_grad()
        table = sd.table((2,), dtype, requires_grad=True)
        sd.load_state_dict(filled().state_dict())
        sd.double()
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="attach"):
        sd.update([(f"n.{n}", torch.zeros(2, dtype=torch.float64)) for n in range(9)])


def test_tables_go_to_the_meta_device_and_back() -> None:
    sd = filled()
    state = sd.state_dict()
    meta = copy.deepcopy(sd).to("meta")
    assert meta.gather(["a", "late"]).shape == (2, 2)
    meta.to_empty(device="cpu").load_state_dict(state)
    assert same(meta, sd)
    with torch.device("meta"):
        shapes = SD.from_shapes({"a": (2,), "b": (3,), "late": (2,)})
    del shapes["a"]
    shapes.compact()
    shapes["more"] = torch.empty(2, device="meta")
    assert {name: row.shape for name, row in shapes.items()} == {"b": (3,), "late": (2,), "more": (2,)}
    shapes.to_empty(device="cpu").load_state_dict(state)
    assert same(shapes, sd)
    assigned = copy.deepcopy(sd).to("meta")
    assigned.load_state_dict(state, assign=True)
    assert same(assigned, sd)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:FutureWarning")  # It must still work.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # As older versions warn.
def test_a_model_that_holds_a_dictionary_is_scripted() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].add_module("words", SD({"a": torch.ones(2)}))
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert [name for name, _ in scripted.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("nested", [False, True])
def test_rows_by_name_are_not_lost_in_a_table_on_the_meta_device(nested: bool) -> None:
    entries = [("a", torch.ones(2)), ("b", torch.full((2,), 2.0)), ("c", torch.full((3,), 3.0))]
    sd = SD(entries).to("meta")
    sd.freeze(["a"])
    state = {("sd." if nested else "") + name: value for name, value in reversed(entries)}
    module = nn.ModuleDict({"sd": sd}) if nested else sd
    with pytest.warns(UserWarning, match="on the meta device, which is a no-op.*assign=True") as warned:
        module.load_state_dict(state)
    assert len(warned) == 2, "one for each table"
    assert {table.device.type for table in sd.parameters()} == {"meta"}
    module.load_state_dict(state, assign=True)
    assert {name: row.tolist() for name, row in sd.items()} == {name: value.tolist() for name, value in entries}
    assert all(isinstance(table, nn.Parameter) and table.requires_grad for table in sd.parameters())
    sd.gather(["a", "b"]).sum().backward()
    assert {name: gradient.tolist() for name, gradient in sd.named_grads()} == {"a": [0.0, 0.0], "b": [1.0, 1.0]}


def test_frozen_names_stay_frozen_on_the_meta_device() -> None:
    sd = SD.from_tensor(["a", "b", "c", "d"], torch.zeros(4, 2)).to("meta")
    sd.freeze(["a", "b", "d"])
    sd.unfreeze(["b"])
    sd.gather(["a", "c"]).sum().backward()
    sd.update({"e": torch.zeros(2, device="meta")})  # the table grows
    sd.param_groups(by={"d": {}})
    sd.pop("b")
    sd.update({"f": torch.zeros(2, device="meta")})  # in an old row
    sd.compact()
    sd = copy.deepcopy(sd)
    assert {table.device.type for table in sd.parameters()} == {"meta"}
    sd.to_empty(device="cpu")
    sd.gather(list(sd)).sum().backward()
    gradients = {name: gradient[0].item() for name, gradient in sd.named_grads()}
    assert gradients == {"a": 0.0, "c": 1.0, "d": 0.0, "e": 1.0, "f": 1.0}


def test_a_dictionary_with_frozen_names_is_assigned_from_the_meta_device() -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2))
    sd.freeze(["a"])
    sd.to("meta").load_state_dict(SD.from_tensor(["a", "b"], torch.ones(2, 2)).state_dict(), assign=True)
    sd.gather(["a", "b"]).sum().backward()
    assert {name: gradient.tolist() for name, gradient in sd.named_grads()} == {"a": [0.0, 0.0], "b": [1.0, 1.0]}


def test_values_on_the_meta_device_are_reported_by_name() -> None:
    sd = SD({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r'While copying the parameter named "b", whose dimensions .* meta'):
        sd.load_state_dict({"b": torch.ones(2, device="meta"), "a": torch.zeros(2)})
    assert sd["a"].tolist() == [0.0, 0.0]


def test_a_replica_reads_the_tensors_that_take_the_place_of_parameters() -> None:
    sd = filled()
    replica = sd._replicate_for_data_parallel()
    for name, table in sd.named_parameters():
        setattr(replica, name, table * 2)
    replica.gather(["late", "a"]).sum().backward()
    assert replica["late"].tolist() == [18.0, 18.0]
    assert {name for name, gradient in sd.named_grads() if gradient.any()} == {"late", "a"}


def _write_ones(sd: pdrs.StackedParameterDict) -> None:
    with torch.no_grad():
        sd["a"].fill_(1)


def test_another_process_sees_shared_tables() -> None:
    sd = SD.from_tensor(["a", "b"], torch.zeros(2, 2)).share_memory()
    process = get_context("fork").Process(target=_write_ones, args=(sd,))
    process.start()
    process.join()
    assert values(sd) == {"a": [1.0, 1.0], "b": [0.0, 0.0]}


# -- distributed training ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = SD.from_tensor(["a", "b", "c"], torch.arange(12.0).view(3, 4).clone())
        self.out = nn.Linear(4, 1)

    def forward(self, names: list[str]) -> Tensor:
        scores: Tensor = self.out(self.words.gather(names))
        return scores


def train(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss: Tensor = model(["a", "c", "a"]).pow(2).sum()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")  # torch's own, about single processes and the CPU
def test_ddp_and_fsdp2_train_tables_as_they_train_parameters(tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    plain = Words()
    plain.words.freeze(["c"])
    in_ddp, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = train(plain)
    torch.testing.assert_close(train(nn.parallel.DistributedDataParallel(in_ddp)), expected)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh)
    torch.testing.assert_close(train(sharded), expected)
    for model in (plain, in_ddp, sharded):
        assert model.words.named_state_dict()["c"].tolist() == [8.0, 9.0, 10.0, 11.0]
        assert not torch.equal(model.words.named_state_dict()["a"], torch.arange(4.0))

    checkpoint.save({"model": sharded.state_dict()}, checkpoint_id=tmp_path / "sharded")
    loaded = Words()
    loaded.words = SD.from_tensor(["c", "z", "a"], torch.zeros(3, 4))
    fully_shard(loaded, mesh=mesh)
    state = {"model": loaded.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path / "sharded")
    loaded.load_state_dict(state["model"])
    assert values(loaded.words.unstack()) == values(sharded.words.unstack())

    dcp_to_torch_save(tmp_path / "sharded", tmp_path / "model.pt")
    loaded = Words()
    loaded.words = SD()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", mmap=True)["model"])
    assert values(loaded.words) == values(sharded.words.unstack())

    checkpoint.save({"model": in_ddp.state_dict()}, checkpoint_id=tmp_path / "saved")
    loaded = Words()
    state = {"model": loaded.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    loaded.load_state_dict(state["model"])
    assert values(loaded.words) == values(in_ddp.words)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")  # torch's own, about single processes and the CPU
def test_what_a_sharded_table_can_do_and_what_it_refuses() -> None:
    from torch.distributed.fsdp import fully_shard

    whole, sharded = Words(), Words()
    sharded.words.reserve(1)
    fully_shard(sharded, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
    whole.load_state_dict({key: value.full_tensor() for key, value in sharded.named_parameters()}, strict=False)
    for model in (whole, sharded):
        model(["a", "c", "a"]).sum().backward()
    words = sharded.words
    assert torch.equal(words.norms(), whole.words.norms())
    assert words.named_state_dict().keys() == whole.words.named_state_dict().keys()
    for (name, ours), (other, theirs) in zip(words.named_grads(), whole.words.named_grads(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert values(words.unstack()) == values(whole.words)
    refused = {
        "insert names": lambda: words.__setitem__("new", torch.zeros(4)),
        "set names": lambda: words.__setitem__("a", torch.zeros(4)),
        "write rows": lambda: words.scatter(["a"], torch.zeros(1, 4)),
        "freeze names": lambda: words.freeze(["a"]),
        "load the layout": lambda: words.load_state_dict(whole.words.named_state_dict()),
        "insert names, reserve rows or compact before": lambda: words.reserve(100),
    }
    for message, change in refused.items():
        with pytest.raises(RuntimeError, match=message):
            change()
        assert values(words.unstack()) == values(whole.words)
    assert torch.equal(words.pop("b"), whole.words["b"])
    assert list(words) == ["a", "c"]
