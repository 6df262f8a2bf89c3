"""The whole objective: which terms, with which weights, from which step, on which pseudo labels, into which weights."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import no_host_sync
from test_framework import TinyEncoder
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr.cam import cam_to_label, multi_scale_cam
from ffr.encoder import Features

LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
TERMS = ("cls", "cls_inter", "seg", "seg_high", "rect", "aff", "energy")
SHARES = ("ignored", "foreground", "selected")
FINAL = {"encoder.stem", "encoder.middle", "encoder.last"}
PAR = {"dilations": (1, 2, 4), "iterations": 3}  # smaller than the default, for speed


def objective(dtype=torch.float64, encoder=TinyEncoder, patch_size=4, **settings):
    torch.manual_seed(0)
    model = ffr.FFR(encoder(patch_size=patch_size), 5, mu=0.2, hidden=6, dilation=1).to(dtype)
    with torch.no_grad():  # large enough that every term has something to say
        model.classifier.weight.mul_(50)
        model.intermediate_classifier.weight.mul_(50)
    energy = ffr.DenseEnergyLoss(weight=0.01)  # heavier than the default, which no test would see
    settings = {"start": 0, "refinement": ffr.PixelAdaptiveRefinement(**PAR), "energy": energy, **settings}
    return ffr.FFRLoss(model, **settings)


def batch(height=32, width=48, size=2, dtype=torch.float64):
    """Images of smooth blobs, for which a pseudo label has all three kinds of pixels."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(size, 3, 4, 6, dtype=torch.float64, generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return images.to(dtype), LABELS.repeat(-(-size // 2), 1)[:size]


def grads(loss, total):
    """Gradient by module, 0 where there is none."""
    names, values = zip(*loss.model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, values, allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(v) if g is None else g for name, v, g in zip(names, values, found, strict=True)}


def reached(some, other=None):
    """The modules in whose weights two gradients differ, or one is not 0."""
    other = {name: torch.zeros_like(grad) for name, grad in some.items()} if other is None else other
    return {name.rpartition(".")[0] for name, grad in some.items() if not torch.equal(grad, other[name])}


# --- what the total is ---


def soft_margin(logits, labels):
    """Multi-label soft margin, from its formula."""
    return -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean()


def by_hand(model, images, labels, high, low, affinity_high, affinity_low, scales):
    """The terms of the method, one after the other, by the functions a caller would use."""
    size, y = images.shape[2:], labels.double()
    final, intermediate = multi_scale_cam(model.cams, images, scales=scales, labels=labels)
    par = ffr.PixelAdaptiveRefinement(**PAR)
    label = ffr.refine_label(images, final, labels, high=high, low=low, refinement=par)
    label_inter = ffr.refine_label(images, intermediate, labels, high=high, low=low, refinement=par)
    shrunk = F.interpolate(intermediate, size=(8, 12), mode="bilinear", align_corners=False)
    pairs = cam_to_label(shrunk, high=affinity_high, low=affinity_low)
    for each in (label, label_inter, pairs):  # no kind of pixel is missing, so that no term is trivial
        assert (each == 0).any()
        assert (each == 255).any()
        assert ((each > 0) & (each < 255)).any()
    assert not torch.equal(label, label_inter)

    x, _, _ = model.encoder(images)
    bands = ffr.split_bands(x, 0.2)
    raw = F.conv2d(x, model.classifier.weight[..., None, None])
    vectors, valid = ffr.class_prototypes(x, ffr.cam.normalize_cam(raw, labels=labels), labels)

    def segmentation(logits, label):
        full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return ffr.SegmentationLoss()(full, label)

    return {
        "cls": soft_margin(x.amax((2, 3)) @ model.classifier.weight.T, y),
        "cls_inter": soft_margin(model.outputs(images).logits_inter, y),
        "seg": segmentation(model.head(x), label),
        "seg_high": segmentation(model.head.high(bands.high), label_inter),
        "rect": ffr.rectification_loss(features=x, low=bands.low, prototypes=vectors, valid=valid),
        "aff": ffr.AffinityLoss()(x, pairs),
        "energy": ffr.DenseEnergyLoss(weight=0.01)(model.head(x), label, images=images),
    }


