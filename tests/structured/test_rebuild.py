import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pyprune import Plan, plan_of, prune, rebuild, shrink
from tests.conftest import Unchanged
from tests.structured.dead_units import kill, shake


class Tied(nn.Module):
    """One weight has two names, one module has two, a buffer is not saved, and a layer has no bias."""

    def __init__(self, is_tied=True):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.inner = nn.Linear(10, 10, bias=False)
        self.again = self.inner
        self.last = nn.Linear(10, 6)
        self.out = nn.Linear(10, 6)
        self.heads = 10
        self.register_buffer("scale", torch.linspace(1, 2, 10), persistent=False)
        if is_tied:
            self.out.weight = self.last.weight

    def forward(self, x):
        x = self.first(x).relu() * self.scale
        x = self.again(self.inner(x).relu()).relu().view(-1, self.heads)
        return self.last(x) + self.out(x)


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 36, 10), nn.Sigmoid(), nn.Linear(10, 3, bias=False),
    )  # fmt: skip


def lstm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 8, 2, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    return Net()


MODELS = {"conv": (conv, (2, 3, 8, 8)), "tied": (Tied, (4, 6)), "lstm": (lstm, (2, 4, 5))}


def small(name, rounds=1):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = shake(make()), torch.randn(shape)
    for _ in range(rounds):
        assert kill(model, x)
        if name == "conv":  # a constant, and nobody's bias takes it
            with torch.no_grad():
                model[6].weight[-1], model[6].bias[-1] = 0, 1.0
        assert shrink(model, x).removed
    return model, x


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_rebuild_makes_what_takes_the_state_dict(name, rounds):
    model, x = small(name, rounds)
    plan = Plan.from_json(plan_of(model).to_json())
    fresh = rebuild(MODELS[name][0](), plan).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert plan_of(fresh) == plan == plan_of(model)
    assert [str(one) for one in fresh.modules()] == [str(one) for one in model.modules()]
    # It can go on from there.
    kill(fresh, x)
    expected = fresh(x)
    shrink(fresh, x)
    again = rebuild(MODELS[name][0](), plan_of(fresh)).eval()
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(again(x), fresh(x))
    assert torch.allclose(again(x), expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_rebuild_on_the_meta_device_and_in_half(name):
    model, x = small(name, 2)
    with torch.device("meta"):
        fresh = MODELS[name][0]()
    rebuild(fresh, plan_of(model)).load_state_dict(model.state_dict(), assign=True)
    assert not [key for key, one in fresh.named_parameters() if one.is_meta]
    for key, buffer in model.named_buffers():  # those that are not saved have no values there
        fresh.get_submodule(key.rpartition(".")[0])._buffers[key.rpartition(".")[2]] = buffer
    assert torch.equal(fresh.eval()(x), model(x))

    half = rebuild(MODELS[name][0]().bfloat16(), plan_of(model)).eval()
    half.load_state_dict(model.state_dict())
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(x.bfloat16()), copy.deepcopy(model).bfloat16()(x.bfloat16()))


def test_rebuild_of_what_changes_nothing():
    model = nn.Linear(2, 2)
    assert rebuild(model, Plan()) is model
    assert plan_of(model) is None


PLAN = Plan(
    {"0.weight": {0: [1]}, "0.bias": {0: [1]}, "1.weight": {1: [1]}},
    {"0.weight": [2, 3], "0.bias": [2], "1.weight": [2, 2]},
    model="Net",
)


def net(**attributes):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    vars(model).update(attributes)
    return model


def tied():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    return model


def masked():
    model = net()
    prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    return model


OTHERS = {
    "it has another name": (
        lambda: nn.Sequential(nn.Linear(3, 2)),
        PLAN,
        "another model, a Net: this Sequential has no",
    ),
    "it has another size": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        PLAN,
        "another model, a Net, or",
    ),
    "it was rebuilt": (lambda: rebuild(net(), PLAN), PLAN, "already"),
    "it is tied": (tied, PLAN, "1.weight and 2.weight are one tensor"),
    "it has masks": (masked, PLAN, "masks"),
    "it is in parallel": (lambda: nn.DataParallel(net()), PLAN, "DataParallel"),
    "it is compiled": (lambda: torch.compile(net(), backend="eager"), PLAN, "OptimizedModule"),
    "it is lazy": (lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), PLAN, "lazy"),
    "it has no such attribute": (net, Plan(attributes=[["", "heads", 2, 4]]), "no heads"),
    "it has no such module": (net, Plan(attributes=[["5", "heads", 2, 4]]), "no 5.heads"),
    "it has no such object": (net, Plan(attributes=[["", "config.heads", 2, None]]), "no config.heads"),
    "its attribute is another": (lambda: net(heads=8), Plan(attributes=[["", "heads", 2, 4]]), "heads is 8, and 4"),
    "its attribute is no size": (lambda: net(heads="x"), Plan(attributes=[["", "heads", 2]]), "heads is 'x'"),
    "its attribute is a flag": (net, Plan(attributes=[["", "training", 0]]), "training is True"),
    "its attribute is a tuple": (lambda: net(heads=(4, 4)), Plan(attributes=[["", "heads", 2, 4]]), "heads is"),
    "it has that bias": (net, Plan(biases=["0.bias"]), "it makes 0.bias"),
    "it has no layer for that bias": (net, Plan(biases=["7.bias"]), "another model"),
    "it has no weight for that bias": (net, Plan(biases=["bias"]), "it makes bias"),
    "the plan is damaged": (net, Plan({"0.weight": {0: [7]}}, {"0.weight": [2, 3]}), "damaged"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_rebuild_refuses_other_models(what):
    make, plan, message = OTHERS[what]
    model = make()
    before = Unchanged(model) if what != "it is lazy" else None
    with pytest.raises(ValueError, match=message):
        rebuild(model, plan)
    if before is not None:
        before.check()


def test_rebuild_that_fails_late_leaves_the_model(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    before = Unchanged(model)
    monkeypatch.setattr("pyprune.structured.rebuild.remember", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rebuild(model, PLAN.then(Plan(biases=["1.bias"])))
    before.check()


def test_rebuild_in_another_process(tmp_path):
    for name, (_, shape) in MODELS.items():
        model, x = small(name)
        plan_of(model).save(tmp_path / f"{name}.json")
        torch.save({"state": model.state_dict(), "x": x, "y": model(x).detach()}, tmp_path / f"{name}.pt")
        assert x.shape == shape
    code = (
        "import sys, torch\n"
        "from pyprune import Plan, rebuild\n"
        "from tests.structured.test_rebuild import MODELS\n"
        "for name, (make, _) in MODELS.items():\n"
        "    saved = torch.load(f'{sys.argv[1]}/{name}.pt', weights_only=True)\n"
        "    model = rebuild(make(), Plan.load(f'{sys.argv[1]}/{name}.json')).eval()\n"
        "    model.load_state_dict(saved['state'])\n"
        "    assert torch.equal(model(saved['x']), saved['y']), name\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
