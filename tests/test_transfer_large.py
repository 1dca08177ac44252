"""Conversions of large entries, which get memory of their own, one after another.

The bugs that this hunts: an entry that is lost or moved twice because it is large; a move that stops half-way when
memory runs out, a warning is an error or somebody presses Ctrl-C, where there is no way back; old memory that is kept
until the end; small entries that lose their slab because there are large ones.
"""

from __future__ import annotations

import _thread
import copy
import signal
import warnings
import weakref
from collections import defaultdict
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._device import DeviceContext

import pdrs
from pdrs import transfer
from pdrs._core import group_tensors
from test_transfer import BUILDS, CONVERSIONS, assert_same, same_values, state_of, tensors_of, with_grad

PD = pdrs.ParameterDict


@pytest.mark.parametrize("large", [1, 16])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("conversion", ["to(float64)", "to(device, dtype)", "to(complex)", "half", "type by name"])
def test_large_entries_move_as_in_torchs_class(
    build: str, conversion: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_LARGE", large)
    assert_same(BUILDS[build], CONVERSIONS[conversion], CONVERSIONS["float"])


def mixed() -> PD:
    """Make large and small entries with gradients, in turns; one is transposed, one has two names."""
    torch.manual_seed(0)
    entries = [(f"{at}", with_grad(Parameter(torch.randn(64, 64) if at % 2 else torch.randn(16)))) for at in range(20)]
    pd = PD(entries)
    pd["transposed"] = with_grad(Parameter(torch.randn(40, 80).t()))
    pd["again"] = pd["3"]
    return pd


def large_of(pd: PD) -> list[Tensor]:
    return [each for each in dict.fromkeys(pd.values()) if each.numel() >= 1024]


def test_the_old_memory_of_a_large_entry_goes_before_the_next_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = mixed()
    large, real, converted = large_of(pd), Tensor.to, []

    def counts(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(tensor is each for each in large):
            converted.append([each.dtype for each in large].count(torch.float64))
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", counts)
    pd.to(torch.float64)
    assert converted == list(range(len(large)))


def test_small_entries_keep_a_slab_beside_large_ones() -> None:
    pd = mixed().double()
    for dtype in (torch.float32, torch.float64):
        pd.to(dtype)
        (group,), _ = group_tensors([each for each in pd.values() if each.numel() < 1024])
        assert group.slab() is not None
        (group,), _ = group_tensors(large_of(pd))
        assert group.slab() is None


def test_both_directions_find_the_same_entries_large() -> None:
    # Those of 4 KB as float64 would be large in one direction only, and the slab of the others never found again.
    pd = PD([(f"{at}", torch.randn(512)) for at in range(10)])
    for dtype in (torch.float64, torch.float32):
        pd.to(dtype)
        (group,), _ = group_tensors(list(pd.values()))
        assert group.slab() is not None


@pytest.mark.parametrize("nth", [1, 2, 7, 12, 13, 22])
def test_a_conversion_is_completed_when_memory_runs_out(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = mixed()
    expected = mixed().to(torch.float64)
    before = [tensor for _, tensor in tensors_of(pd)]
    real, calls = Tensor.to, 0

    def fails(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += tensor.numel() > 0  # torch's function is asked with empty ones.
        if tensor.numel() > 0 and calls >= nth:
            raise RuntimeError("can't allocate memory")
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", fails)
    pd.to(torch.float64)
    assert calls >= nth
    monkeypatch.undo()
    for one, (name, tensor), (_, other) in zip(before, tensors_of(pd), tensors_of(expected), strict=True):
        assert one is tensor, name
        assert tensor is not None
        assert other is not None
        assert same_values(tensor, other), name
        assert tensor.stride() == other.stride(), name
    pd.float().double()
    assert all(same_values(one, two) for one, two in zip(pd.values(), expected.values(), strict=True))


@pytest.mark.parametrize("nth", [1, 7, 22])
def test_an_interrupt_in_a_conversion_comes_when_all_has_moved(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = mixed()
    pd.register_buffer("buffer", torch.randn(3))
    expected = copy.deepcopy(pd)
    real, calls = Tensor.to, 0

    def interrupts(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += tensor.numel() > 0  # torch's function is asked with empty ones.
        if tensor.numel() > 0 and calls == nth:
            raise KeyboardInterrupt
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", interrupts)
    with pytest.raises(KeyboardInterrupt):
        pd.to(torch.float64)
    monkeypatch.undo()
    assert_moved(pd, expected)


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


def test_a_reserve_that_cannot_be_had_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = mixed()
    before = state_of(pd)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "UntypedStorage", fails)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pd.double()
    assert state_of(pd) == before


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_warning_that_raises_leaves_all_as_it_was(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pd = PD([(f"{at}", torch.randn(2000, dtype=torch.complex64)) for at in range(3)])
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
            with suppress(ArithmeticError):
                pd.to(torch.float32)
    finally:
        torch.set_warn_always(False)
    assert calls < nth or state_of(pd) == before
    assert calls > 0


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
