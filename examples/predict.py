"""Segment images with trained weights: files, folders or globs.

    python examples/predict.py photos --weights runs/voc/best.safetensors --out predictions
    python examples/predict.py 'photos/**/*.jpg' more/1.png --weights runs/voc/best.safetensors --multi --crf

Writes labels/NAME.png (indexed, VOC colours, 0 background, 1..K classes), overlays/NAME.jpg and, with --probabilities,
probabilities/NAME.npz, all at the size of the image, turned as its EXIF orientation says. NAME is the path below the
folder or glob that was given, without its suffix; predict.json says which file it came from. A broken file is skipped
and named at the end. A run that was cut off goes on with the same command.
"""

import glob
import json
import os
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import numpy as np
    import torch
    import tyro
    from PIL import Image
    from recipe.config import on_cpu
    from recipe.data import SUFFIXES, decoding, left_alone, loading, read_image
    from recipe.evaluation import Protocol, look, queue_for, refining, scales_of, segment
    from recipe.files import LOCK, alone, files_below, open_folder, write_text, written
    from recipe.prepare import command, digest
    from recipe.progress import Bar, say
    from recipe.weights import Trained, load_weights, versions
    from rich.console import Console
except ImportError as error:
    if __name__ != "__main__":  # visualize takes from here
        raise
    sys.exit(f"predict needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ffr.draw import load_label, overlay, save_label

RECORD = "predict.json"
FOLDERS = {"labels": ".png", "overlays": ".jpg", "probabilities": ".npz"}
SHOWN = 20  # skipped files on the screen; the record has all


@dataclass(frozen=True)
class Settings:
    """Segment images with trained weights."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """images, folders (searched to their bottom) or globs"""
    weights: Path
    """.safetensors file of train.py; it knows its network and classes"""
    out: Path = Path("runs/predict")
    """a new folder, or an earlier output to complete"""
    overwrite: bool = False
    """make every picture again, and replace those that were made with other settings"""
    multi: bool = False
    """look at --scales and the mirrored image; slower and somewhat better"""
    scales: tuple[float, ...] = (1.0, 1.25, 1.5)
    """of --multi; the maximum over them counts"""
    crf: bool = False
    """refine with the dense CRF"""
    crf_prune: float = 0.0
    """labels whose probability exceeds this nowhere in an image stay out of its CRF: faster with many classes"""
    max_side: int = 1024
    """larger images are shrunk to this for the network and the CRF, and the result enlarged again"""
    overlays: bool = True
    """write the image with the colours of the labels on it"""
    alpha: float = 0.5
    """opacity of these colours"""
    probabilities: bool = False
    """write the probability of each label: float16 (K + 1, H, W)"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward pass"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    workers: int = 2
    """processes that read images; 0: none, in the main process"""
    crf_workers: int | None = None
    """processes for the CRF, by default one a CPU; 0: none, in the main process"""

    def check(self) -> None:
        """Refuse values that cannot be used, by the name of their flag."""
        if not self.inputs:
            raise ValueError("INPUTS: name an image, a folder or a glob.")
        for name, least in (("max_side", 16), ("workers", 0), ("crf_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"--alpha: expected 0 to 1, got {self.alpha}.")
        self.protocol().check()

    def protocol(self) -> Protocol:
        """How the network looks at an image."""
        many = {"scales": self.scales, "flip": True} if self.multi else {}
        return Protocol(**many, crf=self.crf, precision=self.precision, crf_prune=self.crf_prune)

    def folders(self) -> list[str]:
        """What is written for an image."""
        wanted = {"labels": True, "overlays": self.overlays, "probabilities": self.probabilities}
        return [folder for folder in FOLDERS if wanted[folder]]

    def same(self) -> dict[str, Any]:
        """What decides the pixels: pictures made with something else do not belong into one folder."""
        protocol = self.protocol()
        return {
            "weights": digest(self.weights),
            "scales": list(protocol.scales),
            "flip": protocol.flip,
            "crf": self.crf,
            "crf_prune": self.crf_prune,
            "max_side": self.max_side,
            "alpha": self.alpha,
            "precision": self.precision,
        }


# Names ------------------------------------------------------------------------------------------------------------


def find(inputs: Iterable[str], out: Path, flag: str = "INPUTS") -> tuple[dict[Path, Path], list[Path]]:
    """Every image -> the folder that its name counts from, and what is no image, all absolute; nothing below `out`."""
    found: dict[Path, Path] = {}
    others: set[Path] = set()
    for given in inputs:
        matches, rest, root = at(given)
        if not matches:
            kinds = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{flag}: there is no image ({kinds}) at {given!r}. Check its spelling; quote a glob.")
        for match in matches:
            found.setdefault(absolute(match), absolute(root))
        others |= {absolute(file) for file in rest}
    found = {file: root for file, root in found.items() if not file.is_relative_to(absolute(out))}
    if not found:
        raise ValueError(f"{flag}: all images lie below --out {out}. Name another folder.")
    return found, sorted(file for file in others - found.keys() if not file.is_relative_to(absolute(out)))


def at(given: str) -> tuple[list[Path], list[Path], Path]:
    """The images at a file, a folder or a glob, sorted; the other files there; and the folder that names count from.

    A file that is named is taken at its word; elsewhere an image is what is called like one.
    """
    root = Path(given)
    if root.is_file():
        return [root], [], root.parent
    if root.is_dir():
        files = list(files_below(root))
    else:
        root = root.parent
        while glob.has_magic(str(root)):
            root = root.parent
        *parts, last = Path(given).relative_to(root).parts
        if given.endswith(("/", os.sep)) and last != "**":
            last += "/"  # folders alone
        files = sorted(set(globbed(root, (*parts, last))))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    return images, [file for file in files if file.suffix.lower() not in SUFFIXES], root


def globbed(folder: Path, parts: tuple[str, ...], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files that the parts of a glob match below a folder, and those below the folders that they match.

    A link to a folder `above` is not followed: glob itself would, 40 times over, and of two of them find no end.
    """
    if not parts:
        yield from files_below(folder, above) if folder.is_dir() else [folder]
        return
    if not folder.is_dir() or (here := folder.resolve()) in above:  # a link to itself cannot be resolved
        return
    part, rest = parts[0], parts[1:]
    if part == "**":  # no folder, or any and the same again
        yield from globbed(folder, rest, above)
        part, rest = "*/", parts
    for match in sorted(glob.glob(part, root_dir=folder)):
        yield from globbed(folder / match, rest, () if Path(match).name == ".." else (*above, here))


def absolute(path: Path) -> Path:
    """Without `..`; links keep their name, but for those that `..` goes back from."""
    if ".." in path.parts:
        return path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    return Path(os.path.abspath(path))


def name_all(found: Mapping[Path, Path], before: Mapping[str, str]) -> dict[str, Path]:
    """Name -> image, no two names alike, not even without regard to case. Who has a name in `before` keeps it.

    An image is called after its path below its root, without the suffix. Where several would be called alike, all of
    them keep the suffix, or get the folder above in front, and so on.
    """
    known = {source: name for name, source in before.items()}
    names = {known[str(file)]: file for file in found if str(file) in known}
    taken = {name.casefold() for name in before}
    rest = [file for file in found if str(file) not in known]
    for level in range(2 * max(len(root.parts) for root in found.values())):
        wanted = {file: long_name(file, found[file], level) for file in rest}
        asked = Counter(name.casefold() for name in wanted.values())
        free = {file: name for file, name in wanted.items() if asked[name.casefold()] == 1}
        free = {file: name for file, name in free.items() if name.casefold() not in taken}
        names |= {name: file for file, name in free.items()}
        taken |= asked.keys()
        rest = [file for file in rest if file not in free]
    for file in rest:  # they differ by the case of a letter alone
        short = long_name(file, found[file], 1)
        name = next(name for i in count(2) if (name := f"{short}~{i}").casefold() not in taken)
        names[name] = file
        taken.add(name.casefold())
    return dict(sorted(names.items()))


def long_name(file: Path, root: Path, level: int) -> str:
    """The path below `root`, without and with suffix, then each with one more of the folders above."""
    above, suffix = divmod(level, 2)
    path = Path(*root.parts[max(1, len(root.parts) - above) :], file.relative_to(root))
    return (path if suffix else path.with_suffix("")).as_posix()


# The folder -------------------------------------------------------------------------------------------------------


def claim(settings: Settings) -> dict[str, str]:
    """Make --out ours, or refuse it; name -> image of earlier runs.

    It may be new, empty, or of earlier runs with the same settings. With --overwrite, pictures that were made with
    other settings are removed: those in the record, and nothing else.
    """
    out, same = settings.out, settings.same()
    before: dict[str, str] = {}
    if any(path.name != LOCK for path in out.iterdir()):
        try:
            record = json.loads((out / RECORD).read_text(encoding="utf-8"))
            then, before = record["settings"], dict(record["images"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out: {out} holds something else. Name a new folder.") from error
        if then != same:
            if not settings.overwrite:
                changed = (f"{key} was {then.get(key)}, now {same[key]}" for key in same if then.get(key) != same[key])
                raise ValueError(
                    f"--out: the pictures in {out} were made with other settings ({'; '.join(changed)}). Name a new "
                    "folder, or add --overwrite to replace them."
                )
            for name in before:
                for folder, suffix in FOLDERS.items():
                    (out / folder / f"{name}{suffix}").unlink(missing_ok=True)
            before = {}
        for folder in FOLDERS:
            for part in (out / folder).rglob(".*"):  # what a killed run was writing
                if part.is_file():
                    part.unlink()
    return before


def whole(path: Path, source: Path) -> bool:
    """Whether a result is there, can be read to its end, and is not older than its image."""
    try:
        if path.stat().st_mtime < source.stat().st_mtime:
            return False
        if path.suffix == ".png":
            with decoding("whole", path):
                load_label(path)
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
        else:
            with decoding("whole", path), Image.open(path) as picture:
                picture.load()
    except Exception:  # decoders raise whatever they like; it is made again
        return False
    return True


def write_record(settings: Settings, trained: Trained, names: Mapping[str, str], skipped: Mapping[str, str]) -> None:
    """Say which file every picture is of, and what made it."""
    record = {
        "settings": settings.same(),
        "weights": str(settings.weights),
        "classes": trained.classes,
        "versions": versions(),
        "skipped": skipped,
        "images": names,
    }
    write_text(settings.out / RECORD, json.dumps(record, indent=2) + "\n")  # ASCII: names may be no Unicode


# Work -------------------------------------------------------------------------------------------------------------


class Files(Dataset[tuple[str, Tensor | str]]):
    """Name and image, or what is wrong with its file."""

    def __init__(self, names: Mapping[str, Path]) -> None:
        self.names = list(names.items())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        name, file = self.names[index]
        try:
            return name, read_image(file)
        except (ValueError, OSError) as error:
            return name, str(error)


def run(settings: Settings, console: Console) -> int:
    """Segment the images; 1 if a file was skipped, 2 if every one was."""
    settings.check()
    device = torch.device("cpu" if on_cpu(settings.device, settings.precision) else "cuda")
    found, others = find(settings.inputs, settings.out)
    trained = load_weights(settings.weights, device)
    if len(trained.classes) > 255:
        raise ValueError(f"--weights: {len(trained.classes)} classes and background do not fit into one byte a pixel.")
    out = settings.out
    open_folder(out)
    if others:
        say(console, left_alone(others, "INPUTS"))
    with alone(out):
        return complete(settings, trained, found, device, console)


def complete(
    settings: Settings, trained: Trained, found: Mapping[Path, Path], device: torch.device, console: Console
) -> int:
    """Segment what is not done yet of the images found."""
    before = claim(settings)
    names = name_all(found, before)
    everything = {**before, **{name: str(file) for name, file in names.items()}}
    write_record(settings, trained, everything, {})
    places = {name: [settings.out / f / f"{name}{FOLDERS[f]}" for f in settings.folders()] for name in names}
    todo = names
    skipped: dict[str, str] = {}
    with Bar(console) as bar:
        if before and not settings.overwrite:
            looked = bar.track(names.items(), description="checking what is there")
            todo = {name: file for name, file in looked if not all(whole(path, file) for path in places[name])}
        task = bar.add_task("segmenting", total=len(names), completed=len(names) - len(todo))
        for name, problem in segment_all(settings, trained, todo, device):
            if problem is not None:
                skipped[name] = problem
            bar.advance(task)
    write_record(settings, trained, everything, skipped)
    for name, problem in list(skipped.items())[:SHOWN]:
        say(console, f"skipped: {names[name]}: {problem}")
    if len(skipped) > SHOWN:
        say(console, f"skipped: {len(skipped) - SHOWN} more, all in {settings.out / RECORD}")
    kept = f", kept {len(names) - len(todo):,} of an earlier run" if len(todo) < len(names) else ""
    say(
        console,
        f"wrote {' and '.join(settings.folders())} of {len(todo) - len(skipped):,} images to {settings.out}{kept}, "
        f"skipped {len(skipped):,}",
    )
    return 2 if len(skipped) == len(names) else 1 if skipped else 0


def segment_all(
    settings: Settings, trained: Trained, todo: Mapping[str, Path], device: torch.device
) -> Iterator[tuple[str, str | None]]:
    """Write what is wanted of every image; its name, and what was wrong with it if it was skipped."""
    model, protocol = trained.model, settings.protocol()
    scales, patch = scales_of([protocol]), model.encoder.patch_size
    reading = loading(Files(todo), batch_size=None, num_workers=min(settings.workers, len(todo)), collate_fn=tuple)
    workers = min((os.cpu_count() or 1) if settings.crf_workers is None else settings.crf_workers, len(todo))
    waiting: deque[tuple[str, Tensor, Future[Any]]] = deque()
    crf = refining(workers, settings.crf_prune, probabilities=True) if settings.crf else nullcontext()
    with crf as refine, reading as images:
        for name, image in images:
            if isinstance(image, str):
                yield name, image
                continue
            small = shrunk(image, settings.max_side)[None]
            size = (small.shape[2], small.shape[3])
            try:
                views = look(model, small.to(device), scales, settings.precision)
                scores = segment(views, protocol, size, patch)[0].cpu()
            except torch.OutOfMemoryError:
                yield name, f"the memory of {device} is too small for it; lower --max-side"
                continue
            if refine is None:
                save(settings, trained, name, image, scores, scores.softmax(0))
                yield name, None
                continue
            waiting.append((name, image, refine(small[0], scores.softmax(0))))
            while len(waiting) > queue_for(workers):
                yield collect(settings, trained, *waiting.popleft()), None
        while waiting:
            yield collect(settings, trained, *waiting.popleft()), None


def collect(settings: Settings, trained: Trained, name: str, image: Tensor, future: "Future[Any]") -> str:
    """Wait for the CRF and write its result."""
    probs = torch.from_numpy(future.result())
    save(settings, trained, name, image, probs, probs)
    return name


def shrunk(image: Tensor, most: int) -> Tensor:
    """An image, uint8 (3, H, W), whose longer side is at most so many pixels."""
    longer = max(image.shape[1:])
    if longer <= most:
        return image
    size = [max(1, round(side * most / longer)) for side in image.shape[1:]]
    small = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def enlarged(channel: Tensor, size: Sequence[int]) -> Tensor:
    """One map (h, w) at another size."""
    if channel.shape == tuple(size):
        return channel
    return F.interpolate(channel[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def best_label(scores: Tensor, size: Sequence[int]) -> Tensor:
    """The label of the highest score, uint8 (H, W): one channel at a time, for an image of any size."""
    best, label = torch.full(tuple(size), -torch.inf), torch.zeros(tuple(size), dtype=torch.uint8)
    same = scores.shape[1:] == tuple(size)  # then a look for those that may win costs more than it saves
    for number in range(len(scores)) if same else contenders(scores):
        score = enlarged(scores[number], size)
        label.masked_fill_(score > best, number)
        torch.maximum(best, score, out=best)
    return label


def contenders(scores: Tensor) -> list[int]:
    """The labels that may be the best of a pixel when the scores (K + 1, h, w) are enlarged; with many, few are.

    What is mixed from four neighbours is at most their greatest: a label is out where another's least is above that.
    """

    def of_four(channel: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        padded = F.pad(channel[None], (0, 1, 0, 1), mode="replicate")[0]
        rows = pick(padded[:-1], padded[1:])
        return pick(rows[:, :-1], rows[:, 1:])

    needed = reduce(torch.maximum, (of_four(channel, torch.minimum) for channel in scores))
    needed -= 1e-5 * scores.abs().max()  # mixing rounds
    return [n for n, channel in enumerate(scores) if not bool((of_four(channel, torch.maximum) < needed).all())]


def save(settings: Settings, trained: Trained, name: str, image: Tensor, scores: Tensor, probs: Tensor) -> None:
    """Write what is wanted of one image, each file whole or not at all; an error names it."""
    size = image.shape[1:]
    label = best_label(scores, size)
    for folder in reversed(settings.folders()):
        path = settings.out / folder / f"{name}{FOLDERS[folder]}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder == "labels":
                save_label(path, label)
                continue
            with written(path) as part:
                if folder == "overlays":
                    Image.fromarray(overlay(image, label, settings.alpha)).save(part, quality=92)
                else:
                    each = np.stack([enlarged(channel, size).half().numpy() for channel in probs])
                    np.savez_compressed(part, probabilities=each, labels=np.array(["background", *trained.classes]))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror or error}; what is done is kept", str(path)) from error


def main() -> int:
    """Run from the command line."""
    return command("predict", Settings, run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
