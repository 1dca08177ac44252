"""How ``pdrs.ParameterDict`` reads and sets an entry where torch's class would ask functions that are not torch's own.

These do what torch's class does, by the same calls. On the way they let torch's functions take keys which they refuse
otherwise: keys with dots, and keys that are attributes of a Module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module, ModuleDict, Parameter

if TYPE_CHECKING:
    from pdrs.parameter_dict import ParameterDict

# What every ParameterDict has in its `__dict__`, whatever its entries are called.
STATE = frozenset(vars(Module())) | {"_keys", "_values"}
_MISSING: Any = object()


class _Dotted(str):
    """A name with dots that torch's functions, which refuse such names, do not find."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part != "." and super().__contains__(part)  # type: ignore[operator]  # as `str` refuses what is none


def without_dots(name: str) -> str:
    """Give an equal name in which torch's functions find no dots. No dict must get it for a new key."""
    return _Dotted(name) if "." in name else name


def is_attribute(module: Module, name: str) -> bool:
    """Whether a name is that of an attribute of the module; a tensor in its place stands for an entry instead."""
    state = vars(module)
    return type(name) is str and (
        (name in state and not isinstance(state[name], Tensor)) or hasattr(type(module), name)
    )


def read(module: ParameterDict, key: str) -> Any:
    """Do what ``torch.nn.ParameterDict.__getitem__`` does; an AttributeError if there is no such entry."""
    attribute = module._key_to_attr(key)
    is_taken = is_attribute(module, attribute)
    if is_taken and any(attribute in place for place in _places(module)):
        # What `getattr` does for a name that no attribute has.
        value = type(module).__getattr__(module, attribute)
    elif is_taken and key not in module._keys:
        raise AttributeError(attribute)
    else:
        value = getattr(module, attribute)
    if (is_taken or "." in attribute) and isinstance(value, Proxy):
        # The traced module would read `self.w.training`, and go on with what the attribute is.
        raise RuntimeError(
            f"torch.fx cannot trace the entry {key!r}: its graph reads entries as attributes, and this name "
            f"{'is an attribute of every Module' if is_taken else 'has dots'}; rename the entry"
        )
    return value


def write(module: ParameterDict, key: str, value: Any) -> None:
    """Do what ``torch.nn.ParameterDict.__setitem__`` does with a value that is no tensor, or a Parameter."""
    name = module._key_to_attr(key)
    is_known = key in module._keys
    try:
        with _unchanged_on_failure(module, name):
            if module._is_stood_for(name) and is_attribute(module, name):
                del vars(module)[name]
            module._keys[key] = None
            if isinstance(value, Parameter):
                setattr(module, name, value)
            elif is_attribute(module, name):
                module._place(name, module._accepted(name, value, module._kind_of(name)))
            else:
                set_plain(module, name, value, functools.partial(setattr, module))
    except BaseException:
        if not is_known:
            module._keys.discard(key)
        raise


def set_plain(module: ParameterDict, name: str, value: Any, set_attribute: Callable[[str, Any], None]) -> None:
    """Set what is no Parameter by ``set_attribute``, and keep it where all such entries lie: there it hides nothing."""
    set_attribute(name, value)
    # What lies there may be a tensor that hides a Parameter, which has become None.
    if not isinstance(value, Module) and name in vars(module) and not module._kind_of(name):
        module._values[name] = vars(module).pop(name)


def register(module: ParameterDict, name: str, value: Parameter, set_attribute: Callable[[str, Any], None]) -> None:
    """Do what ``torch.nn.Module.__setattr__``, which is ``set_attribute``, does with the Parameter of an entry."""
    parameters = module._parameters
    if name not in parameters:
        refuse_parametrized(module, name)
    is_taken = is_attribute(module, name)
    # torch refuses both names if nothing is registered under them.
    holds_place = ("." in name or is_taken) and name not in parameters
    spelled = without_dots(name)
    with _unchanged_on_failure(module, name):
        if holds_place:
            parameters[name] = None
        if is_taken:
            # torch would take the attribute away.
            module._forget_elsewhere(name)
            module.register_parameter(spelled, value)
        else:
            module._values.pop(name, None)
            set_attribute(spelled, value)
        if holds_place and parameters.get(name) is None:
            del parameters[name]


def parametrized(module: Module) -> ModuleDict | tuple[()]:
    """Give the names of what is parametrized; nobody is asked for an attribute, as ``is_parametrized`` asks."""
    found = module._modules.get("parametrizations")
    return found if isinstance(found, ModuleDict) else ()


def refuse_parametrized(module: Module, name: str) -> None:
    """Refuse a name that belongs to a parametrization, as torch does for Parameters."""
    if name in parametrized(module):
        raise KeyError(f"attribute '{name}' already exists")


def _places(module: ParameterDict) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._values, module._modules, module._buffers


@contextmanager
def _unchanged_on_failure(module: ParameterDict, name: str) -> Iterator[None]:
    before = [(place, place.get(name, _MISSING)) for place in (*_places(module), vars(module))]
    try:
        yield
    except BaseException:
        for place, value in before:
            if value is _MISSING:
                place.pop(name, None)
            elif place.get(name, _MISSING) is not value:
                place[name] = value
        raise
