"""Directions of weights, against what a model really computes: the derivatives of its outputs by its inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune import Method, granularity, importance, scope
from tests.modules.test_layers import Experts, Foreign

# A layer, and the shape of an input for which each weight acts once. Experts are tried one by one.
LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (8,)),
    "x @ w": (lambda: Foreign((8, 12), lambda x, w: x @ w), (8,)),
    "square x @ w": (lambda: Foreign((8, 8), lambda x, w: x @ w), (8,)),
    "addmm": (lambda: Foreign((8, 12), lambda x, w: torch.addmm(torch.ones(12), x, w)), (8,)),
    "conv": (lambda: nn.Conv2d(8, 12, 3), (8, 3, 3)),
    "grouped conv": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 3, 3)),
    "depthwise conv": (lambda: nn.Conv1d(8, 16, 2, groups=8), (8, 2)),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 12, 3), (8, 1, 1)),
    "grouped transposed conv": (lambda: nn.ConvTranspose1d(8, 12, 3, groups=2), (8, 1)),
    "depthwise transposed conv": (lambda: nn.ConvTranspose1d(8, 8, 3, groups=8), (8, 1)),
    "experts": (lambda: Routed((3, 12, 8), False), (8,)),
    "experts, inputs first": (lambda: Routed((3, 8, 12), True), (8,)),
}


class Routed(nn.Module):
    """Each token goes through the expert that ``ids`` says; alone, it is a bare parameter."""

    def __init__(self, shape, transposed):
        super().__init__()
        self.weight, self.transposed = nn.Parameter(torch.randn(shape)), transposed

    def forward(self, x, ids):
        used = self.weight[ids]
        return torch.bmm(x[:, None], used if self.transposed else used.mT)[:, 0]


def inputs_of(layer, shape, count=6):
    x = torch.randn(count, *shape)
    return (x, torch.arange(count) % 3) if isinstance(layer, Routed) else (x,)


def matrices(layer, shape):
    """Return d output / d input: of each group of weights that nothing else uses, (outputs, inputs, positions)."""
    x = torch.zeros(1, *shape)
    if isinstance(layer, Routed):
        ids = [torch.tensor([expert]) for expert in range(3)]
        return [torch.autograd.functional.jacobian(lambda x, i=i: layer(x, i), x)[0, :, 0, :, None] for i in ids]
    found = torch.autograd.functional.jacobian(layer, x)[0]
    outputs, inputs = found.shape[0], shape[0]
    return [found.reshape(outputs, -1, 1, inputs, *shape[1:]).movedim(3, 1).reshape(outputs, inputs, -1)]


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make()
    if hasattr(layer, "bias"):
        nn.init.normal_(layer.bias)
    return layer, shape


def lowest(scores, count):
    gone = torch.zeros(scores.numel(), dtype=torch.bool)
    gone[scores.flatten().argsort()[:count]] = True
    return gone.view(scores.shape)


@pytest.mark.parametrize("side", ["out", "in"])
def test_channels_are_those_of_the_layer(case, side):
    layer, shape = case
    dims = (2, 3) if side == "out" else (1, 3)
    norms = torch.stack(matrices(layer, shape)).square().sum(dims)  # (experts, channels)
    expected = lowest(norms, round(norms.numel() / 2))
    method = Method(importance.magnitude(p=2), granularity.channel(side), scope.tensor())
    pyprune.prune(layer, method, ratio=0.5, examples_inputs=inputs_of(layer, shape), zero_dead_channels=True)
    left = torch.stack(matrices(layer, shape)).square().sum(dims)
    assert torch.equal(left == 0, expected)
    statistic = pyprune.pruning_statistic(layer).pruned_tensors[0]
    assert (statistic.units, statistic.pruned_units) == (norms.numel(), int(expected.sum()))
    if side == "out" and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        assert torch.equal(layer.bias == 0, expected[0])
        assert bool((layer(*inputs_of(layer, shape)).transpose(0, 1)[expected[0]] == 0).all())


@pytest.mark.parametrize("wanda", [False, True])
def test_rows_are_the_weights_of_an_output(case, wanda):
    layer, shape = case
    rule = importance.wanda() if wanda else importance.magnitude()
    method, examples = Method(rule, scope=scope.row()), inputs_of(layer, shape)
    before = torch.stack(matrices(layer, shape))
    norms = torch.ones(len(before), shape[0])
    calibration = None
    if wanda:
        batches = [inputs_of(layer, shape, 3 * n) for n in (2, 3)]
        calibration = pyprune.calibrate(layer, batches, method, examples_inputs=examples)
        x = torch.cat([batch[0] for batch in batches])
        ids = torch.cat([batch[1] for batch in batches]) if isinstance(layer, Routed) else torch.zeros(len(x))
        norms = torch.stack([x[ids == e].flatten(2).norm(dim=(0, 2)) if x.dim() > 2 else x[ids == e].norm(dim=0)
                             for e in range(len(before))])  # fmt: skip
    pyprune.prune(layer, method, ratio=0.5, examples_inputs=examples, calibration=calibration)
    after = torch.stack(matrices(layer, shape))
    scores = before.abs() * norms[:, None, :, None]
    for score, left, was in zip(scores.flatten(0, 1), after.flatten(0, 1), before.flatten(0, 1), strict=True):
        there = was != 0  # an output of a group reads no other
        gone = lowest(score[there], (int(there.sum()) + 1) // 2)
        assert torch.equal(left[there] == 0, gone)


def test_n_of_m_is_along_the_inputs_of_an_output(case):
    layer, shape = case
    before = torch.stack(matrices(layer, shape))
    method = Method(importance.magnitude(), scope=scope.n_of_m(keep=1, of=2))
    pyprune.prune(layer, method, examples_inputs=inputs_of(layer, shape))
    after = torch.stack(matrices(layer, shape))
    # Rows of one output and position, without the inputs of other groups.
    for was, left in zip(before.mT.flatten(0, 2), after.mT.flatten(0, 2), strict=True):
        used, kept = was[was != 0], left[was != 0]
        if len(used) % 2 == 0:
            pairs = used.abs().reshape(-1, 2)
            assert torch.equal(kept.reshape(-1, 2) != 0, pairs == pairs.max(1, keepdim=True).values)
        else:
            assert len(used) == 1  # depthwise: it has no neighbour
            assert bool((kept != 0).all())


@pytest.mark.parametrize("name", ["linear", "x @ w", "addmm", "conv", "transposed conv", "experts",
                                  "experts, inputs first"])  # fmt: skip
def test_blocks_are_outputs_by_inputs(name):
    make, shape = LAYERS[name]
    layer = make()
    method = Method(importance.magnitude(), granularity.block(4, 2), scope.tensor())
    pyprune.prune(layer, method, ratio=0.5, examples_inputs=inputs_of(layer, shape))
    for matrix in matrices(layer, shape):
        blocks = (matrix != 0).unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).movedim(1, 2).flatten(2, 3)
        # (outputs, inputs, elements of a block, positions)
        assert bool((blocks.all(2) == blocks.any(2)).all())
        assert 0 < int(blocks.any(2).sum()) < blocks.any(2).numel()


GROUPED = [
    "grouped conv",
    "depthwise conv",
    "grouped transposed conv",
    "depthwise transposed conv",
    "transposed conv",
]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("rule", ["apoz", "mean_activation", "batch_norm_scale", "taylor", "geometric_median"])
def test_importances_of_channels_are_those_of_the_layer(name, rule):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    outputs = layer.out_channels
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(outputs)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(layer, norm).eval()
    x = torch.randn(16, *shape)
    made = layer(x).transpose(0, 1).flatten(1).relu().detach()
    matrix = matrices(layer, shape)[0]
    vectors = [matrix[c][matrix[c] != 0] for c in range(outputs)]
    loss = lambda model, batch: model(batch).square().sum()  # noqa: E731
    if rule == "taylor":
        gradient = torch.autograd.grad(loss(model, x), layer.weight)[0]
        wide = (layer.weight * gradient).square()
        wide = wide if not layer.transposed else wide.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        expected = wide.flatten(1).sum(1).detach()
    else:
        expected = {
            "apoz": (made > 0).float().mean(1),
            "mean_activation": made.mean(1),
            "batch_norm_scale": norm.weight.detach().abs(),
            "geometric_median": torch.stack([sum((a - b).norm() for b in vectors) for a in vectors]),
        }[rule]
    method = Method(getattr(importance, rule)(), granularity.channel("out"), scope.tensor())
    calibration = None
    if rule in ("apoz", "mean_activation", "taylor"):
        calibration = pyprune.calibrate(model, [x], method, loss_fn=loss if rule == "taylor" else None)
    pyprune.prune(model, method, ratio=0.25, calibration=calibration, examples_inputs=x)
    dead = (matrices(layer, shape)[0] == 0).flatten(1).all(1)
    count = int(dead.sum())
    assert count == round(outputs * 0.25)
    assert expected[dead].max() <= expected[~dead].min()  # of equals, any


def test_dead_channels_of_experts_take_their_biases():
    class WithBias(Experts):
        def __init__(self, transposed):
            super().__init__(transposed)
            self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 12))
            self.down_proj_bias = nn.Parameter(torch.randn(3, 4))

    for transposed in (False, True):
        model = WithBias(transposed)
        method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
        pyprune.prune(model, method, ratio=0.5, zero_dead_channels=True)
        dim = 1 if transposed else 2
        for name in ("gate_up_proj", "down_proj"):
            dead = (getattr(model, name) == 0).all(dim)
            assert torch.equal(getattr(model, f"{name}_bias") == 0, dead)
            assert int(dead.sum()) == dead.numel() // 2
        config = pyprune.get_config(model)
        fresh = pyprune.load_from_config(WithBias(transposed), config)
        fresh.load_state_dict(model.state_dict())
        pyprune.prune(fresh, method, ratio=0.75)  # followers keep in step
        dead = (fresh.down_proj == 0).all(dim)
        assert torch.equal(fresh.down_proj_bias == 0, dead)
        assert int(dead.sum()) == 9


class BothWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x @ self.kernel, self.kernel)


class Flipped(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.flip(1))


STRUCTURED = {
    "out": (Method(importance.magnitude(), granularity.channel("out"), scope.tensor()), 0.5),
    "in": (Method(importance.magnitude(), granularity.channel("in"), scope.tensor()), 0.5),
    "block": (Method(importance.magnitude(), granularity.block(2, 2), scope.tensor()), 0.5),
    "row": (Method(importance.magnitude(), scope=scope.row()), 0.5),
    "2:4": (Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4)), None),
}


@pytest.mark.parametrize("cut", STRUCTURED)
def test_what_cannot_be_told_is_refused_by_name(cut, unchanged):
    method, ratio = STRUCTURED[cut]
    square = Foreign((8, 8), F.linear, in_features=8, out_features=8)
    for model, name, inputs, what in (
        (BothWays(), "kernel", torch.randn(2, 8), "used in both directions"),
        (Flipped(8, 8), "weight", torch.randn(2, 8), "its entries are moved"),
        (square, "weight", None, "give examples_inputs"),
    ):
        before = unchanged(model)
        words = f"which dimension of {name} of shape .8, 8. counts .*puts cannot be told: .*{what}.*ignored_scope"
        with pytest.raises(ValueError, match=words):
            pyprune.prune(model, method, ratio=ratio, examples_inputs=inputs)
        before.check()
        pyprune.prune(model, Method(importance.magnitude(), scope=scope.tensor()), ratio=0.5, examples_inputs=inputs)
        assert pyprune.pruning_statistic(model).pruning_ratio == 0.5


def test_the_inputs_of_a_bilinear_layer_are_two():
    model = nn.Bilinear(4, 6, 8)
    for cut in ("in", "block", "2:4"):
        method, ratio = STRUCTURED[cut]
        with pytest.raises(ValueError, match="counts inputs cannot be told: it multiplies two inputs at once"):
            pyprune.prune(model, method, ratio=ratio)
    method, ratio = STRUCTURED["out"]
    pyprune.prune(model, method, ratio=ratio, zero_dead_channels=True)
    out = model(torch.randn(5, 4), torch.randn(5, 6))
    assert int((out == 0).all(0).sum()) == 4


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), Experts(False)])
def test_kernels_are_those_of_convolutions(layer):
    with pytest.raises(ValueError, match="has no convolution kernels; name it in ignored_scope"):
        pyprune.prune(layer, Method(importance.magnitude(), granularity.kernel(), scope.tensor()), ratio=0.5)


class Projections(nn.Module):
    """The projections of attention, with outputs first or inputs first."""

    def __init__(self, shapes, inputs_first):
        super().__init__()
        torch.manual_seed(0)
        for name, (outputs, inputs) in shapes.items():
            shape, use = ((inputs, outputs), torch.matmul) if inputs_first else ((outputs, inputs), F.linear)
            layer = Foreign(shape, use, in_features=inputs, out_features=outputs)
            weight = torch.randn(outputs, inputs)
            layer.weight.data = (weight.T if inputs_first else weight).contiguous()
            setattr(self, name, layer)


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        (
            {"q_proj": (16, 10), "k_proj": (8, 10), "v_proj": (8, 10), "o_proj": (10, 16)},
            granularity.head(4, 2),
        ),
        ({"c_attn": (24, 10), "c_proj": (10, 8)}, granularity.head(4)),
        (
            {"mixed": (24, 10), "out": (10, 8)},
            granularity.head(4, names=("mixed", "mixed", "mixed", "out")),
        ),
    ],
    ids=["separate", "stacked", "stacked by names"],
)
def test_heads_are_cut_along_outputs(shapes, heads):
    linear, turned = Projections(shapes, inputs_first=False), Projections(shapes, inputs_first=True)
    for model in (linear, turned):
        pyprune.prune(model, Method(importance.magnitude(), heads), ratio=0.5)
    for name in shapes:
        weight = getattr(linear, name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert torch.equal(getattr(turned, name).weight, weight.T)


def test_heads_of_what_cannot_be_told_are_refused():
    model = Projections(dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (8, 8)), inputs_first=True)
    with pytest.raises(ValueError, match=r"which dimension of q_proj\.weight counts outputs cannot be told"):
        pyprune.prune(model, Method(importance.magnitude(), granularity.head(4)), ratio=0.5)
