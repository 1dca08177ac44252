"""Entries that come and go: many in one call, all of them or none.

What can fail is done first: tables grow, and new rows get their values while they belong to nobody. Then one step puts
the names in place (see :mod:`pdrs._torch.transaction`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pdrs._core import Places, RowPlan, sort_tensors
from pdrs._rows.averages import refuse_mixing
from pdrs._rows.groups import groups_of
from pdrs._rows.in_ddp import warn_of_ranks
from pdrs._rows.room import begin_state, clear_rows, make_room, take_back
from pdrs._rows.store import device_of, numbers_by_kind, remove_last_table, table_for
from pdrs._rows.table import Kind, Rows, kind_of, parameter_of, refuse_foreign
from pdrs._rows.write import note_rows, share_memory, stack, write_rows
from pdrs._torch import huge_pages
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.names import Mask, Names, as_list, as_mask, is_mask
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = [
    "Initialiser",
    "as_last",
    "as_shape",
    "drop",
    "free_rows",
    "initialise",
    "insert",
    "insert_missing",
    "insert_values",
    "kind_to_insert",
    "missing_error",
    "move_to_end",
    "partition",
    "refuse_integers",
    "refuse_other",
    "refuse_others",
    "refuse_uncallable",
    "remove",
    "remove_entry",
    "rename",
    "retain",
    "select",
]

Initialiser = Callable[..., Any]

_EMPTY = 'parameter name can\'t be empty string ""'
# How many of many missing names an error lists.
_LISTED = 5


def missing_error(names: Sequence[str], absent: Rows) -> MissingEntryError:
    """Return the error for names that are not there; ``absent`` are their places in the list."""
    some = ", ".join(repr(str(names[at])) for at in absent[:_LISTED])
    more = ", ..." if len(absent) > _LISTED else ""
    return MissingEntryError(f"{len(absent)} of {len(names)} names are not in the dictionary: {some}{more}")


def as_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; TypeError for what is none, such as a number, which an embedding takes as its size."""
    if isinstance(shape, int):
        raise TypeError(f"expected the shape of an entry, such as ({shape},), got the number {shape}")
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"expected the shape of an entry as a sequence of int, got {shape!r}")
    return tuple(shape)


