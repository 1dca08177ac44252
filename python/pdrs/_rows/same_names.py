"""Under DDP, all ranks must have the same names in the same rows: compared in the first forward pass.

DDP sees tables and not names. When it wraps a model, it gives all ranks the rows of the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from pdrs._rows.in_ddp import active_ddp
from pdrs._rows.names_codec import names_in, pack
from pdrs._rows.state_dict import header_of

if TYPE_CHECKING:
    from pdrs.stacked import StackedParameterDict

__all__ = ["CURE", "are_same", "digest", "digests_of_names", "refuse_other_names"]

CURE = (
    "Give all ranks those of one with pdrs.distributed.broadcast(module) before it is wrapped, or load the same "
    "checkpoint on all ranks. Insert new names with pdrs.distributed.insert"
)
# What a rank tells begins with it.
_BEGIN = b"names and rows: "
# How many dictionaries have been compared, by what all ranks call them.
_counts: dict[str, int] = {}


def refuse_other_names(sd: StackedParameterDict) -> None:
    """Raise in the first forward pass of a DDP module if this rank has other names or rows than the first one.

    **O(n)** then, and **O(1)** later.

    The first rank tells the others in the store of the job, and nobody waits: a rank that comes before it looks again
    in its next forward pass. So ranks that do not all come here do not hang.

    Raises
    ------
    RuntimeError
        If they differ. DDP has already given this rank the rows of the first one.
    """
    active = active_ddp()
    if active is None:
        return
    # The module that was compared for, or what is yet to be compared for it; True if names are known to be the same.
    known: Any = sd.__dict__.get("_in_ddp")
    if isinstance(known, ref) and known() is active:
        return
    about = known if isinstance(known, tuple) and known[0]() is active else None
    if about is None:
        about = None if known is True else _about(sd, active)
        sd.__dict__["_in_ddp"] = about or ref(active)
        if about is None:
            return
    _, store, key, told, rank = about
    try:
        if rank == 0:
            store.set(key, told)
        elif not store.check([key]):
            return
        of_first = told if rank == 0 else store.get(key)
    except Exception:  # of a store that cannot do this; the one of the first rank ends with it
        of_first = told
    if of_first != told and of_first.startswith(_BEGIN):  # A store of tests returns anything.
        raise RuntimeError(
            "DDP has given this rank the rows of the first rank, whose dictionary has other names, or the same names "
            f"in other rows. Each row would belong to different names. {CURE}"
        )
    sd.__dict__["_in_ddp"] = ref(active)


def are_same(dictionaries: Iterable[StackedParameterDict]) -> None:
    """Note that dictionaries have been compared. The next module in DDP that has them need not do it again."""
    for one in dictionaries:
        one.__dict__["_in_ddp"] = True


def _about(sd: StackedParameterDict, active: Any) -> tuple[Any, ...] | None:
    """Return the module, the store of the job, a key that all ranks have, what to compare, and the rank.

    None if nothing is to be compared.
    """
    group = active.process_group
    path = next((name for name, one in active.module.named_modules() if one is sd), None)
    tables = {id(one) for one in sd.tables().values()}
    if path is None or group.size() == 1 or not any(id(one) in tables for one in active._module_parameters):
        return None
    from torch.distributed import distributed_c10d

    shapes = [(name, tuple(one.shape)) for name, one in active.module.named_parameters()]
    name = f"pdrs/ddp/{group.group_name}/{digest(repr((path, shapes)).encode('utf-8', 'surrogatepass')):x}"
    _counts[name] = count = _counts.get(name, 0) + 1
    told = _BEGIN + ",".join(map(str, digests_of_names(sd))).encode()
    store = distributed_c10d._get_default_store()
    return None if store is None else (ref(active), store, f"{name}/{count}", told, group.rank())


def digests_of_names(sd: StackedParameterDict) -> tuple[int, int]:
    """Return a number for the names of a dictionary in order, and one for their rows. **O(n)**."""
    places = sd._index.places()
    return digest(names_in(pack(sd._index, header_of(sd)))), digest(places.tables, places.rows)


def digest(*parts: bytes | NDArray[Any]) -> int:
    """Return a number of 63 bits that is the same in each process."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).view(np.uint8).data
        made.update(len(data).to_bytes(8, "little"))
        made.update(data)
    return int.from_bytes(made.digest(), "little") >> 1
