"""``pdrs.distributed.load``: fills a model on any number of ranks, each of which reads what it owns."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys

from pdrs._core import RowIndex
from pdrs._files.checkpoint_file import EXTRA_STATE, CheckpointError
from pdrs._files.load_module import IncompatibleKeys, load_module
from pdrs._files.partial_read import Names, Part, as_range, joined, packed_of
from pdrs._files.saved_dictionary import PackedDictionary
from pdrs._files.set_file import SetFile, open_archive
from pdrs._files.set_manifest import HIDDEN, MANIFEST, Manifest
from pdrs._ranks.agreement import CommonCall
from pdrs._ranks.checkpoint_save import HASH, HASH_SEED, TIMEOUT
from pdrs._ranks.model_parts import Parts, value_of
from pdrs._ranks.owners import BUCKETS
from pdrs._ranks.row_order import buckets_of_rank
from pdrs._ranks.taken_over import Loaded, LoadedTable, TakeOver, fill_for, placed, room_for
from pdrs._rows.names_codec import Header, TableHeader
from pdrs._rows.state_dict import header_of
from pdrs._rows.table import parameter_of
from pdrs.parameter_dict import ParameterDict
from pdrs.stacked import StackedParameterDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = [
    "check_dictionary",
    "check_optimizers",
    "fill_table",
    "index_of",
    "load",
    "numbers_of",
    "put_dense",
    "read_bytes",
]

_LISTED = 5
# How many bytes the last load of this process has asked the system for, for tests and benchmarks.
_asked = [0]


def read_bytes() -> int:
    """Return how many bytes the last :func:`load` has read on this rank, without headers."""
    return _asked[0]


def load(
    folder: str | os.PathLike[str],
    model: Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    strict: bool = True,
    verify: bool = False,
) -> IncompatibleKeys:
    """Fill a model and its optimizers with what :func:`save` wrote, on any number of ranks. **O(n)**.

    All ranks must call it. Each reads the names that it owns, their rows and states, and what all ranks have copies of.
    What the sharded dictionaries had before is gone. Their names come in the order of the files. Everything is read
    before anything is changed. If a rank fails, all raise, and all is as it was.

    Parameters
    ----------
    folder
        What was given to :func:`save`.
    model
        A module, also one in DDP. Its dictionaries have the seed and the shapes of those that were saved.
    optimizer
        The optimizers in the order in which they were saved, or None. An optimizer that is attached and not given
        begins anew.
    strict
        Whether missing and unexpected names outside of sharded dictionaries are errors, and missing dictionaries.
    verify
        Whether to read all files first and compare checksums. Each file is read by one rank.

    Returns
    -------
    NamedTuple
        ``missing_keys`` and ``unexpected_keys``, as from ``load_state_dict``.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, or of another set. The message names it. Other ranks raise a RuntimeError with
        the same message.
    ValueError
        If a dictionary has another seed, shape or dtype. Also if the optimizers have other classes or groups.
    RuntimeError
        If names or shapes outside of sharded dictionaries do not fit, or another rank has failed.
    OSError
        If a file cannot be read.
    OutOfStepError
        If the ranks call different functions, or a rank does not come within an hour.

    Notes
    -----
    New tables lie beside the old ones in memory until all is read. So load into a new model where memory is scarce.
    If a hook of the model raises when its values are put in place, what is outside of sharded dictionaries may be half
    loaded, as after ``load_state_dict``.

    Examples
    --------
    >>> import os, tempfile, torch, pdrs.distributed
    >>> words = pdrs.distributed.ShardedParameterDict((2,))
    >>> _ = words.gather(["a", "b"], missing="insert")
    >>> folder = os.path.join(tempfile.mkdtemp(), "step-1")
    >>> _ = pdrs.distributed.save(words, folder)
    >>> others = pdrs.distributed.ShardedParameterDict((2,))
    >>> pdrs.distributed.load(folder, others)
    <All keys matched successfully>
    >>> sorted(others)
    ['a', 'b']

    """
    parts = Parts(model, optimizer)
    ranks = CommonCall("load", parts.group, TIMEOUT, f"{strict=}, {verify=}")
    folder = os.fsdecode(folder)
    text = ranks.run(lambda: Manifest.read(folder).to_text() if ranks.rank == 0 else "")
    text = ranks.object_of(0, text)
    with ExitStack() as opened:
        reader = ranks.run(lambda: _Reader(parts, folder, text, ranks, opened))
        if verify:
            ranks.run(reader.verify)
        finish = ranks.run(lambda: reader.read(strict))
        result = ranks.run(finish)
    _asked[0] = reader.asked
    return result


class _Reader:
    """Reads what a rank is to have of a set."""

    def __init__(self, parts: Parts, folder: str, text: str, ranks: CommonCall, opened: ExitStack) -> None:
        self._parts, self._folder, self._ranks = parts, folder, ranks
        self._path = os.path.join(folder, MANIFEST)
        self._manifest = Manifest.of_text(text, self._path)
        found = self._manifest.hash, self._manifest.hash_seed, self._manifest.buckets
        if found != (HASH, HASH_SEED, BUCKETS):
            raise CheckpointError(
                self._path,
                f"its names are spread by the hash {found[0]!r} with the seed {found[1]} over {found[2]} buckets, and "
                f"this version reads {HASH!r} with {HASH_SEED} over {BUCKETS}",
            )
        self._wanted = buckets_of_rank(parts.shard, parts.shards)
        self._files: dict[int, Part] = {}
        world = len(self._manifest.files)
        for rank, one in enumerate(self._manifest.files):
            own = buckets_of_rank(rank, world)
            # What all ranks have copies of is in the file of rank 0.
            if rank == 0 or max(own.start, self._wanted.start) < min(own.stop, self._wanted.stop):
                self._files[rank] = Part(opened.enter_context(open_archive(folder, one)))
        self._dense = opened.enter_context(SetFile(folder, self._manifest, dense=True))
        self._own = {
            rank
            for rank in self._files
            if max(buckets_of_rank(rank, world).start, self._wanted.start)
            < min(buckets_of_rank(rank, world).stop, self._wanted.stop)
        }

    @property
    def asked(self) -> int:
        """How many bytes were read."""
        return sum(one.asked for one in self._files.values())

    def verify(self) -> None:
        """Compare the checksums of the files that fall to this rank."""
        for number, one in enumerate(self._manifest.files):
            if number % self._ranks.size == self._ranks.rank:
                with open_archive(self._folder, one) as archive:
                    archive.verify()

    def read(self, strict: bool) -> Callable[[], IncompatibleKeys]:
        """Read all, and return what puts it in place."""
        parts, manifest = self._parts, self._manifest
        lacking = [prefix for prefix in parts.sharded if prefix not in manifest.dictionaries]
        others = [prefix for prefix in manifest.dictionaries if prefix not in parts.sharded]
        if strict and (lacking or others):
            raise ValueError(
                f"{self._path}: expected the sharded dictionaries {sorted(parts.sharded)}, as the model has, got "
                f"{sorted(manifest.dictionaries)}"
            )
        if parts.optimizers:
            check_optimizers(parts, manifest.optimizers, self._path)
        missing, unexpected = _refuse_others(parts, self._dense, strict)
        takes = TakeOver(parts)
        for prefix, words in parts.sharded.items():
            if prefix in manifest.dictionaries:
                about = manifest.dictionaries[prefix]
                check_dictionary(words, about, f"{self._path}: the dictionary at {prefix!r}")
                takes.dictionary(words, self._dictionary(prefix, about))
        first = self._files[0]
        for number, optimizer in enumerate(parts.optimizers):
            about = manifest.optimizers[number]

            def tensor(name: str, key: str, number: int = number) -> Tensor:
                return first.load(f"{HIDDEN}optimizer.{number}.{name}.{key}")

            put_dense(parts, takes, optimizer, about, tensor)
        first.asked += sum(self._dense.tensor(name).nbytes for name in self._dense.names)

        def finish() -> IncompatibleKeys:
            with parts.without_sharded() as rest:
                load_module(rest, self._dense, strict)
            with parts.changing():
                takes.make()
            return _IncompatibleKeys([*missing, *lacking], [*unexpected, *others])

        return finish

    def _dictionary(self, prefix: str, about: dict[str, Any]) -> Loaded:
        """Read the names that this rank owns of a dictionary, their rows, and what belongs to them."""
        words = self._parts.sharded[prefix]
        world = len(self._manifest.files)
        found: list[tuple[Part, Names, list[str]]] = []
        for rank in sorted(self._own):
            part, one = self._files[rank], self._manifest.files[rank]
            first, counts = buckets_of_rank(rank, world).start, one.sorted.get(prefix, [])
            names, header = part.names(prefix, BUCKETS, self._wanted, first, counts)
            found.append((part, names, [table.attribute for table in header.tables]))
        numbers = numbers_of(words, about)
        index, rows = index_of(words, [self._numbered(each, numbers) for each in found], self._path)
        tables = []
        for attribute, facts in about["tables"].items():
            number = numbers[attribute]
            count = len(rows[number])
            wanted = [
                (part, as_range(names.rows[names.tables == attributes.index(attribute)]))
                for part, names, attributes in found
                if attribute in attributes
            ]

            def fill(
                key: str, out: Tensor, attribute: str = attribute, wanted: list[tuple[Part, Any]] = wanted
            ) -> None:
                name = f"{prefix}{attribute}" if key == "" else f"{HIDDEN}rows.{prefix}{attribute}.{key}"
                at = 0
                for part, own in wanted:
                    self._rows(part, name, own, out[at : at + len(own)], key)
                    at += len(own)

            def shape_of(key: str, attribute: str = attribute) -> tuple[tuple[int, ...], torch.dtype] | None:
                name = f"{HIDDEN}rows.{prefix}{attribute}.{key}"
                there = [part.archive for part, *_ in found if name in part.archive]
                return (there[0].shape(name)[1:], there[0].dtype(name)) if there else None

            tables.append(fill_table(self._parts, prefix, number, facts, count, about["gathers"], fill, shape_of))
        return Loaded(index, tables, int(about["gathers"]))

    def _rows(self, part: Part, name: str, rows: Any, out: Tensor, key: str) -> None:
        if key == "frozen" and name not in part.archive:
            return
        if key == "seen":
            narrow = torch.empty(len(out), dtype=part.archive.dtype(name))
            part.rows(name, rows, narrow)
            out.copy_(narrow)
            return
        part.rows(name, rows, out)

    def _numbered(self, one: tuple[Part, Names, list[str]], numbers: dict[str, int]) -> Names:
        """Return names with the numbers that their tables have in this model."""
        part, names, attributes = one
        try:
            number = np.array([numbers[attribute] for attribute in attributes], np.int64)
            return names._replace(tables=number[names.tables])
        except (KeyError, IndexError) as error:
            raise part.archive.error("names and tables disagree, or the manifest has other tables") from error


def index_of(words: Any, parts: list[Names], path: str) -> tuple[RowIndex, dict[int, np.ndarray[Any, Any]]]:
    """Return an index of names, and which rows each table has, one after another.

    ``parts`` have the numbers of this model's tables.
    """
    names = joined(parts)
    header = header_of(words.local)
    rows: dict[int, Any] = {}
    new = np.empty(len(names.rows), np.int64)
    tables = []
    for number, table in enumerate(header.tables):
        there = np.flatnonzero(names.tables == number)
        rows[number] = new[there] = np.arange(len(there))
        tables.append(TableHeader(table.attribute, table.group, table.trainable, len(there)))
    packed = packed_of(names._replace(rows=new), Header(tuple(tables), header.patterns))
    try:
        return RowIndex.of_bytes(packed), rows
    except ValueError as error:
        raise CheckpointError(path, f"the names are damaged: {error}") from error


def numbers_of(words: Any, about: dict[str, Any]) -> dict[str, int]:
    """Return the number of the table that each saved table goes to."""
    found = {}
    for attribute, facts in about["tables"].items():
        table = words._table_like(tuple(facts["shape"]), getattr(torch, facts["dtype"]))
        found[attribute] = next(at for at, one in enumerate(words.local._tables) if one is table)
    return found


def check_dictionary(words: Any, about: dict[str, Any], what: str) -> None:
    """Raise a ValueError if a dictionary cannot take over what was saved of another."""
    if about["seed"] != words._seed or about["init"] != repr(words._init):
        raise ValueError(
            f"{what} was saved with seed={about['seed']} and init={about['init']}, and the model has "
            f"seed={words._seed} and init={words._init!r}: new names would begin with other values"
        )
    for facts in about["tables"].values():
        try:
            words._table_like(tuple(facts["shape"]), getattr(torch, facts["dtype"]))
        except ValueError as error:
            raise ValueError(f"{what} does not fit: {error}") from error


def fill_table(
    parts: Parts,
    prefix: str,
    number: int,
    facts: dict[str, Any],
    count: int,
    gathers: int,
    fill: Callable[[str, Tensor], None],
    shape_of: Callable[[str], tuple[tuple[int, ...], torch.dtype] | None],
) -> LoadedTable:
    """Return what a table is to have, in memory.

    Parameters
    ----------
    parts, prefix, number
        Of the model, the dictionary, and the table.
    facts
        What the manifest says of the table.
    count
        How many names it has.
    gathers
        The number of the last gather.
    fill
        Writes rows: ``""`` stands for values, and other keys for what else belongs to rows.
    shape_of
        Gives the shape of a row, and the dtype, for such keys; None if there is none.
    """
    local = parts.sharded[prefix].local
    table = local._tables[number]
    parameter = parameter_of(local, table)
    capacity = max(count, len(parameter))
    data = room_for(count, capacity, tuple(parameter.shape[1:]), parameter.dtype)
    fill("", data[:count])
    others = {"seen": room_for(count, capacity, (), torch.int64, gathers)}
    fill("seen", others["seen"][:count])
    if shape_of("frozen") is not None:
        mask = torch.zeros(capacity, dtype=torch.bool, device="cpu")
        fill("frozen", mask[:count])
        if mask.any():
            others["frozen"] = mask
    for key in facts["rows"]:
        if not key.startswith("optimizer."):
            continue
        _, which, state = key.split(".", 2)
        if int(which) >= len(parts.optimizers):
            continue
        kind = shape_of(key)
        shape, dtype = kind if kind is not None else (tuple(parameter.shape[1:]), parameter.dtype)
        empty = fill_for(parts.optimizers[int(which)], parameter, state)
        others[key] = room_for(count, capacity, shape, dtype, empty)
        if count:
            fill(key, others[key][:count])
    return LoadedTable(table, data, others, facts["numbers"])


# -- optimizers --------------------------------------------------------------------------------------------------------


def check_optimizers(parts: Parts, about: list[Any], path: str) -> None:
    """Raise a ValueError if the optimizers are not like those that were saved."""
    if len(about) != len(parts.optimizers):
        raise ValueError(f"{path}: expected {len(about)} optimizers, as were saved, got {len(parts.optimizers)}")
    for number, (optimizer, one) in enumerate(zip(parts.optimizers, about, strict=True)):
        name = type(optimizer).__name__
        if name != one["class"]:
            raise ValueError(f"{path}: optimizer {number} was saved as {one['class']}, got {name}")
        saved = [sorted(group["params"]) for group in one["groups"]]
        own = [sorted(parts.names_in(group)) for group in optimizer.param_groups]
        if saved != own:
            at = next(
                (at for at, pair in enumerate(zip(saved, own, strict=False)) if pair[0] != pair[1]),
                min(len(saved), len(own)),
            )
            shown = [
                f"{one[at][:_LISTED]} of {len(one[at])}" if at < len(one) else "no such group" for one in (saved, own)
            ]
            raise ValueError(
                f"{path}: group {at} of optimizer {number} ({name}) was saved with the parameters {shown[0]}, and has "
                f"{shown[1]}"
            )


def put_dense(
    parts: Parts, takes: TakeOver, optimizer: Any, about: dict[str, Any], tensor: Callable[[str, str], Tensor]
) -> None:
    """Note the options and the states of dense parameters of an optimizer; ``tensor`` reads one."""
    for group, saved in zip(optimizer.param_groups, about["groups"], strict=True):
        takes.options(group, saved["options"])
        for parameter in group["params"]:
            if parts.owner_of(parameter) is not None:
                continue
            name = parts.name_of(parameter)
            state = about["states"].get(name, {"tensors": [], "numbers": {}})
            made: dict[str, Any] = {key: tensor(name, key).to(parameter.device) for key in state["tensors"]}
            for key, value in state["numbers"].items():
                made[key] = placed(optimizer, parameter, value_of(value))
            takes.dense(optimizer, parameter, made)


# -- everything else ---------------------------------------------------------------------------------------------------


def _refuse_others(parts: Parts, dense: SetFile, strict: bool) -> tuple[list[str], list[str]]:
    """Return missing and unexpected names outside of sharded dictionaries; raise if they, or shapes, do not fit."""
    with parts.without_sharded() as rest:
        inner = {
            name + "." if name else ""
            for name, one in rest.named_modules(remove_duplicate=False)
            if isinstance(one, ParameterDict | StackedParameterDict)
        }
        state = rest.state_dict()
    packed = {prefix: PackedDictionary(dense, prefix) for prefix in dense.prefixes()}
    within = tuple(prefix for prefix in packed if prefix in inner)
    # Dictionaries with packed names on both sides are compared when they are loaded.
    own = {name: one for name, one in state.items() if not within or not name.startswith(within)}
    members = {name for prefix, saved in packed.items() if prefix in inner for name in saved.members()}
    saved = {name: None for name in dense.names if name not in members}
    missing = [name for name in own if name not in saved and not name.endswith(EXTRA_STATE)]
    unexpected = [name for name in saved if name not in own]
    wrong = [
        f"size mismatch for {name}: the set has {list(dense.shape(name))}, and the model {list(one.shape)}"
        for name, one in own.items()
        if isinstance(one, Tensor) and name in dense and dense.shape(name) != tuple(one.shape)
    ]
    if strict and missing:
        wrong.append(f"Missing key(s): {', '.join(map(repr, missing[:_LISTED]))}")
    if strict and unexpected:
        wrong.append(f"Unexpected key(s): {', '.join(map(repr, unexpected[:_LISTED]))}")
    if wrong:
        raise RuntimeError(f"{dense.path} does not fit the model: {'; '.join(wrong[:_LISTED])}")
    return missing, unexpected
