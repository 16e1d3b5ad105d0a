"""What only a GPU can show."""

from functools import partial

import pytest
import torch

from pyprune import ops
from tests.devices import DEVICES
from tests.ops.cases import DTYPES, KINDS, adversarial
from tests.ops.test_unit_scores import UNITS, WAYS

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


def on_cuda(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy, in the same layouts."""
    empty = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda") for one in tensors]
    return [copy.copy_(one) for copy, one in zip(empty, tensors, strict=True)]


def assert_same_bits(on_device: list[torch.Tensor], on_cpu: list[torch.Tensor]) -> None:
    for got, want in zip(on_device, on_cpu, strict=True):
        assert torch.equal(*(one.cpu().contiguous().flatten().view(torch.uint8) for one in (got, want)))


def make_weights(seed: int) -> list[torch.Tensor]:
    shapes = [(300, 400), (70_001,), (3,)]
    return [adversarial(shape, "normal", torch.float32, seed + i).cuda() for i, shape in enumerate(shapes)]


# Gate, and the shapes of a weight and its logits: one per weight, channels, columns, blocks of 4 x 4, one for all.
GATES = [ops.bernoulli_gate, ops.hard_concrete_gate, partial(ops.hard_concrete_gate, straight_through=True)]
SHAPES = [
    ((300, 400), (300, 400)),
    ((64, 30, 3, 3), (64, 1, 1, 1)),
    ((5000, 12), (1, 12)),
    ((64, 96), (16, 24)),
    ((200, 333), (1, 1)),
]


def make_gates(shapes, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight, grad, logits = (torch.randn(shape, generator=generator) for shape in (shapes[0], *shapes))
    return weight.to(device), grad.to(device), (2 * logits).to(device)


def gate_and_gradients(gate, weight, grad, logits, seed) -> tuple[torch.Tensor, ...]:
    weight, logits = weight.detach().requires_grad_(), logits.detach().requires_grad_()
    out = gate(weight, logits, seed)
    return out.detach(), *torch.autograd.grad(out, (weight, logits), grad)


def test_operators_never_wait_for_the_device():
    weights = make_weights(0)
    gates = [make_gates(shapes) for shapes in SHAPES]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks, _ = ops.threshold(weights, 100_000, scales=ops.norms(weights).reciprocal())
        ops.threshold(weights, 150_000, bases=masks)
        ops.count_zeros(masks)
        ops.fold(weights, masks)
        for size in (4, 8, 50, 400):
            ops.group_masks(weights[:1], size, 2, factors=[torch.ones(400, device="cuda")], bases=masks[:1])
        blocks = [(4, 400), (1000,), (1,)]
        scores = ops.unit_scores(weights, blocks, p=2, reduction="mean")
        units = [score > 1 for score in scores]
        ops.expand(units, blocks, masks)
        ops.fold(weights, units, blocks)
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cuda")
        for gate in GATES:
            for tensors in gates:
                gate_and_gradients(gate, *tensors, seed)
        ops.gate_noise((300, 400), seed)
        leaves = [weight.requires_grad_() for weight in weights]
        torch.autograd.grad(ops.gate_penalty(leaves, hard=True).sum() + ops.gate_penalty(leaves).sum(), leaves)
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


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=["bernoulli", "hard concrete", "straight through"])
def test_gates_in_a_cuda_graph_follow_the_seed(gate, shapes):
    weight, grad, logits = make_gates(shapes)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gate_and_gradients(gate, weight, grad, logits, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate_and_gradients(gate, weight, grad, logits, seed)
    outs = []
    for number in (1, -(2**40), 1):
        seed.fill_(number)
        graph.replay()
        fresh = gate_and_gradients(gate, weight, grad, logits, torch.tensor(number, device="cuda"))
        assert all(torch.equal(replayed, want) for replayed, want in zip(captured, fresh, strict=True))
        outs.append(captured[0].clone())
    assert torch.equal(outs[0], outs[2])
    assert shapes[1] == (1, 1) or not torch.equal(outs[0], outs[1])


def test_gate_penalty_in_a_cuda_graph_follows_the_logits():
    logits = [weight.requires_grad_() for weight in make_weights(0)]

    def work() -> list[torch.Tensor]:
        penalty = ops.gate_penalty(logits, shift=0.5)
        return [penalty.detach(), *torch.autograd.grad(penalty.sum(), logits)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for one, new in zip(logits, make_weights(9), strict=True):
            one.copy_(new)
    graph.replay()
    assert all(torch.equal(replayed, want) for replayed, want in zip(captured, work(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_are_the_same_bits_as_on_the_cpu(dtype):
    shapes = [(300, 200), (70_001,), (64, 30, 3, 3), (3,), (4096,), (0, 5), (1,)]
    weights = [adversarial(shape, "normal", dtype, seed) for seed, shape in enumerate(shapes)]
    weights += [adversarial((5000,), "few values", dtype), adversarial((90, 70), "normal", dtype).t()]
    theirs = on_cuda(weights)
    norms = ops.norms(weights)
    assert_same_bits([ops.norms(theirs)], [norms])
    total = sum(weight.numel() for weight in weights)
    for removed in (total * 7 // 10, [weight.numel() // 2 for weight in weights], 0, total):
        for scales in (None, norms.reciprocal()):
            masks, nonfinite = ops.threshold(weights, removed, scales=scales)
            found, counts = ops.threshold(theirs, removed, scales=None if scales is None else scales.cuda())
            assert_same_bits([*found, counts], [*masks, nonfinite])
            assert_same_bits([ops.count_zeros(found)], [ops.count_zeros(masks)])
    masks = [weight > 0.3 for weight in weights]
    ops.fold(theirs, on_cuda(masks))
    ops.fold(weights, masks)
    assert_same_bits([*theirs, ops.count_zeros(theirs)], [*weights, ops.count_zeros(weights)])


@pytest.mark.parametrize("kind", KINDS)
def test_group_masks_of_lists_are_the_same_bits_as_on_the_cpu(kind):
    weights = [adversarial((300, 1030), kind, dtype, seed) for seed, dtype in enumerate(DTYPES)]
    weights += [adversarial((40, 50, 3, 3), kind, torch.float32).movedim(1, -1)]
    row_dims = [1] * len(DTYPES) + [3]
    bases = [None, *(weight.abs() > 0.3 for weight in weights[1:])]
    factors = [None, torch.rand(1030, dtype=torch.float64), *(torch.rand(1030) for _ in DTYPES[2:]), torch.rand(50)]
    on_device = [[None if one is None else one.cuda() for one in some] for some in (factors, bases)]
    for size, kept in ((4, 2), (8, 5), (12, 3), (64, 32), (1030, 515)):
        masks, nonfinite = ops.group_masks(weights, size, kept, row_dims=row_dims, factors=factors, bases=bases)
        found, counts = ops.group_masks(
            on_cuda(weights), size, kept, row_dims=row_dims, factors=on_device[0], bases=on_device[1]
        )
        assert_same_bits([*found, counts], [*masks, nonfinite])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_the_same_bits_as_on_the_cpu(dtype):
    weights = [adversarial(shape, "normal", dtype, seed) for seed, (shape, _) in enumerate(UNITS)]
    weights += [weight.transpose(0, 1).contiguous().transpose(0, 1) for weight in weights if weight.dim() > 1]
    blocks = [block for _, block in UNITS] + [block for _, block in UNITS if len(block) > 1]
    theirs = on_cuda(weights)
    for way in WAYS:
        scores = ops.unit_scores(weights, blocks, **way)
        assert_same_bits(ops.unit_scores(theirs, blocks, **way), scores)
    units = [score > score.mean() for score in scores]
    masks = [weight > 0 for weight in weights]
    found = on_cuda(masks)
    ops.expand(units, blocks, masks)
    ops.expand(on_cuda(units), blocks, found)
    ops.fold(weights, units, blocks)
    ops.fold(theirs, on_cuda(units), blocks)
    assert_same_bits([*found, *theirs], [*masks, *weights])


# Crowds at the threshold, at one end of the bracket and at both; scores in order, so that candidates lie together.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_of_adversarial_lists_is_the_same_bits_as_on_the_cpu(kind, dtype):
    weights = [adversarial((size,), kind, dtype, seed) for seed, size in enumerate((150_000, 3, 40_001))]
    theirs = on_cuda(weights)
    total = sum(weight.numel() for weight in weights)
    smallest = torch.cat([weight.abs() for weight in weights]).min()
    crowd = sum(int((weight.abs() == smallest).sum()) for weight in weights)
    for removed in {crowd - 1, crowd, min(crowd + 1, total), total * 7 // 10, total - 1}:
        masks, nonfinite = ops.threshold(weights, removed)
        found, counts = ops.threshold(theirs, removed)
        assert_same_bits([*found, counts], [*masks, nonfinite])


# Less than the bases lack, just that, a little and much more; a base of another layout than its mask.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "mostly zeros", "few values", "equal"])
def test_threshold_with_bases_is_the_same_bits_as_on_the_cpu(kind, dtype):
    shapes = [(150_000,), (3,), (211, 190), (30, 20, 5, 5)]
    weights = [adversarial(shape, kind, dtype, seed) for seed, shape in enumerate(shapes)]
    generator = torch.Generator().manual_seed(0)
    bases = [torch.rand(shape, generator=generator) < 0.6 for shape in shapes]
    bases[1], bases[2] = None, bases[2].t().contiguous().t()
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    theirs = on_cuda(weights)
    their_bases = [None if base is None else on_cuda([base])[0] for base in bases]
    lacking = [0 if base is None else int((~base).sum()) for base in bases]
    each = [(lacks + weight.numel()) // 2 for lacks, weight in zip(lacking, weights, strict=True)]
    for removed in (sum(lacking) - 100, sum(lacking), sum(lacking) + 1, sum(each), each, lacking, [0, 0, 0, 0]):
        for normalize in (False, True):
            masks, nonfinite = ops.threshold(weights, removed, bases=bases, normalize=normalize)
            found, counts = ops.threshold(theirs, removed, bases=their_bases, normalize=normalize)
            assert_same_bits([*found, counts], [*masks, nonfinite])


def test_threshold_of_many_tensors_is_the_same_bits_as_on_the_cpu():
    weights = [adversarial((size % 97 + 1,), "normal", torch.bfloat16, size) for size in range(1500)]
    total = sum(weight.numel() for weight in weights)
    scales = torch.rand(len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for removed in (total // 2, [weight.numel() // 2 for weight in weights]):
        masks, _ = ops.threshold(weights, removed, scales=scales)
        found, _ = ops.threshold(on_cuda(weights), removed, scales=scales.cuda())
        assert_same_bits(found, masks)


@pytest.mark.parametrize("seed", [None, -(2**62) + 12345], ids=["deterministic", "sampled"])
@pytest.mark.parametrize("options", [None, {}, {"straight_through": True}, {"beta": 0.5, "gamma": -0.3}], ids=str)
def test_gates_are_the_same_bits_as_on_the_cpu(options, seed):
    def gate(weight, logits, seed):
        if options is None:
            return ops.bernoulli_gate(weight, logits, seed, stream=7)
        return ops.hard_concrete_gate(weight, logits, seed, stream=7, **options)

    tensors = make_gates(((1000, 1000), (1000, 1000)), "cpu")
    seed = None if seed is None else torch.tensor(seed)
    on_cpu = gate_and_gradients(gate, *tensors, seed)
    on_device = gate_and_gradients(gate, *on_cuda(tensors), None if seed is None else seed.cuda())
    assert_same_bits(on_device, on_cpu)


@pytest.mark.parametrize("shapes", SHAPES[1:], ids=str)
def test_gradients_of_shared_gates_are_the_same_bits_in_every_run_and_layout(shapes):
    weight, grad, logits = make_gates(shapes)
    seed = torch.tensor(5, device="cuda")
    first = gate_and_gradients(ops.hard_concrete_gate, weight, grad, logits, seed)
    for _ in range(3):
        again = gate_and_gradients(ops.hard_concrete_gate, weight, grad, logits, seed)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    turned, turned_grad = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in (weight, grad))
    again = gate_and_gradients(ops.hard_concrete_gate, turned, turned_grad, logits, seed)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_gates_beyond_32_bit_indices():
    count = 2**31 + 1003
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    seed = torch.tensor(6, device="cuda")
    weight = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    logits = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    out = ops.bernoulli_gate(weight, logits, seed)
    noise = ops.gate_noise((count,), seed)
    assert torch.equal(out[-5000:] != 0, noise[-5000:] > 0.5)
    shared = ops.bernoulli_gate(weight, noise[: count // 3] - 0.5, None)
    assert torch.equal(shared[-3000:] != 0, (noise[count // 3 - 1000 : count // 3] > 0.5).repeat_interleave(3))
