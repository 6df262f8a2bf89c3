"""Scores of a network over a data set: any number of protocols in one pass, the same figures on any number of ranks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ffr import FFR, DenseCRF
from ffr.cam import normalize_cam, present_classes, put_classes, scaled_size, take_classes, to_float, to_image
from ffr.metrics import BoundaryIoU, ConfusionMatrix, ThresholdSweep, average_precision
from recipe.data import EvalImages, Example, SceneExamples, loading
from recipe.prepare import pool_of

THRESHOLDS = tuple(i / 100 for i in range(100))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAMS = {"cam": "logits", "cam_inter": "logits_inter"}  # each CAM, and the scores of its classifier
CHOSEN, FIXED = "chosen on the ground truth of these images", "fixed beforehand"


@dataclass(frozen=True)
class Protocol:
    """How a figure is made. Images are always looked at, and scored, at their own size."""

    scales: tuple[float, ...] = (1.0,)
    """of the image: segmentation takes the maximum over them, the CAM the sum"""
    flip: bool = False
    """also look at the mirrored image: segmentation takes the sum of the pair, the CAM the maximum"""
    crf: bool = False
    """refine the segmentation; the CAM is left alone, and then has no figure"""
    labels: Literal["known", "predicted"] = "known"
    """classes that the CAM may show: the image's labels, or those its own classifier gives more than 0.5"""
    threshold: float | None = None
    """background threshold of the CAM; None: the best of 0, 0.01 to 0.99, marked as chosen on ground truth"""
    cam_scales: tuple[float, ...] | None = None
    """scales of the CAM where they are others"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward pass"""
    crf_prune: float = 0.0
    """labels whose probability exceeds this nowhere in the image are left out of the CRF; 0 keeps all"""

    def check(self) -> None:
        """Refuse values that cannot be used."""
        for name, scales in (("scales", self.scales), ("cam-scales", self.cam_scales)):
            if scales is not None and not (scales and all(0 < scale <= 100 for scale in scales)):
                raise ValueError(f"--{name}: expected factors above 0, got {scales}.")
        for name, value in (("threshold", self.threshold), ("crf-prune", self.crf_prune)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name}: expected 0 to 1, got {value}.")


# The network ------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What the network says of B images at one scale, on its grid, float32; axis 0: as they are, then mirrored."""

    size: tuple[int, int]  # of the scaled image
    seg: Tensor  # (1 or 2, B, K + 1, h, w)
    cam: Tensor
    cam_inter: Tensor
    logits: Tensor  # (1 or 2, B, K)
    logits_inter: Tensor


