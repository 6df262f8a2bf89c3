"""timm transformers as encoders: every family of the list, at sizes they were not built for, without the network."""

import pickle
import re
import socket
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

from ffr import FFR
from ffr.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder, Features, TimmEncoder, timm_encoder

NARROW = {"depth": 4, "embed_dim": 48, "num_heads": 3}

# Before, timm did not say that these two have a class token, and the count of tokens refused them.
speaks = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31), reason="this timm hides a class token"
)

# Any size, as they come. (name, patch size, prefix tokens)
FREE = [
    ("vit_tiny_patch16_224", 16, 1),
    ("deit_tiny_distilled_patch16_224", 16, 2),
    ("eva02_tiny_patch14_224", 14, 1),
    pytest.param("xcit_nano_12_p16_224", 16, 1, marks=speaks),
]
FREE_SLOW = [
    ("vit_small_patch32_224", 32, 1),
    ("deit_tiny_patch16_224", 16, 1),
    ("deit3_small_patch16_224", 16, 1),
    ("vit_small_patch14_dinov2", 14, 1),
    ("vit_small_patch14_reg4_dinov2", 14, 5),
    ("vit_small_patch16_dinov3", 16, 5),
    ("vit_base_patch16_clip_224", 16, 1),
    ("vit_base_patch16_siglip_gap_224", 16, 0),
    ("vit_betwixt_patch16_reg4_gap_256", 16, 4),
    ("vit_medium_patch16_gap_240", 16, 0),
    ("vit_small_patch16_rope_224", 16, 1),
    ("flexivit_small", 16, 1),
    ("vit_tiny_r_s16_p8_224", 32, 1),
    ("naflexvit_base_patch16_gap", 16, 4),
]
FIXED = [
    ("beit_base_patch16_224", NARROW),
    pytest.param("cait_xxs24_224", NARROW, marks=speaks),
    ("vit_relpos_small_patch16_224", NARROW),
    ("mixer_s32_224", {}),
]
HIERARCHICAL = ["convnext_atto", "pvt_v2_b0", "levit_128s", "resnet18"]
HIERARCHICAL_SLOW = ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "mvitv2_tiny", "volo_d1_224"]


def slow(names):
    return [pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow) for name in names]


