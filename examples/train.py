"""Train FFR from image-level labels: PASCAL VOC, MS COCO, a folder of your own, or the embedded scenes.

    python examples/train.py scenes
    python examples/train.py voc --data data/voc --precision bf16 --out runs/voc
    torchrun --nproc-per-node 4 examples/train.py coco --data data/coco --precision bf16 --compile
    python examples/train.py folder --data data/mine --lambda-h 0 --lambda-l 0        # the same without FFR
    python examples/train.py voc --data data/voc --out runs/voc --resume

Writes to --out: log.jsonl and tensorboard/ (terms, rates, validation), checkpoint-*.pt (the newest two), and the
weights last.safetensors and best.safetensors (by segmentation mIoU on --val-split, from --seg-start on), which
evaluate.py, predict.py and visualize.py read. The preset's name comes first; every field of recipe/config.py is a flag.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

try:
    import torch
    import tyro
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from recipe.bands import band_energies, features_by_depth, high_share
    from recipe.checkpoint import checkpoints, fingerprint, load_checkpoint, save_checkpoint
    from recipe.config import PRESETS, Config, on_cpu
    from recipe.data import evaluation_data, training_data
    from recipe.engine import Diverged, Trainer
    from recipe.evaluation import Protocol, computing, evaluate
    from recipe.files import alone, open_folder, written
    from recipe.progress import Screen, progress, say
    from recipe.weights import save_weights, versions
    from rich.console import Console
except ImportError as error:
    sys.exit(f"train needs {error.name}: run pip install -e '.[examples]' in the checkout of ffr.")

from ffr import FFR

LOG = "log.jsonl"
WEIGHTS = ("last.safetensors", "best.safetensors")
PARTS = (
    r"\.(checkpoint-\d{8}|last|best|log|diverged)\.\w{8}\.(pt|safetensors|jsonl)"  # what `written` leaves when killed
)
SCORED = ("val", "high_band_share")  # lines of a validation
LOOKED_AT = 16  # images of the validation split whose features are split into bands


class Log:
    """Lines of JSON, and the same numbers for TensorBoard; only rank 0 has one."""

    def __init__(self, out: Path, start: int, *, owed: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, which a refused run should not wait for

        path = out / LOG
        kept = []
        if start and path.is_file():  # what was logged after the checkpoint happens again
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that a kill cut off
                    said = json.loads(line)
                    again = owed and said.get("step") == start and said.get("kind") in SCORED
                    if said.get("step", 0) <= start and not again:
                        kept.append(line + "\n")
        with written(path) as part:
            part.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """One line, and a curve for each number in it."""
        try:
            print(json.dumps({"step": step, "kind": kind, **values}), file=self.file, flush=True)
        except OSError as error:  # of a full disk, which names no file
            raise OSError(error.errno, error.strerror or str(error), self.file.name) from error
        for name, value in values.items():
            if kind != "run" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush both."""
        self.file.close()
        self.board.close()


def place(config: Config) -> Accelerator:
    """Find the devices; refuse what they cannot do."""
    return Accelerator(
        cpu=on_cpu(config.device, config.precision),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),  # before its start the head gets no gradient
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # the first rank may write to a slow disk meanwhile
        ],
    )


