"""Every tensor that pdrs makes or moves has a storage of its own, of just its own bytes, wherever it lies.

The bug that this hunts: tools that look for tied weights compare storages. If entries are views of one storage, some
keep one entry of all and drop the others, some refuse to save, and to save one entry writes all.
"""

from __future__ import annotations

import copy
import io
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs

PD = pdrs.ParameterDict
Kind = type[nn.ParameterDict]


def entries() -> PD:
    """Make small and large entries of two dtypes, with gradients and buffers; one is transposed, one is empty."""
    pd = PD([(f"n{at}", torch.full((2, at + 1), float(at))) for at in range(6)])
    pd["transposed"] = torch.ones(3, 4).t()
    pd["empty"] = torch.zeros(0, 3)
    pd["scalar"] = torch.tensor(7.0)
    pd["large"] = torch.ones(200, 300)
    pd["long"] = Parameter(torch.arange(5), requires_grad=False)
    pd["long too"] = Parameter(torch.arange(4), requires_grad=False)
    for name in ("n1", "n2", "large"):
        pd[name].grad = torch.ones_like(pd[name])
    pd.register_buffer("mean", torch.zeros(3))
    pd.register_buffer("variance", torch.ones(3))
    return pd


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), PD({"a": torch.ones(3), "b": torch.ones(3)}))


def tensors_of(module: nn.Module) -> list[Tensor]:
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return [*module.parameters(), *gradients, *module.buffers()]


def assert_apart(tensors: list[Tensor]) -> None:
    storages = [each.untyped_storage() for each in tensors]
    assert [storage.nbytes() for storage in storages] == [each.nbytes for each in tensors]
    addresses = [storage.data_ptr() for storage in storages if storage.nbytes()]
    assert len(set(addresses)) == len(addresses)
    assert [storage.data_ptr() for storage in storages] == [each.data_ptr() for each in tensors]


def opened(pd: PD, tmp_path: Path, **options: Any) -> PD:
    del pd["empty"]
    pdrs.save(pd.stack(), tmp_path / "rows.safetensors")
    return pdrs.open(tmp_path / "rows.safetensors", **options).unstack()


def loaded(pd: PD, **options: Any) -> PD:
    file = io.BytesIO()
    torch.save(pd, file)
    file.seek(0)
    made: PD = torch.load(file, weights_only=False, **options)
    return made


WAYS: dict[str, Callable[[PD, Path], nn.Module]] = {
    "double": lambda pd, path: pd.double(),
    "half": lambda pd, path: pd.half(),
    "twice": lambda pd, path: pd.double().float(),
    "to_empty": lambda pd, path: pd.to_empty(device="cpu"),
    "share_memory": lambda pd, path: pd.share_memory(),
    "moved and shared": lambda pd, path: pd.double().share_memory(),
    "deepcopy": lambda pd, path: copy.deepcopy(pd),
    "pickle": lambda pd, path: pickle.loads(pickle.dumps(pd)),
    "torch.load": lambda pd, path: loaded(pd),
    "moved and copied": lambda pd, path: copy.deepcopy(pd.double()),
    "stack and unstack": lambda pd, path: pd.stack().unstack(),
    "open and unstack": lambda pd, path: opened(pd, path),
    "a model": lambda pd, path: pdrs.to(model(), torch.float64),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_tensor_has_a_storage_of_its_own(way: str, tmp_path: Path) -> None:
    assert_apart(tensors_of(WAYS[way](entries(), tmp_path)))


@pytest.mark.parametrize("fake", [False, True])
def test_so_it_is_where_torch_makes_the_parameters_of_a_pickle(fake: bool) -> None:
    pickled = pickle.dumps(PD([(f"n{at}", torch.full((3,), float(at))) for at in range(4)]))
    if fake:
        with torch.inference_mode():
            assert_apart(list(pickle.loads(pickled).values()))
    else:
        pd = loaded(pickle.loads(pickled), map_location="meta")
        assert [each.untyped_storage().nbytes() for each in pd.values()] == [12] * 4


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it was": lambda module: module,
    "double": lambda module: module.double(),
    "share_memory": lambda module: module.share_memory(),
    "deepcopy": copy.deepcopy,
}


def tied(kind: Kind) -> nn.Module:
    module = nn.Module()
    module.pd = kind({f"k{at}": torch.full((3,), float(at)) for at in range(5)})
    module.pd["again"] = module.pd["k3"]
    module.linear = nn.Linear(3, 2)
    return module


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [nn.ParameterDict, PD])
def test_safetensors_finds_the_ties_and_no_others(kind: Kind, move: str, tmp_path: Path) -> None:
    module, other = MOVES[move](tied(kind)), MOVES[move](tied(kind))
    safetensors.torch.save_model(module, str(tmp_path / "model"))
    assert len(safetensors.torch.load_file(tmp_path / "model")) == 5 + 2
    with torch.no_grad():
        for each in other.parameters():
            each.zero_()
    assert safetensors.torch.load_model(other, str(tmp_path / "model")) == (set(), [])
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def kept_by_storage(state: dict[str, Tensor]) -> list[str]:
    """Give the names that are saved by tools that drop tensors whose storage they have seen."""
    seen = set()
    kept = []
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        place = tensor.device, storage.data_ptr(), storage.nbytes()
        if place not in seen:
            seen.add(place)
            kept.append(name)
    return kept


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", [nn.ParameterDict, PD])
def test_whoever_drops_repeated_storages_drops_ties_only(kind: Kind, move: str) -> None:
    state = MOVES[move](tied(kind)).state_dict()
    assert set(state) - set(kept_by_storage(state)) == {"pd.again"}


@pytest.mark.parametrize("move", MOVES)
def test_saving_one_entry_writes_its_bytes(move: str) -> None:
    pd = MOVES[move](PD([(f"n{at}", torch.randn(1000)) for at in range(50)]))
    file = io.BytesIO()
    torch.save(pd["n7"], file)
    assert len(file.getvalue()) < 8000 + 3000


# ---- shared memory ---------------------------------------------------------------------------------------------------


def send_back(queue: Any, answers: Any) -> None:
    for entry in queue.get():
        with torch.no_grad():
            entry += 1
    answers.put("done")


@pytest.mark.parametrize("kind", [nn.ParameterDict, PD])
def test_shared_entries_are_sent_and_stay_shared(kind: Kind) -> None:
    pd = kind([(f"n{at}", torch.full((3,), float(at))) for at in range(4)]).share_memory()
    addresses = [each.data_ptr() for each in pd.values()]
    context = torch.multiprocessing.get_context("fork")
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    child = context.Process(target=send_back, args=(queue, answers))
    child.start()
    queue.put([pd["n1"], pd["n2"]])
    assert answers.get() == "done"
    child.join()
    assert [each.tolist()[0] for each in pd.values()] == [0, 2, 3, 3]
    assert all(each.is_shared() for each in pd.values())
    assert [each.data_ptr() for each in pd.share_memory().values()] == addresses


def test_more_entries_than_files_may_be_open_are_refused_as_a_whole() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    pd = PD([(f"n{at}", torch.zeros(2)) for at in range(1000)])
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"expected at most .* file open, got 1,000.*set_sharing_strategy"):
            pd.share_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not any(each.is_shared() for each in pd.values())
