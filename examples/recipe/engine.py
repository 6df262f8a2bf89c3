"""What every training run needs: optimiser, schedule, one loop, one evaluation."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from ffr import FFR, FFRLoss
from ffr.cam import cam_to_label, normalize_cam, to_image
from ffr.metrics import BoundaryIoU, ConfusionMatrix, ThresholdSweep, average_precision
from ffr.objective import Terms
from recipe.data import SceneImages
from recipe.scenes import Scenes


class Diverged(RuntimeError):
    """A loss term is no longer finite; the message names it and the step."""


def optimizer(model: FFR, lr: float, *, weight_decay: float, head_scale: float) -> torch.optim.AdamW:
    """AdamW as in the lineage: no decay on biases, norms and position embedding; classifiers and heads learn faster."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and "pos_embed" not in name
        groups.setdefault((decays, name.startswith("encoder.")), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if decays else 0.0,
                "scale": 1.0 if body else head_scale,
            }
            for (decays, body), parameters in groups.items()
        ],
        lr=lr,
    )


def learning_rate(step: int, steps: int, warmup: int, peak: float, *, power: float = 0.9) -> float:
    """Linear warm-up from a millionth of `peak`, then polynomial decay to 0, counted from step 0."""
    if step < warmup:
        return peak * (1e-6 + (1 - 1e-6) * step / warmup)
    return peak * (1 - step / steps) ** power


def train(
    objective: FFRLoss,
    scenes: Scenes,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str,
    weight_decay: float = 0.05,
    head_scale: float = 4.0,
    warmup: float = 0.1,
    clip: float = 1.0,
    log_every: int = 10,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> float:
    """Train in place and return images per second, measured over the whole loop, augmentation included."""
    model = objective.model
    adamw = optimizer(model, lr, weight_decay=weight_decay, head_scale=head_scale)
    objective.train()
    begin = time.perf_counter()
    samples = SceneImages(scenes, batch_size, seed)
    for step in range(steps):
        images, labels = samples.batch(step)
        now = learning_rate(step, steps, math.ceil(warmup * steps), lr)
        for group in adamw.param_groups:
            group["lr"] = now * group["scale"]
        present = max(1, int(labels.sum(1).max()))  # still on the CPU: costs no synchronisation
        terms = objective(images.to(device), labels.to(device), step=step, max_present=present)
        adamw.zero_grad(set_to_none=True)
        terms.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        adamw.step()
        if step % log_every == 0 or step == steps - 1:
            values = _finite(terms, step)
            if report is not None:
                report(step + 1, values)
    if device != "cpu":
        torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - begin)


def _finite(terms: Terms, step: int) -> dict[str, float]:
    values = {name: float(value.detach()) for name, value in zip(terms._fields, terms, strict=True)}
    for name in (*terms._fields[1:], "total"):
        if not math.isfinite(values[name]):
            raise Diverged(f"step {step}: the loss term `{name}` is {values[name]}. Lower the learning rate.")
    return values


@torch.no_grad()
def evaluate(
    model: FFR, scenes: Scenes, *, device: str, threshold: float | None = None, batch_size: int = 50
) -> dict[str, float]:
    """Score a model on scenes: single scale, no CRF, at the image's own size.

    Args:
        threshold: background threshold of the CAM, chosen elsewhere; None chooses it here, which is for validation
            only, and returns it as ``threshold``.

    Returns:
        classification_map (final classifier), cam_miou (image labels known), seg_miou, boundary_iou in percent.
    """
    classes = scenes.labels.shape[1]
    sweep, cams = ThresholdSweep(classes + 1), ConfusionMatrix(classes + 1)
    matrix, boundary = ConfusionMatrix(classes + 1), BoundaryIoU(classes + 1)
    scores = []
    was_training = model.training
    model.eval()
    for images, masks, labels in zip(*(part.split(batch_size) for part in scenes), strict=True):
        images, masks, labels = images.to(device), masks.to(device).long(), labels.to(device)
        size = (images.shape[2], images.shape[3])
        patch = model.encoder.patch_size
        out = model.outputs(images)
        cam = normalize_cam(to_image(out.cam, size, patch), labels=labels)
        if threshold is None:
            sweep.update(cam, masks)
        else:
            cams.update(cam_to_label(cam, background=threshold), masks)
        prediction = to_image(out.seg, size, patch).argmax(1)
        matrix.update(prediction, masks)
        boundary.update(prediction, masks)
        scores.append(out.logits)
    model.train(was_training)
    best = sweep.best() if threshold is None else (threshold, cams.miou())
    return {
        "classification_map": 100 * float(average_precision(torch.cat(scores), scenes.labels.to(device)).nanmean()),
        "cam_miou": 100 * best[1],
        "seg_miou": 100 * matrix.miou(),
        "boundary_iou": 100 * boundary.miou(),
        "threshold": best[0],
    }
