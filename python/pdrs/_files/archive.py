"""Archives: what a safetensors file needs beside its tensors to be one, and what a chain of them holds.

docs/archive.md describes the format. An archive is *full*, or a *delta*: then it names the one that it continues, in
the same folder, and has only what has changed since.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdrs._core import RowIndex, apply_names, changed_rows, crc32, diff_names
from pdrs._files.collect import EXTRA_STATE, SPARE, Collected, Source
from pdrs._files.safetensors_file import (
    CODES,
    NO_FILE,
    STEP,
    CheckpointError,
    NewTensor,
    TensorFile,
    counting,
    has_surrogate,
    texts_of,
    write_tensors,
)
from pdrs._rows.names_codec import bytes_of, is_packed
from pdrs._torch.huge_pages import full

__all__ = ["Archive", "packed_before", "refuse_long_chain", "same_file", "write_archive"]

_VERSION = 1
# The metadata that hold the checksum of the others.
_CHECK = "pdrs.crc32"
# How a tensor of a delta follows from the one before: it is the same; it is in the file; some of its rows are; or what
# has changed of packed names is.
_SAME, _WHOLE, _SOME, _NAMES = "same", "whole", "rows", "names"
_ROWS, _VALUES, _CHANGES = ".__rows__", ".__values__", ".__names__"
# A table may grow to so many times the bytes of all files without being written whole: tables grow by doubling, and new
# rows are zero. More is not believed.
_GROWTH = 4
# A chain of more archives is neither read nor written: it would be slow, and is most likely an attack.
_LONGEST_CHAIN = 1000
# Of a longer chain, files are open only while they are read: there may not be as many descriptors.
_OPEN_AT_ONCE = 16
# What helps.
_END_CHAIN = "save without since, which writes an archive that stands alone"


# -- reading -----------------------------------------------------------------------------------------------------------


class Archive:
    """The tensors of a safetensors file, or of a chain of archives that ends with it.

    Parameters
    ----------
    file
        The file, which is closed with the archive. One that pdrs did not write is taken for a full one without
        checksums.

    Raises
    ------
    CheckpointError
        If the file, or one that it continues, is damaged, missing, or another than when it was continued.
    OSError
        If one that it continues cannot be opened.
    """

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.previous: Archive | None = None
        self._bytes = file.size
        chain = [self]
        try:
            since = self._read()
            seen = {os.path.realpath(file.path)}
            while since is not None:
                chain[-1].previous = before = chain[-1]._open_before(*since, seen)
                chain.append(before)
                if len(chain) > _LONGEST_CHAIN:
                    raise self.error(f"it continues {_LONGEST_CHAIN} archives or more: {_END_CHAIN}")
                since = before._since
                if len(chain) > _OPEN_AT_ONCE:
                    before.file.rest()
        except BaseException:
            self.close()
            raise
        self._rests = len(chain) > _OPEN_AT_ONCE
        for later, one in zip(reversed(chain[:-1]), reversed(chain), strict=False):
            later._bytes += one._bytes
            one._rests = self._rests

    def _read(self) -> tuple[str, str] | None:
        """Read the metadata; return the name and the id of the archive that this one continues, if it does."""
        self.sums: dict[str, str] = {}
        self.dictionaries: dict[str, str] = {}
        self.capacities: dict[str, int] = {}
        self.id: str | None = None
        self._sum_of_texts: Any = None
        self._how: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self._verified: dict[str, Tensor] = {}
        self._since: tuple[str, str] | None = None
        self._rests = False
        text = self.file.metadata.get("pdrs")
        if text is None:
            if _CHECK in self.file.metadata:
                raise self.error("the metadata 'pdrs' are missing")
            return None
        if self.file.metadata.get(_CHECK) != _sum_of_text(text):
            raise self.error("the metadata 'pdrs' are damaged: the checksum differs")
        try:
            fields = json.loads(text)
            version = int(fields["version"])
            if version > _VERSION:
                raise self.error(f"it was written by a later version of pdrs (format {version}, this one reads 1)")
            self.id = str(fields["id"])
            self.sums = {str(name): str(value) for name, value in fields["sums"].items()}
            self.dictionaries = {str(prefix): str(name) for prefix, name in fields["dictionaries"].items()}
            self._sum_of_texts = fields["texts"]
            self.capacities = {str(name): int(rows) for name, rows in fields.get("capacities", {}).items()}
            since = fields.get("since")
            if since is not None:
                self._since = str(since["file"]), str(since["id"])
                self._how = {
                    str(name): (str(how), tuple(map(int, shape)), str(total))
                    for name, (how, shape, total) in fields["tensors"].items()
                }
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self.error("the metadata 'pdrs' cannot be read") from error
        return self._since

    def _open_before(self, name: str, wanted: str, seen: set[str]) -> Archive:
        """Open the archive that this one continues, without those before that; ``seen`` are the files of the chain."""
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or has_surrogate(name):
            raise self.error(f"it continues {name!r}, which is no name of a file in the same folder")
        path = os.path.join(os.path.dirname(self.file.path), name)
        if not os.path.exists(path) and os.path.islink(self.file.path):
            path = os.path.join(os.path.dirname(os.path.realpath(self.file.path)), name)
        real = os.path.realpath(path)
        if real in seen:
            raise self.error("the archives that continue each other have no beginning")
        seen.add(real)
        before = Archive.__new__(Archive)
        try:
            before.file = TensorFile(path)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise self.error(f"it continues {path}, which is not there") from error
        before.previous, before._bytes = None, before.file.size
        try:
            before._read()
            if before.id != wanted:
                raise self.error(f"it continues {path}, which has been replaced by another archive since")
        except BaseException:
            before.file.close()
            raise
        return before

    def _chain(self) -> Iterator[Archive]:
        """Yield this archive, the one that it continues, and so on."""
        one: Archive | None = self
        while one is not None:
            yield one
            one = one.previous

    def error(self, what: str) -> CheckpointError:
        """Return an error about the file, to be raised."""
        return self.file.error(what)

    def close(self) -> None:
        """Close the files; tensors that were taken from them stay valid."""
        for one in self._chain():
            one._verified.clear()
            one.file.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in order."""
        return list(self._how) if self._how else self.file.names

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._how if self._how else name in self.file

    def files(self) -> list[str]:
        """Return the paths of the file and of those that it continues."""
        return [one.file.path for one in self._chain()]

    def chain_bytes(self) -> int:
        """Return the size of the file and of those that it continues, together."""
        return self._bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._how[name][1] if self._how else self.file.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        first = self._history(name)[-1]
        dtype: torch.dtype = first._in_file(name, first.file.dtype)
        return dtype

    def _history(self, name: str) -> list[Archive]:
        """Return the archives from which a tensor follows: this one, and so on, back to the one that has it whole."""
        history = [self]
        while history[-1]._how and history[-1]._how[name][0] != _WHOLE:
            history.append(history[-1]._before(name))
        return history

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of its own: nobody sees what is written to it. What has not changed is a map of its file."""
        return self._tensor(name, TensorFile.tensor)

    def load(self, name: str) -> Tensor:
        """Return a tensor of its own that lies in memory."""
        return self._tensor(name, TensorFile.load)

    def table(self, name: str, *, loads: bool) -> Tensor:
        """Return a tensor as :meth:`tensor` or :meth:`load` do, with the rows of zeros that are not in the file."""
        shape = self.shape(name)
        rows = self.capacities.get(name)
        if rows is None:
            return self.load(name) if loads else self.tensor(name)
        if not shape or not shape[0] < rows <= SPARE * shape[0]:
            raise self.error(f"the tensor {name!r} of the shape {list(shape)} cannot be of a table of {rows} rows")
        if not self._how and name not in self._verified:
            made: Tensor = self._in_file(name, lambda one: self.file.table(one, rows, loads=loads))
            return made
        stored = self.load(name) if loads else self.tensor(name)
        made = full((rows, *shape[1:]), 0, dtype=stored.dtype)
        made[: len(stored)] = stored
        return made

    def _tensor(self, name: str, take: Callable[[TensorFile, str], Tensor]) -> Tensor:
        made: Tensor | None = None
        for one in reversed(self._history(name)):
            made = one._follow(name, made, take)
            if one._rests:
                one.file.rest()
        assert made is not None
        return made

    def _follow(self, name: str, old: Tensor | None, take: Callable[[TensorFile, str], Tensor]) -> Tensor:
        """Return a tensor as it is in this archive, given what it was in the one before, unless it is here whole."""
        if name in self._verified:
            return self._verified.pop(name)
        if not self._how:
            return take(self.file, name)
        how, shape, total = self._how[name]
        made: Tensor
        if old is None:
            made = self._in_file(name, partial(take, self.file))
        elif how == _SAME:
            made = old
        elif how == _SOME:
            made = self._with_rows(name, shape, old)
        elif how == _NAMES:
            delta = self._in_file(name + _CHANGES, self.file.tensor)
            try:
                made = torch.from_numpy(apply_names(bytes_of(old), bytes_of(delta)))
            except ValueError as error:
                raise self.error(f"the tensor {name + _CHANGES!r}: {error}") from error
            if _sum_of(made) != total:
                raise self.error(f"the names {name!r} are not what they were: the checksum differs")
        else:
            raise self.error(f"the metadata 'pdrs' say of the tensor {name!r} that it is {how!r}, which is unknown")
        if tuple(made.shape) != shape:
            raise self.error(f"the tensor {name!r} should have the shape {list(shape)}, got {list(made.shape)}")
        return made

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Return many tensors of their own."""
        return {name: self.tensor(name) for name in names} if self._how else self.file.tensors(names)

    def stacked(self, prefix: str, *, loads: bool) -> tuple[RowIndex, list[Tensor]]:
        """Return the tensors below a prefix as rows of tables, if there is neither a dictionary nor a chain."""
        return self.file.stacked(prefix, loads=loads)

    def _in_file(self, name: str, take: Callable[[str], Any]) -> Any:
        if name not in self.file:
            raise self.error(f"the tensor {name!r} is missing")
        return take(name)

    def _before(self, name: str) -> Archive:
        assert self.previous is not None
        if name not in self.previous:
            raise self.error(f"the tensor {name!r} is missing in {self.previous.file.path}, which it continues")
        return self.previous

    def _with_rows(self, name: str, shape: tuple[int, ...], old: Tensor) -> Tensor:
        rows = self._in_file(name + _ROWS, self.file.tensor)
        values = self._in_file(name + _VALUES, self.file.tensor)
        fits = rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1 and values.dtype == old.dtype
        if not fits or old.dim() == 0 or not shape or values.shape != (len(rows), *shape[1:]):
            raise self.error(f"the tensors {name + _ROWS!r} and {name + _VALUES!r} do not fit to {name!r}")
        # Rows without elements take no bytes: those that a file claims must be few, too.
        too_large = shape[0] * max(1, prod(shape[1:]) * old.element_size()) > _GROWTH * self.chain_bytes()
        if old.shape[1:] != shape[1:] or shape[0] < 0 or (too_large and shape[0] > len(old)):
            raise self.error(f"{name!r} cannot become of the shape {list(shape)}: it has {list(old.shape)}")
        numbers = rows.long()
        if len(rows) and (
            int(numbers.min()) < 0 or int(numbers.max()) >= shape[0] or bool((numbers.diff() <= 0).any())
        ):
            raise self.error(f"the rows in {name + _ROWS!r} are not ascending, or not all below {shape[0]}")
        if shape[0] != len(old):
            kept = min(shape[0], len(old))
            made = old.new_zeros(shape)
            made[:kept] = old[:kept]
            old = made
        if len(rows):
            # By bytes, because torch does not do this for every dtype.
            bytes_of(old).reshape(len(old), -1)[numbers.numpy()] = bytes_of(values).reshape(len(rows), -1)
        return old

    def prefixes(self) -> list[str]:
        """Return the prefixes of all dictionaries: of those that say so by their names."""
        found = self._how if self._how else self.file.names_ending(EXTRA_STATE)
        return [name[: -len(EXTRA_STATE)] for name in found if name.endswith(EXTRA_STATE) and self._holds_names(name)]

    def _holds_names(self, name: str) -> bool:
        behind_dot = len(name) == len(EXTRA_STATE) or name[-len(EXTRA_STATE) - 1] == "."
        return behind_dot and self.dtype(name) == torch.uint8 and is_packed(self._beginning(name))

    def _beginning(self, name: str) -> Tensor:
        first = self._history(name)[-1]
        start, stop = first._in_file(name, first.file.offsets)
        beginning = first.file.view(start, min(stop, start + 16))
        if first._rests:
            first.file.rest()
        return beginning

    def verify(self, *, keeps: Callable[[str], bool] = lambda name: False) -> None:
        """Read all data, and compare their checksums with those in the metadata, where there are some.

        Parameters
        ----------
        keeps
            Says of a tensor whether what was read is kept, for the next call that asks for it.

        Raises
        ------
        CheckpointError
            If one differs; it names the file and the tensor.
        """
        for one in reversed(list(self._chain())):
            one._verify_file(keeps if one is self else lambda name: False)
            if one._rests:
                one.file.rest()
        # What follows from all files: of the last alone, or a chain would take time quadratic in its length. The files
        # have about as many bytes as that.
        with counting(self.chain_bytes() if self._how else 0, self.file.path) as count:
            for name, (_, _, total) in self._how.items():
                if _sum_of(self.tensor(name), count) != total:
                    raise self.error(f"the tensor {name!r} is not what it was: the checksum differs")

    def _verify_file(self, keeps: Callable[[str], bool]) -> None:
        if self.id is None:
            return
        if self._sum_of_texts != _sum_of_texts(texts_of(self.file.metadata)):
            raise self.error("the metadata are damaged: the checksum differs")
        with counting(self.file.size, self.file.path) as count:
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

    def _sum_in_file(self, name: str, count: Callable[[int], None], *, keeps: bool) -> str:
        total = _sum_before(name, self.file.code(name), self.file.shape(name))

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


