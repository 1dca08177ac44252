"""The formulas of the native step as operations of torch: for tables on other devices, and of unusual memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["step_by_torch"]

Writes = list[tuple[Callable[..., Any], tuple[Any, ...]]]


def step_by_torch(
    numbers: dict[str, Any],
    table: Tensor,
    full: list[Tensor],
    single: list[Tensor],
    rows: Tensor | None,
    gradients: Tensor,
    frozen: Tensor | None,
    seed: int | None,
) -> Writes:
    """Compute what a step writes, and return the calls that write it.

    Parameters
    ----------
    numbers
        The arguments of the native rule.
    table, full, single
        ``[capacity, *shape]``, states of this shape, and states with a number for each row.
    rows
        int64 ``[1, listed]``, or None where there is a gradient for each row.
    gradients
        ``[listed, *shape]``.
    frozen
        bool ``[capacity]``: rows that stay.
    seed
        Given if bfloat16 is to be rounded at random.
    """
    if table.is_complex():  # as pairs of real numbers, as torch's optimizers take them
        table, gradients, *full = map(torch.view_as_real, (table, gradients, *full))
    real = torch.float32 if table.dtype in (torch.bfloat16, torch.float16) else table.dtype
    if rows is None:
        index = torch.arange(len(table), device=table.device)
        sums = gradients.to(real)
    else:
        if bool(((rows < 0) | (rows >= len(table))).any()):
            raise ValueError(f"the gradient lists a row that the table, of {len(table)} rows, does not have")
        index, places = torch.unique(rows[0], return_inverse=True)
        sums = torch.zeros((len(index), *table.shape[1:]), dtype=real, device=table.device)
        sums.index_add_(0, places, gradients.to(real))
    if frozen is not None:
        moves = ~frozen.to(index.device)[index]
        index, sums = index[moves], sums[moves]
    values = table.index_select(0, index).to(real)
    states = [state.index_select(0, index) for state in full]
    flags = [state.index_select(0, index) for state in single]
    values = _apply(numbers, values, states, flags, sums)
    if seed is not None and table.dtype == torch.bfloat16:
        values = _rounded_at_random(values, seed)
    writes: Writes = [(table.index_copy_, (0, index, values.to(table.dtype)))]
    for state, new in zip([*full, *single], [*states, *flags], strict=True):
        writes.append((state.detach().index_copy_, (0, index, new)))
    return writes


def _apply(numbers: dict[str, Any], w: Tensor, full: list[Tensor], single: list[Tensor], g: Tensor) -> Tensor:
    """Return new values; states are changed in place."""
    kind: str = numbers["kind"]
    lr: float = numbers["lr"]
    eps: float = numbers.get("eps", 0.0)
    if numbers.get("maximize"):
        g = -g
    log_decay = numbers.get("log_decay")
    if log_decay is not None:
        w = w * torch.exp(log_decay - single[-1].double()).to(w.dtype).reshape(-1, *[1] * (w.dim() - 1))
        single[-1].fill_(log_decay)
    elif numbers.get("shrink", 1.0) != 1.0:
        w = w * numbers["shrink"]
    if numbers.get("decay"):
        g = g.add(w, alpha=numbers["decay"])
    if kind == "sgd":
        if not numbers["momentum"]:
            return w - lr * g
        full[0].mul_(numbers["momentum"]).add_(g, alpha=numbers["gain"])
        return w - lr * (g.add(full[0], alpha=numbers["momentum"]) if numbers["nesterov"] else full[0])
    if kind == "adagrad":
        full[0].add_(g * g)
        return w - lr * (g / (full[0].sqrt() + eps))
    if kind == "row_wise_adagrad":
        squares = g.square().reshape(len(g), -1).mean(1) if g.numel() else g.new_zeros(len(g))
        single[0].add_(squares.reshape(single[0].shape))
        return w - (lr / (single[0].sqrt() + eps)).reshape(-1, *[1] * (g.dim() - 1)) * g
    if kind == "adam":
        return w - _adam(numbers, full, single, g, eps)
    return w - lr * _rmsprop(numbers, full, g, eps)


def _adam(numbers: dict[str, Any], full: list[Tensor], single: list[Tensor], g: Tensor, eps: float) -> Tensor:
    first, second = full[:2]
    first.add_(g - first, alpha=1 - numbers["beta1"])
    second.add_(g * g - second, alpha=1 - numbers["beta2"])
    if numbers["amsgrad"]:
        full[2].copy_(torch.maximum(full[2], second))
        second = full[2]
    if numbers["size"] is not None:
        size, scale = numbers["size"]
    else:
        single[0].add_(1)
        count = single[0].double().reshape(-1, *[1] * (g.dim() - 1))
        size = (numbers["lr"] / (1 - numbers["beta1"] ** count)).to(g.dtype)
        scale = (1 - numbers["beta2"] ** count).sqrt().to(g.dtype)
    moved: Tensor = size * (first / (second.sqrt() / scale + eps))
    return moved


def _rmsprop(numbers: dict[str, Any], full: list[Tensor], g: Tensor, eps: float) -> Tensor:
    alpha = numbers["alpha"]
    full[0].mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = full[0]
    if numbers["centered"]:
        full[1].add_(g - full[1], alpha=1 - alpha)
        variance = variance - full[1].square()
    by = g / (variance.sqrt() + eps)
    if not numbers["momentum"]:
        return by
    return full[-1].mul_(numbers["momentum"]).add_(by)


def _rounded_at_random(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = ((values.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)
