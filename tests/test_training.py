"""Zeros survive training: with masks in the forward pass, and in a folded model that keep_sparse holds."""

import os
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyprune
from pyprune import keep_sparse
from tests.conftest import masks_of, skip_what_dense_cannot

GLOBAL = "UNSTRUCTURED_MAGNITUDE_GLOBAL"
WAYS = ["masks", "keep_sparse"]
STEPS = 1000


@pytest.fixture(autouse=True)
def _one_thread():
    """Fused optimizers wait for all threads at each of many steps, which takes long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def make_sparse(model, optimizer, way, ratio=0.6):
    """Return the keeper, or None, and the masks that have to hold; the optimizer may have trained the dense model."""
    pyprune.prune(model, GLOBAL, ratio=ratio)
    masks = {target.name: mask.clone() for target, mask in masks_of(model).items()}
    return (keep_sparse(model, optimizer) if way == "keep_sparse" else None), masks


def loss_of(model, inputs=None):
    inputs = torch.randn(8, 6) if inputs is None else inputs
    return (model(inputs) - inputs[:, :4].sin()).square().mean()


def step(model, optimizer, inputs=None, take_step=None):
    optimizer.zero_grad()
    loss_of(model, inputs).backward()
    (take_step or optimizer.step)()


def weights_of(model):
    """The weights as the forward pass sees them."""
    return {f"{name}.weight": layer.weight.detach().clone() for name, layer in model.named_children() if name != "1"}


def check(model, masks, before):
    for name, weight in weights_of(model).items():
        assert torch.equal(weight != 0, masks[name]), name
        moved = (weight != before[name])[masks[name]]
        assert moved.float().mean() > 0.9
        assert weight.isfinite().all()


OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD dampening": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.5, fused=True),
    "Adam foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.01),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW fused": partial(optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "Adafactor": partial(optim.Adafactor, lr=0.01, weight_decay=0.1),
    "Adadelta": partial(optim.Adadelta, lr=1.0, weight_decay=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.05),
    "NAdam": partial(optim.NAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.001, centered=True, momentum=0.9),
    "Rprop": partial(optim.Rprop, lr=0.001),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_for_a_thousand_steps(name, way):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    _, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    for _ in range(STEPS):
        step(model, optimizer)
    check(model, masks, before)


def test_zeros_are_lost_without_either_way():
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    step(model, optimizer)
    _, masks = make_sparse(model, optimizer, "masks")
    pyprune.strip(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(model[0].weight != 0, masks["0.weight"])


@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_with_an_optimizer_that_looks_at_whole_matrices(way):
    model = net()
    # A part of the weights for each: what keep_sparse must find out for itself.
    optimizers = [optim.Muon([model[0].weight, model[2].weight], lr=0.01), optim.SGD([model[0].bias], lr=0.01)]
    _, masks = make_sparse(model, optimizers, way)
    before = weights_of(model)
    for _ in range(20):
        step(model, optimizers[0])
        optimizers[1].step()
    check(model, masks, before)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "backend"),
    [("SGD", "aot_eager"), ("Adafactor", "aot_eager"), ("AdamW", "inductor")],
)
def test_zeros_stay_when_model_and_optimizer_are_compiled(name, backend, way):
    torch._dynamo.reset()
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    compiled = torch.compile(model, backend=backend)
    _, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    compiled_step = torch.compile(optimizer.step, backend=backend)
    for _ in range(STEPS):
        step(compiled, optimizer, take_step=compiled_step)
    check(model, masks, before)


@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_under_autocast(way):
    model = net()
    skip_what_dense_cannot(model, torch.randn(8, 6), under=torch.autocast("cpu", dtype=torch.bfloat16))
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    _, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    for _ in range(100):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check(model, masks, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay_in_other_dtypes(dtype, way):
    model = net().to(dtype)
    skip_what_dense_cannot(model, torch.randn(8, 6, dtype=dtype))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    _, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    for _ in range(100):
        step(model, optimizer, inputs=torch.randn(8, 6, dtype=dtype))
    check(model, masks, before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fused", [False, True])
def test_zeros_stay_with_a_gradient_scaler_and_clipping(way, fused):
    model = net()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    keep, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(100):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if keep is not None:
            keep.mask_gradients()
        scaler.unscale_(optimizer)
        assert all(
            not gradient[~masks[name]].any()
            for name, gradient in zip(masks, (p.grad for p in model.parameters() if p.dim() == 2), strict=True)
        )
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    check(model, masks, before)


def test_an_overflow_in_what_is_dropped_skips_no_step():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    keep, masks = make_sparse(model, optimizer, "keep_sparse")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for masked in (False, True):
        scaler.scale(loss_of(model)).backward()
        model[0].weight.grad[~masks["0.weight"]] = torch.inf
        if masked:
            keep.mask_gradients()
        before = weights_of(model)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before["0.weight"], model[0].weight) is not masked
        optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_move_what_is_kept_as_one_large_batch_does(way):
    results = []
    for parts in (1, 4):
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        _, masks = make_sparse(model, optimizer, way)
        before = weights_of(model)
        torch.manual_seed(1)
        for _ in range(20):
            optimizer.zero_grad()
            for inputs in torch.randn(8, 6).chunk(parts):
                (loss_of(model, inputs) / parts).backward()
            optimizer.step()
        check(model, masks, before)
        results.append(weights_of(model))
    torch.testing.assert_close(*results)


def test_both_ways_train_the_kept_weights_alike():
    results = []
    for way in WAYS:
        model = net()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        make_sparse(model, optimizer, way)
        torch.manual_seed(1)
        for _ in range(50):
            step(model, optimizer)
        results.append(weights_of(model))
    torch.testing.assert_close(*results)


# With buffers averaged too, torch computes with masks as with numbers: use update_bn, or a folded model.
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("masks", {}),
        ("masks", {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
        ("keep_sparse", {}),
        ("keep_sparse", {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True}),
    ],
)
def test_averages_of_the_weights_are_as_sparse(way, options):
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    _, masks = make_sparse(model, optimizer, way)
    average = AveragedModel(model, **options)
    before = weights_of(model)
    for _ in range(100):
        step(model, optimizer)
        average.update_parameters(model)
    check(average.module, masks, before)
    if way == "masks":
        check(pyprune.strip(average).module, masks, before)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_is_resumed_ends_as_one_that_ran_through(way, tmp_path):
    def start():
        model = net()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        return model, optimizer

    def steps(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(20):
            step(model, optimizer)

    model, optimizer = start()
    _, masks = make_sparse(model, optimizer, way)
    before = weights_of(model)
    steps(model, optimizer, 1)
    config = pyprune.get_config(model)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    steps(model, optimizer, 2)
    resumed, its_optimizer = start()
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if way == "masks":
        pyprune.load_from_config(resumed, config)
    resumed.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    if way == "keep_sparse":
        assert list(weights) == list(net().state_dict())
        keep_sparse(resumed, its_optimizer)
    steps(resumed, its_optimizer, 2)
    check(resumed, masks, before)
    assert all(map(torch.equal, resumed.state_dict().values(), model.state_dict().values()))


# ---- several processes ----


def _parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def _sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _train(wrap, way, rank):
    """Return the weights as the forward pass sees them, after training on data of this rank."""
    model = net()
    pyprune.prune(model, GLOBAL, ratio=0.6)
    if way == "keep_sparse":
        pyprune.strip(model)
        with torch.no_grad():
            model[0].weight[4:] = 0  # all that the second rank has of it
    wrapped = wrap(model)
    optimizer = OPTIMIZERS["AdamW"](wrapped.parameters())
    keep = keep_sparse(wrapped, optimizer) if way == "keep_sparse" else None
    seen = []
    for layer in (model[0], model[2]):
        # Called when the shards have been gathered.
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.detach().clone()))
    torch.manual_seed(rank)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(wrapped).backward()
        if keep is not None:
            keep.mask_gradients()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    for before, after in zip(seen[:2], seen[-2:], strict=True):
        assert 0.1 < (before == 0).float().mean() < 0.9
        assert torch.equal(before == 0, after == 0)
        assert (before != after)[before != 0].all()
    if keep is None and wrap is _sharded:
        with pytest.raises(ValueError, match=r"0\.weight is sharded; prune before, and strip on, an unsharded model"):
            keep_sparse(wrapped, optimizer)
    return seen[-2:]


def _train_on_rank(rank, store, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {f"{wrap.__name__} {way}": _train(wrap, way, rank) for wrap in (_parallel, _sharded) for way in WAYS}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    # Past gloo's own end, in which torch 2.13 aborts now and then.
    os._exit(0)


def test_zeros_stay_and_are_the_same_on_all_ranks_of_ddp_and_fsdp2(tmp_path):
    torch.multiprocessing.spawn(_train_on_rank, args=(tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, weights in first.items():
        assert all(map(torch.equal, weights, second[name])), name
    for way in WAYS:
        torch.testing.assert_close(first[f"_parallel {way}"], first[f"_sharded {way}"])
