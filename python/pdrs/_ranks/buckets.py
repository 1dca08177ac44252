"""State dicts by bucket, for ``torch.distributed.checkpoint``: its own resharding moves whole keys.

A key is the same whichever rank has it, and a bucket belongs to one rank. So no two ranks save different tensors under
one key, and any other number of ranks asks for the keys of its buckets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from pdrs._files.checkpoint_file import CheckpointError
from pdrs._files.partial_read import Names
from pdrs._ranks.agreement import CommonCall
from pdrs._ranks.checkpoint_load import (
    check_dictionary,
    check_optimizers,
    fill_table,
    index_of,
    numbers_of,
    put_dense,
)
from pdrs._ranks.checkpoint_save import HASH, HASH_SEED, TIMEOUT, merged_tables, refuse_differences
from pdrs._ranks.model_parts import Parts
from pdrs._ranks.owners import BUCKETS
from pdrs._ranks.row_order import RowOrder, buckets_of_rank
from pdrs._ranks.taken_over import Loaded, TakeOver
from pdrs._rows.write import by_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.optim import Optimizer

    Optimizers = Optimizer | Sequence[Optimizer] | None

__all__ = ["bucket_state_dict", "bucket_template", "load_bucket_state_dict"]

# A key of what belongs to a bucket: the dictionary, the bucket, the table, and what of it.
_KEY = re.compile(r"buckets/(.*)/(\d{4})/([^/]+)/(names|ends|rows|seen|frozen|optimizer\..+)", re.DOTALL)
_ABOUT = "about"
_LOADED = "bucket_state_dict"


def bucket_state_dict(model: Module, optimizer: Optimizers = None) -> dict[str, Any]:
    """Return the part of this rank as a state dict for ``torch.distributed.checkpoint``. **O(n)**.

    All ranks must call it. Save it with ``dcp.save`` or ``dcp.async_save``. All tensors are copies, so tables may
    change while they are written. Any number of ranks loads it, see :func:`bucket_template`.

    Parameters
    ----------
    model
        A module with any number of :class:`ShardedParameterDict`. Everything else in it may be sharded by FSDP2.
    optimizer
        As for :func:`save`.

    Returns
    -------
    dict
        Tensors by key. ``buckets/words./0007/float32_16/`` and ``names``, ``ends``, ``rows``, ``seen`` or
        ``optimizer.0.exp_avg`` is the key of what the table ``float32_16`` of the dictionary ``words`` has in bucket
        7. ``names`` is the UTF-8 of the names, and ``ends`` says where each ends. ``model/`` and ``optimizer/`` are
        followed by names in the model. ``about`` is JSON.

    Raises
    ------
    RuntimeError, TypeError, ValueError, OutOfStepError
        As for :func:`save`. Values outside of sharded dictionaries are not compared between ranks.

    Examples
    --------
    >>> import torch, pdrs.distributed
    >>> words = pdrs.distributed.ShardedParameterDict((2,))
    >>> _ = words.gather(["a"], missing="insert")
    >>> sorted(pdrs.distributed.bucket_state_dict(words))[1:]
    ['buckets//3615/float32_2/ends', 'buckets//3615/float32_2/names', 'buckets//3615/float32_2/rows', \
'buckets//3615/float32_2/seen']

    """
    parts = Parts(model, optimizer)
    ranks = CommonCall(_LOADED, parts.group, TIMEOUT)
    with parts.unchanged():
        about = ranks.run(lambda: _about(parts))
        refuse_differences(ranks, about, 0, parts)
        tables = merged_tables(
            ranks, ranks.objects({prefix: one["tables"] for prefix, one in about["dictionaries"].items()})
        )
        for prefix, one in about["dictionaries"].items():
            one["tables"] = tables[prefix]
        return ranks.run(lambda: _copied(parts, about))


def _about(parts: Parts) -> dict[str, Any]:
    return {
        "hash": HASH,
        "hash_seed": HASH_SEED,
        "buckets": BUCKETS,
        "dictionaries": {prefix: parts.about(prefix) for prefix in parts.sharded},
        "optimizers": parts.about_optimizers(),
    }


@torch.no_grad()
def _copied(parts: Parts, about: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {_ABOUT: torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}
    for prefix, words in parts.sharded.items():
        order = RowOrder(words.local)
        tables = {one.number: one for one in parts.tables(prefix)}
        for bucket, number, names, rows in order.by_bucket():
            one = tables[number]
            key = f"buckets/{prefix}/{bucket:04}/{one.attribute}/"
            found[key + "names"] = torch.from_numpy(names.text.copy())
            found[key + "ends"] = torch.from_numpy(np.cumsum(names.lengths))
            for what, tensor in (("rows", one.parameter.detach()), *one.others.items()):
                index = torch.from_numpy(rows).to(tensor.device)
                found[key + what] = by_bits(tensor).index_select(0, index).view(tensor.dtype)
    for name, value in _dense(parts):
        found[name] = value.detach().clone()
    return found


def _dense(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Yield what is not in sharded dictionaries: parameters, buffers, and states of them that are no numbers."""
    with parts.without_sharded() as rest:
        state = rest.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' of the state dict is of type {type(value).__name__}, expected tensors")
        yield f"model/{name}", value
    for number, optimizer in enumerate(parts.optimizers):
        for name, key, value in parts.dense_states(optimizer):
            if isinstance(value, Tensor) and value.dim():
                yield f"optimizer/{number}/{name}/{key}", value


