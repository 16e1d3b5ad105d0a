"""One sample per forward pass, compared with runs in which nothing is compiled, split or computed again."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyprune
from pyprune import StochasticGate, attach_gate, one_gate_sample
from pyprune.modules.forward_pass import share_samples, unshare_samples
from pyprune.modules.gates import gates_of

BERNOULLI, HARD_CONCRETE = "UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x).tanh())


class Stack(nn.Module):
    """Blocks, each of which may be called by another function."""

    def __init__(self, depth=3):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.call = lambda block, x: block(x)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = self.call(block, x)
        return x


def gated(model, mode=BERNOULLI, **options):
    """Put gates on a model that are open half of the time."""
    pyprune.prune(model, mode, **options)
    for gate in gates_of(model):
        gate.logits.data.zero_()
    return model


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def run(model, inputs, seed=1, in_thread=in_thread):
    """Return the outputs of forward passes, the gradients of their sum, and the next number of the generator."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = [model(x) for x in inputs]
    # As on a GPU, where the thread of the backward pass is another one, and counts its autograd nodes from 0.
    in_thread(sum(out.square().sum() for out in outputs).backward)
    return [*outputs, *gradients(model), torch.rand(())]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # gradients may add up in another order


@pytest.fixture
def inputs(device):
    return [torch.randn(4, 16, device=device, requires_grad=True) for _ in range(3)]


@pytest.fixture
def stack(device):
    return gated(Stack().to(device))


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
def test_prune_lets_every_call_of_a_model_draw_a_new_sample(case, mode):
    gated(case.model, mode)
    torch.manual_seed(1)
    first, second = case.model(case.inputs), case.model(case.inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(case.model(case.inputs), first)
    assert torch.equal(case.model(case.inputs), second)


def test_prune_lets_nothing_be_drawn_in_evaluation(case):
    gated(case.model).eval()
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(case.model(case.inputs), case.model(case.inputs))
    assert torch.equal(torch.rand(()), expected)


def test_prune_lets_tied_weights_and_modules_called_twice_keep_one_sample():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.lonely = (nn.Linear(64, 64, bias=False) for _ in range(3))
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.one(x), self.one(x), self.other(x), self.lonely(x)

    model, x = gated(Twice()), torch.eye(64)
    one, again, other, lonely = model(x)
    assert torch.equal(one, again)
    assert torch.equal(one, other)
    assert ((one != 0) != (lonely != 0)).any()


def test_gates_of_one_pass_draw_different_noise():
    model = gated(nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4))))
    with one_gate_sample(model):
        samples = [layer.weight != 0 for layer in model]
    for index, sample in enumerate(samples):
        assert 0.3 < sample.float().mean() < 0.7
        for other in samples[:index]:
            assert 0.3 < (sample == other).float().mean() < 0.7


def test_two_models_draw_different_noise():
    model = gated(nn.Linear(64, 64, bias=False))
    twin = copy.deepcopy(model)
    with one_gate_sample(model), one_gate_sample(twin):
        assert not torch.equal(model.weight != 0, twin.weight != 0)
    with one_gate_sample(nn.ModuleList([model, twin])):
        assert not torch.equal(model.weight != 0, twin.weight != 0)


def test_part_of_a_model_called_alone_draws_a_sample_per_call(stack, inputs):
    torch.manual_seed(1)
    block = stack.blocks[0].eval().train()
    one, other = block.linear(inputs[0]), block.linear(inputs[0])
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(block.linear(inputs[0]), one)


