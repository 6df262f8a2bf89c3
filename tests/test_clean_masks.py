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


def test_an_output_that_is_a_file_is_refused_by_its_flag(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["clean_masks.py", "--out", str(tmp_path / "file")])
    assert clean_masks.main() == 2
    assert f"clean_masks: --out: expected a folder, got the file {tmp_path / 'file'}." in capsys.readouterr().err
