"""The fused kernel: its cases in Triton's interpreter, and that every choice compiles for a GPU which is not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffr import frequency

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_cases_of_the_kernel_pass_in_the_interpreter():
    cases = Path(__file__).with_name("frequency_kernel_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[1])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


def test_without_a_cuda_tensor_the_kernel_is_not_imported():
    code = "import sys, torch, ffr; ffr.split_bands(torch.ones(1, 1, 4, 4), 0.2)"
    code += "; print('ffr._frequency_kernel' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout == "False\n", run.stderr


def test_the_kernel_is_chosen_for_a_cuda_tensor_on_a_device_that_can_run_it(monkeypatch):
    class Cuda(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.zeros(1, 8, 28, 28).as_subclass(Cuda)
    monkeypatch.setattr(frequency, "_plain", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert frequency._fused(x, 28, 28) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(frequency, "find_spec", lambda name: None)
    assert frequency._fused(x, 28, 28) is None
    assert frequency._fused(torch.zeros(1, 8, 28, 28), 28, 28) is None
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr(frequency, "find_spec", importlib.util.find_spec)
        assert frequency._fused(x, 28, 28).__name__ == "ffr._frequency_kernel"
        assert frequency._fused(x.double(), 28, 28) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 4e-6), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize(("grid", "tokens"), [((28, 28), True), ((27, 41), False), ((56, 56), True), ((14, 9), False)])
def test_a_gpu_gives_the_bands_and_gradients_of_the_cpu(grid, tokens, dtype, atol):
    x = torch.randn(2, 24, *grid, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.flatten(2).transpose(1, 2).contiguous() if tokens else x
    found = []
    for one in (x.double(), x.to("cuda")):
        one.requires_grad_()
        low, high = frequency.split_bands(one, 0.4, grid=grid)
        (gradient,) = torch.autograd.grad(low.square().sum() + high.sum(), one)
        found.append([value.detach().double().to("cpu") for value in (low, high, gradient)])
    torch.testing.assert_close(*found, rtol=0, atol=2 * atol)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("side", "tokens"), [(32, True), (32, False), (64, True), (64, False)])
def test_every_choice_compiles_for_a_gpu_and_one_fits_into_its_shared_memory(side, tokens, dtype, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ffr import _frequency_kernel as kernel

    names = kernel._kernel.fn.arg_names
    for join in (False, True):
        shared = []
        for size, warps in kernel._SIZES:
            if 2**size < side * side:
                continue
            constants = {"H": side, "W": side, "JOIN": join, "TOKENS": tokens, "WIDEN": False, "TILE": 2**size}
            constants["PRECISION"] = kernel._precision({"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype))
            constants |= {f"{part}_{'c' if tokens else 'w'}": 1 for part in ("first", "second", "low", "high")}
            signature = {name: f"*{dtype}" if name.endswith("_at") else "i32" for name in names}
            signature |= dict.fromkeys(constants, "constexpr")
            aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_at")}
            source = ASTSource(fn=kernel._kernel.fn, signature=signature, constexprs=constants, attrs=aligned)
            built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            shared.append(built.metadata.shared)
            ptx = built.asm["ptx"]
            assert "mma" in ptx  # tensor cores
            assert ("tf32" in ptx) == ("cvt.rna.tf32" in ptx) == (dtype == "fp32")  # split by rounding, not cut off
        assert sorted(shared)[1] < 99 * 2**10  # two at least, even on an sm_86, which has the least
