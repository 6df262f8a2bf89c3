"""The lattice filter: how far from the true Gaussian, how exactly self-adjoint, and what it does at the edges."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import no_host_sync
from torch._subclasses import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.testing import assert_close

from ffr.lattice import RUN, PermutohedralLattice, image_features, position_lattice

seeds = st.integers(0, 2**32 - 1)
dimensions = st.integers(1, 6)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(features, values):
    """The sum over all pairs, in NumPy."""
    f, v = features.double().numpy(), values.double().numpy()
    return torch.from_numpy(np.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1)) @ v)


def both(features, values, normalize):
    """What the lattice gives, and what the definition gives."""
    ours = PermutohedralLattice(features, normalize=normalize)(values)
    if not normalize:
        return ours, gaussian(features, values)
    root = gaussian(features, torch.ones_like(values[:, :1])).sqrt()
    return ours, gaussian(features, values / root) / root


def picture(height, width, seed=0):
    """A coarse picture, smoothly enlarged: colours vary, with edges."""
    coarse = normal(1, 3, 5, 6, seed=seed).sigmoid()
    large = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return (large[0] * 255).round().to(torch.uint8)


def grid(height, width, sxy):
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1) / sxy


# --- against the sum over all pairs ---

# By energy (the scale of lattice units); relative distance, after the best scale; and of the normalised filters.
TABLE = {
    "x, sigma 4": (lambda: grid(1, 200, 4)[:, :1], 0.920, 0.007, 0.006),
    "xy, sigma 3": (lambda: grid(30, 40, 3), 0.877, 0.013, 0.008),
    "xy, sigma 10": (lambda: grid(30, 40, 10), 0.865, 0.020, 0.012),
    "xyrgb, sigma 20 and 13": (lambda: image_features(picture(30, 40), sxy=20, srgb=13).double(), 0.491, 0.104, 0.038),
    "xyrgb, sigma 10 and 5": (lambda: image_features(picture(30, 40), sxy=10, srgb=5).double(), 0.425, 0.139, 0.061),
}


@pytest.mark.parametrize(("features", "scale", "shape", "normalized"), TABLE.values(), ids=TABLE)
def test_it_is_the_gaussian_up_to_the_scale_of_lattice_units(features, scale, shape, normalized):
    f = features()
    values = normal(len(f), 4).sigmoid()
    ours, wanted = both(f, values, normalize=False)
    best = (ours * wanted).sum() / (ours * ours).sum()
    assert abs((values * ours).sum() / (values * wanted).sum() - scale) < 2e-3
    assert abs((best * ours - wanted).norm() / wanted.norm() - shape) < 2e-3
    ours, wanted = both(f, values, normalize=True)
    assert abs((ours - wanted).norm() / wanted.norm() - normalized) < 2e-3


@given(seeds, dimensions, st.integers(1, 30), st.floats(0.2, 3), st.booleans())
def test_it_is_the_filter_by_a_dictionary_in_every_dimension(seed, d, count, spread, normalize):
    f, values = spread * normal(count, d, seed=seed), normal(count, 2, seed=seed + 1)
    wanted = reference.lattice_filter(f.numpy(), values.numpy(), normalize)
    assert_close(PermutohedralLattice(f, normalize=normalize)(values), torch.from_numpy(wanted))


def test_far_points_do_not_clash_where_their_names_pass_64_bits():
    f = 3000 * normal(200, 6).sigmoid()
    f[100:] = f[:100] + 0.3 * normal(100, 6, seed=1)  # each has one neighbour
    values = normal(200, 3)
    wanted = reference.lattice_filter(f.numpy(), values.numpy())
    assert_close(PermutohedralLattice(f, normalize=False)(values), torch.from_numpy(wanted))


def test_a_size_that_is_a_power_of_two_makes_no_names_equal():
    """Even radices whose product is 2^64 would drop the third coordinate, and the first two points meet."""
    far = 4 * (2**30 - 4)
    elevated = torch.tensor([[0, 0, 0], [0, 0, 20], [far, far, 0]], dtype=torch.float64)  # all but the first coordinate
    elevated += torch.tensor([0.9, 0.4, -0.3])  # inside a simplex: on a corner rounding would choose among several
    third = -elevated[:, 2] / 3
    second = (third - elevated[:, 1]) / 2
    scaled = torch.stack([second + third - elevated[:, 0], second, third], 1)
    f = scaled * torch.tensor([2.0, 6.0, 12.0], dtype=torch.float64).sqrt() / (4 * math.sqrt(2 / 3))
    values = normal(3, 2)
    wanted = reference.lattice_filter(f.numpy(), values.numpy())
    assert_close(PermutohedralLattice(f, normalize=False)(values), torch.from_numpy(wanted))


# --- laws ---


@given(seeds, dimensions, st.booleans())
def test_with_an_exact_adjoint_it_is_symmetric_and_without_nearly(seed, d, normalize):
    f = normal(60, d, seed=seed)
    u, v = normal(60, 2, seed=seed + 1), normal(60, 2, seed=seed + 2)
    exact = PermutohedralLattice(f, normalize=normalize, exact_adjoint=True)
    assert_close((u * exact(v)).sum(), (v * exact(u)).sum(), rtol=1e-10, atol=1e-10)
    plain = PermutohedralLattice(f, normalize=normalize)
    scale = u.norm() * exact(v).norm()
    # Sixty scattered points are the hard case; the pixels of an image are symmetric to 1e-3.
    assert ((u * plain(v)).sum() - (v * plain(u)).sum()).abs() < 0.25 * scale


def test_in_float32_it_is_self_adjoint_to_a_millionth_and_one_order_alone_is_not():
    f = image_features(picture(60, 80), sxy=20, srgb=8)
    u, v = normal(len(f), 3).sigmoid().float(), normal(len(f), 3, seed=1).sigmoid().float()

    def apart(**settings):
        lattice = PermutohedralLattice(f, normalize=False, **settings)
        one, other = (u * lattice(v)).double().sum(), (v * lattice(u)).double().sum()
        return (one - other).abs() / one

    assert apart(exact_adjoint=True) < 1e-6
    assert apart() > 1e-6


@given(seeds, dimensions)
def test_the_exact_adjoint_is_the_mean_of_an_order_and_its_reverse(seed, d):
    """So it is the symmetric part of one order alone."""
    f = normal(12, d, seed=seed)
    eye = torch.eye(12, dtype=torch.float64)
    matrix = PermutohedralLattice(f, normalize=False)(eye)
    exact = PermutohedralLattice(f, normalize=False, exact_adjoint=True)(eye)
    assert_close(exact, (matrix + matrix.T) / 2)


@given(seeds, dimensions, st.booleans(), st.booleans())
def test_permuted_points_give_permuted_values(seed, d, normalize, exact):
    f, values = normal(40, d, seed=seed), normal(40, 3, seed=seed + 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    wanted = PermutohedralLattice(f, normalize=normalize, exact_adjoint=exact)(values)[order]
    assert_close(PermutohedralLattice(f[order], normalize=normalize, exact_adjoint=exact)(values[order]), wanted)


@given(seeds, dimensions, st.booleans(), st.booleans())
def test_uncounted_it_is_the_same_and_the_host_reads_nothing(seed, d, normalize, exact):
    f, values = normal(40, d, seed=seed), normal(40, 3, seed=seed + 1)
    wanted = PermutohedralLattice(f, normalize=normalize, exact_adjoint=exact)
    with no_host_sync():
        lattice = PermutohedralLattice(f, normalize=normalize, exact_adjoint=exact, count=False)
        ours = lattice(values)
    assert_close(ours, wanted(values))
    assert lattice.points == 40 * (d + 1) >= wanted.points


@pytest.mark.parametrize("crowd", [0, 1, RUN - 1, RUN, RUN + 1, 1000])
def test_no_thread_of_a_gpu_adds_up_a_long_run(crowd):
    """A thousand points at one place beside others: an uncounted lattice gives the same, from short sums."""
    f = torch.cat([normal(50, 3), torch.full((crowd, 3), 0.3, dtype=torch.float64), 5 + normal(50, 3, seed=1)])
    values = normal(len(f), 2, seed=2)
    lattice = PermutohedralLattice(f, count=False)
    assert_close(lattice(values), PermutohedralLattice(f)(values))
    begin, first = lattice._runs
    entries = len(f) * 4
    assert torch.diff(begin, append=begin.new_tensor([entries])).max() <= RUN
    assert torch.diff(first, append=first.new_tensor([len(begin)])).max() <= entries // RUN + 2


def test_on_a_pretended_gpu_nothing_stays_behind_and_the_host_reads_nothing():
    with FakeTensorMode():
        lattice = PermutohedralLattice(torch.empty(40, 5, device="cuda"), exact_adjoint=True)
        assert lattice(torch.empty(40, 3, device="cuda")).device.type == "cuda"


@given(seeds, dimensions, st.booleans(), st.booleans(), st.booleans())
def test_images_of_a_batch_do_not_see_each_other(seed, d, normalize, exact, count):
    """Two of them hold the same points."""
    f, values = normal(3 * 20, d, seed=seed).reshape(3, 20, d), normal(3 * 20, 2, seed=seed + 1).reshape(3, 20, 2)
    f[1] = f[0]
    how = {"normalize": normalize, "exact_adjoint": exact, "count": count}
    wanted = torch.stack([PermutohedralLattice(one, **how)(own) for one, own in zip(f, values, strict=True)])
    assert_close(PermutohedralLattice(f, **how)(values), wanted)


@given(seeds, dimensions)
def test_it_is_linear_and_filters_every_column_alone(seed, d):
    lattice = PermutohedralLattice(normal(30, d, seed=seed))
    one, two = normal(30, 2, seed=seed + 1), normal(30, 2, seed=seed + 2)
    assert_close(lattice(torch.cat([one, two], 1)), torch.cat([lattice(one), lattice(two)], 1))
    assert_close(lattice(one - 2 * two), lattice(one) - 2 * lattice(two))


@given(seeds, dimensions)
def test_no_value_turns_negative_and_ones_stay_near_one_when_normalised(seed, d):
    f = normal(50, d, seed=seed)
    ones = torch.ones(50, 1, dtype=torch.float64)
    assert (PermutohedralLattice(f, normalize=False)(normal(50, 2, seed=seed).abs()) >= 0).all()
    filtered = PermutohedralLattice(f, normalize=False)(ones)
    assert (filtered > 0).all()
    assert_close(
        PermutohedralLattice(f)(ones),
        PermutohedralLattice(f, normalize=False)(ones / filtered.sqrt()) / filtered.sqrt(),
    )


# --- known answers ---


@pytest.mark.parametrize("d", range(1, 7))
def test_points_at_one_place_share_their_mean(d):
    f = normal(1, d).expand(7, d)
    values = normal(7, 3, seed=1)
    assert_close(PermutohedralLattice(f)(values), values.mean(0).expand(7, 3))


@pytest.mark.parametrize("d", range(1, 7))
def test_points_far_apart_keep_what_they_have(d):
    f = 100.0 * torch.arange(5, dtype=torch.float64)[:, None].expand(5, d)
    values = normal(5, 3)
    assert_close(PermutohedralLattice(f)(values), values)


@pytest.mark.parametrize("d", range(1, 7))
def test_a_point_alone_on_a_lattice_point_reads_what_stays_after_one_turn_of_the_blur(d):
    """1 stays, and half of a half ... comes back once around the simplex; 1 + 2^-d is the customary scale."""
    values = torch.full((1, 1), 3.0, dtype=torch.float64)
    f = torch.zeros(1, d, dtype=torch.float64)
    wanted = values * (1 + 2.0 ** -(d + 1)) / (1 + 2.0**-d)
    assert_close(PermutohedralLattice(f, normalize=False)(values), wanted)
    assert_close(PermutohedralLattice(f.expand(4, d), normalize=False)(values.expand(4, 1)), 4 * wanted.expand(4, 1))


def test_a_picture_of_one_colour_is_filtered_by_position_alone():
    flat = torch.full((3, 12, 15), 77, dtype=torch.uint8)
    values = normal(180, 2)
    ours = PermutohedralLattice(image_features(flat, sxy=3, srgb=5).double())(values)
    wanted = gaussian(grid(12, 15, 3), values)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), wanted.flatten(), dim=0) > 0.97


def test_one_pixel_and_one_row_work():
    one = PermutohedralLattice(image_features(torch.zeros(3, 1, 1, dtype=torch.uint8), sxy=1, srgb=1))
    assert_close(one(torch.tensor([[3.0, -1.0]])), torch.tensor([[3.0, -1.0]]))
    features = image_features(normal(3, 1, 9).sigmoid(), sxy=2.1, srgb=9)
    wanted = reference.lattice_filter(features.numpy(), normal(9, 2).numpy())
    assert_close(PermutohedralLattice(features, normalize=False)(normal(9, 2)), torch.from_numpy(wanted))


@pytest.mark.parametrize("size", [(2100, 6), (5, 2300), pytest.param((2100, 2300), marks=pytest.mark.slow)])
def test_an_image_of_more_than_2000_pixels_a_side_is_as_exact_as_a_small_one(size):
    """Coordinates grow with the image, and float32 has 24 bits of them."""
    features = image_features(picture(*size).double() / 255, sxy=1, srgb=5)
    values = torch.stack([torch.ones_like(features[:, 0]), features[:, 2] / 50], 1)
    ours = PermutohedralLattice(features.float())(values.float())
    wanted = PermutohedralLattice(features)(values)
    assert (ours - wanted).norm() < 2e-3 * wanted.norm()  # where a pixel lies on a face, rounding picks the simplex
    assert (ours > 0).all()


# --- features of an image ---


def test_features_are_column_row_and_colour_over_their_sigma():
    image = torch.arange(18, dtype=torch.uint8).reshape(3, 2, 3) * 10
    ours = image_features(image, sxy=2, srgb=5)
    for y in range(2):
        for x in range(3):
            assert_close(ours[3 * y + x], torch.tensor([x / 2, y / 2, *(image[:, y, x] / 5).tolist()]))
    for dtype in (torch.float32, torch.float64):
        floats = image_features(image.to(dtype) / 255, sxy=2, srgb=5)
        assert floats.dtype == dtype
        assert_close(floats, ours.to(dtype))


def test_position_lattices_are_kept_for_the_sizes_used_last_and_no_more():
    with torch.inference_mode():
        kept = position_lattice((5, 7), sxy=2)
    assert position_lattice((5, 7), sxy=2.0) is kept
    assert position_lattice((7, 5), sxy=2) is not kept
    assert position_lattice((5, 7), sxy=3) is not kept
    values = torch.ones(35, 1, requires_grad=True)
    kept(values)  # no inference tensor: it may stand in a training step
    assert not kept.weight.is_inference()
    for side in range(20, 40):
        position_lattice((side, 4), sxy=1)
    assert position_lattice((5, 7), sxy=2) is not kept
    assert_close(kept(values), PermutohedralLattice(grid(5, 7, 2).float())(values))


@pytest.mark.parametrize("exact", [False, True])
def test_no_derivative_passes_through_in_either_mode(exact):
    f, values = normal(20, 3), normal(20, 2, seed=1)
    wanted = PermutohedralLattice(f, exact_adjoint=exact)(values)
    ours = PermutohedralLattice(f.requires_grad_(), exact_adjoint=exact)(values.requires_grad_())
    assert not ours.requires_grad
    with dual_level():
        f, values = (make_dual(x.detach(), torch.ones_like(x)) for x in (f, values))
        again = PermutohedralLattice(f, exact_adjoint=exact)(values)
        assert unpack_dual(again).tangent is None
    for one in (ours, again):
        assert_close(one, wanted, rtol=0, atol=0)


# --- dtypes and memory ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_values_stays(dtype):
    f, values = normal(50, 5), normal(50, 3, seed=1)
    lattice = PermutohedralLattice(f.float())
    ours = lattice(values.to(dtype))
    assert ours.dtype == dtype
    assert_close(ours.double(), PermutohedralLattice(f)(values), rtol=0, atol=2e-2 if dtype.itemsize == 2 else 1e-4)
    assert PermutohedralLattice(f.to(dtype)).weight.dtype == torch.promote_types(dtype, torch.float32)


def test_nothing_is_edited_and_the_layout_does_not_matter():
    f, values = normal(50, 5), normal(50, 3, seed=1)
    before = f.clone(), values.clone()
    lattice = PermutohedralLattice(f)
    wanted = lattice(values)
    assert_close(lattice(values.t().contiguous().t()), wanted)
    assert_close(PermutohedralLattice(f.t().contiguous().t())(values), wanted)
    assert_close(lattice(values), wanted, rtol=0, atol=0)
    assert torch.equal(f, before[0]) and torch.equal(values, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("d", range(1, 7))
def test_on_a_gpu_it_is_the_same_without_a_wait(d):
    f, values = normal(500, d), normal(500, 3, seed=1)
    wanted = PermutohedralLattice(f)(values)
    f, values = f.cuda(), values.cuda()
    PermutohedralLattice(f)(values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = PermutohedralLattice(f)(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(ours.cpu(), wanted)


# --- refusals ---


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"`features` of shape \(N, d\), got \(4,\)"),
        (torch.zeros(4, 7), ValueError, r"`d` in \[1, 6\], got 7"),
        (torch.zeros(4, 0), ValueError, r"`d` in \[1, 6\], got 0"),
        (torch.zeros(0, 2), ValueError, r"`N` in \[1, inf\], got 0"),
        (torch.zeros(0, 3, 2), ValueError, r"`B` in \[1, inf\], got 0"),
        (torch.zeros(2, 3, 4, 2), ValueError, r"`features` of shape \(N, d\), got \(2, 3, 4, 2\)"),
        (torch.zeros(4, 2, dtype=torch.uint8), TypeError, r"`features` of a floating dtype"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, error, message):
    with pytest.raises(error, match=f"PermutohedralLattice: expected {message}"):
        PermutohedralLattice(features)


def test_values_that_do_not_fit_are_refused():
    lattice = PermutohedralLattice(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"PermutohedralLattice: expected `values` of shape \(N=4, C\), got \(5, 1\)"):
        lattice(torch.zeros(5, 1))
    with pytest.raises(TypeError, match="`values` of a floating dtype"):
        lattice(torch.zeros(4, 1, dtype=torch.long))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["sxy", "srgb"])
def test_a_sigma_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"image_features: expected `{name}` > 0, got {value}"):
        image_features(torch.zeros(3, 2, 2), **{"sxy": 1, "srgb": 1, name: value})
    with pytest.raises(ValueError, match=r"position_lattice: expected `sxy` > 0"):
        position_lattice((2, 2), sxy=value)


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"image_features: expected `image` of shape \(3, H, W\), got \(2, 2, 3\)"):
        image_features(torch.zeros(2, 2, 3), sxy=1, srgb=1)
    with pytest.raises(
        TypeError, match=r"image_features: expected `image` as uint8 or float in \[0, 1\], got torch.int64"
    ):
        image_features(torch.zeros(3, 2, 2, dtype=torch.long), sxy=1, srgb=1)
