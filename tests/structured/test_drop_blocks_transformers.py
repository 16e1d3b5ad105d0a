"""Blocks of transformers' models: outputs, generation with a cache, and what a plain from_pretrained loads."""

import copy
import json

import pytest
import torch

from pyprune import drop_blocks
from pyprune.structured.replay import replay

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **TOKENS,
}
SIZES = {**ENCODER, "num_key_value_heads": 2, "head_dim": 4}
MOE = {**SIZES, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 67, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64, **TOKENS}
T5 = {
    "vocab_size": 67,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **TOKENS,
}
BART = {
    "vocab_size": 67,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **TOKENS,
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
IDS = {"input_ids": torch.arange(3, 33).reshape(2, 15)}
TARGETS = {"decoder_input_ids": torch.arange(3, 23).reshape(2, 10)}
DRAWN = torch.Generator().manual_seed(0)
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=DRAWN)}
SOUND = {"input_features": torch.randn(2, 8, 40, generator=DRAWN), **TARGETS}
# Model, its config, examples, the list of its blocks, and which ones go.
CASES = {
    "Llama": ("LlamaForCausalLM", SIZES, IDS, "model.layers", (1, 3)),
    "Qwen2, sliding": ("Qwen2ForCausalLM", {**SIZES, "use_sliding_window": True, "sliding_window": 4,
                                            "max_window_layers": 2}, IDS, "model.layers", (0, 3)),
    "Qwen3": ("Qwen3ForCausalLM", SIZES, IDS, "model.layers", (0, 2)),
    "Gemma 3": ("Gemma3ForCausalLM", {**SIZES, "num_hidden_layers": 7, "sliding_window": 4}, IDS, "model.layers",
                (1, 6)),
    "Gemma 3, no full attention": ("Gemma3ForCausalLM", {**SIZES, "num_hidden_layers": 6, "sliding_window": 4}, IDS,
                                   "model.layers", (5,)),
    "GPT-2": ("GPT2LMHeadModel", GPT2, IDS, "transformer.h", (1, 2)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", ENCODER, IDS, "gpt_neox.layers", (0, 3)),
    "OPT": ("OPTForCausalLM", {**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16}, IDS, "model.decoder.layers",
            (1,)),
    "Falcon": ("FalconForCausalLM", {k: ENCODER[k] for k in ENCODER if k != "intermediate_size"}, IDS,
               "transformer.h", (0, 1)),
    "Mixtral": ("MixtralForCausalLM", {**SIZES, "num_local_experts": 4}, IDS, "model.layers", (1, 2)),
    "Mamba": ("MambaForCausalLM", {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4,
                                   **TOKENS}, IDS, "backbone.layers", (0, 2)),
    "Qwen3 MoE, dense layers": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [0, 3]}, IDS, "model.layers",
                                (0, 1)),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 1,
                                              "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                                              "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
                    IDS, "model.layers", (1,)),
    "BERT": ("BertForSequenceClassification", ENCODER, IDS, "bert.encoder.layer", (0, 3)),
    "Longformer, a window each": ("LongformerModel", {**ENCODER, "attention_window": 4,
                                                      "max_position_embeddings": 80}, IDS, "encoder.layer", (1, 3)),
    "DINOv2, named stages": ("Dinov2Model", {**VISION, "mlp_ratio": 2}, IMAGES, "encoder.layer", (0, 3)),
    "ViT": ("ViTModel", VISION, IMAGES, None, (1, 2)),
    "Swin": ("SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 2],
                           "window_size": 4}, IMAGES, "encoder.layers.1.blocks", (0, 1)),
    "ResNet": ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "layer_type": "basic"},
               IMAGES, "encoder.stages.1.layers", (1,)),
    "CLIP, one tower": ("CLIPModel", {"text_config": {**ENCODER, "num_hidden_layers": 3}, "vision_config": VISION,
                                      "projection_dim": 8}, {**IDS, **IMAGES}, "text_model.encoder.layers", (1,)),
    "T5, encoder": ("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 2}, {**IDS, **TARGETS},
                    "encoder.block", (1,)),
    "T5, decoder": ("T5ForConditionalGeneration", T5, {**IDS, **TARGETS}, "decoder.block", (2,)),
    "BART, encoder": ("BartForConditionalGeneration", BART, {**IDS, **TARGETS}, "model.encoder.layers", (0,)),
    "BART, decoder": ("BartForConditionalGeneration", BART, {**IDS, **TARGETS}, "model.decoder.layers", (0, 2)),
    "Whisper, decoder": ("WhisperForConditionalGeneration", WHISPER, SOUND, "model.decoder.layers", (1,)),
}  # fmt: skip


def build(name, options):
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one makes anything look right
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def list_of(model, path):
    if path is not None:
        return path
    return next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


