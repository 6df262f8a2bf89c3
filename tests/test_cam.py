"""Class activation maps: token grids, normalisation, several scales, label maps."""

import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr.cam import (
    cam_to_label,
    class_activation_map,
    label_to_cam,
    multi_scale_cam,
    normalize_cam,
    present_classes,
    put_classes,
    scaled_size,
    take_classes,
    to_float,
    to_image,
    tokens_to_map,
)

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 7)


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(seed, *shape, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


# Tokens to maps ---------------------------------------------------------------------------------------------------


@given(seeds, sides, sides, st.integers(0, 5))
def test_every_token_lands_row_by_row_behind_the_prefix(seed, h, w, prefix):
    tokens = noise(seed, 2, prefix + h * w, 3)
    maps = tokens_to_map(tokens, grid=(h, w), prefix=prefix)
    assert maps.shape == (2, 3, h, w)
    for i in range(h):
        for j in range(w):
            assert_close(maps[:, :, i, j], tokens[:, prefix + i * w + j], rtol=0, atol=0)


@pytest.mark.parametrize(("count", "prefix", "side"), [(196, 0, 14), (197, 1, 14), (198, 2, 14), (1374, 5, 37)])
def test_a_square_grid_needs_no_size(count, prefix, side):
    assert tokens_to_map(torch.zeros(1, count, 2), prefix=prefix).shape == (1, 2, side, side)


def test_a_map_is_a_view_of_its_tokens_contiguous_or_not():
    for tokens in (torch.zeros(2, 10, 4), torch.zeros(2, 4, 10).transpose(1, 2), torch.zeros(10, 2, 4).transpose(0, 1)):
        tokens_to_map(tokens, prefix=1)[1, 2, 0, 2] = 7.0
        assert tokens[1, 3, 2] == 7.0


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (197, {}, "tokens_to_map: 197 tokens are not a square grid. 196 are 14 x 14: pass prefix=1, or pass grid="),
        (201, {}, "201 tokens are not a square grid. 196 are 14 x 14: pass prefix=5"),
        (198, {"prefix": 1}, "197 tokens are not a square grid. 196 are 14 x 14: pass prefix=2"),
        (188, {}, "188 tokens are not a square grid. Pass grid=(h, w)."),
        (197, {"grid": (14, 14)}, "h * w = 197 (tokens (2, 197, 8), prefix 0), got (14, 14) = 196. Pass prefix=1."),
        (197, {"grid": (14, 14), "prefix": 2}, "(tokens (2, 197, 8), prefix 2), got (14, 14) = 196. Pass prefix=1."),
        (9, {"prefix": 9}, "tokens_to_map: expected `prefix` in [0, 8], got 9"),
        (9, {"prefix": -1}, "tokens_to_map: expected `prefix` in [0, 8], got -1"),
    ],
)
def test_tokens_that_do_not_fill_a_grid_are_refused_with_the_remedy(count, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokens_to_map(torch.zeros(2, count, 8), **settings)


def test_tokens_that_lie_before_the_batch_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"got \(14, 14\) = 196\. The tokens lie first: .* with \.transpose\(0, 1\)\."):
        tokens_to_map(torch.zeros(197, 2, 8), grid=(14, 14), prefix=1)


def test_no_prefix_is_named_where_tokens_are_missing():
    with pytest.raises(ValueError, match=r"got \(3, 4\) = 12\.$"):
        tokens_to_map(torch.zeros(2, 9, 8), grid=(3, 4))


def test_the_prefix_that_the_remedy_names_works():
    with pytest.raises(ValueError, match=r"Pass prefix=5\.$"):
        tokens_to_map(torch.zeros(1, 26, 2), grid=(3, 7))
    assert tokens_to_map(torch.zeros(1, 26, 2), grid=(3, 7), prefix=5).shape == (1, 2, 3, 7)


def test_maps_are_no_tokens():
    with pytest.raises(ValueError, match=r"tokens_to_map: expected `tokens` of shape \(B, T, D\), got \(2, 8, 7, 7\)"):
        tokens_to_map(torch.zeros(2, 8, 7, 7))


# Raw CAM ----------------------------------------------------------------------------------------------------------


@given(seeds, sides, sides)
def test_the_raw_cam_is_a_dot_product_in_every_token(seed, h, w):
    x, weight = noise(seed, 2, 5, h, w), noise(seed + 1, 3, 5)
    want = np.zeros((2, 3, h, w))
    for b, k, i, j in np.ndindex(*want.shape):
        want[b, k, i, j] = sum(float(x[b, d, i, j] * weight[k, d]) for d in range(5))
    raw = class_activation_map(x, weight)
    assert_close(raw, torch.from_numpy(want))
    assert_close(class_activation_map(x, weight[:, :, None, None]), raw, rtol=0, atol=0)
    assert_close(class_activation_map(x.flatten(2).transpose(1, 2), weight, grid=(h, w)), raw, rtol=0, atol=0)
    assert class_activation_map(x[:0], weight).shape == (0, 3, h, w)


