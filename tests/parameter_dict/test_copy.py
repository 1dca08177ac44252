"""Gather and scatter against loops of ``copy_``, ``torch.cat`` and ``parameters_to_vector``.

The bugs that this hunts: an element that goes to the wrong place, from strided memory or at the edge of a block; a byte
written outside; two threads that meet; a write that autograd does not notice; the GIL held while bytes move.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pdrs._core import TensorGroup, group_tensors
from tensors import SUPPORTED, bytes_of, gathered, group_of, layouts

BY_SIZE = [torch.uint8, torch.float16, torch.float32, torch.complex64, torch.complex128]


def filled(group: TensorGroup, tensors: list[torch.Tensor], gap: float = 0) -> torch.Tensor:
    """Give the slab that a gather in C order makes, by a loop over the tensors."""
    slab = torch.full((group.length,), gap, dtype=group.dtype)
    for offset, tensor in zip(group.offsets, tensors, strict=True):
        slab[offset : offset + tensor.numel()] = tensor.detach().reshape(-1)
    return slab


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@given(st.lists(layouts(), min_size=1, max_size=6), st.sampled_from(BY_SIZE))
def test_any_layout_is_gathered_in_c_order_with_zeros_between(tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    # The tensors are parts of one, so that each keeps its strides.
    base = torch.arange(256).to(dtype)
    tensors = [base.as_strided(each.shape, each.stride(), each.storage_offset()) for each in tensors]
    group = group_of(tensors, keep_strides=False)
    slab = torch.full((group.length,), 7, dtype=dtype)
    group.gather(slab)
    assert torch.equal(slab, filled(group, tensors))


@given(st.lists(layouts(), min_size=1, max_size=6), st.data())
def test_any_part_of_a_slab_is_gathered_alone(tensors: list[torch.Tensor], data: st.DataObject) -> None:
    group = group_of(tensors, keep_strides=data.draw(st.booleans()))
    whole = gathered(group)
    start = data.draw(st.integers(0, group.length))
    stop = data.draw(st.integers(start, group.length))
    around = torch.full((stop - start + 2,), -1.0)
    group.gather(around[1:-1], start)
    assert torch.equal(around[1:-1], whole[start:stop])
    assert around[0] == around[-1] == -1


@given(st.lists(layouts(), min_size=1, max_size=6), st.data())
def test_scatter_writes_what_copy_writes(tensors: list[torch.Tensor], data: st.DataObject) -> None:
    tensors = [each.clone() if data.draw(st.booleans()) else torch.zeros(9)[: each.numel() % 4] for each in tensors]
    keep_strides = data.draw(st.booleans())
    group = group_of(tensors, keep_strides=keep_strides)
    slab = torch.arange(1.0, group.length + 1)
    expected = [view.clone() for view in group.views(slab, detached=True)]
    start = data.draw(st.integers(0, group.length))
    stop = data.draw(st.integers(start, group.length))
    group.scatter(slab[:start])
    group.scatter(slab[stop:], stop)
    group.scatter(slab[start:stop], start)
    for tensor, value in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, value)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_scatter_to_a_strided_tensor_leaves_what_lies_between(rows: int, columns: int, down: int, right: int) -> None:
    base, expected = torch.zeros(2, 20, 20)
    tensor = base[: rows * down : down, : columns * right : right]
    group = group_of([tensor], keep_strides=False)
    values = torch.arange(1.0, 1 + rows * columns)
    group.scatter(values)
    expected[: rows * down : down, : columns * right : right] = values.view(rows, columns)
    assert torch.equal(base, expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", sorted(SUPPORTED, key=str), ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    raw = torch.arange(64 * dtype.itemsize).to(torch.uint8)
    base = (raw % 2 if dtype == torch.bool else raw).view(dtype).view(8, 8)
    tensors = [base[:, ::2], base.t(), base[3], base[0, 0]]
    group = group_of(tensors, keep_strides=False)
    slab = gathered(group)
    assert [bytes_of(view) for view in group.views(slab)] == [bytes_of(tensor.clone()) for tensor in tensors]
    fresh = torch.zeros(64 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(8, 8)
    empty = [fresh[:, ::2]]
    group_of(empty, keep_strides=False).scatter(slab[:32])
    assert bytes_of(empty[0].clone()) == bytes_of(tensors[0].clone())


def test_it_is_what_torch_gives_and_takes() -> None:
    parameters = [Parameter(torch.randn(4, 4)) for _ in range(100)]
    slab = gathered(group_of(parameters))
    assert torch.equal(slab, parameters_to_vector(parameters))
    turned = [parameter.detach().t() for parameter in parameters]
    assert torch.equal(gathered(group_of(turned, keep_strides=False)), torch.cat([each.flatten() for each in turned]))
    ours, theirs = ([Parameter(torch.zeros(4, 4)) for _ in range(100)] for _ in range(2))
    vector_to_parameters(slab, theirs)
    group_of(ours).scatter(slab)
    assert all(map(torch.equal, ours, theirs))


def test_blocks_of_a_ring_carry_the_whole_slab(threads: int) -> None:
    sizes = [3, 0, 70_000, 16, 1, 5000, 40_000] * 3
    tensors = [torch.randn(size) for size in sizes]
    group = group_of(tensors)
    ring = [torch.empty(16 * 1024) for _ in range(2)]
    arrived = torch.zeros(group.length)
    for number, (start, stop) in enumerate(group.blocks(64 * 1024)):
        block = ring[number % 2][: stop - start]
        group.gather(block, start)
        arrived[start:stop].copy_(block)
    assert torch.equal(arrived, filled(group, tensors))


def test_a_block_size_that_might_cut_an_element_is_refused() -> None:
    for size in (0, 65, 2**20 + 8):
        with pytest.raises(ValueError, match=f"positive multiple of 64 bytes, got {size}"):
            group_of([torch.ones(3)]).blocks(size)


def test_large_tensors_are_shared_among_threads(threads: int) -> None:
    tensors = [torch.randn(1 << 20).view(1 << 10, 1 << 10)[:, :1023] for _ in range(6)]
    tensors += [torch.randn(999_999) for _ in range(6)]
    group = group_of(tensors, keep_strides=False)
    slab = gathered(group)
    assert torch.equal(slab, filled(group, tensors))
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    group.scatter(slab)
    assert all(map(torch.equal, tensors, kept))


@pytest.mark.parametrize(
    ("block", "start", "error", "why"),
    [
        ([0.0], 0, TypeError, "expected a Tensor, got list"),
        (torch.zeros(4, dtype=torch.float64), 0, ValueError, "block of the dtype of the group"),
        (torch.zeros(8)[::2], 0, ValueError, "expected a contiguous block, got strides"),
        (torch.zeros(4, device="meta"), 0, ValueError, "plain tensor as block"),
        (torch.zeros(9), 0, ValueError, "9 elements at element 0 reaches beyond the 8 of the slab"),
        (torch.zeros(4), 5, ValueError, "4 elements at element 5 reaches beyond the 8 of the slab"),
        (torch.zeros(0), 2**63, ValueError, "reaches beyond"),
        (torch.zeros(1), -1, OverflowError, "negative"),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_refused_block_changes_nothing(
    direction: str, block: Any, start: int, error: type[Exception], why: str
) -> None:
    tensors = [torch.ones(4), torch.ones(4)]
    with pytest.raises(error, match=why):
        getattr(group_of(tensors), direction)(block, start)
    assert [tensor._version for tensor in tensors] == [0, 0]
    assert torch.equal(torch.stack(tensors), torch.ones(2, 4))


def test_a_block_that_shares_memory_with_a_tensor_is_refused() -> None:
    base = torch.arange(64.0)
    strided = base.as_strided((2, 4), (16, 1), 8)
    group = group_of([torch.ones(4), base[60:].view(2, 2).t(), strided], keep_strides=False)
    for block in (base[57:61], base[:9], base[27:35]):
        with pytest.raises(ValueError, match=r"shares memory with tensors\[[12]\]"):
            group.gather(block)
    assert torch.equal(base, torch.arange(64.0))
    for block in (base[28:36], base[29:34], base[28:36]):
        group.gather(block)
    # What shares nothing is remembered, but not what reaches beyond it.
    for block in (base[27:35], base[27:37], base[56:61]):
        with pytest.raises(ValueError, match=r"shares memory with tensors\[[12]\]"):
            group.gather(block)


def test_a_block_that_requires_gradients_is_no_place_to_gather_to() -> None:
    with pytest.raises(ValueError, match="does not require gradients"):
        group_of([torch.ones(2)]).gather(torch.zeros(2, requires_grad=True))


@pytest.mark.parametrize(
    "folded", [torch.zeros(1, 3).expand(4, 3), torch.zeros(9).as_strided((3, 3), (1, 1)), torch.zeros(()).expand(2)]
)
def test_scatter_to_elements_that_share_memory_is_refused(folded: torch.Tensor) -> None:
    tensors = [torch.zeros(4), folded]
    group = group_of(tensors)
    with pytest.raises(ValueError, match=r"tensors\[1\] cannot be written: several of its elements share memory"):
        group.scatter(torch.ones(group.length))
    assert not tensors[0].any()
    assert not folded.any()


def test_tensors_that_share_memory_are_written_one_after_another(threads: int) -> None:
    base = torch.zeros(3_000_000)
    tensors = [base[:2_000_000], base[1_000_000:], base[500_000:2_500_000]]
    group = group_of(tensors)
    assert group.overlapping
    slab = torch.arange(group.length, dtype=torch.float32)
    expected = base.clone()
    for first, offset in zip([0, 1_000_000, 500_000], group.offsets, strict=True):
        expected[first : first + 2_000_000] = slab[offset : offset + 2_000_000]
    # Two threads would meet in some of these rounds.
    for _ in range(20):
        group.scatter(slab)
        assert torch.equal(base, expected)


def test_what_shares_memory_is_told_apart_from_what_is_listed_twice() -> None:
    one, other = Parameter(torch.zeros(4)), Parameter(torch.zeros(4))
    twice = group_of([one, other, one, other, other])
    assert twice.offsets.tolist() == [0, 4, 0, 4, 4]
    assert len(twice) == 5
    assert not twice.overlapping
    alias = group_of([one, one.detach(), other])
    assert alias.offsets.tolist() == [0, 4, 8]
    assert alias.overlapping
    nothing = torch.zeros(0)
    assert not group_of([nothing, torch.zeros(0), nothing, torch.zeros(3)]).overlapping


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_tensors_listed_again_have_one_place_in_any_order(numbers: list[int]) -> None:
    distinct = [torch.full((number + 1,), float(number)) for number in range(4)]
    tensors = [distinct[number] for number in numbers]
    group = group_of(tensors)
    place: dict[int, int] = {}
    for number, offset, view in zip(numbers, group.offsets, group.views(gathered(group)), strict=True):
        assert place.setdefault(number, offset) == offset
        assert torch.equal(view, distinct[number])
    assert len(set(place.values())) == len(place)


def test_a_stale_backward_pass_notices_a_scatter() -> None:
    parameters = [Parameter(torch.ones(16)), Parameter(torch.ones(16))]
    group = group_of(parameters)
    losses = [(parameter * parameter).sum() for parameter in parameters]
    group.scatter(torch.zeros(16), 16)
    losses[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


def test_a_stale_backward_pass_notices_a_gather_into_what_it_needs() -> None:
    block = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * block).sum()
    group_of([torch.zeros(2)]).gather(block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_other_threads_run_meanwhile(direction: str) -> None:
    tensors = [torch.zeros(1000) for _ in range(30_000)]
    group = group_of(tensors)
    block = gathered(group)
    count = 0
    done = False

    def run() -> None:
        nonlocal count
        while not done:
            count += 1
            time.sleep(0)  # Lets the GIL go.

    interval = sys.getswitchinterval()
    # No thread takes the GIL from another any more: what runs meanwhile was let in.
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=run)
    try:
        thread.start()
        before = count
        for _ in range(10):  # one may be over before a busy machine lets the other thread run often
            getattr(group, direction)(block)
        after = count
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert after - before > 100


def gather_and_compare(group: TensorGroup, slab: torch.Tensor) -> None:
    # By NumPy: torch's own threads do not survive the fork.
    again = np.zeros_like(slab.numpy())
    group.gather(torch.from_numpy(again))
    sys.exit(0 if np.array_equal(again, slab.numpy()) else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely by default")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_can_go_on_after_a_large_gather() -> None:
    group = group_of([torch.randn(1 << 20) for _ in range(10)])
    slab = gathered(group)
    child = multiprocessing.get_context("fork").Process(target=gather_and_compare, args=(group, slab))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_scatter_does_not_write_tensors_from_inference_mode() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(4)
    (group,), _ = group_tensors([torch.zeros(4), tensor])
    with pytest.raises(ValueError, match=r"tensors\[1\] was made in inference mode"):
        group.scatter(torch.ones(group.length))
    assert tensor.tolist() == [0, 0, 0, 0]
