"""The fused kernel: its cases in Triton's interpreter, and that every choice compiles for a GPU which is not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import instructions
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
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
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


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "layout"), [((28, 28), "tokens"), ((56, 56), "maps"), ((128, 128), "maps")])
def test_on_a_gpu_every_choice_gives_the_bands_of_the_products(grid, layout, dtype, monkeypatch):
    from ffr import _frequency_kernel as kernel

    x = torch.randn(2, 20, *grid, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    x = x.flatten(2).transpose(1, 2).contiguous() if layout == "tokens" else x
    wanted = frequency._as_graph(x.double(), 0.4, *grid)
    for choice in kernel.pruned(kernel.choices(), {}, **kernel.constants(*grid, layout == "tokens", 1)):
        monkeypatch.setattr(kernel._kernel, "configs", [choice])  # one alone is taken without being tried
        monkeypatch.setattr(kernel._kernel, "cache", {})
        bands = kernel.split(x, *frequency._operands(x, 0.4, *grid), *grid)
        # Tensor cores add up towards zero, which longer sums show.
        atol = 8e-2 if dtype == torch.bfloat16 else 1e-5 if max(grid) < 100 else 5e-5
        torch.testing.assert_close(tuple(band.double() for band in bands), tuple(wanted), rtol=0, atol=atol)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("grid", "tokens"), [((28, 28), True), ((27, 41), False), ((56, 56), True), ((128, 128), False)]
)
def test_every_choice_compiles_for_a_gpu_and_one_fits_into_its_shared_memory(grid, tokens, dtype, capability):
    from ffr import _frequency_kernel as kernel

    for join in (False, True):
        shared = []
        for choice in kernel.pruned(kernel.choices(), {}, **kernel.constants(*grid, tokens, 1)):
            built = instructions.build(choice, grid, dtype, tokens=tokens, join=join, capability=capability)
            shared.append(built.metadata.shared)
            ptx = built.asm["ptx"]
            assert "mma" in ptx  # tensor cores
            assert ("tf32" in ptx) == (dtype == "fp32")
        assert min(shared) < 99 * 2**10  # on an sm_86 as well, which has the least


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("side", [28, 56])
@pytest.mark.parametrize("tokens", [True, False])
def test_the_instructions_leave_room_for_the_memory(side, tokens, dtype):
    # 48 of float32 and 24 of bfloat16 are 60 % of what an H200 issues while its memory moves an element.
    found = instructions.best((side, side), dtype, tokens=tokens, join=False, capability=90)
    assert found["instructions"] < {"fp32": 48, "bf16": 24}[dtype]
    assert found["spilled"] < 4


@needs_triton
@pytest.mark.slow
def test_the_count_of_instructions_is_a_command(tmp_path, monkeypatch):
    options = ["--grids", "9", "12", "--dtypes", "bf16", "--out", str(tmp_path / "i.json")]
    monkeypatch.setattr(sys, "argv", ["instructions.py", *options])
    assert instructions.main() == 0
    rows = json.loads((tmp_path / "i.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["layout"], row["backward"]) for row in rows] == [
        (layout, backward) for layout in ("tokens", "maps") for backward in (False, True)
    ]
    assert all(3 < row["instructions"] < 200 for row in rows)


def test_loops_count_by_their_turns():
    lines = ("MOV R1", "IADD R1", "@P0 FADD R2", "@!P0 BRA `(.L_x_2)", "NOP", "BRA `(.L_x_1)", "EXIT", "BRA `(.L_x_3)")
    labels = {1: ".L_x_1:", 2: ".L_x_2:", 7: ".L_x_3:"}
    text = "\n".join(f"{labels.get(at, '')}\n  /*{at:04x}*/   {line} ;" for at, line in enumerate(lines))
    counts = instructions.executed(text, [5, 3])
    assert counts == {"MOV": 1, "IADD": 5, "FADD": 15, "BRA": 15 + 5 + 1, "EXIT": 1}
    with pytest.raises(RuntimeError, match="expected 1 loops in the program, found 2"):
        instructions.executed(text, [5])