def test_a_weight_in_another_precision_takes_that_of_the_features():
    assert class_activation_map(torch.ones(1, 4, 2, 2, dtype=torch.bfloat16), torch.ones(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("features", "weight", "grid", "message"),
    [
        ((2, 5, 3, 4), (3, 6), None, "class_activation_map: expected `weight` of shape (K, D=5), got (3, 6)."),
        (
            (2, 5, 3, 4),
            (3, 5, 3, 3),
            None,
            "class_activation_map: expected `weight` of shape (K, D=5), got (3, 5, 3, 3)",
        ),
        ((2, 5, 3, 4), (5,), None, "class_activation_map: expected `weight` of shape (K, D=5), got (5,)."),
        ((2, 12, 5), (3, 5), None, "class_activation_map: expected `features` of shape (B, D, h, w), got (2, 12, 5)."),
        ((2, 12, 5), (3, 5), (3, 5), "`grid` is 3 x 5 = 15 tokens: drop prefix tokens, or correct `grid`."),
    ],
)
def test_features_and_weights_that_do_not_fit_are_refused(features, weight, grid, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        class_activation_map(torch.zeros(features), torch.zeros(weight), grid=grid)


def test_features_and_weights_without_a_floating_dtype_are_refused():
    with pytest.raises(TypeError, match="class_activation_map: expected `weight` of a floating dtype, got"):
        class_activation_map(torch.zeros(1, 4, 2, 2), torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="class_activation_map: expected `features` of a floating dtype"):
        class_activation_map(torch.zeros(1, 4, 2, 2, dtype=torch.long), torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"class_activation_map: expected `weight` to be a torch\.Tensor, got Linear"):
        class_activation_map(torch.zeros(1, 4, 2, 2), torch.nn.Linear(4, 3))


# Normalised CAM ---------------------------------------------------------------------------------------------------


@given(seeds, sides, sides)
def test_a_normalised_map_reaches_from_zero_to_exactly_one_or_is_zero(seed, h, w):
    raw = noise(seed, 2, 3, h, w, dtype=torch.float32)
    cam = normalize_cam(raw)
    varied = raw.relu().amax((2, 3)) > raw.relu().amin((2, 3))
    assert_close(cam.amax((2, 3)), varied.float(), rtol=0, atol=0)
    assert_close(cam.amin((2, 3)), torch.zeros(2, 3), rtol=0, atol=0)
    assert_close(cam, torch.from_numpy(reference.normalized(raw.numpy(), np.ones((2, 3)))).float())
    assert_close(normalize_cam(cam), cam, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-20, 1e-10, 1e10, 1e30])
def test_a_faint_map_normalises_like_a_strong_one(size):
    raw = noise(0, 2, 3, 5, 6, dtype=torch.float32)
    assert_close(normalize_cam(raw * size), normalize_cam(raw))
    assert normalize_cam(raw * size).max() == 1


@pytest.mark.parametrize("level", [-1.0, 0.0, 2.5])
def test_a_flat_map_gives_zeros_and_no_gradient(level):
    raw = torch.full((1, 2, 3, 4), level)
    raw[:, 1] = torch.arange(12.0).reshape(3, 4)
    raw.requires_grad_()
    cam = normalize_cam(raw)
    (cam * noise(0, 1, 2, 3, 4, dtype=torch.float32)).sum().backward()
    assert cam[0, 0].eq(0).all() and raw.grad[0, 0].eq(0).all()
    assert raw.grad.isfinite().all() and raw.grad[0, 1].ne(0).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite_stays_so_and_is_undecided(value):
    raw = noise(0, 1, 3, 4, 5, dtype=torch.float32)
    wanted = normalize_cam(raw, labels=torch.tensor([[1, 0, 1]]))
    raw[0, :2, 1, 2] = value
    cam = normalize_cam(raw, labels=torch.tensor([[1, 0, 1]]))
    assert cam[0, 0, 1, 2].isnan() and not cam[0, 1].any()  # an absent class is zero whatever it holds
    assert torch.equal(cam[0, 2], wanted[0, 2])
    assert cam_to_label(cam, high=0.7, low=0.25)[0, 1, 2] == 255


def test_a_map_of_one_pixel_is_flat():
    assert normalize_cam(torch.full((1, 1, 1, 1), 3.0)).item() == 0


@given(st.floats(1e-6, 1e6), sides, sides, st.integers(1, 40), st.integers(1, 40), st.sampled_from([32, 64]))
def test_the_rounding_of_an_up_sampled_flat_map_is_flat(level, h, w, height, width, bits):
    raw = torch.full((1, 1, h, w), level, dtype=getattr(torch, f"float{bits}"))
    full = sum(F.interpolate(raw * f, size=(height, width), mode="bilinear") for f in (1.0, 0.3, 1.7))
    assert normalize_cam(full).eq(0).all()


def test_a_map_that_varies_little_is_not_flat():
    raw = 1 + 1e-5 * noise(0, 1, 1, 4, 4)
    assert_close(normalize_cam(raw), (raw - raw.min()) / (raw.max() - raw.min()))


@pytest.mark.parametrize("raw", [[1.0, 2.0, 3.0], [11.0, 21.0, 31.0]])
def test_the_minimum_is_taken_off_also_where_every_value_is_positive(raw):
    assert_close(normalize_cam(torch.tensor([[[raw]]])), torch.tensor([[[[0.0, 0.5, 1.0]]]]))


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([[True, False]]), torch.tensor([[1, 0]]), torch.tensor([[255, 0]], dtype=torch.uint8),
     torch.tensor([[0.51, 0.5]]), torch.tensor([[1.0, 0.0]], dtype=torch.float16)],
)  # fmt: skip
def test_a_class_is_present_above_one_half_in_any_dtype(labels):
    cam = normalize_cam(torch.tensor([[[[0.0, 2.0]], [[0.0, 2.0]]]]), labels=labels)
    assert_close(cam, torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]]), rtol=0, atol=0)


