"""What mkdocs does not do by itself, for ``make docs``.

The pages and docstrings are also read where there is no site. So pages link to files of the repository by relative
paths, as GitHub wants it, and docstrings name functions as Sphinx does. Here both become links of the site.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from griffe import Alias, Attribute, Class, ExprAttribute, Extension, Module, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "pictures"
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: +)(\.\.?/[^)\s#]+)", re.MULTILINE)
_OPTION = re.compile(r"  # doctest: .*$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|exc|func|meth):`(~?)([\w.]+)`")
# Parameters that share a description. griffe would give all of them the type of the first.
_SHARED = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)+)\n((?:    .*\n)+)", re.MULTILINE)
# A warning of a logger below this name fails a strict build.
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the benchmarks to the site."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files outside ``docs`` lead to the repository, and hide what is said to doctest."""
    here = Path(config.docs_dir, page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        target = (here / found[2]).resolve()
        if target.is_relative_to(config.docs_dir):
            return found[0]
        if not target.exists():
            _log.warning("%s links to %s, which is not there", page.file.src_uri, found[2])
        path = target.relative_to(ROOT).as_posix()
        if target.suffix == ".png":
            return f"{found[1]}{'../' * page.file.src_uri.count('/')}{PICTURES}/{target.name}"
        return f"{found[1]}{config.repo_url}/{'tree' if target.is_dir() else 'blob'}/main/{path}"

    return _LINK.sub(replaced, _OPTION.sub("", markdown))


class Docstrings(Extension):  # type: ignore[misc]  # mypy does not read griffe
    """Makes the docstrings of public names readable on the site.

    Methods may be written in other modules, as ``gather = _gather.gather`` in the body of a class: here they become
    methods of the class. References such as ``:meth:`gather``` become links, or code.
    """

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Go through everything that the package exports."""
        exported = {name: _found(pkg[name]) for name in pkg.exports or ()}
        classes = {name: each for name, each in exported.items() if isinstance(each, Class)}
        for each in classes.values():
            _take_methods(each)
        members = {f"{name}.{one}" for name, each in classes.items() for one in each.all_members if one[0] != "_"}
        public = {f"pdrs.{path}" for path in exported.keys() | members}
        for name, each in exported.items():
            _link(each, f"pdrs.{name}.", public)
            for member in each.all_members.values() if isinstance(each, Class) else ():
                _link(_found(member), f"pdrs.{name}.", public)


def _found(one: Object | Alias) -> Object:
    return one.final_target if one.is_alias else one


def _take_methods(owner: Class) -> None:
    """Replace the attributes of a class whose values are functions of this package by these functions."""
    for name, member in list(owner.members.items()):
        value = member.value if isinstance(member, Attribute) else None
        if isinstance(value, ExprAttribute) and value.canonical_path.startswith("pdrs."):
            function = owner.modules_collection[value.canonical_path]
            if _found(function).is_function:
                owner.set_member(name, Alias(name, function, parent=owner))


def _link(documented: Object, prefix: str, public: set[str]) -> None:
    def replaced(found: re.Match[str]) -> str:
        name = found[2]
        path = next((path for path in (f"{prefix}{name}", name, f"pdrs.{name}") if path in public), None)
        shown = name if path is None and not found[1] else name.rpartition(".")[2]
        return f"`{shown}`" if path is None else f"[`{shown}`][{path}]"

    def separate(found: re.Match[str]) -> str:
        return "".join(f"{name}\n{found[2]}" for name in found[1].split(", "))

    if documented.docstring:
        documented.docstring.value = _SHARED.sub(separate, _ROLE.sub(replaced, documented.docstring.value) + "\n")
