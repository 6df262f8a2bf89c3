"""Prepare a folder of one's own images for training: any number of classes, any file names, nested folders.

    python examples/prepare_folder.py --images photos                       # photos/cat/1.jpg shows a cat
    python examples/prepare_folder.py --images photos --labels labels.csv --val-fraction 0.2 --seed 1
    python examples/prepare_folder.py --images photos --labels labels.json --masks masks --val-list val.txt

Labels are one of
    a folder per class      photos/cat/..., photos/dog/...: one label an image
    CSV, one column a class name,cat,dog        then  a/b.jpg,1,0
    CSV, one column         name,labels         then  a/b.jpg,cat;dog
    JSON                    {"a/b.jpg": ["cat", "dog"], ...}

with names relative to --images, with or without their suffix. Masks, if any, are indexed PNGs masks/a/b.png: 0 for
background, 1..K in the order of the classes, 255 for not scored. A mask that cannot be used is left out and named, and
its image kept without: training needs labels alone, and scoring passes over it. Writes train.json and val.json; copies
nothing.
"""

import csv
import hashlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

try:
    from recipe.data import SUFFIXES, Item, check_name, decoding, left_alone, read_image, read_mask
    from recipe.files import files_below
    from recipe.prepare import Done, Summary, claim, command, digest, values_of, work
    from recipe.progress import some
    from rich.console import Console
