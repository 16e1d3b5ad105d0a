import copy
import math
import os

import pytest
import torch
from torch import nn

import pyprune
from pyprune import HardConcreteGate, StochasticGate, ops
from pyprune.modules.gates import gates_of
from tests.conftest import skip_what_dense_cannot
from tests.modules.test_forward_pass import BERNOULLI, HARD_CONCRETE, gated

KINDS = [StochasticGate, HardConcreteGate]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_shape", [None, (8, 1), (4, 1), (1, 6), (2, 3), (1, 1)])
def test_gate_keeps_weights_with_its_probability(kind, gate_shape, device):
    """Counts gates over many samples against 5 standard errors."""
    gate = kind((8, 6), gate_shape=gate_shape, keep_probability=0.8, device=device)
    weight = torch.ones(8, 6, device=device)
    count = 2000 // gate.logits.numel() + 200
    kept = sum((gate(weight) != 0).double().mean() for _ in range(count)) / count
    assert abs(kept - 0.8) < 5 * math.sqrt(0.8 * 0.2 / (count * gate.logits.numel()))
    torch.testing.assert_close(torch.sigmoid(gate.logits + gate.shift), torch.full_like(gate.logits, 0.8))
    assert gate.weights_per_gate == 48 // gate.logits.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_gate_shares_each_gate_among_the_weights_of_its_block(kind, device):
    gate = kind((8, 6), gate_shape=(2, 3), keep_probability=0.5, device=device)
    out = gate(torch.ones(8, 6, device=device))
    blocks = out.reshape(2, 4, 3, 2)
    assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
    assert len(out.unique()) > 1 or not out.any() or out.all()


@pytest.mark.parametrize("kind", KINDS)
def test_gate_in_evaluation_is_its_values(kind, device):
    gate = kind((64,), device=device).eval()
    nn.init.normal_(gate.logits, std=3)
    weight = torch.randn(64, device=device)
    torch.testing.assert_close(gate(weight), weight * gate.values())
    expected = (gate.logits > 0).float()
    if kind is HardConcreteGate:
        expected = (torch.sigmoid(gate.logits) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(gate.values(), expected.detach())
    assert not gate.values().requires_grad
    assert torch.equal(gate.deterministic(weight), gate(weight))


def test_hard_concrete_gate_passes_its_numbers_on():
    numbers = {"beta": 0.5, "gamma": -0.2, "zeta": 1.3}
    gate = HardConcreteGate((1000,), keep_probability=0.3, **numbers)
    weight = torch.ones(1000)
    torch.manual_seed(1)
    out = gate(weight)
    torch.manual_seed(1)
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    assert torch.equal(out, ops.hard_concrete_gate(weight, gate.logits, seed, **numbers))
    assert abs((out != 0).float().mean() - 0.3) < 0.1
    hard = HardConcreteGate((1000,), keep_probability=0.3, straight_through=True, **numbers)
    assert hard(weight).unique().tolist() == [0.0, 1.0]
    assert hard.shift == gate.shift == pytest.approx(-0.5 * math.log(0.2 / 1.3))


@pytest.mark.parametrize("kind", KINDS)
def test_gate_trains_weights_and_logits(kind, device):
    gate = kind((4, 3), keep_probability=0.6, device=device)
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    gate(weight).square().sum().backward()
    assert weight.grad.any()
    assert gate.logits.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep_probability": 0.0}, "keep_probability is 0.0"),
        ({"keep_probability": 1.0}, "keep_probability is 1.0"),
        ({"keep_probability": math.nan}, "keep_probability is nan"),
        ({"gate_shape": (8,)}, "do not fit"),
        ({"gate_shape": (3, 6)}, "do not fit"),
        ({"gate_shape": (16, 6)}, "do not fit"),
        ({"gate_shape": (0, 6)}, "do not fit"),
    ],
)
def test_gate_says_what_is_wrong(kind, arguments, text):
    with pytest.raises(ValueError, match=text):
        kind((8, 6), **arguments)
    with pytest.raises(ValueError, match=r"shape \(8, 6\), not \(6, 8\)"):
        kind((8, 6))(torch.ones(6, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep_probability": "x"}, "keep_probability is 'x'; give a number"),
        ({"keep_probability": True}, "keep_probability is True; give a number"),
        ({"dtype": torch.complex64}, r"dtype is torch\.complex64; allowed are torch\.float32"),
        ({"dtype": torch.float8_e4m3fn}, "allowed are"),
        ({"dtype": torch.int64}, "allowed are"),
    ],
)
def test_gate_wants_numbers_dtypes_and_tensors(kind, arguments, text):
    with pytest.raises(TypeError, match=text):
        kind((8, 6), **arguments)
    with pytest.raises(TypeError, match="weight is of type NoneType"):
        kind((8, 6))(None)
    with pytest.raises(TypeError, match="beta is 'x'"):
        HardConcreteGate((8, 6), beta="x")


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"beta": -1.0}, {"gamma": 0.0}, {"zeta": 1.0}, {"zeta": math.inf}]
)
def test_hard_concrete_gate_says_what_is_wrong(arguments):
    with pytest.raises(ValueError, match="must be"):
        HardConcreteGate((2,), **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_gate_put_on_by_hand_can_be_stripped(kind, device):
    model = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 4)).to(device)
    for module, name in ((model[0], "weight"), (model[1], "weight_hh_l0")):
        weight = getattr(module, name)
        gate = kind(weight.shape, gate_shape=(4, 1), keep_probability=0.7, device=device)
        assert pyprune.attach_gate(module, name, gate) is module
    nn.init.normal_(gate.logits, std=3)
    model.eval()
    expected = model[0].weight.detach().clone(), model[1].weight_hh_l0.detach().clone()
    assert len(pyprune.get_config(model)["gates"]) == 2
    pyprune.strip(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[1].weight_hh_l0, expected[1])


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
def test_gates_work_in_the_models(case, mode):
    gated(case.model, mode)
    case.model(case.inputs).square().sum().backward()
    for gate in gates_of(case.model):
        assert gate.logits.grad.any()
    twin = copy.deepcopy(case.model).double().eval()
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    expected = case.model.eval()(case.inputs)
    torch.testing.assert_close(twin(inputs).float(), expected, rtol=1e-3, atol=1e-4)
    for gate in gates_of(twin):
        assert gate.logits.dtype == torch.float64


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_work_in_half_precision(cnn, mode, dtype):
    skip_what_dense_cannot(copy.deepcopy(cnn.model).to(dtype), cnn.inputs.to(dtype))
    gated(cnn.model, mode).to(dtype)
    out = cnn.model(cnn.inputs.to(dtype))
    out.sum().backward()
    assert out.dtype == dtype
    for gate in gates_of(cnn.model):
        assert gate.logits.grad.dtype == dtype


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
def test_gates_work_under_autocast(case, mode):
    autocast = torch.autocast(case.inputs.device.type, dtype=torch.bfloat16)
    skip_what_dense_cannot(case.model, case.inputs, under=autocast)
    gated(case.model, mode)
    with autocast:
        case.model(case.inputs).float().square().sum().backward()
    for gate in gates_of(case.model):
        assert gate.logits.grad.dtype == torch.float32
        assert gate.logits.grad.any()


