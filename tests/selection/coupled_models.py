"""Small models with coupled units of every kind, and inputs for them."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Channels of a residual stream, and inside of its branch; the model of the golden scores."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 8, 3, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.h = nn.Linear(8, 4)

    def forward(self, x):
        x = self.n(self.a(x))
        x = torch.relu(x + self.c(torch.relu(self.b(x))))
        return self.h(x.mean((2, 3)))


class Attention(nn.Module):
    """Pre-norm transformer block with grouped query heads, an MLP, and a width that meets LayerNorm."""

    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Linear(7, 12), nn.Linear(12, 3)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12)
        self.o = nn.Linear(24, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.e(x)
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return self.h(x + self.down(F.gelu(self.up(self.norm2(x)))))


class FusedQkv(nn.Module):
    """Queries, keys and values stacked in one weight."""

    def __init__(self):
        super().__init__()
        self.heads = 3
        self.qkv, self.p = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4)
        return self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """A convolution with groups, and one in depth."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.g = nn.Conv2d(8, 12, 3, groups=4)
        self.d = nn.Conv2d(12, 12, 3, groups=12)
        self.o = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        return self.o(torch.relu(self.d(torch.relu(self.g(torch.relu(self.a(x)))))))


class Recurrent(nn.Module):
    """Hidden units of an LSTM of two layers."""

    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.h = nn.Linear(6, 3)

    def forward(self, x):
        return self.h(self.l(x)[0][:, -1])


class Concat(nn.Module):
    """Channels that are joined, flattened, and read in several columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(10, 5, 1)
        self.n = nn.BatchNorm2d(10)
        self.h = nn.Linear(20, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.n(torch.cat([torch.relu(self.b(x)), x], 1))
        return self.h(F.adaptive_avg_pool2d(torch.relu(self.c(x)), 2).flatten(1))


class Tied(nn.Module):
    """One weight that is used in both directions."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(9, 6), nn.Linear(6, 9, bias=False)
        self.decoder.weight = nn.Parameter(torch.empty(9, 6))
        self.middle = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.middle.weight

    def forward(self, x):
        x = torch.relu(self.encoder(x))
        return self.decoder(torch.relu(self.again(torch.relu(self.middle(x)))))


_X = {
    "residual": lambda: torch.randn(2, 3, 6, 6),
    "attention": lambda: torch.randn(2, 5, 7),
    "fused_qkv": lambda: torch.randn(2, 5, 12),
    "grouped": lambda: torch.randn(2, 3, 8, 8),
    "recurrent": lambda: torch.randn(2, 4, 5),
    "concat": lambda: torch.randn(2, 3, 4, 4),
    "tied": lambda: torch.randn(2, 9),
}
_CLASSES = {
    "residual": Residual,
    "attention": Attention,
    "fused_qkv": FusedQkv,
    "grouped": Grouped,
    "recurrent": Recurrent,
    "concat": Concat,
    "tied": Tied,
}
NAMES = tuple(_CLASSES)


def model_and_inputs(name, seed=0):
    """Return a model in evaluation, whose parameters and running statistics are all far from zero, and its input."""
    torch.manual_seed(seed)
    model, rng = _CLASSES[name](), np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval(), _X[name]()


def with_zeros(model, groups, dropped):
    """Return a plain copy in which the parameters of dropped units are zero: the oracle of a masked model."""
    zeroed = copy.deepcopy(model)
    parameters = dict(zeroed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group, units in zip(groups, dropped, strict=True):
            for member in group.members:
                if member.name in parameters:
                    places = torch.from_numpy(member.indices[np.asarray(units, bool)].ravel())
                    parameters[member.name].index_fill_(member.dim, places, 0)
    return zeroed
