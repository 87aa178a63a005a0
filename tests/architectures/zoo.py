"""Tiny random models of the architectures that people use, built from transformers' own configurations: no files, no network.

Gains, biases, sinks and multipliers are not trivial, and the weights are large enough for patterns that are far from even.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

D_VOCAB, D_MODEL, N_HEADS, N_CTX = 60, 32, 4, 64

ENDS: Mapping[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE: Mapping[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS, "max_position_embeddings": N_CTX, **ENDS,
}  # fmt: skip
GROUPED: Mapping[str, Any] = {**SHAPE, "num_key_value_heads": 2}
EXPERTS: Mapping[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
WINDOWS: Mapping[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
MLA: Mapping[str, Any] = {
    **SHAPE, **EXPERTS, "num_key_value_heads": N_HEADS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_shared_experts": 1,
}  # fmt: skip
HYBRID: Mapping[str, Any] = {
    **GROUPED, "head_dim": 8, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes
    ----------
    family
        Of transformers' classes: ``Qwen3`` for ``Qwen3Config`` and ``Qwen3ForCausalLM``.
    trait
        What tells it from others.
    config
        Arguments of its configuration.
    common
        Whether it is one of the twenty decoders that the page counts.
    """

    family: str
    trait: str
    config: Mapping[str, Any]
    common: bool = True

    def build(self) -> Any:
        """The model, in evaluation mode, with eager attention."""
        kind = getattr(transformers, "GPT2LMHeadModel" if self.family == "GPT2" else f"{self.family}ForCausalLM")
        config = kind.config_class(**self.config)
        return randomised(kind._from_config(config, attn_implementation="eager").eval())


