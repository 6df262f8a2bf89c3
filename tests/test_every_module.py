"""One sheet of laws for every public module and function on tensors, whatever it computes."""

import copy
import inspect
import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from test_framework import TinyEncoder
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr import cam, losses, prototypes, rectification, refine
from ffr.encoder import TimmEncoder

GRID, SIZE = (5, 7), (20, 28)  # tokens and pixels, four to a side
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]])

# What the laws do not ask of, and why.
EXCEPTED = {
    "Bands", "Features", "Encoder",  # types
    "timm_encoder",  # builds a module, which is on the sheet
    "cam_to_label", "label_to_cam",  # label functions
    "metrics", "draw",  # numbers and pictures for a reader
    "cam",  # a module of Python; its functions are on the sheet
    "PermutohedralLattice", "DenseCRF",  # by points, and after training: no gradient, no graph; tests of their own
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def coarse(*shape, seed=0):
    """Quarters in [0, 1]: no rounding to fewer bits moves one over a threshold."""
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(seed)).double() / 4


def label_map(*shape):
    values = torch.tensor([0, 1, 2, 3, 255])
    return values[torch.randint(5, shape, generator=torch.Generator().manual_seed(4))]


def features():
    return {"features": normal(3, 6, *GRID)}


def with_cam():
    return {**features(), "cam": coarse(3, 3, *SIZE, seed=1), "labels": LABELS}


def with_prototypes():
    x = normal(3, 6, *GRID)
    parts = {"features": x, "low": ffr.split_bands(x, 0.2).low, "prototypes": normal(3, 3, 6, seed=2)}
    return {**parts, "valid": LABELS > 0}


def pictures():
    return F.interpolate(normal(3, 3, *GRID, seed=3).sigmoid(), size=SIZE, mode="bilinear")