def bypassed(model, names, examples):
    """Return the outputs with blocks bypassed by hooks."""

    def hook(module, args, keywords, output):
        first = args[0] if args else next(iter(keywords.values()))
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        return model(**examples)[0]


def tokens(model, examples, use_cache):
    """Return what a model generates greedily."""
    inputs = {name: value for name, value in examples.items() if not name.startswith("decoder")}
    model.generation_config.eos_token_id = None
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    return found if isinstance(found, torch.Tensor) else found.sequences


@pytest.mark.parametrize("case", CASES)
def test_drop_blocks_of_a_transformer(case, tmp_path):
    name, options, examples, path, places = CASES[case]
    model, fresh = build(name, options), build(name, options)
    path = list_of(model, path)
    names = [f"{path}.{place}" for place in places]
    expected = bypassed(model, names, examples)
    kept = [layer for place, layer in enumerate(model.get_submodule(path)) if place not in places]
    dropped = drop_blocks(model, examples, names)
    assert list(model.get_submodule(path)) == kept
    with torch.no_grad():
        torch.testing.assert_close(model(**examples)[0], expected, rtol=1e-5, atol=1e-5)
    if getattr(model, "can_generate", bool)():
        torch.testing.assert_close(tokens(model, examples, True), tokens(model, examples, False), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    replay(fresh, json.loads(json.dumps(dropped.plan))).load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**examples)[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fresh(**examples)[0], expected, rtol=1e-5, atol=1e-5)
    if getattr(model, "can_generate", bool)():
        assert torch.equal(tokens(loaded, examples, True), tokens(model, examples, True))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_drop_blocks_holds_the_block_of_t5_with_the_position_bias(name):
    examples = {**IDS, **TARGETS}
    model = build("T5ForConditionalGeneration", T5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^{name}.block.0 cannot be dropped: other parts use more of it"):
        drop_blocks(model, examples, [f"{name}.block.0", f"{name}.block.1"])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    order = {f"{stack}.block.{i}": i for stack in ("encoder", "decoder") for i in range(3)}
    dropped = drop_blocks(model, examples, count=3, importance=lambda name, block: order[name])
    assert set(dropped.stays) == {"encoder.block.0", "decoder.block.0"}
    assert sorted(dropped.names) == ["decoder.block.1", "encoder.block.1", "encoder.block.2"]


def test_drop_blocks_refuses_a_layer_that_is_used_many_times():
    model = build("AlbertModel", {**ENCODER, "embedding_size": 8})
    group = "encoder.albert_layer_groups.0"
    for name in (group, f"{group}.albert_layers.0"):
        with pytest.raises(ValueError, match="it is used several times in a pass"):
            drop_blocks(model, IDS, [name])
    with pytest.raises(ValueError, match="at most 0 blocks"):
        drop_blocks(model, IDS, count=1)


@pytest.mark.parametrize(
    ("name", "options", "gone", "message"),
    [
        ("GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "transformer.h.0",
         r"transformer.h.0.attn.scaling is 0.25, not 0.5"),
        ("Qwen3MoeForCausalLM", {**MOE, "decoder_sparse_step": 2}, "model.layers.1",
         r"model.layers.1.mlp.gate_proj.weight is \(24, 16\), not there"),
    ],
)  # fmt: skip
def test_drop_blocks_warns_of_what_a_config_cannot_say(name, options, gone, message):
    model, fresh = build(name, options), build(name, options)
    expected = bypassed(model, [gone], IDS)
    with pytest.warns(UserWarning, match=rf"the config cannot say what the model has become .*{message}"):
        dropped = drop_blocks(model, IDS, [gone])
    replay(fresh, dropped.plan)
    with torch.no_grad():
        torch.testing.assert_close(model(**IDS)[0], expected)
        torch.testing.assert_close(fresh(**IDS)[0], expected)
    # As an error it leaves the model as it was.
    model = build(name, options)
    state, count = list(model.state_dict()), model.config.num_hidden_layers
    with pytest.raises(UserWarning, match="the config cannot say"):
        drop_blocks(model, IDS, [gone])
    assert list(model.state_dict()) == state
    assert model.config.num_hidden_layers == count


def test_drop_blocks_of_a_causal_model_by_score_in_half_precision():
    model = build("LlamaForCausalLM", SIZES).to(torch.bfloat16)
    for kind in ("influence", "output_error"):
        small = copy.deepcopy(model)
        dropped = drop_blocks(small, [IDS, {"input_ids": IDS["input_ids"][:1] + 1}], count=2, importance=kind)
        assert list(dropped.scores) == [f"model.layers.{i}" for i in range(4)]
        # One config for all of the model.
        assert len(small.model.layers) == small.config.num_hidden_layers == 2
        expected = bypassed(model, dropped.names, IDS)
        with torch.no_grad():
            torch.testing.assert_close(small(**IDS)[0], expected)
