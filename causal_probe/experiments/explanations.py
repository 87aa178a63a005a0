"""The two demonstrations of CLEANN: a sentiment classifier, and a recommender; each method on the same inputs.

Both are small, so that they can be made anywhere, and planted, so that the truth is known: which word carries the sentiment, which
item of a session caused the last one.
"""

# transformers' constructors and torch's backward carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.read import read_layer
from causal_probe.models.loading import load_model
from causal_probe.probes import Explanation, ExplanationSummary, outputs_of, summarise
from causal_probe.results import escape

__all__ = ["ExplanationStudy", "explain_sentiment", "explain_sessions", "read_ratings"]

METHODS = ("cleann", "attention", "gradient", "leave-one-out")

ADJECTIVES = (
    ("terrible", "awful", "boring", "dull", "poor", "horrible", "ugly", "weak"),
    ("usual", "average", "typical", "ordinary", "common", "normal", "recent", "[MASK]"),
    ("wonderful", "great", "charming", "brilliant", "superb", "excellent", "beautiful", "strong"),
)
THINGS = ("film", "book", "play", "concert", "novel", "story", "show", "movie")
PEOPLE = ("my sister", "our teacher", "the old man", "a friend", "the critic", "her brother")
SENTENCES = (
    "{who} said that the {thing} was {adjective} from start to end.",
    "the {thing} we saw last week with {who} was really {adjective}.",
    "in spite of the rain {who} thought the {thing} {adjective}.",
    "what a {adjective} {thing}, and {who} agreed with me.",
)

#: Synthetic sessions: an item below CAUSES causes the item CAUSES places higher as the last one; the others are noise.
CAUSES, ITEMS, LENGTH = 12, 60, 10


@dataclasses.dataclass(frozen=True, repr=False)
class ExplanationStudy:
    """Explanations of many decisions by every method.

    Attributes
    ----------
    summary
        Set size, success rate and replacement rank, with intervals.
    explanations
        For each input: by method.
    planted
        For each input: the nodes that were planted as the cause; None where the truth is not known.
    accuracy
        Share of the inputs that the model decides as they were made, in [0, 1]; for ratings: that have their last item first.
    """

    summary: ExplanationSummary
    explanations: tuple[dict[str, Explanation], ...]
    planted: tuple[tuple[int, ...], ...] | None
    accuracy: float

    def with_cause(self, method: str) -> float | None:
        """Share of the inputs, of those for which the method found a set, with a planted cause in any of its sets; None where unknown."""
        if self.planted is None:
            return None
        found = [
            any(node in each for each in explained[method].sets for node in planted)
            for explained, planted in zip(self.explanations, self.planted, strict=True)
            if explained[method].sets
        ]
        return float(np.mean(found)) if found else None

    def _table(self) -> pd.DataFrame:
        table = self.summary.table.copy()
        table["with cause"] = [self.with_cause(method) for method in table.index]
        return table.T.round(3)

    def _title(self) -> str:
        return f"ExplanationStudy of {len(self.explanations)} inputs, accuracy {self.accuracy:.3f}"

    def __repr__(self) -> str:
        return f"{self._title()}\n{self._table().to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{self._table().to_html(na_rep='', border=0)}"


def explain_sentiment(
    encoder: str | os.PathLike[str], *, inputs: int = 200, max_size: int = 3, seed: int = 0
) -> ExplanationStudy:
    """A sentiment classifier on a pretrained encoder, trained on made sentences and explained on others.

    Only a linear layer over the pooled output is trained (logistic regression), on 480 sentences of three classes: negative, neutral and
    positive, by one adjective (or the mask, which is neutral). Explained are sentences that are not neutral, read at [CLS], on the
    graphs of all heads of the last layer; tokens are replaced by the mask.

    Parameters
    ----------
    encoder
        A folder with a BERT encoder in Hugging Face form.
    inputs
        How many sentences are explained.
    max_size
        The largest set that is tried.
    seed
        Of the sentences.
    """
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModelForSequenceClassification

    loaded = load_model(encoder, any_kind=True)
    tokenizer, rng = loaded.tokenizer, np.random.default_rng(seed)
    model: Any = AutoModelForSequenceClassification.from_config(
        type(loaded.model.config).from_dict({**loaded.model.config.to_dict(), "num_labels": 3}),
        attn_implementation="eager",
    )
    model.base_model.load_state_dict(loaded.model.state_dict())
    model.eval()
    texts, classes, _ = _sentences(480, rng, (0, 1, 2))
    pooled = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            pooled.append(
                model.base_model(
                    **tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
                ).pooler_output
            )
    fit = LogisticRegression(C=100, max_iter=5000).fit(torch.cat(pooled).numpy(), classes)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(fit.coef_))
        model.classifier.bias.copy_(torch.tensor(fit.intercept_))

    texts, classes, adjectives = _sentences(inputs, rng, (0, 2))
    explained, planted, right = [], [], 0
    for text, label, adjective in zip(texts, classes, adjectives, strict=True):
        tokens = tokenizer(text)["input_ids"]
        found = _explain(
            model,
            tokens,
            target=0,
            fixed=[len(tokens) - 1],
            replacement=tokenizer.mask_token_id,
            kind="class",
            max_size=max_size,
        )
        pieces = set(tokenizer(adjective, add_special_tokens=False)["input_ids"])
        cause = [place for place, token in enumerate(tokens) if token in pieces]
        explained.append(found)
        planted.append(tuple(cause))
        right += found["cleann"].decision == label
    return ExplanationStudy(summarise(explained), tuple(explained), tuple(planted), right / inputs)


