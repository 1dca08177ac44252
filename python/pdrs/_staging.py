"""Copies between pageable host memory and a CUDA device, through page-locked blocks and a stream of their own.

A copy from pageable memory keeps the host waiting, and one copy an entry keeps the device waiting. So entries are
gathered into a block of page-locked memory, which the device fetches on a side stream while the next block is filled:

    host          | gather 0 | gather 1 | gather 2 | wait for 0, gather 3 | ...
    side stream              | copy 0   | copy 1   | copy 2               | copy 3 | ...
    current stream  work ...                                                       | waits, then work ...

Three guards keep that right, and a test removes each to see that it is needed: an *event* a block says when it may be
filled again; the side stream *waits* for the current one before it touches the device's memory, and the current one for
the side stream before it goes on; and `record_stream` tells torch's allocator that the side stream uses the memory, so
that it is not handed out again too early, whatever becomes of the tensor.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pdrs._core import TensorGroup

__all__ = ["download", "download_later", "refuse_capture", "set_staging", "upload"]

# Offsets in a slab are multiples of this many bytes, and so are the edges of blocks.
_ALIGNMENT = 64
_DEFAULT_BLOCK_BYTES = 8 << 20
_DEFAULT_BLOCKS = 3


@dataclass
class _Block:
    """Page-locked memory, and the event behind the last copy that used it."""

    memory: Tensor
    event: torch.cuda.Event

    def wait(self) -> None:
        """Wait until the last copy has read, or written, the memory."""
        self.event.synchronize()

    def part(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the beginning of the memory as a flat tensor."""
        return self.memory[: length * dtype.itemsize].view(dtype)


