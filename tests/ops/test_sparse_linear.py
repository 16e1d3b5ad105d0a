"""Tests of a linear layer without its zeros, against float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.ops import reference
from tests.ops.test_pack_sparse import sparse

BATCHES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70, 130)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def assert_close(found: Tensor, wanted: Tensor, input: Tensor, weight: Tensor) -> None:
    """Compare with as much as rounding of sums in float32, and of the result, may make."""
    size = input.abs().double() @ weight.abs().double().T + wanted.abs() + 1
    error = (found.double() - wanted).abs()
    assert (error <= 3e-7 * size + TOLERANCE[found.dtype] * wanted.abs() + 1e-6).all(), float(error.max())


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (33, 128), (66, 257), (21, 1000)], ids=str)
def test_sparse_linear_is_the_product_in_float64(device, layout, shape):
    for zeros in (0.0, 0.5, 0.9, 1.0):
        weight = sparse(shape, zeros)
        packed = ops.pack_sparse(weight, layout)
        for rows in BATCHES:
            x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
            product = x.double() @ weight.double().T
            assert_close(ops.sparse_linear(x, packed), product, x, weight)
            assert_close(ops.sparse_linear(x, packed, bias), product + bias, x, weight)


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
@pytest.mark.parametrize("stored", ops.SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sparse_linear_takes_every_dtype(device, layout, stored, dtype):
    weight = sparse((37, 300), 0.7)
    packed = ops.pack_sparse(weight, layout, dtype=stored)
    weight = reference.pack_sparse(weight, layout, dtype=stored)
    for rows in (1, 2, 12, 40, 65):
        for bias in (None, torch.randn(37).to(dtype), torch.randn(37)):
            x = torch.randn(rows, 300).to(dtype)
            found = ops.sparse_linear(x, packed, bias)
            assert found.dtype == dtype
            assert_close(found, reference.sparse_linear(x, weight, bias), x, weight)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_sparse_linear_applies_the_activation(device, activation):
    # Outputs from -60 to 60, finely, and what is beyond all.
    weight, x = torch.tensor([[1.0], [10.0]]), torch.linspace(-6, 6, 4001)[:, None]
    packed = ops.pack_sparse(weight, "index")
    found = ops.sparse_linear(x, packed, activation=activation)
    wanted = reference.sparse_linear(x, weight, activation=activation)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    far = torch.tensor([[-1e30], [1e30], [torch.inf], [torch.nan]])
    found = ops.sparse_linear(far, packed, activation=activation)[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 1e30, torch.inf, torch.nan]), equal_nan=True)
    for rows in (1, 3, 9):
        part = ops.sparse_linear(x[:rows], packed, activation=activation)
        assert torch.equal(part, ops.sparse_linear(x, packed, activation=activation)[:rows])


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_sparse_linear_gives_the_same_bits_for_any_number_of_threads(device, layout):
    weight = sparse((700, 1030), 0.6)
    packed, threads = ops.pack_sparse(weight, layout), torch.get_num_threads()
    for rows in (1, 4, 16, 70, 300):
        x = torch.randn(rows, 1030)
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            try:
                found.append(ops.sparse_linear(x, packed, activation="gelu"))
            finally:
                torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_sparse_linear_does_not_multiply_what_is_left_out(device, layout):
    weight = sparse((30, 400), 0.8)
    weight[:, 7] = 0
    packed = ops.pack_sparse(weight, layout)
    for rows in (1, 2, 12, 40):
        for value in (torch.inf, -torch.inf, torch.nan):
            x = torch.randn(rows, 400)
            x[0, 7] = value
            assert ops.sparse_linear(x, packed).isfinite().all()
            x[rows - 1, 100] = value
            found, wanted = ops.sparse_linear(x, packed), reference.sparse_linear(x, weight, layout=layout)
            assert torch.equal(found.isfinite(), wanted.isfinite())
            assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_sparse_linear_keeps_infinite_weights_to_their_rows(device, layout):
    weight = sparse((32, 300), 0.5)
    weight[5, 3], weight[9, 200] = torch.inf, torch.nan
    packed = ops.pack_sparse(weight, layout)
    for rows in (1, 4, 12, 40):
        x = torch.rand(rows, 300) + 1
        wanted = reference.sparse_linear(x, weight, layout=layout)
        assert torch.equal(ops.sparse_linear(x, packed).isfinite(), wanted.isfinite())


def test_sparse_linear_takes_views(device):
    weight = sparse((20, 96), 0.5)
    packed = ops.pack_sparse(weight, "index")
    whole = torch.randn(6, 4, 96)
    views = {
        "one row": whole[0, 0],
        "three dimensions": whole,
        "a part of the columns": torch.randn(30, 200)[:, 50:146],
        "every second column": torch.randn(30, 192)[:, ::2],
        "transposed": torch.randn(96, 30).T,
        "two dimensions swapped": whole.transpose(0, 1),
        "rows in the middle": torch.randn(4, 96, 7).transpose(1, 2),
        "expanded": torch.randn(96).expand(12, 96),
        "every column the same": torch.randn(12, 1).expand(12, 96),
        "no rows": whole[:0],
        "unaligned": torch.randn(97)[1:],
    }
    for name, view in views.items():
        found = ops.sparse_linear(view, packed)
        assert found.shape == (*view.shape[:-1], 20), name
        assert found.is_contiguous()
        assert torch.equal(found, ops.sparse_linear(view.contiguous(), packed)), name
        wanted = reference.sparse_linear(view, weight)
        assert_close(found, wanted, view, weight)


def test_sparse_linear_refuses_gradients_and_what_does_not_fit():
    packed = ops.pack_sparse(sparse((4, 6), 0.5), "index")
    x, bias = torch.randn(3, 6), torch.randn(4)
    for given in ((x.clone().requires_grad_(), packed), (x, packed, bias.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"requires a gradient, .* torch\.no_grad"):
            ops.sparse_linear(*given)
        with torch.no_grad():
            ops.sparse_linear(*given)
        with torch.inference_mode():
            ops.sparse_linear(*given)
    found = torch.ops.pyprune.sparse_linear(x.clone().requires_grad_(), *packed.tensors, None, 0, 4, 0)
    with pytest.raises(NotImplementedError, match="no derivative"):
        found.sum().backward()
    for wrong in (x[:, :5], torch.tensor(1.0), torch.randn(6, 3)):
        with pytest.raises(ValueError, match=r"needs \(\.\.\., 6\)"):
            ops.sparse_linear(wrong, packed)
    for wrong in (bias[:3], bias[None]):
        with pytest.raises(ValueError, match="bias is of shape"):
            ops.sparse_linear(x, packed, wrong)
    with pytest.raises(TypeError, match=r"input has dtype torch\.float64"):
        ops.sparse_linear(x.double(), packed)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        ops.sparse_linear(x, packed, activation="tanh")
    with pytest.raises(TypeError, match="give what pack_sparse returns"):
        ops.sparse_linear(x, packed.tensors)


class Layer(nn.Module):
    """What a layer that runs packed looks like."""

    def __init__(self, packed: ops.SparseWeight, activation: str | None = None) -> None:
        super().__init__()
        for name, tensor in zip(("values", "index", "offsets", "scale"), packed.tensors, strict=True):
            self.register_buffer(name, tensor)
        self.layout, self.shape, self.activation = packed.layout, packed.shape, activation
        self.bias = nn.Parameter(torch.randn(packed.shape[0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = ops.SparseWeight(self.values, self.index, self.offsets, self.scale, self.layout, self.shape)
        return ops.sparse_linear(x, packed, self.bias, activation=self.activation)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_sparse_linear_compiles_and_exports_with_any_number_of_rows(layout, dtype):
    layer = Layer(ops.pack_sparse(sparse((24, 50), 0.7), layout, dtype=dtype), "gelu")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(layer, (torch.randn(5, 50),), dynamic_shapes=({0: batch},)).module()
    for rows in (2, 9, 70):
        x = torch.randn(rows, 50)
        wanted = layer(x)
        assert torch.equal(compiled(x), wanted)
        assert torch.equal(exported(x), wanted)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), wanted)


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_sparse_linear_passes_opcheck(layout):
    for dtype, rows in ((torch.float32, 3), (torch.int8, 20)):
        packed = ops.pack_sparse(sparse((9, 40), 0.5), layout, dtype=dtype)
        arguments = (torch.randn(rows, 40), *packed.tensors, torch.randn(9), ops.SPARSE_LAYOUTS.index(layout), 9, 2)
        torch.library.opcheck(torch.ops.pyprune.sparse_linear, arguments)
