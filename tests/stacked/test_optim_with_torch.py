"""The optimizers of ``pdrs.optim`` beside what torch has for optimizers: checkpoints, schedulers, scalers, hooks.

The bugs that this hunts: a state that is lost, rounded or taken for another where it is saved, loaded or copied, by
torch's class, too; a scale of gradients that is not taken away; a hook that is called twice; a step that fails and has
begun.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pdrs
from pdrs.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from trained_by_row import KINDS, NAMES, Make, assert_near, batch_of, bits, loss_of, rows, stacked, table_of, train

# torch says so of its own sparse optimizers, from torch 2.15 on.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

SD = pdrs.StackedParameterDict
all_kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


# -- what is saved, loaded and copied ----------------------------------------------------------------------------------

PEERS: dict[str, tuple[Make, Make]] = {
    "Adam": (lambda p: Adam(p, lr=0.05), lambda p: torch.optim.SparseAdam(list(p), lr=0.05)),
    "Adam-per-row": (lambda p: Adam(p, lr=0.05, per_row_steps=True), lambda p: torch.optim.Adam(p, lr=0.05)),
    "AdamW": (lambda p: AdamW(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.05)),
    "Adagrad": (lambda p: Adagrad(p, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "SGD": (lambda p: SGD(p, lr=0.02, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
    "RMSprop": (lambda p: RMSprop(p, lr=0.01), lambda p: torch.optim.RMSprop(p, lr=0.01)),
}


@pytest.mark.parametrize("begins", ["ours", "theirs"])
@pytest.mark.parametrize(("ours", "theirs"), PEERS.values(), ids=PEERS)
def test_training_goes_on_with_the_state_of_torchs_class_and_torchs_with_ours(
    ours: Make, theirs: Make, begins: str
) -> None:
    """All names are in each batch, so that both are the same."""
    expected = stacked()
    kept = theirs(expected.parameters())
    expected.attach_optimizer(kept)
    sparse = isinstance(kept, torch.optim.SparseAdam)

    def go(sd: SD, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            by_row = sparse or not type(optimizer).__module__.startswith("torch")
            loss_of(sd.gather(NAMES, sparse=by_row), step).backward()
            optimizer.step()

    go(expected, kept, range(20))
    sd = stacked()
    first, second = (ours, theirs) if begins == "ours" else (theirs, ours)
    optimizer = first(sd.parameters())
    sd.attach_optimizer(optimizer)
    go(sd, optimizer, range(10))
    resumed = SD.from_tensor(NAMES, sd.gather(NAMES).detach().clone())
    again = second(resumed.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(resumed, again, range(10, 20))
    assert_near(resumed.gather(NAMES), expected.gather(NAMES), 2e-6)


@all_kinds
def test_training_goes_on_to_the_bit_from_a_checkpoint(make: Make, tmp_path: Path) -> None:
    sd = stacked()
    optimizer = make(sd.parameters())
    train(sd, optimizer, range(10))
    sd.drop(NAMES[2:4])
    pdrs.save(sd, tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = SD()
    pdrs.load(tmp_path / "model", resumed)
    again = make(resumed.parameters())
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for one, of_one in ((sd, optimizer), (resumed, again)):
        one["late"] = torch.ones(3)
        train(one, of_one, range(10, 20))
    assert bits(resumed, again) == bits(sd, optimizer)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@all_kinds
def test_a_copy_of_a_model_and_its_optimizer_goes_on_by_itself(make: Make, duplicate: Any) -> None:
    sd = stacked()
    optimizer = make(sd.parameters())
    train(sd, optimizer, range(5))
    other, of_other = duplicate((sd, optimizer))
    before = bits(sd, optimizer)
    other.drop(NAMES[:2])
    other.update({f"late.{n}": torch.ones(3) for n in range(9)})
    train(other, of_other, range(5, 8))
    assert table_of(other).grad.is_sparse
    assert bits(sd, optimizer) == before
    sd.drop(NAMES[:2])
    sd.update({f"late.{n}": torch.ones(3) for n in range(9)})
    train(sd, optimizer, range(5, 8))
    assert bits(sd, optimizer) == bits(other, of_other)


# -- what goes with optimizers -----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Several tables beside dense layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = SD([(f"w{n}", torch.randn(3)) for n in range(6)] + [(f"t{n}", torch.randn(2)) for n in range(6)])
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, step: int) -> Tensor:
        at = [(step * 5 + n * n) % 6 for n in range(4)]
        found = [self.words.gather([f"{kind}{n}" for n in at], sparse=self.sparse) for kind in "wt"]
        return self.head(torch.cat(found, 1)).pow(2).sum()

    sparse: bool | None = None


def test_tables_and_dense_layers_are_trained_by_one_optimizer() -> None:
    ours, theirs = Mixed(), Mixed()
    theirs.sparse = True
    layers = torch.optim.AdamW(theirs.head.parameters(), lr=0.01, weight_decay=0.0)
    tables = AdamW(theirs.words.parameters(), lr=0.01, weight_decay=0.0)
    optimizer = AdamW(ours.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    others = [torch.optim.lr_scheduler.CosineAnnealingLR(one, 20) for one in (layers, tables)]
    for step in range(20):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        ours(step).backward()
        optimizer.step()
        scheduler.step()
        for one in (layers, tables):
            one.zero_grad()
        theirs(step).backward()
        for one, plan in zip((layers, tables), others, strict=True):
            one.step()
            plan.step()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(got, expected)
    assert len(optimizer.state) == 6


def test_gradients_of_several_backwards_add_up() -> None:
    sd, other = stacked(), stacked()
    optimizers = Adam(sd.parameters(), lr=0.1), Adam(other.parameters(), lr=0.1)
    for step in range(5):
        names = [batch_of(NAMES, 10 * step + n) for n in range(3)]
        for batch in names:
            loss_of(sd.gather(batch), step).backward()
        torch.stack([loss_of(other.gather(batch), step) for batch in names]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert_near(sd.gather(NAMES), other.gather(NAMES))


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_of_gradients_takes_its_scale_away_and_leaves_out_what_is_not_finite(fused: bool | None) -> None:
    model, plain = Mixed(), Mixed()
    optimizer, expected = Adam(model.parameters(), lr=0.1, fused=fused), Adam(plain.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for one in (optimizer, expected):
            one.zero_grad()
        scaler.scale(model(step) * (math.inf if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            plain(step).backward()
            expected.step()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(got, wanted, 1e-5)


def test_autocast_trains_the_tables() -> None:
    model = Mixed()
    optimizer = Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


def test_a_step_in_the_backward_pass_is_the_step_behind_it() -> None:
    model, plain = Mixed(), Mixed()
    own = {one: Adam([one], lr=0.1) for one in model.parameters()}

    def step_at_once(parameter: Tensor) -> None:
        own[parameter].step()
        own[parameter].zero_grad()

    for one in own:
        one.register_post_accumulate_grad_hook(step_at_once)
    optimizer = Adam(plain.parameters(), lr=0.1)
    for step in range(5):
        model(step).backward()
        assert all(one.grad is None for one in own)
        optimizer.zero_grad()
        plain(step).backward()
        optimizer.step()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, wanted)


@all_kinds
def test_a_step_calls_its_closure_and_its_hooks_once(make: Make) -> None:
    # torch puts the hooks into the step of a class when it makes the first of it.
    for peer in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        peer([nn.Parameter(torch.zeros(1))])
    model = Mixed()
    optimizer = make(model.parameters())
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Tensor:
        called.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert called == ["before", "closure", "after"]
    assert isinstance(loss, Tensor)


# -- what cannot be ----------------------------------------------------------------------------------------------------


def out_of_range(table: Tensor) -> None:
    index = torch.tensor([[0, len(table)]])
    table.grad = torch.sparse_coo_tensor(index, torch.ones(2, 2), table.shape, check_invariants=False)


def negative(table: Tensor) -> None:
    table.grad = torch.sparse_coo_tensor(torch.tensor([[0, -1]]), torch.ones(2, 2), table.shape, check_invariants=False)


def in_two_dimensions(table: Tensor) -> None:
    table.grad = torch.ones(table.shape).to_sparse()


def of_another_shape(table: Tensor) -> None:
    """Let the gradient be of a larger table."""
    table.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), table.shape)
    table.grad.sparse_resize_((len(table) + 1, 2), 1, 1)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (out_of_range, "row 6.*6 rows|of 6 rows"),
        (negative, "row -1|of 6 rows"),
        (in_two_dimensions, "sparse in the first dimension.*sparse in 2"),
        (of_another_shape, r"shape \[6, 2\].*\[7, 2\]"),
    ],
)
def test_a_wrong_gradient_is_an_error_and_no_table_has_changed(
    spoil: Callable[[Tensor], None], error: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pdrs._rows.row_optimizer as private

    if not is_native:
        monkeypatch.setattr(private, "RowStep", type("Left", (), {"plan": staticmethod(lambda *_: None)}))
    model = Mixed()
    optimizer = Adam(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(step).backward()
        if step == 0:
            optimizer.step()
    before, layers = bits(model.words, optimizer), [one.tolist() for one in model.head.parameters()]
    spoil(model.words.table((2,)))  # the second
    with pytest.raises((ValueError, RuntimeError), match=error):
        optimizer.step()
    assert bits(model.words, optimizer) == before
    assert [one.tolist() for one in model.head.parameters()] == layers
    optimizer.zero_grad()
    model(2).backward()
    optimizer.step()


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_options_that_do_not_go_with_sparse_gradients_are_refused(option: str) -> None:
    sd = stacked()
    optimizer = Adam(sd.parameters(), **{option: True})
    sd.gather(NAMES).sum().backward()
    with pytest.raises(RuntimeError, match=f"{option}=True does not go with sparse gradients"):
        optimizer.step()
    assert torch.equal(sd.gather(NAMES), rows())
