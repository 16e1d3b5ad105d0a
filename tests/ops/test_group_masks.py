import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, KINDS, adversarial, layouts

# 2:4, 1:4 and 4:8 as the hardware and others want them; all that stays, nothing; any size; per row.
GROUPS = [
    (4, 2), (4, 1), (4, 3), (4, 0), (4, 4), (8, 4), (8, 1), (8, 7), (1, 1), (1, 0), (2, 1), (3, 2), (5, 3), (16, 8),
    (32, 5), (63, 20), (64, 32), (65, 30), (100, 99), (1000, 500),
]  # fmt: skip
SHAPES = [(37, 200), (3, 1029), (64, 64), (5, 3), (1, 1), (300, 7), (0, 8), (8, 0)]


def factors_for(weight: Tensor, row_dims: int, seed: int = 0) -> Tensor:
    columns = weight.shape[row_dims:].numel()
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    factors[torch.rand(columns, generator=generator) < 0.1] = 0
    return factors if weight.dtype == torch.float64 else factors.float()


def base_for(weight: Tensor, seed: int = 0) -> Tensor:
    base = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    return base.to(weight.device)


def check(weights: Sequence[Tensor], sizes, kept, *, device="cpu", row_dims=1, factors=None, bases=None) -> None:
    """Compare with the reference, everything on the device."""
    count = len(weights)
    sizes, kept, row_dims = ([one] * count if isinstance(one, int) else one for one in (sizes, kept, row_dims))
    factors, bases = ([None] * count if some is None else some for some in (factors, bases))
    expected, _ = reference.group_masks(weights, sizes, kept, row_dims=row_dims, factors=factors, bases=bases)
    there = [[None if one is None else one.to(device) for one in some] for some in (weights, factors, bases)]
    masks, nonfinite = ops.group_masks(there[0], sizes, kept, row_dims=row_dims, factors=there[1], bases=there[2])
    assert nonfinite.tolist() == [0] * count
    for index, (mask, want) in enumerate(zip(masks, expected, strict=True)):
        assert torch.equal(mask.cpu(), want), f"mask {index}: {(mask.cpu() != want).sum()} differ"


@functools.cache
def weights_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    return [adversarial(shape, kind, dtype, seed) for seed, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_masks_matches_the_reference(kind, dtype, device):
    weights = weights_of(kind, dtype)
    factors = [factors_for(weight, 1) for weight in weights]
    bases = [base_for(weight, seed) for seed, weight in enumerate(weights)]
    for size, kept in GROUPS:
        check(weights, size, kept, device=device)
        check(weights, size, kept, device=device, factors=factors)
        check(weights, size, kept, device=device, bases=bases)
        check(weights, size, kept, device=device, factors=factors, bases=bases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_dims", [0, 1, 2, 3])
def test_group_masks_takes_any_layout(dtype, row_dims, device):
    for shape in ((6, 10, 3, 3), (4, 70, 1, 1), (2, 5, 9, 11)):
        weight = adversarial(shape, "few values", dtype).to(device)
        variants = [*layouts(weight).values(), *(one.movedim(1, -1) for one in layouts(weight).values())]
        for size, kept in ((4, 2), (8, 3), (7, 2), (64, 11), (99, 44)):
            for one in variants:
                on_cpu = one.cpu()
                factors, bases = [factors_for(on_cpu, row_dims)], [base_for(on_cpu)]
                expected = reference.group_masks(
                    [on_cpu], [size], [kept], row_dims=[row_dims], factors=factors, bases=bases
                )[0][0]
                for mask in (
                    None,
                    [torch.empty_like(one, dtype=torch.bool)],
                    [torch.empty(one.shape[::-1], dtype=torch.bool, device=device).permute(3, 2, 1, 0)],
                ):
                    found, _ = ops.group_masks(
                        [one],
                        size,
                        kept,
                        row_dims=row_dims,
                        masks=mask,
                        factors=[factors[0].to(device)],
                        bases=[bases[0].to(device)],
                    )
                    assert torch.equal(found[0].cpu(), expected)
