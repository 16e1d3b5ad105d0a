import pytest
import torch

from pyprune import ops
from pyprune.ops import reference


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the authors' Random123 library
        ((0, 0), 0, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        ((-1, -1), -1, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
        (
            (0x85A308D3243F6A88 - 2**64, 0x0370734413198A2E),
            0x299F31D0A4093822,
            ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
        ),
    ],
)
def test_reference_philox_gives_the_published_words(counter, key, words):
    block, stream = counter
    result = reference.philox(key, stream, torch.tensor([block]))
    assert [f"{word:08x}" for word in result[0].tolist()] == words


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3, 5), (31,), (1023,), (1025,), (70_001,), (2, 3, 65_537)], ids=str
)
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (123, 7), (-1, 3 << 32 | 5), (2**62 + 1, -1)])
def test_gate_noise_matches_reference(device, shape, seed, stream):
    tensor = torch.tensor(seed)
    noise = ops.gate_noise(shape, tensor.to(device), stream=stream)
    assert noise.shape == shape
    assert noise.device.type == device.type
    assert torch.equal(noise.cpu(), reference.gate_noise(shape, tensor, stream))


def test_gate_noise_is_uniform(device):
    noise = ops.gate_noise((1_000_000,), torch.tensor(1, device=device)).double().cpu()
    assert 0 < noise.min() < 1e-5
    assert 1 - 1e-5 < noise.max() < 1
    assert (1 - noise.float()).min() > 0
    # Mean and variance of a uniform number, within 5 standard errors.
    assert abs(noise.mean() - 1 / 2) < 5 * (1 / 12) ** 0.5 / 1e3
    assert abs(noise.var() - 1 / 12) < 5 * (1 / 180) ** 0.5 / 1e3
    # Neighbours are not correlated.
    assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 5e-3


def test_gate_noise_differs_by_seed_and_stream(device):
    draws = [
        ops.gate_noise((64,), torch.tensor(seed, device=device), stream=stream)
        for seed, stream in [(0, 0), (1, 0), (1 << 32, 0), (0, 1), (0, 1 << 32)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_gate_noise_passes_opcheck(device):
    torch.library.opcheck(torch.ops.pyprune.gate_noise, (torch.tensor(5, device=device), [3, 4], 2))


@pytest.mark.parametrize("seed", [3, torch.tensor(3.0), torch.tensor([1, 2]), torch.tensor(3, dtype=torch.int32)])
def test_gate_noise_refuses_what_is_no_seed(seed):
    with pytest.raises(TypeError, match="int64"):
        ops.gate_noise((3,), seed)


def test_gate_noise_refuses_negative_sizes():
    with pytest.raises(ValueError, match="negative"):
        ops.gate_noise((-2, 3), torch.tensor(1))
