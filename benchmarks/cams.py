"""CAMs of all present classes of a batch: ours against grad-cam and torchcam, one model, one set of images.

    pip install -e '.[examples,oracle]'
    python benchmarks/cams.py

The classifier pools the tokens of a ViT by their maximum, then is linear: there the gradient of a class by a token is
the class's weight, and Grad-CAM is our CAM. Both packages are used as well as they allow: a whole batch in a call, one
class of each image at a time; torchcam keeps its graph, so that it needs one forward pass, grad-cam makes a new one for
every call. Weights are random: the time does not depend on them.
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
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import IntermediateClassifier
from ffr.cam import normalize_cam, tokens_to_map

try:
    import timm
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchGradCAM
except ImportError as error:
    sys.exit(f"cams.py needs {error.name}: run pip install -e '.[examples,oracle]' in the checkout of ffr.")


@dataclass(frozen=True)
class Arguments:
    """CAM extraction against grad-cam and torchcam."""

    model: str = "vit_tiny_patch16_224"
    """any plain ViT of timm"""
    size: int = 224
    batches: tuple[int, ...] = (1, 4)
    classes: int = 20
    present: tuple[int, ...] = (1, 3)
    """classes present in every image"""
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-cams.json"""


class Classifier(nn.Module):
    """A ViT of timm, and our classifier on its tokens: images to logits."""

    def __init__(self, name: str, size: int, classes: int) -> None:
        super().__init__()
        self.body = timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
        self.prefix = self.body.num_prefix_tokens
        side = self.body.patch_embed.grid_size
        self.maps = partial(tokens_to_map, grid=tuple(side), prefix=self.prefix)
        self.classifier = IntermediateClassifier(self.body.embed_dim, classes)
        nn.init.normal_(self.classifier.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.maps(self.body.forward_features(images)))


@torch.no_grad()
def ours(model: Classifier, images: Tensor, labels: Tensor) -> list[Tensor]:
    """One forward pass; maps (present, h, w) of each image."""
    cam = normalize_cam(model.classifier.cam(model.maps(model.body.forward_features(images))), labels=labels)
    return [one[label > 0] for one, label in zip(cam, labels, strict=True)]


def by_grad_cam(model: Classifier, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The n-th present class of every image in one call."""
    names = [label.nonzero()[:, 0].tolist() for label in labels]
    found: list[list[Tensor]] = [[] for _ in names]
    with GradCAM(model, [model.body.norm], reshape_transform=model.maps) as extractor:
        for place in range(max(map(len, names))):
            targets = [ClassifierOutputTarget(some[min(place, len(some) - 1)]) for some in names]
            maps = extractor(images, targets)  # at the size of the image
            for image, some in enumerate(names):
                if place < len(some):
                    found[image].append(torch.from_numpy(maps[image]))
    return [torch.stack(some) for some in found]


def by_torchcam(model: Classifier, images: Tensor, labels: Tensor) -> list[Tensor]:
    """One forward pass; then the n-th present class of every image in one call."""
    names = [label.nonzero()[:, 0].tolist() for label in labels]
    found: list[list[Tensor]] = [[] for _ in names]
    with TorchGradCAM(model, target_layer=model.body.norm, reshape_transform=model.maps) as extractor:
        scores = model(images)
        for place in range(max(map(len, names))):
            targets = [some[min(place, len(some) - 1)] for some in names]
            maps = extractor(targets, scores, retain_graph=True)[0]
            for image, some in enumerate(names):
                if place < len(some):
                    found[image].append(maps[image])
    return [torch.stack(some) for some in found]


def enlarged(maps: list[Tensor], size: int) -> list[Tensor]:
    """Maps of the grid as grad-cam gives them, at the size of the image."""
    grown = [F.interpolate(one[None], size=(size, size), mode="bilinear", align_corners=False) for one in maps]
    return [normalize_cam(one)[0] for one in grown]


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest difference of two lists of maps."""
    return max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(one, two, strict=True))  # grad-cam's are there


def measure(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Each case: how many times faster, and how far apart."""
    torch.manual_seed(0)
    model = Classifier(arguments.model, arguments.size, arguments.classes).to(arguments.device).eval()
    for batch in arguments.batches:
        for present in arguments.present:
            images = torch.randn(batch, 3, arguments.size, arguments.size, device=arguments.device)
            labels = torch.zeros(batch, arguments.classes, device=arguments.device)
            for label in labels:
                label[torch.randperm(arguments.classes)[:present]] = 1
            functions: dict[str, Callable[[], list[Tensor]]] = {
                "ours": partial(ours, model, images, labels),
                "grad-cam": partial(by_grad_cam, model, images, labels),
                "torchcam": partial(by_torchcam, model, images, labels),
            }
            mine = functions["ours"]()
            times = harness.measure(functions, rounds=arguments.rounds, device=arguments.device)
            for name in ("grad-cam", "torchcam"):
                theirs = functions[name]()
                same = enlarged(mine, arguments.size) if name == "grad-cam" else mine
                yield {
                    "batch": batch,
                    "present": present,
                    "opponent": name,
                    "times_faster": harness.ratio(times, name, "ours")._asdict(),
                    "max_difference": difference(same, theirs),
                }


def show(arguments: Arguments, rows: list[dict[str, Any]]) -> None:
    """The table."""
    cells = [
        (
            f"B = {row['batch']}, {row['present']} present, against {row['opponent']}",
            harness.Ratio(**row["times_faster"]),
            f"{row['max_difference']:.0e}",
        )
        for row in rows
    ]
    notes = [
        f"{arguments.model} at {arguments.size}, {harness.name_of(arguments.device)}, {arguments.threads} thread(s); "
        f"{arguments.rounds} interleaved rounds, median and quartiles of the ratios.",
        "Maps in [0, 1] on the grid; grad-cam's are at the size of the image, to which ours are brought.",
    ]
    harness.table("CAMs of all present classes", ("case", "times faster", "max difference"), cells, notes)


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = harness.until_stopped(measure(arguments))
    show(arguments, rows)
    print("wrote", harness.save("cams", asdict(arguments), rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
