"""Errors that both dictionaries raise."""

from __future__ import annotations

__all__ = ["MissingEntryError"]


class MissingEntryError(KeyError, AttributeError):
    """What ``pd["missing"]`` raises: a KeyError, as of a dict, and an AttributeError, as torch's class raises."""

    __str__ = KeyError.__str__