def randomised(model: Any) -> Any:
    """Every parameter drawn: matrices anew, vectors (gains, biases, sinks) around where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn if parameter.ndim > 1 else parameter + drawn)
    return model


def tokens(batch: int = 4, length: int = 16, *, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special, in two copies, so that every template has edges."""
    half = torch.randint(3, D_VOCAB, (batch, length // 2), generator=torch.Generator().manual_seed(seed))
    return half.repeat(1, 2)


def _(
    family: str, trait: str, shape: Mapping[str, Any] = GROUPED, *, common: bool = True, **config: Any
) -> Architecture:
    return Architecture(family, trait, {**shape, **config}, common)


#: By the name that people know.
ARCHITECTURES: Mapping[str, Architecture] = {
    "Llama 3": _("Llama", "rotary positions, RMSNorm, grouped queries"),
    "SmolLM2": _("Llama", "tied embeddings, one key-value head", tie_word_embeddings=True, num_key_value_heads=1),
    "Qwen2.5": _("Qwen2", "biases of queries, keys and values"),
    "Mistral": _("Mistral", "a sliding window beyond the text", sliding_window=32),
    "Mixtral": _("Mixtral", "mixture of experts", {**GROUPED, **EXPERTS}),
    "Phi-3/4": _("Phi3", "one weight for queries, keys and values"),
    "SmolLM3": _("SmolLM3", "a layer without positions", no_rope_layers=[1, 0]),
    "Pythia": _("GPTNeoX", "partial rotation, attention and MLP in parallel, LayerNorm", SHAPE),
    "GPT-2": _("GPT2", "learned positions, LayerNorm", {
        "n_layer": 2, "n_head": N_HEADS, "n_embd": D_MODEL, "vocab_size": D_VOCAB, "n_positions": N_CTX, **ENDS,
    }),
    "Falcon-7B": _("Falcon", "one key-value head, parallel, rotary positions", {
        **SHAPE, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False,
    }),
    "Cohere": _("Cohere", "parallel, LayerNorm without bias, interleaved rotation", logit_scale=0.5),
    "Qwen3": _("Qwen3", "QK-norm of each head", head_dim=8),
    "Gemma 2": _("Gemma2", "soft cap, norms after the block, a window", {**GROUPED, **WINDOWS},
                 head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=4),
    "Gemma 3": _("Gemma3", "QK-norm, norms after the block, a window, two rotations", {**GROUPED, **WINDOWS},
                 head_dim=8, query_pre_attn_scalar=4),
    "OLMo 2": _("Olmo2", "QK-norm over the whole width, norms after the block alone"),
    "OLMo 3": _("Olmo3", "the same, with a window", {**GROUPED, **WINDOWS}),
    "Granite 3": _("Granite", "four multipliers",
                   embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.5, logits_scaling=2.0),
    "DeepSeek-V3": _("DeepseekV3", "latent attention (MLA), mixture of experts", MLA),
    "GPT-OSS": _("GptOss", "attention sinks, a window, mixture of experts", {**GROUPED, **EXPERTS, **WINDOWS}, head_dim=8),
    "Qwen3.5": _("Qwen3_5", "layers without attention, output gates, QK-norm", HYBRID),
    # ---------------------------------------------------------------- beyond the twenty
    "Gemma": _("Gemma", "RMSNorm with an offset, scaled embedding", head_dim=8, common=False),
    "Mistral, short window": _("Mistral", "a sliding window within the text", sliding_window=5, common=False),
    "Qwen3-MoE": _("Qwen3Moe", "QK-norm, mixture of experts", {**GROUPED, **EXPERTS}, head_dim=8, common=False),
    "Phi-2": _("Phi", "partial rotation, parallel, LayerNorm", SHAPE, common=False),
    "StarCoder2": _("Starcoder2", "LayerNorm, biases", common=False),
    "StableLM-2 12B": _("StableLm", "QK-LayerNorm of each head, parallel", common=False,
                        qk_layernorm=True, use_parallel_residual=True),
    "Hunyuan V1": _("HunYuanDenseV1", "QK-norm after the rotation", head_dim=8, common=False),
    "GLM-4-0414": _("Glm4", "norms before and after the block, interleaved rotation", head_dim=8, common=False),
    "Command R+": _("Cohere", "QK-norm with a gain for each head", use_qk_norm=True, common=False),
    "OLMoE": _("Olmoe", "QK-norm over the whole width, mixture of experts", {**GROUPED, **EXPERTS}, common=False),
    "BLOOM": _("Bloom", "ALiBi", {"n_layer": 2, "n_head": N_HEADS, "hidden_size": D_MODEL, "vocab_size": D_VOCAB, **ENDS},
               common=False),
    "Falcon-RW": _("Falcon", "ALiBi, rounded", {
        **SHAPE, "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "alibi": True, "bias": True,
    }, common=False),
    "GPTBigCode": _("GPTBigCode", "learned positions, one key-value head", {
        "n_layer": 2, "n_head": N_HEADS, "n_embd": D_MODEL, "vocab_size": D_VOCAB, "n_positions": N_CTX, **ENDS,
    }, common=False),
    "DeepSeek-V2": _("DeepseekV2", "latent attention (MLA), complex rotation", MLA, common=False),
    "GLM-4.5": _("Glm4Moe", "QK-norm, partial rotation, mixture of experts", MLA, head_dim=8, num_key_value_heads=2, use_qk_norm=True, common=False),
    "EXAONE 4": _("Exaone4", "QK-norm, norms after the block alone", {**GROUPED, **WINDOWS}, head_dim=8, common=False),
    "Apertus": _("Apertus", "QK-norm", common=False),
    "FlexOlmo": _("FlexOlmo", "QK-norm over the whole width, norms after the block, mixture of experts", {**GROUPED, **EXPERTS}, common=False),
    "MiniMax-M2": _("MiniMaxM2", "QK-norm over the whole width, partial rotation, mixture of experts", {**GROUPED, **EXPERTS}, head_dim=8, common=False),
    "VaultGemma": _("VaultGemma", "soft cap, a window", {**GROUPED, **WINDOWS}, head_dim=8, attn_logit_softcapping=2.0,
                    query_pre_attn_scalar=4, common=False),
    "Qwen3-Next": _("Qwen3Next", "layers without attention, output gates, QK-norm, mixture of experts",
                    {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 24}, common=False),
    "Granite 4": _("GraniteMoeHybrid", "Mamba-2 layers, multipliers", {
        **GROUPED, **EXPERTS, "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope", "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "shared_intermediate_size": 24, "residual_multiplier": 0.4, "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0, "mamba_chunk_size": 16,
    }, common=False),
    "LFM2": _("Lfm2", "convolution layers, QK-norm", {**GROUPED, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
              common=False),
    "OLMo": _("Olmo", "LayerNorm without weights", common=False),
    "Cohere2": _("Cohere2", "parallel, a window with rotation, full attention without", {**GROUPED, **WINDOWS}, head_dim=8, common=False),
    "Nemotron": _("Nemotron", "LayerNorm with an offset, partial rotation", head_dim=8, common=False),
    "BitNet": _("BitNet", "a norm within the attention, before its output", common=False),
    "GPT-Neo": _("GPTNeo", "local layers, scores that are not scaled", {
        "num_layers": 2, "num_heads": N_HEADS, "hidden_size": D_MODEL, "vocab_size": D_VOCAB, "max_position_embeddings": N_CTX,
        "attention_types": [[["global", "local"], 1]], "window_size": 5, **ENDS,
    }, common=False),
    "XGLM": _("XGLM", "sinusoidal positions", {
        "num_layers": 2, "attention_heads": N_HEADS, "d_model": D_MODEL, "ffn_dim": 48, "vocab_size": D_VOCAB, "max_position_embeddings": N_CTX,
        **ENDS,
    }, common=False),
    "Ministral 3": _("Ministral3", "queries scaled by the position", head_dim=8, common=False),
    "Qwen2-MoE": _("Qwen2Moe", "shared experts", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24}, common=False),
    "Qwen3.5-MoE": _("Qwen3_5Moe", "layers without attention, output gates, mixture of experts",
                     {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 24}, common=False),
    "Gemma 4": _("Gemma4", "norms of queries, keys and values, norms after the block", {**GROUPED, **WINDOWS}, head_dim=8, common=False),
    "Phi-3.5-MoE": _("Phimoe", "LayerNorm, mixture of experts", {**GROUPED, **EXPERTS}, common=False),
    "StableLM": _("StableLm", "LayerNorm, partial rotation", common=False),
    "OLMo-Hybrid": _("OlmoHybrid", "layers without attention, norms after the block", HYBRID, common=False),
    "Granite-MoE": _("GraniteMoe", "multipliers, mixture of experts", {**GROUPED, **EXPERTS},
                     embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.5, logits_scaling=2.0, common=False),
    "GLM-4": _("Glm", "interleaved partial rotation", head_dim=8, common=False),
    "GLM-4.7-Flash": _("Glm4MoeLite", "latent attention (MLA), mixture of experts", MLA, common=False),
    "GLM-5": _("GlmMoeDsa", "latent attention (MLA), a sparse index", MLA, index_topk=5, index_head_dim=8, index_n_heads=2, common=False),
    "ERNIE 4.5": _("Ernie4_5", "interleaved rotation", head_dim=8, common=False),
    "ERNIE 4.5 MoE": _("Ernie4_5_Moe", "mixture of experts", {**GROUPED, **EXPERTS}, moe_num_experts=4, moe_k=2, common=False),
    "Arcee": _("Arcee", "squared ReLU", common=False),
    "AFMoE": _("Afmoe", "output gates, QK-norm, norms after the block", {**GROUPED, **EXPERTS, **WINDOWS}, head_dim=8, common=False),
    "Llama 4": _("Llama4", "chunks, QK-norm, layers without positions", {**GROUPED, **EXPERTS}, head_dim=8, intermediate_size_mlp=48, common=False),
    "NanoChat": _("NanoChat", "QK-norm after the rotation, no gains", common=False),
    "Seed-OSS": _("SeedOss", "biases of queries, keys and values", head_dim=8, common=False),
    "Jais 2": _("Jais2", "LayerNorm, biases", head_dim=8, common=False),
    "Youtu": _("Youtu", "latent attention (MLA)", MLA, common=False),
    "Jamba": _("Jamba", "Mamba layers, no positions, mixture of experts", {
        **GROUPED, **EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
        "mamba_d_state": 4,
    }, common=False),
    "Bamba": _("Bamba", "Mamba-2 layers", {
        **GROUPED, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 16,
    }, common=False),
    "Falcon-H1": _("FalconH1", "attention and Mamba-2 side by side", {
        **GROUPED, "head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    }, common=False),
    "LFM2-MoE": _("Lfm2Moe", "convolution layers, QK-norm, mixture of experts",
                  {**GROUPED, **EXPERTS, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2}, common=False),
    "GPT-J": _("GPTJ", "interleaved partial rotation, parallel", {
        "n_layer": 2, "n_head": N_HEADS, "n_embd": D_MODEL, "vocab_size": D_VOCAB, "n_positions": N_CTX, "rotary_dim": 4, **ENDS,
    }, common=False),
    "OPT": _("OPT", "learned positions", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL}, common=False),
}  # fmt: skip


def hooked(architecture: Architecture) -> tuple[Any, Any]:
    """The Hugging Face model, and the hooked one."""
    from causal_probe.hooks import to_hooked

    original = architecture.build()
    return original, to_hooked(original)


Reference = Callable[[Any, torch.Tensor], Any]
