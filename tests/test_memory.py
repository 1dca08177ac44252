"""Huge pages for what is large: asked for, and only there.

The bugs that this hunts: memory that is not advised (each page of 4 KiB faults then), and fake or meta tensors at which
the advice fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pdrs import _memory

_SMAPS = Path("/proc/self/smaps")


def _is_advised(address: int) -> bool:
    """Whether the mapping in which an address lies has the flag of ``MADV_HUGEPAGE``."""
    inside = False
    for line in _SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:" and inside:
            return "hg" in rest
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes the advice")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_large_memory_asks_for_huge_pages():
    large = _memory.empty((1 << 20, 16), dtype=torch.float32)
    assert large.shape == (1 << 20, 16)
    assert _is_advised(large.data_ptr() + large.nbytes // 2)
    plain = torch.empty((1 << 20, 16), dtype=torch.float32)
    assert not _is_advised(plain.data_ptr() + plain.nbytes // 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [0, 5, (0, 3), (2, 3, 4)])
def test_memory_has_the_shape_dtype_and_device_that_were_wanted(shape, device):
    tensor = _memory.empty(shape, dtype=torch.float16, device=device)
    expected = torch.empty(shape, dtype=torch.float16, device=device)
    assert (tensor.shape, tensor.dtype, tensor.device) == (expected.shape, expected.dtype, expected.device)


def test_fake_tensors_are_left_alone():
    with FakeTensorMode():
        assert _memory.empty((1 << 20, 16), dtype=torch.float32).shape == (1 << 20, 16)
