"""Where the operators are tested: every CPU capability, and the GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

from pyprune import _C, ops
from tests.devices import DEVICES

PLACES = [f"cpu-{name}" for name in _C.available_cpu_capabilities()] + [name for name in DEVICES if name != "cpu"]


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the device to test on, with the kernels of one capability chosen."""
    kind, _, capability = request.param.partition("-")
    if kind == "cuda":
        assert ops.CUDA_KERNELS_LOADED, "REQUIRE_CUDA=1, but the CUDA kernels are not loaded"
    else:
        _C.set_cpu_capability(capability)
    yield torch.device(kind)
    _C.set_cpu_capability("auto")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # In torch 2.14 opcheck itself, testing what autograd records, asks non-leaf tensors for their gradient. Anywhere
    # else the warning would tell of a mistake of ours.
    known = pytest.mark.filterwarnings(
        r"ignore:The \.grad attribute of a Tensor that is not a leaf Tensor:UserWarning"
    )
    for item in items:
        if "passes_opcheck" in item.name:
            item.add_marker(known)
