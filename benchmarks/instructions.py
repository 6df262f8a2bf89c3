"""Machine instructions of the fused kernel of the band split, counted where there is no GPU.

    python benchmarks/instructions.py
    python benchmarks/instructions.py --capability 80

A kernel that reads once and writes once is as fast as the memory only while its instructions fit into the time that the
memory takes. Triton compiles for a GPU that is not here; its disassembler shows what would run. The count of an element
is that of all instructions of a program, loops by their turns, padding included, over the elements of the grid that the
program serves. It is a bound and no time: waiting, conflicts and a launch come on top.
"""

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import tyro

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SLOTS = 4 * 32  # of a multiprocessor in a clock: four schedulers, an instruction of 32 threads each


@dataclass(frozen=True)
class Arguments:
    """Instructions of the fused kernel of the band split."""

    capability: int = 90
    """of the GPU to compile for: 80 is an A100, 90 an H100 or H200"""
    grids: tuple[tuple[int, int], ...] = ((14, 14), (28, 28), (27, 41), (56, 56), (128, 128))
    """128 x 128 tokens are too few channels a program, and left to the matrix products"""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    multiprocessors: int = 132
    clock: float = 1.7e9
    """of a multiprocessor, in hertz"""
    copy_rate: float = 4.3e12
    """bytes a second that a copy reads and writes, of an H200"""
    out: Path | None = None
    """JSON; by default results/DATE-DEVICE-instructions.json"""


def build(choice: Any, grid: tuple[int, int], dtype: str, *, tokens: bool, join: bool, capability: int) -> Any:
    """The kernel compiled for a GPU which need not be here, for features without gaps and 768 channels."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ffr import _frequency_kernel as kernel

    h, w = grid
    batch, other, row = (h * w * 768, 768, w * 768) if tokens else (h * w * 768, h * w, w)
    constants = {**kernel.constants(h, w, tokens, math.gcd(16, batch, other, row)), "JOIN": join, **choice.kwargs}
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name.endswith("_at") else "i32"
        for name in kernel._kernel.fn.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel._kernel.fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.maxnreg}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassembled(cubin: bytes) -> str:
    """What the GPU would run, by the disassembler that comes with Triton."""
    place = find_spec("triton")
    assert place is not None and place.origin is not None
    tool = Path(place.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


def executed(assembly: str, turns: list[int]) -> dict[str, float]:
    """How often a warp runs each kind of instruction, where the loops, outermost first, are run so many times."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*);", line):
            target = re.search(r"\.L_x_\d+", found[2])
            # A jump back closes a loop; the last one, on itself, pads the program.
            if found[1] == "BRA" and target and labels.get(target[0], len(names)) < len(names):
                loops.append((labels[target[0]], len(names)))
            names.append(found[1])
    loops.sort(key=lambda loop: loop[0] - loop[1])  # the longest is the outermost
    if len(loops) != len(turns):
        raise RuntimeError(f"instructions: expected {len(turns)} loops in the program, found {len(loops)}.")
    times = [1.0] * len(names)
    for (begin, end), count in zip(loops, turns, strict=True):
        for at in range(begin, end + 1):
            times[at] *= count
    counts: dict[str, float] = {}
    for name, count in zip(names, times, strict=True):
        if name != "NOP":
            counts[name] = counts.get(name, 0.0) + count
    return counts


def per_element(choice: Any, grid: tuple[int, int], dtype: str, **settings: Any) -> dict[str, float]:
    """Instructions for an element of the grid, those that spill registers among them, and bytes of shared memory."""
    from ffr import _frequency_kernel as kernel

    h, w = grid
    built = build(choice, grid, dtype, **settings)
    known = kernel.constants(h, w, settings["tokens"], 1)
    step = min(choice.kwargs["ROWS"], known["H"])
    loops = ((h, step, known["H"]), (w, known["COLUMNS"], known["W"]))
    counts = executed(
        disassembled(built.asm["cubin"]), [-(-real // part) for real, part, padded in loops if part < padded]
    )
    elements = h * w * (choice.kwargs["TILE"] // (known["H"] * known["W"]))
    threads = 32 * choice.num_warps
    spilled = counts.get("LDL", 0) + counts.get("STL", 0)
    return {
        "instructions": sum(counts.values()) * threads / elements,
        "spilled": spilled * threads / elements,
        "shared": built.metadata.shared,
    }


def best(grid: tuple[int, int], dtype: str, **settings: Any) -> dict[str, Any]:
    """The choice with the fewest instructions."""
    from ffr import _frequency_kernel as kernel

    known = kernel.constants(*grid, settings["tokens"], 1)
    rows = [
        {"choice": str(choice), **per_element(choice, grid, dtype, **settings)}
        for choice in kernel.pruned(kernel.choices(), {}, **known)
    ]
    return min(rows, key=lambda row: row["instructions"])


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    issued = arguments.multiprocessors * SLOTS * arguments.clock
    rows, cells = [], []
    for grid in arguments.grids:
        for tokens in (True, False):
            if tokens and max(grid) > 64:
                continue
            for dtype in arguments.dtypes:
                for join in (False, True):
                    found = best(grid, dtype, tokens=tokens, join=join, capability=arguments.capability)
                    # One tensor is read and two are written, or the other way round.
                    busy = found["instructions"] / issued / (3 * BYTES[dtype] / arguments.copy_rate)
                    case = {"grid": grid, "layout": "tokens" if tokens else "maps", "dtype": dtype, "backward": join}
                    rows.append({**case, **found, "issue_share_at_copy_rate": busy})
                    name = f"{grid[0]} x {grid[1]} {dtype} {case['layout']} {'backward' if join else 'forward'}"
                    counted = (f"{found['instructions']:.0f}", f"{found['spilled']:.1f}", f"{busy:.0%}")
                    cells.append((name, *counted, f"{found['shared'] / 1024:.0f} KB"))
    note = (
        f"Counted in the machine code for sm_{arguments.capability}, not measured; the choice with the fewest. "
        f"Issue slots: what share of {arguments.multiprocessors} x 4 a clock of {arguments.clock / 1e9:g} GHz the "
        f"kernel needs to keep up with a copy of {arguments.copy_rate / 1e12:g} TB/s; above 100 % it cannot."
    )
    columns = ("band split, fused", "instructions an element", "of them spills", "issue slots", "shared memory")
    harness.table("Instructions of the fused kernel", columns, cells, [note])
    print("wrote", harness.save("instructions", asdict(arguments), rows, out=arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
