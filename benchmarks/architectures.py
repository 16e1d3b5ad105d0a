"""Networks that are made smaller: ResNet-50, MobileNetV2 and a BERT of MiniLM's size, in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Return a convolution, its BatchNorm, and an activation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([activation] if activation else []))


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            convolution(inputs, width, 1, activation=nn.ReLU()),
            convolution(width, width, 3, stride, activation=nn.ReLU()),
            convolution(width, 4 * width, 1),
        )
        is_same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if is_same else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolutions(x) + self.shortcut(x))


def resnet50() -> tuple[nn.Module, Tensor]:
    """Return ResNet-50 (25,557,032 parameters) and an image."""
    layers: list[nn.Module] = [convolution(3, 64, 7, 2, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    return net, torch.randn(1, 3, 224, 224)


class InvertedResidual(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        first = [convolution(inputs, hidden, 1, activation=nn.ReLU6())] if expansion > 1 else []
        depthwise = convolution(hidden, hidden, 3, stride, hidden, nn.ReLU6())
        self.convolutions = nn.Sequential(*first, depthwise, convolution(hidden, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolutions(x)
        return x + y if self.is_residual else y


def mobilenet_v2() -> tuple[nn.Module, Tensor]:
    """Return MobileNetV2 (3,504,872 parameters) and an image."""
    layers: list[nn.Module] = [convolution(3, 32, 3, 2, activation=nn.ReLU6())]
    inputs = 32
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, outputs, blocks, stride in table:
        for block in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
            inputs = outputs
    last = convolution(inputs, 1280, 1, activation=nn.ReLU6())
    net = nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))
    return net, torch.randn(1, 3, 224, 224)


class EncoderLayer(nn.Module):
    """A layer of BERT."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.after_attention, self.after_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.after_attention(x + self.out(y))
        return self.after_mlp(x + self.down(gelu(self.up(x))))


class MiniLM(nn.Module):
    """An encoder of 6 layers, 12 heads and a width of 384."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.norm = nn.Embedding(30522, 384), nn.Embedding(512, 384), nn.LayerNorm(384)
        self.layers = nn.Sequential(*(EncoderLayer(384, 12, 1536) for _ in range(6)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.layers(self.norm(x))


def minilm() -> tuple[nn.Module, Tensor]:
    """Return an encoder of the shape of all-MiniLM-L6 and a sentence of 128 tokens."""
    return MiniLM(), torch.randint(30522, (1, 128))


def small() -> tuple[nn.Module, Tensor]:
    """Return two blocks of ResNet-50's kind, to try a job out."""
    return nn.Sequential(Bottleneck(3, 4, 1), Bottleneck(16, 4, 1)), torch.randn(1, 3, 8, 8)


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "minilm": minilm,
    "tiny": small,
}
