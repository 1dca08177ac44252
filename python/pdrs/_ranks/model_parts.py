"""What a checkpoint has of a model on several ranks: sharded dictionaries, everything else, and optimizers.

Names are those of the model on one process: the table of a dictionary ``words`` is ``words.float32_16`` on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from pdrs._ranks.sharded import ShardedParameterDict
from pdrs._rows import optimizer_state
from pdrs._rows.table import parameter_of

__all__ = ["OfTable", "Parts", "differences", "number_of", "value_of"]

_PLAIN = (bool, int, float, str)


class OfTable(NamedTuple):
    """A table of a sharded dictionary, and what else has a row for each of its rows.

    Parameters
    ----------
    name
        In the model: the prefix of the dictionary, and the attribute.
    number
        In the dictionary.
    attribute
        In the dictionary.
    parameter
        ``[capacity, *shape]``.
    others
        ``"frozen"``, ``"seen"`` and states such as ``"optimizer.0.exp_avg"``.
    """

    name: str
    number: int
    attribute: str
    parameter: Tensor
    others: dict[str, Tensor]


class Parts:
    """The parts of a model, and the names of its parameters.

    Parameters
    ----------
    model
        A module, also one in DDP.
    optimizer
        None, an optimizer, or several.

    Raises
    ------
    TypeError
        If this is something else.
    ValueError
        If an optimizer has a parameter that the model has not. Also if dictionaries have different groups of processes
        or meshes.
    """

    def __init__(self, model: Module, optimizer: Any) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, DistributedDataParallel):
            model = model.module
        self.module = model
        self.sharded = {
            name + "." if name else "": one
            for name, one in model.named_modules()
            if isinstance(one, ShardedParameterDict)
        }
        groups = {id(one.group): one.group for one in self.sharded.values()}
        if len(groups) > 1:
            raise ValueError("expected sharded dictionaries of one process group, got several groups")
        self.group = next(iter(groups.values()), None)
        # Over how many ranks names are spread, and which part of them this rank has.
        owners = {one._owners for one in self.sharded.values()}
        if len(owners) > 1:
            raise ValueError("expected sharded dictionaries of one mesh, got several")
        self.shards, self.shard = next(((one.shards, one.shard) for one in owners), (1, 0))
        given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for one in given:
            if not optimizer_state.is_optimizer(one):
                raise TypeError(f"expected an optimizer, or a sequence of them, got {type(one).__name__}")
        self.optimizers = [part for one in given for part in optimizer_state.parts_of(one)]
        # The dictionary of each table, by the id of the Parameter.
        self._owners: dict[int, str] = {}
        self._names: dict[int, str] = {}
        for prefix, words in self.sharded.items():
            for attribute, table in words.local.tables().items():
                self._owners[id(table)] = prefix
                self._names[id(table)] = prefix + attribute
        with self.without_sharded() as rest:
            for name, parameter in rest.named_parameters():
                self._names[id(parameter)] = name
            self.dense = dict(rest.named_parameters())
            self.buffers = {name for name, _ in rest.named_buffers()}
        for one in self.optimizers:
            for group in one.param_groups:
                for parameter in group["params"]:
                    self.name_of(parameter)

    @contextmanager
    def without_sharded(self) -> Iterator[Module]:
        """Give the module without its sharded dictionaries."""
        if "" in self.sharded:
            yield Module()
            return
        owned = set(map(id, self.sharded.values()))
        places = [
            (held, name, child)
            for held in (one._modules for one in self.module.modules() if id(one) not in owned)
            for name, child in held.items()
            if child is not None and id(child) in owned
        ]
        try:
            for held, name, _ in places:
                held[name] = Module()
            yield self.module
        finally:
            for held, name, child in places:
                held[name] = child

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keep other threads from changing names and rows of the sharded dictionaries."""
        with ExitStack() as held:
            for words in self.sharded.values():
                held.enter_context(words.local._lock.read())
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let other threads wait that look at names and rows of the sharded dictionaries."""
        with ExitStack() as held:
            for words in self.sharded.values():
                held.enter_context(words.local._lock.change())
            yield

    def name_of(self, parameter: Tensor) -> str:
        """Return the name of a parameter in the model; ValueError if it has none."""
        if id(parameter) not in self._names:
            raise ValueError(
                f"an optimizer has a parameter of shape {list(parameter.shape)} that is not in the model: pass the "
                "model whose parameters the optimizers have"
            )
        return self._names[id(parameter)]

    def owner_of(self, parameter: Tensor) -> str | None:
        """Return the prefix of the sharded dictionary that a parameter is a table of."""
        return self._owners.get(id(parameter))

    # -- tables --------------------------------------------------------------------------------------------------------

    def tables(self, prefix: str) -> list[OfTable]:
        """Return the tables of a dictionary, with all that belongs to their rows."""
        words = self.sharded[prefix]
        seen = words._last_seen()
        found = []
        for number, table in enumerate(words.local._tables):
            parameter = parameter_of(words.local, table)
            others = {"seen": seen[table.attribute]}
            if table.frozen is not None:
                others["frozen"] = table.frozen
            for which, optimizer in enumerate(self.optimizers):
                for state, key in optimizer_state.of_rows(optimizer, parameter):
                    value = state[key]
                    others[f"optimizer.{which}.{key}"] = value.to_dense() if value.is_sparse else value
            found.append(OfTable(prefix + table.attribute, number, table.attribute, parameter, others))
        return found

    def about(self, prefix: str) -> dict[str, Any]:
        """Describe a dictionary, as the manifest does, with the tables of this rank."""
        words = self.sharded[prefix]
        tables: dict[str, Any] = {}
        for one in self.tables(prefix):
            tables[one.attribute] = {
                "shape": list(one.parameter.shape[1:]),
                "dtype": str(one.parameter.dtype).removeprefix("torch."),
                "trainable": one.parameter.requires_grad,
                "rows": sorted(key for key in one.others if key != "frozen"),
                "numbers": self._numbers_of(one),
            }
        return {"seed": words._seed, "init": repr(words._init), "gathers": words._ages.gathers, "tables": tables}

    def _numbers_of(self, one: OfTable) -> dict[str, Any]:
        found = {}
        for which, optimizer in enumerate(self.optimizers):
            state: dict[str, Any] = optimizer.state.get(one.parameter) or {}
            for key, value in state.items():
                if f"optimizer.{which}.{key}" not in one.others:
                    found[f"optimizer.{which}.{key}"] = number_of(
                        f"{type(optimizer).__name__}, {one.name}, {key}", value
                    )
        return found

    # -- optimizers ----------------------------------------------------------------------------------------------------

    def about_optimizers(self) -> list[dict[str, Any]]:
        """Describe the optimizers, as the manifest does: groups with options, and states of dense parameters."""
        found = []
        for optimizer in self.optimizers:
            states: dict[str, Any] = {}
            for name, key, value in self.dense_states(optimizer):
                of_name = states.setdefault(name, {"tensors": [], "numbers": {}})
                if isinstance(value, Tensor) and value.dim():
                    of_name["tensors"].append(key)
                else:
                    of_name["numbers"][key] = number_of(f"{type(optimizer).__name__}, {name}, {key}", value)
            groups = [
                {"params": self.names_in(group), "options": self._options(optimizer, group)}
                for group in optimizer.param_groups
            ]
            found.append({"class": type(optimizer).__name__, "groups": groups, "states": states})
        return found

    def names_in(self, group: dict[str, Any]) -> list[str]:
        """Return the names of the parameters of a group; ``words.*`` are the tables of a sharded dictionary."""
        names = []
        for parameter in group["params"]:
            owner = self.owner_of(parameter)
            names.append(self.name_of(parameter) if owner is None else owner + "*")
        return list(dict.fromkeys(names))

    def _options(self, optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
        name = type(optimizer).__name__
        return {
            key: number_of(f"the option {key!r} of {name}", value)
            for key, value in group.items()
            if key not in ("params", "param_names")
        }

    def dense_states(self, optimizer: Any) -> Iterator[tuple[str, str, Any]]:
        """Yield the states of dense parameters: the name of the parameter, the key, and what there is."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self.owner_of(parameter) is None:
                    state = optimizer.state.get(parameter) or {}
                    for key, value in state.items():
                        yield self.name_of(parameter), key, value


