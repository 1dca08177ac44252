"""Moves of a StackedParameterDict: its tables, their gradients, and what is known of their rows.

The bugs that this hunts: a table that becomes another Parameter, a gradient or a mask of frozen rows that stays behind,
a failure that leaves half a move, an optimizer or a handle that looks at rows that have gone.

On a machine without a GPU all of this runs on the simulated runtime. It runs no kernels, so values are made and
compared on the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs
from fake_cuda.control import Control
from observed import held_tensors

pytestmark = pytest.mark.cuda

SD = pdrs.StackedParameterDict


@pytest.fixture(autouse=True)
def _usual_staging() -> Iterator[None]:
    yield
    pdrs.set_staging()


def trained() -> pdrs.StackedParameterDict:
    """Make tables of three kinds, one with a gradient and a frozen row."""
    sd = SD.from_tensor([f"n{at}" for at in range(1000)], torch.arange(5000.0).view(1000, 5).clone())
    sd["matrix"] = torch.full((2, 3), 7.0, dtype=torch.float64)
    sd["count"] = Parameter(torch.arange(5), requires_grad=False)
    sd.gather(["n1", "n2", "n3"]).sum().backward()
    sd.freeze(["n2"])
    return sd


def masks(sd: pdrs.StackedParameterDict) -> list[torch.Tensor]:
    """Give the masks of frozen rows: no other tensors that it holds are bool."""
    return [tensor for tensor in held_tensors(sd) if tensor.dtype == torch.bool]


def state(sd: pdrs.StackedParameterDict) -> list[Any]:
    """Give all that there is of the tables, on the host."""
    tables: list[Any] = [mask.cpu().tolist() for mask in masks(sd)]
    for parameter in sd.parameters():
        gradient = None if parameter.grad is None else parameter.grad.cpu().tolist()
        tables.append((parameter.dtype, parameter.detach().cpu().tolist(), gradient))
    assert len(tables) == 4
    return tables


def devices(sd: pdrs.StackedParameterDict) -> set[str]:
    found = [*sd.parameters(), *masks(sd)]
    found += [table.grad for table in sd.parameters() if table.grad is not None]
    return {str(one.device) for one in found}


# -- on the CPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda sd: sd.double(), lambda sd: pdrs.to(nn.ModuleList([sd]), torch.float64)])
def test_tables_move_at_once_and_stay_the_same_parameters(move: Any) -> None:
    sd = trained()
    tables, handle = list(sd.parameters()), sd.lookup(["n3", "n1"])
    asked: list[object] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        # torch's own way would give the same result, one by one.
        if event == "call" and frame.f_code is nn.Module._apply.__code__:
            asked.append(frame.f_locals["self"])

    sys.setprofile(profile)
    try:
        move(sd)
    finally:
        sys.setprofile(None)
    assert not any(one is sd for one in asked), "torch was asked"
    assert [one is other for one, other in zip(sd.parameters(), tables, strict=True)] == [True] * 3
    assert [table.dtype for table in tables] == [torch.float64, torch.float64, torch.int64]
    assert tables[0].grad is not None
    assert tables[0].grad.dtype == torch.float64
    assert tables[0].grad[:4].sum(1).tolist() == [0, 5, 0, 5]
    assert sd.gather(handle).tolist() == [[15, 16, 17, 18, 19], [5, 6, 7, 8, 9]]


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")
def test_frozen_rows_stay_frozen_and_state_follows_behind_a_move() -> None:
    sd = trained()
    optimizer = torch.optim.Adam(sd.parameters(), lr=0.5)
    sd.attach_optimizer(optimizer)
    optimizer.step()
    sd.double().float()
    optimizer.zero_grad()
    before = {name: sd[name].tolist() for name in ("n2", "n3")}
    # The table grows between: a gradient of the old size comes, too.
    gathered = sd.gather(["n2", "n3", "n3"])
    sd["late"] = torch.ones(5)
    (gathered.sum() + sd.gather(["late"]).sum()).backward()
    optimizer.step()
    assert sd["n2"].tolist() == before["n2"]
    assert sd["n3"].tolist() != before["n3"]
    assert dict(sd.named_grads())["late"].tolist() == [1] * 5


def test_a_function_of_somebody_else_reaches_every_table() -> None:
    sd = trained()
    seen: list[tuple[int, ...]] = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor.double() if tensor.is_floating_point() else tensor

    sd._apply(double)
    # Just the tables and the gradient: no mask, and nothing that was only asked.
    assert seen == [(1000, 5), (1000, 5), (1, 2, 3), (1, 5)]
    assert sd.table((5,), torch.float64).grad is not None


def test_shared_tables_keep_their_rows() -> None:
    sd = trained()
    sd.share_memory()
    assert all(table.is_shared() for table in sd.parameters())
    assert sd["n7"].tolist() == [35, 36, 37, 38, 39]


# -- between host and devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["eager", "on_demand"])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_tables_come_and_go_with_gradients_and_masks(schedule: str, non_blocking: bool, fake_cuda: Control) -> None:
    fake_cuda.set_schedule(schedule)
    pdrs.set_staging(block_bytes=1024, blocks=2)
    sd = trained()
    before, tables = state(sd), list(sd.parameters())
    sd.to("cuda", non_blocking=non_blocking)
    assert devices(sd) == {"cuda:0"}
    assert state(sd) == before
    sd.cpu()
    assert devices(sd) == {"cpu"}
    assert state(sd) == before
    assert [one is other for one, other in zip(sd.parameters(), tables, strict=True)] == [True] * 3
    sd.gather(["n2", "n3"]).sum().backward()
    assert [sd.table((5,)).grad[row, 0].item() for row in (2, 3)] == [0, 2]


def test_copies_of_tables_go_through_page_locked_blocks(fake_cuda: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=2)
    sd = trained()
    sd.unfreeze()
    sd.cuda()
    up = fake_cuda.counters.copies["H2D"]
    sd.cpu()
    down = fake_cuda.counters.copies["D2H"]
    assert up.pageable == down.pageable == 0
    # 20,000 bytes of values and as many of gradients.
    for copies in (up, down):
        assert copies.count >= 10
        assert copies.largest <= 4096


@pytest.mark.parametrize("nth", [1, 3, 7, 12])
def test_a_copy_that_fails_leaves_tables_and_masks_as_they_were(nth: int, fake_cuda: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=2)
    sd = trained()
    before, addresses = state(sd), [table.data_ptr() for table in sd.parameters()]
    fake_cuda.fail("copy", nth=nth, error="cudaErrorInvalidValue")
    with pytest.raises(RuntimeError, match="invalid argument"):
        sd.cuda()
    assert devices(sd) == {"cpu"}
    assert state(sd) == before
    assert [table.data_ptr() for table in sd.parameters()] == addresses
    sd.cuda()
    assert state(sd) == before


def test_handles_and_new_names_follow_to_a_device(fake_cuda: Control) -> None:
    sd = trained()
    handle = sd.lookup(["n1"])
    sd.cuda()
    assert sd.indices(handle).device.type == "cuda"
    sd.cpu()
    assert sd.gather(handle).tolist() == [[5, 6, 7, 8, 9]]


def test_page_locked_tables_are_copied_with_no_staging(fake_cuda: Control) -> None:
    sd = trained()
    tables, optimizer = list(sd.parameters()), torch.optim.SGD(sd.parameters(), lr=1.0)
    sd["late"] = torch.zeros(5)  # the table has grown, and its gradient with it
    before = state(sd)
    assert sd.pin_memory() is sd
    assert all(table.is_pinned() for table in tables)
    assert tables[0].grad is not None
    assert tables[0].grad.is_pinned()
    assert state(sd) == before
    assert [one is other for one, other in zip(sd.parameters(), tables, strict=True)] == [True] * 3
    sd["later"] = torch.ones(5)
    sd.gather(["n1", "n2", "later"]).sum().backward()
    optimizer.step()
    # What was one, and what was another's, is where it was: n1 has two gradients, n2 is frozen.
    assert [sd[name][0].item() for name in ("n1", "n2", "later")] == [3.0, 10.0, 0.0]
    addresses = [table.data_ptr() for table in tables]
    sd.pin_memory()
    assert [table.data_ptr() for table in tables] == addresses
    sd.cuda()
    assert devices(sd) == {"cuda:0"}
    assert fake_cuda.counters.copies["H2D"].pageable <= 1  # the mask of frozen rows


def test_tables_stay_as_they_are_if_memory_cannot_be_page_locked(fake_cuda: Control) -> None:
    sd = trained()
    before, addresses = state(sd), [table.data_ptr() for table in sd.parameters()]
    fake_cuda.fail("host registration", nth=2, error="cudaErrorMemoryAllocation")
    with pytest.raises(RuntimeError, match="page-lock"):
        sd.pin_memory()
    assert state(sd) == before
    assert [table.data_ptr() for table in sd.parameters()] == addresses
    assert not any(table.is_pinned() for table in sd.parameters())
