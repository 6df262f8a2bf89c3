"""Prepared folders, and the images of training and evaluation.

A prepared folder holds ``train.json`` and ``val.json`` (``test.json``), written by the ``prepare_*.py`` scripts:

    {"classes": ["cat", ...],                                      # K names, background not among them
     "items": [{"name": "a/b", "image": "a/b.jpg", "mask": "masks/b.png" or null, "labels": [0, ...] or null}]}

Paths are relative to the folder, or absolute. Labels count classes from 0; masks hold 0 for background, then 1..K,
and 255 where a pixel is not scored.
"""

import functools
import json
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ffr.draw import load_label
from recipe.config import Config
from recipe.files import write_text
from recipe.progress import some
from recipe.scenes import CLASSES, Scenes, make_scenes

IGNORE = 255
QUIET = ("ignore", None, Image.DecompressionBombWarning, None, 0)  # large images are read all the same
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Item(NamedTuple):
    """One image; `labels` are class numbers from 0, and None says that nobody knows them."""

    name: str
    image: Path
    mask: Path | None
    labels: tuple[int, ...] | None


class Split(NamedTuple):
    """The images of a split and the names of the K classes, background not among them."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]


class Example(NamedTuple):
    """One image for evaluation: uint8 (3, H, W); mask uint8 (H, W) and labels float (K,), each None if unknown."""

    name: str
    image: Tensor
    mask: Tensor | None
    labels: Tensor | None


# Prepared folders -------------------------------------------------------------------------------------------------


def read_split(folder: Path, split: str) -> Split:
    """Read ``folder/split.json`` and check every entry, so that a mistake shows before the first step.

    Raises:
        FileNotFoundError: if the list, an image or a mask is not there; all three name the file.
        ValueError: if the list is empty or an entry cannot be used; the message names list and entry.
    """
    path = Path(folder) / f"{split}.json"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in Path(folder).glob("*.json") if p.stem != "prepare")) or "none"
        raise FileNotFoundError(
            f"read_split: there is no {path}; splits found: {found}. Check --data and the name of the split, or run a "
            "prepare_*.py script."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        classes, entries = raw["classes"], raw["items"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'read_split: expected JSON with "classes" and "items" in {path} ({error}). Prepare it again.'
        ) from error
    items = []
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"read_split: {path} lists no image. Prepare the folder again.")
    for number, entry in enumerate(entries):
        try:
            items.append(_item(Path(folder), entry))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"read_split: item {number} of {path} is no entry ({error!r}). Prepare it again."
            ) from error
    _check_split(str(path), classes, items)
    for item in items:
        for kind, file in (("image", item.image), ("mask", item.mask)):
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"read_split: the {kind} of {item.name!r} in {path} is missing: {file}.")
    return Split(tuple(classes), tuple(items))


def write_split(folder: Path, split: str, classes: Sequence[str], items: Sequence[Item]) -> Path:
    """Write ``folder/split.json``, whole or not at all, and return its path.

    Files inside `folder` are listed relative to it, so that it can be moved; others by their absolute path.
    """
    path = Path(folder) / f"{split}.json"
    _check_split(str(path), list(classes), items)
    root = Path(folder).resolve()

    def listed(file: Path | None) -> str | None:
        if file is None:
            return None
        whole = file.absolute()  # not resolved: a link keeps its name
        for base in (root, Path(folder).absolute()):
            if whole.is_relative_to(base):
                return whole.relative_to(base).as_posix()
        return str(whole)

    entries = [
        {
            "name": item.name,
            "image": listed(item.image),
            "mask": listed(item.mask),
            "labels": None if item.labels is None else sorted(item.labels),
        }
        for item in items
    ]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    text = f'{{"classes": {json.dumps(list(classes), ensure_ascii=False)},\n"items": [\n{lines}\n]}}\n'
    write_text(path, text)
    return path


def _item(folder: Path, entry: dict[str, Any]) -> Item:
    mask, labels = entry.get("mask"), entry.get("labels")
    name, image = entry["name"], folder / entry["image"]
    return Item(name, image, None if mask is None else folder / mask, None if labels is None else tuple(labels))


def _check_split(owner: str, classes: Any, items: Sequence[Item]) -> None:
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"{owner}: expected the classes as a list of names, got {classes!r}.")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{owner}: the class {twice[0]!r} is listed twice. Name every class once.")
    if not items:
        raise ValueError(f"{owner}: there is no image to list.")
    seen: set[str] = set()
    for item in items:
        check_name(owner, item.name)
        if item.name in seen:
            raise ValueError(f"{owner}: the name {item.name!r} is listed twice. Names tell images apart.")
        seen.add(item.name)
        if item.labels is None:
            continue
        for label in item.labels:
            if type(label) is not int or not 0 <= label < len(classes):
                raise ValueError(f"{owner}: expected labels in 0..{len(classes) - 1} for {item.name!r}, got {label!r}.")
        if len(set(item.labels)) < len(item.labels):
            raise ValueError(f"{owner}: a label of {item.name!r} is listed twice: {list(item.labels)}.")


def check_name(owner: str, name: Any) -> None:
    """Refuse a name that leads out of its folder: masks and predictions are called after it."""
    parts = name.split("/") if isinstance(name, str) and name.strip() else [""]
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name or name != name.encode(errors="ignore").decode():
        raise ValueError(f"{owner}: {name!r} is no name of an image. Use a relative path with forward slashes.")


# Files ------------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Tensor:
    """Read an image as RGB, uint8 (3, H, W), turned as its EXIF orientation says.

    Grey becomes RGB, 16-bit grey keeps its upper 8 bits, CMYK and palettes are converted, and what is transparent
    shows white, as a viewer would draw it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be decoded to its end; names the file.
    """
    with decoding("read_image", path), Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            deep = np.asarray(picture).astype(np.int64)
            if deep.min() < 0 or deep.max() > 65535:
                raise ValueError(f"its values {deep.min()}..{deep.max()} do not fit 16 bits; save it with 8 bits")
            grey = (deep >> 8).astype(np.uint8)
            pixels = np.stack([grey, grey, grey], axis=-1)
        elif picture.mode == "F":
            raise ValueError("its values are floats, whose range is unknown; save it with 8 bits")
        else:
            if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_mask(path: str | Path, num_labels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Read a label map, uint8 (H, W), from an indexed or 8-bit grey PNG.

    Args:
        path: the file.
        num_labels: K + 1; values are 0..K, or 255.
        size: (H, W) that it must have, its image's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a broken file, another format (RGB above all), a foreign value or size; names the file.
    """
    with decoding("read_mask", path):
        mask = load_label(path)
    if size is not None and mask.shape != tuple(size):
        turned = " The photo may be turned by its EXIF orientation: turn the mask, too."
        raise ValueError(
            f"read_mask: expected {size[0]} x {size[1]} pixels (H x W) as its image, got {mask.shape[0]} x "
            f"{mask.shape[1]} in {path}.{turned if mask.shape == tuple(size)[::-1] else ''}"
        )
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    if foreign := [int(value) for value in values if num_labels <= value != IGNORE]:
        raise ValueError(
            f"read_mask: expected values 0..{num_labels - 1} or 255, got {', '.join(map(str, foreign[:8]))} in {path}. "
            "Check the classes and their order."
        )
    return torch.from_numpy(mask)