def narrow(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm_encoder(name, **{"img_size": 64, **NARROW, **kwargs}).eval()


def stirred(model):
    """A model without two equal weights anywhere, so that a skipped norm or embedding shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_before_and_after(model, x):
    """Outputs of the third block from the end and of the last, caught by hooks of our own."""
    caught = {}
    hooks = [
        model.blocks[i].register_forward_hook(lambda module, args, out, i=i: caught.__setitem__(i, out))
        for i in (-3, -1)
    ]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return caught[-3], caught[-1]


def to_map(tokens, grid, prefix):
    return torch.stack([tokens[:, prefix + i] for i in range(grid[0] * grid[1])], -1).view(len(tokens), -1, *grid)


class ConvStem(PatchEmbed):
    """Two strided convolutions in the place of one: what the quickstart's small network uses."""

    def __init__(self, *args, embed_dim=96, in_chans=3, **kwargs):
        super().__init__(*args, embed_dim=embed_dim, in_chans=in_chans, **kwargs)
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(embed_dim // 2, embed_dim, 3, 2, 1)
        )


conv_vit = partial(
    VisionTransformer,
    img_size=64,
    patch_size=4,
    embed_dim=96,
    depth=4,
    num_heads=3,
    num_classes=0,
    global_pool="",
    class_token=False,
    embed_layer=ConvStem,
)


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "patch", "prefix"), FREE + slow(FREE_SLOW))
def test_every_plain_family_gives_two_maps_of_one_grid_at_any_size(name, patch, prefix):
    encoder = timm_encoder(name)
    assert (encoder.patch_size, encoder.num_prefix_tokens) == (patch, prefix)
    embedding = next(part for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    for height, width in ((160, 224), (96, 112), (100, 130)):
        encoder.zero_grad()
        out = encoder(images(2, 3, height, width))
        grid = (-(-height // patch), -(-width // patch))
        assert out.final.shape == out.intermediate.shape == (2, encoder.embed_dim, *grid)
        assert out.mask is None
        # A fresh norm is the identity behind the normalisation: LayerNormed means mean 0 and variance 1 per token.
        assert_close(out.final.mean(1), torch.zeros(2, *grid), atol=1e-4, rtol=0)
        assert_close(out.final.var(1, unbiased=False), torch.ones(2, *grid), atol=2e-3, rtol=0)
        (out.final.square().sum() + out.final.sum() + out.intermediate.square().sum()).backward()
        assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    for feature in encoder(images(1, 3, 96, 112))[:2]:
        (gradient,) = torch.autograd.grad(feature.square().sum() + feature.amax(), embedding.weight, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("name", "kwargs"), FIXED)
def test_a_family_of_one_size_works_at_that_size_and_refuses_others(name, kwargs):
    encoder = timm_encoder(name, img_size=(64, 96), **kwargs)
    out = encoder(images(1, 3, 64, 96))
    side = encoder.patch_size
    assert out.final.shape == out.intermediate.shape == (1, encoder.embed_dim, 64 // side, 96 // side)
    assert_close(out.final.var(1, unbiased=False), torch.ones_like(out.final[:, 0]), atol=2e-2, rtol=0)
    assert encoder(images(1, 3, 60, 91)).final.shape == out.final.shape  # padded to it
    with pytest.raises(ValueError, match=r"TimmEncoder: .*\(64, 96\) alone, got \(96, 96\).*img_size=\(96, 96\)"):
        encoder(images(1, 3, 96, 96))


@pytest.mark.parametrize("name", HIERARCHICAL + slow(HIERARCHICAL_SLOW))
def test_a_hierarchical_model_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=r"timm_encoder: .*hierarchical.*no common grid.*plain ViT"):
        timm_encoder(name)


def test_crossvit_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"CrossVit.*(hierarchical|has no forward_intermediates)"):  # by timm's age
        timm_encoder("crossvit_9_240")


def test_a_size_does_not_hide_that_a_model_is_hierarchical():
    with pytest.raises(ValueError, match="hierarchical"):
        timm_encoder("convnext_atto", img_size=224)


def test_a_model_without_a_final_norm_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"VisionTransformerSAM.*no final norm"):
        timm_encoder("samvit_base_patch16_224", embed_dim=48, depth=4, num_heads=3)
    with pytest.raises(ValueError, match=r"VisionTransformer.*no final norm"):
        TimmEncoder(VisionTransformer(**NARROW, final_norm=False))


# --- what the two features are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", "norm", 1, (4, 6)),
        ("deit_tiny_distilled_patch16_224", "norm", 2, (4, 6)),
        ("vit_small_patch16_dinov3", "norm", 5, (4, 6)),
        ("vit_betwixt_patch16_reg4_gap_256", "fc_norm", 4, (4, 6)),
        ("eva02_tiny_patch14_224", "fc_norm", 1, (5, 7)),
    ],
)
def test_features_are_the_third_block_from_the_end_bare_and_the_last_block_normed(name, norm, prefix, grid):
    encoder = stirred(narrow(name))
    x = images(2, 3, *(side * encoder.patch_size for side in grid))
    mean, std = encoder.mean, encoder.std
    with torch.no_grad():
        out = encoder(x)
        middle, last = tokens_before_and_after(encoder.model, (x - mean) / std)
        last = getattr(encoder.model, norm)(last)
    assert_close(out.intermediate, to_map(middle, grid, prefix))
    assert_close(out.final, to_map(last, grid, prefix))
    assert (out.final - out.intermediate).abs().max() > 0.1


def test_blocks_count_from_both_ends():
    x = images(1, 3, 64, 64)
    from_end, from_start = (stirred(narrow(intermediate=i))(x) for i in (-3, 1))
    assert_close(from_end.intermediate, from_start.intermediate)
    assert not torch.equal(from_end.intermediate, stirred(narrow(intermediate=-2))(x).intermediate)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_betwixt_patch16_reg4_gap_256"])
