"""Moves are all or nothing, for large entries beside small ones, too.

The bugs that this hunts: a move that stops half-way when memory runs out in its last step, a warning is an error or
somebody presses Ctrl-C, and leaves two dtypes; an entry that is lost or moved twice.
"""

from __future__ import annotations

import _thread
import copy
import signal
import subprocess
import sys
import warnings
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from test_transfer import assert_same, same_values, state_of, tensors_of, with_grad
from torch import nn
from torch.nn import Parameter
from torch.utils._device import DeviceContext

import pdrs
from tensors import blocks

PD = pdrs.ParameterDict


def mixed() -> PD:
    """Make large and small entries with gradients, in turns; one is transposed, one has two names."""
    torch.manual_seed(0)
    entries = [(f"{at}", with_grad(Parameter(torch.randn(64, 64) if at % 2 else torch.randn(16)))) for at in range(20)]
    pd = PD(entries)
    pd["transposed"] = with_grad(Parameter(torch.randn(40, 80).t()))
    pd["again"] = pd["3"]
    return pd


def test_all_entries_of_a_dtype_have_one_slab() -> None:
    pd = mixed()
    for dtype in (torch.float64, torch.float32):
        pd.to(dtype)
        assert blocks(list(pd.parameters())) == 1


# Every hole in memory is filled, and then there is a little more room at each attempt, until the move goes through.
UNDER_A_LIMIT = """
import resource, torch, pdrs

def limit(room):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    taken = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))

rows = torch.arange(30_000.0).view(-1, 2).unbind()  # To move one frees no memory.
pd = pdrs.ParameterDict([(f"n{at}", row) for at, row in enumerate(rows)])
pd["n1"].grad = torch.ones(2)
pd.register_buffer("buffer", torch.zeros(3))
pdrs.ParameterDict({"a": torch.zeros(3), "b": torch.zeros(3)}).double()  # All that is made once is there.
filler = [None] * 1_000_000
limit(0)
at = 0
for size in (1 << 20, 1 << 16, 1 << 12, 1 << 10):
    try:
        while True:
            filler[at] = bytes(size)
            at += 1
    except MemoryError:
        pass
failures = 0
for room in range(2 << 20, 200 << 20, 1 << 19):
    limit(room)
    try:
        pd.double()
    except (MemoryError, RuntimeError):
        failures += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dtypes = {each.dtype for each in (*pd.values(), pd["n1"].grad, pd.buffer)}
    assert len(dtypes) == 1, dtypes
    if dtypes == {torch.float64}:
        break
assert failures > 5 and dtypes == {torch.float64}, (failures, dtypes)
assert pd["n7"].tolist() == [14.0, 15.0]
"""


def test_out_of_memory_leaves_one_dtype() -> None:
    run = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


class Guarded(dict[str, Any]):
    """A dict that refuses a name."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "guarded":
            raise KeyError(name)
        super().__setitem__(name, value)


def test_a_buffer_that_cannot_be_set_leaves_all_as_it_was() -> None:
    pd = mixed()
    pd.register_buffer("first", torch.randn(3))
    pd.register_buffer("guarded", torch.randn(3))
    pd._buffers = Guarded(pd._buffers)
    before = state_of(pd)
    with pytest.raises(KeyError, match="guarded"):
        pd.double()
    assert state_of(pd) == before


def test_a_signal_on_the_way_interrupts_when_all_has_moved() -> None:
    pd = mixed()
    pd.register_buffer("buffer", torch.randn(3))
    expected = copy.deepcopy(pd)
    pd["sparse"] = torch.eye(3).to_sparse()  # It is torch's to move, and what is put back if a move fails.
    # When the old memory of a small entry goes, a signal comes. Nothing of this is Python code, where it would be seen.
    signals: defaultdict[Any, None] = defaultdict(_thread.interrupt_main)
    watch = weakref.ref(pd["0"].untyped_storage(), signals.__missing__)
    hash(watch)  # It has none later, unless it was asked before.
    # A process in the background may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pd.to(torch.float64)
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch() is None
    assert pd.pop("sparse").dtype == torch.float64
    assert_moved(pd, expected)


def assert_moved(pd: PD, single: PD) -> None:
    for (name, tensor), (_, before) in zip(tensors_of(pd), tensors_of(single), strict=True):
        if before is not None:
            assert same_values(tensor, before.double()), name


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_warning_that_raises_leaves_all_as_it_was(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three groups, each of which is converted with a warning.
    pd = PD([(f"{at}", torch.randn(2000, dtype=[torch.complex64, torch.complex128][at % 2])) for at in range(4)])
    pd.register_buffer("buffer", torch.randn(3, dtype=torch.complex64))
    before, calls = state_of(pd), 0

    def raises(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise ArithmeticError

    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", raises)
            with pytest.raises(ArithmeticError):
                pd.to(torch.float32)
    finally:
        torch.set_warn_always(False)
    assert calls == nth
    assert state_of(pd) == before


@pytest.mark.parametrize("sizes", [(2000,), (3,), (2000, 3)])
def test_entries_from_inference_mode_move_as_in_torchs_class(sizes: tuple[int, ...]) -> None:
    def build(kind: type[nn.ParameterDict]) -> nn.Module:
        with torch.inference_mode():
            made = [(f"of {size}", Parameter(torch.randn(size), requires_grad=False)) for size in sizes]
        return kind([("a", torch.randn(2000)), *made, ("b", torch.randn(3))])

    assert_same(build, lambda module: module.double())


def test_a_default_device_is_not_asked_about_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = mixed()
    entries = {id(tensor) for _, tensor in tensors_of(pd)}
    real = DeviceContext.__torch_function__

    def listens(self: DeviceContext, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        assert name not in ("to", "copy_", "__set__") or id(args[0]) not in entries
        return real(self, function, types, args, kwargs)

    monkeypatch.setattr(DeviceContext, "__torch_function__", listens)
    with torch.device("meta"):
        pd.double()
    assert {each.device.type for each in pd.values()} == {"cpu"}
    assert all(each.grad is not None and each.grad.dtype == torch.float64 for each in pd.values())
