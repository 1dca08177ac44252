"""Memory for large tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdrs._core import use_huge_pages

__all__ = ["empty"]


def empty(shape: int | Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor with whatever is there, on huge pages if it is large and lies on the CPU of a Linux machine.

    To fill it takes less than half of the time then: fresh memory costs a page fault for each page.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # torch fills it in its deterministic mode: then it has its pages already.
    use_huge_pages(tensor)
    return tensor
