"""The band split against four FFT forms of the same filter, and against the least that memory allows.

    python benchmarks/frequency.py --quick          # the sizes and dtypes of the goals, two minutes
    python benchmarks/frequency.py                  # every size, dtype and layout, batch 4
    python benchmarks/frequency.py --batches 1 4 16 64
    python benchmarks/frequency.py --device cuda    # events, inputs rotated beyond the cache, kernel and products

All use the same box mask, even about frequency zero, so that results agree; the usual `c - r : c + r` is no such mask.
The opponents, written here from the formula: "shifts" is what papers publish (fft2, fftshift, mask, ifftshift, ifft2,
real part), "fft2" the same without shifts, "rfft2" the half spectrum, "scipy" scipy.fft on the CPU. No FFT exists in
bfloat16, so all go through float32. "floor" reads once and writes twice: a copy, and a subtraction of what was read.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import cycle, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import tyro
from scipy import fft as scipy_fft
from torch import Tensor

from ffr import frequency, split_bands

GRIDS = ((14, 14), (16, 16), (28, 28), (32, 32), (27, 41), (56, 56), (64, 64), (128, 128))
QUICK = {"cpu": (((28, 28), 4), ((27, 41), 4)), "cuda": (((28, 28), 16), ((56, 56), 64))}  # grid and batch
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}  # of the largest value
LAYOUTS = ("tokens", "maps")
CACHE = 2**28  # bytes over which inputs rotate on a GPU: more than its second-level cache
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arguments:
    """The band split against FFT forms and the memory floor."""

    quick: bool = False
    """float32 and bfloat16 alone, 28 x 28 and 27 x 41 (on a GPU 56 x 56), batch 4 (16 and 64)"""
    batches: tuple[int, ...] = (4,)
    channels: int = 768
    mu: float = 0.4
    limit: float = 0.6
    """GiB that one input may take; larger cases are left out, and named"""
    rounds: int = 7
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None
    """JSON; the plot lies beside it. By default results/DATE-DEVICE-frequency.json"""


def box(size: int, mu: float, *, half: bool = False) -> Tensor:
    """1 for the frequencies kept, in the order of an FFT."""
    cycles = torch.fft.rfftfreq(size) if half else torch.fft.fftfreq(size)
    return ((cycles * size).abs().round() <= frequency.passed(size, mu)).float()


class Opponent:
    """One form of the filter by FFT, for maps (B, D, h, w) or tokens (B, h w, D), on the axes where they lie."""

    def __init__(self, name: str, grid: tuple[int, int], mu: float, layout: str, device: str) -> None:
        self.name, self.grid, self.maps = name, grid, layout == "maps"
        self.axes = (2, 3) if self.maps else (1, 2)
        mask = box(grid[0], mu)[:, None] * box(grid[1], mu, half=name == "rfft2")
        if name == "shifts":
            mask = torch.fft.fftshift(mask)
        self.mask = (mask if self.maps else mask[..., None]).to(device)

    def __call__(self, features: Tensor) -> Pair:
        x = features if self.maps else features.unflatten(1, self.grid)
        low = self.filtered(x.float()).to(features.dtype)
        low = low if self.maps else low.flatten(1, 2)
        return low, features - low

    def filtered(self, x: Tensor) -> Tensor:
        axes = self.axes
        if self.name == "shifts":
            spectrum = torch.fft.fftshift(torch.fft.fft2(x, dim=axes), dim=axes)
            return torch.fft.ifft2(torch.fft.ifftshift(spectrum * self.mask, dim=axes), dim=axes).real
        if self.name == "fft2":
            return torch.fft.ifft2(torch.fft.fft2(x, dim=axes) * self.mask, dim=axes).real
        if self.name == "rfft2":
            return torch.fft.irfft2(torch.fft.rfft2(x, dim=axes) * self.mask, s=self.grid, dim=axes)
        spectrum = scipy_fft.fft2(x.numpy(), axes=axes) * self.mask.numpy()
        return torch.from_numpy(scipy_fft.ifft2(spectrum, axes=axes).real)


def products(features: Tensor, mu: float, grid: tuple[int, int]) -> Pair:
    """The plain products that a compiler sees: on a GPU what runs where the kernel does not fit."""
    low, high = frequency._as_graph(features, mu, *grid)
    return low, high


def floor(features: Tensor) -> Pair:
    """Read once, write twice, about: what a split cannot beat."""
    return features.clone(), features - features


def forms(grid: tuple[int, int], layout: str, arguments: Arguments) -> dict[str, Callable[[Tensor], Pair]]:
    """All ways to split features of one grid and layout."""
    mu, device = arguments.mu, arguments.device
    given = grid if layout == "tokens" else None
    found: dict[str, Callable[[Tensor], Pair]] = {"ours": lambda x: tuple(split_bands(x, mu, grid=given))}
    if device != "cpu":
        found["products"] = lambda x: products(x, mu, grid)
    names = ("shifts", "fft2", "rfft2", *(("scipy",) if device == "cpu" else ()))
    return {**found, **{name: Opponent(name, grid, mu, layout, device) for name in names}}


def rotated(function: Callable[[Tensor], object], inputs: list[Tensor]) -> Callable[[], object]:
    """Call `function` with one input after the other, so that none is in the cache."""
    turns = cycle(inputs)
    return lambda: function(next(turns))


def both_ways(function: Callable[[Tensor], Pair], weights: Pair) -> Callable[[Tensor], Tensor]:
    """Forward and backward, gradients in both bands."""

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, weights)[0]

    return run


class Case(NamedTuple):
    """What is split."""

    dtype: str
    grid: tuple[int, int]
    batch: int
    layout: str

    def features(self, arguments: Arguments) -> Tensor:
        """Maps or tokens to split."""
        shape = (self.batch, arguments.channels, *self.grid)
        if self.layout == "tokens":
            shape = (self.batch, self.grid[0] * self.grid[1], arguments.channels)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(arguments.device, DTYPES[self.dtype])


def compile_ahead(cases: list[Case], arguments: Arguments) -> None:
    """Let processes compile the kernels of all cases side by side; Triton keeps them on the disk.

    Each takes as much memory as a case does. What goes wrong here comes up again where it is measured.
    """
    cuda = arguments.device.startswith("cuda")
    room = torch.cuda.mem_get_info(arguments.device)[0] / 2**30 if cuda else 20 * arguments.limit
    workers = max(1, min(len(cases), os.cpu_count() or 1, 8, int(room / (10 * arguments.limit))))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            done = [pool.submit(split_once, case, arguments) for case in cases]
            problems = [error for one in done if (error := one.exception()) is not None]
        except BrokenProcessPool as error:
            problems = [error]
        finally:
            pool.shutdown(cancel_futures=True)
    if problems:
        print(f"compiling ahead failed for {len(problems)} of {len(cases)} cases: {problems[0]}")


def split_once(case: Case, arguments: Arguments) -> None:
    """Forward and backward, as they are measured."""
    x = case.features(arguments)
    way = forms(case.grid, case.layout, arguments)["ours"]
    both_ways(way, (torch.randn_like(x), torch.randn_like(x)))(x)


def measured(one: Case, arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Rows of one case: forward, and forward with backward."""
    dtype, grid, batch, layout = one
    x = one.features(arguments)
    copies = 1 if arguments.device == "cpu" else max(1, CACHE // x.nbytes)
    inputs = [x, *(x.clone() for _ in range(copies - 1))]
    weights = torch.randn_like(x), torch.randn_like(x)
    ways = forms(grid, layout, arguments)
    exact = ways["ours"](x.double())[0]
    apart = {name: float((way(x)[0].double() - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
    if max(apart.values()) > TOLERANCE[dtype]:
        raise RuntimeError(f"{grid} {dtype} {layout}: results differ: {apart}")
    for kind in ("forward", "forward + backward"):
        single = kind == "forward"
        # scipy has no derivative
        chosen = {
            name: way if single else both_ways(way, weights) for name, way in ways.items() if single or name != "scipy"
        }
        calls = {name: rotated(torch.no_grad()(way) if single else way, inputs) for name, way in chosen.items()}
        # a backward pass reads two gradients and writes one
        calls["floor"] = rotated(floor if single else lambda x: (floor(x), weights[0] + weights[1]), inputs)
        if arguments.device != "cpu":
            calls["copy"] = rotated(torch.clone, inputs)
        times = harness.measure(calls, rounds=arguments.rounds, device=arguments.device)
        peaks = {name: harness.peak_bytes(call, arguments.device) / x.nbytes for name, call in calls.items()}
        best = {name: min(times[name]) for name in ("ours", "floor")}
        yield {
            "grid": f"{grid[0]} x {grid[1]}",
            "batch": batch,
            "dtype": dtype,
            "layout": layout,
            "kind": kind,
            "times_faster_than": {
                name: harness.ratio(times, name, "ours")._asdict()
                for name in calls
                if name not in ("ours", "floor", "copy")
            },
            "times_the_floor": harness.ratio(times, "ours", "floor")._asdict(),
            # we move three tensors, or with the backward pass six, and a copy two
            "share_of_copy_rate": harness.spread(
                [(1.5 if single else 3) * a / b for a, b in zip(times["copy"], times["ours"], strict=True)]
            )._asdict()
            if "copy" in times
            else None,
            "peak_inputs": peaks,
            "relative_difference": apart,
            "gigabytes_per_second": {name: 3 * x.nbytes / time / 1e9 for name, time in best.items()},
            "fused": arguments.device != "cpu" and frequency._fused(x, *grid) is not None,
        }


def measure(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """All cases that fit."""
    grids = [(grid, batch) for grid in GRIDS for batch in arguments.batches]
    if arguments.quick:
        grids = QUICK["cpu" if arguments.device == "cpu" else "cuda"]
    cases = []
    for dtype in list(DTYPES)[:2] if arguments.quick else DTYPES:
        for grid, batch in grids:
            size = batch * arguments.channels * grid[0] * grid[1] * DTYPES[dtype].itemsize / 2**30
            if size > arguments.limit:
                print(f"left out: {dtype}, {grid[0]} x {grid[1]}, batch {batch}: {size:.2f} GiB")
                continue
            cases += [Case(dtype, grid, batch, layout) for layout in LAYOUTS]
    if arguments.device.startswith("cuda"):
        compile_ahead(cases, arguments)
    for one in cases:
        yield from measured(one, arguments)
        print(".", end="", flush=True)
    print()


def show(arguments: Arguments, rows: list[dict[str, Any]]) -> None:
    """The table of some rows."""
    names = [name for name in ("shifts", "fft2", "rfft2", "scipy", "products") if name in rows[0]["times_faster_than"]]
    cells = []
    for row in rows:
        faster = row["times_faster_than"]
        way = "F" if row["kind"] == "forward" else "F+B"
        cells.append(
            (
                f"{row['grid']} B{row['batch']} {row['dtype']} {row['layout']} {way}",
                harness.Ratio(**faster[names[0]]),
                *(f"{faster[name]['median']:.1f}" if name in faster else None for name in names[1:]),
                f"{row['times_the_floor']['median']:.1f}",
                f"{row['share_of_copy_rate']['median']:.0%}" if row["share_of_copy_rate"] else None,
                f"{row['peak_inputs']['ours']:.1f} / {row['peak_inputs']['shifts']:.1f}",
                f"{row['relative_difference']['ours']:.0e}",
            )
        )
    columns = ("case", *names, "x floor", "copy rate", "peak, shifts", "difference")
    harness.table("FrequencyMask: times faster than", columns, cells, notes(arguments))


def notes(arguments: Arguments) -> list[str]:
    """How it was measured."""
    return [
        f"{harness.name_of(arguments.device)}, {arguments.threads} thread(s), D = {arguments.channels}, mu = "
        f"{arguments.mu}; {arguments.rounds} interleaved rounds, median and quartiles of the ratios.",
        "F forward, B backward. x floor: our time over that of the floor. Copy rate: the share that we "
        "reach of what a copy reads and writes in a second, on a GPU. Peak: of torch's allocator above the inputs, "
        "in sizes of the input, ours and that of the shifts. Difference: ours to float64, of the largest value.",
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Times faster than fft2 with shifts, by grid; a row of panels for each batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds, batches = ("forward", "forward + backward"), sorted({row["batch"] for row in rows})
    size = (11, 0.8 + 3.2 * len(batches))
    figure, panels = pyplot.subplots(len(batches), 2, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for batch, axes in zip(batches, panels, strict=True):
        grids = list(dict.fromkeys(row["grid"] for row in rows if row["batch"] == batch))
        for axis, kind in zip(axes, kinds, strict=True):
            for dtype, layout in product(DTYPES, LAYOUTS):
                wanted = {"batch": batch, "kind": kind, "dtype": dtype, "layout": layout}
                some = [row for row in rows if wanted.items() <= row.items()]
                if not some:
                    continue
                low, middle, high = (
                    [row["times_faster_than"]["shifts"][key] for row in some] for key in ("low", "median", "high")
                )
                spread = [[m - x for m, x in zip(middle, low, strict=True)]]
                spread += [[x - m for m, x in zip(middle, high, strict=True)]]
                axis.errorbar(
                    [grids.index(row["grid"]) for row in some], middle, spread, color=f"C{list(DTYPES).index(dtype)}",
                    linestyle="-" if layout == "tokens" else "--", marker="o", label=f"{dtype}, {layout}",
                )  # fmt: skip
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.set(title=f"{kind}, batch {batch}", yscale="log", xticks=range(len(grids)), xticklabels=grids)
            axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axis.tick_params("x", labelsize="small")
        axes[0].set_ylabel("times faster than\nfft2 with shifts")
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=6, fontsize="small", handlelength=4)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=110)
    pyplot.close(figure)
    part.replace(path)


def main() -> int:
    """Run from the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = harness.until_stopped(measure(arguments))
    show(arguments, rows)
    path = harness.save("frequency", asdict(arguments), rows, device=arguments.device, out=arguments.out)
    plot(rows, path.with_suffix(".png"))
    print("wrote", path, "and", path.with_suffix(".png").name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
