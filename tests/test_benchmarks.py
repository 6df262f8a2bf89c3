"""The benchmarks: each runs small on a CPU, prints what it promises and writes what it printed; no test on times."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import harness
import inference
import pytest
import step
import torch

from ffr import FFR, timm_encoder

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
SMALL = ["--model", "vit_tiny_patch16_224", "--crop", "32", "--batch", "1", "--classes", "3"]


def run(benchmark, monkeypatch, out, *options):
    """The script as from the command line; its exit status and what it wrote."""
    monkeypatch.setattr(benchmark, "timm_encoder", partial(timm_encoder, depth=3))
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *options, "--out", str(out)])
    status = benchmark.main()
    return status, json.loads(out.read_text(encoding="utf-8"))


# --- the harness ---


def test_functions_take_turns_and_quick_ones_run_several_times_a_round():
    calls = []
    times = harness.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, seconds=0)
    assert "".join(calls) == "aaabbb" + "ab" * 3  # warm-up and a first look, then rounds
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    calls.clear()
    harness.measure({"a": lambda: calls.append("a")}, rounds=1, warmup=1, seconds=0.01)
    assert len(calls) > 10


def test_a_ratio_is_taken_round_by_round():
    # a busy moment hits both: the ratio of the medians would be 2
    assert harness.ratio({"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 3.0]}, "a", "b") == (2.0, 2.0, 3.0)
    assert harness.spread([5.0]) == (5.0, 5.0, 5.0)


def test_a_benchmark_that_is_stopped_keeps_what_it_has(tmp_path):
    def rows():
        yield {"case": 1}
        yield {"case": 2}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {"case": 3}

    before = signal.getsignal(signal.SIGTERM)
    found = harness.until_stopped(rows())
    assert found == [{"case": 1}, {"case": 2}]
    os.kill(os.getpid(), signal.SIGTERM)  # as schedulers repeat it
    signal.signal(signal.SIGTERM, before)
    record = json.loads(harness.save("x", {}, found, out=tmp_path / "x.json").read_text(encoding="utf-8"))
    assert (record["complete"], record["rows"]) == (False, found)
    whole = harness.until_stopped(iter([{"case": 1}]))
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads(harness.save("x", {}, whole, out=tmp_path / "y.json").read_text(encoding="utf-8"))["complete"]


def test_a_benchmark_that_is_stopped_at_once_ends():
    def rows():
        os.kill(os.getpid(), signal.SIGTERM)
        yield {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="before the first result"):
        harness.until_stopped(rows())
    signal.signal(signal.SIGTERM, before)


PYTHON = """#!/bin/sh
case "$1" in
    -c) echo nvidia-x ;;
    benchmarks/cams.py) exit 3 ;;
    benchmarks/crf.py) exit 124 ;;
    *) echo "$@" ;;
