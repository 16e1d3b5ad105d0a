"""Grams of what weights multiply, against sums by hand, and by what comes out of layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyprune.calibration.padding import Padding
from pyprune.modules.targets import find_targets
from pyprune.oneshot.input_grams import InputGrams
from pyprune.oneshot.matrices import matrices
from tests.modules.test_layers import Experts

X = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grams_of(model, batches, *, options=None, padding=None, targets=None):
    targets = find_targets(model) if targets is None else targets
    grams = InputGrams(targets, **(options or {}))
    with torch.no_grad(), grams.watching(model, padding):
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return {target.name: one for target, one in grams.results().items()}


def gram(rows):
    return rows.mT @ rows


IMAGES = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VOLUME = torch.randn(2, 4, 5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LAYERS = {
    "Linear": (lambda: nn.Linear(4, 6), X),
    "Linear of one row": (lambda: nn.Linear(4, 6), X[0, 0]),
    "Conv1d": (lambda: nn.Conv1d(7, 6, 3), X),
    "Conv1d of one example": (lambda: nn.Conv1d(7, 6, 3), X[0]),
    "Conv1d, causal": (lambda: nn.Conv1d(7, 7, 3, groups=7, padding=2), X),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "Conv2d of all": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 3), groups=2), IMAGES),
    "Conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), IMAGES),
    "Conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGES),
    "Conv2d, reflect": (lambda: nn.Conv2d(4, 6, 3, 2, padding=2, padding_mode="reflect"), IMAGES),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), IMAGES),
    "Conv2d, 1 x 1": (lambda: nn.Conv2d(4, 6, 1, 2), IMAGES),
    "Conv3d": (lambda: nn.Conv3d(4, 2, (3, 2, 1), (1, 2, 1), 1, groups=2), VOLUME),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(7, 6, 3, 2, 1, 1, dilation=2), X),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), IMAGES),
    "ConvTranspose2d, much padding": (lambda: nn.ConvTranspose2d(4, 6, 2, 1, 2), IMAGES),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, 2), VOLUME),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_grams_say_what_comes_out(name):
    """The squares of outputs without a bias are the diagonal of W H W^T."""
    torch.manual_seed(0)
    make, x = LAYERS[name]
    layer = make().double()
    nn.init.zeros_(layer.bias)
    (target,) = find_targets(layer)
    found = grams_of(layer, [x, 1 - x])["weight"]
    matrix = matrices(target)
    made = [layer(one).detach() for one in (x, 1 - x)]
    channels = -1 if isinstance(layer, nn.Linear) else 1 - (x.dim() == len(layer.weight.shape) - 1)
    rows = torch.cat([one.movedim(channels, -1).reshape(-1, layer.bias.numel()) for one in made])
    assert found.tokens.tolist() == [len(rows)] * len(matrix)
    outputs = ((matrix @ found.gram) * matrix).sum(-1).flatten()
    torch.testing.assert_close(outputs, rows.square().sum(0), rtol=1e-10, atol=1e-10)
    assert torch.equal(found.gram, found.gram.mT)


def test_gram_of_a_convolution_is_that_of_its_windows():
    conv = nn.Conv2d(4, 6, 3, 2, 1).double()
    windows = F.unfold(IMAGES, 3, padding=1, stride=2).mT.reshape(-1, 4, 9).mT.flatten(1)  # positions by channels
    torch.testing.assert_close(grams_of(conv, [IMAGES])["weight"].gram[0], gram(windows))


class Block(nn.Module):
    """As LLaMA's: three weights share an input, and two another; one is used twice in ``reuse``."""

    def __init__(self, dims=8, *, order="first"):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dims, dims, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(dims, 12), nn.Linear(dims, 12), nn.Linear(12, dims)
        self.order, self.calls, self.seen = order, 0, {}

    def keep(self, name, x):
        self.seen.setdefault(name, []).append(x.detach().clone().flatten(0, -2))
        return getattr(self, name)(x)

    def forward(self, x):
        self.calls += 1
        y = x.transpose(0, 1) if self.order == "copies" else x  # each layer makes it contiguous for itself
        other = y + 1 if self.order == "apart" and self.calls == 2 else y
        y = self.keep("q", y) * self.keep("k", other) + self.keep("v", y)
        y = F.silu(self.keep("o", y).clone())
        z = self.keep("gate", y) * self.keep("up", y)
        y.mul_(3)  # in place, after it was used
        return self.keep("down", z)


