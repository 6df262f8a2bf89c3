"""The small network of the embedded scenes: timm's VisionTransformer on a convolutional stem."""

from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ffr import FFR, timm_encoder


class ConvStem(PatchEmbed):
    """Patch embedding by two strided convolution stages, a stride of 4; a linear one learns far slower from scratch."""

    def __init__(self, *args: Any, embed_dim: int = 64, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)
        if self.patch_size != (4, 4):
            raise ValueError(f"ConvStem: expected a patch size of 4, got {self.patch_size}.")
        stages: list[nn.Module] = []
        for before, after in ((3, embed_dim // 2), (embed_dim // 2, embed_dim)):
            stages += [_convolution(before, after, stride=2), _convolution(after, after, stride=1)]
        self.proj = nn.Sequential(*stages, nn.Conv2d(embed_dim, embed_dim, 1))


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.GELU())


def small_ffr(num_classes: int, size: int, *, width: int = 64, depth: int = 4) -> FFR:
    """FFR on a transformer of a few hundred thousand weights, random ones.

    Args:
        num_classes: K.
        size: side of the images in pixels; the token grid is a quarter of it.
        width: channels D, a multiple of 32.
        depth: transformer blocks; the intermediate features come from the third from the end.
    """
    transformer = VisionTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=width // 32,
        num_classes=0,
        global_pool="",
        class_token=False,
        dynamic_img_size=True,
        init_values=0.01,  # blocks that start near the identity keep the CAM local while little is learnt
        embed_layer=ConvStem,
    )
    model = FFR(timm_encoder(transformer), num_classes, hidden=width, dilation=2)
    nn.init.zeros_(model.head.last.weight)  # untrained, every pixel is background: no class has a head start
    return model
