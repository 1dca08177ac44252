"""A stand-in for a module, with which torch's own code loads some Parameters of it."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

__all__ = ["StandIn"]


class _Everything:
    def __contains__(self, key: object) -> bool:
        return True


class StandIn:
    """Stands in for a module of which torch shall load some Parameters only, and whose hooks have run."""

    def __init__(self, module: Module, parameters: dict[str, Any]) -> None:
        self.__dict__.update(
            _module=module,
            _parameters=parameters,
            _load_state_dict_pre_hooks={},
            # Which keys are unexpected is found elsewhere.
            _modules=_Everything(),
        )

    def _class(self) -> type[Module]:
        return type(self._module)

    # torch asks it whether there is extra state.
    __class__: Any = property(_class)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)
