"""Conversions of large entries, which get memory of their own, one after another.

The bugs that this hunts: an entry that is lost or moved twice because it is large; a move that stops half-way when
memory runs out or a warning is an error, where there is no way back; old memory that is kept until the end; small
entries that lose their slab because there are large ones.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

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


def test_a_large_entry_from_inference_mode_moves_as_in_torchs_class() -> None:
    def build(kind: type[nn.ParameterDict]) -> nn.Module:
        with torch.inference_mode():
            made = Parameter(torch.randn(2000), requires_grad=False)
        return kind([("a", torch.randn(2000)), ("made", made), ("b", torch.randn(3))])

    assert_same(build, lambda module: module.double())


def test_a_default_device_is_not_asked_about_large_entries() -> None:
    pd = mixed()
    with torch.device("meta"):
        pd.double()
    assert {each.device.type for each in pd.values()} == {"cpu"}
    assert all(each.grad is not None and each.grad.dtype == torch.float64 for each in pd.values())
