"""Moves between host and devices: what is copied, how often, in which order, and what is left when something fails.

The bugs that this hunts: a copy that nobody waits for, or everybody; memory that is used again under a copy; a block, a
stream, a device that is taken for another; a failure that leaves half a move, or memory; a capture that is broken.

On a machine without a GPU all of this runs on the simulated runtime, which shows that work is ordered rightly, not that
it is fast. It runs no kernels, so values are made and compared on the host, and no dtype is changed on the device.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs
from fake_cuda.control import Control
from tensors import TORCH, zeros_on

pytestmark = pytest.mark.cuda(devices=2)

PD = pdrs.ParameterDict


@pytest.fixture(params=["eager", "on_demand"])
def late(request: pytest.FixtureRequest, fake_cuda: Control) -> Control:
    """Give the runtime, once with copies that are done at once, and once with copies as late as CUDA permits."""
    fake_cuda.set_schedule(request.param)
    return fake_cuda


@pytest.fixture(autouse=True)
def _usual_staging() -> Iterator[None]:
    yield
    pdrs.set_staging()


def numbered(count: int, length: int = 5, dtype: torch.dtype = torch.float32) -> PD:
    """Make entries that are all different."""
    values = torch.arange(count * length).reshape(count, length).to(dtype)
    return PD([(f"n{at}", row) for at, row in enumerate(values.clone().unbind())])


def assorted() -> PD:
    """Make entries of many sizes and kinds, with gradients, ties and buffers."""
    torch.manual_seed(0)
    pd = PD([(f"n{size}", torch.randn(size)) for size in (1, 0, 7, 300, 2000, 3)])
    pd["matrix"] = torch.randn(6, 4).t()
    pd["double"] = torch.randn(33, dtype=torch.float64)
    pd["half"] = torch.randn(17).half()
    pd["integer"] = Parameter(torch.arange(9), requires_grad=False)
    pd["scalar"] = torch.randn(())
    pd["tie"] = pd["n7"]
    for name in ("n7", "n300", "double"):
        pd[name].grad = torch.randn(pd[name].shape, dtype=pd[name].dtype)
    pd.register_buffer("mean", torch.randn(5))
    pd.register_buffer("count", torch.tensor(7))
    return pd


def tensors_of(module: nn.Module) -> list[Tensor]:
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    return [*module.parameters(), *gradients, *module.buffers()]


def values_of(module: nn.Module) -> list[Tensor]:
    """Copy all that a module on the CPU holds."""
    return [each.detach().clone() for each in tensors_of(module)]


def assert_holds(module: nn.Module, values: list[Tensor]) -> None:
    """Compare by a copy of torch's own to the host."""
    found = [each.detach().cpu() for each in tensors_of(module)]
    assert len(found) == len(values)
    for one, two in zip(found, values, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def devices_of(module: nn.Module) -> set[str]:
    return {str(each.device) for each in tensors_of(module)}


# ---- values, on any schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(1 << 20, 3), (4096, 1), (4096, 2), (4096, 3), (1024, 2)], ids=str)
def test_all_entries_come_and_go_with_their_values(blocks: tuple[int, int], late: Control) -> None:
    pdrs.set_staging(block_bytes=blocks[0], blocks=blocks[1])
    pd = assorted()
    values, objects = values_of(pd), [id(each) for each in pd.parameters()]
    pd.cuda()
    assert devices_of(pd) == {"cuda:0"}
    assert_holds(pd, values)
    pd.to("cuda:1")
    assert devices_of(pd) == {"cuda:1"}
    assert_holds(pd, values)
    pd.cpu()
    assert devices_of(pd) == {"cpu"}
    assert_holds(pd, values)
    assert pd["tie"] is pd["n7"]
    assert pd["matrix"].stride() == (1, 4)
    assert [id(each) for each in pd.parameters()] == objects
    assert [name for name, _ in pd.named_buffers()] == ["mean", "count"]


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules", "ignore:Casting complex values")
def test_dtype_and_device_change_at_once(dtype: torch.dtype, non_blocking: bool, late: Control) -> None:
    pdrs.set_staging(block_bytes=1024, blocks=2)
    pd, expected = assorted(), values_of(assorted().to(dtype))
    pd.to("cuda", dtype, non_blocking=non_blocking)
    assert_holds(pd, expected)
    back = values_of(assorted().to(dtype).to(torch.float32))
    pd.to("cpu", torch.float32, non_blocking=non_blocking)
    torch.cuda.current_stream().synchronize()  # What keeps its dtype is on the way until then.
    assert_holds(pd, back)


def test_to_empty_and_to_there_and_back_keep_objects(late: Control) -> None:
    pd = assorted()
    objects = [id(each) for each in pd.parameters()]
    pd.to_empty(device="cuda")
    assert devices_of(pd) == {"cuda:0"}
    pd.to_empty(device="cpu")
    assert devices_of(pd) == {"cpu"}
    assert [id(each) for each in pd.parameters()] == objects


def test_a_move_to_where_it_is_copies_nothing(fake_cuda: Control) -> None:
    pd = assorted().cuda()
    pointers = [each.data_ptr() for each in pd.parameters()]
    before = fake_cuda.counters
    pd.cuda().to("cuda:0")
    pdrs.to(pd, "cuda")
    pd.share_memory()
    assert fake_cuda.counters == before
    assert [each.data_ptr() for each in pd.parameters()] == pointers


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_loose_entries_on_a_device_move(device: str, late: Control) -> None:
    pdrs.set_staging(block_bytes=1024, blocks=2)
    sizes = [3, 500, 1, 0, 256, 257, 17, 2000, 5]
    expected = [torch.arange(size).float() + size for size in sizes]
    pd = PD([(f"n{at}", value.cuda()) for at, value in enumerate(expected)])
    pd["tie"] = pd["n4"]
    pd.register_buffer("buffer", torch.ones(3).cuda())
    pd.to(device)
    assert devices_of(pd) == {device}
    for at, value in enumerate(expected):
        assert torch.equal(pd[f"n{at}"].cpu(), value), at
    assert pd["tie"] is pd["n4"]
    assert pd.buffer.cpu().tolist() == [1, 1, 1]


def test_entries_in_a_slab_and_loose_ones_move_together(late: Control) -> None:
    pd = numbered(100).cuda()
    pd["loose"] = torch.arange(7.0).cuda()
    pd["there"] = torch.arange(3.0)
    pd.cpu()
    assert torch.equal(torch.stack([pd[f"n{at}"] for at in range(100)]).flatten(), torch.arange(500.0))
    assert pd["loose"].tolist() == list(range(7))
    assert pd["there"].tolist() == [0, 1, 2]


def test_entries_that_are_not_contiguous_on_the_device_come_back(late: Control) -> None:
    pd = PD([("t", torch.arange(6.0).view(2, 3).cuda().t()), ("a", torch.ones(3).cuda())])
    pd.cpu()
    assert late.counters.copies["D2H"].pageable == 0
    assert pd["t"].stride() == (1, 3)
    assert pd["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert pd["a"].tolist() == [1, 1, 1]


def test_entries_with_gaps_on_the_device_are_left_to_torch(fake_cuda: Control) -> None:
    pd = PD([("gaps", torch.arange(6.0).cuda()[::2]), ("a", torch.ones(3).cuda())])
    # torch gathers them on the device, which this runtime cannot.
    with pytest.raises(RuntimeError, match="runs no kernels"):
        pd.cpu()
    assert devices_of(pd) == {"cuda:0"}


def test_ties_among_loose_entries_between_others_come_back(late: Control) -> None:
    pd = PD([(f"n{at}", torch.full((4,), float(at)).cuda()) for at in range(6)])
    pd = PD([("n0", pd["n0"]), ("n1", pd["n1"]), ("again 0", pd["n0"]), ("n2", pd["n2"]), ("again 1", pd["n1"])])
    pd.cpu()
    assert [value[0].item() for value in pd.values()] == [0, 1, 0, 2, 1]


# ---- how often -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("non_blocking", [False, True])
def test_many_entries_take_few_copies_and_no_waiting_for_the_device(fake_cuda: Control, non_blocking: bool) -> None:
    pd = numbered(100_000, 8)
    pd["integer"] = Parameter(torch.arange(10), requires_grad=False)
    pdrs.set_staging(block_bytes=1 << 18, blocks=3)
    pd.to("cuda", non_blocking=non_blocking)
    copies = fake_cuda.counters.copies["H2D"]
    groups, nbytes = 2, 100_000 * 32 + 80
    assert copies.count <= nbytes / (1 << 18) + groups + 2
    assert nbytes <= copies.bytes < nbytes + 1000
    assert copies.pageable == 0
    assert fake_cuda.calls("cudaDeviceSynchronize") == 0
    assert fake_cuda.calls("cudaStreamSynchronize") == 0
    assert fake_cuda.counters.device_allocations <= groups
    pd.cpu()
    copies = fake_cuda.counters.copies["D2H"]
    assert copies.count <= nbytes / (1 << 18) + groups + 2
    assert copies.pageable == 0
    assert fake_cuda.calls("cudaDeviceSynchronize") == 0
    assert fake_cuda.calls("cudaStreamSynchronize") == 0
    assert torch.equal(torch.stack(list(pd.values())[:-1]).flatten(), torch.arange(800_000.0))


def test_loose_entries_are_waited_for_a_block_at_a_time(fake_cuda: Control) -> None:
    pd = PD([(f"n{at}", torch.full((16,), float(at)).cuda()) for at in range(1000)])
    waits = fake_cuda.calls("cudaEventSynchronize") + fake_cuda.calls("cudaStreamSynchronize")
    pdrs.set_staging(block_bytes=1 << 14, blocks=2)
    pd.cpu()
    assert fake_cuda.counters.copies["D2H"].pageable == 0
    assert fake_cuda.calls("cudaEventSynchronize") + fake_cuda.calls("cudaStreamSynchronize") - waits <= 2 * (4 + 1)
    assert [value[0].item() for value in pd.values()] == list(range(1000))


def test_large_entries_are_cut_over_blocks(late: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=2)
    pd = PD([("a", torch.arange(5000.0)), ("b", torch.arange(3.0)), ("c", torch.arange(9000.0))])
    pd.cuda()
    assert late.counters.copies["H2D"].largest == 4096
    pd.cpu()
    assert late.counters.copies["D2H"].largest == 4096
    assert all(torch.equal(value, torch.arange(float(len(value)))) for value in pd.values())


def test_blocks_are_used_again(fake_cuda: Control) -> None:
    pd = numbered(1000).cuda().cpu()
    allocations = fake_cuda.counters.host_allocations
    for _ in range(3):
        pd.cuda()
        pd.cpu()
    assert fake_cuda.counters.host_allocations == allocations


# ---- when ------------------------------------------------------------------------------------------------------------


def test_a_blocking_move_returns_with_the_data(fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    pd = numbered(100).cuda()
    # A stream that waits for nothing sees it: if it did not, this would be a race.
    with torch.cuda.stream(torch.cuda.Stream()):
        assert pd["n3"].detach().clone().cpu().tolist() == [15, 16, 17, 18, 19]


def test_a_move_that_does_not_block_returns_before_the_copies(fake_cuda: Control) -> None:
    pd = numbered(100)
    pd.to("cuda").cpu()  # what is allocated once is
    with fake_cuda.hold():
        pd.to("cuda", non_blocking=True)
        assert fake_cuda.pending > 0
    assert pd["n3"].cpu().tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("harm", ["overwrite", "free"])
def test_the_host_tensors_may_change_or_die_after_a_move_that_does_not_block(
    harm: str, pinned: bool, fake_cuda: Control
) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=3)
    pd = numbered(500)
    if pinned:
        pd.pin_memory()
    old = [value.data for value in pd.values()]
    fake_cuda.set_schedule("on_demand")
    pd.to("cuda", non_blocking=True)
    if harm == "overwrite":
        for each in old:
            each.fill_(-1)
    del old
    gc.collect()
    again = numbered(500).to("cuda:1", non_blocking=True)  # takes the same blocks
    assert torch.equal(torch.stack([value.cpu() for value in pd.values()]).flatten(), torch.arange(2500.0))
    assert torch.equal(torch.stack([value.cpu() for value in again.values()]).flatten(), torch.arange(2500.0))
    assert fake_cuda.counters.hazards == 0


def test_a_dictionary_may_die_while_it_is_copied(fake_cuda: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=3)
    fake_cuda.set_schedule("on_demand")
    for at in range(3):
        numbered(500).to("cuda", non_blocking=True)
        taken = torch.full((2500,), float(at)).pin_memory().to("cuda", non_blocking=True)
        assert taken.cpu().tolist() == [at] * 2500


@pytest.mark.parametrize("non_blocking", [False, True])
def test_work_on_a_stream_of_the_users_sees_the_data(non_blocking: bool, late: Control) -> None:
    pd, mine = numbered(300), torch.cuda.Stream()
    pdrs.set_staging(block_bytes=1024, blocks=2)
    with torch.cuda.stream(mine):
        pd.to("cuda", non_blocking=non_blocking)
        seen = pd["n299"].detach().clone()
        pd["n0"].detach().copy_(seen)
    mine.synchronize()
    assert seen.cpu().tolist() == pd["n0"].cpu().tolist() == [1495, 1496, 1497, 1498, 1499]


def test_work_before_the_move_is_waited_for(late: Control) -> None:
    mine = torch.cuda.Stream()
    pd, zeros = numbered(300), torch.zeros(5).pin_memory()
    with torch.cuda.stream(mine):
        pd.cuda()
        for value in pd.values():
            value.detach().copy_(zeros, non_blocking=True)
        pd.cpu()
    assert all(not value.any() for value in pd.values())


def test_memory_with_work_on_it_is_not_overtaken_by_the_copies(fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    mine = torch.cuda.Stream()
    pd = numbered(1000)
    with torch.cuda.stream(mine):
        block = torch.empty(16000 * 4, dtype=torch.uint8, device="cuda")
        block.copy_(torch.full((64000,), 9, dtype=torch.uint8).pin_memory(), non_blocking=True)
        del block  # The slab may get its memory, on which the copy is still to come.
        pd.to("cuda", non_blocking=True)
        assert torch.equal(torch.stack([value.cpu() for value in pd.values()]).flatten(), torch.arange(5000.0))


@pytest.mark.parametrize("target", ["cpu", "cuda:1"])
def test_memory_of_one_stream_that_is_moved_under_another_is_not_used_again_too_early(
    target: str, fake_cuda: Control
) -> None:
    fake_cuda.set_schedule("on_demand")
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        pd = numbered(1000).cuda()
    with torch.cuda.stream(two):
        pd.to(target, non_blocking=True)
    with torch.cuda.stream(one):
        again = [zeros_on("cuda", 16000) for _ in range(3)]
    del again
    two.synchronize()
    torch.cuda.synchronize(1)
    assert torch.equal(torch.stack([value.detach().cpu() for value in pd.values()]).flatten(), torch.arange(5000.0))


def test_a_download_that_does_not_block_is_complete_with_its_stream(fake_cuda: Control) -> None:
    pd = numbered(1000).cuda()
    waits = fake_cuda.calls("cudaEventSynchronize")
    with fake_cuda.hold():
        pd.to("cpu", non_blocking=True)
        assert fake_cuda.pending > 0
    assert fake_cuda.calls("cudaEventSynchronize") == waits
    assert pd["n5"].is_pinned()
    torch.cuda.current_stream().synchronize()
    assert torch.equal(torch.stack(list(pd.values())).flatten(), torch.arange(5000.0))


def test_a_download_that_dies_under_way_harms_nothing(fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    pd = numbered(1000).cuda()
    pd.to("cpu", non_blocking=True)
    del pd
    gc.collect()
    other = torch.full((16000,), 3.0).pin_memory()
    torch.cuda.synchronize()
    assert other.eq(3).all()
    assert fake_cuda.counters.hazards == 0


def test_a_cpu_result_is_pageable(late: Control) -> None:
    pd = numbered(10).cuda().cpu()
    assert not pd["n0"].is_pinned()


# ---- several ---------------------------------------------------------------------------------------------------------


def locked_memory() -> int:
    """Return how many bytes of page-locked memory are not torch's to give."""
    torch.cuda.synchronize()
    torch.empty(1, pin_memory=True)  # torch looks for what has become free when it is asked for more
    return int(torch.cuda.host_memory_stats()["active_bytes.current"])


def test_threads_move_dictionaries_to_several_devices_at_once(late: Control) -> None:
    pdrs.set_staging(block_bytes=1024, blocks=2)
    dictionaries = [numbered(300 + at) for at in range(4)]
    errors: list[BaseException] = []

    def move(at: int) -> None:
        try:
            pd = dictionaries[at]
            with torch.cuda.stream(torch.cuda.Stream(at % 2)):
                for turn in range(3):
                    pd.to(f"cuda:{at % 2}", non_blocking=bool(turn % 2))
                    pd.cpu()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=move, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for at, pd in enumerate(dictionaries):
        assert torch.equal(torch.stack(list(pd.values())).flatten(), torch.arange((300.0 + at) * 5))
    # Blocks that were lent beside the two have gone back to torch.
    kept = locked_memory()
    pdrs.set_staging()
    assert kept - locked_memory() <= 2 * 1024


def test_a_device_that_is_not_the_current_one_takes_its_own_streams(late: Control) -> None:
    pd = numbered(100)
    pd.to("cuda:1", non_blocking=True)
    assert torch.cuda.current_device() == 0
    assert pd["n3"].cpu().tolist() == [15, 16, 17, 18, 19]
    with torch.cuda.device(1):
        pd.to("cuda:0").cpu()
    assert pd["n3"].tolist() == [15, 16, 17, 18, 19]


# ---- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Check that a module is as it was: objects, places, values."""
    objects = [(id(each), each.data_ptr(), each.dtype, each.device) for each in tensors_of(module)]
    values = [each.detach().cpu() for each in tensors_of(module)]
    yield
    assert [(id(each), each.data_ptr(), each.dtype, each.device) for each in tensors_of(module)] == objects
    for one, two in zip(tensors_of(module), values, strict=True):
        assert torch.equal(one.detach().cpu(), two)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("target", ["cuda:0", "cuda:1"])
def test_too_little_memory_half_way_leaves_all_as_it_was(nth: int, target: str, fake_cuda: Control) -> None:
    pd = PD([("a", torch.ones(3_000_000)), ("b", torch.ones(3_000_000, dtype=torch.float64))])
    pd["c"] = Parameter(torch.ones(3_000_000, dtype=torch.int64), requires_grad=False)
    if target == "cuda:1":
        pd.to("cuda:0")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(target)
    sizes = [12_000_000, 24_000_000, 24_000_000]
    wanted = sizes[nth - 1]
    # torch asks for multiples of 2 MiB.
    fake_cuda.set_memory(sum(sizes[: nth - 1]) + (2 << 20) * nth)
    with unchanged(pd), pytest.raises(torch.OutOfMemoryError, match=f"expected room for {wanted:,} bytes on {target}"):
        pd.to(target)
    gc.collect()
    assert torch.cuda.memory_allocated(target) == before
    fake_cuda.set_memory(1 << 30)
    pd.to(target)
    assert devices_of(pd) == {target}


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("direction", ["up", "up later", "down", "loose"])
def test_a_copy_that_fails_leaves_all_as_it_was(direction: str, nth: int, fake_cuda: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=2)
    pd = numbered(1000)
    if direction == "down":
        pd.cuda()
    target = "cuda" if direction.startswith("up") else "cpu"
    if direction == "loose":
        pd = PD([(name, value.detach().cuda()) for name, value in pd.items()])
    with unchanged(pd):
        fake_cuda.fail("copy", nth=nth, error="cudaErrorInvalidValue")
        with pytest.raises(RuntimeError, match="invalid argument"):
            pd.to(target, non_blocking=direction == "up later")
    pd.to(target)
    assert torch.equal(torch.stack([value.detach().cpu() for value in pd.values()]).flatten(), torch.arange(5000.0))


def test_a_failed_download_takes_no_block_with_a_copy_under_way(fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    pdrs.set_staging(block_bytes=4096, blocks=3)
    pd, other = numbered(1000).cuda(), numbered(1000)
    fake_cuda.fail("copy", nth=2, error="cudaErrorInvalidValue")
    with pytest.raises(RuntimeError, match="invalid argument"):
        pd.cpu()
    other.cuda()
    for each in (pd, other):
        assert torch.equal(torch.stack([value.cpu() for value in each.values()]).flatten(), torch.arange(5000.0))


@pytest.mark.skipif(
    TORCH < (2, 15),
    reason="torch before 2.15 ends the process when it frees page-locked memory after such an error",
)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_late_error_is_raised_by_the_move_that_waits_for_it(direction: str, fake_cuda: Control) -> None:
    pdrs.set_staging(block_bytes=4096, blocks=2)
    pd = numbered(1000)
    if direction == "down":
        pd.cuda()
    objects = [(id(each), each.data_ptr(), each.device) for each in pd.parameters()]
    fake_cuda.fail("copy", nth=3, late=True)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        pd.to("cuda" if direction == "up" else "cpu")
    assert [(id(each), each.data_ptr(), each.device) for each in pd.parameters()] == objects
    fake_cuda.reset()
    assert torch.equal(torch.stack([value.detach().cpu() for value in pd.values()]).flatten(), torch.arange(5000.0))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_move_while_a_graph_is_captured_is_refused_and_changes_nothing(direction: str) -> None:
    pd = numbered(10)
    if direction == "down":
        pd.cuda()
    graph, kept = torch.cuda.CUDAGraph(), zeros_on("cuda", 8)
    with unchanged(pd):
        with torch.cuda.graph(graph):
            kept[:4].copy_(kept[4:])
            with pytest.raises(RuntimeError, match="outside of the capture of a CUDA graph"):
                pd.to("cuda" if direction == "up" else "cpu")
            pd.to(pd["n0"].device)
        graph.replay()
        torch.cuda.synchronize()
    pd.to("cuda" if direction == "up" else "cpu")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_capture_on_a_device_that_is_not_the_current_one_is_noticed(direction: str) -> None:
    pd = numbered(10)
    if direction == "down":
        pd.to("cuda:1")
    with torch.cuda.device(1):
        graph, kept = torch.cuda.CUDAGraph(), zeros_on("cuda:1", 8)
        with unchanged(pd):
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):
                kept[:4].copy_(kept[4:])
                with torch.cuda.device(0), pytest.raises(RuntimeError, match="outside of the capture of a CUDA graph"):
                    pd.to("cuda:1" if direction == "up" else "cpu")
            graph.replay()
            torch.cuda.synchronize()


def test_memory_is_not_page_locked_while_a_graph_is_captured() -> None:
    pd = numbered(10)
    graph, kept = torch.cuda.CUDAGraph(), zeros_on("cuda", 8)
    with unchanged(pd):
        with torch.cuda.graph(graph):
            kept[:4].copy_(kept[4:])
            with pytest.raises(RuntimeError, match="outside of the capture of a CUDA graph"):
                pd.pin_memory()
        graph.replay()
        torch.cuda.synchronize()
    pd.pin_memory()


# ---- pin_memory ------------------------------------------------------------------------------------------------------


def test_pin_memory_locks_just_what_is_needed(fake_cuda: Control) -> None:
    pd = numbered(1000, 16)
    objects, before = [id(value) for value in pd.values()], fake_cuda.counters
    assert pd.pin_memory() is pd
    after = fake_cuda.counters
    assert after.host_registrations - before.host_registrations == 1
    assert after.host_registered_bytes - before.host_registered_bytes == 64000
    assert after.host_allocations == before.host_allocations
    assert all(value.is_pinned() for value in pd.values())
    assert [id(value) for value in pd.values()] == objects
    assert torch.equal(torch.stack(list(pd.values())).flatten(), torch.arange(16000.0))


def test_what_is_pinned_stays_and_only_what_is_not_is_pinned(fake_cuda: Control) -> None:
    pd = assorted().pin_memory()
    values = values_of(pd)
    pointers = [each.data_ptr() for each in tensors_of(pd)]
    registrations = fake_cuda.counters.host_registrations
    pd.pin_memory()
    assert fake_cuda.counters.host_registrations == registrations
    pd["new"] = torch.ones(3)
    pd.pin_memory()
    assert fake_cuda.counters.host_registrations == registrations + 1
    del pd["new"]
    assert [each.data_ptr() for each in tensors_of(pd)] == pointers
    assert_holds(pd, values)


def test_pinned_memory_is_unlocked_when_the_last_entry_goes(fake_cuda: Control) -> None:
    pd = numbered(100).pin_memory()
    kept = pd.pop("n3")
    pd.cuda()
    gc.collect()
    assert fake_cuda.calls("cudaHostUnregister") == 0
    assert kept.is_pinned()
    del kept
    gc.collect()
    assert fake_cuda.calls("cudaHostUnregister") == 1
    assert fake_cuda.counters.hazards == 0


def test_a_copy_from_pinned_memory_is_direct(fake_cuda: Control) -> None:
    pd = numbered(1000, 16).pin_memory()
    before = fake_cuda.counters
    fake_cuda.set_schedule("on_demand")
    pd.cuda()
    assert fake_cuda.counters.copies["H2D"].count - before.copies["H2D"].count == 1
    assert fake_cuda.counters.host_allocations == before.host_allocations
    assert fake_cuda.counters.hazards == 0
    assert torch.equal(torch.stack([value.cpu() for value in pd.values()]).flatten(), torch.arange(16000.0))


def test_pinned_memory_is_not_unlocked_under_a_copy_of_the_users(fake_cuda: Control) -> None:
    pd = numbered(100, 16).pin_memory()
    fake_cuda.set_schedule("on_demand")
    copy = pd["n7"].detach().to("cuda", non_blocking=True)
    del pd
    gc.collect()
    assert fake_cuda.counters.hazards == 0
    assert copy.cpu().tolist() == list(range(112, 128))


def test_memory_that_cannot_be_locked_leaves_all_as_it_was(fake_cuda: Control) -> None:
    pd = assorted()
    with unchanged(pd):
        fake_cuda.fail("host registration", nth=2, error="cudaErrorMemoryAllocation")
        with pytest.raises(RuntimeError, match="expected CUDA to page-lock"):
            pd.pin_memory()
    gc.collect()
    counters = fake_cuda.counters
    assert fake_cuda.calls("cudaHostUnregister") == counters.host_registrations
    pd.pin_memory()


def test_an_entry_from_inference_mode_is_not_pinned_silently(fake_cuda: Control) -> None:
    pd = numbered(3)
    with torch.inference_mode():
        pd["there"] = Parameter(torch.ones(2))
    with unchanged(pd), pytest.raises(ValueError, match="was made in inference mode"):
        pd.pin_memory()


def test_entries_on_a_device_are_not_pinned(fake_cuda: Control) -> None:
    pd = numbered(3).cuda()
    pd["here"] = torch.ones(2)
    pd.pin_memory()
    assert pd["here"].is_pinned()
    assert pd["n0"].is_cuda


# ---- models ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A linear layer, and a dictionary of scales and shifts."""

    def __init__(self, kind: type[nn.ParameterDict]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.extra = kind({"scale": torch.randn(4), "shift": torch.randn(4), "gate": torch.randn(())})

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.extra["scale"] * self.extra["gate"] + self.extra["shift"]


Travel = Callable[[nn.Module], Any]
TRAVELS: dict[str, Travel] = {
    "there and back": lambda model: model.cuda().cpu(),
    "over both devices": lambda model: model.to("cuda:0").to("cuda:1").to("cpu"),
    "without blocking": lambda model: (model.to("cuda", non_blocking=True).to("cpu"),),
    "with pdrs.to": lambda model: pdrs.to(pdrs.to(model, "cuda:1", torch.float64), "cpu", torch.float32),
    "through float64": lambda model: model.to("cuda", torch.float64).to("cpu", torch.float32),
}


@pytest.mark.parametrize("travel", TRAVELS)
def test_a_model_that_travels_while_it_trains_learns_what_torchs_class_learns(travel: str, fake_cuda: Control) -> None:
    fake_cuda.set_schedule("on_demand")
    results = []
    for kind in (nn.ParameterDict, PD):
        model = Model(kind)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            if step % 2:
                TRAVELS[travel](model)
            optimizer.step()
        results.append(torch.cat([each.detach().flatten() for each in model.state_dict().values()]))
    assert torch.equal(*results)


def test_a_whole_model_goes_up_in_one_slab(fake_cuda: Control) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)), Model(PD))
    pdrs.to(model, "cuda")
    assert fake_cuda.counters.copies["H2D"].count == 3, "parameters, buffers, and a counter"
    assert fake_cuda.counters.copies["H2D"].pageable == 0