def test_the_total_is_the_weighted_sum_of_the_terms_of_the_method():
    images, labels = batch()
    labelling = {"high": 0.55, "low": 0.3, "affinity_high": 0.6, "affinity_low": 0.2, "scales": (1, 0.5)}
    weights = {"w_seg": 0.3, "lambda_h": 1.7, "lambda_l": 0.9, "w_aff": 0.7, "w_reg": 0.4}
    loss = objective(**labelling, **weights)
    terms = loss(images, labels, step=0)
    wanted = by_hand(loss.model, images, labels, **labelling)
    for name in TERMS:
        assert_close(getattr(terms, name), wanted[name].detach(), msg=lambda text, name=name: f"{name}: {text}")
        assert getattr(terms, name).abs() > 1e-3
    total = wanted["cls"] + wanted["cls_inter"] + 0.3 * (wanted["seg"] + 1.7 * wanted["seg_high"])
    total = total + 0.9 * wanted["rect"] + 0.7 * wanted["aff"] + 0.4 * wanted["energy"]
    assert_close(terms.total, total)
    ours, theirs = grads(loss, terms.total), grads(loss, total)
    for name, grad in theirs.items():
        assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=15)
@given(st.lists(st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.5]), min_size=5, max_size=5), st.integers(0, 6))
def test_with_any_weights_at_any_step_the_total_is_the_sum_of_what_has_started(weights, step):
    w_seg, lambda_h, lambda_l, w_aff, w_reg = weights
    images, labels = batch(16, 24)
    names = dict(zip(("w_seg", "lambda_h", "lambda_l", "w_aff", "w_reg"), weights, strict=True))
    terms = objective(start=3, affinity_start=4, scales=(1.0,), **names)(images, labels, step=step)
    total = terms.cls + terms.cls_inter + w_seg * (terms.seg + lambda_h * terms.seg_high)
    total = total + lambda_l * terms.rect + w_aff * terms.aff + w_reg * terms.energy
    assert_close(terms.total.detach(), total)
    on = {"seg": w_seg, "seg_high": w_seg * lambda_h, "rect": lambda_l, "energy": w_reg}
    assert {name: bool(getattr(terms, name)) for name in on} == {name: w > 0 and step >= 3 for name, w in on.items()}
    assert bool(terms.aff) == (w_aff > 0 and step >= 4)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_that_are_none_are_refused_when_the_objective_is_made(scales):
    with pytest.raises(ValueError, match="FFRLoss: expected `scales`"):
        objective(scales=scales)


def test_the_prototypes_come_from_the_normalised_cam():
    # Tokens share a large vector, so the raw map is positive all over: nearly every token would reach the threshold.
    class Shifted(TinyEncoder):
        def forward(self, images):
            final, intermediate, mask = super().forward(images)
            return Features(final + 5 * model.classifier.weight[0][:, None, None].detach(), intermediate, mask)

    images, labels = batch()
    loss = objective(encoder=Shifted, lambda_h=0)
    model = loss.model
    x, raw = model.encoder(images).final, model.outputs(images).cam[:, 0]
    assert raw.amin() > 0.7 * raw.amax() > 0
    seen = []
    loss.prototypes.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss(images, labels, step=0)
    ((features, cam, _),) = seen
    assert_close(features, x)
    assert_close(cam, ffr.cam.normalize_cam(model.outputs(images).cam, labels=labels))


def test_the_shares_are_those_of_the_label_and_of_the_selection():
    images, labels = batch()
    loss = objective(high=0.55, low=0.3)
    terms, model = loss(images, labels, step=0), loss.model
    cam = multi_scale_cam(model.cams, images, scales=loss.scales, labels=labels)[0]
    label = ffr.refine_label(images, cam, labels, high=0.55, low=0.3, refinement=loss.refinement)
    assert terms.ignored == (label == 255).double().mean() > 0
    assert terms.foreground == ((label > 0) & (label < 255)).double().mean() > 0
    x = model.encoder(images).final
    vectors, valid = ffr.class_prototypes(x, ffr.cam.normalize_cam(model.classifier.cam(x)), labels)
    picked = ffr.select_tokens(
        features=x, low=ffr.split_bands(x, 0.2).low, prototypes=vectors, valid=valid, gap=loss.rectification.gap
    )
    assert terms.selected == pytest.approx(float(picked.sum() / (valid.sum() * x[0, 0].numel())))
    assert 0 < terms.selected < 1
    before = objective(start=1)(images, labels, step=0)
    assert before.ignored == before.foreground == before.selected == 0


def test_without_guidance_by_classes_nothing_is_selected_and_the_loss_is_the_same_as_alone():
    images, labels = batch()
    terms = objective(rectification=ffr.RectificationLoss(gap=None))(images, labels, step=0)
    assert terms.rect > 0 and terms.selected == 0


