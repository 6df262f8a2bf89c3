"""What a trained network makes of an image: all that the figures of visualize.py show, as numbers."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffr import FFR, PixelAdaptiveRefinement
from ffr.cam import multi_scale_cam, normalize_cam, to_image
from ffr.framework import Outputs
from ffr.frequency import passed
from ffr.prototypes import class_prototypes, similarity_maps
from ffr.refine import refine_label
from recipe.bands import amplitudes, band_energies, features_by_depth, high_share, relative_log_amplitude
from recipe.data import Example
from recipe.picture import band_cams, spectrum_of
from recipe.weights import Trained

LIKELY, AT_MOST = 0.5, 5  # a predicted label: more than this probability, and not more than so many an image
GAPS = tuple(round(0.005 * step, 3) for step in range(101))  # thresholds of the curve of Fig. 4
EDGES = tuple(round(0.005 * step, 3) for step in range(-100, 101))  # of its histogram


class Patch(NamedTuple):
    """The token at which the similarity to two classes changes most when the high band is dropped.

    Among those that are at least as similar to both as the mean token is, if there are any. ``change`` is the smaller
    of the two changes; ``other`` is None, where the image has one class alone.
    """

    one: int
    other: int | None
    row: int
    column: int
    change: float


class Seen(NamedTuple):
    """One image with n classes shown, on the CPU; maps of a class are in the order of `classes`."""

    example: Example
    classes: tuple[int, ...]  # those of its labels, numbered from 0
    cam: Tensor  # (n, H, W) in [0, 1], at the scales that the pseudo labels of the training come from
    pseudo: Tensor  # (H, W), 255 undecided
    prediction: Tensor  # (H, W)
    bands: Tensor  # (3, n, h, w): CAMs of X, X_low and X_high on one scale per class
    spectrum: Tensor  # (h, w)
    similarity: Tensor  # (2, n, h, w): cosine of X and of X_low to the prototype
    seeds: Tensor  # (n, h, w): weight in the prototype, 1 at the peak
    selected: Tensor  # bool (n, h, w)
    patch: Patch | None


def predict_labels(logits: Tensor) -> Tensor:
    """Labels (K,) of an image from its logits: the classes above `LIKELY`, `AT_MOST` of them; else the likeliest."""
    best = logits.argsort(descending=True)[:AT_MOST]
    chosen = best[logits[best].sigmoid() > LIKELY]
    return torch.zeros_like(logits).index_fill(0, chosen if len(chosen) else best[:1], 1)


class Compared(NamedTuple):
    """Similarities (2, K, h, w) of X and X_low to the prototypes; which classes have one; what is selected."""

    seeds: Tensor  # (K, h, w), weight in the prototype, 1 at the peak
    similarity: Tensor
    valid: Tensor  # bool (K,)
    selected: Tensor  # bool (K, h, w)
    real: Tensor  # bool (h, w), False for padding

    @property
    def gap(self) -> Tensor:
        """Change of the similarity when the high band is dropped, (K, h, w)."""
        return self.similarity[0] - self.similarity[1]


def compare(trained: Trained, out: Outputs, labels: Tensor) -> Compared:
    """Similarity of the tokens of one image to its prototypes, with and without the high band, as in the training."""
    cam = normalize_cam(out.cam, labels=labels, mask=out.mask)
    vectors, valid = class_prototypes(
        out.final, cam, labels, seed_threshold=trained.config.seed_threshold, mask=out.mask
    )
    similarity = torch.cat([similarity_maps(part, vectors) for part in (out.final, out.low)])
    real = torch.ones_like(similarity[0, 0], dtype=torch.bool) if out.mask is None else out.mask[0]
    # As `ffr.rectification.select_tokens`, of which a test makes sure.
    chosen = ((similarity[0] - similarity[1]).abs() > trained.config.gap) & valid[0][:, None, None] & real
    seeds = torch.where(cam[0] >= trained.config.seed_threshold, cam[0], 0)
    return Compared(seeds, similarity, valid[0], chosen, real)


def patch_of(found: Compared) -> Patch | None:
    """See `Patch`; None where no class has a prototype."""
    ids = found.valid.nonzero().flatten().tolist()
    gap = torch.where(found.real, found.gap.abs(), 0)
    alike = found.similarity[0] >= found.similarity[0].mean((1, 2), keepdim=True)
    pairs: Sequence[tuple[int, ...]] = list(combinations(ids, 2)) or [(k,) for k in ids]
    best = None
    for pair in pairs:
        least, both = gap[list(pair)].amin(0), alike[list(pair)].all(0)
        change, place = torch.where(both | ~both.any(), least, 0).flatten().max(0)
        if best is None or float(change) > best.change:
            row, column = divmod(int(place), gap.shape[2])
            best = Patch(pair[0], pair[1] if len(pair) > 1 else None, row, column, float(change))
    return best


@torch.no_grad()
def see(trained: Trained, example: Example) -> Seen:
    """Everything that the figures show of an image; `example` has labels."""
    model, config = trained.model, trained.config
    device = model.classifier.weight.device
    images, labels = example.image[None].to(device), example.labels[None].to(device)
    ids = labels[0].nonzero().flatten().tolist()
    size, patch = (images.shape[2], images.shape[3]), model.encoder.patch_size
    out = model.outputs(images)
    found = compare(trained, out, labels)
    how = {"scales": config.cam_scales, "flip": config.cam_flip, "labels": labels, "max_present": len(ids)}
    cam = multi_scale_cam(lambda pixels: model.cams(pixels)[0], images, **how)
    refinement = PixelAdaptiveRefinement(config.dilations)
    return Seen(
        example=example,
        classes=tuple(ids),
        cam=cam[0, ids].cpu(),
        pseudo=refine_label(images, cam, labels, high=config.high, low=config.low, refinement=refinement)[0].cpu(),
        prediction=to_image(out.seg, size, patch).argmax(1)[0].cpu(),
        bands=band_cams(model, out)[:, 0, ids].cpu(),
        spectrum=spectrum_of(out.final)[0].cpu(),
        similarity=found.similarity[:, ids].cpu(),
        seeds=found.seeds[ids].cpu(),
        selected=found.selected[ids].cpu(),
        patch=patch_of(found),
    )


class Glance(NamedTuple):
    """What decides which images are shown."""

    labels: frozenset[int]
    patch: Patch | None


class Motivation:
    """The numbers behind Fig. 4, over images of any size."""

    def __init__(self, trained: Trained) -> None:
        self.trained, self.images, self.noise = trained, 0, 0.0
        self.energies: dict[str, Tensor] = {}
        self.spectra: dict[str, dict[tuple[int, int], Tensor]] = {}
        self.above = torch.zeros(len(GAPS), dtype=torch.long)
        self.histogram = torch.zeros(len(EDGES) - 1, dtype=torch.long)
        self.selected: Counter[str] = Counter()
        self.pairs: Counter[str] = Counter()
        self.shared = self.tokens = 0

    @torch.no_grad()
    def add(self, image: Tensor, labels: Tensor | None) -> Glance:
        """Count in an image (3, H, W) with its labels (K,); None: those that the classifier predicts."""
        model, mu = self.trained.model, self.trained.model.frequency.mu
        images = image[None].to(model.classifier.weight.device)
        out = model.outputs(images)
        labels = predict_labels(out.logits[0]) if labels is None else labels.to(out.logits)
        depths = features_by_depth(model, images)
        grid = (depths["final"].shape[2], depths["final"].shape[3])
        for name, maps in depths.items():
            self.energies[name] = self.energies.get(name, 0) + band_energies(maps, mu)
            found, known = amplitudes(maps), self.spectra.setdefault(name, {})
            known[grid] = found if grid not in known else torch.cat([found[:1], known[grid][1:] + found[1:]])
        kept = [min(side, 2 * passed(side, mu) + 1) for side in grid]
        count = grid[0] * grid[1]
        self.noise += (count - kept[0] * kept[1]) / max(1, count - 1)
        self.images += 1
        found = compare(self.trained, out, labels[None])
        gap = found.gap[found.valid][:, found.real].cpu().double()  # (valid, N)
        self.above += (gap.abs().flatten()[:, None] > torch.tensor(GAPS, dtype=torch.float64)).sum(0)
        inside = gap.flatten().clamp(EDGES[0], EDGES[-1])
        self.histogram += torch.histogram(inside, torch.tensor(EDGES, dtype=torch.float64))[0].long()
        for k in found.valid.nonzero().flatten().tolist():
            self.selected[self.trained.classes[k]] += int(found.selected[k].sum())
            self.pairs[self.trained.classes[k]] += int(found.real.sum())
        if int(found.valid.sum()) > 1:
            self.shared += int((found.selected.sum(0) > 1).sum())
            self.tokens += int(found.real.sum())
        return Glance(frozenset(labels.nonzero().flatten().tolist()), patch_of(found))

    def numbers(self) -> dict[str, Any]:
        """What Fig. 4 draws, for JSON; shares and fractions in [0, 1], None where there is nothing to count."""
        total = sum(self.pairs.values())
        config = self.trained.config
        bins = max(1, min(min(grid) for grid in self.spectra["final"]) // 2)
        return {
            "images": self.images,
            "mu": self.trained.model.frequency.mu,
            "gap": config.gap,
            "seed_threshold": config.seed_threshold,
            "high_band_share": {name: high_share(value) for name, value in self.energies.items()},
            "high_band_share_of_white_noise": self.noise / max(1, self.images),
            "intermediate": intermediate_of(self.trained.model, list(self.energies)),
            "frequency": [column / (2 * bins) for column in range(bins + 1)],
            "relative_log10_amplitude": {
                name: relative_log_amplitude(grids, bins) for name, grids in self.spectra.items()
            },
            "pairs": total,
            "selected_fraction": sum(self.selected.values()) / total if total else None,
            "selected_fraction_per_class": {name: self.selected[name] / self.pairs[name] for name in self.pairs},
            "selected_for_several_classes": self.shared / self.tokens if self.tokens else None,
            "thresholds": list(GAPS),
            "fraction_above": [float(value) / total for value in self.above] if total else None,
            "histogram_edges": list(EDGES),
            "histogram": self.histogram.tolist(),
        }


def intermediate_of(model: FFR, names: Sequence[str]) -> str:
    """The name, among the depths, of the features that the intermediate classifier sees."""
    if "intermediate" in names:
        return "intermediate"
    return [name for name in names if name != "final"][model.encoder.intermediate]


def together(glances: Sequence[Glance]) -> Counter[tuple[int, int]]:
    """In how many images two classes occur together."""
    return Counter(pair for glance in glances for pair in combinations(sorted(glance.labels), 2))


def choose(glances: Sequence[Glance], count: int) -> list[int]:
    """Which images to show: those of the pairs that occur together most, every pair once, then the fullest ones."""
    pairs = together(glances)
    best = [max((pairs[p], p) for p in combinations(sorted(g.labels), 2)) if len(g.labels) > 1 else None
            for g in glances]  # fmt: skip
    order = sorted(range(len(glances)), key=lambda i: (-(best[i][0] if best[i] else 0), -len(glances[i].labels), i))
    chosen, shown = [], set()
    for i in order:
        if best[i] and best[i][1] not in shown:
            chosen.append(i)
            shown.add(best[i][1])
    rest = sorted((i for i in order if i not in chosen), key=lambda i: -len(glances[i].labels))
    return (chosen + rest)[:count]


def choose_patch(glances: Sequence[Glance]) -> int:
    """The image for Fig. 1: the greatest change for two classes at once; of one class, where no image has two."""

    def rank(i: int) -> tuple[bool, float]:
        patch = glances[i].patch
        return (patch is not None and patch.other is not None, patch.change if patch is not None else -1.0)

    return max(range(len(glances)), key=rank)
