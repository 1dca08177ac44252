"""A language identifier whose parameters are named by character n-grams.

Every n-gram of two to five characters that occurs, ``<th`` or ``lich>`` with the word's boundaries, owns a row of a
``pdrs.StackedParameterDict``: a weight for each language. There are one and a half million of them, and none is known
when training begins: new ones are inserted as words are met. Then the n-grams with the smallest norms are dropped, and
what is left is saved, loaded and asked. Before that, for comparison, the same model with a ``pdrs.ParameterDict``:
twenty thousand n-grams, and each a Parameter. The words, about forty languages of them, come with the package
``wordfreq``; the held-out ones are never trained on.

    python examples/language_id/main.py
    python examples/language_id/main.py --keep 20000 --word queso --word Straße
    python examples/language_id/main.py --peer
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import pdrs
from ask import answer, save
from models import LanguageId, Peer, Separate, Stacked, train
from picture import Point, draw
from words import Bags, load_words, most_frequent_ngrams

ASKED = ["mountain", "Schmetterling", "queso", "fenêtre", "gatto", "книга", "スシ", "dziękuję"]
# So many names are saved by torch one by one, for comparison, if not all are.
SAMPLE = 20_000
# Where the curve has its points.
PRUNED_TO = tuple(digit * 10**power for power in (6, 5, 4, 3) for digit in (5, 2, 1))
BUILT = Path(__file__).parents[2] / "target" / "language_id"


def time_to_build(names: list[str], languages: int) -> tuple[float, float]:
    """Return the seconds that pdrs and torch take to build the dictionary, the median of three runs in turns."""
    spent: dict[type[nn.ParameterDict], list[float]] = {pdrs.ParameterDict: [], nn.ParameterDict: []}
    # Under other names: torch's class refuses "to", and all that has a dot.
    pairs = list(zip((f"ngram {n}" for n in range(len(names))), torch.zeros(len(names), languages), strict=True))
    for _ in range(3):
        for kind, times in spent.items():
            start = time.perf_counter()
            kind(pairs)
            times.append(time.perf_counter() - start)
    ours, theirs = (sorted(times)[1] for times in spent.values())
    return ours, theirs


def time_to_move(weights: pdrs.ParameterDict) -> tuple[float, float]:
    """Return the seconds to float64 and back of a dictionary and of torch's, the median of three runs in turns."""
    # Under other names, as above; and with Parameters of its own, for a move changes them.
    copies = ((f"ngram {n}", weight.detach().clone()) for n, weight in enumerate(weights.values()))
    spent: dict[nn.ParameterDict, list[float]] = {weights: [], nn.ParameterDict(copies): []}
    for _ in range(3):
        for moved, times in spent.items():
            start = time.perf_counter()
            moved.to(torch.float64).to(torch.float32)
            times.append(time.perf_counter() - start)
    ours, theirs = (sorted(times)[1] for times in spent.values())
    return ours, theirs


