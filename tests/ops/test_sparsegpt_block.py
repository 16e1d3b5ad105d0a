"""Tests of the columns of a block of SparseGPT: the bits of plain torch, whatever the shape, layout and kernel."""

import pytest
import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops import reference

N_OF_M = [(0, 0), (2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (2, 5), (3, 7), (20, 64)]
SIZES = [(1, 1), (1, 5), (3, 2), (16, 128), (33, 24), (70, 131), (130, 8), (0, 4), (4, 0)]


def problem(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * columns)
    inputs = torch.randn(2 * columns + 3, columns, dtype=torch.float64)
    gram = inputs.T @ inputs + torch.eye(columns)
    factor = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1).contiguous().to(dtype)
    mask = torch.rand(rows, columns) < 0.7
    found = torch.randn(rows, columns, dtype=dtype), torch.randn(rows, columns, dtype=dtype), factor, mask
    return tuple(one.to(device) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize(("keep", "of"), N_OF_M)
def test_sparsegpt_block_gives_the_bits_of_the_reference(device, dtype, rows, columns, keep, of):
    weight, sums, factor, mask = problem(rows, columns, dtype, device)
    expected = reference.sparsegpt_block(weight.cpu(), sums.cpu(), factor.cpu(), mask.cpu(), keep=keep, of=of)
    ops.sparsegpt_block(weight, sums, factor, mask, keep=keep, of=of)
    for found, wanted in zip((weight, sums, mask), expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_sparsegpt_block_keeps_the_last_of_equals_and_never_what_is_gone(device):
    weight, factor = torch.ones(2, 8, device=device), torch.eye(8, device=device)
    mask = torch.ones(2, 8, dtype=torch.bool, device=device)
    mask[1, 4:7] = False
    ops.sparsegpt_block(weight, torch.zeros_like(weight), factor, mask, keep=2, of=4)
    assert mask.int().tolist() == [[0, 0, 1, 1] * 2, [0, 0, 1, 1, 0, 0, 0, 1]]
    assert weight.tolist() == mask.float().tolist()


def test_sparsegpt_block_takes_slices_of_columns_and_touches_nothing_beside_them(device):
    whole = [one.repeat(1, 3) for one in problem(37, 20, torch.float32, device)]
    parts = [one[:, 20:40] for one in whole]
    before = [one.clone() for one in whole]
    expected = reference.sparsegpt_block(*(part.cpu() for part in parts), keep=2, of=4)
    ops.sparsegpt_block(*parts, keep=2, of=4)
    for index, wanted in zip((0, 1, 3), expected, strict=True):
        assert torch.equal(parts[index].cpu(), wanted)
        before[index][:, 20:40] = wanted
        assert torch.equal(whole[index], before[index])


def test_sparsegpt_block_does_not_read_below_the_diagonal(device):
    weight, sums, factor, mask = problem(20, 30, torch.float32, device)
    other = [weight.clone(), sums.clone(), mask.clone()]
    ops.sparsegpt_block(weight, sums, factor, mask, keep=2, of=6)
    dirty = factor + torch.full_like(factor, 9.0).tril(-1)
    ops.sparsegpt_block(other[0], other[1], dirty, other[2], keep=2, of=6)
    assert torch.equal(weight, other[0])


def test_sparsegpt_block_is_seen_by_autograd(device):
    weight, sums, factor, mask = problem(3, 4, torch.float32, device)
    given = torch.randn(3, 4, device=device, requires_grad=True)
    loss = (given * weight).sum()
    ops.sparsegpt_block(weight, sums, factor, mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparsegpt_block_passes_opcheck(device):
    torch.library.opcheck(
        torch.ops.pyprune.sparsegpt_block, (*problem(9, 12, torch.float32, device), 2, 4),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_sparsegpt_block_refuses_bad_input():
    weight, sums, factor, mask = problem(3, 4, torch.float32, "cpu")
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float16"):
        ops.sparsegpt_block(weight.half(), sums.half(), factor.half(), mask)
    with pytest.raises(TypeError, match="sums has dtype"):
        ops.sparsegpt_block(weight, sums.double(), factor, mask)
    for wrong in (factor[:3], torch.eye(3), torch.ones(4)):
        with pytest.raises(ValueError, match=r"needs \(4, 4\)"):
            ops.sparsegpt_block(weight, sums, wrong, mask)
    for keep, of in ((2, 0), (0, 4), (4, 4), (1, 1)):
        with pytest.raises(ValueError, match="keep"):
            ops.sparsegpt_block(weight, sums, factor, mask, keep=keep, of=of)
    with pytest.raises(ValueError, match="of is 65"):
        ops.sparsegpt_block(weight, sums, factor, mask, keep=1, of=65)
    for index, name in enumerate(("weight", "sums", "factor", "mask")):
        given = [weight, sums, factor, mask]
        given[index] = given[index].T.contiguous().T
        with pytest.raises(ValueError, match=f"{name} has strides"):
            ops.sparsegpt_block(*given)
    for given in ((weight, weight, factor, mask), (factor, torch.ones(4, 4), factor, torch.ones(4, 4) > 0)):
        with pytest.raises(ValueError, match="shares memory"):
            ops.sparsegpt_block(*given)
