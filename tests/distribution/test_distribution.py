"""What users install: the wheel, the source distribution, and the text on the package page.

The bugs that this hunts: a file that the wheel lacks, so that pdrs works only beside its sources; a source
distribution that does not build; a distribution whose version cannot be found under its name; a link or a picture that
works on GitHub and is broken on the package page.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

import pytest

F = TypeVar("F", bound=Callable[..., Any])

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
REPOSITORY = "https://github.com/pdrs-torch/pdrs"
RAW = "https://raw.githubusercontent.com/pdrs-torch/pdrs"
MATURIN = Path(sys.executable).with_name("maturin")


def builds(test: F) -> F:
    """Mark a test that may compile everything."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("sdist", tmp_path_factory.mktemp("sdist"))


def made(target: str, folder: Path) -> Path:
    """Let ``make`` build something for this Python, and return the one file that it wrote."""
    chosen = [f"PYTHON={sys.executable}", f"MATURIN={MATURIN}", f"DIST={folder}"]
    subprocess.run(["make", target, *chosen], cwd=ROOT, check=True)
    (file,) = folder.iterdir()
    return file


def metadata_of(file: Path) -> Message:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(archive.read(name))
    with tarfile.open(file) as archive:
        (name,) = (name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        content = archive.extractfile(name)
        assert content is not None
        return email.message_from_binary_file(content)


def install_and_use(file: Path, folder: Path) -> str:
    """Install a file into a new environment, use it there, and return what the program says.

    The environment sees torch and maturin of this one, but not its pdrs: a ``.pth`` file in a folder that is on the
    path because of another ``.pth`` file has no effect.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join((str(MATURIN.parent), environment["PATH"]))
    # Quick to compile: this is about what is in the file. All anew, because cargo compares times, and those are old.
    environment |= {"CARGO_PROFILE_RELEASE_LTO": "off", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16"}
    environment |= {"CARGO_PROFILE_RELEASE_OPT_LEVEL": "0", "CARGO_TARGET_DIR": str(folder / "target")}
    flags = ["--quiet", "--ignore-installed", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([python, "-m", "pip", "install", *flags, file], cwd=folder, env=environment, check=True)
    return subprocess.run(
        [python, SMOKE], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@builds
def test_the_wheel_works_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    assert install_and_use(wheel, tmp_path / "venv").startswith("pdrs-torch 0.")


@builds
def test_the_source_distribution_builds_and_works(sdist: Path, tmp_path: Path) -> None:
    assert install_and_use(sdist, tmp_path / "venv").startswith("pdrs-torch 0.")


@builds
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_package_page_says_who_what_and_where(kind: str, request: pytest.FixtureRequest) -> None:
    metadata = metadata_of(request.getfixturevalue(kind))
    assert metadata["Name"] == "pdrs-torch"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "The pdrs contributors"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert urls["Repository"] == REPOSITORY
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    description = metadata.get_payload()
    assert isinstance(description, str)
    assert links(description)
    assert not relative(description)


def links(text: str) -> list[str]:
    """Return where the links and pictures of a Markdown text lead, outside of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    html = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", text)
    return inline + html + re.findall(r"^\[[^\]]+\]:\s*<?([^\s>]+)", text, flags=re.MULTILINE)


def relative(text: str) -> list[str]:
    """Return the links that lead nowhere from a package page."""
    return [link for link in links(text) if not link.startswith(("https://", "#"))]


@pytest.mark.parametrize(
    "text", ["[a](docs/a.md)", "![a](a.png)", "[a][b]\n\n[b]: docs/b.md", '<img src="a.png">', "[a](http://a.org)"]
)
def test_relative_links_are_found(text: str) -> None:
    assert relative(text)


def test_links_to_the_repository_lead_to_files_that_are_there() -> None:
    found = 0
    for link in links((ROOT / "README.md").read_text(encoding="utf-8")):
        for start in (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/", f"{RAW}/main/"):
            if link.startswith(start):
                found += 1
                assert (ROOT / link.removeprefix(start).partition("#")[0]).exists(), link
    assert found > 10


def test_reference_links_have_a_definition() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"^\[([^\]]+)\]:", text, flags=re.MULTILINE))
    used = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert used == defined
