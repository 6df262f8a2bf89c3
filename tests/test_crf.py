"""The dense CRF: mean field by all pairs, the compiled implementation as an oracle, and what it refuses."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.testing import assert_close

import ffr
from ffr.crf import DenseCRF, crf_files
from ffr.lattice import PermutohedralLattice, image_features


def uniform(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scene(height=24, width=32, labels=4):
    """Two halves of two colours, and probabilities which are right on average."""
    image = torch.full((3, height, width), 40, dtype=torch.uint8)
    image[:, :, width // 2 :] = 200
    probs = uniform(labels, height, width)
    probs[1, :, : width // 2] += 0.5
    probs[2, :, width // 2 :] += 0.5
    return image, probs / probs.sum(0)


def by_all_pairs(image, probs, gaussian, bilateral, iterations):
    """Mean field with the filters written as matrices, which the lattice gives for the unit vectors."""
    count = image.shape[1] * image.shape[2]
    eye = torch.eye(count, dtype=torch.float64)
    features = image_features(image, sxy=bilateral[0], srgb=bilateral[1]).double()
    wide = PermutohedralLattice(features)(eye)
    near = PermutohedralLattice(image_features(image, sxy=gaussian[0], srgb=1).double()[:, :2])(eye)
    log = probs.double().clamp(min=1e-5).log().flatten(1).t()
    q = log.softmax(1)
    for _ in range(iterations):
        scores = log + gaussian[1] * near @ q + bilateral[2] * wide @ q
        q = scores.exp() / scores.exp().sum(1, keepdim=True)
    return q.t().reshape(probs.shape)


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(
    ("gaussian", "bilateral"), [((1.3, 1), (12, 9, 4)), ((3.1, 2), (7, 31, 0.5)), ((2, 9), (9, 14, 15))]
)
def test_it_is_mean_field_with_both_kernels(gaussian, bilateral, iterations):
    image = (uniform(3, 7, 9, seed=2) * 255).to(torch.uint8)
    probs = uniform(5, 7, 9, dtype=torch.float64).softmax(0)
    ours = DenseCRF(*gaussian, *bilateral, iterations)(image, probs)
    assert_close(ours, by_all_pairs(image, probs, gaussian, bilateral, iterations), rtol=1e-4, atol=1e-4)


def test_pixels_are_renewed_block_by_block_as_at_once(monkeypatch):
    image, probs = scene()
    for crf in (DenseCRF(iterations=3), DenseCRF(bilateral_compat=30, iterations=3)):
        monkeypatch.setattr("ffr.crf.BLOCK", 4096)
        whole = crf(image, probs)
        monkeypatch.setattr("ffr.crf.BLOCK", 7)
        assert_close(crf(image, probs), whole)


def test_heavy_kernels_still_tell_two_likely_labels_apart():
    """One pixel hears itself: 500 x .6 against 500 x .4, both beyond what a power of two holds in float32."""
    image, probs = torch.zeros(3, 1, 1, dtype=torch.uint8), torch.tensor([0.6, 0.4])[:, None, None]
    ours = DenseCRF(gaussian_compat=0, bilateral_compat=500, iterations=1)(image, probs)
    assert_close(ours.flatten(), torch.tensor([1.0, 0.0]))
    mild = DenseCRF(gaussian_compat=0, bilateral_compat=20, iterations=1)(image, probs)
    assert_close(mild.flatten(), (torch.tensor([0.6, 0.4]).log() + 20 * torch.tensor([0.6, 0.4])).softmax(0))


@st.composite
def problems(draw):
    """An image and probabilities of any size and number of labels, no pixel without doubt; a CRF of any weights."""
    height, width, labels = (draw(st.integers(1, most)) for most in (7, 9, 5))
    seed = draw(st.integers(0, 2**16))
    image = (uniform(3, height, width, seed=seed) * 255).to(torch.uint8)
    probs = 0.1 + uniform(labels, height, width, seed=seed + 1, dtype=torch.float64)
    sigmas, weights = st.floats(0.5, 40), st.floats(0, 12)
    crf = DenseCRF(*(draw(x) for x in (sigmas, weights, sigmas, sigmas, weights)), draw(st.integers(0, 4)))
    return crf, image, probs, seed


@given(problems())
def test_any_problem_gives_probabilities(problem):
    crf, image, probs, _ = problem
    result = crf(image, probs)
    assert result.shape == probs.shape
    assert (result >= 0).all()
    assert_close(result.sum(0), torch.ones_like(result[0]))


@given(problems())
def test_labels_are_all_alike_to_it(problem):
    crf, image, probs, seed = problem
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    assert_close(crf(image, probs[order]), crf(image, probs)[order])
    even = crf(image, torch.ones_like(probs))
    assert_close(even, torch.full_like(even, 1 / len(even)))


@given(problems(), st.floats(0.5, 20))
def test_what_the_probabilities_of_a_pixel_sum_to_does_not_matter(problem, factor):
    crf, image, probs, seed = problem
    wanted = crf(image, probs)
    assert_close(crf(image, probs * factor), wanted)
    assert_close(crf(image, probs * (0.5 + uniform(*probs.shape[1:], seed=seed + 2).double())), wanted)


def test_on_a_pretended_gpu_nothing_stays_behind_and_no_round_waits():
    """The one thing the host reads is whether the input is finite, which `forward` asks first."""
    with FakeTensorMode():
        image = torch.empty(3, 12, 17, dtype=torch.uint8, device="cuda")
        assert DenseCRF()._mean_field(image, torch.empty(5, 12, 17, device="cuda")).device.type == "cuda"


def test_the_defaults_are_those_of_the_recipe():
    crf = DenseCRF()
    assert (crf.gaussian_sxy, crf.gaussian_compat, crf.iterations) == (1, 1, 10)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_compat) == (121, 5, 4)
    assert (crf.floor, crf.prune) == (1e-5, 0)


def test_it_cleans_two_halves():
    image, probs = scene()
    before, after = probs.argmax(0), ffr.DenseCRF()(image, probs).argmax(0)
    truth = torch.where(torch.arange(32) < 16, 1, 2).expand(24, 32)
    assert (before == truth).float().mean() < 0.95
    assert torch.equal(after, truth)


def test_without_kernels_or_iterations_probabilities_are_only_normalised():
    image, probs = scene()
    for crf in (DenseCRF(iterations=0), DenseCRF(gaussian_compat=0, bilateral_compat=0)):
        assert_close(crf(image, 3 * probs), probs)


def test_a_kernel_of_weight_zero_is_left_out():
    image, probs = scene()
    for name, index in (("gaussian_compat", 0), ("bilateral_compat", 1)):
        ours = DenseCRF(1.3, 1, 12, 9, 4, 2)
        setattr(ours, name, 0)
        weights = [(1.3, 1), (12, 9, 4)]
        weights[index] = (*weights[index][:-1], 0)
        assert_close(
            ours(image[:, :8, 12:20], probs[:, :8, 12:20].double()),
            by_all_pairs(image[:, :8, 12:20], probs[:, :8, 12:20], *weights, 2),
            rtol=1e-2,
            atol=1e-3,
        )


def test_a_batch_is_its_images():
    image, probs = scene()
    images, stack = torch.stack([image, image.flip(2)]), torch.stack([probs, probs.flip(1)])
    ours = DenseCRF(iterations=2)(images, stack)
    for one, alone in zip(ours, zip(images, stack, strict=True), strict=True):
        assert_close(one, DenseCRF(iterations=2)(*alone), rtol=0, atol=0)


def test_logits_are_probabilities_before_the_softmax():
    image, probs = scene()
    crf = DenseCRF(iterations=2)
    assert_close(crf.from_logits(image, probs.log() + 7), crf(image, probs))
    assert_close(crf.from_logits(image[None], probs.log()[None])[0], crf(image, probs))


def test_a_label_map_is_a_probability_of_its_confidence():
    image, _ = scene(2, 3)
    label = torch.tensor([[0, 1, 2], [255, 2, 0]])
    ours = DenseCRF(iterations=0).from_label(image, label, num_classes=2, confidence=0.8)
    wanted = torch.full((3, 2, 3), 0.1)
    for y in range(2):
        for x in range(3):
            wanted[:, y, x] = 1 / 3 if label[y, x] == 255 else wanted[:, y, x]
            if label[y, x] < 255:
                wanted[label[y, x], y, x] = 0.8
    assert_close(ours, wanted)
    assert_close(DenseCRF(iterations=0).from_label(image[None], label[None], num_classes=2, confidence=0.8)[0], wanted)
    default, ours = torch.get_default_dtype(), DenseCRF(iterations=0).from_label(image, label, num_classes=2)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(DenseCRF(iterations=0).from_label(image, label, num_classes=2), ours)
    finally:
        torch.set_default_dtype(default)
    image, probs = scene()
    label = probs.argmax(0).to(torch.uint8)
    assert torch.equal(DenseCRF().from_label(image, label, num_classes=3)[1:3].argmax(0)[:, 0], torch.zeros(24).long())


def test_labels_without_mass_may_be_pruned():
    image, probs = scene()
    empty = torch.cat([probs * 0.99, torch.full_like(probs[:3], 0.01 / 3)])
    pruned, whole = (DenseCRF(iterations=3, prune=p)(image, empty) for p in (0.01, 0))
    assert pruned.shape == empty.shape
    assert pruned[4:].eq(0).all()
    assert_close(pruned[:4], DenseCRF(iterations=3)(image, probs))
    assert whole[4:].gt(0).all()
    assert torch.equal(pruned.argmax(0), whole.argmax(0))
    edge = torch.cat([probs * 0.5, torch.full_like(probs[:2], 0.25)])  # does not exceed it
    assert DenseCRF(iterations=1, prune=0.25)(image, edge)[4:].eq(0).all()
    best = DenseCRF(prune=1.0)(image, probs)  # nothing exceeds 1: the best label stays
    assert_close(best.sum(0), torch.ones(24, 32))


@pytest.mark.parametrize("labels", [1, 2, 21, 150])
def test_any_number_of_labels_gives_probabilities(labels):
    image, _ = scene(9, 11)
    ours = DenseCRF(iterations=3)(image, uniform(labels, 9, 11).softmax(0))
    assert_close(ours.sum(0), torch.ones(9, 11))
    assert (ours >= 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1)])
def test_one_pixel_and_one_row_work(size):
    image, probs = scene(12, 12)
    ours = DenseCRF(iterations=2)(image[:, : size[0], : size[1]], probs[:, : size[0], : size[1]])
    assert_close(ours.sum(0), torch.ones(size))


def test_zeros_and_huge_weights_stay_finite():
    image, probs = scene()
    probs[:, :5] = 0
    for crf in (DenseCRF(), DenseCRF(floor=0), DenseCRF(gaussian_compat=500, bilateral_compat=500)):
        ours = crf(image, probs)
        assert ours.isfinite().all()
        assert_close(ours.sum(0), torch.ones(24, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_floats_are_the_same_image_and_nothing_is_edited(dtype):
    image, probs = scene()
    probs = probs.to(dtype)
    before = image.clone(), probs.clone()
    ours = DenseCRF(iterations=3)(image, probs)
    assert ours.dtype == dtype
    assert torch.equal(image, before[0]) and torch.equal(probs, before[1])
    turned = probs.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(DenseCRF(iterations=3)(image.float() / 255, turned), ours, rtol=0, atol=2e-2)


def test_autocast_and_gradients_stay_outside():
    image, probs = scene()
    want = DenseCRF(iterations=3)(image, probs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = DenseCRF(iterations=3)(image, probs.requires_grad_())
    assert_close(ours, want, rtol=0, atol=0)
    assert not ours.requires_grad
    with dual_level():
        dual = (make_dual(x, torch.ones_like(x)) for x in (image.double() / 255, probs.detach()))
        ours = DenseCRF(iterations=3)(*dual)
        assert unpack_dual(ours).tangent is None
    assert_close(ours, want)


def test_it_has_no_state_and_says_what_it_is():
    assert not DenseCRF().state_dict()
    assert "bilateral_srgb=7" in repr(DenseCRF(bilateral_srgb=7))


# --- files ---


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_files_become_label_maps(tmp_path, workers):
    image, probs = scene()
    jobs = []
    for name in "ab":
        paths = tmp_path / f"{name}.png", tmp_path / f"{name}.npy", tmp_path / f"{name}_label.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[0])
        np.save(paths[1], probs.numpy())
        jobs.append(paths)
    done = list(crf_files(DenseCRF(iterations=2), jobs, workers=workers))
    assert sorted(done) == [str(job[2]) for job in jobs]
    for job in jobs:
        with Image.open(job[2]) as written:
            assert np.array_equal(np.array(written), DenseCRF(iterations=2)(image, probs).argmax(0).numpy())


def test_a_result_is_whole_or_not_there_and_errors_name_the_file(tmp_path):
    image, probs = scene()
    picture, scores, result = tmp_path / "a.png", tmp_path / "a.npy", tmp_path / "new" / "folder" / "a.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture)
    crf = DenseCRF(iterations=1)
    for bad, error, message in (
        (probs[:, :-1], ValueError, r"crf_files: .*a\.npy for .*a\.png: DenseCRF: expected `probs` of shape"),
        (probs.long(), TypeError, r"crf_files: .*a\.npy for .*: DenseCRF: expected `probs` of a floating dtype"),
        (torch.eye(300)[:, :, None, None].expand(-1, -1, 24, 32)[:, 299], ValueError, r"a\.npy gives label 299"),
    ):
        np.save(scores, bad.numpy())
        with pytest.raises(error, match=message):
            list(crf_files(crf, [(picture, scores, result)], workers=0))
        assert not result.exists()
    with pytest.raises(ValueError, match=r"crf_files: expected a result that ends in \.png.*got .*a\.jpg"):
        list(crf_files(crf, [(picture, scores, result.with_suffix(".jpg"))], workers=0))
    np.save(scores, probs.numpy())
    assert list(crf_files(crf, [(picture, scores, result)], workers=0)) == [str(result)]
    assert [path.name for path in result.parent.iterdir()] == ["a.png"]
    with Image.open(result) as written:
        assert written.mode == "L"


POOL = """
import sys, time
from ffr.crf import DenseCRF, crf_files
if __name__ == "__main__":
    for path in crf_files(DenseCRF(iterations=1), [sys.argv[1:]], workers=1):
        print("working", flush=True)
        time.sleep(60)
