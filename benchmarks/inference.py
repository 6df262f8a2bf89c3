"""Images per second of a trained network: one scale, several with flip, with the dense CRF; eager, compiled, exported.

    python benchmarks/inference.py --device cuda --precision bf16
    python benchmarks/inference.py --model vit_tiny_patch16_224 --crop 96 --batch 2 --no-compile     # small, on a CPU

Weights and images are random. What is exported is looked through: neither the band split nor the second head may be
part of inference.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
import torch
import tyro
from step import compile_blocks
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

from ffr import FFR, DenseCRF, timm_encoder
from ffr.cam import scaled_size, to_image

SCALES = (1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Arguments:
    """Inference by scales, CRF and form."""

    model: str = "vit_base_patch16_224"
    """name of a plain ViT in timm"""
    crop: int = 448
    """side of the images in pixels"""
    batch: int = 4
    classes: int = 20
    """K"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network, by autocast"""
    compile: bool = True
    """measure torch.compile of the blocks and the head too; a minute or more before the first round"""
    crf: bool = True
    """measure the dense CRF too"""
    rounds: int = 7
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-inference.json"""


def sizes(arguments: Arguments) -> list[int]:
    """Sides of the image at the scales."""
    return [scaled_size((arguments.crop, arguments.crop), scale)[0] for scale in SCALES]


def single(network: Callable[[Tensor], Tensor], images: Tensor, patch: int) -> Tensor:
    """Label map by one scale."""
    return to_image(network(images), tuple(images.shape[2:]), patch).argmax(1)


def several(network: Callable[[Tensor], Tensor], images: Tensor, patch: int, sides: list[int]) -> Tensor:
    """Scores by several scales: the flip pair, in one batch, summed; the maximum over scales."""
    size = tuple(images.shape[2:])
    best = None
    for side in sides:
        scaled = images
        if (side, side) != size:
            scaled = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        one, other = to_image(network(torch.cat([scaled, scaled.flip(3)])), (side, side), patch).chunk(2)
        scores = F.interpolate(one + other.flip(3), size=size, mode="bilinear", align_corners=False)
        best = scores if best is None else torch.maximum(best, scores)
    return best


def foreign(program: ExportedProgram) -> list[str]:
    """What training alone needs and yet stands in the graph: an FFT, the band split, the second head."""
    found = []
    for node in program.graph.nodes:
        homes = " ".join(path for path, _ in node.meta.get("nn_module_stack", {}).values())
        if node.users and any(word in f"{node.target} {homes}" for word in ("fft", "frequency", "phi_2")):
            found.append(str(node))
    return found


def measure(arguments: Arguments) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each form and kind of inference; and what the exported graph holds."""
    model = FFR(timm_encoder(arguments.model, img_size=arguments.crop), arguments.classes).to(arguments.device).eval()
    patch, sides = model.encoder.patch_size, sizes(arguments)
    coarse = torch.rand(arguments.batch, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=(arguments.crop, arguments.crop), mode="bilinear").to(arguments.device)

    def autocast() -> AbstractContextManager[Any]:
        kind = torch.device(arguments.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")

    def program(batch: int, side: int) -> ExportedProgram:
        with autocast():
            return torch.export.export(model, (images.new_zeros(batch, 3, side, side),))

    shapes = {(arguments.batch, arguments.crop), *((2 * arguments.batch, side) for side in sides)}
    programs = {shape: program(*shape) for shape in sorted(shapes)}
    modules = {shape: each.module() for shape, each in programs.items()}
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": model,
        "exported": lambda pixels: modules[pixels.shape[0], pixels.shape[2]](pixels),
    }
    if arguments.compile:
        forms["compiled"] = copy.deepcopy(model)
        compile_blocks(forms["compiled"])
    crf = DenseCRF()

    def run(form: str, kind: str) -> Tensor:
        with torch.no_grad():
            with autocast():
                if kind == "one scale":
                    return single(forms[form], images, patch)
                scores = several(forms[form], images, patch, sides)
            return crf.from_logits(images, scores.float()).argmax(1) if kind.endswith("CRF") else scores.argmax(1)

    kinds = ["one scale", "scales and flip", *["scales, flip, CRF"] * arguments.crf]
    functions = {(form, kind): partial(run, form, kind) for form in forms for kind in kinds}
    with torch.no_grad(), autocast():
        wanted = model(images)
        apart = {form: float((network(images) - wanted).abs().max()) for form, network in forms.items()}
    times = harness.measure(functions, rounds=arguments.rounds, warmup=1, device=arguments.device)
    rows = [
        {
            "kind": kind,
            "form": form,
            "images_per_second": arguments.batch / harness.spread(times[form, kind]).median,
            "relative_rate": harness.ratio(times, ("eager", "one scale"), (form, kind))._asdict(),
            "times_eager": harness.ratio(times, ("eager", kind), (form, kind))._asdict(),
            "peak_bytes": harness.peak_bytes(functions[form, kind], arguments.device),
            "max_difference_of_logits": apart[form],
        }
        for kind in kinds
        for form in forms
    ]
    graph = programs[arguments.batch, arguments.crop]
    return rows, {"nodes": len(graph.graph.nodes), "of_training_alone": foreign(graph)}


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows, graph = measure(arguments)
    cells = [
        (
            f"{row['kind']}, {row['form']}",
            harness.Ratio(**row["relative_rate"]),
            harness.Ratio(**row["times_eager"]),
            f"{row['images_per_second']:.3g}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['max_difference_of_logits']:.1e}",
        )
        for row in rows
    ]
    held = ", ".join(graph["of_training_alone"]) or "none"
    notes = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s); {arguments.model}, {arguments.crop} x "
        f"{arguments.crop}, batch {arguments.batch}, {arguments.classes + 1} labels, {arguments.precision}; scales "
        f"{', '.join(map(str, SCALES))}, each with its mirror image. From pixels to label maps of the image's size; "
        f"{arguments.rounds} interleaved rounds, median and quartiles. Images / s: this machine on this day, no claim.",
        f"The exported graph has {graph['nodes']} nodes; of an FFT, the band split or the second head it has {held}.",
    )
    columns = ("inference", "rate, one scale = 1", "rate, eager = 1", "images / s", "peak MiB", "max |logit - eager|")
    harness.table("Inference", columns, cells, notes)
    settings = {**asdict(arguments), "exported": graph}
    print("wrote", harness.save("inference", settings, rows, device=arguments.device, out=arguments.out))
    return bool(graph["of_training_alone"])


if __name__ == "__main__":
    sys.exit(main())
