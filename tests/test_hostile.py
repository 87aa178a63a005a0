"""One table of hostile tokens, models and scalars, over every public probe, as it runs outside of the tests: no type is checked but by it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from causal_probe import hooks
from tests import hostile

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
