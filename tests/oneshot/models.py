"""Small models of other libraries, with random weights, and inputs for them."""

import pytest
import torch
from torch import nn

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def tokens(count=12, seed=0):
    return torch.randint(3, 90, (2, count), generator=torch.Generator().manual_seed(seed))


def text(seed=0):
    """Two texts, of which the second is padded."""
    return {"input_ids": tokens(seed=seed), "attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5])}


def images(seed=0):
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def both(seed=0):
    return {**text(seed), "decoder_input_ids": tokens(9, seed + 100)}


# Name of the model, of its config, what the config has, and inputs.
CASES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, text),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}, text),
    "Gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **LLAMA,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        text,
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}, text),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        text,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        text,
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        text,
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SIZES, text),
    "BERT": ("BertForSequenceClassification", "BertConfig", {**SIZES, "intermediate_size": 48}, text),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
        },
        images,
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3},
        lambda seed=0: {"input_ids": tokens(seed=seed)},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
        },
        both,
    ),
    "TransformerEncoder": (
        None,
        None,
        {},
        lambda seed=0: torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)),
    ),
}


def make(name):
    """Return a model in evaluation mode."""
    model, config, sizes, _ = CASES[name]
    torch.manual_seed(0)
    if model is None:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def batches(name, count=2):
    return [CASES[name][3](seed) for seed in range(count)]
