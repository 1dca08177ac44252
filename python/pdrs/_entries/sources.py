"""What a ParameterDict takes entries from: mappings, other ParameterDicts, pairs; in the order of torch's class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from torch.nn import Module, Parameter
from torch.nn import ParameterDict as TorchParameterDict

from pdrs._core import EntryKeys, can_take_over, in_step, unzip
from pdrs._torch.own_functions import SOURCE, is_own

if TYPE_CHECKING:
    from pdrs.parameter_dict import ParameterDict


def as_dict(parameters: Any) -> dict[str, Any] | None:
    """Give a dict that has the entries in the order in which to insert them, if there is one of leaves and ``str``."""
    if type(parameters) is dict:
        return parameters if can_take_over(parameters, Parameter, True) else None
    if _gives_its_own(parameters) and in_step(parameters._keys, parameters._parameters):
        return parameters._parameters if can_take_over(parameters._parameters, Parameter, False) else None
    return None


def _gives_its_own(parameters: Any) -> TypeGuard[ParameterDict]:
    """Whether what a ParameterDict gives are the Parameters that lie in it, and nothing hides one."""
    return (
        isinstance(parameters, TorchParameterDict)
        and isinstance(vars(parameters).get("_keys"), EntryKeys)
        and is_own(parameters, SOURCE)
        and parameters.__dict__.keys().isdisjoint(parameters._parameters.keys())
    )


def columns(parameters: Iterable[Any], owner: str = "ParameterDict") -> tuple[list[Any], list[Any]]:
    """Give names and values in the order in which to insert them; errors name the class ``owner``."""
    # Names and values at one time, whatever another thread does.
    if _gives_its_own(parameters) and in_step(parameters._keys, parameters._parameters):
        entries = parameters._parameters.copy()
        return list(entries), list(entries.values())
    if type(parameters) is dict:
        names = sorted(parameters)
        return names, list(map(parameters.__getitem__, names))
    if isinstance(parameters, OrderedDict | TorchParameterDict):
        parameters = parameters.items()
    elif isinstance(parameters, Mapping):
        parameters = sorted(parameters.items())
    else:
        refuse_stacked(parameters)
    pairs = list(parameters)
    columns = unzip(pairs)
    if columns is None:
        for at, pair in enumerate(pairs):
            _check_pair(at, pair, owner)
        columns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return columns


def refuse_stacked(parameters: object) -> None:
    # Iterating one gives its names, and a name of two letters would pass for a pair.
    if isinstance(parameters, Module) and hasattr(type(parameters), "unstack"):
        raise TypeError(f"expected a mapping or pairs, got a {type(parameters).__name__}: pass its unstack()")


def _check_pair(at: int, pair: Any, owner: str) -> None:
    if not isinstance(pair, Iterable):
        raise TypeError(f"{owner} update sequence element #{at} should be Iterable; is {type(pair).__name__}")
    if len(pair) != 2:  # type: ignore[arg-type]
        raise ValueError(f"{owner} update sequence element #{at} has length {len(pair)}; 2 is required")  # type: ignore[arg-type]
