"""Dual segmentation heads."""

from torch import Tensor, nn

from ffr import _check


class DualSegmentationHead(nn.Module):
    r"""Two segmentation heads that share their first and last convolution.

    .. math:: s = \psi(\phi_1(\phi_0(X))), \qquad s_\text{high} = \psi(\phi_2(\phi_0(X_\text{high})))

    :math:`\phi` are 3 x 3 dilated convolutions, :math:`\psi` is 1 x 1, ReLU between, no bias. ``forward`` is the head
    of the features, the only one that inference needs; ``high`` is the head of their high band.

    Args:
        embed_dim: D, channels of the features.
        num_classes: K; the logits have K + 1 channels, background first.
        hidden: channels between the convolutions.
        dilation: of the 3 x 3 convolutions, in tokens.

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> import torch
        >>> from ffr import DualSegmentationHead
        >>> head = DualSegmentationHead(embed_dim=96, num_classes=20, hidden=64)
        >>> head(torch.randn(2, 96, 28, 28)).shape
        torch.Size([2, 21, 28, 28])

    Reference: FFR (CVPR 2025), method figure; sizes from its lineage (ToCo, CVPR 2023), the split is ours.
    """

    def __init__(self, embed_dim: int, num_classes: int, hidden: int = 512, dilation: int = 5) -> None:
        super().__init__()
        _check.within(
            "DualSegmentationHead",
            at_least=1,
            whole=True,
            embed_dim=embed_dim,
            num_classes=num_classes,
            hidden=hidden,
            dilation=dilation,
        )
        self.embed_dim = embed_dim

        def dilated(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation, bias=False)

        self.phi_0 = dilated(embed_dim)
        self.phi_1 = dilated(hidden)
        self.phi_2 = dilated(hidden)
        self.last = nn.Conv2d(hidden, num_classes + 1, 1, bias=False)

    def forward(self, features: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Logits of the features.

        Args:
            features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
            grid: ``(h, w)``, for tokens.

        Returns:
            ``(B, K + 1, h, w)``, unbounded.
        """
        return self._logits("DualSegmentationHead", features, self.phi_1, grid)

    def high(self, features: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Logits of the high band of the features; shapes as ``forward``."""
        return self._logits("DualSegmentationHead.high", features, self.phi_2, grid)

    def _logits(self, owner: str, features: Tensor, branch: nn.Conv2d, grid: tuple[int, int] | None) -> Tensor:
        _check.tokens(owner, grid=grid, sizes={"D": self.embed_dim}, features=features)
        logits: Tensor = self.last(branch(self.phi_0(_check.maps(owner, features, grid)).relu()).relu())
        return logits
