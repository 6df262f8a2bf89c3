"""Class prototypes from an image's own CAM, and the similarity of tokens to them."""

import re

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from ffr import ClassPrototypes, class_prototypes, similarity_maps
from ffr.cam import to_image

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 5)
thresholds = st.sampled_from([0.0, 0.3, 0.7, 1.0])
EXACT = {"rtol": 0, "atol": 0}


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chance(seed, *shape, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def as_tokens(x):
    return x.flatten(2).transpose(1, 2)


@st.composite
def scenes(draw, classes=4):
    """Features, a raw CAM on their grid, labels with any number of classes, and a mask that hides any of the tokens."""
    seed, images, h, w = draw(seeds), draw(st.integers(1, 3)), draw(sides), draw(sides)
    labels, mask = chance(seed, images, classes), chance(seed + 1, images, h, w, share=0.7)
    return noise(seed, images, 3, h, w), noise(seed + 1, images, classes, h, w), labels, mask


# Prototypes: laws -------------------------------------------------------------------------------------------------


@given(scenes(), thresholds, st.booleans())
def test_prototypes_are_those_of_a_loop_over_images_classes_and_tokens(scene, threshold, masked):
    features, cam, labels, mask = scene
    mask = mask if masked else None
    vectors, valid = class_prototypes(features, cam, labels, seed_threshold=threshold, mask=mask)
    numbers = (features.numpy(), cam.numpy(), labels.numpy(), threshold, None if mask is None else mask.numpy())
    expected_vectors, expected_valid = map(torch.from_numpy, reference.prototypes(*numbers))
    assert torch.equal(valid, expected_valid)
    assert_close(vectors, expected_vectors, rtol=0, atol=1e-12)


@given(scenes(), st.integers(1, 9), st.integers(1, 9))
def test_a_cam_of_any_size_is_shrunk_to_the_grid_by_area(scene, high, wide):
    features, _, labels, _ = scene
    h, w = features.shape[2:]
    assume(h == w or high * h != wide * w)
    cam = noise(7, labels.shape[0], 4, high, wide)
    small = torch.from_numpy(reference.shrunk(cam.relu().numpy(), *features.shape[2:]))
    ours, theirs = class_prototypes(features, cam, labels), class_prototypes(features, small, labels)
    assert torch.equal(ours.valid, theirs.valid)
    assert_close(ours.vectors, theirs.vectors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sides", [(6, 4), (96, 64)])
def test_a_cam_whose_sides_are_those_of_the_grid_exchanged_is_refused(sides):
    x, cam, labels = noise(0, 1, 24, 3), noise(1, 1, 2, *sides), torch.ones(1, 2)
    said = rf"^class_prototypes: expected `cam` with the proportions of the grid, 4 x 6, got {sides[0]} x {sides[1]}\."
    with pytest.raises(ValueError, match=said):
        class_prototypes(x, cam, labels, grid=(4, 6))
    assert class_prototypes(x, cam, labels, grid=(6, 4)).valid.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_cam_that_is_not_finite_gives_no_prototype_and_leaves_the_others(value):
    x, cam, labels = noise(0, 1, 3, 4, 4), noise(1, 1, 2, 4, 4), torch.ones(1, 2)
    wanted = class_prototypes(x, cam, labels)
    cam[0, 1, 2, 2] = value
    vectors, valid = class_prototypes(x, cam, labels)
    assert valid.tolist() == [[True, False]]
    assert_close(vectors, wanted.vectors * valid[..., None], **EXACT)


@given(scenes(), thresholds)
def test_a_raw_and_a_normalised_cam_give_the_same(scene, threshold):
    features, cam, labels, _ = scene
    cam[..., 0, 0] = -1  # somewhere nothing, so that min-max moves no zero
    peak = cam.relu().amax((2, 3), keepdim=True)
    normalised = cam.relu() / torch.where(peak > 0, peak, 1) * labels[..., None, None]
    ours = class_prototypes(features, cam * 37, labels, seed_threshold=threshold)
    theirs = class_prototypes(features, normalised, labels, seed_threshold=threshold)
    assert torch.equal(ours.valid, theirs.valid)
    assert_close(ours.vectors, theirs.vectors, rtol=0, atol=1e-12)


@given(scenes(), thresholds)
def test_a_bound_on_the_classes_present_changes_nothing(scene, threshold):
    features, cam, labels, mask = scene
    whole = class_prototypes(features, cam, labels, seed_threshold=threshold, mask=mask)
    bound = int(labels.sum(1).max())
    for most in {bound, 4}:
        short = class_prototypes(features, cam, labels, seed_threshold=threshold, mask=mask, max_present=most)
        assert torch.equal(short.valid, whole.valid)
        assert_close(short.vectors, whole.vectors, rtol=0, atol=1e-13)


@given(scenes(), thresholds)
def test_tokens_and_maps_give_the_same_prototypes(scene, threshold):
    features, cam, labels, mask = scene
    settings = {"seed_threshold": threshold, "mask": mask}
    ours = class_prototypes(as_tokens(features), cam, labels, grid=features.shape[2:], **settings)
    assert_close(ours, class_prototypes(features, cam, labels, **settings), rtol=0, atol=1e-13)


@given(scenes(), thresholds)
def test_a_masked_token_has_no_say(scene, threshold):
    features, cam, labels, mask = scene
    other = torch.where(mask[:, None], features, 1e3), torch.where(mask[:, None], cam, 1e3)
    ours = class_prototypes(*other, labels, seed_threshold=threshold, mask=mask)
    assert_close(ours, class_prototypes(features, cam, labels, seed_threshold=threshold, mask=mask), **EXACT)


@given(scenes(), thresholds)
def test_a_prototype_lies_within_the_tokens_and_an_invalid_one_is_zero(scene, threshold):
    features, cam, labels, _ = scene
    vectors, valid = class_prototypes(features, cam, labels, seed_threshold=threshold)
    low, high = features.amin((2, 3))[:, None], features.amax((2, 3))[:, None]
    inside = ((vectors >= low - 1e-12) & (vectors <= high + 1e-12)).all(-1)
    assert torch.equal(inside | ~valid, torch.ones_like(valid))
    assert torch.equal(vectors[~valid], torch.zeros_like(vectors[~valid]))
    assert not (valid & ~labels).any()


@given(scenes())
def test_labels_of_any_dtype_mean_present_above_one_half(scene):
    features, cam, labels, _ = scene
    expected = class_prototypes(features, cam, labels)
    for same in (labels.long(), labels.bfloat16(), torch.where(labels, 0.51, 0.5)):
        assert_close(class_prototypes(features, cam, same), expected, **EXACT)


# Prototypes: known answers ----------------------------------------------------------------------------------------


def test_several_classes_of_one_image_and_of_one_patch_by_hand():
    features = torch.tensor([[[[1.0, 2.0, 4.0, 8.0]]]])
    cam = torch.tensor([[[[10.0, 7.2, 6.8, 0.0]], [[0.0, 4.0, 0.0, 4.0]], [[1.0, 1.0, 1.0, 1.0]], [[-1.0] * 4]]])
    vectors, valid = class_prototypes(features, cam, torch.tensor([[1, 1, 0, 1]]))
    # (1 x 1 + 0.72 x 2) / 1.72; the third share is below the threshold. The second patch counts for both classes.
    assert_close(vectors, torch.tensor([[[2.44 / 1.72], [5.0], [0.0], [0.0]]]))
    assert valid.tolist() == [[True, True, False, False]]  # absent; and present without a seed


@pytest.mark.parametrize(("threshold", "seeds"), [(0.0, 3), (0.5, 3), (0.51, 2), (0.75, 2), (0.76, 1), (1.0, 1)])
def test_the_threshold_is_a_share_of_the_peak_and_belongs_to_the_seeds(threshold, seeds):
    features, cam = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[8.0, 6.0, 4.0]]]])
    vectors = class_prototypes(features, cam, torch.ones(1, 1), seed_threshold=threshold).vectors
    assert_close(vectors.item(), {1: 1.0, 2: 20 / 14, 3: 32 / 18}[seeds], rtol=1e-6, atol=0)


