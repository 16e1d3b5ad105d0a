"""Architectures that people write themselves: one for each thing that a tracer of channels may stumble over."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, images


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Classifier(nn.Module):
    """A body, the mean of its image, a linear layer."""

    def __init__(self, body: nn.Module, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class C2f(nn.Module):
    """The block of YOLOv8: the two halves of one convolution go ways of their own and meet again."""

    def __init__(self, inputs: int, outputs: int, repeats: int = 2, *, chunk: bool) -> None:
        super().__init__()
        self.c = outputs // 2
        self.chunk = chunk
        self.cv1 = conv(inputs, 2 * self.c, 1)
        self.cv2 = conv((2 + repeats) * self.c, outputs, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(self.c, self.c), conv(self.c, self.c)) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        parts = list(y.chunk(2, 1) if self.chunk else y.split((self.c, self.c), 1))
        for block in self.m:
            parts.append(parts[-1] + block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


def c2f(*, chunk: bool) -> nn.Module:
    body = [conv(3, 16, stride=2), C2f(16, 32, chunk=chunk), conv(32, 32, stride=2), C2f(32, 32, chunk=chunk)]
    return Classifier(nn.Sequential(*body), 32)


class Recurrent(nn.Module):
    """Tokens, a recurrent net, its last state."""

    def __init__(self, rnn: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = rnn
        self.head = nn.Linear(outputs, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM(24, 32, num_layers=2, batch_first=True), 32)


def bilstm_projection() -> nn.Module:
    return Recurrent(nn.LSTM(24, 32, num_layers=2, batch_first=True, bidirectional=True, proj_size=12), 24)


class ConvGRU(nn.Module):
    """Speech: convolutions over time and frequency, folded into the features of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(1, 16, stride=2)
        self.conv2 = conv(16, 24, stride=2)
        self.gru = nn.GRU(24 * 8, 40, batch_first=True, bidirectional=True)
        self.head = nn.Linear(80, 12)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = self.conv2(self.conv1(spectrogram))  # (batch, channels, frequency, time)
        return self.head(self.gru(x.flatten(1, 2).transpose(1, 2))[0])


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode1 = nn.Linear(64, 48)
        self.encode2 = nn.Linear(48, 24)
        self.bias1 = nn.Parameter(torch.zeros(48))
        self.bias2 = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode2(self.encode1(x).relu()).relu()
        hidden = F.linear(code, self.encode2.weight.t(), self.bias1).relu()
        return F.linear(hidden, self.encode1.weight.t(), self.bias2)


class SqueezeExcite(nn.Module):
    """A gate for each channel, computed from all of them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = self.fc2(self.fc1(y.mean((2, 3))).relu()).sigmoid()
        return x + y * gate[:, :, None, None]


def squeeze_excite() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 24, stride=2), SqueezeExcite(24, 8), SqueezeExcite(24, 8)), 24)


def pixel_shuffle() -> nn.Module:
    """Super-resolution: four channels become one of twice the size, and the other way round."""
    up = [conv(3, 16), nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(16), conv(16, 16)]
    return nn.Sequential(*up, nn.PixelUnshuffle(2), conv(64, 16), nn.Conv2d(16, 3, 3, padding=1))


class UNet(nn.Module):
    """Down, up, and what was there on the way down beside it."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32)) -> None:
        super().__init__()
        self.down = nn.ModuleList(conv(i, o) for i, o in zip((3, *widths[:-1]), widths, strict=True))
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in steps)
        self.join = nn.ModuleList(conv(2 * o, o) for _, o in steps)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat((up(x), skip), 1))
        return self.head(x)


class ChannelShuffle(nn.Module):
    """The block of ShuffleNet: channels of two halves change places, by views and a transpose."""

    def __init__(self, channels: int, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.first = conv(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.second = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return x + self.second(self.depthwise(y.reshape(batch, channels, height, width)))


def channel_shuffle() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 24, stride=2), ChannelShuffle(24), ChannelShuffle(24)), 24)


class HardCodedView(nn.Module):
    """A size stands as a number in forward: nothing can be removed there, and somebody must say so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().view(-1, 512))


class GroupedQueries(nn.Module):
    """Attention whose query heads share keys and values, without any fused operator."""

    def __init__(self, width: int = 48, heads: int = 8, kv_heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * size)
        self.k = nn.Linear(width, kv_heads * size)
        self.v = nn.Linear(width, kv_heads * size)
        self.out = nn.Linear(heads * size, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(y).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        weights = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, length, self.heads * self.size)
        x = x + self.out(y)
        return x + self.mlp(x)


class DenseConcat(nn.Module):
    """Each layer reads all before it."""

    def __init__(self, growth: int = 12, layers: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.layers = nn.ModuleList(conv(16 + growth * i, growth) for i in range(layers))
        self.head = nn.Linear(16 + growth * layers, 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(F.adaptive_avg_pool2d(torch.cat(parts, 1), 1).flatten(1))


class OptionA(nn.Module):
    """A ResNet of CIFAR: where the width grows, the shortcut is every second pixel, with channels of zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grow = (outputs - inputs) // 2
        stride = 2 if self.grow else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return (x + y).relu()


def resnet_option_a() -> nn.Module:
    return Classifier(nn.Sequential(conv(3, 16), OptionA(16, 16), OptionA(16, 32), OptionA(32, 32)), 32)


def conv_flatten_linear() -> nn.Module:
    convs = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(16 * 6 * 6, 32), nn.Tanh(), nn.Linear(32, 10))


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Linear(16, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 10))


class BareParameters(nn.Module):
    """No layer at all: weights are parameters of the model, one of them a gate per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(20, 48) * 0.2)
        self.gate = nn.Parameter(torch.ones(48))
        self.w2 = nn.Parameter(torch.randn(48, 32) * 0.2)
        self.w3 = nn.Parameter(torch.randn(10, 32) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.w1) * self.gate
        return torch.einsum("bi,oi->bo", (hidden @ self.w2).relu(), self.w3)


def tokens() -> Tensor:
    return torch.randint(50, (2, 9))


CASES = {
    "c2f_chunk": Case(partial(c2f, chunk=True), images(32)),
    "c2f_split": Case(partial(c2f, chunk=False), images(32)),
    "lstm": Case(lstm, tokens),
    "bilstm_projection": Case(bilstm_projection, tokens),
    "conv_gru": Case(ConvGRU, partial(torch.randn, 2, 1, 32, 20)),
    "tied_autoencoder": Case(TiedAutoencoder, partial(torch.randn, 4, 64)),
    "squeeze_excite": Case(squeeze_excite, images(16)),
    "pixel_shuffle": Case(pixel_shuffle, images(12)),
    "unet": Case(UNet, images(32)),
    "channel_shuffle": Case(channel_shuffle, images(16)),
    "hard_coded_view": Case(HardCodedView, images(8, 1)),
    "grouped_queries": Case(
        lambda: nn.Sequential(GroupedQueries(), GroupedQueries()), partial(torch.randn, 2, 7, 48)
    ),
    "dense_concat": Case(DenseConcat, images(16)),
    "resnet_option_a": Case(resnet_option_a, images(16)),
    "conv_flatten_linear": Case(conv_flatten_linear, images(16, 1)),
    "transformer_encoder": Case(transformer_encoder, partial(torch.randn, 2, 7, 16)),
    "bare_parameters": Case(BareParameters, partial(torch.randn, 4, 20)),
}
