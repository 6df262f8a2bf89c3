"""The picture of clean_masks.py."""

import clean_masks
import numpy as np
import torch

from ffr import draw


def test_classes_keep_their_colours_and_the_background_is_white():
    label = torch.tensor([[0, 1], [8, 255]])
    drawn = clean_masks.coloured(label)
    assert np.array_equal(drawn[0, 0], [255, 255, 255])
    assert np.array_equal(drawn[label > 0], draw.colorize(label)[label > 0])