esac
"""


TIMEOUT = """#!/bin/sh
echo "limit $3"
shift 3
exec "$@"
"""


@pytest.mark.parametrize("seconds", [85, 5])
def test_the_benchmarks_of_a_gpu_keep_to_their_time(seconds, tmp_path):
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}
    made = subprocess.run(
        ["bash", GPU, tmp_path / "figures"],
        env={**environment, "SECONDS_IN_ALL": str(seconds)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    report = made.stdout.rstrip().splitlines()[-9:]
    assert made.returncode == 1
    if seconds == 5:
        assert {line.partition(": ")[2] for line in report} == {"no time left"}
        return
    limits = [int(limit) for limit in re.findall(r"^limit (\d+)$", made.stdout, re.MULTILINE)]
    assert len(limits) == 9 and max(limits) <= 85 and limits[3] == 40
    out = re.escape(str(tmp_path / "figures"))
    assert re.search(rf"--device cuda --out {out}/\S+-nvidia-x-step\.json --precision bf16", made.stdout)
    ended = {line.partition(": ")[0]: re.sub(r", \d+ s", "", line.partition(": ")[2]) for line in report}
    assert (ended.pop("crf"), ended.pop("cams")) == ("stopped after 60 s", "failed with status 3")
    assert set(ended.values()) == {"done"}


def test_the_peak_is_that_of_what_lives_at_once():
    size = 4 * 2**20
    assert harness.peak_bytes(lambda: torch.ones(2**20)) == size
    assert harness.peak_bytes(lambda: torch.ones(2**20) + torch.ones(2**20)) == 3 * size
    assert harness.peak_bytes(lambda: [torch.ones(2**20).sum() for _ in range(3)]) < 1.5 * size


def test_what_would_wait_on_a_gpu_is_named_with_its_line():
    with harness.host_waits() as found:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
        torch.ones(3).tolist()
        torch.ones(3) + 1
    assert [line.partition(" ")[0] for line in found][:3] == ["_local_scalar_dense", "index", "tolist"]
    assert all(re.search(r"\(test_benchmarks\.py:\d+\)$", line) for line in found)


def test_a_result_is_never_overwritten(tmp_path):
    path = harness.save("nothing", {"a": 1}, [{"b": 2}], out=tmp_path / "one.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["subject"], record["settings"], record["rows"]) == ("nothing", {"a": 1}, [{"b": 2}])
    assert {"date", "device", "threads", "torch", "commit"} <= record["machine"].keys()
    with pytest.raises(FileExistsError, match="results are never edited"):
        harness.save("nothing", {}, [], out=path)


# --- the training step ---


def test_the_benchmark_of_the_step_shares_it_out_over_its_parts(tmp_path, monkeypatch, capsys):
    options = ("--present", "1", "--steps", "1", "--precision", "bf16")
    status, record = run(step, monkeypatch, tmp_path / "step.json", *SMALL, *options)
    assert status == 0
    forms = [row for row in record["rows"] if "form" in row]
    parts = {row["part"]: row for row in record["rows"] if "part" in row}
    assert [row["form"] for row in forms] == ["fp32, eager", "bf16, eager"]
    assert forms[0]["times_faster_than_fp32"]["median"] == 1
    assert all(row["utilisation_percent"]["median"] > 0 and row["peak_bytes"] > 0 for row in forms)
    without_backward = {name for name, row in parts.items() if row["backward_percent"] is None}
    assert without_backward == {
        *("multi-scale CAM, final", "multi-scale CAM, intermediate", "pseudo label, final"),
        *("FFR: selection", "FFR: pseudo label, intermediate", "optimiser"),
    }
    # what the parts compute is what the step computes, to the last product
    inner = sum(row["giga_flop"] for name, row in parts.items() if name not in ("whole step", "optimiser"))
    assert inner == pytest.approx(parts["whole step"]["giga_flop"], rel=2e-3)
    assert record["settings"]["host_waits"] == []
    shown = capsys.readouterr().out
    for promised in ("Training step", "bf16, eager", "of the floor %", "FFR: frequency mask", "never."):
        assert promised in shown


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_the_compiled_step_is_the_same_step_and_the_eager_one_stays_eager(how):
    torch.manual_seed(0)
    arguments = step.Arguments(crop=32, batch=1, classes=3, present=1, compile=how, backend="eager")
    model = FFR(timm_encoder("vit_tiny_patch16_224", img_size=32, depth=3), 3)
    loss = step.FFRLoss(model, start=0)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    object.__setattr__(arguments, "backend", backend)
    called = step.compiled(arguments, loss)
    wanted = step.Step(arguments, loss, model, "fp32").forward()
    assert not graphs
    for _ in range(2):
        torch.testing.assert_close(step.Step(arguments, called, called.model, "fp32").forward(), wanted)
    # blocks: three sizes of the CAM and the training itself, the head and the refinement
    assert len(graphs) == {"blocks": 6, "whole": 1}[how]


def test_compiled_for_a_gpu_the_refinement_keeps_its_kernel():
    model = FFR(timm_encoder("vit_tiny_patch16_224", img_size=32, depth=3), 3)
    for device in ("cpu", "cuda"):
        arguments = step.Arguments(crop=32, classes=3, compile="blocks", device=device)
        called = step.compiled(arguments, step.FFRLoss(model, start=0))
        assert (called.refinement._compiled_call_impl is None) == (device == "cuda")
        assert all(block._compiled_call_impl is not None for block in called.model.encoder.model.blocks)


def test_the_operations_of_attention_are_counted_on_every_device():
    encoder = timm_encoder("vit_tiny_patch16_224", img_size=64)
    tokens, width, blocks = 17, 192, 12
    products = 4 * width**2 + 8 * width**2  # query, key, value and projection; the two layers of the MLP
    wanted = 2 * blocks * tokens * (products + 2 * tokens * width) + 2 * 16 * width * 3 * 16**2
    with torch.no_grad():
        assert step.flops(lambda: encoder(torch.zeros(1, 3, 64, 64))) == wanted


def test_the_operations_are_counted_without_computing(tmp_path, monkeypatch, capsys):
    """By hand: 7.0 TFLOP, 0.2 of it the two heads, less 0.6 that the CAM takes from the training forward."""
    out = tmp_path / "count.json"
    monkeypatch.setattr(sys, "argv", ["step.py", "--count", "--out", str(out)])
    assert step.main() == 0
    found = {row["part"]: row["tera_flop"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert found["whole step"] == pytest.approx(6.36, abs=0.05)
    assert found["multi-scale CAM, final"] == pytest.approx(4.24, abs=0.05)
    assert found["segmentation head"] + found["FFR: second head"] == pytest.approx(0.2, abs=0.05)
    assert sum(found.values()) == pytest.approx(2 * found["whole step"], rel=1e-3)
    assert "Operations of a training step" in capsys.readouterr().out


def test_a_crop_of_broken_patches_and_too_many_classes_are_refused(tmp_path, monkeypatch):
    for options, message in (
        (("--crop", "40"), r"step.py: --crop: expected a multiple of 16, got 40"),
        (("--present", "4"), r"step.py: --present: expected 1..3 \(--classes\), got 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(step, monkeypatch, tmp_path / "step.json", *SMALL, *options)


# --- inference ---


def test_the_benchmark_of_inference_agrees_with_eager_and_exports_inference_alone(tmp_path, monkeypatch, capsys):
    options = ("--rounds", "1", "--no-compile")
    status, record = run(inference, monkeypatch, tmp_path / "inference.json", *SMALL, *options)
    assert status == 0
    kinds = ("one scale", "scales and flip", "scales, flip, CRF")
    assert [(row["kind"], row["form"]) for row in record["rows"]] == [
        (kind, form) for kind in kinds for form in ("eager", "exported")
    ]
    assert all(row["max_difference_of_logits"] < 1e-4 and row["images_per_second"] > 0 for row in record["rows"])
    assert record["settings"]["exported"]["of_training_alone"] == []
    assert "band split or the second head it has none" in capsys.readouterr().out


def test_what_only_training_needs_is_found_in_an_exported_graph():
    class Everything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = FFR(timm_encoder("vit_tiny_patch16_224", img_size=32), 3).eval()

        def forward(self, images):
            return self.inner.outputs(images).seg_high

    program = torch.export.export(Everything(), (torch.zeros(1, 3, 32, 32),))
    assert len(inference.foreign(program)) > 2


def test_several_scales_sum_the_flip_pair_and_take_the_maximum_over_scales():
    def network(images):  # left half, by the mean of each patch
        pooled = torch.nn.functional.avg_pool2d(images[:, :2], 16)
        return pooled * torch.linspace(1, 2, pooled.shape[3])

    images = torch.rand(1, 3, 32, 32)
    one = inference.several(network, images, 16, [32])
    straight, turned = (inference.to_image(network(x), (32, 32), 16) for x in (images, images.flip(3)))
    torch.testing.assert_close(one, straight + turned.flip(3))
    both = inference.several(network, images, 16, [32, 48])
    assert both.shape == one.shape
    torch.testing.assert_close(both, torch.maximum(one, inference.several(network, images, 16, [48])))
