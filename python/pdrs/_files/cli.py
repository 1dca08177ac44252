"""``python -m pdrs inspect|convert|verify``: checkpoints of any kind from the command line.

Exit codes: 0 if all is well, 1 if a file is damaged, missing or cannot be written, 2 if the command is not understood,
130 if it was interrupted. If the reader of a pipe has seen enough, as `head` does, all is well.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

import pdrs
from pdrs import checkpoint
from pdrs._files.archive import Archive, write_archive
from pdrs._files.atomic import Progress, refuse_folder, replacing
from pdrs._files.collect import EXTRA_STATE, collect
from pdrs._files.named_layout import MAX_SHARD, write_named
from pdrs._files.safetensors_file import DTYPES, CheckpointError, TensorFile, texts_of
from pdrs._files.state_file import (
    METADATA,
    VERSIONS,
    Key,
    ShardedFile,
    StateFile,
    TorchFile,
    TorchShards,
    open_state,
)
from pdrs._rows.names_codec import is_packed
from pdrs.stacked import StackedParameterDict

__all__ = ["main"]

# How many names and tables are shown unless all are asked for.
_SHOWN = 20
_SHOWN_OF_TEXT = 200

# Files of more names than this are opened as tables: a tensor for each name would take seconds and gigabytes.
_MANY = 10_000

# What is read at once where all of a file is read.
_BLOCK = 16 << 20

# What shells call the end by Ctrl-C.
_INTERRUPTED = 130

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the command line, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
        print(end="", flush=True)
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pdrs: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except KeyError as error:
        return _complain(str(error.args[0]) if error.args else "missing")
    except (CheckpointError, ValueError, TypeError, RuntimeError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return result


def _complain(what: str) -> int:
    print(f"pdrs: {what}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdrs", description="Look into checkpoints, convert and verify them."
    )
    parser.add_argument("--version", action="version", version=f"pdrs {pdrs.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="show names, shapes, dtypes and sizes",
        description="Show what a checkpoint has, and verify it.",
    )
    inspect.add_argument(
        "file", help="an archive, safetensors, a state dict of torch, the index of sharded ones, or a folder with one"
    )
    inspect.add_argument("--prefix", default="", help="only names that begin with this")
    inspect.add_argument("--match", metavar="GLOB", help="only names like this, such as 'layers.*.bias'")
    inspect.add_argument("--all", action="store_true", help=f"list all names, not only the first {_SHOWN}")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--no-verify", action="store_true", help="read no data: do not compare checksums")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert", help="write a checkpoint in another format", description="Write a checkpoint in another format."
    )
    convert.add_argument("source", metavar="in", help="a checkpoint of any format")
    convert.add_argument("target", metavar="out", help="the file to be written")
    convert.add_argument(
        "--layout",
        choices=["archive", "named", "torch"],
        help="archive: tables and names; named: a tensor a name, in shards where one file would be too large; torch: a "
        "state dict by torch.save. By default torch for .pt, .pth and .bin, else archive",
    )
    convert.add_argument(
        "--max-shard-size",
        type=_size,
        default=MAX_SHARD,
        metavar="SIZE",
        help="of the named layout, such as 500MB; 5GB by default",
    )
    convert.set_defaults(run=_convert)

    verify = commands.add_parser(
        "verify", help="read all of a checkpoint and compare checksums", description="Read all of a checkpoint."
    )
    verify.add_argument("file", help="a checkpoint of any format; safetensors alone has no checksums")
    verify.set_defaults(run=_verify)
    for command in (inspect, convert, verify):
        command.add_argument(
            "--key",
            action="append",
            help="of a file of torch, what its state dict stands under, such as state_dict; give it again for what is "
            "in that",
        )
    return parser


def _size(text: str) -> int:
    """Return the bytes that a size such as ``5GB`` means."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = found and (found[2] + "B" if found[2] in ("K", "M", "G", "T") else found[2])
    if not found or int(float(found[1]) * _UNITS[str(unit)]) < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS[str(unit)])


# -- what is in a file -------------------------------------------------------------------------------------------------


