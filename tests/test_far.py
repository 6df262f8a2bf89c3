"""The library and its scripts on a device that is not the CPU, as on the CPU. The device: far.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import far
import harness
import numpy as np
import pytest
import torch
from PIL import Image
from test_every_module import backward, check_autocast, every, leaves, same, through, to
from torch.testing import assert_close

from ffr import DenseCRF, metrics


def there(x):
    return far.Far(x.clone()).requires_grad_(x.requires_grad)


def here(xs):
    assert {x.device.type for x in leaves(xs)} <= {"far"}
    return [x.held for x in leaves(xs)]


def on_far(case, dtype=torch.float64, cast=None):
    """Result and gradients of a part there, brought here, and what the host waited for."""
    with far.reachable():
        part, batch = through(case.part(dtype).to("far"), case.batch(dtype), lambda x: there(to(x, dtype)))
        with harness.host_waits() as waits:
            result, grads = backward(part, batch, case.smooth, cast, "far")
    return here(result), here(grads), waits


@every
def test_it_gives_what_it_gives_on_the_cpu_and_the_host_never_waits(case):
    result, grads, waits = on_far(case)
    wanted, wanted_grads = backward(case.part(), case.batch(), case.smooth)
    same(result, leaves(wanted), rtol=1e-6, atol=1e-6)
    same(grads, wanted_grads, rtol=1e-6, atol=1e-6)
    assert waits == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_autocast_by_the_lists_of_cuda_keeps_float32_or_stays_near_it(case, dtype):
    wanted, wanted_grads, _ = on_far(case, torch.float32)
    result, grads, _ = on_far(case, torch.float32, dtype)
    check_autocast(case, wanted, wanted_grads, result, grads)


@pytest.fixture
def no_float64(monkeypatch):
    """The device has no float64, as Apple's has none."""
    made = far.Far.__new__

    def new(cls, held):
        assert held.dtype not in (torch.float64, torch.complex128)
        return made(cls, held)

    monkeypatch.setattr(far.Far, "__new__", staticmethod(new))


@every
def test_float32_needs_no_float64(case, no_float64):
    on_far(case, torch.float32)


def test_nor_do_crf_and_metrics(no_float64):
    draw = torch.Generator().manual_seed(0)
    image, label = torch.rand(3, 12, 16, generator=draw), torch.randint(4, (12, 16), generator=draw)
    scores, labels = torch.rand(6, 3, generator=draw), torch.randint(2, (6, 3), generator=draw)
    cam = torch.rand(1, 3, 12, 16, generator=draw)

    def figures(move):
        matrix, sweep, boundary = metrics.ConfusionMatrix(4), metrics.ThresholdSweep(4), metrics.BoundaryIoU(4)
        matrix.update(move(label.flip(0)), move(label))
        sweep.update(move(cam), move(label[None]))
        boundary.update(move(label.flip(0)), move(label))
        refined = DenseCRF().from_label(move(image), move(label), num_classes=3).cpu()
        means = [x.miou() for x in (matrix, sweep, boundary)]
        return refined, metrics.average_precision(move(scores), move(labels)), *map(torch.as_tensor, means)

    with far.reachable():
        ours = figures(there)
    for one, other in zip(ours, figures(lambda x: x), strict=True):
        assert_close(one, other, equal_nan=True)


# --- the device ---


def test_tensors_of_both_devices_do_not_meet_but_a_number_may():
    with far.reachable():
        x = torch.ones(3, device="far")
        assert here(x + torch.tensor(2.0))[0].tolist() == [3, 3, 3]
        with pytest.raises(RuntimeError, match="same device, found far and cpu"):
            x + torch.ones(3)


def test_autocast_casts_as_on_cuda():
    with far.reachable(), torch.autocast("far", dtype=torch.bfloat16):
        x, w = torch.ones(3, 3, device="far"), torch.ones(3, 3, device="far")
        low = x @ w
        assert low.dtype == torch.bfloat16
        assert low.exp().dtype == low.sum().dtype == low.softmax(1).dtype == torch.float32
        assert (low * 2).dtype == torch.bfloat16


# --- the scripts ---

ROOT = Path(__file__).parents[1]


def run(folder, script, *options, near=False):
    """A script as from the command line, there or on the CPU."""
    command = [ROOT / script, *options, "--device", "cpu"] if near else [far.__file__, ROOT / script, *options]
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
    assert_close(found[False], found[True], rtol=0, atol=2e-2)


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
