"""Evaluation: the network at several scales, scores over a data set, and evaluate.py."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import evaluate as script
import numpy as np
import pytest
import torch
from PIL import Image
from recipe.config import PRESETS, SCENES
from recipe.data import EvalImages, Item, SceneExamples, Split, read_split, write_split
from recipe.evaluation import (
    CHOSEN,
    FIXED,
    Protocol,
    activate,
    evaluate,
    evaluate_all,
    look,
    refining,
    scales_of,
    segment,
)
from recipe.network import small_ffr
from recipe.scenes import CLASSES, make_scenes
from recipe.weights import Trained, save_weights
from rich.console import Console
from torch.nn import functional as F

from ffr import DenseCRF
from ffr.cam import multi_scale_cam
from ffr.draw import load_label, save_label
from ffr.metrics import BoundaryIoU

MULTI = Protocol(scales=(1.0, 1.25, 1.5), flip=True)
SIZES = [(40, 52), (40, 52), (33, 47), (40, 52), (7, 90), (61, 48), (40, 52), (33, 47), (64, 64), (33, 47), (40, 52)]


def network(classes=3, seed=0):
    """A small network whose every output depends on the image."""
    torch.manual_seed(seed)
    model = small_ffr(classes, 64, width=32, hidden=32)
    torch.nn.init.normal_(model.head.last.weight)
    for parameter in (model.classifier.weight, model.intermediate_classifier.weight):
        torch.nn.init.normal_(parameter)
    for block in model.encoder.model.blocks:
        torch.nn.init.ones_(block.ls1.gamma)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes with masks and labels; number 3 has no mask, number 5 no labels."""
    root, rng, items = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0), []
    for i, size in enumerate(SIZES):
        pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(root / f"{i}.png")
        mask = rng.integers(0, 4, (3, 4)).astype(np.uint8)
        mask[mask == 2] = 0 if i % 2 else 2  # a class that some images lack
        mask = np.array(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
        mask[:2] = 255
        save_label(root / f"{i}_mask.png", mask)
        labels = tuple(int(k) - 1 for k in np.unique(mask) if 0 < k < 255)
        mask_file = None if i == 3 else root / f"{i}_mask.png"
        items.append(Item(f"image_{i}", root / f"{i}.png", mask_file, None if i == 5 else labels))
    write_split(root, "val", ("a", "b", "c"), items)
    return EvalImages(read_split(root, "val"))


# The network at several scales ------------------------------------------------------------------------------------


def test_flip_pairs_are_summed_and_scales_are_a_maximum():
    model, image = network(), torch.rand(1, 3, 8, 12)
    seg = {1.0: torch.rand(2, 1, 4, 8, 12), 2.0: torch.rand(2, 1, 4, 8, 12)}
    views = look(model, image, {1.0: True, 2.0: True})
    views = {scale: view._replace(size=(8, 12), seg=seg[scale]) for scale, view in views.items()}
    made = segment(views, Protocol(scales=(1.0, 2.0), flip=True), (8, 12), 1)
    pairs = [maps[0, 0].numpy() + maps[1, 0].numpy()[..., ::-1] for maps in seg.values()]
    np.testing.assert_array_equal(made[0].numpy(), np.maximum(*pairs))
    alone = segment(views, Protocol(scales=(2.0,)), (8, 12), 1)
    np.testing.assert_array_equal(alone[0].numpy(), seg[2.0][0, 0].numpy())


@pytest.mark.parametrize("size", [(32, 40), (33, 47)])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0, 0.5, 1.5), True)])
def test_the_cams_are_those_of_the_training(size, scales, flip):
    model, images = network(), torch.rand(2, 3, *size)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    protocol = Protocol(scales=scales, flip=flip)
    views = look(model, images, scales_of([protocol, MULTI]))
    expected = multi_scale_cam(model.cams, images, scales=scales, flip=flip, labels=labels)
    for name, each in zip(("cam", "cam_inter"), expected, strict=True):
        torch.testing.assert_close(activate(views, name, protocol, size, 4, labels), each, rtol=1e-4, atol=1e-4)


def test_a_mirrored_image_gives_the_mirrored_scores():
    model, image = network(), torch.rand(1, 3, 33, 47)  # no whole number of patches: padding is on the other side
    scores = [segment(look(model, each, scales_of([MULTI])), MULTI, (33, 47), 4) for each in (image, image.flip(3))]
    torch.testing.assert_close(scores[0].flip(3), scores[1], rtol=1e-4, atol=1e-4)


# Scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, dataset, protocol):
    """All figures, image by image with numpy: it shares the network and the boundary IoU alone with what is tested."""
    classes = model.num_classes
    matrices = {name: np.zeros((classes + 1, classes + 1)) for name in ("seg", "cam", "cam_inter")}
    scores, truths, boundary = {"cam": [], "cam_inter": []}, [], BoundaryIoU(classes + 1)
    for index in range(len(dataset)):
        _, image, mask, labels = dataset[index]
        size = image.shape[1:]
        seg, cams, logits = [], {"cam": 0, "cam_inter": 0}, {"cam": [], "cam_inter": []}
        for scale in protocol.scales:
            side = [max(1, math.floor(float(length) * scale)) for length in size]
            pixels = F.interpolate(image[None] / 255, size=side, mode="bilinear", align_corners=False)
            pair = []
            for mirrored in (False, True)[: 1 + protocol.flip]:
                out = model.outputs(pixels.flip(3) if mirrored else pixels)
                grid = [4 * length for length in out.seg.shape[2:]]
                made = []
                for maps in (out.seg, out.cam, out.cam_inter):
                    if grid != side:  # padded: brought to its pixels and cut off, as in `FFR.cams`
                        maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
                        maps = maps[..., : side[0], : side[1]]
                    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].numpy()
                    made.append(maps[..., ::-1] if mirrored else maps)
                pair.append(made)
                logits["cam"].append(out.logits[0].numpy())
                logits["cam_inter"].append(out.logits_inter[0].numpy())
            seg.append(sum(made[0] for made in pair))
            for place, name in enumerate(cams, 1):
                cams[name] = cams[name] + np.maximum(0, np.max([made[place] for made in pair], axis=0))
        seg = np.max(seg, axis=0)
        if protocol.crf:
            probs = np.exp(seg - seg.max(0)) / np.exp(seg - seg.max(0)).sum(0)
            seg = DenseCRF()(image, torch.from_numpy(probs)).numpy()
        guesses = {"seg": seg.argmax(0)}
        for name, cam in cams.items():
            said = np.mean(logits[name], axis=0)
            if labels is not None:
                scores[name].append(said)
            present = said > 0 if protocol.labels == "predicted" else labels
            if present is None:
                continue
            flat = cam.reshape(classes, -1)
            low, high = flat.min(1), flat.max(1)
            cam = (cam - low[:, None, None]) / np.where(high > low, high - low, 1)[:, None, None]
            cam = cam * np.asarray(present, dtype=float)[:, None, None]
            guesses[name] = np.where(cam.max(0) > protocol.threshold, 1 + cam.argmax(0), 0)
        if labels is not None:
            truths.append(labels.numpy())
        if mask is not None:
            boundary.update(torch.from_numpy(guesses["seg"])[None], mask[None].long())
            for name, guess in guesses.items():
                for truth, said in zip(mask.numpy().ravel(), guess.ravel(), strict=True):
                    if truth != 255:
                        matrices[name][truth, said] += 1
    figures = {"boundary_iou": 100 * boundary.miou()}
    for name, matrix in matrices.items():
        both = np.diag(matrix)
        iou = both / (matrix.sum(0) + matrix.sum(1) - both)
        figures[f"{name}_miou"] = 100 * iou[matrix.sum(1) > 0].mean()
    for name, table in scores.items():
        figures["classification_map" + name[3:]] = 100 * np.mean(
            [precision(s, t) for s, t in zip(np.transpose(table), np.transpose(truths), strict=True) if t.any()]
        )
    return figures


def precision(scores, truth):
    ranked = truth[np.argsort(-scores, kind="stable")]
    return np.mean([ranked[: i + 1].mean() for i in range(len(ranked)) if ranked[i]])


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(threshold=0.405),  # the sweep has none of the kind
        Protocol(threshold=0.4, labels="predicted"),
        replace(MULTI, threshold=0.3),
        replace(MULTI, threshold=0.3, labels="predicted"),
    ],
)
def test_every_figure_is_that_of_the_loops(protocol, folder):
    model = network()
    result, expected = evaluate(model, folder, protocol, device="cpu"), by_hand(model, folder, protocol)
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=0.05), name  # a pixel may fall on the other side of a tie
    assert result["thresholds"]["cam"] == {"value": protocol.threshold, "source": FIXED}
    known = protocol.labels == "known"
    assert result["images"] == {
        "listed": 11, "looked_at": 11, "segmentation": 10, "cam": 9 if known else 10, "classification": 10,
    }  # fmt: skip


