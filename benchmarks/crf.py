"""The dense CRF against the compiled implementation of the field: speed, and agreement beside it.

    pip install -e '.[oracle]' && python benchmarks/crf.py
    python benchmarks/crf.py --images photos/ --device cuda

On a GPU ours on the CPU is measured too, and the labels are compared with its; the opponent still runs on one CPU
thread, for it has no other way, and is left out where it is not installed.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ffr.crf import DenseCRF

try:
    import pydensecrf.densecrf as densecrf
except ImportError:
    densecrf = None
ORACLE = "run pip install -e '.[oracle]' in the checkout of ffr."

SETTINGS = {  # name -> (Gaussian sxy, compat), (bilateral sxy, srgb, compat)
    "recipe": ((1, 1), (121, 5, 4)),
    "sxy 80, srgb 13": ((3, 3), (80, 13, 10)),
    "sxy 67, srgb 3": ((1, 3), (67, 3, 4)),
    "sxy 50, srgb 5": ((3, 3), (50, 5, 10)),
}


@dataclass(frozen=True)
class Arguments:
    """The dense CRF against pydensecrf2."""

    images: Path | None = None
    """folder of photographs; by default seven of scikit-image and scikit-learn"""
    limit: int = 7
    """how many of them"""
    height: int = 375
    width: int = 500
    labels: int = 21
    iterations: int = 10
    rounds: int = 5
    threads: int = 1
    """of torch; the opponent has one"""
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-crf.json"""


def photographs(arguments: Arguments) -> dict[str, Tensor]:
    """Name -> uint8 (3, H, W)."""
    if arguments.images is not None:
        found = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        pictures = {path.name: np.array(Image.open(path).convert("RGB")) for path in found[: arguments.limit]}
        if not pictures:
            sys.exit(f"crf.py: --images {arguments.images} holds no .jpg or .png.")
    else:
        try:
            from skimage import data
            from sklearn.datasets import load_sample_images
        except ImportError as error:
            sys.exit(f"crf.py: the photographs need {error.name}: {ORACLE} Or name a folder with --images.")
        pictures = {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}
        pictures["motorcycle"] = data.stereo_motorcycle()[0]
        pictures |= dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    size = (arguments.height, arguments.width)
    resized = {}
    for name, picture in list(pictures.items())[: arguments.limit]:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        resized[name] = F.interpolate(image, size=size, mode="area")[0].round().to(torch.uint8)
    return resized


def probabilities(arguments: Arguments, seed: int) -> Tensor:
    """As of a head of stride 16: smooth, undecided, four labels likely."""
    grid = (max(1, arguments.height // 16), max(1, arguments.width // 16))
    logits = torch.randn(1, arguments.labels, *grid, generator=torch.Generator().manual_seed(seed))
    logits[:, 4:] -= 3
    size = (arguments.height, arguments.width)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].softmax(0)


def opponent(image: Tensor, probs: Tensor, gaussian: Any, bilateral: Any, iterations: int) -> Tensor:
    """The compiled implementation, from probabilities to probabilities as ours."""
    crf = densecrf.DenseCRF2D(image.shape[2], image.shape[1], len(probs))
    crf.setUnaryEnergy(-probs.clamp(min=1e-5).log().flatten(1).numpy())
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    rows = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=rows, compat=bilateral[2])
    return torch.from_numpy(np.array(crf.inference(iterations))).reshape(probs.shape)


def anew(crf: DenseCRF, image: Tensor, probs: Tensor) -> Tensor:
    """As for an image of a size not seen lately: a width that no call had before has no lattice of positions yet."""
    crf.gaussian_sxy *= 1 + 1e-12  # the positions are the same numbers in float32
    result: Tensor = crf(image, probs)
    return result


def compare(arguments: Arguments, pictures: dict[str, Tensor], gaussian: Any, bilateral: Any) -> dict[str, Any]:
    """Agreement and speed for one setting of the parameters; each opponent by its name."""
    ours, other = (DenseCRF(*gaussian, *bilateral, arguments.iterations) for _ in range(2))
    found: dict[str, dict[str, Any]] = {}
    moved = pixels = 0
    for seed, (name, image) in enumerate(pictures.items()):
        probs = probabilities(arguments, seed)
        there = image.to(arguments.device), probs.to(arguments.device)
        functions = {"ffr": partial(ours, *there), "anew": partial(anew, other, *there)}
        if densecrf is not None:
            functions["pydensecrf2"] = partial(opponent, image, probs, gaussian, bilateral, arguments.iterations)
        if arguments.device != "cpu":
            functions["ffr on the CPU"] = partial(ours, image, probs)
        results = {key: function().cpu() for key, function in functions.items()}
        times = harness.measure(functions, rounds=arguments.rounds, warmup=1, device=arguments.device)
        pixels += image[0].numel()
        moved += int((results["ffr"].argmax(0) != probs.argmax(0)).sum())
        for key in set(functions) - {"ffr", "anew"}:
            row = found.setdefault(key, {"differ": 0, "errors": [], "faster": {}, "anew": []})
            row["differ"] += int((results["ffr"].argmax(0) != results[key].argmax(0)).sum())
            row["errors"].append(float((results["ffr"] - results[key]).abs().mean()))
            row["faster"][name] = [a / b for a, b in zip(times[key], times["ffr"], strict=True)]
            row["anew"] += [a / b for a, b in zip(times[key], times["anew"], strict=True)]
    return {
        key: {
            "times_faster": harness.spread([one for several in row["faster"].values() for one in several])._asdict(),
            "times_faster_anew": harness.spread(row["anew"])._asdict(),
            "by_image": {name: harness.spread(several).median for name, several in row["faster"].items()},
            "labels_differing": row["differ"],
            "labels": pixels,
            "mean_abs_error": max(row["errors"]),
            "labels_moved_percent": 100 * moved / pixels,
        }
        for key, row in sorted(found.items())
    }


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if densecrf is None and arguments.device == "cpu":
        sys.exit(f"crf.py: the opponent is pydensecrf2: {ORACLE}")
    torch.set_num_threads(arguments.threads)
    pictures = photographs(arguments)
    rows = harness.until_stopped(
        {"setting": name, "opponent": key, **row}
        for name, values in SETTINGS.items()
        for key, row in compare(arguments, pictures, *values).items()
    )
    cells = [
        (
            f"{row['setting']}, {row['opponent']}",
            harness.Ratio(**row["times_faster"]),
            f"{min(row['by_image'].values()):.2f}-{max(row['by_image'].values()):.2f}",
            harness.Ratio(**row["times_faster_anew"]),
            f"{row['labels_differing']} of {row['labels']}",
            f"{row['mean_abs_error']:.1e}",
            f"{row['labels_moved_percent']:.1f} %",
        )
        for row in rows
    ]
    note = (
        f"{len(pictures)} photographs, {arguments.iterations} iterations, {arguments.rounds} interleaved rounds each, "
        f"from probabilities to probabilities, lattices included; ours on {harness.name_of(arguments.device)}, "
        f"{arguments.threads} thread(s). Median of all rounds and quartiles; the medians by image. The lattice of the "
        "positions is kept from image to image of one size; new size: it is built as well."
    )
    harness.table(
        f"DenseCRF, {arguments.height} x {arguments.width}, {arguments.labels} labels",
        ("setting, opponent", "times faster", "by image", "new size", "labels differing", "mean |dQ|", "CRF changes"),
        cells,
        [note],
    )
    settings = {**asdict(arguments), "images": list(pictures), "parameters": SETTINGS}
    print("wrote", harness.save("crf", settings, rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
