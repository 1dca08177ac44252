"""``python -m pdrs inspect|get|convert|verify``: look into checkpoints of any format, convert and verify them.

Exit codes: 0 for success. 1 if a file or a name is missing, or a file is damaged or cannot be written. 2 if the command
is not understood. 130 after an interrupt. A reader that closes the pipe, as `head` does, is no error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import islice
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
from pdrs._files.archive_read import Archive
from pdrs._files.archive_write import write_archive
from pdrs._files.atomic import refuse_folder, replacing
from pdrs._files.checkpoint_file import CheckpointError, CheckpointFile, short_name, texts_of
from pdrs._files.collect import collect
from pdrs._files.named_layout import MAX_SHARD, write_named
from pdrs._files.open_file import Key, open_file
from pdrs._files.progress import progress
from pdrs._files.torch_file import METADATA, VERSIONS
from pdrs.stacked import StackedParameterDict

__all__ = ["main"]

# How many names and tables are listed by default, and how many characters of a text.
_SHOWN = 20
_SHOWN_OF_TEXT = 200

# Files with more names are opened as tables: a tensor for each name would take seconds and gigabytes.
_MANY = 10_000

# The bytes that are read at once.
_BLOCK = 16 << 20

# The exit code of shells after Ctrl-C.
_INTERRUPTED = 130

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the command line, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
        print(end="", flush=True)
    except BrokenPipeError:
        # Otherwise Python would complain again when it closes the stream.
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

    get = commands.add_parser(
        "get", help="print the values of entries", description="Print the values of entries, a line for each."
    )
    get.add_argument("file", help="a checkpoint of any format; of an archive only what is asked for is read")
    get.add_argument("names", nargs="*", metavar="NAME", help="without names, those of standard input, one a line")
    get.add_argument("--json", action="store_true", help="print a JSON object for each entry")
    get.set_defaults(run=_get)

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
    for command in (inspect, get, convert, verify):
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
    """The names in a checkpoint, and the dtype and shape of each.

    Parameters
    ----------
    names
        In order.
    kinds
        The distinct pairs of dtype and shape.
    kind_of
        The number of that of each name.
    """

    def __init__(self, names: Collection[str], kinds: list[tuple[str, tuple[int, ...]]], kind_of: NDArray[Any]) -> None:
        self.names, self.kinds, self.kind_of = names, kinds, kind_of

    def chosen(self, prefix: str, glob: str | None) -> _Contents:
        """Return the part with names that begin with the prefix and match the glob."""
        if not prefix and glob is None:
            return self
        like = re.compile(fnmatch.translate(glob if glob is not None else "*"))
        there = {at: name for at, name in enumerate(self.names) if name.startswith(prefix) and like.match(name)}
        return _Contents(list(there.values()), self.kinds, self.kind_of[list(there)])

    def summary(self) -> list[dict[str, Any]]:
        """Return the number and bytes of the tensors of each kind, those with the most bytes first."""
        counts = np.bincount(self.kind_of.astype(np.int64), minlength=len(self.kinds)).tolist()
        found = [
            {"dtype": dtype, "shape": list(shape), "names": count, "bytes": count * prod(shape) * _bits(dtype) // 8}
            for (dtype, shape), count in zip(self.kinds, counts, strict=True)
            if count
        ]
        return sorted(found, key=lambda kind: -kind["bytes"])

    def entries(self, count: int) -> list[dict[str, Any]]:
        """Describe the first names."""
        shown = zip(islice(self.names, count), self.kind_of[:count].tolist(), strict=True)
        return [
            {"name": name, "dtype": self.kinds[kind][0], "shape": list(self.kinds[kind][1])} for name, kind in shown
        ]


def _bits(dtype: str) -> int:
    # torch does not have F6_E2M3, of 6 bits, or F4, of 4.
    known: torch.dtype | None = getattr(torch, dtype, None)
    return 8 * known.itemsize if known is not None else int(dtype[1])


def _has_dictionaries(file: CheckpointFile) -> bool:
    """Whether some names have no tensors of their own, but are rows of tables."""
    return isinstance(file, Archive) or bool(file.prefixes())


def _contents(path: str, key: Key | None, file: CheckpointFile) -> _Contents:
    if not _has_dictionaries(file):
        return _Contents(file.names, *file.kinds())
    sd = checkpoint.open(path, key=key)
    kinds = [(short_name(table.dtype), tuple(table.shape[1:])) for table in sd.tables().values()]
    return _Contents(sd.keys(), kinds, sd._index.places().tables)


# -- get ---------------------------------------------------------------------------------------------------------------


def _get(options: argparse.Namespace) -> int:
    names = options.names or (line.removesuffix("\n") for line in sys.stdin)
    sd = checkpoint.open(options.file, key=options.key)
    result = 0
    for name in names:
        row = sd.get(name)
        if row is None:
            result = _complain(f"{_printable(name)} is not in {_printable(str(options.file))}")
            continue
        row = row.detach()
        values = (torch.view_as_real(row) if row.is_complex() else row).tolist()
        if options.json:
            entry = {"name": name, "dtype": short_name(row.dtype), "shape": list(row.shape), "values": values}
            print(json.dumps(entry), flush=not options.names)
        else:
            print(_printable(name), json.dumps(values), sep="\t", flush=not options.names)
    return result


# -- inspect -----------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    with open_file(options.file, options.key) as file:
        found = _describe(file, options)
    if options.json:
        _print_json(found)
    else:
        _print(found)
    return 0


def _describe(file: CheckpointFile, options: argparse.Namespace) -> dict[str, Any]:
    contents = _contents(options.file, options.key, file).chosen(options.prefix, options.match)
    kinds = contents.summary()
    found: dict[str, Any] = {
        "path": file.path,
        "format": file.format,
        "bytes": sum(map(os.path.getsize, file.files())),
        "metadata": texts_of(file.metadata),
        "names": len(contents.names),
        "value_bytes": sum(kind["bytes"] for kind in kinds),
        "kinds": kinds,
        "verified": None,
    }
    if file.shards:
        found["shards"] = [
            {"path": shard.path, "bytes": os.path.getsize(shard.path), "names": len(shard)} for shard in file.shards
        ]
    if isinstance(file, Archive):
        found["files"] = file.files()
        found["dictionaries"] = file.dictionaries
        found["tables"] = [
            {"name": name, "dtype": short_name(file.dtype(name)), "shape": list(file.shape(name))} for name in file
        ]
    if not options.no_verify and _compare(file):
        found["verified"] = True
    found["entries"] = contents.entries(len(contents.names) if options.all else _SHOWN)
    return found


def _print_json(found: dict[str, Any]) -> None:
    """Print JSON with a line for each entry. ``json`` would take a minute to indent a million."""
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
    """Return a text, escaped as Python does if it might move the cursor."""
    return text if text.isprintable() else repr(text)


def _bytes(count: int) -> str:
    unit = next(unit for unit, size in reversed(_UNITS.items()) if unit and (count >= size or size == 1))
    return f"{count:,} B" if unit == "B" else f"{count / _UNITS[unit]:.1f} {unit}"


# -- convert -----------------------------------------------------------------------------------------------------------


class _Loaded(Module):
    """A module whose state dict is given."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_state"] = state

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Return it."""
        return dict(self.__dict__["_state"])


def _convert(options: argparse.Namespace) -> int:
    refuse_folder(options.target)
    target = Path(options.target)
    layout = options.layout or ("torch" if target.suffix in (".pt", ".pth", ".bin") else "archive")
    with open_file(options.source, options.key) as file:
        _refuse_needed(target, file)
        _compare(file)  # Damaged data must not get new checksums.
        texts = texts_of(file.metadata)
        if layout == "archive" and isinstance(file, Archive):
            # The tables as they are. A chain of archives becomes one.
            collected = collect(_Loaded({name: file.table(name, loads=False) for name in file}))
            collected.dictionaries.update(file.dictionaries)
            written = {target: write_archive(target, collected, metadata=texts)}
        else:
            is_opened = len(file) > _MANY or (layout != "archive" and _has_dictionaries(file))
            module = checkpoint.open(options.source, key=options.key) if is_opened else _Loaded(file.tensors())
            if layout == "archive":
                written = {target: checkpoint.save(module, target, metadata=texts)}
            elif layout == "named":
                written = write_named(target, module, texts, max_shard_size=options.max_shard_size)
            else:
                written = {target: _save_torch(target, module, texts, file.versions)}
    count, size = len(written), sum(written.values())
    print(f"{_printable(os.fspath(target))}: {layout}, {count} file{'s'[: count > 1]}, {_bytes(size)}")
    return 0


def _refuse_needed(target: Path, file: CheckpointFile) -> None:
    """Refuse to replace a file without which the one that is converted cannot be opened."""
    for path in file.files()[1:]:
        with suppress(FileNotFoundError):
            if os.path.samefile(path, target):
                raise ValueError(f"{target} is {path}, which is needed to open {file.path}, and cannot be replaced")


def _save_torch(target: Path, module: Module, texts: dict[str, str], versions: Mapping[str, Any]) -> int:
    named = module.named_state_dict() if isinstance(module, StackedParameterDict) else module.state_dict()
    state = OrderedDict(named)
    if texts:
        # As an attribute, like the versions of modules: it is not taken for a tensor.
        setattr(state, METADATA, texts)
    if versions:
        setattr(state, VERSIONS, versions)
    with replacing(target, sum(tensor.nbytes for tensor in state.values())) as out:
        torch.save(state, out)  # type: ignore[arg-type]  # `write` and `flush` are enough
    return out.position


# -- verify ------------------------------------------------------------------------------------------------------------


def _compare(file: CheckpointFile) -> bool:
    """Read all data and compare checksums; return whether there are any."""
    if isinstance(file, Archive):
        checkpoint.verify(file.path)
        return True
    return file.verify()


def _verify(options: argparse.Namespace) -> int:
    with open_file(options.file, options.key) as file:
        if _compare(file):
            print(f"{_printable(options.file)}: good, all checksums are right")
            return 0
        # The header fits the size. What is left is whether the disk gives all bytes.
        for path in file.files():
            with progress(os.path.getsize(path), path) as count, open(path, "rb", buffering=0) as raw:
                while block := raw.read(_BLOCK):
                    count(len(block))
    print(f"{_printable(options.file)}: can be read; it has no checksums")
    return 0
