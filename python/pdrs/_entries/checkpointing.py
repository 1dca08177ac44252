"""What saving and loading a checkpoint says to every ParameterDict of a model.

A state dict has a tensor for each name, so a million names make a million tensors. While a checkpoint is saved, a
ParameterDict puts itself on a list instead of its entries into the state dict. While one is loaded, it takes its
entries from where they lie. Everything else of a model goes through its ordinary state dict, hooks included. So do the
entries if the dictionary, or a module around it, has hooks or methods that may change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from torch.nn import Module

if TYPE_CHECKING:
    from pdrs.parameter_dict import ParameterDict

__all__ = ["NamedSource", "collecting", "given_to", "giving", "takes_down"]


class NamedSource(Protocol):
    """Named rows that a ParameterDict can load."""

    def load_into(
        self,
        module: ParameterDict,
        prefix: str,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Do for the entries what ``Module._load_from_state_dict`` does."""


_collected: ContextVar[tuple[list[tuple[str, ParameterDict]], list[str]] | None] = ContextVar("collected", default=None)
_given: ContextVar[Mapping[str, NamedSource] | None] = ContextVar("given", default=None)


def changes_what_is_saved(module: Module) -> bool:
    """Whether a module may have a word in what the state dict has of itself, and of the modules in it."""
    own = (_has_its_own(module, name) for name in ("state_dict", "_save_to_state_dict"))
    return bool(module._state_dict_hooks) or any(own)


def changes_what_is_loaded(module: Module) -> bool:
    """Whether a module may change a state dict before it, and the modules in it, load from it."""
    own = (_has_its_own(module, name) for name in ("load_state_dict", "_load_from_state_dict"))
    return bool(module._load_state_dict_pre_hooks) or any(own)


def _has_its_own(module: Module, name: str) -> bool:
    # All that may be asked in turn. By its globals, because a wrapper has the `__module__` of what it wraps.
    functions = [vars(class_)[name] for class_ in type(module).__mro__ if name in vars(class_)]
    functions += [vars(module)[name]] if name in vars(module) else []
    homes = (str(getattr(function, "__globals__", {}).get("__name__", "")) for function in functions)
    return not all(home.startswith(("torch.nn.modules.", "pdrs.")) for home in homes)


def prefixes_where(module: Module, holds: Callable[[Module], bool]) -> list[str]:
    """Return the prefixes of those modules in a module for which something holds."""
    named = module.named_modules(remove_duplicate=False)
    return [name + "." if name else "" for name, one in named if holds(one)]


@contextmanager
def collecting(obj: Module) -> Iterator[list[tuple[str, ParameterDict]]]:
    """Give the list of the ParameterDicts, with their prefixes, of which a state dict is asked meanwhile.

    Those are left out that lie in a module which wants to see their entries.
    """
    collected: list[tuple[str, ParameterDict]] = []
    token = _collected.set((collected, prefixes_where(obj, changes_what_is_saved)))
    try:
        yield collected
    finally:
        _collected.reset(token)


def takes_down(module: ParameterDict, prefix: str) -> bool:
    """Put a ParameterDict on the list, if there is one; whether its entries must then stay out of the state dict."""
    found = _collected.get()
    if found is None:
        return False
    collected, asked = found
    if any(map(prefix.startswith, asked)):
        return False
    collected.append((prefix, module))
    return True


@contextmanager
def giving(sources: Mapping[str, NamedSource]) -> Iterator[None]:
    """Let ParameterDicts load their entries from the source at their prefix meanwhile."""
    token = _given.set(sources)
    try:
        yield
    finally:
        _given.reset(token)


def given_to(prefix: str) -> NamedSource | None:
    """Return what the ParameterDict at a prefix is to load its entries from, if not from the state dict."""
    given = _given.get()
    return None if given is None else given.get(prefix)
