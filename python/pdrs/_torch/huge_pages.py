"""Large tensors on the CPU lie on huge pages: a page fault for each 2 MiB, and not for each 4 KiB."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdrs._core import use_huge_pages

__all__ = ["empty", "full", "full_like"]


def empty(shape: int | Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor with whatever is there, on huge pages if it is large and lies on the CPU of a Linux machine.

    To fill it takes a page fault for each 2 MiB then, and not for each 4 KiB.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # torch fills it in its deterministic mode: then it has its pages already.
    use_huge_pages(tensor)
    return tensor


def full(shape: int | Sequence[int], fill: float, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor full of a number, in memory as that of :func:`empty`."""
    return empty(shape, dtype=dtype, device=device).fill_(fill)


def full_like(tensor: Tensor, rows: int, fill: complex | None) -> Tensor:
    """Return what holds so many rows like those of a tensor, full of a number, or with whatever is there."""
    made = tensor.new_empty((rows, *tensor.shape[1:]))
    use_huge_pages(made)
    return made if fill is None else made.fill_(fill)
