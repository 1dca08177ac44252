"""Every tensor on a device has a storage of its own, too, and its memory is not handed out under work that uses it.

The bugs that this hunts: tied weights that are none (see test_storages.py); memory that torch's allocator gives to
somebody else while a stream still reads it, because the storage of a view is none of the allocator's.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_storages import MOVES, PD, assert_apart, entries, kept_by_storage, loaded, model, opened, tensors_of, tied

import pdrs
from fake_cuda.control import Control
from tensors import zeros_on

pytestmark = pytest.mark.cuda(devices=2)

WAYS: dict[str, Callable[[PD, Path], Any]] = {
    "up": lambda pd, path: pd.cuda(),
    "up with another dtype": lambda pd, path: pd.to("cuda", torch.float16),
    "up without waiting": lambda pd, path: pd.to("cuda", non_blocking=True),
    "to another device": lambda pd, path: pd.cuda().to("cuda:1"),
    "up and down": lambda pd, path: pd.cuda().cpu(),
    "down without waiting": lambda pd, path: pd.cuda().to("cpu", non_blocking=True),
    "pinned": lambda pd, path: pd.pin_memory(),
    "pinned and up": lambda pd, path: pd.pin_memory().cuda(),
    "to_empty": lambda pd, path: pd.to_empty(device="cuda"),
    "deepcopy": lambda pd, path: copy.deepcopy(pd.cuda()),
    "pickle": lambda pd, path: loaded(pd.cuda()),
    "loaded to a device": lambda pd, path: loaded(pd, map_location="cuda"),
    "stack and unstack": lambda pd, path: pd.stack().cuda().unstack(),
    "opened on a device": lambda pd, path: opened(pd, path, device="cuda"),
    "a model": lambda pd, path: pdrs.to(model(), "cuda"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_tensor_has_a_storage_of_its_own(way: str, tmp_path: Path) -> None:
    assert_apart(tensors_of(WAYS[way](entries(), tmp_path)))


@pytest.mark.parametrize("move", ["as it was", "deepcopy"])
def test_whoever_drops_repeated_storages_drops_ties_only(move: str) -> None:
    state = MOVES[move](tied(PD).cuda()).state_dict()
    assert set(state) - set(kept_by_storage(state)) == {"pd.again"}


def test_saving_one_entry_writes_its_bytes() -> None:
    pd = PD([(f"n{at}", torch.randn(1000)) for at in range(50)]).cuda()
    file = io.BytesIO()
    torch.save(pd["n7"], file)
    assert len(file.getvalue()) < 8000 + 3000


def test_streams_that_torch_hands_out_are_others_each_time_though_all_were_asked_for() -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    PD({"a": torch.zeros(3), "b": torch.zeros(3)}).cuda()  # the first move asks torch for all its streams
    three = torch.cuda.Stream()
    assert len({one.stream_id, two.stream_id, three.stream_id}) == 3
    rest = [torch.cuda.Stream().stream_id for _ in range(31)]
    assert {one.stream_id, two.stream_id} <= set(rest)


@pytest.mark.parametrize("how", ["views", "unstack", "load", "gradient"])
def test_memory_is_not_handed_out_under_a_stream_that_reads_it(how: str, fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    pd = PD([(f"n{at}", torch.full((64,), at + 1.0)) for at in range(100)])
    if how == "unstack":
        pd = pd.stack().cuda().unstack()
    elif how == "load":
        pd = loaded(pd, map_location="cuda")
    else:
        for each in pd.values():
            each.grad = each.detach().clone()
        del each  # Or it would keep the slab.
        pd.cuda()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    read = torch.empty(100, 64, pin_memory=True)
    with torch.cuda.stream(other):
        for at, entry in enumerate(pd.values()):
            source = entry.grad if how == "gradient" else entry.detach()
            assert source is not None
            read[at].copy_(source, non_blocking=True)
        del source, entry
    pd.zero_grad()
    if how != "gradient":
        del pd
    gc.collect()
    again = [zeros_on("cuda", 6400) for _ in range(4)]
    torch.cuda.synchronize()
    del again
    assert read[:, 0].tolist() == [at + 1.0 for at in range(100)]


def test_memory_is_handed_out_again_when_all_streams_are_done(fake_cuda: Control) -> None:
    fake_cuda.set_memory(3 << 20)
    for _ in range(20):
        PD({"a": torch.zeros(100_000), "b": torch.zeros(100_000)}).cuda()
    assert torch.cuda.memory_allocated() < 3 << 20