def test_with_the_crf_the_segmentation_is_that_of_the_loops_and_the_cam_has_no_figure(folder):
    model, protocol = network(), replace(MULTI, crf=True, threshold=0.3)
    few = EvalImages(Split(folder.split.classes, folder.split.items[:4]))
    result = evaluate(model, few, protocol, device="cpu")
    assert result["seg_miou"] == pytest.approx(by_hand(model, few, protocol)["seg_miou"], abs=0.05)
    assert result["seg_miou"] != evaluate(model, few, replace(protocol, crf=False), device="cpu")["seg_miou"]
    assert result["cam_miou"] is None and result["classification_map"] is None and result["images"]["cam"] is None


def test_the_crf_leaves_out_what_the_protocol_says(folder):
    few = EvalImages(Split(folder.split.classes, folder.split.items[:2]))
    all_out = evaluate(network(), few, Protocol(crf=True, crf_prune=1.0), device="cpu")["iou"]["seg"]
    assert all_out != evaluate(network(), few, Protocol(crf=True), device="cpu")["iou"]["seg"]


def test_one_pass_gives_the_figures_of_separate_passes(folder):
    model = network()
    others = {"labels": "predicted"}, {"threshold": 0.3}, {"crf": True}, {"scales": (1.25,)}
    protocols = [MULTI, *(replace(MULTI, **other) for other in others)]
    together = evaluate_all(model, folder, protocols, device="cpu")
    assert together == [evaluate(model, folder, protocol, device="cpu") for protocol in protocols]


def test_the_sweep_is_the_best_of_separate_runs_and_says_that_it_was_chosen(folder):
    model = network()
    swept = evaluate(model, folder, Protocol(), device="cpu")
    runs = [evaluate(model, folder, Protocol(threshold=i / 20), device="cpu") for i in range(20)]
    for name in ("cam", "cam_inter"):
        found = swept["thresholds"][name]
        assert found["source"] == CHOSEN
        assert all(run[f"{name}_miou"] <= swept[f"{name}_miou"] for run in runs)
        fixed = evaluate(model, folder, Protocol(threshold=found["value"]), device="cpu")
        assert fixed[f"{name}_miou"] == swept[f"{name}_miou"] and fixed["iou"][name] == swept["iou"][name]
        assert fixed["best_thresholds"][name]["miou"] == swept[f"{name}_miou"]
    assert len({run["cam_miou"] for run in runs}) > 5
    assert [run["thresholds"]["cam"] for run in runs] == [{"value": i / 20, "source": FIXED} for i in range(20)]


def test_scenes_are_scored_alike_whatever_the_batch():
    model, scenes = network(len(CLASSES)), SceneExamples(make_scenes("val", 12))
    one, many = (evaluate(model, scenes, Protocol(), device="cpu", batch_size=n) for n in (1, 12))
    for name, value in one.items():
        if isinstance(value, float):
            assert many[name] == pytest.approx(value, abs=0.05)


def test_the_modes_of_all_modules_and_the_gradients_stay(folder):
    model = network().train()
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    evaluate(model, folder, Protocol(), device="cpu", limit=2)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def on_ranks(world_size, *arguments, **how):
    """`evaluate_all` on so many ranks at once, threads here; their results."""
    barrier, parts = threading.Barrier(world_size, timeout=60), [None] * world_size

    def work(rank):
        def reduce(tensor):
            parts[rank] = tensor
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return total

        return evaluate_all(*arguments, rank=rank, world_size=world_size, reduce=reduce, device="cpu", **how)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, range(world_size)))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_has_the_figures_of_one_exactly(world_size, folder):
    model, protocols = network(), [Protocol(), replace(MULTI, threshold=0.4)]
    alone = evaluate_all(model, folder, protocols, batch_size=2, device="cpu")
    for result in on_ranks(world_size, model, folder, protocols, batch_size=2):
        assert result == alone and alone[0]["cam_miou"] > 0


