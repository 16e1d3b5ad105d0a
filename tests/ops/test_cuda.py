"""What only a GPU can show."""

import pytest
import torch

from pyprune import ops
from tests.devices import DEVICES
from tests.ops.cases import adversarial

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


def make_weights(seed: int) -> list[torch.Tensor]:
    shapes = [(300, 400), (70_001,), (3,)]
    return [adversarial(shape, "normal", torch.float32, seed + i).cuda() for i, shape in enumerate(shapes)]


def test_operators_never_wait_for_the_device():
    weights = make_weights(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks, _ = ops.threshold(weights, 100_000, scales=ops.norms(weights).reciprocal())
        ops.count_zeros(masks)
        ops.fold(weights, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threshold_in_a_cuda_graph_follows_the_weights():
    weights = make_weights(0)
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]

    def work() -> torch.Tensor:
        return ops.threshold(weights, 100_000, scales=ops.norms(weights).reciprocal(), masks=masks)[1]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for weight, new in zip(weights, make_weights(9), strict=True):
        weight.copy_(new)
    graph.replay()
    on_cpu = [weight.cpu() for weight in weights]
    expected, _ = ops.threshold(on_cpu, 100_000, scales=ops.norms(on_cpu).reciprocal())
    assert all(torch.equal(mask.cpu(), want) for mask, want in zip(masks, expected, strict=True))
