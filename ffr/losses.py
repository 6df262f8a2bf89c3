"""Losses of the lineage that the method builds on: segmentation, token affinity and dense energy."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check
from ffr.lattice import PermutohedralLattice

# Numbers that the lattices of images which are built at once may hold; more of them launch less. At the peak there are
# about four copies: 1 GiB.
ROOM = {"cpu": 0, "cuda": 2**26}
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
        a scalar >= 0, at least float32. A half without pixels is exactly 0; so is the loss of a label that is
        `ignore_index` throughout, connected to the graph.

    Raises:
        ValueError: if a shape does not fit.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.losses import segmentation_loss
        >>> logits = torch.zeros(1, 3, 4, 4)
        >>> segmentation_loss(logits, torch.full((1, 16, 16), 2))  # log(3) / 2, for no pixel is 0
        tensor(0.5493)

    Reference: FFR (CVPR 2025), :math:`L_{s1}` and :math:`L_{s2}`; the halves are the lineage's (ToCo, CVPR 2023).
    """
    owner = "segmentation_loss"
    _check.bind(owner, logits=(logits, "B C h w"), label=(label, "B H W"))
    _check.floating(owner, logits=logits)
    _check.integer(owner, label=label)
    label = label.long()  # a negative ignore_index would wrap around in uint8
    with _check.no_autocast(logits):
        full = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if full.shape[2:] != label.shape[1:]:
            full = F.interpolate(full, size=tuple(label.shape[1:]), mode="bilinear", align_corners=False)
        entropy = F.cross_entropy(full, label, ignore_index=ignore_index, reduction="none")
        background = (label == 0) & (label != ignore_index)
        foreground = (label != 0) & (label != ignore_index)
        counts = torch.stack([background.sum(), foreground.sum()]).to(full.dtype)
        counts = _check.reduced(owner, counts, all_reduce, world_size)
        share = 0.5 * world_size / counts.clamp(min=1)
        return (entropy * (background * share[0] + foreground * share[1])).sum()


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
        a scalar in [0, 1], at least float32. A half without pairs is exactly 0, connected to the graph.

    Raises:
        ValueError: if a shape does not fit.
        TypeError: for a wrong dtype.

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
    remedy = "Shrink the CAM to the token grid before `cam_to_label`"
    _check.bind(owner, sizes=sizes, remedy=remedy, label=(label, "B h w"))
    _check.integer(owner, label=label)
    label = label.long()
    if mask is not None:
        _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
        _check.boolean(owner, mask=mask)
        label = torch.where(mask, label, ignore_index)
        tokens = tokens.masked_fill(~mask.flatten(1)[..., None], 0)  # whatever a padding token holds, NaN too
    names = label.flatten(1)
    known = names != ignore_index
    pairs = known[:, :, None] & known[:, None]
    same = names[:, :, None] == names[:, None]
    positive = pairs & same & ~torch.eye(names.shape[1], dtype=torch.bool, device=names.device)
    negative = pairs & ~same
    with _check.no_autocast(tokens):
        # Scaling by the norm first keeps fp16 products in range; a zero token is alike to none.
        norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=_accumulator(tokens))
        some = norm > 10 * torch.finfo(norm.dtype).tiny ** 0.5  # below, the gradient would overflow
        unit = (tokens / torch.where(some, norm, 1)).to(tokens.dtype)
        alike = torch.bmm(unit, unit.transpose(1, 2)).abs().to(norm.dtype)
        counts = torch.stack([positive.sum(), negative.sum()]).to(norm.dtype)
        counts = _check.reduced(owner, counts, all_reduce, world_size)
        sums = torch.stack([(alike * positive).sum(), (alike * negative).sum()])
        means = sums * (world_size / (counts + 1))
        halves = torch.stack([1 - means[0], means[1]]) * (counts > 0)
        return 0.5 * halves.sum()


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


