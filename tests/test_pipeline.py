"""From the official archives, or a folder, to pictures: every script of the recipe, one after the other, on the CPU."""

import json

import evaluate
import numpy as np
import predict
import prepare_coco
import prepare_folder
import prepare_voc
import test_prepare
import train
import visualize
from PIL import Image
from recipe.data import read_split
from recipe.scenes import CLASSES, make_scenes
from test_prepare import make_coco, make_voc, run

from ffr.draw import load_label, save_label

SMALL = {
    "model": "vit_tiny_patch16_224", "no_pretrained": True, "crop": 64, "hidden": 16, "dilation": 1, "steps": 3,
    "batch_size": 2, "seg_start": 1, "warmup": 1, "high": 0.4, "low": 0.2, "workers": 0, "device": "cpu",
    "log_every": 1,
}  # fmt: skip


def call(monkeypatch, script, *words, **options):
    given = [word for key, value in options.items() for word in test_prepare.words_of(key, value)]
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words), *given])
    return script.main()


def from_data_to_pictures(monkeypatch, data, out, preset, grow):
    """Train on a prepared folder, score, predict and draw; what each step leaves behind is looked at.

    The images of the trees are a few pixels wide; `grow` makes them large enough for a grid of tokens.
    """
    for split in ("train", "val"):
        for item in read_split(data, split).items:
            with Image.open(item.image) as picture:
                size = tuple(side * grow for side in picture.size)
                picture.convert("RGB").resize(size).save(item.image)
            save_label(item.mask, np.kron(load_label(item.mask), np.ones((grow, grow), np.uint8)))
    classes = read_split(data, "train").classes
    assert call(monkeypatch, train, preset, data=data, out=out / "run", **SMALL) == 0
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["step"] == 3 and last["seg"] > 0 and last["seg_high"] > 0 and last["energy"] != 0
    weights = out / "run" / "last.safetensors"

    common = {"weights": weights, "device": "cpu"}
    rows = ("single", "multi", "multi-crf")
    assert call(monkeypatch, evaluate, rows=rows, out=out / "scores.json", workers=0, crf_workers=0, **common) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert set(rows) <= set(json.dumps(scores).replace('"', " ").split())

    image = read_split(data, "val").items[0].image
    assert call(monkeypatch, predict, image, out=out / "predicted", **common) == 0
    (label,) = (out / "predicted" / "labels").iterdir()
    with Image.open(image) as picture:
        assert load_label(label).shape == picture.size[::-1]
    assert load_label(label).max() <= len(classes)

    assert call(monkeypatch, visualize, out=out / "figures", count=4, **common) == 0
    assert (out / "figures" / "figure4.png").stat().st_size > 10_000


def test_voc_and_sbd_go_all_the_way(monkeypatch, tmp_path):
    voc, sbd = make_voc(tmp_path)
    assert run(monkeypatch, prepare_voc, voc=voc, sbd=sbd.parent, out=tmp_path / "data") == 0
    from_data_to_pictures(monkeypatch, tmp_path / "data", tmp_path, "voc", grow=8)


def test_coco_goes_all_the_way(monkeypatch, tmp_path):
    assert run(monkeypatch, prepare_coco, coco=make_coco(tmp_path / "coco"), out=tmp_path / "data") == 0
    from_data_to_pictures(monkeypatch, tmp_path / "data", tmp_path, "coco", grow=3)


def test_a_folder_of_ones_own_goes_all_the_way(monkeypatch, tmp_path):
    scenes, table = make_scenes("train", 10, 64), ["name,labels"]
    for i, (image, mask, labels) in enumerate(zip(*scenes, strict=True)):
        for folder in ("photos", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"photos/{i}.jpg")
        save_label(tmp_path / f"masks/{i}.png", mask)
        table.append(f"{i}.jpg,{';'.join(CLASSES[k] for k in labels.nonzero().flatten())}")
    (tmp_path / "labels.csv").write_text("\n".join(table) + "\n")
    assert (
        run(
            monkeypatch, prepare_folder, images=tmp_path / "photos", labels=tmp_path / "labels.csv",
            masks=tmp_path / "masks", classes=CLASSES, out=tmp_path / "data",
        )
        == 0
    )  # fmt: skip
    from_data_to_pictures(monkeypatch, tmp_path / "data", tmp_path, "folder", grow=1)
