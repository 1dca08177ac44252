"""Opens what has been saved of the language identifier, and tells the languages of words.

Nothing is read of the file but the names, and the weights of the n-grams that the words have.

    python examples/language_id/ask.py target/language_id/model.safetensors queso Straße
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

import pdrs
from models import Stacked
from words import Bags, ngrams

SHOWN = 3


@torch.no_grad()
def answer(model: Stacked, word: str) -> str:
    """Return a line with the most probable languages of a word."""
    if not model.weights.isin(ngrams(word)).any():
        return f"{word}: none of its n-grams is known"
    best = model.eval()(Bags([word]))[0].softmax(0).topk(min(SHOWN, len(model.languages)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return f"{word}: " + ", ".join(f"{model.languages[label]} {share:.0%}" for label, share in ranked)


def save(model: Stacked, path: Path) -> None:
    """Save a model, and the names of its languages beside it."""
    path.with_suffix(".txt").write_text("\n".join(model.languages), encoding="utf-8")
    pdrs.save(model, path)


def opened(path: Path) -> Stacked:
    """Return a model whose weights are those in the file, and stay there until they are looked at."""
    model = Stacked(path.with_suffix(".txt").read_text(encoding="utf-8").split("\n"))
    model.weights = pdrs.open(path, prefix="weights.")
    return model


def main(path: Path, words: list[str]) -> None:
    """Answer for each word, and say how long it took."""
    started = seconds_since_start()
    begin = time.perf_counter()
    model = opened(path)
    opening = time.perf_counter() - begin
    answers = [answer(model, word.lower()) for word in words]
    spent = time.perf_counter() - begin
    print(
        f"{len(model.weights):,} names opened in {opening:.2f} s, {len(words)} words answered after {spent:.2f} s; ",
        end="",
    )
    print(f"before that, Python and torch took {started:.1f} s to start")
    print("\n".join(answers))


def seconds_since_start() -> float:
    """Return how long this process has run."""
    if sys.platform != "linux":
        return time.process_time()
    # Ticks since the machine was started, the 22nd field; the name of the program may have spaces.
    begin = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begin


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
