"""What every part needs at its door: the one wording of a shape, dtype or range error, and autocast off.

Looks at metadata only: here no tensor value is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def bind(
    owner: str,
    /,
    *,
    sizes: Mapping[str, int] | None = None,
    remedy: str = "",
    **tensors: tuple[Tensor, str],
) -> dict[str, int]:
    """Match tensors against axis patterns such as ``"B D h w"`` and return the size of every axis.

    A name stands for one size in all patterns of the call; a number stands for itself; ``_`` fits anything.

    Args:
        owner: the public function, first word of the message.
        sizes: axes known beforehand.
        remedy: last sentence of the message, in the imperative.
        **tensors: argument name -> (tensor, pattern).

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if a shape does not fit.
    """
    known = dict(sizes or {})
    for name, (tensor, pattern) in tensors.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            convert = "" if tensor is None else f"Convert it with torch.as_tensor(np.asarray({name}))"
            if name == "labels" and tensor is not None:  # so often class indices that the shape comes first
                convert = "Pass multi-hot rows, (B, K): 1 for every class of the image, else 0"
            raise TypeError(f"{owner}: expected `{name}` to be a torch.Tensor, got {kind}.{_sentence(convert)}")
        axes = pattern.split()
        fits = tensor.ndim == len(axes)
        found: dict[str, int] = {}
        if fits:
            for axis, size in zip(axes, tensor.shape, strict=True):
                want = int(axis) if axis.isdigit() else known.get(axis, found.get(axis, size))
                fits = fits and (axis == "_" or size == want)
                if not axis.isdigit() and axis != "_":
                    found[axis] = size
        if not fits:
            shown = ", ".join(f"{axis}={known[axis]}" if axis in known else axis for axis in axes)
            raise ValueError(
                f"{owner}: expected `{name}` of shape ({shown}), got {tuple(tensor.shape)}.{_sentence(remedy)}"
            )
        known.update(found)
    return known


def floating(owner: str, /, **tensors: Tensor) -> None:
    """Refuse tensors without a floating dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(
                f"{owner}: expected `{name}` of a floating dtype, got {tensor.dtype}. Convert it with .float()."
            )


def pixels(owner: str, /, **images: Tensor) -> None:
    """Refuse images that are neither uint8 nor floating."""
    for name, tensor in images.items():
        if not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
            raise TypeError(
                f"{owner}: expected `{name}` as uint8 or float in [0, 1], got {tensor.dtype}. Use .to(torch.uint8) for "
                "0..255."
            )


def integer(owner: str, /, **tensors: Tensor) -> None:
    """Refuse tensors without an integer dtype."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{owner}: expected `{name}` of an integer dtype, got {tensor.dtype}. Use .long().")


def boolean(owner: str, /, **tensors: Tensor) -> None:
    """Refuse tensors that are not bool."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            raise TypeError(f"{owner}: expected `{name}` of dtype torch.bool, got {tensor.dtype}. Use `{name} > 0.5`.")


def one_of(owner: str, name: str, value: object, choices: tuple[object, ...], /) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}.")


def within(
    owner: str,
    /,
    *,
    at_least: float = 0.0,
    at_most: float = float("inf"),
    whole: bool = False,
    remedy: str = "",
    **values: float,
) -> None:
    """Refuse numbers outside [at_least, at_most], NaN included, and what is no number; for `whole`, no integer."""
    for name, value in values.items():
        if isinstance(value, Tensor) or not _number(value, whole):
            wanted = "an integer" if whole else "a number"
            if isinstance(value, Tensor):  # its repr would read its values
                shown = f"a tensor of shape {tuple(value.shape)}"
                read = "A tensor of one value is read by .item(); for a value an image, call image by image"
            else:
                shown, read = repr(value), ""
            raise TypeError(
                f"{owner}: expected `{name}` to be {wanted}, got {shown}.{_sentence(read)}{_sentence(remedy)}"
            )
        if not at_least <= value <= at_most:
            raise ValueError(
                f"{owner}: expected `{name}` in [{at_least:g}, {at_most:g}], got {value!r}.{_sentence(remedy)}"
            )


