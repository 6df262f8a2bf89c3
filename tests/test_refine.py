"""Pixel-adaptive refinement and the two-stack pseudo label."""

import math
import re
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from ffr.cam import cam_to_label
from ffr.refine import PixelAdaptiveRefinement, refine_label

seeds = st.integers(0, 2**32 - 1)


def uniform(seed, *shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def position_weights(*distances):
    """The softmax of method.md over neighbours at these distances, times 0.01."""
    mean = sum(distances) / len(distances)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in distances) / (len(distances) - 1))
    alike = [math.exp(-((d / (0.3 * deviation)) ** 2)) for d in distances]
    return [0.01 * a / sum(alike) for a in alike]


# Pixel-adaptive refinement ----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seeds,
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    st.integers(0, 4),
)
def test_shifted_sums_are_one_hot_convolutions(seed, height, width, dilations, iterations):
    images, scores = uniform(seed, 2, 3, height, width), uniform(seed + 1, 2, 4, height, width)
    refined = PixelAdaptiveRefinement(dilations, iterations)(images, scores)
    want = torch.from_numpy(reference.refine(images.numpy(), scores.numpy(), dilations, iterations))
    assert_close(refined, want, rtol=0, atol=1e-9)


def test_the_default_setting_differs_by_two_millionths_at_most_in_single_precision():
    images = avg_pool2d(uniform(0, 1, 3, 42, 54, dtype=torch.float32), 3, 1)  # smoother than noise, as photographs are
    scores = uniform(1, 1, 4, 40, 52, dtype=torch.float32).mul(3).softmax(1)
    want = torch.from_numpy(reference.refine(images.numpy(), scores.numpy(), (1, 2, 4, 8, 12, 24), 10))
    assert (PixelAdaptiveRefinement()(images, scores) - want).abs().max() <= 2e-6
    assert (PixelAdaptiveRefinement()(images.double(), scores.double()) - want).abs().max() <= 1e-10


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_the_weights_are_positive_and_sum_to_a_hundredth_above_one(seed, height, width):
    weights = PixelAdaptiveRefinement((1, 3)).affinity(uniform(seed, 2, 3, height, width))
    assert weights.shape == (2, 16, height, width) and weights.min() > 0
    assert_close(weights.sum(1), torch.full((2, height, width), 1.01, dtype=torch.float64))


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (30, 20)])
def test_constant_scores_grow_by_a_hundredth_each_iteration(size, iterations):
    refined = PixelAdaptiveRefinement(iterations=iterations)(uniform(0, 1, 3, *size), torch.ones(1, 2, *size).double())
    assert_close(refined, torch.full((1, 2, *size), 1.01**iterations, dtype=torch.float64))


def test_a_constant_image_means_plain_averaging():
    # One pixel of score 1 in the middle of 5 x 5: next time its 8 neighbours have 1/8 of it and the share of position.
    scores = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    scores[..., 2, 2] = 1
    refined = PixelAdaptiveRefinement((1,), 1)(torch.full((1, 3, 5, 5), 0.3, dtype=torch.float64), scores)
    corner, side, *_ = position_weights(*[math.sqrt(2), 1.0] * 4)
    want = torch.zeros(5, 5, dtype=torch.float64)
    ring = [[corner, side, corner], [side, -0.125, side], [corner, side, corner]]
    want[1:4, 1:4] = 0.125 + torch.tensor(ring, dtype=torch.float64)
    assert_close(refined[0, 0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [0.0, 0.5 + 2**-8, 1.0])
def test_a_flat_patch_with_an_odd_pixel_is_finite_and_averages_around_it(odd, dtype):
    images, scores = torch.full((1, 3, 9, 9), 0.5, dtype=dtype), uniform(0, 1, 2, 9, 9, dtype=dtype)
    images[..., 4, 4] = odd
    scores.requires_grad_()
    refined = PixelAdaptiveRefinement((1, 2), 1)(images, scores)
    around = [(4 + d * y, 4 + d * x) for d in (1, 2) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    near = position_weights(*(math.hypot(y - 4, x - 4) for y, x in around))
    want = sum((1 / 16 + n) * scores[0, :, y, x] for n, (y, x) in zip(near, around, strict=True))
    assert_close(refined[0, :, 4, 4], want)  # no neighbour is like it, so all weigh the same
    refined.square().sum().backward()
    assert refined.isfinite().all() and scores.grad.isfinite().all()


def test_scores_stay_on_their_side_of_an_edge():
    images, scores = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    images[..., 16:], scores[..., 16:] = 1.0, 1.0
    refined = PixelAdaptiveRefinement((1, 2, 4))(images, scores)
    assert refined[..., :16].max() < 0.1  # position alone passes 0.01 an iteration
    assert refined[..., 16:].min() > 0.99
    across = PixelAdaptiveRefinement((1, 2, 4))(torch.zeros_like(images), scores)
    assert across[..., :16].max() > 0.3  # without the edge it would have passed


@given(seeds)
def test_refinement_is_linear_in_the_scores_and_blind_to_their_order(seed):
    refine = PixelAdaptiveRefinement((1, 2, 5), 3)
    images, a, b = uniform(seed, 1, 3, 6, 8), uniform(seed + 1, 1, 4, 6, 8), uniform(seed + 2, 1, 4, 6, 8)
    assert_close(refine(images, 2 * a - 3 * b), 2 * refine(images, a) - 3 * refine(images, b))
    order = torch.tensor([2, 0, 3, 1])
    assert_close(refine(images, a[:, order]), refine(images, a)[:, order])
    assert_close(refine(images, a[:, :1]), refine(images, a)[:, :1])


@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)], ids=["left", "top", "diagonal"]
)
@pytest.mark.parametrize("size", [(7, 12), (30, 40)])
def test_a_mirrored_image_gives_mirrored_scores(turn, size):
    images, scores = uniform(0, 1, 3, *size), uniform(1, 1, 2, *size)
    refine = PixelAdaptiveRefinement()
    assert_close(refine(turn(images), turn(scores)), turn(refine(images, scores)))