def test_a_call_within_a_call_is_no_new_pass():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Linear(64, 64, bias=False)

        def forward(self, x, depth):
            return [self.leaf(x), *self(x, depth - 1)] if depth else [self.leaf(x)]

    model = gated(Tree())
    samples = model(torch.eye(64), 3)
    for sample in samples[1:]:
        assert torch.equal(sample, samples[0])
    assert not torch.equal(model(torch.eye(64), 0)[0], samples[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_ends_with_an_exception(stack, inputs, error):
    def fail(block, x):
        raise error

    stack.call = fail
    with pytest.raises(error):
        stack(inputs[0])
    stack.call = lambda block, x: block.linear(x)
    assert not torch.equal(stack(inputs[0]), stack(inputs[0]))


def test_one_gate_sample_holds_over_several_calls(stack, inputs):
    with one_gate_sample(stack):
        out = stack.first(inputs[0])
        assert torch.equal(stack.first(inputs[0]), out)
        with one_gate_sample(stack.blocks):
            assert torch.equal(stack.first(inputs[0]), out)
        assert torch.equal(stack.first(inputs[0]), out)
    assert not torch.equal(stack.first(inputs[0]), out)


def test_one_gate_sample_holds_for_gates_put_on_by_hand():
    linear = nn.Linear(64, 64)
    attach_gate(linear, "weight", StochasticGate((64, 64), keep_probability=0.5))
    assert not torch.equal(linear.weight, linear.weight)
    with one_gate_sample(linear):
        assert torch.equal(linear.weight, linear.weight)


def test_parts_pruned_one_by_one_are_one_model(inputs):
    model = Stack()
    pyprune.prune(model, BERNOULLI, ignored_scope=pyprune.IgnoredScope(names=["first"]))
    gated(model.first, HARD_CONCRETE)
    seen = []
    model.call = lambda block, x: seen.append(model.first(inputs[0])) or x
    model(inputs[0])
    assert torch.equal(seen[0], seen[1])
    model(inputs[0])
    assert not torch.equal(seen[0], seen[-1])


def test_a_copy_of_a_model_draws_for_itself(stack, inputs):
    twin = copy.deepcopy(stack)
    assert_equal(run(twin, inputs), run(stack, inputs))
    with one_gate_sample(stack):
        assert not torch.equal(twin.first(inputs[0]), twin.first(inputs[0]))
    block = copy.deepcopy(stack.blocks[1])
    assert len(gates_of(block)) == 1
    block.linear(inputs[0]).sum().backward()
    assert stack.blocks[1].linear._parameters["weight"].grad is None or stack.zero_grad() is None


def test_a_model_is_not_kept_alive():
    alive = []

    class Watched(nn.Linear):
        def __del__(self):
            alive.pop()

    model = gated(Watched(3, 3))
    alive.append(True)
    model(torch.ones(1, 3)).sum().backward()
    del model
    gc.collect()
    assert not alive


def test_modules_whose_parts_were_stripped_are_plain_again(stack, inputs):
    for part in (stack.first, *stack.blocks):
        pyprune.strip(part)
    twin, stack.call = copy.deepcopy(stack), None
    assert type(twin) is Stack
    twin.call = None
    assert type(pickle.loads(pickle.dumps(twin))) is Stack

    stack.call = lambda block, x: block(x)
    assert torch.equal(twin.first(inputs[0]), stack.first(inputs[0]))
    stack(inputs[0])
    assert type(stack) is Stack
    assert "_gate_sampler" not in vars(stack)


def test_a_pickled_model_samples_for_itself(stack, inputs):
    stack.call = None
    twin = pickle.loads(pickle.dumps(stack))
    assert type(twin) is type(stack)
    twin.call = stack.call = lambda block, x: block(x)
    assert_equal(run(twin, inputs), run(stack, inputs))
    with one_gate_sample(stack):
        assert not torch.equal(twin.first(inputs[0]), twin.first(inputs[0]))


def test_one_gate_sample_wants_a_module():
    with pytest.raises(TypeError, match=r"model is of type int; give a torch\.nn\.Module"), one_gate_sample(3):
        pass


def test_functional_call_is_a_pass(stack, inputs):
    torch.manual_seed(1)
    expected = stack(inputs[0])
    parameters = {name: parameter.detach() for name, parameter in stack.named_parameters()}
    torch.manual_seed(1)
    assert torch.equal(torch.func.functional_call(stack, parameters, (inputs[0],)), expected)


def test_threads_have_passes_of_their_own(stack, inputs):
    with one_gate_sample(stack):
        outs = in_thread(lambda: [stack.first(inputs[0]) for _ in range(2)])
        assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
def test_strip_leaves_no_trace_of_passes(case, mode):
    classes = [type(module) for module in case.model.modules()]
    attributes = [set(vars(module)) for module in case.model.modules()]
    gated(case.model, mode)
    pyprune.prune(case.model, mode)
    twin = copy.deepcopy(case.model)
    pyprune.strip(case.model)
    assert [type(module) for module in case.model.modules()] == classes
    assert [set(vars(module)) for module in case.model.modules()] == attributes
    twin(case.inputs)
    pyprune.strip(twin)
    assert [type(module) for module in twin.modules()] == classes


def test_unshare_samples_leaves_a_later_parametrization(stack, inputs):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    for module, name in ((stack.blocks[0].linear, "bias"), (stack.first, "bias")):
        nn.utils.parametrize.register_parametrization(module, name, Double())
    stack.scale = nn.Parameter(torch.ones(()))
    nn.utils.parametrize.register_parametrization(stack, "scale", Double())
    unshare_samples(stack)
    assert type(stack).__mro__[1] is Stack
    assert stack.scale == 2
    assert torch.equal(stack.first.bias, 2 * stack.first.parametrizations.bias.original)
    share_samples(stack)
    with one_gate_sample(stack):
        assert torch.equal(stack.first(inputs[0]), stack.first(inputs[0]))
    pyprune.strip(stack)
    assert stack.scale == 2
    assert torch.equal(stack.first.bias, 2 * stack.first.parametrizations.bias.original)


def test_share_samples_keeps_what_a_class_is(stack):
    assert isinstance(stack, Stack)
    assert type(stack).__name__ == "Stack"
    assert type(stack).__module__ == Stack.__module__
    assert isinstance(gated(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))[:1], nn.Sequential)


def test_part_of_a_gated_sequential_can_be_called(device):
    model = gated(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to(device))
    assert model[:1](torch.ones(1, 2, device=device)).shape == (1, 2)


# The compiler looks for gradients of tensors that are no leaves.
OF_TORCH = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def without_dropout(model):
    return model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)


