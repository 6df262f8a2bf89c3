"""Class activation maps: from patch tokens to normalised maps and label maps."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ffr import _check

Maps = TypeVar("Maps", Tensor, tuple[Tensor, ...])


def tokens_to_map(tokens: Tensor, grid: tuple[int, int] | None = None, prefix: int = 0) -> Tensor:
    """Lay patch tokens out as a feature map.

    ``partial(tokens_to_map, grid=..., prefix=...)`` is the ``reshape_transform`` of the common Grad-CAM packages.

    Args:
        tokens: ``(B, P + N, D)``.
        grid: ``(h, w)`` with ``h * w = N``; left out, N must be a perfect square.
        prefix: P, the class, distillation and register tokens in front. Never guessed.

    Returns:
        ``(B, D, h, w)``, a view of `tokens`.

    Raises:
        ValueError: if the tokens after the prefix do not fill the grid.

    Example:
        >>> import torch
        >>> from ffr.cam import tokens_to_map
        >>> tokens_to_map(torch.zeros(2, 197, 768), prefix=1).shape
        torch.Size([2, 768, 14, 14])
    """
    owner = "tokens_to_map"
    sizes = _check.bind(owner, tokens=(tokens, "B T D"))
    total = sizes["T"]
    _check.within(owner, whole=True, prefix=prefix, at_most=total - 1)
    count = total - prefix
    if grid is None:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"{owner}: {count} tokens are not a square grid.{_square_hint(total, prefix)}")
        grid = (side, side)
    _check.pair(owner, grid=grid)
    if grid[0] * grid[1] != count:
        hint = _square_hint(total, prefix, grid[0] * grid[1])
        if sizes["B"] - prefix == grid[0] * grid[1]:
            hint = " The tokens lie first: bring them to (B, P + N, D) with .transpose(0, 1)."
        raise ValueError(
            f"{owner}: expected `grid` with h * w = {count} (tokens {tuple(tokens.shape)}, prefix {prefix}), "
            f"got {tuple(grid)} = {grid[0] * grid[1]}.{hint}"
        )
    return tokens[:, prefix:].transpose(1, 2).reshape(sizes["B"], sizes["D"], *grid)


def _square_hint(total: int, prefix: int, wanted: int | None = None) -> str:
    if wanted is not None:
        return f" Pass prefix={total - wanted}." if total > wanted else ""
    side = math.isqrt(total)
    if 0 < total - side * side <= 8:
        return f" {side * side} are {side} x {side}: pass prefix={total - side * side}, or pass grid=(h, w)."
    return " Pass grid=(h, w)."


def class_activation_map(features: Tensor, weight: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    r"""Raw class activation map :math:`A_k = W_k \cdot X` of every token.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        weight: classifier weight ``(K, D)`` or ``(K, D, 1, 1)``.
        grid: ``(h, w)``, for tokens.

    Returns:
        ``(B, K, h, w)``, unbounded, before ReLU.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from ffr.cam import class_activation_map
        >>> class_activation_map(torch.ones(1, 4, 7, 7), torch.ones(3, 4))[0, 0, 0, 0]
        tensor(4.)

    Reference: the lineage's CAM of a linear classifier (ToCo, CVPR 2023).
    """
    owner = "class_activation_map"
    (tokens,), sizes = _check.tokens(owner, grid=grid, features=features)
    if isinstance(weight, Tensor) and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    _check.bind(owner, sizes=sizes, weight=(weight, "K D"))
    _check.floating(owner, weight=weight)
    raw = F.linear(tokens, weight.to(tokens.dtype))  # (B, N, K)
    return raw.transpose(1, 2).reshape(sizes["B"], len(weight), sizes["h"], sizes["w"])


def normalize_cam(raw: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """ReLU, then min-max per image and class to [0, 1], then zero for classes that are not in the label.

    Args:
        raw: ``(B, K, h, w)``.
        labels: multi-hot ``(B, K)``, any dtype, present means > 0.5; left out, every class counts as present.
        mask: bool ``(B, h, w)``, False leaves a token out: it is neither minimum nor peak, and gets 0.

    Returns:
        ``(B, K, h, w)`` in [0, 1]. The peak of a map is exactly 1; a map that is flat after ReLU, to a millionth of
        its peak, gives zeros. A present class whose map holds NaN or +inf has NaN.

    Raises:
        ValueError: if `labels` has another shape than ``(B, K)``, or `mask` than ``(B, h, w)``.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.cam import normalize_cam
        >>> normalize_cam(torch.tensor([[[[-1.0, 1.0, 3.0]]]]))
        tensor([[[[0.0000, 0.3333, 1.0000]]]])
    """
    owner = "normalize_cam"
    sizes = _check.bind(owner, raw=(raw, "B K h w"))
    _check.floating(owner, raw=raw)
    cam = lowest = raw.relu()
    if mask is not None:
        _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
        _check.boolean(owner, mask=mask)
        out = ~mask[:, None]
        cam, lowest = cam.masked_fill(out, 0), cam.masked_fill(out, torch.inf)
    low, peak = lowest.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    span = peak - low
    # Up-sampling a flat map leaves a few units of rounding, which must not be stretched to a CAM.
    keep = varied = ~((span <= 1e-6 * peak) & (peak < torch.inf))  # put so that what is not finite stays visible
    if labels is not None:
        _check.bind(owner, sizes=sizes, labels=(labels, "B K"))
        keep = varied & (labels > 0.5)[:, :, None, None]
    if mask is not None:
        keep = keep & mask[:, None]
    # No epsilon: it would lower the peak of a faint map below 1. Both `where` keep the gradient of a flat map finite.
    return torch.where(keep, (cam - low) / torch.where(varied, span, 1), 0)


def multi_scale_cam(
    fn: Callable[[Tensor], Maps],
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    labels: Tensor | None = None,
    max_present: int | None = None,
    raw: Maps | None = None,
) -> Maps:
    """The lineage's multi-scale, flipped CAM.

    Per scale: raw maps up-sampled to ``(H, W)``, un-flipped, maximum over the flip pair, ReLU. Summed over scales,
    then `normalize_cam`. Runs without gradient and leaves train or eval mode as it finds it. Maps are up-sampled and
    summed in float32 at least, also under autocast: steps of bfloat16 are 0.4 % of a score.

    Args:
        fn: x ``(b, 3, h, w)`` -> raw maps ``(b, K, ., .)``, or a tuple of such maps. It sees an image and its
            mirror in one batch, at every scale. Maps are taken to cover the image: where an encoder pads it to whole
            patches, return ``to_image(maps, x.shape[2:], p)``. Maps that need a gradient themselves, such as
            Grad-CAM, are computed ``with torch.enable_grad():``.
        images: ``(B, 3, H, W)``, uint8 or float in [0, 1].
        scales: factors of the image side, each > 0; see `scaled_size`.
        flip: also look at the mirrored image.
        labels: multi-hot ``(B, K)``; left out, every class counts as present.
        max_present: an upper bound of the classes present in one image, known on the host. Maps of absent
            classes are then never up-sampled.
        raw: what `fn` gives for the images as they are, where it is at hand: a training step has it from its forward
            pass. At scale 1 `fn` then sees the mirror image alone, or nothing.

    Returns:
        ``(B, K, H, W)`` in [0, 1], or a tuple of them, in the form that `fn` returns; in the wider of the precisions
        of `images` (uint8 is float32) and the maps.

    Raises:
        ValueError: if a shape or a scale does not fit, or `max_present` is given without `labels`.
        TypeError: if `fn` gives neither a tensor nor a tuple of tensors, or `images` have another dtype.

    Example:
        >>> import torch
        >>> from ffr.cam import multi_scale_cam
        >>> fn = lambda x: torch.nn.functional.avg_pool2d(x, 8)
        >>> multi_scale_cam(fn, torch.rand(2, 3, 32, 48)).shape
        torch.Size([2, 3, 32, 48])
    """
    owner = "multi_scale_cam"
    sizes = _check.bind(owner, images=(images, "B 3 H W"))
    _check.factors(owner, scales)
    _check.pixels(owner, images=images)
    if max_present is not None and labels is None:
        raise ValueError(f"{owner}: `max_present` needs `labels`. Pass labels of shape (B, K).")
    height, width, batch = sizes["H"], sizes["W"], sizes["B"]
    classes = {}
    if labels is not None:
        classes["K"] = _check.bind(owner, sizes=sizes, labels=(labels, "B K"))["K"]
    for maps in () if raw is None else _each(raw)[1]:
        _check.bind(owner, sizes={"B": batch, **classes}, raw=(maps, "B K h w"))
    single = False
    totals: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    kind = images.device.type
    # Without autocast's cache: it would keep casts of the weights without a graph, and the training forward that
    # follows would use them (up to torch 2.5 at least) and train nothing.
    cast: AbstractContextManager[object] = nullcontext()
    if not images.is_meta:  # for which torch knows no autocast
        cast = torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
    with torch.no_grad(), cast:
        pixels = to_float(images.detach())  # here and below for forward mode, which `no_grad` does not stop
        ids = None
        if labels is not None and max_present is not None:
            ids, _ = present_classes(labels, max_present)
        for scale in scales:
            size = scaled_size((height, width), scale)
            scaled = pixels
            if size != (height, width):
                scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
            if raw is None or size != (height, width):
                single, found = _each(fn(torch.cat([scaled, scaled.flip(3)]) if flip else scaled))
            else:
                single, found = _each(raw)
                if flip:
                    mirrored = _each(fn(scaled.flip(3)))
                    mine, theirs = ([tuple(maps.shape) for maps in each] for each in (found, mirrored[1]))
                    if (single, mine) != (mirrored[0], theirs):
                        raise ValueError(f"{owner}: expected `raw` in the form of `fn`, maps of {theirs}, got {mine}.")
                    found = tuple(map(torch.cat, zip(found, mirrored[1], strict=True)))
            for index, maps in enumerate(found):
                expected = {"B": 2 * batch if flip else batch, **classes}
                _check.bind(f"{owner}: result of `fn`", sizes=expected, maps=(maps, "B K h w"))
                if ids is not None:
                    maps = take_classes(maps, torch.cat([ids, ids]) if flip else ids)
                if index == len(totals):
                    dtypes.append(torch.promote_types(maps.dtype, pixels.dtype))
                maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
                maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
                if flip:
                    maps = torch.maximum(maps[:batch], maps[batch:].flip(3))
                if index == len(totals):
                    totals.append(maps.relu())
                else:
                    totals[index] += maps.relu()
        cams = tuple(_finish(total, labels, ids).to(kept) for total, kept in zip(totals, dtypes, strict=True))
    return cams[0] if single else cams  # type: ignore[return-value]


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at a scale, rounded down as in the lineage, at least 1."""
    height, width = (max(1, int(side * scale + 1e-6)) for side in size)  # 0.29 * 100 is just below 29
    return height, width


