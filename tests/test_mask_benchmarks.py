"""The benchmarks of CRF, energy and refinement: each runs small on a CPU and writes what it printed, and no path."""

import json
import sys

import energy
import harness
import numpy as np
import pytest
import refinement
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from ffr.refine import PixelAdaptiveRefinement


def run(benchmark, monkeypatch, out, *options):
    """The script as from the command line; what it wrote."""
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *map(str, options), "--out", str(out)])
    assert benchmark.main() == 0
    text = out.read_text(encoding="utf-8")
    assert str(out.parent) not in text
    return json.loads(text)


def picture(path, seed, size=(24, 20)):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BILINEAR).save(path)


def test_a_result_is_never_overwritten(tmp_path):
    path = harness.save("x", {"out": tmp_path, "rounds": 3}, [], out=tmp_path / "x.json")
    assert json.loads(path.read_text(encoding="utf-8"))["settings"] == {"rounds": 3}
    with pytest.raises(FileExistsError, match=r"x\.json is there, and results are never edited"):
        harness.save("x", {}, [], out=path)


def test_all_pairs_are_the_energy_and_its_gradient():
    logits, label, image = (x.double() if x.is_floating_point() else x for x in energy.inputs(16, 3, "cpu"))
    value, slope = energy.all_pairs(logits, label, image, chunk=7)
    features = energy.image_features(image[0], sxy=energy.SIGMA_XY, srgb=energy.SIGMA_RGB)
    gaussian = torch.exp(-0.5 * torch.cdist(features, features).square())
    leaf = logits.clone().requires_grad_()
    probs = leaf.softmax(1)[0].flatten(1).t()
    gate = torch.where(label.flatten()[:, None] == 255, 1.0, 1 - probs.detach().amax(1, keepdim=True))
    wanted = -(gate * probs * (gaussian @ probs)).sum()
    assert_close(value, wanted.detach())
    assert_close(slope, torch.autograd.grad(wanted, leaf)[0])


def test_the_energy_is_measured_beside_its_scale(tmp_path, monkeypatch, capsys):
    record = run(energy, monkeypatch, tmp_path / "e.json", "--sides", 20, "--labels", 3, "--rounds", 1)
    assert [row["form"] for row in record["rows"]] == ["exact gradient", "customary gradient"]
    assert all(0.3 < row["energy_over_all_pairs"] < 1 and row["gradient_cosine"] > 0.9 for row in record["rows"])
    assert "20 x 20, exact gradient" in capsys.readouterr().out


def test_the_refinement_is_measured_beside_its_difference(tmp_path, monkeypatch, capsys):
    options = "--cases", 32, 2, "--rounds", 1, "--no-compile"
    record = run(refinement, monkeypatch, tmp_path / "r.json", *options)
    (row,) = record["rows"]
    assert (row["side"], row["channels"], row["form"]) == (32, 2, "eager")
    assert row["max_difference"] < 2e-6 and row["peak_bytes"] < row["peak_bytes_usual"]
    assert "32 x 32, 2 channels, eager" in capsys.readouterr().out


def test_the_usual_form_is_the_refinement():
    images, scores = torch.rand(1, 3, 30, 26).double(), torch.rand(1, 2, 30, 26).double()
    assert_close(refinement.usual(images, scores, 3), PixelAdaptiveRefinement(iterations=3)(images, scores))


def test_the_pseudo_label_is_measured_beside_its_agreement(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "PSEUDO", (64, 5))
    record = run(refinement, monkeypatch, tmp_path / "p.json", "--pseudo-label", "--iterations", 2, "--rounds", 1)
    assert record["subject"] == "pseudo-label"
    assert [row["form"] for row in record["rows"]] == ["max_present=2", "max_present=None"]
    assert all(row["labels_that_differ"] <= 2 and row["labels"] == 2 * 64 * 64 for row in record["rows"])
    assert all(row["times_faster"]["median"] > 0 for row in record["rows"])


@pytest.mark.parametrize("coarsen", ["label", "spill", "share"])
def test_masks_of_coco_are_coarsened_refined_and_scored(tmp_path, monkeypatch, coarsen):
    pytest.importorskip("pycocotools")
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    box = [4, 4, 16, 4, 16, 14, 4, 14]
    record = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 24} for n in (1, 2)],
        "categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}],
        "annotations": [{"image_id": 1, "category_id": 7, "segmentation": [box], "area": 120, "iscrowd": 0}],
    }
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(record), encoding="utf-8")
    for number in (1, 2):
        picture(folder / "val2017" / f"{number}.png", number)
    ((file, label),) = refinement.coco_masks(folder, "val2017", 0)  # the other one has no mask
    assert file.name == "1.png"
    assert_close(label, F.pad(torch.full((10, 12), 2, dtype=torch.uint8), (4, 8, 4, 6)))  # the second of the classes
    options = "--coco", folder, "--grid", 5, "--iterations", 1, "--coarsen", coarsen
    rows = run(refinement, monkeypatch, tmp_path / "q.json", *options)["rows"]
    assert [row["step"] for row in rows] == ["nothing", "PAR", "CRF", "PAR then CRF"]
    assert all(row["images"] == 1 and 0 < row["miou_percent"] <= 100 for row in rows)


def test_the_crf_is_measured_beside_its_agreement(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pydensecrf.densecrf")
    import crf

    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(2):
        picture(photographs / f"{number}.png", number)
    options = "--images", photographs, "--height", 30, "--width", 40, "--labels", 3, "--iterations", 2, "--rounds", 1
    record = run(crf, monkeypatch, tmp_path / "c.json", *options)
    assert [(row["setting"], row["opponent"]) for row in record["rows"]] == [(s, "pydensecrf2") for s in crf.SETTINGS]
    assert all(0 < row["times_faster_anew"]["median"] < 100 for row in record["rows"])
    assert all(row["labels_differing"] <= 1 and row["mean_abs_error"] < 1e-5 for row in record["rows"])
    assert record["settings"]["images"] == ["0.png", "1.png"]
    assert "recipe, pydensecrf2" in capsys.readouterr().out
    monkeypatch.setattr(crf, "densecrf", None)
    with pytest.raises(SystemExit, match=r"crf\.py: the opponent is pydensecrf2: run pip install"):
        run(crf, monkeypatch, tmp_path / "d.json", *options)