except ImportError as error:
    sys.exit(f"prepare_folder needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

SPLITS = ("train", "val", "test")
PICTURES = {  # images of these kinds are not read
    ".arw", ".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".nef", ".pgm", ".ppm", ".psd",
    ".svg", ".tga",
}  # fmt: skip
PRODUCTS = tuple(f"{split}.json" for split in SPLITS)


@dataclass(frozen=True)
class Settings:
    """A folder of one's own images."""

    images: Path
    """the folder of the images, searched to its bottom"""
    labels: Path | None = None
    """CSV or JSON; without it the first folder below --images is the class"""
    masks: Path | None = None
    """folder of masks, for evaluation only; an image may be without one, and is where its mask cannot be used"""
    classes: tuple[str, ...] = ()
    """names in the order of the masks' numbers; else the CSV's header, or all names sorted"""
    val_fraction: float = 0.1
    """share of the images for validation, drawn by --seed; for when no list is given"""
    seed: int = 0
    """decides which images are drawn"""
    train_list: Path | None = None
    """text file with a name a line; without it, what no other list names"""
    val_list: Path | None = None
    """text file with a name a line; without it, what no other list names, if --train-list is given"""
    test_list: Path | None = None
    """text file with a name a line, kept out of both; these may lack labels"""
    out: Path = Path("data/folder")
    """a new folder, or an earlier output to complete"""
    workers: int = 0
    """processes; 0: one a CPU"""
    overwrite: bool = False
    """replace the lists that an earlier run wrote to --out"""


class Row(NamedTuple):
    """Labels of one image as written, and where that is."""

    where: str
    name: str
    labels: tuple[str, ...]


class Task(NamedTuple):
    """One image; `labels` None where they are unknown."""

    name: str
    image: Path
    mask: Path | None
    labels: tuple[int, ...] | None
    num_labels: int


def same(name: str) -> str:
    """One spelling of a name: file systems and editors compose accents differently."""
    return unicodedata.normalize("NFC", name.strip().removeprefix("./"))


def below(root: Path, path: Path) -> str:
    """The name of a file: its path below `root`, without its suffix."""
    return str(PurePosixPath(path.relative_to(root).as_posix()).with_suffix(""))


def find_images(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Name -> file for all images below `root`, sorted, and the other files."""
    found: dict[str, Path] = {}
    others: list[Path] = []
    for path in files_below(root):
        if path.suffix.lower() not in SUFFIXES:
            others.append(path)
            continue
        name = below(root, path)
        check_name("--images", name)
        if name in found:
            raise ValueError(f"--images: {found[name]} and {path} differ by their suffix alone. Rename one of them.")
        found[name] = path
    if not found:
        raise ValueError(f"--images: there is no image ({' '.join(sorted(SUFFIXES))}) in {root}. Name another folder.")
    return found, others


def read_text(path: Path) -> str:
    """The text of a file that an editor or a spreadsheet wrote."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}. Save it as UTF-8") from error


def read_csv(path: Path) -> tuple[tuple[str, ...] | None, list[Row]]:
    """Class names of the header, None for the form `name,labels`, and the rows."""
    with decoding("--labels", path):
        text = read_text(path)
        first = text.partition("\n")[0][:80]
        table = csv.reader(io.StringIO(text))
        head = [cell.strip() for cell in next(table, [])]
        if len(head) < 2 or head[0] != "name":
            hint = ". Separate the cells by commas" if {";", "\t"} & set(first) else ""
            raise ValueError(f"line 1: expected the header name,CLASS,CLASS,... or name,labels, got {first!r}{hint}")
        listed = [name.lower() for name in head[1:]] == ["labels"]
        rows = []
        for row in table:
            where, cells = f"{path}, line {table.line_num}", [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != len(head):
                hint = ". Separate several labels by `;`" if listed and len(cells) > 2 else ""
                raise ValueError(f"line {table.line_num}: expected {len(head)} cells, got {','.join(row)!r}{hint}")
            if listed:
                labels = tuple(part.strip() for part in cells[1].split(";") if part.strip())
            elif bad := [cell for cell in cells[1:] if cell not in ("0", "1")]:
                word = len(head) == 2 and not bad[0].isdigit()
                hint = f". Line 1 may mean `labels`, not {head[1]!r}" if word else ""
                raise ValueError(f"line {table.line_num}: expected 0 or 1 for every class, got {bad[0]!r}{hint}")
            else:
                labels = tuple(name for name, cell in zip(head[1:], cells[1:], strict=True) if cell == "1")
            rows.append(Row(where, cells[0], labels))
    return None if listed else tuple(head[1:]), rows


def read_json(path: Path) -> list[Row]:
    """The rows of `{"name": ["class", ...]}`."""

    def pairs(found: list[tuple[str, object]]) -> list[tuple[str, object]]:
        return found  # a dictionary would drop a name that is there twice

    with decoding("--labels", path):
        raw = json.loads(read_text(path), object_pairs_hook=pairs)
        rows = []
        if not isinstance(raw, list) or not all(isinstance(pair, tuple) for pair in raw):
            raise ValueError('expected one object {"name": ["class", ...], ...}')
        for name, labels in raw:
            labels = [labels] if isinstance(labels, str) else labels
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise ValueError(f"expected a list of class names for {name!r}, got {labels!r}")
            rows.append(Row(f"{path}, {name!r}", name, tuple(label.strip() for label in labels if label.strip())))
    return rows


def read_labels(settings: Settings, images: dict[str, Path]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The classes in order, and labels by name; a name without an image stays, to be reported."""
    header = None
    if settings.labels is None:
        flat = [path for name, path in images.items() if "/" not in name]
        if flat:
            raise ValueError(
                f"--images: {flat[0]} lies in no folder of a class. Move it, or give the labels by --labels."
            )
        rows = [Row(str(path), name, (name.partition("/")[0],)) for name, path in images.items()]
    elif settings.labels.suffix.lower() == ".json":
        rows = read_json(settings.labels)
    else:
        header, rows = read_csv(settings.labels)
    if not rows:
        raise ValueError(f"--labels: {settings.labels} lists no image.")
    classes = settings.classes or header or tuple(sorted({label for row in rows for label in row.labels}))
    if not classes:
        raise ValueError(f"--labels: {settings.labels} names no class for any image.")
    if settings.labels is not None and not (settings.classes or header):
        refuse_several(rows, classes)
    if "" in classes or len(set(classes)) < len(classes):
        raise ValueError(f"--classes: expected different names, got {', '.join(map(repr, classes))}.")
    refuse_background(settings, (*(header or ()), *(label for row in rows for label in row.labels)))
    names, labels, listed = lookup(images), {}, {}
    numbers = {name: number for number, name in enumerate(classes)}
    for row in rows:
        if unknown := [label for label in row.labels if label not in numbers]:
            raise ValueError(f"--labels: {row.where}: unknown class {unknown[0]!r}; known: {', '.join(classes)}.")
        name = find(row.name, names) or same(row.name)
        if name in labels:
            other = listed[name] != same(row.name)
            why = f": it and {listed[name]!r} mean {images[name]}, by its name without suffix" if other else ""
            raise ValueError(f"--labels: {row.where}: {row.name!r} is listed a second time{why}. Keep one row.")
        check_name(f"--labels: {row.where}", name)
        listed[name] = same(row.name)
        labels[name] = tuple(sorted({numbers[label] for label in row.labels}))
    return tuple(classes), labels


def refuse_background(settings: Settings, written: Sequence[str]) -> None:
    """Refuse a class called background, which would stand beside label 0 of that name."""
    source = f"--images: {settings.images}" if settings.labels is None else f"--labels: {settings.labels}"
    for where, names in ((source, written), ("--classes", settings.classes)):
        if found := [name for name in names if name.lower() == "background"]:
            raise ValueError(
                f"{where}: {found[0]!r} is label 0 and no class. Leave it out; in a file for --labels an image of "
                "background alone has an empty label."
            )


def refuse_several(rows: Sequence[Row], classes: Sequence[str]) -> None:
    """Refuse the label `cat,dog` where there is a class `cat`: several labels that are not separated as they should."""
    known = {*classes}
    joined = {name for name in classes if ({part.strip() for part in re.split("[,;|]", name)} - {name}) & known}
    for row in rows if joined else ():
        for label in row.labels:
            if label in joined:
                raise ValueError(
                    f"--labels: {row.where}: {label!r} looks like several classes. Separate them by `;` in a CSV and "
                    "list them in a JSON; if it is the name of one, name all classes by --classes."
                )


def lookup(images: dict[str, Path]) -> dict[str, str]:
    """How an image may be listed, with its suffix or without -> its name."""
    spellings = {same(f"{name}{path.suffix}"): name for name, path in images.items()}
    return spellings | {same(name): name for name in images}


def find(listed: str, names: dict[str, str]) -> str | None:
    """The image that is meant, perhaps by another image suffix than it has, or in another case; None if none is."""
    inner = PurePosixPath(same(listed))
    bare = inner.with_suffix("") if inner.suffix.lower() in SUFFIXES else inner
    return names.get(str(inner), names.get(str(bare)))


def unread(root: Path, others: Sequence[Path]) -> dict[str, str]:
    """How a file that is no image for us may be listed -> why it is not read; without its suffix only a picture is."""
    why = {}
    for path in others:
        name = below(root, path)
        spellings = [f"{name}{path.suffix}"] + [name] * (path.suffix.lower() in PICTURES)
        why |= dict.fromkeys(map(same, spellings), f"{path} is not read; convert it to PNG or JPEG")
    return why


def relative(listed: Sequence[str], names: dict[str, str]) -> str:
    """What to write, where a list has the right files in other folders."""
    ends = {PurePosixPath(spelling).name: spelling for spelling in names}
    for name in listed:
        if (meant := find(PurePosixPath(same(name)).name, ends)) is not None:
            return f" Names are relative to --images: {meant!r}, not {name!r}."
    return ""


def read_names(path: Path, flag: str, names: dict[str, str]) -> list[str]:
    """The images in a list, one a line."""
    with decoding(flag, path):
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if not lines:
            raise ValueError("it lists no image")
        if unknown := [line for line in lines if find(line, names) is None]:
            hint = relative(lines, names) if len(unknown) == len(lines) else ""
            raise ValueError(f"there is no image {unknown[0]!r} with labels ({len(unknown)} such lines).{hint}")
        chosen = [find(line, names) for line in lines]
        if len(set(chosen)) < len(chosen):
            raise ValueError("it lists an image twice")
        return chosen


def divide(settings: Settings, images: dict[str, Path], labels: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The names of each split, by the lists or by the seed; what no list names is what is left."""
    lists = {"train": settings.train_list, "val": settings.val_list, "test": settings.test_list}
    labelled = {name: path for name, path in images.items() if name in labels}
    splits: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for split, path in lists.items():
        if path is None:
            continue
        splits[split] = read_names(path, f"--{split}-list", lookup(images if split == "test" else labelled))
        for name in splits[split]:
            if name in owner:
                raise ValueError(f"--{split}-list: {name!r} is in {lists[owner[name]]}, too. Keep it in one list.")
            owner[name] = split
    rest = sorted(name for name in labelled if name not in owner)
    if "train" in splits or "val" in splits:
        splits = {"train": rest, "val": rest} | splits
    else:
        splits["train"], splits["val"] = draw(rest, settings.val_fraction, settings.seed)
    return {split: splits[split] for split in SPLITS if split in splits}


def draw(names: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Draw a share of the names: by their digests, so neither order nor platform matters, and others hardly move."""
    count = round(fraction * len(names))
    if fraction > 0 and len(names) > 1:
        count = min(max(count, 1), len(names) - 1)
    chosen = set(sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())[:count])
    return [name for name in names if name not in chosen], sorted(chosen)


def make(task: Task) -> Done:
    """Read one image and its mask to their ends; a mask that cannot be used is left out."""
    _, height, width = read_image(task.image).shape
    item = Item(task.name, task.image.absolute(), None, task.labels)
    if task.mask is None:
        return Done(task.name, item)
    try:
        values = values_of(read_mask(task.mask, task.num_labels, (height, width)).numpy())
    except (ValueError, OSError) as error:
        return Done(task.name, item, problem=str(error))
    return Done(task.name, item._replace(mask=task.mask.absolute()), kept=True, values=values)


def check(settings: Settings) -> None:
    """Refuse values that cannot be used, by the name of their option."""
    for flag in ("images", "masks"):
        folder = getattr(settings, flag)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{flag}: expected a folder, got {folder}.")
    if settings.labels is not None and settings.labels.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--labels: expected a .csv or .json file, got {settings.labels}.")
    if not 0 <= settings.val_fraction < 1:
        raise ValueError(f"--val-fraction: expected a share in [0, 1), got {settings.val_fraction}.")


def run(settings: Settings, console: Console) -> int:
    """Build the lists and report."""
    check(settings)
    images, others = find_images(settings.images)
    classes, labels = read_labels(settings, images)
    if settings.masks is not None and len(classes) > 254:
        raise ValueError(f"--masks: an indexed PNG holds 254 classes at most, got {len(classes)}. Leave the masks out.")
    why = unread(settings.images, others)
    missing = {
        name: why.get(name, f"{settings.labels} has labels for it, but there is no such image in {settings.images}")
        for name in labels
        if name not in images
    }
    if len(missing) == len(labels):
        first = next(iter(missing))
        hint = f" {why[first]}." if first in why else relative([*missing], lookup(images))
        raise ValueError(
            f"--labels: none of the {len(labels):,} images in {settings.labels} is in {settings.images}; the first: "
            f"{first!r}.{hint}"
        )
    splits = divide(settings, images, labels)
    flags = ("labels", "train_list", "val_list", "test_list")
    files = {f"--{flag.replace('_', '-')}": path for flag in flags if (path := getattr(settings, flag))}
    drawn = settings.train_list is None and settings.val_list is None
    used = {
        "images": str(settings.images.resolve()),
        "masks": settings.masks and str(settings.masks.resolve()),
        "classes": list(classes if settings.labels is None else settings.classes),  # else they follow from the files
        "files": {f"{path.name} ({flag})": digest(path) for flag, path in files.items()},
        "split": f"{settings.val_fraction} drawn by seed {settings.seed}" if drawn else "lists",
    }
    claim(
        settings.out, "prepare_folder", used, products=PRODUCTS, sources=[*files.values()], overwrite=settings.overwrite
    )
    beside = list(files_below(settings.masks)) if settings.masks else []
    masks = {same(below(settings.masks, path)): path for path in beside if path.suffix.lower() == ".png"}
    tasks: dict[str, list[Task]] = {split: [] for split in splits}
    for split, names in splits.items():
        for name in names:
            tasks[split].append(Task(name, images[name], masks.get(same(name)), labels.get(name), len(classes) + 1))
    everything = [task for each in tasks.values() for task in each]
    done = iter(work(make, everything, workers=settings.workers, title="images", console=console))
    summary, notes = Summary(settings.out, classes, console), []
    summary.problems |= missing
    for split, each in tasks.items():
        summary.add(split, islice(done, len(each)))
        if settings.masks and (bare := sum(task.mask is None for task in each)):
            notes.append(f"{split}: {bare:,} of {len(each):,} images have no mask in {settings.masks}.")
    listed = {name for names in splits.values() for name in names}
    if left := [name for name in images if name not in labels and name not in listed]:
        notes.append(f"{len(left):,} images have no labels and are in no split: {some(left)}")
    used_masks = {task.mask for task in everything}
    if unused := [str(path.relative_to(settings.masks)) for path in beside if path not in used_masks]:
        notes.append(
            f"{len(unused):,} files in {settings.masks} are the mask of no image in a split: {some(unused)}. The mask "
            "of a/1.jpg is a/1.png."
        )
    if others:
        notes.append(left_alone(others, settings.images))
    return summary.finish("prepare_folder", used, notes)


def main() -> int:
    """Run from the command line."""
    return command("prepare_folder", Settings, run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
