"""Many tensors that are copied into one block, and many that are filled from one: stacking, moving and loading.

The bugs that this hunts: an element that goes to the wrong place, from strided memory or at the edge of a block; a byte
written outside; two threads that meet; a write that autograd does not notice; the GIL held while bytes move.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

import pdrs
from tensors import SUPPORTED, bytes_of, layouts, of_bytes

PD, SD = pdrs.ParameterDict, pdrs.StackedParameterDict
# safetensors does not have these, and torch can compute with few of them.
UNSAVED = {torch.complex32, torch.complex128, torch.float4_e2m1fn_x2}
BY_SIZE = [torch.uint8, torch.float16, torch.float32, torch.complex64, torch.complex128]


def fixed(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)


def named(tensors: list[Tensor]) -> list[tuple[str, Parameter]]:
    return [(str(at), tensor if isinstance(tensor, Parameter) else fixed(tensor)) for at, tensor in enumerate(tensors)]


def load(pd: nn.ParameterDict, values: list[Tensor]) -> None:
    """Load values into the entries from the tables of a file, of which each has the rows of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        pdrs.save(SD(named(values)), Path(folder, "file"), sync=False)
        pdrs.load(Path(folder, "file"), pd)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# -- into a block ------------------------------------------------------------------------------------------------------


@given(st.lists(layouts(), min_size=1, max_size=6), st.sampled_from(BY_SIZE))
def test_any_layout_is_stacked_in_c_order(tensors: list[Tensor], dtype: torch.dtype) -> None:
    # The tensors are parts of one, so that each keeps its strides.
    base = torch.arange(256).to(dtype)
    tensors = [base.as_strided(each.shape, each.stride(), each.storage_offset()) for each in tensors]
    tensors += [tensor.clone() for tensor in tensors]  # of the same shape, with other strides
    sd = SD(named(tensors))
    for tensor, row in zip(tensors, sd.values(), strict=True):
        assert torch.equal(row, tensor)
        assert row.is_contiguous()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 40_000), st.booleans()), min_size=1, max_size=6))
def test_entries_of_any_size_are_converted_whole(sizes: list[tuple[int, bool]]) -> None:
    # Some are larger than what is converted at a time, and some lie across two pieces.
    tensors = [torch.randn(2, size).t() if turned else torch.randn(size) for size, turned in sizes]
    for act in (PD.double, PD.half):
        pd = act(PD(named([tensor.clone() for tensor in tensors])))
        for tensor, entry in zip(tensors, pd.values(), strict=True):
            assert torch.equal(entry, tensor.to(entry.dtype))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_a_tensor_that_is_listed_again_is_copied_to_every_place(numbers: list[int]) -> None:
    distinct = [torch.full((2,), float(number)) for number in range(4)]
    tensors = [distinct[number] for number in numbers]
    assert [row[0].item() for row in SD(named(tensors)).values()] == numbers
    assert [entry[0].item() for entry in copy.deepcopy(PD(named(tensors))).values()] == numbers


def test_large_tensors_are_shared_among_threads(threads: int) -> None:
    tensors = [torch.randn(1 << 10, 1 << 10)[:, :1023] for _ in range(5)]
    tensors += [torch.randn(1023, 1 << 10).t() for _ in range(5)]
    sd = SD(named(tensors))
    assert all(map(torch.equal, sd.values(), tensors))
    pd = PD((name, torch.zeros_like(tensor)) for name, tensor in sd.items())
    load(pd, tensors)
    assert all(map(torch.equal, pd.values(), tensors))


def test_other_threads_run_meanwhile() -> None:
    pd = PD((str(at), torch.zeros(1000)) for at in range(30_000))
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
        for _ in range(3):  # one may be over before a busy machine lets the other thread run often
            copy.deepcopy(pd)
        after = count
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert after - before > 100


