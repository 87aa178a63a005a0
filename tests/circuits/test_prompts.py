"""Prompts: metrics against plain loops, files that are no prompts, and tasks whose answers follow from their texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jaxtyping
import pytest
import torch

from causal_probe.circuits import Prompts, read_prompts, task_prompts
from causal_probe.circuits.prompt_tasks import TASKS, ordered_words
from causal_probe.circuits.prompts import Texts, prompts_of
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer


class Words:
    """A tokenizer of words behind spaces, digits and signs each for itself, or numbers in pairs of digits; a word of more than nine letters is two."""

    all_special_ids: tuple[int, ...] = ()
    bos_token_id = eos_token_id = pad_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, *, pairs: bool = False) -> None:
        self.pieces: list[str] = []
        self.digits = 2 if pairs else 1

    def cut(self, text: str) -> list[str]:
        found, at = [], 0
        while at < len(text):
            end = at + 1
            if text[at].isdigit():
                end = at + (self.digits if text[at : at + self.digits].isdigit() else 1)
            elif text[at].isalpha() or (text[at] == " " and text[at + 1 : at + 2].isalpha()):
                while end < len(text) and text[end].isalpha() and end - at < 10:
                    end += 1
            found.append(text[at:end])
            at = end
        return found

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces = self.cut(text)
        self.pieces += [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        return {"input_ids": [self.pieces.index(piece) for piece in pieces]}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(400)}

    def text(self, tokens: torch.Tensor) -> str:
        return "".join(self.pieces[token] for token in tokens.tolist() if token >= 0)


def worded(**options: Any) -> Any:
    model = DisentangledTransformer(d_vocab=400, n_positions=64)
    model.tokenizer = Words(**options)
    return model


@pytest.fixture
def production() -> Iterator[None]:
    """Without the checks of shapes that pytest alone has."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def some(**changes: Any) -> Prompts:
    given = {
        "name": "mine",
        "tokens": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "scored": (1, 2),
        "right": torch.tensor([[[1, 2], [3, -1]], [[4, -1], [5, -1]]]),
        "wrong": torch.tensor([[[0], [0]], [[1], [2]]]),
        **changes,
    }
    return Prompts(**given)


def test_metrics_are_those_of_a_plain_loop() -> None:
    prompts, logits = some(), torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([1, 0, 1])
    for metric in ("logit-difference", "log-probability", "probability-difference"):
        expected = []
        for row, number in enumerate(rows.tolist()):
            values = []
            for place, at in enumerate(prompts.scored):
                scores = logits[row, at].tolist()
                total = sum(math.exp(x) for x in scores)
                right = [scores[t] for t in prompts.right[number, place].tolist() if t >= 0]
                wrong = [scores[t] for t in prompts.wrong[number, place].tolist()]
                p = [sum(math.exp(x) for x in each) / total for each in (right, wrong)]
                values.append(
                    {
                        "logit-difference": sum(right) / len(right) - sum(wrong) / len(wrong),
                        "log-probability": math.log(p[0]),
                        "probability-difference": p[0] - p[1],
                    }[metric]
                )
            expected.append(sum(values) / len(values))
        assert prompts.score(metric)(logits, rows).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored": ()}, "`scored` holds positions of 0 to 2"),
        ({"scored": (1, 3)}, "`scored` holds positions of 0 to 2"),
        ({"right": torch.ones(2, 1, 1).long()}, r"`right` is \[2, 1, 1\]"),
        ({"right": torch.full((2, 2, 1), -1)}, "has no token that is right"),
        ({"wrong": torch.full((2, 2, 1), 5)}, "Prompt 1 has a token that is right and wrong"),
        ({"corrupted": torch.zeros(2, 4).long()}, "aligned with the clean ones"),
        ({"corrupted": torch.tensor([[0, 1, 1], [3, 4, 5]])}, "The corrupted prompt 1 equals its clean one"),
    ],
)
@pytest.mark.usefixtures("production")
def test_what_can_not_be_prompts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        some(**changes)


def test_a_metric_that_compares_needs_wrong_answers() -> None:
    prompts = some(wrong=None)
    with pytest.raises(CausalProbeError, match="choose log-probability"):
        prompts.score()
    assert bool(torch.isfinite(prompts.score("log-probability")(torch.zeros(2, 3, 6), torch.arange(2))).all())
    with pytest.raises(CausalProbeError, match="Unknown metric 'accuracy'; choose from logit-difference"):
        prompts.score("accuracy")


