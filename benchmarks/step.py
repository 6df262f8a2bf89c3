"""One training step, every term on: where its time and memory go, what FFR adds, how far from the floor it is.

    python benchmarks/step.py --device cuda --precision bf16 --compile blocks
    python benchmarks/step.py --count                                                           # operations alone
    python benchmarks/step.py --model vit_tiny_patch16_224 --crop 96 --batch 2 --hidden 128     # small, on a CPU

Random weights and images; all that is timed is one iteration of a training loop, optimiser included, without the data.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import torch
import tyro
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ffr import FFR, FFRLoss, timm_encoder
from ffr.cam import cam_to_label, multi_scale_cam, normalize_cam, to_image
from ffr.refine import refine_label

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WITHOUT = {"lambda_h": 0.0, "lambda_l": 0.0}  # the same step without FFR
LR = 6e-11  # the first of a warm-up: weights, and so what is timed, stay as they are


@dataclass(frozen=True)
class Arguments:
    """Time, memory and floor of a training step, by part."""

    model: str = "vit_base_patch16_224"
    """name of a plain ViT in timm"""
    crop: int = 448
    """side of the images in pixels, a multiple of the patch size"""
    batch: int = 4
    classes: int = 20
    """K"""
    present: int = 2
    """classes in each image"""
    hidden: int = 512
    """channels of the segmentation heads; the method's, made for 768 channels of the encoder"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the forward pass; fp32 is measured in any case"""
    compile: Literal["no", "blocks", "whole"] = "no"
    """measure torch.compile too: of every block of the transformer, the head and, on a CPU, the refinement (seconds a
    size, for the blocks share their code; on a GPU it has its kernel), or of the whole objective (many minutes)"""
    backend: str = "inductor"
    """of torch.compile"""
    count: bool = False
    """count operations alone: nothing is computed, so that the settings of the method fit every machine"""
    steps: int = 10
    """interleaved rounds"""
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-step.json"""


class Part(NamedTuple):
    """A stretch of the step on its own."""

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: Sequence[Tensor] | None = None
    """what its gradient goes to, weights apart; None for a part without gradient"""
    besides: str | None = None
    """another part that this one contains, and that is taken off"""


def make_batch(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Blobs of colour with a little noise, and labels of `present` classes each."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.crop, arguments.crop)
    coarse = torch.rand(*shape[:2], max(1, shape[2] // 32), max(1, shape[3] // 32), generator=generator)
    images = F.interpolate(coarse, size=shape[2:], mode="bilinear") + 0.02 * torch.randn(shape, generator=generator)
    labels = torch.zeros(arguments.batch, arguments.classes)
    for row in labels:
        row[torch.randperm(arguments.classes, generator=generator)[: arguments.present]] = 1
    return images.clamp(0, 1).to(arguments.device), labels.to(arguments.device)


def autocast(arguments: Arguments, precision: str) -> AbstractContextManager[Any]:
    """The precision of a forward pass."""
    kind = torch.device(arguments.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")


class Step:
    """One iteration, and its first parts."""

    def __init__(self, arguments: Arguments, loss: Callable[..., Any], model: FFR, precision: str) -> None:
        self.arguments, self.loss, self.precision = arguments, loss, precision
        self.images, self.labels = make_batch(arguments)
        # Fused it needs no number on the host, and is one pass over the weights.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)

    def forward(self) -> Tensor:
        """The objective; its graph lives as long as the result."""
        with autocast(self.arguments, self.precision):
            return self.loss(self.images, self.labels, step=0, max_present=self.arguments.present).total

    def backward(self) -> None:
        """Forward and backward."""
        total = self.forward()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()

    def __call__(self) -> None:
        """The whole iteration."""
        self.backward()
        self.optimizer.step()


@torch.no_grad()
def make_parts(arguments: Arguments, loss: FFRLoss, precision: str) -> dict[str, Part]:
    """Every part of the objective alone, on the tensors that it would see there."""
    model, size, patch = loss.model, (arguments.crop, arguments.crop), loss.model.encoder.patch_size
    images, labels = make_batch(arguments)
    given = {"labels": labels, "max_present": arguments.present}

    def cams(kinds: int) -> tuple[Tensor, ...]:
        def raw(pixels: Tensor) -> tuple[Tensor, ...]:
            return model.cams(pixels)[:kinds]

        return multi_scale_cam(raw, images, scales=loss.scales, flip=loss.flip, raw=at_hand[:kinds], **given)

    def pseudo(*maps: Tensor) -> tuple[Tensor, ...]:
        return refine_label(images, maps, high=loss.high, low=loss.low, refinement=loss.refinement, **given)

    def full(logits: Tensor) -> Tensor:
        return to_image(logits.float(), size, patch)

    def classify(final: Tensor, intermediate: Tensor) -> tuple[Tensor, ...]:
        pairs = ((model.classifier, final), (model.intermediate_classifier, intermediate))
        return tuple(F.multilabel_soft_margin_loss(part(maps).float(), labels) for part, maps in pairs)

    def affinity(final: Tensor) -> tuple[Tensor, ...]:
        small = F.interpolate(inter, size=final.shape[2:], mode="bilinear", align_corners=False)
        label = cam_to_label(small, high=loss.affinity_high, low=loss.affinity_low)
        return (loss.affinity(final, label),)

    def prototypes(final: Tensor) -> tuple[Tensor, ...]:
        seeds = normalize_cam(model.classifier.cam(final.detach()).float(), labels=labels)
        found = loss.prototypes(final, seeds, labels, max_present=arguments.present)
        return (found.vectors,)

    with autocast(arguments, precision):
        at_hand = model.cams(images)  # in a step they come from the training forward
        cam, inter = cams(2)
        label, label_inter = pseudo(cam, inter)
        final, intermediate, _ = model.encode(images)
        low, high = model.frequency(final)
        seeds = normalize_cam(model.classifier.cam(final).float(), labels=labels)
        vectors, valid = loss.prototypes(final, seeds, labels, max_present=arguments.present)
        logits, logits_high = full(model.head(final)), full(model.head.high(high))
    bands = {"features": final, "low": low, "prototypes": vectors, "valid": valid}
    chosen = loss.rectification.select(**bands)
    for tensor in (final, intermediate, low, high, logits, logits_high):
        tensor.requires_grad_()
    return {
        "multi-scale CAM, final": Part(lambda: cams(1)),
        "multi-scale CAM, intermediate": Part(lambda: cams(2), besides="multi-scale CAM, final"),
        "encoder": Part(lambda: model.encode(images)[:2], ()),
        "classifiers and their losses": Part(lambda: classify(final, intermediate), (final, intermediate)),
        "pseudo label, final": Part(lambda: pseudo(cam)),
        "segmentation head": Part(lambda: (full(model.head(final)),), (final,)),
        "L_s1": Part(lambda: (loss.segmentation(logits, label),), (logits,)),
        "dense energy": Part(lambda: (loss.energy(logits, label, images=images),), (logits,)),
        "affinity loss": Part(lambda: affinity(final), (final,)),
        "FFR: frequency mask": Part(lambda: tuple(model.frequency(final)), (final,)),
        "FFR: prototypes": Part(lambda: prototypes(final), (final,)),
        "FFR: selection": Part(lambda: (loss.rectification.select(**bands),)),
        "FFR: L_r": Part(lambda: (loss.rectification(**bands, selected=chosen),), (final,)),
        "FFR: second head": Part(lambda: (full(model.head.high(high)),), (high,)),
        "FFR: L_s2": Part(lambda: (loss.segmentation(logits_high, label_inter),), (logits_high,)),
        "FFR: pseudo label, intermediate": Part(lambda: pseudo(cam, inter), besides="pseudo label, final"),
    }


def runs(arguments: Arguments, model: FFR, part: Part) -> dict[str, Callable[[], object]]:
    """The part's forward, and forward with backward where it has one."""

    def forward() -> tuple[Tensor, ...]:
        with autocast(arguments, arguments.precision), torch.set_grad_enabled(part.inputs is not None):
            return part.forward()

    if part.inputs is None:
        return {"forward": forward}
    slopes = [torch.ones_like(output) for output in forward()]
    leaves = (*part.inputs, *model.parameters())

    def both() -> None:
        outputs = forward()
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, slopes)

    return {"forward": forward, "both": both}


