"""``pdrs.distributed.save``: a folder with an archive of each rank, which one rename makes valid."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from pdrs._core import crc32
from pdrs._files.archive_read import CHECK, Archive, refuse_long_chain
from pdrs._files.archive_write import packed_before, write_archive
from pdrs._files.atomic import sync_folder
from pdrs._files.checkpoint_file import EXTRA_STATE, CheckpointError
from pdrs._files.collect import Collected, collect
from pdrs._files.safetensors_file import SafetensorsFile
from pdrs._files.safetensors_write import NewTensor, as_texts
from pdrs._files.set_file import open_archive
from pdrs._files.set_manifest import HIDDEN, FileOfSet, Manifest, file_name, remove_others
from pdrs._ranks.agreement import CommonCall
from pdrs._ranks.model_parts import Parts, differences
from pdrs._ranks.owners import BUCKETS
from pdrs._ranks.row_order import RowOrder, buckets_of_rank
from pdrs._rows.names_codec import refuse_claim
from pdrs.stacked import StackedParameterDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = ["HASH", "HASH_SEED", "TIMEOUT", "dense_tensors", "merged_tables", "refuse_differences", "save"]

HASH, HASH_SEED = "xxh3_64", 0
# How many seconds to wait for a rank that writes or reads.
TIMEOUT = 3600.0


class _Before(NamedTuple):
    """The set that is continued: its folder and manifest, and which other folder it must be linked into."""

    folder: str
    manifest: Manifest


def save(
    model: Module,
    folder: str | os.PathLike[str],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    since: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    sync: bool = True,
) -> int:
    """Save a model with sharded dictionaries, and its optimizers, as one checkpoint of all ranks. **O(n)**.

    All ranks must call it, between two steps. Each writes an archive with the names that it owns, their rows and all
    states of these rows. Of replicas, the first one writes. Rank 0 also writes everything else in the model, and the
    states of it. At last, rank 0 renames ``manifest.json`` into place. The folder has the old set until then, and the
    new one afterwards, whatever happens.

    Parameters
    ----------
    model
        A module with any number of :class:`ShardedParameterDict`, also one in DDP.
    folder
        Where the files will be, the same for all ranks. It is made if it is missing. A set that is in it is replaced.
        One job at a time may save to a folder.
    optimizer
        The optimizer, or several: of torch, of ``pdrs.optim``, or one that ``attach_optimizer`` takes.
    since
        The folder of an earlier set of as many ranks. Only changes are written. Names that it has keep their rows in
        the files. It may be the same folder. If it is another one, its files are linked into the new folder.
    metadata
        Texts by name, as for :func:`pdrs.save`. The default is those of ``since``.
    sync
        Whether to wait until all is on the disk.

    Returns
    -------
    int
        The bytes that all ranks have written.

    Raises
    ------
    RuntimeError
        If parameters outside of sharded dictionaries, their states, or options differ between ranks. Also if another
        rank has failed.
    TypeError
        If a state is neither a number nor a tensor with a row for each row of the table, or if something else in the
        model is no dense tensor. A model in FSDP2 is saved with :func:`bucket_state_dict`.
    ValueError
        If ``since`` was saved by another number of ranks, or cannot be continued. Also if an optimizer has parameters
        that the model has not.
    CheckpointError
        If ``since`` is damaged.
    OSError
        If a file cannot be written, or linked.
    OutOfStepError
        If the ranks call different functions, or a rank does not come within an hour.

    Notes
    -----
    Parameters that all ranks have are compared by checksums, which reads them once. Buffers are those of rank 0.
    Saving needs memory for the names of a rank, and for blocks of rows. Other threads wait if they change names.

    Examples
    --------
    >>> import os, tempfile, torch, pdrs.distributed
    >>> words = pdrs.distributed.ShardedParameterDict((2,))
    >>> optimizer = torch.optim.Adam(words.parameters())
    >>> words.attach_optimizer(optimizer)
    >>> words.gather(["a", "b"], missing="insert").sum().backward()
    >>> optimizer.step()
    >>> folder = os.path.join(tempfile.mkdtemp(), "step-1")
    >>> _ = pdrs.distributed.save(words, folder, optimizer)
    >>> sorted(pdrs.open(folder))
    ['a', 'b']

    """
    parts = Parts(model, optimizer)
    options = f"since {'is' if since is None else 'is not'} None, {metadata=!r}"
    ranks = CommonCall("save", parts.group, TIMEOUT, options)
    folder = os.fsdecode(folder)
    with parts.unchanged(), ExitStack() as opened:
        texts = ranks.run(lambda: None if metadata is None else as_texts(metadata))
        about, dense = ranks.run(lambda: _described(parts, compared=ranks.size > 1))
        refuse_differences(ranks, about, dense, parts)
        before = _before(ranks, parts.shards, folder, since)
        of_tables = merged_tables(
            ranks, ranks.objects({prefix: one["tables"] for prefix, one in about["dictionaries"].items()})
        )
        set_id = ranks.object_of(0, secrets.token_hex(16))
        name = file_name(set_id, parts.shard, parts.shards)

        # One replica writes for all.
        writes = ranks.rank < max(parts.shards, 1)

        def write() -> tuple[FileOfSet, int] | None:
            archive = None
            if not writes:
                return None
            if before is not None:
                archive = opened.enter_context(open_archive(before.folder, before.manifest.files[parts.shard]))
            return _write(parts, folder, name, archive, before, texts, ranks, sync)

        try:
            written = ranks.run(write)
        except BaseException:
            # No manifest knows of it yet.
            if writes:
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))
            raise
    all_written: list[tuple[FileOfSet, int]] = ranks.objects(written)[: parts.shards]

    dictionaries = {prefix: {**one, "tables": of_tables[prefix]} for prefix, one in about["dictionaries"].items()}
    kept = before.manifest.texts if before is not None and texts is None else texts or {}
    files = tuple(one for one, _ in all_written)
    made = Manifest(set_id, HASH, HASH_SEED, BUCKETS, files, dictionaries, about["optimizers"], kept)

    def finish() -> None:
        if ranks.rank == 0:
            if sync:
                sync_folder(Path(folder))
            made.write(folder, sync=sync)

    ranks.run(finish)

    def clear_up() -> None:
        # Another job may have saved to the folder since.
        with suppress(CheckpointError, OSError):
            if Manifest.read(folder).id == set_id:
                remove_others(folder, made.needed(), ranks.rank, ranks.size)

    ranks.run(clear_up)
    return sum(count for _, count in all_written)


def _described(parts: Parts, *, compared: bool) -> tuple[dict[str, Any], int]:
    """Return what all ranks must have in common, and a number for the bytes of what they have copies of."""
    about = {
        "dictionaries": {prefix: parts.about(prefix) for prefix in parts.sharded},
        "optimizers": parts.about_optimizers(),
    }
    total = hashlib.blake2b(digest_size=8)
    if compared:
        for tensor in dense_tensors(parts).tensors:
            if tensor.name in parts.buffers:
                continue
            found = 0
            for block in tensor.blocks():
                found = crc32(block, found)
            total.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0{found}\0".encode("utf-8", "surrogatepass"))
    return about, int.from_bytes(total.digest(), "little") >> 1


def dense_tensors(parts: Parts, before: Archive | None = None) -> Collected:
    """Return the tensors that all ranks have copies of, and their states."""
    for name, parameter in parts.dense.items():
        if hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"'{name}' is a {type(parameter).__name__}, as FSDP2 makes them: save with "
                "torch.distributed.checkpoint and pdrs.distributed.bucket_state_dict"
            )
    with parts.without_sharded() as rest:
        for module in rest.modules():
            if isinstance(module, StackedParameterDict):
                for attribute, table in module.tables().items():
                    refuse_claim(attribute, table.detach(), len(module))
        found = collect(rest) if before is None else collect(rest, packed_before(before))
    for number, optimizer in enumerate(parts.optimizers):
        for name, key, value in parts.dense_states(optimizer):
            if isinstance(value, Tensor) and value.dim():
                found.tensors.append(NewTensor.of(f"{HIDDEN}optimizer.{number}.{name}.{key}", value))
    return found


def refuse_differences(ranks: CommonCall, about: dict[str, Any], dense: int, parts: Parts) -> None:
    """Raise on all ranks if what they must have in common differs."""
    shared = {
        "dictionaries": {
            prefix: {key: value for key, value in one.items() if key != "tables"}
            for prefix, one in about["dictionaries"].items()
        },
        "optimizers": about["optimizers"],
    }
    digest = hashlib.blake2b(repr(shared).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    told = ranks.agree([int.from_bytes(digest, "little") >> 1, dense])
    for rank, one in enumerate(told):
        if one[0] != told[0][0]:
            others = ranks.objects(shared)
            what = differences(others[0], others[rank]) or "their order"
            raise RuntimeError(
                f"ranks {ranks.global_rank(0)} and {ranks.global_rank(rank)} have different options or states, which "
                f"would not be one checkpoint: {what}"
            )
        if one[1] != told[0][1]:
            sums = ranks.objects({name: _sum_of(tensor) for name, tensor in parts.dense.items()})
            what = differences(sums[0], sums[rank]) or "a state of an optimizer"
            raise RuntimeError(
                f"ranks {ranks.global_rank(0)} and {ranks.global_rank(rank)} have different values of parameters that "
                f"are not sharded, first in {what.partition(' ')[0]}: wrap the model in DDP, or broadcast them"
            )


@torch.no_grad()
def _sum_of(tensor: Tensor) -> int:
    total = 0
    for block in NewTensor.of("", tensor).blocks():
        total = crc32(block, total)
    return total


def merged_tables(ranks: CommonCall, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the tables of all ranks; RuntimeError on all if two have different ones of a name."""
    found: dict[str, Any] = {}
    for rank, of_rank in enumerate(of_ranks):
        for prefix, tables in of_rank.items():
            known = found.setdefault(prefix, {})
            for attribute, table in tables.items():
                what = differences(known.setdefault(attribute, table), table)
                if what:
                    raise RuntimeError(
                        f"the table '{prefix}{attribute}' of rank {ranks.global_rank(rank)} differs from that of "
                        f"another rank in {what}: all ranks must make the same steps"
                    )
    return found