def test_a_file_is_read_and_answers_are_read_in_their_place(tmp_path: Path) -> None:
    file, model = tmp_path / "mine.jsonl", worded()
    lines = [
        {"clean": "a cat and a", "answer": " dog", "wrong": [" cat", " cow"], "corrupted": "a cow and a"},
        {"clean": "a dog and a", "answer": [" cat"], "wrong": " dog", "corrupted": "a cow and a"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    prompts = read_prompts(model, file)
    assert prompts.name == "mine"
    assert len(prompts) == 2
    text = model.tokenizer.text
    assert [text(row) for row in prompts.tokens] == [line["clean"] for line in lines]
    assert text(prompts.right[0, 0]) == " dog"
    assert [text(row[0]) for row in prompts.wrong] == [" cat cow", " dog"]
    assert text(prompts.corrupted[1]) == "a cow and a"
    assert prompts.scored == (3,)


GOOD = '{"clean": "a cat and a", "answer": " dog"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "There are no prompts"),
        ("{", "bad.jsonl, line 1: this is no JSON"),
        ("[1]", "line 1: found list"),
        (GOOD + '\n{"clean": "a b"}', "line 2: answer is missing"),
        ('{"answer": " b"}', "line 1: clean is missing"),
        ('{"clean": 3, "answer": " b"}', "are texts"),
        ('{"clean": "a", "answer": {"b": 1}}', "are texts"),
        ('{"clean": "a", "answer": [" b", 2]}', "are texts"),
        ('{"clean": "a", "answer": " b", "target": 1}', "unknown 'target'"),
        ('{"clean": "a cat and a", "answer": "dog"}', "The answer 'dog' is no token of its own behind"),
        ('{"clean": "a cat and a", "answer": " hippopotamus"}', "' hippopotamus' is 2 tokens behind"),
        (GOOD + '\n{"clean": "a cat and", "answer": " a"}', "prompt 1 has 3"),
        (GOOD + '\n{"clean": "a cat and a", "answer": " a", "wrong": " b"}', "Prompt 1 has a `wrong`, unlike prompt 0"),
        ('{"clean": "a cat", "answer": " a", "corrupted": "a"}', "corrupted prompt 0 has 1 tokens, its clean one 2"),
        ('{"clean": "a cat", "answer": " a", "corrupted": "a cat"}', "corrupted prompt 0 equals its clean one"),
        ('{"clean": "a cat", "answer": " a", "wrong": " a"}', "right and wrong"),
    ],
)
def test_files_that_are_no_prompts(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(CausalProbeError, match=message):
        read_prompts(worded(), file)


def test_files_that_are_no_text_and_models_without_words(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path / "b.jsonl", "no text in UTF-8"),
        (tmp_path, "directory"),
        (tmp_path / "x", "No such"),
    ):
        with pytest.raises(CausalProbeError, match=f"can't be read: .*{message}"):
            read_prompts(worded(), path)
    bare = DisentangledTransformer(d_vocab=60, n_positions=64)
    with pytest.raises(CausalProbeError, match="has no tokenizer"):
        prompts_of(bare, [Texts("a", (" b",))])
    with pytest.raises(CausalProbeError, match="'induction' needs no words"):
        task_prompts(bare, "ioi")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "induction"])
def test_a_task_s_prompts_are_different_and_end_before_one_token(task: str) -> None:
    model = worded()
    prompts, again = (task_prompts(model, task, n=60, seed=3) for _ in range(2))
    assert torch.equal(prompts.tokens, again.tokens)
    assert not torch.equal(prompts.tokens, task_prompts(model, task, n=60, seed=4).tokens)
    assert len(prompts) == len(prompts.tokens.unique(dim=0)) == 60
    assert prompts.corrupted is not None
    assert prompts.wrong is not None
    assert prompts.scored == (prompts.tokens.shape[1] - 1,)


