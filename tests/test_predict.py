"""predict.py: images of every kind to label maps, restartable, and nothing lost to a broken file."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import predict as script
import pytest
import recipe.files
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipe.config import SCENES
from recipe.data import read_image
from recipe.evaluation import Protocol, look, scales_of, segment
from recipe.network import small_ffr
from recipe.scenes import make_scenes
from recipe.weights import save_weights
from torch.nn import functional as F

from ffr import DenseCRF
from ffr.draw import load_label, overlay, palette

CLASSES = ("cat", "dog", "Käse")
SIZES = {"a/x": (48, 64), "b/x": (33, 47), "thin": (7, 90), "one": (1, 1), "tall": (200, 60)}  # H x W


def network(seed=0):
    torch.manual_seed(seed)
    model = small_ffr(len(CLASSES), 64, hidden=32)
    torch.nn.init.normal_(model.head.last.weight)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(path, network().state_dict(), replace(SCENES, hidden=32), CLASSES)
    return path


@pytest.fixture(scope="module")
def scenes():
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in make_scenes("test", len(SIZES)).images]


@pytest.fixture
def photos(tmp_path, scenes):
    root = tmp_path / "photos"
    for scene, (name, size) in zip(scenes, SIZES.items(), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        scene.resize(size[::-1]).save(root / f"{name}.png")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def command(weights, tmp_path, monkeypatch, capsys):
    """Run predict.py: exit code and what it said; pictures are in tmp_path / "out"."""

    def run(*given, out="out"):
        usual = {"weights": weights, "out": tmp_path / out, "workers": 0, "device": "cpu", "crf-workers": 0}
        flags = [part for key, value in usual.items() if f"--{key}" not in given for part in (f"--{key}", value)]
        monkeypatch.setattr("sys.argv", ["predict.py", *map(str, (*given, *flags))])
        monkeypatch.setenv("COLUMNS", "200")
        code = script.command("predict", script.Settings, script.run, script.__doc__)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def scores_of(image, protocol):
    size = tuple(image.shape[1:])
    return segment(look(network(), image[None], scales_of([protocol])), protocol, size, 4)[0]


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi", [False, True])
def test_label_overlay_and_probabilities_are_those_of_the_evaluation(multi, command, photos, tmp_path):
    code, said = command(photos, "--probabilities", *["--multi"][: int(multi)])
    assert code == 0, said
    assert "of 5 images" in said and "skipped 0" in said
    protocol = Protocol((1.0, 1.25, 1.5), flip=True) if multi else Protocol()
    for name, size in SIZES.items():
        image = read_image(photos / f"{name}.png")
        scores = scores_of(image, protocol)
        label = load_label(tmp_path / f"out/labels/{name}.png")
        assert label.shape == size and np.array_equal(label, scores.argmax(0).numpy())
        with Image.open(tmp_path / f"out/labels/{name}.png") as picture:
            assert picture.mode == "P" and picture.getpalette() == palette().flatten().tolist()
        with np.load(tmp_path / f"out/probabilities/{name}.npz") as stored:
            assert stored["labels"].tolist() == ["background", *CLASSES]
            assert stored["probabilities"].dtype == np.float16
            np.testing.assert_allclose(stored["probabilities"], scores.softmax(0).numpy(), atol=1e-3)
        with Image.open(tmp_path / f"out/overlays/{name}.jpg") as picture:
            drawn = np.array(picture).astype(float)
        assert np.abs(drawn - overlay(image, label)).mean() < 12  # JPEG
    assert len(files(tmp_path / "out")) == 16


def test_the_crf_refines_what_the_network_says(command, photos, tmp_path):
    code, said = command(photos / "a", "--crf", "--no-overlays", "--probabilities")
    assert code == 0, said
    image = read_image(photos / "a/x.png")
    refined = DenseCRF()(image, scores_of(image, Protocol()).softmax(0))
    assert np.array_equal(load_label(tmp_path / "out/labels/x.png"), refined.argmax(0).numpy())
    with np.load(tmp_path / "out/probabilities/x.npz") as stored:
        np.testing.assert_allclose(stored["probabilities"], refined.numpy(), atol=1e-3)
    assert files(tmp_path / "out") == ["labels/x.png", "predict.json", "probabilities/x.npz"]


def test_several_images_wait_for_the_crf_in_processes(command, photos, tmp_path):
    code, said = command(photos, "--crf", "--crf-workers", 1, "--no-overlays", out="many")
    assert code == 0 and "of 5 images" in said, said
    command(photos, "--crf", "--no-overlays")
    for name in SIZES:
        one, other = (load_label(tmp_path / f"{out}/labels/{name}.png") for out in ("many", "out"))
        assert np.array_equal(one, other)


def test_a_large_image_is_shrunk_for_the_network_and_its_label_enlarged(command, photos, tmp_path):
    code, said = command(photos / "tall.png", "--max-side", 100, "--probabilities")
    assert code == 0, said
    image = read_image(photos / "tall.png")
    small = F.interpolate(image[None].float(), size=(100, 30), mode="bilinear", antialias=True).round().byte()[0]
    scores = scores_of(small, Protocol())
    enlarged = F.interpolate(scores[None], size=(200, 60), mode="bilinear")[0]
    assert np.array_equal(load_label(tmp_path / "out/labels/tall.png"), enlarged.argmax(0).numpy())
    with np.load(tmp_path / "out/probabilities/tall.npz") as stored:
        assert stored["probabilities"].shape == (4, 200, 60)
        assert np.abs(stored["probabilities"].astype(float).sum(0) - 1).max() < 1e-2


def test_a_line_is_shrunk_to_a_line():
    assert script.shrunk(torch.zeros(3, 1, 5000, dtype=torch.uint8), 1024).shape == (3, 1, 1024)


def test_of_equal_scores_the_first_counts_at_any_size():
    scores = torch.tensor([[[1.0]], [[2.0]], [[2.0]]]).expand(3, 2, 2)
    assert (script.best_label(scores, (2, 2)) == 1).all() and (script.best_label(scores, (5, 7)) == 1).all()
    lower = torch.full((3, 3), 0.7)  # mixing rounds it and the next number to the same, here and there
    scores = torch.stack([lower, lower.nextafter(torch.tensor(1.0))])
    whole = torch.stack([script.enlarged(channel, (7, 5)) for channel in scores])
    assert torch.equal(script.best_label(scores, (7, 5)), whole.argmax(0).byte())


def test_a_label_that_is_best_nowhere_may_be_so_between_two_pixels_and_one_below_another_never():
    scores = torch.tensor([[10.0, 0], [9, 9], [0, 10], [8, 8], [-torch.inf, -torch.inf]])[:, None]
    assert script.contenders(scores[:4]) == [0, 1, 2]
    assert script.best_label(scores[:4], (1, 6)).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert script.best_label(scores, (1, 6)).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_labels_that_cannot_win_are_looked_for_only_where_scores_are_enlarged(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "contenders", lambda scores: asked.append(len(scores)) or [0, 1])
    for size, times in (((5, 4), 0), ((10, 8), 1)):
        script.best_label(torch.randn(2, 5, 4), size)
        assert len(asked) == times


@given(
    st.integers(0, 2**32), st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 30)] * 2), st.floats(0, 9)
)
def test_the_best_label_is_that_of_all_scores_enlarged(seed, shape, size, spread):
    generator = torch.Generator().manual_seed(seed)
    levels = spread * torch.randn(shape[0], 1, 1, generator=generator)  # with a large spread few labels are left
    scores = levels + torch.randn(shape, generator=generator).round(decimals=1)
    whole = np.stack([script.enlarged(channel, size).numpy() for channel in scores])
    assert np.array_equal(script.best_label(scores, size).numpy(), whole.argmax(0))


def test_grey_transparent_and_turned_images_are_what_a_viewer_shows(command, scenes, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    scene = scenes[0].resize((60, 44))
    grey = scene.convert("L")
    grey.save(root / "grey.png")
    grey.convert("RGB").save(root / "grey_rgb.png")
    clear = scene.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.where(np.arange(60) < 30, 255, 0).astype(np.uint8), (44, 1))))
    clear.save(root / "clear.png")
    white = np.array(scene)
    white[:, 30:] = 255
    Image.fromarray(white).save(root / "clear_rgb.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to show it
    scene.save(root / "turned.png", exif=exif)
    scene.transpose(Image.Transpose.ROTATE_270).save(root / "turned_rgb.png")
    assert command(root)[0] == 0
    for kind in ("grey", "clear", "turned"):
        one, other = (load_label(tmp_path / f"out/labels/{name}.png") for name in (kind, f"{kind}_rgb"))
        assert np.array_equal(one, other) and len(np.unique(one)) > 1
    assert one.shape == (60, 44)


# Broken and repeated ----------------------------------------------------------------------------------------------


def test_a_broken_file_is_skipped_and_named_and_the_others_are_done(command, photos, tmp_path):
    (photos / "empty.png").touch()
    Image.open(photos / "a/x.png").save(photos / "cut.jpg")
    (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:-300])
    (photos / "text.jpg").write_text("no image")
    code, said = command(photos)
    assert code == 1 and "of 5 images" in said and "skipped 3" in said
    record = json.loads((tmp_path / "out/predict.json").read_text())
    assert sorted(record["skipped"]) == ["cut", "empty", "text"]
    for name in ("cut.jpg", "empty.png", "text.jpg"):
        assert f"skipped: {photos / name}: " in said
    assert len(files(tmp_path / "out/labels")) == 5


def test_an_image_that_is_too_large_for_the_memory_is_skipped_and_named(command, photos, monkeypatch):
    look = script.look

    def full(model, images, *how):
        if images.shape[2] == SIZES["tall"][0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(model, images, *how)

    monkeypatch.setattr(script, "look", full)
    code, said = command(photos)
    assert code == 1 and "of 4 images" in said
    assert "tall.png: the memory of cpu is too small for it; lower --max-side" in said


def test_more_labels_than_a_byte_holds_are_refused(command, photos, monkeypatch):
    monkeypatch.setattr(script, "load_weights", lambda *given: SimpleNamespace(classes=("x",) * 256))
    code, said = command(photos)
    assert code == 2 and "--weights: 256 classes and background do not fit into one byte a pixel" in said


def test_a_large_image_is_done_and_found_done_without_a_warning(command, photos, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert "of 1 images" in command(photos / "a")[1]
    assert "kept 1" in command(photos / "a")[1]
    assert not recwarn


def test_broken_files_alone_are_no_success(command, tmp_path):
    (tmp_path / "empty.png").touch()
    code, said = command(tmp_path / "empty.png")
    assert code == 2 and "skipped: " in said and "of 0 images" in said


def test_the_same_command_goes_on_where_it_was_cut_off(command, photos, tmp_path, monkeypatch):
    original, done = script.save, []

    def stop(settings, trained, name, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        original(settings, trained, name, *rest)

    monkeypatch.setattr(script, "save", stop)
    code, said = command(photos)
    assert code == 130 and "the same command goes on" in said
    monkeypatch.setattr(script, "save", original)
    out = tmp_path / "out"
    assert len(files(out / "labels")) == len(files(out / "overlays")) == 2
    (out / "labels/.0123.part").touch()  # of a run that was killed
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    code, said = command(photos)
    assert code == 0 and "of 3 images" in said and "kept 2 of an earlier run" in said
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(files(out)) == 11
    code, said = command(photos)
    assert code == 0 and "of 0 images" in said and "kept 5" in said


def test_a_folder_that_another_run_is_writing_to_is_left_to_it(command, photos, tmp_path, held_by_another):
    assert command(photos)[0] == 0
    part = tmp_path / "out/labels/.0123.part"  # which it is writing
    part.touch()
    with held_by_another(tmp_path / "out"):
        code, said = command(photos, "--overwrite")
        assert code == 2 and f"--out: another run is writing to {tmp_path / 'out'}. Wait for its end" in said
        assert part.exists()
    assert command(photos)[0] == 0
    assert not part.exists() and not (tmp_path / "out/.lock").exists()


def test_a_result_that_is_broken_or_older_than_its_image_or_not_there_is_made_again(command, photos, tmp_path):
    command(photos, "--probabilities")
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.name != "predict.json"}
    label = out / "labels/a/x.png"
    label.write_bytes(label.read_bytes()[:-60])
    (out / "overlays/b/x.jpg").write_bytes(b"")
    (out / "probabilities/thin.npz").unlink()
    os.utime(out / "labels/one.png", (0, 0))
    code, said = command(photos, "--probabilities")
    assert code == 0 and "of 4 images" in said and "kept 1" in said
    assert all(path.read_bytes() == data for path, data in before.items() if path.suffix != ".npz")
    torn = bytearray(before[out / "probabilities/tall.npz"])
    torn[len(torn) // 2] ^= 255
    (out / "probabilities/tall.npz").write_bytes(torn)
    code, said = command(photos, "--probabilities")
    assert code == 0 and "of 1 images" in said and "kept 4" in said
    code, said = command(photos, "--probabilities", "--overwrite")
    assert code == 0 and "of 5 images" in said


def test_pictures_of_other_settings_are_refused_or_replaced_and_nothing_else_is_touched(command, photos, tmp_path):
    command(photos)
    out = tmp_path / "out"
    (out / "labels/mine.png").write_bytes(b"mine")
    before = (out / "labels/a/x.png").read_bytes()
    code, said = command(photos, "--crf")
    assert code == 2 and "made with other settings (crf was False, now True)" in said and "--overwrite" in said
    assert (out / "labels/a/x.png").read_bytes() == before
    code, said = command(photos / "a", "--crf", "--overwrite")
    assert code == 0, said
    assert files(out) == ["labels/mine.png", "labels/x.png", "overlays/x.jpg", "predict.json"]


def test_each_setting_that_decides_a_pixel_makes_other_pictures(weights):
    usual = script.Settings(("photos",), weights)
    changes = {"crf": True}, {"crf_prune": 0.1}, {"max_side": 512}, {"alpha": 0.1}, {"precision": "bf16"}
    many = {"multi": True}, {"multi": True, "scales": (1.0,)}
    assert len({str(replace(usual, **change).same()) for change in ({}, *changes, *many)}) == 8
    assert replace(usual, out=Path("elsewhere"), workers=0, scales=(2.0,)).same() == usual.same()


def test_a_folder_with_something_else_is_refused(command, photos, tmp_path):
    for content in ("", "[]", '{"settings": 1}', '{"settings": {}, "images": 3}'):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/predict.json").write_text(content)
        code, said = command(photos, "--overwrite")
        assert code == 2 and "--out: " in said and "holds something else" in said
    (tmp_path / "file").touch()
    code, said = command(photos, out="file")
    assert code == 2 and "--out: expected a folder, got the file" in said


def test_an_output_that_cannot_be_written_to_is_refused_by_its_flag(command, photos, tmp_path, monkeypatch):
    def refused(**how):
        raise PermissionError(13, "Permission denied")

    long = tmp_path / ("x" * 300)
    code, said = command(photos, out=long)
    assert code == 2 and f"predict: --out: cannot write to {long} (File name too long). Name another folder." in said
    monkeypatch.setattr(recipe.files.tempfile, "TemporaryFile", refused)
    code, said = command(photos, out="out")
    wanted = f"predict: --out: cannot write to {tmp_path / 'out'} (Permission denied). Name another folder."
    assert code == 2 and wanted in said


def test_a_failing_write_names_the_file_and_leaves_no_half(command, photos, tmp_path, monkeypatch):
    def full(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, said = command(photos / "a", "--probabilities")
    assert code == 2 and "No space left on device" in said and "overlays/x.jpg" in said
    assert files(tmp_path / "out") == ["predict.json", "probabilities/x.npz"]


# Names ------------------------------------------------------------------------------------------------------------


def test_files_folders_and_globs_are_found_once_and_named_from_where_they_were_asked_for(photos, tmp_path):
    def named(*given):
        found, _ = script.find([str(each) for each in given], tmp_path / "out")
        return {name: path.relative_to(photos).as_posix() for name, path in script.name_all(found, {}).items()}

    everything = {name: f"{name}.png" for name in sorted(SIZES)}
    assert named(photos) == named(photos, photos / "thin.png") == named(photos / ".." / "photos") == everything
    assert named(photos / "**" / "*.png") == everything
    assert named(photos / "*.png", photos / "a" / "x.png") == {
        "one": "one.png", "tall": "tall.png", "thin": "thin.png", "x": "a/x.png",
    }  # fmt: skip
    assert named(photos / "a", photos / "b") == {"a/x": "a/x.png", "b/x": "b/x.png"}  # not two of "x"
    shutil.copy(photos / "one.png", photos / "one.BMP")
    shutil.copy(photos / "one.png", photos / "ONE.png")
    if len(list(photos.glob("[oO]*"))) == 3:  # a file system that tells them apart
        names = {"one.BMP": "one.BMP", "ONE.png~2": "ONE.png", "one.png~3": "one.png"}
        assert named(photos / "[oO]*") == names


def test_a_name_grows_until_it_reaches_the_folders_that_differ():
    found = {Path(f"/{one}/p/q/x.png"): Path(f"/{one}/p/q") for one in "ab"}
    assert [*script.name_all(found, {})] == ["a/p/q/x", "b/p/q/x"]


def test_linked_folders_are_searched_once_and_a_dead_link_is_skipped_and_named(command, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/linked").symlink_to(photos / "a")
    (photos / "a/back").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/gone.png").symlink_to(tmp_path / "nowhere.png")
    code, said = command(tmp_path / "mine")
    assert code == 1 and "mine/gone.png: read_image: there is no file" in said
    assert "labels/linked/x.png" in files(tmp_path / "out") and "of 1 images" in said


@pytest.mark.parametrize("pattern", ["**/*.png", "**", "*", "*/*", "**/**/*.png"])
def test_a_glob_follows_no_link_to_a_folder_above(pattern, photos, tmp_path):
    def named():
        found, _ = script.find([str(photos / pattern)], tmp_path / "out")
        return {path.relative_to(photos).as_posix() for path in found}

    before = named()
    (photos / "self").symlink_to(photos)
    (photos / "again").symlink_to(photos)  # glob.glob would not come to an end
    (photos / "a/up").symlink_to(photos)
    (photos / "loop").symlink_to(photos / "loop")
    assert named() == before
    (photos / "a/linked").symlink_to(photos / "b")
    assert named() == before | {"a/linked/x.png"}


def test_a_glob_may_go_up_again_and_a_slash_at_its_end_means_folders(photos, tmp_path):
    def named(pattern):
        found, _ = script.find([f"{photos}/{pattern}"], tmp_path / "out")
        return sorted(path.relative_to(photos).as_posix() for path in found)

    assert named("*/../a/*.png") == named("**/../a/*") == ["a/x.png"]
    assert named("*/..") == named("*/../") == named("**/") == named("**") == sorted(f"{name}.png" for name in SIZES)
    assert named("*/") == ["a/x.png", "b/x.png"]
    assert len(named("*")) == len(SIZES)


def test_up_from_a_linked_folder_is_where_it_leads(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(photos / "a", target_is_directory=True)
    for below in ("l*k/../b/*.png", "link/../b", "link/../b/x.png"):
        found, _ = script.find([f"{tmp_path}/elsewhere/{below}"], tmp_path / "out")
        assert all(path.is_file() for path in found) and {path.parent for path in found} == {photos.resolve() / "b"}


def test_files_that_are_no_images_are_counted_by_their_suffix(command, photos, tmp_path):
    (photos / ".trash").mkdir()
    for name in ("small.gif", "a/x.jfif", "a/y.GIF", "README", "._one.png", ".trash/x.png"):  # the hidden ones are none
        (photos / name).touch()
    for where in ([photos], [photos / "**"], [photos, photos / "a", photos / "*"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, said = command(*where)
        assert code == 0
        assert "5 other files in INPUTS are left alone (.gif 2, no suffix 1, .jfif 1, .txt 1); read are .bmp" in said
    for _ in range(2):  # what it writes is not counted
        assert "5 other files" in command(photos, out="photos/out")[1]
    code, said = command(photos / "a/x.png", out="one")
    assert code == 0 and "left alone" not in said
    named = photos / "notes.txt"  # taken at its word
    found, others = script.find([str(photos), str(named)], tmp_path / "new")
    assert named in found and named not in others and photos / "small.gif" in others


def test_pictures_below_the_output_are_no_input(command, photos, tmp_path):
    code, said = command(photos, out="photos/out")
    assert code == 0 and "of 5 images" in said
    code, said = command(photos, out="photos/out")
    assert code == 0 and "of 0 images" in said and "kept 5" in said
    code, said = command(photos / "out", out="photos/out")
    assert code == 2 and "INPUTS: all images lie below --out" in said


def test_an_image_keeps_its_name_when_others_come(command, photos, tmp_path):
    assert command(photos / "a")[0] == 0
    before = (tmp_path / "out/labels/x.png").read_bytes()
    assert command(photos / "b")[0] == 0  # its x.png must not be taken for done, nor take the other's place
    assert (tmp_path / "out/labels/x.png").read_bytes() == before
    assert files(tmp_path / "out/labels") == ["x.png", "x.png.png"]
    record = json.loads((tmp_path / "out/predict.json").read_text())
    assert record["images"] == {"x": str(photos / "a/x.png"), "x.png": str(photos / "b/x.png")}


parts = st.sampled_from(["a", "A", "b", "x.y"])
paths = st.lists(
    st.tuples(st.lists(parts, max_size=2), parts, st.sampled_from([".png", ".PNG", ".jpg"]), st.integers(0, 2)),
    min_size=1, max_size=12, unique_by=lambda each: (tuple(each[0]), *each[1:3]),
)  # fmt: skip


@given(paths, st.integers(0, 12))
def test_no_two_images_share_a_name_in_any_case_and_names_stay(chosen, split):
    base = Path("/r") if os.name == "posix" else Path("C:/r")
    found = {}
    for folders, stem, suffix, up in chosen:
        file = base.joinpath(*folders, stem + suffix)
        found[file] = base.joinpath(*folders[: max(0, len(folders) - up)])
    early = dict(list(found.items())[:split]) or found
    before = script.name_all(early, {})
    names = script.name_all(found, {name: str(file) for name, file in before.items()})
    assert sorted(names.values()) == sorted(found) and len({name.casefold() for name in names}) == len(found)
    assert all(names[name] == file for name, file in before.items())
    assert not any(name.startswith(("/", "..")) or "//" in name for name in names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{}/nothing"], "INPUTS: there is no image"),
        (["{}/*.gif"], "INPUTS: there is no image"),
        (["{}/notes.txt"], "skipped: "),
        (["{}", "--max-side", "8"], "--max-side: expected at least 16, got 8"),
        (["{}", "--alpha", "2"], "--alpha: expected 0 to 1, got 2"),
        (["{}", "--multi", "--scales", "0"], "--scales: expected factors above 0"),
        (["{}", "--crf-prune", "2"], "--crf-prune: expected 0 to 1"),
        (["{}", "--precision", "fp16"], "--precision: fp16 needs a GPU"),
        (["{}", "--weights", "gone.safetensors"], "--weights: there is no file gone.safetensors"),
    ],
)
def test_what_cannot_be_done_is_said_by_flag_or_file(given, message, command, photos):
    code, said = command(*(each.format(photos) for each in given))
    assert code == 2 and message in said
