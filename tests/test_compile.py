"""What the compiler makes of masks and gates, told from the code that it generates and from how often it compiles."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyprune
from pyprune.modules.gates import gates_of
from tests.modules.test_forward_pass import BERNOULLI, HARD_CONCRETE

MASKS = "UNSTRUCTURED_MAGNITUDE_GLOBAL"
# torch warns of itself while it loads its compiler.
pytestmark = pytest.mark.filterwarnings("ignore")


def linear_model():
    # The sums of biases would be put into one kernel with something else, or not.
    sizes = [(20, 40), (40, 30), (30, 10)]
    return nn.Sequential(*(part for one in sizes for part in (nn.Linear(*one, bias=False), nn.ReLU())))


def conv_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10))


MODELS = {"linear": (linear_model, (4, 20)), "conv": (conv_model, (4, 3, 8, 8))}


def generated(model, inputs):
    """Return the code that the default backend generates for the forward and for the backward pass."""
    import torch._functorch.config
    from torch._inductor.utils import get_code

    compiled = torch.compile(model, fullgraph=True)
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        codes = [code for code in get_code(lambda: compiled(inputs)) if "async_compile" in code]
    assert len(codes) == 2
    return codes


def kernels(code):
    return len(re.findall(r"= async_compile\.\w+\(", code))


def calls(code, name):
    return code.count(f"torch.ops.pyprune.{name}.default(")


@pytest.fixture(autouse=True)
def _fresh_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_at_most_one_more_kernel_per_weight_and_direction(kind, device):
    make, shape = MODELS[kind]
    inputs = torch.randn(shape, device=device)
    dense = generated(make().to(device), inputs)
    masked = generated(pyprune.prune(make().to(device), MASKS, ratio=0.5), inputs)
    for before, after in zip(dense, masked, strict=True):
        assert kernels(before) > 0
        assert kernels(before) <= kernels(after) <= kernels(before) + 3


def test_masks_add_nothing_to_a_compiled_model(device):
    model = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.ReLU(), nn.Conv2d(64, 128, 3, bias=False)).to(device)
    inputs = torch.randn(2, 3, 8, 8, device=device)
    dense = generated(model, inputs)
    pyprune.prune(model, MASKS, ratio=0.5)
    masked = generated(model, inputs)
    assert [kernels(code) for code in masked] == [kernels(code) for code in dense]
    assert "bool*" not in masked[0] + masked[1]


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
def test_gates_are_one_call_each_and_nothing_else_per_weight(mode, device):
    inputs = torch.randn(4, 20, device=device)
    dense = generated(linear_model().to(device), inputs)
    forward, backward = generated(pyprune.prune(linear_model().to(device), mode), inputs)
    assert (calls(forward, "gate"), calls(backward, "gate_backward")) == (3, 3)
    assert kernels(forward) <= kernels(dense[0]) + 1  # the seed of the pass
    assert kernels(backward) <= kernels(dense[1])


def training_step(mode):
    """Return a step that can be compiled, what changes from one step to the next, and the model."""
    model = pyprune.prune(linear_model(), mode, **({"ratio": 0.5} if mode == MASKS else {}))
    loss = pyprune.RBLoss(model, target_ratio=0.5) if mode == BERNOULLI else None

    def step(inputs):
        return model(inputs).square().mean() + (0.0 if loss is None else loss())

    def change(ratio):
        if mode == MASKS:
            pyprune.prune(model, mode, ratio=ratio)
        elif loss is not None:
            loss.target_ratio = ratio
        for gate in gates_of(model):
            gate.logits.data.add_(0.1)

    return step, change, model


@pytest.mark.parametrize("mode", [MASKS, BERNOULLI, HARD_CONCRETE])
def test_a_training_step_is_compiled_once_while_masks_ratios_seeds_and_targets_change(mode):
    step, change, model = training_step(mode)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for turn in range(8):
        optimizer.zero_grad()
        compiled(torch.randn(4, 20)).backward()
        optimizer.step()
        change(0.1 + 0.1 * turn)
    # A number that changes, the target of RBLoss, becomes an input of the graph at its first change.
    assert counter.frame_count == (2 if mode == BERNOULLI else 1)
