"""What all formats of checkpoints have in common: tensors by name, and dictionaries among them."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import RowIndex
from pdrs._rows.names_codec import is_packed

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EXTRA_STATE", "NO_FILE", "STEP", "CheckpointError", "CheckpointFile", "short_name", "texts_of"]

EXTRA_STATE = "_extra_state"

# The bytes of a large tensor that are read at once: enough for the disk, and they are still in the cache afterwards.
STEP = 8 << 20

# The errors by which the system says that a name leads to no file.
NO_FILE = (errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)


class CheckpointError(ValueError):
    """A file is damaged, or is not a checkpoint that pdrs can read.

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


class CheckpointFile(ABC):
    """An open checkpoint: tensors by name, in one file or in several.

    Tensors stay valid when it is closed, and when its files are replaced or removed.
    """

    format: ClassVar[str]
    """The name of the format for users."""
    path: str
    """The file that was opened."""
    metadata: Mapping[str, str]
    """The texts in the file besides the tensors."""
    shards: Sequence[CheckpointFile] = ()
    """The files that hold the tensors, if ``path`` is an index."""
    dictionaries: Mapping[str, str] = {}
    """The class of each dictionary that was saved, by its prefix."""
    versions: Mapping[str, Any] = {}
    """What torch notes of each module in a state dict, such as its version."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors, in order. **O(n)**."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; KeyError if there is none of that name."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; KeyError if there is none of that name."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor, as a copy-on-write memory map if the format allows it; KeyError if there is none."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return a tensor in memory, which does not change with the file; KeyError if there is none."""

    @abstractmethod
    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables, one for each dtype and shape. **O(n)**.

        Parameters
        ----------
        prefix
            Takes only tensors whose names begin with it and go on. It is left out of the names.
        loads
            Whether to read all into memory. By default, a table is mapped if its rows are adjacent in the file.

        Returns
        -------
        index
            The names in order, and the table and row of each.
        tables
            The tables, in the order of their numbers.

        Raises
        ------
        CheckpointError
            If a name is empty, or torch does not have a dtype.
        """

    @abstractmethod
    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Read all data and compare checksums; return whether there are any.

        ``keeps`` says of a tensor whether what was read is kept for the next call that asks for it.

        Raises
        ------
        CheckpointError
            If a checksum differs; it names the file and the tensor.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def error(self, what: str) -> CheckpointError:
        """Return an error about this checkpoint, to be raised."""
        return CheckpointError(self.path, what)

    def refuse_empty(self, names: Container[str]) -> None:
        """Raise a CheckpointError if a name is empty, which no entry can have."""
        if "" in names:
            raise self.error("a tensor has the empty name, which no entry can have")

    def files(self) -> list[str]:
        """Return the paths of all files, the one that was opened first."""
        return [self.path, *(shard.path for shard in self.shards)]

    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending, in order. **O(n)**."""
        return [name for name in self if name.endswith(ending)]

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors, by default all."""
        return {name: self.tensor(name) for name in (self.names if names is None else names)}

    def table(self, name: str, *, loads: bool) -> Tensor:
        """Return the table of a dictionary, mapped or loaded, with the unused rows that are not in the file."""
        return self.load(name) if loads else self.tensor(name)

    def prefixes(self) -> list[str]:
        """Return the prefixes of the dictionaries, which have packed names."""
        found = self.names_ending(EXTRA_STATE)
        return [name.removesuffix(EXTRA_STATE) for name in found if self._holds_names(name)]

    def _holds_names(self, name: str) -> bool:
        is_own = name == EXTRA_STATE or name.endswith("." + EXTRA_STATE)
        return is_own and self.dtype(name) == torch.uint8 and is_packed(self.tensor(name))

    def kinds(self) -> tuple[list[tuple[str, tuple[int, ...]]], NDArray[Any]]:
        """Return the distinct pairs of dtype and shape, and the number of each tensor's, in order."""
        described = [(short_name(self.dtype(name)), self.shape(name)) for name in self]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(described))}
        return list(numbers), np.array([numbers[kind] for kind in described], np.int64)


def short_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without that of torch."""
    return str(dtype).removeprefix("torch.")


def is_reserved(key: str) -> bool:
    """Whether a key of the metadata is reserved for pdrs."""
    return key == "pdrs" or key.startswith("pdrs.")


def texts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without those of pdrs."""
    return {key: value for key, value in metadata.items() if not is_reserved(key)}
