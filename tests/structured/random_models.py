"""Random networks: whatever is tied in them, shrink must leave what they compute."""

import random

import torch
import torch.nn.functional as F
from torch import nn


class RandomNet(nn.Module):
    """A program over a stack of tensors (batch, channels, ...), of images or sequences."""

    def __init__(self, seed, steps=10, *, kind="image"):
        super().__init__()
        self.random = random.Random(seed)
        self.kind = kind
        self.layers = nn.ModuleList()
        self.program = []
        self.channels = []  # of the tensors there are
        self.step("map", -1, self.layer(3, 8))
        for _ in range(steps):
            getattr(self, "add_" + self.random.choice(CHOICES[kind]))()
        self.head = nn.LazyLinear(4)
        self.random = None

    def layer(self, given, made):
        if self.kind == "image":
            size = self.random.choice([1, 3])
            self.layers.append(nn.Conv2d(given, made, size, padding=size // 2, bias=self.random.random() < 0.7))
        else:
            self.layers.append(nn.Linear(given, made, bias=self.random.random() < 0.7))
        return len(self.layers) - 1, made

    def step(self, name, source, layer_and_made):
        layer, made = layer_and_made
        self.program.append((name, source, layer))
        self.channels.append(made)

    def any(self):
        place = self.random.randrange(len(self.channels))
        return place, self.channels[place]

    def add_layer(self):
        place, count = self.any()
        self.step("map", place, self.layer(count, self.random.choice([6, 8, 12])))

    def add_norm(self):
        place, count = self.any()
        norms = {
            "image": [nn.BatchNorm2d(count), nn.GroupNorm(2 if count % 2 == 0 else 1, count), nn.PReLU(count)],
            "sequence": [nn.LayerNorm(count), nn.RMSNorm(count), nn.GELU()],
        }
        self.layers.append(self.random.choice(norms[self.kind]))
        self.step("map", place, (len(self.layers) - 1, count))

    def add_grouped(self):
        place, count = self.any()
        groups = self.random.choice([one for one in (1, 2, 4, count) if count % one == 0])
        self.layers.append(nn.Conv2d(count, count * self.random.choice([1, 2]), 3, padding=1, groups=groups))
        self.step("map", place, (len(self.layers) - 1, self.layers[-1].out_channels))

    def add_function(self):
        place, count = self.any()
        self.step(self.random.choice(["relu", "sigmoid", "gelu", "neg", "softplus", "clone"]), place, (None, count))

    def add_sum(self):
        place, count = self.any()
        same = [other for other, size in enumerate(self.channels) if size == count]
        self.step(self.random.choice(["add", "mul"]), (place, self.random.choice(same)), (None, count))

    def add_cat(self):
        places = [self.any() for _ in range(self.random.choice([2, 3]))]
        self.step("cat", [place for place, _ in places], (None, sum(count for _, count in places)))

    def add_chunk(self):
        place, count = self.any()
        if count % 2 == 0:
            self.step("first_half", place, (None, count // 2))
            self.step("second_half", place, (None, count // 2))

    def add_glu(self):
        place, count = self.any()
        if count % 2 == 0:
            self.step("glu", place, (None, count // 2))

    def add_shuffle(self):
        place, count = self.any()
        if count % 2 == 0 and count > 2:
            self.step("shuffle", place, (None, count))

    def add_gate(self):
        place, count = self.any()
        kind, self.kind = self.kind, "sequence"
        layer, _ = self.layer(count, count)
        self.kind = kind
        self.step("gate", place, (layer, count))

    def add_attention(self):
        place, count = self.any()
        self.layers.append(Attention(count, self.random))
        self.step("map", place, (len(self.layers) - 1, count))

    def add_flip(self):
        place, count = self.any()
        self.step("flip", place, (None, count))

    def forward(self, x):
        there, axis = [], 1 if self.kind == "image" else -1
        for name, source, layer in self.program:
            one = x if source == -1 else None if isinstance(source, (list, tuple)) else there[source]
            if name == "map":
                made = self.layers[layer](one)
            elif name in ("add", "mul"):
                made = getattr(torch, name)(there[source[0]], there[source[1]])
            elif name == "cat":
                made = torch.cat([there[place] for place in source], axis)
            elif name in ("first_half", "second_half"):
                made = one.chunk(2, axis)[name == "second_half"]
            elif name == "glu":
                made = F.glu(one, axis)
            elif name == "shuffle":
                made = one.unflatten(axis, (2, -1)).transpose(*((1, 2) if axis == 1 else (-1, -2)))
                made = made.flatten(*((1, 2) if axis == 1 else (-2, -1)))
            elif name == "gate":
                pooled = one.mean((2, 3)) if self.kind == "image" else one.mean(1)
                gate = torch.sigmoid(self.layers[layer](pooled))
                made = one * (gate[:, :, None, None] if self.kind == "image" else gate[:, None])
            elif name == "flip":
                made = one.flip(axis)
            else:
                made = getattr(F, name, None) or getattr(torch, name)
                made = made(one)
            there.append(made)
        pooled = [one.mean((2, 3)) if self.kind == "image" else one.mean(1) for one in there[-3:]]
        return self.head(torch.cat(pooled, 1))


class Attention(nn.Module):
    """Heads written in one of several ways, with grouped queries or not."""

    def __init__(self, width, chance):
        super().__init__()
        self.heads, self.size = 4, 3
        self.shared = chance.choice([1, 2])
        self.way = chance.choice(["sdpa", "matmul", "fused"])
        if self.way == "fused":
            self.shared = 1
            self.qkv = nn.Linear(width, 3 * self.heads * self.size)
        else:
            self.q = nn.Linear(width, self.heads * self.size)
            self.k, self.v = (nn.Linear(width, self.heads // self.shared * self.size) for _ in range(2))
        self.o = nn.Linear(self.heads * self.size, width)

    def forward(self, x):
        b, n, _ = x.shape
        if self.way == "fused":
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(x).view(b, n, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (one.repeat_interleave(self.shared, 1) for one in (k, v))
        if self.way == "matmul":
            made = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1) @ v
        else:
            made = F.scaled_dot_product_attention(q, k, v)
        return self.o(made.transpose(1, 2).flatten(2))


CHOICES = {
    "image": [
        "layer", "layer", "norm", "grouped", "function", "sum", "cat", "chunk", "glu", "shuffle", "gate", "flip",
    ],
    "sequence": [
        "layer", "layer", "norm", "function", "sum", "cat", "chunk", "glu", "gate", "attention", "attention", "flip",
        "shuffle",
    ],
}  # fmt: skip