def test_the_defaults_are_those_of_the_method():
    loss = ffr.FFRLoss(ffr.FFR(TinyEncoder(), 5, hidden=6))
    assert (loss.start, loss.affinity_start) == (2000, 0)
    assert (loss.w_seg, loss.lambda_h, loss.lambda_l, loss.w_aff, loss.w_reg) == (0.1, 2, 1, 0.2, 0.05)
    assert (loss.energy.weight, loss.energy.sigma_rgb, loss.energy.sigma_xy, loss.energy.scale) == (1e-7, 15, 100, 0.5)
    assert loss.energy.exact_gradient
    assert (loss.high, loss.low, loss.affinity_high, loss.affinity_low) == (0.7, 0.25, 0.7, 0.25)
    assert loss.scales == (1.0, 0.5, 1.5)
    assert loss.model.frequency.mu == 0.4
    assert loss.prototypes.seed_threshold == 0.7
    assert (loss.rectification.gap, loss.rectification.min_fraction) == (0.05, 0.05)
    assert (loss.refinement.dilations, loss.refinement.iterations) == ((1, 2, 4, 8, 12, 24), 10)


def test_all_but_the_total_are_detached_scalars_without_their_weight():
    images, labels = batch()
    terms = objective()(images, labels, step=0)
    heavy = objective(w_seg=5.0, lambda_h=7.0, lambda_l=9.0, w_aff=11.0, w_reg=13.0)(images, labels, step=0)
    assert terms._fields == ("total", *TERMS, *SHARES)
    assert terms.total.requires_grad
    for name in TERMS:
        value = getattr(terms, name)
        assert value.shape == ()
        assert not value.requires_grad
        assert torch.equal(value, getattr(heavy, name))
    assert heavy.total > terms.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_terms_have_the_dtype_of_the_model(dtype):
    images, labels = batch()
    assert {value.dtype for value in objective(dtype)(images.to(dtype), labels, step=0)} == {dtype}


# --- which terms are on ---


class Refuse(nn.Module):
    """A part that must not be reached."""

    def forward(self, *_, **__):
        raise ArithmeticError("reached")


def refuse(loss, path):
    """Put `Refuse` in the place of a part, or of a method."""
    owner, _, name = path.rpartition(".")
    target = loss.get_submodule(owner)
    setattr(target, name, Refuse() if name in dict(target.named_children()) else Refuse().forward)


LATE = (
    "segmentation",
    "refinement",
    "rectification",
    "prototypes",
    "energy",
    "model.frequency",
    "model.head.high",
    "model.head.phi_0",
)


@pytest.mark.parametrize("path", LATE)
def test_before_its_start_a_term_is_zero_and_not_computed(path):
    images, labels = batch()
    loss = objective(start=10)
    full = loss(images, labels, step=10)
    refuse(loss, path)
    for step in (0, 9):
        terms = loss(images, labels, step=step)
        assert terms.seg == terms.seg_high == terms.rect == terms.energy == 0
        assert terms.aff > 0
        assert_close(terms.total, terms.cls + terms.cls_inter + 0.2 * terms.aff)
        assert_close(terms.cls, full.cls)
    with pytest.raises(ArithmeticError):  # the part is the one in use, and counts from the very step
        loss(images, labels, step=10)


@pytest.mark.parametrize("path", ["affinity", "model.cams"])
def test_the_affinity_loss_and_the_cams_have_a_start_of_their_own(path):
    images, labels = batch()
    loss = objective(start=20, affinity_start=10)
    refuse(loss, path)
    terms = loss(images, labels, step=9)
    assert terms.aff == 0
    assert_close(terms.total, terms.cls + terms.cls_inter)
    with pytest.raises(ArithmeticError):
        loss(images, labels, step=10)


def test_the_affinity_loss_may_start_after_the_others():
    images, labels = batch()
    terms = objective(start=10, affinity_start=20)(images, labels, step=15)
    assert terms.aff == 0
    assert min(terms.seg, terms.seg_high, terms.rect) > 0


