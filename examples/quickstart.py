"""Train FFR and the same network without it, from image-level labels alone, on the embedded scenes; minutes on a CPU.

    python examples/quickstart.py
    python examples/quickstart.py --steps 1200 --seed 1 --device cuda --out runs/longer

Prints one table and writes quickstart.png and quickstart.json. Settings are those of `train.py scenes`, in
recipe/config.py: edit them and run it again.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

try:
    import matplotlib
    import torch
    import tyro
    from accelerate import Accelerator
    from recipe.config import PRESETS, Config, on_cpu
    from recipe.data import SceneExamples, SceneImages
    from recipe.engine import Diverged, Trainer
    from recipe.evaluation import Protocol, evaluate
    from recipe.files import open_folder, written
    from recipe.picture import save_picture, steps_of
    from recipe.progress import Screen, progress
    from recipe.scenes import CLASSES, Scenes, make_scenes
    from recipe.weights import versions
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    sys.exit(f"quickstart needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from ffr import FFR

SCENES = {"train": 5000, "val": 200, "test": 500}
START, WARMUP = 0.4, 0.1  # shares of the steps: before the losses other than classification count, and of the warm-up
WITHOUT = {"lambda_h": 0.0, "lambda_l": 0.0}  # the baseline: neither the high-band head nor the rectification
ROWS = {"all_background": "all background", "untrained": "untrained", "baseline": "baseline", "ffr": "FFR"}
COLUMNS = {
    "classification_map": "classification\nmAP",
    "cam_miou": "CAM\nmIoU",
    "seg_miou": "segmentation\nmIoU",
    "boundary_iou": "boundary\nIoU",
    "images_per_second": "images\n/ s",
}

NOTES = (
    "Both models start from the same random weights and see the same images in the same order, with image-level "
    "labels alone; masks are used for scoring only.",
    f"{SCENES['train']} train, {SCENES['val']} validation and {SCENES['test']} test scenes, their objects disjoint; "
    "scores are of the test scenes at their own size, one scale, no flip, no CRF, after the last step.",
    "Classification mAP: final classifier. CAM mIoU: CAM of the final classifier with the image's labels known, its "
    "background threshold chosen on the validation scenes. Segmentation mIoU: the head alone, labels unknown. Both "
    "count background. Boundary IoU: the segmentation, foreground classes, bands of 2 % of the diagonal.",
    "Images / s: training throughput over the whole run, augmentation included, on this machine.",
    "One small run is no evidence for or against the method: its paper trains a deep, pretrained transformer on a "
    "28 x 28 grid. This shows that it runs and learns.",
)
EXAMPLES = 3  # test scenes in the picture: the first ones with two classes


@dataclass(frozen=True)
class Settings:
    """FFR against the same network without it, on embedded scenes."""

    steps: int = 1400
    """training steps of each of the two models, at least 2"""
    seed: int = 0
    """decides the first weights, the scenes and the order of the data"""
    size: int = 64
    """side of the scenes in pixels, a multiple of 4 from 64 (a grid of 16 x 16 tokens) to 448"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to compute"""
    out: Path = Path("runs/quickstart")
    """folder for quickstart.png and quickstart.json"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their option."""
        if self.steps < 2:
            raise ValueError(f"--steps: expected at least 2, got {self.steps}.")
        if self.seed < 0:
            raise ValueError(f"--seed: expected 0 or more, got {self.seed}.")
        if self.size % 4 or not 64 <= self.size <= 448:
            raise ValueError(f"--size: expected a multiple of 4 in [64, 448], got {self.size}.")
        on_cpu(self.device, "fp32")


def configure(settings: Settings, **weights: float) -> Config:
    """The settings of `train.py scenes` for this number of steps, size and seed."""
    _, scenes = PRESETS["scenes"]
    start = int(START * settings.steps)
    return replace(
        scenes,
        steps=settings.steps,
        seg_start=start,
        affinity_start=start,
        warmup=math.ceil(WARMUP * settings.steps),
        crop=settings.size,
        seed=settings.seed,
        device=settings.device,
        log_every=10,
        **weights,
    )


def build(config: Config, scenes: Scenes) -> Trainer:
    """Network, objective and data, the same first weights and the same images at every call."""
    accelerator = Accelerator(cpu=on_cpu(config.device, config.precision))
    return Trainer(config, SceneImages(scenes, config.batch_size, config.seed), len(CLASSES), accelerator)