def test_a_pixel_cam_counts_by_area_before_its_peak_is_taken():
    cam = torch.zeros(1, 1, 4, 8)
    cam[..., :2, :2] = 1  # a whole cell
    cam[..., 2, 4] = 3  # the highest pixel, alone in a cell: 0.75 of the first
    features = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 5.0, 0]]]])
    assert_close(class_prototypes(features, cam, torch.ones(1, 1)).vectors, torch.full((1, 1, 1), 4.75 / 1.75))
    assert_close(class_prototypes(features, cam, torch.ones(1, 1), seed_threshold=0.8).vectors, torch.ones(1, 1, 1))


@pytest.mark.parametrize("most", [None, 0])
def test_no_class_at_all_gives_zeros_and_zero_gradients(most):
    features = noise(0, 1, 3, 4, 5).requires_grad_()
    vectors, valid = class_prototypes(features, noise(1, 1, 2, 4, 5), torch.zeros(1, 2), max_present=most)
    vectors.sum().backward()
    assert not valid.any()
    assert_close((vectors, features.grad), (torch.zeros_like(vectors), torch.zeros_like(features)), **EXACT)


@pytest.mark.parametrize("cam", [torch.zeros(1, 1, 4, 5), -torch.ones(1, 1, 4, 5)])
def test_a_present_class_without_a_seed_is_not_valid(cam):
    vectors, valid = class_prototypes(noise(0, 1, 3, 4, 5), cam, torch.ones(1, 1))
    assert not valid.any()
    assert_close(vectors, torch.zeros(1, 1, 3).double(), **EXACT)


