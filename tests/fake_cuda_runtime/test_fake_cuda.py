"""The fake CUDA runtime under torch behaves as CUDA documents, and where CUDA leaves freedom, as badly as it permits.

The bugs that this hunts: a test bed that is kinder than a GPU, so that a missing wait passes; one that is stricter than
a GPU, so that right code fails; one that says "done" for what it does not do.

Tests that take the ``fake_cuda`` fixture are about its switches; the others hold on a GPU too.
"""

import re
import time

import pytest
import torch

from tensors import TORCH, zeros_on

pytestmark = pytest.mark.cuda(devices=2)
SIZE = 1000


def numbers() -> torch.Tensor:
    return torch.arange(float(SIZE))


# ---- torch's ordinary use --------------------------------------------------------------------------------------------


def test_tensor_goes_to_the_device_and_back():
    tensor = numbers().cuda()
    assert tensor.device == torch.device("cuda:0")
    assert torch.equal(tensor.cpu(), numbers())


def test_module_moves_to_the_device_and_back():
    linear = torch.nn.Linear(10, 3)
    weight = linear.weight.detach().clone()
    assert linear.cuda().weight.is_cuda
    assert torch.equal(linear.cpu().weight, weight)


def test_tensor_goes_from_one_device_to_the_other():
    tensor = numbers().to("cuda:0").to("cuda:1")
    assert tensor.device == torch.device("cuda:1")
    assert torch.equal(tensor.cpu(), numbers())


def test_transposed_view_comes_back_right():
    view = numbers()[200:].view(20, 40).cuda()[3:9].t()
    assert torch.equal(view.cpu(), numbers()[200:].view(20, 40)[3:9].t())


@pytest.mark.skipif(TORCH < (2, 15), reason="torch before 2.15 fills with a kernel")
def test_zeros_are_filled_in_on_the_device():
    tensor = numbers().cuda()
    assert not torch.zeros(SIZE, device="cuda").cpu().any()
    assert not tensor.zero_().cpu().any()


def test_clone_and_slices_work_on_the_device():
    tensor = zeros_on("cuda", SIZE)
    tensor[10:20] = numbers()[10:20].cuda()
    expected = torch.zeros(SIZE)
    expected[10:20] = numbers()[10:20]
    assert torch.equal(tensor.clone().cpu(), expected)
    assert tensor[15].item() == 15


def test_pinned_memory_knows_that_it_is():
    pinned = torch.empty(SIZE, pin_memory=True)
    assert pinned.is_pinned()
    assert numbers().pin_memory().is_pinned()
    assert pinned[7:9].is_pinned()
    assert not numbers().is_pinned()


def test_registered_memory_is_pinned_until_it_is_unregistered():
    cudart, tensor = torch.cuda.cudart(), numbers()
    torch.cuda.init()
    assert cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) == cudart.cudaError.success
    assert tensor.is_pinned()
    assert cudart.cudaHostUnregister(tensor.data_ptr()) == cudart.cudaError.success
    assert not tensor.is_pinned()


def test_memory_that_overlaps_registered_memory_cannot_be_registered(fake_cuda):
    cudart, tensor = torch.cuda.cudart(), numbers()
    torch.cuda.init()
    start = tensor.data_ptr()
    assert int(cudart.cudaHostRegister(start, 1000, 0)) == 0
    assert int(cudart.cudaHostRegister(start + 999, 1000, 1)) == 712  # cudaErrorHostMemoryAlreadyRegistered
    assert int(cudart.cudaHostRegister(start + 1000, 1000, 3)) == 0  # Portable and mapped.
    assert int(cudart.cudaHostUnregister(start)) == 0
    assert int(cudart.cudaHostUnregister(start + 1000)) == 0
    assert int(cudart.cudaHostUnregister(start)) == 713  # cudaErrorHostMemoryNotRegistered


def test_memory_is_counted_for_each_device():
    before = [torch.cuda.mem_get_info(device)[0] for device in range(2)]
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:1")
    after = [torch.cuda.mem_get_info(device)[0] for device in range(2)]
    assert torch.cuda.memory_allocated(1) >= kept.nbytes
    assert before[0] == after[0]
    assert before[1] - after[1] == kept.nbytes


