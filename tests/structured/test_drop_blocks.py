import copy
import json
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Dataset, drop_blocks
from pyprune.structured.blocks import Bypass, find_blocks, repeated
from pyprune.structured.replay import replay
from tests.conftest import Unchanged

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds something to its input; it knows its number, and returns what it is told to."""

    def __init__(self, layer_idx=0, width=8, form="tensor"):
        super().__init__()
        self.layer_idx, self.form = layer_idx, form
        self.inner = nn.Linear(width, width)

    def forward(self, hidden, scale=None):
        hidden = hidden + self.inner(hidden).tanh()
        return {"tensor": hidden, "tuple": (hidden, None), "dict": {"hidden": hidden}}[self.form]


class Stack(nn.Module):
    """Blocks in a list, gone through in order."""

    def __init__(self, count=4, form="tensor"):
        super().__init__()
        self.num_layers, self.layer_types = count, [f"type{i}" for i in range(count)]
        self.layers = nn.ModuleList(Block(i, form=form) for i in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, hidden):
        for number, layer in enumerate(self.layers):
            assert layer.layer_idx == number
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden)


class ByNumber(Stack):
    """Asks for its blocks by numbers that are written in its code."""

    def forward(self, hidden):
        hidden = self.layers[1](self.layers[0](hidden))
        return self.head(self.layers[3](self.layers[2](hidden)) + hidden)


class Attributes(nn.Module):
    """Blocks that are in no list."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.first, self.second = Block(0, form=form), Block(1, form=form)

    def forward(self, hidden):
        hidden = self.first(hidden)
        hidden = self.second(hidden=hidden[0] if isinstance(hidden, tuple) else hidden, scale=2)
        return hidden[0] if isinstance(hidden, tuple) else hidden


class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])
        self.twice = nn.ModuleList([Block(), Block()])

    def forward(self, hidden):
        for _ in range(3):
            hidden = self.layers[0](hidden)
        return self.twice[1](self.twice[0](hidden) + self.twice[0](hidden * 2))


class Towers(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = Stack(3)

    def forward(self, one, other):
        return self.encoder(one) - self.encoder(other)


class Residual(nn.Module):
    """A block of a ResNet, which writes into what it is given."""

    def __init__(self, inputs=8, outputs=8, stride=1):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        x = self.relu(x)
        out = self.norm(self.conv(x))
        out += self.shortcut(x)
        return out


def resnet():
    stages = [nn.Sequential(Residual(8, 8), Residual(8, 8)), nn.Sequential(Residual(8, 16, 2), Residual(16, 16))]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def without(model, names, *args, **keywords):
    """Return what a model puts out with blocks bypassed by hooks."""
    model = copy.deepcopy(model).eval()
    given = {}

    def before(module, args, keywords):
        given[module] = (args[0] if args else next(iter(keywords.values()))).clone()

    def after(module, args, keywords, output):
        return (given[module], *output[1:]) if isinstance(output, tuple) else given[module]

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
        model.get_submodule(name).register_forward_hook(after, with_kwargs=True)
    with torch.no_grad():
        return model(*args, **keywords)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MODELS = {
    "a list": (Stack, ["layers.1"], (X,)),
    "the ends of a list": (Stack, ["layers.0", "layers.3"], (X,)),
    "tuples": (lambda: Stack(form="tuple"), ["layers.1", "layers.2"], (X,)),
    "by number": (ByNumber, ["layers.2"], (X,)),
    "attributes": (Attributes, ["first"], (X,)),
    "attributes, by keyword": (Attributes, ["second"], (X,)),
    "attributes, tuples": (lambda: Attributes("tuple"), ["first", "second"], (X,)),
    "a Sequential": (lambda: nn.Sequential(*(Block(i) for i in range(3)), nn.Linear(8, 2)), ["1"], (X,)),
    "all of a Sequential": (lambda: nn.Sequential(nn.Sequential(Block()), nn.Linear(8, 2)), ["0.0"], (X,)),
    "two towers": (Towers, ["encoder.layers.1"], (X, X + 1)),
    "a ResNet that writes in place": (resnet, ["1.0", "2.1"], (IMAGES,)),
    "no residual block": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), ["0"], (X,)),
}


