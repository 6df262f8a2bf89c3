"""Draw the figures of the paper on your own images, with your own weights.

    python examples/visualize.py --weights runs/voc/best.safetensors --data data/voc --split val
    python examples/visualize.py --weights runs/voc/best.safetensors --images photos 'more/*.jpg'
    python examples/visualize.py --weights runs/voc/best.safetensors --images horse.jpg --labels person horse
    python examples/visualize.py --weights runs/scenes/best.safetensors                        # embedded scenes

Writes, to --out:
    figure1.png   two classes in one patch: prototypes, similarities with and without the high band, selected tokens
    figure2.png   what the low and the high band see: their CAMs beside the whole one, on one scale
    figure3.png   several classes in one image: CAM, pseudo label, prediction and, where it is known, the truth
    figure4.png   the motivation: high band through the depth of the encoder, change of the similarity, selected tokens
    figure4.json  the numbers behind it
Which images are shown follows from their labels: known ones of a prepared folder, those given with --labels, or else
those that the classifier predicts; the figures say which.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

try:
    import torch
    from predict import absolute, find
    from recipe.config import on_cpu
    from recipe.data import Example, left_alone, read_image
    from recipe.figures import bands_figure, motivation_figure, objects_figure, patch_figure
    from recipe.files import open_folder, write_text, written
    from recipe.look import AT_MOST, LIKELY, Glance, Motivation, Seen, choose, choose_patch, see, together
    from recipe.prepare import command
    from recipe.progress import Bar, say, some
    from recipe.weights import Trained, examples_for, load_weights, versions
    from recipe.words import as_spelt
    from rich.console import Console
    from torchvision.transforms.v2 import functional as F
except ImportError as error:
    sys.exit(f"visualize needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")


SHOWN = 20  # images left out, on the screen


@dataclass(frozen=True)
class Settings:
    """The figures of the paper on your own images and weights."""

    weights: Path
    """.safetensors file of train.py; it knows its network, classes and settings"""
    images: tuple[str, ...] = ()
    """images, folders (searched to their bottom) or globs, instead of --data"""
    labels: tuple[str, ...] = ()
    """classes that every image of --images shows; by default those that the classifier predicts"""
    data: Path | None = None
    """prepared folder with SPLIT.json; by default the one that the weights were trained on, or the embedded scenes"""
    split: str = "val"
    """which list of it"""
    count: int = 50
    """so many images are looked at, spread over all; Fig. 4 counts in all of them, the others choose among them"""
    rows: int = 3
    """images shown in Fig. 2 and 3"""
    figures: tuple[Literal[1, 2, 3, 4], ...] = (1, 2, 3, 4)
    """which to draw"""
    max_side: int = 512
    """larger images are shrunk to this"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    out: Path = Path("runs/figures")
    """folder for the figures; those of an earlier run are replaced"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their flag."""
        for name, least in (("count", 1), ("rows", 1), ("max_side", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}.")
        if not self.figures:
            raise ValueError("--figures: name at least one of 1 2 3 4.")
        if self.images and self.data is not None:
            raise ValueError("--images: the images are given by --data too. Leave one of them out.")
        if self.labels and not self.images:
            raise ValueError("--labels: is for --images; a prepared folder and the embedded scenes have their own.")


class Source(NamedTuple):
    """Where images come from: how many, how to get one, and what they are called; labels are None where unknown."""

    count: int
    get: Callable[[int], Example]
    name: Callable[[int], str]
    called: str
    labels: str
    named: Sequence[str] = ()  # those that were named one by one
    others: Sequence[Path] = ()  # files that are no images


def open_images(settings: Settings, trained: Trained) -> Source:
    """The images of --images, with the labels of --labels."""
    if unknown := [name for name in settings.labels if name not in trained.classes]:
        raise ValueError(
            f"--labels: {settings.weights} knows no class {unknown[0]!r}. It knows {', '.join(trained.classes)}."
        )
    files, others = find(settings.images, settings.out, "--images")
    named = {absolute(Path(given)) for given in settings.images if Path(given).is_file()}
    paths, row = list(files), None
    if settings.labels:
        row = torch.tensor([float(name in settings.labels) for name in trained.classes])

    def get(index: int) -> Example:
        return Example(paths[index].name, read_image(paths[index]), None, row)

    return Source(
        len(paths),
        get,
        name=lambda index: str(paths[index]),
        called="images of --images",
        labels="given with --labels",
        named=[str(path) for path in paths if path in named],
        others=others,
    )


def open_data(settings: Settings, trained: Trained) -> Source:
    """A split of a prepared folder, or embedded scenes."""
    dataset, folder = examples_for(trained, settings.weights, settings.data, settings.split, settings.count)
    if folder is None:
        return Source(
            len(dataset), dataset.__getitem__, str, f"embedded scenes, {settings.split}", "known from the scenes"
        )
    items = dataset.split.items
    called, labels = f"images of {settings.split} of {folder.name}", f"known from {folder.name}/{settings.split}.json"
    return Source(len(dataset), dataset.__getitem__, lambda index: str(items[index].image), called, labels)


def shrink(example: Example, longest: int) -> Example:
    """The image with sides of at most so many pixels, and its mask alike."""
    height, width = example.image.shape[1:]
    factor = longest / max(height, width)
    if factor >= 1:
        return example
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    mask = example.mask
    if mask is not None:
        mask = F.resize(mask[None], size, interpolation=F.InterpolationMode.NEAREST)[0]
    return example._replace(image=F.resize(example.image, size, antialias=True), mask=mask)


class Found(NamedTuple):
    """An image that could be read: its number in the source, what it is called, what was seen of it at a glance."""

    index: int
    name: str
    glance: Glance


class Album:
    """The images of a run: looked at once for Fig. 4, and again, closely, where they are shown."""

    def __init__(self, settings: Settings, trained: Trained, source: Source) -> None:
        self.settings, self.trained, self.source = settings, trained, source
        self.motivation = Motivation(trained)
        self.found: list[Found] = []
        self.left_out: dict[str, str] = {}
        self.predicted = 0
        self._seen: dict[int, Seen] = {}

    def look(self, console: Console) -> None:
        """Look at `count` images, evenly spread; a broken one is left out."""
        count = min(self.settings.count, self.source.count)
        bar = Bar(console)
        with bar:
            for number in bar.track(range(count), description="looking"):
                index = number * self.source.count // count
                try:
                    example = shrink(self.source.get(index), self.settings.max_side)
                except (ValueError, OSError) as error:
                    self.left_out[self.source.name(index)] = str(error)
                    continue
                self.predicted += example.labels is None
                glance = self.motivation.add(example.image, example.labels)
                self.found.append(Found(index, example.name, glance))
        if not self.found:
            raise ValueError(f"no image could be read: {next(iter(self.left_out.values()))}")

    def closely(self, place: int) -> Seen:
        """Everything about the image at that place in `found`."""
        if place not in self._seen:
            index, _, glance = self.found[place]
            row = torch.zeros(len(self.trained.classes))
            row[sorted(glance.labels)] = 1
            example = shrink(self.source.get(index), self.settings.max_side)
            self._seen[place] = see(self.trained, example._replace(labels=row))
        return self._seen[place]

    def notes(self) -> list[str]:
        """What the figures are of."""
        known = len(self.found) - self.predicted
        by = f"predicted by the classifier (probability above {LIKELY:g}, {AT_MOST} at most, else the likeliest)"
        labels = by if not known else self.source.labels
        if known and self.predicted:
            labels += f"; where they are unknown, {by}"
        step = self.trained.facts.get("step")
        weights = f"Weights {self.settings.weights.name}" + (f" after {step} steps" if step is not None else "")
        of = f"{len(self.found):,} of {self.source.count:,} {self.source.called}"
        return [f"{weights}, encoder {self.trained.config.model}. Looked at {of}. Labels {labels}."]


def unseen(album: Album) -> list[str]:
    """What was passed over, in sentences."""
    source, said = album.source, []
    looked = {source.name(found.index) for found in album.found} | album.left_out.keys()
    if rest := [name for name in source.named if name not in looked]:
        files = f"{len(rest):,} of {len(source.named):,} files named by --images"
        said.append(f"not looked at: {files}, for --count is {album.settings.count}: {some(rest)}")
    if source.others:
        said.append(left_alone(source.others, "--images"))
    return said


def draw_all(album: Album) -> dict[int, Callable[[Path], None]]:
    """How to write each figure that was asked for."""
    trained, wanted, notes = album.trained, album.settings.figures, album.notes()
    names, patch = trained.classes, trained.model.encoder.patch_size
    glances = [found.glance for found in album.found]
    shown = choose(glances, album.settings.rows) if {2, 3} & set(wanted) else []
    made: dict[int, Callable[[Path], None]] = {}
    if 1 in wanted:
        seen = album.closely(choose_patch(glances))
        made[1] = patch_figure(seen, names, patch, trained.config.gap, notes).save
    seen_all: Sequence[Seen] = [album.closely(place) for place in shown]
    if 2 in wanted:
        made[2] = bands_figure(seen_all, names, patch, trained.model.frequency.mu, notes).save
    if 3 in wanted:
        made[3] = objects_figure(seen_all, names, together(glances), len(glances), notes).save
    if 4 in wanted:
        counted = f"Counted over {len(glances)} images; energies are summed over their channels."
        figure = motivation_figure(album.motivation.numbers(), [*notes, counted])
        made[4] = lambda path: figure.savefig(path, format="png")
    return made


def record_of(album: Album) -> dict[str, Any]:
    """The numbers of Fig. 4 with what they are of."""
    settings = album.settings
    return {
        **album.motivation.numbers(),
        "measured": " ".join(album.notes()),
        "predicted_labels": album.predicted,
        "weights": {"file": str(settings.weights), **album.trained.facts},
        "settings": {
            "split": None if settings.images else settings.split,
            "count": settings.count,
            "max_side": settings.max_side,
        },
        "classes": album.trained.classes,
        "looked_at": [album.source.name(found.index) for found in album.found],
        "left_out": album.left_out,
        "versions": versions(),
    }


def run(settings: Settings, console: Console) -> int:
    """Look, draw, write; 1 if an image was left out."""
    settings.check()
    device = "cpu" if on_cpu(settings.device, "fp32") else "cuda"
    trained = load_weights(settings.weights, device)
    source = open_images(settings, trained) if settings.images else open_data(settings, trained)
    open_folder(settings.out)
    album = Album(settings, trained, source)
    album.look(console)
    with as_spelt([*trained.classes, *(found.name for found in album.found), *album.notes()]) as boxes:
        for number, save in draw_all(album).items():
            path = settings.out / f"figure{number}.png"
            try:
                with written(path) as part:
                    save(part)
            except OSError as error:
                raise ValueError(f"--out: cannot write {path} ({error.strerror or error}).") from error
            say(console, f"wrote {path}")
    if 4 in settings.figures:
        path = settings.out / "figure4.json"
        write_text(path, json.dumps(record_of(album), indent=2) + "\n")  # ASCII: names may be no Unicode
        say(console, f"wrote {path}")
    for name, problem in list(album.left_out.items())[:SHOWN]:
        say(console, f"- left out: {name}: {problem}")
    for said in unseen(album):
        say(console, f"- {said}")
    if boxes:
        some = " ".join(sorted(boxes)[:SHOWN])
        say(console, f"- boxes stand for {some}: no installed font has them. Install one that does, such as Noto.")
    return 1 if album.left_out else 0


def main() -> int:
    """Run from the command line."""
    interrupted = "the figures that were written are whole"
    return command("visualize", Settings, run, __doc__, interrupted)


if __name__ == "__main__":
    sys.exit(main())
