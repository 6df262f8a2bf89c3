"""Gaussian filtering in a feature space of a few dimensions, on the permutohedral lattice."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ffr import _check

RUN = 64  # points that one thread of a GPU adds up: a lattice point in a plain sky has thousands


class PermutohedralLattice:
    r"""Gaussian filter over N points, its cost linear in N; built once, used for any number of filterings.

    .. math:: (G v)_i \approx \sum_j \exp(-\tfrac12 |f_i - f_j|^2)\, v_j

    Every point spreads its value to the :math:`d + 1` corners of its simplex, the lattice is blurred along its
    :math:`d + 1` axes, and the points read it back. With `normalize` the result is :math:`D^{-1/2} G D^{-1/2} v`,
    :math:`D = \operatorname{diag}(G 1)`. Without it, values are in *lattice units*: about half of the sum above for
    position and colour, for the blur truncates the Gaussian.

    Everything is torch on the device of `features`. On a CPU, or with ``count=True``, the lattice has as many points as
    the features touch, and the host reads their number. Elsewhere it has room for all ``N (d + 1)``, and the host reads
    nothing.

    Args:
        features: ``(N, d)``, d from 1 to 6, finite, divided by the standard deviation of each column; position and
            colour of an image come from `image_features`. Below float32 they are computed in float32. Or
            ``(B, N, d)``: images that do not see each other, which spares a GPU launches.
        normalize: divide by the square root of the filtered ones on both sides.
        exact_adjoint: blur in both orders of the axes and average, so that ``u . G v = v . G u`` to rounding. One order
            alone is only nearly symmetric (1e-3), and saves half of the blur.
        count: read the number of lattice points on the host; by default on a CPU alone.

    Raises:
        ValueError: if `features` has another shape or number of columns.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.lattice import PermutohedralLattice
        >>> lattice = PermutohedralLattice(torch.zeros(5, 2))  # five points in one place: mean
        >>> lattice(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]))[:, 0].round(decimals=4)
        tensor([2., 2., 2., 2., 2.])

    Reference: Adams, Baek and Davis, Eurographics 2010; normalised as in Krähenbühl and Koltun, NeurIPS 2011.
    """

    index: Tensor  # (N, d + 1) int32, the lattice points of the simplex of every point, image after image
    weight: Tensor  # (N, d + 1), what the point reads from each, all factors included
    _spread_index: Tensor  # (N (d + 1),) int32, who spreads to a lattice point, one lattice point after the other
    _spread_weight: Tensor  # (N (d + 1),)
    _offsets: Tensor  # (points,) int32, where the points of a lattice point begin
    _runs: tuple[Tensor, Tensor] | None  # runs of points are added up first: where each begins, the first of each sum
    _axes: list[tuple[Tensor, Tensor]]  # along each: (points, 3) itself and its two neighbours, and their weights

    def __init__(
        self, features: Tensor, *, normalize: bool = True, exact_adjoint: bool = False, count: bool | None = None
    ) -> None:
        owner = "PermutohedralLattice"
        pattern = "B N d" if getattr(features, "ndim", 2) == 3 else "N d"
        remedy = "Or (B, N, d), for images that do not see each other"
        self._sizes = _check.bind(owner, remedy=remedy, features=(features, pattern))
        _check.floating(owner, features=features)
        _check.within(owner, at_least=1, at_most=6, d=self._sizes.pop("d"))
        _check.within(owner, at_least=1, N=self._sizes["N"], B=self._sizes.get("B", 1))
        self.exact_adjoint = exact_adjoint
        with _check.no_autocast(features):
            columns = features.detach().to(torch.promote_types(features.dtype, torch.float32))
            columns = columns.flatten(0, -2).t().contiguous()
            self._build(columns, self._sizes["N"], features.device.type == "cpu" if count is None else count)
            if normalize:
                ones = torch.ones_like(self.weight[:, :1])
                scale = torch.rsqrt(weighted_rows(self.index, self.blurred(ones), self.weight))
                self.weight = self.weight * scale
                self._spread_weight = self._spread_weight * scale[:, 0].index_select(0, self._spread_index)

    @property
    def points(self) -> int:
        """How many points the lattice has where they were counted, else the bound on them."""
        return self._offsets.shape[0]

    def __call__(self, values: Tensor) -> Tensor:
        """Filter ``(N, C)``, or ``(B, N, C)`` of as many images, without gradient.

        The result has the dtype of `values`; computed in that of the lattice.
        """
        _check.bind("PermutohedralLattice", sizes=self._sizes, values=(values, " ".join([*self._sizes, "C"])))
        _check.floating("PermutohedralLattice", values=values)
        with _check.no_autocast(values):
            rows = weighted_rows(self.index, self.blurred(values.flatten(0, -2)), self.weight)
            return rows.reshape(values.shape).to(values.dtype)

    def blurred(self, values: Tensor) -> Tensor:
        """Values ``(N, C)`` on the blurred lattice, ``(points, C)``; ``index`` and ``weight`` read them back."""
        values = self._spread(values.detach().to(self.weight.dtype))
        reverse = values if self.exact_adjoint else None
        for index, weight in self._axes:
            values = weighted_rows(index, values, weight)
        if reverse is None:
            return values
        for index, weight in reversed(self._axes):
            reverse = weighted_rows(index, reverse, weight)
        return values.add_(reverse).mul_(0.5)

    def _spread(self, values: Tensor) -> Tensor:
        """Values ``(N, C)`` on the lattice, not blurred yet."""
        begin, first = (self._offsets, None) if self._runs is None else self._runs
        values = F.embedding_bag(self._spread_index, values, begin, mode="sum", per_sample_weights=self._spread_weight)
        if first is None:
            return values
        return F.embedding_bag(
            torch.arange(len(values), dtype=first.dtype, device=first.device), values, first, mode="sum"
        )

    def _build(self, columns: Tensor, each: int, count: bool) -> None:
        """Find the simplex of every point, number the corners, note who neighbours whom; `each` points are an image."""
        d = columns.shape[0]
        corners, device = d + 1, columns.device
        floor, rank, self.weight = _simplices(columns)

        # The corner r of a simplex has the coordinates (d + 1) floor + r, less d + 1 where the rank exceeds d - r. All
        # lie within d + 1 of the first. A point is one integer, its coordinates the digits of a mixed radix; neighbours
        # in space are then close in memory. The coordinates are the last d of the d + 1: with positions the highest
        # digit is then that of the row, and lattice and image are walked alike, twice as fast as across. Odd radices
        # make what passes 64 bits a hash instead of a clash.
        low, high = floor.amin(1), floor.amax(1)
        radix = ((high - low + 4) * corners) | 1
        digit = torch.cat([radix.new_ones(1), radix.cumprod(0)])
        base = torch.arange(columns.shape[1], device=device).div_(each, rounding_mode="trunc") * digit[d]  # the image
        digit = digit[:d]
        stride = digit * corners
        order = torch.zeros_like(floor[0])
        for k in range(d):
            base += (floor[k] - low[k] + 2) * stride[k]
            order += rank[k].long() * corners**k
        # Many points share a simplex: name those once, then their corners.
        points, simplex, _, begin, size = _distinct(base * (corners**d | 1) + order, count)
        member = torch.empty_like(points).scatter_(0, points, simplex)
        first = points.index_select(0, begin.clamp(max=points.shape[0] - 1))
        base, rank = base.index_select(0, first), rank.index_select(1, first)
        keys = torch.stack([base + r * digit.sum() for r in range(corners)], 1)
        for r in range(1, corners):
            keys[:, r] -= ((rank > d - r) * stride[:, None]).sum(0)
        pairs, receiver, names, _, _ = _distinct(keys.flatten(), count)
        corner = torch.empty_like(pairs).scatter_(0, pairs, receiver).int()
        self.index = corner.reshape(keys.shape).index_select(0, member)

        total = names.shape[0]
        own = torch.arange(total, device=device)
        half = torch.full_like(own, 0.5, dtype=columns.dtype)
        self._axes = []
        for j in range(corners):
            step = digit[j - 1] * corners - digit.sum() if j else -digit.sum()
            wanted = names + step
            ahead = torch.searchsorted(names, wanted).clamp_(max=total - 1)
            there = names.index_select(0, ahead) == wanted
            # Who is ahead of whom also tells who is behind; number `total` takes the answers of those without.
            behind = own.new_full((total + 1,), -1).scatter_(0, torch.where(there, ahead, total), own)[:total]
            index = torch.stack([own, torch.where(there, ahead, own), torch.where(behind < 0, own, behind)], 1).int()
            self._axes.append((index, torch.stack([half * 2, half * there, half * (behind >= 0)], 1)))

        # Transposed: the points that spread to a lattice point, one after the other. They stand in `points` simplex
        # by simplex, so every (simplex, corner), in the order of its corner, is a run of them.
        owner, place = pairs.div(corners, rounding_mode="trunc"), pairs % corners
        length = size.index_select(0, owner)
        start = length.cumsum(0) - length
        room = self.index.numel()
        run = torch.zeros(room + 1, dtype=torch.int64, device=device).scatter_add_(0, start, torch.ones_like(start))
        run = run[:room].cumsum_(0).sub_(1)
        point = points.index_select(
            0, torch.arange(room, device=device).add_((begin.index_select(0, owner) - start).index_select(0, run))
        )
        self._spread_index = point.int()
        self._spread_weight = self.weight.flatten().index_select(
            0, point.mul_(corners).add_(place.index_select(0, run))
        )
        received = torch.zeros_like(own).scatter_add_(0, receiver, length)
        self._offsets = (received.cumsum(0) - received).int()
        self._runs = None
        if device.type != "cpu" or not count:  # a GPU gives every sum a thread of its own, and waits for the longest
            begin = torch.cat([self._offsets, torch.arange(0, room, RUN, dtype=torch.int32, device=device)]).sort()[0]
            # Before its own begin lie those of the points before it, and the multiples of RUN below.
            first = own + (self._offsets + (RUN - 1)).div(RUN, rounding_mode="trunc")
            self._runs = begin, first.int()
        self.weight = self.weight / (1 + 2.0**-d)


def _simplices(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex of every point: first corner over d + 1, ranks of the axes, both (d, N), and weights (N, d + 1)."""
    d, count = columns.shape
    corners = d + 1
    elevated = [columns[0]] * corners
    total = torch.zeros_like(columns[0])
    for j in range(d, 0, -1):
        scaled = columns[j - 1] * (math.sqrt(2 / 3) * corners / math.sqrt(j * (j + 1)))
        elevated[j] = torch.sub(total, scaled, alpha=j)
        total = total + scaled
    elevated[0] = total

    nearest = [torch.round(x * (1 / corners)) for x in elevated]
    apart = [torch.sub(x, near, alpha=corners) for x, near in zip(elevated, nearest, strict=True)]
    # Rounding may leave the plane of zero sums; the ranks tell which axes step back to it.
    excess = torch.stack(nearest).sum(0).to(torch.int8)
    rank = [excess.clone() for _ in range(corners)]
    for a in range(d):
        for b in range(a + 1, corners):
            behind = apart[a] < apart[b]
            rank[a] += behind
            rank[b] += ~behind
    for k in range(corners):
        turn = (rank[k] < 0).to(torch.int8) - (rank[k] > d).to(torch.int8)
        rank[k] += turn * corners
        nearest[k] = nearest[k] + turn
        apart[k] = torch.sub(apart[k] * (1 / corners), turn.to(columns.dtype))

    # The weights are the gaps between the sorted distances. A few comparators sort faster than a sort along an axis.
    for done in range(d):
        for i in range(d - done):
            apart[i], apart[i + 1] = torch.maximum(apart[i], apart[i + 1]), torch.minimum(apart[i], apart[i + 1])
    weight = torch.empty(count, corners, dtype=columns.dtype, device=columns.device)
    weight[:, 0] = 1 + apart[d] - apart[0]
    for k in range(1, corners):
        weight[:, k] = apart[d - k] - apart[corners - k]
    return torch.stack(nearest[1:]).long(), torch.stack(rank[1:]), weight