@pytest.mark.parametrize("case", MODELS)
def test_drop_blocks_gives_the_outputs_of_the_model_with_the_blocks_bypassed(case):
    make, names, args = MODELS[case]
    torch.manual_seed(0)
    model = make()
    expected = without(model, names, *args)
    parameters = dict(model.named_parameters())
    assert not torch.allclose(model.eval()(*args), expected)
    fresh = copy.deepcopy(model)
    dropped = drop_blocks(model.train(), args, names)
    assert dropped.names == tuple(names)
    assert model.training
    torch.testing.assert_close(model.eval()(*args), expected)
    kept = [one for name, one in parameters.items() if not any(name.startswith(f"{gone}.") for gone in names)]
    assert [id(one) for one in model.parameters()] == [id(one) for one in kept]
    assert dropped.before[0] - dropped.after[0] == sum(p.numel() for p in parameters.values()) - sum(
        p.numel() for p in kept
    )
    # The plan does the same to a fresh model, through JSON.
    again = replay(fresh, json.loads(json.dumps(dropped.plan)))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(*args), expected)


def test_drop_blocks_renumbers_members_and_counts():
    model = Stack(5)
    layers = list(model.layers)
    for layer in layers:
        layer.inner.layer_id = 10 + layer.layer_idx  # of another count
        layer.inner.index = 4  # no number of the layer
    drop_blocks(model, X, ["layers.0", "layers.2"])
    assert list(model.layers) == [layers[1], layers[3], layers[4]]
    assert list(model.state_dict()) == list(Stack(3).state_dict())
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2]
    assert [layer.inner.layer_id for layer in model.layers] == [10, 11, 12]
    assert [layer.inner.index for layer in model.layers] == [4, 4, 4]
    assert (model.num_layers, model.layer_types) == (3, ["type1", "type3", "type4"])


def test_drop_blocks_puts_an_identity_where_members_are_asked_for_by_number():
    model = ByNumber()
    dropped = drop_blocks(model, X, ["layers.1"])
    assert isinstance(model.layers[1], Bypass)
    assert dropped.plan == {"version": 1, "blocks": {"layers.1": 0}}
    model = Attributes("tuple")
    assert drop_blocks(model, X, ["first"]).plan["blocks"] == {"first": 2}
    assert model.first("x", None) == ("x", None)


# ---- scores ----


class Turn(nn.Module):
    """Adds to a plane vector what turns it by an angle."""

    def __init__(self, degrees, form="tensor"):
        super().__init__()
        angle = math.radians(degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        self.form = form
        self.weight = nn.Parameter(torch.tensor([[cos - 1, -sin], [sin, cos - 1]]))

    def forward(self, x):
        x = x + x @ self.weight.T
        return (x, None) if self.form == "tuple" else x


class Turns(nn.Module):
    def __init__(self, *degrees, form="tensor"):
        super().__init__()
        self.layers = nn.ModuleList(Turn(one, form) for one in degrees)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


PLANE = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_drop_blocks_influence_is_one_minus_the_cosine(form):
    # Of three tokens one is zero, to which nothing is done: it counts as one that stays.
    dropped = drop_blocks(Turns(60, 0, 90, form=form), PLANE, count=1)
    assert dropped.names == ("layers.1",)
    expected = {"layers.0": 0.5 * 2 / 3, "layers.1": 0.0, "layers.2": 1 * 2 / 3}
    assert dropped.scores == pytest.approx(expected, abs=1e-6)
    # The mean over all tokens of all examples.
    dropped = drop_blocks(Turns(60, 0, 90), [PLANE[:2], PLANE[2:].repeat(4, 1)], count=1)
    assert dropped.scores == pytest.approx({"layers.0": 0.5 / 3, "layers.1": 0.0, "layers.2": 1 / 3}, abs=1e-6)


def test_drop_blocks_influence_of_images_is_that_of_each_as_one_vector():
    class Brighter(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x):
            return x + self.value.view(1, 2, 1, 1) * x.abs()

    images = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 1, 2)
    dropped = drop_blocks(nn.Sequential(Brighter([0.0, 2.0]), Brighter([0.0, 0.0])), images, count=1)
    # (1, -1, 1, -1) becomes (1, -1, 3, 1): cosine (1 + 1 + 3 - 1) / (2 * sqrt(12)).
    assert dropped.scores == pytest.approx({"0": 1 - 4 / (2 * math.sqrt(12)), "1": 0.0}, abs=1e-6)


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x + self.by * x


