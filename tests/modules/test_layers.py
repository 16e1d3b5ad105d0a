"""Layers and what the dimensions of their weights count, without a forward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune.methods.layout import Layout
from pyprune.modules.layers import bias_of, weight_layouts
from pyprune.modules.targets import find_targets
from pyprune.modules.tracing import used_as_weights

OUT_IN, IN_OUT = Layout(0, 1), Layout(1, 0)


class Foreign(nn.Module):
    """A layer of another library, that says its sizes and uses its weight as it likes."""

    def __init__(self, shape, use, **sizes):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, x):
        return self.use(x, self.weight)


class Experts(nn.Module):
    """As those of transformers: one parameter for all experts, and one of them for each token."""

    def __init__(self, transposed, says=None, hidden=4, inner=6, experts=3, twice=2):
        super().__init__()
        up, down = (experts, twice * inner, hidden), (experts, hidden, inner)
        self.gate_up_proj = nn.Parameter(torch.randn(*((up[0], up[2], up[1]) if transposed else up)))
        self.down_proj = nn.Parameter(torch.randn(*((down[0], down[2], down[1]) if transposed else down)))
        self.transposed, self.inner = transposed, inner
        if says is not None:
            self.is_transposed = says

    def forward(self, x, ids):
        up, down = (self.gate_up_proj, self.down_proj) if self.transposed else (
            self.gate_up_proj.mT, self.down_proj.mT
        )  # fmt: skip
        x = torch.bmm(x[:, None], up[ids])[..., : self.inner]
        return torch.bmm(x, down[ids])[:, 0]


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 6), {"weight": OUT_IN}),
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6),
                                        {"weight": OUT_IN}),
    "Bilinear": (lambda: nn.Bilinear(4, 5, 6), {"weight": Layout(0, None, 1, "it multiplies two inputs at once")}),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, groups=2), {"weight": Layout(0, 1, 2)}),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 3, groups=2), {"weight": Layout(1, 0, 2)}),
    "Embedding": (lambda: nn.Embedding(8, 6), {"weight": Layout(is_table=True)}),
    "GRUCell": (lambda: nn.GRUCell(4, 6), {"weight_ih": OUT_IN, "weight_hh": OUT_IN}),
    "LayerNorm": (lambda: nn.LayerNorm(4), {}),
    "features": (lambda: Foreign((6, 4), F.linear, in_features=4, out_features=6), {"weight": OUT_IN}),
    "features, inputs first": (lambda: Foreign((4, 6), None, in_features=4, out_features=6), {"weight": IN_OUT}),
    "channels": (lambda: Foreign((6, 4), F.linear, in_channels=4, out_channels=6), {"weight": OUT_IN}),
    "channels of a kernel": (lambda: Foreign((6, 2, 3), None, in_channels=4, out_channels=6, groups=2),
                             {"weight": Layout(0, 1, 2)}),
    "sizes of experts": (lambda: Foreign((3, 6, 4), None, input_size=4, output_size=6), {"weight": Layout(1, 2, 3)}),
    "sizes of experts, inputs first": (lambda: Foreign((3, 4, 6), None, in_features=4, out_features=6, groups=3),
                                       {"weight": Layout(2, 1, 3)}),
    "sizes that do not fit": (lambda: Foreign((5, 4), None, in_features=4, out_features=6), {}),
    "no sizes": (lambda: Foreign((5, 4), None), {}),
    "experts": (lambda: Experts(False), dict.fromkeys(["gate_up_proj", "down_proj"], Layout(1, 2, 3))),
    "experts, inputs first": (lambda: Experts(True), dict.fromkeys(["gate_up_proj", "down_proj"], Layout(2, 1, 3))),
    "square experts that say it": (lambda: Experts(True, True, 6, 6, twice=1),
                                   dict.fromkeys(["gate_up_proj", "down_proj"], Layout(2, 1, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_weight_layouts_knows_layers(name):
    make, layouts = LAYERS[name]
    assert weight_layouts(make()) == layouts


@pytest.mark.parametrize("make", [
    lambda: Foreign((4, 4), F.linear, in_features=4, out_features=4), lambda: Experts(False, None, 6, 6, twice=1)
])  # fmt: skip
def test_weight_layouts_does_not_guess(make):
    layouts = weight_layouts(make())
    assert layouts
    assert not any(layout.is_clear for layout in layouts.values())
    assert all("give examples_inputs" in layout.problem for layout in layouts.values())


def test_weight_layouts_knows_the_layers_of_transformers_and_torch_geometric():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    assert weight_layouts(conv1d(4, 4)) == {"weight": IN_OUT}

    class Linear(nn.Module):
        __module__ = "torch_geometric.nn.dense.linear"

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    assert weight_layouts(Linear()) == {"weight": OUT_IN}


def test_the_layout_of_a_target_follows_its_use():
    """A square weight that its layer cannot tell, one that is used against its layer, and one used both ways."""
    foreign = Foreign((4, 4), torch.matmul, in_features=4, out_features=4)
    x = torch.randn(2, 4)
    assert find_targets(foreign)[0].layout.outputs is None
    assert find_targets(foreign, None, x)[0].layout == IN_OUT

    class Backwards(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.layer, self.both = nn.Linear(4, 4), both

        def forward(self, x):
            return x @ self.layer.weight + (self.layer(x) if self.both else 0)

    assert find_targets(Backwards(False))[0].layout == OUT_IN
    assert find_targets(Backwards(False), None, x)[0].layout == IN_OUT
    assert "both directions" in find_targets(Backwards(True), None, x)[0].layout.problem


def test_experts_are_used_as_their_layouts_say():
    ids = torch.tensor([0, 2, 1, 1])
    for transposed in (False, True):
        model = Experts(transposed)
        known = weight_layouts(model)
        used = used_as_weights(model, (torch.randn(4, 4), ids))
        assert {name: used[parameter] for name, parameter in model.named_parameters()} == known


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ("weight", "bias"),
        ("in_proj_weight", "in_proj_bias"),
        ("weight_ih_l0", "bias_ih_l0"),
        ("down_proj", "down_proj_bias"),
    ],
)
def test_bias_of_names_the_bias(weight, bias):
    assert bias_of(weight) == bias


def test_prune_finds_layers_of_other_libraries_and_bare_matrices():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.some = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
            self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(4, 4))})
            self.foreign = Foreign((6, 4), F.linear, in_channels=4, out_channels=6)

        def forward(self, x):
            return self.foreign(x @ self.some[0] @ self.some[1] @ self.named["a"])

    model = Lists()
    assert [target.name for target in find_targets(model)] == ["foreign.weight"]
    names = [target.name for target in find_targets(model, None, torch.randn(2, 4))]
    assert names == ["some.0", "some.1", "named.a", "foreign.weight"]
    pruned = pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, examples_inputs=torch.randn(2, 4))
    assert [t.pruned_ratio for t in pyprune.pruning_statistic(pruned).pruned_tensors] == [0.5] * 4
