"""Dense CRF by mean field, on torch alone."""

import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from os import PathLike

import numpy as np
import torch
from torch import Tensor, nn

from ffr import _check
from ffr.lattice import PermutohedralLattice, image_features, position_lattice, weighted_rows

BLOCK = 4096  # pixels whose labels are renewed at once on a CPU: their rows stay in its cache
Job = tuple[str | PathLike[str], str | PathLike[str], str | PathLike[str]]


class DenseCRF(nn.Module):
    r"""Fully connected CRF: labels that agree with colour and position; no parameters, no buffers.

    .. math:: Q_i \leftarrow \operatorname{softmax} \Big(\log P_i + c_\text{g} \sum_j k^\text{g}_{ij} Q_j
              + c_\text{b} \sum_j k^\text{b}_{ij} Q_j\Big)

    with a Gaussian kernel :math:`k^\text{g}` on position and a bilateral one :math:`k^\text{b}` on position and colour,
    each symmetrically normalised, and Potts compatibility. Labels are those of the customary compiled implementation,
    which makes the same approximation of the kernels, but for at most 3 in 1.3 million when last measured.

    The result carries no gradient. On a CPU give each image one thread: see `crf_files` for a folder.

    Args:
        gaussian_sxy: standard deviation of the Gaussian kernel, in pixels.
        gaussian_compat: its weight, >= 0; 0 leaves it out.
        bilateral_sxy: standard deviation of the position in the bilateral kernel, in pixels.
        bilateral_srgb: standard deviation of the colour, on the scale 0..255.
        bilateral_compat: its weight, >= 0; 0 leaves it out.
        iterations: mean field steps, >= 0.
        floor: probabilities below count as this much, in [0, 1]; the customary 1e-5.
        prune: labels whose probability exceeds this nowhere are left out and get 0; 0 keeps all.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from ffr import DenseCRF
        >>> image = torch.randint(256, (3, 24, 32), dtype=torch.uint8)
        >>> DenseCRF(iterations=2)(image, torch.rand(21, 24, 32).softmax(0)).shape
        torch.Size([21, 24, 32])

    Reference: Krähenbühl and Koltun, NeurIPS 2011; defaults of the recipe in ``why/paper_to_code``.
    """

    def __init__(
        self,
        gaussian_sxy: float = 1,
        gaussian_compat: float = 1,
        bilateral_sxy: float = 121,
        bilateral_srgb: float = 5,
        bilateral_compat: float = 4,
        iterations: int = 10,
        *,
        floor: float = 1e-5,
        prune: float = 0.0,
    ) -> None:
        super().__init__()
        owner = "DenseCRF"
        _check.positive(owner, gaussian_sxy=gaussian_sxy, bilateral_sxy=bilateral_sxy, bilateral_srgb=bilateral_srgb)
        _check.within(owner, gaussian_compat=gaussian_compat, bilateral_compat=bilateral_compat)
        _check.within(owner, whole=True, iterations=iterations)
        _check.within(owner, floor=floor, prune=prune, at_most=1.0)
        self.gaussian_sxy, self.gaussian_compat = gaussian_sxy, gaussian_compat
        self.bilateral_sxy, self.bilateral_srgb = bilateral_sxy, bilateral_srgb
        self.bilateral_compat = bilateral_compat
        self.iterations, self.floor, self.prune = iterations, floor, prune

    def forward(self, image: Tensor, probs: Tensor) -> Tensor:
        """Refine label probabilities.

        Args:
            image: ``(3, H, W)`` or ``(B, 3, H, W)``, RGB, uint8 or float in [0, 1].
            probs: ``(C, H, W)`` or ``(B, C, H, W)``, >= 0, any number of labels, background included.

        Returns:
            probabilities of the shape, dtype and device of `probs`; they sum to 1 over the labels.

        Raises:
            ValueError: if the shapes do not fit, a number is not finite, a float image is not in [0, 1], or a
                probability is negative.
            TypeError: for a wrong dtype.
        """
        owner = "DenseCRF"
        batch = "B " if getattr(image, "ndim", 0) == 4 else ""
        _check.bind(owner, image=(image, f"{batch}3 H W"))
        sizes = _check.bind(owner, image=(image, f"{batch}3 H W"), probs=(probs, f"{batch}C H W"))
        if not all(sizes.values()):
            raise ValueError(f"{owner}: expected `probs` of at least one label and pixel, got {tuple(probs.shape)}.")
        _check.pixels(owner, image=image)
        _check.floating(owner, probs=probs)
        image, probs = image.detach(), probs.detach()
        ranges = {"image": [0.0, 1.0]}
        for name, tensor in (("image", image), ("probs", probs)):
            if tensor.is_floating_point():
                ranges[name] = low, high = torch.stack(tensor.aminmax()).tolist()  # NaN where there is one
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise ValueError(f"{owner}: expected `{name}` to be finite, got NaN or infinity.")
        # Resizing may leave either range by a rounding.
        low, high = ranges["image"]
        if low < -1e-3 or high > 1.001:
            remedy = "Undo its normalisation first, or divide bytes by 255."
            raise ValueError(f"{owner}: expected `image` as uint8 or float in [0, 1], got {low:g}..{high:g}. {remedy}")
        if (least := ranges["probs"][0]) < -1e-3:
            raise ValueError(f"{owner}: expected `probs` >= 0, got {least:g}. Take logits' softmax, or `from_logits`.")
        with _check.no_autocast(probs):
            if not batch:
                return self._mean_field(image, probs)
            return torch.stack([self._mean_field(*pair) for pair in zip(image, probs, strict=True)])

    def from_logits(self, image: Tensor, logits: Tensor) -> Tensor:
        """The same for logits: their softmax over the labels, as in `forward`."""
        _check.floating("DenseCRF", logits=logits)
        return self.forward(image, logits.softmax(-3))

    def from_label(
        self, image: Tensor, label: Tensor, *, num_classes: int, confidence: float = 0.7, ignore_index: int = 255
    ) -> Tensor:
        """The same for a label map that is only partly to be trusted, such as a thresholded CAM.

        Args:
            image: ``(3, H, W)`` or ``(B, 3, H, W)``, as in `forward`.
            label: integer ``(H, W)`` or ``(B, H, W)``: 0 background, 1..K classes.
            num_classes: K, background not counted.
            confidence: probability of the label, in [0, 1]; the other labels share the rest.
            ignore_index: label of pixels about which nothing is known, none of 0..K.

        Returns:
            float32 ``(K + 1, H, W)`` or ``(B, K + 1, H, W)``.

        Raises:
            ValueError: if the shapes do not fit, or a number is out of range.
            TypeError: for a wrong dtype.
        """
        owner = "DenseCRF.from_label"
        batch = "B " if getattr(image, "ndim", 0) == 4 else ""
        sizes = _check.bind(owner, image=(image, f"{batch}3 H W"))
        _check.bind(owner, sizes=sizes, label=(label, f"{batch}H W"))
        _check.integer(owner, label=label)
        _check.within(owner, at_least=1, whole=True, num_classes=num_classes)
        _check.within(owner, confidence=confidence, at_most=1.0)
        _check.label_names(owner, num_classes=num_classes, ignore_index=ignore_index)
        label = label.long().unsqueeze(-3)
        names = torch.arange(num_classes + 1, device=label.device)[:, None, None]
        known = (label != ignore_index) & (label >= 0) & (label <= num_classes)
        rest = (1 - confidence) / num_classes
        probs = torch.where(label == names, label.new_full((), confidence, dtype=torch.float32), rest)
        return self.forward(image, torch.where(known, probs, 1 / (num_classes + 1)))

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"gaussian_sxy={self.gaussian_sxy}, gaussian_compat={self.gaussian_compat}, "
            f"bilateral_sxy={self.bilateral_sxy}, bilateral_srgb={self.bilateral_srgb}, "
            f"bilateral_compat={self.bilateral_compat}, iterations={self.iterations}"
        )

    def _mean_field(self, image: Tensor, probs: Tensor) -> Tensor:
        dtype = torch.promote_types(probs.dtype, torch.float32)
        kept = None
        if self.prune > 0:  # the best label stays, whatever it is worth
            peak = probs.flatten(1).amax(1)
            kept = (peak > self.prune) | (peak == peak.max())
        chosen = probs if kept is None else probs[kept]
        # The logarithm of 0 would spoil a pixel without any mass.
        unary = chosen.flatten(1).to(dtype).clamp(min=max(self.floor, torch.finfo(dtype).tiny)).t().contiguous().log_()
        # On a CPU torch's softmax is slow for rows of a few labels: powers of two instead. They need no shift, for the
        # messages of a pixel are >= 0 and over its labels sum to little more than the weights of the kernels.
        cpu = image.device.type == "cpu"
        powers = cpu and self.gaussian_compat + self.bilateral_compat <= 20
        unit = 1 / math.log(2) if powers else 1.0
        kernels = self._kernels(image, dtype, unit)
        belief = unary.softmax(1)
        unary = (unary - unary.amax(1, keepdim=True)).mul_(unit)
        ones = unary.new_ones(unary.shape[1], 1)
        block = BLOCK if cpu else len(unary)
        for _ in range(self.iterations if kernels else 0):
            blurred = [lattice.blurred(belief) for lattice, _ in kernels]
            for begin in range(0, len(unary), block):
                rows = slice(begin, begin + block)
                scores = unary[rows]
                for (lattice, weight), values in zip(kernels, blurred, strict=True):
                    scores = weighted_rows(lattice.index[rows], values, weight[rows]).add_(scores)
                if powers:
                    scores.clamp_(max=100).exp2_()
                    torch.div(scores, scores @ ones, out=belief[rows])
                else:
                    torch.softmax(scores, 1, out=belief[rows])
            del blurred, values  # so that their memory serves the next round
        belief = belief.t().reshape(chosen.shape)
        if kept is None:
            return belief.to(probs.dtype).contiguous()
        result = torch.zeros_like(probs)
        result[kept] = belief.to(probs.dtype)
        return result

    def _kernels(self, image: Tensor, dtype: torch.dtype, unit: float) -> list[tuple[PermutohedralLattice, Tensor]]:
        """Each lattice, and what a pixel reads from it times the weight of the kernel in `unit`."""
        kernels = []
        if self.bilateral_compat > 0:
            features = image_features(image, sxy=self.bilateral_sxy, srgb=self.bilateral_srgb).to(dtype)
            lattice = PermutohedralLattice(features)
            kernels.append((lattice, lattice.weight * (unit * self.bilateral_compat)))
        if self.gaussian_compat > 0:
            size = (image.shape[1], image.shape[2])
            lattice = position_lattice(size, sxy=self.gaussian_sxy, dtype=dtype, device=image.device)
            kernels.append((lattice, lattice.weight * (unit * self.gaussian_compat)))
        return kernels


