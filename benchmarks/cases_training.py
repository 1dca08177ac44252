"""A whole training step, from names to updated rows: ``pdrs.optim`` beside torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from measure import LARGE_FROM_ENTRIES, Case, Claim, Suite, Target
from memory import bytes_of
from training import (
    BATCH,
    BUILD,
    BY_HAND,
    DENSE,
    FLOATS,
    MAX_NORM,
    ONE_THREAD,
    PDRS,
    TORCH,
    Data,
    Setup,
    clip_alone,
    step_alone,
    whole_step,
)

# Beyond this a ParameterDict takes seconds a step, and gigabytes of state.
TORCH_AT_MOST = 100_000
LARGEST = 10_000_000
# What both containers take at the largest size, with room for others on the machine.
LARGEST_NEEDS_BYTES = 12 << 30
LARGE_BATCH = 65_536
# The most runs of what takes milliseconds, where one that is disturbed counts for much.
SHORT_RUNS = 15

WHOLE_ADAM, EVERY_SIZE = "whole step, Adam", "whole step, Adam, at every size"


def _case(
    title: str,
    sample: Callable[[str, Data, str, Setup], float],
    setup: Setup,
    at_least: float | None,
    subjects: tuple[str, ...] = (BY_HAND, PDRS),
    targets: tuple[Target, ...] = (),
    most_runs: int = SHORT_RUNS,
    **options: Any,
) -> Case[Data]:
    if at_least is not None:
        targets = (Target("ratio", BY_HAND, at_least), *targets)

    def of_case(subject: str, data: Data) -> float:
        return sample(subject, data, title, setup)

    return Case(title, of_case, subjects, targets, most_runs, **options)


def _has_room() -> bool:
    """Whether the largest size fits into the memory that is free."""
    try:
        return bytes_of("MemAvailable", "meminfo", "") >= LARGEST_NEEDS_BYTES
    except OSError:
        return False


CASES: tuple[Case[Data], ...] = (
    _case(
        WHOLE_ADAM,
        whole_step,
        Setup("Adam"),
        at_least=5,
        subjects=(TORCH, DENSE, BY_HAND, PDRS),
        targets=(Target("ratio", DENSE, 40),),
        up_to={TORCH: TORCH_AT_MOST},
        extra_sizes=(TORCH_AT_MOST,),
        slow={TORCH: LARGE_FROM_ENTRIES},
        note=f"Look-up, forward, backward, `clip_grad_norm_`, `step()` and `zero_grad()`, {BATCH:,} random names, here"
        " and below unless a title says otherwise. By hand SparseAdam; dense `Adam(fused=True)` on the whole table;"
        " torch `torch.stack([pd[name] for name in names])` and `Adam(foreach=True)`, once at 80,000 entries and more.",
    ),
    _case("whole step, Adagrad", whole_step, Setup("Adagrad"), at_least=4.5, note="By hand `Adagrad`."),
    _case("whole step, SGD", whole_step, Setup("SGD"), at_least=3.5, note="By hand `SGD`."),
    _case(
        "whole step, Adam, not clipped",
        whole_step,
        Setup("Adam", clipped=False),
        at_least=5,
        note="torch's `clip_grad_norm_` adds the gradients of equal names up for the norm, and SparseAdam does it"
        " again. This row has no such waste.",
    ),
    _case("`step()`, Adam", step_alone, Setup("Adam"), at_least=8, note="Each after a backward pass, not clipped."),
    _case("`step()`, Adagrad", step_alone, Setup("Adagrad"), at_least=5),
    _case("`step()`, Adam, 64 columns", step_alone, Setup("Adam", columns=64), at_least=6),
    _case("`step()`, Adagrad, 64 columns", step_alone, Setup("Adagrad", columns=64), at_least=4),
    _case(
        "`clip_grad_norm_`",
        clip_alone,
        Setup("SGD"),
        at_least=None,
        note="`pdrs.optim.clip_grad_norm_` and torch's, of a sparse gradient. Each after a backward pass.",
    ),
    _case("whole step, Adam, 64 columns", whole_step, Setup("Adam", columns=64, steps=5), at_least=None),
    _case("whole step, Adam, 128 columns", whole_step, Setup("Adam", columns=128, steps=5), at_least=None),
    _case("whole step, Adam, 1,024 names", whole_step, Setup("Adam", batch=1_024, steps=20), at_least=None),
    _case(
        f"whole step, Adam, {LARGE_BATCH:,} names",
        whole_step,
        Setup("Adam", batch=LARGE_BATCH, steps=2),
        at_least=None,
    ),
    _case(
        "whole step, Adam, Zipf names",
        whole_step,
        Setup("Adam", zipf=True),
        at_least=None,
        note="How often a name comes falls with its rank to the power of 1.05. Gradients of equal names add up.",
    ),
    _case(
        f"whole step, Adam, {LARGE_BATCH:,} names, two threads",
        whole_step,
        Setup("Adam", batch=LARGE_BATCH, threads=2, steps=2),
        at_least=None,
        subjects=(BY_HAND, ONE_THREAD, PDRS),
        targets=(Target("ratio", ONE_THREAD, 1.6),),
        note="`torch.set_num_threads(2)`, also by hand. The column *one thread* is pdrs with one.",
    ),
    _case(
        EVERY_SIZE,
        whole_step,
        Setup("Adam"),
        at_least=None,
        most_runs=5,
        larger_sizes=(LARGEST,),
        needs=_has_room,
        note=f"Where {LARGEST_NEEDS_BYTES >> 30} GiB of memory are free.",
    ),
)

SUITE = Suite(
    name="training",
    title="Training steps",
    subjects=(TORCH, DENSE, BY_HAND, ONE_THREAD, PDRS),
    baselines=(TORCH, DENSE, BY_HAND, ONE_THREAD),
    cases=CASES,
    make_data=partial(Data, build=BUILD),
    intro="`pdrs.StackedParameterDict` with `pdrs.optim`, beside a `dict` of ids with an `nn.Embedding(sparse=True)`"
    " and torch's optimizer (*by hand*), the same with `sparse=False` (*dense*), and `torch.nn.ParameterDict`"
    f" (*torch*). Entries are {FLOATS} float32 unless a title says otherwise. Names have 14 characters and are new"
    f" `str` objects in each batch. The loss is the sum of squares. Gradients are clipped to a norm of {MAX_NORM:g}."
    " torch uses one thread unless a title says otherwise. Each name was trained before, and one step goes ahead of the"
    " clock. All figures are per name of a batch.",
    marker="benchmark-training",
    claims=(
        Claim(
            WHOLE_ADAM, f"a whole training step of {BATCH:,} names, Adam", together=BY_HAND, apart=TORCH, names=BATCH
        ),
    ),
    growth_at_most=4,
)
