"""The state that optimizers keep for the rows of a table: which of it is by row, and who keeps some unasked.

torch's optimizers keep, for each parameter, tensors of its shape (the moments of Adam) or with one number a row, and
numbers for the whole of it (the count of steps). When rows of a table are moved or get other names, the first must
follow. Optimizers that are *attached* are followed. Others are noticed when they step, by a hook that torch calls
behind every step of every optimizer, or are looked for once when a dictionary that was loaded changes, and it is
refused to do what would leave them with the state of other rows.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Adafactor, Adagrad, Optimizer, Rprop
from torch.optim.optimizer import register_optimizer_step_post_hook

from pdrs import _memory
from pdrs._core import zero_row_of_state
from pdrs._stacked.changes import Changes
from pdrs._stacked.gradient_rows import GradientRows, moved_rows

__all__ = [
    "carry",
    "forget_row",
    "forget_rows",
    "join",
    "leave",
    "look_for_optimizers",
    "of_rows",
    "put_in_order",
    "refuse_strangers",
    "takers",
    "unwatch",
    "watch",
]

# The lists of a parameter group that have a place for each parameter. They stay the same: LBFGS holds the very list.
_IN_STEP = {"params", "param_names"}
# The optimizers that have stepped on each table, by its `id`, beside the table that this is the id of: a few weak
# references, which are looked through faster than a WeakSet, and found faster than in a WeakTensorKeyDictionary.
_stepped: dict[int, tuple[ref[Tensor], list[ref[Optimizer]]]] = {}
# How many parameters each optimizer had when it was last looked through for tables.
_looked_through: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
# They have state that is not by row, though it may have the shape of a table, or does not begin with zeros.
_UNUSUAL = (Adafactor, Adagrad, Rprop)
_hooked = False
_hook_lock = threading.Lock()


def watch(parameter: Tensor, steppers: Iterable[Optimizer] = ()) -> None:
    """Note from now on which optimizers step on a table; ``steppers`` have done so before."""
    global _hooked
    with _hook_lock:
        if not _hooked:
            register_optimizer_step_post_hook(_note_step)
            _hooked = True
    if _steppers(parameter) is None:
        key = id(parameter)
        _stepped[key] = ref(parameter, partial(_remove, key)), list(map(ref, steppers))
        # An optimizer that was looked through before may have this one.
        _looked_through.clear()


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
    # Behind every step of every optimizer of the process: all that is done each time is to count.
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _looked_through.get(optimizer) == count:
        return
    _note(optimizer)
    _looked_through[optimizer] = count


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
        if issubclass(type(one), Optimizer) and getattr(one, "state", None):
            _note(one)


def refuse_strangers(parameter: Tensor, attached: Sequence[Optimizer], what: str) -> None:
    """Raise if an optimizer that is not attached has state by row for a table."""
    steppers = _steppers(parameter)
    if steppers is None:
        return
    # Of a copy, as in `_alive`.
    for one in tuple(steppers):
        optimizer = one()
        if optimizer is not None and optimizer not in attached and any(True for _ in of_rows(optimizer, parameter)):
            name = type(optimizer).__name__
            raise RuntimeError(
                f"cannot {what}: the state of an optimizer ({name}) that has stepped on it would belong to other "
                "names. Call attach(optimizer) on this dictionary, so that the state follows the names"
            )


def of_rows(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[dict[str, Any], str, complex]]:
    """Yield the tensors of an optimizer's state that have a row for each row of a table, and what each begins with.

    Raises
    ------
    RuntimeError
        If there is state that cannot be told to be by row or not.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.dim() == 0 or _is_for_all_rows(optimizer, key, value, parameter):
                continue
            if _is_by_row(value, parameter):
                yield state, key, _beginning(optimizer, parameter, key)
            elif not _is_by_column(value, parameter):
                raise RuntimeError(
                    f"the state '{key}' of {type(optimizer).__name__} has the shape {list(value.shape)}, and the table "
                    f"{list(parameter.shape)}: it cannot follow the rows. If it was loaded, load the dictionary first"
                )
        elif isinstance(value, list | tuple | dict) and any(isinstance(one, Tensor) for one in value):
            raise RuntimeError(
                f"the state '{key}' of {type(optimizer).__name__} is a {type(value).__name__} of tensors, which cannot "
                "follow the rows of a table"
            )


def forget_row(optimizer: Optimizer, parameter: Tensor, row: int) -> None:
    """Set what an optimizer has for a row back to what it begins with."""
    state = optimizer.state.get(parameter)
    if not state:
        return
    if isinstance(optimizer, _UNUSUAL) or type(state) is not dict or not zero_row_of_state(parameter, state, row):
        changes = Changes()
        forget_rows(changes, optimizer, parameter, np.array([row]))
        changes.make()


def forget_rows(changes: Changes, optimizer: Optimizer, parameter: Tensor, rows: NDArray[np.int64]) -> None:
    """Set what an optimizer has for rows back to what it begins with."""
    index = torch.from_numpy(rows)
    for state, key, fill in of_rows(optimizer, parameter):
        if state[key].is_sparse:  # the momentum of SGD, if gradients are sparse
            GradientRows(state[key]).note(changes, state[key], rows)
        else:
            changes.call(state[key].detach().index_fill_, 0, index.to(state[key].device), fill)


def carry(optimizer: Optimizer, source: Tensor, old: Tensor, target: Tensor, new: Tensor) -> None:
    """Copy what an optimizer has for rows of a table to rows of another, which begins with the numbers of the first."""
    by_row = {key: (state[key], fill) for state, key, fill in of_rows(optimizer, source)}
    if not by_row:
        return
    if not optimizer.state.get(target):
        whole = {key: value for key, value in optimizer.state[source].items() if key not in by_row}
        begun = {
            key: moved_rows(rows, old[:0], new[:0], len(target))
            if rows.is_sparse
            else _memory.full_like(rows, len(target), fill)
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
    if isinstance(optimizer, Adafactor):
        # Of a table with one row the shape does not tell.
        return key == "col_var" and table.dim() == 2
    return state.numel() == 1 and table.numel() != 1


def _is_by_column(state: Tensor, table: Tensor) -> bool:
    return state.dim() == table.dim() and len(state) == 1


def _beginning(optimizer: Optimizer, parameter: Tensor, key: str) -> complex:
    """Return the number that a state is full of before the first step."""
    if key == "sum" and isinstance(optimizer, Adagrad):
        return _as_pair(_options(optimizer, parameter)["initial_accumulator_value"], parameter)
    if key == "step_size" and isinstance(optimizer, Rprop):
        return _as_pair(_options(optimizer, parameter)["lr"], parameter)
    return 0.0


def _as_pair(number: float | Tensor, parameter: Tensor) -> complex:
    # torch's optimizers treat complex numbers as pairs of real ones.
    return complex(float(number), float(number)) if parameter.is_complex() else float(number)


def _options(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group
    raise LookupError("the optimizer has no such parameter")


def takers(optimizers: Sequence[Optimizer], pattern: str | None, tables: Iterable[Tensor]) -> list[Optimizer]:
    """Return the attached optimizers that a new table joins; two with different tables would both step on it.

    It is the first that has a parameter group with the pattern, or else the first that has tables of the dictionary;
    and with it those that have the very same tables.
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

    It goes behind these, as it does in the dictionary: state dicts of optimizers know parameters by their order, and so
    an optimizer that is made of the saved dictionary has the same order.

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
        total = torch.full_like(table, _as_pair(group["initial_accumulator_value"], table), requires_grad=False)
        optimizer.state[table] = {"step": torch.zeros((), device=device), "sum": total}
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
