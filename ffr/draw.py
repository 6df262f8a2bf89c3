"""Draw label maps and CAMs, and keep label maps as indexed PNG: numpy alone; files need Pillow, an extra."""

import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ffr import _check

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

# Luminance rises from anchor to anchor, so the order survives print in grey and the common colour blindnesses.
_HEAT = np.array([(10, 8, 46), (86, 26, 124), (192, 52, 92), (246, 146, 42), (255, 242, 170)], dtype=np.float64)


def palette(num_labels: int = 256) -> Pixels:
    """Colours of PASCAL VOC: three bits of the index at a time, dealt to R, G and B from the highest bit down.

    Args:
        num_labels: how many, 1 to 256.

    Returns:
        ``(num_labels, 3)`` uint8; row 0 (background) is black, row 255 (ignore) is cream, (224, 224, 192).

    Raises:
        ValueError: if `num_labels` lies outside [1, 256].

    Example:
        >>> from ffr.draw import palette
        >>> palette()[[1, 15, 255]].tolist()  # aeroplane, person, ignore
        [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    _check.within("palette", at_least=1, at_most=256, whole=True, num_labels=num_labels)
    index = np.arange(num_labels)[:, None]
    colours = np.zeros((num_labels, 3), dtype=np.int64)
    for step in range(3):  # 8 bits are used up after three rounds of three
        colours |= (index >> (3 * step + np.arange(3)) & 1) << (7 - step)
    return colours.astype(np.uint8)


def colorize(label: Tensor | Array) -> Pixels:
    """Colour a label map by `palette`.

    Args:
        label: integers 0..255, ``(..., H, W)``, tensor or array.

    Returns:
        RGB, ``(..., H, W, 3)`` uint8.

    Raises:
        TypeError: if `label` holds no integers.
        ValueError: if a value lies outside 0..255.
    """
    return palette()[_labels("colorize", label)]


def overlay(image: Tensor, label: Tensor | Array, alpha: float = 0.5) -> Pixels:
    """Lay the colours of a label map over its image; background stays as it is, ignore is drawn in its own colour.

    Args:
        image: RGB ``(3, H, W)``, uint8 or float in [0, 1].
        label: integers 0..255, ``(H, W)``.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        RGB, ``(H, W, 3)`` uint8.

    Raises:
        TypeError: if `image` is no tensor or `label` holds no integers.
        ValueError: if the sizes differ, or a value or `alpha` is out of range.
    """
    _check.within("overlay", at_most=1.0, alpha=alpha)
    pixels, labels = _pixels("overlay", image), _labels("overlay", label)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"overlay: expected `label` of shape {pixels.shape[:2]} as `image`, got {labels.shape}.")
    colours, opacity = palette(), alpha * (np.arange(256) != 0)[:, None]
    if pixels.dtype != np.uint8:
        return _blend(pixels, colours[labels], opacity[labels])
    table = _blend(np.arange(256.0)[:, None, None], colours, opacity)  # every mixture there is: (value, label, channel)
    mixed = np.empty(pixels.shape, dtype=np.uint8)
    for row, line in enumerate(mixed):  # indices take eight times the memory of what they look up
        line[:] = table[pixels[row], labels[row][:, None], np.arange(3)]
    return mixed


def heatmap(cam: Tensor | Array, image: Tensor | None = None, alpha: float = 0.5) -> Pixels:
    """Colour one CAM from dark indigo (0) over purple, red and orange to pale yellow (1), alone or over its image.

    Args:
        cam: ``(h, w)`` in [0, 1].
        image: RGB ``(3, H, W)``, uint8 or float in [0, 1]; `cam` is stretched to it, bilinearly.
        alpha: opacity over `image`, in [0, 1].

    Returns:
        RGB, ``(h, w, 3)`` uint8, or ``(H, W, 3)`` with `image`.

    Raises:
        TypeError: if `image` is no tensor.
        ValueError: if a shape does not fit, or a value or `alpha` is out of range.
    """
    _check.within("heatmap", at_most=1.0, alpha=alpha)
    values = torch.as_tensor(cam, device="cpu").detach().double()
    _check.bind("heatmap", cam=(values, "h w"), remedy="Draw one class of one image at a time")
    if not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails too
        raise ValueError("heatmap: expected `cam` in [0, 1]. Pass it through ffr.cam.normalize_cam first.")
    pixels = None if image is None else _pixels("heatmap", image)
    if pixels is not None:
        values = F.interpolate(values[None, None], pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    anchors = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(values.numpy(), anchors, channel) for channel in _HEAT.T], axis=-1)
    return _blend(colours if pixels is None else pixels, colours, alpha)


def save_label(path: str | os.PathLike[str], label: Tensor | Array) -> None:
    """Write a label map as indexed PNG with `palette`: values kept exactly; the file appears whole or not at all.

    Args:
        path: ends in ``.png``; its folder exists.
        label: integers 0..255, ``(H, W)``.

    Raises:
        ImportError: without Pillow.
        TypeError: if `label` holds no integers.
        ValueError: if `label` has another rank or a value outside 0..255, or `path` another suffix.
    """
    image, target = _pillow("save_label"), Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"save_label: expected `path` to end in .png, got {target.name!r}. Rename it.")
    labels = _labels("save_label", label)
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(f"save_label: expected `label` of shape (H, W), got {labels.shape}. Save one image at a time.")
    picture = image.frombytes("P", labels.shape[::-1], labels.tobytes())
    picture.putpalette(palette().tobytes())
    part = target.with_name(f".{secrets.token_hex(8)}.part")  # same folder: a rename never crosses file systems
    try:
        picture.save(part, format="PNG")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def load_label(path: str | os.PathLike[str]) -> Pixels:
    """Read a label map from an indexed or 8-bit grey PNG.

    Args:
        path: the file.

    Returns:
        ``(H, W)`` uint8, the palette indices or grey values as stored.

    Raises:
        ImportError: without Pillow.
        ValueError: for other formats and modes, RGB above all: colours are not labels.
    """
    with _pillow("load_label").open(path) as picture:
        # Grey of 1, 2 or 4 bits is stretched to 0..255 by the decoder, which is not what was stored: refused as well.
        if (
            picture.format != "PNG"
            or picture.mode not in ("P", "L")
            or (picture.mode == "L" and picture.tile[0][3] != "L")
        ):
            raise ValueError(
                f"load_label: expected an indexed or 8-bit grey PNG, got {picture.format} of mode {picture.mode} "
                f"in {os.fspath(path)!r}. Convert its colours to label numbers first."
            )
        return np.array(picture, dtype=np.uint8)


def _labels(owner: str, label: Tensor | Array) -> Pixels:
    values = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    if values.dtype.kind not in "bui":
        raise TypeError(f"{owner}: expected `label` of an integer dtype, got {values.dtype}. Pass a label map.")
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"{owner}: expected `label` in 0..255, got {values.min()}..{values.max()}.")
    return values.astype(np.uint8)


def _pixels(owner: str, image: Tensor) -> Array:
    _check.bind(owner, image=(image, "3 H W"), remedy="Pass one RGB image, channels first")
    if image.dtype == torch.uint8:
        return image.detach().cpu().permute(1, 2, 0).numpy()
    values = image.detach().to("cpu", torch.float64).permute(1, 2, 0).numpy()
    if not image.is_floating_point() or not np.all(np.abs(values - 0.5) <= 0.501):  # resizing may overshoot a little
        raise ValueError(f"{owner}: expected `image` as uint8 or float in [0, 1]. Undo its normalisation first.")
    return values.clip(0, 1) * 255


def _blend(under: Array, over: Array, alpha: float | Array) -> Pixels:
    mixed: Pixels = np.rint(under + (over - under) * np.asarray(alpha)).astype(np.uint8)
    return mixed


def _pillow(owner: str) -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        said = f"{owner}: needs Pillow, which the extra `examples` brings."
        raise ImportError(f"{said} Run pip install '.[examples]' in a checkout of ffr.") from error
    return Image
