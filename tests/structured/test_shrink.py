"""Shrunk models compute what the masked ones did, train on, and are rebuilt from a plan."""

import argparse
import copy
import dataclasses
import itertools
import json
import math
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import Method, Plan, coupled_groups, drop_blocks, prune, rebuild, shrink
from pyprune.methods import granularity, importance, scope
from pyprune.modules.masks import masks_in
from tests.structured.small_models import MODELS, FusedProjections, Residual
from tests.structured.zeroing import shake, zero_half

GOLDEN = json.loads(Path(__file__).with_name("golden_constants.json").read_text())
CHANNELS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())


def equal(one, other, tolerance=1e-5):
    return torch.allclose(one, other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shrink_leaves_what_the_model_computes(name):
    model, examples = MODELS[name]()
    shake(model)
    fresh = copy.deepcopy(model)
    groups = coupled_groups(model, examples)
    left = zero_half(groups)
    expected = model(examples)
    parameters = list(model.parameters())
    shrunk = shrink(model, examples)
    assert equal(model(examples), expected)
    assert not shrunk.held
    assert not shrunk.guessed
    after = {one.name: one.after for one in shrunk.removed}
    assert [after.get(group.name, group.units) for group in groups] == left
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert shrunk.parameters == (
        sum(one.numel() for one in fresh.parameters()),
        sum(one.numel() for one in model.parameters()),
    )
    rebuilt = rebuild(fresh, Plan.from_json(shrunk.plan.to_json()))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(examples), model(examples))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shrink_lets_an_optimizer_go_on(name):
    model, examples = MODELS[name]()
    shake(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    loss = model(examples).square().mean()
    loss.backward()  # its graph stays alive, and knows the old shapes
    optimizer.step()
    zero_half(coupled_groups(model, examples))
    moments = {key: state["exp_avg"].clone() for key, state in optimizer.state.items()}
    shrunk = shrink(model, examples, optimizer=optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        moment = moments[parameter]
        for dim, kept in shrunk.plan.tensors.get(names[id(parameter)], {}).items():
            moment = moment.index_select(dim, torch.tensor(kept))
        assert torch.equal(state["exp_avg"], moment)
        assert parameter.grad is None
    model(examples).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("act", "padding", "what", "left", "kept"),
    [
        (nn.ReLU(), 0, "norm", 5, []),
        (
            nn.ReLU(), 1, "norm", 7,
            ["3.weight: constant 0.5 meets zero padding", "3.weight: constant 0.25 meets zero padding"],
        ),
        (nn.Sigmoid(), 0, "bias", 5, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_shrink_puts_constants_into_biases(act, padding, what, left, kept, training):
    norm = nn.BatchNorm2d(8) if what == "norm" else nn.Identity()
    first, second = nn.Conv2d(3, 8, 3, bias=what == "bias"), nn.Conv2d(8, 4, 3, padding=padding)
    model = nn.Sequential(first, norm, act, second).eval()
    with torch.no_grad():
        first.weight[[1, 4, 6]] = 0
        (norm if what == "norm" else first).bias[[1, 4, 6]] = torch.tensor([0.5, -0.5, 0.25])
    x = torch.randn(4, 3, 10, 10)
    expected = model.train(training)(x).detach()
    if what == "norm":
        norm.running_mean.zero_()
    shrunk = shrink(model, x)
    assert equal(model.train(training)(x), expected)
    assert len(first.weight) == left
    assert list(shrunk.kept) == kept


@pytest.mark.parametrize("name", GOLDEN)
def test_shrink_gives_biases_these_values(name):
    golden, rng = GOLDEN[name], np.random.default_rng(0)
    has_norm, padding = name.startswith("relu"), int(name.endswith("zero padding"))
    first, second = nn.Conv2d(3, 8, 3, bias=not has_norm), nn.Conv2d(8, 4, 3, padding=padding)
    norm, act = (nn.BatchNorm2d(8), nn.ReLU()) if has_norm else (nn.Identity(), nn.Sigmoid())
    model = nn.Sequential(first, norm, act, second).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(0.1 * rng.standard_normal(tuple(parameter.shape))))
        first.weight[[1, 4, 6]] = 0
        (norm if has_norm else first).bias[[1, 4, 6]] = torch.tensor([0.5, -0.5, 0.25])
    assert second.bias.tolist() == pytest.approx(golden["before"], abs=1e-5)
    shrunk = shrink(model, torch.randn(1, 3, 10, 10))
    assert second.bias.tolist() == pytest.approx(golden["after"], abs=1e-5)
    assert (len(first.weight), list(shrunk.kept)) == (golden["left"], golden["kept"])


def test_shrink_drops_constants_at_the_border_on_request():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[2:] = 0
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    shrunk = shrink(model, x, constants="drop")
    assert model[0].out_channels == 2
    difference = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    assert shrunk.difference == pytest.approx(difference, rel=1e-3)
    assert difference > 0


def test_shrink_makes_a_bias_where_there_is_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model[0].weight[2:] = 0
    fresh, x = copy.deepcopy(model), torch.randn(5, 4)
    expected = model(x)
    shrunk = shrink(model, x)
    assert list(shrunk.biases) == ["2.bias"]
    assert equal(model(x), expected)
    rebuild(fresh, shrunk.plan).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_shrink_sees_that_one_factor_of_a_product_is_dead():
    model, x = Gated(), torch.randn(2, 4)
    with torch.no_grad():
        model.up.weight[3:] = 0
        model.up.bias[3:] = 0
    expected = model(x)
    shrink(model, x)
    assert model.gate.out_features == model.down.in_features == 3
    assert equal(model(x), expected)


def test_shrink_removes_heads_whose_values_are_zero():
    model, x = shake(FusedProjections()), torch.randn(2, 5, 10)
    with torch.no_grad():
        model.qkv.weight[24:28] = 0  # the values of the first head
        model.qkv.bias[24:28] = 0
    expected = model(x)
    shrink(model, x)
    assert model.heads == 2
    assert equal(model(x), expected)


def test_shrink_removes_what_nobody_reads():
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.c.weight[:, 4:] = 0
    expected = model(x)
    shrink(model, x)
    assert model.b.out_channels == 4
    assert equal(model(x), expected)


@pytest.mark.parametrize("mode", ["channels", "elements", "both"])
def test_shrink_keeps_masks_on_what_is_left(mode):
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    if mode == "channels":
        prune(model, CHANNELS, ratio=0.5, examples_inputs=x, zero_dead_channels=True)
    else:
        prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    if mode == "both":
        with torch.no_grad():
            model.b.weight[:3] = 0
            model.b.bias[:3] = 0
    expected = model(x)
    zeros = {name: int((one == 0).sum()) for name, one in model.named_parameters()}
    shrunk = shrink(model, x)
    assert equal(model(x), expected)
    assert bool(shrunk.removed) == (mode != "elements")
    if mode == "elements":
        assert {name: int((one == 0).sum()) for name, one in model.named_parameters()} == zeros
    held = {id(mask.parameter): mask for mask in masks_in(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    for parameter in model.parameters():
        if id(parameter) in held:
            mask = held[id(parameter)].mask
            assert mask.shape == parameter.shape
            assert not parameter[~mask].any()
    assert bool(held) == (mode != "channels") or mode == "channels"


def test_shrink_folds_gates():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    prune(model, "UNSTRUCTURED_REGULARIZATION_BASED", ratio=None)
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.weight_mask.logits[: 4 if module is model[0] else 0] = -20.0
        model[0].bias[:4] = 0
    expected = model.eval()(x)
    shrink(model, x)
    assert model[0].out_features == 4
    assert type(model[0]) is nn.Linear
    assert equal(model(x), expected)


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).view(-1, 8))


def test_shrink_holds_what_a_number_in_the_code_needs():
    model, x = shake(Literal()), torch.randn(3, 4)
    zero_half(coupled_groups(model, x))
    expected = model(x)
    shrunk = shrink(model, x)
    (held,) = shrunk.held
    assert "Literal.b" in held.kind
    assert (model.a.out_features, model.b.out_features) == (3, 8)
    assert equal(model(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_shrink_leaves_flags_and_random_numbers(training):
    model, x = shake(Residual()).train(training), torch.randn(2, 3, 8, 8)
    zero_half(coupled_groups(model, x))
    statistics = model.n.num_batches_tracked.clone()
    state = torch.get_rng_state()
    shrink(model, x)
    assert model.training == training
    assert torch.equal(model.n.num_batches_tracked, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_shrink_rounds_the_channels_that_are_left():
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.b.weight[:5] = 0
        model.b.bias[:5] = 0
    shrink(model, x, round_to=4)
    assert model.b.out_channels == 4


def test_shrink_leaves_one_unit_of_a_dead_group():
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.c.weight.zero_()
    expected = model(x)
    shrunk = shrink(model, x)
    assert model.b.out_channels == 1
    assert list(shrunk.whole) == ["b.weight"]
    assert equal(model(x), expected)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(4, 6),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return x + self.b(F.relu(self.a(x)))


def test_shrink_offers_to_remove_blocks_that_do_nothing():
    model, x = shake(Stack()), torch.randn(2, 4)
    with torch.no_grad():
        model.blocks[1].b.weight.zero_()
    expected = model(x)
    shrunk = shrink(model, x)
    assert list(shrunk.branches) == ["blocks.1"]
    assert "blocks.1" in str(shrunk)
    drop_blocks(model, x, shrunk.branches)
    assert len(model.blocks) == 2
    assert equal(model(x), expected)


def test_a_model_without_dead_units_is_left_alone():
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    shrunk = shrink(model, x)
    assert "nothing that could go is dead" in str(shrunk)
    assert not shrunk.removed
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shrink_takes_other_types(dtype):
    model, x = shake(Residual()).to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    zero_half(coupled_groups(model, x))
    expected = model(x)
    shrunk = shrink(model, x, verify=0.05 if dtype == torch.bfloat16 else 1e-10)
    assert shrunk.parameters[1] < 0.4 * shrunk.parameters[0]
    assert equal(model(x), expected, 0.05)


def test_coupled_groups_needs_no_values():
    model, x = MODELS["fused_qkv"]()
    groups = coupled_groups(model.to("meta"), x.to("meta"))
    assert [(group.units, group.what) for group in groups] == [(3, "heads")]


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x)) * self.calls


def wrapped(model):
    return nn.DataParallel(model)


class Stream(nn.Module):
    """A residual stream with a norm, and units of its width that are zero."""

    def __init__(self, norm):
        super().__init__()
        self.e, self.n, self.i, self.o, self.h = (
            nn.Embedding(7, 8),
            norm,
            nn.Linear(8, 6),
            nn.Linear(6, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.e(x)
        return self.h(self.n(x + self.o(F.gelu(self.i(self.n(x))))))


class OnePlusNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-3

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-2), OnePlusNorm(), nn.LayerNorm(8)], ids=repr)
def test_shrink_removes_width_where_norms_can_be_made_the_same(norm):
    model, x = shake(Stream(copy.deepcopy(norm))), torch.randint(0, 7, (2, 5))
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        model.e.weight[:, :3] = 0
        model.o.weight[:3] = 0
        model.o.bias[:3] = 0
        model.i.weight[:, :3] = 0
        model.h.weight[:, :3] = 0
    expected = model(x)
    assert not shrink(copy.deepcopy(model), x).removed
    shrunk = shrink(model, x, width=True)
    assert model.e.embedding_dim == 5
    is_exact = not isinstance(norm, nn.LayerNorm)
    assert list(shrunk.inexact) == ([] if is_exact else ["n"])
    assert equal(model(x), expected) == is_exact
    rebuild(fresh, shrunk.plan).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


BAD = {
    "no module": (lambda: "model", lambda: torch.ones(1, 4), {}, TypeError, "give a torch.nn.Module"),
    "in parallel": (lambda: wrapped(nn.Linear(4, 2)), lambda: torch.ones(1, 4), {}, ValueError, "wraps"),
    "no examples": (lambda: nn.Linear(4, 2), lambda: [], {}, ValueError, "empty list"),
    "no tensor": (lambda: nn.Linear(4, 2), lambda: 3, {}, TypeError, "without a tensor"),
    "NaN in examples": (lambda: nn.Linear(4, 2), lambda: torch.full((1, 4), torch.nan), {}, ValueError, "NaN"),
    "other sizes": (lambda: nn.Linear(4, 2), lambda: torch.ones(1, 5), {}, RuntimeError, "shapes cannot"),
    "too many": (lambda: nn.Linear(4, 2), lambda: (torch.ones(1, 4), 1), {}, TypeError, "examples is a tuple of 2"),
    "round_to": (lambda: nn.Linear(4, 2), lambda: torch.ones(1, 4), {"round_to": 0}, ValueError, "round_to"),
    "constants": (lambda: nn.Linear(4, 2), lambda: torch.ones(1, 4), {"constants": "no"}, ValueError, "constants"),
    "verify": (lambda: nn.Linear(4, 2), lambda: torch.ones(1, 4), {"verify": -1.0}, ValueError, "verify"),
    "optimizer": (lambda: nn.Linear(4, 2), lambda: torch.ones(1, 4), {"optimizer": 3}, TypeError, "optimizer"),
    "not the same twice": (Random, lambda: torch.ones(1, 4), {}, ValueError, "same twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_shrink_refuses_what_it_cannot_do(name):
    make, examples, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        shrink(make(), examples(), **options)


def test_shrink_refuses_outputs_that_are_nan():
    model = nn.Linear(4, 2)
    model.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="NaN for these examples"):
        shrink(model, torch.ones(1, 4))


def test_a_shrink_that_fails_leaves_the_model():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                raise KeyboardInterrupt
            return self.b(self.a(x))

    model, x = shake(Fails()), torch.ones(1, 4)
    prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    zero_half(coupled_groups(model, x))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        shrink(model, x)
    assert len(masks_in(model)) == 2
    assert model.a.out_features == 8
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all((mask.parameter[~mask.mask] == 0).all() for mask in masks_in(model))


def test_shrunk_says_what_went():
    model, x = shake(Residual()), torch.randn(2, 3, 8, 8)
    zero_half(coupled_groups(model, x))
    text = str(shrink(model, x))
    assert "channels of b.weight" in text
    assert "MACs" in text


def test_a_plan_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="no plan of pyprune"):
        Plan.from_json("{}")
    with pytest.raises(ValueError, match="version 9"):
        Plan.from_json(json.dumps({"pyprune_plan": 9}))
    with pytest.raises(ValueError, match="another model"):
        rebuild(nn.Linear(2, 2), Plan(tensors={"a": {0: [0]}}, shapes={"a": [2]}))
    with warnings.catch_warnings():
        assert rebuild(nn.Linear(2, 2), Plan()).weight.shape == (2, 2)


@pytest.mark.parametrize("shift", [None, 0.0, -1.0, 0.5])
def test_shrink_removes_channels_whose_scale_is_zero(shift):
    """As slimming leaves them: the filters live, their BatchNorm makes a constant of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    with torch.no_grad():
        model[1].weight[:3] = 0
        model[1].bias[:3] = shift or 0
        model[1].bias[3:] = 0.1
    if shift is None:
        model[1].bias = None
    images = torch.randn(2, 3, 7, 7)
    expected = model(images)
    shrink(model, images)
    assert model[0].out_channels == 5
    assert equal(model(images), expected)


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "older_weight_norm": nn.utils.weight_norm,
    "older_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_shrink_knows_layers_whose_weight_is_computed(name, groups):
    torch.manual_seed(0)
    layer = nn.Conv1d(8, 8, 1, groups=groups)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), COMPUTED[name](layer), nn.ReLU(), nn.Conv1d(8, 2, 1)).eval()
    inputs = torch.randn(2, 3, 5)
    with torch.no_grad():
        model[4].weight[:, :3] = 0
    expected = model(inputs)
    shrunk = shrink(model, inputs)
    assert equal(model(inputs), expected)
    assert "Error" not in str(shrunk)
    assert model[2].out_channels == model[2].bias.numel() == model(inputs).shape[1] + model[4].in_channels - 2
    if "weight_norm" in name:
        assert model[2].out_channels == 5


def test_shrink_names_parameters_that_the_examples_do_not_reach():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, inputs, other=False):
            hidden = self.body(inputs).relu()
            return self.other(hidden) if other else self.one(hidden)

    model, inputs = TwoHeads(), torch.randn(2, 4)
    both = [inputs, (inputs, True)]
    assert not shrink(copy.deepcopy(model), both).unreached
    zero_half(coupled_groups(model, inputs))
    shrunk = shrink(model, inputs)
    assert shrunk.unreached == ["other.weight", "other.bias"]
    assert "not reached by the examples, and left as it is: other.weight, other.bias" in str(shrunk)


def test_shrink_says_held_and_dead_apart():
    class OfItsWidth(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, inputs):
            hidden = self.one(inputs).relu()
            return self.other(hidden) / hidden.shape[-1]

    model, inputs = OfItsWidth(), torch.randn(2, 4)
    zero_half(coupled_groups(model, inputs))
    lines = str(shrink(model, inputs))
    assert "1 group of OfItsWidth.one" in lines
    assert "dead" not in lines


REFUSED = {
    "meta": (lambda: nn.Linear(4, 2, device="meta"), None, "weight is on the meta device"),
    "another model's optimizer": (
        lambda: nn.Linear(4, 2),
        lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))]),
        "optimizer, a SGD, has no parameter of this Linear",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_shrink_refuses(name):
    make, optimizer, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        shrink(model, torch.ones(1, 4, device=model.weight.device), optimizer=optimizer and optimizer())


def test_shrink_lets_lbfgs_begin_anew():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    before = optimizer.step(closure).item()
    zero_half(coupled_groups(model, inputs))
    assert shrink(model, inputs, optimizer=optimizer).renewed
    optimizer.step(closure)
    assert closure().item() < before


def test_shrink_under_autocast_sees_the_weights_as_they_are():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)
    zero_half(coupled_groups(model, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs)  # casts of the weights are kept now, until autocast ends
        assert not shrink(model, inputs).unreached
        made = model(inputs)
    assert model[0].out_features == 4
    assert equal(made, expected, 1e-2)
    made.sum().backward()
    assert model[0].weight.grad.shape == (4, 4)


@dataclasses.dataclass
class Sizes:
    heads: int = 4


@pytest.mark.parametrize("kind", [Sizes, types.SimpleNamespace, argparse.Namespace])
def test_shrink_lets_a_shared_config_say_the_heads(kind):
    class Attention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

        def heads(self, projected):
            return projected.view(*projected.shape[:2], self.config.heads, 4).transpose(1, 2)

        def forward(self, x):
            projected = (self.heads(project(x)) for project in (self.query, self.key, self.value))
            return x + self.out(F.scaled_dot_product_attention(*projected).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    sizes, inputs = kind(heads=4), torch.randn(2, 3, 16)
    model = nn.Sequential(Attention(sizes), Attention(sizes), nn.Linear(16, 2))
    zero_half(coupled_groups(model, inputs))
    expected = model(inputs)
    shrunk = shrink(model, inputs)
    assert not shrunk.held
    assert sizes.heads == 2
    assert equal(model(inputs), expected)
    sizes = kind(heads=4)
    fresh = rebuild(nn.Sequential(Attention(sizes), Attention(sizes), nn.Linear(16, 2)), shrunk.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs), model(inputs))


def test_shrink_of_a_model_that_is_never_the_same_goes_unverified_if_told_to():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.calls = nn.Linear(4, 8), nn.Linear(8, 2), itertools.count(1)

        def forward(self, inputs):
            return self.other(self.one(inputs).relu()) * next(self.calls)

    model, inputs = Random(), torch.randn(2, 4)
    zero_half(coupled_groups(model, inputs))
    with pytest.raises(ValueError, match=r"does not compute the same twice.*verify=math\.inf"):
        shrink(model, inputs)
    assert model.one.out_features == 8
    shrink(model, inputs, verify=math.inf)
    assert model.one.out_features == 4
