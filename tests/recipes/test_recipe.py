import copy
import io
import itertools
import re

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, Pruner, Recipe, granularity, importance, schedules, scope
from pyprune.modules.targets import attachments_of
from tests.conftest import masks_of

pytest.importorskip("yaml")

MAGNITUDE = importance.magnitude()
LOCAL = Method(MAGNITUDE, scope=scope.tensor())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def with_optimizer(model, lr=0.05):
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)


def train(model, optimizer, pruner, steps, seed=0):
    """Train, and return the masks after each step."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(4, 16, generator=generator)
        nn.functional.cross_entropy(model(inputs), torch.randint(8, (4,), generator=generator)).backward()
        optimizer.step()
        pruner.step()
        seen.append([mask.clone() for mask in masks_of(model).values()])
    return seen


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dropped(masks):
    return sum(int((~mask).sum()) for mask in masks)


def test_prune_is_what_the_pruner_does_by_hand():
    text = "stages: [prune: {final: 0.8, end: 3, frequency: 0.5, scope: model, importance: snip}]"
    model, optimizer = with_optimizer(network())
    by_recipe = train(
        model, optimizer, Recipe.from_string(text.replace("initial: 0.1, ", "")).apply(model, optimizer, 4), 16
    )
    model, optimizer = with_optimizer(network())
    pruner = Pruner(model, Method(importance.snip()), schedules.cubic(0.8, end=12, frequency=2), optimizer)
    by_hand = train(model, optimizer, pruner, 16)
    assert all(same(a, b) for a, b in zip(by_recipe, by_hand, strict=True))
    assert dropped(by_recipe[-1]) == round(0.8 * (16 * 24 + 24 * 8))


def test_every_field_reaches_the_pruner():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    text = """stages:
      - prune: {schedule: one_shot, final: 0.5, granularity: channel, scope: model, max_ratio: {"0": 0.25},
          min_ratio: 0.125, zero_dead_channels: true, ignore: {names: ["4"]}}"""
    Recipe.from_string(text).apply(model, None, 1, examples_inputs=torch.randn(2, 8))
    alive = [int((model[i].weight != 0).any(1).sum()) for i in (0, 3, 4)]
    assert alive == [12, 4, 4]
    assert torch.equal(model[1].weight != 0, (model[0].weight != 0).any(1))

    erk = "stages: [prune: {schedule: one_shot, final: 0.5, allocation: erk}]"
    model = network()
    Recipe.from_string(erk).apply(model, None, 1)
    by_hand = pyprune.prune(
        network(), Method(importance.magnitude(), scope=scope.tensor()), ratio=0.5, allocation="erk"
    )
    assert same(masks_of(model).values(), masks_of(by_hand).values())


def test_reintroduce_says_whether_weights_come_back():
    for reintroduce, expected in (("true", True), ("false", False)):
        text = f"stages: [prune: {{schedule: linear, final: 0.6, end: 4, reintroduce: {reintroduce}}}]"
        model, optimizer = with_optimizer(network(), lr=1.0)
        seen = train(model, optimizer, Recipe.from_string(text).apply(model, optimizer, 5), 20)
        came_back = [
            bool((now & ~before).any())
            for pair in itertools.pairwise(seen)
            for before, now in zip(*pair, strict=True)
        ]
        assert any(came_back) is expected


def test_stages_follow_each_other_and_what_they_leave_stays():
    recipe = Recipe.from_string("""
stages:
  - prune: {schedule: one_shot, final: 0.25, start: 1}
  - prune: {final: 0.5, start: 2, end: 3}
  - constant: {end: 5}
  - prune: {scope: {n_of_m: {keep: 1, of: 4}}, final: 0.75, schedule: one_shot, start: 6}
