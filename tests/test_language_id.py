"""The example must learn, answer and keep what it learnt.

The bugs that this hunts: rows that belong to other names, held-out words that were trained on, a saved model that
answers otherwise than the one that was trained, a move that changes what was learnt.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pdrs

EXAMPLE = Path(__file__).parent.parent / "examples" / "language_id.py"
SMALL = ["--ngrams", "300", "--words", "60", "--seconds", "2", "--batch", "512"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language_id", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["language_id"] = module
    spec.loader.exec_module(module)
    return module


def test_it_learns_saves_loads_and_answers(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "model.pt"
    accuracy = example.main([*SMALL, "--save", str(saved), "--word", "Mountain", "--word", "#"])
    assert accuracy > 0.1, "the majority guess is right for one word in forty"
    printed = capsys.readouterr()
    assert re.search(r"moved to float64 and back in \d+\.\d{3} s, by torch's class in \d+\.\d{3} s", printed.out)
    assert "mountain: " in printed.out
    assert "#: none of its n-grams is known" in printed.out
    assert printed.err == "", "a progress bar in a pipe"
    state = torch.load(saved, weights_only=True)
    assert len(state) == 300
    assert all(name.startswith("weights.") for name in state)


def test_each_ngram_owns_a_named_parameter(example: ModuleType) -> None:
    names = ["<a", "ab", "b>", "to", "a."]
    model = example.LanguageId(names, ["x", "y", "z"])
    assert isinstance(model.weights, pdrs.ParameterDict)
    assert [name for name, _ in model.weights.named_parameters()] == names
    with torch.no_grad():
        model.weights["ab"].copy_(torch.tensor([0.0, 5.0, 0.0]))
        model.weights["b>"].copy_(torch.tensor([0.0, 0.0, 1.0]))
    bags = example.Bags(["ab", "b", "q"], model.index)
    scores = model(*bags.batch(torch.tensor([0, 1, 2, 0])))
    assert scores.tolist() == [[0, 5, 1], [0, 0, 1], [0, 0, 0], [0, 5, 1]]
    scores[:, 1].sum().backward()
    assert model.weights["ab"].grad.tolist() == [0, 2, 0]
    assert model.weights["to"].grad is None


def test_timing_a_move_leaves_the_weights_as_they_were(example: ModuleType) -> None:
    weights = pdrs.ParameterDict(zip(["to", "a.", "<b"], torch.randn(3, 4), strict=True))
    before = {name: (weight, weight.detach().clone()) for name, weight in weights.items()}
    example.time_to_move(weights)
    assert list(weights) == list(before)
    for name, (weight, value) in before.items():
        assert weights[name] is weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, value)


def test_no_word_is_both_trained_on_and_held_out(example: ModuleType) -> None:
    languages, train, held_out = example.load_words(50)
    assert len(languages) == len(set(languages)) > 30
    assert set(train.texts).isdisjoint(held_out.texts)
    assert len(train) > 5 * len(held_out) > 0
    assert set(train.labels.tolist()) == set(range(len(languages)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ngrams", "0"], "expected 1 or more, got 0"),
        (["--word", ""], "expected a word"),
        (["--words", "x"], "invalid"),
    ],
    ids=["no n-grams", "an empty word", "words that are no number"],
)
def test_bad_arguments_are_refused(
    example: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
