"""What the picture of the quickstart shows."""

import torch
from recipe.picture import steps_of
from test_framework import TinyEncoder
from torch.testing import assert_close

import ffr


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