def test_a_file_that_cannot_be_used_is_left_out_on_all_ranks_and_named(folder, tmp_path):
    model, items = network(), list(folder.split.items)
    (tmp_path / "cut.png").write_bytes(items[1].image.read_bytes()[:60])
    broken = {1: items[1]._replace(image=tmp_path / "cut.png"), 8: items[8]._replace(mask=items[0].mask)}
    dataset = EvalImages(Split(folder.split.classes, tuple(broken.get(i, item) for i, item in enumerate(items))))
    good = EvalImages(Split(folder.split.classes, tuple(item for i, item in enumerate(items) if i not in broken)))
    (result,), other = on_ranks(2, model, dataset, [Protocol()], batch_size=1)  # each reads one broken file
    assert [result] == other
    assert list(result["left_out"]) == ["image_1", "image_8"]
    assert "cut.png" in result["left_out"]["image_1"] and "expected 64 x 64 pixels" in result["left_out"]["image_8"]
    expected = evaluate(model, good, Protocol(), device="cpu", batch_size=1)
    assert {**result, "left_out": {}, "images": None} == {**expected, "images": None}
    assert result["images"] == {**expected["images"], "listed": 11}


def test_if_no_image_can_be_used_the_first_reason_is_told(folder, tmp_path):
    items = [item._replace(image=tmp_path / "gone.png") for item in folder.split.items[:3]]
    with pytest.raises(ValueError, match=r"no image can be used; the first: .*gone\.png"):
        evaluate(network(), EvalImages(Split(folder.split.classes, tuple(items))), Protocol(), device="cpu")


def test_a_reason_that_is_too_long_is_cut_off_between_two_characters(folder):
    items = list(folder.split.items[:3])
    for shift in range(2):  # one of them has a character across the cut
        items[shift] = items[shift]._replace(image=Path("x" * shift + "é" * 300))
    dataset = EvalImages(Split(folder.split.classes, tuple(items)))
    left_out = evaluate(network(), dataset, Protocol(), device="cpu")["left_out"]
    assert sorted(len(reason.encode()) for reason in left_out.values()) == [499, 500]
    assert all(reason.endswith("éé") for reason in left_out.values())


def test_what_is_not_scored_has_no_figure(folder):
    items = tuple(item._replace(mask=None) for item in folder.split.items[:3])
    result = evaluate(network(), EvalImages(Split(folder.split.classes, items)), Protocol(), device="cpu")
    assert result["seg_miou"] is result["cam_miou"] is result["boundary_iou"] is None
    assert result["classification_map"] > 0 and result["thresholds"] == {}
    assert result["images"]["segmentation"] == 0 and result["images"]["classification"] == 3


def test_images_of_one_size_may_differ_in_what_is_known_of_them(folder):
    whole = folder.split.items[0]
    items = whole, whole._replace(name="unlabelled", labels=None), whole._replace(name="bare", mask=None)
    result = evaluate(network(), EvalImages(Split(folder.split.classes, items)), Protocol(), device="cpu")
    images = result["images"]
    assert (images["segmentation"], images["classification"], images["cam"]) == (2, 2, 1)


def test_a_class_that_no_image_shows_has_no_precision_and_does_not_count(folder):
    items = (folder.split.items[0]._replace(labels=(1,)),)
    result = evaluate(network(), EvalImages(Split(folder.split.classes, items)), Protocol(), device="cpu")
    assert result["average_precision"]["cam"] == [None, 100, None] and result["classification_map"] == 100


def test_the_report_counts_images_and_ends_at_their_number(folder):
    told = []
    evaluate(network(), folder, Protocol(), device="cpu", batch_size=4, report=told.append)
    assert told == [4, 8, 11]


def test_every_image_is_handed_on_with_the_label_map_of_the_last_protocol(folder):
    model, got = network(), {}
    evaluate_all(model, folder, [MULTI, Protocol()], device="cpu", save=got.__setitem__)
    assert sorted(got) == sorted(item.name for item in folder.split.items)
    for name, image, mask, _ in (folder[i] for i in (0, 3)):  # number 3 has no mask
        assert got[name].dtype == torch.uint8
        size = tuple(image.shape[1:])
        scores = segment(look(model, image[None], {1.0: False}), Protocol(), size, 4)
        assert (got[name] != scores[0].argmax(0)).float().mean() < 0.01, mask


def test_the_crf_is_the_same_in_other_processes():
    image, probs = torch.randint(256, (3, 20, 30), dtype=torch.uint8), torch.rand(4, 20, 30).softmax(0)
    expected = DenseCRF()(image, probs)
    for workers in (0, 1):
        with refining(workers) as refine:
            assert np.array_equal(refine(image, probs).result(), expected.argmax(0).numpy())
    with refining(0, probabilities=True) as refine:
        assert np.array_equal(refine(image, probs).result(), expected.numpy())


