"""What is measured: weights in the shapes of well-known models, with random values; and small networks to train."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """List the 53 convolutions and the classifier of ResNet-50: 54 tensors, 25.5M weights."""
    shapes: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (1000, inputs)]


def bert_base() -> Shapes:
    """List the embeddings and matrices of BERT-base: 76 tensors, 109.4M weights."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [(30522, 768), (512, 768), (2, 768), *layer * 12, (768, 768)]


def llama() -> Shapes:
    """List the matrices of a Llama-like model: 149 tensors, 498M weights."""
    layer = [(1280, 1280)] * 4 + [(3456, 1280)] * 2 + [(1280, 3456)]
    return [(32000, 1280), *layer * 21, (32000, 1280)]


def tiny() -> Shapes:
    """List a few small tensors, to try a job out."""
    return [(8, 3, 3, 3), (16, 8, 1, 1), (40, 16), (3, 5)]


MATRICES: dict[str, Callable[[], Shapes]] = {
    f"{rows}x{columns}": lambda shape=(rows, columns): [shape]
    for rows, columns in ((16, 32), (576, 576), (768, 768), (768, 3072), (3072, 768), (2048, 2048), (4096, 4096))
}
SIZES = {"1M": 1, "4M": 4, "16M": 16, "64M": 64, "256M": 256, "1B": 1024, "2B": 2048}
LISTS: dict[str, Callable[[], Shapes]] = (
    {"resnet50": resnet50, "bert": bert_base, "llama": llama, "tiny": tiny}
    | MATRICES
    | {name: lambda count=count: [(1024, 1024)] * count for name, count in SIZES.items()}
)


class Stack(nn.Module):
    """Layers one after the other. (NNCF hangs itself into the model as a module, which nn.Sequential would call.)"""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before_attention(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.before_mlp(x))


def convnet() -> tuple[nn.Module, Tensor]:
    """Return a small convolutional network and a batch for it."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    net = Stack(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return net, torch.randn(16, 3, 32, 32)


def transformer() -> tuple[nn.Module, Tensor]:
    """Return a stack of transformer blocks and a batch for it."""
    return Stack(*(Block(256, 4) for _ in range(2))), torch.randn(8, 64, 256)


class Residual(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        self.shortcut = convolution(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


def resnet18() -> tuple[nn.Module, Tensor]:
    """Return ResNet-18 for images of 32 x 32 and a batch for it."""
    layers: list[nn.Module] = [convolution(3, 64, 3), nn.ReLU()]
    for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
    net = Stack(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return net, torch.randn(32, 3, 32, 32)


def encoder() -> tuple[nn.Module, Tensor]:
    """Return a stack of transformer blocks of the size of a small encoder and a batch for it."""
    return Stack(*(Block(384, 6) for _ in range(4))), torch.randn(32, 64, 384)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "convnet": convnet,
    "transformer": transformer,
    "resnet18": resnet18,
    "encoder": encoder,
}
MODELS = list(dict.fromkeys([*LISTS, *NETS, *ARCHITECTURES]))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_signs(magnitudes: Tensor) -> Tensor:
    return magnitudes.copysign_(torch.rand_like(magnitudes) - 0.5)


# How the n values of one tensor are drawn, given where it begins and ends in the list: fractions from 0 to 1.
DISTRIBUTIONS: dict[str, Callable[[int, float, float], Tensor]] = {
    "normal": lambda n, begin, end: torch.randn(n),
    "equal": lambda n, begin, end: torch.ones(n),
    "two-values": lambda n, begin, end: torch.randint(1, 3, (n,)).float(),
    # Quantiles of |normal|, growing from the first weight of the list to the last.
    "sorted": lambda n, begin, end: torch.special.ndtri((1 + torch.linspace(begin, end, n) * (1 - 1e-7)) / 2),
    "heavy-tailed": lambda n, begin, end: random_signs(torch.randn(n).mul_(2).exp_()),
    "one-binade": lambda n, begin, end: random_signs(1 + torch.rand(n)),
}


@dataclass(frozen=True)
class Case:
    """One combination of everything that is varied."""

    model: str
    dtype: str = "float32"
    ratio: float = 0.7
    weights: str = "normal"
    threads: int = 1

    @property
    def shapes(self) -> Shapes:
        """The shapes of what is pruned."""
        if self.model in LISTS:
            return LISTS[self.model]()
        net, _ = {**ARCHITECTURES, **NETS}[self.model]()
        return [tuple(parameter.shape) for parameter in net.parameters() if parameter.dim() > 1]

    @property
    def sizes(self) -> list[int]:
        """How many weights there are in each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def count(self) -> int:
        """How many weights there are."""
        return sum(self.sizes)

    @property
    def title(self) -> str:
        """Say what is measured."""
        facts = f"{len(self.shapes)} tensors, {self.count / 1e6:,.1f}M weights"
        return f"{self.model}, {self.dtype}: {facts}, ratio {self.ratio}, {self.weights}, threads {self.threads}"

    def draw(self) -> list[Tensor]:
        """Draw the weights; normal ones with the spread that layers of these sizes have after initialisation."""
        torch.manual_seed(0)
        draw, total, begin = DISTRIBUTIONS[self.weights], self.count, 0
        drawn = []
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            values = draw(size, begin / total, (begin + size) / total)
            if self.weights == "normal":
                values /= math.sqrt(math.prod(shape[1:]))
            drawn.append(values.to(DTYPES[self.dtype]).view(shape))
            begin += size
        return drawn

    def facts(self) -> dict[str, Any]:
        """Return what a report keeps."""
        weight_bytes = self.count * DTYPES[self.dtype].itemsize
        return asdict(self) | {"tensors": len(self.shapes), "count": self.count, "weight_bytes": weight_bytes}


def as_modules(weights: list[Tensor]) -> nn.ModuleList:
    """Build layers around the weights, which are not copied."""
    modules = nn.ModuleList()
    for weight in weights:
        if weight.dim() == 4:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, device="meta")
        else:
            layer = nn.Linear(weight.shape[-1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        modules.append(layer)
    return modules
