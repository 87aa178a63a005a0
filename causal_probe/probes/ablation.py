"""A model's loss with heads ablated: what :func:`~causal_probe.probes.verify` measures, batch by batch.

What a head reads out of the stream (``hook_z``) is replaced at its hook point. The layers below the first ablated head are not
run again: their output is that of the model as it is, and is *replayed*, which halves the cost on the average. (TransformerLens'
``start_at_layer`` would do on HookedTransformer; bridges ignore it or run all layers nevertheless.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, zero_ablate
from causal_probe.hooks.check import HookedModel, attention_hooks, keep, live_hooks, require_hooks
from causal_probe.probes.baselines import Baseline, take_baselines

__all__ = ["Experiment", "Head", "Laboratory", "Measure", "Measured", "next_token", "repeated_token"]

#: (layer, head), counted from 0.
Head: TypeAlias = tuple[int, int]
#: The name of a hook point and what is done there: an edit, or a recorder, which returns None.
Hook: TypeAlias = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of each sequence.

    Attributes
    ----------
    loss
        The loss, in nats.
    logit
        The target's logit, less the mean logit of the vocabulary; None where there is no one target.
    without
        By name, the loss of a predictor that does not do the task, such as an even guess. A model whose loss is not below each of these
        does not do the task. Empty where none is known.
    """

    loss: Float[Tensor, " batch"]
    logit: Float[Tensor, " batch"] | None
    without: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)


#: The measure of the model's performance: ``measure(logits [batch, pos, d_vocab], batch) -> Measured``.
Measure: TypeAlias = Callable[[Tensor, Any], Measured]


@checked
def next_token(queries: Sequence[int] | None = None) -> Measure:
    """The loss, and the logit, of the next token, averaged over some positions.

    Parameters
    ----------
    queries
        The positions at which the next token is predicted, negative ones counted from the end; all but the last by default.

    Returns
    -------
    callable
        ``measure(logits [batch, pos, d_vocab], batch) -> Measured``: the loss in nats (log d_vocab for an even guess) and the target's logit
        less the mean logit, each [batch], means over the positions. A model that does the task has a loss below an even guess.

    Raises
    ------
    CausalProbeError
        When it measures, if a position has no next token.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 4)
    >>> logits[0, 1, 2] = 4.0
    >>> next_token([1])(logits, torch.tensor([[0, 1, 2]])).logit     # 4, less the mean of 4, 0, 0, 0
    tensor([3.])
    """

    def measure(logits: Float[Tensor, "batch pos d_vocab"], batch: Any) -> Measured:
        tokens: Int[Tensor, "batch pos"] = getattr(batch, "tokens", batch)
        pos = tokens.shape[1]
        rows = list(range(pos - 1)) if queries is None else [query % pos for query in queries if -pos <= query < pos]
        if not rows or max(rows) >= pos - 1 or len(rows) != (len(rows) if queries is None else len(queries)):
            raise CausalProbeError(
                f"The next token was to be predicted at the positions {queries}; sequences of {pos} tokens have a next token at 0 to "
                f"{pos - 2}."
            )
        chosen = torch.zeros(tokens.shape, dtype=torch.bool)
        chosen[:, rows] = True
        return _next_token(logits, tokens, chosen)

    return measure


def repeated_token(logits: Float[Tensor, "batch pos d_vocab"], batch: Any) -> Measured:
    """The loss, and the logit, of the next token where the current one has occurred before, in sequences that repeat themselves.

    A model that does the task has a loss below an even guess, and below its own loss on the tokens that are not repeated.

    >>> repeated_token(torch.zeros(1, 5, 4), torch.tensor([[0, 1, 2, 0, 1]])).without["its own loss on what is not repeated"]
    tensor([1.3863])
    """
    tokens: Int[Tensor, "batch pos"] = getattr(batch, "tokens", batch)
    before = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(-1).cpu()
    before[:, -1] = False
    fresh = ~before & ~torch.cat([before[:, 1:], before[:, :1]], 1)
    fresh[:, -1] = False
    found = _next_token(logits, tokens, before)
    own = _next_token(logits, tokens, fresh).loss
    return Measured(found.loss, found.logit, {**found.without, "its own loss on what is not repeated": own})


def _next_token(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]
) -> Measured:
    """Means over the chosen positions of each sequence."""
    sequence, row = chosen.nonzero(as_tuple=True)
    its = logits[sequence, row].to(torch.promote_types(logits.dtype, torch.float32))
    target = tokens.to(its.device)[sequence, row + 1][:, None]
    logit = its.gather(-1, target)[:, 0]
    count = chosen.sum(1).to(its)

    def mean(values: Float[Tensor, " row"]) -> Float[Tensor, " batch"]:
        return torch.zeros_like(count).index_add_(0, sequence.to(its.device), values) / count

    even = torch.full_like(count, math.log(logits.shape[-1]))
    return Measured(mean(its.logsumexp(-1) - logit), mean(logit - its.mean(-1)), {"an even guess": even})


