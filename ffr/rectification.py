"""Token selection (FSTS) and the rectification loss."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ffr import _check
from ffr.cam import present_classes, put_classes, take_classes
from ffr.prototypes import cosines, inverse_norm

Distance = Literal["cosine", "l1", "l2"]


def select_tokens(
    *,
    features: Tensor,
    low: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    gap: float = 0.05,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    max_present: int | None = None,
) -> Tensor:
    r"""Tokens whose similarity to a class changes when the high band is dropped.

    .. math:: |\cos(x_i, p_k) - \cos(x^\text{low}_i, p_k)| > \text{gap}

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        low: their low band, of the same shape.
        prototypes: ``(B, K, D)``.
        valid: bool ``(B, K)``; other classes select nothing.
        gap: a token is selected where its cosine changes by more than this; in [0, 2].
        mask: bool ``(B, h, w)``, False leaves a token out.
        grid: ``(h, w)``, for tokens.
        max_present: an upper bound of the valid classes of one image, known on the host; the others then cost nothing.

    Returns:
        bool ``(B, K, h, w)``, without gradient. A token may be selected for several classes.

    Raises:
        ValueError: if a shape does not fit or `gap` lies outside [0, 2].
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.rectification import select_tokens
        >>> x, low = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[0.8]], [[0.6]]]])
        >>> p, valid = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[True, False]])
        >>> select_tokens(features=x, low=low, prototypes=p, valid=valid, gap=0.1).flatten()
        tensor([ True, False])

    Reference: FFR (CVPR 2025), method figure, "FSTS"; the absolute gap and its size are our reading.
    """
    owner = "select_tokens"
    (tokens, low_tokens), sizes = _check.tokens(owner, grid=grid, features=features, low=low)
    sizes = _check.bind(owner, sizes=sizes, prototypes=(prototypes, "B K D"), valid=(valid, "B K"))
    _check.boolean(owner, valid=valid)
    _check.within(owner, gap=gap, at_most=2.0)
    with torch.no_grad():
        ids, there = present_classes(valid, max_present)
        wide = torch.promote_types(tokens.dtype, torch.float32)  # a gap of 0.05 is a dozen steps of bfloat16 near 1
        vectors = take_classes(prototypes, ids).to(wide)
        change = cosines(tokens.to(wide), vectors) - cosines(low_tokens.to(wide), vectors)  # (B, m, N)
        selected = put_classes((change.abs() > gap) & there[..., None], ids, sizes["K"])
        selected = selected.reshape(sizes["B"], sizes["K"], sizes["h"], sizes["w"])
        if mask is not None:
            _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
            _check.boolean(owner, mask=mask)
            selected = selected & mask[:, None]
    return selected


def rectification_loss(
    *,
    features: Tensor,
    low: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    gap: float | None = 0.05,
    min_fraction: float = 0.05,
    distance: Distance = "cosine",
    stop_gradient: bool = True,
    selected: Tensor | None = None,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    max_present: int | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    world_size: int = 1,
) -> Tensor:
    r"""Pull the selected tokens to their low band.

    .. math:: L_r = \frac{\sum_{(i, k) \in S} 1 - \cos(x_i, \mathrm{sg}(x^\text{low}_i))}
                         {\max(|S|,\ \text{min\_fraction} \cdot N \cdot K_\text{valid},\ 1)}

    over the selected (token, class) pairs S of the batch; a token selected for two classes counts twice. The floor
    of the denominator keeps a handful of pairs from getting a huge gradient each.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        low: their low band, of the same shape; the teacher.
        prototypes: ``(B, K, D)``.
        valid: bool ``(B, K)``.
        gap: see `select_tokens`; None drops the guidance by classes: every token counts once.
        min_fraction: floor of the denominator as a share of all (unmasked token, valid class) pairs, in [0, 1];
            0 is the plain mean.
        distance: "cosine"; "l1" and "l2" are the mean absolute and mean squared difference over channels.
        stop_gradient: False lets the low band move too.
        selected: what `select_tokens` gave, where the caller has it already; left out, it is computed here.
        mask: bool ``(B, h, w)``, False leaves a token out.
        grid: ``(h, w)``, for tokens.
        max_present: see `select_tokens`.
        all_reduce: sums a detached count over ranks, for an objective that does not depend on their number.
        world_size: number of ranks that `all_reduce` sums over; undoes the mean over ranks of data parallelism.

    Returns:
        a scalar >= 0, at least float32; exactly 0, and connected to the graph, where nothing is selected.

    Raises:
        ValueError: if a shape does not fit or a number is out of range.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.frequency import split_bands
        >>> from ffr.rectification import rectification_loss
        >>> x = torch.randn(1, 8, 14, 14)
        >>> p, valid = torch.randn(1, 3, 8), torch.tensor([[True, True, False]])
        >>> low = split_bands(x, 0.4).low
        >>> loss = rectification_loss(features=x, low=low, prototypes=p, valid=valid)
        >>> loss.shape
        torch.Size([])

    Reference: FFR (CVPR 2025), supplementary. Distance, stop-gradient and floor are our reading.
    """
    owner = "rectification_loss"
    (tokens, teacher), sizes = _check.tokens(owner, grid=grid, features=features, low=low)
    sizes = _check.bind(owner, sizes=sizes, prototypes=(prototypes, "B K D"), valid=(valid, "B K"))
    _check.boolean(owner, valid=valid)
    _check.within(owner, min_fraction=min_fraction, at_most=1.0)
    _check.one_of(owner, "distance", distance, ("cosine", "l1", "l2"))
    if mask is None:
        real = torch.ones((), dtype=torch.bool, device=tokens.device).expand(tokens.shape[:2])  # (B, N)
    else:
        _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
        _check.boolean(owner, mask=mask)
        real = mask.flatten(1)  # whatever the other tokens hold, NaN too:
        tokens, teacher = (x.masked_fill(~real[..., None], 0) for x in (tokens, teacher))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if gap is None:
        times = real.to(wide)
        pairs = times.sum()
    else:
        if selected is None:
            selected = select_tokens(
                features=features,
                low=low,
                prototypes=prototypes,
                valid=valid,
                gap=gap,
                mask=mask,
                grid=grid,
                max_present=max_present,
            )
        _check.bind(owner, sizes=sizes, selected=(selected, "B K h w"))
        _check.boolean(owner, selected=selected)
        times = (selected.flatten(2).sum(1) * real).to(wide)  # (B, N), for how many classes a token is selected
        pairs = (real.sum(1) * valid.sum(1)).sum().to(wide)
    if stop_gradient:
        teacher = teacher.detach()
    with _check.no_autocast(tokens):
        if distance == "cosine":
            # In float32 at least: near 1 a cosine of half precision is rounding, and its products overflow.
            unit = teacher * inverse_norm(teacher)[..., None]
            cosine = (tokens * unit).sum(-1) * inverse_norm(tokens)
            apart = (1 - cosine).relu()  # rounding can lift a cosine above 1
        elif distance == "l1":
            apart = (tokens - teacher).abs().mean(-1, dtype=wide)
        else:
            apart = (tokens - teacher).to(wide).square().mean(-1)
        counts = torch.stack([times.sum(), pairs])
        counts = _check.reduced(owner, counts, all_reduce, world_size)
        floor = torch.maximum(counts[0], min_fraction * counts[1]).clamp(min=1)
        return (apart * times).sum() * (world_size / floor)


class RectificationLoss(nn.Module):
    """`rectification_loss` with its settings bound; no parameters, no buffers. `select` shows what it picks.

    Args:
        gap: a token is selected where its cosine to a prototype changes by more than this, in [0, 2]; None: every
            token counts, without guidance by classes.
        min_fraction: floor of the denominator as a share of all pairs, in [0, 1].
        distance: "cosine", "l1" or "l2".
        stop_gradient: whether the low band is a fixed teacher.

    Example:
        >>> import torch
        >>> from ffr import RectificationLoss, FrequencyMask
        >>> x = torch.randn(2, 8, 14, 14)
        >>> low, p = FrequencyMask(0.4)(x).low, torch.randn(2, 3, 8)
        >>> valid = torch.ones(2, 3, dtype=torch.bool)
        >>> parts = dict(features=x, low=low, prototypes=p, valid=valid)
        >>> rectify = RectificationLoss(gap=0.05)
        >>> rectify(**parts).shape, rectify.select(**parts).shape
        (torch.Size([]), torch.Size([2, 3, 14, 14]))
    """

    def __init__(
        self,
        gap: float | None = 0.05,
        min_fraction: float = 0.05,
        distance: Distance = "cosine",
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        owner = "RectificationLoss"
        if gap is not None:
            _check.within(owner, gap=gap, at_most=2.0)
        _check.within(owner, min_fraction=min_fraction, at_most=1.0)
        _check.one_of(owner, "distance", distance, ("cosine", "l1", "l2"))
        self.gap, self.min_fraction, self.distance, self.stop_gradient = gap, min_fraction, distance, stop_gradient

    def forward(
        self,
        *,
        features: Tensor,
        low: Tensor,
        prototypes: Tensor,
        valid: Tensor,
        selected: Tensor | None = None,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        max_present: int | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> Tensor:
        """See `rectification_loss`."""
        return rectification_loss(
            features=features,
            low=low,
            prototypes=prototypes,
            valid=valid,
            gap=self.gap,
            min_fraction=self.min_fraction,
            distance=self.distance,
            stop_gradient=self.stop_gradient,
            selected=selected,
            mask=mask,
            grid=grid,
            max_present=max_present,
            all_reduce=all_reduce,
            world_size=world_size,
        )

    def select(
        self,
        *,
        features: Tensor,
        low: Tensor,
        prototypes: Tensor,
        valid: Tensor,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        max_present: int | None = None,
    ) -> Tensor:
        """The selected (token, class) pairs, bool ``(B, K, h, w)``; see `select_tokens`."""
        if self.gap is None:
            raise ValueError("RectificationLoss.select: gap=None selects nothing by class. Give a gap.")
        return select_tokens(
            features=features,
            low=low,
            prototypes=prototypes,
            valid=valid,
            gap=self.gap,
            mask=mask,
            grid=grid,
            max_present=max_present,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"gap={self.gap}, min_fraction={self.min_fraction}, distance={self.distance!r}, "
            f"stop_gradient={self.stop_gradient}"
        )
