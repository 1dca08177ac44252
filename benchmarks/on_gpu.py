"""Run on a GPU what needs one: the tests marked ``gpu``, then the suite ``gpu`` of the benchmarks; for ``make gpu``.

It takes eight minutes at most. Where there is no GPU it says so, and that is no error. It uses the torch of the Python
that runs it. pdrs, and what the tests need, are taken from that Python too, or else from the wheels that ``make
wheelhouse`` has put into ``dist`` on another machine: nothing is fetched and nothing is compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "dist"
INSTALLED = ROOT / "target" / "on_gpu"
NEEDED = ("pdrs", "pytest", "pytest_timeout", "hypothesis", "tqdm")
OLDEST_TORCH = (2, 10)

# Of the eight minutes, the rest is for starting, and for the case that runs when the time for measuring is over.
TEST_SECONDS = 200
MEASURE_SECONDS = 150
KILL_SECONDS = 260

TESTS = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/moves/test_gpu.py"]
MEASURE = ["benchmarks/run.py", "--suite", "gpu", "--sizes", "1000,10000,100000,1000000", "--repeats", "3"]
MEASURE += ["--seconds", str(MEASURE_SECONDS), "--output", "benchmarks/results"]


def main() -> int:
    """Return the exit status: 0 if all passed and was measured, or if there is no GPU."""
    missing = why_not()
    if missing is not None:
        message, status = missing
        print(message, file=sys.stderr if status else sys.stdout)
        return status
    environment = dict(os.environ)
    if any(find_spec(module) is None for module in NEEDED):
        if not list(WHEELS.glob("pdrs_torch-*.whl")):
            print(f"pdrs is not installed: run `make wheelhouse PYTHON=...` elsewhere, and bring {WHEELS.name}/ here")
            return 1
        install()
        environment["PYTHONPATH"] = str(INSTALLED)
    tested = run([sys.executable, *TESTS], environment, TEST_SECONDS)
    measured = run([sys.executable, *MEASURE], environment, KILL_SECONDS)
    return tested or measured


def why_not() -> tuple[str, int] | None:
    """Say why nothing can be run here, and whether that is an error; None if it can."""
    if find_spec("torch") is None:
        if shutil.which("nvidia-smi") is None:
            return "No CUDA device, and no torch: nothing to run.", 0
        return f"There may be a CUDA device, but {sys.executable} has no torch.", 1
    import torch

    from machine import gpu

    if gpu() is None:
        return "No CUDA device: nothing to run.", 0
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old: pdrs needs 2.10 or later.", 1
    return None


def install() -> None:
    """Put what was carried in beside the torch that is there."""
    shutil.rmtree(INSTALLED, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(INSTALLED)]
    subprocess.run([*command, *sorted(map(str, WHEELS.glob("*.whl")))], check=True, cwd=ROOT)


def run(command: list[str], environment: dict[str, str], seconds: int) -> int:
    """Run a command for so long at most, and return its exit status."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds} seconds: {' '.join(command)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