def stack_and_compare(pd: pdrs.ParameterDict, expected: list[Tensor]) -> None:
    torch.set_num_threads(1)  # torch's own threads do not survive the fork.
    sys.exit(0 if all(map(torch.equal, pd.stack().values(), expected)) else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely by default")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_can_go_on_after_large_tensors_were_stacked() -> None:
    pd = PD((str(at), torch.randn(1 << 20)) for at in range(5))
    expected = list(pd.stack().values())
    child = multiprocessing.get_context("fork").Process(target=stack_and_compare, args=(pd, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


# -- out of a block ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(layouts(), min_size=1, max_size=6), st.data())
def test_entries_of_any_layout_are_filled_and_nothing_beside_them(tensors: list[Tensor], data: st.DataObject) -> None:
    # Some tensors have elements that share memory, which nobody can write to.
    tensors = [each for each in tensors if each.numel() == each.unique().numel()]
    bases = [torch.zeros(256) for _ in tensors]
    entries = [
        base.as_strided(each.shape, each.stride(), each.storage_offset())
        for base, each in zip(bases, tensors, strict=True)
    ]
    values = [torch.arange(1.0, 1 + each.numel()).view(each.shape) for each in tensors]
    expected = [base.clone() for base in bases]
    for base, each, value in zip(expected, tensors, values, strict=True):
        base.as_strided(each.shape, each.stride(), each.storage_offset()).copy_(value)
    load(PD(named(entries)), values)
    assert all(map(torch.equal, bases, expected))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", sorted(SUPPORTED - UNSAVED, key=str), ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    base = of_bytes(64, dtype).view(8, 8)
    tensors = [base[:, ::2], base.t(), base[3], base[0, 0]]
    fresh = [torch.zeros(256 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(4, 8, 8) for _ in range(2)]
    pd = PD(named([fresh[0][0, :, ::2], fresh[0][1].t(), fresh[0][2, 3], fresh[1][0, 0, 0]]))
    load(pd, tensors)
    assert [bytes_of(entry) for entry in pd.values()] == [bytes_of(tensor) for tensor in tensors]


FOLDED: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.zeros(1, 3).expand(4, 3),
    "in steps of one": lambda: torch.zeros(9).as_strided((3, 3), (1, 1)),
    "one number": lambda: torch.zeros(()).expand(2),
}


@pytest.mark.parametrize("folded", FOLDED.values(), ids=FOLDED)
def test_elements_that_share_memory_are_written_or_refused_as_torch_does(folded: Callable[[], Tensor]) -> None:
    def outcome(kind: type[nn.ParameterDict], fill: Callable[[nn.ParameterDict, list[Tensor]], Any]) -> list[Any]:
        entry = folded()
        values = [torch.ones(4), torch.arange(1.0, 1 + entry.numel()).view(entry.shape)]
        pd = kind(named([torch.zeros(4), entry]))
        try:
            fill(pd, values)
        except RuntimeError as error:
            return [str(error).splitlines()[1:], pd["0"].tolist(), entry.tolist()]
        return [pd["0"].tolist(), entry.tolist()]

    expected = outcome(nn.ParameterDict, lambda pd, values: pd.load_state_dict(dict(named(values))))
    assert outcome(PD, load) == expected
    assert outcome(PD, lambda pd, values: pd.load_state_dict(dict(named(values)))) == expected


def test_entries_that_share_memory_are_written_one_after_another(threads: int) -> None:
    values = [torch.full((2_000_000,), float(at)) for at in (1, 2, 3)]

    def filled(kind: type[nn.ParameterDict], fill: Callable[[nn.ParameterDict], Any]) -> Tensor:
        base = torch.zeros(3_000_000)
        fill(kind(named([base[:2_000_000], base[1_000_000:], base[500_000:2_500_000]])))
        return base

    expected = filled(nn.ParameterDict, lambda pd: pd.load_state_dict(dict(named(values))))
    for _ in range(3):
        assert torch.equal(filled(PD, lambda pd: load(pd, values)), expected)


def test_a_stale_backward_pass_notices_that_an_entry_was_loaded() -> None:
    pd = PD({"a": torch.ones(16), "b": torch.ones(16)})
    losses = [(entry * entry).sum() for entry in pd.values()]
    with tempfile.TemporaryDirectory() as folder:
        pdrs.save(SD({"b": torch.zeros(16)}), Path(folder, "file"))
        pdrs.load(Path(folder, "file"), pd, strict=False)
    losses[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()


@pytest.mark.parametrize("kind", [nn.ParameterDict, PD])
def test_entries_from_inference_mode_are_filled_like_any_others(kind: type[nn.ParameterDict]) -> None:
    with torch.inference_mode():
        tensor = torch.zeros(4)
    pd = kind(named([torch.zeros(4), tensor]))
    load(pd, [torch.ones(4), torch.full((4,), 2.0)])
    assert tensor.tolist() == [2.0] * 4
    assert pd["0"].tolist() == [1.0] * 4
