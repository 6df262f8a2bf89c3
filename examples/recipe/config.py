"""All settings of a training run: one frozen dataclass, every field a flag; a preset for each kind of data."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ffr import FFR, FFRLoss, PixelAdaptiveRefinement
from ffr.prototypes import ClassPrototypes
from ffr.rectification import RectificationLoss

SMALL = "small"  # `model`: the network of the quickstart


@dataclass(frozen=True)
class Config:
    """One training run. What the method leaves open is a field, and every run records what it used."""

    # Data
    data: Path | None = None
    """prepared folder with train.json and val.json (see prepare_*.py); without one, the embedded scenes"""
    out: Path = Path("runs/train")
    """folder for checkpoints, weights and logs"""
    resume: bool = False
    """go on from the newest checkpoint in --out"""
    train_split: str = "train"
    """list to train on; its image labels are all that is used"""
    val_split: str | None = "val"
    """list to score on, which needs masks; None: no validation"""
    crop: int = 448
    """side of a training image in pixels; of the embedded scenes, their size"""
    crop_scale: tuple[float, float] = (0.32, 1.0)
    """area of a crop as a share of the image; the embedded scenes are shifted instead"""
    flip: float = 0.5
    """how often a training image is mirrored"""
    jitter: float = 0.5
    """how often its colours change. There is no blur: it would weaken the high band"""
    scenes: tuple[int, int] = (5000, 200)
    """how many embedded scenes to train on, and to score on"""
    workers: int = 4
    """processes that load images, for each rank; 0: none, in the main process"""

    # Network
    model: str = "vit_base_patch16_224"
    """name of a plain ViT in timm; small: the network of the quickstart"""
    pretrained: bool = True
    """download timm's weights"""
    checkpoint: Path | None = None
    """weights of the encoder in a local file instead, .safetensors or .pth"""
    intermediate: int = -3
    """block of the intermediate features; -3 is the third from the end"""
    hidden: int = 512
    """channels of the segmentation heads"""
    dilation: int = 5
    """of the segmentation heads, in tokens"""

    # Method
    mu: float = 0.4
    """cut-off of the frequency mask, in cycles per token; 0.5 keeps everything"""
    seed_threshold: float = 0.7
    """share of a CAM's peak from which a token counts for the prototype of its class"""
    gap: float = 0.05
    """change of a token's similarity to a prototype from which it is selected"""
    min_fraction: float = 0.05
    """floor of the rectification's denominator, as a share of all (token, class) pairs"""

    # Pseudo labels
    high: float = 0.7
    """CAM above which a pixel is foreground"""
    low: float = 0.25
    """CAM below which a pixel is background"""
    affinity_high: float = 0.7
    """the same for the affinity loss, whose labels are not refined"""
    affinity_low: float = 0.25
    """the same for the affinity loss, whose labels are not refined"""
    cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    """scales of the CAM that the labels come from"""
    cam_flip: bool = True
    """whether that CAM looks at the mirrored image too"""
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """neighbours of the refinement, in pixels at half resolution"""
    cam_threshold: float = 0.5
    """background threshold at which CAMs are scored; fixed beforehand, never chosen on masks"""

    # Objective
    w_seg: float = 0.1
    """weight of the segmentation losses"""
    lambda_h: float = 2.0
    """weight of the high-band head inside them; 0 is the method without it"""
    lambda_l: float = 1.0
    """weight of the rectification; 0 is the method without it"""
    w_aff: float = 0.2
    """weight of the affinity loss"""
    w_reg: float = 0.05
    """weight of the dense energy"""
    seg_start: int = 2000
    """step from which segmentation, rectification and energy count"""
    affinity_start: int = 0
    """step from which the affinity loss counts"""

    # Optimisation
    steps: int = 20_000
    """training steps"""
    batch_size: int = 4
    """images a step, of all ranks together"""
    accumulate: int = 1
    """parts that a step is computed in; what is normalised over a batch is then normalised over a part"""
    lr: float = 6e-5
    """peak learning rate of the encoder"""
    head_scale: float = 10.0
    """classifiers and heads learn so many times faster"""
    warmup: int = 2000
    """steps of linear warm-up from a millionth of `lr`"""
    power: float = 0.9
    """of the polynomial decay, which is counted from step 0"""
    weight_decay: float = 0.01
    """none on biases, norms and the position embedding"""
    clip: float = 0.0
    """largest norm of the gradient; 0: no bound"""
    seed: int = 0
    """decides the first weights, the scenes, the order of the images and their augmentation"""

    # Machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. Several: torchrun --nproc-per-node 8 examples/train.py ..."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward pass; weights are fp32. With fp32 on a GPU, torch uses TF32 in convolutions but not in products"""
    compile: bool = False
    """torch.compile the encoder, on a CPU the refinement too: minutes at the start, then faster"""
    fsdp: bool = False
    """divide weights and optimiser over the ranks (FSDP) instead of copying them (DDP)"""
    grad_checkpointing: bool = False
    """recompute the blocks in the backward pass: less memory, about a third more time"""

    # Reports
    log_every: int = 20
    """steps between two log lines; only then does the host wait for the device"""
    val_every: int = 2000
    """steps between two validations; 0: only after the last step"""
    val_images: int | None = None
    """score so many images only, the first ones; None: all. The record says how many"""
    save_every: int = 1000
    """steps between two checkpoints, of which the newest two are kept; 0: only after the last step"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their flag."""
        for name in ("steps", "batch_size", "accumulate", "crop", "hidden", "dilation", "log_every"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("workers", "seed", "val_every", "save_every", "seg_start", "affinity_start", "warmup"):
            _expect(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("w_seg", "lambda_h", "lambda_l", "w_aff", "w_reg", "weight_decay", "clip", "power"):
            _expect(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        _expect("seed", self.seed, self.seed < 2**32, "less than 2 ** 32")
        for name in ("lr", "head_scale"):
            _expect(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("flip", "jitter", "seed_threshold", "min_fraction", "high", "affinity_high", "cam_threshold"):
            _expect(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "0 to 1")
        _expect("low", self.low, 0 <= self.low <= self.high, f"0 to --high, {self.high}")
        _expect("affinity_low", self.affinity_low, 0 <= self.affinity_low <= self.affinity_high, "0 to --affinity-high")
        _expect("mu", self.mu, 0 <= self.mu <= 0.5, "0 to 0.5")
        _expect("gap", self.gap, 0 <= self.gap <= 2, "0 to 2")
        _expect(
            "crop_scale", self.crop_scale, 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < low <= high <= 1"
        )
        scales = self.cam_scales
        _expect("cam_scales", scales, bool(scales) and all(0 < scale <= 100 for scale in scales), "factors above 0")
        spread = self.dilations
        _expect("dilations", spread, bool(spread) and all(step >= 1 for step in spread), "pixels of at least 1")
        _expect("scenes", self.scenes, min(self.scenes) >= 1, "at least 1 each")
        _expect("val_images", self.val_images, self.val_images is None or self.val_images >= 1, "at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--batch-size: expected a multiple of --accumulate {self.accumulate}: {self.batch_size}.")
        if self.model == SMALL and self.pretrained:
            raise ValueError("--pretrained: nobody has weights of the small network. Add --no-pretrained.")
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("--checkpoint: the encoder's weights come from one place. Add --no-pretrained.")
        if self.fsdp and self.precision == "fp16":
            raise ValueError("--fsdp: loss scaling over divided weights is not supported. Use --precision bf16.")

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The reverse of `to_json`; what is missing takes its default, what is unknown is refused."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"the settings name {', '.join(unknown)}, which this version of the recipe does not have")
        paths = {"data", "out", "checkpoint"}
        return cls(
            **{
                key: Path(value)
                if key in paths and value is not None
                else tuple(value)
                if isinstance(value, list)
                else value
                for key, value in values.items()
            }
        )

    def to_text(self) -> str:
        """One JSON line."""
        return json.dumps(self.to_json())


def _expect(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {value}.")


VOC = Config(data=Path("data/voc"), out=Path("runs/voc"))
# From scratch on small scenes the CAMs are peaked, so the thresholds of the labels are far below the recipe's. They
# were chosen on validation scenes, on the classifier before any other loss counts, for FFR and its baseline alike.
SCENES = Config(
    out=Path("runs/scenes"),
    crop=64,
    workers=0,
    model=SMALL,
    pretrained=False,
    hidden=64,
    dilation=2,
    high=0.1,
    low=0.02,
    cam_scales=(1.0,),
    cam_flip=False,
    dilations=(1, 2, 4, 8),
    cam_threshold=0.1,
    w_seg=0.3,
    w_reg=0.0,
    seg_start=560,
    affinity_start=560,
    steps=1400,
    batch_size=16,
    lr=2e-3,
    head_scale=4.0,
    warmup=140,
    weight_decay=0.05,
    clip=1.0,
    val_every=0,
    save_every=200,
)
PRESETS = {
    "voc": ("PASCAL VOC 2012, the paper's recipe", VOC),
    "coco": (
        "MS COCO 2014, the paper's recipe",
        replace(
            VOC, data=Path("data/coco"), out=Path("runs/coco"), steps=80_000, batch_size=8, seg_start=8000,
            affinity_start=12_000, high=0.65, affinity_high=0.65, cam_threshold=0.45, val_every=8000, val_images=5000,
        ),
    ),
    "folder": (
        "a folder of your own, with VOC's recipe",
        replace(VOC, data=Path("data/folder"), out=Path("runs/folder")),
    ),
    "scenes": ("embedded scenes with the small network, minutes on a CPU", SCENES),
}  # fmt: skip


def on_cpu(device: str, precision: str) -> bool:
    """Whether to compute on the CPU; a ValueError names the flag that this machine cannot follow."""
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("--device: torch sees no GPU here. Use --device cpu, or install torch for your GPU.")
    if device == "auto" and not gpu and precision != "fp32":
        raise ValueError(
            f"--precision: {precision} is for a GPU, and torch sees none here. Use --precision fp32, or --device cpu "
            "to compute in bf16 all the same."
        )
    cpu = device == "cpu" or not gpu
    if cpu and precision == "fp16":
        raise ValueError("--precision: fp16 needs a GPU. Use bf16 or fp32.")
    return cpu


def build_objective(config: Config, model: FFR, **ranks: Any) -> FFRLoss:
    """The objective of a run around its network; `ranks` are `all_reduce` and `world_size`."""
    return FFRLoss(
        model,
        start=config.seg_start,
        affinity_start=config.affinity_start,
        high=config.high,
        low=config.low,
        affinity_high=config.affinity_high,
        affinity_low=config.affinity_low,
        scales=config.cam_scales,
        flip=config.cam_flip,
        w_seg=config.w_seg,
        lambda_h=config.lambda_h,
        lambda_l=config.lambda_l,
        w_aff=config.w_aff,
        w_reg=config.w_reg,
        prototypes=ClassPrototypes(config.seed_threshold),
        rectification=RectificationLoss(config.gap, config.min_fraction),
        refinement=PixelAdaptiveRefinement(config.dilations),
        **ranks,
    )
