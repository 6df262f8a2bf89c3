"""The scripts that prepare VOC, COCO and a folder: small trees made here, and every way in which they are hurt."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import unicodedata
from array import array
from collections import Counter
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare_coco
import prepare_folder
import prepare_voc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from recipe.data import EvalImages, TrainImages, read_split
from recipe.files import written
from recipe.prepare import PARTS, class_table, digest, pool_of, saved_mask
from recipe.progress import Bar, some
from reference import coco_counts, coco_instance, coco_label, coco_polygon
from rich.console import Console
from scipy.io import savemat

from ffr.draw import load_label, save_label

RNG = np.random.default_rng(0)
EXAMPLES = Path(prepare_voc.__file__).parent


def photo(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def label(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_label(path, np.asarray(values, np.uint8))
    return path


def run(monkeypatch, script, **options):
    """The script from its command line, in one process: its exit code."""
    words = [word for key, value in ({"workers": 1} | options).items() for word in words_of(key, value)]
    monkeypatch.setattr("sys.argv", [script.__name__, *words])
    return script.main()


def words_of(key, value):
    flag = f"--{key.replace('_', '-')}"
    values = () if value is True else value if isinstance(value, tuple) else (value,)
    return [flag, *map(str, values)]


def state(folder):
    """Everything in a folder, as bytes by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(text):
    return re.sub(r"\s+", " ", text)


# All three --------------------------------------------------------------------------------------------------------


def test_a_script_that_prepares_and_its_workers_load_no_transforms():
    code = "import sys, prepare_coco, prepare_folder, prepare_voc; print('torchvision' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True)
    assert made.stdout == "False\n", made.stderr


