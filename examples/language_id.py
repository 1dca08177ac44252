"""A language identifier whose parameters are named by character n-grams.

Every n-gram of two to five characters, ``<th`` or ``lich>`` with the word's boundaries, owns one Parameter in a
``pdrs.ParameterDict``: a weight for each language. The scores of a word are the sum over its n-grams. The words, about
forty languages of them, come with the package ``wordfreq``; the held-out ones are never trained on.

    python examples/language_id.py
    python examples/language_id.py --ngrams 50000 --seconds 120 --word queso --word Straße
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import wordfreq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding_bag
from tqdm import tqdm

import pdrs

SHORTEST, LONGEST = 2, 5
ONE_IN_HELD_OUT = 10
SHOWN = 3


def ngrams(word: str) -> list[str]:
    """Return the n-grams of a word between its boundaries ``<`` and ``>``."""
    marked = f"<{word}>"
    lengths = range(SHORTEST, LONGEST + 1)
    return [marked[start : start + n] for n in lengths for start in range(len(marked) - n + 1)]


@dataclass
class Words:
    """Words and the language of each, as an index into the list of languages; a word may occur in several."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


def load_words(per_language: int) -> tuple[list[str], Words, Words]:
    """Return the languages, the words to train on and the held-out ones; no word is in both."""
    languages = sorted(wordfreq.available_languages("best"))
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, language in enumerate(languages):
        for word in wordfreq.top_n_list(language, per_language, "best"):
            held_out = zlib.crc32(word.encode()) % ONE_IN_HELD_OUT == 0
            parts[held_out].append((word, label))
    train, test = (
        Words([word for word, _ in part], torch.tensor([label for _, label in part], dtype=torch.long))
        for part in parts
    )
    return languages, train, test


def most_frequent_ngrams(words: Iterable[str], limit: int) -> list[str]:
    """Return the n-grams that occur most often, the most frequent first."""
    counts = Counter(chain.from_iterable(map(ngrams, words)))
    return [ngram for ngram, _ in counts.most_common(limit)]


