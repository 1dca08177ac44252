"""Whether torch's own functions stand where a method of ``pdrs.ParameterDict`` goes around them.

torch's class does everything through functions that others replace. ``torch.fx`` patches ``Module.__getattr__``, and
the low-memory loading of accelerate patches ``Module.register_parameter``. DeepSpeed replaces the dict of Parameters,
and subclasses override methods. So a fast path is taken on two conditions. Every function that torch's method would
call for this very object is torch's own, or this package's, which does the same. And the Parameters lie in an exact
dict. Otherwise the method calls those functions. This module is the one place that says which functions those are.

The answer is kept natively under the version tag of the class, which changes with any patch
(``rust/python/src/torch/own_functions.rs``).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, Final

from torch.nn import Module
from torch.nn import ParameterDict as TorchParameterDict
from torch.nn.modules import container as _container
from torch.nn.modules import module as _module

from pdrs._core import are_functions_own, is_own, watch_functions

__all__ = ["CALLED", "are_functions_own", "follows_torch", "is_own", "watch"]

_ATTRIBUTES = ("__getattr__", "__getattribute__")
_READ = ("__getitem__", "_key_to_attr", *_ATTRIBUTES)
_WRITE = ("__setitem__", "_key_to_attr", "__setattr__", "register_parameter", *_ATTRIBUTES)
_DELETE = ("__delitem__", "_key_to_attr", "__delattr__")

# For each method that has a fast path, the functions that torch's method of this name calls. That torch's class has its
# own method of this name is asked, too.
CALLED: Final = {
    # Those that native code asks for by their number.
    "__getitem__": _READ[1:],
    "__setitem__": _WRITE[1:],
    "__contains__": (),
    "__len__": (),
    "__delitem__": _DELETE[1:],
    "pop": _READ + _DELETE,
    "popitem": _READ + _DELETE,
    "values": _READ,
    "items": _READ,
    # The others.
    "__setattr__": ("register_parameter", *_ATTRIBUTES),
    "__delattr__": (),
    "update": _WRITE,
    "clear": _DELETE,
    "copy": _READ,
    "fromkeys": (),
    "extra_repr": ("items", *_READ),
    "_apply": (),
    "_save_to_state_dict": (),
    "_load_from_state_dict": (),
    "load_state_dict": ("_load_from_state_dict",),
    # No method: what others ask a dictionary from which they take the entries.
    "source": ("items", *_READ),
}
_NUMBERS = {name: number for number, name in enumerate(CALLED)}

SETITEM: Final = _NUMBERS["__setitem__"]
GETITEM: Final = _NUMBERS["__getitem__"]
DELITEM: Final = _NUMBERS["__delitem__"]
VALUES: Final = _NUMBERS["values"]
ITEMS: Final = _NUMBERS["items"]
SETATTR: Final = _NUMBERS["__setattr__"]
DELATTR: Final = _NUMBERS["__delattr__"]
UPDATE: Final = _NUMBERS["update"]
CLEAR: Final = _NUMBERS["clear"]
COPY: Final = _NUMBERS["copy"]
FROMKEYS: Final = _NUMBERS["fromkeys"]
EXTRA_REPR: Final = _NUMBERS["extra_repr"]
APPLY: Final = _NUMBERS["_apply"]
SAVE: Final = _NUMBERS["_save_to_state_dict"]
LOAD_FROM: Final = _NUMBERS["_load_from_state_dict"]
LOAD: Final = _NUMBERS["load_state_dict"]
SOURCE: Final = _NUMBERS["source"]

# The classes whose functions do what the fast paths do, and the globals of the modules that define these functions: a
# wrapper may copy the name and the module of what it wraps, but not this.
_homes: dict[type, dict[str, Any]] = {Module: vars(_module), TorchParameterDict: vars(_container)}
_ours: list[type] = []


def watch(our_class: type) -> None:
    """Make ``our_class`` the class whose methods have fast paths."""
    import sys

    _homes[our_class] = vars(sys.modules[our_class.__module__])
    _ours.append(our_class)
    asked_of_instances = [
        [name for name in dict.fromkeys(called) if not name.startswith("__")] for called in CALLED.values()
    ]
    watch_functions(list(CALLED), asked_of_instances, _look, _module._global_parameter_registration_hooks)


def follows_torch(module: Module, name: str) -> bool:
    """Whether what ``super()`` finds in our class, in a method of this name, is torch's own."""
    return _are_own(_behind(type(module)), name)


def is_read_directly(class_: type) -> bool:
    """Whether nobody but torch's own functions, and this package's, is asked on the way to an entry."""
    return all(_are_own(class_.__mro__, name) for name in CALLED["__getitem__"])


def _look(class_: type) -> int:
    """Give a bit for each method for which ``class_``, or a base, has a function of somebody else."""
    behind = _behind(class_)
    bits = 0
    for number, (method, called) in enumerate(CALLED.items()):
        if not (_are_own(behind, method) and all(_are_own(class_.__mro__, name) for name in called)):
            bits |= 1 << number
    return bits


def _behind(class_: type) -> tuple[type, ...]:
    order = class_.__mro__
    return order[order.index(_ours[0]) + 1 :] if _ours[0] in order else order


def _are_own(classes: tuple[type, ...], name: str) -> bool:
    for class_ in classes:
        function = vars(class_).get(name)
        if function is None or class_ is object:
            continue
        if (
            type(function) is not FunctionType
            or function.__globals__ is not _homes.get(class_)
            or function.__code__.co_name != name
        ):
            return False
    return True
