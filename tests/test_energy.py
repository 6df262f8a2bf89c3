"""The dense energy: its value by all pairs of lattice filters, its gradient with the gate held, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import no_host_sync
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr import losses
from ffr.lattice import PermutohedralLattice, image_features
from ffr.losses import dense_energy_loss


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(height=20, width=28, labels=4, images=2):
    pictures = F.interpolate(normal(images, 3, 5, 7, seed=1).sigmoid(), size=(height, width), mode="bilinear")
    label = torch.where(normal(images, height, width, seed=2) > 0.5, 255, 1)
    roi = torch.ones(images, height, width, dtype=torch.float64)
    roi[:, :, -6:] = 0
    return normal(images, labels, height, width), label, pictures, roi


def held(logits, label, images, roi, gate=None, sigma_rgb=15.0, sigma_xy=100.0):
    """The energy at full size from its formula, image by image, and its gate."""
    total, gates = 0.0, []
    for b in range(len(logits)):
        p = logits[b].softmax(0).flatten(1).t()
        r = roi[b].flatten()[:, None]
        g = (
            (r - p.max(1, keepdim=True).values)
            .clamp(min=0)
            .where(label[b].flatten()[:, None] != 255, torch.ones_like(r))
        )
        g = g if gate is None else gate[b]
        lattice = PermutohedralLattice(
            image_features(images[b], sxy=sigma_xy, srgb=sigma_rgb), normalize=False, exact_adjoint=True
        )
        total = total - (g * r * p * lattice(r * p)).sum() / len(logits)
        gates.append(g)
    return total, gates


def test_it_is_the_formula():
    logits, label, images, roi = batch()
    ours = dense_energy_loss(logits, label, images=images, roi=roi, weight=1.0, scale=1.0)
    assert_close(ours, held(logits, label, images, roi)[0])
    plain = dense_energy_loss(logits, label, images=images, weight=1.0, scale=1.0)
    assert_close(plain, held(logits, label, images, torch.ones_like(roi))[0])
    assert abs(plain - ours) > 0.1


def test_the_gradient_is_that_of_finite_differences_with_the_gate_held():
    logits, label, images, roi = batch()
    x = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        dense_energy_loss(x, label, images=images, roi=roi, weight=1.0, scale=1.0, sigma_rgb=30.0), x
    )
    _, gate = held(logits, label, images, roi)
    assert torch.cat(gate).std() > 0.1  # not uniform
    for seed in range(5):
        v, step = normal(*logits.shape, seed=10 + seed), 1e-4
        up, down = (held(logits + s * v, label, images, roi, gate, sigma_rgb=30.0)[0] for s in (step, -step))
        wanted = (up - down) / (2 * step)
        assert abs((slope * v).sum() - wanted) <= 1e-3 * abs(wanted)


@st.composite
def problems(draw):
    """Logits, label, images and region of any size, and the other arguments."""
    height, width, labels, images = (draw(st.integers(1, most)) for most in (9, 11, 5, 2))
    seed = draw(st.integers(0, 2**16))
    label = torch.randint(labels + 1, (images, height, width), generator=torch.Generator().manual_seed(seed))
    settings = {
        "label": label.where(label < labels, 255),
        "images": normal(images, 3, height, width, seed=seed + 1).sigmoid(),
        "roi": normal(images, height, width, seed=seed + 2).sigmoid().round(decimals=1),
        "weight": draw(st.floats(1e-9, 10)), "sigma_rgb": draw(st.floats(2, 60)), "sigma_xy": draw(st.floats(2, 100)),
        "scale": draw(st.sampled_from([0.5, 1.0])),
    }  # fmt: skip
    return normal(images, labels, height, width, seed=seed + 3), settings, seed


@pytest.mark.parametrize("exact", [True, False])
@given(problem=problems())
def test_it_falls_where_alike_pixels_agree_and_labels_are_all_alike_to_it(exact, problem):
    logits, settings, seed = problem
    x = logits.clone().requires_grad_()
    value = dense_energy_loss(x, exact_gradient=exact, **settings)
    (slope,) = torch.autograd.grad(value, x)
    assert value <= 0  # so that training seeks agreement
    assert_close(slope.sum(1), torch.zeros_like(slope[:, 0]))  # only differences between logits count
    assert_close(dense_energy_loss(logits + 3, exact_gradient=exact, **settings), value.detach())
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    names = torch.cat([order.argsort(), order.new_full((256 - len(order),), 255)])
    turned = {**settings, "label": names[settings["label"]]}
    assert_close(dense_energy_loss(logits[:, order], exact_gradient=exact, **turned), value.detach())
    twice = {**settings, "weight": 2 * settings["weight"]}
    assert_close(dense_energy_loss(logits, exact_gradient=exact, **twice), 2 * value.detach())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("together", [2, 3, 5])
def test_several_lattices_at_once_are_those_of_each_image(monkeypatch, together, exact):
    """As on a GPU, whose last lattices may be fewer."""
    parts = [torch.cat([x, x.flip(-1), x.flip(-2)])[:5] for x in batch()]
    logits, label, images, roi = parts
    settings = {"images": images, "roi": roi, "weight": 1.0, "scale": 1.0, "exact_gradient": exact}
    logits = logits.clone().requires_grad_()
    wanted = dense_energy_loss(logits, label, **settings)
    slope = torch.autograd.grad(wanted, logits)[0]
    numbers = label[0].numel() * 6 * logits.shape[1] * (2 if exact else 1)
    monkeypatch.setitem(losses.ROOM, "cpu", together * numbers + 1)
    built = []
    lattice = losses.PermutohedralLattice
    monkeypatch.setattr(losses, "PermutohedralLattice", lambda f, **how: built.append(len(f)) or lattice(f, **how))
    energy = dense_energy_loss(logits, label, **settings)
    assert_close(energy, wanted)
    assert_close(torch.autograd.grad(energy, logits)[0], slope)
    assert built == {2: [2, 2, 1], 3: [3, 2], 5: [5]}[together]


def test_the_approximation_is_twice_the_gated_filter_and_another_gradient():
    logits, label, images, roi = batch()
    settings = {"images": images, "roi": roi, "weight": 1.0, "scale": 1.0}

    def slope(exact):
        x = logits.clone().requires_grad_()
        value = dense_energy_loss(x, label, exact_gradient=exact, **settings)
        return value.detach(), torch.autograd.grad(value, x)[0]

    value, gradient = slope(False)
    _, gate = held(logits, label, images, roi)
    x = logits.clone().requires_grad_()
    total = 0
    for b in range(2):
        r = roi[b].flatten()[:, None]
        p = x[b].softmax(0).flatten(1).t()
        near = PermutohedralLattice(image_features(images[b], sxy=100, srgb=15), normalize=False)(r * p.detach())
        total = total - 2 * (p * r * gate[b] * near).sum() / 2
    assert_close(gradient, torch.autograd.grad(total, x)[0])
    exact_value, exact = slope(True)
    assert (exact - gradient).norm() > 0.1 * exact.norm()
    assert_close(value, exact_value, rtol=0.01, atol=0)


def test_with_an_open_gate_both_gradients_agree():
    logits, label, images, _ = batch()
    x = logits.requires_grad_()
    label = torch.full_like(label, 255)
    label[:, 0, 0] = 0
    one, other = (
        torch.autograd.grad(dense_energy_loss(x, label, images=images, weight=1.0, exact_gradient=e), x)[0]
        for e in (True, False)
    )
    assert (one - other).norm() < 0.1 * one.norm()  # one order of the axes is not symmetric


@pytest.mark.slow
def test_on_a_photograph_it_is_the_energy_of_the_compiled_lattice():
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float()
    images = F.interpolate(picture, size=(112, 140), mode="area").round().to(torch.uint8)
    logits = 3 * F.interpolate(normal(1, 3, 7, 9), size=(112, 140), mode="bilinear").float()
    label = torch.where(normal(1, 112, 140, seed=2) > 0.5, 255, 1)
    pixels = np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())

    def filtered(values):
        # A mean field step adds `weight` times the filtered beliefs to the scores; of two labels the difference shows.
        field, weight = 0.9 * values.double(), 4 / values.numel()
        oracle = densecrf.DenseCRF2D(140, 112, 2)
        scores = torch.stack([field.atanh(), -field.atanh()])
        oracle.setUnaryEnergy(np.ascontiguousarray(-scores.numpy(), dtype=np.float32))
        raw = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NO_NORMALIZATION}
        oracle.addPairwiseBilateral(sxy=100, srgb=15, rgbim=pixels, compat=weight, **raw)
        beliefs = torch.from_numpy(np.array(oracle.inference(1))).double()
        return ((beliefs[0] / beliefs[1]).log() - (scores[0] - scores[1])) / (0.9 * weight)

    p = logits[0].softmax(0).flatten(1)
    gate = torch.where(label.flatten() == 255, 1, 1 - p.amax(0))
    wanted = -sum((gate * row * filtered(row)).sum() for row in p)
    ours = dense_energy_loss(logits, label, images=images, weight=1.0, scale=1.0, exact_gradient=False)
    assert wanted < -1e5  # in lattice units, a fixed share of the sum over all pairs
    assert_close(ours.double(), wanted, rtol=1e-5, atol=0)


def test_half_resolution_halves_sigma_too():
    """A constant picture twice as large, with twice the sigma, is the same after the shrinking."""
    logits, label, images, _ = batch(12, 16)
    twice = [F.interpolate(x, scale_factor=2.0, mode="nearest") for x in (logits, label[:, None].double(), images)]
    large = dense_energy_loss(twice[0], twice[1][:, 0].long(), images=twice[2], weight=1.0, sigma_xy=20.0, scale=0.5)
    assert_close(large, dense_energy_loss(logits, label, images=images, weight=1.0, sigma_xy=10.0, scale=1.0))


def test_logits_of_a_grid_are_raised_to_the_label_first():
    logits, label, images, _ = batch()
    coarse = logits[:, :, ::4, ::4]
    raised = F.interpolate(coarse, size=(20, 28), mode="bilinear", align_corners=False)
    assert_close(
        dense_energy_loss(coarse, label, images=images, weight=1.0),
        dense_energy_loss(raised, label, images=images, weight=1.0),
    )


def test_bytes_and_floats_are_the_same_images_and_a_mask_is_a_region():
    logits, label, images, roi = batch()
    images = (images * 255).round().to(torch.uint8)
    ours = dense_energy_loss(logits, label, images=images, roi=roi > 0, weight=1.0)
    assert_close(ours, dense_energy_loss(logits, label, images=images.double() / 255, roi=roi, weight=1.0))


def test_without_a_region_it_is_exactly_zero_and_connected():
    logits, label, images, roi = batch()
    x = logits.requires_grad_()
    value = dense_energy_loss(x, torch.zeros_like(label), images=images, roi=0 * roi, weight=1.0)
    assert value == 0
    assert torch.autograd.grad(value, x)[0].eq(0).all()


def test_a_certain_prediction_is_gated_where_the_label_is_known():
    _, label, images, _ = batch()
    certain = torch.zeros(2, 4, 20, 28, dtype=torch.float64)
    certain[:, 1] = 1000
    assert dense_energy_loss(certain, torch.ones_like(label), images=images, weight=1.0) == 0
    label = torch.full_like(label, 255)
    label[:, 0, 0] = 1
    assert dense_energy_loss(certain, label, images=images, weight=1.0) < -100


def test_an_image_without_a_label_costs_exactly_nothing():
    logits, label, images, _ = batch()
    x = logits.requires_grad_()
    label[1] = 255
    both = dense_energy_loss(x, label, images=images, weight=1.0)
    alone = dense_energy_loss(x[:1], label[:1], images=images[:1], weight=1.0)
    assert_close(both, alone / 2)
    assert torch.autograd.grad(both, x)[0][1].eq(0).all()
    value = dense_energy_loss(x, torch.full_like(label, 255), images=images, weight=1.0)
    assert value == 0
    assert torch.autograd.grad(value, x)[0].eq(0).all()


def test_the_defaults_are_those_of_the_method():
    logits, label, images, _ = batch()
    ours = ffr.DenseEnergyLoss()(logits, label, images=images)
    wanted = dense_energy_loss(
        logits, label, images=images, weight=1e-7, sigma_rgb=15.0, sigma_xy=100.0, scale=0.5, exact_gradient=True
    )
    assert_close(ours, wanted, rtol=1e-12, atol=0)
    heavy = dense_energy_loss(logits, label, images=images, weight=1.0)
    assert_close(1e-7 * heavy, ours, rtol=1e-12, atol=0)


def test_the_host_reads_nothing():
    logits, label, images, roi = batch()
    x = logits.requires_grad_()
    with no_host_sync():
        dense_energy_loss(x, label, images=images, roi=roi).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 4, 5)}, ValueError, r"`logits` of shape \(B, C, h, w\)"),
        ({"label": torch.zeros(3, 20, 28).long()}, ValueError, r"`label` of shape \(B=2, H, W\), got \(3, 20, 28\)"),
        ({"label": torch.zeros(2, 20, 28)}, TypeError, r"`label` of an integer dtype"),
        ({"images": torch.zeros(2, 3, 20, 27)}, ValueError, r"`images` of shape \(B=2, 3, H=20, W=28\)"),
        ({"images": torch.zeros(2, 3, 20, 28).long()}, TypeError, r"`images` as uint8 or float in \[0, 1\]"),
        ({"roi": torch.zeros(2, 1, 20, 28)}, ValueError, r"`roi` of shape \(B=2, H=20, W=28\)"),
        ({"logits": torch.zeros(2, 4, 20, 28).long()}, TypeError, r"`logits` of a floating dtype"),
        ({"sigma_rgb": 0}, ValueError, r"`sigma_rgb` > 0, got 0"),
        ({"sigma_xy": -1}, ValueError, r"`sigma_xy` > 0, got -1"),
        ({"scale": 1.5}, ValueError, r"`scale` in \[0, 1\], got 1\.5"),
        ({"weight": float("nan")}, ValueError, r"`weight` in \[0, inf\], got nan"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    logits, label, images, roi = batch()
    inputs = {"logits": logits, "label": label, "images": images, "roi": roi, **change}
    with pytest.raises(error, match=f"dense_energy_loss: expected {message}"):
        dense_energy_loss(inputs.pop("logits"), inputs.pop("label"), **inputs)


@pytest.mark.parametrize("name", ["sigma_rgb", "sigma_xy", "scale"])
def test_the_module_refuses_numbers_when_it_is_built(name):
    with pytest.raises(ValueError, match=f"DenseEnergyLoss: expected `{name}` > 0, got -2"):
        ffr.DenseEnergyLoss(**{name: -2})
