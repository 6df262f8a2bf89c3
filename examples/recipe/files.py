"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not.

    The bytes are on the disk before the name is theirs, so that a crash leaves the old file or the new one. An error
    that names no file, as that of a full disk, names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        Path(name).unlink(missing_ok=True)


def open_folder(out: Path) -> None:
    """Make the folder of --out, or refuse it before any work, for a file in its place or for want of permission."""
    try:
        for path in (out, *out.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"--out: expected a folder, got the file {path}. Name another one.")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out} ({error.strerror or error}). Name another folder.") from error


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder, sorted, hidden ones left out; a dead link is a file, which cannot be read.

    Linked folders are searched, too, unless they lead back to one of the folders `above`.
    """
    here = folder.resolve()
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, (*above, here))
        elif path.is_file() or path.is_symlink():
            yield path


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; an error names it."""
    try:
        with written(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuse a folder while another process is in this block with it: what that one is writing is not ours to remove.

    The lock ends with its process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    path = out / LOCK
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"--out: another run is writing to {out}. Wait for its end, or name another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