def refuse_integers(
    dtype: torch.dtype, instead: str = "insert torch.nn.Parameter(tensor, requires_grad=False)"
) -> None:
    """Raise RuntimeError if entries of a dtype cannot require gradients; ``instead`` is what to do then."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected a torch.dtype, such as torch.float32, got {dtype!r}")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise RuntimeError(
            f"only tensors of floating point or complex dtype can require gradients, got {dtype}: {instead}"
        )


def initialise(values: Tensor, init: Initialiser, names: list[str]) -> None:
    """Call ``init`` on zeros; ValueError if it returns values of its own, which would be lost."""
    refuse_uncallable(init)
    if _takes_names(init):
        if getattr(init, "__module__", None) == torch.nn.init.__name__:
            of_torch = f"torch.nn.init.{init.__name__}"
            raise TypeError(
                f"init with two parameters is called as init(rows, names), which {of_torch} does not take: "
                f"pass lambda rows: {of_torch}(rows, ...)"
            )
        made = init(values, names)
    else:
        made = init(values)
    if made is None or made is values:
        return
    if not isinstance(made, Tensor) or not (values.is_meta or share_memory(made, values)):
        what = f"a new tensor of shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise ValueError(
            "init must give the new rows their values in place and return nothing, as torch.nn.init.normal_ does; it "
            f"returned {what}, which would be lost"
        )


def refuse_uncallable(init: object) -> None:
    """Raise TypeError for an initialiser that cannot be called."""
    if not callable(init):
        raise TypeError(
            f"init must be a function that writes new rows in place, such as torch.nn.init.normal_, got {init!r}"
        )


def _takes_names(init: Initialiser) -> bool:
    """Whether ``init`` is to be called with the names, too: two of its parameters must be given."""
    try:
        parameters = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):  # of what is written in C
        return False
    needed = [
        one
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2


# -- inserting ---------------------------------------------------------------------------------------------------------


def kind_to_insert(
    sd: StackedParameterDict,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    also_no_grad: bool = False,
) -> Kind:
    """Return the kind that is asked for, or that of the only table that can be meant.

    With ``also_no_grad`` it may be a table without gradients.
    """
    shape = None if shape is None else as_shape(shape)
    kinds = {kind_of(sd, table)._replace(group=0) for table in sd._tables}
    all_fitting = {kind for kind in kinds if (shape is None or kind.shape == shape) and dtype in (None, kind.dtype)}
    fitting = {kind for kind in all_fitting if kind.trainable} or (all_fitting if also_no_grad else set())
    if len(fitting) == 1:
        return fitting.pop()
    if shape is None:
        if all_fitting and not fitting:
            raise ValueError(
                "no table requires gradients: pass shape= to make one that does, or insert "
                "torch.nn.Parameter(tensor, requires_grad=False)"
            )
        none = f"no table is of {dtype}" if sd._tables else "there is no table yet"
        which = f"{len(fitting)} tables could be meant" if fitting else none
        raise ValueError(f"pass shape=, the shape of an entry, because {which}")
    return Kind(shape, dtype or torch.get_default_dtype())


def refuse_other(
    found: Kind, shape: Sequence[int] | None, dtype: torch.dtype | None, whose: str = "the names are"
) -> None:
    """Raise ValueError if entries are of another kind than is asked for."""
    wanted = Kind(found.shape if shape is None else as_shape(shape), dtype or found.dtype)
    if wanted[:2] != found[:2]:
        raise ValueError(f"expected {wanted}, as shape= and dtype= say, but {whose} {found}: leave them out")


def insert(
    self: StackedParameterDict,
    names: Names,
    *,
    init: Initialiser | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Insert the missing names at the end, in order. **O(m)** for ``m`` names.

    Parameters
    ----------
    names
        A list, array or other iterable of ``str``. Existing names stay as they are.
    init
        Writes the values of new rows in place, as ``torch.nn.init.normal_`` does. It is called once, with a tensor
        ``[new names, *shape]`` of zeros: ``init(rows)``, or ``init(rows, names)`` if it has two parameters without
        defaults. Without it, new rows are zeros.
    shape, dtype
        The shape and dtype of an entry. Needed only if they cannot be inferred from the only table.

    Returns
    -------
    list of str
        The names that were inserted.

    Raises
    ------
    KeyError
        If a name is empty.
    ValueError
        If the shape cannot be inferred, or if an existing name has another. Also if ``init`` returned values instead of
        writing them.
    TypeError
        If ``init`` is not a function. Also if it is one of ``torch.nn.init`` that takes a value, such as ``constant_``:
        pass ``lambda rows: torch.nn.init.constant_(rows, 0.5)``.
    RuntimeError
        If an optimizer that is not attached has stepped on the table, and new names make it grow or use old rows again.
        After any error, nothing has changed.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.insert(["b", "c"], init=torch.nn.init.ones_)
    ['c']
    >>> sd["c"].tolist()
    [1.0, 1.0]

    """
    listing = as_list(names)
    with self._lock.change():
        if init is not None:
            refuse_uncallable(init)
        if shape is not None or dtype is not None:
            refuse_others(self, listing, shape, dtype)
        return insert_missing(self, listing, init, shape, dtype)


def refuse_others(
    sd: StackedParameterDict, names: list[str], shape: Sequence[int] | None, dtype: torch.dtype | None
) -> None:
    """Raise ValueError if one of the names is there, and of another kind than is asked for."""
    for number, there, _ in sd._index.places(names).by_table():
        refuse_other(kind_of(sd, sd._tables[number]), shape, dtype, f"{names[there[0]]!r} is there, and is")


def rename(self: StackedParameterDict, old: str, new: str) -> None:
    """Give an entry another name. Its place in the order and its row stay. **O(1)**.

    Raises
    ------
    KeyError
        If ``old`` is missing, or ``new`` is empty.
    ValueError
        If ``new`` exists already, or if it belongs to another parameter group than ``old``. Then pop the one and set
        the other, which begins its optimizer state anew.
    TypeError
        If a name is not a ``str``.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.rename("a", "first")
    >>> list(sd)
    ['first', 'b']

    """
    _check_name(self, old)
    if not isinstance(new, str):
        raise TypeError(f"names must be str, got {type(new).__name__}")
    if not new:
        raise KeyError(_EMPTY)
    with self._lock.change():
        plan = self._index.plan_rename(old, new)
        groups = groups_of(self._patterns, [old, new])
        if groups is not None and groups[0] != groups[1]:
            raise ValueError(
                f"'{new}' belongs to another parameter group than '{old}': pop '{old}' and set '{new}', which begins "
                "its optimizer state anew"
            )
        changes = Changes()
        changes.call(self._index.commit, plan)
        changes.make()


