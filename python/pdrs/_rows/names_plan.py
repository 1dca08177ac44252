"""Names in a distributed checkpoint: replicas that differ are refused when they are saved.

``torch.distributed.checkpoint`` takes plain tensors of one key for replicas, and stores each from any rank. So names of
one rank would be stored with rows of another. It asks each rank which items it would write, and brings these lists
together. The items of packed names carry a digest there, and items of one key with two digests raise.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pdrs._rows.names_codec import bytes_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["mark"]


def mark(packed: Tensor) -> None:
    """Let a distributed checkpoint ask packed names what to write. All else takes them for a plain tensor."""
    tensor: Any = packed
    tensor.__create_write_items__ = _items
    tensor.__getstate__ = _no_state  # what pickles of the tensor ask for


def _no_state() -> None:
    """Return what a pickle writes beside the tensor: nothing."""


def _items(key: str, packed: Tensor) -> list[WriteItem]:
    """Return what torch would write of a plain tensor, with a digest of the names."""
    from torch.distributed.checkpoint.planner_helpers import _create_write_items

    digest = hashlib.blake2b(bytes_of(packed).data, digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    items = _create_write_items(key, packed.detach())
    return [dataclasses.replace(item, index=_with_digest(key, item.index.offset, number)) for item in items]


def _with_digest(key: str, offset: Any, digest: int) -> Any:
    """Return what an item is known by. The digest stands where torch has a hint, which it does not compare."""
    made: Any = object.__new__(_class_with_digest())
    made.__dict__.update(fqn=key, offset=offset, index=digest)
    return made


_classes: list[type] = []


def _class_with_digest() -> type:
    # Not defined at once: to import torch's class takes as long as to import pdrs.
    if not _classes:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        def equal(self: Any, other: Any) -> bool:
            same: bool = (self.fqn, self.offset) == (other.fqn, other.offset)
            if same and type(self) is type(other) and self.index != other.index:
                raise RuntimeError(
                    f"the ranks have different names, or the same names in different rows, under '{self.fqn}', and a "
                    "distributed checkpoint stores those of one rank with the rows of any: call "
                    "pdrs.distributed.broadcast(module) to give all ranks the same, or save under a key for each rank"
                )
            return same

        # `dataclasses.replace` makes a plain one of it. It does so before anything is written.
        body = {
            "__class__": MetadataIndex,
            "__eq__": equal,
            "__hash__": MetadataIndex.__hash__,
            "__reduce__": lambda self: (_with_digest, (self.fqn, self.offset, self.index)),
        }
        _classes.append(type("NamesIndex", (MetadataIndex,), body))
    return _classes[0]
