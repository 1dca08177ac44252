"""Clipping of sparse and dense gradients together, in place.

What a sparse gradient has for a row that it lists several times counts as its sum, as in the gradient made dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pdrs._core import sum_repeated_rows

__all__ = ["clip_grad_norm_", "clip_grad_value_", "values_of_gradients"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients together, sparse ones and dense ones, in place.

    It is that of :func:`torch.nn.utils.clip_grad_norm_` for the gradients made dense. What a sparse gradient has for a
    row that it lists several times is added up at the first place. The others become zeros. **O(k)** for ``k`` rows.

    Parameters
    ----------
    parameters
        Parameters whose gradients are clipped; those without one are passed over.
    max_norm
        The largest norm.
    norm_type
        The number of the p-norm, above 0; it may be ``inf``.
    error_if_nonfinite
        Whether a norm that is ``nan`` or ``inf`` is an error.
    foreach
        As for torch's function.

    Returns
    -------
    torch.Tensor
        The norm before: a tensor without dimensions.

    Raises
    ------
    RuntimeError
        If the norm is not finite, and ``error_if_nonfinite``. Then nothing has been clipped.
    ValueError
        If ``norm_type`` is not above 0, and there is a sparse gradient.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 1))
    >>> sd.gather(["a", "a", "b"], sparse=True).sum().backward()
    >>> pdrs.optim.clip_grad_norm_(sd.parameters(), 1.0)
    tensor(2.2361)

    """
    norm_type = float(norm_type)
    values = values_of_gradients(parameters)
    if norm_type <= 0 and any(each is not gradient for gradient, each in values):
        raise ValueError(f"expected a norm_type above 0 for sparse gradients, got {norm_type}")
    some = [each for _, each in values if each.numel()]  # torch has no largest number of none
    return _clip_norms(some, float(max_norm), norm_type, error_if_nonfinite, foreach)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clip each number of all gradients, sparse ones and dense ones, in place.

    It is that of :func:`torch.nn.utils.clip_grad_value_` for the gradients made dense. See :func:`clip_grad_norm_` for
    rows that a gradient lists several times.

    Parameters
    ----------
    parameters
        Parameters whose gradients are clipped; those without one are passed over.
    clip_value
        Numbers are clipped to ``[-clip_value, clip_value]``; not negative.
    foreach
        As for torch's function.

    Raises
    ------
    ValueError
        If ``clip_value`` is negative.

    """
    clip_value = float(clip_value)
    if not clip_value >= 0:
        raise ValueError(f"expected clip_value >= 0, got {clip_value}")
    with torch.no_grad():
        for _, each in values_of_gradients(parameters):
            each.clamp_(-clip_value, clip_value)


def _clip_norms(
    values: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> Tensor:
    with torch.no_grad():
        if (
            foreach is None
            and not error_if_nonfinite
            and len({(type(one), one.device, one.dtype) for one in values}) == 1
        ):
            # What torch's functions come to, in fewer operations: they cost more than the norm of a batch.
            norms = torch._foreach_norm(values, norm_type)
            total = torch.linalg.vector_norm(torch.stack(norms), norm_type) if len(norms) > 1 else norms[0]
            torch._foreach_mul_(values, (max_norm / (total + 1e-6)).clamp_(max=1.0))
            return total
        total = torch.nn.utils.get_total_norm(values, norm_type, error_if_nonfinite, foreach)
        held: Any = [_Held(each) for each in values]
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, total, foreach)
    return total


class _Held:
    """A tensor as torch's function takes it: as the gradient of something."""

    def __init__(self, gradient: Tensor) -> None:
        self.grad = gradient


def values_of_gradients(parameters: Tensor | Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each gradient, and its numbers: of a sparse one the values, in which each row counts once."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    found = []
    with torch.no_grad():
        for parameter in given:
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_sparse:
                found.append((gradient, gradient))
                continue
            values = gradient._values().detach()
            if not gradient.is_coalesced() and not (
                gradient.sparse_dim() == 1 and sum_repeated_rows(gradient._indices(), values)
            ):
                _sum_by_torch(gradient._indices(), values)
            found.append((gradient, values))
    return found


def _sum_by_torch(indices: Tensor, values: Tensor) -> None:
    _, places = torch.unique(indices, dim=1, return_inverse=True)
    count = int(places.max()) + 1 if len(places) else 0
    sums = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device).index_add_(
        0, places, values
    )
    order = torch.arange(len(places), device=values.device)
    first = torch.full((count,), len(places), device=values.device).scatter_reduce_(0, places, order, "amin")
    values.zero_().index_copy_(0, first, sums)
