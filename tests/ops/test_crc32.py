import zlib

import numpy as np
import pytest
import torch

from pyprune.ops.crc32 import crc32

# On a GPU's machine, too, it reads the memory of the CPU.
LENGTHS = [*range(18), 63, 64, 65, 127, 128, 255, 256, 257, 319, 511, 512, 1000, 65_537, 262_144, 262_145, 1_000_003]


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("first", [0, 1, 7])
def test_crc32_is_that_of_zlib(device, count, first):
    data = np.random.default_rng(count).integers(0, 256, count + first, dtype=np.uint8)[first:]
    for start in (0, 0xDEADBEEF, 0xFFFFFFFF):
        assert crc32(torch.from_numpy(data), start) == zlib.crc32(data, start)


def test_crc32_of_zeros_and_of_parts(device):
    data = np.zeros(600_000, np.uint8)
    assert crc32(torch.from_numpy(data)) == zlib.crc32(data)
    data[[3, -1]] = 1
    whole = torch.from_numpy(data)
    assert crc32(whole[1000:], crc32(whole[:1000])) == zlib.crc32(data)


def test_crc32_reads_the_bytes_of_any_dtype():
    values = torch.randn(5, 77, dtype=torch.float64)
    assert crc32(values) == zlib.crc32(values.numpy().tobytes())
    assert crc32(values[:0], 7) == 7


def test_crc32_has_the_schema_that_it_says():
    data = torch.arange(100, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pyprune.crc32, (data, 5), test_utils="test_schema")