def test_drop_blocks_output_error_is_greedy():
    # The model is x * 2 * 0.5 * 1.25: without the first it is 0.5 of it, without the second 2, the third 0.8.
    model = nn.Sequential(Scale(1.0), Scale(-0.5), Scale(0.25))
    once = drop_blocks(copy.deepcopy(model), X, count=1, importance="output_error")
    assert once.names == ("2",)
    assert once.scores == pytest.approx({"0": 0.5, "1": 1.0, "2": 0.2}, abs=1e-6)
    # Without the third: 0.4 without the first, too, and 1.6 without the second; what goes together counts.
    twice = drop_blocks(copy.deepcopy(model), X, count=2, importance="output_error")
    assert set(twice.names) == {"0", "2"} or set(twice.names) == {"1", "2"}
    assert twice.scores == pytest.approx({"0": 0.6, "1": 0.6, "2": 0.2}, abs=1e-6)


def test_drop_blocks_takes_a_function_for_importance():
    model = Stack()
    order = {"layers.0": 2, "layers.1": 0.5, "layers.2": 7, "layers.3": -1}
    dropped = drop_blocks(model, X, count=2, importance=lambda name, block: order[name] + 0 * block.layer_idx)
    assert dropped.names == ("layers.3", "layers.1")
    assert dropped.scores == order
    with pytest.raises(ValueError, match=r"the score that importance gave layers.0 is nan"):
        drop_blocks(model, X, count=1, importance=lambda name, block: math.nan)


# ---- what blocks are ----


def test_drop_blocks_counts_residual_blocks_that_repeat():
    model = resnet()
    assert [block.name for block in repeated(model, find_blocks(model, [IMAGES])[0])] == ["1.0", "1.1", "2.1"]
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    with pytest.raises(ValueError, match=r"count is 1, and of Sequential at most 0 blocks can be dropped.*\(none\)"):
        drop_blocks(plain, X, count=1)
    # Blocks in blocks: the outermost.
    nested = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)))
    assert [block.name for block in repeated(nested, find_blocks(nested, [X])[0])] == ["0", "1"]


def test_drop_blocks_holds_what_others_need_and_takes_the_next():
    class Biased(Stack):
        """The first block makes what all add: it must stay."""

        def forward(self, hidden):
            bias = None
            for layer in self.layers:
                hidden, bias = layer(hidden, bias)
            return self.head(hidden)

    class Adds(Block):
        def forward(self, hidden, bias=None):
            bias = self.inner(hidden) if bias is None else bias
            return hidden + 0.1 * self.inner(hidden).tanh() + bias, bias

    model = Biased(4)
    model.layers = nn.ModuleList(Adds(i) for i in range(4))
    order = {f"layers.{i}": i for i in range(4)}
    with pytest.raises(ValueError, match=r"^layers.0 cannot be dropped: other parts use more of it than its output"):
        drop_blocks(model, X, ["layers.0"])
    dropped = drop_blocks(model, X, count=2, importance=lambda name, block: order[name])
    assert dropped.names == ("layers.1", "layers.2")
    assert list(dropped.stays) == ["layers.0"]
    assert "stays: other parts use" in str(dropped)