def train(trainer: Trainer, name: str, console: Console) -> float:
    """All steps; images per second, measured over the whole loop, augmentation included."""
    config = trainer.config
    bar, report = progress(console, name, config.steps)
    begin = time.perf_counter()
    with bar:
        for done, values in trainer.run():  # the last step is read as well, for which the host waits
            if values is not None:
                report(done, {key: value for key, value in values.items() if key != "lr"})
    return config.steps * config.batch_size / (time.perf_counter() - begin)


def score(model: FFR, val: Scenes, test: Scenes, device: str) -> dict[str, float | None]:
    """Figures on the test scenes; the threshold of the CAM comes from the validation scenes."""
    how = {"device": device, "batch_size": 50}
    chosen = evaluate(model, SceneExamples(val), Protocol(), **how)["thresholds"]["cam"]["value"]
    found = evaluate(model, SceneExamples(test), Protocol(threshold=chosen), **how)
    return {**{name: found.get(name) for name in COLUMNS}, "threshold": chosen}  # speed is not measured here


def all_background(test: Scenes) -> dict[str, float | None]:
    """What calling every pixel background scores: the IoU of background, shared among all classes."""
    share = 100 * float((test.masks == 0).double().mean())
    empty = dict.fromkeys((*COLUMNS, "threshold"))
    return {**empty, "seg_miou": share / (len(CLASSES) + 1), "boundary_iou": 0.0}


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Make the data, train both, score, print the table, write the picture and the figures."""
    console.print(f"Composing {sum(SCENES.values())} scenes of {settings.size} px ...")
    data = {split: make_scenes(split, count, settings.size, settings.seed) for split, count in SCENES.items()}
    val, test, device = data["val"], data["test"], settings.device
    rows: dict[str, dict[str, float | None]] = {"all_background": all_background(test)}
    for row, weights in (("baseline", WITHOUT), ("ffr", {})):
        trainer = build(configure(settings, **weights), data["train"])
        if "untrained" not in rows:
            rows["untrained"] = score(trainer.model, val, test, device)
        speed = train(trainer, ROWS[row], console)
        rows[row] = {**score(trainer.model, val, test, device), "images_per_second": speed}
    console.print(table(rows))
    for line in NOTES:
        console.print(f"- {line}", soft_wrap=True)
    return {"rows": rows, "trainer": trainer, "test": test}


def table(rows: dict[str, dict[str, float | None]]) -> Table:
    """The result, one row a model."""
    result = Table(title="Test scenes, image-level labels alone (scores in percent, higher is better)")
    result.add_column("", no_wrap=True)
    for head in COLUMNS.values():
        result.add_column(head, justify="right")
    for row, name in ROWS.items():
        cells = (rows[row][column] for column in COLUMNS)
        result.add_row(name, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return result


def save(settings: Settings, result: dict[str, Any]) -> list[Path]:
    """Write picture and figures, each whole or not at all."""
    trainer: Trainer = result["trainer"]
    objective, test = trainer.objective, result["test"]
    several = (test.labels.sum(1) == 2).nonzero().flatten()[:EXAMPLES]
    images, masks, labels = (part[several] for part in test)
    model = objective.model.eval()
    shown = steps_of(
        model,
        images.to(settings.device),
        labels.to(settings.device),
        high=objective.high,
        low=objective.low,
        rectification=objective.rectification,
        refinement=objective.refinement,
    )
    picture, figures = settings.out / "quickstart.png", settings.out / "quickstart.json"
    title = f"FFR on test scenes after {settings.steps} steps from image-level labels alone, one row per class"
    record = {
        "rows": result["rows"],
        "measured": NOTES,
        "settings": {
            **{key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
            "scenes": SCENES,
            "classes": CLASSES,
            "training": trainer.config.to_json(),
            "baseline": WITHOUT,
        },
        "seed": settings.seed,
        "versions": {**versions(), "matplotlib": matplotlib.__version__},
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # decides roundings, as the number of threads does
    }
    with written(figures) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with written(picture) as path:
        save_picture(path, images, masks, labels, shown, CLASSES, mu=model.frequency.mu, title=title)
    return [picture, figures]


def main() -> int:
    """Run from the command line."""
    console = Screen()
    try:
        settings = tyro.cli(Settings, description=__doc__)
        settings.check()
        open_folder(settings.out)
        result = run(settings, console)
        for path in save(settings, result):
            console.print(f"wrote {path}", soft_wrap=True)
    except (ValueError, OSError, Diverged) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 3 if isinstance(error, Diverged) else 2
    except KeyboardInterrupt:
        print("quickstart: interrupted; no file is half-written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
