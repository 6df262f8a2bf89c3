"""One page that shows what each step of the method does to an image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import FFR, draw
from ffr.cam import normalize_cam, to_image
from ffr.framework import Outputs
from ffr.frequency import passed
from ffr.prototypes import class_prototypes
from ffr.rectification import RectificationLoss
from ffr.refine import refine_label

COLUMNS = (
    ("image", "the class of the row\nis named on the left"),
    ("spectrum", "frequencies of the\nfeatures, log scale;\nbox: low band, mu {mu:g}"),
    ("CAM", "where the classifier\nsees the class:\ndark no, bright yes"),
    ("low-band CAM", "the same, from the\nlow frequencies alone"),
    ("high-band CAM", "from the high ones\nalone; one scale\nfor all three"),
    ("selected tokens", "similarity to the class\nchanges when the high\nband is dropped"),
    ("pseudo label", "the CAMs, refined by\ncolour: what the head\nis trained on"),
    ("prediction", "of the trained head,\nfrom the image alone"),
    ("truth", "for scoring only,\nnever trained on"),
)
UNDECIDED = "undecided, not trained on"


@torch.no_grad()
def steps_of(
    model: FFR,
    images: Tensor,
    labels: Tensor,
    *,
    high: float,
    low: float,
    rectification: RectificationLoss,
    refinement: nn.Module,
) -> dict[str, Tensor]:
    """The intermediate results that the picture shows, on the CPU."""
    size = (images.shape[2], images.shape[3])
    patch = model.encoder.patch_size
    out = model.outputs(images)
    vectors, valid = class_prototypes(out.final, normalize_cam(out.cam, labels=labels), labels)
    cam = normalize_cam(to_image(out.cam, size, patch), labels=labels)
    results = {
        "bands": band_cams(model, out),
        "spectrum": spectrum_of(out.final),
        "selected": rectification.select(features=out.final, low=out.low, prototypes=vectors, valid=valid),
        "pseudo": refine_label(images, cam, labels, high=high, low=low, refinement=refinement),
        "prediction": to_image(out.seg, size, patch).argmax(1),
    }
    return {name: value.cpu() for name, value in results.items()}


def band_cams(model: FFR, out: Outputs) -> Tensor:
    """CAMs of X, X_low and X_high, (3, B, K, h, w): W times each, ReLU, one common scale per image and class."""
    bands = torch.stack([out.cam, model.classifier.cam(out.low), model.classifier.cam(out.high)]).relu()
    scale = bands.amax((0, 3, 4), keepdim=True)
    return bands / torch.where(scale > 0, scale, 1)


def spectrum_of(features: Tensor) -> Tensor:
    """Amplitude of every frequency, (B, h, w), mean over the channels, zero in the middle; the mean is left out."""
    varying = features - features.mean((2, 3), keepdim=True)
    return torch.fft.fftshift(torch.fft.fft2(varying), dim=(2, 3)).abs().mean(1)


def save_picture(
    path: Path,
    images: Tensor,
    masks: Tensor,
    labels: Tensor,
    shown: dict[str, Tensor],
    names: Sequence[str],
    *,
    mu: float,
    title: str,
) -> None:
    """Draw one row per image and present class.

    Args:
        path: a PNG; written as it is given, so pass a temporary name.
        images, masks, labels: as `recipe.scenes.Scenes`.
        shown: what `steps_of` gave.
        names: of the K classes.
        mu: cut-off, for the box in the spectrum.
        title: one line above the picture.
    """
    rows = [(i, int(k)) for i in range(len(images)) for k in labels[i].nonzero().flatten()]
    panel, gap, between, left, top, bottom = 1.45, 0.08, 0.24, 0.4, 1.3, 0.5  # inches; `between` images, else `gap`
    drops = [panel + (gap if n and rows[n - 1][0] == i else between) for n, (i, _) in enumerate(rows)]
    width, height = left + len(COLUMNS) * (panel + gap), top + sum(drops) - between + bottom
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    palette = draw.palette()
    seen = {0}
    y = height - top + between
    for number, ((i, k), drop) in enumerate(zip(rows, drops, strict=True)):
        y -= drop
        line = [
            figure.add_axes(((left + column * (panel + gap)) / width, y / height, panel / width, panel / height))
            for column in range(len(COLUMNS))
        ]
        image = images[i]
        pixels = image.permute(1, 2, 0).numpy()
        faint = (pixels * 0.35 + 255 * 0.65).astype(np.uint8)
        panels = [pixels, None, *(draw.heatmap(band, image) for band in _enlarge(shown["bands"][:, i, k], image)), None]
        for label in (shown["pseudo"][i], shown["prediction"][i], masks[i]):
            panels.append(draw.colorize(label))
            seen |= set(label.unique().tolist())
        for axis, drawn, (head, said) in zip(line, panels, COLUMNS, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if drawn is not None:
                axis.imshow(drawn, interpolation="nearest")
            if number == 0:
                axis.set_title(head, fontsize=12, fontweight="bold", pad=42)
                place = {"transform": axis.transAxes, "ha": "center", "va": "top", "color": "#333"}
                axis.text(0.5, 1.36, said.format(mu=mu), fontsize=9, linespacing=1.1, **place)
        line[0].set_ylabel(names[k], fontsize=12, fontweight="bold", color=palette[k + 1] / 255)
        draw_spectrum(line[1], shown["spectrum"][i].numpy(), mu)
        _draw_selected(line[5], faint, shown["selected"][i, k].numpy(), palette[k + 1])
    handles = [
        Patch(facecolor=palette[v] / 255, label="background" if v == 0 else names[v - 1]) for v in sorted(seen - {255})
    ]
    handles.append(Patch(facecolor=palette[255] / 255, label=UNDECIDED))
    style = {"fontsize": 11, "frameon": False, "columnspacing": 1.2, "handlelength": 1.4}
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), **style)
    figure.suptitle(title, fontsize=13, y=1 - 0.12 / height, va="top")
    figure.savefig(path, format="png")


def _enlarge(maps: Tensor, image: Tensor) -> Tensor:
    size = (image.shape[1], image.shape[2])
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].clamp(0, 1)


def draw_spectrum(axis: Axes, spectrum: np.ndarray, mu: float) -> None:
    """Draw what `spectrum_of` gave, as an array, with the box of the low band."""
    height, width = spectrum.shape
    relative = spectrum / (spectrum.max() or 1.0)  # 0: one token, or tokens that are all alike
    relative[height // 2, width // 2] = 1  # the mean, which was left out, would outshine the rest
    axis.imshow(np.log(relative + 1e-3), cmap="magma", interpolation="nearest")
    x, y = passed(width, mu), passed(height, mu)
    corner = (width // 2 - x - 0.5, height // 2 - y - 0.5)  # zero frequency lies at n // 2 after the shift
    axis.add_patch(Rectangle(corner, 2 * x + 1, 2 * y + 1, fill=False, edgecolor="#4af", linewidth=1.4))


def _draw_selected(axis: Axes, faint: np.ndarray, selected: np.ndarray, colour: np.ndarray) -> None:
    height, width = faint.shape[:2]
    axis.imshow(faint, interpolation="nearest", extent=(0, width, height, 0))
    layer = np.zeros((*selected.shape, 4))
    layer[selected] = (*(colour / 255), 0.85)
    axis.imshow(layer, interpolation="nearest", extent=(0, width, height, 0))
