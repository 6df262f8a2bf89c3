"""What the prepare_*.py scripts share: the folder they may write to, workers, progress and the report."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tyro
from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ffr import crf
from ffr.draw import save_label
from recipe.data import IGNORE, Item, read_mask, write_split
from recipe.files import open_folder, write_text
from recipe.progress import Bar, Screen, say, some

RECORD = "prepare.json"
# what `save_label` and `written` leave when killed
PARTS = r"\.[0-9a-f]{16}\.part|\.(prepare|(voc_)?train(_aug)?|val|test)\.[a-z0-9_]{8}\.(json|txt)"
ROWS = {
    "images": "images",
    "official": "images in the official data",
    "masks_new": "masks written",
    "masks_kept": "masks found good and kept",
    "no_label": "images without any label",
    "label_unseen": "masks without a pixel of a label",
    "mask_unlabelled": "masks with a class that is no label",
    "mask_broken": "images kept without their mask: it cannot be used",
    "broken": "images left out: files broken",
}
SHOWN = 20  # problems on the screen; the record has all
COUNTED = 100  # classes on the screen, the rarest
LARGE = ("ffr.crf", "timm", "torchvision", "PIL.Image", "pycocotools.mask", "tyro", "rich.progress")  # slow to import
Task = TypeVar("Task")
Result = TypeVar("Result")


class Done(NamedTuple):
    """What became of one image: its entry, or what is wrong with its files, or both where it lost its mask alone.

    `values` are those of the mask.
    """

    name: str
    item: Item | None = None
    problem: str | None = None
    kept: bool = False
    values: tuple[int, ...] = ()
    note: str | None = None


# The folder -------------------------------------------------------------------------------------------------------


def claim(
    out: Path,
    script: str,
    settings: dict[str, Any],
    *,
    products: Sequence[str],
    sources: Sequence[Path],
    overwrite: bool,
) -> None:
    """Make `out` ours, or refuse it.

    It may be new, empty, or an earlier output of the same script with the same settings, which is then completed.
    Anything else is refused; with `overwrite` the `products` in it are removed, and nothing else.
    """
    open_folder(out)
    mine = {"script": script, "settings": settings}
    old = _record(out)
    if not overwrite and old is not None and {key: old.get(key) for key in mine} == mine:
        for part in out.rglob(".*"):  # what a killed run was writing
            if part.is_file() and re.fullmatch(PARTS, part.name):
                part.unlink()
        return
    if any(out.iterdir()) and not overwrite:
        if old is not None and old.get("script") == script:
            before = old.get("settings")
            if not isinstance(before, dict) or not isinstance(before.get("files"), dict):
                raise ValueError(
                    f"--out: {out} was prepared by an earlier version, whose {RECORD} has another form. Its lists can "
                    "be used as they are. To prepare it again name a new folder, or add --overwrite: "
                    f"{', '.join(products)} in it are removed first."
                )
            why = "; ".join(_changes(before, settings))
            raise ValueError(
                f"--out: {out} was prepared with other settings or files ({why}). Name a new folder, or add "
                "--overwrite."
            )
        raise ValueError(
            f"--out: {out} holds something else. Name a new folder; with --overwrite {', '.join(products)} in it "
            "are removed first."
        )
    for source in sources:
        for product in products:
            if source.resolve().is_relative_to((out / product).resolve()):
                raise ValueError(f"--out: {out / product} holds the source {source}. Name another folder.")
    try:
        for name in (RECORD, *products):  # without its record the folder is foreign, should we be cut off here
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_text(out / RECORD, json.dumps(mine, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out} ({error.strerror or error}). Name another folder.") from error


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs between two settings, in words; those under `files` are digests."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key != "files":
            if old != new:
                yield f"{key} was {old}, now {new}"
            continue
        for file in sorted(old.keys() | new.keys()):
            if file not in old:
                yield f"{file} is new"
            elif file not in new:
                yield f"{file} is no longer used"
            elif old[file] != new[file]:
                yield f"the contents of {file} have changed"


def _record(out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def digest(path: Path) -> str:
    """Sixteen digits that tell whether the file has changed."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()[:16]


