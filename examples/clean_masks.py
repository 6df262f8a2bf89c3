"""From a coarse mask to a clean one: what pixel-adaptive refinement and the dense CRF do to it, and what they cost.

    python examples/clean_masks.py
    python examples/clean_masks.py --grid 14 --scenes 200 --out runs/masks

Takes the true masks of embedded scenes, keeps one label for each cell of a coarse grid, or lets the objects spill over
into the cells around them as a CAM does, and refines that. Prints one table and writes masks.png and masks.json.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    import tyro
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"clean_masks needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from recipe.files import open_folder, written
from recipe.progress import Screen
from recipe.scenes import CLASSES, Scenes, make_scenes
from torch import Tensor
from torch.nn import functional as F

from ffr import DenseCRF, PixelAdaptiveRefinement, draw
from ffr.metrics import ConfusionMatrix

CONFIDENCE = 0.7  # in the label of a cell; the other classes of the image share the rest
STEPS = ("coarse mask", "PAR", "CRF", "PAR, then CRF")
KINDS = {"one label a cell": 0, "spilled over by a cell": 1}
SHOWN = 3  # scenes in the picture


@dataclass(frozen=True)
class Settings:
    """What refinement does to a coarse mask."""

    scenes: int = 100
    """how many validation scenes"""
    size: int = 224
    """their side in pixels, at least 64"""
    grid: int = 28
    """cells of the coarse mask along a side"""
    seed: int = 0
    threads: int = 1
    """of torch; for the CRF one is fastest, with images in parallel processes"""
    device: str = "cpu"
    out: Path = Path("runs/masks")
    """folder for masks.png and masks.json"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their option."""
        for name, least in (("scenes", 1), ("size", 64), ("grid", 2), ("seed", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}.")
        if self.grid > self.size:
            raise ValueError(f"--grid: expected at most --size {self.size}, got {self.grid}.")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            said = str(error).partition("\n")[0]
            raise ValueError(f"--device: {self.device!r} cannot be used here ({said}). Try --device cpu.") from error


def coarsen(mask: Tensor, grid: int, spill: int) -> tuple[Tensor, list[int]]:
    """Probabilities (1, C, H, W) of what one label a cell tells, and the label of each channel."""
    names = [int(name) for name in mask.unique()]
    if names[0] != 0:
        names.insert(0, 0)
    shares = F.adaptive_avg_pool2d(torch.stack([mask == name for name in names]).float()[None], grid)
    if spill:
        reach = 2 * spill + 1
        shares[:, 1:] = F.max_pool2d(shares[:, 1:] * (shares.argmax(1, keepdim=True) > 0), reach, 1, spill)
        shares[:, :1] = 0.5 * (shares[:, 1:].amax(1, keepdim=True) < 0.5)  # a cell beside an object is the object's
    chosen = F.one_hot(shares.argmax(1), len(names)).movedim(3, 1)
    probs = torch.where(chosen > 0, CONFIDENCE, (1 - CONFIDENCE) / max(1, len(names) - 1))
    probs = F.interpolate(probs, size=mask.shape, mode="bilinear", align_corners=False)
    return probs / probs.sum(1, keepdim=True), names


@torch.no_grad()
def refine(image: Tensor, probs: Tensor, device: str) -> dict[str, tuple[Tensor, float]]:
    """Step -> scores (1, C, H, W) and seconds."""
    image, probs = image[None].to(device), probs.to(device)
    par, crf = PixelAdaptiveRefinement(), DenseCRF()
    made = {STEPS[0]: (probs, 0.0)}
    for step in STEPS[1:]:
        before = made["PAR"] if step.startswith("PAR,") else made[STEPS[0]]
        begin = time.perf_counter()
        scores = par(image, probs) if step == "PAR" else crf(image, before[0] / before[0].sum(1, keepdim=True))
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        made[step] = (scores, before[1] + time.perf_counter() - begin)
    return made


def run(settings: Settings, console: Console) -> tuple[list[dict[str, Any]], list[list[Tensor]], Scenes]:
    """Refine every scene; rows of the table, the label maps of the first scenes, and the scenes."""
    scenes = make_scenes("val", settings.scenes, settings.size, settings.seed)
    scores = {(kind, step): ConfusionMatrix(len(CLASSES) + 1) for kind in KINDS for step in STEPS}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in scores}
    shown: list[list[Tensor]] = []
    for number in track(range(settings.scenes), description="refining", console=console):
        image, mask = scenes.images[number], scenes.masks[number]
        for kind, spill in KINDS.items():
            probs, names = coarsen(mask, settings.grid, spill)
            line = []
            for step, (refined, spent) in refine(image, probs, settings.device).items():
                label = torch.tensor(names)[refined.argmax(1).cpu()]
                scores[kind, step].update(label, mask[None].long())
                seconds[kind, step].append(spent)
                line.append(label[0])
            if number < SHOWN:
                shown.append(line)
    rows = [
        {
            "mask": kind,
            "step": step,
            "miou_percent": 100 * matrix.miou(),
            "seconds": statistics.median(seconds[kind, step]),
        }
        for (kind, step), matrix in scores.items()
    ]
    return rows, shown, scenes


