"""Tensors of many kinds, and their groups, for the tests of what moves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from pdrs._core import TensorGroup, group_tensors

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))  # Its version.

# What DLPack can name; the rest is quantized, or has elements of less than a byte.
SUPPORTED = {
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
}


def group_of(tensors: list[Any], **options: Any) -> TensorGroup:
    """Group tensors that are all of one dtype and device."""
    (group,), unusual = group_tensors(tensors, **options)
    assert unusual == []
    return group


def gathered(group: TensorGroup) -> torch.Tensor:
    slab = torch.empty(group.length, dtype=group.dtype)
    group.gather(slab)
    return slab


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def zeros_on(device: str, size: int) -> torch.Tensor:
    """Give zeros that a copy from page-locked memory writes on the current stream.

    ``torch.zeros`` itself runs a kernel in torch before 2.15, and the simulated CUDA runtime runs none.
    """
    return torch.empty(size, device=device).copy_(torch.zeros(size, pin_memory=True), non_blocking=True)


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    """Give a float32 tensor of any shape and strides."""
    base = torch.arange(4**4, dtype=torch.float32)
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 4, 5, 12, 16, 20])) for _ in shape]
    kind = draw(st.sampled_from(["permuted", "sliced", "any"]))
    if kind == "any":
        while sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size) >= len(base):
            strides = [stride // 2 for stride in strides]
        return base.as_strided(shape, strides)
    tensor = base[: int(np.prod(shape))].view(shape).permute(draw(st.permutations(range(len(shape)))))
    return tensor[tuple(slice(None, None, draw(st.integers(1, 3))) for _ in shape)] if kind == "sliced" else tensor
