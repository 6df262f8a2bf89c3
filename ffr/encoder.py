"""Images to the final and an intermediate feature map, by any plain vision transformer of timm."""

import difflib
import importlib
import inspect
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check, cam

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

# What a checkpoint may hold, or lack, without a word: nothing of it works on patch tokens.
_HEADS = ("head", "head_dist", "fc", "classifier", "pre_logits", "attn_pool")


class Features(NamedTuple):
    """What an encoder gives: two feature maps of one grid.

    ``mask`` is bool ``(B, h, w)``, True for a real token and False for padding; None where every token is real.
    """

    final: Tensor
    intermediate: Tensor
    mask: Tensor | None = None


@runtime_checkable
class Encoder(Protocol):
    """All that the framework asks of an encoder: two numbers and a call. No base class, no registration.

    The call takes RGB images ``(B, 3, H, W)``, uint8 or float in [0, 1], not normalised, and gives maps
    ``(B, embed_dim, h, w)`` with ``h = ceil(H / patch_size)`` and ``w = ceil(W / patch_size)``.

    Example:
        >>> import torch
        >>> from ffr.encoder import Encoder, Features
        >>> class Pixels(torch.nn.Module):
        ...     embed_dim, patch_size = 3, 16
        ...     def forward(self, images):
        ...         patches = torch.nn.functional.avg_pool2d(images.float(), 16)
        ...         return Features(final=patches, intermediate=patches)
        >>> isinstance(Pixels(), Encoder)
        True
    """

    if TYPE_CHECKING:  # read-only, so that a property is an attribute as well

        @property
        def embed_dim(self) -> int:
            """D, channels of both features."""

        @property
        def patch_size(self) -> int:
            """Side of a patch, in pixels."""

    else:  # a subclass may set them
        embed_dim: int
        patch_size: int

    def __call__(self, images: Tensor, /) -> Features:
        """Encode images."""


