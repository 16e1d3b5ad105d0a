"""Real architectures of transformers with random weights: what is found, in which direction, and what Wanda sees."""

import copy

import pytest
import torch

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.methods.layout import Layout
from pyprune.modules.targets import find_targets

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOE = {**SIZES, "moe_intermediate_size": 12}
# Names of a config and options; and the name of its experts' layer, and what they are like.
EXPERTS = {
    "Mixtral": ({**SIZES, "num_local_experts": 4}, "model.layers.0.mlp.experts", Layout(1, 2, 4)),
    "Qwen2Moe": ({**MOE, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12},
                 "model.layers.0.mlp.experts", Layout(1, 2, 4)),
    "DeepseekV3": ({**MOE, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
                    "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 8}, "model.layers.0.mlp.experts", Layout(1, 2, 4)),
    "GptOss": ({**SIZES, "num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2},
               "model.layers.0.mlp.experts", Layout(2, 1, 4)),
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Every token as often as every other, so that all experts get some.
IDS = {"input_ids": torch.arange(3, 63).reshape(4, 15)}
CHANNELS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())


def build(name, options):
    config = getattr(transformers, f"{name}Config", None)
    model = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel", None)
    if config is None or model is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return model(config(**options)).eval()


def experts_of(name):
    options, path, layout = EXPERTS[name]
    model = build(name, options)
    experts = model.get_submodule(path)
    if not hasattr(experts, "down_proj") or not hasattr(model, "set_experts_implementation"):
        pytest.skip("this transformers has a layer for each expert")
    return model, experts, path, layout


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_found_and_used_in_the_direction_that_is_known(name):
    model, _, path, layout = experts_of(name)
    names = [f"{path}.gate_up_proj", f"{path}.down_proj"]
    for implementation in (None, *IMPLEMENTATIONS):
        if implementation is not None:
            model.set_experts_implementation(implementation)
        targets = {t.name: t for t in find_targets(model, None, None if implementation is None else IDS)}
        assert {name: targets[name].layout for name in names} == dict.fromkeys(names, layout)
        assert not any(target.layout.problem for target in targets.values())


@pytest.mark.filterwarnings("ignore:importance wanda leaves out:UserWarning")
@pytest.mark.parametrize("name", EXPERTS)
def test_wanda_sees_what_each_expert_got(name):
    model, experts, path, layout = experts_of(name)
    seen = {}
    experts.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach(), ids=args[1].detach()))
    statistics = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        statistics.append(pyprune.calibrate(model, [IDS], importance.wanda()).tensors)
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    went = [x[(seen["ids"].reshape(len(x), -1) == expert).any(1)] for expert in range(4)]
    expected = torch.stack([tokens.norm(dim=0) for tokens in went])
    expected = expected[..., None] if layout.inputs == 1 else expected[:, None]
    torch.testing.assert_close(statistics[0][f"{path}.gate_up_proj"], expected, rtol=1e-4, atol=1e-5)
    for other in statistics[1:]:
        for key, tensor in other.items():
            torch.testing.assert_close(tensor, statistics[0][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
def test_dead_channels_of_experts_are_dead_in_what_they_put_out(name):
    model, experts, _, _ = experts_of(name)
    model.set_experts_implementation("eager")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pyprune.prune(model, CHANNELS, ratio=0.25, zero_dead_channels=True)
    x, one = torch.randn(9, 16), torch.ones(9, 1)
    dead = 0
    for expert in range(4):
        out = experts(x, torch.full((9, 1), expert), one)
        dead += int((out == 0).all(0).sum())
    assert dead == 16  # a quarter of the channels of four experts

    inputs = copy.deepcopy(model)
    pyprune.prune(inputs, Method(CHANNELS.importance, granularity.channel("in"), scope.tensor()), ratio=0.25)
    experts = inputs.get_submodule(EXPERTS[name][1])
    unread = 0
    for expert in range(4):
        given = x.clone().requires_grad_()
        experts(given, torch.full((9, 1), expert), one).square().sum().backward()
        unread += int((given.grad == 0).all(0).sum())
    assert unread >= 16


def gpt2():
    return build("GPT2", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32})


@pytest.mark.filterwarnings("ignore:zero_dead_channels does not know which layers")  # without a forward pass
def test_gpt2_is_found_and_pruned_by_outputs_and_inputs():
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    for examples in (None, IDS):
        model = gpt2()
        block = model.transformer.h[0]
        pyprune.prune(model, CHANNELS, ratio=0.5, examples_inputs=examples, zero_dead_channels=True)
        for name in names:
            layer = block.get_submodule(name)
            out = layer(torch.randn(7, layer.weight.shape[0]))
            assert int((out == 0).all(0).sum()) == layer.weight.shape[1] // 2
        model = gpt2()
        pyprune.prune(
            model, Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4)), examples_inputs=examples
        )
        for name in names:
            weight = model.transformer.h[0].get_submodule(name).weight
            assert ((weight != 0).unflatten(0, (-1, 4)).sum(1) == 2).all()


