"""Every guard of a transfer is needed: with its line deleted, a scenario that passes with it fails.

The bugs that this hunts: a guard that guards nothing, so that nobody dares to remove it; a scenario that would pass
without its guard, so that the guard could be lost unseen. The copies are as late as CUDA permits, and the simulated
runtime reports streams that race.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import pdrs
from fake_cuda.control import Control
from pdrs import parameter_dict
from pdrs._moves import run, staging
from tensors import zeros_on

pytestmark = pytest.mark.cuda(devices=2)

PD = pdrs.ParameterDict
SIZE = 1000
Staging = Callable[..., None]


def numbered() -> PD:
    """Make entries of 20 bytes, each at a multiple of 32; all are different, and none is zero."""
    return PD([(f"n{at}", row) for at, row in enumerate((torch.arange(SIZE * 5.0).view(-1, 5) + 1).unbind())])


def is_right(tensors: list[Tensor]) -> bool:
    return torch.equal(torch.stack([each.detach().cpu() for each in tensors]), torch.arange(SIZE * 5.0).view(-1, 5) + 1)


# ---- scenarios: each tells whether all went well ---------------------------------------------------------------------


def memory_with_work_on_it(set_staging: Staging) -> bool:
    pd = numbered()
    with torch.cuda.stream(torch.cuda.Stream()):
        before = torch.empty(64_000, dtype=torch.uint8, device="cuda")
        before.copy_(torch.full((64_000,), 9, dtype=torch.uint8).pin_memory(), non_blocking=True)
        del before  # The slab gets its memory, on which the copy is still to come.
        pd.to("cuda", non_blocking=True)
        return is_right(list(pd.values()))


def work_right_after(set_staging: Staging) -> bool:
    pd = numbered()
    with torch.cuda.stream(torch.cuda.Stream()):
        pd.to("cuda", non_blocking=True)
        return is_right([each.detach().clone() for each in pd.values()])


def few_small_blocks(set_staging: Staging) -> bool:
    set_staging(block_bytes=4096, blocks=2)
    return is_right(list(numbered().cuda().values()))


def two_uploads_through_one_block(set_staging: Staging) -> bool:
    set_staging(blocks=1)
    one = numbered().to("cuda:0", non_blocking=True)
    two = numbered().double().to("cuda:1", non_blocking=True)
    return is_right(list(one.values())) and is_right([each.detach().cpu().float() for each in two.values()])


def another_stream_after_a_blocking_upload(set_staging: Staging) -> bool:
    pd = numbered().cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        return is_right([each.detach().clone() for each in pd.values()])


def a_change_after_a_direct_upload(set_staging: Staging) -> bool:
    pd = numbered().pin_memory()
    old = [each.data for each in pd.values()]
    pd.cuda()
    for each in old:
        each.zero_()
    return is_right(list(pd.values()))


def a_download(set_staging: Staging) -> bool:
    set_staging(block_bytes=4096, blocks=2)
    return is_right(list(numbered().cuda().cpu().values()))


def a_download_through_a_block_that_another_device_reads(set_staging: Staging) -> bool:
    set_staging(blocks=1)
    down, up = numbered().double().cuda(0), numbered()
    up.to("cuda:1", non_blocking=True)
    down.cpu()
    return is_right(list(up.values())) and is_right([each.float() for each in down.values()])


def moved_under_another_stream(target: str) -> bool:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        # In a storage of torch's, which no slab is.
        pd = PD({"all": uploaded()})
    with torch.cuda.stream(two):
        pd.to(target, non_blocking=True)
    with torch.cuda.stream(one):
        again = [zeros_on("cuda", SIZE * 5) for _ in range(3)]
    one.synchronize()
    two.synchronize()
    torch.cuda.synchronize(1)
    del again
    return is_right(list(pd["all"].detach().cpu().unbind()))


def uploaded() -> Tensor:
    return (torch.arange(SIZE * 5.0).view(-1, 5) + 1).cuda()


def a_download_that_does_not_wait_under_another_stream(set_staging: Staging) -> bool:
    return moved_under_another_stream("cpu")


def between_devices_under_another_stream(set_staging: Staging) -> bool:
    return moved_under_another_stream("cuda:1")


def read_by(stream: torch.cuda.Stream) -> bool:
    """Let a stream read entries, whose memory goes and comes back before it has begun."""
    pd = numbered().cuda()
    stream.wait_stream(torch.cuda.current_stream())
    read = [torch.empty(5, pin_memory=True) for _ in range(SIZE)]
    with torch.cuda.stream(stream):
        for to, entry in zip(read, pd.values(), strict=True):
            to.copy_(entry.detach(), non_blocking=True)
    del pd, entry
    again = [zeros_on("cuda", 8000) for _ in range(3)]
    torch.cuda.synchronize()
    del again
    return is_right(read)


def entries_that_die_under_another_stream(set_staging: Staging) -> bool:
    return read_by(torch.cuda.Stream())


def entries_that_die_under_a_stream_of_high_priority(set_staging: Staging) -> bool:
    return read_by(torch.cuda.Stream(priority=-1))


def pinned_memory_that_dies_under_a_copy(set_staging: Staging) -> bool:
    pd = numbered().pin_memory()
    copies = [each.detach().to("cuda", non_blocking=True) for each in pd.values()]
    del pd
    gc.collect()
    return is_right(copies)


def downloaded_memory_that_dies_under_a_copy(set_staging: Staging) -> bool:
    pd = numbered().cuda().to("cpu", non_blocking=True)
    torch.cuda.synchronize()
    first, *others = pd.values()
    first.data = first.detach().clone()  # torch would find the block of page-locked memory by its address.
    copies = [each.detach().to("cuda", non_blocking=True) for each in (first, *others)]
    del pd, others
    gc.collect()
    staging._side_streams[torch.device("cuda:0")].synchronize()  # Not the one that has the copies.
    again = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for size in (32_000, 64_000) for _ in range(2)]
    right = is_right(copies)
    del again
    return right


@dataclass(frozen=True)
class Guard:
    """A line of a module of pdrs, which stands there once, and the scenario that needs it."""

    module: str
    line: str
    scenario: Callable[[Staging], bool]


GUARDS = [
    Guard("_moves.staging", "    side.wait_stream(current)", memory_with_work_on_it),
    Guard("_moves.staging", "        current.wait_stream(side)", work_right_after),
    Guard("_moves.staging", "            last.wait()", few_small_blocks),
    Guard("_moves.staging", "            last.wait()", two_uploads_through_one_block),
    Guard("_moves.staging", "                last.mark()", few_small_blocks),
    Guard("_moves.staging", "        last.wait()", another_stream_after_a_blocking_upload),
    Guard("_moves.staging", "        side.synchronize()", a_change_after_a_direct_upload),
    Guard("_moves.staging", "    block.wait()", a_download),
    Guard("_moves.staging", "                block.mark()", a_download),
    Guard("_moves.staging", "            block.wait()", a_download_through_a_block_that_another_device_reads),
    Guard("_moves.staging", "        source.record_stream(side)", a_download_that_does_not_wait_under_another_stream),
    Guard(
        "_moves.run",
        "            source.record_stream(torch.cuda.current_stream(source.device))",
        between_devices_under_another_stream,
    ),
    Guard("_moves.staging", "        slab.record_stream(stream)", entries_that_die_under_another_stream),
    Guard("_moves.staging", "        slab.record_stream(stream)", entries_that_die_under_a_stream_of_high_priority),
    Guard("_moves.pinned", "                torch.cuda.synchronize(device)", pinned_memory_that_dies_under_a_copy),
    Guard("_moves.pinned", "                torch.cuda.synchronize(device)", downloaded_memory_that_dies_under_a_copy),
]


def without(guard: Guard) -> ModuleType:
    """Return the module with nothing in place of the line."""
    module = sys.modules[f"pdrs.{guard.module}"]
    path = Path(str(module.__file__))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines.count(guard.line) == 1, f"the line {guard.line!r} must stand in {path.name} once"
    at = lines.index(guard.line)
    lines[at] = guard.line[: -len(guard.line.lstrip())] + "pass"
    mutant = ModuleType(module.__name__)
    mutant.__file__ = str(path)
    exec(compile("\n".join(lines), str(path), "exec"), mutant.__dict__)
    return mutant


def use(mutant: Any, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ParameterDicts move by a module that has lost a guard."""
    if guard.module == "_moves.run":
        monkeypatch.setattr(parameter_dict, "run", mutant)
    elif guard.module == "_moves.pinned":
        monkeypatch.setattr(run, "pinned_empty", mutant.pinned_empty)
    else:
        monkeypatch.setattr(run, "staging", mutant)
        monkeypatch.setitem(sys.modules, "pdrs._moves.staging", mutant)  # Which is asked natively, too.


def goes_well(scenario: Callable[[Staging], bool], set_staging: Staging, runtime: Control) -> bool:
    """Run a scenario; whether the values were right, and nothing raced or was freed under a copy."""
    runtime.set_schedule("on_demand")
    right = scenario(set_staging)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    races = runtime.take_races()  # also when the values are wrong: a test that leaves some fails
    return right and not races and runtime.counters.hazards == 0


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.line.strip()} - {guard.scenario.__name__}")
@pytest.mark.slow
def test_a_scenario_goes_well_with_its_guard_and_not_without(
    guard: Guard, fake_cuda: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert goes_well(guard.scenario, pdrs.set_staging, fake_cuda)
    pdrs.set_staging()
    gc.collect()
    fake_cuda.reset()
    torch.cuda.empty_cache()
    mutant = without(guard)
    use(mutant, guard, monkeypatch)
    set_staging = mutant.set_staging if guard.module == "_moves.staging" else pdrs.set_staging
    assert not goes_well(guard.scenario, set_staging, fake_cuda), "the guard is not needed, or the scenario is too kind"
    pdrs.set_staging()
