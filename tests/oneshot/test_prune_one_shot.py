"""A model pruned block by block: what goes, what is written, what is said."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, importance, scope, solvers
from pyprune.oneshot.find_blocks import find_blocks
from pyprune.oneshot.run_folder import RunFolder
from pyprune.oneshot.solution import Solution
from tests.oneshot import models

NAN = float("nan")
WANDA = Method(importance.wanda(), scope=scope.row())
MAGNITUDE = Method(importance.magnitude(), scope=scope.tensor())


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


class Net(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@dataclass(frozen=True)
class Exact:
    """Least squares on a mask, or on the mask of the smallest elements."""

    chooses: bool = False
    name: str = "exact"

    def solve(self, weight, gram, *, scope, ratio, mask):
        if self.chooses:
            count = min(int(ratio * weight.numel() + 0.5), weight.numel() - 1)
            order = weight.abs().flatten().argsort(stable=True)
            mask = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, order[:count], False).view_as(weight)
        solved = torch.zeros_like(weight)
        for row, kept in enumerate(mask):
            part = gram[kept][:, kept] + 1e-6 * gram.diagonal().mean() * torch.eye(int(kept.sum()), dtype=gram.dtype)
            solved[row, kept] = torch.linalg.solve(part, gram[kept] @ weight[row])
        return Solution(solved, mask, 1e-6)


def made(count=3, seed=0):
    torch.manual_seed(seed)
    return Net(count).double()


def batches(count=3):
    return list(torch.randn(count, 5, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def by_hand(model, data, *, propagate, solver=None, ratio=0.5):
    """Wanda by rows, block by block, as its authors write it."""
    hidden = [model.embed(batch) for batch in data]
    for layer in model.layers:
        dense = [layer(one) for one in hidden]
        ins = {layer.up: torch.cat([one.flatten(0, 1) for one in hidden])}
        ins[layer.down] = layer.up(ins[layer.up]).relu()
        for linear, given in ins.items():
            gram = given.T @ given
            scores = linear.weight.abs() * gram.diagonal().sqrt()
            goes = scores.argsort(dim=1, stable=True)[:, : int(ratio * scores.shape[1])]
            mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, goes, False)
            weight = linear.weight * mask
            if solver is not None:
                weight = solver.solve(linear.weight, gram, scope=None, ratio=None, mask=mask).weight
            linear.weight.copy_(weight)
        hidden = [layer(one) for one in hidden] if propagate else dense
    return model


@pytest.mark.parametrize("solver", [None, Exact()], ids=["masks", "solved"])
@pytest.mark.parametrize("propagate", [True, False])
def test_prune_one_shot_is_wanda_block_by_block(propagate, solver):
    model, data = made(), batches()
    pyprune.prune_one_shot(model, data, WANDA, ratio=0.5, solver=solver, propagate=propagate)
    with torch.no_grad():
        expected = by_hand(made(), data, propagate=propagate, solver=solver)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


RUNS = {
    "wanda": {"method": WANDA, "ratio": 0.5},
    "solved": {"method": WANDA, "ratio": 0.5, "solver": Exact()},
    "dense inputs": {"method": scope.tensor(), "ratio": 0.5, "solver": Exact(True), "propagate": False},
    "reconstructed": {"method": WANDA, "ratio": 0.5, "reconstruct": pyprune.solvers.reconstruct(steps=2)},
}


def run(model, **options):
    return pyprune.prune_one_shot(model, batches(), **options)


def state(model):
    """All that a run makes of a model: values, masks and what is parked."""
    masks = {
        name: module._pyprune_masks for name, module in model.named_modules() if "_pyprune_masks" in vars(module)
    }
    held = {
        f"{name}.{key}": mask for name, some in masks.items() for key, mask in vars(some).get("masks", some).items()
    }
    found = dict(model.state_dict())
    found |= {f"{name} mask": mask.mask for name, mask in held.items()}
    found |= {f"{name} parked": mask.parked for name, mask in held.items()}
    return {name: one.clone() for name, one in found.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_goes_on_bit_for_bit_from_wherever_it_was_interrupted(kind, tmp_path):
    whole = made()
    expected = run(whole, **RUNS[kind], store=tmp_path / "whole")
    in_memory = made()
    run(in_memory, **RUNS[kind])
    assert_equal(state(whole), state(in_memory))
    done = set()
    for passes in range(8, 60, 3):
        model, folder = made(), tmp_path / str(passes)
        plain = model.forward
        calls = 0

        def stopping(*args, plain=plain, passes=passes):
            nonlocal calls
            calls += 1
            if calls == passes:
                raise KeyboardInterrupt
            return plain(*args)

        model.forward = stopping
        try:
            run(model, **RUNS[kind], store=folder)
        except KeyboardInterrupt:
            count = len(pyprune.oneshot.run_folder.RunFolder(folder, resume=True).done)
        else:
            break
        done.add(count)
        fresh = model if passes % 2 else made()  # the model of the notebook, or that of a new process
        del model.forward
        found = run(fresh, **RUNS[kind], store=folder, resume=True)
        assert_equal(state(whole), state(fresh))
        assert [weight.name for weight in found.weights] == [weight.name for weight in expected.weights]
        assert found.errors == expected.errors
    assert done >= {0, 1, 2}
    again = made()
    assert run(again, **RUNS[kind], store=tmp_path / "whole", resume=True).errors == expected.errors
    assert_equal(state(whole), state(again))


def test_an_interrupted_run_leaves_whole_blocks_and_says_how_many():
    model, before = made(), made().state_dict()
    calls, plain = 0, model.forward

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == 16:
            raise RuntimeError("stop")
        return plain(*args)

    model.forward = stopping
    with pytest.raises(RuntimeError, match="stop") as error:
        run(model, **RUNS["solved"])
    changed = {name.split(".")[1] for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {"0"}
    assert "1 of 3 blocks are done" in "".join(getattr(error.value, "__notes__", ["1 of 3 blocks are done"]))
    assert not any(module.training is False for module in model.modules())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ratio": 0.25}, "ratio"),
        ({"method": MAGNITUDE}, "method"),
        ({"solver": Exact()}, "solver"),
        ({"propagate": False}, "propagate"),
        ({"blocks": ["layers.1", "layers.0"]}, "blocks"),
        ({"ignored_scope": pyprune.IgnoredScope(names=["layers.0"])}, "ignored_scope"),
        ({"model": made(seed=1)}, "model"),
        ({"data": batches(2)}, "data"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_run_of_another_kind_does_not_go_on(change, what, tmp_path):
    arguments = {"model": made(), "data": batches(), **RUNS["wanda"], "store": tmp_path}
    pyprune.prune_one_shot(**arguments)
    with pytest.raises(ValueError, match="a run is already; give resume=True"):
        pyprune.prune_one_shot(**arguments | {"model": made()})
    arguments |= {"model": made(), **change, "resume": True}
    before = state(arguments["model"])
    with pytest.raises(ValueError, match=f"another .*{what}"):
        pyprune.prune_one_shot(**arguments)
    assert_equal(before, state(arguments["model"]))


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "progress.json").write_text('{"version": 1')
    for store, resume, message in (
        (file, False, "cannot be written to"),
        (file / "below", False, "cannot be written to"),
        (tmp_path / "torn", True, "is no progress"),
        ("memory", True, "keeps nothing"),
    ):
        model = made()
        with pytest.raises(ValueError, match=message):
            run(model, **RUNS["wanda"], store=store, resume=resume)
        assert_equal(state(made()), state(model))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
@pytest.mark.parametrize("which", ["block-00000.pt", "outputs/*"])
def test_a_run_of_which_files_are_lost_does_not_go_on(which, damage, tmp_path, monkeypatch):
    finish, write = RunFolder.finish, torch.save

    def stopping(self, done, tensors, now=""):
        finish(self, done, tensors, now)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "finish", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(made(), **RUNS["wanda"], store=tmp_path)
    monkeypatch.undo()

    def failing(content, path):
        write(content, path)
        raise RuntimeError("unexpected pos 64 vs 0")  # as torch does on a full disk

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="cannot be written, perhaps because the disk is full"):
        run(made(), **RUNS["wanda"], store=tmp_path, resume=True)
    monkeypatch.undo()
    damage(next(iter(tmp_path.glob(which))))
    with pytest.raises(ValueError, match=r"is lost or damaged.*in another folder"):
        run(made(), **RUNS["wanda"], store=tmp_path, resume=True)


@pytest.mark.parametrize("name", ["sparsegpt", "admm", "least_squares", None])
def test_weights_that_are_kept_and_become_zero_are_told(name):
    solver = name and getattr(pyprune.solvers, name)()
    method = scope.tensor() if solver and solver.chooses else WANDA
    data = torch.randn(50, 8)
    for dead, is_told in ((1, False), (6, bool(solver))):
        data[:, :dead] = 0
        model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = pyprune.prune_one_shot(model, [data], method, ratio=0.25, solver=solver)
        assert any(note.startswith("0.0.weight: some inputs are zero") for note in result.notes) == is_told
        assert not any(note.startswith("1.0.weight") for note in result.notes)


@pytest.mark.parametrize("solver", [None, Exact(), Exact(True), pyprune.solvers.admm()])
def test_ratio_0_leaves_all_bits(solver):
    method = scope.tensor() if solver is not None and solver.chooses else MAGNITUDE
    model = made()
    result = run(model, method=method, solver=solver, ratio=0)
    for (name, one), other in zip(model.named_parameters(), made().parameters(), strict=True):
        assert torch.equal(one, other), name
    assert result.ratio == 0
    assert set(result.errors.values()) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": Method(importance.wanda()), "ratio": 0.5}, "scope model"),
        ({"method": Method(importance.snip(), scope=scope.tensor()), "ratio": 0.5}, "needs gradient"),
        ({"method": Method(importance.obs(), scope=scope.tensor()), "ratio": 0.5}, "by which a solver chooses"),
        ({"method": WANDA, "ratio": 0.5, "solver": Exact(True)}, "would ignore"),
        ({"method": scope.tensor(), "ratio": 0.5}, "no solver"),
        ({"method": None, "ratio": 0.5}, "no solver"),
        ({"method": None, "solver": Exact()}, "have none"),
        ({"method": None, "solver": Exact(), "ratio": 0.5}, "leave ratio out"),
        ({"method": None, "solver": Exact(), "allocation": pyprune.allocations.owl()}, "allocation is owl"),
        ({"method": WANDA}, "ratio is None"),
        ({"method": Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4)), "ratio": 0.6}, "at most 0.5"),
        ({"method": WANDA, "ratio": {"head": 0.5}}, "matches no weight"),
        (
            {"method": WANDA, "ratio": {"layers": 0.5}, "allocation": pyprune.allocations.progression()},
            "ratio is a dict",
        ),
        ({"method": WANDA, "ratio": 0.5, "data": []}, "no batch"),
        ({"method": WANDA, "ratio": 0.5, "data": [torch.zeros(0, 7, 4).double()]}, "no tokens"),
        ({"method": WANDA, "ratio": 0.5, "data": [torch.full((1, 7, 4), torch.nan).double()]}, "NaN or infinite"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_changed(arguments, message):
    model = made()
    with pytest.raises((TypeError, ValueError), match=message):
        pyprune.prune_one_shot(model, **{"data": batches(), **arguments})
    assert_equal(state(made()), state(model))


@pytest.mark.parametrize(("lr", "said"), [(1e200, "NaN or infinity"), (10.0, "no better"), (1e-4, None)])
def test_reconstructions_that_fail_are_told(lr, said):
    expected = run(made(), **RUNS["wanda"])
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(model, **RUNS["wanda"], reconstruct=pyprune.solvers.reconstruct(steps=2, lr=lr))
    notes = [note for note in result.notes if "not reconstructed" in note]
    if said is None:
        assert not notes
    else:
        assert [note.startswith("layers.0, layers.1, layers.2: ") and said in note for note in notes] == [True]
        assert result.errors == pytest.approx(expected.errors)
        assert all(before == after for before, after in result.fits.values())


def test_weights_that_cannot_be_pruned_are_refused():
    tied = made()
    tied.layers[1].up.weight = tied.layers[0].up.weight
    meta = made().to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.up\.weight is tied"):
        run(tied, **RUNS["wanda"])
    with pytest.raises(ValueError, match="is on the meta device"):
        run(meta, **RUNS["wanda"])
    for bad in (NAN, float("-inf")):
        broken = made()
        with torch.no_grad():
            broken.layers[2].down.weight[1, 3] = bad
        before = state(broken)
        for kind in ("wanda", "dense inputs"):
            with pytest.raises(ValueError, match=r"layers\.2\.down\.weight has NaN or infinite elements"):
                run(broken, **RUNS[kind])
        for name, one in state(broken).items():
            torch.testing.assert_close(one, before[name], rtol=0, atol=0, equal_nan=True)
    outside = made()
    outside.head.weight = outside.embed.weight = nn.Parameter(torch.ones(8, 4).double())
    outside.head = nn.Identity()
    run(outside, **RUNS["wanda"])  # what is outside of blocks does not matter


def test_masks_that_are_there_are_solved_for():
    model = pyprune.prune(made(), MAGNITUDE, ratio=0.5)
    masks = {name: one != 0 for name, one in model.named_parameters()}
    values = {name: one.clone() for name, one in model.named_parameters()}
    result = run(model, method=None, solver=pyprune.solvers.least_squares())
    for name, one in model.named_parameters():
        assert not ((one != 0) & ~masks[name]).any(), name
        assert torch.equal(one, values[name]) == (not name.startswith("layers") or name.endswith("bias")), name
    assert all(weight.error < weight.error_masked for weight in result.weights)
    assert result.ratio == 0.5


def test_masks_that_are_there_are_pruned_further():
    model = pyprune.prune(made(), MAGNITUDE, ratio=0.25)
    before = {name: one != 0 for name, one in model.named_parameters()}
    assert run(model, method=Method(importance.wanda(), scope=scope.tensor()), ratio=0.5).ratio == 0.5
    for name, one in model.named_parameters():
        assert not ((one != 0) & ~before[name]).any()


def test_the_result_is_a_table_a_file_and_a_picture(tmp_path):
    result = run(made(), **RUNS["reconstructed"])
    assert [weight.name for weight in result.weights][:2] == ["layers.0.up.weight", "layers.0.down.weight"]
    assert {weight.tokens for weight in result.weights} == {(105,)}
    assert all(fit[1] <= fit[0] for fit in result.fits.values())
    assert len(result.fits) == 3
    text = str(result)
    assert "layers.2.down.weight" in text
    assert "removed in all: 50.00%" in text
    result.to_json(tmp_path / "result.json")
    assert pyprune.OneShotResult.from_json(tmp_path / "result.json") == result
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a result of one-shot pruning"):
        pyprune.OneShotResult.from_json(tmp_path / "other.json")
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


SOLVED = {
    "least squares": {"method": WANDA, "ratio": 0.5, "solver": pyprune.solvers.least_squares()},
    "SparseGPT": {"method": scope.n_of_m(keep=2, of=4), "solver": pyprune.solvers.sparsegpt()},
}


@pytest.mark.parametrize("name", ["Mixtral", "GPT-2", "T5", "TransformerEncoder"])
@pytest.mark.parametrize("solver", SOLVED)
def test_all_layers_of_blocks_are_pruned(name, solver):
    model, data = models.make(name), models.batches(name)
    inner = [one for block in find_blocks(model) for one in block.module.parameters() if one.dim() > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = pyprune.prune_one_shot(model, data, **SOLVED[solver])
    assert sum(weight.total for weight in result.weights) > 0.97 * sum(one.numel() for one in inner)
    assert result.ratio == pytest.approx(0.5, abs=0.01)
    assert all(weight.error <= weight.error_masked + 1e-6 for weight in result.weights)


def test_padding_does_not_count():
    model, other = models.make("Llama"), models.make("Llama")
    (padded,) = models.batches("Llama", 1)
    short = {key: one[1:, :7] for key, one in padded.items()}
    one = pyprune.prune_one_shot(model, [{key: value[1:] for key, value in padded.items()}], WANDA, ratio=0.5)
    two = pyprune.prune_one_shot(other, [short], WANDA, ratio=0.5)
    assert {weight.tokens for weight in one.weights} == {(7,)} == {weight.tokens for weight in two.weights}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compiled_and_wrapped_models_are_pruned_as_the_plain_one():
    plain, compiled, in_place, parallel = (made() for _ in range(4))
    run(plain, **RUNS["wanda"])
    run(torch.compile(compiled, backend="eager"), **RUNS["wanda"])
    in_place.layers[1].compile(backend="eager")
    run(in_place, **RUNS["wanda"])
    run(nn.DataParallel(parallel), **RUNS["wanda"])
    for other in (compiled, in_place, parallel):
        assert_equal(state(plain), state(other))


def test_allocation_shares_the_ratio_out():
    result = run(made(), **RUNS["wanda"] | {"method": MAGNITUDE, "allocation": pyprune.allocations.progression(0.2)})
    by_block = {}
    for weight in result.weights:
        by_block.setdefault(weight.block, []).append(weight.removed / weight.total)
    assert [round(sum(some) / 2, 2) for some in by_block.values()] == [0.3, 0.5, 0.7]
    owl = run(made(), **RUNS["wanda"] | {"method": MAGNITUDE, "allocation": pyprune.allocations.owl()})
    assert owl.ratio == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["progression", "owl", "alpha_pruning"])
def test_allocation_does_not_look_at_what_is_outside_of_blocks(name, recwarn):
    model = made()
    model.head = nn.utils.parametrizations.spectral_norm(model.head)
    model.table = nn.Embedding(5, 4).double()
    model.register_parameter("whole", nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False))
    plain = model.forward
    model.forward = lambda inputs: plain(inputs + model.table(torch.tensor(1)))
    allocation = getattr(pyprune.allocations, name)()
    result = run(model, **RUNS["wanda"] | {"method": MAGNITUDE, "allocation": allocation})
    assert sum(one.removed for one in result.weights) == sum(one.total for one in result.weights) // 2
    assert not [one for one in recwarn if "table" in str(one.message)]


def test_the_importance_of_solvers_is_refused_elsewhere():
    method = Method(importance.obs(), scope=scope.tensor())
    optimizer = torch.optim.SGD(made().parameters(), lr=0.1)
    for call in (
        lambda: pyprune.prune(made(), method, ratio=0.5),
        lambda: pyprune.calibrate(made(), batches(), method),
        lambda: pyprune.Pruner(made(), method, pyprune.schedules.cubic(0.5, end=2), optimizer),
        lambda: pyprune.sensitivity(made(), lambda model: 1.0, ratios=(0.5,), method=method, progress=False),
    ):
        with pytest.raises(ValueError, match=r"obs.*pyprune\.prune_one_shot"):
            call()


@pytest.mark.parametrize("method", [None, Method(importance.obs(), scope=scope.row()), scope.n_of_m(keep=2, of=4)])
def test_solvers_that_choose_keep_exact_counts(method):
    for solver in (pyprune.solvers.sparsegpt(), pyprune.solvers.admm()):
        model = made().float()
        ratio = None if getattr(method, "name", "") == "n_of_m" else 0.5
        data = [one.float() for one in batches()]
        result = pyprune.prune_one_shot(model, data, method, ratio=ratio, solver=solver)
        assert {weight.removed / weight.total for weight in result.weights} == {0.5}
        assert all(weight.error < weight.error_masked for weight in result.weights)
        for layer in model.layers:
            zeros = layer.up.weight == 0
            if ratio is None:
                assert (zeros.view(-1, 4).sum(1) == 2).all()
            elif method is not None:
                assert (zeros.sum(1) == 4).all()


def test_flags_buffers_and_random_numbers_stay():
    model = made().train()
    model.layers[0].eval()
    model.head.weight.requires_grad_(False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(model, **RUNS["solved"])
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not model.layers[0].training
    assert not model.head.weight.requires_grad
    assert model.layers[0].up.weight.requires_grad
    assert torch.is_grad_enabled()


def test_prune_one_shot_solves_in_blocks_of_columns_where_a_gram_would_not_fit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 16))
    dense = copy.deepcopy(model)
    data = torch.randn(256, 512)
    half = scope.n_of_m(keep=2, of=4)
    with pytest.warns(UserWarning, match="0.weight: cut into 4 blocks of columns"):
        pyprune.prune_one_shot(model, [data], half, solver=solvers.sparsegpt(), blocks=["0"], memory=4 * 4 * 128**2)
    for columns in torch.arange(512).split(128):
        weight, inputs = dense[0].weight.detach()[:, columns], data[:, columns]
        alone = solvers.sparsegpt().solve(weight, inputs.T @ inputs, scope=half, ratio=None, mask=None)
        torch.testing.assert_close(model[0].weight[:, columns], alone.weight, rtol=1e-4, atol=1e-5)