def flops(function: Callable[[], object]) -> int:
    """Of its matrix products and convolutions; attention as its two products, recomputed nowhere."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul(arguments: Arguments, precision: str) -> tuple[Callable[[], object], int]:
    """A product large enough to run at the peak rate, and its FLOPs."""
    side = 1024 if arguments.device == "cpu" else 8192
    a = torch.randn(side, side, device=arguments.device, dtype=DTYPES[precision])
    return partial(torch.mm, a, a), 2 * side**3


def compiled(arguments: Arguments, loss: FFRLoss) -> Callable[..., Any]:
    """A copy of the objective that is compiled."""
    loss = copy.deepcopy(loss)
    if arguments.compile == "whole":  # `step` is one number in all calls here: one graph
        return torch.compile(loss, dynamic=False, backend=arguments.backend)
    compile_blocks(loss.model, arguments.backend)
    if arguments.device == "cpu":
        loss.refinement.compile(dynamic=False, backend=arguments.backend)
    return loss


def compile_blocks(model: FFR, backend: str = "inductor") -> None:
    """Compile every block of the transformer, and the head, in place; blocks share their code, and so the graphs."""
    for part in (*model.encoder.model.blocks, model.head):
        part.compile(dynamic=False, backend=backend)


def measure_forms(arguments: Arguments, model: FFR) -> list[dict[str, Any]]:
    """Each precision, eager and compiled: speed, memory, utilisation, and what FFR adds."""
    functions: dict[str, Callable[[], object]] = {}
    precisions = dict.fromkeys(("fp32", arguments.precision))
    forms = [(f"{precision}, eager", precision) for precision in precisions]
    losses = {"": FFRLoss(model, start=0), " without FFR": FFRLoss(model, start=0, **WITHOUT)}
    for form, precision in forms:
        for kind, loss in losses.items():
            functions[form + kind] = Step(arguments, loss, model, precision)
    if arguments.compile != "no":
        form, precision = f"{arguments.precision}, compiled ({arguments.compile})", arguments.precision
        forms.append((form, precision))
        for kind, loss in losses.items():
            called = compiled(arguments, loss)
            functions[form + kind] = Step(arguments, called, called.model, precision)
    products = {precision: matmul(arguments, precision) for precision in precisions}
    functions |= {f"matmul {precision}": product for precision, (product, _) in products.items()}
    times = harness.measure(functions, rounds=arguments.steps, device=arguments.device)
    work = flops(functions[forms[0][0]])
    rows = []
    for form, precision in forms:
        per_flop = harness.ratio(times, f"matmul {precision}", form)  # times a product fits into a step, inverted
        without = [b / a for a, b in zip(times[form], times[f"{form} without FFR"], strict=True)]
        rows.append(
            {
                "form": form,
                "seconds": harness.spread(times[form])._asdict(),
                "times_faster_than_fp32": harness.ratio(times, forms[0][0], form)._asdict(),
                "ffr_percent": harness.spread([100 * (1 - share) for share in without])._asdict(),
                "utilisation_percent": harness.Ratio(
                    *(100 * work / products[precision][1] * share for share in per_flop)
                )._asdict(),
                "peak_bytes": harness.peak_bytes(functions[form], arguments.device),
                "tera_flop": work / 1e12,
                "matmul_tera_flop_per_second": products[precision][1]
                / harness.spread(times[f"matmul {precision}"]).median
                / 1e12,
            }
        )
    return rows


def measure_parts(arguments: Arguments, model: FFR) -> tuple[list[dict[str, Any]], list[str]]:
    """Each part's share of the eager step, its memory and FLOPs; and where the host waits in a steady step."""
    loss = FFRLoss(model, start=0)
    step = Step(arguments, loss, model, arguments.precision)
    parts = make_parts(arguments, loss, arguments.precision)
    functions: dict[str, dict[str, Callable[[], object]]] = {
        **{name: runs(arguments, model, part) for name, part in parts.items()},
        "whole step": {"forward": step.forward, "both": step.backward, "all": step},
        "optimiser": {"forward": step.optimizer.step},  # after the step, which leaves it gradients
    }
    flat = {f"{name}, {kind}": call for name, kinds in functions.items() for kind, call in kinds.items()}
    times = harness.measure(flat, rounds=arguments.steps, device=arguments.device)

    def share(whole: str, less: str | None = None) -> dict[str, float] | None:
        if whole not in times:
            return None
        off = times[less] if less else [0.0] * arguments.steps
        rounds = zip(times[whole], off, times["whole step, all"], strict=True)
        return harness.spread([100 * (a - b) / c for a, b, c in rounds])._asdict()

    rows = []
    for name, kinds in functions.items():
        besides = parts[name].besides if name in parts else None
        everything = list(kinds.values())[-1]
        rows.append(
            {
                "part": name,
                "forward_percent": share(f"{name}, forward", besides and f"{besides}, forward"),
                "backward_percent": share(f"{name}, both", f"{name}, forward"),
                "peak_bytes": harness.peak_bytes(everything, arguments.device),
                "giga_flop": (flops(everything) - (flops(functions[besides]["forward"]) if besides else 0)) / 1e9,
            }
        )
    with harness.host_waits(arguments.device) as waits:
        step()
    return rows, waits


