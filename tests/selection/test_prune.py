import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune
from pyprune import HardConcreteGate, IgnoredScope, PruneMode, StochasticGate
from pyprune.modules.gates import gates_of
from pyprune.modules.holding import Hold
from pyprune.modules.masks import masks_by_target, masks_in
from pyprune.modules.targets import attachments_of, find_targets
from pyprune.selection.prune import update_masks
from tests.conftest import attached, masks_of

LOCAL, GLOBAL = PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
BERNOULLI, HARD_CONCRETE = PruneMode.UNSTRUCTURED_REGULARIZATION_BASED, PruneMode.UNSTRUCTURED_HARD_CONCRETE
GATES = {BERNOULLI: StochasticGate, HARD_CONCRETE: HardConcreteGate}


def expected_masks(weights, mode, ratio):
    """Plain NumPy: stable sort of |w| per tensor, or of |w| / ||W||_2 over all."""
    scores = [np.abs(weight.ravel()) for weight in weights]
    if mode is GLOBAL:
        scales = [np.float64(1) / np.linalg.norm(weight.astype(np.float64)) for weight in weights]
        scaled = [(s.astype(np.float64) * f).astype(np.float32) for s, f in zip(scores, scales, strict=True)]
        scores = [np.concatenate(scaled)]
    kept = []
    for score in scores:
        keep = np.ones(score.size, dtype=bool)
        count = min(math.floor(ratio * score.size + 0.5), score.size - 1)
        keep[np.argsort(score, kind="stable")[:count]] = False
        kept.append(keep)
    flat = np.concatenate(kept)
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(flat, ends), weights, strict=True)]


@pytest.mark.parametrize("ratio", [0, 0.3, 0.9])
@pytest.mark.parametrize("mode", [LOCAL, GLOBAL])
def test_prune_masks_what_numpy_masks(case, mode, ratio):
    weights = [target.parameter.detach().cpu().numpy().copy() for target in find_targets(case.model)]
    assert pyprune.prune(case.model, mode, ratio=ratio) is case.model
    masks = [mask.cpu().numpy() for mask in masks_of(case.model).values()]
    for mask, expected in zip(masks, expected_masks(weights, mode, ratio), strict=True):
        np.testing.assert_array_equal(mask, expected)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ratio=st.floats(0, 1, exclude_max=True),
    mode=st.sampled_from([LOCAL, GLOBAL]),
)
def test_prune_removes_the_exact_count(sizes, ratio, mode):
    # Rounded values: many ties.
    model = nn.ModuleList([nn.Linear(size, 1, bias=False) for size in sizes])
    for module in model:
        module.weight.data = module.weight.data.mul(4).round()
    pyprune.prune(model, mode, ratio=ratio, ignored_scope=IgnoredScope(all_zero=False))
    removed = [int((~mask).sum()) for mask in masks_of(model).values()]
    if mode is LOCAL:
        assert removed == [min(math.floor(ratio * size + 0.5), size - 1) for size in sizes]
    else:
        assert sum(removed) == min(math.floor(ratio * sum(sizes) + 0.5), sum(sizes) - 1)


