import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import pyprune
from pyprune import Method, importance, scope
from pyprune.modules.holding import HOOKS, look_at_torch
from pyprune.modules.masks import changing_masks, masks_in
from pyprune.modules.undo import Before, Change, refill, undoing
from tests.fault_injector import Fault, count_lines, differences, look

LOCAL = Method(importance.magnitude(), scope=scope.tensor())


def swap(model):
    model.bn1 = nn.Identity()


def freeze(model):
    model.requires_grad_(False)


def hook(model) -> RemovableHandle:
    return model.conv1.register_forward_hook(lambda *given: None)


def hook_on_parameter(model):
    model.fc.weight.register_hook(lambda gradient: None)


def new_parameter(model):
    model.fc.weight = nn.Parameter(torch.ones(3, 6))


def forget_gradient(model):
    model.fc.weight.grad = None


def attribute(model):
    model.note = "new"
    del model.fc.in_features


def another_class(model):
    model.dropout.__class__ = nn.Identity


def buffer(model):
    model.register_buffer("mean", torch.zeros(1), persistent=False)


def draw(model):
    torch.rand(3)


def no_gradients(model):
    torch.set_grad_enabled(False)


CHANGES = [
    swap, freeze, hook, hook_on_parameter, new_parameter, forget_gradient, attribute, another_class, buffer, draw,
    no_gradients, nn.Module.eval,
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_that_fails_leaves_a_model_as_it_was(cnn, change, masked):
    if masked:
        pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    cnn.model(cnn.inputs).sum().backward()
    before = look({"model": cnn.model})

    def fail():
        with Change(cnn.model):
            change(cnn.model)
            assert differences(before, look({"model": cnn.model}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not differences(before, look({"model": cnn.model}))


def test_change_that_works_stays(cnn):
    with Change(cnn.model):
        cnn.model.eval()
    assert not cnn.model.training


@pytest.mark.parametrize("parks", [True, False])
def test_change_goes_back_to_the_masks_before(device, parks):
    model = pyprune.prune(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).to(device), LOCAL, ratio=0.5)
    for mask in masks_in(model):
        mask.parks, mask.parked = parks, mask.parked if parks else None
    before = look({"model": model})

    def fail():
        with Change(model):
            with changing_masks(masks_in(model)):
                for mask in masks_in(model):
                    mask.mask, mask.parks = ~mask.mask, True
            assert differences(before, look({"model": model}))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert not differences(before, look({"model": model}))


def test_change_finishes_what_cannot_be_taken_back():
    done = []

    def act():
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    linear = nn.Linear(2, 2)

    def change():
        with Change(linear) as change:
            linear.eval()
            change.finish(act)

    with pytest.raises(KeyboardInterrupt):
        change()
    assert (done, linear.training) == ([0, 1], False)


def test_change_brings_values_and_objects_back():
    class Counter:
        def __init__(self):
            self.count, self.seen, self.all = 0, {1: 2}, [3]

    counter, tensor = Counter(), torch.ones(3)

    def fail():
        with Change(objects=[counter], values=[tensor]):
            counter.count += 1
            counter.seen.clear()
            counter.all.append(4)
            counter.more = True
            tensor.zero_()
            raise SystemExit

    with pytest.raises(SystemExit):
        fail()
    assert vars(counter) == {"count": 0, "seen": {1: 2}, "all": [3]}
    assert tensor.sum() == 3


def test_before_leaves_attributes_of_the_user_alone(cnn):
    before = Before(cnn.model, with_attributes=False)
    cnn.model.note = "new"
    swap(cnn.model)
    before.restore()
    assert (cnn.model.note, type(cnn.model.bn1)) == ("new", nn.BatchNorm2d)


def test_undoing_survives_an_interruption_anywhere():
    def body(flags):
        with undoing(lambda: flags.update(on=True)):
            flags["on"] = False

    total = count_lines(lambda: body({"on": True}))
    for n in range(1, total + 1):
        flags = {"on": True}
        assert Fault(n).run(lambda flags=flags: body(flags))
        assert flags["on"], n


def test_a_failure_whose_undoing_is_interrupted_leaves_the_model_as_it_was():
    def broken():
        torch.manual_seed(0)
        model = pyprune.prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LOCAL, ratio=0.5)
        model[1].weight.data[model[1].weight != 0] = torch.nan
        return model

    before, n, is_interrupted = look({"model": broken()}), -2, True
    while is_interrupted:
        n += 3
        model, fault = broken(), Fault(n)
        try:
            is_interrupted = fault.run(lambda model=model: pyprune.prune(model, LOCAL, ratio=0.6))
        except ValueError:
            is_interrupted = False
        wrong = differences(before["model"], look({"model": model})["model"])
        assert not wrong, (fault.place, wrong)
    assert n > 300


def test_a_first_prune_that_is_interrupted_leaves_no_hooks_with_torch(monkeypatch):
    held: dict[int, object] = {}  # whatever other tests have left
    for module in ("holding", "undo", "zeros"):
        monkeypatch.setattr(f"pyprune.modules.{module}.HELD", held)
    n, is_interrupted = -4, True
    while is_interrupted:
        n += 5
        held.clear()
        look_at_torch()  # takes them off
        is_interrupted = Fault(n).run(lambda: pyprune.prune(nn.Linear(4, 2), LOCAL, ratio=0.5))
        hooks = [one for table, _, known in HOOKS for one in table.values() if one is known]
        assert len(hooks) == (len(HOOKS) if held else 0), n
    assert held
    monkeypatch.undo()
    look_at_torch()


@pytest.mark.parametrize("now", [{}, {"a": 1}, {"b": 2, "a": 1}, {"a": 0, "b": 2, "c": 3}, {"c": 3, "b": 2, "a": 1}])
def test_refill_gives_a_dict_its_content_and_order_and_never_lacks_a_key(now):
    class Watched(dict):
        missing = False

        def clear(self):
            Watched.missing = True
            super().clear()

    table, content = Watched(now), {"a": 1, "b": 2}
    refill(table, content)
    assert list(table.items()) == list(content.items())
    assert not Watched.missing
