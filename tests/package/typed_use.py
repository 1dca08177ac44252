"""Code of a user, which a strict type checker accepts without a cast: ``make check`` runs basedpyright over it.

The bugs that this hunts: a public name that is not exported, and a result that is Any, or less than what it is.
"""

from __future__ import annotations

from collections.abc import KeysView
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from typing_extensions import assert_type

import pdrs
import pdrs.distributed
from pdrs.typing import Initialiser, Mask, Missing, Names


class Words(Module):
    """Scores sentences by the rows of their words."""

    def __init__(self, words: Names, columns: int) -> None:
        super().__init__()
        self.rows = pdrs.StackedParameterDict.from_shapes(dict.fromkeys(words, (columns,)), init=torch.nn.init.normal_)

    def forward(self, sentence: list[str], missing: Missing = "error") -> Tensor:
        """Return the sum of the rows of a sentence."""
        return self.rows.gather(sentence, missing=missing).sum(0)


def train(model: Words, optimizer: torch.optim.Optimizer, sentence: list[str], init: Initialiser) -> list[str]:
    """Let a model learn a sentence, with words that it has not seen, and return these."""
    model.rows.attach_optimizer(optimizer)
    seen = model.rows.insert(sentence, shape=(4,), init=init)
    model(sentence)
    return seen


def prune(sd: pdrs.StackedParameterDict, keep: Mask) -> None:
    """Keep what a mask selects."""
    sd.retain(sd.select(keep))


def look_up(sd: pdrs.StackedParameterDict, names: list[str]) -> Tensor:
    """Look names up once, and read their rows twice."""
    found = assert_type(sd.lookup(names), pdrs.Lookup)
    return sd.gather(found) + sd.gather(found)


def train_by_row(model: Words, sentences: list[list[str]]) -> Tensor:
    """Train the rows of some sentences, and no others; return the norm of the gradient."""
    optimizer = pdrs.optim.AdamW(model.parameters(), lr=0.1, per_row_steps=True, lazy_decay=True)
    pooled = assert_type(model.rows.gather_bag(sentences, mode="mean", missing="insert"), Tensor)
    torch.autograd.backward(pooled.sum())
    norm = assert_type(pdrs.optim.clip_grad_norm_(model.parameters(), 1.0), Tensor)
    optimizer.step()
    return norm


def entries(sd: pdrs.StackedParameterDict) -> None:
    """Use a dictionary of rows as a dict."""
    assert_type(sd["a"], Tensor)
    assert_type(sd.get("a"), "Tensor | None")
    assert_type(sd.get("a", 0), "Tensor | int")
    assert_type(sd.pop("a"), Tensor)
    assert_type(sd.pop("a", None), "Tensor | None")
    assert_type(sd.popitem(), tuple[str, Tensor])
    assert_type(sd.keys(), KeysView[str])
    assert_type(sd.keys(prefix="a"), list[str])
    for name, row in sd.items():
        assert_type(name, str)
        assert_type(row, Tensor)
    assert_type(sd.isin(["a"]), Tensor)
    assert_type(sd.indices(["a"]), Tensor)
    assert_type(sd.nbytes, int)
    assert_type(sd.layout_version, int)
    assert_type("a" in sd, bool)


def index(words: list[str]) -> NDArray[np.int64]:
    """Give words numbers, in the order in which they came."""
    numbers = pdrs.IndexMap.from_names(words)
    assert_type(numbers["a"], int)
    assert_type(numbers.pop("a", None), "int | None")
    return numbers.indices(words, missing=-1)


def files(path: Path, model: Words) -> None:
    """Save, open and load."""
    assert_type(pdrs.save(model, path), int)
    assert_type(pdrs.open(path, prefix="rows."), pdrs.StackedParameterDict)
    assert_type(pdrs.load(path, model).missing_keys, list[str])


def moves(model: Words, entries: pdrs.ParameterDict) -> None:
    """Move a module, and keep its type."""
    assert_type(pdrs.to(model, torch.float64), Words)
    assert_type(entries.to(torch.float64), pdrs.ParameterDict)
    try:
        entries.pop("a")
    except pdrs.MissingEntryError as error:
        print(error)


def train_on_ranks(model: Module, names: list[str]) -> None:
    """Use a table that is spread over ranks."""
    words = pdrs.distributed.ShardedParameterDict((4,), init=pdrs.distributed.normal(0.1), wire=torch.bfloat16)
    plan = assert_type(words.plan(names, "insert"), pdrs.distributed.Plan)
    assert_type(words.gather(plan), Tensor)
    assert_type(pdrs.distributed.leave_out(model), Module)
    assert_type(pdrs.distributed.clip_grad_norm_(words.parameters(), 1.0), Tensor)
    assert_type(pdrs.distributed.ignored_params(model), set[torch.nn.Parameter])
    assert_type([*words], list[str])
