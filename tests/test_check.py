"""The one wording of an error: what fits, what is refused, and in which words."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize(("value", "kind"), [([1.0], "list"), (None, "NoneType"), (0.5, "float")])
def test_what_is_no_tensor_is_refused(value, kind):
    with refused(TypeError, f"f: expected `x` to be a torch.Tensor, got {kind}."):
        _check.bind("f", x=(value, "B"))
    with refused(TypeError, f"f: expected `x` to be a torch.Tensor, got {kind}."):
        _check.tokens("f", grid=(1, 1), x=value)


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


@pytest.mark.parametrize("value", [-1e-9, 0.51, float("nan"), float("inf"), torch.tensor(0.3)])
def test_a_number_out_of_range_is_refused_with_the_remedy(value):
    with refused(ValueError, f"f: expected `mu` in [0, 0.5], got {value!r}. 0.5 is Nyquist."):
        _check.within("f", at_most=0.5, remedy="0.5 is Nyquist", mu=value)


def test_a_range_without_an_end_says_so():
    with refused(ValueError, "f: expected `n` in [1, inf], got 0."):
        _check.within("f", at_least=1, n=0)


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
    ],
)
def test_features_that_are_neither_maps_nor_tokens_of_the_grid_are_refused(shape, grid, message):
    with refused(ValueError, f"f: expected `x` {message}"):
        _check.tokens("f", grid=grid, x=torch.zeros(shape))


def test_a_grid_that_contradicts_a_map_is_refused():
    with refused(ValueError, "f: expected `grid` (7, 9) as in `x`, got (9, 7). Leave `grid` out for maps."):
        _check.tokens("f", grid=(9, 7), x=torch.zeros(2, 3, 7, 9))


@pytest.mark.parametrize(("shape", "grid"), [((2, 3, 4, 6), None), ((3, 3, 4, 5), None), ((2, 20, 4), (4, 5))])
def test_a_second_tensor_must_have_the_sizes_of_the_first(shape, grid):
    with pytest.raises(ValueError, match=rf"^f: expected `y` of shape \(B=2, .*, got {re.escape(str(shape))}"):
        _check.tokens("f", grid=grid, x=torch.zeros(2, 3, 4, 5), y=torch.zeros(shape))


def test_features_of_integers_are_refused():
    with refused(TypeError, "f: expected `x` of a floating dtype, got torch.int64. Convert it with .float()."):
        _check.tokens("f", x=torch.zeros(1, 2, 3, 4, dtype=torch.int64))
