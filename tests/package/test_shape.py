"""The checker of the structure, ``tools/shape.py``, on small packages.

The bugs that this hunts: a checker that finds nothing because it reads nothing; one that misses what a function
imports, or counts what only a type checker imports; a count that a comment, a code block or a long list raises.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import shape
from shape import against_layers, circles, imports_of, long_sentences, modules_of, private_tests, without_layer


def package(folder: Path, texts: dict[str, str]) -> Path:
    """Write a package ``pdrs`` with a file for each text."""
    root = folder / "pdrs"
    for name, text in {"__init__": "", **texts}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- imports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("import pdrs.b", ""),
        ("from pdrs import b", ""),
        ("from pdrs.b import name, other", ""),
        ("from . import b", ""),
        ("from .b import name", ""),
        ("def late():\n    from pdrs import b", "late"),
        ("class Late:\n    async def call(self):\n        import pdrs.b", "Late.call"),
        ("class Early:\n    import pdrs.b", ""),
        ("import importlib\nlate = lambda: importlib.import_module('pdrs.b')", ""),
        ("try:\n    import pdrs.b\nexcept ImportError: ...", ""),
        ("if TYPE_CHECKING: ...\nelse:\n    import pdrs.b", ""),
        ("if not TYPE_CHECKING:\n    import pdrs.b", ""),
    ],
)
def test_an_import_is_seen_however_it_is_written(tmp_path: Path, text: str, function: str) -> None:
    (found,) = imports_of(package(tmp_path, {"a": text, "b": ""}))
    assert (found.source, found.function, found.target) == ("pdrs.a", function, "pdrs.b")


@pytest.mark.parametrize(
    "text",
    [
        "import os, torch",
        "if TYPE_CHECKING:\n    from pdrs import b",
        "if typing.TYPE_CHECKING:\n    import pdrs.b",
        "def late():\n    if TYPE_CHECKING:\n        import pdrs.b",
        "if not TYPE_CHECKING: ...\nelse:\n    import pdrs.b",
        "'import pdrs.b'  # import pdrs.b",
    ],
)
def test_what_never_imports_a_module_of_the_package_is_no_import(tmp_path: Path, text: str) -> None:
    assert imports_of(package(tmp_path, {"a": text, "b": ""})) == []


def test_relative_imports_start_at_the_package_of_the_file(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {"_rows/__init__": "from .store import x", "_rows/store": "from .. import _names", "_names": "", "store": ""},
    )
    found = {(each.source, each.target) for each in imports_of(root)}
    assert found == {("pdrs._rows", "pdrs._rows.store"), ("pdrs._rows.store", "pdrs._names")}


def test_a_circle_of_three_files_is_found_though_one_import_is_late(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {
            "a": "from pdrs import b",
            "b": "def late():\n    from pdrs.c import x",
            "c": "from pdrs import a",
            "d": "from pdrs import a",
        },
    )
    assert circles(imports_of(root)) == [["pdrs.a", "pdrs.b", "pdrs.c"]]


def test_two_circles_that_one_import_joins_remain_two(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {
            "a": "import pdrs.b, pdrs.c",
            "b": "import pdrs.a",
            "c": "import pdrs.d",
            "d": "import pdrs.c",
            "e": "import pdrs.a",
        },
    )
    assert circles(imports_of(root)) == [["pdrs.a", "pdrs.b"], ["pdrs.c", "pdrs.d"]]


def test_imports_without_a_circle_have_none(tmp_path: Path) -> None:
    root = package(
        tmp_path, {"a": "import pdrs.b, pdrs.c", "b": "import pdrs.c", "c": "if TYPE_CHECKING: import pdrs.a"}
    )
    assert circles(imports_of(root)) == []


STACK = "class ParameterDict:\n    def {}(self):\n        from pdrs.stacked import x"


def test_stack_alone_may_import_the_stacked_dictionary_late(tmp_path: Path) -> None:
    allowed = package(
        tmp_path / "a", {"parameter_dict": STACK.format("stack"), "stacked": "from pdrs.parameter_dict import x"}
    )
    assert circles(imports_of(allowed)) == []
    (found,) = against_layers(imports_of(allowed))
    assert (found.source, found.function, found.target) in shape.ALLOWED
    other = package(
        tmp_path / "b", {"parameter_dict": STACK.format("copy"), "stacked": "from pdrs.parameter_dict import x"}
    )
    assert circles(imports_of(other)) == [["pdrs.parameter_dict", "pdrs.stacked"]]
    (found,) = against_layers(imports_of(other))
    assert (found.source, found.function, found.target) not in shape.ALLOWED


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("_torch/modes", "_rows/store"),
        ("_rows/store", "stacked"),
        ("_rows/store", "_moves/run"),  # of one layer
        ("_entries/views", "_rows/store"),
        ("_torch/names", "_pickle"),
        ("_pickle", "_entries/copy"),
        ("transfer", "parameter_dict"),
        ("stacked", "_files/open"),
        ("_files/cli", "checkpoint"),
        ("checkpoint", "__init__"),
    ],
)
def test_an_import_upward_is_found_early_and_late(tmp_path: Path, source: str, target: str) -> None:
    imported = "pdrs" if target == "__init__" else f"pdrs.{target.replace('/', '.')}"
    early = package(tmp_path / "early", {target: "", source: f"from {imported} import x"})
    late = package(tmp_path / "late", {target: "", source: f"def late():\n    from {imported} import x"})
    for root, function in ((early, ""), (late, "late")):
        (found,) = against_layers(imports_of(root))
        assert (found.function, found.target) == (function, imported)


def test_imports_downward_and_inside_a_package_obey_the_rule(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {
            "__init__": "from pdrs import checkpoint, stacked",
            "__main__": "from pdrs import checkpoint\nimport pdrs",
            "checkpoint": "from pdrs import stacked\nfrom pdrs._torch import names\nfrom pdrs._files import open",
            "_files/open": "from pdrs._files import formats\nfrom pdrs import stacked",
            "_files/formats": "",
            "stacked": "from pdrs import _pickle, parameter_dict, transfer",
            "parameter_dict": "from pdrs import transfer",
            "transfer": "from pdrs import _core",
            "_pickle": "from pdrs._torch import modes",
            "_torch/modes": "import pdrs._core",
            "_torch/names": "",
            "_core": "",
        },
    )
    found = imports_of(root)
    assert len(found) == 16
    assert (against_layers(found), circles(found), without_layer(modules_of(root))) == ([], [], [])


def test_a_file_that_the_rule_does_not_know_is_found(tmp_path: Path) -> None:
    root = package(tmp_path, {"_rows/store": "", "_new/file": "", "other": ""})
    assert without_layer(modules_of(root)) == ["pdrs._new.file", "pdrs.other"]


# -- other figures -----------------------------------------------------------------------------------------------------


def test_a_class_counts_with_its_bases_in_other_files_each_once(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {
            "a": "class Base:\n    x = 1\n\nclass Left(Base):\n    x = 1\n",
            "b": "import dict\nfrom pdrs.a import Base as B, Left\nfrom pdrs import a\nclass Right(a.Base): ...\n"
            "@final\nclass Both(Left, Right, B, dict):\n    y = 1\n    z = 1\n",
        },
    )
    lengths = {name.removeprefix("pdrs."): lines for name, (lines, _) in shape.class_lengths(root).items()}
    assert lengths == {"a.Base": 2, "a.Left": 4, "b.Right": 3, "b.Both": 9}


def test_only_code_that_takes_an_id_apart_counts(tmp_path: Path) -> None:
    text = (
        '"""Not id >> 40, nor row_of."""\nx = a >> 40  # 1 << 40\nx <<= 40\nx = row_of(a) + table_of(a)\nx = a >> 4\n'
    )
    assert shape.lines_with_ids(written(tmp_path, "a.py", text)) == [2, 3, 4]


def test_only_blocks_of_unsafe_code_count(tmp_path: Path) -> None:
    text = """// unsafe { a }
    /* unsafe { b } */ fn c<'a>(d: &'a str) -> char { unsafe { e('"') } }
    unsafe fn f() {}
    unsafe impl Send for G {}
    #[allow(unsafe_code)] fn h() { let i = "unsafe { \\" "; unsafe
    { j }; let k = r#"unsafe { " "#; unsafe { l } }"""
    assert shape.unsafe_blocks(written(tmp_path, "a.rs", text)) == [2, 5, 6]


