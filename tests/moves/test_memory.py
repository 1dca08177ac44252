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

import pdrs

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


needs_huge_pages = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="only Linux takes the advice, if its kernel has huge pages",
)


ROWS = 1 << 17  # 8 MiB, of 16 float32


def _grown() -> pdrs.StackedParameterDict:
    sd = pdrs.StackedParameterDict({"a": torch.ones(16)})
    sd.reserve(ROWS)
    return sd


def _compacted() -> pdrs.StackedParameterDict:
    sd = pdrs.StackedParameterDict.from_tensor([f"n{at}" for at in range(ROWS)], torch.ones(ROWS, 16))
    sd.drop(["n0", "n1"])
    sd.compact()
    return sd


def _loaded() -> pdrs.StackedParameterDict:
    sd = pdrs.StackedParameterDict()
    sd.load_state_dict(_grown().state_dict())
    return sd


@needs_huge_pages
@pytest.mark.parametrize(
    "make",
    [
        _grown,
        _compacted,
        _loaded,
        lambda: pdrs.StackedParameterDict.from_shapes(
            {f"n{at}": (16,) for at in range(ROWS)}, init=torch.nn.init.ones_
        ),
    ],
    ids=["grown", "compacted", "loaded", "from shapes"],
)
def test_large_tables_ask_for_huge_pages(make):
    (table,) = make().parameters()
    assert _is_advised(table.data_ptr() + table.nbytes // 2)
    assert (table.detach()[:1] == 1).all()


@needs_huge_pages
def test_the_state_of_an_attached_optimizer_asks_for_huge_pages_when_it_grows():
    sd = pdrs.StackedParameterDict({"a": torch.ones(16)})
    optimizer = torch.optim.Adam(sd.parameters())
    sd.attach_optimizer(optimizer)
    sd.gather(["a"]).sum().backward()
    optimizer.step()
    sd.reserve(ROWS)
    (state,) = optimizer.state.values()
    assert _is_advised(state["exp_avg"].data_ptr() + state["exp_avg"].nbytes // 2)
    assert state["exp_avg"][0].count_nonzero() == 16
    assert state["exp_avg"][1:].count_nonzero() == 0


@needs_huge_pages
def test_torch_itself_does_not_ask_for_huge_pages():
    sd = pdrs.StackedParameterDict.from_shapes({"a": (1 << 20, 16)})
    assert _is_advised(sd["a"].data_ptr() + sd["a"].nbytes // 2)
    # 1 GiB, none of it touched: larger than what malloc may have left of tables that were freed, which stays advised.
    plain = torch.empty(1 << 28)
    assert not _is_advised(plain.data_ptr() + plain.nbytes // 2)


def test_fake_and_meta_tables_are_left_alone():
    with FakeTensorMode():
        sd = pdrs.StackedParameterDict.from_shapes({"a": (1 << 20, 16)})
        assert sd.table((1 << 20, 16)).shape == (1, 1 << 20, 16)
    sd = pdrs.StackedParameterDict.from_shapes({"a": (16,)}, device="meta")
    sd.reserve(ROWS)
    assert sd.table((16,)).shape == (1 + ROWS, 16)