@pytest.mark.parametrize(("size", "patch"), [((100, 100), 16), ((99, 52), 16), ((17, 33), 8), ((32, 48), 16)])
def test_a_cam_of_an_image_with_broken_patches_gives_the_prototype_of_its_token(size, patch):
    """One class a token, whose CAM has its peak there."""
    h, w = (-(-side // patch) for side in size)
    features, raw = noise(0, 1, 3, h, w), torch.eye(h * w, dtype=torch.float64).reshape(1, h * w, h, w)
    labels = torch.ones(1, h * w)
    wanted = class_prototypes(features, raw, labels, seed_threshold=0.99)
    at_pixels = to_image(raw, size, patch)
    assert_close(class_prototypes(features, at_pixels, labels, seed_threshold=0.99, patch_size=patch), wanted)
    assert_close(class_prototypes(features, raw, labels, seed_threshold=0.99, patch_size=patch), wanted)
    module = ClassPrototypes(0.99)(as_tokens(features), at_pixels, labels, grid=(h, w), patch_size=patch)
    assert_close(module, wanted)


def test_a_masked_token_may_hold_anything():
    x, cam, labels = noise(0, 2, 3, 4, 5), noise(1, 2, 3, 4, 5), torch.ones(2, 3)
    mask = chance(2, 2, 4, 5, share=0.7)
    wanted = class_prototypes(x, cam, labels, mask=mask)
    for broken in (torch.where(mask[:, None], x, torch.nan), torch.where(mask[:, None], x, torch.inf)):
        broken.requires_grad_()
        ours = class_prototypes(broken, cam, labels, mask=mask)
        assert_close(ours, wanted)
        assert_close(class_prototypes(as_tokens(broken), cam, labels, mask=mask, grid=(4, 5)), wanted)
        assert torch.autograd.grad(ours.vectors.sum(), broken)[0].isfinite().all()


def test_a_class_seen_by_masked_tokens_only_is_not_valid():
    cam = torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]]]])
    mask = torch.tensor([[[False, True]]])
    vectors, valid = class_prototypes(torch.tensor([[[[3.0, 7.0]]]]), cam, torch.ones(1, 2), mask=mask)
    assert valid.tolist() == [[False, True]]
    assert vectors.flatten().tolist() == [0, 7]


