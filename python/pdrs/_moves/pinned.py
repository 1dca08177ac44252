"""Page-locked memory of exactly the size that is asked for.

torch's own allocator of page-locked memory rounds up to powers of two: a container of 5 GB would take 8. So the memory
is mapped here, and registered with CUDA until it is freed.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

__all__ = ["pinned_empty"]


def pinned_empty(length: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor in page-locked memory, with whatever is there.

    Raises
    ------
    RuntimeError
        If CUDA cannot lock so much memory.
    """
    if length == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(_Registered(length * dtype.itemsize), dtype=dtype, count=length)


class _Registered(mmap.mmap):
    """Anonymous memory that is page-locked until it is freed: the tensor over it keeps it alive."""

    _address: int | None = None
    _process: int

    def __new__(cls, nbytes: int) -> _Registered:
        # Private to this process: by default a forked child would write into its parent's Parameters.
        self = super().__new__(cls, -1, nbytes, access=mmap.ACCESS_COPY)
        address = torch.frombuffer(self, dtype=torch.uint8, count=1).data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # type: ignore[no-untyped-call]
        if int(code) != 0:
            raise RuntimeError(f"expected CUDA to page-lock {nbytes:,} bytes, got {code}")
        self._address, self._process = address, os.getpid()
        return self

    def __del__(self) -> None:
        # A forked child has the memory, but not the registration.
        if self._address is None or self._process != os.getpid():
            return
        # A copy that is under way may still read or write it.
        for device in range(torch.cuda.device_count()):
            if torch._C._cuda_hasPrimaryContext(device):  # To wait for a device that is not in use would set it up.
                torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