class Small(nn.Module):
    """Both kinds of map that a network gives for an image, for `multi_scale_cam`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 4, stride=4), nn.Conv2d(3, 3, 2, stride=2)])

    def forward(self, images):
        return tuple(layer(images) for layer in self.layers)


class MultiScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Small()

    def forward(self, images, labels, max_present=None):
        return cam.multi_scale_cam(self.network, images, labels=labels, max_present=max_present)


def timm_module():
    # with a class token, and position embeddings of another grid than the images'
    net = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    return TimmEncoder(net)


def network():
    return ffr.FFR(TinyEncoder(embed_dim=6, patch_size=4), 3, mu=0.2, hidden=5, dilation=1)


def objective():
    model = network()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
        model.intermediate_classifier.weight.mul_(50)
    par = ffr.PixelAdaptiveRefinement((1,), iterations=1)
    energy = ffr.DenseEnergyLoss(sigma_rgb=60.0)  # its gate is held, at a weight which finite differences do not see
    return ffr.FFRLoss(model, start=0, scales=(1.0,), refinement=par, rectification=moving(), energy=energy)


def moving():
    """A teacher that moves with its pupil: the gradient is then that of the value, as finite differences see it."""
    return ffr.RectificationLoss(stop_gradient=False)


def rectify():
    part = ffr.FrequencyRectification(mu=0.2)
    part.rectification = moving()
    return part


class Part(nn.Module):
    """A module, one of its methods, or a function, all called alike."""

    def __init__(self, target, method=None):
        super().__init__()
        self.target, self.method = target, method

    def forward(self, **inputs):
        call = self.target if self.method is None else getattr(self.target, self.method)
        return call(**inputs)


class Case(NamedTuple):
    """One line of the sheet."""

    of: object  # what the line is about
    build: Callable[[], object]  # a module or a function
    inputs: Callable[[], dict]  # a batch of 3, by name; floating ones in float64
    smooth: tuple = ()  # inputs with a gradient
    tokens: tuple = ()  # inputs that may be tokens with a grid
    learns: bool = False  # has parameters
    casts: bool = False  # autocast lowers its precision; all others come out of it unchanged
    method: str | None = None
    settings: dict | None = None  # inputs that are no tensors
    copies: float = 0.0  # by how much a batch of copies may differ from one copy
    close: bool = True  # low precision stays near float64: no threshold decides

    def part(self, dtype=torch.float64):
        torch.manual_seed(0)
        return Part(self.build(), self.method).to(dtype)

    def batch(self, dtype=torch.float64):
        return {name: to(x, dtype) for name, x in self.inputs().items()} | (self.settings or {})


def to(x, dtype):
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def segmentation_inputs():
    return {"logits": normal(3, 4, *GRID), "label": label_map(3, *SIZE)}


def energy_inputs():
    """A gate that is constant, as finite differences need it: open, but for one pixel outside the region."""
    label, roi = torch.full((3, *SIZE), 255), coarse(3, *SIZE, seed=6)
    label[:, 0, 0], roi[:, 0, 0] = 0, 0
    return {"logits": normal(3, 4, *GRID), "label": label, "images": pictures(), "roi": roi}


ENERGY = {"weight": 2e-3, "sigma_rgb": 60.0}


def affinity_inputs():
    return {**features(), "label": label_map(3, *GRID)}


def classify():
    return ffr.IntermediateClassifier(6, 3)


def decode():
    return ffr.DualSegmentationHead(6, 3, hidden=5, dilation=2)


def named_images():
    return {"images": pictures()}


def labelled():
    return {"images": pictures(), "labels": LABELS}


# Ordered pairs of 35 tokens, of which a fifth shares a label: the 1 in its denominators weighs below 1 / 150.
PAIRS = {"copies": 1 / 150}
TOKENS = ("features",)
BOTH = ("features", "low")
FIXED = {"close": False}
X = {"smooth": TOKENS, "tokens": TOKENS}

CASES = {
    "split_bands": Case(ffr.split_bands, lambda: ffr.split_bands, features, **X, settings={"mu": 0.2}),
    "FrequencyMask": Case(ffr.FrequencyMask, lambda: ffr.FrequencyMask(0.2), features, **X),
    "class_prototypes": Case(ffr.class_prototypes, lambda: ffr.class_prototypes, with_cam, **X),
    "ClassPrototypes": Case(ffr.ClassPrototypes, lambda: ffr.ClassPrototypes(0.3), with_cam, **X),
    "ClassPrototypes, max_present": Case(
        ffr.ClassPrototypes, ffr.ClassPrototypes, with_cam, **X, settings={"max_present": 3}
    ),
    "similarity_maps": Case(
        ffr.similarity_maps,
        lambda: ffr.similarity_maps,
        lambda: {**features(), "vectors": normal(3, 4, 6, seed=2)},
        smooth=("features", "vectors"),
        tokens=TOKENS,
    ),
    "select_tokens": Case(ffr.select_tokens, lambda: ffr.select_tokens, with_prototypes, tokens=BOTH, **FIXED),
    "rectification_loss": Case(
        ffr.rectification_loss, lambda: ffr.rectification_loss, with_prototypes, smooth=TOKENS, tokens=BOTH
    ),
    "RectificationLoss": Case(
        ffr.RectificationLoss, ffr.RectificationLoss, with_prototypes, smooth=TOKENS, tokens=BOTH
    ),
    "RectificationLoss, l2, moving": Case(
        ffr.RectificationLoss,
        lambda: ffr.RectificationLoss(distance="l2", stop_gradient=False),
        with_prototypes,
        smooth=BOTH,
        tokens=BOTH,
    ),
    "RectificationLoss, l1, without guidance": Case(
        ffr.RectificationLoss,
        lambda: ffr.RectificationLoss(None, distance="l1", stop_gradient=False),
        with_prototypes,
        smooth=BOTH,
        tokens=BOTH,
    ),
    "RectificationLoss.select": Case(
        ffr.RectificationLoss, ffr.RectificationLoss, with_prototypes, tokens=BOTH, method="select", **FIXED
    ),
    "FrequencyRectification": Case(ffr.FrequencyRectification, rectify, with_cam, **X),
    "IntermediateClassifier": Case(ffr.IntermediateClassifier, classify, features, **X, learns=True, casts=True),
    "IntermediateClassifier.cam": Case(
        ffr.IntermediateClassifier, classify, features, **X, learns=True, casts=True, method="cam"
    ),
    "DualSegmentationHead": Case(ffr.DualSegmentationHead, decode, features, **X, learns=True, casts=True),
    "DualSegmentationHead.high": Case(
        ffr.DualSegmentationHead, decode, features, **X, learns=True, casts=True, method="high"
    ),
    "tokens_to_map": Case(
        cam.tokens_to_map,
        lambda: cam.tokens_to_map,
        lambda: {"tokens": normal(3, 37, 6)},
        smooth=("tokens",),
        settings={"grid": GRID, "prefix": 2},
    ),
    "class_activation_map": Case(
        cam.class_activation_map,
        lambda: partial(cam.class_activation_map, weight=nn.Parameter(normal(3, 6, seed=2))),
        features,
        **X,
        casts=True,
    ),
    "normalize_cam": Case(
        cam.normalize_cam,
        lambda: cam.normalize_cam,
        lambda: {"raw": normal(3, 3, *GRID), "labels": LABELS},
        smooth=("raw",),
    ),
    "multi_scale_cam": Case(cam.multi_scale_cam, MultiScale, labelled, learns=True, casts=True),
    "multi_scale_cam, max_present": Case(
        cam.multi_scale_cam, MultiScale, labelled, learns=True, casts=True, settings={"max_present": 3}
    ),
    "to_image": Case(
        cam.to_image,
        lambda: cam.to_image,
        lambda: {"maps": normal(3, 3, *GRID)},
        smooth=("maps",),
        settings={"size": (19, 26), "patch_size": 4},
    ),
    "PixelAdaptiveRefinement": Case(
        ffr.PixelAdaptiveRefinement,
        lambda: ffr.PixelAdaptiveRefinement((1, 3), iterations=1),
        lambda: {"images": pictures(), "scores": normal(3, 2, *SIZE)},
        smooth=("scores",),
    ),
    "refine_label": Case(
        ffr.refine_label,
        lambda: partial(ffr.refine_label, refinement=ffr.PixelAdaptiveRefinement((2,), iterations=1)),
        lambda: {"images": pictures(), "cam": coarse(3, 3, *GRID, seed=1), "labels": LABELS},
        **FIXED,
    ),
    "segmentation_loss": Case(
        losses.segmentation_loss, lambda: losses.segmentation_loss, segmentation_inputs, smooth=("logits",)
    ),
    "SegmentationLoss": Case(ffr.SegmentationLoss, ffr.SegmentationLoss, segmentation_inputs, smooth=("logits",)),
    "affinity_loss": Case(losses.affinity_loss, lambda: losses.affinity_loss, affinity_inputs, **X, **PAIRS),
    "AffinityLoss": Case(ffr.AffinityLoss, ffr.AffinityLoss, affinity_inputs, **X, **PAIRS),
    "dense_energy_loss": Case(
        losses.dense_energy_loss,
        lambda: partial(losses.dense_energy_loss, **ENERGY),
        energy_inputs,
        smooth=("logits",),
    ),
    "DenseEnergyLoss": Case(
        ffr.DenseEnergyLoss, lambda: ffr.DenseEnergyLoss(**ENERGY), energy_inputs, smooth=("logits",)
    ),
    "TimmEncoder": Case(TimmEncoder, timm_module, named_images, smooth=("images",), learns=True, casts=True),
    "FFR": Case(ffr.FFR, network, named_images, smooth=("images",), learns=True, casts=True),
    "FFR.outputs": Case(
        ffr.FFR, network, named_images, smooth=("images",), learns=True, casts=True, method="outputs"
    ),
    "FFR.cams": Case(ffr.FFR, network, named_images, smooth=("images",), learns=True, casts=True, method="cams"),
    "FFRLoss": Case(
        ffr.FFRLoss,
        objective,
        labelled,
        smooth=("images",),
        learns=True,
        casts=True,
        settings={"step": 0},
        **PAIRS,
    ),
}  # fmt: skip

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def some(keep):
    chosen = {name: case for name, case in CASES.items() if keep(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def leaves(result):
    """The tensors of a result."""
    found = [result] if isinstance(result, Tensor) else [x for x in result if x is not None]
    assert all(isinstance(x, Tensor) for x in found)
    return found


def same(ours, wanted, **tolerance):
    for one, other in zip(leaves(ours), leaves(wanted), strict=True):
        assert_close(one, other, **tolerance)


def each(batch, change):
    """Change every tensor of a batch."""
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in batch.items()}


def backward(part, batch, names, cast=None, device="cpu"):
    """Result, and the gradient of its floating outputs by the inputs in `names` and all parameters."""
    batch = {name: x.detach().requires_grad_() if name in names else x for name, x in batch.items()}
    with torch.autocast(device, dtype=cast, enabled=cast is not None):
        result = part(**batch)
    outputs = [x for x in leaves(result) if x.requires_grad]
    wanted = [batch[name] for name in names] + list(part.parameters())
    if not outputs or not wanted:
        return result, []
    total = sum(weighed(x) for x in outputs)
    return result, torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


def weighed(x):
    """A sum whose weights differ from place to place, so that no error cancels."""
    return (x * (1 + 0.1 * torch.arange(x.numel(), device=x.device).reshape(x.shape).cos())).sum()


# --- the sheet is complete ---


def public(module):
    """Names of the classes and functions that a file of the library defines for others."""
    members = vars(module).items()
    own = {name for name, x in members if getattr(x, "__module__", "") == module.__name__ and inspect.isroutine(x)}
    return {name for name in own if not name.startswith("_")}


# Of one another, inside the package: small steps of what is on the sheet.
INNER = {
    "to_float", "present_classes", "take_classes", "put_classes", "cosines", "inverse_norm", "whole_patches",
    "scaled_size",
}  # fmt: skip


def uncovered(cases):
    """Public names that no line is about and no exception names."""
    names = set(ffr.__all__).union(*(public(file) for file in (cam, losses, prototypes, rectification, refine)))
    return names - {case.of.__name__ for case in cases} - EXCEPTED - INNER


def test_every_public_name_is_on_the_sheet_or_excepted():
    assert uncovered(CASES.values()) == set()


@pytest.mark.parametrize("name", sorted({case.of.__name__ for case in CASES.values()} - {"TimmEncoder"}))
def test_a_name_that_is_missing_on_the_sheet_is_seen(name):
    assert uncovered(case for case in CASES.values() if case.of.__name__ != name) == {name}


# --- batches ---


@some(lambda case: any(x.ndim for x in leaves(case.part()(**case.batch()))))
def test_the_maps_of_a_batch_are_those_of_its_images(case):
    part, batch = case.part(), case.batch()
    whole = leaves(part(**batch))
    single = [leaves(part(**each(batch, lambda x, i=i: x[i : i + 1]))) for i in range(3)]
    for index, wanted in enumerate(whole):
        if wanted.ndim:
            assert_close(torch.cat([one[index] for one in single]), wanted)


@every
def test_a_batch_of_copies_gives_what_one_copy_gives(case):
    part, batch = case.part(), case.batch()
    for one, copies in zip(
        leaves(part(**batch)), leaves(part(**each(batch, lambda x: torch.cat([x, x, x])))), strict=True
    ):
        if one.ndim:
            assert_close(copies, torch.cat([one, one, one]))
        else:
            assert_close(copies, one, rtol=1e-9, atol=case.copies + 1e-9)


@some(lambda case: case is not CASES["TimmEncoder"])  # timm refuses it
def test_an_empty_batch_has_an_empty_result_and_no_loss(case):
    part, batch = case.part(), case.batch()
    result, gradients = backward(part, each(batch, lambda x: x[:0]), case.smooth)
    for one, full in zip(leaves(result), leaves(part(**batch)), strict=True):
        assert one.shape == ((0, *full.shape[1:]) if full.ndim else ()) and not one.any()
    assert not any(gradient.any() for gradient in gradients)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every
def test_maps_keep_the_dtype_losses_are_at_least_float32_and_both_near_those_of_float64(case, dtype):
    part, batch = case.part(dtype), case.batch(dtype)
    result = part(**batch)
    wanted = part.double()(**{name: to(x, torch.float64) for name, x in batch.items()})
    tolerance = {torch.float32: 1e-4, torch.float64: 0}.get(dtype, 3e-2)
    for one, exact in zip(leaves(result), leaves(wanted), strict=True):
        assert one.shape == exact.shape
        if exact.is_floating_point():
            assert one.dtype == (dtype if one.ndim else torch.promote_types(dtype, torch.float32))
            assert one.isfinite().all()
            if case.close:
                scale = max(1.0, float(exact.detach().abs().max()))
                assert_close(one.double(), exact, rtol=0, atol=tolerance * scale)
        else:
            assert one.dtype == exact.dtype


@some(lambda case: case.smooth)
def test_the_gradient_is_that_of_finite_differences(case):
    part, batch = case.part(), case.batch()
    names = list(case.smooth) + list(dict(part.named_parameters()))

    def value(*tensors):
        given = dict(zip(names, tensors, strict=True))
        inputs = {**batch, **{name: given.pop(name) for name in case.smooth}}
        return tuple(x for x in leaves(functional_call(part, given, (), inputs)) if x.requires_grad)

    smooth = [batch[name].detach().requires_grad_() for name in case.smooth]
    slopes = torch.autograd.grad(sum(x.square().sum() for x in value(*smooth, *part.parameters())), smooth)
    assert any(slope.any() for slope in slopes)  # of zeros, any gradient would be right
    assert torch.autograd.gradcheck(value, (*smooth, *part.parameters()), fast_mode=True)


@some(lambda case: case is not CASES["TimmEncoder"])  # torch has no forward mode of its attention
def test_forward_mode_finds_the_slope_of_backward_mode_and_none_where_that_has_none(case):
    part, batch = case.part(), case.batch()
    names = [name for name, x in batch.items() if isinstance(x, Tensor) and x.is_floating_point()]
    tangents = [normal(*batch[name].shape, seed=8) for name in names]
    _, gradients = backward(part, batch, names)
    with dual_level():
        dual = {name: make_dual(batch[name].detach(), tangent) for name, tangent in zip(names, tangents, strict=True)}
        slopes = [unpack_dual(x).tangent for x in leaves(part(**{**batch, **dual})) if x.is_floating_point()]
    slopes = [weighed(x) for x in slopes if x is not None]
    if not gradients:
        assert not slopes
        return
    wanted = sum((one * tangent).sum() for one, tangent in zip(gradients, tangents, strict=False))
    assert sum(slopes).item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-12)


def check_autocast(case, wanted, wanted_grads, result, grads):
    assert all(x.isfinite().all() for x in (*leaves(result), *grads))
    if case.casts:
        for one, exact in zip(leaves(result), leaves(wanted), strict=True):
            scale = max(1.0, float(exact.detach().abs().max()))
            assert_close(one.float(), exact, rtol=0, atol=3e-2 * scale)
        # no weight that learns stops learning
        assert [bool(grad.any()) for grad in grads] == [bool(grad.any()) for grad in wanted_grads]
    else:
        same(result, wanted, rtol=0, atol=0)
        same(grads, wanted_grads, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_autocast_keeps_float32_or_stays_near_it(case, dtype):
    part, batch = case.part(torch.float32), case.batch(torch.float32)
    check_autocast(case, *backward(part, batch, case.smooth), *backward(part, batch, case.smooth, cast=dtype))


# --- memory ---


@every
def test_nothing_is_edited(case):
    part, batch = case.part(), case.batch()
    tensors = [x for x in (*batch.values(), *part.parameters(), *part.buffers()) if isinstance(x, Tensor)]
    before = [(x.clone(), x._version) for x in tensors]
    for training in (True, False):
        part.train(training)
        backward(part, batch, case.smooth)
        assert all(module.training is training for module in part.modules())
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
        assert x.grad is None


def every_second(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def turned(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x):
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


@pytest.mark.parametrize("layout", [every_second, turned, channels_last])
@every
def test_the_layout_in_memory_does_not_matter(case, layout):
    part, batch = case.part(), case.batch()
    moved = each(batch, layout)
    assert any(isinstance(x, Tensor) and not x.is_contiguous() for x in moved.values()) or layout is channels_last
    for ours, wanted in zip(backward(part, moved, case.smooth), backward(part, batch, case.smooth), strict=True):
        same(ours, wanted)


@some(lambda case: case.tokens)
def test_tokens_give_what_maps_give(case):
    part, batch = case.part(), case.batch()
    rows = {name: batch[name].flatten(2).transpose(1, 2) for name in case.tokens}
    wanted, wanted_grads = backward(part, batch, case.smooth)
    result, grads = backward(part, {**batch, **rows, "grid": GRID}, case.smooth)

    def maps(x, like):
        return x.transpose(1, 2).reshape(like.shape) if x.ndim == 3 and like.ndim == 4 else x

    for ours, other in zip(leaves(result), leaves(wanted), strict=True):
        assert_close(maps(ours, other), other)
    if any(x.ndim == 3 and other.ndim == 4 for x, other in zip(leaves(result), leaves(wanted), strict=True)):
        return  # the weights of `backward` lie in another order, and so would its gradients
    for ours, other in zip(grads, wanted_grads, strict=True):
        assert_close(maps(ours, other), other)


# --- state ---


@every
def test_a_copy_gives_the_same_and_shares_nothing(case):
    part, batch = case.part(), case.batch()
    wanted = part(**batch)
    twin = copy.deepcopy(part)
    same(twin(**batch), wanted, rtol=0, atol=0)
    with torch.no_grad():
        for weight in part.parameters():
            weight.zero_()
    same(twin(**batch), wanted, rtol=0, atol=0)


@some(lambda case: case.learns)
def test_the_state_dict_carries_all_that_was_learned(case):
    part, batch = case.part(), case.batch()
    assert list(part.parameters())
    other = case.part()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    assert not all(torch.equal(*pair) for pair in zip(part.parameters(), other.parameters(), strict=True))
    other.load_state_dict(part.state_dict(), strict=True)
    same(other(**batch), part(**batch), rtol=0, atol=0)
    assert set(part.state_dict()) == {name for name, _ in part.named_parameters()}


@some(lambda case: not case.learns)
def test_what_learns_nothing_has_no_state(case):
    part = case.part()
    assert not part.state_dict()
    assert not list(part.parameters())
    assert not list(part.buffers())


# --- compilers and devices ---


def check_compiled(case, backend, tolerance):
    part, batch = case.part(), case.batch()
    torch._dynamo.reset()
    compiled = torch.compile(part, fullgraph=True, backend=backend)
    compiled.parameters = part.parameters
    for ours, wanted in zip(backward(compiled, batch, case.smooth), backward(part, batch, case.smooth), strict=True):
        same(ours, wanted, **tolerance)


@every
def test_compiled_in_one_graph_it_is_the_same(case):
    check_compiled(case, "aot_eager", {})


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@every
def test_compiled_by_inductor_it_is_the_same(case):
    check_compiled(case, "inductor", {"rtol": 1e-6, "atol": 1e-6})


def through(part, batch, change):
    """A part and its batch with every tensor changed by `change`, what a `partial` binds included."""
    if isinstance(part.target, partial):
        part.target = partial(part.target.func, **each(part.target.keywords, change))
    return part, each(batch, change)


@every
def test_it_runs_forward_and_backward_without_values(case):
    """On the device "meta" whatever reads a value fails, and so does an operator that meets a tensor of the CPU."""
    part, batch = through(case.part(torch.float32).to("meta"), case.batch(torch.float32), lambda x: x.to("meta"))
    ours = backward(part, batch, case.smooth)
    wanted = backward(case.part(torch.float32), case.batch(torch.float32), case.smooth)
    for one, other in zip(ours, wanted, strict=True):
        assert {x.device.type for x in leaves(one)} <= {"meta"}
        assert [(x.shape, x.dtype) for x in leaves(one)] == [(x.shape, x.dtype) for x in leaves(other)]


def pretend(x):
    """The same tensor on a GPU, without values."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def on_pretended_gpu(part, batch):
    """Result of a part where an operator that meets tensors of CPU and GPU fails, and so does whatever reads a value.

    Forward alone: autograd wants a real device.
    """
    with FakeTensorMode(), torch.autocast("cuda", enabled=False):
        for module in part.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(pretend(weight)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, pretend(buffer))
        part, batch = through(part, batch, pretend)
        return part(**batch)


@every
def test_all_of_it_moves_to_a_gpu_and_the_host_never_waits(case):
    result = on_pretended_gpu(case.part(torch.float32), case.batch(torch.float32))
    assert {x.device.type for x in leaves(result)} == {"cuda"}


@pytest.mark.parametrize(
    ("careless", "error"),
    [
        (lambda x: x + torch.ones(3), "same device|different devices"),  # as torch has worded it
        (lambda x: x * float(x.sum()), "_local_scalar_dense"),
    ],
)
def test_what_stays_behind_or_waits_is_seen(careless, error):
    with pytest.raises(Exception, match=error):
        on_pretended_gpu(Part(careless), {"x": torch.ones(3)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_on_a_gpu_it_is_the_same(case):
    part, batch = case.part(), case.batch()
    there = copy.deepcopy(part).cuda()
    moved = each(batch, lambda x: x.cuda())
    for ours, wanted in zip(backward(there, moved, case.smooth), backward(part, batch, case.smooth), strict=True):
        assert all(x.is_cuda for x in leaves(ours))
        same([x.cpu() for x in leaves(ours)], wanted, rtol=1e-6, atol=1e-6)