def number_of(what: str, value: Any) -> Any:
    """Return a number, an option or a small tensor as JSON has it; TypeError if it is something else."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [number_of(what, one) for one in value]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "value": value.item()}
    shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"{what}: expected a number, a text, or a tensor with a row for each row of the table, got {shown}, which "
        "cannot be divided among other ranks"
    )


def value_of(number: Any, now: Any = None) -> Any:
    """Return what :func:`number_of` was given; lists are tuples, unless there is a list now."""
    if isinstance(number, dict):
        made = torch.tensor(number["value"], dtype=getattr(torch, number["dtype"]), device="cpu")
        return made.view(number["shape"])
    if isinstance(number, list):
        held = [value_of(one) for one in number]
        return held if isinstance(now, list) else tuple(held)
    return number


def differences(one: Any, other: Any, where: str = "") -> str | None:
    """Return the first place where two descriptions differ, and what is there; None if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            place = f"{where}.{key}" if where else str(key)
            if key not in one or key not in other:
                return f"{place} ({' and '.join('there' if key in each else 'missing' for each in (one, other))})"
            found = differences(one[key], other[key], place)
            if found:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            found = differences(left, right, f"{where}[{at}]")
            if found:
                return found
        return None
    same = one == other or (one != one and other != other)
    return None if same else f"{where} ({str(one)[:100]} and {str(other)[:100]})"
