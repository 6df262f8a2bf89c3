"""Pixel-adaptive refinement: speed and memory against the usual form, and what it does to masks of real photographs.

    python benchmarks/refinement.py
    python benchmarks/refinement.py --pseudo-label        # of two images, K = 80, with and without max_present
    python benchmarks/refinement.py --coco /data/coco     # annotations/instances_val2017.json, val2017/

The usual form gathers the neighbours by convolution with one-hot kernels, 48 times the size of what it refines; it is
written here from the formula.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch
import tyro
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ffr.crf import DenseCRF
from ffr.metrics import ConfusionMatrix
from ffr.refine import PixelAdaptiveRefinement, refine_label

DILATIONS = (1, 2, 4, 8, 12, 24)
RING = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
CONFIDENCE = 0.7
PSEUDO = (448, 80)  # side of the image and K of --pseudo-label
CASES = ((224, 2), (448, 2), (448, 6), (448, 21))  # side of the image, channels of the scores


@dataclass(frozen=True)
class Arguments:
    """Pixel-adaptive refinement against the one-hot convolution, or on COCO."""

    coco: Path | None = None
    """folder of COCO (annotations/, val2017/): measures quality on real photographs, not speed"""
    pseudo_label: bool = False
    """measure `refine_label` against the usual loop over images and present classes"""
    split: str = "val2017"
    limit: int = 0
    """images of COCO, 0 for all"""
    grid: int = 28
    """masks are coarsened to grid x grid"""
    coarsen: Literal["label", "spill", "share"] = "label"
    """what a cell keeps: its most frequent class, at the confidence .7; the same, objects spilling over into the cells
    around them; or the share of every class, which tells how far an edge cuts into the cell"""
    iterations: int = 10
    rounds: int = 7
    batch: int = 1
    cases: tuple[tuple[int, int], ...] = CASES
    """side of the image and channels of the scores, pair after pair"""
    threads: int = 1
    device: str = "cpu"
    compile: bool = True
    """measure torch.compile(PixelAdaptiveRefinement()) too"""
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-refinement.json"""


def gathered(maps: Tensor) -> Tensor:
    """All neighbours, (B, C, 48, H, W), by convolution with one-hot kernels."""
    batch, channels, height, width = maps.shape
    kernel = maps.new_zeros(8, 1, 3, 3)
    for row, (dy, dx) in enumerate(RING):
        kernel[row, 0, 1 + dy, 1 + dx] = 1
    found = []
    for dilation in DILATIONS:
        padded = F.pad(maps, [dilation] * 4, mode="replicate").flatten(0, 1)[:, None]
        found.append(F.conv2d(padded, kernel, dilation=dilation).view(batch, channels, 8, height, width))
    return torch.cat(found, 2)


def usual(images: Tensor, scores: Tensor, iterations: int = 10) -> Tensor:
    """Pixel-adaptive refinement in the usual form."""
    neighbours = gathered(images)
    scale = 0.3 * (neighbours.std(2, keepdim=True) + 1e-8)
    alike = -((neighbours - images[:, :, None]) / scale).square().mean(1, keepdim=True)
    distance = torch.tensor([d * math.hypot(dy, dx) for d in DILATIONS for dy, dx in RING], device=images.device)
    near = -(distance / (0.3 * (distance.std() + 1e-8))).square()
    weights = alike.softmax(2) + 0.01 * near.softmax(0)[:, None, None]
    for _ in range(iterations):
        scores = (gathered(scores) * weights).sum(2)
    return scores


