"""Scores against tables done by hand, slow second opinions, and what must not change them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import binary_erosion
from torch.testing import assert_close

from ffr.cam import cam_to_label
from ffr.metrics import BoundaryIoU, ConfusionMatrix, ThresholdSweep, average_precision

LABELS = 4  # background and three classes
THRESHOLDS = (0.0, 0.1, 0.3, 0.55, 0.7, 1.0)


@st.composite
def pairs(draw, max_side=7, values=(0, 1, 2, 3, 255)):
    """A prediction and a truth, (B, H, W)."""
    shape = draw(array_shapes(min_dims=3, max_dims=3, max_side=max_side))
    maps = arrays(np.int64, shape, elements=st.sampled_from(values))
    return torch.from_numpy(draw(maps)), torch.from_numpy(draw(maps))


@st.composite
def cams(draw):
    """CAMs (B, K, H, W) whose scores often lie on a threshold or tie between classes, and a truth."""
    batch, height, width = draw(array_shapes(min_dims=3, max_dims=3, max_side=5))
    scores = st.one_of(st.sampled_from(THRESHOLDS), st.floats(0, 1, width=32))
    cam = draw(arrays(np.float64, (batch, LABELS - 1, height, width), elements=scores))
    truth = draw(arrays(np.int64, (batch, height, width), elements=st.sampled_from((0, 1, 2, 3, 255))))
    return torch.from_numpy(cam), torch.from_numpy(truth)


def counted(score, *pair):
    score.update(*pair)
    return score


def confusion(prediction, target):
    return counted(ConfusionMatrix(LABELS), prediction, target)


def boundary(prediction, target, dilation=0.02):
    return counted(BoundaryIoU(LABELS, dilation=dilation), prediction, target)


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)


# Confusion matrix: known answers ----------------------------------------------------------------------------------

TRUTH = [[0, 0, 0, 0, 1, 1, 1, 2, 255, 255]]
GUESS = [[0, 0, 1, 3, 1, 1, 2, 2, 1, 255]]


def test_a_table_done_by_hand():
    matrix = confusion(torch.tensor(GUESS), torch.tensor(TRUTH))
    assert matrix.matrix.tolist() == [[2, 1, 0, 1], [0, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert_same(matrix.iou(), torch.tensor([2 / 4, 2 / 4, 1 / 2, math.nan], dtype=torch.float64))  # 3: absent
    assert matrix.miou() == pytest.approx(0.5)
    assert matrix.accuracy() == pytest.approx(5 / 8)


def test_a_predicted_ignore_is_a_miss_of_the_true_class_and_nobodys_false_alarm():
    matrix = confusion(torch.tensor([[1, 255, 0, 0]]), torch.tensor([[1, 1, 0, 0]]))
    assert matrix.matrix.tolist()[:2] == [[2, 0, 0, 0], [0, 1, 0, 0]]
    assert matrix.iou()[:2].tolist() == [1.0, 0.5]
    assert matrix.accuracy() == 0.75


def test_nothing_counted_scores_nan_and_not_zero():
    for matrix in (ConfusionMatrix(LABELS), confusion(torch.tensor([[1]]), torch.tensor([[255]]))):
        assert math.isnan(matrix.miou())
        assert math.isnan(matrix.accuracy())
        assert matrix.iou().isnan().all()
    assert math.isnan(BoundaryIoU(LABELS).miou())
    assert ThresholdSweep(LABELS, THRESHOLDS).miou().isnan().all()


def test_counts_beyond_what_float32_can_hold_are_exact():
    matrix = ConfusionMatrix(2)
    matrix.counts[0] = 2**24
    matrix.update(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert matrix.matrix[0, 0] == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_counts_alike(dtype):
    matrix = counted(ConfusionMatrix(150), torch.tensor([[149, 149]]).to(dtype), torch.tensor([[149, 3]]).to(dtype))
    assert matrix.matrix[149, 149] == 1
    assert matrix.matrix[3, 149] == 1
    assert matrix.matrix.sum() == 2


def test_the_first_number_that_is_no_label_may_be_the_ignore_index():
    matrix = ConfusionMatrix(num_labels=2, ignore_index=2)
    matrix.update(torch.tensor([[0, 1, 2, 1]]), torch.tensor([[0, 1, 1, 2]]))
    assert matrix.iou().tolist() == [1, 0.5]


def test_another_ignore_index_is_obeyed_even_where_bytes_would_take_it_for_255():
    truth, guess = torch.tensor([[-1, 0]]), torch.tensor([[0, 0]])
    for kind in (ConfusionMatrix, BoundaryIoU):
        kind(2, ignore_index=-1).update(guess, truth)
        with pytest.raises(ValueError, match="1 pixels outside"):
            counted(kind(2, ignore_index=-1), guess.to(torch.uint8), torch.tensor([[255, 0]], dtype=torch.uint8)).miou()
    assert counted(ConfusionMatrix(2, ignore_index=-1), guess, truth).matrix.sum() == 1


# Confusion matrix: laws -------------------------------------------------------------------------------------------


@given(pairs())
def test_every_pixel_is_counted_in_its_cell(pair):
    table = np.zeros((LABELS, LABELS), dtype=np.int64)
    misses = np.zeros(LABELS, dtype=np.int64)
    for guess, truth in zip(*(x.flatten().tolist() for x in pair), strict=True):
        if truth != 255 and guess != 255:
            table[truth, guess] += 1
        elif truth != 255:
            misses[truth] += 1
    expected = [
        table[k, k] / (table[k].sum() + misses[k] + table[:, k].sum() - table[k, k])
        if table[k].sum() + misses[k]
        else math.nan
        for k in range(LABELS)
    ]
    matrix = confusion(*pair)
    assert torch.equal(matrix.matrix, torch.from_numpy(table))
    assert_same(matrix.iou(), torch.tensor(expected, dtype=torch.float64))


@given(pairs(), st.randoms(use_true_random=False))
def test_the_order_of_the_pixels_does_not_matter(pair, random):
    order = list(range(pair[0].numel()))
    random.shuffle(order)
    shuffled = [x.flatten()[order].view(1, -1) for x in pair]
    assert torch.equal(confusion(*shuffled).counts, confusion(*pair).counts)


@given(pairs())
def test_image_by_image_batch_and_merge_come_to_the_same(pair):
    for kind in (ConfusionMatrix, BoundaryIoU):
        whole = counted(kind(LABELS), *pair)
        single, total = kind(LABELS), kind(LABELS)
        for guess, truth in zip(*pair, strict=True):
            single.update(guess, truth)  # (H, W)
            total = total + counted(kind(LABELS), guess[None], truth[None])
        assert torch.equal(single.counts, whole.counts)
        assert torch.equal(total.counts, whole.counts)


@given(pairs())
def test_the_truth_scores_one_for_every_class_present(pair):
    truth = pair[1]
    present = torch.tensor([bool((truth == k).any()) for k in range(LABELS)])
    for kind in (ConfusionMatrix, BoundaryIoU):
        iou = counted(kind(LABELS), truth, truth).iou()
        scored = present & (torch.arange(LABELS) > 0) if kind is BoundaryIoU else present
        assert torch.equal(~iou.isnan(), scored)
        assert (iou[scored] == 1).all()


@given(pairs(values=(0, 1, 2, 3)))
def test_swapping_prediction_and_truth_transposes_the_matrix(pair):
    assert torch.equal(confusion(*pair).matrix, confusion(*reversed(pair)).matrix.T)


@given(pairs(), st.permutations(range(LABELS)))
def test_renaming_the_classes_renames_the_scores(pair, names):
    names = torch.tensor([*names, *range(LABELS, 256)])
    assert_same(confusion(*(names[x] for x in pair)).iou()[names[:LABELS]], confusion(*pair).iou())


@given(pairs())
def test_ignored_pixels_are_counted_apart_in_the_last_bin(pair):
    for kind in (ConfusionMatrix, BoundaryIoU):
        assert counted(kind(LABELS), *pair).counts[-1] == (pair[1] == 255).sum()


@given(pairs(), st.sampled_from([ConfusionMatrix, BoundaryIoU]))
def test_what_is_predicted_at_ignored_pixels_does_not_matter(pair, kind):
    guess, truth = pair
    other = torch.where(truth == 255, (guess + 1) % LABELS, guess)
    assert torch.equal(counted(kind(LABELS), guess, truth).counts, counted(kind(LABELS), other, truth).counts)


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_strided_input_is_read_in_place_and_left_alone(kind):
    guess, truth = torch.randint(0, LABELS, (2, 6, 8, 3)).unbind(0)
    views = guess.permute(2, 1, 0), truth.permute(2, 1, 0)
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    assert torch.equal(counted(kind(LABELS), *views).counts, counted(kind(LABELS), *copies).counts)
    assert torch.equal(views[0], copies[0])
    assert torch.equal(views[1], copies[1])


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
def test_an_empty_batch_counts_nothing(kind):
    empty = torch.zeros(0, 4, 4, dtype=torch.long)
    assert counted(kind(LABELS), empty, empty).counts.sum() == 0


def test_reset_forgets():
    matrix = confusion(torch.tensor([[1]]), torch.tensor([[137]]))
    matrix.reset()
    matrix.update(torch.tensor([[1]]), torch.tensor([[1]]))
    assert matrix.miou() == 1


def test_a_sum_leaves_its_terms_alone_and_merge_changes_the_first():
    one, two = (confusion(torch.tensor([[k]]), torch.tensor([[k]])) for k in (0, 1))
    assert (one + two).matrix.diagonal().tolist() == [1, 1, 0, 0]
    assert (one.matrix.sum(), two.matrix.sum()) == (1, 1)
    assert one.merge(two) is one
    assert (one.matrix.sum(), two.matrix.sum()) == (2, 1)


def test_counting_may_begin_in_inference_mode_and_go_on_outside():
    matrix, label = ConfusionMatrix(LABELS), torch.tensor([[1]])
    with torch.inference_mode():
        matrix.update(label, label)
    matrix.merge(matrix)
    matrix.update(label, label)
    assert matrix.matrix[1, 1] == 3


def test_a_default_device_does_not_reach_the_counts():
    with torch.device("meta"):
        counting = ready("cpu")
        for score, batch in counting:
            score.update(*batch)
    for (score, _), (expected, batch) in zip(counting, ready("cpu"), strict=True):
        expected.update(*batch)
        assert torch.equal(score.counts, expected.counts)


# Updates never wait for the device --------------------------------------------------------------------------------


def ready(device):
    """One score of each kind, with what to update it by, on a device; 137 and 7 are labels that no class has."""
    guess, truth = torch.tensor([[[[0, 1, 2, 255, 137]]], [[[0, 1, 7, 1, 1]]]], device=device)
    cam = torch.linspace(0, 1, 15, device=device).view(1, LABELS - 1, 1, 5)
    scores = ConfusionMatrix(LABELS), BoundaryIoU(LABELS), ThresholdSweep(LABELS, THRESHOLDS)
    return [(score, (first, truth)) for score, first in zip(scores, (guess, guess, cam), strict=True)]


def test_an_update_reads_no_value_back():
    for score, batch in ready("meta"):  # meta tensors have no values: whoever asks for one fails
        score.update(*batch)
        assert score.counts.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_updates_on_a_gpu_count_the_same_and_do_not_wait_for_it():
    for (score, batch), (expected, same) in zip(ready("cuda"), ready("cpu"), strict=True):
        score.update(*batch)  # the first one moves the counts there
        torch.cuda.set_sync_debug_mode("error")
        try:
            score.update(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected.update(*same)
        expected.update(*same)
        assert torch.equal(score.counts.cpu(), expected.counts)


# Threshold sweep --------------------------------------------------------------------------------------------------


@given(cams(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_one_sweep_is_a_confusion_matrix_at_every_threshold(sample, dtype):
    cam, truth = sample[0].to(dtype), sample[1]
    sweep = ThresholdSweep(LABELS, THRESHOLDS)
    sweep.update(cam, truth)
    expected = [confusion(cam_to_label(cam, background=threshold), truth) for threshold in THRESHOLDS]
    for index, matrix in enumerate(expected):
        assert torch.equal(sweep.confusion(index).counts, matrix.counts)
    assert_same(sweep.miou(), torch.tensor([matrix.miou() for matrix in expected], dtype=torch.float64))


@given(cams())
def test_a_sweep_in_parts_is_one_sweep(sample):
    cam, truth = sample
    parts = ThresholdSweep(LABELS, THRESHOLDS)
    for k in range(len(cam)):
        parts.update(cam[k : k + 1], truth[k : k + 1])
    assert torch.equal(parts.counts, counted(ThresholdSweep(LABELS, THRESHOLDS), cam, truth).counts)


def test_a_score_on_the_threshold_is_background():
    sweep = ThresholdSweep(2, (0.25, 0.5, 0.75))
    sweep.update(torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, dtype=torch.long))
    assert [sweep.confusion(k).matrix[1].tolist() for k in range(3)] == [[0, 1], [1, 0], [1, 0]]
    assert sweep.miou().tolist() == [1, 0, 0]


def test_the_best_threshold_is_the_lowest_of_the_best():
    sweep = ThresholdSweep(2, (0.1, 0.4, 0.5, 0.9))
    sweep.update(torch.tensor([[[[0.3, 0.8]]]]), torch.tensor([[[0, 1]]]))
    assert sweep.miou().tolist() == [0.25, 1, 1, 0.25]
    assert sweep.best() == (0.4, 1.0)


def test_the_default_thresholds_are_the_hundredths():
    assert ThresholdSweep(2).thresholds == tuple(np.arange(100) / 100)


def test_a_cam_in_another_memory_order_with_a_gradient_counts_the_same(recwarn):
    cam = torch.rand(2, LABELS - 1, 4, 5)
    truth = torch.randint(0, LABELS, (2, 4, 5))
    expected = counted(ThresholdSweep(LABELS, THRESHOLDS), cam, truth).counts
    for other in (cam.to(memory_format=torch.channels_last), cam.mT.contiguous().mT, cam.clone().requires_grad_()):
        sweep = counted(ThresholdSweep(LABELS, THRESHOLDS), other, truth)
        assert torch.equal(sweep.counts, expected)
        assert not sweep.counts.requires_grad
    assert len(recwarn) == 0


def test_a_rounding_above_one_is_let_through():
    score = torch.tensor(1.0).nextafter(torch.tensor(2.0)).view(1, 1, 1, 1)
    assert counted(ThresholdSweep(2, (0.5,)), score, torch.ones(1, 1, 1, dtype=torch.long)).best() == (0.5, 1.0)


# Boundary IoU -----------------------------------------------------------------------------------------------------


def reference_boundary(pair, radius):
    """(intersection, union, pixels of the truth's band) per class: a 3 x 3 square, `radius` times."""
    sums = np.zeros((LABELS, 3), dtype=np.int64)
    for guess, truth in zip(*(x.numpy() for x in pair), strict=True):
        for k in range(LABELS):
            bands = []
            for label in (guess, truth):
                mask = (label == k) & (truth != 255)
                bands.append(mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=radius, border_value=0))
            sums[k] += (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum(), bands[1].sum()
    return sums


@given(pairs(max_side=12, values=(0, 1, 1, 1, 1, 1, 1, 1, 2, 255)), st.sampled_from([0.02, 0.1, 0.2, 0.31]))
def test_the_bands_are_those_of_repeated_erosion(pair, dilation):
    radius = max(1, round(dilation * math.hypot(*pair[0].shape[1:])))
    score = boundary(*pair, dilation=dilation)
    expected = reference_boundary(pair, radius)
    np.testing.assert_array_equal(score.counts[:-2].view(LABELS, 3), expected)
    both, either, truth = expected.astype(float).T
    iou = np.divide(both, either, out=np.full(LABELS, np.nan), where=truth > 0)
    iou[0] = np.nan
    np.testing.assert_allclose(score.iou(), iou)


@pytest.mark.parametrize(("side", "width"), [(8, 1), (50, 1), (54, 2), (88, 2), (89, 3), (448, 13)])
def test_the_band_is_two_percent_of_the_diagonal_wide_and_at_least_a_pixel(side, width):
    label = torch.ones(side, side, dtype=torch.uint8)
    band = boundary(label, label).counts[:-2].view(LABELS, 3)[1, 2]
    assert band == side**2 - (side - 2 * width) ** 2  # the border of the image bounds the object, too


def test_a_shifted_square_scores_what_a_pencil_says():
    truth, guess = torch.zeros(2, 40, 60, dtype=torch.long)  # diagonal 72.1: one pixel
    truth[10:30, 10:30] = guess[10:30, 12:32] = 1
    assert boundary(guess, truth).iou()[1] == pytest.approx(36 / (76 + 76 - 36))  # rows 10 and 29, columns 12..29
    assert confusion(guess, truth).iou()[1] == pytest.approx(360 / 440)


def test_it_looks_at_the_outline_where_iou_looks_at_the_area():
    truth = torch.zeros(100, 100, dtype=torch.long)
    truth[20:80, 20:80] = 1
    hole, rim = truth.clone(), truth.clone()
    hole[40:60, 40:60] = 0
    rim[20:80, 20:27] = 0  # 420 pixels at the outline against 400 inside
    assert boundary(rim, truth).miou() < boundary(hole, truth).miou() < 1


@given(pairs())
def test_a_band_as_wide_as_the_image_is_plain_iou(pair):
    plain = confusion(*pair).iou()
    plain[0] = math.nan
    assert_same(boundary(*pair, dilation=1.0).iou(), plain)


@given(pairs())
def test_flips_and_transposition_change_nothing(pair):
    counts = boundary(*pair).counts
    for move in (lambda x: x.flip(2), lambda x: x.flip(1), lambda x: x.mT):
        assert torch.equal(boundary(*map(move, pair)).counts, counts)


def test_the_right_answer_scores_one_wherever_it_puts_the_outline_in_an_ignored_ring():
    truth = torch.zeros(64, 64, dtype=torch.long)
    truth[16:48, 16:48] = 255
    truth[20:44, 20:44] = 1
    for margin in range(5):
        guess = torch.zeros_like(truth)
        guess[16 + margin : 48 - margin, 16 + margin : 48 - margin] = 1
        assert boundary(guess, truth).miou() == 1


def test_background_and_absent_classes_have_no_score():
    truth, guess = torch.zeros(2, 9, 9, dtype=torch.long)
    truth[2:5, 2:5] = guess[2:5, 2:5] = 1
    guess[7, 7] = 2  # a false alarm of a class that is not there
    score = boundary(guess, truth)
    assert score.iou().isnan().tolist() == [True, False, True, True]
    assert score.miou() == 1


# Average precision ------------------------------------------------------------------------------------------------


def reference_precision(scores, labels):
    """Precision times the step in recall at every distinct score, in exact fractions."""
    total = Fraction(0)
    for threshold in sorted(set(scores), reverse=True):
        kept = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        new = sum(label for score, label in zip(scores, labels, strict=True) if score == threshold)
        total += Fraction(sum(kept), len(kept)) * Fraction(new, sum(labels))
    return float(total)


@st.composite
def rankings(draw):
    """Scores (n, K) with many ties, and labels."""
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=9))
    scores = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.inf, -math.inf]), st.floats(-5, 5))
    labels = draw(arrays(np.int64, shape, elements=st.integers(0, 1)))
    return torch.from_numpy(draw(arrays(np.float64, shape, elements=scores))), torch.from_numpy(labels)


