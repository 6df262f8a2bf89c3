"""From CAM and image to a pseudo label: pixel-adaptive refinement."""

import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ffr import _check
from ffr.cam import Maps, present_classes, take_classes, to_float

RING = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


class PixelAdaptiveRefinement(nn.Module):
    r"""Spread scores to neighbours of similar colour (PAR); no parameters, no buffers.

    .. math:: w_{ij} = \operatorname*{softmax}_j k^\text{rgb}_{ij} + 0.01 \operatorname*{softmax}_j k^\text{pos}_{ij},
              \qquad k^\text{rgb}_{ij} = -\operatorname*{mean}_\text{rgb} \Big(\frac{|I_j - I_i|}{0.3\, s_i}\Big)^2

    over the 8 neighbours j at every dilation, edges replicated; :math:`s_i` is the unbiased standard deviation of a
    channel over those neighbours, :math:`k^\text{pos}` the same on distances. The weights sum to 1.01, so scores
    grow by that factor each iteration and their order does not care. Gradients flow through the scores alone.

    On a CUDA GPU of compute capability 8.0 or more, with Triton, scores that need no gradient go through a fused
    kernel, unless they are float64, or `torch.compile` or a transform such as vmap is at work.

    Args:
        dilations: distances of the neighbours in pixels, each >= 1.
        iterations: how often scores are spread, >= 0.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from ffr import PixelAdaptiveRefinement
        >>> refine = PixelAdaptiveRefinement(dilations=(1, 2), iterations=3)
        >>> refine(torch.rand(2, 3, 32, 48), torch.rand(2, 5, 32, 48)).shape
        torch.Size([2, 5, 32, 48])

    Reference: the lineage's refinement (ToCo, CVPR 2023), after Araslanov and Roth (CVPR 2020).
    """

    def __init__(self, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), iterations: int = 10) -> None:
        super().__init__()
        owner = "PixelAdaptiveRefinement"
        if not dilations:
            raise ValueError(f"{owner}: expected `dilations` with at least one distance, got {dilations!r}.")
        for dilation in dilations:
            _check.within(owner, at_least=1, whole=True, dilations=dilation)
        _check.within(owner, whole=True, iterations=iterations)
        self.dilations, self.iterations = tuple(dilations), iterations
        self._near = _position_weights(dilations)

    def forward(self, images: Tensor, scores: Tensor) -> Tensor:
        """Refine the scores.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].
            scores: ``(B, C, H, W)``, any channels.

        Returns:
            ``(B, C, H, W)`` in the dtype of `scores`.
        """
        owner = "PixelAdaptiveRefinement"
        sizes = _check.bind(owner, images=(images, "B 3 H W"))
        remedy = ""
        if isinstance(scores, Tensor) and scores.shape[2:] != images.shape[2:]:
            remedy = "Resize the scores to the images first; the lineage's module does it with align_corners=True"
        _check.bind(owner, sizes=sizes, remedy=remedy, scores=(scores, "B C H W"))
        _check.pixels(owner, images=images)
        _check.floating(owner, scores=scores)
        with _check.no_autocast(scores):
            if _fused(images, scores):
                from ffr import _refine_kernel

                steps = [(d * dy, d * dx) for d in self.dilations for dy, dx in RING]
                pixels = to_float(images).float()
                return _refine_kernel.refine(pixels, scores.float(), steps, self._near, self.iterations).to(
                    scores.dtype
                )
            weights = self._weights(images)
            # As channels_last it would meet its contiguous neighbours across the memory, three times slower.
            refined: Tensor = scores.to(torch.promote_types(scores.dtype, weights[0].dtype)).contiguous()
            for _ in range(self.iterations):
                refined = self._spread(refined, weights)
            result: Tensor = refined.to(scores.dtype)
            return result

    def affinity(self, images: Tensor) -> Tensor:
        """Weights of the neighbours, ``(B, 8 * len(dilations), H, W)``, at least float32; they sum to 1.01."""
        owner = "PixelAdaptiveRefinement.affinity"
        _check.bind(owner, images=(images, "B 3 H W"))
        _check.pixels(owner, images=images)
        return torch.cat(self._weights(images), 1)

    def _weights(self, images: Tensor) -> list[Tensor]:
        """One plane (B, 1, H, W) a neighbour: nothing 48 times the size of an image is ever copied."""
        pixels = to_float(images.detach()).contiguous()
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        neighbours = self._shifts(pixels)
        mean = torch.zeros_like(pixels)
        for neighbour in neighbours:
            mean += neighbour
        mean /= len(neighbours)
        variance = torch.zeros_like(pixels)
        for neighbour in neighbours:
            variance.addcmul_(neighbour - mean, neighbour - mean)
        # The floor keeps a flat patch around an odd pixel finite: all its neighbours then weigh the same.
        scale = 1 / (0.3 * ((variance / (len(neighbours) - 1)).sqrt() + 1e-8))
        weights = [((n - pixels) * scale).square().mean(1, keepdim=True).neg_() for n in neighbours]
        best = weights[0]
        for alike in weights[1:]:
            best = torch.maximum(best, alike)
        total = torch.zeros_like(best)
        for alike in weights:
            total += alike.sub_(best).exp_()
        for alike, constant in zip(weights, self._near, strict=True):
            alike.div_(total).add_(constant)
        return weights

    def extra_repr(self) -> str:
        """The settings."""
        return f"dilations={self.dilations}, iterations={self.iterations}"

    def _shifts(self, maps: Tensor) -> list[Tensor]:
        """Views of the neighbours: padded once, never gathered into (B, C, 48, H, W)."""
        reach = max(self.dilations)
        padded = F.pad(maps, [reach] * 4, mode="replicate").contiguous()
        # Strided views of one new buffer, not slices: a compiler would otherwise compute the padding 48 times over.
        row = padded.shape[3]
        return [
            padded.as_strided(maps.shape, padded.stride(), (reach + d * dy) * row + reach + d * dx)
            for d in self.dilations
            for dy, dx in RING
        ]

    def _spread(self, scores: Tensor, weights: list[Tensor]) -> Tensor:
        total = torch.zeros_like(scores)
        for weight, neighbour in zip(weights, self._shifts(scores), strict=True):
            total.addcmul_(weight, neighbour)
        return total


