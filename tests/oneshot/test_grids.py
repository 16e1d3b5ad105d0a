"""Tests of grids: rounding against NumPy, and SparseGPT on a grid against the authors' algorithm in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import pyprune
from pyprune import scope, solvers
from tests.oneshot.test_sparsegpt import dropped, exact_count, problem

GRIDS = [
    {"bits": 8}, {"bits": 4}, {"bits": 2}, {"bits": 3, "symmetric": False}, {"bits": 8, "symmetric": False},
    {"bits": 4, "group": 16}, {"bits": 4, "group": 7, "symmetric": False}, {"bits": 4, "group": 10**6},
]  # fmt: skip


def rounded(values, dense, bits, symmetric=True, group=None):
    """Return values on the grid of a dense weight, element by element."""
    found = np.empty_like(values)
    group = group or dense.shape[1]
    for row in range(len(dense)):
        for j in range(dense.shape[1]):
            part = dense[row, j // group * group : (j // group + 1) * group]
            if symmetric:
                most = 2 ** (bits - 1) - 1
                least, zero, scale = -most, 0, np.abs(part).max() / most
            else:
                least, most = 0, 2**bits - 1
                low, high = min(part.min(), 0), max(part.max(), 0)
                scale = (high - low) / most
                zero = np.round(-low / scale) if scale else 0
            scale = scale or 1
            point = min(max(np.round(values[row, j] / scale) + zero, least), most)
            found[row, j] = scale * (point - zero)
    return found


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (3, 16)])
def test_grid_rounds_to_the_nearest_point(options, shape):
    torch.manual_seed(0)
    dense = torch.randn(shape, dtype=torch.float64) + 0.5
    dense[0] = 0
    values = dense * 1.3
    grid = solvers.grid(**options)
    found = grid.round(values, *grid.steps(dense))
    np.testing.assert_allclose(found.numpy(), rounded(values.numpy(), dense.numpy(), **options), atol=1e-12)
    again = grid.round(found, *grid.steps(dense))
    assert torch.equal(again, found)
    assert not torch.signbit(grid.round(-torch.zeros(shape, dtype=torch.float64), *grid.steps(dense))).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_of_the_largest_numbers_has_finite_steps(symmetric):
    dense = torch.tensor([[torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]])
    assert all(one.isfinite().all() for one in solvers.grid(bits=4, symmetric=symmetric).steps(dense))


def by_columns(weight, gram, among, ratio, options, *, base=None, damping=0.01, block=128):
    """Return weight and mask as the authors' algorithm makes them with a quantiser, by the inverse's factor."""
    w, h = weight.numpy().copy(), gram.numpy().copy()
    n, dense = w.shape[1], weight.numpy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    u = np.linalg.cholesky(np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(n))).T
    there = np.ones(w.shape, dtype=bool) if base is None else base.numpy()
    mask = there.copy()
    size = among.of or among.width or block
    for start in range(0, n, size):
        end = min(start + size, n)
        scores = np.where(there[:, start:end], np.abs(w[:, start:end]) / np.diag(u)[start:end], -1)
        if among.name == "columns":
            mask[:, start:end] = there[:, start:end] & ~dropped(scores, exact_count(scores.size, ratio))
        else:
            for row in range(len(w)):
                gone = max(0, end - start - among.keep)
                mask[row, start:end] = there[row, start:end] & ~dropped(scores[row], gone)
        for j in range(start, end):
            q = np.where(mask[:, j], rounded(np.tile(w[:, j : j + 1], n), dense, **options)[:, j], 0)
            w[:, j:] -= np.outer((w[:, j] - q) / u[j, j], u[j, j:])
            w[:, j] = q
    return w, mask


SCOPES = [
    (scope.columns(16), 0.5), (scope.columns(128), 0.7), (scope.columns(7), 0.0), (scope.n_of_m(keep=2, of=4), None),
    (scope.n_of_m(keep=1, of=3), None),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["correlated", "dead"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3, "symmetric": False, "group": 8}], ids=str)
@pytest.mark.parametrize(("among", "ratio"), SCOPES)
@pytest.mark.parametrize("with_base", [False, True])
def test_sparsegpt_on_a_grid_is_the_authors_algorithm(among, ratio, options, kind, with_base):
    weight, gram = problem(6, 42, kind=kind)
    base = torch.rand(weight.shape) > 0.2 if with_base else None
    solver = solvers.sparsegpt(quantize=solvers.grid(**options))
    found = solver.solve(weight, gram, scope=among, ratio=ratio, mask=base)
    expected, mask = by_columns(weight, gram, among, ratio, options, base=base)
    assert found.mask.tolist() == mask.tolist()
    np.testing.assert_allclose(found.weight.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(
    "among", [scope.tensor(), scope.row(), scope.columns(16), scope.n_of_m(keep=2, of=4)], ids=str
)
@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsegpt_on_a_grid_is_on_it_and_loses_less_than_rounding_after(among, options, dtype):
    weight, gram = problem(16, 64, dtype=torch.float32)
    weight = weight.to(dtype)
    grid = solvers.grid(**options)
    steps = grid.steps(weight)
    ask = {"scope": among, "ratio": 0.5, "mask": None}
    joint = solvers.sparsegpt(quantize=grid).solve(weight, gram, **ask)
    assert torch.equal(joint.weight, torch.where(joint.mask, grid.round(joint.weight, *steps), 0))
    assert int(joint.mask.sum()) == 512
    assert not torch.signbit(joint.weight[joint.weight == 0]).any()
    pruned = solvers.sparsegpt().solve(weight, gram, **ask)
    losses = []
    for values in (joint.weight, torch.where(pruned.mask, grid.round(pruned.weight, *steps), 0)):
        lost = values - weight.float()
        losses.append(float(((lost @ gram) * lost).sum()))
    # With 8 bits rounding costs next to nothing, and the masks differ a little.
    assert losses[0] < losses[1] * (1.02 if options["bits"] == 8 else 1)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_prune_one_shot_quantises_what_it_keeps(ratio):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    dense = [layer[0].weight.detach().clone() for layer in model]
    grid = solvers.grid(bits=4)
    data = [torch.randn(64, 16) for _ in range(4)]
    pyprune.prune_one_shot(
        model, data, scope.row(), ratio=ratio, solver=solvers.sparsegpt(quantize=grid), blocks=["0", "1", "2"]
    )
    pyprune.strip(model)
    for layer, before in zip(model, dense, strict=True):
        weight = layer[0].weight.detach()
        assert torch.equal(weight, grid.round(weight, *grid.steps(before)))
        assert len(weight.unique()) <= 16 * 15
        assert int((weight == 0).sum()) >= ratio * weight.numel()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": 9}, ValueError, "bits"),
        ({"bits": 4.5}, TypeError, "bits"),
        ({"bits": 4, "group": 0}, ValueError, "group"),
        ({"bits": 4, "symmetric": 1}, TypeError, "symmetric"),
    ],
)
def test_grid_refuses_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        solvers.grid(**options)


def test_sparsegpt_refuses_what_is_no_grid():
    with pytest.raises(TypeError, match="quantize"):
        solvers.sparsegpt(quantize=4)
    with pytest.raises(ValueError, match="polish"):
        solvers.sparsegpt(quantize=solvers.grid(bits=4), polish=True)
    with pytest.raises(ValueError, match="weight"):
        solvers.grid(bits=4).steps(torch.full((2, 2), math.nan))
