"""Errors that both dictionaries raise."""

from __future__ import annotations

__all__ = ["MissingEntryError"]


class MissingEntryError(KeyError, AttributeError):
    """A name is missing. It is a KeyError, as from a dict, and an AttributeError, as from torch's class."""

    __str__ = KeyError.__str__
