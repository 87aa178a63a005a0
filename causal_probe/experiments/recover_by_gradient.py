"""``causal-probe recover --method gradient`` and ``--data``: the graph from gradients, compared and written as training's is."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError, show_path
from causal_probe.experiments.gradient_recovery import GradientRecovery
from causal_probe.experiments.saving import Clock, kept
from causal_probe.first_gradient.batches import AT_ONCE, SEQUENCES_OF_SEVERAL, batches_of, table_entries
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.first_gradient.slots import GradientSlots, gradient_slots
from causal_probe.graphs import choose_graph
from causal_probe.hooks.check import describe
from causal_probe.models import DisentangledTransformer
from causal_probe.models.disentangled import count_weights
from causal_probe.options import takes
from causal_probe.options.recover import GradientOptions, TokensOptions
from causal_probe.tasks import Batch, InContextMarkov, generator, reference_losses
from causal_probe.tasks.task import join_batches
from causal_probe.training import evaluate

__all__ = ["read_tokens", "recover_by_gradient", "recover_from_tokens"]

#: Sequences that the gradient of a tree is taken over.
SEQUENCES = 2**15
EVALUATION_SEQUENCES = 2**13
#: Entries of one sequence's tables: 256 MiB, and as said.
MAX_TABLES = 2**26
#: Entries of the evaluation sequences, one-hot, and of their tables. With many states there are fewer such sequences.
EVALUATED = 2**27
#: Weights of the model that is built and saved: 4 GiB.
MAX_MODEL = 2**30
#: A row of layer 0 puts all but T e^-STRENGTH of its attention on the parent that was found.
STRENGTH = 20.0


@takes(GradientOptions)
def recover_by_gradient(o: GradientOptions) -> GradientRecovery:
    """Read the graph of a task from gradients of an untrained model, and compare with the truth.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with, also if there are so many states that one sequence's tables, or the model, would not
        fit into memory; nothing is written then.

    Examples
    --------
    >>> found = recover_by_gradient("chain", n_positions=8, n_sequences=2048)
    >>> sorted(found.recovered.edges)
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    """
    clock = Clock()
    truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.seed)
    task = InContextMarkov(truth, o.d_vocab, o.concentration)
    n_sequences = o.n_sequences or (SEQUENCES if task.is_tree else SEQUENCES_OF_SEVERAL)
    _check_size(o.d_vocab, task.n_positions, task.n_slots)
    if table_entries(task) > MAX_TABLES:
        raise CausalProbeError(
            f"The tables of transitions of one sequence over {o.d_vocab:,} states have {table_entries(task):,} entries; {MAX_TABLES:,} are "
            "the most. Take fewer states."
        )
    evaluated = max(2, min(EVALUATION_SEQUENCES, EVALUATED // max(table_entries(task), task.n_positions * o.d_vocab)))
    settings = o.settings(
        method="gradient",
        n_positions=task.n_positions,
        root_probability=o.root_probability if o.graph == "forest" else None,
        n_sequences=n_sequences,
        edges=list(truth.edges),
        evaluation_sequences=evaluated,
    )
    with kept(o, settings, GradientRecovery) as saved:
        drawn = batches_of(task, n_sequences, generator(o.seed, "gradient"))
        found = gradient_graph(drawn) if task.is_tree else gradient_slots(drawn)
        model = _model(found, o.d_vocab, task.n_positions)
        held_out = [Batch(b.tokens, b.target, {}) for b in batches_of(task, evaluated, generator(o.seed, "evaluation"))]
        return saved(
            GradientRecovery(
                found=found,
                truth=truth,
                comparison=found.compare(truth),
                loss=evaluate(model, held_out),
                reference_losses=reference_losses(task, join_batches(held_out)),
                attention=attention(model),
                seconds=clock.timings["total"],
                model=model,
                settings=settings,
                provenance=describe(model),
            )
        )


@takes(TokensOptions)
def recover_from_tokens(data: str | os.PathLike[str], o: TokensOptions) -> GradientRecovery:
    """Find each position's most likely parent in your token sequences; whether it has one is not decided.

    Raises
    ------
    CausalProbeError
        If the file holds no such tokens (see :func:`read_tokens`), or an argument can't be worked with, also if there are so many states
        that the model would not fit into memory; nothing is written then.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.1)
    >>> batch = task.sample(2048, tasks.generator(0, "tokens"), targets="hard")
    >>> tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], dim=1)
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/tokens.npy", tokens.numpy())
    ...     recover_from_tokens(f"{folder}/tokens.npy").found.decided  # without the transitions nobody knows which nodes are roots
    False
    """
    clock = Clock()
    tokens = read_tokens(data)
    n_positions = tokens.shape[1] - 1
    d_vocab = o.d_vocab or max(2, int(tokens.max()) + 1)
    _check_size(d_vocab, n_positions, 1)
    settings = o.settings(
        method="gradient", data=os.fspath(data), n_positions=n_positions, d_vocab=d_vocab, n_sequences=len(tokens)
    )
    with kept(o, settings, GradientRecovery) as saved:
        found = gradient_graph(torch.split(tokens, max(1, AT_ONCE // max(tokens.shape[1], d_vocab))), d_vocab=d_vocab)
        model = _model(found, d_vocab, n_positions)
        return saved(
            GradientRecovery(
                found=found,
                attention=attention(model),
                seconds=clock.timings["total"],
                model=model,
                settings=settings,
                provenance=describe(model),
            )
        )


def read_tokens(path: str | os.PathLike[str]) -> Tensor:
    """Token sequences [sequence, T + 1] from a ``.npy`` file, checked.

    Raises
    ------
    CausalProbeError
        If the file can't be read, holds pickled objects (ragged rows, say: they are not loaded), or is no table of whole numbers
        of at least 0 with at least two sequences of at least four tokens.
    """
    name, path = show_path(path), os.path.expanduser(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise CausalProbeError(f"Can't read {name}: it is no .npy file.")
    try:
        with open(path, "rb") as file:
            if not file.read(6).startswith((np.lib.format.MAGIC_PREFIX, b"PK")):
                raise ValueError
        # Mapped, a header that states more numbers than the file holds is refused before there is memory for them.
        found = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise CausalProbeError(f"Can't read {name}: {error.strerror or 'it is no .npy file'}.") from error
    except (ValueError, EOFError, OverflowError, MemoryError, zipfile.BadZipFile) as error:
        reason = (
            "it holds pickled objects, such as rows of different lengths, which are never loaded"
            if "Python objects" in str(error)
            else "it is no .npy file, or is cut short"
        )
        raise CausalProbeError(f"Can't use {name}: {reason}. Save one table with numpy.save(path, tokens).") from error
    what = None
    if not isinstance(found, np.ndarray):
        what = "an archive of several arrays"
    elif found.dtype.kind not in "iu":
        what = f"numbers of the type {found.dtype}, which are no tokens"
    elif found.ndim != 2 or found.shape[0] < 2 or found.shape[1] < 4:
        what = f"an array of the shape {list(found.shape)}"
    elif int(found.min()) < 0:
        what = f"the token {int(found.min())}"
    elif int(found.max()) >= 2**31:
        what = f"the token {int(found.max())}"
    if what is not None:
        raise CausalProbeError(
            f"{name} holds {what}. Give whole numbers from 0 on, [sequence, T + 1], at least 2 sequences of 4 tokens; the "
            "last of each is what came after the others."
        )
    return torch.from_numpy(found.astype(np.int64))


def attention(model: DisentangledTransformer) -> Float[np.ndarray, "head child parent"]:
    """Layer 0's attention in a model that attends by position."""
    n = model.n_positions
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = torch.stack([model.block(0, head, query="position", key="position") for head in range(model.heads[0])])
    return np.asarray(scores.double().masked_fill(future, float("-inf")).softmax(-1).numpy())