def left_alone(others: Sequence[Path], where: object) -> str:
    """Say which files were passed over, for they are not called like an image."""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
    listed = some([f"{suffix} {count:,}" for suffix, count in kinds.most_common()])
    return f"{len(others):,} other files in {where} are left alone ({listed}); read are {' '.join(sorted(SUFFIXES))}."


@contextmanager
def decoding(owner: str, path: str | Path) -> Iterator[None]:
    """Name the file in whatever a decoder raises; a missing file stays a FileNotFoundError."""
    if QUIET not in warnings.filters:  # each change of the filters would make warnings new that were given once
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{owner}: there is no file {path}.") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, zlib.error, ...
        said = str(error).rstrip(".")
        if isinstance(error, Image.DecompressionBombError):  # it speaks of an attack
            said = re.sub(r"(\d+)\d{6} pixels", r"\1 megapixels", said.partition(", could")[0]) + ": shrink it"
        raise ValueError(f"{owner}: cannot read {path}: {said}.") from error


# Training ---------------------------------------------------------------------------------------------------------


class TrainImages(Dataset[tuple[Tensor, Tensor]]):
    """Sample number n of the whole run: an augmented crop, uint8 (3, crop, crop), and its labels, float (K,).

    Which image and which augmentation follows from (seed, n) alone: it is the same for any number of workers and
    ranks, and after a restart. Every ``len(self)`` numbers from a multiple of it on visit each image once, in an order
    of their own. Pass the numbers of `samples` to a DataLoader as its batch sampler; n has no upper bound.

    The augmentation: random resized crop, flip, and colour jitter for a part `jitter` of the samples. No blur: it
    would weaken the high band. Labels are the whole image's, whatever the crop shows, as everywhere in the field.
    """

    def __init__(
        self,
        split: Split,
        crop: int = 448,
        seed: int = 0,
        scale: tuple[float, float] = (0.32, 1.0),
        flip: float = 0.5,
        jitter: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"TrainImages: expected `scale` with 0 < low <= high <= 1, got {scale}.")
        if crop < 1 or seed < 0:
            raise ValueError(f"TrainImages: expected `crop` >= 1 and `seed` >= 0, got {crop} and {seed}.")
        for item in split.items:
            if item.labels is None:
                raise ValueError(f"TrainImages: {item.name!r} has no labels. Training needs them for every image.")
        from torchvision.transforms import v2  # seconds to import, for each process of a script that only reads images

        self.split, self.seed = split, seed
        colours = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop((crop, crop), scale=scale, antialias=True),
                v2.RandomHorizontalFlip(flip),
                v2.RandomApply([colours], jitter),
            ]
        )

    def __len__(self) -> int:
        return len(self.split.items)

    def item(self, n: int) -> Item:
        """The item that sample number n shows."""
        if n < 0:
            raise IndexError(f"TrainImages: expected a sample number of 0 or more, got {n}.")
        epoch, place = divmod(n, len(self))
        return self.split.items[_order(self.seed, epoch, len(self))[place]]

    def name(self, n: int) -> str:
        """What sample number n shows, for a message."""
        return self.item(n).name

    def names(self) -> list[str]:
        """Of all images, each with its labels: what decides the samples beside the settings."""
        return [f"{item.name} {sorted(item.labels or ())}" for item in self.split.items]

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        item = self.item(n)
        image = read_image(item.image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, 1, n))  # torch.manual_seed would reseed every GPU too
            return self.augment(image), _row(item.labels or (), len(self.split.classes))


