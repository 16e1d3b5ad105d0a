"""Weights in the shapes of well-known models: random values, real sizes."""

import math

import torch
from torch import Tensor, nn


def resnet50() -> list[tuple[int, ...]]:
    """List the 53 convolutions and the classifier of ResNet-50: 54 tensors, 25.5M weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (1000, inputs)]


def bert_base() -> list[tuple[int, ...]]:
    """List the embeddings and matrices of BERT-base: 76 tensors, 109.4M weights."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [(30522, 768), (512, 768), (2, 768), *layer * 12, (768, 768)]


MODELS = {"resnet50": resnet50, "bert": bert_base}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_weights(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Draw normal weights with the spread that layers of these sizes have after initialisation."""
    torch.manual_seed(0)
    return [(torch.randn(shape) / math.sqrt(math.prod(shape[1:]))).to(dtype) for shape in shapes]


def title_of(model: str, dtype: str, weights: list[Tensor]) -> str:
    """Say what is measured."""
    return f"{model}, {dtype}: {len(weights)} tensors, {sum(map(Tensor.numel, weights)) / 1e6:.1f}M weights"


def as_modules(weights: list[Tensor]) -> nn.ModuleList:
    """Build layers around the weights, which are not copied."""
    modules = nn.ModuleList()
    for weight in weights:
        if weight.dim() == 4:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, device="meta")
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        modules.append(layer)
    return modules