def test_imports_of_python_modules_are_found_in_rust(tmp_path: Path) -> None:
    text = (
        'py.import("torch")?;\nLISTED.import(names.py(), "pdrs._names", "listed")?;\n#[pyclass(module = "pdrs._core")]'
    )
    assert shape.imports_from_rust(written(tmp_path, "a.rs", text)) == [(2, "pdrs._names")]


@pytest.mark.parametrize(
    "text",
    [
        "from pdrs._core import Lock\ndef test_it(): Lock()",
        "from pdrs import _memory as memory\ndef test_it(): memory.free()",
        "import pdrs\ndef test_it(): pdrs._core.Lock()",
        "def test_it():\n    from pdrs import _core",
        "def test_it(sd): sd._tables",
        "import pdrs\ndef test_it(): pdrs.StackedParameterDict._move",
        "def test_it(sd): getattr(sd, '_tables')",
        "def test_it(monkeypatch): monkeypatch.setattr('pdrs._files.open', 1)",
        "def test_it(): run('from pdrs import _core')",
        "def helper(sd): return sd._tables\ndef other(sd): helper(sd)\nCASES = [other]\ndef test_it(): CASES[0]()",
        "def helper(sd): return sd._tables\n@parametrize(helper)\ndef test_it(): ...",
        "@pytest.fixture\ndef given(): return sd._tables\ndef test_it(given): ...",
        "@pytest.fixture\ndef given(): return sd._tables\n@pytest.mark.usefixtures('given')\ndef test_it(): ...",
        "@pytest.fixture(autouse=True)\ndef given(): return sd._tables\ndef test_it(): ...",
        "class Machine(SD):\n    def run(self): self._tables\ndef test_it(): Machine()",
    ],
)
def test_a_test_that_touches_a_private_is_found(tmp_path: Path, text: str) -> None:
    found, count = private_tests(written(tmp_path, "test_a.py", text))
    assert ([name for name, _ in found], count) == (["test_it"], 1)


