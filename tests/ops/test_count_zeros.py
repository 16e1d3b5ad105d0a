import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import DTYPES, adversarial, layouts


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_count_zeros_matches_reference(device, dtype):
    shapes = [(200_001,), (), (0,), (63,), (64,), (65,), (31, 997)]
    if dtype == torch.bool:
        tensors = [torch.rand(shape) < 0.3 for shape in shapes]
    else:
        tensors = [adversarial(shape, "mostly zeros", dtype, seed) for seed, shape in enumerate(shapes)]
    result = ops.count_zeros([tensor.to(device) for tensor in tensors])
    assert torch.equal(result.cpu(), reference.count_zeros(tensors))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_count_zeros_of_all_zeros_does_not_overflow_its_lanes(device, dtype):
    assert ops.count_zeros([torch.zeros(1_000_000, dtype=dtype, device=device)]).tolist() == [1_000_000]


def test_count_zeros_knows_negative_zero_denormals_and_nan(device):
    tensor = torch.tensor([0.0, -0.0, 1e-45, float("nan"), float("inf")], device=device)
    assert ops.count_zeros([tensor]).tolist() == [2]


def test_count_zeros_of_any_layout(device):
    tensor = torch.randint(0, 3, (300, 26, 3, 7), device=device).float()
    expected = (tensor == 0).sum().item()
    for name, view in layouts(tensor).items():
        assert ops.count_zeros([view, view > 5]).tolist() == [expected, tensor.numel()], name
    assert ops.count_zeros([tensor[:1].expand(5, -1, -1, -1)]).item() == 5 * (tensor[0] == 0).sum().item()


def test_count_zeros_passes_opcheck(device):
    torch.library.opcheck(
        torch.ops.pyprune.count_zeros, ([torch.zeros(30, 4, device=device), torch.ones(7, device=device) > 0],)
    )


def test_count_zeros_refuses_bad_input():
    assert ops.count_zeros([]).shape == (0,)
    with pytest.raises(TypeError, match="int64"):
        ops.count_zeros([torch.zeros(2, dtype=torch.int64)])
