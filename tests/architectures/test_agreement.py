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
#: Beside the common ones; `make architectures` looks at all.
CHECKED = (
    "Mistral, short window", "StarCoder2", "StableLM-2 12B", "Hunyuan V1", "GLM-4-0414", "Command R+", "BLOOM", "Falcon-RW", "FlexOlmo", "Granite 4",
    "LFM2", "OPT", "OLMo", "GPT-Neo", "GPT-J", "Phi-3.5-MoE", "Llama 4", "NanoChat", "AFMoE", "Falcon-H1",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.common or name in CHECKED])
def test_every_probe_is_right_or_says_why_not(name: str):
    reason = REFUSED[LINE].get(name)
    for probe, entry in entries(name).items():
        if reason is None:
            assert entry.right, f"{probe}: {entry}"
        else:
            assert entry.error is None
            assert re.search(reason, entry.reason)


def test_there_are_twenty_common_ones():
    assert sum(each.common for each in ARCHITECTURES.values()) == 20
    assert set(CHECKED) < set(ARCHITECTURES)
    assert len(PROBES) == 8