def test_gates_of_finds_each_gate_once(transformer):
    model = gated(transformer.model)
    gates = gates_of(model)
    assert len(gates) == len(set(gates))
    assert model.embed.weight_mask is model.decoder.weight_mask
    assert gates_of(nn.Linear(2, 2)) == []
    assert len({gate.stream for gate in gates}) == len(gates)


def test_gate_says_what_it_is_for():
    assert repr(StochasticGate((4, 3), gate_shape=(4, 1))) == "StochasticGate(shape=(4, 3), gate_shape=(4, 1))"


def _train(rank, world, store, same, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = gated(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), BERNOULLI, same_on_all_ranks=same)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    torch.manual_seed(3)
    with pyprune.one_gate_sample(model):
        sample = model[0].weight != 0
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    parameters = torch.cat([parameter.detach().ravel() for parameter in model.parameters()])
    torch.save((sample, parameters), f"{results}/{rank}.pt")
    torch.distributed.barrier()
    # Past gloo's own end, in which torch 2.13 aborts now and then, with or without gates.
    os._exit(0)


@pytest.mark.parametrize("same", [False, True])
def test_gates_draw_different_noise_on_each_rank_unless_asked(same, tmp_path):
    torch.multiprocessing.spawn(_train, args=(2, tmp_path / "store", same, tmp_path), nprocs=2)
    (sample, parameters), (other_sample, other_parameters) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert torch.equal(sample, other_sample) == same
    assert torch.equal(parameters, other_parameters)
    assert 0.3 < sample.float().mean() < 0.7


def _train_shards(rank, world, store, results):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = gated(copy.deepcopy(dense), BERNOULLI, same_on_all_ranks=True)
    sharded = gated(dense, BERNOULLI, same_on_all_ranks=True)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mesh=mesh)
    for model in (plain, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
    with pytest.raises(RuntimeError, match="weight carries a gate and is sharded"):
        sharded[0].reshard() or sharded[0].weight
    whole = [parameter.full_tensor().detach() for parameter in sharded.parameters()]
    torch.save((whole, [parameter.detach() for parameter in plain.parameters()]), f"{results}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


def test_gates_train_in_shards_as_in_one_piece(tmp_path):
    torch.multiprocessing.spawn(_train_shards, args=(2, tmp_path / "store", tmp_path), nprocs=2)
    for rank in range(2):
        for one, other in zip(*torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
