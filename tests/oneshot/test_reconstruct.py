import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune.oneshot.reconstruct import Fit, reconstruct


class Feedforward(nn.Module):
    """A block that gives a tuple, with norm, bias and residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu()), None


def convolution():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))


KINDS = {
    "tuple": (Feedforward, (5, 12)),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), (5, 12)),
    "convolution": (convolution, (3, 6, 6)),
    "linear": (lambda: nn.Linear(12, 12), (12,)),
}


class Case:
    """A block, dense and with masks, and batches of three samples."""

    def __init__(self, kind, dtype=torch.float32, device="cpu", count=4):
        torch.manual_seed(0)
        make, shape = KINDS[kind]
        self.block = make().eval().to(device, dtype)
        self.inputs = [torch.randn(3, *shape, device=device, dtype=dtype) for _ in range(count)]
        with torch.no_grad():
            self.wanted = [self.block(x) for x in self.inputs]
        self.masks = {}
        for parameter in self.block.parameters():
            if parameter.dim() > 1:
                sizes = parameter.detach().abs().float()
                self.masks[parameter] = sizes > sizes.median()
                parameter.data.masked_fill_(~self.masks[parameter], 0)

    def run(self, number):
        return self.block(self.inputs[number])

    def fit(self, how, **options):
        parameters = self.block.parameters()
        return how.fit(self.run, self.wanted.__getitem__, len(self.inputs), parameters, self.masks, **options)

    def error(self):
        with torch.no_grad():
            pairs = [(self.run(i), self.wanted[i]) for i in range(len(self.inputs))]
        pairs = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in pairs]
        missing = sum((a.double() - b.double()).square().sum() for a, b in pairs)
        return float(missing / sum(b.double().square().sum() for _, b in pairs))

    def values(self):
        return [parameter.detach().clone() for parameter in self.block.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fit_brings_a_block_nearer_to_the_dense_one_and_holds_zeros(kind, dtype, device):
    case = Case(kind, dtype, device)
    before, values = case.error(), case.values()
    fit = case.fit(reconstruct(steps=40, lr=3e-3, batch=6))
    assert fit.before == pytest.approx(before, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert fit.after == pytest.approx(case.error(), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert fit.after < 0.8 * fit.before
    assert not fit.diverged
    for parameter, value in zip(case.block.parameters(), values, strict=True):
        assert parameter.dtype == dtype
        assert not torch.equal(parameter, value)  # biases and norms, too
        if parameter in case.masks:
            assert torch.equal(parameter != 0, value != 0)
            assert not torch.signbit(parameter[~case.masks[parameter]]).any()


def test_fit_takes_the_steps_of_adam_on_the_relative_error():
    case, plain = Case("tuple"), Case("tuple")
    fit = case.fit(reconstruct(steps=5, lr=1e-3, batch=12))  # all batches in each step
    optimizer = torch.optim.Adam(plain.block.parameters(), lr=1e-3)
    x, wanted = torch.cat(plain.inputs), torch.cat([output[0] for output in plain.wanted])
    for _ in range(5):
        optimizer.zero_grad()
        ((plain.block(x)[0] - wanted).square().sum() / wanted.square().sum()).backward()
        for parameter, mask in plain.masks.items():
            parameter.grad *= mask
        optimizer.step()
    for one, other in zip(case.values(), plain.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert fit.after == pytest.approx(plain.error(), rel=1e-4)


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (3, 1), (4, 2), (7, 3), (100, 4)])
def test_fit_takes_whole_batches_until_a_step_has_its_samples(samples, batches):
    case, seen = Case("linear"), []

    def run(number):
        if torch.is_grad_enabled():
            seen.append(number)
        return case.run(number)

    reconstruct(steps=4, batch=samples).fit(run, case.wanted.__getitem__, 4, case.block.parameters(), case.masks)
    assert len(seen) == 4 * batches
    assert sorted(seen[:4]) == [0, 1, 2, 3]  # each once before any comes again


def test_fit_is_the_same_for_a_seed_and_leaves_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    results = {}
    for seed in (0, 0, 1):
        case = Case("tuple")
        torch.manual_seed(7)
        case.fit(reconstruct(steps=7, batch=1, seed=seed))
        assert torch.equal(torch.rand(3), expected)
        if seed in results:
            assert same(results[seed], case.values())
        results[seed] = case.values()
    assert not same(results[0], results[1])


def test_fit_trains_frozen_parameters_and_gives_flags_and_gradients_back():
    case = Case("tuple")
    parameters = list(case.block.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 3.0)
    values = case.values()
    case.fit(reconstruct(steps=5))
    assert [parameter.requires_grad for parameter in parameters] == [False, True] * 3
    assert (parameters[1].grad == 3).all()
    assert [parameter.grad for parameter in parameters if parameter is not parameters[1]] == [None] * 5
    assert not any(torch.equal(one, value) for one, value in zip(parameters, values, strict=True))


def test_fit_changes_nothing_outside_of_what_it_is_given():
    case = Case("tuple")
    before = nn.Linear(12, 12)  # something trainable that makes the block's inputs
    start = copy.deepcopy(before.state_dict())

    def run(number):
        return case.block(before(case.inputs[number]))

    kept = case.block.down.bias
    value = kept.detach().clone()
    parameters = [parameter for parameter in case.block.parameters() if parameter is not kept]
    fit = reconstruct(steps=10, lr=1e-3).fit(run, case.wanted.__getitem__, 4, parameters, case.masks)
    assert fit.after < fit.before
    assert all(torch.equal(tensor, start[name]) for name, tensor in before.state_dict().items())
    assert before.weight.grad is None
    assert torch.equal(kept, value)


@pytest.mark.parametrize("lr", [5.0, 1e30])
def test_fit_is_never_worse(lr):
    case = Case("tuple")
    values = case.values()
    fit = case.fit(reconstruct(steps=3, lr=lr))
    assert fit.after == fit.before
    assert fit.diverged == (lr == 1e30)
    assert same(case.values(), values)


def test_fit_of_a_block_that_is_as_the_dense_one_changes_no_bit():
    case = Case("tuple")
    with torch.no_grad():
        case.wanted = [case.run(number) for number in range(4)]
    values = case.values()
    assert case.fit(reconstruct(lr=0.1)) == Fit(0.0, 0.0)
    assert same(case.values(), values)


def test_fit_of_outputs_that_are_not_finite_says_so():
    case = Case("linear")
    case.wanted[2][0, 0] = torch.nan
    values = case.values()
    assert case.fit(reconstruct()).diverged
    assert same(case.values(), values)


@pytest.mark.parametrize("when", [0, 4, 9, 11])
def test_fit_that_is_interrupted_leaves_the_block_as_it_was(when):
    case, calls = Case("tuple"), []
    values, parameters = case.values(), list(case.block.parameters())
    parameters[0].requires_grad_(False)

    def run(number):
        calls.append(number)
        if len(calls) > when:
            raise KeyboardInterrupt
        return case.run(number)

    with pytest.raises(KeyboardInterrupt):
        reconstruct(steps=4, batch=3).fit(run, case.wanted.__getitem__, 4, parameters, case.masks)
    assert same(case.values(), values)
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * 5


def test_fit_does_not_look_at_padding():
    """What is in padded positions of the inputs does not matter, nor how wrong the block is there."""
    keep = torch.ones(3, 5, dtype=torch.bool)
    keep[1, 2:] = False
    found = []
    for filler in (0.0, 50.0):
        case = Case("tuple")
        for x, (wanted, _) in zip(case.inputs, case.wanted, strict=True):
            x[1, 2:], wanted[1, 2:] = filler, 7.0
        found.append(case.fit(reconstruct(steps=5, lr=1e-3), padding=lambda output: keep))
        found.append(case.values())
    assert found[0] == found[2]
    assert found[0].after < found[0].before
    assert same(found[1], found[3])


def test_fit_trains_half_precision_by_float32_copies():
    """Steps that are too small for bfloat16 add up."""
    case = Case("linear", torch.bfloat16)
    values = case.values()
    case.fit(reconstruct(steps=1, lr=1e-5))
    assert same(case.values(), values)
    fit = case.fit(reconstruct(steps=300, lr=1e-5))
    assert fit.after < fit.before
    assert not same(case.values(), values)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps is 0; give an integer, 1 or more"),
        ({"steps": 2.5}, TypeError, "steps is 2.5"),
        ({"lr": 0}, ValueError, "lr is 0; give a positive number"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_reconstruct_refuses_what_makes_no_sense(options, error, words):
    with pytest.raises(error, match=words):
        reconstruct(**options)


def test_fit_leaves_what_masks_have_parked():
    """What is dropped comes back with its old value; what is kept has the trained one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    dense = copy.deepcopy(model)
    inputs = [torch.randn(4, 8) for _ in range(4)]
    wanted = [dense(x).detach() for x in inputs]
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    masks = {layer.weight: layer.weight.detach() != 0 for layer in (model[0], model[2])}
    fit = reconstruct(steps=40, lr=3e-3).fit(
        lambda number: model(inputs[number]), wanted.__getitem__, 4, model.parameters(), masks
    )
    assert fit.after < fit.before
    assert all(torch.equal(weight != 0, mask) for weight, mask in masks.items())
    trained = {weight: weight.detach().clone() for weight in masks}
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.0)
    for layer, old in ((model[0], dense[0]), (model[2], dense[2])):
        mask = masks[layer.weight]
        assert torch.equal(layer.weight[~mask], old.weight[~mask])
        assert torch.equal(layer.weight[mask], trained[layer.weight][mask])


@pytest.mark.parametrize("propagate", [True, False])
def test_prune_one_shot_reconstructs_blocks(propagate):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)]
    dense = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*layers), nn.Linear(16, 3)).eval()
    batches = [torch.randn(4, 10, 8) for _ in range(6)]
    errors = {}
    for how in (None, reconstruct(lr=1e-3)):
        model = copy.deepcopy(dense)
        state = torch.get_rng_state()
        pyprune.prune_one_shot(
            model,
            batches,
            pyprune.scope.tensor(),
            ratio=0.6,
            solver=pyprune.solvers.sparsegpt(),
            propagate=propagate,
            reconstruct=how,
        )
        assert torch.equal(torch.get_rng_state(), state)
        x = torch.cat(batches)
        errors[how] = (model(x) - dense(x)).norm().item()
        for layer in model[1]:
            assert int((layer.linear1.weight == 0).sum()) == round(0.6 * 16 * 32)
            assert all(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())
        assert torch.equal(model[0].weight, dense[0].weight)
        assert torch.equal(model[2].weight, dense[2].weight)
    assert errors[reconstruct(lr=1e-3)] < 0.9 * errors[None]
