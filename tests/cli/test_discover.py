"""``causal-probe discover``: the command, its folder and its report, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from causal_probe import CausalProbeError, experiments
from causal_probe.cli.main import main
from causal_probe.reports import report

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "<b>", "##s"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT classifier with random weights, saved as a Hugging Face model."""
    import torch

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["discover", *arguments])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_folder_and_report(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    code, shown, _ = run(
        capsys,
        str(classifier),
        "--text",
        "the cat sat on a mat",
        "--explain",
        "0",
        "--samples",
        "100",
        "--out",
        str(out),
    )
    assert code == 0
    assert "layer 1, 2 graphs over 8 nodes, icd at level 0.01 with 100 samples" in shown
    assert "Decision at '[CLS]'" in shown
    content = json.loads((out / "discovery.json").read_text(encoding="utf-8"))
    assert sorted(content["files"]) == sorted(path.name for path in out.iterdir())
    assert content["discovery"]["nodes"] == ["[CLS]", "the", "cat", "sat", "on", "a", "mat", "[SEP]"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Why this decision?" in page
    assert "edge-" in page


def test_json_words_and_no_markup(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(
        capsys, str(classifier), "--text", "the cats sat", "--words", "--head", "1", "--samples", "50", "--json"
    )
    assert code == 0
    content = json.loads(shown)
    assert content["discovery"]["groups"] == [[0], [1], [2, 3], [4], [5]]
    assert [graph["head"] for graph in content["discovery"]["graphs"]] == [1]
    result = experiments.discover_in_text(classifier, "the <b> sat", samples=50)
    page = report(result).to_html()
    assert "&lt;b&gt;" in page
    assert "the <b> sat" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " "], "The text is empty"),
        (["--text", "the cat " * 8], "The text has 18 tokens and the model takes 12"),
        (["--text", "the cat", "--level", "1"], "--level is 1.0"),
        (["--text", "the cat", "--head", "2"], "the layer has the heads 0..1"),
        (["--text", "the cat", "--head", "x"], "--head is 'x'"),
        (["--text", "the cat", "--layer", "2"], "there are 2 layers"),
        (["--text", "the cat", "--samples", "2"], "at least 4"),
        (["--text", "the cat", "--explain", "dog"], "The token 'dog' does not occur"),
        (["--text", "the the", "--explain", "the"], "occurs 2 times"),
        (["--text", "the cat", "--residual", "1"], "--residual is 1.0"),
        (["--text", "the cat", "--source", "values"], ""),
    ],
)
def test_bad_input(
    classifier: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = run(capsys, str(classifier), *arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_unknown_algorithm(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, str(classifier), "--text", "the cat", "--algorithm", "lingam")
    assert code == 2
    assert "lingam" in error
    with pytest.raises(CausalProbeError, match=r"`algorithm` is 'lingam'\. It must be 'pc' or"):
        experiments.discover_in_text(classifier, "the cat", algorithm="lingam")


def test_a_text_that_the_tokenizer_does_not_know_is_refused_and_in_part_warned_of(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, str(classifier), "--text", "EVQLVESGGG")
    assert (code, out) == (2, "")
    assert err.startswith(
        "Error: The tokenizer knows 0 of the text's 1 tokens; each of the others is a token that stands for any"
    )
    code, _, err = run(capsys, str(classifier), "--text", "the EVQLVESGGG sat")
    assert code == 0
    assert "Warning: The tokenizer knows 2 of the text's 3 tokens; " in err
