"""Edges at single positions, and the circuit of one prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from causal_probe import circuits
from causal_probe.circuits.contrasts import Contrast
from causal_probe.circuits.interventions import edges_of, placed
from causal_probe.circuits.prompts import Prompts
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import model_circuit
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import undisturbed
from causal_probe.reports.circuit import circuit_page
from tests import tiny_huggingface as tiny
from tests.architectures import zoo
from tests.circuits.test_interventions import TOKENS, made


def at(edge: tuple[str, str], position: int) -> tuple[str, str]:
    return f"{edge[0]}@{position}", f"{edge[1]}@{position}"


class OnlyAt:
    """A contrast that replaces nothing but at one position."""

    def __init__(self, contrast: Contrast, position: int) -> None:
        self.contrast, self.position = contrast, position

    def delta(self, source: str, now: torch.Tensor | None = None) -> torch.Tensor:
        whole = self.contrast.delta(source, now)
        kept = torch.zeros_like(whole)
        kept[:, self.position] = whole[:, self.position]
        return kept


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "Gemma 2"])
def test_an_edge_at_a_position_is_the_edge_where_nothing_else_is_replaced(name: str) -> None:
    original, _ = zoo.hooked(zoo.ARCHITECTURES[name])
    model = to_hooked(original.double())
    with undisturbed(model):
        run = made(model)
        whole, some = run.contrast, edges_of(run.layers, run.read)[::9]
        for position in (2, TOKENS.shape[1] - 1):
            found = run.effects([at(edge, position) for edge in some])
            run.contrast = OnlyAt(whole, position)  # type: ignore[assignment]
            alone = run.effects(some)
            run.contrast = whole
            assert torch.allclose(found, alone, rtol=0, atol=1e-9 + 1e-6 * float(alone.abs().max()))
            assert float(found.abs().max()) > 0
        every = [at(edge, position) for edge in some for position in range(TOKENS.shape[1])]
        assert torch.allclose(run.without(every), run.without(some), rtol=0, atol=1e-6)


def test_edges_left_out_of_a_cut_are_as_if_they_were_not_in_it() -> None:
    original, _ = zoo.hooked(zoo.ARCHITECTURES["Llama 3"])
    model = to_hooked(original.double())
    with undisturbed(model):
        run = made(model)
        edges = edges_of(run.layers, run.read)
        spared = edges[::7]
        others = [edge for edge in edges if edge not in spared]
        assert torch.equal(run.without(edges, but=spared), run.without(others))
        one = [at(edge, 3) for edge in spared]
        rest = [at(edge, p) for edge in spared for p in range(TOKENS.shape[1]) if p != 3]
        assert torch.allclose(run.without(edges, but=one), run.without([*others, *rest]), rtol=0, atol=1e-6)


PROMPT = Prompts("copy", torch.tensor([[0, 3, 1, 2, 2, 3]]), (5,), torch.tensor([[[1]]]), torch.tensor([[[2]]]))


@pytest.fixture(scope="module")
def induction() -> tuple[circuits.KnownCircuit, circuits.Circuit]:
    known = circuits.known_circuit("key-composition")
    return known, circuits.prompt_circuit(known.model, PROMPT, n_baselines=90, most=2_000, sizes=1, seed=1)


def test_the_circuit_of_a_planted_copy_stands_at_its_tokens(
    induction: tuple[circuits.KnownCircuit, circuits.Circuit],
) -> None:
    """Position 5 holds the token of position 1, so the head reads position 2, whose key is what layer 0 wrote of position 1."""
    known, found = induction
    assert ("L0H0@2", "L1H0.k@2") in found.confirmed
    assert ("embed@1", "L0H0.v@1") in found.confirmed
    assert ("embed@2", "L1H0.v@2") in found.confirmed
    assert ("embed@5", "L1H0.q@5") in found.confirmed
    assert ("L1H0@5", "logits@5") in found.confirmed
    truth = known.edges("resample")
    for source, receiver in found.confirmed:
        assert (placed(source)[0], placed(receiver)[0]) in truth
        assert placed(source)[1] == placed(receiver)[1]
    assert found.candidates == len(found.edges)  # all were tested
    assert found.text == ("0", "3", "1", "2", "2", "3")
    assert {(each.head, each.query, each.key) for each in found.attention} >= {("L1H0", 5, 2), ("L0H0", 2, 1)}
    assert all(each.share > 0.9 for each in found.attention if each.head == "L1H0")


def test_it_keeps_most_of_the_answer_alone(induction: tuple[circuits.KnownCircuit, circuits.Circuit]) -> None:
    """Not all: with every other edge replaced, keys elsewhere match now and then."""
    _, found = induction
    assert found.kept is not None
    assert found.lost is not None
    assert found.kept > 0.6
    assert found.lost == pytest.approx(1, abs=0.05)
    assert found.clean > found.baseline


def test_it_is_drawn_over_the_text_saved_and_shown(
    induction: tuple[circuits.KnownCircuit, circuits.Circuit], tmp_path: object
) -> None:
    _, found = induction
    figure = found.plot()
    gids = {patch.get_gid() for patch in figure.axes[0].patches}
    assert {"edge-L0H0@2-L1H0.k@2", "attention-L1H0-2-5"} <= gids
    assert [each.get_text() for each in figure.axes[0].get_xticklabels()][:2] == ["3\n1", "1\n2"]
    found.save(f"{tmp_path}/one.safetensors")
    again = circuits.Circuit.load(f"{tmp_path}/one.safetensors")
    assert (again.edges, again.text, again.attention) == (found.edges, found.text, found.attention)
    assert "L1H0@5" in found.by_component["L1H0@2"]
    page = circuit_page(found).to_html()
    assert "its tokens are" in page
    assert "baselines" in found.methods


def test_corrupted_replaces_at_the_same_position() -> None:
    """A baseline that differs at position 2 alone: what passes elsewhere is the same in both, so no edge there has an effect."""
    known = circuits.known_circuit("key-composition")
    others = PROMPT.tokens.repeat(30, 1)
    others[:, 2] = torch.arange(30) % 4
    found = circuits.prompt_circuit(known.model, PROMPT, baselines=others, contrast="corrupted", most=2_000, sizes=1)
    moved = {edge.source for edge in found.edges if edge.effect > 1e-3}
    assert {"embed@2", "L1H0@5"} <= moved
    assert all(placed(source)[1] in (2, 3, 5) for source in moved)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"n_baselines": 20}, "20 baselines can't be split"),
        ({"contrast": "mean"}, "'mean'"),
        ({"answer": " Mary"}, "comes with its answers"),
        ({"baselines": "one text"}, "it is a list of texts"),
        ({"baselines": torch.zeros(30, 4, dtype=torch.long)}, "the prompt has 6 tokens"),
        ({"baselines": PROMPT.tokens.repeat(30, 1), "contrast": "corrupted"}, "doesn't fall"),
        ({"level": 0.5}, "level is 0.5"),
    ],
)
def test_bad_input(asked: dict, says: str) -> None:
    model = circuits.known_circuit("key-composition").model
    with pytest.raises(CausalProbeError, match=says):
        circuits.prompt_circuit(model, PROMPT, **asked)


def test_several_prompts_and_texts_without_a_tokenizer_are_refused() -> None:
    model = circuits.known_circuit("key-composition").model
    two = replace(PROMPT, tokens=PROMPT.tokens.repeat(2, 1), right=PROMPT.right.repeat(2, 1, 1), wrong=None)
    with pytest.raises(CausalProbeError, match="find_circuit"):
        circuits.prompt_circuit(model, two)
    with pytest.raises(CausalProbeError, match="no tokenizer"):
        circuits.prompt_circuit(model, "When Mary and John", " Mary")
    with pytest.raises(CausalProbeError, match="needs its `answer`"):
        circuits.prompt_circuit(model, "When Mary and John")


@pytest.mark.parametrize("asked", ["right", "wrong"])
def test_an_answer_that_the_model_has_not_is_refused(asked: str) -> None:
    prompt = replace(PROMPT, **{asked: torch.tensor([[[7]]])})
    for find in (
        lambda model: circuits.prompt_circuit(model, prompt),
        lambda model: circuits.find_circuit(model, many(prompt, 30)),
    ):
        with pytest.raises(CausalProbeError, match="An answer is token 7, and the model gives logits of 0 to 3"):
            find(circuits.known_circuit("key-composition").model)


def many(prompt: Prompts, n: int) -> Prompts:
    wrong = None if prompt.wrong is None else prompt.wrong.repeat(n, 1, 1)
    return replace(prompt, tokens=prompt.tokens.repeat(n, 1), right=prompt.right.repeat(n, 1, 1), wrong=wrong)


@pytest.mark.parametrize("given", [False, True])
def test_the_study_says_what_was_asked(tmp_path: Path, given: bool) -> None:
    """A random model, asked for what it says rather of this text than of others."""
    model = to_hooked(tiny.gpt2(), tiny.tokenizer())
    tokens = tiny.tokens(61, 6)
    with torch.no_grad():
        logits = model(tokens)[:, -1, 3 : tiny.D_VOCAB - 2]
    likelier = logits[0] - logits[1:].mean(0)
    text, *others = (" ".join(f"t{token}" for token in row) for row in tokens.tolist())
    answer, wrong = f" t{3 + int(likelier.argmax())}", f" t{3 + int(likelier.argmin())}"
    file = tmp_path / "others.txt"
    file.write_text("\n".join(others))
    found = model_circuit(
        model, text=text, answer=answer, wrong=wrong, bos="no", most=40, sampled=5, n_prompts=60, contrast="corrupted",
        **({"baselines": str(file)} if given else {}),
    )  # fmt: skip
    page = circuit_page(found).to_html()
    assert f"60 other prompts ({'given baselines' if given else 'random tokens'})" in page
    assert repr(text) in found.call
    assert found.confirmed
    assert repr(answer) in found.plot().get_suptitle()
