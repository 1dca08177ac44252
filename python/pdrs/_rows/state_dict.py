"""State dicts of a StackedParameterDict: in its own layout, tables and packed names, and in that of a ParameterDict."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from pdrs._core import IndexMap, RowIndex, sort_tensors
from pdrs._rows import optimizer_state
from pdrs._rows.insert import insert_values, partition
from pdrs._rows.names_codec import (
    Header,
    TableHeader,
    check_header,
    is_packed,
    pack,
    refuse_claim,
    same_bytes,
    unpack,
    used_rows,
    without_words,
)
from pdrs._rows.names_plan import mark
from pdrs._rows.optimizers import attached, refuse_strangers
from pdrs._rows.room import clear_free, lent_whole, rearrange, resize
from pdrs._rows.store import add_table, adopt, device_of, remove_last_table, swappable
from pdrs._rows.table import Table, is_sharded, parameter_of, refuse_foreign
from pdrs._rows.write import stack, write_rows
from pdrs._torch import huge_pages
from pdrs._torch.modes import is_intercepted
from pdrs._torch.stand_in import StandIn
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = [
    "EXTRA_STATE",
    "LentTables",
    "conform",
    "header_of",
    "keys_under",
    "load",
    "load_named",
    "load_others",
    "load_packed",
    "load_whole",
    "names_as_packed",
    "note_load",
    "take_packed",
    "were_packed",
]

EXTRA_STATE = "_extra_state"  # the key that torch gives what `get_extra_state` returns


def names_as_packed(sd: StackedParameterDict) -> Tensor:
    """Return what :meth:`StackedParameterDict.get_extra_state` returns; it is kept until it changes."""
    with sd._lock.read():
        packed = _packed_before(sd)
        if packed is None:
            with torch.inference_mode(False):  # where torch would not count
                packed = pack(sd._index, header_of(sd))
            mark(packed)
            sd.__dict__["_packed"] = (packed, *_count(sd, packed))
        return packed


def _packed_before(sd: StackedParameterDict) -> Tensor | None:
    if sd._packed is None:
        return None
    packed = sd._packed[0]
    return packed if sd._packed[1:] == _count(sd, packed) else None


def _count(sd: StackedParameterDict, packed: Tensor) -> tuple[int, int, int, Header]:
    """Return what changes when packed names, or ours, do."""
    return packed._version, sd._index.moves, sd._index.inserts, header_of(sd)


def header_of(sd: StackedParameterDict) -> Header:
    """Return what is packed beside the names."""
    tables = tuple(
        TableHeader(table.attribute, table.group, parameter_of(sd, table).requires_grad, sd._index.used(number))
        for number, table in enumerate(sd._tables)
    )
    return Header(tables, sd._patterns)


def take_packed(sd: StackedParameterDict, state: Any) -> None:
    """Do what :meth:`StackedParameterDict.set_extra_state` does."""
    if not is_packed(state):
        raise ValueError("expected the packed names of a StackedParameterDict")
    with sd._lock:
        if state is not sd._taken:
            with sd._lock.change():
                _refuse_tables_by_name(sd, state)
                conform(sd, state, {})


def _refuse_tables_by_name(sd: StackedParameterDict, packed: Tensor) -> None:
    # Tools that load a tensor at a time, such as `from_pretrained`, load into the tables that are there.
    own = {table.attribute for table in sd._tables}
    lacking = [] if packed.is_meta else [name for name in used_rows(packed) if name not in own]
    if lacking:
        raise ValueError(
            f"the table '{lacking[0]}' is missing: expected a dictionary that has it, because the names are loaded "
            f"without their tables, got {sorted(own) or 'no tables'}. Load all at once with load_state_dict or "
            "pdrs.load. Or make the dictionary in the dtype that was saved, reserve rows if it is empty, and "
            "convert it afterwards"
        )


def load(
    sd: StackedParameterDict,
    by_torch: Callable[..., None],
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load one's part of a state dict, in either layout; ``by_torch`` is what torch does for any module."""
    # Before the names are read: a hook may rename keys of an old checkpoint.
    for hook in sd._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
    names: Any = state_dict.get(prefix + EXTRA_STATE)
    where = f"While loading the names of {prefix or 'the dictionary'}"
    if not is_packed(names):
        if were_packed(names):
            error_msgs.append(f"{where}: they are damaged")
            return
        problems = missing_keys, unexpected_keys, error_msgs
        with sd._lock.change():
            state_dict = load_others(sd, state_dict, prefix, local_metadata, strict, *problems)
            assign = local_metadata.get("assign_to_params_buffers", False)
            load_named(sd, state_dict, prefix, strict, assign, *problems)
            note_load(sd)
        return
    with sd._lock.change():
        try:
            state_dict = load_packed(sd, names, state_dict, prefix)
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{where}: {error}")
            return
        hooks = sd.__dict__["_load_state_dict_pre_hooks"]
        taken = state_dict.get(prefix + EXTRA_STATE)
        sd.__dict__.update(_taken=taken, _load_state_dict_pre_hooks=OrderedDict())
        try:
            with swappable(sd):
                by_torch(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            sd.__dict__.update(_taken=None, _load_state_dict_pre_hooks=hooks)
        adopt(sd)
        note_load(sd)
        for number in range(len(sd._tables)):
            clear_free(sd, number, spare=True)


def load_packed(sd: StackedParameterDict, names: Tensor, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Become a dictionary of the names in a state dict, and return the part of it that torch is to load.

    ValueError or RuntimeError if that cannot be; then nothing has changed.
    """
    saved = {key[len(prefix) :]: state_dict[key] for key in keys_under(state_dict, prefix)}
    conform(sd, names, saved)
    if names.device.type != "meta":
        # torch hands it to `set_extra_state`, which has nothing left to do.
        saved[EXTRA_STATE] = names
    return {prefix + key: value for key, value in saved.items()}


def note_load(sd: StackedParameterDict) -> None:
    for table in sd._tables:
        table.loaded = True


def load_others(
    sd: StackedParameterDict,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> Mapping[str, Any]:
    """Load what a subclass has beside tables as torch does, and return the rest of the state dict."""
    tables = {table.attribute for table in sd._tables}
    others = {name: parameter for name, parameter in sd._parameters.items() if name not in tables}
    if not (others or sd._buffers or sd._modules):
        return state_dict
    owned = {key for key in keys_under(state_dict, prefix) if _is_owned(sd, key[len(prefix) :], others)}
    missing: list[str] = []
    Module._load_from_state_dict(
        StandIn(sd, others),  # type: ignore[arg-type]  # a stand-in
        {key: state_dict[key] for key in owned},
        prefix,
        local_metadata,
        strict,
        missing,
        unexpected_keys,
        error_msgs,
    )
    missing_keys += [key for key in missing if key != prefix + EXTRA_STATE]
    return {key: value for key, value in state_dict.items() if key not in owned}


def _is_owned(sd: StackedParameterDict, key: str, others: Mapping[str, Any]) -> bool:
    return key in others or key in sd._buffers or key.split(".", 1)[0] in sd._modules


@untraced
def conform(sd: StackedParameterDict, packed: Any, saved: dict[str, Any]) -> None:
    """Become a dictionary of the packed names and rows, with tables as large as the saved ones; values are not set.

    Nothing has changed if the names are damaged, a table is missing, a detached optimizer has state for rows, or
    memory runs out.
    """
    if packed.device.type == "meta":
        return
    if _has_the_names(sd, packed):
        _fit_capacities(sd, saved)
        return
    names, header = unpack(packed)
    check_header(header)
    old = {table.attribute: (number, table) for number, table in enumerate(sd._tables)}
    for attribute, *_ in header.tables:
        if attribute not in old and hasattr(sd, attribute):
            raise ValueError(f"the table '{attribute}' cannot be made: there is another attribute of that name")
    index = _index_of(sd, names, header, saved)
    places, before = index.places(), sd._index.places(index.names())
    numbers, rows, before_numbers, before_rows = places.tables, places.rows, before.tables, before.rows
    plan = []
    for number, (attribute, group, trainable, used) in enumerate(header.tables):
        there = numbers == number
        tensor = saved.get(attribute)
        if tensor is None and attribute in old:
            tensor = parameter_of(sd, old[attribute][1])
        capacity = max(used, len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0)
        plan.append((attribute, group, trainable, there, tensor, capacity))
    for table in sd._tables:
        refuse_strangers(sd, table, parameter_of(sd, table), attached(sd), "load other names into a table")
    made: list[Table] = []
    changes = Changes()
    tables = len(sd._tables)
    try:
        for attribute, group, trainable, there, tensor, capacity in plan:
            if attribute not in old:
                made.append(_new_table(sd, attribute, group, trainable, tensor, capacity))
                continue
            was, table = old[attribute]
            source = np.full(capacity, -1)
            kept = there & (before_numbers == was)
            source[rows[kept]] = before_rows[kept]
            parameter = parameter_of(sd, table)
            is_other = capacity != len(parameter) or bool((source != np.arange(capacity)).any())
            if is_other and not _is_only_values(sd, table, capacity):
                rearrange(sd, changes, table, capacity, torch.from_numpy(source))
            made.append(table)
        for table, (_, group, *_) in zip(made, plan, strict=True):
            changes.set_attributes(table, group=group)
        kept = {table.attribute: sd._parameters[table.attribute] for table in made}
        gone = [parameter_of(sd, table) for table in sd._tables if table not in made]
        tables_of_both = {table.attribute for table in sd._tables}
        others = {name: one for name, one in sd._parameters.items() if name not in tables_of_both}
        # In the saved order, by which an optimizer's state dict knows them.
        changes.replace_all(sd._parameters, others | kept)
        for optimizer in attached(sd):
            optimizer_state.put_in_order(changes, optimizer, [parameter_of(sd, table) for table in made], gone)
        changes.set_attributes(sd, _tables=made, _index=index, _patterns=header.patterns)
        changes.make()
    except BaseException:
        while not changes.made and len(sd._tables) > tables:
            remove_last_table(sd)
        raise


def _index_of(sd: StackedParameterDict, names: IndexMap, header: Header, saved: Mapping[str, Any]) -> RowIndex:
    """Return the index of names that were packed, after a look at whether the tables have so many rows."""
    own = {table.attribute: table for table in sd._tables}
    for table in header.tables:
        tensor = saved.get(table.attribute)
        if tensor is None and table.attribute in own:
            tensor = parameter_of(sd, own[table.attribute])
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise ValueError(f"the table '{table.attribute}' is missing")
        if table.attribute in saved:
            if table.used > len(tensor):
                raise ValueError(f"the table '{table.attribute}' has {len(tensor)} rows, and {table.used} are in use")
            refuse_claim(table.attribute, tensor, len(names))
    return RowIndex.of_ids(names, [table.used for table in header.tables])


def _has_the_names(sd: StackedParameterDict, packed: Tensor) -> bool:
    """Whether packed names are ours, in the same rows of the same tables."""
    if sd._same is not None and sd._same[0]() is packed and sd._same[1:] == _count(sd, packed):
        return True
    ours = names_as_packed(sd)
    same = ours is packed or same_bytes(ours, without_words(packed.cpu()))
    if same and not packed.is_inference():  # of which torch does not count what is written to them
        sd.__dict__["_same"] = (weakref.ref(packed), *_count(sd, packed))
    return same


def _is_only_values(sd: StackedParameterDict, table: Table, capacity: int) -> bool:
    """Whether a table is sharded, but nothing else than the values that are to come belongs to its rows."""
    parameter = parameter_of(sd, table)
    if not is_sharded(parameter) or capacity != len(parameter) or table.frozen is not None:
        return False
    return parameter.grad is None and not any(
        True for optimizer in attached(sd) for _ in optimizer_state.of_rows(optimizer, parameter)
    )


def _fit_capacities(sd: StackedParameterDict, saved: Mapping[str, Any]) -> None:
    for number, table in enumerate(sd._tables):
        tensor = saved.get(table.attribute)
        if isinstance(tensor, Tensor) and tensor.dim() and sd._index.used(number) <= len(tensor):
            refuse_claim(table.attribute, tensor, len(sd._index))
            resize(sd, table, len(tensor))


def _new_table(
    sd: StackedParameterDict, attribute: str, group: int, trainable: bool, tensor: Any, capacity: int
) -> Table:
    if not isinstance(tensor, Tensor) or tensor.dim() == 0:
        raise ValueError(f"the table '{attribute}' is missing")
    with torch.inference_mode(False):
        data = huge_pages.full((capacity, *tensor.shape[1:]), 0, dtype=tensor.dtype, device=device_of(sd))
    return sd._tables[add_table(sd, attribute, Parameter(data, requires_grad=trainable), group)]


class LentTables:
    """In a pickle that is being made: keeps the memory of tables as it is, and raises if they have got other memory."""

    def __init__(self, owner: StackedParameterDict) -> None:
        self._tables = []
        for table in owner._tables:
            parameter = owner._parameters.get(table.attribute)
            if isinstance(parameter, Parameter) and type(parameter.data) is Tensor:
                self._tables.append((parameter, lent_whole(owner, table)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        for parameter, tensor in self._tables:
            if parameter.data_ptr() != tensor.data_ptr() or parameter.shape != tensor.shape:
                raise RuntimeError(
                    "another thread has changed the dictionary while it was pickled: pickle its copy(), or save its "
                    "state_dict()"
                )
        return OrderedDict, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return nothing, because a copy is made under the lock."""


def were_packed(names: Any) -> bool:
    # Bytes that begin otherwise than packed names do. As an entry, they would make entries of the tables, too.
    return isinstance(names, Tensor) and names.dtype == torch.uint8 and names.dim() == 1


def keys_under(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key in state_dict if key.startswith(prefix)] if prefix else list(state_dict)


def load_whole(sd: StackedParameterDict, state_dict: Any) -> bool:
    """Load what a ParameterDict saved, if it has all names of the only table, and tensors of its shape.

    Of anything else nothing is loaded, and the result is false. torch's way begins with a copy of the whole state dict,
    for the sake of those who might change it, which takes longer than this.
    """
    if (
        type(state_dict) not in (dict, OrderedDict)
        or len(sd._tables) != 1
        or len(sd._parameters) != 1
        or not 0 < len(state_dict) == len(sd._index)
        or EXTRA_STATE in state_dict
        or sd._modules
        or sd._buffers
        or sd._load_state_dict_pre_hooks
        or sd._load_state_dict_post_hooks
        or is_intercepted()
    ):
        return False
    parameter = sd._parameters.get(sd._tables[0].attribute)
    # Past `OrderedDict`, which looks up every key that it gives; the order does not matter here.
    names, values = list(dict.keys(state_dict)), list(dict.values(state_dict))
    if type(parameter) is not Parameter or type(parameter.data) is not Tensor or set(map(type, names)) != {str}:
        return False
    if parameter.device.type == "meta":
        return False
    places = sd._index.places(names)
    if places.only_table() < 0:
        return False
    classes, _ = sort_tensors(values)
    if classes.any() or values[0].shape != parameter.shape[1:]:
        return False
    write_rows(parameter, places.rows, stack(values, values[0].detach()[None]))
    return True


@untraced
def load_named(
    sd: StackedParameterDict,
    state_dict: Mapping[str, Any],
    prefix: str,
    strict: bool,
    assign: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load what a ParameterDict saved: an empty dictionary takes over the names, another one must have them."""
    keys = keys_under(state_dict, prefix)
    names = [key[len(prefix) :] for key in keys] if prefix else keys
    values = list(map(state_dict.__getitem__, keys))
    classes, firsts = sort_tensors(values)
    # What is no plain tensor is looked at one by one: subclasses, tensors on the meta device, and no tensors at all.
    odd = [at for at in np.flatnonzero(classes < 0).tolist() if not isinstance(values[at], Tensor)]
    error_msgs += [
        f'While copying the parameter named "{keys[at]}", expected torch.Tensor or Tensor-like object from '
        f"checkpoint but received {type(values[at])}"
        for at in odd
    ]
    if len(sd._index) == 0:
        taken = sorted(set(range(len(keys))).difference(odd))
        insert_values(sd, [names[at] for at in taken], [_as_entry(values[at]) for at in taken])
        return
    found = sd._index.places(names)
    numbers, rows = found.tables, found.rows
    if strict:
        unexpected_keys += [keys[at] for at in found.missing()]
        if len(found.found()) < len(sd._index):
            given = set(names)
            missing_keys += [prefix + name for name in sd._index if name not in given]
    for number, _, _ in found.by_table():
        refuse_foreign(sd, sd._tables[number], "load the layout of a ParameterDict")
    for (class_, number), there in partition([classes, numbers]):
        if number < 0:
            continue
        parameter = parameter_of(sd, sd._tables[number])
        places = there.tolist()
        if parameter.device.type == "meta":
            parameter = _off_meta(sd, sd._tables[number], assign, (values[at] for at in places))
        if class_ >= 0 and values[firsts[class_]].shape == parameter.shape[1:]:
            chosen = values if len(places) == len(values) else [values[at] for at in places]
            write_rows(parameter, rows[there], stack(chosen, chosen[0].detach()[None]))
            continue
        for at in places:
            value = values[at]
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape[1:]:
                try:
                    write_rows(parameter, rows[at : at + 1], value.detach()[None])
                except Exception as error:  # as torch does, which reports it with all others
                    error_msgs.append(
                        f'While copying the parameter named "{keys[at]}", whose dimensions in the model are '
                        f"{parameter.shape[1:]} and whose dimensions in the checkpoint are {value.shape}, an exception "
                        f"occurred : {error.args}."
                    )
            else:
                error_msgs.append(
                    f"size mismatch for {keys[at]}: copying a param with shape {value.shape} from checkpoint, the "
                    f"shape in current model is {parameter.shape[1:]}."
                )


def _off_meta(sd: StackedParameterDict, table: Table, assign: bool, values: Iterable[Any]) -> Tensor:
    """Return the Parameter of a table on the meta device: one with memory, in its place, if values are assigned."""
    parameter = parameter_of(sd, table)
    place = next((value.device for value in values if isinstance(value, Tensor) and not value.is_meta), None)
    if place is None:
        return parameter
    if not assign:
        warnings.warn(
            f"for {table.attribute}: copying named rows to a table on the meta device, which is a no-op. (Did you mean "
            "to pass `assign=True`?)",
            stacklevel=2,
        )
        return parameter
    data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=place)
    made = sd._parameters[table.attribute] = Parameter(data, requires_grad=parameter.requires_grad)
    adopt(sd)
    return made


def _as_entry(value: Tensor) -> Tensor:
    differentiable = value.is_floating_point() or value.is_complex()
    return value if differentiable else Parameter(value.detach(), requires_grad=False)