def _sum_of_text(text: str) -> str:
    return f"{crc32(np.frombuffer(text.encode('utf-8', 'surrogatepass'), np.uint8)):08x}"


def _sum_of_texts(texts: Mapping[str, str]) -> str:
    # JSON sorts them, too: a header may have them in any order.
    return _sum_of_text(json.dumps(dict(texts), sort_keys=True, separators=(",", ":")))


def _sum_before(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Return what the checksum of a tensor begins with: that of what the header says of it."""
    text = f"{name}\0{dtype}\0{','.join(map(str, shape))}\0"
    return crc32(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))


def _sum_of(tensor: Tensor, count: Callable[[int], None] = lambda _: None) -> str:
    data, total = bytes_of(tensor), 0
    for at in range(0, len(data), STEP):
        part = data[at : at + STEP]
        total = crc32(part, total)
        count(len(part))
    return f"{total:08x}"


# -- writing -----------------------------------------------------------------------------------------------------------


def write_archive(
    path: str | os.PathLike[str],
    collected: Collected,
    since: Archive | None = None,
    *,
    metadata: Mapping[str, str],
    sync: bool = True,
) -> int:
    """Write an archive, or, with ``since``, a delta; return the size of the file. See :func:`pdrs.save`."""
    sums: dict[str, str] = {}
    texts = {"format": "pt", **metadata}
    fields: dict[str, Any] = {
        "version": _VERSION,
        "id": secrets.token_hex(16),
        "dictionaries": collected.dictionaries,
        "texts": _sum_of_texts(texts),
        "sums": sums,
    }
    if collected.capacities:
        fields["capacities"] = collected.capacities
    tensors: list[NewTensor] = []
    if since is None:
        tensors += [
            _new(source.name, source.dtype, source.shape, source.blocks(), sums) for source in collected.sources
        ]
    else:
        # Not the name of a link, which may lie in another folder.
        fields["since"] = {"file": os.path.basename(os.path.realpath(since.file.path)), "id": since.id}
        fields["tensors"] = {}
        for source in collected.sources:
            how, total, made = _since(source, since, sums)
            fields["tensors"][source.name] = (how, source.shape, total)
            tensors += made

    def all_texts() -> dict[str, str]:
        text = json.dumps(fields, separators=(",", ":"))
        return {**texts, "pdrs": text, _CHECK: _sum_of_text(text)}

    return write_tensors(path, all_texts(), tensors, finish=all_texts, sync=sync)


def _new(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterator[Tensor], sums: dict[str, str]
) -> NewTensor:
    """Describe a tensor whose checksum is entered into ``sums`` when it has been written."""
    sums[name] = "00000000"

    def parts() -> Iterator[NDArray[np.uint8]]:
        total = _sum_before(name, CODES[dtype], shape)
        for block in blocks:
            part = bytes_of(block)
            total = crc32(part, total)
            yield part
        sums[name] = f"{total:08x}"

    return NewTensor(name, dtype, shape, parts())


def _since(source: Source, since: Archive, sums: dict[str, str]) -> tuple[str, str, list[NewTensor]]:
    """Return how a tensor follows from what it was, its checksum, and what is to be written for it.

    Every byte is compared: nobody needs to say what has changed, and whoever wrote to a tensor is found out.
    """
    name, dtype, shape = source.name, source.dtype, source.shape
    old = since.tensor(name) if name in since else None
    if old is not None and name.endswith(EXTRA_STATE) and is_packed(old) and dtype == torch.uint8:
        return _names_since(source, bytes_of(old), sums)
    comparable = old is not None and old.dtype == dtype and old.shape[1:] == shape[1:] and old.dim() == len(shape)
    row = prod(shape[1:]) * dtype.itemsize
    if not comparable or row == 0 or not shape:
        total, same = 0, old is not None and old.dtype == dtype and tuple(old.shape) == shape
        before = bytes_of(old) if old is not None and same else np.empty(0, np.uint8)
        at = 0
        for block in source.blocks():
            part = bytes_of(block)
            total = crc32(part, total)
            same = same and before[at : at + len(part)].tobytes() == part.tobytes()
            at += len(part)
        if same:
            return _SAME, f"{total:08x}", []
        return _WHOLE, f"{total:08x}", [_new(name, dtype, shape, source.blocks(), sums)]
    assert old is not None
    changed, total = _changed(source, bytes_of(old), row)
    if len(changed) == 0 and len(old) == shape[0]:
        return _SAME, f"{total:08x}", []
    numbers = torch.from_numpy(changed if shape[0] > 1 << 31 else changed.astype(np.int32))
    is_large = source.nbytes > _GROWTH * since.chain_bytes()
    if is_large or len(changed) * (row + numbers.itemsize) > shape[0] * row // 2:
        return _WHOLE, f"{total:08x}", [_new(name, dtype, shape, source.blocks(), sums)]
    return (
        _SOME,
        f"{total:08x}",
        [
            _new(name + _ROWS, numbers.dtype, tuple(numbers.shape), iter([numbers]), sums),
            _new(name + _VALUES, dtype, (len(changed), *shape[1:]), _selected(source, changed, row), sums),
        ],
    )


def _changed(source: Source, old: NDArray[np.uint8], row: int) -> tuple[NDArray[np.int64], int]:
    """Return the rows of a tensor that differ from what they were, or from zero, and the checksum of all."""
    found, at, total = [], 0, 0
    for part in _row_blocks(source, row):
        total = crc32(part, total)
        before = old[at : at + len(part)]
        found.append(changed_rows(before, part[: len(before)], row) + at // row)
        behind = part[len(before) :]
        if len(behind):
            # What nobody tells of is zero.
            found.append(changed_rows(np.zeros(len(behind), np.uint8), behind, row) + (at + len(before)) // row)
        at += len(part)
    return (np.concatenate(found) if found else np.empty(0, np.int64)), total


def _selected(source: Source, rows: NDArray[np.int64], row: int) -> Iterator[Tensor]:
    at = 0
    for part in _row_blocks(source, row):
        stop = at + len(part) // row
        chosen = rows[np.searchsorted(rows, at) : np.searchsorted(rows, stop)] - at
        if len(chosen):
            yield torch.from_numpy(part.reshape(-1, row)[chosen].reshape(-1))
        at = stop


def _row_blocks(source: Source, row: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in parts of whole rows."""
    left = np.empty(0, np.uint8)
    for block in source.blocks():
        part = bytes_of(block)
        if len(left) or len(part) % row:
            part = np.concatenate([left, part])
        whole = len(part) - len(part) % row
        if whole:
            yield part[:whole]
        left = part[whole:]


def _names_since(source: Source, old: NDArray[np.uint8], sums: dict[str, str]) -> tuple[str, str, list[NewTensor]]:
    new = np.concatenate([bytes_of(block) for block in source.blocks()])
    total = f"{crc32(new):08x}"
    if len(old) == len(new) and changed_rows(old, new, len(new)).size == 0:
        return _SAME, total, []
    delta = diff_names(old, new)
    if len(delta) <= len(new) // 2:
        written = torch.from_numpy(delta)
        return _NAMES, total, [_new(source.name + _CHANGES, torch.uint8, tuple(written.shape), iter([written]), sums)]
    return _WHOLE, total, [_new(source.name, source.dtype, source.shape, source.blocks(), sums)]


def refuse_long_chain(since: Archive) -> None:
    """Refuse to continue an archive that continues so many that the new one could not be read: ValueError."""
    if len(since.files()) >= _LONGEST_CHAIN:
        raise ValueError(f"{since.file.path} continues {_LONGEST_CHAIN - 1} archives, which is the most: {_END_CHAIN}")


def packed_before(since: Archive) -> Callable[[str], Tensor | None]:
    """Return a function that gives the packed names of the dictionary at a prefix, as they were."""
    prefixes = set(since.prefixes())
    return lambda prefix: since.tensor(prefix + EXTRA_STATE) if prefix in prefixes else None


def same_file(one: str | os.PathLike[str], others: list[str]) -> bool:
    """Whether a path leads to one of other files."""
    return os.path.realpath(one) in {os.path.realpath(other) for other in others}
