"""Modules whose state dicts are given, for tests of what is saved of any module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["State"]


class State(nn.Module):
    """A module that has this state dict, whatever is in it."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Return it."""
        return dict(self.state)
