"""The embedded scenes: exact masks, true labels, the same bytes everywhere, and no object in two splits."""

import csv
import gzip
import hashlib
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from recipe import scenes
from recipe.scenes import CLASSES, COMPANIONS, NAMES, Scenes, build_objects, make_scenes, write_voc
from scipy.ndimage import binary_fill_holes

from ffr import draw

SIZES = (64, 96, 224, 448)
objects = scenes._objects()


@pytest.fixture(scope="module")
def many():
    return make_scenes("train", 800)


def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Scenes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 101, 224, 448])
def test_shapes_and_dtypes_hold_at_any_size(size):
    images, masks, labels = make_scenes("val", 2, size)
    assert (images.shape, images.dtype) == ((2, 3, size, size), torch.uint8)
    assert (masks.shape, masks.dtype) == ((2, size, size), torch.uint8)
    assert (labels.shape, labels.dtype) == ((2, len(CLASSES)), torch.float32)


def test_none_is_asked_for_and_none_is_given():
    images, masks, labels = make_scenes("test", 0, 96)
    assert (images.shape, masks.shape, labels.shape) == ((0, 3, 96, 96), (0, 96, 96), (0, 8))


@pytest.mark.parametrize(
    ("split", "size", "expected"),
    [
        ("train", 64, "a5b8f6e1b0c93e6d"),
        ("val", 101, "16605643d871054c"),
        ("test", 224, "33b26850b9de6495"),
    ],
)
def test_the_bytes_are_the_same_everywhere(split, size, expected):
    images, masks, _ = make_scenes(split, 12, size, seed=3)  # 12 scenes meet every texture and both distractors
    assert digest(images, masks)[:16] == expected


@pytest.mark.parametrize("size", [64, 224])
def test_a_scene_does_not_depend_on_how_many_are_made(size):
    whole = make_scenes("train", 5, size, seed=1)
    assert equal(Scenes(*(part[3:] for part in whole)), make_scenes("train", 2, size, seed=1, start=3))


def test_another_seed_split_or_number_composes_other_scenes():
    asked = [("train", 0, 0), ("val", 0, 0), ("test", 0, 0), ("train", 1, 0), ("train", 0, 30)]
    chosen = [make_scenes(split, 30, seed=seed, start=start).labels for split, seed, start in asked]
    assert len({digest(labels) for labels in chosen}) == 5


def test_another_size_shows_the_same_layout():
    small, large = make_scenes("train", 15, 64), make_scenes("train", 15, 448)
    assert torch.equal(small.labels, large.labels)
    assert (small.masks == large.masks[:, 3::7, 3::7]).float().mean() > 0.98  # the centre of each 7 x 7 cell


def test_labels_say_what_the_mask_shows(many):
    for mask, label in zip(many.masks, many.labels, strict=True):
        assert mask.unique()[1:].tolist() == [1 + k for k in label.nonzero().flatten().tolist()]


def test_a_scene_has_one_to_three_classes(many):
    assert set(many.labels.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("size", SIZES)
def test_background_takes_65_to_80_percent(size):
    share = (make_scenes("test", 60, size).masks == 0).float().mean()
    assert 0.65 < share < 0.8


def test_classes_are_equally_frequent(many):
    frequency = many.labels.mean(0)
    assert (frequency / frequency.mean() - 1).abs().max() < 0.2


def test_companions_share_scenes_and_strangers_seldom_do(many):
    together = many.labels.T @ many.labels
    given = together / together.diagonal()[:, None]  # [a, b]: how often b is there when a is
    companions = torch.zeros_like(given, dtype=torch.bool)
    for pair in COMPANIONS:
        a, b = map(CLASSES.index, pair)
        companions[a, b] = companions[b, a] = True
    strangers = ~companions & ~torch.eye(len(CLASSES), dtype=torch.bool)
    assert given[companions].min() > 0.5 and given[companions].max() < 0.8
    assert given[strangers].max() < 0.2


@pytest.mark.parametrize("size", [64, 224])
def test_what_is_labelled_is_in_sight(size):
    seen = []
    for number in range(150):
        placed = scenes._layout(scenes._Random(0, 0, number), "train", CLASSES)
        mask, label = make_scenes("train", 1, size, start=number)[1:]
        assert {at.name for at in placed} == {CLASSES[k] for k in label[0].nonzero().flatten().tolist()}
        for at in placed:
            whole = (at.grey > 0).mean() * at.height * at.width * size**2
            seen.append(float((mask == 1 + CLASSES.index(at.name)).sum() / whole))
    assert min(seen) > 0.5  # none is nearly hidden
    assert np.mean(seen) > 0.9  # and places are chosen


def test_brightness_alone_does_not_find_the_objects(many):
    brightness, inside = many.images[:200].float().mean(1), many.masks[:200] > 0

    def iou(found):
        return ((found & inside).sum() / (found | inside).sum()).item()

    rules = [rule for t in range(0, 256, 8) for rule in (brightness >= t, brightness < t)]
    assert max(map(iou, rules)) < 0.4  # calling everything an object gives 0.26


@pytest.mark.parametrize("size", SIZES)
def test_where_the_mask_is_empty_the_object_left_no_trace(size, monkeypatch):
    # Repainting the objects in black moves no pixel outside of the masks by more than the soft rim of one pixel.
    image, mask = scenes._scene("train", 7, size, 0, CLASSES)
    monkeypatch.setattr(scenes, "_objects", lambda: {"train": np.minimum(objects["train"], 1)})
    black, same = scenes._scene("train", 7, size, 0, CLASSES)
    changed = (image != black).any(0)
    assert np.array_equal(mask, same)
    assert changed[mask > 0].mean() > 0.9
    rim = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), 5, 1, 2)[0].numpy() > 0
    assert not changed[~rim].any()