class _StagingBlocks:
    """Page-locked blocks that transfers borrow and give back.

    They come from torch's allocator of page-locked memory, which gives powers of two. Several threads may transfer at
    once: each borrows blocks of its own, and what is more than ``count`` in the end goes back to torch.
    """

    def __init__(self, block_bytes: int = _DEFAULT_BLOCK_BYTES, count: int = _DEFAULT_BLOCKS) -> None:
        if block_bytes < _ALIGNMENT or block_bytes % _ALIGNMENT:
            raise ValueError(f"block_bytes must be a multiple of {_ALIGNMENT} from {_ALIGNMENT} on, got {block_bytes}")
        if count < 1:
            raise ValueError(f"blocks must be 1 or more, got {count}")
        self.block_bytes = block_bytes
        self.count = count
        self._idle: list[_Block] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[list[_Block]]:
        """Lend as many blocks as a transfer of so many bytes can use."""
        wanted = max(1, min(self.count, -(-nbytes // self.block_bytes)))
        with self._lock:
            blocks = [self._idle.pop() for _ in range(min(wanted, len(self._idle)))]
        try:
            while len(blocks) < wanted:
                memory = torch.empty(self.block_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
                blocks.append(_Block(memory, torch.cuda.Event()))  # type: ignore[no-untyped-call]
            yield blocks
        finally:
            with self._lock:
                self._idle += blocks[: max(0, self.count - len(self._idle))]


_staging = _StagingBlocks()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_side_streams_lock = threading.Lock()


def set_staging(*, block_bytes: int = _DEFAULT_BLOCK_BYTES, blocks: int = _DEFAULT_BLOCKS) -> None:
    """Choose the page-locked memory that transfers between host and CUDA devices go through.

    Parameters
    ----------
    block_bytes
        The size of a block in bytes: a multiple of 64, best a power of two, because torch rounds up to one.
    blocks
        How many blocks take turns in a transfer: with one, gathering and copying do not overlap.

    Raises
    ------
    ValueError
        If a number is out of range; then nothing has changed.

    Examples
    --------
    >>> import pdrs
    >>> pdrs.set_staging(block_bytes=32 << 20, blocks=2)
    >>> pdrs.set_staging()  # what it was

    """
    global _staging
    _staging = _StagingBlocks(block_bytes, blocks)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that carries the copies from and to a device, one for all threads."""
    with _side_streams_lock:
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return _side_streams[device]


def refuse_capture() -> None:
    """Raise if the current stream is being captured: a graph would replay copies from blocks that hold other data."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected a move outside of the capture of a CUDA graph, got one inside: move the module before "
            "torch.cuda.graph(...)"
        )


def upload(group: TensorGroup, slab: Tensor, *, wait: bool) -> None:
    """Copy tensors from the host into a slab on a device; dtypes are converted on the host, as torch does.

    Parameters
    ----------
    group
        Tensors on the CPU.
    slab
        Flat, on a CUDA device, allocated on its current stream; what is queued there later finds the data complete.
    wait
        Whether to return only when the data is there. In any case the tensors may change or die after the return.
    """
    current, side = torch.cuda.current_stream(slab.device), side_stream(slab.device)
    staging = _staging
    last = None
    side.wait_stream(current)
    slab.record_stream(side)
    source = group.slab() if wait and slab.dtype == group.dtype else None
    if source is not None and source.is_pinned():
        with torch.cuda.stream(side):
            slab.copy_(source[: len(slab)], non_blocking=True)
        current.wait_stream(side)
        side.synchronize()
        return
    with staging.borrow(group.length * slab.dtype.itemsize) as blocks:
        for turn, (start, stop) in enumerate(_cuts(group, staging.block_bytes, slab.dtype)):
            last = blocks[turn % len(blocks)]
            last.wait()
            part = last.part(stop - start, slab.dtype)
            _gather(group, part, start)
            with torch.cuda.stream(side):
                slab[start:stop].copy_(part, non_blocking=True)
                last.event.record()
        current.wait_stream(side)
        if wait and last is not None:
            last.wait()


def download(group: TensorGroup, source: Tensor, slab: Tensor) -> None:
    """Copy a slab on a device into one on the host; dtypes are converted on the host. Returns finished data.

    Parameters
    ----------
    group
        Tensors that lie in ``source``.
    source, slab
        Flat, on a CUDA device and on the CPU.
    """
    current, side = torch.cuda.current_stream(source.device), side_stream(source.device)
    staging = _staging
    under_way: deque[tuple[_Block, Tensor, Tensor]] = deque()
    side.wait_stream(current)
    with staging.borrow(group.length * source.dtype.itemsize) as blocks:
        for turn, (start, stop) in enumerate(_cuts(group, staging.block_bytes, source.dtype)):
            if len(under_way) == len(blocks):
                _land(under_way)
            block = blocks[turn % len(blocks)]
            # What another transfer left under way in this block.
            block.wait()
            part = block.part(stop - start, source.dtype)
            with torch.cuda.stream(side):
                part.copy_(source[start:stop], non_blocking=True)
                block.event.record()
            under_way.append((block, part, slab[start:stop]))
        while under_way:
            _land(under_way)


def download_loose(tensors: list[Tensor], offsets: list[int], slab: Tensor) -> None:
    """Copy contiguous tensors on a device, wherever they lie there, to their places in a slab on the host.

    It queues a copy for each, but waits only for a block of them. Returns finished data.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    current, side = torch.cuda.current_stream(device), side_stream(device)
    staging = _staging
    room = staging.block_bytes // dtype.itemsize
    under_way: deque[tuple[_Block, Tensor, Tensor]] = deque()
    side.wait_stream(current)
    with staging.borrow(len(slab) * dtype.itemsize) as blocks:
        turn, at = 0, 0
        while at < len(tensors):
            if len(under_way) == len(blocks):
                _land(under_way)
            block, start, stop = blocks[turn % len(blocks)], offsets[at], offsets[at]
            block.wait()
            with torch.cuda.stream(side):
                while at < len(tensors) and offsets[at] + tensors[at].numel() <= start + room:
                    flat = tensors[at].detach().view(-1)
                    stop = offsets[at] + len(flat)
                    block.part(room, dtype)[offsets[at] - start : stop - start].copy_(flat, non_blocking=True)
                    at += 1
                block.event.record()
            under_way.append((block, block.part(stop - start, dtype), slab[start:stop]))
            turn += 1
            if at < len(tensors) and tensors[at].numel() > room:
                # Larger than a block: the driver cuts it better than we could.
                flat = tensors[at].detach().view(-1)
                slab[offsets[at] : offsets[at] + len(flat)].copy_(flat)
                at += 1
        while under_way:
            _land(under_way)


def download_later(source: Tensor, slab: Tensor) -> None:
    """Queue the copy of a slab on a device into one in page-locked memory, and return before it ends.

    The source may change or die after the return; the copy is complete once its current stream has been waited for.
    """
    current, side = torch.cuda.current_stream(source.device), side_stream(source.device)
    side.wait_stream(current)
    source.record_stream(side)
    with torch.cuda.stream(side):
        slab.copy_(source, non_blocking=True)
    current.wait_stream(side)


def _land(under_way: deque[tuple[_Block, Tensor, Tensor]]) -> None:
    """Wait for the oldest copy that is under way, and bring its data to the slab."""
    block, part, target = under_way.popleft()
    block.wait()
    target.copy_(part)


def _cuts(group: TensorGroup, block_bytes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Cut a slab of some dtype into parts that fit into a block, as ranges of elements."""
    nbytes = block_bytes * group.dtype.itemsize // max(dtype.itemsize, group.dtype.itemsize)
    for start, stop, _ in group.blocks(max(_ALIGNMENT, nbytes - nbytes % _ALIGNMENT)):
        yield start, stop


def _gather(group: TensorGroup, part: Tensor, start: int) -> None:
    if part.dtype == group.dtype:
        group.gather(part, start)
    else:
        gathered = torch.empty(len(part), dtype=group.dtype, device="cpu")
        group.gather(gathered, start)
        part.copy_(gathered)