class TimmEncoder(nn.Module):
    """A ready timm transformer as an encoder; :func:`timm_encoder` builds it and documents the arguments.

    Keeps train or eval mode as it is; the ``state_dict`` has the keys of `model` alone, below ``model.``.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        intermediate: int = -3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        net: Any = model
        name = f"`{type(model).__name__}` of {type(model).__module__}"
        own = "or write an encoder of your own: ffr.encoder.Encoder says what it takes."
        missing = [part for part in ("forward_intermediates", "feature_info", "num_features") if not hasattr(net, part)]
        if missing:
            raise ValueError(f"timm_encoder: {name} has no {', '.join(missing)}. Pass a transformer of timm, {own}")
        reductions = sorted({int(info["reduction"]) for info in net.feature_info})
        if len(reductions) > 1:
            raise ValueError(
                f"timm_encoder: {name} is hierarchical: its stages shrink the image by {reductions}, so that the final "
                "and the intermediate features have no common grid. Choose a plain ViT, such as vit_base_patch16_224; "
                "single parts, such as split_bands, take the maps of any network."
            )
        # The final LayerNorm sits behind the pooling in some families; per token it is the same function.
        norm = getattr(net, "norm", None)
        self._norm_later = isinstance(norm, nn.Identity)
        if norm is None or (self._norm_later and isinstance(getattr(net, "fc_norm", norm), nn.Identity)):
            raise ValueError(
                f"timm_encoder: {name} has no final norm (`norm` or `fc_norm`), and the final features are those after "
                f"it. Choose another ViT, {own}"
            )
        blocks = len(net.feature_info)
        if not -blocks <= intermediate < blocks:
            raise ValueError(
                f"timm_encoder: {name} has {blocks} blocks, got intermediate={intermediate}. "
                f"Count from the end with -{blocks}..-1, or from the start with 0..{blocks - 1}."
            )
        self.embed_dim: int = int(net.num_features)
        self.patch_size: int = reductions[0]
        self.num_prefix_tokens: int = int(getattr(net, "num_prefix_tokens", 0))
        self.intermediate = intermediate
        strict = (part.img_size for part in net.modules() if getattr(part, "strict_img_size", False))
        self._only_size: tuple[int, int] | None = next(strict, None)
        self.model, like = model, next(net.parameters())
        for key, given, default in zip(("mean", "std"), (mean, std), _statistics(net), strict=True):
            values = default if given is None else tuple(given)
            if len(values) != 3:
                raise ValueError(f"timm_encoder: expected `{key}` of 3 numbers in [0, 1], got {values}.")
            self.register_buffer(key, like.new_tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Features:
        """Encode images ``(B, 3, H, W)``: normalise, pad to whole patches, run the transformer once."""
        final, (middle,) = self.blocks(images, [self.intermediate])
        return Features(final, middle)

    def blocks(self, images: Tensor, indices: list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode `images`, and look inside: the final map, and those after the blocks `indices`, not normed.

        None: after every block. Maps are ``(B, embed_dim, h, w)`` without prefix tokens, in order of depth. Indices
        count from the end if negative, and name a block once.
        """
        owner = "TimmEncoder"
        count = len(self.model.feature_info)
        if indices is not None and not (
            isinstance(indices, (list, tuple))
            and all(hasattr(index, "__index__") and not isinstance(index, bool) for index in indices)
            and 0 < len(indices) == len({index % count for index in indices if -count <= index < count})
        ):
            raise ValueError(
                f"{owner}: expected `indices` to name blocks of {-count}..{count - 1}, each once, got {indices!r}. "
                "Pass a list, or None for every block."
            )
        size = _check.bind(owner, images=(images, "B 3 H W"))
        _check.pixels(owner, images=images)
        if images.dtype == torch.uint8:
            images = images.to(torch.promote_types(self.mean.dtype, torch.float32)) / 255
        patch = self.patch_size
        h, w = -(-size["H"] // patch), -(-size["W"] // patch)
        if self._only_size is not None and self._only_size != (h * patch, w * patch):
            raise ValueError(
                f"{owner}: this model was built for images of {self._only_size} alone, got {(size['H'], size['W'])}. "
                f"Build it with img_size={(h * patch, w * patch)}, or with dynamic_img_size=True where it can."
            )
        images = ((images - self.mean) / self.std).to(self.mean.dtype)
        if (size["H"], size["W"]) != (h * patch, w * patch):  # here, not inside timm: families without padding gain
            images = F.pad(images, (0, w * patch - size["W"], 0, h * patch - size["H"]))
        final, maps = self.model.forward_intermediates(images, indices=indices, output_fmt="NCHW")
        prefix, total = self.num_prefix_tokens, self.num_prefix_tokens + h * w
        shapes = (size["B"], total, self.embed_dim), (size["B"], self.embed_dim, h, w)
        if final.shape != shapes[0] or any(each.shape != shapes[1] for each in maps):
            raise ValueError(
                f"{owner}: expected {total} tokens ({prefix} of prefix, {h} x {w} patches) of {self.embed_dim} "
                f"channels, got final {tuple(final.shape)} and blocks {[tuple(each.shape) for each in maps]} from "
                f"`{type(self.model).__name__}`. Choose another model."
            )
        if self._norm_later:
            final = self.model.fc_norm(final)
        return cam.tokens_to_map(final, grid=(h, w), prefix=prefix), list(maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass: less memory for another forward pass of them."""
        self.model.set_grad_checkpointing(enable)

    def extra_repr(self) -> str:
        """Show what decides the features."""
        if self.mean.is_meta:
            return f"patch_size={self.patch_size}, intermediate={self.intermediate}"
        mean, std = ([round(value, 4) for value in values.flatten().tolist()] for values in (self.mean, self.std))
        return f"patch_size={self.patch_size}, intermediate={self.intermediate}, mean={mean}, std={std}"


def timm_encoder(
    model: str | nn.Module,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    intermediate: int = -3,
    img_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> TimmEncoder:
    r"""Make an encoder of a plain (single-resolution) transformer of timm, for images of any size.

    .. math:: X = \mathrm{LN}(\text{block}_n), \qquad X_m = \text{block}_{n-2} \text{ (third from the end, not normed)}

    Class, distillation and register tokens are dropped. Images need not be whole patches: they are padded with the
    mean colour on the right and below to the grid ``h = ceil(H / p)``, ``w = ceil(W / p)``. Every token then sees
    some of the image, so ``mask`` stays None; resize what is made from the features to ``(h p, w p)`` and crop.

    `mean` and `std` are no part of the ``state_dict``. On the meta device they have no values, and ``to_empty`` makes
    none: build the encoder where it will run.

    Args:
        model: a timm name, ``"vit_base_patch16_224"``; or a ready module with timm's ``forward_intermediates``,
            ``feature_info`` and ``norm``, taken as it is, head included. For images of other sizes than its own build
            it with ``dynamic_img_size=True``, as is done here for a name.
        pretrained: download timm's weights. False by default: nothing touches the network unasked.
        checkpoint: local weights instead, ``.safetensors`` or a ``torch.save`` file of tensors alone (also below
            ``"model"`` or ``"state_dict"``). timm adapts names and position embeddings; classifier heads are skipped.
        intermediate: the block of :math:`X_m`; negative counts from the end, -3 is the 10th of 12.
        img_size: grid for which position embeddings are allocated; the only size for families which cannot resample
            them (BEiT, CaiT, relpos, MLP-Mixer). None: timm's.
        mean: of RGB, three numbers in [0, 1]. None: the model's own for CLIP, SigLIP and PE models, ImageNet's for all
            others.
        std: as `mean`.
        **kwargs: to ``timm.create_model``, for example ``drop_path_rate``.

    Returns:
        :class:`TimmEncoder`, an :class:`Encoder`; both features are ``(B, embed_dim, h, w)``.

    Raises:
        ImportError: without timm.
        TypeError: if `pretrained`, `img_size` or `kwargs` come with a ready module.
        ValueError: for an unknown name, a model without one common grid or without a final norm, `intermediate`
            beyond the blocks, or a checkpoint that does not fit.

    Example:
        >>> import torch
        >>> from ffr.encoder import timm_encoder
        >>> encoder = timm_encoder("vit_tiny_patch16_224").eval()
        >>> encoder(torch.zeros(1, 3, 64, 90, dtype=torch.uint8)).final.shape
        torch.Size([1, 192, 4, 6])

    Reference: FFR (CVPR 2025), method figure; the lineage's normalisation (ImageNet) for every ViT.
    """
    if not isinstance(model, str) and (pretrained or img_size is not None or kwargs):
        said = ", ".join(["pretrained"] * pretrained + ["img_size"] * (img_size is not None) + list(kwargs))
        raise TypeError(f"timm_encoder: {said} is for models by name. Build the module with it before you pass it.")
    size = {} if img_size is None else {"img_size": img_size}
    net = _create(model, pretrained, size, kwargs) if isinstance(model, str) else model
    encoder = TimmEncoder(net, intermediate=intermediate, mean=mean, std=std)
    if checkpoint is not None:
        _load(net, Path(checkpoint))
    return encoder


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        said = f"timm_encoder: needs {module.partition('.')[0]}, which the extra `examples` brings."
        raise ImportError(f"{said} Run pip install '.[examples]' in a checkout of ffr.") from error


def _create(name: str, pretrained: bool, size: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    timm = _extra("timm")
    architecture, remote = name.partition(".")[0], ":" in name  # "hf-hub:..." and "local-dir:..." name no architecture
    if not remote and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"Did you mean {', '.join(close)}?" if close else "List the names with timm.list_models()."
        raise ValueError(f"timm_encoder: timm knows no model {name!r}. {hint}")
    origin = "timm" if remote else timm.model_entrypoint(architecture).__module__
    size = {"dynamic_img_size": True, **size}
    while True:
        try:
            net = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **size, **kwargs})
            break
        except TypeError as error:
            if origin.partition(".")[0] != "timm":
                raise ValueError(
                    f"timm_encoder: {name!r} is built by the module {origin}, which put its own model in the place of "
                    f"timm's, and refuses timm's arguments ({error}). Pass a ready module instead of the name."
                ) from error
            refused = [key for key in size if f"'{key}'" in str(error)]
            if not refused:
                raise
            del size[refused[0]]  # the family has no such argument: it takes any size, or one; TimmEncoder finds out
    if getattr(net, "attn_pool", None) is not None:
        net.reset_classifier(0, "")  # parameters that would never get a gradient
    return net


def _statistics(net: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config = getattr(net, "pretrained_cfg", None) or {}
    mean, name = tuple(config.get("mean") or ()), f"{config.get('architecture')} {config.get('tag')}"
    if mean and (mean == CLIP_MEAN or any(word in name for word in ("clip", "siglip", "_pe_"))):
        return mean, tuple(config["std"])
    return IMAGENET_MEAN, IMAGENET_STD


def _load(net: Any, path: Path) -> None:
    if path.suffix == ".safetensors":
        state = _extra("safetensors.torch").load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"timm_encoder: `checkpoint` {path.name} holds more than tensors, or is no checkpoint; it was not "
                "unpickled. If you trust its source, save its state_dict alone and pass that file."
            ) from error
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    for wrapper in ("module.", "_orig_mod.", "module.", "model."):  # DDP and compile in either order, TimmEncoder
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    # timm's own conversion for this family: foreign names, position embeddings of another grid.
    homes = (vars(sys.modules[kind.__module__]) for kind in type(net).__mro__)
    convert = next((home["checkpoint_filter_fn"] for home in homes if "checkpoint_filter_fn" in home), None)
    if convert is not None:
        deit3 = "adapt_layer_scale" in inspect.signature(convert).parameters  # its weights as first published
        state = convert(state, net, **({"adapt_layer_scale": True} if deit3 else {}))
    both = (state, net.state_dict())
    state, wanted = ({key: t for key, t in each.items() if key.partition(".")[0] not in _HEADS} for each in both)
    odd = {
        "lacks": wanted.keys() - state.keys(),
        "has unknown": state.keys() - wanted.keys(),
        "has another shape for": {k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape},
    }
    if any(odd.values()):
        said = " and ".join(f"{v} {len(keys)} keys ({', '.join(sorted(keys)[:3])})" for v, keys in odd.items() if keys)
        raise ValueError(f"timm_encoder: `checkpoint` {path.name} does not fit {type(net).__name__}: it {said}.")
    net.load_state_dict(state, strict=False)
