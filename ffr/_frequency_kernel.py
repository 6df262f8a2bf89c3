"""The band split on a CUDA GPU in one kernel: it reads the features once and writes both bands once.

Importing this file needs Triton; `ffr.frequency` does so on the first CUDA tensor that fits.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[Tensor, Tensor]
_TILE = 2**15  # most elements of one program: what 16 warps hold in registers in float32
_SIZES = (
    (11, 4),
    (12, 4),
    (12, 8),
    (13, 4),
    (13, 8),
    (13, 16),
    (14, 8),
    (14, 16),
    (15, 16),
)  # log2 of a tile, and its warps
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fits(features: Tensor, h: int, w: int) -> bool:
    """Whether the kernel takes these features: their dtype, and a grid of which a program holds enough channels."""
    channels = _TILE // (_padded(h) * _padded(w))
    # A program of tokens reads rows of so many channels: below eight it wastes most of what the memory delivers.
    enough = channels >= (8 if features.stride(1) != h * w else 1)
    # A long side needs more shared memory than there is, and the second axis of a launch ends at 65,535.
    launches = max(_padded(h), _padded(w)) <= 512 and len(features) <= 65_535
    # Offsets within an image are integers of 32 bits.
    reach = sum((size - 1) * stride for size, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    return features.dtype in _DTYPES and features.numel() > 0 and enough and launches and reach < 2**31


@torch.library.custom_op("ffr::split_bands", mutates_args=())
def split(features: Tensor, rows: Tensor, columns: Tensor) -> Pair:
    """Maps (B, D, h, w) or tokens (B, h w, D), and the projections (h, h) and (w, w), to both bands."""
    low, high = torch.empty_like(features), torch.empty_like(features)
    _launch(features, features, low, high, rows, columns, join=False)
    return low, high


@split.register_fake
def _(features: Tensor, rows: Tensor, columns: Tensor) -> Pair:
    return torch.empty_like(features), torch.empty_like(features)


@torch.library.custom_op("ffr::join_bands", mutates_args=())
def join(low: Tensor, high: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``high + P (low - high)``, the gradient of `split`."""
    out = torch.empty_like(low)
    _launch(low, high, out, out, rows, columns, join=True)
    return out