def compile_(what):
    return torch.compile(what, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("mode", [BERNOULLI, HARD_CONCRETE])
@pytest.mark.parametrize("case", ["cnn", "transformer"], indirect=True)
def test_compiled_models_sample_as_eager_ones_and_are_compiled_once(case, mode):
    without_dropout(gated(case.model, mode))
    torch._dynamo.reset()
    for compiled in (compile_(case.model), compile_(lambda x: case.model(x))):
        expected = run(case.model, [case.inputs])
        assert_equal(run(compiled_like(case.model, compiled), [case.inputs]), expected)
        outputs = set()
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(20):
                out = compiled(case.inputs).sum()
                out.backward()
                outputs.add(out.item())
        assert len(outputs) == 20
    assert not any(gate.sampler.is_open for gate in gates_of(case.model))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64, bias=False))

    def forward(self, x):
        return self.inner(x), self.inner(x)


@pytest.mark.parametrize("how", ["compiled", "in place", "a wrapper"])
@pytest.mark.parametrize("by", ["prune", "load_from_config"])
@pytest.mark.parametrize("used", [True, False])
def test_what_was_compiled_before_it_was_pruned_samples_once(how, by, used):
    torch._dynamo.reset()
    model, x = Twice(), torch.eye(64)
    config = pyprune.get_config(pyprune.prune(copy.deepcopy(model), BERNOULLI))
    if how == "in place":
        model.compile(fullgraph=True, backend="aot_eager")
        compiled = model
    else:
        compiled = compile_(model)
    if used:
        compiled(x)
    whole = compiled if how == "a wrapper" else model
    if by == "load_from_config" and how == "a wrapper":
        config["gates"][0]["names"] = ["_orig_mod." + config["gates"][0]["names"][0]]
    whole = pyprune.prune(whole, BERNOULLI) if by == "prune" else pyprune.load_from_config(whole, config)
    for gate in gates_of(whole):
        gate.logits.data.zero_()
    seen = set()
    for _ in range(3):
        one, other = compiled(x)
        assert torch.equal(one, other)
        seen.add(one.sum().item())
    assert len(seen) == 3
    one, other = checkpoint(compiled, x, use_reentrant=False)
    assert torch.equal(one, other)
    pyprune.strip(whole)
    assert type(model) is Twice
    assert type(model.inner) is nn.Sequential
    assert torch.equal(compiled(x)[0], compiled(x)[0])


