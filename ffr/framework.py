"""The method composed: the rectification in one call, and the network of the method figure."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ffr import _check
from ffr.cam import to_image
from ffr.classifier import IntermediateClassifier
from ffr.encoder import Encoder, Features
from ffr.frequency import FrequencyMask
from ffr.heads import DualSegmentationHead
from ffr.prototypes import ClassPrototypes
from ffr.rectification import RectificationLoss


class Rectified(NamedTuple):
    """Result of `FrequencyRectification`: the loss, both bands, and the selected tokens ``(B, K, h, w)``."""

    loss: Tensor
    low: Tensor
    high: Tensor
    selected: Tensor


class FrequencyRectification(nn.Module):
    """Frequency mask, class prototypes and rectification loss in one call, for a training loop of one's own.

    No parameters and no buffers: the host's ``state_dict`` stays as it is.

    Args:
        mu: cut-off in cycles per token, see `ffr.frequency.split_bands`.
        seed_threshold: see `ffr.prototypes.class_prototypes`.
        gap: see `ffr.rectification.select_tokens`.
        min_fraction: see `ffr.rectification.rectification_loss`.

    Example:
        >>> import torch
        >>> from ffr import FrequencyRectification
        >>> rectify = FrequencyRectification(mu=0.4)
        >>> features, cam = torch.randn(2, 64, 14, 14), torch.rand(2, 20, 14, 14)
        >>> loss, low, high, selected = rectify(features, cam, torch.ones(2, 20))
        >>> high.shape, selected.shape
        (torch.Size([2, 64, 14, 14]), torch.Size([2, 20, 14, 14]))

    Reference: FFR (CVPR 2025), method figure, "FFM" and "FSTS".
    """

    def __init__(
        self, mu: float = 0.4, seed_threshold: float = 0.7, gap: float = 0.05, min_fraction: float = 0.05
    ) -> None:
        super().__init__()
        _check.within("FrequencyRectification", gap=gap, at_most=2.0)  # without one it would select nothing
        self.frequency = FrequencyMask(mu)
        self.prototypes = ClassPrototypes(seed_threshold)
        self.rectification = RectificationLoss(gap, min_fraction)

    def forward(
        self,
        features: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        patch_size: int | None = None,
        max_present: int | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> Rectified:
        """Split, select, and pull.

        Args:
            features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
            cam: ``(B, K, ., .)`` of any size, normalised as the method has it, or raw; no gradient flows through it.
            labels: multi-hot ``(B, K)``.
            mask: bool ``(B, h, w)``, False leaves a token out.
            grid: ``(h, w)``, for tokens.
            patch_size: for a `cam` at the pixels of an image that is no whole number of patches, see
                `ffr.prototypes.class_prototypes`.
            max_present: an upper bound of the classes present in one image, known on the host.
            all_reduce: sums a detached count over ranks, for a loss that does not depend on their number.
            world_size: number of ranks that `all_reduce` sums over.

        Returns:
            ``Rectified(loss, low, high, selected)``; the bands have the shape of `features`.
        """
        low, high = self.frequency(features, grid=grid)
        vectors, valid = self.prototypes(
            features, cam, labels, mask=mask, grid=grid, patch_size=patch_size, max_present=max_present
        )
        selected = self.rectification.select(
            features=features, low=low, prototypes=vectors, valid=valid, mask=mask, grid=grid, max_present=max_present
        )
        loss = self.rectification(
            features=features,
            low=low,
            prototypes=vectors,
            valid=valid,
            selected=selected,
            mask=mask,
            grid=grid,
            all_reduce=all_reduce,
            world_size=world_size,
        )
        return Rectified(loss, low, high, selected)


class Outputs(NamedTuple):
    """Everything the method figure names, of one forward.

    `final`, `intermediate`, `low` and `high` are feature maps ``(B, D, h, w)``. `logits` and `logits_inter` ``(B, K)``
    come from the classifiers; so do `cam` and `cam_inter` ``(B, K, h, w)``, raw, before ReLU. `seg` and `seg_high` are
    the logits of the two heads ``(B, K + 1, h, w)``. `mask` is the encoder's, bool ``(B, h, w)`` or None.
    """

    final: Tensor
    intermediate: Tensor
    low: Tensor
    high: Tensor
    logits: Tensor
    logits_inter: Tensor
    cam: Tensor
    cam_inter: Tensor
    seg: Tensor
    seg_high: Tensor
    mask: Tensor | None


class FFR(nn.Module):
    """The network of the method: encoder, two classifiers, frequency mask, dual segmentation head.

    Calling it is inference: encoder and one head, neither the frequency mask nor the second head in the graph.

    Args:
        encoder: anything that keeps to `ffr.encoder.Encoder`, such as `ffr.encoder.timm_encoder`.
        num_classes: K; background is not counted.
        mu: cut-off in cycles per token.
        hidden: channels of the segmentation heads.
        dilation: of the segmentation heads, in tokens.

    Raises:
        TypeError: if `encoder` lacks ``embed_dim`` or ``patch_size``, or they are no integers; see `encode` for what it
            must give.

    Example:
        >>> import torch
        >>> from ffr import FFR
        >>> from ffr.encoder import Features
        >>> class Tiny(torch.nn.Conv2d):  # any module with two attributes
        ...     embed_dim, patch_size = 8, 16
        ...     def forward(self, images):
        ...         x = super().forward(images)
        ...         return Features(final=x, intermediate=x)
        >>> model = FFR(Tiny(3, 8, 16, stride=16), num_classes=20, hidden=16, dilation=1)
        >>> images = torch.rand(2, 3, 224, 224)
        >>> model(images).shape, model.outputs(images).cam.shape
        (torch.Size([2, 21, 14, 14]), torch.Size([2, 20, 14, 14]))

    Reference: FFR (CVPR 2025), method figure.
    """

    def __init__(
        self, encoder: Encoder, num_classes: int, *, mu: float = 0.4, hidden: int = 512, dilation: int = 5
    ) -> None:
        super().__init__()
        if not (callable(encoder) and hasattr(encoder, "embed_dim") and hasattr(encoder, "patch_size")):
            raise TypeError(
                "FFR: expected `encoder` to be callable, with attributes embed_dim and patch_size, got "
                f"{type(encoder).__name__}. See ffr.encoder.Encoder, or use ffr.encoder.timm_encoder."
            )
        name = f"FFR: encoder {type(encoder).__name__}"
        _check.within(name, at_least=1, whole=True, embed_dim=encoder.embed_dim, patch_size=encoder.patch_size)
        self.encoder = encoder
        self.num_classes = num_classes
        self.classifier = IntermediateClassifier(encoder.embed_dim, num_classes)
        self.intermediate_classifier = IntermediateClassifier(encoder.embed_dim, num_classes)
        self.frequency = FrequencyMask(mu)
        self.head = DualSegmentationHead(encoder.embed_dim, num_classes, hidden, dilation)

    def forward(self, images: Tensor) -> Tensor:
        """Segmentation logits ``(B, K + 1, h, w)``; `ffr.cam.to_image` brings them to the image.

        Args:
            images: ``(B, 3, H, W)``, RGB, uint8 or float in [0, 1].
        """
        logits: Tensor = self.head(self.encode(images).final)
        return logits

    def encode(self, images: Tensor) -> Features:
        """Features of the images, held against what `ffr.encoder.Encoder` promises.

        Raises:
            TypeError: if the encoder gives no `ffr.encoder.Features`, or a mask that is not bool.
            ValueError: if a shape does not fit: ``(B, embed_dim, ceil(H / patch_size), ceil(W / patch_size))``.
        """
        sizes = _check.bind("FFR", images=(images, "B 3 H W"))
        features = self.encoder(images)
        owner, patch = f"FFR: result of the encoder {type(self.encoder).__name__}", self.encoder.patch_size
        if not isinstance(features, Features):
            raise TypeError(
                f"{owner}: expected ffr.encoder.Features, got {type(features).__name__}. "
                "Return Features(final=..., intermediate=...)."
            )
        grid = {
            "B": sizes["B"],
            "D": self.encoder.embed_dim,
            "h": -(-sizes["H"] // patch),
            "w": -(-sizes["W"] // patch),
        }
        remedy = f"Pad images of {sizes['H']} x {sizes['W']} to whole patches of {patch}: a grid is rounded up"
        for name, maps in (("final", features.final), ("intermediate", features.intermediate)):
            _check.bind(owner, sizes=grid, remedy=remedy, **{name: (maps, "B D h w")})
        if features.mask is not None:
            _check.bind(owner, sizes=grid, mask=(features.mask, "B h w"))
            _check.boolean(owner, mask=features.mask)
        return features

    def outputs(self, images: Tensor) -> Outputs:
        """Every tensor of the method figure, for losses and pictures."""
        final, intermediate, mask = self.encode(images)
        low, high = self.frequency(final)
        return Outputs(
            final=final,
            intermediate=intermediate,
            low=low,
            high=high,
            logits=self.classifier(final, mask=mask),
            logits_inter=self.intermediate_classifier(intermediate, mask=mask),
            cam=self.classifier.cam(final),
            cam_inter=self.intermediate_classifier.cam(intermediate),
            seg=self.head(final),
            seg_high=self.head.high(high),
            mask=mask,
        )

    def cams(self, images: Tensor, *, features: Features | None = None) -> tuple[Tensor, Tensor]:
        """Raw final and intermediate CAM, ``(B, K, h, w)`` each, for `ffr.cam.multi_scale_cam`.

        Where the image is not a whole number of patches they come at the image's size instead, padding cut off.
        Tokens that the encoder's mask leaves out are 0. `features` are those of the images, from `encode`, where they
        are at hand.
        """
        features = self.encode(images) if features is None else features
        height, width = images.shape[2:]
        patch = self.encoder.patch_size
        final, intermediate, mask = features
        raw = self.classifier.cam(final), self.intermediate_classifier.cam(intermediate)
        if mask is not None:  # no class is to be found in padding
            raw = raw[0].masked_fill(~mask[:, None], 0), raw[1].masked_fill(~mask[:, None], 0)
        if height % patch == 0 and width % patch == 0:
            return raw
        return to_image(raw[0], (height, width), patch), to_image(raw[1], (height, width), patch)
