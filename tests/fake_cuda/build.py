"""Builds the fake CUDA runtime for the torch of this Python: ``libcudart.so.13`` and ``libcuda.so.1``.

The C code is compiled against the CUDA headers of torch's own wheels, so that every signature is checked. Functions
that the real libraries have and nobody wrote become stubs that fail and note their name. What was built is kept in
``target/fake_cuda/`` and built again when the sources, the wheels or the flags change.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
CACHE = Path(__file__).parents[2] / "target" / "fake_cuda"
FLAGS = ["-std=c11", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"


class CannotBuildError(RuntimeError):
    """The fake runtime cannot be built here; the message is the reason to skip tests with."""


def build() -> Path:
    """Build both libraries unless they are there already. Safe when several processes do it at once.

    Returns
    -------
    Path
        The folder that holds them.

    Raises
    ------
    CannotBuildError
        When this is not Linux, torch's CUDA 13 wheels are not installed, or there is no C compiler.
    """
    if sys.platform != "linux":
        raise CannotBuildError("the fake CUDA runtime is for Linux only")
    wheels = cuda_wheels()
    compiler, names = _tool(os.environ.get("CC", "cc")), _tool("nm")
    folder = CACHE / _key(compiler, wheels)
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="building-", dir=CACHE))
    try:
        _compile(compiler, names, wheels, scratch)
        try:
            scratch.rename(folder)
        except OSError:  # Another process was faster; both built the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # Does not import it, which takes seconds.
    if spec is None or spec.origin is None:
        raise CannotBuildError("torch is not installed")
    return Path(spec.origin).parent


def build_stress(folder: Path, *flags: str) -> Path:
    """Compile ``stress.c`` and the runtime into one program, with these flags more, and return it."""
    compiler = _tool(os.environ.get("CC", "cc"))
    sources = [SOURCES.parent / "stress.c", *_runtime_sources()]
    program = folder / "stress"
    _run(compiler, *FLAGS, *flags, *_includes(cuda_wheels()), *sources, "-o", program, "-lpthread", "-ldl")
    return program


@functools.cache
def cuda_wheels() -> Path:
    """Return the folder with the ``include`` and ``lib`` of the CUDA that torch brought.

    Raises
    ------
    CannotBuildError
        When torch is missing, is built without CUDA, or for another major version of CUDA.
    """
    text = (_torch() / "version.py").read_text()
    version = re.search(r"^cuda.*= '([\d.]+)'", text, re.MULTILINE)
    if version is None:
        raise CannotBuildError("this torch is built without CUDA; the fake CUDA runtime needs torch's CUDA 13 wheel")
    if version[1].split(".")[0] != "13":
        raise CannotBuildError(f"this torch is built for CUDA {version[1]}; the fake CUDA runtime imitates CUDA 13")
    folder = _torch().parent / "nvidia" / "cu13"
    for needed in ("include/cuda_runtime_api.h", f"lib/{RUNTIME}"):
        if not (folder / needed).is_file():
            raise CannotBuildError(f"torch's CUDA wheels lack {needed}")
    return folder


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise CannotBuildError(f"{name} is missing: the fake CUDA runtime needs a C compiler with binutils")
    return path


def _key(compiler: str, wheels: Path) -> str:
    digest = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    for path in [Path(__file__), *sorted(path for path in SOURCES.rglob("*") if path.is_file())]:
        digest.update(path.read_bytes())
    library = (wheels / "lib" / RUNTIME).stat()
    digest.update(f"{wheels} {library.st_size} {library.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def _symbols(*command: str | Path) -> set[str]:
    lines = _run(*command).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.split()[-2] in "TU"}


def _includes(wheels: Path) -> list[str | Path]:
    return ["-isystem", SOURCES / "include", "-isystem", wheels / "include"]


def _runtime_sources() -> list[Path]:
    return sorted(path for path in SOURCES.glob("*.c") if path.name != "driver.c")


def _compile(compiler: str, names: str, wheels: Path, folder: Path) -> None:
    _run(compiler, *FLAGS, *_includes(wheels), "-c", *_runtime_sources(), cwd=folder)
    objects = sorted(folder.glob("*.o"))
    script = folder / "versions.map"  # torch asks for the functions by this version.
    script.write_text(f"{RUNTIME} {{ global: *; }};\n")
    link = ["-shared", f"-Wl,--version-script={script}", f"-Wl,-soname,{RUNTIME}", "-lpthread", "-ldl"]
    written = {symbol for library in objects for symbol in _symbols(names, library, "--defined-only")}
    exported = _symbols(names, "-D", wheels / "lib" / RUNTIME, "--defined-only")
    stubs = _write_stubs(folder / "stubs.c", exported - written)
    _run(compiler, *FLAGS, *objects, stubs, "-o", folder / RUNTIME, *link)

    # torch looks functions up by the names of the header; its libcaffe2_nvrtc is linked to versioned names besides.
    header = (wheels / "include" / "cuda.h").read_text()
    linked = _symbols(names, "-D", _torch() / "lib" / "libcaffe2_nvrtc.so", "--undefined-only")
    asked = {name for name in linked if re.match(r"cu[A-Z]", name)} | set(re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", header))
    driver = SOURCES / "driver.c"
    written = set(re.findall(r"^EXPORT \w+ (\w+)\(", driver.read_text(), re.MULTILINE))
    stubs = _write_stubs(folder / "driver_stubs.c", asked - written)
    _run(compiler, *FLAGS, driver, stubs, "-o", folder / DRIVER, "-shared", f"-Wl,-soname,{DRIVER}", folder / RUNTIME)


def _write_stubs(path: Path, names: set[str]) -> Path:
    lines = [
        "/* Functions of the real library that the fake one lacks. 801: cudaErrorNotSupported. */",
        "void fake_cuda_note_unsupported(const char *what);",
        "#define STUB(name) \\",
        '    __attribute__((visibility("default"))) int name(void); \\',
        "    int name(void) { fake_cuda_note_unsupported(#name); return 801; }",
        *(f"STUB({name})" for name in sorted(names)),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    print(build())
