"""The four figures of the paper, drawn from what recipe/look.py gives: each a page that explains itself."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ffr import draw
from ffr.cam import to_image
from recipe.look import Seen
from recipe.picture import UNDECIDED, draw_spectrum
from recipe.words import fit, width

GREY, DARK = "#555555", "#222222"
PANEL, GAP, LEFT, BELOW = 2.0, 0.16, 0.45, 0.3  # inches: width of a panel, between two, for names, for words below one
LINE, SMALL = 0.13, 8  # inches of one more line below a panel, and points of its letters
NO_PROTOTYPE = "no class has a prototype"
CLASSES_SHOWN = 3  # rows of an image
OTHERS_NAMED = 4  # predicted classes that are no label of an image
BOTH = ("#ff7f0e", "#00b4d8", "#d100d1")  # for what is selected twice: the one that is least like the two classes


class Page:
    """A grid of panels with heads above, words beside and below, notes and a legend at the foot.

    Args:
        title: one line.
        heads: a pair for every column: its name, and what it shows, in lines of some 24 letters.
        aspects: height over width of the panels, a row each.
        notes: sentences at the foot.
        handles: of the legend; none, no legend.
        said: lines below a panel.
    """

    def __init__(
        self,
        title: str,
        heads: Sequence[tuple[str, str]],
        aspects: Sequence[float],
        notes: Sequence[str],
        handles: Sequence[Any] = (),
        said: int = 1,
    ) -> None:
        wide = LEFT + len(heads) * (PANEL + GAP)
        lines = [line for note in notes for line in fit(note, wide - 0.2, SMALL, lines=99).split("\n")]
        self.heights = [PANEL * min(2.0, max(0.5, aspect)) for aspect in aspects]
        for handle in handles:
            handle.set_label(fit(handle.get_label(), 2.8, 9))
        # a column of the legend: its widest label, the patch before it and the gap behind it
        per_line = int((wide - 0.1) / max((width(handle.get_label(), 9) + 0.62 for handle in handles), default=1))
        legend = 0.21 * -(-len(handles) // per_line) + 0.12 * bool(handles)
        foot = 0.12 + 0.17 * len(lines) + legend
        top = 0.5 + 0.24 + 0.155 * max(words.count("\n") + 1 for _, words in heads)
        below = BELOW + LINE * (said - 1)
        self.height = top + sum(self.heights) + below * len(aspects) + foot
        self.figure = Figure(figsize=(wide, self.height), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.figure.suptitle(
            fit(title, wide - 0.2, 13), x=0.1 / wide, y=1 - 0.1 / self.height, ha="left", va="top", fontsize=13
        )
        self.axes: list[list[Axes]] = []
        y = self.height - top
        for tall in self.heights:
            y -= tall
            self.axes.append([])
            for column in range(len(heads)):
                place = (LEFT + column * (PANEL + GAP)) / wide, y / self.height, PANEL / wide, tall / self.height
                axis = self.figure.add_axes(place, xticks=[], yticks=[], anchor="N")
                for side in axis.spines.values():
                    side.set_color("#bbbbbb")
                self.axes[-1].append(axis)
            y -= below
        for column, (head, words) in enumerate(heads):
            x = (LEFT + column * (PANEL + GAP)) / wide
            self.figure.text(x, 1 - 0.6 / self.height, head, fontsize=11, fontweight="bold", va="baseline")
            self.figure.text(x, 1 - 0.67 / self.height, words, fontsize=8, color=GREY, va="top", linespacing=1.1)
        if handles:
            place = {"loc": "lower left", "bbox_to_anchor": (0.06 / wide, 0.17 * len(lines) / self.height)}
            self.figure.legend(handles=handles, ncols=per_line, fontsize=9, frameon=False, **place)
        for number, line in enumerate(reversed(lines)):
            at = (0.06 + 0.17 * number) / self.height
            self.figure.text(0.1 / wide, at, line, fontsize=8, color=GREY, va="bottom")

    def name(self, row: int, text: str, colour: Any = DARK) -> None:
        """Write the name of a row beside it."""
        axis = self.axes[row][0]
        place = axis.get_position(original=True)  # of the panel, whatever the shape of the image in it
        x, y = place.x0 - 0.06 / self.figure.get_figwidth(), (place.y0 + place.y1) / 2
        said = fit(text, self.heights[row], 10, "bold", lines=2)
        how = {"rotation": "vertical", "ha": "right", "va": "center", "multialignment": "center", "linespacing": 1.0}
        self.figure.text(x, y, said, fontsize=10, fontweight="bold", color=colour, **how)

    def save(self, path: Path) -> None:
        """Write a PNG, as it is given: pass a temporary name."""
        self.figure.savefig(path, format="png")


def say(axis: Axes, *lines: str) -> None:
    """Lines below a panel, which begin where it begins and end before the next one."""
    said = "\n".join(fit(line, PANEL, SMALL) for line in lines)
    place = axis.get_position(original=True).x0, 0
    how = {"xytext": (0, -3), "textcoords": "offset points", "va": "top", "annotation_clip": False}
    axis.annotate(said, place, xycoords=("figure fraction", "axes fraction"), fontsize=SMALL, color=DARK, **how)


def listed(names: Sequence[str]) -> str:
    """Names in a line below a panel; those that find no room are counted."""
    for shown in range(len(names), 0, -1):
        rest = len(names) - shown
        line = ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")
        if width(line, SMALL) <= PANEL:
            break
    return line if names else "no class"


def colour_of(k: int) -> Any:
    """Colour of class k, counted from 0, as in the label maps, but never too pale or too dark for words."""
    colour = draw.palette()[k + 1] / 255
    return tuple(0.15 + 0.65 * colour)


def twice_colour(one: int, other: int) -> str:
    """Colour of what is selected for both of two classes."""
    taken = np.array([colour_of(one), colour_of(other)])
    return max(BOTH, key=lambda colour: np.abs(taken - to_rgb(colour)).sum(1).min())


def outline(x: float, y: float, side: float) -> Rectangle:
    """A box that is seen on any colour: white, with a black edge on either side."""
    edge = [patheffects.withStroke(linewidth=3, foreground="black")]
    return Rectangle((x, y), side, side, fill=False, edgecolor="white", linewidth=1.4, path_effects=edge)


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
        ("image", "white box: the patch that\nis looked at; below,\nits surroundings"),
        ("prototype", "the tokens whose mean\nit is: where the CAM of\nthe class is strongest"),
        ("similarity of X", "of each token to the\nprototype (cosine): dark,\nleast; bright, greatest"),
        ("without high band", "the same of X_low,\non the same scale"),
        ("change", "the difference of the\ntwo: red, the high band\nadds similarity; blue, less"),
        ("selected tokens", f"change of more than {gap:g}\neither way: pulled\nto X_low in training"),
    ]
    pixels = pixels_of(seen)
    size = pixels.shape[:2]
    handles: list[Any] = [Patch(facecolor=colour_of(k), label=f"selected for {names[k]}") for k in shown]
    if len(shown) > 1:
        handles.append(Patch(facecolor=twice_colour(*shown), label="selected for both classes"))
    if shown:
        box = outline(0, 0, 1)
        box.set_label("the patch")
        handles.append(box)
    if not shown:
        notes = ["No image that was looked at shows a class with a prototype.", *notes]
    elif len(shown) < 2:
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
            say(line[0], seen.example.name)
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
        if len(shown) > 1:
            layer[twice.numpy()] = (*to_rgb(twice_colour(*shown)), 0.9)
        lay(line[5], layer, size, patch)
        said = f"{100 * mine.mean():.0f} % of the tokens"
        say(line[5], said + (f"; both {100 * float(twice.float().mean()):.0f} %" if len(rows) > 1 else ""))
        for axis in line:
            axis.add_patch(outline(x, y, patch))
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
        more = "1 more class" if left == 1 else f"{left} more classes"
        notes = [f"Of {more} in these images no row is drawn: {CLASSES_SHOWN} an image at most.", *notes]
    if not rows:
        notes = ["No image that was looked at has a class.", *notes]
    scale = "All CAMs after ReLU; one scale per image and class, 1 the greatest value of the three."
    page = Page("Fig. 2: what the low and the high band see", heads, aspects, [scale, *notes])
    for number, (seen, n) in enumerate(rows):
        line, k = page.axes[number], seen.classes[n]
        page.name(number, names[k], colour_of(k))
        show(line[0], pixels_of(seen))
        say(line[0], seen.example.name)
        draw_spectrum(line[1], seen.spectrum.numpy(), mu)
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
    predicted = Counter(v for seen in images for v in seen.prediction.flatten().tolist() if v in drawn - values)
    others = [v for v, _ in predicted.most_common()]
    if more := len(others[OTHERS_NAMED:]):
        classes = "class covers" if more == 1 else "classes cover"
        notes = [f"{more} more predicted {classes} less than those that the legend names.", *notes]
    words = {v: UNDECIDED if v == 255 else names[v - 1] for v in sorted(values)}
    words |= {v: f"{fit(names[v - 1], 1.5, 9)} (predicted, no label)" for v in others[:OTHERS_NAMED]}
    handles = [Patch(facecolor=palette[v] / 255, edgecolor=GREY, linewidth=0.5, label=words[v]) for v in words]
    aspects = [seen.example.image.shape[1] / seen.example.image.shape[2] for seen in images]
    page = Page("Fig. 3: several classes in one image", heads, aspects, notes, handles, said=2)
    for number, seen in enumerate(images):
        line, pixels = page.axes[number], pixels_of(seen)
        show(line[0], pixels)
        say(line[0], listed([names[k] for k in seen.classes]))
        page.name(number, seen.example.name)
        if seen.classes:
            strongest, which = seen.cam.max(0)
            colours = palette[np.asarray(seen.classes)[which.numpy()] + 1]
            opaque = strongest[..., None].numpy() * 0.85
            show(line[1], (pixels * 0.7 * (1 - opaque) + colours * opaque).astype(np.uint8))
        else:
            show(line[1], pixels)
            say(line[1], "no class")
        best = max(combinations(seen.classes, 2), key=lambda pair: pairs[pair], default=None)
        if best is not None:
            pair = " + ".join(fit(names[k], PANEL / 2 - 0.1, SMALL) for k in best)
            say(line[1], pair, f"together in {pairs[best]} of {of} images")
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
    lines = [line for note in notes for line in fit(note, 10.6, SMALL, lines=99).split("\n")]
    figure.text(0.02, 0.01, "\n".join(lines), fontsize=8, color=GREY, va="bottom")
    figure.tight_layout(rect=(0, 0.02 + 0.019 * len(lines), 1, 0.99), h_pad=2.5, w_pad=2.5)
    return figure


def _short(name: str) -> str:
    return {"final": "X", "intermediate": "X_m"}.get(name, name.removeprefix("block "))


def _beside(before: float, after: float) -> dict[str, Any]:
    """Place of a number at a point, for the steps to it and from it over the height of the plot: no line crosses it."""
    flat = 0.02
    if before >= -flat and after <= flat:  # a peak
        x, y, side = 0, 8, "center"
    elif before <= flat and after >= -flat:  # a dip
        x, y, side = 0, -8, "center"
    else:  # on a slope, its outer side
        x, y, side = (6, 5, "left") if after < 0 else (-6, 5, "right")
    return {"xytext": (x, y), "textcoords": "offset points", "ha": side, "va": "bottom" if y > 0 else "top"}


def _draw_depth(axis: Axes, numbers: dict[str, Any]) -> None:
    shares = {name: 100 * share for name, share in numbers["high_band_share"].items()}
    at, top = range(len(shares)), max(1.25 * max(shares.values()), 0.1)
    axis.plot(at, shares.values(), "o-", color="#1f5fa8")
    marked = list(shares).index(numbers["intermediate"])
    axis.plot(marked, shares[numbers["intermediate"]], "o", markersize=13, fillstyle="none", color="#c0392b")
    steps = np.diff(list(shares.values())) / top
    steps = np.array([0, *steps, *steps[-1:]])  # the last goes on; before the first there is no room
    for place, share in zip(at, shares.values(), strict=True):
        if place % -(-len(shares) // 14) == 0 or place == marked:  # more would touch
            near = _beside(*steps[place : place + 2])
            axis.annotate(f"{share:.1f}", (place, share), fontsize=7.5, color="#1f5fa8", **near)
    noise = 100 * numbers["high_band_share_of_white_noise"]
    corner = {"transform": axis.transAxes, "fontsize": 8, "va": "top"}
    axis.text(0.98, 0.98, f"white noise: {noise:.0f}", color=GREY, ha="right", **corner)
    said = "ring: X_m, which the intermediate CAM sees"
    axis.text(0.02, 0.98, said, color="#c0392b", **corner)
    axis.set_xticks(at, [_short(name) for name in shares], fontsize=8)
    axis.set_ylim(0, top)
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
    axis.set_title("Amplitude by frequency, through the depth", loc="left")
    axis.set_xlabel("frequency in cycles a token, the higher of the two axes")
    axis.xaxis.label.set_fontsize(9)
    axis.set_ylabel("log10 of amplitude over that of the mean")
    if not axis.lines:
        axis.text(
            0.5, 0.5, "tokens that are all alike, or a single one", ha="center", transform=axis.transAxes, color=GREY
        )
        return
    axis.axvline(numbers["mu"], color=GREY, linestyle=":", linewidth=1)
    bottom, top = axis.get_ylim()
    axis.text(numbers["mu"], bottom + 0.02 * (top - bottom), " mu", fontsize=8, color=GREY)
    axis.legend(fontsize=8, frameon=False)


def _draw_gaps(axis: Axes, numbers: dict[str, Any]) -> None:
    edges, counts, gap = np.array(numbers["histogram_edges"]), np.array(numbers["histogram"]), numbers["gap"]
    axis.set_title("Change of similarity when the high band is dropped", loc="left")
    axis.set_xlabel("cos(x, prototype) - cos(x_low, prototype)")
    axis.set_ylabel("% of the (token, class) pairs")
    if not counts.sum():
        axis.text(0.5, 0.5, NO_PROTOTYPE, ha="center", transform=axis.transAxes, color=GREY)
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
        axis.text(0.5, 0.5, NO_PROTOTYPE, ha="center", transform=axis.transAxes, color=GREY)
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
