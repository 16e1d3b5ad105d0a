"""26 models of transformers, with small random configurations."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from zoo.case import Case

SMALL = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
DECODER = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER = {key: value for key, value in DECODER.items() if "token" not in key}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
SEQ2SEQ = {
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": 99, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
WAV2VEC2 = {
    **ENCODER,
    "conv_dim": (16, 24, 24),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


def build(name: str, config: str, options: dict[str, Any]) -> nn.Module:
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def words(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 9)), **more}


def seq2seq() -> dict[str, Any]:
    return words(decoder_input_ids=torch.randint(3, 99, (2, 5)), use_cache=False)


def speech(frames: int = 40) -> dict[str, Any]:
    decoder = torch.randint(3, 99, (2, 5))
    return {"input_features": torch.randn(2, 16, frames), "decoder_input_ids": decoder, "use_cache": False}


def decoder(family: str, options: dict[str, Any], *, head: str = "ForCausalLM", config: str = "") -> Case:
    """Return a causal language model; its cache would be an output, so it is only on while tokens are generated."""
    make = partial(build, f"{family}{head}", config or f"{family}Config", options)
    return Case(make, partial(words, use_cache=False), decodes=True)


def encoder(family: str, options: dict[str, Any] = ENCODER, head: str = "ForSequenceClassification") -> Case:
    return Case(partial(build, f"{family}{head}", f"{family}Config", options), words)


def pictures_and_words() -> dict[str, Any]:
    return {**words(), "pixel_values": torch.randn(2, 3, 32, 32)}


CLIP = {
    "text_config": {**DECODER, "eos_token_id": 98},
    "vision_config": {**ENCODER, "image_size": 32, "patch_size": 8},
    "projection_dim": 32,
}

CASES = {
    "llama": decoder("Llama", GROUPED),
    "mistral": decoder("Mistral", GROUPED),
    "mixtral": decoder("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": decoder("Qwen2", GROUPED),
    "qwen3": decoder("Qwen3", {**GROUPED, "head_dim": 16}),
    "qwen3_moe": decoder("Qwen3Moe", {**GROUPED, **EXPERTS, "head_dim": 16}),
    "gemma3": decoder(
        "Gemma3",
        {**GROUPED, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
        config="Gemma3TextConfig",
    ),
    "gpt2": decoder(
        "GPT2", {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, head="LMHeadModel"
    ),
    "gpt_neox": decoder("GPTNeoX", DECODER),
    "opt": decoder("OPT", {**DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": decoder("Falcon", {**DECODER, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mamba": decoder("Mamba", {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "deepseek_v3": decoder("DeepseekV3", {**GROUPED, **DEEPSEEK}),
    "phi3": decoder("Phi3", GROUPED),
    "bloom": decoder("Bloom", {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "t5": Case(partial(build, "T5ForConditionalGeneration", "T5Config", T5), seq2seq),
    "bart": Case(partial(build, "BartForConditionalGeneration", "BartConfig", SEQ2SEQ), seq2seq),
    "whisper": Case(
        partial(
            build,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16},
        ),
        speech,
    ),
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta", {**ENCODER, "pad_token_id": 1}),
    "albert": encoder("Albert", {**ENCODER, "embedding_size": 32}),
    "distilbert": encoder(
        "DistilBert",
        {"vocab_size": 99, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "electra": encoder("Electra", {**ENCODER, "embedding_size": 32}),
    "deberta_v2": encoder(
        "DebertaV2",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "clip": Case(partial(build, "CLIPModel", "CLIPConfig", CLIP), pictures_and_words),
    "wav2vec2": Case(
        partial(build, "Wav2Vec2ForCTC", "Wav2Vec2Config", {**WAV2VEC2, "vocab_size": 20}),
        partial(torch.randn, 2, 2000),
    ),
}
