"""Evaluation: the network at several scales, scores over a data set, and evaluate.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from recipe.data import EvalImages, Item, SceneExamples, Split
from recipe.evaluation import CHOSEN, FIXED, Protocol, activate, evaluate, evaluate_all, look, scales_of, segment
from recipe.network import small_ffr
from recipe.scenes import CLASSES, make_scenes
from torch.nn import functional as F

from ffr import DenseCRF
from ffr.cam import multi_scale_cam
from ffr.draw import save_label

MULTI = Protocol(scales=(1.0, 1.25, 1.5), flip=True)
SIZES = [(40, 52), (40, 52), (33, 47), (40, 52), (7, 90), (61, 48), (40, 52), (33, 47), (64, 64), (33, 47), (40, 52)]


def network(classes=3, seed=0):
    """A small network whose every output depends on the image."""
    torch.manual_seed(seed)
    model = small_ffr(classes, 64, width=32)
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
        items.append(Item(f"image {i}", root / f"{i}.png", mask_file, None if i == 5 else labels))
    return EvalImages(Split(("a", "b", "c"), tuple(items)))


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
    """All figures, image by image with numpy: nothing of it is shared with the code under test but the network."""
    classes = model.num_classes
    matrices = {name: np.zeros((classes + 1, classes + 1)) for name in ("seg", "cam", "cam_inter")}
    scores, truths = {"cam": [], "cam_inter": []}, []
    for index in range(len(dataset)):
        _, image, mask, labels = dataset[index]
        size = image.shape[1:]
        seg, cams, logits = [], {"cam": 0, "cam_inter": 0}, {"cam": [], "cam_inter": []}
        for scale in protocol.scales:
            side = [max(1, round(float(length) * scale)) for length in size]
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
            for name, guess in guesses.items():
                for truth, said in zip(mask.numpy().ravel(), guess.ravel(), strict=True):
                    if truth != 255:
                        matrices[name][truth, said] += 1
    figures = {}
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
        Protocol(threshold=0.4),
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


def test_one_pass_gives_the_figures_of_separate_passes(folder):
    model = network()
    protocols = [MULTI, replace(MULTI, labels="predicted"), replace(MULTI, threshold=0.3), replace(MULTI, crf=True)]
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


class Ranks:
    """Sums the tensors of ranks that run one after the other: the first rounds listen, the last one answers."""

    def __init__(self):
        self.sums = []

    def listen(self, rank):
        calls = iter(range(1000))

        def reduce(tensor):
            i = next(calls)
            if i == len(self.sums):
                self.sums.append({})
            self.sums[i][rank] = tensor.clone()
            return torch.stack(list(self.sums[i].values())).sum(0)

        return reduce


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_has_the_figures_of_one_exactly(world_size, folder):
    model, protocols = network(), [Protocol(), replace(MULTI, threshold=0.4)]
    how = {"device": "cpu", "batch_size": 2}
    alone = evaluate_all(model, folder, protocols, **how)
    ranks = Ranks()
    for rank in (*range(world_size), *range(world_size)):
        result = evaluate_all(
            model, folder, protocols, rank=rank, world_size=world_size, reduce=ranks.listen(rank), **how
        )
    assert result == alone and not math.isnan(alone[0]["cam_miou"])