def test_gpt2_has_wanda_of_what_its_layers_get():
    model, method = gpt2(), Method(importance.wanda(), scope=scope.row())
    seen = {}
    for name in ("attn.c_attn", "mlp.c_proj"):
        layer = model.transformer.h[0].get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].detach()}))
    with pytest.warns(UserWarning, match=r"wanda leaves out transformer\.wpe\.weight:"):
        calibration = pyprune.calibrate(model, [IDS], method)
    before = {name: model.transformer.h[0].get_submodule(name).weight.detach().clone() for name in seen}
    pyprune.prune(model, method, ratio=0.5, calibration=calibration)
    for name, x in seen.items():
        norms = x.flatten(0, 1).norm(dim=0)[:, None]
        scores = before[name].abs() * norms
        kept = scores >= scores.sort(0).values[len(norms) // 2]
        assert torch.equal(model.transformer.h[0].get_submodule(name).weight != 0, kept)


@pytest.mark.parametrize("name", ["Mamba", "Llama", "Beit"])
def test_wanda_of_other_models(name):
    torch.manual_seed(0)
    if name == "Beit":
        config = transformers.BeitConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, image_size=16,
                                         num_attention_heads=2, patch_size=8)  # fmt: skip
        model, inputs = transformers.BeitModel(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        options = {**SIZES, "state_size": 4} if name == "Mamba" else {**SIZES, "tie_word_embeddings": True}
        model, inputs = build(name, options), IDS
    calibration = pyprune.calibrate(model, [inputs], importance.wanda())
    assert set(calibration.tensors) == {target.name for target in find_targets(model)}
    if name == "Mamba":
        # Its convolution gets the first half of what comes in; kernels of others run it past the layer's call.
        seen = []
        mixer = model.backbone.layers[0].mixer
        mixer.in_proj.register_forward_hook(lambda m, args, out: seen.append(out.detach().chunk(2, -1)[0]))
        model(**inputs)
        norms = calibration.tensors["backbone.layers.0.mixer.conv1d.weight"]
        torch.testing.assert_close(norms.flatten(), seen[0].norm(dim=(0, 1)), rtol=1e-4, atol=1e-5)


def test_heads_of_gpt2_are_those_of_its_stacked_projections():
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = build("GPT2", {**sizes, "bos_token_id": 1, "eos_token_id": 2})
    pyprune.prune(model, Method(importance.magnitude(p=2), granularity.head(4), scope.tensor()), ratio=0.5)
    for block in model.transformer.h:
        dead = (block.attn.c_attn.weight == 0).all(0).view(3, 4, 4).all(2)
        assert dead.sum(1).tolist() == [2, 2, 2]
        assert torch.equal((block.attn.c_proj.weight == 0).all(1).view(4, 4).all(1).expand(3, 4), dead)
        assert bool((block.mlp.c_proj.weight != 0).any(1).all())
