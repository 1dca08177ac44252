"""What a path leads to: the one checkpoint of a folder, as others write them, or what a file is that is none.

A folder may hold the weights of one model in several formats, in shards, and beside them the states of optimizers.
Which file is meant is decided as the tools that write such folders do; where two may be meant, it is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pdrs._files.checkpoint_file import CheckpointError
from pdrs._files.set_manifest import MANIFEST, is_manifest

__all__ = ["file_in", "is_of_torch", "what_it_is"]

# The names that tools give to the weights of a model, and what they called them before they wrote safetensors:
# transformers and accelerate, peft, diffusers, its LoRAs, open_clip.
_USUAL = {
    "model": "model",
    "pytorch_model": "model",
    "adapter_model": "adapter_model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "pytorch_lora_weights": "pytorch_lora_weights",
    "open_clip_model": "open_clip_model",
    "open_clip_pytorch_model": "open_clip_model",
}
_INDEX = re.compile(r"(?P<stem>.+)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json")
_FILE = re.compile(r"(?P<stem>.+)\.(?P<format>safetensors|bin|pt|pth|ckpt)")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\..+")
# What trainers write of a run beside the weights.
_OF_A_RUN = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|sampler|dl_state_dict)(_\d+)?\.(bin|pth?)"
)
_OTHERS = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".keras", ".npz", ".distcp")
# How many names an error lists, and how many entries of a folder are looked at for it.
_LISTED, _LOOKED_AT = 5, 1000


class _Found(NamedTuple):
    """A file of a folder that may be meant: a checkpoint, or the index of one in shards."""

    name: str
    family: str
    is_usual: bool
    is_safe: bool
    is_index: bool
    variant: str


def file_in(folder: str) -> str:
    """Return the path of the checkpoint in a folder.

    Raises
    ------
    CheckpointError
        If there is none, or more than one.
    OSError
        If the folder cannot be listed.
    """
    names = sorted(os.listdir(folder))
    if MANIFEST in names and is_manifest(os.path.join(folder, MANIFEST)):
        return os.path.join(folder, MANIFEST)
    found = [one for one in map(_described, names) if one is not None]
    for chosen in ([one for one in found if one.is_usual], [one for one in found if one.is_safe], found):
        if chosen:
            return os.path.join(folder, _only(folder, chosen).name)
    raise CheckpointError(folder, f"the folder has no checkpoint{_what_else(folder, names)}")


def _described(name: str) -> _Found | None:
    index = _INDEX.fullmatch(name)
    match = index or _FILE.fullmatch(name)
    if match is None or name.startswith(".") or _SHARD.fullmatch(name) or _OF_A_RUN.fullmatch(name):
        return None
    stem, variant = match["stem"], (index and index["variant"]) or ""
    # model.fp16.safetensors, and model_1.safetensors, which accelerate writes of a second model.
    begin, _, rest = stem.partition(".")
    if begin in _USUAL and rest and not variant:
        stem, variant = begin, rest
    usual = _USUAL.get(re.sub(r"_\d+$", "", stem))
    family = _USUAL.get(stem, stem)
    return _Found(name, family, usual is not None, match["format"] == "safetensors", index is not None, variant)


def _only(folder: str, found: list[_Found]) -> _Found:
    """Return the one that is meant."""
    if len({one.family for one in found}) == 1:
        # As all tools prefer it.
        found = [one for one in found if not one.variant] or found
        found = [one for one in found if one.is_safe] or found
        if len(found) > 1:
            alone = [one for one in found if not one.is_index]
            indices = [one for one in found if one.is_index]
            if len(alone) == 1 and all(_lists_only(Path(folder, one.name), alone[0].name) for one in indices):
                return alone[0]
    if len(found) > 1:
        names = _listed(one.name for one in found)
        raise CheckpointError(folder, f"the folder has more than one checkpoint: {names}: give the path of one")
    return found[0]


def _lists_only(index: Path, name: str) -> bool:
    """Whether all names of an index are in one file, so that it says nothing that the file does not say."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return set(json.loads(index.read_bytes())["weight_map"].values()) <= {name}
    return False


def _what_else(folder: str, names: list[str]) -> str:
    """Return what there is to say of a folder that has no checkpoint."""
    if any(name.endswith(".distcp") for name in names):
        return (
            ": it is one of torch.distributed.checkpoint, which "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes a file of"
        )
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        return f": it has shards, such as {shards[0]!r}, but no index that tells which names they hold"
    others = [name for name in names if name.endswith(_OTHERS)]
    if others:
        return f" that can be read: it has {_listed(others)}"
    inner = _inner(folder)
    if inner:
        return f" itself: there are some in {_listed(inner)}; give the path of one"
    return ": no safetensors, no index of shards, and no state dict of torch"


def _inner(folder: str) -> list[str]:
    """Return some of the folders in a folder, and in these, that have checkpoints."""
    found, looked_at = [], 0
    for place, inside, names in os.walk(folder):
        inside.sort()
        looked_at += len(names) + len(inside)
        where = os.path.relpath(place, folder)
        if where.count(os.sep) >= 2 or looked_at > _LOOKED_AT:
            inside.clear()
        if any(_described(name) for name in names) or any(_SHARD.fullmatch(name) for name in names):
            found.append(where)
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = ", ..." if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


# -- files that are none -----------------------------------------------------------------------------------------------

_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC = (
    (b"GGUF", "it is of the format GGUF"),
    (b"\x89HDF\r\n\x1a\n", "it is of the format HDF5"),
    (b"\x93NUMPY", "it is an array that numpy.save wrote"),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd: unpack it"),
    (b"BZh", "it is compressed by bzip2: unpack it"),
    (b"\xfd7zXZ\x00", "it is compressed by xz: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "it is an archive of 7-Zip: unpack it"),
    (b"PAR1", "it is of the format Parquet"),
    (b"ARROW1", "it is of the format Arrow"),
)


def is_of_torch(path: str) -> bool:
    """Whether a file is a zip archive or a pickle, as ``torch.save`` writes them, or else may be one of safetensors.

    Raises
    ------
    CheckpointError
        If it is known to be neither.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        beginning = file.read(512)
    what = what_it_is(beginning)
    if what is not None:
        raise CheckpointError(path, what)
    # If a safetensors header begins with the size 0x80..., a brace follows.
    return beginning.startswith(b"PK") or (beginning.startswith(b"\x80") and beginning[8:9] != b"{")


def what_it_is(beginning: bytes) -> str | None:
    """Return what a file is that begins so, if it is known to be none of tensors by name."""
    if beginning[8:9] == b"{":
        return None
    if not beginning:
        return "the file is empty: it may not have been downloaded, or copied, to its end"
    if beginning.startswith(_LFS):
        return "it is a pointer of Git LFS, and the file itself was not downloaded: run `git lfs pull`"
    for magic, what in _MAGIC:
        if beginning.startswith(magic):
            return f"{what}, and no checkpoint that pdrs reads"
    if beginning[257:262] == b"ustar":
        return "it is an archive of tar: unpack it"
    text = beginning.lstrip(b"\xef\xbb\xbf \r\n\t")[:15].lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a page of HTML or XML, most likely an error of the server that it was to be downloaded from"
    with suppress(UnicodeDecodeError):
        shown = beginning[:60].decode().split("\n", 1)[0].strip()
        if text.startswith(b"{"):
            return "it is JSON, which is read as an index of shards if its name ends in .json"
        if len(shown) > 1 and shown.isprintable():
            return f"it is a text, which begins {shown!r}"
    return None
