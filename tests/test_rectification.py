"""Token selection and the rectification loss: the paper's Figure 1 by hand, the laws, and the empty cases."""

import re
from itertools import product

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ffr import RectificationLoss, rectification_loss, select_tokens, split_bands

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 4)
gaps = st.sampled_from([0.0, 0.05, 0.2, 0.6])
shares = st.sampled_from([0.0, 0.05, 0.5, 1.0])
distances = st.sampled_from(["cosine", "l1", "l2"])
EXACT = {"rtol": 0, "atol": 0}


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chance(seed, *shape, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def as_tokens(x):
    return x.flatten(2).transpose(1, 2)


def numbers(parts):
    return {name: x.detach().numpy() for name, x in parts.items()}


@st.composite
def scenes(draw, classes=3):
    """Features, a low band not far from them, prototypes and classes, and a mask that hides any of the tokens."""
    seed, images, h, w = draw(seeds), draw(st.integers(1, 3)), draw(sides), draw(sides)
    features = noise(seed, images, 4, h, w)
    return {
        "features": features,
        "low": features + 0.7 * noise(seed + 1, images, 4, h, w),
        "prototypes": noise(seed + 2, images, classes, 4),
        "valid": chance(seed + 3, images, classes),
    }, chance(seed + 4, images, h, w, share=0.7)


def figure_1(**changes):
    """Two patches, two classes. The first patch holds both: its similarity to either changes, by 0.2 and 0.6.

    In the second patch they change by 0.04 and 0.28. The distances to the low band are 0.2 and 0.04.
    """
    parts = {
        "features": torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]]).double(),
        "low": torch.tensor([[[[0.8, 0.96]], [[0.6, 0.28]]]]).double(),
        "prototypes": torch.eye(2)[None].double(),
        "valid": torch.tensor([[True, True]]),
    }
    return {**parts, **changes}


# Selection --------------------------------------------------------------------------------------------------------


@given(scenes(), gaps, st.booleans())
def test_the_selection_is_that_of_a_loop_over_tokens_and_classes(scene, gap, masked):
    parts, mask = scene
    mask = mask if masked else None
    names = dict(zip(("features", "low", "vectors", "valid"), numbers(parts).values(), strict=True))
    expected = reference.selection(**names, gap=gap, mask=None if mask is None else mask.numpy())
    assert torch.equal(select_tokens(**parts, gap=gap, mask=mask), torch.from_numpy(expected))


@given(scenes(), gaps)
def test_tokens_select_as_maps_do(scene, gap):
    parts, mask = scene
    rows = {**parts, "features": as_tokens(parts["features"]), "low": as_tokens(parts["low"])}
    ours = select_tokens(**rows, gap=gap, mask=mask, grid=mask.shape[1:])
    assert torch.equal(ours, select_tokens(**parts, gap=gap, mask=mask))


@given(scenes(), gaps, gaps)
def test_a_larger_gap_selects_fewer_tokens(scene, one, two):
    parts, _ = scene
    many, few = (select_tokens(**parts, gap=gap) for gap in sorted((one, two)))
    assert not (few & ~many).any()


@given(scenes(), gaps, st.floats(0.01, 100))
def test_the_lengths_of_tokens_and_prototypes_do_not_matter(scene, gap, factor):
    parts, _ = scene
    longer = {**parts, "low": parts["low"] * factor, "prototypes": parts["prototypes"] * 3}
    assert torch.equal(select_tokens(**longer, gap=gap + 1e-9), select_tokens(**parts, gap=gap + 1e-9))


@given(scenes(), gaps)
def test_a_bound_on_the_valid_classes_changes_nothing(scene, gap):
    parts, mask = scene
    bound = int(parts["valid"].sum(1).max())
    expected = select_tokens(**parts, gap=gap, mask=mask)
    assert torch.equal(select_tokens(**parts, gap=gap, mask=mask, max_present=bound), expected)
    assert torch.equal(RectificationLoss(gap).select(**parts, mask=mask, max_present=bound), expected)
    loss = rectification_loss(**parts, gap=gap, max_present=bound)
    assert_close(loss, rectification_loss(**parts, gap=gap), **EXACT)
    assert_close(RectificationLoss(gap)(**parts, max_present=bound), loss, **EXACT)