"""


def test_the_processes_of_a_killed_script_end_with_it(tmp_path, outlived):
    image, probs = scene()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", probs.numpy())
    assert not outlived(POOL, tmp_path / "a.png", tmp_path / "a.npy", tmp_path / "label.png")


def test_a_missing_file_is_the_error_of_the_iteration(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(crf_files(DenseCRF(), [(tmp_path / "none.png", tmp_path / "none.npy", tmp_path / "out.png")], workers=0))
    with pytest.raises(ValueError, match="crf_files: expected `workers` in"):
        list(crf_files(DenseCRF(), [], workers=-1))


def test_without_pillow_the_checkout_is_named_and_no_package_of_another_owner(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"crf_files: needs Pillow.* Run pip install '\.\[examples\]' in a checkout"):
        list(crf_files(DenseCRF(), [("a.png", "a.npy", "b.png")], workers=0))


# --- oracle and device ---

SETTINGS = [((1, 1), (121, 5, 4)), ((3, 3), (80, 13, 10)), ((1, 3), (67, 3, 4)), ((3, 3), (50, 5, 10))]


@pytest.mark.slow
@pytest.mark.parametrize(("gaussian", "bilateral"), SETTINGS)
def test_it_gives_the_labels_of_the_compiled_implementation_on_photographs(gaussian, bilateral):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    pictures = [getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    pictures += [data.stereo_motorcycle()[0], *datasets.load_sample_images().images]
    differ = moved = pixels = 0
    for seed, picture in enumerate(pictures):
        image = torch.from_numpy(np.ascontiguousarray(picture[..., :3])).permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image, size=(188, 250), mode="area")[0].round().to(torch.uint8)
        logits = torch.randn(1, 21, 12, 16, generator=torch.Generator().manual_seed(seed))
        logits[:, 4:] -= 3
        probs = torch.nn.functional.interpolate(logits, size=(188, 250), mode="bilinear")[0].softmax(0)
        oracle = densecrf.DenseCRF2D(250, 188, 21)
        oracle.setUnaryEnergy(-probs.clamp(min=1e-5).log().flatten(1).numpy())
        oracle.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
        pixel_rows = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        oracle.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=pixel_rows, compat=bilateral[2])
        wanted = torch.from_numpy(np.array(oracle.inference(10))).reshape(probs.shape)
        ours = DenseCRF(*gaussian, *bilateral, 10)(image, probs)
        assert (ours - wanted).abs().mean() <= 1e-5
        differ += int((ours.argmax(0) != wanted.argmax(0)).sum())
        moved += int((wanted.argmax(0) != probs.argmax(0)).sum())
        pixels += ours[0].numel()
    assert moved > 0.01 * pixels  # the CRF has something to do
    assert differ <= 1e-4 * pixels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_labels_are_the_same():
    image, probs = scene(120, 160, 21)
    ours = DenseCRF()(image.cuda(), probs.cuda())
    assert ours.is_cuda
    assert (ours.argmax(0).cpu() == DenseCRF()(image, probs).argmax(0)).float().mean() >= 0.9999


# --- refusals ---


@pytest.mark.parametrize(
    ("image", "probs", "error", "message"),
    [
        ((3, 8, 9), (4, 8, 8), ValueError, r"`probs` of shape \(C, H=8, W=9\), got \(4, 8, 8\)"),
        ((3, 8, 9), (1, 4, 8, 9), ValueError, r"`probs` of shape \(C, H=8, W=9\)"),
        ((2, 3, 8, 9), (3, 4, 8, 9), ValueError, r"`probs` of shape \(B=2, C, H=8, W=9\), got \(3, 4, 8, 9\)"),
        ((8, 9, 3), (4, 8, 9), ValueError, r"`image` of shape \(3, H, W\), got \(8, 9, 3\)"),
        ((3, 8, 9), (0, 8, 9), ValueError, r"`probs` of at least one label and pixel, got \(0, 8, 9\)"),
        ((3, 0, 9), (4, 0, 9), ValueError, r"`probs` of at least one label and pixel, got \(4, 0, 9\)"),
        ((0, 3, 8, 9), (0, 4, 8, 9), ValueError, r"`probs` of at least one label and pixel, got \(0, 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(image, probs, error, message):
    with pytest.raises(error, match=f"DenseCRF: expected {message}"):
        DenseCRF()(torch.zeros(image, dtype=torch.uint8), torch.zeros(probs))


def test_wrong_dtypes_are_refused():
    image, probs = scene()
    with pytest.raises(TypeError, match=r"DenseCRF: expected `image` as uint8 or float in \[0, 1\], got torch.int64"):
        DenseCRF()(image.long(), probs)
    with pytest.raises(TypeError, match=r"DenseCRF: expected `probs` of a floating dtype"):
        DenseCRF()(image, probs.long())
    with pytest.raises(TypeError, match=r"DenseCRF: expected `logits` of a floating dtype"):
        DenseCRF().from_logits(image, probs.long())
    with pytest.raises(TypeError, match=r"`label` of an integer dtype"):
        DenseCRF().from_label(image, probs[0], num_classes=2)
    with pytest.raises(TypeError, match=r"`image` to be a torch.Tensor, got ndarray"):
        DenseCRF()(image.numpy(), probs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    image, probs = scene()
    probs[2, 3, 4] = value
    with pytest.raises(ValueError, match="DenseCRF: expected `probs` to be finite"):
        DenseCRF()(image, probs)
    with pytest.raises(ValueError, match="DenseCRF: expected `image` to be finite"):
        DenseCRF()(torch.full((3, 24, 32), value), scene()[1])


@pytest.mark.parametrize(("factor", "offset", "got"), [(255, 0, r"0\.\.255"), (4, -2, r"-2\.\.2")])
def test_floats_that_are_no_image_are_refused_and_roundings_are_not(factor, offset, got):
    _, probs = scene()
    image = torch.linspace(0, 1, 3 * 24 * 32).reshape(3, 24, 32)
    with pytest.raises(
        ValueError, match=rf"DenseCRF: expected `image` as uint8 or float in \[0, 1\], got {got}\. Undo"
    ):
        DenseCRF(iterations=1)(image * factor + offset, probs)
    assert DenseCRF(iterations=1)(image * 1.001 - 0.0005, probs).isfinite().all()


def test_logits_in_the_place_of_probabilities_are_refused_and_roundings_are_not():
    image, probs = scene()
    with pytest.raises(
        ValueError, match=r"DenseCRF: expected `probs` >= 0, got -\d.*\. Take logits' softmax, or `from_logits`"
    ):
        DenseCRF(iterations=1)(image, probs.log())
    below = probs.clone()
    below[3] = -1e-7  # one minus what should sum to one
    assert_close(DenseCRF(iterations=1)(image, below), DenseCRF(iterations=1)(image, below.clamp(min=0)))


@pytest.mark.parametrize("name", ["gaussian_sxy", "bilateral_sxy", "bilateral_srgb"])
def test_a_sigma_that_is_not_positive_is_refused(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"DenseCRF: expected `{name}` > 0, got {value}"):
            DenseCRF(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gaussian_compat": -1}, r"`gaussian_compat` in \[0, inf\], got -1"),
        ({"bilateral_compat": float("nan")}, r"`bilateral_compat` in \[0, inf\], got nan"),
        ({"iterations": -1}, r"`iterations` in \[0, inf\], got -1"),
        ({"floor": 2}, r"`floor` in \[0, 1\], got 2"),
        ({"prune": -0.1}, r"`prune` in \[0, 1\], got -0\.1"),
    ],
)
def test_a_number_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"DenseCRF: expected {message}"):
        DenseCRF(**settings)


def test_label_maps_that_do_not_fit_are_refused():
    image, _ = scene()
    with pytest.raises(ValueError, match=r"DenseCRF.from_label: expected `label` of shape \(H=24, W=32\)"):
        DenseCRF().from_label(image, torch.zeros(24, 31).long(), num_classes=2)
    with pytest.raises(ValueError, match=r"`num_classes` in \[1, inf\], got 0"):
        DenseCRF().from_label(image, torch.zeros(24, 32).long(), num_classes=0)
    with pytest.raises(ValueError, match=r"`confidence` in \[0, 1\], got 1.5"):
        DenseCRF().from_label(image, torch.zeros(24, 32).long(), num_classes=2, confidence=1.5)
    with pytest.raises(ValueError, match=r"`ignore_index` to be no label in 0..300 \(K = 300 classes\), got 255"):
        DenseCRF().from_label(image, torch.zeros(24, 32).long(), num_classes=300)