@pytest.mark.parametrize(("order", "count"), [("first", 4), ("copies", 4), ("apart", 5), ("autocast", 4)])
def test_weights_with_the_same_input_share_a_gram(order, count):
    torch.manual_seed(0)
    model = Block(order=order)
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=order == "autocast"):
        found = grams_of(model, batches)
    assert len({id(one.gram) for one in found.values()}) == count
    for name, inputs in model.seen.items():
        rows = torch.cat(inputs)
        expected = gram(rows.to(torch.bfloat16 if order == "autocast" else torch.float32).float())
        one = found[f"{name}.weight"]
        assert one.tokens.tolist() == [len(rows)]
        torch.testing.assert_close(one.gram[0], expected, rtol=1e-4, atol=1e-4)
    assert (found["q.weight"].gram is found["k.weight"].gram) == (order != "apart")
    assert found["q.weight"].gram is found["v.weight"].gram


def test_weights_of_a_llama_share_grams():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    found = grams_of(model, [torch.arange(12).view(2, 6), torch.arange(9).view(1, 9)])
    assert len(found) == 14
    assert len({id(one.gram) for one in found.values()}) == 8


def test_equal_batches_count_each_time():
    linear = nn.Linear(4, 6).double()
    found = grams_of(linear, [X, X, X])["weight"]
    torch.testing.assert_close(found.gram[0], 3 * gram(X.flatten(0, 1)))


def test_a_weight_used_at_two_places_has_the_sum():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    model = Tied().double()
    rows = X.flatten(0, 1)
    expected = gram(rows) + gram(model.one(rows).detach())
    torch.testing.assert_close(grams_of(model, [X])["one.weight"].gram[0], expected)


def test_rows_with_inputs_of_their_own_are_parts():
    attention = nn.MultiheadAttention(4, 2).double()
    query, memory = X[0][:, None], X[1][:, None]
    both = grams_of(attention, [(query, query, query)])
    torch.testing.assert_close(both["in_proj_weight"].gram[0], gram(X[0]))
    assert both["out_proj.weight"].tokens.tolist() == [7]
    found = grams_of(attention, [(query, memory, memory), (query, query, query)])["in_proj_weight"]
    assert [part.rows.tolist() for part in found.parts] == [list(range(4)), list(range(4, 12))]
    torch.testing.assert_close(found.parts[0].gram[0], 2 * gram(X[0]))
    torch.testing.assert_close(found.parts[1].gram[0], gram(X[0]) + gram(X[1]))
    with pytest.raises(ValueError, match="rows have inputs of their own"):
        _ = found.gram


def test_columns_that_are_used_apart_are_parts():
    class Halves(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.layer, self.whole = nn.Linear(8, 3, bias=False), whole

        def forward(self, x):
            w = self.layer.weight
            y = F.linear(x, w[:, :4]) + F.linear(x + 1, w[:, 4:])
            return y + self.layer(torch.cat([x, x], -1)) if self.whole else y

    rows = X.flatten(0, 1)
    expected = torch.block_diag(gram(rows), gram(rows + 1))
    for whole in (False, True):
        torch.manual_seed(0)
        found = grams_of(Halves(whole).double(), [X])["layer.weight"]
        total = expected + gram(torch.cat([rows, rows], -1)) if whole else expected
        torch.testing.assert_close(found.gram[0], total)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_have_grams_of_what_each_got(transposed):
    torch.manual_seed(0)
    model, batches = Experts(transposed, hidden=4, inner=30).double(), [
        (X[0], torch.tensor([0, 0, 2, 0, 0, 0, 0])), (X[1, :2], torch.tensor([0, 0]))
    ]  # fmt: skip
    found = grams_of(model, batches)
    x, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    up = model.gate_up_proj if transposed else model.gate_up_proj.mT
    inner = torch.stack([row @ up[i] for row, i in zip(x, ids, strict=True)])[:, :30].detach()
    for name, given in (("gate_up_proj", x), ("down_proj", inner)):
        expected = torch.stack([gram(given[ids == expert]) for expert in range(3)])
        if name == "down_proj":  # one token, where there should be three: two average ones are added
            expected[2] += (0.1 * 30 - 1) * gram(inner) / 9
        torch.testing.assert_close(found[name].gram, expected)
        assert found[name].tokens.tolist() == [8, 0, 1]
    assert found["gate_up_proj"].note == "no token came to the experts 1"
    assert found["down_proj"].note.endswith("few tokens came to the experts 2, filled up with average ones")
    some = grams_of(model, batches, options={"experts": range(1, 3)})["gate_up_proj"]
    assert some.tokens.tolist() == [0, 1]
    torch.testing.assert_close(some.gram, found["gate_up_proj"].gram[1:])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_of_transformers_have_grams_of_what_the_router_sent(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralModel(config).eval()
    model.set_experts_implementation(implementation)
    experts, seen = model.layers[0].mlp.experts, []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append([one.clone() for one in args]))
    found = grams_of(model, [torch.arange(30).view(2, 15)])
    hook.remove()
    hidden, index, _ = seen[0]
    for expert in range(3):
        rows = hidden[(index == expert).any(1)]
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
        for name, given in (("gate_up_proj", rows), ("down_proj", F.silu(gate) * up)):
            one = found[f"layers.0.mlp.experts.{name}"]
            assert one.tokens[expert] == len(rows)
            torch.testing.assert_close(one.gram[expert], gram(given.detach()), rtol=1e-4, atol=1e-5)


def test_recurrent_layers_are_seen():
    rnn = nn.GRU(4, 5, batch_first=True).double()
    found = grams_of(rnn, [X])
    torch.testing.assert_close(found["weight_ih_l0"].gram[0], gram(X.flatten(0, 1)))
    states = rnn(X)[0].detach()[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found["weight_hh_l0"].gram[0], gram(states))


def test_unseen_says_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.fc, self.idle = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two = nn.Bilinear(4, 4, 2)

        def forward(self, ids):
            x = self.fc(self.words(ids))
            return self.two(x, x)

    model = Model()
    targets = find_targets(model)
    grams = InputGrams(targets)
    with torch.no_grad(), grams.watching(model):
        model(torch.tensor([1, 2]))
    reasons = {target.name: why for target, why in grams.unseen().items()}
    assert reasons == {
        "words.weight": "its rows are only looked up",
        "idle.weight": "no batch went through it",
        "two.weight": "it multiplies two inputs at once",
    }
    assert [target.name for target in grams.results()] == ["fc.weight"]
    assert grams.results() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_grams_are_wide(dtype):
    linear = nn.Linear(300, 6).to(dtype)
    x = torch.randn(50, 300).to(dtype)
    found = grams_of(linear, [x])["weight"].gram[0]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), gram(x.double()), rtol=1e-4, atol=1e-4)
    assert grams_of(linear, [x], options={"dtype": torch.float64})["weight"].gram.dtype == torch.float64