REFINING = """
import time
import torch
from recipe.evaluation import refining
if __name__ == "__main__":
    with refining(1) as refine:
        refine(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(2, 8, 8)).result()
        print("working", flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_the_crf_of_a_killed_script_ends_with_it(outlived):
    assert not outlived(REFINING)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": ()}, r"--scales: expected factors above 0, got \(\)"),
        ({"scales": (1.0, -1.0)}, r"--scales: expected factors above 0"),
        ({"cam_scales": (0.0,)}, r"--cam-scales: expected factors above 0"),
        ({"threshold": 1.5}, r"--threshold: expected 0 to 1, got 1\.5"),
        ({"crf_prune": -0.1}, r"--crf-prune: expected 0 to 1"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_refused(wrong, message, folder):
    with pytest.raises(ValueError, match=message):
        evaluate(network(), folder, Protocol(**wrong), device="cpu")


def test_half_precision_is_near_and_does_not_leak_into_the_next_step(folder):
    model = network()
    exact = evaluate(model, folder, Protocol(threshold=0.4), device="cpu")
    with torch.autocast("cpu", torch.bfloat16):  # as a validation within a training run
        near = evaluate(model, folder, Protocol(threshold=0.4, precision="bf16"), device="cpu")
        same = evaluate(model, folder, Protocol(threshold=0.4), device="cpu")
        model.outputs(torch.rand(1, 3, 32, 32)).logits.sum().backward()
    assert same == exact != near and near["seg_miou"] == pytest.approx(exact["seg_miou"], abs=1)
    assert (
        model.classifier.weight.grad.abs().sum() > 0 and model.encoder.model.blocks[0].attn.qkv.weight.grad is not None
    )


# evaluate.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights for `folder`."""
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    config = replace(SCENES, hidden=32, cam_threshold=0.4, cam_scales=(1.0, 0.5))
    save_weights(path, small().state_dict(), config, ("a", "b", "c"), step=7)
    return path


def small(classes=3):
    torch.manual_seed(0)
    model = small_ffr(classes, 64, hidden=32)
    torch.nn.init.normal_(model.head.last.weight)
    return model.eval()


@pytest.fixture
def command(weights, folder, tmp_path, monkeypatch, capsys):
    """Run evaluate.py on `folder`: exit code, what it said, and the JSON."""

    def run(*more, **flags):
        out = tmp_path / "scores.json"
        flags = {"weights": weights, "data": folder.split.items[0].image.parent, "out": out, "workers": 0} | flags
        given = [str(part) for key, value in flags.items() for part in (f"--{key}", value) if value is not None]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *given, "--device", "cpu", *map(str, more)])
        monkeypatch.setenv("COLUMNS", "200")
        code = script.command("evaluate", script.Settings, script.run, script.__doc__)
        captured = capsys.readouterr()
        return code, captured.out + captured.err, json.loads(out.read_text()) if out.is_file() else None

    return run


def test_the_rows_are_the_protocols_of_the_recipe():
    rows = ("single", "single-crf", "multi", "multi-crf")
    for preset, threshold in (("voc", 0.5), ("coco", 0.45)):
        trained = Trained(None, PRESETS[preset][1], (), {})
        made = script.Settings(Path("w"), rows=rows).protocols(trained)
        single = Protocol(threshold=threshold)
        multi = Protocol((1.0, 1.25, 1.5), flip=True, threshold=threshold, cam_scales=(1.0, 0.5, 1.5))
        assert list(made.values()) == [single, replace(single, crf=True), multi, replace(multi, crf=True)]
    for threshold in (0.3, 0.0):
        assert script.Settings(Path("w"), threshold=threshold).protocols(trained)["single"].threshold == threshold
    assert script.Settings(Path("w"), sweep=True).protocols(trained)["single"].threshold is None


def test_the_table_and_the_json_are_those_of_the_function(command, folder):
    code, said, record = command("--rows", "single", "multi", "single-crf", "--crf-workers", 0)
    assert code == 0 and list(record["rows"]) == ["single", "multi", "single-crf"]
    single, multi = Protocol(threshold=0.4), replace(MULTI, threshold=0.4, cam_scales=(1.0, 0.5))
    expected = evaluate_all(small(), folder, [single, multi, replace(single, crf=True)], device="cpu")
    for row, figures in zip(record["rows"].values(), expected, strict=True):
        protocol = row.pop("protocol")
        assert row == json.loads(json.dumps({key: value for key, value in figures.items() if key != "protocol"}))
        assert protocol["split"] == "val" and protocol["weights"]["step"] == 7 and protocol["weights"]["sha256_16"]
        assert protocol["size"] == "each image's own" and "torch" in protocol["versions"]
        assert (protocol["crf_settings"] is None) is not protocol["crf"]
    assert record["rows"]["multi"]["thresholds"]["cam"] == {"value": 0.4, "source": FIXED}
    assert f"{expected[1]['seg_miou']:.1f}" in said and "fixed beforehand" in said and "chosen" not in said
    assert "background" in said and "10 with a mask" in said and "best.safetensors on val, in percent" in said


