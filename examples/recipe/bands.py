"""How much of the features lies in the high band, through the depth of the encoder: the premise of the method."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ffr import FFR, split_bands
from ffr.encoder import TimmEncoder
from recipe.evaluation import evaluating


@torch.no_grad()
def features_by_depth(model: FFR, images: Tensor) -> dict[str, Tensor]:
    """Feature maps (B, D, h, w) in order of depth, of one forward in eval mode; every module goes back to its own mode.

    With a `TimmEncoder`: "block 1", "block 2", ..., not normed, and "final" behind the last norm; prefix tokens are
    dropped. An encoder of one's own shows no blocks, so then only the two maps that it gives: "intermediate" and
    "final". Padding tokens, where it has some, count like any other.

    Args:
        model: whose encoder is looked at. Divided weights (FSDP) must be gathered before.
        images: (B, 3, H, W), RGB, uint8 or float in [0, 1].
    """
    encoder = model.encoder
    with evaluating(model):
        if isinstance(encoder, TimmEncoder):
            final, blocks = encoder.blocks(images)
            return {**{f"block {n}": maps for n, maps in enumerate(blocks, 1)}, "final": final}
        features = encoder(images)
        return {"intermediate": features.intermediate, "final": features.final}


def band_energies(features: Tensor, mu: float) -> Tensor:
    """Energy of the low and of the high band, (2,), float64, on the CPU; add them up over batches and ranks.

    The mean of every channel of every image belongs to neither: it says what there is, and not where.

    Args:
        features: (B, D, h, w), any floating dtype.
        mu: cut-off in cycles per token, as `ffr.split_bands`.
    """
    varying = features.float()
    varying = varying - varying.mean((2, 3), keepdim=True)
    return torch.stack([band.square().sum() for band in split_bands(varying, mu)]).cpu().double()


def high_share(energies: Tensor) -> float:
    """Share of the high band, 0 to 1, in what `band_energies` gave; 0 for features that vary nowhere."""
    total = float(energies.sum())
    return float(energies[1]) / total if total > 0 else 0.0


def high_band_shares(model: FFR, images: Tensor, mu: float | None = None) -> dict[str, float]:
    """Share of the high band in the energy of the features, without their mean, for every depth.

    Energies are summed over channels and images before they are divided. White noise has a share of the number of
    high frequencies over that of all but zero: .33 for a 28 x 28 grid at mu 0.4.

    Args:
        model: see `features_by_depth`, which also names the depths.
        images: (B, 3, H, W), RGB, uint8 or float in [0, 1].
        mu: cut-off in cycles per token; None: the model's.
    """
    cut = model.frequency.mu if mu is None else mu
    return {name: high_share(band_energies(maps, cut)) for name, maps in features_by_depth(model, images).items()}


def amplitudes(features: Tensor) -> Tensor:
    """Squared amplitudes by frequency: (3, m), float64, on the CPU.

    Its rows: the frequency in cycles per token, ascending from 0; the sum of the squared amplitudes there, each a mean
    over channels; how many they are. The frequency of a wave is the higher of its two along the axes, for the mask of
    the method is a box. Add up the last two rows over images of one grid.

    Args:
        features: (B, D, h, w), any floating dtype.
    """
    height, width = features.shape[2:]
    energy = (torch.fft.fft2(features.float()).abs() / (height * width)).square().mean(1).sum(0).cpu().double()
    along = [torch.fft.fftfreq(size, dtype=torch.float64).abs() for size in (height, width)]
    frequency, place = torch.maximum(along[0][:, None], along[1]).flatten().unique(return_inverse=True)
    energy = torch.zeros_like(frequency).index_add(0, place, energy.flatten())
    return torch.stack([frequency, energy, len(features) * place.bincount()])


def relative_log_amplitude(by_grid: Mapping[tuple[int, int], Tensor], bins: int) -> list[float | None]:
    """log10 of the root mean square amplitude in every column over that of the mean; None where there is none.

    Column 0 is the mean alone, column j frequencies in ((j - 1), j] / (2 bins) cycles per token. The same noise spreads
    over more waves in a larger grid: grids are compared as if each had their average number of tokens.

    Args:
        by_grid: what `amplitudes` gave, for every grid (h, w).
        bins: about half the tokens a side of the smallest grid, lest columns stay empty.

    Reference: Park and Kim, "How do vision transformers work?", ICLR 2022, Fig. 2, there along the diagonal alone.
    """
    images = sum(float(found[2, 0]) for found in by_grid.values())
    average = sum(h * w * float(found[2, 0]) for (h, w), found in by_grid.items()) / images
    sums = torch.zeros(2, bins + 1, dtype=torch.float64)
    for (h, w), (frequency, energy, count) in by_grid.items():
        energy = torch.where(frequency > 0, energy * (h * w / average), energy)
        column = (frequency * 2 * bins - 1e-9).ceil().long()
        sums.index_add_(1, column, torch.stack([energy, count]))
    mean = sums[0] / sums[1]
    logs = (mean / mean[0]).log10() / 2
    return [float(value) if value.isfinite() else None for value in logs]
