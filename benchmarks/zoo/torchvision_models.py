"""29 models of torchvision, as they are."""

from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

from zoo.case import Case, images


class RetinaNetBody(nn.Module):
    """RetinaNet without its boxes: backbone, feature pyramid and heads, which are all that has weights."""

    def __init__(self) -> None:
        super().__init__()
        model = torchvision.models.detection.retinanet_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=5
        )
        self.backbone = model.backbone
        self.head = RetinaNetHead(
            256, _default_anchorgen().num_anchors_per_location()[0], 5, partial(nn.GroupNorm, 32)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


def classifier(name: str, size: int = 64, **options: Any) -> Case:
    """Return a classifier; options are those of torchvision."""
    return Case(partial(torchvision.models.get_model, name, weights=None, **options), images(size))


def maxvit() -> nn.Module:
    """Return MaxViT in the width of maxvit_t, for small images and without its repetitions."""
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=64,
        partition_size=2,
        block_channels=[64, 128],
        block_layers=[1, 2],
        head_dim=32,
        stochastic_depth_prob=0.0,
    )


def segmenter(name: str) -> Case:
    return classifier(name, weights_backbone=None, num_classes=4)


CASES = {
    "alexnet": classifier("alexnet"),
    "vgg11": classifier("vgg11"),
    "vgg11_bn": classifier("vgg11_bn"),
    "squeezenet1_1": classifier("squeezenet1_1"),
    "resnet18": classifier("resnet18"),
    "resnet50": classifier("resnet50"),
    "wide_resnet50_2": classifier("wide_resnet50_2"),
    "resnext50_32x4d": classifier("resnext50_32x4d"),
    "densenet121": classifier("densenet121"),
    "googlenet": classifier("googlenet", aux_logits=False, init_weights=False),
    "inception_v3": classifier("inception_v3", 96, aux_logits=False, init_weights=False),
    "mobilenet_v2": classifier("mobilenet_v2"),
    "mobilenet_v3_small": classifier("mobilenet_v3_small"),
    "mobilenet_v3_large": classifier("mobilenet_v3_large"),
    "mnasnet1_0": classifier("mnasnet1_0"),
    "shufflenet_v2_x1_0": classifier("shufflenet_v2_x1_0"),
    "efficientnet_b0": classifier("efficientnet_b0"),
    "efficientnet_v2_s": classifier("efficientnet_v2_s"),
    "regnet_x_400mf": classifier("regnet_x_400mf"),
    "regnet_y_400mf": classifier("regnet_y_400mf"),
    "convnext_tiny": classifier("convnext_tiny"),
    "vit_b_32": classifier("vit_b_32", image_size=64),
    "swin_t": classifier("swin_t"),
    "swin_v2_t": classifier("swin_v2_t"),
    "maxvit": Case(maxvit, images(64)),
    "fcn_resnet50": segmenter("fcn_resnet50"),
    "deeplabv3_mobilenet_v3_large": segmenter("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3_large": segmenter("lraspp_mobilenet_v3_large"),
    "retinanet_resnet50_fpn": Case(RetinaNetBody, images(64)),
}
