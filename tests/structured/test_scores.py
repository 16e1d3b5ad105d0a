"""Scores of blocks and experts alone: those that a removal goes by."""

import pytest
import torch
from torch import nn

import pyprune
from pyprune import block_scores, drop_blocks, drop_experts, expert_scores
from tests.conftest import Unchanged
from tests.structured.test_drop_blocks import Looped, Stack
from tests.structured.test_drop_experts import KINDS, ByHand, Listed, build

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("importance", ["influence", "output_error"])
def test_block_scores_are_those_of_drop_blocks_and_leave_the_model_as_it_was(importance, form):
    torch.manual_seed(0)
    model = Stack(form=form).train()
    before, state = Unchanged(model), torch.get_rng_state()
    scores = block_scores(model, X, importance=importance)
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(scores) == [f"layers.{number}" for number in range(4)]
    removed = drop_blocks(model, X, count=1, importance=importance)
    assert scores == pytest.approx(dict(removed.scores))
    assert removed.names == (min(scores, key=scores.__getitem__),)


def test_block_scores_can_be_what_a_later_removal_goes_by():
    torch.manual_seed(0)
    model = Stack()
    scores = block_scores(model, X)
    lowest = sorted(scores, key=scores.__getitem__)[:2]
    removed = drop_blocks(model, X, count=2, importance=lambda name, block: scores[name])
    assert sorted(removed.names) == sorted(lowest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["use", "output"])
def test_expert_scores_are_those_of_drop_experts_and_leave_the_model_as_it_was(kind, importance):
    model = build(kind)
    before = Unchanged(model)
    scores = expert_scores(model, X, importance=importance)
    before.check()
    assert scores == pytest.approx(dict(drop_experts(model, X, count=1, importance=importance).scores))


def test_expert_scores_can_be_what_a_later_removal_goes_by():
    model = build(Listed)
    scores = expert_scores(model, X, importance="use")
    first = {name: score for name, score in scores.items() if name.startswith("first")}
    removed = drop_experts(model, X, count=1, importance=lambda name, module, number: scores[name])
    assert removed.names[0] == min(first, key=first.__getitem__)


class Half(nn.Module):
    """Two mixtures, of which only one is called."""

    def __init__(self, calls):
        super().__init__()
        self.called, self.idle, self.calls = ByHand(False), ByHand(False), calls

    def forward(self, x):
        return self.called(x) if self.calls else x * 2


def test_expert_scores_name_mixtures_that_are_not_called():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    with pytest.warns(UserWarning, match=r"do not call idle.experts, so their experts have no scores"):
        scores = expert_scores(Half(True), tokens)
    assert set(scores) == {f"called.experts.{number}" for number in range(3)}
    with pytest.raises(ValueError, match=r"do not call called.experts, idle.experts, so there are no scores"):
        expert_scores(Half(False), tokens)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: block_scores(nn.Linear(8, 8), X), ValueError, "Linear has no blocks that repeat"),
        (lambda: block_scores(Looped(), X), ValueError, "has no blocks that repeat"),
        (
            lambda: block_scores(Stack(), X, importance="use"),
            ValueError,
            'allowed are "influence" and "output_error"',
        ),
        (lambda: block_scores(Stack(), X, importance=len), TypeError, "importance is"),
        (lambda: block_scores(Stack(), None), TypeError, "examples"),
        (lambda: expert_scores(Stack(), X), ValueError, "Stack has no mixture of experts that is known"),
        (
            lambda: expert_scores(build(Listed), X, importance="influence"),
            ValueError,
            'allowed are "use" and "output"',
        ),
        (lambda: expert_scores(build(Listed), [X, "x"]), TypeError, "examples has 'x'"),
    ],
)
def test_scores_refuse_what_makes_no_sense(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_scores_see_a_model_with_masks():
    model = Stack()
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    assert len(block_scores(model, X)) == 4


class Residual(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.moe = kind()

    def forward(self, x):
        output = self.moe(x)
        return x + (output[0] if isinstance(output, tuple) else output)


class Padded(nn.Module):
    """Residual blocks, each with experts, over positions that do not see each other."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(Residual(kind) for _ in range(3))

    def forward(self, inputs_embeds, attention_mask):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_count_padding(kind):
    torch.manual_seed(0)
    model = Padded(kind)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded = {"inputs_embeds": X, "attention_mask": mask}
    texts = [
        {"inputs_embeds": x[real.bool()][None], "attention_mask": torch.ones(1, int(real.sum()))}
        for x, real in zip(X, mask, strict=True)
    ]
    assert block_scores(model, padded) == pytest.approx(block_scores(model, texts), rel=1e-4)
    for importance in ("use", "output"):
        scores = expert_scores(model, padded, importance=importance)
        assert scores == pytest.approx(expert_scores(model, texts, importance=importance), rel=1e-4)