def _distinct(names: Tensor, count: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort names and number the distinct ones.

    With `count` off, which spares the host a number, there is room for all: unused numbers come last, with the largest
    name and the size 0.

    Returns:
        the places in sorted order and the number at each; by number, the name, where it begins in that order, how often
        it occurs.
    """
    ordered, order = names.sort(stable=True)
    number = F.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    room = int(number[-1]) + 1 if count else names.shape[0]
    distinct = names.new_full((room,), torch.iinfo(torch.int64).max).scatter_(0, number, ordered)
    size = torch.zeros_like(distinct).scatter_add_(0, number, torch.ones_like(number))
    return order, number, distinct, size.cumsum(0) - size, size


def weighted_rows(index: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the rows that `index` ``(N, m)`` names; fused, never stored as ``(N, m, C)``."""
    return F.embedding_bag(index, values, mode="sum", per_sample_weights=weight)


def image_features(image: Tensor, *, sxy: float, srgb: float) -> Tensor:
    r"""Position and colour of every pixel.

    .. math:: f = (x / s_{xy},\, y / s_{xy},\, r / s_{rgb},\, g / s_{rgb},\, b / s_{rgb})

    Args:
        image: ``(3, H, W)``, RGB, uint8 or float in [0, 1].
        sxy: standard deviation of the position, in pixels.
        srgb: standard deviation of the colour, on the scale 0..255.

    Returns:
        ``(H * W, 5)``, at least float32.

    Raises:
        ValueError: if a shape or a number does not fit.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.lattice import image_features
        >>> image_features(torch.ones(3, 1, 2), sxy=2, srgb=5)
        tensor([[ 0.0000,  0.0000, 51.0000, 51.0000, 51.0000],
                [ 0.5000,  0.0000, 51.0000, 51.0000, 51.0000]])
    """
    owner = "image_features"
    _check.bind(owner, image=(image, "3 H W"))
    _check.pixels(owner, image=image)
    _check.positive(owner, sxy=sxy, srgb=srgb)
    if image.dtype != torch.uint8:
        image = image.to(torch.promote_types(image.dtype, torch.float32)) * 255
    colour = image.flatten(1).to(torch.promote_types(image.dtype, torch.float32))
    return torch.cat([_positions(image.shape[1:], sxy, colour.dtype, image.device), (colour / srgb).t()], 1)


def position_lattice(
    size: tuple[int, int], *, sxy: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PermutohedralLattice:
    """The normalised lattice of the positions of an image, from a cache of the eight used last.

    Args:
        size: ``(H, W)``.
        sxy: standard deviation, in pixels.
        dtype: float32 or float64.
        device: where it lies.

    Returns:
        a lattice of ``H * W`` points, row by row; it is shared, so never edit it.

    Raises:
        ValueError: if `sxy` is not positive.

    Example:
        >>> from ffr.lattice import position_lattice
        >>> position_lattice((4, 6), sxy=3).index.shape
        torch.Size([24, 3])
    """
    _check.positive("position_lattice", sxy=sxy)
    return _cached_position_lattice(tuple(size), float(sxy), dtype, torch.device(device))


@lru_cache(maxsize=8)
def _cached_position_lattice(
    size: tuple[int, int], sxy: float, dtype: torch.dtype, device: torch.device
) -> PermutohedralLattice:
    with torch.inference_mode(False):  # a cached inference tensor would break later training
        return PermutohedralLattice(_positions(size, sxy, dtype, device))


def _positions(size: tuple[int, ...], sxy: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Column and row of every pixel over sxy, (H * W, 2)."""
    y, x = (torch.arange(n, dtype=dtype, device=device) / sxy for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
