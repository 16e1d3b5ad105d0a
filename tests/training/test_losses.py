import copy
import gc
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import _global_optimizer_post_hooks as HOOKS

import pyprune
from pyprune.modules.gates import HardConcreteGate, StochasticGate
from pyprune.modules.optimizer import gate_parameters
from pyprune.training.losses import L0Loss, LagrangianLoss, RBLoss

KINDS = [StochasticGate, HardConcreteGate]
MAKERS = {
    "RBLoss": lambda model: RBLoss(model, 0.6),
    "L0Loss": lambda model: L0Loss(model, 0.5),
    "LagrangianLoss": lambda model: LagrangianLoss(model, 0.6, warmup_steps=10),
}


@pytest.fixture(params=list(MAKERS))
def make(request):
    return MAKERS[request.param]


def gates(*shapes, kind=StochasticGate, device="cpu", dtype=None, **arguments):
    """Gates with random logits; a loss finds them anywhere in a model."""
    model = nn.ModuleList([kind(shape, device=device, dtype=dtype, **arguments) for shape in shapes])
    for gate in model:
        nn.init.normal_(gate.logits, std=2)
    return model


def open_gates(count, n=1000):
    """n gates, of which the first ``count`` are open."""
    model = gates((n,))
    model[0].logits.data = torch.where(torch.arange(n) < count, 1.0, -1.0)
    return model


