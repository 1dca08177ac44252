"""Dictionaries on several ranks: see ``docs/stacked/distributed.md``."""

from __future__ import annotations

from pdrs._ranks.replicas import broadcast, check, insert

__all__ = ["broadcast", "check", "insert"]
