"""A table of layers, and inputs for each, that masks and gates must leave as they are in all else."""

import pytest
import torch
from torch import nn


class Bare(nn.Module):
    """Parameters that are no layer's."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 5))
        self.several = nn.ParameterList([nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 3))])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(3, 3))})

    def forward(self, x):
        return (x @ self.kernel @ self.several[0] @ self.several[1]) @ self.named["last"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.decode = nn.Linear(6, 9)
        self.decode.weight = self.embed.weight

    def forward(self, tokens):
        return self.decode(self.embed(tokens))


class First(nn.Module):
    """The first output of a layer that has several."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, *inputs):
        return self.layer(*inputs * self.times)[0]


class TwoSteps(nn.Module):
    """A cell that is called with the state that it gave."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = self.cell(x, self.cell(x))
        return state[0] if isinstance(state, tuple) else state


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 4)


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 5), lambda: torch.randn(3, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3), lambda: torch.randn(2, 2, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2), lambda: torch.randn(2, 2, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), lambda: torch.randn(2, 1, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), lambda: torch.randn(2, 2, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3), lambda: torch.randn(2, 2, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), lambda: torch.randn(2, 1, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(7, 3), lambda: torch.randint(7, (2, 4))),
    "MultiheadAttention": (
        lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3),
        lambda: torch.randn(2, 3, 8),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: torch.randn(2, 3, 8),
    ),
    "LSTM": (lambda: First(nn.LSTM(3, 4, num_layers=2, bidirectional=True)), lambda: torch.randn(5, 2, 3)),
    "GRU": (lambda: First(nn.GRU(3, 4)), lambda: torch.randn(5, 2, 3)),
    "LSTMCell": (lambda: TwoSteps(nn.LSTMCell(3, 4)), lambda: torch.randn(2, 3)),
    "GRUCell": (lambda: TwoSteps(nn.GRUCell(3, 4)), lambda: torch.randn(2, 3)),
    "Conv1D": (conv1d_of_transformers, lambda: torch.randn(2, 4)),
    "bare": (Bare, lambda: torch.randn(3, 4)),
    "tied": (Tied, lambda: torch.randint(9, (2, 4))),
}