def computing(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass without gradient."""
    # Without autocast's cache: in a training run its casts, made without a graph, would be used by the next step.
    return torch.autocast(device.type, DTYPES[precision], precision != "fp32", cache_enabled=False)


@torch.no_grad()
def look(model: FFR, images: Tensor, scales: Mapping[float, bool], precision: str = "fp32") -> dict[float, View]:
    """Run the network once at each scale.

    Args:
        model: in the mode that it should run in.
        images: (B, 3, H, W), uint8 or float in [0, 1].
        scales: factors of the image's side, and whether to look at the mirrored image too.
        precision: of the forward pass.
    """
    pixels, views = to_float(images), {}
    height, width = images.shape[2:]
    with computing(images.device, precision):
        for scale, flip in scales.items():
            size = scaled_size((height, width), scale)
            scaled = pixels
            if size != (height, width):
                scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
            final, intermediate, mask = model.encode(torch.cat([scaled, scaled.flip(3)]) if flip else scaled)
            said = (
                model.head(final),
                model.classifier.cam(final),
                model.intermediate_classifier.cam(intermediate),
                model.classifier(final, mask=mask),
                model.intermediate_classifier(intermediate, mask=mask),
            )
            views[scale] = View(size, *(part.float().unflatten(0, (-1, len(images))) for part in said))
    return views


def segment(views: Mapping[float, View], protocol: Protocol, size: tuple[int, int], patch_size: int) -> Tensor:
    """Segmentation scores (B, K + 1, H, W): the sum of a flip pair, then the maximum over scales."""
    best = None
    for view in (views[scale] for scale in protocol.scales):
        pair = _enlarged(view.seg, view, protocol.flip, size, patch_size)
        scores = pair[0] + pair[1].flip(3) if protocol.flip else pair[0]
        best = scores if best is None else torch.maximum(best, scores)
    return best


def activate(
    views: Mapping[float, View],
    name: str,
    protocol: Protocol,
    size: tuple[int, int],
    patch_size: int,
    labels: Tensor,
) -> Tensor:
    """The CAM of that name, (B, K, H, W) in [0, 1], combined as `ffr.cam.multi_scale_cam` does."""
    ids, present = present_classes(labels, int((labels > 0.5).sum(1).max()))  # the others are never enlarged
    total: Tensor | float = 0.0
    for view in (views[scale] for scale in protocol.cam_scales or protocol.scales):
        raw = torch.stack([take_classes(maps, ids) for maps in getattr(view, name)])
        pair = _enlarged(raw, view, protocol.flip, size, patch_size)
        total = total + (torch.maximum(pair[0], pair[1].flip(3)) if protocol.flip else pair[0]).relu()
    return put_classes(normalize_cam(total, labels=present), ids, labels.shape[1])


def classify(views: Mapping[float, View], name: str, protocol: Protocol) -> Tensor:
    """Logits (B, K) of the classifier that the CAM of that name belongs to: their mean over the same views."""
    scales = protocol.cam_scales or protocol.scales
    return torch.cat([getattr(views[scale], CAMS[name])[: 1 + protocol.flip] for scale in scales]).mean(0)


def _enlarged(maps: Tensor, view: View, flip: bool, size: tuple[int, int], patch_size: int) -> Tensor:
    """Maps (V, B, C, h, w) at the size of the image; padding is cut off before, where the grid has some."""
    maps = maps[: 1 + flip].flatten(0, 1)
    if any(side % patch_size for side in view.size):
        maps = to_image(maps, view.size, patch_size)
    if maps.shape[2:] != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.unflatten(0, (1 + flip, -1))


def scales_of(protocols: Sequence[Protocol]) -> dict[float, bool]:
    """All scales that the protocols look at, and whether one of them wants the mirrored image there."""
    scales: dict[float, bool] = {}
    for protocol in protocols:
        for scale in (*protocol.scales, *(protocol.cam_scales or ())):
            scales[scale] = scales.get(scale, False) or protocol.flip
    return scales


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# The CRF ----------------------------------------------------------------------------------------------------------


@contextmanager
def refining(
    workers: int, prune: float = 0.0, *, probabilities: bool = False
) -> Iterator[Callable[[Tensor, Tensor], "Future[Any]"]]:
    """The dense CRF of the recipe in so many processes of one thread each; 0: in this one, before it returns.

    Yields a function of an image, uint8 (3, H, W), and probabilities (C, H, W), both on the CPU. It gives the refined
    label map in the future, a uint8 array (H, W); or with `probabilities` those, (C, H, W).
    """
    refine = partial(_refine, DenseCRF(prune=prune), probabilities)
    if workers == 0:
        yield lambda image, probs: _finished(refine(image.numpy(), probs.numpy()))
        return
    with pool_of(workers) as pool:
        try:
            yield lambda image, probs: pool.submit(refine, image.numpy(), probs.numpy())
        finally:
            pool.shutdown(cancel_futures=True)


def queue_for(workers: int) -> int:
    """Images that may wait for so many workers: each holds its probabilities, 100 MB in COCO."""
    return workers + 2 if workers else 0


def _refine(crf: DenseCRF, probabilities: bool, image: np.ndarray, probs: np.ndarray) -> np.ndarray:
    refined = crf(torch.from_numpy(image), torch.from_numpy(probs))
    return (refined if probabilities else refined.argmax(0).to(torch.uint8)).numpy()


def _finished(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future


# The scores -------------------------------------------------------------------------------------------------------


class _Row:
    """What one protocol has counted."""

    def __init__(self, protocol: Protocol, images: int, classes: int) -> None:
        self.protocol = protocol
        self.matrix, self.boundary = ConfusionMatrix(classes + 1), BoundaryIoU(classes + 1)
        fixed = () if protocol.threshold is None else (protocol.threshold,)
        names = () if protocol.crf else tuple(CAMS)
        self.sweeps = {name: ThresholdSweep(classes + 1, sorted({*THRESHOLDS, *fixed})) for name in names}
        self.logits = {name: torch.zeros(images, classes, dtype=torch.float64) for name in names}

    def see(self, label: Tensor, mask: Tensor) -> None:
        """Count segmentation, integers (B, H, W) or (H, W)."""
        self.matrix.update(label, mask)
        self.boundary.update(label, mask)

    def see_cams(self, group: "_Group", views: Mapping[float, View], patch_size: int) -> None:
        """Count CAMs and their classifiers."""
        for name, sweep in self.sweeps.items():
            said = classify(views, name, self.protocol)
            self.logits[name][group.indices] = said.double().cpu()
            labels = group.labels if self.protocol.labels == "known" else (said > 0).float()
            if group.masks is not None and labels is not None:
                sweep.update(activate(views, name, self.protocol, group.size, patch_size, labels), group.masks)

    def counters(self) -> list[Any]:
        return [self.matrix, self.boundary, *self.sweeps.values()]

    def result(self, labels: Tensor, known: Tensor) -> dict[str, Any]:
        """Figures; `labels` (images, K), and for which images they are known."""
        figures = {"seg_miou": _percent(self.matrix.miou()), "boundary_iou": _percent(self.boundary.miou())}
        iou = {"seg": _percent(self.matrix.iou()), "boundary": _percent(self.boundary.iou())}
        thresholds, best, precision = {}, {}, {}
        for name in CAMS:
            miou, mean = f"{name}_miou", "classification_map" + name.removeprefix("cam")
            figures |= {miou: None, mean: None}
            if name not in self.sweeps:
                continue
            if bool(known.any()):
                each = average_precision(self.logits[name][known], labels[known])
                figures[mean], precision[name] = _percent(each.nanmean()), _percent(each)
            sweep, fixed = self.sweeps[name], self.protocol.threshold
            curve = sweep.miou()
            if bool(curve.isnan().any()):  # nothing was counted
                continue
            chosen, highest = sweep.best()
            value, source = (chosen, CHOSEN) if fixed is None else (fixed, FIXED)
            index = sweep.thresholds.index(value)
            figures[miou], iou[name] = _percent(curve[index]), _percent(sweep.confusion(index).iou())
            thresholds[name] = {"value": value, "source": source}
            best[name] = {"value": chosen, "miou": _percent(highest), "source": CHOSEN}
        return {
            **figures,
            "thresholds": thresholds,
            "best_thresholds": best,
            "iou": iou,
            "average_precision": precision,
        }


class _Group(NamedTuple):
    """Images of one size, of all of which the same is known."""

    indices: list[int]
    names: list[str]
    images: Tensor
    masks: Tensor | None
    labels: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]


def _groups(run: Sequence[tuple[int, Example]], device: str | torch.device) -> Iterator[_Group]:
    alike: dict[Any, list[tuple[int, Example]]] = {}
    for index, example in run:
        key = example.image.shape, example.mask is None, example.labels is None
        alike.setdefault(key, []).append((index, example))
    for members in alike.values():
        indices, examples = zip(*members, strict=True)
        names, images, masks, labels = zip(*examples, strict=True)
        yield _Group(
            list(indices),
            list(names),
            torch.stack(images).to(device),
            None if masks[0] is None else torch.stack(masks).to(device).long(),
            None if labels[0] is None else torch.stack(labels).to(device),
        )


class _Read(Dataset[tuple[int, Example | str]]):
    """An image's number with the image, or with what is wrong with its files."""

    def __init__(self, dataset: EvalImages | SceneExamples) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Example | str]:
        try:
            return index, self.dataset[index]
        except (ValueError, OSError) as error:
            return index, str(error)