def test_all_blocks_are_those_of_one_at_a_time_and_come_with_the_final_features(name):
    encoder, x = stirred(narrow(name)), images(2, 3, 40, 90)
    with torch.no_grad():
        final, maps = encoder.blocks(x)
        assert len(maps) == len(encoder.model.blocks) == 4
        for block, each in enumerate(maps):
            encoder.intermediate = block
            assert_close(encoder(x), Features(final, each))
        for indices in ([0, 2], (0, -2), list(np.array([2, 0]))):  # in order of depth
            assert torch.equal(torch.stack(encoder.blocks(x, indices)[1]), torch.stack(maps[::2]))


@pytest.mark.parametrize("indices", [2, "12", [], [4], [-5], [1, 1], [1, -3], [1.0], [True], ["a"], [None]])
def test_blocks_that_are_no_list_beyond_the_model_or_named_twice_are_refused(indices):
    said = f"TimmEncoder: expected `indices` to name blocks of -4..3, each once, got {indices!r}. Pass a list, or None"
    with pytest.raises(ValueError, match=re.escape(said)):
        narrow().blocks(images(1, 3, 64, 64), indices)


@pytest.mark.parametrize("block", [-5, 4])
def test_a_block_beyond_the_model_is_refused_with_the_count(block):
    with pytest.raises(ValueError, match=rf"4 blocks, got intermediate={block}"):
        narrow(intermediate=block)


def test_twelve_blocks_are_named_in_the_refusal():
    with pytest.raises(ValueError, match=r"12 blocks, got intermediate=-13\..*-12\.\.-1"):
        timm_encoder("vit_tiny_patch16_224", intermediate=-13)


def test_tokens_that_are_not_the_grid_are_refused():
    encoder = narrow()
    encoder.num_prefix_tokens = 0  # as a model that hides its class token would say
    with pytest.raises(ValueError, match=r"expected 16 tokens \(0 of prefix, 4 x 4 patches\).*final \(1, 17, 48\)"):
        encoder(images(1, 3, 64, 64))


# --- images -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=15)
def test_the_grid_is_the_rounded_up_size(height, width):
    assert ENCODER(images(1, 3, height, width)).final.shape == (1, 48, -(-height // 16), -(-width // 16))


ENCODER = narrow()


def test_padding_is_that_of_timm():
    encoder = stirred(narrow())
    theirs = stirred(narrow(dynamic_img_pad=True)).model
    x = images(2, 3, 50, 70)
    middle, last = tokens_before_and_after(theirs, (x - encoder.mean) / encoder.std)
    out = encoder(x)
    assert_close(out.intermediate, to_map(middle, (4, 5), 1))
    assert_close(out.final, to_map(theirs.norm(last), (4, 5), 1))


def test_images_are_normalised_inside_and_bytes_are_divided_by_255():
    class Spy(VisionTransformer):
        def forward_intermediates(self, x, **kwargs):
            self.seen = x
            return super().forward_intermediates(x, **kwargs)

    encoder = TimmEncoder(Spy(img_size=32, dynamic_img_size=True, **NARROW))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    wanted = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    for x in (pixels, pixels / 255, (pixels / 255).double()):
        encoder(x)
        assert_close(encoder.model.seen[0, :, 5, 7], wanted)
    assert (IMAGENET_MEAN, IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("vit_tiny_patch16_224", 0.485),  # the lineage's choice; timm's config says 0.5
        ("vit_base_patch16_clip_224", 0.48145466),
        ("vit_base_patch16_siglip_gap_224", 0.5),
        ("eva02_tiny_patch14_224", 0.48145466),
    ],
)
def test_clip_like_models_bring_their_own_statistics(name, mean):
    encoder = narrow(name)
    assert encoder.mean.flatten()[0].item() == pytest.approx(mean)
    assert f"mean=[{mean:.4g}" in repr(encoder)


def test_an_encoder_without_values_can_be_printed():
    encoder = TimmEncoder(VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=2)).to("meta")
    assert "patch_size=4, intermediate=-3" in repr(encoder)


