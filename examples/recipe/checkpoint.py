"""Checkpoints: all that a run needs to go on, in one file that is whole or not there; the newest two are kept."""

import hashlib
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from recipe.config import Config
from recipe.files import written

KEPT = 2
# What may differ when a run goes on: it decides where and how fast, and what is reported, not what is learnt.
FREE = {
    "resume", "out", "data", "workers", "device", "compile", "fsdp", "grad_checkpointing",
    "log_every", "val_every", "val_images", "val_split", "save_every", "cam_threshold",
}  # fmt: skip


def fingerprint(names: Sequence[str]) -> str:
    """Sixteen digits that tell whether a run goes on with the same samples."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def save_checkpoint(out: Path, step: int, config: Config, content: dict[str, Any]) -> Path:
    """Write what `load_checkpoint` reads, then remove all but the newest two.

    Raises:
        OSError: if it cannot be written; names the file, and the older ones are untouched.
    """
    path = out / f"checkpoint-{step:08d}.pt"
    try:
        with written(path) as part:
            torch.save({"step": step, "config": config.to_text(), **content}, part)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        kept = ", ".join(old.name for old in checkpoints(out)) or "none"
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({said}). Free some space and add --resume; good ones: {kept}.") from error
    for old in checkpoints(out)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(out: Path) -> list[Path]:
    """Those in a folder, the newest first."""
    ours = (path for path in out.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d{8}\.pt", path.name))
    return sorted(ours, reverse=True)


def load_checkpoint(out: Path, config: Config, *, same: dict[str, Any]) -> dict[str, Any]:
    """The newest checkpoint in `out`. It holds tensors and plain values; nothing in it is executed.

    Args:
        out: folder of the run.
        config: of the run that goes on; may differ in what does not decide what is learnt.
        same: entries that must be as they were, such as the classes.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is broken, or of a run with other settings; names file and flags.
    """
    found = checkpoints(out)
    if not found:
        raise FileNotFoundError(f"--resume: there is no checkpoint in {out}. Leave the flag out to start there.")
    path = found[0]
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = Config.from_json(json.loads(content["config"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        older = f"To go on from {found[1].name}, remove it" if found[1:] else "Start anew in another folder"
        raise ValueError(f"--resume: cannot read {path} ({said}). {older}.") from error
    changed = [
        f"--{field.name.replace('_', '-')} was {getattr(before, field.name)}, now {getattr(config, field.name)}"
        for field in fields(Config)
        if field.name not in FREE and getattr(before, field.name) != getattr(config, field.name)
    ]
    changed += [f"the {key} are others" for key, value in same.items() if content.get(key) != value]
    if changed:
        raise ValueError(f"--resume: {path} is of another run: {'; '.join(changed)}. Name another --out to start anew.")
    return content
