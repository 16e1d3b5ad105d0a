"""Architectures in the styles of speech, language, recommendation and forecasting."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case


class Conformer(nn.Module):
    """A block of a speech recogniser: half a feed-forward, attention, a gated depthwise convolution, another half."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ff1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96), nn.SiLU(), nn.Linear(96, width))
        self.ff2 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96), nn.SiLU(), nn.Linear(96, width))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.pointwise1 = nn.Conv1d(width, 2 * 40, 1)
        self.depthwise = nn.Conv1d(40, 40, 7, padding=3, groups=40)
        self.batch_norm = nn.BatchNorm1d(40)
        self.pointwise2 = nn.Conv1d(40, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = F.glu(self.pointwise1(self.norm2(x).transpose(1, 2)), 1)
        x = x + self.pointwise2(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return x + 0.5 * self.ff2(x)


class ConvTasNet(nn.Module):
    """Two voices out of one: a learned basis, dilated blocks with skips that are summed, a mask per voice."""

    def __init__(self, basis: int = 24, width: int = 16, hidden: int = 32, voices: int = 2) -> None:
        super().__init__()
        self.voices = voices
        self.encoder = nn.Conv1d(1, basis, 16, 8, bias=False)
        self.norm = nn.GroupNorm(1, basis)
        self.first = nn.Conv1d(basis, width, 1)
        self.blocks = nn.ModuleList()
        for i in range(3):
            depthwise = nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i, groups=hidden)
            block = [nn.Conv1d(width, hidden, 1), nn.PReLU(), nn.BatchNorm1d(hidden), depthwise, nn.PReLU()]
            heads = {"residual": nn.Conv1d(hidden, width, 1), "skip": nn.Conv1d(hidden, width, 1)}
            self.blocks.append(nn.ModuleDict({"body": nn.Sequential(*block), **heads}))
        self.mask = nn.Conv1d(width, voices * basis, 1)
        self.decoder = nn.ConvTranspose1d(basis, 1, 16, 8, bias=False)

    def forward(self, sound: Tensor) -> Tensor:
        basis = self.encoder(sound).relu()
        x, skips = self.first(self.norm(basis)), 0
        for block in self.blocks:
            y = block["body"](x)
            x, skips = x + block["residual"](y), skips + block["skip"](y)
        masks = self.mask(F.relu(skips)).view(len(sound), self.voices, -1, basis.shape[-1]).sigmoid()
        voices = (masks * basis.unsqueeze(1)).flatten(0, 1)
        return self.decoder(voices).view(len(sound), self.voices, -1)


class WaveNet(nn.Module):
    """Gated dilated convolutions: tanh of one half times sigmoid of the other, by slices."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, width, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.out = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 24, 1), nn.ReLU(), nn.Conv1d(24, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for dilated, out in zip(self.dilated, self.out, strict=True):
            y = dilated(F.pad(x, (dilated.dilation[0], 0)))
            half = y.shape[1] // 2
            y = out(y[:, :half].tanh() * y[:, half:].sigmoid())
            x, total = x + y[:, : x.shape[1]], total + y[:, x.shape[1] :]
        return self.head(total)


class DeepFM(nn.Module):
    """Recommendation: one table for all fields, pairwise products of embeddings, and a net over all of them."""

    def __init__(self, fields: int = 6, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.arange(fields) * 10)
        self.linear = nn.Embedding(10 * fields, 1)
        self.embed = nn.Embedding(10 * fields, width)
        layers = [nn.Linear(fields * width, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16)]
        self.mlp = nn.Sequential(*layers, nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        e = self.embed(x)
        pairs = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
        return (self.linear(x).sum(1) + pairs + self.mlp(e.flatten(1))).sigmoid()


class CrossNetwork(nn.Module):
    """DCN v2 with low-rank crosses, beside a tower; the embeddings are bags."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 12, mode="sum")
        self.dense = nn.Linear(6, 12)
        self.down = nn.ModuleList(nn.Linear(24, 8, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.tower = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU())
        self.head = nn.Linear(24 + 20, 1)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        x0 = x = torch.cat((self.bag(ids), self.dense(numbers)), 1)
        for down, up in zip(self.down, self.up, strict=True):
            x = x0 * up(down(x)) + x
        return self.head(torch.cat((x, self.tower(x0)), 1))


class CouplingFlow(nn.Module):
    """RealNVP: one half says how the other is scaled and moved, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for net in self.nets:
            shift, scale = net(a).split(4, 1)
            a, b = b * scale.tanh().exp() + shift, a
        return torch.cat((a, b), 1)


class Interactions(nn.Module):
    """DLRM: products of all pairs of embeddings, of which the triangle is read."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 6, 24), nn.ReLU(), nn.Linear(24, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1))

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        rows = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        return self.top(torch.cat((dense, products[:, self.pairs[0], self.pairs[1]]), 1))


class AttentiveDecoder(nn.Module):
    """A translator of 2015: additive attention on a recurrent encoder, step by step from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.encoder = nn.GRU(12, 16, batch_first=True)
        self.cell = nn.LSTMCell(12 + 16, 16)
        self.attention = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))
        self.head = nn.Linear(32, 30)

    def forward(self, words: Tensor) -> Tensor:
        memory, state = self.encoder(self.embed(words))
        hidden, cell, outputs = state[0], torch.zeros_like(state[0]), []
        for word in self.embed(words).unbind(1):
            query = hidden.unsqueeze(1).expand(-1, memory.shape[1], -1)
            context = (self.attention(torch.cat((memory, query), -1)).softmax(1) * memory).sum(1)
            hidden, cell = self.cell(torch.cat((word, context), -1), (hidden, cell))
            outputs.append(self.head(torch.cat((hidden, context), -1)))
        return torch.stack(outputs, 1)


class Retention(nn.Module):
    """RetNet: attention without softmax, which fades at a rate of each head, and a norm for each head."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(heads, width)
        self.register_buffer("fading", torch.log(1 - 2 ** (-5 - torch.arange(float(heads)))))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        steps = torch.arange(x.shape[1])
        past = steps[:, None] - steps
        fading = (past.clamp(min=0) * self.fading[:, None, None]).exp() * (past >= 0)
        y = ((q @ k.transpose(-1, -2) * fading) @ v).transpose(1, 2).flatten(2)
        return self.out(F.silu(self.gate(x)) * self.norm(y.flatten(0, 1)).view_as(y))


class RoutedExperts(nn.Module):
    """Each token goes to two of four networks, which add what they make at its place."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4)
        experts = (nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width)) for _ in range(4))
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
        total = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, ranks = (chosen == i).nonzero(as_tuple=True)
            total.index_add_(0, rows, expert(tokens[rows]) * weights[rows, ranks, None])
        return total.view_as(x)


class Backcast(nn.Module):
    """N-BEATS: each block takes from the series what it explains, and adds to the forecast."""

    def __init__(self, past: int = 20, future: int = 5) -> None:
        super().__init__()
        self.sizes = (past, future)
        layers = (nn.Linear(past, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, past + future))
        self.blocks = nn.ModuleList((nn.Sequential(*layers), nn.Sequential(nn.Linear(past, 16), nn.Linear(16, 25))))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), self.sizes[1])
        for block in self.blocks:
            explained, more = block(x).split(self.sizes, -1)
            x, total = x - explained, total + more
        return total


class SpeakerEmbedding(nn.Module):
    """ECAPA's pooling: mean and deviation over time, weighted for each channel by what all channels say."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv1d(3, 16, 5, 2), nn.ReLU(), nn.BatchNorm1d(16), nn.Conv1d(16, 32, 3, dilation=2), nn.ReLU())
        self.body = nn.Sequential(*layers, nn.BatchNorm1d(32))
        self.attention = nn.Sequential(nn.Conv1d(96, 16, 1), nn.Tanh(), nn.Conv1d(16, 32, 1))
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        mean, deviation = x.mean(2, keepdim=True).expand_as(x), x.std(2, keepdim=True).expand_as(x)
        weights = self.attention(torch.cat((x, mean, deviation), 1)).softmax(2)
        mean = (weights * x).sum(2)
        return self.head(torch.cat((mean, ((weights * x * x).sum(2) - mean**2).clamp(1e-6).sqrt()), 1))


class ChannelAttention(nn.Module):
    """XCiT: channels of a head attend to channels, by cosine and a temperature for each head."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        x = x + self.out((weights.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(batch, length, -1))
        return x + self.mlp(x)


CASES = {
    "conformer": Case(lambda: nn.Sequential(Conformer(), Conformer()), partial(torch.randn, 2, 11, 32)),
    "conv_tasnet": Case(ConvTasNet, partial(torch.randn, 2, 1, 400)),
    "wavenet": Case(WaveNet, partial(torch.randn, 2, 4, 30)),
    "deepfm": Case(DeepFM, partial(torch.randint, 10, (8, 6))),
    "cross_network": Case(CrossNetwork, lambda: (torch.randint(50, (8, 4)), torch.randn(8, 6))),
    "coupling_flow": Case(CouplingFlow, partial(torch.randn, 4, 8)),
    "interactions": Case(Interactions, lambda: (torch.randn(4, 6), torch.randint(10, (4, 3)))),
    "attentive_decoder": Case(AttentiveDecoder, partial(torch.randint, 30, (2, 5))),
    "retention": Case(Retention, partial(torch.randn, 2, 9, 16)),
    "routed_experts": Case(RoutedExperts, partial(torch.randn, 2, 9, 16)),
    "backcast": Case(Backcast, partial(torch.randn, 3, 20)),
    "speaker_embedding": Case(SpeakerEmbedding, partial(torch.randn, 2, 3, 100)),
    "channel_attention": Case(ChannelAttention, partial(torch.randn, 2, 5, 24)),
}
