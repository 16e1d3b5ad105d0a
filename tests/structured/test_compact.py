import types

import pytest
import torch
from torch import nn

from pyprune.modules.undo import Change
from pyprune.structured.compact import (
    Kept,
    add_bias,
    cut,
    cut_state,
    give_data,
    named_tensors,
    resizing,
    set_attribute,
    value_of,
)
from tests.conftest import Unchanged


@pytest.mark.parametrize(
    "dims", [{}, {0: [1]}, {1: [0, 2]}, {0: [0, 1], 3: [2]}, {0: [3], 1: [0], 2: [1], 3: [0, 1]}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cut_keeps_positions_and_layout(dims, layout):
    tensor = torch.randn(4, 3, 5, 6).to(memory_format=layout)
    expected = tensor
    for dim, kept in dims.items():
        expected = torch.stack([expected.select(dim, place) for place in kept], dim)
    made = cut(tensor, {dim: torch.tensor(kept) for dim, kept in dims.items()})
    assert torch.equal(made, expected)
    assert made.is_contiguous(memory_format=layout)
    assert cut(tensor.to("meta"), {dim: torch.tensor(kept) for dim, kept in dims.items()}).shape == expected.shape


# A layer, what is kept of its tensors along their first dimension, of which ones it is others, and what it becomes.
LAYERS = {
    "linear": (nn.Linear(4, 6), [0, 2], {"weight": {0: [0, 2], 1: [1]}}, nn.Linear(1, 2)),
    "conv": (nn.Conv2d(4, 6, 3), [5], {}, nn.Conv2d(4, 1, 3)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3), [0, 5], {"weight": {1: [0, 5]}}, nn.ConvTranspose1d(4, 2, 3)),
    "grouped": (nn.Conv1d(4, 8, 1, groups=4), [0, 1], {}, nn.Conv1d(1, 2, 1)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), [1, 2], {}, nn.Conv2d(2, 2, 3, groups=2)),
    "batch norm": (
        nn.BatchNorm1d(4, track_running_stats=False),
        [1],
        {},
        nn.BatchNorm1d(1, track_running_stats=False),
    ),
    "group norm": (nn.GroupNorm(2, 8), [0, 1, 2, 3], {}, nn.GroupNorm(1, 4)),
    "layer norm": (nn.LayerNorm(4), [0, 3], {}, nn.LayerNorm(2)),
    "embedding": (nn.Embedding(9, 4), [], {"weight": {1: [0, 3]}}, nn.Embedding(9, 2)),
    "prelu": (nn.PReLU(4), [0, 3], {}, nn.PReLU(2)),
    "bilinear": (nn.Bilinear(2, 3, 4), [1], {"weight": {0: [1], 2: [0, 1]}}, nn.Bilinear(2, 2, 1)),
    "rnn cell": (nn.RNNCell(3, 4), [1], {"weight_hh": {0: [1], 1: [1]}}, nn.RNNCell(3, 1)),
}


def shapes(layer):
    return {key: one.shape for key, one in layer.state_dict().items()}


def kept_of(layer, dims):
    tensors = named_tensors(layer)
    return Kept({id(tensors[name]): {dim: torch.tensor(one) for dim, one in of.items()} for name, of in dims.items()})


@pytest.mark.parametrize("name", LAYERS)
def test_resizing_lets_a_layer_know_its_sizes(name):
    layer, first, others, expected = LAYERS[name]
    dims = {key: others.get(key, {0: first}) for key in dict(layer.named_parameters())}
    before = Unchanged(layer)

    def look_and_fail():
        with Change(layer) as change, resizing(layer, kept_of(layer, dims), change):
            assert str(layer) == str(expected)
            assert shapes(layer) == shapes(expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    before.check()


def test_resizing_brings_back_what_modules_share():
    layer = nn.Linear(4, 6)
    layer.config = types.SimpleNamespace(heads=4, to_dict=dict)

    def set_and_fail():
        with Change(layer) as change, resizing(layer, Kept(), change):
            set_attribute(layer, "", "config.heads", 2)
            set_attribute(layer, "", "config.new", 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        set_and_fail()
    assert layer.config.heads == 4
    assert not hasattr(layer.config, "new")


def test_give_data_to_a_parameter_of_a_living_graph():
    weight = nn.Parameter(torch.ones(4))
    loss = (weight * 2).sum()
    give_data(weight, torch.ones(2))
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [3, 3]
    assert loss.item() == 8


def test_set_attribute_keeps_tuples():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].sizes, model[0].all = (1, 2), [1, 2]
    set_attribute(model, "0", "sizes", [3, 4])
    set_attribute(model, "0", "all", [3, 4])
    assert value_of(model, "0", "sizes") == (3, 4)
    assert value_of(model, "0", "all") == [3, 4]
    with pytest.raises(KeyError):
        value_of(model, "0", "nothing")


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 5, bias=False), nn.Conv1d(3, 5, 2, bias=False), nn.ConvTranspose1d(3, 5, 2, bias=False)]
)
def test_add_bias_changes_nothing(layer):
    layer.to(torch.float64).requires_grad_(False)
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = layer(x)
    bias = add_bias(layer)
    assert layer.bias is bias
    assert torch.equal(layer(x), expected)
    assert (bias.shape, bias.dtype, bias.requires_grad) == (torch.Size([5]), torch.float64, False)


def test_cut_state_of_an_optimizer():
    layer = nn.Linear(4, 6)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = {key: one.clone() for key, one in optimizer.state[layer.weight].items()}
    kept = kept_of(layer, {"weight": {0: [1, 2]}})
    shapes = {id(one): one.shape for one in layer.parameters()}
    assert cut_state(optimizer, kept, shapes) == []
    after = optimizer.state[layer.weight]
    assert torch.equal(after["exp_avg"], before["exp_avg"][[1, 2]])
    assert after["step"] == before["step"]