# ---- what goes with them ----


def test_drop_blocks_optimizer_forgets_what_goes():
    model = Stack()
    gone = set(model.layers[1].parameters())
    optimizer = torch.optim.AdamW(
        [{"params": list(gone)}, {"params": [p for p in model.parameters() if p not in gone]}]
    )
    model(X).sum().backward()
    optimizer.step()
    drop_blocks(model, X, ["layers.1"], optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 8]
    assert set(optimizer.state) == set(model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("method", ["UNSTRUCTURED_MAGNITUDE_LOCAL", "UNSTRUCTURED_HARD_CONCRETE"])
def test_drop_blocks_keeps_masks_and_gates_on_what_stays(method):
    model = Stack()
    options = {"ratio": 0.5} if "MAGNITUDE" in method else {}
    pyprune.prune(model, method, **options)
    expected = without(model, ["layers.1"], X)
    drop_blocks(model, X, ["layers.1"])
    torch.testing.assert_close(model.eval()(X), expected)
    statistic = pyprune.pruning_statistic(model)
    assert len(statistic.pruned_tensors) == 4
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    if options:
        assert all(int((layer.inner.weight == 0).sum()) == 32 for layer in model.layers)
    plain = pyprune.strip(model)
    assert list(plain.state_dict()) == list(Stack(3).state_dict())


def test_drop_blocks_strips_what_was_masked_only_in_a_block_that_goes():
    model = Stack()
    others = pyprune.IgnoredScope(names=["layers.0", "layers.2", "layers.3", "head"])
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, ignored_scope=others)
    drop_blocks(model, X, ["layers.1"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_drop_blocks_takes_examples_of_all_forms():
    class Named(Stack):
        def forward(self, hidden, scale=1.0):
            return super().forward(hidden * scale)

    for examples in (X, (X,), {"hidden": X, "scale": 2.0}, [X, (X, 3.0)], Dataset([(X, 0)], lambda item: item[0])):
        model = Named()
        drop_blocks(model, examples, ["layers.1"])
        assert len(model.layers) == 3


# ---- wrong input ----


def sharded():
    model = nn.Sequential(Block(), Block())
    model[0].compile()
    return model


WRONG = {
    "neither": (Stack, {}, ValueError, "give names, the blocks to drop, or count"),
    "both": (Stack, {"names": ["layers.1"], "count": 1}, ValueError, "one of them"),
    "no names": (Stack, {"names": []}, ValueError, "names is empty"),
    "a string": (Stack, {"names": "layers.1"}, TypeError, "names is 'layers.1'"),
    "no module": (Stack, {"names": ["layers.9"]}, ValueError, r"'layers.9'.*no module.*layers.0, layers.1"),
    "twice": (Stack, {"names": ["layers.1", "layers.1"]}, ValueError, "twice"),
    "all of a list": (Stack, {"names": [f"layers.{i}" for i in range(4)]}, ValueError, "nothing in layers; at least"),
    "within another": (Stack, {"names": ["layers.1", "layers.1.inner"]}, ValueError, "'layers.1.inner'.*lies in"),
    "another shape": (
        Stack,
        {"names": ["head"]},
        ValueError,
        r"head.*makes float32\[3, 5, 3\] of float32\[3, 5, 8\]",
    ),
    "a dict": (lambda: nn.Sequential(Block(form="dict"), Pick()), {"names": ["0"]}, ValueError, "returns a dict"),
    "too many": (Stack, {"count": 4}, ValueError, "count is 4, and of Stack at most 3 blocks"),
    "used again": (Looped, {"names": ["layers.0"]}, ValueError, "several times in a pass, on its own output"),
    "used twice": (Looped, {"names": ["twice.0"]}, ValueError, "several times in a pass"),
    "at two places": (lambda: shared(), {"names": ["0"]}, ValueError, "2 places"),
    "not reached": (lambda: unreached(), {"names": ["spare"]}, ValueError, "the examples do not reach it"),
    "importance": (Stack, {"count": 1, "importance": "bi"}, ValueError, '"influence" and "output_error"'),
    "optimizer": (Stack, {"count": 1, "optimizer": 3}, TypeError, "optimizer is of type int"),
    "compiled": (lambda: torch.compile(Stack(), backend="eager"), {"count": 1}, ValueError, "then compile it"),
    "compiled in place": (sharded, {"names": ["1"]}, ValueError, "0 is compiled"),
    "in parallel": (lambda: nn.DataParallel(Stack()), {"count": 1}, ValueError, "DataParallel"),
    "on meta": (lambda: Stack().to("meta"), {"count": 1}, ValueError, "meta device"),
    "quantised": (lambda: quantised(), {"count": 1}, ValueError, "quantis"),
    "NaN": (lambda: nan(), {"count": 1}, ValueError, "have NaN"),
    "a class": (lambda: Stack, {"count": 1}, TypeError, "give a torch.nn.Module"),
}


class Pick(nn.Module):
    def forward(self, output):
        return output["hidden"]


def shared():
    block = Block()
    return nn.Sequential(block, Block(), block)


def unreached():
    model = Stack()
    model.spare = Block()
    return model


def nan():
    model = Stack()
    nn.init.constant_(model.head.weight, math.nan)
    return model


def quantised():
    return torch.ao.quantization.quantize_dynamic(Stack(), {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("case", WRONG)
def test_drop_blocks_refuses_by_name_and_changes_nothing(case):
    make, options, error, message = WRONG[case]
    model = make()
    before = (
        Unchanged(model) if isinstance(model, nn.Module) and case not in ("on meta", "quantised", "NaN") else None
    )
    with pytest.raises(error, match=f"(?s){message}"):
        drop_blocks(model, X, **options)
    if before is not None:
        before.check()


def test_drop_blocks_examples_that_are_none():
    for examples, error in (
        ([], ValueError),
        (None, TypeError),
        ([[X]], TypeError),
        (torch.full((1, 8), math.nan), ValueError),
    ):
        with pytest.raises(error, match="examples"):
            drop_blocks(Stack(), examples, count=1)


def test_replay_refuses_plans_of_others():
    for plan, message in (
        ({"version": 2, "blocks": {}}, "no plan of version 1"),
        ({"version": 1}, "no plan of version 1"),
        ({"version": 1, "more": {}}, "neither blocks nor experts"),
        ({"version": 1, "blocks": {"layers.7": None}}, "'layers.7', which is no module"),
        ({"version": 1, "blocks": {"head": None}}, "it is in none"),
        ({"version": 1, "blocks": {"head": -1}}, "has -1 for head"),
        ({"version": 1, "experts": {"layers": [0]}}, r"drops experts \[0\] of layers"),
    ):
        model = Stack()
        before = Unchanged(model)
        with pytest.raises(ValueError, match=message):
            replay(model, plan)
        before.check()


def test_replay_takes_names():
    model = replay(Stack(), ["layers.1", "layers.2"])
    assert [layer.layer_idx for layer in model.layers] == [0, 1]
    assert isinstance(replay(Attributes(), ["first"]).first, Bypass)


def test_dropped_is_a_table():
    dropped = drop_blocks(Stack(2), X, count=1, importance=lambda name, block: float(name[-1]))
    text = str(dropped)
    assert text.startswith("1 block dropped: 99 parameters (396 bytes) of 171 (684) are left\n")
    assert [line.split("│")[1:3] for line in text.splitlines() if "layers" in line] == [
        [" layers.0 ", "     0 "],
        [" layers.1 ", "     1 "],
    ]
    assert "<pre" in dropped._repr_html_()
