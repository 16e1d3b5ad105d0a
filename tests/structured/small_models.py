"""Small models, one for each kind of coupling; sizes lie in attributes, as users write them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 8, 3, padding=1)
        self.h = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        x = x + self.c(F.relu(self.b(x)))
        return self.h(x.mean((2, 3)))


class ConcatFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 6, 1)
        self.c = nn.Conv2d(10, 5, 1)
        self.h = nn.Linear(20, 3)

    def forward(self, x):
        a = self.a(x)
        return self.h(self.c(torch.cat([self.b(a), a], 1)).flatten(1))


class GroupedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 4
        self.q, self.k, self.v = nn.Linear(10, 16), nn.Linear(10, 8), nn.Linear(10, 8)
        self.o = nn.Linear(16, 10)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, 1) for one in (k, v))
        attention = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)
        return self.o((attention @ v).transpose(1, 2).reshape(b, n, -1))


class FusedProjections(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.size = 3, 4
        self.qkv = nn.Linear(10, 36)
        self.p = nn.Linear(12, 10)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedDepthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.g = nn.Conv2d(8, 12, 3, groups=4)
        self.d = nn.Conv2d(12, 12, 3, groups=12)
        self.o = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.o(self.d(F.relu(self.g(self.a(x)))))


class TwoLstms(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(5, 6, 2, batch_first=True)
        self.h = nn.Linear(6, 3)

    def forward(self, x):
        return self.h(self.l(x)[0][:, -1])


class ChunkConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.m = nn.Conv2d(4, 4, 3, padding=1)
        self.o = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        y, z = self.a(x).chunk(2, 1)
        return self.o(torch.cat([y, z, self.m(y)], 1))


class ChannelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.groups = 3
        self.a = nn.Conv2d(3, 12, 1)
        self.b = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2)
        return self.b(x.reshape(b, c, h, w))


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 6)
        self.b = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.sigmoid(self.b(torch.sigmoid(self.a(x))))
        return torch.sigmoid(x @ self.b.weight) @ self.a.weight


class LayerNormStream(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(4, 8)
        self.n = nn.LayerNorm(8)
        self.i = nn.Linear(8, 10)
        self.o = nn.Linear(10, 8)
        self.h = nn.Linear(8, 3)

    def forward(self, x):
        x = self.e(x)
        return self.h(x + self.o(F.gelu(self.i(self.n(x)))))


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.b(F.pixel_shuffle(self.a(x), 2))


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "residual": lambda: (Residual(), _image()),
    "concat_flatten": lambda: (ConcatFlatten(), torch.randn(2, 3, 2, 2)),
    "gqa": lambda: (GroupedQueries(), torch.randn(2, 5, 10)),
    "fused_qkv": lambda: (FusedProjections(), torch.randn(2, 5, 10)),
    "grouped_depthwise": lambda: (GroupedDepthwise(), _image()),
    "lstm2": lambda: (TwoLstms(), torch.randn(2, 4, 5)),
    "chunk_concat": lambda: (ChunkConcat(), _image()),
    "channel_shuffle": lambda: (ChannelShuffle(), _image()),
    "pixel_shuffle": lambda: (PixelShuffle(), _image()),
    "tied_autoencoder": lambda: (TiedAutoencoder(), torch.randn(2, 10)),
    "layernorm_stream": lambda: (LayerNormStream(), torch.randn(2, 4)),
}
