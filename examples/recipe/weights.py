"""Trained weights in one safetensors file that knows its network: settings, classes and versions inside."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import ffr
from ffr import FFR
from recipe.config import Config
from recipe.data import EvalImages, SceneExamples, evaluation_data
from recipe.files import written
from recipe.network import build_model


class Trained(NamedTuple):
    """A network with its weights, and what the file says about it; `facts` holds step, scores and versions."""

    model: FFR
    config: Config
    classes: tuple[str, ...]
    facts: dict[str, Any]


def versions() -> dict[str, str]:
    """Of what decides a result."""
    modules = {module.__name__: module.__version__ for module in (ffr, torch, torchvision, timm)}
    return {"python": platform.python_version(), **modules}


def save_weights(path: Path, state: Mapping[str, Tensor], config: Config, classes: Sequence[str], **facts: Any) -> None:
    """Write ``FFR.state_dict()``, whole or not at all; an error names the file.

    Args:
        path: a ``.safetensors`` file.
        state: tensors by name, on any device.
        config: what the network was built and trained with.
        classes: names of the K classes.
        **facts: what JSON can hold, such as step and scores.
    """
    about = {"config": config.to_json(), "classes": list(classes), "versions": versions(), **facts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with written(path) as part:
            save_file(tensors, part, metadata={"ffr": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path} ({said}). Free some space, or name another folder.") from error


def load_weights(path: Path, device: str | torch.device = "cpu") -> Trained:
    """Build the network that a file describes, with its weights, in eval mode. Nothing in the file is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is broken, none of ours, or does not fit; names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--weights: there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("ffr", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"--weights: cannot read {path} ({error}). Expected a .safetensors file of train.py."
        ) from error
    if not isinstance(about, dict):
        raise ValueError(f"--weights: {path} does not say what network it is of. Expected a file of train.py.")
    try:
        config, classes = Config.from_json(about.pop("config")), tuple(about.pop("classes"))
        model = build_model(replace(config, pretrained=False, checkpoint=None, grad_checkpointing=False), len(classes))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--weights: the settings in {path} cannot be used: {error}.") from error
    fill(model, state, f"--weights: {path}")
    return Trained(model.eval().to(device), config, classes, about)


def examples_for(
    trained: Trained, weights: Path, data: Path | None, split: str, count: int
) -> tuple[EvalImages | SceneExamples, Path | None]:
    """The images of a split for trained weights, and their folder: `data`, else the one that they were trained on.

    Args:
        trained, weights: what `load_weights` gave, and of which file.
        data: a prepared folder.
        split: which list of it.
        count: how many embedded scenes, where there is no folder.

    Raises:
        FileNotFoundError: if folder or list is not there; says where the path came from.
        ValueError: if its classes are not those of the weights.
    """
    folder = trained.config.data if data is None else data
    if data is None and folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"--data: there is no folder {folder}, which is recorded in {weights}"
            f"{'' if folder.is_absolute() else ', relative to where train.py ran'}. Pass --data."
        )
    dataset, classes = evaluation_data(replace(trained.config, data=folder, scenes=(1, count)), split)
    if classes != trained.classes:
        raise ValueError(
            f"--data: {folder or 'the embedded scenes'} has the {_listed(classes)}; {weights} was trained on "
            f"{_listed(trained.classes)}. They must be the same, in the same order."
        )
    return dataset, folder


def _listed(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes {', '.join(classes[:4])}{', ...' if len(classes) > 4 else ''}"


def fill(model: FFR, state: Mapping[str, Tensor], owner: str) -> None:
    """Load `state` into `model`; a ValueError names the first names that do not fit."""
    mine = model.state_dict()
    odd = {
        "lacks": mine.keys() - state.keys(),
        "has unknown": state.keys() - mine.keys(),
        "has another shape of": {key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape},
    }
    said = "; ".join(f"{what} {', '.join(sorted(keys)[:3])}" for what, keys in odd.items() if keys)
    if said:
        raise ValueError(f"{owner} is of another model: it {said}. Check --model, --hidden and the classes.")
    model.load_state_dict(dict(state))
