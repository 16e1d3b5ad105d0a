"""Tests of distillation in a Hugging Face Trainer: the gradients of steps against plain torch."""

import copy

import pytest
import torch
from torch import nn

import pyprune

transformers = pytest.importorskip("transformers", reason="pip install 'pyprune[transformers]'")
from pyprune.integrations.transformers import DistillationCallback, PruningCallback  # noqa: E402


def tiny():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def texts(count=8):
    ids = torch.randint(20, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones(8).long(), "labels": row} for row in ids]


def trained(folder, model, *callbacks, **options):
    """Train for two steps in order, by plain SGD."""
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=list(callbacks)).train()
    return model


def by_hand(teacher, halves, *, from_teacher=(True, True), together=False):
    model = tiny()
    names = ["transformer.h.0", "transformer.h.1"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states: dict = {}
    for which, one in (("student", model), ("teacher", teacher)):
        for name in names:
            one.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, key=(which, name): states.update({key: out[0] if isinstance(out, tuple) else out})
            )
    for step, rows in enumerate(halves):
        ids = torch.stack([row["input_ids"] for row in rows])
        output = model(input_ids=ids, labels=ids)
        loss = output.loss * 7 / 8  # the Trainer counts all labels, and the first of each text is no target
        if from_teacher[step]:
            with torch.no_grad():
                goal = teacher.eval()(input_ids=ids).logits
            s, t = output.logits / 2, goal / 2
            kl = 4 * (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
            hidden = sum(
                ((states["student", n] - states["teacher", n]) ** 2).mean() / (states["teacher", n] ** 2).mean()
                for n in names
            )
            loss = 0.5 * loss + 0.5 * kl + hidden
        (loss / (2 if together else 1)).backward()
        if step == 1 or not together:
            optimizer.step()
            optimizer.zero_grad()
    return model


def check_same(model, other):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["each step", "accumulated", "the first half"])
def test_distillation_callback_trains_as_a_loop_by_hand(case, tmp_path):
    model = tiny()
    teacher = copy.deepcopy(model)
    nn.init.normal_(teacher.transformer.h[0].mlp.c_fc.weight)
    rows = texts()
    callback = DistillationCallback(
        teacher, pairs=["transformer.h.0", "transformer.h.1"], temperature=2.0,
        end=0.5 if case == "the first half" else None,
    )  # fmt: skip
    options = {"gradient_accumulation_steps": 2} if case == "accumulated" else {}
    trained(tmp_path, model, callback, **options)
    expected = by_hand(
        copy.deepcopy(teacher), [rows[:4], rows[4:]], together=case == "accumulated",
        from_teacher=(True, case != "the first half"),
    )  # fmt: skip
    check_same(model, expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_distillation_callback_beside_pruning(tmp_path):
    model = tiny()
    teacher = copy.deepcopy(model)
    start = lambda model, optimizer, steps: pyprune.gmp(model, 0.5, optimizer, end=steps)  # noqa: E731
    trained(tmp_path, model, PruningCallback(start), DistillationCallback(teacher))
    assert int((model.transformer.h[0].mlp.c_fc.weight == 0).sum()) > 0
    assert int((teacher.transformer.h[0].mlp.c_fc.weight == 0).sum()) == 0


def test_distillation_callback_refuses_a_model_without_loss(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="no loss"):
        trained(tmp_path, model, DistillationCallback(copy.deepcopy(model)), label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher": "gpt2"}, TypeError, "teacher"),
        ({"start": -1}, ValueError, "start"),
        ({"start": 2, "end": 1}, ValueError, "end"),
        ({"temperature": 0}, ValueError, "temperature"),
    ],
)
def test_distillation_callback_refuses_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        DistillationCallback(**{"teacher": nn.Linear(2, 2), **options})


@pytest.mark.parametrize("case", ["each step", "accumulated", "the first half"])
def test_a_recipe_with_a_teacher_trains_as_the_callback_does(case, tmp_path):
    pytest.importorskip("yaml")
    teacher = tiny()
    nn.init.normal_(teacher.transformer.h[0].mlp.c_fc.weight)
    end = 0.5 if case == "the first half" else None
    steps = 1 if case == "accumulated" else 2
    options = {"gradient_accumulation_steps": 2} if case == "accumulated" else {}
    pairs = ["transformer.h.0", "transformer.h.1"]
    recipe = pyprune.Recipe.from_string(
        f"{{stages: [prune: {{final: 0.5, end: 1}}], teacher: {{pairs: {pairs}, temperature: 2, end: {end or 9}}}}}"
    )
    model = tiny()
    trained(tmp_path / "one", model, PruningCallback(recipe, teacher=copy.deepcopy(teacher)), **options)
    expected = tiny()
    start = lambda model, optimizer, _: pyprune.Recipe(recipe.stages, 1).apply(model, optimizer, steps)  # noqa: E731
    callbacks = [
        PruningCallback(start),
        DistillationCallback(copy.deepcopy(teacher), pairs=pairs, temperature=2.0, end=end),
    ]
    trained(tmp_path / "two", expected, *callbacks, **options)
    check_same(model, expected)
    assert int((model.lm_head.weight == 0).sum()) > 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_pruning_callback_refuses_a_teacher_that_its_recipe_does_not_have():
    pytest.importorskip("yaml")
    text = "stages: [prune: {final: 0.5, end: 1}]"
    with pytest.raises(ValueError, match="the recipe has none"):
        PruningCallback(pyprune.Recipe.from_string(text), teacher=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="teacher: the recipe has a teacher"):
        PruningCallback(pyprune.Recipe.from_string(text + "\nteacher: {}"))
    with pytest.raises(ValueError, match="beside other pruning take DistillationCallback"):
        PruningCallback(pyprune.keep_sparse, teacher=nn.Linear(2, 2))