def dense_energy_loss(
    logits: Tensor,
    label: Tensor,
    *,
    images: Tensor,
    roi: Tensor | None = None,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    ignore_index: int = 255,
    exact_gradient: bool = True,
) -> Tensor:
    r"""Dense energy: pixels alike in colour and near each other should share their labels.

    .. math:: E = -\frac{\text{weight}}{B} \sum_k \sum_i g_i S_{ik} (G S)_{ik}, \qquad S = \text{roi} \cdot P,
              \qquad g_i = \max(\text{roi}_i - \max_k P_{ik}, 0)

    with P the softmax of the logits, G a Gaussian kernel on position and colour, and the gate :math:`g_i = 1` where
    the label is `ignore_index`, in an image that has any other pixel. The gate is a constant, and images have no
    gradient: by the logits alone,

    .. math:: \frac{\partial E}{\partial P} = -\frac{\text{weight}}{B} \text{roi} \big(g (G S) + G^\top (g S)\big)

    Both filterings are one call. Values are in lattice units, see `ffr.lattice.PermutohedralLattice`, about half of
    the true sum; the customary weight 1e-7 belongs to them. No second derivative.

    Args:
        logits: ``(B, K + 1, h, w)``; up-sampled bilinearly (``align_corners=False``) to the label.
        label: integer ``(B, H, W)``; only `ignore_index` matters.
        images: ``(B, 3, H, W)``, RGB, uint8 or float in [0, 1], not normalised. Values are not looked at: with
            normalised images, or floats in 0..255, the energy is much too small, without an error.
        roi: ``(B, H, W)`` in [0, 1] or bool, what of the images is no padding; left out, all.
        weight: factor, >= 0.
        sigma_rgb: standard deviation of the colour, on the scale 0..255.
        sigma_xy: standard deviation of the position, in pixels of the images.
        scale: everything is shrunk by it first, in (0, 1]: P bilinearly, the others to the nearest pixel.
        ignore_index: label of pixels whose gate is open.
        exact_gradient: False takes the customary approximation :math:`-2 g (G S)` in place of the sum above: half as
            many channels are filtered.

    Returns:
        a scalar <= 0, at least float32; exactly 0, connected to the graph, for an image without a region of
        interest or without a label.

    Raises:
        ValueError: if a shape or a number does not fit.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.losses import dense_energy_loss
        >>> label, image = torch.tensor([[[255, 255], [255, 0]]]), torch.ones(1, 3, 2, 2)
        >>> logits = torch.tensor([100.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
        >>> energy = dense_energy_loss(logits, label, images=image, weight=1.0, scale=1.0)
        >>> bool(-12 < energy < -6)  # three pixels unlabelled, in true units four neighbours each
        True

    Reference: Tang et al., ECCV 2018; gate, half resolution and numbers of the lineage (ToCo, CVPR 2023), whose
    gradient is the approximation.
    """
    owner = "dense_energy_loss"
    sizes = _check.bind(owner, logits=(logits, "B C h w"), label=(label, "B H W"))
    _check.bind(owner, sizes=sizes, images=(images, "B 3 H W"))
    _check.floating(owner, logits=logits)
    _check.integer(owner, label=label)
    _check.within(owner, weight=weight)
    _check.positive(owner, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, scale=scale)
    _check.within(owner, scale=scale, at_most=1.0)
    if roi is not None:
        _check.bind(owner, sizes=sizes, roi=(roi, "B H W"))
    _check.pixels(owner, images=images)
    full = (sizes["H"], sizes["W"])
    small = tuple(max(1, int(scale * side)) for side in full)
    with _check.no_autocast(logits):
        logits_full = logits.to(_accumulator(logits))
        if logits.shape[2:] != label.shape[1:]:
            logits_full = F.interpolate(logits_full, size=full, mode="bilinear", align_corners=False)
        probs = logits_full.softmax(1)
        if small != full:
            probs = F.interpolate(probs, size=small, mode="bilinear", align_corners=False)
        probs = probs.flatten(2).transpose(1, 2)  # (B, N, C): rows of all labels, as the lattice takes them

        def shrink(maps: Tensor) -> Tensor:
            return F.interpolate(maps.to(probs.dtype), size=small, mode="nearest").flatten(2).transpose(1, 2)

        # Not `no_grad`, which does not stop the tangents of forward mode.
        fixed = probs.detach()
        inside = torch.ones_like(fixed[..., :1]) if roi is None else shrink(roi.detach()[:, None])
        unlabelled = shrink((label == ignore_index)[:, None]) > 0
        gate = torch.where(unlabelled, 1.0, (inside - fixed.amax(2, keepdim=True)).clamp(min=0))
        gate = gate * (label != ignore_index).flatten(1).any(1)[:, None, None]
        level = 1.0 if images.dtype == torch.uint8 else 255.0
        colour = shrink(images.detach()) * (level / sigma_rgb)
        y, x = (torch.arange(side, dtype=probs.dtype, device=probs.device) / (scale * sigma_xy) for side in small)
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2)
        features = torch.cat([place.expand(len(colour), -1, -1), colour], 2)
        inner = fixed * inside
        if exact_gradient:
            both = _gaussian_filter(features, torch.cat([inner, gate * inner], 2), True)
            near, back = both.chunk(2, 2)
            slope = inside * (gate * near + back)
        else:
            slope = 2 * inside * gate * _gaussian_filter(features, inner, False)
        # E is half of P . dE/dP, for G is symmetric; what is taken off carries no gradient.
        total = (probs * slope).sum()
        energy: Tensor = (total - 0.5 * total.detach()) * (-weight / max(1, sizes["B"]))
        return energy


