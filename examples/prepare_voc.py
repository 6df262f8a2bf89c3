"""Prepare PASCAL VOC 2012 with the SBD masks, from the two official archives alone.

    python examples/prepare_voc.py --voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE --out data/voc

Writes SegmentationClassAug/*.png (indexed: 0 background, 1..20, 255 void), the lists train_aug, train, val and test,
and train.json (train_aug: VOC train and all of SBD, without VOC val), voc_train.json, val.json and test.json. Where VOC
has a mask of its own, it wins over SBD's. Image labels are the objects in the XML annotations, difficult ones included;
where there is no XML they come from the mask. Test has neither. Run it again to complete what was cut off.
"""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    from recipe.data import IGNORE, Item, decoding, read_image
    from recipe.files import write_text
    from recipe.prepare import Done, Summary, claim, command, digest, saved_mask, work
    from recipe.progress import some
    from rich.console import Console
    from scipy.io import loadmat
except ImportError as error:
    sys.exit(f"prepare_voc needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from ffr.draw import load_label

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
OFFICIAL = {"train": 10_582, "voc_train": 1_464, "val": 1_449, "test": 1_456}
LISTS = {"train": "train_aug", "voc_train": "train", "val": "val", "test": "test"}  # names of the text files
MASKS = "SegmentationClassAug"
PRODUCTS = (MASKS, "lists", *(f"{split}.json" for split in OFFICIAL))


@dataclass(frozen=True)
class Settings:
    """PASCAL VOC 2012 and SBD."""

    voc: Path
    """the folder VOC2012, with JPEGImages, Annotations, SegmentationClass and ImageSets"""
    sbd: Path
    """the folder benchmark_RELEASE, with dataset/cls, dataset/train.txt and dataset/val.txt"""
    out: Path = Path("data/voc")
    """a new folder, or an earlier output to complete"""
    workers: int = 0
    """processes; 0: one a CPU"""
    overwrite: bool = False
    """remove what an earlier run wrote to --out, and build it anew"""


class Task(NamedTuple):
    """One image and where its parts are; None where the split has no such part."""

    name: str
    voc: Path
    sbd: Path
    out: Path | None
    own: bool


def read_list(path: Path, flag: str) -> list[str]:
    """The names in a list of VOC or SBD."""
    if not path.is_file():
        raise ValueError(f"{flag}: there is no list {path}. Unpack the whole archive.")
    names = path.read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"{flag}: the list {path} is empty. Unpack the archive again.")
    if len(set(names)) < len(names):
        raise ValueError(f"{flag}: the list {path} has a name twice. Unpack the archive again.")
    return names


def find(root: Path, inner: str, needed: str, flag: str) -> Path:
    """The folder that holds `needed`: `root`, or `inner` below it."""
    for folder in (root, root / inner):
        if (folder / needed).is_dir():
            return folder
    raise ValueError(f"{flag}: expected the folder {needed} in {root} or {root / inner}. Name the unpacked archive.")


def labels_of(annotation: Path) -> tuple[int, ...]:
    """The classes of the objects in an XML annotation."""
    with decoding("labels_of", annotation):
        # An object's parts (head, hand, foot) have names too: only its own counts.
        names = {each.findtext("name", "").strip() for each in ElementTree.parse(annotation).getroot().iter("object")}
        if unknown := names - set(CLASSES):
            raise ValueError(f"unknown class {', '.join(sorted(unknown))!r}")
    return tuple(sorted(CLASSES.index(name) for name in names))


def label_map(path: Path) -> np.ndarray:
    """The label map in a PNG of VOC, or GTcls.Segmentation of a file of SBD."""
    with decoding("label_map", path), path.open("rb") as file:
        if path.suffix == ".png":
            return load_label(path)
        return np.asarray(loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])


def make(task: Task) -> Done:
    """Write the mask of one image, unless a good one is there, and find its labels."""
    image = task.voc / "JPEGImages" / f"{task.name}.jpg"
    note = None
    if not image.is_file() and (task.sbd / "img" / image.name).is_file():
        image, note = task.sbd / "img" / image.name, "image"
    _, height, width = read_image(image).shape
    if task.out is None:
        return Done(task.name, Item(task.name, image.absolute(), None, None), note=note)

    source = task.voc / "SegmentationClass" / f"{task.name}.png"
    if not task.own and not source.is_file():
        source = task.sbd / "cls" / f"{task.name}.mat"
    kept, values = saved_mask(task.out, len(CLASSES) + 1, (height, width), lambda: label_map(source), source)
    annotation = task.voc / "Annotations" / f"{task.name}.xml"
    if annotation.is_file():
        labels = labels_of(annotation)
    else:
        labels, note = tuple(value - 1 for value in values if value not in (0, IGNORE)), note or "labels"
    return Done(task.name, Item(task.name, image.absolute(), task.out, labels), kept=kept, values=values, note=note)


def run(settings: Settings, console: Console) -> int:
    """Build the folder and report."""
    voc = find(settings.voc, "VOC2012", "JPEGImages", "--voc")
    sbd = find(settings.sbd, "dataset", "cls", "--sbd")
    lists = voc / "ImageSets" / "Segmentation"
    sources = [lists / "train.txt", lists / "val.txt", sbd / "train.txt", sbd / "val.txt"]
    train, val = (read_list(path, "--voc") for path in sources[:2])
    more = [name for path in sources[2:] for name in read_list(path, "--sbd")]
    splits = {"train": sorted({*train, *more} - set(val)), "voc_train": train, "val": val}
    if (lists / "test.txt").is_file():
        splits["test"] = read_list(lists / "test.txt", "--voc")
    files = {f"{path.name} ({'--voc' if path.parent == lists else '--sbd'})": digest(path) for path in sources}
    used = {"voc": str(voc.resolve()), "sbd": str(sbd.resolve()), "files": files}
    claim(
        settings.out, "prepare_voc", used, products=PRODUCTS, sources=[voc, sbd, *sources], overwrite=settings.overwrite
    )
    for split, names in splits.items():
        write_text(settings.out / "lists" / f"{LISTS[split]}.txt", "".join(f"{name}\n" for name in names))
    own = {*train, *val}
    masks = settings.out.absolute() / MASKS
    tasks = [Task(name, voc, sbd, masks / f"{name}.png", name in own) for name in sorted({*splits["train"], *own})]
    tasks += [Task(name, voc, sbd, None, False) for name in splits.get("test", ())]
    done = {each.name: each for each in work(make, tasks, workers=settings.workers, title="masks", console=console)}
    summary = Summary(settings.out, CLASSES, console)
    for split, names in splits.items():
        summary.add(split, [done[name] for name in names], OFFICIAL[split])
    drawn = sum(each.note == "labels" for each in done.values())
    notes = [f"{drawn:,} images have no XML annotation: their labels come from the mask."] if drawn else []
    borrowed = [each.name for each in done.values() if each.note == "image"]
    if borrowed:
        notes.append(f"{len(borrowed):,} images are not in JPEGImages; SBD's are used: {some(borrowed)}")
    return summary.finish("prepare_voc", used, notes)


def main() -> int:
    """Run from the command line."""
    return command("prepare_voc", Settings, run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
