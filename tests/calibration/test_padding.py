"""Padding: padded or not, the same texts give the same statistics."""

import warnings

import pytest
import torch
from torch import nn

from pyprune import calibrate, importance
from pyprune.calibration.padding import Padding
from pyprune.modules.uses import watching_uses

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KV = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "BERT": lambda t: t.BertModel(t.BertConfig(**SIZES), add_pooling_layer=False),
    "BERT with a pooler": lambda t: t.BertModel(t.BertConfig(**SIZES)),
    "GPT-2": lambda t: t.GPT2Model(
        t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "LLaMA": lambda t: t.LlamaModel(t.LlamaConfig(**KV)),
    "Mixtral": lambda t: t.MixtralModel(t.MixtralConfig(**KV, num_local_experts=3)),
    "Mixtral, one expert": lambda t: t.MixtralModel(
        t.MixtralConfig(**KV, num_local_experts=3, num_experts_per_tok=1)
    ),
}
WANDA, OUTPUTS = importance.wanda(), importance.mean_activation()
CASES = [
    (name, implementation, side, rule)
    for name in MODELS
    for implementation in (("eager", "batched_mm", "grouped_mm") if "Mixtral" in name else ("eager",))
    for side in (("right",) if "pooler" in name else ("right", "left"))  # the pooler reads the first position
    for rule in ((WANDA,) if "Mixtral" in name else (WANDA, OUTPUTS))  # what experts put out is not seen
]


def padded(texts, side, length):
    ids, mask = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for i, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[i, place], mask[i, place] = text, 1
    return ids, mask


def batch_of(ids, mask):
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def quiet_tensors(model, batches, rule):
    """Return statistics; embeddings are left out with a warning, nothing else is said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*leaves out")
        warnings.filterwarnings("ignore", message="no input reached some experts")
        return calibrate(model, batches, rule).tensors


@pytest.mark.parametrize(("name", "implementation", "side", "rule"), CASES)
def test_padded_positions_do_not_count(name, implementation, side, rule):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = MODELS[name](transformers)
    if implementation != "grouped_mm":  # it takes no float64
        model = model.double()
    if "Mixtral" in name:
        model.set_experts_implementation(implementation)
    texts = [torch.randint(3, 50, (size,)) for size in (5, 8, 3)]
    alone = quiet_tensors(model, [batch_of(text[None], torch.ones_like(text[None])) for text in texts], rule)
    for length in (8, 11):
        together = quiet_tensors(model, [batch_of(*padded(texts, side, length))], rule)
        assert set(together) == set(alone)
        for key, tensor in alone.items():
            accuracy = {"rtol": 1e-6, "atol": 1e-9} if tensor.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(together[key], tensor, **accuracy)


def test_masks_without_padding_change_no_bit():
    transformers = pytest.importorskip("transformers")
    model = MODELS["BERT"](transformers)
    ids = torch.randint(3, 50, (3, 6))
    for rule in (importance.wanda(), importance.apoz()):
        plain = quiet_tensors(model, [{"input_ids": ids}], rule)
        masked = quiet_tensors(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], rule)
        assert all(torch.equal(masked[name], tensor) for name, tensor in plain.items())


@pytest.mark.filterwarnings("ignore:.*leaves out")
@pytest.mark.parametrize("lengths", [(7, 4), (6, 6)])
def test_encoder_and_decoder_have_masks_of_their_own(lengths):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5Model(config).double()
    source, made = torch.randint(3, 50, (5,)), torch.randint(3, 50, (3,))
    rule = importance.wanda()
    alone = quiet_tensors(model, [{"input_ids": source[None], "decoder_input_ids": made[None]}], rule)
    ids, mask = padded([source], "right", lengths[0])
    made_ids, made_mask = padded([made], "right", lengths[1])
    batch = {
        "input_ids": ids, "attention_mask": mask, "decoder_input_ids": made_ids, "decoder_attention_mask": made_mask
    }  # fmt: skip
    if lengths[0] == lengths[1]:  # nobody knows whose rows are whose
        with pytest.warns(UserWarning, match="which rows of the inputs of encoder.* cannot be told"):
            calibrate(model, [batch], rule)
        return
    together = quiet_tensors(model, [batch], rule)
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-6, atol=1e-9)


class Experts(nn.Module):
    """A router, and experts that are modules, each called with the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x, attention_mask=None):
        rows = x.flatten(0, 1)
        choice = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            out[choice == i] = expert(rows[choice == i])
        return out.view_as(x)


