"""Score trained weights: segmentation, CAM and intermediate CAM; single scale, multi-scale with flip, and CRF.

    python examples/evaluate.py --weights runs/voc/best.safetensors --data data/voc --split val
    python examples/evaluate.py --weights runs/scenes/best.safetensors                            # embedded scenes
    python examples/evaluate.py --weights runs/voc/best.safetensors --rows single multi multi-crf
    torchrun --nproc-per-node 4 examples/evaluate.py --weights runs/voc/best.safetensors --precision bf16
    python examples/evaluate.py --weights runs/voc/best.safetensors --split test --rows multi-crf --submission voc_test

All rows of the table come from one pass over the images. Prints the table and the IoU of each class, and writes both
as JSON, each figure with what it was made by. With --submission the label maps of the last row are written as the VOC
server wants them: results/VOC2012/Segmentation/comp6_test_cls/*.png.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

try:
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce
    from recipe.config import on_cpu
    from recipe.data import EvalImages, SceneExamples
    from recipe.evaluation import CHOSEN, Protocol, evaluate_all
    from recipe.files import write_text, written
    from recipe.prepare import command, digest
    from recipe.progress import Bar, say
    from recipe.weights import Trained, examples_for, load_weights, versions
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    sys.exit(f"evaluate needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from torch import Tensor

from ffr import DenseCRF
from ffr.draw import save_label

Way = Literal["single", "single-crf", "multi", "multi-crf"]
COLUMNS = {
    "seg_miou": "seg.\nmIoU",
    "boundary_iou": "boundary\nIoU",
    "cam_miou": "CAM\nmIoU",
    "cam_inter_miou": "inter CAM\nmIoU",
    "classification_map": "CAM\nmAP",
    "classification_map_inter": "inter CAM\nmAP",
}
SHOWN = 20  # images left out, on the screen; the JSON has all


@dataclass(frozen=True)
class Settings:
    """Score trained weights on a split."""

    weights: Path
    """.safetensors file of train.py; it knows its network, classes and settings"""
    data: Path | None = None
    """prepared folder with SPLIT.json; by default the one that the weights were trained on, or the embedded scenes"""
    split: str = "val"
    """which list to score on"""
    images: int | None = None
    """only so many images, the first ones. Of embedded scenes, how many are made; by default as in training"""
    rows: tuple[Way, ...] = ("single", "multi")
    """lines of the table: one scale; --scales with --flip; each with CRF"""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5)
    """of multi; the segmentation takes the maximum over them"""
    flip: bool = True
    """of multi: look at the mirrored image too"""
    cam_scales: tuple[float, ...] | None = None
    """of multi, for the CAM; by default those that the labels of the training came from"""
    labels: Literal["known", "predicted"] = "known"
    """classes that a CAM may show: the image's labels, or what its classifier gives more than 0.5"""
    threshold: float | None = None
    """background threshold of the CAMs; by default the one in the weights' settings"""
    sweep: bool = False
    """take the best threshold of 0, 0.01 to 0.99 instead, and say that it was chosen on these masks"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward pass"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. Several: torchrun --nproc-per-node 8 examples/evaluate.py ..."""
    batch_size: int = 8
    """images of one size that go through the network together, for each rank; lower it where memory is short"""
    workers: int = 2
    """processes that read images, for each rank; 0: none, in the main process"""
    crf_workers: int | None = None
    """processes for the CRF, of all ranks of a machine together, by default one a CPU; 0: none, in the main process"""
    crf_prune: float = 0.0
    """labels whose probability exceeds this nowhere in an image stay out of its CRF: faster with many classes"""
    per_class: bool = True
    """print the IoU of each class"""
    out: Path = Path("runs/evaluate.json")
    """JSON file to write"""
    submission: Path | None = None
    """a new folder for the label maps of the last row, for the VOC server; the split needs no masks"""
    competition: Literal["comp5", "comp6"] = "comp6"
    """of the submission: comp5 is trained on VOC alone, comp6 is not"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their flag."""
        for name, least in (("workers", 0), ("crf_workers", 0), ("batch_size", 1), ("images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}.")
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"--rows: expected each once, got {' '.join(self.rows) or 'none'}.")
        if self.sweep and self.threshold is not None:
            raise ValueError("--sweep: the threshold is given by --threshold. Leave one of them out.")
        if self.submission is not None and self.pictures().is_dir() and any(self.pictures().iterdir()):
            raise ValueError(f"--submission: {self.pictures()} holds predictions already. Name a new folder.")

    def protocols(self, trained: Trained) -> dict[str, Protocol]:
        """One for each row."""
        config, made = trained.config, {}
        cut = None if self.sweep else config.cam_threshold if self.threshold is None else self.threshold
        base = Protocol(labels=self.labels, threshold=cut, precision=self.precision, crf_prune=self.crf_prune)
        for row in self.rows:
            protocol = replace(base, crf=row.endswith("crf"))
            if row.startswith("multi"):
                cam_scales = config.cam_scales if self.cam_scales is None else self.cam_scales
                protocol = replace(protocol, scales=self.scales, flip=self.flip, cam_scales=cam_scales)
            protocol.check()
            made[row] = protocol
        return made

    def pictures(self) -> Path:
        """The server's folder for the submission."""
        return Path(self.submission or ".", "results/VOC2012/Segmentation", f"{self.competition}_{self.split}_cls")