class Laboratory:
    """A model, what is measured of it, and what an ablated head is replaced by.

    Parameters
    ----------
    model
        Any model with hook points ``blocks.{layer}.attn.hook_z``.
    measure
        What is measured.
    reference
        Sequences, other than those that are measured, an equal number for each of these: what replaces a head is taken from them.
    n_sequences
        Number of sequences that will be measured.
    example
        A small batch, to see what the model can do.

    Raises
    ------
    CausalProbeError
        If heads can't be ablated: a hook point is missing, never fires or is not live.
    """

    def __init__(
        self,
        model: HookedModel,
        measure: Measure,
        *,
        reference: Int[Tensor, "reference pos"],
        n_sequences: int,
        example: Any,
    ) -> None:
        self.model = model
        self.measure = measure
        self.n_layers = int(model.cfg.n_layers)
        #: Those that have attention.
        self.layers = [layer for layer, _ in attention_hooks(model, ["z"])]
        self.forwards = 0
        self._require_live(example)
        self.baselines = take_baselines(model, reference, n_sequences)
        #: Hook points of what each layer adds to the stream: attention, then the MLP, where the model has any.
        parts = ["attn_out"] if getattr(model.cfg, "attn_only", False) else ["attn_out", "mlp_out"]
        self.outputs = [[f"blocks.{layer}.hook_{part}" for part in parts] for layer in range(self.n_layers)]
        for layer in set(range(self.n_layers)) - set(self.layers):  # a mixer of another kind
            self.outputs[layer][0] = f"blocks.{layer}.linear_attn.hook_out"
        #: Why direct effects can't be measured; None if they can.
        self.no_direct = self._why_no_direct(example)
        #: Whether layers below the first ablated head can be replayed.
        self.replays = self._can_replay(example)

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        return [(layer, head) for layer in self.layers for head in range(self.baselines.heads[layer])]

    def run(self, batch: Any, hooks: Sequence[Hook] = (), *, replay: Mapping[int, Any] | None = None) -> Measured:
        """Measure one batch; ``replay`` holds, by layer, the outputs of blocks that need not run."""
        return self._measured(batch, hooks, replay or {})

    def _measured(
        self, batch: Any, hooks: Sequence[Hook] = (), replay: Mapping[int, Any] | None = None, *, finite: bool = True
    ) -> Measured:
        """As :meth:`run`; asked whether it is live, a point may be given NaN, and what comes out is not finite."""
        self.forwards += 1
        tokens = getattr(batch, "tokens", batch)
        with replayed(self.model, replay or {}), self.model.hooks(fwd_hooks=list(hooks)):
            logits = self.model(tokens)
        found = self.measure(logits, batch)
        for what, values in {"loss": found.loss, "logit": found.logit, **found.without}.items():
            if values is not None and (values.shape != (len(tokens),) or (finite and not values.isfinite().all())):
                raise CausalProbeError(
                    f"The measured {what} must be one finite number for each of {len(tokens)} sequences; it is "
                    f"{values.tolist() if values.numel() < 9 else list(values.shape)}."
                )
        return found

    # ----------------------------------------------------------------------------------------------------- what can be done

    def _require_live(self, example: Any) -> None:
        names = [attention_hook(layer, "z") for layer in self.layers]
        require_hooks(self.model, names)
        live = live_hooks(self.model, names, lambda: self._measured(example, finite=False).loss)
        if dead := [name for name in names if name not in live]:
            raise CausalProbeError(
                f"No effect of a head can be measured: nothing that is measured depends on the value at {', '.join(dead[:3])}"
                f"{' and others' if len(dead) > 3 else ''}. Load a Hugging Face model with eager attention; the heads of encoder "
                "bridges (BERT) can't be edited."
            )

    def _why_no_direct(self, example: Any) -> str | None:
        if self.run(example).logit is None:
            return "what is measured has no one target"
        if missing := [name for names in self.outputs for name in names if name not in self.model.hook_dict]:
            return f"the model has no hook point {missing[0]}, at which a later layer could be held still"
        for which in zip(*self.outputs, strict=True):  # attention outputs, then those of the MLPs
            if dead := set(which) - live_hooks(self.model, which, lambda: self._measured(example, finite=False).loss):
                return f"nothing reads the value at {sorted(dead)[0]}, so later layers can't be held still"
        return None

    def _can_replay(self, example: Any) -> bool:
        """Whether the model, with the output of all blocks but the last replayed, gives the same without running them."""
        first = "blocks.0.hook_resid_pre"
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != self.n_layers or first not in self.model.hook_dict:
            return False
        outputs: dict[int, Any] = {}
        fired: list[int] = []
        with recorded(self.model, outputs):
            whole = self.run(example)
        count: list[Hook] = [(first, lambda stream, hook: fired.append(1))]
        try:
            last = self.run(example, count, replay={layer: outputs[layer] for layer in range(self.n_layers - 1)})
        except Exception:  # a model whose blocks are more than functions of the stream fails in its own way
            return False
        return (not fired or self.n_layers == 1) and torch.equal(whole.loss, last.loss)


