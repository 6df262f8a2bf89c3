"""The band split on a CUDA GPU in one kernel: it reads the features once and writes both bands once.

Importing this file needs Triton; `ffr.frequency` does so on the first CUDA tensor that fits.

What limits such a kernel is the number of instructions for each element, long before the arithmetic. So offsets and
masks are made for as many neighbours in memory as one load takes, a program holds whole maps where it can, and float32
is cut into numbers of TF32 by hand.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Matrix = np.ndarray[Any, np.dtype[np.float64]]
_TILE = 2**15  # most elements of one program: what 16 warps hold in registers in float32
# log2 of a tile, its warps, and its rows that are multiplied at once
_CHOICES = (
    (11, 4, 32),
    (12, 4, 32),
    (13, 4, 32),
    (13, 8, 32),
    (14, 8, 32),
    (14, 16, 32),
    (15, 16, 32),
    (12, 4, 64),
    (13, 8, 64),
    (14, 8, 64),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fits(features: Tensor, h: int, w: int) -> bool:
    """Whether the kernel takes these features: their dtype, and a grid of which a program holds enough channels."""
    channels = _TILE // (_padded(h) * _padded(w))
    # A program of tokens reads rows of so many channels: below eight it wastes most of what the memory delivers.
    enough = channels >= (8 if features.stride(1) != h * w else 1)
    # A longer side spills registers until the products are faster, and the second axis of a launch ends at 65,535.
    launches = max(h, w) <= 128 and len(features) <= 65_535
    # Offsets within an image are integers of 32 bits.
    reach = sum((size - 1) * stride for size, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    return features.dtype in _DTYPES and features.numel() > 0 and enough and launches and reach < 2**31


@torch.library.custom_op("ffr::split_bands", mutates_args=())
def split(features: Tensor, rows: Tensor, columns: Tensor, h: int, w: int) -> Pair:
    """Maps (B, D, h, w), or tokens (B, h w, D), to both bands; `rows` and `columns` are `operand` on the device."""
    features = _dense(features, w)
    low, high = torch.empty_like(features), torch.empty_like(features)
    _launch((features, features, low, high), rows, columns, h, w, join=False)
    return low, high


@split.register_fake
def _(features: Tensor, rows: Tensor, columns: Tensor, h: int, w: int) -> Pair:
    features = _dense(features, w)
    return torch.empty_like(features), torch.empty_like(features)


@torch.library.custom_op("ffr::join_bands", mutates_args=())
def join(low: Tensor, high: Tensor, rows: Tensor, columns: Tensor, h: int, w: int) -> Tensor:
    """``high + P (low - high)``, the gradient of `split`."""
    low = _dense(low, w)
    out = torch.empty_like(low)
    if _layout(high, w) != _layout(low, w):
        high = torch.empty_like(low).copy_(high)
    _launch((low, high, out, out), rows, columns, h, w, join=True)
    return out


@join.register_fake
def _(low: Tensor, high: Tensor, rows: Tensor, columns: Tensor, h: int, w: int) -> Tensor:
    return torch.empty_like(_dense(low, w))


def _launch(tensors: Sequence[Tensor], rows: Tensor, columns: Tensor, h: int, w: int, *, join: bool) -> None:
    first = tensors[0]
    batch, channels = first.shape[0], first.shape[1 if first.ndim == 4 else 2]
    tokens = _layout(first, w) == "tokens"
    strides = []
    for tensor in tensors:
        of_batch, of_channel, of_row, of_column = _strides(tensor, w)
        strides += [of_batch, of_column if tokens else of_channel, of_row]  # that of the other is 1
    # All are multiples of `vector`; the kernel multiplies by it, so that the compiler knows what one load may take.
    vector = math.gcd(16, channels if tokens else w, *strides)
    settings = constants(h, w, tokens, vector)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(channels, meta["TILE"] // (meta["H"] * meta["W"])), batch

    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        _kernel[grid](
            *(*tensors, rows, columns, channels, h, w),
            *(stride // vector for stride in strides),
            JOIN=join,
            **settings,
        )


def constants(h: int, w: int, tokens: bool, vector: int) -> dict[str, Any]:
    """What the kernel is compiled for, but for its direction and the choices."""
    columns = _padded(w)
    return {
        "H": _padded(h),
        "W": columns,
        "TOKENS": tokens,
        "VECTOR": vector,
        "COLUMNS": columns if columns <= 64 else 32,
        # Triton has TF32 for NVIDIA alone; elsewhere products of float32 are exact, and three of them as good as one.
        "PRECISION": "tf32" if torch.version.hip is None else "ieee",
        "WIDEN": _INTERPRETED,
    }


def operand(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    """A projection as the kernel reads it, padded with zeros; for float32 as two matrices of TF32, its sum."""
    matrix = np.pad(matrix, (0, _padded(len(matrix)) - len(matrix)))
    return np.stack([_tf32(matrix), _tf32(matrix - _tf32(matrix))]) if dtype == torch.float32 else matrix


def _tf32(matrix: Matrix) -> Matrix:
    """Rounded to the eleven bits of TF32."""
    bits = matrix.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64)


def _dense(features: Tensor, w: int) -> Tensor:
    return features if _layout(features, w) else features.contiguous()


def _layout(features: Tensor, w: int) -> str:
    """Which lie side by side in memory: the channels ("tokens"), the columns ("maps"), or neither ("")."""
    _, channel, _, column = _strides(features, w)
    if channel == 1 and column != 1:
        return "tokens"
    return "maps" if column == 1 or w == 1 else ""


def _strides(features: Tensor, w: int) -> tuple[int, ...]:
    """Of batch, channel, row and column."""
    if features.ndim == 4:
        return features.stride()
    batch, token, channel = features.stride()
    return batch, channel, w * token, token


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())  # 16: the least side of a product


def choices() -> list[Any]:
    """Of tile, warps and rows."""
    # Tried once for a padded grid, layout, dtype and direction; the interpreter has nothing to choose between.
    if _INTERPRETED:
        return [triton.Config({"TILE": _TILE, "ROWS": 32})]
    return [
        triton.Config({"TILE": 2**size, "ROWS": rows}, num_warps=warps, num_stages=1) for size, warps, rows in _CHOICES
    ]


def pruned(all_choices: list[Any], arguments: dict[str, Any], **settings: Any) -> list[Any]:
    """Those of which a program holds a channel at least, and its projection fits into shared memory."""
    height, area = settings["H"], settings["H"] * settings["W"]

    def promising(choice: Any) -> bool:
        tile, rows = choice.kwargs["TILE"], choice.kwargs["ROWS"]
        many = tile == 64 * 32 * choice.num_warps  # in steps a thread needs more elements for as many loads at once
        return bool(tile >= area and (rows == height == 64 or (rows == 32 and (height <= 32 or many))))

    return [choice for choice in all_choices if promising(choice)]


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=choices(), key=["H", "W", "JOIN", "TOKENS"], prune_configs_by={"early_config_prune": pruned}
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
    first_s,
    first_h,
    second_b,
    second_s,
    second_h,
    low_b,
    low_s,
    low_h,
    high_b,
    high_s,
    high_h,
    H: tl.constexpr,
    W: tl.constexpr,
    JOIN: tl.constexpr,
    TOKENS: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    C: tl.constexpr = TILE // (H * W)
    STEP: tl.constexpr = ROWS if ROWS < H else H
    batch = tl.program_id(1).to(tl.int64) * VECTOR
    first_channel = tl.program_id(0) * C
    channel = first_channel + tl.arange(0, C)[None, :, None]
    if TOKENS:
        channels = channels // VECTOR * VECTOR
    else:
        w = w // VECTOR * VECTOR

    first_at += batch * first_b
    second_at += batch * second_b
    low_at += batch * low_b
    high_at += batch * high_b
    kind = low_at.dtype.element_ty

    i = tl.arange(0, H)
    j = tl.arange(0, W)
    y = tl.zeros((C * W, H), tl.float32)
    for top in range(0, H if STEP == H else h, STEP):
        its_row = top + tl.arange(0, STEP)
        z = tl.zeros((STEP * C, W), tl.float32)
        for left in range(0, W if COLUMNS == W else w, COLUMNS):
            its_column = left + tl.arange(0, COLUMNS)
            row, column = its_row[:, None, None], its_column[None, None, :]
            there = (row < h) & (column < w) & (channel < channels)  # (STEP, C, COLUMNS)
            x = tl.load(first_at + _offset(row, channel, column, first_h, first_s, TOKENS, VECTOR), there, 0.0)
            if JOIN:
                other = tl.load(
                    second_at + _offset(row, channel, column, second_h, second_s, TOKENS, VECTOR), there, 0.0
                )
                x = (x.to(tl.float32) - other.to(tl.float32)).to(kind)
            x = tl.reshape(x, (STEP * C, COLUMNS))
            z = _multiply(x, columns_at, its_column, j, z, W, PRECISION, WIDEN)
        z = tl.reshape(tl.permute(tl.reshape(z, (STEP, C, W)), (1, 2, 0)), (C * W, STEP)).to(kind)
        y = _multiply(z, rows_at, its_row, i, y, H, PRECISION, WIDEN)

    y = tl.permute(tl.reshape(y, (C, W, H)), (2, 0, 1))
    row, column = i[:, None, None], j[None, None, :]
    inside = (row < h) & (column < w) & (channel < channels)  # (H, C, W)
    low_at += _offset(row, channel, column, low_h, low_s, TOKENS, VECTOR)
    # The features, or the high band, once more, now from the cache
    if JOIN:
        x = tl.load(second_at + _offset(row, channel, column, second_h, second_s, TOKENS, VECTOR), inside, 0.0)
        tl.store(low_at, (x.to(tl.float32) + y).to(kind), inside)
    else:
        x = tl.load(first_at + _offset(row, channel, column, first_h, first_s, TOKENS, VECTOR), inside, 0.0)
        low = y.to(kind)
        tl.store(low_at, low, inside)
        high = (x.to(tl.float32) - low.to(tl.float32)).to(kind)
        tl.store(high_at + _offset(row, channel, column, high_h, high_s, TOKENS, VECTOR), high, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _offset(row, channel, column, stride_h, stride_s, TOKENS: tl.constexpr, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    if TOKENS:
        return (row * stride_h + column * stride_s) * VECTOR + channel
    return (row * stride_h + channel * stride_s) * VECTOR + column


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, matrix_at, rows, columns, total, SIZE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):
    """``total + x @ matrix``, of rows and columns of a matrix that is symmetric; float32 with the error of float32."""
    at = matrix_at + rows[:, None] + columns[None, :] * SIZE
    matrix = tl.load(at)
    if x.dtype == tl.float32:
        # Tensor cores read eleven bits. Of both factors as sums of two such numbers, all but the least product count.
        # The first is rounded, not cut: its rest then has one bit too many, not two, and of either sign.
        rest = tl.load(at + SIZE * SIZE)
        rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.dot(rounded, rest, total, input_precision=PRECISION)
        total = tl.dot(x - rounded, matrix, total, input_precision=PRECISION)
        return tl.dot(rounded, matrix, total, input_precision=PRECISION)
    if WIDEN:
        x, matrix = x.to(tl.float32), matrix.to(tl.float32)
    return tl.dot(x, matrix, total)