class StraightThrough(torch.autograd.Function):
    """1[m > 0] forward, sigma'(m) backward."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        return grad * torch.sigmoid(logits) * torch.sigmoid(-logits)


def reference_kept(model, *, hard=False):
    """The kept share in float64, in plain torch, and the float64 copies of the logits that it comes from."""
    logits = [gate.logits.detach().double().requires_grad_() for gate in model]
    counts = [
        StraightThrough.apply(one).sum() if hard else torch.sigmoid(one + gate.shift).sum()
        for one, gate in zip(logits, model, strict=True)
    ]
    sizes = [math.prod(gate.shape) for gate in model]
    kept = sum(count * gate.weights_per_gate for count, gate in zip(counts, model, strict=True)) / sum(sizes)
    return kept, logits


def check_gradients(model, reference_logits):
    for gate, reference in zip(model, reference_logits, strict=True):
        assert gate.logits.grad.dtype == gate.logits.dtype
        # The gradient is rounded once, to the dtype of the logits.
        torch.testing.assert_close(gate.logits.grad, reference.grad.to(gate.logits.dtype))


# One logit per weight, per output channel, per input channel, per head and per block.
MIXED_SHAPES = [((7, 5), (7, 5)), ((6, 4, 3, 3), (6, 1, 1, 1)), ((4, 6), (1, 6)), ((8, 3), (2, 1)), ((8, 8), (2, 4))]


def mixed_gates(kind=StochasticGate, **arguments):
    model = nn.ModuleList([kind(shape, gate_shape=gate_shape, **arguments) for shape, gate_shape in MIXED_SHAPES])
    for gate in model:
        nn.init.normal_(gate.logits, std=2)
    return model


# RBLoss


@pytest.mark.parametrize(
    ("kept", "target", "p", "value"),
    [(800, 0.1, 0.05, 4.0), (1000, 0.5, 0.05, 100.0), (700, 0.3, 0.05, 0.0), (0, 0.5, 0.1, 25.0), (1000, 0, 1, 0.0)],
)
def test_rb_loss_golden_values(kept, target, p, value):
    loss = RBLoss(open_gates(kept), target, p)
    assert loss().item() == pytest.approx(value, abs=1e-12)
    assert loss.current_ratio == pytest.approx(1 - kept / 1000)


@pytest.mark.parametrize(("kept", "target", "slope"), [(800, 0.1, -0.08), (1000, 0.5, 0.4)])
def test_rb_loss_golden_gradient(kept, target, slope):
    # slope = d loss / d kept = 2 * (kept / N - (1 - target)) / p**2 / N; the logits are 1 and -1.
    model = open_gates(kept)
    RBLoss(model, target)().backward()
    torch.testing.assert_close(model[0].logits.grad, torch.full((1000,), slope * 0.196611933))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rb_loss_matches_eager_straight_through(device, dtype):
    model = mixed_gates(device=device, dtype=dtype)
    loss = RBLoss(model, 0.3)
    value = loss()
    value.backward()
    kept, logits = reference_kept(model, hard=True)
    expected = ((kept - 0.7) / 0.05) ** 2
    expected.backward()
    assert value.shape == ()
    assert value.device == model[0].logits.device
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value, expected.to(value.dtype))
    check_gradients(model, logits)
    assert loss.current_ratio == pytest.approx(1 - kept.item())


def test_rb_loss_takes_logits_of_several_dtypes():
    model = nn.ModuleList([*gates((5, 3), dtype=torch.float64), *gates((4,), dtype=torch.bfloat16), *gates((6,))])
    value = RBLoss(model, 0.3)()
    assert value.dtype == torch.float32
    value.backward()
    kept, logits = reference_kept(model, hard=True)
    (((kept - 0.7) / 0.05) ** 2).backward()
    check_gradients(model, logits)


def test_rb_loss_sees_where_the_target_is_set():
    loss = RBLoss(open_gates(800), 0.1)
    loss.target_ratio = 0.2
    assert loss().item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        loss.target_ratio = 1.0
    assert loss.target_ratio == 0.2


@pytest.mark.parametrize("start", [0.99, 0.05])
def test_rb_loss_draws_gates_to_the_target_from_both_sides(start):
    model = gates((50, 40), keep_probability=start)
    with torch.no_grad():
        model[0].logits.copy_(torch.logit(torch.tensor(start)) + torch.randn(50, 40) * 0.1)
    loss = RBLoss(model, 0.7)
    optimizer = torch.optim.Adam(gate_parameters(model), lr=0.01)
    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss.current_ratio == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1.0,), ValueError),
        ((-0.1,), ValueError),
        ((math.nan,), ValueError),
        ((True,), TypeError),
        (("0.5",), TypeError),
        ((0.5, 0), ValueError),
        ((0.5, -0.05), ValueError),
        ((0.5, math.nan), ValueError),
        ((0.5, True), TypeError),
        ((0.5, "0.05"), TypeError),
    ],
)
def test_rb_loss_refuses_wrong_numbers(arguments, error):
    with pytest.raises(error, match=r"number|must be in"):
        RBLoss(open_gates(1), *arguments)


def test_rb_loss_refuses_hard_concrete_gates():
    with pytest.raises(ValueError, match="LagrangianLoss or L0Loss"):
        RBLoss(nn.ModuleList([*gates((2,)), *gates((2,), kind=HardConcreteGate)]), 0.5)


# L0Loss


@pytest.mark.parametrize(
    ("logit", "probability"),
    [(-4, 0.08307), (-2, 0.40098), (-1, 0.64534), (0, 0.83182), (1, 0.93077), (2, 0.97337), (4, 0.99631)],
)
def test_l0_loss_of_hard_concrete_gates_golden_values(logit, probability):
    model = gates((10,), kind=HardConcreteGate)
    nn.init.constant_(model[0].logits, logit)
    loss = L0Loss(model)
    assert loss().item() == pytest.approx(probability, abs=5e-6)
    assert loss.current_ratio == pytest.approx(1 - probability, abs=5e-6)


def test_l0_loss_is_the_expectation_not_the_test_time_ratio():
    # At logit -2.4 every gate is 0 at test time, and still open in 31 % of the samples.
    gate = HardConcreteGate((100,))
    nn.init.constant_(gate.logits, -2.4)
    assert gate.values().count_nonzero() == 0
    assert L0Loss(nn.ModuleList([gate]))().item() == pytest.approx(0.3097, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_l0_loss_matches_eager(device, dtype, kind):
    model = mixed_gates(kind, device=device, dtype=dtype)
    value = L0Loss(model, weight=3.0)()
    value.backward()
    kept, logits = reference_kept(model)
    (3 * kept).backward()
    torch.testing.assert_close(value, (3 * kept).to(value.dtype))
    check_gradients(model, logits)


def test_l0_loss_takes_gates_of_several_kinds_and_temperatures():
    model = nn.ModuleList(
        [
            *gates((5, 3)),
            *gates((7,), kind=HardConcreteGate),
            *gates((4, 2), kind=HardConcreteGate, beta=1.0, zeta=1.2),
        ]
    )
    value = L0Loss(model)()
    value.backward()
    kept, logits = reference_kept(model)
    kept.backward()
    torch.testing.assert_close(value, kept.float())
    check_gradients(model, logits)


@pytest.mark.parametrize(
    ("weight", "error"), [(0, ValueError), (-1, ValueError), (math.inf, ValueError), (True, TypeError)]
)
def test_l0_loss_refuses_wrong_weights(weight, error):
    with pytest.raises(error, match="number"):
        L0Loss(open_gates(1), weight)


class Sizes(nn.Module):
    """A convolution whose weights work on 36 positions, and a linear layer whose weights work once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.conv(images).mean((2, 3)))


