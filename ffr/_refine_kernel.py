"""Pixel-adaptive refinement on a CUDA GPU: one kernel for the weights of the neighbours, one for an iteration.

The weights are computed once and stored, 192 bytes a pixel at 48 neighbours; an iteration reads them once for all
channels. Computing them anew each time would read 32 bytes instead (colours, their scale, best and sum), but read three
colours and take an exponential for each neighbour, against C scores. At half resolution of 4 images of 448 x 448 the
planes are 38 MB, which the L2 cache of a current GPU holds, and with 10 channels or more the 48 C scores that an
iteration reads through the L1 cache bound it in either form. So: stored, and nothing 48 times the size of the scores.

Importing this file needs Triton; `ffr.refine` does so on the first CUDA tensor that fits.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 128  # of one program
_CHANNELS = 16  # most of one program


def refine(
    pixels: Tensor, scores: Tensor, steps: Sequence[tuple[int, int]], near: Sequence[float], iterations: int
) -> Tensor:
    """Spread scores ``(B, C, H, W)`` over the neighbours at `steps` (dy, dx), alike in the pixels ``(B, 3, H, W)``.

    Both float32. `near` is what position adds to the weight of a neighbour.
    """
    batch, channels, height, width = scores.shape
    if not (scores.numel() and iterations):
        return scores
    table, constant = _table(tuple(steps), tuple(near), scores.device)
    blocks = triton.cdiv(height * width, _PIXELS)
    tile = min(_CHANNELS, triton.next_power_of_2(channels))
    pixels, scores = pixels.contiguous(), scores.contiguous()
    weights = scores.new_empty(batch, len(steps), height, width)
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
        _weigh[(blocks, batch)](pixels, weights, table, constant, height, width, len(steps), PIXELS=_PIXELS)
        for _ in range(iterations):
            spread = torch.empty_like(scores)
            _spread[(blocks, batch, triton.cdiv(channels, tile))](
                *(scores, spread, weights, table, channels, height, width, len(steps)), PIXELS=_PIXELS, CHANNELS=tile
            )
            scores = spread
    return scores


@lru_cache(maxsize=8)
def _table(steps: tuple[tuple[int, int], ...], near: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return (
            torch.tensor(steps, dtype=torch.int32, device=device),
            torch.tensor(near, dtype=torch.float32, device=device),
        )


@triton.jit
def _neighbour(table_at, k, y, x, height, width):  # type: ignore[no-untyped-def]
    """Where the neighbour k of the pixels lies; beyond an edge, on it."""
    there_y = tl.minimum(tl.maximum(y + tl.load(table_at + 2 * k), 0), height - 1)
    there_x = tl.minimum(tl.maximum(x + tl.load(table_at + 2 * k + 1), 0), width - 1)
    return there_y * width + there_x


@triton.jit
def _unlike(there, red_at, green_at, blue_at, red, green, blue, inside):  # type: ignore[no-untyped-def]
    """Colours of a neighbour less those given."""
    red = tl.load(red_at + there, mask=inside, other=0.0) - red
    green = tl.load(green_at + there, mask=inside, other=0.0) - green
    blue = tl.load(blue_at + there, mask=inside, other=0.0) - blue
    return red, green, blue


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(  # type: ignore[no-untyped-def]
    pixels_at, weights_at, table_at, near_at, height, width, count, PIXELS: tl.constexpr
):
    area = height * width
    place = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = place < area
    y = place // width
    x = place % width
    batch = tl.program_id(1).to(tl.int64)
    red_at = pixels_at + batch * 3 * area
    green_at = red_at + area
    blue_at = green_at + area
    weights_at += batch * count * area + place
    zero = tl.zeros((PIXELS,), tl.float32)

    red_mean, green_mean, blue_mean = zero, zero, zero
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        red, green, blue = _unlike(there, red_at, green_at, blue_at, zero, zero, zero, inside)
        red_mean, green_mean, blue_mean = red_mean + red, green_mean + green, blue_mean + blue
    red_mean, green_mean, blue_mean = red_mean / count, green_mean / count, blue_mean / count

    red_scale, green_scale, blue_scale = zero, zero, zero
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        red, green, blue = _unlike(there, red_at, green_at, blue_at, red_mean, green_mean, blue_mean, inside)
        red_scale, green_scale, blue_scale = (
            red_scale + red * red,
            green_scale + green * green,
            blue_scale + blue * blue,
        )
    red_scale = 1 / (0.3 * (tl.sqrt(red_scale / (count - 1)) + 1e-8))
    green_scale = 1 / (0.3 * (tl.sqrt(green_scale / (count - 1)) + 1e-8))
    blue_scale = 1 / (0.3 * (tl.sqrt(blue_scale / (count - 1)) + 1e-8))

    # Exponents are computed three times over, for a store must not be read back within a kernel.
    red_here, green_here, blue_here = _unlike(place, red_at, green_at, blue_at, zero, zero, zero, inside)
    best = zero - float("inf")
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        red, green, blue = _unlike(there, red_at, green_at, blue_at, red_here, green_here, blue_here, inside)
        red, green, blue = red * red_scale, green * green_scale, blue * blue_scale
        best = tl.maximum(best, -(red * red + green * green + blue * blue) / 3)
    total = zero
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        red, green, blue = _unlike(there, red_at, green_at, blue_at, red_here, green_here, blue_here, inside)
        red, green, blue = red * red_scale, green * green_scale, blue * blue_scale
        total += tl.exp(-(red * red + green * green + blue * blue) / 3 - best)
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        red, green, blue = _unlike(there, red_at, green_at, blue_at, red_here, green_here, blue_here, inside)
        red, green, blue = red * red_scale, green * green_scale, blue * blue_scale
        share = tl.exp(-(red * red + green * green + blue * blue) / 3 - best) / total
        tl.store(weights_at, share + tl.load(near_at + k), mask=inside)
        weights_at += area  # k * area would pass 32 bits for a large image


@triton.jit  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def]
    scores_at,
    spread_at,
    weights_at,
    table_at,
    channels,
    height,
    width,
    count,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    area = height * width
    place = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = place < area
    y = place // width
    x = place % width
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    both = (channel < channels)[:, None] & inside[None, :]
    plane = (batch * channels + channel)[:, None] * area
    weights_at += batch * count * area + place
    total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for k in range(count):
        there = _neighbour(table_at, k, y, x, height, width)
        weight = tl.load(weights_at, mask=inside, other=0.0)
        total += weight[None, :] * tl.load(scores_at + plane + there[None, :], mask=both, other=0.0)
        weights_at += area
    tl.store(spread_at + plane + place[None, :], total, mask=both)
