"""Class prototypes from an image's own features, and the similarity of tokens to them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffr import _check
from ffr.cam import present_classes, put_classes, take_classes, whole_patches


class Prototypes(NamedTuple):
    """One vector per class; where ``valid`` is False the class is absent or has no seed, and the vector is zero.

    A CAM that holds NaN or inf has no seed.
    """

    vectors: Tensor
    valid: Tensor


def class_prototypes(
    features: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    seed_threshold: float = 0.7,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    patch_size: int | None = None,
    max_present: int | None = None,
) -> Prototypes:
    r"""One vector for every class present in an image, from that image's CAM and features.

    .. math:: p_k = \frac{\sum_{i \in S_k} c_{ki} x_i}{\sum_{i \in S_k} c_{ki}}, \qquad
              S_k = \{i : c_{ki} \ge t\}

    with the CAM :math:`c_k` after ReLU, shrunk to the grid by area and divided by its peak there, so that raw,
    normalised and resized CAMs all work. Gradient flows through the tokens, not through the CAM. The method's CAM is
    `ffr.cam.normalize_cam` of the raw one: where that is positive all over, nearly every token may reach the threshold.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        cam: ``(B, K, H, W)`` of any size, on the grid or at pixels; it is taken to cover the whole grid. Sides in the
            proportion of w to h, and not of h to w, are refused: somewhere they were exchanged.
        labels: multi-hot ``(B, K)``, any dtype, present means > 0.5.
        seed_threshold: t, in [0, 1]. 0 gives the mean of all tokens weighted by the CAM.
        mask: bool ``(B, h, w)``, False leaves a token out.
        grid: ``(h, w)``, for tokens.
        patch_size: pixels of a token's side, for a `cam` at pixels of an image that is no whole number of patches: the
            grid, rounded up, then covers more than the image, and the border of the CAM is repeated.
        max_present: an upper bound of the classes present in one image, known on the host; absent classes then
            cost nothing.

    Returns:
        ``Prototypes(vectors, valid)``: ``(B, K, D)`` in the dtype of `features`, and bool ``(B, K)``.

    Raises:
        ValueError: if a shape does not fit or `seed_threshold` lies outside [0, 1].
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.prototypes import class_prototypes
        >>> features = torch.tensor([[[[1.0, 2.0, 4.0]]]])  # three tokens of one channel
        >>> cam = torch.tensor([[[[0.0, 5.0, 5.0]]]])
        >>> class_prototypes(features, cam, torch.ones(1, 1)).vectors
        tensor([[[3.]]])

    Reference: FFR (CVPR 2025), method figure and supplementary; seed threshold and weighting are our reading.
    """
    owner = "class_prototypes"
    (tokens,), sizes = _check.tokens(owner, grid=grid, features=features)
    sizes = _check.bind(owner, sizes=sizes, cam=(cam, "B K H W"))
    remedy = f"`cam` is (B, K, H, W), here {tuple(cam.shape)}"
    sizes = _check.bind(owner, sizes=sizes, remedy=remedy, labels=(labels, "B K"))
    _check.floating(owner, cam=cam)
    _check.within(owner, seed_threshold=seed_threshold, at_most=1.0)
    if mask is not None:
        _check.bind(owner, sizes=sizes, mask=(mask, "B h w"))
        _check.boolean(owner, mask=mask)
        features = features.masked_fill(~(mask[:, None] if features.ndim == 4 else mask.flatten(1)[..., None]), 0)
    h, w = sizes["h"], sizes["w"]
    if h != w and cam.shape[2] * h == cam.shape[3] * w > 0:
        raise ValueError(
            f"{owner}: expected `cam` with the proportions of the grid, {h} x {w}, got {cam.shape[2]} x "
            f"{cam.shape[3]}. One of them has height and width exchanged: `grid` is (height, width)."
        )
    patch = None if cam.shape[2:] == (h, w) else patch_size
    if patch is not None:
        _check.within(owner, at_least=1, whole=True, patch_size=patch)
        if (-(-cam.shape[2] // patch), -(-cam.shape[3] // patch)) != (h, w):
            raise ValueError(
                f"{owner}: expected `cam` on the grid of {h} x {w}, or at pixels that it covers with `patch_size` "
                f"{patch}, got {cam.shape[2]} x {cam.shape[3]}. Leave `patch_size` out for a CAM of the whole grid."
            )
    with _check.no_autocast(tokens):
        ids, present = present_classes(labels, max_present)
        seeds = take_classes(cam.detach(), ids).relu()  # (B, m, H, W)
        if patch is not None:
            seeds = whole_patches(seeds, (h, w), patch)
        if seeds.shape[2:] != (h, w):
            seeds = F.adaptive_avg_pool2d(seeds, (h, w))
        seeds = seeds.flatten(2).to(torch.promote_types(seeds.dtype, torch.float32))
        if mask is not None:
            seeds = torch.where(mask.flatten(1)[:, None], seeds, 0)
        peak = seeds.amax(2, keepdim=True)
        seen = (peak > 0) & (peak < torch.inf)
        valid = present & seen[..., 0]
        seeds = seeds / torch.where(seen, peak, 1)
        seeds = torch.where((seeds >= seed_threshold) & valid[..., None], seeds, 0)
        # Dividing the weights, not the sum of tokens, keeps fp16 from overflowing.
        weights = seeds / torch.where(valid, seeds.sum(2), 1)[..., None]
        weights = weights.to(tokens.dtype)
        if features.ndim == 4:  # in this order the gradient of maps comes as maps lie in memory
            vectors = torch.bmm(features.flatten(2), weights.transpose(1, 2)).transpose(1, 2)  # (B, m, D)
        else:
            vectors = torch.bmm(weights, features)
    return Prototypes(put_classes(vectors, ids, sizes["K"]), put_classes(valid, ids, sizes["K"]))


class ClassPrototypes(nn.Module):
    """`class_prototypes` with its threshold bound; no parameters, no buffers.

    Args:
        seed_threshold: share of its peak that a CAM must reach for a token to count, in [0, 1].

    Example:
        >>> import torch
        >>> from ffr import ClassPrototypes
        >>> x, cam = torch.randn(2, 64, 14, 14), torch.rand(2, 20, 448, 448)
        >>> vectors, valid = ClassPrototypes()(x, cam, torch.ones(2, 20))
        >>> vectors.shape, valid.shape
        (torch.Size([2, 20, 64]), torch.Size([2, 20]))
    """

    def __init__(self, seed_threshold: float = 0.7) -> None:
        super().__init__()
        _check.within("ClassPrototypes", seed_threshold=seed_threshold, at_most=1.0)
        self.seed_threshold = seed_threshold

    def forward(
        self,
        features: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        patch_size: int | None = None,
        max_present: int | None = None,
    ) -> Prototypes:
        """See `class_prototypes`."""
        return class_prototypes(
            features,
            cam,
            labels,
            seed_threshold=self.seed_threshold,
            mask=mask,
            grid=grid,
            patch_size=patch_size,
            max_present=max_present,
        )

    def extra_repr(self) -> str:
        """The threshold."""
        return f"seed_threshold={self.seed_threshold}"


def similarity_maps(
    features: Tensor,
    vectors: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    valid: Tensor | None = None,
    max_present: int | None = None,
) -> Tensor:
    """Cosine similarity of every token to every prototype.

    Args:
        features: maps ``(B, D, h, w)``, or tokens ``(B, N, D)`` with `grid`.
        vectors: prototypes ``(B, K, D)``.
        grid: ``(h, w)``, for tokens.
        valid: bool ``(B, K)``, as `class_prototypes` gives it; the maps of other classes are zero.
        max_present: an upper bound of the valid classes of one image, known on the host; the others then cost nothing.

    Returns:
        ``(B, K, h, w)`` in [-1, 1] but for rounding (clamp before an arc cosine); 0 where the token or the prototype is
        zero.

    Raises:
        ValueError: if a shape does not fit, or `max_present` comes without `valid`.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> from ffr.prototypes import similarity_maps
        >>> similarity_maps(torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[1.0, 0.0]]]))
        tensor([[[[0.6000]]]])
    """
    owner = "similarity_maps"
    (tokens,), sizes = _check.tokens(owner, grid=grid, features=features)
    sizes = _check.bind(owner, sizes=sizes, vectors=(vectors, "B K D"))
    _check.floating(owner, vectors=vectors)
    if valid is None:
        if max_present is not None:
            raise ValueError(f"{owner}: `max_present` needs `valid`. Pass valid of shape (B, K).")
        maps = cosines(tokens, vectors).to(tokens.dtype)
    else:
        _check.bind(owner, sizes=sizes, valid=(valid, "B K"))
        _check.boolean(owner, valid=valid)
        ids, there = present_classes(valid, max_present)
        maps = cosines(tokens, torch.where(there[..., None], take_classes(vectors, ids), 0)).to(tokens.dtype)
        maps = put_classes(maps, ids, sizes["K"])
    return maps.reshape(sizes["B"], sizes["K"], sizes["h"], sizes["w"])


def cosines(tokens: Tensor, vectors: Tensor) -> Tensor:
    """Cosine of every token (B, N, D) to every vector (B, m, D): (B, m, N), at least float32."""
    with _check.no_autocast(tokens):
        # The prototypes are normalised, never the N tokens: no second copy of the features. Divided by sqrt(D)
        # on the way, as a product of a fp16 token with a unit vector may overflow.
        root = math.sqrt(tokens.shape[2])
        unit = (vectors * (inverse_norm(vectors) / root)[..., None]).to(tokens.dtype)
        if not torch.compiler.is_compiling():
            cosine: Tensor = _Cosines.apply(tokens, unit, root)[0]
            return cosine
        return torch.bmm(unit, tokens.transpose(1, 2)) * (inverse_norm(tokens) * root)[:, None]


class _Cosines(torch.autograd.Function):
    """``unit . t / |t| * root``; its backward pass makes two tensors of the size of the tokens, not six."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, unit: Tensor, root: float) -> tuple[Tensor, Tensor]:
        inverse = inverse_norm(tokens)
        return torch.bmm(unit, tokens.transpose(1, 2)) * (inverse * root)[:, None], inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tokens, unit, ctx.root = inputs
        cosine, inverse = output
        ctx.mark_non_differentiable(inverse)
        ctx.save_for_backward(tokens, unit, cosine, inverse)
        ctx.save_for_forward(tokens, unit)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tokens, unit, cosine, inverse = ctx.saved_tensors
        with _check.no_autocast(tokens):
            if torch.is_grad_enabled():  # for a second derivative the norm must be in the graph
                inverse = inverse_norm(tokens)
            weights = (gradients[0] * (inverse * ctx.root)[:, None]).to(tokens.dtype)  # (B, m, N)
            to_unit = torch.bmm(weights, tokens) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, to_unit, None
            along = -(gradients[0] * cosine).sum(1) * inverse.square()
            if tokens.transpose(1, 2).is_contiguous():  # maps: the gradient lies in memory as they do
                to_tokens = torch.bmm(unit.transpose(1, 2), weights).transpose(1, 2)
            else:
                to_tokens = torch.bmm(weights.transpose(1, 2), unit)
            return to_tokens.add_(tokens * along[..., None]), to_unit, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        tokens, unit = ctx.saved_tensors
        inverse = inverse_norm(tokens)
        cosine = torch.bmm(unit, tokens.transpose(1, 2)) * inverse[:, None]
        moved = torch.zeros_like(cosine)
        if tangents[0] is not None:
            along = (tokens * tangents[0]).sum(2, dtype=inverse.dtype) * inverse.square()
            moved = torch.bmm(unit, tangents[0].transpose(1, 2)) * inverse[:, None] - cosine * along[:, None]
        if tangents[1] is not None:
            moved = moved + torch.bmm(tangents[1], tokens.transpose(1, 2)) * inverse[:, None]
        return moved * ctx.root, None


def inverse_norm(vectors: Tensor) -> Tensor:
    """``1 / |v|`` over the last axis, with a finite gradient; 0 where the square underflows. At least float32."""
    # fp16 would overflow in the sum of squares
    norm = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.promote_types(vectors.dtype, torch.float32))
    some = norm > 10 * torch.finfo(norm.dtype).tiny ** 0.5
    return torch.where(some, 1 / torch.where(some, norm, 1), 0)