@given(rankings())
def test_average_precision_is_the_area_under_the_steps(ranking):
    scores, labels = (x.T.tolist() for x in ranking)
    expected = [reference_precision(*pair) if any(pair[1]) else math.nan for pair in zip(scores, labels, strict=True)]
    assert_same(average_precision(*ranking), torch.tensor(expected, dtype=torch.float64))


@given(rankings(), st.randoms(use_true_random=False))
def test_only_the_order_of_the_scores_counts(ranking, random):
    scores, labels = ranking
    order = list(range(len(scores)))
    random.shuffle(order)
    ranks = torch.searchsorted(scores.flatten().unique(), scores)  # a rising map that keeps ties, without rounding
    expected = average_precision(scores, labels)
    assert_same(average_precision(scores[order], labels[order]), expected)
    assert_same(average_precision(3.0 * ranks - 7, labels), expected)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0], 1),
        ([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 1 / 4),
        ([0.5, 0.5, 0.9, 0.1], [1, 0, 0, 1], (1 / 3 + 2 / 4) / 2),
        ([0.5, 0.4], [0, 0], math.nan),
    ],
)
def test_average_precision_of_short_lists(scores, labels, expected):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        result = average_precision(torch.tensor(scores, dtype=dtype)[:, None], torch.tensor(labels)[:, None])
        assert_same(result, torch.tensor([expected], dtype=torch.float64))