def samples(step: int, batch_size: int, rank: int, world_size: int, accumulate: int = 1) -> list[int]:
    """The sample numbers of a rank at a step of the global batch `batch_size`, in `accumulate` equal parts.

    Step s holds the numbers s G .. s G + G - 1. Part m of all ranks together is one run of them, so what is
    normalised over a part does not depend on the number of ranks.
    """
    if not 0 <= rank < world_size or step < 0 or accumulate < 1 or batch_size < 1:
        raise ValueError(
            f"samples: expected 0 <= rank < world_size and step, accumulate, batch_size in range, got rank={rank}, "
            f"world_size={world_size}, step={step}, accumulate={accumulate}, batch_size={batch_size}."
        )
    share, rest = divmod(batch_size, world_size * accumulate)
    if rest:
        raise ValueError(
            f"samples: expected `batch_size` (global) to be a multiple of ranks x accumulate = {world_size} x "
            f"{accumulate}, got {batch_size}."
        )
    starts = (step * batch_size + (part * world_size + rank) * share for part in range(accumulate))
    return [start + i for start in starts for i in range(share)]


@functools.lru_cache(maxsize=4)  # a batch may span two epochs
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(mixed(seed, 0, epoch))
    return torch.randperm(count, generator=generator).tolist()


def mixed(*entropy: int) -> int:
    """Mix numbers to one of 32 bits, all that torch's generator takes in; neighbours get unrelated ones."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class SceneImages(Dataset[tuple[Tensor, Tensor]]):
    """As `TrainImages`, of embedded scenes in memory: float in [0, 1], (3, size, size), and labels.

    Step s of the global batch is drawn as a whole from (seed, s); sample n is number n % batch_size of its step.
    Flip, shift and colour only, for the scenes are small. No blur: it would weaken the high band.
    """

    def __init__(self, scenes: Scenes, batch_size: int, seed: int) -> None:
        from torchvision.transforms import v2

        self.scenes, self.batch_size, self.seed = scenes, batch_size, seed
        side = scenes.images.shape[-1]
        self.augment = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomCrop(side, padding=side // 10, padding_mode="reflect"),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )
        self._last: tuple[int, tuple[Tensor, Tensor]] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """All samples of a step, the same whatever trains on them."""
        if self._last is None or self._last[0] != step:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed * 1_000_003 + step)
                chosen = torch.randint(len(self.scenes.images), (self.batch_size,))
                images = torch.stack([self.augment(image) for image in self.scenes.images[chosen]])
            self._last = step, (images, self.scenes.labels[chosen])
        return self._last[1]

    def name(self, n: int) -> str:
        """What sample number n shows, for a message."""
        return f"scene {n % self.batch_size} of step {n // self.batch_size}"

    def names(self) -> list[str]:
        """None: the settings decide the scenes."""
        return []

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch(n // self.batch_size)
        return images[n % self.batch_size], labels[n % self.batch_size]


@contextmanager
def loading(dataset: Dataset[Any], **how: Any) -> Iterator[Iterator[Any]]:
    """Iterate over a `DataLoader`, whose workers leave signals to this process, and end with the block.

    Schedulers and Ctrl-C signal every process, and this one still has a step to finish. A traceback would keep workers.
    """
    loader = DataLoader(dataset, worker_init_fn=_patient, **how)
    batches = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # torch has no public name for it


def _patient(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # as long as a scheduler waits before it kills


def _row(labels: Sequence[int], count: int) -> Tensor:
    row = torch.zeros(count)
    row[list(labels)] = 1
    return row


# Evaluation -------------------------------------------------------------------------------------------------------


class EvalImages(Dataset[Example]):
    """The images of a split in their order, each as it is: ``Example(name, image, mask, labels)``."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.items)

    def scored(self, limit: int | None = None) -> int:
        """How many images have a mask, of all or of the first `limit`."""
        return sum(item.mask is not None for item in self.split.items[:limit])

    def name(self, index: int) -> str:
        """Of an image, for a message."""
        return self.split.items[index].name

    def __getitem__(self, index: int) -> Example:
        item, classes = self.split.items[index], len(self.split.classes)
        image = read_image(item.image)
        size = (image.shape[1], image.shape[2])
        mask = None if item.mask is None else read_mask(item.mask, classes + 1, size)
        return Example(item.name, image, mask, None if item.labels is None else _row(item.labels, classes))


