"""Blocks run one by one give what they give in a pass of the whole model, bit for bit."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pyprune
from pyprune import scope
from pyprune.modules.evaluation import evaluating, forward, layers_apart, untouched
from pyprune.oneshot.find_blocks import find_blocks
from pyprune.oneshot.stored import InFolder, InMemory
from pyprune.oneshot.walk import Walk
from tests.oneshot import models


class Doubling(nn.Module):
    """Returns a tuple, writes into its input, and counts its calls."""

    def __init__(self, width=4, gives=None):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.gives = gives
        self.calls = 0

    def forward(self, hidden, extra=None):
        self.calls += 1
        hidden += self.linear(hidden)
        return hidden, self.gives


class Stack(nn.Module):
    """Blocks that are called one after the other, or in other ways."""

    def __init__(self, way="chain", count=3):
        super().__init__()
        self.layers = nn.ModuleList(Doubling() for _ in range(count))
        self.way = way
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs):
        self.passes += 1
        hidden = inputs.clone()
        if self.way == "twice":
            hidden = self.layers[0](hidden)[0]
        layers = self.layers[:-1] if self.way == "idle" else self.layers
        seen = []
        for layer in reversed(layers) if self.way == "backwards" else layers:
            hidden = layer(hidden)[0]
            seen.append(hidden.clone())
            if self.way == "in place":
                hidden += 1
        if self.way == "skips":
            hidden = self.layers[-1].linear(hidden + seen[0] * 2)
        return hidden


class Unet(nn.Module):
    """Later blocks take what earlier ones gave."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Doubling() for _ in range(4))

    def forward(self, inputs):
        first = self.layers[0](inputs.clone())[0]
        second = self.layers[1](first.clone())[0]
        third = self.layers[2](second.clone())[0]
        return self.layers[3](third + first)[0]


class Whispering(nn.Module):
    """Blocks that pass something on beside what they return."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Listener(self) for _ in range(3))

    def forward(self, inputs):
        self.said = [torch.zeros_like(inputs)]
        for layer in self.layers:
            inputs = layer(inputs, self.said)
        return inputs


class Listener(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden, said):
        said.append(self.linear(hidden) + said[-1])
        return said[-1] * hidden


class Convolutions(nn.Module):
    """No list: the layers differ, and what is between them is not theirs."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, 4, 5), nn.BatchNorm1d(4)
        self.conv2, self.norm2 = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, sound):
        hidden = nn.functional.max_pool1d(self.norm1(self.conv1(sound).relu()), 2)
        return self.head(self.norm2(self.conv2(hidden).relu()).mean(-1))


def walked(model, batches, blocks=None, stored=None):
    """Return what each block gives for each batch, one block after the other."""
    with evaluating(model), untouched(model), layers_apart(model):
        walk = Walk(model, batches, find_blocks(model, blocks), stored or InMemory())
        walk.check()
        found = {}
        for place, block in enumerate(walk.blocks):
            found[block.name] = [walk.output(place, number) for number in range(len(batches))]
            walk.run(place, into=walk.stored)
            walk.stored.turn()
    return found


def at_once(model, batches, names):
    """Return what blocks give in passes of the whole model."""
    found = {name: [] for name in names}
    with evaluating(model), untouched(model), layers_apart(model):
        for name in names:
            block = model.get_submodule(name)
            block.register_forward_hook(
                lambda module, args, output, name=name: found[name].append(copy.deepcopy(output))
            )
        for batch in batches:
            forward(model, batch)
    return found


def assert_same(one, other):
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert pairs
    for a, b in pairs:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", models.CASES)
def test_walk_is_a_pass_of_the_whole_model_bit_for_bit(name):
    model, batches = models.make(name), models.batches(name)
    found = walked(model, batches)
    assert len(found) >= 3
    assert_same(found, at_once(model, batches, found))


@pytest.mark.parametrize("way", ["chain", "backwards", "in place"])
def test_walk_of_blocks_in_any_order_that_write_into_their_inputs(way):
    model, batches = Stack(way), list(torch.randn(2, 3, 4))
    found = walked(model, batches)
    assert list(found) == [f"layers.{i}" for i in ((2, 1, 0) if way == "backwards" else (0, 1, 2))]
    assert_same(found, at_once(model, batches, found))
    assert model.passes == 0
    assert "forward" not in vars(model.layers[0])


