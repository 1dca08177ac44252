"""Progress bars while checksums are compared: on a terminal, for what takes long, and nowhere else.

The bugs that this hunts: a bar that begins again for each tensor, or stands still over the many small ones; one that
stops before the end or counts a byte twice; one that is left on the screen after an error; a bar in a pipe.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pdrs
from console import run

LARGE = 20_000_000  # floats of the one large tensor: less than 64 MB is read without a bar


class Bar:
    """Stands for ``tqdm``, and keeps what it was told."""

    all: list[Bar]

    def __init__(self, *, total: int, desc: str, delay: float, **_: Any) -> None:
        self.total, self.what, self.counts, self.is_closed = total, desc, [], False
        assert delay >= 1, "what is done soon has no bar"
        Bar.all.append(self)

    def update(self, count: int) -> None:
        assert not self.is_closed
        self.counts.append(count)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    tqdm = pytest.importorskip("tqdm", reason="bars need tqdm")
    monkeypatch.setattr(Bar, "all", [], raising=False)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    # Of the class: pytest puts another object there for each phase of a test.
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    return Bar.all


def model(large: int = LARGE) -> nn.Module:
    layers = nn.ModuleList([nn.Linear(30, 30) for _ in range(20)])
    table = pdrs.StackedParameterDict.from_tensor(["a", "b"], torch.ones(2, large // 2))
    return nn.ModuleDict({"layers": layers, "table": table})


def saved(folder: Path, large: int = LARGE) -> Path:
    """Save an archive, most of whose tensors are too small for a bar of their own."""
    path = folder / "model.safetensors"
    pdrs.save(model(large), path)
    return path


def values(path: Path) -> int:
    return sum(tensor.nbytes for tensor in pdrs.open(path).values())


def test_a_save_counts_what_it_writes(bars: list[Bar], tmp_path: Path) -> None:
    path = saved(tmp_path)
    (bar,) = bars
    assert (bar.what, bar.is_closed) == ("model.safetensors", True)
    assert sum(bar.counts) == bar.total == path.stat().st_size
    assert len(bar.counts) > 20


@pytest.mark.parametrize("device", [None, "cpu"])
def test_one_bar_counts_all_that_is_verified(bars: list[Bar], tmp_path: Path, device: str | None) -> None:
    path = saved(tmp_path)
    bars.clear()
    pdrs.open(path, verify=True, device=device)
    bar, *others = bars
    assert bar.what == "model.safetensors"
    assert bar.is_closed
    assert values(path) < sum(bar.counts) <= bar.total == path.stat().st_size
    assert len(bar.counts) >= 41
    assert not others, "what was read to be verified is not read again"


def test_load_verifies_with_a_bar_of_the_whole_file(bars: list[Bar], tmp_path: Path) -> None:
    path = saved(tmp_path)
    bars.clear()
    pdrs.load(path, model(), verify=True)
    assert [bar.total for bar in bars] == [path.stat().st_size]
    assert bars[0].is_closed


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_the_command_line_shows_a_bar(bars: list[Bar], tmp_path: Path, command: str) -> None:
    path = saved(tmp_path)
    bars.clear()
    assert run([command, path]) == 0
    assert [bar.total for bar in bars] == [path.stat().st_size]


def test_each_file_of_a_chain_and_what_follows_from_it_is_counted(bars: list[Bar], tmp_path: Path) -> None:
    path, delta = saved(tmp_path), tmp_path / "delta.safetensors"
    changed = model()
    pdrs.load(path, changed)
    with torch.no_grad():
        for layer in changed["layers"]:
            layer.weight.add_(1)
        changed["table"]["a"].fill_(3)
    pdrs.save(changed, delta, since=path)
    bars.clear()
    pdrs.open(delta, verify=True)
    assert [bar.what for bar in bars] == ["model.safetensors", delta.name, delta.name]
    assert all(bar.is_closed for bar in bars)
    assert values(path) < sum(bars[-1].counts) <= bars[-1].total


def test_files_of_torch_are_counted_record_by_record(bars: list[Bar], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(float(LARGE)), "b": torch.ones(3)}, path)
    pdrs.open(path, verify=True)
    (bar,) = bars
    assert bar.what == "model.pt"
    assert bar.is_closed
    assert LARGE * 4 + 12 < sum(bar.counts) == bar.total


def test_the_bar_goes_when_damage_is_found(bars: list[Bar], tmp_path: Path) -> None:
    archive, states = saved(tmp_path), tmp_path / "model.pt"
    torch.save({"a": torch.ones(LARGE)}, states)
    for path in (archive, states):
        data = bytearray(path.read_bytes())
        data[data.index(bytes(torch.ones(50).numpy()))] ^= 1
        path.write_bytes(data)
        bars.clear()
        with pytest.raises(pdrs.CheckpointError, match="is damaged"):
            pdrs.open(path, verify=True)
        assert [bar.is_closed for bar in bars] == [True]


def test_little_is_saved_and_verified_without_a_bar(bars: list[Bar], tmp_path: Path) -> None:
    path = saved(tmp_path, 1 << 20)
    torch.save(model(1 << 20).state_dict(), tmp_path / "model.pt")
    pdrs.open(path, verify=True)
    pdrs.open(tmp_path / "model.pt", verify=True)
    assert not bars


# What is done soon has no bar, but for this.
_VERIFIES = """
import functools, runpy, sys, tqdm
made = tqdm.tqdm
tqdm.tqdm = lambda delay, **options: made(**options)
sys.argv[0] = "pdrs"
runpy.run_module("pdrs", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.slow
def test_the_bar_is_seen_on_a_terminal_and_not_in_a_pipe(tmp_path: Path) -> None:
    path = saved(tmp_path)
    command = [sys.executable, "-c", _VERIFIES, "verify", str(path)]
    pytest.importorskip("tqdm", reason="bars need tqdm")
    piped = subprocess.run(command, capture_output=True, check=True)
    assert piped.stderr == b""
    assert b"good" in piped.stdout
    import fcntl
    import termios

    ours, theirs = os.openpty()
    os.set_blocking(ours, False)  # no bar is an error at once
    try:
        # Of no size at first, which leaves no room for a bar.
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
        shown = os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"model.safetensors:" in shown
    assert b"B/s" in shown