def _model(found: GradientGraph | GradientSlots, d_vocab: int, n_positions: int) -> DisentangledTransformer:
    """Weights that copy the leading parents in layer 0 and compare in layer 1, all others zero.

    Layer 1 compares the last token (one parent) with what each position copied, or (several) what the last row copied: the tokens of the
    predicted node's parents.
    """
    slots = (
        found.leading.tolist()
        if isinstance(found, GradientSlots)
        else [[-1 if p is None else p for p in found.candidates]]
    )
    model = DisentangledTransformer(d_vocab, n_positions, (max(1, len(slots)), 1))
    eye = torch.eye(d_vocab)
    for head, leading in enumerate(slots):
        block = model.block(0, head, query="position", key="position")
        for child, parent in enumerate(leading):
            if parent >= 0:
                block[child, parent] = STRENGTH
        asked = "token"
        if isinstance(found, GradientSlots):
            block[-1] = 0
            block[-1, found.queries[head]] = STRENGTH
            asked = f"L0H{head}.token"
        model.block(1, 0, query=asked, key=f"L0H{head}.token").copy_(eye)
    model.output_block("L1H0.token").copy_(eye)
    return model


def _check_size(d_vocab: int, n_positions: int, slots: int) -> None:
    """Refuse what the model of :func:`_model` would be too large for, before anything is computed."""
    weights = count_weights(d_vocab, n_positions, (slots, 1))
    if weights > MAX_MODEL:
        raise CausalProbeError(
            f"The model that has the graph would have {weights:,} weights for {d_vocab:,} states and {n_positions:,} positions; {MAX_MODEL:,} are the "
            "most. Take fewer states (renumber your own tokens: those that occur, from 0 on), or call gradient_graph, which builds no model."
        )