def test_a_row_without_cams_names_no_scales_of_theirs():
    protocol = {"scales": (1.0, 1.5), "flip": True, "cam_scales": (1.0, 0.5), "crf": True}
    images = {"looked_at": 1, "listed": 1, "segmentation": 1}
    rows = {"multi-crf": {"protocol": protocol, "images": images, "thresholds": {}, "left_out": {}}}
    (said,) = [line for line in script.notes(script.Settings(Path("w")), "d", rows) if line.startswith("multi-crf")]
    assert said == "multi-crf: scales 1.0 1.5 with flip; then the dense CRF, which leaves the CAM alone."


def test_a_sweep_is_marked_in_table_and_json(command):
    code, said, record = command("--sweep", "--rows", "single", "--labels", "predicted", "--images", 4)
    assert code == 0 and record["rows"]["single"]["thresholds"]["cam"]["source"] == CHOSEN
    assert CHOSEN in said and "upper bound" in said and record["rows"]["single"]["protocol"]["labels"] == "predicted"
    assert record["rows"]["single"]["images"]["looked_at"] == 4


def test_without_data_the_scenes_of_the_training_are_scored(command, tmp_path):
    path = tmp_path / "scenes.safetensors"
    save_weights(path, small(len(CLASSES)).state_dict(), replace(SCENES, hidden=32), CLASSES)
    code, said, record = command("--rows", "single", weights=path, data=None, images=6, split="test")
    assert code == 0 and record["rows"]["single"]["images"]["listed"] == 6
    assert record["rows"]["single"]["protocol"]["data"] == "embedded scenes of 64 px" and "ankle boot" in said


def test_figures_of_something_else_are_not_replaced_without_a_word(command, weights, tmp_path):
    other = tmp_path / "other.safetensors"
    save_weights(other, small().state_dict(), replace(SCENES, hidden=32), ("a", "b", "c"))
    for path, lost in ((weights, False), (weights, False), (other, True)):
        code, said, _ = command("--rows", "single", "--images", 2, weights=path)
        assert code == 0 and (f"scores.json, replacing the figures of {weights} on val of " in said) is lost, said
    (tmp_path / "scores.json").write_text("[]")
    code, said, _ = command("--rows", "single", "--images", 2)
    assert code == 0 and "replacing" not in said


def test_four_rows_fit_eighty_characters_with_their_names():
    rows = {name: {"iou": {"seg": [12.3] * 4}} for name in ("single", "multi", "single-crf", "multi-crf")}
    for name in ("single", "multi"):
        rows[name] = {"iou": dict.fromkeys(("seg", "cam", "cam_inter"), [12.3] * 4)}
    console = Console(width=80, record=True, file=StringIO())
    console.print(script.per_class(("a dining table", "horse", "person"), rows))
    said = console.export_text()
    assert "…" not in said and said.count("single") == 4 and said.count("12.3") == 32


def test_a_folder_that_the_weights_name_from_elsewhere_is_asked_for(command, tmp_path):
    path = tmp_path / "moved.safetensors"
    for data, where in ((Path("data/mk"), r", relative to where train\.py ran"), (tmp_path / "gone", "")):
        save_weights(path, small().state_dict(), replace(SCENES, hidden=32, data=data), ("a", "b", "c"))
        code, said, _ = command(weights=path, data=None)
        assert code == 2
        assert re.search(
            rf"--data: there is no folder {data}, .*recorded in .*moved.safetensors{where}\. Pass --d", said
        )


