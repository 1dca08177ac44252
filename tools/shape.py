"""Print the figures of this code base's structure beside their bounds: ``make shape``.

A review sees one change at a time. What grows slowly shows only here: import circles, unsafe code, inheritance, size.
Everything is read from the source text. Nothing is imported, built or run.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "ALLOWED",
    "LAYERS",
    "Import",
    "against_layers",
    "circles",
    "imports_of",
    "long_sentences",
    "modules_of",
    "private_tests",
]

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "pdrs"
RUST = ROOT / "rust"

# The layer rule, from the lowest layer to the highest. A module imports modules of its own package and of lower layers.
# A name is the first part below `pdrs`. Two packages of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_core",),  # The native module.
    ("_torch",),  # What torch does and which modes are active, errors, transactions, lists of names.
    # It rebuilds plain tensors, and asks `_torch` for the active modes. What writes pickles imports it, so it stands
    # below `_entries` and needs no exception.
    ("_pickle",),
    ("_entries", "_moves", "_rows"),
    # The faces are ordered. `ParameterDict.to()` moves by `transfer`, and `unstack()` returns a ParameterDict.
    ("transfer",),
    ("parameter_dict",),
    ("stacked", "optim"),
    ("_files",),
    ("_ranks",),  # What all ranks of a process group do together.
    ("checkpoint",),
    ("distributed",),
    ("typing",),  # Types of arguments, for the annotations of users.
    ("__init__",),
    ("_cli",),
    ("__main__",),
)

# Imports that may point upward: importing module, function, imported module. Circles are counted without them.
ALLOWED = {
    # A user who stacks a dictionary expects a method. The function runs long after both modules are loaded.
    ("pdrs.parameter_dict", "ParameterDict.stack", "pdrs.stacked"),
}

# What takes the id of a row apart, besides shifts by the same number.
ID_NAMES = {"ROW_BITS", "ROW_MASK", "id_of", "row_of", "table_of"}
ID_BITS = 40

# Attributes with one underscore that torch and Python own. Objects of pdrs inherit them, or tests read them elsewhere.
FOREIGN_PRIVATES = {
    *("_backward_hooks", "_base", "_indices", "_is_view", "_values", "_version"),  # torch.Tensor
    *("_apply", "_buffers", "_forward_pre_hooks", "_load_from_state_dict", "_load_state_dict_pre_hooks"),  # Module
    *("_modules", "_non_persistent_buffers_set", "_parameters", "_replicate_for_data_parallel", "_save_to_state_dict"),
    *("_flat_weights", "_key_to_attr", "_keys", "_metadata"),  # RNN, ParameterDict, a state dict
    *(
        "_optimizer_step_post_hooks",
        "_optimizer_step_pre_hooks",
        "_patch_step_function",
        "_schema",
    ),  # Optimizer, operators
    *("_fields_", "_replace"),  # ctypes.Structure, NamedTuple
}

LONGEST_SENTENCE = 30
_ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.")


# -- imports -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One import: which module imports which, in which function (empty at module level), and on which line."""

    source: str
    function: str
    target: str
    line: int

    def __str__(self) -> str:
        """Return it as one line for a reader."""
        place = f" in {self.function}()" if self.function else ""
        return f"{self.source}:{self.line}{place} imports {self.target}"


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules of a package, by dotted name. A native module counts by its stub."""
    modules = {}
    for path in sorted([*package.rglob("*.pyi"), *package.rglob("*.py")]):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(package: Path) -> list[Import]:
    """Return all imports of a package's modules among each other.

    What one function imports from one module counts once, and so does what a module imports outside of functions.
    Imports inside functions count. Imports under ``if TYPE_CHECKING`` do not, because they never run.
    That Python runs a package's ``__init__`` before its modules is left out.
    """
    modules = modules_of(package)
    found: dict[tuple[str, str, str], Import] = {}
    for name, path in modules.items():
        if path.suffix != ".py":
            continue
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, function in _running(_parsed(path)):
            for target in _targets(node, parent, modules):
                if target in modules:
                    found.setdefault((name, function, target), Import(name, function, target, node.lineno))
    return list(found.values())


def _running(
    node: ast.AST, scope: tuple[str, ...] = (), in_function: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom | ast.Call, str]]:
    """Give the imports and calls below a node that run, each with the function that it is in."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
        yield node, ".".join(scope) if in_function else ""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        scope = (*scope, node.name)
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        children = node.orelse
    elif isinstance(node, ast.If) and isinstance(node.test, ast.UnaryOp) and _is_type_checking(node.test.operand):
        children = node.body
    for child in children:
        yield from _running(child, scope, in_function or is_function)


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _targets(node: ast.Import | ast.ImportFrom | ast.Call, parent: str, modules: Iterable[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call):
        first = node.args[0] if node.args else None
        imports = _called(node) in ("import_module", "__import__")
        return [str(first.value)] if imports and isinstance(first, ast.Constant) else []
    base = node.module or ""
    if node.level:
        parents = parent.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    return [submodule if submodule in modules else base for submodule in submodules]


def _called(node: ast.Call) -> str:
    return str(getattr(node.func, "id", getattr(node.func, "attr", "")))


def circles(imports: Iterable[Import], allowed: Iterable[tuple[str, str, str]] = ALLOWED) -> list[list[str]]:
    """Return the import circles: each a sorted list of modules, of which every one reaches every other."""
    graph: dict[str, set[str]] = defaultdict(set)
    for each in imports:
        if (each.source, each.function, each.target) not in set(allowed):
            graph[each.source].add(each.target)
    reached = {name: _reached(graph, name) for name in list(graph)}
    found = {
        tuple(sorted(other for other in names if name in reached.get(other, ())))
        for name, names in reached.items()
        if name in names
    }
    return sorted(map(list, found))


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph.get(start, ()))
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += graph.get(name, ())
    return seen


