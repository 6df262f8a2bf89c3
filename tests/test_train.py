"""train.py: the recipe's settings, one run on any number of ranks, stopped and gone on, and what it refuses."""

import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import train
from accelerate.state import AcceleratorState
from PIL import Image
from recipe import checkpoint, engine
from recipe.config import PRESETS, SCENES, VOC, Config
from recipe.data import Item, SceneImages, TrainImages, read_split, write_split
from recipe.engine import Trainer
from recipe.network import ConvStem, build_model
from recipe.scenes import CLASSES, make_scenes
from recipe.weights import fill, load_weights, save_weights
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ffr.draw import save_label

ROOT = Path(__file__).parents[1]
# Four blocks of the small network on a few scenes: a step is some 30 ms.
FEW = {
    "steps": 8, "scenes": (16, 4), "batch_size": 4, "warmup": 2, "seg_start": 3, "affinity_start": 2, "log_every": 1,
    "save_every": 2, "val_every": 4, "device": "cpu",
}  # fmt: skip
COCO = PRESETS["coco"][1]
CREATE = timm.create_model


def flags(**settings):
    """As on a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def run(monkeypatch, preset="scenes", **settings):
    monkeypatch.setattr("sys.argv", ["train.py", preset, *flags(**{**FEW, **settings})])
    return train.main()


def logged(out, kind="train"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def same_weights(one, two):
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, out=out) == 0
    return out


def make_folder(folder, size=64):
    """A prepared folder of scenes, as files."""
    folder.mkdir()
    for split, count in (("train", 12), ("val", 5)):
        scenes, items = make_scenes(split, count, size), []
        for i, (image, mask, labels) in enumerate(zip(*scenes, strict=True)):
            paths = folder / f"{split}{i}.jpg", folder / f"{split}{i}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[0])
            save_label(paths[1], mask)
            items.append(Item(f"{split}{i}", *paths, tuple(labels.nonzero().flatten().tolist())))
        write_split(folder, split, CLASSES, items)
    return folder


# Settings ---------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_recipe_of_the_method():
    assert (VOC.steps, VOC.batch_size, COCO.steps, COCO.batch_size) == (20_000, 4, 80_000, 8)
    assert (VOC.lr, VOC.warmup, VOC.power, VOC.weight_decay, VOC.head_scale) == (6e-5, 2000, 0.9, 0.01, 10)
    assert (VOC.seg_start, VOC.affinity_start, COCO.seg_start, COCO.affinity_start) == (2000, 0, 8000, 12_000)
    assert (VOC.high, VOC.low, COCO.high, COCO.low) == (0.7, 0.25, 0.65, 0.25)
    assert (VOC.cam_threshold, COCO.cam_threshold) == (0.5, 0.45)
    assert (VOC.crop, VOC.crop_scale, VOC.flip, VOC.jitter) == (448, (0.32, 1.0), 0.5, 0.5)
    assert (VOC.model, VOC.pretrained, VOC.intermediate) == ("vit_base_patch16_224", True, -3)
    assert (VOC.mu, VOC.lambda_h, VOC.lambda_l, VOC.w_seg, VOC.w_aff, VOC.w_reg) == (0.4, 2, 1, 0.1, 0.2, 0.05)
    assert (VOC.gap, VOC.min_fraction, VOC.seed_threshold) == (0.05, 0.05, 0.7)
    assert (VOC.cam_scales, VOC.cam_flip) == ((1.0, 0.5, 1.5), True)
    assert replace(PRESETS["folder"][1], data=VOC.data, out=VOC.out) == VOC


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_used_and_survives_json(name):
    config = PRESETS[name][1]
    config.check()
    assert Config.from_json(json.loads(config.to_text())) == config


def test_every_setting_says_why():
    text = (ROOT / "examples" / "recipe" / "config.py").read_text(encoding="utf-8")
    for field in fields(Config):
        assert re.search(rf'^    {field.name}: .*\n    """.+"""$', text, re.MULTILINE), field.name


def test_settings_of_another_version_are_refused_by_name():
    with pytest.raises(ValueError, match="name nu, which this version"):
        Config.from_json({"nu": 1})


def test_torchrun_takes_none_of_our_flags_for_its_own():
    """It accepts any unique beginning of its options, and refuses one that could be several."""
    from torch.distributed.run import get_args_parser

    theirs = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    ours = ["--" + field.name.replace("_", "-") for field in fields(Config)]
    assert [flag for flag in ours if any(other.startswith(flag) for other in theirs)] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"batch_size": 6, "accumulate": 4}, "--batch-size: expected a multiple of --accumulate 4: 6"),
        ({"seed": 2**32}, "--seed: expected less than 2 \\*\\* 32, got 4294967296"),
        ({"lr": 0.0}, "--lr: expected more than 0, got 0.0"),
        ({"lr": math.nan}, "--lr: expected more than 0, got nan"),
        ({"mu": 0.6}, r"--mu: expected 0 to 0.5, got 0.6"),
        ({"low": 0.8, "high": 0.7}, r"--low: expected 0 to --high, 0.7, got 0.8"),
        ({"crop_scale": (0.5, 0.2)}, r"--crop-scale: expected 0 < low <= high <= 1"),
        ({"cam_scales": (1.0, 0.0)}, r"--cam-scales: expected factors above 0"),
        ({"val_images": 0}, "--val-images: expected at least 1"),
        ({"w_seg": -1.0}, "--w-seg: expected 0 or more"),
        ({"model": "small", "pretrained": True}, "--pretrained: .*--no-pretrained"),
        ({"pretrained": True, "checkpoint": Path("a.pth"), "model": "vit_tiny_patch16_224"}, "--checkpoint: "),
        ({"fsdp": True, "precision": "fp16"}, "--fsdp: .*bf16"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_their_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SCENES, **settings).check()


# A run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_weights_checkpoints_and_logs(whole):
    names = sorted(path.name for path in whole.iterdir())
    assert names == [
        "best.safetensors", "checkpoint-00000006.pt", "checkpoint-00000008.pt", "last.safetensors", "log.jsonl",
        "tensorboard",
    ]  # fmt: skip
    curves = EventAccumulator(str(whole / "tensorboard")).Reload().Tags()["scalars"]
    assert {curve.partition("/")[0] for curve in curves} == {"train", "val", "high_band_share"}
    terms = logged(whole)
    assert [line["step"] for line in terms] == list(range(1, 9))
    for name in ("total", "cls", "cls_inter", "seg", "seg_high", "rect", "aff", "ignored", "foreground", "selected"):
        assert all(math.isfinite(line[name]) for line in terms)
        assert terms[-1][name] > 0, name
    assert terms[0]["seg"] == terms[2]["seg"] == 0 < terms[3]["seg"]
    assert terms[0]["aff"] == terms[1]["aff"] == 0 < terms[2]["aff"]
    assert [line["step"] for line in logged(whole, "val")] == [4, 8]
    shares = logged(whole, "high_band_share")[-1]
    assert all(0 < shares[name] < 1 for name in ("block 1", "block 2", "block 3", "block 4", "final"))
    (about,) = logged(whole, "run")
    assert about["config"]["steps"] == 8 and about["ranks"] == 1 and "torch" in about["versions"]


def test_the_log_says_how_fast_it_went_and_which_part_of_the_time_it_waited_for_images(monkeypatch, tmp_path):
    clock, image, move, score = [0.0], SceneImages.__getitem__, torch.optim.AdamW.step, train.evaluate

    def loaded(self, n):
        clock[0] += 0.25
        return image(self, n)

    def moved(self, *args, **how):
        clock[0] += 3
        return move(self, *args, **how)

    def scored(*args, **how):
        clock[0] += 100
        return score(*args, **how)

    monkeypatch.setattr(train, "evaluate", scored)
    monkeypatch.setattr(SceneImages, "__getitem__", loaded)
    monkeypatch.setattr(torch.optim.AdamW, "step", moved)
    for module in (train, engine):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert run(monkeypatch, out=tmp_path / "run", log_every=2, val_every=4) == 0
    rates = {line["step"]: (line["waiting"], line["images_per_second"]) for line in logged(tmp_path / "run")}
    # A step loads four images in 1 s and computes for 3 s; the validation after step 4 is no training.
    assert rates == dict.fromkeys((1, 3, 5, 7, 8), (0.25, 1))


def test_a_run_too_short_for_its_schedule_says_what_it_leaves_out_and_calls_no_random_head_its_best(
    monkeypatch, capsys, tmp_path
):
    out = tmp_path / "run"
    assert run(monkeypatch, out=out, steps=4, val_every=2, seg_start=4, affinity_start=9, warmup=5) == 0
    said = capsys.readouterr().out
    assert "--seg-start 4 is not reached in --steps 4: the segmentation head stays as random as it begins" in said
    assert "--affinity-start 9 is not reached in --steps 4. Lower it." in said
    assert "--warmup 5 is not over in --steps 4: --lr is never reached. Lower it." in said
    assert "in percent: CAM mIoU" in said and "segmentation mIoU" not in said
    assert not (out / "best.safetensors").exists() and (out / "last.safetensors").exists()
    assert run(monkeypatch, out=tmp_path / "other", steps=2, val_every=0, seg_start=0, w_seg=0.0) == 0
    assert "segmentation mIoU" not in capsys.readouterr().out and not (tmp_path / "other/best.safetensors").exists()
    off = Config(steps=4, w_seg=0, lambda_l=0, w_reg=0, w_aff=0, warmup=3)
    assert train.never_reached(off) == []
    start = f"--seg-start {off.seg_start} is not reached in --steps 4: there is no rectification"
    assert train.never_reached(replace(off, lambda_l=1)) == [f"{start}. Lower it."]
    assert train.never_reached(replace(off, lambda_l=1, w_reg=1)) == [f"{start} and there is no energy. Lower it."]
    said = train.never_reached(replace(off, w_aff=1, affinity_start=4, warmup=4))
    assert [line.partition(" is not ")[0] for line in said] == ["--affinity-start 4", "--warmup 4"]
    assert train.never_reached(replace(off, w_aff=1, affinity_start=3)) == []


def test_a_run_at_its_end_has_nothing_left_to_do(whole, monkeypatch, capsys, tmp_path):
    shutil.copytree(whole, out := tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(monkeypatch, out=out, resume=True) == 0
    said = capsys.readouterr().out
    assert f"the run in {out} is at its end, step 8: nothing is left to do" in said and "wrote" not in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_learning_rate_of_each_step_is_logged(whole):
    rates = [line["lr"] for line in logged(whole)]
    assert rates[0] == pytest.approx(2e-9)
    assert rates[2:] == pytest.approx([2e-3 * (1 - step / 8) ** 0.9 for step in range(2, 8)])


def test_weights_know_their_network_and_what_they_scored(whole):
    trained = load_weights(whole / "best.safetensors")
    assert trained.classes == CLASSES and trained.config.steps == 8 and not trained.model.training
    scores = {line["step"]: line["seg_miou"] for line in logged(whole, "val")}
    assert trained.facts["scores"]["seg_miou"] == scores[trained.facts["step"]] == max(scores.values())
    state = torch.load(whole / "checkpoint-00000008.pt", weights_only=True)["model"]
    ours = load_file(whole / "last.safetensors")
    assert all(torch.equal(state[f"model.{name}"], ours[name]) for name in ours)


def test_it_trains_what_the_quickstart_trains(monkeypatch, tmp_path):
    import quickstart

    config = quickstart.configure(quickstart.Settings(steps=5))
    trainer = quickstart.build(config, make_scenes("train", 16, 64))
    quickstart.train(trainer, "FFR", Console(quiet=True))
    code = run(
        monkeypatch, out=tmp_path / "run", steps=5, batch_size=config.batch_size, warmup=1, seg_start=2,
        affinity_start=2, val_every=0,
    )  # fmt: skip
    ours = load_weights(tmp_path / "run" / "last.safetensors").model.state_dict()
    assert code == 0
    assert all(torch.equal(ours[name], value) for name, value in trainer.model.state_dict().items())


def test_a_step_in_parts_is_the_step_where_nothing_is_normalised_over_the_batch(monkeypatch, tmp_path):
    off = {
        "steps": 3,
        "seg_start": 9,
        "affinity_start": 9,
        "model": "vit_tiny_patch16_224",
        "clip": 0.0,
        "val_every": 0,
    }
    for parts in (1, 2):
        assert run(monkeypatch, out=tmp_path / str(parts), accumulate=parts, **off) == 0
    one, two = (load_file(tmp_path / parts / "last.safetensors") for parts in "12")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    terms = [logged(tmp_path / parts) for parts in "12"]
    assert [line["cls"] for line in terms[0]] == pytest.approx([line["cls"] for line in terms[1]], rel=1e-4)


def test_a_prepared_folder_is_trained_on_with_workers_and_without(monkeypatch, tmp_path):
    data = make_folder(tmp_path / "data")
    small = {"model": "small", "pretrained": False, "crop": 64, "hidden": 64, "dilation": 2, "cam_scales": (1.0,)}
    small |= {"steps": 4, "seg_start": 1, "affinity_start": 1, "high": 0.3, "low": 0.1, "w_reg": 0.05}
    for workers in (0, 2):
        assert run(monkeypatch, "folder", data=data, out=tmp_path / str(workers), workers=workers, **small) == 0
    assert same_weights(tmp_path / "0" / "last.safetensors", tmp_path / "2" / "last.safetensors")
    assert logged(tmp_path / "0")[-1]["energy"] != 0
    assert logged(tmp_path / "0", "val")[-1]["images"]["segmentation"] == 5


def test_without_ffr_neither_its_head_nor_its_rectification_counts(monkeypatch, tmp_path):
    assert run(monkeypatch, out=tmp_path / "run", lambda_h=0.0, lambda_l=0.0, val_every=0) == 0
    last = logged(tmp_path / "run")[-1]
    assert last["seg_high"] == last["rect"] == 0 < last["seg"]


# Stopped and gone on ----------------------------------------------------------------------------------------------


def signalled(monkeypatch, at, number):
    """The signal comes when that step is logged."""
    write = train.Log.write

    def interrupted(self, step, kind, values):
        write(self, step, kind, values)
        if (step, kind) == (at, "train"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Log, "write", interrupted)


@pytest.mark.parametrize(
    ("number", "code", "at"), [(signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 2)]
)  # before a start
def test_a_signal_ends_the_step_saves_it_and_the_rest_is_the_same(
    number, code, at, whole, monkeypatch, tmp_path, capsys
):
    out, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        signalled(patch, at, number)
        assert run(patch, out=out) == code
    assert f"interrupted after step {at}, which is saved" in capsys.readouterr().out
    assert checkpoint.checkpoints(out)[0].name == f"checkpoint-0000000{at}.pt"
    assert signal.getsignal(number) == handler
    assert run(monkeypatch, out=out, resume=True) == 0
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")
    assert same_weights(out / "best.safetensors", whole / "best.safetensors")
    terms = [[{**line, "images_per_second": 0, "waiting": 0} for line in logged(each)] for each in (out, whole)]
    assert terms[0] == terms[1]
    assert [line["step"] for line in logged(out, "run")] == [0, at]


def test_a_second_interruption_ends_the_run_at_once_and_a_second_end_by_a_scheduler_does_not():
    with train.interruptible() as got:
        try:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # which would end the tests
            pytest.fail("the second one ended it")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert got == [signal.SIGTERM] * 2


def test_a_signal_in_the_last_step_comes_too_late_to_leave_anything_out(monkeypatch, tmp_path):
    signalled(monkeypatch, 2, signal.SIGTERM)
    assert run(monkeypatch, out=tmp_path, steps=2, val_every=0) == 0
    assert [line["step"] for line in logged(tmp_path, "val")] == [2]


@pytest.mark.parametrize("at", [4, 8])
@pytest.mark.parametrize("cut_off", ["before its scores", "before they are in the checkpoint"])
def test_a_run_cut_off_in_a_validation_makes_it_up_when_it_goes_on(cut_off, at, whole, monkeypatch, tmp_path):
    out, save, validate = tmp_path / "run", train.Run.save, train.Run.validate

    def scored(self, done):
        if done == at:
            raise KeyboardInterrupt
        validate(self, done)

    def saved(self, done):
        if done == at and not self.owed:
            raise KeyboardInterrupt
        save(self, done)

    with monkeypatch.context() as patch:
        if cut_off == "before its scores":
            patch.setattr(train.Run, "validate", scored)
        else:
            patch.setattr(train.Run, "save", saved)
        assert run(patch, out=out) == 130
    assert checkpoint.checkpoints(out)[0].name == f"checkpoint-0000000{at}.pt"
    assert run(monkeypatch, out=out, resume=True) == 0
    for kind in ("val", "high_band_share"):
        assert logged(out, kind) == logged(whole, kind)
    for name in ("best.safetensors", "last.safetensors"):
        assert same_weights(out / name, whole / name)


def test_an_owed_validation_is_dropped_where_there_is_none_any_more(whole, monkeypatch, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    content = torch.load(out / "checkpoint-00000008.pt", weights_only=True)
    torch.save({**content, "owed": True}, out / "checkpoint-00000008.pt")
    assert run(monkeypatch, out=out, resume=True, val_split=None) == 0
    assert logged(out, "val") == logged(whole, "val")


def test_an_output_whose_name_is_too_long_is_refused_by_its_flag(monkeypatch, tmp_path, capsys):
    out = tmp_path / ("x" * 300)
    assert run(monkeypatch, out=out) == 2
    assert f"train: --out: cannot write to {out} (File name too long). Name another" in capsys.readouterr().err


def test_ranks_wait_until_a_checkpoint_is_there(monkeypatch, tmp_path):
    """A launcher ends all of them half a minute after the first."""
    seen = []

    def wait(self):
        seen.append([path.name[-6:-3] for path in checkpoint.checkpoints(tmp_path / "run")[:1]])

    monkeypatch.setattr(train.Accelerator, "wait_for_everyone", wait)
    assert run(monkeypatch, out=tmp_path / "run", val_every=0) == 0
    assert seen == [[], ["002"], ["004"], ["006"], ["008"], ["008"]]  # the last twice, for its validation


def test_log_lines_after_the_checkpoint_are_dropped_when_a_run_goes_on(whole, monkeypatch, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoint-00000008.pt").unlink()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "kind": "tr')  # a kill in the middle of a line
    assert run(monkeypatch, out=out, resume=True) == 0
    assert [line["step"] for line in logged(out)] == list(range(1, 9))
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")


def test_a_new_run_does_not_touch_an_old_one(whole, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run(monkeypatch, out=whole) == 2
    assert "--out: " in (said := capsys.readouterr().err) and "holds a run" in said and "--resume" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-3}, r"--lr was 0.002, now 0.001"),
        ({"hidden": 32}, r"--hidden was 64, now 32"),
        ({"model": "vit_tiny_patch16_224"}, r"--model was small, now vit_tiny_patch16_224"),
        ({"lambda_h": 0.0, "seed": 3}, r"--lambda-h was 2.0, now 0.0; --seed was 0, now 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_its_flags(settings, message, whole, monkeypatch, capsys, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    assert run(monkeypatch, out=out, resume=True, **settings) == 2
    assert re.search(message, capsys.readouterr().err)
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")


def test_only_what_decides_nothing_that_is_learnt_may_differ_when_a_run_goes_on(whole):
    content = torch.load(whole / "checkpoint-00000008.pt", weights_only=True)
    config, refused = Config.from_json(json.loads(content["config"])), set()
    for name in (field.name for field in fields(Config)):
        try:
            checkpoint.load_checkpoint(whole, replace(config, **{name: "other"}), same={})
        except ValueError:
            refused.add(name)
    assert {field.name for field in fields(Config)} - refused == {
        "resume", "out", "data", "workers", "device", "compile", "fsdp", "grad_checkpointing",
        "log_every", "val_every", "val_images", "val_split", "save_every", "cam_threshold",
    }  # fmt: skip


TINY = {
    "model": "vit_tiny_patch16_224", "crop": 64, "hidden": 64, "dilation": 2, "cam_scales": (1.0,), "steps": 2,
    "seg_start": 9, "affinity_start": 9, "val_every": 0, "save_every": 1,
}  # fmt: skip


def test_a_run_goes_on_where_nobody_reads_what_it_prints(tmp_path):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "examples")!r})
        from recipe.progress import Screen, progress
        screen = Screen()
        bar, report = progress(screen, "train", 3000)
        with bar:
            for step in range(1, 3001):
                screen.print("x" * 99)
                report(step, {{"total": 1.0}})
        open({str(tmp_path / "done")!r}, "w").close()
    """
    read, write = os.pipe()
    os.close(read)
    made = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (made.returncode, made.stderr) == (0, b"") and (tmp_path / "done").exists()