def test_event_measures_time_between_two_records():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    numbers().cuda()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0


def test_event_of_one_device_cannot_be_recorded_on_the_other():
    event = torch.cuda.Event()
    event.record(torch.cuda.Stream("cuda:0"))
    with pytest.raises(RuntimeError, match="device"):
        event.record(torch.cuda.Stream("cuda:1"))


# ---- when copies read and write --------------------------------------------------------------------------------------


def test_copy_from_pinned_memory_reads_the_source_late(fake_cuda):
    source = torch.ones(SIZE).pin_memory()
    with fake_cuda.hold():
        target = source.to("cuda", non_blocking=True)
        source.fill_(2)
    assert torch.equal(target.cpu(), torch.full((SIZE,), 2.0))


def test_copy_from_pageable_memory_reads_the_source_before_it_returns(fake_cuda):
    source = torch.ones(SIZE)
    with fake_cuda.hold():
        target = source.to("cuda", non_blocking=True)
        source.fill_(2)
    assert torch.equal(target.cpu(), torch.ones(SIZE))


def test_copy_to_pinned_memory_is_stale_until_it_is_waited_for(fake_cuda):
    target = torch.zeros(SIZE).pin_memory()
    source = torch.ones(SIZE).cuda()
    with fake_cuda.hold():
        target.copy_(source, non_blocking=True)
        assert fake_cuda.pending == 1
        assert torch.equal(target, torch.zeros(SIZE))
    torch.cuda.synchronize()
    assert torch.equal(target, torch.ones(SIZE))


def test_copy_to_pageable_memory_is_done_when_it_returns(fake_cuda):
    fake_cuda.set_latency(20_000)
    source = torch.ones(SIZE).cuda()
    target = torch.zeros(SIZE)
    target.copy_(source, non_blocking=True)
    assert torch.equal(target, torch.ones(SIZE))


def test_latency_makes_copies_late(fake_cuda):
    source = torch.ones(SIZE).pin_memory()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    fake_cuda.set_latency(20_000)
    start.record()
    source.to("cuda", non_blocking=True)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 20  # A sleep is never shorter.


def test_held_copies_pass_one_by_one(fake_cuda):
    targets = [torch.zeros(SIZE).pin_memory() for _ in range(3)]
    source = torch.ones(SIZE).cuda()
    events = [torch.cuda.Event() for _ in range(3)]
    with fake_cuda.hold(["D2H"]):
        for target, event in zip(targets, events, strict=True):
            target.copy_(source, non_blocking=True)
            event.record()
        fake_cuda.step(2)
        events[1].synchronize()
        assert [bool(target.any()) for target in targets] == [True, True, False]
    torch.cuda.synchronize()
    assert targets[2].all()


def test_waiting_for_held_work_fails_instead_of_hanging(fake_cuda):
    fake_cuda.set_hold_timeout(50)
    source = torch.ones(SIZE).pin_memory()
    with fake_cuda.hold():
        source.to("cuda", non_blocking=True)
        with pytest.raises(RuntimeError, match="the host waits for work that the test holds"):
            torch.cuda.synchronize()


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_stream_that_does_not_wait_for_another_reads_old_bytes(fake_cuda):
    fake_cuda.set_schedule("on_demand")
    source = torch.ones(SIZE).pin_memory()
    side = torch.cuda.Stream()
    target = torch.empty(SIZE, device="cuda")
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    assert not torch.equal(target.cpu(), source)
    assert len(fake_cuda.take_races()) == 1


def test_stream_that_waits_for_another_reads_new_bytes(fake_cuda):
    fake_cuda.set_schedule("on_demand")
    source = torch.ones(SIZE).pin_memory()
    side = torch.cuda.Stream()
    target = torch.empty(SIZE, device="cuda")
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(target.cpu(), source)


