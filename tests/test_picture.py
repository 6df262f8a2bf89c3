"""What the picture of the quickstart shows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from recipe import picture
from recipe.picture import steps_of
from test_framework import TinyEncoder
from torch.nn import functional as F
from torch.testing import assert_close

import ffr
from ffr import draw


def test_the_band_cams_share_one_scale_per_image_and_class():
    torch.manual_seed(0)
    model = ffr.FFR(TinyEncoder(patch_size=4), 5, mu=0.2, hidden=6, dilation=1)
    images, labels = torch.rand(2, 3, 32, 48), torch.ones(2, 5)
    par = ffr.PixelAdaptiveRefinement((1,), 1)
    rectification = ffr.RectificationLoss()
    shown = steps_of(model, images, labels, high=0.7, low=0.25, rectification=rectification, refinement=par)["bands"]

    x = model.encoder(images).final.detach()
    weight = model.classifier.weight.detach()
    low, high = ffr.split_bands(x, 0.2)
    for image in range(2):
        for k in range(5):
            raw = [torch.einsum("d,dhw->hw", weight[k], part[image]).relu() for part in (x, low, high)]
            peak = max(float(part.max()) for part in raw)
            assert peak > 0
            for band, part in enumerate(raw):
                assert_close(shown[band, image, k], part / peak)
    assert shown.shape == (3, 2, 5, 8, 12)
    assert_close(shown.amax((0, 3, 4)), torch.ones(2, 5))
    assert (shown.amax((3, 4)) < 0.999).any()  # each band on a scale of its own would peak at 1


def test_every_step_is_that_of_the_parts():
    torch.manual_seed(0)
    model = ffr.FFR(TinyEncoder(patch_size=4), 5, mu=0.2, hidden=6, dilation=1)
    images, labels = torch.rand(2, 3, 32, 48), torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    par, rectification = ffr.PixelAdaptiveRefinement((1,), 1), ffr.RectificationLoss(gap=0.1)
    shown = steps_of(model, images, labels, high=0.6, low=0.4, rectification=rectification, refinement=par)
    with torch.no_grad():
        out = model.outputs(images)
        vectors, valid = ffr.class_prototypes(out.final, ffr.cam.normalize_cam(out.cam), labels)
        parts = {"features": out.final, "low": out.low, "prototypes": vectors, "valid": valid}
        selected = ffr.select_tokens(**parts, gap=0.1)
        cam = ffr.cam.normalize_cam(F.interpolate(out.cam, size=(32, 48), mode="bilinear"), labels=labels)
        pseudo = ffr.refine_label(images, cam, labels, high=0.6, low=0.4, refinement=par)
    assert 0 < selected.sum() < selected.numel()
    assert {0, 255} < set(pseudo.unique().tolist())
    assert torch.equal(shown["selected"], selected)
    assert torch.equal(shown["pseudo"], pseudo)
    assert torch.equal(shown["prediction"], F.interpolate(out.seg, size=(32, 48), mode="bilinear").argmax(1))


@pytest.mark.parametrize(("height", "width", "mu"), [(16, 16, 0.4), (7, 9, 0.2), (8, 5, 0), (6, 4, 0.25)])
def test_the_box_in_the_spectrum_holds_the_low_band_and_nothing_else(height, width, mu):
    axis = Figure().subplots()
    picture.draw_spectrum(axis, np.ones((height, width)), mu)
    (box,) = axis.patches
    for size, first, length in ((height, box.get_y(), box.get_height()), (width, box.get_x(), box.get_width())):
        frequency = np.fft.fftshift(np.fft.fftfreq(size))
        inside = (np.arange(size) > first) & (np.arange(size) < first + length)
        below_nyquist = np.abs(frequency) < 0.5  # at an even size it has one bin, on the left
        assert (inside == (np.abs(frequency) <= mu))[below_nyquist].all()


@pytest.mark.parametrize("size", [(1, 1), (4, 6)])
def test_tokens_that_are_all_alike_have_an_empty_spectrum_and_no_warning(size, recwarn):
    axis, spectrum = Figure().subplots(), np.zeros(size, dtype=np.float32)
    picture.draw_spectrum(axis, spectrum, 0.4)
    assert np.isfinite(np.asarray(axis.images[0].get_array())).all()
    assert not spectrum.any() and not recwarn


def test_each_panel_shows_what_stands_above_it(monkeypatch, tmp_path):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 16, 16), generator=random).byte()
    masks, labels = torch.randint(3, (2, 16, 16), generator=random).byte(), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    shown = {
        "bands": torch.rand(3, 2, 2, 4, 4, generator=random),
        "spectrum": torch.rand(2, 4, 4, generator=random) + 0.1,
        "selected": torch.rand(2, 2, 4, 4, generator=random) > 0.5,
        "pseudo": torch.randint(3, (2, 16, 16), generator=random),
        "prediction": torch.randint(3, (2, 16, 16), generator=random),
    }
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))
    picture.save_picture(tmp_path / "p.png", images, masks, labels, shown, ("bag", "boot"), mu=0.25, title="T")
    (figure,) = drawn
    columns = len(picture.COLUMNS)
    assert len(figure.axes) == 3 * columns
    for row, (image, k) in enumerate(((0, 0), (1, 0), (1, 1))):
        axes = figure.axes[row * columns : (row + 1) * columns]
        panels = [np.asarray(axis.images[-1].get_array()) for axis in axes]
        assert axes[0].get_ylabel() == ("bag", "boot")[k]
        assert np.array_equal(panels[0], images[image].permute(1, 2, 0))
        for band in range(3):
            whole = F.interpolate(shown["bands"][band, image, k][None, None], (16, 16), mode="bilinear")[0, 0]
            assert np.array_equal(panels[2 + band], draw.heatmap(whole, images[image]))
        assert np.array_equal(panels[5][..., 3] > 0, shown["selected"][image, k])
        for panel, label in zip(panels[6:], (shown["pseudo"], shown["prediction"], masks), strict=True):
            assert np.array_equal(panel, draw.colorize(label[image]))
    assert [text.get_text() for text in figure.legends[0].texts] == ["background", "bag", "boot", picture.UNDECIDED]
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    for text in [*figure.legends[0].texts, *(text for axis in figure.axes for text in (axis.title, *axis.texts))]:
        box = text.get_window_extent(renderer)  # nothing is cut off, and no heading runs into its neighbour
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    for left, right in pairwise(figure.axes[:columns]):
        for one, other in ((left.title, right.title), (left.texts[0], right.texts[0])):
            assert one.get_window_extent(renderer).x1 < other.get_window_extent(renderer).x0
