"""The two demonstrations of CLEANN: whether what is planted decides, and whether it is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from causal_probe import CausalProbeError
from causal_probe.experiments import explain_sentiment, explain_sessions
from causal_probe.experiments.explanations import (
    ADJECTIVES,
    PEOPLE,
    SENTENCES,
    THINGS,
    ExplanationStudy,
    Interval,
    read_ratings,
    synthetic_sessions,
)
from tests.real_model import minilm_folder

METHODS = ["cleann", "cleann, residual", "attention", "gradient", "leave-one-out"]


@pytest.fixture(scope="module")
def study() -> ExplanationStudy:
    return explain_sessions(inputs=12, steps=300)


def test_the_planted_cause_decides_and_is_named(study: ExplanationStudy) -> None:
    """At chance a set of one item of ten names the cause for one session in ten."""
    assert study.accuracy > 0.9
    decides = study.cause_decides
    assert decides is not None
    assert decides.share > 0.8
    for method in METHODS:
        named = study.with_cause[method]
        assert named is not None
        # By the judge itself: a set that changes the decision without the cause is no set of the smallest size here.
        assert named.share <= study.summary.to_pandas().loc[method, "success"]
    residual = study.with_cause["cleann, residual"]
    assert residual is not None
    assert residual.share >= 0.75


def test_each_set_is_one_that_changes_the_decision_by_hand(study: ExplanationStudy) -> None:
    """Of the plain record: sets of one size, none of it the mask itself, and the first decision among the effects."""
    assert study.planted is not None
    for explained, planted in zip(study.explanations, study.planted, strict=True):
        assert list(explained) == METHODS
        for found in explained.values():
            assert len({len(nodes) for nodes in found.sets}) <= 1
            assert all(10 not in nodes and max(nodes) < 10 for nodes in found.sets)
            assert all(after != found.decision for after in found.changed_to)
            assert len(found.sets) == len(found.ranks)
        assert len(planted) == 1


def test_shown_and_kept(study: ExplanationStudy, tmp_path: Path) -> None:
    assert "the planted cause decides" in repr(study)
    assert "with_cause_low" in study._repr_html_()
    study.save(tmp_path / "study.json")
    content = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert content["with_cause"]["cleann"]["share"] == pytest.approx(study.with_cause["cleann"].share)  # type: ignore[union-attr]
    assert len(content["explanations"]) == 12


def test_an_input_without_a_set_counts_as_one_without_the_cause(study: ExplanationStudy) -> None:
    found = study.explanations[0]["attention"]
    none = type(found)("attention", found.target, found.decision, (), (), (), 3)
    assert study.planted is not None
    half = ExplanationStudy(
        study.summary,
        ({"attention": type(found)("attention", 10, 0, ((study.planted[0][0],),), (1,), (2,), 1)}, {"attention": none}),
        study.planted[:2],
        (True, False),
        1.0,
    )
    named = half.with_cause["attention"]
    assert named is not None
    assert named.share == 0.5
    assert half.cause_decides == Interval.of(1, 2)


def test_sessions_hold_one_cause_and_its_effect() -> None:
    rows = synthetic_sessions(500, np.random.default_rng(0))
    causes = [row[:-1][row[:-1] < 30] for row in rows]
    assert all(len(each) == 1 for each in causes)
    assert (rows[:, -1] == 30 + np.concatenate(causes)).all()
    assert len({int(np.flatnonzero(row < 30)[0]) for row in rows}) == 10  # anywhere


def ratings_file(path: Path, users: int, *, seed: int = 0) -> Path:
    """Users who go through the items in a circle, from anywhere."""
    rng = np.random.default_rng(seed)
    lines = [
        f"{user}\t{7 * ((start + step) % 20)}\t{rng.integers(1, 6)}\t{1000 + step}"
        for user, start in enumerate(rng.integers(0, 20, users))
        for step in range(12)
    ]
    path.write_text("\n".join(rng.permutation(lines)) + "\n", encoding="utf-8")
    return path


def test_a_ratings_file_to_the_end(tmp_path: Path) -> None:
    path = ratings_file(tmp_path / "u.data", 60)
    rows = read_ratings(path)
    assert rows.shape == (60, 10)
    assert ((np.diff(rows, axis=1) % 20) == 1).all()  # in the order of time, items numbered without gaps
    study = explain_sessions(ratings=path, inputs=6, steps=120)
    assert study.planted is None
    assert study.with_cause["cleann"] is None
    assert study.cause_decides is None
    assert study.accuracy > 0.5  # chance is one in twenty
    assert "with_cause" not in study.to_pandas()
    assert study.settings["ratings"] == "u.data"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t2\t3\n", "is no ratings file"),
        ("1\t2\t3\t4.5\n", "is no ratings file"),
        ("user\titem\trating\ttime\n1\t2\t3\t4\n", "is no ratings file"),
        ("", "can't be read"),
        ("1\t2\t3\t4\n", "No user in"),
    ],
)
def test_bad_ratings(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "u.data"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CausalProbeError, match=message):
        explain_sessions(ratings=path, inputs=2)
    with pytest.raises(CausalProbeError, match="can't be read"):
        explain_sessions(ratings=tmp_path / "missing", inputs=2)


def test_too_few_users_and_no_inputs(tmp_path: Path) -> None:
    path = ratings_file(tmp_path / "u.data", 8)
    with pytest.raises(CausalProbeError, match="8 users with enough ratings; 5 inputs need 10"):
        explain_sessions(ratings=path, inputs=5)
    for run in (explain_sessions, lambda **options: explain_sentiment("nowhere", **options)):
        with pytest.raises(CausalProbeError, match="`inputs` is 0"):
            run(inputs=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT encoder with random weights that knows the words of the sentences."""
    folder = tmp_path_factory.mktemp("encoder")
    text = " ".join([*SENTENCES, *THINGS, *PEOPLE, *(word for group in ADJECTIVES for word in group)])
    words = sorted({word.strip(",.{}") for word in text.split()} - {"[MASK]", ""})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_sentiment_on_a_tiny_encoder_to_the_end(encoder: Path) -> None:
    study = explain_sentiment(encoder, inputs=3, max_size=1)
    assert study.planted is not None
    assert all(len(nodes) == 1 for nodes in study.planted)
    assert [list(each) for each in study.explanations] == [METHODS] * 3
    assert {each["cleann"].target for each in study.explanations} == {0}
    assert study.settings["encoder"] == encoder.name


@pytest.mark.slow
@pytest.mark.skipif(minilm_folder() is None, reason="needs the MiniLM encoder's wheel")
def test_sentiment_on_minilm() -> None:
    folder = minilm_folder()
    assert folder is not None
    study = explain_sentiment(folder, inputs=3, max_size=2)
    assert study.accuracy == 1
    assert study.cause_decides is not None
    assert study.cause_decides.share == 1
    assert study.with_cause["cleann"].share == 1  # type: ignore[union-attr]
