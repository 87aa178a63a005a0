"""`make architectures`: every probe beside its reference on every architecture, and the page that shows the table.

python -m tests.architectures measure FILE.json       under one line of TransformerLens
python -m tests.architectures page FILE.json ...      writes docs/pages/guides/architectures.md
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.architectures.zoo import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "guides" / "architectures.md"
#: How much of a reason a note gives.
SHOWN = 230

INTRODUCTION = """# What works on which model

Made by `make architectures`. Each row is a model of that architecture with **tiny random weights** (two to four layers, four heads, gains and
biases drawn too), built from transformers' own configuration; no trained model is in the table. Each probe's numbers are compared with a
reference that uses transformers alone:

| probe | reference | agreement |
|---|---|---|
| `scan` | `output_attentions`, and plain loops over the keys that get any | scores to 1e-6, chance to 1e-7 |
| `head_graphs` | the mean of `output_attentions` | 1e-6 |
| `verify` | a hook on the attention's output projection | 1e-5 of the loss |
| `score_gradients` | autograd through zeros that are added to the mask | 1e-5 of the largest |
| `qk_attributions` | the sum over all pairs against the log of the attention | 1e-5 |
| `upstream` | the projection of queries or keys edited, with the norms' scales held | 1e-5 |
| `head_weights` | eigenvalues of the whole matrix from tokens to logits | 1e-4 |
| `in_context_score` | the logits | 1e-5 nats |

✓ agrees; a number is a note: why it is refused. The first {common} are the decoders that most people use; a judgement, not a count. Beyond random
weights, two trained models are in the tests: SmolLM2-135M (4-bit Instruct file), and Gemma-3-270M (4-bit file) where the environment variable
`CAUSAL_PROBE_GEMMA` names its folder.

Layers see what their mask shows: in a sliding window, chance and contrast count the keys in the window alone. Where a model attends to nothing (GPT-OSS's
sinks), rows of attention sum to less than one, and `Evidence.nothing` holds the rest and `nothing` is a column of a scan. In hybrids the layers with attention are probed; what the others write is one
source, `L0.mixer`.

"""

PIECES = """
## What a head's scores are made of

`qk_attributions` and `upstream` take scores apart with each norm's scale of the forward pass held. What is done for each feature:

| feature | how |
|---|---|
| norm before the attention | its scale is a number for each position, its gain is part of the matrix |
| norm behind the attention, multiplier of the residual (Gemma, OLMo 2, Granite) | each head's part is multiplied by the same number as the whole |
| norm of queries and keys (QK-norm), of each head or over the whole width, before or behind the rotation | a number for each position; gain, centring and rotation are read together, by unit vectors in the queries' place |
| soft cap (Gemma 2) | contributions are to the score before the cap; `capped` is what is left of their sum behind it |
| sliding window | keys that the mask leaves out are neither edges nor others |
| sink (GPT-OSS) | one more column of the softmax |
| ALiBi | the source `alibi`, which meets itself |
| latent attention (MLA) | the two steps are one matrix, the norm between them one more number; rotated numbers of the key are shared by all heads |
| output gate (Qwen3.5) | a head's output is what the projection reads, behind the gate |
| experts | a layer's MLP is one source, whatever experts it uses |
| layer without attention; Mamba beside attention (Falcon-H1) | one source, `mixer` |
| queries and keys that pass no hook point (Phi-3.5-MoE, Llama 4, GPT-J) | they are caught where transformers' own attention gets them; one norm more, or none, is read by unit vectors as above |

Of the pairs of sources with the largest contribution, [`intervened`](../concepts/ablation.md#what-makes-a-head-attend-probesqk_attributions-probesupstream) says what is left of them
when every norm is computed anew; a source can be cut into parts of your own.

## What stays refused

| model | probe | feature |
|---|---|---|
| Gemma 4 | `qk_attributions`, `upstream`, `head_weights` | heads of full attention are wider than those of a window, which the bridge cuts by one width |
| GLM-5 | `upstream` | which keys a query sees depends on the sequence (a sparse index) |
| XGLM | `score_gradients` | its attention takes one mask for all heads, and shows no live scores |
| Cohere, Cohere2, Command R+, Hunyuan V1 with TransformerLens 3.9 | all | the bridge computes another model, or there is none |
| state-space models without attention | all | there is no attention |
"""


def measure() -> dict[str, Any]:
    """The entries of all architectures under this line of TransformerLens."""
    from tests.architectures.agreement import LINE, entries

    warnings.simplefilter("ignore")
    rows = {}
    for name in ARCHITECTURES:
        found = entries(name)
        rows[name] = {
            probe: {"right": entry.right, "error": entry.error, "reason": entry.reason}
            for probe, entry in found.items()
        }
        print(
            name, {probe: str(entry)[:60] for probe, entry in found.items() if not entry.right} or "right", flush=True
        )
    return {"line": LINE, "rows": rows}


def page(measured: Sequence[Mapping[str, Any]]) -> str:
    """The page, of what was measured under one line of TransformerLens or several."""
    common = sum(each.common for each in ARCHITECTURES.values())
    text = [INTRODUCTION.format(common=common)]
    for found in sorted(measured, key=lambda each: each["line"], reverse=True):
        rows: Mapping[str, Any] = found["rows"]
        probes = list(next(iter(rows.values())))
        right = sum(all(entry["right"] for entry in rows[name].values()) for name in rows if ARCHITECTURES[name].common)
        notes: list[str] = []
        text += [f"\n## TransformerLens {found['line']}\n\n", f"All probes are right on {right} of the {common}.\n\n"]
        text += [f"| architecture | what tells it apart | {' | '.join(f'`{probe}`' for probe in probes)} |\n"]
        text += ["|---" * (len(probes) + 2) + "|\n"]
        for name, row in rows.items():
            cells = [_cell(entry, notes) for entry in row.values()]
            text += [f"| {name} | {ARCHITECTURES[name].trait} | {' | '.join(cells)} |\n"]
        text += ["\n", *(f"{number}. {note}\n" for number, note in enumerate(notes, 1))]
    return "".join([*text, PIECES])


def _cell(entry: Mapping[str, Any], notes: list[str]) -> str:
    if entry["right"]:
        return "✓"
    note = (
        "Wrong."
        if entry["error"] is not None
        else entry["reason"].split(": they differ by")[0].split(": its log-prob")[0]
    )
    note = note if len(note) <= SHOWN else note[: note.rindex(" ", 0, SHOWN)] + " ..."
    if note not in notes:
        notes.append(note)
    return str(notes.index(note) + 1)


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        Path(sys.argv[2]).write_text(json.dumps(measure()), encoding="utf-8")
    else:
        PAGE.write_text(
            page([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:]]), encoding="utf-8"
        )
