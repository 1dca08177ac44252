"""Reads safetensors files: the header at once, the data when they are needed, as memory maps if possible.

The format is that of https://github.com/huggingface/safetensors: 8 bytes with the size of the header, the header as
JSON, and the data without gaps.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import RowIndex, SafetensorsHeader, SafetensorsStack, map_over
from pdrs._files.checkpoint_file import STEP, CheckpointFile, short_name
from pdrs._files.progress import progress
from pdrs._torch.huge_pages import empty

__all__ = ["CODES", "DTYPES", "PAGE", "SafetensorsFile"]

PAGE = 4096

# Smaller tensors are read, larger ones are mapped.
_MAPPED = 1 << 20

# The bytes that are read at once of rows that are copied into tables.
_BLOCK = 64 << 20

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFile(CheckpointFile):
    """An open safetensors file. The header is checked; the data are not read yet.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        If the header is damaged.
    OSError
        If the file cannot be opened.
    """

    format = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = -1
        # Identifies the file while it is closed by `rest`.
        self._resting: tuple[int, ...] | None = None
        self.path = os.fspath(path)
        self._descriptor = _open(self.path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            length = SafetensorsHeader.size(self._read(0, min(8, self.size)).tobytes(), self.size)
            self.header = SafetensorsHeader(self._read(8, 8 + length), self.size)
        except ValueError as error:
            self.close()
            raise self.error(str(error)) from None
        except BaseException:
            self.close()
            raise
        self.metadata = self.header.metadata

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor, self._resting = self._descriptor, -1, None
        if descriptor >= 0:
            os.close(descriptor)

    def rest(self) -> None:
        """Close the file until something is read. Then it must still be the same file."""
        if self._descriptor >= 0:
            identity = _identity(self._descriptor)
            self.close()
            self._resting = identity

    def __del__(self) -> None:
        self.close()

    # -- what is in it -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the order of the header. **O(n)**."""
        return self.header.names()

    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending, without a ``str`` for each of the others. **O(n)**."""
        return self.header.names_ending(ending)

    def __len__(self) -> int:
        return len(self.header)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.header.entry(name) is not None

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        entry = self.header.entry(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def code(self, name: str) -> str:
        """Return the dtype as the file names it, such as ``"F32"``; KeyError if there is no such tensor."""
        return self._entry(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; CheckpointError if torch does not have it."""
        return self._dtype(self.code(name))

    def _dtype(self, code: str) -> torch.dtype:
        if code not in DTYPES:
            raise self.error(f"it has tensors of the dtype {code}, which torch does not have")
        return DTYPES[code]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return self._entry(name)[1]

    def offsets(self, name: str) -> tuple[int, int]:
        """Return the first byte of a tensor in the file, and its end."""
        return self._entry(name)[2:]

    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the distinct pairs of dtype and shape, and the number of each tensor's, in order."""
        return in_words(self.header.kinds())

    # -- the data ------------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """Return a tensor with a storage of its own: a copy-on-write memory map, if it has 1 MiB or more.

        Raises
        ------
        KeyError
            If there is no such tensor.
        CheckpointError
            If the file has been truncated, or torch does not have the dtype.
        """
        code, shape, start, stop = self._entry(name)
        return self._mapped(start, stop, self._dtype(code)).view(shape)

    def _mapped(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if stop - start < _MAPPED or start % dtype.itemsize:
            # Other tools may write tensors that are not aligned.
            return self._loaded(start, stop, dtype)
        base = start - start % mmap.ALLOCATIONGRANULARITY
        return torch.frombuffer(self._map(base, stop), dtype=dtype, offset=start - base)

    def load(self, name: str, see: Callable[[NDArray[np.uint8]], object] | None = None) -> Tensor:
        """Return a tensor in memory, which does not change with the file.

        It is read straight into its memory. Copying it out of a map would also fault at each page of the map.

        Parameters
        ----------
        name
            Of the tensor.
        see
            Is called with all bytes in order, a part at a time. Without it, there is a progress bar.

        Raises
        ------
        KeyError
            If there is no such tensor.
        CheckpointError
            As for :meth:`tensor`.
        """
        code, shape, start, stop = self._entry(name)
        return self._loaded(start, stop, self._dtype(code), see).view(shape)

    def table(self, name: str, *, loads: bool, rows: int | None = None) -> Tensor:
        """Return a tensor, mapped or loaded. It has ``rows`` rows, if given: zeros follow those of the file."""
        code, shape, start, stop = self._entry(name)
        if rows is None:
            return self.load(name) if loads else self.tensor(name)
        size, dtype = (rows, *shape[1:]), self._dtype(code)
        before = start % mmap.ALLOCATIONGRANULARITY
        nbytes = prod(size) * dtype.itemsize
        self._check_size()
        if loads or stop - start < _MAPPED or start % dtype.itemsize or not hasattr(mmap, "MAP_ANONYMOUS"):
            data = empty(nbytes, dtype=torch.uint8)
            for _ in self._parts(start, stop, data.numpy()[: stop - start]):
                pass
            data[stop - start :] = 0
            return data.view(dtype).view(size)
        room = mmap.mmap(-1, before + nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        map_over(room, self._open(), start - before, before + stop - start)
        return torch.frombuffer(room, dtype=dtype, offset=before).view(size)

    def _loaded(
        self, start: int, stop: int, dtype: torch.dtype, see: Callable[[NDArray[np.uint8]], object] | None = None
    ) -> Tensor:
        # Before memory is allocated for what the file does not have.
        self._check_size()
        data = empty(stop - start, dtype=torch.uint8)
        if see is not None:
            for part in self._parts(start, stop, data.numpy()):
                see(part)
            return data.view(dtype)
        with progress(stop - start, self.path) as count:
            for part in self._parts(start, stop, data.numpy()):
                count(len(part))
        return data.view(dtype)

    def parts(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a tensor in order. Each part overwrites the one before."""
        _, _, start, stop = self._entry(name)
        return self._parts(start, stop, np.empty(min(stop - start, STEP), np.uint8))

    def _parts(self, start: int, stop: int, memory: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Read bytes into memory that is as large, or is filled again and again, and yield them."""
        at, end = 0, stop - start
        while at < end:
            place = at % len(memory)
            part = memory[place : place + min(STEP, end - at)]
            self.read_into(part, start + at)
            at += len(part)
            yield part

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all, which share one map of the file."""
        found: dict[str, Tensor] = {}
        shared: mmap.mmap | None = None
        for name in self.names if names is None else names:
            code, shape, start, stop = self._entry(name)
            dtype = self._dtype(code)
            if start == stop or start % dtype.itemsize:
                found[name] = self._loaded(start, stop, dtype).view(shape)
                continue
            if shared is None:
                shared = self._map(0, self.size)
            found[name] = torch.frombuffer(shared, dtype=dtype, offset=start, count=prod(shape)).view(shape)
        return found

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables, without a tensor for each name. **O(n)**."""
        stack, tables = self.stack(prefix, loads=loads)
        index = stack.index()
        self.refuse_empty(index)
        return RowIndex.of_ids(index, list(map(len, tables))), tables

    def stack(self, prefix: str, *, loads: bool) -> tuple[SafetensorsStack, list[Tensor]]:
        """Do what :meth:`stacked` does, before names are made."""
        stack = self.header.stack(prefix)
        tables, targets = [], []
        for code, shape, count, start in stack.tables():
            dtype, size = self._dtype(code), (count, *shape)
            if start is None:
                table = empty(size, dtype=dtype)
                targets.append(table.reshape(-1).view(torch.uint8).numpy())
            else:
                take = self._loaded if loads else self._mapped
                table = take(start, start + prod(size) * dtype.itemsize, dtype).view(size)
                targets.append(np.empty(0, np.uint8))
            tables.append(table)
        for start, stop in stack.spans(PAGE):
            for first in range(start, stop, _BLOCK):
                stack.copy_block(self._read(first, min(first + _BLOCK, stop)), first, targets)
        return stack, tables

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Return false: the format has no checksums."""
        return False

    # -- the file ------------------------------------------------------------------------------------------------------

    def _map(self, start: int, stop: int) -> mmap.mmap:
        self._check_size()
        try:
            return mmap.mmap(self._open(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"cannot map {stop - start} bytes of {self.path}") from error
            raise

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.empty(stop - start, np.uint8)
        self.read_into(data, start)
        return data

    def read_into(self, data: NDArray[np.uint8], start: int) -> None:
        """Fill memory with the bytes of the file from one on; CheckpointError if it ends before."""
        # The system reads less than 2 GiB at once.
        while len(data):
            count = os.preadv(self._open(), [data.data], start)
            if count == 0:
                self._check_size()
                raise self.error(f"the file ends at byte {start}")
            data, start = data[count:], start + count

    def _open(self) -> int:
        if self._resting is not None:
            descriptor = _open(self.path)
            if _identity(descriptor) != self._resting:
                os.close(descriptor)
                raise self.error("the file has been replaced while it was read")
            self._descriptor, self._resting = descriptor, None
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: the file has been closed")
        return self._descriptor

    def _check_size(self) -> None:
        size = os.fstat(self._open()).st_size
        if size < self.size:
            raise self.error(f"the file has been truncated: it had {self.size} bytes and has {size}")


def in_words(
    kinds: tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]],
) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
    """Return the dtypes of headers by torch's names, or by those of the format if torch does not have them."""
    named = [(short_name(DTYPES[code]) if code in DTYPES else code, shape) for code, shape in kinds[0]]
    return named, kinds[1]


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