def test_maps_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"normalize_cam: expected `raw` of shape \(B, K, h, w\), got \(3, 4, 4\)"):
        normalize_cam(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"normalize_cam: expected `labels` of shape \(B=2, K=3\), got \(2, 4\)"):
        normalize_cam(torch.zeros(2, 3, 4, 4), labels=torch.ones(2, 4))
    with pytest.raises(TypeError, match="normalize_cam: expected `raw` of a floating dtype, got"):
        normalize_cam(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"normalize_cam: expected `mask` of shape \(B=2, h=4, w=5\), got \(2, 5, 4\)"):
        normalize_cam(torch.zeros(2, 3, 4, 5), mask=torch.ones(2, 5, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"normalize_cam: expected `mask` of dtype torch\.bool"):
        normalize_cam(torch.zeros(2, 3, 4, 4), mask=torch.ones(2, 4, 4))


@given(seeds, sides, sides)
def test_what_a_mask_leaves_out_of_a_map_is_zero_and_decides_nothing(seed, h, w):
    raw = noise(seed, 2, 3, h, w + 1) + 3
    mask = torch.arange(w + 1).expand(2, h, w + 1) < w
    raw[..., w] = torch.tensor([torch.nan, torch.inf, -9.0])[:, None]
    cam = normalize_cam(raw.requires_grad_(), mask=mask)
    assert_close(cam[..., :w], normalize_cam(raw[..., :w]), rtol=0, atol=0)
    assert not cam[..., w].any()
    (gradient,) = torch.autograd.grad(cam.square().sum(), raw)
    assert gradient.isfinite().all() and not gradient[..., w].any()
    assert not normalize_cam(raw, mask=torch.zeros_like(mask)).any()


# Several scales ---------------------------------------------------------------------------------------------------


def convolution(seed=0, classes=3, stride=4):
    """A network whose kernels are not symmetric: images -> raw maps, coarser than the image."""
    weight = noise(seed, classes, 3, 5, 5) / 5
    return lambda images: F.conv2d(images, weight.to(images.dtype), stride=stride, padding=2)


@settings(max_examples=15)
@given(
    seeds,
    st.integers(4, 14),
    st.integers(4, 14),
    st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0]), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_multi_scale_cam_is_that_of_the_loops(seed, height, width, scales, flip):
    images, labels = noise(seed, 2, 3, height, width).sigmoid(), some_labels(seed, 2, 4)
    fn = convolution(seed, classes=4)
    cam = multi_scale_cam(fn, images, scales=scales, flip=flip, labels=labels)
    want = reference.multi_scale_cam(
        lambda x: fn(torch.from_numpy(x.copy())).numpy(), images.numpy(), scales, flip, labels.numpy()
    )
    assert_close(cam, torch.from_numpy(want), rtol=0, atol=1e-9)


@given(seeds, st.permutations([0.5, 1.0, 1.5]), st.booleans(), st.booleans(), st.sampled_from([None, 4]))
def test_raw_maps_at_hand_give_the_same_and_are_not_made_again(seed, scales, flip, pair, bound):
    images, labels = noise(seed, 2, 3, 9, 13).sigmoid(), some_labels(seed, 2, 4)
    one, other = convolution(seed, classes=4), convolution(seed + 1, classes=4)
    asked = []

    def fn(x):
        asked.append(x)
        return (one(x), other(x)) if pair else one(x)

    given_raw = fn(images)
    settings = {"scales": scales, "flip": flip, "labels": labels, "max_present": bound}
    wanted = multi_scale_cam(fn, images, **settings)
    asked.clear()
    ours = multi_scale_cam(fn, images, raw=given_raw, **settings)
    for maps, others in zip(ours, wanted, strict=True) if pair else ((ours, wanted),):
        assert_close(maps, others, rtol=0, atol=1e-12)
    seen = [x for x in asked if x.shape[2:] == images.shape[2:]]
    assert len(asked) == (3 if flip else 2)
    assert [x.flip(3).equal(images) for x in seen] == [True] * flip