def against_layers(imports: Iterable[Import], layers: tuple[tuple[str, ...], ...] = LAYERS) -> list[Import]:
    """Return the imports against the layer rule, with those in ``ALLOWED``.

    Modules without a layer are left out: see :func:`without_layer`.
    """
    heights = {name: height for height, names in enumerate(layers) for name in names}
    found = []
    for each in imports:
        source, target = _first_part(each.source), _first_part(each.target)
        if source != target and source in heights and target in heights and heights[source] <= heights[target]:
            found.append(each)
    return found


def without_layer(modules: Iterable[str], layers: tuple[tuple[str, ...], ...] = LAYERS) -> list[str]:
    """Return the modules that the layer rule does not know."""
    known = {name for names in layers for name in names}
    return [name for name in modules if _first_part(name) not in known]


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


# -- ids and classes ---------------------------------------------------------------------------------------------------


def lines_with_ids(path: Path) -> list[int]:
    """Return the lines of code that compose an id of a row, or take one apart."""
    found = set()
    for node in ast.walk(_parsed(path)):
        names = {getattr(node, key, None) for key in ("id", "attr", "name")}
        shifts = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.LShift | ast.RShift)
        by = getattr(node, "right", getattr(node, "value", None))
        if names & ID_NAMES or (shifts and isinstance(by, ast.Constant) and by.value == ID_BITS):
            found.add(int(getattr(node, "lineno", 0)))
    return sorted(found)


def class_lengths(package: Path) -> dict[str, tuple[int, list[str]]]:
    """Return for each class its lines together with those of its bases inside the package, and their names."""
    modules = modules_of(package)
    own: dict[str, int] = {}
    bases: dict[str, list[str]] = {}
    for module, path in modules.items():
        if path.suffix != ".py":
            continue
        tree = _parsed(path)
        names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                names[node.name] = f"{module}.{node.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                own[f"{module}.{node.name}"] = (node.end_lineno or first) - first + 1
                bases[f"{module}.{node.name}"] = [_dotted(base, names) for base in node.bases]
    return {name: _with_bases(name, own, bases) for name in own}


def _dotted(base: ast.expr, names: dict[str, str]) -> str:
    if isinstance(base, ast.Subscript):
        base = base.value
    first, _, rest = ast.unparse(base).partition(".")
    return f"{names.get(first, first)}.{rest}" if rest else names.get(first, first)


def _with_bases(name: str, own: dict[str, int], bases: dict[str, list[str]]) -> tuple[int, list[str]]:
    ladder = [name]
    for each in ladder:  # It grows while it is gone through.
        ladder += [base for base in bases.get(each, ()) if base in own and base not in ladder]
    return sum(own[each] for each in ladder), ladder


# -- Rust --------------------------------------------------------------------------------------------------------------

