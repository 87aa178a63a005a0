"""The one reader of tokens: every batch that a probe is given is looked at here, before a model sees it.

A probe is a function under :func:`probe`. It is given a model and tokens in any of the forms that :func:`read_tokens` names, and gets
tensors of 64-bit whole numbers [batch, pos] that the model can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, require_hooks
from causal_probe.hooks.tokens import check_known, starts_ends_pads, text_start

__all__ = [
    "Batches",
    "Cut",
    "OfText",
    "apart",
    "as_tensor",
    "context_length",
    "is_row",
    "of_tokens",
    "probe",
    "read_tokens",
    "token_faults",
    "tokens_of_text",
]

P = ParamSpec("P")
R = TypeVar("R")


def context_length(model: HookedModel) -> int | None:
    """The most tokens that a model can be given at once; None where it does not say, as some models with ALiBi.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> context_length(DisentangledTransformer(d_vocab=3, n_positions=4))
    4
    """
    # n_ctx of a DisentangledTransformer is one above its longest sequence, as TransformerLens' detect_head wants it.
    limits = (getattr(model, "n_positions", None), getattr(model.cfg, "n_ctx", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def probe(function: Callable[P, R]) -> Callable[P, R]:
    """A probe: its model has hook points, its tokens are read by :func:`read_tokens`, its other arguments are of their types.

    Raises
    ------
    CausalProbeError
        When it is called with anything else.
    """
    return checked(function, model=_hooked, tokens=_given, reference=_given)


def of_tokens(function: Callable[P, R]) -> Callable[P, R]:
    """A function of one batch of tokens and of no model, whose arguments are of their types.

    Raises
    ------
    CausalProbeError
        When it is called with anything else.
    """
    return checked(function, tokens=_one_batch)


def _one_batch(tokens: Any, arguments: Mapping[str, Any]) -> Tensor:
    tensor = as_tensor(tokens)
    if fault := shape_fault(tokens if tensor is None else tensor):
        raise CausalProbeError(fault)
    assert tensor is not None
    return tensor.to(torch.long)


def _hooked(model: Any, arguments: Mapping[str, Any]) -> Any:
    require_hooks(model, ())
    return model


def _given(tokens: Any, arguments: Mapping[str, Any]) -> Any:
    own = arguments.get("loss") is not None or arguments.get("measure") is not None
    return read_tokens(arguments["model"], tokens, own=own)


def read_tokens(model: HookedModel, tokens: Any, *, own: bool = False, one: bool = False) -> Any:
    """Batches that a probe can run, each looked at when its turn comes; what can be gone through again, can be afterwards.

    Parameters
    ----------
    tokens
        One batch, or an iterable of batches. A batch is a tensor of whole numbers [batch, pos], an array or nested lists of them; anything with
        ``.tokens``, such as a task's batch; a mapping with ``input_ids``, as tokenizers return; or texts, where the model has a tokenizer.
        A :func:`~causal_probe.hooks.corpus` is left as it is.
    own
        Whether a loss of the caller's reads the batches: then they may also be other things, which only the loss knows.
    one
        Whether it is one input, which nobody pads: what looks like padding is text that spells a padding token out.

    Raises
    ------
    CausalProbeError
        Here, or when a batch is read: if it is none of these, is empty, padded, longer than the model's context, or has ids beyond its
        vocabulary.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=4)
    >>> [batch.tolist() for batch in read_tokens(model, [np.array([[0, 1]], np.uint8), {"input_ids": [[2, 2]]}])]
    [[[0, 1]], [[2, 2]]]
    """
    if isinstance(tokens, Cut):
        if int(tokens.model.cfg.d_vocab) > int(model.cfg.d_vocab):
            raise CausalProbeError(
                "This corpus was cut for another model, of more tokens. Make it with this one: hooks.corpus(model, ...)."
            )
        return tokens
    batches = Batches(model, tokens, own, one)
    return iter(batches) if isinstance(tokens, Iterator) else batches


class Cut:
    """The base of what a model's own tokenizer has cut into sequences: none is padded, whatever tokens a text spells out."""

    model: HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class OfText(Cut):
    """Some sequences of a corpus, [sequence, pos]."""

    model: HookedModel
    tokens: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Batches:
    """The result of :func:`read_tokens`."""

    model: HookedModel
    given: Any
    own: bool
    one: bool

    def __iter__(self) -> Iterator[Any]:
        """The batches, one by one."""
        lengths: set[int] = set()
        empty = True
        for number, batch in enumerate(apart(self.given)):
            try:
                read = self._read(batch)
            except CausalProbeError as error:
                if not number:
                    raise
                raise CausalProbeError(f"Batch {number}, counted from 0: {error}") from error
            its = getattr(read, "tokens", read)
            if isinstance(its, Tensor):
                lengths.add(its.shape[1])
                if not len(its):
                    continue
            empty = False
            if len(lengths) > 1 and not self.own:
                raise CausalProbeError(
                    f"Sequences must be of one length to be averaged over; there are lengths {', '.join(map(str, sorted(lengths)))}."
                )
            yield read
        if empty:
            raise CausalProbeError("There are no sequences. Give tokens [batch, pos], or batches of them.")

    def _read(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self._of_tokenizer(batch)
        if isinstance(batch, str) or _are_texts(batch):
            return tokens_of_text(self.model, [batch] if isinstance(batch, str) else batch)
        if isinstance(getattr(batch, "tokens", None), Tensor):
            its = batch.tokens
            if self.own and its.is_floating_point():
                return batch  # vectors, for a model of vectors
            read = self._checked(its)
            if its.dtype != read.dtype:
                raise CausalProbeError(
                    f"The tokens of a {type(batch).__name__} are {its.dtype}. Make them 64-bit whole numbers: tokens.long()."
                )
            return batch
        tensor = as_tensor(batch)
        if self.own and (
            tensor.is_floating_point() and tensor.ndim > 2 if tensor is not None else _is_of_its_own(batch)
        ):
            return batch
        if tensor is None:
            raise CausalProbeError(
                f"{_what(batch)} is no batch of tokens: a batch is a tensor of whole numbers [batch, pos]."
            )
        return self._checked(tensor)

    def _of_tokenizer(self, batch: Mapping[Any, Any]) -> Any:
        if "input_ids" not in batch:
            if self.own:
                return batch
            raise CausalProbeError(
                f"A {type(batch).__name__} without 'input_ids' is no batch of tokens; it has {', '.join(map(repr, list(batch)[:6])) or 'nothing'}."
            )
        tensor, given = as_tensor(batch["input_ids"]), batch.get("attention_mask")
        mask = as_tensor(given)
        if tensor is None:
            raise CausalProbeError(
                "The 'input_ids' must be whole numbers [batch, pos], rows of one length: tokenize without padding, to one length."
            )
        if given is not None and (
            mask is None or mask.shape != tensor.shape or not bool(((mask == 0) | (mask == 1)).all())
        ):
            found = _what(given) if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise CausalProbeError(
                f"The attention mask must be ones and zeros of the tokens' shape, {list(tensor.shape)}; it is {found}."
            )
        if mask is not None and not bool(mask.bool().all()):
            raise CausalProbeError(
                f"The attention mask hides {int((~mask.bool()).sum())} of {mask.numel()} tokens as padding, {PADDING}"
            )
        read = self._checked(tensor, padded=mask is None)
        return batch if self.own else read

    def _checked(self, tokens: Tensor, *, padded: bool = True) -> Int[Tensor, "batch pos"]:
        if fault := shape_fault(tokens):
            raise CausalProbeError(fault)
        read = tokens.to(torch.long)
        for kind, fault in token_faults(self.model, read) if len(read) else ():
            if kind != "padding" or (padded and not self.one):
                raise CausalProbeError(fault)
        return read


#: Why padding is refused, and what to do about it.
PADDING = (
    "and attention to padding would count: no probe takes a mask. Give sequences without padding: cut them to one length, or measure "
    "those of each length by themselves."
)


def apart(given: Any) -> Iterator[Any]:
    """The batches of the given tokens."""
    given = _of_a_table(given)
    if isinstance(given, (Tensor, np.ndarray, Mapping, str)) or isinstance(getattr(given, "tokens", None), Tensor):
        return iter([given])
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise CausalProbeError(
            f"{_what(given)} is no tokens. Give a tensor [batch, pos], or an iterable of such tensors."
        )
    if isinstance(given, Sequence) and len(given) and (_are_texts(given) or _is_number(given[0]) or is_row(given[0])):
        return iter([given])
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise CausalProbeError(
            f"{_what(given)} is no tokens. Give a tensor [batch, pos], or an iterable of such tensors."
        )
    return iter(given)


def _of_a_table(given: Any) -> Any:
    """The numbers of a DataFrame, of whatever library."""
    return given.to_numpy() if hasattr(given, "to_numpy") and not isinstance(given, Tensor) else given


def _is_of_its_own(batch: Any) -> bool:
    """Whether a loss may know what it is."""
    return not (isinstance(batch, (bytes, np.ndarray)) or _is_number(batch))


def _are_texts(batch: Any) -> bool:
    return isinstance(batch, Sequence) and bool(len(batch)) and all(isinstance(text, str) for text in batch)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex, np.number)) or value is None


