"""torch's own ways to save, and safetensors', with modules that hold either class of ParameterDict.

The bugs that this hunts: a file whose size or number of tensors grows by the name where it could by the table, an entry
that takes its whole block into a file, names that stay the old ones where a checkpoint was loaded into the tensors of a
state dict, a checkpoint that changes while it is written in the background.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import pdrs

SD = pdrs.StackedParameterDict
FLOATS = 16
# What a file may have beside the values: names in headers, and the padding of a few tensors.
OVERHEAD = 4096


def stacked(entries: int, prefix: str = "n.") -> pdrs.StackedParameterDict:
    return SD.from_tensor([f"{prefix}{at:06d}" for at in range(entries)], torch.randn(entries, FLOATS))


class Model(nn.Module):
    """A dictionary among ordinary layers."""

    def __init__(self, words: nn.Module) -> None:
        super().__init__()
        self.words = words
        self.out = nn.Linear(FLOATS, 2)


def model_of(entries: int, kind: str, prefix: str = "n.") -> Model:
    sd = stacked(entries, prefix)
    return Model(sd if kind == "stacked" else sd.unstack())


def other_than(model: Model, kind: str) -> Model:
    """Return a model of the same names with other values; a stacked dictionary has none yet."""
    if kind == "stacked":
        return Model(SD())
    return Model(pdrs.ParameterDict({name: torch.zeros(FLOATS) for name in model.words}))


def same(one: Model, other: Model) -> bool:
    pairs = zip(one.words.items(), other.words.items(), strict=True)
    return torch.equal(one.out.weight, other.out.weight) and all(
        mine == theirs and torch.equal(value, other_value) for (mine, value), (theirs, other_value) in pairs
    )


def storages(path: Path) -> list[int]:
    """Return the bytes of each storage in a file of ``torch.save``."""
    with zipfile.ZipFile(path) as archive:
        return [each.file_size for each in archive.infolist() if Path(each.filename).parent.name == "data"]


def saved_alone(value: Tensor, folder: Path) -> int:
    """Return the bytes that ``torch.save`` writes of the values of one tensor."""
    torch.save(value, folder / "one.pt")
    assert torch.equal(torch.load(folder / "one.pt", weights_only=True), value)
    return sum(storages(folder / "one.pt"))


# -- torch.save and torch.load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stacked", "each its own"])
def test_a_saved_module_has_a_storage_a_table_or_block(kind: str, tmp_path: Path) -> None:
    counts = []
    for entries in (50, 2000):
        model = model_of(entries, kind)
        torch.save(model, tmp_path / "model.pt")
        sizes = storages(tmp_path / "model.pt")
        counts.append(len(sizes))
        assert max(sizes) == entries * FLOATS * 4
        assert same(model, torch.load(tmp_path / "model.pt", weights_only=False))
    assert counts[0] == counts[1] <= 5


@pytest.mark.parametrize("mmap", [False, True])
def test_a_stacked_state_dict_has_a_storage_a_table_and_one_for_the_names(mmap: bool, tmp_path: Path) -> None:
    path, loaded = tmp_path / "state.pt", Model(SD())
    for entries in (50, 2000):
        model = model_of(entries, "stacked")
        torch.save(model.state_dict(), path)
        assert len(storages(path)) == 4
        assert path.stat().st_size < entries * (4 * FLOATS + 8 + 24) + OVERHEAD
        loaded.load_state_dict(torch.load(path, weights_only=True, mmap=mmap))
        assert same(model, loaded)
    before = path.read_bytes()
    with torch.no_grad():
        loaded.words.table((FLOATS,)).zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_state_dict_of_parameters_has_the_bytes_of_each_entry_once(moved: bool, mmap: bool, tmp_path: Path) -> None:
    model = model_of(100, "each its own")
    if moved:
        model.double().float()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert sorted(storages(tmp_path / "state.pt")) == sorted([FLOATS * 4] * 100 + [2 * FLOATS * 4, 2 * 4])
    loaded = other_than(model, "each its own")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap))
    assert same(model, loaded)


def test_the_named_layout_of_tables_has_a_storage_a_table(tmp_path: Path) -> None:
    sd = stacked(500)
    torch.save(sd.named_state_dict(), tmp_path / "named.pt")
    assert storages(tmp_path / "named.pt") == [500 * FLOATS * 4]
    loaded = SD()
    loaded.load_state_dict(torch.load(tmp_path / "named.pt", weights_only=True))
    assert [(name, row.tolist()) for name, row in loaded.items()] == [(name, row.tolist()) for name, row in sd.items()]


# -- one entry alone ---------------------------------------------------------------------------------------------------


def loose(pd: pdrs.ParameterDict) -> pdrs.ParameterDict:
    return pdrs.ParameterDict({name: value.detach().clone() for name, value in pd.items()})


@pytest.mark.parametrize(
    "prepare",
    [
        loose,
        lambda pd: loose(pd).double().float(),
        lambda pd: copy.deepcopy(loose(pd)),
        lambda pd: pickle.loads(pickle.dumps(loose(pd))),
        lambda pd: pd,
    ],
    ids=["loose", "moved", "deepcopied", "unpickled", "unstacked"],
)
def test_an_entry_of_a_parameter_dict_takes_only_its_own_bytes_into_a_file(
    prepare: Callable[[pdrs.ParameterDict], pdrs.ParameterDict], tmp_path: Path
) -> None:
    pd = prepare(stacked(1000).unstack())
    assert saved_alone(pd["n.000500"], tmp_path) == FLOATS * 4
    assert saved_alone(pd.state_dict()["n.000500"], tmp_path) == FLOATS * 4


@pytest.mark.parametrize(
    "take",
    [
        lambda sd: sd["n.000500"].clone(),
        lambda sd: sd["n.000500"].detach().clone(),
        lambda sd: sd.gather(["n.000500"])[0],
        lambda sd: sd.unstack()["n.000500"],
        lambda sd: sd.pop("n.000500"),
        lambda sd: sd.popitem()[1],
    ],
    ids=["clone", "detached clone", "gather", "unstack", "pop", "popitem"],
)
def test_a_copy_of_a_row_takes_only_its_own_bytes_into_a_file(
    take: Callable[[pdrs.StackedParameterDict], Tensor], tmp_path: Path
) -> None:
    assert saved_alone(take(stacked(1000)), tmp_path) == FLOATS * 4


def test_an_entry_in_shared_memory_takes_only_its_own_bytes_into_a_file_of_torch(tmp_path: Path) -> None:
    pd = loose(stacked(1000).unstack()).share_memory()
    assert saved_alone(pd["n.000500"], tmp_path) == FLOATS * 4


def test_a_row_takes_its_table_into_a_file_of_torch_but_not_of_safetensors(tmp_path: Path) -> None:
    sd = stacked(1000)
    assert saved_alone(sd["n.000500"], tmp_path) == 1000 * FLOATS * 4, "docs/stacked/saving.md tells to clone it"
    save_file({"row": sd["n.000500"].detach()}, tmp_path / "row.safetensors")
    assert (tmp_path / "row.safetensors").stat().st_size < FLOATS * 4 + 200


# -- safetensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["stacked", "each its own"])
def test_safetensors_saves_and_loads_a_model(kind: str, moved: bool, tmp_path: Path) -> None:
    model, path = model_of(300, kind), tmp_path / "model.safetensors"
    if moved:
        model.double().float()
    save_model(model, str(path))
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == (2 + 2 if kind == "stacked" else 2 + 300)
    loaded = other_than(model, kind)
    assert load_model(loaded, str(path)) == (set(), [])
    assert same(model, loaded)


def test_a_stacked_file_of_safetensors_grows_by_rows_and_names_alone(tmp_path: Path) -> None:
    sizes = []
    for entries in (100, 1100):
        save_file(model_of(entries, "stacked").state_dict(), tmp_path / "model.safetensors")
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
        assert len(load_file(tmp_path / "model.safetensors")) == 4
    grown = (sizes[1] - sizes[0]) / 1000
    assert grown < FLOATS * 4 + len("n.000000") + 24


# -- distributed checkpoints -------------------------------------------------------------------------------------------


in_one_process = pytest.mark.usefixtures("one_process")
# torch's own, about single processes and the CPU.
ignoring_warnings = pytest.mark.filterwarnings("ignore")


def written(folder: Path) -> list[int]:
    """Return the bytes of each item that a distributed checkpoint wrote."""
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    return [each.length for each in metadata.storage_data.values()]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return empty tensors of the names and sizes that are in a distributed checkpoint."""
    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}


