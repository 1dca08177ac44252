"""The fake CUDA runtime is built where it can be, says why where it cannot, and its pytest plugin loses no result.

The bugs that this hunts: a test that passes because it never ran; a crash that takes other tests' results with it; a
half built library that another process loads; a data race inside the runtime, so that tests fail by chance.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fake_cuda import build

try:
    build.build()
except build.CannotBuildError as error:
    REASON = str(error)
else:
    REASON = ""

needs_build = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.mark.slow
@needs_build
def test_processes_that_build_at_once_get_the_same_folder(tmp_path):
    code = "import sys, pathlib; import fake_cuda.build as b; b.CACHE = pathlib.Path(sys.argv[1]); print(b.build())"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert folders[0] == folders[1]
    assert {build.RUNTIME, build.DRIVER} <= {path.name for path in Path(folders[0]).iterdir()}
    assert list(tmp_path.iterdir()) == [Path(folders[0])]  # Nothing half built is left.


def test_torch_without_cuda_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.15.0+cpu'\ncuda: Optional[str] = None\n")
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    build.cuda_wheels.cache_clear()
    with pytest.raises(build.CannotBuildError, match="built without CUDA"):
        build.build()


def test_torch_for_another_cuda_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    build.cuda_wheels.cache_clear()
    with pytest.raises(build.CannotBuildError, match=r"12\.8.*imitates CUDA 13"):
        build.build()


@needs_build
def test_missing_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.CannotBuildError, match="no-such-compiler is missing"):
        build.build()


def test_other_systems_are_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(build.CannotBuildError, match="Linux"):
        build.build()


@pytest.mark.slow
@needs_build
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_many_threads_use_the_runtime_without_a_race(tmp_path, sanitizer):
    try:
        program = build.build_stress(tmp_path, "-O1", f"-fsanitize={sanitizer}")
    except RuntimeError as error:
        pytest.skip(f"the compiler cannot build with -fsanitize={sanitizer}: {str(error)[-200:]}")
    environment = {**os.environ, "FAKE_CUDA_DEVICES": "2", "FAKE_CUDA_MEMORY_MB": "64"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


TESTS = """
import ctypes, os, pytest, torch

pytestmark = pytest.mark.cuda

def test_that_passes():
    assert torch.ones(2).cuda().is_cuda

def test_that_fails():
    assert torch.ones(2).cuda().cpu().sum() == 3

@pytest.mark.skip(reason="because")
def test_that_is_skipped():
    pass

def test_that_kills_the_process():
    print("last words", flush=True)
    ctypes.string_at(torch.ones(2).cuda().data_ptr())

@pytest.mark.parametrize("word", ["a b", "c"])
def test_after_it(word):
    assert torch.ones(2).cuda().is_cuda
"""


@pytest.mark.slow
@needs_build
def test_every_test_is_reported_as_what_it_was(tmp_path):
    (tmp_path / "test_inner.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "fake_cuda.plugin", "-rA", "test_inner.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    summary = done.stdout.partition("short test summary")[2]
    assert "2 failed, 3 passed, 1 skipped" in summary, done.stdout
    assert "PASSED test_inner.py::test_that_passes" in summary
    assert "PASSED test_inner.py::test_after_it[a b]" in summary
    assert "FAILED test_inner.py::test_that_fails - assert tensor(2.)" in summary
    assert "FAILED test_inner.py::test_that_kills_the_process" in summary
    assert re.search(r"SKIPPED \[1\] test_inner.py:\d+: because", summary)
    assert "Segmentation fault" in done.stdout  # What the process printed when it died.
