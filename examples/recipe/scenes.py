"""Embedded scenes: real product photographs composed on synthesised backgrounds, with exact masks.

One to three objects of Fashion-MNIST, tinted, scaled and flipped, lie on a textured background among plain shapes
(distractors). Several classes look alike, and classes come in pairs that like to share a picture: as in photographs,
image-level labels alone hardly tell a shoe from the trousers above it.

The pixels are the same on every platform: random numbers are uniform doubles of PCG64, and all arithmetic is
elementwise ``+ - * /``, which IEEE 754 defines to the last bit: no FFT, no BLAS, no sine, no normal deviates.

To write scenes to disk, or to rebuild the data file from the official archive:
    python examples/recipe/scenes.py write --root scenes --size 224
    python examples/recipe/scenes.py build --source fashion-mnist --out fashion_objects.npz
"""

import csv
import functools
import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor

from ffr import _check

# Everything that can be asked for, in the order of Fashion-MNIST's labels.
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

# The default keeps what is confusable but different: three garments with a torso, three kinds of shoe. It leaves out
# coat and shirt, which in 28 px are the pullover and the T-shirt again: label noise, not a harder task.
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "ankle boot")

# Each default class has one companion, so all are equally frequent.
COMPANIONS = (("trouser", "sneaker"), ("dress", "bag"), ("T-shirt", "sandal"), ("pullover", "ankle boot"))
COMPANION_RATE = 0.65  # how often the first class brings its companion; with strangers, about P(companion | class) too
STRANGER_RATE = 0.4  # how often one more class joins

SPLITS = {"train": 600, "val": 150, "test": 250}  # objects a class
SIDE = 28  # pixels of an object's photograph
CANVAS = 32  # cells a side of the canvas that objects are placed on: one layout for every size
DATA = Path(__file__).with_name("fashion_objects.npz")


class Scenes(NamedTuple):
    """Images uint8 (n, 3, S, S) RGB; masks uint8 (n, S, S), 0 background, 1..K; labels float32 (n, K), 0 or 1."""

    images: Tensor
    masks: Tensor
    labels: Tensor


