"""Experts of transformers' models: outputs, generation with a cache, and what a plain from_pretrained loads."""

import copy
import json

import pytest
import torch
from torch import nn

from pyprune import drop_experts
from pyprune.structured.experts import find_mixtures
from pyprune.structured.replay import replay
from tests.structured.test_drop_blocks_transformers import IDS, MOE, SIZES, T5, TARGETS, build, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LOCAL = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {**MOE, "num_hidden_layers": 3, "num_experts": 6}
DEEPSEEK = {
    **ROUTED,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SWITCH = {
    **T5,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_experts": 6,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "expert_capacity": 64,
}
DBRX = {
    "vocab_size": 67,
    "d_model": 16,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
}
CASES = {
    "Mixtral": ("MixtralForCausalLM", LOCAL, IDS),
    "Qwen2 MoE": ("Qwen2MoeForCausalLM", {**ROUTED, "shared_expert_intermediate_size": 6}, IDS),
    "Qwen3 MoE": ("Qwen3MoeForCausalLM", ROUTED, IDS),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", DEEPSEEK, IDS),
    "DeepSeek V3, one group": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 1}, IDS),
    "GPT-OSS": ("GptOssForCausalLM", LOCAL, IDS),
    "Llama 4": ("Llama4ForCausalLM", {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}, IDS),
    "Ernie 4.5": ("Ernie4_5_MoeForCausalLM", {**ROUTED, "moe_num_experts": 6, "moe_k": 2}, IDS),
    "DBRX, one below the other": ("DbrxForCausalLM", DBRX, IDS),
    "Switch, a dict of modules": ("SwitchTransformersForConditionalGeneration", SWITCH, {**IDS, **TARGETS}),
}  # fmt: skip


def never_routed(model, gone, examples, patch):
    """Return the outputs with the logits of some experts at minus infinity, where F.linear makes them."""
    weights = {id(one.router[0].tensor): places for one, places in gone.items()}
    linear = nn.functional.linear

    def masked(x, weight, bias=None):
        out = linear(x, weight, bias)
        if id(weight) in weights:
            out = out.clone()
            out[..., weights[id(weight)]] = -torch.inf
        return out

    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "correction" in name:  # is added to the scores after the sigmoid
            places = next(p for one, p in gone.items() if name.startswith(one.block_name))
            tensor.data[..., places] = -torch.inf
    with patch.context() as context, torch.no_grad():
        context.setattr(nn.functional, "linear", masked)
        return model(**examples)[0]


@pytest.mark.parametrize("case", CASES)
def test_drop_experts_of_a_transformer(case, tmp_path, monkeypatch):
    name, options, examples = CASES[case]
    model, fresh = build(name, options), build(name, options)
    dense = copy.deepcopy(model)
    ids = {key: id(one) for key, one in model.named_parameters() if "expert_" not in key}
    counts = [one.count for one in find_mixtures(model)]
    dropped = drop_experts(model, examples, count=2)
    assert [one.count for one in find_mixtures(model)] == [count - 2 for count in counts]
    assert len(dropped.names) == 2 * len(counts)
    assert ids == {key: id(one) for key, one in model.named_parameters() if "expert_" not in key}
    gone = {one: dropped.plan["experts"][one.name] for one in find_mixtures(dense)}
    expected = never_routed(dense, gone, examples, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(**examples)[0], expected, rtol=1e-4, atol=1e-4)
        expected = model(**examples)[0]
    assert torch.equal(tokens(model, examples, True), tokens(model, examples, False))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    replay(fresh, json.loads(json.dumps(dropped.plan))).load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**examples)[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fresh(**examples)[0], expected, rtol=1e-5, atol=1e-5)


def test_drop_experts_scores_are_those_of_the_experts_called_one_by_one():
    model = build("MixtralForCausalLM", LOCAL)
    seen = []
    layers = [layer.mlp for layer in model.model.layers]
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda module, args: seen.append([one.detach() for one in args]))
    with torch.no_grad():
        model(**IDS)
    use, output = [], []
    for layer, (hidden, index, weights) in zip(layers, seen, strict=True):
        for number in range(6):
            up_proj, down_proj = (one[number].detach() for one in layer.experts.parameters())
            gate, up = nn.functional.linear(hidden, up_proj).chunk(2, -1)
            alone = nn.functional.linear(nn.functional.silu(gate) * up, down_proj)
            is_routed = index == number
            added = alone.norm(dim=-1, keepdim=True) * weights
            use.append(float(is_routed.any(1).float().mean()))
            output.append(float(added[is_routed].mean()) if is_routed.any() else 0.0)
    for kind, expected in (("use", use), ("output", output)):
        dropped = drop_experts(copy.deepcopy(model), IDS, count=1, importance=kind)
        assert list(dropped.scores.values()) == pytest.approx(expected, rel=1e-4)


def test_drop_experts_warns_where_layers_disagree(tmp_path):
    model, fresh = build("MixtralForCausalLM", LOCAL), build("MixtralForCausalLM", LOCAL)
    message = r"the config cannot say what the model has become \(model.layers.0.mlp.gate.weight is \(5, 16\), not"
    with pytest.warns(UserWarning, match=message):
        dropped = drop_experts(model, IDS, ["model.layers.0.mlp.experts.3"])
    assert model.config.num_local_experts == 6
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == [5, 6]
    replay(fresh, dropped.plan).load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(**IDS)[0], model(**IDS)[0])


def test_drop_experts_leaves_what_tokens_need():
    for name, options, most in (
        ("MixtralForCausalLM", LOCAL, "at most 4 of its 6"),
        ("DeepseekV3ForCausalLM", DEEPSEEK, "at most 4 of its 8"),
    ):
        model = build(name, options)
        with pytest.raises(ValueError, match=f"6 experts of .* would go, and {most} can"):
            drop_experts(model, IDS, count=6)
        assert len(drop_experts(model, IDS, count=4).names) == 8


def test_drop_experts_in_half_precision():
    model = build("Qwen3MoeForCausalLM", ROUTED).to(torch.bfloat16)
    assert len(drop_experts(model, IDS, ratio=0.5).names) == 9
