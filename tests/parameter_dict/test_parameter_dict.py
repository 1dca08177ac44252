"""``ParameterDict`` as a dictionary: every test runs on torch's class and on ours.

The bugs that this hunts: an operation that keeps the index and ``_parameters`` out of step, a value that loses its
identity, an order that differs from torch's (and with it from an optimizer's checkpoint), a call that torch's class
answers and ours does not.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

import pdrs

Kind = Callable[..., nn.ParameterDict]


def parameters(names: str) -> list[tuple[str, Parameter]]:
    """Make pairs of single-letter names and distinct Parameters."""
    return [(name, Parameter(torch.full((2,), float(at)))) for at, name in enumerate(names)]


def same(pd: nn.ParameterDict, pairs: list[tuple[str, Any]]) -> None:
    """Check that a dictionary holds these very objects in this order, whichever way it is asked."""
    names = [name for name, _ in pairs]
    assert len(pd) == len(pairs)
    assert list(pd) == list(pd.keys()) == names
    assert list(reversed(pd)) == names[::-1]
    assert [name for name, _ in pd.items()] == names
    assert all(ours is theirs for ours, (_, theirs) in zip(pd.values(), pairs, strict=True))
    assert all(ours is theirs for (_, ours), (_, theirs) in zip(pd.items(), pairs, strict=True))
    assert all(pd[name] is value and name in pd for name, value in pairs)
    registered = [(name, value) for name, value in pairs if isinstance(value, Parameter)]
    assert [name for name, _ in pd.named_parameters(remove_duplicate=False)] == [name for name, _ in registered]


# -- making one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        iter,
        OrderedDict,
        lambda pairs: (pair for pair in pairs),
        lambda pairs: [list(pair) for pair in pairs],
        lambda pairs: OrderedDict(pairs).items(),
        nn.ParameterDict,
        pdrs.ParameterDict,
    ],
    ids=["list", "tuple", "iterator", "OrderedDict", "generator", "lists", "items", "torch's", "ours"],
)
def test_pairs_and_ordered_mappings_keep_their_order(kind: Kind, wrap: Callable[[Any], Any]) -> None:
    pairs = parameters("cab")
    same(kind(wrap(pairs)), pairs)


@pytest.mark.parametrize("wrap", [dict, UserDict, MappingProxyType], ids=lambda wrap: wrap.__name__)
def test_other_mappings_are_sorted(kind: Kind, wrap: Callable[[Any], Any]) -> None:
    pairs = parameters("cab")
    same(kind(wrap(dict(pairs))), sorted(pairs, key=lambda pair: pair[0]))


def test_a_dict_whose_keys_are_sorted_already_is_copied_as_it_is(kind: Kind) -> None:
    pairs = parameters("abc")
    source = dict(pairs)
    pd = kind(source)
    same(pd, pairs)
    source.clear()
    same(pd, pairs)


@pytest.mark.parametrize("argument", [None, {}, [], (), OrderedDict()], ids=repr)
def test_nothing_makes_an_empty_dictionary_which_is_false(kind: Kind, argument: Any) -> None:
    pd = kind(argument)
    same(pd, [])
    assert not pd
    assert kind(parameters("a"))


def test_the_parameters_argument_has_its_name(kind: Kind) -> None:
    pairs = parameters("a")
    same(kind(parameters=dict(pairs)), pairs)


@pytest.mark.parametrize("argument", [5, 1.5, object()], ids=lambda argument: type(argument).__name__)
def test_what_is_no_iterable_is_a_type_error(kind: Kind, argument: Any) -> None:
    with pytest.raises(TypeError, match=f"iterable of key/value pairs, but got {type(argument).__name__}"):
        kind(argument)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([5], TypeError, r"element #0 should be Iterable; is ?int"),
        ([("a", torch.zeros(1), 3)], ValueError, "element #0 has length 3; 2 is required"),
        (["abc"], ValueError, "element #0 has length 3; 2 is required"),
        ([()], ValueError, "element #0 has length 0; 2 is required"),
    ],
    ids=["no iterable", "three", "a word", "nothing"],
)
def test_what_is_no_pair_is_refused_with_its_place(
    kind: Kind, pairs: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(pairs)
    pd = kind(parameters("x"))
    with pytest.raises(error, match=message):
        pd.update(pairs)
    assert list(pd) == ["x"]


def test_a_pair_may_be_any_iterable_of_two_that_can_be_indexed(kind: Kind) -> None:
    first, second = torch.zeros(1), torch.ones(1)
    pd = kind(["ab", ["c", first], ("d", second)])
    assert pd["a"] == "b"
    assert pd["c"].data_ptr() == first.data_ptr()
    assert list(pd) == ["a", "c", "d"]


def test_of_equal_names_the_first_gives_the_place_and_the_last_the_value(kind: Kind) -> None:
    pairs = parameters("abab")
    same(kind(pairs), [("a", pairs[2][1]), ("b", pairs[3][1])])


# -- values ------------------------------------------------------------------------------------------------------------


def test_a_tensor_becomes_a_parameter_with_the_same_data(kind: Kind) -> None:
    data = torch.zeros(3)
    for pd in (kind({"a": data}), kind([("a", data)]), kind(OrderedDict(a=data))):
        assert type(pd["a"]) is Parameter
        assert pd["a"].data_ptr() == data.data_ptr()
        assert pd["a"].requires_grad
        assert pd["a"].is_leaf
    assert not data.requires_grad
    assert type(data) is torch.Tensor


def test_a_tensor_and_its_parameter_share_the_version_counter(kind: Kind) -> None:
    data = torch.zeros(3)
    pd = kind([("a", data)])
    data.add_(1)
    assert pd["a"]._version == data._version == 1


def test_a_detached_result_of_an_operation_becomes_a_leaf(kind: Kind) -> None:
    source = torch.ones(2, requires_grad=True)
    pd = kind({"a": (source * 2)})
    assert pd["a"].is_leaf
    assert pd["a"].tolist() == [2, 2]
    pd["a"].sum().backward()
    assert source.grad is None


def test_a_frozen_parameter_stays_frozen_and_itself(kind: Kind) -> None:
    frozen = Parameter(torch.zeros(2), requires_grad=False)
    pd = kind({"a": frozen})
    assert pd["a"] is frozen
    assert not pd["a"].requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_a_tensor_that_cannot_require_gradients_is_refused_in_torchs_words(kind: Kind, dtype: torch.dtype) -> None:
    for insert in (
        lambda: kind({"a": torch.zeros(2, dtype=dtype)}),
        lambda: kind().__setitem__("a", torch.zeros(2, dtype=dtype)),
    ):
        with pytest.raises(
            RuntimeError, match="Only Tensors of floating point and complex dtype can require gradients"
        ):
            insert()
    whole = Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    assert kind({"a": whole})["a"] is whole


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.zeros(4, 2).t(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(3, device="meta"),
    ],
    ids=["0-dim", "empty", "transposed", "complex", "bfloat16", "channels last", "meta"],
)
def test_any_tensor_keeps_its_shape_strides_dtype_and_device(kind: Kind, data: torch.Tensor) -> None:
    kept = kind([("a", data)])["a"]
    assert (kept.shape, kept.stride(), kept.dtype, kept.device) == (
        data.shape,
        data.stride(),
        data.dtype,
        data.device,
    )


@pytest.mark.parametrize("value", [1, "text", None, [1, 2], np.zeros(2), object(), torch.float32, len], ids=repr)
def test_any_other_value_is_kept_as_it_is(kind: Kind, value: Any) -> None:
    pd = kind()
    pd["a"] = value
    same(pd, [("a", value)])
    assert pd.a is value
    same(kind(pd), [("a", value)])
    assert pd.pop("a") is value
    same(pd, [])


def test_a_module_becomes_a_child(kind: Kind) -> None:
    child = nn.Linear(2, 1)
    pd = kind([("a", child)])
    same_keys = list(pd)
    assert same_keys == ["a"]
    assert pd["a"] is child
    assert dict(pd.named_children()) == {"a": child}
    assert [name for name, _ in pd.named_parameters()] == ["a.weight", "a.bias"]
    del pd["a"]
    assert list(pd.children()) == []


def test_a_value_may_be_replaced_by_another_kind_where_torch_allows_it(kind: Kind) -> None:
    parameter, child, text = Parameter(torch.zeros(1)), nn.Linear(1, 1), "text"
    pd = kind()
    for value in (text, child, parameter, None, parameter):
        pd["a"] = value
        assert pd["a"] is value
        assert list(pd) == ["a"]


@pytest.mark.parametrize("value", [1, "text", np.zeros(2)], ids=["int", "str", "array"])
def test_a_parameter_or_module_does_not_give_way_to_a_plain_value(kind: Kind, value: Any) -> None:
    for held, what in ((Parameter(torch.zeros(1)), "parameter"), (nn.Linear(1, 1), "child module")):
        pd = kind([("a", held)])
        with pytest.raises(TypeError, match=f"cannot assign '.*' as {what} 'a'"):
            pd["a"] = value
        with pytest.raises(TypeError, match=f"cannot assign '.*' as {what} 'a'"):
            pd.update([("a", value)])
        assert pd["a"] is held
        assert list(pd) == ["a"]


# -- one entry ---------------------------------------------------------------------------------------------------------


def test_setting_appends_a_new_key_and_keeps_the_place_of_an_old_one(kind: Kind) -> None:
    pairs = parameters("ab")
    pd = kind(pairs)
    new, more = Parameter(torch.ones(1)), Parameter(torch.ones(2))
    pd["a"] = new
    pd["c"] = more
    same(pd, [("a", new), pairs[1], ("c", more)])


def test_deleting_keeps_the_order_and_a_key_set_again_goes_to_the_end(kind: Kind) -> None:
    pairs = parameters("abcd")
    pd = kind(pairs)
    del pd["b"]
    same(pd, [pairs[0], *pairs[2:]])
    pd["b"] = pairs[1][1]
    same(pd, [pairs[0], *pairs[2:], pairs[1]])


def test_a_missing_key_raises_an_attribute_error_from_a_look_up(kind: Kind) -> None:
    pd = kind(parameters("a"))
    for look_up in (lambda: pd["missing"], lambda: pd.pop("missing")):
        with pytest.raises(AttributeError, match="missing"):
            look_up()
    with pytest.raises(KeyError, match="missing"):
        del pd["missing"]
    assert list(pd) == ["a"]


@pytest.mark.parametrize("key", [1, None, 1.5, b"a", ("a",)], ids=repr)
def test_a_key_that_is_no_str_is_a_type_error(kind: Kind, key: Any) -> None:
    pd = kind()
    message = rf"not a string \(type is '{type(key).__name__}'\)"
    with pytest.raises(TypeError, match=message):
        pd[key]
    with pytest.raises(TypeError, match=message):
        pd[key] = torch.zeros(1)
    with pytest.raises(TypeError, match=message):
        pd.update([(key, torch.zeros(1))])


def test_what_cannot_be_hashed_cannot_be_asked_for(kind: Kind) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        [] in kind()  # noqa: B015 - the question is what it raises


def test_pop_removes_and_returns(kind: Kind) -> None:
    pairs = parameters("abc")
    pd = kind(pairs)
    assert pd.pop("b") is pairs[1][1]
    same(pd, [pairs[0], pairs[2]])


def test_a_parameter_that_was_set_to_none_is_an_entry_still(kind: Kind) -> None:
    pd = kind(parameters("ab"))
    pd["a"] = pd["b"] = None
    same(pd, [("a", None), ("b", None)])
    assert list(pd.state_dict()) == []
    assert pd.pop("a") is None
    assert pd.popitem() == ("b", None)
    same(pd, [])
    assert not pd._parameters


def test_popitem_takes_the_last_until_there_is_none(kind: Kind) -> None:
    pairs = parameters("abc")
    pd = kind(pairs)
    while pairs:
        name, value = pd.popitem()
        assert (name, value) == pairs.pop()
        same(pd, pairs)
    with pytest.raises(KeyError, match="dictionary is empty"):
        pd.popitem()


def test_draining_from_the_front_takes_all_in_order(kind: Kind) -> None:
    pairs = parameters("abcdefgh")
    pd = kind(pairs)
    while pairs:
        assert pd.pop(next(iter(pd))) is pairs.pop(0)[1]
        same(pd, pairs)


def test_get_returns_the_value_or_the_default(kind: Kind) -> None:
    pairs = parameters("a")
    pd = kind(pairs)
    assert pd.get("a") is pairs[0][1]
    assert pd.get("a", 1) is pairs[0][1]
    assert pd.get("b") is None
    assert pd.get("b", default=1) == 1
    assert pd.get(5, 2) == 2


def test_setdefault_sets_what_is_missing_only(kind: Kind) -> None:
    pairs = parameters("a")
    pd = kind(pairs)
    assert pd.setdefault("a", torch.ones(5)) is pairs[0][1]
    made = pd.setdefault("b", torch.ones(5))
    assert type(made) is Parameter
    assert pd["b"] is made
    assert pd.setdefault("c") is None
    assert list(pd) == ["a", "b", "c"]
    assert pd.setdefault("d", default=4) == 4


def test_clear_removes_every_kind_of_entry_and_nothing_else(kind: Kind) -> None:
    pd = kind([*parameters("ab"), ("c", nn.Linear(1, 1)), ("d", 5)])
    pd.beside = Parameter(torch.zeros(1))
    pd.clear()
    assert list(pd) == []
    assert [name for name, _ in pd.named_parameters()] == ["beside"]
    pairs = parameters("ab")
    pd.update(pairs)
    assert list(pd.items()) == pairs


# -- all entries -------------------------------------------------------------------------------------------------------


def test_update_replaces_in_place_and_appends(kind: Kind) -> None:
    pairs = parameters("abc")
    pd = kind(pairs)
    new = parameters("dbe")
    pd.update(new)
    same(pd, [pairs[0], new[1], pairs[2], new[0], new[2]])


def test_update_with_itself_changes_nothing(kind: Kind) -> None:
    pairs = parameters("bac")
    pd = kind(pairs)
    pd.update(pd)
    same(pd, pairs)


def test_update_takes_exactly_one_argument_by_place_or_name(kind: Kind) -> None:
    pd = kind()
    pairs = parameters("a")
    pd.update(parameters=pairs)
    same(pd, pairs)
    with pytest.raises(TypeError):
        pd.update()
    with pytest.raises(TypeError):
        pd.update(a=torch.zeros(1))


def test_copy_shares_the_values_and_not_the_order(kind: Kind) -> None:
    pairs = [*parameters("ba"), ("m", nn.Linear(1, 1)), ("n", 3)]
    pd = kind(pairs)
    other = pd.copy()
    assert type(other) is kind
    del other["b"]
    other["z"] = torch.zeros(1)
    assert list(pd) == ["b", "a", "m", "n"]
    assert list(other) == ["a", "m", "n", "z"]
    assert all(other[name] is pd[name] for name in "amn")


def test_a_copy_keeps_the_order_after_removals_and_replacements(kind: Kind) -> None:
    pairs = parameters("abcdef")
    pd = kind(pairs)
    a = pd.pop("a")
    del pd["d"]
    pd["a"] = a
    pd["c"] = replaced = Parameter(torch.ones(7))
    same(pd.copy(), [pairs[1], ("c", replaced), pairs[4], pairs[5], pairs[0]])


def test_fromkeys_is_a_method_of_instances_and_shares_a_parameter(kind: Kind) -> None:
    shared = Parameter(torch.zeros(1))
    pd = kind(parameters("x")).fromkeys(["b", "a"], shared)
    assert type(pd) is kind
    same(pd, [("b", shared), ("a", shared)])
    assert [name for name, _ in pd.named_parameters()] == ["b"]
    assert list(kind().fromkeys("ab").items()) == [("a", None), ("b", None)]
    data = torch.zeros(1)
    of_tensor = kind().fromkeys("ab", default=data)
    assert of_tensor["a"] is not of_tensor["b"]
    assert of_tensor["a"].data_ptr() == of_tensor["b"].data_ptr() == data.data_ptr()


def test_union_makes_a_new_dictionary_and_update_in_place_does_not(kind: Kind) -> None:
    left, right = parameters("ba"), parameters("cb")
    one, other = kind(left), kind(right)
    union = one | other
    assert type(union) is kind
    same(union, [right[1], left[1], right[0]])
    same(one, left)
    same(other, right)
    kept = one
    one |= other
    assert one is kept
    same(one, [right[1], left[1], right[0]])


def test_union_with_a_dict_is_of_the_left_ones_type(kind: Kind) -> None:
    left, right = parameters("ba"), parameters("dc")
    union = kind(left) | dict(right)
    assert type(union) is kind
    same(union, [*left, right[1], right[0]])
    with pytest.raises(TypeError, match="iterable of key/value pairs, but got int"):
        kind() | 5
    reverse = dict(left) | kind(right)
    assert type(reverse) is dict
    assert list(reverse.items()) == [*left, *right]
    ordered = OrderedDict(left) | kind(right)
    assert list(ordered) == ["b", "a", "d", "c"]


def test_a_dict_can_be_made_of_it(kind: Kind) -> None:
    pairs = parameters("ba")
    pd = kind(pairs)
    assert dict(pd) == dict(pairs)
    assert list(dict(pd)) == ["b", "a"]
    assert list({**pd}) == ["b", "a"]

    def takes(**given: Any) -> Any:
        return given

    assert takes(**pd) == dict(pairs)


def test_equality_and_hash_are_those_of_identity(kind: Kind) -> None:
    pairs = parameters("a")
    one, other = kind(pairs), kind(pairs)
    assert one == one
    assert one != other
    assert one != dict(pairs)
    assert len({one, other}) == 2


@pytest.mark.parametrize("view", ["keys", "values", "items"])
@pytest.mark.parametrize("change", ["insert", "remove", "clear"])
def test_a_walk_over_a_changed_dictionary_raises(kind: Kind, view: str, change: str) -> None:
    pd = kind(parameters("abc"))
    walk = iter(getattr(pd, view)())
    next(walk)
    match change:
        case "insert":
            pd["new"] = torch.zeros(1)
        case "remove":
            del pd["c"]
        case "clear":
            pd.clear()
    with pytest.raises(RuntimeError, match="changed"):
        next(walk)


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_values_may_be_replaced_during_a_walk(kind: Kind, view: str) -> None:
    pd = kind(parameters("abc"))
    for at, _ in enumerate(getattr(pd, view)()):
        pd["abc"[at]] = torch.ones(1)
    assert all(value.shape == (1,) for value in pd.values())


def test_keys_are_a_live_set_with_an_order(kind: Kind) -> None:
    pd = kind(parameters("ab"))
    keys = pd.keys()
    assert keys & {"b", "x"} == {"b"}
    assert keys | {"x"} == {"a", "b", "x"}
    assert keys - {"a"} == {"b"}
    assert keys ^ {"b", "c"} == {"a", "c"}
    assert keys == {"a", "b"}
    assert keys <= {"a", "b", "c"}
    assert keys.isdisjoint({"x"})
    assert "a" in keys
    assert list(reversed(keys)) == ["b", "a"]
    pd["c"] = torch.zeros(1)
    assert list(keys) == ["a", "b", "c"]
    assert len(keys) == 3


def test_it_refuses_to_be_called(kind: Kind) -> None:
    with pytest.raises(RuntimeError, match="ParameterDict should not be called"):
        kind()(torch.zeros(1))


@pytest.mark.parametrize(
    "key", ["name", "Straße", "名", "🎲", "with space", "a" * 10_000, "9", "class", "a\0b"], ids=ascii
)
def test_these_keys_are_taken_by_both(kind: Kind, key: str) -> None:
    value = Parameter(torch.zeros(1))
    pd = kind([("first", torch.ones(1)), (key, value)])
    assert pd[key] is value
    assert pd["".join(list(key))] is value
    assert getattr(pd, key) is value
    assert [name for name, _ in pd.named_parameters()] == ["first", key]


def test_a_string_enumeration_finds_its_characters(kind: Kind) -> None:
    class Side(str, Enum):
        LEFT = "left"

    pd = kind({"left": Parameter(torch.zeros(1))})
    assert pd[Side.LEFT] is pd["left"]
    assert Side.LEFT in pd
    pd[Side.LEFT] = torch.ones(1)
    assert len(pd) == 1
    assert pd.pop(Side.LEFT).item() == 1
    assert len(pd) == 0


# -- repr --------------------------------------------------------------------------------------------------------------


def test_repr_has_a_line_an_entry(kind: Kind) -> None:
    pd = kind(
        [
            ("left", torch.zeros(2, 3)),
            ("scalar", torch.tensor(1.0)),
            ("meta", torch.zeros(1, device="meta")),
            ("child", nn.Linear(1, 2)),
            ("text", "x"),
            ("nothing", None),
        ]
    )
    assert repr(pd) == (
        "ParameterDict(\n"
        "    (left): Parameter containing: [torch.FloatTensor of size 2x3]\n"
        "    (scalar): Parameter containing: [torch.FloatTensor of size ]\n"
        "    (meta): Parameter containing: [torch.FloatTensor of size 1]\n"
        "    (child): Object of type: Linear\n"
        "    (text): Object of type: str\n"
        "    (nothing): Object of type: NoneType\n"
        "  (child): Linear(in_features=1, out_features=2, bias=True)\n"
        ")"
    ).replace("meta): Parameter containing: [torch.FloatTensor", f"meta): Parameter containing: [{meta_name()}")
    assert repr(kind()) == "ParameterDict()"


def meta_name() -> str:
    """Return what torch calls a meta Parameter's type."""
    return torch.typename(Parameter(torch.zeros(1, device="meta")))


def test_up_to_a_hundred_entries_are_all_shown(kind: Kind) -> None:
    pd = kind((f"n{at}", torch.zeros(1)) for at in range(100))
    assert repr(pd).count("\n") == 101


# -- many --------------------------------------------------------------------------------------------------------------


def test_ten_thousand_entries_in_random_order_come_and_go_as_in_a_dict(kind: Kind) -> None:
    order = np.random.default_rng(0)
    names = [f"n{at}" for at in range(10_000)]
    shared = Parameter(torch.zeros(1))
    pd, model = kind(), {}
    for at in order.integers(len(names), size=30_000):
        name = names[at]
        if name in model:
            del pd[name], model[name]
        else:
            pd[name] = model[name] = shared
    assert list(pd) == list(model)
    assert list(pd._parameters) == list(model)


def test_an_exhausted_walk_stays_exhausted(kind: Kind) -> None:
    pd = kind(parameters("a"))
    walks = [iter(pd.keys()), iter(pd.values()), iter(pd.items())]
    assert [len(list(each)) for each in walks] == [1, 1, 1]
    pd["b"] = torch.zeros(1)
    assert [len(list(each)) for each in walks] == [0, 0, 0]
