"""What is shown of a text: everything visible, nothing that reorders, breaks or can't be written."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_probe.errors import CausalProbeError
from causal_probe.viz.text import clean, show_token, token_list

# Surrogates included: hypothesis leaves them out unless they are asked for.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(ANY_TEXT)
def test_clean_text_can_be_written_and_read(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode()
    assert all(unicodedata.category(c) not in INVISIBLE or c in "\n\t\N{ZERO WIDTH JOINER}" for c in cleaned)
    assert clean(cleaned) == cleaned


@given(ANY_TEXT, st.integers(2, 30))
def test_tokens_are_visible_and_short(token: str, limit: int) -> None:
    shown = show_token(token, limit=limit)
    shown.encode()
    assert 0 < len(shown) <= limit
    assert not any(c.isspace() for c in shown)
    assert all(unicodedata.category(c) not in INVISIBLE - {"Cf"} for c in shown)


@given(st.text("abc<>&\"'", max_size=10))
def test_plain_tokens_are_shown_as_they_are(token: str) -> None:
    assert show_token(token) == (token or '""')


def test_what_is_hidden_becomes_visible() -> None:
    shown = [show_token(token) for token in (" the", "a b", "\n", "\t", "\xa0", "\u202e", "\ud800", "\x00")]
    assert shown == ["␣the", "a␣b", "\\n", "\\t", "\\xa0", "\\u202e", "\\ud800", "\\x00"]


def test_a_joined_emoji_stays_whole() -> None:
    couple = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    assert clean(couple) == show_token(couple) == couple


@pytest.mark.parametrize("tokens", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), torch.tensor([1, 2, 3]), iter("123")])
def test_token_ids_become_digits(tokens: object) -> None:
    assert token_list(tokens) == ["1", "2", "3"]  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", ["one string", torch.zeros(2, 3), [["a"], ["b"]], torch.tensor(3)])
def test_what_is_no_sequence_of_tokens(tokens: object) -> None:
    with pytest.raises(CausalProbeError, match="tokens of"):
        token_list(tokens)  # type: ignore[arg-type]