def count_parts(arguments: Arguments, model: FFR) -> list[dict[str, Any]]:
    """TFLOP of each part and of the whole step, on tensors without data."""
    rows = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = FFRLoss(model, start=0)
        parts = make_parts(arguments, loss, arguments.precision)
        work = {name: flops(list(runs(arguments, model, part).values())[-1]) for name, part in parts.items()}
        whole = flops(Step(arguments, loss, model, arguments.precision).backward)
    for name, part in parts.items():
        mine = work[name] - (work[part.besides] if part.besides else 0)
        rows.append({"part": name, "tera_flop": mine / 1e12, "percent": 100 * mine / whole})
    return [*rows, {"part": "whole step", "tera_flop": whole / 1e12, "percent": 100.0}]


def show_count(arguments: Arguments, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of operations."""
    ours = [row for row in rows if row["part"].startswith("FFR")]
    total = {key: sum(row[key] for row in ours) for key in ("tera_flop", "percent")}
    cells = [(row["part"], f"{row['tera_flop']:.4f}", f"{row['percent']:.2f}") for row in rows]
    cells.insert(-1, ("FFR, its parts together", f"{total['tera_flop']:.4f}", f"{total['percent']:.2f}"))
    note = (
        f"{arguments.model}, {arguments.crop} x {arguments.crop}, batch {arguments.batch}, {arguments.classes} "
        f"classes, heads of {arguments.hidden}; every term on. Matrix products and convolutions, forward and backward."
    )
    harness.table("Operations of a training step", ("part", "TFLOP", "%"), cells, [note])


def show_forms(arguments: Arguments, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of the whole step."""
    cells = [
        (
            row["form"],
            harness.Ratio(**row["times_faster_than_fp32"]),
            harness.Ratio(**row["ffr_percent"]),
            harness.Ratio(**row["utilisation_percent"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{1000 * row['seconds']['median']:.0f}",
        )
        for row in rows
    ]
    notes = (
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s); {arguments.model}, {arguments.crop} x "
        f"{arguments.crop}, batch {arguments.batch}, {arguments.classes} classes, {arguments.present} in each image, "
        f"heads of {arguments.hidden}; every term on. {arguments.steps} interleaved rounds, median and quartiles.",
        "FFR: what the step takes longer than the same step with lambda_h = lambda_l = 0, in percent of it.",
        f"Of the floor: {rows[0]['tera_flop']:.3g} TFLOP of matrix products and convolutions at the rate of a large "
        "product of that precision in the same round, in percent of the step's time.",
        "Peak: of torch's allocator, above weights, optimiser and batch. ms: of this machine on this day, no claim.",
    )
    columns = ("whole step", "times faster", "FFR %", "of the floor %", "peak GiB", "ms")
    harness.table("Training step", columns, cells, notes)


def show_parts(rows: Sequence[Mapping[str, Any]], waits: Sequence[str]) -> None:
    """The table of the parts."""
    names = ("forward_percent", "backward_percent")

    def together(title: str, some: Sequence[Mapping[str, Any]]) -> tuple[object, ...]:
        sums = (f"{sum(row[name]['median'] for row in some if row[name]):.2f}" for name in names)
        return (title, *sums, None, f"{sum(row['giga_flop'] for row in some):.3g}")

    cells = [
        (
            row["part"],
            *(row[name] and harness.Ratio(**row[name]) for name in names),
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['giga_flop']:.3g}",
        )
        for row in rows
    ]
    ours = [row for row in rows if row["part"].startswith("FFR")]
    cells[-2:-2] = [together("FFR, its parts together", ours), together("all parts together", rows[:-2])]
    notes = (
        "Percent of the whole step's time, each part alone on the tensors it would see there, in the same rounds, "
        "eager. What the parts together lack, or have too much, is what they share and what lies between them.",
        "The intermediate CAM also serves the affinity loss: without FFR it is needed as well.",
        f"Host waits for the device in a steady step: {', '.join(waits) or 'never'}.",
    )
    columns = ("part, eager", "forward %", "backward %", "peak MiB", "GFLOP")
    harness.table("Where the step goes", columns, cells, notes)


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    encoder = timm_encoder(arguments.model, img_size=arguments.crop)
    if arguments.crop % encoder.patch_size:
        sys.exit(f"step.py: --crop: expected a multiple of {encoder.patch_size}, got {arguments.crop}.")
    if not 1 <= arguments.present <= arguments.classes:
        sys.exit(f"step.py: --present: expected 1..{arguments.classes} (--classes), got {arguments.present}.")
    model = FFR(encoder, arguments.classes, hidden=arguments.hidden).to(arguments.device)
    if arguments.count:
        rows = count_parts(arguments, model)
        show_count(arguments, rows)
        path = harness.save("step-operations", asdict(arguments), rows, device=arguments.device, out=arguments.out)
        print("wrote", path)
        return 0
    waits: list[str] = []

    def measured() -> Iterator[dict[str, Any]]:
        forms = measure_forms(arguments, model)
        show_forms(arguments, forms)
        yield from forms
        parts, found = measure_parts(arguments, model)
        waits.extend(found)
        show_parts(parts, waits)
        yield from parts

    rows = harness.until_stopped(measured())
    settings = {**asdict(arguments), "host_waits": waits if rows.complete else None}
    print("wrote", harness.save("step", settings, rows, device=arguments.device, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