def offline(*args, pretrained, **kwargs):
    """timm.create_model without a network: the hub's LocalEntryNotFoundError is a FileNotFoundError."""
    if pretrained:
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub. Please check ...")
    return CREATE(*args, pretrained=pretrained, **kwargs)


def test_a_run_goes_on_without_the_weights_that_it_started_from(monkeypatch, capsys, tmp_path):
    out, start = tmp_path / "run", tmp_path / "start.pth"
    torch.save(CREATE("vit_tiny_patch16_224").state_dict(), start)
    assert run(monkeypatch, out=out, checkpoint=start, **TINY) == 0
    start.unlink()
    (out / "checkpoint-00000002.pt").unlink()
    whole = load_file(out / "last.safetensors")
    assert run(monkeypatch, out=out, checkpoint=start, resume=True, workers=1, **TINY) == 0
    ours = load_file(out / "last.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert [line["config"]["checkpoint"] for line in logged(out, "run")] == [str(start)] * 2
    assert load_weights(out / "last.safetensors").config.checkpoint == start


def test_a_run_goes_on_without_a_network(monkeypatch, capsys, tmp_path):
    def downloaded(*args, pretrained, **kwargs):
        return CREATE(*args, pretrained=False, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("timm.create_model", downloaded)
        assert run(patch, out=out, pretrained=True, **TINY) == 0
    (out / "checkpoint-00000002.pt").unlink()
    whole = load_file(out / "last.safetensors")
    monkeypatch.setattr("timm.create_model", offline)
    assert run(monkeypatch, out=out, pretrained=True, resume=True, **TINY) == 0
    ours = load_file(out / "last.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert load_weights(out / "last.safetensors").config.pretrained
    monkeypatch.setattr(train, "Trainer", None)  # refused before anything is built
    assert run(monkeypatch, out=out, pretrained=True, resume=True, **{**TINY, "lr": 1.0}) == 2
    assert "--lr was 0.002, now 1.0" in capsys.readouterr().err


def test_other_images_are_another_run(monkeypatch, tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    small = {"model": "small", "pretrained": False, "crop": 64, "hidden": 64, "dilation": 2, "steps": 2, "val_every": 0}
    small |= {"data": data, "out": tmp_path / "run", "seg_start": 9, "affinity_start": 9, "workers": 0}
    assert run(monkeypatch, "folder", **small) == 0
    split = read_split(data, "train")
    for items in (split.items[1:], (split.items[0]._replace(labels=()), *split.items[1:])):  # or other labels
        write_split(data, "train", split.classes, items)
        assert run(monkeypatch, "folder", resume=True, **small) == 2
        assert "the samples are others" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(Bomb.path),))


def test_a_broken_or_foreign_checkpoint_is_refused_and_never_executed(whole, monkeypatch, capsys, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    path = out / "checkpoint-00000008.pt"
    good = path.read_bytes()
    Bomb.path = str(tmp_path / "executed")
    for content in (good[: len(good) // 2], b"", b"no checkpoint", pickle.dumps(Bomb())):
        path.write_bytes(content)
        assert run(monkeypatch, out=out, resume=True) == 2
        said = capsys.readouterr().err
        assert "checkpoint-00000008.pt" in said and "checkpoint-00000006.pt" in said, content[:9]
    torch.save({"step": 8, "config": SCENES.to_text(), "bomb": Bomb()}, path)
    assert run(monkeypatch, out=out, resume=True) == 2
    assert not (tmp_path / "executed").exists()
    older = (out / "checkpoint-00000006.pt").rename(tmp_path / "older.pt")
    assert run(monkeypatch, out=out, resume=True) == 2
    assert "Start anew in another folder" in capsys.readouterr().err
    older.rename(out / "checkpoint-00000006.pt")
    path.unlink()
    assert run(monkeypatch, out=out, resume=True) == 0  # the older one is as good
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")


def test_there_is_nothing_to_go_on_from(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, out=tmp_path / "run", resume=True) == 2
    assert "--resume: there is no checkpoint in" in capsys.readouterr().err


def test_files_of_other_kinds_in_the_folder_are_neither_taken_nor_touched(whole, monkeypatch, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    mine = [out / name for name in ("checkpoint-best.pt", "checkpoint-zzz.pt", ".mine.pt", ".a.b.jsonl", ".writable")]
    for path in mine:
        path.write_text("mine")
    torn = out / ".checkpoint-00000006.ab12_xyz.pt"  # what a kill leaves
    torn.write_text("half")
    (out / "checkpoint-00000008.pt").unlink()
    assert run(monkeypatch, out=out, resume=True) == 0
    assert all(path.read_text() == "mine" for path in mine) and not torn.exists()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-00000008.pt", "checkpoint-00000006.pt"]
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_weights_alone_are_not_overwritten_and_a_log_alone_is_no_run(name, monkeypatch, capsys, tmp_path):
    (tmp_path / name).write_text("mine")
    assert run(monkeypatch, out=tmp_path) == 2
    assert "holds a run" in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
    (tmp_path / name).rename(tmp_path / "log.jsonl")  # killed before its first checkpoint
    assert run(monkeypatch, out=tmp_path, steps=1, val_every=0) == 0


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_is_writing_to_is_left_to_it(
    resume, whole, monkeypatch, capsys, tmp_path, held_by_another
):
    if resume:
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".checkpoint-00000008.abcdefgh.pt").write_text("half")  # which it is writing
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with held_by_another(tmp_path):
        assert run(monkeypatch, out=tmp_path, resume=resume) == 2
        assert f"--out: another run is writing to {tmp_path}. Wait for its end" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    assert (tmp_path / ".lock").exists()  # of a run that was killed: no obstacle
    assert run(monkeypatch, out=tmp_path, resume=resume, val_every=0) == 0
    assert not list(tmp_path.glob(".*"))


def test_a_run_cut_off_between_its_last_two_files_lacks_neither(whole, monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        save = train.save_checkpoint
        patch.setattr(
            train, "save_checkpoint", lambda out, step, *rest: full() if step == 8 else save(out, step, *rest)
        )
        assert run(patch, out=tmp_path) == 2
    assert same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")
    assert checkpoint.checkpoints(tmp_path)[0].name == "checkpoint-00000006.pt"
    assert run(monkeypatch, out=tmp_path, resume=True) == 0
    assert same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")


def test_the_best_of_other_validation_images_is_forgotten(whole, monkeypatch, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "checkpoint-00000008.pt").unlink()
    content = torch.load(out / "checkpoint-00000006.pt", weights_only=True)
    torch.save({**content, "best": 99.0}, out / "checkpoint-00000006.pt")
    same = {path: shutil.copytree(out, tmp_path / path) for path in ("kept", "other")}
    before = (out / "best.safetensors").read_bytes()
    assert run(monkeypatch, out=same["kept"], resume=True) == 0
    assert (same["kept"] / "best.safetensors").read_bytes() == before
    assert run(monkeypatch, out=same["other"], resume=True, val_images=2) == 0
    assert load_weights(same["other"] / "best.safetensors").facts["step"] == 8


# What goes wrong --------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, at):
    """The classifier's weight is NaN from that step on."""
    build = train.Trainer

    def make(*args):
        trainer = build(*args)
        forward = trainer.wrapped.forward

        def hurt(images, labels, *, step, max_present):
            if step == at:
                with torch.no_grad():
                    trainer.model.classifier.weight.fill_(math.nan)
            return forward(images, labels, step=step, max_present=max_present)

        trainer.wrapped.forward = hurt
        return trainer

    monkeypatch.setattr(train, "Trainer", make)


def test_weights_that_are_not_finite_are_never_a_checkpoint(monkeypatch, capsys, tmp_path):
    step = torch.optim.AdamW.step

    def hurt(self, *arguments, **named):
        step(self, *arguments, **named)
        for state in self.state.values():
            if state["step"] == 5:
                state["exp_avg"].fill_(math.inf)  # no loss sees it before the next step

    monkeypatch.setattr(torch.optim.AdamW, "step", hurt)
    assert run(monkeypatch, out=tmp_path, log_every=8, val_every=0, seg_start=9, affinity_start=9, save_every=3) == 3
    assert "is not finite" in capsys.readouterr().err
    for path in checkpoint.checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["model"].values())
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-00000003.pt"]


@pytest.fixture
def fp16_from(monkeypatch):
    """A function of the first scale. On a CPU fp16 is refused as too slow; its autocast and its scaler work there."""
    place = train.place

    def start(scale):
        def placed(config):
            AcceleratorState._reset_state()
            accelerator = place(replace(config, precision="fp32"))
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
            return accelerator

        monkeypatch.setattr(train, "place", placed)

    yield start
    AcceleratorState._reset_state()


def test_fp16_with_its_scaler_trains_and_goes_on_where_it_was(fp16_from, monkeypatch, tmp_path):
    fp16_from(65536.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(monkeypatch, out=whole, precision="fp16", clip=1.0) == 0
    scales = [line["loss_scale"] for line in logged(whole)]  # as they were when the step began
    assert scales == [65536.0] * 3 + [131072.0] * 3 + [262144.0] * 2
    shutil.copytree(whole, parts)
    for late in ("checkpoint-00000008.pt", "last.safetensors", "best.safetensors"):
        (parts / late).unlink()
    assert run(monkeypatch, out=parts, precision="fp16", clip=1.0, resume=True) == 0
    assert [line["loss_scale"] for line in logged(parts)] == scales
    assert same_weights(parts / "last.safetensors", whole / "last.safetensors")


def test_a_step_of_fp16_that_overflows_moves_no_weight_and_halves_the_scale(fp16_from, monkeypatch, tmp_path):
    fp16_from(2.0**100)
    assert run(monkeypatch, out=tmp_path / "run", precision="fp16", steps=2, warmup=0, save_every=1, seg_start=0) == 0
    assert [line["loss_scale"] for line in logged(tmp_path / "run")] == [2.0**100, 2.0**99]
    first, last = (torch.load(path, weights_only=True) for path in sorted(checkpoint.checkpoints(tmp_path / "run")))
    assert (first["step"], last["step"]) == (1, 2)
    moments = last["optimizer"]["state"]  # of every parameter; batch norm has moved on
    assert not any(moment["exp_avg"].any() for moment in moments.values())
    assert all(torch.equal(first["model"][name], last["model"][name]) for name in moments)


def test_fp16_whose_gradients_are_finite_at_no_scale_stops_the_run(monkeypatch, capsys, tmp_path):
    scales = iter((65536.0, 2.0, 0.5))

    class Scaled(Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.accelerator.scaler = SimpleNamespace(scale=lambda loss: loss, get_scale=lambda: next(scales))

    monkeypatch.setattr(train, "Trainer", Scaled)
    assert run(monkeypatch, out=tmp_path / "run", save_every=0) == 3
    assert "step 2: no gradient of fp16 is finite" in capsys.readouterr().err
    assert [line["loss_scale"] for line in logged(tmp_path / "run")] == [65536.0, 2.0]
    assert torch.load(tmp_path / "run" / "diverged.pt", weights_only=True)["term"] == "loss_scale"


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_term_that_is_not_finite_stops_the_run_and_leaves_the_evidence(log_every, monkeypatch, capsys, tmp_path):
    poisoned(monkeypatch, at=5)
    assert run(monkeypatch, out=tmp_path, log_every=log_every, val_every=0, save_every=4) == 3
    said = capsys.readouterr().err
    assert "step 5: the loss term `cls` is not finite" in said and "diverged.pt" in said
    kept = torch.load(tmp_path / "diverged.pt", weights_only=True)
    assert (kept["step"], kept["term"], kept["samples"]) == (5, "cls", [20, 21, 22, 23])
    assert kept["images"][1] == "scene 1 of step 5" and math.isnan(kept["values"]["total"])
    assert kept["model"]["classifier.weight"].isnan().all()
    finite = all(value.isfinite().all() for name, value in kept["model"].items() if name.startswith("encoder"))
    assert finite == (log_every == 1)  # seen before the step, or two steps later
    assert checkpoint.checkpoints(tmp_path)[0].name in said


def test_a_failing_write_keeps_the_checkpoints_that_are_there(whole, monkeypatch, capsys, tmp_path):
    save = torch.save

    def full(content, path):
        if content["step"] < 6:
            return save(content, path)
        Path(path).write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run(monkeypatch, out=tmp_path) == 2
    said = capsys.readouterr().err
    assert "cannot write" in said and "checkpoint-00000006.pt" in said and "No space left" in said
    assert "--resume; good ones: checkpoint-00000004.pt, checkpoint-00000002.pt" in said
    assert sorted(p.name for p in tmp_path.glob("*check*")) == ["checkpoint-00000002.pt", "checkpoint-00000004.pt"]
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(torch, "save", save)
    assert run(monkeypatch, out=tmp_path, resume=True) == 0
    assert same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")


def test_a_full_disk_names_the_log(tmp_path):
    class Full(io.StringIO):
        name = "run/log.jsonl"

        def write(self, text):
            raise OSError(28, "No space left on device")

    log = train.Log(tmp_path, 0)
    log.close()
    log.file = Full()
    with pytest.raises(OSError, match=r"No space left on device: 'run/log\.jsonl'"):
        log.write(1, "train", {"total": 1.0})


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_on_the_way_is_named_and_the_steps_before_are_kept(workers, monkeypatch, capsys, tmp_path):
    data = make_folder(tmp_path / "data")
    images = TrainImages(read_split(data, "train"), 64, 0)
    hurt = images.item(9).image  # step 2
    hurt.write_bytes(hurt.read_bytes()[:300])
    out = tmp_path / "run"
    small = {"model": "small", "pretrained": False, "crop": 64, "hidden": 64, "dilation": 2, "workers": workers}
    small |= {"seg_start": 9, "affinity_start": 9, "save_every": 0, "steps": 3, "val_every": 0, "w_aff": 0.0}
    assert run(monkeypatch, "folder", data=data, out=out, **small) == 2
    said = capsys.readouterr().err
    assert hurt.name in said and said.count("\n") == 1
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-00000002.pt"]


def test_a_run_that_breaks_before_its_first_step_leaves_no_checkpoint(monkeypatch, tmp_path):
    data, out = make_folder(tmp_path / "data"), tmp_path / "run"
    TrainImages(read_split(data, "train"), 64, 0).item(0).image.write_bytes(b"half")
    assert run(monkeypatch, "folder", data=data, out=out, workers=0, model="small", pretrained=False, crop=64) == 2
    assert not checkpoint.checkpoints(out) and not list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "--device: torch sees no GPU here"),
        ({"device": "auto", "precision": "bf16"}, "--precision: bf16 is for a GPU, and torch sees none here"),
        ({"precision": "fp16"}, "--precision: fp16 needs a GPU"),
        ({"fsdp": True}, "--fsdp: there is one rank alone"),
        ({"data": Path("no/such/folder")}, r"there is no no/such/folder/train.json"),
        ({"model": "vit_tiny_patch17_224"}, "timm knows no model 'vit_tiny_patch17_224'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_this_machine_or_folder_lacks_is_said_by_flag(settings, message, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, out=tmp_path / "run", **settings) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_crop_below_a_patch_is_refused_by_its_flag():
    tiny = replace(VOC, pretrained=False, **TINY)
    with pytest.raises(ValueError, match="--crop: expected 16 or more, a patch of the network, got 15"):
        build_model(replace(tiny, crop=15), 2)
    assert build_model(replace(tiny, crop=16), 2).encoder.patch_size == 16


@pytest.mark.parametrize("preset", [SCENES, replace(VOC, pretrained=False, **TINY)])
def test_the_settings_of_the_network_reach_it(preset):
    model = build_model(replace(preset, mu=0.25, hidden=96, dilation=3), 2)
    assert model.frequency.mu == 0.25
    assert (model.head.phi_0.out_channels, model.head.phi_0.dilation) == (96, (3, 3))


def test_the_encoder_of_a_run_has_its_intermediate_block_and_the_positions_of_its_crop():
    encoder = build_model(replace(VOC, pretrained=False, **TINY, intermediate=-2), 2).encoder
    assert encoder.intermediate == -2
    assert encoder.model.pos_embed.shape[1] == 1 + (64 // 16) ** 2


def test_the_small_network_is_four_blocks_near_the_identity_on_tokens_of_four_pixels():
    encoder = build_model(SCENES, 2).encoder
    assert encoder.patch_size == 4 and len(encoder.model.blocks) == 4 and encoder.model.num_prefix_tokens == 0
    for block in encoder.model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim) == (2, 32)
        assert block.ls1.gamma.unique().tolist() == block.ls2.gamma.unique().tolist() == pytest.approx([0.01])
    with pytest.raises(ValueError, match="ConvStem: expected a patch size of 4"):
        ConvStem(img_size=64, patch_size=8)


def test_checkpointing_of_gradients_is_switched_on_where_it_is_asked_for():
    for asked in (True, False):
        model = build_model(replace(VOC, pretrained=False, grad_checkpointing=asked, **TINY), 2)
        assert model.encoder.model.grad_checkpointing is asked


def test_weights_to_start_from_that_cannot_be_had_are_said_by_flag(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("timm.create_model", offline)
    assert run(monkeypatch, out=tmp_path / "run", pretrained=True, **TINY) == 2
    said = capsys.readouterr().err
    assert re.search(r"train: --pretrained: cannot download timm's weights of vit_tiny_patch16_224 \(An error h", said)
    assert "Use --no-pretrained, with --checkpoint FILE" in said
    for name, content in (("nope.pth", None), ("empty.pth", b""), ("half.pth", b"PK\3\4half"), ("x.safetensors", b"x")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert run(monkeypatch, out=tmp_path / "run", checkpoint=tmp_path / name, **TINY) == 2
        said = capsys.readouterr().err
        assert re.match(rf"train: --checkpoint: cannot read {tmp_path / name} \(.+\)\.\n$", said), said
        assert said.count(name) == 1


def test_output_that_cannot_be_written_is_refused_before_anything_is_built(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(monkeypatch, out=out) == 2
        assert re.search("--out: (expected a folder|cannot write)", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("ranks", "accumulate"), [(3, 1), (2, 4), (8, 1)])
def test_a_batch_that_the_ranks_cannot_share_is_refused(ranks, accumulate):
    config = replace(SCENES, batch_size=4, accumulate=accumulate)
    with pytest.raises(ValueError, match=rf"--batch-size: .*= {ranks} x {accumulate}, got 4"):
        Trainer(config, None, 3, SimpleNamespace(process_index=0, num_processes=ranks))


def test_validation_with_other_classes_is_refused(monkeypatch, capsys, tmp_path):
    data = make_folder(tmp_path / "data")
    split = read_split(data, "val")
    write_split(data, "val", [*split.classes[:-1], "another"], split.items)
    assert run(monkeypatch, "folder", data=data, out=tmp_path / "run", model="small", pretrained=False) == 2
    assert "--val-split: val has other classes than train" in capsys.readouterr().err


def test_a_broken_image_of_the_validation_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    data = make_folder(tmp_path / "data")
    read_split(data, "val").items[1].mask.write_bytes(b"")
    small = {"model": "small", "pretrained": False, "crop": 64, "hidden": 64, "steps": 1, "seg_start": 9, "w_aff": 0.0}
    assert run(monkeypatch, "folder", data=data, out=tmp_path / "run", workers=0, **small) == 0
    assert "left out: 1 images whose files are broken; the first, val1: " in capsys.readouterr().out
    assert logged(tmp_path / "run", "val")[0]["images"]["segmentation"] == 4


def test_a_split_without_masks_is_refused_before_the_first_step_and_not_needed(monkeypatch, capsys, tmp_path):
    data = make_folder(tmp_path / "data")
    split = read_split(data, "val")
    write_split(data, "val", split.classes, [item._replace(mask=None) for item in split.items])
    small = {"model": "small", "pretrained": False, "crop": 64, "hidden": 64, "steps": 1, "seg_start": 9, "w_aff": 0.0}
    assert run(monkeypatch, "folder", data=data, out=tmp_path / "run", workers=0, **small) == 2
    assert "--val-split: no image of val has a mask. Add --val-split None" in capsys.readouterr().err
    (data / "val.json").unlink()
    assert run(monkeypatch, "folder", data=data, out=tmp_path / "run", workers=0, **small) == 2
    said = capsys.readouterr().err
    assert f"--val-split: there is no {data / 'val.json'}. Name another list, or add --val-split None" in said
    assert not checkpoint.checkpoints(tmp_path / "run")
    assert run(monkeypatch, "folder", data=data, out=tmp_path / "run", workers=0, val_split=None, **small) == 0


# Weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_another_model_are_refused_by_the_names_that_do_not_fit(whole, tmp_path):
    trained = load_weights(whole / "last.safetensors")
    state = trained.model.state_dict()
    weight = state.pop("classifier.weight")
    state |= {"classifier.weights": weight, "intermediate_classifier.weight": weight[:3].clone()}
    message = (
        r"--weights: x is of another model: it lacks classifier\.weight; has unknown classifier\.weights; "
        r"has another shape of intermediate_classifier\.weight\. Check --model"
    )
    with pytest.raises(ValueError, match=message):
        fill(trained.model, state, "--weights: x")
    save_weights(tmp_path / "odd.safetensors", state, trained.config, trained.classes)
    with pytest.raises(ValueError, match=r"--weights: .*odd.safetensors is of another model"):
        load_weights(tmp_path / "odd.safetensors")


def test_files_that_are_no_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    Bomb.path = str(tmp_path / "executed")
    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for name, message in (("torn", "cannot read {}"), ("bomb", "cannot read {}"), ("foreign", "{} does not say what")):
        with pytest.raises(ValueError, match="--weights: " + message.format(rf".*{name}\.safetensors")):
            load_weights(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "executed").exists()


# Many ranks, many kills -------------------------------------------------------------------------------------------

# Pixels between two labels may fall either way, where sums are taken in another order; the heads learn slowly here, so
# that one pixel stays below the bound.
RANKED = {
    "model": "vit_tiny_patch16_224", "pretrained": False, "crop": 64, "hidden": 32, "steps": 20, "warmup": 5,
    "seg_start": 10, "affinity_start": 3, "high": 0.5, "low": 0.3, "affinity_high": 0.5, "affinity_low": 0.3,
    "val_every": 10, "save_every": 10, "workers": 0, "lr": 6e-5, "head_scale": 2.0,
}  # fmt: skip


def launched(ranks, port, **settings):
    """As a user would with torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(port),
    ]
    command += [str(ROOT / "examples" / "train.py"), "folder", *flags(**{**FEW, **RANKED, **settings})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    data = make_folder(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "folder", data=data, out=folder / "one", **RANKED) == 0
    return data, folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_train_and_score_what_one_does(fsdp, one_rank, tmp_path):
    data, one = one_rank
    done = launched(2, 29611 + fsdp, data=data, out=tmp_path / "two", fsdp=fsdp)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = logged(one), logged(tmp_path / "two")
    assert len(mine) == len(theirs) == 20
    for a, b in zip(mine, theirs, strict=True):
        for name in ("total", "cls", "cls_inter", "seg", "seg_high", "rect", "aff", "energy", "lr"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
        for name in ("ignored", "foreground"):  # a pixel between two labels may fall either way
            assert a[name] == pytest.approx(b[name], abs=1e-3), (a["step"], name)
    assert all(mine[-1][name] != 0 for name in ("seg", "seg_high", "rect", "aff", "energy"))
    one_state, two_state = load_file(one / "last.safetensors"), load_file(tmp_path / "two" / "last.safetensors")
    for name, value in one_state.items():
        assert (value - two_state[name]).abs().max() <= 1e-5, name
    for a, b in zip(logged(one, "val"), logged(tmp_path / "two", "val"), strict=True):
        assert a["images"] == b["images"]
        for name in ("seg_miou", "cam_miou", "cam_inter_miou", "classification_map"):  # of weights 1e-6 apart
            assert a[name] == pytest.approx(b[name], abs=0.5)
    before = torch.load(one / "checkpoint-00000010.pt", weights_only=True)["model"]["model.classifier.weight"]
    assert (one_state["classifier.weight"] - before).abs().max() > 1e-4  # it moves far more than that


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_go_on_from_the_checkpoint_of_one(fsdp, one_rank, tmp_path):
    data, one = one_rank
    out = shutil.copytree(one, tmp_path / "run")
    (out / "checkpoint-00000020.pt").unlink()
    done = launched(2, 29615 + fsdp, data=data, out=out, resume=True, fsdp=fsdp)
    assert done.returncode == 0, done.stderr[-3000:]
    one_state, two_state = load_file(one / "last.safetensors"), load_file(out / "last.safetensors")
    assert max(float((one_state[name] - two_state[name]).abs().max()) for name in one_state) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_compute_a_step_in_parts_as_one_does(fsdp, one_rank, monkeypatch, tmp_path):
    parts = {**RANKED, "data": one_rank[0], "accumulate": 2, "steps": 12, "val_every": 0, "val_split": None}
    assert run(monkeypatch, "folder", out=tmp_path / "one", **parts) == 0
    done = launched(2, 29617 + fsdp, out=tmp_path / "two", fsdp=fsdp, **parts)
    assert done.returncode == 0, done.stderr[-3000:]
    one_state, two_state = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert max(float((one_state[name] - two_state[name]).abs().max()) for name in one_state) <= 1e-5
    whole = load_file(one_rank[1] / "last.safetensors")
    assert (whole["classifier.weight"] - one_state["classifier.weight"]).abs().max() > 1e-4


@pytest.mark.slow
def test_a_batch_that_two_ranks_cannot_share_is_refused_once(one_rank, tmp_path):
    done = launched(2, 29614, data=one_rank[0], out=tmp_path / "run", batch_size=3)
    assert done.returncode != 0
    assert "--batch-size: expected a multiple of ranks x --accumulate = 2 x 1, got 3" in done.stderr


@pytest.mark.slow
def test_compiled_it_trains_the_same(whole, monkeypatch, tmp_path):
    assert run(monkeypatch, out=tmp_path / "run", steps=8, compile=True) == 0
    for ours, theirs in zip(logged(tmp_path / "run"), logged(whole), strict=True):
        for name in ("total", "cls", "seg", "seg_high", "rect", "aff"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05, abs=1e-3), (ours["step"], name)
    assert load_file(tmp_path / "run" / "last.safetensors").keys() == load_file(whole / "last.safetensors").keys()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiled_the_refinement_keeps_its_kernel_where_there_may_be_one(device):
    one = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device))
    one.prepare_model = one.prepare_optimizer = lambda same: same
    trainer = Trainer(replace(SCENES, compile=True), None, 3, one)
    compiled = {part for part in trainer.objective.modules() if part._compiled_call_impl is not None}
    blocks = set(trainer.model.encoder.model.blocks)
    assert compiled == (blocks | {trainer.objective.refinement} if device == "cpu" else blocks)


LONG = {"steps": 60, "save_every": 2, "val_every": 0, "log_every": 5, "seg_start": 20, "affinity_start": 20}


def child(out, resume):
    """A whole run in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.argv = ["train.py", "scenes", *flags(**{**FEW, **LONG, "out": out, "resume": resume})]
    os._exit(train.main())


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    context = get_context("forkserver")  # children start with everything imported, and without threads
    context.set_forkserver_preload(["train", "test_train"])
    random_ = random.Random(0)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    process = context.Process(target=child, args=(straight, False))
    process.start()
    process.join()
    assert process.exitcode == 0
    kills = inside = 0
    code = None
    while code != 0:
        assert kills < 80, f"{kills} kills, {inside} of them inside a write"
        resume = bool(checkpoint.checkpoints(out)) if out.exists() else False
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        process = context.Process(target=child, args=(out, resume))
        process.start()
        if kills < 20 or inside < 5:
            until = time.monotonic() + random_.uniform(0.1, 1.5)
            in_write = kills % 2 == 0  # every other kill waits for a checkpoint that is being written
            while process.is_alive() and (in_write or time.monotonic() < until):
                if in_write and list(out.glob(".checkpoint-*")):
                    break
                time.sleep(0.0002)
            process.kill()
        process.join()
        code = process.exitcode
        if code != 0:
            assert code == -signal.SIGKILL
            kills += 1
            inside += bool(list(out.glob(".checkpoint-*")))
        for path in checkpoint.checkpoints(out):
            assert torch.load(path, weights_only=True)["step"] == int(path.stem[-8:])
        if code == 0 and (kills < 20 or inside < 5):  # it came to its end too early: once more, from the beginning
            assert same_weights(straight / "last.safetensors", out / "last.safetensors")
            shutil.rmtree(out)
            code = None
    print(f"{kills} kills, {inside} of them inside a checkpoint's write")
    assert kills >= 20 and inside >= 5
    assert same_weights(straight / "last.safetensors", out / "last.safetensors")
    assert not list(out.glob(".checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_ends_the_run_well_with_workers_too(number, tmp_path):
    """As a scheduler sends it, or Ctrl-C."""
    data, out = make_folder(tmp_path / "data"), tmp_path / "run"
    settings = {**FEW, **RANKED, "data": data, "out": out, "workers": 2, "steps": 5000, "val_every": 0}
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "folder", *flags(**settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        while process.poll() is None and not (out / "checkpoint-00000010.pt").exists():
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said, problem = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, problem
    done = int(re.search(r"interrupted after step (\d+), which is saved", said)[1])
    assert checkpoint.checkpoints(out)[0].name == f"checkpoint-{done:08d}.pt"


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_with_its_name_and_an_older_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: every byte beyond it fails as on a full one."""
    import resource

    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "scenes", *flags(**{**FEW, "out": out})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))  # a checkpoint has some 5 MB

    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        "cannot write" in done.stderr and "checkpoint-00000002.pt" in done.stderr and "good ones: none" in done.stderr
    )
    assert not list(out.glob("*checkpoint*"))