def saved_mask(
    path: Path, num_labels: int, size: tuple[int, int], draw: Callable[[], np.ndarray], source: Path
) -> tuple[bool, tuple[int, ...]]:
    """Keep the mask at `path` if it is good, else write what `draw` gives: (whether it was kept, values in it).

    Raises:
        ValueError: if what is drawn has another size or a foreign value; names the `source` it is drawn from.
        WriteError: if it cannot be written; names `path`.
    """
    mask, kept = None, True
    with contextlib.suppress(FileNotFoundError, ValueError):
        mask = read_mask(path, num_labels, size).numpy()
    if mask is None:
        mask, kept = draw(), False
        if mask.dtype.kind not in "ui" or mask.shape != size:
            raise ValueError(
                f"{source}: expected integers of {size} (H, W) as its image, got {mask.dtype} {mask.shape}"
            )
        if foreign := [int(v) for v in np.unique(mask) if not (0 <= v < num_labels or v == IGNORE)]:
            raise ValueError(f"{source}: expected values 0..{num_labels - 1} or 255 in the mask, got {foreign[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_label(path, mask)
        except OSError as error:
            raise WriteError(f"cannot write {path} ({error.strerror or error}); what is done is kept.") from error
    return kept, values_of(mask)


def values_of(mask: np.ndarray) -> tuple[int, ...]:
    """The values that occur in a mask, rising."""
    return tuple(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())


class WriteError(Exception):
    """A mask could not be written: no fault of one image, so it ends the run."""


# Work -------------------------------------------------------------------------------------------------------------


def work(
    function: Callable[[Task], Done], tasks: Sequence[Task], *, workers: int, title: str, console: Console
) -> list[Done]:
    """Apply `function` to every task in so many processes, in order; 0 means one a CPU."""
    bar = Bar(console)
    run = partial(_guarded, function)
    count = min(workers or os.cpu_count() or 1, max(1, len(tasks)))
    with bar:
        if count == 1:
            return list(bar.track(map(run, tasks), total=len(tasks), description=title))
        with pool_of(count) as pool:
            try:
                results = pool.map(run, tasks, chunksize=max(1, min(32, len(tasks) // (4 * count))))
                return list(bar.track(results, total=len(tasks), description=title))
            except BrokenProcessPool as error:
                raise ValueError(
                    "--workers: a worker process died, often for want of memory. Lower it; what is done is kept."
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _guarded(function: Callable[[Task], Done], task: Task) -> Done:
    """A file that cannot be used is a result; a file that cannot be written ends the run."""
    try:
        return function(task)
    except (ValueError, OSError) as error:
        return Done(getattr(task, "name", str(task)), problem=str(error))


def pool_of(workers: int) -> ProcessPoolExecutor:
    """So many processes of one thread each.

    They are not forked from this one, whose torch, CUDA and progress bar have threads by now. Where it can, they come
    from a server that imports once what takes long and much memory, and share it; elsewhere each starts anew.
    """
    context = get_context("forkserver" if _served() else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


def _served() -> bool:
    """Start the server, if it can import from where this process does, and not from the folder that it runs in."""
    if sys.platform != "linux" or sys.version_info < (3, 11):  # before, that folder cannot be left out
        return False
    from multiprocessing import forkserver  # not every system has one

    forkserver.set_forkserver_preload([name for name in LARGE if name in sys.modules])
    before = os.environ.copy()
    os.environ.update(PYTHONSAFEPATH="1", PYTHONPATH=os.pathsep.join(sys.path))
    try:
        forkserver.ensure_running()
    except OSError:  # no place for its socket: a TMPDIR with a long name
        return False
    finally:
        os.environ.clear()
        os.environ.update(before)
    return True


def start_worker() -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then cancels the rest
    crf.start_worker()


# Report -----------------------------------------------------------------------------------------------------------


class Summary:
    """Collects what was built, writes the splits, and says so in one table."""

    def __init__(self, out: Path, classes: Sequence[str], console: Console) -> None:
        self.out, self.classes, self.console = out, classes, console
        self.rows: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}
        self.masks: dict[str, str] = {}

    def add(self, split: str, done: Iterable[Done], official: int | None = None) -> None:
        """Write a split from its good images; those with broken files are left out and named."""
        done = list(done)
        items = [each.item for each in done if each.item is not None]
        broken = {each.name: each.problem for each in done if each.item is None}
        bare = {each.name: each.problem for each in done if each.item is not None and each.problem is not None}
        self.problems |= broken
        self.masks |= bare
        masked = [each for each in done if each.item is not None and each.item.mask is not None]
        masks = bool(masked or bare)
        shown = [{value - 1 for value in each.values} - {-1, IGNORE - 1} for each in masked]
        labels = [None if each.item.labels is None else set(each.item.labels) for each in masked]
        pairs = [(mask, label) for mask, label in zip(shown, labels, strict=True) if label is not None]
        seen = Counter(label for item in items for label in item.labels or ())
        self.rows[split] = {
            "images": len(items),
            "official": official,
            "masks_new": sum(not each.kept for each in masked) if masks else None,
            "masks_kept": sum(each.kept for each in masked) if masks else None,
            "no_label": sum(item.labels == () for item in items),
            "label_unseen": sum(bool(label - mask) for mask, label in pairs) if masks else None,
            "mask_unlabelled": sum(bool(mask - label) for mask, label in pairs) if masks else None,
            "mask_broken": len(bare) or None,
            "broken": len(broken),
            "images_per_class": {name: seen[k] for k, name in enumerate(self.classes)},
        }
        if items:
            write_split(self.out, split, self.classes, items)
        else:
            (self.out / f"{split}.json").unlink(missing_ok=True)  # of an earlier run, when there were some

    def finish(self, script: str, settings: dict[str, Any], notes: Sequence[str] = ()) -> int:
        """Complete the record, print the tables and the problems; 1 if something was left out, 2 if every image was."""
        record = {
            "script": script,
            "settings": settings,
            "report": self.rows,
            "left_out": self.problems,
            "masks_left_out": self.masks,
        }
        write_text(self.out / RECORD, json.dumps(record, indent=2) + "\n")  # ASCII: names may be no Unicode
        table = Table("", *self.rows, title=escape(f"{script}: {self.out}"))
        for key, head in ROWS.items():
            cells = [row[key] for row in self.rows.values()]
            if any(cell is not None for cell in cells):
                shown = ["-" if cell is None else f"{cell:,}" for cell in cells]
                table.add_row(head, *shown, style="red" if key == "broken" and any(cells) else None)
        for column in table.columns[1:]:
            column.justify = "right"
        self.console.print(table)
        per_split = {split: row["images_per_class"] for split, row in self.rows.items()}
        per_split = {split: counts for split, counts in per_split.items() if any(counts.values())}
        per_class = {name: [counts[name] for counts in per_split.values()] for name in self.classes}
        if per_split:
            self.console.print(class_table(per_class, list(per_split)))
        notes = list(notes)
        for split, row in self.rows.items():
            if row["official"] not in (None, row["images"]):
                notes.append(f"{split}: {row['images']:,} images, the official data has {row['official']:,}.")
        for split, counts in per_split.items():
            if none := [name for name, count in counts.items() if not count]:
                notes.append(f"{split}: no image shows {some(none, SHOWN)}.")
        if single := [name for name, counts in per_class.items() if sum(counts) == 1]:
            notes.append(f"shown by a single image: {some(single)}. Check the spelling.")
        for what, problems in (("left out", self.problems), ("mask left out", self.masks)):
            notes += [f"{what}: {name}: {problem}" for name, problem in list(problems.items())[:SHOWN]]
            if len(problems) > SHOWN:
                notes.append(f"{what}: {len(problems) - SHOWN} more, all in {self.out / RECORD}.")
        for note in notes:
            say(self.console, f"- {note}")
        lists = ", ".join(f"{split}.json" for split, row in self.rows.items() if row["images"])
        said = lists or "no list, for every image is left out,"
        say(self.console, f"wrote {said} in {self.out}")
        return 2 if not lists else 1 if self.problems or self.masks else 0


def class_table(per_class: dict[str, list[int]], splits: Sequence[str]) -> Group:
    """The images of each class, as many side by side as the screen is wide: a misspelt name shows here."""
    shown, which = list(per_class.items()), "each class"
    if len(shown) > COUNTED:
        shown = sorted(shown, key=lambda each: sum(each[1]))[:COUNTED]
        which = f"the {COUNTED} rarest of {len(per_class):,} classes"
    cells = [Text(f"{name} {' + '.join(f'{count:,}' for count in counts)}") for name, counts in shown]
    title = Text(f"images of {which}, {' + '.join(splits)}", style="italic")  # of its own: few classes are narrow
    return Group(title, Columns(cells, padding=(0, 3), column_first=True))


def command(
    name: str,
    settings: type[Any],
    run: Callable[[Any, Console], int],
    description: str | None,
    interrupted: str = "what is done is kept, the same command goes on",
) -> int:
    """Run a script from the command line: 0 all good, 1 some images left out, 2 refused, 130 interrupted."""
    try:
        return run(tyro.cli(settings, description=description), Screen())
    except (ValueError, OSError, WriteError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}.", file=sys.stderr)
        return 130
