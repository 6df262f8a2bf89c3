"""The one wording of an error: what fits, what is refused, and in which words."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ffr
from ffr import _check

sizes = st.integers(0, 5)


def refused(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# Shapes -----------------------------------------------------------------------------------------------------------


@given(sizes, sizes, sizes, sizes)
def test_every_axis_is_returned_with_its_size(b, k, d, n):
    bound = _check.bind("f", x=(torch.zeros(b, n, d), "B N D"), y=(torch.zeros(b, k, d), "B K D"))
    assert bound == {"B": b, "N": n, "D": d, "K": k}


@given(st.lists(sizes, max_size=4), st.lists(sizes, max_size=4))
def test_two_tensors_of_one_pattern_fit_if_and_only_if_their_shapes_are_equal(one, two):
    pattern = " ".join("ABCD"[: len(one)])
    tensors = {"x": (torch.zeros(one), pattern), "y": (torch.zeros(two), pattern)}
    if one == two:
        assert list(_check.bind("f", **tensors).values()) == one
    else:
        with pytest.raises(ValueError, match=re.escape(f"got {tuple(two)}")):
            _check.bind("f", **tensors)


def test_a_message_shows_the_sizes_known_from_earlier_arguments():
    tensors = {"features": (torch.zeros(2, 8, 7, 7), "B D h w"), "low": (torch.zeros(2, 8, 4, 4), "B D h w")}
    with refused(ValueError, "rectify: expected `low` of shape (B=2, D=8, h=7, w=7), got (2, 8, 4, 4)."):
        _check.bind("rectify", **tensors)


def test_a_message_shows_only_what_is_known():
    with refused(ValueError, "f: expected `x` of shape (B=2, D, h, w), got (2, 196, 768). Pass grid=(h, w)."):
        _check.bind("f", sizes={"B": 2}, remedy="Pass grid=(h, w).", x=(torch.zeros(2, 196, 768), "B D h w"))


def test_an_axis_named_twice_in_one_pattern_must_agree_with_itself():
    assert _check.bind("f", x=(torch.zeros(3, 3), "K K")) == {"K": 3}
    with refused(ValueError, "f: expected `x` of shape (K, K), got (3, 4)."):
        _check.bind("f", x=(torch.zeros(3, 4), "K K"))


def test_a_number_stands_for_itself_and_a_blank_for_anything():
    assert _check.bind("f", x=(torch.zeros(2, 3, 9, 4), "B 3 _ _")) == {"B": 2}
    with refused(ValueError, "f: expected `x` of shape (B, 3, _, _), got (2, 4, 9, 9)."):
        _check.bind("f", x=(torch.zeros(2, 4, 9, 9), "B 3 _ _"))


def test_sizes_known_beforehand_are_kept_and_not_edited():
    before = {"B": 2}
    assert _check.bind("f", sizes=before, x=(torch.zeros(2, 3), "B K")) == {"B": 2, "K": 3}
    assert before == {"B": 2}


@pytest.mark.parametrize(("value", "kind"), [([1.0], "list"), (np.ones(1), "ndarray"), (0.5, "float")])
def test_what_is_no_tensor_is_refused(value, kind):
    how = "Convert it with torch.as_tensor(np.asarray(x))."
    with refused(TypeError, f"f: expected `x` to be a torch.Tensor, got {kind}. {how}"):
        _check.bind("f", x=(value, "B"))
    with refused(TypeError, f"f: expected `x` to be a torch.Tensor, got {kind}. {how}"):
        _check.tokens("f", grid=(1, 1), x=value)
    how = "Pass multi-hot rows, (B, K): 1 for every class of the image, else 0."
    with refused(TypeError, f"f: expected `labels` to be a torch.Tensor, got {kind}. {how}"):
        _check.bind("f", labels=(value, "B K"))
    for name in ("x", "labels"):
        with refused(TypeError, f"f: expected `{name}` to be a torch.Tensor, got NoneType."):
            _check.bind("f", **{name: (None, "B")})


# Dtypes -----------------------------------------------------------------------------------------------------------

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
ALL = sorted(FLOATS | INTEGERS | {torch.bool, torch.complex64}, key=str)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("check", "fine", "wanted", "remedy"),
    [
        (_check.floating, FLOATS, "a floating dtype", "Convert it with .float()."),
        (_check.integer, INTEGERS, "an integer dtype", "Use .long()."),
        (_check.boolean, {torch.bool}, "dtype torch.bool", "Use `x > 0.5`."),
    ],
)
def test_a_dtype_is_taken_or_refused_with_the_remedy(check, fine, wanted, remedy, dtype):
    if dtype in fine:
        check("f", x=torch.zeros(2, dtype=dtype))
    else:
        with refused(TypeError, f"f: expected `x` of {wanted}, got {dtype}. {remedy}"):
            check("f", x=torch.zeros(2, dtype=dtype))


def test_every_tensor_of_a_call_is_looked_at():
    with pytest.raises(TypeError, match="`second`"):
        _check.floating("f", first=torch.zeros(1), second=torch.zeros(1, dtype=torch.int64))


# Values -----------------------------------------------------------------------------------------------------------


@given(st.floats(), st.floats(-2, 2), st.floats(0, 3))
def test_a_number_is_taken_if_and_only_if_it_lies_in_the_closed_range(value, start, length):
    if start <= value <= start + length:
        _check.within("f", at_least=start, at_most=start + length, x=value)
    else:
        with pytest.raises(ValueError, match=r"^f: expected `x` in \["):
            _check.within("f", at_least=start, at_most=start + length, x=value)


@pytest.mark.parametrize("value", [0, 0.5, 0.0])
def test_the_ends_of_a_range_belong_to_it(value):
    _check.within("f", at_most=0.5, mu=value)


@pytest.mark.parametrize("value", [-1e-9, 0.51, float("nan"), float("inf")])
def test_a_number_out_of_range_is_refused_with_the_remedy(value):
    with refused(ValueError, f"f: expected `mu` in [0, 0.5], got {value!r}. 0.5 is Nyquist."):
        _check.within("f", at_most=0.5, remedy="0.5 is Nyquist", mu=value)


def test_a_tensor_is_no_number_even_within_the_range(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda tensor, **how: pytest.fail("its values were read"))
    how = "A tensor of one value is read by .item(); for a value an image, call image by image."
    with refused(TypeError, f"f: expected `mu` to be a number, got a tensor of shape (). {how} 0.5 is Nyquist."):
        _check.within("f", at_most=0.5, remedy="0.5 is Nyquist", mu=torch.tensor(0.3))
    with refused(TypeError, f"f: expected `n` to be an integer, got a tensor of shape (2,). {how}"):
        _check.within("f", whole=True, n=torch.tensor([3, 4]))


def test_a_range_without_an_end_says_so():
    with refused(ValueError, "f: expected `n` in [1, inf], got 0."):
        _check.within("f", at_least=1, n=0)


@pytest.mark.parametrize(("value", "shown"), [("0.4", "'0.4'"), (None, "None"), ((16, 16), "(16, 16)"), ([1], "[1]")])
def test_what_is_no_number_is_refused_by_name(value, shown):
    with refused(TypeError, f"f: expected `mu` to be a number, got {shown}. 0.5 is Nyquist."):
        _check.within("f", remedy="0.5 is Nyquist", mu=value)
    with refused(TypeError, f"f: expected `n` to be an integer, got {shown}."):
        _check.within("f", whole=True, n=value)


def test_a_number_that_is_not_whole_is_refused_where_one_counts():
    for value in (3, np.int64(3), np.uint8(3), True):
        _check.within("f", whole=True, n=value)
    _check.within("f", n=np.float32(3.5))
    for value in (3.0, np.float64(3)):
        with refused(TypeError, f"f: expected `n` to be an integer, got {value!r}."):
            _check.within("f", whole=True, n=value)


@pytest.mark.parametrize("value", [6, 6.0, (6,), (6, 6, 1), (6.0, 6.0), "6"])
def test_what_is_no_height_and_width_is_refused_by_name(value):
    for fine in ((6, 7), [6, 7], torch.Size([6, 7]), (np.int64(6), 7)):
        _check.pair("f", grid=fine)
    with refused(ValueError, f"f: expected `grid` of two integers, (height, width), got {value!r}."):
        _check.pair("f", grid=value)
    with pytest.raises(ValueError, match=r"^f: expected `grid` of two integers"):
        _check.tokens("f", grid=value, x=torch.zeros(2, 36, 3))


def test_a_height_and_width_below_one_are_refused():
    for grid in ((9, -4), (0, 3)):
        with refused(ValueError, f"f: expected `grid` of at least 1 x 1, got {grid}."):
            _check.tokens("f", grid=grid, x=torch.zeros(2, 36, 3))


def test_ranks_that_nothing_sums_over_are_refused():
    _check.ranks("f", None, 1)
    _check.ranks("f", lambda counts: counts, 4)
    with refused(
        ValueError,
        "f: expected `all_reduce` with `world_size` 4, got None. Pass both, or neither: without a sum over ranks each "
        "counts alone.",
    ):
        _check.ranks("f", None, 4)
    with refused(ValueError, "f: expected `world_size` in [1, inf], got 0."):
        _check.ranks("f", lambda counts: counts, 0)


def test_a_choice_is_taken_or_refused_with_the_choices():
    _check.one_of("f", "distance", "l1", ("cosine", "l1"))
    with refused(ValueError, "f: expected `distance` to be one of 'cosine', 'l1', got 'L1'."):
        _check.one_of("f", "distance", "L1", ("cosine", "l1"))


# Tokens and maps --------------------------------------------------------------------------------------------------


def test_tokens_and_maps_come_out_as_the_same_tokens():
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    rows = torch.stack([x[:, :, i, j] for i in range(4) for j in range(5)], 1)  # (B, N, D), row by row
    for given_as, grid in ((x, None), (x, (4, 5)), (rows, (4, 5)), (rows, [4, 5])):
        (out,), bound = _check.tokens("f", grid=grid, x=given_as)
        assert torch.equal(out, rows)
        assert bound == {"B": 2, "D": 3, "h": 4, "w": 5}
        assert torch.equal(_check.maps("f", given_as, grid), x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_neither_way_copies(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    (out,), _ = _check.tokens("f", x=x)
    assert out.data_ptr() == x.data_ptr()
    rows = torch.randn(2, 20, 3)
    assert _check.maps("f", rows, (4, 5)).data_ptr() == rows.data_ptr()


def test_maps_and_tokens_may_meet_in_one_call():
    out, bound = _check.tokens("f", grid=(4, 5), x=torch.zeros(2, 3, 4, 5), y=torch.zeros(2, 20, 3))
    assert [x.shape for x in out] == [(2, 20, 3), (2, 20, 3)]
    assert bound == {"B": 2, "D": 3, "h": 4, "w": 5}


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 196, 768), None, "of shape (B, D, h, w), got (2, 196, 768). For tokens (B, N, D) pass grid=(h, w)."),
        ((14, 14), None, "of shape (B, D, h, w), got (14, 14)."),
        ((14, 14), (14, 14), "of shape (B, D, h, w), got (14, 14)."),
        (
            (2, 197, 768),
            (14, 14),
            "of shape (B, N=196, D), got (2, 197, 768). "
            "`grid` is 14 x 14 = 196 tokens: drop prefix tokens, or correct `grid`.",
        ),
        (
            (196, 2, 768),
            (14, 14),
            "of shape (B, N=196, D), got (196, 2, 768). "
            "The tokens lie first: bring them to (B, N, D) with .transpose(0, 1).",
        ),
        (
            (32, 25, 64),  # 32 images of 24 tokens and one of prefix
            (4, 6),
            "of shape (B, N=24, D), got (32, 25, 64). "
            "`grid` is 4 x 6 = 24 tokens: drop prefix tokens, or correct `grid`.",
        ),
        (
            (197, 2, 768),
            (14, 14),
            "of shape (B, N=196, D), got (197, 2, 768). "
            "The tokens lie first: bring them to (B, N, D) with .transpose(0, 1), without 1 prefix token(s).",
        ),
        (
            (2, 768, 196),
            (14, 14),
            "of shape (B, N=196, D), got (2, 768, 196). "
            "The channels lie before the tokens: bring them to (B, N, D) with .transpose(1, 2).",
        ),
    ],
)
def test_features_that_are_neither_maps_nor_tokens_of_the_grid_are_refused(shape, grid, message):
    with refused(ValueError, f"f: expected `x` {message}"):
        _check.tokens("f", grid=grid, x=torch.zeros(shape))


def test_a_grid_that_contradicts_a_map_is_refused():
    with refused(
        ValueError, "f: expected `grid` (7, 9) as in `x`, got (9, 7). Correct `grid`, or leave it out for maps."
    ):
        _check.tokens("f", grid=(9, 7), x=torch.zeros(2, 3, 7, 9))
    last = "The channels lie last: bring them to (B, D, h, w) with .permute(0, 3, 1, 2)."
    with refused(ValueError, f"f: expected `grid` (7, 768) as in `x`, got (7, 7). {last}"):
        _check.tokens("f", grid=(7, 7), x=torch.zeros(2, 7, 7, 768))


@pytest.mark.parametrize(("shape", "grid"), [((2, 3, 4, 6), None), ((3, 3, 4, 5), None), ((2, 20, 4), (4, 5))])
def test_a_second_tensor_must_have_the_sizes_of_the_first(shape, grid):
    with pytest.raises(ValueError, match=rf"^f: expected `y` of shape \(B=2, .*, got {re.escape(str(shape))}"):
        _check.tokens("f", grid=grid, x=torch.zeros(2, 3, 4, 5), y=torch.zeros(shape))


def test_features_of_integers_are_refused():
    with refused(TypeError, "f: expected `x` of a floating dtype, got torch.int64. Convert it with .float()."):
        _check.tokens("f", x=torch.zeros(1, 2, 3, 4, dtype=torch.int64))


# Across the package -----------------------------------------------------------------------------------------------

X, CAM, LABELS, IMAGES = torch.ones(1, 4, 6, 6), torch.ones(1, 3, 24, 24), torch.ones(1, 3), torch.ones(1, 3, 24, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ffr.FrequencyMask("0.4"), "FrequencyMask: expected `mu` to be a number, got '0.4'"),
        (lambda: ffr.ClassPrototypes(None), "ClassPrototypes: expected `seed_threshold` to be a number, got None"),
        (lambda: ffr.IntermediateClassifier(4, 3.0), "IntermediateClassifier: expected `num_classes` to be an integer"),
        (
            lambda: ffr.DualSegmentationHead(4, 3, 8.0),
            "DualSegmentationHead: expected `hidden` to be an integer, got 8.0",
        ),
        (lambda: ffr.PixelAdaptiveRefinement((1.5,)), "PixelAdaptiveRefinement: expected `dilations` to be an integer"),
        (
            lambda: ffr.PixelAdaptiveRefinement(iterations=2.5),
            "PixelAdaptiveRefinement: expected `iterations` to be an",
        ),
        (lambda: ffr.DenseCRF(iterations=2.5), "DenseCRF: expected `iterations` to be an integer, got 2.5"),
        (lambda: ffr.DenseEnergyLoss("1e-7"), "DenseEnergyLoss: expected `weight` to be a number, got '1e-7'"),
        (
            lambda: ffr.class_prototypes(X, CAM, LABELS, patch_size=(4, 4)),
            "class_prototypes: expected `patch_size` to be",
        ),
        (
            lambda: ffr.class_prototypes(X, CAM, LABELS, max_present=2.0),
            "present_classes: expected `max_present` to be an",
        ),
        (lambda: ffr.refine_label(IMAGES, CAM, LABELS, downscale=1.5), "refine_label: expected `downscale` to be an"),
        (
            lambda: ffr.cam.label_to_cam(torch.ones(1, 2, 2).long(), num_classes=2.0),
            "label_to_cam: expected `num_classes`",
        ),
        (lambda: ffr.cam.tokens_to_map(torch.ones(1, 5, 4), prefix=None), "tokens_to_map: expected `prefix` to be an"),
        (lambda: ffr.cam.tokens_to_map(torch.ones(1, 4, 4), 2), "tokens_to_map: expected `grid` of two integers"),
        (lambda: ffr.cam.to_image(CAM, IMAGES.shape, 1), "to_image: expected `size` of two integers, (height, width)"),
        (
            lambda: ffr.cam.to_image(CAM, (24, 24), (1, 1)),
            "to_image: expected `patch_size` to be an integer, got (1, 1)",
        ),
        (lambda: ffr.draw.palette(20.0), "palette: expected `num_labels` to be an integer, got 20.0"),
    ],
)
def test_a_number_of_the_wrong_kind_is_refused_where_it_is_given(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        call()
