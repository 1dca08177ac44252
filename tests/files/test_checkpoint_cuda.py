"""Archives of what lies on a device, and archives that are opened on one: through staging, block by block.

The bugs that this hunts: a block that is written before its copy has come; a table that is used before it is there;
entries of several devices that take each other's places; a copy for each entry where a copy a block would do.

Without a GPU this runs on the simulated runtime, which shows that copies are ordered rightly. It runs no kernels, so
values are made and compared on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import pdrs
from fake_cuda.control import Control

pytestmark = pytest.mark.cuda(devices=2)

COUNT, WIDTH = 40_000, 8


@pytest.fixture(params=["eager", "on_demand"])
def late(request: pytest.FixtureRequest, fake_cuda: Control) -> Control:
    """Give the runtime, once with copies that are done at once, and once with copies as late as CUDA permits."""
    fake_cuda.set_schedule(request.param)
    return fake_cuda


def _rows() -> torch.Tensor:
    return torch.arange(float(COUNT * WIDTH)).reshape(COUNT, WIDTH)


def _stacked() -> pdrs.StackedParameterDict:
    return pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(COUNT)], _rows())


def test_what_lies_on_a_device_is_saved(late: Control, tmp_path: Path) -> None:
    small = pdrs.StackedParameterDict.from_tensor([f"n{n}" for n in range(3000)], _rows()[:3000])
    pdrs.save(small.unstack().to("cuda"), tmp_path / "a")
    assert torch.equal(pdrs.open(tmp_path / "a", verify=True).table((WIDTH,)), _rows()[:3000])
    pdrs.save(_stacked().to("cuda"), tmp_path / "b")
    assert torch.equal(pdrs.open(tmp_path / "b", verify=True).table((WIDTH,)), _rows())


def test_entries_of_several_devices_keep_their_places(late: Control, tmp_path: Path) -> None:
    devices = ["cpu", "cuda:0", "cuda:1"]
    pd = pdrs.ParameterDict([(f"n{n}", torch.full((3,), float(n)).to(devices[n % 3])) for n in range(300)])
    pdrs.save(pd, tmp_path / "a")
    opened = pdrs.open(tmp_path / "a", verify=True)
    assert [row.tolist() for row in opened.values()] == [[float(n)] * 3 for n in range(300)]


def test_an_archive_opens_on_a_device_in_copies_of_blocks(late: Control, tmp_path: Path) -> None:
    pdrs.save(_stacked(), tmp_path / "a")
    pdrs.set_staging(block_bytes=1 << 18)
    before = late.calls("cudaMemcpyAsync")
    opened = pdrs.open(tmp_path / "a", device="cuda:1", dtype=torch.float64)
    assert 10 <= late.calls("cudaMemcpyAsync") - before < 20
    pdrs.set_staging()
    table = opened.float32_8
    assert (table.device, table.dtype) == (torch.device("cuda:1"), torch.float64)
    assert torch.equal(table.cpu(), _rows().double())
    assert late.take_races() == []


def test_an_archive_loads_into_modules_on_a_device(late: Control, tmp_path: Path) -> None:
    pdrs.save(pdrs.ParameterDict([(f"n{n}", torch.full((3,), float(n))) for n in range(50)]), tmp_path / "a")
    pd = pdrs.ParameterDict([(f"n{n}", torch.zeros(3)) for n in range(50)]).to("cuda")
    sd = pd.cpu().stack().to("cuda")
    pd = pd.to("cuda")
    for target in (pd, sd):
        pdrs.load(tmp_path / "a", target)
        assert torch.stack([row.cpu() for row in target.values()])[:, 0].tolist() == list(map(float, range(50)))


@pytest.mark.parametrize("layout", ["archive", "named"])
@pytest.mark.parametrize("class_", [pdrs.ParameterDict, pdrs.StackedParameterDict])
def test_what_is_on_the_meta_device_gets_its_memory_where_it_is_asked_for(
    late: Control, class_: Any, layout: Literal["archive", "named"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros_like = torch.zeros_like

    def zeros(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        return zeros_like(value, device="cpu").to(device)  # the runtime has no kernel that fills memory

    monkeypatch.setattr(torch, "zeros_like", zeros)
    names = [f"n{n}" for n in range(50)]
    pdrs.save(pdrs.StackedParameterDict.from_tensor(names, _rows()[:50]), tmp_path / "f", layout=layout)
    with torch.device("meta"):
        asked, beside = (
            torch.nn.ModuleDict({"x": class_((name, torch.empty(WIDTH)) for name in names)}) for _ in range(2)
        )
    beside["there"] = torch.nn.Module()
    beside["there"].register_buffer("there", torch.empty(3, device="cuda:1"), persistent=False)
    pdrs.load(tmp_path / "f", asked["x"], device="cuda")
    pdrs.load(tmp_path / "f", beside["x"], device=1)
    for module, device in ((asked, "cuda:0"), (beside, "cuda:1")):
        assert {str(one.device) for one in module.parameters()} == {device}
        assert torch.equal(torch.stack([module["x"][name].detach().cpu() for name in names]), _rows()[:50])
