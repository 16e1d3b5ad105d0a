"""Masked and gated models under torch.func, double backward and checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import pyprune

# What torch imports for forward mode warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

MASKS, GATES = ("UNSTRUCTURED_MAGNITUDE_LOCAL",), ("UNSTRUCTURED_HARD_CONCRETE", "UNSTRUCTURED_REGULARIZATION_BASED")
MODES = MASKS + GATES


def pruned(mode, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    pyprune.prune(model, mode, ratio=0.5 if mode in MASKS else None)
    with torch.no_grad():
        for logits in pyprune.gate_parameters(model) if mode in GATES else ():
            logits.uniform_(-2, 2)
    return model


def inputs():
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def call(model, parameters, x):
    return functional_call(model, parameters, (x,))


@pytest.mark.parametrize("mode", MODES)
def test_an_ensemble_of_pruned_models_can_be_stacked(mode):
    models = [pruned(mode, seed).eval() for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), inputs()

    def outputs(parameters):
        return vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(parameters, buffers, x)

    wanted = torch.stack([model(x) for model in models])
    torch.testing.assert_close(outputs(parameters), wanted)
    wanted.square().sum().backward()
    for found in (
        grad(lambda p: outputs(p).square().sum())(parameters),
        dict(
            zip(parameters, torch.autograd.grad(outputs(parameters).square().sum(), parameters.values()), strict=True)
        ),
    ):
        for name, gradient in found.items():
            each = torch.stack([model.get_parameter(name).grad for model in models])
            if mode in MASKS and name.endswith("weight"):  # the gradient of what is dropped is zeroed in the model
                gradient = torch.where(torch.stack([model.get_parameter(name) for model in models]) != 0, gradient, 0)
            torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_single_samples(mode):
    model, x = pruned(mode).eval(), inputs()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = vmap(grad(lambda p, one: call(model, p, one[None]).square().sum()), (None, 0))(parameters, x)
    for index, one in enumerate(x):
        model.zero_grad()
        leaves = dict(model.named_parameters())
        whole = torch.autograd.grad(model(one[None]).square().sum(), leaves.values())
        for (name, leaf), gradient in zip(leaves.items(), whole, strict=True):
            shown = found[name][index]
            if mode in MASKS and name.endswith("weight"):
                gradient, shown = (torch.where(leaf != 0, g, 0) for g in (gradient, shown))
            torch.testing.assert_close(shown, gradient)


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_is_that_of_the_weights_in_use(mode):
    model, x = pruned(mode), inputs().requires_grad_()
    weights = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def second(forward):
        (first,) = torch.autograd.grad(forward(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [model.get_parameter(f"{name}.weight") for name in weights])

    with pyprune.one_gate_sample(model):
        found = second(model)
        factors = {
            name: torch.where(p != 0, layer.weight.detach() / p.detach(), 0)
            for name, layer in weights.items()
            for p in [model.get_parameter(f"{name}.weight")]
        }

    def plain(x):
        first, last = (model.get_parameter(f"{name}.weight") * factors[name] for name in weights)
        hidden = nn.functional.linear(x, first, model[0].bias).tanh()
        return nn.functional.linear(hidden, last, model[2].bias)

    for one, other, factor in zip(found, second(plain), factors.values(), strict=True):
        # What is dropped by a mask has the gradient of the weight in use.
        torch.testing.assert_close(torch.where(factor != 0, one, 0), other)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_and_hessians_of_inputs(mode):
    model, x = pruned(mode).eval(), inputs()
    tangent = torch.ones_like(x)
    _, along = jvp(model, (x,), (tangent,))
    step = 1e-6
    numeric = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(along, numeric, rtol=1e-5, atol=1e-6)
    dense = copy.deepcopy(model)
    pyprune.strip(dense)
    found, wanted = (hessian(lambda one, net=net: net(one).sum())(x[0]) for net in (model, dense))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_gates_again(mode, use_reentrant):
    model, x = pruned(mode), inputs().requires_grad_()
    gradients = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(7)
        forward(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", GATES)
def test_what_gates_cannot_do_is_an_error_and_no_silent_zero(mode):
    model, x = pruned(mode).eval(), inputs()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda p: call(model, p, x), (parameters,), (parameters,))
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative|differentiated once"):
        hessian(lambda p: call(model, {**parameters, **p}, x).sum())({"0.weight": parameters["0.weight"]})
    gradient = grad(lambda p: call(model, {**parameters, **p}, x).square().sum())
    with pytest.raises(NotImplementedError, match="differentiated once"):
        grad(lambda p: gradient(p)["0.weight"].square().sum())({"0.weight": parameters["0.weight"]})
