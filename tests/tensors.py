"""Tensors of many kinds, and how they lie in memory, for the tests of what moves and copies them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

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


def of_bytes(count: int, dtype: torch.dtype) -> Tensor:
    """Give so many elements of a dtype, whose bits are all different."""
    raw = (torch.arange(count * dtype.itemsize) * 7 % 251).to(torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def blocks(tensors: Collection[Tensor]) -> int:
    """Count the blocks in which dense tensors lie, one behind another, each of a multiple of 64 bytes.

    In a block there is nothing between such tensors. What is allocated by itself has a header before it.
    """
    assert all(tensor.nbytes % 64 == 0 for tensor in tensors)
    begins = {tensor.data_ptr() for tensor in tensors}
    return len(begins - {tensor.data_ptr() + tensor.nbytes for tensor in tensors})


def zeros_on(device: str, size: int) -> torch.Tensor:
    """Give zeros that a copy from page-locked memory writes on the current stream.

    ``torch.zeros`` itself runs a kernel in torch before 2.15, and the simulated CUDA runtime runs none.
    """
    return torch.empty(size, device=device).copy_(torch.zeros(size, pin_memory=True), non_blocking=True)


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
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
