"""Class prototypes and similarity maps against a loop over images and classes.

    python benchmarks/prototypes.py
    python benchmarks/prototypes.py --device cuda

The loop is the usual one, written here from the formula: over the images of a batch and the classes present in each,
vectorised over tokens. Labels are drawn: 1 to 3 classes an image of 20, 1 to 6 of 80, about what VOC and COCO have.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from ffr.prototypes import class_prototypes, similarity_maps

PRESENT = {20: 3, 80: 6}  # most classes of one image
THRESHOLD = 0.7


@dataclass(frozen=True)
class Arguments:
    """Prototypes and similarity against the loop."""

    batches: tuple[int, ...] = (1, 4, 16)
    channels: int = 768
    grid: int = 28
    """of grid x grid tokens"""
    rounds: int = 9
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-prototypes.json"""


def looped(features: Tensor, cam: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (B, K, D) and similarity (B, K, h, w) by the usual loop."""
    batch, channels, height, width = features.shape
    classes = labels.shape[1]
    vectors, maps = [], []
    for image in range(batch):
        tokens = features[image].flatten(1).transpose(0, 1)  # (N, D)
        its_vectors = [features.new_zeros(channels)] * classes
        its_maps = [features.new_zeros(height, width)] * classes
        for name in labels[image].nonzero()[:, 0].tolist():
            score = cam[image, name].flatten().relu()
            score = score / score.max()
            weight = torch.where(score >= THRESHOLD, score, 0)
            vector = (weight[:, None] * tokens).sum(0) / weight.sum()
            its_vectors[name] = vector
            its_maps[name] = F.cosine_similarity(tokens, vector[None], dim=1).view(height, width)
        vectors.append(torch.stack(its_vectors))
        maps.append(torch.stack(its_maps))
    return torch.stack(vectors), torch.stack(maps)


def ours(features: Tensor, cam: Tensor, labels: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """The same by `ffr`; `most` is read from the labels while they are on the host."""
    vectors, valid = class_prototypes(features, cam, labels, seed_threshold=THRESHOLD, max_present=most)
    return vectors, similarity_maps(features, vectors, valid=valid, max_present=most)


def gradient(function: Any, features: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Forward and backward."""
    leaf = features.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, weights)[0]


def measure(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Each case: how many times faster, and how far apart."""
    side, device = arguments.grid, arguments.device
    for classes, most in PRESENT.items():
        for batch in arguments.batches:
            generator = torch.Generator().manual_seed(batch)
            features = torch.randn(batch, arguments.channels, side, side, generator=generator)
            cam = torch.rand(batch, classes, side, side, generator=generator)
            labels = torch.zeros(batch, classes)
            for image in labels:
                count = int(torch.randint(1, most + 1, (), generator=generator))
                image[torch.randperm(classes, generator=generator)[:count]] = 1
            bound = int((labels > 0.5).sum(1).max())
            features, cam, labels = features.to(device), cam.to(device), labels.to(device)
            forms = {
                "loop": partial(looped, cam=cam, labels=labels),
                "ours": partial(ours, cam=cam, labels=labels, most=bound),
            }
            weights = tuple(torch.randn_like(one) for one in forms["loop"](features))
            runs: dict[str, dict[str, Any]] = {
                "forward": {name: partial(torch.no_grad()(form), features) for name, form in forms.items()},
                "forward + backward": {
                    name: partial(gradient, form, features, weights) for name, form in forms.items()
                },
            }
            for kind, functions in runs.items():
                pairs = [functions[name]() for name in ("ours", "loop")]
                pairs = [[one] if isinstance(one, Tensor) else list(one) for one in pairs]
                apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pairs, strict=True))
                times = harness.measure(functions, rounds=arguments.rounds, device=device)
                peaks = {name: harness.peak_bytes(function, device) for name, function in functions.items()}
                yield {
                    "classes": classes,
                    "batch": batch,
                    "present": int(labels.sum()),
                    "max_present": bound,
                    "kind": kind,
                    "times_faster": harness.ratio(times, "loop", "ours")._asdict(),
                    "times_less_memory": peaks["loop"] / peaks["ours"],
                    "relative_difference": apart,
                }


def show(arguments: Arguments, rows: list[dict[str, Any]]) -> None:
    """The table."""
    cells = [
        (
            f"K = {row['classes']}, B = {row['batch']} ({row['present']} present), {row['kind']}",
            harness.Ratio(**row["times_faster"]),
            f"{row['times_less_memory']:.1f}",
            f"{row['relative_difference']:.0e}",
        )
        for row in rows
    ]
    note = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), float32 maps of {arguments.channels} x "
        f"{arguments.grid} x {arguments.grid}; {arguments.rounds} interleaved rounds, median and quartiles of the "
        "ratios. Memory: peak of torch's allocator above the inputs. Difference: of the largest value."
    )
    columns = ("prototypes and similarity", "times faster", "times less memory", "difference")
    harness.table("Against the loop over images and present classes", columns, cells, [note])


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = harness.until_stopped(measure(arguments))
    show(arguments, rows)
    print("wrote", harness.save("prototypes", asdict(arguments), rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
