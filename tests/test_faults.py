"""Each public call, interrupted at any of its lines, has done all or nothing; then it can be made again."""

import os
import random
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pyprune
import pyprune.torch_prune as torch_prune
from pyprune import Method, Pruner, granularity, importance, schedules, scope
from pyprune.integrations.training import Training, start_of
from pyprune.runtime import accelerate as whole
from pyprune.runtime import measure
from pyprune.runtime.timing import in_turns
from pyprune.selection.prune import update_masks
from tests.fault_injector import check
from tests.structured.small_blocks import Experts, Residual

# A file that was being written is closed when it is forgotten.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

LOCAL = Method(importance.magnitude(), scope=scope.tensor())
CHANNELS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
BATCH = torch.linspace(-1, 1, 2 * 1 * 6 * 6).reshape(2, 1, 6, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.fc.weight
        self.fc.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.norm.eval()

    def forward(self, images):
        hidden = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.fc(hidden) + self.tied(hidden)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 2)

    def forward(self, series):
        return self.layer(series)[0]


def loss_of(model, batch=BATCH):
    return model(batch).square().mean()


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def finetune(model):
    train(model, torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1))


def dense():
    return {"model": Net()}


def masked(ratio=0.5, method=LOCAL, **options):
    return {"model": pyprune.prune(Net(), method, ratio=ratio, **options)}


def gated(mode="UNSTRUCTURED_HARD_CONCRETE", make=Net):
    return {"model": pyprune.prune(make(), mode)}


def trained(make=dense, steps=1):
    """Return a model with gradients, and its optimizer with momentum."""
    things = make()
    optimizer = torch.optim.SGD(things["model"].parameters(), lr=0.1, momentum=0.9)
    train(things["model"], optimizer, steps)
    return {**things, "optimizer": optimizer}


def pruning(make_pruner, steps=0):
    """Return a model in training with its pruner, so many steps later; one more step of the optimizer is made."""

    def make():
        things = trained()
        things["pruner"] = make_pruner(things["model"], things["optimizer"])
        for _ in range(steps):
            train(things["model"], things["optimizer"])
            things["pruner"].step()
        train(things["model"], things["optimizer"])
        return things

    return make


def made(make_pruner, make=trained):
    """Return what makes a pruner, and the call for it."""
    return make, lambda things: make_pruner(things["model"], things["optimizer"])


def by_schedule(method=LOCAL, **options):
    return lambda model, optimizer: Pruner(model, method, schedules.linear(0.6, end=3), optimizer, **options)


def snip(model, optimizer):
    return Pruner(model, Method(importance.snip()), schedules.linear(0.6, start=1, end=3), optimizer)


def wanda(model, optimizer):
    return Pruner(
        model, Method(importance.wanda(), scope=scope.row()), schedules.linear(0.6, start=1, end=3), optimizer
    )


def rigl(model, optimizer):
    return pyprune.RigLPruner(model, 0.5, optimizer, end=9, frequency=1, fraction=0.9)


def ac_dc(model, optimizer):
    return pyprune.ac_dc(model, 0.5, optimizer, end=8, frequency=1)


def movement(model, optimizer):
    return pyprune.MovementPruner(model, schedules.cubic(0.5, start=1, end=4), optimizer)


def from_recipe(text):
    return lambda model, optimizer: pyprune.Recipe.from_string(text).apply(model, optimizer, 1)


TEACHER = Net()


def with_teacher(model, optimizer):
    recipe = pyprune.Recipe.from_string(STAGES + "\nteacher: {start: 9, pairs: [conv]}")
    return recipe.apply(model, optimizer, 1, teacher=TEACHER)


STAGES = (
    "stages: [prune: {final: 0.5, end: 2}, prune: {final: 0.8, initial: 0.5, start: 2, end: 4, importance: snip}]"
)
CONSTANT = "stages: [constant]"


def resumed(make_pruner, steps=2):
    """Return a new pruner, and what the state of one is a few steps later."""

    def make():
        later = pruning(make_pruner, steps)()
        things = pruning(make_pruner)()
        state = (later["pruner"].state_dict(), later["model"].state_dict())
        things["model"].load_state_dict(state[1])
        return {**things, "state": state[0]}

    return make