@in_one_process
@ignoring_warnings
@pytest.mark.parametrize("kind", ["stacked", "each its own"])
def test_a_distributed_checkpoint_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    for entries in (20, 200):
        model, folder = model_of(entries, kind), tmp_path / f"of {entries}"
        checkpoint.save(model.state_dict(), checkpoint_id=folder)
        assert len(written(folder)) == (2 + 2 if kind == "stacked" else 2 + entries)
        loaded = Model(stacked(entries)) if kind == "stacked" else other_than(model, kind)
        state = loaded.state_dict()
        checkpoint.load(state, checkpoint_id=folder)
        loaded.load_state_dict(state)
        assert same(model, loaded)


@in_one_process
@ignoring_warnings
def test_names_come_with_a_distributed_checkpoint_that_was_loaded_into_tensors_of_others(tmp_path: Path) -> None:
    # As many names of the same lengths, so that the sizes fit; some are the same, in other rows.
    saved = SD.from_tensor(["a", "b", "c", "d"], torch.arange(8.0).view(4, 2))
    loaded = SD.from_tensor(["d", "x", "a", "y"], torch.zeros(4, 2))
    checkpoint.save(saved.state_dict(), checkpoint_id=tmp_path / "saved")
    state = loaded.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    loaded.load_state_dict(state)
    assert {name: row.tolist() for name, row in loaded.items()} == {name: row.tolist() for name, row in saved.items()}
    assert list(loaded) == ["a", "b", "c", "d"]


