"""Beside the original: the same calls on the same modules must leave the same state."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as original

import pyprune.torch_prune as ours
from tests.devices import DEVICES

MODULES = {
    "linear": lambda: nn.Linear(7, 5),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(9, 4),
    "double": lambda: nn.Linear(7, 5).double(),
}
INPUTS = {
    "linear": lambda: torch.randn(3, 7),
    "conv": lambda: torch.randn(2, 4, 5, 5),
    "conv3d": lambda: torch.randn(2, 2, 3, 3, 3),
    "embedding": lambda: torch.randint(9, (6,)),
    "double": lambda: torch.randn(3, 7).double(),
}
AMOUNTS = [0, 1, 3, 0.0, 0.15, 0.25, 0.35, 0.5, 0.9, 1.0]
CALLS = {
    "identity": lambda library, module, amount: library.identity(module, "weight"),
    "l1": lambda library, module, amount: library.l1_unstructured(module, "weight", amount),
    "random": lambda library, module, amount: library.random_unstructured(module, "weight", amount=amount),
    "ln 2": lambda library, module, amount: library.ln_structured(module, "weight", amount, n=2, dim=0),
    "ln 1": lambda library, module, amount: library.ln_structured(module, "weight", amount, 1, -1),
    "ln inf": lambda library, module, amount: library.ln_structured(module, "weight", amount, float("inf"), dim=1),
    "ln -inf": lambda library, module, amount: library.ln_structured(module, "weight", amount, float("-inf"), dim=1),
    "random structured": lambda library, module, amount: library.random_structured(module, "weight", amount, dim=1),
    "custom": lambda library, module, amount: library.custom_from_mask(
        module, "weight", (torch.arange(module.weight.numel()) % 4 > 0).view(module.weight.shape)
    ),
    "global": lambda library, module, amount: library.global_unstructured(
        [(module, "weight")], library.L1Unstructured, amount=amount
    ),
    "scores": lambda library, module, amount: library.l1_unstructured(
        module, "weight", amount, importance_scores=module.weight.detach().cos() - 0.5
    ),
}


def pair(kind):
    torch.manual_seed(0)
    module = MODULES[kind]()
    return module, copy.deepcopy(module)


def outcome(call, library, *arguments, seed=0):
    """Return what a call raised, if it did."""
    torch.manual_seed(seed)
    try:
        call(library, *arguments)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        return type(error)
    return None


def assert_same(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in other.state_dict().items():
        assert one.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(one.state_dict()[name], tensor), name
    for (name, module), (_, twin) in zip(one.named_modules(), other.named_modules(), strict=True):
        assert type(module) is type(twin), name
        assert sorted(vars(module)) == sorted(vars(twin))
        assert [kind(hook) for hook in hooks(module)] == [kind(hook) for hook in hooks(twin)]
        for hook in hooks(twin):
            value = getattr(module, hook._tensor_name)
            assert torch.equal(value, getattr(twin, hook._tensor_name))
            assert value.requires_grad == getattr(twin, hook._tensor_name).requires_grad


def hooks(module):
    return list(module._forward_pre_hooks.values())


def kind(hook):
    name = type(hook).__name__
    if not isinstance(hook, original.PruningContainer):
        return name
    names = [kind(one) for one in hook]
    # Given masks are merged into the last of them; the original keeps all.
    given = [place for place, one in enumerate(names) if one == "CustomFromMask"]
    return [name, *(one for place, one in enumerate(names) if place not in given[:-1])]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("module", MODULES)
def test_every_call_leaves_what_the_original_leaves(module, call, amount):
    mine, theirs = pair(module)
    raised = outcome(CALLS[call], ours, mine, amount)
    assert raised == outcome(CALLS[call], original, theirs, amount)
    if raised:
        assert_same(mine, pair(module)[0])  # there the parameter has moved to the end
        return
    assert_same(mine, theirs)
    x = INPUTS[module]()
    for one in (mine, theirs):
        one(x).square().sum().backward()
    assert_same(mine, theirs)
    for (name, one), (_, other) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    ours.remove(mine, "weight")
    original.remove(theirs, "weight")
    assert mine(x).equal(theirs(x))
    assert torch.equal(mine.weight, theirs.weight)
    assert list(mine.state_dict()) == list(pair(module)[0].state_dict())


@settings(deadline=None, max_examples=60)
@given(
    module=st.sampled_from(sorted(MODULES)),
    calls=st.lists(
        # Channels that have lost an element tie in their smallest.
        st.tuples(st.sampled_from(sorted(set(CALLS) - {"ln -inf"})), st.sampled_from([0, 1, 2, 0.1, 0.3, 0.5])),
        min_size=2,
        max_size=6,
    ),
    forward=st.booleans(),
)
def test_sequences_of_calls_leave_what_the_original_leaves(module, calls, forward):
    mine, theirs = pair(module)
    for seed, (call, amount) in enumerate(calls):
        whole = copy.deepcopy(mine)
        raised = outcome(CALLS[call], ours, mine, amount, seed=seed)
        if raised is not None:
            assert raised == outcome(CALLS[call], original, theirs, amount, seed=seed)
            assert_same(mine, whole)  # there the hook may be gone
            return
        assert outcome(CALLS[call], original, theirs, amount, seed=seed) is None
        assert_same(mine, theirs)
        if forward:
            x = INPUTS[module]()
            assert mine(x).equal(theirs(x))
    assert ours.is_pruned(mine)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_hh_l0"])
def test_lstm_leaves_what_the_original_leaves(name):
    mine = nn.LSTM(5, 4, num_layers=2)
    theirs = copy.deepcopy(mine)
    x = torch.randn(3, 2, 5)
    for library, lstm in ((ours, mine), (original, theirs)):
        library.l1_unstructured(lstm, name, 0.4)
        library.l1_unstructured(lstm, name, 3)
    assert_same(mine, theirs)
    assert mine(x)[0].equal(theirs(x)[0])
    copied = copy.deepcopy(mine)
    assert copied(x)[0].equal(mine(x)[0])
    assert copied._flat_weights[copied._flat_weights_names.index(name)] is getattr(copied, name)
    ours.remove(mine, name)
    assert all(isinstance(weight, nn.Parameter) for weight in mine._flat_weights)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2))


def places(model):
    return [(model[0], "weight"), (model[0], "bias"), (model[3], "weight"), (model[4], "weight")]


class EveryOther(original.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def __init__(self, start):
        self.start = start

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[self.start :: 2] = 0
        return mask


@pytest.mark.parametrize("amounts", [[0.3], [7, 0.5, 0.5], [0.0, 1.0], [0.33, 11, 0.7]])
@pytest.mark.parametrize("method", ["L1Unstructured", "RandomUnstructured"])
@pytest.mark.parametrize("scored", [False, True])
def test_global_unstructured_leaves_what_the_original_leaves(method, amounts, scored):
    mine, theirs = net(), net()
    for library, model in ((ours, mine), (original, theirs)):
        library.l1_unstructured(model[4], "weight", 0.3)
        torch.manual_seed(1)
        for amount in amounts:
            scores = {(model[3], "weight"): model[3].weight.detach().sin() - 0.1} if scored else None
            library.global_unstructured(
                places(model), getattr(library, method), importance_scores=scores, amount=amount
            )
    assert_same(mine, theirs)


@pytest.mark.parametrize("base", [original.BasePruningMethod, ours.BasePruningMethod])
def test_methods_of_users_work_on_tensors_and_globally(base):
    method = type("Method", (base,), dict(vars(EveryOther)))
    mine, theirs = net(), net()
    for library, model in ((ours, mine), (original, theirs)):
        method.apply(model[3], "weight", start=1)
        method.apply(model[3], "weight", 0)
        library.global_unstructured(places(model), method, start=1)
        library.l1_unstructured(model[3], "weight", 3)
    assert_same(mine, theirs)


def test_a_subclass_of_l1_computes_its_own_masks():
    class Largest(ours.L1Unstructured):
        def compute_mask(self, t, default_mask):
            return super().compute_mask(1 / t, default_mask)

    linear = nn.Linear(4, 1)
    linear.weight.data = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    ours.global_unstructured([(linear, "weight")], Largest, amount=1)
    Largest.apply(linear, "weight", amount=1)
    assert linear.weight_mask.tolist() == [[1, 0, 1, 0]]


def test_each_library_recognises_extends_and_removes_what_the_other_put_on():
    for first, second in ((ours, original), (original, ours)):
        linear, parameter = nn.Linear(6, 4), None
        parameter = linear.weight
        first.l1_unstructured(linear, "weight", 0.5)
        assert second.is_pruned(linear)
        second.l1_unstructured(linear, "weight", 0.5)
        first.global_unstructured([(linear, "weight")], second.L1Unstructured, amount=2)
        linear(torch.randn(2, 6)).sum().backward()
        assert int(linear.weight_mask.sum()) == 4
        assert len(hooks(linear)) == 1
        second.remove(linear, "weight")
        assert linear.weight is parameter
        assert not first.is_pruned(linear)
        assert int((linear.weight == 0).sum()) == 20


def test_everything_public_of_the_original_is_here():
    theirs = {name for name, value in vars(original).items() if getattr(value, "__module__", "") == original.__name__}
    assert {name for name in theirs if name[0] != "_"} == set(ours.__all__)
    for name in ours.__all__:
        value = getattr(ours, name)
        assert not isinstance(value, type) or issubclass(value, getattr(original, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_of_equal_scores_the_lowest_index_goes(dtype, device):
    linear = nn.Linear(4, 3, device=device, dtype=dtype)
    nn.init.ones_(linear.weight)
    ours.l1_unstructured(linear, "weight", 5)
    ours.global_unstructured([(linear, "weight"), (linear, "bias")], ours.L1Unstructured, amount=0)
    assert linear.weight_mask.dtype == dtype
    assert (linear.weight_mask.flatten() != 0).tolist() == [False] * 5 + [True] * 7
    ours.l1_unstructured(linear, "weight", 2)
    assert (linear.weight_mask.flatten() != 0).tolist() == [False] * 7 + [True] * 5
    ours.ln_structured(linear, "weight", 1, n=2, dim=0)  # the first row is gone already
    assert (linear.weight_mask.flatten() != 0).tolist() == [False] * 8 + [True] * 4


def test_frobenius_and_nuclear_norms():
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0])).view(3, 3, 1).repeat(1, 1, 2)
    for n in ("fro", "nuc"):
        mask = ours.LnStructured(1, n, dim=0).compute_mask(weight, torch.ones_like(weight))
        assert mask[:, 0, 0].tolist() == [1, 0, 1]


def test_integers_as_scores():
    scores = torch.tensor([[3, -1], [0, 2]])
    linear = ours.l1_unstructured(nn.Linear(2, 2), "weight", 2, importance_scores=scores)
    assert linear.weight_mask.tolist() == [[1, 0], [0, 1]]


def test_nan_and_infinity_count_as_largest():
    values = torch.tensor([[float("nan"), 1.0, float("inf"), 3e38, -float("inf"), 2.0]])
    for removed, lowest in ((3, {1, 3, 5}), (5, {1, 2, 3, 4, 5})):
        linear = nn.Linear(6, 1)
        linear.weight.data = values.clone()
        theirs = copy.deepcopy(linear)
        ours.l1_unstructured(linear, "weight", removed)
        original.l1_unstructured(theirs, "weight", removed)
        assert torch.equal(linear.weight_mask, theirs.weight_mask)
        assert set((linear.weight_mask[0] == 0).nonzero().flatten().tolist()) == lowest


def test_parameters_on_several_devices_compete():
    layers = [nn.Linear(3, 1, device=DEVICES[0]), nn.Linear(3, 1, device=DEVICES[-1])]
    layers[0].weight.data = torch.tensor([[1.0, 5.0, 2.0]], device=DEVICES[0])
    layers[1].weight.data = torch.tensor([[4.0, 3.0, 6.0]], device=DEVICES[-1])
    ours.global_unstructured([(layer, "weight") for layer in layers], ours.L1Unstructured, amount=2)
    ours.global_unstructured([(layer, "weight") for layer in layers], ours.RandomUnstructured, amount=0)
    ours.global_unstructured(((layer, "weight") for layer in layers), ours.L1Unstructured, amount=0.25)
    assert layers[0].weight_mask.tolist() == [[0, 1, 0]]
    assert layers[1].weight_mask.tolist() == [[1, 0, 1]]
    assert layers[1].weight.device.type == DEVICES[-1]


def test_channels_last_weights_are_pruned_and_keep_their_layout():
    for call in CALLS.values():
        conv = nn.Conv2d(4, 6, 3)
        last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
        for one in (conv, last):
            for seed in range(2):
                torch.manual_seed(seed)
                call(ours, one, 0.5)
        assert torch.equal(conv.weight_mask, last.weight_mask)
        for tensor in (last.weight, last.weight_mask, last.weight_orig):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


def trained(module, inputs, steps=1):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("prepare", ["pruned", "trained", "compiled", "loaded"])
def test_deepcopy_has_parameters_and_products_of_its_own(prepare):
    conv, x = ours.l1_unstructured(nn.Conv2d(3, 4, 2), "weight", 0.5), torch.randn(2, 3, 4, 4)
    if prepare == "trained":
        trained(conv, x)
    if prepare == "compiled":
        torch.compile(conv, fullgraph=True, backend="eager")(x).sum().backward()
    if prepare == "loaded":
        conv = pickle.loads(pickle.dumps(conv))
        conv(x)
    for copied in (copy.deepcopy(conv), copy.deepcopy(copy.deepcopy(nn.Sequential(conv)))[0]):
        assert torch.equal(copied.weight, copied.weight_orig * copied.weight_mask)
        before = copied.weight_orig.grad
        copied.weight.sum().backward()
        assert torch.equal(copied.weight_orig.grad - (0 if before is None else before), conv.weight_mask)
        assert copied(x).equal(conv(x))
        copied.weight_orig.data.zero_()
        assert conv(x).count_nonzero() > 0


def test_modules_and_states_are_saved_and_loaded():
    conv = ours.l1_unstructured(ours.ln_structured(nn.Conv2d(3, 4, 2), "weight", 0.5, 2, 0), "weight", 2)
    conv(torch.ones(1, 3, 2, 2))
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same(loaded, conv)
    ours.remove(loaded, "weight")
    fresh = ours.identity(nn.Conv2d(3, 4, 2), "weight")
    fresh.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert fresh(x).equal(conv(x))
    assert loaded(x).equal(conv(x))


def test_output_projection_of_attention_is_up_to_date_at_each_reading():
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    dense_class = type(attention.out_proj)
    ours.l1_unstructured(attention.out_proj, "weight", 0.5)
    ours.l1_unstructured(attention.out_proj, "bias", 2)
    ours.global_unstructured(
        [(attention, "in_proj_weight"), (attention.out_proj, "weight")], ours.L1Unstructured, amount=0.5
    )
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        attention(x, x, x)[0].square().sum().backward()
        optimizer.step()
    projection = attention.out_proj
    assert torch.equal(projection.weight, projection.weight_orig * projection.weight_mask)
    assert (projection.weight_orig.grad[projection.weight_mask == 0] == 0).all()
    expected = attention(x, x, x)[0]
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert copied(x, x, x)[0].equal(expected)
    ours.remove(projection, "weight")
    assert type(projection) is not dense_class
    original.remove(projection, "bias")
    assert type(projection) is dense_class
    assert [name for name, _ in projection.named_parameters()] == ["weight", "bias"]
    assert attention(x, x, x)[0].equal(expected)


def test_pruning_again_looks_at_the_weights_as_they_are():
    linear = ours.l1_unstructured(nn.Linear(4, 1), "weight", 1)
    linear.weight_orig.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    linear.weight_mask.copy_(torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    ours.l1_unstructured(linear, "weight", 1)
    ours.global_unstructured([(linear, "weight")], ours.L1Unstructured, amount=1)
    assert linear.weight_mask.tolist() == [[0, 1, 0, 0]]


def test_remove_puts_parameters_back_in_their_places():
    linear = nn.Linear(3, 2)
    before = dict(linear.named_parameters())
    for name in ("bias", "weight", "weight"):
        ours.l1_unstructured(linear, name, 1)
    for name in ("weight", "bias"):
        ours.remove(linear, name)
    after = dict(linear.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_later_hook_takes_the_place_of_the_one_before():
    linear, seen = ours.l1_unstructured(nn.Linear(4, 2), "weight", 1), []
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(int((module.weight == 0).sum())))
    ours.l1_unstructured(linear, "weight", 2)
    linear(torch.ones(1, 4))
    assert seen == [3]


WRONG = {
    "amount is no number": (ValueError, lambda: ours.l1_unstructured(nn.Linear(2, 2), "weight", 1.5), r"\[0, 1\]"),
    "amount is a string": (TypeError, lambda: ours.random_unstructured(nn.Linear(2, 2), "weight", "all"), "amount"),
    "amount is negative": (ValueError, lambda: ours.ln_structured(nn.Linear(2, 2), "weight", -1, 2, 0), "amount"),
    "no such parameter": (AttributeError, lambda: ours.identity(nn.Linear(2, 2), "wait"), "wait"),
    "no parameter at all": (TypeError, lambda: ours.identity(nn.Linear(2, 2, bias=False), "bias"), "NoneType"),
    "a buffer": (TypeError, lambda: ours.identity(nn.BatchNorm1d(2), "running_mean"), "name of a parameter"),
    "one dimension": (ValueError, lambda: ours.ln_structured(nn.Linear(2, 2), "bias", 1, 2, 0), "two dimensions"),
    "no such dimension": (IndexError, lambda: ours.ln_structured(nn.Linear(2, 2), "weight", 1, 2, 2), "-2 to 1"),
    "mask of another shape": (
        ValueError,
        lambda: ours.custom_from_mask(nn.Linear(2, 2), "weight", torch.ones(2)),
        r"\(2, 2\)",
    ),
    "scores of another shape": (
        ValueError,
        lambda: ours.l1_unstructured(nn.Linear(2, 2), "weight", 1, torch.ones(4)),
        r"\(2, 2\)",
    ),
    "t of another shape": (
        ValueError,
        lambda: ours.L1Unstructured(1).prune(torch.ones(2), importance_scores=torch.ones(3)),
        r"\(2,\)",
    ),
    "nothing": (ValueError, lambda: ours.global_unstructured([], ours.L1Unstructured, amount=1), "empty"),
    "no pairs": (TypeError, lambda: ours.global_unstructured(3, ours.L1Unstructured, amount=1), "pairs"),
    "structured": (
        TypeError,
        lambda: ours.global_unstructured([(nn.Linear(2, 2), "weight")], ours.LnStructured, amount=1, n=2),
        "unstructured",
    ),
    "scores in a list": (
        TypeError,
        lambda: ours.global_unstructured([(nn.Linear(2, 2), "weight")], ours.L1Unstructured, [], amount=1),
        "dict",
    ),
    "twice": (
        ValueError,
        lambda: ours.global_unstructured([(layer := nn.Linear(2, 2), "bias"), (layer, "bias")], None),
        "once",
    ),
    "not pruned": (ValueError, lambda: ours.remove(nn.Linear(2, 2), "weight"), "pruned"),
    "another parameter": (
        ValueError,
        lambda: ours.PruningContainer(ours.identity(nn.Linear(2, 2), "bias")._forward_pre_hooks.popitem()[1])
        .add_pruning_method(ours.identity(nn.Linear(2, 2), "weight")._forward_pre_hooks.popitem()[1]),
        "bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_errors_that_say_so(case):
    error, call, said = WRONG[case]
    with pytest.raises(error, match=said):
        call()


class Fails(ours.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def __init__(self, mask):
        self.mask = mask

    def compute_mask(self, t, default_mask):
        if self.mask is None:
            raise RuntimeError("no mask")
        return self.mask


@pytest.mark.parametrize("already", [False, True])
def test_calls_that_fail_change_nothing(already, unchanged):
    model = net()
    if already:
        ours.l1_unstructured(model[3], "weight", 0.5)
        ours.global_unstructured(places(model), ours.L1Unstructured, amount=0.5)
    before, hooks_before = unchanged(model), [hooks(module) for module in model.modules()]
    weight = model[3].weight
    for error, call in (
        (ValueError, lambda: ours.l1_unstructured(model[3], "weight", 81)),
        (ValueError, lambda: ours.ln_structured(model[3], "weight", 17, 2, 1)),
        (ValueError, lambda: ours.global_unstructured(places(model), ours.L1Unstructured, amount=1000)),
        (RuntimeError, lambda: Fails.apply(model[3], "weight", None)),
        (RuntimeError, lambda: Fails.apply(model[3], "weight", torch.ones(3))),
        ((TypeError, AttributeError), lambda: Fails.apply(model[3], "weight", "mask")),
        (RuntimeError, lambda: ours.global_unstructured(places(model), Fails, mask=None)),
    ):
        with pytest.raises(error):
            call()
        before.check()
        assert [hooks(module) for module in model.modules()] == hooks_before
        assert model[3].weight is weight


GIVEN = {
    "global L1": lambda library, net, step: library.global_unstructured(
        places(net), library.L1Unstructured, amount=3
    ),
    "custom": lambda library, net, step: library.custom_from_mask(
        net[3], "weight", torch.rand(net[3].weight.shape, generator=torch.Generator().manual_seed(step)) > 0.05
    ),
    "between others": lambda library, net, step: (
        library.l1_unstructured(net[3], "weight", 1),
        library.global_unstructured(places(net), library.L1Unstructured, amount=2),
    ),
}


@pytest.mark.parametrize("library", [ours, original], ids=["ours", "begun by the original"])
@pytest.mark.parametrize("case", GIVEN)
def test_masks_of_earlier_rounds_are_not_kept(case, library):
    mine, theirs = net(), net()
    counts = []
    for step in range(8):
        GIVEN[case](library if step < 2 else ours, mine, step)
        GIVEN[case](original, theirs, step)
        counts.append(sum(hasattr(one, "mask") for hook in hooks(mine[3]) for one in hook) if step else 1)
    assert counts[2:] == [1] * 6
    assert_same(mine, theirs)
    (container,) = hooks(mine[3])
    merged = next(one for one in container if isinstance(one, original.CustomFromMask)).mask
    given = [one.mask for one in hooks(theirs[3])[0] if isinstance(one, original.CustomFromMask)]
    assert torch.equal(merged != 0, torch.stack([mask != 0 for mask in given]).all(0))


class Inverted(ours.CustomFromMask):
    """What a subclass makes of its mask is its own affair."""

    def compute_mask(self, t, default_mask):
        return default_mask * (1 - self.mask)


def test_masks_of_subclasses_stay_by_themselves():
    linear = nn.Linear(3, 2)
    Inverted.apply(linear, "weight", torch.eye(2, 3))
    ours.custom_from_mask(linear, "weight", torch.ones(2, 3))
    (container,) = hooks(linear)
    assert [type(one) for one in container] == [Inverted, ours.CustomFromMask]
    with pytest.raises(ValueError, match="give one of the parameter's"):
        ours.custom_from_mask(linear, "weight", torch.ones(3))


def weight_from(kind, layer):
    """Put a hook of torch on a layer that makes its weight, and return the name of what is trained, and the rule."""
    if kind == "spectral_norm":
        nn.utils.spectral_norm(layer)
        return "weight_orig", lambda orig: orig / torch.dot(layer.weight_u, (orig.flatten(1) @ layer.weight_v))
    nn.utils.weight_norm(layer)
    shape = [-1] + [1] * (layer.weight_v.dim() - 1)
    norm = lambda v: v.flatten(1).norm(dim=1).view(shape)  # noqa: E731
    if kind == "weight_g":
        return "weight_g", lambda g: g * layer.weight_v / norm(layer.weight_v)
    return "weight_v", lambda v: layer.weight_g * v / norm(v)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.weight_norm.")
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv1d(3, 4, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["weight_v", "weight_g", "spectral_norm"])
@pytest.mark.parametrize("begun_by", [ours, original], ids=["ours", "original"])
def test_weights_that_torch_makes_of_a_pruned_parameter_are_fresh(kind, make, begun_by):
    torch.manual_seed(0)
    layer = make()
    name, rule = weight_from(kind, layer)
    begun_by.l1_unstructured(layer, name, 0.25)
    ours.l1_unstructured(layer, name, 0.3)
    x = torch.randn(5, 6) if isinstance(layer, nn.Linear) else torch.randn(5, 3, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        pruned = getattr(layer, name + "_orig") * getattr(layer, name + "_mask")
        torch.testing.assert_close(layer.weight, rule(pruned))
        optimizer.step()
    ours.remove(layer, name)
    assert isinstance(getattr(layer, name), nn.Parameter)
    layer(x).sum().backward()