def load(things):
    things["pruner"].load_state_dict(things["state"])


def saved_config():
    pruned = pyprune.prune(Net(), LOCAL, ratio=0.5, zero_dead_channels=True, examples_inputs=BATCH)
    return {**dense(), "config": pyprune.get_config(pruned)}


def holding():
    things = trained(masked)
    return {**things, "keep": pyprune.keep_sparse(things["model"], things["optimizer"]), "other": Net()}


def with_average():
    things = trained()
    things["average"] = torch.optim.swa_utils.AveragedModel(things["model"])
    things["pruner"] = Pruner(things["model"], LOCAL, schedules.linear(0.6, end=1), things["optimizer"])
    return things


def result(score=0.8):
    return pyprune.SensitivityResult(0.9, {"fc.weight": pyprune.SensitivityTarget(40, 40, {0.5: score, 0.9: 0.3})})


def files():
    folder = Path(tempfile.mkdtemp())
    for name in ("to_json", "to_csv", "plot.png"):
        (folder / name).write_text("the old one")
    return {"folder": folder}


def sparse_files():
    things = {**masked(), **files()}
    pyprune.save_sparse(Net(), things["folder"] / "new.safetensors")
    return things


def small():
    return {"model": nn.Linear(4, 3)}


def torch_pruned(make=lambda: nn.Linear(4, 3), name="weight"):
    return {"model": torch_prune.l1_unstructured(make(), name, 0.5)}


def layers():
    return {"model": nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 2))}


def places(things):
    return [(things["model"][0], "weight"), (things["model"][1].out_proj, "weight")]


def in_trainer(make_start, strip_masks):
    def make():
        things = trained()
        training = Training(make_start, things["model"], things["optimizer"], 1, None)
        training.step()
        train(things["model"], things["optimizer"])
        return {**things, "training": training, "pruner": training.pruning}

    return make, lambda things: things["training"].finish(strip_masks=strip_masks)


def scheduler(kind):
    if kind == "magnitude":
        things = masked()
        mode = "UNSTRUCTURED_MAGNITUDE_LOCAL"
        things["scheduler"] = pyprune.MultiStepMagnitudePruningScheduler(
            things["model"], mode=mode, steps={0: 0.3, 2: 0.7}
        )
        return things
    things = gated("UNSTRUCTURED_REGULARIZATION_BASED")
    things["loss"] = pyprune.RBLoss(things["model"], 0.5)
    things["scheduler"] = pyprune.MultiStepRBPruningScheduler(things["loss"], {0: 0.3, 2: 0.7})
    return things


def lagrangian():
    things = gated()
    things["loss"] = pyprune.LagrangianLoss(things["model"], 0.5)
    things["loss"].step()
    return things


def of_model(function, *arguments, **options):
    return lambda things: function(things["model"], *arguments, **options)


PRUNE, RATIO = of_model(pyprune.prune, LOCAL, ratio=0.5), of_model(pyprune.prune, LOCAL, ratio=0.7)
DEAD = of_model(pyprune.prune, CHANNELS, ratio=0.6, zero_dead_channels=True, examples_inputs=BATCH)


def dead():
    return masked(0.3, CHANNELS, zero_dead_channels=True, examples_inputs=BATCH)


def with_dead_channel(make=dense, **options):
    """A model with a convolution's channel that nothing arrives of, and whatever else was put on it."""

    def things():
        made = make(**options)
        with torch.no_grad():
            for parameter in (made["model"].conv.weight, made["model"].conv.bias, made["model"].norm.bias):
                parameter[1] = 0
            made["model"].norm.running_mean[1] = 0
            made["model"](BATCH)  # masks see what was written
        return made

    return things


def plan_of_net():
    return pyprune.shrink(with_dead_channel()()["model"], BATCH).plan


def blocks(kind=""):
    return put_on(nn.Sequential(*(Residual(i) for i in range(3))), kind)


def blocks_of(count):
    """So many blocks, of which each is done as a whole."""
    return {"model": nn.Sequential(*(Residual(i) for i in range(count)))}


def experts(kind=""):
    return put_on(nn.Sequential(Experts(), nn.Linear(4, 2)), kind)


