import copy
import types

import pytest
import torch
from torch import nn

from pyprune import shrink
from pyprune.structured.configs import computes_the_same, pretrained_parts, says_all
from tests.structured.dead_units import kill, shake


class Config:
    """As those of transformers, in what matters."""

    def __init__(self, **values):
        vars(self).update(
            {"width": 8, "inner": 12, "heads": 4, "head_size": None, "layers": 2, "pad_token_id": 8}, **values
        )

    def to_dict(self):
        return copy.deepcopy(vars(self))

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.head_size or config.width // config.heads
        self.head_size = size
        self.value = nn.Linear(config.width, config.heads * size)
        self.out = nn.Linear(config.heads * size, config.width)
        self.up = nn.Linear(config.width, config.inner)
        self.down = nn.Linear(config.inner, config.width)

    def forward(self, x):
        value = self.value(x).view(*x.shape[:-1], -1, self.head_size)
        # The size of a head is a scale: halving it for half of the heads has the same shapes, and is not the same.
        x = x + self.out((value.softmax(-1) * self.head_size * value).flatten(-2))
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    from_pretrained = save_pretrained = None  # so that it counts as one of transformers


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def small(uneven=False, only=None, **values):
    torch.manual_seed(0)
    model = shake(Model(Config(**values)))
    assert kill(model, X, uneven=uneven, only=only)
    return model, shrink(model, X)


@pytest.mark.parametrize(
    ("only", "values", "changes"),
    [
        ("up", {}, {"inner": 6}),
        ("value", {}, {"heads": 2, "head_size": 2}),
        (None, {}, {"inner": 6, "heads": 2, "head_size": 2}),
        (None, {"head_size": 4}, {"inner": 6, "heads": 2}),
        (None, {"inner": 8, "layers": 6}, {"inner": 4, "heads": 2, "head_size": 2}),
    ],
)
def test_shrink_lets_the_config_say_the_sizes(only, values, changes):
    before = Config(**values).to_dict()
    model, shrunk = small(only=only, **values)
    assert model.config.to_dict() == before | changes
    assert says_all(model)
    plain = Model(Config.from_dict(model.config.to_dict())).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))
    said = {one[1].removeprefix("config."): tuple(one[2:]) for one in shrunk.plan.attributes if "config" in one[1]}
    assert said == {key: (value, before[key]) for key, value in changes.items()}


def test_shrink_leaves_the_config_if_layers_disagree():
    model, _ = small(uneven=True)
    assert model.config.to_dict() == Config().to_dict()
    assert not says_all(model)
    assert "save_pretrained" in vars(model)


def test_shrink_leaves_a_config_that_cannot_be_made_again():
    class Odd(Config):
        @classmethod
        def from_dict(cls, values):
            raise ValueError("no")

    model = shake(Model(Odd()))
    kill(model, X)
    assert shrink(model, X).removed
    assert model.config.to_dict() == Config().to_dict()


def test_a_shrink_that_fails_leaves_the_config(monkeypatch):
    model = shake(Model(Config()))
    kill(model, X)
    monkeypatch.setattr("pyprune.structured.pretrained.remember", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shrink(model, X)
    assert model.config.to_dict() == Config().to_dict()
    assert model.layers[0].up.out_features == 12


def test_pretrained_parts_are_the_outermost():
    model = nn.Sequential(nn.Identity(), Model(Config()), Model(Config()))
    model[1].inner = Model(Config())
    assert [name for name, _ in pretrained_parts(model)] == ["1", "2"]
    assert [name for name, _ in pretrained_parts(model[1])] == [""]
    model[1].config = types.SimpleNamespace()
    assert [name for name, _ in pretrained_parts(model)] == ["1.inner", "2"]


def test_computes_the_same_leaves_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    inner = model[1]
    agrees = computes_the_same(model, [X], "1.0")
    assert agrees(copy.deepcopy(model[1][0]))
    assert not agrees(nn.Linear(8, 8))
    assert not agrees(nn.Linear(3, 8))
    assert model[1] is inner
    assert model[1][0] is inner[0]