@join.register_fake
def _(low: Tensor, high: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.empty_like(low)


def _launch(
    first: Tensor, second: Tensor, low: Tensor, high: Tensor, rows: Tensor, columns: Tensor, *, join: bool
) -> None:
    h, w = len(rows), len(columns)
    batch, channels = first.shape[0], first.shape[1 if first.ndim == 4 else 2]
    rows_padded, columns_padded = _padded(h), _padded(w)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(channels, meta["TILE"] // (rows_padded * columns_padded)), batch

    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        _kernel[grid](
            *(first, second, low, high, rows, columns, channels, h, w),
            *(stride for tensor in (first, second, low, high) for stride in _strides(tensor, w)),
            H=rows_padded,
            W=columns_padded,
            JOIN=join,
            TOKENS=first.stride(1 if first.ndim == 4 else 2) == 1,
            PRECISION=_precision(first.dtype),
            WIDEN=_INTERPRETED,
        )


def _precision(dtype: torch.dtype) -> str:
    """How a product multiplies; half precision has one way.

    By count of operations, float32 without tensor cores takes longer than the memory does. Each number as the sum of
    two of TF32, in three products, has the error of float32 (emulated on a CPU). Triton has that for NVIDIA alone.
    """
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _strides(features: Tensor, w: int) -> tuple[int, ...]:
    """Of batch, channel, row and column."""
    if features.ndim == 4:
        return features.stride()
    batch, token, channel = features.stride()
    return batch, channel, w * token, token


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())  # 16: the least side of a product


def _choices() -> list[Any]:
    # Tried once for a padded grid, layout, dtype and direction; the interpreter has nothing to choose between.
    if _INTERPRETED:
        return [triton.Config({"TILE": _TILE})]
    return [triton.Config({"TILE": 2**size}, num_warps=warps) for size, warps in _SIZES]


def _prune(choices: list[Any], arguments: dict[str, Any], **settings: Any) -> list[Any]:
    """Those of which a program holds a channel at least."""
    return [choice for choice in choices if choice.kwargs["TILE"] >= settings["H"] * settings["W"]]


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=_choices(), key=["H", "W", "JOIN", "TOKENS"], prune_configs_by={"early_config_prune": _prune}
)
@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    first_at,
    second_at,
    low_at,
    high_at,
    rows_at,
    columns_at,
    channels,
    h,
    w,
    first_b,
    first_c,
    first_h,
    first_w,
    second_b,
    second_c,
    second_h,
    second_w,
    low_b,
    low_c,
    low_h,
    low_w,
    high_b,
    high_c,
    high_h,
    high_w,
    H: tl.constexpr,
    W: tl.constexpr,
    JOIN: tl.constexpr,
    TOKENS: tl.constexpr,  # for the choice of a tile alone
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
    TILE: tl.constexpr,
):
    C: tl.constexpr = TILE // (H * W)
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * C + tl.arange(0, C)[None, None, :]

    first_at += batch * first_b
    second_at += batch * second_b
    low_at += batch * low_b
    high_at += batch * high_b
    kind = low_at.dtype.element_ty

    # Sixteen rows at a time, and of these sixteen columns: operands of a whole product would not fit into registers.
    step = tl.arange(0, 16)
    i = tl.arange(0, H)
    j = tl.arange(0, W)
    y = tl.zeros((H, W * C), tl.float32)
    for top in range(0, h, 16):
        its_row = top + step
        z = tl.zeros((W, 16 * C), tl.float32)
        for left in range(0, w, 16):
            its_column = left + step
            at_row, at_column = its_row[None, :, None], its_column[:, None, None]
            there = (at_row < h) & (at_column < w) & (channel < channels)  # (16 columns, 16 rows, C)
            x = tl.load(first_at + at_row * first_h + at_column * first_w + channel * first_c, mask=there, other=0.0)
            if JOIN:
                other = tl.load(
                    second_at + at_row * second_h + at_column * second_w + channel * second_c, mask=there, other=0.0
                )
                x = x.to(tl.float32) - other.to(tl.float32)
            both = (j[:, None] < w) & (its_column[None, :] < w)
            q = tl.load(columns_at + j[:, None] * w + its_column[None, :], mask=both, other=0.0)
            x = tl.reshape(x.to(tl.float32), (16, 16 * C)).to(kind)
            if WIDEN:
                q, x = q.to(tl.float32), x.to(tl.float32)
            z = tl.dot(q, x, z, input_precision=PRECISION)
        z = tl.reshape(tl.permute(tl.reshape(z, (W, 16, C)), (1, 0, 2)), (16, W * C)).to(kind)
        both = (i[:, None] < h) & (its_row[None, :] < h)
        p = tl.load(rows_at + i[:, None] * h + its_row[None, :], mask=both, other=0.0)
        if WIDEN:
            p, z = p.to(tl.float32), z.to(tl.float32)
        y = tl.dot(p, z, y, input_precision=PRECISION)

    row, column = i[:, None, None], j[None, :, None]
    inside = (row < h) & (column < w) & (channel < channels)  # (H, W, C)
    y = tl.reshape(y, (H, W, C))
    low_at += row * low_h + column * low_w + channel * low_c
    # The features, or the high band, once more, now from the cache
    if JOIN:
        x = tl.load(second_at + row * second_h + column * second_w + channel * second_c, mask=inside, other=0.0)
        tl.store(low_at, (x.to(tl.float32) + y).to(kind), mask=inside)
    else:
        x = tl.load(first_at + row * first_h + column * first_w + channel * first_c, mask=inside, other=0.0)
        low = y.to(kind)
        tl.store(low_at, low, mask=inside)
        high = (x.to(tl.float32) - low.to(tl.float32)).to(kind)
        tl.store(high_at + row * high_h + column * high_w + channel * high_c, high, mask=inside)