@pytest.mark.parametrize(
    ("weights", "off", "unused"),
    [
        (("w_seg",), {"seg", "seg_high"}, ["segmentation", "model.head.phi_2"]),
        (("w_reg",), {"energy"}, ["energy"]),
        (("w_seg", "w_reg"), {"seg", "seg_high", "energy"}, ["refinement", "model.head.phi_0"]),
        (("lambda_h",), {"seg_high"}, ["model.head.high", "model.head.phi_2"]),
        (("lambda_l",), {"rect"}, ["prototypes", "rectification"]),
        (("w_aff",), {"aff"}, ["affinity"]),
        (("w_seg", "w_aff", "w_reg"), {"seg", "seg_high", "aff", "energy"}, ["model.cams"]),
        (("w_seg", "lambda_l"), {"seg", "seg_high", "rect"}, ["model.frequency"]),
        (("lambda_h", "lambda_l"), {"seg_high", "rect"}, ["model.frequency"]),
    ],
)
def test_a_term_of_weight_zero_is_zero_and_not_computed(weights, off, unused):
    images, labels = batch()
    full = objective()(images, labels, step=0)
    loss = objective(**dict.fromkeys(weights, 0))
    for path in unused:
        refuse(loss, path)
    terms = loss(images, labels, step=0)
    for name in TERMS:
        assert torch.equal(getattr(terms, name), torch.zeros_like(full.cls) if name in off else getattr(full, name))
    for path in unused:
        with pytest.raises(ArithmeticError):
            whole = objective()
            refuse(whole, path)
            whole(images, labels, step=0)


def test_the_gradient_of_each_term_reaches_its_own_weights_alone():
    images, labels = batch()

    def gradient(**on):
        loss = objective(**{"w_seg": 0, "lambda_h": 0, "lambda_l": 0, "w_aff": 0, "w_reg": 0, **on})
        return grads(loss, loss(images, labels, step=0).total)

    plain = gradient()
    assert reached(plain) == FINAL | {"classifier", "intermediate_classifier"}
    assert reached(gradient(w_seg=1), plain) == FINAL | {"head.phi_0", "head.phi_1", "head.last"}
    assert reached(gradient(w_reg=1), plain) == FINAL | {"head.phi_0", "head.phi_1", "head.last"}
    assert reached(gradient(lambda_l=1), plain) == FINAL
    assert reached(gradient(w_aff=1), plain) == FINAL
    both = reached(gradient(w_seg=1, lambda_h=1), gradient(w_seg=1))
    assert both == FINAL | {"head.phi_0", "head.phi_2", "head.last"}


def test_each_classification_loss_trains_the_classifier_of_its_own_features():
    images, labels = batch()
    loss = objective(start=1, affinity_start=1)
    out = loss.model.outputs(images)
    ours = grads(loss, loss(images, labels, step=0).total)
    for weight, logits in (("classifier", out.logits), ("intermediate_classifier", out.logits_inter)):
        theirs = grads(loss, soft_margin(logits, labels.double()))
        assert reached(theirs) & {"classifier", "intermediate_classifier"} == {weight}
        assert_close(ours[f"{weight}.weight"], theirs[f"{weight}.weight"])


# --- what it takes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8])
def test_labels_may_be_of_any_dtype(dtype):
    images, labels = batch()
    loss = objective()
    for ours, wanted in zip(loss(images, labels.to(dtype), step=0), loss(images, labels, step=0), strict=True):
        assert torch.equal(ours, wanted)


def test_a_class_is_present_above_one_half():
    images, labels = batch()
    loss = objective()
    soft = torch.where(labels > 0, 0.51, 0.5)
    for ours, wanted in zip(loss(images, soft, step=0), loss(images, labels, step=0), strict=True):
        assert torch.equal(ours, wanted)


def test_bytes_and_floats_are_the_same_images():
    images, labels = batch()
    images = (images * 255).round().to(torch.uint8)
    loss = objective(torch.float32)
    for ours, wanted in zip(loss(images, labels, step=0), loss(images.float() / 255, labels, step=0), strict=True):
        assert_close(ours, wanted)


def test_a_bound_of_the_present_classes_changes_nothing():
    images, labels = batch()
    loss = objective()
    for ours, wanted in zip(loss(images, labels, step=0, max_present=2), loss(images, labels, step=0), strict=True):
        assert_close(ours, wanted)


def finite(loss, terms):
    gradients = grads(loss, terms.total)
    return all(value.isfinite().all() for value in (*terms, *gradients.values()))


def test_an_image_without_a_label_is_background():
    images, labels = batch()
    loss = objective(rectification=ffr.RectificationLoss(gap=0.01))
    none = loss(images, torch.zeros_like(labels), step=0)
    assert finite(loss, none)
    assert none.rect == 0
    assert none.energy < 0
    # background throughout: half the cross-entropy of class 0, and half of the pairs, all of them positive
    logits = F.interpolate(loss.model(images), size=images.shape[2:], mode="bilinear", align_corners=False)
    assert_close(none.seg, -0.5 * logits.log_softmax(1)[:, 0].mean().detach())
    unit = F.normalize(loss.model.encoder(images).final.flatten(2), dim=1)
    alike = (unit.transpose(1, 2) @ unit).abs().sum() - unit.shape[0] * unit.shape[2]
    pairs = unit.shape[0] * unit.shape[2] * (unit.shape[2] - 1)
    assert_close(none.aff, (0.5 * (1 - alike / (pairs + 1))).detach())
    # and beside a labelled image
    assert finite(loss, loss(images, labels * torch.tensor([[1], [0]]), step=0))