def bucket_template(metadata: Metadata, model: Module, optimizer: Optimizers = None) -> dict[str, Any]:
    """Return a state dict of empty tensors, for what this rank loads of a checkpoint of :func:`bucket_state_dict`.

    Give it to ``dcp.load``, and then to :func:`load_bucket_state_dict`. Each rank asks for its own buckets alone.

    Parameters
    ----------
    metadata
        ``torch.distributed.checkpoint.FileSystemReader(path).read_metadata()``.
    model, optimizer
        As for :func:`load`.

    Raises
    ------
    ValueError
        If the checkpoint is none of :func:`bucket_state_dict`, or lacks something that the model has.
    """
    parts = Parts(model, optimizer)
    wanted = buckets_of_rank(parts.shard, parts.shards) if parts.sharded else range(0)
    listed: Mapping[str, Any] = metadata.state_dict_metadata
    if _ABOUT not in listed:
        raise ValueError("the checkpoint has no key 'about', so it is none of bucket_state_dict")
    found = {_ABOUT: _empty(listed[_ABOUT])}
    for key, one in listed.items():
        match = _KEY.fullmatch(key)
        if match is None or match[1] not in parts.sharded or int(match[2]) not in wanted:
            continue
        if match[4].startswith("optimizer.") and int(match[4].split(".")[1]) >= len(parts.optimizers):
            continue
        found[key] = _empty(one)
    for name, value in _dense(parts):
        if name.startswith("model/"):
            if name not in listed:
                raise ValueError(f"the checkpoint has no key {name!r}, which the model has")
            found[name] = torch.empty_like(value.detach())
    for number, one in enumerate(parts.optimizers):
        for group in one.param_groups:
            for parameter in group["params"]:
                begin = f"optimizer/{number}/{parts.name_of(parameter)}/"
                for key in listed if parts.owner_of(parameter) is None else ():
                    if key.startswith(begin):
                        found[key] = _like(parameter, listed[key])
    return found


def _empty(one: Any) -> Tensor:
    return torch.empty(one.size, dtype=one.properties.dtype, device="cpu")


def _like(parameter: Tensor, one: Any) -> Tensor:
    """Return an empty tensor for a state: as the parameter is sharded, if it has its shape."""
    if tuple(one.size) == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=one.properties.dtype)
    return _empty(one)


