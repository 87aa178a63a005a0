"""What the weights say of a head, against full matrices, plain loops, other tools, and hand-set circuits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.weights import composition, head_weights
from tests.tiny_models import D_VOCAB, N_POSITIONS, disentangled, transformer_lens

transformers = pytest.importorskip("transformers")  # TransformerLens brings it


def hugging_face(kind: str, *, gains: bool = True) -> Any:
    """A tiny random causal LM, two layers of four heads; its gains are not all one."""
    shape = {"vocab_size": 23, "attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=16, n_embd=24, n_layer=2, n_head=4, **shape)
    elif kind == "neox":
        config = transformers.GPTNeoXConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16, **shape
        )  # fmt: skip
    elif kind == "gemma2":
        config = transformers.Gemma2Config(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=6, max_position_embeddings=16, **shape,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=16, **shape,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for module in model.modules():
        if gains and "Norm" in type(module).__name__:
            module.weight.data = torch.rand_like(module.weight) + 0.5
    for name, parameter in model.named_parameters():  # larger than a fresh model's, so that nothing is near zero
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * (0.5 if "wpe" in name else 0.3)
    return model


def bridge(model: Any) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config)


# ----------------------------------------------------------------------------------------------------------------- copying


def copying_by_definition(full: np.ndarray) -> float:
    """From a whole matrix [d_vocab, d_vocab], less what it adds to all logits."""
    eigenvalues = np.linalg.eigvals((full - full.mean(1, keepdims=True)).astype(np.float64))
    return float(eigenvalues.sum().real / np.abs(eigenvalues).sum())


def test_copying_equals_the_full_eigendecomposition() -> None:
    model = transformer_lens()
    W_E, W_U, W_V, W_O = (getattr(model, name).detach().double().numpy() for name in ("W_E", "W_U", "W_V", "W_O"))
    found = head_weights(model).copying
    for layer in range(2):
        for head in range(2):
            full = W_E @ W_V[layer, head] @ W_O[layer, head] @ W_U
            assert full.shape == (D_VOCAB, D_VOCAB)
            assert found[layer][head] == pytest.approx(copying_by_definition(full), abs=1e-4)
    assert len({round(score, 3) for row in found for score in row if score is not None}) == 4


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "gemma2"])
def test_copying_of_a_raw_bridge_is_that_of_the_hugging_face_weights(kind: str) -> None:
    """Read from the Hugging Face modules themselves: grouped queries, gains and centring by their own code."""
    model = hugging_face(kind)
    found = head_weights(bridge(hugging_face(kind))).copying
    for layer in range(2):
        for head in range(4):
            full = hugging_face_ov(model, kind, layer, head)
            assert found[layer][head] == pytest.approx(copying_by_definition(full), abs=1e-4)


def hugging_face_ov(model: Any, kind: str, layer: int, head: int) -> np.ndarray:
    """W_E N W_V W_O N' W_U [d_vocab, d_vocab]; N is what the normalization does to the rows of the identity, less its division."""
    d, d_head = 24, 6
    own = slice(head * d_head, (head + 1) * d_head)
    shared = slice(head // 2 * d_head, (head // 2 + 1) * d_head)
    centre = np.eye(d) - 1 / d
    array = lambda tensor: tensor.detach().double().numpy()  # noqa: E731
    W_E, W_U = array(model.get_input_embeddings().weight), array(model.get_output_embeddings().weight).T
    if kind == "gpt2":
        block = model.transformer.h[layer]
        W_V = array(block.attn.c_attn.weight)[:, 2 * d :][:, own]
        W_O = array(block.attn.c_proj.weight)[own]
        before, after = centre * array(block.ln_1.weight), centre * array(model.transformer.ln_f.weight)
    elif kind == "neox":
        block = model.gpt_neox.layers[layer]
        per_head = array(block.attention.query_key_value.weight).reshape(4, 3, d_head, d)
        W_V, W_O = per_head[head, 2].T, array(block.attention.dense.weight).T[own]
        before = centre * array(block.input_layernorm.weight)
        after = centre * array(model.gpt_neox.final_layer_norm.weight)
    else:
        block = model.model.layers[layer]
        offset = 1 if kind == "gemma2" else 0  # Gemma's gain is one plus the weight
        W_V, W_O = array(block.self_attn.v_proj.weight).T[:, shared], array(block.self_attn.o_proj.weight).T[own]
        before, after = (np.diag(array(norm.weight) + offset) for norm in (block.input_layernorm, model.model.norm))
        if kind == "gemma2":
            W_O = W_O * (array(block.post_attention_layernorm.weight) + 1)
    return W_E @ before @ W_V @ W_O @ after @ W_U


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_folding_the_normalization_changes_nothing(kind: str) -> None:
    raw, folded = bridge(hugging_face(kind)), bridge(hugging_face(kind))
    folded.enable_compatibility_mode(disable_warnings=True)  # it also centres the unembedding over the vocabulary
    assert (raw.W_V - folded.W_V).abs().max() > 0.01
    before, after = head_weights(raw), head_weights(folded)
    np.testing.assert_allclose(before.copying, after.copying, atol=1e-4)
    if before.previous_token_chance is not None:
        np.testing.assert_allclose(before.previous_token, after.previous_token, atol=1e-5)
    before, after = composition(raw), composition(folded)
    assert before.baseline == after.baseline == pytest.approx(1 / np.sqrt(23 if kind == "gpt2" else 24))
    for which in "qkv":
        np.testing.assert_allclose(before.z[which], after.z[which], atol=1e-3)


def planted(sign: float) -> DisentangledTransformer:
    model = DisentangledTransformer(d_vocab=4, n_positions=6, heads=(1, 2))
    for i in range(1, 6):
        model.block(0, 0, query="position", key="position")[i, i - 1] = 20.0
    model.output_block("L1H1.token").fill_diagonal_(sign)
    return model


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_planted_copying_head(sign: float) -> None:
    found = head_weights(planted(sign))
    ((unread,), (idle, copying)) = found.copying
    assert (unread, idle) == (None, None)
    assert copying == pytest.approx(sign, abs=1e-6)
    assert found.undefined == {
        "copying L0H0": "its W_E W_V W_O W_U is zero",
        "copying L1H0": "its W_E W_V W_O W_U is zero",
    }


def test_a_rotation_of_the_vocabulary_is_no_copying() -> None:
    """A head that always raises the next token's logit: eigenvalues are the roots of unity but 1, which centring takes, and sum to -1."""
    model = planted(1.0)
    model.output_block("L1H1.token").copy_(torch.roll(torch.eye(4), 1, 1))
    assert head_weights(model).copying[1][1] == pytest.approx(-1 / 3, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- previous token


def test_previous_token_of_a_disentangled_model_is_its_position_block() -> None:
    model = disentangled()
    found = head_weights(model, n_positions=N_POSITIONS)
    for layer, heads in enumerate(model.heads):
        assert len(found.previous_token[layer]) == heads
        for head in range(heads):
            scores = model.block(layer, head, query="position", key="position")
            past = torch.ones_like(scores, dtype=torch.bool).tril()
            pattern = scores.masked_fill(~past, -torch.inf).softmax(-1)
            expected = float(pattern.diagonal(-1).mean())
            assert found.previous_token[layer][head] == pytest.approx(expected, abs=1e-6)
    assert found.previous_token_chance == pytest.approx(np.mean([1 / (query + 1) for query in range(1, N_POSITIONS)]))


def test_previous_token_of_gpt2_by_its_formula() -> None:
    model = hugging_face("gpt2")
    found = head_weights(bridge(hugging_face("gpt2")), n_positions=16)
    position = model.transformer.wpe.weight.detach()
    for layer, block in enumerate(model.transformer.h):
        with torch.no_grad():
            q, k, _ = block.attn.c_attn(block.ln_1(position)).view(16, 3, 4, 6).unbind(1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / 6**0.5
            pattern = scores.masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        expected = pattern.diagonal(-1, 1, 2).mean(-1)
        np.testing.assert_allclose(found.previous_token[layer], expected.numpy(), atol=1e-5)


def test_a_planted_previous_token_head() -> None:
    found = head_weights(planted(1.0))
    assert found.previous_token[0][0] == pytest.approx(1, abs=1e-6)
    assert found.previous_token[1][0] == pytest.approx(found.previous_token_chance)
    assert found.n_positions == 6


def test_without_position_embeddings_the_score_is_undefined() -> None:
    found = head_weights(bridge(hugging_face("llama")))
    assert found.previous_token == ((None,) * 4,) * 2
    assert found.previous_token_chance is None
    assert found.undefined == {
        "previous_token": "no position embeddings are added to the stream (the model's are rotary)"
    }
    assert found.to_pandas()["previous_token"].isna().all()
    assert found.to_dict()["previous_token"][0][0] is None
    assert "rotary" in repr(found)


# ------------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize(
    "model", [transformer_lens, lambda: bridge(hugging_face("llama", gains=False))], ids=["mha", "gqa"]
)
def test_composition_equals_its_definition(model: Any) -> None:
    model = model()
    Q, K, V, O = (getattr(model, f"W_{name}").detach().double().numpy() for name in "QKVO")  # noqa: E741
    group = Q.shape[1] // K.shape[1]
    found = composition(model)
    n_heads = Q.shape[1]
    for w in range(n_heads):
        for r in range(n_heads):
            OV_1 = V[0, w // group] @ O[0, w]
            OV_2 = V[1, r // group] @ O[1, r]
            QK_2 = Q[1, r] @ K[1, r // group].T
            for kind, reading in {"q": QK_2, "k": QK_2.T, "v": OV_2}.items():
                expected = np.linalg.norm(OV_1 @ reading) / np.linalg.norm(OV_1) / np.linalg.norm(reading)
                assert found.score[kind][w, n_heads + r] == pytest.approx(expected, abs=1e-5)
    assert not found.score["q"][n_heads:].any()
    assert found.baseline == pytest.approx(1 / np.sqrt(Q.shape[2]))


def test_composition_agrees_with_transformer_lens() -> None:
    model = transformer_lens()
    if not hasattr(model, "all_composition_scores"):
        pytest.skip("this model of TransformerLens 4 has no all_composition_scores")
    found = composition(model)
    for kind in "qkv":
        theirs = model.all_composition_scores(kind.upper()).detach()  # [layer, head, layer, head]
        np.testing.assert_allclose(found.score[kind][:2, 2:], theirs[0, :, 1].numpy(), atol=1e-5)


def test_the_baseline_is_the_mean_over_rotations() -> None:
    """The writer's output is turned by many random rotations: mean and standard deviation of the squared score."""
    model = transformer_lens()
    V, O, Q, K = (getattr(model, f"W_{name}").detach().double() for name in "VOQK")  # noqa: E741
    OV, QK = V[0, 0] @ O[0, 0], Q[1, 1] @ K[1, 1].T
    OV, QK = OV / OV.norm(), QK / QK.norm()
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(20_000, 16, 16, generator=generator, dtype=torch.float64)
    R, triangle = torch.linalg.qr(gaussian)
    R = R * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
    squares = (OV @ R @ QK).square().sum((1, 2))
    found = composition(model, kinds=["q"])
    assert squares.mean() == pytest.approx(found.baseline**2, rel=0.01)
    z = (found.score["q"][0, 3] ** 2 - squares.mean()) / squares.std()
    assert found.z["q"][0, 3] == pytest.approx(float(z), abs=0.05)


def test_unrelated_heads_are_at_the_baseline_and_a_planted_pair_is_not() -> None:
    found = composition(bridge(hugging_face("llama", gains=False)))
    assert np.abs(np.concatenate([found.z[kind][:4, 4:].ravel() for kind in "qkv"])).max() < 4.5
    model = hugging_face("llama", gains=False)
    # L1H2 is made to look for what L0H1 writes: its queries read along W_O of L0H1.
    with torch.no_grad():
        written = model.model.layers[0].self_attn.o_proj.weight[:, 6:12].T  # [d_head, d_model]
        model.model.layers[1].self_attn.q_proj.weight[12:18] = torch.linalg.qr(written.T).Q.T
    top = composition(bridge(model)).top("q", 1).iloc[0]
    assert (top["writer"], top["reader"]) == ("L0H1", "L1H2")
    assert top["z"] > 6


def test_composition_of_a_disentangled_model_is_exact() -> None:
    """K-composition of a block: |A restricted to what the writer wrote| / |A|, over the norm of an identity."""
    model = disentangled()
    found = composition(model)
    assert found.heads == ((0, 0), (0, 1), (1, 0))
    A = model.A[1][0].detach()
    d_0 = D_VOCAB + N_POSITIONS
    for writer in range(2):
        wrote = slice((1 + writer) * d_0, (2 + writer) * d_0)
        k = A[:, wrote].norm() / A.norm() / d_0**0.5
        q = A[wrote].norm() / A.norm() / d_0**0.5
        assert found.score["k"][writer, 2] == pytest.approx(float(k), abs=1e-6)
        assert found.score["q"][writer, 2] == pytest.approx(float(q), abs=1e-6)


def test_heads_without_weights_are_in_no_pair() -> None:
    found = composition(DisentangledTransformer(3, 4, (1, 1)), kinds=["k"])
    assert found.to_pandas().empty
    assert found.undefined == {"L0H0 scores": "its weights are zero", "L1H0 scores": "its weights are zero"}


# ------------------------------------------------------------------------------------------------------ results and errors


def test_results_are_written_and_cited() -> None:
    weights, pairs = head_weights(transformer_lens()), composition(transformer_lens())
    assert len(weights.to_pandas()) == 4
    assert len(pairs.to_pandas()) == 12
    assert list(pairs.to_pandas()) == ["kind", "writer", "reader", "score", "excess", "z"]
    assert pairs.to_dict()["score"]["q"] == pairs.score["q"].tolist()
    for found in (weights, pairs):
        assert "Mathematical Framework" in found.cite().bibtex
        assert "model" in found.to_dict()["provenance"]
        assert found._repr_html_().count("<table") == 1


def test_the_model_is_left_as_it_was() -> None:
    model = hugging_face("gpt2").train()
    hooked = bridge(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head_weights(hooked)
    composition(hooked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(point.has_hooks() for point in hooked.hook_dict.values())


@pytest.mark.parametrize("positions", [1, 17])
def test_wrong_positions(positions: int) -> None:
    with pytest.raises(CausalProbeError, match=f"asked for on {positions} positions; the model has 16"):
        head_weights(bridge(hugging_face("gpt2")), n_positions=positions)


def test_wrong_kinds() -> None:
    with pytest.raises(CausalProbeError, match="no composition of the kind 'x'; there is q, k, v"):
        composition(transformer_lens(), kinds=["x"])
    with pytest.raises(CausalProbeError, match="'v' was not measured; there is q"):
        composition(transformer_lens(), kinds=["q"]).top("v")


def test_weights_that_can_not_be_read() -> None:
    model = transformer_lens()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(CausalProbeError, match="W_E holds values that are not finite"):
        head_weights(model)
    with pytest.raises(CausalProbeError, match="does not give W_E as one tensor"):
        head_weights(_Bare())


class _Bare(torch.nn.Module):
    """The surface of a hooked model, without weights of the usual names."""

    cfg = None
    hook_dict: dict[str, Any] = {}  # noqa: RUF012 - a test's stand-in

    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
