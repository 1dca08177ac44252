"""Safetensors files: one tensor after another behind a header in JSON, mapped, and written so that nothing is lost.

The format is that of https://github.com/huggingface/safetensors: 8 bytes with the size of the header, the header, and
the data without gaps.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import RowIndex, SafetensorsHeader, SafetensorsStack, map_over
from pdrs._files.atomic import Progress, WholeFile, replacing
from pdrs._torch.huge_pages import empty

__all__ = [
    "BLOCK",
    "CODES",
    "DTYPES",
    "MAX_HEADER",
    "MOST_EXPANDED",
    "NO_FILE",
    "PAGE",
    "STEP",
    "CheckpointError",
    "NewTensor",
    "TensorFile",
    "as_texts",
    "counting",
    "has_surrogate",
    "pieces_of",
    "refuse_expanded",
    "texts_of",
    "write_tensors",
]

PAGE = 4096

# What `write_tensors` copies at once, at most, of a tensor that does not lie in one piece. Up to so much is read
# without a progress bar.
BLOCK = 64 << 20

# A tensor whose elements share memory is written in full up to so many bytes.
MOST_EXPANDED = 1 << 30

# Tensors below this size are read; larger ones are mapped.
_MAPPED = 1 << 20

# What is read of a large tensor at once: enough for the disk, and little enough to be in the cache afterwards.
STEP = 8 << 20

# safetensors itself refuses headers of more than 100 MB. Half of it is for texts, at most, the rest for tensors.
MAX_HEADER = 100_000_000
_MAX_TEXTS = MAX_HEADER // 2

# How the system says that there is no file of a name, whatever the name is.
NO_FILE = (errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)

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


class CheckpointError(ValueError):
    """A file is damaged, or pdrs cannot read its format.

    Parameters
    ----------
    path
        The file.
    what
        What is wrong, and where.
    """

    # By this name users know it; pickles, too.
    __module__ = "pdrs"

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(os.fspath(path), what)
        self.path = os.fspath(path)
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class NewTensor(NamedTuple):
    """A tensor that is to be written.

    Parameters
    ----------
    name
        Any ``str`` but ``"__metadata__"``.
    dtype, shape
        What it is.
    parts
        Its bytes in C order, in any number of parts: tensors of any device and dtype, or what has the buffer protocol
        and lies in one piece. An iterator makes the next part when the one before has been written.
    """

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    parts: Iterable[Any]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> NewTensor:
        """Describe a tensor that is there."""
        return cls(name, tensor.dtype, tuple(tensor.shape), (tensor,))

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def _is_of_pdrs(key: str) -> bool:
    """Whether a key of the metadata is kept for what pdrs itself writes there."""
    return key == "pdrs" or key.startswith("pdrs.")


def texts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without what pdrs itself has written there."""
    return {key: value for key, value in metadata.items() if not _is_of_pdrs(key)}