@pytest.mark.parametrize(
    "text",
    [
        "from pdrs._core import Lock\ndef unused(sd): sd._tables\ndef test_it(sd): sd.rows(sd.__len__())",
        "def test_it(pd): assert pd._parameters is pd.a._version",
        "import os, torch\ndef test_it(): torch._C._get(), os._exit(0)",
        "def test_it():\n    '''What pdrs._core does.'''",
        "class Own:\n    def _run(self): self._x = 1\n    def run(self): self._run(), self._x\ndef test_it(): Own()",
    ],
)
def test_a_test_that_touches_none_is_not(tmp_path: Path, text: str) -> None:
    assert private_tests(written(tmp_path, "test_a.py", text)) == ([], 1)


LONG = "one two three four five six."


def test_a_long_sentence_is_found_in_prose_with_its_line(tmp_path: Path) -> None:
    text = f"# A heading of more words\n\nShort. It is: {LONG} Short again,\nbut (not, e.g. this one\nthat is) long.\n"
    found = long_sentences(written(tmp_path, "a.md", text), 5)
    assert found == [
        (3, 8, "It is: one two three four five six."),
        (3, 10, "Short again, but (not, e.g. this one that"),
    ]


def test_code_tables_and_separate_items_make_no_sentence_long(tmp_path: Path) -> None:
    text = f"""Three words:

- one two three
  four five
- one two three four five
1. one two three four five

| {LONG} | {LONG} |
| --- | --- |

    {LONG} is code

```python
{LONG} is code, too
```
<!-- {LONG} {LONG} -->
Some `code.that ends! no? sentence` ... here.
"""
    assert long_sentences(written(tmp_path, "a.md", text), 5) == [
        (17, 7, "Some `code.that ends! no? sentence` ... here.")
    ]


def test_only_docstrings_of_python_are_prose(tmp_path: Path) -> None:
    text = f'''# {LONG}
def function():
    """Do three things.

    {LONG}

    >>> one, two, three, four, five, six
    one two three four five six

    A figure::

        {LONG}

    Parameters
    ----------
    a, b, c, d
        One two three four five.
    e
        One two three
        four five six seven.
    """
    return "{LONG}"
'''
    found = long_sentences(written(tmp_path, "a.py", text), 5)
    assert found == [(5, 6, LONG), (19, 7, "One two three four five six seven.")]


def test_only_doc_comments_of_rust_are_prose(tmp_path: Path) -> None:
    lines = [f"//! {LONG}", "", f"// {LONG}", f"//// {LONG}", "/// One two three", "/// four five six."]
    text = "\n".join([*lines, "/// ```", f"/// {LONG}", "/// ```", "fn a() {}"])
    found = long_sentences(written(tmp_path, "a.rs", text), 5)
    assert found == [(1, 6, LONG), (5, 6, "One two three four five six.")]


def test_strict_fails_if_a_bound_is_not_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    met = [shape.Figure("without a bound", 7), shape.Figure("within", 3, 3)]
    monkeypatch.setattr(shape, "figures", lambda: met)
    assert (shape.main([]), shape.main(["--strict"])) == (0, 0)
    assert "**no**" not in capsys.readouterr().out
    monkeypatch.setattr(
        shape, "figures", lambda: [*met, shape.Figure("above", 4, 3, total=9, places=["here"], topic="x")]
    )
    assert (shape.main([]), shape.main(["--strict"])) == (0, 1)
    assert "| above           | 4 of 9 |     3 | **no** |" in capsys.readouterr().out
    assert shape.main(["--x"]) == 0
    assert capsys.readouterr().out == "here\n"


# -- this code base ----------------------------------------------------------------------------------------------------


def test_no_files_of_pdrs_import_each_other_in_a_circle() -> None:
    found = imports_of(shape.PACKAGE)
    assert len(found) > 100
    assert circles(found) == []


def test_only_the_allowed_imports_of_pdrs_are_against_the_layer_rule() -> None:
    found = {(each.source, each.function, each.target) for each in against_layers(imports_of(shape.PACKAGE))}
    assert found == shape.ALLOWED


def test_the_layer_rule_knows_the_files_of_pdrs_and_no_others() -> None:
    modules = modules_of(shape.PACKAGE)
    assert without_layer(modules) == []
    parts = {name.split(".")[1] for name in modules if "." in name}
    assert {name for names in shape.LAYERS for name in names} == {*parts, "__init__"}
