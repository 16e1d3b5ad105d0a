"""Activations that are computed again see the sample of their pass: compared with runs that keep them all."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyprune.modules.gates import StochasticGate, gates_of
from pyprune.modules.sampling import Sampler
from tests.modules.test_forward_pass import Stack, assert_equal, gated, gradients, in_thread, run


@pytest.fixture
def inputs(device):
    return [torch.randn(4, 16, device=device, requires_grad=True) for _ in range(3)]


@pytest.fixture
def stack(device):
    return gated(Stack().to(device))


def test_sampler_draws_one_seed_per_pass_from_the_generator(device):
    sampler = Sampler()
    torch.manual_seed(1)
    seeds = [torch.randint(-(2**63), 2**63 - 1, (), device=device) for _ in range(2)]
    torch.manual_seed(1)
    for seed in seeds:
        gate = StochasticGate((2,), device=device)
        sampler.begin({device: [gate]})
        assert sampler.seed(device) == sampler.seed(device) == gate.seat.seed == seed
        sampler.end()
    torch.manual_seed(1)
    assert [sampler.seed(device), sampler.seed(device)] == seeds
    sampler.begin({})
    assert sampler.seed(device) == sampler.seed(device)
    assert sampler.seed(device) != sampler.seed(device, 1)
    sampler.end()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_blocks_keep_the_sample_of_their_pass(stack, inputs, use_reentrant):
    """Several passes before one backward pass; dropout after the gates shows that the generator is in step."""
    expected = run(stack, inputs)
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)
    assert_equal(run(stack, inputs), expected)
    # And again, with passes that are over in the history.
    assert_equal(run(stack, inputs[:2], seed=2), run(stack, inputs[:2], seed=2))
    assert_equal(run(stack, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_models_draw_the_same_sample(stack, inputs, use_reentrant):
    class Outer:
        zero_grad, parameters = stack.zero_grad, stack.parameters

        def __call__(self, x):
            return checkpoint(stack, x, use_reentrant=use_reentrant)

    expected = run(stack, inputs)
    for _ in range(2):
        assert_equal(run(Outer(), inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_parts_without_a_model_around_draw_the_same_sample(stack, inputs, use_reentrant):
    class Parts:
        zero_grad, parameters = stack.zero_grad, stack.parameters

        def __init__(self, call):
            self.call = call

        def __call__(self, x):
            x = stack.first(x)
            for block in stack.blocks:
                x = self.call(lambda x, block=block: block(x) + block(x) @ block.linear.weight, x)
            return x

    plain, recomputed = Parts(lambda f, x: f(x)), Parts(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    expected = run(plain, inputs)
    for _ in range(2):
        assert_equal(run(recomputed, inputs), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of reentrant in reentrant
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_recomputed_blocks_in_recomputed_blocks_keep_their_sample(stack, inputs, outer, inner):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Stack(2), Stack(2)
            self.call = lambda part, x: part(x)

        def forward(self, x):
            return self.call(self.right, self.call(self.left, x))

    torch.manual_seed(0)
    model = gated(Pair().to(inputs[0].device))
    expected = run(model, inputs)
    model.call = lambda part, x: checkpoint(part, x, use_reentrant=outer)
    for part in (model.left, model.right):
        part.call = lambda block, x: checkpoint(block, x, use_reentrant=inner)
    for _ in range(2):
        assert_equal(run(model, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_functions_that_read_a_weight_keep_the_sample(stack, inputs, use_reentrant):
    expected = run(stack, inputs)

    def call(block, x):
        return checkpoint(
            lambda x: block.dropout(nn.functional.linear(x, block.linear.weight, block.linear.bias).tanh()),
            x,
            use_reentrant=use_reentrant,
        )

    stack.call = call
    assert_equal(run(stack, inputs), expected)


def test_recomputed_blocks_draw_the_same_sample_without_the_state_of_the_generator(stack, inputs):
    stack.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    expected = run(stack, inputs)
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    assert_equal(run(stack, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_misled_where_threads_count_alike(stack, inputs, use_reentrant):
    def in_thread_that_counts_on(backward):
        def count_and_go():
            while torch._C._autograd._get_sequence_nr() < first:
                torch.ones((), requires_grad=True).view(())
            backward()

        in_thread(count_and_go)

    expected = run(stack, inputs)
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)
    first = torch._C._autograd._get_sequence_nr()
    assert_equal(run(stack, inputs, in_thread=in_thread_that_counts_on), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_takes_the_sample_of_its_own_thread(stack, use_reentrant):
    x = torch.randn(4, 16, requires_grad=True)
    stack.cpu().call = lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)

    def train(meanwhile):
        torch.manual_seed(1)
        out = stack(x).square().sum()
        in_thread(meanwhile)
        stack.zero_grad()
        out.backward()
        return gradients(stack)

    # New threads, which number their nodes from 0.
    expected = in_thread(lambda: train(lambda: None))
    assert_equal(in_thread(lambda: train(lambda: stack(x))), expected)


def test_recomputation_says_when_its_thread_is_not_known(stack, inputs):
    """As on a GPU, where the thread of the backward pass is that of no forward pass."""
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    outs = [in_thread(lambda: stack(inputs[0])) for _ in range(2)]
    with pytest.raises(RuntimeError, match="give each thread a copy of the model"):
        in_thread(outs[0].sum().backward)
    # What drew nothing is no matter.
    stack.eval()
    in_thread(in_thread(lambda: stack(inputs[0])).sum().backward)


def test_recomputation_says_when_its_pass_is_forgotten(stack, inputs):
    for sampler in {gate.sampler for gate in gates_of(stack)}:
        sampler._passes = type(sampler._passes)(maxlen=2)
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="forgotten"):
        run(stack, inputs)
    run(stack, inputs[:2])


def test_recomputation_leaves_nothing_behind(stack, inputs):
    (sampler,) = {gate.sampler for gate in gates_of(stack)}
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    run(stack, inputs)
    assert not sampler._thread.recomputations
    out = stack(inputs[0])
    handle = stack.first._parameters["weight"].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    handle.remove()
    assert not sampler._thread.recomputations
    assert not sampler.is_open