def as_texts(metadata: Any) -> dict[str, str]:
    """Return what a user wants to have in the metadata of a file, or say why it cannot be there."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"expected metadata as a mapping from str to str, got {type(metadata).__name__}")
    texts = dict(metadata)
    for key, value in texts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            what = f"the key {key!r}" if not isinstance(key, str) else f"{type(value).__name__} at {key!r}"
            raise TypeError(f"expected metadata of str to str, got {what}: write it as text, by json.dumps for example")
        if _is_of_pdrs(key):
            raise ValueError(f"the key {key!r} of metadata is kept for pdrs: call it otherwise")
        if has_surrogate(key + value):
            raise ValueError(f"expected metadata of valid Unicode, got a surrogate at {key!r}")
    size = len(json.dumps(texts, ensure_ascii=False).encode())
    if size > _MAX_TEXTS:
        raise ValueError(
            f"expected metadata of at most {_MAX_TEXTS:,} bytes, as safetensors reads no header of more than "
            f"{MAX_HEADER:,}, got {size:,}"
        )
    return texts


# -- reading -----------------------------------------------------------------------------------------------------------


class TensorFile:
    """A safetensors file, open for reading: the header is read, checked and kept, the data are not touched.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        If the file is damaged, or no safetensors file.
    OSError
        If it cannot be opened.

    Notes
    -----
    A file may be used by several threads, and as a context manager. Tensors stay what they are when it is closed, and
    when the file is replaced by another; nobody must cut off a file that is mapped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = -1
        # What tells the file from others, while it rests.
        self._resting: tuple[int, ...] | None = None
        self.path = os.fspath(path)
        self._descriptor = _open(self.path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        try:
            length = SafetensorsHeader.size(self._read(0, min(8, self.size)), self.size)
            self.header = SafetensorsHeader(self._read(8, 8 + length), self.size)
        except ValueError as error:
            raise self.error(str(error)) from None
        self.metadata: dict[str, str] = self.header.metadata
        """The texts of the header."""

    def error(self, what: str) -> CheckpointError:
        """Return an error about this file, to be raised."""
        return CheckpointError(self.path, what)

    def close(self) -> None:
        """Close the file; tensors that were taken from it stay valid."""
        descriptor, self._descriptor, self._resting = self._descriptor, -1, None
        if descriptor >= 0:
            os.close(descriptor)

    def rest(self) -> None:
        """Close the file until something is read again: then it must be the same file still."""
        if self._descriptor >= 0:
            self._resting = _identity(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # -- what is in it -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the order of the header. **O(n)**."""
        return self.header.names()

    def names_ending(self, ending: str) -> list[str]:
        """Return those names that end so, without a ``str`` for each of the others. **O(n)**."""
        return self.header.names_ending(ending)

    def __len__(self) -> int:
        """Return the number of tensors. **O(1)**."""
        return len(self.header)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name. **O(1)**."""
        return isinstance(name, str) and self.header.entry(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        entry = self.header.entry(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def code(self, name: str) -> str:
        """Return the dtype as the file names it, such as ``"F32"``; KeyError if there is no such tensor."""
        return self._entry(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype; CheckpointError if torch has none like it."""
        return self._dtype(self.code(name))

    def _dtype(self, code: str) -> torch.dtype:
        if code not in DTYPES:
            raise self.error(f"it has tensors of the dtype {code}, which torch does not have")
        return DTYPES[code]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape; KeyError if there is no such tensor."""
        return self._entry(name)[1]

    def offsets(self, name: str) -> tuple[int, int]:
        """Return the first byte of a tensor and the one behind its last, counted from the beginning of the file."""
        return self._entry(name)[2:]

    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[np.uint32]]:
        """Return the dtypes (as the file names them) and shapes that there are, and the number of each tensor's."""
        return self.header.kinds()

    # -- the data ------------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of its own: writing to it changes neither the file nor what another call returns.

        A large one (1 MiB or more) is a private map of the file: what is not touched is not read, and not in memory.
        It has a storage of its own, so that ``torch.save`` writes no other tensor.

        Raises
        ------
        KeyError
            If there is no such tensor.
        CheckpointError
            If the file has become shorter, or torch does not have the dtype.
        """
        code, shape, start, stop = self._entry(name)
        return self.view(start, stop, self._dtype(code)).view(shape)

    def view(self, start: int, stop: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return some bytes of the file as a flat tensor of its own; see :meth:`tensor`."""
        if start == stop:
            return torch.empty(0, dtype=dtype)
        if stop - start < _MAPPED or start % dtype.itemsize:
            # Also what is not aligned, as it may be in files of others.
            return self._loaded(start, stop, dtype)
        base = start - start % mmap.ALLOCATIONGRANULARITY
        return torch.frombuffer(self._map(base, stop), dtype=dtype, offset=start - base)

    def load(self, name: str, see: Callable[[NDArray[np.uint8]], None] | None = None) -> Tensor:
        """Return a tensor that lies in memory: what happens to the file afterwards does not matter.

        It is read straight to where it will lie: to copy it out of a map would also fault at each page of the map.

        Parameters
        ----------
        name
            Of the tensor.
        see
            Is called with all bytes in order, a part at a time, while they are in the processor's cache. There is no
            progress bar then, as whoever sees the bytes can count those of more than one tensor.

        Raises
        ------
        KeyError
            If there is no such tensor.
        CheckpointError
            As for :meth:`tensor`.
        """
        code, shape, start, stop = self._entry(name)
        return self._loaded(start, stop, self._dtype(code), see).view(shape)

    def table(self, name: str, rows: int, *, loads: bool) -> Tensor:
        """Return a tensor as :meth:`tensor` or :meth:`load` do, and so many rows: zeros follow those of the file."""
        code, shape, start, stop = self._entry(name)
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
        self, start: int, stop: int, dtype: torch.dtype, see: Callable[[NDArray[np.uint8]], None] | None = None
    ) -> Tensor:
        # What the file does not have is not asked for.
        self._check_size()
        data = empty(stop - start, dtype=torch.uint8)
        if see is not None:
            for part in self._parts(start, stop, data.numpy()):
                see(part)
            return data.view(dtype)
        with counting(stop - start, self.path) as count:
            for part in self._parts(start, stop, data.numpy()):
                count(len(part))
        return data.view(dtype)

    def parts(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a tensor in order, each part in the memory of the one before."""
        _, _, start, stop = self._entry(name)
        return self._parts(start, stop, np.empty(min(stop - start, STEP), np.uint8))

    def _parts(self, start: int, stop: int, memory: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Read bytes of the file into memory that is as large, or is filled again and again, and yield them."""
        at, end = 0, stop - start
        while at < end:
            place = at % len(memory)
            part = memory[place : place + min(STEP, end - at)]
            self._read_into(part.data, start + at)
            at += len(part)
            yield part

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all, as :meth:`tensor` would; small ones share one map of the file."""
        chosen = self.names if names is None else names
        found: dict[str, Tensor] = {}
        shared: mmap.mmap | None = None
        for name in chosen:
            code, shape, start, stop = self._entry(name)
            dtype = self._dtype(code)
            if start == stop or start % dtype.itemsize:
                found[name] = self.view(start, stop, dtype).view(shape)
                continue
            if shared is None:
                shared = self._map(0, self.size)
            found[name] = torch.frombuffer(shared, dtype=dtype, offset=start, count=prod(shape)).view(shape)
        return found

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables, one for each dtype and shape. **O(n)**, without a tensor for each name.

        Parameters
        ----------
        prefix
            Takes those tensors only whose names begin so, and leaves it out of the names.
        loads
            Whether to read all into memory, and map nothing.

        Returns
        -------
        index
            The names in the order of the header, and the table and the row of each.
        tables
            Where the tensors of one kind lie together in the file, in any order, a private map of it; else a copy.

        Raises
        ------
        CheckpointError
            As for :meth:`tensor`.
        """
        stack, tables = self.stack(prefix, loads=loads)
        return RowIndex.of_ids(stack.index(), list(map(len, tables))), tables

    def stack(self, prefix: str = "", *, loads: bool = False) -> tuple[SafetensorsStack, list[Tensor]]:
        """Return what :meth:`stacked` does, before names are made."""
        stack = self.header.stack(prefix)
        tables, targets = [], []
        for code, shape, count, start in stack.tables():
            dtype, size = self._dtype(code), (count, *shape)
            if start is None:
                table = empty(size, dtype=dtype)
                targets.append(table.reshape(-1).view(torch.uint8).numpy())
            else:
                take = self._loaded if loads else self.view
                table = take(start, start + prod(size) * dtype.itemsize, dtype).view(size)
                targets.append(np.empty(0, np.uint8))
            tables.append(table)
        for start, stop in stack.spans(PAGE):
            for first in range(start, stop, BLOCK):
                block = np.frombuffer(self._read(first, min(first + BLOCK, stop)), np.uint8)
                stack.copy_block(block, first, targets)
        return stack, tables

    def _map(self, start: int, stop: int) -> mmap.mmap:
        self._check_size()
        try:
            return mmap.mmap(self._open(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"cannot map {stop - start} bytes of {self.path}") from error
            raise

    def _read(self, start: int, stop: int) -> bytes:
        # The system reads less than 2 GiB at once.
        parts = []
        while start < stop:
            parts.append(os.pread(self._open(), stop - start, start))
            self._check_read(len(parts[-1]), start)
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_into(self, data: memoryview, start: int) -> None:
        while data:
            count = os.preadv(self._open(), [data], start)
            self._check_read(count, start)
            data, start = data[count:], start + count

    def _check_read(self, count: int, start: int) -> None:
        if count == 0:
            self._check_size()
            raise self.error(f"the file ends at byte {start}")

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
            raise self.error(f"the file has been cut off: it had {self.size} bytes and has {size}")


def _open(path: str | os.PathLike[str]) -> int:
    # Read-only, and not inherited by other programs.
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# -- writing -----------------------------------------------------------------------------------------------------------


def write_tensors(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    tensors: Iterable[NewTensor | tuple[str, torch.dtype, Sequence[int], Iterable[Any]]],
    *,
    finish: Callable[[], Mapping[str, str]] | None = None,
    sync: bool = True,
) -> int:
    """Write a safetensors file in the place of another, if there is one: wholly or, if anything fails, not at all.

    Parameters
    ----------
    path
        The file. A symbolic link stays one; see :func:`pdrs._files.atomic.replacing`.
    metadata
        Texts that the header is to have.
    tensors
        What is to be written; see :class:`NewTensor`. The header has them in this order. Their data come in the order
        of decreasing element sizes, so that each begins at a multiple of its element size.
    finish
        Is called when all data have been written. What it returns replaces values in ``metadata``, which must be of the
        same length: checksums, for example, that are computed while the parts are made.
    sync
        Whether to wait until the file is on the disk.

    Returns
    -------
    int
        The size of the file.

    Raises
    ------
    ValueError
        If a name is given twice or UTF-8 cannot write it, or the parts of a tensor have more or fewer bytes than its
        shape says.
    TypeError
        If safetensors has no such dtype.
    OSError
        If the file cannot be written. After any error the old file is as it was.

    Notes
    -----
    Extra memory: the header, and 64 MB for a part that does not lie in one piece, or lies on a device.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> from pdrs._files.safetensors_file import NewTensor, TensorFile, write_tensors
    >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> halves = (torch.full((2, 4), float(n)) for n in range(2))
    >>> write_tensors(path, {"format": "pt"}, [("x", torch.float32, (4, 4), halves)])
    4160
    >>> TensorFile(path).tensor("x")[:, 0].tolist()
    [0.0, 0.0, 1.0, 1.0]

    """
    new = [NewTensor(*one) for one in tensors]
    fields, starts, size = dict(metadata), _starts(new), sum(tensor.nbytes for tensor in new)
    header = _header(fields, new, starts)
    with replacing(path, len(header) + size, sync=sync) as file:
        file.write(header)
        for start, tensor in sorted(zip(starts, new, strict=True), key=lambda one: one[0]):
            _write_parts(file, tensor, len(header) + start + tensor.nbytes)
        if finish is not None:
            fields.update(finish())
            again = _header(fields, new, starts)
            if len(again) != len(header):
                raise ValueError("the metadata at the end need more bytes than those at the beginning")
            file.rewrite(again, 0)
    return len(header) + size


def _starts(tensors: Sequence[NewTensor]) -> list[int]:
    """Return where the data of each tensor begin: those of wide elements first, so that all are aligned."""
    starts, end = [0] * len(tensors), 0
    for at in sorted(range(len(tensors)), key=lambda at: -tensors[at].dtype.itemsize):
        starts[at] = end
        end += tensors[at].nbytes
    return starts


def _header(metadata: Mapping[str, str], tensors: Sequence[NewTensor], starts: Sequence[int]) -> bytes:
    """Return the header after its size, padded with spaces to whole pages."""
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for tensor, start in zip(tensors, starts, strict=True):
        if tensor.dtype not in CODES:
            raise TypeError(f"safetensors has no dtype like {tensor.dtype}, of which {tensor.name!r} is")
        if tensor.name in fields or tensor.name == "__metadata__":
            raise ValueError(f"two tensors have the name {tensor.name!r}, or it is kept for metadata")
        offsets = [start, start + tensor.nbytes]
        fields[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        name = next(filter(has_surrogate, chain(fields, *metadata.items())))
        raise ValueError(f"expected keys of valid Unicode, got {name!r}, which has a surrogate") from error
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def has_surrogate(text: str) -> bool:
    """Whether UTF-8 cannot write a text."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _write_parts(file: WholeFile, tensor: NewTensor, end: int) -> None:
    for part in tensor.parts:
        for piece in pieces_of(part) if isinstance(part, Tensor) else (part,):
            if memoryview(piece).nbytes > end - file.position:
                raise ValueError(f"the parts of {tensor.name!r} have more than its {tensor.nbytes} bytes")
            file.write(piece)
    if file.position != end:
        missing = end - file.position
        raise ValueError(f"the parts of {tensor.name!r} have {missing} bytes less than its {tensor.nbytes}")


@contextmanager
def counting(total: int, path: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of bytes of a file as they are read, for a progress bar if there are many."""
    if total <= BLOCK:
        yield lambda _: None
        return
    progress = Progress(total, os.path.basename(path))
    try:
        yield progress.add
    finally:
        progress.close()


def refuse_expanded(name: str, tensor: Tensor) -> None:
    """Raise a ValueError for a tensor that would take far more bytes in a file than it does in memory."""
    if tensor.nbytes > MOST_EXPANDED and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"'{name}' is expanded from {tensor.untyped_storage().nbytes():,} to {tensor.nbytes:,} bytes, and the file "
            "would hold them all: save what it was expanded from, or the module with torch.save"
        )


def pieces_of(tensor: Tensor) -> Iterator[Any]:
    """Yield the bytes of a tensor in C order: in one piece where they lie so in memory, else copied in blocks."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    there = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    size = tensor.numel() * tensor.element_size()
    if there or size <= BLOCK:
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
        return
    rows = max(1, BLOCK * len(tensor) // size)
    for part in torch.split(tensor, rows) if len(tensor) > 1 else tensor:
        yield from pieces_of(part)