def load_bucket_state_dict(state: Mapping[str, Any], model: Module, optimizer: Optimizers = None) -> None:
    """Put what ``dcp.load`` has read into a template in place of what a model and its optimizers have. **O(n)**.

    All ranks must call it. If a rank fails before anything is changed, all raise.

    Parameters
    ----------
    state
        The result of :func:`bucket_template`, filled.
    model, optimizer
        As for :func:`load`, the same as for :func:`bucket_template`.

    Raises
    ------
    CheckpointError
        If the state is damaged.
    ValueError, RuntimeError, OutOfStepError
        As for :func:`load`.
    """
    parts = Parts(model, optimizer)
    ranks = CommonCall("load_bucket_state_dict", parts.group, TIMEOUT)

    def prepare() -> TakeOver:
        about = json.loads(state[_ABOUT].numpy().tobytes())
        if [about[key] for key in ("hash", "hash_seed", "buckets")] != [HASH, HASH_SEED, BUCKETS]:
            raise CheckpointError(_LOADED, f"it has other buckets: {about['buckets']} by {about['hash']}")
        takes = TakeOver(parts)
        if parts.optimizers:
            check_optimizers(parts, about["optimizers"], _LOADED)
        for prefix, words in parts.sharded.items():
            if prefix not in about["dictionaries"]:
                raise ValueError(f"expected a dictionary at {prefix!r}, got {sorted(about['dictionaries'])}")
            check_dictionary(words, about["dictionaries"][prefix], f"the dictionary at {prefix!r}")
            takes.dictionary(words, _dictionary(parts, prefix, about["dictionaries"][prefix], state))
        for number, one in enumerate(parts.optimizers):

            def tensor(name: str, key: str, number: int = number) -> Tensor:
                found: Tensor = state[f"optimizer/{number}/{name}/{key}"]
                return found

            put_dense(parts, takes, one, about["optimizers"][number], tensor)
        return takes

    takes = ranks.run(prepare)

    def finish() -> None:
        dense = {key.removeprefix("model/"): value for key, value in state.items() if key.startswith("model/")}
        with parts.without_sharded() as rest:
            rest.load_state_dict(dense)
        with parts.changing():
            takes.make()

    ranks.run(finish)


def _dictionary(parts: Parts, prefix: str, about: dict[str, Any], state: Mapping[str, Any]) -> Loaded:
    words = parts.sharded[prefix]
    numbers = numbers_of(words, about)
    wanted = buckets_of_rank(parts.shard, parts.shards)
    found: list[Names] = []
    keys: dict[str, list[tuple[str, int]]] = {attribute: [] for attribute in about["tables"]}
    for bucket in wanted:
        for attribute in about["tables"]:
            key = f"buckets/{prefix}/{bucket:04}/{attribute}/"
            if key + "names" not in state:
                continue
            ends = state[key + "ends"].numpy()
            places = np.arange(len(ends))
            found.append(
                Names(
                    np.diff(ends, prepend=0),
                    state[key + "names"].numpy(),
                    np.full(len(ends), numbers[attribute]),
                    places,
                )
            )
            keys[attribute].append((key, len(ends)))
    index, rows = index_of(words, found, _LOADED)
    tables = []
    for attribute, facts in about["tables"].items():
        number = numbers[attribute]

        def fill(what: str, out: Tensor, attribute: str = attribute) -> None:
            at = 0
            for key, count in keys[attribute]:
                value = state.get(key + (what or "rows"))
                if value is not None:
                    out[at : at + count] = value
                elif what != "frozen":
                    raise CheckpointError(_LOADED, f"the key {key + (what or 'rows')!r} is missing")
                at += count

        def shape_of(what: str, attribute: str = attribute) -> tuple[tuple[int, ...], torch.dtype] | None:
            values = (state.get(key + what) for key, _ in keys[attribute])
            one = next((each for each in values if each is not None), None)
            return None if one is None else (tuple(one.shape[1:]), one.dtype)

        count = len(rows[number])
        tables.append(fill_table(parts, prefix, number, facts, count, int(about["gathers"]), fill, shape_of))
    return Loaded(index, tables, int(about["gathers"]))
