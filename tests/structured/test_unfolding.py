import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyprune.structured import unfolding
from pyprune.structured.unfolding import call, groups_of, is_layer, matrix_of, samples, weight_of

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 7, 5)),
    "linear, one sample": (lambda: nn.Linear(5, 3), (5,)),
    "Conv1D of transformers": (lambda: Conv1D(3, 5), (4, 7, 5)),
    "1-d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "1-d, one sample": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "2-d": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 7, 8)),
    "3-d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 2, 5, 6, 7)),
    "stride, dilation and padding": (
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
        (2, 4, 7, 8),
    ),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2), (2, 4, 7, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 8)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="replicate"), (2, 4, 7, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 6)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 5)),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 3)), (2, 2, 3, 4, 5)),
    "transposed with all": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(3, 1), output_padding=(1, 0), dilation=(1, 2), groups=2
        ),
        (2, 4, 5, 6),
    ),
}


def case(kind):
    make, shape = LAYERS[kind]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    return layer, x, layer(x)


@pytest.mark.parametrize("piece", [2**27, 2000, 1], ids=["whole", "in pieces", "in the smallest pieces"])
@pytest.mark.parametrize("kind", LAYERS)
def test_samples_times_matrix_is_the_output(kind, piece, monkeypatch):
    monkeypatch.setattr(unfolding, "_PIECE", piece)
    layer, x, y = case(kind)
    bias = 0 if layer.bias is None else layer.bias.view(groups_of(layer), 1, -1)
    matrix = matrix_of(layer, layer.weight)
    pieces = list(samples(layer, x, y))
    for a, b in pieces:
        torch.testing.assert_close(a @ matrix + bias, b)
    assert sum(b.numel() for _, b in pieces) == y.numel()
    if piece == 1:
        assert {a.shape[1] for a, _ in pieces} == {1}


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_of_undoes_matrix_of(kind):
    layer, _, _ = case(kind)
    matrix = matrix_of(layer, layer.weight)
    assert torch.equal(weight_of(layer, matrix, layer.weight.shape), layer.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_call_is_what_the_layer_does(kind):
    layer, x, y = case(kind)
    torch.testing.assert_close(call(layer, x, layer.weight, layer.bias, y), y)
    zeros = torch.zeros_like(layer.weight)
    assert not call(layer, x, zeros, None, y).any()


def test_call_and_samples_follow_the_output_size_of_a_call():
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2).double()
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    y = layer(x, output_size=[12])
    torch.testing.assert_close(call(layer, x, layer.weight, layer.bias, y), y)
    ((a, b),) = samples(layer, x, y)
    torch.testing.assert_close(a @ matrix_of(layer, layer.weight) + layer.bias, b)


def test_is_layer_knows_which():
    known = [nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.ConvTranspose1d(1, 1, 1), Conv1D(2, 2)]
    others = [nn.Embedding(2, 2), nn.LSTM(2, 2), nn.Bilinear(2, 2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1)]
    assert all(map(is_layer, known))
    assert not any(map(is_layer, others))
