"""Where the operators are tested: every CPU capability, and the GPU where there is one."""

import os
from collections.abc import Iterator

import pytest
import torch

from pyprune import _C, ops

DEVICES = [f"cpu-{name}" for name in _C.available_cpu_capabilities()]
if torch.cuda.is_available() or os.environ.get("REQUIRE_CUDA") == "1":
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the device to test on, with the kernels of one capability chosen."""
    kind, _, capability = request.param.partition("-")
    if kind == "cuda":
        assert ops.CUDA_KERNELS_LOADED, "REQUIRE_CUDA=1, but the CUDA kernels are not loaded"
    else:
        _C.set_cpu_capability(capability)
    yield torch.device(kind)
    _C.set_cpu_capability("auto")