class DenseEnergyLoss(nn.Module):
    """`dense_energy_loss` with its numbers bound; no parameters, no buffers.

    Args:
        weight, sigma_rgb, sigma_xy, scale, ignore_index, exact_gradient: see `dense_energy_loss`.

    Example:
        >>> import torch
        >>> from ffr import DenseEnergyLoss
        >>> logits, label = torch.randn(2, 21, 4, 4), torch.zeros(2, 64, 64).long()
        >>> energy = DenseEnergyLoss()(logits, label, images=torch.rand(2, 3, 64, 64))
        >>> bool(energy < 0)
        True
    """

    def __init__(
        self,
        weight: float = 1e-7,
        sigma_rgb: float = 15.0,
        sigma_xy: float = 100.0,
        scale: float = 0.5,
        ignore_index: int = 255,
        exact_gradient: bool = True,
    ) -> None:
        super().__init__()
        owner = "DenseEnergyLoss"
        _check.within(owner, weight=weight)
        _check.positive(owner, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, scale=scale)
        _check.within(owner, scale=scale, at_most=1.0)
        self.weight, self.sigma_rgb, self.sigma_xy, self.scale = weight, sigma_rgb, sigma_xy, scale
        self.ignore_index, self.exact_gradient = ignore_index, exact_gradient

    def forward(self, logits: Tensor, label: Tensor, *, images: Tensor, roi: Tensor | None = None) -> Tensor:
        """See `dense_energy_loss`."""
        return dense_energy_loss(
            logits,
            label,
            images=images,
            roi=roi,
            weight=self.weight,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy,
            scale=self.scale,
            ignore_index=self.ignore_index,
            exact_gradient=self.exact_gradient,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"weight={self.weight}, sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}, scale={self.scale}, "
            f"exact_gradient={self.exact_gradient}"
        )


@torch.library.custom_op("ffr::gaussian_filter", mutates_args=())
def _gaussian_filter(features: Tensor, values: Tensor, exact_adjoint: bool) -> Tensor:
    """Filter ``(B, N, C)`` by the lattices of ``(B, N, d)``; one operator, whose lattice no graph has to trace."""
    filtered = torch.empty_like(values, memory_format=torch.contiguous_format)
    numbers = features.shape[1] * (features.shape[2] + 1) * values.shape[2]  # of one image
    together = max(1, ROOM.get(values.device.type, 0) // numbers)
    for begin in range(0, len(values), together):
        some = slice(begin, begin + together)
        lattice = PermutohedralLattice(features[some], normalize=False, exact_adjoint=exact_adjoint)
        filtered[some] = lattice(values[some])
    return filtered


@_gaussian_filter.register_fake
def _(features: Tensor, values: Tensor, exact_adjoint: bool) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
