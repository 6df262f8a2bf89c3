"""Split feature maps into low and high spatial frequencies."""

import math
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ffr import _check


class Bands(NamedTuple):
    """A feature map in two parts; ``low + high`` restores it."""

    low: Tensor
    high: Tensor


def split_bands(features: Tensor, mu: float, *, grid: tuple[int, int] | None = None) -> Bands:
    r"""Split features at a cut-off frequency, exactly and without an FFT.

    The ideal square mask of the method is even about zero frequency, hence separable, and its low band is
    a projection on each axis:

    .. math:: X_\text{low} = P_h X P_w, \qquad X_\text{high} = X - X_\text{low}

    where :math:`P_n` projects on the real Fourier basis of the frequencies :math:`|f| \le \mu`.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`; any floating dtype.
        mu: cut-off in cycles per token, in [0, 0.5]. 0 keeps the mean alone, 0.5 (Nyquist) keeps everything.
        grid: ``(h, w)`` with ``h * w = N``, for tokens.

    Returns:
        ``Bands(low, high)``, each of the shape, dtype and device of `features`, also under autocast.

    Raises:
        ValueError: if `features` has another rank, `grid` does not match, or `mu` lies outside [0, 0.5].
        TypeError: if `features` is not floating.

    Example:
        >>> import torch
        >>> from ffr.frequency import split_bands
        >>> low, high = split_bands(torch.ones(1, 8, 14, 14), mu=0.25)
        >>> bool(high.abs().max() < 1e-6)  # a constant map has no high band
        True

    Reference: FFR (CVPR 2025), method figure, "FFM"; the unit of mu is our reading, see ``why/paper_to_code``.
    """
    owner = "split_bands"
    _, sizes = _check.tokens(owner, grid=grid, features=features)
    _check.within(owner, mu=mu, at_most=0.5, remedy="mu is in cycles per token; 0.5 is the Nyquist frequency")
    h, w = sizes["h"], sizes["w"]
    plain = type(features) is Tensor
    # index: a size that torch.compile holds as a symbol becomes a number, one graph per grid
    rows, columns = (_projection(index(n), mu, features.dtype, features.device, plain) for n in (h, w))
    with torch.autocast(features.device.type, enabled=False):
        if features.ndim == 4:
            low = rows @ features @ columns  # both symmetric
        else:  # both products read rows of D contiguous channels: tokens need no transpose
            low = rows @ rearrange(features, "b (h w) d -> b h (w d)", h=h)
            low = columns @ rearrange(low, "b h (w d) -> b h w d", w=w)
            low = rearrange(low, "b h w d -> b (h w) d")
        return Bands(low, features - low)


class FrequencyMask(nn.Module):
    """`split_bands` with its cut-off bound; no parameters, no buffers.

    Args:
        mu: cut-off in cycles per token, in [0, 0.5].

    Example:
        >>> import torch
        >>> from ffr import FrequencyMask
        >>> low, high = FrequencyMask(mu=0.4)(torch.randn(2, 768, 28, 28))
    """

    def __init__(self, mu: float = 0.4) -> None:
        super().__init__()
        _check.within("FrequencyMask", mu=mu, at_most=0.5)
        self.mu = mu

    def forward(self, features: Tensor, *, grid: tuple[int, int] | None = None) -> Bands:
        """See `split_bands`."""
        return split_bands(features, self.mu, grid=grid)

    def extra_repr(self) -> str:
        """The cut-off."""
        return f"mu={self.mu}"


def passed(size: int, mu: float) -> int:
    """Highest frequency, in cycles per `size` tokens, that the low band keeps."""
    return math.floor(mu * size + 1e-9)  # the tolerance keeps 29 of 0.29 * 100


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph holds the matrix, not its construction
def _projection(size: int, mu: float, dtype: torch.dtype, device: torch.device, plain: bool) -> Tensor:
    # Next to a fake tensor (torch.export) the matrix is fake as well and must not reach the cache.
    build = _cached_projection if plain else _cached_projection.__wrapped__
    return build(size, passed(size, mu), dtype, device)


@lru_cache(maxsize=64)
def _cached_projection(size: int, cycles: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal projection (size, size) on the frequencies 0..cycles, built in float64."""
    position = np.arange(size)
    basis = [np.full(size, math.sqrt(1 / size))]
    for cycle in range(1, cycles + 1):
        angle = 2 * np.pi * (cycle * position % size) / size
        if 2 * cycle == size:  # Nyquist: one vector, its sine is zero
            basis.append((-1.0) ** position / math.sqrt(size))
        else:
            basis += [math.sqrt(2 / size) * np.cos(angle), math.sqrt(2 / size) * np.sin(angle)]
    vectors = np.stack(basis, 1)
    with torch.inference_mode(False):  # a cached inference tensor would break later training
        return torch.as_tensor(vectors @ vectors.T, device="cpu").to(device, dtype)