def put_on(model, kind):
    if kind == "with masks":
        pyprune.prune(model, LOCAL, ratio=0.5, examples_inputs=ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "with an optimizer":
        train_on(model, optimizer)
    return {"model": model, "optimizer": optimizer}


def train_on(model, optimizer):
    model(ROWS).square().mean().backward()
    optimizer.step()


def drop(call):
    return lambda things: call(things["model"], ROWS, optimizer=things["optimizer"])


ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)
SHRINK = of_model(pyprune.shrink, BATCH)
RIGHT = "UNSTRUCTURED_MAGNITUDE_GLOBAL"
COUPLED = Method(importance.magnitude(), granularity.coupled(), scope.tensor())
WANDA = Method(importance.wanda(), scope=scope.row())
UNITS = of_model(pyprune.prune, COUPLED, ratio=0.4, examples_inputs=BATCH)


def gated_units():
    return {
        "model": pyprune.prune(
            Net(), "UNSTRUCTURED_HARD_CONCRETE", granularity=granularity.coupled(), examples_inputs=BATCH
        )
    }


def replaceable():
    """A model with zeros whose layers have buffers and hooks, and of which one may be replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[2].weight[1:] = 0
    return {"model": model}


def accelerated(things):
    """Replace that layer, however fast it is."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (whole, measure):
            patch.setattr(module, "in_turns", faster)
        pyprune.accelerate(things["model"], ROWS)
    return things


def faster(ways, *, seconds, **options):
    times = in_turns(ways, seconds=0, least=2, **options)
    return {way: [1.0 if way == "dense" else 0.5] for way in times}


