"""The library and its scripts on a device that is not the CPU, as on the CPU. The device: far.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils import backend_registration

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend") or not HEADER.is_file():
    pytest.skip("this torch has no devices in Python, or no headers", allow_module_level=True)

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent


def test_the_cases_pass_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", HERE / "far_cases.py"]
    done = subprocess.run(command, env=os.environ | {"PYTEST_ADDOPTS": ""}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


# --- the scripts ---


def run(folder, script, *options, near=False):
    """A script as from the command line, there or on the CPU."""
    command = [ROOT / script, *options, "--device", "cpu"] if near else [HERE / "far.py", ROOT / script, *options]
    paths = {"PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "examples", ROOT / "benchmarks"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def train(folder, out, precision="fp32", **where):
    steps = {
        "steps": 4,
        "seg-start": 1,
        "affinity-start": 2,
        "warmup": 1,
        "val-every": 4,
        "log-every": 1,
        "save-every": 2,
    }
    options = steps | {"batch-size": 4, "workers": 0, "precision": precision, "out": out}
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run(folder, "examples/train.py", "scenes", "--scenes", "40", "8", *flags, **where)
    lines = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [
        {name: line[name] for name in ("total", "seg_high", "rect", "aff")} for line in lines if line["kind"] == "train"
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, "run")


@pytest.mark.slow
def test_training_has_the_losses_of_the_cpu(trained):
    folder, losses = trained
    wanted = train(folder, "near", near=True)
    assert len(wanted) == 4
    for one, other in zip(losses, wanted, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_with_autocast_has_losses_near_those_of_float32(trained):
    folder, wanted = trained
    for one, other in zip(train(folder, "low", precision="bf16"), wanted, strict=True):
        assert_close(one, other, rtol=3e-2, atol=1e-3)


@pytest.mark.slow
def test_evaluation_and_prediction_are_those_of_the_cpu(trained):
    folder, _ = trained
    weights = ["--weights", "run/last.safetensors", "--workers", "0", "--crf-workers", "0"]
    rows = ["examples/evaluate.py", *weights, "--rows", "single", "multi-crf", "--images", "4"]
    Image.fromarray(np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)).save(folder / "noise.png")
    names = ["examples/predict.py", "noise.png", *weights, "--multi", "--probabilities"]
    found = {}
    for near in (False, True):
        run(folder, *rows, "--out", f"scores-{near}.json", near=near)
        run(folder, *names, "--out", f"labels-{near}", near=near)
        scores = json.loads((folder / f"scores-{near}.json").read_text())["rows"]
        with np.load(folder / f"labels-{near}" / "probabilities" / "noise.npz") as arrays:
            (probabilities,) = (array for array in arrays.values() if array.dtype.kind == "f")
        figures = {f"{row} {name}": scores[row][name] or 0.0 for row in scores for name in ("seg_miou", "boundary_iou")}
        found[near] = figures | {
            "cam": scores["single"]["cam_miou"],
            "probabilities": torch.from_numpy(probabilities).float(),
        }
    assert_close(found[False], found[True], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_figures_and_masks_are_made(trained):
    folder, _ = trained
    weights = ["--weights", "run/last.safetensors", "--count", "4", "--rows", "1"]
    run(folder, "examples/visualize.py", *weights, "--out", "figures")
    assert len(list((folder / "figures").glob("*.png"))) == 4
    clean = ["examples/clean_masks.py", "--scenes", "1", "--size", "64", "--grid", "8"]
    run(folder, *clean, "--device", "far", "--out", "masks")
    run(folder, *clean, "--out", "near-masks", near=True)
    one, other = (json.loads((folder / out / "masks.json").read_text())["rows"] for out in ("masks", "near-masks"))
    assert [row["miou_percent"] for row in one] == pytest.approx([row["miou_percent"] for row in other], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "prototypes.py --batches 1 --channels 8 --grid 5",
        "refinement.py --cases 32 2 --no-compile",
        "cams.py --batches 1 --model test_vit --size 160",
    ],
)
def test_benchmarks_run(tmp_path, line):
    script, *options = line.split()
    if script == "cams.py":
        pytest.importorskip("torchcam")
    run(tmp_path, f"benchmarks/{script}", *options, "--rounds", "1", "--device", "far", "--out", "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["rows"]
