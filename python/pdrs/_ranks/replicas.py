"""Replicas: dictionaries that should be the same on all ranks, as under DDP.

A row number means a name only together with the index, which torch does not see. So ranks whose indices differ train
different names together. These functions compare them, make them equal, and insert the same names on all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from pdrs._ranks.agreement import CommonCall
from pdrs._rows import optimizer_state
from pdrs._rows.groups import groups_of
from pdrs._rows.insert import (
    Initialiser,
    initialise,
    insert_missing,
    kind_to_insert,
    refuse_others,
    refuse_uncallable,
)
from pdrs._rows.optimizers import attached, refuse_strangers
from pdrs._rows.same_names import CURE, are_same, digest, digests_of_names
from pdrs._rows.state_dict import conform, names_as_packed
from pdrs._rows.store import adopt, numbers_by_kind
from pdrs._rows.table import Kind, Table, mask_device, parameter_of, refuse_foreign
from pdrs._torch.names import Names, as_list
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced
from pdrs.stacked import StackedParameterDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

__all__ = ["broadcast", "check", "insert"]


class _Digests(NamedTuple):
    """What must be the same on all ranks, each as one number. The fields are the words of the error."""

    names: int
    rows: int
    tables: int
    groups: int
    frozen: int


# The names and the rows, by what changes when they do.
_known: WeakKeyDictionary[Module, tuple[tuple[int, int], int, int]] = WeakKeyDictionary()


# -- checking ----------------------------------------------------------------------------------------------------------


def check(module: Module, group: ProcessGroup | None = None, *, every: int | None = None) -> RemovableHandle | None:
    """Raise on all ranks if a StackedParameterDict differs between ranks. One small collective.

    All ranks must call it. Compared are names with their order and rows, tables with their sizes and dtypes, parameter
    groups, and the masks of ``freeze``. Values are not. **O(n)** if names have changed since the last call, otherwise
    **O(tables)**, and **O(capacity)** for tables with frozen rows.

    Parameters
    ----------
    module
        A StackedParameterDict, or a module that contains some.
    group
        The process group. The default is that of all ranks.
    every
        Check before each ``every``-th forward pass of ``module``, beginning with the next, instead of now.

    Returns
    -------
    RemovableHandle or None
        With ``every``, the handle whose ``remove()`` ends it.

    Raises
    ------
    RuntimeError
        If a dictionary differs. The message says which one, on which ranks, and in what.
    OutOfStepError
        If the ranks call different functions, or a rank does not come within a minute. The same for :func:`broadcast`
        and :func:`insert`.
    TypeError, ValueError
        If ``module`` is not a module, or ``every`` is not a positive int.

    Examples
    --------
    >>> import torch, pdrs.distributed
    >>> model = torch.nn.Sequential(pdrs.StackedParameterDict({"a": torch.zeros(2)}))
    >>> pdrs.distributed.check(model)

    """
    if every is None:
        _check(module, group)
        return None
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a positive int, got {every!r}")
    _refuse_no_module(module)
    passes = 0

    @untraced
    def before_forward(_module: Module, _arguments: Any) -> None:
        nonlocal passes
        passes += 1
        if (passes - 1) % every == 0:
            _check(module, group)

    return module.register_forward_pre_hook(before_forward)


@untraced
def _check(module: Module, group: ProcessGroup | None) -> None:
    ranks = CommonCall("check", group)
    found: list[tuple[str, int, _Digests]] = []
    try:
        found = [(name, len(one), _digests(one)) for name, one in _dictionaries(module)]
    except Exception as error:
        ranks.fail(error)
    headers = ranks.agree([len(found), digest(repr(found).encode("utf-8", "surrogatepass"))])
    if all(header == headers[0] for header in headers):
        are_same(one for _, one in _dictionaries(module))
        return
    _refuse_different(ranks, ranks.objects(found))


def _refuse_different(ranks: CommonCall, of_ranks: list[list[tuple[str, int, _Digests]]]) -> None:
    _refuse_other_modules(ranks, [[name for name, *_ in found] for found in of_ranks])
    differences = []
    for at, (name, count, digests) in enumerate(of_ranks[0]):
        parts: dict[str, None] = {}
        others: list[str] = []
        for rank, found in enumerate(of_ranks):
            _, other_count, other = found[at]
            if other != digests:
                differing = [part for part in _Digests._fields if getattr(other, part) != getattr(digests, part)]
                parts |= dict.fromkeys(differing)
                counted = f" ({other_count} names)" if "names" in differing else ""
                others.append(f"{ranks.global_rank(rank)}{counted}")
        if parts:
            counted = f" ({count} names)" if "names" in parts else ""
            which = f"'{name}'" if name else "the dictionary"
            differences.append(
                f"{which} differs in {', '.join(parts)}: rank {', '.join(others)} from rank "
                f"{ranks.global_rank(0)}{counted}"
            )
    raise RuntimeError(f"the ranks have different dictionaries: {'; '.join(differences)}. {CURE}")


def _refuse_other_modules(ranks: CommonCall, names: list[list[str]]) -> None:
    for rank, found in enumerate(names):
        if found != names[0]:
            raise RuntimeError(
                f"the ranks have different modules: those of StackedParameterDict are {names[0]} on rank "
                f"{ranks.global_rank(0)} and {found} on rank {ranks.global_rank(rank)}. Pass the same module on all "
                "ranks"
            )


def _dictionaries(module: Module) -> list[tuple[str, StackedParameterDict]]:
    _refuse_no_module(module)
    return [(name, one) for name, one in module.named_modules() if isinstance(one, StackedParameterDict)]


def _refuse_no_module(module: object) -> None:
    if not isinstance(module, Module):
        raise TypeError(f"expected a module, got {type(module).__name__}")


def _digests(sd: StackedParameterDict) -> _Digests:
    with sd._lock.read():
        counted = sd._index.moves, sd._index.inserts
        known = _known.get(sd)
        if known is None or known[0] != counted:
            known = _known[sd] = counted, *digests_of_names(sd)
        tables = [(table.attribute, *_facts(sd, table), sd._index.used(at)) for at, table in enumerate(sd._tables)]
        groups = sd._patterns, [table.group for table in sd._tables]
        masks = [table.frozen for table in sd._tables]
        frozen = [np.packbits(one.cpu().numpy()) if one is not None and one.any() else b"" for one in masks]
        return _Digests(*known[1:], _of_text(tables), _of_text(groups), digest(*frozen))


def _facts(sd: StackedParameterDict, table: Table) -> tuple[list[int], torch.dtype, bool]:
    parameter = parameter_of(sd, table)
    return list(parameter.shape), parameter.dtype, parameter.requires_grad


def _of_text(facts: object) -> int:
    return digest(repr(facts).encode("utf-8", "surrogatepass"))


# -- making equal ------------------------------------------------------------------------------------------------------


class _TableFacts(NamedTuple):
    """What the others need to know of a table, to receive its values."""

    attribute: str
    shape: list[int]
    dtype: torch.dtype
    trainable: bool
    is_frozen: bool


@untraced
def broadcast(module: Module, src: int = 0, group: ProcessGroup | None = None) -> None:
    """Give all ranks the names, rows, values, groups and frozen names of one rank. **O(n)**.

    All ranks must call it, before the module is wrapped into DDP or sharded, and before the first step of an optimizer.
    Tables are made, removed and resized as they are on that rank. Attached optimizers follow. Other parameters of the
    module stay as they are, because DDP broadcasts them. If there is an error before anything was sent, nothing has
    changed on any rank.

    Parameters
    ----------
    module
        A StackedParameterDict, or a module that contains some.
    src
        The rank that has what all get, numbered among all ranks.
    group
        The process group. The default is that of all ranks.

    Raises
    ------
    RuntimeError
        On all ranks, if one of them cannot follow. Its table is sharded, or an optimizer has state for its rows. Or it
        has a table of the same name, and of another shape or dtype.
    TypeError, ValueError
        If ``module`` is not a module, or ``src`` is not in the group.

    Examples
    --------
    >>> import torch, pdrs.distributed
    >>> model = torch.nn.Sequential(pdrs.StackedParameterDict({"a": torch.zeros(2)}))
    >>> pdrs.distributed.broadcast(model)       # on all ranks, then DistributedDataParallel(model)

    """
    ranks = CommonCall("broadcast", group)
    dictionaries, source = ranks.run(lambda: (_dictionaries(module), ranks.group_rank(src)))
    names = [name for name, _ in dictionaries]
    headers = ranks.agree([len(names), _of_text(names), source])
    if any(header[:2] != headers[0][:2] for header in headers):
        _refuse_other_modules(ranks, ranks.objects(names))
    if any(header[2] != headers[0][2] for header in headers):
        raise ValueError(f"src must be the same on all ranks, got {[ranks.global_rank(one[2]) for one in headers]}")
    if ranks.size == 1:
        return
    with ExitStack() as locks:
        ranks.run(lambda: [locks.enter_context(one._lock.change()) for _, one in dictionaries])
        all_facts = ranks.run(lambda: [_facts_to_send(one) for _, one in dictionaries])
        all_facts = ranks.object_of(source, all_facts)
        ranks.run(partial(_refuse_other_tables, [one for _, one in dictionaries], [facts for facts, _ in all_facts]))
        for (_, one), (facts, size) in zip(dictionaries, all_facts, strict=True):
            packed = names_as_packed(one) if ranks.rank == source else torch.empty(size, dtype=torch.uint8)
            ranks.share(packed, source)
            ranks.run(partial(_become, one, packed, facts))
            _share_values(ranks, source, one, facts)
    are_same(one for _, one in dictionaries)


def _facts_to_send(sd: StackedParameterDict) -> tuple[list[_TableFacts], int]:
    """Return the facts about all tables and the size of the packed names, if other values may come."""
    facts, optimizers = [], attached(sd)
    for table in sd._tables:
        refuse_foreign(sd, table, "broadcast it")
        parameter = parameter_of(sd, table)
        refuse_strangers(sd, table, parameter, optimizers, "broadcast a table")
        for optimizer in optimizers:
            if any(True for _ in optimizer_state.of_rows(optimizer, parameter)):
                raise RuntimeError(
                    f"cannot broadcast the table '{table.attribute}': {type(optimizer).__name__} has state for its "
                    "rows. Broadcast before the first step, or load the same state dicts of the model and of the "
                    "optimizer on all ranks"
                )
        is_frozen = table.frozen is not None
        facts.append(_TableFacts(table.attribute, *_facts(sd, table), is_frozen))
    return facts, len(names_as_packed(sd))


def _refuse_other_tables(dictionaries: list[StackedParameterDict], sent: list[list[_TableFacts]]) -> None:
    for sd, of_source in zip(dictionaries, sent, strict=True):
        own = {table.attribute: table for table in sd._tables}
        for facts in of_source:
            shape, dtype = facts.shape, facts.dtype
            if facts.attribute in own:
                shape, dtype, _ = _facts(sd, own[facts.attribute])
            if (shape[1:], dtype) != (facts.shape[1:], facts.dtype):
                raise RuntimeError(
                    f"cannot broadcast the table '{facts.attribute}': it has rows of shape {facts.shape[1:]} and "
                    f"{facts.dtype} on one rank, and of {shape[1:]} and {dtype} on another. Convert the module on all "
                    "ranks"
                )


def _become(sd: StackedParameterDict, packed: Tensor, facts: list[_TableFacts]) -> None:
    """Take names, rows and tables, whose values are still to come."""
    tables = {one.attribute: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in facts}
    conform(sd, packed, tables)
    for one, table in zip(facts, sd._tables, strict=True):
        parameter = parameter_of(sd, table)
        parameter.requires_grad_(one.trainable)
        mask = None
        if one.is_frozen:
            mask = torch.zeros(len(parameter), dtype=torch.bool, device=mask_device(parameter.device))
            if table.frozen is not None:
                mask.copy_(table.frozen)
        changes = Changes()
        changes.set_attributes(table, frozen=mask)
        changes.make()
    adopt(sd)


def _share_values(ranks: CommonCall, source: int, sd: StackedParameterDict, facts: list[_TableFacts]) -> None:
    for one, table in zip(facts, sd._tables, strict=True):
        ranks.share(parameter_of(sd, table), source)
        if one.is_frozen:
            ranks.share(cast(Tensor, table.frozen), source)


# -- inserting ---------------------------------------------------------------------------------------------------------


@untraced
def insert(
    stacked: StackedParameterDict,
    names: Names,
    group: ProcessGroup | None = None,
    *,
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Insert the names that any rank asks for on all ranks, in the same rows. **O(m)** for all their names.

    All ranks must call it, each with the names of its own batch, also if it has none. The new names of all ranks are
    sorted, and inserted at the end. It takes one small collective if there is nothing new, and four more otherwise.

    Parameters
    ----------
    stacked
        The dictionary of this rank.
    names
        As for :meth:`StackedParameterDict.insert`.
    group
        The process group. The default is that of all ranks.
    init
        As for :meth:`StackedParameterDict.insert`. It is called on the lowest rank of the group, and its values are
        sent to the others. Only there do random numbers go on. Without it, new rows are zeros.
    shape, dtype
        As for :meth:`StackedParameterDict.insert`.

    Returns
    -------
    list of str
        The names that were inserted, the same on all ranks.

    Raises
    ------
    RuntimeError
        On all ranks, if one of them fails, or if the dictionaries differ so that names would come into different rows.
        Then nothing has changed on any rank. The rank that fails raises its own error.

    Examples
    --------
    >>> import torch, pdrs.distributed
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> pdrs.distributed.insert(sd, ["d", "c", "a"], init=torch.nn.init.ones_)
    ['c', 'd']

    """
    ranks = CommonCall("insert", group)
    with ExitStack() as lock:
        wanted: list[str] = []
        text = np.empty(0, np.uint8)
        try:
            if not isinstance(stacked, StackedParameterDict):
                raise TypeError(f"expected a StackedParameterDict, got {type(stacked).__name__}")
            lock.enter_context(stacked._lock.change())
            if init is not None:
                refuse_uncallable(init)
            listing = as_list(names)
            if shape is not None or dtype is not None:
                refuse_others(stacked, listing, shape, dtype)
            wanted = stacked._index.missing(listing)
            text = _as_bytes(wanted)
        except Exception as error:
            ranks.fail(error)
        headers = ranks.agree([len(wanted), len(text)])
        if not any(count for count, _ in headers):
            return []
        texts = ranks.bytes_of_all(text, [size for _, size in headers])
        new = sorted(set().union(*map(_from_bytes, texts, [count for count, _ in headers])))
        _refuse_other_rows(ranks, stacked, new, shape, dtype)
        return _insert(ranks, stacked, new, init, shape, dtype)


