import math
import sys

import pytest
import torch
from torch import nn

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, adversarial, layouts

# torch's own, while it loads what forward mode needs
IGNORE_SCRIPTING = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
LARGE = 70_001  # elements: more than torch.where is left to


def weight_and_mask(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return weight.requires_grad_(), (torch.rand(shape, generator=generator) < 0.4).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(LARGE,), (3, 5), (), (0,), (129, 1000)], ids=str)
def test_mask_weight_matches_reference(device, dtype, shape):
    weight = adversarial(shape, "normal", dtype).to(device)
    mask = torch.rand(shape, device=device) < 0.5
    assert torch.equal(ops.mask_weight(weight, mask), reference.mask_weight(weight, mask))
    assert torch.equal(torch.ops.pyprune.mask_weight(weight, mask), reference.mask_weight(weight, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_weight_of_any_layout(device, dtype):
    base = torch.randn(130, 26, 3, 7, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)).to(device) < 0.5
    expected = torch.where(mask, base, 0)
    for weight_layout, weight in layouts(base).items():
        for mask_layout, mask_view in layouts(mask).items():
            out = ops.mask_weight(weight, mask_view)
            assert torch.equal(out, expected), (weight_layout, mask_layout)
            assert out.stride() == torch.empty_like(weight).stride()
    expanded = base[:1].expand(base.shape)
    assert torch.equal(ops.mask_weight(expanded, mask), torch.where(mask, expanded, 0))


@pytest.mark.parametrize("size", [3, LARGE])
def test_mask_weight_drops_anything_and_keeps_all_bits(device, size):
    weight = torch.tensor([math.nan, -1.0, math.inf, math.nan, -0.0], device=device).repeat(size)
    mask = torch.tensor([False, False, False, True, True], device=device).repeat(size)
    out = ops.mask_weight(weight, mask).view(-1, 5)
    assert not out[:, :3].any()
    assert not out[:, :3].signbit().any()
    assert out[:, 3].isnan().all()
    assert out[:, 4].signbit().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [7, LARGE])
def test_mask_weight_masks_the_gradient(device, size, dtype):
    weight, mask = weight_and_mask(size, dtype=dtype, device=device)
    upstream = torch.randn_like(weight).masked_fill(~mask, math.inf)
    ops.mask_weight(weight, mask).backward(upstream)
    assert torch.equal(weight.grad, torch.where(mask, upstream, 0))
    weight.grad = None
    ops.mask_weight(weight, mask).sum().backward()  # an expanded gradient
    assert torch.equal(weight.grad, mask.to(dtype))


@pytest.mark.parametrize("size", [7, LARGE])
def test_mask_weight_passes_a_dense_gradient(device, size):
    weight, mask = weight_and_mask(size, device=device)
    out = ops.mask_weight(weight, mask, dense_gradient=True)
    upstream = torch.randn_like(weight)
    out.backward(upstream)
    assert torch.equal(out, ops.mask_weight(weight, mask))
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("size", [7, LARGE])
def test_mask_weight_has_a_second_derivative(device, size):
    weight, mask = weight_and_mask(size, dtype=torch.float64, device=device)
    (first,) = torch.autograd.grad(ops.mask_weight(weight, mask).pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    torch.testing.assert_close(second, torch.where(mask, 6 * weight, 0))


@IGNORE_SCRIPTING
def test_mask_weight_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(sys.modules["pyprune.ops.mask_weight"], "_WORTH_A_KERNEL", 0)
    weight, mask = weight_and_mask(3, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda w: ops.mask_weight(w, mask), weight, check_forward_ad=True, check_batched_grad=True
    )
    torch.autograd.gradgradcheck(lambda w: ops.mask_weight(w, mask).pow(2), weight)


@pytest.mark.parametrize("dense_gradient", [False, True])
@pytest.mark.parametrize("size", [7, LARGE])
def test_mask_weight_takes_part_in_functional_transforms(size, dense_gradient):
    weight, mask = weight_and_mask(size)
    weight = weight.detach()

    def loss(w):
        return ops.mask_weight(w, mask, dense_gradient=dense_gradient).square().sum()

    expected = torch.where(mask, 2 * weight, 0)
    assert torch.equal(torch.func.grad(loss)(weight), expected)
    stacked = torch.stack([weight, weight + 1])
    gradients = torch.func.vmap(torch.func.grad(loss))(stacked)
    assert torch.equal(gradients, torch.where(mask, 2 * stacked, 0))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # torch's own, while it loads what it needs
@pytest.mark.parametrize("size", [7, LARGE])
def test_mask_weight_has_a_forward_mode_derivative(size):
    weight, mask = weight_and_mask(size)
    weight = weight.detach()
    out, tangent = torch.func.jvp(lambda w: ops.mask_weight(w, mask), (weight,), (2 * weight,))
    assert torch.equal(out, torch.where(mask, weight, 0))
    assert torch.equal(tangent, 2 * out)


# torch's compiler makes an instance of autograd.Function, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("shape", [(5, 3), (70, 100), (32, 16, 3, 3)], ids=str)
@pytest.mark.parametrize("dense_gradient", [False, True])
def test_mask_weight_compiles(device, shape, dense_gradient):
    weight, mask = weight_and_mask(*shape, device=device)

    def call(w, m):
        return 2 * ops.mask_weight(w, m, dense_gradient=dense_gradient)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for w, m in ((weight, mask), (weight.detach().transpose(0, 1).contiguous().transpose(0, 1), ~mask)):
        w = w.detach().requires_grad_()
        out = compiled(w, m)
        assert torch.equal(out, 2 * torch.where(m, w, 0))
        (gradient,) = torch.autograd.grad(out.sum(), w)
        assert torch.equal(gradient, torch.full_like(w, 2) if dense_gradient else 2.0 * m)


def test_mask_weight_is_plain_torch_where_it_is_exported_or_traced():
    layer = nn.Linear(100, 100)
    mask = torch.rand(100, 100) < 0.5

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x @ ops.mask_weight(self.layer.weight, mask)

    x = torch.randn(2, 100)
    exported = torch.export.export(Masked(), (x,))
    assert "pyprune" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), Masked()(x))


def test_mask_weight_notices_a_mask_that_changed():
    weight, mask = weight_and_mask(LARGE)
    out = ops.mask_weight(weight, mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_mask_weight_takes_what_has_no_kernel():
    weight, mask = torch.arange(10_000.0), torch.arange(10_000) % 2 == 0
    for dtype in (torch.float8_e5m2, torch.float64):
        assert torch.equal(ops.mask_weight(weight.to(dtype), mask).double(), (weight * mask).to(dtype).double())
    assert ops.mask_weight(weight.to("meta"), mask.to("meta")).is_meta

    class Tagged(torch.Tensor):
        pass

    tagged = weight.as_subclass(Tagged)
    assert isinstance(ops.mask_weight(tagged, mask), Tagged)


def test_mask_weight_passes_opcheck(device):
    weight, mask = torch.randn(30, 4, device=device), torch.rand(30, 4, device=device) < 0.5
    torch.library.opcheck(torch.ops.pyprune.mask_weight, (weight, mask))
    torch.library.opcheck(torch.ops.pyprune.mask_weight, (weight.t(), mask.t()))


def test_mask_weight_refuses_bad_input():
    with pytest.raises(TypeError, match=r"mask is torch.float32; give a bool"):
        ops.mask_weight(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"mask is \(4,\), its weight \(3,\)"):
        ops.mask_weight(torch.ones(3), torch.ones(4, dtype=torch.bool))
