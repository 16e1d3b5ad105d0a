"""21 models of timm, narrow or short where timm lets one say so."""

from functools import partial
from typing import Any

import timm

from zoo.case import Case, images


def model(name: str, size: int = 64, **options: Any) -> Case:
    """Return a model; options are those of timm."""
    return Case(partial(timm.create_model, name, pretrained=False, num_classes=10, **options), images(size))


CASES = {
    "vit_tiny": model("vit_tiny_patch16_224", img_size=64, depth=4),
    "deit_tiny_distilled": model("deit_tiny_distilled_patch16_224", img_size=64, depth=4),
    "beit_base": model("beit_base_patch16_224", img_size=64, depth=3, embed_dim=192, num_heads=6),
    "eva02_tiny": model("eva02_tiny_patch14_224", 56, img_size=56, depth=3),
    "caformer_s18": model("caformer_s18"),
    "poolformer_s12": model("poolformer_s12"),
    "mixer_s16": model("mixer_s16_224", img_size=64),
    "convnext_atto": model("convnext_atto"),
    "convnextv2_atto": model("convnextv2_atto"),
    "rexnet_100": model("rexnet_100"),
    "cspdarknet53": model("cspdarknet53"),
    "efficientnet_lite0": model("efficientnet_lite0"),
    "ghostnet_100": model("ghostnet_100"),
    "resnest14d": model("resnest14d"),
    "res2net50": model("res2net50_26w_4s"),
    "hrnet_w18_small": model("hrnet_w18_small"),
    "dla34": model("dla34"),
    "repvgg_a0": model("repvgg_a0"),
    "nfnet_l0": model("nfnet_l0"),
    "mobilevit_s": model("mobilevit_s"),
    "levit_128s": model("levit_128s", 224),
}
