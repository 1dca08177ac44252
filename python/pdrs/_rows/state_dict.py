"""State dicts of a StackedParameterDict: in its own layout, tables and packed names, and in that of a ParameterDict."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import _IncompatibleKeys

from pdrs._core import TableRows, sort_tensors
from pdrs._rows import optimizer_state
from pdrs._rows.insert import partition
from pdrs._rows.names_codec import (
    Header,
    TableHeader,
    check_header,
    is_packed,
    pack,
    refuse_unpaid,
    same_bytes,
    unpack,
    used_rows,
)
from pdrs._rows.row_ids import row_of, table_of
from pdrs._rows.store import Table, is_sharded
from pdrs._rows.train import TrainedRows
from pdrs._rows.write import stack, write_rows
from pdrs._torch import huge_pages
from pdrs._torch.modes import is_intercepted
from pdrs._torch.stand_in import StandIn
from pdrs._torch.transaction import Changes
from pdrs._torch.untraced import untraced

__all__ = ["SavedRows"]

_EXTRA_STATE = "_extra_state"  # the key that torch gives what `get_extra_state` returns


class SavedRows(TrainedRows):
    """Named rows that can be saved and loaded."""

    if TYPE_CHECKING:
        # The names as they were last packed, and what was counted then: kept, because models are saved again and again,
        # and because to compare bytes is the fastest way to find out that what is loaded has the same names.
        # Distributed checkpoints are loaded into the tensors of a state dict in place: torch counts what is written to
        # them.
        _packed: tuple[Tensor, int, int, int, Header] | None
        # Packed names of someone else's that were found to be the same, and what was counted then.
        _same: tuple[weakref.ref[Tensor], int, int, int, Header] | None
        # What `load_state_dict` has taken the names from, until it is done.
        _taken: Tensor | None
        # Texts beside the tensors of the file that it was opened from. They are no part of its state.
        metadata: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(_packed=None, _same=None, _taken=None, metadata={})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is only remembered to be faster."""
        return super().__getstate__() | {"_packed": None, "_same": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what ``pickle`` writes: names and tables as they are at one time, whatever other threads do."""
        with self._lock.read():
            for table in self._tables:
                self._clear_free(table)
            reduced = super().__reduce_ex__(protocol)
            state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
            if not isinstance(state, dict) or state.get("_index") is not self._index:
                return reduced
            state = state | {"_index": self._index.copy()}
            # Behind all others, so that it is asked when these have been written.
            state["_lent"] = _Lent(self)
            return (*reduced[:2], state, *reduced[3:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled or copied."""
        super().__setstate__({key: value for key, value in state.items() if key != "_lent"})

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Tables and names, as they are at one time.
        with self._lock.read():
            for table in self._tables:
                self._clear_free(table)
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for table in self._tables:
                saved = destination.get(prefix + table.attribute)
                if not keep_vars and isinstance(saved, Tensor):
                    self._lend(table, saved)

    def get_extra_state(self) -> Tensor:
        """Return the names, their rows, and what there is to know of the tables: uint8 ``[bytes]``. **O(n)**."""
        with self._lock.read():
            packed = self._packed_before()
            if packed is None:
                with torch.inference_mode(False):  # where torch would not count
                    packed = pack(self._index, self._header())
                self.__dict__["_packed"] = (packed, *self._count(packed))
            return packed

    def _packed_before(self) -> Tensor | None:
        if self._packed is None:
            return None
        packed = self._packed[0]
        return packed if self._packed[1:] == self._count(packed) else None

    def _count(self, packed: Tensor) -> tuple[int, int, int, Header]:
        """Return what changes when packed names, or ours, do."""
        return packed._version, self._moves, self._inserts, self._header()

    def _header(self) -> Header:
        tables = tuple(
            TableHeader(table.attribute, table.group, self._parameter(table).requires_grad, table.rows.used)
            for table in self._tables
        )
        return Header(tables, self._patterns)

    def named_state_dict(self) -> dict[str, Tensor]:
        """Return a dict of names and rows, as a ParameterDict's ``state_dict`` is. **O(n)**.

        The rows are detached views of the tables; those of sharded ones are copies, for which all processes must ask.
        Both classes of ParameterDict load it, and so does this one.
        """
        with self._lock.read():
            tables = [self._lent_whole(table).unbind() for table in self._tables]
            return {name: tables[table_of(id_)][row_of(id_)] for name, id_ in self._index.items()}

    # -- loading -------------------------------------------------------------------------------------------------------

    def set_extra_state(self, state: Any) -> None:
        """Take over names and rows; tables are made, removed and resized. **O(n)**, or little if they are the same."""
        if not is_packed(state):
            raise ValueError("expected the packed names of a StackedParameterDict")
        with self._lock:
            if state is not self._taken:
                with self._lock.change():
                    self._refuse_tables_by_name(state)
                    self._conform(state, {})

    def _refuse_tables_by_name(self, packed: Tensor) -> None:
        # Tools that load a tensor at a time, such as `from_pretrained`, load into the tables that are there.
        own = {table.attribute for table in self._tables}
        lacking = [] if packed.is_meta else [name for name in used_rows(packed) if name not in own]
        if lacking:
            raise ValueError(
                f"the table '{lacking[0]}' is missing: expected a dictionary that has it, because the names are loaded "
                f"without their tables, got {sorted(own) or 'no tables'}. Load all at once with load_state_dict or "
                "pdrs.load. Or make the dictionary in the dtype that was saved, reserve rows if it is empty, and "
                "convert it afterwards"
            )

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does; one of a ParameterDict that fits, much faster, unless there are hooks."""
        own = type(self)._load_from_state_dict is SavedRows._load_from_state_dict
        if own and not assign and not torch.compiler.is_compiling():
            with self._lock.change():
                if _load_whole(self, state_dict):
                    self._note_load()
                    return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Before the names are read: a hook may rename keys of an old checkpoint.
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        names: Any = state_dict.get(prefix + _EXTRA_STATE)
        if not is_packed(names):
            if _were_packed(names):
                error_msgs.append(f"While loading the names of {prefix or 'the dictionary'}: they are damaged")
                return
            problems = missing_keys, unexpected_keys, error_msgs
            with self._lock.change():
                state_dict = self._load_others(state_dict, prefix, local_metadata, strict, *problems)
                assign = local_metadata.get("assign_to_params_buffers", False)
                _load_named(self, state_dict, prefix, strict, assign, *problems)
                self._note_load()
            return
        saved = {key[len(prefix) :]: state_dict[key] for key in _under(state_dict, prefix)}
        with self._lock.change():
            try:
                self._conform(names, saved)
            except (ValueError, RuntimeError) as error:
                error_msgs.append(f"While loading the names of {prefix or 'the dictionary'}: {error}")
                return
            if names.device.type != "meta":
                # torch hands it to `set_extra_state`, which has nothing left to do.
                saved[_EXTRA_STATE] = names
            state_dict = {prefix + key: value for key, value in saved.items()}
            hooks = self.__dict__["_load_state_dict_pre_hooks"]
            self.__dict__.update(_taken=saved.get(_EXTRA_STATE), _load_state_dict_pre_hooks=OrderedDict())
            try:
                with self._swappable():
                    super()._load_from_state_dict(
                        state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                    )
            finally:
                self.__dict__.update(_taken=None, _load_state_dict_pre_hooks=hooks)
            self._adopt()
            self._note_load()
            for table in self._tables:
                self._clear_free(table, spare=True)

    def _note_load(self) -> None:
        for table in self._tables:
            table.loaded = True

    def _load_others(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> Mapping[str, Any]:
        """Load what a subclass has beside tables as torch does, and return the rest of the state dict."""
        tables = {table.attribute for table in self._tables}
        others = {name: parameter for name, parameter in self._parameters.items() if name not in tables}
        if not (others or self._buffers or self._modules):
            return state_dict
        owned = {key for key in _under(state_dict, prefix) if self._is_owned(key[len(prefix) :], others)}
        missing: list[str] = []
        Module._load_from_state_dict(
            StandIn(self, others),  # type: ignore[arg-type]  # a stand-in
            {key: state_dict[key] for key in owned},
            prefix,
            local_metadata,
            strict,
            missing,
            unexpected_keys,
            error_msgs,
        )
        missing_keys += [key for key in missing if key != prefix + _EXTRA_STATE]
        return {key: value for key, value in state_dict.items() if key not in owned}

    def _is_owned(self, key: str, others: Mapping[str, Any]) -> bool:
        return key in others or key in self._buffers or key.split(".", 1)[0] in self._modules

    @untraced
    def _conform(self, packed: Any, saved: dict[str, Any]) -> None:
        """Become a dictionary of the packed names and rows, with tables as large as the saved ones; values are not set.

        Nothing has changed if the names are damaged, a table is missing, a detached optimizer has state for rows, or
        memory runs out.
        """
        if packed.device.type == "meta":
            return
        if self._has_the_names(packed):
            self._fit_capacities(saved)
            return
        index, ids, header = unpack(packed)
        check_header(header)
        old = {table.attribute: (number, table) for number, table in enumerate(self._tables)}
        for attribute, *_ in header.tables:
            if attribute not in old and hasattr(self, attribute):
                raise ValueError(f"the table '{attribute}' cannot be made: there is another attribute of that name")
        numbers, rows = table_of(ids), row_of(ids)
        before = self._index.indices(list(index), missing=-1)
        plan = []
        for number, (attribute, group, trainable, used) in enumerate(header.tables):
            there = numbers == number
            tensor = saved.get(attribute)
            if isinstance(tensor, Tensor) and tensor.dim() and used > len(tensor):
                raise ValueError(f"the table '{attribute}' has {len(tensor)} rows, and {used} are in use")
            if isinstance(tensor, Tensor) and tensor.dim():
                refuse_unpaid(attribute, tensor, len(index))
            of_table = TableRows.of_live(used, rows[there])
            if tensor is None and attribute in old:
                tensor = self._parameter(old[attribute][1])
            capacity = max(used, len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0)
            plan.append((attribute, group, trainable, there, of_table, tensor, capacity))
        for table in self._tables:
            self._refuse_strangers(table, self._parameter(table), self._attached(), "load other names into a table")
        made: list[Table] = []
        changes = Changes()
        tables = len(self._tables)
        try:
            for attribute, group, trainable, there, _, tensor, capacity in plan:
                if attribute not in old:
                    made.append(self._new_table(attribute, group, trainable, tensor, capacity))
                    continue
                was, table = old[attribute]
                source = np.full(capacity, -1)
                kept = there & (before >= 0) & (table_of(before) == was)
                source[rows[kept]] = row_of(before[kept])
                parameter = self._parameter(table)
                is_other = capacity != len(parameter) or bool((source != np.arange(capacity)).any())
                if is_other and not self._is_only_values(table, capacity):
                    self._rearrange(changes, table, capacity, torch.from_numpy(source))
                made.append(table)
            for table, (_, group, _, _, of_table, _, _) in zip(made, plan, strict=True):
                changes.set_attributes(table, group=group, rows=of_table)
            kept = {table.attribute: self._parameters[table.attribute] for table in made}
            gone = [self._parameter(table) for table in self._tables if table not in made]
            tables_of_both = {table.attribute for table in self._tables}
            others = {name: one for name, one in self._parameters.items() if name not in tables_of_both}
            # In the saved order, by which an optimizer's state dict knows them.
            changes.replace_all(self._parameters, others | kept)
            for optimizer in self._attached():
                optimizer_state.put_in_order(changes, optimizer, [self._parameter(table) for table in made], gone)
            changes.set_attributes(self, _tables=made, _index=index, _patterns=header.patterns)
            self._moved(changes)
            changes.make()
        except BaseException:
            while not changes.made and len(self._tables) > tables:
                self._remove_last_table()
            raise

    def _has_the_names(self, packed: Tensor) -> bool:
        """Whether packed names are ours, in the same rows of the same tables."""
        if self._same is not None and self._same[0]() is packed and self._same[1:] == self._count(packed):
            return True
        ours = self.get_extra_state()
        same = ours is packed or same_bytes(ours, packed.cpu())
        if same and not packed.is_inference():  # of which torch does not count what is written to them
            self.__dict__["_same"] = (weakref.ref(packed), *self._count(packed))
        return same

    def _is_only_values(self, table: Table, capacity: int) -> bool:
        """Whether a table is sharded, but nothing else than the values that are to come belongs to its rows."""
        parameter = self._parameter(table)
        if not is_sharded(parameter) or capacity != len(parameter) or table.frozen is not None:
            return False
        return parameter.grad is None and not any(
            True for optimizer in self._attached() for _ in optimizer_state.of_rows(optimizer, parameter)
        )

    def _fit_capacities(self, saved: Mapping[str, Any]) -> None:
        for table in self._tables:
            tensor = saved.get(table.attribute)
            if isinstance(tensor, Tensor) and tensor.dim() and table.rows.used <= len(tensor):
                refuse_unpaid(table.attribute, tensor, len(self._index))
                self._resize(table, len(tensor))

    def _new_table(self, attribute: str, group: int, trainable: bool, tensor: Any, capacity: int) -> Table:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            raise ValueError(f"the table '{attribute}' is missing")
        with torch.inference_mode(False):
            data = huge_pages.full((capacity, *tensor.shape[1:]), 0, dtype=tensor.dtype, device=self._device())
        return self._tables[self._add_table(attribute, Parameter(data, requires_grad=trainable), group)]


class _Lent:
    """In a pickle that is being made: keeps the memory of tables as it is, and raises if they have got other memory."""

    def __init__(self, owner: SavedRows) -> None:
        self._tables = []
        for table in owner._tables:
            parameter = owner._parameters.get(table.attribute)
            if isinstance(parameter, Parameter) and type(parameter.data) is Tensor:
                self._tables.append((parameter, owner._lent_whole(table)))

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


def _were_packed(names: Any) -> bool:
    # Bytes that begin otherwise than packed names do. As an entry, they would make entries of the tables, too.
    return isinstance(names, Tensor) and names.dtype == torch.uint8 and names.dim() == 1


def _under(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key in state_dict if key.startswith(prefix)] if prefix else list(state_dict)


def _load_whole(sd: SavedRows, state_dict: Any) -> bool:
    """Load what a ParameterDict saved, if it has all names of the only table, and tensors of its shape.

    Of anything else nothing is loaded, and the result is false. torch's way begins with a copy of the whole state dict,
    for the sake of those who might change it, which takes longer than this.
    """
    if (
        type(state_dict) not in (dict, OrderedDict)
        or len(sd._tables) != 1
        or len(sd._parameters) != 1
        or not 0 < len(state_dict) == len(sd._index)
        or _EXTRA_STATE in state_dict
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
    ids = sd._index.indices(names, missing=-1)
    if ids.min() < 0:
        return False
    classes, _ = sort_tensors(values)
    if classes.any() or values[0].shape != parameter.shape[1:]:
        return False
    write_rows(parameter, row_of(ids), stack(values, values[0].detach()[None]))
    return True


@untraced
def _load_named(
    sd: SavedRows,
    state_dict: Mapping[str, Any],
    prefix: str,
    strict: bool,
    assign: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load what a ParameterDict saved: an empty dictionary takes over the names, another one must have them."""
    keys = _under(state_dict, prefix)
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
        sd._insert([names[at] for at in taken], [_as_entry(values[at]) for at in taken])
        return
    ids = sd._index.indices(names, missing=-1)
    if strict:
        unexpected_keys += [keys[at] for at in np.flatnonzero(ids < 0)]
        if (ids >= 0).sum() < len(sd._index):
            given = set(names)
            missing_keys += [prefix + name for name in sd._index if name not in given]
    for number in np.unique(table_of(ids[ids >= 0])):
        sd._refuse_foreign(sd._tables[number], "load the layout of a ParameterDict")
    for (class_, number), there in partition([classes, table_of(ids)]):
        if number < 0:
            continue
        parameter = sd._parameter(sd._tables[number])
        places = there.tolist()
        if parameter.device.type == "meta":
            parameter = _off_meta(sd, sd._tables[number], assign, (values[at] for at in places))
        if class_ >= 0 and values[firsts[class_]].shape == parameter.shape[1:]:
            chosen = values if len(places) == len(values) else [values[at] for at in places]
            write_rows(parameter, row_of(ids[there]), stack(chosen, chosen[0].detach()[None]))
            continue
        for at in places:
            value = values[at]
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape[1:]:
                try:
                    write_rows(parameter, row_of(ids[at : at + 1]), value.detach()[None])
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


def _off_meta(sd: SavedRows, table: Table, assign: bool, values: Iterable[Any]) -> Tensor:
    """Return the Parameter of a table on the meta device: one with memory, in its place, if values are assigned."""
    parameter = sd._parameter(table)
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
    sd._adopt()
    return made


def _as_entry(value: Tensor) -> Tensor:
    differentiable = value.is_floating_point() or value.is_complex()
    return value if differentiable else Parameter(value.detach(), requires_grad=False)