def crf_files(crf: DenseCRF, jobs: Sequence[Job], *, workers: int | None = None) -> Iterator[str]:
    """Refine files on a CPU, in parallel processes of one thread each.

    A script that calls this needs ``if __name__ == "__main__":``, for the processes load it again.

    Args:
        crf: what to apply.
        jobs: ``(image, scores, result)`` paths: an image that Pillow reads; a ``.npy`` of probabilities ``(C, H, W)``,
            C at most 256; the label map to write, a ``.png`` of one byte a pixel. Its folder is made if it is missing.
        workers: processes; by default one per core. 0 works in this process.

    Yields:
        the path of each result once it is written, in the order of completion: a progress bar counts them.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: if a result is no ``.png``. Whatever a job raises comes out of the iteration and names the file; a
            result is there whole or not at all.

    Example:
        >>> from ffr.crf import DenseCRF, crf_files
        >>> jobs = []  # [("horse.jpg", "horse.npy", "horse.png"), ...]
        >>> for path in crf_files(DenseCRF(), jobs):  # rich.progress.track draws a bar
        ...     pass
    """
    _check.within("crf_files", whole=True, workers=0 if workers is None else workers)
    paths = [tuple(str(path) for path in job) for job in jobs]
    for *_, result in paths:
        if not result.lower().endswith(".png"):
            raise ValueError(f"crf_files: expected a result that ends in .png, which keeps labels exact, got {result}.")
    if workers == 0 or not paths:
        for job in paths:
            yield _refine_file(crf, *job)
        return
    # A forked process would inherit the threads of this one, and may hang in them.
    context = multiprocessing.get_context("spawn")
    workers = min(workers or os.cpu_count() or 1, len(paths))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        try:
            for done in as_completed([pool.submit(_refine_file, crf, *job) for job in paths]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """What a process of a pool does first: keep to one thread, and end with its parent, however that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:  # the queue would never end, for every worker holds both its ends
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _refine_file(crf: DenseCRF, image: str, scores: str, result: str) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        said = "crf_files: needs Pillow, which the extra `examples` brings."
        raise ImportError(f"{said} Run pip install '.[examples]' in a checkout of ffr.") from error
    with Image.open(image) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    try:
        label = crf(pixels, torch.from_numpy(np.load(scores))).argmax(0)
    except (ValueError, TypeError) as error:
        raise type(error)(f"crf_files: {scores} for {image}: {error}") from error
    if int(label.max()) > 255:
        raise ValueError(f"crf_files: {scores} gives label {int(label.max())}, and a byte ends at 255.")
    os.makedirs(os.path.dirname(result) or ".", exist_ok=True)
    part = f"{result}.part"
    Image.fromarray(label.to(torch.uint8).numpy()).save(part, format="png")
    os.replace(part, result)
    return result