@pytest.mark.parametrize(
    ("model", "blocks", "inputs"),
    [
        (Unet(), None, torch.randn(2, 3, 4)),
        (Convolutions(), ["conv1", "conv2", "head"], torch.randn(2, 3, 1, 40)),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), None, torch.randn(2, 3, 4)),
        (nn.ModuleDict({"a": nn.Linear(4, 4)}), None, None),
    ],
    ids=["skips", "convolutions", "Sequential", "nothing"],
)
def test_walk_of_blocks_that_are_no_chain(model, blocks, inputs):
    if inputs is None:
        with pytest.raises(ValueError, match=r"has no list of repeated layers.*blocks="):
            find_blocks(model, blocks)
        return
    found = walked(model, list(inputs), blocks)
    assert_same(found, at_once(model, list(inputs), found))


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (Whispering(), None, "cannot be pruned block by block.*layers.1"),
        (Stack("twice"), None, "layers.0 is called several times"),
        (Stack("idle"), "layers", "layers.2, which the model does not call"),
        (Stack(), "nowhere", "blocks has 'nowhere' in it, which is no module of the model .nearest: "),
        (Stack(), [], "blocks is empty"),
        (Stack(), ["layers", "layers.0"], "share a module"),
        (Convolutions(), None, "no list of repeated layers"),
        (Convolutions(), "norm1", "no weight"),
    ],
    ids=["whispering", "twice", "idle", "nowhere", "empty", "within", "no list", "no weight"],
)
def test_blocks_that_cannot_be_walked_are_refused(model, blocks, message):
    inputs = torch.randn(2, 1, 40) if isinstance(model, Convolutions) else torch.randn(2, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pyprune.prune_one_shot(model, [inputs], "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, blocks=blocks)
    assert_same(before, model.state_dict())


def test_blocks_that_nobody_named_and_nobody_calls_are_left_with_a_note():
    with pytest.warns(UserWarning, match=r"layers\.2: not called"):
        result = pyprune.prune_one_shot(Stack("idle"), [torch.randn(2, 4)], "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    assert [weight.block for weight in result.weights] == ["layers.0", "layers.1"]


def test_shared_blocks_and_shared_keys_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {**models.SIZES, "intermediate_size": 48}
    albert = transformers.AlbertModel(transformers.AlbertConfig(**sizes, embedding_size=16))
    with pytest.raises(ValueError, match="several times in a pass"):
        pyprune.prune_one_shot(albert, [models.text()], scope.tensor(), ratio=0.5, solver=pyprune.solvers.admm())


def test_a_model_with_a_cache_is_walked_exactly():
    model = models.make("Llama")
    model.config.use_cache = True
    batches = [{**batch, "use_cache": True} for batch in models.batches("Llama")]
    found = walked(model, batches)
    assert_same(found, at_once(model, batches, found))


@dataclasses.dataclass
class Output:
    hidden: Tensor


class Wrapping(nn.Module):
    """Blocks whose outputs are objects that torch does not look into, and a model that writes into these."""

    def __init__(self, has_tensor):
        super().__init__()
        self.has_tensor = has_tensor
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        for layer in self.layers:
            layer.forward = self.wrapped(layer.forward)

    def wrapped(self, plain):
        def run(hidden):
            output = Output(plain(hidden))
            return (output.hidden.mean(), output) if self.has_tensor else output

        return run

    def forward(self, hidden):
        for layer in self.layers:
            output = layer(hidden)
            hidden = (output[1] if self.has_tensor else output).hidden.add_(1)
        return hidden


def test_walk_keeps_objects_as_they_were_and_refuses_blocks_of_which_it_sees_nothing():
    model = Wrapping(has_tensor=True)
    found = walked(model, list(torch.randn(2, 3, 4)))
    assert all(mean == output.hidden.mean() for some in found.values() for mean, output in some)
    with pytest.raises(ValueError, match=r"layers.0 returns a Output, in which torch sees no tensor"):
        walked(Wrapping(has_tensor=False), [torch.randn(3, 4)])


def test_walk_by_a_folder_is_the_same(tmp_path):
    model, batches = models.make("TransformerEncoder"), models.batches("TransformerEncoder", 3)
    stored = InFolder(tmp_path)
    assert_same(walked(model, batches), walked(model, batches, stored=stored))
    stored.clean()
    assert len(list(tmp_path.iterdir())) == 3


def test_lists_of_lists_and_of_several_classes_are_found():
    pair = lambda: nn.ModuleList([nn.TransformerEncoderLayer(4, 1), Doubling()])  # noqa: E731
    model = nn.ModuleDict(
        {"a": nn.ModuleList([pair(), pair()]), "head": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
    )
    assert [block.name for block in find_blocks(model)] == ["a.0.0", "a.0.1", "a.1.0", "a.1.1"]
    assert [block.name for block in find_blocks(model, "head")] == ["head.0", "head.1"]
    assert [block.name for block in find_blocks(nn.DataParallel(Stack()), "module.layers")] == [
        f"layers.{i}" for i in range(3)
    ]
