"""One table of hostile tokens, models and scalars, over every public probe, as it runs outside of the tests: no type is checked but by it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from causal_probe import hooks, probes, tasks
from causal_probe.errors import CausalProbeError
from causal_probe.probes.claims import AboveZero
from tests import hostile, hostile_rooms

WITH_TOKENS = [name for name in hostile.GOOD if name.startswith(("probes", "hooks")) and hostile.takes(name, "tokens")]
#: What some take: sequences that are made, one input, what a loss alone reads, ids of a model that isn't there; and faults that are listed.
TAKEN = {
    "probes.scan": {"None"},
    "probes.verify": {"None"},
    "probes.discover_from_attention": {"one sequence"},
    "probes.edge_effects": {"a dict of something", "a Dataset of texts", "a second batch of another length"},
    "probes.score_patterns": {"an id too large", "an id far too large", "a negative id", "padded left", "padded right"},
    "hooks.find_faults": set(hostile.BAD_TOKENS),
}
#: Those that say it in words of their own.
OWN_WORDS = hostile.ONE_INPUT | hostile.NO_MODEL | {"hooks.preflight"}
WITH_MODEL = [name for name in hostile.GOOD if hostile.takes(name, "model") and name not in hostile.ANY_MODEL]


@pytest.fixture(autouse=True)
def _in_production() -> Iterator[None]:
    """Without the checks of types that the tests add to every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(name: str, **changes: Any) -> str:
    """The one line in which it is refused."""
    said = hostile.refusal(lambda: hostile.call(name, **changes))
    assert said is not None, "it was taken"
    return said


def test_every_public_function_that_measures_is_in_the_table() -> None:
    assert set(hostile.GOOD) == set(hostile.public())


@pytest.mark.parametrize("name", hostile.GOOD)
def test_the_good_call_is_good(name: str) -> None:
    hostile.call(name)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_bad_tokens_are_refused(name: str) -> None:
    for what, (make, word) in hostile.BAD_TOKENS.items():
        if what in TAKEN.get(name, ()):
            continue
        try:
            said = refused(name, tokens=make())
        except BaseException as error:
            raise AssertionError(f"{name} on {what}") from error
        if name not in OWN_WORDS:
            assert re.search(word, said), (what, said)


@pytest.mark.parametrize("name", sorted(set(WITH_TOKENS) - OWN_WORDS - {"hooks.find_faults"}))
def test_the_same_tokens_in_another_form_give_the_same(name: str) -> None:
    def plain(found: Any) -> Any:
        return found.to_dict() if hasattr(found, "to_dict") else str(found)

    expected = plain(hostile.call(name))
    for what, make in hostile.SAME_TOKENS.items():
        if name == "probes.edge_effects" and what in ("a dict", "BatchEncoding"):
            continue  # its loss reads the batch
        if name in ("probes.score_gradients", "probes.verify") and what == "a batch":
            continue  # which they can't cut into pieces: sums differ in the last digits
        assert plain(hostile.call(name, tokens=make())) == expected, what