def positive(owner: str, /, **values: float) -> None:
    """Refuse numbers that are not above 0, or infinite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}: expected `{name}` > 0, got {value!r}.")


def pair(owner: str, /, **values: tuple[int, int]) -> None:
    """Refuse what is no (height, width)."""
    for name, value in values.items():
        if isinstance(value, (int, float)) or len(value) != 2 or not all(_number(side, whole=True) for side in value):
            raise ValueError(f"{owner}: expected `{name}` of two integers, (height, width), got {value!r}.")
        if min(value) < 1:
            raise ValueError(f"{owner}: expected `{name}` of at least 1 x 1, got {value!r}.")


def factors(owner: str, scales: Sequence[float], /) -> None:
    """Refuse no scales, and such as are not above 0."""
    if not isinstance(scales, Sequence):
        raise TypeError(
            f"{owner}: expected `scales` to be a tuple of factors, such as (1.0, 0.5), got {type(scales).__name__}."
        )
    if not scales:
        raise ValueError(f"{owner}: expected `scales` with at least one factor, got {scales!r}.")
    for scale in scales:
        within(owner, scales=scale, at_least=1e-3, at_most=100.0)


def ranks(owner: str, all_reduce: Callable[[Tensor], Tensor] | None, world_size: int, /) -> None:
    """Refuse a number of ranks that nothing sums over: it would multiply the loss."""
    within(owner, at_least=1, whole=True, world_size=world_size)
    if all_reduce is None and world_size != 1:
        raise ValueError(
            f"{owner}: expected `all_reduce` with `world_size` {world_size}, got None. Pass both, or neither: without "
            "a sum over ranks each counts alone."
        )


def label_names(owner: str, /, *, num_classes: int, ignore_index: int) -> None:
    """Refuse an `ignore_index` that is the label of background or of a class."""
    if 0 <= ignore_index <= num_classes:
        raise ValueError(
            f"{owner}: expected `ignore_index` to be no label in 0..{num_classes} (K = {num_classes} classes), got "
            f"{ignore_index}. Use a negative number, or one above."
        )


def reduced(owner: str, counts: Tensor, all_reduce: Callable[[Tensor], Tensor] | None, world_size: int, /) -> Tensor:
    """The counts summed over ranks, where there are any; refuses a function that sums in place and gives nothing."""
    ranks(owner, all_reduce, world_size)
    total = counts if all_reduce is None else all_reduce(counts)
    if not isinstance(total, Tensor):
        raise TypeError(
            f"{owner}: expected `all_reduce` to return the sum, got {type(total).__name__}. Let it copy its argument, "
            "reduce the copy in place (torch.distributed.all_reduce) and return that."
        )
    return total


def tokens(
    owner: str, /, *, grid: tuple[int, int] | None = None, sizes: Mapping[str, int] | None = None, **features: Tensor
) -> tuple[list[Tensor], dict[str, int]]:
    """Bring feature maps (B, D, h, w), or tokens (B, N, D) with a grid, to tokens, as views.

    Returns:
        the tensors as (B, N, D), all of one shape, and the sizes of B, D, h and w.
    """
    known = dict(sizes or {})
    out = []
    if grid is not None:
        pair(owner, grid=grid)
    for name, tensor in features.items():
        if isinstance(tensor, Tensor) and tensor.ndim == 3 and grid is not None:
            height, width = grid
            remedy = f"`grid` is {height} x {width} = {height * width} tokens: drop prefix tokens, or correct `grid`"
            if tensor.shape[1] == height * width:  # another axis is wrong, and the shapes say which
                remedy = ""
            elif tensor.shape[2] == height * width:
                remedy = "The channels lie before the tokens: bring them to (B, N, D) with .transpose(1, 2)"
            elif 0 <= (prefix := tensor.shape[0] - height * width) <= 8 < abs(tensor.shape[1] - height * width):
                remedy = "The tokens lie first: bring them to (B, N, D) with .transpose(0, 1)"
                remedy += f", without {prefix} prefix token(s)" if prefix else ""
            bound = bind(owner, sizes={**known, "N": height * width}, remedy=remedy, **{name: (tensor, "B N D")})
            known.update(B=bound["B"], D=bound["D"], h=height, w=width)
            out.append(tensor)
        else:
            remedy = "For tokens (B, N, D) pass grid=(h, w)" if getattr(tensor, "ndim", 0) == 3 else ""
            known = bind(owner, sizes=known, remedy=remedy, **{name: (tensor, "B D h w")})
            if grid is not None and (known["h"], known["w"]) != tuple(grid):
                remedy = "Correct `grid`, or leave it out for maps"
                if tensor.shape[1:3] == tuple(grid):
                    remedy = "The channels lie last: bring them to (B, D, h, w) with .permute(0, 3, 1, 2)"
                raise ValueError(
                    f"{owner}: expected `grid` ({known['h']}, {known['w']}) as in `{name}`, got {tuple(grid)}."
                    f"{_sentence(remedy)}"
                )
            out.append(tensor.flatten(2).transpose(1, 2))
        floating(owner, **{name: tensor})
    return out, known


def maps(owner: str, features: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Bring tokens (B, N, D) with a grid, or feature maps, to feature maps (B, D, h, w), as a view."""
    (rows,), sizes = tokens(owner, grid=grid, features=features)
    return (
        features if features.ndim == 4 else rows.transpose(1, 2).reshape(sizes["B"], sizes["D"], sizes["h"], sizes["w"])
    )


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operators keep the dtype of `x`; torch refuses to name autocast for the device "meta"."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _number(value: object, whole: bool) -> bool:
    # The types come first for torch.compile, whose numbers are symbols; those of numpy are neither.
    if isinstance(value, int if whole else (int, float)):
        return True
    return hasattr(value, "__index__" if whole else "__float__")


def _sentence(remedy: str) -> str:
    return f" {remedy.rstrip('.')}." if remedy else ""
