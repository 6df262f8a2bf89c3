"""Losses of the lineage that the method builds on: segmentation and token affinity."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check

AllReduce = Callable[[Tensor], Tensor]


def segmentation_loss(
    logits: Tensor,
    label: Tensor,
    *,
    ignore_index: int = 255,
    all_reduce: AllReduce | None = None,
    world_size: int = 1,
) -> Tensor:
    r"""Cross-entropy with background and foreground weighing the same, however many pixels each has.

    .. math:: L_s = \tfrac12 \operatorname*{mean}_{i:\, y_i = 0} \mathrm{ce}_i
                  + \tfrac12 \operatorname*{mean}_{i:\, y_i > 0} \mathrm{ce}_i

    Args:
        logits: ``(B, K + 1, h, w)``; up-sampled bilinearly (``align_corners=False``) to the label.
        label: integer ``(B, H, W)``: 0 background, 1..K classes.
        ignore_index: label of pixels that do not count.
        all_reduce: sums a detached count over ranks, for an objective that does not depend on their number.
        world_size: number of ranks that `all_reduce` sums over; undoes the mean over ranks of data parallelism.

    Returns:
        a scalar >= 0 in the dtype of `logits`. A half without pixels is exactly 0; so is the loss of a label that is
        `ignore_index` throughout, connected to the graph.

    Raises:
        ValueError: if a shape does not fit. TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.losses import segmentation_loss
        >>> logits = torch.zeros(1, 3, 4, 4)
        >>> segmentation_loss(logits, torch.full((1, 16, 16), 2))  # log(3) / 2: no background pixel
        tensor(0.5493)

    Reference: FFR (CVPR 2025), :math:`L_{s1}` and :math:`L_{s2}`; the halves are the lineage's (ToCo, CVPR 2023).
    """
    owner = "segmentation_loss"
    _check.bind(owner, logits=(logits, "B C h w"), label=(label, "B H W"))
    _check.floating(owner, logits=logits)
    _check.integer(owner, label=label)
    label = label.long()  # a negative ignore_index would wrap around in uint8
    with torch.autocast(logits.device.type, enabled=False):
        full = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if full.shape[2:] != label.shape[1:]:
            full = F.interpolate(full, size=tuple(label.shape[1:]), mode="bilinear", align_corners=False)
        entropy = F.cross_entropy(full, label, ignore_index=ignore_index, reduction="none")
        background = (label == 0) & (label != ignore_index)
        foreground = (label != 0) & (label != ignore_index)
        counts = torch.stack([background.sum(), foreground.sum()]).to(full.dtype)
        if all_reduce is not None:
            counts = all_reduce(counts)
        share = 0.5 * world_size / counts.clamp(min=1)
        return (entropy * (background * share[0] + foreground * share[1])).sum().to(logits.dtype)


class SegmentationLoss(nn.Module):
    """`segmentation_loss` with its ignore index bound; no parameters, no buffers.

    Args:
        ignore_index: label of pixels that do not count.

    Example:
        >>> import torch
        >>> from ffr import SegmentationLoss
        >>> SegmentationLoss()(torch.zeros(1, 21, 28, 28), torch.full((1, 448, 448), 255))
        tensor(0.)
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, logits: Tensor, label: Tensor, *, all_reduce: AllReduce | None = None, world_size: int = 1
    ) -> Tensor:
        """See `segmentation_loss`."""
        return segmentation_loss(
            logits, label, ignore_index=self.ignore_index, all_reduce=all_reduce, world_size=world_size
        )

    def extra_repr(self) -> str:
        """The ignore index."""
        return f"ignore_index={self.ignore_index}"


def affinity_loss(
    features: Tensor,
    label: Tensor,
    *,
    ignore_index: int = 255,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    all_reduce: AllReduce | None = None,
    world_size: int = 1,
) -> Tensor:
    r"""Tokens of one label alike, tokens of two labels unlike.

    .. math:: L_\text{aff} = \tfrac12 \Big(1 - \frac{\sum_\text{pos} s_{ij}}{n_\text{pos} + 1}\Big)
                           + \tfrac12 \frac{\sum_\text{neg} s_{ij}}{n_\text{neg} + 1},
              \qquad s_{ij} = |\cos(x_i, x_j)|

    over the ordered token pairs of an image; positive pairs share a label, background included. The diagonal and
    pairs with an ignored token drop out.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        label: integer ``(B, h, w)``, a label map on the token grid.
        ignore_index: label of tokens that do not count.
        mask: bool ``(B, h, w)``, False leaves a token out.
        grid: ``(h, w)``, for tokens.
        all_reduce: sums a detached count over ranks, for an objective that does not depend on their number.
        world_size: number of ranks that `all_reduce` sums over; undoes the mean over ranks of data parallelism.

    Returns:
        a scalar in [0, 1], in the dtype of `features`. A half without pairs is exactly 0, connected to the graph.

    Raises:
        ValueError: if a shape does not fit. TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.losses import affinity_loss
        >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> affinity_loss(tokens, torch.tensor([[[0, 0, 2]]]), grid=(1, 3))  # 0.5 * (1 - 2 / 3)
        tensor(0.1667)

    Reference: the lineage's patch-token affinity (ToCo, CVPR 2023).
    """
    owner = "affinity_loss"
    (tokens,), sizes = _check.tokens(owner, grid=grid, features=features)
    _check.bind(owner, sizes=sizes, label=(label, "B h w"))
    _check.integer(owner, label=label)
    label = label.long()
    if mask is not None:
        _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
        _check.boolean(owner, mask=mask)
        label = torch.where(mask, label, ignore_index)
    names = label.flatten(1)
    known = names != ignore_index
    pairs = known[:, :, None] & known[:, None]
    same = names[:, :, None] == names[:, None]
    positive = pairs & same & ~torch.eye(names.shape[1], dtype=torch.bool, device=names.device)
    negative = pairs & ~same
    with torch.autocast(tokens.device.type, enabled=False):
        # Scaling by the norm first keeps fp16 products in range; a zero token is alike to none.
        norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=_accumulator(tokens))
        unit = (tokens / torch.where(norm > 0, norm, 1)).to(tokens.dtype)
        alike = torch.bmm(unit, unit.transpose(1, 2)).abs().to(norm.dtype)
        counts = torch.stack([positive.sum(), negative.sum()]).to(norm.dtype)
        if all_reduce is not None:
            counts = all_reduce(counts)
        sums = torch.stack([(alike * positive).sum(), (alike * negative).sum()])
        means = sums * (world_size / (counts + 1))
        halves = torch.stack([1 - means[0], means[1]]) * (counts > 0)
        return (0.5 * halves.sum()).to(tokens.dtype)


class AffinityLoss(nn.Module):
    """`affinity_loss` with its ignore index bound; no parameters, no buffers.

    Args:
        ignore_index: label of tokens that do not count.

    Example:
        >>> import torch
        >>> from ffr import AffinityLoss
        >>> AffinityLoss()(torch.randn(2, 64, 14, 14), torch.full((2, 14, 14), 255))
        tensor(0.)
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self,
        features: Tensor,
        label: Tensor,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        all_reduce: AllReduce | None = None,
        world_size: int = 1,
    ) -> Tensor:
        """See `affinity_loss`."""
        return affinity_loss(
            features,
            label,
            ignore_index=self.ignore_index,
            mask=mask,
            grid=grid,
            all_reduce=all_reduce,
            world_size=world_size,
        )

    def extra_repr(self) -> str:
        """The ignore index."""
        return f"ignore_index={self.ignore_index}"


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
