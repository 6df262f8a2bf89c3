"""The band split on a CUDA GPU in one kernel: it reads the features once and writes both bands once.

Importing this file needs Triton; `ffr.frequency` does so on the first CUDA tensor that fits.

By count (`benchmarks/instructions.py`) the instructions for each element limit such a kernel first. So offsets and
masks are made for as many neighbours in memory as one load takes, a program holds whole maps where it can, and float32
is cut into numbers of TF32 by hand.
"""

import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Matrix = np.ndarray[Any, np.dtype[np.float64]]
_TILE = 2**15  # most elements of one program: what 16 warps hold in registers
# log2 of a tile, its warps, its rows that are multiplied at once, and the most registers of a thread: fewer let more
# programs run beside each other, so that one loads while another multiplies.
_CHOICES = (
    (12, 4, 32, None),
    (13, 4, 32, 128),
    (13, 8, 32, None),
    (13, 8, 32, 128),
    (14, 8, 32, None),
    (14, 8, 32, 128),
    (15, 16, 32, None),
    (12, 4, 64, None),
    (12, 4, 64, 128),
    (13, 8, 64, None),
    (14, 8, 64, None),
    (14, 8, 64, 128),
    (15, 16, 64, None),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOCK = threading.Lock()  # Triton's autotuner keeps its arguments in itself, and a backward pass has its own threads
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fits(features: Tensor, h: int, w: int) -> bool:
    """Whether the kernel takes these features: their dtype, and a grid of which a program holds enough channels."""
    channels = _TILE // (_padded(h) * _padded(w))
    # A program of tokens reads rows of so many channels: below eight it wastes most of what the memory delivers.
    enough = channels >= (8 if features.stride(1) != h * w else 1)
    # A longer side spills registers until the products are faster, and the second axis of a launch ends at 65,535.
    launches = max(h, w) <= 128 and len(features) <= 65_535
    # Triton 3.1 ends the process over float32 whose columns are multiplied in steps.
    known = features.dtype != torch.float32 or w <= 64 or not triton.__version__.startswith("3.1.")
    # Offsets within an image are integers of 32 bits.
    reach = sum((size - 1) * stride for size, stride in zip(features.shape[1:], features.stride()[1:], strict=True))
    return features.dtype in _DTYPES and features.numel() > 0 and enough and launches and known and reach < 2**31


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
    if _layout(high, w) != _layout(low, w) or not fits(high, h, w):
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
    settings = constants(h, w, tokens, vector, same=strides == strides[:3] * 4)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(channels, meta["TILE"] // (meta["H"] * meta["W"])), batch

    with _LOCK, torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        _kernel[grid](
            *(*tensors, rows, columns, channels, h, w),
            *(stride // vector for stride in strides),
            JOIN=join,
            **settings,
        )


def constants(h: int, w: int, tokens: bool, vector: int, *, same: bool = True) -> dict[str, Any]:
    """What the kernel is compiled for, but for its direction and the choices."""
    columns = _padded(w)
    return {
        "H": _padded(h),
        "W": columns,
        "TOKENS": tokens,
        "VECTOR": vector,
        "SAME": same,  # all four tensors have the strides of the first
        "COLUMNS": columns if columns <= 64 else 32,
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
    # What is repeated in memory, such as the gradient of a sum, has no order that its outputs could keep.
    repeated = any(step == 0 and size > 1 for step, size in zip(features.stride(), features.shape, strict=True))
    return features if _layout(features, w) and not repeated else features.contiguous()


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
        return [triton.Config({"TILE": _TILE, "ROWS": 32, "AGAIN": False})]
    return [
        triton.Config(
            {"TILE": 2**size, "ROWS": rows, "AGAIN": most is not None}, num_warps=warps, num_stages=1, maxnreg=most
        )
        for size, warps, rows, most in _CHOICES
    ]


def pruned(all_choices: list[Any], arguments: dict[str, Any], **settings: Any) -> list[Any]:
    """Those of which a program holds a channel at least: whole maps up to 64 rows, and 32 at once of longer ones."""
    height, area = settings["H"], settings["H"] * settings["W"]

    def promising(choice: Any) -> bool:
        tile, rows, again = (choice.kwargs[name] for name in ("TILE", "ROWS", "AGAIN"))
        if height > 64:  # in steps a thread needs many elements for as many loads at once
            return bool(tile >= area and rows == 32 and tile == 64 * 32 * choice.num_warps and not again)
        return bool(tile >= area and rows == max(height, 32) and (tile < _TILE or rows == 64))

    return [choice for choice in all_choices if promising(choice)]


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=choices(), key=["H", "W", "JOIN", "TOKENS", "VECTOR"], prune_configs_by={"early_config_prune": pruned}
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
    SAME: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    AGAIN: tl.constexpr,  # read the features once more at the end, from the cache, instead of keeping them
):
    C: tl.constexpr = TILE // (H * W)
    STEP: tl.constexpr = ROWS if ROWS < H else H
    batch = tl.program_id(1).to(tl.int64) * VECTOR
    first_channel = tl.program_id(0) * C
    channel = first_channel + tl.arange(0, C)[None, :, None]
    if SAME:
        second_b, second_s, second_h = first_b, first_s, first_h
        low_b, low_s, low_h = first_b, first_s, first_h
        high_b, high_s, high_h = first_b, first_s, first_h
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
            z = _multiply(x, columns_at, its_column, j, z, W, WIDEN)
        z = tl.reshape(tl.permute(tl.reshape(z, (STEP, C, W)), (1, 2, 0)), (C * W, STEP)).to(kind)
        y = _multiply(z, rows_at, its_row, i, y, H, WIDEN)

    y = tl.permute(tl.reshape(y, (C, W, H)), (2, 0, 1))
    row, column = i[:, None, None], j[None, None, :]
    inside = (row < h) & (column < w) & (channel < channels)  # (H, C, W)
    low_at += _offset(row, channel, column, low_h, low_s, TOKENS, VECTOR)
    # The compiler takes two loads of one place for one, and keeps the values, unless they differ in something.
    EVICT: tl.constexpr = "evict_first" if AGAIN else ""
    if JOIN:
        second_at += _offset(row, channel, column, second_h, second_s, TOKENS, VECTOR)
        x = tl.load(second_at, inside, 0.0, eviction_policy=EVICT)
        tl.store(low_at, (x.to(tl.float32) + y).to(kind), inside)
    else:
        first_at += _offset(row, channel, column, first_h, first_s, TOKENS, VECTOR)
        x = tl.load(first_at, inside, 0.0, eviction_policy=EVICT)
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
    x, matrix_at, rows, columns, total, SIZE: tl.constexpr, WIDEN: tl.constexpr
):
    """``total + x @ matrix``, of rows and columns of a matrix that is symmetric; float32 with the error of float32."""
    at = matrix_at + rows[:, None] + columns[None, :] * SIZE
    matrix = tl.load(at)
    if x.dtype == tl.float32:
        # Tensor cores read eleven bits. Of both factors as sums of two such numbers, all but the least product count.
        # The first is rounded, not cut: its rest then has one bit too many, not two, and of either sign.
        rest = tl.load(at + SIZE * SIZE)
        rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        total = tl.dot(rounded, rest, total, input_precision="tf32")
        total = tl.dot(x - rounded, matrix, total, input_precision="tf32")
        return tl.dot(rounded, matrix, total, input_precision="tf32")
    if WIDEN:
        x, matrix = x.to(tl.float32), matrix.to(tl.float32)
    return tl.dot(x, matrix, total)