def test_the_answers_of_the_tasks() -> None:
    model = worded()
    text = model.tokenizer.text
    ioi = task_prompts(model, "ioi", n=20)
    for row, right, wrong, corrupted in zip(ioi.tokens, ioi.right, ioi.wrong, ioi.corrupted, strict=True):
        assert text(row).split().count(text(right[0]).strip()) == 1
        assert sum(word.strip(",") == text(wrong[0]).strip() for word in text(row).split()) == 2
        assert text(right[0]) not in text(corrupted)
    order = task_prompts(model, "successor", n=20)
    letters = [
        (text(row).split()[-1], text(right[0]).strip()) for row, right in zip(order.tokens, order.right, strict=True)
    ]
    assert all(ord(after) == ord(last) + 1 for last, after in letters if len(last) == 1)
    docs = task_prompts(model, "docstring", n=5)
    for row, right in zip(docs.tokens, docs.right, strict=True):
        assert text(row).split("(self, ")[1].split(", ")[2] == text(right[0]).strip()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", ["numerals", "number-words", "months", "weekdays", "letters"])
def test_a_sequence_goes_on(name: str, pairs: bool) -> None:
    model = worded(pairs=pairs)
    members = [word.strip() for word in ordered_words(model, name)]
    prompts, text = task_prompts(model, name, n=30), model.tokenizer.text
    for row, right, wrong, corrupted in zip(
        prompts.tokens, prompts.right, prompts.wrong, prompts.corrupted, strict=True
    ):
        shown, other = (
            [part.split()[-1].strip("#") for part in text(each).split(".")[:3]] for each in (row, corrupted)
        )
        places = [members.index(each) for each in shown]
        assert places == list(range(places[0], places[0] + 3))
        assert text(right[0]).strip() == members[places[2] + 1]
        assert text(wrong[0]).strip() == shown[2]
        assert other != shown
        assert sorted(other) == sorted(shown)


def test_numerals_are_those_that_are_one_token() -> None:
    assert ordered_words(worded(), "numerals") == [str(i) for i in range(1, 10)]  # digit by digit, behind " #"
    assert ordered_words(worded(pairs=True), "numerals") == [str(i) for i in range(1, 31)]


@pytest.mark.parametrize("pairs", [False, True])
def test_later_years_are_right_however_years_are_cut(pairs: bool) -> None:
    model = worded(pairs=pairs)
    prompts = task_prompts(model, "greater-than", n=20)
    text = model.tokenizer.text
    for row, right, wrong in zip(prompts.tokens, prompts.right, prompts.wrong, strict=True):
        begin = text(row).split("year ")[1][2:4]
        begin = begin if pairs else begin[0]
        answers = [[model.tokenizer.pieces[t] for t in each[0].tolist() if t >= 0] for each in (right, wrong)]
        assert {int(each) for each in answers[0]} == set(range(int(begin) + 1, 100 if pairs else 10))
        assert {int(each) for each in answers[1]} == set(range(int(begin)))


def test_induction_s_answers_are_what_came_before() -> None:
    prompts = task_prompts(DisentangledTransformer(d_vocab=60, n_positions=64), "induction", n=6)
    for number, row in enumerate(prompts.tokens.tolist()):
        for place, at in enumerate(prompts.scored):
            earlier = [i for i in range(at) if row[i] == row[at]]
            assert row[earlier[-1] + 1] == prompts.right[number, place, 0]
        assert set(prompts.corrupted[number, :20].tolist()) != set(row[:20])
        assert prompts.corrupted[number, 20:].tolist() == row[20:]


def test_what_can_not_be_a_task() -> None:
    with pytest.raises(CausalProbeError, match="Unknown task 'sums'; choose from induction, ioi"):
        task_prompts(worded(), "sums")
    with pytest.raises(CausalProbeError, match="different prompts of the task successor; 550 were asked for"):
        task_prompts(worded(), "successor", n=550)
    with pytest.raises(CausalProbeError, match="there are at least 2"):
        task_prompts(DisentangledTransformer(d_vocab=60, n_positions=64), "induction", n=1)
    model = worded()
    model.tokenizer.cut = list
    for task in ("ioi", "successor", "docstring", "greater-than", "months"):
        with pytest.raises(CausalProbeError, match="one token"):
            task_prompts(model, task)
    model = SimpleNamespace()
    with pytest.raises(CausalProbeError, match="model"):
        task_prompts(model, "induction")