def _sentences(n: int, rng: np.random.Generator, classes: Sequence[int]) -> tuple[list[str], list[int], list[str]]:
    texts, labels, adjectives = [], [], []
    for _ in range(n):
        label = int(rng.choice(classes))
        adjective = str(rng.choice(ADJECTIVES[label]))
        texts.append(
            str(rng.choice(SENTENCES)).format(who=rng.choice(PEOPLE), thing=rng.choice(THINGS), adjective=adjective)
        )
        labels.append(label)
        adjectives.append(adjective)
    return texts, labels, adjectives


def explain_sessions(
    *,
    ratings: str | os.PathLike[str] | None = None,
    inputs: int = 200,
    steps: int = 600,
    max_size: int = 3,
    seed: int = 0,
) -> ExplanationStudy:
    """A small recommender in the manner of BERT4Rec, trained on sessions and explained on others.

    Two layers, two heads, width 64; the last item is masked and predicted, with other items masked now and then. Explained is the item
    that it puts first at the mask, on the graphs of all heads of the last layer; items are replaced by the mask.

    Parameters
    ----------
    ratings
        A ratings file in MovieLens-100k's format (user, item, rating, time, between tabs): a session is a user's last items. By default
        synthetic sessions of nine noise items and causes: the last item is the effect of the one cause in the session.
    inputs
        How many sessions are explained.
    steps
        Training steps, of 128 sessions.
    max_size
        The largest set that is tried.
    seed
        Of everything.
    """
    from transformers import BertConfig, BertForMaskedLM

    rng = np.random.default_rng(seed)
    if ratings is None:
        sessions, held = synthetic_sessions(4096, rng), synthetic_sessions(inputs, rng)
        places: list[int] | None = [int(np.flatnonzero(row[:-1] < CAUSES)[0]) for row in held]
        n_items = ITEMS
    else:
        everything = read_ratings(ratings)
        if len(everything) < 2 * inputs:
            raise CausalProbeError(
                f"{ratings} has {len(everything)} users with enough ratings; {inputs} inputs need {2 * inputs}."
            )
        order = rng.permutation(len(everything))
        held, sessions, places = everything[order[:inputs]], everything[order[inputs:]], None
        n_items = int(everything.max()) + 1
    mask = n_items
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = BertForMaskedLM._from_config(
            BertConfig(
                vocab_size=n_items + 1,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=max(16, sessions.shape[1]),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            attn_implementation="eager",
        )
        _train(model, sessions, mask, steps, rng)
    explained, right = [], 0
    last = held.shape[1] - 1
    for row in held:
        tokens = [*row[:-1].tolist(), mask]
        found = _explain(model, tokens, target=last, fixed=[], replacement=mask, kind="masked", max_size=max_size)
        explained.append(found)
        right += found["cleann"].decision == int(row[-1])
    planted = None if places is None else tuple((place,) for place in places)
    return ExplanationStudy(summarise(explained), tuple(explained), planted, right / len(held))


def synthetic_sessions(n: int, rng: np.random.Generator) -> Int[np.ndarray, "session item"]:
    """Sessions [n, LENGTH + 1] of noise items, one cause at a random place, and its effect at the end."""
    rows = rng.integers(2 * CAUSES, ITEMS, size=(n, LENGTH + 1))
    causes = rng.integers(0, CAUSES, size=n)
    rows[np.arange(n), rng.integers(0, LENGTH, size=n)] = causes
    rows[:, -1] = CAUSES + causes
    return rows


def read_ratings(path: str | os.PathLike[str], *, length: int = 10) -> Int[np.ndarray, "user item"]:
    """Each user's last ``length`` items in order of time, items numbered from 0, of a file in MovieLens-100k's format.

    Users with fewer are left out.

    Raises
    ------
    CausalProbeError
        If the file can't be read, or is not four whole numbers a line between tabs.
    """
    try:
        table = pd.read_csv(Path(path), sep="\t", header=None)
    except (OSError, ValueError) as error:
        raise CausalProbeError(f"The ratings {path} can't be read: {error}") from error
    if table.shape[1] != 4 or not all(kind.kind == "i" for kind in table.dtypes):
        raise CausalProbeError(
            f"{path} is no ratings file: each line has user, item, rating and time, whole numbers between tabs."
        )
    table.columns = ["user", "item", "rating", "time"]
    table["item"] = pd.factorize(table["item"], sort=True)[0]
    # Ties in time are broken by item, so that the order of the lines plays no part.
    rows = [
        user["item"].to_numpy()[-length:]
        for _, user in table.sort_values(["time", "item"]).groupby("user")
        if len(user) >= length
    ]
    if not rows:
        raise CausalProbeError(f"No user in {path} has {length} ratings.")
    return np.stack(rows)


def _train(
    model: Any, sessions: Int[np.ndarray, "session item"], mask: int, steps: int, rng: np.random.Generator
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        batch = torch.tensor(sessions[rng.integers(0, len(sessions), 128)])
        hidden = torch.tensor(rng.random(tuple(batch.shape)) < 0.15)
        hidden[:, -1] = True
        logits = model(input_ids=batch.masked_fill(hidden, mask)).logits
        # The last item is what is asked for; the others keep the masked tokens in distribution.
        loss = torch.nn.functional.cross_entropy(logits[:, -1], batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _explain(
    model: Any, tokens: list[int], *, target: int, fixed: list[int], replacement: int, kind: Any, max_size: int
) -> dict[str, Explanation]:
    row = torch.tensor([tokens])
    return probes.explain(
        probes.discover(model, row),
        outputs_of(model, kind, position=target),
        target=target,
        replacement=replacement,
        methods=METHODS,
        head="any",
        fixed=fixed,
        max_size=max_size,
        max_tested=500,
        pattern=read_layer(model, row, -1).mean(dim=0),
        model=model,
    )
