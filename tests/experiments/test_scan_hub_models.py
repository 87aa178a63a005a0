"""Scanning models from the Hugging Face hub, against the heads that others have named in them.

``HF_HUB_OFFLINE=0 python -m pytest -m network`` runs these where there is a network; elsewhere they are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import load_model
from causal_probe.probes import scan
from causal_probe.probes.head_scores import HeadScores

pytestmark = [pytest.mark.network, pytest.mark.slow]


def scanned(name: str) -> HeadScores:
    try:
        model: Any = to_hooked(*load_model(name))
    except CausalProbeError as error:
        if "hub" not in str(error):
            raise
        pytest.skip(str(error))
    return scan(model, templates=["previous-token", "induction"], sequences=16, bos="yes")


def test_gpt2_small() -> None:
    """L5H1, L5H5 and L6H9 are the induction heads of Stolfo et al. (2024); L5H5 and L6H9 are among those of Wang et al. (2022),
    who also name L4H11 as a previous-token head. Scans of repeated random tokens that others have published give these
    three, L7H2 and L7H10 scores of 0.83 to 0.94, and L4H11 0.99.
    """
    found = scanned("openai-community/gpt2")
    best = found.top("induction", 5)
    assert {(score.layer, score.head) for score in best} == {(5, 1), (5, 5), (6, 9), (7, 2), (7, 10)}
    assert all(score.score is not None and score.score > 0.75 for score in best)
    (previous,) = found.top("previous-token", 1)
    assert (previous.layer, previous.head) == (4, 11)
    assert previous.score == pytest.approx(0.99, abs=0.03)


def test_pythia_70m() -> None:
    """No head of this model was found named in a paper. What holds of all models with induction heads (Olsson et al., 2022) does:
    there are some, they need a layer below them, and in one of those there is a previous-token head.
    """
    found = scanned("EleutherAI/pythia-70m")
    called = {name: {score.layer for score in found.called() if score.template == name} for name in found.names}
    assert called["induction"]
    assert min(called["induction"]) > 0
    best = found.top("previous-token", 1)[0]
    assert best.layer < max(called["induction"])
    assert best.excess is not None
    assert best.excess > 0.3