class Bags:
    """The known n-grams of many words, as rows, one word's behind another's."""

    def __init__(self, words: list[str], index: pdrs.IndexMap) -> None:
        per_word = list(map(ngrams, words))
        rows = index.lookup(list(chain.from_iterable(per_word)), default=-1)
        owner = np.repeat(np.arange(len(words)), [len(one) for one in per_word])
        known = rows >= 0
        self.rows = torch.from_numpy(rows[known])
        counts = np.bincount(owner[known], minlength=len(words))
        self.counts = torch.from_numpy(counts)
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))

    def batch(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of some words and where each word's begin, as ``embedding_bag`` takes them."""
        counts = self.counts[words]
        offsets = counts.cumsum(0) - counts
        within = torch.arange(int(counts.sum())) - offsets.repeat_interleave(counts)
        return self.rows[self.starts[words].repeat_interleave(counts) + within], offsets


class LanguageId(nn.Module):
    """Scores the languages of words by the sum over their n-grams.

    Parameters
    ----------
    names
        The n-grams that get a Parameter, float32 of shape ``[number of languages]``, at first 0.
    languages
        The languages, in the order of the weights.
    """

    def __init__(self, names: list[str], languages: list[str]) -> None:
        super().__init__()
        self.languages = languages
        self.weights = pdrs.ParameterDict(zip(names, torch.zeros(len(names), len(languages)), strict=True))
        self.index = pdrs.IndexMap.from_names(names)
        self.names = np.array(names, dtype=object)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the scores, ``[words, languages]``, of words whose n-grams are ``rows``, from each one's offset on."""
        used, local = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        table = torch.stack([self.weights[name] for name in self.names[used.numpy()]])
        return embedding_bag(local, table, offsets, mode="sum")

    @torch.no_grad()
    def probabilities(self, words: list[str]) -> Tensor:
        """Return the probability of each language, ``[words, languages]``; all the same where no n-gram is known."""
        bags = Bags(words, self.index)
        rows, offsets = bags.batch(torch.arange(len(words)))
        table = torch.stack(list(self.weights.values()))
        return embedding_bag(rows, table, offsets, mode="sum").softmax(1)

    def accuracy(self, words: Words) -> float:
        """Return the share of words whose most probable language is theirs."""
        return float((self.probabilities(words.texts).argmax(1) == words.labels).float().mean())


def train(model: LanguageId, words: Words, *, seconds: float, batch: int, rate: float, seed: int) -> int:
    """Train until the time is up; return the number of steps."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=rate, foreach=True)
    bags = Bags(words.texts, model.index)
    generator = torch.Generator().manual_seed(seed)
    start = last = time.monotonic()
    steps = 0
    with tqdm(total=seconds, unit="s", disable=None, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}") as bar:
        while time.monotonic() - start < seconds:
            order = torch.randperm(len(words), generator=generator)
            for chosen in torch.split(order, batch):
                optimizer.zero_grad()
                loss = cross_entropy(model(*bags.batch(chosen)), words.labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
                now = time.monotonic()
                bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
                bar.update(min(now, start + seconds) - last)
                last = now
                if now - start >= seconds:
                    break
    return steps


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


def answer(model: LanguageId, word: str) -> str:
    """Return a line with the most probable languages of a word."""
    if not any(ngram in model.weights for ngram in ngrams(word)):
        return f"{word}: none of its n-grams is known"
    best = model.probabilities([word])[0].topk(min(SHOWN, len(model.languages)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return f"{word}: " + ", ".join(f"{model.languages[label]} {share:.0%}" for label, share in ranked)


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
    parser.add_argument("--ngrams", type=positive, default=20_000, help="how many of the most frequent get a Parameter")
    parser.add_argument("--words", type=positive, default=5_000, help="how many words of each language")
    parser.add_argument("--seconds", type=positive, default=60, help="how long to train")
    parser.add_argument("--batch", type=positive, default=8_192, help="words a step")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of Adagrad")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the words")
    parser.add_argument("--save", type=Path, help="where to keep the state dict")
    parser.add_argument(
        "--word", type=non_empty, action="append", help="ask for the language of a word; may be repeated"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> float:
    """Train, save, load and answer; return the accuracy on held-out words."""
    options = parse(arguments)
    languages, words, held_out = load_words(options.words)
    names = most_frequent_ngrams(words.texts, options.ngrams)
    print(f"{len(languages)} languages, {len(words):,} words to train on, {len(held_out):,} held out")
    ours, theirs = time_to_build(names, len(languages))
    print(f"{len(names):,} named Parameters: built in {ours:.3f} s, by torch's class in {theirs:.3f} s")

    model = LanguageId(names, languages)
    start = time.monotonic()
    steps = train(model, words, seconds=options.seconds, batch=options.batch, rate=options.rate, seed=options.seed)
    print(f"trained {steps} steps of {options.batch:,} words in {time.monotonic() - start:.0f} s")
    model.zero_grad()  # torch's copy has no gradients that move along.
    ours, theirs = time_to_move(model.weights)
    print(f"moved to float64 and back in {ours:.3f} s, by torch's class in {theirs:.3f} s")

    accuracy = model.accuracy(held_out)
    majority = words.labels.bincount(minlength=len(languages)).argmax()
    baseline = float((held_out.labels == majority).float().mean())
    print(f"held-out accuracy {accuracy:.1%}; majority guess {baseline:.1%}, random guess {1 / len(languages):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        path = options.save or Path(folder) / "language_id.pt"
        torch.save(model.state_dict(), path)
        loaded = LanguageId(names, languages)
        loaded.load_state_dict(torch.load(path, weights_only=True))
        print(f"saved {path.stat().st_size / 1e6:.1f} MB, loaded into a new model")
    if loaded.accuracy(held_out) != accuracy:
        raise RuntimeError("the loaded model does not answer as the saved one did")

    for word in options.word or ["mountain", "Schmetterling", "queso", "fenêtre", "gatto", "книга", "スシ", "dziękuję"]:
        print(answer(loaded, word.lower()))
    return accuracy


if __name__ == "__main__":
    main(sys.argv[1:])
