"""The network of the method figure, and the rectification in one call: a composition, nothing of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr.cam import class_activation_map, multi_scale_cam
from ffr.encoder import Features

LABELS = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])


class TinyEncoder(nn.Module):
    """Three convolutions; all that the protocol asks for, padding to whole patches included."""

    def __init__(self, embed_dim=8, patch_size=8):
        super().__init__()
        self.embed_dim, self.patch_size = embed_dim, patch_size
        self.stem = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.middle = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.last = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)

    def forward(self, images):
        if not images.is_floating_point():
            images = images.to(self.stem.weight.dtype) / 255
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        intermediate = self.middle(self.stem(images).tanh())
        return Features(final=self.last(intermediate.tanh()), intermediate=intermediate)


def tiny(patch_size=8, num_classes=5, **settings):
    torch.manual_seed(0)
    encoder = TinyEncoder(patch_size=patch_size)
    return ffr.FFR(encoder, num_classes, **{"hidden": 6, "dilation": 1, **settings}).double()


def pictures(height=40, width=56, batch=2):
    return torch.rand(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- FFR ---


def test_the_outputs_are_the_tensors_of_the_method_figure():
    model, images = tiny(mu=0.2), pictures()
    out = model.outputs(images)
    final, intermediate, _ = model.encoder(images)
    assert_close(out.final, final)
    assert_close(out.intermediate, intermediate)
    low, high = ffr.split_bands(final, 0.2)
    assert_close(out.low, low)
    assert_close(out.high, high)
    # global max pool, then a linear map; each feature with the classifier of its own
    assert_close(out.logits, final.amax((2, 3)) @ model.classifier.weight.T)
    assert_close(out.logits_inter, intermediate.amax((2, 3)) @ model.intermediate_classifier.weight.T)
    assert_close(out.cam, class_activation_map(final, model.classifier.weight))
    assert_close(out.cam_inter, class_activation_map(intermediate, model.intermediate_classifier.weight))
    assert_close(out.seg, model.head(final))
    assert_close(out.seg_high, model.head.high(high))
    assert out.mask is None
    assert out.cam.min() < 0  # raw, before ReLU


def check_shapes(out, batch, channels, classes, grid):
    shapes = {
        "final": (batch, channels, *grid),
        "logits": (batch, classes),
        "cam": (batch, classes, *grid),
        "seg": (batch, classes + 1, *grid),
    }
    shapes |= {name: shapes["final"] for name in ("intermediate", "low", "high")}
    shapes |= {"logits_inter": shapes["logits"], "cam_inter": shapes["cam"], "seg_high": shapes["seg"]}
    assert {name: tuple(value.shape) for name, value in out._asdict().items() if value is not None} == shapes


@pytest.mark.parametrize(
    ("size", "grid"), [((40, 56), (5, 7)), ((8, 24), (1, 3)), ((8, 8), (1, 1)), ((41, 50), (6, 7))]
)
def test_every_output_has_its_shape_on_any_grid(size, grid):
    check_shapes(tiny().outputs(pictures(*size)), 2, 8, 5, grid)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0, 0.2, 0.5]))
def test_at_any_size_a_call_is_the_segmentation_and_the_bands_add_up(height, width, patch, mu):
    model, images = tiny(patch_size=patch, mu=mu), pictures(height, width)
    out = model.outputs(images)
    check_shapes(out, 2, 8, 5, (-(-height // patch), -(-width // patch)))
    assert_close(model(images), out.seg)
    assert_close(out.low + out.high, out.final)
    assert_close(model(images[1:]), out.seg[1:])


def test_a_vision_transformer_of_timm_fits_in():
    torch.manual_seed(0)
    encoder = ffr.timm_encoder("vit_tiny_patch16_224", pretrained=False)
    model = ffr.FFR(encoder, num_classes=20, hidden=16).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        out = model.outputs(images)
        check_shapes(out, 1, 192, 20, (4, 6))
        assert_close(model(images), out.seg)
        assert not torch.equal(out.final, out.intermediate)


def test_a_call_gives_the_segmentation_of_the_features():
    model, images = tiny(), pictures()
    assert_close(model(images), model.outputs(images).seg)


def operators(function, images):
    nodes = make_fx(lambda x: tuple(function(x)))(images).graph.nodes
    calls = [node.target for node in nodes if node.op == "call_function"]
    return [target.overloadpacket.__name__ for target in calls if isinstance(target, torch._ops.OpOverload)]


def test_inference_is_the_encoder_and_three_convolutions():
    model, images = tiny(), pictures()
    encoder = operators(model.encoder, images).count("convolution")
    inference, training = operators(model, images), operators(model.outputs, images)
    assert inference.count("convolution") == encoder + 3
    assert not [name for name in inference if "mm" in name or "fft" in name]
    # the same look at all outputs sees what inference leaves out: a second head, the projection, the classifiers
    assert training.count("convolution") == encoder + 6
    assert [name for name in training if "mm" in name]


def test_inference_calls_no_module_of_training():
    model, called = tiny(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    parts = {name for name, _ in model.head.named_children()}
    model(pictures())
    assert {name for name in called if not name.startswith("encoder")} == {
        "", "head", *(f"head.{name}" for name in parts - {"phi_2"}),
    }  # fmt: skip
    model.outputs(pictures())
    assert {"frequency", "classifier", "intermediate_classifier", "head.phi_2"} <= called


def test_the_state_dict_has_the_encoder_two_classifiers_and_the_head():
    model = tiny()
    keys = {key for key in model.state_dict() if not key.startswith("encoder.")}
    assert keys == {
        "classifier.weight", "intermediate_classifier.weight",
        "head.phi_0.weight", "head.phi_1.weight", "head.phi_2.weight", "head.last.weight",
    }  # fmt: skip
    assert {key for key in model.state_dict() if key.startswith("encoder.")} == {
        f"encoder.{key}" for key in model.encoder.state_dict()
    }
    assert model.classifier.weight.shape == (5, 8)
    assert not torch.equal(model.classifier.weight, model.intermediate_classifier.weight)


def test_a_mask_of_the_encoder_leaves_padding_out_of_the_logits_and_reaches_the_caller():
    class Masked(TinyEncoder):
        def forward(self, images):
            final, intermediate, _ = super().forward(images)
            mask = torch.ones(final.shape[0], *final.shape[2:], dtype=torch.bool)
            mask[:, :, -1] = False
            loud = torch.where(mask[:, None], 0, 100.0)  # the padding, were it counted, would win every maximum
            return Features(final + loud, intermediate + loud, mask)

    torch.manual_seed(0)
    model = ffr.FFR(Masked(), 5, hidden=6).double()
    out = model.outputs(pictures())
    assert_close(out.logits, out.final[..., :-1].amax((2, 3)) @ model.classifier.weight.T)
    assert_close(out.logits_inter, out.intermediate[..., :-1].amax((2, 3)) @ model.intermediate_classifier.weight.T)
    assert not out.mask[..., -1].any()
    assert out.mask[..., :-1].all()


def test_cams_of_whole_patches_are_the_raw_maps_of_the_grid():
    model, images = tiny(), pictures()
    out = model.outputs(images)
    cam, cam_inter = model.cams(images)
    assert_close(cam, out.cam)
    assert_close(cam_inter, out.cam_inter)


@pytest.mark.parametrize("size", [(100, 130), (96, 130), (100, 128)])
def test_cams_of_padded_images_stand_over_their_own_pixels(size):
    model, images = tiny(patch_size=16), pictures(*size)
    out = model.outputs(images)
    for ours, raw in zip(model.cams(images), (out.cam, out.cam_inter), strict=True):
        h, w = raw.shape[2:]
        assert (h, w) == (-(-size[0] // 16), -(-size[1] // 16))
        whole = F.interpolate(raw, size=(16 * h, 16 * w), mode="bilinear", align_corners=False)
        assert_close(ours, whole[..., : size[0], : size[1]])


def test_cams_serve_the_multi_scale_cam():
    model = tiny(patch_size=16)
    for cam in multi_scale_cam(model.cams, pictures(100, 130), labels=LABELS):
        assert cam.shape == (2, 5, 100, 130)
        peaks = cam.amax((2, 3))
        assert ((peaks == 0) | (peaks == 1)).all()
        assert 0 < peaks.sum() <= LABELS.sum()
        assert not peaks[LABELS == 0].any()


def test_an_encoder_need_not_be_a_module():
    class Pixels:
        embed_dim, patch_size = 3, 8

        def __call__(self, images):
            patches = F.avg_pool2d(images, 8)
            return Features(patches, patches)

    model = ffr.FFR(Pixels(), 5, hidden=6).double()
    check_shapes(model.outputs(pictures()), 2, 3, 5, (5, 7))
    assert not any("encoder" in key for key in model.state_dict())


@pytest.mark.parametrize("lacking", ["embed_dim", "patch_size", "call"])
def test_an_encoder_that_misses_the_protocol_is_refused(lacking):
    class Odd:
        def __init__(self):
            if lacking != "embed_dim":
                self.embed_dim = 8
            if lacking != "patch_size":
                self.patch_size = 8

    if lacking != "call":
        Odd.__call__ = lambda self, images: Features(images, images)
    with pytest.raises(
        TypeError, match=r"FFR: expected `encoder` .*embed_dim and patch_size, got Odd\. .*timm_encoder"
    ):
        ffr.FFR(Odd(), 5)


@pytest.mark.parametrize("name", ["embed_dim", "patch_size"])
def test_an_encoder_whose_sizes_are_no_integers_is_refused(name):
    encoder = TinyEncoder()
    setattr(encoder, name, (8, 8))  # as timm has its patch_size
    with pytest.raises(TypeError, match=rf"FFR: encoder TinyEncoder: expected `{name}` to be an integer, got \(8, 8\)"):
        ffr.FFR(encoder, 5)


class Given:
    """An encoder that gives what it is told."""

    embed_dim, patch_size = 3, 8

    def __init__(self, change):
        self.change = change

    def __call__(self, images):
        patches = F.avg_pool2d(images, 8, ceil_mode=True)
        return self.change(patches)


@pytest.mark.parametrize("call", ["forward", "outputs", "cams"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: (x, x), TypeError, r"expected ffr\.encoder\.Features, got tuple\. Return Features"),
        (
            lambda x: Features(x[..., :5, :7], x[..., :5, :7]),  # rounded down
            ValueError,
            r"expected `final` of shape \(B=2, D=3, h=6, w=7\), got \(2, 3, 5, 7\)\. Pad images of 41 x 50 to .* 8",
        ),
        (lambda x: Features(x[:1], x), ValueError, r"expected `final` of shape \(B=2, .*got \(1, 3, 6, 7\)"),
        (lambda x: Features(x[:, :2], x), ValueError, r"expected `final` of shape .*D=3, .*got \(2, 2, 6, 7\)"),
        (lambda x: Features(x.flatten(2), x), ValueError, r"expected `final` of shape .*got \(2, 3, 42\)"),
        (lambda x: Features(x, x[..., :-1]), ValueError, r"expected `intermediate` of shape .*got \(2, 3, 6, 6\)"),
        (lambda x: Features(x, x, x[:, 0]), TypeError, r"expected `mask` of dtype torch\.bool"),
        (lambda x: Features(x, x, x[:, 0, 1:] > 0), ValueError, r"expected `mask` of shape .*got \(2, 5, 7\)"),
    ],
)
def test_an_encoder_that_gives_something_else_is_named(change, error, message, call):
    model = ffr.FFR(Given(change), 5, hidden=6).double()
    with pytest.raises(error, match=rf"^FFR: result of the encoder Given: {message}"):
        getattr(model, call)(pictures(41, 50))
    with pytest.raises(error, match=rf"^FFR: result of the encoder Given: {message}"):
        ffr.FFRLoss(model, affinity_start=1)(pictures(41, 50), LABELS, step=0)
    assert ffr.FFR(Given(lambda x: Features(x, x, x[:, 0] > -1)), 5, hidden=6).double()(pictures(41, 50)).shape[1] == 6


@pytest.mark.parametrize("name", ["forward", "outputs", "cams"])
@pytest.mark.parametrize("shape", [(3, 40, 56), (2, 1, 40, 56), (2, 40, 56, 3)])
def test_images_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"FFR(\.\w+)?: expected `images` of shape \(B, 3, H, W\), got \("):
        getattr(tiny(), name)(torch.zeros(shape))


def test_a_number_out_of_range_is_refused_by_the_part_that_has_it():
    with pytest.raises(ValueError, match=r"FrequencyMask: expected `mu` in \[0, 0\.5\], got 0\.6"):
        tiny(mu=0.6)
    with pytest.raises(ValueError, match="expected `num_classes`"):
        tiny(num_classes=0)
    with pytest.raises(ValueError, match="DualSegmentationHead: expected `dilation`"):
        tiny(dilation=0)
    with pytest.raises(TypeError, match="FrequencyRectification: expected `gap` to be a number, got None"):
        ffr.FrequencyRectification(gap=None)


# --- FrequencyRectification ---


def example():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 8, 5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    cam = torch.rand(2, 5, 5, 7, dtype=torch.float64, generator=generator)
    cam = cam.repeat_interleave(8, -2).repeat_interleave(8, -1)  # of the size of an image, with the means of the grid
    mask = torch.rand(2, 5, 7, generator=generator) > 0.2
    return features, cam, mask


def test_the_settings_of_the_rectification_are_those_of_the_method():
    rectify, part = ffr.FrequencyRectification(), ffr.RectificationLoss()
    assert (rectify.frequency.mu, rectify.prototypes.seed_threshold) == (0.4, 0.7)
    assert (rectify.rectification.gap, rectify.rectification.min_fraction) == (0.05, 0.05)
    assert (part.gap, part.min_fraction) == (0.05, 0.05)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("mu", "seed_threshold", "gap", "min_fraction"), [(0.4, 0.7, 0.05, 0.05), (0.2, 0.3, 0.2, 1.0)]
)
def test_the_rectification_in_one_call_is_its_three_parts(mu, seed_threshold, gap, min_fraction, masked):
    features, cam, mask = example()
    mask = mask if masked else None
    ours = ffr.FrequencyRectification(mu, seed_threshold, gap, min_fraction)(features, cam, LABELS, mask=mask)

    low, high = ffr.split_bands(features, mu)
    vectors, valid = ffr.class_prototypes(features, cam, LABELS, seed_threshold=seed_threshold, mask=mask)
    parts = {"features": features, "low": low, "prototypes": vectors, "valid": valid, "mask": mask, "gap": gap}
    selected = ffr.select_tokens(**parts)
    loss = ffr.rectification_loss(**parts, min_fraction=min_fraction)
    assert 0 < selected.sum() < valid.sum() * 35
    for got, wanted in zip(ours, (loss, low, high, selected), strict=True):
        assert_close(got, wanted)
    assert_close(*(torch.autograd.grad(each, features, retain_graph=True)[0] for each in (ours.loss, loss)))


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.permutations(range(4)))
def test_a_mirrored_scene_and_classes_of_another_order_are_rectified_alike(seed, h, w, order):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, h, w, dtype=torch.float64, generator=generator)
    cam = torch.rand(2, 4, h, w, dtype=torch.float64, generator=generator)
    labels = (torch.rand(2, 4, generator=generator) > 0.4).float()
    rectify = ffr.FrequencyRectification(mu=0.2)
    loss, low, high, selected = rectify(features, cam, labels)
    assert 0 <= loss <= 2
    assert_close(low + high, features)
    assert not selected[labels == 0].any()
    turned = rectify(features.flip(2).transpose(2, 3), cam.flip(2).transpose(2, 3), labels)
    named = rectify(features, cam[:, order], labels[:, order])
    for ours, wanted in ((turned.loss, loss), (turned.low, low.flip(2).transpose(2, 3)), (named.loss, loss)):
        assert_close(ours, wanted)
    assert torch.equal(turned.selected, selected.flip(2).transpose(2, 3))
    assert torch.equal(named.selected, selected[:, order])


def test_tokens_serve_as_well_as_maps():
    features, cam, mask = example()
    rectify = ffr.FrequencyRectification()
    maps = rectify(features, cam, LABELS, mask=mask)
    tokens = rectify(features.flatten(2).transpose(1, 2), cam, LABELS, mask=mask, grid=(5, 7))
    assert_close(tokens.loss, maps.loss)
    assert_close(tokens.selected, maps.selected)
    assert_close(tokens.low, maps.low.flatten(2).transpose(1, 2))
    assert_close(tokens.high, maps.high.flatten(2).transpose(1, 2))


def test_a_bound_of_the_present_classes_changes_nothing():
    features, cam, _ = example()
    rectify = ffr.FrequencyRectification()
    for all_classes, present in zip(
        rectify(features, cam, LABELS), rectify(features, cam, LABELS, max_present=2), strict=True
    ):
        assert_close(present, all_classes)


def test_two_ranks_have_the_loss_and_the_gradient_of_one():
    features, cam, _ = example()
    labels = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 0, 0, 0]])  # not alike, so that the mean of two losses is another
    rectify = ffr.FrequencyRectification(gap=0.2)
    whole = rectify(features, cam, labels).loss
    counts, losses = [], []

    def collect(count):
        counts.append(count)
        return count

    for rank in range(2):
        rectify(features[rank : rank + 1], cam[rank : rank + 1], labels[rank : rank + 1], all_reduce=collect)
    for rank in range(2):
        part = slice(rank, rank + 1)
        losses.append(
            rectify(features[part], cam[part], labels[part], all_reduce=lambda _: sum(counts), world_size=2).loss
        )
    assert_close(sum(losses) / 2, whole)
    alone = sum(rectify(features[i : i + 1], cam[i : i + 1], labels[i : i + 1]).loss for i in range(2)) / 2
    assert (alone - whole).abs() > 1e-3
    assert_close(*(torch.autograd.grad(each, features, retain_graph=True)[0] for each in (sum(losses) / 2, whole)))


def test_without_a_present_class_the_rectification_is_an_exact_zero_of_the_graph():
    features, cam, _ = example()
    loss, _, _, selected = ffr.FrequencyRectification()(features, cam, torch.zeros(2, 5))
    assert loss == 0
    assert not selected.any()
    (grad,) = torch.autograd.grad(loss, features)
    assert torch.count_nonzero(grad) == 0