def writable(flag: str, path: Path) -> None:
    """Refuse a file that could not be written after all the work."""
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, got the folder {path}.")
    try:
        probe = path.with_name(f".{path.stem}-{os.getpid()}")
        with written(probe):
            pass
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag}: cannot write {path} ({error.strerror or error}). Name another place.") from error


def open_data(settings: Settings, trained: Trained) -> tuple[EvalImages | SceneExamples, Path | None]:
    """The images, and the folder that they are of; refuses a split that does not fit the weights."""
    count = trained.config.scenes[1] if settings.images is None else settings.images
    dataset, folder = examples_for(trained, settings.weights, settings.data, settings.split, count)
    if isinstance(dataset, EvalImages):
        items = dataset.split.items[: settings.images]
        if settings.submission is None and all(item.mask is None for item in items):
            raise ValueError(
                f"--split: no image of {settings.split!r} in {folder} has a mask, so there is nothing to score. "
                "Name another split, or write predictions with --submission."
            )
        if settings.submission is not None and (odd := [item.name for item in items if "/" in item.name]):
            raise ValueError(f"--submission: {odd[0]!r} lies in a folder, which the server's layout does not have.")
    return dataset, folder


def run(settings: Settings, console: Console) -> int:
    """Score, print, write; 1 if an image was left out."""
    settings.check()
    cpu = on_cpu(settings.device, settings.precision)
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))  # ranks meet at the end, and a CRF may take hours
    trained = load_weights(settings.weights, state.device)
    protocols = settings.protocols(trained)
    dataset, folder = open_data(settings, trained)
    writable("--out", settings.out)
    save = None
    if settings.submission is not None:
        writable("--submission", settings.pictures() / "any")
        save = saver(settings.pictures())
    count = len(dataset) if settings.images is None else min(settings.images, len(dataset))
    crf_workers = (os.cpu_count() or 1) if settings.crf_workers is None else settings.crf_workers
    crf_workers = math.ceil(crf_workers / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    bar = Bar(console, quiet=not state.is_main_process)
    with bar:
        task = bar.add_task("scoring", total=count)
        try:
            results = evaluate_all(
                trained.model,
                dataset,
                list(protocols.values()),
                device=state.device,
                rank=state.process_index,
                world_size=state.num_processes,
                reduce=(lambda tensor: reduce(tensor, "sum")) if state.num_processes > 1 else None,
                limit=settings.images,
                workers=settings.workers,
                batch_size=settings.batch_size,
                crf_workers=crf_workers,
                report=lambda done: bar.update(task, completed=done),
                save=save,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--batch-size: the memory of {state.device} is too small for this. Lower it.") from error
    rows = dict(zip(protocols, results, strict=True))
    if state.is_main_process:
        finish(settings, trained, rows, folder, state, console)
    if state.num_processes > 1:
        state.destroy_process_group()
    return 1 if results[0]["left_out"] else 0


def saver(folder: Path) -> Callable[[str, Tensor], None]:
    """Writes a label map as an indexed PNG; an error names the file."""

    def save(name: str, label: Tensor) -> None:
        path = folder / f"{name}.png"
        try:
            save_label(path, label)
        except OSError as error:
            raise OSError(error.errno, f"--submission: {error.strerror or error}", str(path)) from error

    return save


def finish(
    settings: Settings,
    trained: Trained,
    rows: dict[str, dict[str, Any]],
    folder: Path | None,
    state: PartialState,
    console: Console,
) -> None:
    """Write the JSON and print the tables."""
    weights = {"file": str(settings.weights), "sha256_16": digest(settings.weights), "step": trained.facts.get("step")}
    data = str(folder) if folder is not None else f"embedded scenes of {trained.config.crop} px"
    crf = {name: value for name, value in vars(DenseCRF(prune=settings.crf_prune)).items() if name[0] != "_"}
    crf.pop("training")
    for row in rows.values():  # each figure says what it is of, wherever it is copied to
        row["protocol"] |= {"data": data, "split": settings.split, "weights": weights, "versions": versions()}
        row["protocol"]["crf_settings"] = crf if row["protocol"]["crf"] else None
    where = {"device": str(state.device), "ranks": state.num_processes, "threads": torch.get_num_threads()}
    record = {"classes": trained.classes, "rows": rows, "computed_on": where}
    old, new = subject(settings.out), (settings.split, data, weights["sha256_16"], weights["file"])
    write_text(settings.out, json.dumps(record, indent=2) + "\n")  # ASCII: names may be no Unicode
    console.print(table(settings, rows))
    if settings.per_class:
        console.print(per_class(trained.classes, rows))
    for note in notes(settings, data, rows):
        say(console, f"- {note}")
    lost = "" if old is None or old[:3] == new[:3] else f", replacing the figures of {old[3]} on {old[0]} of {old[1]}"
    say(console, f"wrote {settings.out}{lost}")
    if settings.submission is not None:
        say(
            console,
            f"wrote the label maps of {settings.rows[-1]} to {settings.pictures()}; for the server: "
            f"tar czf results.tgz -C {settings.submission} results",
        )


def subject(path: Path) -> tuple[str, str, str, str] | None:
    """What the figures in a JSON of ours are of: split, data, digest and file of the weights; None for other files."""
    try:
        row = next(iter(json.loads(path.read_text(encoding="utf-8"))["rows"].values()))
        said, weights = row["protocol"], row["protocol"]["weights"]
        return said["split"], said["data"], weights["sha256_16"], weights["file"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def table(settings: Settings, rows: dict[str, dict[str, Any]]) -> Table:
    """One line a row, one column a figure."""
    made = Table(title=escape(f"{settings.weights.name} on {settings.split}, in percent"))
    made.add_column("")
    for head in COLUMNS.values():
        made.add_column(head, justify="right")
    for name, row in rows.items():
        made.add_row(name, *(cell(row[key]) for key in COLUMNS))
    return made


def per_class(classes: tuple[str, ...], rows: dict[str, dict[str, Any]]) -> Table:
    """IoU of each label: segmentation and both CAMs by every row that has them."""
    kinds = {"seg": "seg.", "cam": "CAM", "cam_inter": "inter\nCAM"}
    made = Table(box=SIMPLE_HEAD, title="IoU of each label, in percent", padding=(0, 1, 0, 0))
    made.add_column("label", overflow="fold")
    lists = []
    for kind, head in kinds.items():
        for name, row in rows.items():
            if any(value is not None for value in row["iou"].get(kind, ())):
                broken = name.replace("-", "-\n")  # four rows have to fit 80 characters
                made.add_column(f"{head}\n{broken}", justify="right", overflow="fold")
                lists.append(row["iou"][kind])
    for number, label in enumerate(("background", *classes)):
        made.add_row(escape(label), *(cell(values[number]) for values in lists))
    return made


def cell(value: float | None) -> str:
    """One decimal, or a dash for what was not scored."""
    return "-" if value is None else f"{value:.1f}"


def notes(settings: Settings, data: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the figures are of, in words."""
    first = next(iter(rows.values()))
    images = first["images"]
    known = "the image's labels known" if settings.labels == "known" else "the classes that it predicts itself"
    said = [
        f"{settings.weights} on {settings.split} of {data}: {images['looked_at']:,} of {images['listed']:,} images at "
        f"their own size, {images['segmentation']:,} with a mask; background counts, 255 does not, nor does a class "
        f"that no mask shows; {settings.precision}.",
        "seg.: the segmentation head, without labels. CAM, inter CAM: the class activation maps of the final and the "
        f"intermediate classifier, with {known}, and the mean average precision of that classifier.",
    ]
    for name, row in rows.items():
        protocol, cuts = row["protocol"], row["thresholds"]
        way = f"scales {' '.join(map(str, protocol['scales']))}{' with flip' if protocol['flip'] else ''}"
        if protocol["crf"]:
            way += "; then the dense CRF, which leaves the CAM alone"
        elif protocol["cam_scales"]:
            way += f" (CAM: {' '.join(map(str, protocol['cam_scales']))})"
        for cam, cut in cuts.items():
            way += f"; {'CAM' if cam == 'cam' else 'inter CAM'} above {cut['value']}, {cut['source']}"
        said.append(f"{name}: {way}.")
    if any(cut["source"] == CHOSEN for row in rows.values() for cut in row["thresholds"].values()):
        said.append("A threshold that was chosen on these masks makes the figure of the CAM an upper bound.")
    left = first["left_out"]
    said += [f"left out: {name}: {problem}" for name, problem in list(left.items())[:SHOWN]]
    if len(left) > SHOWN:
        said.append(f"left out: {len(left) - SHOWN} more, all in {settings.out}.")
    return said


def main() -> int:
    """Run from the command line."""
    return command("evaluate", Settings, run, __doc__, "no file is half-written")


if __name__ == "__main__":
    sys.exit(main())