@given(seeds)
def test_a_mirrored_image_gives_the_mirrored_cam(seed):
    images, raw = noise(seed, 2, 3, 12, 17).sigmoid(), convolution(seed)

    def fn(x):
        return raw(x).exp()

    cam = multi_scale_cam(fn, images)
    assert_close(multi_scale_cam(fn, images.flip(3)), cam.flip(3), rtol=0, atol=1e-12)
    plain = multi_scale_cam(fn, images, flip=False)  # without the pair nothing makes it so
    assert (multi_scale_cam(fn, images.flip(3), flip=False) - plain.flip(3)).abs().max() > 1e-3


@given(seeds)
def test_present_classes_peak_at_one_and_absent_ones_are_zero(seed):
    labels = some_labels(seed, 3, 4)
    fn = convolution(seed, classes=4)
    cam = multi_scale_cam(lambda x: fn(x).exp(), noise(seed, 3, 3, 12, 16).sigmoid(), labels=labels)
    assert cam.shape == (3, 4, 12, 16) and cam.amin() == 0
    assert_close(cam.amax((2, 3)), labels.double(), rtol=0, atol=0)


@pytest.mark.parametrize("level", [-2.0, 0.0, 0.7])
def test_a_constant_raw_map_gives_no_cam_at_any_scale(level):
    constant = multi_scale_cam(lambda x: torch.full((x.shape[0], 2, 3, 5), level), torch.rand(1, 3, 21, 35))
    assert_close(constant, torch.zeros(1, 2, 21, 35), rtol=0, atol=0)


@given(seeds, st.integers(1, 5), st.booleans())
def test_a_bound_of_the_present_classes_changes_nothing(seed, bound, flip):
    labels = some_labels(seed, 3, 5, share=0.6)
    labels[:, bound:] = False
    labels = labels[:, torch.randperm(5, generator=torch.Generator().manual_seed(seed))]
    images, fn = noise(seed, 3, 3, 8, 12).sigmoid(), convolution(seed, classes=5)
    full = multi_scale_cam(fn, images, labels=labels, flip=flip)
    assert_close(multi_scale_cam(fn, images, labels=labels, flip=flip, max_present=bound), full)


def test_a_batch_without_any_class_has_the_bound_zero():
    images, labels = torch.rand(2, 3, 8, 12), torch.zeros(2, 3)
    cam = multi_scale_cam(convolution(), images, labels=labels, max_present=int(labels.sum(1).max()))
    assert_close(cam, torch.zeros(2, 3, 8, 12), rtol=0, atol=0)


def test_a_tuple_of_maps_comes_back_as_a_tuple_each_as_alone():
    images, a, b = noise(0, 2, 3, 12, 16).sigmoid(), convolution(1, classes=4), convolution(2, classes=4, stride=3)
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    both = multi_scale_cam(lambda x: (a(x), b(x)), images, labels=labels, max_present=2)
    assert isinstance(both, tuple) and len(both) == 2
    for cam, fn in zip(both, (a, b), strict=True):
        assert_close(cam, multi_scale_cam(fn, images, labels=labels))
    (single,) = multi_scale_cam(lambda x: (a(x),), images, labels=labels)
    assert isinstance(multi_scale_cam(a, images), torch.Tensor)
    assert_close(single, both[0])


@given(st.permutations([0.5, 1.0, 1.5]))
def test_the_order_of_the_scales_does_not_matter(scales):
    images = noise(0, 1, 3, 12, 16).sigmoid()
    assert_close(multi_scale_cam(convolution(), images, scales=scales), multi_scale_cam(convolution(), images))


def test_one_scale_without_the_mirror_is_the_normalised_map():
    images = torch.rand(2, 3, 6, 7)
    cam = multi_scale_cam(lambda x: x - 0.5, images, scales=(1,), flip=False)
    assert_close(cam, normalize_cam(images - 0.5), rtol=0, atol=0)


def test_scales_are_summed_after_the_relu_and_the_flip_pair_is_a_maximum():
    # Maxima of the pairs: (1, -1, 3) and (2, 4, 0); after ReLU they sum to (3, 4, 3). Without ReLU before the sum it
    # is (3, 3, 3), flat; sums of the pairs give (1, 5, 3), a maximum over scales (2, 4, 3).
    answers = iter([([1.0, -3.0, 3.0], [-2.0, -1.0, 0.0]), ([2.0, 1.0, 0.0], [0.0, 4.0, -1.0])])

    def fn(images):
        seen, unmirrored = next(answers)
        return torch.tensor([seen, unmirrored[::-1]])[:, None, None]

    cam = multi_scale_cam(fn, torch.rand(1, 3, 1, 3), scales=(1.0, 1.0))
    assert_close(cam, torch.tensor([[[[0.0, 1.0, 0.0]]]]), rtol=0, atol=0)