def move_to_end(self: StackedParameterDict, name: str, last: bool = True) -> None:
    """Move an entry to the end, or to the beginning. Its row stays. **O(1)**.

    Raises
    ------
    KeyError
        If ``name`` is missing.
    TypeError
        If ``name`` is not a ``str``, or ``last`` is not a bool.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.zeros(2, 2))
    >>> sd.move_to_end("a")
    >>> list(sd)
    ['b', 'a']

    """
    _check_name(self, name)
    with self._lock.change():
        changes = Changes()
        changes.call(self._index.commit, self._index.plan_move_to_end(name, as_last(last)))
        changes.make()


def as_last(last: object) -> bool:
    """Return the argument ``last`` of a method; TypeError if it is not a bool."""
    if not isinstance(last, bool):
        raise TypeError(f"last must be a bool, got {last!r}")
    return last


def _check_name(sd: StackedParameterDict, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names must be str, got {type(name).__name__}")
    if name not in sd._index:
        raise MissingEntryError(name)


@untraced
def insert_missing(
    sd: StackedParameterDict,
    names: Names,
    init: Initialiser | None,
    shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    and_then: Callable[[Changes], None] | None = None,
    agreed: bool = False,
) -> list[str]:
    """Insert the names that are not there, in order, within a change, and return them.

    ``and_then`` is for :func:`_carry_out`. ``agreed`` says that all ranks insert the same.
    """
    new = sd._index.missing(names)
    if "" in new:
        raise KeyError(_EMPTY)
    kind = kind_to_insert(sd, shape, dtype)
    refuse_integers(kind.dtype)
    values = huge_pages.full((len(new), *kind.shape), 0, dtype=kind.dtype, device=device_of(sd))
    if init is not None:
        with torch.no_grad():
            initialise(values, init, new)
    groups = np.array(groups_of(sd._patterns, new) or np.zeros(len(new), np.int64))
    plan = []
    for group in np.unique(groups):
        there = np.flatnonzero(groups == group)
        part = values if len(there) == len(values) else values[torch.from_numpy(there).to(values.device)]
        plan.append(_Part(kind._replace(group=int(group)), there, part))
    if new and not agreed:
        warn_of_ranks(sd)
    _carry_out(sd, new, plan, and_then)
    return new


@untraced
def insert_values(sd: StackedParameterDict, names: list[str], values: list[Any], distinct: bool = False) -> None:
    """Set entries, within a change: all, or, if one cannot be taken, none."""
    names = as_list(names)
    if "" in names:
        raise KeyError(_EMPTY)
    kinds, classes = _classes(names, values)
    if not distinct and len(set(names)) != len(names):
        last = {name: at for at, name in enumerate(names)}
        names, kept = list(last), list(last.values())
        values, kinds = [values[at] for at in kept], kinds[kept]
    held = sd._index.places(names).tables
    groups = groups_of(sd._patterns, names)
    # What decides where an entry goes: what it is, where it lies now, and its group of options.
    columns = [kinds, held]
    if groups is not None:
        columns.append(np.array(groups))
    plan, numbers = [], numbers_by_kind(sd)
    devices: dict[Kind, torch.device] = {}
    for place, there in partition(columns):
        class_, number = classes[int(place[0])], int(place[1])
        group = int(place[2]) if groups is not None else 0
        kind = _kind_for(sd, names[there[0]], class_, number, group, numbers)
        stays = number >= 0 and kind_of(sd, sd._tables[number]) == kind
        first = devices.setdefault(kind, class_.device)
        if first != class_.device and kind not in numbers:
            raise ValueError(
                f"expected a tensor on {first} for '{names[there[0]]}', as others that go to its new table, "
                f"got {class_.device}"
            )
        chosen = values if len(there) == len(values) else [values[at] for at in there]
        plan.append(_Part(kind, there, chosen, number, stays))
    _carry_out(sd, names, plan)


def _classes(names: list[str], values: list[Any]) -> tuple[Rows, list[_Class]]:
    """Return the class of each value, and what the classes are; TypeError if a value is no tensor."""
    kinds, firsts = sort_tensors(values)
    classes = [_Class(values[at]) for at in firsts]
    for at in np.flatnonzero(kinds < 0):
        value = values[at]
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            what = type(value).__name__ if not isinstance(value, Tensor) else f"one of layout {value.layout}"
            raise TypeError(
                f"expected a strided tensor for '{names[at]}', got {what}: a StackedParameterDict holds rows of "
                "tables; pdrs.ParameterDict holds Modules and other values, too"
            )
        class_ = _Class(value)
        if class_ not in classes:
            classes.append(class_)
        kinds[at] = classes.index(class_)
    return kinds, classes


def _kind_for(
    sd: StackedParameterDict, name: str, class_: _Class, number: int, group: int, numbers: dict[Kind, int]
) -> Kind:
    """Return the kind of the table for a value, where ``number`` is the table that the entry lies in, or -1."""
    trainable = class_.trainable is not False
    if number >= 0:
        held = parameter_of(sd, sd._tables[number])
        if held.dtype != class_.dtype:
            raise TypeError(f"expected {held.dtype} for '{name}', as its row has, got {class_.dtype}")
        if class_.trainable is None:
            trainable = held.requires_grad
    if trainable:
        refuse_integers(class_.dtype)
    kind = Kind(class_.shape, class_.dtype, trainable, group)
    there = numbers.get(kind)
    if there is not None:
        device = parameter_of(sd, sd._tables[there]).device
        if device != class_.device:
            raise ValueError(f"expected a tensor on {device} for '{name}', where its table lies, got {class_.device}")
    return kind


def _carry_out(
    sd: StackedParameterDict,
    names: list[str],
    plan: list[_Part],
    and_then: Callable[[Changes], None] | None = None,
) -> None:
    """Set entries whose names are distinct.

    What ``and_then`` notes, when the tables have the room that they will have, is changed in the same step.
    """
    tables, numbers, changes = len(sd._tables), numbers_by_kind(sd), Changes()
    try:
        for number in {part.held for part in plan if part.held >= 0 and not part.stays}:
            take_back(sd, sd._tables[number])  # before anything is noted that is to be written to it
        targets = np.empty(len(names), np.int64)
        wanted: dict[int, int] = {}
        prepared: list[tuple[_Part, int, Tensor]] = []
        for part in plan:
            like = part.values if isinstance(part.values, Tensor) else part.values[0].detach()[None]
            number = part.held if part.stays else table_for(sd, part.kind, like.device, numbers)
            if part.stays:
                refuse_foreign(sd, sd._tables[number], "set names")
            block = part.values if isinstance(part.values, Tensor) else stack(part.values, like)
            # That of one tensor is the tensor itself, which may be a row that another part writes to.
            prepared.append((part, number, block.clone() if len(plan) > 1 and len(block) == 1 else block))
            targets[part.there] = number
            # Several parts may go to one table.
            wanted[number] = wanted.get(number, 0) + (0 if part.stays else len(part.there))
        for number, count in wanted.items():
            make_room(sd, number, count)
        placed = sd._index.plan_insert(names, targets)
        if "_averages" in sd.__dict__:
            refuse_mixing(sd, names, placed.places, tables)
        rows = placed.places.rows
        writes: list[tuple[Tensor, Rows, Tensor]] = []
        for part, number, block in prepared:
            parameter, of_part = parameter_of(sd, sd._tables[number]), rows[part.there]
            if part.stays:
                writes.append((parameter, of_part, block))
            else:
                write_rows(parameter, of_part, block)
                begin_state(sd, sd._tables[number], of_part)
        changes.call(sd._index.commit, placed)
        for parameter, of_part, block in writes:
            note_rows(changes, parameter, of_part, block)
        free_rows(sd, changes, placed.freed)
        if and_then is not None:
            and_then(changes)
        changes.make()
    except BaseException:
        while not changes.made and len(sd._tables) > tables:
            remove_last_table(sd)
        raise


# -- removing ----------------------------------------------------------------------------------------------------------


def select(self: StackedParameterDict, mask: Mask) -> list[str]:
    """Return the names, in order, for which a mask is true. **O(n)**.

    Parameters
    ----------
    mask
        bool ``[n]``: a tensor, an array, a column of another library, or a list.

    Raises
    ------
    TypeError
        If the mask has values that are not bool.
    ValueError
        If the mask has another length.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.tensor([[3.0], [0.1], [-2.0]]))
    >>> sd.select(sd.norms() > 1)
    ['a', 'c']

    """
    with self._lock:
        return self._index.select(mask)


@untraced
def drop(self: StackedParameterDict, names: Names | Mask, *, missing: Literal["error", "skip"] = "error") -> None:
    """Remove many entries at once. The others keep their order. **O(m)** for ``m`` names, **O(n)** for a mask.

    Their rows, their gradients and their state in attached optimizers become zero.

    Parameters
    ----------
    names
        Names, each listed once. Or a mask, as for :meth:`StackedParameterDict.select`.
    missing
        ``"error"`` raises if names are missing. ``"skip"`` ignores them.

    Raises
    ------
    KeyError
        If a name is missing. Then nothing has been removed.
    ValueError
        If a name is listed twice, or if a mask has another length. Then nothing has been removed.
    TypeError
        If ``names`` are neither names nor a mask.

    Examples
    --------
    Prune the names with the smallest norms:

    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.tensor([[3.0], [0.1], [-2.0]]))
    >>> sd.drop(sd.norms() < 1)
    >>> list(sd)
    ['a', 'c']

    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing must be 'error' or 'skip', got {missing!r}")
    with self._lock:
        if is_mask(names):
            gone = self._index.select(names)
        else:
            gone = as_list(names)
            absent = self._index.places(gone).missing()
            if len(absent):
                if missing == "error":
                    raise missing_error(gone, absent)
                lacking = set(absent.tolist())
                gone = [name for at, name in enumerate(gone) if at not in lacking]
        with self._lock.change():
            try:
                plan = self._index.plan_remove(gone)
            except KeyError as error:
                if len(set(gone)) < len(gone):
                    raise ValueError(error.args[0]) from None
                raise
            remove(self, plan)


@untraced
def retain(self: StackedParameterDict, names: Names | Mask, *, missing: Literal["error", "skip"] = "error") -> None:
    """Remove all entries except the given ones, which keep their order. **O(n)**.

    Parameters
    ----------
    names
        Names to keep. Or a mask, as for :meth:`StackedParameterDict.select`.
    missing
        ``"error"`` raises if names are missing. ``"skip"`` ignores them.

    Raises
    ------
    KeyError
        If a name is missing. Then nothing has been removed.
    TypeError, ValueError
        If ``names`` are neither names nor a mask for all names.

    Examples
    --------
    >>> import torch, pdrs
    >>> sd = pdrs.StackedParameterDict.from_tensor(["a", "b", "c"], torch.eye(3))
    >>> sd.retain(["c", "a"])
    >>> list(sd)
    ['a', 'c']

    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing must be 'error' or 'skip', got {missing!r}")
    with self._lock.change():
        index = self._index
        if is_mask(names):
            kept = as_mask(names, len(index))
        else:
            wanted = as_list(names)
            places, kept = index.places(wanted), np.zeros(len(index), np.bool_)
            if missing == "error" and len(absent := places.missing()):
                raise missing_error(wanted, absent)
            of_table = {number: rows for number, _, rows in places.by_table()}
            for number, there, rows in index.places().by_table():
                if number in of_table:
                    is_wanted = np.zeros(index.used(number), np.bool_)
                    is_wanted[of_table[number]] = True
                    kept[there] = is_wanted[rows]
        remove(self, index.plan_remove(index.select(~kept)))


def remove_entry(sd: StackedParameterDict, name: str) -> None:
    """Remove one name, within a change; MissingEntryError if it is missing."""
    if not isinstance(name, str):
        raise TypeError(f"names must be str, got {type(name).__name__}")
    try:
        plan = sd._index.plan_remove([name])
    except KeyError:
        raise MissingEntryError(name) from None
    remove(sd, plan)


@untraced
def remove(sd: StackedParameterDict, plan: RowPlan) -> None:
    """Remove names, within a change."""
    changes = Changes()
    changes.call(sd._index.commit, plan)
    free_rows(sd, changes, plan.freed)
    changes.make()


@untraced
def free_rows(sd: StackedParameterDict, changes: Changes, freed: Places) -> None:
    """Note that rows which names lose become zero, and that what belongs to them goes, too."""
    for number, _, rows in freed.by_table():
        clear_rows(sd, changes, sd._tables[number], rows)


class _Class:
    """What tensors that go to one table have in common; ``trainable`` is None for those that are no Parameters."""

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(value.shape), value.dtype, value.device
        self.trainable = value.requires_grad if isinstance(value, Parameter) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class _Part:
    """Entries that go to one table: their places in the list of names, their values, and the table that has them."""

    def __init__(
        self, kind: Kind, there: Rows, values: list[Tensor] | Tensor, held: int = -1, stays: bool = False
    ) -> None:
        self.kind, self.there, self.values, self.held, self.stays = kind, there, values, held, stays


def partition(columns: list[Rows]) -> list[tuple[Rows, Rows]]:
    """Return the distinct rows of some columns, and the places where each stands, ascending."""
    if len(columns[0]) == 0:
        return []
    if all((column == column[0]).all() for column in columns):
        return [(np.array([column[0] for column in columns]), np.arange(len(columns[0])))]
    distinct, which = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(which.reshape(-1)))[:-1]
    return list(zip(distinct, np.split(order, ends), strict=True))
