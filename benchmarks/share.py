"""What FFR costs in a training step of the quickstart's network: mask, prototypes, selection and L_r, one by one.

    python benchmarks/share.py

The step is that of examples/quickstart.py after the start of all losses: forward, pseudo labels, every term, backward,
optimiser. The parts run alone on features of the same shape, forward and backward, in turn with the step.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from recipe.config import SCENES, build_objective
from recipe.engine import optimizer
from recipe.network import build_model
from recipe.scenes import CLASSES

from ffr import FrequencyRectification
from ffr.prototypes import class_prototypes
from ffr.rectification import rectification_loss, select_tokens


@dataclass(frozen=True)
class Arguments:
    """The share of mask, prototypes, selection and L_r in a step of the quickstart."""

    rounds: int = 9
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-share.json"""


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """Each part: its share of the time of a step."""
    device = arguments.device
    model = build_model(SCENES, len(CLASSES)).to(device)
    objective = build_objective(SCENES, model).train()
    adamw = optimizer(model, 1e-4, weight_decay=SCENES.weight_decay, head_scale=SCENES.head_scale)
    generator = torch.Generator().manual_seed(0)
    batch, size, classes = SCENES.batch_size, SCENES.crop, model.num_classes
    images = torch.rand(batch, 3, size, size, generator=generator).to(device)
    labels = torch.zeros(batch, classes)
    for label in labels:  # a scene has one or two classes
        label[torch.randperm(classes, generator=generator)[: int(torch.randint(1, 3, (), generator=generator))]] = 1
    most = int((labels > 0.5).sum(1).max())
    labels = labels.to(device)

    def step() -> None:
        objective(images, labels, step=10**6, max_present=most).total.backward()
        adamw.step()
        adamw.zero_grad()

    with torch.no_grad():
        features = model.encoder(images).final
        cam = model.classifier.cam(features)
    low, high = model.frequency(features)
    weights = torch.randn_like(low), torch.randn_like(high)
    vectors, valid = class_prototypes(features, cam, labels, max_present=most)
    selected = select_tokens(features=features, low=low, prototypes=vectors, valid=valid, max_present=most)
    given = {"features": features, "low": low, "prototypes": vectors, "valid": valid}
    rectify = FrequencyRectification(model.frequency.mu)

    def leaf() -> Tensor:
        return features.detach().requires_grad_()

    def mask() -> None:
        x = leaf()
        torch.autograd.grad(tuple(model.frequency(x)), x, weights)

    def loss() -> None:
        x = leaf()
        torch.autograd.grad(rectification_loss(**{**given, "features": x}, selected=selected), x)

    def all_of_it() -> None:
        x = leaf()
        result = rectify(x, cam, labels, max_present=most)
        torch.autograd.grad((result.loss, result.high), x, (torch.ones_like(result.loss), weights[1]))

    functions = {
        "step": step,
        "mask": mask,
        # L_r gives the prototypes no gradient: they only select
        "prototypes": torch.no_grad()(partial(class_prototypes, features, cam, labels, max_present=most)),
        "selection": partial(select_tokens, **given, max_present=most),
        "L_r": loss,
        "all four": all_of_it,
    }
    times = harness.measure(functions, rounds=arguments.rounds, device=device)
    rows = []
    for name in functions:
        if name != "step":
            shares = [100 * part / whole for part, whole in zip(times[name], times["step"], strict=True)]
            rows.append({"part": name, "percent_of_step": harness.spread(shares)._asdict()})
    return rows


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments)
    note = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), batch "
        f"{SCENES.batch_size}, 16 x 16 tokens of 64 channels; {arguments.rounds} interleaved rounds, "
        "median and quartiles. Forward and backward, each part alone; all four in one call of FrequencyRectification."
    )
    cells = [(row["part"], harness.Ratio(**row["percent_of_step"])) for row in rows]
    harness.table("Share of a training step of the quickstart", ("part", "percent"), cells, [note])
    print("wrote", harness.save("share", asdict(arguments), rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