def test_the_network_sees_each_scale_once_with_the_mirror_in_the_batch():
    seen = []

    def fn(images):
        seen.append(images)
        return images[:, :1]

    images = torch.rand(2, 3, 10, 14)
    multi_scale_cam(fn, images, scales=(1.0, 0.5, 1.5))
    assert [tuple(x.shape) for x in seen] == [(4, 3, 10, 14), (4, 3, 5, 7), (4, 3, 15, 21)]
    assert_close(seen[0], torch.cat([images, images.flip(3)]), rtol=0, atol=0)
    assert_close(seen[1][2:], seen[1][:2].flip(3), rtol=0, atol=0)
    seen.clear()
    multi_scale_cam(fn, images, scales=(2.0,), flip=False)
    assert [tuple(x.shape) for x in seen] == [(2, 3, 20, 28)]


def test_bytes_are_floats_of_255():
    images = torch.randint(0, 256, (2, 3, 12, 16), dtype=torch.uint8)
    assert_close(to_float(images), images / 255, rtol=0, atol=0)
    assert to_float(images / 255).max() <= 1
    raw = convolution()
    assert_close(multi_scale_cam(lambda x: raw(x).exp(), images), multi_scale_cam(lambda x: raw(x).exp(), images / 255))


def test_no_gradient_no_change_of_mode_and_nothing_edited():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.Dropout(0.5))
    net[1].eval()
    images, kept = torch.rand(1, 3, 8, 8, requires_grad=True), torch.randn(2, 2, 8, 8)
    before, modes = kept.clone(), []

    def fn(x):
        modes.append((net.training, net[1].training))
        net(x)
        return kept

    cam = multi_scale_cam(fn, images)
    assert not cam.requires_grad and not multi_scale_cam(net, images).requires_grad
    assert images.grad is None and net[0].weight.grad is None
    assert set(modes) == {(True, False)} and (net.training, net[1].training) == (True, False)
    assert_close(kept, before, rtol=0, atol=0)  # a map of the network's own, of the image's size, is not written to
    assert torch.is_grad_enabled()


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("of_maps", FLOATS)
@pytest.mark.parametrize("of_images", [*FLOATS, torch.uint8])
def test_cams_come_in_the_wider_precision_of_images_and_maps(of_images, of_maps):
    images = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    images = images if of_images == torch.uint8 else (images / 255).to(of_images)
    cam = multi_scale_cam(lambda x: x[:, :, ::4, ::4].to(of_maps), images)
    wider = torch.promote_types(torch.float32 if of_images == torch.uint8 else of_images, of_maps)
    assert cam.dtype == wider and cam.isfinite().all() and cam.max() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision_are_summed_in_single_and_rounded_once(dtype):
    images = noise(0, 2, 3, 24, 32, dtype=dtype).sigmoid()
    maps = {(24, 32): noise(1, 4, 3, 6, 8, dtype=dtype), (12, 16): noise(2, 4, 3, 3, 4, dtype=dtype)}
    halves, exact = (
        multi_scale_cam(lambda x, to=to: maps[tuple(x.shape[2:])].to(to), images.to(to), scales=(1.0, 0.5))
        for to in (dtype, torch.float64)
    )
    step = torch.finfo(dtype).eps / 2  # the most that one rounding moves a number in [0, 1]
    assert_close(halves.double(), exact, rtol=0, atol=step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_keeps_the_autocast_of_its_caller_and_trains_after_it(dtype):
    net, images = torch.nn.Conv2d(3, 2, 3, padding=1), torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert net(images).dtype == dtype and multi_scale_cam(net, images).dtype == torch.float32
        multi_scale_cam(net, images)
        net(images).float().square().sum().backward()
    assert net.weight.grad is not None and net.weight.grad.ne(0).any()
    assert multi_scale_cam(net, images).dtype == torch.float32


@pytest.mark.parametrize("scales", [0.5, np.array([1.0, 0.5])])
def test_scales_that_are_no_tuple_are_refused(scales):
    kind = type(scales).__name__
    said = rf"^multi_scale_cam: expected `scales` to be a tuple of factors, such as \(1\.0, 0\.5\), got {kind}\.$"
    with pytest.raises(TypeError, match=said):
        multi_scale_cam(lambda x: x, torch.rand(1, 3, 8, 8), scales=scales)


def test_an_image_of_one_pixel_has_a_flat_cam():
    assert_close(multi_scale_cam(lambda x: x, torch.rand(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1), rtol=0, atol=0)


def test_maps_that_carry_a_tangent_themselves_give_none():
    with dual_level():
        weight = make_dual(torch.ones(2, 3, 1, 1), torch.ones(2, 3, 1, 1))
        cam = multi_scale_cam(lambda pixels: F.conv2d(F.avg_pool2d(pixels, 2), weight), torch.rand(1, 3, 8, 8))
        assert unpack_dual(cam).tangent is None


def test_maps_that_need_a_gradient_themselves_serve_many_scales():
    """Grad-CAM: the weights of the maps are gradients of the scores."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    def grad_cam(pixels):
        with torch.enable_grad():
            features = F.avg_pool2d(pixels, 8).requires_grad_()
            scores = torch.einsum("kd,bdhw->bk", weight, features)
            slopes = [torch.autograd.grad(score.sum(), features, retain_graph=True)[0] for score in scores.T]
        return torch.stack([(slope * features.detach()).sum(1) for slope in slopes], 1)

    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    wanted = multi_scale_cam(lambda pixels: torch.einsum("kd,bdhw->bkhw", weight, F.avg_pool2d(pixels, 8)), images)
    assert_close(multi_scale_cam(grad_cam, images), wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_images_of_another_dtype_are_refused(dtype):
    images = torch.ones(1, 3, 8, 8, dtype=dtype)
    for name, call in {
        "multi_scale_cam": lambda: multi_scale_cam(lambda x: x, images),
        "refine_label": lambda: ffr.refine_label(images, torch.rand(1, 2, 8, 8), torch.ones(1, 2)),
        "PixelAdaptiveRefinement": lambda: ffr.PixelAdaptiveRefinement((1,), 1)(images, torch.rand(1, 2, 8, 8)),
        "PixelAdaptiveRefinement.affinity": lambda: ffr.PixelAdaptiveRefinement((1,), 1).affinity(images),
        "dense_energy_loss": lambda: ffr.DenseEnergyLoss()(torch.rand(1, 2, 8, 8), torch.zeros(1, 8, 8).long(),
                                                           images=images),
    }.items():  # fmt: skip
        with pytest.raises(TypeError, match=rf"{name}: expected `images` as uint8 or float in \[0, 1\], got {dtype}"):
            call()


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 4, 8, 8), {}, "multi_scale_cam: expected `images` of shape (B, 3, H, W), got (2, 4, 8, 8)."),
        ((3, 8, 8), {}, "multi_scale_cam: expected `images` of shape (B, 3, H, W), got (3, 8, 8)."),
        ((2, 3, 8, 8), {"scales": ()}, "multi_scale_cam: expected `scales` with at least one factor, got ()."),
        ((2, 3, 8, 8), {"scales": (1.0, 0.0)}, "multi_scale_cam: expected `scales` in [0.001, 100], got 0.0."),
        ((2, 3, 8, 8), {"scales": (-1.0,)}, "multi_scale_cam: expected `scales` in [0.001, 100], got -1.0."),
        ((2, 3, 8, 8), {"max_present": 2}, "multi_scale_cam: `max_present` needs `labels`. Pass labels"),
        ((2, 3, 8, 8), {"raw": torch.rand(1, 4, 2, 2)}, "expected `raw` of shape (B=2, K, h, w), got (1, 4, 2, 2)."),
        ((2, 3, 8, 8), {"labels": torch.ones(3, 3)}, "expected `labels` of shape (B=2, K), got (3, 3)."),
        ((2, 3, 8, 8), {"labels": torch.ones(2, 4)}, "`fn`: expected `maps` of shape (B=4, K=4, h, w), got (4, 3"),
        ((2, 3, 8, 8), {"labels": torch.ones(2, 3), "max_present": 4}, "expected `max_present` in [0, 3], got 4."),
    ],
)  # fmt: skip
def test_images_scales_and_labels_that_do_not_fit_are_refused(shape, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        multi_scale_cam(lambda x: x, torch.rand(shape), **settings)


def test_maps_that_the_network_gives_in_another_form_are_refused():
    with pytest.raises(ValueError, match=r"result of `fn`: expected `maps` of shape \(B=4, K, h, w\), got \(2, 3"):
        multi_scale_cam(lambda x: x[:2], torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"multi_scale_cam: result of `fn`: expected `maps` .*, got \(4, 192\)"):
        multi_scale_cam(lambda x: x.flatten(1), torch.rand(2, 3, 8, 8))
    for result, name in ((None, "NoneType"), ({"cam": torch.rand(4, 3, 8, 8)}, "dict")):
        with pytest.raises(
            TypeError, match=rf"multi_scale_cam: expected maps .* from `fn`, got {name}\. Return the raw"
        ):
            multi_scale_cam(lambda x, result=result: result, torch.rand(2, 3, 8, 8))


def test_a_scale_rounds_the_sides_down_and_leaves_a_pixel():
    assert scaled_size((425, 640), 1.25) == (531, 800)
    assert scaled_size((375, 500), 0.5) == (187, 250)
    assert scaled_size((100, 1), 0.29) == (29, 1)  # 28.999999999999996 in floating point
    assert scaled_size((2001, 1), 0.9995) == (1999, 1)  # 1999.9995, rounded down
    seen = []
    multi_scale_cam(lambda x: seen.append(tuple(x.shape[2:])) or x[:, :1], torch.rand(1, 3, 9, 15), scales=(0.5, 1.5))
    assert seen == [(4, 7), (13, 22)]


# Label maps -------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1), st.floats(0, 1), st.sampled_from([255, -1, 99]))
def test_the_label_map_is_that_of_the_loops(seed, a, b, ignore):
    cam = (noise(seed, 2, 3, 4, 5) / 2).clamp(0, 1)
    low, high = sorted((a, b))
    label = cam_to_label(cam, high=high, low=low, ignore_index=ignore)
    assert label.dtype == torch.int64
    assert_close(label, torch.from_numpy(reference.label_map(cam.numpy(), high, low, ignore)))


def test_a_threshold_itself_belongs_to_the_lower_side():
    cam = torch.tensor([[[[0.0, 0.25, 0.251, 0.75, 0.751, 1.0]]]])
    assert cam_to_label(cam, high=0.75, low=0.25).tolist() == [[[0, 0, 255, 255, 1, 1]]]
    assert cam_to_label(cam, background=0.75).tolist() == [[[0, 0, 0, 0, 1, 1]]]


@given(seeds, st.sampled_from([torch.bool, torch.uint8, torch.float32]))
def test_with_labels_an_absent_class_is_no_candidate_however_high_its_peak(seed, dtype):
    cam = normalize_cam(noise(seed, 2, 4, 6, 6))  # every class, as hosts do: each peak is 1
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]).to(dtype)
    label = cam_to_label(cam, labels=labels, high=0.7, low=0.25)
    assert_close(label, cam_to_label(cam * labels.to(cam.dtype)[:, :, None, None], high=0.7, low=0.25))
    assert not torch.equal(label, cam_to_label(cam, high=0.7, low=0.25)) and label[1].eq(0).all()


def test_equal_classes_go_to_the_first():
    assert cam_to_label(torch.tensor([[[[0.2]], [[0.9]], [[0.9]]]]), background=0.5).item() == 2


@given(seeds, st.floats(0, 1))
def test_one_threshold_is_a_pair_of_equal_ones(seed, threshold):
    cam = noise(seed, 1, 3, 6, 6).clamp(0, 1)
    label = cam_to_label(cam, background=threshold)
    assert_close(label, cam_to_label(cam, high=threshold, low=threshold))
    assert label.ne(255).all()


def test_an_image_without_any_activation_is_background_at_every_threshold():
    assert cam_to_label(torch.zeros(1, 3, 4, 4), high=0.7, low=0.0).eq(0).all()
    assert cam_to_label(torch.zeros(1, 3, 4, 4), background=0.0).eq(0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "cam_to_label: expected either `background`, or `high` and `low`, got background=None, high=None,"),
        ({"high": 0.7}, "expected either `background`, or `high` and `low`, got background=None, high=0.7, low=None."),
        ({"low": 0.7}, "expected either `background`, or `high` and `low`, got background=None, high=None, low=0.7."),
        ({"background": 0.5, "high": 0.7, "low": 0.2}, "expected either `background`, or `high` and"),
        ({"background": 1.5}, "cam_to_label: expected `background` in [0, 1], got 1.5."),
        ({"high": 1.5, "low": 0.2}, "cam_to_label: expected `high` in [0, 1], got 1.5."),
        ({"high": 0.5, "low": 0.6}, "cam_to_label: expected `low` in [0, 0.5], got 0.6."),
        ({"high": 0.5, "low": -0.1}, "cam_to_label: expected `low` in [0, 0.5], got -0.1."),
        ({"high": float("nan"), "low": 0.1}, "cam_to_label: expected `high` in [0, 1], got nan."),
        (
            {"background": 0.5, "labels": torch.ones(1, 2)},
            "cam_to_label: expected `labels` of shape (B=1, K=3), got (1, 2).",
        ),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cam_to_label(torch.zeros(1, 3, 4, 4), **settings)


def test_a_map_without_a_class_axis_is_refused():
    with pytest.raises(ValueError, match=r"cam_to_label: expected `cam` of shape \(B, K, H, W\), got \(3, 4, 4\)"):
        cam_to_label(torch.zeros(3, 4, 4), background=0.5)


def test_a_label_map_in_the_place_of_a_cam_is_refused():
    with pytest.raises(TypeError, match=r"cam_to_label: expected `cam` of a floating dtype, got torch\.int64"):
        cam_to_label(torch.ones(1, 2, 4, 4, dtype=torch.long), background=0.5)


@given(seeds, st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_a_label_map_becomes_a_cam_and_comes_back(seed, dtype):
    label = torch.randint(0, 5, (2, 4, 6), generator=torch.Generator().manual_seed(seed)).to(dtype)
    cam = label_to_cam(label, num_classes=4)
    assert cam.dtype == torch.float32
    for k in range(4):
        assert_close(cam[:, k], (label == k + 1).float(), rtol=0, atol=0)
    assert_close(cam_to_label(cam, background=0.5), label.long())


def test_values_that_are_no_class_belong_to_none():
    assert label_to_cam(torch.tensor([[[0, 255, -1, 3]]]), num_classes=2).eq(0).all()


def test_label_maps_of_another_rank_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"label_to_cam: expected `label` of shape \(B, H, W\), got \(4, 6\)"):
        label_to_cam(torch.zeros(4, 6, dtype=torch.long), num_classes=2)
    with pytest.raises(TypeError, match="label_to_cam: expected `label` of an integer dtype, got"):
        label_to_cam(torch.zeros(1, 4, 6), num_classes=2)
    with pytest.raises(ValueError, match=r"label_to_cam: expected `num_classes` in \[1, inf\], got 0"):
        label_to_cam(torch.zeros(1, 4, 6, dtype=torch.long), num_classes=0)


# Maps at the image ------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([3, 5, 7]), st.integers(1, 30), st.integers(1, 30))
def test_a_token_stays_over_its_own_pixels_on_a_padded_grid(seed, patch, height, width):
    h, w = -(-height // patch), -(-width // patch)
    maps = noise(seed, 2, 3, h, w)
    full = to_image(maps, (height, width), patch)
    assert full.shape == (2, 3, height, width)
    centres = full[:, :, patch // 2 :: patch, patch // 2 :: patch]  # of an odd patch: bilinear weights are 1 and 0
    assert_close(centres, maps[:, :, : centres.shape[2], : centres.shape[3]])


def test_a_padded_grid_is_resized_whole_and_then_cropped():
    maps = noise(0, 1, 2, 7, 9)
    whole = torch.from_numpy(reference.resized(maps.numpy(), (7 * 16, 9 * 16)))
    assert_close(to_image(maps, (112, 144), 16), whole)
    assert_close(to_image(maps, (100, 130), 16), whole[:, :, :100, :130])


def test_maps_of_another_image_are_refused():
    message = "to_image: expected `maps` of shape (B, C, h=7, w=9), got (1, 3, 9, 7). Pass the size of the image"
    with pytest.raises(ValueError, match=re.escape(message) + r".*100 x 130 has 7 x 9 patches\."):
        to_image(torch.zeros(1, 3, 9, 7), (100, 130), 16)


# Present classes --------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6))
def test_present_classes_come_first_and_each_class_once(seed, count):
    labels = some_labels(seed, 4, count)
    ids, present = present_classes(torch.where(labels, 0.51, 0.5))
    assert present.dtype == torch.bool
    for b in range(4):
        named = labels[b].nonzero().flatten().tolist()
        assert ids[b, : len(named)].tolist() == named
        assert sorted(ids[b].tolist()) == list(range(count))
        assert present[b].tolist() == [True] * len(named) + [False] * (count - len(named))
    for bound in range(1, count + 1):
        few, there = present_classes(labels, bound)
        assert_close(few, ids[:, :bound])
        assert_close(there, present[:, :bound])


@given(seeds, st.integers(1, 5), st.sampled_from([(), (3,), (2, 3)]))
def test_what_is_taken_is_put_back_in_its_place(seed, bound, rest):
    labels = some_labels(seed, 3, 5)
    x = noise(seed, 3, 5, *rest)
    ids, _ = present_classes(labels, bound)
    rows = take_classes(x, ids)
    back = put_classes(rows, ids, 5)
    assert rows.shape == (3, bound, *rest) and back.shape == x.shape
    for b in range(3):
        for k in range(5):
            taken = k in ids[b].tolist()
            assert_close(back[b, k], x[b, k] if taken else torch.zeros_like(x[b, k]), rtol=0, atol=0)
    assert_close(put_classes(take_classes(x > 0, ids), ids, 5), (back > 0), rtol=0, atol=0)


@pytest.mark.parametrize("bound", [-1, 6])
def test_a_bound_outside_the_number_of_classes_is_refused(bound):
    message = rf"present_classes: expected `max_present` in \[0, 5\], got {bound}. `labels` has K=5 classes\."
    with pytest.raises(ValueError, match=message):
        present_classes(torch.ones(2, 5), bound)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.rand(2, 3, 4, 4), "expected `raw` of shape (B=2, K=4, h, w), got (2, 3, 4, 4)"),
        (torch.rand(2, 4, 5, 5), "expected `raw` in the form of `fn`, maps of [(2, 4, 4, 4)], got [(2, 4, 5, 5)]"),
        ((torch.rand(2, 4, 4, 4),), "expected `raw` in the form of `fn`"),
        ((torch.rand(2, 4, 4, 4),) * 2, "expected `raw` in the form of `fn`"),
    ],
)
def test_raw_maps_of_another_form_than_the_networks_are_refused(raw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        multi_scale_cam(lambda x: torch.rand(len(x), 4, 4, 4), torch.rand(2, 3, 8, 8), labels=torch.ones(2, 4), raw=raw)


@pytest.mark.parametrize("ignore_index", [0, 2, 3])
def test_an_ignore_index_that_is_a_label_is_refused(ignore_index):
    with pytest.raises(
        ValueError, match=rf"cam_to_label: expected `ignore_index` to be no label in 0..3.*got {ignore_index}"
    ):
        cam_to_label(torch.rand(1, 3, 4, 4), high=0.7, low=0.2, ignore_index=ignore_index)
    assert cam_to_label(torch.full((1, 3, 1, 1), 0.5), high=0.7, low=0.2, ignore_index=-1).item() == -1
