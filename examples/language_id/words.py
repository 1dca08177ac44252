"""Words of about forty languages, and the character n-grams that they consist of."""

from __future__ import annotations

import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import wordfreq
from torch import Tensor
from torch.nn.functional import embedding_bag

import pdrs

SHORTEST, LONGEST = 2, 5
ONE_IN_HELD_OUT = 10
# Which n-grams are frequent can be told from a part of the words.
ONE_IN_COUNTED = 5


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

    def chosen(self, places: Tensor) -> Words:
        """Return the words at some places."""
        return Words([self.texts[place] for place in places.tolist()], self.labels[places])


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


def most_frequent_ngrams(words: Sequence[str], limit: int) -> list[str]:
    """Return the n-grams that occur most often, the most frequent first."""
    index = pdrs.IndexMap()
    counts = np.bincount(index.extend(list(chain.from_iterable(map(ngrams, words[::ONE_IN_COUNTED])))))
    names = list(index)
    return [names[place] for place in np.argsort(-counts, kind="stable")[:limit]]


class Bags:
    """The n-grams of many words: each distinct one is looked up and learnt from once, however often it occurs.

    Parameters
    ----------
    texts
        The words.
    among
        Which n-grams count, if not all.

    Attributes
    ----------
    names
        The distinct n-grams, in the order in which they are met.
    """

    def __init__(self, texts: list[str], among: Container[str] | None = None) -> None:
        per_word = list(map(ngrams, texts))
        if among is not None:
            per_word = [[name for name in one if name in among] for one in per_word]
        index = pdrs.IndexMap()
        self._places = torch.from_numpy(index.extend(list(chain.from_iterable(per_word))))
        self.names = list(index)
        counts = torch.tensor(list(map(len, per_word)))
        self._starts = counts.cumsum(0) - counts

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sum over the n-grams of each word, ``[words, *]``, of what each name has: ``[names, *]``."""
        return embedding_bag(self._places, rows, self._starts, mode="sum")
