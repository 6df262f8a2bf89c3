"""How every benchmark here measures: interleaved rounds, ratios, peak memory, and where it ran. See README.md."""

import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ffr

RESULTS = Path(__file__).parent / "results"
Function = Callable[[], object]


class Ratio(NamedTuple):
    """Median of the per-round ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def measure(
    functions: Mapping[str, Function], *, rounds: int = 15, warmup: int = 2, seconds: float = 0.02, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each function, one figure a round; within a round the functions take turns, A B C A B C.

    A function that is quicker than `seconds` is called several times a round. On a GPU events time the calls on the
    device, which begins when the host has prepared most of them, and the host waits before and after.
    """
    inner = {}
    for name, function in functions.items():
        for _ in range(max(warmup, 1)):
            function()
        most = 10**9 if device == "cpu" else 200  # so many that the host prepares while the device is held
        inner[name] = min(most, max(1, int(seconds / max(_once(function, 1, device), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_once(function, inner[name], device))
    return times


def _once(function: Function, calls: int, device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(300_000 * calls)  # cycles: the host gets ahead, or a kernel shorter than its launch would wait
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> Ratio:
    """How many times the time of `fast` the time of `slow` is; round by round, so that a busy moment hits both."""
    return spread([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def spread(values: Sequence[float]) -> Ratio:
    """Median and quartiles."""
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_bytes(function: Function, device: str = "cpu") -> int:
    """Peak of torch's allocator during one call, above what lay there before; what the call returns is included."""
    function()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = function()
    events = watched.profiler.kineto_results.events()
    level = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        level += size
        peak = max(peak, level)
    del kept
    return peak


def _at(name: str) -> str:
    """The name, and the line outside torch and this file that it was called from."""
    frame = sys._getframe(2)
    while frame.f_back and (
        f"{os.sep}torch{os.sep}" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


class _Operators(TorchDispatchMode):
    """Notes operators whose result, or whose shape, the host must wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "allclose")
    NAMES += ("bincount", "repeat_interleave", "is_nonzero")

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Note it; also an index by mask, whose count only the device knows."""
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.NAMES or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in chosen):
            self.found.append(_at(name))
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    """Notes methods that copy to the host without an operator of their own, on a CPU tensor."""

    NAMES = ("tolist", "numpy", "cpu", "__array__", "__contains__")

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Note it."""
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(_at(func.__name__))
        return func(*args, **kwargs or {})


@contextmanager
def host_waits(device: str = "cpu") -> Iterator[list[str]]:
    """Collects, for all that runs inside, whatever makes the host wait for the device.

    On a GPU these are torch's own warnings of synchronisation. A CPU has nothing to wait for: there it is operators
    and methods that would wait on a GPU, those inside custom operators excepted.
    """
    found: list[str] = []
    if device == "cpu":
        with _Operators(found), _Methods(found):
            yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "called a synchronizing" in str(one.message)]
    found += [f"{Path(one.filename).name}:{one.lineno}" for one in waits]


class Rows(list[dict[str, Any]]):
    """What was measured, and whether all of it."""

    complete = True


class _Stopped(BaseException):
    """SIGTERM came."""


def until_stopped(rows: Iterable[dict[str, Any]]) -> Rows:
    """The rows, or those that are there when SIGTERM comes, as `timeout` sends it; without any it ends the script.

    Stopped once, a script is left to write what it has: further SIGTERMs are ignored.
    """

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cost what is kept
        raise _Stopped

    found, before = Rows(), signal.signal(signal.SIGTERM, stop)
    try:
        for row in rows:
            found.append(row)
    except _Stopped:
        if not found:
            sys.exit("stopped before the first result")
        found.complete = False
        print(f"\nstopped: {len(found)} results are kept, the rest is missing")
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    if found.complete:
        signal.signal(signal.SIGTERM, before)
    return found


def metadata(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ffr": ffr.__version__,
        "commit": _commit(),
    }


def name_of(device: str) -> str:
    """The processor's or GPU's own name."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def save(
    subject: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    out: Path | None = None,
) -> Path:
    """Write ``results/DATE-device-subject.json``, or `out`; a result that is there is never overwritten."""
    about = metadata(device)
    kind = "cpu" if device == "cpu" else name_of(device).lower().replace(" ", "-")
    path = out or RESULTS / f"{about['date'][:10]}-{kind}-{subject}.json"
    if path.exists():
        raise FileExistsError(f"{path} is there, and results are never edited. Name another file with --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in settings.items() if name != "out"}  # no path of this machine
    complete = getattr(rows, "complete", True)
    record = {"subject": subject, "machine": about, "settings": kept, "complete": complete, "rows": list(rows)}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> None:
    """Print rows; the first column names them. Notes say how it was measured."""
    shown = Table(title=title)
    for position, column in enumerate(columns):
        shown.add_column(column, justify="right" if position else "left")
    for row in rows:
        shown.add_row(*("-" if cell is None else str(cell) for cell in row))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(shown)
    for note in notes:
        console.print(f"- {note}", soft_wrap=True)