def test_where_nothing_is_decided_the_terms_of_labels_are_exactly_zero(monkeypatch):
    images, labels = batch()

    def undecided(maps):
        return torch.full((maps.shape[0], *maps.shape[2:]), 255)

    monkeypatch.setattr("ffr.objective.refine_label", lambda x, cams, *_, **__: tuple(undecided(x) for _ in cams))
    monkeypatch.setattr("ffr.objective.cam_to_label", lambda cam, **_: undecided(cam))
    loss = objective()
    terms = loss(images, labels, step=0)
    assert terms.ignored == 1
    assert terms.seg == terms.seg_high == terms.aff == terms.energy == 0
    assert finite(loss, terms)
    assert not any(name.startswith("head") for name in reached(grads(loss, terms.total)))
    assert_close(terms.total.detach(), terms.cls + terms.cls_inter + loss.lambda_l * terms.rect)


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_of_any_size_works(size):
    images, labels = batch(size=size)
    loss = objective()
    terms = loss(images, labels, step=0)
    assert finite(loss, terms)
    assert_close(terms.cls, soft_margin(loss.model.classifier(loss.model.encoder(images).final), labels.double()))


def test_a_picture_of_one_colour_is_finite():
    images, labels = batch()
    loss = objective()
    assert finite(loss, loss(torch.zeros_like(images), labels, step=0))


@pytest.mark.parametrize("size", [(100, 130), (96, 130)])
def test_images_which_are_no_whole_number_of_patches_work(size):
    images, labels = batch(*size)
    loss = objective(patch_size=16)
    terms = loss(images, labels, step=0)
    assert finite(loss, terms)
    assert min(terms.seg, terms.seg_high, terms.aff) > 0
    # a token stands over its own pixels: the logits of the padded grid, cropped
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    full = F.interpolate(loss.model(images), size=(16 * h, 16 * w), mode="bilinear", align_corners=False)
    cam, _ = multi_scale_cam(loss.model.cams, images, labels=labels)
    label = ffr.refine_label(images, cam, labels, refinement=loss.refinement)
    assert_close(terms.seg, ffr.SegmentationLoss()(full[..., : size[0], : size[1]], label).detach())