def test_a_submission_has_the_folders_of_the_server_and_needs_no_mask(command, folder, tmp_path):
    items = [item._replace(mask=None, labels=None) for item in folder.split.items]
    write_split(tmp_path / "data", "test", ("a", "b", "c"), items)
    sub = tmp_path / "sub"
    code, said, record = command(
        "--rows", "single", "multi", split="test", data=tmp_path / "data", submission=sub, competition="comp5"
    )
    assert code == 0, said
    files = sorted((sub / "results/VOC2012/Segmentation/comp5_test_cls").iterdir())
    assert [file.stem for file in files] == sorted(item.name for item in items)
    assert [path.name for path in sub.iterdir()] == ["results"]
    got = {}
    evaluate_all(small(), folder, [MULTI], device="cpu", save=got.__setitem__)
    for file in files:
        assert np.array_equal(load_label(file), got[file.stem].numpy())
    assert record["rows"]["multi"]["seg_miou"] is None
    code, said, _ = command(split="test", data=tmp_path / "data", submission=sub, competition="comp5")
    assert code == 2 and "--submission: " in said and "holds predictions already" in said
    code, said, _ = command(split="test", data=tmp_path / "data")
    assert code == 2 and "--split: no image of 'test'" in said and "--submission" in said


def hurt(kind, folder, at):
    """A copy of the list in which the second image has something wrong with it; the name of the bad file."""
    item, bad = folder.split.items[1], at / f"{kind}.{'jpg' if kind == 'truncated' else 'png'}"
    pixels = np.array(Image.open(item.mask))
    if kind == "truncated":
        Image.open(item.image).save(bad)
        bad.write_bytes(bad.read_bytes()[:-200])
    elif kind == "zero bytes":
        bad.touch()
    elif kind == "137":
        pixels[5, 5] = 137
        save_label(bad, pixels)
    elif kind == "size":
        save_label(bad, pixels[:-1])
    elif kind == "RGB":
        Image.open(item.mask).convert("RGB").save(bad)
    item = item._replace(**{"image" if kind in ("truncated", "zero bytes") else "mask": bad})
    items = [folder.split.items[0], item, *folder.split.items[2:]]
    write_split(at, "val", folder.split.classes, items)
    return bad


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "137", "size", "RGB"])
def test_a_hurt_file_is_left_out_and_named_and_the_rest_is_scored(kind, command, folder, tmp_path):
    bad = hurt(kind, folder, tmp_path)
    code, said, record = command("--rows", "single", data=tmp_path)
    assert code == 1 and "left out: image_1: " in said and str(bad) in said
    row = record["rows"]["single"]
    assert list(row["left_out"]) == ["image_1"] and str(bad) in row["left_out"]["image_1"]
    assert row["images"]["looked_at"] == 10 and row["images"]["listed"] == 11


