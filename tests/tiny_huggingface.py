"""Tiny random Hugging Face models, one of each shape that a scan must work on, built without files or network.

All know ``D_VOCAB`` tokens and, where they have a context at all, ``N_CTX`` positions; they have two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

D_VOCAB = 50
N_CTX = 32


def gpt2(**changes: Any) -> Any:
    """Learned positions, one weight for q, k and v."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": D_VOCAB, "n_positions": N_CTX}
    return _random(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**shape, **_ends(0, 0), **changes}))


def neox(**changes: Any) -> Any:
    """Rotary positions in half of each head; attention and MLP in parallel."""
    return _random(
        transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**{**_shape(2), **_ends(0, 0), **changes})
    )


def llama(**changes: Any) -> Any:
    """Rotary positions; four query heads on two key/value heads."""
    shape = {**_shape(4), **_ends(1, 2), "num_key_value_heads": 2}
    return _random(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**shape, **changes}))


def bloom(**changes: Any) -> Any:
    """ALiBi: no position embeddings, a slope for each head."""
    shape = {"n_layer": 2, "n_head": 2, "hidden_size": 16, "vocab_size": D_VOCAB}
    return _random(transformers.BloomForCausalLM, transformers.BloomConfig(**{**shape, **_ends(1, 2), **changes}))


def opt(**changes: Any) -> Any:
    """TransformerLens' bridge shows its patterns, and edits of them change nothing."""
    shape = {**_shape(2), "ffn_dim": 32, "word_embed_proj_dim": 16}
    del shape["intermediate_size"]
    return _random(transformers.OPTForCausalLM, transformers.OPTConfig(**{**shape, **changes}))


def bert(**changes: Any) -> Any:
    """Not causal, and its pattern hooks are decorative."""
    return _random(transformers.BertForMaskedLM, transformers.BertConfig(**{**_shape(2), **changes}))


def mamba(**changes: Any) -> Any:
    """No attention at all."""
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": D_VOCAB, "state_size": 4}
    return _random(transformers.MambaForCausalLM, transformers.MambaConfig(**{**shape, **_ends(0, 0), **changes}))


#: Those on which everything works.
CAUSAL: dict[str, Callable[..., Any]] = {"gpt2": gpt2, "neox": neox, "llama": llama, "bloom": bloom}


def tokens(batch: int = 3, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(*, bos: bool = False, pad: bool = True) -> Any:
    """One token a word: ``t3`` is 3. ``<s>`` is 1 and ``</s>`` 2; ``<pad>`` is 0 where there is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, D_VOCAB - 2)}, "a": D_VOCAB - 2}
    fast = Tokenizer(models.WordLevel(names, unk_token="t3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)


def _shape(n_heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": 2,
        "num_attention_heads": n_heads,
        "hidden_size": 16,
        "intermediate_size": 32,
        "vocab_size": D_VOCAB,
        "max_position_embeddings": N_CTX,
    }


def _ends(bos: int, eos: int) -> dict[str, int]:
    return {"bos_token_id": bos, "eos_token_id": eos}


def _random(kind: Any, config: Any) -> Any:
    """Weights larger than a fresh model's, so that patterns are far from uniform."""
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
