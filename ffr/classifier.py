"""Image-level classifier on patch tokens; serves the final and the intermediate features."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check
from ffr.cam import class_activation_map


class IntermediateClassifier(nn.Module):
    r"""Global max pool over the tokens, then a linear map without bias.

    .. math:: z_k = W_k \cdot \max_i x_i

    One parameter, ``weight`` ``(K, D)``; a state dict with a convolution's ``(K, D, 1, 1)`` loads too, but not the
    reverse. The method uses two of them: on the final features and, with its own weights, on those of an intermediate
    block, where high frequencies are least attenuated.

    Args:
        embed_dim: D, channels of the features.
        num_classes: K, foreground classes; background is not counted.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> import torch
        >>> from ffr import IntermediateClassifier
        >>> classify = IntermediateClassifier(embed_dim=768, num_classes=20)
        >>> features = torch.randn(2, 768, 28, 28)
        >>> classify(features).shape, classify.cam(features).shape
        (torch.Size([2, 20]), torch.Size([2, 20, 28, 28]))

    Reference: FFR (CVPR 2025), method figure and supplementary; max pooling as in its lineage (ToCo, CVPR 2023).
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        _check.within("IntermediateClassifier", at_least=1, whole=True, embed_dim=embed_dim, num_classes=num_classes)
        self.embed_dim, self.num_classes = embed_dim, num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features: Tensor, *, mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """Logits of the image.

        Args:
            features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
            mask: bool ``(B, h, w)``, False leaves a token out of the maximum.
            grid: ``(h, w)``, for tokens.

        Returns:
            ``(B, K)``, unbounded.
        """
        owner = "IntermediateClassifier"
        (tokens,), sizes = _check.tokens(owner, grid=grid, sizes={"D": self.embed_dim}, features=features)
        if mask is not None:
            _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
            _check.boolean(owner, mask=mask)
            real = mask.flatten(1)[..., None]
            tokens = tokens.masked_fill(~real, torch.finfo(tokens.dtype).min)
            tokens = tokens.masked_fill(~real.any(1, keepdim=True), 0)  # an image of padding alone
        return F.linear(tokens.amax(1), self.weight.to(tokens.dtype))

    def cam(self, features: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Raw class activation map ``(B, K, h, w)``, before ReLU; see `ffr.cam.class_activation_map`."""
        _check.tokens("IntermediateClassifier.cam", grid=grid, sizes={"D": self.embed_dim}, features=features)
        return class_activation_map(features, self.weight, grid=grid)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"embed_dim={self.embed_dim}, num_classes={self.num_classes}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            state_dict = {**state_dict, key: weight.flatten(1)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
