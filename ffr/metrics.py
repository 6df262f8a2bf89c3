"""Scores over a whole data set: confusion matrix and mIoU, threshold sweep of CAMs, boundary IoU, average precision.

The three classes count into one integer tensor, `counts`, on the device of the labels, and read it back only when a
score is asked for. So a value that is no label (137 of 21 labels) or no score (NaN) is set apart by `update`, and
every score after it raises a ValueError that says how many there were.

Over several ranks, sum that tensor: ``score.counts = accelerator.reduce(score.counts.to(accelerator.device))``.
"""

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ffr import _check

Self = TypeVar("Self", bound="_Counts")
_DEFAULT = tuple(i / 100 for i in range(100))


class _Counts:
    """Settings and one flat int64 tensor of counts; its last two bins are misfits and ignored pixels."""

    def __init__(self, num_labels: int, ignore_index: int, bins: int) -> None:
        owner = type(self).__name__
        _check.within(owner, at_least=2, num_labels=num_labels, remedy="Count the background too")
        if 0 <= ignore_index < num_labels:
            raise ValueError(f"{owner}: expected `ignore_index` outside 0..{num_labels - 1}, got {ignore_index}.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.counts = torch.zeros(bins + 2, dtype=torch.int64, device="cpu")  # whatever the default device

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts = torch.zeros_like(self.counts)

    def merge(self: Self, other: Self) -> Self:
        """Add the counts of another one with the same settings to this one, and return this one."""
        if self._settings() != other._settings():  # no two kinds have the same
            raise ValueError(f"{type(self).__name__}.merge: expected the same settings, got {other!r} for {self!r}.")
        self.counts = self.counts + other.counts.to(self.counts.device)
        return self

    def __add__(self: Self, other: Self) -> Self:
        return copy.deepcopy(self).merge(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"

    def _settings(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    def _add(self, target: Tensor, cell: Tensor, fits: Tensor) -> None:
        """Count one per pixel at ``[target, cell]``; where `fits` is false, or the target is no label, a misfit."""
        misfits, ignored = len(self.counts) - 2, len(self.counts) - 1
        fits = fits & (target >= 0) & (target < self.num_labels)
        index = torch.where(fits, target * (misfits // self.num_labels) + cell, misfits)
        index = torch.where(target == self.ignore_index, ignored, index).flatten()
        # Not bincount, which reads its maximum back to the host; not in place, so that inference tensors do no harm.
        self.counts = self.counts.to(index.device).scatter_add(0, index, index.new_ones(1).expand_as(index))

    def _table(self, also: str = "") -> Tensor:
        """Counts on the host, ``(num_labels, bins per label)``."""
        counts = self.counts.cpu()
        if misfits := int(counts[-2]):
            raise ValueError(
                f"{type(self).__name__}: expected labels in 0..{self.num_labels - 1} or {self.ignore_index}{also}, got "
                f"{misfits} pixels outside. Remap the labels, or correct `num_labels`; then `reset` and update again."
            )
        return counts[:-2].view(self.num_labels, -1)


class ConfusionMatrix(_Counts):
    r"""Confusion matrix of label maps over a data set, and its scores.

    .. math:: \text{IoU}_c = \frac{TP_c}{TP_c + FP_c + FN_c}

    A pixel whose truth is `ignore_index` does not count. A prediction of `ignore_index` on a labelled pixel is a miss
    of the true class (FN), and no other class's false alarm.

    Args:
        num_labels: K + 1, background included.
        ignore_index: outside 0..K.

    Example:
        >>> import torch
        >>> from ffr.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(num_labels=3)
        >>> matrix.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]))
        >>> matrix.iou(), matrix.miou()  # class 2 is absent from the truth
        (tensor([0.5000, 0.5000,    nan], dtype=torch.float64), 0.5)

    Reference: the PASCAL VOC segmentation measure, with absent classes excluded.
    """

    def __init__(self, num_labels: int = 21, ignore_index: int = 255) -> None:
        super().__init__(num_labels, ignore_index, num_labels * (num_labels + 1))  # last column: predicted ignore

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch, or one image, without host synchronisation.

        Args:
            prediction: integers in 0..K or `ignore_index`, ``(B, H, W)`` or ``(H, W)``.
            target: the truth, as `prediction`, on its device.

        Raises:
            TypeError: if a dtype is not integer.
            ValueError: if the shapes differ.
        """
        guess, truth = _pair("ConfusionMatrix", prediction, target)
        known = (guess >= 0) & (guess < self.num_labels)
        ignored = guess == self.ignore_index
        self._add(truth, torch.where(ignored, self.num_labels, guess), known | ignored)

    @property
    def matrix(self) -> Tensor:
        """Pixels, int64 ``(num_labels, num_labels)``; rows truth, columns prediction; predicted ignore left out."""
        return self.counts[:-2].view(self.num_labels, -1)[:, :-1]

    def iou(self) -> Tensor:
        """IoU of each class: float64 ``(num_labels,)`` in [0, 1] on the CPU, NaN if absent from the truth."""
        return _iou(self._table())

    def miou(self) -> float:
        """Mean IoU over the classes present in the truth, background counted; NaN if nothing was counted."""
        return float(self.iou().nanmean())

    def accuracy(self) -> float:
        """Share of the labelled pixels that are right; NaN if nothing was counted."""
        table = self._table()
        return float(table.diagonal().sum() / table.sum())


class ThresholdSweep(_Counts):
    """The mIoU of CAMs at every background threshold, exactly, from one pass over the data.

    At a threshold t the label is that of ``cam_to_label(cam, background=t)``: the class of the highest score where
    that score is above t, else background. One histogram over (truth, that class, between which thresholds its score
    lies) is enough for all of them.

    A threshold chosen on ground truth is a fitted parameter: choose it on validation images, never on test images.

    Args:
        num_labels: K + 1, background included.
        thresholds: in [0, 1], rising; 0, 0.01 to 0.99 by default.
        ignore_index: outside 0..K.

    Example:
        >>> import torch
        >>> from ffr.metrics import ThresholdSweep
        >>> sweep = ThresholdSweep(num_labels=2, thresholds=(0.1, 0.5, 0.8))
        >>> sweep.update(torch.tensor([[[[0.2, 0.3, 0.7]]]]), torch.tensor([[[0, 0, 1]]]))
        >>> sweep.best()
        (0.5, 1.0)
    """

    def __init__(
        self, num_labels: int = 21, thresholds: Sequence[float] | None = None, ignore_index: int = 255
    ) -> None:
        self.thresholds = tuple(float(t) for t in (_DEFAULT if thresholds is None else thresholds))
        rising = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        if not self.thresholds or not rising or not 0 <= self.thresholds[0] <= self.thresholds[-1] <= 1:
            raise ValueError(f"ThresholdSweep: expected `thresholds` in [0, 1] and rising, got {self.thresholds}.")
        super().__init__(num_labels, ignore_index, num_labels * (num_labels - 1) * (len(self.thresholds) + 1))
        self._edges = torch.tensor(self.thresholds, device="cpu")  # then as the last CAM: each copy would wait

    def update(self, cam: Tensor, target: Tensor) -> None:
        """Count one batch without host synchronisation.

        Args:
            cam: ``(B, K, H, W)`` in [0, 1], zero for absent classes, as from ``ffr.cam.multi_scale_cam``.
            target: the truth, integers in 0..K or `ignore_index`, ``(B, H, W)``.

        Raises:
            TypeError: if `cam` is not floating or `target` not integer.
            ValueError: if a shape does not fit.
        """
        owner = "ThresholdSweep"
        sizes = {"K": self.num_labels - 1}
        remedy = "Up-sample the CAM to the size of the label map"
        _check.bind(owner, sizes=sizes, remedy=remedy, cam=(cam, "B K H W"), target=(target, "B H W"))
        _check.floating(owner, cam=cam)
        _check.integer(owner, target=target)
        if (self._edges.dtype, self._edges.device) != (cam.dtype, cam.device):
            self._edges = torch.tensor(self.thresholds, dtype=cam.dtype, device=cam.device)
        score, index = cam.max(1)  # (B, H, W); the first of equals, as in cam_to_label
        # How many thresholds lie below the score, in the precision of the CAM, as a comparison with it would have it.
        passed = torch.bucketize(score, self._edges)
        fits = (score >= 0) & (score <= 1.001)  # resizing may overshoot by a rounding; NaN does not fit
        self._add(target.long(), index * (len(self.thresholds) + 1) + passed, fits)

    def confusion(self, index: int) -> ConfusionMatrix:
        """The confusion matrix at ``thresholds[index]``."""
        matrix = ConfusionMatrix(self.num_labels, self.ignore_index)
        columns = F.pad(self._matrices()[index], (0, 1))  # no predicted ignore
        matrix.counts = torch.cat([columns.flatten(), self.counts[-2:].cpu()])
        return matrix

    def miou(self) -> Tensor:
        """Mean IoU at each threshold, float64 ``(T,)`` in [0, 1] on the CPU; NaN if nothing was counted."""
        return _iou(self._matrices()).nanmean(-1)

    def best(self) -> tuple[float, float]:
        """The threshold of the highest mIoU (the lowest of equals), and that mIoU."""
        miou = self.miou()
        if bool(miou.isnan().any()):
            raise ValueError("ThresholdSweep: no labelled pixel was counted. Call `update` first.")
        index = int(miou.argmax())
        return self.thresholds[index], float(miou[index])

    def _matrices(self) -> Tensor:
        shape = (self.num_labels, self.num_labels - 1, len(self.thresholds) + 1)
        table = self._table(" and scores in [0, 1]").view(shape)  # (L, K, T + 1)
        above = table.flip(2).cumsum(2).flip(2)  # [..., i]: scores above the thresholds before i, all of them at i = 0
        foreground = above[..., 1:]  # (L, K, T)
        background = (above[..., :1] - foreground).sum(1, keepdim=True)
        return torch.cat([background, foreground], 1).movedim(2, 0)  # (T, L, L)


class BoundaryIoU(_Counts):
    r"""Boundary IoU per class over a data set: the IoU of the bands just inside the two outlines.

    .. math:: \text{BIoU}_c = \frac{\sum |G_d \cap P_d|}{\sum |G_d \cup P_d|}

    with :math:`M_d` the pixels of mask M at most d pixels (in rows and in columns: a square, Chebyshev distance) from
    its outside; beyond the image is outside. d is `dilation` times the image diagonal, rounded, at least 1.

    Pixels whose truth is `ignore_index` belong to no mask, on either side: what is predicted there makes no
    difference, and an ignored ring around an object is its outline. Background has no score.

    Args:
        num_labels: K + 1, background included.
        dilation: width of the band as a share of the image diagonal, in [0, 1].
        ignore_index: outside 0..K.

    Example:
        >>> import torch
        >>> from ffr.metrics import BoundaryIoU
        >>> truth, shifted = torch.zeros(2, 32, 32, dtype=torch.long)
        >>> truth[8:24, 8:24] = shifted[8:24, 9:25] = 1
        >>> score = BoundaryIoU(num_labels=2)
        >>> score.update(shifted, truth)
        >>> round(score.miou(), 3)  # 30 of 60 + 60 - 30 pixels on the outlines; IoU is 0.882
        0.333

    Reference: Cheng et al., Boundary IoU (CVPR 2021): definition, 2 % of the diagonal, 3 x 3 erosion repeated d times.
    Departure: there masks are those of instances; here those of classes, summed over the data set as for mIoU.
    """

    def __init__(self, num_labels: int = 21, dilation: float = 0.02, ignore_index: int = 255) -> None:
        super().__init__(num_labels, ignore_index, 3 * num_labels)  # per label: both, either, truth
        _check.within("BoundaryIoU", at_most=1.0, dilation=dilation)
        self.dilation = dilation

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch of whole images, or one image: as `ConfusionMatrix.update`.

        The size of the label maps sets the width of the band: do not pad them.
        """
        guess, truth = _pair("BoundaryIoU", prediction, target)
        radius = max(1, round(self.dilation * math.hypot(*target.shape[-2:])))
        counted = truth != self.ignore_index
        known = [((x >= 0) & (x < self.num_labels)) | (x == self.ignore_index) for x in (guess, truth)]
        guess = torch.where(counted, guess, self.ignore_index)
        mine, right = _rim(guess, radius), _rim(truth, radius)
        both = self._per_label(truth, mine & right & (guess == truth))
        truths = self._per_label(truth, right)
        sums = torch.stack([both, self._per_label(guess, mine) + truths - both, truths], 1)  # (num_labels, 3)
        rest = torch.stack([(counted & ~(known[0] & known[1])).sum(), (~counted).sum()])
        self.counts = self.counts.to(target.device) + torch.cat([sums.flatten(), rest])

    def _per_label(self, labels: Tensor, chosen: Tensor) -> Tensor:
        """How many of the chosen pixels have each label."""
        index = torch.where(chosen & (labels >= 0) & (labels < self.num_labels), labels, self.num_labels).flatten()
        sums = index.new_zeros(self.num_labels + 1)
        return sums.scatter_add(0, index, index.new_ones(1).expand_as(index))[:-1]

    def iou(self) -> Tensor:
        """Boundary IoU of each class: as `ConfusionMatrix.iou`, and NaN for background."""
        both, either, truth = self._table().double().unbind(1)
        foreground = torch.arange(self.num_labels, device=both.device) > 0
        return torch.where(foreground & (truth > 0), both / either, torch.nan)

    def miou(self) -> float:
        """Mean over the foreground classes present in the truth; NaN if there is none."""
        return float(self.iou().nanmean())


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    r"""Average precision of each class: the area under its precision-recall steps.

    .. math:: AP = \sum_n (R_n - R_{n-1}) P_n

    over the distinct scores in falling order; items of equal score enter together, so their order does not matter.
    No interpolation.

    Args:
        scores: ``(n, K)``, any floating dtype; only their order counts.
        labels: multi-hot ``(n, K)``, any dtype, positive means > 0.5.

    Returns:
        float64 ``(K,)`` in [0, 1] on the CPU, NaN for a class without positives.

    Raises:
        TypeError: if `scores` is not floating.
        ValueError: if the shapes differ or a score is NaN.

    Example:
        >>> import torch
        >>> from ffr.metrics import average_precision
        >>> average_precision(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1], [0], [1]]))
        tensor([0.8333], dtype=torch.float64)
    """
    owner = "average_precision"
    count = _check.bind(owner, scores=(scores, "n K"), labels=(labels, "n K"))["n"]
    _check.floating(owner, scores=scores)
    if bool(scores.isnan().any()):
        raise ValueError(f"{owner}: expected `scores` without NaN. Look for the step that made them.")
    ordered, order = scores.detach().cpu().sort(dim=0, descending=True)
    hits = (labels.cpu() > 0.5).gather(0, order).double()
    rank = torch.arange(1, count + 1, device="cpu")[:, None]  # whatever the default device
    # Within a group of equal scores, all items have the precision at its end: the next place where the score falls.
    falls = torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(ordered[:1], dtype=torch.bool)])
    ends = torch.where(falls, rank - 1, count).flip(0).cummin(0).values.flip(0)
    precision = (hits.cumsum(0) / rank).gather(0, ends)
    return (hits * precision).sum(0) / hits.sum(0)


def _iou(table: Tensor) -> Tensor:
    """IoU per class of ``(..., L, C)``, the first L of the C columns being those of the labels."""
    table = table.double()
    both = table.diagonal(dim1=-2, dim2=-1)
    truth = table.sum(-1)
    union = truth + table[..., : table.shape[-2]].sum(-2) - both
    return torch.where(truth > 0, both / union, torch.nan)


def _rim(labels: Tensor, radius: int) -> Tensor:
    """Pixels of label maps ``(B, H, W)`` within `radius` of another label; beyond the image is another."""
    low = high = F.pad(labels, (radius,) * 4, value=-1)
    for dim in (-2, -1):
        width = 1  # each round doubles the window of the minimum and the maximum, up to 2 radius + 1
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            size = low.shape[dim] - step
            low = torch.minimum(low.narrow(dim, 0, size), low.narrow(dim, step, size))
            high = torch.maximum(high.narrow(dim, 0, size), high.narrow(dim, step, size))
            width += step
    return low != high


def _pair(owner: str, prediction: Tensor, target: Tensor) -> list[Tensor]:
    """Both as int64 ``(B, H, W)``."""
    axes = "H W" if getattr(prediction, "ndim", 3) == 2 else "B H W"
    _check.bind(owner, prediction=(prediction, axes), target=(target, axes))
    _check.integer(owner, prediction=prediction, target=target)
    return [(x if x.ndim == 3 else x[None]).long() for x in (prediction, target)]  # uint8 would take -1 for 255
