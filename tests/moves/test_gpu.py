"""What needs the kernels of a GPU: arithmetic, gathers, optimizers, compiled steps and conversions on the device.

The bugs that this hunts: a kernel that reads a block before the copy to it is done; an index, a mask or a state on
another device than its table; a conversion on the device that differs from torch's. The simulated runtime runs no
kernels.

Each test runs on the CPU, so that it is known to be right itself, and again on a GPU where there is one (``make gpu``),
where it is compared with the same on the CPU.
"""

from __future__ import annotations

import copy
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pdrs

# torch 2.11 says it once of sparse tensors, also to those who have opted out.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

SD = pdrs.StackedParameterDict
PD = pdrs.ParameterDict
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entries(count: int = 300) -> list[tuple[str, Tensor]]:
    """Make entries of several shapes; each has memory of its own."""
    shapes = [(5,), (3, 4), (), (17,), (2, 2, 2)]
    return [(f"n_{at}", random(*shapes[at % 5], seed=at)) for at in range(count)]


def names(count: int, of: int, seed: int = 0) -> list[str]:
    chosen = torch.randint(of, (count,), generator=torch.Generator().manual_seed(seed))
    return [f"n{at}" for at in chosen.tolist()]


def stacked(device: torch.device, count: int = 500, width: int = 8) -> SD:
    return SD.from_tensor([f"n{at}" for at in range(count)], random(count, width).to(device))


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Compare what is on a device with what is on the CPU, name by name."""
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name].detach().cpu(), expected[name].detach().cpu(), **tolerance)


# -- moves and conversions ---------------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_converted_on_the_device_is_what_torch_converts(device: torch.device, dtype: torch.dtype) -> None:
    ours, theirs = (kind(entries()).to(device) for kind in (PD, nn.ParameterDict))
    for module in (ours, theirs):
        module.to(dtype)
        assert {(each.dtype, each.device.type) for each in module.parameters()} == {(dtype, device.type)}
    assert_same(ours, theirs, rtol=0, atol=0)
    assert_same(ours.to("cpu", torch.float32), theirs.to("cpu", torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slab", [False, True])
def test_what_is_moved_and_converted_at_once_keeps_its_values(
    device: torch.device, dtype: torch.dtype, slab: bool
) -> None:
    ours, theirs = (kind(entries()) for kind in (PD, nn.ParameterDict))
    for module in (ours, theirs):
        if slab:
            module.double().float()
        module.to(device, dtype)
    assert_same(ours, theirs, rtol=0, atol=0)
    assert_same(ours.to("cpu"), theirs.to("cpu"), rtol=0, atol=0)


def test_a_kernel_reads_what_a_move_has_brought(device: torch.device) -> None:
    count = 20_000
    pd = PD((f"n{at}", row) for at, row in enumerate(random(count, 16).unbind()))
    for _ in range(3):
        pd.to(device, non_blocking=True)
        total = torch.stack(list(pd.values())).sum(1)
        pd.to("cpu")
        torch.testing.assert_close(total.cpu(), random(count, 16).sum(1), rtol=1e-4, atol=1e-4)
        assert torch.equal(pd["n7"].detach(), random(count, 16)[7])


def test_gradients_move_and_are_converted_with_their_entries(device: torch.device) -> None:
    ours, theirs = (kind(entries()).to(device) for kind in (PD, nn.ParameterDict))
    for module in (ours, theirs):
        sum(each.square().sum() for each in module.values()).backward()
        module.double()
    assert_same(
        {name: each.grad for name, each in ours.items()},
        {name: each.grad for name, each in theirs.items()},
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_converted_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    sd = stacked(device)
    sd.freeze(["n3"])
    sd.to(dtype)
    assert_same(sd, stacked(torch.device("cpu")).to(dtype), rtol=0, atol=0)
    sd.gather(["n3", "n4"]).float().sum().backward()
    gradient = dict(sd.named_grads())
    assert gradient["n3"].abs().sum().item() == 0
    assert gradient["n4"].abs().sum().item() == 8


# -- gathers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_names_are_gathered_with_gradients(device: torch.device, sparse: bool) -> None:
    sd, reference = stacked(device), random(500, 8).requires_grad_()
    batch = names(1000, 500)
    ids = torch.tensor([int(name[1:]) for name in batch])
    weight = random(1000, 8, seed=1)
    for names_or_handle in (batch, sd.lookup(batch)):
        sd.zero_grad()
        reference.grad = None
        made = sd.gather(names_or_handle, sparse=sparse)
        assert made.device.type == device.type
        assert torch.equal(made.detach().cpu(), reference.detach()[ids])
        (made * weight.to(device)).sum().backward()
        (reference[ids] * weight).sum().backward()
        gradient = sd.table((8,)).grad
        assert gradient.is_sparse == sparse
        torch.testing.assert_close(gradient.to_dense().cpu(), reference.grad, rtol=1e-4, atol=1e-5)


def test_names_of_several_tables_are_gathered_together(device: torch.device) -> None:
    sd = stacked(device)
    sd["frozen"] = nn.Parameter(torch.ones(8, device=device), requires_grad=False)
    made = sd.gather(["n1", "frozen", "n2", "absent"], missing="zero")
    expected = torch.stack([random(500, 8)[1], torch.ones(8), random(500, 8)[2], torch.zeros(8)])
    assert torch.equal(made.detach().cpu(), expected)
    made.sum().backward()
    assert dict(sd.named_grads())["n1"].tolist() == [1] * 8


def test_rows_come_and_go_on_the_device(device: torch.device) -> None:
    sd, model = stacked(device), dict(stacked(torch.device("cpu")).named_state_dict())
    model = {name: row.clone() for name, row in model.items()}
    sd.drop(sd.norms() < 2.5)
    model = {name: row for name, row in model.items() if row.norm() >= 2.5}
    assert 0 < len(sd) < 500
    sd.gather(["new", "newer"], missing="insert", init=nn.init.ones_)
    model |= {"new": torch.ones(8), "newer": torch.ones(8)}
    sd.scatter(["new", "late"], torch.full((2, 8), 3.0, device=device), missing="insert")
    model |= {"new": torch.full((8,), 3.0), "late": torch.full((8,), 3.0)}
    assert torch.equal(sd.pop("newer").cpu(), model.pop("newer"))
    assert_same(sd, model, rtol=0, atol=0)
    sd.compact()
    assert_same(sd, model, rtol=0, atol=0)
    torch.testing.assert_close(sd.norms().cpu(), torch.stack([row.norm() for row in model.values()]))
    assert_same(copy.deepcopy(sd), model, rtol=0, atol=0)


# -- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda each: torch.optim.SGD(each, lr=0.1, momentum=0.9),
    "Adam": lambda each: torch.optim.Adam(each, lr=0.1),
    "Adam, foreach": lambda each: torch.optim.Adam(each, lr=0.1, foreach=True),
    "Adam, fused": lambda each: torch.optim.Adam(each, lr=0.1, fused=True),
    "AdamW": lambda each: torch.optim.AdamW(each, lr=0.1, amsgrad=True),
    "Adagrad": lambda each: torch.optim.Adagrad(each, lr=0.1),
    "RMSprop": lambda each: torch.optim.RMSprop(each, lr=0.1),
    "SparseAdam": lambda each: torch.optim.SparseAdam(each, lr=0.1),
}


def trained(sd: SD, make: Callable[[Any], torch.optim.Optimizer], sparse: bool) -> SD:
    """Train while names come and go, so that the state of the optimizer has to follow."""
    optimizer = make(list(sd.parameters()))
    sd.attach_optimizer(optimizer)
    device = sd.table((8,)).device
    for step in range(6):
        batch = names(64, 500, seed=step)
        optimizer.zero_grad()
        made = sd.gather([*batch, "new"], missing="insert", init=nn.init.ones_, sparse=sparse)
        (made * random(len(made), 8, seed=step).to(device)).square().sum().backward()
        optimizer.step()
        sd.drop(sorted(set(batch[:10])))
        if step == 2:
            sd.freeze(sorted(set(names(8, 500, seed=step)) & set(sd)))
        if step == 4:
            sd.compact()
    return sd


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # what is trained is dense on purpose
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_optimizers_step_as_on_the_cpu_while_names_come_and_go(device: torch.device, which: str) -> None:
    sparse = which == "SparseAdam"
    on_device = trained(stacked(device), OPTIMIZERS[which], sparse)
    on_cpu = trained(stacked(torch.device("cpu")), OPTIMIZERS[which], sparse)
    assert_same(on_device, on_cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("foreach", [False, True])
def test_entries_step_as_those_of_torchs_class(device: torch.device, foreach: bool) -> None:
    ours, theirs = (kind(entries()).to(device) for kind in (PD, nn.ParameterDict))
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            sum(each.square().sum() for each in module.values()).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    assert_same(ours, theirs)


def test_a_step_in_lower_precision_scales_its_gradients(device: torch.device) -> None:
    sd = stacked(device)
    optimizer = torch.optim.SGD(sd.parameters(), lr=0.1)
    sd.attach_optimizer(optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    layer = nn.Linear(8, 8).to(device)
    before = sd["n1"].detach().clone()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = layer(sd.gather(["n1", "n2"])).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(sd["n1"].detach(), before)
    assert torch.isfinite(sd.table((8,))).all().item()


# -- compiled steps ----------------------------------------------------------------------------------------------------


def test_a_compiled_step_does_what_the_same_does_uncompiled(device: torch.device) -> None:
    # To compile for the CPU takes a C++ compiler, and much longer than all other tests here.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    sd, pd = stacked(device), PD(entries(10)).to(device)
    ids = sd.indices(names(50, 500))

    def loss(ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, sd.table((8,)))
        return rows.square().sum() + sum(pd[name].square().sum() for name in pd)

    torch._dynamo.reset()
    made = torch.compile(loss, backend=backend, fullgraph=True)(ids)
    torch.testing.assert_close(made, loss(ids))
    made.backward()
    compiled = sd.table((8,)).grad.clone(), pd["n_0"].grad.clone()
    sd.zero_grad()
    pd.zero_grad()
    loss(ids).backward()
    torch.testing.assert_close(compiled, (sd.table((8,)).grad, pd["n_0"].grad))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: PD(entries()), lambda: stacked(torch.device("cpu"))], ids=["PD", "SD"])
def test_what_is_saved_from_the_device_is_loaded_anywhere(device: torch.device, make: Any, tmp_path: Path) -> None:
    expected, module = make(), make().to(device)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = make()
    for each in fresh.parameters():
        nn.init.zeros_(each)
    fresh.load_state_dict(torch.load(file, map_location="cpu"))
    assert_same(fresh, expected, rtol=0, atol=0)
    fresh.to(device)
    pdrs.save(fresh, tmp_path / "it.safetensors")
    opened = pdrs.open(tmp_path / "it.safetensors", device=device)
    assert_same(opened, expected, rtol=0, atol=0)
    for each in fresh.parameters():
        nn.init.zeros_(each)
    pdrs.load(tmp_path / "it.safetensors", fresh)
    assert_same(fresh, expected, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(fresh, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), expected, rtol=0, atol=0)


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pdrs.AbsentNamesWarning")  # what is trained is dense on purpose
def test_what_is_measured_on_a_gpu_gives_right_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases = importlib.import_module("cases_gpu")
    try:
        monkeypatch.setattr(cases, "DEVICE", device.type)
        monkeypatch.setattr(cases, "BATCH", 64)
        monkeypatch.setattr(cases, "BATCHES", 2)
        data = cases.Data(300)
        for case in cases.CASES:
            for subject in case.subjects or cases.SUITE.subjects:
                assert case.sample(subject, data) > 0
    finally:
        _forget_benchmarks()


def test_where_there_is_no_gpu_it_says_so_and_that_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = importlib.import_module("on_gpu")
    try:
        assert on_gpu.main() == 0
        assert capsys.readouterr().out == "No CUDA device: nothing to run.\n"
    finally:
        _forget_benchmarks()


def test_where_there_is_one_what_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    on_gpu = importlib.import_module("on_gpu")
    try:
        for statuses, status in (([0, 0], 0), ([1, 0], 1), ([0, 2], 2)):
            commands = []
            left = iter(statuses)
            monkeypatch.setattr(
                on_gpu, "run", lambda command, *_, to=commands, left=left: to.append(command) or next(left)
            )
            assert on_gpu.main() == status
            assert [each[1] for each in commands] == ["-m", "benchmarks/run.py"]
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
        assert on_gpu.main() == 1
    finally:
        _forget_benchmarks()


def _forget_benchmarks() -> None:
    for name in ("cases_gpu", "machine", "measure", "on_gpu"):
        sys.modules.pop(name, None)