def test_on_demand_nothing_runs_until_somebody_waits(fake_cuda):
    fake_cuda.set_schedule("on_demand")
    source = torch.ones(SIZE).pin_memory()
    event = torch.cuda.Event()
    source.to("cuda", non_blocking=True)
    event.record()
    assert fake_cuda.pending == 2
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert fake_cuda.pending == 0


def test_on_demand_a_loop_that_polls_an_event_ends(fake_cuda):
    fake_cuda.set_schedule("on_demand")
    torch.ones(SIZE).pin_memory().to("cuda", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + 60
    while not event.query():
        assert time.monotonic() < deadline  # No count: on one core, polls take the time of the stream's thread.


def test_waiting_takes_the_record_that_the_event_has_at_that_moment(fake_cuda):
    source = torch.ones(SIZE).pin_memory()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    event = torch.cuda.Event()
    with fake_cuda.hold_stream(first):
        event.record(second)
        second.wait_event(event)
        event.record(first)  # Held: would the wait above follow it, `second` would stand still.
        with torch.cuda.stream(second):
            target = source.to("cuda", non_blocking=True)
        second.synchronize()
        assert not event.query()
    second.wait_stream(torch.cuda.current_stream())
    assert torch.equal(target.cpu(), source)


def test_default_stream_of_one_device_does_not_wait_for_the_other_device(fake_cuda):
    source = torch.ones(SIZE).pin_memory()
    with fake_cuda.hold_stream(torch.cuda.default_stream("cuda:1")):
        late = source.to("cuda:1", non_blocking=True)
        torch.cuda.synchronize("cuda:0")
        assert fake_cuda.pending == 1
    assert torch.equal(late.cpu(), source)


# ---- races (each test also fails when it ends with one) --------------------------------------------------------------


def two_streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream, torch.Tensor, torch.Tensor]:
    """Give two streams, a pinned tensor, and device memory that both streams may use."""
    source, target = torch.ones(SIZE).pin_memory(), torch.empty(SIZE, device="cuda")
    torch.cuda.synchronize()
    return torch.cuda.Stream(), torch.cuda.Stream(), source, target


def test_race_is_reported_also_when_the_bytes_are_right_by_luck(fake_cuda):
    first, second, source, target = two_streams()
    with torch.cuda.stream(first):
        target.copy_(source, non_blocking=True)
    while fake_cuda.pending:  # The bytes are there, but the program has not asked.
        pass
    with torch.cuda.stream(second):
        assert torch.equal(target.cpu(), source)
    (race,) = fake_cuda.take_races()
    assert re.fullmatch(r"stream \d+ writes \(H2D\) and stream \d+ reads \(D2H\) .* device memory: neither waits", race)
    assert fake_cuda.counters.races == 0


@pytest.mark.parametrize("order", ["wait_stream", "stream synchronize", "device synchronize", "query", "done event"])
def test_every_way_to_wait_is_an_order(fake_cuda, order):
    first, second, source, target = two_streams()
    with torch.cuda.stream(first):
        target.copy_(source, non_blocking=True)
    event = first.record_event()
    if order == "wait_stream":
        second.wait_stream(first)
    elif order == "stream synchronize":
        first.synchronize()
    elif order == "device synchronize":
        torch.cuda.synchronize()
    elif order == "query":
        while not event.query():
            pass
    else:
        while fake_cuda.pending:
            pass
        second.wait_event(event)
    with torch.cuda.stream(second):
        assert torch.equal(target.cpu(), source)
    assert fake_cuda.take_races() == []


def test_waiting_for_what_came_before_the_write_is_no_order(fake_cuda):
    first, second, source, target = two_streams()
    event = first.record_event()
    with torch.cuda.stream(first):
        target.copy_(source, non_blocking=True)
    second.wait_event(event)
    with torch.cuda.stream(second):
        target.clone()
    assert len(fake_cuda.take_races()) == 1


def test_order_goes_over_a_third_stream(fake_cuda):
    first, second, source, target = two_streams()
    with torch.cuda.stream(first):
        target.copy_(source, non_blocking=True)
    third = torch.cuda.Stream("cuda:1")
    third.wait_stream(first)
    second.wait_stream(third)
    with torch.cuda.stream(second):
        target.copy_(source, non_blocking=True)
    assert fake_cuda.take_races() == []


