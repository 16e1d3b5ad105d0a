"""Architectures that nobody looked at while the rules were written: of other libraries, or in the style of one."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, images


def smp(name: str, **options: Any) -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.create_model(name, "resnet18", encoder_weights=None, classes=3, **options)


def monai(name: str, *args: Any, **options: Any) -> nn.Module:
    from monai.networks import nets

    return getattr(nets, name)(*args, **options)


def diffusion_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def autoencoder_kl() -> nn.Module:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(32, 48), norm_num_groups=8, sample_size=32, **blocks)


def diffusion_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "return_dict": False,
    }


def open_clip(vision: dict[str, Any]) -> nn.Module:
    from open_clip.model import CLIP

    text = {"context_length": 8, "vocab_size": 99, "width": 48, "heads": 4, "layers": 2}
    return CLIP(32, vision, text)


def pictures_and_words() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 64, 64), torch.randint(1, 99, (2, 8))


def vit_pytorch(name: str, **options: Any) -> nn.Module:
    import importlib

    return getattr(importlib.import_module(f"vit_pytorch.{name}"), options.pop("kind"))(**options)


def tabnet() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNetNoEmbeddings

    return TabNetNoEmbeddings(input_dim=16, output_dim=3, virtual_batch_size=8, group_attention_matrix=torch.eye(16))


def x_transformer() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=48, depth=2, heads=4, attn_dim_head=12, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True)
    return TransformerWrapper(num_tokens=99, max_seq_len=32, attn_layers=layers)


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


VISION = {"image_size": 64, "patch_size": 16, "width": 48, "layers": 2, "head_width": 12}
RESNET = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
VIT = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 48, "depth": 2, "heads": 4, "mlp_dim": 96}

CASES = {
    "smp_unet": Case(partial(smp, "unet"), images(64)),
    "smp_fpn": Case(partial(smp, "fpn"), images(64)),
    "smp_pan": Case(partial(smp, "pan"), images(128)),
    "smp_deeplabv3plus": Case(partial(smp, "deeplabv3plus"), images(64)),
    "smp_unetplusplus_scse": Case(partial(smp, "unetplusplus", decoder_attention_type="scse"), images(64)),
    "monai_unet_3d": Case(
        partial(monai, "UNet", 3, 1, 2, channels=(8, 16, 24), strides=(2, 2), num_res_units=2, norm="batch"),
        partial(torch.randn, 2, 1, 16, 16, 16),
    ),
    "monai_segresnet": Case(partial(monai, "SegResNet", 3, init_filters=8), partial(torch.randn, 1, 1, 16, 16, 16)),
    "monai_unetr": Case(
        partial(monai, "UNETR", 1, 2, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4),
        partial(torch.randn, 1, 1, 32, 32, 32),
    ),
    "diffusers_unet": Case(diffusion_unet, diffusion_inputs),
    "diffusers_autoencoder": Case(autoencoder_kl, images(32)),
    "open_clip_vit": Case(partial(open_clip, VISION), pictures_and_words),
    "open_clip_resnet": Case(partial(open_clip, RESNET), pictures_and_words),
    "vit_pytorch_vit": Case(partial(vit_pytorch, "vit", kind="ViT", **VIT), images(64)),
    "vit_pytorch_cct": Case(partial(vit_pytorch, "cct", kind="cct_2", img_size=32, num_classes=10), images(32)),
    "vit_pytorch_simple": Case(partial(vit_pytorch, "simple_vit", kind="SimpleViT", **VIT), images(64)),
    "vit_pytorch_cross": Case(
        partial(
            vit_pytorch,
            "cross_vit",
            kind="CrossViT",
            image_size=48,
            num_classes=10,
            sm_dim=48,
            lg_dim=64,
            sm_enc_depth=1,
            lg_enc_depth=1,
            depth=1,
            sm_enc_heads=4,
            lg_enc_heads=4,
            cross_attn_heads=4,
            sm_enc_mlp_dim=96,
            lg_enc_mlp_dim=96,
        ),
        images(48),
    ),
    "tabnet": Case(tabnet, partial(torch.randn, 8, 16)),
    "x_transformers": Case(x_transformer, partial(torch.randint, 99, (2, 9))),
    "conformer": Case(lambda: nn.Sequential(Conformer(), Conformer()), partial(torch.randn, 2, 11, 32)),
    "conv_tasnet": Case(ConvTasNet, partial(torch.randn, 2, 1, 400)),
    "wavenet": Case(WaveNet, partial(torch.randn, 2, 4, 30)),
    "deepfm": Case(DeepFM, partial(torch.randint, 10, (8, 6))),
    "cross_network": Case(CrossNetwork, lambda: (torch.randint(50, (8, 4)), torch.randn(8, 6))),
    "pointnet": Case(PointNet, partial(torch.randn, 2, 3, 40)),
}
