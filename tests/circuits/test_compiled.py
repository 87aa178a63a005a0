"""Programs compiled by tracr: their outputs by RASP, tracr's own forward, and the truth by the rule and by ablation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from causal_probe.circuits import check_truth, compiled_circuit, known_circuit, known_circuits
from causal_probe.circuits.compiled import BOS, PAD, has_tracr
from causal_probe.circuits.known import CONTRASTS
from causal_probe.circuits.rasp_programs import PROGRAMS, RaspProgram
from causal_probe.errors import CausalProbeError

needs_tracr = pytest.mark.skipif(not has_tracr(), reason="tracr is not installed: pip install 'causal-probe[tracr]'")

#: On these everything is run with every test; the others are the benchmark's.
FEW = ("induction", "sum-of-two-lags", "a-so-far", "count-so-far")


def test_there_are_sixteen_programs_or_more() -> None:
    assert len(PROGRAMS) >= 16
    assert {f"tracr-{name}" for name in PROGRAMS} < set(known_circuits())


def test_without_tracr_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("causal_probe.circuits.compiled.has_tracr", lambda: False)
    with pytest.raises(CausalProbeError, match=r"pip install 'causal-probe\[tracr\]'"):
        known_circuit("tracr-induction")
    with pytest.raises(CausalProbeError, match="Unknown program 'inductoin'"):
        compiled_circuit("inductoin")


@needs_tracr
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_model_gives_what_rasp_gives(name: str) -> None:
    circuit = compiled_circuit(name)
    behaviour: Any = circuit.metric.__self__  # type: ignore[attr-defined]
    program = PROGRAMS[name]
    assert circuit.every is not None
    tokens = circuit.every()
    assert len(tokens) == (math.factorial(len(program.vocab)) if program.repeated else len(program.vocab) ** program.n)
    tokens = tokens[:: max(1, len(tokens) // 300)]
    logits = circuit.model(tokens)[:, 1:].detach()
    compared = 0
    for i, right in enumerate(behaviour.right(tokens)):
        for j, value in enumerate(right):
            if behaviour.crafted.categorical:
                if value in behaviour.place:
                    assert int(logits[i, j].argmax()) == behaviour.place[value], (tokens[i], j)
                    compared += 1
            else:
                assert float(logits[i, j, 0]) == pytest.approx(0 if value is None else float(value), abs=1e-5)
                compared += 1
    assert compared > len(tokens)


@needs_tracr
@pytest.mark.parametrize("name", ["induction", "balance"])
def test_logits_are_tracr_s_own(name: str) -> None:
    program = PROGRAMS[name]
    circuit = compiled_circuit(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tracr.compiler import compiling
        from tracr.rasp import rasp

        theirs = compiling.compile_rasp_to_model(
            program.make(rasp), set(program.vocab), program.n, causal=True, compiler_bos=BOS, compiler_pad=PAD
        )
        tokens = circuit.sample(4, torch.Generator().manual_seed(0))
        names = [*program.vocab, BOS, PAD]
        for row in tokens:
            out = theirs.apply([names[each] for each in row.tolist()])
            ours = circuit.model(row[None])[0, 1:].detach()
            if theirs.output_encoder is not None and ours.shape[-1] > 1:
                decoded = [theirs.output_encoder.encoding_map[each] for each in out.decoded[1:]]
                scored = ours.max(-1).values > 0.5  # nothing is written where nothing is attended to
                assert [d for d, s in zip(decoded, scored, strict=True) if s] == ours.argmax(-1)[scored].tolist()
            else:
                assert out.decoded[1:] == pytest.approx(ours[:, 0].tolist(), abs=1e-4)


@needs_tracr
def test_the_rule_leaves_bos_and_one_aside() -> None:
    circuit = compiled_circuit("induction")
    assert set(circuit.truth.edges) == {
        ("pos_embed", "L0.mlp"), ("L0.mlp", "L1H0.q"), ("pos_embed", "L1H0.k"), ("embed", "L1H0.v"),
        ("embed", "L2H0.q"), ("L1H0", "L2H0.k"), ("embed", "L2H0.v"), ("L2H0", "logits"),
    }  # fmt: skip
    assert set(circuit.constant) == {("embed", "L1H0.q"), ("embed", "L1H0.k"), ("embed", "L2H0.k")}
    kinds = {(s, r): kind for s, r, kind in circuit.truth.edges(data="kind")}
    assert {edge for edge, kind in kinds.items() if kind == "positional"} == {
        ("pos_embed", "L0.mlp"), ("L0.mlp", "L1H0.q"), ("pos_embed", "L1H0.k"),
    }  # fmt: skip


@needs_tracr
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", FEW)
def test_the_truth_holds(name: str, contrast: str) -> None:
    found = check_truth(compiled_circuit(name), contrast=contrast, n_sequences=48)
    assert found.holds, repr(found)


@needs_tracr
@pytest.mark.parametrize("name", ["induction", "been-before"])
def test_on_all_sequences_the_truth_holds(name: str) -> None:
    circuit = compiled_circuit(name)
    assert circuit.every is not None
    assert check_truth(circuit, circuit.every(), draws=1).holds


@needs_tracr
def test_an_edge_without_effect_is_listed_with_the_reason() -> None:
    circuit = compiled_circuit("first-token")
    said = {(s, r): reason for s, r, reason in circuit.truth.edges(data="without_effect") if reason}
    assert said == PROGRAMS["first-token"].without_effect
    assert check_truth(circuit).holds
    assert check_truth(circuit).outside["pos_embed -> L0.mlp"] == 0


@needs_tracr
def test_a_program_of_one_s_own() -> None:
    def last_but_one(rasp: Any) -> Any:
        back = rasp.Map(lambda i: i - 2, rasp.indices)
        return rasp.Aggregate(rasp.Select(rasp.indices, back, rasp.Comparison.EQ), rasp.tokens)

    circuit = compiled_circuit("mine", RaspProgram(last_but_one, "Two back.", ("x", "y"), n=4))
    assert circuit.name == "tracr-mine"
    assert check_truth(circuit).holds

    def impossible(rasp: Any) -> Any:
        tokens = rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ)
        return rasp.Aggregate(tokens & rasp.Select(rasp.indices, rasp.indices, rasp.Comparison.LT), rasp.tokens)

    with pytest.raises(CausalProbeError, match="tracr can't compile this program"):
        compiled_circuit("never", RaspProgram(impossible, "Not.", ("x", "y"), n=4))