def test_statistics_may_be_given_and_must_be_three_numbers():
    encoder = narrow(mean=(0, 0, 0), std=[1, 1, 1])
    x = images(1, 3, 64, 64)
    assert_close(encoder(x).intermediate, encoder.model.forward_intermediates(x, indices=[1])[1][0])
    with pytest.raises(ValueError, match=r"timm_encoder: expected `std` of 3 numbers.*\(0\.5,\)"):
        narrow(std=[0.5])


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"TimmEncoder: expected `images` of shape \(B, 3, H, W\), got"):
        ENCODER(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_images_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=r"TimmEncoder: expected `images` as uint8 .*torch\."):
        ENCODER(torch.zeros(1, 3, 64, 64, dtype=dtype))


# --- dtype, layout, compile, checkpointing ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_model_is_that_of_the_features(dtype):
    encoder = narrow().to(dtype)
    for x in (images(1, 3, 64, 64).to(dtype), torch.zeros(1, 3, 64, 64, dtype=torch.uint8), images(1, 3, 64, 64)):
        assert {feature.dtype for feature in encoder(x)[:2]} == {dtype}
    assert TimmEncoder(encoder.model)(x).final.dtype == dtype  # a ready module brings its dtype


def test_bytes_lose_nothing_in_a_double_precision_model():
    encoder, x = narrow().double(), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(encoder(x).final, encoder(x.double() / 255).final)


def test_layout_batch_and_input_do_not_matter():
    x = images(2, 3, 50, 64)
    kept, out = x.clone(), ENCODER(x)
    assert torch.equal(x, kept)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_close(ENCODER(other).final, out.final)
    for i in range(2):
        assert_close(ENCODER(x[i : i + 1]).intermediate, out.intermediate[i : i + 1])


def test_it_compiles_to_one_graph():
    compiled = torch.compile(ENCODER, fullgraph=True, backend="aot_eager", dynamic=False)
    for x in (images(1, 3, 64, 64), torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)):
        got, want = compiled(x), ENCODER(x)
        assert_close(got.final, want.final)
        assert_close(got.intermediate, want.intermediate)


def test_gradient_checkpointing_recomputes_and_leaves_the_gradient():
    encoder, calls = narrow(), []
    encoder.model.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))

    def gradient():
        encoder.zero_grad()
        calls.clear()
        out = encoder(images(1, 3, 64, 64))
        (out.final.square().sum() + out.intermediate.sum()).backward()
        return [parameter.grad.clone() for parameter in encoder.parameters()], len(calls)

    plain, once = gradient()
    encoder.set_grad_checkpointing()
    again, twice = gradient()
    encoder.set_grad_checkpointing(False)
    assert (once, twice, gradient()[1]) == (1, 2, 1)
    assert_close(again, plain)


def test_the_mode_is_kept_and_the_state_is_that_of_the_model():
    encoder = narrow()
    encoder.model.blocks[1].train()
    modes = [part.training for part in encoder.modules()]
    encoder(images(1, 3, 64, 64))
    assert [part.training for part in encoder.modules()] == modes
    assert list(encoder.state_dict()) == [f"model.{key}" for key in encoder.model.state_dict()]


def test_an_attention_pool_is_dropped_for_it_would_never_get_a_gradient():
    encoder = narrow("vit_base_patch16_siglip_224")
    assert timm.create_model("vit_base_patch16_siglip_224", **NARROW).attn_pool is not None
    sum(feature.square().sum() for feature in encoder(images(1, 3, 64, 64))[:2]).backward()
    assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]


# --- where models come from -------------------------------------------------------------------------------------------


