"""Prepare COCO 2014 or 2017 for semantic segmentation, from the official annotations and images.

    python examples/prepare_coco.py --coco coco --year 2014 --out data/coco

Expects annotations/instances_{train,val}YEAR.json and the folders trainYEAR and valYEAR. Writes masks/{train,val}/*.png
(indexed), train.json and val.json. COCO numbers its 80 classes 1..90, with gaps; masks hold 0 for background and 1..80
in the order of those numbers. A mask is the union of the instances of each class; where classes overlap the instance
with fewer pixels is on top. Images without any annotation are left out, as in the literature (82,081 and 40,137 remain
of COCO 2014). Other data in COCO's format works as well, up to 254 classes. Run it again to complete what was cut off.
"""

import json
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

try:
    import numpy as np
    from pycocotools import mask as rle
    from recipe.data import IGNORE, Item, check_name, decoding, read_image
    from recipe.prepare import Done, Summary, claim, command, digest, saved_mask, work
    from rich.console import Console
except ImportError as error:
    sys.exit(f"prepare_coco needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

OFFICIAL = {  # images: all, and those with an annotation
    ("2014", "train"): (82_783, 82_081),
    ("2014", "val"): (40_504, 40_137),
    ("2017", "train"): (118_287, 117_266),
    ("2017", "val"): (5_000, 4_952),
}
SPLITS = ("train", "val")
MASKS = "masks"
FAR = 100_000  # pixels, far outside any image
PRODUCTS = (MASKS, *(f"{split}.json" for split in SPLITS))


@dataclass(frozen=True)
class Settings:
    """COCO for semantic segmentation."""

    coco: Path
    """the folder with annotations/, train2014/, val2014/ (or 2017)"""
    year: str | None = None
    """2014 or 2017; needed where the annotations of several years are there"""
    images: Path | None = None
    """the folder with trainYEAR/ and valYEAR/, if it is not --coco"""
    crowd: Literal["class", "ignore"] = "class"
    """paint crowd regions as their class, or as 255, which is not scored"""
    keep_unlabelled: bool = False
    """keep images without any annotation, as all background"""
    out: Path = Path("data/coco")
    """a new folder, or an earlier output to complete"""
    workers: int = 0
    """processes; 0: one a CPU"""
    overwrite: bool = False
    """remove what an earlier run wrote to --out, and build it anew"""


class Instance(NamedTuple):
    """One annotation; `value` is what it paints, `label` its class from 0."""

    id: int
    label: int
    value: int
    segmentation: Any


class Task(NamedTuple):
    """One image; its size is that of the annotations."""

    name: str
    image: Path
    size: tuple[int, int]
    instances: tuple[Instance, ...]
    num_labels: int
    mask: Path


class Annotations(NamedTuple):
    """What an instances_*.json holds: class names by category id, images, and instances by image id."""

    categories: dict[int, str]
    images: list[dict[str, Any]]
    instances: dict[int, list[dict[str, Any]]]


def packed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the JSON with its polygons as arrays: a quarter of the memory of lists, which takes gigabytes."""
    if isinstance(polygons := entry.get("segmentation"), list):
        with suppress(TypeError, OverflowError):  # no numbers: it is told when the image is painted
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
    return entry


def read_annotations(path: Path) -> Annotations:
    """Read an instances_*.json and check what refers to what."""
    with decoding("--coco", path):
        raw = json.loads(path.read_text(encoding="utf-8"), object_hook=packed)
        categories = {int(each["id"]): str(each["name"]) for each in sorted(raw["categories"], key=lambda c: c["id"])}
        images = sorted(raw["images"], key=lambda each: each["file_name"])
        known = {each["id"] for each in images if int(each["height"]) > 0 and int(each["width"]) > 0}
        instances = defaultdict(list)
        for each in raw["annotations"]:
            if each["category_id"] not in categories:
                raise ValueError(f"annotation {each['id']} has the unknown category {each['category_id']}")
            if each["image_id"] not in known:
                raise ValueError(f"annotation {each['id']} is of the unknown image {each['image_id']}")
            instances[each["image_id"]].append(each)
        if not categories or not images or len(known) < len(images):
            raise ValueError("it lists no category, no image, an image twice, or one without pixels")
        if len(categories) > 254:
            raise ValueError(f"it has {len(categories)} classes, and an indexed PNG holds 254 at most")
        if twice := [name for name, count in Counter(categories.values()).items() if count > 1]:
            raise ValueError(f"it has several categories called {twice[0]!r}; name each class once")
        return Annotations(categories, images, instances)


def covered(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of one instance, bool (H, W), by COCO's own rasteriser; checks what that one would not."""
    if isinstance(segmentation, list):
        # The rasteriser takes four numbers for a box, and leaves a stray last one out.
        if not segmentation or any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
            raise ValueError("expected polygons of three points or more, x y x y x y")
        polygons = [[float(number) for number in polygon] for polygon in segmentation]
        # Nor does it stop at a point far away: it walks there, pixel by pixel.
        if any(not abs(number) <= FAR for polygon in polygons for number in polygon):
            raise ValueError(f"expected coordinates within -{FAR:,}..{FAR:,}, got others, or NaN")
        codes = rle.frPyObjects(polygons, height, width)
    elif list(segmentation["size"]) != [height, width]:
        raise ValueError(f"expected an RLE of size {[height, width]} as its image, got {segmentation['size']}")
    elif isinstance(segmentation["counts"], list):
        counts = segmentation["counts"]
        if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"expected RLE counts of 0 or more that sum to {height * width}, got {sum(counts)}")
        codes = [rle.frPyObjects(segmentation, height, width)]
    else:
        codes = [segmentation]
    return rle.decode(rle.merge(codes)).astype(bool)