@pytest.mark.parametrize(
    ("terminal", "options", "lines"),
    [(False, {}, ["masks: 3 of 1,000", "masks: 6 of 1,000"]), (False, {"quiet": True}, []), (True, {}, [])],
)
def test_a_count_without_a_terminal_is_a_line_a_minute(terminal, options, lines, monkeypatch, capsys):
    clock = count(step=25)
    monkeypatch.setattr("recipe.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = Bar(Console(force_terminal=terminal), **options)
    with bar:
        list(bar.track(range(4), total=1000, description="masks"))
        for done in (5, 6, 7):
            bar.update(bar.tasks[0].id, completed=done)
    assert re.findall("masks: .*", capsys.readouterr().out) == lines


def test_a_count_without_a_terminal_may_have_no_end(monkeypatch, capsys):
    monkeypatch.setattr("recipe.progress.PAUSE", 0)
    with Bar(Console(force_terminal=False)) as bar:
        list(bar.track((letter for letter in "ab"), description="masks"))
    assert capsys.readouterr().out.splitlines() == ["masks: 1", "masks: 2"]


# VOC --------------------------------------------------------------------------------------------------------------

# a, b: VOC train; c: VOC val. SBD has a, c, d, e, so train_aug is a, b, d, e. f: VOC test.
SIZES = {"a": (9, 12), "b": (12, 9), "c": (8, 8), "d": (9, 7), "e": (7, 10), "f": (6, 6)}
XML = {"a": ("person", "horse"), "b": ("tvmonitor",), "c": ("cat", "cat"), "d": ("aeroplane", "dog")}


def sbd_masks():
    masks = {name: np.zeros(SIZES[name], np.uint8) for name in "acde"}
    masks["a"][:] = 7  # VOC's own mask of a says otherwise
    masks["c"][:] = 7
    masks["d"][2:5, 1:4] = 1
    masks["e"][0] = 255
    masks["e"][1:3] = 20
    masks["e"][4:] = 3
    return masks


def voc_masks():
    masks = {name: np.zeros(SIZES[name], np.uint8) for name in "abc"}
    masks["a"][2:5] = 15
    masks["a"][5] = 255
    masks["a"][6:] = 13
    masks["b"][3:] = 20
    masks["c"][1:7, 2:6] = 8
    return masks


def make_voc(root):
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    for name, size in SIZES.items():
        photo(voc / f"JPEGImages/{name}.jpg", *size)
    for name, mask in voc_masks().items():
        label(voc / f"SegmentationClass/{name}.png", mask)
    (voc / "Annotations").mkdir()
    for name, classes in XML.items():
        objects = "".join(
            f"<object><name>{each}</name><difficult>{i}</difficult><part><name>head</name></part></object>"
            for i, each in enumerate(classes)
        )
        (voc / f"Annotations/{name}.xml").write_text(f"<annotation><folder>VOC2012</folder>{objects}</annotation>")
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, text in {"train": "a\nb\n", "val": "c\n", "test": "f\n"}.items():
        (lists / f"{name}.txt").write_text(text)
    for folder in ("cls", "inst", "img"):
        (sbd / folder).mkdir(parents=True)
    (sbd / "train.txt").write_text("a\nd\nc\n")
    (sbd / "val.txt").write_text("e\n")
    for name, mask in sbd_masks().items():
        parts = {"Boundaries": np.zeros((20, 1), object), "Segmentation": mask, "CategoriesPresent": np.unique(mask)}
        savemat(sbd / f"cls/{name}.mat", {"GTcls": parts}, do_compression=True)
        savemat(sbd / f"inst/{name}.mat", {"GTinst": {"Segmentation": mask, "Categories": np.array([[1]])}})
    return voc, sbd


@pytest.fixture
def voc(tmp_path):
    voc, sbd = make_voc(tmp_path)
    return {"voc": voc, "sbd": sbd.parent, "out": tmp_path / "out"}


def test_voc_and_sbd_become_one_data_set(voc, monkeypatch, capsys):
    assert run(monkeypatch, prepare_voc, **voc) == 0
    out, expected = voc["out"], sbd_masks() | voc_masks()
    assert sorted(path.name for path in (out / "SegmentationClassAug").iterdir()) == [f"{n}.png" for n in "abcde"]
    for name, mask in expected.items():
        assert np.array_equal(load_label(out / f"SegmentationClassAug/{name}.png"), mask), name
        with Image.open(out / f"SegmentationClassAug/{name}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[45:48] == [192, 128, 128]
    lists = {path.stem: path.read_text().split() for path in (out / "lists").iterdir()}
    assert lists == {"train_aug": [*"abde"], "train": ["a", "b"], "val": ["c"], "test": ["f"]}
    train = read_split(out, "train")
    assert [item.name for item in train.items] == [*"abde"] and len(train.classes) == 20
    known = [{train.classes[k] for k in item.labels} for item in train.items]
    assert known == [{"person", "horse"}, {"tvmonitor"}, {"aeroplane", "dog"}, {"bird", "tvmonitor"}]
    assert [item.name for item in read_split(out, "voc_train").items] == ["a", "b"]
    assert read_split(out, "val").items[0].labels == (train.classes.index("cat"),)
    assert read_split(out, "test").items[0][2:] == (None, None)
    assert TrainImages(train, crop=16)[5][1].shape == (20,) and len(list(EvalImages(read_split(out, "val")))) == 1
    said = one_line(capsys.readouterr().out)
    for text in ("train: 4 images, the official data has 10,582", "val: 1 images, the official data has 1,449"):
        assert text in said
    assert "1 images have no XML annotation: their labels come from the mask." in said
    record = json.loads((out / "prepare.json").read_text())
    assert record["report"]["train"]["label_unseen"] == 1  # the dog of d has no pixel
    assert record["report"]["train"]["mask_unlabelled"] == 0 and record["left_out"] == {}
    assert record["report"]["test"]["no_label"] == 0  # nobody knows them, which is not to have none


def test_the_outer_folders_may_be_named_too(voc, monkeypatch):
    assert run(monkeypatch, prepare_voc, **voc) == 0
    other = voc["out"].with_name("other")
    assert run(monkeypatch, prepare_voc, voc=voc["voc"].parent, sbd=voc["sbd"] / "dataset", out=other) == 0
    assert (other / "train.json").read_text().count('"name"') == 4


def test_the_official_counts_are_those_of_the_literature():
    assert prepare_voc.OFFICIAL == {"train": 10582, "voc_train": 1464, "val": 1449, "test": 1456}
    assert prepare_coco.OFFICIAL["2014", "train"] == (82783, 82081)
    assert prepare_coco.OFFICIAL["2014", "val"] == (40504, 40137)


def test_a_second_run_keeps_what_is_good_and_mends_the_rest(voc, monkeypatch, capsys):
    run(monkeypatch, prepare_voc, **voc)
    masks, before = voc["out"] / "SegmentationClassAug", state(voc["out"])
    (masks / "a.png").unlink()
    (masks / "b.png").write_bytes((masks / "b.png").read_bytes()[:60])
    label(masks / "c.png", np.zeros((3, 3)))
    label(masks / "d.png", np.full(SIZES["d"], 137))
    (masks / ".0123456789abcdef.part").write_bytes(b"of a killed run")
    (voc["out"] / ".train.ab12_xyz.json").write_bytes(b"of a killed run")
    mine = [voc["out"] / ".mine.txt", masks / ".mine.part", voc["out"] / ".labels.json"]
    for path in mine:
        path.write_bytes(b"mine")
    stamp = (masks / "e.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(monkeypatch, prepare_voc, **voc) == 0
    assert re.search(r"masks written [^\d]*3 [^\d]*2 [^\d]*1", one_line(capsys.readouterr().out))
    assert (masks / "e.png").stat().st_mtime_ns == stamp
    for path in mine:
        path.unlink()  # it was not touched
    after = state(voc["out"])
    assert {n: b for n, b in after.items() if n != "prepare.json"} == {n: b for n, b in before.items() if n != "prepare.json"}  # fmt: skip # noqa: E501


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_is_cut_off_leaves_nothing_half_written_and_goes_on(error, voc, monkeypatch, capsys):
    whole = voc["out"].with_name("whole")
    run(monkeypatch, prepare_voc, **voc | {"out": whole})
    real, saved = Image.Image.save, []

    def save(picture, path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_bytes(b"half a picture")
            raise error
        real(picture, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        assert run(patch, prepare_voc, **voc) == (130 if error is KeyboardInterrupt else 2)
    said = capsys.readouterr().err
    if error is KeyboardInterrupt:
        assert said == "prepare_voc: interrupted; what is done is kept, the same command goes on.\n"
    else:
        assert re.search(r"prepare_voc: cannot write .*c\.png \(No space left on device\); what is done is kept", said)
    left = state(voc["out"])
    assert sorted(Path(name).name for name in left if "Aug" in name) == ["a.png", "b.png"]
    assert not [name for name in left if Path(name).name.startswith(".")] and "train.json" not in left
    assert run(monkeypatch, prepare_voc, **voc) == 0
    assert {n: b for n, b in state(voc["out"]).items() if "Aug" in n} == {n: b for n, b in state(whole).items() if "Aug" in n}  # fmt: skip # noqa: E501
    names = [item.name for item in read_split(voc["out"], "train").items]
    assert names == [item.name for item in read_split(whole, "train").items]


@pytest.mark.parametrize("split", ["train", "prepare"])
def test_a_list_that_cannot_be_written_is_named(split, voc, monkeypatch, capsys):
    real = os.replace

    def replace(source, target):
        if Path(target).name == f"{split}.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run(monkeypatch, prepare_voc, **voc) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(voc["out"]) in said
    assert not list(voc["out"].rglob(".*"))


def test_a_folder_with_something_else_is_refused(voc, monkeypatch, capsys):
    voc["out"].mkdir()
    (voc["out"] / "mine").write_text("keep")
    (voc["out"] / "train.json").write_text("mine, too")
    assert run(monkeypatch, prepare_voc, **voc) == 2
    assert "--out" in (said := capsys.readouterr().err) and "holds something else" in said and "--overwrite" in said
    assert state(voc["out"]) == {"mine": b"keep", "train.json": b"mine, too"}
    assert run(monkeypatch, prepare_voc, **voc, overwrite=True) == 0
    assert (voc["out"] / "mine").read_text() == "keep" and len(read_split(voc["out"], "train").items) == 4


def test_an_output_of_other_settings_is_refused(voc, monkeypatch, capsys):
    run(monkeypatch, prepare_voc, **voc)
    before = state(voc["out"])
    (voc["sbd"] / "dataset/val.txt").write_text("d\n")
    assert run(monkeypatch, prepare_voc, **voc) == 2
    assert re.search(
        r"--out: .*out was prepared with other settings or files \(the contents of val\.txt \(--sbd\) have changed\)\.",
        capsys.readouterr().err,
    )
    assert state(voc["out"]) == before
    assert run(monkeypatch, prepare_voc, **voc, overwrite=True) == 0
    assert sorted(path.stem for path in (voc["out"] / "SegmentationClassAug").iterdir()) == [*"abcd"]


@pytest.mark.parametrize("settings", [{"voc": "x", "sbd": "y", "lists": "0123"}, {"files": "0123"}, None])
def test_an_output_of_an_earlier_version_is_said_to_be_one(settings, voc, monkeypatch, capsys):
    run(monkeypatch, prepare_voc, **voc)
    record = json.loads((voc["out"] / "prepare.json").read_text())
    (voc["out"] / "prepare.json").write_text(json.dumps(record | {"settings": settings}))
    before = state(voc["out"])
    assert run(monkeypatch, prepare_voc, **voc) == 2
    said = capsys.readouterr().err
    assert "out was prepared by an earlier version, whose prepare.json has another form. Its lists can be used" in said
    assert "with other settings" not in said and "--overwrite: SegmentationClassAug, lists, train.json" in said
    assert state(voc["out"]) == before
    assert run(monkeypatch, prepare_voc, **voc, overwrite=True) == 0


def test_the_number_behind_the_last_label_is_no_label_either(tmp_path):
    for value, good in ((2, True), (3, False)):
        path, drawn = tmp_path / f"{value}.png", np.full((2, 2), value, np.uint8)
        with nullcontext() if good else pytest.raises(ValueError, match=r"c\.mat: expected values 0\.\.2 or 255"):
            saved_mask(path, 3, (2, 2), lambda drawn=drawn: drawn, Path("c.mat"))
        assert path.is_file() is good


def test_an_output_that_is_half_removed_is_no_longer_completed(voc, monkeypatch, capsys):
    run(monkeypatch, prepare_voc, **voc)

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        assert run(patch, prepare_voc, **voc, overwrite=True) == 130
    assert run(monkeypatch, prepare_voc, **voc) == 2
    assert "holds something else" in capsys.readouterr().err
    assert run(monkeypatch, prepare_voc, **voc, overwrite=True) == 0


def test_overwriting_removes_a_link_and_not_what_it_leads_to(voc, monkeypatch):
    run(monkeypatch, prepare_voc, **voc)
    masks, elsewhere = voc["out"] / "SegmentationClassAug", voc["out"].with_name("elsewhere")
    masks.rename(elsewhere)
    masks.symlink_to(elsewhere)
    before = state(elsewhere)
    assert run(monkeypatch, prepare_voc, **voc, overwrite=True) == 0
    assert state(elsewhere) == before == state(masks) and not masks.is_symlink()


@pytest.mark.parametrize(
    "name", ["prepare.json", "voc_train.json", *(f"{name}.txt" for name in prepare_voc.LISTS.values())]
)
def test_what_a_killed_run_was_writing_has_a_name_that_tells_it(name, tmp_path):
    with written(tmp_path / name) as part:
        assert re.fullmatch(PARTS, part.name)


def test_what_a_killed_run_was_painting_has_a_name_that_tells_it(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(os, "replace", lambda part, target: parts.append(Path(part).name))
    save_label(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    assert len(parts) == 1 and re.fullmatch(PARTS, parts[0])


@pytest.mark.parametrize("name", [".backup.20251129.txt", ".notes.original.json", ".train.Original.txt", ".a.part"])
def test_a_hidden_file_of_ones_own_is_no_part(name):
    assert not re.fullmatch(PARTS, name)


def test_a_change_far_inside_a_file_changes_its_digest(tmp_path):
    path, found = tmp_path / "annotations.json", set()
    for last in b"ab":
        path.write_bytes(bytes(3 << 20) + bytes([last]))
        found.add(digest(path))
    assert len(found) == 2


def test_overwriting_never_removes_a_source(voc, monkeypatch, capsys):
    inside = voc["out"] / "lists"
    inside.mkdir(parents=True)
    shutil.move(voc["sbd"], inside / "sbd")
    assert run(monkeypatch, prepare_voc, **voc | {"sbd": inside / "sbd"}, overwrite=True) == 2
    assert "holds the source" in capsys.readouterr().err
    assert (inside / "sbd/dataset/train.txt").is_file()


@pytest.mark.parametrize("out", ["file", "file/deeper"])
def test_an_output_that_cannot_be_a_folder_is_refused(out, voc, monkeypatch, capsys):
    (voc["out"].parent / "file").write_text("mine")
    assert run(monkeypatch, prepare_voc, **voc | {"out": voc["out"].parent / out}) == 2
    assert re.search(
        r"prepare_voc: --out: (expected a folder, got the file|cannot write to) .*file", capsys.readouterr().err
    )
    assert (voc["out"].parent / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(voc, monkeypatch, capsys):
    voc["out"].mkdir(mode=0o500)
    assert run(monkeypatch, prepare_voc, **voc) == 2
    assert "--out: cannot write to" in capsys.readouterr().err


FLOATS = np.ones((9, 7))
HURT_VOC = {
    "truncated image": ("voc/JPEGImages/d.jpg", lambda p: p.write_bytes(p.read_bytes()[:99]), r"d\.jpg: .*runcated"),
    "zero-byte image": ("voc/JPEGImages/d.jpg", lambda p: p.write_bytes(b""), r"cannot read .*d\.jpg"),
    "missing image": ("voc/JPEGImages/d.jpg", Path.unlink, r"there is no file .*d\.jpg"),
    "zero-byte mask": ("voc/SegmentationClass/a.png", lambda p: p.write_bytes(b""), r"cannot read .*a\.png"),
    "missing mask": ("voc/SegmentationClass/a.png", Path.unlink, r"there is no file .*a\.png"),
    "foreign value": ("voc/SegmentationClass/a.png", lambda p: label(p, np.full((9, 12), 137)), r"a\.png.*\[137\]"),
    "other size": ("voc/SegmentationClass/a.png", lambda p: label(p, np.zeros((3, 3))), r"a\.png.*\(9, 12\).*\(3, 3\)"),
    "RGB mask": ("voc/SegmentationClass/a.png", lambda p: photo(p, 9, 12), r"a\.png: .*indexed or 8-bit grey"),
    "missing mat": ("sbd/cls/d.mat", Path.unlink, r"there is no file .*d\.mat"),
    "broken mat": ("sbd/cls/d.mat", lambda p: p.write_bytes(b"MATLAB"), r"cannot read .*d\.mat"),
    "other mat": ("sbd/cls/d.mat", lambda p: savemat(p, {"x": 1}), r"cannot read .*d\.mat: 'GTcls'"),
    "float mat": ("sbd/cls/d.mat", lambda p: savemat(p, {"GTcls": {"Segmentation": FLOATS}}), r"d\.mat.*float"),
    "unknown class": ("voc/Annotations/d.xml", lambda p: p.write_text("<a><object><name>yak</name></object></a>"), r"d\.xml: unknown class 'yak'"),  # noqa: E501
    "broken XML": ("voc/Annotations/d.xml", lambda p: p.write_text("<a>"), r"cannot read .*d\.xml"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HURT_VOC)
def test_an_image_with_a_hurt_file_is_left_out_and_named(kind, voc, monkeypatch, capsys):
    file, hurt, message = HURT_VOC[kind]
    top, _, rest = file.partition("/")
    path = (voc["voc"] if top == "voc" else voc["sbd"] / "dataset") / rest
    hurt(path)
    assert run(monkeypatch, prepare_voc, **voc) == 1
    said = one_line(capsys.readouterr().out)
    assert re.search(rf"left out: {path.stem}: .*{message}", said), said
    assert [item.name for item in read_split(voc["out"], "train").items] == [n for n in "abde" if n != path.stem]
    record = json.loads((voc["out"] / "prepare.json").read_text())
    assert list(record["left_out"]) == [path.stem] and record["report"]["train"]["broken"] == 1


def test_a_split_without_a_good_image_is_not_written(voc, monkeypatch, capsys):
    run(monkeypatch, prepare_voc, **voc)
    (voc["voc"] / "JPEGImages/f.jpg").unlink()
    assert run(monkeypatch, prepare_voc, **voc) == 1
    assert "wrote train.json, voc_train.json, val.json in" in one_line(capsys.readouterr().out)
    assert not (voc["out"] / "test.json").exists()


def test_a_mended_file_is_taken_up_by_the_next_run(voc, monkeypatch):
    path = voc["voc"] / "JPEGImages/d.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    assert run(monkeypatch, prepare_voc, **voc) == 1
    path.write_bytes(whole)
    assert run(monkeypatch, prepare_voc, **voc) == 0
    assert len(read_split(voc["out"], "train").items) == 4


def test_an_image_that_voc_lacks_comes_from_sbd(voc, monkeypatch, capsys):
    shutil.move(voc["voc"] / "JPEGImages/d.jpg", voc["sbd"] / "dataset/img/d.jpg")
    assert run(monkeypatch, prepare_voc, **voc) == 0
    said = one_line(capsys.readouterr().out)
    assert "1 images are not in JPEGImages; SBD's are used: d" in said and "..." not in said
    assert read_split(voc["out"], "train").items[2].image == (voc["sbd"] / "dataset/img/d.jpg")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ImageSets/Segmentation/train.txt", None, r"--voc: there is no list .*train\.txt"),
        ("ImageSets/Segmentation/val.txt", "\n", r"--voc: the list .*val\.txt is empty"),
        ("ImageSets/Segmentation/val.txt", "c\nc\n", r"--voc: the list .*val\.txt has a name twice"),
        ("../../benchmark_RELEASE/dataset/val.txt", None, r"--sbd: there is no list .*val\.txt"),
        ("../../benchmark_RELEASE/dataset/cls", None, r"--sbd: expected the folder cls in"),
        ("JPEGImages", None, r"--voc: expected the folder JPEGImages in"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused(file, text, message, voc, monkeypatch, capsys):
    path = voc["voc"] / file
    if path.is_dir():
        shutil.rmtree(path)
    elif text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert run(monkeypatch, prepare_voc, **voc) == 2
    assert re.search(f"prepare_voc: {message}", capsys.readouterr().err)
    assert not voc["out"].exists()


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(voc, monkeypatch):
    (voc["voc"] / "JPEGImages/e.jpg").write_bytes(b"")
    other = voc | {"out": voc["out"].with_name("parallel")}
    assert run(monkeypatch, prepare_voc, **voc) == run(monkeypatch, prepare_voc, **other, workers=2) == 1
    text = str(voc["out"]).encode(), str(other["out"]).encode()
    assert {n: b.replace(*text) for n, b in state(voc["out"]).items()} == state(other["out"])


@pytest.mark.slow
def test_a_failing_write_in_a_worker_ends_the_run(voc, monkeypatch, capsys):
    (voc["out"] / "x").mkdir(parents=True)
    shutil.rmtree(voc["out"])
    assert run(monkeypatch, prepare_voc, **voc) == 0
    masks = voc["out"] / "SegmentationClassAug"
    shutil.rmtree(masks)
    masks.write_text("a file where the folder was")
    assert run(monkeypatch, prepare_voc, **voc, workers=2) == 2
    assert re.search(r"prepare_voc: cannot write .*\.png \(.+\); what is done is kept", capsys.readouterr().err)
    assert masks.read_text() == "a file where the folder was"


WORK = """
import time
from recipe.prepare import work
from rich.console import Console
def task(number):
    print("working", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    work(task, range(2), workers=2, title="", console=Console())
"""


SERVED = sys.platform == "linux" and sys.version_info >= (3, 11)


@pytest.mark.slow
@pytest.mark.skipif(not SERVED, reason="here every process starts anew")
def test_the_processes_of_a_pool_share_what_is_large():
    before = os.environ.copy()
    with pool_of(2) as pool:
        server = pool.submit(os.getppid).result()
        assert server != os.getpid()
        assert "libtorch" in Path(f"/proc/{server}/maps").read_text()
    assert os.environ == before


WHERE = """
import sys
from ffr import crf
from recipe.prepare import pool_of
def where():
    from ffr import crf
    return crf.__file__
if __name__ == "__main__":
    with pool_of(1) as pool:
        print(pool.submit(where).result() == crf.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("temporary", ["t", "t" * 90], ids=["", "too long a path for the server's socket"])
def test_the_processes_of_a_pool_import_what_the_script_imports(temporary, tmp_path):
    for name in ("ffr/__init__.py", "ffr/crf.py", "rich/__init__.py", "script/script.py"):  # another ffr is here
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(WHERE if name.endswith("script.py") else "")
    (tmp_path / temporary).mkdir()
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path / temporary)}
    run = [sys.executable, "script/script.py"]
    made = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert made.stdout == "True\n", made.stderr


@pytest.mark.slow
def test_the_workers_of_a_killed_script_end_with_it(outlived):
    assert not outlived(WORK)


# COCO -------------------------------------------------------------------------------------------------------------

CATEGORIES = [(90, "toothbrush"), (1, "person"), (13, "stop sign")]  # 1, 13, 90 -> 1, 2, 3


def compressed(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def uncompressed(mask):
    flat = np.concatenate([[0], mask.T.ravel().astype(int)])
    ends = np.flatnonzero(np.diff(flat)).tolist()
    counts = np.diff([0, *ends, mask.size]).tolist()
    assert sum(counts) == mask.size
    return {"size": list(mask.shape), "counts": counts}


def make_coco(root, year="2017"):
    """Per split four images: polygons of all kinds; run lengths and a crowd; overlaps; nothing."""
    rng, number = np.random.default_rng(3), 0
    for split in ("train", "val"):
        images, annotations = [], []
        for i, (height, width) in enumerate([(30, 41), (25, 18), (40, 40), (10, 10)]):
            file = f"{split}.{i} ü.jpg" if i < 3 else f"deep/{i}.jpg"
            photo(root / f"{split}{year}" / file, height, width)
            images.append({"id": 100 - i, "file_name": file, "height": height, "width": width})
            box = [width, height] * 4
            spots = rng.random((height, width)) < 0.3
            spots[: height // 2] = True
            shapes = {
                0: [
                    (1, [(rng.random(8) * box * 1.4 - 4).round(2).tolist(), (rng.random(8) * box).tolist()], 0),
                    (90, [(rng.random(8) * box).tolist()], 0),
                ],
                1: [(13, compressed(spots), 0), (1, uncompressed(rng.random((height, width)) < 0.2), 1)],
                2: [(1, [[5, 5, 15, 5, 15, 15, 5, 15]], 0), (90, [[0, 0, 40, 0, 40, 40, 0, 40]], 0), (13, [[0, 0, 20, 0, 20, 20, 0, 20]], 1)],  # noqa: E501
                3: [],
            }  # fmt: skip
            for category, segmentation, crowd in shapes[i]:
                number += 1
                entry = {"id": number, "image_id": 100 - i, "category_id": category, "iscrowd": crowd, "area": 1.0}
                annotations.append(entry | {"segmentation": segmentation})
        write_json(root, split, images, annotations, year)
    return root


def write_json(root, split, images, annotations, year="2017"):
    categories = [{"id": key, "name": name} for key, name in CATEGORIES]
    path = root / f"annotations/instances_{split}{year}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def differing_pixels(root, out, split, year="2017", crowd="class"):
    """How many pixels of the masks differ from the independent decoder, and how many images were compared."""
    raw = json.loads((root / f"annotations/instances_{split}{year}.json").read_text(encoding="utf-8"))
    numbers = {key: i + 1 for i, key in enumerate(sorted(each["id"] for each in raw["categories"]))}
    masks = {item.image.name: item for item in read_split(out, split).items}
    differing = compared = 0
    for image in raw["images"]:
        mine = sorted((a for a in raw["annotations"] if a["image_id"] == image["id"]), key=lambda a: a["id"])
        if mine:
            size = image["height"], image["width"]
            shapes = [coco_instance(each["segmentation"], *size) for each in mine]
            known = [numbers[each["category_id"]] for each in mine]
            painted = [255 if crowd == "ignore" and a["iscrowd"] else k for a, k in zip(mine, known, strict=True)]
            item = masks[Path(image["file_name"]).name]
            differing += int((load_label(item.mask) != coco_label(painted, shapes, size)).sum())
            assert item.labels == tuple(sorted({k - 1 for k in known}))
            compared += 1
    return differing, compared


@pytest.fixture
def coco(tmp_path):
    return {"coco": make_coco(tmp_path / "coco"), "out": tmp_path / "out"}


def test_polygons_are_held_as_arrays_for_lists_of_all_coco_take_gigabytes(coco):
    found = prepare_coco.read_annotations(coco["coco"] / "annotations/instances_train2017.json")
    shapes = [each["segmentation"] for entries in found.instances.values() for each in entries]
    assert {type(polygon) for shape in shapes if isinstance(shape, list) for polygon in shape} == {array}
    assert prepare_coco.packed({"segmentation": [[1, 2, "x"]]}) == {"segmentation": [[1, 2, "x"]]}


@pytest.mark.parametrize("crowd", ["class", "ignore"])
def test_coco_masks_are_those_of_an_independent_decoder(crowd, coco, monkeypatch, capsys):
    assert run(monkeypatch, prepare_coco, **coco, crowd=crowd) == 0
    for split in ("train", "val"):
        assert differing_pixels(coco["coco"], coco["out"], split, crowd=crowd) == (0, 3)
        assert read_split(coco["out"], split).classes == ("person", "stop sign", "toothbrush")
        values = Counter(v for item in read_split(coco["out"], split).items for v in np.unique(load_label(item.mask)))
        assert set(values) == {0, 1, 2, 3} | ({255} if crowd == "ignore" else set())
    said = one_line(capsys.readouterr().out)
    assert "Category ids 1..90 became 1..3 in their order: 90 (toothbrush) is 3." in said
    assert f"Crowd regions are painted as {'255' if crowd == 'ignore' else 'their class'}." in said
    assert "train: 1 images without any annotation left out" in said


def test_the_smaller_instance_is_on_top(coco, monkeypatch):
    run(monkeypatch, prepare_coco, **coco)
    mask = load_label(coco["out"] / "masks/train/train.2 ü.png")
    assert (mask[5:15, 5:15] == 1).all() and (mask == 1).sum() == 100  # though annotated first
    assert (mask[:20, :20] == 2).sum() == 300 and (mask == 3).sum() == 1200


def test_of_equal_instances_the_later_number_is_on_top_in_any_order():
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    both = [prepare_coco.Instance(number, number, number, square) for number in (1, 2)]
    for instances in (both, both[::-1]):
        assert set(prepare_coco.paint((6, 6), instances).ravel()) == {0, 2}


def test_two_categories_of_one_name_are_refused_before_a_mask_is_painted(tmp_path):
    image = {"id": 1, "file_name": "a.jpg", "height": 2, "width": 2}
    categories = [{"id": number, "name": "cat"} for number in (3, 7)]
    raw = {"categories": categories, "images": [image], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"a\.json.*several categories called 'cat'"):
        prepare_coco.read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(("count", "fits"), [(254, True), (255, False)])  # 255 is not scored
def test_more_classes_than_a_mask_has_numbers_are_refused(count, fits, tmp_path):
    raw = {"categories": [{"id": n, "name": f"{n}"} for n in range(count)], "annotations": []}
    raw["images"] = [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    with nullcontext() if fits else pytest.raises(ValueError, match="it has 255 classes"):
        assert len(prepare_coco.read_annotations(tmp_path / "a.json").categories) == 254


def test_images_without_annotation_are_kept_on_demand(coco, monkeypatch, capsys):
    assert run(monkeypatch, prepare_coco, **coco, keep_unlabelled=True) == 0
    assert "the official data has 118,287" in one_line(capsys.readouterr().out)
    item = next(item for item in read_split(coco["out"], "train").items if item.name == "deep/3")
    assert item.labels == () and not load_label(item.mask).any()
    assert item.mask == coco["out"] / "masks/train/deep/3.png"


def test_a_coco_run_is_completed_and_never_mixed(coco, monkeypatch, capsys):
    run(monkeypatch, prepare_coco, **coco)
    assert "the official data has 117,266" in one_line(capsys.readouterr().out)
    path = coco["out"] / "masks/val/val.0 ü.png"
    before = path.read_bytes()
    path.unlink()
    assert run(monkeypatch, prepare_coco, **coco) == 0 and path.read_bytes() == before
    assert run(monkeypatch, prepare_coco, **coco, crowd="ignore") == 2
    assert "other settings or files (crowd was class, now ignore)" in capsys.readouterr().err
    assert run(monkeypatch, prepare_coco, **coco, crowd="ignore", overwrite=True) == 0
    assert differing_pixels(coco["coco"], coco["out"], "train", crowd="ignore") == (0, 3)


def test_annotations_that_have_changed_are_named(coco, monkeypatch, capsys):
    run(monkeypatch, prepare_coco, **coco)
    path = coco["coco"] / "annotations/instances_val2017.json"
    path.write_text(path.read_text() + "\n")
    assert run(monkeypatch, prepare_coco, **coco) == 2
    said = capsys.readouterr().err
    assert "files (the contents of instances_val2017.json (--coco) have changed). Name a new folder" in said


def test_the_year_is_found_or_asked_for(coco, monkeypatch, capsys):
    make_coco(coco["coco"], "2014")
    assert run(monkeypatch, prepare_coco, **coco) == 2
    assert "found both for: 2014, 2017" in capsys.readouterr().err
    assert run(monkeypatch, prepare_coco, **coco, year="2014") == 0
    assert "2014" in str(read_split(coco["out"], "train").items[0].image)
    assert run(monkeypatch, prepare_coco, **coco, year="2015") == 2
    assert "--year: expected instances_train2015.json" in capsys.readouterr().err
    shutil.rmtree(coco["coco"] / "val2014")
    assert run(monkeypatch, prepare_coco, **coco, year="2014") == 2
    assert "--images: expected the folder" in capsys.readouterr().err


SEGMENTATIONS = {
    "a box": ([[1, 2, 3, 4]], r"annotation 1: expected polygons of three points or more"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], r"annotation 1: expected polygons"),
    "no polygon": ([], r"annotation 1: expected polygons"),
    "no numbers": ([["a"] * 6], r"annotation 1: could not convert"),
    "far away": ([[1, 1, 5, 1, 5, 1e8]], r"annotation 1: expected coordinates within -100,000\.\.100,000"),
    "NaN": ([[1, 1, 5, 1, 5, math.nan]], r"annotation 1: expected coordinates"),
    "beyond a float": ([[1, 1, 5, 1, 5, 10**400]], r"annotation 1: int too large"),
    "nothing": (None, r"annotation 1: "),
    "RLE of another size": ({"size": [3, 3], "counts": [9]}, r"RLE of size \[6, 8\] as its image, got \[3, 3\]"),
    "short RLE": ({"size": [6, 8], "counts": [40, 2]}, r"RLE counts .* sum to 48, got 42"),
    "negative RLE": ({"size": [6, 8], "counts": [50, -2]}, r"RLE counts of 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_an_annotation_that_cannot_be_painted_is_named(kind, tmp_path, monkeypatch, capsys):
    segmentation, message = SEGMENTATIONS[kind]
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 6, "width": 8} for i in (1, 2)]
        good = {"id": 2, "image_id": 2, "category_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 5, 1, 5, 5]]}
        write_json(tmp_path, split, images, [good, good | {"id": 1, "image_id": 1, "segmentation": segmentation}])
        for i in (1, 2):
            photo(tmp_path / f"{split}2017/{i}.jpg", 6, 8)
    assert run(monkeypatch, prepare_coco, coco=tmp_path, out=tmp_path / "out") == 1
    assert re.search(rf"left out: 1: .*{message}", one_line(capsys.readouterr().out))
    assert [item.name for item in read_split(tmp_path / "out", "train").items] == ["2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["annotations"][0].update(category_id=2), r"annotation 1 has the unknown category 2"),
        (lambda raw: raw["annotations"][0].update(image_id=7), r"annotation 1 is of the unknown image 7"),
        (lambda raw: raw["images"].append(raw["images"][0]), r"an image twice"),
        (lambda raw: raw.update(categories=[]), r"no category|unknown category"),
        (lambda raw: raw.pop("images"), r"cannot read .*instances_train2017\.json: 'images'"),
        (lambda raw: raw["images"][0].pop("height"), r"'height'"),
        (lambda raw: raw["images"][0].update(file_name="../x.jpg"), r"'\.\./x' is no name of an image"),
        (lambda raw: raw["categories"][0].update(name="brush"), r"the categories of .* differ"),
    ],
)
def test_annotations_that_contradict_themselves_are_refused(change, message, coco, monkeypatch, capsys):
    path = coco["coco"] / "annotations/instances_train2017.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    assert run(monkeypatch, prepare_coco, **coco) == 2
    assert re.search(rf"prepare_coco: .*({message})", capsys.readouterr().err)
    assert not coco["out"].exists()


def test_half_a_json_is_refused(coco, monkeypatch, capsys):
    path = coco["coco"] / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:200])
    assert run(monkeypatch, prepare_coco, **coco) == 2
    assert re.search(r"prepare_coco: --coco: cannot read .*instances_val2017\.json", capsys.readouterr().err)


def test_an_image_of_another_size_than_its_annotations_is_left_out(coco, monkeypatch, capsys):
    photo(coco["coco"] / "train2017/train.0 ü.jpg", 15, 20)
    (coco["coco"] / "val2017/val.1 ü.jpg").unlink()
    assert run(monkeypatch, prepare_coco, **coco) == 1
    said = one_line(capsys.readouterr().out)
    assert "15 x 20 pixels (H x W), its annotations are for 30 x 41" in said
    assert re.search(r"left out: val\.1 ü: .*there is no file .*val\.1 ü\.jpg", said)


numbers = st.one_of(st.integers(-8, 40).map(float), st.floats(-8, 40), st.integers(-16, 80).map(lambda i: i / 2))


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=7), st.integers(1, 32), st.integers(1, 32))
def test_the_decoder_of_the_tests_draws_polygons_as_coco_does(points, height, width):
    flat = [number for point in points for number in point]
    assert np.array_equal(coco_polygon(flat, height, width), prepare_coco.covered([flat], height, width))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.02, 0.5, 0.98]))
def test_the_decoder_of_the_tests_reads_run_lengths_as_coco_does(height, width, seed, density):
    mask = np.random.default_rng(seed).random((height, width)) < density
    for code in (compressed(mask), uncompressed(mask)):
        assert np.array_equal(coco_instance(code, height, width), mask)
        assert np.array_equal(prepare_coco.covered(code, height, width), mask)


def test_known_polygons_and_run_lengths():
    square = coco_polygon([1, 1, 4, 1, 4, 4, 1, 4], 6, 6)
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True  # a pixel is inside if its centre is
    assert np.array_equal(square, expected)
    assert np.array_equal(prepare_coco.covered([[1, 1, 4, 1, 4, 4, 1, 4]], 6, 6), expected)
    # 40 = 8 + 1 x 32: "X" is 8 with more to come; 16 needs a second digit, for its own last bit is the sign.
    assert coco_counts("06") == [0, 6] and coco_counts("X1`0") == [40, 16]
    assert coco_counts("532O") == [5, 3, 2, 2]  # the fourth is 3 - 1
    known = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]], bool).reshape(3, 4).T
    for code in ({"size": [4, 3], "counts": "532O"}, {"size": [4, 3], "counts": [5, 3, 2, 2]}):
        assert np.array_equal(prepare_coco.covered(code, 4, 3), known)
        assert np.array_equal(coco_instance(code, 4, 3), known)


@pytest.mark.skipif("FFR_COCO" not in os.environ, reason="FFR_COCO names no folder with real COCO photographs")
def test_real_coco_annotations_are_painted_pixel_for_pixel(tmp_path, monkeypatch):
    root = Path(os.environ["FFR_COCO"])
    year = prepare_coco.find_year(root / "annotations", os.environ.get("FFR_COCO_YEAR"))
    assert run(monkeypatch, prepare_coco, coco=root, year=year, out=tmp_path / "out") == 0
    for split in ("train", "val"):
        differing, compared = differing_pixels(root, tmp_path / "out", split, year)
        assert differing == 0 and compared > 0


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit, match=r"prepare_coco needs pycocotools: run pip install -e '\.\[examples\]'"):
        runpy.run_path(prepare_coco.__file__)


# A folder ---------------------------------------------------------------------------------------------------------

NAMES = ["a/one.jpg", "a/two words.v2.png", "b/sub/drei ü.JPG", "b/四.jpg", "b/5.jpeg"]


@pytest.fixture
def mine(tmp_path):
    for i, name in enumerate(NAMES):
        photo(tmp_path / "photos" / name, 8 + i, 12)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/.DS_Store").write_text("no image")
    return {"images": tmp_path / "photos", "out": tmp_path / "out"}


def labels_by_name(out):
    splits = [read_split(out, split) for split in ("train", "val")]
    return {item.name: {split.classes[k] for k in item.labels} for split in splits for item in split.items}


def stem(name):
    return name[: name.rindex(".")]


def test_a_folder_per_class_gives_one_label_an_image(mine, monkeypatch, capsys):
    assert run(monkeypatch, prepare_folder, **mine, val_fraction=0.4) == 0
    assert labels_by_name(mine["out"]) == {stem(name): {name[0]} for name in NAMES}
    assert len(read_split(mine["out"], "val").items) == 2
    assert "1 other files in" in (said := one_line(capsys.readouterr().out))
    assert "photos are left alone (.txt 1); read are .bmp .jpeg" in said
    images = TrainImages(read_split(mine["out"], "train"), crop=8)
    assert images[7][0].shape == (3, 8, 8)


def test_linked_folders_are_searched_once_and_a_dead_link_is_named(mine, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "elsewhere/deep/z.jpg", 8, 8)
    (mine["images"] / "c").symlink_to(tmp_path / "elsewhere")
    (mine["images"] / "c/deep/back").symlink_to(mine["images"])  # without end, if it were followed
    (mine["images"] / "b/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert run(monkeypatch, prepare_folder, **mine) == 1
    assert labels_by_name(mine["out"]) == {stem(name): {name[0]} for name in (*NAMES, "c/deep/z.jpg")}
    assert "- left out: b/gone: read_image: there is no file" in one_line(capsys.readouterr().out)


KNOWN = {stem(name): {"cat", "big dog"} if i % 2 else {"cat"} for i, name in enumerate(NAMES)}
TABLES = {
    "one-hot.csv": "name,big dog,cat,ox\n" + "".join(f"{n},{i % 2},1,0\n" for i, n in enumerate(NAMES)),
    "without suffix.csv": "name,big dog,cat\n" + "".join(f"{stem(n)},{i % 2},1\n" for i, n in enumerate(NAMES)),
    "excel.csv": "\ufeffname,labels\r\n"
    + "".join(f'"{n}",cat{"; big dog" * (i % 2)}\r\n' for i, n in enumerate(NAMES)),
    "list.json": json.dumps({n: ["cat", "big dog"][: 1 + i % 2] for i, n in enumerate(NAMES)}),
    "spaces.json": json.dumps({n: [" cat", "big dog ", ""][: 1 + i % 2] for i, n in enumerate(NAMES)}),
    "decomposed.json": json.dumps({unicodedata.normalize("NFD", n): sorted(KNOWN[stem(n)]) for n in NAMES}),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_labels_may_be_csv_or_json(table, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / table).write_text(TABLES[table], encoding="utf-8", newline="")
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / table) == 0
    assert labels_by_name(mine["out"]) == KNOWN
    classes = read_split(mine["out"], "train").classes
    assert classes == (("big dog", "cat", "ox") if table == "one-hot.csv" else ("big dog", "cat"))
    assert ("train: no image shows ox." in one_line(capsys.readouterr().out)) == (table == "one-hot.csv")


def test_labels_and_lists_that_have_changed_are_named(mine, tmp_path, monkeypatch, capsys):
    tables = {"labels": tmp_path / "l.csv", "val_list": tmp_path / "v.txt"}
    tables["labels"].write_text("name,labels\n" + "".join(f"{name},cat\n" for name in NAMES[1:]) + "a/one,rokcet\n")
    tables["val_list"].write_text("b/5\n")
    assert run(monkeypatch, prepare_folder, **mine, **tables) == 0
    tables["labels"].write_text(tables["labels"].read_text().replace("rokcet", "rocket"))
    other = tmp_path / "other.txt"
    other.write_text("b/5\n")
    for lists, why in (
        ({}, "the contents of l.csv (--labels) have changed"),
        ({"val_list": other}, "the contents of l.csv (--labels) have changed; other.txt (--val-list) is new; "
         "v.txt (--val-list) is no longer used"),
    ):  # fmt: skip
        assert run(monkeypatch, prepare_folder, **mine, **tables | lists) == 2
        assert f"other settings or files ({why}). Name a new folder" in capsys.readouterr().err
    assert run(monkeypatch, prepare_folder, **mine, **tables, overwrite=True) == 0
    assert read_split(mine["out"], "train").classes == ("cat", "rocket")


def test_a_new_folder_of_a_class_is_a_change(mine, monkeypatch, capsys):
    assert run(monkeypatch, prepare_folder, **mine) == 0
    photo(mine["images"] / "b/more.jpg", 8, 8)
    assert run(monkeypatch, prepare_folder, **mine) == 0
    photo(mine["images"] / "aa/new.jpg", 8, 8)  # b has another number by it
    assert run(monkeypatch, prepare_folder, **mine) == 2
    assert "files (classes was ['a', 'b'], now ['a', 'aa', 'b']). Name a new" in capsys.readouterr().err


def test_an_image_may_be_listed_by_another_suffix(mine, tmp_path, monkeypatch):
    listed = ["a/one.JPG", "a/two words.v2.jpg", "b/sub/drei ü.jpg", "b/四.Jpeg", "b/5.jpeg"]
    (tmp_path / "l.json").write_text(json.dumps({name: ["x"] for name in listed}))
    (tmp_path / "val.txt").write_text("a/one.png\n")
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json", val_list=tmp_path / "val.txt") == 0
    assert labels_by_name(mine["out"]) == {stem(name): {"x"} for name in NAMES}
    assert [item.name for item in read_split(mine["out"], "val").items] == ["a/one"]


@pytest.mark.parametrize("listed", ["a/anim.gif", "a/anim"])
def test_an_image_of_a_kind_that_is_not_read_is_said_to_be_one(listed, mine, tmp_path, monkeypatch, capsys):
    (mine["images"] / "a/anim.gif").write_bytes(b"GIF89a")
    (tmp_path / "l.json").write_text(json.dumps({listed: ["x"]}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 2
    said = "anim.gif is not read; convert it to PNG or JPEG."
    assert said in capsys.readouterr().err
    (tmp_path / "l.json").write_text(json.dumps({listed: ["x"], "a/one": ["x"], "b/5": ["x"]}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 1
    assert re.search(rf"left out: {listed}: .*photos/a/{said[:-1]}", one_line(capsys.readouterr().out))


@pytest.mark.parametrize("beside", ["a/9.xml", "a/9.txt", "a/9"])
def test_a_file_of_another_kind_beside_an_image_that_is_missing_is_not_taken_for_it(
    beside, mine, tmp_path, monkeypatch, capsys
):
    (mine["images"] / beside).touch()
    (tmp_path / "l.json").write_text(json.dumps({"a/9.jpg": ["x"], "a/9": ["x"], "a/one": ["x"], "b/5": ["x"]}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 1
    said = one_line(capsys.readouterr().out)
    assert said.count("l.json has labels for it, but there is no such image in") == 1 + (beside != "a/9")


@pytest.mark.parametrize(
    ("labels", "classes", "where"),
    [
        ("name,labels\na/one,Background\nb/5,cat\n", (), r"--labels: .*l\.csv: 'Background'"),
        ("name,background,cat\na/one,0,1\n", (), r"--labels: .*l\.csv: 'background'"),
        ("name,labels\na/one,cat\n", ("background", "cat"), "--classes: 'background'"),
        (None, (), r"--images: .*photos: 'background'"),
    ],
)
def test_background_is_no_class(labels, classes, where, mine, tmp_path, monkeypatch, capsys):
    table = {}
    if labels is None:
        photo(mine["images"] / "background/1.jpg", 8, 8)
    else:
        table["labels"] = tmp_path / "l.csv"
        table["labels"].write_text(labels)
    assert run(monkeypatch, prepare_folder, **mine, **table, **({"classes": classes} if classes else {})) == 2
    said = capsys.readouterr().err
    assert re.search(rf"{where} is label 0 and no class\. .*an image of background alone has an empty label\.", said)
    assert not mine["out"].exists()


def test_any_number_of_classes(mine, tmp_path, monkeypatch):
    names = [f"class {i}" for i in range(1000)]
    (tmp_path / "l.json").write_text(json.dumps({name: names for name in NAMES}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 0
    assert TrainImages(read_split(mine["out"], "train"), crop=4)[0][1].sum() == 1000


def test_many_classes_do_not_fit_a_mask(mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.json").write_text(json.dumps({NAMES[0]: [str(i) for i in range(255)]}))
    (tmp_path / "masks").mkdir()
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json", masks=tmp_path / "masks") == 2
    assert "--masks: an indexed PNG holds 254 classes at most, got 255" in capsys.readouterr().err


def test_masks_follow_the_names_and_the_order_of_the_classes(mine, tmp_path, monkeypatch, capsys):
    for i, name in enumerate(NAMES[:4]):
        label(tmp_path / f"masks/{stem(name)}.png", np.full((8 + i, 12), 2 * (name[0] == "a")))
    lists = {"val_list": tmp_path / "val.txt", "train_list": tmp_path / "train.txt"}
    lists["val_list"].write_text("a/one\nb/四.jpg\n", encoding="utf-8")
    lists["train_list"].write_text("b/5\na/two words.v2.png\n", encoding="utf-8")
    assert run(monkeypatch, prepare_folder, **mine, **lists, masks=tmp_path / "masks", classes=("b", "a")) == 0
    val, train = read_split(mine["out"], "val"), read_split(mine["out"], "train")
    assert val.classes == ("b", "a") and [item.name for item in val.items] == ["a/one", "b/四"]
    assert [item.labels for item in val.items] == [(1,), (0,)]
    assert [sorted(set(example.mask.flatten().tolist())) for example in EvalImages(val)] == [[2], [0]]
    assert [item.mask is None for item in train.items] == [True, False]
    assert "train: 1 of 2 images have no mask" in one_line(capsys.readouterr().out)
    report = json.loads((mine["out"] / "prepare.json").read_text())["report"]
    assert report["val"]["label_unseen"] == 1 and report["val"]["mask_unlabelled"] == 0


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_mask_may_spell_its_accents_in_another_way_than_its_image(forms, tmp_path, monkeypatch):
    image, mask = (unicodedata.normalize(form, "a/über") for form in forms)
    photo(tmp_path / f"photos/{image}.jpg", 8, 12)
    photo(tmp_path / "photos/a/2.jpg", 8, 12)
    label(tmp_path / f"masks/{mask}.png", np.ones((8, 12)))
    where = {"images": tmp_path / "photos", "masks": tmp_path / "masks", "out": tmp_path / "out"}
    assert run(monkeypatch, prepare_folder, **where, val_fraction=0) == 0
    assert [item.name for item in read_split(tmp_path / "out", "train").items if item.mask] == [image]


def test_masks_may_end_in_capitals_and_those_that_fit_no_image_are_named(mine, tmp_path, monkeypatch, capsys):
    label(tmp_path / "masks/a/one.PNG", np.ones((8, 12)))
    label(tmp_path / "masks/five.png", np.ones((8, 12)))
    photo(tmp_path / "masks/b/5.bmp", 8, 12)
    assert run(monkeypatch, prepare_folder, **mine, masks=tmp_path / "masks", val_fraction=0) == 0
    assert [item.name for item in read_split(mine["out"], "train").items if item.mask] == ["a/one"]
    said = one_line(capsys.readouterr().out)
    assert re.search(r"- 2 files in .*masks are the mask of no image in a split: b/5\.bmp, five\.png\. ", said)


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode")
def test_a_mask_whose_name_is_no_unicode_is_named_and_the_run_recorded(mine, tmp_path, monkeypatch, capsys):
    masks = tmp_path / os.fsdecode(b"masks\xfe")
    label(masks / "x.png", np.ones((8, 12))).rename(masks / os.fsdecode(b"x\xff.png"))
    mine |= {"out": tmp_path / os.fsdecode(b"out\xfd")}  # in the title of a table
    assert run(monkeypatch, prepare_folder, **mine, masks=masks) == 0
    said = one_line(capsys.readouterr().out)
    assert r"the mask of no image in a split: x\udcff.png. " in said and r"out\udcfd" in said
    record = json.loads((mine["out"] / "prepare.json").read_text())
    assert sum(row["images"] for row in record["report"].values()) == 5


def test_of_many_names_eight_are_said_and_that_there_are_more():
    assert some([*"abcdefgh"]) == "a, b, c, d, e, f, g, h" and some([]) == ""
    assert some([*"abcdefghi"]) == "a, b, c, d, e, f, g, h, ..."


def test_the_report_of_a_folder_without_masks_has_no_row_about_them(mine, monkeypatch, capsys):
    assert run(monkeypatch, prepare_folder, **mine) == 0
    assert "mask" not in capsys.readouterr().out


HURT_MASKS = {
    "foreign value": (lambda p: label(p, np.full((8, 12), 137)), r"values 0\.\.2 or 255, got 137 in .*one\.png"),
    "other size": (lambda p: label(p, np.zeros((12, 8))), r"expected 8 x 12 pixels .* got 12 x 8 in .*one\.png"),
    "RGB": (lambda p: photo(p, 8, 12), r"cannot read .*one\.png: .*indexed or 8-bit grey"),
    "zero bytes": (lambda p: (p.parent.mkdir(parents=True), p.write_bytes(b"")), r"cannot read .*one\.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HURT_MASKS)
def test_a_hurt_mask_of_ones_own_is_named_and_untouched_and_its_image_stays(kind, mine, tmp_path, monkeypatch, capsys):
    hurt, message = HURT_MASKS[kind]
    hurt(tmp_path / "masks/a/one.png")
    before = state(tmp_path / "masks")
    assert run(monkeypatch, prepare_folder, **mine, masks=tmp_path / "masks") == 1
    said = one_line(capsys.readouterr().out)
    assert re.search(rf"- mask left out: a/one: .*{message}", said)
    assert re.search(r"images kept without their mask: it cannot be used [^\d]*1 ", said)
    assert re.search(r"images left out: files broken [^\d]*0 [^\d]*0 ", said)
    assert len(labels_by_name(mine["out"])) == 5
    items = [item for split in ("train", "val") for item in read_split(mine["out"], split).items]
    assert all(item.mask is None for item in items)
    record = json.loads((mine["out"] / "prepare.json").read_text())
    assert list(record["masks_left_out"]) == ["a/one"] and record["left_out"] == {}
    assert {row["masks_kept"] for row in record["report"].values()} == {0, None}  # 0 where its mask is
    assert state(tmp_path / "masks") == before


@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "missing"])
def test_a_hurt_image_of_ones_own_is_named(kind, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.json").write_text(json.dumps({name: ["x"] for name in NAMES}))
    path = mine["images"] / "b/5.jpeg"
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-80] if kind == "truncated" else b"")
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 1
    assert re.search(
        r"left out: b/5(\.jpeg)?: .*(cannot read .*5\.jpeg|l\.json has labels for it, but there is no such image in)",
        said := one_line(capsys.readouterr().out),
    )
    assert len(labels_by_name(mine["out"])) == 4
    assert re.search(rf"files broken [^\d]*{int(kind != 'missing')} ", said)


def test_no_image_that_can_be_read_is_no_success(mine, monkeypatch, capsys):
    for name in NAMES:
        (mine["images"] / name).write_bytes(b"")
    assert run(monkeypatch, prepare_folder, **mine) == 2
    assert "wrote no list, for every image is left out" in one_line(capsys.readouterr().out)
    assert not list(mine["out"].glob("[tv]*.json"))


@pytest.mark.parametrize(
    ("listed", "hint"),
    [
        ("photos/a/one.jpg", r"Names are relative to --images: 'a/one\.jpg', not 'photos/a/one\.jpg'\."),
        ("one", r"Names are relative to --images: 'a/one', not 'one'\."),
        ("zero.jpg", r"'zero\.jpg'\.$"),
    ],
)
def test_labels_that_all_miss_are_refused_with_a_hint(listed, hint, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.json").write_text(json.dumps({listed: ["x"], "elsewhere/zero": ["x"]}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json") == 2
    said = capsys.readouterr().err.strip()
    assert re.search(rf"--labels: none of the 2 images in .*l\.json is in .*photos; the first: .*{hint}", said)
    assert not mine["out"].exists()


def test_the_images_of_each_class_are_counted_and_a_single_one_is_doubted(mine, tmp_path, monkeypatch, capsys):
    rows = [f"{name},{'cat' if i else 'cat;rokcet'}" for i, name in enumerate(NAMES)]
    (tmp_path / "l.csv").write_text("\n".join(["name,labels", *rows]), encoding="utf-8")
    given = {"labels": tmp_path / "l.csv", "classes": ("cat", "rokcet", "yak"), "val_fraction": 0}
    assert run(monkeypatch, prepare_folder, **mine, **given) == 0
    said = one_line(capsys.readouterr().out)
    assert "images of each class, train cat 5 rokcet 1 yak 0" in said and "no image shows yak." in said
    assert "shown by a single image: rokcet. Check the spelling." in said


def test_a_class_may_have_a_comma_in_its_name(mine, tmp_path, monkeypatch):
    rows = [f'{name},"{"crane, bird" if i else "crane"}"' for i, name in enumerate(NAMES)]
    (tmp_path / "l.csv").write_text("\n".join(["name,labels", *rows]), encoding="utf-8")
    given = {"labels": tmp_path / "l.csv", "classes": ("crane", "crane, bird")}
    assert run(monkeypatch, prepare_folder, **mine, **given) == 0
    assert read_split(mine["out"], "train").classes == given["classes"]


def test_the_head_of_a_narrow_table_of_classes_stands_on_one_line(capsys):
    Console().print(class_table({"ox": [3]}, ["train"]))
    assert capsys.readouterr().out.splitlines()[0] == "images of each class, train"


def test_of_many_classes_that_no_image_shows_a_few_are_named(mine, tmp_path, monkeypatch, capsys):
    rare = [f"rare {i}" for i in range(200)]
    (tmp_path / "l.json").write_text(
        json.dumps({name: ["ox", *rare][: 1 + 200 * (not i)] for i, name in enumerate(NAMES)})
    )
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json", val_fraction=0.2) == 0
    said = one_line(capsys.readouterr().out)
    assert re.search(r": no image shows rare 0, (rare \d+, ){19}\.\.\.", said)


def test_of_many_classes_the_rarest_are_counted(mine, tmp_path, monkeypatch, capsys):
    often = [f"often {i}" for i in range(200)]
    (tmp_path / "l.json").write_text(
        json.dumps({name: [*often, "seldom"][: 201 - bool(i)] for i, name in enumerate(NAMES)})
    )
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json", val_fraction=0.2) == 0
    said = one_line(capsys.readouterr().out)
    assert "images of the 100 rarest of 201 classes, train + val" in said
    assert said.count("often") == 99 and re.search(r"seldom (1 \+ 0|0 \+ 1)", said)


BAD_TABLES = {
    "no header.csv": ("a/one.jpg,1,0\n", r"no header\.csv: line 1: expected .* name,CLASS.*, got 'a/one.jpg,1,0'"),
    "semicolons.csv": ("name;labels\na/one;cat\n", r"got 'name;labels'\. Separate the cells by commas\."),
    "singular.csv": ("name,label\na/one,cat\n", r"line 2: expected 0 or 1.*'cat'\. .*may mean `labels`, not 'label'\."),
    "commas.csv": ("name,labels\na/one,cat, dog\n", r"line 2: .*'a/one,cat, dog'\. Separate several labels by `;`\."),
    "utf16.csv": ("name,labels\na/one,cat\n".encode("utf-16"), r"cannot read .*utf16\.csv: .*Save it as UTF-8\."),
    "utf16.json": ('{"a/one": ["cat"]}'.encode("utf-16"), r"cannot read .*utf16\.json: .*Save it as UTF-8\."),
    "empty.csv": ("", r"empty\.csv: line 1: expected the header"),
    "rowless.csv": ("name,cat\n", r"--labels: .*rowless\.csv lists no image"),
    "short.csv": ("name,cat,dog\na/one,1,0\n\nb/5,1\n", r"short\.csv: line 4: expected 3 cells, got 'b/5,1'"),
    "two.csv": ("name,cat,dog\na/one,1,2\n", r"two\.csv: line 2: expected 0 or 1 for every class, got '2'"),
    "twice.csv": ("name,cat\na/one,1\na/one.jpg,1\n", r"'a/one\.jpg' is listed a second time: it and 'a/one' mean"),
    "head.csv": ("name,cat,cat\na/one,1,1\n", r"--classes: expected different names, got 'cat', 'cat'"),
    "yak.csv": ("name,labels\na/one,yak\n", r"yak\.csv, line 2: unknown class 'yak'; known: cat, dog"),
    "latin.csv": ("name,labels\na/\xfc,cat\n".encode("latin-1"), r"cannot read .*latin\.csv"),
    "out.csv": ("name,labels\n../x,cat\n", r"out\.csv, line 2: '\.\./x' is no name of an image"),
    "half.json": ('{"a/one": ["cat"', r"cannot read .*half\.json"),
    "list.json": ('["a/one"]', r"list\.json: expected one object"),
    "value.json": ('{"a/one": [1]}', r"value\.json: expected a list of class names for 'a/one', got \[1\]"),
    "both.csv": (
        "name,cat\na/one.jpg,1\na/one.png,1\n",
        r"line 3: 'a/one\.png' is listed a second time: it and 'a/one\.jpg' mean .*photos/a/one\.jpg, by its name "
        r"without suffix\. Keep one row\.",
    ),
    "twice.json": ('{"a/one": [], "a/one": ["cat"]}', r"twice\.json, 'a/one': 'a/one' is listed a second time\. Keep"),
    "none.json": ('{}', r"none\.json lists no image"),
    "quoted.csv": ('name,labels\na/one,"cat, dog"\nb/5,cat\n', r"quoted\.csv, line 2: 'cat, dog' looks like several"),
    "pipes.csv": ("name,labels\na/one,cat\nb/5,cat|dog\n", r"pipes\.csv, line 3: 'cat\|dog' looks like several"),
    "joined.json": ('{"a/one": "cat;dog", "b/5": ["cat"]}', r"joined\.json, 'a/one': 'cat;dog' looks like several"),
    "bare.csv": ("name,labels\na/one,\n", r"--labels: .*bare\.csv names no class"),
    "table.xlsx": ("", r"--labels: expected a \.csv or \.json file"),
}  # fmt: skip


@pytest.mark.parametrize("table", BAD_TABLES)
def test_a_bad_table_is_refused_by_file_and_line(table, mine, tmp_path, monkeypatch, capsys):
    text, message = BAD_TABLES[table]
    (tmp_path / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    classes = {"classes": ("cat", "dog")} if table == "yak.csv" else {}
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / table, **classes) == 2
    said = capsys.readouterr().err
    assert re.search(rf"prepare_folder: .*{message}", said), said
    assert not mine["out"].exists()


def test_an_image_without_a_row_is_in_no_split(mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.json").write_text(json.dumps({name: ["x"] for name in NAMES[:3]} | {NAMES[3]: []}))
    assert run(monkeypatch, prepare_folder, **mine, labels=tmp_path / "l.json", val_fraction=0) == 0
    said = one_line(capsys.readouterr().out)
    assert "1 images have no labels and are in no split: b/5" in said
    assert re.search(r"images without any label [^\d]*1 ", said)
    assert [item.labels for item in read_split(mine["out"], "train").items] == [(0,), (0,), (0,), ()]
    (tmp_path / "some.txt").write_text("b/5\n")
    again = mine | {"labels": tmp_path / "l.json", "overwrite": True}
    assert run(monkeypatch, prepare_folder, **again, val_list=tmp_path / "some.txt") == 2
    assert "there is no image 'b/5' with labels" in capsys.readouterr().err
    assert run(monkeypatch, prepare_folder, **again, test_list=tmp_path / "some.txt") == 0
    assert read_split(mine["out"], "test").items[0].labels is None


def test_what_one_list_leaves_is_the_other_split(mine, tmp_path, monkeypatch):
    lists = {"val_list": tmp_path / "val.txt", "test_list": tmp_path / "test.txt"}
    lists["val_list"].write_text("a/one\n")
    lists["test_list"].write_text("./b/5\n")
    assert run(monkeypatch, prepare_folder, **mine, **lists) == 0
    names = {split: [item.name for item in read_split(mine["out"], split).items] for split in ("train", "val", "test")}
    assert names == {"train": ["a/two words.v2", "b/sub/drei ü", "b/四"], "val": ["a/one"], "test": ["b/5"]}
    assert list(json.loads((mine["out"] / "prepare.json").read_text())["report"]) == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"val": "a/zero\n"}, r"--val-list: cannot read .*val\.txt: there is no image 'a/zero' with labels"),
        (
            {"val": "one.jpg\ntwo.jpg\n"},
            r"--val-list: .*\(2 such lines\)\. Names are relative to --images: 'a/one\.jpg', n",
        ),
        ({"val": "\n"}, r"--val-list: cannot read .*val\.txt: it lists no image"),
        ({"val": "a/one\na/one.jpg\n"}, r"--val-list: .*it lists an image twice"),
        ({"val": "a/one\n", "train": "a/one\n"}, r"--val-list: 'a/one' is in .*train\.txt, too"),
        ({"val": None}, r"--val-list: there is no file"),
    ],
)
def test_a_list_of_ones_own_is_checked(lists, message, mine, tmp_path, monkeypatch, capsys):
    for split, text in lists.items():
        if text is not None:
            (tmp_path / f"{split}.txt").write_text(text)
    options = {f"{split}_list": tmp_path / f"{split}.txt" for split in lists}
    assert run(monkeypatch, prepare_folder, **mine, **options) == 2
    assert re.search(rf"prepare_folder: {message}", capsys.readouterr().err)
    assert not mine["out"].exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "no"}, r"--images: expected a folder, got .*no"),
        ({"masks": "no"}, r"--masks: expected a folder, got .*no"),
        ({"val_fraction": 1}, r"--val-fraction: expected a share in \[0, 1\), got 1"),
        ({"classes": ("a", "a")}, r"--classes: expected different names, got 'a', 'a'"),
        ({"classes": ("a",)}, r"unknown class 'b'; known: a"),
    ],
)
def test_unusable_options_are_refused_by_name(options, message, mine, monkeypatch, capsys):
    assert run(monkeypatch, prepare_folder, **mine | options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_images_that_cannot_be_told_apart_are_refused(mine, monkeypatch, capsys):
    photo(mine["images"] / "a/one.png", 4, 4)
    assert run(monkeypatch, prepare_folder, **mine) == 2
    assert re.search(r"--images: .*one\.jpg and .*one\.png differ by their suffix alone", capsys.readouterr().err)


def test_an_image_outside_the_class_folders_is_refused(mine, monkeypatch, capsys):
    photo(mine["images"] / "loose.png", 4, 4)
    assert run(monkeypatch, prepare_folder, **mine) == 2
    assert re.search(r"--images: .*loose\.png lies in no folder of a class.*--labels", capsys.readouterr().err)


def test_an_empty_folder_is_refused(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, prepare_folder, images=tmp_path, out=tmp_path / "out") == 2
    assert "--images: there is no image" in capsys.readouterr().err


def test_another_seed_draws_another_split_and_needs_overwriting(mine, monkeypatch, capsys):
    draws = set()
    for seed in range(6):
        assert run(monkeypatch, prepare_folder, **mine, val_fraction=0.4, seed=seed, overwrite=True) == 0
        draws.add(tuple(item.name for item in read_split(mine["out"], "val").items))
    assert len(draws) > 1
    assert run(monkeypatch, prepare_folder, **mine, val_fraction=0.4, seed=0) == 2
    assert "split was 0.4 drawn by seed 5, now 0.4 drawn by seed 0" in capsys.readouterr().err


@given(st.lists(st.text(min_size=1), min_size=2, max_size=30, unique=True), st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_draw_is_a_partition_whatever_the_order(names, fraction, seed):
    names = [name.encode(errors="ignore").decode() for name in names]
    train, val = prepare_folder.draw(names, fraction, seed)
    assert sorted(train + val) == sorted(names)
    again = prepare_folder.draw(names[::-1], fraction, seed)
    assert sorted(again[0]) == sorted(train) and again[1] == val
    if len(set(names)) == len(names):
        assert len(train) >= 1 and len(val) == min(max(round(fraction * len(names)), 1), len(names) - 1)


def test_the_split_is_the_same_everywhere():
    assert prepare_folder.draw([str(i) for i in range(20)], 0.25, 0)[1] == ["0", "10", "14", "16", "4"]