@pytest.mark.parametrize("name", WITH_MODEL)
def test_what_is_no_hooked_model_is_told_the_way_to_one(name: str) -> None:
    for what, make in hostile.BAD_MODELS.items():
        if name == "probes.discover_from_attention" and what == "a Hugging Face model":
            continue  # it reads those
        said = refused(name, model=make())
        assert "to_hooked" in said or name in ("probes.implied_step", "syntax.tree_projection"), (what, said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", WITH_MODEL)
def test_a_model_of_any_dtype_is_taken(name: str, dtype: torch.dtype) -> None:
    given = hostile.good(name)[1]["model"]
    if name == "probes.copy_sensitivity":  # what it is given is continuous, and of the model's own dtype
        hostile.call(name, model=copy.deepcopy(given).to(dtype), inputs=torch.ones(2, 4, 3, dtype=dtype))
    elif given is hostile.model():
        hostile.call(name, model=hooks.to_hooked(hostile.tiny.llama().to(dtype), hostile.tiny.tokenizer(bos=True)))
    else:
        hostile.call(name, model=copy.deepcopy(given).to(dtype))


@pytest.mark.parametrize("name", hostile.GOOD)
def test_scalars_are_taken_or_refused_in_one_line(name: str) -> None:
    _, arguments = hostile.good(name)
    for argument in arguments:
        if argument in ("model", "tokens", "reference"):
            continue
        n_refused = 0
        for what, value in hostile.scalars(argument).items():
            try:
                said = hostile.refusal(lambda argument=argument, value=value: hostile.call(name, **{argument: value}))  # type: ignore[misc]
            except BaseException as error:
                raise AssertionError(f"{name}({argument}={what})") from error
            n_refused += said is not None
        # A model that has hooks needs no tokenizer; a mask's faults are findings; a source is read when it is gone through.
        assert n_refused or argument in ("tokenizer", "attention_mask", "source"), argument


def test_every_public_function_of_the_other_rooms_is_in_their_table() -> None:
    """But studies and commands, which options check and the generated calls try, and what is tried above."""
    tried = {*hostile_rooms.GOOD, *hostile.GOOD, *hostile_rooms.ELSEWHERE}
    assert set(hostile_rooms.public()) <= tried


@pytest.mark.parametrize("name", hostile_rooms.GOOD)
def test_arguments_of_the_other_rooms_are_taken_or_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "circuits.compiled_circuit":
        pytest.importorskip("tracr")
    monkeypatch.chdir(hostile_rooms.place())
    function, arguments = hostile_rooms.GOOD[name]()
    function(**arguments)
    for argument in arguments:
        n_refused = 0
        for what, value in hostile.scalars(argument).items():
            if (name, argument) == ("mechanisms.descent_alignment", "model") and callable(value):
                continue  # a function of the caller's
            _, fresh = hostile_rooms.GOOD[name]()
            try:
                said = hostile.refusal(
                    lambda fresh=fresh, argument=argument, value=value: function(**{**fresh, argument: value})
                )  # type: ignore[misc]
            except BaseException as error:
                raise AssertionError(f"{name}({argument}={what})") from error
            n_refused += said is not None
        assert n_refused, argument


#: What a forward may return instead of logits, and what reads them.
RETURNED: dict[str, Any] = {
    "a dict": lambda logits: {"logits": logits},
    "nothing": lambda logits: None,
    "a tuple": lambda logits: (logits, None),
    "an array": lambda logits: logits.detach().numpy(),
    "a smaller vocabulary": lambda logits: logits[..., :3],
    "another order of axes": lambda logits: logits.transpose(1, 2),
    "the last position": lambda logits: logits[:, -1],
}
READS_LOGITS = [
    "probes.copy_losses", "probes.edge_effects", "probes.ablate_heads", "probes.permutation_sensitivity", "probes.in_context_score", "probes.score_gradients",
    "probes.verify", "hooks.self_test",
]  # fmt: skip


def returning(change: Any) -> Any:
    """A hooked model whose forward returns something else."""
    made = hooks.to_hooked(hostile.tiny.llama(), hostile.tiny.tokenizer(bos=True))
    forward = made.forward
    made.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
    return made


@pytest.mark.parametrize("name", [name for name in WITH_MODEL if hostile.good(name)[1]["model"] is hostile.model()])
def test_a_model_that_returns_no_logits_is_refused_by_what_reads_them(name: str) -> None:
    for what, change in RETURNED.items():
        model = returning(change)
        try:
            said = hostile.refusal(lambda model=model: hostile.call(name, model=model))  # type: ignore[misc]
        except BaseException as error:
            raise AssertionError(f"{name} of a model that returns {what}") from error
        assert (said is not None and "returned" in said) or name not in READS_LOGITS, what


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["probes.scan", "probes.head_graphs", "probes.upstream", "probes.qk_attributions", "probes.score_pca", "probes.verify",
                                  "probes.copy_losses", "probes.graph_selectivity", "probes.discover_from_attention", "hooks.preflight"])  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    model = hooks.to_hooked(hostile.tiny.llama(), hostile.tiny.tokenizer(bos=True))
    with torch.no_grad():
        for layer in model.original_model.model.layers:
            layer.self_attn.q_proj.weight[0, 0] = value
    assert refused(name, model=model)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "name", ["probes.copy_sensitivity", "probes.implied_step", "probes.head_weights", "probes.composition"]
)
def test_weights_that_are_read_as_they_are_must_be_numbers(name: str, value: float) -> None:
    model = copy.deepcopy(hostile.good(name)[1]["model"])
    with torch.no_grad():
        for weights in model.blocks.parameters():
            weights.view(-1)[0] = value
    assert refused(name, model=model)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank_error": "x"}, "`rank_error` is 'x'"), ({"rank_error": 5.0}, "less than 1"), ({"rank_error": float("nan")}, "finite"),
        ({"level": 0}, "more than 0"), ({"level": 2}, "less than 1"), ({"delta": -0.1}, "at least 0"), ({"rank": 95}, "at most 1"),
        ({"joint_rank": None}, "`joint_rank` is None"), ({"minimum_fall": True}, "`minimum_fall` is True"), ({"minimum_excess": float("inf")}, "finite"),
    ],
)  # fmt: skip
def test_numbers_of_a_rule_are_checked(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CausalProbeError, match=word):
        probes.Rule(**options)


@pytest.mark.parametrize(
    "options", [{"level": "x"}, {"level": 1.5}, {"level": float("nan")}, {"n_tests": 0}, {"n_tests": 2.5}]
)
def test_numbers_of_a_claim_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(CausalProbeError, match="It must be"):
        AboveZero(**options)


def test_axes_that_arguments_share_have_one_length() -> None:
    with pytest.raises(CausalProbeError, match=r"`target` is a Tensor of float32, of shape \[2, 4\]"):
        tasks.cross_entropy(torch.full((2, 3), 1 / 3), torch.full((2, 4), 1 / 4))