def test_a_flat_cam_gives_the_mean_token():
    features = noise(0, 2, 3, 4, 5)
    vectors, valid = class_prototypes(features, torch.full((2, 1, 4, 5), 1e-30), torch.ones(2, 1))
    assert valid.all()
    assert_close(vectors, features.mean((2, 3))[:, None])


def test_gradient_flows_through_the_seed_tokens_and_never_through_the_cam():
    features, cam = torch.zeros(1, 1, 1, 4).requires_grad_(), torch.tensor([[[[4.0, 3.0, 2.0, -9.0]]]]).requires_grad_()
    class_prototypes(features, cam, torch.ones(1, 1)).vectors.sum().backward()
    assert cam.grad is None
    assert_close(features.grad, torch.tensor([[[[4 / 7, 3 / 7, 0.0, 0.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_on_large_tokens(dtype):
    features = torch.full((1, 8, 28, 28), 6e4, dtype=dtype)  # a sum of two overflows fp16
    vectors, valid = class_prototypes(features, torch.rand(1, 2, 28, 28), torch.ones(1, 2), seed_threshold=0)
    assert vectors.dtype == dtype
    assert valid.all()
    assert_close(vectors.double(), torch.full((1, 2, 8), 6e4).double(), rtol=1e-2, atol=0)


def test_the_module_is_the_function_with_its_threshold_bound():
    features, cam, labels = noise(0, 2, 3, 4, 5), noise(1, 2, 6, 16, 20), chance(2, 2, 6)
    prototypes = ClassPrototypes(seed_threshold=0.2)
    expected = class_prototypes(features, cam, labels, seed_threshold=0.2)
    assert_close(prototypes(features, cam, labels), expected, **EXACT)
    mask = chance(3, 2, 4, 5)
    ours = prototypes(as_tokens(features), cam, labels, mask=mask, grid=(4, 5), max_present=6)
    assert_close(ours, class_prototypes(features, cam, labels, seed_threshold=0.2, mask=mask))
    short = class_prototypes(features, cam, labels, seed_threshold=0.2, max_present=1)  # a bound that is too low
    assert_close(prototypes(features, cam, labels, max_present=1), short, **EXACT)
    assert not torch.equal(short.valid, expected.valid)
    assert ClassPrototypes().seed_threshold == 0.7
    assert repr(prototypes) == "ClassPrototypes(seed_threshold=0.2)"


# Similarity -------------------------------------------------------------------------------------------------------


@given(scenes(), st.integers(1, 4))
def test_similarity_is_the_cosine_of_every_token_and_prototype(scene, classes):
    features = scene[0]
    vectors = noise(9, features.shape[0], classes, 3)
    expected = torch.from_numpy(reference.similarity(features.numpy(), vectors.numpy()))
    assert_close(similarity_maps(features, vectors), expected, rtol=0, atol=1e-12)
    ours = similarity_maps(as_tokens(features), vectors, grid=features.shape[2:])
    assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_second_derivatives_and_transforms_pass_the_similarity(layout):
    x, vectors = noise(0, 2, 3, 2, 2), noise(1, 2, 2, 3)
    x, grid = (x, None) if layout == "maps" else (as_tokens(x).contiguous(), (2, 2))

    def f(x, vectors):
        return similarity_maps(x, vectors, grid=grid)

    leaves = x.requires_grad_(), vectors.requires_grad_()
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves)
    gradient = torch.autograd.grad(f(x, vectors).square().sum(), x)[0]
    one = torch.func.grad(lambda x, vectors: f(x[None], vectors[None]).square().sum())
    assert_close(torch.func.vmap(one)(x.detach(), vectors.detach()), gradient)


@given(scenes())
def test_valid_classes_alone_have_maps_however_many_are_asked_for(scene):
    features = scene[0]
    batch = features.shape[0]
    vectors, valid = noise(9, batch, 5, 3), noise(10, batch, 5) > 0.3
    expected = torch.where(valid[:, :, None, None], similarity_maps(features, vectors), 0)
    bound = int(valid.sum(1).max())
    for most in {None, bound, 5}:
        ours = similarity_maps(features, vectors, valid=valid, max_present=most)
        assert_close(ours, expected, rtol=0, atol=1e-12)


@given(scenes(), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_lengths_do_not_matter(scene, one, two):
    features = scene[0]
    vectors = noise(9, features.shape[0], 2, 3)
    ours = similarity_maps(features * one, vectors * two)
    assert_close(ours, similarity_maps(features, vectors), rtol=0, atol=1e-12)


def test_a_token_is_one_to_itself_minus_one_to_its_opposite_and_zero_across():
    token = torch.tensor([[[[3.0]], [[4.0]]]])
    vectors = torch.tensor([[[3.0, 4.0], [-6.0, -8.0], [-4.0, 3.0], [1.0, 0.0]]])
    assert_close(similarity_maps(token, vectors).flatten(), torch.tensor([1, -1, 0, 0.6]))


def test_a_zero_token_or_prototype_has_similarity_zero_and_finite_gradients():
    features = torch.tensor([[[[0.0, 3.0]], [[0.0, 4.0]]]]).requires_grad_()
    vectors = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]).requires_grad_()
    maps = similarity_maps(features, vectors)
    assert_close(maps, torch.tensor([[[[0.0, 0.0]], [[0.0, 0.6]]]]))
    maps.sum().backward()
    assert features.grad.isfinite().all()
    assert vectors.grad.isfinite().all()
    # of (x . p) / (|x| |p|) at x = (3, 4), p = (1, 0): (1 - 9 / 25, -12 / 25) / 5
    assert_close(features.grad[0, :, 0, 1], torch.tensor([0.128, -0.096]))


@pytest.mark.parametrize("length", [1e-40, 1e-30, 1e-20, 1e-19, 1e-18, 1e-16])
def test_a_token_however_short_leaves_the_gradients_finite(length):
    features = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    features[:, :, 1, 1] *= length
    for x in (features, features * length):
        x = x.clone().requires_grad_()
        similarity_maps(x, torch.ones(1, 2, 8)).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("length", [1e-3, 1.0, 5e3])
def test_half_precision_neither_overflows_nor_vanishes(length):
    features = (noise(0, 1, 1024, 3, 3) * length).half()  # longer than fp16 can say for 5e3
    vectors = torch.cat([as_tokens(features)[:, :1], noise(1, 1, 2, 1024).half()], 1)
    maps = similarity_maps(features, vectors)
    assert maps.dtype == torch.float16
    expected = torch.from_numpy(reference.similarity(features.double().numpy(), vectors.double().numpy()))
    assert_close(maps.double(), expected, rtol=0, atol=2e-3)


def test_under_autocast_single_precision_stays_exact():
    features, cam, labels = noise(0, 2, 3, 4, 5).float(), noise(1, 2, 6, 4, 5).float(), chance(2, 2, 6)
    expected = class_prototypes(features, cam, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(class_prototypes(features, cam, labels), expected, **EXACT)
        maps = similarity_maps(features, expected.vectors)
    assert_close(maps, similarity_maps(features, expected.vectors), **EXACT)


# Nothing waits for the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 2])
def test_the_host_reads_nothing(most):
    features, labels = noise(0, 2, 3, 4, 5).requires_grad_(), torch.tensor([[1, 0, 1], [0, 1, 0]])
    with reference.no_host_sync():
        mask = torch.ones(2, 4, 5, dtype=torch.bool)
        vectors, _ = class_prototypes(features, noise(1, 2, 3, 8, 10), labels, mask=mask, max_present=most)
        similarity_maps(features, vectors).sum().backward()


# Refusals ---------------------------------------------------------------------------------------------------------

X, CAM, LABELS = torch.zeros(2, 8, 4, 5), torch.zeros(2, 3, 16, 20), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("inputs", "settings", "kind", "message"),
    [
        ((X[0], CAM, LABELS), {}, ValueError, "`features` of shape (B, D, h, w), got (8, 4, 5). For tokens (B, N, D)"),
        ((X, CAM[0], LABELS), {}, ValueError, "`cam` of shape (B=2, K, H, W), got (3, 16, 20)."),
        ((X, CAM[:1], LABELS), {}, ValueError, "`cam` of shape (B=2, K, H, W), got (1, 3, 16, 20)."),
        ((X, CAM, LABELS[:, :2]), {}, ValueError, "`labels` of shape (B=2, K=3), got (2, 2)."),
        ((X, CAM, LABELS[0]), {}, ValueError, "`labels` of shape (B=2, K=3), got (3,)."),
        ((as_tokens(X), CAM, LABELS), {"grid": (5, 5)}, ValueError, "`features` of shape (B, N=25, D), got (2, 20"),
        ((X.long(), CAM, LABELS), {}, TypeError, "`features` of a floating dtype, got torch.int64."),
        ((X, CAM.long(), LABELS), {}, TypeError, "`cam` of a floating dtype, got torch.int64."),
        ((X, CAM, LABELS), {"patch_size": 0}, ValueError, "`patch_size` in [1, inf], got 0"),
        ((X, CAM, LABELS), {"patch_size": 7}, ValueError, "`cam` on the grid of 4 x 5, or at pixels that it covers"),
        ((X, CAM, LABELS), {"mask": torch.ones(2, 5, 4) > 0}, ValueError, "`mask` of shape (B=2, h=4, w=5), got (2"),
        ((X, CAM, LABELS), {"mask": torch.ones(2, 4, 5)}, TypeError, "`mask` of dtype torch.bool, got torch.float32."),
        ((X, CAM, LABELS), {"seed_threshold": 1.1}, ValueError, "`seed_threshold` in [0, 1], got 1.1."),
        ((X, CAM, LABELS), {"seed_threshold": -0.1}, ValueError, "`seed_threshold` in [0, 1], got -0.1."),
    ],
)
def test_prototypes_of_what_does_not_fit_are_refused(inputs, settings, kind, message):
    with pytest.raises(kind, match=re.escape(f"class_prototypes: expected {message}")):
        class_prototypes(*inputs, **settings)


@pytest.mark.parametrize("most", [-1, 4])
def test_a_bound_beyond_the_classes_is_refused(most):
    with pytest.raises(ValueError, match=re.escape(f"expected `max_present` in [0, 3], got {most}. `labels` has K=3")):
        class_prototypes(X, CAM, LABELS, max_present=most)


@pytest.mark.parametrize(
    ("inputs", "settings", "kind", "message"),
    [
        ((X, torch.ones(2, 3, 7)), {}, ValueError, "`vectors` of shape (B=2, K, D=8), got (2, 3, 7)."),
        ((X, torch.ones(3, 8)), {}, ValueError, "`vectors` of shape (B=2, K, D=8), got (3, 8)."),
        ((X, torch.ones(2, 3, 8).long()), {}, TypeError, "`vectors` of a floating dtype, got torch.int64."),
        ((as_tokens(X), torch.ones(2, 3, 8)), {}, ValueError, "`features` of shape (B, D, h, w), got (2, 20, 8). For"),
        ((X, torch.ones(2, 3, 8)), {"grid": (5, 4)}, ValueError, "`grid` (4, 5) as in `features`, got (5, 4). Correct"),
    ],
)
def test_similarities_of_what_does_not_fit_are_refused(inputs, settings, kind, message):
    with pytest.raises(kind, match=re.escape(f"similarity_maps: expected {message}")):
        similarity_maps(*inputs, **settings)


def test_a_bound_without_the_valid_classes_is_refused():
    with pytest.raises(ValueError, match=r"similarity_maps: `max_present` needs `valid`\. Pass valid"):
        similarity_maps(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 3), max_present=1)
    with pytest.raises(TypeError, match=r"similarity_maps: expected `valid` of dtype torch.bool"):
        similarity_maps(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 3), valid=torch.zeros(1, 4))


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_module_with_an_impossible_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=r"ClassPrototypes: expected `seed_threshold` in \[0, 1\], got"):
        ClassPrototypes(threshold)