""")
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 4)
    assert (recipe.num_epochs, pruner.ratio, pruner.epoch) == (6, 0.0, 0.0)
    assert all(mask.all() for mask in masks_of(model).values())
    seen = train(model, optimizer, pruner, 28)
    n = 16 * 24 + 24 * 8
    assert [dropped(seen[step - 1]) for step in (3, 4, 7, 8, 12, 23, 24, 28)] == [
        round(share * n) for share in (0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75)
    ]
    assert same(seen[11], seen[22])
    assert pruner.ratio == 0.75
    plain = pruner.finish()
    assert plain is model
    assert type(model[0]) is nn.Linear
    assert (model[0].weight.reshape(-1, 4) != 0).sum(1).eq(1).all()


def test_ac_dc_alternates_and_comes_back_from_zero():
    recipe = Recipe.from_string("stages: [ac_dc: {final: 0.5, end: 4, frequency: 1}]")
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 3)
    seen = train(model, optimizer, pruner, 14)
    n = 16 * 24 + 24 * 8
    assert [dropped(seen[step - 1]) for step in (2, 3, 5, 6, 8, 9, 14)] == [0, n // 2, n // 2, 0, 0, n // 2, n // 2]
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 3)
    masks = train(model, optimizer, pruner, 6)[4]
    assert (model[0].weight[~masks[0]] == 0).all()  # dense again, but where it was dropped it begins from zero
    assert model[0].weight not in optimizer.state


@pytest.mark.parametrize(
    "text",
    [
        "stages: [prune: {final: 0.8, start: 1, end: 3}]",
        "stages: [prune: {final: 0.8, start: 1, end: 3, importance: snip_momentum, frequency: 0.5}]",
        "stages: [ac_dc: {final: 0.8, end: 4, frequency: 1}]",
        "stages: [prune: {schedule: one_shot, final: 0.3}, prune: {final: 0.8, start: 2, end: 4, reintroduce: no}]",
    ],
)
@pytest.mark.parametrize("middle", [3, 8, 19])
def test_resume_gives_the_same_end(text, middle):
    recipe = Recipe.from_string(text)
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 4)
    train(model, optimizer, pruner, middle)
    saved = [part.state_dict() for part in (model, optimizer, pruner)]
    saved = torch.load(_stored(saved), weights_only=True)
    train(model, optimizer, pruner, 20 - middle, seed=1)
    again, optimizer = with_optimizer(network())
    pruner_again = recipe.apply(again, optimizer, 4)
    for part, state in zip((again, optimizer, pruner_again), saved, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, pruner_again, 20 - middle, seed=1)
    assert (pruner_again.epoch, pruner_again.ratio) == (pruner.epoch, pruner.ratio)
    assert same(pruner.finish().state_dict().values(), pruner_again.finish().state_dict().values())


def _stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def sparse_network():
    return pyprune.strip(pyprune.prune(network(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.7))


def test_constant_holds_the_zeros_of_a_plain_model():
    model, optimizer = with_optimizer(sparse_network())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe.from_string("stages: [constant]")
    pruner = recipe.apply(model, optimizer, 5)
    assert recipe.num_epochs is None
    assert list(model.state_dict()) == list(before)
    train(model, optimizer, pruner, 10)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(model.state_dict()[name] == 0, before[name] == 0)
        assert not torch.equal(model.state_dict()[name], before[name])
    pruner.finish()
    train(model, optimizer, pruner, 1)
    assert not torch.equal(model[0].weight == 0, before["0.weight"] == 0)  # nothing holds them any more


@pytest.mark.filterwarnings("ignore:the model has no zeros to hold")
def test_constant_with_a_start_holds_the_zeros_of_that_time():
    recipe = Recipe.from_string("stages: [constant: {start: 2, end: 4}]")
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 5)
    train(model, optimizer, pruner, 9)
    assert pruner.state_dict()["held"] == {}
    with torch.no_grad():
        sparse = sparse_network().state_dict()
        for name in ("0.weight", "2.weight"):
            model.get_parameter(name).copy_(sparse[name])
    pruner.step()
    train(model, optimizer, pruner, 5)
    assert same([model[i].weight == 0 for i in (0, 2)], [sparse[f"{i}.weight"] == 0 for i in (0, 2)])
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    again, optimizer = with_optimizer(network())
    resumed = recipe.apply(again, optimizer, 5)
    for part, state in zip((again, optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(again, optimizer, resumed, 3)
    assert same([again[i].weight == 0 for i in (0, 2)], [sparse[f"{i}.weight"] == 0 for i in (0, 2)])
    early = recipe.apply(*with_optimizer(network()), 5)
    with pytest.raises(ValueError, match="load its sparse weights"):
        early.load_state_dict(saved[2])


def test_constant_leaves_out_what_is_ignored():
    model, optimizer = with_optimizer(sparse_network())
    pruner = Recipe.from_string("stages: [constant: {ignore: {names: ['2']}}]").apply(model, optimizer, 5)
    train(model, optimizer, pruner, 2)
    assert [bool((model[i].weight == 0).any()) for i in (0, 2)] == [True, False]


@pytest.mark.filterwarnings("ignore:the model has no zeros to hold")
def test_constant_resumes_in_a_fresh_model():
    recipe = Recipe.from_string("stages: [constant]")
    model, optimizer = with_optimizer(sparse_network())
    pruner = recipe.apply(model, optimizer, 5)
    train(model, optimizer, pruner, 3)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, pruner, 3, seed=1)
    for fresh in (network(), pyprune.strip(pyprune.prune(network(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.2))):
        again, optimizer = with_optimizer(fresh)
        pruner_again = recipe.apply(again, optimizer, 5)
        for part, state in zip((again, optimizer, pruner_again), copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        train(again, optimizer, pruner_again, 3, seed=1)
        assert same(model.state_dict().values(), again.state_dict().values())
        pruner_again.finish()
        train(again, optimizer, pruner_again, 1)
        assert not torch.equal(again[0].weight == 0, model[0].weight == 0)  # nothing holds them any more


@pytest.mark.filterwarnings("ignore:the model has no zeros to hold")
def test_constant_refuses_the_state_of_other_zeros():
    recipe = Recipe.from_string("stages: [constant]")
    model, optimizer = with_optimizer(sparse_network())
    state = recipe.apply(model, optimizer, 5).state_dict() | {"step_count": 3}
    model, optimizer = with_optimizer(network())
    pruner = recipe.apply(model, optimizer, 5)
    with pytest.raises(ValueError, match="load its sparse weights before this state"):
        pruner.load_state_dict(state)
    assert pruner.step_count == 0
    masked = Recipe.from_string("stages: [prune: {final: 0.5, end: 1}]").apply(network(), None, 5)
    with pytest.raises(ValueError, match="load its sparse weights"):
        masked.load_state_dict(masked.state_dict() | {"held": state["held"]})


def test_constant_leaves_a_weight_alone_that_is_zero_everywhere():
    model, optimizer = with_optimizer(sparse_network())
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match=r"zero everywhere, .*: 2\.weight"):
        Recipe.from_string("stages: [constant]").apply(model, optimizer, 5)
    assert [target.name for target in attachments_of(model)] == ["0.weight"]
    model, optimizer = with_optimizer(model)
    Recipe.from_string("stages: [constant: {ignore: {all_zero: false}}]").apply(model, optimizer, 5)
    assert [target.name for target in attachments_of(model)] == ["0.weight", "2.weight"]


def test_freeze_keeps_the_masks():
    model, optimizer = with_optimizer(network())
    pruner = Recipe.from_string("stages: [prune: {final: 0.8, end: 4}]").apply(model, optimizer, 2)
    before = train(model, optimizer, pruner, 4)[-1]
    pruner.freeze()
    assert same(before, train(model, optimizer, pruner, 4)[-1])


def test_finish_before_the_end_warns():
    model, optimizer = with_optimizer(network())
    pruner = Recipe.from_string("stages: [prune: {final: 0.8, end: 4}]").apply(model, optimizer, 2)
    train(model, optimizer, pruner, 7)
    with pytest.warns(UserWarning, match=r"ends at step 8, but the training at step 7, .* check steps_per_epoch=2"):
        pruner.finish()


def test_measuring_ends_with_the_stage():
    model, optimizer = with_optimizer(network())
    text = "stages: [prune: {final: 0.8, end: 2, importance: taylor}, prune: {final: 0.9, start: 3, end: 4}]"
    pruner = Recipe.from_string(text).apply(model, optimizer, 2)
    train(model, optimizer, pruner, 3)
    states = []
    for _ in range(2):
        train(model, optimizer, pruner, 1)
        states.append([part["frozen"] for part in pruner.state_dict()["pruners"]])
    assert states == [[True, False], [True, False]]


def overflow(model, optimizer, pruner):
    """Go through a step that a GradScaler leaves out."""
    (model(torch.randn(4, 16)).sum() * torch.inf).backward()
    optimizer.zero_grad()
    pruner.step()


def test_a_last_update_that_was_put_off_comes_late():
    n = 16 * 24 + 24 * 8
    for later in ("", ", prune: {final: 0.8, start: 3, end: 4}"):
        model, optimizer = with_optimizer(network())
        text = f"stages: [prune: {{final: 0.5, end: 2, frequency: 1, importance: taylor, scope: model}}{later}]"
        pruner = Recipe.from_string(text).apply(model, optimizer, 1)
        train(model, optimizer, pruner, 1)
        before = dropped(masks_of(model).values())
        overflow(model, optimizer, pruner)
        assert not pruner.state_dict()["pruners"][0]["frozen"]
        assert dropped(masks_of(model).values()) == before < n // 2
        train(model, optimizer, pruner, 1)
        assert pruner.state_dict()["pruners"][0]["frozen"]
        assert dropped(masks_of(model).values()) == n // 2


def test_a_late_update_gives_way_to_the_stage_that_follows():
    model, optimizer = with_optimizer(network())
    text = "stages: [prune: {final: 0.5, end: 1, importance: taylor}, prune: {final: 0.75, end: 3, frequency: 2}]"
    pruner = Recipe.from_string(text).apply(model, optimizer, 1)
    overflow(model, optimizer, pruner)
    assert [part["frozen"] for part in pruner.state_dict()["pruners"]] == [True, False]
    by_magnitude = [mask.clone() for mask in masks_of(model).values()]
    assert same(by_magnitude, train(model, optimizer, pruner, 1)[0])


def two_optimizers(model):
    return [torch.optim.SGD(model[i].parameters(), lr=0.05, momentum=0.9) for i in (0, 2)]


@pytest.mark.parametrize("kind", ["prune: {importance: snip, ", "ac_dc: {frequency: 1, "])
def test_apply_takes_the_one_of_several_optimizers_that_trains_the_weights(kind, unchanged):
    model = network()
    first, second = two_optimizers(model)
    before = unchanged(model)
    text = f"stages: [{kind}final: 0.5, end: 2%s}}]"
    with pytest.raises(
        ValueError, match=r"stages\[0\]\..*: 2 of 2 optimizers train .* leave the weights of the others"
    ):
        Recipe.from_string(text % "").apply(model, [first, second], 1)
    before.check()
    recipe = Recipe.from_string(text % ", ignore: {names: ['0']}")
    pruner = recipe.apply(model, (first, second), 1)
    assert pruner._pruners[0].optimizer is second
    with pytest.raises(ValueError, match="0 of 2 optimizers train"):
        recipe.apply(network(), [first, second], 1)
    with pytest.raises(TypeError, match="optimizer is of type str; give a"):
        recipe.apply(model, [first, "second"], 1)


def test_several_optimizers_train_what_needs_none_of_them():
    model = network()
    Recipe.from_string("stages: [prune: {schedule: one_shot, final: 0.5}]").apply(model, two_optimizers(model), 1)
    assert dropped(masks_of(model).values()) == (16 * 24 + 24 * 8) // 2
    model = sparse_network()
    zeros = [model[i].weight == 0 for i in (0, 2)]
    optimizers = two_optimizers(model)
    pruner = Recipe.from_string("stages: [constant]").apply(model, optimizers, 1)
    for optimizer in optimizers:
        train(model, optimizer, pruner, 1)
    assert same(zeros, [model[i].weight == 0 for i in (0, 2)])


def test_apply_names_the_stage_that_does_not_fit_and_changes_nothing(unchanged):
    model, optimizer = with_optimizer(network())
    before = unchanged(model)
    cases = {
        "stages:\n- prune: {final: 0.5, end: 1}\n- prune: {final: 0.6, initial: 0.2, end: 2, ignore: {names: [f]}}": (
            "r.yaml:3: stages[1].prune: IgnoredScope rules that match nothing in the model: name 'f'"
        ),
        "stages:\n- prune: {final: {fc: 0.5}, end: 1}\n- prune: {final: 0.6, initial: 0, end: 2}": (
            "r.yaml:2: stages[0].prune: 'fc' matches no weight that is pruned"
        ),
        "stages:\n- prune: {final: 0.5, end: 1e-2}": (
            "r.yaml:2: stages[0].prune: at steps_per_epoch=5, in steps: start is 0 and end 0"
        ),
        "stages:\n- prune: {final: 0.5, schedule: one_shot, importance: snip}": (
            "r.yaml:2: stages[0].prune: importance snip is measured in training"
        ),
    }
    for text, complaint in cases.items():
        with pytest.raises(ValueError, match=re.escape(complaint)):
            Recipe.from_string(text, "r.yaml").apply(model, optimizer, 5)
        before.check()


def test_apply_checks_its_arguments(unchanged):
    recipe = Recipe.from_string("stages: [prune: {final: 0.5, end: 1}]")
    model = network()
    before = unchanged(model)
    with pytest.raises(TypeError, match=r"steps_per_epoch is 2\.5; give an integer"):
        recipe.apply(model, None, 2.5)
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        recipe.apply(model, None, 0)
    with pytest.raises(TypeError, match="model is of type dict"):
        recipe.apply({}, None, 2)
    for text, complaint in (
        ("constant", "give it"),
        ("ac_dc: {final: 0.5, end: 4, frequency: 1}", "give the optimizer"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Recipe.from_string(f"stages: [{text}]").apply(model, None, 2)
    before.check()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"extra": 1}, "is not the state_dict"),
        ({"steps_per_epoch": 7}, "saved with steps_per_epoch=7, and this is 2"),
        ({"pruners": []}, "that of another recipe"),
        ({"step_count": -1}, "step_count is -1"),
    ],
)
def test_load_state_dict_refuses_others(change, complaint):
    pruner = Recipe.from_string("stages: [prune: {final: 0.5, end: 1}]").apply(network(), None, 2)
    with pytest.raises(ValueError, match=complaint):
        pruner.load_state_dict(pruner.state_dict() | change)
    assert pruner.step_count == 0


def test_load_state_dict_changes_nothing_if_one_of_the_states_is_wrong():
    text = "stages: [prune: {final: 0.5, end: 2}, prune: {final: 0.8, end: 4}]"
    pruner = Recipe.from_string(text).apply(network(), None, 2)
    other = Recipe.from_string(text).apply(network(), None, 2)
    for _ in range(3):
        other.step()
    before, state = pruner.state_dict(), other.state_dict()
    first, second = state["pruners"]
    for wrong in (second | {"step_count": -1}, second | {"ratio": 2.0}, {"step_count": 3}, None):
        with pytest.raises(ValueError, match=r"step_count is -1|ratio of the state|another recipe"):
            pruner.load_state_dict(state | {"pruners": [first, wrong]})
        assert same_state(pruner.state_dict(), before)
    pruner.load_state_dict(state)
    assert same_state(pruner.state_dict(), state)


def same_state(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_from_file_says_where_it_is_not_utf_8(tmp_path):
    (tmp_path / "r.yaml").write_bytes("stages:\n- constant  # später\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.yaml:2: this is not UTF-8 \(.*\); save the file in UTF-8"):
        Recipe.from_file(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stage: []", "r.yaml:1: stage: 'stage' is unknown here; did you mean stages?"),
        ("epochs: 3", "r.yaml:1: it lacks stages"),
        ("stages: [constant]\nepochs: many", "r.yaml:2: epochs: 'many' is not a number of epochs"),
        (
            "epochs: 3\nstages: [prune: {final: 0.5, end: 4}]",
            "r.yaml:1: epochs: there are 3, but a stage or the teacher needs 4",
        ),
        ("stages: [constant]\nlearning_rate: 0.1", "r.yaml:2: learning_rate: 0.1 is no dict"),
        (
            "stages: [constant]\nlearning_rate: {start: 0.1}",
            "'start' is not a number of epochs; give a dict by epoch",
        ),
        ("stages: [constant]\nlearning_rate:\n  0: 0", "r.yaml:3: learning_rate.0: 0 is not a learning rate"),
    ],
)
def test_from_file_names_file_line_and_field(tmp_path, text, complaint):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Recipe.from_file(tmp_path / "r.yaml")


def test_epochs_are_those_of_the_last_stage_or_given():
    stages = "stages: [prune: {final: 0.5, end: 3.5}, constant: {end: 4.5}]"
    assert Recipe.from_string(stages).num_epochs == 5
    assert Recipe.from_string(f"{{epochs: 9, {stages}}}").num_epochs == 9


# ---- the table that translates SparseML's modifiers ----


def translated(text):
    """Return the masks after training with a recipe, and whether they are those of a Pruner."""
    model, optimizer = with_optimizer(network())
    return train(model, optimizer, Recipe.from_string(f"stages:\n  - {text}").apply(model, optimizer, 4), 16)


def by_hand(method, schedule, **keywords):
    model, optimizer = with_optimizer(network())
    return train(model, optimizer, Pruner(model, method, schedule, optimizer, **keywords), 16)


SPAN = {"start": 4, "end": 12, "frequency": 2}
SPARSEML = {
    "GMPruningModifier": (
        "{schedule: cubic, initial: 0.05, final: 0.8, start: 1.0, end: 3.0, frequency: 0.5, reintroduce: false}",
        lambda: by_hand(LOCAL, schedules.cubic(0.8, initial=0.05, **SPAN), reintroduce=False),
    ),
    "update_frequency -1": (
        "{initial: 0.05, final: 0.8, start: 1.0, end: 3.0}",
        lambda: by_hand(LOCAL, schedules.cubic(0.8, initial=0.05, start=4, end=12)),
    ),
    "inter_func linear": (
        "{schedule: linear, final: 0.8, start: 1, end: 3, frequency: 0.5}",
        lambda: by_hand(LOCAL, schedules.linear(0.8, **SPAN)),
    ),
    "inter_func inverse_cubic": (
        "{schedule: inverse_cubic, final: 0.8, start: 1, end: 3, frequency: 0.5}",
        lambda: by_hand(LOCAL, schedules.inverse_cubic(0.8, **SPAN)),
    ),
    "GlobalMagnitudePruningModifier": (
        "{final: 0.8, start: 1, end: 3, frequency: 0.5, scope: model}",
        lambda: by_hand(Method(MAGNITUDE), schedules.cubic(0.8, **SPAN)),
    ),
    "params by name": (
        "{final: {0.weight: 0.8}, start: 1, end: 3, frequency: 0.5}",
        lambda: by_hand(LOCAL, schedules.cubic({"0.weight": 0.8}, **SPAN)),
    ),
    "params by re:": (
        "{final: {'.*[02].weight': 0.8}, start: 1, end: 3, frequency: 0.5}",
        lambda: by_hand(LOCAL, schedules.cubic(0.8, **SPAN)),
    ),
    "params, global": (
        "{final: 0.8, start: 1, end: 3, frequency: 0.5, scope: {group: {groups: {params: [0.weight, '2.*']}}}}",
        lambda: by_hand(Method(MAGNITUDE), schedules.cubic(0.8, **SPAN)),
    ),
    "final_sparsity by params": (
        "{final: {'0.weight': 0.8, '2.weight': 0.5}, start: 1, end: 3, frequency: 0.5}",
        lambda: by_hand(LOCAL, schedules.cubic({"0": 0.8, "2": 0.5}, **SPAN)),
    ),
    "__ALL_PRUNABLE__": (
        "{final: 0.8, start: 1, end: 3, frequency: 0.5, ignore: {types: [Embedding], validate: false}}",
        lambda: by_hand(LOCAL, schedules.cubic(0.8, **SPAN)),
    ),
    "mask_type block4": (
        "{final: 0.8, start: 1, end: 3, frequency: 0.5, granularity: {block: {n: 1, m: 4}}}",
        lambda: by_hand(Method(MAGNITUDE, granularity.block(1, 4), scope.tensor()), schedules.cubic(0.8, **SPAN)),
    ),
    "2:4 of a share": (
        "{final: 0.4, schedule: one_shot, start: 1, scope: {n_of_m: {keep: 2, of: 4, dim: both, among: model}}}",
        lambda: by_hand(
            Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4, dim="both", among="model")),
            schedules.one_shot(0.4, start=4),
        ),
    ),
    "mask_type 2:4": (
        "{final: 0.5, schedule: one_shot, start: 1, scope: {n_of_m: {keep: 2, of: 4}}}",
        lambda: by_hand(Method(MAGNITUDE, scope=scope.n_of_m(keep=2, of=4)), schedules.one_shot(0.5, start=4)),
    ),
}


@pytest.mark.parametrize("row", SPARSEML)
def test_translation_of_gradual_magnitude_pruning(row):
    text, expected = SPARSEML[row]
    seen = translated(f"prune: {text}")
    assert all(same(a, b) for a, b in zip(seen, expected(), strict=True))
    assert dropped(seen[2]) == 0  # dense before the start
    assert dropped(seen[-1]) > 200
    assert same(seen[11], seen[-1])  # leave_enabled=True: masks hold after the end


def test_translation_of_ac_dc():
    text = "ac_dc: {final: 0.8, start: 0, end: 4, frequency: 1}"
    model, optimizer = with_optimizer(network())
    expected = train(model, optimizer, pyprune.ac_dc(model, 0.8, optimizer, end=16, frequency=4), 16)
    assert all(same(a, b) for a, b in zip(translated(text), expected, strict=True))
    local = translated(text.replace("frequency: 1", "frequency: 1, scope: tensor"))
    assert [dropped([mask]) for mask in local[-1]] == [round(0.8 * mask.numel()) for mask in local[-1]]


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        (f"final: 0.5, end: {HUGE}", "end"),
        ("final: 0.5, end: 1e300", "end"),
        ("final: 0.5, end: 2001-99-99", "end"),
        ("final: 0.5, end: ", "end"),
        (f"final: {HUGE}, end: 2", "final"),
        ("final: , end: 2", "final"),
        ("final: {no: 0.5}, end: 2", "final"),
        ("final: {fc: }, end: 2", "final"),
        ("final: {'(': 0.5}, end: 2", "final"),
        ("final: {'(a)\\1': 0.5}, end: 2", "final"),
        ("final: 0.5, end: 2, frequency: 1e300", "frequency"),
        (f"final: 0.5, end: 2, schedule: {{polynomial: {{power: {HUGE}}}}}", "power"),
        ("final: 0.5, end: 2, schedule: {polynomial: }", "polynomial"),
        (f"schedule: {{multi_step: {{{HUGE}: 0.5}}}}", "multi_step"),
        ("schedule: {multi_step: {0: 0.5, 0.0: 0.6}}", "multi_step"),
        (f"final: 0.5, end: 2, importance: {{magnitude: {{p: {HUGE}}}}}", "magnitude"),
        ("final: 0.5, end: 2, importance: {apoz: {activation: relu}}", "apoz"),
        ("final: 0.5, end: 2, importance: [magnitude]", "importance"),
        ("final: 0.5, end: 2, importance: ", "importance"),
        ("final: 0.5, end: 2, granularity: {block: {n: 1e3, m: 1}}", "block"),
        ("final: 0.5, end: 2, scope: {group: {groups: {heads: }}}", "groups.heads"),
        ("final: 0.5, end: 2, scope: {group: {groups: {heads: [[a]]}}}", "groups.heads"),
        ("final: 0.5, end: 2, scope: {group: {groups: [a]}}", "groups"),
        ("final: 0.5, end: 2, scope: {group: {groups: {heads: ['(a)\\1']}}}", "group"),
        ("final: 0.5, end: 2, ignore: {names: {fc: 1}}", "ignore.names"),
        ("final: 0.5, end: 2, ignore: {names: [no]}", "ignore.names"),
        ("final: 0.5, end: 2, ignore: {patterns: [[]]}", "ignore.patterns"),
        ("final: 0.5, end: 2, ignore: {types: [Embedding], validate: nope}", "ignore"),
        ("final: 0.5, end: 2, ignore: 3", "ignore"),
        ("final: 0.5, end: 2, scope: model, max_ratio: nope", "max_ratio"),
        ("final: 0.5, end: 2, allocation: [erk]", "allocation"),
        ("final: 0.5, end: 2, reintroduce: 1", "reintroduce"),
        ("final: 0.5, end: 2, end: 3", "end"),
    ],
)
def test_from_string_names_the_place_of_every_wrong_value(fields, place):
    with pytest.raises(ValueError, match=r"^recipe.yaml:2: stages\[0\]") as raised:
        Recipe.from_string(f"stages:\n  - prune: {{{fields}}}", "recipe.yaml")
    assert place in str(raised.value)
    assert "object is not" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_recipe_of_very_many_phases_is_refused():
    with pytest.raises(ValueError, match=r"^recipe.yaml:1: .*frequency is 1, which makes more than 100,000 phases"):
        Recipe.from_string("stages: [ac_dc: {final: 0.5, end: 1000000, frequency: 0.000001}]", "recipe.yaml")