def test_a_ready_model_with_a_convolutional_stem_is_an_encoder():
    encoder = timm_encoder(conv_vit(dynamic_img_size=True))
    assert isinstance(encoder, Encoder)
    assert (encoder.patch_size, encoder.embed_dim) == (4, 96)
    out = encoder(images(2, 3, 64, 63))
    assert out.final.shape == out.intermediate.shape == (2, 96, 16, 16)
    with pytest.raises(ValueError, match=r"\(64, 64\) alone, got \(32, 32\).*dynamic_img_size=True"):
        timm_encoder(conv_vit())(images(2, 3, 32, 32))


def test_arguments_that_a_ready_model_would_ignore_are_refused():
    with pytest.raises(TypeError, match=r"timm_encoder: pretrained, img_size, drop_rate is for models by name"):
        timm_encoder(conv_vit(), pretrained=True, img_size=64, drop_rate=0.1)


def test_a_module_that_is_no_timm_model_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"`Linear` of torch\.nn.* has no forward_intermediates.*ffr\.encoder\.Encoder"
    ):
        timm_encoder(nn.Linear(3, 3))


def test_an_encoder_of_ones_own_needs_the_protocol_alone():
    class Own:
        embed_dim, patch_size = 3, 1

        def __call__(self, images):
            return Features(images, images)

    assert isinstance(Own(), Encoder)
    assert not isinstance(nn.Linear(3, 3), Encoder)

    class Heir(nn.Module, Encoder):  # nobody needs to, but may
        def __init__(self):
            super().__init__()
            self.embed_dim, self.patch_size = 3, 1

        def forward(self, images):
            return Features(images, images)

    assert FFR(Heir(), 2, hidden=4)(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)


@pytest.mark.slow
def test_a_type_checker_takes_every_way_to_have_the_two_numbers(tmp_path):
    mypy = pytest.importorskip("mypy.api", reason="mypy comes with the extra `dev`")
    text, errors, code = mypy.run(["--strict", "--config-file=", f"--cache-dir={tmp_path}", "-c", ENCODERS])
    assert code == 0, text + errors


ENCODERS = """
from torch import Tensor, nn
from ffr import FFR, Features

class Instance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = 8, 16
    def forward(self, images: Tensor) -> Features:
        return Features(images, images)

class Class:
    embed_dim, patch_size = 8, 16
    def __call__(self, images: Tensor) -> Features:
        return Features(images, images)

class Property(nn.Module):
    @property
    def embed_dim(self) -> int:
        return 8
    @property
    def patch_size(self) -> int:
        return 16
    def forward(self, images: Tensor) -> Features:
        return Features(images, images)

FFR(Instance(), 3), FFR(Class(), 3), FFR(Property(), 3)
"""


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(
        ValueError, match=r"timm_encoder: timm knows no model 'vit_tiny_patch16_22'.*vit_tiny_patch16_224"
    ):
        timm_encoder("vit_tiny_patch16_22")
    with pytest.raises(ValueError, match=r"no model '%%%'\. List the names"):
        timm_encoder("%%%")


def test_an_unknown_argument_is_not_swallowed():
    with pytest.raises(TypeError, match="dept"):
        timm_encoder("vit_tiny_patch16_224", dept=3)


def test_a_name_that_another_module_took_over_is_refused_with_that_module(monkeypatch):
    def theirs(pretrained=False, num_classes=20, **kwargs):
        if kwargs:
            raise TypeError(f"unexpected keyword arguments {sorted(kwargs)}")

    theirs.__module__ = "host.models.vit"
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "vit_tiny_patch16_224", theirs)
    with pytest.raises(
        ValueError, match=r"'vit_tiny_patch16_224' is built by the module host\.models\.vit.*ready module"
    ):
        timm_encoder("vit_tiny_patch16_224")


def test_nothing_touches_the_network_unasked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    timm_encoder("vit_tiny_patch16_224")


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm_encoder: needs timm.*extra `examples`.*pip install '\.\[examples\]'"):
        timm_encoder("vit_tiny_patch16_224")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="needs safetensors"):
        timm_encoder(conv_vit(), checkpoint="weights.safetensors")
    assert timm_encoder(conv_vit()).patch_size == 4  # a ready model needs no timm


