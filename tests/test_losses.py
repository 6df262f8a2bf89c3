"""Segmentation and affinity loss: values, exact zeros, several ranks, and a training step that never waits."""

import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr.cam import cam_to_label, multi_scale_cam
from ffr.encoder import Features
from ffr.losses import affinity_loss, dense_energy_loss, segmentation_loss
from ffr.refine import refine_label

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 5)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_label(seed, *shape, labels=4, ignored=0.3):
    """A label map in which few labels appear, and some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(0, labels, (2,), generator=generator)
    label = few[torch.randint(0, 2, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < ignored, 255, label)


def value_and_gradient(loss, x, *args, **settings):
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **settings)
    assert value.shape == () and value.requires_grad  # connected to the graph whatever the label
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def is_exactly_zero(loss, x, *args, **settings):
    value, gradient = value_and_gradient(loss, x, *args, **settings)
    return value.eq(0).item() and gradient.eq(0).all().item()


# Segmentation -----------------------------------------------------------------------------------------------------


@given(seeds, sides, sides, st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([255, -1, 3]))
def test_the_segmentation_loss_is_that_of_the_loops(seed, height, width, ignored, ignore):
    logits, label = noise(seed, 2, 4, height, width), some_label(seed, 2, height, width, ignored=ignored)
    label = torch.where(label == 255, ignore, label)
    value, gradient = value_and_gradient(segmentation_loss, logits, label, ignore_index=ignore)
    want = reference.segmentation(logits.numpy(), label.numpy(), ignore)
    assert_close(value, torch.tensor(want, dtype=torch.float64))
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("label", "want"),
    [
        ([[0, 0], [2, 1]], 1.0),  # both halves
        ([[0, 0], [0, 0]], 0.5),  # background alone
        ([[1, 1], [2, 2]], 0.5),  # foreground alone
        ([[255, 255], [255, 0]], 0.5),
        ([[255, 255], [2, 0]], 1.0),
        ([[255, 255], [255, 255]], 0.0),
    ],
)
def test_uniform_logits_cost_the_logarithm_of_their_number_in_every_half_that_has_pixels(label, want):
    value = segmentation_loss(torch.zeros(1, 3, 2, 2), torch.tensor([label]))
    assert_close(value, want * torch.tensor(3.0).log())


def test_one_pixel_of_foreground_weighs_as_much_as_all_background():
    label = torch.zeros(2, 6, 7, dtype=torch.long)
    label[0, 2, 3] = 1
    _, gradient = value_and_gradient(segmentation_loss, torch.zeros(2, 2, 6, 7), label)
    pull = gradient[:, 0].abs()
    assert_close(pull[0, 2, 3], torch.tensor(0.25))  # 0.5 (1 - softmax)
    assert_close(pull.sum(), torch.tensor(0.5))


def test_an_ignored_label_costs_exactly_nothing():
    assert is_exactly_zero(segmentation_loss, noise(0, 2, 4, 5, 6), torch.full((2, 5, 6), 255))
    assert is_exactly_zero(segmentation_loss, noise(0, 2, 4, 2, 3), torch.full((2, 32, 48), 255))


@given(seeds)
def test_ignored_pixels_move_nothing(seed):
    logits, label = noise(seed, 1, 4, 4, 5), some_label(seed, 1, 4, 5)
    value, gradient = value_and_gradient(segmentation_loss, logits, label)
    ignored = (label == 255)[:, None].expand_as(logits)
    assert gradient[ignored].eq(0).all()
    assert_close(segmentation_loss(torch.where(ignored, 1e3, logits), label), value)


def test_logits_are_up_sampled_to_the_label():
    logits, label = noise(0, 2, 4, 3, 5), some_label(0, 2, 13, 17)
    full = torch.from_numpy(reference.resized(logits.numpy(), (13, 17)))
    assert_close(segmentation_loss(logits, label), segmentation_loss(full, label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_a_label_has_any_integer_dtype(dtype):
    logits, label = noise(0, 2, 4, 5, 6), some_label(0, 2, 5, 6)
    assert_close(segmentation_loss(logits, label.to(dtype)), segmentation_loss(logits, label))


def test_a_negative_ignore_index_never_meets_a_byte():
    logits, label = torch.zeros(1, 157, 2, 2), torch.full((1, 2, 2), 156, dtype=torch.uint8)  # 156 is -100 in a byte
    assert_close(segmentation_loss(logits, label, ignore_index=-100), 0.5 * torch.tensor(157.0).log())
    assert_close(affinity_loss(torch.eye(4)[None], label, ignore_index=-100, grid=(2, 2)), torch.tensor(0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_confident_logits_stay_finite_and_are_summed_in_single_precision(dtype):
    logits, label = (noise(0, 2, 4, 5, 6) * 1e4).to(dtype), some_label(0, 2, 5, 6)
    value, gradient = value_and_gradient(segmentation_loss, logits, label)
    assert value.isfinite() and gradient.isfinite().all()
    assert_close(value, segmentation_loss(logits.float(), label), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_pixels_than_half_precision_can_count_are_counted(dtype):
    label = torch.zeros(2, 160, 210, dtype=torch.long)  # 67,200 of them
    assert_close(segmentation_loss(torch.zeros(2, 2, 1, 1, dtype=dtype), label), 0.5 * torch.tensor(2.0).log())


def test_a_loss_scaled_for_float16_keeps_its_gradient_finite():
    """In float16 the gradient that a scaler of 65536 starts from would be infinity, as would the loss."""
    x = noise(0, 2, 4, 5, 6).half().requires_grad_()
    label, images = some_label(0, 2, 5, 6), torch.rand(2, 3, 5, 6)
    for loss in (segmentation_loss(x, label), affinity_loss(x, label), dense_energy_loss(x, label, images=images)):
        (gradient,) = torch.autograd.grad(loss * 65536, x)
        assert loss.dtype == torch.float32
        assert gradient.dtype == torch.float16 and gradient.isfinite().all() and gradient.any()


def test_a_right_and_certain_answer_costs_nothing():
    label = some_label(1, 2, 5, 6, ignored=0)
    assert segmentation_loss(100 * F.one_hot(label, 4).movedim(3, 1).float(), label) == 0


# Affinity ---------------------------------------------------------------------------------------------------------


@given(seeds, sides, sides, st.sampled_from([0.0, 0.3, 0.8]), st.sampled_from([255, -1, 3]))
def test_the_affinity_loss_is_that_of_the_loops(seed, h, w, ignored, ignore):
    x, label = noise(seed, 2, 3, h, w), some_label(seed, 2, h, w, ignored=ignored)
    label = torch.where(label == 255, ignore, label)
    tokens = x.flatten(2).transpose(1, 2)
    want = torch.tensor(reference.affinity(tokens.numpy(), label.flatten(1).numpy(), ignore), dtype=torch.float64)
    value, gradient = value_and_gradient(affinity_loss, x, label, ignore_index=ignore)
    assert_close(value, want)
    assert_close(affinity_loss(tokens, label, ignore_index=ignore, grid=(h, w)), value)
    assert 0 <= value <= 1 and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("label", "want"),
    [
        ([0, 0, 1, 1], 0.5 * (1 - 4 / 5)),  # alike within, unlike across
        ([0, 1, 0, 1], 0.5 * 1 + 0.5 * 4 / 9),  # the other way round: 4 ordered pairs of each, 8 across
        ([0, 0, 0, 0], 0.5 * (1 - 4 / 13)),  # no pair across
        ([0, 1, 2, 3], 0.5 * 4 / 13),  # no pair within
        ([2, 2, 255, 255], 0.5 * (1 - 2 / 3)),
        ([2, 255, 1, 255], 0.5 * 0),
        ([2, 1, 255, 255], 0.5 * 2 / 3),
        ([3, 255, 255, 255], 0.0),
        ([255, 255, 255, 255], 0.0),
    ],
)
def test_two_pairs_of_tokens_at_right_angles_have_a_known_affinity(label, want):
    tokens = torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.5]]])  # opposite is alike, length is nothing
    assert_close(affinity_loss(tokens, torch.tensor([[label]]), grid=(1, 4)), torch.tensor(want))


@pytest.mark.parametrize("known", [[], [(0, 2, 1)], [(0, 2, 1), (1, 0, 0)]], ids=["none", "one", "one an image"])
def test_without_a_pair_the_affinity_costs_exactly_nothing(known):
    label = torch.full((2, 3, 4), 255)
    for b, i, j in known:
        label[b, i, j] = 1
    assert is_exactly_zero(affinity_loss, noise(0, 2, 5, 3, 4), label)


def test_a_grid_of_one_token_has_no_pair():
    assert is_exactly_zero(affinity_loss, noise(0, 3, 5, 1, 1), torch.tensor([0, 1, 2])[:, None, None])


@given(seeds)
def test_neither_the_order_of_tokens_nor_their_length_nor_the_names_of_labels_matter(seed):
    tokens, label = noise(seed, 2, 6, 4), some_label(seed, 2, 1, 6)
    want = affinity_loss(tokens, label, grid=(1, 6))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert_close(affinity_loss(tokens[:, order], label[..., order], grid=(1, 6)), want)
    assert_close(affinity_loss(tokens * noise(seed + 1, 2, 6, 1), label, grid=(1, 6)), want)
    assert_close(affinity_loss(tokens, torch.where(label == 255, 255, 9 - label), grid=(1, 6)), want)


@given(seeds)
def test_a_masked_token_is_an_ignored_token(seed):
    x, label = noise(seed, 2, 3, 3, 4), some_label(seed, 2, 3, 4)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.6
    want = affinity_loss(x, torch.where(mask, label, 255))
    assert_close(affinity_loss(x, label, mask=mask), want)
    broken = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    assert_close(affinity_loss(broken, label, mask=mask), want)
    assert torch.autograd.grad(affinity_loss(broken, label, mask=mask), broken)[0].isfinite().all()
    byte = torch.where(label == 255, 9, label).to(torch.uint8)
    assert_close(affinity_loss(x, byte, mask=mask & (byte != 9), ignore_index=-1), want)
    assert_close(ffr.AffinityLoss()(x, label, mask=mask), want)


def test_tokens_of_zero_are_alike_to_none_and_get_no_gradient():
    x = noise(0, 1, 3, 2, 3)
    x[..., 0, :] = 0
    label = torch.tensor([[[0, 0, 1], [0, 1, 1]]])
    value, gradient = value_and_gradient(affinity_loss, x, label)
    tokens = x.flatten(2).transpose(1, 2)
    want = reference.affinity(tokens.numpy(), label.flatten(1).numpy())
    assert_close(value, torch.tensor(want, dtype=torch.float64))
    assert gradient.isfinite().all() and gradient[..., 0, :].eq(0).all()
    assert is_exactly_zero(affinity_loss, torch.zeros(1, 3, 2, 3), torch.full((1, 2, 3), 255))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2e4), (torch.bfloat16, 1e18), (torch.float32, 1e18)])
def test_long_tokens_do_not_overflow(dtype, size):
    x, label = (noise(0, 2, 64, 3, 4) + 1).clamp(-3, 3), torch.zeros(2, 3, 4, dtype=torch.long)
    value, gradient = value_and_gradient(affinity_loss, (x * size).to(dtype), label)
    assert gradient.dtype == dtype and gradient.isfinite().all()
    assert_close(value.double(), affinity_loss(x, label), rtol=0, atol=3e-2 if dtype != torch.float32 else 1e-6)


# Several ranks ----------------------------------------------------------------------------------------------------


COUNTING = {"segmentation": segmentation_loss, "affinity": affinity_loss}


def losses_of_halves(seed, kind):
    """A loss of (index, x, settings) on the halves of a batch, x of the batch, and the loss of the whole."""
    x, label = noise(seed, 4, 4, 3, 5), some_label(seed, 4, 3, 5)
    label[2:, 1:] = 255  # the halves count differently
    if kind in COUNTING:
        function = COUNTING[kind]
        return lambda i, x, **kw: function(x, label.chunk(2)[i], **kw), x, lambda x: function(x, label)
    vectors = noise(seed + 1, 4, 3, 4)
    valid = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])

    def loss(x, rows, **settings):
        low = ffr.split_bands(x, 0.25).low
        parts = {"features": x, "low": low, "prototypes": vectors[rows], "valid": valid[rows]}
        return ffr.rectification_loss(**parts, gap=0.2, min_fraction=0.9 * (seed % 2), **settings)

    return lambda i, x, **kw: loss(x, slice(2 * i, 2 * i + 2), **kw), x, lambda x: loss(x, slice(None))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [*COUNTING, "rectification"])
def test_two_ranks_have_the_loss_and_the_gradient_of_one(seed, kind):
    loss, x, whole = losses_of_halves(seed, kind)
    value, gradient = reference.over_ranks(loss, *x.chunk(2))
    want, wanted_gradient = value_and_gradient(whole, x)
    assert_close(value, want)
    assert_close(gradient, wanted_gradient)
    alone = torch.stack([loss(i, half) for i, half in enumerate(x.chunk(2))]).mean()
    assert (alone - want).abs() > 1e-4  # a mean of two means: the counts of the halves do differ


@pytest.mark.parametrize("kind", COUNTING)
def test_a_rank_without_pixels_or_pairs_adds_nothing_and_stays_in_step(kind):
    make = COUNTING[kind]
    x, label = noise(0, 4, 4, 3, 5), some_label(0, 4, 3, 5)
    label[2:] = 255
    value, gradient = reference.over_ranks(lambda i, x, **kw: make(x, label.chunk(2)[i], **kw), *x.chunk(2))
    want, wanted_gradient = value_and_gradient(make, x, label)
    assert_close(value, want)
    assert_close(gradient, wanted_gradient)
    label[:] = 255
    value, gradient = reference.over_ranks(lambda i, x, **kw: make(x, label.chunk(2)[i], **kw), *x.chunk(2))
    assert value == 0 and gradient.eq(0).all()


@pytest.mark.parametrize("module", [ffr.SegmentationLoss(7), ffr.AffinityLoss(7)])
def test_a_module_is_its_function_with_the_ignore_index_bound(module):
    function = segmentation_loss if isinstance(module, ffr.SegmentationLoss) else affinity_loss
    x, label = noise(0, 2, 4, 3, 5), some_label(0, 2, 3, 5)
    label = torch.where(label == 255, 7, label)
    settings = {"all_reduce": lambda counts: 2 * counts, "world_size": 3}
    assert_close(module(x, label), function(x, label, ignore_index=7), rtol=0, atol=0)
    assert_close(module(x, label, **settings), function(x, label, ignore_index=7, **settings), rtol=0, atol=0)
    assert repr(module) == f"{type(module).__name__}(ignore_index=7)"


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-20, 1e-19, 1e-18])
def test_a_token_however_short_leaves_the_gradient_of_the_affinity_finite(length):
    tokens = torch.ones(1, 3, 4) * torch.tensor([1, length, length])[:, None]
    loss, gradient = value_and_gradient(affinity_loss, tokens, torch.tensor([[[0, 0, 2]]]), grid=(1, 3))
    assert loss.isfinite() and gradient.isfinite().all()


def test_the_affinity_module_takes_tokens():
    x, label = noise(0, 2, 4, 3, 5), some_label(0, 2, 3, 5)
    assert_close(ffr.AffinityLoss()(x.flatten(2).transpose(1, 2), label, grid=(3, 5)), affinity_loss(x, label))


# Degenerate CAMs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-1.0, 0.0, 2.0])
def test_a_constant_cam_is_background_and_its_losses_are_finite(level):
    images, labels = torch.rand(2, 3, 16, 16), torch.ones(2, 3)
    cam = multi_scale_cam(lambda x: torch.full((x.shape[0], 3, 4, 4), level), images, labels=labels)
    label = refine_label(images, cam, labels, refinement=ffr.PixelAdaptiveRefinement((1, 2)))
    tokens = cam_to_label(cam[..., ::4, ::4], high=0.7, low=0.25)
    assert label.eq(0).all() and tokens.eq(0).all()
    value, gradient = value_and_gradient(segmentation_loss, torch.zeros(2, 4, 4, 4), label)
    assert_close(value, 0.5 * torch.tensor(4.0).log())
    assert gradient.isfinite().all()
    value, gradient = value_and_gradient(affinity_loss, torch.ones(2, 5, 4, 4), tokens)
    assert_close(value, torch.tensor(0.5 * (1 - 480 / 481)))
    assert gradient.isfinite().all()


# Nothing waits for the device -------------------------------------------------------------------------------------


class Tiny(nn.Conv2d):
    """An encoder that keeps to the protocol."""

    embed_dim, patch_size = 8, 8

    def __init__(self):
        super().__init__(3, 8, 8, stride=8)

    def forward(self, images):
        x = super().forward(images)
        return Features(final=x, intermediate=x.relu())


def training_step(**settings):
    objective = ffr.FFRLoss(ffr.FFR(Tiny(), num_classes=4, hidden=8, dilation=1), start=0)
    images, labels = torch.rand(2, 3, 32, 48), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    return lambda: objective(images, labels, step=5, **settings).total.backward()


def calls():
    x, low = torch.randn(2, 8, 4, 6, requires_grad=True), torch.randn(2, 8, 4, 6)
    images, cam, labels = torch.rand(2, 3, 32, 48), torch.rand(2, 4, 4, 6), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    label, tokens, mask = some_label(0, 2, 32, 48), some_label(0, 2, 4, 6), torch.rand(2, 4, 6) < 0.7
    valid, vectors = torch.rand(2, 4) < 0.5, torch.randn(2, 4, 8)
    parts = {"features": x, "low": low, "prototypes": vectors, "valid": valid, "mask": mask}
    classify = ffr.IntermediateClassifier(8, 4)
    return {
        "multi_scale_cam": lambda: multi_scale_cam(lambda i: i[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4], images),
        "multi_scale_cam, max_present": lambda: multi_scale_cam(
            lambda i: i[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4], images, labels=labels, max_present=2
        ),
        "cam_to_label": lambda: cam_to_label(cam, high=0.7, low=0.25),
        "refine_label": lambda: refine_label(images, cam, labels, refinement=ffr.PixelAdaptiveRefinement((1, 2))),
        "refine_label, max_present": lambda: refine_label(images, (cam, cam), labels, max_present=2),
        "segmentation_loss": lambda: segmentation_loss(torch.randn(2, 4, 4, 6, requires_grad=True), label).backward(),
        "affinity_loss": lambda: affinity_loss(x, tokens, mask=mask).backward(),
        "class_prototypes": lambda: ffr.class_prototypes(x, cam, labels, max_present=2).vectors.sum().backward(),
        "rectification_loss": lambda: ffr.rectification_loss(**parts).backward(),
        "FrequencyRectification": lambda: ffr.FrequencyRectification()(x, cam, labels, mask=mask).loss.backward(),
        "IntermediateClassifier": lambda: classify(x, mask=mask).sum().backward(),
        "FFRLoss": training_step(),
        "FFRLoss, max_present": training_step(max_present=2),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_nothing_in_a_training_step_waits_for_the_device(name):
    call = calls()[name]
    with reference.no_host_sync():
        call()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.detach().numpy(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.index_put((x > 1,), torch.arange(1.0)),
        lambda x: torch.equal(x, x),
        lambda x: 1.0 in x,
        lambda x: F.one_hot(x.long()),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0])),
    ],
)
def test_what_waits_is_caught(wait):
    x = torch.arange(3.0)
    with pytest.raises(AssertionError, match="the host waits"), reference.no_host_sync():
        wait(x)
    with reference.no_host_sync():  # and what does not is let through
        assert x[torch.tensor([0, 2])].shape == x.masked_fill(x > 1, 0)[1:].shape


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        ((4, 5, 6), (2, 5, 6), "segmentation_loss: expected `logits` of shape (B, C, h, w), got (4, 5, 6)."),
        ((2, 4, 5, 6), (5, 6), "segmentation_loss: expected `label` of shape (B=2, H, W), got (5, 6)."),
        ((2, 4, 5, 6), (1, 5, 6), "segmentation_loss: expected `label` of shape (B=2, H, W), got (1, 5, 6)."),
        ((2, 4, 5, 6), (2, 4, 5, 6), "segmentation_loss: expected `label` of shape (B=2, H, W), got (2, 4, 5, 6)."),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, label, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        segmentation_loss(torch.zeros(logits), torch.zeros(label, dtype=torch.long))


@pytest.mark.parametrize(
    ("features", "label", "settings", "message"),
    [
        ((2, 8, 5, 6), (2, 6, 5), {}, "expected `label` of shape (B=2, h=5, w=6), got (2, 6, 5). Shrink the CAM"),
        ((2, 30, 8), (2, 5, 6), {}, "expected `features` of shape (B, D, h, w), got (2, 30, 8). For tokens"),
        ((2, 31, 8), (2, 5, 6), {"grid": (5, 6)}, "`grid` is 5 x 6 = 30 tokens: drop prefix tokens, or"),
        ((2, 8, 5, 6), (2, 5, 6), {"grid": (6, 5)}, "expected `grid` (5, 6) as in `features`, got (6, 5). Correct"),
        (
            (2, 8, 5, 6),
            (2, 5, 6),
            {"mask": torch.ones(2, 6, 5, dtype=torch.bool)},
            "affinity_loss: expected `mask` of shape (B=2, h=5, w=6), got (2, 6, 5).",
        ),
    ],
)  # fmt: skip
def test_features_and_labels_that_do_not_fit_are_refused(features, label, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        affinity_loss(torch.zeros(features), torch.zeros(label, dtype=torch.long), **settings)


@pytest.mark.parametrize("loss", [segmentation_loss, affinity_loss])
def test_wrong_dtypes_are_refused_with_the_remedy(loss):
    x, label = torch.zeros(1, 4, 5, 6), torch.zeros(1, 5, 6, dtype=torch.long)
    with pytest.raises(TypeError, match=rf"{loss.__name__}: expected `label` of an integer dtype, got .*float32\. Use"):
        loss(x, label.float())
    with pytest.raises(TypeError, match=rf"{loss.__name__}: expected `label` of an integer dtype, got torch\.bool"):
        loss(x, label > 0)
    with pytest.raises(TypeError, match=rf"{loss.__name__}: expected `\w+` of a floating dtype, got .*int64\. Convert"):
        loss(x.long(), label)


def test_a_mask_of_numbers_is_refused_with_the_remedy():
    x, label = torch.zeros(1, 4, 5, 6), torch.zeros(1, 5, 6, dtype=torch.long)
    with pytest.raises(TypeError, match=r"affinity_loss: expected `mask` of dtype torch\.bool, got .*float32\. Use"):
        affinity_loss(x, label, mask=torch.ones(1, 5, 6))


@pytest.mark.parametrize("loss", COUNTING.values(), ids=COUNTING)
def test_a_reduction_in_place_that_returns_nothing_is_refused(loss):
    with pytest.raises(TypeError, match=f"{loss.__name__}: expected `all_reduce` to return the sum, got NoneType"):
        loss(noise(0, 2, 4, 5, 6), some_label(0, 2, 5, 6), all_reduce=lambda counts: None)


@pytest.mark.parametrize("loss", [segmentation_loss, affinity_loss])
def test_ranks_without_a_sum_over_them_are_refused(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__}: expected `all_reduce` with `world_size` 2, got None"):
        loss(noise(0, 2, 4, 5, 6), some_label(0, 2, 5, 6), world_size=2)