@pytest.mark.parametrize("classes", [("bag",), ("coat", "shirt"), ("sneaker", "trouser"), NAMES])
def test_any_choice_of_classes_works(classes):
    _, masks, labels = make_scenes("val", 60, classes=classes)
    assert masks.max() == len(classes) == labels.shape[1]
    assert (labels.sum(0) > 0).all() and (labels.sum(1) > 0).all()


def test_the_readers_list_of_classes_will_do():
    assert equal(make_scenes("val", 2, classes=list(CLASSES)), make_scenes("val", 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="trian"), r"make_scenes: expected `split` to be one of train, val, test, got 'trian'"),
        (dict(count=-1), r"make_scenes: expected `count` in \[0, inf\], got -1"),
        (dict(start=-1), r"make_scenes: expected `start` in \[0, inf\], got -1"),
        (dict(seed=-1), r"make_scenes: expected `seed` in \[0, inf\], got -1"),
        (dict(size=63), r"make_scenes: expected `size` in \[64, 448\], got 63"),
        (dict(size=449), r"make_scenes: expected `size` in \[64, 448\], got 449"),
        (dict(classes=()), r"make_scenes: expected `classes` to be distinct names out of T-shirt, .* got \(\)"),
        (dict(classes=("bag", "bag")), r"make_scenes: expected `classes` to be distinct"),
        (dict(classes=("bag", "hat")), r"make_scenes: expected `classes` to be distinct .* got \('bag', 'hat'\)"),
        (dict(classes=(*NAMES, "bag")), r"make_scenes: expected `classes` to be distinct"),
        (dict(classes="bag"), r"make_scenes: expected `classes` to be distinct .* got 'bag'"),
    ],
)
def test_what_cannot_be_composed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(**{"split": "train", "count": 1} | arguments)


# The data file ----------------------------------------------------------------------------------------------------