def compiled_like(model, call):
    """Return what is called like ``call`` and has the parameters of the model."""

    class Like:
        zero_grad, parameters = model.zero_grad, model.parameters

        def __call__(self, x):
            return call(x)

    return Like()


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
def test_compiled_models_sample_as_eager_ones_with_the_default_backend(stack, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._inductor.config

    expected = run(stack, inputs)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        assert_equal(run(compiled_like(stack, torch.compile(stack, fullgraph=True)), inputs), expected)


@OF_TORCH
def test_compiled_models_with_recomputed_blocks_sample_as_eager_ones(stack, inputs):
    expected = run(without_dropout(stack), inputs)
    stack.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    for call in (stack, lambda x: stack(x)):
        torch._dynamo.reset()
        assert_equal(run(compiled_like(stack, compile_(call)), inputs), expected)


@pytest.mark.parametrize("use_reentrant", [True, False, None])
@pytest.mark.parametrize("in_place", [True, False])
@OF_TORCH
def test_compiled_blocks_keep_the_sample_of_an_eager_model(stack, inputs, in_place, use_reentrant):
    expected = run(without_dropout(stack), inputs)
    torch._dynamo.reset()
    if in_place:
        for block in stack.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        compiled = {block: block for block in stack.blocks}
    else:
        compiled = {block: compile_(block) for block in stack.blocks}
    stack.call = lambda block, x: compiled[block](x)
    if use_reentrant is not None:
        stack.call = lambda block, x: checkpoint(compiled[block], x, use_reentrant=use_reentrant)
    for _ in range(2):
        assert_equal(run(stack, inputs), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(run(stack, inputs), expected)


def test_traced_models_sample_once_and_can_be_copied(inputs):
    model = gated(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))))
    twin = copy.deepcopy(model)
    with one_gate_sample(twin):
        assert torch.equal(twin(inputs[0].cpu()), twin(inputs[0].cpu()))
    run_of_copy, run_of_original = ((torch.manual_seed(1), traced(inputs[0].cpu()))[1] for traced in (twin, model))
    assert torch.equal(run_of_copy, run_of_original)
    assert not torch.equal(model(inputs[0].cpu()), model(inputs[0].cpu()))
    pyprune.strip(twin)
    assert isinstance(pyprune.strip(model), torch.fx.GraphModule)


@pytest.mark.parametrize("training", [True, False])
def test_gated_models_can_be_traced(inputs, training):
    model = gated(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), HARD_CONCRETE).train(training)
    traced = torch.fx.symbolic_trace(model)
    out = traced(inputs[0].cpu())
    assert torch.equal(traced(inputs[0].cpu()), out) != training
    torch.testing.assert_close(traced.eval()(inputs[0].cpu()), model.eval()(inputs[0].cpu()))


def test_one_gate_sample_can_be_compiled(stack, inputs):
    def step(x):
        with one_gate_sample(stack):
            return stack.first(x), stack.first(x)

    compiled = compile_(step)
    torch._dynamo.reset()
    for _ in range(3):
        one, other = compiled(inputs[0])
        assert torch.equal(one, other)
    assert not torch.equal(compiled(inputs[0])[0], one)