def _before(ranks: CommonCall, shards: int, folder: str, since: str | os.PathLike[str] | None) -> _Before | None:
    """Read the manifest that is continued, and make the folder ready, on rank 0."""

    def read() -> str | None:
        if ranks.rank != 0:
            return None
        if since is None:
            os.makedirs(folder, exist_ok=True)
            return None
        place = os.fsdecode(since)
        manifest = Manifest.read(place)
        if len(manifest.files) != shards:
            raise ValueError(
                f"{place} was saved by {len(manifest.files)} ranks, and there are {shards}: save without since"
            )
        if (manifest.hash, manifest.hash_seed, manifest.buckets) != (HASH, HASH_SEED, BUCKETS):
            raise ValueError(f"{place} has other owners of names: save without since")
        os.makedirs(folder, exist_ok=True)
        if not os.path.samefile(place, folder):
            _link(place, folder, manifest.needed())
        return manifest.to_text()

    text = ranks.object_of(0, ranks.run(read))
    return None if text is None else _Before(folder, Manifest.of_text(text, folder))


def _link(source: str, target: str, names: Iterable[str]) -> None:
    """Link files into another folder; OSError, with the cure, if that cannot be."""
    for name in names:
        old, new = os.path.join(source, name), os.path.join(target, name)
        try:
            if os.path.exists(new) and os.path.samefile(old, new):
                continue
            os.link(old, new)
        except OSError as error:
            raise OSError(
                error.errno or errno.EPERM,
                f"{error.strerror}: a set in another folder can be continued if its files can be linked; save without "
                "since, or into the same folder",
                new,
            ) from error


