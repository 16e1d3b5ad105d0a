"""Small layers for solvers: golden values, random weights with the Grams of correlated inputs, and oracles."""

import itertools
import json
from pathlib import Path

import torch

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def golden(*keys):
    value = GOLDEN
    for key in keys:
        value = value[key]
    found = torch.tensor(value, dtype=torch.float64)
    return found.bool() if keys[-1] == "mask_pruned" else found


def golden_layer():
    inputs = golden("X")
    return golden("W"), inputs.T @ inputs


def layer(rows=6, columns=16, *, tokens=64, seed=0, dtype=torch.float32, gram_dtype=None, dead=()):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs += inputs[:, :1]
    inputs[:, list(dead)] = 0
    gram = (inputs.T @ inputs).to(gram_dtype or torch.promote_types(dtype, torch.float32))
    return weight.to(dtype), gram


def damped(gram, damping=0.01):
    """The Gram that solvers see: with ones for dead inputs, and damping."""
    gram = gram.double().clone()
    gram.diagonal()[gram.diagonal() == 0] = 1
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram


def loss(weight, solved, gram):
    """tr((V-W) H (V-W)^T) in float64."""
    missing = solved.double() - weight.double()
    return float(((missing @ gram.double()) * missing).sum())


def least_squares(weight, gram, mask):
    """The weights that a mask keeps, row by row."""
    solved = torch.zeros_like(weight, dtype=torch.float64)
    for row, (values, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        if kept.any():
            solved[row, kept] = torch.linalg.solve(gram[kept][:, kept], (gram @ values)[kept])
    return solved


def best_of_rows(weight, gram, keep, size=None):
    """The least loss of all masks that keep so many of each ``size`` neighbours (of each row), by trying them all."""
    columns = weight.shape[1]
    size = size or columns
    groups = [list(itertools.combinations(range(start, start + size), keep)) for start in range(0, columns, size)]
    total = 0.0
    for row in weight:
        found = []
        for kept in itertools.product(*groups):
            mask = torch.zeros(1, columns, dtype=torch.bool)
            mask[0, [index for group in kept for index in group]] = True
            found.append(loss(row[None], least_squares(row[None], gram, mask), gram))
        total += min(found)
    return total
