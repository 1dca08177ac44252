"""Dictionaries from the tensors of a checkpoint: their tables are the tensors, and nothing else is read.

A checkpoint is anything that has names, and a tensor for each: an archive, or a state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import Places, RowIndex, group_tensors, slab_views
from pdrs._entries.checkpointing import changes_what_is_loaded
from pdrs._files.archive import Archive
from pdrs._files.collect import EXTRA_STATE, sorted_parameters
from pdrs._files.safetensors_file import CheckpointError
from pdrs._moves.staging import upload
from pdrs._rows.insert import partition
from pdrs._rows.names_codec import Header, TableHeader, check_header, refuse_unpaid, unpack
from pdrs._rows.state_dict import note_load
from pdrs._rows.store import add_table
from pdrs._rows.table import Kind
from pdrs._rows.write import scatter, write_rows
from pdrs._torch.huge_pages import empty
from pdrs._torch.modes import is_intercepted
from pdrs._torch.names import Names, as_list
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict

__all__ = ["Checkpoint", "NamedTensors", "SavedDictionary", "continues", "is_loaded", "load_named", "open_dictionary"]

# How many of many missing names an error lists.
_LISTED = 5


class Checkpoint(Protocol):
    """Names, and a tensor for each."""

    dictionaries: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The names, in order."""

    def prefixes(self) -> list[str]:
        """Return the prefixes of the dictionaries."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of its own."""

    def load(self, name: str) -> Tensor:
        """Return a tensor of its own that lies in memory, and is no map of a file."""

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Return many tensors, which may share maps."""

    def stacked(self, prefix: str, *, loads: bool) -> tuple[RowIndex, list[Tensor]]:
        """Return tensors below a prefix as rows of tables, where there are no dictionaries; loaded, or else mapped."""

    def error(self, what: str) -> CheckpointError:
        """Return an error about the checkpoint."""


# A table that claims more rows than these, and than so many a name, is looked at before memory is taken for them.
_FEW_ROWS, _FEW_PER_NAME = 1 << 16, 64


class SavedDictionary:
    """A dictionary of a checkpoint: its names, and its tables as they lie there.

    Parameters
    ----------
    checkpoint
        Where it is.
    prefix
        Of the dictionary.
    shown
        Is put in front of its names.

    Raises
    ------
    CheckpointError
        If names and tables disagree, or the names are damaged.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, shown: str = "") -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        name = prefix + EXTRA_STATE
        self._there = set(checkpoint.names)
        self.header: Header
        try:
            self._packed, self.header = unpack(checkpoint.tensor(name), shown)
            check_header(self.header)
        except CheckpointError:
            raise
        except ValueError as error:
            raise checkpoint.error(f"the tensor {name!r}: {error}") from error
        self._names = len(self._packed)
        self._index: RowIndex | None = None

    @property
    def index(self) -> RowIndex:
        """The names, and the row of each. A claim of very many more rows than names is checked before."""
        if self._index is None:
            for table in self.header.tables:
                if table.used > max(_FEW_ROWS, _FEW_PER_NAME * self._names):
                    self.table(table)
            try:
                self._index = RowIndex.of_ids(self._packed, [table.used for table in self.header.tables])
            except ValueError as error:
                raise self.checkpoint.error(f"the tensor {self.prefix + EXTRA_STATE!r}: {error}") from error
        return self._index

    def members(self) -> set[str]:
        """Return the names of the tensors that make up the dictionary."""
        return {self.prefix + name for name in (*(table.attribute for table in self.header.tables), EXTRA_STATE)}

    def narrow(self, beginning: str) -> bool:
        """Keep those names only that begin so, without their beginning; whether there are any. **O(n)**."""
        self._index = self.index.below(beginning)
        return len(self.index) > 0

    def table(self, table: TableHeader, *, loads: bool = False) -> Tensor:
        """Return the rows of a table, ``[capacity, *shape]``: loaded into memory, or mapped."""
        take: Callable[[str], Tensor] = self.checkpoint.load if loads else self.checkpoint.tensor
        if isinstance(self.checkpoint, Archive):
            take = partial(self.checkpoint.table, loads=loads)
        name = self.prefix + table.attribute
        if name not in self._there:
            raise self._error(table, f"there is no tensor {name!r}")
        found = take(name)
        if found.dim() == 0 or len(found) < table.used:
            raise self._error(table, f"{table.used} rows are in use, and its shape is {list(found.shape)}")
        if found.is_meta:
            raise self._error(table, "it lies on the meta device, and so has no values")
        try:
            refuse_unpaid(table.attribute, found, self._names)
        except ValueError as error:
            raise self._error(table, str(error)) from error
        if table.trainable and not (found.is_floating_point() or found.is_complex()):
            raise self._error(table, f"it cannot be trained, for it is of the dtype {found.dtype}")
        return found

    def _error(self, table: TableHeader, what: str) -> CheckpointError:
        return self.checkpoint.error(
            f"names and tables disagree about the table {self.prefix + table.attribute!r}: {what}"
        )

    # -- into a ParameterDict ------------------------------------------------------------------------------------------

    def load_into(
        self,
        module: ParameterDict,
        prefix: str,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Fill the entries of a ParameterDict; an empty one takes over the names."""
        if not module._parameters and len(module) == 0:
            module._insert(self.index.names(), self._parameters())
            return
        parameters, values, classes, firsts = sorted_parameters(module)
        names = list(parameters)
        places = self.index.places(names)
        missing_keys += [prefix + names[at] for at in places.missing().tolist()]
        if strict and len(places.found()) < len(self.index):
            there = set(names)
            unexpected_keys += [prefix + name for name in self.index if name not in there]
        for number, there_, of_table in places.by_table():
            rows = self.table(self.header.tables[number])
            chosen = [values[at] for at in there_.tolist()] if len(there_) < len(values) else values
            of_class = np.array([values[at].shape == rows.shape[1:] for at in firsts] + [False])
            fits = of_class[classes[there_]]
            for at in np.flatnonzero(classes[there_] < 0).tolist():
                fits[at] = chosen[at].shape == rows.shape[1:]
            if not fits.all():
                error_msgs += [
                    f"size mismatch for {prefix + names[at]}: copying a param with shape {rows.shape[1:]} from "
                    f"checkpoint, the shape in current model is {values[at].shape}."
                    for at in there_[~fits].tolist()
                ]
                there_, of_table = there_[fits], of_table[fits]
                chosen = [values[at] for at in there_.tolist()]
            scatter(rows, of_table, chosen)

    def _parameters(self) -> list[Any]:
        """Return a new Parameter for each name, in order; those of a table share its memory."""
        found = np.empty(len(self.index), object)
        for number, there, rows in self.index.places().by_table():
            table = self.header.tables[number]
            data = self.table(table, loads=True)
            shape = list(data.shape[1:])
            numel = prod(shape)
            made: list[Any]
            if numel and data.device.type in ("cpu", "cuda"):
                offsets = (rows * numel).tolist()
                made = slab_views(data, offsets, [shape] * len(there), requires_grad=table.trainable)
            else:
                # Each by itself: in one storage they would be taken for tied.
                made = [Parameter(data[row].clone(), requires_grad=table.trainable) for row in rows.tolist()]
            for at, one in zip(there.tolist(), made, strict=True):
                found[at] = one
        return found.tolist()

    def state(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the entries as a state dict has them: for modules that know nothing of tables."""
        tables = [self.table(table).unbind() for table in self.header.tables]
        for name, number, row in self.index.entries():
            yield prefix + name, tables[number][row]


class NamedTensors:
    """Tensors by name, which an empty ParameterDict takes over.

    Parameters
    ----------
    tensors
        In order.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def load_into(self, module: ParameterDict, *_: object) -> None:
        """Make entries of copies."""
        values = [Parameter(one.clone(), one.is_floating_point() or one.is_complex()) for one in self.tensors.values()]
        module._insert(list(self.tensors), values)


class _Stacked:
    """The tensors of a file in which each name has one, as a dictionary."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, *, loads: bool) -> None:
        self.prefix = ""
        self.index, self._tables = checkpoint.stacked(prefix, loads=loads)
        if "" in self.index:
            raise checkpoint.error("a tensor has the empty name, which no entry can have")
        headers = []
        for number, table in enumerate(self._tables):
            trainable = table.is_floating_point() or table.is_complex()
            attribute = Kind(tuple(table.shape[1:]), table.dtype, trainable).attribute()
            headers.append(TableHeader(f"{attribute}.{number}", 0, trainable, len(table)))
        self.header = Header(tuple(headers))

    def table(self, table: TableHeader, *, loads: bool = False) -> Tensor:
        """Return the rows of a table, ``[capacity, *shape]``, as they have been read."""
        return self._tables[self.header.tables.index(table)]


def load_named(checkpoint: Checkpoint, sd: StackedParameterDict) -> bool:
    """Load a file that has a tensor for each name into a dictionary that has just these names, in their shapes.

    Without a tensor for each. If anything differs nothing is loaded, and the result is false: torch's way, by the state
    dict, then says what it is.
    """
    others = sd._modules or sd._buffers or sd._load_state_dict_post_hooks or len(sd._parameters) != len(sd._tables)
    if others or changes_what_is_loaded(sd) or is_intercepted():
        return False
    part = _Stacked(checkpoint, "", loads=False)
    with sd._lock:
        if not 0 < len(sd._index) == len(part.index):
            return False
        saved, own = part.index.places(), sd._index.places(part.index.names())
        saved_rows, own_rows = saved.rows, own.rows
        plan = []
        for (of_file, number), there in partition([saved.tables, own.tables]):
            parameter = sd._parameters[sd._tables[number].attribute] if number >= 0 else None
            rows = part.table(part.header.tables[of_file])
            if type(parameter) is not Parameter or type(parameter.data) is not Tensor or parameter.is_meta:
                return False
            if parameter.shape[1:] != rows.shape[1:]:
                return False
            plan.append((parameter, own_rows[there], rows, saved_rows[there]))
        for parameter, places, rows, chosen in plan:
            together = len(chosen) == len(rows) and bool((np.diff(chosen) == 1).all())
            write_rows(parameter, places, rows if together else rows[torch.from_numpy(chosen)])
        note_load(sd)
    return True


# -- a StackedParameterDict --------------------------------------------------------------------------------------------


def open_dictionary(
    checkpoint: Checkpoint,
    prefix: str = "",
    names: Names | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> StackedParameterDict:
    """Return a StackedParameterDict of everything below a prefix; see :func:`pdrs.open`."""
    dictionaries = {
        one: SavedDictionary(checkpoint, one, one.removeprefix(prefix))
        for one in checkpoint.prefixes()
        if one.startswith(prefix)
    }
    around = {
        one: SavedDictionary(checkpoint, one)
        for one in checkpoint.prefixes()
        if prefix.startswith(one) and one not in dictionaries
    }
    if not dictionaries and not around and not continues(checkpoint):
        sd = StackedParameterDict()
        loads = names is None and is_loaded(device, dtype)
        part = _Stacked(checkpoint, prefix, loads=loads)
        if prefix and not len(part.index):
            raise KeyError(f"nothing in the checkpoint begins with {prefix!r}")
        fill(sd, [part], checkpoint, prefix, None if names is None else as_list(names), device, dtype)
        return sd
    members = {name: one for one, saved in (dictionaries | around).items() for name in saved.members()}
    within = {one: saved for one, saved in around.items() if saved.narrow(prefix.removeprefix(one))}
    dictionaries |= within
    parts: dict[Any, SavedDictionary | str] = {}
    for name in checkpoint.names:
        if name in members:
            if members[name] in dictionaries:
                parts[members[name], None] = dictionaries[members[name]]
        elif name.startswith(prefix) and len(name) > len(prefix):
            parts[name] = name
    if not parts and prefix:
        raise KeyError(f"nothing in the checkpoint begins with {prefix!r}")
    sd = StackedParameterDict()
    chosen = None if names is None else as_list(names)
    fill(sd, list(parts.values()), checkpoint, prefix, chosen, device, dtype, gathers=bool(within))
    return sd


def continues(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an archive that continues another."""
    return isinstance(checkpoint, Archive) and checkpoint.previous is not None


def is_loaded(device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether tables are to be read as they are, and not mapped: what is converted or sent off is read from a map."""
    return device is not None and device.type == "cpu" and dtype is None


def fill(
    sd: StackedParameterDict,
    parts: Iterable[SavedDictionary | _Stacked | str],
    checkpoint: Checkpoint | None = None,
    prefix: str = "",
    names: list[str] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    gathers: bool = False,
) -> None:
    """Fill an empty dictionary with those of a checkpoint, and with single tensors, given by their names.

    With ``gathers``, or if there are ``names``, rows that are not asked for are left where they are.
    """
    parts = list(parts)
    alone = len(parts) == 1
    tables: list[tuple[SavedDictionary | _Stacked | None, str, TableHeader]] = []
    for part in parts:
        if not isinstance(part, str):
            tables += [(part, part.prefix + table.attribute, table) for table in part.header.tables]
            if alone:
                sd.__dict__["_patterns"] = part.header.patterns
            continue
        assert checkpoint is not None
        differentiable = checkpoint.dtype(part).is_floating_point or checkpoint.dtype(part).is_complex
        tables.append((None, part, TableHeader("", 0, differentiable, 1)))
    index = _joined(parts, prefix, checkpoint, [table.used for _, _, table in tables])
    if gathers and names is None:
        names = index.names()
    is_whole = names is None
    places = index.places() if names is None else _chosen(index, names)
    of_tables = {number: (there, rows) for number, there, rows in places.by_table()}
    made = []
    for number, (part_, name, table) in enumerate(tables):
        if not is_whole and number not in of_tables:
            continue
        loads = is_whole and is_loaded(device, dtype)
        if part_ is None:
            assert checkpoint is not None
            rows = (checkpoint.load if loads else checkpoint.tensor)(name)[None]
        else:
            rows = part_.table(table, loads=loads)
        if not is_whole:
            rows = rows[torch.from_numpy(of_tables[number][1])]
        data = _moved(rows, device, dtype)
        trainable = table.trainable and (data.is_floating_point() or data.is_complex())
        attribute = table.attribute
        if not isinstance(part_, SavedDictionary) or hasattr(sd, attribute):
            attribute = Kind(tuple(rows.shape[1:]), rows.dtype, trainable).attribute()
        add_table(sd, attribute, Parameter(data, requires_grad=trainable), table.group if alone else 0)
        made.append(number)
    if names is not None:
        numbers, new_rows = np.empty(len(names), np.int64), np.empty(len(names), np.int64)
        for at, number in enumerate(made):
            there, _ = of_tables[number]
            numbers[there], new_rows[there] = at, np.arange(len(there))
        try:
            index = RowIndex.of(names, Places.of(numbers, new_rows), [len(of_tables[number][0]) for number in made])
        except ValueError as error:
            raise ValueError("expected each name once, got one twice") from error
    sd.__dict__["_index"] = index


def _chosen(index: RowIndex, names: list[str]) -> Places:
    places = index.places(names)
    missing = places.missing()
    if len(missing):
        listed = ", ".join(repr(names[at]) for at in missing[:_LISTED].tolist())
        more = ", ..." if len(missing) > _LISTED else ""
        raise KeyError(f"{len(missing)} of {len(names)} names are not in the checkpoint: {listed}{more}")
    return places


def _joined(
    parts: list[SavedDictionary | _Stacked | str], prefix: str, checkpoint: Checkpoint | None, used: list[int]
) -> RowIndex:
    """Return the names of all parts, whose tables follow each other."""
    if len(parts) == 1 and not isinstance(parts[0], str):
        return parts[0].index
    names: list[str] = []
    numbers, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    first = 0
    for part in parts:
        if isinstance(part, str):
            names.append(part.removeprefix(prefix))
            numbers.append(np.array([first]))
            rows.append(np.array([0]))
            first += 1
            continue
        names += part.index.names()
        places = part.index.places()
        numbers.append(places.tables + first)
        rows.append(places.rows)
        first += len(part.header.tables)
    try:
        return RowIndex.of(names, Places.of(np.concatenate(numbers), np.concatenate(rows)), used)
    except ValueError as error:
        assert checkpoint is not None
        raise checkpoint.error("a name is listed twice: as that of a tensor, or in two dictionaries") from error


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if device is None or device.type == "cpu":
        return tensor if tensor.dtype == wanted else empty(tensor.shape, dtype=wanted).copy_(tensor)
    if device.type != "cuda" or tensor.numel() == 0:
        return tensor.to(device, wanted)
    # What is read from the file goes through page-locked blocks, one at a time.
    groups, unusual = group_tensors([tensor], keep_strides=False)
    if unusual:
        return tensor.to(device, wanted)
    slab = torch.empty(groups[0].length, dtype=wanted, device=device)
    upload(groups[0], slab, wait=True)
    return slab[: tensor.numel()].view(tensor.shape)
