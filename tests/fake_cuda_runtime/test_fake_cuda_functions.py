"""Functions of the fake CUDA runtime that torch does not call by itself, called from Python through ctypes.

The bugs that this hunts: a default stream that does not wait for the streams that it must wait for, or waits for those
that it must not; rows, batches and stream-ordered memory at the wrong address or in the wrong order.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_size_t, c_uint, c_void_p

import pytest
import torch

pytestmark = pytest.mark.cuda(devices=2)
H2D, D2H, D2D, DEFAULT = 1, 2, 3, 4
INVALID_VALUE, NOT_READY = 1, 600
NON_BLOCKING = 1
SIZE = 1000


@pytest.fixture
def call(fake_cuda):
    """Give a function that calls one of the runtime and checks that it succeeds."""

    def call_checked(function: str, *arguments: object, error: int = 0) -> None:
        assert getattr(fake_cuda.library, function)(*arguments) == error, function

    call_checked("cudaSetDevice", 0)
    return call_checked


@pytest.fixture
def device_bytes(call):
    """Give a function that allocates device memory, on the current device, which is freed after the test."""
    made = []

    def allocate(size: int = SIZE) -> c_void_p:
        pointer = c_void_p()
        call("cudaMalloc", byref(pointer), c_size_t(size))
        made.append(pointer)
        return pointer

    yield allocate
    for pointer in made:
        call("cudaFree", pointer)


def at(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def stream(call, flags: int = 0) -> c_void_p:
    handle = c_void_p()
    call("cudaStreamCreateWithFlags", byref(handle), c_uint(flags))
    return handle


def pinned(value: int, size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8).pin_memory()


def test_default_stream_waits_for_blocking_streams_and_for_no_others(fake_cuda, call, device_bytes):
    blocking, free = stream(call), stream(call, NON_BLOCKING)
    target = device_bytes()
    result = pinned(0)
    fake_cuda.library.fake_cuda_hold_stream(blocking, 1)
    call("cudaMemsetAsync", target, 7, c_size_t(SIZE), blocking)
    call("cudaMemcpyAsync", at(result), target, c_size_t(SIZE), D2H, None)
    call("cudaMemsetAsync", device_bytes(), 7, c_size_t(SIZE), free)
    call("cudaStreamSynchronize", free)
    call("cudaStreamQuery", None, error=NOT_READY)
    fake_cuda.library.fake_cuda_hold_stream(blocking, 0)
    call("cudaStreamSynchronize", None)
    assert (result == 7).all()
    call("cudaStreamDestroy", blocking)
    call("cudaStreamDestroy", free)


def test_blocking_streams_wait_for_the_default_stream_and_others_do_not(fake_cuda, call, device_bytes):
    blocking, free = stream(call), stream(call, NON_BLOCKING)
    target = device_bytes()
    result = pinned(0)
    fake_cuda.library.fake_cuda_hold_stream(None, 1)
    call("cudaMemsetAsync", target, 7, c_size_t(SIZE), None)
    call("cudaMemcpyAsync", at(result), target, c_size_t(SIZE), D2H, blocking)
    call("cudaMemsetAsync", device_bytes(), 7, c_size_t(SIZE), free)
    call("cudaStreamSynchronize", free)
    call("cudaStreamQuery", blocking, error=NOT_READY)
    fake_cuda.library.fake_cuda_hold_stream(None, 0)
    call("cudaStreamSynchronize", blocking)
    assert (result == 7).all()
    call("cudaStreamDestroy", blocking)
    call("cudaStreamDestroy", free)


def test_destroyed_stream_still_does_its_work(fake_cuda, call, device_bytes):
    handle, target, result = stream(call), device_bytes(), torch.zeros(SIZE, dtype=torch.uint8)
    with fake_cuda.hold():
        call("cudaMemcpyAsync", target, at(pinned(9)), c_size_t(SIZE), H2D, handle)
        call("cudaStreamDestroy", handle)
    call("cudaDeviceSynchronize")
    call("cudaMemcpy", at(result), target, c_size_t(SIZE), D2H)
    assert (result == 9).all()


def test_host_function_runs_after_the_work_before_it(fake_cuda, call, device_bytes):
    seen = []
    result, target = pinned(0), device_bytes()
    call("cudaMemset", target, 5, c_size_t(SIZE))
    function = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: seen.append(int(result.sum())))
    handle = stream(call)
    with fake_cuda.hold():
        call("cudaMemcpyAsync", at(result), target, c_size_t(SIZE), D2H, handle)
        call("cudaLaunchHostFunc", handle, function, None)
    call("cudaStreamSynchronize", handle)
    assert seen == [5 * SIZE]
    call("cudaStreamDestroy", handle)


def test_rows_are_copied_between_pitches(call, device_bytes):
    source = torch.arange(200, dtype=torch.uint8).view(10, 20).pin_memory()
    result = torch.zeros(10, 8, dtype=torch.uint8)
    target = device_bytes(10 * 32)
    call("cudaMemcpy2DAsync", target, c_size_t(32), at(source), c_size_t(20), c_size_t(8), c_size_t(10), H2D, None)
    call("cudaMemcpy2DAsync", at(result), c_size_t(8), target, c_size_t(32), c_size_t(8), c_size_t(10), D2H, None)
    assert torch.equal(result, source[:, :8])


def test_rows_that_leave_their_memory_are_refused(call, device_bytes):
    source, target = pinned(1, 320), device_bytes(10 * 32 - 25)  # The last row ends 8 bytes in: 24 fewer is right.
    arguments = (c_size_t(32), at(source), c_size_t(32), c_size_t(8), c_size_t(10), H2D, None)
    call("cudaMemcpy2DAsync", target, *arguments, error=INVALID_VALUE)
    call("cudaMemcpy2DAsync", device_bytes(10 * 32 - 24), *arguments)


class Attributes(ctypes.Structure):
    """The struct cudaMemcpyAttributes."""

    _fields_ = (("order", c_int), ("source", c_int * 2), ("target", c_int * 2), ("flags", c_uint))


def test_batch_reads_each_source_when_its_attributes_say(fake_cuda, call, device_bytes):
    in_order, during_call = 1, 2
    handle = stream(call, NON_BLOCKING)
    sources = [pinned(1), pinned(1), torch.ones(SIZE, dtype=torch.uint8), torch.ones(SIZE, dtype=torch.uint8)]
    targets = [device_bytes() for _ in sources]
    orders = (Attributes * 4)(*(Attributes(order=order) for order in (in_order, during_call, in_order, during_call)))
    arguments = (
        (c_void_p * 4)(*targets),
        (c_void_p * 4)(*(source.data_ptr() for source in sources)),
        (c_size_t * 4)(*[SIZE] * 4),
        c_size_t(4),
        orders,
        (c_size_t * 4)(0, 1, 2, 3),
        c_size_t(4),
    )
    with fake_cuda.hold():
        call("cudaMemcpyBatchAsync", *arguments, handle)
        for source in sources:
            source.fill_(2)
    results = [pinned(0) for _ in targets]
    for result, target in zip(results, targets, strict=True):
        call("cudaMemcpyAsync", at(result), target, c_size_t(SIZE), D2H, handle)
    call("cudaStreamSynchronize", handle)
    assert [int(result[0]) for result in results] == [2, 1, 2, 1]
    call("cudaMemcpyBatchAsync", *arguments, None, error=INVALID_VALUE)  # Not on the default stream.
    call("cudaStreamDestroy", handle)


def test_peer_copy_checks_on_which_device_its_memory_is(fake_cuda, call, device_bytes):
    source = device_bytes()
    call("cudaSetDevice", 1)
    target = device_bytes()
    call("cudaSetDevice", 0)
    call("cudaMemset", source, 3, c_size_t(SIZE))
    call("cudaMemcpyPeerAsync", target, 0, source, 1, c_size_t(SIZE), None, error=INVALID_VALUE)
    call("cudaMemcpyPeerAsync", target, 1, source, 0, c_size_t(SIZE), None)
    result = torch.zeros(SIZE, dtype=torch.uint8)
    call("cudaMemcpy", at(result), target, c_size_t(SIZE), DEFAULT)
    assert (result == 3).all()
    assert fake_cuda.counters.copies["P2P"].count == 1


def test_stream_ordered_memory_is_given_back_when_the_stream_gets_there(fake_cuda, call):
    free, total = c_size_t(), c_size_t()
    handle, pointer = stream(call), c_void_p()
    call("cudaMallocAsync", byref(pointer), c_size_t(1 << 20), handle)
    fake_cuda.library.fake_cuda_hold_stream(handle, 1)
    call("cudaFreeAsync", pointer, handle)
    call("cudaMemsetAsync", pointer, 0, c_size_t(1), handle, error=INVALID_VALUE)
    call("cudaMemGetInfo", byref(free), byref(total))
    assert total.value - free.value == 1 << 20
    fake_cuda.library.fake_cuda_hold_stream(handle, 0)
    call("cudaStreamSynchronize", handle)
    call("cudaMemGetInfo", byref(free), byref(total))
    assert free.value == total.value
    call("cudaStreamDestroy", handle)


def test_stream_ordered_memory_that_another_stream_still_uses_is_a_race(fake_cuda, call):
    first, second, pointer = stream(call, NON_BLOCKING), stream(call, NON_BLOCKING), c_void_p()
    call("cudaMallocAsync", byref(pointer), c_size_t(SIZE), first)
    call("cudaStreamSynchronize", first)
    call("cudaMemsetAsync", pointer, 1, c_size_t(SIZE), second)
    call("cudaFreeAsync", pointer, first)
    assert "(free)" in fake_cuda.take_races()[0]
    call("cudaStreamDestroy", first)
    call("cudaStreamDestroy", second)


def test_freed_memory_cannot_be_copied_from(call):
    pointer, result = c_void_p(), torch.zeros(SIZE, dtype=torch.uint8)
    call("cudaMalloc", byref(pointer), c_size_t(SIZE))
    call("cudaFree", pointer)
    call("cudaMemcpy", at(result), pointer, c_size_t(SIZE), D2H, error=INVALID_VALUE)
    call("cudaFree", pointer, error=INVALID_VALUE)


def test_event_that_was_never_recorded_is_done_but_has_no_time(call):
    event, time = c_void_p(), c_float()
    call("cudaEventCreateWithFlags", byref(event), 0)
    call("cudaEventQuery", event)
    call("cudaStreamWaitEvent", None, event, 0)
    call("cudaEventElapsedTime", byref(time), event, event, error=400)  # cudaErrorInvalidResourceHandle
    call("cudaEventDestroy", event)


def test_event_of_one_device_cannot_be_recorded_on_the_other(call):
    event = c_void_p()
    call("cudaEventCreateWithFlags", byref(event), 0)
    call("cudaSetDevice", 1)
    call("cudaEventRecord", event, None, error=400)  # cudaErrorInvalidResourceHandle
    call("cudaSetDevice", 0)
    call("cudaEventRecord", event, None)
    call("cudaEventDestroy", event)


@pytest.mark.cuda(variables={"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"})
def test_torch_works_with_stream_ordered_memory(fake_cuda):
    assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    tensor = torch.arange(SIZE).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = tensor.clone()
    tensor.record_stream(side)
    assert torch.cuda.memory_allocated() >= 2 * other.nbytes
    del tensor
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(other.cpu(), torch.arange(SIZE))
    assert fake_cuda.calls("cudaMallocAsync") == 2
    assert fake_cuda.calls("cudaFreeAsync") == 1