def _as_bytes(names: list[str]) -> NDArray[np.uint8]:
    """Return the lengths of names and their text, in which a NUL or a lone surrogate may be."""
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    text = "".join(names).encode("utf-8", "surrogatepass")
    return np.concatenate([lengths.view(np.uint8), np.frombuffer(text, np.uint8)])


def _from_bytes(data: NDArray[np.uint8], count: int) -> Iterable[str]:
    ends = np.cumsum(np.frombuffer(data[: 8 * count].tobytes(), np.int64)).tolist()
    text = data[8 * count :].tobytes().decode("utf-8", "surrogatepass")
    return [text[begin:end] for begin, end in pairwise([0, *ends])]


def _refuse_other_rows(
    ranks: CommonCall, sd: StackedParameterDict, new: list[str], shape: Sequence[int] | None, dtype: torch.dtype | None
) -> None:
    """Raise on all ranks if names that are new on one are there on another, or would come into different rows."""
    lacking, layout = 0, 0
    try:
        lacking = len(sd._index.missing(new))
        tables = [(table.attribute, table.group, *_facts(sd, table)) for table in sd._tables]
        used = [(sd._index.used(at), sd._index.count(at)) for at in range(len(sd._tables))]
        free = [sd._index.free(at) for at, (given, taken) in enumerate(used) if given != taken]
        kind = kind_to_insert(sd, shape, dtype)
        _refuse_change(sd, kind, new)
        facts = len(sd), tables, used, sd._patterns, kind
        layout = digest(repr(facts).encode("utf-8", "surrogatepass"), *free)
    except Exception as error:
        ranks.fail(error)
    headers = ranks.agree([lacking, layout])
    for rank, (count, _) in enumerate(headers):
        if count != len(new):
            raise RuntimeError(
                f"rank {ranks.global_rank(rank)} has {len(new) - count} of {len(new)} names that are new on another "
                f"rank, so the dictionaries differ. {CURE}"
            )
    others = [ranks.global_rank(rank) for rank, header in enumerate(headers) if header != headers[0]]
    if others:
        raise RuntimeError(
            f"names would come into different rows: the tables, free rows or groups of the dictionary, or shape= and "
            f"dtype=, are not those of rank {ranks.global_rank(0)} on {others}. {CURE}"
        )