def make_scenes(
    split: str, count: int, size: int = 64, seed: int = 0, classes: Sequence[str] = CLASSES, *, start: int = 0
) -> Scenes:
    """Compose scenes number `start` to `start + count - 1` of a split.

    A scene depends on its split, number, seed and classes alone, not on how many are made; at another size its
    layout is the same.

    Args:
        split: "train", "val" or "test"; no object is in two of them.
        count: how many.
        size: pixels a side, 64 to 448.
        seed: another seed composes other scenes of the same objects.
        classes: distinct names out of `NAMES`; ``classes[k - 1]`` is number k in the masks.
        start: number of the first scene.

    Returns:
        ``Scenes(images, masks, labels)``; a label is 1 exactly where the mask shows the class.

    Raises:
        ValueError: for an unknown split, unknown or repeated classes, or a number out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"make_scenes: expected `split` to be one of {', '.join(SPLITS)}, got {split!r}.")
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(NAMES):
        raise ValueError(
            f"make_scenes: expected `classes` to be distinct names out of {', '.join(NAMES)}, got {classes!r}."
        )
    _check.within("make_scenes", count=count, seed=seed, start=start)
    _check.within("make_scenes", at_least=64, at_most=448, size=size)
    images, masks = np.empty((count, 3, size, size), np.uint8), np.empty((count, size, size), np.uint8)
    for i in range(count):
        images[i], masks[i] = _scene(split, start + i, size, seed, tuple(classes))
    labels = np.stack([(masks == k).any((1, 2)) for k in range(1, len(classes) + 1)], axis=1).astype(np.float32)
    return Scenes(torch.from_numpy(images), torch.from_numpy(masks), torch.from_numpy(labels))


def write_voc(
    root: str | Path,
    *,
    train: int = 1000,
    val: int = 200,
    test: int = 500,
    size: int = 224,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
) -> None:
    """Write scenes to disk in the layout of PASCAL VOC, all or nothing.

    ``JPEGImages/*.jpg``, ``SegmentationClass/*.png`` (indexed, VOC colours),
    ``ImageSets/Segmentation/{train,val,test}.txt``, and ``labels.csv``: for every image its name and 0 or 1 a class,
    the classes in the order of the masks' numbers.

    Args:
        root: a folder that does not exist, or is empty.
        train: number of scenes of that split; as are `val` and `test`.
        val: see `train`.
        test: see `train`.
        size: pixels a side.
        seed: as for `make_scenes`.
        classes: as for `make_scenes`.

    Raises:
        FileExistsError: if `root` is a file or holds anything.
        ImportError: without Pillow.
        ValueError: as `make_scenes`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "write_voc: needs Pillow. Run pip install -e '.[examples]' in the checkout of ffr."
        ) from error
    from ffr.draw import save_label

    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"write_voc: expected `root` to be a new or an empty folder, got {root}. Name another.")
    _check.within("write_voc", train=train, val=val, test=test)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Next to its goal, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        work = Path(temporary, root.name)
        pictures, labels, lists = work / "JPEGImages", work / "SegmentationClass", work / "ImageSets/Segmentation"
        for folder in (pictures, labels, lists):
            folder.mkdir(parents=True)
        with open(work / "labels.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["name", *classes])
            for split, count in {"train": train, "val": val, "test": test}.items():
                names = [f"{split}_{i:06d}" for i in range(count)]
                for i, name in enumerate(names):
                    scene = make_scenes(split, 1, size, seed, classes, start=i)
                    pixels = scene.images[0].permute(1, 2, 0).contiguous().numpy()
                    Image.fromarray(pixels).save(pictures / f"{name}.jpg", quality=95, subsampling=0)
                    save_label(labels / f"{name}.png", scene.masks[0])
                    table.writerow([name, *scene.labels[0].int().tolist()])
                (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        if root.exists():
            root.rmdir()  # Windows renames onto nothing that exists
        work.rename(root)


def build_objects(source: str | Path, out: str | Path = DATA) -> None:
    """Build the data file from the four official archives of Fashion-MNIST (``*-ubyte.gz``).

    Of each class, the first 600 photographs of the official training set are for training and the next 150 for
    validation; the first 250 of the official test set are for testing. An object is what is brighter than 10 of 255,
    holes filled. Outside it pixels become 0, inside at least 1: the photographs carry their masks.

    Args:
        source: the folder of the archives.
        out: the npz to write: `train`, `val` and `test`, uint8 (10, n, 28, 28), classes in the order of `NAMES`.
    """
    from scipy.ndimage import binary_fill_holes

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(Path(source, name)) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def first(archive: str, count: int) -> np.ndarray:
        photographs = read(f"{archive}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
        labels = read(f"{archive}-labels-idx1-ubyte.gz", 8)
        return np.stack([photographs[np.flatnonzero(labels == k)[:count]] for k in range(len(NAMES))])

    def cut_out(photographs: np.ndarray) -> np.ndarray:
        inside = [binary_fill_holes(grey > 10) for grey in photographs.reshape(-1, SIDE, SIDE)]
        return np.where(np.reshape(inside, photographs.shape), photographs.clip(1), 0).astype(np.uint8)

    learn = cut_out(first("train", SPLITS["train"] + SPLITS["val"]))
    train, val = learn[:, : SPLITS["train"]], learn[:, SPLITS["train"] :]
    np.savez_compressed(out, train=train, val=val, test=cut_out(first("t10k", SPLITS["test"])))


class _Random:
    """The random numbers of one scene, all made from uniform doubles: numpy's other methods may differ by platform."""

    def __init__(self, *entropy: int) -> None:
        self._uniform = Generator(PCG64(SeedSequence(entropy))).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._uniform()

    def below(self, count: int) -> int:
        return int(count * self._uniform())

    def array(self, *shape: int) -> np.ndarray:
        return self._uniform(shape).astype(np.float32)

    def colour(self, low: float, high: float) -> np.ndarray:
        return low + (high - low) * self.array(3, 1, 1)

    def direction(self) -> tuple[float, float]:
        """A unit vector of the right half plane, without sine or cosine."""
        t = self.between(-1, 1)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


class _Placed(NamedTuple):
    """An object and its place, in fractions of the scene."""

    name: str
    grey: np.ndarray
    height: float
    width: float
    top: float
    left: float


def _scene(split: str, index: int, size: int, seed: int, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = _Random(seed, list(SPLITS).index(split), index)
    placed = _layout(rng, split, classes)
    image, mask = _background(rng, size), np.zeros((size, size), np.uint8)
    for name, grey, height, width, top, left in placed:
        rows, i = _span(height, top, size)
        columns, j = _span(width, left, size)
        window = np.s_[..., i : i + rows, j : j + columns]
        light, inside = _resize(np.stack([grey.astype(np.float32) / 255, grey > 0]), rows, columns)
        # Enlarged, the mask's edge is a ramp: make it one pixel wide, and take the mask's share out of the light.
        opacity = ((inside - 0.5) * max(1.0, rows / SIDE) + 0.5).clip(0, 1)
        colour = rng.colour(0.75, 1) * (0.15 + 0.85 * light / inside.clip(0.01))
        image[window] += (colour - image[window]) * opacity
        mask[window][opacity > 0.5] = 1 + classes.index(name)
    grain = rng.between(0, 0.06) * (rng.array(size, size) - 0.5)
    return ((image + grain).clip(0, 1) * 255 + 0.5).astype(np.uint8), mask


def _layout(rng: _Random, split: str, classes: tuple[str, ...]) -> list[_Placed]:
    """Choose objects and put each, of six tries, where it hides the least of those before it.

    None may lose more than a third of its area in all, so that every label is plain to see; an object without such a
    place is left out.
    """
    owner = np.zeros((CANVAS, CANVAS), np.int64)  # 0, or the number of the object that shows there
    areas, placed = [0], []
    names = _names(rng, classes)
    for name in names:
        grey = _objects()[split][NAMES.index(name), rng.below(SPLITS[split])]
        grey = grey[:, ::-1] if rng.below(2) else grey
        height = rng.between(0.45, (0.86, 0.7, 0.6)[len(names) - 1])
        width = height * rng.between(0.85, 1.15)  # below 1 too
        fits: list[tuple[int, int, np.ndarray, int, _Placed]] = []
        for top, left in rng.array(6, 2).tolist():
            rows, i = _span(height, top, CANVAS)
            columns, j = _span(width, left, CANVAS)
            shape = grey[_nearest(rows)[:, None], _nearest(columns)] > 0
            trial = owner.copy()
            trial[i : i + rows, j : j + columns][shape] = len(areas)
            seen = np.bincount(trial.ravel(), minlength=len(areas) + 1).tolist()[1:]
            if all(3 * s >= 2 * area for s, area in zip(seen, areas[1:], strict=False)):
                fits.append((-sum(seen), len(fits), trial, seen[-1], _Placed(name, grey, height, width, top, left)))
        if fits:
            _, _, owner, area, at = min(fits)
            areas.append(area)
            placed.append(at)
    return placed


def _names(rng: _Random, classes: tuple[str, ...]) -> list[str]:
    """The classes of a scene: one, perhaps its companion, perhaps a stranger."""
    names = [classes[rng.below(len(classes))]]
    together, joined = rng.between(0, 1) < COMPANION_RATE, rng.between(0, 1) < STRANGER_RATE
    for pair in COMPANIONS:
        if together and names[0] in pair:
            names += [name for name in pair if name in classes and name not in names]
    others = [name for name in classes if name not in names]
    if joined and others:
        names.append(others[rng.below(len(others))])
    return names


def _background(rng: _Random, size: int) -> np.ndarray:
    """Two colours blended by one of five textures, then up to three shapes, then grit; (3, S, S), about [0, 1]."""
    x = ((np.arange(size) + 0.5) / size).astype(np.float32)
    y = x[:, None]
    kind = rng.below(5)
    if kind == 0:  # clouds
        blend = (2 * _noise(rng, size, (4, 8, 16, 32), rng.between(0.5, 0.9)) - 0.5).clip(0, 1)
    elif kind == 1:  # a slope of light
        dx, dy = rng.direction()
        blend = (dx * x + dy * (y - (dy < 0))) / (dx + abs(dy))
    elif kind == 2:
        blend = _stripes(rng, x, y)
    elif kind == 3:  # cloth
        blend = _stripes(rng, x, y) * _stripes(rng, x, y)
    else:  # patches
        count = 3 + rng.below(5)
        patch = np.arange(size) * count // size
        blend = rng.array(count, count)[patch[:, None], patch]
    one, other = rng.colour(0.2, 0.8), rng.colour(0.2, 0.8)
    image = one + (other - one) * blend
    grit = _noise(rng, size, (16, 32, 64), rng.between(0.5, 1)) - 0.5
    for _ in range(rng.below(4)):  # distractors: ellipses and rectangles
        (dx, dy), cx, cy = rng.direction(), rng.between(0, 1), rng.between(0, 1)
        u = (dx * (x - cx) + dy * (y - cy)) / rng.between(0.06, 0.2)
        v = (dx * (y - cy) - dy * (x - cx)) / rng.between(0.06, 0.2)
        shape = u * u + v * v < 1 if rng.below(5) < 3 else (np.abs(u) < 1) & (np.abs(v) < 1)
        image = np.where(shape, rng.colour(0.2, 0.9) * (1 + rng.between(0, 0.8) * grit), image)
    return image + rng.between(0.1, 0.35) * grit


def _noise(rng: _Random, size: int, cells: Sequence[int], roughness: float) -> np.ndarray:
    """Value noise in [0, 1]: random lattices, each `roughness` times as strong as the coarser one before."""
    total, weights, weight = np.zeros((size, size), np.float32), 0.0, 1.0
    for count in cells:
        total += weight * _resize(rng.array(count, count), size, size)
        weights += weight
        weight *= roughness
    return total / weights


def _stripes(rng: _Random, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A triangle wave of 2 to 9 periods in a random direction, in [0, 1]."""
    (dx, dy), periods = rng.direction(), rng.between(2, 9)
    phase = periods * (dx * x + dy * y) + rng.between(0, 1)
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def _resize(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear over the last two axes; pixels are areas (`align_corners` False), edges are replicated."""
    here, there, weight = _taps(grid.shape[-2], height)
    first, second = grid.take(here, -2), grid.take(there, -2)
    grid = first + (second - first) * weight[:, None]
    here, there, weight = _taps(grid.shape[-1], width)
    first, second = grid.take(here, -1), grid.take(there, -1)
    return first + (second - first) * weight


@functools.lru_cache(4096)
def _taps(cells: int, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two cells around each pixel, and the weight of the second."""
    at = ((np.arange(pixels) + 0.5) * cells / pixels - 0.5).clip(0, cells - 1)
    here = at.astype(np.int64)
    return here, (here + 1).clip(0, cells - 1), (at - here).astype(np.float32)


def _nearest(count: int) -> np.ndarray:
    return (2 * np.arange(count) + 1) * SIDE // (2 * count)


def _span(extent: float, place: float, size: int) -> tuple[int, int]:
    """Fractions to pixels: the length of an object, and where it starts; it lies inside the scene."""
    length = int(extent * size + 0.5)
    return length, int(place * (size - length + 1))


@functools.cache
def _objects() -> dict[str, np.ndarray]:
    with np.load(DATA) as data:
        return {split: data[split] for split in SPLITS}


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"write": write_voc, "build": build_objects})
