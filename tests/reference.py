"""Slow second opinions: the same maths in NumPy float64, by loops and by FFT, sharing no code with the library."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from harness import host_waits

# --- frequency, prototypes, rectification ---


def low_band(x: np.ndarray, mu: float) -> np.ndarray:
    """The ideal box filter by FFT over the last two axes, float64."""
    fy = np.abs(np.fft.fftfreq(x.shape[-2]))[:, None]
    fx = np.abs(np.fft.fftfreq(x.shape[-1]))[None, :]
    keep = (fy <= mu + 1e-7) & (fx <= mu + 1e-7)
    low = np.fft.ifft2(np.fft.fft2(x.astype(np.float64)) * keep)
    assert np.abs(low.imag).max(initial=0) < 1e-10 * (1 + np.abs(x).max(initial=0))  # the mask is even about zero
    return low.real


def shrunk(cam: np.ndarray, h: int, w: int) -> np.ndarray:
    """Maps (B, K, H, W) shrunk by area to (h, w): the mean over all pixels that a cell touches."""
    high, wide = cam.shape[2:]
    out = np.zeros((*cam.shape[:2], h, w))
    for y in range(h):
        for x in range(w):
            rows = [i for i in range(high) if i * h < (y + 1) * high and (i + 1) * h > y * high]
            columns = [j for j in range(wide) if j * w < (x + 1) * wide and (j + 1) * w > x * wide]
            out[:, :, y, x] = cam[:, :, rows][..., columns].mean((2, 3))
    return out


def prototypes(
    features: np.ndarray, cam: np.ndarray, labels: np.ndarray, threshold: float, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prototypes (B, K, D) and validity (B, K) from maps (B, D, h, w) and CAMs (B, K, h, w) on the grid."""
    images, channels, h, w = features.shape
    classes = labels.shape[1]
    vectors, valid = np.zeros((images, classes, channels)), np.zeros((images, classes), bool)
    for b in range(images):
        spots = [(y, x) for y in range(h) for x in range(w) if mask is None or mask[b, y, x]]
        for k in range(classes):
            peak = max((cam[b, k, y, x] for y, x in spots), default=0)
            if labels[b, k] <= 0.5 or peak <= 0:
                continue
            total = 0.0
            for y, x in spots:
                share = max(cam[b, k, y, x], 0) / peak
                if share >= threshold:
                    vectors[b, k] += share * features[b, :, y, x]
                    total += share
            vectors[b, k] /= total
            valid[b, k] = True
    return vectors, valid


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors, 0 where one of them is zero."""
    product = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
    return float((a * b).sum()) / product if product > 0 else 0.0


def similarity(features: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Cosine (B, K, h, w) of every token to every prototype."""
    images, _, h, w = features.shape
    out = np.zeros((images, vectors.shape[1], h, w))
    for b, k, y, x in np.ndindex(*out.shape):
        out[b, k, y, x] = cosine(features[b, :, y, x], vectors[b, k])
    return out