class SceneExamples(Dataset[Example]):
    """As `EvalImages`, of embedded scenes in memory."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def scored(self, limit: int | None = None) -> int:
        """How many images have a mask, of all or of the first `limit`."""
        return len(self) if limit is None else min(limit, len(self))

    def __len__(self) -> int:
        return len(self.scenes.images)

    def name(self, index: int) -> str:
        """Of a scene."""
        return f"{index:05d}"

    def __getitem__(self, index: int) -> Example:
        images, masks, labels = self.scenes
        return Example(self.name(index), images[index], masks[index], labels[index])


# What a run reads -------------------------------------------------------------------------------------------------


def training_data(config: Config) -> tuple[TrainImages | SceneImages, tuple[str, ...]]:
    """The samples that `config` trains on, and the names of the classes."""
    if config.data is None:
        scenes = make_scenes("train", config.scenes[0], config.crop, config.seed)
        return SceneImages(scenes, config.batch_size, config.seed), CLASSES
    split = read_split(config.data, config.train_split)
    images = TrainImages(split, config.crop, config.seed, config.crop_scale, config.flip, config.jitter)
    return images, split.classes


def evaluation_data(config: Config, split: str) -> tuple[EvalImages | SceneExamples, tuple[str, ...]]:
    """The images of a split, and the names of the classes."""
    if config.data is None:
        return SceneExamples(make_scenes(split, config.scenes[1], config.crop, config.seed)), CLASSES
    found = read_split(config.data, split)
    return EvalImages(found), found.classes