def test_soft_labels_are_positive_above_one_half():
    scores = torch.tensor([[0.9], [0.8]])
    assert average_precision(scores, torch.tensor([[0.5], [0.6]])).tolist() == [0.5]
    assert average_precision(scores, torch.tensor([[True], [False]])).tolist() == [1.0]


# Refusals ---------------------------------------------------------------------------------------------------------

LABEL = torch.zeros(1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConfusionMatrix(1), ValueError, r"ConfusionMatrix: expected `num_labels` in \[2, inf\], got 1"),
        (
            lambda: ConfusionMatrix(21, 20),
            ValueError,
            r"ConfusionMatrix: expected `ignore_index` outside 0\.\.20, got 20",
        ),
        (
            lambda: ConfusionMatrix().update(LABEL, LABEL[:, :1]),
            ValueError,
            r"ConfusionMatrix: expected `target` of shape \(B=1, H=2, W=2\), got \(1, 1, 2\)",
        ),
        (lambda: ConfusionMatrix().update(LABEL[0], LABEL), ValueError, r"expected `target` of shape \(H=2, W=2\)"),
        (
            lambda: ConfusionMatrix().update(LABEL[None], LABEL[None]),
            ValueError,
            r"expected `prediction` of shape \(B, H",
        ),
        (
            lambda: ConfusionMatrix().update(LABEL.float(), LABEL),
            TypeError,
            "`prediction` of an integer dtype, got torch.f",
        ),
        (lambda: ConfusionMatrix().update(LABEL, LABEL > 0), TypeError, "`target` of an integer dtype, got torch.bool"),
        (
            lambda: ConfusionMatrix().update(LABEL.numpy(), LABEL),
            TypeError,
            "`prediction` to be a torch.Tensor, got nd",
        ),
        (lambda: BoundaryIoU().update(LABEL, LABEL.float()), TypeError, "BoundaryIoU: expected `target` of an integer"),
        (lambda: BoundaryIoU(dilation=1.5), ValueError, r"BoundaryIoU: expected `dilation` in \[0, 1\], got 1\.5"),
        (lambda: ThresholdSweep(2, ()), ValueError, "ThresholdSweep: expected `thresholds`"),
        (lambda: ThresholdSweep(2, (0.5, 0.5)), ValueError, r"`thresholds` in \[0, 1\] and rising, got \(0\.5, 0\.5\)"),
        (lambda: ThresholdSweep(2, (-0.1, 0.5)), ValueError, "rising"),
        (lambda: ThresholdSweep(2, (0.5, 1.1)), ValueError, "rising"),
        (lambda: ThresholdSweep(2, (math.nan,)), ValueError, "rising"),
        (
            lambda: ThresholdSweep(3).update(torch.rand(1, 3, 2, 2), LABEL),
            ValueError,
            r"ThresholdSweep: expected `cam` of shape \(B, K=2, H, W\), got \(1, 3, 2, 2\)",
        ),
        (lambda: ThresholdSweep(2).update(torch.rand(1, 1, 1, 1), LABEL), ValueError, "`target` .*Up-sample the CAM"),
        (
            lambda: ThresholdSweep(2).update(LABEL[None], LABEL),
            TypeError,
            "ThresholdSweep: expected `cam` of a floating",
        ),
        (
            lambda: ThresholdSweep(2).update(torch.rand(1, 1, 2, 2), LABEL > 0),
            TypeError,
            "`target` of an integer dtype",
        ),
        (lambda: ThresholdSweep(2).best(), ValueError, "ThresholdSweep: no labelled pixel was counted. Call `update`"),
        (
            lambda: ConfusionMatrix(3) + ConfusionMatrix(4),
            ValueError,
            r"got ConfusionMatrix\(num_labels=4, ignore_index=255",
        ),
        (
            lambda: ConfusionMatrix(3).merge(BoundaryIoU(3)),
            ValueError,
            r"merge: expected the same settings, got Boundary",
        ),
        (lambda: BoundaryIoU(3) + BoundaryIoU(3, dilation=0.1), ValueError, r"dilation=0\.1"),
        (lambda: ThresholdSweep(2, (0.1,)) + ThresholdSweep(2, (0.2,)), ValueError, r"thresholds=\(0\.2,\)"),
        (
            lambda: average_precision(torch.rand(4, 3), torch.ones(4, 2)),
            ValueError,
            r"average_precision: expected `labels` of shape \(n=4, K=3\), got \(4, 2\)",
        ),
        (
            lambda: average_precision(torch.ones(4, 3).long(), torch.ones(4, 3)),
            TypeError,
            "`scores` of a floating dtype",
        ),
        (lambda: average_precision(torch.full((2, 1), math.nan), torch.ones(2, 1)), ValueError, "`scores` without NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryIoU])
@pytest.mark.parametrize("stray", [-1, LABELS, LABELS + 1, 137, 254, 256])
@pytest.mark.parametrize("side", ["prediction", "truth"])
def test_a_value_that_is_no_label_is_never_binned_elsewhere(kind, stray, side):
    pair = [torch.ones(1, 2, 3, dtype=torch.long) for _ in range(2)]
    pair[side == "truth"][0, 0, :2] = stray
    score = counted(kind(LABELS), *pair)
    if kind is ConfusionMatrix:
        assert score.matrix.sum() == score.matrix[1, 1] == 4
    for read in (score.iou, score.miou):
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: expected labels in 0\.\.3 or 255, got 2 pixels outside"
        ):
            read()


