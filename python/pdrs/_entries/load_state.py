"""How ``pdrs.ParameterDict`` loads a state dict: natively where nothing is unusual, and otherwise by torch's own code.

torch's ``Module._load_from_state_dict`` is called for what is left, with a stand-in for the module that shows it just
those Parameters. So every message, and the order of all messages, is torch's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.nn import Module
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from pdrs._core import load_matching, unexpected_keys
from pdrs._torch.modes import is_intercepted
from pdrs._torch.stand_in import StandIn

if TYPE_CHECKING:
    from torch.nn import ParameterDict

# Larger tensors are left to torch, which may copy one on several threads and gains nothing from company.
LARGEST = 1 << 16


def load_whole(module: ParameterDict, state_dict: Any) -> bool:
    """Load a state dict that fits in every way into a module that has nothing but Parameters, and no say in it.

    Of anything else nothing is loaded, and the result is false. torch's way begins with a copy of the whole state dict,
    for the sake of those who might change it, which takes longer than this.
    """
    return (
        _is_dict(state_dict)
        and type(module._parameters) is dict
        and not (module._modules or module._buffers)
        and not (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
        and type(module).set_extra_state is Module.set_extra_state
        # Of as many keys as Parameters, none is unexpected if all Parameters find theirs.
        and len(state_dict) == len(module._parameters)
        # The key of extra state would be; torch says so even if an entry has it.
        and _EXTRA_STATE_KEY_SUFFIX not in state_dict
        and not is_intercepted()
        and load_matching(module._parameters, state_dict, "", LARGEST, True)[1] == len(module._parameters)
    )


def load_from_state_dict(
    module: ParameterDict,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Do what ``Module._load_from_state_dict`` does; keys may have dots."""
    for hook in module._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
    parameters = module._parameters
    rest, loaded = list(parameters), 0
    is_copied = not (
        local_metadata.get("assign_to_params_buffers", False)
        or torch.__future__.get_swap_module_params_on_conversion()
        or is_intercepted()
    )
    if is_copied and type(parameters) is dict and _is_dict(state_dict):
        rest, loaded = load_matching(parameters, state_dict, prefix, LARGEST, False)
    load_rest(module, rest, loaded, state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def load_rest(
    module: ParameterDict,
    rest: list[str],
    loaded: int,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the buffers, and those Parameters that are left, and say which keys are unexpected.

    ``loaded`` is how many keys of the state dict have been loaded.
    """
    parameters = module._parameters
    buffers = {
        name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
    }
    extra_state = prefix + _EXTRA_STATE_KEY_SUFFIX
    keys = chain((prefix + name for name in chain(rest, buffers)), (extra_state,))
    shown = {key: state_dict[key] for key in keys if key in state_dict}
    Module._load_from_state_dict(
        StandIn(module, {name: parameters[name] for name in rest}),  # type: ignore[arg-type]  # a stand-in
        shown,
        prefix,
        local_metadata,
        strict,
        missing,
        unexpected,
        errors,
    )
    is_all = loaded + len(shown) == len(state_dict) and _EXTRA_STATE_KEY_SUFFIX not in parameters
    if strict and not is_all:
        unexpected.extend(unexpected_keys(state_dict, prefix, (parameters, buffers), module._modules, extra_state))


def _is_dict(state_dict: Any) -> TypeGuard[dict[str, Any]]:
    return type(state_dict) in (dict, OrderedDict)