@torch.no_grad()
def speed(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Each case: how many times faster and smaller, and how far apart."""
    torch.backends.cudnn.allow_tf32 = False  # else a convolution keeps 10 bits of the scores: no agreement
    for side, channels in arguments.cases:
        generator = torch.Generator().manual_seed(side)
        coarse = torch.rand(arguments.batch, 3, side // 8, side // 8, generator=generator)
        images = F.interpolate(coarse, size=(side, side), mode="bilinear").to(arguments.device)
        scores = torch.rand(arguments.batch, channels, side, side, generator=generator).to(arguments.device)
        ours = PixelAdaptiveRefinement(DILATIONS, arguments.iterations)
        functions = {"eager": partial(ours, images, scores)}
        if arguments.compile:
            torch.compiler.reset()
            functions["compiled"] = partial(torch.compile(ours, dynamic=False), images, scores)
        wanted = usual(images, scores, arguments.iterations)
        apart = {name: float((function() - wanted).abs().max()) for name, function in functions.items()}
        functions["usual"] = partial(usual, images, scores, arguments.iterations)
        times = harness.measure(functions, rounds=arguments.rounds, warmup=1, device=arguments.device)
        peaks = {name: harness.peak_bytes(function, arguments.device) for name, function in functions.items()}
        for name in apart:
            yield {
                "side": side,
                "channels": channels,
                "form": name,
                "times_faster": harness.ratio(times, "usual", name)._asdict(),
                "times_less_memory": peaks["usual"] / peaks[name],
                "peak_bytes": peaks[name],
                "peak_bytes_usual": peaks["usual"],
                "max_difference": apart[name],
            }


def looped(images: Tensor, cam: Tensor, labels: Tensor, high: float, low: float, iterations: int) -> Tensor:
    """The pseudo label in the usual form: image by image, its present classes alone, once for each threshold."""
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    out = []
    for image, maps, present in zip(images, cam, labels, strict=True):
        keys = torch.cat([torch.zeros_like(present[:1]), 1 + present.nonzero().flatten()]).long()
        pixels, found = resize(image[None], scale_factor=0.5), []
        for threshold in (high, low):
            stack = torch.cat([torch.full_like(maps[:1], threshold), maps[present > 0]])[None]
            refined = usual(pixels, resize(stack, scale_factor=0.5).softmax(1), iterations)
            found.append(keys[resize(refined, size=image.shape[1:])[0].max(0).indices])
        out.append(torch.where(found[0] > 0, found[0], torch.where(found[1] > 0, 255, 0)))
    return torch.stack(out)


@torch.no_grad()
def pseudo_label(arguments: Arguments) -> list[dict[str, Any]]:
    """`refine_label` of an image of one class and one of two, with and without a bound on those present."""
    side, classes = PSEUDO
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3 + classes, side // 8, side // 8, generator=generator)
    full = F.interpolate(coarse, size=(side, side), mode="bilinear").to(arguments.device)
    labels = torch.zeros(2, classes, device=arguments.device)
    labels[0, 1] = labels[1, [0, classes - 1]] = 1
    images, cam = full[:, :3], full[:, 3:] * labels[:, :, None, None]
    settings = {"high": 0.7, "low": 0.25, "refinement": PixelAdaptiveRefinement(DILATIONS, arguments.iterations)}
    functions = {
        f"max_present={most}": partial(refine_label, images, cam, labels, max_present=most, **settings)
        for most in (2, None)
    }
    functions["loop"] = partial(looped, images, cam, labels, 0.7, 0.25, arguments.iterations)
    wanted = functions["loop"]()
    times = harness.measure(functions, rounds=arguments.rounds, warmup=1, device=arguments.device)
    return [
        {
            "form": name,
            "times_faster": harness.ratio(times, "loop", name)._asdict(),
            "labels_that_differ": int((functions[name]() != wanted).sum()),
            "labels": wanted.numel(),
        }
        for name in functions
        if name != "loop"
    ]


def coco_masks(root: Path, split: str, limit: int) -> list[tuple[Path, Tensor]]:
    """Photograph and exact label map of every annotated image: 0 background, 1..80 classes, crowds 255."""
    try:
        from pycocotools import mask as coder
    except ImportError:
        sys.exit("refinement.py: --coco needs pycocotools: run pip install -e '.[examples]' in the checkout of ffr.")
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        sys.exit(f"refinement.py: --coco expects {path}, which is not there.")
    record = json.loads(path.read_text(encoding="utf-8"))
    number = {one["id"]: place + 1 for place, one in enumerate(sorted(record["categories"], key=lambda c: c["id"]))}
    by_image: dict[int, list[Any]] = {}
    for one in record["annotations"]:
        by_image.setdefault(one["image_id"], []).append(one)
    found = []
    for image in sorted(record["images"], key=lambda i: i["id"]):
        file = root / split / image["file_name"]
        instances = by_image.get(image["id"], [])
        if not (instances and file.is_file()):
            continue
        height, width = image["height"], image["width"]
        label = np.zeros((height, width), np.uint8)
        # The smaller instance lies on top.
        for one in sorted(instances, key=lambda i: (-i.get("iscrowd", 0), -i["area"])):
            shape = one["segmentation"]
            if isinstance(shape, list):
                shape = coder.merge(coder.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                shape = coder.frPyObjects(shape, height, width)
            label[coder.decode(shape) > 0] = 255 if one.get("iscrowd") else number[one["category_id"]]
        found.append((file, torch.from_numpy(label)))
    return found[:limit] if limit else found


@torch.no_grad()
def quality(arguments: Arguments) -> list[dict[str, Any]]:
    """mIoU of masks coarsened to the grid, and refined; every class of an image is known, as in training."""
    from PIL import Image

    par, crf = PixelAdaptiveRefinement(DILATIONS, arguments.iterations), DenseCRF()
    rows = {name: (ConfusionMatrix(81), []) for name in ("nothing", "PAR", "CRF", "PAR then CRF")}
    masks = coco_masks(arguments.coco, arguments.split, arguments.limit)
    for path, label in track(masks, description="refining"):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).to(arguments.device)
        names = [0, *(name for name in label.unique().tolist() if name not in (0, 255))]
        stack = torch.stack([label == name for name in names]).float()[None].to(arguments.device)
        coarse = F.adaptive_avg_pool2d(stack, arguments.grid)
        if arguments.coarsen == "spill":
            coarse[:, 1:] = F.max_pool2d(coarse[:, 1:] * (coarse.argmax(1, keepdim=True) > 0), 3, 1, 1)
            coarse[:, :1] = 0.5 * (coarse[:, 1:].amax(1, keepdim=True) < 0.5)
        if arguments.coarsen != "share":  # the other classes share the rest
            chosen = F.one_hot(coarse.argmax(1), len(names)).movedim(3, 1)
            coarse = torch.where(chosen > 0, CONFIDENCE, (1 - CONFIDENCE) / max(1, len(names) - 1))
        known = F.interpolate(coarse, size=label.shape, mode="bilinear", align_corners=False)
        made: dict[str, Tensor] = {"nothing": known / known.sum(1, keepdim=True).clamp(min=1e-6)}
        for name, function in (
            ("PAR", lambda made=made, image=image: par(image[None], made["nothing"])),
            ("CRF", lambda made=made, image=image: crf(image[None], made["nothing"])),
            ("PAR then CRF", lambda made=made, image=image: crf(image[None], made["PAR"] / made["PAR"].sum(1, True))),
        ):
            begin = time.perf_counter()
            made[name] = function()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            rows[name][1].append(time.perf_counter() - begin)
        for name, scores in made.items():
            prediction = torch.tensor(names)[scores.argmax(1).cpu()]
            rows[name][0].update(prediction, label[None].long())
    return [
        {
            "step": name,
            "miou_percent": 100 * matrix.miou(),
            "images": len(masks),
            "median_seconds": statistics.median(times) if times else 0.0,
        }
        for name, (matrix, times) in rows.items()
    ]


def show_speed(arguments: Arguments, rows: Sequence[dict[str, Any]]) -> None:
    """The table of speed and memory."""
    cells = [
        (
            f"{row['side']} x {row['side']}, {row['channels']} channels, {row['form']}",
            harness.Ratio(**row["times_faster"]),
            f"{row['times_less_memory']:.1f}",
            f"{row['max_difference']:.1e}",
        )
        for row in rows
    ]
    note = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), batch {arguments.batch}, float32, "
        f"{arguments.iterations} iterations, affinity included; {arguments.rounds} interleaved rounds, median and "
        "quartiles of the ratios. Memory: peak of torch's allocator above the inputs."
    )
    columns = ("PixelAdaptiveRefinement", "times faster", "times less memory", "max difference")
    harness.table("Against the one-hot convolution", columns, cells, [note])


def show_pseudo_label(arguments: Arguments, rows: Sequence[dict[str, Any]]) -> None:
    """The table of pseudo labels."""
    cells = [
        (row["form"], harness.Ratio(**row["times_faster"]), f"{row['labels_that_differ']} of {row['labels']:,}")
        for row in rows
    ]
    side, classes = PSEUDO
    note = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), two images of {side} x {side} with one "
        f"and two classes of {classes}, both thresholds, {arguments.iterations} iterations; {arguments.rounds} "
        "interleaved rounds, median and quartiles of the ratios. The loop refines the present classes of one image "
        "after the other, by one-hot convolution."
    )
    harness.table("refine_label against the usual loop", ("form", "times faster", "labels that differ"), cells, [note])


def show_quality(arguments: Arguments, rows: Sequence[dict[str, Any]]) -> None:
    """The table of mIoU and time."""
    cells = [(row["step"], f"{row['miou_percent']:.1f}", f"{row['median_seconds']:.2f}") for row in rows]
    note = (
        f"{rows[0]['images']} images of {arguments.split}; of the true masks every cell of {arguments.grid} x "
        f"{arguments.grid} keeps its {arguments.coarsen}; up-sampled bilinearly, then refined, the classes "
        "of the image known; crowds ignored, background counted. CRF at the recipe's settings. Time of the step "
        f"alone, median, {harness.name_of(arguments.device)}, {arguments.threads} thread(s)."
    )
    harness.table("Coarse masks of COCO, refined", ("step", "mIoU %", "seconds / image"), cells, [note])


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    if arguments.pseudo_label:
        rows = pseudo_label(arguments)
        show_pseudo_label(arguments, rows)
        subject = "pseudo-label"
    elif arguments.coco is None:
        rows = harness.until_stopped(speed(arguments))
        show_speed(arguments, rows)
        subject = "refinement"
    else:
        rows = quality(arguments)
        show_quality(arguments, rows)
        subject = f"refinement-coco-{arguments.coarsen}"
    settings = {**asdict(arguments), "coco": arguments.coco and arguments.coco.name}
    print("wrote", harness.save(subject, settings, rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