class Task:
    """What all models learn and are asked: languages, words to train on, and held-out words."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        start = time.monotonic()
        self.languages, self.words, held_out = load_words(options.words)
        self.held_out, self.labels = Bags(held_out.texts), held_out.labels
        majority = self.words.labels.bincount(minlength=len(self.languages)).argmax()
        self.majority = float((self.labels == majority).float().mean())
        print(
            f"{len(self.languages)} languages, {len(self.words):,} words to train on, {len(held_out):,} held out, "
            f"read in {time.monotonic() - start:.1f} s"
        )
        chance = 1 / len(self.languages)
        print(f"held-out accuracy of the majority guess {self.majority:.1%}, of a random one {chance:.1%}")

    def accuracy(self, model: LanguageId) -> float:
        """Return the share of held-out words whose language a model knows."""
        return model.accuracy(self.held_out, self.labels)

    def learn(self, model: LanguageId, seconds: float | None = None) -> tuple[Point, float]:
        """Train a model, for one epoch or for some seconds, and say how it fares; return that and the seconds."""
        options = self.options
        trained = train(model, self.words, batch=options.batch, rate=options.rate, seed=options.seed, seconds=seconds)
        start = time.monotonic()
        accuracy = self.accuracy(model)
        print(f"  {trained}\n  {len(model.weights):,} names, held-out accuracy {accuracy:.1%}", end="")
        print(f", found in {time.monotonic() - start:.1f} s")
        return Point(len(model.weights), accuracy), trained.seconds

    def prune(self, model: Stacked, sizes: list[int]) -> list[Point]:
        """Drop the n-grams with the smallest norms until there are so many, and so on; say what that costs."""
        curve = []
        for size in sizes:
            start = time.monotonic()
            model.prune(size)
            pruned = time.monotonic()
            accuracy = self.accuracy(model)
            spent = f"pruned in {pruned - start:.2f} s, asked in {time.monotonic() - pruned:.2f} s"
            print(f"  {size:>9,} names, held-out accuracy {accuracy:.1%}; {spent}")
            curve.append(Point(size, accuracy))
        return curve


def learn_separate(task: Task) -> Point:
    """Train the model whose n-grams are Parameters, and see what the dictionary does for it."""
    options = task.options
    names = most_frequent_ngrams(task.words.texts, options.ngrams)
    ours, theirs = time_to_build(names, len(task.languages))
    print(f"\npdrs.ParameterDict: the {len(names):,} most frequent n-grams, each a Parameter")
    print(f"  built in {ours:.3f} s, by torch's class in {theirs:.3f} s")
    model = Separate(task.languages, names)
    point, seconds = task.learn(model, options.seconds)
    model.zero_grad()  # torch's copy has no gradients that move along.
    ours, theirs = time_to_move(model.weights)
    print(f"  moved to float64 and back in {ours:.3f} s, by torch's class in {theirs:.3f} s")
    return replace(point, label=f"pdrs.ParameterDict, trained for {seconds:.0f} s")


def learn_stacked(task: Task) -> tuple[Stacked, list[Point], Point | None]:
    """Train the model that names every n-gram, prune, save and load it; return the loaded one, the curve, the peer."""
    options = task.options
    print("\npdrs.StackedParameterDict: every n-gram, inserted when it is first met")
    model = Stacked(task.languages)
    point, seconds = task.learn(model)
    curve = [replace(point, label=f"every n-gram, trained for {seconds:.0f} s")]
    print(f"  {size(model)}")
    save_and_ask(model, options)
    peer = learn_peer(task, seconds) if options.peer else None

    print("\nn-grams with the smallest norms dropped:")
    sizes = sorted({*PRUNED_TO, options.keep}, reverse=True)
    curve += task.prune(model, [size for size in sizes if options.keep <= size < len(model.weights)])
    model.weights.compact()
    loaded = save_and_load(model, options.save)
    if task.accuracy(loaded) != curve[-1].accuracy:
        raise RuntimeError("the loaded model does not answer as the saved one did")
    if len(curve) > 1:
        curve[-1] = replace(curve[-1], label="saved")
    curve += task.prune(model, [size for size in sizes if size < len(model.weights)])
    return loaded, curve, peer


def save_and_ask(model: Stacked, options: argparse.Namespace) -> None:
    """Save every name, let a new process open and ask them, and see how long torch would take to save and load."""
    path = options.save.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    model.weights.compact()
    start = time.monotonic()
    save(model, path)
    saved = time.monotonic() - start
    count = len(model.weights)
    print(f"\nall of it saved as {path}, {path.stat().st_size / 1e6:.1f} MB, in {saved:.2f} s; a new process says:")
    words = options.word or ASKED
    command = [sys.executable, str(Path(__file__).with_name("ask.py")), str(path), *words]
    asked = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8", env=in_utf8())
    print("".join(f"  {line}\n" for line in asked.stdout.splitlines()), end="")

    names = list(model.weights)[: count if options.peer else SAMPLE]
    saving, loading = time_of_torch(model, names, path.with_suffix(".torch.pt"))
    print(f"  torch.save and torch.load of {len(names):,} tensors by name: {saving:.2f} s and {loading:.2f} s", end="")
    scale = count / len(names)
    print(f"; for all, at that rate: {saving * scale:.0f} s and {loading * scale:.0f} s" if scale > 1 else "")


def time_of_torch(model: Stacked, names: list[str], path: Path) -> tuple[float, float]:
    """Return the seconds that torch takes to save and to load names with a tensor each, as its own class has them."""
    state = dict(zip(names, map(torch.clone, model.weights.gather(names).detach()), strict=True))
    start = time.monotonic()
    torch.save(state, path)
    saved = time.monotonic()
    del state
    torch.load(path, weights_only=True)
    loaded = time.monotonic()
    path.unlink()
    return saved - start, loaded - saved


def in_utf8() -> dict[str, str]:
    """Return the environment of a Python process that prints in UTF-8."""
    return {**os.environ, "PYTHONIOENCODING": "utf-8"}


def learn_peer(task: Task, seconds: float) -> Point:
    """Train the model that names every n-gram with torch's class for as long as pdrs took."""
    print(f"\ntorch.nn.ParameterDict: every n-gram, as many as it meets in {seconds:.1f} s")
    point, spent = task.learn(Peer(task.languages), seconds)
    return replace(point, label=f"torch.nn.ParameterDict, trained for {spent:.0f} s")


