"""The figures: what they show is what the parts compute, which images they choose, and what visualize.py refuses."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import visualize
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from recipe import look
from recipe.config import SCENES
from recipe.data import Example, Item, write_split
from recipe.figures import (
    BOTH,
    OTHERS_NAMED,
    PANEL,
    SMALL,
    colour_of,
    listed,
    motivation_figure,
    objects_figure,
    outline,
    patch_figure,
    twice_colour,
)
from recipe.look import (
    Compared,
    Glance,
    Motivation,
    Patch,
    choose,
    choose_patch,
    compare,
    patch_of,
    predict_labels,
    see,
    together,
)
from recipe.network import build_model
from recipe.scenes import CLASSES, make_scenes
from recipe.weights import Trained, save_weights
from recipe.words import fonts_for, width
from torch.testing import assert_close

from ffr import split_bands
from ffr.cam import normalize_cam
from ffr.draw import save_label
from ffr.prototypes import class_prototypes
from ffr.rectification import select_tokens

CONFIG = replace(SCENES, dilations=(1, 2), hidden=8, gap=0.005)  # untrained features change little


def network(seed=0):
    """A network that no training made tame, so that its CAMs and selections are not empty."""
    torch.manual_seed(seed)
    model = build_model(CONFIG, len(CLASSES))
    with torch.no_grad():
        for weight in (model.classifier.weight, model.head.last.weight):
            weight.normal_()
    return Trained(model.eval(), CONFIG, CLASSES, {"step": 7})


@pytest.fixture(scope="module")
def trained():
    return network()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, trained.model.state_dict(), CONFIG, CLASSES, step=7)
    return path


@pytest.fixture(scope="module")
def scene():
    scenes = make_scenes("val", 12)
    several = int((scenes.labels.sum(1) > 1).nonzero()[0])
    return Example("one", *(part[several] for part in scenes))


def picture(path, size=(50, 71), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["visualize.py", *map(str, arguments)])
    return visualize.main()


@pytest.fixture(scope="module")
def trained_numbers(trained, scene):
    motivation = Motivation(trained)
    motivation.add(scene.image, scene.labels)
    return motivation.numbers()


# What is shown ----------------------------------------------------------------------------------------------------


def test_what_is_seen_of_an_image_is_what_the_parts_of_the_method_give(trained, scene):
    seen = see(trained, scene)
    ids = scene.labels.nonzero().flatten().tolist()
    assert seen.classes == tuple(ids) and len(ids) > 1
    with torch.no_grad():
        out = trained.model.outputs(scene.image[None])
    low = split_bands(out.final, CONFIG.mu).low
    cam = normalize_cam(out.cam)
    vectors, valid = class_prototypes(out.final, cam, scene.labels[None], seed_threshold=CONFIG.seed_threshold)
    picked = select_tokens(features=out.final, low=low, prototypes=vectors, valid=valid, gap=CONFIG.gap)
    assert torch.equal(seen.selected, picked[0, ids])
    assert 0 < seen.selected.float().mean() < 1
    for n, k in enumerate(ids):
        for part, features in enumerate((out.final, low)):
            cosine = torch.cosine_similarity(features[0], vectors[0, k][:, None, None], dim=0)
            assert_close(seen.similarity[part, n], cosine)
        assert float(seen.bands[:, n].max()) == 1
        assert_close(seen.seeds[n], torch.where(cam[0, k] >= 0.7, cam[0, k], 0))
        # the prototype is the mean of these tokens with these weights
        mean = (seen.seeds[n] * out.final[0]).sum((1, 2)) / seen.seeds[n].sum()
        assert_close(mean, vectors[0, k])
    assert seen.cam.shape == (len(ids), 64, 64) and seen.prediction.shape == seen.pseudo.shape == (64, 64)
    assert set(seen.pseudo.unique().tolist()) <= {0, 255, *(k + 1 for k in ids)}


def test_the_patch_is_that_of_a_loop_over_tokens_and_pairs(trained, scene):
    with torch.no_grad():
        found = compare(trained, trained.model.outputs(scene.image[None]), scene.labels[None])
    patch = patch_of(found)
    ids = found.valid.nonzero().flatten().tolist()
    mean = found.similarity[0].mean((1, 2))
    best = (-1.0, None)
    for a in ids:
        for b in ids:
            for place in np.ndindex(16, 16):
                alike = all(found.similarity[0, k][place] >= mean[k] for k in (a, b))
                change = min(float(abs(found.gap[k][place])) for k in (a, b))
                if a < b and alike and change > best[0]:
                    best = (change, (a, b, *place))
    assert patch[:4] == best[1] and patch.change == pytest.approx(best[0])


def test_the_patch_of_one_class_has_no_other_and_without_a_prototype_there_is_none(trained, scene):
    with torch.no_grad():
        out = trained.model.outputs(scene.image[None])
    only = torch.zeros(1, len(CLASSES))
    assert patch_of(compare(trained, out, only)) is None
    only[0, int(scene.labels.argmax())] = 1
    patch = patch_of(compare(trained, out, only))
    assert patch.one == int(scene.labels.argmax()) and patch.other is None


def test_where_no_token_is_like_both_classes_the_patch_is_any_of_them():
    similarity = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[0.9, 0.3]], [[0.1, 0.8]]]])  # (2, K, h, w)
    everywhere = torch.ones(2, 1, 2, dtype=torch.bool)
    found = Compared(everywhere.float(), similarity, torch.ones(2, dtype=torch.bool), everywhere, everywhere[0])
    assert patch_of(found)[:4] == (0, 1, 0, 1)


def test_fig_4_does_not_depend_on_the_order_of_images_of_several_sizes(trained, scene):
    images = [scene.image, scene.image[:, :, :32], scene.image.flip(1), scene.image[:, 8:]]
    found = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        motivation = Motivation(trained)
        for number in order:
            motivation.add(images[number], scene.labels)
        found.append(motivation.numbers())
    assert found[0]["frequency"] == found[1]["frequency"] == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8]  # of the 16 x 8 tokens
    for name, curve in found[0]["relative_log10_amplitude"].items():
        assert found[1]["relative_log10_amplitude"][name] == pytest.approx(curve, abs=1e-5)


def test_fig_4_counts_what_the_selection_selects(trained, scene):
    motivation = Motivation(trained)
    glances = [motivation.add(scene.image, scene.labels), motivation.add(scene.image.flip(2), scene.labels)]
    numbers = motivation.numbers()
    seen = [see(trained, scene), see(trained, scene._replace(image=scene.image.flip(2)))]
    picked = torch.cat([each.selected for each in seen]).float()
    assert numbers["selected_fraction"] == pytest.approx(float(picked.mean()))
    assert numbers["pairs"] == picked.numel() == sum(numbers["histogram"])
    at = numbers["thresholds"].index(CONFIG.gap)
    assert numbers["fraction_above"][at] == pytest.approx(numbers["selected_fraction"], abs=1e-6)
    assert numbers["fraction_above"] == sorted(numbers["fraction_above"], reverse=True)
    assert set(numbers["selected_fraction_per_class"]) == {CLASSES[k] for k in seen[0].classes}
    twice = torch.cat([each.selected.sum(0) > 1 for each in seen]).float().mean()
    assert numbers["selected_for_several_classes"] == pytest.approx(float(twice))
    assert numbers["intermediate"] == "block 2" and numbers["images"] == 2
    assert numbers["high_band_share_of_white_noise"] == pytest.approx((256 - 13 * 13) / 255)
    assert glances[0].patch == seen[0].patch and glances[0].labels == set(seen[0].classes)
    json.dumps(numbers, allow_nan=False)
    motivation.add(scene.image, torch.eye(len(CLASSES))[seen[0].classes[0]])  # no token can be of several classes there
    assert motivation.numbers()["selected_for_several_classes"] == numbers["selected_for_several_classes"]


def test_what_lies_beyond_the_histogram_is_in_its_outer_columns(trained, scene, monkeypatch):
    monkeypatch.setattr(look, "EDGES", (-0.01, 0.0, 0.01))
    motivation = Motivation(trained)
    motivation.add(scene.image, scene.labels)
    numbers = motivation.numbers()
    assert sum(numbers["histogram"]) == numbers["pairs"] and min(numbers["histogram"]) > 0


def test_where_nothing_is_dropped_white_noise_has_no_high_band(trained, scene, monkeypatch):
    monkeypatch.setattr(trained.model.frequency, "mu", 0.5)
    motivation = Motivation(trained)
    motivation.add(scene.image, scene.labels)
    assert motivation.numbers()["high_band_share_of_white_noise"] == 0


def test_predicted_labels_are_the_likely_ones_or_else_the_likeliest():
    assert predict_labels(torch.tensor([-1.0, 2.0, 0.1, -3.0, 0.0])).tolist() == [0, 1, 1, 0, 0]
    assert predict_labels(torch.tensor([-1.0, -2.0, -0.1])).tolist() == [0, 0, 1]
    assert predict_labels(torch.arange(1.0, 10.0)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def glance(*labels, change=0.1, other=None):
    return Glance(frozenset(labels), Patch(0, other, 0, 0, change))


def test_images_of_frequent_pairs_come_first_every_pair_once_then_the_fullest():
    glances = [glance(1), glance(1, 2), glance(3, 4), glance(1, 2), glance(3, 4), glance(1, 2), glance(4, 5, 6)]
    assert together(glances)[1, 2] == 3 and together(glances)[3, 4] == 2
    assert choose(glances, 3) == [1, 2, 6]
    assert choose(glances, 5) == [1, 2, 6, 3, 5]
    assert choose([glance(1), glance(), glance(2)], 2) == [0, 2]
    assert choose([glance(1, 2), glance(1, 2, 3)], 1) == [1]  # of those with the same pair, the fullest
    assert sorted(choose(glances, 50)) == list(range(7))


def test_fig_1_takes_the_greatest_change_for_two_classes():
    glances = [glance(1, change=0.9), glance(1, 2, change=0.2, other=2), glance(1, 2, change=0.3, other=2)]
    assert choose_patch(glances) == 2
    assert choose_patch(glances[:1]) == 0
    assert choose_patch([Glance(frozenset(), None), glances[0]]) == 1


def test_names_that_find_no_room_are_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(["dining table", "potted plant", "wine glass", "cup"]) == "dining table and 3 more"
    assert listed(["dining table", "plant", "glass", "cup", "spoons and forks"]) == "dining table, plant and 3 more"
    assert listed([]) == "no class"
    assert width(listed(["dining table", "potted plant", "wine glass", "cup"]), SMALL) <= PANEL


def test_selected_twice_has_a_colour_unlike_those_of_the_classes():
    assert twice_colour(0, 1) in BOTH
    for one, other in combinations(range(80), 2):
        for taken in (*map(colour_of, (one, other)), (0, 0, 0), (1, 1, 1)):
            assert np.abs(np.subtract(to_rgb(twice_colour(one, other)), taken)).sum() > 0.5


@pytest.mark.parametrize("below", ["black", "white", "#fff2aa", "#ffd60a", "#c0345c", "grey"])
def test_the_box_around_the_patch_is_seen_on_any_colour(below):
    figure = Figure(figsize=(1, 1), dpi=100, facecolor=below)
    FigureCanvasAgg(figure).draw()
    figure.add_artist(outline(0.3, 0.3, 0.4))
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[45:55, 20:40, :3].mean((0, 2)) / 255  # across its left side
    assert drawn.min() < 0.2 and drawn.max() > 0.8  # dark and bright, whatever lies below


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.1, 0.4, 0.1, 0.3],
        [0.6, 0.4, 0.2, 0.01],
        [0.125, 0.25, 0.5],
        [0.3, 0.3],
        np.random.default_rng(0).random(13).tolist(),
        np.sort(np.random.default_rng(1).random(13)).tolist(),
        np.linspace(0.6, 0.2, 25).tolist(),
    ],
)
def test_no_line_crosses_a_number_of_fig_4(trained_numbers, values):
    names = [f"block {n + 1}" for n in range(len(values) - 1)]
    share = dict(zip([*names, "final"], values, strict=True))
    figure = motivation_figure({**trained_numbers, "high_band_share": share, "intermediate": "block 1"}, [])
    figure.canvas.draw()
    axis = figure.axes[0]
    points = axis.transData.transform(np.column_stack([range(len(values)), 100 * np.array(values)]))
    numbers = [text for text in axis.texts if re.fullmatch(r"[0-9.]+", text.get_text())]
    boxes = [Text.get_window_extent(number).padded(-1) for number in numbers]  # the text, without what it points at
    assert len(numbers) == (len(values) if len(values) < 14 else 13)
    for box in boxes:
        x = np.linspace(max(box.x0, points[0, 0]), min(box.x1, points[-1, 0]))
        y = np.interp(x, *points.T)
        assert x[0] > x[-1] or not ((box.y0 < y) & (y < box.y1)).any()
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_predicted_classes_that_are_no_label_are_in_the_legend(trained, scene):
    seen = see(trained, scene)
    names = [f"class {k}" for k in range(20)]
    prediction = torch.zeros_like(seen.prediction)
    for place, k in enumerate((12, 13, 14, 15, 16)):  # ever more pixels
        prediction[place, : place + 1] = k + 1
    page = objects_figure([seen._replace(prediction=prediction)], names, Counter(), 1, ["A note."])
    legend = [text.get_text() for text in page.figure.legends[0].texts]
    alone = [f"class {k} (predicted, no label)" for k in (16, 15, 14, 13)]
    assert legend[-OTHERS_NAMED:] == alone
    assert {f"class {k}" for k in seen.classes} < set(legend)
    words = " ".join(text.get_text() for text in page.figure.texts)
    assert "1 more predicted class covers less" in words
    prediction[10, 0] = 19
    page = objects_figure([seen._replace(prediction=prediction)], names, Counter(), 1, [])
    assert "2 more predicted classes cover less" in " ".join(text.get_text() for text in page.figure.texts)


def test_where_no_class_has_a_prototype_the_figures_say_so(trained, scene, trained_numbers):
    seen = see(trained, scene._replace(labels=torch.zeros(len(CLASSES))))
    words = " ".join(text.get_text() for text in patch_figure(seen, CLASSES, 4, CONFIG.gap, []).figure.texts)
    assert "shows a class with a prototype" in words and "one class is drawn" not in words
    nothing = {"pairs": 0, "selected_fraction": None, "fraction_above": None, "histogram": [0] * 200}
    figure = motivation_figure({**trained_numbers, **nothing}, [])
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes[2:4]] == [["no class has a prototype"]] * 2


def test_an_image_without_a_class_is_shown_where_its_cam_would_be(trained, scene):
    seen = see(trained, scene._replace(labels=torch.zeros(len(CLASSES))))
    page = objects_figure([seen], CLASSES, Counter(), 1, [])
    assert np.array_equal(page.axes[0][1].images[0].get_array(), scene.image.permute(1, 2, 0))
    assert [text.get_text() for text in page.axes[0][1].texts] == ["no class"]


# The script -------------------------------------------------------------------------------------------------------


def test_weights_of_scenes_give_four_figures_of_scenes_and_the_numbers(weights, monkeypatch, tmp_path, capsys):
    out = tmp_path / "figures"
    assert run_main(monkeypatch, "--weights", weights, "--count", 5, "--rows", 2, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "figure1.png", "figure2.png", "figure3.png", "figure4.json", "figure4.png",
    ]  # fmt: skip
    for number in (1, 2, 3, 4):
        with Image.open(out / f"figure{number}.png") as figure:
            assert figure.size[0] > 800 and figure.size[1] > 400
            assert len(np.unique(np.asarray(figure.convert("L")))) > 50
    record = json.loads((out / "figure4.json").read_text())
    assert record["images"] == 5 and record["weights"]["step"] == 7 and record["predicted_labels"] == 0
    assert "known from the scenes" in record["measured"] and "7 steps" in record["measured"]
    assert list(record["high_band_share"]) == ["block 1", "block 2", "block 3", "block 4", "final"]
    assert "figure4.json" in capsys.readouterr().out


def test_a_prepared_folder_with_images_of_any_size_without_a_mask_or_labels(weights, monkeypatch, tmp_path):
    files = [picture(tmp_path / "in" / f"{n}.png", size, n) for n, size in enumerate([(40, 90), (131, 64), (64, 64)])]
    mask = tmp_path / "in" / "mask.png"
    save_label(mask, np.pad(np.full((20, 20), 3), ((5, 15), (9, 61))))
    items = [
        Item("a", files[0], mask, (1, 2)),
        Item("b", files[1], None, (4,)),
        Item("c", files[2], None, None),
    ]
    write_split(tmp_path / "in", "val", CLASSES, items)
    out = tmp_path / "out"
    assert run_main(monkeypatch, "--weights", weights, "--data", tmp_path / "in", "--max-side", 96, "--out", out) == 0
    record = json.loads((out / "figure4.json").read_text())
    assert record["images"] == 3 and record["predicted_labels"] == 1
    assert "known from in/val.json; where they are unknown, predicted" in record["measured"]


def test_images_with_given_and_with_predicted_labels(weights, monkeypatch, tmp_path):
    picture(tmp_path / "photos" / "deep" / "a.jpg")
    picture(tmp_path / "photos" / "b.png", (30, 40))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    arguments = ("--weights", weights, "--images", tmp_path / "photos", f"{tmp_path}/photos/*.png", "--figures", 4)
    assert run_main(monkeypatch, *arguments, "--out", tmp_path / "one") == 0
    record = json.loads((tmp_path / "one" / "figure4.json").read_text())
    assert record["images"] == 2 and record["predicted_labels"] == 2 and "Labels predicted" in record["measured"]
    assert run_main(monkeypatch, *arguments, "--labels", "bag", "dress", "--out", tmp_path / "two") == 0
    record = json.loads((tmp_path / "two" / "figure4.json").read_text())
    assert set(record["selected_fraction_per_class"]) <= {"bag", "dress"}
    assert record["predicted_labels"] == 0 and "given with --labels" in record["measured"]
    assert not (tmp_path / "two" / "figure1.png").exists()


def test_an_image_that_is_named_by_two_spellings_counts_once(weights, monkeypatch, tmp_path, capsys):
    file = picture(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    given = ("photos", file.parent, "photos/a.jpg", file, "photos/../photos/*.jpg")
    arguments = ("--weights", weights, "--images", *given, "--figures", 4, "--out", "photos/out")
    for _ in range(2):
        assert run_main(monkeypatch, *arguments) == 0
        record = json.loads((tmp_path / "photos" / "out" / "figure4.json").read_text())
        assert record["images"] == 1 and record["looked_at"] == [str(file)]
        assert "left alone" not in (said := capsys.readouterr().out) and "not looked at" not in said
    assert run_main(monkeypatch, "--weights", weights, "--images", "photos/*.mp4") == 2
    assert "visualize: --images: there is no image (.bmp" in capsys.readouterr().err
    picture(tmp_path / "photos" / "out" / "figure4.png")
    assert run_main(monkeypatch, "--weights", weights, "--images", "photos/out", "--out", "photos/out") == 2
    assert "visualize: --images: all images lie below --out photos/out. Name" in capsys.readouterr().err


def test_a_glob_follows_no_link_to_a_folder_above(weights, monkeypatch, tmp_path):
    photos = tmp_path / "photos"
    picture(photos / "a.jpg")
    for name in ("self", "again"):
        (photos / name).symlink_to(photos)
    arguments = ("--weights", weights, "--images", photos / "**" / "*.jpg", "--figures", 4, "--out", tmp_path / "out")
    assert run_main(monkeypatch, *arguments) == 0
    assert json.loads((tmp_path / "out" / "figure4.json").read_text())["images"] == 1


def test_the_figures_say_how_many_images_were_looked_at_and_which(weights, monkeypatch, tmp_path, capsys):
    files = [picture(tmp_path / "in" / f"{n}.png", seed=n) for n in range(5)]
    (tmp_path / "in" / "film.mp4").touch()
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))

    def run(*arguments):
        out = tmp_path / "in" / "out"
        assert run_main(monkeypatch, "--weights", weights, "--count", 2, "--out", out, *arguments) == 0
        record = json.loads((out / "figure4.json").read_text())
        while drawn:
            notes = " ".join(text.get_text() for text in drawn.pop().texts)
            assert re.search(r"Looked at [^.]*\.", notes.replace("\n", " "))[0] in record["measured"]
        return record, capsys.readouterr().out

    record, said = run("--images", tmp_path / "in")
    assert "Looked at 2 of 5 images of --images." in record["measured"] and record["settings"]["split"] is None
    assert record["looked_at"] == [str(files[0]), str(files[2])]
    assert "- 1 other files in --images are left alone (.mp4 1)" in said and "not looked at" not in said
    _, said = run("--images", *files[:3], tmp_path / "in" / "film.mp4")
    assert f"- not looked at: 2 of 4 files named by --images, for --count is 2: {files[1]}, {tmp_path}" in said
    write_split(tmp_path / "in", "val", CLASSES, [Item(path.stem, path, None, (1,)) for path in files])
    record, said = run("--data", tmp_path / "in")
    assert "Looked at 2 of 5 images of val of in." in record["measured"] and record["settings"]["split"] == "val"
    assert record["looked_at"] == [str(files[0]), str(files[2])] and "- " not in said
    assert "Looked at 2 of 2 embedded scenes, val." in run()[0]["measured"]


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode")
def test_a_name_that_is_no_unicode_is_recorded(weights, monkeypatch, tmp_path, capsys):
    path = picture(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    out = tmp_path / os.fsdecode(b"\xfe")
    assert run_main(monkeypatch, "--weights", weights, "--images", tmp_path, "--figures", 4, "--out", out) == 0
    assert r"\udcfe/figure4.json" in capsys.readouterr().out
    assert json.loads((out / "figure4.json").read_text())["looked_at"] == [str(path)]


def test_fig_1_calls_selected_what_changes_either_way(trained, scene):
    page = patch_figure(see(trained, scene), CLASSES, 4, CONFIG.gap, [])
    said = [text.get_text().replace("\n", " ") for text in page.figure.texts]
    assert any(text.startswith("change of more than 0.005 either way") for text in said)


def test_an_image_without_any_label_is_drawn_too(weights, monkeypatch, tmp_path):
    write_split(tmp_path, "val", CLASSES, [Item("a", picture(tmp_path / "a.png"), None, ())])
    assert run_main(monkeypatch, "--weights", weights, "--data", tmp_path, "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "figure4.json").read_text())
    assert record["selected_fraction"] is None and record["pairs"] == 0


def test_an_image_of_one_token_is_drawn_without_a_warning(weights, monkeypatch, tmp_path, recwarn):
    arguments = ("--weights", weights, "--images", picture(tmp_path / "a.png", (1, 1)), "--out", tmp_path / "out")
    assert run_main(monkeypatch, *arguments) == 0
    assert not [str(each.message) for each in recwarn if "legend" in str(each.message)]


ODD = (
    "North American river otter (Lontra canadensis)",
    "cost $5 to $6",
    "a$_$b",
    "European mink (Mustela lutreola), a riverbank form with a name that nobody would ever print in full anywhere",
)


def test_odd_names_and_shapes_are_drawn_as_they_are_spelt_in_their_room(monkeypatch, tmp_path, recwarn):
    shapes = [(60, 90), (90, 60), (1, 1), (20, 90), (90, 20), (64, 64)]
    names = ["a$_$b.png", f"IMG_{'holiday_' * 20}.png", "one.png", "wide.png", "tall.png", "plain.png"]
    labels = [(0, 1, 3), (0, 3), (0,), (0, 3), (2, 3), ()]
    files = [
        picture(tmp_path / "in" / name, shape, n) for n, (name, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    torch.manual_seed(0)
    model = build_model(CONFIG, len(ODD))
    save_weights(tmp_path / "odd.safetensors", model.state_dict(), CONFIG, ODD, step=7)
    items = [Item(path.name, path, None, row) for path, row in zip(files, labels, strict=True)]
    write_split(tmp_path / "in", "val", ODD, items)
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (drawn.append(self), save(self, *args, **more)))
    arguments = ("--weights", tmp_path / "odd.safetensors", "--data", tmp_path / "in", "--rows", 6)
    assert run_main(monkeypatch, *arguments, "--out", tmp_path / "out") == 0
    assert not recwarn
    said = set()
    for figure in drawn[:3]:
        page, panels = figure.bbox, [axis.get_window_extent() for axis in figure.axes]
        texts = [*figure.texts, *figure.legends[0].texts] if figure.legends else list(figure.texts)
        texts += [text for axis in figure.axes for text in axis.texts]
        boxes = [text.get_window_extent().padded(-1.5) for text in texts]
        said |= {text.get_text() for text in texts}
        for text, box in zip(texts, boxes, strict=True):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
            assert not any(box.overlaps(panel) for panel in panels), text
        for (one, a), (other, b) in combinations(zip(texts, boxes, strict=True), 2):
            assert not a.overlaps(b), (one, other)
    assert {"cost $5 to $6", "a$_$b.png", "no class"} < said


def test_letters_that_no_font_has_are_named(weights, monkeypatch, tmp_path, capsys):
    picture(tmp_path / "\u732b.png")
    assert (
        run_main(monkeypatch, "--weights", weights, "--images", tmp_path, "--figures", 3, "--out", tmp_path / "out")
        == 0
    )
    printed = capsys.readouterr().out
    assert ("boxes stand for \u732b:" in printed) == bool(fonts_for({"\u732b"})[1])


def test_a_broken_image_is_left_out_and_named(weights, monkeypatch, tmp_path, capsys):
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    arguments = ("--weights", weights, "--images", tmp_path, "--figures", 4, "--out", tmp_path / "out")
    assert run_main(monkeypatch, *arguments) == 1
    assert "bad.png" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "figure4.json").read_text())["left_out"]) == [str(tmp_path / "bad.png")]
    named = ("--weights", weights, "--images", tmp_path / "bad.png", tmp_path / "good.png", *arguments[4:])
    assert run_main(monkeypatch, *named) == 1
    assert "left out: " in (said := capsys.readouterr().out) and "not looked at" not in said
    (tmp_path / "good.png").unlink()  # the figures of the first run are no images of ours
    assert run_main(monkeypatch, *arguments) == 2
    assert "no image could be read" in capsys.readouterr().err


def test_a_shrunk_image_keeps_its_shape_and_its_mask_its_values():
    mask = torch.zeros(300, 200, dtype=torch.uint8)
    mask[:150] = 255
    small = visualize.shrink(Example("a", torch.zeros(3, 300, 200, dtype=torch.uint8), mask, None), 60)
    assert small.image.shape == (3, 60, 40) and small.image.dtype == torch.uint8
    assert small.mask.shape == (60, 40) and set(small.mask.unique().tolist()) == {0, 255}
    same = Example("a", torch.zeros(3, 30, 60), None, None)
    assert visualize.shrink(same, 60) is same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 0], r"--count: expected at least 1, got 0"),
        (["--rows", 0], r"--rows: expected at least 1"),
        (["--max-side", 4], r"--max-side: expected at least 16"),
        (["--images", "nothing/*.jpg"], r"--images: there is no image .*'nothing/\*\.jpg'"),
        (["--images", "x.jpg", "--data", "y"], r"--images: .*--data"),
        (["--labels", "bag"], r"--labels: is for --images"),
        (["--images", ".", "--labels", "unicorn"], r"--labels: .*no class 'unicorn'.*T-shirt"),
        (["--data", "nowhere"], r"there is no nowhere/val\.json"),
        (["--split", "other"], r"expected `split`.*'other'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_flag(weights, monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "--weights", weights, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("visualize: ")
    assert re.search(message, captured.err)
    assert list(tmp_path.iterdir()) == []


def test_data_of_other_classes_and_an_unusable_folder_are_refused(weights, monkeypatch, tmp_path, capsys):
    write_split(tmp_path, "val", ["cat", "dog"], [Item("a", picture(tmp_path / "a.png"), None, (0,))])
    assert run_main(monkeypatch, "--weights", weights, "--data", tmp_path) == 2
    assert "has the 2 classes cat, dog" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, "--weights", weights, "--out", tmp_path / "file") == 2
    assert "--out: expected a folder" in capsys.readouterr().err
    assert run_main(monkeypatch, "--weights", weights, "--out", tmp_path / "file" / "below") == 2
    assert "--out: expected a folder, got the file" in capsys.readouterr().err
    assert run_main(monkeypatch, "--weights", tmp_path / "none.safetensors") == 2
    assert "--weights: there is no file" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_leaves_the_old_one(weights, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    picture(out / "figure4.png")
    before = (out / "figure4.png").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run_main(monkeypatch, "--weights", weights, "--count", 1, "--figures", 4, "--out", out) == 2
    assert "No space left" in capsys.readouterr().err
    assert (out / "figure4.png").read_bytes() == before and len(list(out.iterdir())) == 1