_RUST_TEXT = re.compile(
    r"""//[^\n]*|/\*.*?\*/|\br(?P<hashes>\#*)".*?"(?P=hashes)|"(?:\\.|[^"\\])*"|'(?:\\[^'\n]*'|[^'\\\n]')""", re.DOTALL
)


def unsafe_blocks(path: Path) -> list[int]:
    """Return the lines where a block ``unsafe {`` begins, outside of comments and literals.

    ``unsafe fn``, ``unsafe impl``, ``unsafe extern`` and attributes do not count: they demand care, and blocks take it.
    """
    code = _RUST_TEXT.sub(lambda found: "\n" * found[0].count("\n"), path.read_text(encoding="utf-8"))
    return [code.count("\n", 0, found.start()) + 1 for found in re.finditer(r"\bunsafe\s*\{", code)]


def imports_from_rust(path: Path) -> list[tuple[int, str]]:
    """Return the lines where Rust imports a Python module of this project, and its name."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [(at, found[1]) for at, line in lines if (found := re.search(r'import\(.*?"(pdrs\.[\w.]+)"', line))]


# -- tests -------------------------------------------------------------------------------------------------------------

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")
_IN_TEXT = re.compile(r"\bpdrs\._[a-z]\w*|\bfrom pdrs import _[a-z]\w*")
_BY_NAME = ("getattr", "setattr", "delattr", "hasattr", "object")


def private_tests(path: Path) -> tuple[list[tuple[str, str]], int]:
    """Return the tests of a file that touch privates of pdrs, each with the first one, and how many tests it has.

    A test is a function ``test_*``. Its body, decorators and fixtures are searched, then the module-level names of the
    same file that these mention, and so on. It touches privates if one of these is found:

    - A name that is imported from ``pdrs._*``, or such an import.
    - A text with ``pdrs._*``: a program for another process, or a target for ``monkeypatch``.
    - An attribute with one underscore, read by a dot or by ``getattr``, ``setattr`` or ``patch.object``.

    Three kinds of attributes do not count: those that torch or Python own (``FOREIGN_PRIVATES``), those of modules and
    classes from elsewhere, and those of ``self`` that the file itself defines.
    """
    tree = _parsed(path)
    file = _TestFile(tree)
    helpers: dict[str, list[ast.AST]] = defaultdict(list)
    for statement in tree.body:
        for name in _defined(statement):
            helpers[name].append(statement)
    automatic = {name for name, nodes in helpers.items() if any(map(_is_automatic, nodes))}
    private, tests = [], [node for node in ast.walk(tree) if _is_test(node)]
    for test in tests:
        seen, left, nodes = set(automatic), list(automatic), [test]
        while nodes or left:
            node = nodes.pop() if nodes else None
            if node is not None:
                touched = file.first_private(node)
                if touched:
                    private.append((str(getattr(test, "name", "")), touched))
                    break
                left += [name for name in _mentioned(node) if name in helpers and name not in seen]
            else:
                name = left.pop()
                seen.add(name)
                nodes += helpers[name]
    return private, len(tests)


class _TestFile:
    """What the names in one test file stand for."""

    def __init__(self, tree: ast.Module) -> None:
        self.private_names: set[str] = set()
        self.foreign: set[str] = set()
        self.own: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    bound = alias.asname or alias.name.split(".")[0]
                    if _is_private_import(node, alias):
                        # `import pdrs._core` binds `pdrs`, whose attribute `_core` is seen where it is used.
                        self.private_names |= {bound} - {"pdrs"}
                    elif not _imported(node, alias).startswith("pdrs"):
                        self.foreign.add(bound)
            elif isinstance(node, ast.ClassDef):
                self.own |= {name for statement in node.body for name in _defined(statement)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                self.own.add(node.attr)

    def first_private(self, node: ast.AST) -> str:
        """Return the first private of pdrs below a node, or an empty string. Docstrings do not count."""
        documented = {id(each.value) for each in ast.walk(node) if isinstance(each, ast.Expr)}
        nodes = (each for each in ast.walk(node) if id(each) not in documented or not isinstance(each, ast.Constant))
        return next(filter(None, map(self._private, nodes)), "")

    def _private(self, node: ast.AST) -> str:
        found: list[str] = []
        if isinstance(node, ast.Name):
            found = [node.id] if node.id in self.private_names else []
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = [_imported(node, alias) for alias in node.names if _is_private_import(node, alias)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [f"{match[0]} in a text" for match in _IN_TEXT.finditer(node.value)]
        elif isinstance(node, ast.Attribute):
            found = [f".{node.attr}"] if self._is_private(node.attr, node.value) else []
        elif isinstance(node, ast.Call) and node.args and _called(node) in _BY_NAME:
            texts = [str(each.value) for each in node.args if isinstance(each, ast.Constant)]
            found = [f"{text!r}" for text in texts if self._is_private(text, node.args[0])]
        return next(iter(found), "")

    def _is_private(self, attribute: str, of: ast.AST) -> bool:
        if not _PRIVATE.fullmatch(attribute) or attribute in FOREIGN_PRIVATES:
            return False
        if _is_self(of):
            return attribute not in self.own
        while isinstance(of, ast.Attribute):
            of = of.value
        return not (isinstance(of, ast.Name) and of.id in self.foreign)


def _imported(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    return f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name


def _is_private_import(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    return _imported(node, alias).startswith("pdrs._")


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")


def _is_automatic(node: ast.AST) -> bool:
    keywords = [key for each in getattr(node, "decorator_list", ()) for key in getattr(each, "keywords", ())]
    return any(key.arg == "autouse" for key in keywords)


def _decorators(node: ast.AST) -> str:
    return " ".join(ast.unparse(each) for each in getattr(node, "decorator_list", ()))


def _defined(statement: ast.AST) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    targets = [*getattr(statement, "targets", ()), *filter(None, [getattr(statement, "target", None)])]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _mentioned(node: ast.AST) -> set[str]:
    # Fixtures are mentioned as arguments, or by `usefixtures` as texts.
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    found |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    return found | set(re.findall(r"\w+", " ".join(re.findall(r"usefixtures\(([^)]*)\)", _decorators(node)))))


# -- sentences ---------------------------------------------------------------------------------------------------------

_Lines = list[tuple[int, str]]
_ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s+")
_RULE = re.compile(r"[-=~^*_+]{3,}[-=+ ]*")


def long_sentences(path: Path, words: int = LONGEST_SENTENCE) -> list[tuple[int, int, str]]:
    """Return the sentences with more words than allowed: line, number of words, and beginning.

    Of Python only docstrings are read, of Rust only doc comments, of Markdown everything. Code blocks, tables, literal
    blocks and doctests do not count. A heading and an item of a list begin a sentence of their own. A sentence ends at
    ``.``, ``!`` or ``?`` before whitespace, unless that stands in code; words are what whitespace separates.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".py", ".pyi"):
        parts = [(lines, True) for lines in _docstrings(text)]
    elif path.suffix == ".rs":
        parts = [(lines, False) for lines in _doc_comments(text)]
    else:
        without = re.sub(r"<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
        parts = [(list(enumerate(without.splitlines(), 1)), False)]
    found = []
    for lines, is_docstring in parts:
        for paragraph in _paragraphs(lines, is_docstring):
            for line, sentence in _sentences(paragraph):
                if len(sentence) > words:
                    found.append((line, len(sentence), " ".join(sentence[:8])))
    return found


def _docstrings(text: str) -> Iterator[_Lines]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                first, *others = docstring.expandtabs().splitlines()
                margin = min((len(line) - len(line.lstrip()) for line in others if line.strip()), default=0)
                yield list(enumerate([first.lstrip(), *(line[margin:] for line in others)], node.body[0].lineno))


def _doc_comments(text: str) -> Iterator[_Lines]:
    lines: _Lines = []
    for at, line in enumerate([*text.splitlines(), ""], 1):
        found = re.fullmatch(r"\s*//[/!](?!/) ?(.*)", line)
        if found:
            lines.append((at, found[1]))
        elif lines:
            yield lines
            lines = []


def _paragraphs(lines: _Lines, is_docstring: bool) -> Iterator[_Lines]:
    """Split into paragraphs, items and headings, and leave out what is no prose."""
    paragraph: _Lines = []
    indent = 0  # where the text of the paragraph begins
    fence, is_list, is_doctest, literal = "", False, False, -1
    for at, line in [*lines, (0, "")]:
        text = line.strip()
        here = len(line) - len(line.lstrip())
        if fence:
            fence = "" if text.startswith(fence) else fence
            continue
        if not text:
            if is_docstring and paragraph and paragraph[-1][1].endswith(":"):
                literal = indent
            yield from [paragraph] if paragraph else ()
            paragraph, is_doctest = [], False
            continue
        if literal >= 0 and here > literal:
            continue
        literal = -1
        if is_doctest:
            continue
        item = _ITEM.match(text)
        is_list = bool(item) or (is_list and here > 0)
        if text.startswith(("```", "~~~")):
            fence = text[:3]
        elif text.startswith(">>>"):
            is_doctest = True
        elif text.startswith("|") or _RULE.fullmatch(text):
            pass  # a table, or the line below a heading
        elif not is_docstring and not is_list and not paragraph and here >= 4:
            pass  # an indented block of code
        elif item or text.startswith("#") or not paragraph or (is_docstring and here != indent):
            yield from [paragraph] if paragraph else ()
            paragraph, indent = (
                [(at, text[item.end() :] if item else text.lstrip("# "))],
                here + (item.end() if item else 0),
            )
            if text.startswith("#"):
                yield paragraph
                paragraph = []
            continue
        else:
            paragraph.append((at, text.removeprefix("> ")))
            continue
        yield from [paragraph] if paragraph else ()
        paragraph = []


def _sentences(paragraph: _Lines) -> Iterator[tuple[int, list[str]]]:
    words = [(at, word) for at, text in paragraph for word in text.split()]
    sentence: list[str] = []
    begin, in_code = 0, False
    for (at, word), (_, after) in zip(words, [*words[1:], (0, "")], strict=True):
        begin = begin if sentence else at
        sentence.append(word)
        in_code ^= len(re.findall("`+", word)) % 2 == 1
        if not in_code and _is_end(word, after):
            yield begin, sentence
            sentence = []
    if sentence:
        yield begin, sentence


def _is_end(word: str, after: str) -> bool:
    bare = word.rstrip("\"')]*_”")
    if not bare.endswith((".", "!", "?")) or bare.lstrip("\"'([*_").lower() in _ABBREVIATIONS:
        return False
    return not bare.endswith(("...", "etc.")) or not after or not after.lstrip("\"'([*_`")[:1].islower()


# -- the table ---------------------------------------------------------------------------------------------------------


_RIGHT = (False, True, True, False)  # which columns are aligned to the right


@dataclass
class Figure:
    """One figure: what it counts, its value, its bound if it has one, and the places that make it up."""

    name: str
    value: int
    bound: int | None = None
    total: int | None = None
    places: list[str] = field(default_factory=list)
    topic: str = ""
    met: bool = True

    def __post_init__(self) -> None:
        self.met = self.met and (self.bound is None or self.value <= self.bound)

    def cells(self) -> tuple[str, str, str, str]:
        """Return the cells of its row in the table."""
        value = f"{self.value:,}" if self.total is None else f"{self.value:,} of {self.total:,}"
        return self.name, value, "" if self.bound is None else f"{self.bound:,}", "" if self.met else "**no**"


def figures() -> list[Figure]:
    """Return all figures of the code base."""
    code = [*_import_figures(), *_unsafe_figures(), *_python_figures()]
    return [*code, _line_figure(), _test_figure(), *_prose_figures()]


def _import_figures() -> list[Figure]:
    modules, imports = modules_of(PACKAGE), imports_of(PACKAGE)
    found, against, homeless = circles(imports), against_layers(imports), without_layer(modules)
    named = [f"circle: {', '.join(each)}" for each in found]
    forbidden = [each for each in against if (each.source, each.function, each.target) not in ALLOWED]
    places = [f"{'' if each in forbidden else 'allowed: '}{each}" for each in against]
    unknown = [f"no layer: {each}" for each in homeless]
    binding = _files(RUST / "python" / "src", ".rs")
    from_rust = [f"{_name(path)}:{line} imports {name}" for path in binding for line, name in imports_from_rust(path)]
    return [
        Figure("files in import circles", sum(map(len, found)), 0, places=named, topic="imports"),
        Figure("imports against the layer rule", len(against), 1, places=places, topic="imports", met=not forbidden),
        Figure("files without a layer", len(homeless), 0, places=unknown, topic="imports"),
        Figure("places where Rust imports a Python module", len(from_rust), 8, places=from_rust, topic="imports"),
    ]


def _unsafe_figures() -> list[Figure]:
    made = []
    for crate, bounds in (("python", (40, 6)), ("core", (None, None))):
        found = {path: unsafe_blocks(path) for path in _files(RUST / crate / "src", ".rs")}
        places = [f"{_name(path)}: {len(lines)} unsafe blocks" for path, lines in found.items() if lines]
        blocks = sum(map(len, found.values()))
        made.append(Figure(f"blocks `unsafe {{` in rust/{crate}/src", blocks, bounds[0], places=places, topic="unsafe"))
        made.append(Figure(f"files with unsafe blocks in rust/{crate}/src", len(places), bounds[1]))
    return made


def _python_figures() -> list[Figure]:
    ids = [f"{_name(path)}:{line}" for path in _files(PACKAGE, ".py") for line in lines_with_ids(path)]
    lengths = sorted(class_lengths(PACKAGE).items(), key=lambda pair: -pair[1][0])
    places = [f"{length} lines: {' > '.join(ladder)}" for _, (length, ladder) in lengths[:10]]
    longest, (length, ladder) = lengths[0]
    name = f"lines of {longest.rpartition('.')[2]}, the longest class, with {len(ladder) - 1} bases"
    return [
        Figure("lines of Python that take an id of a row apart", len(ids), 0, places=ids, topic="ids"),
        Figure(name, length, 650, places=places, topic="classes"),
    ]


def _line_figure() -> Figure:
    sources = [(PACKAGE, ".py"), (RUST / "core" / "src", ".rs"), (RUST / "python" / "src", ".rs")]
    files = {folder: _files(folder, suffix) for folder, suffix in sources}
    counts = {folder: sum(len(path.read_text("utf-8").splitlines()) for path in files[folder]) for folder in files}
    places = [f"{_name(folder)}: {count:,} lines" for folder, count in counts.items()]
    return Figure("lines of *.py and *.rs without tests", sum(counts.values()), 20_500, places=places, topic="lines")


def _test_figure() -> Figure:
    found, total = [], 0
    for path in _files(ROOT / "tests", ".py"):
        if path.name == "test_shape.py":
            continue  # Its texts are examples for this file, and never run.
        private, count = private_tests(path)
        found += [f"{_name(path)}::{name}: {touched}" for name, touched in private]
        total += count
    return Figure("tests that touch privates", len(found), 60, total, found, "tests")


def _prose_figures() -> list[Figure]:
    sources = {
        "README.md and docs": [ROOT / "README.md", *_files(ROOT / "docs", ".md")],
        "docstrings of Python and its stubs": [*_files(PACKAGE, ".py"), *_files(PACKAGE, ".pyi")],
        "doc comments of Rust": [path for crate in ("core", "python") for path in _files(RUST / crate / "src", ".rs")],
    }
    made = []
    for name, paths in sources.items():
        found = [(path, *sentence) for path in paths for sentence in long_sentences(path)]
        places = [f"{_name(path)}:{line}: {words} words: {begin} ..." for path, line, words, begin in found]
        title = f"sentences above {LONGEST_SENTENCE} words in {name}"
        made.append(Figure(title, len(places), 0, places=places, topic="sentences"))
    return made


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*{suffix}"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or the places behind some figures; return 1 if ``--strict`` finds a bound that is not met."""
    made = figures()
    parser = argparse.ArgumentParser(description="Print the figures of this code base's structure.")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bound is not met")
    for topic in dict.fromkeys(figure.topic for figure in made if figure.topic):
        parser.add_argument(f"--{topic}", action="store_true", help=f"list the places behind the figures of {topic}")
    given = vars(parser.parse_args(arguments))
    listed = [figure for figure in made if given.get(figure.topic)]
    for figure in listed:
        print(*figure.places, sep="\n", end="\n" if figure.places else "")
    if not listed:
        rows = [("figure", "value", "bound", ""), *(figure.cells() for figure in made)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = ["-" * (width - right) + ":" * right for width, right in zip(widths, _RIGHT, strict=True)]
        for row in [rows[0], line, *rows[1:]]:
            cells = zip(row, widths, _RIGHT, strict=True)
            print(
                "|", " | ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells), "|"
            )
    return int(given["strict"] and not all(figure.met for figure in made))


if __name__ == "__main__":
    sys.exit(main())
