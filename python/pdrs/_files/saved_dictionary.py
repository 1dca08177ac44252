"""Dictionaries in a checkpoint: names, and the tables that hold their rows. Tables are read or mapped on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import Places, RowIndex, slab_views
from pdrs._files.checkpoint_file import EXTRA_STATE, CheckpointError, CheckpointFile
from pdrs._files.collect import sort_alike, without_none
from pdrs._rows.names_codec import (
    Header,
    TableHeader,
    check_header,
    check_search,
    claims_too_much,
    refuse_claim,
    search,
    unpack,
)
from pdrs._rows.table import Kind
from pdrs._rows.write import scatter
from pdrs.parameter_dict import ParameterDict

__all__ = ["PackedDictionary", "PlainTensors", "SavedDictionary", "verify_all"]


class SavedDictionary(ABC):
    """Names, and a table for each number in their places."""

    header: Header
    index: RowIndex

    @abstractmethod
    def table(self, number: int, *, loads: bool = False) -> Tensor:
        """Return the rows of a table, ``[capacity, *shape]``, loaded or mapped."""

    def load_into(
        self,
        module: ParameterDict,
        prefix: str,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Fill the entries of a ParameterDict. An empty one takes over the names."""
        if not module._parameters and len(module) == 0:
            module._insert(self.index.names(), self._parameters())
            return
        parameters, values, sorted_ = without_none(module._parameters)
        names = list(parameters)
        places = self.index.places(names)
        missing_keys += [prefix + names[at] for at in places.missing().tolist()]
        if strict and len(places.found()) < len(self.index):
            unexpected_keys += [prefix + name for name in self.index if name not in parameters]
        numbers, rows = places.tables, places.rows
        tables = {number: self.table(number) for number, _, _ in places.by_table()}
        for kind, alike in sort_alike(values, found=sorted_):
            here = numbers[alike]
            for number in tables if len(tables) == 1 else set(np.unique(here).tolist()) & tables.keys():
                there, table = alike[here == number], tables[number]
                if len(there) == 0:
                    continue
                if kind.shape == table.shape[1:]:
                    chosen = values if len(there) == len(values) else [values[at] for at in there.tolist()]
                    refused = scatter(table, rows[there], chosen)
                    error_msgs += [
                        f'While copying the parameter named "{prefix + names[there[at]]}", whose dimensions in the '
                        f"model are {values[there[at]].size()} and whose dimensions in the checkpoint are "
                        f"{table.shape[1:]}, an exception occurred : {error.args}."
                        for at, error in refused
                    ]
                    continue
                error_msgs += [
                    f"size mismatch for {prefix + names[at]}: copying a param with shape {table.shape[1:]} from "
                    f"checkpoint, the shape in current model is {values[at].shape}."
                    for at in there.tolist()
                ]

    def _parameters(self) -> list[Any]:
        """Return a new Parameter for each name, in order. Those of a table share its memory."""
        found = np.empty(len(self.index), object)
        for number, there, rows in self.index.places().by_table():
            data, trainable = self.table(number, loads=True), self.header.tables[number].trainable
            shape = list(data.shape[1:])
            made: list[Any]
            if prod(shape) and data.device.type in ("cpu", "cuda"):
                offsets = (rows * prod(shape)).tolist()
                made = slab_views(data, offsets, [shape] * len(there), requires_grad=trainable)
            else:
                # Views of one storage would be taken for tied.
                made = [Parameter(data[row].clone(), requires_grad=trainable) for row in rows.tolist()]
            for at, one in zip(there.tolist(), made, strict=True):
                found[at] = one
        return found.tolist()

    def state(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the entries as a state dict has them, for modules without tables."""
        tables = [self.table(number).unbind() for number in range(len(self.header.tables))]
        for name, number, row in self.index.entries():
            yield prefix + name, tables[number][row]


def verify_all(checkpoint: CheckpointFile, keeps: Callable[[str], bool] = lambda _: False) -> bool:
    """Compare the checksums of a checkpoint, and check its dictionaries; see `CheckpointFile.verify`. **O(bytes)**."""
    verified = checkpoint.verify(keeps=keeps)
    for prefix in checkpoint.prefixes():
        PackedDictionary(checkpoint, prefix).check()
    return verified


class PackedDictionary(SavedDictionary):
    """A dictionary of a checkpoint with packed names.

    Parameters
    ----------
    checkpoint
        Where it is.
    prefix
        Of the dictionary.
    shown
        Is put before its names.
    loads
        Whether the packed names are read into memory, so that later changes of the file do not reach them.

    Raises
    ------
    CheckpointError
        If the packed names are damaged. All methods raise it if names and tables disagree.
    """

    def __init__(self, checkpoint: CheckpointFile, prefix: str, shown: str = "", *, loads: bool = False) -> None:
        self.checkpoint, self.prefix, self.shown = checkpoint, prefix, shown
        try:
            self._packed = (checkpoint.load if loads else checkpoint.tensor)(prefix + EXTRA_STATE)
            self._searched, self._names, self.header = search(
                self._packed, CheckpointError, checkpoint.path, f"the tensor {prefix + EXTRA_STATE!r}: "
            )
            check_header(self.header)
        except CheckpointError:
            raise
        except ValueError as error:
            raise self._damaged(error) from error
        self._index = None if shown else self._searched

    @property
    def searched(self) -> RowIndex | None:
        """An index that looks up the names of the file there; None if it has no table of words, or after `narrow`."""
        self._refuse_claims()
        return self._searched

    @property
    def index(self) -> RowIndex:  # type: ignore[override]  # read-only
        """The names, and the place of each. They are looked up in the file if it has a table of words."""
        self._refuse_claims()
        if self._index is None:
            try:
                names, _ = unpack(self._packed, self.shown)
                self._index = RowIndex.of_ids(names, [table.used for table in self.header.tables])
            except ValueError as error:
                raise self._damaged(error) from error
        return self._index

    def _refuse_claims(self) -> None:
        """Refuse tables that have not the rows that the header claims, if these are many."""
        if claims_too_much(sum(table.used for table in self.header.tables), self._names):
            for number in range(len(self.header.tables)):
                self.table(number)

    def check(self) -> None:
        """Refuse names that contradict their tables or their table of words. **O(n)**."""
        try:
            names, _ = unpack(self._packed)
            RowIndex.of_ids(names, [table.used for table in self.header.tables])
            check_search(self._packed)
        except ValueError as error:
            raise self._damaged(error) from error
        for number in range(len(self.header.tables)):
            self.table(number)

    def members(self) -> set[str]:
        """Return the names of the tensors that make up the dictionary."""
        return {self.prefix + name for name in (*(table.attribute for table in self.header.tables), EXTRA_STATE)}

    def narrow(self, beginning: str, asked: list[str] | None) -> bool:
        """Keep only the names with a beginning, without it; return whether there are any. **O(n)**.

        If all names that are ``asked`` for are there, only these are kept: **O(m)**.
        """
        found = None if self.searched is None or not asked else self._narrowed(self.searched, beginning, asked)
        self._index, self._searched = self.index.below(beginning) if found is None else found, None
        return len(self._index) > 0

    def _narrowed(self, searched: RowIndex, beginning: str, asked: list[str]) -> RowIndex | None:
        """Return an index of names without their beginning; None unless each is there."""
        if not all(type(name) is str and name for name in asked):
            return None
        names = list(dict.fromkeys(asked))
        places = searched.places([beginning + name for name in names])
        if not places.is_complete():
            return None
        # Two damaged names may have one row. Whoever reads all names finds out, and says where.
        with suppress(ValueError):
            return RowIndex.of(names, places, [table.used for table in self.header.tables])
        return None

    def table(self, number: int, *, loads: bool = False) -> Tensor:
        """Return the rows of a table, loaded or mapped."""
        table = self.header.tables[number]
        name = self.prefix + table.attribute
        if name not in self.checkpoint:
            raise self._disagree(table, f"there is no tensor {name!r}")
        found = self.checkpoint.table(name, loads=loads)
        if found.dim() == 0 or len(found) < table.used:
            raise self._disagree(table, f"{table.used} rows are in use, and its shape is {list(found.shape)}")
        if found.is_meta:
            raise self._disagree(table, "it is on the meta device, and so has no values")
        try:
            refuse_claim(table.attribute, found, self._names)
        except ValueError as error:
            raise self._disagree(table, str(error)) from error
        if table.trainable and not (found.is_floating_point() or found.is_complex()):
            raise self._disagree(table, f"it cannot be trained, because it is of the dtype {found.dtype}")
        return found

    def _damaged(self, error: ValueError) -> CheckpointError:
        return self.checkpoint.error(f"the tensor {self.prefix + EXTRA_STATE!r}: {error}")

    def _disagree(self, table: TableHeader, what: str) -> CheckpointError:
        name = self.prefix + table.attribute
        return self.checkpoint.error(f"names and tables disagree about the table {name!r}: {what}")


class PlainTensors(SavedDictionary):
    """Tensors that have a name each.

    Parameters
    ----------
    index
        The names.
    tables
        The dtype of each table, the shape of a row, the number of rows, and a function that returns it loaded or not.
    """

    def __init__(
        self,
        index: RowIndex,
        tables: Sequence[tuple[torch.dtype, tuple[int, ...], int, Callable[[bool], Tensor]]],
    ) -> None:
        self.index, headers = index, []
        self._take = [take for *_, take in tables]
        for dtype, shape, rows, _ in tables:
            trainable = dtype.is_floating_point or dtype.is_complex
            headers.append(TableHeader(Kind(tuple(shape), dtype, trainable).attribute(), 0, trainable, rows))
        self.header = Header(tuple(headers))

    @classmethod
    def stacked(cls, checkpoint: CheckpointFile, prefix: str, *, loads: bool) -> PlainTensors:
        """Stack all tensors of a checkpoint without dictionaries below a prefix."""
        index, tables = checkpoint.stacked(prefix, loads=loads)

        def take(table: Tensor) -> Callable[[bool], Tensor]:
            return lambda _: table

        return cls(index, [(one.dtype, one.shape[1:], len(one), take(one)) for one in tables])

    @classmethod
    def single(cls, checkpoint: CheckpointFile, names: list[str], prefix: str) -> PlainTensors:
        """Make each of some tensors a table of one row, so that all of them can be mapped."""

        def take(name: str) -> Callable[[bool], Tensor]:
            return lambda loads: (checkpoint.load if loads else checkpoint.tensor)(name)[None]

        places = Places.of(np.arange(len(names)), np.zeros(len(names), np.int64))
        index = RowIndex.of([name.removeprefix(prefix) for name in names], places, [1] * len(names))
        return cls(index, [(checkpoint.dtype(name), checkpoint.shape(name), 1, take(name)) for name in names])

    def table(self, number: int, *, loads: bool = False) -> Tensor:
        """Return the rows of a table."""
        return self._take[number](loads)