def test_reads_and_other_bytes_do_not_race(fake_cuda):
    first, second, source, target = two_streams()
    for stream, part in ((first, slice(0, 500)), (second, slice(500, None))):
        with torch.cuda.stream(stream):
            target[part].copy_(source[part], non_blocking=True)
    torch.cuda.synchronize()
    for stream in (first, second):
        with torch.cuda.stream(stream):
            target.clone()
    assert fake_cuda.take_races() == []


def test_pinned_memory_that_two_streams_write_is_a_race(fake_cuda):
    first, second, result, source = two_streams()
    for stream in (first, second):
        with torch.cuda.stream(stream):
            result.copy_(source, non_blocking=True)
    (race,) = fake_cuda.take_races()
    assert "pinned memory" in race


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_fresh_device_memory_is_never_zero_by_luck(fake_cuda):
    assert (torch.empty(SIZE, dtype=torch.uint8, device="cuda").cpu() == 0xA5).all()


def test_too_large_a_tensor_is_out_of_memory(fake_cuda):
    fake_cuda.set_memory(64 << 20)
    kept = torch.empty(40 << 20, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(40 << 20, dtype=torch.uint8, device="cuda")
    del kept
    torch.empty(40 << 20, dtype=torch.uint8, device="cuda")


def reuse(fake_cuda, *, record_stream: bool) -> torch.Tensor:
    """Free a tensor that a side stream still copies from; return what that stream copied."""
    fake_cuda.set_schedule("on_demand")
    ones, twos = torch.ones(SIZE).pin_memory(), torch.full((SIZE,), 2.0).pin_memory()
    result = torch.zeros(SIZE).pin_memory()
    side = torch.cuda.Stream()
    tensor = ones.to("cuda", non_blocking=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result.copy_(tensor, non_blocking=True)
    if record_stream:
        tensor.record_stream(side)
    del tensor
    other = twos.to("cuda", non_blocking=True)  # Gets the same block when the allocator thinks that it is free.
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    assert torch.equal(other.cpu(), twos)
    return result


def test_missing_record_stream_shows_as_wrong_bytes(fake_cuda):
    assert torch.equal(reuse(fake_cuda, record_stream=False), torch.full((SIZE,), 2.0))
    assert len(fake_cuda.take_races()) == 1


def test_record_stream_keeps_the_block(fake_cuda):
    assert torch.equal(reuse(fake_cuda, record_stream=True), torch.ones(SIZE))


def test_copy_that_leaves_registered_memory_is_refused(fake_cuda):
    cudart, tensor = torch.cuda.cudart(), numbers()
    torch.cuda.init()
    assert int(cudart.cudaHostRegister(tensor.data_ptr(), 100, 0)) == 0
    with pytest.raises(RuntimeError, match="invalid argument"):
        tensor.cuda()
    assert int(cudart.cudaHostUnregister(tensor.data_ptr())) == 0


def test_unregistering_memory_under_a_copy_is_a_hazard(fake_cuda):
    cudart, tensor = torch.cuda.cudart(), numbers()
    torch.cuda.init()
    fake_cuda.set_schedule("on_demand")
    assert int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0
    tensor.to("cuda", non_blocking=True)
    assert fake_cuda.counters.hazards == 0
    cudart.cudaHostUnregister(tensor.data_ptr())
    assert fake_cuda.counters.hazards == 1


# ---- failures --------------------------------------------------------------------------------------------------------


def test_injected_copy_failure_raises_once(fake_cuda):
    fake_cuda.fail("copy", nth=2, error="cudaErrorInvalidValue")
    numbers().cuda()
    with pytest.raises(RuntimeError, match="invalid argument"):
        numbers().cuda()
    assert torch.equal(numbers().cuda().cpu(), numbers())


def test_late_copy_failure_breaks_the_device_until_the_reset(fake_cuda):
    source = torch.ones(SIZE).pin_memory()
    fake_cuda.fail("copy", late=True)
    source.to("cuda", non_blocking=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an illegal memory access"):
            torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        source.to("cuda", non_blocking=True)
    fake_cuda.reset()
    assert torch.equal(source.cuda().cpu(), source)


def test_injected_allocation_failure_is_out_of_memory(fake_cuda):
    for _ in range(2):  # torch frees what it caches, then tries once more
        fake_cuda.fail("allocation", error="cudaErrorMemoryAllocation")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(100 << 20, dtype=torch.uint8, device="cuda")


def test_named_function_can_fail(fake_cuda):
    fake_cuda.fail("cudaHostAlloc", error="cudaErrorMemoryAllocation")
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(100 << 20, dtype=torch.uint8, pin_memory=True)


def test_unknown_error_cannot_be_injected(fake_cuda):
    with pytest.raises(ValueError, match="cudaErrorNonsense"):
        fake_cuda.fail("copy", error="cudaErrorNonsense")


def test_kernel_fails_and_is_named(fake_cuda):
    tensor = numbers().cuda()
    with pytest.raises(RuntimeError, match="the fake CUDA runtime runs no kernels"):
        tensor + 1
    assert len(fake_cuda.unsupported) == 1
    assert re.search("elementwise_kernel.*add", fake_cuda.unsupported[0])


def test_function_that_nobody_wrote_fails_and_is_named(fake_cuda):
    error = fake_cuda.library.cudaIpcGetMemHandle(None, None)
    assert error == 801  # cudaErrorNotSupported
    assert fake_cuda.unsupported == ["cudaIpcGetMemHandle"]


# ---- counters --------------------------------------------------------------------------------------------------------


def test_copies_are_counted_by_kind(fake_cuda):
    pinned = numbers().pin_memory()
    tensor = pinned.cuda()
    numbers()[:10].cuda()
    tensor.cpu()
    tensor.clone()
    tensor.to("cuda:1")
    copies = fake_cuda.counters.copies
    assert (copies["H2D"].count, copies["H2D"].bytes, copies["H2D"].largest) == (2, 4 * SIZE + 40, 4 * SIZE)
    assert (copies["H2D"].pageable, copies["D2H"].pageable) == (1, 1)
    assert [copies[kind].count for kind in ("D2H", "D2D", "P2P", "H2H")] == [1, 1, 1, 0]


def test_calls_are_counted_by_name(fake_cuda):
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    event.record()
    torch.cuda.Stream().wait_event(event)
    assert fake_cuda.calls("cudaDeviceSynchronize") == 1
    assert fake_cuda.calls("cudaEventRecordWithFlags") == 1
    assert fake_cuda.calls("cudaStreamWaitEvent") == 1
    assert fake_cuda.calls("cudaStreamSynchronize") == 0


def test_trace_has_a_line_for_each_copy(fake_cuda, tmp_path):
    fake_cuda.trace_to(str(tmp_path / "trace"))
    numbers().cuda()
    fake_cuda.trace_to(None)
    assert re.search(r"copy H2D 4000 bytes pageable on stream \d+: cudaSuccess", (tmp_path / "trace").read_text())


# ---- capture ---------------------------------------------------------------------------------------------------------


def test_capture_is_visible_and_a_graph_of_copies_can_be_replayed():
    source, target = zeros_on("cuda", SIZE), zeros_on("cuda", SIZE)
    graph = torch.cuda.CUDAGraph()
    assert not torch.cuda.is_current_stream_capturing()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        target.copy_(source)
    assert not torch.cuda.is_current_stream_capturing()
    source.copy_(numbers())
    assert not target.cpu().any()
    graph.replay()
    assert torch.equal(target.cpu(), numbers())


def test_waiting_while_capturing_fails_and_leaves_cleanly():
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.synchronize()
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.synchronize()
    assert torch.equal(numbers().cuda().cpu(), numbers())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_pageable_copy_while_capturing_fails_and_leaves_cleanly():
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        numbers().cuda()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.equal(numbers().cuda().cpu(), numbers())
