"""The band split: the same filter as by FFT, and the laws of an orthogonal projection."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from ffr import Bands, FrequencyMask, frequency, split_bands
from ffr.frequency import _cached_basis, _cached_projection, passed

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 12)
cutoffs = st.floats(0, 0.5)


@st.composite
def maps(draw):
    """Noise in float64, of any grid, 1 x N included."""
    return noise(draw(seeds), 2, 3, draw(sides), draw(sides))


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_fft(x, mu):
    return torch.from_numpy(reference.low_band(x.double().numpy(), mu))


def as_tokens(x):
    return x.flatten(2).transpose(1, 2)


def wave(size, cycles, phase=0.0):
    return torch.cos(2 * torch.pi * cycles * torch.arange(size, dtype=torch.float64) / size + phase)


@pytest.fixture
def cold():
    """No matrix in the cache, before or after."""
    for cache in (_cached_projection, _cached_basis):
        cache.cache_clear()
    yield
    for cache in (_cached_projection, _cached_basis):
        cache.cache_clear()


# Against the FFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0, 0.1, 0.25, 0.4, 0.5])
def test_it_is_the_filter_by_fft_at_every_size_up_to_40_by_40(mu):
    values = np.random.default_rng(0).standard_normal((1, 2, 40, 40))
    double = single = 0.0
    for h in range(1, 41):
        for w in range(1, 41):
            x = torch.from_numpy(values[..., :h, :w].copy())
            double = max(double, (split_bands(x, mu).low - by_fft(x, mu)).abs().max().item())
            x = x.float()
            error = (split_bands(x, mu).low - by_fft(x, mu)).abs().max() / x.abs().max()
            single = max(single, error.item())
    assert double <= 1e-12
    assert single <= 2e-6


@given(maps(), cutoffs)
def test_it_is_the_filter_by_fft_at_any_cutoff(x, mu):
    low, high = split_bands(x, mu)
    assert_close(low, by_fft(x, mu), rtol=0, atol=1e-12)
    assert_close(high, x - by_fft(x, mu), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mu", [0.1, 0.25, 0.4, 0.5])
@pytest.mark.parametrize("grid", [(28, 28), (14, 41)])
def test_bfloat16_is_native_and_close(grid, mu):
    x = noise(0, 4, 64, *grid).bfloat16()
    low, high = split_bands(x, mu)
    assert low.dtype == high.dtype == torch.bfloat16
    assert_close(low.double(), by_fft(x, mu), rtol=0, atol=3e-2)
    assert_close(high.double(), x.double() - by_fft(x, mu), rtol=0, atol=3e-2)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("layout", ["maps", "tokens"])
def test_where_a_processor_multiplies_bfloat16_slowly_the_products_are_float32(wide, layout, monkeypatch):
    monkeypatch.setattr(frequency, "_AVX512", wide)
    x = noise(0, 2, 32, 28, 28).bfloat16()
    x, grid = (x.flatten(2).mT.contiguous(), (28, 28)) if layout == "tokens" else (x, None)
    low, high = split_bands(x, 0.4, grid=grid)
    once = torch.equal(low, split_bands(x.float(), 0.4, grid=grid).low.bfloat16())  # rounded once, at the end
    assert once != wide
    assert low.dtype == high.dtype == torch.bfloat16


# Laws -------------------------------------------------------------------------------------------------------------


@given(maps(), cutoffs)
def test_the_bands_add_up_to_the_features(x, mu):
    low, high = split_bands(x, mu)
    assert_close(low + high, x, rtol=0, atol=1e-14)


@given(maps(), cutoffs)
def test_a_second_pass_changes_nothing(x, mu):
    low, high = split_bands(x, mu)
    assert_close(split_bands(low, mu).low, low, rtol=0, atol=1e-12)
    assert_close(split_bands(high, mu).high, high, rtol=0, atol=1e-12)


@given(maps(), cutoffs)
def test_the_bands_are_orthogonal_in_every_channel(x, mu):
    low, high = split_bands(x, mu)
    assert_close((low * high).sum((2, 3)), torch.zeros(2, 3).double(), rtol=0, atol=1e-10)


@given(maps(), cutoffs)
def test_the_energies_of_the_bands_add_up(x, mu):
    low, high = split_bands(x, mu)
    whole = x.square().sum((2, 3))
    assert_close(low.square().sum((2, 3)) + high.square().sum((2, 3)), whole, rtol=1e-12, atol=1e-12)


@given(maps(), cutoffs, st.integers(-12, 12), st.integers(-12, 12))
def test_a_circular_shift_of_the_features_shifts_the_bands(x, mu, down, right):
    shifted = split_bands(x.roll((down, right), (2, 3)), mu).low
    assert_close(shifted, split_bands(x, mu).low.roll((down, right), (2, 3)), rtol=0, atol=1e-12)


@given(maps(), cutoffs, cutoffs)
def test_a_higher_cutoff_never_takes_energy_from_the_low_band(x, one, two):
    less, more = (split_bands(x, mu).low.square().sum((2, 3)) for mu in sorted((one, two)))
    assert (more - less).min() >= -1e-10


@given(maps(), cutoffs)
def test_turning_the_map_turns_the_bands(x, mu):
    for turn in (lambda t: t.transpose(2, 3), lambda t: t.flip(2), lambda t: t.flip(3)):
        assert_close(split_bands(turn(x), mu).low, turn(split_bands(x, mu).low), rtol=0, atol=1e-12)


@given(maps(), cutoffs)
def test_tokens_and_maps_give_the_same(x, mu):
    bands = split_bands(as_tokens(x), mu, grid=x.shape[2:])
    for ours, theirs in zip(bands, split_bands(x, mu), strict=True):
        assert_close(ours, as_tokens(theirs), rtol=0, atol=1e-12)


@given(maps(), cutoffs)
def test_the_gradient_of_a_band_is_that_band_of_the_gradient(x, mu):
    x.requires_grad_()
    bands, weight = split_bands(x, mu), noise(1, *x.shape)
    for band, ours in zip(bands, split_bands(weight, mu), strict=True):
        (gradient,) = torch.autograd.grad((band * weight).sum(), x, retain_graph=True)
        assert_close(gradient, ours, rtol=0, atol=1e-12)  # a projection is its own adjoint


# Known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cycles", "band"), [(0, "low"), (11, "low"), (12, "high"), (14, "high")])
@pytest.mark.parametrize("turned", [False, True])
def test_a_wave_falls_whole_into_one_band(cycles, band, turned):  # 0.4 of 28 tokens is 11.2 cycles
    x = wave(28, cycles).expand(1, 1, 9, 28)
    x = x.transpose(2, 3) if turned else x
    assert_close(getattr(split_bands(x, 0.4), band), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "mu", "highest"),
    [
        (1, 0.5, 0),
        (2, 0.5, 1),
        (7, 0.5, 3),
        (8, 0.25, 2),
        (8, 0.2499, 1),
        (28, 0.4, 11),
        (100, 0.29, 29),
        (41, 0.1, 4),
        (28, 0.3214285671710968, 9),
    ],
)
@pytest.mark.parametrize("phase", [0.0, 0.9])
def test_the_cutoff_is_in_cycles_per_token_and_belongs_to_the_low_band(size, mu, highest, phase):
    assert passed(size, mu) == highest
    for cycles in range(size // 2 + 1):
        x = wave(size, cycles, phase).expand(1, 1, 3, size)
        band = split_bands(x, mu).low if cycles <= highest else split_bands(x, mu).high
        assert_close(band, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [14, 28, 64, 128, 999])
def test_a_cutoff_rounded_to_single_precision_keeps_its_frequency(size):
    for cycles in range(size // 2 + 1):
        assert passed(size, torch.tensor(cycles / size).item()) == cycles == passed(size, cycles / size)


@pytest.mark.parametrize(("size", "cycles"), [(31, 1), (41, 4), (67, 6)])  # so few that two thin products are taken
def test_a_rounded_cutoff_keeps_its_frequency_where_few_pass(size, cycles):
    mu = float(np.float32(cycles / size))
    assert mu * size < cycles
    x = wave(size, cycles).reshape(1, 1, size, 1).expand(1, 2, size, 3)
    assert_close(split_bands(x, mu).low, x)


def test_compiled_and_eager_keep_the_same_where_sides_differ():
    x = noise(0, 1, 1, 28, 14)
    split = torch.compile(split_bands, fullgraph=True, backend="eager")
    for below in (0, 5e-8, 2e-7, 5e-7, 1e-6):
        mu = 8 / 28 - below
        assert_close(split(x, mu).low, split_bands(x, mu).low)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 7), (5, 6), (28, 28)])
def test_nothing_is_high_where_everything_passes(grid, dtype):
    x = noise(0, 2, 3, *grid).to(dtype)
    for features, settings in ((x, {}), (x.flatten(2).transpose(1, 2).contiguous(), {"grid": grid})):
        low, high = split_bands(features, 0.5, **settings)
        assert torch.equal(low, features) and not high.any()


def test_the_mask_is_a_box_a_wave_must_be_low_along_both_axes():
    slow, fast = wave(12, 2), wave(12, 5)
    for y, x, band in ((slow, slow, "low"), (slow, fast, "high"), (fast, slow, "high"), (fast, fast, "high")):
        product = (y[:, None] * x[None])[None, None]
        assert_close(getattr(split_bands(product, 0.25), band), product, rtol=0, atol=1e-13)


@given(maps())
def test_cutoff_zero_keeps_the_mean_alone(x):
    assert_close(split_bands(x, 0).low, x.mean((2, 3), keepdim=True).expand_as(x), rtol=0, atol=1e-13)


@given(maps())
def test_the_nyquist_frequency_keeps_everything(x):
    assert_close(split_bands(x, 0.5).low, x, rtol=0, atol=1e-13)


def test_one_step_edge_by_hand():
    # Four tokens, mu 1/4: the mean and the waves of period 4 stay, the Nyquist wave (1, -1, 1, -1) / 4 goes.
    low, high = split_bands(torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]).double(), 0.25)
    assert_close(high, torch.tensor([[[[0.25, -0.25, 0.25, -0.25]]]]).double())
    assert_close(low, torch.tensor([[[[0.75, 0.25, -0.25, 0.25]]]]).double())


def test_the_module_is_the_function_with_its_cutoff_bound():
    x = noise(0, 2, 3, 5, 7)
    mask = FrequencyMask(mu=0.2)
    assert isinstance(mask(x), Bands)
    assert_close(mask(x), split_bands(x, 0.2), rtol=0, atol=0)
    assert_close(mask(as_tokens(x), grid=(5, 7)), split_bands(as_tokens(x), 0.2, grid=(5, 7)), rtol=0, atol=0)
    assert FrequencyMask().mu == 0.4
    assert repr(mask) == "FrequencyMask(mu=0.2)"


@pytest.mark.parametrize("mu", [0.05, 0.3, 0.47])  # few frequencies pass, half of them, all but few: three products
@pytest.mark.parametrize("tokens", [False, True])
def test_under_autocast_single_precision_stays_exact(mu, tokens):
    x = noise(0, 2, 3, 40, 40, dtype=torch.float32)
    x, grid = (x.flatten(2).transpose(1, 2).contiguous(), (40, 40)) if tokens else (x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = split_bands(x, mu, grid=grid)
    assert_close((low, high), tuple(split_bands(x, mu, grid=grid)), rtol=0, atol=0)


# Graphs and caches ------------------------------------------------------------------------------------------------


def fourier_free(function, x):
    """No FFT and no complex number in the graph of forward and backward."""

    def both(x):
        return torch.autograd.grad(function(x).low.square().sum(), x)

    graph = make_fx(both)(x.requires_grad_()).graph
    names = [str(node.target) for node in graph.nodes]
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(values) > 5
    return not any("fft" in name for name in names) and not any(value.is_complex() for value in values)


def test_no_fft_and_no_complex_number_is_in_the_graph(cold):
    assert fourier_free(lambda x: split_bands(x, 0.3), noise(0, 1, 2, 6, 7))
    assert fourier_free(lambda x: split_bands(x, 0.3, grid=(6, 7)), noise(0, 1, 42, 2))


@pytest.mark.parametrize("transform", [torch.fft.rfft2, lambda x: x * (1 + 0j)])
def test_that_test_can_fail(transform):
    assert not fourier_free(lambda x: Bands(transform(x).abs(), x), noise(0, 1, 2, 6, 7))


def test_a_matrix_is_built_once_for_a_size_and_a_number_of_cycles(cold):
    for mu in (0.26, 0.27):  # 7.3 and 7.6 of 28 cycles, 7.0 and 7.3 of 27: no thin form pays
        split_bands(torch.zeros(1, 1, 28, 27), mu)
        split_bands(torch.zeros(1, 756, 1), mu, grid=(28, 27))
    assert _cached_projection.cache_info().misses == 2
    split_bands(torch.zeros(1, 1, 28, 28).double(), 0.26)
    assert _cached_projection.cache_info().misses == 3
    for mu in (0.41, 0.42):  # five frequencies of 28 are dropped, and their vectors do
        split_bands(torch.zeros(1, 784, 1), mu, grid=(28, 28))
    assert _cached_projection.cache_info().misses == 3
    assert _cached_basis.cache_info().misses == 1


def test_a_matrix_first_needed_in_inference_mode_serves_training_too(cold):
    with torch.inference_mode():
        split_bands(noise(0, 1, 2, 5, 6), 0.3)
    x = noise(0, 1, 2, 5, 6).requires_grad_()
    split_bands(x, 0.3).low.sum().backward()
    assert x.grad is not None


def test_a_fake_tensor_leaves_nothing_in_the_cache(cold):
    with FakeTensorMode():
        assert split_bands(torch.randn(1, 2, 5, 6), 0.3).low.shape == (1, 2, 5, 6)
    x = noise(0, 1, 2, 5, 6)
    assert_close(split_bands(x.float(), 0.3).low, by_fft(x, 0.3).float())
    with FakeTensorMode():  # nor does a real matrix in the cache disturb a fake tensor
        split_bands(torch.randn(1, 2, 5, 6), 0.3)


def test_a_default_device_does_not_reach_the_matrix(cold):
    x = noise(0, 1, 2, 5, 6)
    with torch.device("meta"):
        low = split_bands(x, 0.3).low
    assert_close(low, by_fft(x, 0.3))


def test_a_compiled_mask_may_change_its_cutoff(cold):
    torch._dynamo.reset()
    mask, x = FrequencyMask(0.1), noise(0, 2, 3, 5, 7)
    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    for mu in (0.1, 0.2, 0.3, 0.45):
        mask.mu = mu
        assert_close(compiled(x).low, by_fft(x, mu))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_compiled_function_serves_every_grid_and_batch(cold, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: split_bands(x, 0.3), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 5, 7), (4, 3, 5, 7), (4, 3, 8, 6), (1, 5, 9, 9)):
        x = noise(0, *shape)
        assert_close(compiled(x), split_bands(x, 0.3), rtol=0, atol=1e-13)


def test_compiled_it_takes_tokens_too(cold):
    torch._dynamo.reset()
    x = as_tokens(noise(0, 2, 3, 5, 7))
    compiled = torch.compile(split_bands, fullgraph=True, backend="eager")
    assert_close(compiled(x, 0.3, grid=(5, 7)), split_bands(x, 0.3, grid=(5, 7)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_a_free_batch(cold, strict):
    x = noise(0, 2, 3, 5, 7)
    shapes = {"features": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(FrequencyMask(0.3), (x,), dynamic_shapes=shapes, strict=strict).module()
    x = noise(1, 5, 3, 5, 7)
    assert_close(exported(x), split_bands(x, 0.3), rtol=0, atol=1e-13)


def test_the_transforms_of_torch_func_pass_through(cold):
    x, v = noise(0, 4, 2, 3, 5, 6), noise(1, 4, 2, 3, 5, 6)

    def energy(x):
        return split_bands(x, 0.3).low.square().sum() / 2

    low = split_bands(x.flatten(0, 1), 0.3).low.reshape_as(x)
    assert_close(torch.func.vmap(lambda x: split_bands(x, 0.3).low)(x), low)
    assert_close(torch.func.vmap(torch.func.grad(energy))(x), low)
    assert_close(torch.func.jvp(energy, (x[0],), (v[0],))[1], (low[0] * v[0]).sum())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_graph_is_traced_as_tensorboard_does(cold):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 2, 2), FrequencyMask(0.3)), torch.rand(1, 3, 10, 14)
    traced = torch.jit.trace(model, x)  # twice, and both must be alike
    assert_close(traced(x + 1), tuple(model(x + 1)))
    low, high = model(x)
    assert_close(low + high, model[0](x))


def test_a_parameter_is_split_like_any_tensor():
    x = noise(0, 2, 3, 5, 7)
    assert_close(split_bands(nn.Parameter(x), 0.3).low, split_bands(x, 0.3).low, rtol=0, atol=0)


# In memory --------------------------------------------------------------------------------------------------------


def prefixed(x):
    """The same maps as a view of tokens behind a class token, as an encoder gives them."""
    tokens = torch.cat([torch.zeros_like(as_tokens(x)[:, :1]), as_tokens(x)], 1)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, x.shape[2:])


LAYOUTS = {
    "maps": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "behind a prefix": prefixed,
    "every second row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 2**21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_blocks_and_layouts_change_no_result_and_layouts_are_kept(layout, block, dtype, monkeypatch):
    monkeypatch.setattr("ffr.frequency._CACHE", 0)
    monkeypatch.setattr("ffr.frequency._BLOCK", block)  # bytes: one map or image at a time
    base = noise(0, 3, 4, 20, 7, dtype=torch.float64).to(dtype)
    base = base[:1].expand_as(base) if layout == "expanded" else base
    x = LAYOUTS[layout](base).detach().requires_grad_()
    low, high = split_bands(x, 0.4)
    assert_close(low.double(), by_fft(base, 0.4), rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-3)
    assert_close(low + high, x, rtol=0, atol=1e-14 if dtype == torch.float64 else 2e-3)
    if layout in ("channels last", "behind a prefix"):
        assert low.is_contiguous(memory_format=torch.channels_last)
    weight = noise(1, *x.shape).to(dtype)
    other = LAYOUTS["maps" if layout == "channels last" else "channels last"](noise(2, *x.shape).to(dtype))
    (gradient,) = torch.autograd.grad((low, high), x, (weight, other))
    wanted = by_fft(weight, 0.4) + other.double() - by_fft(other, 0.4)
    assert_close(gradient.double(), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 4e-3)


@pytest.mark.parametrize(
    ("size", "mu"), [(64, 0.5), (64, 0.45), (64, 0.25), (64, 0.05), (64, 0), (17, 0.5), (33, 0.03)]
)
@pytest.mark.parametrize("tokens", [False, True])
def test_each_form_of_the_product_is_the_filter(size, mu, tokens):
    x = noise(0, 2, 3, size, size)
    low = split_bands(as_tokens(x), mu, grid=(size, size)).low if tokens else split_bands(x, mu).low
    assert_close(low, as_tokens(by_fft(x, mu)) if tokens else by_fft(x, mu), rtol=0, atol=1e-12)


def test_a_band_alone_gives_its_gradient_and_both_may_be_changed_in_place():
    x = noise(0, 2, 3, 20, 7).requires_grad_()
    low, high = split_bands(x, 0.4)
    (only_low,) = torch.autograd.grad(low.square().sum(), x, retain_graph=True)
    (only_high,) = torch.autograd.grad(high.square().sum(), x)
    assert_close(only_low, 2 * low)
    assert_close(only_high, 2 * high)
    low, high = split_bands(as_tokens(x), 0.4, grid=(20, 7))
    (gradient,) = torch.autograd.grad(low.mul_(2).sum() + high.zero_().sum(), x)
    assert_close(gradient, 2 * torch.ones_like(x))


def test_an_empty_batch_gives_empty_bands():
    low, high = split_bands(torch.zeros(0, 3, 5, 7), 0.4)
    assert low.shape == high.shape == (0, 3, 5, 7)


def test_second_derivatives_pass_both_operators():
    def loss(x):
        low, high = split_bands(x, 0.3)
        return (low**3).sum() + (low * high**2).sum()

    x = noise(0, 1, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradgradcheck(loss, x)
    tangent, hessian = noise(1, *x.shape), torch.func.hessian(loss)(x.detach())
    (product,) = torch.func.jvp(torch.func.grad(loss), (x.detach(),), (tangent,))[1:]
    assert_close(product, torch.einsum("abcdefgh,efgh->abcd", hessian, tangent))


# Refusals ---------------------------------------------------------------------------------------------------------


def test_tokens_without_a_grid_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"split_bands: .*\(2, 196, 768\).*grid="):
        split_bands(torch.zeros(2, 196, 768), 0.4)


@pytest.mark.parametrize("shape", [(28, 28), (768, 28), (1, 2, 3, 4, 5)])
def test_features_of_another_rank_are_refused(shape):
    with pytest.raises(ValueError, match=r"split_bands: expected `features` of shape \(B, D, h, w\), got \("):
        split_bands(torch.zeros(shape), 0.4)


def test_a_grid_that_does_not_match_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"split_bands: expected `features` of shape \(B, N=196, D\), got .*prefix"):
        split_bands(torch.zeros(2, 197, 768), 0.4, grid=(14, 14))
    with pytest.raises(ValueError, match=r"split_bands: expected `grid` \(7, 9\) as in `features`, got \(9, 7\)"):
        split_bands(torch.zeros(1, 2, 7, 9), 0.4, grid=(9, 7))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_features_that_are_not_floating_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"split_bands: expected `features` of a floating dtype, got {dtype}"):
        split_bands(torch.zeros(1, 2, 3, 4, dtype=dtype), 0.4)


@pytest.mark.parametrize("mu", [-0.1, 0.51, 28, float("nan")])
def test_a_cutoff_beyond_nyquist_is_refused(mu):
    with pytest.raises(ValueError, match=r"split_bands: expected `mu` in \[0, 0.5\], got .*Nyquist"):
        split_bands(torch.zeros(1, 2, 3, 4), mu)
    with pytest.raises(ValueError, match=r"FrequencyMask: expected `mu` in \[0, 0.5\], got"):
        FrequencyMask(mu)