def is_row(row: Any) -> bool:
    """Whether something is a list of numbers, or of nothing."""
    return isinstance(row, (list, tuple)) and (not row or _is_number(row[0]))


def as_tensor(batch: Any) -> Tensor | None:
    """None where it is no array of numbers."""
    batch = _of_a_table(batch)
    if isinstance(batch, Tensor):
        return None if batch.is_nested else batch
    if isinstance(batch, np.ma.MaskedArray) and np.ma.is_masked(batch):
        raise CausalProbeError(
            f"The array hides {int(np.ma.getmaskarray(batch).sum())} of {batch.size} tokens behind a mask, which no probe reads. Cut the sequences."
        )
    rows = isinstance(batch, (list, tuple)) and len(batch) and (_is_number(batch[0]) or is_row(batch[0]))
    if not rows and not isinstance(batch, np.ndarray):
        return None
    try:
        array = np.asarray(batch)
        if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
            return None
        return torch.from_numpy(array.astype(np.int64 if array.dtype.kind == "u" else array.dtype.newbyteorder("=")))
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # rows of different lengths, objects, numbers beyond 64 bits
        return None


def _what(value: Any) -> str:
    return "None" if value is None else f"A {type(value).__name__}"


def tokens_of_text(model: HookedModel, texts: Sequence[str]) -> Int[Tensor, "batch pos"]:
    """Texts of one length in tokens as one batch, each with the start of a text, unless it has that already.

    Raises
    ------
    CausalProbeError
        If the model has no tokenizer, or the texts are of different lengths or longer than the model's context.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CausalProbeError("Text was given, and the model has no tokenizer. Give tokens [batch, pos].")
    start = list(text_start(model, "auto"))
    rows = []
    for text in texts:
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise CausalProbeError(f"The text {text[:40]!r} has no tokens. Give one that the tokenizer can read.")
        check_known(tokenizer, tokens, len(tokens))
        rows.append(tokens if start and tokens[: len(start)] == start else [*start, *tokens])
    lengths = sorted(set(map(len, rows)))
    if len(lengths) > 1:
        raise CausalProbeError(
            f"Sequences must be of one length; these texts have {', '.join(map(str, lengths[:4]))}{', ...' if lengths[4:] else ''} tokens. "
            "hooks.corpus(model, texts, length=...) cuts them, or give one at a time."
        )
    found = torch.tensor(rows, dtype=torch.long)
    for fault in filter(
        None, [shape_fault(found), *(fault for kind, fault in token_faults(model, found) if kind != "padding")]
    ):
        raise CausalProbeError(fault)
    return found


# ------------------------------------------------------------------------------------------------------------------ faults


def shape_fault(tokens: Any) -> str | None:
    """Faults that keep a value from being tokens at all."""
    if not isinstance(tokens, Tensor):
        return f"Tokens must be a tensor of whole numbers [batch, pos]; they are a {type(tokens).__name__}."
    odd = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.is_quantized
    if tokens.ndim != 2 or odd or tokens.is_meta or tokens.layout != torch.strided:
        about = " without values" if tokens.is_meta else " sparse" if tokens.layout != torch.strided else ""
        hint = " For one sequence, give tokens[None]." if tokens.ndim == 1 and not odd else ""
        return f"Tokens must be a tensor of whole numbers [batch, pos]; they are{about} {tokens.dtype} {list(tokens.shape)}.{hint}"
    if tokens.shape[1] == 0:
        return f"There are no tokens: their shape is {list(tokens.shape)}."
    return None


def token_faults(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Iterator[tuple[str, str]]:
    """Faults that keep a model from being measured on tokens of the right shape: the kind of each fault, and the message."""
    longest, d_vocab = context_length(model), getattr(model.cfg, "d_vocab", None)
    if longest is not None and tokens.shape[1] > longest:
        yield (
            "too-long",
            f"The sequences have {tokens.shape[1]} tokens, and the model's context holds {longest}: shorten them.",
        )
    least, most = int(tokens.min()), int(tokens.max())
    if isinstance(d_vocab, int) and d_vocab > 0 and (least < 0 or most >= d_vocab):
        yield (
            "vocabulary",
            f"The token ids run from {least} to {most}, and the model's vocabulary from 0 to {d_vocab - 1}: use its own tokenizer.",
        )
    if padded := _padded(model, tokens):
        pad = starts_ends_pads(model)[2][0]
        yield "padding", f"{padded} of {len(tokens)} sequences begin or end with padding (token {pad}), {PADDING}"


def _padded(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> int:
    """In how many sequences padding begins or ends."""
    starts, _, pads = starts_ends_pads(model)
    if not pads or tokens.shape[1] == 1:
        return 0
    pad, bos = pads[0], next(iter(starts), None)
    is_pad = tokens == pad
    # Many models pad with a token that also starts or ends a text: one of it is no padding yet.
    eos = getattr(getattr(model, "tokenizer", None) or model.cfg, "eos_token_id", None)
    at_start = is_pad[:, : 1 + (pad == bos)].all(1)
    at_end = is_pad[:, -1 - (pad in (bos, eos)) :].all(1)
    return int((at_start | at_end).sum())