def _fused(images: Tensor, scores: Tensor) -> bool:
    """Whether the kernel can run on these."""
    return (
        type(scores) is Tensor
        and scores.is_cuda
        and torch.float64 not in (images.dtype, scores.dtype)
        and not (torch.is_grad_enabled() and scores.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # a kernel knows neither vmap nor jvp
        and forward_ad._current_level < 0
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(scores.device) >= (8, 0)
    )


def _position_weights(dilations: Sequence[int]) -> tuple[float, ...]:
    """0.01 softmax(k_pos) of the neighbours; the same for every pixel and image."""
    distances = [d * math.hypot(dy, dx) for d in dilations for dy, dx in RING]
    scale = 0.3 * statistics.stdev(distances)
    alike = [math.exp(-((distance / scale) ** 2)) for distance in distances]
    return tuple(0.01 * one / math.fsum(alike) for one in alike)


def refine_label(
    images: Tensor,
    cam: Maps,
    labels: Tensor,
    *,
    high: float = 0.7,
    low: float = 0.25,
    refinement: nn.Module | None = None,
    downscale: int = 2,
    max_present: int | None = None,
    ignore_index: int = 255,
) -> Maps:
    """Pseudo label of an image from its CAM, by two stacks of scores.

    Background scores `high` in the one and `low` in the other; softmax over background and the present classes,
    refinement at a reduced size, up-sampling, argmax. A pixel is foreground where the `high` stack says so,
    background only where both say so, and `ignore_index` elsewhere.

    Args:
        images: ``(B, 3, H, W)``, uint8 or float in [0, 1].
        cam: ``(B, K, ., .)`` of any size, in [0, 1]; or a tuple of them, refined together for little more.
        labels: multi-hot ``(B, K)``. An image without labels is background.
        high: background score that foreground must beat, in [0, 1].
        low: background score that background must beat, in [0, `high`].
        refinement: called as ``refinement(images, scores)``, such as `PixelAdaptiveRefinement`; None refines nothing.
        downscale: the refinement works at ``H // downscale``.
        max_present: an upper bound of the classes present in one image, known on the host, such as
            ``int(labels.sum(1).max())`` of labels on the CPU. Absent classes then cost nothing; without it every one
            of the K is refined.
        ignore_index: label of the undecided pixels.

    Returns:
        int64 ``(B, H, W)`` in {0..K, ignore_index}, without gradient; a tuple for a tuple.

    Raises:
        ValueError: if a shape does not fit or a threshold is out of range.

    Example:
        >>> import torch
        >>> from ffr.refine import PixelAdaptiveRefinement, refine_label
        >>> image, cam = torch.rand(1, 3, 64, 64), torch.rand(1, 20, 4, 4)
        >>> par = PixelAdaptiveRefinement(dilations=(1, 2))
        >>> refine_label(image, cam, torch.ones(1, 20), refinement=par).shape
        torch.Size([1, 64, 64])

    Reference: the lineage's pseudo label (ToCo, CVPR 2023).
    """
    owner = "refine_label"
    cams = (cam,) if isinstance(cam, Tensor) else cam
    if not cams:
        raise ValueError(f"{owner}: expected `cam` to be a tensor, or a tuple of at least one, got {cam!r}.")
    sizes = _check.bind(owner, images=(images, "B 3 H W"))
    sizes = _check.bind(owner, sizes=sizes, cam=(cams[0], "B K h w"), labels=(labels, "B K"))
    _check.pixels(owner, images=images)
    _check.within(owner, high=high, at_most=1.0)
    _check.within(owner, low=low, at_most=high)
    _check.within(owner, whole=True, downscale=downscale, at_least=1)
    _check.label_names(owner, num_classes=sizes["K"], ignore_index=ignore_index)
    height, width = sizes["H"], sizes["W"]
    small = (max(1, height // downscale), max(1, width // downscale))
    with torch.no_grad(), _check.no_autocast(images):
        ids, present = present_classes(labels, max_present)
        stacks = []
        for one in cams:
            _check.bind(owner, sizes={"B": sizes["B"], "K": sizes["K"]}, cam=(one, "B K h w"))
            _check.floating(owner, cam=one)
            scores = take_classes(one, ids).float()
            scores = F.interpolate(scores, size=small, mode="bilinear", align_corners=False)
            scores = scores.masked_fill(~present[:, :, None, None], -torch.inf)
            for threshold in (high, low):
                stacks.append(torch.cat([torch.full_like(scores[:, :1], threshold), scores], 1).softmax(1))
        merged = torch.cat(stacks, 1)
        if refinement is not None:
            pixels = to_float(images)
            if small != (height, width):
                pixels = F.interpolate(pixels, size=small, mode="bilinear", align_corners=False)
            merged = refinement(pixels, merged)
        names = F.pad(ids + 1, (1, 0))  # channel -> label
        decided = []
        for stack in merged.chunk(len(stacks), 1):
            full = F.interpolate(stack, size=(height, width), mode="bilinear", align_corners=False)
            best = full.max(1).indices  # argmax over a strided axis takes 20 times as long on a CPU
            decided.append(names.gather(1, best.flatten(1)).reshape(-1, height, width))
        results = tuple(
            torch.where(sure > 0, sure, torch.where(maybe > 0, ignore_index, 0))
            for sure, maybe in zip(decided[::2], decided[1::2], strict=True)
        )
    return results[0] if isinstance(cam, Tensor) else results
