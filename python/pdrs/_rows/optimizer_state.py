"""The state that optimizers keep for the rows of a table: which of it is by row, and who keeps some unasked.

For each parameter, torch's optimizers keep tensors of its shape (the moments of Adam) or with one number for each row.
They also keep numbers for the whole parameter (the count of steps). When rows of a table are moved or get other names,
state by row must follow, and it does in optimizers that are *attached*. Others are noticed by a hook that torch calls
after every step of every optimizer. They are also looked for once, when a dictionary that was loaded changes. A change
that would leave them with the state of other rows is refused.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter
from torch.optim import (
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pdrs._core import zero_row_of_state
from pdrs._rows import step_warnings
from pdrs._rows.by_row import ByRow
from pdrs._rows.initial_state import Beginning, as_pair, beginning, is_declared, is_known
from pdrs._rows.sparse_gradient import GradientRows, moved_rows
from pdrs._torch import huge_pages
from pdrs._torch.transaction import Changes

__all__ = [
    "begins_with_values",
    "carry",
    "fill_of",
    "forget_row",
    "forget_rows",
    "is_among",
    "is_optimizer",
    "is_watched",
    "join",
    "leave",
    "look_for_optimizers",
    "of_rows",
    "parts_of",
    "put_in_order",
    "refuse_strangers",
    "rows_and_beginnings",
    "states_of_zeros",
    "takers",
    "unwatch",
    "watch",
]

# The lists of a parameter group that have a place for each parameter. They stay the same: LBFGS holds the very list.
_IN_STEP = {"params", "param_names"}
# The optimizers that have stepped on each table, by its `id`, beside the table that this is the id of: a few weak
# references, which are looked through faster than a WeakSet, and found faster than in a WeakTensorKeyDictionary.
_stepped: dict[int, tuple[ref[Tensor], list[ref[Optimizer]]]] = {}
# How many parameters, and which at the ends, the groups of each optimizer had when it was last looked through.
_looked_through: WeakKeyDictionary[Optimizer, list[tuple[int, ...]]] = WeakKeyDictionary()
# All that these have by row begins with zeros, and all that has the shape of a table is by row.
_ZEROS = {Adadelta, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, SGD, SparseAdam}
_NUMBERS = (int, float, complex, str, bytes, Enum, np.generic, torch.dtype, torch.device, torch.Size)
# Longer lists are not of optimizers.
_MANY = 100
_hooked = False
_hook_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=lambda: _renew_hook_lock())


def _renew_hook_lock() -> None:
    # The thread that holds it may be none of a child's.
    global _hook_lock
    _hook_lock = threading.Lock()


def watch(parameter: Tensor, steppers: Iterable[Optimizer] = ()) -> None:
    """Note from now on which optimizers step on a table; ``steppers`` have done so before."""
    global _hooked
    with _hook_lock:
        if not _hooked:
            register_optimizer_step_pre_hook(step_warnings.before_step)
            register_optimizer_step_post_hook(_note_step)
            _hooked = True
    if _steppers(parameter) is None:
        key = id(parameter)
        _stepped[key] = ref(parameter, partial(_remove, key)), list(map(ref, steppers))
        # An optimizer that was looked through before may have this one.
        _looked_through.clear()


def is_watched(parameter: Tensor) -> bool:
    """Whether a tensor has been watched as a table."""
    return _steppers(parameter) is not None


def unwatch(parameter: Tensor) -> list[Optimizer]:
    """Forget a table, and return the optimizers that have stepped on it."""
    steppers = _steppers(parameter)
    if steppers is None:
        return []
    del _stepped[id(parameter)]
    return _alive(steppers)


def _steppers(parameter: Tensor) -> list[ref[Optimizer]] | None:
    watched = _stepped.get(id(parameter))
    return watched[1] if watched is not None and watched[0]() is parameter else None


def _remove(key: int, gone: ref[Tensor]) -> None:
    # Another tensor may have the id by now.
    watched = _stepped.get(key)
    if watched is not None and watched[0] is gone:
        del _stepped[key]


def _alive(steppers: list[ref[Optimizer]]) -> list[Optimizer]:
    # Of a copy: one that dies meanwhile takes itself out of the list.
    return [optimizer for one in tuple(steppers) if (optimizer := one()) is not None]


def _note_step(optimizer: Optimizer, _arguments: Any, _keywords: Any) -> None:
    # Behind every step of every optimizer of the process: all that is done each time is to count, and to look at the
    # ends, because parameters may be exchanged for as many others.
    groups = [group["params"] for group in optimizer.param_groups]
    which = [(len(each), *map(id, each[:1]), *map(id, each[-1:])) for each in groups]
    if _looked_through.get(optimizer) != which:
        _note(optimizer)
        step_warnings.hold(optimizer)
        if isinstance(optimizer, ByRow):
            optimizer.follow()  # one that was unpickled before its dictionary
        _looked_through[optimizer] = which
    step_warnings.after_step(optimizer)


def _note(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            steppers = _steppers(parameter)
            if steppers is not None and optimizer not in _alive(steppers):
                steppers.append(ref(optimizer, steppers.remove))


def look_for_optimizers() -> None:
    """Note optimizers that have state for tables, though they have not stepped: that of a checkpoint.

    torch has no hook for all that load something, so this looks through all objects that there are, which takes some
    tens of milliseconds for a million.
    """
    for one in gc.get_objects():
        if issubclass(type(one), Optimizer):
            try:
                if one.state:
                    _note(one)
            except Exception:  # of a wrapper that is half made, or has lost what it wraps
                continue


def parts_of(optimizer: Any) -> list[Any]:
    """Return the optimizers whose states an optimizer has: itself, or, where it is a wrapper, what it wraps, too.

    Wrappers (of accelerate, of Lightning) show the state of the optimizer inside; others (Lookahead) have one of their
    own beside it. Of several that have the same state it is the innermost, which has it when it is loaded anew, too.
    """
    own = {id(one) for group in optimizer.param_groups for one in group["params"]}
    found: list[Any] = []

    def visit(one: Any) -> None:
        held = {id(parameter) for group in one.param_groups for parameter in group["params"]}
        if any(one is other for other in found) or (one is not optimizer and not own & held):
            return
        found.append(one)
        for value in list(getattr(one, "__dict__", {}).values()):
            for inner in value if type(value) in (list, tuple) and len(value) < _MANY else (value,):
                if is_optimizer(inner):
                    visit(inner)

    visit(optimizer)
    return list({id(one.state): one for one in found}.values())


def is_optimizer(one: Any) -> bool:
    """Whether something has the state and the parameter groups of an optimizer."""
    return isinstance(one, Optimizer) or all(hasattr(type(one), name) for name in ("state", "param_groups", "step"))


def is_among(optimizer: Any, others: Sequence[Any]) -> bool:
    """Whether an optimizer, or one that has the same state, is among others."""
    return any(one is optimizer or one.state is optimizer.state for one in others)


def refuse_strangers(parameter: Tensor, attached: Sequence[Optimizer], what: str) -> None:
    """Raise if an optimizer that is not attached has state by row for a table."""
    steppers = _steppers(parameter)
    if steppers is None:
        return
    # Of a copy, as in `_alive`.
    for one in tuple(steppers):
        optimizer = one()
        if optimizer is None or is_among(optimizer, attached):
            continue
        if any(True for _ in of_rows(optimizer, parameter)):
            name = type(optimizer).__name__
            raise RuntimeError(
                f"cannot {what}: the state of an optimizer ({name}) that has stepped on it would belong to other "
                "names. Call attach_optimizer(optimizer) on this dictionary, so that the state follows the names"
            )


def of_rows(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the tensors of an optimizer's state that have a row for each row of a table.

    Raises
    ------
    RuntimeError
        If there is state that cannot be told to be by row or not.
    """
    if not is_known(optimizer):
        _refuse_state_elsewhere(optimizer, parameter)
    state = optimizer.state.get(parameter)
    if not state:
        return
    name = type(optimizer).__name__
    if not isinstance(state, dict):
        if _has_rows(state, parameter):
            raise RuntimeError(f"the state of {name} is a {type(state).__name__}: it cannot follow the rows of a table")
        return
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.dim() == 0 or _is_for_all_rows(optimizer, key, value, parameter):
                continue
            if type(value) not in (Tensor, Parameter) and not hasattr(value, "full_tensor"):
                raise RuntimeError(
                    f"the state '{key}' of {name} is of the class {type(value).__name__}, whose rows cannot be moved "
                    "or begun anew: give this dictionary an optimizer whose state is plain tensors, as torch's"
                )
            if _is_by_row(value, parameter):
                yield state, key
            elif not _is_by_column(value, parameter):
                raise RuntimeError(
                    f"the state '{key}' of {name} has the shape {list(value.shape)}, and the table "
                    f"{list(parameter.shape)}: it cannot follow the rows. If it was loaded, load the dictionary "
                    "first; else give this dictionary an optimizer with a row of state for each row, such as Adam"
                )
        elif _has_rows(value, parameter):
            raise RuntimeError(
                f"the state '{key}' of {name} is a {type(value).__name__} of tensors, which cannot follow the rows of "
                "a table: give this dictionary an optimizer whose state is plain tensors"
            )