def whole_patches(maps: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Maps of an image, ``(B, C, H, W)``, with their border repeated up to what the token grid covers."""
    extra = (0, grid[1] * patch_size - maps.shape[3], 0, grid[0] * patch_size - maps.shape[2])
    return F.pad(maps, extra, mode="replicate") if any(extra) else maps


def _each(maps: Maps) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether it is one tensor, and the tensors."""
    if not isinstance(maps, (Tensor, tuple, list)):
        raise TypeError(
            f"multi_scale_cam: expected maps of shape (B, K, h, w), or a tuple of them, from `fn`, got "
            f"{type(maps).__name__}. Return the raw CAM."
        )
    return (True, (maps,)) if isinstance(maps, Tensor) else (False, maps)


def _finish(total: Tensor, labels: Tensor | None, ids: Tensor | None) -> Tensor:
    if labels is None or ids is None:
        return normalize_cam(total, labels=labels)
    return put_classes(normalize_cam(total, labels=labels.gather(1, ids)), ids, labels.shape[1])


def cam_to_label(
    cam: Tensor,
    *,
    labels: Tensor | None = None,
    background: float | None = None,
    high: float | None = None,
    low: float | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Threshold normalised CAMs to a label map: 0 background, 1..K classes.

    Args:
        cam: ``(B, K, H, W)`` in [0, 1], zero for absent classes unless `labels` are given.
        labels: multi-hot ``(B, K)``: absent classes are left out. Needed where every class was normalised, for the
            peak of an absent one is as high as that of a present one.
        background: one threshold; at or below it a pixel is background.
        high: with `low`, a pair: above `high` the class, at or below `low` background, `ignore_index` between.
        low: see `high`; ``low <= high``.
        ignore_index: label of the undecided pixels.

    Returns:
        int64 ``(B, H, W)``. Ties between classes go to the lowest index.

    Raises:
        ValueError: unless either `background`, or `high` and `low`, are given and lie in [0, 1]; if a shape does not
            fit.
        TypeError: if `cam` is not floating.

    Example:
        >>> import torch
        >>> from ffr.cam import cam_to_label
        >>> cam_to_label(torch.tensor([[[[0.2, 0.5, 0.9]]]]), high=0.7, low=0.25)
        tensor([[[  0, 255,   1]]])
    """
    owner = "cam_to_label"
    sizes = _check.bind(owner, cam=(cam, "B K H W"))
    _check.label_names(owner, num_classes=sizes["K"], ignore_index=ignore_index)
    _check.floating(owner, cam=cam)
    if background is not None and high is None and low is None:
        _check.within(owner, background=background, at_most=1.0)
        high = low = background
    elif background is None and high is not None and low is not None:
        _check.within(owner, high=high, at_most=1.0)
        _check.within(owner, low=low, at_most=high)
    else:
        raise ValueError(
            f"{owner}: expected either `background`, or `high` and `low`, got background={background}, "
            f"high={high}, low={low}."
        )
    if labels is not None:
        _check.bind(owner, sizes=sizes, labels=(labels, "B K"))
        cam = torch.where((labels > 0.5)[:, :, None, None], cam, 0)
    score, index = cam.max(1)
    label = torch.where(score > high, index + 1, ignore_index)
    return torch.where(score <= low, 0, label)  # NaN is undecided, not background


def label_to_cam(label: Tensor, *, num_classes: int) -> Tensor:
    """A label map as a CAM, for hosts that keep label maps only.

    Args:
        label: integer ``(B, H, W)``: 0 background, 1..K classes; any other value, such as 255, belongs to no class.
        num_classes: K.

    Returns:
        float32 ``(B, K, H, W)`` of zeros and ones.

    Raises:
        ValueError: if `label` has another rank.
        TypeError: if it is not of an integer dtype.

    Example:
        >>> import torch
        >>> from ffr.cam import label_to_cam
        >>> label_to_cam(torch.tensor([[[0, 2, 255]]]), num_classes=2)[0, :, 0].tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    owner = "label_to_cam"
    _check.bind(owner, label=(label, "B H W"))
    _check.integer(owner, label=label)
    _check.within(owner, whole=True, num_classes=num_classes, at_least=1)
    classes = torch.arange(1, num_classes + 1, device=label.device)
    return (label[:, None] == classes[:, None, None]).float()


def to_image(maps: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """Up-sample maps of the token grid to the image, bilinearly (``align_corners=False``).

    A grid that was padded covers ``(h * p, w * p)`` pixels; it is resized to those and cropped at the right and
    bottom, so that a token stays over its own pixels.

    Args:
        maps: ``(B, C, h, w)`` with ``h = ceil(H / p)``, ``w = ceil(W / p)``.
        size: ``(H, W)`` of the image.
        patch_size: p.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        ValueError: if the grid is not that of the image.

    Example:
        >>> import torch
        >>> from ffr.cam import to_image
        >>> to_image(torch.zeros(1, 3, 7, 9), (100, 130), 16).shape
        torch.Size([1, 3, 100, 130])
    """
    owner = "to_image"
    _check.pair(owner, size=size)
    _check.within(owner, at_least=1, whole=True, patch_size=patch_size)
    height, width = size
    grid = {"h": math.ceil(height / patch_size), "w": math.ceil(width / patch_size)}
    remedy = (
        f"Pass the size of the image that gave the maps: {height} x {width} has {grid['h']} x {grid['w']} patches. "
        "Crop the image to whole patches first if the encoder drops the rest"
    )
    _check.bind(owner, sizes=grid, remedy=remedy, maps=(maps, "B C h w"))
    full = (grid["h"] * patch_size, grid["w"] * patch_size)
    return F.interpolate(maps, size=full, mode="bilinear", align_corners=False)[..., :height, :width]


def to_float(images: Tensor) -> Tensor:
    """Images (uint8, or float in [0, 1]) as float in [0, 1]."""
    return images if images.is_floating_point() else images.float() / 255


def present_classes(labels: Tensor, max_present: int | None = None) -> tuple[Tensor, Tensor]:
    """Class indices of every image, present ones first, and whether each is present, without a host round trip.

    Args:
        labels: multi-hot ``(B, K)``.
        max_present: m, how many to return; an upper bound of the classes present in one image (default K). 0 counts
            as 1.

    Returns:
        ids, int64 ``(B, m)``, distinct per image; present, bool ``(B, m)``.
    """
    count = labels.shape[1]
    wanted = count
    if max_present is not None:
        remedy = f"`labels` has K={count} classes"
        _check.within("present_classes", whole=True, max_present=max_present, at_most=count, remedy=remedy)
        wanted = max_present
    wanted = max(1, wanted)  # a batch of background alone has the bound 0; no class at all would be an empty tensor
    present, ids = (labels > 0.5).to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return ids[:, :wanted], present[:, :wanted] > 0


def take_classes(maps: Tensor, ids: Tensor) -> Tensor:
    """Rows of the class axis: ``(B, K, ...)`` and ``(B, m)`` -> ``(B, m, ...)``."""
    index = ids.reshape(*ids.shape, *[1] * (maps.ndim - 2)).expand(-1, -1, *maps.shape[2:])
    return maps.gather(1, index)


def put_classes(rows: Tensor, ids: Tensor, num_classes: int) -> Tensor:
    """The reverse of `take_classes`: ``(B, m, ...)`` -> ``(B, K, ...)``, zeros elsewhere."""
    index = ids.reshape(*ids.shape, *[1] * (rows.ndim - 2)).expand_as(rows)
    return rows.new_zeros(rows.shape[0], num_classes, *rows.shape[2:]).scatter(1, index, rows)
