"""The dense energy against all pairs of pixels: speed of loss and gradient, the scale of lattice units beside it.

    python benchmarks/energy.py
    python benchmarks/energy.py --device cuda

All pairs are one chunked matrix product of the Gaussian with the gated probabilities, written here from the formula.
The opponent's gradient is exact as well: both filterings share its matrix. Ours in a whole training step is a part of
step.py.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from ffr.lattice import image_features
from ffr.losses import dense_energy_loss

SIGMA_RGB, SIGMA_XY = 15.0, 100.0


@dataclass(frozen=True)
class Arguments:
    """The dense energy against all pairs."""

    sides: tuple[int, ...] = (56, 112)
    """of the images at the size at which the energy is computed; the time of all pairs grows with the fourth power"""
    labels: int = 21
    chunk: int = 1024
    """rows of the matrix of all pairs held at once"""
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-energy.json"""


def inputs(side: int, labels: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as of a head of stride 16, a label with ignored pixels, and a smooth picture with noise."""
    generator = torch.Generator().manual_seed(side)
    coarse = 2 * torch.randn(1, labels, max(1, side // 16), max(1, side // 16), generator=generator)
    picture = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=(side, side), mode="bilinear")
    picture = (picture + 0.03 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
    label = torch.where(torch.rand(1, side, side, generator=generator) > 0.5, 255, 0)
    logits = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    return logits.to(device), label.to(device), picture.to(device)


def all_pairs(logits: Tensor, label: Tensor, picture: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Energy of one image at full size and weight 1, and its gradient by the logits."""
    leaf = logits.detach().requires_grad_()
    probs = leaf.softmax(1)[0].flatten(1).t()
    with torch.no_grad():
        gate = torch.where(label.flatten()[:, None] == 255, 1.0, 1 - probs.amax(1, keepdim=True))
        features = image_features(picture[0], sxy=SIGMA_XY, srgb=SIGMA_RGB)
        square = features.square().sum(1)
        both = torch.cat([probs, gate * probs], 1)
        filtered = []
        for rows in range(0, len(features), chunk):
            part = features[rows : rows + chunk]
            apart = square[rows : rows + chunk, None] + square - 2 * part @ features.t()
            filtered.append(apart.clamp_(min=0).mul_(-0.5).exp_() @ both)
        near, back = torch.cat(filtered).chunk(2, 1)
        slope = -(gate * near + back)
    energy = -(gate * probs.detach() * near).sum()
    return energy, torch.autograd.grad((probs * slope).sum(), leaf)[0]


def ours(logits: Tensor, label: Tensor, picture: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """The same by the lattice."""
    leaf = logits.detach().requires_grad_()
    settings = {"sigma_rgb": SIGMA_RGB, "sigma_xy": SIGMA_XY, "weight": 1.0, "scale": 1.0}
    energy = dense_energy_loss(leaf, label, images=picture, exact_gradient=exact, **settings)
    return energy.detach(), torch.autograd.grad(energy, leaf)[0]


def compare(arguments: Arguments, side: int) -> Iterator[dict[str, Any]]:
    """Speed, memory and how far the lattice is from all pairs, for one size."""
    made = inputs(side, arguments.labels, arguments.device)
    functions: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "exact gradient": partial(ours, *made, exact=True),
        "customary gradient": partial(ours, *made, exact=False),
        "all pairs": partial(all_pairs, *made, chunk=arguments.chunk),
    }
    wanted, slope = functions["all pairs"]()
    # Half a second of each a round: all pairs take so long that one call of ours would see another machine.
    times = harness.measure(functions, rounds=arguments.rounds, warmup=1, seconds=0.5, device=arguments.device)
    peaks = {name: harness.peak_bytes(function, arguments.device) for name, function in functions.items()}
    for name in ("exact gradient", "customary gradient"):
        energy, gradient = functions[name]()
        yield {
            "side": side,
            "form": name,
            "times_faster": harness.ratio(times, "all pairs", name)._asdict(),
            "times_less_memory": peaks["all pairs"] / peaks[name],
            "energy_over_all_pairs": float(energy / wanted),
            "gradient_cosine": float(F.cosine_similarity(gradient.flatten(), slope.flatten(), dim=0)),
        }


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = harness.until_stopped(row for side in arguments.sides for row in compare(arguments, side))
    cells = [
        (
            f"{row['side']} x {row['side']}, {row['form']}",
            harness.Ratio(**row["times_faster"]),
            f"{row['times_less_memory']:.1f}",
            f"{row['energy_over_all_pairs']:.3f}",
            f"{row['gradient_cosine']:.3f}",
        )
        for row in rows
    ]
    note = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), {arguments.labels} labels, one image, "
        f"float32, lattice, loss and gradient; all pairs with an exact gradient, {arguments.chunk} rows at once; "
        f"{arguments.rounds} interleaved rounds, median and quartiles. Memory: peak of torch's allocator."
    )
    columns = ("dense energy", "times faster", "times less memory", "energy / all pairs", "cosine of the gradients")
    harness.table("The dense energy against all pairs of pixels", columns, cells, [note])
    print("wrote", harness.save("energy", asdict(arguments), rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