def rows_and_beginnings(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[dict[str, Any], str, Beginning]]:
    """Yield the same, and what each begins with for a new row.

    Raises
    ------
    RuntimeError
        If that cannot be told.
    """
    for state, key in of_rows(optimizer, parameter):
        begin = beginning(optimizer, parameter, key)
        if begin is None:
            raise RuntimeError(
                f"the state '{key}' of {type(optimizer).__name__} has the shape of the table, but not a row for each "
                "of its rows: it cannot follow them"
            )
        yield state, key, begin


def fill_of(begin: Beginning) -> complex:
    """Return what rows are full of that nobody has; of these, the values are zeros."""
    return 0.0 if isinstance(begin, str) else begin


def begins_with_values(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer has state that begins with the value of a row, which has to be there before."""
    if _begins_with_zeros(optimizer):
        return False
    return any(begin == "value" for _, _, begin in rows_and_beginnings(optimizer, parameter))


def _begins_with_zeros(optimizer: Optimizer) -> bool:
    known = type(optimizer) in _ZEROS or (isinstance(optimizer, ByRow) and optimizer.begins_with_zeros())
    return known and not is_declared(optimizer)


def forget_row(optimizer: Optimizer, parameter: Tensor, row: int) -> None:
    """Set what an optimizer has for a row back to what it begins with."""
    state = optimizer.state.get(parameter)
    if _begins_with_zeros(optimizer) and not state:
        return
    if not _begins_with_zeros(optimizer) or type(state) is not dict or not zero_row_of_state(parameter, state, row):
        changes = Changes()
        forget_rows(changes, optimizer, parameter, np.array([row]))
        changes.make()


def states_of_zeros(optimizers: Iterable[ref[Optimizer]], parameter: Tensor) -> list[dict[str, Any]] | None:
    """Return what optimizers have for a table, if it all begins with zeros and lies in plain dicts."""
    found = []
    for reference in optimizers:
        optimizer = reference()
        state = None if optimizer is None else optimizer.state.get(parameter)
        if optimizer is not None and state:
            if not _begins_with_zeros(optimizer) or type(state) is not dict:
                return None
            found.append(state)
    return found


def forget_rows(
    changes: Changes, optimizer: Optimizer, parameter: Tensor, rows: NDArray[np.int64], gone: bool = False
) -> None:
    """Set what an optimizer has for rows back to what it begins with; rows that are ``gone`` have zeros as values."""
    index = torch.from_numpy(rows)
    for state, key, begin in rows_and_beginnings(optimizer, parameter):
        held = state[key]
        if held.is_sparse:  # the momentum of SGD, if gradients are sparse
            GradientRows(held).note(changes, held, rows)
        elif isinstance(begin, str) and not gone:
            values = parameter.detach().index_select(0, index.to(parameter.device)).to(held)
            changes.call(held.detach().index_copy_, 0, index.to(held.device), values)
        else:
            changes.call(held.detach().index_fill_, 0, index.to(held.device), fill_of(begin))


def _refuse_state_elsewhere(optimizer: Any, parameter: Tensor) -> None:
    """Raise if an optimizer keeps tensors like a table where they cannot be told to be its own."""
    ours = {id(one) for group in optimizer.param_groups for one in group["params"]}

    def look(value: Any, depth: int) -> bool:
        if isinstance(value, Tensor):
            # Not the gradient, which is followed.
            return id(value) not in ours and value is not parameter.grad and _looks_by_row(value, parameter)
        if isinstance(value, dict):
            return depth > 0 and any(look(one, depth - 1) for one in list(value.values()))
        if isinstance(value, list | tuple | set | deque):
            return depth > 0 and any(look(one, depth - 1) for one in list(value))
        return False

    places = [(key, value) for group in optimizer.param_groups for key, value in group.items() if key not in _IN_STEP]
    places += [(key, value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)]
    places += [(key, value) for key, value in vars(optimizer).items() if key not in ("state", "param_groups")]
    for key, value in places:
        if look(value, 4):
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps tensors of the size of a table in '{key}', and not in the state of "
                "the parameter: they cannot follow the rows"
            )


def _looks_by_row(value: Tensor, table: Tensor) -> bool:
    return value.dim() > 0 and len(value) > 1 and _is_by_row(value, table)


def _has_rows(value: Any, table: Tensor, depth: int = 6) -> bool:
    """Whether there is something in a value that may have a row for each row of a table: anything but numbers."""
    if value is None or isinstance(value, _NUMBERS) or callable(value):
        return False
    if isinstance(value, Tensor | np.ndarray):
        size = value.numel() if isinstance(value, Tensor) else value.size
        return value.ndim > 0 and (size != 1 or table.numel() == 1)
    if depth == 0:
        return True
    if isinstance(value, Mapping):
        return any(_has_rows(one, table, depth - 1) for one in [*value, *value.values()])
    if isinstance(value, list | tuple | set | frozenset | deque):
        return any(_has_rows(one, table, depth - 1) for one in value)
    slots = [getattr(value, name, None) for one in type(value).__mro__ for name in getattr(one, "__slots__", ())]
    if not slots and not hasattr(value, "__dict__"):
        return True  # it cannot be looked into
    return any(_has_rows(one, table, depth - 1) for one in [*slots, *getattr(value, "__dict__", {}).values()])


def carry(optimizer: Optimizer, source: Tensor, old: Tensor, target: Tensor, new: Tensor) -> None:
    """Copy what an optimizer has for rows of a table to rows of another, which begins with the numbers of the first."""
    by_row = {key: (state[key], fill_of(begin)) for state, key, begin in rows_and_beginnings(optimizer, source)}
    if not by_row:
        return
    begun_before = optimizer.state.get(target)
    # That of Adagrad is there before its first step, see `join`: it is to go on with the steps of the first table.
    if not begun_before or (isinstance(optimizer, Adagrad) and not begun_before.get("step", 1)):
        whole = {key: value for key, value in optimizer.state[source].items() if key not in by_row}
        begun = {
            key: moved_rows(rows, old[:0], new[:0], len(target))
            if rows.is_sparse
            else huge_pages.full_like(rows, len(target), fill)
            for key, (rows, fill) in by_row.items()
        }
        optimizer.state[target] = {**deepcopy(whole), **begun}
    for key, (rows, _) in by_row.items():
        held = optimizer.state[target].get(key)
        if not isinstance(held, Tensor):
            continue
        if rows.is_sparse:  # as it may be for one table, and not for another; the new rows are zeros before
            optimizer.state[target][key] = held + moved_rows(rows, old, new, len(target))
            continue
        if held.is_sparse:
            held = optimizer.state[target][key] = held.to_dense()
        held.index_copy_(0, new.to(rows.device), rows.index_select(0, old.to(rows.device)))


def _is_by_row(state: Tensor, table: Tensor) -> bool:
    # Of the table's shape, or with dimensions that have been summed over, as Adafactor's statistics of rows.
    if state.shape == table.shape:
        return True
    return (
        state.dim() == table.dim()
        and len(state) == len(table)
        and all(own in (1, size) for own, size in zip(state.shape[1:], table.shape[1:], strict=True))
    )


def _is_for_all_rows(optimizer: Optimizer, key: str, state: Tensor, table: Tensor) -> bool:
    if isinstance(optimizer, ByRow):
        return False  # it has numbers for all rows as tensors without dimensions
    if isinstance(optimizer, Adafactor):
        # Of a table with one row the shape does not tell.
        return key == "col_var" and table.dim() == 2
    return state.numel() == 1 and table.numel() != 1


def _is_by_column(state: Tensor, table: Tensor) -> bool:
    return state.dim() == table.dim() and len(state) == 1


def takers(optimizers: Sequence[Optimizer], pattern: str | None, tables: Iterable[Tensor]) -> list[Optimizer]:
    """Return the attached optimizers that a new table joins; two with different tables would both step on it.

    The table joins the first that has a parameter group with the pattern, or else the first that has tables of the
    dictionary. It also joins those that have exactly the same tables as that one.
    """
    ids = set(map(id, tables))
    held = [ids & {id(one) for group in each.param_groups for one in group["params"]} for each in optimizers]
    marked = [
        any("pattern" in group and group["pattern"] == pattern for group in each.param_groups) for each in optimizers
    ]
    ranks = [(not has, not own) for has, own in zip(marked, held, strict=True)]
    first = ranks.index(min(ranks))
    return [each for at, each in enumerate(optimizers) if at == first or (held[at] and held[at] == held[first])]


def join(optimizer: Optimizer, attribute: str, pattern: str | None, tables: Mapping[str, Tensor]) -> None:
    """Give a new table to an optimizer: to the parameter group with this pattern, or else to that of other tables.

    It goes after these, as it does in the dictionary, because state dicts of optimizers know parameters by their order.
    So an optimizer that is made of the saved dictionary has the same order.

    Parameters
    ----------
    optimizer
        One that is attached.
    attribute
        The name of the new table.
    pattern
        What marks the parameter group for it, where there is one.
    tables
        All tables of the dictionary, the new one too, by name.
    """
    ids = {id(table): name for name, table in tables.items()}
    groups = optimizer.param_groups
    marked = [group for group in groups if "pattern" in group and group["pattern"] == pattern]
    with_tables = [group for group in groups if any(id(one) in ids for one in group["params"])]
    group = (marked or with_tables or groups)[0]
    places = [at for at, one in enumerate(group["params"]) if id(one) in ids]
    place = places[-1] + 1 if places else len(group["params"])
    table = tables[attribute]
    if isinstance(optimizer, Adagrad):
        # Before torch 2.15 it begins its state when it is made, and not in the first step with a parameter.
        device = table.device if group.get("fused") else torch.device("cpu")
        total = torch.full_like(table, as_pair(group["initial_accumulator_value"], table), requires_grad=False)
        optimizer.state[table] = {"step": torch.zeros((), device=device), "sum": total}
    if any(one is table for each in groups for one in each["params"]):
        return  # optimizers that wrap each other have the same groups
    changes = Changes()
    changes.call(group["params"].insert, place, table)
    if "param_names" in group:
        changes.call(group["param_names"].insert, place, _prefix(groups, ids) + attribute)
    changes.make()


def _prefix(groups: list[dict[str, Any]], ids: Mapping[int, str]) -> str:
    """Return what stands before the names of tables where an optimizer was made of named parameters."""
    for group in groups:
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False):
            attribute = ids.get(id(parameter))
            if attribute is not None and name.endswith(attribute):
                return str(name.removesuffix(attribute))
    return ""


def leave(optimizer: Optimizer, parameter: Tensor | None) -> None:
    """Take a table away from an optimizer, and its state."""
    for group in optimizer.param_groups:
        places = [at for at, one in enumerate(group["params"]) if one is not parameter]
        for key in _IN_STEP & group.keys():
            group[key][:] = [group[key][at] for at in places]
    if parameter is not None:
        optimizer.state.pop(parameter, None)


def put_in_order(changes: Changes, optimizer: Optimizer, tables: Sequence[Tensor], gone: Sequence[Tensor]) -> None:
    """Give the tables of a dictionary another order among themselves, in every parameter group; take others away."""
    order, left = {id(table): at for at, table in enumerate(tables)}, set(map(id, gone))
    for group in optimizer.param_groups:
        parameters = group["params"]
        chosen = [at for at, one in enumerate(parameters) if id(one) not in left]
        places = [place for place, at in enumerate(chosen) if id(parameters[at]) in order]
        ordered = sorted((chosen[place] for place in places), key=lambda at: order[id(parameters[at])])
        for place, at in zip(places, ordered, strict=True):
            chosen[place] = at
        for key in _IN_STEP & group.keys():
            changes.replace_all(group[key], [group[key][at] for at in chosen])
    if gone:
        # All of it, because to look for a tensor in a dict runs Python code.
        changes.replace_all(
            optimizer.state, {one: state for one, state in optimizer.state.items() if id(one) not in left}
        )
