"""Gradients that are clipped: sparse ones as the dense ones that they stand for, as by torch's functions.

The bugs that this hunts: a norm of a gradient that lists a row several times and is taken for one of other rows; a
gradient that is made anew, or clipped though an error is raised; a kind of norm that torch's function knows and ours
does not.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pdrs
from pdrs.optim import SGD, clip_grad_norm_, clip_grad_value_

SD = pdrs.StackedParameterDict
NAMES = [f"name.{n}" for n in range(12)]


def rows(count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, *(shape or (3,)), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_near(got: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    got, expected = got.detach(), expected.detach()
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=relative, atol=relative * most)


GRADIENTS = ["repeated", "coalesced", "empty", "two dimensions"]


def with_gradients(kind: str, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return Parameters with sparse gradients and a dense one, and the same with dense ones."""
    ours = [nn.Parameter(torch.zeros(6, 3, dtype=dtype)) for _ in range(2)] + [
        nn.Parameter(torch.zeros(4, dtype=dtype))
    ]
    index = torch.tensor([[4, 1, 4, 0, 1, 4]])
    values = rows(6, dtype=dtype, seed=3)
    if kind == "coalesced":
        index, values = torch.tensor([[0, 1, 4]]), values[:3]
    elif kind == "empty":
        index, values = index[:, :0], values[:0]
    elif kind == "two dimensions":
        index, values = torch.tensor([[4, 1, 4], [0, 2, 0]]), values[:3, 0]
    ours[0].grad = torch.sparse_coo_tensor(
        index, values.clone(), (6, 3), is_coalesced=kind == "coalesced" or None, check_invariants=False
    )
    ours[1].grad, ours[2].grad = rows(6, dtype=dtype, seed=4), rows(1, 4, dtype=dtype, seed=5)[0]
    dense = [nn.Parameter(one.detach().clone()) for one in ours]
    for one, other in zip(ours, dense, strict=True):
        other.grad = one.grad.to_dense().clone()
    return [*ours, nn.Parameter(torch.zeros(1))], dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_norms_are_clipped_as_those_of_dense_gradients(kind: str, norm: float, dtype: torch.dtype) -> None:
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for most in (0.5, 1000.0):
        ours, dense = with_gradients(kind, dtype)
        held = ours[0].grad
        total = clip_grad_norm_(iter(ours), most, norm)
        expected = nn.utils.clip_grad_norm_(dense, most, norm)
        assert_near(total, expected, near)
        assert total.dim() == 0
        assert ours[0].grad is held
        assert held.is_sparse
        for one, other in zip(ours, dense, strict=False):
            assert_near(one.grad.to_dense(), other.grad, near)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_numbers_are_clipped_as_those_of_dense_gradients(kind: str) -> None:
    ours, dense = with_gradients(kind)
    clip_grad_value_(ours, 0.4)
    nn.utils.clip_grad_value_(dense, 0.4)
    for one, other in zip(ours, dense, strict=False):
        assert_near(one.grad.to_dense(), other.grad)
    clip_grad_value_(ours[0], 0.0)
    assert not ours[0].grad.to_dense().any()


def test_a_norm_that_is_not_finite_is_an_error_if_it_is_to_be() -> None:
    ours, _ = with_gradients("repeated")
    ours[0].grad._values()[2, 1] = math.nan
    before = ours[0].grad.to_dense().clone(), ours[1].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(ours, 0.1, error_if_nonfinite=True)
    torch.testing.assert_close((ours[0].grad.to_dense(), ours[1].grad), before, equal_nan=True)
    assert clip_grad_norm_(ours, 0.1).isnan()
    assert ours[1].grad.isnan().all()


def test_what_cannot_be_clipped_is_refused() -> None:
    ours, _ = with_gradients("repeated")
    with pytest.raises(ValueError, match="norm_type above 0 for sparse gradients, got 0"):
        clip_grad_norm_(ours, 1.0, 0.0)
    with pytest.raises(ValueError, match="clip_value >= 0, got -1"):
        clip_grad_value_(ours, -1.0)
    assert clip_grad_norm_([], 1.0) == 0
    assert clip_grad_norm_(nn.Parameter(torch.zeros(1)), 1.0) == 0


def test_a_step_with_clipped_gradients_is_that_of_the_clipped_dense_ones() -> None:
    sd, weight = SD.from_tensor(NAMES, rows(12)), nn.Parameter(rows(12))
    optimizer, expected = SGD(sd.parameters(), lr=1.0), torch.optim.SGD([weight], lr=1.0)
    for step in range(10):
        at = [(step * 5 + n * n) % 12 for n in range(8)]
        for one in (optimizer, expected):
            one.zero_grad()
        (sd.gather([NAMES[n] for n in at]) - step).pow(2).sum().backward()
        (weight[at] - step).pow(2).sum().backward()
        assert_near(clip_grad_norm_(sd.parameters(), 0.3), nn.utils.clip_grad_norm_([weight], 0.3))
        optimizer.step()
        expected.step()
    assert_near(sd.gather(NAMES), weight)
