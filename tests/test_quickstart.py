"""The quickstart and the recipe behind it, with few steps."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import quickstart
import torch
from PIL import Image
from quickstart import Settings, configure
from recipe import engine, files
from recipe.data import SceneExamples, SceneImages
from recipe.evaluation import Protocol, evaluate
from recipe.files import written
from recipe.scenes import Scenes, make_scenes
from rich.console import Console
from torch.nn import functional as F

from ffr import metrics

COUNTS = {"train": 32, "val": 16, "test": 16}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "SCENES", COUNTS)
    about, scenes = quickstart.PRESETS["scenes"]
    monkeypatch.setitem(quickstart.PRESETS, "scenes", (about, replace(scenes, batch_size=4)))
    return Settings(steps=4, out=tmp_path / "out")


def build(settings, scenes=None, **weights):
    """What one row of the table trains."""
    return quickstart.build(configure(settings, **weights), make_scenes("train", 8) if scenes is None else scenes)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["quickstart.py", *map(str, arguments)])
    return quickstart.main()


def test_it_prints_a_table_and_writes_a_picture_and_the_figures(small, monkeypatch, capsys):
    assert run_main(monkeypatch, "--steps", 4, "--seed", 3, "--out", small.out) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("all background", "untrained", "baseline", "FFR", "no evidence"))
    assert sorted(path.name for path in small.out.iterdir()) == ["quickstart.json", "quickstart.png"]
    record = json.loads((small.out / "quickstart.json").read_text())
    assert list(record["rows"]) == ["all_background", "untrained", "baseline", "ffr"]
    for name, row in record["rows"].items():
        keys = {"classification_map", "cam_miou", "seg_miou", "boundary_iou", "images_per_second"}
        assert keys <= set(row)
        assert (row["images_per_second"] is None) == (name in ("all_background", "untrained"))
        assert 0 <= row["seg_miou"] <= 100 and 0 <= row["boundary_iou"] <= 100
    assert record["seed"] == 3 and record["settings"]["steps"] == 4
    assert {"torch", "timm", "ffr", "python"} <= set(record["versions"])
    assert record["vectors"] == torch.backends.cpu.get_cpu_capability()
    width, height = Image.open(small.out / "quickstart.png").size
    assert width > 800 and height > 400


def test_all_background_scores_the_share_of_background_among_all_classes():
    test = make_scenes("test", 8)
    matrix = metrics.ConfusionMatrix(len(quickstart.CLASSES) + 1)
    everything = test.masks.clone()
    everything[0, 0, : len(quickstart.CLASSES)] = torch.arange(1, len(quickstart.CLASSES) + 1)  # every class present
    matrix.update(torch.zeros_like(everything), everything)
    row = quickstart.all_background(Scenes(test.images, everything, test.labels))
    assert row["seg_miou"] == pytest.approx(100 * matrix.miou())
    assert row["classification_map"] is None and row["boundary_iou"] == 0


def test_an_untrained_network_is_no_better_than_calling_everything_background(small):
    test = make_scenes("test", 16)
    rows = quickstart.score(build(small).model, test, test, "cpu")
    assert abs(rows["seg_miou"] - quickstart.all_background(test)["seg_miou"]) < 5


def test_both_models_start_from_the_same_weights_and_see_the_same_batches(small):
    scenes = make_scenes("train", 12)
    first, second = build(small, scenes), build(small, scenes, **quickstart.WITHOUT)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    one, other = first.samples, second.samples
    for step in range(3):
        (a, la), (b, lb) = one.batch(step), other.batch(step)
        assert torch.equal(a, b) and torch.equal(la, lb)
        assert a.min() >= 0 and a.max() <= 1 and a.dtype == torch.float32


def test_another_seed_gives_other_batches():
    scenes = make_scenes("train", 12)
    (a, _), (b, _) = (SceneImages(scenes, 4, seed).batch(0) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_the_seed_decides_the_first_weights_and_the_scenes(small, monkeypatch):
    one, same, other = (build(Settings(seed=seed)).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    asked = []

    def stop(*arguments):
        asked.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(quickstart, "make_scenes", stop)
    with pytest.raises(InterruptedError):
        quickstart.run(Settings(seed=7, size=96), Console(quiet=True))
    assert asked == [("train", COUNTS["train"], 96, 7)]


def test_the_other_losses_join_after_two_fifths_of_the_steps():
    config = configure(Settings(steps=50))
    assert config.seg_start == config.affinity_start == 20 and config.warmup == 5
    assert configure(Settings()) == replace(quickstart.PRESETS["scenes"][1], log_every=10, device="cpu")


def test_the_threshold_is_chosen_on_validation_scenes_and_never_on_test(monkeypatch):
    seen, figures = [], {"cam_miou": 1.0, "thresholds": {"cam": {"value": 0.25}}}

    def spy(model, examples, protocol, **how):
        seen.append((model, examples.scenes, protocol.threshold))
        return figures

    monkeypatch.setattr(quickstart, "evaluate", spy)
    found = quickstart.score("model", "val", "test", "cpu")
    assert found["cam_miou"] == 1 and found["threshold"] == 0.25 and found["images_per_second"] is None
    assert seen == [("model", "val", None), ("model", "test", 0.25)]


def test_the_figures_are_those_of_a_count_by_hand(small):
    model, scenes = build(small).model, make_scenes("val", 12)
    with torch.no_grad():
        model.head.last.weight.normal_(generator=torch.Generator().manual_seed(2))
        images, masks, labels = scenes.images, scenes.masks.long(), scenes.labels
        out = model.eval().outputs(images)
        seg, raw = (F.interpolate(maps, size=(64, 64), mode="bilinear") for maps in (out.seg, out.cam))
        raw = raw.clamp(min=0)
        low, peak = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
        cam = (raw - low) / (peak - low).clamp(min=1e-12) * labels[..., None, None]  # only the classes of the label
        of_cam = torch.where(cam.amax(1) > 0.3, cam.argmax(1) + 1, 0)

    def miou(guess):
        both = [((guess == k) & (masks == k)).sum() for k in range(9)]
        either = [((guess == k) | (masks == k)).sum() for k in range(9)]
        found = [float(b / e) for k, (b, e) in enumerate(zip(both, either, strict=True)) if (masks == k).any()]
        return 100 * sum(found) / len(found)

    found = evaluate(model, SceneExamples(scenes), Protocol(threshold=0.3), device="cpu", batch_size=5)
    assert found["seg_miou"] == pytest.approx(miou(seg.argmax(1)))
    assert found["cam_miou"] == pytest.approx(miou(of_cam))
    boundary = metrics.BoundaryIoU(9)
    boundary.update(seg.argmax(1), masks)
    assert found["boundary_iou"] == pytest.approx(100 * boundary.miou())
    precision = metrics.average_precision(out.logits, labels).nanmean()
    assert found["classification_map"] == pytest.approx(100 * float(precision))


def test_the_baseline_has_neither_high_band_head_nor_rectification(small):
    images, labels = torch.rand(2, 3, 64, 64), torch.ones(2, 8)
    terms = build(small, **quickstart.WITHOUT).objective(images, labels, step=10)
    assert terms.seg > 0 and terms.aff > 0 and terms.seg_high == 0 and terms.rect == 0


def test_training_learns_something(small, monkeypatch):
    seen = []
    monkeypatch.setattr(quickstart, "progress", lambda *_: (nullcontext(), lambda step, values: seen.append(values)))
    trainer = build(replace(small, steps=150))
    assert quickstart.train(trainer, "FFR", Console(quiet=True)) > 0
    assert len(seen) == 16 and "lr" not in seen[0]
    assert sum(values["cls"] for values in seen[-3:]) < 0.9 * sum(values["cls"] for values in seen[:3])


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-6), (50, 0.5000005), (100, 0.9**0.9), (999, 0.001**0.9)])
def test_the_learning_rate_warms_up_and_decays_from_step_zero(step, rate):
    assert engine.learning_rate(step, 1000, 100, 1.0) == pytest.approx(rate)


def test_biases_norms_and_positions_do_not_decay_and_heads_learn_faster(small):
    model = build(small).model
    adamw = engine.optimizer(model, 1e-3, weight_decay=0.05, head_scale=4.0)
    found = {id(p): group for group in adamw.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 and "pos_embed" not in name else 0.0), name
        assert group["scale"] == (1.0 if name.startswith("encoder.") else 4.0), name


def test_what_a_network_draws_follows_from_seed_and_step(small):
    drawn = {}
    for seed, start in ((0, 0), (0, 2), (1, 0)):  # dropout, say, after a restart too
        trainer, values = build(replace(small, seed=seed)), drawn.setdefault((seed, start), [])
        trainer.objective.register_forward_pre_hook(lambda *_, values=values: values.append(torch.rand(1).item()))
        assert len(list(trainer.run(start))) == 4 - start
    assert drawn[0, 2] == drawn[0, 0][2:]
    assert len({*drawn[0, 0], *drawn[1, 0]}) == 8


def test_the_settings_of_the_optimiser_reach_it(small):
    config = replace(configure(small), warmup=0, lr=1e-3, weight_decay=0.02, head_scale=3.0, power=2.0)
    trainer = quickstart.build(config, make_scenes("train", 8))
    rates = [values["lr"] for _, values in trainer.run() if values is not None]
    assert rates[-1] == pytest.approx(1e-3 * (1 / 4) ** 2)
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    assert sorted({group["lr"] for group in groups}) == pytest.approx([rates[-1], 3 * rates[-1]])


def test_a_gradient_is_cut_to_its_bound_and_0_is_none(small):
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = quickstart.build(replace(configure(small), clip=clip), make_scenes("train", 8))
        next(trainer.run())
        moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
        norms[clip] = float(torch.cat(moments).norm()) / (1 - 0.9)  # what Adam lets in
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[0.0] > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 1], r"--steps: expected at least 2, got 1"),
        (["--seed", -1], r"--seed: expected 0 or more, got -1"),
        (["--size", 66], r"--size: expected a multiple of 4 in \[64, 448\], got 66"),
        (["--size", 32], r"--size: .*got 32"),
        pytest.param(
            ["--device", "cuda"],
            "--device: torch sees no GPU here. Use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_unusable_options_are_refused_by_name(arguments, message, monkeypatch, capsys, tmp_path):
    assert run_main(monkeypatch, *arguments, "--out", tmp_path / "new") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_an_output_folder_without_room_is_refused_before_the_training(monkeypatch, capsys, tmp_path):
    def full(**how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(quickstart, "run", None)
    assert run_main(monkeypatch, "--out", tmp_path) == 2
    wanted = f"quickstart: --out: cannot write to {tmp_path} (No space left on device). Name another folder."
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "folder", "folder/of/folders"])
def test_a_file_as_output_folder_is_refused(below, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert run_main(monkeypatch, "--out", tmp_path / "file" / below) == 2
    assert f"--out: expected a folder, got the file {tmp_path / 'file'}." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_training_that_diverges_has_the_exit_code_of_train(small, monkeypatch, capsys):
    def diverges(*_):
        raise quickstart.Diverged("cls", 3, {})

    monkeypatch.setattr(quickstart, "train", diverges)
    assert run_main(monkeypatch, "--steps", 4, "--out", small.out) == 3
    assert "quickstart: step 3: the loss term `cls` is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["train", "save_picture"])
def test_an_interruption_leaves_no_half_written_file(where, small, monkeypatch, capsys):
    def interrupted(path, *args, **kwargs):
        if where == "save_picture":
            path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, where, interrupted)
    assert run_main(monkeypatch, "--steps", 4, "--out", small.out) == 130
    assert "interrupted" in capsys.readouterr().err
    kept = list(small.out.iterdir())
    assert kept == ([small.out / "quickstart.json"] if where == "save_picture" else [])
    assert all(json.loads(path.read_text())["rows"] for path in kept)


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "quickstart.png"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), written(path):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_keeps_the_figures_of_an_earlier_run(small, monkeypatch):
    small.out.mkdir(parents=True)
    (small.out / "quickstart.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), written(small.out / "quickstart.json") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert (small.out / "quickstart.json").read_text() == "{}"
    assert len(list(small.out.iterdir())) == 1


def test_progress_without_a_terminal_is_a_line_every_tenth(capsys):
    bar, report = quickstart.progress(Console(force_terminal=False), "FFR", 100)
    with bar:
        for step in range(1, 101):
            report(step, {"total": 1.0, "seg": 0.0})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 10 and lines[-1] == "FFR: step 100/100, total 1.00"