def kept_flops(model, flops):
    """The share of FLOPs that is expected to be kept, from the gate of each weight and the FLOPs of each."""
    kept = sum(flops[name] * torch.sigmoid(gate.logits + gate.shift).mean().item() for name, gate in gated(model))
    return kept / sum(flops.values())


def gated(model):
    """Name and gate of each gated weight, tied ones once."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StochasticGate):
            found[module] = name.removesuffix("_mask")
    return [(name, gate) for gate, name in found.items()]


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"])
def test_l0_loss_per_flop_weighs_by_the_work_of_a_weight(mode, unchanged, device):
    model = pyprune.prune(Sizes().to(device), mode)
    for gate in gate_parameters(model):
        nn.init.normal_(gate)
    images = torch.randn(3, 2, 8, 8, device=device)
    before = unchanged(model)
    loss = L0Loss(model, examples_inputs=images)
    before.check()
    flops = {"conv.weight": 2 * 3 * 36 * 4 * 2 * 9, "fc.weight": 2 * 3 * 4 * 5}
    assert loss().item() == pytest.approx(kept_flops(model, flops), rel=1e-5)
    loss().backward()
    prices = []
    for _, gate in gated(model):
        probability = torch.sigmoid(gate.logits + gate.shift)
        prices.append((gate.logits.grad / (probability * (1 - probability))).mean().item())
    assert prices[0] / prices[1] == pytest.approx(36, rel=1e-4)


def test_l0_loss_per_flop_knows_each_weight_of_attention(transformer):
    # in_proj and out_proj belong to one module; embeddings need no products, but the decoder tied to them does.
    model = pyprune.prune(transformer.model, "UNSTRUCTURED_REGULARIZATION_BASED")
    for gate in gate_parameters(model):
        nn.init.normal_(gate)
    loss = L0Loss(model, examples_inputs=transformer.inputs)
    weights = {name: gate.logits for name, gate in gated(model)}
    tokens = transformer.inputs.numel()
    flops = {name: 2 * tokens * logits.numel() for name, logits in weights.items()}
    assert "embed.weight" in flops
    assert "layer.self_attn.out_proj.weight" in flops
    assert loss().item() == pytest.approx(kept_flops(model, flops), rel=1e-5)


def test_l0_loss_per_flop_knows_each_weight_of_recurrent_layers(recurrent):
    model = pyprune.prune(recurrent.model, "UNSTRUCTURED_REGULARIZATION_BASED")
    for gate in gate_parameters(model):
        nn.init.normal_(gate)
    loss = L0Loss(model, examples_inputs=recurrent.inputs)
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled
    # Three series of seven steps; the cell runs two steps.
    steps = {name: 6 if name.startswith("cell") else 21 for name, _ in gated(model)}
    flops = {name: 2 * steps[name] * gate.logits.numel() for name, gate in gated(model)}
    assert loss().item() == pytest.approx(kept_flops(model, flops), rel=1e-5)


def test_l0_loss_per_flop_follows_copies_of_a_weight():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, inputs):
            hidden = inputs @ self.a.weight.to(torch.bfloat16).t().contiguous()
            return nn.functional.linear(hidden.float(), self.b.weight)

    model = pyprune.prune(Casts(), "UNSTRUCTURED_REGULARIZATION_BASED")
    nn.init.constant_(model.a.weight_mask.logits, -100)
    loss = L0Loss(model, examples_inputs=torch.randn(2, 4, dtype=torch.bfloat16))
    assert loss().item() == pytest.approx(0.99 / 2)


def test_l0_loss_per_flop_warns_of_weights_without_flops():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    pyprune.prune(model, "UNSTRUCTURED_REGULARIZATION_BASED")
    with pytest.warns(UserWarning, match=r"weights of 0\.weight;"):
        loss = L0Loss(model, examples_inputs=torch.tensor([[1, 2]]))
    nn.init.constant_(model[0].weight_mask.logits, -100)
    assert loss().item() == pytest.approx(0.99)


def test_l0_loss_per_flop_needs_flops():
    model = pyprune.prune(nn.Sequential(nn.Embedding(5, 4)), "UNSTRUCTURED_REGULARIZATION_BASED")
    with pytest.raises(ValueError, match="leave examples_inputs out"):
        L0Loss(model, examples_inputs=torch.tensor([1]))


# LagrangianLoss


@pytest.mark.parametrize("kind", KINDS)
def test_lagrangian_loss_matches_eager(device, kind):
    model = mixed_gates(kind, device=device)
    loss = LagrangianLoss(model, 0.6)
    assert loss().item() == 0  # the multipliers start at 0
    loss.multipliers.copy_(torch.tensor([-0.7, 1.3]))
    value = loss()
    value.backward()
    kept, logits = reference_kept(model)
    gap = 1 - kept - 0.6
    expected = -0.7 * gap + 1.3 * gap**2
    expected.backward()
    torch.testing.assert_close(value, expected.float())
    check_gradients(model, logits)
    assert loss.current_ratio == pytest.approx(1 - kept.item())


def test_lagrangian_step_is_adam_upwards():
    model = gates((30,), kind=HardConcreteGate)
    loss = LagrangianLoss(model, 0.6, learning_rate=0.2)
    multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([multipliers], lr=0.2, maximize=True)
    for _ in range(50):
        nn.init.normal_(model[0].logits, std=3)
        gap = loss.current_ratio - 0.6
        multipliers.grad = torch.tensor([gap, gap**2], dtype=torch.float64)
        adam.step()
        loss.step()
        torch.testing.assert_close(loss.multipliers, multipliers.detach())


def train(loss, model, task, steps, lr=0.1):
    """Train the gates on a toy task; return the multipliers over time."""
    optimizer = torch.optim.Adam(gate_parameters(model), lr=lr)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        (task() + loss()).backward()
        optimizer.step()
        loss.step()
        history.append(loss.multipliers.tolist())
    return torch.tensor(history)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keep_probability", "target", "sign"), [(0.99, 0.7, 1), (0.02, 0.3, -1)], ids=["too many open", "too few open"]
)
def test_lagrangian_loss_reaches_the_target_from_both_sides(kind, keep_probability, target, sign):
    # The task pulls the other way: it rewards open gates (sign 1) or closed ones (sign -1), each by its importance.
    model = nn.ModuleList([kind((400,), keep_probability=keep_probability)])
    (gate,) = model
    importance = torch.linspace(0.1, 1, 400) / 400

    def task():
        return sign * (importance * torch.sigmoid(-gate.logits - gate.shift)).sum()

    loss = LagrangianLoss(model, target)
    history = train(loss, model, task, 800)
    assert loss.current_ratio == pytest.approx(target, abs=0.01)
    # While too little is pruned lambda1 falls below 0, which pushes the sparsity up; and the reverse.
    assert sign * history[100, 0] < -0.1
    assert bool((history[:, 1].diff() >= 0).all())  # lambda2 only grows
    # What the task can spare most is what went.
    probability = torch.sigmoid(gate.logits + gate.shift)
    order = probability[:100].mean() - probability[-100:].mean()
    assert sign * order < 0


def test_lagrangian_loss_finds_the_target_where_a_fixed_price_does_not():
    # The task is ten times stronger than a price of 1: the multipliers grow until they hold it.
    model = nn.ModuleList([StochasticGate((100,), keep_probability=0.9)])

    def task():
        return 10 * torch.sigmoid(-model[0].logits).mean()

    loss = LagrangianLoss(model, 0.5)
    train(loss, model, task, 1000, lr=0.02)
    assert loss.current_ratio == pytest.approx(0.5, abs=0.02)
    assert loss.multipliers[0] < -5


def test_lagrangian_target_warms_up_in_a_straight_line():
    model = gates((10,))
    loss = LagrangianLoss(model, 0.8, warmup_steps=4, start_ratio=0.2)
    assert LagrangianLoss(model, 0.8).current_target == 0.8
    for target in (0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.8):
        assert loss.current_target == pytest.approx(target)
        loss.multipliers.copy_(torch.tensor([1.0, 0.0]))  # then the loss is s - t
        assert loss().item() == pytest.approx(loss.current_ratio - target, abs=1e-6)
        loss.step()


def test_lagrangian_state_dict_resumes_exactly(tmp_path, device):
    def build():
        torch.manual_seed(3)
        model = gates((20, 5), kind=HardConcreteGate, device=device)
        return model, LagrangianLoss(model, 0.6, warmup_steps=30), torch.optim.SGD(gate_parameters(model), lr=3.0)

    def run(model, loss, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (loss() - model[0].logits.sigmoid().mean()).backward()
            optimizer.step()
            loss.step()

    one = build()
    run(*one, 20)
    torch.save([part.state_dict() for part in one], tmp_path / "state.pt")
    run(*one, 20)
    other = build()
    for part, state in zip(other, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    run(*other, 20)
    assert torch.equal(one[0][0].logits, other[0][0].logits)
    for mine, its in zip(one[1].state_dict().values(), other[1].state_dict().values(), strict=True):
        assert torch.equal(mine, its)


def test_lagrangian_multipliers_do_not_depend_on_how_the_loss_is_scaled():
    def run(scale):
        torch.manual_seed(0)
        model = gates((50,))
        loss = LagrangianLoss(model, 0.6)
        for _ in range(3):
            (scale * loss()).backward()
            loss.step()
        return loss.multipliers

    assert torch.equal(run(1.0), run(65536.0))


def test_lagrangian_multipliers_stay_exact_in_a_model_of_half_type():
    model = gates((50,))
    model.loss = LagrangianLoss(model, 0.6)
    model.loss.step()
    before = model.loss.multipliers
    model.half().to(torch.bfloat16)
    assert torch.equal(model.loss.multipliers, before)
    model.loss.step()
    model.loss().backward()
    assert model[0].logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_ratio": 1.0}, ValueError, r"must be in \[0, 1\)"),
        ({"target_ratio": None}, TypeError, r"number in \[0, 1\)"),
        ({"start_ratio": -0.1}, ValueError, r"must be in \[0, 1\)"),
        ({"warmup_steps": -1}, ValueError, "0 or more"),
        ({"warmup_steps": 0.5}, TypeError, "number of optimizer steps"),
        ({"warmup_steps": True}, TypeError, "number of optimizer steps"),
        ({"learning_rate": 0}, ValueError, "learning_rate is 0"),
        ({"learning_rate": None}, TypeError, "learning_rate is None"),
    ],
)
def test_lagrangian_loss_refuses_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LagrangianLoss(open_gates(1), **{"target_ratio": 0.5, **arguments})


# All losses


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleList([StochasticGate((0, 3))])])
def test_losses_need_gates(make, model):
    with pytest.raises(ValueError, match="prune it first"):
        make(model)


def test_losses_refuse_what_is_no_model(make):
    with pytest.raises(TypeError, match="give a torch"):
        make([torch.ones(3)])


def test_losses_have_no_parameters(make):
    model = gates((3, 4), (5,))
    loss = make(model)
    assert list(loss.parameters()) == []
    assert not any("logits" in name for name in loss.state_dict())
    # A model may hold its own loss.
    model.loss = loss
    assert len(list(model.parameters())) == 2
    assert set(model.state_dict()) >= {"0.logits", "1.logits"}


def test_losses_count_a_tied_weight_once(make, transformer):
    model = pyprune.prune(transformer.model, "UNSTRUCTURED_REGULARIZATION_BASED")
    assert model.embed.weight_mask is model.decoder.weight_mask
    nn.init.constant_(model.embed.weight_mask.logits, -100)
    share = 88 / sum(gate.numel() for gate in gate_parameters(model))
    expected = share if isinstance(make(model), RBLoss) else 1 - 0.99 * (1 - share)
    assert make(model).current_ratio == pytest.approx(expected, abs=1e-6)


def test_losses_leave_no_gate_out_when_some_are_empty(make):
    model = gates((3, 4), (0,), (5,))
    make(model)().backward()
    assert [tuple(gate.logits.grad.shape) for gate in model] == [(3, 4), (0,), (5,)]


def test_current_ratio_follows_the_logits(make):
    model = open_gates(800)
    loss = make(model)
    loss()
    nn.init.constant_(model[0].logits, -100)
    assert type(loss.current_ratio) is float
    assert loss.current_ratio == pytest.approx(1)


def test_losses_do_not_wait_for_the_device(make):
    # Reading the value of a fake tensor is an error.
    with FakeTensorMode():
        model = gates((3, 4), (5,))
        loss = make(model)
        loss().backward()
        if isinstance(loss, LagrangianLoss):
            loss.step()


def test_losses_do_not_wait_for_the_gpu(make, device):
    model = gates((3, 4), (5,), device=device)
    loss = make(model)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss().backward()
        if isinstance(loss, LagrangianLoss):
            loss.step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_losses_follow_a_model_that_moves(make, device):
    model = gates((3, 4), (5,))
    loss = make(model)
    expected = loss()
    model.to(device)
    assert loss().device == model[0].logits.device
    torch.testing.assert_close(loss().cpu(), expected)
    if isinstance(loss, LagrangianLoss):
        loss.step()
        assert loss.multipliers.device == model[0].logits.device


def test_losses_sum_over_devices(make, device):
    model = gates((3, 4), (5,))
    expected = make(model)()
    model[1].to(device)
    value = make(model)()
    assert value.device.type == "cpu"  # that of the first gate
    torch.testing.assert_close(value, expected)
    value.backward()
    assert model[1].logits.grad.device.type == device.type


def test_losses_compile_once(make, device):
    model = mixed_gates(device=device)
    loss = make(model)
    expected_model = copy.deepcopy(model)
    expected_loss = make(expected_model)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(12):
        # A target that changes becomes an input of the graph, at its first change.
        if isinstance(loss, RBLoss):
            loss.target_ratio = expected_loss.target_ratio = 0.05 * step
        for one, other in zip(gate_parameters(model), gate_parameters(expected_model), strict=True):
            one.grad = other.grad = None
        value, expected = compiled(), expected_loss()
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected)
        for one, other in zip(gate_parameters(model), gate_parameters(expected_model), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        if isinstance(loss, LagrangianLoss):
            loss.step()
            expected_loss.step()
    assert counter.frame_count == (2 if isinstance(loss, RBLoss) else 1)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
def test_losses_compile_with_the_default_backend(make, device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = gates((30, 4), (5,), device=device)
    loss = make(model)
    value = torch.compile(loss, fullgraph=True)()
    value.backward()
    torch.testing.assert_close(value, loss())


def test_losses_compile_inside_a_training_step(make):
    model = pyprune.prune(nn.Linear(4, 3), "UNSTRUCTURED_REGULARIZATION_BASED").eval()
    loss, inputs = make(model), torch.randn(2, 4)

    def total():
        return model(inputs).square().mean() + loss()

    torch._dynamo.reset()
    value = torch.compile(total, fullgraph=True, backend="aot_eager")()
    value.backward()
    torch.testing.assert_close(value, total())


def test_losses_do_not_lose_precision_under_autocast(make, device):
    model = gates((30, 4), (5,), device=device)
    loss = make(model)
    plain = loss()
    with torch.autocast(device.type, torch.bfloat16):
        value = loss()
    assert torch.equal(value, plain)
    value.backward()
    assert model[0].logits.grad.dtype == torch.float32


def test_losses_are_deep_copied_with_their_model(make):
    model = gates((3, 4), (5,))
    loss = make(model)
    model_copy, loss_copy = copy.deepcopy((model, loss))
    for gate in model:
        nn.init.constant_(gate.logits, -100)
    before = loss_copy.current_ratio
    nn.init.constant_(model_copy[0].logits, 100)
    nn.init.constant_(model_copy[1].logits, 100)
    assert loss.current_ratio == pytest.approx(1)
    assert 0 < before < 1
    assert loss_copy.current_ratio == pytest.approx(0)
    loss_copy().backward()
    assert model[0].logits.grad is None


def test_losses_accumulate_over_micro_batches(make):
    model = gates((3, 4))
    loss = make(model)
    for _ in range(2):
        (loss() / 2).backward()
    twice = model[0].logits.grad.clone()
    model[0].logits.grad = None
    loss().backward()
    torch.testing.assert_close(twice, model[0].logits.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_to_the_target_and_keeps_the_weights_it_needs(kind):
    # Ten of fifty inputs matter.
    inputs = torch.randn(512, 50)
    labels = inputs[:, :10].sum(1, keepdim=True)
    model = nn.Linear(50, 1)
    mode = "UNSTRUCTURED_REGULARIZATION_BASED" if kind is StochasticGate else "UNSTRUCTURED_HARD_CONCRETE"
    pyprune.prune(model, mode)
    gate = model.weight_mask
    loss = RBLoss(model, 0.8) if kind is StochasticGate else LagrangianLoss(model, 0.8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _, batch in zip(range(1200), itertools.cycle(range(0, 512, 64)), strict=False):
        error = nn.functional.mse_loss(model(inputs[batch : batch + 64]), labels[batch : batch + 64])
        optimizer.zero_grad()
        (error + loss()).backward()
        optimizer.step()
        if isinstance(loss, LagrangianLoss):
            loss.step()
    assert loss.current_ratio == pytest.approx(0.8, abs=0.05)
    assert bool((gate.values()[0, :10] > 0).all())


@pytest.mark.parametrize("inputs", [[torch.ones(1, 4)], 3])
def test_l0_loss_per_flop_refuses_other_inputs(inputs):
    model = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_REGULARIZATION_BASED")
    with pytest.raises(TypeError, match=r"examples_inputs is a .*; give a tensor, a tuple"):
        L0Loss(model, examples_inputs=inputs)


def test_losses_made_on_the_meta_device_work_when_the_values_come(make, device):
    saved = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_REGULARIZATION_BASED").to(device)
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    loss = make(pyprune.load_from_config(model, pyprune.get_config(saved)))
    model.load_state_dict(saved.state_dict(), assign=True)
    assert loss().item() == make(saved)().item()
    assert loss.current_ratio == make(saved).current_ratio
    if isinstance(loss, LagrangianLoss):
        loss.step()


def test_losses_say_that_their_gates_were_stripped(make):
    model = pyprune.prune(nn.Linear(4, 4), "UNSTRUCTURED_REGULARIZATION_BASED")
    loss = make(model)
    pyprune.strip(model, do_copy=True)
    loss()
    pyprune.strip(model)
    with pytest.raises(RuntimeError, match="folded in by strip"):
        loss()


# What happens behind their back


def two_layers():
    return pyprune.prune(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "UNSTRUCTURED_REGULARIZATION_BASED"
    )


def test_losses_name_layers_that_were_replaced(make):
    model = two_layers()
    loss = make(model)
    loss()
    layer, model[2] = model[2], nn.Linear(4, 4)
    for look in (loss, lambda: loss.current_ratio):
        with pytest.raises(ValueError, match=r"in the model no more: 2\.weight\. Their layers were replaced"):
            look()
    if isinstance(loss, LagrangianLoss):
        with pytest.raises(ValueError, match=r"2\.weight"):
            loss.step()
    model[2] = layer
    loss()


def test_losses_name_layers_that_another_gate_replaced(make):
    model = nn.ModuleDict({"inner": two_layers()})
    loss = make(model)
    model["inner"] = two_layers()
    with pytest.raises(ValueError, match=r"inner\.0\.weight, inner\.2\.weight"):
        loss()
    make(model)()


def test_losses_do_not_mind_what_is_put_around_their_layers(make, transformer):
    model = two_layers()
    loss = make(model)
    expected = loss()
    model[2] = nn.Sequential(model[2])
    assert torch.equal(loss(), expected)
    # A tied weight keeps its gate where one of its layers stays.
    tied = pyprune.prune(transformer.model, "UNSTRUCTURED_REGULARIZATION_BASED")
    loss = make(tied)
    tied.embed = nn.Embedding(11, 8)
    loss()
    tied.decoder = nn.Linear(8, 11)
    with pytest.raises(ValueError, match=r"embed\.weight"):
        loss()


def test_copies_of_a_model_and_its_loss_look_at_each_other(make):
    model = two_layers()
    loss = make(model)
    loss()
    model_copy, loss_copy = copy.deepcopy((model, loss))
    model[2] = nn.Linear(4, 4)
    loss_copy()
    model_copy[2] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"2\.weight"):
        loss_copy()


def step(loss, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()


def silent(make, model, optimizers, turns=8):
    """Train, and return the warnings."""
    loss = make(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(turns):
            model(torch.ones(1, 4)).sum().backward()
            step(loss, *optimizers(turn))
    return [str(one.message) for one in caught]


def test_losses_warn_once_of_an_optimizer_without_the_gates(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pyprune.prune(model, "UNSTRUCTURED_REGULARIZATION_BASED")
    (message,) = silent(make, model, lambda turn: [optimizer])
    assert "SGD stepped without them: 0.weight, 2.weight. Build the optimizer after prune()" in message
    optimizer.add_param_group({"params": gate_parameters(model)[:1]})
    (message,) = silent(make, model, lambda turn: [optimizer])
    assert "without them: 2.weight. Build" in message
    optimizer.add_param_group({"params": gate_parameters(model)[1:]})
    assert silent(make, model, lambda turn: [optimizer]) == []


def test_losses_warn_once_of_weight_decay_on_gates(make):
    model = two_layers()
    (message,) = silent(make, model, lambda turn: [torch.optim.AdamW(model.parameters())])
    assert "AdamW has weight decay on gates" in message
    assert "0.weight, 2.weight. Put pyprune.gate_parameters(model) in a group with weight_decay=0" in message
    groups = [{"params": pyprune.weight_parameters(model)}, {"params": gate_parameters(model), "weight_decay": 0.0}]
    assert silent(make, model, lambda turn: [torch.optim.AdamW(groups)]) == []


def test_losses_do_not_warn_where_optimizers_take_turns(make):
    model, other = two_layers(), nn.Linear(2, 2)
    weights = torch.optim.SGD(pyprune.weight_parameters(model), lr=0.1)
    some, others = (torch.optim.SGD([logits], lr=0.1) for logits in gate_parameters(model))
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    for turns in (
        lambda turn: [weights, some, others],
        lambda turn: [others, weights, some],
        lambda turn: [weights] if turn % 3 else [some, others],
        lambda turn: [foreign],
    ):
        assert silent(make, model, turns) == []


def test_losses_do_not_warn_of_frozen_gates_or_of_what_gets_no_gradient(make):
    model = two_layers()
    weights = torch.optim.SGD(pyprune.weight_parameters(model), lr=0.1)
    loss = make(model)
    for _ in range(8):  # looked at, not trained with
        model.eval()(torch.ones(1, 4)).sum()
        loss()
        weights.step()
    for logits in gate_parameters(model):
        logits.requires_grad_(False)
    loss = make(model)
    for _ in range(8):
        model(torch.ones(1, 4)).sum().backward()
        loss()
        weights.step()


def test_the_watch_of_a_loss_ends_with_it_and_where_all_is_well(make):
    before, model = set(HOOKS), two_layers()
    loss = make(model)
    assert set(HOOKS) == before
    loss()
    assert len(HOOKS) == len(before) + 1
    copy.deepcopy(loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(loss, optimizer)
    assert set(HOOKS) == before
    loss = make(model)
    loss()
    assert len(HOOKS) == len(before) + 1
    del loss
    gc.collect()
    assert set(HOOKS) == before