def test_what_is_written_into_the_tensors_of_a_state_dict_is_not_taken_for_the_names() -> None:
    sd, other = SD({"a": torch.zeros(2)}), SD({"b": torch.ones(2)})
    state = sd.state_dict()
    state["_extra_state"].copy_(other.state_dict()["_extra_state"])
    assert list(sd) == ["a"]
    sd.load_state_dict(other.state_dict())
    assert list(sd) == ["b"]


@in_one_process
@ignoring_warnings
def test_an_empty_dictionary_takes_over_a_distributed_checkpoint_of_any_size(tmp_path: Path) -> None:
    model, loaded = model_of(100, "stacked"), Model(SD())
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / "saved")
    state = tensors_of(tmp_path / "saved")
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    loaded.load_state_dict(state)
    assert same(model, loaded)


@in_one_process
@ignoring_warnings
@pytest.mark.parametrize("kind", ["stacked", "each its own"])
def test_what_is_saved_in_the_background_is_as_it_was_when_the_save_began(kind: str, tmp_path: Path) -> None:
    model = model_of(500, kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    saving = checkpoint.async_save(model.state_dict(), checkpoint_id=tmp_path / "saved")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name in list(model.words)[::2]:
        del model.words[name]
    model.words["late"] = torch.ones(FLOATS)
    if kind == "stacked":
        model.words.compact()
    saving.result()
    state = tensors_of(tmp_path / "saved")
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())


@in_one_process
@ignoring_warnings
@pytest.mark.parametrize("kind", ["stacked", "each its own"])
def test_the_state_dicts_of_torch_distributed_go_out_and_in(kind: str) -> None:
    # These walk along dots, also those of names.
    model = model_of(50, kind, prefix="n")
    loaded = other_than(model, kind)
    set_model_state_dict(loaded, get_model_state_dict(model))
    assert same(model, loaded)


# Each of two processes holds half of the rows of a table; its names are in both.
TWO_PROCESSES = """
import sys
import torch, pdrs
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
names = [f"n.{at}" for at in range(101)]
model = nn.Sequential(pdrs.StackedParameterDict.from_tensor(names, torch.arange(303.0).view(101, 3)))
fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (2,)))
checkpoint.save(model.state_dict(), checkpoint_id=f"{folder}/saved")
state = model.state_dict()
with torch.no_grad():
    state["0.float32_3"].to_local().zero_()
checkpoint.load(state, checkpoint_id=f"{folder}/saved")
model.load_state_dict(state)
begin = 51 * rank
expected = torch.arange(303.0).view(101, 3)[begin : begin + 51]
assert torch.equal(model[0].table((3,)).to_local(), expected)
assert list(model[0]) == names
distributed.destroy_process_group()
"""


@in_one_process
@ignoring_warnings
@pytest.mark.slow
def test_what_two_processes_saved_in_shards_is_loaded_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # A shard of the table from each, and the names once.
    assert len(written(folder / "saved")) == 3
    state = tensors_of(folder / "saved")
    checkpoint.load(state, checkpoint_id=folder / "saved")
    sd = SD()
    sd.load_state_dict({key.removeprefix("0."): value for key, value in state.items()})
    assert [row.tolist() for row in sd.values()] == torch.arange(303.0).view(101, 3).tolist()