CALLS = {
    "prune": (dense, PRUNE),
    "prune again": (masked, RATIO),
    "prune what is left": (masked, of_model(pyprune.prune, LOCAL, ratio=0.5, from_remaining=True)),
    "prune globally with inputs": (masked, of_model(pyprune.prune, RIGHT, ratio=0.8, examples_inputs=BATCH)),
    "prune 2:4": (dense, of_model(pyprune.prune, Method(importance.magnitude(), scope=scope.n_of_m(keep=1, of=3)))),
    "prune dead channels": (dense, DEAD),
    "prune dead channels again": (dead, DEAD),
    "coupled_groups": (masked, of_model(pyprune.coupled_groups, BATCH)),
    "shrink": (with_dead_channel(), SHRINK),
    "shrink with masks": (with_dead_channel(masked), SHRINK),
    "shrink with gates": (with_dead_channel(gated), SHRINK),
    "shrink with an optimizer": (
        with_dead_channel(trained),
        lambda things: pyprune.shrink(things["model"], BATCH, optimizer=things["optimizer"]),
    ),
    "rebuild": (
        lambda: {**dense(), "plan": plan_of_net()},
        lambda things: pyprune.rebuild(things["model"], things["plan"]),
    ),
    "reconstruct": (
        lambda: {**masked(), "dense": dense()["model"]},
        lambda things: pyprune.reconstruct(things["dense"], things["model"], [BATCH]),
    ),
    "prune_one_shot": (
        lambda: blocks_of(1),
        lambda things: pyprune.prune_one_shot(
            things["model"], [ROWS], WANDA, ratio=0.5, solver=pyprune.solvers.least_squares(), blocks="0"
        ),
    ),
    "prune_one_shot with masks": (
        lambda: put_on(blocks_of(1)["model"], "with masks"),
        lambda things: pyprune.prune_one_shot(
            things["model"], [ROWS], LOCAL, ratio=0.6, blocks="0", reconstruct=pyprune.solvers.reconstruct(steps=2)
        ),
    ),
    "prune_retrain_free": (
        dense,
        of_model(pyprune.prune_retrain_free, [BATCH], target_macs=0.7, draws=1),
    ),
    "prune_retrain_free by a loss": (
        dense,
        of_model(pyprune.prune_retrain_free, [BATCH], target_macs=0.7, loss_fn=loss_of),
    ),
    "reconstruct without sums": (
        lambda: {**masked(), "dense": dense()["model"]},
        lambda things: pyprune.reconstruct(things["dense"], things["model"], [BATCH], memory=0),
    ),
    **{
        f"drop_{what} {kind}": (lambda make=make, kind=kind: make(kind), drop(call))
        for what, make, call in (
            ("blocks", blocks, partial(pyprune.drop_blocks, count=1)),
            ("experts", experts, partial(pyprune.drop_experts, count=1)),
        )
        for kind in ("of a dense model", "with masks", "with an optimizer")
    },
    "drop_blocks by error": (blocks, drop(partial(pyprune.drop_blocks, count=2, importance="output_error"))),
    "rebuild without blocks": (blocks, of_model(pyprune.rebuild, {"version": 1, "blocks": {"1": None}})),
    "rebuild without experts": (experts, of_model(pyprune.rebuild, {"version": 1, "experts": {"0": [1, 2]}})),
    "prune coupled": (dense, UNITS),
    "prune coupled again": (lambda: masked(0.5, COUPLED, examples_inputs=BATCH), UNITS),
    "prune coupled to a cost": (dense, of_model(pyprune.prune, COUPLED, target_macs=0.6, examples_inputs=BATCH)),
    "prune with gates of units": (
        dense,
        of_model(
            pyprune.prune, "UNSTRUCTURED_HARD_CONCRETE", granularity=granularity.coupled(), examples_inputs=BATCH
        ),
    ),
    "strip gates of units": (gated_units, of_model(pyprune.strip)),
    "shrink with gates of units": (gated_units, SHRINK),
    "Pruner of units": made(by_schedule(COUPLED, examples_inputs=BATCH)),
    "Pruner.step of units": (
        pruning(by_schedule(COUPLED, examples_inputs=BATCH)),
        lambda things: things["pruner"].step(),
    ),
    "prune recurrent": (lambda: {"model": Recurrent()}, PRUNE),
    "prune by chance": (dense, of_model(pyprune.prune, Method(importance.random(0)), ratio=0.5)),
    "prune with gates": (dense, of_model(pyprune.prune, "UNSTRUCTURED_HARD_CONCRETE")),
    "prune with gates, recurrent": (
        lambda: {"model": Recurrent()},
        of_model(pyprune.prune, "UNSTRUCTURED_REGULARIZATION_BASED"),
    ),
    "update_masks": (masked, of_model(update_masks, RIGHT, 0.8)),
    "strip": (masked, of_model(pyprune.strip)),
    "strip dead channels": (dead, of_model(pyprune.strip)),
    "strip a copy": (masked, of_model(pyprune.strip, do_copy=True)),
    "strip gates": (gated, of_model(pyprune.strip, expected_count=True)),
    "strip gates, recurrent": (lambda: gated(make=Recurrent), of_model(pyprune.strip)),
    "get_config": (masked, of_model(pyprune.get_config)),
    "load_from_config": (saved_config, lambda things: pyprune.load_from_config(things["model"], things["config"])),
    "load_from_config, gates": (
        lambda: {**dense(), "config": pyprune.get_config(gated()["model"])},
        lambda things: pyprune.load_from_config(things["model"], things["config"]),
    ),
    "attach_gate": (
        lambda: {"model": nn.Linear(3, 2), "gate": pyprune.HardConcreteGate((2, 3))},
        lambda things: pyprune.attach_gate(things["model"], "weight", things["gate"]),
    ),
    "pruning_statistic": (masked, of_model(pyprune.pruning_statistic)),
    "pruning_statistic with inputs": (gated, of_model(pyprune.pruning_statistic, examples_inputs=BATCH)),
    "keep_sparse": (
        lambda: trained(masked),
        lambda things: pyprune.keep_sparse(things["model"], things["optimizer"]),
    ),
    "keep_sparse of zeros": (
        lambda: trained(lambda: {"model": pyprune.strip(masked()["model"])}),
        lambda things: pyprune.keep_sparse(things["model"], things["optimizer"]),
    ),
    "KeepSparse.remove": (holding, lambda things: things["keep"].remove()),
    "KeepSparse.apply": (holding, lambda things: things["keep"].apply()),
    "KeepSparse.reapply": (holding, lambda things: things["keep"].reapply(things["other"])),
    "reapply": (
        lambda: {**masked(), "other": masked(0.2)["model"]},
        lambda things: pyprune.reapply(things["model"], things["other"]),
    ),
    "Pruner": made(by_schedule()),
    "Pruner on masks": made(by_schedule(), lambda: trained(masked)),
    "Pruner with dead channels": made(by_schedule(CHANNELS, zero_dead_channels=True, examples_inputs=BATCH)),
    "Pruner of gradients": made(snip),
    "Pruner of activations": made(wanda),
    "RigLPruner": made(rigl),
    "ac_dc": made(ac_dc, lambda: trained(masked)),
    "MovementPruner": made(movement),
    "Pruner.step": (pruning(by_schedule()), lambda things: things["pruner"].step()),
    "Pruner.step 2": (pruning(by_schedule(), 1), lambda things: things["pruner"].step()),
    "Pruner.step, what is gone stays": (
        pruning(by_schedule(reintroduce=False), 1),
        lambda things: things["pruner"].step(),
    ),
    "Pruner.step with dead channels": (
        pruning(by_schedule(CHANNELS, zero_dead_channels=True, examples_inputs=BATCH), 1),
        lambda things: things["pruner"].step(),
    ),
    "Pruner.step with an average": (with_average, lambda things: things["pruner"].step()),
    "Pruner.step of gradients": (pruning(snip, 1), lambda things: things["pruner"].step()),
    "Pruner.step of activations": (pruning(wanda, 1), lambda things: things["pruner"].step()),
    "RigLPruner.step": (pruning(rigl, 1), lambda things: things["pruner"].step()),
    "AcDcPruner.step, closing": (pruning(ac_dc), lambda things: things["pruner"].step()),
    "AcDcPruner.step, opening": (pruning(ac_dc, 1), lambda things: things["pruner"].step()),
    "MovementPruner.step": (pruning(movement, 1), lambda things: things["pruner"].step()),
    "Pruner.freeze": (pruning(snip, 1), lambda things: things["pruner"].freeze()),
    "Pruner.freeze of activations": (pruning(wanda, 1), lambda things: things["pruner"].freeze()),
    "Pruner.load_state_dict": (resumed(by_schedule()), load),
    "Pruner.load_state_dict of gradients": (resumed(snip), load),
    "Pruner.load_state_dict of activations": (resumed(wanda), load),
    "RigLPruner.load_state_dict": (resumed(rigl), load),
    "MovementPruner.load_state_dict": (resumed(movement), load),
    "Recipe.apply": made(from_recipe(STAGES)),
    "Recipe.apply, with a teacher": made(with_teacher),
    "Recipe.apply, constant": made(from_recipe(CONSTANT), lambda: trained(masked)),
    "RecipePruner.step": (pruning(from_recipe(STAGES), 1), lambda things: things["pruner"].step()),
    "RecipePruner.load_state_dict": (resumed(from_recipe(STAGES)), load),
    "RecipePruner.finish": (pruning(from_recipe(STAGES), 4), lambda things: things["pruner"].finish()),
    "RecipePruner.finish, with a teacher": (pruning(with_teacher, 4), lambda things: things["pruner"].finish()),
    "RBLoss": (lambda: gated("UNSTRUCTURED_REGULARIZATION_BASED"), of_model(pyprune.RBLoss, 0.5)),
    "L0Loss": (gated, of_model(pyprune.L0Loss, examples_inputs=BATCH)),
    "LagrangianLoss": (gated, of_model(pyprune.LagrangianLoss, 0.5)),
    "LagrangianLoss.step": (lagrangian, lambda things: things["loss"].step()),
    "magnitude scheduler": (lambda: scheduler("magnitude"), lambda things: things["scheduler"].step()),
    "RB scheduler": (lambda: scheduler("RB"), lambda things: things["scheduler"].step()),
    "batch_norm_adaptation": (dense, of_model(pyprune.batch_norm_adaptation, [BATCH, BATCH + 1])),
    "batch_norm_adaptation anew": (masked, of_model(pyprune.batch_norm_adaptation, [BATCH, BATCH + 1], reset=True)),
    "calibrate gradients": (masked, of_model(pyprune.calibrate, [BATCH], importance.snip(), loss_fn=loss_of)),
    "calibrate activations": (masked, of_model(pyprune.calibrate, [BATCH, BATCH], importance.wanda())),
    "snip": (dense, of_model(pyprune.snip, [BATCH], loss_of, ratio=0.5)),
    "prune_with_gradients": (
        dense,
        of_model(pyprune.prune_with_gradients, [BATCH], loss_of, pyprune.solvers.block_fisher(), ratio=0.5),
    ),
    "prune_with_gradients under masks": (
        masked,
        of_model(pyprune.prune_with_gradients, [BATCH], loss_of, pyprune.solvers.m_fac(), ratio=0.7),
    ),
    "sensitivity": (dense, of_model(pyprune.sensitivity, loss_of, ratios=(0.3, 0.6), progress=False)),
    "sensitivity under masks": (masked, of_model(pyprune.sensitivity, loss_of, ratios=(0.6,), progress=False)),
    "accelerate": (replaceable, accelerated),
    "densify": (lambda: accelerated(replaceable()), of_model(pyprune.densify)),
    "load_accelerated": (
        lambda: {**replaceable(), "state": accelerated(replaceable())["model"].state_dict()},
        lambda things: pyprune.load_accelerated(things["model"], things["state"]),
    ),
    "benchmark": (
        lambda: {**masked(), "dense": dense()["model"]},
        lambda things: pyprune.benchmark(
            things["model"], BATCH, dense=things["dense"], seconds=0, memory=False, files=False
        ),
    ),
    "iterative_prune": (
        dense,
        of_model(pyprune.iterative_prune, (0.3, 0.6), LOCAL, finetune, loss_of, progress=False),
    ),
    "iterative_prune under masks": (
        masked,
        of_model(pyprune.iterative_prune, (0.7,), LOCAL, finetune, loss_of, max_drop=0.0, progress=False),
    ),
    "lottery_ticket": (
        dense,
        of_model(pyprune.lottery_ticket, finetune, 0.5, iterations=2, eval_fn=loss_of, progress=False),
    ),
    "slimming_loss": (dense, of_model(pyprune.slimming_loss)),
    "to_json": (files, lambda things: result().to_json(things["folder"] / "to_json")),
    "save_sparse": (sparse_files, lambda things: pyprune.save_sparse(things["model"], things["folder"] / "to_json")),
    "load_sparse": (
        sparse_files,
        lambda things: pyprune.load_sparse(things["folder"] / "new.safetensors", things["model"]),
    ),
    "to_csv": (files, lambda things: result().to_csv(things["folder"] / "to_csv")),
    "Training": (
        trained,
        lambda things: Training(
            start_of(pyprune.Recipe.from_string(STAGES)), things["model"], things["optimizer"], 1, None
        ),
    ),
    "Training.finish": in_trainer(start_of(pyprune.Recipe.from_string(STAGES)), False),
    "Training.finish and strip": in_trainer(lambda model, optimizer, steps: snip(model, optimizer), True),
    **{
        f"torch_prune.{name}": (small, of_model(getattr(torch_prune, name), "weight", *rest))
        for name, rest in {
            "identity": (),
            "random_unstructured": (0.5,),
            "l1_unstructured": (0.5,),
            "random_structured": (0.4, 0),
            "ln_structured": (0.4, 2, 0),
            "custom_from_mask": (torch.eye(3, 4),),
        }.items()
    },
    "torch_prune twice": (torch_pruned, of_model(torch_prune.ln_structured, "weight", 0.4, 2, 0)),
    "torch_prune of attention": (
        layers,
        lambda things: torch_prune.l1_unstructured(things["model"][1].out_proj, "weight", 0.5),
    ),
    "torch_prune.global_unstructured": (
        layers,
        lambda things: torch_prune.global_unstructured(places(things), torch_prune.L1Unstructured, amount=0.5),
    ),
    "torch_prune.global_unstructured by chance": (
        layers,
        lambda things: torch_prune.global_unstructured(places(things), torch_prune.RandomUnstructured, amount=0.5),
    ),
    "torch_prune.remove": (torch_pruned, of_model(torch_prune.remove, "weight")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name, lines):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *given, **options: None)  # as often as it is called
        check(*CALLS[name], lines)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_has_done_all_or_nothing(name):
    few = random.Random(int(os.environ.get("FAULT_SEED", "0")))
    run(name, lambda total: sorted(few.sample(range(1, total + 1), min(total, 4))))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_interrupted_anywhere_has_done_all_or_nothing(name):
    # The longest go through the same lines again and again, and through calls that have a row of their own.
    run(name, lambda total: range(1, total + 1, total // 4000 + 1))
