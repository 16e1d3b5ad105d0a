"""What is gathered while a model trains; its use in a Pruner is tested in test_pruner."""

import os

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyprune
from pyprune import Method, MovementPruner, Pruner, granularity, importance, schedules
from pyprune.calibration.training_statistics import TrainingGradients, average, needs_gradients, needs_training
from pyprune.modules.masks import NewMask, attach_masks
from pyprune.modules.targets import find_targets
from tests.conftest import attached
from tests.training.test_pruner import LOCAL, masks, small

RULES = [
    importance.magnitude(),
    importance.random(),
    importance.custom(torch.abs),
    importance.geometric_median(),
    importance.batch_norm_scale(),
    importance.wanda(),
    importance.apoz(),
    importance.mean_activation(),
    importance.gradient(),
    importance.snip(),
    importance.snip_momentum(),
    importance.taylor(),
    importance.fisher(),
]


def test_what_importances_need():
    assert [needs_training(rule) for rule in RULES] == [False] * 5 + [True] * 8
    assert [needs_gradients(rule) for rule in RULES] == [False] * 8 + [True] * 5


def masked(model):
    """Put masks on all weights that drop every other element."""
    targets = find_targets(model)
    for target in targets:
        mask = torch.ones_like(target.parameter, dtype=torch.bool)
        mask.view(-1)[::2] = False
        attach_masks(model, [NewMask(target.owners, mask)])
    return targets


def test_large_weights_are_seen_through_the_kernel_too():
    """From 4096 elements on, masks go through a kernel of their own."""
    model = nn.Linear(128, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    gradients = TrainingGradients(
        masked(model), optimizer, lambda batch: seen.append(next(iter(batch.values())).clone())
    )
    gradients.start()
    x, y = torch.randn(16, 128), torch.randn(16, 64)
    (model(x) * y).sum().backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(seen[0], y.T @ x)
    assert torch.equal(grad, seen[0] * attached(model).mask)
    gradients.stop()
    optimizer.step()
    assert len(seen) == 1


def test_gradients_that_are_differentiated_again_keep_no_graph():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    gradients = TrainingGradients(masked(model), optimizer, lambda batch: seen.extend(batch.values()))
    gradients.start()
    parameter = model.weight
    loss = model(torch.randn(5, 4)).square().sum()
    (slope,) = torch.autograd.grad(loss, parameter, create_graph=True)
    (loss + slope.square().sum()).backward()
    optimizer.step()
    assert not seen[0].requires_grad
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weights_that_are_used_twice_have_one_gradient(checkpointed):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.layer(x)
            if checkpointed:
                return torch.utils.checkpoint.checkpoint(self.layer, hidden, use_reentrant=False)
            return self.layer(hidden)

    torch.manual_seed(0)
    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    gradients = TrainingGradients(masked(model), optimizer, lambda batch: seen.extend(batch.values()))
    gradients.start()
    x = torch.randn(3, 4)
    used = model.layer.weight.detach().requires_grad_()
    bias = model.layer.bias.detach()
    nn.functional.linear(nn.functional.linear(x, used, bias), used, bias).square().sum().backward()
    model(x).square().sum().backward()
    optimizer.step()
    (gradient,) = seen
    torch.testing.assert_close(gradient, used.grad)


# ---- under the compiler ----

COMPILED = {
    "magnitude": lambda m, o, s: Pruner(m, LOCAL, s, o),
    "global": lambda m, o, s: Pruner(m, "UNSTRUCTURED_MAGNITUDE_GLOBAL", s, o, reintroduce=False),
    "taylor": lambda m, o, s: Pruner(m, Method(importance.taylor()), s, o),
    "blocks by momentum": lambda m, o, s: Pruner(
        m, Method(importance.snip_momentum(), granularity.block(2, 2)), s, o
    ),
    "ac/dc": lambda m, o, s: pyprune.ac_dc(m, 0.5, o, end=8, frequency=2),
    "rigl": lambda m, o, s: pyprune.RigLPruner(m, 0.5, o, end=8, frequency=2),
    "movement": lambda m, o, s: MovementPruner(m, s, o),
}


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_compiled_again_while_masks_change(name):
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = COMPILED[name](model, optimizer, schedules.cubic(0.6, start=1, end=8, frequency=2))
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, fullgraph=True, backend=counter) if compiles else model
        updates = 0
        for turn in range(10):
            torch.manual_seed(turn)
            optimizer.zero_grad()
            step(torch.randn(6, 2, 4, 4)).square().mean().backward()
            optimizer.step()
            updates += pruner.step()
        assert updates >= 3
        assert counter.frame_count == int(compiles)
        results.append(masks(model))
    for key, mask in results[0].items():
        assert torch.equal(mask, results[1][key]), key


# ---- on two ranks ----

PARALLEL = {
    "magnitude": COMPILED["magnitude"],
    "taylor": COMPILED["taylor"],
    "apoz": lambda m, o, s: Pruner(m, Method(importance.apoz(), granularity.channel("out")), s, o),
    "ac/dc": COMPILED["ac/dc"],
    "rigl": COMPILED["rigl"],
    "movement": COMPILED["movement"],
}


def _train(rank, world, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    for name, make in PARALLEL.items():
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = make(model, optimizer, schedules.cubic(0.6, start=1, end=6, frequency=2))
        # Buffers that are broadcast would hide that ranks have different masks.
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        for step in range(8):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            parallel(torch.randn(4 + 3 * rank, 2, 4, 4)).square().mean().backward()
            optimizer.step()
            pruner.step()
        found[name] = (masks(model), {key: p.detach() for key, p in model.named_parameters()}, pruner.ratio)
    mean = torch.tensor([1.0 + rank])
    average([mean])
    assert mean == 1.5
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.barrier()
    # Past gloo's own end, in which torch 2.13 aborts now and then.
    os._exit(0)


def test_ranks_choose_the_same_masks(tmp_path):
    torch.multiprocessing.spawn(_train, args=(2, tmp_path / "store", tmp_path), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in PARALLEL:
        assert one[name][2] == other[name][2] == pytest.approx(0.6 if "c/" not in name and name != "rigl" else 0.5)
        for mine, theirs in zip(one[name][:2], other[name][:2], strict=True):
            for key, tensor in mine.items():
                assert torch.equal(tensor, theirs[key]), (name, key)
        assert sum(int((~mask).sum()) for mask in one[name][0].values()) > 0