def test_the_data_file_is_the_one_its_licence_notice_describes():
    notice = scenes.DATA.with_suffix(".LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in notice and "Zalando SE" in notice
    for split, count in {"train": 600, "val": 150, "test": 250}.items():
        assert (objects[split].shape, objects[split].dtype) == ((10, count, 28, 28), np.uint8)
        assert f"{digest(objects[split])}  {split}" in notice


def test_no_object_is_in_two_splits():
    pools = {split: {grey.tobytes() for grey in objects[split].reshape(-1, 784)} for split in objects}
    assert {split: len(pool) for split, pool in pools.items()} == {"train": 6000, "val": 1500, "test": 2500}
    assert len(set.union(*pools.values())) == 10_000


def test_each_split_draws_from_its_own_objects():
    for split in objects:
        drawn = [at.grey for i in range(40) for at in scenes._layout(scenes._Random(0, 0, i), split, CLASSES)]
        pool = {grey.tobytes() for grey in objects[split].reshape(-1, 28, 28)}
        assert all(grey.tobytes() in pool or grey[:, ::-1].tobytes() in pool for grey in drawn)


def test_masks_of_objects_have_no_holes():
    for grey in objects["test"][:, ::10].reshape(-1, 28, 28):
        assert np.array_equal(binary_fill_holes(grey > 0), grey > 0)


def test_objects_are_rebuilt_from_the_archives_as_the_notice_says(tmp_path):
    archives = {}
    for archive, count in {"train": 760, "t10k": 260}.items():
        number = np.arange(10 * count)
        labels = (number % 10).astype(np.uint8)
        photographs = np.zeros((10 * count, 28, 28), np.uint8)
        photographs[:, 5:12, 5:12] = 11 + (number // 10 % 200)[:, None, None]  # tells which one of its class it is
        photographs[:, 8, 8] = 0  # a hole
        photographs[:, 9, 9] = 10  # another, not quite black
        photographs[:, 20, 20] = 10  # dust
        photographs[:, 0, 0] = 20 + labels
        photographs[:, 27, 27] = {"train": 40, "t10k": 50}[archive]
        archives[archive] = photographs
        for kind, header, data in (("images-idx3", 16, photographs), ("labels-idx1", 8, labels)):
            with gzip.open(tmp_path / f"{archive}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(bytes(header) + data.tobytes())
    build_objects(tmp_path, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as built:
        for split, (archive, first, last) in {
            "train": ("train", 0, 600), "val": ("train", 600, 750), "test": ("t10k", 0, 250)
        }.items():  # fmt: skip
            chosen = archives[archive].reshape(-1, 10, 28, 28)[first:last].swapaxes(0, 1).copy()
            chosen[..., 8, 8] = 1
            chosen[..., 20, 20] = 0
            assert np.array_equal(built[split], chosen)


# On disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk") / "deep" / "scenes"
    write_voc(root, train=3, val=1, test=2, size=96, seed=5)
    return root


def test_the_folders_are_those_of_voc(voc):
    names = [f"train_{i:06d}" for i in range(3)] + ["val_000000"] + [f"test_{i:06d}" for i in range(2)]
    files = sorted(str(path.relative_to(voc).as_posix()) for path in voc.rglob("*") if path.is_file())
    lists = [f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val", "test")]
    pairs = [f"{folder}.{kind}" for n in names for folder, kind in ((f"JPEGImages/{n}", "jpg"), (f"SegmentationClass/{n}", "png"))]  # fmt: skip # noqa: E501
    assert files == sorted([*lists, *pairs, "labels.csv"])
    assert [(voc / path).read_text().split() for path in lists] == [names[:3], names[3:4], names[4:]]


def test_what_is_written_is_what_is_made(voc):
    rows = list(csv.reader((voc / "labels.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["name", *CLASSES] and len(rows) == 7
    for name, *label in rows[1:]:
        split, number = name.split("_")
        scene = make_scenes(split, 1, 96, seed=5, start=int(number))
        assert [float(value) for value in label] == scene.labels[0].tolist()
        with Image.open(voc / "SegmentationClass" / f"{name}.png") as picture:
            assert picture.mode == "P"
            assert np.array_equal(np.array(picture.getpalette()).reshape(-1, 3)[:9], draw.palette(9))
        assert np.array_equal(draw.load_label(voc / "SegmentationClass" / f"{name}.png"), scene.masks[0].numpy())
        with Image.open(voc / "JPEGImages" / f"{name}.jpg") as picture:
            decoded = np.array(picture.convert("RGB")).transpose(2, 0, 1).astype(float)
        assert np.abs(decoded - scene.images[0].numpy()).mean() < 3  # of 255


def test_an_empty_folder_is_filled(tmp_path):
    write_voc(tmp_path / "a", train=1, val=0, test=0, size=64, classes=("bag", "dress"))
    (tmp_path / "b").mkdir()
    write_voc(tmp_path / "b", train=1, val=0, test=0, size=64, classes=("bag", "dress"))
    made = [sorted(p.relative_to(tmp_path / r) for p in (tmp_path / r).rglob("*")) for r in "ab"]
    assert made[0] == made[1] and len(made[0]) == 10
    assert (tmp_path / "b" / "ImageSets" / "Segmentation" / "val.txt").read_text() == ""


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    for root in (tmp_path, tmp_path / "mine"):
        with pytest.raises(FileExistsError, match=r"write_voc: expected `root` to be a new or an empty folder, got .*"):
            write_voc(root, train=1, val=0, test=0, size=64)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail_at_third(path, label, saved=[]):  # noqa: B006
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(draw, "save_label", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_voc(tmp_path / "scenes", train=5, val=0, test=0, size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(val=-1), r"write_voc: expected `val` in \[0, inf\], got -1"),
        (dict(size=500), r"make_scenes: expected `size` in \[64, 448\], got 500"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_voc(tmp_path / "scenes", **{"train": 1, "val": 0, "test": 0} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"write_voc: needs Pillow.*pip install -e '\.\[examples\]'"):
        write_voc(tmp_path / "scenes")


def test_the_command_writes_scenes(tmp_path, monkeypatch):
    options = ["--train", "2", "--val", "1", "--test", "0", "--size", "64", "--classes", "bag", "dress"]
    monkeypatch.setattr(sys, "argv", ["scenes.py", "write", "--root", str(tmp_path / "scenes"), *options])
    runpy.run_path(scenes.__file__, run_name="__main__")
    assert (tmp_path / "scenes" / "labels.csv").read_text().startswith("name,bag,dress\ntrain_000000,")
    assert len(list((tmp_path / "scenes" / "JPEGImages").iterdir())) == 3
