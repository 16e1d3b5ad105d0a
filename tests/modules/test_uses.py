"""How weights are used: what their dimensions count, and what they are multiplied with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune.methods.layout import Layout
from pyprune.modules.targets import find_targets
from pyprune.modules.tracing import one_layout, used_as_weights
from pyprune.modules.uses import watching_uses

X = torch.randn(2, 5, 4)
OUT_IN, IN_OUT = Layout(0, 1), Layout(1, 0)
OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)
ROUTED = torch.tensor([0, 2, 1, 0, 2])
# What a model does with its weight of some shape and a tensor x, and what the dimensions of the weight count then.
USES = {
    "linear": ((6, 4), lambda x, w: F.linear(x, w), OUT_IN),
    "linear of one output": ((1, 4), lambda x, w: F.linear(x, w), OUT_IN),
    "linear of one input": ((6, 1), lambda x, w: F.linear(x[..., :1], w), OUT_IN),
    "linear, not contiguous": ((6, 4), lambda x, w: F.linear(x.transpose(0, 1), w, torch.ones(6)), OUT_IN),
    "linear in parts": ((6, 4), lambda x, w: [F.linear(x, part) for part in w.chunk(3)], OUT_IN),
    "x @ w.T": ((6, 4), lambda x, w: x @ w.T, OUT_IN),
    "w @ x": ((6, 4), lambda x, w: w @ x.mT, OUT_IN),
    "w @ vector": ((6, 4), lambda x, w: w @ x[0, 0], OUT_IN),
    "x @ w": ((4, 6), lambda x, w: x @ w, IN_OUT),
    "x @ w of one output": ((4, 1), lambda x, w: x @ w, IN_OUT),
    "vector @ w": ((4, 6), lambda x, w: x[0, 0] @ w, IN_OUT),
    "mm": ((4, 6), lambda x, w: torch.mm(x[0], w), IN_OUT),
    "addmm": ((4, 6), lambda x, w: torch.addmm(torch.ones(6), x[0], w), IN_OUT),
    "matmul after a cast": ((4, 6), lambda x, w: x.bfloat16() @ w.bfloat16(), IN_OUT),
    "matmul of a scaled weight": ((4, 6), lambda x, w: x @ (w * 0.5), IN_OUT),
    "matmul under autocast": ((4, 6), lambda x, w: autocast(lambda: x @ w), IN_OUT),
    "matmul under inference_mode": ((4, 6), lambda x, w: inference(lambda: x @ w), IN_OUT),
    "einsum": ((4, 6), lambda x, w: torch.einsum("bsi,io->bso", x, w), IN_OUT),
    "einsum, outputs first": ((6, 4), lambda x, w: torch.einsum("bsi,oi->bso", x, w), OUT_IN),
    "tensordot": ((6, 4), lambda x, w: torch.tensordot(x, w, dims=([2], [1])), OUT_IN),
    "conv": ((6, 2, 3), lambda x, w: F.conv1d(x.mT, w, groups=2), Layout(0, 1, 2)),
    "depthwise conv": ((8, 1, 1), lambda x, w: F.conv1d(x.mT, w, groups=4), Layout(0, 1, 4)),
    "standardised conv": ((6, 4, 3), lambda x, w: F.conv1d(x.mT, (w - w.mean()) / w.std()), Layout(0, 1)),
    "transposed conv": ((4, 3, 2), lambda x, w: F.conv_transpose1d(x.mT, w, groups=2), Layout(1, 0, 2)),
    "depthwise transposed": ((4, 1, 2), lambda x, w: F.conv_transpose1d(x.mT, w, groups=4), Layout(1, 0, 4)),
    "conv of 1 x 1 as linear": ((6, 4, 1), lambda x, w: F.linear(x, w.flatten(1)), OUT_IN),
    "experts, one by one": ((3, 6, 4), lambda x, w: [F.linear(x, w[i]) for i in range(3)], Layout(1, 2, 3)),
    "experts by a tensor": ((3, 6, 4), lambda x, w: F.linear(x, w[torch.tensor(1)]), Layout(1, 2, 3)),
    "experts, inputs first": ((3, 4, 6), lambda x, w: x @ w[1], Layout(2, 1, 3)),
    "experts, unbound": ((3, 4, 6), lambda x, w: [x @ one for one in w], Layout(2, 1, 3)),
    "experts by index": ((3, 6, 4), lambda x, w: torch.bmm(w[ROUTED], x[0][..., None]), Layout(1, 2, 3)),
    "experts by index_select": ((3, 4, 6), lambda x, w: torch.bmm(x[0][:, None], w.index_select(0, ROUTED)),
                                Layout(2, 1, 3)),
    "experts in a bmm": ((2, 4, 6), lambda x, w: torch.bmm(x, w), Layout(2, 1, 2)),
    "experts in a baddbmm": ((2, 4, 6), lambda x, w: torch.baddbmm(torch.ones(1, 1, 6), x, w), Layout(2, 1, 2)),
    "experts in an einsum": ((2, 6, 4), lambda x, w: torch.einsum("eni,eoi->eno", x, w), Layout(1, 2, 2)),
    "experts in a matmul": ((2, 4, 6), lambda x, w: x @ w, Layout(2, 1, 2)),
    "experts, all on all": ((3, 4, 6), lambda x, w: x[:, None] @ w, Layout(2, 1, 3)),
    "experts, grouped": ((3, 6, 4), lambda x, w: F.grouped_mm(x.view(10, 4)[:7], w.mT, offs=OFFSETS),
                         Layout(1, 2, 3)),
    "experts, grouped, inputs first": ((3, 4, 8), lambda x, w: torch._grouped_mm(x.view(10, 4)[:7], w, OFFSETS),
                                       Layout(2, 1, 3)),
    "embedding": ((9, 4), lambda x, w: F.embedding(torch.tensor([1, 2]), w), Layout(is_table=True)),
    "embedding and head": ((9, 4), lambda x, w: F.linear(F.embedding(torch.tensor([1]), w), w), OUT_IN),
    "soft embedding": ((4, 9), lambda x, w: (F.embedding(torch.tensor([1]), w), x.softmax(-1) @ w), IN_OUT),
}  # fmt: skip
ORDER = torch.tensor([2, 0, 3, 1])
MOVES = {
    "flip": lambda w: w.flip(1),
    "roll": lambda w: w.roll(1, 1),
    "rot90": lambda w: w.mT.rot90(),
    "sort": lambda w: w.sort(1)[0],
    "cumsum": lambda w: w.cumsum(1) * 2,
    "cumprod": lambda w: w.cumprod(1).mT.contiguous().mT,
    "gather": lambda w: w.gather(1, ORDER.expand(6, 4)),
    "take": lambda w: w.take(torch.arange(24).flip(0).view(6, 4)),
    "index": lambda w: w[:, ORDER],
    "index_select": lambda w: w.index_select(1, ORDER),
    "scatter": lambda w: torch.zeros_like(w).scatter(1, ORDER.expand(6, 4), w),
    "index_copy_": lambda w: w.detach().clone().index_copy_(1, ORDER, w),
    "index_put_": lambda w: w.detach().clone().index_put_((torch.arange(6)[:, None], ORDER), w),
    "qr": lambda w: torch.linalg.qr(w)[0],
}
UNCLEAR = {
    "both ways": ((4, 4), lambda x, w: F.linear(x @ w, w), "both directions"),
    "tied autoencoder": ((6, 4), lambda x, w: F.linear(x, w) @ w, "both directions"),
    "two inputs": ((6, 4, 4), lambda x, w: F.bilinear(x, x, w), "two inputs at once"),
    "heads of outputs": ((4, 2, 3), lambda x, w: torch.einsum("bsi,ihk->bshk", x, w), "several dimensions"),
    "unfolded conv": ((6, 2, 2), lambda x, w: F.linear(x, w.flatten(1)), "several dimensions"),
    "groups last": ((4, 6, 2), lambda x, w: [x @ w[..., i] for i in range(2)], "not along its first"),
    **{
        f"moved by {name}": ((6, 4), lambda x, w, move=move: F.linear(x, move(w)), "entries are moved")
        for name, move in MOVES.items()
    },
    "with another": ((4, 4), lambda x, w: x @ (w @ w.detach().clone()), "another parameter"),
}


def autocast(run):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return run()


def inference(run):
    with torch.inference_mode():
        return run()


class Bare(nn.Module):
    def __init__(self, shape, use):
        super().__init__()
        self.kernel, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(x, self.kernel)


@pytest.mark.parametrize("name", USES)
def test_used_as_weights_says_what_dimensions_count(name):
    shape, use, layout = USES[name]
    model = Bare(shape, use)
    assert used_as_weights(model, X) == {model.kernel: layout}


@pytest.mark.parametrize("name", UNCLEAR)
def test_used_as_weights_says_why_it_cannot_tell(name):
    shape, use, words = UNCLEAR[name]
    model = Bare(shape, use)
    layout = used_as_weights(model, X)[model.kernel]
    assert not layout.is_clear
    assert words in layout.problem


def test_used_as_weights_takes_learned_queries_for_inputs():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.into = nn.Parameter(torch.randn(1, 3, 4)), nn.Parameter(torch.randn(4, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            queries = self.queries.expand(len(x), -1, -1)
            scores = F.scaled_dot_product_attention(F.linear(queries, self.into), x, x)
            scores = scores + F.scaled_dot_product_attention(query=queries, key=x, value=x)
            return self.attention(queries, x, x)[0] + scores

    model = Pool()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: layout for parameter, layout in used_as_weights(model, X).items()}
    assert found == dict.fromkeys(["into", "attention.in_proj_weight", "attention.out_proj.weight"], OUT_IN)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_used_as_weights_sees_gates_recurrent_layers_and_compiled_models():
    gated = pyprune.prune(nn.Linear(4, 3), "UNSTRUCTURED_REGULARIZATION_BASED")
    assert used_as_weights(gated, X) == {dict(gated.named_parameters())["weight"]: OUT_IN}
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2)
    weights = {p for name, p in lstm.named_parameters() if name.startswith("weight")}
    # Known by its class: to see its products takes many times as long.
    assert {target.parameter: target.layout for target in find_targets(lstm, None, X)} == dict.fromkeys(
        weights, OUT_IN
    )
    linear = nn.Linear(4, 3)
    assert used_as_weights(torch.compile(linear, backend="eager"), X) == {linear.weight: OUT_IN}


@pytest.mark.filterwarnings("ignore")
def test_used_as_weights_goes_through_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    model = Bare((16, 4), lambda x, w: flex_attention(*[F.linear(x, w)[:, None]] * 3))
    assert used_as_weights(model, X) == {model.kernel: OUT_IN}


PRODUCTS = {
    "linear": (Bare((6, 4), lambda x, w: F.linear(x.transpose(0, 1), w, x.new_ones(6))), (1, 10, 4), (1, 10, 6)),
    "w @ x": (Bare((6, 4), lambda x, w: w @ x[0].mT), (1, 5, 4), (1, 5, 6)),
    "conv": (Bare((6, 2, 3), lambda x, w: F.conv1d(x.mT, w, groups=2)), (2, 2, 5, 2), (2, 2, 3, 3)),
    "experts": (Bare((2, 4, 6), lambda x, w: x @ w), (2, 5, 4), (2, 5, 6)),
    "addmm": (Bare((4, 6), lambda x, w: torch.addmm(x.new_ones(6), x[0], w)), (1, 5, 4), (1, 5, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_watching_uses_gives_what_is_multiplied_and_what_comes_out(name):
    model, given, made = PRODUCTS[name]
    uses = []
    with torch.no_grad(), watching_uses(model, uses.append):
        out = model(X)
    (use,) = uses
    assert tuple(use.given.shape) == given
    assert tuple(use.made.shape) == made
    if name != "linear":  # these ones are no parameter, so they may be another layer's output
        torch.testing.assert_close(use.made.sum(), out.sum())


@pytest.mark.parametrize("inputs", [X, X.transpose(0, 1), X[0], X[0, 0]])
def test_watching_uses_gives_outputs_with_their_bias(inputs):
    linear, uses = nn.Linear(4, 6), []
    with torch.no_grad(), watching_uses(linear, uses.append):
        out = linear(inputs)
    torch.testing.assert_close(uses[0].made.reshape(-1, 6), out.reshape(-1, 6))


@pytest.mark.parametrize(("layouts", "expected"), [
    ([OUT_IN], OUT_IN),
    ([OUT_IN, Layout(is_table=True)], OUT_IN),
    ([IN_OUT, Layout(None, None, problem="why")], IN_OUT),
    ([Layout(is_table=True)], Layout(is_table=True)),
    ([Layout(None, None, problem="why")], Layout(None, None, problem="why")),
])  # fmt: skip
def test_one_layout_takes_what_uses_agree_on(layouts, expected):
    assert one_layout(layouts) == one_layout(layouts[::-1]) == expected