def paint(size: tuple[int, int], instances: Sequence[Instance]) -> np.ndarray:
    """The label map: instances from the largest to the smallest, so that the smaller one is on top."""
    shapes = []
    for each in instances:
        try:
            shapes.append((each, covered(each.segmentation, *size)))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"annotation {each.id}: {error}") from error
    label = np.zeros(size, np.uint8)
    for each, shape in sorted(shapes, key=lambda pair: (-int(pair[1].sum()), pair[0].id)):
        label[shape] = each.value
    return label


def make(task: Task) -> Done:
    """Write the mask of one image, unless a good one is there."""
    _, height, width = read_image(task.image).shape
    if (height, width) != task.size:
        raise ValueError(
            f"{task.image}: it has {height} x {width} pixels (H x W), its annotations are for "
            f"{task.size[0]} x {task.size[1]}. Take the original image."
        )
    draw = partial(paint, task.size, task.instances)
    kept, values = saved_mask(task.mask, task.num_labels, task.size, draw, task.image)
    labels = tuple(sorted({each.label for each in task.instances}))
    item = Item(task.name, task.image.absolute(), task.mask, labels)
    return Done(task.name, item, kept=kept, values=values)


def find_year(folder: Path, year: str | None) -> str:
    """The year whose two annotation files are there."""
    found = sorted(path.stem.removeprefix("instances_train") for path in folder.glob("instances_train*.json"))
    found = [each for each in found if (folder / f"instances_val{each}.json").is_file()]
    if year is None and len(found) == 1:
        return found[0]
    if year is None or year not in found:
        raise ValueError(
            f"{'--coco' if year is None else '--year'}: expected instances_train{year or 'YEAR'}.json and "
            f"instances_val{year or 'YEAR'}.json in {folder}; found both for: {', '.join(found) or 'no year'}. "
            "Unpack the annotations, and choose by --year."
        )
    return year


def run(settings: Settings, console: Console) -> int:
    """Build the folder and report."""
    folder, root = settings.coco / "annotations", settings.images or settings.coco
    year = find_year(folder, settings.year)
    paths = {split: folder / f"instances_{split}{year}.json" for split in SPLITS}
    pictures = {split: root / f"{split}{year}" for split in SPLITS}
    for path in pictures.values():
        if not path.is_dir():
            raise ValueError(f"--images: expected the folder {path}. Unpack the images, or name where they are.")
    console.print(f"Reading {', '.join(path.name for path in paths.values())} ...")
    read = {split: read_annotations(path) for split, path in paths.items()}
    categories = read["train"].categories
    if read["val"].categories != categories:
        raise ValueError(f"--coco: the categories of {paths['train']} and {paths['val']} differ. Take one release.")
    values = {category: value for value, category in enumerate(categories, start=1)}
    used = {
        "images": str(root.resolve()),
        "files": {f"{path.name} (--coco)": digest(path) for path in paths.values()},
        "crowd": settings.crowd,
        "keep_unlabelled": settings.keep_unlabelled,
    }
    tasks, notes = {}, []
    for split, annotations in read.items():
        tasks[split] = []
        for image in annotations.images:
            name = str(PurePosixPath(image["file_name"]).with_suffix(""))
            check_name(str(paths[split]), name)
            instances = tuple(
                Instance(
                    int(each["id"]),
                    values[each["category_id"]] - 1,
                    IGNORE if settings.crowd == "ignore" and each.get("iscrowd") else values[each["category_id"]],
                    each.get("segmentation"),
                )
                for each in annotations.instances.get(image["id"], ())
            )
            if instances or settings.keep_unlabelled:
                mask = settings.out.absolute() / MASKS / split / f"{name}.png"
                size = (int(image["height"]), int(image["width"]))
                picture = pictures[split] / image["file_name"]
                tasks[split].append(Task(name, picture, size, instances, len(categories) + 1, mask))
        if empty := len(annotations.images) - len(tasks[split]):
            notes.append(f"{split}: {empty:,} images without any annotation left out; --keep-unlabelled keeps them.")
    claim(
        settings.out,
        "prepare_coco",
        used,
        products=PRODUCTS,
        sources=[*paths.values(), *pictures.values()],
        overwrite=settings.overwrite,
    )
    summary = Summary(settings.out, tuple(categories.values()), console)
    everything = [task for split in SPLITS for task in tasks[split]]
    done = iter(work(make, everything, workers=settings.workers, title="masks", console=console))
    for split in SPLITS:
        official = OFFICIAL.get((year, split), (None, None))[0 if settings.keep_unlabelled else 1]
        summary.add(split, islice(done, len(tasks[split])), official)
    moved = [f"{category} ({name}) is {values[category]}" for category, name in categories.items()]
    notes.insert(0, f"Category ids {min(values)}..{max(values)} became 1..{len(values)} in their order: {moved[-1]}.")
    notes.insert(1, f"Crowd regions are painted as {'255' if settings.crowd == 'ignore' else 'their class'}.")
    return summary.finish("prepare_coco", used, notes)


def main() -> int:
    """Run from the command line."""
    return command("prepare_coco", Settings, run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
