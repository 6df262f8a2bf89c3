"""The library on a device that is not the CPU, as on the CPU; `test_far.py` runs this file on its own."""

import far
import harness
import pytest
import torch
from test_every_module import backward, check_autocast, every, leaves, same, through, to
from torch.testing import assert_close

from ffr import DenseCRF, metrics


def there(x):
    return far.Far(x.clone()).requires_grad_(x.requires_grad)


def here(xs):
    assert {x.device.type for x in leaves(xs)} <= {"far"}
    return [x.held for x in leaves(xs)]


def on_far(case, dtype=torch.float64, cast=None):
    """Result and gradients of a part there, brought here, and what the host waited for."""
    with far.reachable():
        part, batch = through(case.part(dtype).to("far"), case.batch(dtype), lambda x: there(to(x, dtype)))
        with harness.host_waits() as waits:
            result, grads = backward(part, batch, case.smooth, cast, "far")
    return here(result), here(grads), waits


@every
def test_it_gives_what_it_gives_on_the_cpu_and_the_host_never_waits(case):
    result, grads, waits = on_far(case)
    wanted, wanted_grads = backward(case.part(), case.batch(), case.smooth)
    same(result, leaves(wanted), rtol=1e-6, atol=1e-6)
    same(grads, wanted_grads, rtol=1e-6, atol=1e-6)
    assert waits == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_autocast_by_the_lists_of_cuda_keeps_float32_or_stays_near_it(case, dtype):
    wanted, wanted_grads, _ = on_far(case, torch.float32)
    result, grads, _ = on_far(case, torch.float32, dtype)
    check_autocast(case, wanted, wanted_grads, result, grads)


@pytest.fixture
def no_float64(monkeypatch):
    """The device has no float64, as Apple's has none."""
    made = far.Far.__new__

    def new(cls, held):
        assert held.dtype not in (torch.float64, torch.complex128)
        return made(cls, held)

    monkeypatch.setattr(far.Far, "__new__", staticmethod(new))


@every
def test_float32_needs_no_float64(case, no_float64):
    on_far(case, torch.float32)


def test_nor_do_crf_and_metrics(no_float64):
    draw = torch.Generator().manual_seed(0)
    image, label = torch.rand(3, 12, 16, generator=draw), torch.randint(4, (12, 16), generator=draw)
    scores, labels = torch.rand(6, 3, generator=draw), torch.randint(2, (6, 3), generator=draw)
    cam = torch.rand(1, 3, 12, 16, generator=draw)

    def figures(move):
        matrix, sweep, boundary = metrics.ConfusionMatrix(4), metrics.ThresholdSweep(4), metrics.BoundaryIoU(4)
        matrix.update(move(label.flip(0)), move(label))
        sweep.update(move(cam), move(label[None]))
        boundary.update(move(label.flip(0)), move(label))
        refined = DenseCRF().from_label(move(image), move(label), num_classes=3).cpu()
        means = [x.miou() for x in (matrix, sweep, boundary)]
        return refined, metrics.average_precision(move(scores), move(labels)), *map(torch.as_tensor, means)

    with far.reachable():
        ours = figures(there)
    for one, other in zip(ours, figures(lambda x: x), strict=True):
        assert_close(one, other, equal_nan=True)


# --- the device ---


def test_tensors_of_both_devices_do_not_meet_but_a_number_may():
    with far.reachable():
        x = torch.ones(3, device="far")
        assert here(x + torch.tensor(2.0))[0].tolist() == [3, 3, 3]
        with pytest.raises(RuntimeError, match="same device, found far and cpu"):
            x + torch.ones(3)


def test_autocast_casts_as_on_cuda():
    with far.reachable(), torch.autocast("far", dtype=torch.bfloat16):
        x, w = torch.ones(3, 3, device="far"), torch.ones(3, 3, device="far")
        low = x @ w
        assert low.dtype == torch.bfloat16
        assert low.exp().dtype == low.sum().dtype == low.softmax(1).dtype == torch.float32
        assert (low * 2).dtype == torch.bfloat16