@given(seeds, st.floats(0.1, 1), st.floats(0, 0.5))
def test_brightness_contrast_and_the_order_of_colours_do_not_matter(seed, contrast, brightness):
    images, scores = uniform(seed, 1, 3, 8, 9), uniform(seed + 1, 1, 2, 8, 9)
    refine = PixelAdaptiveRefinement((1, 2), 2)
    want = refine(images, scores)
    assert_close(refine(images * contrast + brightness, scores), want, rtol=0, atol=1e-5)
    assert_close(refine(images.flip(1), scores), want)


def test_a_byte_image_is_a_float_image_of_255():
    images = torch.randint(0, 256, (1, 3, 12, 15), dtype=torch.uint8)
    scores = uniform(0, 1, 2, 12, 15, dtype=torch.float32)
    refine = PixelAdaptiveRefinement((1, 2, 4))
    assert_close(refine(images, scores), refine(images / 255, scores))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_and_rounded_once(dtype):
    images, scores = uniform(0, 1, 3, 12, 15).to(dtype), uniform(1, 1, 2, 12, 15).to(dtype)
    refine = PixelAdaptiveRefinement((1, 2, 4))
    refined = refine(images, scores)
    assert refined.dtype == dtype
    assert_close(refined, refine(images.float(), scores.float()).to(dtype), rtol=0, atol=0)
    flat = torch.full((1, 3, 12, 15), 0.5, dtype=dtype)
    flat[..., 6, 6] = 1
    assert refine(flat, scores).isfinite().all()


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float16, torch.float32])
def test_double_precision_scores_stay_so_beside_any_image(image_dtype):
    images, scores = (uniform(0, 1, 3, 9, 9) * 255).to(torch.uint8), uniform(1, 1, 2, 9, 9)
    images = images if image_dtype == torch.uint8 else (images / 255).to(image_dtype)
    refine = PixelAdaptiveRefinement((1, 2), 1)
    weights = refine.affinity(images).double()
    refined = refine(images, scores)
    assert refined.dtype == torch.float64
    near = torch.from_numpy(reference.neighbours(scores.numpy(), (1, 2)))
    assert_close(refined, (weights[:, None] * near).sum(2), rtol=0, atol=1e-12)