def test_rows_that_were_picked_are_known():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(2, 40, 4)
    mask = torch.ones(2, 40)
    mask[0, 20:] = 0
    mask[1, :5] = 0
    rule = importance.wanda()
    alone = calibrate(model, [x[:1, :20], x[1:, 5:]], rule).tensors
    together = calibrate(model, [(x, mask)], rule).tensors
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor)


def test_what_cannot_be_told_is_kept_with_one_warning():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.conv, self.after = nn.Linear(4, 4), nn.Conv1d(4, 4, 2, stride=2), nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.after(self.conv(self.fc(x).mT).mT)

    torch.manual_seed(0)
    model, x = Strided(), torch.randn(2, 10, 4)
    mask = torch.ones(2, 10)
    mask[0, 6:] = 0
    with pytest.warns(UserWarning, match=r"which rows of the inputs of after\.weight are padding") as caught:
        tensors = calibrate(model, [{"x": x, "attention_mask": mask}], importance.wanda()).tensors
    assert len(caught) == 1
    torch.testing.assert_close(tensors["fc.weight"][0], x[mask.bool()].norm(dim=0))
    made = model.conv(model.fc(x).mT).mT
    torch.testing.assert_close(tensors["after.weight"][0], made.flatten(0, 1).norm(dim=0).detach())
    recurrent = nn.LSTM(4, 4, batch_first=True)
    recurrent.forward = lambda x, attention_mask: nn.LSTM.forward(recurrent, x)
    with pytest.warns(UserWarning, match="weight_ih_l0, weight_hh_l0 are padding cannot be told"):
        calibrate(recurrent, [{"x": x, "attention_mask": mask}], importance.wanda())


REAL = torch.tensor([[True, True, False], [True, False, False]])
X = torch.randn(2, 3, 4)
MASKS = {
    "transformers": ({"x": X, "attention_mask": REAL.long()}, REAL),
    "bool": ({"x": X, "attention_mask": REAL}, REAL),
    "float": ({"x": X, "attention_mask": REAL.float()}, REAL),
    "added to scores": ({"x": X, "attention_mask": torch.where(REAL, 0.0, -1e9)}, REAL),
    "by place": ((X, REAL), REAL),
    "of torch": ({"src": X, "src_key_padding_mask": ~REAL}, REAL),
    "of torch, added to scores": ({"src": X, "src_key_padding_mask": torch.where(REAL, 0.0, -torch.inf)}, REAL),
    "no padding": ({"x": X, "attention_mask": torch.ones(2, 3)}, None),
    "no mask": ({"x": X}, None),
    "of pairs": ({"x": X, "attention_mask": torch.zeros(2, 1, 3, 3)}, None),
    "of something else": ({"input_ids": X[..., 0], "attention_mask": torch.zeros(2, 9)}, None),
    "a tensor": (X, None),
}


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x=None, attention_mask=None, **others):
        return self.fc(x)


@pytest.mark.parametrize("name", MASKS)
def test_begin_reads_masks(name):
    batch, expected = MASKS[name]
    padding = Padding(nn.DataParallel(Takes()))
    padding.begin(batch)
    assert [real.tolist() for real in padding.real] == ([] if expected is None else [expected.tolist()])
    padding.begin(X)
    assert padding.real == []


ORDERS = {
    "rows": (lambda fc, x: fc(x), REAL.flatten()),
    "flat rows": (lambda fc, x: fc(x.flatten(0, 1)), REAL.flatten()),
    "positions first": (lambda fc, x: fc(x.transpose(0, 1)), REAL.T.flatten()),
    "several at each position": (lambda fc, x: fc(x[:, :, None].expand(-1, -1, 2, -1)), REAL.repeat_interleave(2)),
    "a product": (lambda fc, x: x @ fc.weight.T, REAL.flatten()),
    "one of each example": (lambda fc, x: fc(x[:, 0]), None),
}


@pytest.mark.parametrize("name", ORDERS)
def test_rows_follow_the_order_of_dimensions(name):
    run, expected = ORDERS[name]
    model, seen = Takes(), []
    padding = Padding(model)
    padding.begin({"x": X, "attention_mask": REAL})
    with watching_uses(model, lambda use: seen.append(padding.rows(use))):
        run(model.fc, X)
    assert [None if rows is None else rows.tolist() for rows in seen] == [
        None if expected is None else expected.flatten().tolist()
    ]
    assert not padding.unknown