def test_the_affinity_label_of_a_padded_grid_repeats_the_border():
    images, labels = batch(100, 130)
    loss = objective(patch_size=16, affinity_high=0.5, affinity_low=0.4)
    _, cam = multi_scale_cam(loss.model.cams, images, labels=labels)
    index = [torch.arange(16 * -(-n // 16)).clamp(max=n - 1) for n in (100, 130)]
    cam = cam[:, :, index[0]][..., index[1]]
    # halving by 16 bilinearly is the mean of the four pixels in the middle of a patch
    grid = (cam[..., 7::16, 7::16] + cam[..., 7::16, 8::16] + cam[..., 8::16, 7::16] + cam[..., 8::16, 8::16]) / 4
    pairs = cam_to_label(grid, high=0.5, low=0.4)
    assert pairs.shape == (2, 7, 9)
    terms = loss(images, labels, step=0)
    assert_close(terms.aff, ffr.AffinityLoss()(loss.model.encoder(images).final, pairs).detach())


def test_a_mask_of_the_encoder_leaves_padding_out_of_the_terms_on_tokens():
    class Masked(TinyEncoder):
        """The last column of the grid is padding, and louder than everything else."""

        noise = 0.0

        def forward(self, images):
            final, intermediate, _ = super().forward(images)
            mask = torch.ones(final.shape[0], *final.shape[2:], dtype=torch.bool)
            mask[..., -1] = False
            generator = torch.Generator().manual_seed(5)
            loud = self.noise * torch.rand(final.shape, generator=generator, dtype=final.dtype)
            final, intermediate = (torch.where(mask[:, None], x, loud) for x in (final, intermediate))
            return Features(final, intermediate, mask)

    images, labels = batch()
    quiet, loud = objective(encoder=Masked, w_seg=0, w_aff=0), objective(encoder=Masked, w_seg=0, w_aff=0)
    # mu 0.5 keeps the whole spectrum, so that padding does not leak into the low band of its neighbours
    quiet.model.frequency.mu = loud.model.frequency.mu = 0.5
    loud.model.encoder.noise = 100.0
    for name in ("cls", "cls_inter"):
        assert_close(*(getattr(loss(images, labels, step=0), name) for loss in (quiet, loud)))
    seen = {}
    loss = objective(encoder=Masked)
    for name in ("prototypes", "rectification", "affinity"):
        getattr(loss, name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: kwargs["mask"]}), with_kwargs=True
        )
    loss(images, labels, step=0)
    assert set(seen) == {"prototypes", "rectification", "affinity"}
    assert all(mask.shape == (2, 8, 12) and not mask[..., -1].any() for mask in seen.values())


def test_parts_of_ones_own_replace_the_defaults():
    class Twice(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, *args, **kwargs):
            return 2 * self.part(*args, **kwargs)

    images, labels = batch()
    plain, plain_rect = objective(lambda_l=0)(images, labels, step=0), objective()(images, labels, step=0).rect
    segmentation, affinity = Twice(ffr.SegmentationLoss()), Twice(ffr.AffinityLoss())
    terms = objective(lambda_l=0, segmentation=segmentation, affinity=affinity)(images, labels, step=0)
    for name in ("seg", "seg_high", "aff"):
        assert_close(getattr(terms, name), 2 * getattr(plain, name))
    x = objective().model.encoder(images).final
    bands = ffr.split_bands(x, 0.2)
    everything = ffr.RectificationLoss(gap=None)  # without guidance: every token once
    terms = objective(rectification=everything)(images, labels, step=0)
    assert_close(terms.rect, (1 - F.cosine_similarity(x, bands.low)).mean().detach())
    broad = ffr.ClassPrototypes(seed_threshold=0)
    terms = objective(prototypes=broad)(images, labels, step=0)
    vectors, valid = broad(x, ffr.cam.normalize_cam(objective().model.outputs(images).cam), labels)
    wanted = ffr.rectification_loss(features=x, low=bands.low, prototypes=vectors, valid=valid)
    assert_close(terms.rect, wanted.detach())
    assert not torch.isclose(terms.rect, plain_rect)


# --- training ---


def test_some_steps_of_training_lower_the_total():
    images, labels = batch(size=4, dtype=torch.float32)
    loss = objective(torch.float32)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-2)
    totals = []
    for step in range(12):
        total = loss(images, labels, step=step).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize(("flip", "times"), [(True, 2), (False, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_the_cam_takes_scale_1_from_the_training_forward_the_rest_without_gradient(flip, times, training):
    class Telling(TinyEncoder):
        calls = ()

        def forward(self, images):
            self.calls = (*self.calls, (self.training, torch.is_grad_enabled(), tuple(images.shape)))
            return super().forward(images)

    images, labels = batch()
    loss = objective(encoder=Telling, flip=flip).train(training)
    loss(images, labels, step=0)
    sizes = [(2, 3, 32, 48)] * flip + [(2 * times, 3, 16, 24), (2 * times, 3, 48, 72)]
    assert loss.model.encoder.calls == ((training, True, (2, 3, 32, 48)), *((training, False, size) for size in sizes))
    assert loss.training is loss.model.training is training


def test_a_steady_training_step_never_waits_for_the_device():
    images, labels = batch(dtype=torch.float32)
    loss = objective(torch.float32)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    loss(images, labels, step=0, max_present=2)  # fills the caches
    with no_host_sync():
        loss(images, labels, step=1, max_present=2).total.backward()
        optimizer.step()
        loss(images, labels, step=2).total.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_steady_training_step_on_a_gpu_never_waits_and_agrees_with_the_cpu():
    images, labels = batch()
    loss = objective()
    wanted = loss(images, labels, step=0)
    there = copy.deepcopy(loss).cuda()
    images, labels = images.cuda(), labels.cuda()
    there(images, labels, step=0).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = there(images, labels, step=1)
        terms.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(terms, wanted, strict=True):
        assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_terms_are_close_and_every_weight_still_learns(dtype):
    """Autocast keeps casts of the weights; those made for the CAM have no graph, and must not serve the training."""
    images, labels = batch(dtype=torch.float32)
    loss = objective(torch.float32)
    wanted = loss(images, labels, step=0)
    with torch.autocast("cpu", dtype=dtype):
        terms = loss(images, labels, step=0)
    assert finite(loss, terms)
    assert {value.dtype for value in terms} == {torch.float32}
    for name in TERMS:
        assert_close(getattr(terms, name), getattr(wanted, name), rtol=0.1, atol=0.03)
    assert all(grad.abs().sum() > 0 for grad in grads(loss, terms.total).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "passed", "graphs"),
    [
        (None, (0, 0, 0, 10, 10), (1, 1, 1, 2, 2)),  # one number a phase
        (False, (0, 0, 0, 10, 10), (1, 1, 1, 2, 2)),
        (None, (0, 1, 9, 10, 500), (1, 2, 2, 3, 3)),  # the first step is a constant, from the second on it is a number
    ],
)
def test_compiled_it_has_one_graph_a_phase(dynamic, passed, graphs):
    images, labels = batch()
    loss = objective(start=10)
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    counts = []
    for step in passed:
        for ours, wanted in zip(compiled(images, labels, step=step), loss(images, labels, step=step), strict=True):
            assert_close(ours, wanted)
        counts.append(len(seen))
    assert tuple(counts) == graphs


# --- several ranks ---


class Ranks:
    """A sum over threads that stand for ranks: nobody goes on before all have sent."""

    def __init__(self, count):
        self.barrier, self.sent, self.calls = threading.Barrier(count, timeout=60), [None] * count, 0

    def sum_for(self, rank):
        def all_reduce(counts):
            assert not counts.requires_grad
            self.sent[rank] = counts.clone()
            self.barrier.wait()
            total = torch.stack(self.sent).sum(0)
            self.barrier.wait()  # none may overwrite what another has yet to read
            self.calls += rank == 0
            return total

        return all_reduce


@pytest.mark.parametrize("labels", [LABELS.repeat(2, 1), torch.cat([LABELS, torch.zeros_like(LABELS)])])
def test_the_objective_does_not_depend_on_the_number_of_ranks(labels):
    images, _ = batch(size=4)
    whole = objective()
    wanted = whole(images, labels, step=0)
    wanted_grads = grads(whole, wanted.total)
    ranks = Ranks(2)
    results, errors = [None, None], []

    def work(rank):
        try:
            loss = objectives[rank]
            part = slice(2 * rank, 2 * rank + 2)
            terms = loss(images[part], labels[part], step=0)
            results[rank] = (terms, grads(loss, terms.total))
        except BaseException as error:
            errors.append(error)
            ranks.barrier.abort()

    objectives = [objective(all_reduce=ranks.sum_for(rank), world_size=2) for rank in range(2)]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert ranks.calls == 4  # both segmentation losses, the rectification, the affinity
    (one, one_grads), (two, two_grads) = results
    for name in ("total", *TERMS, "ignored", "foreground"):  # a share of pairs is each rank's own
        assert_close((getattr(one, name) + getattr(two, name)) / 2, getattr(wanted, name))
    for name, grad in wanted_grads.items():
        assert_close((one_grads[name] + two_grads[name]) / 2, grad)
    # and it is not so by chance: ranks that count for themselves give another objective
    alone = [objective()(images[part], labels[part], step=0).total for part in (slice(2), slice(2, 4))]
    assert (torch.stack(alone).mean() - wanted.total).abs() > 1e-4


# --- refusals and state ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, r"`start` in \[0, inf\], got -1"),
        ({"affinity_start": -1}, r"`affinity_start` in \[0, inf\]"),
        ({"w_seg": -0.1}, r"`w_seg` in \[0, inf\], got -0\.1"),
        ({"lambda_h": -1}, r"`lambda_h` in"),
        ({"lambda_l": -1}, r"`lambda_l` in"),
        ({"w_reg": -1}, r"`w_reg` in \[0, inf\], got -1"),
        ({"w_aff": float("nan")}, r"`w_aff` in .*got nan"),
        ({"high": 1.1}, r"`high` in \[0, 1\], got 1\.1"),
        ({"low": 0.8}, r"`low` in \[0, 0\.7\], got 0\.8"),
        ({"affinity_high": -0.1}, r"`affinity_high` in \[0, 1\]"),
        ({"affinity_high": 0.3, "affinity_low": 0.4}, r"`affinity_low` in \[0, 0\.3\], got 0\.4"),
    ],
)
def test_a_number_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"FFRLoss: expected {message}"):
        objective(**settings)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((2, 3, 32, 48), (2, 6), r"`labels` of shape \(B=2, K=5\), got \(2, 6\)"),
        ((2, 3, 32, 48), (3, 5), r"`labels` of shape \(B=2, K=5\), got \(3, 5\)"),
        ((2, 3, 32, 48), (2,), r"`labels` of shape \(B=2, K=5\), got \(2,\)"),
        ((3, 32, 48), (2, 5), r"`images` of shape \(B, 3, H, W\), got \(3, 32, 48\)"),
        ((2, 32, 48, 3), (2, 5), r"`images` of shape \(B, 3, H, W\), got \(2, 32, 48, 3\)"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=f"FFRLoss: expected {message}"):
        objective()(torch.zeros(images), torch.zeros(labels), step=0)


