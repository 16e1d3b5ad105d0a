from types import SimpleNamespace

import pytest
import torch

import pyprune
from pyprune import IgnoredScope, Method, Pruner, Recipe, importance, schedules
from tests.conftest import masks_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("yaml")

from pyprune.integrations.transformers import PruningCallback, _load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(20, (40, 6), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def pruning(importance="magnitude", **options):
    text = f"stages: [prune: {{final: 0.75, start: 1, end: 3, frequency: 0.5, importance: {importance}}}]"
    # The layers of GPT-2 are no torch.nn.Linear, and are found by a forward pass.
    return PruningCallback(Recipe.from_string(text), examples_inputs={"input_ids": TOKENS[:2]}, **options)


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def train(model, callback, folder, epochs=4, checkpoint=None, **options):
    """Train for so many epochs of five steps of two batches."""
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | options
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def sparsity(model):
    found = pyprune.pruning_statistic(model, examples_inputs={"input_ids": TOKENS[:2]})
    return found.pruning_ratio


def load(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


def test_a_recipe_prunes_and_leaves_a_plain_model(tmp_path):
    model = gpt2()
    trainer = train(model, pruning(), tmp_path, save_strategy="steps", save_steps=5)
    assert sparsity(model) == pytest.approx(0.75, abs=1e-3)
    assert list(model.state_dict()) == list(gpt2().state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
    logged = [line["pruning_sparsity"] for line in trainer.state.log_history if "loss" in line]
    assert logged[0] == 0 < logged[1] < logged[2] == logged[3] == pytest.approx(0.75, abs=1e-3)
    assert [sparsity(load(tmp_path / f"checkpoint-{step}")) for step in (5, 10, 15)] == pytest.approx(logged[:3])
    trainer.save_model(tmp_path / "end")
    assert equal(load(tmp_path / "end"), model)


@pytest.mark.parametrize("importance", ["magnitude", "snip"])
def test_resume_gives_the_same_end(tmp_path, importance):
    model = gpt2()
    train(model, pruning(importance), tmp_path, save_strategy="steps", save_steps=4)
    for step in (4, 12):
        again = gpt2()
        train(again, pruning(importance), tmp_path, checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(again, model)
    again = gpt2()
    folder = tmp_path / "checkpoint-8"
    train(again, pruning(importance, resume_from=folder), tmp_path / "elsewhere", checkpoint=str(folder))
    assert equal(again, model)
    with pytest.raises(ValueError, match=r"goes on at step 8, but there is no .*pruning\.pt; give PruningCallback"):
        train(gpt2(), pruning(importance), tmp_path / "elsewhere", checkpoint=str(folder))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no file of torch", None]
)
def test_a_damaged_file_is_named(tmp_path, damage, rank):
    file, whole = tmp_path / "pruning.pt", tmp_path / "whole.pt"
    for one in (file, whole, tmp_path / "pruning_rank1.pt"):
        torch.save({"pruning": {}, "masks": {}}, one)
    damaged = file if rank == 0 else tmp_path / "pruning_rank1.pt"
    if damage is None:
        torch.save([1, 2], damaged)
    else:
        damaged.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(ValueError, match=rf"{damaged.name} cannot be read.*resume from another checkpoint"):
        _load(file, rank)


class OnRank(PruningCallback):
    """Sees the arguments of another rank, which is not there."""

    def __init__(self, rank, *args, **options):
        super().__init__(*args, **options)
        self.rank = rank

    def on_train_begin(self, args, *others, **options):
        super().on_train_begin(self._as_seen(args), *others, **options)

    def on_save(self, args, *others, **options):
        super().on_save(args, *others, **options)
        super().on_save(self._as_seen(args), *others, **options)

    def _as_seen(self, args):
        return SimpleNamespace(
            output_dir=args.output_dir,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            process_index=self.rank,
            should_save=self.rank == 0,
        )


def test_each_rank_saves_what_it_measured(tmp_path):
    recipe = Recipe.from_string("stages: [prune: {final: 0.75, end: 3, frequency: 1, importance: snip}]")
    options = {"examples_inputs": {"input_ids": TOKENS[:2]}}
    train(gpt2(), OnRank(1, recipe, **options), tmp_path, 1, save_strategy="steps", save_steps=1)
    folder = tmp_path / "checkpoint-3"
    saved = [torch.load(folder / name, weights_only=True) for name in ("pruning.pt", "pruning_rank1.pt")]
    assert [set(part) for part in saved] == [{"pruning", "masks"}, {"pruning"}]
    saved[1]["pruning"]["pruners"][0]["sums"]["count"] = 30
    torch.save(saved[1], folder / "pruning_rank1.pt")

    def counted(rank):
        """Return how many batches a rank has for the next masks, a step after it resumed."""
        callback = OnRank(rank, recipe, **options)
        train(gpt2(), callback, tmp_path, 1, str(folder), save_strategy="steps", save_steps=1)
        name = f"pruning_rank{rank}.pt" if rank else "pruning.pt"
        state = torch.load(tmp_path / "checkpoint-4" / name, weights_only=True)
        return state["pruning"]["pruners"][0]["sums"]["count"]

    assert [counted(rank) for rank in (0, 1, 2)] == [4, 31, 4]  # rank 2 was not there when the state was saved


def test_the_best_model_is_loaded_and_stripped(tmp_path):
    model = gpt2()
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_runtime", "greater_is_better": True}
    trainer = train(model, pruning(), tmp_path, **options, **best)
    assert equal(load(trainer.state.best_model_checkpoint), model)
    assert type(model.lm_head) is torch.nn.Linear


def test_keep_sparse_holds_the_zeros_of_a_pruned_model(tmp_path):
    model = pyprune.strip(pyprune.prune(gpt2(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5))
    zeros, before = model.lm_head.weight == 0, model.lm_head.weight.clone()
    train(model, PruningCallback(pyprune.keep_sparse), tmp_path, 2, save_strategy="steps", save_steps=5)
    assert torch.equal(model.lm_head.weight == 0, zeros)
    assert not torch.equal(model.lm_head.weight, before)
    again = gpt2()
    callback = PruningCallback(pyprune.keep_sparse)
    train(again, callback, tmp_path, 2, checkpoint=str(tmp_path / "checkpoint-5"))
    assert equal(again, model)


def test_a_function_gives_the_pruner_and_masks_may_stay(tmp_path):
    seen = {}

    def begin(model, optimizer, steps_per_epoch):
        seen.update(optimizer=type(optimizer).__module__.split(".")[0], steps=steps_per_epoch)
        scope = IgnoredScope(names=["transformer.wpe"])
        schedule = schedules.one_shot(0.5)
        return Pruner(model, Method(importance.magnitude()), schedule, optimizer, ignored_scope=scope)

    model = gpt2()
    train(model, PruningCallback(begin, strip=False), tmp_path, 1)
    assert seen == {"optimizer": "torch", "steps": 5}
    masks = masks_of(model).values()
    assert len(masks) == 1 + 4 * model.config.n_layer
    assert sum(int((~mask).sum()) for mask in masks) == sum(mask.numel() for mask in masks) // 2
    assert list(model.state_dict()) == list(gpt2().state_dict())


def test_an_unknown_number_of_batches_is_an_error_unless_given(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield DATA[0]

    def run(callback):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
        )
        transformers.Trainer(gpt2(), arguments, train_dataset=Endless(), callbacks=[callback]).train()

    with pytest.raises(ValueError, match="give PruningCallback"):
        run(pruning())
    run(pruning(steps_per_epoch=1))
