"""The studies: of each its options, its function and what it is about. The commands follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from causal_probe.options.base import Options
from causal_probe.options.circuit import CircuitOptions
from causal_probe.options.discover import DiscoverOptions
from causal_probe.options.recover import (
    GradientOptions,
    InContextOptions,
    PlanOptions,
    RecoverOptions,
    SequencesOptions,
    TokensOptions,
)
from causal_probe.options.scan import MergeOptions, ScanOptions
from causal_probe.options.structure import StructureOptions
from causal_probe.options.studies import (
    CheckOptions,
    EvidenceOptions,
    LeaderboardOptions,
    ReproduceOptions,
    SentimentOptions,
    SessionsOptions,
    SweepOptions,
)

__all__ = ["STUDIES", "Study"]


@dataclass(frozen=True)
class Study:
    """A study, by the name of its function.

    Attributes
    ----------
    options
        Its options.
    about
        The question that it answers, in one line.
    command
        The command that runs it; None if there is none. Several studies may share one: each is then a mode of it.
    mode
        As a mode of a command: what it does, in a few words.
    method
        As a mode: the value of ``--method`` that chooses it. A study of a subject is chosen by the subject.
    keeps
        What an interrupted run leaves in its folder, and the message about it.
    lists
        The function that lists the choices when the command is given none.
    place
        The room of the function.
    examples
        The argument that the command takes.
    """

    options: type[Options]
    about: str
    command: str | None = None
    mode: str = ""
    method: str | None = None
    keeps: tuple[str, str] | None = None
    lists: str | None = None
    place: Literal["experiments", "papers", "sweep"] = "experiments"
    examples: tuple[str, ...] = ()


#: Every study by the name of its function, in the order in which the commands are listed.
STUDIES: Mapping[str, Study] = {
    "recover": Study(
        RecoverOptions,
        "Train a transformer on a task of known causal graph, read the graph out of it, and compare with the truth.",
        command="recover",
        mode="training a model",
        method="training",
        keeps=("training.checkpoint.safetensors", "The training so far is kept in"),
        examples=("--graph chain --d-vocab 10 --out out/chain",),
    ),
    "recover_by_gradient": Study(
        GradientOptions,
        "Train nothing: read the graph of the task from gradients of an untrained model, and compare with the truth.",
        command="recover",
        mode="taking a gradient",
        method="gradient",
        examples=("--method gradient --graph two-parent",),
    ),
    "graph_from_file": Study(
        SequencesOptions,
        "Find the causal graph of token sequences of your own, each claim with its test and level.",
        command="recover",
        mode="tokens of your own",
        examples=("--data tokens.npy --level 0.01 --out out/mine",),
    ),
    "recover_from_tokens": Study(
        TokensOptions,
        "Find each position's candidate parent in sequences whose last token succeeds the one before it, by gradient.",
        command="recover",
        mode="tokens of your own, the last one a successor",
        method="gradient",
        examples=("--data tokens.npy --method gradient",),
    ),
    "in_context_graph": Study(
        InContextOptions,
        "Train nothing: ask a model whether it reads the graph in its context; the states become words of its vocabulary.",
        command="recover",
        mode="asking a model",
        examples=("--model MODEL --graph lag-2",),
    ),
    "plan_sequences": Study(
        PlanOptions,
        "How many sequences does a causal graph need? Simulated data of known graphs, by length, states, concentration and law.",
        command="plan",
        examples=("--n-positions 20 --concentration 0.1",),
    ),
    "check_model": Study(
        CheckOptions,
        "Say what will work on a model: its hooks are looked at, and asked what is known beforehand. Exit code 1 if not all will.",
        command="check",
        examples=("MODEL",),
    ),
    "scan": Study(
        ScanOptions,
        "Score every attention head of a model: previous-token, duplicate-token, induction and other heads.",
        command="scan",
        examples=(
            "MODEL --verify --out out/scan",
            "MODEL --attributions --out out/circuits",
            "MODEL --corpus FOLDER --shard 0/4 --out out/shard0",
        ),
    ),
    "model_circuit": Study(
        CircuitOptions,
        "Which edges between heads and MLPs carry a behaviour? Each edge with its effect, its test and the contrast.",
        command="circuit",
        examples=("MODEL --task induction --out out/circuit", "MODEL --task prompts.jsonl --contrast corrupted --json"),
    ),
    "model_structure": Study(
        StructureOptions,
        "What structure has a model? Dependencies, the order of the context, directions of scores, continuations.",
        command="structure",
        examples=("MODEL --out out/structure", "MODEL --conllu FILE.conllu --n-sentences 500"),
    ),
    "merge_scans": Study(
        MergeOptions,
        "Put the scans of a corpus' shards together: exactly what one scan of the whole would give.",
        command="merge",
        examples=("out/shard0 out/shard1 out/shard2 out/shard3 --out out/whole",),
    ),
    "leaderboard": Study(
        LeaderboardOptions,
        "Which causal structures can these models read in their context?",
        command="leaderboard",
        examples=("MODEL MODEL --out out/board",),
    ),
    "discover_in_text": Study(
        DiscoverOptions,
        "Read a causal graph over the tokens of a text out of a layer's attention, and explain a decision.",
        command="discover",
        examples=('MODEL --text "The old keeper wrote a letter" --explain -1',),
    ),
    "reproduce": Study(
        ReproduceOptions,
        "Do a paper's experiment again: its figures, and our numbers beside the paper's. Without a name: list them.",
        command="reproduce",
        place="papers",
        examples=("", "figure-9 --quick --out out/figure-9"),
        lists="list_reproductions",
        keeps=("parts", "Finished parts and the training so far are kept in"),
    ),
    "sweep": Study(
        SweepOptions,
        "Run probes over many models, tasks, seeds and settings. Run it again to go on after an interruption.",
        command="sweep",
        place="sweep",
        examples=("SPEC.yaml --out out/sweep --jobs 2",),
        keeps=("cells", "Finished cells are kept in"),
    ),
    "compare_evidence": Study(EvidenceOptions, "Which evidence finds the causal graph, and at what cost?"),
    "explain_sentiment": Study(SentimentOptions, "Does CLEANN name the word that carries a sentence's sentiment?"),
    "explain_sessions": Study(SessionsOptions, "Does CLEANN name the item of a session that caused the last one?"),
}
