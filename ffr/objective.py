"""The whole training objective, term by term."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check
from ffr.cam import cam_to_label, multi_scale_cam, normalize_cam, to_image, whole_patches
from ffr.encoder import Features
from ffr.framework import FFR
from ffr.losses import AffinityLoss, DenseEnergyLoss, SegmentationLoss
from ffr.prototypes import ClassPrototypes
from ffr.rectification import RectificationLoss
from ffr.refine import PixelAdaptiveRefinement, refine_label


class Terms(NamedTuple):
    r"""The weighted sum, with its graph, and every term unweighted and detached; 0 where a term is off.

    `cls` and `cls_inter` are the classification losses, `seg` is :math:`L_{s1}`, `seg_high` :math:`L_{s2}`, `rect`
    :math:`L_r`, `aff` :math:`L_\text{aff}`, and `energy` the dense energy :math:`L_\text{reg}`.

    The last three are no losses, but worth watching beside them. They are shares in [0, 1] of this rank's batch:
    `ignored` and `foreground` of the pixels in the pseudo label of the final CAM, `selected` of the (token, valid
    class) pairs. A label that is nearly all ignored, or has hardly any foreground, teaches nothing.
    """

    total: Tensor
    cls: Tensor
    cls_inter: Tensor
    seg: Tensor
    seg_high: Tensor
    rect: Tensor
    aff: Tensor
    energy: Tensor
    ignored: Tensor
    foreground: Tensor
    selected: Tensor


class FFRLoss(nn.Module):
    r"""The objective of the method; owns the model, so that it is what DDP and ``torch.compile`` wrap.

    .. math:: L = L_\text{cls} + L_\text{cls\_inter} + w_\text{seg} (L_{s1} + \lambda_h L_{s2})
                  + \lambda_l L_r + w_\text{aff} L_\text{aff} + w_\text{reg} L_\text{reg}

    A term with weight 0, or before its start, is not computed.

    Before `start` the segmentation head has no gradient: DDP needs ``find_unused_parameters=True``.

    To compile the whole objective, ``torch.compile(objective)``, pass the same `step` throughout a phase, such as
    ``step=start if step >= start else 0``: then there is one graph for each phase. A `step` that grows costs one graph
    more, and with ``dynamic=False`` one graph at every step.

    Args:
        model: the network.
        start: step from which the segmentation losses, L_r and the dense energy count.
        affinity_start: step from which the affinity loss counts.
        ignore_index: label of undecided pixels in the pseudo labels. It must be none of 0..K, so with 255 classes or
            more pass another one.
        high, low: thresholds of the pseudo labels of both heads, see `ffr.refine.refine_label`.
        affinity_high, affinity_low: thresholds of the affinity label, see `ffr.cam.cam_to_label`.
        scales, flip: of the CAM from which the pseudo labels are made, see `ffr.cam.multi_scale_cam`.
        w_seg, lambda_h, lambda_l, w_aff, w_reg: weights, each >= 0.
        prototypes, rectification, segmentation, affinity, energy, refinement: a module in place of the default one.
        all_reduce: sums a detached count over ranks, for an objective that does not depend on their number.
        world_size: number of ranks that `all_reduce` sums over.

    Raises:
        ValueError: if a weight or a threshold is out of range, or `world_size` comes without `all_reduce`.
        TypeError: if `model` is no `ffr.framework.FFR`, such as one that is wrapped already.

    Example:
        >>> import torch
        >>> from ffr import FFR, FFRLoss
        >>> from ffr.encoder import Features
        >>> class Tiny(torch.nn.Conv2d):
        ...     embed_dim, patch_size = 8, 16
        ...     def forward(self, images):
        ...         x = super().forward(images)
        ...         return Features(final=x, intermediate=x)
        >>> model = FFR(Tiny(3, 8, 16, stride=16), num_classes=5, hidden=16)
        >>> objective = FFRLoss(model, start=100)
        >>> terms = objective(torch.rand(2, 3, 64, 64), torch.ones(2, 5), step=0)
        >>> terms.total.backward()
        >>> terms.seg  # not before step 100
        tensor(0.)

    Reference: FFR (CVPR 2025), supplementary; w_seg, w_aff, w_reg and the schedule from its lineage (ToCo, CVPR 2023).
    """

    def __init__(
        self,
        model: FFR,
        *,
        start: int = 2000,
        affinity_start: int = 0,
        high: float = 0.7,
        low: float = 0.25,
        affinity_high: float = 0.7,
        affinity_low: float = 0.25,
        scales: Sequence[float] = (1.0, 0.5, 1.5),
        flip: bool = True,
        w_seg: float = 0.1,
        lambda_h: float = 2.0,
        lambda_l: float = 1.0,
        w_aff: float = 0.2,
        w_reg: float = 0.05,
        prototypes: nn.Module | None = None,
        rectification: nn.Module | None = None,
        segmentation: nn.Module | None = None,
        affinity: nn.Module | None = None,
        energy: nn.Module | None = None,
        refinement: nn.Module | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        owner = "FFRLoss"
        if not all(hasattr(model, name) for name in ("num_classes", "encode", "cams", "head")):
            raise TypeError(
                f"{owner}: expected `model` to be an ffr.FFR, got {type(model).__name__}. Wrap the objective, not the "
                "model, with what wraps modules, such as DistributedDataParallel."
            )
        _check.label_names(owner, num_classes=model.num_classes, ignore_index=ignore_index)
        _check.within(owner, start=start, affinity_start=affinity_start)
        _check.within(owner, w_seg=w_seg, lambda_h=lambda_h, lambda_l=lambda_l, w_aff=w_aff, w_reg=w_reg)
        _check.within(owner, high=high, affinity_high=affinity_high, at_most=1.0)
        _check.within(owner, low=low, at_most=high)
        _check.within(owner, affinity_low=affinity_low, at_most=affinity_high)
        _check.ranks(owner, all_reduce, world_size)
        _check.factors(owner, scales)
        self.model = model
        self.start, self.affinity_start = start, affinity_start
        self.high, self.low = high, low
        self.affinity_high, self.affinity_low = affinity_high, affinity_low
        self.scales, self.flip = tuple(scales), flip
        self.w_seg, self.lambda_h, self.lambda_l, self.w_aff, self.w_reg = w_seg, lambda_h, lambda_l, w_aff, w_reg
        self.ignore_index = ignore_index
        self.prototypes = ClassPrototypes() if prototypes is None else prototypes
        self.rectification = RectificationLoss() if rectification is None else rectification
        self.segmentation = SegmentationLoss(ignore_index) if segmentation is None else segmentation
        self.affinity = AffinityLoss(ignore_index) if affinity is None else affinity
        self.energy = DenseEnergyLoss(ignore_index=ignore_index) if energy is None else energy
        self.refinement = PixelAdaptiveRefinement() if refinement is None else refinement
        for name in ("segmentation", "affinity", "energy"):
            theirs = getattr(getattr(self, name), "ignore_index", ignore_index)
            if theirs != ignore_index:
                raise ValueError(
                    f"{owner}: expected `{name}` with the `ignore_index` of this objective, {ignore_index}, got "
                    f"{theirs}. Give both the same."
                )
        self.all_reduce, self.world_size = all_reduce, world_size

    def forward(self, images: Tensor, labels: Tensor, *, step: int, max_present: int | None = None) -> Terms:
        """Forward of one batch.

        Args:
            images: ``(B, 3, H, W)``, RGB, uint8 or float in [0, 1], augmented but not normalised.
            labels: multi-hot ``(B, K)``, any dtype, present means > 0.5.
            step: iterations done so far.
            max_present: an upper bound of the classes present in one image, known on the host, for instance
                ``int((labels > 0.5).sum(1).max())`` of labels still on the CPU; absent classes then cost little.

        Returns:
            ``Terms``; scalars, float32 or float64.
        """
        model, classes = self.model, self.model.num_classes
        sizes = _check.bind("FFRLoss", sizes={"K": classes}, images=(images, "B 3 H W"), labels=(labels, "B K"))
        size = (sizes["H"], sizes["W"])
        started = step >= self.start
        seg_on = started and self.w_seg > 0
        high_on = seg_on and self.lambda_h > 0
        energy_on = started and self.w_reg > 0
        heads_on = seg_on or energy_on
        rect_on = started and self.lambda_l > 0
        aff_on = step >= self.affinity_start and self.w_aff > 0
        final, intermediate, mask = model.encode(images)
        if heads_on or aff_on:
            # The encoder has just seen the images at scale 1. Detached features, and not `no_grad`, for then autocast
            # would keep casts of the classifiers' weights without a graph.
            features = Features(final.detach(), intermediate.detach(), mask)
            cam, cam_inter = multi_scale_cam(
                model.cams,
                images,
                scales=self.scales,
                flip=self.flip,
                labels=labels,
                max_present=max_present,
                raw=model.cams(images, features=features),
            )
        exact = torch.promote_types(final.dtype, torch.float32)
        target = (labels > 0.5).to(exact)
        logits = model.classifier(final, mask=mask)
        cls = _classification(logits.to(exact), target)
        logits = model.intermediate_classifier(intermediate, mask=mask)
        cls_inter = _classification(logits.to(exact), target)
        seg = seg_high = rect = aff = energy = ignored = foreground = selected = cls.new_zeros(())
        reduce = {"all_reduce": self.all_reduce, "world_size": self.world_size}

        if rect_on or high_on:
            low, high = model.frequency(final)
        if heads_on:
            pseudo = refine_label(
                images,
                (cam, cam_inter) if high_on else (cam,),
                labels,
                high=self.high,
                low=self.low,
                refinement=self.refinement,
                max_present=max_present,
                ignore_index=self.ignore_index,
            )
            real = None
            if mask is not None:  # padding is undecided, and no region of interest of the energy
                patch = model.encoder.patch_size
                real = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, : size[0], : size[1]]
                pseudo = tuple(torch.where(real, label, self.ignore_index) for label in pseudo)
            unsure = pseudo[0] == self.ignore_index
            ignored, foreground = (
                chosen.sum(dtype=exact) / max(1, chosen.numel()) for chosen in (unsure, (pseudo[0] > 0) & ~unsure)
            )
            full = self._full(model.head(final), size)
            if seg_on:
                seg = self.segmentation(full, pseudo[0], **reduce)
            if high_on:
                seg_high = self.segmentation(self._full(model.head.high(high), size), pseudo[1], **reduce)
            if energy_on:
                region = {} if real is None else {"roi": real}
                energy = self.energy(full, pseudo[0], images=images, **region)
        if rect_on:
            seeds = normalize_cam(model.classifier.cam(final.detach()).to(exact), labels=labels, mask=mask)
            vectors, valid = self.prototypes(final, seeds, labels, mask=mask, max_present=max_present)
            parts = {"features": final, "low": low, "prototypes": vectors, "valid": valid, "mask": mask}
            if isinstance(self.rectification, RectificationLoss) and self.rectification.gap is not None:
                parts["selected"] = self.rectification.select(**parts, max_present=max_present)
                tokens = final.shape[2] * final.shape[3] if mask is None else mask.flatten(1).sum(1)
                selected = parts["selected"].sum() / (valid.sum(1) * tokens).sum().clamp(min=1)
            rect = self.rectification(**parts, **reduce).to(exact)
        if aff_on:
            grid = (final.shape[2], final.shape[3])
            small = whole_patches(cam_inter, grid, model.encoder.patch_size)
            small = F.interpolate(small, size=grid, mode="bilinear", align_corners=False)
            grid_label = cam_to_label(
                small, high=self.affinity_high, low=self.affinity_low, ignore_index=self.ignore_index
            )
            aff = self.affinity(final, grid_label, mask=mask, **reduce).to(exact)

        segmentation = self.w_seg * (seg + self.lambda_h * seg_high)
        total = cls + cls_inter + segmentation + self.lambda_l * rect + self.w_aff * aff + self.w_reg * energy
        shown = (cls, cls_inter, seg, seg_high, rect, aff, energy, ignored, foreground, selected)
        return Terms(total, *(term.detach().to(exact) for term in shown))

    def _full(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return to_image(logits, size, self.model.encoder.patch_size)


def _classification(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the images; 0, with its graph, for none."""
    return F.multilabel_soft_margin_loss(logits, target, reduction="none").sum() / max(1, len(logits))
