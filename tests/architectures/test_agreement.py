"""Every probe is right on every architecture, or refuses with the reason: against references that use transformers alone."""

from __future__ import annotations

import re

import pytest

from tests.architectures.agreement import LINE, PROBES, entries
from tests.architectures.zoo import ARCHITECTURES

#: By line of TransformerLens, what is refused and why: by architecture, the probes (all of them where none is named) and the reason.
REFUSED = {
    "4.3": {},
    "3.9": {
        "Cohere": "With hooks a CohereForCausalLM is another model",
        "Hunyuan V1": "With hooks a HunYuanDenseV1ForCausalLM is another model",
        "Command R+": "can't put hooks on a CohereForCausalLM",
    },
}
#: Those that `make architectures` alone looks at: what tells them apart is in others, too.
LEFT_OUT = {"Phi-2", "Qwen3-MoE", "Apertus", "GLM-4.5", "VaultGemma", "Nemotron", "BitNet", "OLMoE", "MiniMax-M2", "DeepSeek-V2", "GPTBigCode"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in LEFT_OUT])
def test_every_probe_is_right_or_says_why_not(name: str):
    reason = REFUSED[LINE].get(name)
    for probe, entry in entries(name).items():
        if reason is None:
            assert entry.right, f"{probe}: {entry}"
        else:
            assert entry.error is None
            assert re.search(reason, entry.reason)


def test_there_are_twenty_common_ones_and_enough_others():
    assert sum(each.common for each in ARCHITECTURES.values()) == 20
    assert len(ARCHITECTURES.keys() - LEFT_OUT) >= 24
    assert not {name for name in LEFT_OUT if ARCHITECTURES[name].common}
    assert len(PROBES) == 8
