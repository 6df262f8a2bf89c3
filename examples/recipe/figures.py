"""The four figures of the paper, drawn from what recipe/look.py gives: each a page that explains itself."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ffr import draw
from ffr.cam import to_image
from recipe.look import Seen
from recipe.picture import UNDECIDED, draw_spectrum

GREY, DARK, MARK = "#555555", "#222222", "#ffd60a"
PANEL, GAP, LEFT, BELOW = 2.0, 0.16, 0.45, 0.3  # inches: width of a panel, between two, for names, for words below one
CLASSES_SHOWN = 3  # rows of an image


class Page:
    """A grid of panels with heads above, words beside and below, notes and a legend at the foot.

    Args:
        title: one line.
        heads: a pair for every column: its name, and what it shows, in lines of some 24 letters.
        aspects: height over width of the panels, a row each.
        notes: sentences at the foot.
        handles: of the legend; none, no legend.
    """

    def __init__(
        self,
        title: str,
        heads: Sequence[tuple[str, str]],
        aspects: Sequence[float],
        notes: Sequence[str],
        handles: Sequence[Any] = (),
    ) -> None:
        width = LEFT + len(heads) * (PANEL + GAP)
        lines = [line for note in notes for line in textwrap.wrap(note, int(width * 14.5))]
        heights = [PANEL * min(2.0, max(0.5, aspect)) for aspect in aspects]
        per_line = max(1, int(width / 1.9))
        legend = 0.21 * -(-len(handles) // per_line) + 0.12 * bool(handles)
        foot = 0.12 + 0.17 * len(lines) + legend
        top = 0.5 + 0.24 + 0.155 * max(said.count("\n") + 1 for _, said in heads)
        self.height = top + sum(heights) + BELOW * len(heights) + foot
        self.figure = Figure(figsize=(width, self.height), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.figure.suptitle(title, x=0.1 / width, y=1 - 0.1 / self.height, ha="left", va="top", fontsize=13)
        self.axes: list[list[Axes]] = []
        y = self.height - top
        for tall in heights:
            y -= tall
            self.axes.append([])
            for column in range(len(heads)):
                place = (LEFT + column * (PANEL + GAP)) / width, y / self.height, PANEL / width, tall / self.height
                axis = self.figure.add_axes(place, xticks=[], yticks=[], anchor="N")
                for side in axis.spines.values():
                    side.set_color("#bbbbbb")
                self.axes[-1].append(axis)
            y -= BELOW
        for column, (head, said) in enumerate(heads):
            x = (LEFT + column * (PANEL + GAP)) / width
            self.figure.text(x, 1 - 0.6 / self.height, head, fontsize=11, fontweight="bold", va="baseline")
            self.figure.text(x, 1 - 0.67 / self.height, said, fontsize=8, color=GREY, va="top", linespacing=1.1)
        if handles:
            place = {"loc": "lower left", "bbox_to_anchor": (0.06 / width, 0.17 * len(lines) / self.height)}
            self.figure.legend(handles=handles, ncols=per_line, fontsize=9, frameon=False, **place)
        for number, line in enumerate(reversed(lines)):
            at = (0.06 + 0.17 * number) / self.height
            self.figure.text(0.1 / width, at, line, fontsize=8, color=GREY, va="bottom")

    def name(self, row: int, text: str, colour: Any = DARK) -> None:
        """Write the name of a row beside it."""
        self.axes[row][0].set_ylabel(text, fontsize=10, fontweight="bold", color=colour)

    def save(self, path: Path) -> None:
        """Write a PNG, as it is given: pass a temporary name."""
        self.figure.savefig(path, format="png")


def say(axis: Axes, text: str) -> None:
    """Words below a panel."""
    axis.set_xlabel(text, fontsize=8, color=DARK, labelpad=3, loc="left")


def listed(names: Sequence[str], letters: int = 34) -> str:
    """Names in a line of about so many letters; those that find no room are counted."""
    for shown in range(len(names), 0, -1):
        rest = len(names) - shown
        line = ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")
        if len(line) <= letters:
            break
    return line if names else "no class"


def colour_of(k: int) -> Any:
    """Colour of class k, counted from 0, as in the label maps, but never too pale or too dark for words."""
    colour = draw.palette()[k + 1] / 255
    return tuple(0.15 + 0.65 * colour)


def pixels_of(seen: Seen) -> np.ndarray:
    """The image, (H, W, 3)."""
    return seen.example.image.permute(1, 2, 0).numpy()


def faint(pixels: np.ndarray) -> np.ndarray:
    """The image in the background."""
    return (pixels * 0.35 + 255 * 0.65).astype(np.uint8)


def lay(axis: Axes, tokens: np.ndarray, size: tuple[int, int], patch: int, **how: Any) -> None:
    """Draw a map of the tokens where its tokens lie in the image; what was padded is cut off."""
    extent = (0, tokens.shape[1] * patch, tokens.shape[0] * patch, 0)
    axis.imshow(tokens, extent=extent, interpolation="nearest", **how)
    axis.set_xlim(0, size[1])
    axis.set_ylim(size[0], 0)


def show(axis: Axes, pixels: np.ndarray) -> None:
    """Draw an image so that a token p pixels wide is p units wide."""
    axis.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")


def heat(maps: Tensor, seen: Seen, patch: int) -> np.ndarray:
    """A map (h, w) of the grid in [0, 1] over its image."""
    size = tuple(seen.example.image.shape[1:])
    return draw.heatmap(to_image(maps[None, None], size, patch)[0, 0].clamp(0, 1), seen.example.image, alpha=0.6)


# The figures --------------------------------------------------------------------------------------------------------


def patch_figure(seen: Seen, names: Sequence[str], patch: int, gap: float, notes: Sequence[str]) -> Page:
    """Fig. 1: what one patch has in common with two classes, with and without the high band."""
    found = seen.patch
    shown = [] if found is None else [k for k in (found.one, found.other) if k is not None]
    heads = [
        ("image", "yellow: the patch that\nis looked at; below,\nits surroundings"),
        ("prototype", "the tokens whose mean\nit is: where the CAM of\nthe class is strongest"),
        ("similarity of X", "of each token to the\nprototype (cosine): dark,\nleast; bright, greatest"),
        ("without high band", "the same of X_low,\non the same scale"),
        ("change", "the difference of the\ntwo: red, the high band\nadds similarity; blue, less"),
        ("selected tokens", f"change above {gap:g}:\npulled to X_low\nin training"),
    ]
    pixels = pixels_of(seen)
    size = pixels.shape[:2]
    both = "selected for both classes"
    handles = [Patch(facecolor=colour_of(k), label=f"selected for {names[k]}") for k in shown]
    if len(shown) > 1:
        handles.append(Patch(facecolor="black", label=both))
    handles.append(Patch(facecolor="none", edgecolor=MARK, linewidth=2, label="the patch"))
    if len(shown) < 2:
        notes = ["No image that was looked at shows two classes with a prototype: one class is drawn.", *notes]
    elif found.change <= gap:
        notes = [f"No token changes by more than {gap:g} for two classes; the patch drawn comes closest.", *notes]
    title = f"Fig. 1: {' and '.join(names[k] for k in shown) or 'no class'} in one patch"
    page = Page(title, heads, [size[0] / size[1]] * max(1, len(shown)), notes, handles)
    if not shown:
        show(page.axes[0][0], pixels)
        return page
    rows = [seen.classes.index(k) for k in shown]
    twice = seen.selected[rows].all(0) if len(rows) > 1 else torch.zeros_like(seen.selected[0])
    y, x = found.row * patch, found.column * patch
    for number, (k, row) in enumerate(zip(shown, rows, strict=True)):
        line = page.axes[number]
        page.name(number, names[k], colour_of(k))
        show(line[0], pixels)
        if number == 1:  # the surroundings: five patches each way
            tall, wide = (min(5 * patch, side) for side in size)
            left = min(max(0, x - 2 * patch), size[1] - wide)
            top = min(max(0, y - 2 * patch), size[0] - tall)
            line[0].set_xlim(left, left + wide)
            line[0].set_ylim(top + tall, top)
            say(line[0], "the patch and its neighbours")
        else:
            say(line[0], seen.example.name[-34:])
        seeds = seen.seeds[row].numpy()
        show(line[1], faint(pixels))
        layer = np.zeros((*seeds.shape, 4))
        layer[..., :3], layer[..., 3] = colour_of(k), 0.9 * (seeds > 0)
        lay(line[1], layer, size, patch)
        say(line[1], f"{int((seeds > 0).sum())} of {seeds.size} tokens")
        with_high, without = seen.similarity[:, row].numpy()
        scale = float(min(with_high.min(), without.min())), float(max(with_high.max(), without.max()))
        for axis, part in ((line[2], with_high), (line[3], without)):
            span = max(scale[1] - scale[0], 1e-12)
            lay(axis, draw.heatmap(np.clip((part - scale[0]) / span, 0, 1)), size, patch)
            say(axis, f"patch {part[found.row, found.column]:.2f}; all {scale[0]:.2f} to {scale[1]:.2f}")
        change = with_high - without
        most = max(float(np.abs(change).max()), 1e-12)
        lay(line[4], change, size, patch, cmap="RdBu_r", vmin=-most, vmax=most)
        say(line[4], f"patch {change[found.row, found.column]:+.3f}; scale ±{most:.2f}")
        mine = seen.selected[row].numpy()
        show(line[5], faint(pixels))
        layer = np.zeros((*mine.shape, 4))
        layer[mine] = (*colour_of(k), 0.85)
        layer[(seen.selected[row] & twice).numpy()] = (0, 0, 0, 0.9)
        lay(line[5], layer, size, patch)
        said = f"{100 * mine.mean():.0f} % of the tokens"
        say(line[5], said + (f"; both {100 * float(twice.float().mean()):.0f} %" if len(rows) > 1 else ""))
        for axis in line:
            axis.add_patch(Rectangle((x, y), patch, patch, fill=False, edgecolor=MARK, linewidth=2))
    return page


def bands_figure(images: Sequence[Seen], names: Sequence[str], patch: int, mu: float, notes: Sequence[str]) -> Page:
    """Fig. 2: where each band sees a class."""
    heads = [
        ("image", "the class of the row is\nnamed on the left"),
        ("spectrum", f"of the features, log scale;\nblue box: the low band,\nup to mu = {mu:g} cycles a token"),
        ("CAM, W X", "where the classifier sees\nthe class: dark no,\nbright yes"),
        ("low band, W X_low", "the same from the low\nfrequencies alone, on the\nscale of the CAM"),
        ("high band, W X_high", "from the high ones\nalone, on the same scale"),
    ]
    rows = [(seen, n) for seen in images for n in range(min(CLASSES_SHOWN, len(seen.classes)))]
    aspects = [seen.example.image.shape[1] / seen.example.image.shape[2] for seen, _ in rows]
    left = sum(max(0, len(seen.classes) - CLASSES_SHOWN) for seen in images)
    if left:
        notes = [f"{left} more classes of these images are not drawn ({CLASSES_SHOWN} an image at most).", *notes]
    scale = "All CAMs after ReLU; one scale per image and class, 1 the greatest value of the three."
    page = Page("Fig. 2: what the low and the high band see", heads, aspects, [scale, *notes])
    for number, (seen, n) in enumerate(rows):
        line, k = page.axes[number], seen.classes[n]
        page.name(number, names[k], colour_of(k))
        show(line[0], pixels_of(seen))
        say(line[0], seen.example.name[-34:])
        draw_spectrum(line[1], seen.spectrum.clone().numpy(), mu)
        for axis, band in zip(line[2:], seen.bands[:, n], strict=True):
            show(axis, heat(band, seen, patch))
            say(axis, f"greatest value {float(band.max()):.2f}")
    return page


def objects_figure(
    images: Sequence[Seen], names: Sequence[str], pairs: Counter[tuple[int, int]], of: int, notes: Sequence[str]
) -> Page:
    """Fig. 3: from the CAM to the prediction where classes share an image."""
    heads = [
        ("image", "its labels are named\nbelow"),
        ("CAM", "strongest class, the more\nopaque the surer"),
        ("pseudo label", "CAMs refined by colour:\nwhat the head learns from;\nbackground has no colour"),
        ("prediction", "of the segmentation head,\nfrom the image alone"),
    ]
    known = any(seen.example.mask is not None for seen in images)
    if known:
        heads.append(("truth", "for the eye alone,\nnever trained on"))
    palette = draw.palette()
    maps = [(seen.pseudo, seen.prediction, seen.example.mask) for seen in images]
    drawn = {int(v) for line in maps for part in line if part is not None for v in part.unique()} - {0}
    values = {k + 1 for seen in images for k in seen.classes}
    values |= {int(v) for *_, mask in maps if mask is not None for v in mask.unique()} & drawn | {255} & drawn
    if others := drawn - values:
        notes = [f"Predictions show {len(others)} more classes, which are none of the labels.", *notes]
    handles = [
        Patch(facecolor=palette[v] / 255, edgecolor=GREY, linewidth=0.5, label=UNDECIDED if v == 255 else names[v - 1])
        for v in sorted(values)
    ]
    aspects = [seen.example.image.shape[1] / seen.example.image.shape[2] for seen in images]
    page = Page("Fig. 3: several classes in one image", heads, aspects, notes, handles)
    for number, seen in enumerate(images):
        line, pixels = page.axes[number], pixels_of(seen)
        show(line[0], pixels)
        say(line[0], listed([names[k] for k in seen.classes]))
        page.name(number, seen.example.name[-24:])
        if seen.classes:
            strongest, which = seen.cam.max(0)
            colours = palette[np.asarray(seen.classes)[which.numpy()] + 1]
            opaque = strongest[..., None].numpy() * 0.85
            show(line[1], (pixels * 0.7 * (1 - opaque) + colours * opaque).astype(np.uint8))
        best = max(combinations(seen.classes, 2), key=lambda pair: pairs[pair], default=None)
        if best is not None:
            say(line[1], f"{names[best[0]]} + {names[best[1]]}: together in {pairs[best]} of {of} images")
        for axis, label in zip(line[2:], maps[number], strict=False):
            if label is None:
                axis.text(0.5, 0.5, "not known", ha="center", va="center", color=GREY, transform=axis.transAxes)
            else:
                show(axis, draw.overlay(seen.example.image, label, alpha=0.85))
    return page


def motivation_figure(numbers: dict[str, Any], notes: Sequence[str]) -> Figure:
    """Fig. 4: bands through the depth, and what the selection makes of them."""
    figure = Figure(figsize=(11, 8.6), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    (depth, spectrum), (gaps, fraction) = figure.subplots(2, 2)
    figure.suptitle("Fig. 4: the high band through the encoder, and the tokens it decides", x=0.02, ha="left")
    _draw_depth(depth, numbers)
    _draw_spectra(spectrum, numbers)
    _draw_gaps(gaps, numbers)
    _draw_fraction(fraction, numbers)
    for axis in (depth, spectrum, gaps, fraction):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
    lines = [line for note in notes for line in textwrap.wrap(note, 155)]
    figure.text(0.02, 0.01, "\n".join(lines), fontsize=8, color=GREY, va="bottom")
    figure.tight_layout(rect=(0, 0.02 + 0.019 * len(lines), 1, 0.99), h_pad=2.5, w_pad=2.5)
    return figure


def _short(name: str) -> str:
    return {"final": "X", "intermediate": "X_m"}.get(name, name.removeprefix("block "))


def _draw_depth(axis: Axes, numbers: dict[str, Any]) -> None:
    shares = {name: 100 * share for name, share in numbers["high_band_share"].items()}
    at = range(len(shares))
    axis.plot(at, shares.values(), "o-", color="#1f5fa8")
    marked = list(shares).index(numbers["intermediate"])
    axis.plot(marked, shares[numbers["intermediate"]], "o", markersize=13, fillstyle="none", color="#c0392b")
    for place, share in zip(at, shares.values(), strict=True):
        near = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"{share:.1f}", (place, share), fontsize=7.5, color="#1f5fa8", **near)
    noise = 100 * numbers["high_band_share_of_white_noise"]
    axis.text(0.98, 0.04, f"white noise: {noise:.0f}", transform=axis.transAxes, fontsize=8, color=GREY, ha="right")
    said = "ring: X_m, which the intermediate CAM sees"
    axis.text(0.02, 0.04, said, transform=axis.transAxes, fontsize=8, color="#c0392b")
    axis.set_xticks(at, [_short(name) for name in shares], fontsize=8)
    axis.set_ylim(0, max(1.25 * max(shares.values()), 0.1))
    axis.set_title(f"Share of the high band (above mu = {numbers['mu']:g})", loc="left")
    axis.set_xlabel("block of the encoder; X: the last one, normed" if len(shares) > 2 else "features of the encoder")
    axis.set_ylabel("% of the energy, mean left out")


def _draw_spectra(axis: Axes, numbers: dict[str, Any]) -> None:
    curves = numbers["relative_log10_amplitude"]
    colours = matplotlib.colormaps["viridis"]
    for place, (name, curve) in enumerate(curves.items()):
        points = [(f, value) for f, value in zip(numbers["frequency"], curve, strict=True) if value is not None and f]
        if not points:
            continue
        last = name == "final"
        colour = "#c0392b" if last else colours(place / max(1, len(curves) - 1))
        named = last or place in (0, len(curves) - 2)
        label = ("X" if last else _short(name) if "block" not in name else name) if named else None
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=2 if last else 1.3, label=label, marker=".")
    axis.axvline(numbers["mu"], color=GREY, linestyle=":", linewidth=1)
    bottom, top = axis.get_ylim()
    axis.text(numbers["mu"], bottom + 0.02 * (top - bottom), " mu", fontsize=8, color=GREY)
    axis.set_title("Amplitude by frequency, through the depth", loc="left")
    axis.set_xlabel("frequency in cycles a token, the higher of the two axes")
    axis.xaxis.label.set_fontsize(9)
    axis.set_ylabel("log10 of amplitude over that of the mean")
    axis.legend(fontsize=8, frameon=False)


def _draw_gaps(axis: Axes, numbers: dict[str, Any]) -> None:
    edges, counts, gap = np.array(numbers["histogram_edges"]), np.array(numbers["histogram"]), numbers["gap"]
    axis.set_title("Change of similarity when the high band is dropped", loc="left")
    axis.set_xlabel("cos(x, prototype) - cos(x_low, prototype)")
    axis.set_ylabel("% of the (token, class) pairs")
    if not counts.sum():
        axis.text(0.5, 0.5, "no class has a prototype", ha="center", transform=axis.transAxes, color=GREY)
        return
    middle = (edges[:-1] + edges[1:]) / 2
    beyond = np.abs(middle) > gap
    for chosen, colour, label in ((~beyond, "#a9bcd0", "left alone"), (beyond, "#c0392b", "selected")):
        heights = 100 * counts[chosen] / counts.sum()
        axis.bar(middle[chosen], heights, width=edges[1] - edges[0], color=colour, label=label)
    filled = np.abs(middle[counts > 0]).max()
    axis.set_xlim(-1.1 * max(filled, gap), 1.1 * max(filled, gap))
    for side in (-gap, gap):
        axis.axvline(side, color=DARK, linestyle="--", linewidth=1)
    axis.legend(fontsize=8, frameon=False, title=f"gap {gap:g}", title_fontsize=8)


def _draw_fraction(axis: Axes, numbers: dict[str, Any]) -> None:
    axis.set_title("Selected, by the gap that is asked for", loc="left")
    axis.set_xlabel("gap")
    axis.set_ylabel("% selected")
    if numbers["fraction_above"] is None:
        return
    values = 100 * np.array(numbers["fraction_above"])
    axis.plot(numbers["thresholds"], values, color="#1f5fa8")
    chosen, several = 100 * numbers["selected_fraction"], numbers["selected_for_several_classes"]
    axis.plot(numbers["gap"], chosen, "o", color="#c0392b")
    said = f"gap {numbers['gap']:g}: {chosen:.1f} % of the pairs"
    if several is not None:
        said += f";\n{100 * several:.1f} % of the tokens of images with\nseveral classes are selected for more than one"
    axis.annotate(said, (numbers["gap"], chosen), xytext=(12, 12), textcoords="offset points", fontsize=8.5)
    axis.set_ylim(0, 105)
    shown = max([numbers["gap"] * 3, *(t for t, v in zip(numbers["thresholds"], values, strict=True) if v > 0.1)])
    axis.set_xlim(0, min(0.5, 1.05 * shown))
