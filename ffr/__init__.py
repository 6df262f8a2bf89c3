"""Frequency Feature Rectification (FFR, CVPR 2025) for weakly supervised semantic segmentation."""

from ffr import cam, draw, metrics
from ffr.classifier import IntermediateClassifier
from ffr.crf import DenseCRF
from ffr.encoder import Encoder, Features, timm_encoder
from ffr.framework import FFR, FrequencyRectification
from ffr.frequency import Bands, FrequencyMask, split_bands
from ffr.heads import DualSegmentationHead
from ffr.lattice import PermutohedralLattice
from ffr.losses import AffinityLoss, DenseEnergyLoss, SegmentationLoss
from ffr.objective import FFRLoss
from ffr.prototypes import ClassPrototypes, class_prototypes, similarity_maps
from ffr.rectification import RectificationLoss, rectification_loss, select_tokens
from ffr.refine import PixelAdaptiveRefinement, refine_label

__version__ = "0.1.0"
__all__ = [
    "FFR", "AffinityLoss", "Bands", "ClassPrototypes", "DenseCRF", "DenseEnergyLoss", "DualSegmentationHead", "Encoder",
    "FFRLoss", "Features", "FrequencyMask", "FrequencyRectification", "IntermediateClassifier", "PermutohedralLattice",
    "PixelAdaptiveRefinement", "RectificationLoss", "SegmentationLoss", "cam", "class_prototypes", "draw", "metrics",
    "rectification_loss", "refine_label", "select_tokens", "similarity_maps", "split_bands", "timm_encoder",
]  # fmt: skip