def test_grams_that_do_not_fit_are_cut():
    linear, conv = nn.Linear(40, 6).double(), nn.Conv1d(40, 6, 3).double()
    x = torch.randn(30, 40, dtype=torch.float64)
    found = grams_of(linear, [x], options={"memory": 40 * 16 * 8})["weight"]
    assert [len(part.columns) for part in found.parts] == [16, 16, 8]
    for part in found.parts:
        torch.testing.assert_close(part.gram[0], gram(x[:, part.columns]))
    assert found.note == "cut into 3 blocks of columns, what they have in common is left out"
    whole = grams_of(conv, [x.mT])["weight"].gram
    parts = grams_of(conv, [x.mT], options={"memory": 120 * 96 * 8})["weight"].parts
    assert [[*part.columns[:2].tolist(), len(part.columns)] for part in parts] == [[0, 1, 96], [32, 33, 24]]
    for part in parts:
        torch.testing.assert_close(part.gram[0], whole[0][part.columns][:, part.columns])
    with pytest.raises(ValueError, match=r"takes 12,800 bytes, and memory=1,000 is not enough .* at least 5,120"):
        grams_of(linear, [x], options={"memory": 1000})


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        nested = options.get("batch_first", False)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)
        self.encoder, self.conv = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested),
            nn.Conv1d(8, 4, 3, padding=1),
        )
        self.batch_first = options.get("batch_first", False)

    def forward(self, src, src_key_padding_mask=None):
        x = self.encoder(src, src_key_padding_mask=src_key_padding_mask)
        x = x if self.batch_first else x.transpose(0, 1)
        if src_key_padding_mask is not None:
            x = x.masked_fill(src_key_padding_mask[..., None], 0)
        return self.conv(x.mT)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [5, 3])
def test_padded_rows_do_not_count(batch_first, length):
    """Three texts, also padded to as many positions as there are texts."""
    torch.manual_seed(0)
    model = Encoder(batch_first=batch_first).double().eval()
    sizes = (length, 2, 1)
    texts = [torch.randn(1, size, 8, dtype=torch.float64) for size in sizes]
    batch = torch.full((3, length, 8), 3.0, dtype=torch.float64)
    mask = torch.ones(3, length, dtype=torch.bool)
    for i, text in enumerate(texts):
        batch[i, : sizes[i]], mask[i, : sizes[i]] = text[0], False
    padding = Padding(model)
    padding.begin({"src": batch if batch_first else batch.transpose(0, 1), "src_key_padding_mask": mask})
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    padded = grams_of(model, [(order(batch), mask)], padding=padding)
    alone = grams_of(model, [order(text) for text in texts])
    for name, one in alone.items():
        assert padded[name].tokens.tolist() == one.tokens.tolist() == [sum(sizes)]
        torch.testing.assert_close(padded[name].gram, one.gram, rtol=1e-6, atol=1e-6)
