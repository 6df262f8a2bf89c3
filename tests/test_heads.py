"""The dual segmentation head: which convolutions each branch uses, and what they compute."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from ffr import DualSegmentationHead

seeds = st.integers(0, 2**32 - 1)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(embed_dim=4, num_classes=3, hidden=6, dilation=2):
    torch.manual_seed(0)
    return DualSegmentationHead(embed_dim, num_classes, hidden, dilation).double()


@given(seeds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_both_branches_are_their_formula_and_keep_the_grid(seed, h, w, dilation):
    head, x = head_of(dilation=dilation), noise(seed, 2, 4, h, w)

    def formula(branch):
        spread = {"padding": dilation, "dilation": dilation}
        hidden = F.conv2d(x, head.phi_0.weight, **spread).clamp(min=0)
        hidden = F.conv2d(hidden, branch.weight, **spread).clamp(min=0)
        return torch.einsum("bchw,kc->bkhw", hidden, head.last.weight[:, :, 0, 0])

    assert head(x).shape == (2, 4, h, w)
    assert_close(head(x), formula(head.phi_1))
    assert_close(head.high(x), formula(head.phi_2))


def test_the_first_and_last_convolution_are_shared_and_the_middle_ones_are_not():
    x = noise(0, 2, 4, 5, 6)
    for call, used, unused in (("forward", "phi_1", "phi_2"), ("high", "phi_2", "phi_1")):
        head = head_of()
        getattr(head, call)(x).sum().backward()
        for name in ("phi_0", used, "last"):
            assert head.get_submodule(name).weight.grad.ne(0).any()
        assert head.get_submodule(unused).weight.grad is None


def test_one_branch_does_not_move_the_other():
    head, x = head_of(), noise(0, 1, 4, 5, 6)
    before = head(x), head.high(x)
    with torch.no_grad():
        head.phi_2.weight.add_(1)
    assert_close(head(x), before[0], rtol=0, atol=0)
    assert (head.high(x) - before[1]).abs().max() > 1e-3


def test_four_weights_and_no_bias_with_the_sizes_of_the_method():
    head = DualSegmentationHead(768, 20)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "phi_0.weight": (512, 768, 3, 3),
        "phi_1.weight": (512, 512, 3, 3),
        "phi_2.weight": (512, 512, 3, 3),
        "last.weight": (21, 512, 1, 1),
    }
    assert not list(head.buffers())
    assert {conv.dilation for conv in (head.phi_0, head.phi_1, head.phi_2)} == {(5, 5)}


def test_a_signal_reaches_two_dilations_far_and_no_further():
    head = head_of(dilation=3)
    for p in head.parameters():
        p.data.abs_()
    x = torch.zeros(1, 4, 17, 17, dtype=torch.float64)
    x[..., 8, 8] = 1
    rows = head(x)[0, 0].ne(0).any(1).nonzero().flatten().tolist()
    assert rows == [2, 5, 8, 11, 14]


def test_zero_in_zero_out():
    assert head_of()(torch.zeros(2, 4, 5, 6).double()).eq(0).all()


@pytest.mark.parametrize("call", ["forward", "high"])
def test_tokens_give_the_logits_of_their_map(call):
    head, x = head_of(), noise(0, 2, 4, 5, 6)
    branch = getattr(head, call)
    assert_close(branch(x.flatten(2).transpose(1, 2), grid=(5, 6)), branch(x))


@pytest.mark.parametrize(
    ("call", "owner"), [("forward", "DualSegmentationHead"), ("high", "DualSegmentationHead.high")]
)
@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 5, 5, 6), None, "expected `features` of shape (B, D=4, h, w), got (2, 5, 5, 6)."),
        ((2, 30, 4), None, "got (2, 30, 4). For tokens (B, N, D) pass grid=(h, w)."),
        ((2, 31, 4), (5, 6), "got (2, 31, 4). `grid` is 5 x 6 = 30 tokens: drop prefix tokens, or correct `grid`."),
        ((2, 4, 5, 6), (6, 5), "expected `grid` (5, 6) as in `features`, got (6, 5). Correct `grid`, or"),
    ],
)
def test_features_that_do_not_fit_are_refused(call, owner, shape, grid, message):
    with pytest.raises(ValueError, match=f"^{owner}: .*" + re.escape(message)):
        getattr(head_of(), call)(torch.zeros(shape).double(), grid=grid)


def test_features_without_a_floating_dtype_are_refused():
    with pytest.raises(TypeError, match="DualSegmentationHead: expected `features` of a floating dtype, got"):
        head_of()(torch.zeros(2, 4, 5, 6, dtype=torch.long))


@pytest.mark.parametrize("name", ["embed_dim", "num_classes", "hidden", "dilation"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"DualSegmentationHead: expected `{name}` in \[1, inf\], got 0\."):
        DualSegmentationHead(**{"embed_dim": 4, "num_classes": 3, "hidden": 6, "dilation": 2, name: 0})
