"""The same model three times: names in one table, as Parameters of pdrs, and as Parameters of torch.

Each n-gram has a weight for each language, at first 0, and the scores of a word are the sum over its n-grams. What
differs is what holds the weights, and what it takes to meet a new n-gram while an optimizer is at work.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adagrad
from tqdm import tqdm

import pdrs
from words import Bags, Words

# With this a weight moves little until its n-gram has been met often. So norms tell which n-grams matter: without it,
# the first step of Adagrad is as long for one that has been met once as for all others.
HESITATION = 0.1


class LanguageId(nn.Module, ABC):
    """Scores the languages of words; in training mode some kinds learn n-grams that they have not met.

    Parameters
    ----------
    languages
        The languages, in the order of the weights.
    """

    weights: pdrs.StackedParameterDict | nn.ParameterDict

    def __init__(self, languages: list[str]) -> None:
        super().__init__()
        self.languages = languages

    @abstractmethod
    def rows(self, names: list[str]) -> Tensor:
        """Return the weights of n-grams, ``[names, languages]``: zeros for unknown ones."""

    @abstractmethod
    def optimizer(self, rate: float) -> Adagrad:
        """Return an optimizer that trains the n-grams, also those to come."""

    def bags(self, texts: list[str]) -> Bags:
        """Return the n-grams of words to train on."""
        return Bags(texts)

    def forward(self, bags: Bags) -> Tensor:
        """Return the scores, ``[words, languages]``."""
        return bags.sums(self.rows(bags.names))

    @torch.no_grad()
    def accuracy(self, bags: Bags, labels: Tensor) -> float:
        """Return the share of words whose most probable language is theirs."""
        return float((self.eval()(bags).argmax(1) == labels).float().mean())


class Stacked(LanguageId):
    """Every n-gram that it meets is a name of a ``pdrs.StackedParameterDict``."""

    weights: pdrs.StackedParameterDict

    def __init__(self, languages: list[str]) -> None:
        super().__init__(languages)
        self.weights = pdrs.StackedParameterDict()
        # An optimizer needs a parameter to begin with: a table, as yet of nobody.
        self.weights.reserve(1, shape=(len(languages),))

    def rows(self, names: list[str]) -> Tensor:
        """Return the weights of n-grams; in training mode new ones are inserted first."""
        missing: Literal["insert", "zero"] = "insert" if self.training else "zero"
        return self.weights.gather(names, missing=missing, shape=(len(self.languages),))

    def optimizer(self, rate: float) -> Adagrad:
        """Return an optimizer that follows the names, and steps on those of the batch."""
        return pdrs.optim.Adagrad(self.parameters(), lr=rate, initial_accumulator_value=HESITATION)

    def prune(self, count: int) -> None:
        """Keep the ``count`` n-grams with the largest norms."""
        names = list(self.weights)
        self.weights.drop([names[place] for place in self.weights.norms().argsort()[:-count].tolist()])


class Separate(LanguageId):
    """Chosen n-grams, each with a Parameter of its own in a ``pdrs.ParameterDict``; others count for nothing."""

    weights: pdrs.ParameterDict

    def __init__(self, languages: list[str], names: list[str]) -> None:
        super().__init__(languages)
        self.weights = pdrs.ParameterDict(zip(names, torch.zeros(len(names), len(languages)), strict=True))

    def bags(self, texts: list[str]) -> Bags:
        """Return the chosen n-grams of words."""
        return Bags(texts, among=self.weights)

    def rows(self, names: list[str]) -> Tensor:
        """Return the weights of n-grams."""
        return _stacked(self.weights, names, len(self.languages))

    def optimizer(self, rate: float) -> Adagrad:
        """Return an optimizer of the Parameters."""
        return _adagrad(self.parameters(), rate, foreach=True)


class Peer(LanguageId):
    """Every n-gram that it meets gets a Parameter of its own in torch's class; the optimizer has to be told."""

    weights: nn.ParameterDict

    def __init__(self, languages: list[str]) -> None:
        super().__init__(languages)
        self.weights = nn.ParameterDict()

    def rows(self, names: list[str]) -> Tensor:
        """Return the weights of n-grams; in training mode new ones are inserted first."""
        keys = list(map(self._key, names))
        if self.training:
            self._insert([key for key in keys if key not in self.weights])
        return _stacked(self.weights, keys, len(self.languages))

    @staticmethod
    def _key(name: str) -> str:
        # torch's class refuses "to" and the like, and all that has a dot.
        return f"ngram {name.encode().hex()}"

    def optimizer(self, rate: float) -> Adagrad:
        """Return an optimizer without Parameters; they come later."""
        self._adagrad = _adagrad([nn.Parameter(torch.empty(0))], rate, foreach=True)
        return self._adagrad

    def _insert(self, keys: list[str]) -> None:
        if not keys:
            return
        new = {key: nn.Parameter(torch.zeros(len(self.languages))) for key in keys}
        self.weights.update(new)
        self._adagrad.param_groups[0]["params"] += new.values()
        # Older versions of torch make the state when they make the optimizer, newer ones in the first step.
        self._adagrad.state.update(_adagrad(new.values(), self._adagrad.defaults["lr"]).state)


def _adagrad(parameters: Iterable[nn.Parameter], rate: float, foreach: bool = False) -> Adagrad:
    return Adagrad(parameters, lr=rate, initial_accumulator_value=HESITATION, foreach=foreach)


def _stacked(weights: nn.ParameterDict, names: list[str], languages: int) -> Tensor:
    none = torch.zeros(languages)
    # With a row to throw away, because an empty list cannot be stacked.
    return torch.stack([none, *(weights.get(name, none) for name in names)])[1:]


@dataclass
class Trained:
    """What a training came to."""

    words: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        """Describe it in a line."""
        return f"trained on {self.words:,} words in {self.steps} steps, {self.seconds:.1f} s"


def train(
    model: LanguageId, words: Words, *, batch: int, rate: float, seed: int, seconds: float | None = None
) -> Trained:
    """Train on every word once or, where ``seconds`` are given, until the time is up."""
    optimizer = model.train().optimizer(rate)
    generator = torch.Generator().manual_seed(seed)
    done = Trained(0, 0, 0)
    start = time.monotonic()
    total = None if seconds else len(words)
    with tqdm(total=total, unit=" words", unit_scale=True, disable=None, leave=False) as bar:
        while done.steps == 0 or (seconds is not None and done.seconds < seconds):
            for places in torch.split(torch.randperm(len(words), generator=generator), batch):
                chosen = words.chosen(places)
                optimizer.zero_grad()
                loss = cross_entropy(model(model.bags(chosen.texts)), chosen.labels, reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                bar.set_postfix_str(
                    f"{len(model.weights):,} names, loss {loss.item() / len(chosen):.2f}", refresh=False
                )
                bar.update(len(chosen))
                done = Trained(done.words + len(chosen), done.steps + 1, time.monotonic() - start)
                if seconds is not None and done.seconds >= seconds:
                    break
    return done
