"""The language identifier of ``main.py`` with its table spread over processes: each n-gram, its weights and their state
on one of them.

    torchrun --nproc-per-node 2 examples/language_id/sharded.py

One process learns the same, word by word, if it is started without torchrun. What is saved on two processes goes on
on three:

    torchrun --nproc-per-node 2 examples/language_id/sharded.py --stop 10 --save target/language_id/sharded
    torchrun --nproc-per-node 3 examples/language_id/sharded.py --resume target/language_id/sharded
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import pdrs
import pdrs.distributed
import pdrs.optim
from models import HESITATION
from words import Bags, Words, load_words


class Sharded(nn.Module):
    """Scores the languages of words by a table that is spread over the ranks.

    Parameters
    ----------
    languages
        How many languages there are.
    """

    step: Tensor

    def __init__(self, languages: int) -> None:
        super().__init__()
        # Each word counts once, on whichever rank it is. So gradients are added up, and not averaged.
        self.weights = pdrs.distributed.ShardedParameterDict((languages,), average=False)
        # How many steps it has been trained for, so that training can go on.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, bags: Bags) -> Tensor:
        """Return the scores, ``[words, languages]``. In training mode new n-grams are inserted. All ranks call it."""
        return bags.sums(self.weights.gather(bags.names, "insert" if self.training else "zero"))


def share(words: Words, rank: int, ranks: int) -> Words:
    """Return the words of one rank."""
    return Words(words.texts[rank::ranks], words.labels[rank::ranks])


def batches(words: Words, size: int, seed: int, model: Sharded) -> Iterator[tuple[Words, Bags]]:
    """Return what this rank has of each batch that the model has not seen."""
    order = torch.split(torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)), size)
    for places in order[int(model.step) :]:
        mine = share(words.chosen(places), model.weights.rank, model.weights.world_size)
        yield mine, Bags(mine.texts)


def train(model: Sharded, optimizer: torch.optim.Optimizer, words: Words, options: argparse.Namespace) -> list[float]:
    """Train on each word once, or up to a step, and return the loss of each step: a mean over its words."""
    losses: list[float] = []
    shown = model.weights.rank == 0
    with tqdm(total=len(words), unit=" words", disable=None if shown else True, leave=False) as bar:
        bar.update(int(model.step) * options.batch)
        for mine, bags in batches(words, options.batch, options.seed, model.train()):
            if options.stop is not None and int(model.step) >= options.stop:
                break
            optimizer.zero_grad()
            loss = cross_entropy(model(bags), mine.labels, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            model.step += 1
            total, count = summed(loss.item(), len(mine.labels))
            losses.append(total / count)
            bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
            bar.update(int(count))
    return losses


@torch.no_grad()
def accuracy(model: Sharded, words: Words) -> float:
    """Return the share of words whose most probable language is theirs. Each rank answers for its part of the words."""
    mine = share(words, model.weights.rank, model.weights.world_size)
    right, count = summed(float((model.eval()(Bags(mine.texts)).argmax(1) == mine.labels).sum()), len(mine.labels))
    return right / count


def summed(*numbers: float) -> list[float]:
    """Return sums over all ranks."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=20_000, help="how many words of each language")
    parser.add_argument("--batch", type=int, default=16_384, help="words a step, of all processes together")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of Adagrad")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the words")
    parser.add_argument("--stop", type=int, help="train up to this step only")
    parser.add_argument("--resume", type=Path, help="a folder that has been saved, on any number of processes")
    parser.add_argument("--save", type=Path, help="a folder to save to")
    parser.add_argument("--losses", type=Path, help="a file for the losses of all steps, and the accuracy")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Train, answer for the held-out words, and save."""
    options = parse(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    start = time.monotonic()
    languages, words, held_out = load_words(options.words)
    model = Sharded(len(languages))
    optimizer = pdrs.optim.Adagrad(model.parameters(), lr=options.rate, initial_accumulator_value=HESITATION)
    if options.resume is not None:
        pdrs.distributed.load(options.resume, model, optimizer)
    losses = train(model, optimizer, words, options)
    share_right = accuracy(model, held_out)
    names, own = model.weights.total(), len(model.weights)
    if options.save is not None:
        pdrs.distributed.save(model, options.save, optimizer)
    if model.weights.rank == 0:
        print(
            f"{model.weights.world_size} processes, step {int(model.step)}, loss {losses[-1] if losses else 0.0:.4f}, "
            f"{names:,} names, {own:,} of them on the first process; held-out accuracy {share_right:.2%}; "
            f"{time.monotonic() - start:.0f} s"
        )
        if options.losses is not None:
            options.losses.write_text(json.dumps({"losses": losses, "accuracy": share_right}), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