def test_it_adds_nothing_to_the_state_of_its_model():
    loss = objective()
    assert set(loss.state_dict()) == {f"model.{key}" for key in loss.model.state_dict()}
    assert len(list(loss.parameters())) == len(list(loss.model.parameters()))
    assert not list(loss.buffers())


class Padded(TinyEncoder):
    """Sees the right third of every image as padding."""

    def forward(self, images):
        final, intermediate, _ = super().forward(images)
        mask = torch.ones(final.shape[0], *final.shape[2:], dtype=torch.bool)
        mask[:, :, 2 * mask.shape[2] // 3 :] = False
        return Features(final, intermediate, mask)


class Unrefined(torch.nn.Module):
    """Leaves scores as they are, and so every pixel to itself."""

    def forward(self, images, scores):
        return scores


def test_what_lies_in_padding_decides_no_label_and_no_classification():
    images, labels = batch()
    other = images.clone()
    other[..., 40:] = 1 - other[..., 40:].flip(2)  # as far from what counts as the convolutions reach
    loss = objective(encoder=Padded, refinement=Unrefined(), scales=(1.0,), flip=False)
    ours, theirs = loss(images, labels, step=0), loss(other, labels, step=0)
    for name in ("cls", "cls_inter", "aff", "ignored", "foreground"):
        assert_close(getattr(ours, name), getattr(theirs, name))
    assert ours.ignored > 1 / 3 and ours.foreground > 0
    plain = objective(refinement=Unrefined(), scales=(1.0,), flip=False)  # without a mask all of it counts
    assert abs(plain(images, labels, step=0).cls - plain(other, labels, step=0).cls) > 1e-3


def test_padding_is_no_region_of_the_energy_and_undecided_in_both_labels():
    seen = {}

    class Energy(ffr.DenseEnergyLoss):
        def forward(self, logits, label, *, images, roi=None):
            seen.update(label=label, roi=roi)
            return super().forward(logits, label, images=images, roi=roi)

    images, labels = batch(height=30, width=46)  # the last patches are broken
    objective(encoder=Padded, energy=Energy())(images, labels, step=0)
    assert seen["roi"].shape == (2, 30, 46)
    assert seen["roi"][..., :32].all() and not seen["roi"][..., 32:].any()
    assert (seen["label"][..., 32:] == 255).all() and (seen["label"][..., :32] != 255).any()


def test_many_classes_need_an_ignore_index_that_none_of_them_has():
    torch.manual_seed(0)
    model = ffr.FFR(TinyEncoder(patch_size=4), 300, hidden=6)
    with pytest.raises(ValueError, match=r"FFRLoss: expected `ignore_index` to be no label in 0..300.*got 255"):
        ffr.FFRLoss(model)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    labels = torch.zeros(2, 300)
    labels[:, 254] = 1  # whose label is 255
    settings = {"start": 0, "refinement": ffr.PixelAdaptiveRefinement(**PAR), "ignore_index": -1}
    terms = ffr.FFRLoss(model, **settings)(batch()[0].float(), labels, step=0)
    assert terms.foreground > 0.02 and all(term.isfinite() for term in terms)


@pytest.mark.parametrize(
    "part",
    [
        {"segmentation": ffr.SegmentationLoss(-1)},
        {"affinity": ffr.AffinityLoss(7)},
        {"energy": ffr.DenseEnergyLoss(ignore_index=-1)},
    ],
)
def test_parts_with_another_ignore_index_are_refused(part):
    (name,) = part
    with pytest.raises(ValueError, match=f"FFRLoss: expected `{name}` with the `ignore_index` of this objective, 255"):
        objective(**part)


@pytest.mark.parametrize("wrap", [lambda model: nn.Sequential(model), lambda model: model.encoder])
def test_what_is_not_the_network_itself_is_refused(wrap):
    model = wrap(ffr.FFR(TinyEncoder(patch_size=4), 5, hidden=6))
    with pytest.raises(
        TypeError, match=rf"FFRLoss: expected `model` to be an ffr.FFR, got {type(model).__name__}\. Wrap"
    ):
        ffr.FFRLoss(model)


def test_ranks_without_a_sum_over_them_are_refused():
    with pytest.raises(ValueError, match="FFRLoss: expected `all_reduce` with `world_size` 2, got None"):
        objective(world_size=2)