def test_prune_accepts_the_name_of_the_mode(cnn):
    by_name = pyprune.prune(copy.deepcopy(cnn.model), "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    by_member = pyprune.prune(cnn.model, GLOBAL, ratio=0.5)
    for one, other in zip(masks_of(by_name).values(), masks_of(by_member).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_prune_keeps_the_dtype(case, dtype):
    case.model.to(dtype)
    pyprune.prune(case.model, GLOBAL, ratio=0.5)
    for target, mask in masks_of(case.model).items():
        assert mask.dtype == torch.bool
        for owner in target.owners:
            weight = getattr(owner.module, owner.attribute)
            assert weight.dtype == dtype
            assert torch.equal(weight, target.parameter * mask)


def test_prune_gives_the_mask_the_layout_of_the_weight(cnn):
    plain = pyprune.prune(copy.deepcopy(cnn.model), GLOBAL, ratio=0.5)
    cnn.model.to(memory_format=torch.channels_last)
    strides = cnn.model.conv1.weight.stride()
    pyprune.prune(cnn.model, GLOBAL, ratio=0.5)
    assert cnn.model.conv1.weight.stride() == strides
    for target, mask in masks_of(cnn.model).items():
        assert mask.stride() == target.parameter.stride()
    for one, other in zip(masks_of(cnn.model).values(), masks_of(plain).values(), strict=True):
        assert torch.equal(one, other)


def test_prune_again_reads_the_raw_weights_and_reuses_the_masks(cnn):
    pyprune.prune(cnn.model, LOCAL, ratio=0.9)
    masks = {target.name: mask for target, mask in masks_by_target(cnn.model).items()}
    pyprune.prune(cnn.model, LOCAL, ratio=0.25)
    assert {target.name: mask for target, mask in masks_by_target(cnn.model).items()} == masks
    for mask in masks_of(cnn.model).values():
        assert int((~mask).sum()) == math.floor(0.25 * mask.numel() + 0.5)
    pyprune.prune(cnn.model, LOCAL, ratio=0)
    assert all(mask.all() for mask in masks_of(cnn.model).values())


def test_prune_again_lets_a_weight_come_back():
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    pyprune.prune(linear, LOCAL, ratio=0.5)
    assert linear.weight.tolist() == [[0.0, 2.0]]
    linear.weight.data = torch.tensor([[1.0, 0.5]])
    pyprune.prune(linear, LOCAL, ratio=0.5)
    assert linear.weight.tolist() == [[1.0, 0.0]]


def test_prune_again_leaves_a_mask_that_is_now_ignored(cnn):
    pyprune.prune(cnn.model, LOCAL, ratio=0.9)
    before = attached(cnn.model.fc).mask.clone()
    pyprune.prune(cnn.model, LOCAL, ratio=0.1, ignored_scope=IgnoredScope(names=["fc"]))
    assert torch.equal(attached(cnn.model.fc).mask, before)
    assert attached(cnn.model.conv1).mask.float().mean() > 0.8


def test_prune_again_masks_a_new_owner_of_a_tied_weight():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    pyprune.prune(model, LOCAL, ratio=0.5)
    model["c"] = nn.Linear(4, 4)
    model["c"].weight = model["a"].weight
    pyprune.prune(model, LOCAL, ratio=0.75)
    assert attached(model["c"]) is attached(model["a"])
    assert int(model["c"].weight.count_nonzero()) == 4


def test_prune_counts_a_tied_weight_once(transformer):
    targets = find_targets(transformer.model)
    assert "decoder.weight" not in [target.name for target in targets]
    pyprune.prune(transformer.model, GLOBAL, ratio=0.5)
    total = sum(target.parameter.numel() for target in targets)
    removed = sum(int((~mask).sum()) for mask in masks_of(transformer.model).values())
    assert removed == math.floor(0.5 * total + 0.5)
    assert len(masks_in(transformer.model)) == len(targets)
    assert torch.equal(transformer.model.embed.weight, transformer.model.decoder.weight)


def test_prune_copes_with_empty_and_single_elements():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.ModuleList([nn.Linear(0, 3), nn.Linear(1, 1)])
    for mode in (LOCAL, GLOBAL):
        pyprune.prune(model, mode, ratio=0.9)
        assert model[1].weight.item() != 0


def test_prune_finds_bare_parameters_with_examples_inputs():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x @ self.kernel + self.shift

    model = Bare()
    with pytest.raises(ValueError, match="give examples_inputs"):
        pyprune.prune(model, LOCAL, ratio=0.5)
    pyprune.prune(model, LOCAL, ratio=0.5, examples_inputs=torch.randn(2, 4))
    assert int(model.kernel.count_nonzero()) == 8
    assert int(model.shift.count_nonzero()) == 4
    # What carries a mask is a target from now on.
    pyprune.prune(model, LOCAL, ratio=0.25)
    assert int(model.kernel.count_nonzero()) == 12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", [LOCAL, GLOBAL])
def test_prune_names_nonfinite_weights_and_changes_nothing(case, mode, value, unchanged):
    targets = find_targets(case.model)
    for target in (targets[0], targets[-1]):
        target.parameter.data.view(-1)[:2] = value
    dense = unchanged(case.model)
    with pytest.raises(ValueError, match=rf"2 in {targets[0].name}, 2 in {targets[-1].name}"):
        pyprune.prune(case.model, mode, ratio=0.5)
    dense.check()


def test_prune_leaves_old_masks_when_a_weight_is_not_finite(case, unchanged):
    pyprune.prune(case.model, GLOBAL, ratio=0.5)
    with torch.no_grad():
        find_targets(case.model)[1].parameter.view(-1)[0] = math.nan
    case.model.eval()(case.inputs)
    pruned = unchanged(case.model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pyprune.prune(case.model, GLOBAL, ratio=0.1)
    pruned.check()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mode": "nothing"}, ValueError),
        ({"mode": None}, TypeError),
        ({"ratio": 1.0}, ValueError),
        ({"ratio": -0.1}, ValueError),
        ({"ratio": math.nan}, ValueError),
        ({"ratio": None}, TypeError),
        ({"ratio": True}, TypeError),
        ({"model": "model"}, TypeError),
        ({"ignored_scope": ["fc"]}, TypeError),
        ({"ignored_scope": IgnoredScope(names=["nowhere"])}, ValueError),
        ({"ignored_scope": IgnoredScope(types=["ConvNet"])}, ValueError),
        ({"examples_inputs": [torch.zeros(1)]}, TypeError),
        ({"examples_inputs": torch.zeros(1, 5, 5, 5)}, RuntimeError),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_prune_with_wrong_arguments_changes_nothing(cnn, arguments, error, masked, unchanged):
    if masked:
        pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    before = unchanged(cnn.model)
    arguments = {"model": cnn.model, "mode": LOCAL, "ratio": 0.7} | arguments
    model, mode = arguments.pop("model"), arguments.pop("mode")
    with pytest.raises(error):
        pyprune.prune(model, mode, **arguments)
    before.check()


@pytest.mark.parametrize("failing_call", [0, 1, 2])
def test_prune_takes_masks_off_again_when_attaching_fails(case, failing_call, unchanged, monkeypatch):
    put_on = Hold.put_on
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == failing_call + 1:
            raise RuntimeError("no room")
        put_on(*args)

    before = unchanged(case.model)
    outputs = case.model.eval()(case.inputs)
    case.model.train()
    monkeypatch.setattr(Hold, "put_on", fail)
    with pytest.raises(RuntimeError, match="no room"):
        pyprune.prune(case.model, LOCAL, ratio=0.5)
    before.check()
    assert torch.equal(case.model.eval()(case.inputs), outputs)


def test_a_weight_that_is_tied_later_takes_its_mask_along(cnn):
    pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    cnn.model.twin = nn.Linear(6, 3)
    cnn.model.twin.weight = cnn.model.fc.weight
    assert attached(cnn.model.twin) is attached(cnn.model.fc)
    pyprune.prune(cnn.model, LOCAL, ratio=0.9)
    assert int((cnn.model.twin.weight == 0).sum()) == 16
    pyprune.strip(cnn.model)
    assert not masks_in(cnn.model)


def test_prune_in_global_mode_wants_one_device(cnn, monkeypatch, unchanged):
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")
        is_cuda = True

    monkeypatch.setattr("pyprune.ops.CUDA_KERNELS_LOADED", True)
    cnn.model.fc.weight = Elsewhere(cnn.model.fc.weight.data)
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"the weights are on (cpu|cuda:0), cuda:1"):
        pyprune.prune(cnn.model, GLOBAL, ratio=0.5)
    before.check()


def test_prune_under_inference_mode_leaves_masks_to_train_with(case):
    with torch.inference_mode():
        pyprune.prune(case.model, LOCAL, ratio=0.5)
    assert not any(mask.is_inference() for mask in masks_of(case.model).values())
    case.model(case.inputs).sum().backward()
    pyprune.prune(case.model, LOCAL, ratio=0.7)
    with torch.inference_mode():
        pyprune.prune(case.model, LOCAL, ratio=0.2)
        stripped = pyprune.strip(case.model, do_copy=True)
    assert not any(parameter.is_inference() for parameter in stripped.parameters())


def test_a_late_tie_makes_one_mask_of_two():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    pyprune.prune(model, LOCAL, ratio=0.5)
    model[1].weight = model[0].weight
    assert attached(model[0]) is attached(model[1])
    pyprune.prune(model, LOCAL, ratio=0.75)
    assert int(model[1].weight.count_nonzero()) == 4
    pyprune.strip(model)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("mode", GATES)
def test_prune_puts_open_gates_on_all_weights(case, mode):
    targets = find_targets(case.model)
    assert pyprune.prune(case.model, mode.value) is case.model
    assert [target.name for target in attachments_of(case.model)] == [target.name for target in targets]
    for target, gate in attachments_of(case.model).items():
        assert type(gate) is GATES[mode]
        assert gate.shape == gate.gate_shape == tuple(target.parameter.shape)
        assert gate.logits.dtype == torch.float32
        assert gate.logits.device == target.parameter.device
        torch.testing.assert_close(torch.sigmoid(gate.logits + gate.shift), torch.full_like(gate.logits, 0.99))
        assert not gate.same_on_all_ranks
    assert len(gates_of(case.model)) == len(targets)


@pytest.mark.parametrize("mode", GATES)
def test_prune_in_evaluation_leaves_the_outputs_where_gates_are_open(case, mode):
    dense = copy.deepcopy(case.model).eval()
    pyprune.prune(case.model, mode).eval()
    torch.testing.assert_close(case.model(case.inputs), dense(case.inputs))


@pytest.mark.parametrize("mode", GATES)
def test_prune_again_keeps_what_gates_learned(cnn, mode):
    pyprune.prune(cnn.model, mode, ignored_scope=IgnoredScope(names=["fc"]))
    gate = attached(cnn.model.conv1)
    gate.logits.data.normal_()
    learned = gate.logits.detach().clone()
    pyprune.prune(cnn.model, mode, same_on_all_ranks=True)
    assert attached(cnn.model.conv1) is gate
    assert torch.equal(gate.logits, learned)
    assert attached(cnn.model.fc).same_on_all_ranks


@pytest.mark.parametrize("mode", GATES)
def test_prune_gates_float64_and_half_weights(cnn, mode):
    for dtype in (torch.float64, torch.float16):
        model = copy.deepcopy(cnn.model).to(dtype)
        pyprune.prune(model, mode)
        model(cnn.inputs.to(dtype)).sum().backward()
        assert all(gate.logits.grad.dtype == torch.float32 for gate in gates_of(model))


@pytest.mark.parametrize("mode", GATES)
def test_prune_warns_of_a_ratio_for_gates_and_says_where_it_belongs(cnn, mode, unchanged):
    before = unchanged(cnn.model)
    with pytest.raises(UserWarning, match="the target belongs to RBLoss or LagrangianLoss"):
        pyprune.prune(cnn.model, mode, ratio=0.5)
    with pytest.raises(ValueError, match="ratio is 2"):
        pyprune.prune(cnn.model, mode, ratio=2)
    before.check()
    with pytest.warns(UserWarning, match="ratio does nothing") as warned:
        pyprune.prune(cnn.model, mode, ratio=0.5)
    assert warned[0].filename == __file__
    assert gates_of(cnn.model)


@pytest.mark.parametrize("old", [LOCAL, *GATES])
@pytest.mark.parametrize("new", [LOCAL, *GATES])
def test_prune_refuses_another_kind_on_the_same_weight(cnn, old, new, unchanged):
    ratios = {LOCAL: {"ratio": 0.5}}
    pyprune.prune(cnn.model, old, **ratios.get(old, {}), ignored_scope=IgnoredScope(names=["fc"]))
    before = unchanged(cnn.model)
    if old is not new:
        with pytest.raises(ValueError, match=r"conv1\.weight carries a \w+, this mode would put a \w+"):
            pyprune.prune(cnn.model, new, **ratios.get(new, {}))
        before.check()
    pyprune.prune(cnn.model, new, **ratios.get(new, {}), ignored_scope=IgnoredScope(patterns=["conv.*"]))
    assert len(attachments_of(cnn.model)) == 3
    cnn.model(cnn.inputs).sum().backward()


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_prune_puts_no_gate_on_nonfinite_weights(case, mode, value, unchanged):
    targets = find_targets(case.model)
    targets[-1].parameter.data.view(-1)[:2] = value
    dense = unchanged(case.model)
    with pytest.raises(ValueError, match=rf"2 in {targets[-1].name}"):
        pyprune.prune(case.model, mode)
    dense.check()


@pytest.mark.parametrize("failing_call", [0, 2])
def test_prune_takes_gates_off_again_when_attaching_fails(case, failing_call, unchanged, monkeypatch):
    put_on = pyprune.StochasticGate.put_on
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == failing_call + 1:
            raise RuntimeError("no room")
        put_on(*args)

    before = unchanged(case.model)
    monkeypatch.setattr(pyprune.StochasticGate, "put_on", fail)
    with pytest.raises(RuntimeError, match="no room"):
        pyprune.prune(case.model, BERNOULLI)
    before.check()


def test_prune_leaves_the_model_as_it_was_when_passes_fail(case, unchanged, monkeypatch):
    before = unchanged(case.model)
    with monkeypatch.context() as patch:
        patch.setattr("pyprune.modules.forward_pass.class_with_gates", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pyprune.prune(case.model, BERNOULLI)
    before.check()
    pyprune.prune(case.model, BERNOULLI)(case.inputs)


def test_prune_does_not_show_its_classes_to_a_registry():
    registry = {}

    class Base(nn.Module):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            assert tag not in registry
            registry[tag] = cls

    class Net(Base, tag="net"):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def __setattr__(self, name, value):
            assert not name.startswith("_gate")
            super().__setattr__(name, value)

    model = pyprune.prune(Net(), BERNOULLI)
    assert registry == {"net": Net}
    pyprune.strip(copy.deepcopy(model))
    pyprune.strip(model)
    assert registry == {"net": Net}

    class Layer(nn.Linear, Base, tag="layer"):
        pass

    model = pyprune.prune(nn.Sequential(nn.Linear(4, 4), Layer(4, 4)), BERNOULLI)
    assert isinstance(model[1], Layer)
    assert registry == {"net": Net, "layer": Layer}


def test_prune_changes_nothing_where_a_class_refuses_to_have_subclasses(unchanged):
    class Final(type):
        def __new__(cls, name, bases, namespace):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("this class is final")
            return super().__new__(cls, name, bases, namespace)

    class Layer(nn.Linear, metaclass=Final):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Layer(4, 4))
    before = unchanged(model)
    with pytest.raises(TypeError, match="this class is final"):
        pyprune.prune(model, BERNOULLI)
    before.check()


def test_prune_keeps_no_class_alive():
    class Net(nn.Sequential):
        pass

    pyprune.prune(Net(nn.Linear(2, 2)), BERNOULLI)
    seen = weakref.ref(Net)
    del Net
    gc.collect()  # the subclass, which refers to the class
    gc.collect()
    assert seen() is None


def test_prune_puts_no_gates_into_distributed_data_parallel(tmp_path, unchanged):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        model = wrap(nn.Sequential(nn.Linear(4, 4)))
        before = unchanged(model)
        config = pyprune.get_config(pyprune.prune(copy.deepcopy(model.module), BERNOULLI))
        config["gates"][0]["names"] = ["module.0.weight"]
        for put_on in (lambda: pyprune.prune(model, BERNOULLI), lambda: pyprune.load_from_config(model, config)):
            with pytest.raises(ValueError, match="put gates on first, then wrap"):
                put_on()
            before.check()
        pyprune.prune(model, LOCAL, ratio=0.5)
        gated = wrap(pyprune.prune(nn.Sequential(nn.Linear(4, 4)), BERNOULLI))
        pyprune.prune(gated, BERNOULLI)(torch.ones(1, 4)).sum().backward()
        pyprune.strip(gated)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [LOCAL, *GATES])
def test_prune_takes_a_compiled_layer(mode):
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    options = {"ratio": 0.5} if mode is LOCAL else {}
    (target,) = attachments_of(pyprune.prune(compiled, mode, **options))
    assert [owner.name for owner in target.owners] == ["weight"]  # as in the plain layer
    compiled(torch.ones(1, 4))
    pyprune.strip(compiled)
    assert type(compiled._orig_mod) is nn.Linear
    compiled(torch.ones(1, 4))


def test_prune_warns_that_masks_are_the_same_on_all_ranks_anyway(cnn, unchanged):
    before = unchanged(cnn.model)
    with pytest.raises(UserWarning, match="same_on_all_ranks does nothing in mode UNSTRUCTURED_MAGNITUDE_LOCAL"):
        pyprune.prune(cnn.model, LOCAL, ratio=0.5, same_on_all_ranks=True)
    before.check()


@pytest.mark.parametrize("mode", [LOCAL, GLOBAL])
def test_update_masks_does_what_prune_does_to_masks_and_leaves_the_rest(cnn, mode):
    scope = IgnoredScope(names=["fc"])
    pyprune.prune(cnn.model, LOCAL, ratio=0.9, ignored_scope=scope)
    pyprune.prune(cnn.model, BERNOULLI, ignored_scope=IgnoredScope(patterns=["conv.*"]))
    twin = pyprune.prune(copy.deepcopy(cnn.model), mode, ratio=0.3, ignored_scope=scope)
    update_masks(cnn.model, mode.value, 0.3)
    assert len(masks_of(cnn.model)) == 2
    for one, other in zip(masks_of(cnn.model).values(), masks_of(twin).values(), strict=True):
        assert torch.equal(one, other)
    assert len(gates_of(cnn.model)) == 1


def test_update_masks_says_what_is_wrong_and_changes_nothing(cnn, unchanged):
    with pytest.raises(ValueError, match="carries no masks"):
        update_masks(pyprune.prune(copy.deepcopy(cnn.model), BERNOULLI), LOCAL, 0.5)
    pyprune.prune(cnn.model, LOCAL, ratio=0.9)
    with torch.no_grad():
        cnn.model.conv2.weight[0, 0] = math.nan
    cnn.model.eval()(cnn.inputs)
    before = unchanged(cnn.model)
    for mode, ratio, text in ((BERNOULLI, 0.5, "masks are computed by"), (LOCAL, 1.0, "ratio"), (LOCAL, 0.5, "NaN")):
        with pytest.raises(ValueError, match=text):
            update_masks(cnn.model, mode, ratio)
    before.check()