class Trap:
    """Pickled, it leaves a mark where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_weights_that_do_not_fit_are_refused_and_nothing_in_them_runs(command, weights, tmp_path):
    state, config = small().state_dict(), replace(SCENES, hidden=32)
    mark, path = tmp_path / "mark", tmp_path / "odd.safetensors"

    def refused(message, **flags):
        code, said, record = command(**{"weights": path} | flags)
        assert code == 2 and re.search(message, said), said
        assert record is None and not mark.exists()

    path.write_bytes(pickle.dumps(Trap(mark)))
    refused(r"--weights: cannot read .*odd\.safetensors")
    torch.save({"state_dict": Trap(mark)}, path)
    refused(r"--weights: cannot read .*odd\.safetensors")
    path.write_bytes(weights.read_bytes()[:-100])
    refused(r"--weights: cannot read .*odd\.safetensors")
    save_weights(path, {**state, "head.extra": torch.ones(1)}, config, ("a", "b", "c"))
    refused(r"--weights: .*odd\.safetensors is of another model: it has unknown head\.extra")
    save_weights(path, {k: v for k, v in state.items() if k != "classifier.weight"}, config, ("a", "b", "c"))
    refused(r"--weights: .*odd\.safetensors is of another model: it lacks classifier\.weight")
    save_weights(path, state, config, ("a", "b"))
    refused(r"--weights: .*odd\.safetensors is of another model: it has another shape of")
    save_weights(path, small(2).state_dict(), config, ("a", "b"))
    refused(r"--data: .* has the 3 classes a, b, c; .*odd\.safetensors was trained on 2 classes a, b\. They must")
    save_weights(path, state, config, ("a", "c", "b"))
    refused(r"--data: .* has the 3 classes a, b, c; .*odd\.safetensors was trained on 3 classes a, c, b\. They must")
    refused(r"--weights: there is no file .*gone", weights=tmp_path / "gone")
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap works


def test_what_cannot_be_done_is_refused_by_flag_or_file_and_the_old_result_stays(command, folder, tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "file").touch()
    (tmp_path / "empty.json").write_text('{"classes": ["a"], "items": []}')
    gone = {"name": "x", "image": "gone.png", "mask": None, "labels": [0]}
    (tmp_path / "missing.json").write_text(json.dumps({"classes": ["a", "b", "c"], "items": [gone]}))
    write_split(tmp_path, "later", folder.split.classes, [folder.split.items[i] for i in (3, 0)])  # 3 has no mask
    for flags, message in [
        ({"data": tmp_path, "split": "empty"}, r"empty\.json lists no image"),
        ({"data": tmp_path, "split": "missing"}, r"image of 'x' in .*missing\.json is missing: .*gone\.png"),
        ({"data": tmp_path, "split": "none"}, r"there is no .*none\.json"),
        ({"data": tmp_path / "gone"}, r"read_split: there is no .*gone/val\.json"),
        ({"data": tmp_path, "split": "later", "images": 1}, r"--split: no image of 'later' in .* has a mask"),
        ({"out": tmp_path / "file" / "x.json"}, r"--out: cannot write .*file/x\.json"),
        ({"out": tmp_path}, r"--out: expected a file, got the folder"),
        ({"submission": tmp_path / "file"}, r"--submission: cannot write"),
        ({"images": 0}, r"--images: expected at least 1, got 0"),
        ({"batch-size": 0}, r"--batch-size: expected at least 1, got 0"),
        ({"threshold": 2}, r"--threshold: expected 0 to 1"),
        ({"precision": "fp16"}, r"--precision: fp16 needs a GPU"),
    ]:
        code, said, record = command(**flags)
        assert code == 2 and re.search(message, said), said
        assert record in ({}, None) and (tmp_path / "scores.json").read_text() == "{}"
    code, said, _ = command("--sweep", threshold=0.3)
    assert code == 2 and "--sweep: the threshold is given by --threshold" in said
    code, said, _ = command("--rows", "multi", "multi")
    assert code == 2 and "--rows: expected each once" in said


def test_a_json_that_cannot_be_written_leaves_the_old_one(command, tmp_path, monkeypatch):
    (tmp_path / "scores.json").write_text("{}")
    write = Path.write_text

    def full(path, text, **how):
        if "rows" in text:
            write(path, "half", **how)
            raise OSError(28, "No space left on device")
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    code, said, record = command("--rows", "single", images=2)
    assert code == 2 and "No space left on device" in said and "scores.json" in said
    assert record == {} and [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_the_json_is_written_where_nobody_reads_the_table_to_its_end(weights, folder, tmp_path):
    data, out = folder.split.items[0].image.parent, tmp_path / "scores.json"
    flags = ["--weights", weights, "--data", data, "--out", out, "--workers", 0, "--device", "cpu", "--images", 2]
    script_file = Path(script.__file__)
    read, write = os.pipe()
    os.close(read)
    try:
        made = subprocess.run([sys.executable, script_file, *map(str, flags)], stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (made.returncode, made.stderr) == (0, b"")
    assert json.loads(out.read_text())["rows"]["single"]["images"]["looked_at"] == 2


def test_the_json_is_written_before_a_table_that_cannot_be_printed(command, monkeypatch):
    def broken(*args):
        raise ValueError("no room")

    monkeypatch.setattr(script, "table", broken)
    code, said, record = command("--rows", "single")
    assert code == 2 and "no room" in said
    assert record["rows"]["single"]["images"]["looked_at"] > 0


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode")
def test_folders_whose_name_is_no_unicode_are_scored_and_recorded(command, folder, tmp_path):
    data, out = tmp_path / os.fsdecode(b"\xff"), tmp_path / os.fsdecode(b"\xfe.json")
    data.symlink_to(folder.split.items[0].image.parent)
    code, said, _ = command("--rows", "single", data=data, out=out)
    assert code == 0 and r"\udcfe.json" in said
    assert json.loads(out.read_text())["rows"]["single"]["protocol"]["data"].endswith(data.name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(weights, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--weights", str(weights), "--device", "cuda"])
    assert script.command("evaluate", script.Settings, script.run, script.__doc__) == 2
    assert "--device: torch sees no GPU here" in capsys.readouterr().err


def test_two_processes_write_what_one_writes(command, weights, folder, tmp_path):
    rows = ["--rows", "single", "multi", "--batch-size", "2", "--sweep"]
    _, _, alone = command(*rows)
    code = Path(script.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--weights", weights, "--data", folder.split.items[0].image.parent, "--out", tmp_path / "two.json"]
    made = subprocess.run(
        [*launch, code, *flags, *rows, "--device", "cpu", "--workers", "0"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["computed_on"]["ranks"] == 2 and alone["computed_on"]["ranks"] == 1
    assert two["rows"] == alone["rows"]
