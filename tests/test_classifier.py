"""The image-level classifier: max pool, linear map, and the CAM of the same weight."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from ffr import IntermediateClassifier

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 6)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(seed=0, embed_dim=4, num_classes=3):
    classify = IntermediateClassifier(embed_dim, num_classes).double()
    classify.weight.data = noise(seed, num_classes, embed_dim)
    return classify


@given(seeds, sides, sides)
def test_every_channel_gives_its_maximum_to_the_linear_map(seed, h, w):
    classify, x = classifier(seed), noise(seed + 1, 2, 4, h, w)
    logits = classify(x)
    for b in range(2):
        for k in range(3):
            want = sum(classify.weight[k, d].item() * max(x[b, d].flatten().tolist()) for d in range(4))
            assert_close(logits[b, k].item(), want)
    assert_close(classify(x.flatten(2).transpose(1, 2), grid=(h, w)), logits)


def test_the_maximum_is_taken_per_channel_before_the_linear_map():
    classify = IntermediateClassifier(2, 3)
    classify.load_state_dict({"weight": torch.tensor([[1.0, 1.0], [1.0, -2.0], [0.0, 0.0]])})
    x = torch.tensor([[[[3.0, -1.0]], [[-5.0, 2.0]]]])  # the two channels peak in different tokens
    assert classify(x).tolist() == [[5.0, -1.0, 0.0]]


@given(seeds, sides, sides)
def test_the_cam_is_the_weight_in_every_token_and_of_one_token_the_logit(seed, h, w):
    classify, x = classifier(seed), noise(seed + 1, 2, 4, h, w)
    raw = classify.cam(x)
    assert_close(raw, F.conv2d(x, classify.weight[:, :, None, None]))
    assert_close(classify.cam(x.flatten(2).transpose(1, 2), grid=(h, w)), raw)
    token = x[:, :, :1, :1]
    assert_close(classify(token), classify.cam(token)[:, :, 0, 0])
    classify.weight.data.abs_()  # without a negative weight no token scores above the pooled one
    assert (classify.cam(x).amax((2, 3)) <= classify(x) + 1e-12).all()


@given(seeds, sides, sides)
def test_a_masked_token_takes_no_part_in_the_maximum(seed, h, w):
    classify, x = classifier(seed), noise(seed, 3, 4, h, w) - 5  # all negative: a filling of zero would win
    mask = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) < 0.5
    logits = classify(x, mask=mask)
    for b in range(3):
        alone = classify(x[b : b + 1, :, mask[b]][:, :, None]) if mask[b].any() else torch.zeros(1, 3).double()
        assert_close(logits[b : b + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_image_of_padding_alone_has_logits_and_gradients_of_zero(dtype):
    classify = IntermediateClassifier(4, 3)
    x = torch.randn(2, 4, 3, 3).to(dtype).requires_grad_()
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1] = False
    logits = classify(x, mask=mask)
    logits.sum().backward()
    assert logits.dtype == dtype and logits[1].eq(0).all() and x.grad[1].eq(0).all()
    assert logits.isfinite().all() and logits[0].ne(0).any()


def test_the_gradient_reaches_the_peaks_alone():
    classify, x = classifier(), noise(0, 1, 4, 3, 5).requires_grad_()
    classify(x)[0, 1].backward()
    for d in range(4):
        want = torch.zeros(15, dtype=torch.float64)
        want[x[0, d].argmax()] = classify.weight[1, d]
        assert_close(x.grad[0, d].flatten(), want.detach())


def test_one_weight_and_nothing_else_in_the_state_dict():
    classify = IntermediateClassifier(768, 20)
    assert {k: tuple(v.shape) for k, v in classify.state_dict().items()} == {"weight": (20, 768)}
    assert 0.015 < classify.weight.std() < 0.025
    assert repr(classify) == "IntermediateClassifier(embed_dim=768, num_classes=20)"


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1)])
def test_the_weight_of_a_linear_layer_and_of_a_convolution_load(shape, prefix):
    weight = torch.randn(shape)
    state = {prefix + "weight": weight}
    module = torch.nn.Sequential(IntermediateClassifier(4, 3)) if prefix else IntermediateClassifier(4, 3)
    module.load_state_dict(state)
    assert_close(module.get_parameter(prefix + "weight").data, weight.reshape(3, 4), rtol=0, atol=0)
    assert state[prefix + "weight"] is weight and weight.shape == shape  # the caller's dict stays as it is


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (3, 2, 2, 1), (3, 5, 1, 1), (4, 4), (3, 4, 1)])
def test_a_weight_of_another_shape_does_not_load(shape):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        IntermediateClassifier(4, 3).load_state_dict({"weight": torch.zeros(shape)})


def test_a_state_dict_without_the_weight_or_with_more_does_not_load():
    with pytest.raises(RuntimeError, match="Missing key"):
        IntermediateClassifier(4, 3).load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        IntermediateClassifier(4, 3).load_state_dict({"weight": torch.zeros(3, 4, 1, 1), "bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("call", "owner"), [("forward", "IntermediateClassifier"), ("cam", "IntermediateClassifier.cam")]
)
@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 5, 3, 3), None, "expected `features` of shape (B, D=4, h, w), got (2, 5, 3, 3)."),
        ((2, 9, 4), None, "got (2, 9, 4). For tokens (B, N, D) pass grid=(h, w)."),
        ((2, 10, 4), (3, 3), "got (2, 10, 4). `grid` is 3 x 3 = 9 tokens: drop prefix tokens, or correct `grid`."),
        ((2, 9, 5), (3, 3), "expected `features` of shape (B, N=9, D=4), got (2, 9, 5)."),
    ],
)
def test_features_that_do_not_fit_are_refused(call, owner, shape, grid, message):
    with pytest.raises(ValueError, match=f"^{owner}: .*" + re.escape(message)):
        getattr(IntermediateClassifier(4, 3), call)(torch.zeros(shape), grid=grid)


def test_masks_that_do_not_fit_are_refused():
    classify, x = IntermediateClassifier(4, 3), torch.zeros(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"IntermediateClassifier: expected `mask` of shape \(B=2, h=3, w=5\), got"):
        classify(x, mask=torch.ones(2, 15, dtype=torch.bool))
    with pytest.raises(
        TypeError, match=r"IntermediateClassifier: expected `mask` of dtype torch\.bool, got .*32\. Use"
    ):
        classify(x, mask=torch.ones(2, 3, 5))


@pytest.mark.parametrize("name", ["embed_dim", "num_classes"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"IntermediateClassifier: expected `{name}` in \[1, inf\], got 0\."):
        IntermediateClassifier(**{"embed_dim": 4, "num_classes": 3, name: 0})