@contextlib.contextmanager
def claim(out: Path, resume: bool) -> Iterator[None]:
    """Make the folder of the run and hold it, or refuse one that holds another run, finished or not."""
    open_folder(out)
    if not resume and (checkpoints(out) or any((out / name).exists() for name in WEIGHTS)):
        raise ValueError(f"--out: {out} holds a run. Add --resume to go on with it, or name another folder.")
    with alone(out):
        for part in out.iterdir():
            if re.fullmatch(PARTS, part.name):
                part.unlink()
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM goes on a list, so that the step can be finished and saved; a second SIGINT ends it.

    A second SIGTERM does not: schedulers send it to every process, and launchers pass it on once more.
    """
    got: list[int] = []

    def note(number: int, frame: object) -> None:
        if got and number == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """What happens around the steps: logs, validation, checkpoints."""

    def __init__(self, config: Config, accelerator: Accelerator, console: Console) -> None:
        self.config, self.accelerator, self.console = config, accelerator, console
        self.main = accelerator.is_main_process
        self.samples, self.classes = training_data(config)
        self.examples = None
        if config.val_split is not None:
            if config.data is not None and not (path := config.data / f"{config.val_split}.json").is_file():
                raise ValueError(f"--val-split: there is no {path}. Name another list, or add --val-split None.")
            self.examples, classes = evaluation_data(config, config.val_split)
            if classes != self.classes:
                raise ValueError(f"--val-split: {config.val_split} has other classes than {config.train_split}.")
            if not self.examples.scored():
                raise ValueError(f"--val-split: no image of {config.val_split} has a mask. Add --val-split None.")
            if not self.examples.scored(config.val_images):
                raise ValueError(f"--val-images: none of the first {config.val_images} has a mask. Raise it.")
        self.same = {"classes": list(self.classes), "samples": fingerprint(self.samples.names())}
        self.scored = [config.val_split, config.val_images]
        self.start, self.best, self.owed = 0, -1.0, False
        self.log: Log | None = None
        if config.resume:
            self.resume()
        else:
            self.trainer = Trainer(config, self.samples, len(self.classes), accelerator)
        self.over = self.start == config.steps and not self.owed

    def resume(self) -> None:
        """Go on from the newest checkpoint; of another run, it is refused before a network is built."""
        config = self.config
        content = load_checkpoint(config.out, config, same=self.same)
        bare = replace(config, pretrained=False, checkpoint=None)  # the checkpoint has all weights
        self.trainer = Trainer(bare, self.samples, len(self.classes), self.accelerator)
        self.trainer.load(content)
        self.start = content["step"]
        if content["scored"] == self.scored:  # else the best so far is of other images
            self.best = content["best"]
        self.owed = content["owed"] and self.examples is not None
        if self.start < config.steps or self.owed:
            self.say(f"going on from step {self.start}")

    def train(self) -> int:
        """All steps; 0, or the exit code of what stopped them."""
        config, done = self.config, self.start
        if self.over:
            self.say(f"the run in {config.out} is at its end, step {done}: nothing is left to do")
            return 0
        for line in never_reached(config):
            self.say(line)
        if self.main:
            self.log = Log(config.out, self.start, owed=self.owed)
            about = {"config": config.to_json(), "versions": versions(), "ranks": self.accelerator.num_processes}
            self.log.write(done, "run", {**about, "device": self._device(), "classes": self.classes, **self.same})
        bar, report = progress(self.console, "train", config.steps, quiet=not self.main)
        since, seen, waited = time.perf_counter(), done, self.trainer.waited
        with interruptible() as signals, bar:
            try:
                if self.owed:  # the run was cut off in the validation of its newest checkpoint
                    self.validate(done)
                    since = time.perf_counter()
                for done, values in self.trainer.run(self.start):
                    if values is not None:
                        now = time.perf_counter()
                        rate = (done - seen) * config.batch_size / (now - since)
                        values["waiting"] = (self.trainer.waited - waited) / (now - since)
                        since, seen, waited = now, done, self.trainer.waited
                        report(done, {name: value for name, value in values.items() if name != "lr"})
                        if self.log is not None:
                            self.log.write(done, "train", {**values, "images_per_second": rate})
                    last = done == config.steps
                    stop = self._stopped(signals, values is not None)
                    self.owed = self.examples is not None and (last or _due(done, config.val_every))
                    # Before the validation, which may take longer than a scheduler waits after its signal.
                    if last or stop or self.owed or _due(done, config.save_every):
                        self.save(done)
                    if self.owed and (last or not stop):
                        self.validate(done)
                        since, seen, waited = time.perf_counter(), done, self.trainer.waited
                    if stop and not last:
                        self.say(
                            f"interrupted after step {done}, which is saved; the same command with --resume goes on."
                        )
                        return 128 + stop
            except Diverged as error:
                self.say(self.save_evidence(error), error=True)
                return 3
            except (ValueError, OSError, RuntimeError):
                if self.accelerator.num_processes == 1 and done > self.start:
                    with contextlib.suppress(Diverged):
                        self.save(done)  # nothing of the training is lost to an image, or to a validation without room
                raise
            finally:
                if self.log is not None:
                    self.log.close()
        return 0

    def validate(self, done: int) -> None:
        """Score on the validation split, single scale; keep the weights if they are the best so far, and say so.

        Comes after `save` of the same step.
        """
        config, accelerator = self.config, self.accelerator
        ranks = accelerator.num_processes
        model = self.trainer.whole_model()
        scores = evaluate(
            model,
            self.examples,
            Protocol(threshold=config.cam_threshold, precision=config.precision),
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=ranks,
            reduce=self.trainer.total if ranks > 1 else None,
            limit=config.val_images,
            workers=config.workers,
        )
        learnt = config.w_seg > 0 and done > config.seg_start  # else the head is as random as it began
        reached = scores["seg_miou"] if learnt and scores["seg_miou"] is not None else -1.0  # None: no mask is whole
        better = reached > self.best
        self.best = max(self.best, reached)
        weights = self.trainer.weights() if better else {}
        if self.log is not None:
            self.log.write(done, "val", scores)
            self.log.write(done, "high_band_share", self.high_band_shares(model))
            if better:
                path = config.out / "best.safetensors"
                save_weights(path, weights, config, self.classes, step=done, scores=scores)
        figures = {
            "segmentation mIoU": scores["seg_miou"] if learnt else None, "CAM mIoU": scores["cam_miou"],
            "intermediate CAM mIoU": scores["cam_inter_miou"], "mAP": scores["classification_map"],
        }  # fmt: skip
        said = ", ".join(f"{name} {value:.1f}" for name, value in figures.items() if value is not None)
        self.say(
            f"step {done}: {scores['images']['segmentation']} images of {config.val_split}, single scale, CAM with "
            f"known labels at threshold {config.cam_threshold}, in percent: {said}"
        )
        self.owed = False
        self.save(done)
        if left := scores["left_out"]:
            name, problem = next(iter(left.items()))
            self.say(f"left out: {len(left)} images whose files are broken; the first, {name}: {problem}")

    def high_band_shares(self, model: FFR) -> dict[str, float]:
        """Share of the high band in the features of every block: whether the paper's premise holds in this network."""
        energies: dict[str, torch.Tensor] = {}
        for index in range(min(LOOKED_AT, len(self.examples))):
            with contextlib.suppress(ValueError, OSError):  # a broken file, which the scores name
                image = self.examples[index].image[None].to(self.accelerator.device)
                with computing(image.device, self.config.precision):
                    by_depth = features_by_depth(model, image)
                for name, maps in by_depth.items():
                    energies[name] = energies.get(name, 0) + band_energies(maps, self.config.mu)
        return {name: high_share(energy) for name, energy in energies.items()}

    def save(self, done: int) -> None:
        """A checkpoint, and the weights as they are."""
        state, weights = self.trainer.state(), self.trainer.weights()
        self.trainer.look(weights, done - 1)
        if self.main:  # the weights first: a run that is cut off in between writes them again
            save_weights(self.config.out / "last.safetensors", weights, self.config, self.classes, step=done)
            content = {**state, **self.same, "best": self.best, "scored": self.scored, "owed": self.owed}
            save_checkpoint(self.config.out, done, self.config, content)
        self.accelerator.wait_for_everyone()  # a launcher gives the others half a minute when one of them has ended

    def save_evidence(self, error: Diverged) -> str:
        """What is needed to look at a term that is not finite: the images of its step, and the weights as they are."""
        size = self.config.batch_size
        numbers = list(range(error.step * size, (error.step + 1) * size))
        path = self.config.out / "diverged.pt"
        content = {
            "step": error.step, "term": error.term, "values": error.values, "config": self.config.to_text(),
            "samples": numbers, "images": [self.samples.name(n) for n in numbers],
            "model": {name: value.cpu() for name, value in self.trainer.weights().items()},
        }  # fmt: skip
        failed = ""
        if self.main:
            try:
                with written(path) as part:
                    torch.save(content, part)
            except (OSError, RuntimeError) as problem:
                failed = f"train: {error} Its evidence could not be written to {path} ({problem})."
        self.accelerator.wait_for_everyone()
        if failed:
            return failed
        kept = checkpoints(self.config.out)
        back = f"--resume goes on from {kept[0].name}" if kept else "there is no checkpoint yet"
        return (
            f"train: {error} Its images and the weights are in {path}; {back}. With --log-every 1 the weights are "
            "those before the step."
        )

    def say(self, text: str, *, error: bool = False) -> None:
        """Print once, not once a rank."""
        if self.main and error:
            print(text, file=sys.stderr)
        elif self.main:
            say(self.console, text)

    def _stopped(self, signals: list[int], reading: bool) -> int:
        """The signal that came, if any; several ranks agree on it where they read the terms anyway."""
        number = signals[0] if signals else 0
        if self.accelerator.num_processes == 1:
            return number
        if not reading:
            return 0
        return int(self.trainer.most(torch.tensor(number, device=self.accelerator.device)))

    def _device(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def never_reached(config: Config) -> list[str]:
    """What these settings leave out for good, where that is rarely meant: most often --steps alone was lowered."""
    said, steps = [], config.steps
    lost = [
        ("the segmentation head stays as random as it begins", config.w_seg),
        ("there is no rectification", config.lambda_l),
        ("there is no energy", config.w_reg),
    ]
    if config.seg_start >= steps and (meant := [what for what, weight in lost if weight > 0]):
        said.append(
            f"--seg-start {config.seg_start} is not reached in --steps {steps}: {' and '.join(meant)}. Lower it."
        )
    if config.affinity_start >= steps and config.w_aff > 0:
        said.append(f"--affinity-start {config.affinity_start} is not reached in --steps {steps}. Lower it.")
    if config.warmup >= steps:
        said.append(f"--warmup {config.warmup} is not over in --steps {steps}: --lr is never reached. Lower it.")
    return said


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def main() -> int:
    """0 trained, 2 refused, 3 a term was not finite, 128 + the signal that interrupted."""
    main_rank = os.environ.get("RANK", "0") == "0"
    console = Screen()
    try:
        config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
        config.check()
        accelerator = place(config)
        with claim(config.out, config.resume) if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            run = Run(config, accelerator, console)
            code = run.train()
            accelerator.end_training()
        if code == 0 and not run.over:
            best = f", best.safetensors (segmentation mIoU {run.best:.1f} %)" if run.best >= 0 else ""
            run.say(f"wrote last.safetensors{best} and {LOG} in {config.out}")
        return code
    except (ValueError, OSError, RuntimeError) as error:
        if not isinstance(error, (ValueError, OSError)) and "out of memory" not in str(error):
            raise
        text = str(error).strip().splitlines()
        if "out of memory" in str(error):
            text = [*text[:1], "Lower --batch-size or --crop, raise --accumulate, or add --grad-checkpointing."]
        said = text[-1] if text and "DataLoader worker" in text[0] else "\n".join(text)  # what the worker said last
        print(f"train: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if main_rank:
            print("train: interrupted; the newest checkpoint is whole, --resume goes on from it.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