@dataclass(eq=False)
class Experiment:
    """One batch: the model as it is, and with heads ablated. What is kept lives as long as the batch's turn.

    Parameters
    ----------
    laboratory
        The model and what is measured.
    batch
        The batch.
    first
        Number of its first sequence among all that are measured.
    watched
        Heads whose distances from their baselines will be asked for.
    direct
        Whether direct effects will be asked for.
    """

    laboratory: Laboratory
    batch: Any
    first: int = 0
    watched: Sequence[Head] = ()
    direct: bool = False
    clean: Measured = field(init=False)
    _blocks: dict[int, Any] = field(init=False, default_factory=dict)
    _outputs: dict[str, Tensor] = field(init=False, default_factory=dict)
    _heads: dict[int, Tensor] = field(init=False, default_factory=dict)

    def observe(self, hooks: Sequence[Hook] = ()) -> Measured:
        """Run the model as it is, and remember what later runs need."""
        lab = self.laboratory
        layers = {layer for layer, _ in self.watched}
        recorders: list[Hook] = [(attention_hook(layer, "z"), keep(self._heads, layer)) for layer in layers]
        if self.direct and lab.no_direct is None:
            recorders += [(name, keep(self._outputs, name)) for names in lab.outputs for name in names]
        with recorded(lab.model, self._blocks) if lab.replays else nullcontext():
            self.clean = lab.run(self.batch, [*recorders, *hooks])
        return self.clean

    @property
    def sequences(self) -> slice:
        """The place of the batch among all sequences."""
        return slice(self.first, self.first + len(getattr(self.batch, "tokens", self.batch)))

    def distance(self, head: Head) -> dict[Baseline, Float[Tensor, " batch"]]:
        """How far each baseline is from what a watched head puts out in the model as it is, as a share of that."""
        layer, index = head
        return self.laboratory.baselines.distance(layer, index, self.sequences, self._heads[layer])

    def ablate(self, heads: Iterable[Head], baseline: Baseline, hooks: Sequence[Hook] = ()) -> Measured:
        """With all of these heads replaced by a baseline. ``hooks`` may record, above the first of them."""
        heads = sorted(heads)
        if not heads:
            return self.clean
        edits = [self.laboratory.baselines.edit(baseline, *head, self.sequences) for head in heads]
        return self._run(edits, heads[0][0], hooks)

    def zero(self, head: Head) -> Measured:
        """With this head's output zero."""
        return self._run([zero_ablate(*head)], head[0])

    def direct_effect(self, head: Head) -> Float[Tensor, " batch"] | None:
        """By how much the head's output raises the target's logit by itself, over its mean at each position.

        The head is replaced by that mean, and everything that could pass that on, its own layer's MLP and all later layers, is held
        at what it adds to the stream in the model as it is.
        """
        if self.laboratory.no_direct is not None or self.clean.logit is None:
            return None
        layer, index = head
        still = [
            *self.laboratory.outputs[layer][1:],
            *(n for names in self.laboratory.outputs[layer + 1 :] for n in names),
        ]
        edits: list[Hook] = [self.laboratory.baselines.edit("mean", layer, index, self.sequences)]
        edits += [(name, lambda now, hook, name=name: self._outputs[name]) for name in still]
        logit = self._run(edits, layer).logit
        return None if logit is None else self.clean.logit - logit

    def _run(self, edits: Sequence[Hook], layer: int, hooks: Sequence[Hook] = ()) -> Measured:
        below = {number: output for number, output in self._blocks.items() if number < layer}
        return self.laboratory.run(self.batch, [*edits, *hooks], replay=below)


@contextmanager
def recorded(model: Any, outputs: dict[int, Any]) -> Iterator[None]:
    """Put what each block of the model returns into ``outputs``, by layer."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):

            def record(block: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                outputs[layer] = output

            stack.callback(block.register_forward_hook(record).remove)
        yield


@contextmanager
def replayed(model: Any, outputs: Mapping[int, Any]) -> Iterator[None]:
    """Let blocks return what they returned before, without running."""
    with ExitStack() as stack:
        for layer, output in outputs.items():
            block = model.blocks[layer]
            own = vars(block).get("forward")  # some libraries wrap a module's forward in this way, too
            stack.callback(_restore, block, own)
            vars(block)["forward"] = lambda *args, output=output, **kwargs: output
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward
