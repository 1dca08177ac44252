"""The example must learn, grow, shrink, answer and keep what it learnt.

The bugs that this hunts: rows that belong to other names, held-out words that were trained on or met while asked, a
saved model that answers otherwise than the one that was trained, n-grams that are dropped though they matter, a peer
that is another model, a move that changes what was learnt, a table over processes that learns something else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pdrs

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_id"
SMALL = ["--ngrams", "300", "--words", "60", "--seconds", "1", "--batch", "512", "--keep", "1500"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    modules = ("words", "models", "picture", "ask", "main")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        for name in modules:
            patch.delitem(sys.modules, name, raising=False)
        made = SimpleNamespace(**{name: import_module(name) for name in modules})
        for name in modules:
            del sys.modules[name]
    return made


@pytest.mark.slow
def test_it_learns_prunes_saves_loads_draws_and_answers(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "new" / "model.pt"
    curve = example.main.main([*SMALL, "--save", str(saved), "--word", "Mountain", "--word", "#"])
    printed = capsys.readouterr()
    assert printed.err == "", "a progress bar in a pipe"

    assert curve[0].names > 10_000, "n-grams that were met have no names"
    assert [point.names for point in curve[1:]] == [10_000, 5000, 2000, 1500, 1000]
    assert curve[0].accuracy > 0.2, "the majority guess is right for one word in forty"
    assert curve[0].accuracy > curve[-1].accuracy > 0.05

    state = torch.load(saved, weights_only=True)
    loaded = example.models.Stacked(["any"] * state["weights.float32_42"].shape[1])
    loaded.load_state_dict(state)
    assert len(loaded.weights) == len(loaded.weights.table((42,))) == 1500
    assert saved.with_suffix(".png").read_bytes().startswith(PNG)

    found = re.search(r"majority guess (\S+)%, of a random one 2.4%", printed.out)
    assert found is not None
    assert float(found[1]) < 10
    assert re.search(r"built in \d+\.\d{3} s, by torch's class in \d+\.\d{3} s", printed.out)
    assert re.search(r"moved to float64 and back in \d+\.\d{3} s, by torch's class in \d+\.\d{3} s", printed.out)
    assert f"{curve[0].names:,} names, held-out accuracy {curve[0].accuracy:.1%}" in printed.out
    assert "  300 names, held-out accuracy" in printed.out
    assert "1 table of 1,500 rows, 0.3 MB; saved" in printed.out
    assert "torch.nn.ParameterDict" not in printed.out
    assert "mountain: " in printed.out
    assert "#: none of its n-grams is known" in printed.out


@pytest.mark.slow
def test_the_peer_runs_and_is_drawn_where_it_is_asked(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "new" / "drawn.png"
    example.main.main([*SMALL, "--peer", "--save", str(tmp_path / "model.pt"), "--plot", str(drawn)])
    printed = capsys.readouterr().out
    found = re.search(
        r"\ntorch.nn.ParameterDict: .*\n  trained on .*\n  (\S+) names, held-out accuracy (\S+)%", printed
    )
    assert found is not None
    assert int(found[1].replace(",", "")) > 1000
    assert float(found[2]) > 5
    assert drawn.read_bytes().startswith(PNG)
    assert not (tmp_path / "model.png").exists()


def test_bags_list_each_ngram_once_and_sum_over_all_that_a_word_has(example: SimpleNamespace) -> None:
    bags = example.words.Bags(["aa", "", "aa"])
    assert bags.names == ["<a", "aa", "a>", "<aa", "aa>", "<aa>", "<>"]
    sums = bags.sums(torch.arange(1.0, 8)[:, None])
    assert sums.tolist() == [[21], [7], [21]]
    some = example.words.Bags(["aa", "b", "aaa"], among={"aa", "<aa"})
    assert some.names == ["aa", "<aa"]
    assert some.sums(torch.tensor([[1.0], [10.0]])).tolist() == [[11], [0], [12]]


def test_the_most_frequent_ngrams_come_first(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.words, "ONE_IN_COUNTED", 1)
    assert example.words.most_frequent_ngrams(["aaa", "ab"], 2) == ["<a", "aa"]
    assert example.words.most_frequent_ngrams(["aaa", "ab"], 1000)[2:5] == ["a>", "<aa", "aaa"]


def test_ngrams_get_names_when_they_are_trained_on_and_not_when_they_are_asked_for(example: SimpleNamespace) -> None:
    model = example.models.Stacked(["x", "y"])
    words = example.words.Words(["ab", "to", "ab"], torch.tensor([0, 1, 0]))
    example.models.train(model, words, batch=2, rate=0.1, seed=0)
    assert set(model.weights) == set(example.words.Bags(["ab", "to"]).names)
    before = list(model.weights)
    accuracy = model.accuracy(example.words.Bags(["ab", "to", "new"]), torch.tensor([0, 1, 0]))
    assert accuracy >= 2 / 3
    assert list(model.weights) == before


@pytest.mark.parametrize("kind", ["Peer", "Separate"])
def test_all_kinds_learn_the_same(example: SimpleNamespace, kind: str) -> None:
    languages, words, _ = example.words.load_words(10)
    stacked = example.models.Stacked(languages)
    names = example.words.Bags(words.texts).names
    other = getattr(example.models, kind)(languages, *([names] if kind == "Separate" else []))
    for model in (stacked, other):
        trained = example.models.train(model, words, batch=100, rate=0.1, seed=3)
        assert (trained.words, trained.steps) == (len(words), -(-len(words) // 100))
    assert len(other.weights) == len(stacked.weights) == len(names)
    torch.testing.assert_close(other.eval().rows(names), stacked.eval().rows(names), rtol=1e-4, atol=1e-6)
    assert stacked.rows(names).abs().sum() > 1


def test_ngrams_that_were_not_chosen_count_for_nothing(example: SimpleNamespace) -> None:
    names = ["<a", "ab", "b>", "to", "a."]
    model = example.models.Separate(["x", "y", "z"], names)
    assert isinstance(model.weights, pdrs.ParameterDict)
    assert [name for name, _ in model.weights.named_parameters()] == names
    with torch.no_grad():
        model.weights["ab"].copy_(torch.tensor([0.0, 5.0, 0.0]))
        model.weights["b>"].copy_(torch.tensor([0.0, 0.0, 1.0]))
    texts = ["ab", "b", "q", "ab"]
    scores = model(model.bags(texts))
    assert scores.tolist() == model(example.words.Bags(texts)).tolist() == [[0, 5, 1], [0, 0, 1], [0, 0, 0], [0, 5, 1]]
    scores[:, 1].sum().backward()
    assert model.weights["ab"].grad.tolist() == [0, 2, 0]
    assert model.weights["to"].grad is None


def test_pruning_keeps_what_has_the_largest_norms_in_order(example: SimpleNamespace) -> None:
    model = example.models.Stacked(["x", "y"])
    model.weights.update(
        [("<a", torch.tensor([3.0, 0])), ("ab", torch.tensor([0, 1.0])), ("b>", torch.tensor([2.0, -5]))]
    )
    model.prune(2)
    assert list(model.weights) == ["<a", "b>"]
    assert model.eval().rows(["b>", "ab"]).tolist() == [[2, -5], [0, 0]]


def test_what_is_loaded_scores_as_what_was_saved(example: SimpleNamespace, tmp_path: Path) -> None:
    languages, words, held_out = example.words.load_words(20)
    model = example.models.Stacked(languages)
    example.models.train(model, words, batch=200, rate=0.1, seed=0)
    model.prune(700)
    bags = example.words.Bags(held_out.texts)
    loaded = example.main.save_and_load(model, tmp_path / "model.pt").eval()
    assert list(loaded.weights) == list(model.weights)
    assert torch.equal(loaded(bags), model.eval()(bags))
    assert loaded(bags).abs().sum() > 0


def test_timing_a_move_leaves_the_weights_as_they_were(example: SimpleNamespace) -> None:
    weights = pdrs.ParameterDict(zip(["to", "a.", "<b"], torch.randn(3, 4), strict=True))
    before = {name: (weight, weight.detach().clone()) for name, weight in weights.items()}
    example.main.time_to_move(weights)
    assert list(weights) == list(before)
    for name, (weight, value) in before.items():
        assert weights[name] is weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, value)


def test_no_word_is_both_trained_on_and_held_out(example: SimpleNamespace) -> None:
    languages, train, held_out = example.words.load_words(50)
    assert len(languages) == len(set(languages)) > 30
    assert set(train.texts).isdisjoint(held_out.texts)
    assert len(train) > 5 * len(held_out) > 0
    assert set(train.labels.tolist()) == set(range(len(languages)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ngrams", "0"], "expected 1 or more, got 0"),
        (["--keep", "-1"], "expected 1 or more, got -1"),
        (["--word", ""], "expected a word"),
        (["--words", "x"], "invalid"),
    ],
    ids=["no n-grams", "a model of no names", "an empty word", "words that are no number"],
)
def test_bad_arguments_are_refused(
    example: SimpleNamespace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main.main(arguments)
    assert message in capsys.readouterr().err


def sharded(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    """Return the losses and the accuracy of the table that is spread over so many processes."""
    found = folder / "losses.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(EXAMPLE / "sharded.py")]
    options = (*options, "--words", "300", "--batch", "1024", "--losses", str(found))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("RANK", None)
    subprocess.run([*command, *options], check=True, timeout=300, env=environment, capture_output=True)
    told: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what one process learns."""
    return sharded(tmp_path_factory.mktemp("whole"), 1)


@pytest.mark.slow
def test_a_table_over_processes_learns_the_same(
    example: SimpleNamespace, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert len(whole["losses"]) == 12
    assert whole["losses"][-1] < whole["losses"][0]
    both = sharded(tmp_path, 2)
    assert both["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert both["accuracy"] == whole["accuracy"]
    # The model of main.py, with all names in one process.
    task = example.main.Task(example.main.parse(["--words", "300", "--batch", "1024"]))
    model = example.models.Stacked(task.languages)
    task.learn(model)
    assert task.accuracy(model) == pytest.approx(whole["accuracy"], abs=1e-6)


@pytest.mark.slow
def test_a_table_saved_on_two_processes_goes_on_on_three(whole: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    first = sharded(tmp_path, 2, "--stop", "7", "--save", str(saved))
    rest = sharded(tmp_path, 3, "--resume", str(saved))
    assert [*first["losses"], *rest["losses"]] == pytest.approx(whole["losses"], abs=1e-5)
    assert rest["accuracy"] == whole["accuracy"]