def test_a_bound_that_is_too_low_leaves_classes_out():  # which shows that it is passed on
    parts = figure_1()
    assert select_tokens(**parts, gap=0.01).sum() == 4
    assert select_tokens(**parts, gap=0.01, max_present=1).sum() == 2
    assert RectificationLoss(0.01).select(**parts, max_present=1).sum() == 2
    selected = select_tokens(**parts, gap=0.1, max_present=1)
    few = rectification_loss(**parts, gap=0.1, max_present=1)
    assert_close(few, rectification_loss(**parts, gap=0.1, selected=selected), **EXACT)
    assert not torch.equal(few, rectification_loss(**parts, gap=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gap_of_half_precision_is_taken_in_single_precision(dtype):
    parts = {
        name: noise(seed, *shape).to(dtype)
        for name, seed, shape in (
            ("features", 0, (2, 64, 14, 14)),
            ("low", 1, (2, 64, 14, 14)),
            ("prototypes", 2, (2, 3, 64)),
        )
    }
    common = noise(3, 64)[:, None, None].to(dtype)  # a large common vector, as tokens have: cosines near 0.9
    parts["low"] = parts["features"] + 0.3 * parts["low"] + 3 * common
    parts["features"] = parts["features"] + 3 * common
    parts["prototypes"] = parts["prototypes"] + 3 * common[:, 0, 0]
    valid = torch.ones(2, 3, dtype=torch.bool)
    exact = {name: x.double() for name, x in parts.items()}
    wanted = select_tokens(**exact, valid=valid, gap=0.01)
    assert 0.1 < wanted.double().mean() < 0.9
    assert torch.equal(select_tokens(**parts, valid=valid, gap=0.01), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_angles_of_half_precision_are_seen_in_value_and_gradient(dtype):
    common = 3 * noise(2, 64)[:, None, None]  # as tokens have it: the bands are 0.03 apart, steps of bfloat16 0.004
    x, low = ((common + 0.03 * noise(seed, 2, 64, 7, 7)).to(dtype) for seed in (0, 1))
    found = []
    for kind in (dtype, torch.float64):
        leaf = x.detach().to(kind).requires_grad_()
        loss = rectification_loss(
            features=leaf, low=low.to(kind), prototypes=torch.ones(2, 1, 64, dtype=kind),
            valid=torch.ones(2, 1, dtype=torch.bool), gap=None,
        )  # fmt: skip
        loss.backward()
        found.append((loss.double(), leaf.grad.double()))
    (ours, slope), (exact, wanted) = found
    assert_close(ours, exact, rtol=0.02, atol=0)
    assert torch.cosine_similarity(slope.flatten(), wanted.flatten(), 0) > 0.9


def test_two_classes_of_one_patch_both_select_it():
    picked = select_tokens(**figure_1(), gap=0.1)
    assert picked.dtype == torch.bool
    assert picked.tolist() == [[[[True, False]], [[True, True]]]]


def test_a_change_equal_to_the_gap_is_not_significant_and_its_sign_does_not_matter():
    along, across = torch.eye(4)[:2].reshape(2, 1, 4, 1, 1)
    for features, low in ((along, across), (across, along)):  # the cosine falls, or rises, by 1
        parts = {"features": features, "low": low, "prototypes": torch.eye(4)[None, :1], "valid": torch.ones(1, 1) > 0}
        assert not select_tokens(**parts, gap=1).any()
        assert select_tokens(**parts, gap=0.999).all()


def test_a_class_that_is_not_valid_and_a_masked_token_select_nothing():
    second = figure_1(valid=torch.tensor([[False, True]]))
    assert select_tokens(**second, gap=0.1).tolist() == [[[[False, False]], [[True, True]]]]
    mask = torch.tensor([[[False, True]]])
    assert select_tokens(**figure_1(), gap=0.1, mask=mask).tolist() == [[[[False, False]], [[False, True]]]]


def test_the_selection_carries_no_gradient():
    parts = figure_1(features=figure_1()["features"].requires_grad_())
    assert not select_tokens(**parts).requires_grad


# Loss: known answers ----------------------------------------------------------------------------------------------


def test_a_patch_of_two_classes_is_rectified_for_both():
    features = figure_1()["features"].requires_grad_()
    settings = {"gap": 0.1, "min_fraction": 0}
    loss = rectification_loss(**figure_1(features=features), **settings)
    assert_close(loss.item(), (0.2 + 0.2 + 0.04) / 3)  # three pairs of a token and a class

    (both,) = torch.autograd.grad(loss, features)
    one = select_tokens(**figure_1(), gap=0.1) & torch.tensor([False, True])[None, :, None, None]
    loss = rectification_loss(**figure_1(features=features), selected=one, **settings)
    assert_close(loss.item(), (0.2 + 0.04) / 2)
    (single,) = torch.autograd.grad(loss, features)
    assert_close(both[..., 0] * 3, 2 * single[..., 0] * 2)  # by pair, the first patch is pulled twice as hard
    assert_close(both[..., 1] * 3, single[..., 1] * 2)
    assert both[..., 0].abs().max() > 0.1


@pytest.mark.parametrize(
    ("valid", "min_fraction", "expected"),
    [
        ((True, True), 0.0, 0.44 / 3),
        ((True, True), 0.75, 0.44 / 3),  # the floor reaches the three selected pairs
        ((True, True), 0.9, 0.44 / 3.6),
        ((True, True), 1.0, 0.44 / 4),  # all pairs: two tokens, two classes
        ((False, True), 1.0, 0.24 / 2),
        ((True, False), 0.0, 0.2),
        ((True, False), 0.4, 0.2),  # a floor of 0.8 is below the one selected pair
        ((True, False), 1.0, 0.2 / 2),
    ],
)
def test_the_denominator_has_a_floor_in_shares_of_all_pairs(valid, min_fraction, expected):
    parts = figure_1(valid=torch.tensor([valid]))
    loss = rectification_loss(**parts, gap=0.1, min_fraction=min_fraction)
    assert_close(loss.item(), expected)


@pytest.mark.parametrize(
    ("mask", "min_fraction", "expected"),
    [((True, False), 0, 0.2), ((False, True), 0, 0.04), ((True, False), 1, 0.2), ((False, True), 1, 0.04 / 2)],
)
def test_a_masked_token_is_no_pair_neither_above_nor_below_the_line(mask, min_fraction, expected):
    mask = torch.tensor([[mask]])
    settings = {"gap": 0.1, "min_fraction": min_fraction, "mask": mask}
    assert_close(rectification_loss(**figure_1(), **settings).item(), expected)
    whole = select_tokens(**figure_1(), gap=0.1)  # selected without the mask
    assert_close(rectification_loss(**figure_1(), selected=whole, **settings).item(), expected)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("cosine", (2 * 0.2 + 0.04) / 3),
        ("l1", (2 * (0.2 + 0.6) / 2 + (0.04 + 0.28) / 2) / 3),
        ("l2", (2 * (0.2**2 + 0.6**2) / 2 + (0.04**2 + 0.28**2) / 2) / 3),
    ],
)
def test_each_distance_by_hand(distance, expected):
    loss = rectification_loss(**figure_1(), gap=0.1, min_fraction=0, distance=distance)
    assert_close(loss.item(), expected)


@pytest.mark.parametrize(("mask", "expected"), [(None, 0.24 / 2), ((True, False), 0.2), ((False, True), 0.04)])
@pytest.mark.parametrize("valid", [(True, True), (False, False)])
def test_without_guidance_by_classes_every_token_counts_once(mask, expected, valid):
    mask = None if mask is None else torch.tensor([[mask]])
    loss = rectification_loss(**figure_1(valid=torch.tensor([valid])), gap=None, min_fraction=1, mask=mask)
    assert_close(loss.item(), expected)


def test_the_defaults_are_those_of_the_method():
    parts = figure_1(valid=torch.tensor([[True, False]]))
    parts["low"][0, :, 0, 0] = torch.tensor([0.94, (1 - 0.94**2) ** 0.5])  # changes by 0.06, the second token by 0.04
    assert select_tokens(**parts).tolist() == [[[[True, False]], [[False, False]]]]
    assert_close(rectification_loss(**parts).item(), 0.06)
    for name in ("features", "low"):  # 98 more tokens, equal to their low band: the floor is 0.05 x 100
        parts[name] = torch.cat([parts[name], torch.ones(1, 2, 1, 98).double()], 3)
    assert_close(rectification_loss(**parts).item(), 0.06 / 5)
    shown = "RectificationLoss(gap=0.05, min_fraction=0.05, distance='cosine', stop_gradient=True)"
    assert repr(RectificationLoss()) == shown


# Loss: laws -------------------------------------------------------------------------------------------------------


@given(scenes(), gaps, shares, distances, st.booleans())
def test_the_loss_is_that_of_a_loop_over_pairs(scene, gap, share, distance, masked):
    parts, mask = scene
    mask = mask if masked else None
    selected = select_tokens(**parts, gap=gap, mask=mask)
    there = numbers({**parts, "selected": selected} | ({"mask": mask} if masked else {}))
    del there["prototypes"]
    expected = reference.rectification(**there, min_fraction=share, distance=distance)
    settings = {"gap": gap, "min_fraction": share, "distance": distance, "mask": mask}
    ours = rectification_loss(**parts, **settings)
    assert_close(ours.item(), expected, rtol=1e-12, atol=1e-14)
    assert_close(rectification_loss(**parts, **settings, selected=selected), ours, **EXACT)

    rows = {**parts, "features": as_tokens(parts["features"]), "low": as_tokens(parts["low"])}
    shape = parts["features"].shape[2:]
    assert_close(rectification_loss(**rows, **settings, grid=shape), ours, rtol=1e-12, atol=1e-14)


@given(scenes(), gaps, distances)
def test_only_selected_tokens_are_pulled_and_nothing_else_gets_gradient(scene, gap, distance):
    parts, mask = scene
    parts = {name: x if name == "valid" else x.requires_grad_() for name, x in parts.items()}
    rectification_loss(**parts, gap=gap, distance=distance, mask=mask).backward()
    assert parts["low"].grad is None
    assert parts["prototypes"].grad is None
    moved = parts["features"].grad.abs().amax(1) > 0
    assert torch.equal(moved, select_tokens(**parts, gap=gap, mask=mask).any(1))


@given(scenes(), distances)
def test_a_step_down_the_gradient_brings_selected_tokens_nearer_to_their_low_band(scene, distance):
    parts, _ = scene
    parts["features"].requires_grad_()
    loss = rectification_loss(**parts, gap=0.05, min_fraction=0, distance=distance)
    (gradient,) = torch.autograd.grad(loss, parts["features"])
    before, low = parts["features"].detach(), parts["low"]
    after = before - 1e-3 * gradient

    def apart(x):
        if distance == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(x, low, dim=1)
        return (x - low).abs().pow(1 if distance == "l1" else 2).sum(1)

    picked = select_tokens(**parts, gap=0.05).any(1)
    assert (apart(after) < apart(before))[picked].all()
    assert torch.equal(after.movedim(1, -1)[~picked], before.movedim(1, -1)[~picked])


def test_the_low_band_is_a_fixed_teacher_even_where_it_comes_from_the_features():
    x, rest = noise(0, 2, 8, 6, 7).requires_grad_(), {"prototypes": noise(1, 2, 3, 8), "valid": torch.ones(2, 3) > 0}
    live = rectification_loss(features=x, low=split_bands(x, 0.2).low, **rest)
    fixed = rectification_loss(features=x, low=split_bands(x.detach(), 0.2).low, **rest)
    both = rectification_loss(features=x, low=split_bands(x, 0.2).low, stop_gradient=False, **rest)
    one, two, three = (torch.autograd.grad(loss, x)[0] for loss in (live, fixed, both))
    assert_close(one, two, **EXACT)
    assert not torch.allclose(one, three)
    assert_close(live, both, **EXACT)


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
def test_without_stop_gradient_the_low_band_is_pulled_as_well(distance):
    parts = figure_1()
    features, low = parts["features"].requires_grad_(), parts["low"].requires_grad_()
    parts = {**parts, "features": features, "low": low}
    loss = rectification_loss(**parts, gap=0.1, min_fraction=0, distance=distance, stop_gradient=False)
    loss.backward()
    # By symmetry: for l1 and l2 the two gradients are opposite, for the cosine of unit vectors they are mirrored.
    if distance == "cosine":
        assert_close(low.grad.norm(dim=1), features.grad.norm(dim=1))
    else:
        assert_close(low.grad, -features.grad)
    assert (low.grad.norm(dim=1) > 0.01).all()


@given(scenes(), shares)
def test_the_loss_is_between_zero_and_two(scene, share):
    loss = rectification_loss(**scene[0], min_fraction=share)
    assert 0 <= loss <= 2


def test_rounding_never_makes_it_negative():
    for seed in range(20):
        x = noise(seed, 1, 8, 4, 4, dtype=torch.float32)
        rest = {"prototypes": torch.zeros(1, 1, 8), "valid": torch.ones(1, 1) > 0, "gap": None}
        assert rectification_loss(features=x, low=split_bands(x, 0.5).low, **rest) >= 0


# Empty cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("min_fraction", [0, 0.05])
@pytest.mark.parametrize(
    "settings",
    [
        {"gap": 2.0},
        {"valid": torch.zeros(1, 2) > 0},
        {"mask": torch.zeros(1, 1, 2) > 0},
        {"mask": torch.zeros(1, 1, 2) > 0, "gap": None},
        {"low": figure_1()["features"]},
    ],
    ids=["nothing selected", "no valid class", "no token", "no token, no guidance", "no high band"],
)
def test_where_nothing_is_selected_the_loss_is_exactly_zero_and_connected(settings, min_fraction, distance):
    features = figure_1()["features"].requires_grad_()
    parts = figure_1(features=features) | settings
    loss = rectification_loss(**parts, min_fraction=min_fraction, distance=distance)
    assert loss.item() == 0
    loss.backward()
    assert_close(features.grad, torch.zeros_like(features), **EXACT)


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
def test_zero_tokens_and_zero_prototypes_leave_the_gradient_finite(distance):
    rest = {"low": figure_1()["low"].float(), "valid": torch.ones(1, 2) > 0, "distance": distance}
    for prototypes, length in product((torch.eye(2)[None], torch.zeros(1, 2, 2)), (0.0, 1e-30, 1e-20, 1e-18)):
        features = torch.full((1, 2, 1, 2), length).requires_grad_()
        for gap in (0.1, None):
            loss = rectification_loss(features=features, prototypes=prototypes, gap=gap, **rest)
            (gradient,) = torch.autograd.grad(loss, features)
            assert loss.isfinite()
            assert gradient.isfinite().all()


# Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "length"), [("cosine", 0.01), ("cosine", 1), ("cosine", 900), ("l2", 100)])
def test_half_precision_neither_overflows_nor_vanishes(distance, length):
    x = (noise(0, 2, 64, 6, 7) * length).half()  # the squares of 900 overflow fp16
    low = split_bands(x, 0.2).low
    rest = {"prototypes": noise(1, 2, 3, 64), "valid": torch.ones(2, 3) > 0, "distance": distance, "gap": None}
    loss = rectification_loss(features=x, low=low, **rest)
    assert loss.dtype == torch.float32
    expected = rectification_loss(features=x.double(), low=low.double(), **rest)
    assert_close(loss.double(), expected, rtol=2e-3, atol=0)


def test_one_difference_whose_square_overflows_stays_finite_in_the_mean():
    x = torch.zeros(1, 64, 1, 1).half()
    x[:, 0] = 300  # 90000 / 64
    rest = {"prototypes": torch.ones(1, 1, 64), "valid": torch.ones(1, 1) > 0, "gap": None}
    loss = rectification_loss(features=x, low=torch.zeros_like(x), distance="l2", **rest)
    assert_close(loss.item(), 90000 / 64, rtol=1e-3, atol=0)


def test_under_autocast_single_precision_stays_exact():
    x = noise(0, 2, 8, 6, 7, dtype=torch.float32)
    parts = {"features": x, "low": split_bands(x, 0.2).low, "prototypes": noise(1, 2, 3, 8).float()}
    parts["valid"] = torch.ones(2, 3) > 0
    expected = rectification_loss(**parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(rectification_loss(**parts), expected, **EXACT)


# Several ranks ----------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), shares, st.sampled_from([None, 0.05, 0.6]), distances)
def test_the_objective_does_not_depend_on_the_number_of_ranks(seed, first, share, gap, distance):
    x, valid, mask = noise(seed, 4, 4, 2, 3), chance(seed, 4, 3), chance(seed + 1, 4, 2, 3, share=0.7)
    low, prototypes = x + 0.7 * noise(seed + 1, 4, 4, 2, 3), noise(seed + 2, 4, 3, 4)
    settings = {"min_fraction": share, "gap": gap, "distance": distance}
    split = [slice(0, first), slice(first, 4)]  # unequal halves, and either may select nothing

    def on_one_rank(index, x, **kw):
        part = split[index]
        rest = {"low": low[part], "prototypes": prototypes[part], "valid": valid[part], "mask": mask[part]}
        return rectification_loss(features=x, **rest, **settings, **kw)

    x.requires_grad_()
    whole = rectification_loss(features=x, low=low, prototypes=prototypes, valid=valid, mask=mask, **settings)
    (gradient,) = torch.autograd.grad(whole, x)
    loss, gradients = reference.over_ranks(on_one_rank, *(x[part] for part in split))
    assert_close(loss, whole.detach(), rtol=1e-12, atol=1e-14)
    assert_close(gradients, gradient, rtol=1e-12, atol=1e-14)


# Nothing waits for the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.05, None])
def test_the_host_reads_nothing(gap):
    x = noise(0, 2, 4, 3, 5).requires_grad_()
    rest = {"prototypes": noise(1, 2, 3, 4), "valid": torch.ones(2, 3) > 0, "mask": torch.ones(2, 3, 5) > 0}
    with reference.no_host_sync():
        for distance in ("cosine", "l1", "l2"):
            loss = RectificationLoss(gap=gap, distance=distance)
            loss(features=x, low=x.detach() + 1, **rest, all_reduce=lambda counts: counts * 2, world_size=2).backward()


# Module -----------------------------------------------------------------------------------------------------------


@given(scenes(), gaps, shares, distances, st.booleans())
def test_the_module_is_the_function_with_its_settings_bound(scene, gap, share, distance, stop):
    parts, mask = scene
    loss = RectificationLoss(gap, share, distance, stop)
    settings = {"gap": gap, "min_fraction": share, "distance": distance, "stop_gradient": stop, "mask": mask}
    parts["low"].requires_grad_()
    ours, theirs = loss(**parts, mask=mask), rectification_loss(**parts, **settings)
    assert_close(ours, theirs, **EXACT)
    assert ours.requires_grad == (not stop)
    assert torch.equal(loss.select(**parts, mask=mask), select_tokens(**parts, gap=gap, mask=mask))
    ranks = {"all_reduce": lambda counts: counts + 7, "world_size": 3}
    assert_close(loss(**parts, mask=mask, **ranks), rectification_loss(**parts, **settings, **ranks), **EXACT)
    nothing = torch.zeros_like(loss.select(**parts))
    assert loss(**parts, selected=nothing).item() == 0
    rows = {**parts, "features": as_tokens(parts["features"]), "low": as_tokens(parts["low"])}
    assert_close(loss(**rows, mask=mask, grid=mask.shape[1:]), ours, rtol=1e-12, atol=1e-14)
    assert torch.equal(loss.select(**rows, grid=mask.shape[1:]), loss.select(**parts))


# Refusals ---------------------------------------------------------------------------------------------------------

PARTS = {
    "features": torch.zeros(2, 8, 4, 5),
    "low": torch.zeros(2, 8, 4, 5),
    "prototypes": torch.zeros(2, 3, 8),
    "valid": torch.ones(2, 3) > 0,
}


@pytest.mark.parametrize("function", [rectification_loss, select_tokens])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"features": torch.zeros(2, 20, 8)}, ValueError, "`features` of shape (B, D, h, w), got (2, 20, 8). For"),
        ({"low": torch.zeros(2, 8, 4, 4)}, ValueError, "`low` of shape (B=2, D=8, h=4, w=5), got (2, 8, 4, 4)."),
        ({"low": torch.zeros(2, 20, 8)}, ValueError, "`low` of shape (B=2, D=8, h=4, w=5), got (2, 20, 8). For tokens"),
        ({"prototypes": torch.zeros(2, 3, 7)}, ValueError, "`prototypes` of shape (B=2, K, D=8), got (2, 3, 7)."),
        ({"valid": torch.ones(2, 4) > 0}, ValueError, "`valid` of shape (B=2, K=3), got (2, 4)."),
        ({"valid": torch.ones(2, 3)}, TypeError, "`valid` of dtype torch.bool, got torch.float32. Use `valid > 0.5`."),
        ({"features": torch.ones(2, 8, 4, 5).long()}, TypeError, "`features` of a floating dtype, got torch.int64."),
        ({"low": torch.ones(2, 8, 4, 5).long()}, TypeError, "`low` of a floating dtype, got torch.int64."),
        ({"mask": torch.ones(2, 5, 4) > 0}, ValueError, "`mask` of shape (B=2, h=4, w=5), got (2, 5, 4)."),
        ({"mask": torch.ones(2, 4, 5)}, TypeError, "`mask` of dtype torch.bool, got torch.float32."),
        ({"grid": (5, 4)}, ValueError, "`grid` (4, 5) as in `features`, got (5, 4). Correct `grid`, or"),
    ],
)
def test_what_does_not_fit_is_refused(function, changes, kind, message):
    with pytest.raises(kind, match=re.escape(f"{function.__name__}: expected {message}")):
        function(**{**PARTS, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"selected": torch.ones(2, 2, 4, 5) > 0}, ValueError, "`selected` of shape (B=2, K=3, h=4, w=5), got (2, 2"),
        ({"selected": torch.ones(2, 3, 4, 5)}, TypeError, "`selected` of dtype torch.bool, got torch.float32."),
        ({"min_fraction": 1.5}, ValueError, "`min_fraction` in [0, 1], got 1.5."),
        ({"min_fraction": -1}, ValueError, "`min_fraction` in [0, 1], got -1."),
        ({"distance": "L1"}, ValueError, "`distance` to be one of 'cosine', 'l1', 'l2', got 'L1'."),
    ],
)
def test_settings_of_the_loss_that_do_not_fit_are_refused(changes, kind, message):
    with pytest.raises(kind, match=re.escape(f"rectification_loss: expected {message}")):
        rectification_loss(**PARTS, **changes)
    if "selected" not in changes:
        with pytest.raises(kind, match=re.escape(f"RectificationLoss: expected {message}")):
            RectificationLoss(**changes)


