"""Writes safetensors files with atomic renames, a block of bytes at a time.

The format allows no gaps. So tensors with wide elements come first in the data, which aligns all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pdrs._core import group_tensors
from pdrs._files.atomic import replacing
from pdrs._files.checkpoint_file import is_reserved
from pdrs._files.safetensors_file import CODES, PAGE
from pdrs._moves.staging import download
from pdrs._rows.names_codec import bytes_of
from pdrs._rows.write import rows_in, stack

__all__ = [
    "BLOCK",
    "MAX_HEADER",
    "MOST_EXPANDED",
    "Blocks",
    "NewTensor",
    "as_texts",
    "blocks_of",
    "has_surrogate",
    "json_bytes",
    "on_host",
    "refuse_dtype",
    "refuse_expanded",
    "refuse_unusual",
    "write_tensors",
]

# The bytes that are copied at once from tensors that are not contiguous on the CPU.
BLOCK = 64 << 20

# A tensor whose elements share memory is written in full up to this many bytes.
MOST_EXPANDED = 1 << 30

# safetensors itself refuses headers of more than 100 MB. At most half of it is for texts.
MAX_HEADER = 100_000_000
_MAX_TEXTS = MAX_HEADER // 2

# Yields the bytes of a tensor in C order, a block at a time. It may be called again. A block may be overwritten when
# the next one is asked for.
Blocks = Callable[[], Iterator[NDArray[np.uint8]]]


class NewTensor(NamedTuple):
    """A tensor to be written: its description, and its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Blocks

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> NewTensor:
        """Describe a tensor that exists."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: blocks_of(tensor))

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: str | os.PathLike[str],
    metadata: Callable[[], Mapping[str, str]],
    tensors: Sequence[NewTensor],
    *,
    sync: bool = True,
) -> int:
    """Write a safetensors file atomically; return its size.

    Parameters
    ----------
    path
        The file. See :func:`pdrs._files.atomic.replacing`.
    metadata
        Gives the texts of the header. It is called before the data are written, and again after it: then their lengths
        must be the same. So they may have checksums, which are computed while the data are written.
    tensors
        In the order of the header.
    sync
        Whether to wait until the file is on the disk.

    Raises
    ------
    ValueError
        If a name is given twice, or UTF-8 cannot represent it.
    TypeError
        If safetensors does not have a dtype.
    OSError
        If the file cannot be written. After any error the old file is unchanged.
    """
    order = sorted(range(len(tensors)), key=lambda at: -tensors[at].dtype.itemsize)
    starts, size = [0] * len(tensors), 0
    for at in order:
        starts[at] = size
        size += tensors[at].nbytes
    header = _header(metadata(), tensors, starts)
    with replacing(path, len(header) + size, sync=sync) as file:
        file.write(header)
        for at in order:
            for block in tensors[at].blocks():
                file.write(block)
            if file.position != len(header) + starts[at] + tensors[at].nbytes:
                raise RuntimeError(f"the size of '{tensors[at].name}' was changed while it was saved")
        again = _header(metadata(), tensors, starts)
        assert len(again) == len(header)
        file.write_again(again)
    return len(header) + size


def _header(metadata: Mapping[str, str], tensors: Sequence[NewTensor], starts: Sequence[int]) -> bytes:
    """Return the header after its size, padded with spaces to whole pages."""
    fields: dict[str, Any] = {"__metadata__": metadata}
    for tensor, start in zip(tensors, starts, strict=True):
        refuse_dtype(tensor.name, tensor.dtype)
        if tensor.name in fields:
            raise ValueError(f"two tensors have the name {tensor.name!r}, or it is that of the metadata")
        offsets = [start, start + tensor.nbytes]
        fields[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json_bytes(fields)
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8, without spaces; ValueError if a name cannot be represented."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected names of valid Unicode, got {next(filter(has_surrogate, value), '')!r}, which has a surrogate"
        ) from error


def has_surrogate(text: str) -> bool:
    """Whether UTF-8 cannot represent a text."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def as_texts(metadata: Any) -> dict[str, str]:
    """Return a user's metadata as a dict, or raise the error that says why they cannot be in a file."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"expected metadata as a mapping from str to str, got {type(metadata).__name__}")
    texts = dict(metadata)
    for key, value in texts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            what = f"the key {key!r}" if not isinstance(key, str) else f"{type(value).__name__} at {key!r}"
            raise TypeError(f"expected metadata of str to str, got {what}: write it as text, by json.dumps for example")
        if is_reserved(key):
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


# -- the bytes of tensors ----------------------------------------------------------------------------------------------


def blocks_of(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in C order, in blocks. Contiguous memory on the CPU is not copied."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    is_copied = tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
    if is_copied and tensor.nbytes > BLOCK:
        rows = max(1, BLOCK * len(tensor) // tensor.nbytes)
        for part in torch.split(tensor, rows) if len(tensor) > 1 else tensor:
            yield from blocks_of(part)
        return
    data = bytes_of(tensor if tensor.device.type != "cuda" else on_host([tensor]))
    for start in range(0, len(data), BLOCK):
        yield data[start : start + BLOCK]


def on_host(values: list[Tensor]) -> Tensor:
    """Return tensors of one dtype, shape and device on the CPU, ``[len(values), *shape]``.

    From a CUDA device they come through page-locked memory.
    """
    if values[0].device.type != "cuda":
        return stack(values, values[0].detach()[None]).cpu()
    groups, unusual = group_tensors(values, keep_strides=False)
    if unusual or len(groups) != 1:
        return torch.stack([value.detach().cpu() for value in values])
    slab = torch.empty(groups[0].length, dtype=values[0].dtype, device="cpu")
    whole = groups[0].slab()
    download(groups[0], [value.detach().reshape(-1) for value in values] if whole is None else whole, slab)
    return rows_in(slab, groups[0].offsets, values[0].numel())


def refuse_unusual(name: str, value: Tensor) -> None:
    """Raise a TypeError unless a tensor is dense, and has memory."""
    is_wrapper: bool = is_traceable_wrapper_subclass(value)
    if value.layout != torch.strided or value.device.type == "meta" or is_wrapper:
        what = f"of layout {value.layout}" if value.layout != torch.strided else f"a {type(value).__name__}"
        where = " on the meta device" if value.device.type == "meta" else ""
        raise TypeError(f"'{name}' is {what}{where}, and a file holds dense tensors with memory")
    if value.is_nested:
        raise TypeError(f"'{name}' is a nested tensor, and a file holds dense tensors: save the module with torch.save")


def refuse_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise a TypeError if safetensors does not have a dtype."""
    if dtype not in CODES:
        raise TypeError(f"safetensors has no dtype like {dtype}, of which {name!r} is")


def refuse_expanded(name: str, tensor: Tensor) -> None:
    """Raise a ValueError for a tensor that would take far more bytes in a file than in memory."""
    if tensor.nbytes > MOST_EXPANDED and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"'{name}' is expanded from {tensor.untyped_storage().nbytes():,} to {tensor.nbytes:,} bytes, and the file "
            "would hold them all: save what it was expanded from, or the module with torch.save"
        )