def save_and_load(model: Stacked, path: Path) -> Stacked:
    """Return a new model with what has been saved of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    torch.save(model.state_dict(), path)
    loaded = Stacked(model.languages)
    loaded.load_state_dict(torch.load(path, weights_only=True))
    print(f"  {size(loaded)}; saved as {path}, {path.stat().st_size / 1e6:.1f} MB,", end="")
    print(f" and loaded into a new model in {time.monotonic() - start:.2f} s")
    return loaded


def size(model: Stacked) -> str:
    """Describe the tables."""
    tables = list(model.weights.parameters())
    rows, nbytes = sum(map(len, tables)), sum(table.nbytes for table in tables)
    return f"{len(tables)} table{'s' * (len(tables) > 1)} of {rows:,} rows, {nbytes / 1e6:.1f} MB"


def positive(text: str) -> int:
    """Return a number of one or more, for the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def non_empty(text: str) -> str:
    """Return a word with at least one character, for the command line."""
    if not text:
        raise argparse.ArgumentTypeError("expected a word, got an empty one")
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=positive, default=20_000, help="how many words of each language")
    parser.add_argument("--keep", type=positive, default=100_000, help="how many n-grams are left in what is saved")
    parser.add_argument("--ngrams", type=positive, default=20_000, help="how many get a Parameter, for comparison")
    parser.add_argument("--seconds", type=positive, default=30, help="how long these are trained")
    parser.add_argument("--peer", action="store_true", help="name every n-gram with torch's class, too")
    parser.add_argument("--batch", type=positive, default=16_384, help="words a step")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of Adagrad")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the words")
    parser.add_argument("--save", type=Path, default=BUILT / "model.pt", help="where to keep the state dict")
    parser.add_argument("--plot", type=Path, help="where to draw accuracy against names; by default beside that")
    parser.add_argument(
        "--word", type=non_empty, action="append", help="ask for the language of a word; may be repeated"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> list[Point]:
    """Train, prune, save, load, draw and answer; return the accuracy, from all names to the fewest."""
    options = parse(arguments)
    task = Task(options)
    separate = learn_separate(task)
    loaded, curve, peer = learn_stacked(task)

    others = [separate] if peer is None else [separate, peer]
    path = options.plot or options.save.with_suffix(".png")
    draw(curve, others, task.majority, "Telling the language of a word by its named n-grams", path)
    print(f"\naccuracy against names: {path}\n")
    for word in options.word or ASKED:
        print(answer(loaded, word.lower()))
    return curve


if __name__ == "__main__":
    main(sys.argv[1:])
