"""Gates, masks and their losses on models that FSDP2 has sharded, beside the same in one piece."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, importance, schedules

LOCAL, BERNOULLI, HARD_CONCRETE = (
    f"UNSTRUCTURED_{name}" for name in ("MAGNITUDE_LOCAL", "REGULARIZATION_BASED", "HARD_CONCRETE")
)
LOSSES = {
    "RBLoss": (BERNOULLI, lambda model: pyprune.RBLoss(model, 0.5)),
    "L0Loss": (HARD_CONCRETE, lambda model: pyprune.L0Loss(model, 2.0)),
    "LagrangianLoss": (HARD_CONCRETE, lambda model: pyprune.LagrangianLoss(model, 0.5)),
}
WAYS = [(loss, first, whole) for loss in LOSSES for first in ("loss", "model") for whole in (False, True)]


def network(mode):
    torch.manual_seed(0)
    # Seven rows, which two ranks share unequally.
    model = nn.Sequential(nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 5))
    options = {"ratio": 0.5} if mode == LOCAL else {"same_on_all_ranks": True}
    pyprune.prune(model, mode, **options)
    for logits in () if mode == LOCAL else pyprune.gate_parameters(model):
        nn.init.normal_(logits)
    return model


def sharded(model, mesh, *, in_one=False):
    from torch.distributed.fsdp import fully_shard

    for module in (model,) if in_one else (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def trained(model, make, first):
    """Train with a loss of gates, which is called before or after the model, and return all that can be seen."""
    loss = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(4, 16)
        parts = [loss(), model(x).square().mean()] if first == "loss" else [model(x).square().mean(), loss()]
        sum(parts).backward()
        optimizer.step()
        values += [float(part) for part in parts]
        if isinstance(loss, pyprune.LagrangianLoss):
            loss.step()
    found = pyprune.pruning_statistic(model)
    values += [loss.current_ratio, found.pruning_ratio, found.global_pruning_ratio]
    parameters = (one.full_tensor() if hasattr(one, "full_tensor") else one for one in model.parameters())
    return values, [one.detach() for one in parameters]


REFUSED = {
    "strip": lambda model: pyprune.strip(model),
    "prune": lambda model: pyprune.prune(model, LOCAL, ratio=0.7),
    "scheduler": lambda model: pyprune.MultiStepMagnitudePruningScheduler(model, mode=LOCAL, steps={0: 0.3}).step(),
    "from_remaining": lambda model: pyprune.prune(
        model, Method(importance.magnitude()), ratio=0.7, from_remaining=True
    ),
}


def said(call, model):
    try:
        call(model)
    except ValueError as error:
        return str(error)
    return "nothing"


def said_by_pruner(mesh):
    model = network(LOCAL)
    pruner = pyprune.Pruner(model, LOCAL, schedules.linear(0.9, end=3))
    sharded(model, mesh)
    return said(lambda model: pruner.step(), model)


def run(rank, world, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    outcome = {"warned": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for way in WAYS:
            loss, first, in_one = way
            mode, make = LOSSES[loss]
            model = network(mode)
            twin = sharded(copy.deepcopy(model), mesh, in_one=in_one)
            outcome[way] = [trained(one, make, first) for one in (model, twin)]
    outcome["warned"] = [str(one.message) for one in caught if "gates" in str(one.message)]
    masked = sharded(network(LOCAL), mesh)
    outcome["masked"] = pyprune.pruning_statistic(masked).pruning_ratio
    outcome["said"] = {name: said(call, masked) for name, call in REFUSED.items()}
    outcome["said"]["Pruner.step"] = said_by_pruner(mesh)
    torch.save(outcome, f"{results}/{rank}.pt")
    torch.distributed.barrier()
    # Past gloo's own end, in which torch 2.13 aborts now and then.
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(2, folder / "store", folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_losses_of_gates_train_shards_as_the_whole(outcomes, way):
    for outcome in outcomes:
        (values, parameters), (other_values, others) = outcome[way]
        assert other_values == pytest.approx(values, rel=1e-4, abs=1e-6)
        for one, other in zip(parameters, others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_losses_of_gates_warn_of_nothing_in_shards(outcomes):
    assert [outcome["warned"] for outcome in outcomes] == [[], []]


def test_masks_are_counted_in_shards_and_say_what_cannot_be_done_there(outcomes):
    for outcome in outcomes:
        assert outcome["masked"] == pytest.approx(0.5, abs=0.01)
        for name, text in outcome["said"].items():
            assert "shard" in text, (name, text)
