"""Band energies through the depth of the encoder: known answers, and where the features come from."""

import pytest
import torch
from recipe.bands import (
    amplitudes,
    band_energies,
    features_by_depth,
    high_band_shares,
    high_share,
    relative_log_amplitude,
)
from recipe.network import small_ffr
from test_framework import TinyEncoder
from torch.testing import assert_close

from ffr import FFR, timm_encoder


def wave(cycles, size=28, other=0):
    """A wave with so many cycles over the width, and `other` over the height."""
    x = torch.arange(size, dtype=torch.float64)
    return torch.cos(2 * torch.pi * (cycles * x + other * x[:, None]) / size).expand(1, 2, size, size)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return FFR(timm_encoder("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=3), 3, hidden=8)


@pytest.mark.parametrize(("cycles", "share"), [((11, 0), 0), ((12, 0), 1), ((3, 12), 1), ((0, 2), 0)])
def test_a_wave_falls_on_one_side_whatever_the_mean(cycles, share):
    features = 50 + wave(cycles[0], other=cycles[1])
    assert high_share(band_energies(features, 0.4)) == pytest.approx(share, abs=1e-6)


def test_of_two_waves_the_share_is_that_of_their_energies():
    features = 3 * wave(2) + wave(13)
    assert high_share(band_energies(features, 0.4)) == pytest.approx(1 / 10, rel=1e-5)
    assert_close(band_energies(features, 0.4), torch.tensor([9.0, 1.0]).double() * 28 * 28, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("grid", "mu"), [((28, 28), 0.4), ((16, 16), 0.2), ((10, 15), 0.3)])
def test_white_noise_has_the_share_of_the_frequencies_that_are_dropped(grid, mu):
    torch.manual_seed(0)
    noise = torch.randn(4, 300, *grid)
    kept = [sum(abs(f) <= mu + 1e-9 for f in torch.fft.fftfreq(n, dtype=torch.float64).tolist()) for n in grid]
    count = grid[0] * grid[1]
    assert high_share(band_energies(noise, mu)) == pytest.approx((count - kept[0] * kept[1]) / (count - 1), abs=0.01)


def test_energies_add_up_over_batches_and_constant_features_have_no_share():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, 12)
    assert_close(band_energies(x, 0.2), band_energies(x[:1], 0.2) + band_energies(x[1:], 0.2), rtol=1e-6, atol=0)
    assert_close(amplitudes(x)[1:], amplitudes(x[:1])[1:] + amplitudes(x[1:])[1:], rtol=1e-6, atol=0)
    assert high_share(band_energies(torch.full((1, 2, 4, 4), 7.0), 0.2)) == 0
    assert torch.isfinite(band_energies(torch.full((1, 2, 4, 4), 1000.0, dtype=torch.float16), 0.2)).all()


def test_every_block_is_looked_at_and_the_final_features_are_those_of_the_model(vit):
    images = torch.rand(2, 3, 64, 90)
    found = features_by_depth(vit, images)
    assert list(found) == ["block 1", "block 2", "block 3", "block 4", "final"]
    vit.eval()
    with torch.no_grad():
        final, intermediate, _ = vit.encoder(images)
    assert_close(found["final"], final)
    assert_close(found["block 2"], intermediate)  # the third from the end
    assert {tuple(maps.shape) for maps in found.values()} == {(2, 48, 4, 6)}
    shares = high_band_shares(vit, images, mu=0.2)
    assert list(shares) == list(found)
    assert shares["block 2"] == high_share(band_energies(intermediate, 0.2))
    assert 0 < shares["final"] < 1


def test_the_cut_off_is_the_models_where_none_is_given(vit):
    images = torch.rand(1, 3, 96, 96)
    assert high_band_shares(vit, images) == high_band_shares(vit, images, mu=vit.frequency.mu)
    assert high_band_shares(vit, images)["final"] < high_band_shares(vit, images, mu=0.1)["final"]
    assert max(high_band_shares(vit, images, mu=0.5).values()) < 1e-9


def test_the_mode_is_restored_and_nothing_random_is_left_on():
    torch.manual_seed(0)
    model = small_ffr(3, 64).train()
    images = torch.rand(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = high_band_shares(model, images)
    assert model.training and first == high_band_shares(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # no statistic moved
    assert list(first) == ["block 1", "block 2", "block 3", "block 4", "final"]
    model.encoder.eval()  # frozen, say
    high_band_shares(model, images)
    assert model.training and model.head.training and not any(part.training for part in model.encoder.modules())


def test_an_encoder_of_ones_own_shows_its_two_maps():
    model = FFR(TinyEncoder(patch_size=4), 3, hidden=6, dilation=1)
    assert list(high_band_shares(model, torch.rand(1, 3, 32, 48))) == ["intermediate", "final"]


@pytest.mark.parametrize(("cycles", "place"), [((0, 0), 0), ((1, 0), 1), ((3, 7), 7), ((14, 2), 14)])
def test_a_wave_has_its_amplitude_at_the_higher_of_its_frequencies(cycles, place):
    frequency, energy, count = amplitudes(wave(cycles[0], other=cycles[1]))
    assert_close(frequency, torch.arange(15, dtype=torch.float64) / 28)
    assert energy.argmax() == place
    assert float(energy[place] / energy.sum()) == pytest.approx(1, abs=1e-6)
    # of a box of (2 j + 1)^2 frequencies, its rim; at Nyquist a row and a column are shared
    assert count.tolist() == [1, *((2 * j + 1) ** 2 - (2 * j - 1) ** 2 for j in range(1, 14)), 28**2 - 27**2]


def test_energies_are_squared_before_their_mean_over_the_channels():
    both = wave(3)
    silent = torch.cat([both[:, :1], 0 * both[:, 1:]], 1)
    assert_close(2 * amplitudes(silent)[1], amplitudes(both)[1])


def relative(features, bins):
    return relative_log_amplitude({tuple(features.shape[2:]): amplitudes(features)}, bins)


def test_the_relative_amplitude_by_hand():
    assert relative(10 + wave(0), 14)[0] == 0
    # A cosine of amplitude 2 is two coefficients of 1 among the 16 on the rim of the box of two cycles.
    logs = relative(10 + 2 * wave(2), 14)
    assert logs[2] == pytest.approx(torch.tensor(2 / 16 / 100).log10().item() / 2, abs=1e-4)
    assert logs[5] is None or logs[5] < -6
    logs = relative(10 + wave(7, 50), 25)  # 7 / 50 * 50 is more than 7
    assert logs[7] > -3 and logs[8] < -6
    assert relative(torch.ones(1, 1, 4, 4), 14)[1] is None  # no such frequency in 4 tokens


def test_white_noise_is_flat_over_grids_of_several_sizes():
    generator = torch.Generator().manual_seed(0)
    images = {(40, 40): (1, 20), (16, 16): (9, 10)}  # how many, and their mean
    noise = {grid: mean + torch.randn(n, 200, *grid, generator=generator) for grid, (n, mean) in images.items()}
    logs = relative_log_amplitude({grid: amplitudes(features) for grid, features in noise.items()}, 8)
    average = (1600 + 9 * 256) / 10
    square = (20**2 + 9 * 10**2) / 10
    assert logs[1:] == pytest.approx([-torch.tensor(square * average).log10().item() / 2] * 8, abs=0.015)