def _refuse_change(sd: StackedParameterDict, kind: Kind, new: list[str]) -> None:
    """Raise what a change of the tables for new names would raise, before any rank has begun with it."""
    counts = Counter(groups_of(sd._patterns, new) or [0] * len(new))
    numbers = numbers_by_kind(sd)
    for group, count in counts.items():
        number = numbers.get(kind._replace(group=group))
        if number is None:
            continue
        table = sd._tables[number]
        refuse_foreign(sd, table, "insert names")
        parameter = parameter_of(sd, table)
        grows = sd._index.capacity_for(number, count, len(parameter)) != len(parameter)
        if grows or sd._index.reused(number, count):
            refuse_strangers(sd, table, parameter, attached(sd), "insert names")


def _insert(
    ranks: CommonCall,
    sd: StackedParameterDict,
    new: list[str],
    init: Initialiser | None,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> list[str]:
    def fill(rows: Tensor, names: list[str]) -> None:
        def values() -> None:
            if init is not None and ranks.rank == 0:
                initialise(rows, init, names)

        ranks.run(values)
        ranks.share(rows, 0)

    def all_can(_changes: Changes) -> None:
        ranks.agree()

    try:
        return insert_missing(sd, new, fill, shape, dtype, all_can, agreed=True)
    except Exception as error:
        ranks.fail(error)