# --- local weights ----------------------------------------------------------------------------------------------------


def trained(**kwargs):
    return stirred(timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "num_classes": 7, **NARROW, **kwargs}))


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "ddp", "compiled ddp", "encoder", "safetensors"])
def test_local_weights_arrive_in_every_usual_form(tmp_path, form):
    state = trained().state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        prefix = {"ddp": "module.", "compiled ddp": "module._orig_mod.", "encoder": "model."}.get(form, "")
        named = {prefix + key: value for key, value in state.items()}
        torch.save({form: named, "epoch": 3} if form in ("model", "state_dict") else named, path)
    for encoder in (narrow(checkpoint=str(path)), timm_encoder(trained(num_classes=0), checkpoint=path)):
        loaded = encoder.model.state_dict()
        assert set(state) - set(loaded) == {"head.weight", "head.bias"}
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_wrapped_weights_are_unwrapped_without_the_help_of_timm(tmp_path):
    name = "vit_relpos_small_patch16_224"  # timm's filter for this family unwraps nothing
    state = stirred(narrow(name)).model.state_dict()
    for key, prefix in (("model", "_orig_mod.module."), ("state_dict", "module._orig_mod.")):
        torch.save({key: {prefix + name: value for name, value in state.items()}}, tmp_path / "weights.pth")
        loaded = narrow(name, checkpoint=tmp_path / "weights.pth").model.state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_ready_model_keeps_its_own_head(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "weights.pth")
    net = trained(num_classes=3)
    head = net.head.weight.clone()
    timm_encoder(net, checkpoint=tmp_path / "weights.pth")
    assert torch.equal(net.head.weight, head)


def test_position_embeddings_of_another_grid_are_resampled(tmp_path):
    state = trained().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    encoder = narrow(img_size=(96, 128), checkpoint=tmp_path / "weights.pth")
    assert encoder.model.pos_embed.shape == (1, 1 + 6 * 8, 48)
    wanted = resample_abs_pos_embed(state["pos_embed"], new_size=(6, 8), old_size=(4, 4), num_prefix_tokens=1)
    assert_close(encoder.model.pos_embed.data, wanted)


def test_deit3_weights_load_in_their_first_published_names(tmp_path):
    encoder = stirred(narrow("deit3_small_patch16_224"))
    state = encoder.model.state_dict()
    renamed = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for key, t in state.items()}
    assert renamed.keys() != state.keys()
    torch.save({"model": renamed}, tmp_path / "weights.pth")
    loaded = narrow("deit3_small_patch16_224", checkpoint=tmp_path / "weights.pth").model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_a_pickle_that_runs_code_is_refused_unopened(tmp_path):
    torch.save({"model": trained().state_dict(), "args": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(
        ValueError, match=r"timm_encoder: `checkpoint` trap\.pth holds more than tensors.*not unpickled"
    ):
        narrow(checkpoint=tmp_path / "trap.pth")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match=r"trap\.pkl holds more than tensors"):
        narrow(checkpoint=tmp_path / "trap.pkl")


def test_weights_of_another_model_are_refused_with_a_few_keys(tmp_path):
    path = tmp_path / "weights.pth"
    state = trained().state_dict()
    for change, message in (
        (
            {"norm.weight": None, "norm.bias": None},
            r"weights\.pth does not fit .*it lacks 2 keys \(norm\.bias, norm\.w",
        ),
        ({"decoder.weight": torch.ones(1)}, r"it has unknown 1 keys \(decoder\.weight\)"),
        ({"norm.weight": torch.ones(3)}, r"it has another shape for 1 keys \(norm\.weight\)"),
    ):
        torch.save({key: value for key, value in {**state, **change}.items() if value is not None}, path)
        with pytest.raises(ValueError, match=message):
            narrow(checkpoint=path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="lacks"):
        narrow(checkpoint=path)
    with pytest.raises(FileNotFoundError):
        narrow(checkpoint=tmp_path / "absent.pth")
