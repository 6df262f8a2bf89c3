"""Networks by name: any plain ViT of timm, or the small one of the embedded scenes, a ViT on a convolutional stem."""

from typing import Any

from safetensors import SafetensorError
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ffr import FFR, timm_encoder
from recipe.config import SMALL, Config


def build_model(config: Config, num_classes: int) -> FFR:
    """The network of a run; its first weights follow torch's seed, or come from where `config` says.

    Raises:
        ValueError: for a model that cannot be built, or weights that cannot be had; names the flag.
    """
    if config.model == SMALL:
        return small_ffr(num_classes, config.crop, mu=config.mu, hidden=config.hidden, dilation=config.dilation)
    try:
        encoder = timm_encoder(
            config.model,
            pretrained=config.pretrained,
            checkpoint=config.checkpoint,
            intermediate=config.intermediate,
            img_size=config.crop,  # position embeddings of the training grid, resampled once and not in every step
        )
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        if config.checkpoint is not None:
            raise ValueError(f"--checkpoint: cannot read {config.checkpoint} ({said.rstrip('.')}).") from error
        if config.pretrained:
            raise ValueError(
                f"--pretrained: cannot download timm's weights of {config.model} ({said.rstrip('.')}). Use "
                "--no-pretrained, with --checkpoint FILE for weights from a local file."
            ) from error
        raise
    if config.crop < encoder.patch_size:
        raise ValueError(f"--crop: expected {encoder.patch_size} or more, a patch of the network, got {config.crop}.")
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return FFR(encoder, num_classes, mu=config.mu, hidden=config.hidden, dilation=config.dilation)


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


def small_ffr(
    num_classes: int,
    size: int,
    *,
    width: int = 64,
    depth: int = 4,
    mu: float = 0.4,
    hidden: int = 64,
    dilation: int = 2,
) -> FFR:
    """FFR on a transformer of a few hundred thousand weights, random ones.

    Args:
        num_classes: K.
        size: side of the images in pixels; the token grid is a quarter of it.
        width: channels D, a multiple of 32.
        depth: transformer blocks; the intermediate features come from the third from the end.
        mu, hidden, dilation: as `ffr.FFR`.
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
    model = FFR(timm_encoder(transformer), num_classes, mu=mu, hidden=hidden, dilation=dilation)
    nn.init.zeros_(model.head.last.weight)  # untrained, every pixel is background: no class has a head start
    return model
