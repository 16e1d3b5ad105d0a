"""Architectures that nobody looked at while the rules were written, of a dozen other libraries."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import unknown_images, unknown_sequences
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
    **unknown_sequences.CASES,
    **unknown_images.CASES,
}