def coloured(label: Tensor) -> Any:
    """Colours of the classes, on white: the dark ones among them are hard to see on black."""
    colours = draw.palette()
    colours[0] = 255
    return colours[label.numpy()]


def picture(path: Path, shown: list[list[Tensor]], scenes: Scenes, settings: Settings) -> None:
    """One row a scene and kind of mask: image, each step, truth."""
    heads = ("image", *STEPS, "truth")
    figure = Figure(figsize=(1.7 * len(heads) + 0.6, 1.74 * len(shown) + 0.9), dpi=90, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), len(heads), squeeze=False)
    for row, (line, labels) in enumerate(zip(axes, shown, strict=True)):
        scene, kind = divmod(row, len(KINDS))
        image, mask = scenes.images[scene], scenes.masks[scene]
        panels = [image.permute(1, 2, 0).numpy(), *(coloured(label) for label in (*labels, mask))]
        for axis, panel, head in zip(line, panels, heads, strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(head, fontsize=11)
        line[0].set_ylabel(list(KINDS)[kind].replace(" a cell", "\na cell").replace("over by", "over\nby"), fontsize=9)
    figure.suptitle(
        f"Masks of {settings.size} x {settings.size} scenes, coarsened to {settings.grid} x {settings.grid}, refined; "
        "colours are classes, white is background",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=0.3, w_pad=0.3)
    figure.savefig(path, format="png")


def main() -> int:
    """Run from the command line."""
    console = Screen()
    try:
        settings = tyro.cli(Settings, description=__doc__)
        settings.check()
        torch.set_num_threads(settings.threads)
        open_folder(settings.out)
        rows, shown, scenes = run(settings, console)
        table = Table(title=f"Masks coarsened to {settings.grid} x {settings.grid}, then refined: mIoU in percent")
        table.add_column("step")
        for kind in KINDS:
            table.add_column(kind, justify="right")
        table.add_column("seconds / image", justify="right")
        for step in STEPS:
            found = [row for row in rows if row["step"] == step]
            cells = (f"{row['miou_percent']:.1f}" for row in found)
            table.add_row(step, *cells, f"{statistics.median(row['seconds'] for row in found):.3f}")
        console.print(table)
        measured = (
            f"{settings.scenes} validation scenes of {settings.size} px, background counted; the classes of an image "
            f"are known; PAR and CRF at their defaults. Median time on {settings.device}, {settings.threads} thread(s)."
        )
        console.print(f"- {measured}", soft_wrap=True)
        record = {"rows": rows, "measured": measured, "settings": asdict(settings), "torch": torch.__version__}
        with written(settings.out / "masks.png") as path:
            picture(path, shown, scenes, settings)
        with written(settings.out / "masks.json") as path:
            path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        console.print(f"wrote {settings.out / 'masks.png'} and {settings.out / 'masks.json'}", soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"clean_masks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clean_masks: interrupted; no file is half-written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