def test_its_settings_are_shown_and_it_learns_nothing():
    refine = PixelAdaptiveRefinement([1, 2], 3)
    assert repr(refine) == "PixelAdaptiveRefinement(dilations=(1, 2), iterations=3)"
    assert not refine.state_dict() and not list(refine.parameters()) and not list(refine.buffers())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilations": ()}, "PixelAdaptiveRefinement: expected `dilations` with at least one distance, got ()."),
        ({"dilations": (1, 0)}, "PixelAdaptiveRefinement: expected `dilations` in [1, inf], got 0."),
        ({"iterations": -1}, "PixelAdaptiveRefinement: expected `iterations` in [0, inf], got -1."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PixelAdaptiveRefinement(**settings)


@pytest.mark.parametrize(
    ("images", "scores", "message"),
    [
        ((1, 4, 8, 8), (1, 2, 8, 8), "PixelAdaptiveRefinement: expected `images` of shape (B, 3, H, W), got (1, 4"),
        ((3, 8, 8), (1, 2, 8, 8), "PixelAdaptiveRefinement: expected `images` of shape (B, 3, H, W), got (3, 8, 8)"),
        ((1, 3, 8, 8), (1, 2, 4, 4), "expected `scores` of shape (B=1, C, H=8, W=8), got (1, 2, 4, 4). Resize the sc"),
        ((1, 3, 8, 8), (2, 2, 8, 8), "expected `scores` of shape (B=1, C, H=8, W=8), got (2, 2, 8, 8)"),
    ],
)  # fmt: skip
def test_images_and_scores_that_do_not_fit_are_refused(images, scores, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PixelAdaptiveRefinement()(torch.rand(images), torch.rand(scores))


def test_scores_of_the_images_size_are_not_told_to_be_resized():
    with pytest.raises(ValueError, match=r"got \(1, 2, 8, 8\)\.$"):
        PixelAdaptiveRefinement()(torch.rand(2, 3, 8, 8), torch.rand(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"got \(2, 2, 4, 4\)\. Resize the scores to the images first"):
        PixelAdaptiveRefinement()(torch.rand(2, 3, 8, 8), torch.rand(2, 2, 4, 4))


def test_label_maps_are_no_scores():
    with pytest.raises(TypeError, match="PixelAdaptiveRefinement: expected `scores` of a floating dtype, got"):
        PixelAdaptiveRefinement()(torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.long))


# Pseudo labels ----------------------------------------------------------------------------------------------------

par = PixelAdaptiveRefinement((1, 2), 3)


def scene(seed, classes=4, images=3, size=(12, 17), grid=(5, 7), share=0.5):
    """Images, CAMs of another size, and labels; the CAM of an absent class is not zero, which nobody may notice."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, *size, generator=generator)
    cam = torch.rand(images, classes, *grid, generator=generator)
    return pixels, cam, (torch.rand(images, classes, generator=generator) < share).float()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("downscale", [1, 2, 3])
@pytest.mark.parametrize("refined", [False, True])
def test_the_pseudo_label_is_that_of_the_loops(seed, downscale, refined):
    images, cam, labels = scene(seed)
    high, low = [(0.7, 0.25), (0.6, 0.3), (0.9, 0.0)][seed % 3]
    label = refine_label(
        images, cam, labels, high=high, low=low, downscale=downscale, refinement=par if refined else None
    )
    want = reference.pseudo_label(
        *(x.double().numpy() for x in (images, cam, labels)),
        high,
        low,
        lambda x, s: reference.refine(x, s, (1, 2), 3) if refined else s,
        downscale,
    )
    assert label.dtype == torch.int64 and label.shape == (3, 12, 17)
    assert_close(label, torch.from_numpy(want))


@given(seeds, st.sampled_from([(0.75, 0.25), (0.65, 0.35), (0.45, 0.45)]))
def test_without_refinement_at_full_size_it_is_the_threshold_of_the_cam(seed, thresholds):
    images, cam, labels = scene(seed, grid=(12, 17))
    cam = (cam * 10).round() / 10  # far from the thresholds, so that the rounding of a softmax decides nothing
    high, low = thresholds
    label = refine_label(images, cam, labels, high=high, low=low, downscale=1)
    assert_close(label, cam_to_label(cam * labels[:, :, None, None], high=high, low=low))


@given(seeds, st.sampled_from([None, par]))
def test_only_present_classes_background_and_the_ignore_index_appear(seed, refinement):
    images, cam, labels = scene(seed, share=0.3)
    label = refine_label(images, cam, labels, high=0.5, low=0.3, refinement=refinement)
    for b in range(3):
        allowed = {0, 255} | {k + 1 for k in range(4) if labels[b, k] > 0.5}
        assert set(label[b].unique().tolist()) <= allowed


@pytest.mark.parametrize("refinement", [None, par])
def test_an_image_without_a_label_is_background_beside_others_that_have_one(refinement):
    images, cam, labels = scene(0)
    labels[:] = torch.tensor([1, 0, 1, 0])
    labels[1] = 0
    label = refine_label(images, cam, labels, high=0.4, low=0.0, refinement=refinement)
    assert label[1].eq(0).all()
    assert label[0].ne(0).any() and label[2].ne(0).any()


@pytest.mark.parametrize("high", [0.7, 0.2])
def test_a_constant_cam_of_zeros_is_background(high):
    images, cam, labels = scene(0, share=1.1)
    assert refine_label(images, torch.zeros_like(cam), labels, high=high, low=0.1, refinement=par).eq(0).all()


@given(seeds, st.integers(1, 5), st.sampled_from([None, par]))
def test_a_bound_of_the_present_classes_changes_nothing(seed, bound, refinement):
    images, cam, labels = scene(seed, classes=5, share=0.6)
    labels[:, bound:] = 0
    labels = labels[:, torch.randperm(5, generator=torch.Generator().manual_seed(seed))]
    full = refine_label(images, cam, labels, high=0.6, refinement=refinement)
    assert_close(refine_label(images, cam, labels, high=0.6, refinement=refinement, max_present=bound), full)


def test_a_batch_without_any_class_has_the_bound_zero():
    images, cam, labels = scene(0)
    label = refine_label(images, cam, labels * 0, max_present=int((labels * 0).sum(1).max()), refinement=par)
    assert label.eq(0).all()


def test_a_tuple_of_cams_comes_back_as_a_tuple_each_as_alone():
    images, cam, labels = scene(0)
    other = scene(1, grid=(12, 17))[1]
    calls = []

    def refinement(pixels, scores):
        calls.append((tuple(pixels.shape), tuple(scores.shape)))
        return par(pixels, scores)

    both = refine_label(images, (cam, other), labels, high=0.6, refinement=refinement)
    assert isinstance(both, tuple)
    assert calls == [((3, 3, 6, 8), (3, 2 * 2 * 5, 6, 8))]  # in one go: the affinity of an image is computed once
    for label, one in zip(both, (cam, other), strict=True):
        assert_close(label, refine_label(images, one, labels, high=0.6, refinement=par))
    (single,) = refine_label(images, (cam,), labels, high=0.6, refinement=par)
    assert_close(single, both[0])


@given(seeds, st.floats(0, 1), st.sampled_from([None, par]))
def test_equal_thresholds_leave_nothing_undecided(seed, threshold, refinement):
    images, cam, labels = scene(seed)
    assert refine_label(images, cam, labels, high=threshold, low=threshold, refinement=refinement).ne(255).all()


@given(seeds, st.integers(1, 3))
def test_a_higher_threshold_adds_no_foreground_and_a_lower_one_no_background(seed, downscale):
    images, cam, labels = scene(seed)
    steps = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    rising = [refine_label(images, cam, labels, high=t, low=0.2, downscale=downscale) for t in steps]
    falling = [refine_label(images, cam, labels, high=0.9, low=t, downscale=downscale) for t in steps]
    for now, then in pairwise(rising):
        named, kept = (now > 0) & (now < 255), (then > 0) & (then < 255)
        assert not (kept & ~named).any()
        assert_close(then == 0, now == 0)  # background is a matter of the other threshold
    for now, then in pairwise(falling):
        assert not ((now == 0) & (then != 0)).any()
        assert_close((now > 0) & (now < 255), (then > 0) & (then < 255))


def test_refinement_moves_the_label_to_the_edge_of_the_object():
    # A square of 16 pixels whose CAM, on a grid of 8 x 8, stops 2 pixels short of its left and right edge.
    images, cam = torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 32, 32)
    images[:, :, 8:24, 8:24] = 1.0
    cam[:, 1, 8:24, 10:22] = 1.0
    labels = torch.tensor([[0, 1]])
    want = images[0, 0].long() * 2
    rough = refine_label(images, cam, labels, high=0.5, low=0.5)[0]
    fine = refine_label(images, cam, labels, high=0.5, low=0.5, refinement=PixelAdaptiveRefinement((1, 2, 4)))[0]
    assert (rough != want).sum() == 16 * 4
    assert (fine != want).sum() < 16


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 2)])
def test_images_smaller_than_the_reduction_keep_their_size(size):
    images, cam, labels = scene(0, size=size)
    label = refine_label(images, cam, labels, downscale=4, refinement=PixelAdaptiveRefinement())
    assert label.shape == (3, *size)


def test_bytes_are_floats_of_255_and_labels_have_any_dtype():
    images, cam, labels = scene(0)
    images = (images * 255).to(torch.uint8)
    assert refine_label(images, cam, labels, refinement=lambda x, s: s * (x.max() <= 1), low=0.7).ne(0).any()
    want = refine_label(images / 255, cam, labels, high=0.6, refinement=par)
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.bfloat16):
        assert_close(refine_label(images, cam, labels.to(dtype), high=0.6, refinement=par), want)
    assert_close(refine_label(images, cam, labels * 0.01 + 0.5, high=0.6, refinement=par), want)  # 0.5 is absent


def test_another_ignore_index_takes_the_place_of_255():
    images, cam, labels = scene(0)
    want = refine_label(images, cam, labels)
    assert want.eq(255).any()
    assert_close(refine_label(images, cam, labels, ignore_index=-1), torch.where(want == 255, -1, want))


def test_no_gradient_and_no_autocast_reach_the_scores_and_nothing_is_edited():
    images, cam, labels = scene(0)
    kept = [x.clone() for x in (images, cam, labels)]
    seen = []

    def refinement(pixels, scores):
        seen.append((scores.dtype, scores.requires_grad, torch.is_autocast_enabled("cpu")))
        return par(pixels, scores)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        label = refine_label(images.requires_grad_(), cam.requires_grad_(), labels, refinement=refinement)
    assert seen == [(torch.float32, False, False)]
    assert not label.requires_grad and torch.is_grad_enabled()
    for x, before in zip((images, cam, labels), kept, strict=True):
        assert_close(x.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cams_of_any_precision_are_compared_in_single(dtype):
    images, cam, labels = scene(0)
    cam = cam.to(dtype)
    assert_close(refine_label(images, cam, labels), refine_label(images, cam.float(), labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 1.2}, "refine_label: expected `high` in [0, 1], got 1.2."),
        ({"high": 0.5, "low": 0.6}, "refine_label: expected `low` in [0, 0.5], got 0.6."),
        ({"low": -0.1}, "refine_label: expected `low` in [0, 0.7], got -0.1."),
        ({"downscale": 0}, "refine_label: expected `downscale` in [1, inf], got 0."),
        ({"max_present": 5}, "present_classes: expected `max_present` in [0, 4], got 5. `labels` has K=4 classes."),
        ({"images": torch.rand(3, 1, 12, 17)}, "refine_label: expected `images` of shape (B, 3, H, W), got (3, 1"),
        ({"labels": torch.ones(2, 4)}, "refine_label: expected `labels` of shape (B=3, K=4), got (2, 4)."),
        ({"labels": torch.ones(3, 5)}, "refine_label: expected `labels` of shape (B=3, K=4), got (3, 5)."),
        ({"cam": ()}, "refine_label: expected `cam` to be a tensor, or a tuple of at least one, got ()."),
        ({"cam": (torch.rand(3, 4, 5, 7), torch.rand(2, 4, 5, 7))}, "expected `cam` of shape (B=3, K=4, h, w), got (2"),
        ({"cam": torch.rand(3, 4)}, "refine_label: expected `cam` of shape (B=3, K, h, w), got (3, 4)."),
    ],
)  # fmt: skip
def test_thresholds_and_shapes_that_do_not_fit_are_refused(settings, message):
    images, cam, labels = scene(0)
    with pytest.raises(ValueError, match=re.escape(message)):
        refine_label(**{"images": images, "cam": cam, "labels": labels, **settings})


def test_a_label_map_is_no_cam():
    with pytest.raises(TypeError, match="refine_label: expected `cam` of a floating dtype, got"):
        refine_label(torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.long), torch.ones(1, 2))


def test_scores_and_images_that_lie_channels_last_are_laid_out_for_speed(monkeypatch):
    images, scores = torch.rand(1, 3, 9, 11), torch.rand(1, 4, 9, 11)
    moved = [x.to(memory_format=torch.channels_last) for x in (images, scores)]
    assert not any(x.is_contiguous() for x in moved)
    refine = PixelAdaptiveRefinement((1, 2))
    wanted, shifts, laid_out = refine(images, scores), refine._shifts, []
    monkeypatch.setattr(refine, "_shifts", lambda maps: laid_out.append(maps.is_contiguous()) or shifts(maps))
    assert_close(refine(*moved), wanted)
    assert laid_out == [True] * (1 + refine.iterations)  # the image, then the scores