@torch.no_grad()
def evaluate_all(
    model: FFR,
    dataset: EvalImages | SceneExamples,
    protocols: Sequence[Protocol],
    *,
    device: str | torch.device,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    limit: int | None = None,
    workers: int = 0,
    batch_size: int = 8,
    crf_workers: int = 0,
    report: Callable[[int], None] | None = None,
    save: Callable[[str, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Score a network by several protocols in one pass; keeps train or eval mode.

    Runs of `batch_size` images go to the ranks in turn, and images of one size in a run go through the network
    together: what is computed does not depend on the number of ranks. Counts are integers, and the scores of a
    classifier are gathered, so neither do the figures, to the last bit.

    An image whose files cannot be used is left out, and named in the result.

    Args:
        model: on `device`.
        dataset: what to score on; an image may lack its mask or its labels.
        protocols: one result each; what they share is computed once.
        device: where to compute.
        rank: of this process.
        world_size: how many processes there are.
        reduce: sums a tensor on `device` over them, the same on all.
        limit: only so many images, the first ones.
        workers: processes that read images.
        batch_size: how many images may go through the network together.
        crf_workers: processes for the CRF, an image each; 0: this one.
        report: told how many images of all are done, about.
        save: given name and label map, uint8 (H, W), of every image of this rank, by the last protocol.

    Returns:
        for each protocol figures in percent, None where nothing was scored: ``seg_miou``, ``boundary_iou``,
        ``cam_miou``, ``cam_inter_miou``, ``classification_map``, ``classification_map_inter``; ``iou`` of each label
        and ``average_precision`` of each class, as lists; ``thresholds`` of the CAMs and their source, and
        ``best_thresholds``; ``protocol``; ``images``, how many each figure is of; ``left_out``, name to reason.

    Raises:
        ValueError: if labels do not fit the network, or no image can be used.
    """
    for protocol in protocols:
        protocol.check()
    if len({(protocol.precision, protocol.crf_prune) for protocol in protocols}) != 1:
        raise ValueError("evaluate_all: expected protocols of one precision and one crf_prune.")
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows = [_Row(protocol, count, model.num_classes) for protocol in protocols]
    scales, patch = scales_of(protocols), model.encoder.patch_size
    broken, masked, known = torch.zeros(3, count, dtype=torch.int64)
    labels = torch.zeros(count, model.num_classes, dtype=torch.float64)
    problems: dict[int, str] = {}
    waiting: deque[tuple[Future[Any], _Row, str, Tensor | None]] = deque()

    def done(row: _Row, name: str, label: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            row.see(label, mask)
        if save is not None and row is rows[-1]:
            save(name, label)

    def collect(most: int) -> None:
        """Take what the CRF has made, until at most so many images are left to it."""
        while len(waiting) > most:
            future, row, name, mask = waiting.popleft()
            done(row, name, torch.from_numpy(future.result()).to(device), mask)  # where the mask is

    def score(group: _Group, refine: Any) -> None:
        views = look(model, group.images, scales, protocols[0].precision)
        made: dict[Any, Tensor] = {}
        for row in rows:
            way = row.protocol.scales, row.protocol.flip
            if way not in made:
                made[way] = segment(views, row.protocol, group.size, patch)
            row.see_cams(group, views, patch)
            if not row.protocol.crf:
                for i, label in enumerate(made[way].max(1).indices.to(torch.uint8)):
                    done(row, group.names[i], label, None if group.masks is None else group.masks[i])
                continue
            images, probs = group.images.cpu(), made[way].softmax(1).cpu()
            for i, name in enumerate(group.names):
                mask = None if group.masks is None else group.masks[i]
                waiting.append((refine(images[i], probs[i]), row, name, mask))
                collect(queue_for(crf_workers))

    runs = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    reading = loading(_Read(dataset), batch_sampler=runs[rank::world_size], num_workers=workers, collate_fn=list)
    crf = refining(crf_workers, protocols[0].crf_prune) if any(p.crf for p in protocols) else nullcontext()
    with evaluating(model), crf as refine, reading as batches:
        for turn, run in enumerate(batches):
            good = []
            for index, example in run:
                if isinstance(example, str):
                    broken[index], problems[index] = 1, example
                    continue
                masked[index] = example.mask is not None
                known[index] = example.labels is not None
                if example.labels is not None:
                    labels[index] = example.labels.double()
                if save is not None or masked[index] or known[index]:
                    good.append((index, example))
            for group in _groups(good, device):
                score(group, refine)
            if report is not None:
                report(min(count, (turn + 1) * world_size * batch_size))
        collect(0)

    counters = [counter for row in rows for counter in row.counters()]
    counts = [broken, masked, known, *(counter.counts for counter in counters)]
    broken, masked, known, *counts = _summed(counts, reduce, device)
    for counter, total in zip(counters, counts, strict=True):
        counter.counts = total
    names = [(row, name) for row in rows for name in row.logits]
    labels, *tables = _summed([labels, *(row.logits[name] for row, name in names)], reduce, device)
    for (row, name), table in zip(names, tables, strict=True):
        row.logits[name] = table
    problems = _gathered(problems, broken.nonzero().flatten().tolist(), reduce, device)
    if len(problems) == count:
        raise ValueError(f"no image can be used; the first: {next(iter(problems.values()), 'there is none')}")
    both = int((masked & known).sum())
    results = []
    for row in rows:
        cams = None if row.protocol.crf else both if row.protocol.labels == "known" else int(masked.sum())
        images = {
            "listed": len(dataset),
            "looked_at": count - len(problems),
            "segmentation": int(masked.sum()),
            "cam": cams,
            "classification": None if row.protocol.crf else int(known.sum()),
        }
        results.append(
            {
                **row.result(labels, known > 0),
                "protocol": {**asdict(row.protocol), "size": "each image's own", "batch_size": batch_size},
                "images": images,
                "left_out": {dataset.name(index): problem for index, problem in problems.items()},
            }
        )
    return results


def evaluate(model: FFR, dataset: EvalImages | SceneExamples, protocol: Protocol, **how: Any) -> dict[str, Any]:
    """Score a network by one protocol: `evaluate_all`, whose arguments it takes, for one."""
    return evaluate_all(model, dataset, [protocol], **how)[0]


def _summed(
    parts: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] | None, device: str | torch.device
) -> list[Tensor]:
    """Tensors of one dtype, summed over the ranks in one go; on the CPU."""
    flat = torch.cat([part.flatten().to(device) for part in parts])
    total = (flat if reduce is None else reduce(flat)).cpu()
    pieces = total.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _gathered(
    texts: Mapping[int, str], places: Sequence[int], reduce: Callable[[Tensor], Tensor] | None, device: Any
) -> dict[int, str]:
    """The texts of all ranks at `places`, cut off after 500 bytes: their sum, where all but one rank have zeros."""
    table = torch.zeros(len(places), 500, dtype=torch.int64)
    for row, place in zip(table, places, strict=True):
        said = texts.get(place, "").encode()[:500]
        row[: len(said)] = torch.tensor(list(said), dtype=torch.int64)
    (table,) = _summed([table], reduce, device)
    found = (bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in table)
    return dict(zip(places, found, strict=True))


def _percent(value: Tensor | float) -> Any:
    """In percent, a number or a list of them; None for NaN, which JSON does not know."""
    if isinstance(value, Tensor) and value.ndim:
        return [_percent(each) for each in value.tolist()]
    number = 100 * float(value)
    return None if math.isnan(number) else number
