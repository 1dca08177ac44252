"""A ParameterDict in training: optimizers, functional calls, parametrizations, lazy entries, tensor subclasses.

The bugs that this hunts: an entry that an optimizer, a transform or a wrapper does not see as torch's class shows it,
and one that has been replaced where the dictionary still shows the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import Parameter, UninitializedParameter
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm

Kind = type[nn.ParameterDict]


class Polynomial(nn.Module):
    """A model whose weights are entries: w2 * x**2 + w1 * x + w0."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.weights = kind([(f"w{n}", torch.full((1,), float(n))) for n in (2, 0, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return sum((value * x ** int(key[1:]) for key, value in self.weights.items()), torch.zeros(()))


def loss_of(model: nn.Module) -> Tensor:
    return (model(torch.linspace(-1, 1, 8)) - 3).square().mean()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_state(kind: Kind, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    through = Polynomial(kind)
    optimizer = make(through.parameters())
    before = loss_of(through).item()
    train(through, optimizer, 2)
    resumed = copy.deepcopy(through)
    other = make(resumed.weights.named_parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(through, optimizer, 5)
    train(resumed, other, 5)
    assert loss_of(through).item() < before
    assert list(resumed.weights) == ["w2", "w0", "w1"]
    assert all(map(torch.equal, through.parameters(), resumed.parameters()))


def test_an_optimizer_keeps_the_objects_through_moves_and_loads(kind: Kind) -> None:
    model = Polynomial(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.double().float()
    model.load_state_dict(Polynomial(kind).state_dict())
    before = model.weights["w2"].item()
    loss_of(model).backward()
    optimizer.step()
    assert model.weights["w2"].item() != before


def test_gradients_are_clipped_and_parameters_put_into_a_vector(kind: Kind) -> None:
    pd = Polynomial(kind).weights
    assert parameters_to_vector(pd.parameters()).tolist() == [2, 0, 1]
    vector_to_parameters(torch.tensor([5.0, 6.0, 7.0]), pd.parameters())
    assert [value.item() for value in pd.values()] == [5, 6, 7]
    torch.cat(list(pd.values())).square().sum().backward()
    clip_grad_norm_(pd.parameters(), 1.0)
    assert torch.cat([value.grad for value in pd.values()]).norm().item() == pytest.approx(1, abs=1e-4)


def test_parameter_groups_are_chosen_by_name(kind: Kind) -> None:
    pd = Polynomial(kind).weights
    groups = [{"params": [pd["w0"]], "lr": 0.0}, {"params": [pd[key] for key in pd if key != "w0"]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    torch.cat(list(pd.values())).sum().backward()
    optimizer.step()
    assert [value.item() for value in pd.values()] == [1, 0, 0]


# -- functional --------------------------------------------------------------------------------------------------------


def test_a_functional_call_uses_other_values_and_puts_the_own_ones_back(kind: Kind) -> None:
    model = Polynomial(kind)
    own = list(model.weights.values())
    other = {f"weights.w{n}": torch.full((1,), 10.0) for n in range(3)}
    assert functional_call(model, other, (torch.ones(1),)).item() == 30
    assert functional_call(model, {"weights.w0": torch.full((1,), 5.0)}, (torch.ones(1),)).item() == 8
    assert all(one is two for one, two in zip(model.weights.values(), own, strict=True))
    assert list(model.weights) == ["w2", "w0", "w1"]
    assert [name for name, _ in model.named_parameters()] == ["weights.w2", "weights.w0", "weights.w1"]


def test_gradients_are_functions(kind: Kind) -> None:
    model = Polynomial(kind)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    gradient = grad(lambda parameters: functional_call(model, parameters, (torch.tensor(3.0),)).sum())(parameters)
    assert {name: value.item() for name, value in gradient.items()} == {
        "weights.w2": 9,
        "weights.w0": 1,
        "weights.w1": 3,
    }


def test_an_ensemble_is_one_call(kind: Kind) -> None:
    models = [Polynomial(kind) for _ in range(3)]
    for n, model in enumerate(models):
        vector_to_parameters(torch.full((3,), float(n)), model.parameters())
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (torch.ones(1),)))(parameters, buffers)
    assert outputs.flatten().tolist() == [0, 3, 6]


# -- entries that something else takes over ----------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def test_an_entry_is_parametrized_and_freed(kind: Kind) -> None:
    pd = kind([("a", torch.ones(2)), ("b", torch.ones(2))])
    parametrize.register_parametrization(pd, "a", Doubled())
    assert pd["a"].grad_fn is not None
    assert list(pd) == ["a", "b"]
    assert "a" in pd
    assert pd["a"].tolist() == pd.a.tolist() == next(iter(pd.values())).tolist() == [1, 1]
    assert [key for key, _ in pd.items()] == ["a", "b"]
    assert [name for name, _ in pd.named_parameters()] == ["b", "parametrizations.a.original"]
    assert isinstance(pd, kind)
    pd.a = torch.full((2,), 6.0)
    assert pd.parametrizations.a.original.tolist() == [3, 3]
    with parametrize.cached():
        assert pd["a"] is pd["a"]
    with pytest.raises(KeyError, match="attribute 'a' already exists"):
        pd["a"] = torch.zeros(2)
    assert list(copy.deepcopy(pd)) == ["a", "b"]
    parametrize.remove_parametrizations(pd, "a")
    assert type(pd) is kind
    assert type(pd["a"]) is Parameter
    assert pd["a"].tolist() == [6, 6]
    assert list(pd) == ["a", "b"]
    assert [name for name, _ in pd.named_parameters()] == ["b", "a"]
    assert list(pd.items()) == [("a", pd.a), ("b", pd.b)]


def test_an_entry_has_a_weight_norm(kind: Kind) -> None:
    pd = kind([("a", torch.ones(2, 2)), ("b", torch.ones(2))])
    weight_norm(pd, "a")
    pd["a"].sum().backward()
    assert list(pd.state_dict()) == ["b", "parametrizations.a.original0", "parametrizations.a.original1"]
    other = kind([("a", torch.zeros(2, 2)), ("b", torch.zeros(2))])
    weight_norm(other, "a")
    other.load_state_dict(pd.state_dict())
    assert torch.allclose(other["a"], torch.ones(2, 2))


def test_an_entry_is_pruned(kind: Kind) -> None:
    pd = kind([("a", torch.ones(4)), ("b", torch.ones(2))])
    prune.custom_from_mask(pd, "a", torch.tensor([1, 0, 1, 0]))
    assert pd["a"].tolist() == [1, 0, 1, 0]
    assert [value.shape[0] for value in pd.values()] == [4, 2]
    assert [name for name, _ in pd.named_parameters()] == ["b", "a_orig"]
    assert list(pd) == ["a", "b"]
    prune.remove(pd, "a")
    assert type(pd["a"]) is Parameter
    assert list(pd) == ["a", "b"]
    assert list(pd.items()) == [("a", pd.a), ("b", pd.b)]


def test_a_lazy_entry_is_made_real_where_it_is(kind: Kind) -> None:
    pd = kind([("lazy", UninitializedParameter()), ("b", torch.ones(2))])
    lazy = pd["lazy"]
    assert type(lazy) is UninitializedParameter
    pd.double()
    lazy.materialize((2, 3))
    assert pd["lazy"] is lazy
    assert (pd["lazy"].dtype, pd["lazy"].shape) == (torch.float64, (2, 3))
    assert type(pd["lazy"]) is Parameter
    assert list(pd) == ["lazy", "b"]


def test_a_lazy_entry_is_not_saved_before_it_is_real(kind: Kind) -> None:
    pd = kind([("lazy", UninitializedParameter())])
    with pytest.raises(ValueError, match="Attempted to use an uninitialized parameter"):
        pd.state_dict()
    assert list(pd.state_dict(keep_vars=True)) == ["lazy"]


# -- tensors of other classes ------------------------------------------------------------------------------------------


class Named(Parameter):
    note = "mine"


class Logged(Tensor):
    """A tensor whose operations are noted."""

    log: list[str] = []  # noqa: RUF012 - one for all, on purpose

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.log.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """A wrapper around a tensor, without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda one: one.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(Tensor, cls, result)


@pytest.mark.parametrize("update", [False, True])
def test_subclasses_of_parameter_and_tensor_stay_what_they_are(kind: Kind, update: bool) -> None:
    pd = kind()
    values = {"logged": Logged([1.0]), "named": Named(torch.ones(1)), "wrapped": Wrapped(torch.ones(2))}
    if update:
        pd.update(values)
    else:
        for key, value in values.items():
            pd[key] = value
    assert list(pd) == ["logged", "named", "wrapped"]
    assert pd["named"] is values["named"]
    assert type(pd["logged"]) is Logged
    assert isinstance(pd["logged"], Parameter)
    assert type(pd["wrapped"]) is Wrapped
    assert isinstance(pd["wrapped"], Parameter)
    assert all(value.requires_grad for value in pd.values())
    assert [name for name, _ in pd.named_parameters()] == ["logged", "named", "wrapped"]
    state = pd.state_dict()
    assert type(state["wrapped"]) is Wrapped
    assert type(state["logged"]) is Logged
    pd.double()
    assert {value.dtype for value in pd.values()} == {torch.float64}
    assert pd["named"].note == "mine"
    assert type(pd["wrapped"]) is Wrapped


def test_a_tensor_of_another_class_is_asked_for_its_detach(kind: Kind) -> None:
    pd = kind({"x": Logged([1.0])})
    Logged.log.clear()
    pd.state_dict()
    assert "detach" in Logged.log


# -- distributed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only process of a gloo group."""
    meeting = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without distributed")
@pytest.mark.usefixtures("world_of_one")
def test_data_parallel_training_sees_every_entry(kind: Kind) -> None:
    model, alone = Polynomial(kind), Polynomial(kind)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss_of(parallel).backward()
    loss_of(alone).backward()
    for key, value in model.weights.items():
        assert torch.equal(value.grad, alone.weights[key].grad)
    assert list(parallel.state_dict()) == ["module.weights.w2", "module.weights.w0", "module.weights.w1"]
