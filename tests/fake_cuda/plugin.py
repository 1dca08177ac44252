"""The pytest side of the fake CUDA runtime: ``@pytest.mark.cuda`` and the ``fake_cuda`` fixture.

A test marked ``cuda`` runs as it is on a machine with a GPU. Elsewhere it runs in a second pytest process under the
fake runtime, which sends back its reports, so that it is selected, counted and shown like any other test. All tests
with the same marker arguments share one such process, since starting torch takes seconds. When a test kills the process
it is reported as failed with what the process printed, and the rest go on in a new one.

The ``fake_cuda`` fixture is the :class:`~fake_cuda.control.Control` of the runtime; a test that takes it needs the fake
runtime's switches and is skipped on a GPU.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_cuda import control, run
from fake_cuda.build import CannotBuildError

REPORTS = "FAKE_CUDA_REPORTS"
"""Names the file into which the second process writes its reports, one JSON object a line."""
SECONDS_A_TEST = 60
_reports = pytest.StashKey[dict[str, list[pytest.TestReport]]]()
_sent_away = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Explain the marker to pytest."""
    config.addinivalue_line(
        "markers",
        "cuda(devices=1, memory_mb=None, variables=None): needs CUDA: a GPU, or else the fake runtime in a process "
        "that is started with these switches",
    )
    config.stash[_reports] = {}


@pytest.fixture
def fake_cuda() -> control.Control:
    """Give the switches and counters of the fake runtime. `_as_new` resets them."""
    if not control.inside():
        pytest.skip("needs the switches of the fake CUDA runtime, which a GPU does not have")
    return control.Control()


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    """Fail a test whose streams raced or that left memory behind, and leave nothing of it to the next one."""
    if not control.inside():
        yield
        return
    import torch

    runtime = control.Control()
    runtime.reset()
    initialized = torch.cuda.is_initialized()
    before = {at: torch.cuda.memory_allocated(at) for at in range(torch.cuda.device_count()) if initialized}
    yield
    races = runtime.take_races()
    gc.collect()
    runtime.reset()
    left = {}
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
            left[device] = torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
    more = {device: size for device, size in left.items() if size > before.get(device, 0)}
    if more:
        pytest.fail(f"bytes that this test has left on devices: {more}", pytrace=False)
    if races:
        pytest.fail("\n".join(["streams raced in this test:", *races]), pytrace=False)


# ---- in the first process: send the tests away -----------------------------------------------------------------------


def _needs_fake(item: pytest.Item) -> bool:
    return item.get_closest_marker("cuda") is not None and not control.inside()


def _gpus() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A driver that is too old warns.
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Decide for each test that needs CUDA where it runs, or why it cannot."""
    marked = [item for item in items if _needs_fake(item)]
    if not marked:
        return
    gpus, reason = _gpus(), ""
    if not gpus:
        try:
            run.build()
        except CannotBuildError as error:
            reason = f"no GPU, and no fake one: {error}"
        except RuntimeError as error:
            raise pytest.UsageError(f"the fake CUDA runtime does not compile: {error}") from error
    for item in marked:
        wanted = item.get_closest_marker("cuda").kwargs.get("devices", 1)
        if gpus and wanted > gpus:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPUs, has {gpus}"))
        elif reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif not gpus:
            item.stash[_sent_away] = True
    # First, because pytest sets nothing up for them: between others they would leave what those have set up.
    items.sort(key=lambda item: not item.stash.get(_sent_away, False))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Report a test that ran under the fake runtime; run it and its like first if need be."""
    if not item.stash.get(_sent_away, False):
        return None
    reports = item.config.stash[_reports]
    if item.nodeid not in reports:
        marker = item.get_closest_marker("cuda")
        alike = [
            other
            for other in item.session.items
            if other.stash.get(_sent_away, False) and other.get_closest_marker("cuda").kwargs == marker.kwargs
        ]
        if item.config.pluginmanager.hasplugin("timeout"):  # Its limit is for one test, not for all of them.
            item.ihook.pytest_timeout_cancel_timer(item=item)
        _run_all(item.config, alike, marker.kwargs)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_all(config: pytest.Config, items: list[pytest.Item], switches: dict[str, object]) -> None:
    reports = config.stash[_reports]
    while items:
        known = len(reports)
        output = _run_once(config, items, switches)
        if len(reports) == known:  # No test began: nothing would be better in another process.
            for item in items:
                reports[item.nodeid] = [
                    _failed(item, f"the process under the fake CUDA runtime ran no test:\n{output}")
                ]
            return
        left = [item for item in items if not _is_complete(reports.get(item.nodeid, []))]
        if left:
            died = left[0]
            report = _failed(died, f"the process under the fake CUDA runtime ended in this test:\n{output}")
            reports.setdefault(died.nodeid, []).append(report)
            left = left[1:]
        items = left


def _failed(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call")


def _is_complete(reports: list[pytest.TestReport]) -> bool:
    return any(report.when == "teardown" for report in reports)


def _run_once(config: pytest.Config, items: list[pytest.Item], switches: dict[str, object]) -> str:
    """Run the tests in one process, keep the reports that it sent, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        names, written = Path(folder, "tests"), Path(folder, "reports")
        names.write_text("\n".join(item.nodeid for item in items))
        written.touch()
        command = [sys.executable, "-m", "pytest", f"@{names}", f"--rootdir={config.rootpath}", "--quiet"]
        command += ["-p", "fake_cuda.plugin", "-p", "no:cacheprovider"]
        command += ["-o", f"timeout={SECONDS_A_TEST}", "-o", "timeout_method=thread"]
        if config.inipath is not None:
            command += ["-c", str(config.inipath)]
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = run.environment(**switches)
        environment |= {REPORTS: str(written), "PYTHONPATH": os.pathsep.join(paths)}
        try:
            done = subprocess.run(
                command,
                cwd=config.rootpath,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS_A_TEST * (1 + len(items)),
                check=False,
            )
            output = f"{done.stdout}\nexit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output = f"{error.stdout!r}\nit did not end"
        reports = config.stash[_reports]
        for line in written.read_text().splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if isinstance(report.longrepr, list):  # JSON made it of a tuple: where and why a test was skipped.
                report.longrepr = tuple(report.longrepr)
            reports.setdefault(report.nodeid, []).append(report)
    return output


# ---- in the second process: send the reports back --------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a report where the first process finds it."""
    if REPORTS in os.environ and _config is not None:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")


_config: pytest.Config | None = None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember the configuration, which reports do not carry."""
    global _config
    _config = session.config