def _write(
    parts: Parts,
    folder: str,
    name: str,
    archive: Archive | None,
    before: _Before | None,
    texts: dict[str, str] | None,
    ranks: CommonCall,
    sync: bool,
) -> tuple[FileOfSet, int]:
    """Write the archive of this rank."""
    if archive is not None:
        refuse_long_chain(archive)
    orders = {prefix: _order(parts, prefix, archive) for prefix in parts.sharded}
    if any(order.is_loose() for order in orders.values()):
        archive = None
    if archive is None:
        orders = {prefix: order if order.is_sorted else _order(parts, prefix, None) for prefix, order in orders.items()}
    collected = Collected()
    for prefix, order in orders.items():
        collected.dictionaries[prefix] = "StackedParameterDict"
        collected.tensors.append(NewTensor.of(prefix + EXTRA_STATE, order.names))
        for one in parts.tables(prefix):
            collected.tensors.append(order.rows(one.number, one.name, one.parameter))
            for key, value in one.others.items():
                collected.tensors.append(order.rows(one.number, f"{HIDDEN}rows.{one.name}.{key}", _narrow(key, value)))
    if ranks.rank == 0:
        dense = dense_tensors(parts, archive)
        collected.tensors += dense.tensors
        collected.dictionaries |= dense.dictionaries
        collected.capacities |= dense.capacities
    own = buckets_of_rank(parts.shard, parts.shards)
    sorted_counts, chain = {}, tuple(os.path.basename(path) for path in archive.files()) if archive is not None else ()
    for prefix, order in orders.items():
        known = before.manifest.files[parts.shard].sorted.get(prefix, []) if archive is not None and before else None
        sorted_counts[prefix] = order.counts[own.start : own.stop].tolist() if known is None else known
    kept = before.manifest.texts if texts is None and before is not None else texts or {}
    path = os.path.join(folder, name)
    size = write_archive(path, collected, archive, metadata=kept, sync=sync)
    with SafetensorsFile(path) as file:
        text, total = file.metadata["pdrs"], file.metadata[CHECK]
    counts = {prefix: len(order) for prefix, order in orders.items()}
    facts = FileOfSet(name, str(json.loads(text)["id"]), total, size, chain, sorted_counts, counts)
    return facts, size


def _order(parts: Parts, prefix: str, archive: Archive | None) -> RowOrder:
    local = parts.sharded[prefix].local
    name = prefix + EXTRA_STATE
    return RowOrder(local, archive.tensor(name) if archive is not None and name in archive else None)


def _narrow(key: str, value: Tensor) -> Tensor:
    """Return the numbers of gathers in 32 bits, if they fit."""
    if key == "seen" and (not len(value) or int(value.max()) < 1 << 31):
        return value.to(torch.int32)
    return value
