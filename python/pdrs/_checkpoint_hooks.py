"""What saving and loading a checkpoint says to every ParameterDict of a model.

A state dict has a tensor for each name, and a million names make a million. So while a checkpoint is saved, a
ParameterDict puts itself on a list instead of its entries into the state dict, and while one is loaded, it takes its
entries from where they lie. Everything else of a model goes through its ordinary state dict, hooks included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

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


_collected: ContextVar[list[tuple[str, ParameterDict]] | None] = ContextVar("collected", default=None)
_given: ContextVar[Mapping[str, NamedSource] | None] = ContextVar("given", default=None)


@contextmanager
def collecting() -> Iterator[list[tuple[str, ParameterDict]]]:
    """Give the list of the ParameterDicts, with their prefixes, of which a state dict is asked meanwhile."""
    collected: list[tuple[str, ParameterDict]] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def takes_down(module: ParameterDict, prefix: str) -> bool:
    """Put a ParameterDict on the list, if there is one; whether its entries must then stay out of the state dict."""
    collected = _collected.get()
    if collected is None or module._state_dict_hooks:
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
