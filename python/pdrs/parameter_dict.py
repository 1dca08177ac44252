"""``pdrs.ParameterDict``: torch's ParameterDict with its names in Rust."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, KeysView, Mapping
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling as _tracing
from torch.nn import Buffer, Module, Parameter
from torch.nn.modules import module as _torch_module
from torch.nn.modules.module import _IncompatibleKeys

from pdrs._core import (
    EntryKeys,
    clear_entries,
    delete_entry,
    get_entry,
    insert_all,
    pop_end,
    pop_entry,
    prepare,
    save_parameters,
    set_entry,
    take_over,
    use_native_slots,
)
from pdrs._entries import copies, redirected
from pdrs._entries.checkpointing import given_to, takes_down
from pdrs._entries.load_state import load_from_state_dict, load_rest, load_whole
from pdrs._entries.sources import as_dict, columns, refuse_stacked
from pdrs._entries.views import EntryItemsView, EntryValuesView
from pdrs._moves import run
from pdrs._moves.recognise import usual_applies
from pdrs._torch import own_functions
from pdrs._torch.errors import MissingEntryError
from pdrs._torch.gc_pause import collector_paused
from pdrs._torch.names import listed
from pdrs._torch.own_functions import are_functions_own, follows_torch, is_own

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["ParameterDict"]

# A repr longer than this shows its two ends only.
_REPR_WHOLE = 100
_REPR_END = 10


class _Kind(NamedTuple):
    """What may be registered with a Module under a name, in torch's words."""

    name: str
    expected: str


_PARAMETER = _Kind("parameter", "torch.nn.Parameter or None")
_MODULE = _Kind("child module", "torch.nn.Module or None")
_PARAMETRIZED = _Kind("parametrized tensor", "torch.Tensor")
_BUFFER = _Kind("buffer", "torch.nn.Buffer, torch.Tensor or None")