@pytest.mark.parametrize("gap", [-0.1, 2.1, float("nan")])
def test_a_gap_that_no_cosine_can_have_is_refused(gap):
    for refuse in (lambda: select_tokens(**PARTS, gap=gap), lambda: rectification_loss(**PARTS, gap=gap)):
        with pytest.raises(ValueError, match=r"select_tokens: expected `gap` in \[0, 2\], got"):
            refuse()
    with pytest.raises(ValueError, match=r"RectificationLoss: expected `gap` in \[0, 2\], got"):
        RectificationLoss(gap)


def test_there_is_no_selection_to_show_without_guidance():
    with pytest.raises(ValueError, match=r"RectificationLoss.select: gap=None selects nothing by class. Give a gap."):
        RectificationLoss(gap=None).select(**PARTS)


@pytest.mark.parametrize("distance", ["cosine", "l1", "l2"])
def test_a_masked_token_may_hold_anything(distance):
    x, low = noise(0, 2, 3, 4, 5), noise(1, 2, 3, 4, 5)
    rest = {"prototypes": noise(2, 2, 3, 3), "valid": torch.ones(2, 3) > 0, "distance": distance}
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    wanted = rectification_loss(features=x, low=low, mask=mask, **rest)
    assert wanted > 0
    broken, teacher = (torch.where(mask[:, None], maps, torch.nan) for maps in (x, low))
    broken.requires_grad_()
    ours = rectification_loss(features=broken, low=teacher, mask=mask, **rest)
    assert_close(ours, wanted)
    assert torch.autograd.grad(ours, broken)[0].isfinite().all()


def test_a_reduction_in_place_that_returns_nothing_is_refused():
    x = noise(0, 2, 3, 4, 5)
    rest = {"prototypes": noise(2, 2, 3, 3), "valid": torch.ones(2, 3) > 0}
    with pytest.raises(TypeError, match=r"rectification_loss: expected `all_reduce` to return the sum, got NoneType"):
        rectification_loss(features=x, low=x, **rest, all_reduce=lambda counts: None)


def test_ranks_without_a_sum_over_them_are_refused():
    x = noise(0, 2, 3, 4, 5)
    rest = {"prototypes": noise(2, 2, 3, 3), "valid": torch.ones(2, 3) > 0}
    with pytest.raises(ValueError, match="rectification_loss: expected `all_reduce` with `world_size` 2, got None"):
        rectification_loss(features=x, low=x, **rest, world_size=2)
