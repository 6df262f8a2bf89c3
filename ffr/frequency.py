"""Split feature maps into low and high spatial frequencies."""

import math
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from operator import index
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ffr import _check

# On a CPU, features beyond _CACHE bytes are taken in blocks of _BLOCK bytes: what lies between two products stays near.
_CACHE, _BLOCK = 2**22, 2**21
_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # without it bfloat16 is multiplied slowly


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
        mu: cut-off in cycles per token, in [0, 0.5]. 0 keeps the mean alone, 0.5 (Nyquist) keeps everything. A
            frequency k / n belongs to the low band up to ``mu + 1e-7``, so that mu may be a k / n in float32.
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
    # index: a size that torch.compile holds as a symbol becomes a number, one graph per grid
    h, w = index(sizes["h"]), index(sizes["w"])
    if torch.compiler.is_compiling() or _tracing():
        # A mu that changes between calls is a symbol as well. Of all that keep the same, the least is made of numbers.
        return _as_graph(features, max(index(passed(h, mu)) / h, index(passed(w, mu)) / w), h, w)
    return Bands(*_Split.apply(features, mu, h, w))


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


class _Split(torch.autograd.Function):
    """Features to both bands. P is symmetric: the adjoint of (P, I - P) is `_Join`, and the other way round."""

    @staticmethod
    def forward(features: Tensor, mu: float, h: int, w: int) -> tuple[Tensor, Tensor]:
        if kernel := _fused(features, h, w):
            low, high = kernel.split(features, *_operands(features, mu, h, w), h, w)
            return low, high
        tokens = _channels_last(features)
        low, high = _room(features, tokens), _room(features, tokens)
        for part, its_low, its_high in _blocks(h, w, tokens, features, low, high):
            torch.sub(part, _low_pass(part, mu, tokens, its_high, its_low), out=its_high)
        return low, high

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings = inputs[1:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bands: Any) -> Any:
        low, high = bands
        if low is not None and high is not None:
            return _Join.apply(low, high, *ctx.settings), None, None, None
        one = high if low is None else low
        gradient = None if one is None else _Split.apply(one, *ctx.settings)[low is None]
        return gradient, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Split.apply(tangents[0], *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        features = inputs[0].movedim(in_dims[0], 0)
        bands = _Split.apply(features.flatten(0, 1), *inputs[1:])
        return tuple(band.unflatten(0, features.shape[:2]) for band in bands), (0, 0)


class _Join(torch.autograd.Function):
    """P low + (I - P) high, as high + P (low - high): one low pass."""

    @staticmethod
    def forward(low: Tensor, high: Tensor, mu: float, h: int, w: int) -> Tensor:
        if kernel := _fused(low, h, w):
            joined: Tensor = kernel.join(low, high, *_operands(low, mu, h, w), h, w)
            return joined
        tokens = _channels_last(low)
        out = _room(low, tokens)
        for its_low, its_high, part in _blocks(h, w, tokens, low, high, out):
            difference = its_low - its_high
            torch.add(_low_pass(difference, mu, tokens, part, difference), its_high, out=part)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return *_Split.apply(gradient[0], *ctx.settings), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Join.apply(*tangents[:2], *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        low, high = (
            band.expand(info.batch_size, *band.shape) if dim is None else band.movedim(dim, 0)
            for band, dim in zip(inputs[:2], in_dims[:2], strict=True)
        )
        joined = _Join.apply(low.flatten(0, 1), high.flatten(0, 1), *inputs[2:])
        return joined.unflatten(0, low.shape[:2]), 0


def _as_graph(features: Tensor, mu: float, h: int, w: int) -> Bands:
    """The same in plain products, for a compiler to see through."""
    rows, columns = _matrices(h, w, mu, _working_dtype(features), features.device, _plain(features))
    with _check.no_autocast(features):
        x = features.to(rows.dtype)
        if features.ndim == 4:
            low = rows @ x @ columns
        else:
            low = rows @ rearrange(x, "b (h w) d -> b h (w d)", h=h)
            low = columns @ rearrange(low, "b h (w d) -> b h w d", w=w)
            low = rearrange(low, "b h w d -> b (h w) d")
        return Bands(low.to(features.dtype), (x - low).to(features.dtype))


def _fused(features: Tensor, h: int, w: int) -> ModuleType | None:
    """The module of the fused kernel, where it can run on these features."""
    if features.device.type != "cuda" or not _plain(features) or find_spec("triton") is None:
        return None
    if torch.version.hip is not None:  # it multiplies in TF32, which is NVIDIA's
        return None
    if torch.cuda.get_device_capability(features.device) < (8, 0):
        return None
    from ffr import _frequency_kernel

    return _frequency_kernel if _frequency_kernel.fits(features, h, w) else None


def _operands(features: Tensor, mu: float, h: int, w: int) -> tuple[Tensor, ...]:
    return tuple(_cached_operand(size, passed(size, mu), features.dtype, features.device) for size in (h, w))


# In memory --------------------------------------------------------------------------------------------------------


def _channels_last(features: Tensor) -> bool:
    """Whether the channels of a token lie side by side, in tokens (B, N, D) or in maps (B, D, h, w)."""
    one = features[:1]  # tokens behind a prefix leave a gap between images, which does no harm
    return one.ndim == 3 or (not one.is_contiguous() and one.is_contiguous(memory_format=torch.channels_last))


def _arranged(features: Tensor, h: int, w: int, tokens: bool) -> Tensor:
    """Maps or tokens as (B, h, w, D) for `tokens`, else as (B, D, h, w); every image without gaps, a view if it is."""
    x = features if features.ndim == 4 else features.unflatten(1, (h, w)).movedim(3, 1)  # type: ignore[no-untyped-call]
    x = x.movedim(1, 3) if tokens else x
    return x if x[:1].is_contiguous() else x.contiguous()


def _room(features: Tensor, tokens: bool) -> Tensor:
    last = tokens and features.ndim == 4
    return torch.empty_like(features, memory_format=torch.channels_last if last else torch.contiguous_format)


def _blocks(h: int, w: int, tokens: bool, *features: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of images (b, h, w, D), or of maps (m, h, w), that stay in the cache of a CPU; views where it can be."""
    arranged = [_arranged(one, h, w, tokens) for one in features]
    rows = arranged if tokens else [one.flatten(0, 1) for one in arranged]
    count = len(rows[0])
    if rows[0].device.type == "cpu" and rows[0].nbytes > _CACHE:
        count = _BLOCK // rows[0][0].nbytes
    return zip(*(torch.split(row, max(1, count)) for row in rows), strict=True)


# Products ---------------------------------------------------------------------------------------------------------


def _low_pass(x: Tensor, mu: float, tokens: bool, between: Tensor, out: Tensor) -> Tensor:
    """Low band of a block, written to `out`, which may be `x`; `between` is room for the first product."""
    if x.dtype != _working_dtype(x):
        wide = x.to(_working_dtype(x), memory_format=torch.contiguous_format)
        return out.copy_(_low_pass(wide, mu, tokens, torch.empty_like(wide), wide))
    with _check.no_autocast(x):
        if tokens:  # both products read rows of D contiguous channels: no transpose
            b, h, w, d = x.shape
            _along(x.reshape(b, h, w * d), mu, between.view(b, h, w * d))
            _along(between.view(b * h, w, d), mu, out.view(b * h, w, d))
        else:
            m, h, w = x.shape
            columns = _matrix(w, mu, x.dtype, x.device, _plain(x))
            torch.mm(x.reshape(m * h, w), columns, out=between.view(m * h, w))
            _along(between, mu, out)
    return out


def _along(x: Tensor, mu: float, out: Tensor) -> Tensor:
    """Low pass along the middle axis of (b, n, m), in the cheapest of three forms."""
    b, n, _ = x.shape
    kept = min(2 * passed(n, mu) + 1, n)
    rank = min(kept, n - kept)
    # Measured: a second product, however thin, costs as much as so many more columns.
    if x.device.type != "cpu" or 2 * rank + (40 if x.dtype == torch.bfloat16 else 16) > n:
        return torch.bmm(_matrix(n, mu, x.dtype, x.device, _plain(x)).expand(b, n, n), x, out=out)
    build = _cached_basis if _plain(x) else _cached_basis.__wrapped__
    basis = build(n, *((0, passed(n, mu)) if kept == rank else (passed(n, mu) + 1, n // 2)), x.dtype, x.device)
    inner = torch.bmm(basis.mT.expand(b, rank, n), x)
    if kept == rank:  # few frequencies pass: P = U U^T
        return torch.bmm(basis.expand(b, n, rank), inner, out=out)
    return torch.baddbmm(x, basis.expand(b, n, rank), inner, alpha=-1, out=out)  # few are dropped: P = I - V V^T


def _working_dtype(x: Tensor) -> torch.dtype:
    """A CPU multiplies float16 ten times slower than float32, and without AVX-512 bfloat16 as well."""
    slow = (torch.float16,) if _AVX512 else (torch.float16, torch.bfloat16)
    return torch.float32 if x.dtype in slow and x.device.type == "cpu" else x.dtype


def _tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def passed(size: int, mu: float) -> int:
    """Highest frequency, in cycles per `size` tokens, that the low band keeps."""
    return math.floor((mu + 1e-7) * size)  # the tolerance keeps 29 of 0.29 * 100, and 9 of 28 times a float32 9 / 28


def _matrices(
    h: int, w: int, mu: float, dtype: torch.dtype, device: torch.device, plain: bool
) -> tuple[Tensor, Tensor]:
    """Both projections; in one call, because torch 2.14 takes two constants of one function for one."""
    return _matrix(h, mu, dtype, device, plain), _matrix(w, mu, dtype, device, plain)


# A graph holds the matrices, not how they are made. This is all that torch.compiler.assume_constant_result does, but
# that one imports the compiler, and Triton with it: as long again as torch, for everyone who imports ffr.
_matrices._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _matrix(size: int, mu: float, dtype: torch.dtype, device: torch.device, plain: bool) -> Tensor:
    # Next to a fake tensor (torch.export) the matrix is fake as well, in a trace it is part of the graph: neither may
    # reach the cache.
    build = _cached_projection if plain and not _tracing() else _cached_projection.__wrapped__
    return build(size, passed(size, mu), dtype, device)


@lru_cache(maxsize=64)
def _cached_projection(size: int, cycles: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal projection (size, size) on the frequencies 0..cycles."""
    return _as_tensor(_projection(size, cycles), dtype, device)


@lru_cache(maxsize=64)
def _cached_operand(size: int, cycles: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same projection for the fused kernel."""
    from ffr import _frequency_kernel

    return _as_tensor(_frequency_kernel.operand(_projection(size, cycles), dtype), dtype, device)


@lru_cache(maxsize=64)
def _cached_basis(size: int, first: int, last: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal basis (size, rank) of the frequencies first..last."""
    return _as_tensor(_waves(size, first, last), dtype, device)


def _projection(size: int, cycles: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    if 2 * cycles >= size - 1:  # all of them: exactly nothing is high, not a rounding of it
        return np.eye(size)
    vectors = _waves(size, 0, cycles)
    return vectors @ vectors.T


def _waves(size: int, first: int, last: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Real orthonormal Fourier vectors of the frequencies first..last, as columns, in float64."""
    position = np.arange(size)
    vectors = []
    for cycle in range(first, last + 1):
        angle = 2 * np.pi * (cycle * position % size) / size
        if cycle == 0 or 2 * cycle == size:  # the mean, and Nyquist: one vector each, the sine is zero
            vectors.append(np.cos(angle) / math.sqrt(size))
        else:
            vectors += [math.sqrt(2 / size) * np.cos(angle), math.sqrt(2 / size) * np.sin(angle)]
    return np.stack(vectors, 1) if vectors else np.zeros((size, 0))


def _as_tensor(values: np.ndarray[Any, np.dtype[np.float64]], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would break later training
        return torch.as_tensor(values, device="cpu").to(device, dtype)
