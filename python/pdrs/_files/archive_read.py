"""Reads archives: safetensors files with checksums, and chains of them.

docs/archive.md describes the format. An archive is full, or it is a delta: then it names its predecessor in the same
folder, and holds what has changed since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import RowIndex, apply_names, crc32
from pdrs._files.checkpoint_file import NO_FILE, STEP, CheckpointFile, texts_of
from pdrs._files.progress import progress
from pdrs._files.safetensors_file import SafetensorsFile
from pdrs._files.safetensors_write import has_surrogate
from pdrs._rows.names_codec import bytes_in, bytes_of, claims_too_much
from pdrs._torch.huge_pages import full

__all__ = [
    "CHECK",
    "NAMES",
    "ROWS",
    "SAME",
    "VERSION",
    "WHOLE",
    "Archive",
    "refuse_long_chain",
    "sum_before",
    "sum_of_text",
    "sum_of_texts",
]

VERSION = 1
# The key of the metadata that holds the checksum of those of pdrs.
CHECK = "pdrs.crc32"
# How a delta makes a tensor: it is the predecessor's; it is in the file; some of its rows are; or the difference of
# packed names is. The keys of the metadata, and the endings of the tensors in the file.
SAME, WHOLE, ROWS, NAMES = "same", "whole", "rows", "names"
# A longer chain is neither read nor written: it would be slow, and is most likely an attack.
_LONGEST_CHAIN = 1000
# The files of a longer chain are open only while they are read, because a process may open only so many.
_OPEN_AT_ONCE = 16
_CURE = "save without since, which writes an archive that stands alone"


class Archive(CheckpointFile):
    """The tensors of an archive, or of a chain of archives that ends with it.

    Parameters
    ----------
    file
        The last file, which is closed with the archive.

    Raises
    ------
    CheckpointError
        If the file, or a predecessor, is damaged, missing, or has been replaced by another one.
    OSError
        If a predecessor cannot be opened.
    """

    format = "archive"

    def __init__(self, file: SafetensorsFile) -> None:
        self._begin(file)
        chain = [self]
        try:
            self._read()
            seen = {os.path.realpath(file.path)}
            while chain[-1]._since is not None:
                if len(chain) == _LONGEST_CHAIN:
                    raise self.error(f"it continues {_LONGEST_CHAIN} archives or more: {_CURE}")
                chain.append(chain[-1]._open_before(seen))
                if len(chain) > _OPEN_AT_ONCE:
                    chain[-1].file.rest()
        except BaseException:
            self.close()
            raise
        for before, one in zip([None, *reversed(chain)], reversed(chain), strict=False):
            one._bytes += before._bytes if before is not None else 0
            one._rests = len(chain) > _OPEN_AT_ONCE

    def _begin(self, file: SafetensorsFile) -> None:
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self.previous: Archive | None = None
        self._bytes = file.size
        self._rests = False
        self._since: tuple[str, str] | None = None
        # How each tensor is made, its shape, and its checksum; empty in a full archive.
        self._how: dict[str, tuple[str, tuple[int, ...], str]] = {}
        # Tensors that were kept when they were verified.
        self._verified: dict[str, Tensor] = {}
        # The bytes of tensors that are larger than what the files hold of them.
        self._claimed: dict[str, int] = {}

    def _read(self) -> None:
        """Read the metadata."""
        text = self.metadata.get("pdrs")
        if text is None:
            raise self.error("the metadata 'pdrs' are missing")
        if self.metadata.get(CHECK) != sum_of_text(text):
            raise self.error("the metadata 'pdrs' are damaged: the checksum differs")
        try:
            fields = json.loads(text)
            version = int(fields["version"])
            if version <= VERSION:
                self.id = str(fields["id"])
                self.sums = {str(name): str(value) for name, value in fields["sums"].items()}
                self.dictionaries = {str(prefix): str(name) for prefix, name in fields["dictionaries"].items()}
                self._texts = str(fields["texts"])
                self.capacities = {str(name): int(rows) for name, rows in fields.get("capacities", {}).items()}
                since = fields.get("since")
                if since is not None:
                    self._since = str(since["file"]), str(since["id"])
                    self._how = {
                        str(name): (str(how), tuple(map(int, shape)), str(total))
                        for name, (how, shape, total) in fields["tensors"].items()
                    }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self.error("the metadata 'pdrs' cannot be read") from error
        if version > VERSION:
            raise self.error(f"it was written by a later version of pdrs (format {version}, this one reads {VERSION})")

    def _open_before(self, seen: set[str]) -> Archive:
        """Open the predecessor, without its own; ``seen`` are the files of the chain."""
        assert self._since is not None
        name, wanted = self._since
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or has_surrogate(name):
            raise self.error(f"it continues {name!r}, which is no name of a file in the same folder")
        path = os.path.join(os.path.dirname(self.path), name)
        if not os.path.exists(path) and os.path.islink(self.path):
            path = os.path.join(os.path.dirname(os.path.realpath(self.path)), name)
        real = os.path.realpath(path)
        if real in seen:
            raise self.error("the archives that continue each other have no beginning")
        seen.add(real)
        before = Archive.__new__(Archive)
        try:
            before._begin(SafetensorsFile(path))
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise self.error(f"it continues {path}, which is not there") from error
        self.previous = before
        before._read()
        if before.id != wanted:
            raise self.error(f"it continues {path}, which has been replaced by another archive since")
        return before

    def _chain(self) -> Iterator[Archive]:
        """Yield this archive, its predecessor, and so on."""
        one: Archive | None = self
        while one is not None:
            yield one
            one = one.previous

    def close(self) -> None:
        """Close all files of the chain."""
        for one in self._chain():
            one._verified.clear()
            one.file.close()

    # -- what is in it -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in order."""
        return list(self._how) if self._how else self.file.names

    def names_ending(self, ending: str) -> list[str]:
        """Return the names with an ending, in order."""
        return super().names_ending(ending) if self._how else self.file.names_ending(ending)

    def __len__(self) -> int:
        return len(self._how) if self._how else len(self.file)

    def __contains__(self, name: object) -> bool:
        return name in self._how if self._how else name in self.file

    def files(self) -> list[str]:
        """Return the paths of the file and of its predecessors."""
        return [one.path for one in self._chain()]

    def chain_bytes(self) -> int:
        """Return the size of the file and of its predecessors together."""
        return self._bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._how[name][1] if self._how else self.file.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._history(name)[-1].file.dtype(name)

    def _history(self, name: str) -> list[Archive]:
        """Return the archives that make a tensor: this one, and so on, back to the one that has it whole."""
        history = [self]
        while history[-1]._how and history[-1]._how[name][0] != WHOLE:
            one = history[-1].previous
            assert one is not None
            if name not in one:
                raise history[-1].error(f"the tensor {name!r} is missing in {one.path}, which it continues")
            history.append(one)
        history[-1]._require(name)
        return history

    def _require(self, name: str) -> str:
        if name not in self.file:
            raise self.error(f"the tensor {name!r} is missing")
        return name

    def _first(self, name: str) -> Tensor:
        one = self._history(name)[-1]
        found = one.file.tensor(name)
        one._rest()
        return found

    def _rest(self) -> None:
        if self._rests:
            self.file.rest()

    # -- the data ------------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of its own. If it has not changed since a file, it is a copy-on-write map of that file."""
        return self._tensor(name, SafetensorsFile.tensor)

    def load(self, name: str) -> Tensor:
        """Return a tensor of its own in memory."""
        return self._tensor(name, SafetensorsFile.load)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return many tensors."""
        return super().tensors(names) if self._how else self.file.tensors(names)

    def table(self, name: str, *, loads: bool) -> Tensor:
        """Return a table, mapped or loaded, with the unused rows that are not in the file."""
        shape, rows = self.shape(name), self.capacities.get(name)
        if rows is None:
            return self.load(name) if loads else self.tensor(name)
        if not shape or rows <= shape[0]:
            raise self.error(f"the tensor {name!r} of the shape {list(shape)} cannot be of a table of {rows} rows")
        self._claim(name, (rows, *shape[1:]), self.dtype(name))
        if not self._how and name not in self._verified:
            return self.file.table(name, loads=loads, rows=rows)
        stored = self.load(name) if loads else self.tensor(name)
        made = full((rows, *shape[1:]), 0, dtype=stored.dtype)
        made[: len(stored)] = stored
        return made

    def stacked(self, prefix: str = "", *, loads: bool = False) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors as rows of tables, if this is a full archive without dictionaries."""
        return self.file.stacked(prefix, loads=loads)

    def _tensor(self, name: str, take: Callable[[SafetensorsFile, str], Tensor]) -> Tensor:
        made: Tensor | None = None
        for one in reversed(self._history(name)):
            made = one._follow(name, made, take)
            one._rest()
        assert made is not None
        return made

    def _follow(self, name: str, old: Tensor | None, take: Callable[[SafetensorsFile, str], Tensor]) -> Tensor:
        """Return a tensor of this archive, given that of the predecessor, if it depends on it."""
        if name in self._verified:
            return self._verified[name]
        if not self._how:
            return take(self.file, name)
        how, shape, total = self._how[name]
        if old is None:
            made = take(self.file, name)
        elif how == SAME:
            made = old
        elif how == ROWS:
            made = self._with_rows(name, shape, old)
        elif how == NAMES:
            ending = self._require(f"{name}.__{NAMES}__")
            try:
                made = torch.from_numpy(apply_names(bytes_of(old), bytes_of(self.file.tensor(ending))))
            except ValueError as error:
                raise self.error(f"the tensor {ending!r}: {error}") from error
            if sum_of(made) != total:
                raise self.error(f"the names {name!r} are not what they were: the checksum differs")
        else:
            raise self.error(f"the metadata 'pdrs' say of the tensor {name!r} that it is {how!r}, which is unknown")
        if tuple(made.shape) != shape:
            raise self.error(f"the tensor {name!r} should have the shape {list(shape)}, got {list(made.shape)}")
        return made

    def _with_rows(self, name: str, shape: tuple[int, ...], old: Tensor) -> Tensor:
        """Return a tensor of another length, with rows replaced by those in the file."""
        of_rows, of_values = self._require(f"{name}.__{ROWS}__"), self._require(f"{name}.__values__")
        rows, values = self.file.tensor(of_rows), self.file.tensor(of_values)
        fits = rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1 and values.dtype == old.dtype
        if not fits or old.dim() == 0 or not shape or values.shape != (len(rows), *shape[1:]):
            raise self.error(f"the tensors {of_rows!r} and {of_values!r} do not fit to {name!r}")
        if old.shape[1:] != shape[1:] or not 0 <= shape[0] < 1 << 62:
            raise self.error(f"{name!r} cannot become of the shape {list(shape)}: it has {list(old.shape)}")
        numbers = rows.long()
        if len(rows) and (
            int(numbers.min()) < 0 or int(numbers.max()) >= shape[0] or bool((numbers.diff() <= 0).any())
        ):
            raise self.error(f"the rows in {of_rows!r} are not ascending, or not all below {shape[0]}")
        if shape[0] != len(old):
            if shape[0] > len(old):
                self._claim(name, shape, old.dtype)
            kept = min(shape[0], len(old))
            made = old.new_zeros(shape)
            made[:kept] = old[:kept]
            old = made
        if len(rows):
            # By bytes, because torch does not do this for every dtype.
            bytes_of(old).reshape(len(old), -1)[numbers.numpy()] = bytes_of(values).reshape(len(rows), -1)
        return old

    def _claim(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Refuse tensors that together are much larger than the files."""
        self._claimed[name] = bytes_in(shape, dtype)
        claimed = sum(self._claimed.values())
        if claims_too_much(claimed, self._bytes):
            raise self.error(
                f"the tensors up to {name!r} would have {claimed} bytes, and the files have {self._bytes}: {name!r} "
                f"cannot become of the shape {list(shape)}"
            )

    # -- checksums -----------------------------------------------------------------------------------------------------

    def verify(self, *, keeps: Callable[[str], bool] = lambda _: False) -> bool:
        """Read all data of the chain and compare checksums."""
        for one in reversed(list(self._chain())):
            one._verify_file(keeps if one is self else lambda _: False)
            one._rest()
        # Of the tensors that a delta makes, only those of the last one are compared. Otherwise, the time would be
        # quadratic in the length of the chain. The files have about as many bytes as these tensors.
        with progress(self._bytes if self._how else 0, self.path) as count:
            for name, (_, _, total) in self._how.items():
                if sum_of(self.tensor(name), count) != total:
                    raise self.error(f"the tensor {name!r} is not what it was: the checksum differs")
        return True

    def _verify_file(self, keeps: Callable[[str], bool]) -> None:
        if self._texts != sum_of_texts(texts_of(self.metadata)):
            raise self.error("the metadata are damaged: the checksum differs")
        with progress(self.file.size, self.path) as count:
            for name in self.file.names:
                if name not in self.sums:
                    raise self.error(f"the tensor {name!r} has no checksum")
                found = self._sum_in_file(name, count, keeps=not self._how and keeps(name))
                if found != self.sums[name]:
                    start, stop = self.file.offsets(name)
                    raise self.error(
                        f"the tensor {name!r} (bytes {start} to {stop}) is damaged: its checksum is {found}, and was "
                        f"{self.sums[name]} when it was written"
                    )
        gone = [name for name in self.sums if name not in self.file]
        if gone:
            raise self.error(f"the tensor {gone[0]!r} is missing")

    def _sum_in_file(self, name: str, count: Callable[[int], object], *, keeps: bool) -> str:
        total = sum_before(name, self.file.code(name), self.file.shape(name))

        def add(part: NDArray[np.uint8]) -> None:
            nonlocal total
            total = crc32(part, total)
            count(len(part))

        if keeps:
            self._verified[name] = self.file.load(name, add)
        else:
            for part in self.file.parts(name):
                add(part)
        return f"{total:08x}"


def refuse_long_chain(since: Archive) -> None:
    """Raise a ValueError if an archive cannot have another successor."""
    if len(since.files()) >= _LONGEST_CHAIN:
        raise ValueError(f"{since.path} continues {_LONGEST_CHAIN - 1} archives, which is the most: {_CURE}")


def sum_of_text(text: str) -> str:
    """Return the checksum of a text."""
    return f"{crc32(np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8)):08x}"


def sum_of_texts(texts: Mapping[str, str]) -> str:
    """Return the checksum of the user's metadata, in whatever order the header has them."""
    return sum_of_text(json.dumps(dict(texts), sort_keys=True, separators=(",", ":")))


def sum_before(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Return the checksum of the description of a tensor, with which that of its data begins."""
    text = f"{name}\0{dtype}\0{','.join(map(str, shape))}\0"
    return crc32(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))


def sum_of(tensor: Tensor, count: Callable[[int], object] = lambda _: None) -> str:
    """Return the checksum of the data of a tensor."""
    data, total = bytes_of(tensor), 0
    for at in range(0, len(data), STEP):
        part = data[at : at + STEP]
        total = crc32(part, total)
        count(len(part))
    return f"{total:08x}"