def selection(
    features: np.ndarray,
    low: np.ndarray,
    vectors: np.ndarray,
    valid: np.ndarray,
    gap: float,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """The selected (token, class) pairs, bool (B, K, h, w)."""
    far = np.abs(similarity(features, vectors) - similarity(low, vectors)) > gap
    far &= valid[:, :, None, None]
    return far if mask is None else far & mask[:, None]


def rectification(
    features: np.ndarray,
    low: np.ndarray,
    selected: np.ndarray,
    valid: np.ndarray,
    min_fraction: float,
    mask: np.ndarray | None = None,
    distance: str = "cosine",
) -> float:
    """The rectification loss, pair by pair."""
    total, pairs = 0.0, 0
    for b, k, y, x in np.ndindex(*selected.shape):
        pairs += bool(valid[b, k] and (mask is None or mask[b, y, x]))
        if selected[b, k, y, x]:
            token, teacher = features[b, :, y, x], low[b, :, y, x]
            if distance == "cosine":
                total += 1 - cosine(token, teacher)
            else:
                total += float((np.abs(token - teacher) ** {"l1": 1, "l2": 2}[distance]).mean())
    return total / max(int(selected.sum()), min_fraction * pairs, 1)


# --- CAM, refinement, losses ---


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps (..., h, w) resized bilinearly, pixel by pixel, ``align_corners=False``."""
    h, w = maps.shape[-2:]
    out = np.zeros((*maps.shape[:-2], *size))
    for y, x in np.ndindex(*size):
        v, u = max((y + 0.5) * h / size[0] - 0.5, 0), max((x + 0.5) * w / size[1] - 0.5, 0)
        top, left = int(v), int(u)
        bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
        upper = (1 - u + left) * maps[..., top, left] + (u - left) * maps[..., top, right]
        lower = (1 - u + left) * maps[..., bottom, left] + (u - left) * maps[..., bottom, right]
        out[..., y, x] = (1 - v + top) * upper + (v - top) * lower
    return out


def normalized(raw: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """ReLU, min-max per map, times label, of raw maps (B, K, h, w); flat is what varies by less than a millionth."""
    out = np.zeros(raw.shape)
    for b, k in np.ndindex(*raw.shape[:2]):
        cam = np.maximum(raw[b, k], 0)
        if labels[b, k] > 0.5 and cam.max() - cam.min() > 1e-6 * cam.max():
            out[b, k] = (cam - cam.min()) / (cam.max() - cam.min())
    return out


def multi_scale_cam(
    fn: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    scales: Sequence[float],
    flip: bool,
    labels: np.ndarray,
) -> np.ndarray:
    """The training CAM, one image and one look after the other."""
    out = []
    for b in range(len(images)):
        size = images.shape[2:]
        total = np.zeros((1, labels.shape[1], *size))
        for scale in scales:
            image = resized(images[b : b + 1], tuple(max(1, math.floor(side * scale)) for side in size))
            look = resized(fn(image), size)
            if flip:
                look = np.maximum(look, resized(fn(image[..., ::-1]), size)[..., ::-1])
            total += np.maximum(look, 0)
        out.append(normalized(total, labels[b : b + 1]))
    return np.concatenate(out)


def label_map(cam: np.ndarray, high: float, low: float, ignore_index: int = 255) -> np.ndarray:
    """CAMs (B, K, H, W) thresholded, pixel by pixel."""
    out = np.zeros((cam.shape[0], *cam.shape[2:]), np.int64)
    for b, y, x in np.ndindex(*out.shape):
        best = 0
        for k in range(cam.shape[1]):
            if cam[b, k, y, x] > cam[b, best, y, x]:
                best = k
        score = cam[b, best, y, x]
        out[b, y, x] = best + 1 if score > high else ignore_index if score > low else 0
    return out


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def neighbours(maps: np.ndarray, dilations: Sequence[int]) -> np.ndarray:
    """(B, C, H, W) -> (B, C, J, H, W): every neighbour fetched by a one-hot dilated convolution."""
    ring = [j for j in range(9) if j != 4]
    kernels = torch.eye(9, dtype=torch.float64)[ring].reshape(8, 1, 3, 3)
    out = []
    for d in dilations:
        padded = torch.from_numpy(np.pad(maps.astype(np.float64), ((0, 0), (0, 0), (d, d), (d, d)), mode="edge"))
        out.append(torch.conv2d(padded.flatten(0, 1)[:, None], kernels, dilation=d).numpy())
    return np.concatenate(out, 1).reshape(*maps.shape[:2], -1, *maps.shape[2:])


def refinement_weights(images: np.ndarray, dilations: Sequence[int]) -> np.ndarray:
    """Pixel-adaptive weights (B, J, H, W)."""
    images = images.astype(np.float64)
    near = neighbours(images, dilations)
    spread = near.std(2, ddof=1, keepdims=True) + 1e-8
    rgb = -((np.abs(near - images[:, :, None]) / (0.3 * spread)) ** 2).mean(1)
    offsets = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distance = np.array([np.sqrt(dy * dy + dx * dx) for dy, dx in offsets])
    position = -((distance / (0.3 * distance.std(ddof=1))) ** 2)
    return _softmax(rgb, 1) + 0.01 * _softmax(position, 0)[None, :, None, None]


def refine(images: np.ndarray, scores: np.ndarray, dilations: Sequence[int], iterations: int) -> np.ndarray:
    """Pixel-adaptive refinement with the neighbours of every score gathered."""
    weights = refinement_weights(images, dilations)
    for _ in range(iterations):
        scores = (weights[:, None] * neighbours(scores, dilations)).sum(2)
    return scores


def pseudo_label(
    images: np.ndarray,
    cam: np.ndarray,
    labels: np.ndarray,
    high: float,
    low: float,
    refinement: Callable[[np.ndarray, np.ndarray], np.ndarray],
    downscale: int,
) -> np.ndarray:
    """The two-stack pseudo label, image by image, with a stack for the present classes alone."""
    size = images.shape[2:]
    small = (size[0] // downscale, size[1] // downscale)
    out = np.zeros((len(images), *size), np.int64)
    for b in range(len(images)):
        classes = [k for k in range(labels.shape[1]) if labels[b, k] > 0.5]
        says = []
        for background in (high, low):
            stack = np.stack([np.full(small, background), *(resized(cam[b, k], small) for k in classes)])
            refined = refinement(resized(images[b : b + 1], small), _softmax(stack, 0)[None])
            says.append(resized(refined[0], size).argmax(0))
        for y, x in np.ndindex(*size):
            sure, maybe = says[0][y, x], says[1][y, x]
            out[b, y, x] = classes[sure - 1] + 1 if sure > 0 else 255 if maybe > 0 else 0
    return out


def segmentation(logits: np.ndarray, label: np.ndarray, ignore_index: int = 255) -> float:
    """The balanced cross-entropy, pixel by pixel, logits (B, C, H, W) at the size of the label."""
    halves: list[list[float]] = [[], []]
    for b, y, x in np.ndindex(*label.shape):
        name = label[b, y, x]
        if name != ignore_index:
            z = logits[b, :, y, x]
            halves[int(name > 0)].append(float(np.log(np.exp(z).sum()) - z[name]))
    return sum(0.5 * sum(half) / len(half) for half in halves if half)


def affinity(tokens: np.ndarray, label: np.ndarray, ignore_index: int = 255) -> float:
    """The affinity loss, pair by pair, tokens (B, N, D) and their labels (B, N)."""
    sums, counts = [0.0, 0.0], [0, 0]
    for b, i, j in np.ndindex(*label.shape, label.shape[1]):
        if i != j and ignore_index not in (label[b, i], label[b, j]):
            unlike = int(label[b, i] != label[b, j])
            sums[unlike] += abs(cosine(tokens[b, i], tokens[b, j]))
            counts[unlike] += 1
    alike_half = 0.5 * (1 - sums[0] / (counts[0] + 1)) if counts[0] else 0.0
    return alike_half + (0.5 * sums[1] / (counts[1] + 1) if counts[1] else 0.0)


def lattice_filter(features: np.ndarray, values: np.ndarray, normalize: bool = False) -> np.ndarray:
    """The permutohedral filter with a dictionary, its simplices as the Kuhn triangulation seen along (1, ..., 1)."""
    count, d = features.shape
    corners = []
    for f in features:
        raised = np.zeros(d + 1)
        for k in range(d):
            axis = np.array([1.0] * (k + 1) + [-(k + 1.0)] + [0.0] * (d - k - 1))
            raised += f[k] * np.sqrt(2 / 3) * axis / np.sqrt((k + 1) * (k + 2))
        corner = np.floor(raised).astype(int)
        rest = raised - corner
        weights: dict[tuple[int, ...], float] = {}
        steps = [1.0, *sorted(rest, reverse=True), 0.0]
        for taken, axis in enumerate([None, *np.argsort(-rest)]):
            if axis is not None:
                corner[axis] += 1
            key = tuple(int(c) for c in (d + 1) * corner - corner.sum())
            weights[key] = weights.get(key, 0.0) + steps[taken] - steps[taken + 1]
        corners.append(weights)

    def once(v: np.ndarray) -> np.ndarray:
        held = {key: np.zeros(v.shape[1]) for weights in corners for key in weights}
        for weights, row in zip(corners, v, strict=True):
            for key, weight in weights.items():
                held[key] = held[key] + weight * row
        for axis in range(d + 1):
            step = [d if k == axis else -1 for k in range(d + 1)]
            held = {
                key: row
                + 0.5 * sum(held.get(tuple(np.add(key, sign * np.array(step)).tolist()), 0 * row) for sign in (1, -1))
                for key, row in held.items()
            }
        out = [sum(weight * held[key] for key, weight in weights.items()) for weights in corners]
        return np.stack(out) / (1 + 2.0**-d)

    if not normalize:
        return once(values)
    root = np.sqrt(once(np.ones((count, 1))))
    return once(values / root) / root


def over_ranks(loss: Callable[..., torch.Tensor], *ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of a loss over ranks and its gradients as data parallelism gives them, joined along the batch.

    ``loss(index, x, **kw)`` is the loss of one rank. A first pass collects what each rank would send.
    """
    sent: list[torch.Tensor] = []

    def collect(counts: torch.Tensor) -> torch.Tensor:
        assert not counts.requires_grad
        sent.append(counts.clone())
        return counts

    for index, x in enumerate(ranks):
        loss(index, x, all_reduce=collect, world_size=len(ranks))
    assert len(sent) == len(ranks)
    total = torch.stack(sent).sum(0)
    leaves = [x.detach().clone().requires_grad_() for x in ranks]
    losses = [loss(i, x, all_reduce=lambda _: total, world_size=len(ranks)) for i, x in enumerate(leaves)]
    mean = torch.stack(losses).mean()
    mean.backward()
    return mean.detach(), torch.cat([x.grad for x in leaves if x.grad is not None])


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Everything inside must run without the host reading a tensor, which a GPU would have to finish first."""
    with host_waits() as found:
        yield
    assert not found, f"the host waits for the device in {', '.join(found)}"


# --- COCO's masks: the published convention of its rasteriser and of its run lengths ---


def coco_polygon(points: Sequence[float], height: int, width: int) -> np.ndarray:
    """One polygon (x y x y ...) as bool (H, W).

    Vertices are rounded on a grid five times as fine, and joined by lines of one cell per step of their longer axis. A
    line is crossed in pixel column c where it passes from fine column 5 c + 2 to 5 c + 3; the crossing lies at the
    upper of its two cells, brought back to pixels and rounded up. A pixel is inside if an odd number of crossings lies
    at or above it.
    """
    fine = np.trunc(5 * np.asarray(points, float).reshape(-1, 2) + 0.5)
    crossings = np.zeros((height + 1, width), int)
    for a, b in zip(fine, np.roll(fine, -1, axis=0), strict=True):
        run, rise = np.abs(b - a)
        if run == 0:
            continue  # along a column: it crosses none
        axis = 0 if run >= rise else 1
        start, end = (a, b) if a[axis] <= b[axis] else (b, a)
        along = np.arange(start[axis], end[axis] + 1)
        slope = (end - start)[1 - axis] / (end - start)[axis]
        across = np.trunc(start[1 - axis] + slope * (along - start[axis]) + 0.5)
        u, v = (along, across) if axis == 0 else (across, along)
        for i in range(len(u) - 1):
            left = min(u[i], u[i + 1])
            if u[i] != u[i + 1] and left % 5 == 2 and 0 <= left // 5 < width:
                row = np.ceil(np.clip((min(v[i], v[i + 1]) + 0.5) / 5 - 0.5, 0, height))
                crossings[int(row), int(left // 5)] += 1
    return crossings.cumsum(axis=0)[:height] % 2 == 1


def coco_counts(text: str) -> list[int]:
    """Run lengths from their compressed form.

    A number is little-endian in digits of 5 bits, each a character from "0" on; 32 says that more follow, and 16 in the
    last digit is the sign. From the fourth on, a number is the difference to the last but one.
    """
    counts: list[int] = []
    digits: list[int] = []
    for character in text:
        code = ord(character) - 48
        digits.append(code % 32)
        if code < 32:
            number = sum(digit * 32**place for place, digit in enumerate(digits))
            if digits[-1] >= 16:
                number -= 32 ** len(digits)
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            digits = []
    return counts


def coco_instance(segmentation: object, height: int, width: int) -> np.ndarray:
    """One instance, bool (H, W): the union of polygons, or runs of 0 and 1 in turn, down the columns."""
    if isinstance(segmentation, list):
        return np.any([coco_polygon(points, height, width) for points in segmentation], axis=0)
    assert isinstance(segmentation, dict)
    counts = segmentation["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    counts = coco_counts(counts) if isinstance(counts, str) else counts
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def coco_label(values: Sequence[int], shapes: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """For each pixel the value of the smallest instance that covers it; of two equal ones, the later."""
    label = np.zeros(size, int)
    owner = np.full(size, np.inf)
    for value, shape in zip(values, shapes, strict=True):
        wins = shape & (shape.sum() <= owner)
        label[wins], owner[wins] = value, shape.sum()
    return label
