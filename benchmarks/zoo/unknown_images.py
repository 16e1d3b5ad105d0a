"""Architectures in the styles of vision, video and rendering."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.by_hand import conv
from zoo.case import Case, images


class PointNet(nn.Module):
    """Clouds of points: a network computes a matrix that turns them, then each point goes the same way, then max."""

    def __init__(self) -> None:
        super().__init__()
        self.turn1 = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.turn2 = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 9))
        self.body = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 48, 1), nn.ReLU())
        self.segment = nn.Conv1d(48 + 48, 5, 1)

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.turn2(self.turn1(points).amax(2)).view(-1, 3, 3) + torch.eye(3)
        local = self.body(matrix @ points)
        whole = local.amax(2, keepdim=True).expand_as(local)
        return self.segment(torch.cat((local, whole), 1))


class ChannelAndSpatialAttention(nn.Module):
    """CBAM: a gate for each channel, then one for each place, from mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 16)
        self.gate = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
        self.place = nn.Conv2d(2, 1, 7, padding=3)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * (self.gate(F.adaptive_avg_pool2d(x, 1)) + self.gate(F.adaptive_max_pool2d(x, 1))).sigmoid()
        places = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return self.head(x * self.place(places).sigmoid())


class SelectiveKernels(nn.Module):
    """Two kernel sizes, and a softmax for each channel that says how much of which."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.branches = nn.ModuleList((conv(12, 16), conv(12, 16, 5)))
        self.squeeze = nn.Linear(16, 8)
        self.weights = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = torch.stack([branch(x) for branch in self.branches], 1)
        code = self.squeeze(parts.sum(1).mean((2, 3))).relu()
        weights = torch.stack([layer(code) for layer in self.weights], 1).softmax(1)
        return self.head((parts * weights[..., None, None]).sum(1).mean((2, 3)))


class NonLocal(nn.Module):
    """Attention of all places of an image on each other, by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 16)
        self.theta, self.phi, self.g = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.out = nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        weights = (self.theta(x).flatten(2).transpose(1, 2) @ self.phi(x).flatten(2)).softmax(-1)
        y = weights @ self.g(x).flatten(2).transpose(1, 2)
        return self.head(x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:])))


class ConditionalConvolution(nn.Module):
    """A kernel for each image, mixed of four; the batch becomes groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.mix = nn.Linear(8, 4)
        self.kernels = nn.Parameter(torch.randn(4, 12, 8, 3, 3) * 0.1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, height, width = x.shape
        kernels = torch.einsum("be,eoikl->boikl", self.mix(x.mean((2, 3))).sigmoid(), self.kernels)
        x = x.reshape(1, batch * channels, height, width)
        y = F.conv2d(x, kernels.reshape(-1, channels, 3, 3), padding=1, groups=batch)
        return self.head(y.view(batch, -1, height, width).relu().mean((2, 3)))


class RadianceField(nn.Module):
    """NeRF: waves of the position, which a later layer reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(27, 32)
        self.second = nn.Linear(32 + 27, 32)
        self.density = nn.Linear(32, 1)
        self.colour = nn.Sequential(nn.Linear(32 + 3, 16), nn.ReLU(), nn.Linear(16, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.cat([x, *(wave(x * 2**i) for i in range(4) for wave in (torch.sin, torch.cos))], -1)
        hidden = self.second(torch.cat((self.first(waves).relu(), waves), -1)).relu()
        return torch.cat((self.colour(torch.cat((hidden, x), -1)), self.density(hidden)), -1)


class Codebook(nn.Module):
    """VQ-VAE: each place takes the nearest of twelve codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 16, stride=2), nn.Conv2d(16, 8, 1))
        self.codes = nn.Embedding(12, 8)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(8, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).movedim(1, -1)
        flat, codes = z.flatten(0, 2), self.codes.weight
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ codes.t() + codes.square().sum(1)
        return self.decoder(self.codes(distances.argmin(1)).view(z.shape).movedim(-1, 1))


class ConvLSTM(nn.Module):
    """A recurrent convolution over images, from a state of zeros."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(3 + width, 4 * width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _, height, width = x.shape
        hidden = torch.zeros(batch, self.width, height, width)
        cell = torch.zeros(batch, self.width, height, width)
        for step in range(steps):
            i, f, o, g = self.gates(torch.cat((x[:, step], hidden), 1)).split(self.width, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return self.head(hidden)


class Anchors(nn.Module):
    """SSD: heads on feature maps of two sizes, one of them normalised over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList((conv(3, 16, stride=2), conv(16, 24, stride=2)))
        self.classes = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for width in (16, 24))
        self.boxes = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1) for width in (16, 24))
        self.scale = nn.Parameter(torch.full((16,), 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        classes, boxes = [], []
        for i, block in enumerate(self.body):
            x = block(x)
            features = F.normalize(x, dim=1) * self.scale[:, None, None] if i == 0 else x
            classes.append(self.classes[i](features).permute(0, 2, 3, 1).reshape(len(x), -1, 3))
            boxes.append(self.boxes[i](features).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        return torch.cat(classes, 1), torch.cat(boxes, 1)


class Siamese(nn.Module):
    """One network looks at two images, and what it sees is compared in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 12, stride=2), conv(12, 16, stride=2))
        self.head = nn.Linear(64, 3)

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (self.body(x).mean((2, 3)) for x in (one, other))
        return self.head(torch.cat((a, b, (a - b).abs(), a * b), 1)), F.cosine_similarity(a, b)


CASES = {
    "pointnet": Case(PointNet, partial(torch.randn, 2, 3, 40)),
    "cbam": Case(ChannelAndSpatialAttention, images(16)),
    "selective_kernels": Case(SelectiveKernels, images(16)),
    "non_local": Case(NonLocal, images(16)),
    "conditional_convolution": Case(ConditionalConvolution, images(16)),
    "radiance_field": Case(RadianceField, partial(torch.randn, 6, 3)),
    "codebook": Case(Codebook, images(16)),
    "conv_lstm": Case(ConvLSTM, partial(torch.randn, 2, 3, 3, 8, 8)),
    "anchors": Case(Anchors, images(16)),
    "siamese": Case(Siamese, lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16))),
}