class _Contents:
    """The names in a checkpoint, and of what kind each tensor is.

    Parameters
    ----------
    names
        In order.
    kind_of
        The number of the kind of each.
    kinds
        Dtypes and shapes.
    """

    def __init__(self, names: list[str], kind_of: NDArray[Any], kinds: list[tuple[str, tuple[int, ...]]]) -> None:
        self.names, self.kind_of, self.kinds = names, kind_of, kinds
        self.bytes_of = [prod(shape) * _bits(dtype) // 8 for dtype, shape in kinds]

    def chosen(self, prefix: str, glob: str | None) -> _Contents:
        """Return the part whose names begin and look as given."""
        if not prefix and glob is None:
            return self
        like = re.compile(fnmatch.translate(glob if glob is not None else "*"))
        places = [at for at, name in enumerate(self.names) if name.startswith(prefix) and like.match(name)]
        return _Contents([self.names[at] for at in places], self.kind_of[places], self.kinds)

    def summary(self) -> list[dict[str, Any]]:
        """Return how many there are of each kind, those with the most bytes first."""
        counts = np.bincount(self.kind_of.astype(np.int64), minlength=len(self.kinds)).tolist()
        found = [
            {"dtype": dtype, "shape": list(shape), "names": count, "bytes": count * size}
            for (dtype, shape), size, count in zip(self.kinds, self.bytes_of, counts, strict=True)
            if count
        ]
        return sorted(found, key=lambda kind: -kind["bytes"])


def _bits(dtype: str) -> int:
    # What torch does not have is named as in the file: F6_E2M3 has 6 bits, F4 has 4.
    known: torch.dtype | None = getattr(torch, dtype, None)
    return 8 * known.itemsize if known is not None else int(dtype[1])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_archive(file: StateFile) -> bool:
    return isinstance(file, TensorFile) and len(texts_of(file.metadata)) < len(file.metadata)


def _holds_dictionaries(file: StateFile) -> bool:
    """Whether some names have no tensors of their own, but are rows of tables: in files of others, too."""
    names = file.names_ending(EXTRA_STATE) if isinstance(file, TensorFile) else file.names
    return _is_archive(file) or any(name.endswith(EXTRA_STATE) and is_packed(file.tensor(name)) for name in names)


def _contents(path: str, key: Key | None, file: StateFile) -> _Contents:
    if _holds_dictionaries(file):
        sd = checkpoint.open(path, key=key)
        kinds = [(_short(table.dtype), tuple(table.shape[1:])) for table in sd.tables().values()]
        return _Contents(list(sd), sd._index.places().tables, kinds)
    if isinstance(file, (TensorFile, ShardedFile)):
        kinds, kind_of = file.kinds()
        return _Contents(file.names, kind_of, [(_torch_name(code), shape) for code, shape in kinds])
    described = [(_short(file.dtype(name)), file.shape(name)) for name in file]
    places = {kind: number for number, kind in enumerate(dict.fromkeys(described))}
    return _Contents(file.names, np.array([places[kind] for kind in described], np.int64), list(places))


def _torch_name(code: str) -> str:
    return _short(DTYPES[code]) if code in DTYPES else code


# -- inspect -----------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    with open_state(options.file, options.key) as file:
        found = _describe(file, options)
    if options.json:
        _print_json(found)
    else:
        _print(found)
    return 0


def _describe(file: StateFile, options: argparse.Namespace) -> dict[str, Any]:
    contents = _contents(options.file, options.key, file).chosen(options.prefix, options.match)
    archive = _is_archive(file)
    shown = len(contents.names) if options.all else _SHOWN
    found: dict[str, Any] = {
        "path": file.path,
        "format": "archive" if archive else _formats[type(file)],
        "bytes": sum(os.path.getsize(path) for path in _paths(file)),
        "metadata": texts_of(file.metadata),
        "names": len(contents.names),
        "value_bytes": sum(kind["bytes"] for kind in contents.summary()),
        "kinds": contents.summary(),
        "verified": None,
    }
    if isinstance(file, (ShardedFile, TorchShards)):
        found["shards"] = [
            {"path": shard.path, "bytes": os.path.getsize(shard.path), "names": len(shard)} for shard in file.shards
        ]
    if archive:
        with Archive(TensorFile(file.path)) as opened:
            found["files"] = opened.files()
            found["dictionaries"] = opened.dictionaries
            found["tables"] = [
                {"name": name, "dtype": _short(opened.dtype(name)), "shape": list(opened.shape(name))}
                for name in opened.names
            ]
    if not options.no_verify and _compare(file):
        found["verified"] = True
    found["entries"] = [
        {"name": name, "dtype": contents.kinds[kind][0], "shape": list(contents.kinds[kind][1])}
        for name, kind in zip(contents.names[:shown], contents.kind_of[:shown].tolist(), strict=True)
    ]
    return found


_formats: dict[type, str] = {
    TensorFile: "safetensors",
    ShardedFile: "sharded safetensors",
    TorchFile: "torch",
    TorchShards: "sharded torch",
}


def _paths(file: StateFile) -> list[str]:
    if isinstance(file, (ShardedFile, TorchShards)):
        return [file.path, *(shard.path for shard in file.shards)]
    if not _is_archive(file):
        return [file.path]
    with Archive(TensorFile(file.path)) as archive:
        return archive.files()


def _print_json(found: dict[str, Any]) -> None:
    """Print JSON with an entry a line: of a million, ``json`` would take a minute to indent each number."""
    before, _, behind = json.dumps(found | {"entries": []}, indent=2).rpartition("[]")
    print(before, end="[")
    separator = "\n    "
    for entry in found["entries"]:
        print(separator, json.dumps(entry), sep="", end="")
        separator = ",\n    "
    print("\n  ]" if found["entries"] else "]", behind, sep="")


def _print(found: dict[str, Any]) -> None:
    files = found.get("files", found.get("shards", [None]))
    count = f", {len(files)} files" if len(files) > 1 else ""
    print(f"{_printable(found['path'])}: {found['format']}{count}, {_bytes(found['bytes'])}")
    print(f"{found['names']:,} names, {_bytes(found['value_bytes'])} of values")
    for key, value in found["metadata"].items():
        more = f"... ({len(value):,} characters: --json shows all)" if len(value) > _SHOWN_OF_TEXT else ""
        print(f"metadata {_printable(key)}: {_printable(value[:_SHOWN_OF_TEXT])}{more}")
    for file in found.get("files", [])[1:]:
        print(f"continues {_printable(file)}")
    for shard in found.get("shards", []):
        print(f"shard {_printable(shard['path'])}: {shard['names']:,} names, {_bytes(shard['bytes'])}")
    if found["verified"]:
        print("checksums: good")
    for title, rows in (("tables", found.get("tables", [])), ("kinds", found["kinds"])):
        if rows:
            print(f"{title}:")
        for row in rows[:_SHOWN]:
            what = f"{row['dtype']} {row['shape']}"
            print(
                f"  {_printable(row['name'])}  {what}"
                if title == "tables"
                else f"  {row['names']:>12,}  {what:<28}  {_bytes(row['bytes'])}"
            )
        if len(rows) > _SHOWN:
            print(f"  ... and {len(rows) - _SHOWN:,} more")
    if found["entries"]:
        print("names:")
    for entry in found["entries"]:
        print(f"  {_printable(entry['name'])}  {entry['dtype']} {entry['shape']}")
    hidden = found["names"] - len(found["entries"])
    if hidden:
        print(f"  ... and {hidden:,} more: --all lists them, --prefix and --match choose some")


def _printable(text: str) -> str:
    """Return a text as it is, or, if it would move the cursor or do worse, as Python writes it."""
    return text if text.isprintable() else repr(text)


def _bytes(count: int) -> str:
    unit = next(unit for unit, size in reversed(_UNITS.items()) if unit and (count >= size or size == 1))
    return f"{count:,} B" if unit == "B" else f"{count / _UNITS[unit]:.1f} {unit}"


# -- convert -----------------------------------------------------------------------------------------------------------


class _Loaded(Module):
    """Tensors that have been a state dict, and are to be one again."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_state"] = state

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Return them."""
        return dict(self.__dict__["_state"])


def _convert(options: argparse.Namespace) -> int:
    refuse_folder(options.target)
    target = Path(options.target)
    layout = options.layout or ("torch" if target.suffix in (".pt", ".pth", ".bin") else "archive")
    with open_state(options.source, options.key) as file:
        _refuse_needed(target, file)
        _compare(file)  # What is damaged must not get new checksums.
        if layout == "archive":
            written = {target: _save_archive(options.source, options.key, file, target)}
        else:
            named, texts = _by_name(options.source, options.key, file), texts_of(file.metadata)
            written = (
                write_named(target, named, metadata=texts, max_shard_size=options.max_shard_size)
                if layout == "named"
                else _save_torch(target, named, texts, file.versions if isinstance(file, TorchFile) else {})
            )
    count, size = len(written), sum(written.values())
    print(f"{_printable(os.fspath(target))}: {layout}, {count} file{'s'[: count > 1]}, {_bytes(size)}")
    return 0


def _refuse_needed(target: Path, file: StateFile) -> None:
    """Refuse to write over a file without which the one that is converted cannot be opened any more."""
    for path in _paths(file)[1:]:
        with suppress(FileNotFoundError):
            if os.path.samefile(path, target):
                raise ValueError(f"{target} is {path}, which is needed to open {file.path}, and cannot be replaced")


def _save_archive(path: str, key: Key | None, file: StateFile, target: Path) -> int:
    texts = texts_of(file.metadata)
    if not _is_archive(file):
        found = checkpoint.open(path, key=key) if len(file) > _MANY else _Loaded(file.tensors())
        return checkpoint.save(found, target, metadata=texts)
    # As it is: a chain of archives becomes one.
    with Archive(TensorFile(file.path)) as archive:
        collected = collect(_Loaded({name: archive.table(name, loads=False) for name in archive.names}))
        collected.dictionaries.update(archive.dictionaries)
        return write_archive(target, collected, metadata=texts)


def _by_name(path: str, key: Key | None, file: StateFile) -> StackedParameterDict | dict[str, Tensor]:
    return checkpoint.open(path, key=key) if len(file) > _MANY or _holds_dictionaries(file) else file.tensors()


def _save_torch(
    target: Path, named: StackedParameterDict | dict[str, Tensor], texts: dict[str, str], versions: dict[str, Any]
) -> dict[Path, int]:
    state = OrderedDict(named.named_state_dict() if isinstance(named, StackedParameterDict) else named)
    if texts:
        # As an attribute, in which torch keeps the versions of modules, too: nobody takes it for a tensor.
        setattr(state, METADATA, texts)
    if versions:
        setattr(state, VERSIONS, versions)
    with replacing(target, sum(tensor.nbytes for tensor in state.values())) as out:
        torch.save(state, out)  # type: ignore[arg-type]  # `write` and `flush` are enough
    return {target: out.position}


# -- verify ------------------------------------------------------------------------------------------------------------


def _compare(file: StateFile) -> bool:
    """Read all and compare checksums, if a file has some; whether it has."""
    if isinstance(file, TorchFile):
        return file.verify()
    if _is_archive(file):
        checkpoint.verify(file.path)
        return True
    return False


def _verify(options: argparse.Namespace) -> int:
    with open_state(options.file, options.key) as file:
        if _compare(file):
            print(f"{_printable(options.file)}: good, all checksums are right")
            return 0
        # Header and size have been found to fit; what is left is to see whether the disk gives all bytes.
        for path in _paths(file):
            _read_through(path)
    print(f"{_printable(options.file)}: can be read; it has no checksums")
    return 0


def _read_through(path: str) -> None:
    progress = Progress(os.path.getsize(path), os.path.basename(path))
    try:
        with open(path, "rb", buffering=0) as raw:
            while block := raw.read(_BLOCK):
                progress.add(len(block))
    finally:
        progress.close()
