"""A model's loss with heads ablated: what :func:`~causal_probe.probes.verify` measures, batch by batch.

What a head reads out of the stream (``hook_z``) is replaced at its hook point. Not run again is what would give the same: the layers below the
first ablated head are *replayed*, and the unembedding reads only the rows of which the loss is a mean. (TransformerLens'
``start_at_layer`` would do on HookedTransformer; bridges ignore it or run all layers nevertheless.) Each short cut is tried beside the whole model
first, and left out where it does not give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, zero_ablate
from causal_probe.hooks.check import (
    HookedModel,
    attention_hooks,
    describe,
    keep,
    live_hooks,
    logits_of,
    require_hooks,
    undisturbed,
)
from causal_probe.probes.baselines import BASELINES, Baseline, take_baselines
from causal_probe.probes.measures import Measure, Measured, mean_over_rows, rows_of
from causal_probe.probes.replay import only_rows, passed_on, recorded, replayed

__all__ = ["Experiment", "Head", "Laboratory"]

#: (layer, head), counted from 0.
Head: TypeAlias = tuple[int, int]
#: The name of a hook point and what is done there: an edit, or a recorder, which returns None.
Hook: TypeAlias = tuple[str, Callable[..., Any]]
#: A short cut may miss the whole model by so much of what is measured: rounding alone.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2}
COARSE = 5e-2


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
        self.replays = self.picks = self.passes = False
        self._require_live(example)
        self.baselines = take_baselines(model, reference, n_sequences)
        #: Hook points of what each layer adds to the stream: attention, then the MLP, where the model has any.
        parts = ["attn_out"] if getattr(model.cfg, "attn_only", False) else ["attn_out", "mlp_out"]
        self.outputs = [[f"blocks.{layer}.hook_{part}" for part in parts] for layer in range(self.n_layers)]
        for layer in set(range(self.n_layers)) - set(self.layers):  # a mixer of another kind
            self.outputs[layer][0] = f"blocks.{layer}.linear_attn.hook_out"
        #: Why direct effects can't be measured; None if they can.
        self.no_direct = self._why_no_direct(example)
        #: Whether layers below the first ablated head can be replayed, the unembedding can read some rows alone, and what a head writes directly can
        #: pass the layers behind it by without running them.
        self.replays = self._can_replay(example)
        self.picks = self._can_pick(example)
        self.passes = self.replays and self.no_direct is None and self._can_pass(example)

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        return [(layer, head) for layer in self.layers for head in range(self.baselines.heads[layer])]

    def run(self, batch: Any, hooks: Sequence[Hook] = (), *, replay: Mapping[int, Any] | None = None) -> Measured:
        """Measure the loss and the logit of one batch; ``replay`` holds, by layer, the outputs of blocks that need not run."""
        return self._measured(batch, hooks, replay, rows=self._rows(batch) if self.picks else None)

    def run_whole(self, batch: Any) -> Measured:
        """As :meth:`run`, with the losses of predictors that don't do the task."""
        return self._measured(batch)

    def _rows(self, batch: Any) -> Bool[Tensor, "batch pos"] | None:
        """The rows that are read; None for all."""
        rows = rows_of(self.measure)
        return None if rows is None else rows(getattr(batch, "tokens", batch))

    def _measured(
        self,
        batch: Any,
        hooks: Sequence[Hook] = (),
        replay: Mapping[int, Any] | None = None,
        *,
        rows: Bool[Tensor, "batch pos"] | None = None,
        finite: bool = True,
    ) -> Measured:
        """As :meth:`run`; asked whether it is live, a point may be given NaN, and what comes out is not finite."""
        self.forwards += 1
        tokens = getattr(batch, "tokens", batch)
        picked: AbstractContextManager[None] = nullcontext() if rows is None else only_rows(self.model, rows)
        with replayed(self.model, replay or {}), self.model.hooks(fwd_hooks=list(hooks)), picked:
            logits = self.model(tokens)
        if rows is None:
            found = self.measure(logits, batch)
        else:
            found = mean_over_rows(logits_of(logits, tokens, shape=(1, int(rows.sum())))[0], tokens, rows)
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
            whole = self._measured(example)
        count: list[Hook] = [(first, lambda stream, hook: fired.append(1))]
        try:
            last = self._measured(example, count, {layer: outputs[layer] for layer in range(self.n_layers - 1)})
        except Exception:  # a model whose blocks are more than functions of the stream fails in its own way
            return False
        return (not fired or self.n_layers == 1) and torch.equal(whole.loss, last.loss)

    def _can_pick(self, example: Any) -> bool:
        """Whether the unembedding gives the same of some rows as of all."""
        rows = self._rows(example)
        if rows is None or not isinstance(getattr(self.model, "unembed", None), nn.Module):
            return False
        whole = self._measured(example)
        try:
            picked = self._measured(example, rows=rows)
        except Exception:  # a model whose logits are more than a function of its last stream fails in its own way
            return False
        return self._same(whole, picked)

    def _can_pass(self, example: Any) -> bool:
        """Whether the layers behind a head, which add what they added before, need not run."""
        experiment = Experiment(self, example, direct=True)
        experiment.observe()
        for head in dict.fromkeys([(self.layers[0], 0), (self.layers[-1], 0)]):
            held = experiment.direct_effect(head)
            try:
                passed = experiment.direct_effect(head, passes=True)
            except Exception:  # a model whose later blocks are more than sums fails in its own way; they are run
                return False
            if held is None or passed is None or not self._equal(held, passed):
                return False
        return True

    def _same(self, one: Measured, other: Measured) -> bool:
        logits = one.logit is not None and other.logit is not None and self._equal(one.logit, other.logit)
        return self._equal(one.loss, other.loss) and logits

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        """Up to rounding."""
        slack = ROUNDING.get(describe(self.model)["dtype"], COARSE)
        return torch.allclose(one, other, rtol=slack, atol=slack)


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

    def direct_effect(self, head: Head, *, passes: bool | None = None) -> Float[Tensor, " batch"] | None:
        """By how much the head's output raises the target's logit by itself, over its mean at each position.

        The head is replaced by that mean, and everything that could pass that on, its own layer's MLP and all later layers, is held
        at what it adds to the stream in the model as it is. ``passes``: later layers are not run for that; by default where that was seen to give the same.
        """
        lab = self.laboratory
        if lab.no_direct is not None or self.clean.logit is None:
            return None
        layer, index = head
        edits: list[Hook] = [lab.baselines.edit("mean", layer, index, self.sequences)]
        still = lab.outputs[layer][1:]
        behind: AbstractContextManager[None] = nullcontext()
        if self._blocks and (lab.passes if passes is None else passes):
            behind = passed_on(lab.model, self._blocks, layer)
        else:
            still = [*still, *(name for names in lab.outputs[layer + 1 :] for name in names)]
        edits += [(name, lambda now, hook, name=name: self._outputs[name]) for name in still]
        with behind:
            logit = self._run(edits, layer).logit
        return None if logit is None else self.clean.logit - logit

    def first_order(self) -> dict[tuple[Baseline, Head], Float[Tensor, " batch"]]:
        """By baseline and head, the rise of each sequence's loss when it replaces the head, estimated from the gradient at the head's output: to first order."""
        lab = self.laboratory
        outputs: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}

        def watch(layer: int) -> Hook:
            def edit(z: Tensor, hook: Any) -> Tensor:
                if layer not in leaves:  # a bridge may call a hook once for each of its names
                    leaves[layer], outputs[layer] = torch.zeros_like(z, requires_grad=True), z.detach()
                return z + leaves[layer]

            return attention_hook(layer, "z"), edit

        with undisturbed(lab.model), torch.enable_grad():
            parameters: Iterable[Tensor] = getattr(lab.model, "parameters", tuple)()
            for parameter in parameters:  # so that the gradient's graph starts at the leaves
                parameter.requires_grad_(False)
            loss = lab.run(self.batch, [watch(layer) for layer in lab.layers]).loss
            gradients = torch.autograd.grad(loss.sum(), [leaves[layer] for layer in lab.layers])
        found: dict[tuple[Baseline, Head], Tensor] = {}
        for layer, gradient in zip(lab.layers, gradients, strict=True):
            for baseline in BASELINES:
                change = lab.baselines.replacement(baseline, layer, self.sequences, outputs[layer]) - outputs[layer]
                rises = (gradient * change).sum((1, 3)).float()
                found |= {(baseline, (layer, index)): rises[:, index] for index in range(rises.shape[1])}
        return found

    def _run(self, edits: Sequence[Hook], layer: int, hooks: Sequence[Hook] = ()) -> Measured:
        below = {number: output for number, output in self._blocks.items() if number < layer}
        return self.laboratory.run(self.batch, [*edits, *hooks], replay=below)
