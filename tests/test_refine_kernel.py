"""The fused kernel of the refinement against the eager form: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ffr import refine
from ffr.refine import PixelAdaptiveRefinement, refine_label

SCRIPT = """
import sys
sys.path.insert(0, "tests")
import interpreter
import torch
from ffr import refine

def fused(images, scores, dilations, iterations):
    part = refine.PixelAdaptiveRefinement(dilations, iterations)
    kept = images.clone(), scores.clone()
    results = []
    for chosen in (True, False):
        refine._fused = lambda *_: chosen
        results.append(part(images, scores))
        assert results[-1].dtype == scores.dtype
    assert results[0].isfinite().all()  # for `max` passes over NaN
    assert ("ffr._refine_kernel" in sys.modules) and torch.equal(images, kept[0]) and torch.equal(scores, kept[1])
    return float((results[0] - results[1]).abs().max())

generator = torch.Generator().manual_seed(0)
worst = 0.0
for batch, channels, height, width, dilations, iterations in (
    (2, 3, 11, 13, (1, 2, 4, 8, 12, 24), 2),  # reaches far beyond every edge; odd sizes
    (1, 20, 16, 16, (1, 3), 2),  # more channels than a program holds, and whole blocks of pixels
    (1, 1, 1, 9, (1, 2), 3),
    (1, 2, 7, 1, (2,), 1),
    (2, 2, 1, 1, (1,), 2),
    (1, 2, 5, 6, (1,), 0),
):
    images = torch.rand(batch, 3, height, width, generator=generator)
    images[:, :, : height // 2] = 0.5  # a flat patch
    scores = torch.randn(batch, channels, height, width, generator=generator)
    worst = max(worst, fused(images, scores, dilations, iterations))
    turned = scores.transpose(2, 3).contiguous().transpose(2, 3), images.flip(3)
    worst = max(worst, fused(turned[1], turned[0], dilations, iterations))
half = fused((255 * images).to(torch.uint8), scores.half(), (1, 2), 2)
half = max(half, fused(images.half(), scores, (1, 2), 2))
print(worst, half)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton (Linux)")
def test_in_the_interpreter_the_kernel_is_the_eager_form():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read where a kernel is defined, so in a process of its own
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    worst, half = map(float, run.stdout.split())
    assert worst <= 2e-6
    assert half <= 4e-3  # an ulp of 2 to 4


def test_without_a_gpu_nothing_asks_for_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffr._refine_kernel", None)  # an import would fail
    images, scores = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9)
    assert PixelAdaptiveRefinement((1, 2), 2)(images, scores).shape == (1, 2, 9, 9)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton (Linux)")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_which_is_not_here(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ffr import _refine_kernel

    for kernel, constants in (
        (_refine_kernel._weigh, {"PIXELS": 128}),
        (_refine_kernel._spread, {"PIXELS": 128, "CHANNELS": 16}),
    ):
        signature = {name: "*fp32" if name.endswith("_at") else "i32" for name in kernel.arg_names}
        signature |= {"table_at": "*i32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = compile(source, target=GPUTarget("cuda", capability, 32))
        assert "st.local" not in built.asm["ptx"]  # all of a program lives in registers


def test_the_kernel_is_chosen_for_what_it_can_take_and_nothing_else(monkeypatch):
    class Scores:
        """A CUDA tensor, as far as the choice looks at it."""

        device, is_cuda, requires_grad = torch.device("cuda", 0), True, False

        def __init__(self, dtype=torch.float32, **changes):
            self.dtype = dtype
            self.__dict__.update(changes)

    monkeypatch.setattr(refine, "Tensor", Scores)
    monkeypatch.setattr(refine, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    images = torch.zeros(1, 3, 2, 2)
    for taken in (Scores(), Scores(torch.bfloat16)):
        assert refine._fused(images, taken)
    for refused in (Scores(torch.float64), Scores(is_cuda=False), Scores(requires_grad=True)):
        assert not refine._fused(images, refused)
    assert not refine._fused(images.double(), Scores())
    with torch.no_grad():
        assert refine._fused(images, Scores(requires_grad=True))
    with torch.autograd.forward_ad.dual_level():
        assert not refine._fused(images, Scores())
    seen = []
    torch.vmap(lambda x: seen.append(refine._fused(images, Scores())) or x)(torch.zeros(2))
    assert seen == [False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not refine._fused(images, Scores())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(refine, "find_spec", lambda name: None)
    assert not refine._fused(images, Scores())


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a CUDA GPU and Triton (Linux)"
)
def test_on_a_gpu_the_kernel_is_the_eager_form_and_waits_for_nothing():
    generator = torch.Generator().manual_seed(0)
    images, scores = torch.rand(2, 3, 97, 110, generator=generator), torch.rand(2, 21, 97, 110, generator=generator)
    par = PixelAdaptiveRefinement()
    wanted = par(images, scores)
    images, scores = images.cuda(), scores.cuda()
    assert_close(par(images, scores).cpu(), wanted, rtol=0, atol=2e-6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = par(images, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(again.cpu(), wanted, rtol=0, atol=2e-6)
    with_gradient = scores.clone().requires_grad_()  # the eager form
    assert_close(par(images, with_gradient).detach(), again, rtol=0, atol=2e-6)
    assert torch.autograd.grad(par(images, with_gradient).sum(), with_gradient)[0].isfinite().all()
    half = par(images.half(), scores.half())
    assert half.dtype == torch.float16
    assert_close(half.cpu(), par(images.half().cpu(), scores.half().cpu()), rtol=0, atol=4e-3)  # an ulp of 2 to 4
    labels = torch.ones(2, 5)
    cam = torch.rand(2, 5, 7, 7, generator=generator)
    ours = refine_label(images, cam.cuda(), labels.cuda(), refinement=par).cpu()
    assert (ours == refine_label(images.cpu(), cam, labels, refinement=par)).float().mean() >= 0.9999
