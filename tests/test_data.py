"""Prepared folders, files of every kind, and sampling by number."""

import json
import os
import random
import re
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipe.config import VOC
from recipe.data import (
    EvalImages,
    Item,
    SceneImages,
    Split,
    TrainImages,
    decoding,
    loading,
    read_image,
    read_mask,
    read_split,
    samples,
    training_data,
    write_split,
)
from recipe.files import write_text, written
from recipe.scenes import Scenes, make_scenes
from torch.utils.data import DataLoader, Dataset

from ffr.draw import save_label

CLASSES = ("cat", "dog", "Käse")
SIZES = [(40, 52), (52, 40), (33, 33), (7, 90), (64, 48)]  # H x W


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five noisy photographs with masks and labels, listed as train and val."""
    root, rng, items = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0), []
    (root / "sub").mkdir()
    for i, size in enumerate(SIZES):
        name = f"sub/ph oto.{i} é"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / f"{name}.png")
        mask = np.full(size, i % 4, np.uint8)
        mask[0] = 255
        save_label(root / f"{i}.png", mask)
        items.append(Item(name, root / f"{name}.png", root / f"{i}.png", tuple(range(i % 4))))
    write_split(root, "train", CLASSES, items)
    write_split(root, "val", CLASSES, [items[0], items[1]._replace(mask=None, labels=None)])
    return root


def unread(count, classes=3):
    """A split whose files nobody opens."""
    items = (Item(str(i), Path(f"{i}.png"), None, (i % classes,)) for i in range(count))
    return Split(tuple("abcdefgh"[:classes]), tuple(items))


# Prepared folders -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(folder):
    split = read_split(folder, "train")
    assert split.classes == CLASSES and len(split.items) == 5
    assert split.items[2] == Item("sub/ph oto.2 é", folder / "sub/ph oto.2 é.png", folder / "2.png", (0, 1))
    assert read_split(folder, "val").items[1][2:] == (None, None)


def test_a_prepared_folder_can_be_moved(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert all(item.image.is_relative_to(tmp_path) for item in read_split(tmp_path / "moved", "train").items)


def test_files_in_a_folder_that_is_named_by_a_link_are_inside_it(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    path = write_split(tmp_path / "link", "linked", CLASSES, [Item("x", tmp_path / "link/0.png", folder / "0.png", ())])
    entry = json.loads(path.read_text(encoding="utf-8"))["items"][0]
    assert (entry["image"], entry["mask"]) == ("0.png", "0.png")
    path.unlink()


def test_files_elsewhere_are_listed_by_their_absolute_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    path = write_split(tmp_path, "train", CLASSES, [Item("x", Path("sub/ph oto.0 é.png"), None, ())])
    assert json.loads(path.read_text(encoding="utf-8"))["items"][0]["image"] == str(folder / "sub/ph oto.0 é.png")
    assert read_split(tmp_path, "train").items[0].labels == ()


GOOD = {"name": "x", "image": "sub/ph oto.0 é.png", "mask": None, "labels": [0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"expected JSON with \"classes\" and \"items\" in .*odd\.json"),
        ({"classes": ["a"]}, r"odd\.json \('items'\)"),
        ({"classes": ["a"], "items": []}, r"odd\.json lists no image"),
        ({"classes": [], "items": [GOOD]}, r"odd\.json: expected the classes as a list of names, got \[\]"),
        ({"classes": ["a", "a"], "items": [GOOD]}, r"odd\.json: the class 'a' is listed twice"),
        ({"classes": ["a"], "items": [GOOD, GOOD]}, r"odd\.json: the name 'x' is listed twice"),
        ({"classes": ["a"], "items": [{"name": "x"}]}, r"item 0 of .*odd\.json is no entry \(KeyError\('image'\)\)"),
        ({"classes": ["a"], "items": [GOOD, 3]}, r"item 1 of .*odd\.json is no entry"),
        ({"classes": ["a"], "items": [GOOD | {"labels": [1]}]}, r"odd\.json: expected labels in 0\.\.0 for 'x', got 1"),
        ({"classes": ["a"], "items": [GOOD | {"labels": ["a"]}]}, r"expected labels in 0\.\.0 for 'x', got 'a'"),
        ({"classes": ["a", "b"], "items": [GOOD | {"labels": [True]}]}, r"expected labels in 0\.\.1 for 'x', got True"),
        ({"classes": ["a"], "items": [GOOD | {"labels": [0, 0]}]}, r"a label of 'x' is listed twice"),
        ({"classes": ["a"], "items": [GOOD | {"name": "../x"}]}, r"'\.\./x' is no name of an image"),
        ({"classes": ["a"], "items": [GOOD | {"name": "/x"}]}, r"'/x' is no name of an image"),
        ({"classes": ["a"], "items": [GOOD | {"name": " "}]}, r"' ' is no name of an image"),
        ({"classes": ["a"], "items": [GOOD | {"name": "a\\b"}]}, r"'a\\\\b' is no name of an image"),
        ({"classes": ["a"], "items": [GOOD | {"name": "a\0b"}]}, r"'a\\x00b' is no name of an image"),
        ({"classes": ["a"], "items": [GOOD | {"image": "no.png"}]}, r"image of 'x' in .* is missing: .*no\.png"),
        ({"classes": ["a"], "items": [GOOD | {"mask": "no.png"}]}, r"mask of 'x' in .* is missing: .*no\.png"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_file_and_entry(text, message, folder):
    (folder / "odd.json").write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_split(folder, "odd")
    (folder / "odd.json").unlink()


def test_a_missing_split_names_those_that_are_there(folder):
    with pytest.raises(FileNotFoundError, match=r"no .*test\.json; splits found: train, val\. Check --data and"):
        read_split(folder, "test")


def test_a_failing_write_keeps_the_list_that_was_there(folder, monkeypatch):
    before = (folder / "val.json").read_bytes()

    def full(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*val\.json'"):
        write_split(folder, "val", CLASSES, read_split(folder, "train").items)
    assert (folder / "val.json").read_bytes() == before and not list(folder.glob(".*"))


def test_a_file_is_on_the_disk_before_its_name_is_and_anybody_may_read_it(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, call=call: (done.append(name), call(*given)))
    write_text(tmp_path / "list.txt", "a\n")
    assert done == ["fsync", "replace"]
    assert (tmp_path / "list.txt").stat().st_mode & 0o777 == 0o644


def test_an_error_without_a_number_keeps_its_words(tmp_path):
    with pytest.raises(OSError, match=r"^no room$"), written(tmp_path / "list.txt"):
        raise OSError("no room")


# Files ------------------------------------------------------------------------------------------------------------

RGB = np.random.default_rng(1).integers(0, 256, (6, 9, 3), np.uint8)


def test_rgb_is_read_as_it_is(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_becomes_rgb(bits, tmp_path):
    grey = RGB[..., 0].copy()
    grey[0, 0] = 255
    Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) * 257).save(tmp_path / "a.png")  # white is 65535
    assert np.array_equal(read_image(tmp_path / "a.png").numpy(), np.stack([grey] * 3))


def test_black_and_white_becomes_rgb(tmp_path):
    Image.fromarray(RGB[..., 0] > 99).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[1].numpy(), 255 * (RGB[..., 0] > 99))


def test_a_palette_is_looked_up(tmp_path):
    save_label(tmp_path / "a.png", np.full((2, 3), 15))
    assert read_image(tmp_path / "a.png")[:, 1, 2].tolist() == [192, 128, 128]


def test_what_is_transparent_shows_white(tmp_path):
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[:3] = 0
    Image.fromarray(np.concatenate([RGB, alpha], 2)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert (image[:3] == 255).all() and np.array_equal(image[3:], RGB[3:])
    Image.fromarray(np.concatenate([RGB[..., :1], alpha], 2)).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png").permute(1, 2, 0).numpy()[:3] == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0])
    palette.save(tmp_path / "c.png", transparency=0)
    assert (read_image(tmp_path / "c.png") == 255).all()


def test_cmyk_is_converted(tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert (read_image(tmp_path / "a.jpg")[:, 4, 4].int() - torch.tensor([200, 30, 90])).abs().max() <= 3


@pytest.mark.parametrize(("orientation", "turns", "mirrored"), [(1, 0, False), (3, 2, False), (6, 3, False), (8, 1, False), (2, 0, True)])  # fmt: skip # noqa: E501
def test_exif_orientation_is_obeyed(orientation, turns, mirrored, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(RGB[:, ::-1] if mirrored else RGB, turns)
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), expected)


def hurt(path, kind):
    """A file that is broken in one of the ways that happen."""
    if kind == "truncated":
        Image.effect_noise((90, 80), 60).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "folder"])
def test_a_broken_file_is_named(kind, suffix, tmp_path):
    path = hurt(tmp_path / f"photo.{suffix}", kind)
    with pytest.raises(ValueError, match=rf"read_image: cannot read .*photo\.{suffix}: .+"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"read_mask: cannot read .*photo\.{suffix}: .+"):
        read_mask(path, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_image: there is no file .*no\.jpg"):
        read_image(tmp_path / "no.jpg")
    with pytest.raises(FileNotFoundError, match=r"read_mask: there is no file .*no\.png"):
        read_mask(tmp_path / "no.png", 3)


def test_a_large_image_is_read_without_a_warning_and_a_larger_one_refused_with_a_remedy(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_100_000)
    for name, height in (("large.png", 2000), ("larger.png", 3000)):
        Image.new("L", (1000, height)).save(tmp_path / name)
    assert read_image(tmp_path / "large.png").shape == (3, 2000, 1000)
    assert read_mask(tmp_path / "large.png", 3).shape == (2000, 1000)
    assert not recwarn
    message = r"cannot read .*larger\.png: Image size \(3 megapixels\) exceeds limit of 2 megapixels: shrink it\.$"
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "larger.png")


def test_a_warning_is_given_once_and_not_for_every_file(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "holiday"
    for n in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.jpg", exif=exif.tobytes()[:-4])
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for n in range(5):
            read_image(tmp_path / f"{n}.jpg")
    assert len(given) == 1


def test_want_of_memory_is_no_fault_of_a_file():
    with pytest.raises(MemoryError), decoding("read_image", "a.jpg"):
        raise MemoryError


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("F", 0.5)])
def test_values_of_unknown_range_are_refused(mode, value, tmp_path):
    Image.new(mode, (4, 4), value).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: its values .*; save it with 8 bits"):
        read_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["P", "L"])
def test_masks_are_indexed_or_grey(mode, tmp_path):
    mask = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    if mode == "P":
        save_label(tmp_path / "m.png", mask)
    else:
        Image.fromarray(mask).save(tmp_path / "m.png")
    read = read_mask(tmp_path / "m.png", 4, (2, 3))
    assert read.dtype == torch.uint8 and np.array_equal(read.numpy(), mask)
    with pytest.raises(ValueError, match=r"expected values 0\.\.2 or 255, got 3 in .*m\.png"):
        read_mask(tmp_path / "m.png", 3)


def test_a_foreign_value_is_named(tmp_path):
    save_label(tmp_path / "m.png", np.array([[0, 137, 200, 255]]))
    with pytest.raises(ValueError, match=r"read_mask: expected values 0\.\.20 or 255, got 137, 200 in .*m\.png"):
        read_mask(tmp_path / "m.png", 21)


def test_a_mask_of_another_size_is_refused(tmp_path):
    save_label(tmp_path / "m.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected 4 x 3 pixels \(H x W\) as its image, got 3 x 4 in .*m\.png"):
        read_mask(tmp_path / "m.png", 3, (4, 3))


@pytest.mark.parametrize(("size", "hint"), [((4, 3), True), ((4, 4), False)])
def test_a_mask_with_its_sides_swapped_gets_a_hint_at_the_orientation(size, hint, tmp_path):
    save_label(tmp_path / "m.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(ValueError, match="got 3 x 4") as error:
        read_mask(tmp_path / "m.png", 3, size)
    assert ("EXIF orientation: turn the mask" in str(error.value)) is hint


def test_colours_are_no_labels(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"cannot read .*m\.png: .*expected an indexed or 8-bit grey PNG.*RGB"):
        read_mask(tmp_path / "m.png", 21)


# Training ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_visits_every_image_exactly_once(count, seed, epoch):
    images = TrainImages(unread(count), seed=seed)
    names = [images.item(n).name for n in range(epoch * count, (epoch + 1) * count)]
    assert sorted(names, key=int) == [str(i) for i in range(count)]


def test_epochs_and_seeds_differ_in_their_order():
    orders = {
        tuple(TrainImages(unread(30), seed=seed).item(epoch * 30 + i).name for i in range(30))
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(orders) == 12


def test_a_sample_depends_on_seed_and_number_alone(folder):
    split, numbers = read_split(folder, "train"), [0, 7, 3, 23, 4, 1]
    images = TrainImages(split, crop=24, seed=5)
    first = {n: images[n] for n in numbers}
    again = TrainImages(split, crop=24, seed=5)
    for n in reversed(numbers):
        torch.rand(n)  # whatever else draws random numbers
        assert all(torch.equal(a, b) for a, b in zip(first[n], again[n], strict=True))
    other = TrainImages(split, crop=24, seed=6)
    assert not any(torch.equal(first[n][0], other[n][0]) for n in numbers)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_samples(workers, folder):
    images = TrainImages(read_split(folder, "train"), crop=24, seed=5)
    batches = [samples(step, 4, 0, 1) for step in range(3)]
    for (loaded, labels), numbers in zip(DataLoader(images, batch_sampler=batches, num_workers=workers), batches, strict=True):  # fmt: skip # noqa: E501
        assert torch.equal(loaded, torch.stack([images[n][0] for n in numbers]))
        assert torch.equal(labels, torch.stack([images[n][1] for n in numbers]))


def test_every_visit_of_an_image_differs(folder):
    images = TrainImages(Split(CLASSES, read_split(folder, "train").items[:1]), crop=24)
    crops = [images[n][0] for n in range(12)]
    assert not any(torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_no_random_state_but_its_own_is_touched(folder):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    images, before = TrainImages(read_split(folder, "train"), crop=24), state()
    crops = [images[n] for n in range(4)]
    assert state() == before and len(crops) == 4
    with pytest.raises(IndexError):
        images[-1]
    SceneImages(make_scenes("train", 3), 2, 0).batch(0)
    assert state() == before


def test_crops_have_their_size_and_keep_the_labels_of_their_image(folder):
    images = TrainImages(read_split(folder, "train"), crop=24)
    for n in range(15):
        crop, labels = images[n]
        assert (crop.shape, crop.dtype) == ((3, 24, 24), torch.uint8)
        assert labels.dtype == torch.float32
        assert tuple(labels.nonzero().flatten().tolist()) == images.item(n).labels


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_without_crop_and_colour_the_image_is_itself_or_its_mirror(flip, folder):
    square = tuple(item for item in read_split(folder, "train").items if item.name.startswith("sub/ph oto.2"))
    images = TrainImages(Split(CLASSES, square), crop=33, scale=(1.0, 1.0), flip=flip, jitter=0.0)
    source = read_image(square[0].image)
    for n in range(5):  # a blur, or a normalisation, would show
        assert torch.equal(images[n][0], source.flip(-1) if flip else source)


def test_flips_and_colours_come_half_of_the_time(folder):
    split = Split(CLASSES, read_split(folder, "train").items[2:3])
    source = read_image(split.items[0].image)
    plain = TrainImages(split, crop=33, scale=(1.0, 1.0), jitter=0.0)
    mirrored = sum(torch.equal(plain[n][0], source.flip(-1)) for n in range(100))
    coloured = TrainImages(split, crop=33, scale=(1.0, 1.0), flip=0.0)
    kept = sum(torch.equal(coloured[n][0], source) for n in range(100))
    assert 30 < mirrored < 70 and 30 < kept < 70


def test_a_crop_covers_the_asked_share_of_the_image(tmp_path):
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[:, None, None], (250, 250, 3))  # a row knows its height
    Image.fromarray(ramp).save(tmp_path / "a.png")
    split = Split(("a",), (Item("a", tmp_path / "a.png", None, ()),))
    images = TrainImages(split, crop=50, scale=(0.32, 0.5), jitter=0.0)
    heights = [(int(images[n][0].max()) - int(images[n][0].min()) + 1) / 250 for n in range(60)]
    low, high = (0.32 * 0.75) ** 0.5, (0.5 / 0.75) ** 0.5  # aspect ratios from 3/4 to 4/3
    assert low - 0.02 < min(heights) < 0.55 and 0.7 < max(heights) < high + 0.02


def test_the_hue_is_among_the_colours_that_move(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    images = TrainImages(Split(("a",), (Item("a", tmp_path / "a.png", None, ()),)), crop=9, jitter=1.0)
    colours = [images[n][0][:, 4, 4].tolist() for n in range(20)]
    assert any(green > blue for _, green, blue in colours) and any(green < blue for _, green, blue in colours)


def test_the_settings_of_a_run_decide_how_its_images_are_augmented(folder):
    plain = replace(VOC, data=folder, crop=33, crop_scale=(1.0, 1.0), flip=1.0, jitter=0.0)
    n = next(n for n in range(5) if training_data(plain)[0].item(n).name.startswith("sub/ph oto.2"))  # the square one
    mirror = read_image(folder / "sub/ph oto.2 é.png").flip(-1)
    assert torch.equal(training_data(plain)[0][n][0], mirror)
    for other in ({"crop_scale": (0.3, 0.3)}, {"flip": 0.0}, {"jitter": 1.0}):
        assert not torch.equal(training_data(replace(plain, **other))[0][n][0], mirror)
    assert training_data(replace(plain, seed=1))[0].seed == 1


def test_scenes_are_flipped_shifted_and_recoloured_and_no_edge_is_filled_with_black():
    ramp = torch.arange(100, 220, 4, dtype=torch.uint8).expand(1, 3, 30, 30)  # a row shows flip and shift
    batch, _ = SceneImages(Scenes(ramp, torch.zeros(1, 30, 30), torch.ones(1, 1)), 64, 0).batch(0)
    flipped = batch[:, 0, 0, 8] > batch[:, 0, 0, 22]
    assert 16 < flipped.sum() < 48
    assert batch.min() > 0.15
    assert batch[:, 0].amax((1, 2)).std() > 0.05  # bright and dark ones
    assert len({int(row.argmax()) for row in batch[~flipped][:, 0, 0]}) > 2  # the right edge has moved


class Patience(Dataset):
    """Whether the process that reads leaves Ctrl-C to another."""

    def __getitem__(self, index):
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_workers_leave_an_interruption_to_the_process_that_they_work_for():
    for workers in (0, 1):
        with loading(Patience(), sampler=[0], batch_size=None, num_workers=workers) as answers:
            ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as of a shell's background job
            assert next(answers) is (bool(workers) or ignored)


def test_a_broken_image_is_named_when_its_turn_comes(tmp_path):
    item = Item("a", hurt(tmp_path / "a.jpg", "truncated"), None, (0,))
    with pytest.raises(ValueError, match=r"cannot read .*a\.jpg: image file is truncated"):
        TrainImages(Split(("x",), (item,)))[3]


def test_training_without_labels_is_refused(folder):
    with pytest.raises(ValueError, match=r"TrainImages: 'sub/ph oto\.1 é' has no labels"):
        TrainImages(read_split(folder, "val"))


@pytest.mark.parametrize("arguments", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.4)}, {"scale": (0.5, 1.1)}, {"crop": 0}, {"seed": -1}])  # fmt: skip # noqa: E501
def test_unusable_arguments_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=rf"TrainImages: expected .*`{next(iter(arguments))}`"):
        TrainImages(unread(3), **arguments)


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_a_step_and_parts_are_the_same_for_any_number_of_them(step, ranks, accumulate, share):
    size = ranks * accumulate * share
    mine = [samples(step, size, rank, ranks, accumulate) for rank in range(ranks)]
    assert sorted(n for numbers in mine for n in numbers) == list(range(step * size, (step + 1) * size))
    alone = samples(step, size, 0, 1, accumulate)
    for part in range(accumulate):
        together = [n for numbers in mine for n in numbers[part * share : (part + 1) * share]]
        assert sorted(together) == alone[part * share * ranks : (part + 1) * share * ranks]


def test_a_rank_gets_its_own_numbers():
    assert samples(2, 8, 1, 2, accumulate=2) == [18, 19, 22, 23]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 0, 3), r"`batch_size` \(global\) to be a multiple of ranks x accumulate = 3 x 1, got 8"),
        ((0, 8, 0, 2, 3), r"= 2 x 3, got 8"),
        ((0, 8, 2, 2), r"rank=2, world_size=2"),
        ((-1, 8, 0, 2), r"step=-1"),
        ((0, 0, 0, 1), r"batch_size=0"),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        samples(*arguments)


# Evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_shows_images_as_they_are(folder):
    split = read_split(folder, "train")
    for item, size, example in zip(split.items, SIZES, EvalImages(split), strict=False):
        assert example.name == item.name and example.image.shape == (3, *size) and example.mask.shape == size
        assert torch.equal(example.image, read_image(item.image))
        assert tuple(example.labels.nonzero().flatten().tolist()) == item.labels and example.labels.shape == (3,)
    assert len(EvalImages(split)) == 5


def test_what_is_unknown_is_none(folder):
    dataset = EvalImages(read_split(folder, "val"))
    examples = [dataset[number] for number in range(len(dataset))]
    assert examples[0].mask is not None and examples[0].labels is not None
    assert examples[1].mask is None and examples[1].labels is None and examples[1].image.ndim == 3


def test_evaluation_names_a_mask_that_does_not_fit(folder):
    items = read_split(folder, "train").items
    swapped = Split(CLASSES, (items[0]._replace(mask=items[1].mask),))
    with pytest.raises(ValueError, match=re.escape(str(items[1].mask))):
        EvalImages(swapped)[0]