class ParameterDict(torch.nn.ParameterDict):
    r"""An ordered dictionary of Parameters that stays fast with a million of them.

    It is a subclass of :class:`torch.nn.ParameterDict` and replaces it. A tensor becomes a registered
    :class:`~torch.nn.Parameter`, a Module becomes a child module, and any other value is kept as it is. Entries keep
    the order of insertion, and each can be popped in O(1). Any ``str`` except the empty one is a key, also with dots.
    Keys such as ``"type"`` or ``"keys"`` do not hide the methods of these names.

    Parameters
    ----------
    parameters
        The first entries: a mapping from ``str``, or an iterable of pairs. See :meth:`update`. Plain dicts are sorted.

    Notes
    -----
    Names and their order are in a native index. Parameters are in the plain dict
    ``_parameters``, as in each Module, because torch reads and writes them there. Costs are amortised; *n* is the
    number of entries.

    Examples
    --------
    >>> import torch, pdrs
    >>> pd = pdrs.ParameterDict({"left": torch.zeros(2), "right": torch.ones(2)})
    >>> pd["layer.0.weight"] = torch.zeros(3)
    >>> list(pd)
    ['left', 'right', 'layer.0.weight']
    >>> pd.popitem(last=False)[0]
    'left'
    >>> [name for name, _ in pd.named_parameters()]
    ['right', 'layer.0.weight']
    """

    if TYPE_CHECKING:  # Not at run time: torch.jit.script would read these, and know neither type.
        _keys: EntryKeys  # type: ignore[assignment]  # torch's is a dict, which nobody outside its class uses
        _values: dict[str, Any]

    # Whether the class overrides nothing that torch's class would ask for an entry; torch.compile cannot tell.
    _is_read_directly = True

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._is_read_directly = own_functions.is_read_directly(cls)
        if all(getattr(cls, name) is function for name, function in _NATIVE.items()):
            use_native_slots(cls, Parameter)

    def __init__(self, parameters: Any = None) -> None:
        super().__init__()
        # In `__dict__` at once: there is nothing yet that `Module.__setattr__` would have to look for.
        self.__dict__["_keys"] = EntryKeys()
        # Entries that are neither Parameters nor Modules. As attributes of the module, as torch keeps them, they would
        # hide its methods.
        self.__dict__["_values"] = {}
        if parameters is not None:
            self.update(parameters)

    # -- one entry -----------------------------------------------------------------------------------------------------

    # The interpreter would run a function of two arguments in place of the native slot; see `use_native_slots` below.
    def __getitem__(self, key: str, _: None = None) -> Any:
        """Return the value of ``key``: its Parameter, Module or plain value. **O(1)**.

        Raises
        ------
        KeyError
            If ``key`` is missing. The error is also an AttributeError, which torch's class raises.
        TypeError
            If ``key`` is not a ``str``.
        """
        if _tracing():
            return self._traced_value(key)
        value = get_entry(self, key)
        return self._value_of(key) if value is None else value

    def __setitem__(self, key: str, value: Any) -> None:
        """Set the value of ``key``. A new key goes to the end, an old one keeps its place. **O(1)**.

        A tensor that is not a Parameter becomes one, with the same data. A refused value changes nothing.

        Raises
        ------
        KeyError
            If ``key`` is empty.
        TypeError
            If ``key`` is not a ``str``. Also if the old value is a Parameter or Module and ``value`` is neither.
        ValueError
            If ``value`` is a Parameter that is the result of a differentiable operation.
        """
        if not _tracing() and set_entry(self, key, value, Parameter):
            return
        # What asks for a closer look is what torch lets others do to Modules: hooks, parametrizations, other kinds.
        if _tracing() or is_own(self, own_functions.SETITEM):
            key = self._key_to_attr(key)
            if isinstance(value, Tensor):
                value = _to_leaf_parameter(key, value)
            self._place(key, self._accepted(key, value, self._kind_of(key)))
        elif follows_torch(self, "__setitem__"):
            if isinstance(value, Tensor):
                value = _to_leaf_parameter(key, value)
            redirected.write(self, key, value)
        else:
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        """Remove ``key``. The other entries keep their order. Raises KeyError if ``key`` is missing. **O(1)**."""
        if not _tracing() and delete_entry(self, key):
            return
        if not (_tracing() or is_own(self, own_functions.DELITEM)):
            super().__delitem__(key)
            return
        del self._keys[key]
        try:
            del self._parameters[key]
        except KeyError:
            self._delete_elsewhere(key)

    def __contains__(self, key: object) -> bool:
        """Return whether ``key`` is the key of an entry. **O(1)**."""
        # Direct instances answer `[]`, `in` and `len` natively, in the same way: see `use_native_slots` below.
        if _tracing():
            return key in self._traced_keys()
        return super().__contains__(key)  # type: ignore[operator]  # torch's takes anything, too

    def pop(self, key: str, *default: Any) -> Any:
        """Remove ``key`` and return its value. If ``key`` is missing, return ``default`` if one is given. **O(1)**.

        The other entries keep their order. Without a default, a missing key raises KeyError (also an AttributeError).
        """
        if default and len(default) > 1:
            raise TypeError(f"pop expected at most 2 arguments, got {1 + len(default)}")
        if not _tracing():
            value = pop_entry(self, key)
            if value is not None:
                return value
        if default and key not in self:
            return default[0]
        return super().pop(key)

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """Remove the last (or the first) entry and return its key and value. **O(1)** at both ends.

        Raises KeyError if the dictionary is empty.
        """
        if not _tracing():
            popped = pop_end(self, last)
            if popped is not None:
                return popped
            if last and not follows_torch(self, "popitem"):
                return super().popitem()
        try:
            key = next(reversed(self._keys) if last else iter(self._keys))
        except StopIteration:
            raise KeyError("popitem(): dictionary is empty") from None
        value = self[key]
        del self[key]
        return key, value

    # -- all entries ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of entries. **O(1)**."""
        if _tracing():
            return len(self._traced_keys())
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in order. **O(1)** per step; RuntimeError if entries come or go meanwhile."""
        if _tracing():
            return iter(self._traced_keys())
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        """Iterate over the keys from the last to the first. **O(1)** per step."""
        if _tracing():
            return reversed(self._traced_keys())
        return super().__reversed__()

    def keys(self) -> KeysView[str]:
        """Return a view of the keys: ordered, reversible, with set operations. **O(1)**."""
        if _tracing():
            return dict.fromkeys(self._traced_keys()).keys()
        return super().keys()

    def values(self) -> EntryValuesView:
        """Return a view of the values: ordered, reversible. **O(1)**.

        ``in`` compares by identity, in **O(n)**.
        """
        if _tracing():
            return [self[key] for key in self._traced_keys()]  # type: ignore[return-value]  # seen by the tracer alone
        if is_own(self, own_functions.VALUES) or follows_torch(self, "values"):
            return EntryValuesView(self)
        return super().values()  # type: ignore[return-value]  # whatever somebody else gives

    def items(self) -> EntryItemsView:
        """Return a view of the pairs of key and value: ordered, reversible. **O(1)**.

        ``in`` compares the value by identity, in **O(1)**.
        """
        if _tracing():
            return [(key, self[key]) for key in self._traced_keys()]  # type: ignore[return-value]  # as in values()
        if is_own(self, own_functions.ITEMS) or follows_torch(self, "items"):
            return EntryItemsView(self)
        return super().items()  # type: ignore[return-value]  # whatever somebody else gives

    def update(self, parameters: Any) -> None:
        """Set many entries, all or none. **O(m)** for ``m`` entries.

        Parameters
        ----------
        parameters
            A mapping from ``str``, or an iterable of pairs. An ``OrderedDict``, a ParameterDict and pairs keep their
            order. Other mappings, such as a plain ``dict``, are sorted by key, as in torch's class.

        Raises
        ------
        TypeError, ValueError, KeyError
            If ``parameters`` or one of its entries is refused. Then no entry has been set.
        """
        if not isinstance(parameters, Iterable):
            raise TypeError(
                "ParametersDict.update should be called with an iterable of key/value pairs, but got "
                f"{type(parameters).__name__}"
            )
        if not (_tracing() or is_own(self, own_functions.UPDATE)):
            refuse_stacked(parameters)
            super().update(parameters)  # type: ignore[arg-type]  # torch's takes pairs, too
            return
        with collector_paused():
            source = as_dict(parameters)
            if source is not None and self._is_usual_for(source):
                take_over(self._keys, self._parameters, source)
            else:
                self._insert(*columns(parameters))

    def clear(self) -> None:
        """Remove all entries. **O(n)**."""
        if not (_tracing() or is_own(self, own_functions.CLEAR)):
            super().clear()
            return
        for key in clear_entries(self._keys, self._parameters):
            self._delete_elsewhere(key)

    def copy(self) -> ParameterDict:
        """Return a new ParameterDict that shares all values with this one. **O(n)**."""
        if _tracing() or (is_own(self, own_functions.COPY) and is_own(self, own_functions.SOURCE)):
            return ParameterDict(self)
        if follows_torch(self, "copy"):
            return ParameterDict([(key, self[key]) for key in self._keys])
        return super().copy()  # type: ignore[return-value]  # whatever somebody else gives

    def fromkeys(self, keys: Iterable[str], default: Any = None) -> ParameterDict:
        """Return a new ParameterDict in which each of ``keys`` has the value ``default``. **O(m)** for ``m`` keys.

        A Parameter is shared by all keys. For another tensor, each key gets its own Parameter with the same data.
        """
        if _tracing() or are_functions_own(self, own_functions.FROMKEYS):
            return ParameterDict(zip(keys if isinstance(keys, str) else listed(keys), repeat(default)))
        return super().fromkeys(keys, default)  # type: ignore[return-value]  # whatever somebody else gives

    def stack(self) -> StackedParameterDict:
        """Return a StackedParameterDict with copies of all entries. **O(n)**.

        Raises
        ------
        TypeError
            If an entry is not a tensor.
        """
        from pdrs.stacked import StackedParameterDict

        return StackedParameterDict(self)

    def extra_repr(self) -> str:
        """Return one line for each entry. Of more than 100 entries, only the first and last ten are shown."""
        hidden = len(self._keys) - 2 * _REPR_END
        if len(self._keys) <= _REPR_WHOLE or not is_own(self, own_functions.EXTRA_REPR):
            return super().extra_repr()
        items = self.items()
        ends = (islice(items, _REPR_END), reversed(list(islice(reversed(items), _REPR_END))))
        head, tail = (torch.nn.ParameterDict.extra_repr(_Shown(list(end))) for end in ends)  # type: ignore[arg-type]
        return f"{head}\n  ... {hidden} more ...\n{tail}"

    # -- as a Module ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Find entries that are neither Parameters nor Modules, and what torch finds."""
        values = self.__dict__.get("_values")
        if values and name in values:
            return values[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute as torch does, but never mistake an attribute of the module for an entry of that name.

        A Parameter of the name of an entry becomes the value of the entry, whatever else has that name.
        """
        state = self.__dict__
        is_key = name in state.get("_keys", ())
        if is_key and isinstance(value, Parameter):
            # Here, and not in torch's method, which refuses dots: `load_state_dict(assign=True)` sets attributes.
            value = _to_leaf_parameter(name, value)
            if _tracing() or is_own(self, own_functions.SETATTR):
                self._place(name, self._accepted(name, value, self._kind_of(name)))
            else:
                redirected.register(self, name, value, super().__setattr__)
            return
        # A subclass may give an entry another attribute name than its key.
        is_plain = name in state.get("_values", ())
        if is_key or is_plain:
            if redirected.is_attribute(self, name) and name not in redirected.parametrized(self):
                object.__setattr__(self, name, value)
                return
            # Tensors stay where FSDP and others put them, and look for them; a Buffer torch refuses.
            is_plain = is_plain or not (isinstance(value, Tensor) or self._kind_of(name))
        if is_plain and not isinstance(value, Buffer):
            if not isinstance(value, (Parameter, Module)):
                if name in redirected.parametrized(self):
                    raise _refusal(name, value, _PARAMETRIZED)
                if _tracing() or are_functions_own(self, own_functions.SETATTR):
                    self._values[name] = value
                    state.pop(name, None)
                else:
                    redirected.set_plain(self, name, value, super().__setattr__)
                return
            self._values.pop(name, None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute as torch does: of an entry the key stays, until it is deleted as an entry."""
        if name in self._keys and redirected.is_attribute(self, name):
            object.__delattr__(self, name)
            return
        if name in self._values:
            if _tracing() or are_functions_own(self, own_functions.DELATTR) or redirected.is_attribute(self, name):
                del self._values[name]
                return
            # Where torch's method looks for it.
            self.__dict__.setdefault(name, self._values.pop(name))
        # As in torch, `_parameters` comes first: FSDP puts a tensor both there and into `__dict__`.
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Register a Parameter as torch does. The key of an entry may have dots."""
        # `distribute_module` registers anew what is there.
        is_entry = type(name) is str and name in self.__dict__.get("_parameters", ()) and name in self._keys
        super().register_parameter(redirected.without_dots(name) if is_entry else name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParameterDict:
        """Move or convert everything: at once where ``fn`` is one of torch's own, which ``to`` and the like pass."""
        if not (is_own(self, own_functions.APPLY) and run.apply(self, fn, recurse)):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def pin_memory(self) -> ParameterDict:
        """Put all entries on the CPU into page-locked memory of exactly their size. **O(n)**.

        Copies from there to a CUDA device need no staging. The Parameters stay the same objects.

        Raises
        ------
        RuntimeError
            If there is no CUDA device, or too little memory can be locked. Then nothing has changed.
        """
        run.pin_memory(self)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not is_own(self, own_functions.SAVE):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        own_state = type(self).get_extra_state is not Module.get_extra_state
        if not own_state and takes_down(self, prefix):
            for name, buffer in self._buffers.items():
                if buffer is not None and name not in self._non_persistent_buffers_set:
                    destination[prefix + name] = buffer.detach()
            return
        if keep_vars or own_state or self._buffers:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        with collector_paused():
            save_parameters(self._parameters, destination, prefix, Parameter)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does. It is several times faster if all names fit and there are no hooks."""
        if (
            not (assign or _tracing() or torch.__future__.get_swap_module_params_on_conversion())
            and is_own(self, own_functions.LOAD)
            and load_whole(self, state_dict)
        ):
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
        given = given_to(prefix)
        if given is not None:
            with collector_paused():
                given.load_into(self, prefix, strict, missing_keys, unexpected_keys, error_msgs)
                load_rest(
                    self, [], 0, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                )
            return
        if _tracing() or not is_own(self, own_functions.LOAD_FROM):
            unexpected: list[str] = []
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
            )
            # torch takes what stands before a dot for the name of a child module.
            known = {prefix + name for place in (self._parameters, self._buffers) for name in place if "." in name}
            unexpected_keys.extend(key for key in unexpected if key not in known)
            return
        with collector_paused():
            load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __copy__(self) -> Any:
        """Return another module that shares everything with this one, the dict of Parameters included."""
        return copies.shallow_copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with collector_paused():
            return copies.deep_copy(self, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return copies.reduce(super().__reduce_ex__(protocol), self._parameters)

    # -- where an entry lies -------------------------------------------------------------------------------------------

    def _key_to_attr(self, key: str) -> str:
        key = super()._key_to_attr(key)
        # torch.compile cannot tell the type of a key that it takes for a constant.
        if not _tracing() and type(key) is not str:
            # A string enumeration, say: the name is its characters.
            key = str.__str__(key)
        if not key:
            raise KeyError('parameter name can\'t be empty string ""')
        return key

    def _value_of(self, key: str) -> Any:
        """Find the value of a key of which ``get_entry`` has found none."""
        if not is_own(self, own_functions.GETITEM):
            try:
                if follows_torch(self, "__getitem__") or (
                    redirected.is_attribute(self, key) and key not in redirected.parametrized(self)
                ):
                    return redirected.read(self, key)
                return super().__getitem__(key)
            except AttributeError as error:
                raise MissingEntryError(key) from error
        if type(key) is str:
            hidden_by = self.__dict__.get(key)
            if isinstance(hidden_by, Tensor):
                return hidden_by
            if key in self._parameters:
                return self._parameters[key]
        return self._value_elsewhere(key)

    def _traced_value(self, key: str) -> Any:
        """Find a value for torch.compile, which sees overrides of subclasses, but no patches."""
        if not self._is_read_directly:
            return super().__getitem__(key)
        try:
            return self._parameters[key]
        except (KeyError, TypeError):
            return self._value_elsewhere(key)

    def _value_elsewhere(self, key: str) -> Any:
        """Find the value of what is not in ``_parameters`` under exactly this key."""
        for place in (self._values, self._modules, self._buffers):
            if key in place:
                return place[key]
        keys: Container[str] = self._keys
        if _tracing():
            keys = self._traced_keys()
        elif type(key) is not str:
            return self[self._key_to_attr(key)]
        # What took the place of a registered Parameter: a parametrization, the tensor of a replica or of a pruned one.
        if key in keys:
            try:
                return getattr(self, key)
            except AttributeError:
                pass
        raise MissingEntryError(key)

    def _delete_elsewhere(self, key: str) -> None:
        key = self._key_to_attr(key)
        for place in (self._parameters, self._values, self._modules, self._buffers):
            if key in place:
                self._non_persistent_buffers_set.discard(key)
                del place[key]
                return
        if key not in redirected.STATE:
            self.__dict__.pop(key, None)

    def _kind_of(self, key: str) -> _Kind | None:
        """Give the kind of what is registered under ``key``, which torch lets be replaced by some kinds only."""
        if key in self._parameters:
            return _PARAMETER
        if key in self._modules:
            return _MODULE
        return _BUFFER if key in self._buffers else None

    def _accepted(self, key: str, value: Any, held: _Kind | None) -> Any:
        """Give what is to be placed, or refuse it where something of the kind ``held`` is; nothing has changed yet."""
        hooks: Iterable[Callable[..., Any]] = ()
        if isinstance(value, Parameter):
            if held is not _PARAMETER:
                redirected.refuse_parametrized(self, key)
            hooks = _torch_module._global_parameter_registration_hooks.values()
        else:
            if isinstance(value, Module):
                hooks = _torch_module._global_module_registration_hooks.values()
            elif key in redirected.parametrized(self):
                raise _refusal(key, value, _PARAMETRIZED)
            if held and value is not None and not (held is not _PARAMETER and isinstance(value, Module)):
                raise _refusal(key, value, held)
        for hook in hooks:
            output = hook(self, key, value)
            if output is not None:
                value = output
        return value

    def _place(self, key: str, value: Any) -> None:
        """Set what has been accepted; this cannot fail half-way."""
        # What is replaced goes at the end: its finalizers may change the dictionary.
        before: list[Any] = []
        place: dict[str, Any]
        if isinstance(value, Parameter):
            before = self._forget_elsewhere(key)
            place = self._parameters
        elif isinstance(value, Module):
            before = self._forget_elsewhere(key, self._modules)
            place = self._modules
        else:
            registered: tuple[dict[str, Any], ...] = (self._parameters, self._modules, self._buffers)
            place = next((place for place in registered if key in place), self._values)
            if place is self._values and self._is_stood_for(key):
                before.append(self.__dict__.pop(key))
        self._keys[key] = None
        before.append(place.get(key))
        place[key] = value

    def _forget_elsewhere(self, key: str, but: Mapping[str, Any] | None = None) -> list[Any]:
        """Take what stands for ``key`` out of everything but the Parameters and one place, and give it."""
        places = [place for place in (self._values, self._modules, self._buffers) if place is not but]
        # As torch does; but attributes of the module stay.
        if self._is_stood_for(key):
            places.append(self.__dict__)
        forgotten = [place.pop(key, None) for place in places]
        self._non_persistent_buffers_set.discard(key)
        return forgotten

    def _is_stood_for(self, key: str) -> bool:
        """Whether an attribute stands for an entry: a tensor does, and what is all that the entry could be."""
        attributes = self.__dict__
        return isinstance(attributes.get(key), Tensor) or (
            key in attributes
            and key not in redirected.STATE
            and key in self._keys
            and not any(key in place for place in (self._parameters, self._values, self._modules, self._buffers))
        )

    def _is_usual_for(self, names: Iterable[str]) -> bool:
        """Whether Parameters of these names may go into ``_parameters`` with no regard to what is elsewhere."""
        if _torch_module._global_parameter_registration_hooks or redirected.parametrized(self):
            return False
        hiding = self.__dict__.keys() - redirected.STATE
        elsewhere = (self._values, self._modules, self._buffers)
        return (not hiding or hiding.isdisjoint(names)) and all(
            not place or place.keys().isdisjoint(names) for place in elsewhere
        )

    def _insert(self, names: list[str], values: list[Any]) -> None:
        """Insert all, or, if one cannot be taken, none."""
        if not (_tracing() or is_own(self, own_functions.UPDATE)):
            for name, value in zip(names, values, strict=True):
                self[name] = value
            return
        only_parameters = True
        for at in prepare(names, values, Parameter, Tensor):
            names[at] = self._key_to_attr(names[at])
            if isinstance(values[at], Tensor):
                values[at] = _to_leaf_parameter(names[at], values[at])
            else:
                only_parameters = False
        if only_parameters and self._is_usual_for(names):
            insert_all(self._keys, self._parameters, names, values)
        else:
            self._insert_one_by_one(names, values)

    def _insert_one_by_one(self, names: list[str], values: list[Any]) -> None:
        kinds: dict[str, _Kind | None] = {}  # of what earlier pairs will have put there
        for at, name in enumerate(names):
            held = kinds[name] if name in kinds else self._kind_of(name)
            values[at] = self._accepted(name, values[at], held)
            made = (
                _PARAMETER if isinstance(values[at], Parameter) else _MODULE if isinstance(values[at], Module) else held
            )
            kinds[name] = made
        for name, value in zip(names, values, strict=True):
            self._place(name, value)

    # -- tracing ------------------------------------------------------------------------------------------------------

    def _traced_keys(self) -> tuple[str, ...]:
        """Give the keys to torch.compile: constants, guarded by the fingerprint of the index."""
        # Before 2.14, torch checks no guard below a module while no dict that it guards has changed. An entry that
        # comes, goes or moves changes one of these, or `__dict__`.
        len(self._parameters), len(self._buffers), len(self._modules)
        return self._constant_keys(self._keys._fingerprint)

    def _constant_keys(self, fingerprint: str) -> tuple[str, ...]:
        # torch.compile guards what a call that it takes for constant is given.
        return tuple(self._keys)

    # What `torch.compiler.assume_constant_result` does; to call that imports all of `torch._dynamo`.
    _constant_keys._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Shown:
    """Stands in for a ParameterDict when torch writes the lines of some entries."""

    def __init__(self, entries: list[tuple[str, Any]]) -> None:
        self._entries = entries

    def items(self) -> list[tuple[str, Any]]:
        return self._entries


def _refusal(key: str, value: Any, held: _Kind) -> TypeError:
    return TypeError(f"cannot assign '{torch.typename(value)}' as {held.name} '{key}' ({held.expected} expected)")


def _to_leaf_parameter(key: str, value: Tensor) -> Parameter:
    parameter = value if isinstance(value, Parameter) else Parameter(value)
    if parameter.grad_fn:
        raise ValueError(
            f"Cannot assign non-leaf Tensor to parameter '{key}'. Model parameters must be created explicitly. "
            f"To express '{key}' as a function of another Tensor, compute the value in the forward() method."
        )
    return parameter


# What `use_native_slots` makes native. A class that has inherited a patch of one has Python functions only.
_NATIVE = {
    name: vars(ParameterDict)[name] for name in ("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__")
}
use_native_slots(ParameterDict, Parameter)
own_functions.watch(ParameterDict)
usual_applies.append(ParameterDict._apply)