def test_a_stray_prediction_at_an_ignored_pixel_does_no_harm():
    for kind in (ConfusionMatrix, BoundaryIoU):
        score = counted(kind(LABELS), torch.tensor([[137, 1]]), torch.tensor([[255, 1]]))
        assert score.miou() == 1


@pytest.mark.parametrize("stray", [math.nan, -0.5, 1.5, math.inf])
def test_scores_that_are_no_normalised_cam_are_refused(stray):
    cam = torch.full((1, LABELS - 1, 1, 3), 0.5)
    cam[..., 0] = stray
    sweep = counted(ThresholdSweep(LABELS), cam, torch.tensor([[[1, 1, 255]]]))
    for read in (sweep.miou, sweep.best, lambda: sweep.confusion(0)):
        with pytest.raises(
            ValueError, match=r"ThresholdSweep: expected labels .* and scores in \[0, 1\], got 1 pixels"
        ):
            read()


# Other people's scores --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchmetrics_agrees_on_iou_and_accuracy():
    oracle = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    theirs = oracle.MulticlassJaccardIndex(21, average=None, ignore_index=255)
    exact = oracle.MulticlassAccuracy(21, average="micro", ignore_index=255)
    ours = ConfusionMatrix(21)
    for _ in range(5):
        truth = torch.randint(0, 21, (2, 40, 50), generator=generator)
        guess = torch.where(torch.rand(truth.shape, generator=generator) < 0.4, truth, truth.flip(2))
        truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
        guess[guess == 255] = 0
        for metric in (theirs, exact, ours):
            metric.update(guess, truth)
    assert_close(ours.iou(), theirs.compute().double(), rtol=1e-6, atol=0)
    assert ours.accuracy() == pytest.approx(float(exact.compute()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [3, 20, 10**6], ids=["many ties", "some ties", "no ties"])
def test_scikit_learn_agrees_on_average_precision(levels):
    oracle = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (500, 20), generator=generator).double()
    labels = torch.rand(500, 20, generator=generator) < 0.1
    expected = oracle.average_precision_score(labels.numpy(), scores.numpy(), average=None)
    np.testing.assert_allclose(average_precision(scores, labels), expected, rtol=1e-12)
